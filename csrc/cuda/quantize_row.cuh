// Quantize with one group a row: a block takes a row and reads it once for each statistic, then once for the codes.
// Rows of 28672 float32 do not fit in the shared memory of every GPU, but they stay in its L2 cache between passes.
#pragma once

#include "quantize_common.cuh"

namespace loftq {

constexpr int kCandidatesAPass = 5;  // of the 25 scales that scale search tries; five accumulators a thread

// Calls visit(column, quad) for the quads of this thread. Whole warps take part, in the padding too.
template <int kBits, typename Visit>
__device__ void for_each_quad(const QuantizeArgs<kBits>& args, int64_t row, Visit visit) {
  const int64_t end = ceil_div(args.p.k, kWarpColumns) * kWarpColumns;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kQuad;
  for (int64_t column = static_cast<int64_t>(threadIdx.x) * kQuad; column < end; column += step) {
    WeightQuad quad;
    load_weight_quad(args, row, column, quad);
    visit(column, quad);
  }
}

template <int kBits>
__device__ ScaleModel row_scale_model(const QuantizeArgs<kBits>& args, QuantizeShared<kBits>& shared, int64_t row) {
  const QuantizeParams& p = args.p;
  GroupRange range;
  for_each_quad(args, row, [&](int64_t, const WeightQuad& quad) { include_range(quad, range); });
  range.low = reduce_block(range.low, shared.narrow, Min());
  range.high = reduce_block(range.high, shared.narrow, Max());
  double mean = 0.0, deviation = 0.0;
  if (p.scale_rule == ScaleRule::kMeanStd) {
    double sum = 0.0;
    for_each_quad(args, row, [&](int64_t, const WeightQuad& quad) { sum += sum_of(quad); });
    mean = __ddiv_rn(reduce_block(sum, shared.wide, Sum()), static_cast<double>(p.k));
    for_each_quad(args, row, [&](int64_t, const WeightQuad& quad) { deviation += squared_deviation(quad, mean); });
    deviation = reduce_block(deviation, shared.wide, Sum());
  }
  return scale_model(p, args.book.value[(1 << kBits) - 1], range, p.k, mean, deviation);
}

template <int kBits>
__device__ int search_row_step(const QuantizeArgs<kBits>& args, QuantizeShared<kBits>& shared, int64_t row,
                               const ScaleModel& model) {
  double least = INFINITY;
  int best_step = 0;
#pragma unroll 1
  for (int first = 0; first < kSearchSteps; first += kCandidatesAPass) {
    double error[kCandidatesAPass] = {};
    for_each_quad(args, row, [&](int64_t, const WeightQuad& quad) {
#pragma unroll
      for (int i = 0; i < kCandidatesAPass; ++i) {
        const GroupScale candidate = model.at(search_factor(first + i));
        error[i] += squared_error(args, shared, quad, candidate, model.affine);
      }
    });
#pragma unroll
    for (int i = 0; i < kCandidatesAPass; ++i) {
      const double total = reduce_block(error[i], shared.wide, Sum());
      if (total < least) {
        least = total;
        best_step = first + i;
      }
    }
  }
  return best_step;
}

template <int kBits>
__global__ void __launch_bounds__(kQuantizeThreads, 3)
    _quantize_row_kernel(const __grid_constant__ QuantizeArgs<kBits> args) {
  const QuantizeParams& p = args.p;
  QuantizeShared<kBits>& shared = *reinterpret_cast<QuantizeShared<kBits>*>(dynamic_shared());
  args.book.copy_to(shared.value, shared.midpoint);
  __syncthreads();

  for (int64_t row = blockIdx.x; row < p.n; row += gridDim.x) {
    const ScaleModel model = row_scale_model(args, shared, row);
    const int step = p.scale_search ? search_row_step(args, shared, row, model) : 0;
    const GroupScale scale = model.at(search_factor(step));
    if (threadIdx.x == 0) store_scale(p, row, 0, 1, scale);
    double norm2 = 0.0;
    for_each_quad(args, row, [&](int64_t column, const WeightQuad& quad) {
      norm2 += store_quad_codes(args, shared, row, column, quad, scale);
    });
    if (p.residual_norm2 != nullptr) {
      norm2 = reduce_block(norm2, shared.wide, Sum());
      if (threadIdx.x == 0) p.residual_norm2[row] = norm2;
    }
  }
}

}  // namespace loftq
