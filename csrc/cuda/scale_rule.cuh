// From a group's statistics to its stored scale and offset; quantize.h states the rules.
// The __f*_rn intrinsics keep the compiler from contracting to fma, so that every backend gives the same bits.
#pragma once

#include <cfloat>
#include <cmath>

#include "element.cuh"
#include "loftq/quantize.h"

namespace loftq {

constexpr int kSearchSteps = 25;

__device__ inline float search_factor(int step) { return 1.0f - 0.03125f * static_cast<float>(step); }  // exact

struct GroupRange {
  float low = INFINITY;
  float high = -INFINITY;

  // A NaN makes the range infinite, and with it the scale: fminf and fmaxf alone would drop it.
  __device__ void include(float w) {
    const bool nan = w != w;
    low = fminf(low, nan ? -INFINITY : w);
    high = fmaxf(high, nan ? INFINITY : w);
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
      result.offset = round_to(
          dtype, __fadd_rn(__fadd_rn(low, shrink), __fmul_rn(offset_step, result.scale)));
    }
    result.inverse = __fdiv_rn(1.0f, fmaxf(result.scale, FLT_MIN));
    return result;
  }
};

// sum, deviation: of w and of (w - mean)^2, used by kMeanStd only.
__device__ inline ScaleModel scale_model(const QuantizeParams& p, float codebook_last, GroupRange range, int64_t count,
                                         double mean, double deviation) {
  ScaleModel model;
  model.dtype = p.scale_dtype;
  model.affine = p.scale_rule == ScaleRule::kMinMax;
  model.low = range.low;
  model.span = fabsf(__fsub_rn(range.high, range.low));  // +0 where the range is from +0 to -0
  model.offset_step = static_cast<float>(1 << (p.bits - 1));
  if (model.affine) {
    model.base = __fdiv_rn(model.span, static_cast<float>((1 << p.bits) - 1));
    return model;
  }
  model.base = __fdiv_rn(fmaxf(fabsf(range.low), fabsf(range.high)), codebook_last);
  if (p.scale_rule == ScaleRule::kMeanStd) {
    const double variance = __ddiv_rn(deviation, static_cast<double>(count - 1));
    const float scale = static_cast<float>(__dadd_rn(mean, __dmul_rn(2.5, __dsqrt_rn(variance))));
    if (scale > 0.0f) model.base = scale;  // false for NaN: one weight has no deviation
  }
  return model;
}

// The value a code stands for, rounded as the dequantize kernels round it.
__device__ inline float decode(float entry, float scale, float offset, bool affine) {
  const float product = __fmul_rn(entry, scale);
  return affine ? __fadd_rn(product, offset) : product;
}

}  // namespace loftq
