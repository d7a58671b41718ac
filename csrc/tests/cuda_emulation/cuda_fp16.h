// The conversions of <cuda_fp16.h> that the kernels use, by the compiler's own half type.
#pragma once

#include <cstring>

struct __half {
  unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half half) { return half.bits; }

inline float __half2float(__half half) {
  _Float16 value;
  std::memcpy(&value, &half.bits, sizeof(value));
  return static_cast<float>(value);
}

inline __half __float2half_rn(float value) {
  const _Float16 rounded = static_cast<_Float16>(value);
  __half half;
  std::memcpy(&half.bits, &rounded, sizeof(rounded));
  return half;
}
