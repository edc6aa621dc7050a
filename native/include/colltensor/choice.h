// Which of two ways a large message goes: through staging, or read from the memory of the ranks that give it. Which is
// faster depends on the machine, and on the pages of the user's memory, so both are tried, four calls in a row each,
// since a way's own memory has to be in the caches, and the faster one is kept for some hundred calls, for each kind of
// call and each power of two in size. With 2 ranks on 2 cores an allreduce of 4 and 16 MiB took 384 and 1365 us by
// reading on one machine (Xeon) where staging took 546 and 2053; on another one (EPYC) 610 and 2040, or 720 and 2850 in
// pages of 4 KiB, where staging took 260 and 1060.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace colltensor {

class Choice {
 public:
  enum Way { kStage, kRead, kWays };
  using Times = std::uint32_t[kWays];  // the least so far, in femtoseconds a byte

  // The way of the call that comes next. All ranks come to the same.
  bool reads() const { return turns_ < kTurns ? turns_ < kEach : reads_; }

  // Notes how long a call took that went this way.
  void note(Way way, std::int64_t ns, std::size_t nbytes) {
    if (turns_ == kTurns) {
      if (++kept_ == kKept) *this = Choice();
      return;
    }
    const double each = 1e6 * static_cast<double>(ns) / static_cast<double>(nbytes);
    best_[way] = std::min(best_[way], static_cast<std::uint32_t>(std::clamp(each, 0.0, kLongest)));
    ++turns_;
  }

  // Whether all is measured, and the times of the ranks are to be compared.
  bool ripe() const { return turns_ == kTurns && !settled_; }
  const Times& best() const { return best_; }

  // Takes the way that was faster for the slowest rank, whose best times these are.
  void settle(const Times& slowest) {
    reads_ = slowest[kRead] < slowest[kStage];
    settled_ = true;
  }

 private:
  // All of it is a prime number of calls, so that a loop's calls of several sizes do not always meet the same turns.
  static constexpr std::uint32_t kEach = 4, kTurns = kEach * kWays, kKept = 263 - kTurns;
  static constexpr double kLongest = 0xfffffffe;

  std::uint32_t turns_ = 0, kept_ = 0;
  Times best_ = {0xffffffff, 0xffffffff};
  bool settled_ = false, reads_ = true;
};

// The choices of a group, by kind of call and size.
template <std::size_t kinds>
class Choices {
 public:
  Choice& of(std::size_t kind, std::size_t nbytes) {
    std::size_t size = 0;
    while (size + 1 < kSizes && nbytes >> (size + 1) != 0) ++size;
    return choices_[kind][size];
  }

 private:
  static constexpr std::size_t kSizes = 30;  // the last one has all from 512 MiB on

  Choice choices_[kinds][kSizes];
};

}  // namespace colltensor
