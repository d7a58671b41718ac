// What the quantize kernels share. Lane l of a warp owns the columns that are l modulo 32: loads and stores of a warp
// are contiguous, a lane's own sum is one of the 32 partial sums of quantize.h, and a warp's tree of exchanges is how
// those are folded. A warp works on spans of 128 or 256 columns at a time, and all weights of a span are in flight
// together: at least 16 bytes per lane.
#pragma once

#include "codebook.cuh"
#include "reduce.cuh"
#include "scale_rule.cuh"

namespace loftq {
inline namespace LOFTQ_VERSION {

constexpr int kQuantizeThreads = 256;
constexpr int kQuantizeWarps = kQuantizeThreads / kWarpSize;

// The columns column + 32 i + lane of one row, for i = 0 .. kSpan-1.
template <int kSpan>
struct Span {
  static constexpr int kColumns = kSpan * kWarpSize;
  int64_t column;       // the first
  int left;             // columns from the first to the end of the row, at most kColumns
  float weight[kSpan];  // 0 beyond the row
  float target[kSpan];  // what is quantized: weight, or weight - low_rank

  __device__ bool exists(int i) const { return i * kWarpSize + lane_index() < left; }

  // All loads come before the first conversion, so that there is one wait for memory instead of kSpan.
  __device__ void load_dense(const void* base, DType dtype, int64_t at, float (&out)[kSpan]) const {
    if (dtype == DType::kFloat32) {
      const float* from = static_cast<const float*>(base) + at;
#pragma unroll
      for (int i = 0; i < kSpan; ++i) out[i] = exists(i) ? from[i * kWarpSize] : 0.0f;
      return;
    }
    const unsigned short* from = static_cast<const unsigned short*>(base) + at;
    unsigned short bits[kSpan];
#pragma unroll
    for (int i = 0; i < kSpan; ++i) bits[i] = exists(i) ? from[i * kWarpSize] : 0;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) out[i] = half_bits_to_float(dtype, bits[i]);
  }

  __device__ void load(const QuantizeParams& p, int64_t row, int64_t first) {
    column = first;
    left = static_cast<int>(p.k - first < kColumns ? p.k - first : kColumns);
    load_dense(p.weight, p.weight_dtype, row * p.weight_stride + first + lane_index(), weight);
    if (p.low_rank != nullptr) {
      load_dense(p.low_rank, p.residual_dtype, row * p.k + first + lane_index(), target);
#pragma unroll
      for (int i = 0; i < kSpan; ++i) target[i] = __fsub_rn(weight[i], target[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kSpan; ++i) target[i] = weight[i];
    }
  }
};

__device__ inline double squared(double x) { return __dmul_rn(x, x); }

// What scale search minimises, for one weight.
template <int kBits>
__device__ double squared_error(const Codebook<kBits>& book, float target, const GroupScale& scale, bool affine) {
  const int code = book.nearest(scale.scaled(target));
  const float decoded = decode(book.value[code], scale.scale, scale.offset, affine);
  return squared(static_cast<double>(__fsub_rn(target, decoded)));
}

__device__ inline void store_scale(const QuantizeParams& p, int64_t row, int64_t group, int64_t groups,
                                   const GroupScale& scale) {
  store_element(p.scale, p.scale_dtype, row * groups + group, scale.scale);
  if (p.offset != nullptr) store_element(p.offset, p.scale_dtype, row * groups + group, scale.offset);
}

// Packs the codes of two neighbouring tiles, code[i] of column 32 i + lane, and stores those of the `tiles` that exist.
// With 4 and 8 bits all fields of a byte lie in the same lane; with 2 bits half of them lie 16 lanes further.
template <int kBits>
__device__ void store_codes(const int (&code)[4], int tiles, uint8_t* bytes) {
  const int lane = lane_index();
  if constexpr (kBits == 8) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i / 2 < tiles) bytes[i * kWarpSize + lane] = static_cast<uint8_t>(code[i]);
    }
  } else if constexpr (kBits == 4) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int byte = code[2 * tile] | code[2 * tile + 1] << 4;
      if (tile < tiles) bytes[tile * kWarpSize + lane] = static_cast<uint8_t>(byte);
    }
  } else {
    const int upper = lane / 16;  // lanes 0-15 complete the bytes of the first tile, lanes 16-31 those of the second
    const int first = (code[0] | code[1] << 4) << (2 * upper), second = (code[2] | code[3] << 4) << (2 * upper);
    const int byte = (upper ? second : first) | __shfl_xor_sync(kFullWarp, upper ? first : second, 16);
    if (upper < tiles) bytes[lane] = static_cast<uint8_t>(byte);
  }
}

// Stores the codes of a span. Its residual is stored if wanted, and left unrounded in span.weight (0 beyond the row).
template <int kBits, int kSpan, int kGroups>
__device__ void finish_span(const QuantizeParams& p, const Codebook<kBits>& book, int64_t row, Span<kSpan>& span,
                            const GroupScale (&scales)[kGroups]) {
  uint8_t* bytes = p.codes + row * row_bytes(p.k, kBits) + span.column * kBits / 8;
  const int tiles = (span.left + static_cast<int>(kTile) - 1) / static_cast<int>(kTile);
  const int64_t dense_at = row * p.k + span.column + lane_index();
#pragma unroll
  for (int first = 0; first < kSpan; first += 4) {
    int code[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = first + j;
      const GroupScale& scale = scales[i * kGroups / kSpan];
      code[j] = span.exists(i) ? book.nearest(scale.scaled(span.target[i])) : 0;
      if (!span.exists(i)) continue;
      span.weight[i] = __fsub_rn(span.weight[i], decode(book.value[code[j]], scale.scale, scale.offset, is_affine(p)));
      if (p.residual != nullptr) store_element(p.residual, p.residual_dtype, dense_at + i * kWarpSize, span.weight[i]);
    }
    store_codes<kBits>(code, tiles - first / 2, bytes + first * (kWarpSize * kBits / 8));
  }
}

// The squared norm of a row's residual: every partial sum goes along the whole row, and so the first warp adds up what
// all warps of the block have left in shared memory.
template <int kSpan>
struct RowNorm {
  float* buffer;  // [kQuantizeWarps][kSpan][32]
  double sum = 0.0;

  static constexpr size_t kBytes = sizeof(float) * kQuantizeThreads * kSpan;

  // Must be called by the whole block: each warp has a span of residuals; the first warp's starts at `column`.
  __device__ void add(const Span<kSpan>& span, bool active, int64_t column, int64_t k) {
    float* own = buffer + warp_index() * Span<kSpan>::kColumns + lane_index();
#pragma unroll
    for (int i = 0; i < kSpan; ++i) own[i * kWarpSize] = active ? span.weight[i] : 0.0f;
    __syncthreads();
    if (warp_index() == 0) {
      const int64_t left = k - column, all = static_cast<int64_t>(warp_count()) * Span<kSpan>::kColumns;
      const int end = static_cast<int>(left < all ? left : all);
#pragma unroll 4
      for (int i = lane_index(); i < end; i += kWarpSize) {
        sum = __dadd_rn(sum, squared(static_cast<double>(buffer[i])));
      }
    }
    __syncthreads();
  }

  __device__ void store(double* out) {
    if (warp_index() != 0) return;
    sum = reduce_warp(sum, Sum());
    if (lane_index() == 0) *out = sum;
    sum = 0.0;
  }
};

}  // namespace LOFTQ_VERSION
}  // namespace loftq
