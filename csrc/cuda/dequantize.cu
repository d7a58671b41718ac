// launch_dequantize_cuda: out[n, k] = codebook[code] * scale[n, k / g] + offset[n, k / g], rounded once.
#include "launch.cuh"
#include "loftq/check.h"
#include "loftq/cuda.h"
#include "scale_rule.cuh"

namespace loftq {
inline namespace LOFTQ_VERSION {
namespace {

constexpr int kDequantizeThreads = 256;

// A thread reads four bytes of codes; each of their 8/b fields is a run of four columns, which are stored together.
template <int kBits>
__global__ void __launch_bounds__(kDequantizeThreads)
    _dequantize_kernel(const __grid_constant__ DequantizeParams p, bool out_quads) {
  constexpr int kRun = kTile * kBits / 8;  // bytes per tile, and columns per field
  float* values = reinterpret_cast<float*>(dynamic_shared());
  for (int i = threadIdx.x; i < 1 << kBits; i += blockDim.x) values[i] = p.codebook[i];
  __syncthreads();

  const int64_t bytes = row_bytes(p.k, kBits);
  const int64_t groups = num_groups(p.k, p.group_size);
  const int64_t width = group_width(p.k, p.group_size);
  for (int64_t row = blockIdx.x; row < p.n; row += gridDim.x) {
    for (int64_t byte = threadIdx.x * kQuad; byte < bytes; byte += blockDim.x * kQuad) {
      const unsigned word = *reinterpret_cast<const unsigned*>(p.codes + row * bytes + byte);
      const int64_t first = byte / kRun * kTile + byte % kRun;
#pragma unroll
      for (int field = 0; field < 8 / kBits; ++field) {
        const int64_t column = first + field * kRun;
        if (column >= p.k) break;
        const int64_t group = row * groups + column / width;
        const float scale = load_element(p.scale, p.scale_dtype, group);
        const float offset = p.offset == nullptr ? 0.0f : load_element(p.offset, p.scale_dtype, group);
        float out[kQuad];
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          const int code = word >> (8 * i + field * kBits) & ((1 << kBits) - 1);
          out[i] = decode(values[code], scale, offset, p.offset != nullptr);
        }
        const int count = static_cast<int>(p.k - column < kQuad ? p.k - column : kQuad);
        store_quad(p.out, p.out_dtype, row * p.k + column, count, out_quads, out);
      }
    }
  }
}

template <int kBits>
cudaError_t launch_bits(const DequantizeParams& p, cudaStream_t stream) {
  const bool out_quads = quads_aligned(p.out, p.out_dtype, p.k);
  const int64_t warps = ceil_div(row_bytes(p.k, kBits), kWarpSize * kQuad);
  const int threads = kWarpSize * static_cast<int>(warps < 8 ? warps : kDequantizeThreads / kWarpSize);
  return launch(_dequantize_kernel<kBits>, p.n, threads, sizeof(float) << kBits, stream, p, out_quads);
}

bool valid(const DequantizeParams& p) {
  if (check_params(p) != nullptr) return false;
  return p.n == 0 || p.k == 0 || reinterpret_cast<uintptr_t>(p.codes) % kQuad == 0;
}

}  // namespace

cudaError_t launch_dequantize_cuda(const DequantizeParams& params, cudaStream_t stream) {
  if (!valid(params)) return cudaErrorInvalidValue;
  if (params.n == 0 || params.k == 0) return cudaSuccess;
  if (params.bits == 2) return launch_bits<2>(params, stream);
  if (params.bits == 4) return launch_bits<4>(params, stream);
  return launch_bits<8>(params, stream);
}

}  // namespace LOFTQ_VERSION
}  // namespace loftq
