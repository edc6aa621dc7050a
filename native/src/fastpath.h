// What a call on exportable tensors is made of: for the fast calls from Python, and for those from inside XLA.
#pragma once

#include <dlpack/dlpack.h>

#include <cstddef>
#include <cstdint>

#include "colltensor/group.h"
#include "colltensor/view.h"

namespace colltensor {

// True for an address that no memory has: Linux maps nothing so low, and a view of memory that was freed has its offset.
inline bool is_unmapped(const void* data) { return reinterpret_cast<std::uintptr_t>(data) < (std::uintptr_t{1} << 16); }

// What a fast call asks for, beside its tensors. For a transfer `root` is the destination, -1 for none, and `source`
// where it comes from.
struct FastCall {
  Operation operation;
  std::int64_t op;
  int root;
  int source;
  bool stacked = false;  // one array has the tensors of all ranks, one after another, where else there is a list
};

// Byte for byte what colltensor.engine.Call.signature packs after the sequence number, with ``copy=None``. `count`: of
// all elements; `leaves`: the dtype of one tensor, or of several that are alike, or the hash of a tree's leaves.
Signature call_signature(Operation operation, std::uint8_t op, std::int16_t root, std::uint64_t count,
                         std::uint64_t leaves);

// The dtype of what DLPack calls so, or kMovesOnly.
DType dtype_of(DLDataType type);

// Runs it on views of `count` elements each, in the order of a request's; the caller has the turn. `detail` says which
// directions of a transfer differ, 1 for the send and 2 for the receive.
Outcome run_fast(Group& group, const FastCall& call, const View* views, std::size_t count, DType dtype,
                   std::int64_t deadline_ns, std::int64_t& detail);

}  // namespace colltensor
