// Reading and writing float32, float16 and bfloat16 elements, one or four at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.cuh"
#include "loftq/types.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

constexpr int kQuad = 4;  // neighbouring columns stored at once: 16 bytes of float32

__device__ inline float half_bits_to_float(DType dtype, unsigned short bits) {
  return dtype == DType::kFloat16 ? __half2float(__ushort_as_half(bits)) : __bfloat162float(__ushort_as_bfloat16(bits));
}

__device__ inline unsigned short float_to_half_bits(DType dtype, float value) {
  return dtype == DType::kFloat16 ? __half_as_ushort(__float2half_rn(value))
                                  : __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

__device__ inline float round_to(DType dtype, float value) {
  return dtype == DType::kFloat32 ? value : half_bits_to_float(dtype, float_to_half_bits(dtype, value));
}

__device__ inline float load_element(const void* base, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(base)[index];
  return half_bits_to_float(dtype, static_cast<const unsigned short*>(base)[index]);
}

__device__ inline void store_element(void* base, DType dtype, int64_t index, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(base)[index] = value;
  } else {
    static_cast<unsigned short*>(base)[index] = float_to_half_bits(dtype, value);
  }
}

// Whether rows of a matrix can be written four elements at once: pointer and row stride divide by four elements.
inline bool quads_aligned(const void* base, DType dtype, int64_t stride) {
  return stride % kQuad == 0 && reinterpret_cast<uintptr_t>(base) % (kQuad * size_of(dtype)) == 0;
}

// Stores the first `count` of in[0..3] to base[index..index+3].
__device__ inline void store_quad(void* base, DType dtype, int64_t index, int count, bool aligned,
                                  const float (&in)[kQuad]) {
  if (aligned && count >= kQuad) {
    if (dtype == DType::kFloat32) {
      *reinterpret_cast<float4*>(static_cast<float*>(base) + index) = make_float4(in[0], in[1], in[2], in[3]);
    } else {
      const unsigned low = float_to_half_bits(dtype, in[0]) | unsigned{float_to_half_bits(dtype, in[1])} << 16;
      const unsigned high = float_to_half_bits(dtype, in[2]) | unsigned{float_to_half_bits(dtype, in[3])} << 16;
      *reinterpret_cast<uint2*>(static_cast<unsigned short*>(base) + index) = make_uint2(low, high);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    if (i < count) store_element(base, dtype, index + i, in[i]);
  }
}

}  // namespace LOFTQ_VERSION
}  // namespace loftq
