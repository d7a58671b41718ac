// The codebook travels by value in the kernel's parameters, and is searched from shared memory.
#pragma once

#include "launch.cuh"
#include "loftq/types.h"

namespace loftq {

template <int kBits>
struct Codebook {
  static constexpr int kSize = 1 << kBits;
  float value[kSize];     // ascending
  float midpoint[kSize];  // between an entry and the next; the last is unused
  bool integer;           // value[i] == i - 2^(b-1): the nearest entry needs no search

  static Codebook from_host(const float* codebook) {
    Codebook book;
    book.integer = true;
    for (int i = 0; i < kSize; ++i) {
      book.value[i] = codebook[i];
      book.midpoint[i] = i + 1 < kSize ? (codebook[i] + codebook[i + 1]) / 2 : 0.0f;
      book.integer &= codebook[i] == static_cast<float>(i - kSize / 2);
    }
    return book;
  }

  // To shared memory; __syncthreads() is the caller's. Reads of entries stay free of bank conflicts up to 32 entries.
  __device__ void copy_to(float* values, float* midpoints) const {
    for (int i = threadIdx.x; i < kSize; i += blockDim.x) {
      values[i] = value[i];
      if (midpoints != nullptr) midpoints[i] = midpoint[i];
    }
  }

  // The number of midpoints strictly below x: the nearest entry, the lower one on a tie; 0 for NaN.
  __device__ int nearest(const float* midpoints, float x) const {
    if (integer) {
      float entry = rintf(x);
      if (entry - x == 0.5f) entry -= 1.0f;  // a tie that went to the upper neighbour; the difference is exact
      entry = fminf(fmaxf(entry, -0.5f * kSize), 0.5f * kSize - 1.0f);
      return static_cast<int>(entry) + kSize / 2;
    }
    int code = 0;
#pragma unroll
    for (int step = kSize / 2; step > 0; step /= 2) {
      if (midpoints[code + step - 1] < x) code += step;
    }
    return code;
  }
};

}  // namespace loftq
