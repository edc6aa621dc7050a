// The kernel and the processor: time, futexes, pauses, fork detection. Knows nothing of collectives.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace colltensor {

// A wait is told the time in nanoseconds of CLOCK_MONOTONIC, which is Python's time.monotonic() on Linux.
std::int64_t now_ns();

// Sleeps while *word == expected, for at most limit_ns; returns early on a wake, a signal or a changed word.
// The word may be shared between processes. Returns true if a signal ended the sleep.
bool futex_wait(const std::atomic<std::uint32_t>* word, std::uint32_t expected, std::int64_t limit_ns);
void futex_wake_all(const std::atomic<std::uint32_t>* word);

void yield_processor();

// The size of this machine's last-level cache, or of one of several.
std::size_t last_level_cache_nbytes();

// 1 + the number of the processor that this thread runs on.
std::uint32_t current_cpu();

// What tells the calling thread from all others that live.
const void* this_thread();

// Grows by one in a forked child, so that what belongs to the parent can be told from what does not.
std::uint32_t fork_generation();

// File descriptors that are closed with their owner; -1 stands for none.
class Descriptors {
 public:
  Descriptors() = default;
  explicit Descriptors(std::vector<int> numbers) : numbers_(std::move(numbers)) {}
  Descriptors(Descriptors&&) = default;
  Descriptors& operator=(Descriptors&&) = delete;
  ~Descriptors();
  const std::vector<int>& numbers() const { return numbers_; }

 private:
  std::vector<int> numbers_;
};

// Orders a store before a later load, where a flag is raised here and looked for there, and the other way round.
inline void full_fence() {
#if defined(__SANITIZE_THREAD__)  // does not know fences; an exchange that only this thread makes hides no race from it
  static thread_local std::atomic<int> own{0};
  own.exchange(1, std::memory_order_seq_cst);
#else
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}

inline void relax_processor() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // about as long as x86's pause; yield is a no-op on most cores
#endif
}

}  // namespace colltensor
