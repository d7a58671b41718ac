"""`quantize_model`: which layers it replaces, what it leaves alone and why, and what it reports."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import (
    TOKENS,
    assert_unchanged,
    gaussian,
    load_file,
    parameters_of,
    same_packed,
    save_file,
    tiny_bert,
    tiny_gpt2,
    tiny_model,
)
from torch import nn

import loftq_kernels as lk
from loftq_kernels.models import convert
from loftq_kernels.nn import kinds

LAYERS = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "head"]


def config(**fields) -> lk.QuantConfig:
    return lk.QuantConfig(**{"rank": 4, "num_iter": 1, **fields})


def quantize(model: nn.Module, **fields) -> lk.QuantizationReport:
    return lk.quantize_model(model, config(**fields), progress=False)


def quantized_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, lk.QuantLoRALinear)]


def merged(model: nn.Module) -> nn.Module:
    """A copy with plain linear layers that compute the same."""
    result = copy.deepcopy(model)
    for name in quantized_names(result):
        parent, _, attribute = name.rpartition(".")
        setattr(result.get_submodule(parent), attribute, result.get_submodule(name).merged_linear())
    return result


def test_replaces_every_linear_layer():
    model, x = tiny_model(), gaussian(3, 64)
    dense = model(x)
    report = quantize(model, format="int8")
    assert quantized_names(model) == LAYERS == [layer.name for layer in report.layers] and not report.skipped
    torch.testing.assert_close(model(x), merged(model)(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x), dense, rtol=0.05, atol=0.05)


def test_each_layer_as_if_alone():
    model = tiny_model()
    dense = copy.deepcopy(model)
    report = quantize(model, num_iter=3)
    for layer in report.layers:
        alone = lk.QuantLoRALinear.from_linear(dense.get_submodule(layer.name), config(num_iter=3))
        module = model.get_submodule(layer.name)
        torch.testing.assert_close(module.weight, alone.weight, rtol=1e-3, atol=1e-3)
        weight = dense.get_submodule(layer.name).weight
        assert layer.error == pytest.approx(((module.weight - weight).norm() / weight.norm()).item(), rel=1e-4)


class TestSelection:
    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({"include": "layers.*"}, LAYERS[:4]),
            ({"include": r"re:layers\.\d\.up"}, [LAYERS[0], LAYERS[2]]),
            ({"exclude": ("*.down", "head")}, [LAYERS[0], LAYERS[2]]),
            ({"include": ("layers.0.*", "head"), "exclude": "*.up"}, ["layers.0.down", "head"]),
        ],
        ids=str,
    )
    def test_patterns(self, fields, expected):
        model = tiny_model()
        report = quantize(model, **fields)
        assert quantized_names(model) == expected
        assert sorted(report.skipped) == sorted(set(LAYERS) - set(expected))
        assert set(report.skipped.values()) == {"excluded by include/exclude patterns"}

    def test_overrides(self):
        model = tiny_model()
        overrides = {"layers.0.*": {"format": "nf2", "rank": 2, "group_size": 32}, "head": None}
        report = quantize(model, overrides=overrides)
        described = {layer.name: (layer.format, layer.rank) for layer in report.layers}
        assert described == dict.fromkeys(LAYERS[:2], ("nf2", 2)) | dict.fromkeys(LAYERS[2:4], ("nf4", 4))
        assert report.skipped == {"head": "left dense by an override"} and type(model.head) is nn.Linear
        assert model.layers[0]["up"].group_size == 32 and model.layers[1]["up"].group_size == 64

    def test_initializer_by_override(self):
        model = tiny_model()
        quantize(model, overrides={"head": {"init": "qlora"}})
        assert not model.head.lora_B.any() and model.layers[0]["up"].lora_B.any()

    def test_nothing_matches(self):
        model = tiny_model()
        with pytest.raises(ValueError, match="include: the pattern 'encoder.*' matches no module"):
            quantize(model, include="encoder.*")
        with pytest.raises(ValueError, match="no layer to quantize: include=.*norm"):
            quantize(model, include="norm")

    def test_the_model_is_a_linear_layer(self):
        with pytest.raises(ValueError, match="from_linear"):
            quantize(nn.Linear(64, 64))

    def test_a_second_call_goes_on(self):
        model = tiny_model()
        quantize(model, include="layers.0.*")
        before = model.layers[0]["up"]
        assert [layer.name for layer in quantize(model, format="nf2").layers] == LAYERS[2:]
        assert model.layers[0]["up"] is before and quantize(model).layers == []


class TestSkips:
    def reasons(self, model, **fields):
        return quantize(model, **fields).skipped

    def test_tied_weights(self):
        model = nn.ModuleDict({"embedding": nn.Embedding(10, 64), "body": nn.Linear(64, 64), "out": nn.Linear(64, 10)})
        model["out"].weight = model["embedding"].weight
        assert "shared with embedding.weight" in self.reasons(model)["out"]
        assert model["out"].weight is model["embedding"].weight

    def test_two_layers_with_one_weight(self):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
        model[1].weight = model[0].weight
        reasons = self.reasons(model)
        assert "1.weight" in reasons["0"] and "0.weight" in reasons["1"] and quantized_names(model) == ["2"]

    def test_shared_module_is_replaced_everywhere(self):
        shared = nn.Linear(64, 64)
        model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.Linear(64, 64), shared)})
        report = quantize(model)
        assert model["a"] is model["b"][1] and type(model["a"]) is lk.QuantLoRALinear
        assert sorted(layer.name for layer in report.layers) == ["a", "b.0"]

    def test_subclasses(self):
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 2), "linear": nn.Linear(64, 64)})
        reasons = self.reasons(model)
        assert "NonDynamicallyQuantizableLinear" in reasons["attention.out_proj"]
        assert quantized_names(model) == ["linear"]

    def test_parametrized(self):
        model = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(64, 64)), nn.Linear(64, 64))
        assert "Parametrized" in self.reasons(model)["0"]

    @pytest.mark.parametrize(
        "register",
        [
            "register_forward_hook",
            "register_forward_pre_hook",
            "register_full_backward_hook",
            "register_full_backward_pre_hook",
        ],
    )
    def test_hooks(self, register):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        getattr(model[0], register)(lambda *args: None)
        assert "hooks" in self.reasons(model)["0"] and quantized_names(model) == ["1"]

    def test_rank_above_the_smaller_side(self):
        """The smaller side is the rank, and the report says so; with lora_alpha the scaling is that rank's."""
        model = tiny_model()
        report = quantize(model, rank=11, lora_alpha=20)  # the head has 10 rows
        assert not report.skipped and [layer.rank for layer in report.layers] == [11, 11, 11, 11, 10]
        assert model.head.rank == 10 and model.head.scaling == 2
        note = report.layers[-1].note
        assert note == "rank 11 limited to 10, its smaller side; scaling 2" and note in str(report)

    def test_meta(self):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, device="meta"))
        assert "meta" in self.reasons(model)["1"]

    def test_without_rows(self):
        with pytest.warns(UserWarning, match="zero-element"):
            model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 0))
        assert "(0, 64)" in self.reasons(model, rank=None)["1"]


class TestBadWeights:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_not_finite(self, bad):
        """Found before anything is changed, in whatever layer it is."""
        model = tiny_model()
        model.head.weight.data[7, 3] = bad
        before = parameters_of(model)
        with pytest.raises(ValueError, match=rf"head\.weight holds {bad} in row 7, column 3"):
            quantize(model)
        assert quantized_names(model) == []
        torch.testing.assert_close(parameters_of(model), before, rtol=0, atol=0, equal_nan=True)
        assert all(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize("rank", [None, 4])
    def test_scales_that_do_not_fit(self, rank):
        model = tiny_model()
        model.layers[1]["down"].weight.data *= 1e7
        with pytest.raises(ValueError, match=r"layers\.1\.down\.weight row .*scale_dtype=torch.float32"):
            quantize(model, rank=rank)
        assert model(gaussian(2, 64)).shape == (2, 10)
        quantize(model, rank=rank, scale_dtype=torch.float32)
        assert set(quantized_names(model)) == set(LAYERS)


def test_interrupted(monkeypatch):
    """Ctrl-C midway leaves a working model whose finished layers stay; the next call does the rest."""
    model, x, calls = tiny_model(), gaussian(3, 64), []
    initialize = convert.initialize

    def interrupt(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return initialize(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(convert, "initialize", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize(model)
    done = quantized_names(model)
    assert done == ["layers.0.up", "layers.1.up"]
    torch.testing.assert_close(model(x), merged(model)(x), rtol=1e-4, atol=1e-4)
    rest = quantize(model)
    assert {layer.name for layer in rest.layers} == set(LAYERS) - set(done)
    assert set(quantized_names(model)) == set(LAYERS)


class TestModelsOfTransformers:
    def test_gpt2(self):
        """Conv1D stores [in, out]; the head is tied to the embedding and comes apart."""
        model = tiny_gpt2()
        dense = model(TOKENS).logits
        report = quantize(model, format="int8", quantize_head=True)
        assert len(report.layers) == 9 and report.layers[-1].name == "lm_head" and report.skipped == {}
        shapes = {layer.name: (layer.out_features, layer.in_features) for layer in report.layers}
        assert shapes["transformer.h.0.attn.c_attn"] == (192, 64) and shapes["transformer.h.0.mlp.c_proj"] == (64, 256)
        assert torch.nn.functional.cosine_similarity(model(TOKENS).logits, dense, -1).min() > 0.999
        torch.testing.assert_close(model(TOKENS).logits, merged(model)(TOKENS).logits, rtol=1e-3, atol=1e-3)

    def test_conv1d_error_is_of_the_transpose(self):
        model = tiny_gpt2()
        dense = model.transformer.h[0].attn.c_attn.weight.detach().T.clone()
        report = quantize(model, include="*.0.attn.c_attn", format="nf2")
        layer = model.transformer.h[0].attn.c_attn
        assert same_packed(layer.packed, lk.quantize(dense, "nf2"))
        assert report.error == pytest.approx(((layer.weight - dense).norm() / dense.norm()).item(), rel=1e-4)

    def test_bert(self):
        model = tiny_bert()
        dense = model(TOKENS).last_hidden_state
        report = quantize(model, format="int8")
        assert len(report.layers) == 13
        assert torch.nn.functional.cosine_similarity(model(TOKENS).last_hidden_state, dense, -1).min() > 0.999

    def test_conv1d_is_known_without_transformers(self):
        """The name alone is not enough."""

        class Conv1D(nn.Module):
            pass

        assert not kinds.is_conv1d(Conv1D())


class TestReport:
    def test_arithmetic(self):
        model = tiny_model()
        report = quantize(model, format="nf2", exclude="head")
        up, down = report.layers[:2]
        assert (up.out_features, up.in_features, down.out_features, down.in_features) == (128, 64, 64, 128)
        assert up.bytes_before == 4 * (128 * 64 + 128)
        assert up.packed_bytes == 128 * 16 + 2 * 128 + 16
        assert up.bytes_after == up.packed_bytes + 4 * (128 + 4 * (128 + 64))
        assert up.bits_per_weight == 8 * up.packed_bytes / (128 * 64)
        assert report.bytes_before == sum(layer.bytes_before for layer in report.layers)
        assert report.bytes_after == sum(layer.bytes_after for layer in report.layers)
        packed = sum(layer.packed_bytes for layer in report.layers)
        assert report.bits_per_weight == 8 * packed / (4 * 128 * 64)
        assert report.error == pytest.approx(sum(layer.error for layer in report.layers) / 4)
        assert report.seconds > 0

    def test_text(self):
        text = str(quantize(tiny_model(), overrides={"head": None}))
        for part in ("layers.0.up", "128x64", "nf4", "skipped: left dense by an override", "4 layers", "MiB"):
            assert part in text
        assert "0 layers" in str(lk.QuantizationReport())


@pytest.mark.parametrize("freeze", [True, False])
def test_freeze(freeze):
    model = tiny_model()
    lk.quantize_model(model, config(), progress=False, freeze=freeze)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {f"{name}.lora_{x}" for name in LAYERS for x in "AB"}
    dense = {"norm.weight", "norm.bias", *(f"{name}.bias" for name in LAYERS if name != "head")}
    assert trained == (adapters if freeze else adapters | dense)
    lk.train_only_adapters(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapters


def test_state_dict_can_be_saved(tmp_path):
    """safetensors refuses tensors that share memory: layers of one batch have nothing in common."""
    model, blank = tiny_model(), tiny_model(5)
    quantize(model)
    quantize(blank)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    blank.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert torch.equal(blank(gaussian(3, 64)), model(gaussian(3, 64)))


def test_modes_and_dtypes_are_kept():
    model = tiny_model().bfloat16()
    model.layers[0]["up"].train()
    quantize(model)
    assert model.layers[0]["up"].training and not model.layers[0]["down"].training
    assert model.head.lora_A.dtype == torch.float32 and model.head.dtype == model.head.weight.dtype == torch.bfloat16
    assert model(gaussian(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_no_adapter():
    model = tiny_model()
    dense = model.head.weight.detach().clone()
    quantize(model, rank=None)
    assert same_packed(model.head.packed, lk.quantize(dense)) and model.head.lora_A is None


@pytest.mark.parametrize("init", lk.initializer_names())
def test_initializers(init):
    model, x = tiny_model(), gaussian(3, 64)
    statistics = None
    if lk.QuantConfig(init=init).needs_statistics:
        statistics = lk.collect_activations(model, [gaussian(200, 64)], config(), progress=False)
    report = lk.quantize_model(model, config(init=init), statistics=statistics, progress=False)
    assert len(report.layers) == 5 and model(x).isfinite().all()


def test_progress_bar(capsys):
    """Where standard error is no terminal: nothing unless asked for, and then a line."""
    lk.quantize_model(tiny_model(), config())
    assert capsys.readouterr().err == ""
    lk.quantize_model(tiny_model(), config(), progress=True)
    assert capsys.readouterr().err.startswith("quantize: 5 of 5 layers, ")
    quantize(tiny_model())
    output = capsys.readouterr()
    assert output.err == output.out == ""


def test_only_the_adapters_learn():
    model, x = tiny_model(), gaussian(8, 64)
    quantize(model)
    before = parameters_of(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(x).square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in parameters_of(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.lora_{x}" for name in LAYERS for x in "AB"}


def test_unquantized_parts_are_not_touched():
    model = tiny_model()
    norm, shift = model.norm, model.shift
    before = parameters_of(norm)
    quantize(model)
    assert model.norm is norm and model.shift is shift
    assert_unchanged(norm, before)
