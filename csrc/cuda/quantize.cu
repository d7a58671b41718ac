// launch_quantize_cuda: which kernel serves which group size, and with how many threads.
#include "loftq/cuda.h"
#include "quantize_group.cuh"
#include "quantize_row.cuh"

namespace loftq {
namespace {

bool valid(const QuantizeParams& p) {
  if (p.n < 0 || p.k < 0 || (p.bits != 2 && p.bits != 4 && p.bits != 8)) return false;
  if (p.group_size != 32 && p.group_size != 64 && p.group_size != 128 && p.group_size != 256 && p.group_size != -1) {
    return false;
  }
  if (p.n == 0 || p.k == 0) return true;
  if (p.weight == nullptr || p.codebook == nullptr || p.codes == nullptr || p.scale == nullptr) return false;
  if ((p.offset != nullptr) != (p.scale_rule == ScaleRule::kMinMax)) return false;
  return reinterpret_cast<uintptr_t>(p.codes) % kQuad == 0;  // codes are stored four bytes at once
}

// Enough warps for the row, up to eight: short rows leave room for more rows on a multiprocessor.
int block_threads(int64_t columns, int64_t columns_a_warp) {
  const int64_t warps = ceil_div(columns, columns_a_warp);
  return kWarpSize * static_cast<int>(warps < kQuantizeThreads / kWarpSize ? warps : kQuantizeThreads / kWarpSize);
}

template <int kBits>
cudaError_t launch_bits(const QuantizeParams& p, cudaStream_t stream) {
  QuantizeArgs<kBits> args;
  args.p = p;
  args.book = Codebook<kBits>::from_host(p.codebook);
  args.weight_quads = quads_aligned(p.weight, p.weight_dtype, p.weight_stride);
  args.dense_quads = quads_aligned(p.low_rank, DType::kFloat32, p.k) && quads_aligned(p.residual, DType::kFloat32, p.k);
  const size_t shared = sizeof(QuantizeShared<kBits>);
  if (p.group_size < 0) {
    return launch(_quantize_row_kernel<kBits>, p.n, block_threads(p.k, kWarpColumns), shared, stream, args);
  }
  const bool wide = p.group_size == 2 * kWarpColumns;
  auto* kernel = wide ? (p.scale_search ? _quantize_group_kernel<kBits, 2, true> : _quantize_group_kernel<kBits, 2, false>)
                      : (p.scale_search ? _quantize_group_kernel<kBits, 1, true> : _quantize_group_kernel<kBits, 1, false>);
  return launch(kernel, p.n, block_threads(p.k, (wide ? 2 : 1) * kWarpColumns), shared, stream, args);
}

}  // namespace

cudaError_t launch_quantize_cuda(const QuantizeParams& params, cudaStream_t stream) {
  if (!valid(params)) return cudaErrorInvalidValue;
  if (params.n == 0 || params.k == 0) return cudaSuccess;
  if (params.bits == 2) return launch_bits<2>(params, stream);
  if (params.bits == 4) return launch_bits<4>(params, stream);
  return launch_bits<8>(params, stream);
}

}  // namespace loftq
