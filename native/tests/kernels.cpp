// Every reduction with every instruction set of this processor, against the reference.
#include <algorithm>
#include <cstdio>
#include <string>

#include "check.h"
#include "reference.h"

namespace colltensor {
namespace tests {
namespace {

// What state of the floating-point unit a caller's thread may be in: as a program starts; flushing subnormals, as XLA's
// threads; rounding upward, and flushing.
#if defined(__x86_64__)
constexpr unsigned long kStates[] = {0x1f80, 0x9fc0, 0xdfc0};
unsigned long state() { return __builtin_ia32_stmxcsr() & ~0x3fu; }
void set_state(unsigned long word) { __builtin_ia32_ldmxcsr(static_cast<unsigned int>(word)); }
#elif defined(__aarch64__)
constexpr unsigned long kStates[] = {0, 1ul << 24, 1ul << 24 | 1ul << 22};
unsigned long state() {
  unsigned long word;
  asm volatile("mrs %0, fpcr" : "=r"(word));
  return word;
}
void set_state(unsigned long word) { asm volatile("msr fpcr, %0" : : "r"(word) : "memory"); }
#else
constexpr unsigned long kStates[] = {0};
unsigned long state() { return 0; }
void set_state(unsigned long) {}
#endif

// Around every vector's length, with and without a rest, and more than the kernels' intermediate buffers.
constexpr std::size_t kCounts[] = {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 1023, 1024, 1025, 2500};

// `out` is one of the sources, or apart; `shift` bytes off any alignment.
void check(const char* set, DType dtype, ReduceOp op, int source_count, std::size_t count, int out, int shift,
           unsigned long of_caller) {
  std::vector<Bytes> given, memory;
  std::vector<const void*> sources;
  for (int source = 0; source < source_count; ++source) {
    given.push_back(elements(dtype, count, static_cast<std::uint32_t>(1000 * source_count + 10 * count + source)));
    memory.emplace_back(shift);
    memory.back().insert(memory.back().end(), given.back().begin(), given.back().end());
  }
  for (const Bytes& bytes : memory) sources.push_back(bytes.data() + shift);
  const std::size_t nbytes = count * nbytes_of(dtype);
  Bytes apart(shift + nbytes + 1, 'x');
  char* to = out < source_count ? memory[out].data() + shift : apart.data() + shift;
  const Reduction reduction = find_reduction(dtype, op);
  const unsigned long own = state();
  set_state(of_caller);
  reduction(to, sources.data(), source_count, count);
  const unsigned long left = state();
  set_state(own);
  expect(left == of_caller, "%s: dtype %d, op %d left the floating-point state %lx as %lx", set,
         static_cast<int>(dtype), static_cast<int>(op), of_caller, left);
  expect(same(dtype, Bytes(to, to + nbytes), combined(dtype, op, given)),
         "%s: dtype %d, op %d, %d sources, %zu elements, out %d, %d bytes off, in state %lx", set,
         static_cast<int>(dtype), static_cast<int>(op), source_count, count, out, shift, of_caller);
  expect(out < source_count || apart.back() == 'x', "%s wrote behind the end, dtype %d, op %d, %zu elements", set,
         static_cast<int>(dtype), static_cast<int>(op), count);
}

void check_set(const char* set) {
  for (int code = 0; code < kDTypes; ++code) {
    for (int number = 0; number < kOps; ++number) {
      const auto dtype = static_cast<DType>(code);
      const auto op = static_cast<ReduceOp>(number);
      const bool there = find_reduction(dtype, op) != nullptr;
      expect(there == defined(dtype, op), "dtype %d, op %d is %s", code, number, there ? "defined" : "missing");
      if (!there) continue;
      int turn = code + number;
      for (std::size_t count : kCounts) {
        for (int sources = 2; sources <= 9; sources += 1 + turn % 2, ++turn) {
          for (unsigned long of_caller : kStates) {
            check(set, dtype, op, sources, count, turn % (sources + 1), turn % 3, of_caller);
          }
        }
      }
    }
  }
}

}  // namespace

void test_kernels() {
  const std::string best = instruction_set();
  int ran = 0;
  for (const char* set : {"portable", "neon", "avx2", "avx512"}) {
    if (!limit_instruction_set(set)) continue;
    check_set(set);
    std::printf("kernels: %s\n", set);
    ++ran;
  }
  limit_instruction_set(best.c_str());
  expect(ran != 0, "no instruction set is present");
  expect(find_reduction(DType::kMovesOnly, ReduceOp::kSum) == nullptr, "a reduction of what only moves");
}

}  // namespace tests
}  // namespace colltensor
