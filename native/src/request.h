// A call as Python packs it: an array of 64-bit integers, a fixed head and then the views.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "colltensor/group.h"

namespace colltensor {

// Positions in the head (colltensor.backends.shm.requests has their twins).
enum RequestField : int {
  kOperationField, kReduceOpField, kDTypeField, kItemField, kRootField, kCountField, kSignatureField,
  // In: 1 for a transfer beside those of other threads. Out: for a transfer, 1 if the send differs, plus 2 if the receive
  // does.
  kDetailField = kSignatureField + 4,
  kSourceField, kSourceItemField, kSourceCountField, kSourceSignatureField,
  kViewsField = kSourceSignatureField + 4,
};

// A call of all ranks, beside its tensors.
struct Collective {
  Operation operation;
  ReduceOp op;
  DType dtype;
  std::size_t item;
  std::size_t count;  // of each tensor
  int root;           // -1 where there is none
  Signature signature;
};

// Has a group call a function when the ranks agree, for as long as this lives; an empty one is nothing.
class WhenAgreed {
 public:
  WhenAgreed(Group& group, const std::function<void()>& function) : group_(group), function_(function) {
    if (function_) group_.on_agreed([](void* self) { static_cast<WhenAgreed*>(self)->function_(); }, this);
  }
  ~WhenAgreed() { group_.on_agreed(nullptr, nullptr); }
  WhenAgreed(const WhenAgreed&) = delete;
  WhenAgreed& operator=(const WhenAgreed&) = delete;

 private:
  Group& group_;
  const std::function<void()>& function_;
};

// Runs it. The views in this order, as far as the rank has them: those that are written, a list's by rank, then those
// that are only read.
Outcome run_collective(Group& group, const Collective& call, const View* views, std::int64_t deadline_ns);

// Runs the call. A view is its address, its number of axes (0 for row-major without gaps), shape and strides; or the
// number of views of which it is made, -1, and each of them behind its number of elements.
// `agreed`, if it is not empty, is called once the ranks agree and before this rank's memory is written; it may put
// other addresses and strides of the same shape and contents into the request.
Outcome run_request(Group& group, std::int64_t* request, std::int64_t deadline_ns,
                    const std::function<void()>& agreed = {});

}  // namespace colltensor
