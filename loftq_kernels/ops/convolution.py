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

from loftq_kernels.ops import checks, differentiation
from loftq_kernels.ops.functional import autocast, dequantize_tensors


@dataclass(frozen=True)
class ConvGeometry:
    """The arguments of `torch.convolution` other than tensors, and the kernel's shape [c_in / groups, *k]."""

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

    Differentiable in x and bias, any number of times, forward and under `torch.func` too. Raises TypeError and
    ValueError as `qlora_linear`.
    """
    checks.check_floating("x", x)
    checks.check_packed(codes, scale, offset, codebook, geometry.columns, geometry.group_size)
    checks.check_same_device("x", x, "codes", codes)
    x = autocast(x)
    y = differentiation.apply(_PackedConv, x, codes, scale, offset, codebook, geometry)
    return y if bias is None else y + bias.to(y.dtype).view(-1, *[1] * len(geometry.stride))


def _dense(packed: tuple[Tensor | None, ...], geometry: ConvGeometry, dtype: torch.dtype) -> Tensor:
    """The kernel [c_out, c_in / groups, *k]."""
    matrix = dequantize_tensors(*packed, geometry.columns, geometry.group_size, dtype)
    return matrix.view(-1, *geometry.kernel)


def _differentiate_input(ctx, inputs, output) -> None:
    """Save the packed kernel and the geometry. Both functions are linear in their first argument and need no more."""
    first, *packed, geometry = inputs[:6]
    ctx.save_for_backward(*packed)
    ctx.save_for_forward(*packed)
    ctx.geometry, ctx.shape = geometry, first.shape
    ctx.set_materialize_grads(False)


def _map_samples(function: type[torch.autograd.Function], info, in_dims, args: tuple) -> tuple[Tensor, int]:
    """The vmap rule of both functions: the mapped dimension joins the batch, unless the kernels differ."""
    if any(dim is not None for dim in in_dims[1:5]):
        return differentiation.each_sample(function.apply, info, in_dims, args)
    first = args[0].movedim(in_dims[0], 0)
    shapes = [(info.batch_size * shape[0], *shape[1:]) for shape in args[6:]]
    result = function.apply(first.flatten(0, 1), *args[1:6], *shapes)
    return result.unflatten(0, first.shape[:2]), 0


class _PackedConv(torch.autograd.Function):
    """conv(x, D), linear in x."""

    @staticmethod
    def forward(x: Tensor, codes, scale, offset, codebook, geometry: ConvGeometry) -> Tensor:
        g = geometry
        kernel = _dense((codes, scale, offset, codebook), g, x.dtype)
        return torch.convolution(x, kernel, None, g.stride, g.padding, g.dilation, False, [0] * len(g.stride), g.groups)

    setup_context = staticmethod(_differentiate_input)

    @staticmethod
    def backward(ctx, grad_y: Tensor | None):
        differentiation.refuse_packed(ctx.needs_input_grad[1:5])
        if grad_y is None:
            return (None,) * 6
        grad_x = differentiation.apply(_PackedConvGradInput, grad_y, *ctx.saved_tensors, ctx.geometry, ctx.shape)
        return grad_x, *[None] * 5

    @staticmethod
    @differentiation.differentiable_jvp
    def jvp(ctx, packed, x_t, codes_t, scale_t, offset_t, codebook_t, _geometry) -> Tensor:
        differentiation.refuse_packed((codes_t, scale_t, offset_t, codebook_t))
        return differentiation.apply(_PackedConv, x_t, *packed, ctx.geometry)

    @staticmethod
    def vmap(info, in_dims, *args) -> tuple[Tensor, int]:
        return _map_samples(_PackedConv, info, in_dims, args)


class _PackedConvGradInput(torch.autograd.Function):
    """dL/dx as a function of dL/dy. It is linear and its derivative is the convolution, so second derivatives work."""

    @staticmethod
    def forward(grad_y: Tensor, codes, scale, offset, codebook, geometry: ConvGeometry, shape: torch.Size) -> Tensor:
        g = geometry
        kernel = _dense((codes, scale, offset, codebook), g, grad_y.dtype)
        zeros = [0] * len(g.stride)
        x = grad_y.new_empty(1).expand(shape)  # Only its shape is read.
        return torch.ops.aten.convolution_backward(
            grad_y, x, kernel, None, g.stride, g.padding, g.dilation, False, zeros, g.groups, [True, False, False]
        )[0]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _differentiate_input(ctx, inputs, output)
        ctx.shape = inputs[-1]

    @staticmethod
    def backward(ctx, grad_grad_x: Tensor | None):
        differentiation.refuse_packed(ctx.needs_input_grad[1:5])
        if grad_grad_x is None:
            return (None,) * 7
        return differentiation.apply(_PackedConv, grad_grad_x, *ctx.saved_tensors, ctx.geometry), *[None] * 6

    @staticmethod
    @differentiation.differentiable_jvp
    def jvp(ctx, packed, grad_t, codes_t, scale_t, offset_t, codebook_t, _geometry, _shape) -> Tensor:
        differentiation.refuse_packed((codes_t, scale_t, offset_t, codebook_t))
        return differentiation.apply(_PackedConvGradInput, grad_t, *packed, ctx.geometry, ctx.shape)

    @staticmethod
    def vmap(info, in_dims, *args) -> tuple[Tensor, int]:
        return _map_samples(_PackedConvGradInput, info, in_dims, args)
