// The collectives that are one exchange: who fills its staging with what, and who drains what from whom.
#include <cstring>

#include "colltensor/exchange.h"

namespace colltensor {
namespace {

void copy_own(const View& to, const View& from, std::size_t count, std::size_t item, Store store) {
  if (count == 0 || (to.contiguous() && from.contiguous() && to.data() == from.data())) return;
  if (from.contiguous()) return to.write(0, count, from.data(), store);
  if (to.contiguous()) return from.read(0, count, to.data());
  char buffer[16384];
  const std::size_t most = sizeof buffer / item;
  for (std::size_t first = 0; first < count; first += most) {
    const std::size_t n = std::min(most, count - first);
    from.read(first, n, buffer);
    to.write(first, n, buffer);
  }
}

}  // namespace

Outcome Group::barrier(const Signature& signature, std::int64_t deadline_ns) {
  Exchange exchange(*this, 0, 1, {kNobody, kNobody, false});
  return exchange.run(signature, deadline_ns, [](auto...) {}, [](auto...) {});
}

Outcome Group::broadcast(const View& data, std::size_t count, std::size_t item, int root, const Signature& signature,
                         std::int64_t deadline_ns) {
  const bool gives = rank_ == root;
  Exchange exchange(*this, count, item, {gives ? kEveryone : kNobody, gives ? kNobody : root, gives});
  const Store store = storing_broadcast(count * item * world_size_);
  return exchange.run(
      signature, deadline_ns, [&](std::size_t first, std::size_t n, char* to) { data.read(first, n, to); },
      [&](std::size_t first, std::size_t n, auto from) {
        if (!gives) data.write(first, n, from(root), store);
      });
}

Outcome Group::allgather(const View* outputs, const View& source, std::size_t count, std::size_t item,
                         const Signature& signature, std::int64_t deadline_ns) {
  Exchange exchange(*this, count, item, {kEveryone, kEveryone, true});
  const Store store = storing(count * item * world_size_ * (world_size_ + 1));
  const Outcome outcome = exchange.gives(kAllGatherKind, &source, 1).run(
      signature, deadline_ns, [&](std::size_t first, std::size_t n, char* to) { source.read(first, n, to); },
      [&](std::size_t first, std::size_t n, auto from) {
        for (int rank : others()) outputs[rank].write(first, n, from(rank), store);
      },
      [&] {
        return read_others([&](int rank) { return read_into(outputs[rank], rank, address(rank, 0), 0, count, item); });
      });
  if (outcome == Outcome::kDone) copy_own(outputs[rank_], source, count, item, store);
  return outcome;
}

Outcome Group::gather(const View* outputs, const View& source, std::size_t count, std::size_t item, int root,
                      const Signature& signature, std::int64_t deadline_ns) {
  const bool takes = rank_ == root;
  Exchange exchange(*this, count, item, {takes ? kNobody : root, takes ? kEveryone : kNobody, !takes});
  // As if each rank were the root in turn, whose outputs are all in use.
  const Store store = storing(count * item * world_size_ * (world_size_ + 1));
  const Outcome outcome = exchange.gives(kGatherKind, &source, 1).run(
      signature, deadline_ns, [&](std::size_t first, std::size_t n, char* to) { source.read(first, n, to); },
      [&](std::size_t first, std::size_t n, auto from) {
        if (!takes) return;
        for (int rank : others()) outputs[rank].write(first, n, from(rank), store);
      },
      [&] {
        if (!takes) return Outcome::kDone;
        return read_others([&](int rank) { return read_into(outputs[rank], rank, address(rank, 0), 0, count, item); });
      });
  if (outcome == Outcome::kDone && takes) copy_own(outputs[rank_], source, count, item, store);
  return outcome;
}

Outcome Group::scatter(const View& target, const View* sources, std::size_t count, std::size_t item, int root,
                       const Signature& signature, std::int64_t deadline_ns) {
  const bool gives = rank_ == root;
  Exchange exchange(*this, count, item * world_size_, {gives ? kEveryone : kNobody, gives ? kNobody : root, gives});
  const Store store = storing(2 * count * item * world_size_);
  const Outcome outcome = exchange.gives(kScatterKind, sources, world_size_).run(
      signature, deadline_ns,
      [&](std::size_t first, std::size_t n, char* to) {
        for (int rank : others()) sources[rank].read(first, n, to + rank * n * item);
      },
      [&](std::size_t first, std::size_t n, auto from) {
        if (!gives) target.write(first, n, from(root) + rank_ * n * item, store);
      },
      [&] { return gives ? Outcome::kDone : read_into(target, root, address(root, rank_), 0, count, item); });
  if (outcome == Outcome::kDone && gives) copy_own(target, sources[rank_], count, item, store);
  return outcome;
}

Outcome Group::alltoall(const View* outputs, const View* sources, std::size_t count, std::size_t item,
                        const Signature& signature, std::int64_t deadline_ns) {
  Exchange exchange(*this, count, item * world_size_, {kEveryone, kEveryone, true});
  const Store store = storing(2 * count * item * world_size_ * world_size_);
  const Outcome outcome = exchange.gives(kAllToAllKind, sources, world_size_).run(
      signature, deadline_ns,
      [&](std::size_t first, std::size_t n, char* to) {
        for (int rank : others()) sources[rank].read(first, n, to + rank * n * item);
      },
      [&](std::size_t first, std::size_t n, auto from) {
        for (int rank : others()) outputs[rank].write(first, n, from(rank) + rank_ * n * item, store);
      },
      [&] {
        return read_others(
            [&](int rank) { return read_into(outputs[rank], rank, address(rank, rank_), 0, count, item); });
      });
  if (outcome == Outcome::kDone) copy_own(outputs[rank_], sources[rank_], count, item, store);
  return outcome;
}

}  // namespace colltensor
