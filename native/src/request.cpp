#include "request.h"

#include <vector>

namespace colltensor {
namespace {

class Reader {
 public:
  explicit Reader(const std::int64_t* next) : next_(next) {}

  View view(std::size_t item) {
    void* data = reinterpret_cast<void*>(next_[0]);
    const int axes = static_cast<int>(next_[1]);
    const std::int64_t* shape = next_ + 2;
    next_ += 2 + 2 * axes;
    return axes == 0 ? View(data, item) : View(data, item, axes, shape, shape + axes);
  }

  std::vector<View> views(int count, std::size_t item) {
    std::vector<View> found;
    found.reserve(count);
    for (int i = 0; i < count; ++i) found.push_back(view(item));
    return found;
  }

 private:
  const std::int64_t* next_;
};

Signature signature_at(const std::int64_t* words) {
  Signature signature;
  for (int i = 0; i < 4; ++i) signature.words[i] = static_cast<std::uint64_t>(words[i]);
  return signature;
}

Outcome run_transfer(Group& group, std::int64_t* request, std::int64_t deadline_ns) {
  Reader reader(request + kViewsField);
  const int destination = static_cast<int>(request[kRootField]), source = static_cast<int>(request[kSourceField]);
  Group::Transfer send{}, recv{};
  View sent, received;
  if (destination >= 0) {
    const auto item = static_cast<std::size_t>(request[kItemField]);
    sent = reader.view(item);
    send = {&sent, static_cast<std::size_t>(request[kCountField]), item, destination,
            signature_at(request + kSignatureField)};
  }
  if (source >= 0) {
    const auto item = static_cast<std::size_t>(request[kSourceItemField]);
    received = reader.view(item);
    recv = {&received, static_cast<std::size_t>(request[kSourceCountField]), item, source,
            signature_at(request + kSourceSignatureField)};
  }
  const Outcome outcome =
      group.transfer(destination >= 0 ? &send : nullptr, source >= 0 ? &recv : nullptr, deadline_ns);
  request[kDetailField] = (send.mismatch ? 1 : 0) | (recv.mismatch ? 2 : 0);
  return outcome;
}

}  // namespace

Outcome run_request(Group& group, std::int64_t* request, std::int64_t deadline_ns) {
  const auto operation = static_cast<Operation>(request[kOperationField]);
  const auto op = static_cast<ReduceOp>(request[kReduceOpField]);
  const auto dtype = static_cast<DType>(request[kDTypeField]);
  const auto item = static_cast<std::size_t>(request[kItemField]);
  const auto count = static_cast<std::size_t>(request[kCountField]);
  const int root = static_cast<int>(request[kRootField]);
  const int ranks = group.world_size();
  const Signature signature = signature_at(request + kSignatureField);
  Reader reader(request + kViewsField);
  switch (operation) {
    case Operation::kBarrier:
      return group.barrier(signature, deadline_ns);
    case Operation::kAllReduce:
      return group.allreduce(reader.view(item), count, dtype, op, signature, deadline_ns);
    case Operation::kReduce:
      return group.reduce(reader.view(item), count, dtype, op, root, signature, deadline_ns);
    case Operation::kBroadcast:
      return group.broadcast(reader.view(item), count, item, root, signature, deadline_ns);
    case Operation::kAllGather: {
      const std::vector<View> outputs = reader.views(ranks, item);
      return group.allgather(outputs.data(), reader.view(item), count, item, signature, deadline_ns);
    }
    case Operation::kGather: {
      const std::vector<View> outputs = reader.views(root == group.rank() ? ranks : 0, item);
      return group.gather(outputs.data(), reader.view(item), count, item, root, signature, deadline_ns);
    }
    case Operation::kScatter: {
      const View target = reader.view(item);
      const std::vector<View> sources = reader.views(root == group.rank() ? ranks : 0, item);
      return group.scatter(target, sources.data(), count, item, root, signature, deadline_ns);
    }
    case Operation::kReduceScatter: {
      const View target = reader.view(item);
      const std::vector<View> sources = reader.views(ranks, item);
      return group.reducescatter(target, sources.data(), count, dtype, op, signature, deadline_ns);
    }
    case Operation::kAllToAll: {
      const std::vector<View> outputs = reader.views(ranks, item);
      const std::vector<View> sources = reader.views(ranks, item);
      return group.alltoall(outputs.data(), sources.data(), count, item, signature, deadline_ns);
    }
    case Operation::kTransfer:
      return run_transfer(group, request, deadline_ns);
  }
  return Outcome::kRefused;
}

}  // namespace colltensor
