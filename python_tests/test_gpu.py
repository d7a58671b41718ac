"""What only a CUDA device can show: CUDA graphs, no waiting for the device, compiled models, shapes of real models."""

from __future__ import annotations

import pytest
import torch
from helpers import adapter, gaussian, op_arguments

import loftq_kernels as lk
from loftq_kernels.ops import triton_routes

pytestmark = pytest.mark.gpu
ROWS = [1, 3, 16, 17, 100, 1100, 2100]  # of every path, on every architecture


def layer_and_input(rows: int, format: str = "nf4", dtype: torch.dtype = torch.bfloat16, n: int = 384, k: int = 512):
    packed = lk.quantize(gaussian(n, k), format).to("cuda")
    return packed, adapter(n, k, 16, device="cuda", dtype=dtype), gaussian(rows, k, device="cuda", dtype=dtype)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("format", ["nf4", "nf2", "int4", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_real_shapes(dtype, format, rows):
    """Llama's 11008 is not a multiple of 512; against the dense weight, the same products in plain torch."""
    packed, lora, x = layer_and_input(rows, format, dtype, n=4096, k=11008)
    dense = packed.dequantize(torch.float32)
    dense.addmm_(lora[1].float(), lora[0].float(), alpha=0.5)
    exact = x.float() @ dense.T
    plain = torch.nn.functional.linear(x, packed.dequantize(dtype)) + 0.5 * (x @ lora[0].T) @ lora[1].T
    y = lk.qlora_linear(x, packed, *lora, scaling=0.5)
    errors = [(t.float() - exact).square().mean().sqrt().item() for t in (y, plain)]
    assert errors[0] <= 1.2 * errors[1]
    grad, arguments = exact.to(dtype), (*op_arguments(packed), 11008, 64, *lora, 0.5)
    mine = torch.ops.loftq_kernels.qlora_linear_grad_input(grad, *arguments)
    exact = grad.float() @ dense
    assert (mine.float() - exact).square().mean().sqrt() <= 0.01 * exact.square().mean().sqrt()


@pytest.mark.parametrize("rows", ROWS)
def test_waits_for_nothing(rows):
    """No call waits for the device after the first one, which reads the code book."""
    packed, lora, x = layer_and_input(rows)
    stacked = [t.unsqueeze(0) for t in lora]
    ids = torch.zeros(rows, dtype=torch.int64, device="cuda")

    def calls() -> None:
        x.requires_grad_()
        lk.qlora_linear(x, packed, *lora).sum().backward()
        with torch.no_grad():
            lk.qlora_linear(x, packed, *stacked, adapter_ids=ids)
            packed.dequantize(torch.bfloat16)

    calls()
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
@pytest.mark.parametrize("rows", ROWS)
def test_cuda_graph(rows):
    """Captured once, replayed with other values, which eager calls in between do not disturb."""
    packed, lora, x = layer_and_input(rows)
    lk.qlora_linear(x, packed, *lora)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lk.qlora_linear(x, packed, *lora)
    for seed in (1, 2, 3):
        x.copy_(gaussian(*x.shape, seed=seed))
        graph.replay()
        assert torch.equal(y, lk.qlora_linear(x, packed, *lora))


@pytest.mark.parametrize("rows", [1, 40])
def test_compiled(rows):
    packed, lora, x = layer_and_input(rows)

    def function(x, lora_A, lora_B):
        return lk.qlora_linear(x * 2, packed, lora_A, lora_B).relu()

    torch._dynamo.reset()
    results = []
    for call in (function, torch.compile(function, fullgraph=True)):
        leaves = [t.detach().clone().requires_grad_() for t in (x, *lora)]
        y = call(*leaves)
        y.sum().backward()
        results.append([y.detach(), *(t.grad for t in leaves)])
    for eager, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, eager, rtol=0.02, atol=0.02 * eager.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("closure", [False, True])
def test_compiled_to_cuda_graphs(closure, rows):
    """mode="reduce-overhead": a warm-up in the graph's memory pool, a capture, then replays; weights are not copied."""
    packed, lora, x = layer_and_input(rows, n=512, k=512)
    layer = lk.QuantLoRALinear.from_linear(torch.nn.Linear(512, 512), lk.QuantConfig(rank=16)).to("cuda", x.dtype)

    def function(x):
        for _ in range(2):
            x = (lk.qlora_linear(x, packed, *lora) if closure else layer(x)).relu()
        return x

    torch._dynamo.reset()
    compiled = torch.compile(function, mode="reduce-overhead", fullgraph=True)
    for seed in range(6):
        x = gaussian(*x.shape, seed=seed, device="cuda", dtype=x.dtype)
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x).clone()
        expected = function(x)
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def test_a_capture_that_would_read_a_code_book_says_so():
    packed, lora, x = layer_and_input(1)
    lk.qlora_linear(x, packed, *lora)  # compiles
    other = packed.clone()
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        lk.qlora_linear(x, other, *lora)
    torch.cuda.synchronize()


def test_tensors_of_the_host_are_refused():
    packed, (lora_A, lora_B), x = layer_and_input(3)
    with pytest.raises(ValueError, match="x is on cpu"):
        lk.qlora_linear(x.cpu(), packed)
    with pytest.raises(ValueError, match="lora_A is on cpu"):
        lk.qlora_linear(x, packed, lora_A.cpu(), lora_B)
    with pytest.raises(ValueError, match="adapter_ids is on cpu"):
        lk.qlora_linear(x, packed, lora_A[None], lora_B[None], adapter_ids=torch.zeros(3, dtype=torch.int64))


def test_streams_do_not_share_what_they_count_with():
    packed, lora, x = layer_and_input(4)
    expected = lk.qlora_linear(x, packed, *lora)
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(3)], []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(lk.qlora_linear(x, packed, *lora))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in results)


def test_ops_have_kernels():
    assert triton_routes.unavailable(torch.device("cuda", 0)) is None
    assert "triton" in lk.available_backends()
