// What the two quantize kernels (one for short groups, one for whole rows) share: a lane owns quads of four
// neighbouring columns, loads them once, and after the group's scale is known turns them into codes and residual.
#pragma once

#include "codebook.cuh"
#include "reduce.cuh"
#include "scale_rule.cuh"

namespace loftq {

constexpr int kQuantizeThreads = 256;
constexpr int64_t kWarpColumns = kWarpSize * kQuad;  // two tiles of the storage contract

template <int kBits>
struct QuantizeArgs {
  QuantizeParams p;
  Codebook<kBits> book;
  bool weight_quads;  // aligned for four elements at once
  bool dense_quads;   // the same for low_rank and residual
};

template <int kBits>
struct QuantizeShared {
  double wide[kQuantizeThreads / kWarpSize];
  float narrow[kQuantizeThreads / kWarpSize];
  float value[1 << kBits];
  float midpoint[1 << kBits];
};

struct WeightQuad {
  float weight[kQuad];
  float target[kQuad];  // what is quantized: weight, or weight - low_rank
  int count;            // columns that exist; <= 0 in the padding
};

template <int kBits>
__device__ void load_weight_quad(const QuantizeArgs<kBits>& args, int64_t row, int64_t column, WeightQuad& quad) {
  const QuantizeParams& p = args.p;
  const int64_t left = p.k - column;
  quad.count = static_cast<int>(left < kQuad ? left : kQuad);
  load_quad(p.weight, p.weight_dtype, row * p.weight_stride + column, quad.count, args.weight_quads, quad.weight);
  if (p.low_rank == nullptr) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) quad.target[i] = quad.weight[i];
    return;
  }
  float low_rank[kQuad];
  load_quad(p.low_rank, DType::kFloat32, row * p.k + column, quad.count, args.dense_quads, low_rank);
#pragma unroll
  for (int i = 0; i < kQuad; ++i) quad.target[i] = __fsub_rn(quad.weight[i], low_rank[i]);
}

__device__ inline void include_range(const WeightQuad& quad, GroupRange& range) {
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    if (i < quad.count) range.include(quad.target[i]);
  }
}

__device__ inline double sum_of(const WeightQuad& quad) {
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) sum += i < quad.count ? static_cast<double>(quad.target[i]) : 0.0;
  return sum;
}

__device__ inline double squared_deviation(const WeightQuad& quad, double mean) {
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const double difference = static_cast<double>(quad.target[i]) - mean;
    if (i < quad.count) sum = __dadd_rn(sum, __dmul_rn(difference, difference));
  }
  return sum;
}

// What scale search minimises. Summed in float64: the order of the sum then never decides between two scales.
template <int kBits>
__device__ double squared_error(const QuantizeArgs<kBits>& args, const QuantizeShared<kBits>& shared,
                                const WeightQuad& quad, const GroupScale& scale, bool affine) {
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const int code = args.book.nearest(shared.midpoint, scale.scaled(quad.target[i]));
    const float decoded = decode(shared.value[code], scale.scale, scale.offset, affine);
    const double error = static_cast<double>(__fsub_rn(quad.target[i], decoded));
    if (i < quad.count) sum = __dadd_rn(sum, __dmul_rn(error, error));
  }
  return sum;
}

__device__ inline void store_scale(const QuantizeParams& p, int64_t row, int64_t group, int64_t groups,
                                   const GroupScale& scale) {
  store_element(p.scale, p.scale_dtype, row * groups + group, scale.scale);
  if (p.offset != nullptr) store_element(p.offset, p.scale_dtype, row * groups + group, scale.offset);
}

// Codes of one quad, packed with its neighbours' and stored; its residual stored. Returns the residual's squared norm.
// A tile is 16 lanes of a warp. The P = 8/b fields of a byte lie in lanes 2b apart, so log2(P) exchanges with a
// bitwise or complete four bytes at once. Every lane of the warp must come here.
template <int kBits>
__device__ double store_quad_codes(const QuantizeArgs<kBits>& args, const QuantizeShared<kBits>& shared, int64_t row,
                                   int64_t column, const WeightQuad& quad, const GroupScale& scale) {
  constexpr int kTileLanes = kTile / kQuad;
  constexpr int kFieldLanes = 2 * kBits;  // lanes whose codes go to the same field
  const QuantizeParams& p = args.p;
  const bool affine = p.scale_rule == ScaleRule::kMinMax;
  const int lane = static_cast<int>(column % kTile) / kQuad;

  unsigned word = 0;
  float residual[kQuad];
  double norm2 = 0.0;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const int code = i < quad.count ? args.book.nearest(shared.midpoint, scale.scaled(quad.target[i])) : 0;
    word |= static_cast<unsigned>(code) << (8 * i);
    residual[i] = __fsub_rn(quad.weight[i], decode(shared.value[code], scale.scale, scale.offset, affine));
    const double wide = static_cast<double>(residual[i]);
    if (i < quad.count) norm2 = __dadd_rn(norm2, __dmul_rn(wide, wide));
  }
  word <<= lane / kFieldLanes * kBits;
#pragma unroll
  for (int other = kFieldLanes; other < kTileLanes; other *= 2) word |= __shfl_xor_sync(kFullWarp, word, other);
  if (lane < kFieldLanes && column < padded_k(p.k)) {
    uint8_t* tile = p.codes + row * row_bytes(p.k, kBits) + column / kTile * (kTile * kBits / 8);
    *reinterpret_cast<unsigned*>(tile + kQuad * lane) = word;
  }
  if (p.residual != nullptr) {
    store_quad(p.residual, DType::kFloat32, row * p.k + column, quad.count, args.dense_quads, residual);
  }
  return norm2;
}

}  // namespace loftq
