// The fast path: calls with the tensors as they come from their frameworks, without a request. What is not exportable
// (of a type known by its size alone, of unequal counts, strided where it is not the only tensor, sharing memory) is
// refused and takes the slow path.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "colltensor/kernels.h"
#include "fastpath.h"
#include "exports.h"
#include "registry.h"
#include "request.h"

namespace colltensor {

namespace ffi = tvm::ffi;

DType dtype_of(DLDataType type) {
  if (type.lanes != 1) return DType::kMovesOnly;
  const int log = type.bits == 8 ? 0 : type.bits == 16 ? 1 : type.bits == 32 ? 2 : type.bits == 64 ? 3 : 4;
  const auto step = [&](DType first, int from) { return static_cast<DType>(static_cast<int>(first) + log - from); };
  switch (type.code) {
    case kDLInt: return log < 4 ? step(DType::kInt8, 0) : DType::kMovesOnly;
    case kDLUInt: return log < 4 ? step(DType::kUInt8, 0) : DType::kMovesOnly;
    case kDLFloat:
      if (log == 1) return DType::kFloat16;
      return log == 2 || log == 3 ? step(DType::kFloat32, 2) : DType::kMovesOnly;
    case kDLBfloat: return log == 1 ? DType::kBFloat16 : DType::kMovesOnly;
    case kDLComplex:
      if (type.bits == 64) return DType::kComplex64;
      return type.bits == 128 ? DType::kComplex128 : DType::kMovesOnly;
    case kDLBool: return log == 0 ? DType::kBool : DType::kMovesOnly;
    default: return DType::kMovesOnly;
  }
}

Signature call_signature(Operation operation, std::uint8_t op, std::int16_t root, std::uint64_t count,
                         std::uint64_t leaves) {
  // The codes of colltensor/operations.py, by Operation.
  static constexpr std::uint8_t kCodes[] = {9, 1, 2, 3, 4, 6, 5, 7, 8, 13};
  unsigned char bytes[32] = {kCodes[static_cast<int>(operation)], op, 0, 0, 1};
  std::memcpy(bytes + 2, &root, sizeof root);
  std::memcpy(bytes + 5, &count, sizeof count);
  std::memcpy(bytes + 13, &leaves, sizeof leaves);
  Signature signature;
  std::memcpy(signature.words, bytes, sizeof bytes);
  return signature;
}

namespace {

Signature fast_signature(Operation operation, std::uint8_t op, std::int16_t root, std::uint64_t count, DType dtype) {
  return call_signature(operation, op, root, count,
                        dtype == DType::kMovesOnly ? 0 : static_cast<std::uint64_t>(dtype));
}

// Returns true if no element lies in another one's place, as far as the strides show it at once: each axis steps over
// all that the smaller steps reach. False for steps that go backwards.
bool has_room(const ffi::TensorView& tensor) {
  std::vector<std::pair<std::int64_t, std::int64_t>> axes;  // stride and extent
  for (int i = 0; i < tensor.ndim(); ++i) {
    if (tensor.shape()[i] == 1) continue;
    if (tensor.strides()[i] <= 0) return false;
    axes.emplace_back(tensor.strides()[i], tensor.shape()[i]);
  }
  std::sort(axes.begin(), axes.end());
  std::int64_t reached = 0;
  for (const auto& [stride, extent] : axes) {
    std::int64_t span;
    if (stride <= reached || __builtin_mul_overflow(extent - 1, stride, &span) ||
        __builtin_add_overflow(reached, span, &reached)) {
      return false;
    }
  }
  return true;
}

// A tensor's memory; null data and no dtype where the tensor is not exportable.
struct Exported {
  explicit Exported(const ffi::TensorView& tensor) {
    if (tensor.device().device_type != kDLCPU) return;
    contiguous = tensor.IsContiguous() || tensor.numel() == 0;
    if (!contiguous && !has_room(tensor)) return;
    count = static_cast<std::size_t>(tensor.numel());
    if (is_unmapped(tensor.data_ptr()) && count != 0) return;  // freed, as torch may while the tensor stays
    dtype = dtype_of(tensor.dtype());
    nbytes = count * item_size(dtype);
    data = static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset();
  }

  char* data = nullptr;
  std::size_t count = 0, nbytes = 0;
  DType dtype = DType::kMovesOnly;
  bool contiguous = false;
};

std::int64_t code(Outcome outcome) { return static_cast<std::int64_t>(outcome); }

// Takes tensors as a fast call does, and does nothing with them.
ffi::Function export_function() {
  return ffi::Function::FromPacked([](const ffi::AnyView* arguments, std::int32_t number, ffi::Any*) {
    for (std::int32_t i = 0; i < number; ++i) arguments[i].cast<ffi::TensorView>();
  });
}

// Ends what a brief call of this thread's left pending, without the interpreter lock; does nothing without one.
ffi::Function resume_function(std::int64_t handle, std::int64_t timeout_ns) {
  return ffi::Function::FromTyped([handle, timeout_ns]() -> std::int64_t {
    Group* group = claim_member(handle);
    if (group == nullptr) return code(Outcome::kClosed);
    std::int64_t detail = 0;
    const Outcome outcome = group->resume(now_ns() + timeout_ns, detail);
    if (outcome == Outcome::kSignalled) group->fail(Failure::kBroken, {});
    release_member(handle);
    if (outcome == Outcome::kSignalled) throw ffi::EnvErrorAlreadySet();
    return code(outcome) | detail << 8;
  });
}

// Which of the two arguments of a stacked call has the tensors of all ranks.
bool is_stack(Operation operation, int argument) {
  switch (operation) {
    case Operation::kAllGather:
    case Operation::kGather: return argument == 0;
    case Operation::kReduceScatter:
    case Operation::kScatter: return argument == 1;
    case Operation::kAllToAll: return true;
    default: return false;
  }
}

// The tensors of a call, each of the first one's count and dtype.
class Tensors {
 public:
  // False if they are not exportable and alike.
  bool take(const FastCall& call, int ranks, const ffi::AnyView* arguments, int number) {
    views_.clear();
    first_ = {};
    if (call.stacked && number != 2) return false;
    for (int i = 0; i < number; ++i) {
      const auto tensor = arguments[i].cast<ffi::TensorView>();
      const Exported exported(tensor);
      if (exported.dtype == DType::kMovesOnly) return false;
      if (!exported.contiguous) {
        if (number != 1 || call.stacked) return false;
        first_ = {exported.count, exported.nbytes, exported.dtype};
        views_.emplace_back(exported.data, item_size(exported.dtype), tensor.ndim(), tensor.shape().data(),
                            tensor.strides().data());
        return true;
      }
      const std::size_t parts = call.stacked && is_stack(call.operation, i) ? static_cast<std::size_t>(ranks) : 1;
      const std::size_t count = exported.count / parts, nbytes = exported.nbytes / parts;
      if (i == 0) {
        first_ = {count, nbytes, exported.dtype};
      } else if (exported.dtype != first_.dtype || count != first_.count) {
        return false;
      }
      if (count * parts != exported.count) return false;
      for (std::size_t part = 0; part < parts; ++part) {
        views_.emplace_back(exported.data + part * nbytes, item_size(exported.dtype));
      }
    }
    return true;
  }

  // True if one of the `written` tensors from `start` on shares memory with another tensor, but for one that is `same`
  // as tensor `source`.
  bool share_memory(int start, int written, int source, int same) {
    if (first_.nbytes == 0) return false;
    ranges_.clear();
    for (int i = 0; i < static_cast<int>(views_.size()); ++i) {
      if (i == source && same >= 0 && views_[i].data() == views_[same].data()) continue;
      ranges_.push_back({views_[i].data(), i >= start && i < start + written});
    }
    std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.low < b.low; });
    const char *end = nullptr, *written_end = nullptr;  // of all ranges so far, and of the written ones
    for (const Range& range : ranges_) {
      if (range.low < (range.written ? end : written_end)) return true;
      end = std::max(end, range.low + first_.nbytes);
      if (range.written) written_end = std::max(written_end, range.low + first_.nbytes);
    }
    return false;
  }

  const View& operator[](int i) const { return views_[i]; }
  const View* from(int i) const { return views_.data() + i; }
  int size() const { return static_cast<int>(views_.size()); }
  std::size_t count() const { return first_.count; }
  DType dtype() const { return first_.dtype; }

 private:
  struct First {
    std::size_t count = 0, nbytes = 0;
    DType dtype = DType::kMovesOnly;
  } first_;
  struct Range {
    const char* low;
    bool written;
  };
  std::vector<View> views_;
  std::vector<Range> ranges_;  // kept for its memory
};

bool is_fast_call(const FastCall& call, Tensors& tensors, int rank, int ranks) {
  const bool is_root = call.root == rank, has_root = call.root >= 0 && call.root < ranks;
  switch (call.operation) {
    case Operation::kBarrier: return tensors.size() == 0;
    case Operation::kAllReduce: return tensors.size() == 1;
    case Operation::kReduce:
    case Operation::kBroadcast: return has_root && tensors.size() == 1;
    case Operation::kAllGather: return tensors.size() == ranks + 1 && !tensors.share_memory(0, ranks, ranks, rank);
    case Operation::kGather:
      return has_root && tensors.size() == (is_root ? ranks + 1 : 1) &&
             !(is_root && tensors.share_memory(0, ranks, ranks, rank));
    case Operation::kReduceScatter: return tensors.size() == ranks + 1 && !tensors.share_memory(0, 1, -1, -1);
    case Operation::kScatter:
      return has_root && tensors.size() == (is_root ? ranks + 1 : 1) && !tensors.share_memory(0, 1, -1, -1);
    case Operation::kAllToAll: return tensors.size() == 2 * ranks && !tensors.share_memory(0, ranks, -1, -1);
    case Operation::kTransfer:
      // -1 stands for no transfer that way, and never for a rank that a caller names.
      return call.root >= -1 && call.root < ranks && call.source >= -1 && call.source < ranks &&
             call.root != rank && call.source != rank && tensors.size() == (call.root >= 0) + (call.source >= 0) &&
             !(tensors.size() == 2 && tensors.share_memory(1, 1, -1, -1));
  }
  return false;
}

Outcome run_transfer(Group& group, const FastCall& call, const View* views, std::size_t count, DType dtype,
                     std::int64_t deadline_ns, std::int64_t& detail) {
  const std::size_t item = item_size(dtype);
  const auto sign = [&](int source) {
    return fast_signature(Operation::kTransfer, 255, static_cast<std::int16_t>(source), count, dtype);
  };
  Group::Transfer send{}, recv{};
  if (call.root >= 0) send = {&views[0], count, item, call.root, sign(group.rank())};
  if (call.source >= 0) recv = {&views[call.root >= 0], count, item, call.source, sign(call.source)};
  const Outcome outcome =
      group.transfer(call.root >= 0 ? &send : nullptr, call.source >= 0 ? &recv : nullptr, deadline_ns);
  detail = (send.mismatch ? 1 : 0) | (recv.mismatch ? 2 : 0);
  return outcome;
}

}  // namespace

Outcome run_fast(Group& group, const FastCall& call, const View* views, std::size_t count, DType dtype,
                   std::int64_t deadline_ns, std::int64_t& detail) {
  if (call.operation == Operation::kTransfer) {
    return run_transfer(group, call, views, count, dtype, deadline_ns, detail);
  }
  const Signature signature = fast_signature(call.operation, static_cast<std::uint8_t>(call.op),
                                               static_cast<std::int16_t>(call.root), count, dtype);
  const Collective collective{call.operation, static_cast<ReduceOp>(call.op), dtype, item_size(dtype), count, call.root,
                              signature};
  return run_collective(group, collective, views, deadline_ns);
}

namespace {

// One operation on exportable tensors, given in the order of a request's views. Where the interpreter lock is kept it must be
// `brief`: the turn is kept where it returns kPending, and the function of resume_function() must follow. Of a transfer's
// mismatch the code says which direction differs: 256 the send, 512 the receive.
ffi::Function fast_function(std::int64_t handle, std::int64_t timeout_ns, int operation, std::int64_t op, int root,
                              int source, bool stacked, bool brief) {
  const FastCall call{static_cast<Operation>(operation), op, root, source, stacked};
  const auto made = std::make_shared<Tensors>();  // kept for its memory; of whoever has the turn
  return ffi::Function::FromPacked([=](const ffi::AnyView* arguments, std::int32_t number, ffi::Any* returned) {
    Turn group(handle);
    if (group.outcome() != Outcome::kDone) {
      *returned = code(group.outcome());
      return;
    }
    Tensors& tensors = *made;
    *returned = code(Outcome::kRefused);
    if (!tensors.take(call, group->world_size(), arguments, number)) return;
    if (!is_fast_call(call, tensors, group->rank(), group->world_size())) return;
    std::int64_t detail = 0;
    const Outcome outcome = run_fast(*group, call, tensors.from(0), tensors.count(), tensors.dtype(),
                                       brief ? Group::kBrief : now_ns() + timeout_ns, detail);
    if (outcome == Outcome::kPending) {
      Group::Rest rest = [made, call, &group = *group](std::int64_t deadline_ns, std::int64_t& detail) {
        return run_fast(group, call, made->from(0), made->count(), made->dtype(), deadline_ns, detail);
      };
      group.keep();
      *returned = code(outcome);
      group->postpone(std::move(rest));  // where another thread closes the group it may be gone from here on
      return;
    }
    *returned = result(*group, outcome) | detail << 8;
  });
}

// One operation of a group of one rank, on exportable tensors in the order of a request's views: nothing, or a copy. Where
// the interpreter lock is kept it must be `brief`: large copies are left to the function that lets go of it.
ffi::Function loopback_function(int operation, std::int64_t op, int root, int source, bool stacked, bool brief) {
  constexpr std::size_t kBriefNbytes = std::size_t{1} << 20;
  const FastCall call{static_cast<Operation>(operation), op, root, source, stacked};
  const bool reduces = call.operation == Operation::kAllReduce || call.operation == Operation::kReduce ||
                       call.operation == Operation::kReduceScatter;
  const bool is_from_second = call.operation == Operation::kReduceScatter || call.operation == Operation::kScatter ||
                              call.operation == Operation::kAllToAll || call.operation == Operation::kAllGather ||
                              call.operation == Operation::kGather;
  return ffi::Function::FromPacked([=](const ffi::AnyView* arguments, std::int32_t number, ffi::Any* returned) {
    static thread_local Tensors tensors;  // kept for its memory
    *returned = code(Outcome::kRefused);
    if (!tensors.take(call, 1, arguments, number) || !is_fast_call(call, tensors, 0, 1)) return;
    if (reduces && find_reduction(tensors.dtype(), static_cast<ReduceOp>(op)) == nullptr) return;
    if (is_from_second && tensors[0].data() != tensors[1].data()) {
      const std::size_t nbytes = tensors.count() * tensors[0].item_nbytes();
      if (brief && nbytes > kBriefNbytes) {
        *returned = code(Outcome::kLarge);
        return;
      }
      copy(tensors[0].data(), tensors[1].data(), nbytes);
    }
    *returned = code(Outcome::kDone);
  });
}

// Puts one operation on exportable tensors into the queue, in the order of a request's views; their memory must stay until it
// has ended. Returns its number, or less what is wrong.
ffi::Function issue_function(std::int64_t handle, std::int64_t timeout_ns, int operation, std::int64_t op, int root,
                             int source, bool stacked) {
  const FastCall call{static_cast<Operation>(operation), op, root, source, stacked};
  const std::shared_ptr<Queue> queue = member_queue(handle);
  const Guest group(handle);
  const int rank = group ? group->rank() : 0, ranks = group ? group->world_size() : 0;
  const bool reduces = call.operation == Operation::kAllReduce || call.operation == Operation::kReduce ||
                       call.operation == Operation::kReduceScatter;
  return ffi::Function::FromPacked([=](const ffi::AnyView* arguments, std::int32_t number, ffi::Any* returned) {
    *returned = -code(Outcome::kClosed);
    if (queue == nullptr || queue->foreign()) return;
    const auto tensors = std::make_shared<Tensors>();
    *returned = -code(Outcome::kRefused);
    if (!tensors->take(call, ranks, arguments, number) || !is_fast_call(call, *tensors, rank, ranks)) return;
    if (reduces && find_reduction(tensors->dtype(), static_cast<ReduceOp>(op)) == nullptr) return;
    const std::int64_t issued = queue->push([=] {
      const std::int64_t deadline_ns = now_ns() + timeout_ns;
      const Outcome held = hold_member(handle, deadline_ns);
      if (held != Outcome::kDone) return code(held);
      Group& group = *held_member(handle);
      std::int64_t detail = 0;
      const Outcome outcome =
          run_fast(group, call, tensors->from(0), tensors->count(), tensors->dtype(), deadline_ns, detail);
      release_member(handle);
      return code(outcome) | detail << 8;
    });
    *returned = issued != 0 ? issued : -code(Outcome::kClosed);
  });
}

// Puts what a brief call of this thread's left pending into the queue, and returns its number.
ffi::Function hand_over_function(std::int64_t handle, std::int64_t timeout_ns) {
  const std::shared_ptr<Queue> queue = member_queue(handle);
  return ffi::Function::FromTyped([=]() -> std::int64_t {
    if (queue == nullptr || queue->foreign()) return -code(Outcome::kClosed);
    {
      const Guest group(handle);
      if (group) group->hand_over(queue.get());
    }
    const std::int64_t issued = queue->push([handle, timeout_ns, owner = queue.get()] {
      Group* group = claim_member(handle, owner);
      if (group == nullptr) return code(Outcome::kClosed);
      std::int64_t detail = 0;
      const Outcome outcome = group->resume(now_ns() + timeout_ns, detail);
      release_member(handle);
      return code(outcome) | detail << 8;
    });
    return issued != 0 ? issued : -code(Outcome::kClosed);
  });
}

enum class Asked { kIssued, kEnded, kServe, kKick, kNotify, kClose, kCancel };

// One of what Python asks of the queue, with the number of a call where it concerns one.
ffi::Function queue_function(std::int64_t handle, std::int64_t asked) {
  const std::shared_ptr<Queue> queue = member_queue(handle);
  return ffi::Function::FromTyped([=](std::int64_t number) -> std::int64_t {
    if (queue == nullptr || queue->foreign()) return 0;
    switch (static_cast<Asked>(asked)) {
      case Asked::kIssued: return queue->issued();
      case Asked::kEnded: return queue->ended();
      case Asked::kServe: return queue->serve(number != 0);
      case Asked::kKick: queue->kick(); break;
      case Asked::kNotify: return queue->notify(number) ? 1 : 0;
      case Asked::kClose: return queue->close();
      case Asked::kCancel: queue->cancel(); break;
    }
    return 0;
  });
}

// Waits until a call has ended: true if it has.
ffi::Function queue_wait_function(std::int64_t handle) {
  const std::shared_ptr<Queue> queue = member_queue(handle);
  return ffi::Function::FromTyped([=](std::int64_t number, std::int64_t timeout_ns) {
    if (queue == nullptr || queue->foreign()) return false;
    const std::int64_t now = now_ns();
    const std::int64_t limit = timeout_ns > INT64_MAX - now ? INT64_MAX : now + timeout_ns;
    bool interrupted = false;
    const bool ended = queue->wait(number, limit, signalled, interrupted);
    if (interrupted) throw ffi::EnvErrorAlreadySet();
    return ended;
  });
}

}  // namespace
}  // namespace colltensor

TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_export_function, colltensor::export_function)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_resume_function, colltensor::resume_function)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_fast_function, colltensor::fast_function)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_loopback_function, colltensor::loopback_function)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_issue_function, colltensor::issue_function)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_hand_over_function, colltensor::hand_over_function)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_queue_function, colltensor::queue_function)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_queue_wait_function, colltensor::queue_wait_function)
