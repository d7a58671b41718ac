"""`QuantLoRALinear`: a drop-in for nn.Linear."""

from __future__ import annotations

import copy
import pickle

import oracle
import pytest
import torch
from helpers import DEVICES, DTYPES, FORMATS, assert_unchanged, gaussian, parameters_of, same_packed
from torch import nn

import loftq_kernels as lk

SMALL = {"rank": 4, "num_iter": 2}


def make_linear(in_features=130, out_features=33, bias=True, dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias, dtype=dtype)


def make_layer(format="nf4", **options) -> lk.QuantLoRALinear:
    return lk.QuantLoRALinear.from_linear(make_linear(), lk.QuantConfig(format, **{**SMALL, **options}))


def exact(layer: lk.QuantLoRALinear, x: torch.Tensor) -> torch.Tensor:
    return oracle.qlora_linear(x, layer.packed, layer.lora_A, layer.lora_B, layer.scaling, layer.bias)


class TestForward:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("format", FORMATS)
    def test_equation(self, format, device):
        layer = make_layer(format, lora_alpha=8).to(device)
        assert layer.scaling == 2
        for leading in ((), (0,), (5,), (2, 3), (123,)):
            x = gaussian(*leading, 130, device=device)
            torch.testing.assert_close(layer(x).double().cpu(), exact(layer, x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("rank", [None, 1, 33])
    def test_bias_and_rank(self, bias, rank):
        linear = make_linear(bias=bias)
        layer = lk.QuantLoRALinear.from_linear(linear, lk.QuantConfig(rank=rank, num_iter=1))
        x = gaussian(5, 130)
        torch.testing.assert_close(layer(x).double(), exact(layer, x), rtol=1e-4, atol=1e-5)
        assert (layer.bias is not None) == bias and layer.rank == rank and (layer.lora_A is None) == (rank is None)
        if bias:
            assert torch.equal(layer.bias, linear.bias) and layer.bias is not linear.bias
        if rank == 33:  # the whole of W: nothing is lost
            torch.testing.assert_close(layer(x), linear(x), rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes(self, dtype):
        linear = make_linear(dtype=dtype)
        layer = lk.QuantLoRALinear.from_linear(linear, lk.QuantConfig(**SMALL))
        assert layer.bias.dtype == layer.weight.dtype == layer.dtype == dtype
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.promote_types(dtype, torch.float32)
        x = gaussian(5, 130, dtype=dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert (y.double() - exact(layer, x)).abs().max() <= 8 * torch.finfo(dtype).eps

    def test_matches_the_dense_layer_closely(self):
        linear, x = make_linear(), gaussian(50, 130)
        layer = lk.QuantLoRALinear.from_linear(linear, lk.QuantConfig("int8", **SMALL))
        assert torch.nn.functional.cosine_similarity(layer(x).flatten(), linear(x).flatten(), 0) > 0.9999

    def test_changes_nothing(self):
        layer = make_layer()
        before = parameters_of(layer)
        with torch.no_grad():
            layer.eval()(gaussian(5, 130))
        layer.train()(gaussian(5, 130)).sum().backward()
        assert_unchanged(layer, before)
        state = {k: v.dtype for k, v in layer.state_dict().items() if k != "_extra_state"}
        assert state == {k: v.dtype for k, v in before.items()}

    @pytest.mark.parametrize("x", [torch.zeros(5, 129), torch.zeros(130, 5)], ids=lambda x: str(tuple(x.shape)))
    def test_wrong_width(self, x):
        with pytest.raises(ValueError, match="in_features=130"):
            make_layer()(x)

    def test_integers(self):
        with pytest.raises(TypeError, match="torch.int64"):
            make_layer()(torch.ones(5, 130, dtype=torch.int64))


class TestConstruction:
    @pytest.mark.parametrize("format", FORMATS)
    def test_new_layer(self, format):
        """Zero weight, zero lora_B: like a PEFT adapter it starts by adding nothing."""
        layer = lk.QuantLoRALinear(130, 33, format=format, group_size=32, rank=4, lora_alpha=8, use_rslora=True)
        assert layer.scaling == 4 and layer.lora_A.shape == (4, 130) and layer.lora_B.shape == (33, 4)
        assert layer.lora_A.any() and not layer.lora_B.any()
        assert not layer.dequantize().any() and not layer(gaussian(2, 130)).any()
        layer.packed.validate()

    def test_from_linear_does_not_change_its_argument(self):
        linear = make_linear()
        before = parameters_of(linear)
        layer = lk.QuantLoRALinear.from_linear(linear)
        assert_unchanged(linear, before)
        assert layer.format.name == "nf4" and layer.rank == 16 and linear.weight.requires_grad
        assert layer.training and not lk.QuantLoRALinear.from_linear(linear.eval()).training

    def test_from_linear_takes_linear_layers_only(self):
        class Sub(nn.Linear):
            pass

        for module in (nn.Conv1d(3, 3, 1), Sub(64, 64), torch.zeros(3, 3)):
            with pytest.raises(TypeError, match=type(module).__name__):
                lk.QuantLoRALinear.from_linear(module)

    def test_from_init(self):
        weight = gaussian(33, 130)
        init = lk.loftq_init(weight, "nf2", 4, 2, scaling=0.5)
        layer = lk.QuantLoRALinear.from_init(init, torch.ones(33), dtype=torch.bfloat16)
        assert same_packed(layer.packed, init.packed) and layer.scaling == 0.5
        assert torch.equal(layer.lora_A, init.lora_A) and layer.bias.dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"format": "nf9"}, "unknown format 'nf9'"),
            ({"group_size": 48}, "group_size=48"),
            ({"rank": 0}, "rank=0"),
            ({"rank": -1}, "rank=-1"),
            ({"rank": 34}, "rank=34"),
            ({"scale_dtype": torch.float64}, "scale_dtype=torch.float64"),
        ],
        ids=str,
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            lk.QuantLoRALinear(130, 33, **options)

    @pytest.mark.parametrize("sizes", [(0, 33), (130, 0), (-1, 33), (1.5, 33)], ids=str)
    def test_bad_sizes(self, sizes):
        with pytest.raises(ValueError, match=f"features={min(sizes)} must be an integer >= 1"):
            lk.QuantLoRALinear(*sizes, rank=None)

    def test_bad_weights(self):
        linear = make_linear()
        linear.weight.data[3, 7] = float("nan")
        with pytest.raises(ValueError, match="nan in row 3, column 7"):
            lk.QuantLoRALinear.from_linear(linear)
        with pytest.raises(ValueError, match="meta device"):
            lk.QuantLoRALinear.from_linear(nn.Linear(130, 33, device="meta"))


class TestAdapter:
    def test_switch(self):
        layer, x = make_layer(), gaussian(5, 130)
        with_adapter, weight = layer(x), layer.weight
        layer.disable_adapter()
        torch.testing.assert_close(layer(x), x @ layer.dequantize().T + layer.bias, rtol=1e-4, atol=1e-5)
        assert torch.equal(layer.weight, layer.dequantize()) and not layer.has_adapter
        assert torch.equal(layer.merged_linear().weight, layer.dequantize())
        layer.enable_adapter()
        assert torch.equal(layer(x), with_adapter) and torch.equal(layer.weight, weight)

    def test_without_adapter(self):
        layer = make_layer(rank=None)
        layer.enable_adapter()
        assert not layer.has_adapter and layer(gaussian(5, 130)).shape == (5, 33)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("alpha", [None, 1, 16])
    def test_merged_linear(self, alpha, dtype):
        layer = make_layer(lora_alpha=alpha).to(dtype).eval()
        merged = layer.merged_linear()
        assert type(merged) is nn.Linear and not merged.training and merged.weight.dtype == dtype
        expected = oracle.dequantize(layer.packed) + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        assert (merged.weight.double() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()
        assert torch.equal(merged.bias, layer.bias) and merged.bias is not layer.bias
        x = gaussian(5, 130, dtype=dtype)
        torch.testing.assert_close(merged(x), layer(x), rtol=0, atol=16 * torch.finfo(dtype).eps)

    def test_merged_without_bias(self):
        layer = lk.QuantLoRALinear.from_linear(make_linear(bias=False), lk.QuantConfig(**SMALL))
        assert layer.merged_linear().bias is None

    def test_dequantize(self):
        layer = make_layer()
        assert torch.equal(layer.dequantize(), layer.packed.dequantize())
        assert layer.dequantize(torch.float16).dtype == torch.float16
        assert layer.bfloat16().dequantize().dtype == torch.bfloat16


class TestTraining:
    def test_only_the_adapter_learns(self):
        layer, x, target = make_layer(), gaussian(20, 130), gaussian(20, 33, seed=1)
        before = parameters_of(layer)
        trained = {name for name, p in layer.named_parameters() if p.requires_grad}
        assert trained == {"lora_A", "lora_B"}
        optimizer, losses = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-2), []
        for _ in range(20):
            optimizer.zero_grad()
            loss = (layer(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]
        for name, tensor in parameters_of(layer).items():
            assert torch.equal(tensor, before[name]) == (name not in trained), name

    def test_gradient_of_x(self):
        layer, x = make_layer(), gaussian(5, 130).requires_grad_()
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(5, -1), rtol=1e-3, atol=1e-4)

    def test_autocast(self):
        layer = make_layer()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(gaussian(5, 130))
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert layer.lora_A.grad.dtype == torch.float32


class TestMoves:
    @pytest.mark.parametrize("convert", ["half", "bfloat16", "double", "float"])
    def test_dtype_moves_keep_the_packed_weight(self, convert):
        layer = make_layer("int4", scale_dtype=torch.bfloat16)
        packed = layer.packed.clone()
        getattr(layer, convert)()
        assert same_packed(layer.packed, packed)
        assert layer.codebook.dtype == torch.float32 and layer.scale.dtype == layer.offset.dtype == torch.bfloat16
        dtype = layer.lora_A.dtype
        assert dtype == layer.bias.dtype == layer(gaussian(2, 130, dtype=dtype)).dtype
        assert {"half": torch.float16, "float": torch.float32}.get(convert, dtype) == dtype

    @pytest.mark.parametrize("device", DEVICES)
    def test_device_and_dtype_at_once(self, device):
        layer = make_layer().to(device, torch.bfloat16)
        assert {t.device.type for t in layer.parameters()} == {device}
        assert layer.codebook.dtype == torch.float32 and layer.scale.dtype == torch.float16

    def test_to_empty_and_meta(self):
        layer = make_layer().half().to("meta")
        assert {t.device.type for t in layer.parameters()} == {"meta"}
        assert layer.scale.dtype == torch.float16 and layer.codebook.dtype == torch.float32
        assert layer(torch.zeros(2, 130, device="meta", dtype=torch.float16)).shape == (2, 33)

    def test_share_memory_and_requires_grad(self):
        layer = make_layer()
        layer.share_memory()
        assert layer.codes.is_shared()
        layer.requires_grad_(False)
        assert not layer(gaussian(2, 130)).requires_grad


class TestStateDict:
    @pytest.mark.parametrize("format", FORMATS)
    def test_round_trip(self, format, tmp_path):
        layer, x = make_layer(format), gaussian(5, 130)
        blank = lk.QuantLoRALinear(130, 33, format=format, rank=4)
        torch.save(layer.state_dict(), tmp_path / "layer.pt")
        for state in (layer.state_dict(), torch.load(tmp_path / "layer.pt", weights_only=True)):
            result = copy.deepcopy(blank)
            result.load_state_dict(state, strict=True)
            assert torch.equal(result(x), layer(x)) and same_packed(result.packed, layer.packed)

    def test_safetensors(self, tmp_path):
        layer = make_layer("int4")
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_model(layer, tmp_path / "layer.safetensors")
        result = lk.QuantLoRALinear(130, 33, format="int4", rank=4)
        safetensors.load_model(result, tmp_path / "layer.safetensors")
        assert torch.equal(result(gaussian(5, 130)), layer(gaussian(5, 130)))

    def test_meta_and_assign(self):
        layer = make_layer("int4")
        result = lk.QuantLoRALinear(130, 33, format="int4", rank=4, device="meta")
        assert {t.device.type for t in result.parameters()} == {"meta"}
        result.load_state_dict(layer.state_dict(), assign=True)
        assert torch.equal(result(gaussian(5, 130)), layer(gaussian(5, 130)))
        assert result.lora_A.requires_grad and not result.bias.requires_grad

    def test_keys(self):
        keys = set(make_layer("int4").state_dict())
        assert keys == {"codes", "scale", "offset", "codebook", "lora_A", "lora_B", "bias", "_extra_state"}
        assert set(make_layer("nf4", rank=None).state_dict()) == {"codes", "scale", "codebook", "bias"}

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize(("stored", "expected"), [("nf2", "uniform2"), ("uniform4", "nf4"), ("int4_sym", "nf4")])
    def test_another_format_of_the_same_shapes(self, stored, expected, nested, assign):
        source, layer = make_layer(stored), lk.QuantLoRALinear(130, 33, format=expected, rank=4)
        if nested:
            source, layer = nn.Sequential(source), nn.Sequential(layer)
        with pytest.raises(RuntimeError, match=f"codebook is not that of format {expected}"):
            layer.load_state_dict(source.state_dict(), assign=assign)

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize(
        "options",
        [{"format": "nf2"}, {"format": "int4"}, {"group_size": 32}, {"rank": 5}, {"scale_dtype": torch.float32}],
        ids=str,
    )
    def test_other_options(self, options, assign):
        layer = lk.QuantLoRALinear(130, 33, **{"rank": 4, **options})
        with pytest.raises(RuntimeError):
            layer.load_state_dict(make_layer().state_dict(), assign=assign)

    @pytest.mark.parametrize("assign", [False, True])
    def test_codes_of_another_type(self, assign):
        state = make_layer().state_dict()
        state["codes"] = state["codes"].float() + 0.5
        with pytest.raises(RuntimeError, match="codes"):
            lk.QuantLoRALinear(130, 33, rank=4).load_state_dict(state, assign=assign)

    def test_missing_and_unexpected(self):
        state = make_layer().state_dict()
        del state["scale"]
        with pytest.raises(RuntimeError, match="scale"):
            lk.QuantLoRALinear(130, 33, rank=4).load_state_dict(state)
        with pytest.raises(RuntimeError, match="weight"):
            lk.QuantLoRALinear(130, 33, rank=4).load_state_dict({**make_layer().state_dict(), "weight": torch.zeros(1)})


def test_copies():
    layer, x = make_layer(), gaussian(5, 130)
    layer.disable_adapter()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x)) and not other.adapter_enabled
        assert {n: p.requires_grad for n, p in other.named_parameters()} == {
            n: p.requires_grad for n, p in layer.named_parameters()
        }
        other.codes.copy_(torch.zeros_like(other.codes))
        other.lora_A.data.zero_()
    assert layer.codes.any() and layer.lora_A.any()


def test_repr():
    text = repr(make_layer(lora_alpha=8))
    for part in ("in_features=130", "out_features=33", "bias=True", "nf4", "group_size=64", "rank=4", "scaling=2"):
        assert part in text
    assert "no adapter" in repr(make_layer(rank=None))
    layer = make_layer()
    layer.disable_adapter()
    assert "disabled" in repr(layer)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_inside_a_transformer_layer(activation, norm_first, training):
    """nn.TransformerEncoderLayer's fast path for inference reads linear1.weight rather than calling the module."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(
        64, 2, 96, dropout=0.0, activation=activation, norm_first=norm_first, batch_first=True
    ).train(training)
    for name in ("linear1", "linear2"):
        setattr(block, name, lk.QuantLoRALinear.from_linear(getattr(block, name), lk.QuantConfig(**SMALL)))
    dense = copy.deepcopy(block)
    for name in ("linear1", "linear2"):
        setattr(dense, name, getattr(block, name).merged_linear())
    x = gaussian(3, 7, 64)
    with torch.inference_mode():
        torch.testing.assert_close(block(x), dense(x), rtol=1e-4, atol=1e-5)
