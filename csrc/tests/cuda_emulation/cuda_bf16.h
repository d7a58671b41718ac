// The conversions of <cuda_bf16.h> that the kernels use.
#pragma once

#include <cstring>

struct __nv_bfloat16 {
  unsigned short bits;
};

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }

inline float __bfloat162float(__nv_bfloat16 value) {
  const unsigned bits = static_cast<unsigned>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return {0x7fff};
  const unsigned rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  return {static_cast<unsigned short>(rounded >> 16)};
}
