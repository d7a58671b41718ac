"""QA-LoRA adapters: what they compute, how they start, and that merging them is exact."""

from __future__ import annotations

import copy
import json

import oracle
import pytest
import torch
from helpers import BACKENDS, FORMATS, adapter, assert_unchanged, gaussian, parameters_of, same_packed, tiny_model
from torch import nn
from torch.nn.functional import avg_pool1d, pad

import loftq_kernels as lk
from loftq_kernels.checkpoints.manifest import CONFIG_NAME
from loftq_kernels.initializers import initialize
from loftq_kernels.initializers.qalora import expand_groups
from loftq_kernels.nn.adapters import adapter_parameters

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
GROUPS = {32: 5, 64: 3, -1: 1}  # of 130 columns; the last group of 32 and of 64 holds two


def make_layer(format="int4", group_size=32, dtype=torch.float32, **options) -> lk.QuantLoRALinear:
    """33 x 130 with an adapter that matters: B is no longer zero."""
    torch.manual_seed(0)
    rank = min(3, GROUPS[group_size])
    cfg = lk.QuantConfig(format, group_size, **{"rank": rank, "lora_alpha": 5, "adapter": "qalora", **options})
    layer = lk.QuantLoRALinear.from_linear(nn.Linear(130, 33), cfg).to(dtype)
    nn.init.normal_(layer.lora_B)
    return layer


def pooled(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """The authors' pooling: AvgPool1d of x, padded with zeros to whole groups."""
    width = x.shape[-1] if group_size == -1 else group_size
    flat = x.reshape(-1, 1, x.shape[-1])
    return avg_pool1d(pad(flat, (0, -x.shape[-1] % width)), width).reshape(*x.shape[:-1], -(-x.shape[-1] // width))


def exact(layer: lk.QuantLoRALinear, x: torch.Tensor) -> torch.Tensor:
    x, lora_A, lora_B, bias = (t.detach().double() for t in (x, layer.lora_A, layer.lora_B, layer.bias))
    if x.numel() == 0:  # which pooling refuses
        return x.new_zeros(*x.shape[:-1], layer.out_features)
    term = layer.scaling * pooled(x, layer.group_size) @ lora_A.T @ lora_B.T
    return x @ oracle.dequantize(layer.packed).T + term + bias


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    limit = TOLERANCE[actual.dtype] * expected.abs().max().item()
    assert (actual.double() - expected.double()).abs().max().item() <= limit


class TestForward:
    @pytest.mark.parametrize("group_size", GROUPS)
    @pytest.mark.parametrize("format", ["nf2", "int4"])
    def test_equation(self, format, group_size):
        layer = make_layer(format, group_size)
        assert layer.lora_A.shape == (layer.rank, GROUPS[group_size]) and layer.scaling == 5 / layer.rank
        for leading in ((), (0,), (5,), (2, 3)):
            x = gaussian(*leading, 130)
            torch.testing.assert_close(layer(x).double(), exact(layer, x), rtol=1e-4, atol=1e-5)

    def test_gradients(self):
        """Against autograd through the dense weight, in float64."""
        layer = make_layer("nf4").double()
        x = gaussian(5, 130, dtype=torch.float64).requires_grad_()
        expected = exact_gradients(layer, x)
        layer(x).square().sum().backward()
        for actual, reference in zip((x.grad, layer.lora_A.grad, layer.lora_B.grad), expected, strict=True):
            torch.testing.assert_close(actual, reference, rtol=1e-12, atol=1e-12)

    def test_disabled(self):
        layer, x = make_layer(), gaussian(5, 130)
        layer.disable_adapter()
        assert torch.equal(layer(x), lk.qlora_linear(x, layer.packed, bias=layer.bias))

    def test_compiles(self):
        layer, x = make_layer(), gaussian(5, 130)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x))


def exact_gradients(layer: lk.QuantLoRALinear, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x, lora_A, lora_B = (t.detach().clone().requires_grad_() for t in (x, layer.lora_A, layer.lora_B))
    term = layer.scaling * pooled(x, layer.group_size) @ lora_A.T @ lora_B.T
    y = x @ oracle.dequantize(layer.packed).T + term + layer.bias
    return torch.autograd.grad(y.square().sum(), (x, lora_A, lora_B))


class TestMerge:
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("group_size", GROUPS)
    @pytest.mark.parametrize("format", FORMATS)
    def test_same_outputs(self, format, group_size, dtype):
        layer, x = make_layer(format, group_size, dtype), gaussian(2, 7, 130, dtype=dtype)
        before, dense, codes = layer(x), layer.merged_linear()(x), layer.codes.clone()
        assert layer.merge_adapter() == 0
        for after in (layer(x), layer.merged_linear()(x)):
            assert after.dtype == dtype
            assert_close(after, before)
            assert_close(after, dense)
        assert_close(layer(x), oracle.qlora_linear(x, layer.packed, bias=layer.bias))
        assert torch.equal(layer.codes, codes) and layer.scale.dtype == layer.offset.dtype == dtype

    def test_no_adapter_left(self):
        layer = make_layer("nf4")
        layer.merge_adapter()
        assert layer.rank is layer.lora_A is layer.lora_B is None and not layer.has_adapter
        assert set(layer.state_dict()) == {"codes", "scale", "offset", "codebook", "bias"}
        assert "no adapter" in repr(layer)
        before = parameters_of(layer)
        assert layer.merge_adapter() == 0  # nothing to do
        assert_unchanged(layer, before)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_precision(self, dtype):
        """Offsets in float16 would round the adapter by 5e-4; in float32 the merged weight is the exact one."""
        layer, x = make_layer("nf4", dtype=dtype), gaussian(5, 130, dtype=dtype)
        expected = exact(layer, x)
        layer.merge_adapter()
        assert layer.offset.dtype == torch.float32
        torch.testing.assert_close(oracle.qlora_linear(x, layer.packed, bias=layer.bias), expected, rtol=0, atol=1e-5)
        assert (layer(x).double() - expected).abs().max() <= 16 * torch.finfo(dtype).eps * expected.abs().max()

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("format", FORMATS)
    def test_every_kernel_takes_an_offset(self, format, backend):
        """Forward of few and of many rows, the gradient in x, and dequantize, beside an ordinary adapter."""
        layer = make_layer(format, 64)
        layer.merge_adapter()
        lora_A, lora_B = adapter(33, 130, 4)
        dense = oracle.dequantize(layer.packed)
        assert_close(layer.packed.dequantize(backend=backend), dense)
        for rows in (1, 3, 40):
            x = gaussian(rows, 130).requires_grad_()
            y = lk.qlora_linear(x, layer.packed, lora_A, lora_B, scaling=0.5, backend=backend)
            assert_close(y, oracle.qlora_linear(x, layer.packed, lora_A, lora_B, 0.5))
            y.sum().backward()
            weight = dense + 0.5 * lora_B.double() @ lora_A.double()
            assert_close(x.grad, weight.sum(0).expand(rows, -1))

    def test_float64_offsets_under_other_inputs(self):
        """A float64 layer that was merged still serves float32, from offsets rounded to that."""
        layer, x = make_layer("nf2", dtype=torch.float64), gaussian(5, 130, dtype=torch.float64)
        expected = layer(x)
        layer.merge_adapter()
        layer.float()
        assert layer.offset.dtype == torch.float64  # stored dtypes never change
        y = layer(x.float().requires_grad_())
        assert_close(y, expected)
        y.sum().backward()
        assert layer.dequantize().dtype == torch.float32

    def test_gradient_after_merging(self):
        for dtype in TOLERANCE:
            layer = make_layer("nf4", dtype=dtype)
            layer.merge_adapter()
            x = gaussian(5, 130, dtype=dtype).requires_grad_()
            layer(x).sum().backward()
            assert_close(x.grad, oracle.dequantize(layer.packed).sum(0).expand(5, -1))

    def test_disabled_or_not_finite(self):
        layer = make_layer()
        before = parameters_of(layer)
        layer.disable_adapter()
        with pytest.raises(ValueError, match="disabled"):
            layer.merge_adapter()
        layer.enable_adapter()
        assert_unchanged(layer, before)
        layer.lora_B.data[3, 0] = float("nan")
        with pytest.raises(ValueError, match="not finite"):
            layer.merge_adapter()
        assert layer.lora_A is not None and torch.equal(layer.offset, before["offset"])


class TestOrdinaryAdapter:
    @pytest.mark.parametrize("format", ["nf2", "int4"])
    def test_requantized(self, format):
        layer = make_layer(format, 64, adapter="lora")
        with pytest.raises(ValueError, match="requantize=True"):
            layer.merge_adapter()
        dense = layer.merged_linear().weight.detach()
        error = layer.merge_adapter(requantize=True)
        assert same_packed(layer.packed, lk.quantize(dense, format))
        actual = (dense - layer.packed.dequantize()).norm() / dense.norm()
        assert error == pytest.approx(actual.item(), rel=1e-5) and 0.01 < error < 1
        assert layer.lora_A is None and (layer.offset is None) == (format == "nf2")

    def test_a_failure_changes_nothing(self):
        layer = make_layer("nf4", 64, adapter="lora")
        layer.lora_B.data[3, 0] = float("inf")
        before = parameters_of(layer)
        with pytest.raises(ValueError, match="merged weight"):
            layer.merge_adapter(requantize=True)
        assert layer.rank == 3
        assert_unchanged(layer, before)


class TestModel:
    def quantized(self, **options) -> nn.Module:
        model = tiny_model()
        cfg = lk.QuantConfig(**{"format": "nf4", "group_size": 32, "rank": 2, "adapter": "qalora", **options})
        lk.quantize_model(model, cfg, progress=False)
        for module in model.modules():
            if isinstance(module, lk.QuantLoRALinear):
                nn.init.normal_(module.lora_B, std=0.1)
        return model

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("merged", [False, True])
    def test_checkpoint(self, merged, dtype, tmp_path):
        model, x = self.quantized().to(dtype), gaussian(3, 64, dtype=dtype)
        if merged:
            errors = lk.merge_adapters(model)
            assert len(errors) == 5 and set(errors.values()) == {0.0}
        expected = model(x)
        lk.save_quantized(model, tmp_path)
        loaded = lk.load_quantized(tmp_path, tiny_model(seed=9).to(dtype))
        assert torch.equal(loaded(x), expected)
        assert isinstance(loaded.head, lk.QuantLoRALinear) and (loaded.head.lora_A is None) == merged
        assert loaded.head.adapter == ("lora" if merged else "qalora")

    def test_merge_names_the_layer_and_changes_nothing(self):
        model = self.quantized(overrides={"head": {"adapter": "lora"}})
        before = parameters_of(model)
        with pytest.raises(ValueError, match="layer 'head'.*requantize"):
            lk.merge_adapters(model)
        assert_unchanged(model, before)
        errors = lk.merge_adapters(model, requantize=True)
        assert {name for name, error in errors.items() if error > 0} == {"head"}

    @pytest.mark.parametrize("name", ["head", "first"])
    def test_all_layers_merge_or_none(self, name):
        """The fault is in the values of one adapter, which are looked at when it is merged."""
        model = self.quantized(overrides={"head": {"adapter": "lora"}})
        names = [n for n, module in model.named_modules() if isinstance(module, lk.QuantLoRALinear)]
        layer = model.get_submodule(names[0] if name == "first" else name)
        layer.lora_B.data[0, 0] = float("nan")
        before = parameters_of(model)
        with pytest.raises(ValueError, match="layer "):
            lk.merge_adapters(model, requantize=True)
        assert layer.rank == 2 and all(model.get_submodule(n).lora_A is not None for n in names)
        layer.lora_B.data[0, 0] = before[f"{names[0] if name == 'first' else name}.lora_B"][0, 0] = 0
        assert_unchanged(model, before)

    def test_scale_search(self):
        errors = []
        for search in (False, True):
            model = self.quantized(adapter="lora", format="int2", scale_search=search)
            layer = model.head
            weight = layer.weight.clone()
            errors.append(lk.merge_adapters(model, requantize=True, scale_search=search)["head"])
            expected = lk.quantize(weight, "int2", 32, scale_search=search)
            assert torch.equal(layer.codes, expected.codes) and torch.equal(layer.scale, expected.scale)
        assert errors[1] < errors[0]

    def test_rank_beyond_the_groups_is_limited(self):
        model = tiny_model()
        report = lk.quantize_model(model, lk.QuantConfig(rank=3, group_size=32, adapter="qalora"), progress=False)
        assert [layer.rank for layer in report.layers] == [2, 3, 2, 3, 2] and not report.skipped
        assert report.layers[-1].note == "rank 3 limited to 2, its groups" and model.head.lora_A.shape == (2, 2)

    def test_state_dict_of_a_merged_layer(self, tmp_path):
        layer = make_layer("nf4")
        layer.merge_adapter()
        blank = lk.QuantLoRALinear(
            130, 33, format="nf4", group_size=32, rank=None, scale_dtype=torch.float32, offset=True
        )
        blank.load_state_dict(layer.state_dict())
        assert torch.equal(blank(gaussian(5, 130)), layer(gaussian(5, 130)))
        packed = copy.deepcopy(layer.packed)
        packed.save(tmp_path / "w.safetensors")
        assert same_packed(lk.PackedTensor.load(tmp_path / "w.safetensors"), packed)


class TestStart:
    @pytest.mark.parametrize("group_size", GROUPS)
    @pytest.mark.parametrize("format", ["nf2", "int2", "int4_sym"])
    def test_error_is_what_the_layer_has(self, format, group_size):
        weight = gaussian(33, 130) + 0.5  # a mean that symmetric formats cannot hold
        rank = min(2, GROUPS[group_size])
        init = lk.qalora_init(weight, format, rank, group_size=group_size, scaling=0.5)
        layer = lk.QuantLoRALinear.from_init(init)
        error = (layer.weight.double() - weight.double()).norm() / weight.double().norm()
        assert init.error == pytest.approx(error.item(), rel=1e-5) == min(init.errors)
        zero = lk.qalora_init(weight, format, rank, init="qlora", group_size=group_size)
        assert not zero.lora_B.any() and zero.lora_A.any()
        assert init.error <= zero.error * (1 + 1e-6)

    def test_truncation_is_the_best(self):
        """At full rank the first iterate leaves the residual less its group means; below, the SVD's tail as well."""
        weight, width = gaussian(20, 128), 32
        residual = (weight - lk.quantize(weight, "nf2", width).dequantize()).double()
        means = residual.unflatten(1, (4, width)).mean(2)
        within = (residual - means.repeat_interleave(width, 1)).square().sum()
        tail = torch.linalg.svdvals(means).square() * width
        for rank in (1, 2, 4):
            init = lk.qalora_init(weight, "nf2", rank, 1, group_size=width, scaling=3.0)
            expected = (within + tail[rank:].sum()).sqrt() / weight.double().norm()
            assert init.error == pytest.approx(expected.item(), rel=1e-6)

    def test_expand(self):
        lora_A = gaussian(2, 5)
        x = gaussian(7, 130)
        torch.testing.assert_close(x @ expand_groups(lora_A, 130, 32).T, pooled(x, 32) @ lora_A.T)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rank": 6}, r"rank=6 is outside 1..5 = min\(out_features=33, groups=5\)"),
            ({"rank": 0}, "rank=0"),
            ({"init": "eora"}, "init='eora'"),
            ({"num_iter": 0}, "num_iter=0"),
            ({"scaling": 0.0}, "scaling=0"),
            ({"group_size": 48}, "group_size=48"),
        ],
        ids=str,
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            lk.qalora_init(gaussian(33, 130), **{"rank": 2, "group_size": 32, **options})

    @pytest.mark.parametrize("start", ["loftq", "qlora"])
    def test_bad_weights(self, start):
        weight = gaussian(33, 130)
        weight[3, 7] = float("nan")
        with pytest.raises(ValueError, match="nan in row 3, column 7"):
            lk.qalora_init(weight, "int4", 2, init=start)

    def test_bad_config(self):
        with pytest.raises(ValueError, match="adapter='ia3'"):
            lk.QuantConfig(adapter="ia3")
        with pytest.raises(ValueError, match="adapter='ia3'"):
            lk.QuantLoRALinear(64, 64, adapter="ia3")
        with pytest.raises(ValueError, match=r"rank=4 is outside 1\.\.2"):
            lk.QuantLoRALinear(128, 64, rank=4, adapter="qalora")
        for init in ("eora", "aser"):
            with pytest.raises(ValueError, match=f"adapter='qalora' takes init.*{init}"):
                lk.QuantConfig(adapter="qalora", init=init)


class Mixed(nn.Module):
    """A layer of every kind."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 64, padding_idx=3)
        self.conv1 = nn.Conv1d(64, 64, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 64, 8, stride=8)
        self.out = nn.Linear(64, 20)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.conv1(self.table(tokens).transpose(1, 2))  # [B, 64, T]
        return self.out(self.conv2(x.unsqueeze(1)).flatten(2).mean(2))


def mixed_model(**options) -> tuple[Mixed, lk.QuantizationReport]:
    torch.manual_seed(0)
    model = Mixed().eval()
    cfg = lk.QuantConfig(
        "nf4", 32, **{"rank": 2, "adapter": "qalora", "layer_types": ("linear", "conv", "embedding"), **options}
    )
    report = lk.quantize_model(model, cfg, progress=False)
    for name, parameter in adapter_parameters(model).items():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model, report


class TestOtherKinds:
    """Group means belong to linear layers; ordinary adapters of every kind merge by rounding again."""

    def test_skipped_with_the_reason(self):
        model, report = mixed_model()
        assert [layer.name for layer in report.layers] == ["out"] and model.out.adapter == "qalora"
        for name, kind in (("table", "Embedding"), ("conv1", "Conv1d"), ("conv2", "Conv2d")):
            assert report.skipped[name] == f"is an nn.{kind}: adapter='qalora' is for linear layers alone"

    def test_ordinary_ones_by_an_override_or_none(self):
        model, report = mixed_model(overrides={"conv*": {"adapter": "lora"}, "table": {"rank": None}})
        assert not report.skipped and len(report.layers) == 4
        assert model.table.lora_A is None and model.conv1.adapter == "lora" and model.conv2.rank == 2

    def mixed(self) -> Mixed:
        return mixed_model(overrides={"*c*": {"adapter": "lora"}, "table": {"adapter": "lora"}})[0]

    def test_all_kinds_merge(self, tmp_path):
        model, tokens = self.mixed(), torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
        model.table.lora_B.data[3] = 0
        with pytest.raises(ValueError, match="layer 'table'.*requantize=True"):
            lk.merge_adapters(model)
        assert model.out.lora_A is not None
        dense = {name: model.get_submodule(name).weight.clone() for name in ("table", "conv1", "conv2", "out")}
        errors = lk.merge_adapters(model, requantize=True)
        assert set(errors) == set(dense) and errors.pop("out") == 0
        for name, error in errors.items():
            layer = model.get_submodule(name)
            actual = (dense[name] - layer.weight).norm() / dense[name].norm()
            assert error == pytest.approx(actual.item(), rel=1e-4) and 0.01 < error < 0.3
            assert layer.lora_A is layer.rank is None and "no adapter" in repr(layer)
        expected = model(tokens)
        lk.save_quantized(model, tmp_path)
        assert torch.equal(lk.load_quantized(tmp_path, Mixed().eval())(tokens), expected)

    def test_description_leaves_out_defaults(self, tmp_path):
        model = self.mixed()
        lk.save_quantized(model, tmp_path)
        layers = json.loads((tmp_path / CONFIG_NAME).read_text())["layers"]
        assert layers["out"]["adapter"] == "qalora" and layers["conv2"]["kind"] == "conv2d"
        assert all("offset" not in layer for layer in layers.values())
        assert not {"kind", "geometry"} & layers["out"].keys() and "adapter" not in layers["table"]
        lk.merge_adapters(model, requantize=True)
        lk.save_quantized(model, tmp_path)
        layers = json.loads((tmp_path / CONFIG_NAME).read_text())["layers"]
        assert [name for name, layer in layers.items() if layer.get("offset")] == ["out"]
        assert all("adapter" not in layer for layer in layers.values())

    def test_a_linear_layer_s_description_is_as_it_was(self, tmp_path):
        """Affine formats have offsets in any case."""
        model = tiny_model()
        lk.quantize_model(model, lk.QuantConfig("int4", rank=2), progress=False)
        lk.save_quantized(model, tmp_path)
        layer = json.loads((tmp_path / CONFIG_NAME).read_text())["layers"]["head"]
        names = ["bias", "format", "group_size", "in_features", "out_features", "rank", "scale_dtype", "scaling"]
        assert sorted(layer) == names

    @pytest.mark.parametrize(
        "changes", [{"adapter": "qalora"}, {"offset": True}, {"scale_dtype": "float64"}, {"adapter": "ia3"}], ids=str
    )
    def test_edited_descriptions(self, changes, tmp_path):
        lk.save_quantized(self.mixed(), tmp_path)
        file = tmp_path / CONFIG_NAME
        values = json.loads(file.read_text())
        values["layers"]["conv2"] |= changes
        file.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=f"layer 'conv2'.*{next(iter(changes))}"):
            lk.load_quantized(tmp_path, Mixed())

    def test_refused_one_by_one(self):
        cfg = lk.QuantConfig(rank=1, adapter="qalora")
        with pytest.raises(ValueError, match="adapter='qalora'.*QuantLoRAConv2d"):
            lk.QuantLoRAConv2d.from_conv(nn.Conv2d(8, 8, 3), cfg)
        with pytest.raises(ValueError, match="adapter='qalora'.*QuantLoRAEmbedding"):
            lk.QuantLoRAEmbedding.from_embedding(nn.Embedding(50, 64), cfg)
        with pytest.raises(ValueError, match="adapter='qalora'.*QuantLoRAEmbedding"):
            lk.QuantLoRAEmbedding.from_init(lk.qalora_init(gaussian(50, 64), "nf4", 1))
        layer = make_layer("nf4")
        layer.merge_adapter()
        with pytest.raises(ValueError, match="no nf4 weight with offsets"):
            lk.QuantLoRAEmbedding.from_init(lk.AdapterInit(layer.packed, None, None, 1.0, 0.0))
        kept = lk.QuantLoRALinear.from_init(lk.AdapterInit(layer.packed, None, None, 1.0, 0.0), layer.bias)
        assert torch.equal(kept(gaussian(5, 130)), layer(gaussian(5, 130)))


def identity_statistics(width: int) -> lk.InputStatistics:
    """Of an input whose features are uncorrelated and alike: they weigh nothing."""
    return lk.InputStatistics(torch.eye(width), torch.zeros(width), torch.ones(width), torch.ones(width), 4)


class TestStatistics:
    def test_not_looked_at(self):
        cfg = lk.QuantConfig("nf4", 32, rank=2, adapter="qalora")
        assert not cfg.takes_statistics and not cfg.needs_statistics and lk.QuantConfig().takes_statistics
        statistics = identity_statistics(130)
        weight = gaussian(33, 130)
        plain = initialize([weight], cfg)[0]
        given = initialize([weight], cfg, statistics=[statistics])[0]
        assert same_packed(plain.packed, given.packed) and torch.equal(plain.lora_A, given.lora_A)
        assert given.weighted_error is None
        model = tiny_model()
        lk.quantize_model(model, cfg, statistics={}, progress=False)  # no layer asks for its own
        assert model.layers[0]["up"].adapter == "qalora"

    def test_plans(self):
        pytest.importorskip("scipy")
        cfg = lk.QuantConfig("nf4", 32, rank=2, adapter="qalora")
        statistics = {
            name: identity_statistics(module.in_features)
            for name, module in tiny_model().named_modules()
            if isinstance(module, nn.Linear)
        }
        errors = [
            {name: layer.errors for name, layer in plan.layers.items()}
            for plan in (
                lk.plan_bits(tiny_model(), 4.5, ("nf2", "nf4"), cfg, statistics=given, progress=False)
                for given in (None, statistics)
            )
        ]
        for name, by_candidate in errors[0].items():  # a Gram matrix of 1 weighs nothing
            assert errors[1][name] == pytest.approx(by_candidate, rel=1e-4)
        with pytest.raises(ValueError, match="count='total'.*qalora"):
            lk.plan_bits(tiny_model(), 9, ("nf4",), cfg, count="total", progress=False)


class TestGroup:
    def layers(self) -> list[lk.QuantLoRALinear]:
        own = [make_layer("nf4"), make_layer("nf4", adapter="lora"), make_layer("nf4", lora_alpha=2)]
        for i, layer in enumerate(own):
            nn.init.normal_(layer.lora_B, std=i + 1.0)
        return own

    def test_values_and_gradients(self):
        layers, x = self.layers(), gaussian(4, 130).requires_grad_()
        group = lk.QuantLoRALinearGroup(layers)
        leaves = [x, *(p for layer in layers for p in (layer.lora_A, layer.lora_B))]
        apart, together = [layer(x) for layer in layers], group(x)
        for mine, other in zip(together, apart, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
        grads = [torch.autograd.grad(sum(y.square().sum() for y in ys), leaves) for ys in (together, apart)]
        for mine, other in zip(*grads, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-2)

    @torch.no_grad()
    def test_merged(self):
        layers, x = [make_layer("nf4"), make_layer("nf4", lora_alpha=2)], gaussian(4, 130)
        group = lk.QuantLoRALinearGroup(layers)
        expected = group(x)
        layers[1].merge_adapter()
        with pytest.raises(ValueError, match=r"layers\[1\] has scales in torch.float32, layers\[0\] in torch.float16"):
            group(x)
        layers[0].merge_adapter()
        for mine, other in zip(group(x), expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)

    def test_with_and_without_offsets(self):
        layers = [make_layer("nf4", scale_dtype=torch.float32) for _ in range(2)]
        layers[1].merge_adapter()
        with pytest.raises(ValueError, match=r"layers\[1\] has offsets, layers\[0\] no offsets"):
            lk.QuantLoRALinearGroup(layers)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_adapters_by_row_over_merged_float64_offsets(dtype):
    layer = make_layer("nf2", dtype=torch.float64)
    layer.merge_adapter()
    x, ids = gaussian(3, 130, dtype=dtype), torch.tensor([1, -1, 0])
    lora_A, lora_B = (torch.stack(pair) for pair in zip(adapter(33, 130, 2), adapter(33, 130, 2, seed=5), strict=True))
    y = lk.qlora_linear(x, layer.packed, lora_A, lora_B, adapter_ids=ids)
    for row, i in enumerate(ids.tolist()):
        own = (None, None) if i < 0 else (lora_A[i], lora_B[i])
        assert_close(y[row], oracle.qlora_linear(x[row : row + 1], layer.packed, *own)[0])


class TestExpansion:
    """Without gradients lora_A is expanded once, and again after any change, however it is made."""

    def test_made_once(self, monkeypatch):
        layer, x, calls = make_layer(), gaussian(3, 130), []
        over_columns = type(layer).over_columns
        monkeypatch.setattr(type(layer), "over_columns", lambda own, a: calls.append(1) or over_columns(own, a))
        with torch.no_grad():
            first = layer(x)
            assert torch.equal(layer(x), first) and len(calls) == 1
        layer(x).sum().backward()  # differentiates through an expansion of its own
        assert len(calls) == 2 and layer.lora_A.grad is not None

    @pytest.mark.parametrize("how", ["in place", "data", "set data", "assigned", "loaded", "optimizer", "inference"])
    def test_forgotten_when_it_changes(self, how):
        layer, other, x = make_layer(), make_layer(seed=3), gaussian(3, 130)
        with torch.no_grad():
            layer(x)
            if how == "in place":
                layer.lora_A.mul_(2)
            elif how == "data":
                layer.lora_A.data.mul_(2)
            elif how == "set data":
                layer.lora_A.data = other.lora_A.data.clone()
            elif how == "assigned":
                layer.lora_A = torch.nn.Parameter(other.lora_A.clone())
            elif how == "loaded":
                layer.load_state_dict({**layer.state_dict(), "lora_A": other.lora_A.detach()})
            elif how == "optimizer":
                layer.lora_A.grad = torch.ones_like(layer.lora_A)
                torch.optim.SGD([layer.lora_A], 0.1).step()
        if how == "inference":
            with torch.inference_mode():
                layer.lora_A.add_(1)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), layer.merged_linear()(x), rtol=1e-4, atol=1e-4)
