// Chooses the reductions by what this processor can do.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstring>

#include "colltensor/kernels.h"

namespace colltensor {

namespace portable { Reduction find(DType dtype, ReduceOp op); }
#if defined(__x86_64__)
namespace avx2 { Reduction find(DType dtype, ReduceOp op); }
namespace avx512 { Reduction find(DType dtype, ReduceOp op); }
#endif

namespace {

#if defined(__x86_64__)
// By hand: clang 14's __builtin_cpu_supports does not know the name. That the system saves the registers, which it
// needs as AVX2 does, is in the answer for AVX2.
bool has_f16c() {
  unsigned int eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

struct InstructionSet {
  const char* name;
  Reduction (*find)(DType, ReduceOp);
  bool (*present)();
};

// From the best to the one that is always there.
const InstructionSet kSets[] = {
#if defined(__x86_64__)
    {"avx512", avx512::find,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("fma") && has_f16c();
     }},
    {"avx2", avx2::find,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
     }},
    {"portable", portable::find, [] { return true; }},
#elif defined(__aarch64__)
    {"neon", portable::find, [] { return true; }},
#else
    {"portable", portable::find, [] { return true; }},
#endif
};

std::atomic<const InstructionSet*> chosen{nullptr};

const InstructionSet& current() {
  const InstructionSet* set = chosen.load(std::memory_order_acquire);
  if (set == nullptr) {
    set = kSets;
    while (!set->present()) ++set;
    chosen.store(set, std::memory_order_release);
  }
  return *set;
}

}  // namespace

Reduction find_reduction(DType dtype, ReduceOp op) { return current().find(dtype, op); }

const char* instruction_set() { return current().name; }

bool limit_instruction_set(const char* name) {
  for (const InstructionSet& set : kSets) {
    if (std::strcmp(set.name, name) == 0 && set.present()) {
      chosen.store(&set, std::memory_order_release);
      return true;
    }
  }
  return false;
}

std::size_t item_size(DType dtype) {
  static constexpr unsigned char kSizes[] = {1, 1, 2, 4, 8, 1, 2, 4, 8, 2, 2, 4, 8, 8, 16};
  const auto code = static_cast<std::size_t>(dtype);
  return code < sizeof kSizes ? kSizes[code] : 0;
}

}  // namespace colltensor
