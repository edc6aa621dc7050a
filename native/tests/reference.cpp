#include "reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

namespace colltensor {
namespace tests {
namespace {

struct Format {
  int exponent_bits, fraction_bits;
};
constexpr Format kHalf{5, 10}, kBrain{8, 7};

float decoded(std::uint16_t bits, Format format) {
  const int bias = (1 << (format.exponent_bits - 1)) - 1, top = (1 << format.exponent_bits) - 1;
  const int exponent = (bits >> format.fraction_bits) & top, fraction = bits & ((1 << format.fraction_bits) - 1);
  double value;
  if (exponent == top) {
    value = fraction == 0 ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  } else {
    const int whole = exponent == 0 ? fraction : fraction + (1 << format.fraction_bits);
    value = std::ldexp(whole, std::max(exponent, 1) - bias - format.fraction_bits);
  }
  return static_cast<float>((bits & 0x8000) != 0 ? -value : value);
}

std::uint16_t encoded(float wide, Format format) {
  const int bias = (1 << (format.exponent_bits - 1)) - 1, top = (1 << format.exponent_bits) - 1;
  const int sign = std::signbit(wide) ? 0x8000 : 0;
  const int infinity = top << format.fraction_bits;
  if (std::isnan(wide)) return static_cast<std::uint16_t>(sign | infinity | 1 << (format.fraction_bits - 1));
  double value = std::fabs(static_cast<double>(wide));
  if (std::isinf(value)) return static_cast<std::uint16_t>(sign | infinity);
  if (value == 0) return static_cast<std::uint16_t>(sign);
  int exponent = std::max(std::ilogb(value), 1 - bias);
  auto whole = static_cast<int>(std::nearbyint(std::ldexp(value, format.fraction_bits - exponent)));  // ties to even
  if (whole == 2 << format.fraction_bits) {
    whole /= 2;
    ++exponent;
  }
  if (exponent + bias >= top) return static_cast<std::uint16_t>(sign | infinity);
  const bool subnormal = whole < 1 << format.fraction_bits;
  return static_cast<std::uint16_t>(
      sign | (subnormal ? whole : ((exponent + bias) << format.fraction_bits) + whole - (1 << format.fraction_bits)));
}

template <class T>
T applied(ReduceOp op, T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    switch (op) {
      case ReduceOp::kSum:
      case ReduceOp::kAverage: return a + b;
      case ReduceOp::kProduct: return a * b;
      default: break;
    }
    if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<T>::quiet_NaN();
    return op == ReduceOp::kMin ? std::min(a, b) : std::max(a, b);
  } else {
    const auto x = static_cast<std::uint64_t>(a), y = static_cast<std::uint64_t>(b);
    switch (op) {
      case ReduceOp::kSum: return static_cast<T>(x + y);
      case ReduceOp::kProduct: return static_cast<T>(x * y);
      case ReduceOp::kMin: return std::min(a, b);
      case ReduceOp::kMax: return std::max(a, b);
      case ReduceOp::kBAnd: return static_cast<T>(x & y);
      case ReduceOp::kBOr: return static_cast<T>(x | y);
      default: return static_cast<T>(x ^ y);
    }
  }
}

ReduceOp of_bool(ReduceOp op) {
  switch (op) {
    case ReduceOp::kSum:
    case ReduceOp::kMax: return ReduceOp::kBOr;
    case ReduceOp::kProduct:
    case ReduceOp::kMin: return ReduceOp::kBAnd;
    default: return op;
  }
}

// Combines elements stored as S in the type that load() gives.
template <class S, class Load, class Store>
Bytes folded(ReduceOp op, const std::vector<Bytes>& sources, Load load, Store store) {
  Bytes result(sources[0].size());
  for (std::size_t at = 0; at < result.size(); at += sizeof(S)) {
    const auto element = [&](std::size_t source) {
      S stored;
      std::memcpy(&stored, sources[source].data() + at, sizeof stored);
      return load(stored);
    };
    auto value = element(0);
    for (std::size_t source = 1; source < sources.size(); ++source) value = applied(op, value, element(source));
    if (op == ReduceOp::kAverage) value = static_cast<decltype(value)>(value / static_cast<float>(sources.size()));
    const S stored = store(value);
    std::memcpy(result.data() + at, &stored, sizeof stored);
  }
  return result;
}

template <class T>
Bytes plain(ReduceOp op, const std::vector<Bytes>& sources) {
  return folded<T>(op, sources, [](T value) { return value; }, [](T value) { return value; });
}

Bytes sixteen_bit(ReduceOp op, const std::vector<Bytes>& sources, Format format) {
  return folded<std::uint16_t>(op, sources, [=](std::uint16_t bits) { return decoded(bits, format); },
                               [=](float value) { return encoded(value, format); });
}

// Whether elements are alike: number(bytes) gives their value.
template <class S, class Number>
bool alike(const Bytes& left, const Bytes& right, Number number) {
  for (std::size_t at = 0; at < left.size(); at += sizeof(S)) {
    S a, b;
    std::memcpy(&a, left.data() + at, sizeof a);
    std::memcpy(&b, right.data() + at, sizeof b);
    if (std::memcmp(&a, &b, sizeof a) == 0) continue;
    if (std::isnan(number(a)) ? !std::isnan(number(b)) : number(a) != 0 || number(b) != 0) return false;
  }
  return true;
}

template <class T>
void set_special(Bytes& bytes, std::size_t at, std::uint32_t which) {
  using limits = std::numeric_limits<T>;
  const T specials[] = {limits::quiet_NaN(), limits::infinity(), -limits::infinity(), T(0), -T(0),
                        limits::denorm_min(), limits::max(), -limits::min() / 3};
  std::memcpy(bytes.data() + at, &specials[which % 8], sizeof(T));
}

template <class T>
void make_floats(Bytes& bytes, std::uint32_t state) {
  for (std::size_t at = 0; at < bytes.size(); at += sizeof(T)) {
    state = state * 1664525u + 1013904223u;
    const T value = static_cast<T>(std::ldexp(static_cast<double>(static_cast<std::int32_t>(state)),
                                              static_cast<int>(state >> 9 & 15) - 40));
    std::memcpy(bytes.data() + at, &value, sizeof value);
    if ((state >> 16 & 127) == 0) set_special<T>(bytes, at, state >> 24);
  }
}

}  // namespace

std::size_t nbytes_of(DType dtype) {
  constexpr std::size_t kSizes[] = {1, 1, 2, 4, 8, 1, 2, 4, 8, 2, 2, 4, 8, 8, 16};
  return kSizes[static_cast<int>(dtype)];
}

bool defined(DType dtype, ReduceOp op) {
  const bool bits = op == ReduceOp::kBAnd || op == ReduceOp::kBOr || op == ReduceOp::kBXor;
  if (dtype >= DType::kComplex64) return op == ReduceOp::kSum || op == ReduceOp::kAverage;
  return dtype >= DType::kFloat16 ? !bits : op != ReduceOp::kAverage;
}

Bytes elements(DType dtype, std::size_t count, std::uint32_t seed) {
  Bytes bytes(count * nbytes_of(dtype));
  std::uint32_t state = seed * 2654435761u + 12345u;
  switch (dtype) {
    case DType::kFloat32:
    case DType::kComplex64: make_floats<float>(bytes, state); return bytes;
    case DType::kFloat64:
    case DType::kComplex128: make_floats<double>(bytes, state); return bytes;
    default: break;
  }
  for (char& byte : bytes) {
    state = state * 1664525u + 1013904223u;
    byte = static_cast<char>(dtype == DType::kBool ? (state >> 24) % 3 % 2 : state >> 24);
  }
  return bytes;
}

Bytes combined(DType dtype, ReduceOp op, const std::vector<Bytes>& sources) {
  if (sources.size() == 1) return sources[0];
  switch (dtype) {
    case DType::kBool: return plain<std::uint8_t>(of_bool(op), sources);
    case DType::kInt8: return plain<std::int8_t>(op, sources);
    case DType::kInt16: return plain<std::int16_t>(op, sources);
    case DType::kInt32: return plain<std::int32_t>(op, sources);
    case DType::kInt64: return plain<std::int64_t>(op, sources);
    case DType::kUInt8: return plain<std::uint8_t>(op, sources);
    case DType::kUInt16: return plain<std::uint16_t>(op, sources);
    case DType::kUInt32: return plain<std::uint32_t>(op, sources);
    case DType::kUInt64: return plain<std::uint64_t>(op, sources);
    case DType::kFloat16: return sixteen_bit(op, sources, kHalf);
    case DType::kBFloat16: return sixteen_bit(op, sources, kBrain);
    case DType::kFloat32:
    case DType::kComplex64: return plain<float>(op, sources);
    default: return plain<double>(op, sources);
  }
}

bool same(DType dtype, const Bytes& left, const Bytes& right) {
  if (left.size() != right.size()) return false;
  if (left == right) return true;
  switch (dtype) {
    case DType::kFloat16: return alike<std::uint16_t>(left, right, [](std::uint16_t x) { return decoded(x, kHalf); });
    case DType::kBFloat16: return alike<std::uint16_t>(left, right, [](std::uint16_t x) { return decoded(x, kBrain); });
    case DType::kFloat32:
    case DType::kComplex64: return alike<float>(left, right, [](float x) { return x; });
    case DType::kFloat64:
    case DType::kComplex128: return alike<double>(left, right, [](double x) { return x; });
    default: return false;
  }
}

}  // namespace tests
}  // namespace colltensor
