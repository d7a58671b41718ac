// From a group's statistics to its stored scale and offset; quantize.h states the rules.
// The __f*_rn intrinsics keep the compiler from contracting to fma, so that every backend gives the same bits.
#pragma once

#include <cfloat>
#include <cmath>

#include "element.cuh"
#include "loftq/quantize.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

constexpr int kSearchSteps = 25;

__device__ inline float search_factor(int step) { return 1.0f - 0.03125f * static_cast<float>(step); }  // exact

// Extremes of a group's weights, as unsigned keys that sort as floats do: hardware reduces those in one instruction,
// and a NaN sorts beyond both infinities, where fminf and fmaxf would drop it.
struct GroupRange {
  unsigned magnitude = 0;  // max |w|
  unsigned low = ~0u, high = 0;

  static __device__ unsigned key(float w) {
    const unsigned bits = __float_as_uint(w);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
  }
  static __device__ float from_key(unsigned key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

  __device__ void include(float w, bool affine) {
    if (affine) {
      low = min(low, key(w));
      high = max(high, key(w));
    } else {
      magnitude = max(magnitude, __float_as_uint(w) & 0x7fffffffu);
    }
  }
  __device__ void reduce_over_warp(bool affine) {
    if (affine) {
      low = __reduce_min_sync(kFullWarp, low);
      high = __reduce_max_sync(kFullWarp, high);
    } else {
      magnitude = __reduce_max_sync(kFullWarp, magnitude);
    }
  }
};

struct GroupScale {
  float scale;
  float offset;
  float inverse;  // 1 / max(scale, FLT_MIN)

  __device__ float scaled(float w) const { return __fmul_rn(__fsub_rn(w, offset), inverse); }
};

// How the scale of one group depends on the factor f.
struct ScaleModel {
  DType dtype;
  bool affine;
  float low;
  float span;         // max - min
  float base;         // the scale at f = 1, not yet rounded
  float offset_step;  // 2^(b-1)

  __device__ GroupScale at(float factor) const {
    GroupScale result;
    result.scale = round_to(dtype, __fmul_rn(factor, base));
    result.offset = 0.0f;
    if (affine) {
      const float shrink = __fmul_rn(__fmul_rn(__fsub_rn(1.0f, factor), 0.5f), span);
      result.offset = round_to(dtype, __fadd_rn(__fadd_rn(low, shrink), __fmul_rn(offset_step, result.scale)));
    }
    result.inverse = __fdiv_rn(1.0f, fmaxf(result.scale, FLT_MIN));
    return result;
  }
};

__device__ inline bool is_affine(const QuantizeParams& p) { return p.scale_rule == ScaleRule::kMinMax; }

// mean_scale: the result of mean_std_scale() for kMeanStd; other rules do not read it.
__device__ inline ScaleModel scale_model(const QuantizeParams& p, float codebook_last, const GroupRange& range,
                                         float mean_scale) {
  ScaleModel model;
  model.dtype = p.scale_dtype;
  model.affine = is_affine(p);
  model.offset_step = static_cast<float>(1 << (p.bits - 1));
  if (model.affine) {
    model.low = __fadd_rn(GroupRange::from_key(range.low), 0.0f);  // -0 becomes +0
    model.span = __fsub_rn(__fadd_rn(GroupRange::from_key(range.high), 0.0f), model.low);
    model.base = __fdiv_rn(model.span, static_cast<float>((1 << p.bits) - 1));
    return model;
  }
  model.low = model.span = 0.0f;
  model.base = __fdiv_rn(__uint_as_float(range.magnitude), codebook_last);
  if (p.scale_rule == ScaleRule::kMeanStd && mean_scale > 0.0f) model.base = mean_scale;
  return model;
}

// mean + 2.5 std, where `squares` is the sum of the squares of w - mean. The result is NaN for a single weight.
__device__ inline float mean_std_scale(double mean, double squares, int64_t count) {
  const double variance = __ddiv_rn(squares, static_cast<double>(count - 1));
  return static_cast<float>(__dadd_rn(mean, __dmul_rn(2.5, __dsqrt_rn(variance))));
}

// The value a code stands for, rounded as the dequantize kernels round it.
__device__ inline float decode(float entry, float scale, float offset, bool affine) {
  const float product = __fmul_rn(entry, scale);
  return affine ? __fadd_rn(product, offset) : product;
}

}  // namespace LOFTQ_VERSION
}  // namespace loftq
