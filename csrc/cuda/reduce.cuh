// Reductions in a fixed order and without atomics: the same input gives the same bits, whichever thread runs first.
#pragma once

#include "launch.cuh"

namespace loftq {
inline namespace LOFTQ_VERSION {

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// Reduces over the warp as a tree: lanes 16 apart first, then 8, 4, 2, 1. All lanes get the result.
template <typename T, typename Op>
__device__ T reduce_warp(T value, Op op) {
#pragma unroll
  for (int other = kWarpSize / 2; other > 0; other /= 2) {
    value = op(value, __shfl_xor_sync(kFullWarp, value, other));
  }
  return value;
}

// Reduces over the block; all threads get the result. scratch: [warp_count()] in shared memory, free again on return.
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

}  // namespace LOFTQ_VERSION
}  // namespace loftq
