// Chooses how bytes are copied, by what this processor and its C library do well.
#include "colltensor/copy.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "colltensor/platform.h"
#include "colltensor/types.h"

namespace colltensor {

namespace portable {
constexpr std::size_t kVector = 16;
#include "copy_loop.inc"
}  // namespace portable

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
namespace avx2 {
constexpr std::size_t kVector = 32;
#include "copy_loop.inc"
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw")
#endif
namespace avx512 {
constexpr std::size_t kVector = 64;
#include "copy_loop.inc"
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

const CopyLoop kCopyLoops[] = {
#if defined(__x86_64__)
    {"avx512", avx512::copy,
     [] { return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0; }},
    {"avx2", avx2::copy, [] { return __builtin_cpu_supports("avx2") != 0; }},
    {"portable", portable::copy, [] { return true; }},
#elif defined(__aarch64__)
    {"neon", portable::copy, [] { return true; }},
#else
    {"portable", portable::copy, [] { return true; }},
#endif
    {nullptr, nullptr, nullptr},
};

CopyWay memcpy_way([](void* to, const void* from, std::size_t nbytes) { std::memcpy(to, from, nbytes); });

namespace {

void copy_by_loop(char* to, const char* from, std::size_t nbytes) {
  static const CopyLoop& best = [&]() -> const CopyLoop& {
    const CopyLoop* loop = kCopyLoops;
    while (!loop->present()) ++loop;
    return *loop;
  }();
  best.copy(to, from, nbytes);
}

void copy_streamed(char* to, const char* from, std::size_t nbytes) {
#if defined(__SSE2__)
  constexpr std::size_t kUnit = sizeof(__m128i), kStep = 4 * kUnit;
  const std::size_t head = -reinterpret_cast<std::uintptr_t>(to) % kStep;
  std::memcpy(to, from, head);
  std::size_t place = head;
  for (; place + kStep <= nbytes; place += kStep) {
    const auto load = [&](std::size_t i) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + place + i * kUnit));
    };
    const __m128i units[] = {load(0), load(1), load(2), load(3)};
    for (std::size_t i = 0; i < 4; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(to + place + i * kUnit), units[i]);
  }
  _mm_sfence();  // such stores pass all others, those included that say that this one is done
  std::memcpy(to + place, from + place, nbytes - place);
#else
  std::memcpy(to, from, nbytes);
#endif
}

}  // namespace

void copy_large(void* to, const void* from, std::size_t nbytes, Store store) {
  auto* const target = static_cast<char*>(to);
  const auto* const source = static_cast<const char*>(from);
  if (store == Store::kStreamed && nbytes >= kStreamedNbytes) {
    copy_streamed(target, source, nbytes);
  } else if (memcpy_way.suits(to, from)) {
    std::memcpy(to, from, nbytes);
  } else if (nbytes >= kUncachedNbytes) {
    copy_streamed(target, source, nbytes);
  } else {
    copy_by_loop(target, source, nbytes);
  }
}

bool CopyWay::find_out() {
  // Uneven ones take 4 to 20 times as long, and loads that cross lines up to twice. Of several trials the least counts,
  // which no interrupt met.
  constexpr std::size_t kNbytes = 16384, kOff = 16;
  constexpr int kTrials = 8, kTimes = 3;
  const auto page = [] { return static_cast<char*>(std::aligned_alloc(kPage, kNbytes + kPage)); };
  const std::unique_ptr<char, void (*)(void*)> from(page(), std::free), to(page(), std::free);
  if (from == nullptr || to == nullptr) return false;
  std::memset(from.get(), 1, kNbytes + kPage);
  std::memset(to.get(), 1, kNbytes + kPage);
  const auto time_ns = [&](std::size_t off) {
    const std::int64_t began_ns = now_ns();
    copy_(to.get() + off, from.get(), kNbytes);
    return now_ns() - began_ns;
  };
  std::int64_t even_ns = INT64_MAX, off_ns = INT64_MAX;
  for (int trial = 0; trial < kTrials; ++trial) {
    even_ns = std::min(even_ns, time_ns(0));
    off_ns = std::min(off_ns, time_ns(kOff));
  }
  assume(off_ns > kTimes * even_ns);
  return uneven();
}

}  // namespace colltensor
