// The CUDA kernels of the ops, compiled where torch has CUDA. Their schemas are in loftq_kernels/ops/schemas.py.
#include "bindings/cuda.h"

#include <tuple>

#include "aten/functions.h"
#include "aten/library.h"
#include "bindings/ops.h"
#include "loftq/cuda.h"

namespace loftq::bindings {

namespace {

void check_cuda(const Tensor& tensor, const char* what) {
  LOFTQ_CHECK(tensor.is_cuda(), what, " is on ", tensor.device(), ", expected a CUDA device");
}

std::tuple<Tensor, Tensor, Tensor> quantize_cuda(const Tensor& weight, const Tensor& codebook, int64_t group_size,
                                                 const std::string& scale_rule, ScalarType scale_dtype,
                                                 bool scale_search) {
  check_cuda(weight, "weight");
  const OnDevice device(weight);
  QuantizeCall call = prepare_quantize(weight, codebook, group_size, scale_rule, scale_dtype, scale_search);
  require_cuda(launch_quantize_cuda(call.params, device.stream()));
  return {call.codes, call.scale, call.offset};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_residual_cuda(const Tensor& weight, Tensor& low_rank,
                                                                  const Tensor& codebook, int64_t group_size,
                                                                  const std::string& scale_rule, ScalarType scale_dtype,
                                                                  bool scale_search) {
  check_cuda(weight, "weight");
  const OnDevice device(weight);
  const Tensor norms = empty({weight.dim() > 0 ? weight.size(0) : 0}, kDouble, weight.device());
  QuantizeCall call =
      prepare_quantize_residual(weight, low_rank, codebook, group_size, scale_rule, scale_dtype, scale_search, norms);
  require_cuda(launch_quantize_cuda(call.params, device.stream()));
  return {call.codes, call.scale, call.offset, sum(norms)};
}

Tensor unpack_codes_cuda(const Tensor& packed, int64_t bits, int64_t in_features) {
  const OnDevice device(packed);
  UnpackCall call = prepare_unpack(packed, bits, in_features);
  require_cuda(launch_unpack_cuda(call.params, device.stream()));
  return call.codes;
}

Tensor pack_codes_cuda(const Tensor& codes, int64_t bits) {
  const OnDevice device(codes);
  PackCall call = prepare_pack(codes, bits);
  require_cuda(launch_pack_cuda(call.params, device.stream()));
  return call.packed;
}

Tensor dequantize_cuda(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& offset,
                       const Tensor& codebook, int64_t in_features, int64_t group_size, ScalarType dtype) {
  check_cuda(codes, "codes");
  const OnDevice device(codes);
  const ScalarType computed = dtype == kDouble ? kFloat : dtype;
  DequantizeCall call = prepare_dequantize(codes, scale, offset, codebook, in_features, group_size, computed);
  if (dtype == kDouble) {
    const Tensor unpacked = unpack_codes_cuda(codes, call.params.bits, in_features);
    return dequantize_float64(unpacked, scale, offset, codebook, group_size);
  }
  require_cuda(launch_dequantize_cuda(call.params, device.stream()));
  return call.out;
}

Library registered() {
  Library library = Library::kernels("CUDA");
  library.add<quantize_cuda>("quantize");
  library.add<quantize_residual_cuda>("quantize_residual_");
  library.add<dequantize_cuda>("dequantize");
  library.add<pack_codes_cuda>("pack_codes");
  library.add<unpack_codes_cuda>("unpack_codes");
  return library;
}

const Registration registration(registered);

}  // namespace

}  // namespace loftq::bindings
