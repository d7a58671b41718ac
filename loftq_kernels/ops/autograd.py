"""Derivatives of the matmul ops. Through the packed weight only: no dense copy is kept for the backward.

With D = codebook[codes] * scale + offset, h = x A^T and g = dL/dy (leading dimensions flattened):

    dL/dx = g D + s (g B) A     dL/dA = s (g B)^T x     dL/dB = s g^T h     dL/dbias = sum over rows of g
"""

from __future__ import annotations

import torch
from torch import Tensor

from loftq_kernels.ops.schemas import NAMESPACE

_ops = torch.ops.loftq_kernels


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _adapter_gradients(
    x: Tensor, grad_y: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, need_A: bool, need_B: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dL/dA = s (g B)^T x and dL/dB = s g^T (x A^T), computed in the dtype of x and returned in the adapter's."""
    x, grad_y = _rows(x), _rows(grad_y)
    grad_A = grad_B = None
    if need_A:
        grad_A = ((scaling * (grad_y @ lora_B.to(x.dtype))).T @ x).to(lora_A.dtype)
    if need_B:
        grad_B = (grad_y.T @ (scaling * (x @ lora_A.to(x.dtype).T))).to(lora_B.dtype)
    return grad_A, grad_B


def _save(ctx, inputs, output):
    x, codes, scale, offset, codebook, group_size, lora_A, lora_B, scaling, bias = inputs
    needs_x = any(ctx.needs_input_grad[i] for i in (6, 7))  # x enters the adapter's gradients alone
    ctx.save_for_backward(x if needs_x else None, codes, scale, offset, codebook, lora_A, lora_B)
    ctx.group_size, ctx.scaling, ctx.in_features = group_size, scaling, x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad_y):
    x, codes, scale, offset, codebook, lora_A, lora_B = ctx.saved_tensors
    need = ctx.needs_input_grad
    grad_x = grad_A = grad_B = grad_bias = None
    if need[0]:
        grad_x = _ops.qlora_linear_grad_input(
            grad_y, codes, scale, offset, codebook, ctx.in_features, ctx.group_size, lora_A, lora_B, ctx.scaling
        )
    if need[6] or need[7]:
        grad_A, grad_B = _adapter_gradients(x, grad_y, lora_A, lora_B, ctx.scaling, need[6], need[7])
    if need[9]:
        grad_bias = _rows(grad_y).sum(0, dtype=ctx.bias_dtype)
    return grad_x, None, None, None, None, None, grad_A, grad_B, None, grad_bias


def _save_grad_input(ctx, inputs, output):
    grad_y, codes, scale, offset, codebook, _, group_size, lora_A, lora_B, scaling = inputs
    ctx.save_for_backward(grad_y, codes, scale, offset, codebook, lora_A, lora_B)
    ctx.group_size, ctx.scaling = group_size, scaling


def _backward_grad_input(ctx, grad_grad_x):
    """grad_x is linear in grad_y: its derivative is the forward op. Makes second derivatives work."""
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


torch.library.register_autograd(f"{NAMESPACE}::qlora_linear", _backward, setup_context=_save)
torch.library.register_autograd(
    f"{NAMESPACE}::qlora_linear_grad_input", _backward_grad_input, setup_context=_save_grad_input
)
