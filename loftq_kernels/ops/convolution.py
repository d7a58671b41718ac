"""Convolution with a packed kernel. The dense kernel lives for the length of a call: none is kept for the backward.

With D = codebook[codes] * scale + offset as a kernel [c_out, c_in / groups, *k]: y = conv(x, D) + bias, and dL/dx is
the transposed convolution of dL/dy by D, made anew. D is a constant.

Why decode and convolve: on ResNet's shapes (batch 1 and 8, one AMD EPYC core, NF4, rank 16) it took 1.1 to 1.9 times
the dense convolution, adapter included; unfolding x into rows for `qlora_linear` 1.1 to 6.3 times, and k^2 times the
memory of x. Unfolding won on maps of 7 x 7 pixels (by 17%) and below.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_kernels.ops import checks
from loftq_kernels.ops.functional import autocast, dequantize_tensors


@dataclass(frozen=True)
class ConvGeometry:
    """What `torch.convolution` is told beside its tensors, and the kernel's shape [c_in / groups, *k]."""

    kernel: tuple[int, ...]
    group_size: int
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def columns(self) -> int:
        """c_in / groups * the pixels of the kernel: the columns of the packed weight."""
        return torch.Size(self.kernel).numel()


def conv_tensors(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
) -> Tensor:
    """y = conv(x, codebook[codes] * scale + offset) + bias for x [B, c_in, *size], in the dtype of x.

    Differentiable, twice too, in x and bias. Raises TypeError and ValueError as `qlora_linear`.
    """
    checks.check_floating("x", x)
    checks.check_packed(codes, scale, offset, codebook, geometry.columns, geometry.group_size)
    checks.check_same_device("x", x, "codes", codes)
    x = autocast(x)
    y = _PackedConv.apply(x, codes, scale, offset, codebook, geometry)
    return y if bias is None else y + bias.to(y.dtype).view(-1, *[1] * len(geometry.stride))


def _dense(packed: tuple[Tensor | None, ...], geometry: ConvGeometry, dtype: torch.dtype) -> Tensor:
    """The kernel [c_out, c_in / groups, *k]."""
    matrix = dequantize_tensors(*packed, geometry.columns, geometry.group_size, dtype)
    return matrix.view(-1, *geometry.kernel)


class _PackedConv(torch.autograd.Function):
    """conv(x, D), linear in x."""

    @staticmethod
    def forward(ctx, x: Tensor, codes, scale, offset, codebook, geometry: ConvGeometry) -> Tensor:
        packed = codes, scale, offset, codebook
        ctx.save_for_backward(*packed)
        ctx.geometry, ctx.shape = geometry, x.shape
        g = geometry
        kernel = _dense(packed, g, x.dtype)
        return torch.convolution(x, kernel, None, g.stride, g.padding, g.dilation, False, [0] * len(g.stride), g.groups)

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        grad_x = _PackedConvGradInput.apply(grad_y, *ctx.saved_tensors, ctx.geometry, ctx.shape)
        return grad_x, None, None, None, None, None


class _PackedConvGradInput(torch.autograd.Function):
    """dL/dx, linear in dL/dy: its own derivative is the convolution. Makes second derivatives work."""

    @staticmethod
    def forward(ctx, grad_y: Tensor, codes, scale, offset, codebook, geometry: ConvGeometry, shape) -> Tensor:
        packed = codes, scale, offset, codebook
        ctx.save_for_backward(*packed)
        ctx.geometry = g = geometry
        kernel = _dense(packed, g, grad_y.dtype)
        zeros = [0] * len(g.stride)
        x = grad_y.new_empty(1).expand(shape)  # its shape alone is read
        return torch.ops.aten.convolution_backward(
            grad_y, x, kernel, None, g.stride, g.padding, g.dilation, False, zeros, g.groups, [True, False, False]
        )[0]

    @staticmethod
    def backward(ctx, grad_grad_x: Tensor):
        return _PackedConv.apply(grad_grad_x, *ctx.saved_tensors, ctx.geometry), *[None] * 6
