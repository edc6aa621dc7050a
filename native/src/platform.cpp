#include "colltensor/platform.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdio>

namespace colltensor {
namespace {

std::atomic<std::uint32_t> generation{0};

void count_fork() { generation.fetch_add(1, std::memory_order_relaxed); }

struct ForkWatch {
  ForkWatch() { pthread_atfork(nullptr, nullptr, count_fork); }
} fork_watch;

}  // namespace

Descriptors::~Descriptors() {
  for (int number : numbers_) {
    if (number >= 0) close(number);
  }
}

std::int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return std::int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

bool futex_wait(const std::atomic<std::uint32_t>* word, std::uint32_t expected, std::int64_t limit_ns) {
  if (limit_ns <= 0) return false;
  timespec limit{static_cast<time_t>(limit_ns / 1'000'000'000), static_cast<long>(limit_ns % 1'000'000'000)};
  // Without FUTEX_PRIVATE_FLAG: the word is in memory shared between processes.
  return syscall(SYS_futex, word, FUTEX_WAIT, expected, &limit, nullptr, 0) != 0 && errno == EINTR;
}

void futex_wake_all(const std::atomic<std::uint32_t>* word) {
  syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void yield_processor() { sched_yield(); }

std::size_t last_level_cache_nbytes() {
  // Not sysconf(_SC_LEVEL3_CACHE_SIZE), which on AMD's processors gives that of all of them together.
  constexpr std::size_t kUnknown = std::size_t{32} << 20;
  std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "re");
  if (file == nullptr) return kUnknown;
  unsigned long kibibytes = 0;
  const bool read = std::fscanf(file, "%luK", &kibibytes) == 1;
  std::fclose(file);
  return read && kibibytes != 0 ? std::size_t{kibibytes} << 10 : kUnknown;
}

std::uint32_t current_cpu() { return static_cast<std::uint32_t>(sched_getcpu() + 1); }

const void* this_thread() {
  static thread_local char own;
  return &own;
}

std::uint32_t fork_generation() { return generation.load(std::memory_order_relaxed); }

}  // namespace colltensor
