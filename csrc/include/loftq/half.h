// fp16 and bf16 as their bits, with round-to-nearest-even conversions that any compiler, host or device, runs alike.
#pragma once

#include <cstring>

#include "loftq/types.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

inline LOFTQ_HD uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline LOFTQ_HD float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline LOFTQ_HD uint16_t float_to_half(float value) {
  const uint32_t sign = bits_of(value) >> 16 & 0x8000u;
  const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 is the first to round to Inf
  if (magnitude < 0x38800000u) {
    // Below 2^-14 a half counts multiples of 2^-24, and so do the mantissa bits of 0.5 + |value|.
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));  // exponent bias 127 -> 15
}

inline LOFTQ_HD float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | ((magnitude << 13) + 0x70000000u));  // Inf, NaN
  if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));
  return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
}

inline LOFTQ_HD uint16_t float_to_bfloat(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;  // NaN
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline LOFTQ_HD float bfloat_to_float(uint16_t bfloat) { return float_of(static_cast<uint32_t>(bfloat) << 16); }

}  // namespace LOFTQ_VERSION
}  // namespace loftq
