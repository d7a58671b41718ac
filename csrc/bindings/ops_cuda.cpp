// The CUDA kernels of the ops, compiled where torch has CUDA. Their schemas are in loftq_kernels/ops/schemas.py.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "bindings/ops.h"
#include "loftq/cuda.h"

namespace loftq::bindings {

namespace {

using at::Tensor;

void check_cuda(const Tensor& tensor, const char* what) {
  TORCH_CHECK_VALUE(tensor.is_cuda(), what, " is on ", tensor.device(), ", expected a CUDA device");
}

std::tuple<Tensor, Tensor, Tensor> quantize_cuda(const Tensor& weight, const Tensor& codebook, int64_t group_size,
                                                 std::string_view scale_rule, at::ScalarType scale_dtype,
                                                 bool scale_search) {
  check_cuda(weight, "weight");
  const c10::cuda::CUDAGuard device(weight.device());
  QuantizeCall call = prepare_quantize(weight, codebook, group_size, scale_rule, scale_dtype, scale_search);
  C10_CUDA_CHECK(launch_quantize_cuda(call.params, c10::cuda::getCurrentCUDAStream()));
  return {call.codes, call.scale, call.offset};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_residual_cuda(const Tensor& weight, Tensor& low_rank,
                                                                  const Tensor& codebook, int64_t group_size,
                                                                  std::string_view scale_rule,
                                                                  at::ScalarType scale_dtype, bool scale_search) {
  check_cuda(weight, "weight");
  const c10::cuda::CUDAGuard device(weight.device());
  const Tensor norms = at::empty({weight.dim() > 0 ? weight.size(0) : 0}, weight.options().dtype(at::kDouble));
  QuantizeCall call =
      prepare_quantize_residual(weight, low_rank, codebook, group_size, scale_rule, scale_dtype, scale_search, norms);
  C10_CUDA_CHECK(launch_quantize_cuda(call.params, c10::cuda::getCurrentCUDAStream()));
  return {call.codes, call.scale, call.offset, norms.sum()};
}

Tensor unpack_codes_cuda(const Tensor& packed, int64_t bits, int64_t in_features) {
  const c10::cuda::CUDAGuard device(packed.device());
  UnpackCall call = prepare_unpack(packed, bits, in_features);
  C10_CUDA_CHECK(launch_unpack_cuda(call.params, c10::cuda::getCurrentCUDAStream()));
  return call.codes;
}

Tensor pack_codes_cuda(const Tensor& codes, int64_t bits) {
  const c10::cuda::CUDAGuard device(codes.device());
  PackCall call = prepare_pack(codes, bits);
  C10_CUDA_CHECK(launch_pack_cuda(call.params, c10::cuda::getCurrentCUDAStream()));
  return call.packed;
}

Tensor dequantize_cuda(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& offset,
                       const Tensor& codebook, int64_t in_features, int64_t group_size, at::ScalarType dtype) {
  check_cuda(codes, "codes");
  const c10::cuda::CUDAGuard device(codes.device());
  const at::ScalarType computed = dtype == at::kDouble ? at::kFloat : dtype;
  DequantizeCall call = prepare_dequantize(codes, scale, offset, codebook, in_features, group_size, computed);
  if (dtype == at::kDouble) return dequantize_float64(call, unpack_codes_cuda(codes, call.params.bits, in_features));
  C10_CUDA_CHECK(launch_dequantize_cuda(call.params, c10::cuda::getCurrentCUDAStream()));
  return call.out;
}

}  // namespace

TORCH_LIBRARY_IMPL(loftq_kernels, CUDA, m) {
  m.impl("quantize", quantize_cuda);
  m.impl("quantize_residual_", quantize_residual_cuda);
  m.impl("dequantize", dequantize_cuda);
  m.impl("pack_codes", pack_codes_cuda);
  m.impl("unpack_codes", unpack_codes_cuda);
}

}  // namespace loftq::bindings
