// Copies of bytes: by memcpy where it is fast, by loops of our own where it is not, and past the caches where it pays.
//
// glibc copies from 2 KiB up to the size of the second-level cache with `rep movsb`. Between cores that is the best there
// is, because it does not read what it overwrites: on Zen 5, loops take 1.4 to 1.8 times as long at 64 and 256 KiB. But
// on AMD's Zen 3 and 4 it takes 4 to 20 times as long where the target lies a little farther into its page than the
// source does (https://sourceware.org/bugzilla/show_bug.cgi?id=30994, mended in later glibc). numpy's large arrays begin
// 16 bytes into a page, and staging begins at 0. So each process tries once whether its memcpy is uneven.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace colltensor {

// How what is written is stored: into the caches, or past them into the memory, which spares the processor to read what
// it overwrites, and is of use where the caches could not keep it anyway.
enum class Store { kCached, kStreamed };

constexpr std::size_t kLargeCopyNbytes = 2048;  // below, no memcpy uses `rep movsb`
constexpr std::size_t kStreamedNbytes = 4096;   // the least that is streamed
constexpr std::size_t kUncachedNbytes = std::size_t{16} << 20;  // streamed in place of a loop: no cache keeps both sides

void copy_large(void* to, const void* from, std::size_t nbytes, Store store);

// Copies bytes between memory that does not overlap.
inline void copy(void* to, const void* from, std::size_t nbytes, Store store = Store::kCached) {
  if (nbytes < kLargeCopyNbytes) {
    std::memcpy(to, from, nbytes);
  } else {
    copy_large(to, from, nbytes, store);
  }
}

// A way to copy that may be uneven: much slower where the target does not lie where the source does in its page.
class CopyWay {
 public:
  using Copy = void (*)(void* to, const void* from, std::size_t nbytes);
  static constexpr std::size_t kPage = 4096;

  constexpr explicit CopyWay(Copy copy) : copy_(copy) {}

  // The first call tries it, which takes up to 0.3 ms.
  bool uneven() {
    const int known = known_.load(std::memory_order_relaxed);
    return known == kUnknown ? find_out() : known == kUneven;
  }

  // True unless a copy from here to there might be slow.
  bool suits(const void* to, const void* from) {
    const auto target = reinterpret_cast<std::uintptr_t>(to), source = reinterpret_cast<std::uintptr_t>(from);
    return !uneven() || ((target - source) % kPage == 0 && target % 64 == 0);
  }

  void assume(bool uneven) { known_.store(uneven ? kUneven : kEven, std::memory_order_relaxed); }  // for tests

 private:
  enum : int { kUnknown, kEven, kUneven };

  bool find_out();

  const Copy copy_;
  std::atomic<int> known_{kUnknown};
};

extern CopyWay memcpy_way;
extern CopyWay kernel_way;  // what reads another process's memory (reading.cpp), with `rep movsb` too

// One loop, for copies of `kLargeCopyNbytes` and more.
struct CopyLoop {
  const char* name;  // of its instructions: "portable", "avx2", "avx512" or "neon"
  void (*copy)(char* to, const char* from, std::size_t nbytes);
  bool (*present)();
};

// From the best one to the one that is always there; behind the last one its name is null.
extern const CopyLoop kCopyLoops[];

}  // namespace colltensor
