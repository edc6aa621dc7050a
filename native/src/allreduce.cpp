// The allreduce of large messages. Where the ranks do not read each other's memory: block by block, every rank copies the
// other ranks' slices of its data into its staging, combines its own slice of all ranks in its own memory, puts the
// result where its own slice lies in its staging, and copies the others' results out. So each element is combined once,
// by one rank, in rank order, and each byte crosses the staging twice; a block stays in the caches between its three
// stages, which run one behind the other so that no rank waits for the very step another has just begun. All of the
// staging is used, so that a rank can run ahead of one that has lost its core.
//
// Blocks of 512 KiB, four in the staging of a rank: measured on 2 cores (EPYC, 1 MiB of L2 each), us for 1, 4, 16 and 64
// MiB with blocks of 128, 256 and 512 KiB. 2 ranks: 38/36/35, 149/137/131, 777/765/746, 4560/4680/4090, and in the
// machine's slower state 260/250/240 for 4 MiB, 1070/1020/1020, 5590/5440/5260. 4 ranks: 228/144/137 to 116/156/100,
// 563/479/444, 3500/2490/2500, 10670/10030/11940. 3 ranks, 128 and 512: 102/92, 420/340.
#include <algorithm>
#include <utility>

#include "colltensor/exchange.h"

namespace colltensor {
namespace {

constexpr std::size_t kPieceNbytes = 16384;  // combined, then copied to staging while in the first-level cache

constexpr std::size_t kPartNbytes = 512;

class Blocks {
 public:
  Blocks(const View& data, std::size_t count, std::size_t item, int rank, int world_size, std::size_t block_nbytes)
      : data_(data), count_(count), item_(item), rank_(rank), world_size_(world_size) {
    const std::size_t line = std::max<std::size_t>(1, kLine / item);
    const auto ranks = static_cast<std::size_t>(world_size);
    // No smaller blocks than the message needs: all slices the same, in whole cache lines.
    const std::size_t limit = std::max(line * ranks, block_nbytes / item / (line * ranks) * (line * ranks));
    number_ = (count + limit - 1) / limit;
    const std::size_t even = (count + number_ - 1) / number_;
    block_ = (even + line * ranks - 1) / (line * ranks) * (line * ranks);
    number_ = (count + block_ - 1) / block_;
    slice_ = block_ / ranks;
  }

  std::size_t number() const { return number_; }
  std::size_t start(std::size_t block) const { return block * block_; }

  // Elements [first, second) of block `block` that are rank `rank`'s to combine, counted from the block's start.
  std::pair<std::size_t, std::size_t> slice(std::size_t block, int rank) const {
    const std::size_t length = std::min(block_, count_ - block * block_);
    return {std::min(length, slice_ * rank), std::min(length, slice_ * (rank + 1))};
  }

  // Stage one: the other ranks' slices of this rank's data.
  void copy_in(std::size_t block, char* to) const {
    const auto [low, high] = slice(block, rank_);
    const std::size_t length = std::min(block_, count_ - block * block_);
    data_.read(block * block_, low, to);
    data_.read(block * block_ + high, length - high, to + high * item_);
  }

  // Stage two: this rank's slice of everybody's data, into its own memory and its own staging.
  template <class Where>
  void combine(std::size_t block, Reduction reduction, Where where) const {
    const auto [low, high] = slice(block, rank_);
    // Of a strided view more rows at once, whose elements share cache lines.
    const std::size_t piece = data_.strided() ? slice_ : kPieceNbytes / item_;
    const void* sources[kMaxRanks];
    std::size_t n = 0;
    for (std::size_t start = low; start < high; start += n) {
      n = std::min(piece, high - start);
      for (int rank = 0; rank < world_size_; ++rank) sources[rank] = where(rank) + start * item_;
      char* staged = where(rank_) + start * item_;
      const std::size_t element = block * block_ + start;
      // One of several parts by itself, where it lies, if that is not less than what a copy of it saves.
      if (const std::size_t part = data_.in_part(element, n); part * item_ >= kPartNbytes) n = part;
      if (char* own = data_.straight(element, n)) {
        sources[rank_] = own;
        reduction(own, sources, world_size_, n);
        copy(staged, own, n * item_);
      } else {
        data_.read(element, n, staged);
        reduction(staged, sources, world_size_, n);
        data_.write(element, n, staged);
      }
    }
  }

  // Stage three: the other ranks' results.
  template <class Where>
  void copy_out(std::size_t block, Where where) const {
    for (int next = 1; next < world_size_; ++next) {
      const int rank = (rank_ + next) % world_size_;
      const auto [low, high] = slice(block, rank);
      data_.write(block * block_ + low, high - low, where(rank) + low * item_);
    }
  }

 private:
  const View& data_;
  const std::size_t count_, item_;
  const int rank_, world_size_;
  std::size_t block_, slice_, number_;
};

// Sizes in units of read_nbytes_, which is 256 KiB. Of a block that is read: measured with 2 ranks on 2 cores (Xeon, 2
// MiB of L2 each), 4 and 16 MiB, us: 565 and 2156 with slices of 256 KiB, 457 and 1804 with 512, 384 and 1365 with
// 1024, 424 and 1345 with 2048: what the other core has written should have left its second-level cache. Through
// staging it took 546 and 2053.
constexpr std::size_t kReadSlice = 4;
// Below, staging is as fast (2 MiB, 2 ranks: 270 and 258 us; 4 ranks on 2 cores: 602 and 698; 4 MiB: 1195 and 1123);
// so it is above, when the memory of all ranks is more than the last-level cache keeps (64 MiB, 4 ranks: 25 and 28 ms).
constexpr std::size_t kReadFrom = 8, kReadTo = 512;

}  // namespace

Choice* Group::allreduce_choice(std::size_t nbytes) {
  const std::size_t least = (world_size_ == 2 ? kReadFrom : 2 * kReadFrom) * read_nbytes_;
  const bool may_pay = nbytes >= least && nbytes * static_cast<std::size_t>(world_size_) <= kReadTo * read_nbytes_;
  return may_pay ? choice(kAllReduceKind, nbytes) : nullptr;
}

// The same division of labour without staging: every rank reads the other ranks' data of its slice, combines it with
// its own in place, and reads the others' results into its own memory. It overwrites a slice once the rank that has
// combined it, and so has read it, says so.
Outcome Group::allreduce_reading(const View& data, std::size_t count, std::size_t item, Reduction reduction,
                                 std::uint32_t arrival, std::int64_t deadline_ns) {
  const Blocks blocks(data, count, item, rank_, world_size_, kReadSlice * read_nbytes_ * world_size_);
  const auto combined = [&](std::size_t block) { return arrival + 2 + static_cast<std::uint32_t>(block); };
  tell(&data, 1);
  publish(arrival + 1);
  Outcome outcome = wait_for_all(arrival + 1, deadline_ns);
  const std::size_t number = blocks.number();
  for (std::size_t turn = 0; outcome == Outcome::kDone && turn <= number; ++turn) {
    if (turn < number) {
      const auto [low, high] = blocks.slice(turn, rank_);
      outcome = read_and_combine(data, data, 0, blocks.start(turn) + low, high - low, item, reduction);
      if (outcome != Outcome::kDone) break;
      publish(combined(turn));
    }
    if (turn == 0) continue;
    outcome = read_others([&](int rank) {
      const Outcome waited = wait_for(rank, combined(turn - 1), deadline_ns);
      if (waited != Outcome::kDone) return waited;
      const auto [low, high] = blocks.slice(turn - 1, rank);
      return read_into(data, rank, address(rank, 0), blocks.start(turn - 1) + low, high - low, item);
    });
  }
  if (outcome != Outcome::kDone) return outcome;
  publish(combined(number));
  outcome = wait_for_all(combined(number), deadline_ns);  // they read this rank's memory until then
  if (outcome != Outcome::kDone) return outcome;
  finish_large(combined(number));
  return Outcome::kDone;
}

Outcome Group::allreduce_blocks(const View& given, std::size_t count, DType dtype, Reduction reduction,
                                const Signature& signature, std::int64_t deadline_ns) {
  Outcome outcome = enter();
  if (outcome != Outcome::kDone) return outcome;
  // Where the elements of all ranks lie in one order without gaps, that is the order in which they are combined. Each
  // rank begins as if it were so; but for one whose memory may be elsewhere, and lie otherwise, once they agree.
  const std::uint64_t order = hooks_.agreed == nullptr ? given.order() : 0;
  View data = order == 0 ? given : given.straightened();
  const Blocks blocks(data, count, item_size(dtype), rank_, world_size_, chunk_nbytes_);
  const std::size_t depth = 2 * half_nbytes_ / chunk_nbytes_;
  const std::uint32_t first = done_ + 1;
  std::uint32_t arrival = first;  // and block 0's copy_in
  const auto where = [&](int rank, std::size_t block) {
    const std::size_t place = block % depth, each = depth / 2;
    return half(rank, (parity() + (place >= each)) & 1) + place % each * chunk_nbytes_;
  };
  // Steps after that: in turn t block t is copied in, t - 1 combined, t - 2 copied
  // out.
  const auto filled = [&](std::size_t block) { return arrival + static_cast<std::uint32_t>(3 * block); };
  const auto combined = [&](std::size_t block) { return arrival + static_cast<std::uint32_t>(3 * block + 4); };
  const auto drained = [&](std::size_t block) { return arrival + static_cast<std::uint32_t>(3 * block + 8); };
  const auto await = [&](std::uint32_t step) {
    outcome = wait_for_all(step, deadline_ns);
    return outcome == Outcome::kDone;
  };
  const auto is_free = [&](unsigned half) {
    outcome = wait_for_half(half, deadline_ns);
    return outcome == Outcome::kDone;
  };

  Choice* const choice = allreduce_choice(count * item_size(dtype));
  const bool reads = choice != nullptr && choice->reads();
  own_post().order() = order;
  std::int64_t copied_ns = 0;  // of staging's time, what passes before the ranks agree
  if (choice != nullptr) std::copy_n(choice->best(), Choice::kWays, own_post().times());
  if (reads) {
    offer(&data, 1, count * item_size(dtype));
  } else {
    if (!is_free(parity())) return outcome;
    const std::int64_t before_ns = now_ns();
    blocks.copy_in(0, where(rank_, 0));
    copied_ns = now_ns() - before_ns;
  }
  arrive(first, signature);
  outcome = agree(first, signature, deadline_ns);
  if (outcome != Outcome::kDone) return outcome;
  settle(choice);
  const std::int64_t began_ns = now_ns();
  bool alike = true;
  for (int rank : others_) alike = alike && layout_.post(rank, parity()).order() == order;
  if (order == 0 || !alike) data = given;  // which may have moved
  if (reads && alike && all_readable()) {
    outcome = allreduce_reading(data, count, item_size(dtype), reduction, first, deadline_ns);
    if (outcome == Outcome::kDone) choice->note(Choice::kRead, now_ns() - began_ns, count * item_size(dtype));
    return outcome;
  }
  if (reads || !alike) {
    arrival = first + 1;
    if (!is_free(parity())) return outcome;
    blocks.copy_in(0, where(rank_, 0));
    publish(arrival);
  }
  if (!is_free(parity() ^ 1)) return outcome;
  const std::size_t number = blocks.number();
  for (std::size_t turn = 0; turn < number + 2; ++turn) {
    if (turn != 0 && turn < number) {
      // The others' slices of the block that lay here have been read once all have combined theirs.
      if (turn >= depth && !await(combined(turn - depth))) return outcome;
      blocks.copy_in(turn, where(rank_, turn));
      publish(filled(turn));
    }
    if (turn >= 1 && turn - 1 < number) {
      const std::size_t block = turn - 1;
      if (!await(filled(block))) return outcome;
      // The result that lay here has been read once all have copied it out.
      if (block >= depth && !await(drained(block - depth))) return outcome;
      blocks.combine(block, reduction, [&](int rank) { return where(rank, block); });
      publish(combined(block));
    }
    if (turn >= 2) {
      const std::size_t block = turn - 2;
      if (!await(combined(block))) return outcome;
      blocks.copy_out(block, [&](int rank) { return where(rank, block); });
      publish(drained(block));
    }
  }
  finish_large(drained(number - 1));
  if (choice != nullptr && !reads) {
    choice->note(Choice::kStage, copied_ns + now_ns() - began_ns, count * item_size(dtype));
  }
  return Outcome::kDone;
}

}  // namespace colltensor
