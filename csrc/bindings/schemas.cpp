// The schemas of the ops for programs without Python, where loftq_kernels/ops/schemas.py does not define them. Linked
// into the library that CMake builds, and not into the one of the Python package. A test compares the two.
#include "aten/library.h"

namespace loftq::bindings {

namespace {

constexpr const char* kSchemas[] = {
    "quantize(Tensor weight, Tensor codebook, int group_size, str scale_rule, ScalarType scale_dtype, bool "
    "scale_search) -> (Tensor codes, Tensor scale, Tensor offset)",
    "quantize_residual_(Tensor weight, Tensor(a!) low_rank, Tensor codebook, int group_size, str scale_rule, "
    "ScalarType scale_dtype, bool scale_search) -> (Tensor codes, Tensor scale, Tensor offset, Tensor norm2)",
    "dequantize(Tensor codes, Tensor scale, Tensor? offset, Tensor codebook, int in_features, int group_size, "
    "ScalarType dtype) -> Tensor",
    "pack_codes(Tensor codes, int bits) -> Tensor",
    "unpack_codes(Tensor packed, int bits, int in_features) -> Tensor",
    "qlora_linear(Tensor x, Tensor codes, Tensor scale, Tensor? offset, Tensor codebook, int group_size, Tensor? "
    "lora_A, Tensor? lora_B, float scaling, Tensor? bias) -> Tensor",
    "qlora_linear_grad_input(Tensor grad_y, Tensor codes, Tensor scale, Tensor? offset, Tensor codebook, int "
    "in_features, int group_size, Tensor? lora_A, Tensor? lora_B, float scaling) -> Tensor",
    "adapter_grad(Tensor x, Tensor grad_y, Tensor lora_A, Tensor lora_B, float scaling, bool need_A, bool need_B) -> "
    "(Tensor grad_A, Tensor grad_B)",
    "qlora_linear_multi(Tensor x, Tensor codes, Tensor scale, Tensor? offset, Tensor codebook, int group_size, Tensor "
    "lora_A, Tensor lora_B, Tensor adapter_ids, float scaling, Tensor? bias) -> Tensor",
    "jacobi_eigh(Tensor a) -> (Tensor values, Tensor vectors, Tensor info)",
    "jacobi_svd(Tensor a) -> (Tensor u, Tensor values, Tensor v, Tensor info)",
    "cholesky_inverse_factor(Tensor gram) -> (Tensor r_inverse, Tensor info)",
};

aten::Library defined() {
  aten::Library library = aten::Library::ops();
  for (const char* schema : kSchemas) library.define(schema);
  return library;
}

const aten::Registration registration(defined);

}  // namespace

}  // namespace loftq::bindings
