// What is wrong with the parameters of a launch; nullptr if nothing is. Every launch_*, on either device, asks these
// functions first and writes nothing where they object. Ask them yourself to know why a CUDA launch returned
// cudaErrorInvalidValue.
//
// They look at numbers and at whether pointers are null, never at what is pointed to. A pointer may be null where its
// array has no elements; the code book belongs to the weight, and so may be null where that has none.
#pragma once

#include "loftq/linear.h"
#include "loftq/quantize.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

constexpr bool is_dtype(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

constexpr bool is_scale_rule(ScaleRule rule) {
  return rule == ScaleRule::kAbsmax || rule == ScaleRule::kMinMax || rule == ScaleRule::kMeanStd;
}

// Of a weight that has elements, wherever it is read or written.
constexpr Status check_stored(const void* codes, const void* scale, DType scale_dtype, const void* codebook) {
  if (codes == nullptr) return "codes must not be null";
  if (scale == nullptr) return "scale must not be null";
  if (codebook == nullptr) return "codebook must not be null";
  return is_dtype(scale_dtype) ? nullptr : "scale_dtype must be a value of DType";
}

constexpr Status check_params(const QuantizeParams& p) {
  if (Status error = check_codes(p.n, p.k, p.bits)) return error;
  if (Status error = check_group_size(p.group_size)) return error;
  if (!is_scale_rule(p.scale_rule)) return "scale_rule must be a value of ScaleRule";
  if (p.n == 0 || p.k == 0) return nullptr;
  if (p.weight == nullptr) return "weight must not be null";
  if (!is_dtype(p.weight_dtype)) return "weight_dtype must be a value of DType";
  if (p.weight_stride < 0) return "weight_stride must not be negative";
  if (!fits(p.n, p.weight_stride)) return "weight_stride is too large: n * weight_stride must be at most 2^56";
  if (Status error = check_stored(p.codes, p.scale, p.scale_dtype, p.codebook)) return error;
  if ((p.scale_rule == ScaleRule::kMinMax) != (p.offset != nullptr))
    return "offset belongs to kMinMax, and to it alone";
  if (p.residual_norm2 != nullptr && p.residual == nullptr) return "residual_norm2 needs residual";
  const bool typed = is_dtype(p.residual_dtype) || (p.low_rank == nullptr && p.residual == nullptr);
  return typed ? nullptr : "residual_dtype must be a value of DType";
}

constexpr Status check_params(const DequantizeParams& p) {
  if (Status error = check_codes(p.n, p.k, p.bits)) return error;
  if (Status error = check_group_size(p.group_size)) return error;
  if (p.n == 0 || p.k == 0) return nullptr;
  if (Status error = check_stored(p.codes, p.scale, p.scale_dtype, p.codebook)) return error;
  if (p.out == nullptr) return "out must not be null";
  return is_dtype(p.out_dtype) ? nullptr : "out_dtype must be a value of DType";
}

// Of an operand of a product, whose shape is right.
constexpr Status check_operand(const Matrix& matrix) {
  if (matrix.rows == 0 || matrix.columns == 0) return nullptr;
  if (matrix.data == nullptr) return "x must not be null";
  if (!is_dtype(matrix.dtype)) return "the dtype of x, lora_A and lora_B must be a value of DType";
  if (matrix.stride < 0) return "the stride of x, lora_A and lora_B must not be negative";
  const int64_t reach = matrix.stride > matrix.columns ? matrix.stride : matrix.columns;
  return fits(matrix.rows, reach) ? nullptr : "x, lora_A or lora_B is too large: rows * stride must be at most 2^56";
}

constexpr Status check_adapter(const Matrix& lora_A, const Matrix& lora_B, int64_t n, int64_t k) {
  if ((lora_A.data == nullptr) != (lora_B.data == nullptr)) return "lora_A and lora_B belong together";
  if (lora_A.data == nullptr) return nullptr;
  const bool adapts = lora_A.columns == k && lora_B.rows == n && lora_A.rows == lora_B.columns && lora_A.rows > 0;
  if (!adapts) return "lora_A must be [r, k] and lora_B [n, r]";
  if (Status error = check_operand(lora_A)) return error;
  return check_operand(lora_B);
}

// transposed: of launch_linear_grad_input_cpu.
constexpr Status check_params(const LinearParams& p, bool transposed) {
  const PackedWeight& w = p.weight;
  if (Status error = check_codes(w.n, w.k, w.bits)) return error;
  if (Status error = check_group_size(w.group_size)) return error;
  const int64_t from = transposed ? w.n : w.k, to = transposed ? w.k : w.n;
  if (p.x.rows < 0) return "x must not have a negative number of rows";
  if (p.x.columns != from) return "x does not have as many columns as the product needs";
  if (Status error = check_operand(p.x)) return error;
  if (!fits(p.x.rows, to)) return "y is too large: it may have at most 2^56 elements";
  if (p.bias != nullptr && transposed) return "the transposed product has no bias";
  if (p.bias != nullptr && !is_dtype(p.bias_dtype)) return "bias_dtype must be a value of DType";
  if (p.x.rows > 0 && to > 0) {  // y has elements, also where x has none
    if (p.y == nullptr) return "y must not be null";
    if (!is_dtype(p.x.dtype)) return "the dtype of x, which y has too, must be a value of DType";
  }
  if (w.n == 0 || w.k == 0) return nullptr;
  if (Status error = check_stored(w.codes, w.scale, w.scale_dtype, w.codebook)) return error;
  return check_adapter(p.lora_A, p.lora_B, w.n, w.k);
}

constexpr Status check_params(const AdapterGradParams& p) {
  if (p.x.rows < 0 || p.x.rows != p.grad_y.rows) return "x and grad_y must have the same number of rows";
  const bool sized = p.x.columns >= 0 && p.grad_y.columns >= 0 && p.lora_A.rows >= 0;
  const bool adapts = p.lora_A.columns == p.x.columns && p.lora_B.rows == p.grad_y.columns;
  if (!sized || !adapts || p.lora_A.rows != p.lora_B.columns) {
    return "lora_A must be [r, k] and lora_B [n, r], for x [m, k] and grad_y [m, n]";
  }
  if (!fits(p.x.columns, p.lora_A.rows) || !fits(p.grad_y.columns, p.lora_A.rows) || !fits(p.x.rows, p.lora_A.rows)) {
    return "the adapter is too large: it may have at most 2^56 elements";
  }
  if (Status error = check_operand(p.x)) return error;
  if (Status error = check_operand(p.grad_y)) return error;
  if (Status error = check_operand(p.lora_A)) return error;
  if (Status error = check_operand(p.lora_B)) return error;
  const bool typed =
      (p.grad_A == nullptr || is_dtype(p.grad_A_dtype)) && (p.grad_B == nullptr || is_dtype(p.grad_B_dtype));
  return typed ? nullptr : "grad_A_dtype and grad_B_dtype must be values of DType";
}

// Of PackParams and UnpackParams.
template <class Params>
constexpr Status check_packing(const Params& p) {
  if (Status error = check_codes(p.n, p.k, p.bits)) return error;
  if (p.n == 0 || p.k == 0) return nullptr;
  if (p.codes == nullptr) return "codes must not be null";
  return p.packed != nullptr ? nullptr : "packed must not be null";
}

constexpr Status check_params(const PackParams& p) { return check_packing(p); }
constexpr Status check_params(const UnpackParams& p) { return check_packing(p); }

// What a launch_*_cpu asks: of the number of threads, then of what check_params takes.
template <class... Params>
constexpr Status check_launch(int num_threads, const Params&... params) {
  if (num_threads < 1) return "num_threads must be at least 1";
  return check_params(params...);
}

}  // namespace LOFTQ_VERSION
}  // namespace loftq
