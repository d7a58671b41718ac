// What the ops of every device share: tensors checked for memory safety, turned into the kernels' plain parameters.
// The Python package checks arguments for meaning before; these checks keep a direct call from reading wild memory.
#pragma once

#include <optional>
#include <string>

#include "aten/tensor.h"
#include "loftq/cpu.h"
#include "loftq/linear.h"
#include "loftq/quantize.h"

namespace loftq::bindings {

using namespace aten;

// Throws ValueError with the reason that a launch_* returned, if it returned one.
void raise_if(Status status);

// The calls below hold parameters that point into the arguments, which therefore must outlive them, and into tensors of
// their own: results, and copies of arguments that the kernels cannot read as they are.

struct QuantizeCall {
  Tensor weight, codebook;  // copies of [N, K], last stride 1; [2^bits]
  Tensor codes;             // [N, row_bytes] uint8
  Tensor scale;             // [N, G]
  Tensor offset;            // [N, G], or [0] where the rule has none
  QuantizeParams params;
};

QuantizeCall prepare_quantize(const Tensor& weight, const Tensor& codebook, int64_t group_size,
                              const std::string& scale_rule, ScalarType scale_dtype, bool scale_search);

// The same, but the kernel replaces low_rank [N, K] by the residual and stores its squared row norms in norms [N].
QuantizeCall prepare_quantize_residual(const Tensor& weight, const Tensor& low_rank, const Tensor& codebook,
                                       int64_t group_size, const std::string& scale_rule, ScalarType scale_dtype,
                                       bool scale_search, const Tensor& norms);

// Copies of the tensors of a packed weight.
struct PackedCopies {
  Tensor codes, scale, offset, codebook;
};

struct DequantizeCall {
  PackedCopies copies;
  Tensor out;  // [N, in_features]
  DequantizeParams params;
};

DequantizeCall prepare_dequantize(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& offset,
                                  const Tensor& codebook, int64_t in_features, int64_t group_size, ScalarType dtype);

// codebook[codes] * scale + offset [N, in_features] in float64, computed by ATen, for checking other results; the
// tensors are checked already, and `unpacked` holds the codes, one per byte.
Tensor dequantize_float64(const Tensor& unpacked, const Tensor& scale, const std::optional<Tensor>& offset,
                          const Tensor& codebook, int64_t group_size);

// The product of x [..., K] with a packed weight, or with its transpose (x [..., N]), in the dtype of x: float32,
// float16 or bfloat16.
struct LinearCall {
  PackedCopies copies;
  Tensor x, lora_A, lora_B, bias;  // copies
  Tensor y;                        // [..., N] or [..., K]
  LinearParams params;
};

// Refuses an adapter or a bias that does not fit a weight [n, k], is not on the device of `like`, or is not floating
// point.
void check_adapter_and_bias(int64_t n, int64_t k, const Tensor& like, const std::optional<Tensor>& lora_A,
                            const std::optional<Tensor>& lora_B, const std::optional<Tensor>& bias);

LinearCall prepare_linear(const Tensor& x, const Tensor& codes, const Tensor& scale,
                          const std::optional<Tensor>& offset, const Tensor& codebook, int64_t in_features,
                          int64_t group_size, const std::optional<Tensor>& lora_A, const std::optional<Tensor>& lora_B,
                          double scaling, const std::optional<Tensor>& bias, bool transposed);

// The gradients of an adapter, for x [..., K] and grad_y [..., N] in float32, float16 or bfloat16.
struct AdapterGradCall {
  Tensor x, grad_y, lora_A, lora_B;  // copies
  Tensor grad_A, grad_B;             // [r, K] and [N, r], or [0] where not needed; float32 for a float64 adapter
  AdapterGradParams params;
};

// Refuses tensors that do not fit together.
void check_adapter_grad(const Tensor& x, const Tensor& grad_y, const Tensor& lora_A, const Tensor& lora_B);

AdapterGradCall prepare_adapter_grad(const Tensor& x, const Tensor& grad_y, const Tensor& lora_A, const Tensor& lora_B,
                                     double scaling, bool need_A, bool need_B);

struct PackCall {
  Tensor codes;   // a copy of [N, K]
  Tensor packed;  // [N, row_bytes] uint8
  PackParams params;
};

PackCall prepare_pack(const Tensor& codes, int64_t bits);

struct UnpackCall {
  Tensor packed;  // a copy of [N, row_bytes]
  Tensor codes;   // [N, in_features] uint8
  UnpackParams params;
};

UnpackCall prepare_unpack(const Tensor& packed, int64_t bits, int64_t in_features);

}  // namespace loftq::bindings
