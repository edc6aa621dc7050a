// Collectives inside a computation of XLA's: the target that every one of them calls, and what takes XLA's token out of
// its call.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

#include <array>
#include <atomic>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "colltensor/float_state.h"
#include "colltensor/kernels.h"
#include "fastpath.h"
#include "exports.h"
#include "registry.h"

namespace colltensor {
namespace {

namespace ffi = tvm::ffi;

// One call: the group's handle in the registry, -1 if it is in no shared memory; the group's number in Python; a code
// of ColTensor's dtypes. The result has the elements of the operand already where XLA gave both one memory.
struct JaxCall {
  std::int64_t handle, number, dtype;
  FastCall call;
  char *given, *result;
  std::size_t given_nbytes, result_nbytes;
};

// The views of a call in the order of a request's, of `count` elements each.
std::vector<View> views_of(const JaxCall& call, DType dtype, std::size_t& count) {
  const std::size_t item = item_size(dtype);
  const Operation operation = call.call.operation;
  const bool gathers = operation == Operation::kAllGather, scatters = operation == Operation::kReduceScatter;
  const std::size_t part = scatters ? call.result_nbytes : call.given_nbytes;
  const std::size_t parts = !gathers && !scatters ? 0
                            : part == 0           ? 0
                                                  : (gathers ? call.result_nbytes : call.given_nbytes) / part;
  count = part / item;
  std::vector<View> views;
  if (scatters || (!gathers && !(operation == Operation::kTransfer && call.call.root >= 0 && call.call.source >= 0))) {
    views.emplace_back(call.result, item);
  } else if (!gathers) {
    views.emplace_back(call.given, item);
    views.emplace_back(call.result, item);
  }
  char* list = gathers ? call.result : call.given;
  for (std::size_t i = 0; i < parts; ++i) views.emplace_back(list + i * part, item);
  if (gathers) views.emplace_back(call.given, item);
  return views;
}

// By the group's place in the registry: whether asynchronous calls of it wait in Python, behind which a call must queue.
std::atomic<bool> deferred[4096];

std::atomic<bool>& deferred_at(std::int64_t handle) { return deferred[static_cast<std::size_t>(handle) % 4096]; }

// Whether this thread runs a collective of a computation: it must not wait for computations.
bool inside() { return InsideXla::inside; }

void defer(std::int64_t handle, bool on) { deferred_at(handle).store(on, std::memory_order_release); }

bool is_fast_call(const JaxCall& call, const Group& group) {
  const int rank = group.rank(), ranks = group.world_size();
  const auto code = static_cast<DType>(call.dtype);
  if (call.dtype >= static_cast<std::int64_t>(DType::kMovesOnly)) return false;
  switch (call.call.operation) {
    case Operation::kAllReduce:
    case Operation::kReduce:
    case Operation::kReduceScatter:
      return call.given_nbytes != 0 && find_reduction(code, static_cast<ReduceOp>(call.call.op)) != nullptr;
    case Operation::kBroadcast: return call.call.root >= 0 && call.call.root < ranks;
    case Operation::kAllGather: return call.given_nbytes != 0;
    case Operation::kTransfer: return call.call.root != rank && call.call.source != rank;
    default: return false;
  }
}

// The code of the call, as the fast calls return it. A signal is left to the check of the group's hooks, since
// XLA has no way to pass on an exception of the interpreter's.
std::int64_t run(const JaxCall& call) {
  if (call.handle < 0 || deferred_at(call.handle).load(std::memory_order_acquire)) {
    return static_cast<std::int64_t>(Outcome::kRefused);
  }
  Turn group(call.handle);
  if (group.outcome() != Outcome::kDone) return static_cast<std::int64_t>(group.outcome());
  if (!is_fast_call(call, *group)) return static_cast<std::int64_t>(Outcome::kRefused);
  const auto dtype = static_cast<DType>(call.dtype);
  std::size_t count = 0;
  const std::vector<View> views = views_of(call, dtype, count);
  std::int64_t detail = 0;
  const InsideXla inside;
  const Outcome outcome =
      run_fast(*group, call.call, views.data(), count, dtype, now_ns() + group->timeout_ns(), detail);
  return static_cast<std::int64_t>(outcome) | detail << 8;
}

char* address_of(const ffi::TensorView& tensor) { return static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset(); }

bool copies_first(const FastCall& call) {
  switch (call.operation) {
    case Operation::kAllReduce:
    case Operation::kReduce:
    case Operation::kBroadcast: return true;
    case Operation::kTransfer: return call.root < 0 || call.source < 0;
    default: return false;
  }
}

// The parts that are read here of XLA's call frame, whose layout its C interface fixes (xla/ffi/api/c_api.h: fields are
// only ever added behind).
struct XlaBuffer {
  std::size_t struct_size;
  void* extension;
  std::int32_t dtype;
};
struct XlaBuffers {
  std::size_t struct_size;
  void* extension;
  std::int64_t count;
  std::int32_t* types;
  XlaBuffer** buffers;
};
struct XlaScalar {
  std::int32_t dtype;
  void* value;
};
struct XlaName {
  const char* data;
  std::size_t size;
};
struct XlaAttributes {
  std::size_t struct_size;
  void* extension;
  std::int64_t count;
  std::int32_t* types;
  XlaName** names;
  void** values;
};
struct XlaCallFrame {
  std::size_t struct_size;
  void* extension;
  const void* api;
  void* context;
  std::int32_t stage;
  XlaBuffers operands, results;
  XlaAttributes attributes;
};
using XlaHandler = void*(XlaCallFrame*);

constexpr std::int32_t kXlaUInt8 = 6, kXlaInt64 = 5, kXlaToken = 17, kXlaScalar = 3;

// The attributes of the call that this thread runs. jax-tvm-ffi is not asked for them: what it decodes it keeps for
// ever (0.1.3 never clears its list of them), 16 bytes each.
thread_local const XlaAttributes* attributes_here = nullptr;

enum Attribute { kDType, kHandle, kItemSize, kNumber, kOp, kOperation, kRoot, kSource, kAttributes };

// In the order in which XLA has them, which is that of their names.
constexpr const char* kAttributeNames[kAttributes] = {"dtype", "handle",    "itemsize", "number",
                                                      "op",    "operation", "root",     "source"};

using Numbers = std::array<std::int64_t, kAttributes>;

// An error for XLA, without the trace of C++ that TVM_FFI_THROW collects, and tvm-ffi for each exception of Python's that
// passes through it: for the first one it reads the symbols of the whole process, which takes half a second of the
// processor and seconds under load.
ffi::Error told(const std::string& message) { return ffi::Error("RuntimeError", message, std::string()); }

Numbers numbers_here() {
  const XlaAttributes* given = attributes_here;
  Numbers numbers{};
  for (std::size_t i = 0; i < kAttributes; ++i) {
    const bool there = given != nullptr && given->count == kAttributes && given->types[i] == kXlaScalar &&
                       std::string_view(given->names[i]->data, given->names[i]->size) == kAttributeNames[i];
    const auto* scalar = there ? static_cast<const XlaScalar*>(given->values[i]) : nullptr;
    if (scalar == nullptr || scalar->dtype != kXlaInt64) {
      throw told(std::string("a collective was called without its attribute ") + kAttributeNames[i] +
                 ": colltensor and this version of JAX do not fit each other");
    }
    numbers[i] = *static_cast<const std::int64_t*>(scalar->value);
  }
  return numbers;
}

std::size_t nbytes_of(const ffi::TensorView& tensor, const Numbers& numbers) {
  return static_cast<std::size_t>(tensor.numel()) * static_cast<std::size_t>(numbers[kItemSize]);
}

// Ends a call that Python was asked to end, which answers with the message of what it raised, or with nothing.
void conclude(const ffi::Any& answer) {
  if (const auto message = answer.as<ffi::String>()) throw told(*message);
}

// The target: (operand, result), which come as bytes, one an element, whatever their dtype (PlainBuffers). What is not
// done here goes to `complete` in Python, which ends it or says why not: (number, code, dtype, operation, op, root, source,
// address and bytes of the operand, address and bytes of the result).
ffi::Function target(ffi::Function complete) {
  return ffi::Function::FromPacked([complete = std::move(complete)](const ffi::AnyView* arguments, std::int32_t,
                                                                ffi::Any*) {
    const Numbers n = numbers_here();
    const auto given = arguments[0].cast<ffi::TensorView>(), result = arguments[1].cast<ffi::TensorView>();
    const JaxCall call{n[kHandle], n[kNumber], n[kDType],
                       {static_cast<Operation>(n[kOperation]), n[kOp], static_cast<int>(n[kRoot]),
                        static_cast<int>(n[kSource])},
                       address_of(given), address_of(result), nbytes_of(given, n), nbytes_of(result, n)};
    if (copies_first(call.call) && call.given != call.result && call.given_nbytes != 0) {
      copy(call.result, call.given, call.given_nbytes);
    }
    const std::int64_t code = run(call);
    if (code == 0) return;
    conclude(complete(call.number, code, call.dtype, n[kOperation], call.call.op, n[kRoot], n[kSource],
                    reinterpret_cast<std::int64_t>(call.given), static_cast<std::int64_t>(call.given_nbytes),
                    reinterpret_cast<std::int64_t>(call.result), static_cast<std::int64_t>(call.result_nbytes)));
  });
}

// The target on a CUDA device: (stream, operand, result), bytes as above. All of it is Python's, which queues the
// call on the stream: (number, dtype, operation, op, root, source, stream, device, address and bytes of the operand,
// address and bytes of the result).
ffi::Function device_target(ffi::Function queue) {
  return ffi::Function::FromPacked([queue = std::move(queue)](const ffi::AnyView* arguments, std::int32_t, ffi::Any*) {
    const Numbers n = numbers_here();
    const auto stream = arguments[0].cast<std::int64_t>();
    const auto given = arguments[1].cast<ffi::TensorView>(), result = arguments[2].cast<ffi::TensorView>();
    conclude(queue(n[kNumber], n[kDType], n[kOperation], n[kOp], n[kRoot], n[kSource], stream,
                   static_cast<std::int64_t>(result.device().device_id),
                   reinterpret_cast<std::int64_t>(address_of(given)), static_cast<std::int64_t>(nbytes_of(given, n)),
                   reinterpret_cast<std::int64_t>(address_of(result)),
                   static_cast<std::int64_t>(nbytes_of(result, n))));
  });
}

// jax-tvm-ffi's handler of a target, which has no other name than its address: one on hosts, one on devices.
enum Place { kHost, kDevice };
template <Place place>
std::atomic<XlaHandler*> inner{nullptr};

// For as long as it lives: a list of one tensor and a token without the token, and the tensor's dtype as one that
// jax-tvm-ffi knows. It knows no complex numbers and no 8-bit floats.
class PlainBuffers {
 public:
  explicit PlainBuffers(XlaBuffers& list) : list_(list), count_(list.count) {
    if (count_ == 0) return;  // XLA asks for the handler's version
    if (list.buffers[count_ - 1]->dtype == kXlaToken) list.count -= 1;
    dtype_ = std::exchange(list.buffers[0]->dtype, kXlaUInt8);
  }
  ~PlainBuffers() {
    list_.count = count_;
    if (count_ != 0) list_.buffers[0]->dtype = dtype_;
  }
  PlainBuffers(const PlainBuffers&) = delete;
  PlainBuffers& operator=(const PlainBuffers&) = delete;

 private:
  XlaBuffers& list_;
  const std::int64_t count_;
  std::int32_t dtype_ = 0;
};

// jax-tvm-ffi's handler refuses a call with a token among its operands. The token has no bytes: XLA alone needs it, to
// order the calls. XLA's threads flush subnormals; what is computed here, in Python too, is computed as everywhere else.
template <Place place>
void* without_token(XlaCallFrame* frame) {
  const FloatState state;
  const PlainBuffers operands(frame->operands), results(frame->results);
  const XlaAttributes* outer = std::exchange(attributes_here, &frame->attributes);
  void* error = inner<place>.load(std::memory_order_acquire)(frame);
  attributes_here = outer;
  return error;
}

template <Place place>
std::int64_t wrapped(std::int64_t handler) {
  inner<place>.store(reinterpret_cast<XlaHandler*>(handler), std::memory_order_release);
  return reinterpret_cast<std::int64_t>(&without_token<place>);
}

// The address of a handler that calls the one at `handler` without the token.
std::int64_t wrap(std::int64_t handler, bool on_device) {
  return on_device ? wrapped<kDevice>(handler) : wrapped<kHost>(handler);
}

}  // namespace
}  // namespace colltensor

TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_jax_target, colltensor::target)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_jax_device_target, colltensor::device_target)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_jax_inside, colltensor::inside)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_jax_defer, colltensor::defer)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_jax_without_token, colltensor::wrap)
