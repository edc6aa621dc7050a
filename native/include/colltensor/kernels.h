// Reductions of contiguous elements of several ranks, in rank order, on the best instructions of this processor.
#pragma once

#include <cstddef>

#include "colltensor/types.h"

namespace colltensor {

// Writes sources[0][i] op sources[1][i] op ... to out[i], from left to right, so that every rank that computes an
// element gets the same bits. `out` may be one of the sources; nothing else may overlap. 16-bit floats are combined
// in float32 and rounded once. `count` counts elements; at least two sources. The state of the thread's floating-point
// unit (rounding, flushing of subnormals) has no influence.
using Reduction = void (*)(void* out, const void* const* sources, int source_count, std::size_t count);

// The reduction, or null where it is not defined.
Reduction find_reduction(DType dtype, ReduceOp op);

std::size_t item_size(DType dtype);  // 0 for codes that are known by their size alone

// Which instructions are in use: "portable", "avx2", "avx512" or "neon".
const char* instruction_set();

// Uses at most the named instructions from now on, for tests; false if there are none such here.
bool limit_instruction_set(const char* name);

}  // namespace colltensor
