// launch_quantize_cuda: which kernel serves which group size, and with how many threads.
#include "loftq/check.h"
#include "loftq/cuda.h"
#include "quantize_group.cuh"
#include "quantize_row.cuh"

namespace loftq {
inline namespace LOFTQ_VERSION {
namespace {

// Enough warps for the row, up to eight: short rows leave room for more rows on a multiprocessor.
int block_threads(int64_t columns, int64_t columns_a_warp) {
  const int64_t warps = ceil_div(columns, columns_a_warp);
  return kWarpSize * static_cast<int>(warps < kQuantizeWarps ? warps : kQuantizeWarps);
}

template <int kBits, int kWidth>
cudaError_t launch_groups(const QuantizeParams& p, cudaStream_t stream) {
  constexpr int kSpan = kWidth > 4 ? kWidth : 4;
  const size_t shared = sizeof(CodebookMemory<kBits>) + RowNorm<kSpan>::kBytes;
  const int threads = block_threads(p.k, Span<kSpan>::kColumns);
  if (p.scale_search || p.scale_rule == ScaleRule::kMeanStd) {
    return launch(_quantize_group_kernel<kBits, kWidth, true>, p.n, threads, shared, stream, p);
  }
  return launch(_quantize_group_kernel<kBits, kWidth, false>, p.n, threads, shared, stream, p);
}

template <int kBits>
cudaError_t launch_bits(const QuantizeParams& p, cudaStream_t stream) {
  switch (p.group_size) {
    case 32:
      return launch_groups<kBits, 1>(p, stream);
    case 64:
      return launch_groups<kBits, 2>(p, stream);
    case 128:
      return launch_groups<kBits, 4>(p, stream);
    case 256:
      return launch_groups<kBits, 8>(p, stream);
    default: {
      const size_t shared = sizeof(RowScratch) + sizeof(CodebookMemory<kBits>) + RowNorm<kRowSpan>::kBytes;
      const int threads = block_threads(p.k, Span<kRowSpan>::kColumns);
      return launch(_quantize_row_kernel<kBits>, p.n, threads, shared, stream, p);
    }
  }
}

// The residual of rows without columns: of norm 0.
cudaError_t clear_norms(const QuantizeParams& p, cudaStream_t stream) {
  if (p.residual_norm2 == nullptr) return cudaSuccess;
  return cudaMemsetAsync(p.residual_norm2, 0, p.n * sizeof(double), stream);
}

}  // namespace

cudaError_t launch_quantize_cuda(const QuantizeParams& params, cudaStream_t stream) {
  if (check_params(params) != nullptr) return cudaErrorInvalidValue;
  if (params.n == 0) return cudaSuccess;
  if (params.k == 0) return clear_norms(params, stream);
  if (params.bits == 2) return launch_bits<2>(params, stream);
  if (params.bits == 4) return launch_bits<4>(params, stream);
  return launch_bits<8>(params, stream);
}

}  // namespace LOFTQ_VERSION
}  // namespace loftq
