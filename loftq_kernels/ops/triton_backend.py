"""The ops on CUDA tensors by Triton kernels. Triton is imported at the first call, never with the package.

With TRITON_INTERPRET=1 the same functions take CPU tensors, for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loftq_kernels.ops import checks, extension, reference
from loftq_kernels.ops.schemas import NAMESPACE
from loftq_kernels.ops.triton_routes import DTYPES, check_scale_dtype, products, route_of, unavailable


def dequantize(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """As `reference.dequantize`, bit for bit."""
    checks.check_packed(codes, scale, offset, codebook, in_features, group_size)
    check_scale_dtype(scale)
    if dtype not in DTYPES or unavailable(codes.device):
        _warn_unavailable(codes.device)
        return reference.dequantize(codes, scale, offset, codebook, in_features, group_size, dtype)
    return products().dequantize((codes, scale, offset, codebook, group_size), in_features, dtype)


def qlora_linear(
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
    path: str | None = None,
) -> Tensor:
    """As `reference.qlora_linear`. path: "decode", "prefill" or "chunked" instead of what `paths` chooses."""
    weight = codes, scale, offset, codebook, group_size
    route = route_of(x, *weight, lora_A, lora_B, None, bias, path)
    if route == "reference":
        _warn_unavailable(x.device)
        return reference.qlora_linear(x, *weight, lora_A, lora_B, scaling, bias, dequantize=_dequantize)
    leaves = x, lora_A, lora_B, bias
    if x.device.type == "cpu" and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves):
        raise RuntimeError("backend='triton' on CPU tensors is for tests and has no derivatives: use torch.no_grad()")
    if not isinstance(route, str):
        return products().decode(route, x, weight, lora_A, lora_B, None, scaling, bias)
    if lora_A is not None:
        lora_A, lora_B = lora_A.unsqueeze(0), lora_B.unsqueeze(0)
    return products().large_linear(x, weight, lora_A, lora_B, None, scaling, bias, route)


def qlora_linear_multi(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    group_size: int,
    lora_A: Tensor,
    lora_B: Tensor,
    adapter_ids: Tensor,
    scaling: float,
    bias: Tensor | None,
    *,
    path: str | None = None,
) -> Tensor:
    """As `reference.qlora_linear_multi`. A row whose id is below -1, or not below the number of adapters, becomes NaN,
    also where there are no adapters or all have rank 0."""
    weight = codes, scale, offset, codebook, group_size
    route = route_of(x, *weight, lora_A, lora_B, adapter_ids, bias, path)
    if route == "reference":
        _warn_unavailable(x.device)
        return reference.qlora_linear_multi(
            x, *weight, lora_A, lora_B, adapter_ids, scaling, bias, dequantize=_dequantize
        )
    if 0 in lora_A.shape[:2]:  # The kernels are launched without adapters, and so without ids.
        y = qlora_linear(x, *weight, None, None, scaling, bias, path=path)
        wrong = (adapter_ids < -1) | (adapter_ids >= lora_A.shape[0])
        return y.masked_fill_(wrong.unsqueeze(-1), float("nan"))
    adapter_ids = adapter_ids.reshape(-1).contiguous()
    if not isinstance(route, str):
        return products().decode(route, x, weight, lora_A, lora_B, adapter_ids, scaling, bias)
    return products().large_linear(x, weight, lora_A, lora_B, adapter_ids, scaling, bias, route)


def qlora_linear_grad_input(
    grad_y: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    in_features: int,
    group_size: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    *,
    path: str | None = None,
) -> Tensor:
    """As `reference.qlora_linear_grad_input`. path: "fused" or "chunked" instead of what `paths` chooses."""
    checks.check_grad_input(grad_y, codes, scale, offset, codebook, in_features, group_size, lora_A, lora_B)
    check_scale_dtype(scale)
    if grad_y.dtype not in DTYPES or unavailable(grad_y.device):
        _warn_unavailable(grad_y.device)
        return reference.qlora_linear_grad_input(
            *(grad_y, codes, scale, offset, codebook, in_features, group_size, lora_A, lora_B, scaling),
            dequantize=_dequantize,
        )
    weight = codes, scale, offset, codebook, group_size
    return products().grad_input(grad_y, weight, in_features, lora_A, lora_B, scaling, path)


def _dequantize(*args) -> Tensor:
    return torch.ops.loftq_kernels.dequantize(*args)


def _warn_unavailable(device: torch.device) -> None:
    reason = unavailable(device)
    if reason is not None:
        extension.warn_slow(device.type, reason)


registered: set[str] = set()  # Ops whose CUDA kernels are these functions.


def _register() -> None:
    """Register the CUDA kernels of the ops, dequantize only where the extension was built without its own."""
    for kernel in (qlora_linear, qlora_linear_multi, qlora_linear_grad_input, dequantize):
        name = f"{NAMESPACE}::{kernel.__name__}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
            torch.library.impl(name, "CUDA", kernel)
            registered.add(kernel.__name__)


_register()
