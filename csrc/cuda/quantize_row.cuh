// Quantize with one group per row: a block takes a row and reads it once for each statistic, then once for the codes.
// Rows of 28672 float32 do not fit in the shared memory of every GPU, but they stay in its L2 cache between passes.
#pragma once

#include "quantize_common.cuh"

namespace loftq {
inline namespace LOFTQ_VERSION {

constexpr int kRowSpan = 4;
constexpr int kCandidatesAWarp = (kSearchSteps + kQuantizeWarps - 1) / kQuantizeWarps;

struct RowScratch {
  unsigned range[kQuantizeWarps];
  double error[kQuantizeWarps * kCandidatesAWarp];
  float mean_scale;
};

// Calls visit(span) for the spans first, first + step, ... of a row.
template <typename Visit>
__device__ void for_each_span(const QuantizeParams& p, int64_t row, int64_t first, int64_t step, Visit visit) {
  for (int64_t column = first * Span<kRowSpan>::kColumns; column < p.k; column += step * Span<kRowSpan>::kColumns) {
    Span<kRowSpan> span;
    span.load(p, row, column);
    visit(span);
  }
}

// Computed by one warp, because the partial sums of quantize.h run along the whole row.
__device__ inline float row_mean_std_scale(const QuantizeParams& p, int64_t row) {
  double sum = 0.0, squares = 0.0;
  for_each_span(p, row, 0, 1, [&](const Span<kRowSpan>& span) {
#pragma unroll
    for (int i = 0; i < kRowSpan; ++i) sum += span.exists(i) ? static_cast<double>(span.target[i]) : 0.0;
  });
  const double mean = __ddiv_rn(reduce_warp(sum, Sum()), static_cast<double>(p.k));
  for_each_span(p, row, 0, 1, [&](const Span<kRowSpan>& span) {
#pragma unroll
    for (int i = 0; i < kRowSpan; ++i) {
      if (span.exists(i)) squares = __dadd_rn(squares, squared(__dsub_rn(static_cast<double>(span.target[i]), mean)));
    }
  });
  return mean_std_scale(mean, reduce_warp(squares, Sum()), p.k);
}

__device__ inline ScaleModel row_scale_model(const QuantizeParams& p, float last, RowScratch& scratch, int64_t row) {
  GroupRange range;
  for_each_span(p, row, warp_index(), warp_count(), [&](const Span<kRowSpan>& span) {
#pragma unroll
    for (int i = 0; i < kRowSpan; ++i) {
      if (span.exists(i)) range.include(span.target[i], is_affine(p));
    }
  });
  if (p.scale_rule == ScaleRule::kMeanStd && warp_index() == 0) {
    const float mean_scale = row_mean_std_scale(p, row);
    if (lane_index() == 0) scratch.mean_scale = mean_scale;
  }
  range.magnitude = reduce_block(range.magnitude, scratch.range, Max());  // its barriers publish mean_scale as well
  range.low = ~reduce_block(~range.low, scratch.range, Max());
  range.high = reduce_block(range.high, scratch.range, Max());
  const float mean_scale = p.scale_rule == ScaleRule::kMeanStd ? scratch.mean_scale : 0.0f;
  return scale_model(p, last, range, mean_scale);
}

// A warp tries every warp_count()-th candidate, all of its candidates in one pass over the row.
template <int kBits>
__device__ int search_row_step(const QuantizeParams& p, const Codebook<kBits>& book, RowScratch& scratch, int64_t row,
                               const ScaleModel& model) {
#pragma unroll 1
  for (int first = warp_index(); first < kSearchSteps; first += warp_count() * kCandidatesAWarp) {
    double error[kCandidatesAWarp] = {};
    for_each_span(p, row, 0, 1, [&](const Span<kRowSpan>& span) {
#pragma unroll
      for (int c = 0; c < kCandidatesAWarp; ++c) {
        const GroupScale candidate = model.at(search_factor(first + c * warp_count()));
#pragma unroll
        for (int i = 0; i < kRowSpan; ++i) {
          if (!span.exists(i)) continue;
          error[c] = __dadd_rn(error[c], squared_error(book, span.target[i], candidate, model.affine));
        }
      }
    });
#pragma unroll
    for (int c = 0; c < kCandidatesAWarp; ++c) {
      const double total = reduce_warp(error[c], Sum());
      const int step = first + c * warp_count();
      if (lane_index() == 0 && step < kSearchSteps) scratch.error[step] = total;
    }
  }
  __syncthreads();
  double least = INFINITY;
  int best_step = 0;
  for (int step = 0; step < kSearchSteps; ++step) {
    if (scratch.error[step] < least) {  // false for NaN
      least = scratch.error[step];
      best_step = step;
    }
  }
  return best_step;
}

template <int kBits>
__global__ void __launch_bounds__(kQuantizeThreads, 3) _quantize_row_kernel(const __grid_constant__ QuantizeParams p) {
  RowScratch& scratch = *reinterpret_cast<RowScratch*>(dynamic_shared());
  CodebookMemory<kBits>& memory = *reinterpret_cast<CodebookMemory<kBits>*>(&scratch + 1);
  RowNorm<kRowSpan> norm = {reinterpret_cast<float*>(&memory + 1)};
  const Codebook<kBits> book = Codebook<kBits>::load(p.codebook, memory);

  const int64_t step = static_cast<int64_t>(warp_count()) * Span<kRowSpan>::kColumns;
  for (int64_t row = blockIdx.x; row < p.n; row += gridDim.x) {
    const ScaleModel model = row_scale_model(p, book.last(), scratch, row);
    const int best_step = p.scale_search ? search_row_step(p, book, scratch, row, model) : 0;
    const GroupScale scales[1] = {model.at(search_factor(best_step))};
    if (threadIdx.x == 0) store_scale(p, row, 0, 1, scales[0]);
    for (int64_t first = 0; first < p.k; first += step) {
      const int64_t column = first + warp_index() * Span<kRowSpan>::kColumns;
      const bool active = column < p.k;
      Span<kRowSpan> span;
      if (active) {
        span.load(p, row, column);
        finish_span(p, book, row, span, scales);
      }
      if (p.residual_norm2 != nullptr) norm.add(span, active, first, p.k);
    }
    if (p.residual_norm2 != nullptr) norm.store(p.residual_norm2 + row);
    __syncthreads();  // the next row overwrites the scratch
  }
}

}  // namespace LOFTQ_VERSION
}  // namespace loftq
