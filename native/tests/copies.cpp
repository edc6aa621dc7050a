// Copies: every loop of this processor, and those that are streamed, at every place of both sides in two cache lines,
// around every size at which another way begins. What is written must be right, and nothing else be written.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "check.h"
#include "colltensor/copy.h"
#include "colltensor/view.h"

namespace colltensor {
namespace tests {
namespace {

constexpr std::size_t kPlaces = 128;  // bytes off a page's beginning, on each side
constexpr std::size_t kEdge = 256;    // looked at on both sides of what is written

class Memory {
 public:
  explicit Memory(std::size_t most) : from_(pages(most)), to_(pages(most)) {
    unsigned state = 1;
    for (std::size_t i = 0; i < most + kPlaces; ++i) {
      state = state * 1664525 + 1013904223;
      source()[i] = static_cast<char>(state >> 24);
    }
  }

  template <class Copy>
  void check(const char* name, std::size_t nbytes, std::size_t to, std::size_t from, Copy copy) {
    char* const target = page(to_) + to;
    std::memset(target - kEdge, kMark, nbytes + 2 * kEdge);
    copy(target, source() + from, nbytes);
    expect(std::memcmp(target, source() + from, nbytes) == 0, "%s: %zu bytes, %zu and %zu off", name, nbytes, to, from);
    expect(untouched(target - kEdge) && untouched(target + nbytes), "%s wrote around %zu bytes, %zu and %zu off", name,
           nbytes, to, from);
  }

 private:
  static constexpr char kMark = 'x';
  static std::vector<char> pages(std::size_t most) { return std::vector<char>(most + kPlaces + 3 * CopyWay::kPage); }
  static char* page(std::vector<char>& memory) {
    const auto start = reinterpret_cast<std::uintptr_t>(memory.data()) + CopyWay::kPage;  // room for an edge
    return memory.data() + CopyWay::kPage + (-start) % CopyWay::kPage;
  }
  static bool untouched(const char* edge) { return std::count(edge, edge + kEdge, kMark) == std::ptrdiff_t{kEdge}; }
  char* source() { return page(from_); }

  std::vector<char> from_, to_;
};

template <class Copy>
void check_places(Memory& memory, const char* name, const std::vector<std::size_t>& sizes, Copy copy) {
  for (std::size_t nbytes : sizes) {
    for (std::size_t place = 0; place < kPlaces; ++place) {
      memory.check(name, nbytes, place, 0, copy);
      memory.check(name, nbytes, 0, place, copy);
      memory.check(name, nbytes, place, place, copy);
      memory.check(name, nbytes, place, kPlaces - 1 - place, copy);
    }
  }
  for (std::size_t to = 0; to < kPlaces; ++to) {
    for (std::size_t from = 0; from < kPlaces; ++from) memory.check(name, sizes.front(), to, from, copy);
  }
}

// Around `nbytes`, and around what is left of it behind a vector, four of them, and a line.
std::vector<std::size_t> around(std::size_t nbytes) {
  return {nbytes, nbytes + 1, nbytes + 15, nbytes + 16, nbytes + 17, nbytes + 63, nbytes + 64, nbytes + 65,
          nbytes + 127, nbytes + 128, nbytes + 255, nbytes + 256, nbytes + 257};
}

void check_loops(Memory& memory) {
  for (const CopyLoop* loop = kCopyLoops; loop->name != nullptr; ++loop) {
    if (!loop->present()) continue;
    check_places(memory, loop->name, around(kLargeCopyNbytes), loop->copy);
    check_places(memory, loop->name, {kLargeCopyNbytes, 65536, 70001}, loop->copy);
    std::printf("copies: %s\n", loop->name);
  }
}

void check_streams(Memory& memory) {
  const auto stream = [](char* to, const char* from, std::size_t n) { copy(to, from, n, Store::kStreamed); };
  check_places(memory, "streamed", around(kStreamedNbytes), stream);
  check_places(memory, "streamed", {kStreamedNbytes - 1, 0, 1, 70001}, stream);
}

// Each way of copy(), whichever this machine takes by itself.
void check_choice(Memory& memory) {
  const auto whole = [](char* to, const char* from, std::size_t n) { copy(to, from, n); };
  const auto view = [](char* to, const char* from, std::size_t n) { View(to, 1).write(0, n, from); };
  for (bool uneven : {true, false}) {
    memcpy_way.assume(uneven);
    check_places(memory, "copy", {kLargeCopyNbytes - 1, kLargeCopyNbytes, 0, 1, 5000}, whole);
    check_places(memory, "a view", {kLargeCopyNbytes - 1, kLargeCopyNbytes}, view);
    for (std::size_t nbytes : {kUncachedNbytes - 1, kUncachedNbytes, kUncachedNbytes + 1}) {
      for (std::size_t place : {0, 16, 127}) memory.check("copy", nbytes, place, 16, whole);
    }
  }
}

void pause_ns(std::int64_t duration_ns) {
  const std::int64_t end_ns = now_ns() + duration_ns;
  while (now_ns() < end_ns) {
  }
}

// Of which copies it is said that they are slow, and of which ways.
void check_evenness() {
  CopyWay always([](void*, const void*, std::size_t) { pause_ns(20'000); });
  expect(!always.uneven(), "a way that always takes as long is called uneven");
  CopyWay off([](void* to, const void* from, std::size_t) {
    const auto apart = reinterpret_cast<std::uintptr_t>(to) - reinterpret_cast<std::uintptr_t>(from);
    pause_ns(apart % CopyWay::kPage == 0 ? 20'000 : 200'000);
  });
  expect(off.uneven(), "a way is not called uneven that takes ten times as long off the source's place");
  alignas(CopyWay::kPage) static char pages[4 * CopyWay::kPage];
  const auto suits = [&](std::size_t to, std::size_t from) { return off.suits(pages + to, pages + from); };
  expect(suits(0, CopyWay::kPage) && suits(64, CopyWay::kPage + 64), "the same place in a page does not suit");
  expect(!suits(16, CopyWay::kPage) && !suits(0, CopyWay::kPage + 16) && !suits(64, CopyWay::kPage), "another one does");
  expect(!suits(16, CopyWay::kPage + 16), "a place within a line does");
  off.assume(false);
  expect(suits(16, CopyWay::kPage), "an even way does not suit");
}

}  // namespace

void test_copies() {
  Memory memory(kUncachedNbytes + 1);
  std::printf("copies: memcpy is %s here, the kernel's copies are %s\n", memcpy_way.uneven() ? "uneven" : "even",
              kernel_way.uneven() ? "uneven" : "even");
  check_loops(memory);
  check_streams(memory);
  check_choice(memory);
  check_evenness();
}

}  // namespace tests
}  // namespace colltensor
