#include "bindings/ops.h"

#include <algorithm>
#include <array>
#include <vector>

#include "aten/functions.h"

namespace loftq::bindings {

constexpr int64_t kMostColumns = int64_t{1} << 48;  // so that the bytes of a row fit in an int64

namespace {

DType dtype_of(ScalarType type, const char* what) {
  if (type == kFloat) return DType::kFloat32;
  if (type == kHalf) return DType::kFloat16;
  if (type == kBFloat16) return DType::kBFloat16;
  refuse(what, " has dtype ", type, "; expected float32, float16 or bfloat16");
}

ScaleRule scale_rule_of(const std::string& name) {
  if (name == "absmax") return ScaleRule::kAbsmax;
  if (name == "minmax") return ScaleRule::kMinMax;
  if (name == "mean_std") return ScaleRule::kMeanStd;
  refuse("scale_rule=\"", name, "\" is not one of absmax, minmax, mean_std");
}

void check_group_size(int64_t group_size) {
  LOFTQ_CHECK(is_group_size(group_size), "group_size=", group_size, " is not one of ", std::span(kGroupSizes));
}

void check_device(const Tensor& tensor, const Tensor& like, const char* what) {
  LOFTQ_CHECK(tensor.device() == like.device(), what, " is on ", tensor.device(), ", expected ", like.device());
}

void check_shape(const Tensor& tensor, Sizes shape, const char* what) {
  const Sizes sizes = tensor.sizes();
  LOFTQ_CHECK(std::ranges::equal(sizes, shape), what, " has shape ", sizes, ", expected ", shape);
}

template <size_t kDims>
void check_shape(const Tensor& tensor, const int64_t (&shape)[kDims], const char* what) {
  check_shape(tensor, Sizes(shape), what);
}

// The tensor if its elements are in order, or a copy, which is then put into `copy`.
const Tensor& in_order(const Tensor& tensor, Tensor& copy) {
  if (tensor.is_contiguous()) return tensor;
  return copy = contiguous(tensor);
}

// The code book where the codes are, as float32 numbers side by side.
const Tensor& codebook_at(const Tensor& codebook, Device device, Tensor& copy) {
  if (codebook.device() == device) return in_order(codebook, copy);
  return copy = contiguous(to(codebook, device));
}

// The bytes from the first to past the last element of a tensor with that many.
std::array<const char*, 2> bytes_of(const Tensor& tensor, int64_t elements) {
  const char* first = tensor.const_data<char>();
  return {first, first + elements * static_cast<int64_t>(aoti_torch_dtype_element_size(tensor.dtype().code))};
}

// Bits per code with this code book: log2 of its length.
int bits_of(const Tensor& codebook) {
  const int bits = codebook.dim() == 1 ? bits_of_codebook(codebook.numel()) : 0;
  LOFTQ_CHECK(bits != 0, "codebook has shape ", codebook.sizes(), ", expected [2^bits] with bits one of ",
              std::span(kCodeBits));
  LOFTQ_CHECK(codebook.dtype() == kFloat, "codebook has dtype ", codebook.dtype(), ", expected float32");
  return bits;
}

void check_bits(int64_t bits) {
  LOFTQ_CHECK(is_code_bits(bits), "bits=", bits, " is not one of ", std::span(kCodeBits));
}

void check_bytes(const Tensor& tensor, const char* what) {
  LOFTQ_CHECK(tensor.dim() == 2 && tensor.dtype() == kByte, what, " has shape ", tensor.sizes(), " and dtype ",
              tensor.dtype(), ", expected 2 dimensions of uint8");
}

}  // namespace

void raise_if(Status status) { LOFTQ_CHECK(status == nullptr, status); }

QuantizeCall prepare_quantize(const Tensor& weight, const Tensor& codebook, int64_t group_size,
                              const std::string& scale_rule, ScalarType scale_dtype, bool scale_search) {
  LOFTQ_CHECK(weight.dim() == 2, "weight has shape ", weight.sizes(), ", expected [N, K]");
  check_group_size(group_size);
  QuantizeCall call;
  QuantizeParams& p = call.params;
  p = QuantizeParams{};
  p.bits = bits_of(codebook);
  p.weight_dtype = dtype_of(weight.dtype(), "weight");
  p.scale_dtype = dtype_of(scale_dtype, "scale");
  p.scale_rule = scale_rule_of(scale_rule);
  p.scale_search = scale_search;
  p.group_size = group_size;
  p.n = weight.size(0);
  p.k = weight.size(1);

  const Device device = weight.device();
  const bool side_by_side = p.k <= 1 || weight.stride(1) == 1;
  const Tensor& rows = side_by_side ? weight : call.weight = contiguous(weight);
  const int64_t groups = num_groups(p.k, group_size);
  call.codes = empty({p.n, row_bytes(p.k, p.bits)}, kByte, device);
  call.scale = empty({p.n, groups}, scale_dtype, device);
  const bool affine = p.scale_rule == ScaleRule::kMinMax;
  call.offset = affine ? empty({p.n, groups}, scale_dtype, device) : empty({0}, scale_dtype, device);

  p.weight = rows.const_data();
  p.weight_stride = rows.stride(0);
  p.codebook = codebook_at(codebook, device, call.codebook).const_data<float>();
  p.codes = call.codes.mutable_data<uint8_t>();
  p.scale = call.scale.mutable_data();
  p.offset = affine ? call.offset.mutable_data() : nullptr;
  return call;
}

QuantizeCall prepare_quantize_residual(const Tensor& weight, const Tensor& low_rank, const Tensor& codebook,
                                       int64_t group_size, const std::string& scale_rule, ScalarType scale_dtype,
                                       bool scale_search, const Tensor& norms) {
  QuantizeCall call = prepare_quantize(weight, codebook, group_size, scale_rule, scale_dtype, scale_search);
  check_shape(low_rank, weight.sizes(), "low_rank");
  check_device(low_rank, weight, "low_rank");
  LOFTQ_CHECK(low_rank.is_contiguous(), "low_rank must be contiguous; it has strides ", low_rank.strides());
  const auto written = bytes_of(low_rank, low_rank.numel()), read = bytes_of(weight, weight.numel());
  LOFTQ_CHECK(!weight.is_contiguous() || written[1] <= read[0] || read[1] <= written[0],
              "low_rank and weight share memory, but low_rank is overwritten");
  call.params.residual_dtype = dtype_of(low_rank.dtype(), "low_rank");
  call.params.low_rank = low_rank.const_data();
  call.params.residual = low_rank.mutable_data();
  call.params.residual_norm2 = norms.mutable_data<double>();
  return call;
}

namespace {

// Checks the tensors of a packed weight and points into them, or into copies.
PackedWeight packed_weight(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& offset,
                           const Tensor& codebook, int64_t in_features, int64_t group_size, PackedCopies& copies) {
  check_bytes(codes, "codes");
  LOFTQ_CHECK(in_features >= 0 && in_features < kMostColumns, "in_features=", in_features, " is outside 0..",
              kMostColumns);
  check_group_size(group_size);
  PackedWeight weight = {};
  weight.bits = bits_of(codebook);
  weight.n = codes.size(0);
  weight.k = in_features;
  weight.group_size = group_size;
  weight.scale_dtype = dtype_of(scale.dtype(), "scale");
  check_device(scale, codes, "scale");
  check_shape(codes, {weight.n, row_bytes(weight.k, weight.bits)}, "codes");
  check_shape(scale, {weight.n, num_groups(weight.k, group_size)}, "scale");
  if (offset) {
    check_device(*offset, codes, "offset");
    check_shape(*offset, scale.sizes(), "offset");
    LOFTQ_CHECK(offset->dtype() == scale.dtype(), "offset has dtype ", offset->dtype(), ", but scale has ",
                scale.dtype());
    weight.offset = in_order(*offset, copies.offset).const_data();
  }
  weight.codes = in_order(codes, copies.codes).const_data<uint8_t>();
  weight.scale = in_order(scale, copies.scale).const_data();
  weight.codebook = codebook_at(codebook, codes.device(), copies.codebook).const_data<float>();
  return weight;
}

}  // namespace

DequantizeCall prepare_dequantize(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& offset,
                                  const Tensor& codebook, int64_t in_features, int64_t group_size, ScalarType dtype) {
  DequantizeCall call;
  const PackedWeight weight = packed_weight(codes, scale, offset, codebook, in_features, group_size, call.copies);
  call.out = empty({weight.n, weight.k}, dtype, codes.device());
  DequantizeParams& p = call.params;
  p = {weight.codes, weight.scale, weight.offset,     weight.scale_dtype,      weight.codebook,       weight.n,
       weight.k,     weight.bits,  weight.group_size, call.out.mutable_data(), dtype_of(dtype, "out")};
  return call;
}

Tensor dequantize_float64(const Tensor& unpacked, const Tensor& scale, const std::optional<Tensor>& offset,
                          const Tensor& codebook, int64_t group_size) {
  const int64_t n = unpacked.size(0), k = unpacked.size(1);
  const auto columns = [&](const Tensor& groups) {
    return narrow(repeat_interleave(to(groups, kDouble), group_width(k, group_size), 1), 1, 0, k);
  };
  const Tensor values = to(to(codebook, unpacked.device()), kDouble);
  const Tensor dense = view(index_select(values, 0, to(view(unpacked, {n * k}), kInt)), {n, k});
  mul_(dense, columns(scale));
  return offset ? add(dense, columns(*offset)) : dense;
}

namespace {

void check_operand(const Tensor& tensor, Sizes shape, const Tensor& like, const char* what) {
  LOFTQ_CHECK(is_floating(tensor.dtype()), what, " must be floating point, got ", tensor.dtype());
  check_shape(tensor, shape, what);
  check_device(tensor, like, what);
}

template <size_t kDims>
void check_operand(const Tensor& tensor, const int64_t (&shape)[kDims], const Tensor& like, const char* what) {
  check_operand(tensor, Sizes(shape), like, what);
}

// The tensor in a type that the kernels read, or a copy.
const Tensor& in_known_type(const Tensor& tensor, Tensor& copy) {
  const ScalarType type = tensor.dtype();
  if (type == kFloat || type == kHalf || type == kBFloat16) return tensor;
  return copy = to(tensor, kFloat);
}

// A matrix [rows, columns] as the kernels read it, with the elements of a row side by side: the tensor with all its
// dimensions but the last in one, or a copy.
Matrix matrix_of(const Tensor& tensor, int64_t rows, int64_t columns, Tensor& copy, const char* what) {
  const Tensor& typed = in_known_type(tensor, copy);
  const Sizes strides = typed.strides();
  const bool readable = strides.size() == 2 && (columns <= 1 || strides[1] == 1);
  if (readable) return {typed.const_data(), dtype_of(typed.dtype(), what), rows, columns, strides[0]};
  const Tensor& dense = in_order(typed, copy);
  return {dense.const_data(), dtype_of(dense.dtype(), what), rows, columns, columns};
}

Matrix matrix_of(const Tensor& tensor, Tensor& copy, const char* what) {
  return matrix_of(tensor, tensor.size(0), tensor.size(1), copy, what);
}

}  // namespace

void check_adapter_and_bias(int64_t n, int64_t k, const Tensor& like, const std::optional<Tensor>& lora_A,
                            const std::optional<Tensor>& lora_B, const std::optional<Tensor>& bias) {
  LOFTQ_CHECK(lora_A.has_value() == lora_B.has_value(), "lora_A and lora_B must be given together");
  if (lora_A) {
    LOFTQ_CHECK(lora_A->dim() == 2, "lora_A has shape ", lora_A->sizes(), ", expected [rank, ", k, "]");
    check_operand(*lora_A, {lora_A->size(0), k}, like, "lora_A");
    check_operand(*lora_B, {n, lora_A->size(0)}, like, "lora_B");
  }
  if (bias) check_operand(*bias, {n}, like, "bias");
}

LinearCall prepare_linear(const Tensor& x, const Tensor& codes, const Tensor& scale,
                          const std::optional<Tensor>& offset, const Tensor& codebook, int64_t in_features,
                          int64_t group_size, const std::optional<Tensor>& lora_A, const std::optional<Tensor>& lora_B,
                          double scaling, const std::optional<Tensor>& bias, bool transposed) {
  LinearCall call;
  LinearParams& p = call.params;
  p = LinearParams{};
  p.weight = packed_weight(codes, scale, offset, codebook, in_features, group_size, call.copies);
  const int64_t n = p.weight.n, k = p.weight.k, from = transposed ? n : k, to = transposed ? k : n;
  const Sizes sizes = x.sizes();
  const ScalarType type = x.dtype();
  LOFTQ_CHECK(!sizes.empty() && sizes.back() == from, "x has shape ", sizes, ", expected [..., ", from, "]");
  check_device(x, codes, "x");
  LOFTQ_CHECK(type == kFloat || type == kHalf || type == kBFloat16, "x has dtype ", type,
              "; expected float32, float16, bfloat16 or float64");
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = to;
  call.y = empty(shape, type, x.device());
  int64_t m = 1;
  for (const int64_t size : sizes.first(sizes.size() - 1)) m *= size;
  p.x = matrix_of(x, m, from, call.x, "x");
  p.y = call.y.mutable_data();
  p.scaling = static_cast<float>(scaling);
  check_adapter_and_bias(n, k, codes, lora_A, lora_B, bias);
  if (lora_A && lora_A->size(0) > 0) {
    p.lora_A = matrix_of(*lora_A, call.lora_A, "lora_A");
    p.lora_B = matrix_of(*lora_B, call.lora_B, "lora_B");
  }
  if (bias) {
    const Tensor& values = in_order(in_known_type(*bias, call.bias), call.bias);
    p.bias = values.const_data();
    p.bias_dtype = dtype_of(values.dtype(), "bias");
  }
  return call;
}

void check_adapter_grad(const Tensor& x, const Tensor& grad_y, const Tensor& lora_A, const Tensor& lora_B) {
  LOFTQ_CHECK(x.dim() > 0 && is_floating(x.dtype()), "x has shape ", x.sizes(), " and dtype ", x.dtype(),
              "; expected [..., K], floating point");
  const Sizes sizes = x.sizes();
  LOFTQ_CHECK(lora_B.dim() == 2, "lora_B has shape ", lora_B.sizes(), ", expected [N, rank]");
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = lora_B.size(0);
  check_operand(grad_y, Sizes(shape), x, "grad_y");
  check_adapter_and_bias(lora_B.size(0), sizes.back(), x, lora_A, lora_B, std::nullopt);
}

AdapterGradCall prepare_adapter_grad(const Tensor& x, const Tensor& grad_y, const Tensor& lora_A, const Tensor& lora_B,
                                     double scaling, bool need_A, bool need_B) {
  check_adapter_grad(x, grad_y, lora_A, lora_B);
  AdapterGradCall call;
  AdapterGradParams& p = call.params;
  p = AdapterGradParams{};
  const int64_t n = lora_B.size(0), k = lora_A.size(1), r = lora_A.size(0);
  int64_t m = 1;
  for (const int64_t size : x.sizes().first(x.sizes().size() - 1)) m *= size;
  p.x = matrix_of(x, m, k, call.x, "x");
  p.grad_y = matrix_of(grad_y, m, n, call.grad_y, "grad_y");
  p.lora_A = matrix_of(lora_A, call.lora_A, "lora_A");
  p.lora_B = matrix_of(lora_B, call.lora_B, "lora_B");
  p.scaling = static_cast<float>(scaling);
  const auto computed = [](const Tensor& t) { return t.dtype() == kDouble ? kFloat : t.dtype(); };
  call.grad_A = need_A ? empty({r, k}, computed(lora_A), x.device()) : empty({0}, computed(lora_A), x.device());
  call.grad_B = need_B ? empty({n, r}, computed(lora_B), x.device()) : empty({0}, computed(lora_B), x.device());
  p.grad_A = need_A ? call.grad_A.mutable_data() : nullptr;
  p.grad_B = need_B ? call.grad_B.mutable_data() : nullptr;
  p.grad_A_dtype = dtype_of(call.grad_A.dtype(), "lora_A");
  p.grad_B_dtype = dtype_of(call.grad_B.dtype(), "lora_B");
  return call;
}

PackCall prepare_pack(const Tensor& codes, int64_t bits) {
  check_bits(bits);
  check_bytes(codes, "codes");
  PackCall call;
  const int width = static_cast<int>(bits);
  const int64_t n = codes.size(0), k = codes.size(1);
  call.packed = empty({n, row_bytes(k, width)}, kByte, codes.device());
  call.params = {in_order(codes, call.codes).const_data<uint8_t>(), n, k, width, call.packed.mutable_data<uint8_t>()};
  return call;
}

UnpackCall prepare_unpack(const Tensor& packed, int64_t bits, int64_t in_features) {
  check_bits(bits);
  check_bytes(packed, "packed");
  const int width = static_cast<int>(bits);
  const bool consistent =
      in_features >= 0 && in_features < kMostColumns && packed.size(1) == row_bytes(in_features, width);
  LOFTQ_CHECK(consistent, "packed has shape ", packed.sizes(), ", which does not hold in_features=", in_features,
              " at bits=", bits);
  UnpackCall call;
  const int64_t n = packed.size(0);
  call.codes = empty({n, in_features}, kByte, packed.device());
  call.params = {in_order(packed, call.packed).const_data<uint8_t>(), n, in_features, width,
                 call.codes.mutable_data<uint8_t>()};
  return call;
}

}  // namespace loftq::bindings
