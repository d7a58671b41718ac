"""Layers of the same input run together: the same values and gradients, no weight held twice."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from helpers import DEVICES, gaussian
from torch import nn

import loftq_kernels as lk


def make_layers(device="cpu", format="nf4", ranks=(4, None, 2), outs=(7, 64, 33), bias=(True, False, True)):
    layers = []
    for i, (rank, n, has_bias) in enumerate(zip(ranks, outs, bias, strict=True)):
        torch.manual_seed(i)
        cfg = lk.QuantConfig(format=format, rank=rank, num_iter=1, lora_alpha=None if rank is None else 3 * rank)
        layer = lk.QuantLoRALinear.from_linear(nn.Linear(130, n, bias=has_bias), cfg)
        layers.append(layer.to(device))
    return layers


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format", ["nf4", "int2"])
def test_values_and_gradients(format, device):
    layers = make_layers(device, format)
    x = gaussian(2, 5, 130, device=device).requires_grad_()
    apart = [layer(x) for layer in layers]
    leaves = [x, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(sum(y.square().sum() for y in apart), leaves)
    together = lk.QuantLoRALinearGroup(layers)(x)
    for mine, other in zip(together, apart, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    for mine, other in zip(torch.autograd.grad(sum(y.square().sum() for y in together), leaves), grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_nothing_is_held_twice_and_layers_go_on_working():
    layers, x = make_layers(), gaussian(3, 130)
    apart = [layer(x) for layer in layers]
    state = [{name: t.clone() for name, t in layer.state_dict().items()} for layer in layers]
    group = lk.QuantLoRALinearGroup(layers)
    for name in ("codes", "scale"):
        stacked = getattr(group.packed, name)
        assert stacked.shape[0] == sum(layer.out_features for layer in layers)
        assert {getattr(layer, name).untyped_storage().data_ptr() for layer in layers} == {stacked.data_ptr()}
    for layer, expected, before in zip(layers, apart, state, strict=True):
        assert torch.equal(layer(x), expected)
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@torch.no_grad()
def test_layers_of_weights_alone():
    """No adapter and no bias; then a bias that moves from one layer to another."""
    layers, x = make_layers(ranks=(None, None), outs=(64, 64), bias=(False, False)), gaussian(3, 130)
    group = lk.QuantLoRALinearGroup(layers)
    bias = nn.Parameter(gaussian(64))
    for own in ((None, None), (bias, None), (None, bias)):
        for layer, value in zip(layers, own, strict=True):
            layer.bias = value
        for mine, layer in zip(group(x), layers, strict=True):
            torch.testing.assert_close(mine, layer(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sees_parameters_that_were_replaced():
    """New parameters may have the ids and the memory of earlier ones, as after two swaps in a row."""
    layers, x = make_layers(), gaussian(3, 130)
    group = lk.QuantLoRALinearGroup(layers)
    for seed in range(20):
        for swap in (0, 1):
            layers[0].lora_B = nn.Parameter(gaussian(7, 4, seed=2 * seed + swap))
        torch.testing.assert_close(group(x)[0], layers[0](x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sees_changes_of_its_layers():
    layers, x = make_layers(), gaussian(3, 130)
    group = lk.QuantLoRALinearGroup(layers)

    def check():
        for mine, layer in zip(group(x), layers, strict=True):
            torch.testing.assert_close(mine, layer(x), rtol=1e-4, atol=1e-4)

    check()
    assert group._adapters_and_bias()[0] is group._adapters_and_bias()[0]  # copied once
    layers[0].lora_B.add_(1)
    check()
    layers[2].disable_adapter()
    check()
    layers[0].load_state_dict({name: t.clone() for name, t in layers[0].state_dict().items()}, assign=True)
    layers[1].codes = layers[1].codes.clone()
    check()
    assert layers[1].codes.untyped_storage().data_ptr() == group.packed.codes.data_ptr()
    for layer in layers:
        layer.to(torch.float64)
    assert group(x.double())[0].dtype == torch.float64
    layers[0].disable_adapter()
    assert group._adapters_and_bias()[0] is None


@torch.no_grad()
def test_writes_to_data_are_seen_after_invalidate():
    layers, x = make_layers(), gaussian(3, 130)
    group = lk.QuantLoRALinearGroup(layers)
    before = group(x)[0].clone()
    layers[0].lora_B.data.copy_(gaussian(*layers[0].lora_B.shape, seed=7))
    assert torch.equal(group(x)[0], before)  # PyTorch does not count such a write
    group.invalidate()
    torch.testing.assert_close(group(x)[0], layers[0](x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_a_graph_reads_stays(monkeypatch):
    """A replay after the adapters changed reads the memory of the copy that was there at the capture."""
    layers, x = make_layers(), gaussian(3, 130)
    group = lk.QuantLoRALinearGroup(layers)
    group(x)
    for capturing, stays in ((True, True), (False, False)):
        monkeypatch.setattr("loftq_kernels.nn.group._capturing", lambda _, now=capturing: now)
        group(x)
        copied = weakref.ref(group._adapters_and_bias()[0])
        monkeypatch.setattr("loftq_kernels.nn.group._capturing", lambda _: False)
        layers[0].lora_B.add_(1)
        group(x)
        assert (copied() is not None) == stays


def test_inference_mode_then_training():
    layers, x = make_layers(), gaussian(3, 130)
    with torch.inference_mode():
        group = lk.QuantLoRALinearGroup(layers)
        expected = [y.clone() for y in group(x)]
    y = group(x)
    y[0].sum().backward()
    assert layers[0].lora_B.grad is not None and layers[1].bias is None
    torch.testing.assert_close(y[0].detach(), expected[0].clone())


def test_compiles_copies_and_saves(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(64, 32), nn.Linear(64, 16)
            self.group = None

        def forward(self, x):
            q, k = (self.q(x), self.k(x)) if self.group is None else self.group(x)
            return q[..., :16] * k

    model, x = Attention().eval(), gaussian(3, 64)
    lk.quantize_model(model, lk.QuantConfig(rank=2, num_iter=1), progress=False)
    names, expected = list(model.state_dict()), model(x)
    model.group = lk.QuantLoRALinearGroup([model.q, model.k])
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), expected)
    assert twin.group.layers[0] is twin.q and twin.group.packed.codes is not model.group.packed.codes
    lk.save_quantized(model, tmp_path / "saved")
    loaded = lk.load_quantized(tmp_path / "saved", model=Attention())
    torch.testing.assert_close(loaded.eval()(x), expected)


def test_layers_that_do_not_fit():
    layers = make_layers()
    with pytest.raises(ValueError, match="at least one"):
        lk.QuantLoRALinearGroup([])
    with pytest.raises(ValueError, match="twice"):
        lk.QuantLoRALinearGroup([layers[0], layers[0]])
    with pytest.raises(TypeError, match="Linear"):
        lk.QuantLoRALinearGroup([layers[0], nn.Linear(130, 5)])
    with pytest.raises(ValueError, match="in_features=64"):
        lk.QuantLoRALinearGroup([layers[0], lk.QuantLoRALinear(64, 32)])
    with pytest.raises(ValueError, match="format nf2"):
        lk.QuantLoRALinearGroup([layers[0], lk.QuantLoRALinear(130, 32, format="nf2")])
    with pytest.raises(ValueError, match="meta"):
        lk.QuantLoRALinearGroup([layers[0], lk.QuantLoRALinear(130, 32, device="meta")])
