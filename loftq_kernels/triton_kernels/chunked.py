"""The products by the library's GEMM: the weight is decoded in chunks that stay in L2 until they are multiplied."""

from __future__ import annotations

import torch
from torch import Tensor

from .configs import cdiv
from .contract import bits_of
from .dequantize import launch_dequantize

# Chunks end where groups and tiles end. 256 is also a whole number of the library's own tiles.
ALIGNMENT = 256


def _chunks(size: int, other: int, itemsize: int, chunk_bytes: int) -> range:
    """Starts of the chunks of `size` rows (or columns) of `other` elements each, as equal as alignment allows."""
    most = max(chunk_bytes // max(other * itemsize, 1) // ALIGNMENT, 1) * ALIGNMENT
    step = cdiv(size, max(cdiv(size, most), 1))
    return range(0, size, max(cdiv(step, ALIGNMENT), 1) * ALIGNMENT)


def chunked_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    group_size: int,
    bias: Tensor | None,
    y: Tensor,
    chunk_bytes: int,
) -> Tensor:
    """y [M, N] = x [M, K] @ W.T + bias, one chunk of W's rows at a time, in a workspace of chunk_bytes."""
    out_features, in_features = codes.shape[0], x.shape[1]
    starts = _chunks(out_features, in_features, x.element_size(), chunk_bytes)
    workspace = x.new_empty(min(starts.step, out_features), in_features)
    bias = None if bias is None else bias.to(x.dtype)
    for start in starts:
        rows = slice(start, min(start + starts.step, out_features))
        dense = workspace[: rows.stop - start]
        launch_dequantize(
            codes[rows], scale[rows], None if offset is None else offset[rows], codebook, group_size, dense
        )
        if bias is None:
            torch.mm(x, dense.T, out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, dense.T, out=y[:, rows])
    return y


def chunked_grad_input(
    grad_y: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    group_size: int,
    grad_x: Tensor,
    chunk_bytes: int,
) -> Tensor:
    """grad_x [M, K] = grad_y [M, N] @ W, one chunk of W's columns at a time, in a workspace of chunk_bytes."""
    out_features, in_features = codes.shape[0], grad_x.shape[1]
    bits = bits_of(codebook)
    starts = _chunks(in_features, out_features, grad_y.element_size(), chunk_bytes)
    workspace = grad_y.new_empty(out_features * min(starts.step, in_features))
    for start in starts:
        stop = min(start + starts.step, in_features)
        dense = workspace[: out_features * (stop - start)].view(out_features, stop - start)
        groups = slice(None) if group_size == -1 else slice(start // group_size, -(-stop // group_size))
        launch_dequantize(
            codes[:, start * bits // 8 :],
            scale[:, groups],
            None if offset is None else offset[:, groups],
            codebook,
            group_size,
            dense,
        )
        torch.mm(grad_y, dense, out=grad_x[:, start:stop])
    return grad_x
