// Quantize, dequantize and pack between dense weights and the storage contract of packing.h.
//
//   W[n, k] ~ codebook[code(n, k)] * scale[n, k / g] + offset[n, k / g]
//
// One group of weights w (the columns of one row that exist; padding takes no part) is quantized as:
//   1. base scale   kAbsmax : max|w| / codebook[last]
//                   kMinMax : (max w - min w) / (2^b - 1)                        (affine: has an offset)
//                   kMeanStd: mean + 2.5 * std (unbiased; all in float64, rounded once); where that is not > 0,
//                             the kAbsmax scale
//   2. factor f     1, or with scale_search the f in {1 - i/32 : i = 0..24} of least squared error (the first of
//                   equals; a NaN error never wins): float32 differences w - dequantized, squared and summed in float64
//   3. stored scale round_to(scale_dtype, f * base)
//      stored offset round_to(scale_dtype, (min + (1 - f) * 0.5 * (max - min)) + 2^(b-1) * stored scale)
//   4. code         nearest codebook entry to (w - offset) * (1 / max(stored scale, FLT_MIN)); the lower one on a tie:
//                   the number of midpoints (c[i] + c[i+1]) / 2 that lie strictly below
// Everything else is float32 without contraction into fma, so that every backend gives the same bits. The float64 sums
// (of the deviations, of squared errors, of residual_norm2) are 32 interleaved partial sums, column j of the group (of
// the row, for residual_norm2) to partial sum j mod 32, folded by halves: s[i] += s[i + 16], then 8, 4, 2, 1. The
// square of a float32 is exact in float64, so there an fma changes nothing. A NaN or Inf among the weights makes the
// group's scale non-finite (its codes are then unspecified): callers check the small scale tensor. Zeros count as +0 in
// min and max.
#pragma once

#include "loftq/packing.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

struct QuantizeParams {
  const void* weight;  // [n, k] of weight_dtype, rows weight_stride elements apart
  DType weight_dtype;
  int64_t weight_stride;
  const float* codebook;  // [2^bits], ascending; on the device, as all that is pointed to
  int64_t n;
  int64_t k;
  int bits;            // 2, 4 or 8
  int64_t group_size;  // 32, 64, 128, 256 or -1: the whole row
  ScaleRule scale_rule;
  bool scale_search;
  DType scale_dtype;
  uint8_t* codes;  // [n, row_bytes(k, bits)]; fields beyond k become 0
  void* scale;     // [n, num_groups] of scale_dtype
  void* offset;    // [n, num_groups] of scale_dtype; nullptr unless kMinMax

  // These do LoftQ's step in the same pass; all are nullptr for a plain quantize.
  const void* low_rank;  // [n, k] contiguous, of residual_dtype: quantize weight - low_rank instead of weight
  void* residual;        // the same, may be low_rank itself: receives weight - dequantized, rounded to nearest even
  DType residual_dtype;
  double* residual_norm2;  // [n]: receives the squared norm of each residual row before that rounding
};

struct DequantizeParams {
  const uint8_t* codes;  // [n, row_bytes(k, bits)]
  const void* scale;     // [n, num_groups] of scale_dtype
  const void* offset;    // the same, or nullptr
  DType scale_dtype;
  const float* codebook;  // [2^bits]
  int64_t n;
  int64_t k;
  int bits;
  int64_t group_size;
  void* out;  // [n, k] contiguous, of out_dtype: computed in float32, rounded once
  DType out_dtype;
};

}  // namespace LOFTQ_VERSION
}  // namespace loftq
