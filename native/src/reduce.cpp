// The collectives that combine elements in one exchange: reduce, reduce-scatter, and the allreduce of small messages.
#include <cstring>

#include "colltensor/exchange.h"

namespace colltensor {
namespace {

constexpr std::size_t kPieceNbytes = 16384;  // what is combined at once stays in the first-level cache

// Combines `count` elements of all ranks, those of `own` coming from this rank's memory and the others' from
// staging, and writes them to `target`. A strided view goes through a piece on the stack.
template <class From>
void combine(const View& target, const View& own, int rank, int world_size, std::size_t first, std::size_t count,
             std::size_t item, Reduction reduction, From from) {
  alignas(kLine) char mine[kPieceNbytes];
  alignas(kLine) char result[kPieceNbytes];
  const void* sources[kMaxRanks];
  const bool straight = own.contiguous() && target.contiguous();
  const std::size_t most = straight ? count : kPieceNbytes / item;
  for (std::size_t start = 0; start < count; start += most) {
    const std::size_t n = std::min(most, count - start);
    for (int other = 0; other < world_size; ++other) {
      if (other != rank) sources[other] = from(other) + start * item;
    }
    if (own.contiguous()) {
      sources[rank] = own.at(first + start);
    } else {
      own.read(first + start, n, mine);
      sources[rank] = mine;
    }
    if (target.contiguous()) {
      reduction(target.at(first + start), sources, world_size, n);
    } else {
      reduction(result, sources, world_size, n);
      target.write(first + start, n, result);
    }
  }
}

}  // namespace

Outcome Group::reduce(const View& data, std::size_t count, DType dtype, ReduceOp op, int root,
                      const Signature& signature, std::int64_t deadline_ns) {
  const Reduction reduction = find_reduction(dtype, op);
  if (reduction == nullptr) return Outcome::kRefused;
  const std::size_t item = item_size(dtype);
  const bool takes = rank_ == root;
  Exchange exchange(*this, count, item, {takes ? kNobody : root, takes ? kEveryone : kNobody, !takes});
  return exchange.run(
      signature, deadline_ns, [&](std::size_t first, std::size_t n, char* to) { data.read(first, n, to); },
      [&](std::size_t first, std::size_t n, auto from) {
        if (takes) combine(data, data, rank_, world_size_, first, n, item, reduction, from);
      });
}

Outcome Group::reducescatter(const View& target, const View* sources, std::size_t count, DType dtype, ReduceOp op,
                             const Signature& signature, std::int64_t deadline_ns) {
  const Reduction reduction = find_reduction(dtype, op);
  if (reduction == nullptr) return Outcome::kRefused;
  const std::size_t item = item_size(dtype);
  Exchange exchange(*this, count, item * world_size_, {kEveryone, kEveryone, true});
  return exchange.gives(kReduceScatterKind, sources, world_size_).run(
      signature, deadline_ns,
      [&](std::size_t first, std::size_t n, char* to) {
        for (int rank : others()) sources[rank].read(first, n, to + rank * n * item);
      },
      [&](std::size_t first, std::size_t n, auto from) {
        combine(target, sources[rank_], rank_, world_size_, first, n, item, reduction,
                [&](int rank) { return from(rank) + rank_ * n * item; });
      },
      [&] { return read_and_combine(target, sources[rank_], rank_, 0, count, item, reduction); });
}

Outcome Group::allreduce(const View& data, std::size_t count, DType dtype, ReduceOp op, const Signature& signature,
                         std::int64_t deadline_ns) {
  const Reduction reduction = find_reduction(dtype, op);
  if (reduction == nullptr) return Outcome::kRefused;
  const std::size_t item = item_size(dtype);
  if (count * item > direct_nbytes_) {
    if (deadline_ns == kBrief) return Outcome::kLarge;
    return allreduce_blocks(data, count, dtype, reduction, signature, deadline_ns);
  }
  Exchange exchange(*this, count, item, {kEveryone, kEveryone, true});
  return exchange.run(
      signature, deadline_ns, [&](std::size_t first, std::size_t n, char* to) { data.read(first, n, to); },
      [&](std::size_t first, std::size_t n, auto from) {
        combine(data, data, rank_, world_size_, first, n, item, reduction, from);
      });
}

Outcome Group::read_and_combine(const View& target, const View& own, int source, std::size_t first, std::size_t count,
                                std::size_t item, Reduction reduction) {
  const auto peers = static_cast<std::size_t>(world_size_ - 1);
  const std::size_t most = std::max<std::size_t>(kScratchNbytes / peers / kLine, 64) * kLine / item;
  char* const others_elements = scratch(peers * most * item);
  const auto place = [&](int rank) { return others_elements + (rank - (rank > rank_)) * most * item; };
  for (std::size_t start = 0; start < count; start += most) {
    const std::size_t n = std::min(most, count - start);
    const Outcome outcome = read_others([&](int rank) {
      return read(rank, address(rank, source) + (first + start) * item, place(rank), n * item);
    });
    if (outcome != Outcome::kDone) return outcome;
    combine(target, own, rank_, world_size_, first + start, n, item, reduction, place);
  }
  return Outcome::kDone;
}

}  // namespace colltensor
