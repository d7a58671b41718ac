// How a kernel is started, and what kernels need to know of their block.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "loftq/config.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// A launch with more shared memory than this must set an attribute of the kernel first.
constexpr size_t kDefaultSharedBytes = 48 << 10;

inline int device_attribute(cudaDeviceAttr attribute) {  // of the current device; 0 if there is no device
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

// Shared memory that one block may have at most.
inline size_t max_shared_bytes() {
  return static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// Does kernel<<<grid, block, shared_bytes, stream>>>(arguments...) without the syntax that only nvcc reads.
// The grid may be smaller than requested: kernels stride by gridDim.x.
template <typename... Expected, typename... Actual>
cudaError_t launch(void (*kernel)(Expected...), int64_t grid, int block, size_t shared_bytes, cudaStream_t stream,
                   Actual&&... arguments) {
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  const int max_grid = device_attribute(cudaDevAttrMaxGridDimX);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3{static_cast<unsigned>(grid < max_grid ? grid : max_grid), 1, 1};
  config.blockDim = dim3{static_cast<unsigned>(block), 1, 1};
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Actual>(arguments)...);
}

// The launch's dynamic shared memory. Kernels use no other kind, so that tests can fill and bound it.
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

__device__ inline int lane_index() { return threadIdx.x % kWarpSize; }
__device__ inline int warp_index() { return threadIdx.x / kWarpSize; }
__device__ inline int warp_count() { return blockDim.x / kWarpSize; }

}  // namespace LOFTQ_VERSION
}  // namespace loftq
