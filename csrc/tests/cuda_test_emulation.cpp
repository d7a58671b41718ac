// The emulation itself: that a right kernel runs right, and that each kind of mistake is seen.
#include <cuda_runtime.h>

#include "../cuda/reduce.cuh"
#include "harness.h"

namespace {

using namespace loftq;

__global__ void _reverse_kernel(const int* in, int* out, bool synchronized) {
  int* shared = reinterpret_cast<int*>(dynamic_shared());
  shared[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  if (synchronized) __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

__global__ void _sum_kernel(const float* in, float* out) {
  float* scratch = reinterpret_cast<float*>(dynamic_shared());
  const float sum = reduce_block(in[threadIdx.x], scratch, Sum());
  const unsigned most = __reduce_max_sync(kFullWarp, threadIdx.x), least = __reduce_min_sync(kFullWarp, threadIdx.x);
  if (threadIdx.x % 32 == 0) out[1 + threadIdx.x / 32] = static_cast<float>(most - least);
  const int any = __syncthreads_or(threadIdx.x == 77);
  const int none = __syncthreads_or(false);
  if (threadIdx.x == 0) out[0] = any && !none ? sum : -1.0f;
}

__global__ void _divergent_kernel(int limit) {
  if (static_cast<int>(threadIdx.x) < limit) __syncthreads();
}

__global__ void _half_warp_kernel(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(kFullWarp, 1, 1);
}

__global__ void _beyond_kernel() { dynamic_shared()[64 + threadIdx.x] = 1; }

bool reverses(bool synchronized, emulation::Order order) {
  const int count = 256, blocks = 2;
  Guarded<int> in(count * blocks), out(count * blocks);
  for (int i = 0; i < count * blocks; ++i) in[i] = i;
  emulation::device.order = order;
  if (launch(_reverse_kernel, blocks, count, count * sizeof(int), nullptr, in.data(), out.data(), synchronized)) {
    return false;
  }
  for (int i = 0; i < count * blocks; ++i) {
    if (out[i] != i / count * count + count - 1 - i % count) return false;
  }
  return true;
}

void test_right_kernels() {
  Guarded<float> in(128), out(5);
  for (int i = 0; i < 128; ++i) in[i] = static_cast<float>(i);
  for (const emulation::Order order : kOrders) {
    CHECK(reverses(true, order), "order %d", static_cast<int>(order));
    CHECK(launch(_sum_kernel, 1, 128, 64, nullptr, in.data(), out.data()) == cudaSuccess, "sum");
    CHECK(out[0] == 128 * 127 / 2 && out[1] == 31 && out[4] == 31, "%g %g %g", out[0], out[1], out[4]);
  }
}

void test_mistakes_are_seen() {
  int wrong = 0;
  for (const emulation::Order order : kOrders) wrong += !reverses(false, order);
  CHECK(wrong > 0, "a missing barrier went unnoticed");
  CHECK(launch(_divergent_kernel, 1, 64, 0, nullptr, 40) == cudaErrorLaunchFailure, "a barrier some threads miss");
  CHECK(launch(_divergent_kernel, 1, 64, 0, nullptr, 64) == cudaSuccess, "and one they do not");
  Guarded<int> out(64);
  CHECK(launch(_half_warp_kernel, 1, 64, 0, nullptr, out.data()) == cudaErrorLaunchFailure,
        "an exchange of half a warp");
  CHECK(launch(_beyond_kernel, 1, 32, 64, nullptr) == cudaErrorLaunchFailure, "a write beyond shared memory");
  CHECK(launch(_beyond_kernel, 1, 32, 96, nullptr) == cudaSuccess, "and one within");
  CHECK(launch(_beyond_kernel, 1, 32, 600 << 10, nullptr) == cudaErrorLaunchFailure, "too much shared memory");
  CHECK(launch(_beyond_kernel, 1, 33, 96, nullptr) == cudaErrorLaunchFailure, "a block of 33 threads");
  CHECK(launch(_beyond_kernel, 1, 32, 96, nullptr) == cudaSuccess, "the failures leave no trace");
}

}  // namespace

int main() {
  test_right_kernels();
  test_mistakes_are_seen();
  return report();
}
