// The fast path of trees: the leaves as they come from their frameworks, in one call, which is one collective for all
// leaves of a dtype. What is known of the tree's structure (its plan) is told once.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "colltensor/kernels.h"
#include "fastpath.h"
#include "exports.h"
#include "python.h"
#include "registry.h"
#include "request.h"

namespace colltensor {
namespace {

namespace ffi = tvm::ffi;

// What a tree's leaves must be. Packed by colltensor.tree_plans: the number of leaves, of all elements, the hash of the
// leaves, then of each leaf its dtype, its number of elements, and its shape: how many axes, -1 for any, and extents.
struct Plan {
  explicit Plan(const std::int64_t*& words) : count(static_cast<std::size_t>(words[1])), hash(words[2]) {
    const std::int64_t* next = words + 3;
    for (std::int64_t i = 0; i < words[0]; ++i) {
      const auto dtype = static_cast<DType>(next[0]);
      const std::int64_t axes = next[2];
      const std::int64_t* extents = next + 3;
      next = extents + std::max(axes, std::int64_t{0});
      leaves.push_back({dtype, static_cast<std::size_t>(extents[-2]), axes >= 0, {extents, next}});
      auto same = std::find_if(transfers.begin(), transfers.end(),
                               [&](const std::vector<int>& members) { return leaves[members[0]].dtype == dtype; });
      if (same == transfers.end()) same = transfers.insert(same, std::vector<int>{});
      same->push_back(static_cast<int>(i));
    }
    for (const std::vector<int>& members : transfers) {
      counts.push_back(0);
      for (int member : members) counts.back() += leaves[static_cast<std::size_t>(member)].count;
    }
    words = next;
  }

  struct Leaf {
    DType dtype;
    std::size_t count;
    bool shaped;
    std::vector<std::int64_t> shape;
  };
  std::vector<Leaf> leaves;
  std::vector<std::vector<int>> transfers;  // the leaves of each dtype, in the order in which the dtypes first come
  std::vector<std::size_t> counts;  // of the elements of each
  std::size_t count;
  std::int64_t hash;
};

// True where two index tuples of a layout may share memory.
bool overlaps_itself(const DLTensor& tensor) {
  std::vector<std::pair<std::int64_t, std::int64_t>> axes;
  for (int axis = 0; axis < tensor.ndim; ++axis) {
    if (tensor.shape[axis] > 1) axes.push_back({std::abs(tensor.strides[axis]), tensor.shape[axis]});
  }
  std::sort(axes.begin(), axes.end());
  std::int64_t reach = 1;
  for (const auto& [stride, extent] : axes) {
    if (stride < reach) return true;
    reach = stride * (extent - 1) + reach;
  }
  return false;
}

// The memory of a tree's leaves, from call to call the same object.
class Leaves {
 public:
  explicit Leaves(std::shared_ptr<const Plan> plan)
      : plan_(std::move(plan)), kept_(plan_->transfers.size(), View(nullptr, 0)), spans_(plan_->leaves.size()) {
    for (const Plan::Leaf& leaf : plan_->leaves) views_.emplace_back(nullptr, item_size(leaf.dtype));
  }

  // False if they are not what the plan says, or cannot be taken as they are: not on the host, without memory, or of
  // memory that they share and that is `written`.
  bool take(const ffi::AnyView* arguments, int number, bool written) {
    if (number != static_cast<int>(plan_->leaves.size())) return false;
    strided_ = false;
    for (int i = 0; i < number; ++i) {
      if (!take_one(*arguments[i].cast<DLTensor*>(), i, written)) return false;
    }
    return !written || !share_memory();
  }

  // The same of a list of leaves that are all of one type; -1 where they are not, or `reader` does not take one.
  std::int64_t take(void* list, void* type, Reader reader, bool written) {
    const PythonApi& python = *python_api();
    const std::size_t number = plan_->leaves.size();
    if (python.list_size(list) != static_cast<std::int64_t>(number)) {
      python.clear_error();
      return -1;
    }
    constexpr auto kRefused = static_cast<std::int64_t>(Outcome::kRefused);
    strided_ = false;
    for (std::size_t i = 0; i < number; ++i) {
      void* leaf = python.list_item(list, static_cast<std::int64_t>(i));
      DLTensor tensor;
      if (type_of(leaf) != type) return -1;
      if (reader(leaf, &tensor) != 0) {
        python.clear_error();
        return -1;
      }
      if (!take_one(tensor, i, written)) return kRefused;
    }
    return !written || !share_memory() ? 0 : kRefused;
  }

  // Contiguous leaves at these addresses; false if they are not as many as the plan says.
  bool take_addresses(const ffi::AnyView* addresses, int number) {
    if (number != static_cast<int>(plan_->leaves.size())) return false;
    strided_ = false;
    for (std::size_t i = 0; i < views_.size(); ++i) place(i, reinterpret_cast<char*>(addresses[i].cast<std::int64_t>()));
    return true;
  }

  // The same, of addresses that lie in a row.
  void take(const std::int64_t* addresses) {
    strided_ = false;
    for (std::size_t i = 0; i < views_.size(); ++i) place(i, reinterpret_cast<char*>(addresses[i]));
  }

  // `moved`, if there is one, is called when the ranks agree, and returns other addresses of the leaves.
  Outcome run(Group& group, const FastCall& call, std::int64_t deadline_ns,
              const std::function<const std::int64_t*()>& moved) {
    Signature signature = call_signature(call.operation, static_cast<std::uint8_t>(call.op),
                                         static_cast<std::int16_t>(call.root), plan_->count,
                                         static_cast<std::uint64_t>(plan_->hash));
    for (std::size_t index = 0; index < plan_->transfers.size(); ++index) {
      const DType dtype = plan_->leaves[static_cast<std::size_t>(plan_->transfers[index][0])].dtype;
      View view = joined(index);
      signature.words[3] = index;
      std::function<void()> agreed;
      if (moved && index == 0) {
        agreed = [&] {
          take(moved());
          view = joined(index);
        };
      }
      const WhenAgreed notice(group, agreed);
      const Collective collective{call.operation, static_cast<ReduceOp>(call.op), dtype, item_size(dtype),
                                  plan_->counts[index], call.root,      signature};
      const Outcome outcome = run_collective(group, collective, &view, deadline_ns);
      if (outcome != Outcome::kDone) return outcome;
    }
    return Outcome::kDone;
  }

  // The leaves of each dtype are a transfer; `detail` is what run_fast() says of it.
  Outcome run_transfers(Group& group, const FastCall& call, std::int64_t deadline_ns, std::int64_t& detail) {
    const bool sends = call.root >= 0;
    const int source = sends ? group.rank() : call.source, peer = sends ? call.root : call.source;
    Signature signature = call_signature(Operation::kTransfer, 255, static_cast<std::int16_t>(source), plan_->count,
                                         static_cast<std::uint64_t>(plan_->hash));
    for (std::size_t index = 0; index < plan_->transfers.size(); ++index) {
      const View view = joined(index);
      signature.words[3] = index;
      Group::Transfer side{&view, plan_->counts[index], view.item_nbytes(), peer, signature};
      const Outcome outcome = group.transfer(sends ? &side : nullptr, sends ? nullptr : &side, deadline_ns);
      if (side.mismatch) detail = sends ? 1 : 2;
      if (outcome != Outcome::kDone) return outcome;
    }
    return Outcome::kDone;
  }

  const View& operator[](int leaf) const { return views_[leaf]; }
  const std::vector<Plan::Leaf>& planned() const { return plan_->leaves; }

  bool reducible(ReduceOp op) const {
    return std::all_of(plan_->transfers.begin(), plan_->transfers.end(), [&](const std::vector<int>& members) {
      return find_reduction(plan_->leaves[members[0]].dtype, op) != nullptr;
    });
  }

 private:
  bool take_one(const DLTensor& tensor, std::size_t number, bool written) {
    const Plan::Leaf& leaf = plan_->leaves[number];
    // What is known by its size alone has no dtype here to compare.
    if (leaf.dtype >= DType::kMovesOnly || dtype_of(tensor.dtype) != leaf.dtype) return false;
    if (tensor.device.device_type != kDLCPU) return false;
    std::size_t count = 1;
    bool contiguous = true;
    for (int axis = tensor.ndim - 1; axis >= 0; --axis) {
      if (tensor.shape[axis] != 1 && tensor.strides != nullptr && tensor.strides[axis] != static_cast<std::int64_t>(count)) {
        contiguous = false;
      }
      count *= static_cast<std::size_t>(tensor.shape[axis]);
    }
    if (count != leaf.count) return false;
    if (leaf.shaped && !std::equal(tensor.shape, tensor.shape + tensor.ndim, leaf.shape.begin(), leaf.shape.end())) {
      return false;
    }
    char* data = static_cast<char*>(tensor.data);
    if (is_unmapped(data) && count != 0) return false;  // freed, as torch may while the tensor stays
    data += tensor.byte_offset;
    const std::size_t item = item_size(leaf.dtype);
    if (contiguous || count == 0) {
      place(number, data);
      spans_[number] = {data, data + count * item};
      return true;
    }
    if (written && overlaps_itself(tensor)) return false;
    views_[number] = View(data, item, tensor.ndim, tensor.shape, tensor.strides);
    strided_ = true;
    std::int64_t low = 0, high = 1;
    for (int axis = 0; axis < tensor.ndim; ++axis) {
      const std::int64_t reach = (tensor.shape[axis] - 1) * tensor.strides[axis];
      (reach < 0 ? low : high) += reach;
    }
    const auto bytes = static_cast<std::int64_t>(item);
    spans_[number] = {data + low * bytes, data + high * bytes};
    return true;
  }

  // Where a contiguous leaf lies.
  void place(std::size_t number, char* data) {
    View& view = views_[number];
    if (view.contiguous()) {
      view.rebase(data);
    } else {
      view = View(data, view.item_nbytes());
    }
  }

  // Leaves that interleave count as sharing: what they really do is found out on the slow path.
  bool share_memory() {
    const auto rise = [this] {
      const char* end = nullptr;
      for (const auto& [low, high] : spans_) {
        if (low == high) continue;
        if (low < end) return false;
        end = high;
      }
      return true;
    };
    if (rise() || spans_ == apart_) return false;  // as leaves of one allocation do; as in the call before
    std::vector<std::pair<const char*, const char*>> given = spans_;
    std::sort(spans_.begin(), spans_.end());
    if (!rise()) return true;
    apart_ = std::move(given);
    return false;
  }

  // The leaves of a transfer as one view. That of contiguous ones is kept, with other addresses in the next call.
  View joined(std::size_t transfer) {
    const std::vector<int>& members = plan_->transfers[transfer];
    if (members.size() == 1) return views_[static_cast<std::size_t>(members[0])];
    View& kept = kept_[transfer];
    if (!strided_ && kept.item_nbytes() != 0) {
      for (std::size_t part = 0; part < members.size(); ++part) {
        kept.rebase_part(part, views_[static_cast<std::size_t>(members[part])].data());
      }
      return kept;
    }
    std::vector<View> parts;
    std::vector<std::size_t> counts;
    for (int member : members) {
      parts.push_back(views_[static_cast<std::size_t>(member)]);
      counts.push_back(plan_->leaves[static_cast<std::size_t>(member)].count);
    }
    View made(std::move(parts), counts);
    kept = strided_ ? View(nullptr, 0) : made;
    return made;
  }

  const std::shared_ptr<const Plan> plan_;
  std::vector<View> views_, kept_;  // of each leaf; of each transfer, or of no item size
  bool strided_ = false;            // whether any leaf is, of this call
  std::vector<std::pair<const char*, const char*>> spans_, apart_;  // of each leaf; the last that were found apart
};

// True if the ranks of a call, of which a transfer has one, may be called so.
bool has_ranks(const FastCall& call, int rank, int ranks) {
  if (call.operation == Operation::kAllReduce) return true;
  if (call.operation != Operation::kTransfer) return call.root >= 0 && call.root < ranks;
  const int peer = call.root >= 0 ? call.root : call.source;
  return (call.root < 0 || call.source < 0) && peer >= 0 && peer < ranks && peer != rank;
}

// What says that the leaves move once the ranks agree: see Leaves::run().
using Moved = std::function<const std::int64_t*()>;

// Runs a call on leaves that `take`, given whether they are written, puts into `made`; `locked`: this thread has the
// interpreter lock.
template <class Take>
std::int64_t run_tree(std::int64_t handle, std::int64_t timeout_ns, const FastCall& call, Leaves& made, bool locked,
                      Take take, const Moved& moved = {}) {
  Turn group(handle);
  if (group.outcome() != Outcome::kDone) return static_cast<std::int64_t>(group.outcome());
  const bool transfers = call.operation == Operation::kTransfer;
  const bool reduces = !transfers && call.operation != Operation::kBroadcast;
  const bool is_root = call.root == group->rank();
  const bool written = transfers ? call.root < 0 : call.operation == Operation::kAllReduce || is_root == reduces;
  constexpr auto kRefused = static_cast<std::int64_t>(Outcome::kRefused);
  if (!has_ranks(call, group->rank(), group->world_size()) || (transfers && moved)) return kRefused;
  if (reduces && !made.reducible(static_cast<ReduceOp>(call.op))) return kRefused;
  if (const std::int64_t taken = take(written); taken != 0) return taken;
  std::int64_t detail = 0;
  Outcome outcome;
  {
    std::optional<WithoutLock> unlocked;
    if (locked) unlocked.emplace();
    const std::int64_t deadline_ns = now_ns() + timeout_ns;
    outcome = transfers ? made.run_transfers(*group, call, deadline_ns, detail)
                        : made.run(*group, call, deadline_ns, moved);
  }
  return result(*group, outcome) | detail << 8;
}

// One operation on the leaves of trees of one plan, which lies at `plan`.
ffi::Function tree_function(std::int64_t handle, std::int64_t timeout_ns, int operation, std::int64_t op, int root,
                            int source, std::int64_t plan) {
  const FastCall call{static_cast<Operation>(operation), op, root, source};
  const auto* words = reinterpret_cast<const std::int64_t*>(plan);
  const auto made = std::make_shared<Leaves>(std::make_shared<const Plan>(words));
  return ffi::Function::FromPacked([=](const ffi::AnyView* arguments, std::int32_t number, ffi::Any* returned) {
    *returned = run_tree(handle, timeout_ns, call, *made, false, [&](bool written) {
      return made->take(arguments, number, written) ? std::int64_t{0} : static_cast<std::int64_t>(Outcome::kRefused);
    });
  });
}

// The same on a list of leaves, given as its address in Python and that of the type of all of them, with the interpreter
// lock, which is let go while the ranks work. -1: not all are of that type or can be read so, and nothing was begun.
ffi::Function reading_tree_function(std::int64_t handle, std::int64_t timeout_ns, int operation, std::int64_t op,
                                    int root, int source, std::int64_t plan) {
  const FastCall call{static_cast<Operation>(operation), op, root, source};
  const auto* words = reinterpret_cast<const std::int64_t*>(plan);
  const auto made = std::make_shared<Leaves>(std::make_shared<const Plan>(words));
  return ffi::Function::FromTyped([=](std::int64_t list, std::int64_t type, std::int64_t reader) {
    return run_tree(handle, timeout_ns, call, *made, true, [&](bool written) {
      return made->take(reinterpret_cast<void*>(list), reinterpret_cast<void*>(type),
                        reinterpret_cast<Reader>(reader), written);
    });
  });
}

// The same on contiguous leaves at the addresses that it is given. Its first argument is None where it may write to them,
// or does not. Else they are only read, and it is a function that makes the results' memory, with the same contents, once
// the ranks agree, and returns the address of its addresses; not for transfers.
ffi::Function allocating_tree_function(std::int64_t handle, std::int64_t timeout_ns, int operation, std::int64_t op,
                                       int root, int source, std::int64_t plan) {
  const FastCall call{static_cast<Operation>(operation), op, root, source};
  const auto* words = reinterpret_cast<const std::int64_t*>(plan);
  const auto made = std::make_shared<Leaves>(std::make_shared<const Plan>(words));
  return ffi::Function::FromPacked([=](const ffi::AnyView* arguments, std::int32_t number, ffi::Any* returned) {
    Moved moved;
    if (arguments[0].type_index() != ffi::TypeIndex::kTVMFFINone) {
      moved = [claim = arguments[0].cast<ffi::Function>()] {
        return reinterpret_cast<const std::int64_t*>(claim().cast<std::int64_t>());
      };
    }
    const auto take = [&](bool) {
      return made->take_addresses(arguments + 1, number - 1) ? std::int64_t{0} : static_cast<std::int64_t>(Outcome::kRefused);
    };
    *returned = run_tree(handle, timeout_ns, call, *made, false, take, moved);
  });
}

// Copies between leaves and buckets: of every bucket the leaves in it, which lie there one after the other. Returns a
// function that takes whether they are written and the leaves, and returns one that copies: (0, bucket, address) into
// the bucket at that address, (1, bucket, address) out of it; (2, leaf, 0) is the address of a leaf that is contiguous,
// else 0; (3, leaf, 0) is View::order() of a leaf, and (4, leaf, 0) the address of one that has an order. Returns nothing
// where the leaves are not to be taken as they are. `way` 1: it takes the leaves as reading_tree_function() does; 2: it
// takes their addresses, and they are contiguous. Behind the plan's words: the number of buckets, then of each its number
// of leaves and these.
ffi::Function gather_function(std::int64_t plan, int way) {
  const auto* words = reinterpret_cast<const std::int64_t*>(plan);
  const auto planned = std::make_shared<const Plan>(words);
  auto buckets = std::make_shared<std::vector<std::vector<int>>>(static_cast<std::size_t>(*words++));
  for (std::vector<int>& members : *buckets) {
    for (std::int64_t left = *words++; left != 0; --left) members.push_back(static_cast<int>(*words++));
  }
  return ffi::Function::FromPacked([=](const ffi::AnyView* arguments, std::int32_t number, ffi::Any* returned) {
    const auto leaves = std::make_shared<Leaves>(planned);
    const bool written = arguments[0].cast<bool>();
    if (way == 2) {
      if (!leaves->take_addresses(arguments + 1, number - 1)) return;
    } else if (way == 1) {
      const auto word = [&](int place) { return reinterpret_cast<void*>(arguments[place].cast<std::int64_t>()); };
      if (number != 4 || leaves->take(word(1), word(2), reinterpret_cast<Reader>(word(3)), written) != 0) return;
    } else if (!leaves->take(arguments + 1, number - 1, written)) {
      return;
    }
    *returned = ffi::Function::FromTyped([=](std::int64_t what, std::int64_t index, std::int64_t address) {
      const auto place = static_cast<std::size_t>(index);
      if (what == 2) {
        const View& leaf = (*leaves)[static_cast<int>(index)];
        return leaf.contiguous() ? reinterpret_cast<std::int64_t>(leaf.data()) : 0;
      }
      if (what == 3) return static_cast<std::int64_t>((*leaves)[static_cast<int>(index)].order());
      if (what == 4) return reinterpret_cast<std::int64_t>((*leaves)[static_cast<int>(index)].data());
      char* next = reinterpret_cast<char*>(address);
      for (int member : (*buckets)[place]) {
        const View& leaf = (*leaves)[member];
        const std::size_t count = leaves->planned()[static_cast<std::size_t>(member)].count;
        what == 0 ? leaf.read(0, count, next) : leaf.write(0, count, next);
        next += count * leaf.item_nbytes();
      }
      return std::int64_t{0};
    });
  });
}

}  // namespace
}  // namespace colltensor

TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_allocating_tree_function, colltensor::allocating_tree_function)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_gather_function, colltensor::gather_function)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_reading_tree_function, colltensor::reading_tree_function)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_tree_function, colltensor::tree_function)
