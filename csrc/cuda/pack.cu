// launch_pack_cuda, launch_unpack_cuda: between one code per byte and the storage contract of packing.h.
#include "launch.cuh"
#include "loftq/check.h"
#include "loftq/cuda.h"

namespace loftq {
inline namespace LOFTQ_VERSION {
namespace {

constexpr int kPackThreads = 256;

// A thread makes one byte; neighbouring threads read neighbouring columns.
__global__ void __launch_bounds__(kPackThreads) _pack_kernel(const PackParams p) {
  const int run = static_cast<int>(kTile) * p.bits / 8;
  const int64_t bytes = row_bytes(p.k, p.bits);
  for (int64_t row = blockIdx.x; row < p.n; row += gridDim.x) {
    for (int64_t byte = threadIdx.x; byte < bytes; byte += blockDim.x) {
      unsigned packed = 0;
      for (int field = 0; field < 8 / p.bits; ++field) {
        const int64_t column = byte / run * kTile + byte % run + field * run;
        const unsigned code = column < p.k ? p.codes[row * p.k + column] : 0;
        packed |= (code & ((1u << p.bits) - 1)) << (field * p.bits);
      }
      p.packed[row * bytes + byte] = static_cast<uint8_t>(packed);
    }
  }
}

__global__ void __launch_bounds__(kPackThreads) _unpack_kernel(const UnpackParams p) {
  const int64_t bytes = row_bytes(p.k, p.bits);
  for (int64_t row = blockIdx.x; row < p.n; row += gridDim.x) {
    for (int64_t column = threadIdx.x; column < p.k; column += blockDim.x) {
      p.codes[row * p.k + column] = static_cast<uint8_t>(load_code(p.packed + row * bytes, column, p.bits));
    }
  }
}

}  // namespace

cudaError_t launch_pack_cuda(const PackParams& params, cudaStream_t stream) {
  if (check_params(params) != nullptr) return cudaErrorInvalidValue;
  if (params.n == 0 || params.k == 0) return cudaSuccess;
  return launch(_pack_kernel, params.n, kPackThreads, 0, stream, params);
}

cudaError_t launch_unpack_cuda(const UnpackParams& params, cudaStream_t stream) {
  if (check_params(params) != nullptr) return cudaErrorInvalidValue;
  if (params.n == 0 || params.k == 0) return cudaSuccess;
  return launch(_unpack_kernel, params.n, kPackThreads, 0, stream, params);
}

}  // namespace LOFTQ_VERSION
}  // namespace loftq
