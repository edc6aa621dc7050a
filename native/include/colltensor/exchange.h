// The frame of every collective but the allreduce of large messages: all ranks arrive, fill their staging block by
// block, and drain each other's.
#pragma once

#include <algorithm>
#include <cstdint>

#include "colltensor/group.h"

namespace colltensor {

constexpr int kEveryone = -1, kNobody = -2;

// One collective of one rank. `Fill(first, count, to)` writes elements of this rank's to staging; `Drain(first, count,
// from)` reads the others' staging, where from(rank) is what rank `rank` filled, and writes to user memory.
class Exchange {
 public:
  struct Flow {
    int readers;  // whom this rank waits for before it overwrites a block: kEveryone, kNobody or a rank
    int writers;  // whom it waits for before it drains a block
    bool fills;   // whether this rank has anything to give
  };

  // `count` elements of `unit_nbytes` pass through every rank's staging, on all ranks the same.
  Exchange(Group& group, std::size_t count, std::size_t unit_nbytes, Flow flow)
      : group_(group), count_(count), unit_(unit_nbytes), flow_(flow) {}

  template <class Fill, class Drain>
  Outcome run(const Signature& signature, std::int64_t deadline_ns, Fill fill, Drain drain) {
    Group& group = group_;
    Outcome outcome = group.enter();
    if (outcome != Outcome::kDone) return outcome;
    plan();
    deadline_ns_ = deadline_ns;
    const std::uint32_t arrival = group.done_ + 1;
    if (flow_.fills && count_ != 0) {
      if (!posted_) outcome = group.wait_for_half(group.parity(), deadline_ns);
      if (outcome != Outcome::kDone) return outcome;
      fill(std::size_t{0}, std::min(block_, count_), where(group.rank_, 0));
    }
    group.own_post().signature = signature;
    group.publish(arrival);
    outcome = group.wait_for_all(arrival, deadline_ns);
    if (outcome != Outcome::kDone) return outcome;
    if (!group.signatures_agree(signature)) {
      ++group.calls_;
      return Outcome::kMismatch;
    }
    if (blocks_ <= 1) {
      if (count_ != 0) drain(std::size_t{0}, count_, [&](int rank) { return where(rank, 0); });
      group.finish_direct(arrival);
      return Outcome::kDone;
    }
    return run_blocks(arrival, fill, drain);
  }

 private:
  // Blocks of a quarter of the staging: four of them let a rank run ahead of the others.
  static constexpr std::size_t kDepth = 4;

  void plan() {
    posted_ = count_ * unit_ <= kInline;
    const std::size_t whole = 2 * group_.half_nbytes_ / kDepth;
    if (posted_ || count_ * unit_ <= std::min(group_.half_nbytes_, group_.direct_nbytes_)) {
      blocks_ = count_ != 0;
      block_ = count_;
      return;
    }
    block_ = whole / unit_;
    if (block_ >= 64) block_ -= block_ % 64;  // blocks begin on cache lines
    blocks_ = (count_ + block_ - 1) / block_;
  }

  char* where(int rank, std::size_t block) const {
    if (posted_) return reinterpret_cast<char*>(group_.layout_.post(rank, group_.parity()).data);
    const std::size_t position = (block + (group_.parity() ? kDepth / 2 : 0)) % kDepth;
    return group_.half(rank, 0) + position * (2 * group_.half_nbytes_ / kDepth);
  }

  // Block b is filled in step 2b after the arrival and drained in step 2b + 3, one block behind.
  template <class Fill, class Drain>
  Outcome run_blocks(std::uint32_t arrival, Fill fill, Drain drain) {
    Group& group = group_;
    if (flow_.fills) {
      // The other half may still be in use by the call before, whose end everybody has passed by arriving.
      const Outcome outcome = group.wait_for_half(group.parity() ^ 1, deadline_ns_);
      if (outcome != Outcome::kDone) return outcome;
    }
    for (std::size_t turn = 0; turn <= blocks_; ++turn) {
      if (turn != 0 && turn < blocks_) {
        if (flow_.fills) {
          if (turn >= kDepth) {
            const Outcome outcome = wait(flow_.readers, drained(arrival, turn - kDepth));
            if (outcome != Outcome::kDone) return outcome;
          }
          fill(turn * block_, std::min(block_, count_ - turn * block_), where(group.rank_, turn));
        }
        group.publish(filled(arrival, turn));
      }
      if (turn == 0) continue;
      const std::size_t block = turn - 1;
      const Outcome outcome = wait(flow_.writers, filled(arrival, block));
      if (outcome != Outcome::kDone) return outcome;
      drain(block * block_, std::min(block_, count_ - block * block_), [&](int rank) { return where(rank, block); });
      group.publish(drained(arrival, block));
    }
    group.finish_large(drained(arrival, blocks_ - 1));
    return Outcome::kDone;
  }

  static std::uint32_t filled(std::uint32_t arrival, std::size_t block) {
    return arrival + static_cast<std::uint32_t>(2 * block);
  }
  static std::uint32_t drained(std::uint32_t arrival, std::size_t block) {
    return arrival + static_cast<std::uint32_t>(2 * block + 3);
  }

  Outcome wait(int whom, std::uint32_t step) {
    if (whom == kNobody) return Outcome::kDone;
    return whom == kEveryone ? group_.wait_for_all(step, deadline_ns_) : group_.wait_for(whom, step, deadline_ns_);
  }

  Group& group_;
  const std::size_t count_, unit_;
  const Flow flow_;
  std::size_t block_ = 0, blocks_ = 0;
  bool posted_ = false;
  std::int64_t deadline_ns_ = 0;
};

}  // namespace colltensor
