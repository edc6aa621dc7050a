// The reductions for any processor of the architecture: SSE2 on x86-64, NEON on arm64.
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstddef>

#include "colltensor/float_state.h"
#include "colltensor/kernels.h"

namespace colltensor {
namespace portable {
#include "reductions.inc"
}  // namespace portable
}  // namespace colltensor
