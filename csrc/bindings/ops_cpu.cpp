// The CPU kernels of the ops. Their schemas are defined in loftq_kernels/ops/schemas.py.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "bindings/ops.h"
#include "loftq/cpu.h"

namespace loftq::bindings {

namespace {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor> quantize_cpu(const Tensor& weight, const Tensor& codebook, int64_t group_size,
                                                std::string_view scale_rule, at::ScalarType scale_dtype,
                                                bool scale_search) {
  QuantizeCall call = prepare_quantize(weight, codebook, group_size, scale_rule, scale_dtype, scale_search);
  raise_if(launch_quantize_cpu(call.params, at::get_num_threads()));
  return {call.codes, call.scale, call.offset};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_residual_cpu(const Tensor& weight, Tensor& low_rank,
                                                                 const Tensor& codebook, int64_t group_size,
                                                                 std::string_view scale_rule,
                                                                 at::ScalarType scale_dtype, bool scale_search) {
  const Tensor norms = at::empty({weight.dim() > 0 ? weight.size(0) : 0}, weight.options().dtype(at::kDouble));
  QuantizeCall call =
      prepare_quantize_residual(weight, low_rank, codebook, group_size, scale_rule, scale_dtype, scale_search, norms);
  raise_if(launch_quantize_cpu(call.params, at::get_num_threads()));
  double total = 0;  // in the order of the rows, so that it does not depend on the number of threads
  for (int64_t row = 0; row < call.params.n; ++row) total += call.params.residual_norm2[row];
  return {call.codes, call.scale, call.offset, at::scalar_tensor(total, norms.options())};
}

Tensor unpack_codes_cpu(const Tensor& packed, int64_t bits, int64_t in_features) {
  UnpackCall call = prepare_unpack(packed, bits, in_features);
  raise_if(launch_unpack_cpu(call.params, at::get_num_threads()));
  return call.codes;
}

Tensor pack_codes_cpu(const Tensor& codes, int64_t bits) {
  PackCall call = prepare_pack(codes, bits);
  raise_if(launch_pack_cpu(call.params, at::get_num_threads()));
  return call.packed;
}

Tensor dequantize_cpu(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& offset,
                      const Tensor& codebook, int64_t in_features, int64_t group_size, at::ScalarType dtype) {
  const at::ScalarType computed = dtype == at::kDouble ? at::kFloat : dtype;
  DequantizeCall call = prepare_dequantize(codes, scale, offset, codebook, in_features, group_size, computed);
  if (dtype == at::kDouble) return dequantize_float64(call, unpack_codes_cpu(codes, call.params.bits, in_features));
  raise_if(launch_dequantize_cpu(call.params, at::get_num_threads()));
  return call.out;
}

// Float64, for checking other results: the dense weight, by ATen.
Tensor dense_float64(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& offset,
                     const Tensor& codebook, int64_t in_features, int64_t group_size,
                     const std::optional<Tensor>& lora_A, const std::optional<Tensor>& lora_B, double scaling,
                     const std::optional<Tensor>& bias) {
  Tensor dense = dequantize_cpu(codes, scale, offset, codebook, in_features, group_size, at::kDouble);
  check_adapter_and_bias(dense.size(0), in_features, codes, lora_A, lora_B, bias);
  if (lora_A) dense.addmm_(lora_B->to(at::kDouble), lora_A->to(at::kDouble), 1, scaling);
  return dense;
}

Tensor qlora_linear_cpu(const Tensor& x, const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& offset,
                        const Tensor& codebook, int64_t group_size, const std::optional<Tensor>& lora_A,
                        const std::optional<Tensor>& lora_B, double scaling, const std::optional<Tensor>& bias) {
  TORCH_CHECK_VALUE(x.dim() > 0, "x has no dimensions");
  const int64_t k = x.size(-1);
  if (x.scalar_type() == at::kDouble) {
    const Tensor dense = dense_float64(codes, scale, offset, codebook, k, group_size, lora_A, lora_B, scaling, bias);
    const Tensor y = at::matmul(x, dense.mT());
    return bias ? y + bias->to(at::kDouble) : y;
  }
  const LinearCall call =
      prepare_linear(x, codes, scale, offset, codebook, k, group_size, lora_A, lora_B, scaling, bias, false);
  raise_if(launch_linear_cpu(call.params, at::get_num_threads()));
  return call.y;
}

Tensor qlora_linear_grad_input_cpu(const Tensor& grad_y, const Tensor& codes, const Tensor& scale,
                                   const std::optional<Tensor>& offset, const Tensor& codebook, int64_t in_features,
                                   int64_t group_size, const std::optional<Tensor>& lora_A,
                                   const std::optional<Tensor>& lora_B, double scaling) {
  if (grad_y.scalar_type() == at::kDouble) {
    TORCH_CHECK_VALUE(grad_y.dim() > 0 && grad_y.size(-1) == codes.size(0), "grad_y has shape ", grad_y.sizes(),
                      ": its last dimension must be ", codes.size(0));
    return at::matmul(grad_y, dense_float64(codes, scale, offset, codebook, in_features, group_size, lora_A, lora_B,
                                            scaling, std::nullopt));
  }
  const LinearCall call = prepare_linear(grad_y, codes, scale, offset, codebook, in_features, group_size, lora_A,
                                         lora_B, scaling, std::nullopt, true);
  raise_if(launch_linear_grad_input_cpu(call.params, at::get_num_threads()));
  return call.y;
}

TORCH_LIBRARY_IMPL(loftq_kernels, CPU, m) {
  m.impl("quantize", quantize_cpu);
  m.impl("quantize_residual_", quantize_residual_cpu);
  m.impl("dequantize", dequantize_cpu);
  m.impl("pack_codes", pack_codes_cpu);
  m.impl("qlora_linear", qlora_linear_cpu);
  m.impl("qlora_linear_grad_input", qlora_linear_grad_input_cpu);
  m.impl("unpack_codes", unpack_codes_cpu);
}

}  // namespace

}  // namespace loftq::bindings
