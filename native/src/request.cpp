#include "request.h"

#include <utility>
#include <vector>

namespace colltensor {
namespace {

// The views of a request, in the order in which they were packed.
class Views {
 public:
  Views(const std::int64_t* next, int count, const std::size_t* items) : views_(count), places_(count) {
    for (int i = 0; i < count; ++i) {
      places_[i] = next;
      views_[i] = read(next, items[i]);
    }
  }

  const View& operator[](int i) const { return views_[i]; }
  const View* from(int i) const { return views_.data() + i; }

  void rebase() {
    for (std::size_t i = 0; i < views_.size(); ++i) {
      const std::int64_t* place = places_[i];
      views_[i] = read(place, views_[i].item_nbytes());
    }
  }

 private:
  // Reads a view and goes on behind it.
  static View read(const std::int64_t*& next, std::size_t item) {
    const std::int64_t first = *next++, axes = *next++;
    if (axes >= 0) {
      const std::int64_t* shape = next;
      next += 2 * axes;
      void* data = reinterpret_cast<void*>(first);
      return axes == 0 ? View(data, item) : View(data, item, static_cast<int>(axes), shape, shape + axes);
    }
    std::vector<View> parts;
    std::vector<std::size_t> counts;
    for (std::int64_t i = 0; i < first; ++i) {
      counts.push_back(static_cast<std::size_t>(*next++));
      parts.push_back(read(next, item));
    }
    return View(std::move(parts), counts);
  }

  std::vector<View> views_;
  std::vector<const std::int64_t*> places_;
};

Signature signature_at(const std::int64_t* words) {
  Signature signature;
  for (int i = 0; i < 4; ++i) signature.words[i] = static_cast<std::uint64_t>(words[i]);
  return signature;
}

// How many views a request has, by what the operation gives and gets on this rank.
int view_count(Operation operation, const Group& group, int root, int source) {
  const int ranks = group.world_size();
  const bool is_root = root == group.rank();
  switch (operation) {
    case Operation::kBarrier: return 0;
    case Operation::kAllReduce:
    case Operation::kReduce:
    case Operation::kBroadcast: return 1;
    case Operation::kAllGather:
    case Operation::kReduceScatter: return ranks + 1;
    case Operation::kGather:
    case Operation::kScatter: return is_root ? ranks + 1 : 1;
    case Operation::kAllToAll: return 2 * ranks;
    case Operation::kTransfer: return (root >= 0) + (source >= 0);
  }
  return 0;
}

Outcome run_transfer(Group& group, std::int64_t* request, const Views& views, std::int64_t deadline_ns,
                     const std::function<void()>& moved) {
  const int destination = static_cast<int>(request[kRootField]), source = static_cast<int>(request[kSourceField]);
  Group::Transfer send{}, recv{};
  if (destination >= 0) {
    send = {&views[0], static_cast<std::size_t>(request[kCountField]), static_cast<std::size_t>(request[kItemField]),
            destination, signature_at(request + kSignatureField)};
  }
  if (source >= 0) {
    recv = {&views[destination >= 0], static_cast<std::size_t>(request[kSourceCountField]),
            static_cast<std::size_t>(request[kSourceItemField]), source,
            signature_at(request + kSourceSignatureField)};
  }
  if (request[kDetailField] != 0) {
    Group::Transfer& transfer = destination >= 0 ? send : recv;
    if (moved) transfer.agreed = &moved;
    const Outcome outcome = group.transfer_beside(transfer, destination >= 0, deadline_ns);
    request[kDetailField] = outcome == Outcome::kMismatch ? (destination >= 0 ? 1 : 2) : 0;
    return outcome;
  }
  const WhenAgreed notice(group, moved);
  const Outcome outcome =
      group.transfer(destination >= 0 ? &send : nullptr, source >= 0 ? &recv : nullptr, deadline_ns);
  request[kDetailField] = (send.mismatch ? 1 : 0) | (recv.mismatch ? 2 : 0);
  return outcome;
}

}  // namespace

Outcome run_collective(Group& group, const Collective& call, const View* views, std::int64_t deadline_ns) {
  const auto& [operation, op, dtype, item, count, root, signature] = call;
  const int ranks = group.world_size();
  const bool is_root = root == group.rank();
  switch (operation) {
    case Operation::kBarrier: return group.barrier(signature, deadline_ns);
    case Operation::kAllReduce: return group.allreduce(views[0], count, dtype, op, signature, deadline_ns);
    case Operation::kReduce: return group.reduce(views[0], count, dtype, op, root, signature, deadline_ns);
    case Operation::kBroadcast: return group.broadcast(views[0], count, item, root, signature, deadline_ns);
    case Operation::kAllGather: return group.allgather(views, views[ranks], count, item, signature, deadline_ns);
    case Operation::kGather:
      return group.gather(is_root ? views : nullptr, views[is_root ? ranks : 0], count, item, root, signature,
                          deadline_ns);
    case Operation::kScatter:
      return group.scatter(views[0], is_root ? views + 1 : nullptr, count, item, root, signature, deadline_ns);
    case Operation::kReduceScatter:
      return group.reducescatter(views[0], views + 1, count, dtype, op, signature, deadline_ns);
    case Operation::kAllToAll: return group.alltoall(views, views + ranks, count, item, signature, deadline_ns);
    case Operation::kTransfer: break;  // concerns two ranks
  }
  return Outcome::kRefused;
}

Outcome run_request(Group& group, std::int64_t* request, std::int64_t deadline_ns,
                    const std::function<void()>& agreed) {
  const auto operation = static_cast<Operation>(request[kOperationField]);
  const int root = static_cast<int>(request[kRootField]), source = static_cast<int>(request[kSourceField]);
  const int count = view_count(operation, group, root, source);
  std::vector<std::size_t> items(count, static_cast<std::size_t>(request[kItemField]));
  if (operation == Operation::kTransfer && source >= 0) {
    items.back() = static_cast<std::size_t>(request[kSourceItemField]);
  }
  Views views(request + kViewsField, count, items.data());
  std::function<void()> moved;
  if (agreed) {
    moved = [&] {
      agreed();
      views.rebase();
    };
  }
  if (operation == Operation::kTransfer) return run_transfer(group, request, views, deadline_ns, moved);
  const WhenAgreed notice(group, moved);
  const Collective collective{operation,
                              static_cast<ReduceOp>(request[kReduceOpField]),
                              static_cast<DType>(request[kDTypeField]),
                              static_cast<std::size_t>(request[kItemField]),
                              static_cast<std::size_t>(request[kCountField]),
                              root,
                              signature_at(request + kSignatureField)};
  return run_collective(group, collective, views.from(0), deadline_ns);
}

}  // namespace colltensor
