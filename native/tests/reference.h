// What a reduction must come to, computed one element after the other and without the core's code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "colltensor/types.h"

namespace colltensor {
namespace tests {

using Bytes = std::vector<char>;

constexpr int kDTypes = 15;  // that can be reduced
constexpr int kOps = 8;

std::size_t nbytes_of(DType dtype);
bool defined(DType dtype, ReduceOp op);

// Elements that no other seed has, NaN, infinities, zeros of both signs and subnormal numbers among them.
Bytes elements(DType dtype, std::size_t count, std::uint32_t seed);

// sources[0] op sources[1] op ..., in this order; 16-bit floats in float32, rounded once.
Bytes combined(DType dtype, ReduceOp op, const std::vector<Bytes>& sources);

// Bit for bit, but that every NaN is like every other and the signs of zeros do not count.
bool same(DType dtype, const Bytes& left, const Bytes& right);

}  // namespace tests
}  // namespace colltensor
