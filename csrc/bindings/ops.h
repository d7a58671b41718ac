// What the ops of every device share: tensors checked for memory safety, turned into the kernels' plain parameters.
// The Python package checks arguments for meaning before; these checks keep a direct call from reading wild memory.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string_view>

#include "loftq/cpu.h"
#include "loftq/linear.h"
#include "loftq/quantize.h"

namespace loftq::bindings {

// Throws ValueError with the reason that a launch_* returned, if it returned one.
void raise_if(Status status);

// A quantize call: its parameters, with the tensors that they point into.
struct QuantizeCall {
  at::Tensor weight;    // [N, K], last stride 1
  at::Tensor codebook;  // [2^bits] float32
  at::Tensor codes;     // [N, row_bytes] uint8
  at::Tensor scale;     // [N, G]
  at::Tensor offset;    // [N, G], or [0] where the rule has none
  QuantizeParams params;
};

QuantizeCall prepare_quantize(const at::Tensor& weight, const at::Tensor& codebook, int64_t group_size,
                              std::string_view scale_rule, at::ScalarType scale_dtype, bool scale_search);

// The same, but the kernel replaces low_rank [N, K] by the residual and stores its squared row norms in norms [N].
QuantizeCall prepare_quantize_residual(const at::Tensor& weight, const at::Tensor& low_rank, const at::Tensor& codebook,
                                       int64_t group_size, std::string_view scale_rule, at::ScalarType scale_dtype,
                                       bool scale_search, const at::Tensor& norms);

struct DequantizeCall {
  at::Tensor codes, scale, offset, codebook;
  at::Tensor out;  // [N, in_features]
  DequantizeParams params;
};

DequantizeCall prepare_dequantize(const at::Tensor& codes, const at::Tensor& scale,
                                  const std::optional<at::Tensor>& offset, const at::Tensor& codebook,
                                  int64_t in_features, int64_t group_size, at::ScalarType dtype);

// codebook[codes] * scale + offset [N, in_features] in float64, computed by ATen, for checking other results. `call`
// must be prepared for float32; `unpacked` holds its codes, one per byte.
at::Tensor dequantize_float64(const DequantizeCall& call, const at::Tensor& unpacked);

// The product of x [..., K] with a packed weight, or with its transpose (x [..., N]), in the dtype of x: float32,
// float16 or bfloat16.
struct LinearCall {
  at::Tensor x;  // [M, K] or [M, N], last stride 1
  at::Tensor codes, scale, offset, codebook, lora_A, lora_B, bias;
  at::Tensor y;  // [..., N] or [..., K]
  LinearParams params;
};

// Refuses an adapter or a bias that does not fit a weight [n, k], is not on the device of `like`, or is not floating
// point.
void check_adapter_and_bias(int64_t n, int64_t k, const at::Tensor& like, const std::optional<at::Tensor>& lora_A,
                            const std::optional<at::Tensor>& lora_B, const std::optional<at::Tensor>& bias);

LinearCall prepare_linear(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scale,
                          const std::optional<at::Tensor>& offset, const at::Tensor& codebook, int64_t in_features,
                          int64_t group_size, const std::optional<at::Tensor>& lora_A,
                          const std::optional<at::Tensor>& lora_B, double scaling,
                          const std::optional<at::Tensor>& bias, bool transposed);

struct PackCall {
  at::Tensor codes;   // [N, K] uint8
  at::Tensor packed;  // [N, row_bytes] uint8
  PackParams params;
};

PackCall prepare_pack(const at::Tensor& codes, int64_t bits);

struct UnpackCall {
  at::Tensor packed;  // [N, row_bytes] uint8
  at::Tensor codes;   // [N, in_features] uint8
  UnpackParams params;
};

UnpackCall prepare_unpack(const at::Tensor& packed, int64_t bits, int64_t in_features);

}  // namespace loftq::bindings
