"""Tiny random models of many architectures: no decode in a forward, the dense twin's outputs, every byte reported."""

from __future__ import annotations

import copy
import functools

import hf_models
import pytest
import torch
from helpers import gaussian, parameters_of
from hf_models import ARCHITECTURES, adapter_config, dense_twin, fill_adapters, logits, quantized_layers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import loftq_kernels as lk
from loftq_kernels.nn.base import PACKED


class Counter(TorchDispatchMode):
    """Counts the dense decodes and the products of what runs inside."""

    def __init__(self):
        super().__init__()
        self.decodes = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.decodes += func is torch.ops.loftq_kernels.dequantize.default
        self.products += func is torch.ops.loftq_kernels.qlora_linear.default
        return func(*args, **(kwargs or {}))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(64, 96, num_layers=2, bidirectional=True), nn.Linear(192, 64)

    def forward(self, x):
        return self.out(self.lstm(x)[0])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp = nn.MultiheadAttention(64, 2, batch_first=True), nn.Linear(64, 64)

    def forward(self, x):
        return self.mlp(self.attention(x, x, x)[0])


def encoder(**options) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 96, batch_first=True, **options), 2)


PADDING = torch.arange(7).expand(3, 7) >= torch.tensor([[7], [4], [6]])
OF_TORCH = {
    "encoder": (encoder, {"src": gaussian(3, 7, 64)}, ("self_attn.in_proj_weight",)),
    "masked encoder": (
        encoder,
        {"src": gaussian(3, 7, 64), "src_key_padding_mask": PADDING},
        ("self_attn.in_proj_weight",),
    ),
    "encoder of gelu, norm first": (
        lambda: encoder(activation="gelu", norm_first=True),
        {"src": gaussian(3, 7, 64)},
        ("self_attn.out_proj.weight",),
    ),
    "lstm": (Recurrent, {"x": gaussian(5, 3, 64)}, ("lstm.weight_ih_l0", "lstm.weight_hh_l1_reverse")),
    "attention": (Attention, {"x": gaussian(3, 7, 64)}, ("attention.in_proj_weight", "attention.out_proj.weight")),
}
NAMES = [*ARCHITECTURES, *OF_TORCH]
TIED = [name for name, one in ARCHITECTURES.items() if one.tied]
LAYER_TYPES = ("linear", "conv", "embedding")


@functools.cache
def bytes_before(name: str) -> int:
    """Those of the dense model."""
    return total_bytes(dense_model(name))


def dense_model(name: str) -> nn.Module:
    if name in ARCHITECTURES:
        return hf_models.dense_model(name)
    torch.manual_seed(0)
    return OF_TORCH[name][0]().eval()


@functools.cache
def quantized(name: str) -> tuple[nn.Module, lk.QuantizationReport]:
    """The model, its adapters filled with numbers, and the report."""
    if name in ARCHITECTURES:
        return hf_models.quantized(name)
    model = dense_model(name)
    report = lk.quantize_model(model, adapter_config(), progress=False)
    return fill_adapters(model), report


def outputs(model: nn.Module, name: str) -> torch.Tensor:
    if name in ARCHITECTURES:
        return logits(model(**hf_models.inputs(name)))
    return model(**OF_TORCH[name][1])


def unique_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by their first name: torch leaves out the other names of tied ones."""
    return dict([*model.named_parameters(), *model.named_buffers()])


def total_bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in unique_tensors(model).values())


@pytest.mark.parametrize("name", NAMES)
def test_forward_multiplies_by_packed_weights(name):
    model, report = quantized(name)
    assert quantized_layers(model).keys() == {layer.name for layer in report.layers}
    reads = ARCHITECTURES[name].reads if name in ARCHITECTURES else 0
    with torch.no_grad(), Counter() as counter:
        y = outputs(model, name)
    assert counter.decodes == reads and counter.products >= len(report.layers) - reads
    with torch.enable_grad(), Counter() as counter:  # where torch takes no fast path
        slow = outputs(model, name)
    assert counter.decodes == reads
    with torch.no_grad():
        expected = outputs(dense_twin(model), name)
    real = ~PADDING if name == "masked encoder" else slice(None)  # the fast path fills padding with zeros
    torch.testing.assert_close(y[real], expected[real], rtol=1e-4, atol=1e-4 * expected[real].abs().max().item())
    torch.testing.assert_close(slow[real], expected[real], rtol=1e-4, atol=1e-4 * expected[real].abs().max().item())


def expected_state(model: nn.Module, name: str) -> str:
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    if key in module._buffers:
        return "buffer"
    if not hasattr(module, "codes") or key == "bias":
        return "dense"
    return "packed" if key in PACKED else "adapter"


def check_account(model: nn.Module, report: lk.QuantizationReport) -> None:
    tensors = unique_tensors(model)
    named = {tensor.name: tensor for tensor in report.tensors}
    assert len(named) == len(report.tensors) and named.keys() == tensors.keys()
    for name, one in named.items():
        own = tensors[name]
        assert one.nbytes == own.numel() * own.element_size() and one.shape == tuple(own.shape)
        assert one.state == expected_state(model, name) and one.trained == own.requires_grad, name
        assert bool(one.reason) == (one.state == "dense"), name
    assert report.model_bytes == total_bytes(model)
    assert sum(report.bytes_of(state) for state in ("packed", "adapter", "dense", "buffer")) == report.model_bytes
    dense = sum(tensors[name].nbytes for name, one in named.items() if one.state == "dense")
    assert report.dense_share == pytest.approx(dense / total_bytes(model), abs=1e-12)
    assert f"{dense / total_bytes(model):.1%}" in report.summary and "left dense" in report.summary


@pytest.mark.parametrize("name", NAMES)
def test_report_adds_up(name):
    model, report = quantized(name)
    check_account(model, report)
    saved = report.bytes_before - report.bytes_after
    assert bytes_before(name) - saved == report.model_bytes, (
        "what is not quantized keeps its bytes, tied tensors count once"
    )
    names = {tensor.name for tensor in report.tensors}
    assert names.isdisjoint(f"{layer.name}.weight" for layer in report.layers)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_dense_is_named_with_the_reason(name):
    _, report = quantized(name)
    wanted = OF_TORCH[name][-1] if name in OF_TORCH else ARCHITECTURES[name].dense
    text = str(report)
    for part in wanted:
        found = [tensor for tensor in report.left_dense if part in tensor.name]
        assert found, part
        for tensor in found:
            owner = tensor.name.rpartition(".")[0]
            assert len(tensor.reason) > 5 and (tensor.name in text or owner in text or len(tensor.shape) < 2)
    sizes = [tensor.nbytes for tensor in report.left_dense]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    "name,kind",
    [
        ("mixtral", "a 3-D parameter of MixtralExperts"),
        ("qwen3 moe", "a 3-D parameter of Qwen3MoeExperts"),
        ("gpt-oss", "a 3-D parameter of GptOssExperts"),
        ("encoder", "a 2-D parameter of MultiheadAttention"),
        ("attention", "a 2-D parameter of MultiheadAttention"),
        ("lstm", "a 2-D parameter of LSTM"),
    ],
)
def test_parameters_that_no_layer_holds(name, kind):
    _, report = quantized(name)
    held = [tensor for tensor in report.left_dense if tensor.reason.startswith(kind)]
    assert held and all(str(tensor) in str(report) for tensor in held)
    assert sum(tensor.nbytes for tensor in held) > 0.2 * report.model_bytes
    last = max(held, key=lambda tensor: tensor.nbytes).name.rpartition(".")[2]
    assert last in report.summary


@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings(name):
    model, report = quantized(name)
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    assert len(every) > len(unique_tensors(model)), "the model ties nothing"
    table = model.get_input_embeddings().weight
    same = {key for key, tensor in every if tensor is table}
    assert len(same) > 1 and len(same & {tensor.name for tensor in report.tensors}) == 1
    again = lk.quantize_model(copy.deepcopy(model), adapter_config(layer_types=("linear", "embedding")), progress=False)
    assert not any(f"{layer.name}.weight" in same for layer in again.layers)


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "lstm", "encoder"])
def test_a_second_call_counts_what_was_quantized(name):
    model, first = quantized(name)
    model = copy.deepcopy(model)
    report = lk.quantize_model(model, adapter_config(), progress=False)
    assert report.layers == [] and sorted(report.already) == sorted(layer.name for layer in first.layers)
    assert f"{len(first.layers)} layers were quantized before" in report.summary
    check_account(model, report)
    assert report.tensors == first.tensors and report.skipped == first.skipped


def test_a_second_call_that_goes_on():
    model = dense_model("mixtral")
    first = lk.quantize_model(model, adapter_config(include="model.layers.0.*"), progress=False)
    before = total_bytes(model)
    report = lk.quantize_model(model, adapter_config(format="nf2"), progress=False)
    assert len(first.layers) == len(report.layers) == 4 and report.already == [layer.name for layer in first.layers]
    assert "; 4 layers were quantized before" in report.summary
    check_account(model, report)
    assert before - report.bytes_before + report.bytes_after == report.model_bytes


def gradients_of_twin(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Those of adapters by the chain rule from dW of the dense twin, W = Q + s B A: dA = s B^T dW, dB = s dW A^T."""
    twin = dense_twin(model).requires_grad_(True)
    twin(**hf_models.inputs(name)).loss.backward()
    gradients = {}
    for key, layer in quantized_layers(model).items():
        weight = twin.get_submodule(key).weight
        of_weight = (torch.zeros_like(weight) if weight.grad is None else weight.grad).flatten(1).double()
        gradients[f"{key}.lora_A"] = layer.scaling * layer.lora_B.double().T @ of_weight
        gradients[f"{key}.lora_B"] = layer.scaling * of_weight @ layer.over_columns(layer.lora_A).double().T
    return gradients


def check_training_step(model: nn.Module, name: str) -> None:
    """The gradients are the twin's, the loss falls, and nothing but adapters moves."""
    before, expected = parameters_of(model), gradients_of_twin(model, name)
    loss = model(**hf_models.inputs(name)).loss
    loss.backward()
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() == expected.keys()
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for key, parameter in trained.items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if gradient.shape == expected[key].shape:  # "qalora" has one column of lora_A for a group of columns
            torch.testing.assert_close(gradient.double(), expected[key], rtol=1e-3, atol=1e-5 * norm.item())
    nn.utils.clip_grad_norm_(trained.values(), 1e-3)
    torch.optim.SGD(trained.values(), lr=10).step()
    after = parameters_of(model)
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert moved and moved <= trained.keys()
    with torch.no_grad():
        assert model(**hf_models.inputs(name)).loss < loss


@pytest.mark.parametrize("name", hf_models.NAMES)
def test_a_training_step_moves_adapters_alone(name):
    check_training_step(copy.deepcopy(quantized(name)[0]), name)


OTHER_CONFIGS = {
    "llama": {"format": "nf2", "group_size": 64},
    "t5": {"format": "nf2"},
    "falcon": {"format": "int4"},
    "whisper": {"format": "int4", "layer_types": LAYER_TYPES},
    "qwen3": {"adapter": "qalora", "format": "int4"},
    "bart": {"adapter": "qalora", "format": "int2"},
    "gpt2": {"layer_types": LAYER_TYPES},
    "vit": {"layer_types": LAYER_TYPES},
    "wav2vec2": {"layer_types": LAYER_TYPES},
    "clip": {"layer_types": LAYER_TYPES},
    "llava": {"layer_types": LAYER_TYPES},
    "bert": {"layer_types": LAYER_TYPES},
    "mamba": {"layer_types": LAYER_TYPES},
}
KINDS_FOUND = {
    "whisper": "QuantLoRAConv1d",
    "gpt2": "QuantLoRAEmbedding",  # of positions: that of tokens is tied to the head
    "vit": "QuantLoRAConv2d",
    "llava": "QuantLoRAConv2d",
    "bert": "QuantLoRAEmbedding",
}


@pytest.mark.parametrize("name", OTHER_CONFIGS)
def test_other_configs(name):
    model = dense_model(name)
    report = lk.quantize_model(model, adapter_config(**OTHER_CONFIGS[name]), progress=False)
    assert KINDS_FOUND.get(name, "QuantLoRALinear") in {
        type(layer).__name__ for layer in quantized_layers(model).values()
    }
    check_account(model, report)
    with torch.no_grad():
        y, expected = outputs(model, name), outputs(dense_twin(model), name)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    check_training_step(fill_adapters(model), name)
