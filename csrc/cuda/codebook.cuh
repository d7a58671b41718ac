// The codebook in shared memory, where its entries are searched and read.
#pragma once

#include "launch.cuh"
#include "loftq/types.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

// Reads of entries stay free of bank conflicts up to 32 entries.
template <int kBits>
struct CodebookMemory {
  float value[1 << kBits];     // ascending
  float midpoint[1 << kBits];  // between an entry and the next; the last is unused
};

template <int kBits>
struct Codebook {
  static constexpr int kSize = 1 << kBits;
  const float* value;
  const float* midpoint;
  bool integer;  // value[i] == i - 2^(b-1): the nearest entry needs no search

  // Must be called by the whole block: its barrier publishes the memory.
  __device__ static Codebook load(const float* entries, CodebookMemory<kBits>& memory) {
    int other = 0;
    for (int i = threadIdx.x; i < kSize; i += blockDim.x) {
      const float entry = entries[i];
      memory.value[i] = entry;
      memory.midpoint[i] = i + 1 < kSize ? __fadd_rn(entry, entries[i + 1]) / 2 : 0.0f;
      other |= entry != static_cast<float>(i - kSize / 2);
    }
    return {memory.value, memory.midpoint, !__syncthreads_or(other)};
  }

  __device__ float last() const { return value[kSize - 1]; }

  // The number of midpoints strictly below x: the nearest entry, the lower one on a tie; 0 for NaN.
  __device__ int nearest(float x) const {
    if (integer) {
      float entry = rintf(x);
      if (entry - x == 0.5f) entry -= 1.0f;  // a tie that went to the upper neighbour; the difference is exact
      entry = fminf(fmaxf(entry, -0.5f * kSize), 0.5f * kSize - 1.0f);
      return static_cast<int>(entry) + kSize / 2;
    }
    int code = 0;
#pragma unroll
    for (int step = kSize / 2; step > 0; step /= 2) {
      if (midpoint[code + step - 1] < x) code += step;
    }
    return code;
  }
};

}  // namespace LOFTQ_VERSION
}  // namespace loftq
