// The reductions for processors with AVX512 (and F16C, which all of them have).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>

#include "colltensor/float_state.h"
#include "colltensor/kernels.h"

#define COLLTENSOR_F16C 1
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c,fma")
#endif

namespace colltensor {
namespace avx512 {
#include "reductions.inc"
}  // namespace avx512
}  // namespace colltensor

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
