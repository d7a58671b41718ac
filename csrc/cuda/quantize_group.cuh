// Quantize with groups of 32 to 256 columns: a group lies within one warp's span, and its weights stay in registers
// from load to codes, scale search included.
#pragma once

#include "quantize_common.cuh"

namespace loftq {
inline namespace LOFTQ_VERSION {

// Blocks per multiprocessor. The plain kernel waits for memory: 1024 to 1280 threads with 16 or 32 bytes in flight per
// thread. Mean and deviation, and scale search, have a kernel of their own: the registers that they need would cost the
// plain kernel threads.
template <int kWidth, bool kFull>
constexpr int kGroupBlocks = kFull                        ? 2
                             : kWidth == 2 || kWidth == 4 ? 5
                                                          : 4;

// kWidth: columns of the group per lane, g / 32.
template <int kWidth>
__device__ float group_mean_std_scale(const float* target, int count) {
  double sum = 0.0, squares = 0.0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (i * kWarpSize + lane_index() < count) sum = __dadd_rn(sum, static_cast<double>(target[i]));
  }
  const double mean = __ddiv_rn(reduce_warp(sum, Sum()), static_cast<double>(count));
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const double deviation = __dsub_rn(static_cast<double>(target[i]), mean);
    if (i * kWarpSize + lane_index() < count) squares = __dadd_rn(squares, squared(deviation));
  }
  return mean_std_scale(mean, reduce_warp(squares, Sum()), count);
}

template <int kBits, int kWidth, bool kFull>
__device__ GroupScale group_scale(const QuantizeParams& p, const Codebook<kBits>& book, const float* target,
                                  int count) {
  const auto exists = [&](int i) { return i * kWarpSize + lane_index() < count; };

  GroupRange range;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (exists(i)) range.include(target[i], is_affine(p));
  }
  range.reduce_over_warp(is_affine(p));
  const float last = book.last();
  if constexpr (!kFull) return scale_model(p, last, range, 0.0f).at(1.0f);

  float mean_scale = 0.0f;
  if (p.scale_rule == ScaleRule::kMeanStd) mean_scale = group_mean_std_scale<kWidth>(target, count);
  const ScaleModel model = scale_model(p, last, range, mean_scale);
  if (!p.scale_search) return model.at(1.0f);
  double least = INFINITY;
  int best_step = 0;
#pragma unroll 1
  for (int step = 0; step < kSearchSteps; ++step) {
    const GroupScale candidate = model.at(search_factor(step));
    double error = 0.0;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (exists(i)) error = __dadd_rn(error, squared_error(book, target[i], candidate, model.affine));
    }
    error = reduce_warp(error, Sum());
    if (error < least) {  // false for NaN
      least = error;
      best_step = step;
    }
  }
  return model.at(search_factor(best_step));
}

// A block processes one row at a time; its warps take neighbouring spans. All warps of a block stay in the loop
// together, because RowNorm needs the whole block.
template <int kBits, int kWidth, bool kFull>
__global__ void __launch_bounds__(kQuantizeThreads, kGroupBlocks<kWidth, kFull>)
    _quantize_group_kernel(const __grid_constant__ QuantizeParams p) {
  constexpr int kSpan = kWidth > 4 ? kWidth : 4, kGroups = kSpan / kWidth, kGroupSize = kWidth * kWarpSize;
  CodebookMemory<kBits>& memory = *reinterpret_cast<CodebookMemory<kBits>*>(dynamic_shared());
  RowNorm<kSpan> norm = {reinterpret_cast<float*>(&memory + 1)};
  const Codebook<kBits> book = Codebook<kBits>::load(p.codebook, memory);

  const int64_t groups = num_groups(p.k, kGroupSize);
  const int64_t step = static_cast<int64_t>(warp_count()) * Span<kSpan>::kColumns;
  for (int64_t row = blockIdx.x; row < p.n; row += gridDim.x) {
    for (int64_t first = 0; first < p.k; first += step) {
      const int64_t column = first + warp_index() * Span<kSpan>::kColumns;
      const bool active = column < p.k;
      Span<kSpan> span;
      if (active) {
        span.load(p, row, column);
        GroupScale scales[kGroups];
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          const int left = span.left - g * kGroupSize, count = left < kGroupSize ? left : kGroupSize;
          if (count <= 0) continue;
          scales[g] = group_scale<kBits, kWidth, kFull>(p, book, span.target + g * kWidth, count);
          if (lane_index() == 0) store_scale(p, row, column / kGroupSize + g, groups, scales[g]);
        }
        finish_span(p, book, row, span, scales);
      }
      if (p.residual_norm2 != nullptr) norm.add(span, active, first, p.k);
    }
    if (p.residual_norm2 != nullptr) norm.store(p.residual_norm2 + row);
  }
}

}  // namespace LOFTQ_VERSION
}  // namespace loftq
