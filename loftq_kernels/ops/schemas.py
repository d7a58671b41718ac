"""Every op, defined once: schema, shape inference (fake kernel) and the plain-torch reference as its default kernel.

The C++ extension registers CPU kernels for the same schemas; the dispatcher prefers them over the default.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from loftq_kernels.ops import checks, extension, reference, small_matrix
from loftq_kernels.storage import packing

NAMESPACE = "loftq_kernels"

# codes [N, K_pad * b / 8] uint8, scale and offset [N, G], codebook [2^b] float32;
# x [..., K], lora_A [r, K], lora_B [N, r]
_PACKED = "Tensor codes, Tensor scale, Tensor? offset, Tensor codebook"
_LORA = "Tensor? lora_A, Tensor? lora_B, float scaling"
_QUANTIZE = "Tensor codebook, int group_size, str scale_rule, ScalarType scale_dtype, bool scale_search"


def _define(name: str, signature: str, default: Callable) -> Callable:
    """Define ``loftq_kernels::name`` with `default` for every device; the decorated function is its fake kernel."""
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, signature)

    def register(fake: Callable) -> Callable:
        def serve_by_reference(*args):
            extension.warn_slow(next(arg for arg in args if isinstance(arg, Tensor)).device.type)
            # The fake kernel runs the checks.
            fake(*(arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args))
            return default(*args)

        torch.library.impl(qualified, "CompositeExplicitAutograd", serve_by_reference)
        return torch.library.register_fake(qualified)(fake)

    return register


@_define("quantize", f"(Tensor weight, {_QUANTIZE}) -> (Tensor codes, Tensor scale, Tensor offset)", reference.quantize)
def _quantize_fake(weight, codebook, group_size, scale_rule, scale_dtype, scale_search):
    checks.check_quantize(weight, codebook, group_size, scale_rule, scale_dtype, scale_search)
    rows, columns = weight.shape
    codes = weight.new_empty(rows, packing.row_bytes(columns, checks.bits_of(codebook)), dtype=torch.uint8)
    scale = weight.new_empty(rows, packing.num_groups(columns, group_size), dtype=scale_dtype)
    return codes, scale, torch.empty_like(scale) if scale_rule == "minmax" else scale.new_empty(0)


@_define(
    "quantize_residual_",
    f"(Tensor weight, Tensor(a!) low_rank, {_QUANTIZE}) -> (Tensor codes, Tensor scale, Tensor offset, Tensor norm2)",
    reference.quantize_residual_,
)
def _quantize_residual_fake(weight, low_rank, codebook, group_size, scale_rule, scale_dtype, scale_search):
    checks.check_low_rank(weight, low_rank)
    stored = _quantize_fake(weight, codebook, group_size, scale_rule, scale_dtype, scale_search)
    return *stored, weight.new_empty((), dtype=torch.float64)


@_define(
    "dequantize",
    f"({_PACKED}, int in_features, int group_size, ScalarType dtype) -> Tensor",
    reference.dequantize,
)
def _dequantize_fake(codes, scale, offset, codebook, in_features, group_size, dtype):
    checks.check_packed(codes, scale, offset, codebook, in_features, group_size)
    return codes.new_empty(codes.shape[0], in_features, dtype=dtype)


@_define("pack_codes", "(Tensor codes, int bits) -> Tensor", packing.pack_codes)
def _pack_codes_fake(codes, bits):
    packing.check_bits(bits)
    return codes.new_empty(codes.shape[0], packing.row_bytes(codes.shape[1], bits))


@_define("unpack_codes", "(Tensor packed, int bits, int in_features) -> Tensor", packing.unpack_codes)
def _unpack_codes_fake(packed, bits, in_features):
    packing.check_bits(bits)
    if packed.shape[1] != packing.row_bytes(in_features, bits):
        raise ValueError(f"packed has shape {tuple(packed.shape)}, not {in_features} columns of {bits} bits")
    return packed.new_empty(packed.shape[0], in_features)


def _dequantize(*args) -> Tensor:
    """Dequantize by the kernel of the tensors' device, for matmul ops without a kernel of their own."""
    return torch.ops.loftq_kernels.dequantize(*args)


@_define(
    "qlora_linear",
    f"(Tensor x, {_PACKED}, int group_size, {_LORA}, Tensor? bias) -> Tensor",
    partial(reference.qlora_linear, dequantize=_dequantize),
)
def _qlora_linear_fake(x, codes, scale, offset, codebook, group_size, lora_A, lora_B, scaling, bias):
    checks.check_qlora_linear(x, codes, scale, offset, codebook, x.shape[-1], group_size, lora_A, lora_B, bias)
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@_define(
    "qlora_linear_grad_input",
    f"(Tensor grad_y, {_PACKED}, int in_features, int group_size, {_LORA}) -> Tensor",
    partial(reference.qlora_linear_grad_input, dequantize=_dequantize),
)
def _qlora_linear_grad_input_fake(
    grad_y, codes, scale, offset, codebook, in_features, group_size, lora_A, lora_B, scaling
):
    checks.check_grad_input(grad_y, codes, scale, offset, codebook, in_features, group_size, lora_A, lora_B)
    return grad_y.new_empty(*grad_y.shape[:-1], in_features)


@_define(
    "adapter_grad",
    "(Tensor x, Tensor grad_y, Tensor lora_A, Tensor lora_B, float scaling, bool need_A, bool need_B) -> "
    "(Tensor grad_A, Tensor grad_B)",
    reference.adapter_grad,
)
def _adapter_grad_fake(x, grad_y, lora_A, lora_B, scaling, need_A, need_B):
    checks.check_adapter_grad(x, grad_y, lora_A, lora_B)
    return lora_A.new_empty(lora_A.shape if need_A else 0), lora_B.new_empty(lora_B.shape if need_B else 0)


def _qlora_linear_multi(
    x, codes, scale, offset, codebook, group_size, lora_A, lora_B, adapter_ids, scaling, bias
) -> Tensor:
    """Compute the base product by the kernel of the tensors' device, and the adapters in plain torch."""
    checks.check_adapter_ids(adapter_ids, lora_A.shape[0])
    base = torch.ops.loftq_kernels.qlora_linear(x, codes, scale, offset, codebook, group_size, None, None, 0.0, bias)
    return reference.add_adapters(base, x, lora_A, lora_B, adapter_ids, scaling)


@_define(
    "qlora_linear_multi",
    f"(Tensor x, {_PACKED}, int group_size, Tensor lora_A, Tensor lora_B, Tensor adapter_ids, float scaling, "
    "Tensor? bias) -> Tensor",
    _qlora_linear_multi,
)
def _qlora_linear_multi_fake(x, codes, scale, offset, codebook, group_size, lora_A, lora_B, adapter_ids, scaling, bias):
    checks.check_qlora_linear_multi(x, codes, scale, offset, codebook, group_size, lora_A, lora_B, adapter_ids, bias)
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@_define("jacobi_eigh", "(Tensor a) -> (Tensor values, Tensor vectors, Tensor info)", small_matrix.jacobi_eigh)
def _jacobi_eigh_fake(a):
    checks.check_matrices("a", a, square=True)
    return a.new_empty(a.shape[:2]), a.new_empty(a.shape), a.new_empty(a.shape[0], dtype=torch.int32)


@_define("jacobi_svd", "(Tensor a) -> (Tensor u, Tensor values, Tensor v, Tensor info)", small_matrix.jacobi_svd)
def _jacobi_svd_fake(a):
    checks.check_matrices("a", a, square=False)
    batch, _, columns = a.shape
    values, v = a.new_empty(batch, columns), a.new_empty(batch, columns, columns)
    return a.new_empty(a.shape), values, v, a.new_empty(batch, dtype=torch.int32)


@_define(
    "cholesky_inverse_factor",
    "(Tensor gram) -> (Tensor r_inverse, Tensor info)",
    small_matrix.cholesky_inverse_factor,
)
def _cholesky_inverse_factor_fake(gram):
    checks.check_matrices("gram", gram, square=True)
    return gram.new_empty(gram.shape, dtype=torch.float32), gram.new_empty(gram.shape[0], dtype=torch.int32)


def names() -> tuple[str, ...]:
    """The ops defined above."""
    return (
        "quantize",
        "quantize_residual_",
        "dequantize",
        "pack_codes",
        "unpack_codes",
        "qlora_linear",
        "qlora_linear_grad_input",
        "adapter_grad",
        "qlora_linear_multi",
        "jacobi_eigh",
        "jacobi_svd",
        "cholesky_inverse_factor",
    )
