"""Wrappers of the ops on raw tensors: check the arguments once, choose the backend, call the op."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from loftq_kernels.ops import checks, differentiation, reference, triton_backend
from loftq_kernels.ops.backends import kernels_of
from loftq_kernels.ops.constant import Constant
from loftq_kernels.ops.values import check_scales, kernel_dtype

# An argument of any other type may be a tensor subclass that wants to see the op.
_PLAIN_TYPES = frozenset((type(None), Tensor, torch.nn.Parameter, Constant))


def quantize_tensors(
    weight: Tensor,
    codebook: Tensor,
    group_size: int,
    scale_rule: str,
    scale_dtype: torch.dtype,
    scale_search: bool,
    *,
    backend: str | None = None,
    name: str = "weight",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """weight [N, K] -> codes, scale, offset (None unless affine). The algorithm is stated in `reference.quantize`.

    Raises ValueError for NaN or Inf in weight (naming the row), a meta tensor, or scales that do not fit scale_dtype;
    RuntimeError for a weight with a tangent, or within a transform of torch.func.
    """
    checks.check_quantize(weight, codebook, group_size, scale_rule, scale_dtype, scale_search)
    if weight.is_meta:
        raise ValueError(f"{name} {tuple(weight.shape)} is on the meta device: it has no values")
    if backend == "triton":
        raise ValueError("backend='triton' has kernels for products and dequantize; quantize has none there")
    weight = differentiation.to_quantize(name, weight)
    # A backward cannot save tensors made in inference mode.
    with differentiation.outside_transforms(), torch.inference_mode(False):
        weight = kernel_dtype(weight, name)
        codes, scale, offset = kernels_of(backend, weight.device).quantize(
            weight, codebook, group_size, scale_rule, scale_dtype, scale_search
        )
        affine = offset if scale_rule == "minmax" else None
        check_scales(weight, scale, affine, group_size, name)
        return codes, scale, affine


def linear_tensors(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    group_size: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    bias: Tensor | None,
    *,
    in_features: int,
    backend: str | None = None,
) -> Tensor:
    """`qlora_linear` on the stored tensors.

    A decode step calls it hundreds of times. So the kernels check only what protects memory, and the full checks run
    after a kernel has refused, to find the reason.
    """
    args = codes, scale, offset, codebook, group_size, lora_A, lora_B
    if scale.dtype == torch.float64:
        return _wide_linear(x, *args, scaling, bias, in_features=in_features, backend=backend)
    checks.check_floating("x", x)
    if backend is not None or torch.compiler.is_compiling() or x.shape[-1:] != (in_features,):
        checks.check_qlora_linear(x, *args[:4], in_features, *args[4:], bias)
        return kernels_of(backend, x.device).qlora_linear(autocast(x), *args, float(scaling), bias)
    product = _product(x, codes, lora_A, lora_B, bias)
    try:
        return product(autocast(x), *args, float(scaling), bias)
    except Exception:
        checks.check_qlora_linear(x, *args[:4], in_features, *args[4:], bias)
        raise


def _product(
    x: Tensor, codes: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, bias: Tensor | None
) -> Callable[..., Tensor]:
    """The op, or what it would only call: through the dispatcher that takes as long as a small product, or longer."""
    if not _is_unseen(x, codes, lora_A, lora_B, bias):
        return torch.ops.loftq_kernels.qlora_linear
    if x.is_cpu:
        return _below_autograd
    by_hand = x.is_cuda and "qlora_linear" in triton_backend.registered
    return triton_backend.qlora_linear if by_hand else torch.ops.loftq_kernels.qlora_linear


def _below_autograd(*args) -> Tensor:
    """The op without its kernel for derivatives, which is Python."""
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.loftq_kernels.qlora_linear.default(*args)


def _wide_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    group_size: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    bias: Tensor | None,
    *,
    in_features: int,
    backend: str | None,
) -> Tensor:
    """The product with float64 scales, which no kernel reads: plain torch for float64 x, rounded scales for other x."""
    adapter = lora_A, lora_B, scaling, bias
    checks.check_qlora_linear(x, codes, scale, offset, codebook, in_features, group_size, lora_A, lora_B, bias)
    if x.dtype == torch.float64:
        return reference.qlora_linear(x, codes, scale, offset, codebook, group_size, *adapter)
    scale, offset = narrow(scale, x.dtype), narrow(offset, x.dtype)
    return linear_tensors(
        x, codes, scale, offset, codebook, group_size, *adapter, in_features=in_features, backend=backend
    )


def narrow(stored: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Float64 scales or offsets, rounded to float32 unless x, of the given dtype, is float64."""
    return stored if stored is None or dtype == torch.float64 else stored.float()


def _is_unseen(x: Tensor, codes: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, bias: Tensor | None) -> bool:
    """Whether nothing but the kernel has to see the product.

    That is so for plain tensors when no gradient or tangent is wanted, and no mode (fake tensors, tracing, functorch)
    is on.
    """
    if type(x) is not Tensor:
        return False
    if not _PLAIN_TYPES.issuperset((type(codes), type(lora_A), type(lora_B), type(bias))):
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, lora_A, lora_B, bias)):
        return False
    return (
        not differentiation.forward_mode()  # It is also true under any dispatch mode.
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()
    )


def autocast(x: Tensor) -> Tensor:
    if x.is_meta or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def full_precision(tensor: Tensor) -> AbstractContextManager:
    """Where sums of float32 stay in float32: autocast, if it is on, is switched off."""
    kind = tensor.device.type
    if tensor.is_meta or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def dequantize_tensors(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
    *,
    backend: str | None = None,
) -> Tensor:
    """``codebook[codes] * scale + offset`` [N, K], computed in float32 (float64 for float64), rounded once to dtype."""
    checks.check_packed(codes, scale, offset, codebook, in_features, group_size)
    if not dtype.is_floating_point:
        raise TypeError(f"dequantize to dtype={dtype}: a floating-point dtype is needed")
    if scale.dtype == torch.float64:  # The kernels do not read float64 scales.
        wide = reference.dequantize(codes, scale, offset, codebook, in_features, group_size, torch.float64)
        return wide.to(dtype)
    return kernels_of(backend, codes.device).dequantize(codes, scale, offset, codebook, in_features, group_size, dtype)
