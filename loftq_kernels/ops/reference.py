"""The plain-torch backend, with which all others are compared. It runs on any device; autograd differentiates it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from loftq_kernels.storage import packing

SCALE_RULES = ("absmax", "minmax", "mean_std")
SEARCH_FACTORS = tuple(1 - i / 32 for i in range(25))  # 1.0 down to 0.25; each exact in float32
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def quantize(
    weight: Tensor, codebook: Tensor, group_size: int, scale_rule: str, scale_dtype: torch.dtype, scale_search: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """weight [N, K] -> codes [N, K_pad * b / 8] uint8, scale [N, G], offset [N, G] ([0] unless scale_rule="minmax").

    Each group takes the nearest codebook entry (the lower one on a tie) to ``(w - offset) * (1 / scale)``, scale and
    offset as stored. Base scale: absmax: max|w| / codebook[-1]; minmax: (max - min) / (2^b - 1); mean_std:
    mean + 2.5 std, or the absmax scale where that is not positive. ``scale_search`` multiplies the base scale by the
    factor 1 - i/32, i = 0..24, of least squared error. NaN or Inf in a group makes its scale non-finite.
    """
    rows, columns = weight.shape
    groups = packing.num_groups(columns, group_size)
    if rows == 0 or columns == 0:
        empty = weight.new_empty(rows, groups, dtype=scale_dtype)
        codes = weight.new_empty(rows, packing.row_bytes(columns, packing.bits_of(codebook)), dtype=torch.uint8)
        return codes, empty, empty.clone() if scale_rule == "minmax" else empty.new_empty(0)
    width = packing.group_width(columns, group_size)
    weight = weight.float()
    # Padding with the row's last value keeps minimum, maximum and absmax of a partial group; mean and std mask it out.
    grouped = torch.cat([weight, weight[:, -1:].expand(-1, groups * width - columns)], 1).view(rows, groups, width)
    exists = pad(torch.ones(columns, dtype=torch.bool, device=weight.device), (0, groups * width - columns))
    exists = exists.view(groups, width)

    midpoints = (codebook[:-1] + codebook[1:]) / 2
    best_error, best = None, None
    for factor in SEARCH_FACTORS if scale_search else (1.0,):
        scale, offset = _scale_and_offset(grouped, exists, codebook, scale_rule, scale_dtype, factor)
        normalized = _shift(grouped, offset) * _reciprocal(scale)
        codes = torch.bucketize(normalized, midpoints, out_int32=True)
        if not scale_search:
            best = codes, scale, offset
            break
        residual = torch.where(exists, grouped - _decode(codes, scale, offset, codebook), 0.0)
        error = _sum_columns(residual.double().square())
        if best is None:
            best_error, best = error, (codes, scale, offset)
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = tuple(
            old if new is None else torch.where(better, new, old)
            for new, old in zip((codes, scale, offset), best, strict=True)
        )
    codes, scale, offset = best
    codes = codes.to(torch.uint8).view(rows, groups * width)[:, :columns]
    bits = packing.bits_of(codebook)
    stored_offset = weight.new_empty(0, dtype=scale_dtype) if offset is None else offset.squeeze(-1).to(scale_dtype)
    return packing.pack_codes(codes, bits), scale.squeeze(-1).to(scale_dtype), stored_offset


def _scale_and_offset(
    grouped: Tensor, exists: Tensor, codebook: Tensor, scale_rule: str, scale_dtype: torch.dtype, factor: float
) -> tuple[Tensor, Tensor | None]:
    """Scale and offset [N, G, 1] of grouped weights [N, G, g], rounded to how they are stored, as float32."""

    def stored(value: Tensor) -> Tensor:
        return value.to(scale_dtype).float()

    absmax = grouped.abs().amax(-1, keepdim=True)
    if scale_rule == "absmax":
        return stored(factor * (absmax / codebook[-1])), None
    levels = codebook.numel()
    if scale_rule == "minmax":
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        scale = stored(factor * ((high - low) / (levels - 1)))
        return scale, stored((low + (1 - factor) * 0.5 * (high - low)) + levels / 2 * scale)
    count = exists.sum(-1).view(-1, 1)
    values = torch.where(exists, grouped.double(), 0.0)
    mean = _sum_columns(values) / count
    deviation = torch.where(exists, grouped.double() - mean, 0.0)
    variance = _sum_columns(deviation.square()) / (count - 1).clamp(min=1)
    scale = (mean + 2.5 * variance.sqrt()).float()
    return stored(factor * torch.where(scale > 0, scale, absmax / codebook[-1])), None


def _sum_columns(values: Tensor) -> Tensor:
    """Float64 [..., g] -> sums [..., 1] in the order that all backends use: 32 interleaved partial sums, folded."""
    blocks = pad(values, (0, -values.shape[-1] % 32)).unflatten(-1, (-1, 32))
    partial = blocks[..., 0, :]
    for i in range(1, blocks.shape[-2]):
        partial = partial + blocks[..., i, :]
    while partial.shape[-1] > 1:
        half = partial.shape[-1] // 2
        partial = partial[..., :half] + partial[..., half:]
    return partial


def _reciprocal(scale: Tensor) -> Tensor:
    return 1.0 / scale.clamp(min=SMALLEST_NORMAL)  # A zero scale decodes every code to the offset.


def _shift(grouped: Tensor, offset: Tensor | None) -> Tensor:
    return grouped if offset is None else grouped - offset


def _decode(codes: Tensor, scale: Tensor, offset: Tensor | None, codebook: Tensor) -> Tensor:
    decoded = codebook[codes] * scale
    return decoded if offset is None else decoded + offset


def quantize_residual_(
    weight: Tensor,
    low_rank: Tensor,
    codebook: Tensor,
    group_size: int,
    scale_rule: str,
    scale_dtype: torch.dtype,
    scale_search: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize ``weight - low_rank`` and overwrite low_rank [N, K] with ``weight - Q``, rounded to its dtype.

    Returns codes, scale and offset as `quantize`, and ||weight - Q||^2 (float64) before that rounding.
    """
    target = weight.float() - low_rank.float()
    codes, scale, offset = quantize(target, codebook, group_size, scale_rule, scale_dtype, scale_search)
    affine = offset if scale_rule == "minmax" else None
    dense = dequantize(codes, scale, affine, codebook, weight.shape[1], group_size, torch.float32)
    residual = weight.float() - dense
    low_rank.copy_(residual)
    return codes, scale, offset, residual.double().square().sum()


def dequantize(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """``codebook[codes] * scale + offset`` [N, K], computed in float32 (float64 for dtype float64) and rounded once."""
    compute = torch.promote_types(dtype, torch.float32)
    bits = packing.bits_of(codebook)
    dense = codebook.to(compute)[packing.unpack_codes(codes, bits, in_features).int()]
    dense = dense * packing.spread_groups(scale.to(compute), in_features, group_size)
    if offset is not None:
        dense = dense + packing.spread_groups(offset.to(compute), in_features, group_size)
    return dense.to(dtype)


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
    dequantize: Callable[..., Tensor] = dequantize,
) -> Tensor:
    """y = x @ (codebook[codes] * scale + offset).T + scaling * (x @ lora_A.T) @ lora_B.T + bias, in the dtype of x."""
    weight = dequantize(codes, scale, offset, codebook, x.shape[-1], group_size, x.dtype)
    y = linear(x, weight, None if bias is None else bias.to(x.dtype))
    if lora_A is not None:
        y = y + scaling * linear(linear(x, lora_A.to(x.dtype)), lora_B.to(x.dtype))
    return y


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
    dequantize: Callable[..., Tensor] = dequantize,
) -> Tensor:
    """grad_x = grad_y @ (codebook[codes] * scale + offset) + scaling * (grad_y @ lora_B) @ lora_A."""
    grad_x = grad_y @ dequantize(codes, scale, offset, codebook, in_features, group_size, grad_y.dtype)
    if lora_A is not None:
        grad_x = grad_x + scaling * (grad_y @ lora_B.to(grad_y.dtype)) @ lora_A.to(grad_y.dtype)
    return grad_x


def adapter_grad(
    x: Tensor, grad_y: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, need_A: bool, need_B: bool
) -> tuple[Tensor, Tensor]:
    """dL/dA = s (g B)^T x and dL/dB = s g^T (x A^T), in the adapter's dtypes; [0] where not needed.

    They are computed in the dtype that x and grad_y have in common.
    """
    dtype = torch.promote_types(x.dtype, grad_y.dtype)
    x, grad_y = (t.reshape(math.prod(t.shape[:-1]), t.shape[-1]).to(dtype) for t in (x, grad_y))
    grad_A, grad_B = lora_A.new_empty(0), lora_B.new_empty(0)
    if need_A:
        grad_A = ((scaling * (grad_y @ lora_B.to(dtype))).T @ x).to(lora_A.dtype)
    if need_B:
        grad_B = (grad_y.T @ (scaling * (x @ lora_A.to(dtype).T))).to(lora_B.dtype)
    return grad_A, grad_B


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
    dequantize: Callable[..., Tensor] = dequantize,
) -> Tensor:
    """y[m] = x[m] @ W.T + scaling * (x[m] @ lora_A[id].T) @ lora_B[id].T + bias with id = adapter_ids[m]; -1 is none.

    lora_A [S, r, K], lora_B [S, N, r], adapter_ids [...] as the leading dimensions of x.
    """
    y = qlora_linear(x, codes, scale, offset, codebook, group_size, None, None, 0.0, bias, dequantize=dequantize)
    return add_adapters(y, x, lora_A, lora_B, adapter_ids, scaling)


_FEW = 64  # rows times adapters up to which a product of all with all takes less time than the calls for each


def add_adapters(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, adapter_ids: Tensor, scaling: float) -> Tensor:
    """Return y plus each row's adapter; y itself does not change.

    Rows whose id is neither -1 nor that of an adapter become NaN, as in the GPU kernels: to raise an error those would
    have to wait for the ids.
    """
    leading, ids = y.shape[:-1], adapter_ids.reshape(-1)
    y, x = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    few = x.device.type == "cpu" and len(ids) * len(lora_A) <= _FEW
    y = (_add_to_few if few else _add_one_by_one)(y, x, lora_A, lora_B, ids, scaling)
    return y.view(*leading, y.shape[-1])


def _add_to_few(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, ids: Tensor, scaling: float) -> Tensor:
    """All adapters for all rows, of which each keeps its own: two products, in float32, which copy no adapter."""
    wide = torch.promote_types(x.dtype, torch.float32)
    own = ids == torch.arange(len(lora_A), device=ids.device)[:, None]  # [S, M]
    inner = linear(x.to(wide), lora_A.flatten(0, 1).to(wide)).view(len(ids), *lora_A.shape[:2]).transpose(0, 1)
    terms = torch.bmm(inner, lora_B.to(wide).transpose(1, 2))  # [S, M, N]
    added = y + scaling * torch.where(own[..., None], terms, 0).sum(0)
    return added.masked_fill(~(own.any(0) | (ids == -1))[:, None], float("nan")).to(y.dtype)


def _add_one_by_one(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, ids: Tensor, scaling: float) -> Tensor:
    """One adapter after the other, each for its own rows."""
    y = y.clone()
    for adapter in ids.unique().tolist():
        rows = (ids == adapter).nonzero().flatten()
        if 0 <= adapter < len(lora_A):
            h = linear(x[rows], lora_A[adapter].to(x.dtype))
            y[rows] += scaling * linear(h, lora_B[adapter].to(x.dtype))
        elif adapter != -1:
            y[rows] = float("nan")
    return y
