// bfloat16 and float16 as 16-bit integers: exact widening, round-to-nearest-even narrowing.
// No branch and no table, so that a loop over these functions is vectorised on every target. The
// scalar instructions of F16C are not used: the same integer code gives the same bits everywhere.
#pragma once

#include <cstdint>
#include <cstring>

#define RACO_INLINE static inline __attribute__((always_inline))

namespace raco {

struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  std::uint16_t bits;
};

RACO_INLINE float as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

RACO_INLINE std::uint32_t as_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

RACO_INLINE void widen(float from, float& to) { to = from; }
RACO_INLINE void narrow(float from, float& to) { to = from; }
RACO_INLINE void widen(double from, double& to) { to = from; }
RACO_INLINE void narrow(double from, double& to) { to = from; }

RACO_INLINE void widen(bfloat16 from, float& to) {
  to = as_float(static_cast<std::uint32_t>(from.bits) << 16);
}

RACO_INLINE void narrow(float from, bfloat16& to) {
  const std::uint32_t u = as_bits(from);
  const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  to.bits = static_cast<std::uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Exponents differ by 112 between float16 and float32. A subnormal float16 is k * 2^-24: with the
// exponent of 2^-14 put in front, its bits are 2^-14 + k * 2^-24, from which 2^-14 is taken off.
RACO_INLINE void widen(float16 from, float& to) {
  const std::uint32_t sign = static_cast<std::uint32_t>(from.bits & 0x8000u) << 16;
  const std::uint32_t u = static_cast<std::uint32_t>(from.bits & 0x7fffu) << 13;
  const std::uint32_t special = u >= (31u << 23) ? 112u << 23 : 0u;
  const std::uint32_t tiny = as_bits(as_float(u + (113u << 23)) - as_float(113u << 23));
  to = as_float((u < (1u << 23) ? tiny : u + (112u << 23) + special) | sign);
}

// Below 2^-14 the result is a multiple of 2^-24, the spacing of float32 at 0.5: adding 0.5 rounds.
RACO_INLINE void narrow(float from, float16& to) {
  const std::uint32_t sign = (as_bits(from) >> 16) & 0x8000u;
  const std::uint32_t u = as_bits(from) & 0x7fffffffu;
  const std::uint32_t tiny = as_bits(as_float(u) + 0.5f) - as_bits(0.5f);
  const std::uint32_t rounded = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
  const std::uint32_t finite = u < (113u << 23) ? tiny : (rounded < 0x7c00u ? rounded : 0x7c00u);
  to.bits = static_cast<std::uint16_t>((u > 0x7f800000u ? 0x7e00u : finite) | sign);
}

}  // namespace raco
