#include "bindings/ops.h"

#include <ATen/MemoryOverlap.h>
#include <c10/util/Exception.h>

namespace loftq::bindings {

constexpr int64_t kMostColumns = int64_t{1} << 48;  // so that the bytes of a row fit in an int64

namespace {

DType dtype_of(at::ScalarType type, const char* what) {
  switch (type) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      TORCH_CHECK_VALUE(false, what, " has dtype ", type, "; expected float32, float16 or bfloat16");
  }
}

ScaleRule scale_rule_of(std::string_view name) {
  if (name == "absmax") return ScaleRule::kAbsmax;
  if (name == "minmax") return ScaleRule::kMinMax;
  if (name == "mean_std") return ScaleRule::kMeanStd;
  TORCH_CHECK_VALUE(false, "scale_rule=\"", name, "\" is not one of absmax, minmax, mean_std");
}

void check_group_size(int64_t group_size) {
  TORCH_CHECK_VALUE(is_group_size(group_size), "group_size=", group_size, " is not one of ",
                    at::IntArrayRef(kGroupSizes));
}

void check_device(const at::Tensor& tensor, const at::Tensor& like, const char* what) {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), what, " is on ", tensor.device(), ", expected ", like.device());
}

void check_shape(const at::Tensor& tensor, at::IntArrayRef shape, const char* what) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, what, " has shape ", tensor.sizes(), ", expected ", shape);
}

// Bits per code with this code book: log2 of its length.
int bits_of(const at::Tensor& codebook) {
  const int bits = codebook.dim() == 1 ? bits_of_codebook(codebook.numel()) : 0;
  TORCH_CHECK_VALUE(bits != 0, "codebook has shape ", codebook.sizes(), ", expected [2^bits] with bits one of ",
                    c10::ArrayRef<int>(kCodeBits));
  TORCH_CHECK_VALUE(codebook.scalar_type() == at::kFloat, "codebook has dtype ", codebook.scalar_type(),
                    ", expected float32");
  return bits;
}

void check_bits(int64_t bits) {
  TORCH_CHECK_VALUE(is_code_bits(bits), "bits=", bits, " is not one of ", c10::ArrayRef<int>(kCodeBits));
}

void check_bytes(const at::Tensor& tensor, const char* what) {
  TORCH_CHECK_VALUE(tensor.dim() == 2 && tensor.scalar_type() == at::kByte, what, " has shape ", tensor.sizes(),
                    " and dtype ", tensor.scalar_type(), ", expected 2 dimensions of uint8");
}

}  // namespace

void raise_if(Status status) { TORCH_CHECK_VALUE(status == nullptr, status); }

QuantizeCall prepare_quantize(const at::Tensor& weight, const at::Tensor& codebook, int64_t group_size,
                              std::string_view scale_rule, at::ScalarType scale_dtype, bool scale_search) {
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight has shape ", weight.sizes(), ", expected [N, K]");
  check_group_size(group_size);
  QuantizeCall call;
  QuantizeParams& p = call.params;
  p = QuantizeParams{};
  p.bits = bits_of(codebook);
  p.weight_dtype = dtype_of(weight.scalar_type(), "weight");
  p.scale_dtype = dtype_of(scale_dtype, "scale");
  p.scale_rule = scale_rule_of(scale_rule);
  p.scale_search = scale_search;
  p.group_size = group_size;
  p.n = weight.size(0);
  p.k = weight.size(1);

  call.weight = p.k > 1 && weight.stride(1) != 1 ? weight.contiguous() : weight;
  call.codebook = codebook.to(weight.device()).contiguous();
  const int64_t groups = num_groups(p.k, group_size);
  call.codes = at::empty({p.n, row_bytes(p.k, p.bits)}, weight.options().dtype(at::kByte));
  call.scale = at::empty({p.n, groups}, weight.options().dtype(scale_dtype));
  const bool affine = p.scale_rule == ScaleRule::kMinMax;
  call.offset = affine ? at::empty_like(call.scale) : at::empty({0}, call.scale.options());

  p.weight = call.weight.const_data_ptr();
  p.weight_stride = call.weight.stride(0);
  p.codebook = call.codebook.const_data_ptr<float>();
  p.codes = call.codes.mutable_data_ptr<uint8_t>();
  p.scale = call.scale.mutable_data_ptr();
  p.offset = affine ? call.offset.mutable_data_ptr() : nullptr;
  return call;
}

QuantizeCall prepare_quantize_residual(const at::Tensor& weight, const at::Tensor& low_rank, const at::Tensor& codebook,
                                       int64_t group_size, std::string_view scale_rule, at::ScalarType scale_dtype,
                                       bool scale_search, const at::Tensor& norms) {
  QuantizeCall call = prepare_quantize(weight, codebook, group_size, scale_rule, scale_dtype, scale_search);
  check_shape(low_rank, weight.sizes(), "low_rank");
  check_device(low_rank, weight, "low_rank");
  TORCH_CHECK_VALUE(low_rank.is_contiguous(), "low_rank must be contiguous; it has strides ", low_rank.strides());
  const at::MemOverlapStatus overlap = at::get_overlap_status(low_rank, weight);
  TORCH_CHECK_VALUE(overlap != at::MemOverlapStatus::Full && overlap != at::MemOverlapStatus::Partial,
                    "low_rank and weight share memory, but low_rank is overwritten");
  call.params.residual_dtype = dtype_of(low_rank.scalar_type(), "low_rank");
  call.params.low_rank = low_rank.const_data_ptr();
  call.params.residual = low_rank.mutable_data_ptr();
  call.params.residual_norm2 = norms.mutable_data_ptr<double>();
  return call;
}

namespace {

// Checks the tensors of a packed weight; keeps contiguous ones in the last four arguments and points into those.
PackedWeight packed_weight(const at::Tensor& codes, const at::Tensor& scale, const std::optional<at::Tensor>& offset,
                           const at::Tensor& codebook, int64_t in_features, int64_t group_size, at::Tensor& own_codes,
                           at::Tensor& own_scale, at::Tensor& own_offset, at::Tensor& own_codebook) {
  check_bytes(codes, "codes");
  TORCH_CHECK_VALUE(in_features >= 0 && in_features < kMostColumns, "in_features=", in_features, " is outside 0..",
                    kMostColumns);
  check_group_size(group_size);
  PackedWeight weight = {};
  weight.bits = bits_of(codebook);
  weight.n = codes.size(0);
  weight.k = in_features;
  weight.group_size = group_size;
  weight.scale_dtype = dtype_of(scale.scalar_type(), "scale");
  check_device(scale, codes, "scale");
  check_shape(codes, {weight.n, row_bytes(weight.k, weight.bits)}, "codes");
  check_shape(scale, {weight.n, num_groups(weight.k, group_size)}, "scale");
  own_codes = codes.contiguous();
  own_scale = scale.contiguous();
  own_codebook = codebook.to(codes.device()).contiguous();
  if (offset) {
    check_device(*offset, codes, "offset");
    check_shape(*offset, scale.sizes(), "offset");
    TORCH_CHECK_VALUE(offset->scalar_type() == scale.scalar_type(), "offset has dtype ", offset->scalar_type(),
                      ", but scale has ", scale.scalar_type());
    own_offset = offset->contiguous();
    weight.offset = own_offset.const_data_ptr();
  }
  weight.codes = own_codes.const_data_ptr<uint8_t>();
  weight.scale = own_scale.const_data_ptr();
  weight.codebook = own_codebook.const_data_ptr<float>();
  return weight;
}

}  // namespace

DequantizeCall prepare_dequantize(const at::Tensor& codes, const at::Tensor& scale,
                                  const std::optional<at::Tensor>& offset, const at::Tensor& codebook,
                                  int64_t in_features, int64_t group_size, at::ScalarType dtype) {
  DequantizeCall call;
  const PackedWeight weight = packed_weight(codes, scale, offset, codebook, in_features, group_size, call.codes,
                                            call.scale, call.offset, call.codebook);
  call.out = at::empty({weight.n, weight.k}, codes.options().dtype(dtype));
  DequantizeParams& p = call.params;
  p = {weight.codes, weight.scale, weight.offset,     weight.scale_dtype,          weight.codebook,       weight.n,
       weight.k,     weight.bits,  weight.group_size, call.out.mutable_data_ptr(), dtype_of(dtype, "out")};
  return call;
}

at::Tensor dequantize_float64(const DequantizeCall& call, const at::Tensor& unpacked) {
  const DequantizeParams& p = call.params;
  const auto columns = [&](const at::Tensor& groups) {
    return groups.to(at::kDouble).repeat_interleave(group_width(p.k, p.group_size), 1).narrow(1, 0, p.k);
  };
  const at::Tensor codebook = call.codebook.to(at::kDouble);
  at::Tensor dense = codebook.index_select(0, unpacked.view(-1).to(at::kInt)).view({p.n, p.k});
  dense.mul_(columns(call.scale));
  return p.offset ? dense.add_(columns(call.offset)) : dense;
}

namespace {

void check_floating(const at::Tensor& tensor, const char* what) {
  TORCH_CHECK_TYPE(at::isFloatingType(tensor.scalar_type()), what, " must be floating point, got ",
                   tensor.scalar_type());
}

void check_operand(const at::Tensor& tensor, at::IntArrayRef shape, const at::Tensor& like, const char* what) {
  check_floating(tensor, what);
  check_shape(tensor, shape, what);
  check_device(tensor, like, what);
}

// A matrix as the kernels read it: of a type that they know, with the elements of a row side by side.
at::Tensor readable(const at::Tensor& tensor) {
  const bool known =
      tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
  const at::Tensor typed = known ? tensor : tensor.to(at::kFloat);
  return typed.size(-1) > 1 && typed.stride(-1) != 1 ? typed.contiguous() : typed;
}

Matrix matrix_of(const at::Tensor& tensor, const char* what) {
  return {tensor.const_data_ptr(), dtype_of(tensor.scalar_type(), what), tensor.size(0), tensor.size(1),
          tensor.stride(0)};
}

}  // namespace

void check_adapter_and_bias(int64_t n, int64_t k, const at::Tensor& like, const std::optional<at::Tensor>& lora_A,
                            const std::optional<at::Tensor>& lora_B, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK_VALUE(lora_A.has_value() == lora_B.has_value(), "lora_A and lora_B must be given together");
  if (lora_A) {
    TORCH_CHECK_VALUE(lora_A->dim() == 2, "lora_A has shape ", lora_A->sizes(), ", expected [rank, ", k, "]");
    check_operand(*lora_A, {lora_A->size(0), k}, like, "lora_A");
    check_operand(*lora_B, {n, lora_A->size(0)}, like, "lora_B");
  }
  if (bias) check_operand(*bias, {n}, like, "bias");
}

LinearCall prepare_linear(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scale,
                          const std::optional<at::Tensor>& offset, const at::Tensor& codebook, int64_t in_features,
                          int64_t group_size, const std::optional<at::Tensor>& lora_A,
                          const std::optional<at::Tensor>& lora_B, double scaling,
                          const std::optional<at::Tensor>& bias, bool transposed) {
  LinearCall call;
  LinearParams& p = call.params;
  p = LinearParams{};
  p.weight = packed_weight(codes, scale, offset, codebook, in_features, group_size, call.codes, call.scale, call.offset,
                           call.codebook);
  const int64_t n = p.weight.n, k = p.weight.k, from = transposed ? n : k, to = transposed ? k : n;
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == from, "x has shape ", x.sizes(), ", expected [..., ", from, "]");
  check_device(x, codes, "x");
  at::DimVector shape(x.sizes());
  shape.back() = to;
  call.y = at::empty(shape, x.options());
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) m *= x.size(i);
  check_floating(x, "x");
  p.x = matrix_of(call.x = readable(x.dim() == 2 ? x : x.reshape({m, from})), "x");
  TORCH_CHECK_VALUE(call.x.scalar_type() == x.scalar_type(), "x has dtype ", x.scalar_type(),
                    "; expected float32, float16, bfloat16 or float64");  // y, which the kernel writes, has it too
  p.y = call.y.mutable_data_ptr();
  p.scaling = static_cast<float>(scaling);
  check_adapter_and_bias(n, k, codes, lora_A, lora_B, bias);
  if (lora_A && lora_A->size(0) > 0) {
    p.lora_A = matrix_of(call.lora_A = readable(*lora_A), "lora_A");
    p.lora_B = matrix_of(call.lora_B = readable(*lora_B), "lora_B");
  }
  if (bias) {
    call.bias = readable(*bias).contiguous();
    p.bias = call.bias.const_data_ptr();
    p.bias_dtype = dtype_of(call.bias.scalar_type(), "bias");
  }
  return call;
}

PackCall prepare_pack(const at::Tensor& codes, int64_t bits) {
  check_bits(bits);
  check_bytes(codes, "codes");
  PackCall call;
  const int width = static_cast<int>(bits);
  const int64_t n = codes.size(0), k = codes.size(1);
  call.codes = codes.contiguous();
  call.packed = at::empty({n, row_bytes(k, width)}, codes.options());
  call.params = {call.codes.const_data_ptr<uint8_t>(), n, k, width, call.packed.mutable_data_ptr<uint8_t>()};
  return call;
}

UnpackCall prepare_unpack(const at::Tensor& packed, int64_t bits, int64_t in_features) {
  check_bits(bits);
  check_bytes(packed, "packed");
  const int width = static_cast<int>(bits);
  const bool consistent =
      in_features >= 0 && in_features < kMostColumns && packed.size(1) == row_bytes(in_features, width);
  TORCH_CHECK_VALUE(consistent, "packed has shape ", packed.sizes(), ", which does not hold in_features=", in_features,
                    " at bits=", bits);
  UnpackCall call;
  const int64_t n = packed.size(0);
  call.packed = packed.contiguous();
  call.codes = at::empty({n, in_features}, packed.options());
  call.params = {call.packed.const_data_ptr<uint8_t>(), n, in_features, width, call.codes.mutable_data_ptr<uint8_t>()};
  return call;
}

}  // namespace loftq::bindings
