"""Tiny random models of many architectures: no decode in a forward, the dense twin's outputs, every byte reported."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from helpers import gaussian
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import loftq_kernels as lk
from loftq_kernels.nn.base import PACKED

TOKENS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "intermediate_size": 96, "vocab_size": 96}
DECODER = {**TEXT, "num_key_value_heads": 1, "tie_word_embeddings": False}
WHISPER = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in (("layers", 2), ("ffn_dim", 96))}
WHISPER |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_source_positions": 16}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
DISENTANGLED = {"relative_attention": True, "position_buckets": 16, "share_att_key": True, "max_relative_positions": -1}
DISENTANGLED |= {"pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}
T5 = {"vocab_size": 96, "d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 2, "num_heads": 2}
# Name: (class of transformers, config, inputs, what of the left dense is named).
TRANSFORMERS = {
    "t5": ("T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0}, "labels", ()),
    "t5 gated": (
        "T5ForConditionalGeneration",
        {**T5, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"},
        "labels",
        ("shared.weight",),
    ),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 96, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 2}, "", ()),
    "deberta": ("DebertaV2Model", {**TEXT, **DISENTANGLED}, "", ("encoder.rel_embeddings.weight",)),
    "bert": ("BertForSequenceClassification", {**TEXT, "max_position_embeddings": 32}, "", ()),
    "llama": ("LlamaForCausalLM", DECODER, "", ("lm_head.weight",)),
    "gemma": ("GemmaForCausalLM", {**DECODER, "head_dim": 32, "tie_word_embeddings": True}, "", ()),
    "mixtral": ("MixtralForCausalLM", {**DECODER, "num_local_experts": 4}, "", ("experts", "gate.weight")),
    "qwen3 moe": (
        "Qwen3MoeForCausalLM",
        {**DECODER, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        "",
        ("experts", "gate.weight"),
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        {**DECODER, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
        "",
        ("experts", "router.weight"),
    ),
    "vit": ("ViTForImageClassification", {**SIZES, "intermediate_size": 96, "image_size": 16, "patch_size": 8}, "", ()),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**WHISPER, "vocab_size": 96, "d_model": 64, "num_mel_bins": 16, "max_target_positions": 32},
        "",
        ("model.encoder.conv1.weight",),
    ),
}
INPUTS = {
    "vit": {"pixel_values": gaussian(2, 3, 16, 16)},
    "whisper": {"input_features": gaussian(2, 16, 32), "decoder_input_ids": TOKENS},
}


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
TIED = {"t5", "gpt2", "gemma", "whisper"}
NAMES = [*TRANSFORMERS, *OF_TORCH]


def config(**options) -> lk.QuantConfig:
    return lk.QuantConfig(**{"rank": 4, "num_iter": 1, "group_size": 32, **options})


def dense_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in OF_TORCH:
        return OF_TORCH[name][0]().eval()
    transformers = pytest.importorskip("transformers")
    cls, options = TRANSFORMERS[name][:2]
    cls = getattr(transformers, cls)
    return cls(cls.config_class(**options)).eval()


@functools.cache
def quantized(name: str) -> tuple[nn.Module, lk.QuantizationReport, int]:
    """The model, its adapters filled with numbers, the report and the model's bytes before."""
    model = dense_model(name)
    before = total_bytes(model)
    report = lk.quantize_model(model, config(), progress=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model, report, before


def inputs(name: str) -> dict[str, torch.Tensor]:
    if name in OF_TORCH:
        return OF_TORCH[name][1]
    labels = {"labels": TOKENS} if TRANSFORMERS[name][2] == "labels" else {}
    return INPUTS.get(name, {"input_ids": TOKENS, **labels})


def outputs(model: nn.Module, name: str) -> torch.Tensor:
    result = model(**inputs(name))
    return result if isinstance(result, torch.Tensor) else result["logits" if "logits" in result else 0]


def unique_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by their first name: torch leaves out the other names of tied ones."""
    return dict([*model.named_parameters(), *model.named_buffers()])


def total_bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in unique_tensors(model).values())


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "codes")}


def dense_twin(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for name, layer in quantized_layers(model).items():
        twin.set_submodule(name, getattr(layer, layer.dense_copy)())
    return twin


@pytest.mark.parametrize("name", NAMES)
def test_forward_multiplies_by_packed_weights(name):
    model, report, _ = quantized(name)
    assert quantized_layers(model).keys() == {layer.name for layer in report.layers}
    with torch.no_grad(), Counter() as counter:
        y = outputs(model, name)
    assert counter.decodes == 0 and counter.products >= len(report.layers)
    with torch.enable_grad(), Counter() as counter:  # where torch takes no fast path
        slow = outputs(model, name)
    assert counter.decodes == 0
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
    model, report, before = quantized(name)
    check_account(model, report)
    saved = report.bytes_before - report.bytes_after
    assert before - saved == report.model_bytes, "what is not quantized keeps its bytes, tied tensors count once"
    names = {tensor.name for tensor in report.tensors}
    assert names.isdisjoint(f"{layer.name}.weight" for layer in report.layers)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_dense_is_named_with_the_reason(name):
    _, report, _ = quantized(name)
    wanted = (OF_TORCH if name in OF_TORCH else TRANSFORMERS)[name][-1]
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
    _, report, _ = quantized(name)
    held = [tensor for tensor in report.left_dense if tensor.reason.startswith(kind)]
    assert held and all(str(tensor) in str(report) for tensor in held)
    assert sum(tensor.nbytes for tensor in held) > 0.2 * report.model_bytes
    last = max(held, key=lambda tensor: tensor.nbytes).name.rpartition(".")[2]
    assert last in report.summary


@pytest.mark.parametrize("name", sorted(TIED))
def test_tied_embeddings(name):
    model, report, _ = quantized(name)
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    assert len(every) > len(unique_tensors(model)), "the model ties nothing"
    table = model.get_input_embeddings().weight
    same = {key for key, tensor in every if tensor is table}
    assert len(same) > 1 and len(same & {tensor.name for tensor in report.tensors}) == 1
    again = lk.quantize_model(copy.deepcopy(model), config(layer_types=("linear", "embedding")), progress=False)
    assert not any(f"{layer.name}.weight" in same for layer in again.layers)


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "lstm", "encoder"])
def test_a_second_call_counts_what_was_quantized(name):
    model, first, _ = quantized(name)
    model = copy.deepcopy(model)
    report = lk.quantize_model(model, config(), progress=False)
    assert report.layers == [] and sorted(report.already) == sorted(layer.name for layer in first.layers)
    assert f"{len(first.layers)} layers were quantized before" in report.summary
    check_account(model, report)
    assert report.tensors == first.tensors and report.skipped == first.skipped


def test_a_second_call_that_goes_on():
    model = dense_model("mixtral")
    first = lk.quantize_model(model, config(include="model.layers.0.*"), progress=False)
    before = total_bytes(model)
    report = lk.quantize_model(model, config(format="nf2"), progress=False)
    assert len(first.layers) == len(report.layers) == 4 and report.already == [layer.name for layer in first.layers]
    assert "; 4 layers were quantized before" in report.summary
    check_account(model, report)
    assert before - report.bytes_before + report.bytes_after == report.model_bytes


def test_other_kinds_of_layers():
    """ViT's patches are a convolution; GPT-2's positions an embedding, its tokens one that is tied to the head."""
    options = {"layer_types": ("linear", "conv", "embedding")}
    for name, kind in (("vit", "QuantLoRAConv2d"), ("gpt2", "QuantLoRAEmbedding"), ("whisper", "QuantLoRAConv1d")):
        model = dense_model(name)
        report = lk.quantize_model(model, config(**options), progress=False)
        assert kind in {type(module).__name__ for module in model.modules()}
        check_account(model, report)
        twin = dense_twin(model)
        with torch.no_grad():
            torch.testing.assert_close(outputs(model, name), outputs(twin, name), rtol=1e-3, atol=1e-4)
