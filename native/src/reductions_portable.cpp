// The reductions for any processor of the architecture: SSE2 on x86-64, NEON on arm64.
#include <cstddef>

#include "colltensor/kernels.h"

namespace colltensor {
namespace portable {
#include "reductions.inc"
}  // namespace portable
}  // namespace colltensor
