"""Derivatives: against finite differences, against autograd through the reference, and what they keep in memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import DEVICES, FORMATS, adapter, gaussian, op_arguments
from torch.autograd import gradcheck, gradgradcheck

import loftq_kernels as lk

OPS = torch.ops.loftq_kernels


def leaves(rows=5, columns=70, rank=2, leading=(3,), device="cpu", dtype=torch.float64):
    """x, lora_A, lora_B and bias that require gradients."""
    x = gaussian(*leading, columns, seed=3, device=device, dtype=dtype)
    tensors = (x, *adapter(rows, columns, rank, device=device, dtype=dtype), gaussian(rows, device=device, dtype=dtype))
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("format", ["nf4", "int2", "uniform4"])
@pytest.mark.parametrize("leading", [(), (3,), (2, 2), (0,)], ids=str)
def test_gradcheck(format, leading):
    packed = lk.quantize(gaussian(3, 33), format, 32)  # two groups, the second partial

    def op(x, lora_A, lora_B, bias):
        return lk.qlora_linear(x, packed, lora_A, lora_B, scaling=0.5, bias=bias)

    assert gradcheck(op, leaves(3, 33, leading=leading))
    if leading == (2, 2):
        assert gradgradcheck(op, leaves(3, 33, leading=leading))


def test_gradcheck_without_adapter():
    packed, (x, _, _, bias) = lk.quantize(gaussian(5, 70), "int4"), leaves()
    assert gradcheck(lambda x, bias: lk.qlora_linear(x, packed, bias=bias), (x, bias))
    assert gradcheck(lambda x: lk.qlora_linear(x, packed), (x,))


def test_gradcheck_of_grad_input():
    packed, (_, lora_A, lora_B, _) = lk.quantize(gaussian(3, 33), "nf4", 32), leaves(3, 33)
    grad = gaussian(2, 3, seed=7, dtype=torch.float64).requires_grad_()

    def op(grad, lora_A, lora_B):
        return OPS.qlora_linear_grad_input(grad, *op_arguments(packed), 33, 32, lora_A, lora_B, 0.5)

    assert gradcheck(op, (grad, lora_A, lora_B))
    assert gradgradcheck(op, (grad, lora_A, lora_B))


def gradients(packed, tensors, backend, scaling=0.5):
    y = lk.qlora_linear(*tensors[:1], packed, *tensors[1:3], scaling=scaling, bias=tensors[3], backend=backend)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    return torch.autograd.grad(y, wanted, gaussian(*y.shape, seed=9, device=y.device, dtype=y.dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format", FORMATS)
def test_equal_to_autograd_through_the_reference(format, device):
    packed = lk.quantize(gaussian(5, 70), format).to(device)
    ours, theirs = (gradients(packed, leaves(device=device), backend) for backend in (None, "reference"))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)), ids=str)
def test_any_choice_of_gradients(wanted):
    """Only what requires a gradient gets one, whatever the others do."""
    if not any(wanted):
        return
    packed = lk.quantize(gaussian(5, 70))
    results = []
    for backend in (None, "reference"):
        tensors = [t.requires_grad_(want) for t, want in zip(leaves(), wanted, strict=True)]
        results.append(gradients(packed, tensors, backend))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(dtype):
    """Against float64: no worse than 1.2x autograd through plain torch at the same dtype. Adapters stay float32."""
    packed = lk.quantize(gaussian(48, 192))
    exact = gradients(packed, leaves(48, 192, 8, (33,)), None)
    results = []
    for backend in (None, "reference"):
        tensors = leaves(48, 192, 8, (33,), dtype=torch.float32)
        tensors[0] = tensors[0].detach().to(dtype).requires_grad_()
        results.append(gradients(packed, tensors, backend))
        assert [g.dtype for g in results[-1]] == [dtype] + 3 * [torch.float32]
    for mine, plain, truth in zip(*results, exact, strict=True):
        budget = 1.2 * (plain - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
        assert (mine - truth).abs().max() <= budget


def test_backward_keeps_no_dense_weight():
    """What is saved for the backward is the packed weight, the adapter and x, and x only when the adapter needs it."""
    packed = lk.quantize(gaussian(128, 256))
    x, lora_A, lora_B, bias = leaves(128, 256, 4, (2,), dtype=torch.float32)
    small = [t.nbytes for t in (x, lora_A, lora_B, bias)]

    def saved_bytes(*tensors):
        saved = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t)
        with hooks:
            lk.qlora_linear(tensors[0], packed, *tensors[1:3], bias=tensors[3]).sum().backward()
        assert all(tensor.numel() < 128 * 256 for tensor in saved.values())
        return sum(tensor.nbytes for tensor in saved.values())

    assert packed.nbytes <= saved_bytes(x, lora_A, lora_B, bias) <= packed.nbytes + sum(small)
    frozen = saved_bytes(x, lora_A.detach(), lora_B.detach(), bias)
    assert frozen <= packed.nbytes + lora_A.nbytes + lora_B.nbytes


def test_no_graph_without_need():
    packed = lk.quantize(gaussian(5, 70))
    x, lora_A, lora_B, bias = leaves()
    with torch.no_grad():
        assert not lk.qlora_linear(x, packed, lora_A, lora_B, bias=bias).requires_grad
    assert not lk.qlora_linear(x.detach(), packed).requires_grad


def test_autocast_gradients():
    packed, tensors = lk.quantize(gaussian(5, 70)), leaves(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lk.qlora_linear(tensors[0], packed, *tensors[1:3], bias=tensors[3])
    y.float().square().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in tensors)


def test_gradient_checkpointing():
    from torch.utils.checkpoint import checkpoint

    packed, results = lk.quantize(gaussian(5, 70)), []
    for rematerialise in (False, True):
        x, lora_A, lora_B, bias = leaves()

        def op(x, lora_A, lora_B, bias):
            return lk.qlora_linear(x, packed, lora_A, lora_B, bias=bias).tanh()

        y = (
            checkpoint(op, x, lora_A, lora_B, bias, use_reentrant=False)
            if rematerialise
            else op(x, lora_A, lora_B, bias)
        )
        y.sum().backward()
        results.append([x.grad, lora_A.grad, lora_B.grad, bias.grad])
    for plain, rematerialised in zip(*results, strict=True):
        assert torch.equal(plain, rematerialised)
