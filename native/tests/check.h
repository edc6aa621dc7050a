// What the native tests share: counting what went wrong, and the arguments and clocks of ranks.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "colltensor/group.h"
#include "colltensor/segment.h"

namespace colltensor {
namespace tests {

constexpr int kNoRank = -2;

inline std::atomic<int> failures{0};                 // expectations that were not met
inline std::atomic<long> naps{0};                    // waits that went as far as looking around, before they sleep
inline std::atomic<int> signalled_rank{kNoRank};     // whose waits an interpreter's signal ends
inline thread_local int this_rank = -1;              // inline also because g++'s UBSan misreads an extern one

// Prints what was expected, in printf's manner, unless `truth`.
__attribute__((format(printf, 2, 3))) bool expect(bool truth, const char* what, ...);

std::int64_t in_ms(std::int64_t milliseconds);  // a deadline
constexpr std::int64_t kHangMs = 60'000;        // a wait as long is a defect

struct Sizes {
  std::uint64_t half, direct, chunk, read, cache;
};
constexpr Sizes kSmall{1 << 16, 1 << 14, 1 << 13, 20000, 30000}, kUsual{1 << 20, 1 << 16, 1 << 17, 1 << 18, 1 << 20};

// The shared memory of a group, in a mapping that forked processes share.
class SharedMemory {
 public:
  // `cores`: what the ranks are told there is, which decides how they wait.
  SharedMemory(int ranks, int cores, const Sizes& sizes);
  SharedMemory(const SharedMemory&) = delete;
  ~SharedMemory();
  char* base() const { return base_; }
  int ranks() const { return ranks_; }

 private:
  char* base_;
  std::uint64_t nbytes_;
  int ranks_;
};

Hooks counting_hooks();  // count naps, and end the waits of signalled_rank

// choices.cpp, copies.cpp, kernels.cpp, failures.cpp, processes.cpp
void test_choices();
void test_copies();
void test_kernels();
void test_failures();
void test_processes(unsigned seed);

// stress.cpp: collectives of one rank, chosen at random but the same on all ranks with this seed.
class RandomCalls {
 public:
  RandomCalls(unsigned seed, int rank, bool may_disagree);
  // Makes one and checks its results if it was done. Another outcome than expected is the caller's to judge.
  Outcome make(Group& group);
  static long made();

 private:
  unsigned seed_, own_;
  int call_ = 0;
  bool may_disagree_;
};
void stress(unsigned seed);

}  // namespace tests
}  // namespace colltensor
