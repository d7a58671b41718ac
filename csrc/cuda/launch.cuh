// Starting a kernel, and what kernels use of their block.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace loftq {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int64_t kMaxGridX = 0x7fffffff;

// More than this many bytes of shared memory must be asked for with an attribute.
constexpr size_t kDefaultSharedBytes = 48 << 10;

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...) without the syntax only nvcc reads.
template <typename... Expected, typename... Actual>
cudaError_t launch(void (*kernel)(Expected...), int64_t grid, int block, size_t shared_bytes, cudaStream_t stream,
                   Actual&&... arguments) {
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3{static_cast<unsigned>(grid < kMaxGridX ? grid : kMaxGridX), 1, 1};
  config.blockDim = dim3{static_cast<unsigned>(block), 1, 1};
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Actual>(arguments)...);
}

// Shared memory one block of the current device may have at most; 0 when there is no device.
inline size_t max_shared_bytes() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  return static_cast<size_t>(bytes);
}

// The launch's dynamic shared memory. Kernels use no other kind: tests can then fill and bound it.
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

__device__ inline int lane_index() { return threadIdx.x % kWarpSize; }
__device__ inline int warp_index() { return threadIdx.x / kWarpSize; }
__device__ inline int warp_count() { return blockDim.x / kWarpSize; }

}  // namespace loftq
