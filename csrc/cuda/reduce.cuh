// Reductions in a fixed order: the same input gives the same bits, whatever ran first. No atomics.
#pragma once

#include "launch.cuh"

namespace loftq {

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ double operator()(double a, double b) const { return fmax(a, b); }
};

struct Min {
  __device__ float operator()(float a, float b) const { return fminf(a, b); }
};

// Over `lanes` neighbouring lanes, a power of two. Every lane of the warp must call it; all get their team's result.
template <typename T, typename Op>
__device__ T reduce_lanes(T value, int lanes, Op op) {
  for (int other = lanes / 2; other > 0; other /= 2) value = op(value, __shfl_xor_sync(kFullWarp, value, other));
  return value;
}

template <typename T, typename Op>
__device__ T reduce_warp(T value, Op op) {
#pragma unroll
  for (int other = kWarpSize / 2; other > 0; other /= 2) {
    value = op(value, __shfl_xor_sync(kFullWarp, value, other));
  }
  return value;
}

// Over the block; all threads get the result. scratch: [warp_count()] in shared memory, free again on return.
template <typename T, typename Op>
__device__ T reduce_block(T value, T* scratch, Op op) {
  value = reduce_warp(value, op);
  if (lane_index() == 0) scratch[warp_index()] = value;
  __syncthreads();
  value = scratch[0];
  for (int warp = 1; warp < warp_count(); ++warp) value = op(value, scratch[warp]);
  __syncthreads();
  return value;
}

}  // namespace loftq
