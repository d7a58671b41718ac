"""Derivatives of the ops. They use the packed weight: no dense copy is kept for the backward.

With D = codebook[codes] * scale + offset, h = x A^T and g = dL/dy (leading dimensions flattened):

    dL/dx = g D + s (g B) A     dL/dA = s (g B)^T x     dL/dB = s g^T h     dL/dbias = sum over rows of g

and in forward mode, with a dot for the tangent of an input:

    y. = x. D^T + s (x. A^T) B^T + s (x A.^T) B^T + s h B.^T + bias.

Here are the `torch.autograd.Function`s with these formulas; `differentiation` says where PyTorch applies them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from loftq_kernels.ops import differentiation, extension, reference
from loftq_kernels.ops.differentiation import differentiable_jvp, each_sample, refuse_packed
from loftq_kernels.ops.schemas import NAMESPACE

_ops = torch.ops.loftq_kernels


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _low_rank(x: Tensor, first: Tensor, second: Tensor, scaling: float) -> Tensor:
    """s (x first) second in the dtype of x."""
    return scaling * (x @ first.to(x.dtype)) @ second.to(x.dtype)


def _low_rank_tangent(
    x: Tensor, pair: Sequence[Tensor | None], tangents: Sequence[Tensor | None], scaling: float
) -> list[Tensor]:
    """The terms of the tangent of s (x first) second that belong to the two factors."""
    terms = []
    if tangents[0] is not None:
        terms.append(_low_rank(x, tangents[0], pair[1], scaling))
    if tangents[1] is not None:
        terms.append(_low_rank(x, pair[0], tangents[1], scaling))
    return terms


def _transposed(*matrices: Tensor | None) -> list[Tensor | None]:
    return [None if matrix is None else matrix.mT for matrix in matrices]


def _adapter_gradients(*args) -> tuple[Tensor | None, Tensor | None]:
    """`reference.adapter_grad` with None for what is not needed; autograd and transforms see through it."""
    return _wanted(reference.adapter_grad(*args), *args[-2:])


def _adapter_gradients_alone(x: Tensor, *args) -> tuple[Tensor | None, Tensor | None]:
    """The same by the op where there is a CPU kernel and nothing that would differentiate or map over the result."""
    plain = not (torch.is_grad_enabled() or differentiation.forward_mode())
    if plain and x.is_cpu and extension.library is not None and not torch._C._are_functorch_transforms_active():
        return _wanted(_ops.adapter_grad(x, *args), *args[-2:])
    return _adapter_gradients(x, *args)


def _wanted(gradients: tuple[Tensor, Tensor], need_A: bool, need_B: bool) -> tuple[Tensor | None, Tensor | None]:
    return gradients[0] if need_A else None, gradients[1] if need_B else None


def _front(tensor: Tensor | None, dim: int | None) -> Tensor | None:
    """tensor with the mapped dimension first."""
    return tensor if dim is None else tensor.movedim(dim, 0)


def _mapped_low_rank(
    base: Tensor, x: Tensor, pair: Sequence[Tensor], scaling: float, info, x_is_mapped: bool
) -> Tensor:
    """base + s (x first) second [V, ..., n], where x, base and either factor may have the mapped dimension first."""
    leading = x.shape[1:-1] if x_is_mapped else x.shape[:-1]
    first, second = pair
    rows = x.shape[0] if x_is_mapped else 1
    flat = x.reshape(rows, math.prod(leading), x.shape[-1])
    term = _low_rank(flat, first, second, scaling)
    return base + term.reshape(info.batch_size, *leading, term.shape[-1])


class _Linear(Function):
    """The op qlora_linear."""

    @staticmethod
    def forward(*args) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.qlora_linear.default(*args)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, codes, scale, offset, codebook, group_size, lora_A, lora_B, scaling, bias = inputs
        need = ctx.needs_input_grad
        kept = x if need[6] or need[7] else None  # x enters the adapter's gradients alone
        ctx.save_for_backward(kept, codes, scale, offset, codebook, lora_A, lora_B)
        ctx.group_size, ctx.scaling, ctx.in_features = group_size, scaling, x.shape[-1]
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(x, codes, scale, offset, codebook, lora_A, lora_B)

    @staticmethod
    def backward(ctx, grad_y):
        refuse_packed(ctx.needs_input_grad[1:5])
        if grad_y is None:
            return (None,) * 10
        x, codes, scale, offset, codebook, lora_A, lora_B = ctx.saved_tensors
        need = ctx.needs_input_grad
        grad_x = grad_A = grad_B = grad_bias = None
        if need[0]:
            grad_x = _ops.qlora_linear_grad_input(
                grad_y, codes, scale, offset, codebook, ctx.in_features, ctx.group_size, lora_A, lora_B, ctx.scaling
            )
        if need[6] or need[7]:
            grad_A, grad_B = _adapter_gradients_alone(x, grad_y, lora_A, lora_B, ctx.scaling, need[6], need[7])
        if need[9]:
            grad_bias = _rows(grad_y).sum(0, dtype=ctx.bias_dtype)
        return grad_x, None, None, None, None, None, grad_A, grad_B, None, grad_bias

    @staticmethod
    @differentiable_jvp
    def jvp(ctx, saved, x_t, codes_t, scale_t, offset_t, codebook_t, _group, A_t, B_t, _scaling, bias_t) -> Tensor:
        refuse_packed((codes_t, scale_t, offset_t, codebook_t))
        x, *packed, lora_A, lora_B = saved
        terms = _low_rank_tangent(x, _transposed(lora_A, lora_B), _transposed(A_t, B_t), ctx.scaling)
        if x_t is not None:
            terms.append(_ops.qlora_linear(x_t, *packed, ctx.group_size, lora_A, lora_B, ctx.scaling, None))
        if bias_t is not None:
            terms.append(bias_t.to(x.dtype).expand(*x.shape[:-1], -1))
        return sum(terms[1:], start=terms[0])

    @staticmethod
    def vmap(info, in_dims, *args) -> tuple[Tensor, int]:
        if any(dim is not None for dim in in_dims[1:5]):
            return each_sample(_ops.qlora_linear, info, in_dims, args)
        x, _, _, _, _, _, lora_A, lora_B, scaling, bias = map(_front, args, in_dims)
        x_is_mapped, bias_is_mapped = in_dims[0] is not None, in_dims[9] is not None
        adapter_is_mapped = in_dims[6] is not None or in_dims[7] is not None
        adapter = (None, None, 0.0) if adapter_is_mapped else (lora_A, lora_B, scaling)
        y = _ops.qlora_linear(x, *args[1:6], *adapter, None if bias_is_mapped else bias)
        if bias_is_mapped:
            leading = x.dim() - 2 if x_is_mapped else x.dim() - 1
            y = y + bias.to(y.dtype).view(info.batch_size, *[1] * leading, -1)
        if adapter_is_mapped:
            y = _mapped_low_rank(y, x, _transposed(lora_A, lora_B), scaling, info, x_is_mapped)
        return y, 0


class _GradInput(Function):
    """The op qlora_linear_grad_input. It is linear in grad_y: its derivative is the forward op."""

    @staticmethod
    def forward(*args) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.qlora_linear_grad_input.default(*args)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        grad_y, codes, scale, offset, codebook, in_features, group_size, lora_A, lora_B, scaling = inputs
        ctx.save_for_backward(grad_y, codes, scale, offset, codebook, lora_A, lora_B)
        ctx.in_features, ctx.group_size, ctx.scaling = in_features, group_size, scaling
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(grad_y, codes, scale, offset, codebook, lora_A, lora_B)

    @staticmethod
    def backward(ctx, grad_grad_x):
        refuse_packed(ctx.needs_input_grad[1:5])
        if grad_grad_x is None:
            return (None,) * 10
        grad_y, codes, scale, offset, codebook, lora_A, lora_B = ctx.saved_tensors
        need = ctx.needs_input_grad
        grad_grad_y = grad_A = grad_B = None
        if need[0]:
            grad_grad_y = _ops.qlora_linear(
                grad_grad_x, codes, scale, offset, codebook, ctx.group_size, lora_A, lora_B, ctx.scaling, None
            )
        if need[7] or need[8]:
            # <grad_grad_x, s (g B) A> has the form of the adapter term with x = grad_grad_x.
            grad_A, grad_B = _adapter_gradients(grad_grad_x, grad_y, lora_A, lora_B, ctx.scaling, need[7], need[8])
        return grad_grad_y, None, None, None, None, None, None, grad_A, grad_B, None

    @staticmethod
    @differentiable_jvp
    def jvp(
        ctx, saved, grad_t, codes_t, scale_t, offset_t, codebook_t, _features, _group, A_t, B_t, _scaling
    ) -> Tensor:
        refuse_packed((codes_t, scale_t, offset_t, codebook_t))
        grad_y, *packed, lora_A, lora_B = saved
        terms = _low_rank_tangent(grad_y, (lora_B, lora_A), (B_t, A_t), ctx.scaling)
        if grad_t is not None:
            sizes = ctx.in_features, ctx.group_size
            terms.append(_ops.qlora_linear_grad_input(grad_t, *packed, *sizes, lora_A, lora_B, ctx.scaling))
        return sum(terms[1:], start=terms[0])

    @staticmethod
    def vmap(info, in_dims, *args) -> tuple[Tensor, int]:
        if any(dim is not None for dim in in_dims[1:5]):
            return each_sample(_ops.qlora_linear_grad_input, info, in_dims, args)
        grad_y, *_, lora_A, lora_B, scaling = map(_front, args, in_dims)
        if in_dims[7] is None and in_dims[8] is None:
            return _ops.qlora_linear_grad_input(grad_y, *args[1:7], lora_A, lora_B, scaling), 0
        grad_x = _ops.qlora_linear_grad_input(grad_y, *args[1:7], None, None, 0.0)
        return _mapped_low_rank(grad_x, grad_y, (lora_B, lora_A), scaling, info, in_dims[0] is not None), 0


def _dequantize_vmap(info, in_dims, *args) -> tuple[Tensor, int]:
    """Rows decode independently of each other: those of all samples are decoded as one matrix."""
    if in_dims[3] is not None:
        return each_sample(_ops.dequantize, info, in_dims, args)
    stored = [
        None if t is None else (t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0))
        for t, dim in zip(args[:3], in_dims[:3], strict=True)
    ]
    rows = stored[0].shape[1]
    dense = _ops.dequantize(*(t if t is None else t.flatten(0, 1) for t in stored), *args[3:])
    return dense.unflatten(0, (info.batch_size, rows)), 0


differentiation.register_derivatives(_ops.qlora_linear.default, _Linear)
differentiation.register_derivatives(_ops.qlora_linear_grad_input.default, _GradInput)
differentiation.register_refusal(_ops.dequantize.default, differentiation.refuse_constants)
differentiation.register_refusal(_ops.adapter_grad.default, differentiation.refuse_adapter_grad)
differentiation.register_refusal(_ops.qlora_linear_multi.default, differentiation.refuse_multi)
torch.library.register_vmap(f"{NAMESPACE}::dequantize", _dequantize_vmap)
