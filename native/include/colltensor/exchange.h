// The frame of every collective but the allreduce of large messages: all ranks arrive, fill their staging block by
// block, and drain each other's; or, of large messages, read each other's memory where that is faster (choice.h).
// Measured with 2 ranks on 2 cores (Xeon, 2 MiB of L2 each), us through staging and by reading, at 256 KiB, 1 and 16
// MiB: allgather 37/19, 214/164, 3804/2878; all-to-all 35/27, 165/102, 3205/2231; reduce-scatter 33/30, 130/118,
// 2378/1774; gather 34/19, 224/173, 3939/3717; scatter 29/16, 79/54, 2242/2243. Always staged are reduce 30/57, 81/232,
// 1265/1577, and broadcast 30/28, 90/146, 1247/1294: where bytes flow one way, copying in on one side overlaps with
// copying out on the other.
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

  // What this rank gives, which the others may read instead of its staging, in the order in which `Take` asks for it.
  Exchange& gives(Group::Kind kind, const View* sources, int count) {
    choice_ = group_.choice(kind, count_ * unit_);
    sources_ = sources;
    source_count_ = count;
    return *this;
  }

  template <class Fill, class Drain>
  Outcome run(const Signature& signature, std::int64_t deadline_ns, Fill fill, Drain drain) {
    return run(signature, deadline_ns, fill, drain, [] { return Outcome::kDone; });
  }

  // `Take()` reads all that this rank gets from the others' memory; of use after `gives`.
  template <class Fill, class Drain, class Take>
  Outcome run(const Signature& signature, std::int64_t deadline_ns, Fill fill, Drain drain, Take take) {
    Group& group = group_;
    Outcome outcome = group.enter();
    if (outcome != Outcome::kDone) return outcome;
    plan();
    if (deadline_ns == Group::kBrief && !is_brief()) return Outcome::kLarge;
    deadline_ns_ = deadline_ns;
    const std::uint32_t arrival = group.resumed_ ? group.done_ : group.done_ + 1;
    const bool reads = choice_ != nullptr && choice_->reads();
    if (!group.resumed_) {
      if (choice_ != nullptr) std::copy_n(choice_->best(), Choice::kWays, group.own_post().times());
      if (reads) {
        group.offer(sources_, flow_.fills ? source_count_ : 0, count_ * unit_ / source_count_);
      } else if (flow_.fills && count_ != 0) {
        if (!posted_) outcome = group.wait_for_half(group.parity(), deadline_ns);
        if (outcome != Outcome::kDone) return outcome;
        const std::int64_t before_ns = choice_ == nullptr ? 0 : now_ns();
        fill(std::size_t{0}, std::min(block_, count_), where(group.rank_, 0));
        if (choice_ != nullptr) filled_ns_ = now_ns() - before_ns;
      }
      group.arrive(arrival, signature);
    }
    outcome = group.agree(arrival, signature, deadline_ns);
    if (outcome != Outcome::kDone) return outcome;
    group.settle(choice_);
    const std::int64_t began_ns = choice_ == nullptr ? 0 : now_ns();
    if (reads && group.all_readable()) {
      outcome = run_reading(arrival, take);
      if (outcome == Outcome::kDone) choice_->note(Choice::kRead, now_ns() - began_ns, count_ * unit_);
      return outcome;
    }
    if (reads) return run_blocks(arrival + 1, true, fill, drain);
    if (blocks_ <= 1) {
      if (count_ != 0) drain(std::size_t{0}, count_, [&](int rank) { return where(rank, 0); });
      group.finish_fast(arrival, deadline_ns == Group::kBrief);
    } else {
      outcome = run_blocks(arrival, false, fill, drain);
    }
    if (choice_ != nullptr && outcome == Outcome::kDone) {
      choice_->note(Choice::kStage, filled_ns_ + now_ns() - began_ns, count_ * unit_);
    }
    return outcome;
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

  // Whether it moves little and begins without waiting.
  bool is_brief() const {
    const std::size_t peers = std::max<std::size_t>(1, group_.others().size());
    if (blocks_ > 1 || choice_ != nullptr || count_ * unit_ * peers > Group::kBriefNbytes) return false;
    return posted_ || group_.is_half_free(group_.parity(), kNoRank);
  }

  char* where(int rank, std::size_t block) const {
    if (posted_) return reinterpret_cast<char*>(group_.layout_.post(rank, group_.parity()).data(count_ * unit_));
    const std::size_t position = (block + (group_.parity() ? kDepth / 2 : 0)) % kDepth;
    return group_.half(rank, 0) + position * (2 * group_.half_nbytes_ / kDepth);
  }

  template <class Take>
  Outcome run_reading(std::uint32_t arrival, Take take) {
    if (flow_.fills) group_.tell(sources_, source_count_);
    group_.publish(arrival + 1);
    Outcome outcome = wait(flow_.writers, arrival + 1);
    if (outcome == Outcome::kDone) outcome = take();
    if (outcome != Outcome::kDone) return outcome;
    group_.publish(arrival + 2);
    outcome = wait(flow_.readers, arrival + 2);  // they read this rank's memory until then
    if (outcome != Outcome::kDone) return outcome;
    group_.finish_large(arrival + 2);
    return Outcome::kDone;
  }

  // Block b is filled in step 2b after the first and drained in step 2b + 3, one block behind. Block 0 is filled
  // already, which is the first step, unless `late`.
  template <class Fill, class Drain>
  Outcome run_blocks(std::uint32_t arrival, bool late, Fill fill, Drain drain) {
    Group& group = group_;
    if (late) {
      if (flow_.fills) {
        const Outcome outcome = group.wait_for_half(group.parity(), deadline_ns_);
        if (outcome != Outcome::kDone) return outcome;
        fill(std::size_t{0}, std::min(block_, count_), where(group.rank_, 0));
      }
      group.publish(arrival);
    }
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
  Choice* choice_ = nullptr;
  std::int64_t filled_ns_ = 0;  // of staging's time, what passes before the ranks agree
  const View* sources_ = nullptr;
  int source_count_ = 1;
  std::size_t block_ = 0, blocks_ = 0;
  bool posted_ = false;
  std::int64_t deadline_ns_ = 0;
};

}  // namespace colltensor
