// Chooses the reductions by what this processor can do.
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
              __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
     }},
    {"avx2", avx2::find,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
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
