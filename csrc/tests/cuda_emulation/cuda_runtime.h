// Stands in for the CUDA runtime when kernels are compiled as C++ for the CPU; see emulation.h.
#pragma once

#include <math.h>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulation.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

using dim3 = emulation::Index3;

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

// Errors, devices, launches.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMaxGridDimX,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount,
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const emulation::Device& device = emulation::device;
  *value = attribute == cudaDevAttrMaxGridDimX                    ? device.max_grid
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? device.max_shared_bytes
                                                                  : device.multiprocessors;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... actual) {
  const std::tuple<std::decay_t<Expected>...> arguments(std::forward<Actual>(actual)...);
  const bool good = emulation::run_grid(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                                        [&] { std::apply(kernel, arguments); });
  return good ? cudaSuccess : cudaErrorLaunchFailure;
}

// Synchronisation and warp exchanges.
#define __syncthreads() static_cast<void>(::emulation::block_barrier(__LINE__, 0))
#define __syncthreads_or(vote) ::emulation::block_barrier(__LINE__, (vote) != 0)

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::warp_exchange(mask, 0); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "one word a lane");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  const int lane = emulation::linear_thread(*emulation::block.current) % emulation::kWarp;
  word = emulation::warp_exchange(mask, word)[lane ^ lane_mask];
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  const uint64_t* words = emulation::warp_exchange(mask, value);
  return static_cast<unsigned>(*std::max_element(words, words + emulation::kWarp));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  const uint64_t* words = emulation::warp_exchange(mask, value);
  return static_cast<unsigned>(*std::min_element(words, words + emulation::kWarp));
}

// Arithmetic: the round-to-nearest intrinsics are what C++ does without contraction (-ffp-contract=off).
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline float __uint_as_float(unsigned a) {
  float result;
  std::memcpy(&result, &a, sizeof(result));
  return result;
}
inline unsigned __float_as_uint(float a) {
  unsigned result;
  std::memcpy(&result, &a, sizeof(result));
  return result;
}
