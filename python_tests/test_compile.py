"""`torch.compile(fullgraph=True)` and `torch.export` give what eager gives."""

from __future__ import annotations

import pytest
import torch
from helpers import adapter, gaussian, tiny_model

import loftq_kernels as lk

COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outputs_and_gradients(function, tensors):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*tensors)
    y.square().sum().backward()
    return [y.detach(), *(t.grad for t in tensors)]


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("format", ["nf4", "int2"])
def test_functional(format, compiler):
    packed = lk.quantize(gaussian(7, 130), format)

    def function(x, lora_A, lora_B, bias):
        return lk.qlora_linear(x * 2, packed, lora_A, lora_B, scaling=0.5, bias=bias).relu()

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for leading in ((5,), (2, 3)):
        tensors = (gaussian(*leading, 130, seed=2), *adapter(7, 130, 3), gaussian(7, seed=5))
        for eager, fast in zip(*(outputs_and_gradients(f, tensors) for f in (function, compiled)), strict=True):
            torch.testing.assert_close(fast, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_model(compiler):
    model = tiny_model()
    lk.quantize_model(model, lk.QuantConfig(format="nf2", rank=4, num_iter=1), progress=False)
    compiled, x = torch.compile(model, fullgraph=True, backend=compiler), gaussian(3, 64)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        trained = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        assert len(trained) == 10
        results.append([y.detach(), *trained])
    for eager, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-4)


def test_changing_batch_is_compiled_once_more_at_most():
    packed = lk.quantize(gaussian(7, 130))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: lk.qlora_linear(x, packed), fullgraph=True, backend=count)
    for batch in (3, 4, 5, 60, 7):
        x = gaussian(batch, 130)
        assert torch.equal(compiled(x), lk.qlora_linear(x, packed))
    assert len(graphs) <= 2  # the first shape, then a dynamic one


def test_a_weights_address_is_static():
    """mode="reduce-overhead" copies the other inputs of a graph at every call."""
    packed, kinds = lk.quantize(gaussian(7, 130)), []

    def look(graph, inputs):
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        kinds.extend(node.meta["tensor_dict"].get("_dynamo_static_input_type") for node in placeholders)
        return graph.forward

    torch.compile(lambda x: lk.qlora_linear(x, packed), fullgraph=True, backend=look)(gaussian(2, 130))
    assert sorted(map(str, kinds)) == ["None", "unguarded", "unguarded", "unguarded"]
    marked = gaussian(1)
    torch._dynamo.mark_static_address(marked)
    assert marked._dynamo_static_input_type == packed.codes._dynamo_static_input_type


def test_adapter_switch_is_seen_by_the_compiled_module():
    layer = lk.QuantLoRALinear.from_linear(torch.nn.Linear(64, 32), lk.QuantConfig(rank=4, num_iter=1))
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), gaussian(3, 64)
    with_adapter = compiled(x)
    layer.disable_adapter()
    without = compiled(x)
    assert torch.equal(without, layer(x)) and not torch.equal(with_adapter, without)


def test_dequantize():
    packed = lk.quantize(gaussian(7, 130), "int4")

    def decode(scale):
        offset, codebook = packed.offset, packed.codebook
        return torch.ops.loftq_kernels.dequantize(packed.codes, scale, offset, codebook, 130, 64, torch.float32)

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(packed.scale), packed.dequantize())


def test_export():
    model = tiny_model()
    lk.quantize_model(model, lk.QuantConfig(rank=4, num_iter=1), progress=False)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (gaussian(3, 64),), dynamic_shapes={"x": {0: batch}})
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("loftq_kernels.qlora_linear" in name for name in names) == 5
    x = gaussian(11, 64)
    torch.testing.assert_close(program.module()(x), model(x))
