// Quantize with groups of 32 to 256 columns: a warp takes 128 or 256 neighbouring columns of one row, the lanes of a
// group agree on its scale by exchanges, and weights stay in registers from load to codes, scale search included.
#pragma once

#include "quantize_common.cuh"

namespace loftq {

// Blocks a multiprocessor. Without search the kernel waits for memory: 1024 threads with 16 bytes in flight.
constexpr int kPlainBlocks = 4;

template <int kBits, int kChunks, bool kSearch>
__device__ GroupScale group_scale(const QuantizeArgs<kBits>& args, const QuantizeShared<kBits>& shared,
                                  const WeightQuad (&quads)[kChunks], int64_t group) {
  const QuantizeParams& p = args.p;
  const int group_size = static_cast<int>(p.group_size);
  const int lanes = group_size / kQuad < kWarpSize ? group_size / kQuad : kWarpSize;
  const int64_t left = p.k - group * group_size;
  const int64_t count = left < group_size ? left : group_size;

  GroupRange range;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) include_range(quads[c], range);
  range.low = reduce_lanes(range.low, lanes, Min());
  range.high = reduce_lanes(range.high, lanes, Max());
  double mean = 0.0, deviation = 0.0;
  if (p.scale_rule == ScaleRule::kMeanStd) {
    double sum = 0.0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) sum += sum_of(quads[c]);
    mean = __ddiv_rn(reduce_lanes(sum, lanes, Sum()), static_cast<double>(count));
#pragma unroll
    for (int c = 0; c < kChunks; ++c) deviation += squared_deviation(quads[c], mean);
    deviation = reduce_lanes(deviation, lanes, Sum());
  }
  const ScaleModel model = scale_model(p, args.book.value[(1 << kBits) - 1], range, count, mean, deviation);
  if constexpr (!kSearch) return model.at(1.0f);

  double least = INFINITY;
  int best_step = 0;
#pragma unroll 1
  for (int step = 0; step < kSearchSteps; ++step) {
    const GroupScale candidate = model.at(search_factor(step));
    double error = 0.0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) error += squared_error(args, shared, quads[c], candidate, model.affine);
    error = reduce_lanes(error, lanes, Sum());
    if (error < least) {  // false for NaN: a scale that overflowed never wins over one that did not
      least = error;
      best_step = step;
    }
  }
  return model.at(search_factor(best_step));
}

// One row a block at a time; its warps take every warp_count()-th span of kChunks * 128 columns.
template <int kBits, int kChunks, bool kSearch>
__global__ void __launch_bounds__(kQuantizeThreads, kSearch ? 2 : kPlainBlocks)
    _quantize_group_kernel(const __grid_constant__ QuantizeArgs<kBits> args) {
  const QuantizeParams& p = args.p;
  QuantizeShared<kBits>& shared = *reinterpret_cast<QuantizeShared<kBits>*>(dynamic_shared());
  args.book.copy_to(shared.value, shared.midpoint);
  __syncthreads();

  const int64_t groups = num_groups(p.k, p.group_size);
  const int64_t spans = ceil_div(p.k, kChunks * kWarpColumns);
  for (int64_t row = blockIdx.x; row < p.n; row += gridDim.x) {
    double norm2 = 0.0;
    for (int64_t span = warp_index(); span < spans; span += warp_count()) {
      const int64_t column = span * (kChunks * kWarpColumns) + lane_index() * kQuad;
      WeightQuad quads[kChunks];
#pragma unroll
      for (int c = 0; c < kChunks; ++c) load_weight_quad(args, row, column + c * kWarpColumns, quads[c]);
      const int64_t group = column / static_cast<int>(p.group_size);
      const GroupScale scale = group_scale<kBits, kChunks, kSearch>(args, shared, quads, group);
      if (column % static_cast<int>(p.group_size) == 0 && group < groups) store_scale(p, row, group, groups, scale);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        norm2 += store_quad_codes(args, shared, row, column + c * kWarpColumns, quads[c], scale);
      }
    }
    if (p.residual_norm2 != nullptr) {
      norm2 = reduce_block(norm2, shared.wide, Sum());
      if (threadIdx.x == 0) p.residual_norm2[row] = norm2;
    }
  }
}

}  // namespace loftq
