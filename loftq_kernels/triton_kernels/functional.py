"""The kernels as functions of tensors, for who has this folder alone: checked, with derivatives, without torch.library.

    y = x @ (codebook[codes] * scale + offset).T + scaling * (x @ lora_A.T) @ lora_B.T + bias

codes [N, K_pad * b / 8] uint8 hold b-bit codes (K_pad: K rounded up to a multiple of 64; byte j of tile t has the codes
of columns 64 t + j + i * 8 b, i = 0 .. 8 / b - 1, from the low bits up); scale and offset [N, G] float16, bfloat16 or
float32, one per group of `group_size` columns (-1: one per row), offset None for none; codebook [2^b] float32.

`loftq_kernels` itself does not use this file: its ops check, derive and choose for all devices.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import products
from .contract import BITS, GROUP_SIZES, bits_of, num_groups, row_bytes
from .device import OLDEST, device_of
from .products import DTYPES


def qlora_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    group_size: int,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    adapter_ids: Tensor | None = None,
    scaling: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """y [..., N] for x [..., K] in float16, bfloat16 or float32, by whichever kernel is fastest for the shape.

    lora_A [r, K] and lora_B [N, r], any floating dtype; or lora_A [S, r, K], lora_B [S, N, r] and adapter_ids [...]
    int32 or int64 as the leading dimensions of x: which of the S adapters a row has, -1 for none; a row with any other
    id becomes NaN. bias [N].

    Differentiable once, in x, lora_A, lora_B and bias. Raises ValueError for shapes, dtypes and devices that do not
    fit, and RuntimeError if a gradient is wanted with adapter_ids.
    """
    weight = codes, scale, offset, codebook, group_size
    _check_weight(weight, x.shape[-1] if x.dim() else 0)
    _check_rows("x", x, codes)
    _check_adapters(lora_A, lora_B, adapter_ids, x, codes)
    _require("bias", bias is None or bias.shape == codes.shape[:1], bias, f"[{codes.shape[0]}]")
    differentiable = x, lora_A, lora_B, bias
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        if adapter_ids is not None:
            raise RuntimeError("adapter_ids is for inference: call it within torch.no_grad()")
        return _Linear.apply(x, weight, lora_A, lora_B, scaling, bias)
    return _linear(x, weight, lora_A, lora_B, adapter_ids, scaling, bias)


def qlora_linear_grad_input(
    grad_y: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    in_features: int,
    group_size: int,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """grad_x [..., in_features] = grad_y @ W + scaling * (grad_y @ lora_B) @ lora_A. Raises as `qlora_linear`."""
    weight = codes, scale, offset, codebook, group_size
    _check_weight(weight, in_features)
    _check_rows("grad_y", grad_y, codes)
    _require("grad_y", grad_y.dim() and grad_y.shape[-1] == codes.shape[0], grad_y, f"[..., {codes.shape[0]}]")
    _check_adapters(lora_A, lora_B, None, grad_y, codes, in_features)
    with torch.no_grad():
        return products.grad_input(grad_y, weight, in_features, lora_A, lora_B, scaling)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """codebook[codes] * scale + offset [N, in_features], in float32, rounded once to dtype.

    Raises ValueError as `qlora_linear`.
    """
    weight = codes, scale, offset, codebook, group_size
    _check_weight(weight, in_features)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is not one of {DTYPES}")
    return products.dequantize(weight, in_features, dtype)


def _linear(x, weight, lora_A, lora_B, adapter_ids, scaling, bias) -> Tensor:
    path = products.choose_linear(x, weight)
    ids = None if adapter_ids is None else adapter_ids.reshape(-1).contiguous()
    if path == "decode":
        plan = products.decode_plan(x, weight, lora_A, lora_B, ids, bias)
        return products.decode(plan, x, weight, lora_A, lora_B, ids, scaling, bias)
    if lora_A is not None and lora_A.dim() == 2:
        lora_A, lora_B = lora_A.unsqueeze(0), lora_B.unsqueeze(0)
    return products.large_linear(x, weight, lora_A, lora_B, ids, scaling, bias, path)


class _Linear(torch.autograd.Function):
    """dL/dx = g W + s (g B) A, dL/dA = s (g B)^T x, dL/dB = s g^T (x A^T), dL/dbias = sum of g over rows."""

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, scaling, bias) -> Tensor:
        ctx.save_for_backward(x if lora_A is not None else None, *weight[:4], lora_A, lora_B)
        ctx.group_size, ctx.scaling, ctx.in_features = weight[4], scaling, x.shape[-1]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _linear(x, weight, lora_A, lora_B, None, scaling, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        x, *weight, lora_A, lora_B = ctx.saved_tensors
        need, s = ctx.needs_input_grad, ctx.scaling
        grad_x = grad_A = grad_B = grad_bias = None
        if need[0]:
            stored = *weight, ctx.group_size
            grad_x = products.grad_input(grad_y, stored, ctx.in_features, lora_A, lora_B, s)
        g = grad_y.reshape(-1, grad_y.shape[-1])
        if need[2]:
            grad_A = ((s * (g @ lora_B.to(g.dtype))).T @ x.reshape(-1, x.shape[-1])).to(lora_A.dtype)
        if need[3]:
            grad_B = (g.T @ (s * (x.reshape(-1, x.shape[-1]) @ lora_A.to(g.dtype).T))).to(lora_B.dtype)
        if need[5]:
            grad_bias = g.sum(0, dtype=ctx.bias_dtype)
        return grad_x, None, grad_A, grad_B, None, grad_bias


def _require(name: str, holds, tensor: Tensor, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected {expected}")


def _check_weight(weight: tuple, in_features: int) -> None:
    """What keeps the kernels within the tensors: shapes, dtypes and devices."""
    codes, scale, offset, codebook, group_size = weight
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size={group_size!r} is not one of {GROUP_SIZES}")
    bits = bits_of(codebook)
    one_of = f"float32 [2^bits] on {codes.device}, bits one of {BITS}"
    fits = codebook.dtype == torch.float32 and codebook.device == codes.device
    _require("codebook", fits and bits in BITS and codebook.shape == (2**bits,), codebook, one_of)
    size = row_bytes(in_features, bits)
    _require("codes", codes.dtype == torch.uint8 and codes.shape[1:] == (size,), codes, f"uint8 [N, {size}]")
    groups = codes.shape[0], num_groups(in_features, group_size)
    for name, tensor in (("scale", scale), ("offset", offset)):
        if tensor is not None:
            fits = tensor.shape == groups and tensor.dtype in DTYPES and tensor.dtype == scale.dtype
            expected = f"{list(groups)} on {codes.device}, of one of {DTYPES} and the dtype of scale"
            _require(name, fits and tensor.device == codes.device, tensor, expected)
    if codes.is_cuda and device_of(codes.device).capability < OLDEST:
        raise ValueError(f"{codes.device} is too old: the kernels need compute capability {OLDEST / 10}")
    if not codes.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"the weight is on {codes.device}, the kernels take CUDA tensors (others: TRITON_INTERPRET=1)")


def _check_rows(name: str, rows: Tensor, codes: Tensor) -> None:
    _require(name, rows.dtype in DTYPES and rows.device == codes.device, rows, f"one of {DTYPES} on {codes.device}")


def _check_adapters(
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    adapter_ids: Tensor | None,
    rows: Tensor,
    codes: Tensor,
    in_features: int | None = None,
) -> None:
    """rows: x, whose last dimension is in_features, unless that is given, or grad_y."""
    if (lora_A is None) != (lora_B is None) or (lora_A is None and adapter_ids is not None):
        raise ValueError("lora_A and lora_B are given both or neither, and adapter_ids with them alone")
    if lora_A is None:
        return
    columns, stack = rows.shape[-1] if in_features is None else in_features, lora_A.shape[:-2]
    fits = lora_A.dim() == (2 if adapter_ids is None else 3) and lora_A.shape[-1] == columns
    expected = f"[r, {columns}]" if adapter_ids is None else f"[S, r, {columns}]"
    _require("lora_A", fits and lora_A.device == codes.device, lora_A, f"{expected} on {codes.device}")
    shape = (*stack, codes.shape[0], lora_A.shape[-2])
    _require("lora_B", lora_B.shape == shape and lora_B.device == codes.device, lora_B, f"{list(shape)}")
    if adapter_ids is not None:
        fits = adapter_ids.shape == rows.shape[:-1] and adapter_ids.dtype in (torch.int32, torch.int64)
        expected = f"int32 or int64 {list(rows.shape[:-1])} on {codes.device}"
        _require("adapter_ids", fits and adapter_ids.device == codes.device, adapter_ids, expected)
