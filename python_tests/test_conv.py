"""`QuantLoRAConv1d` and `QuantLoRAConv2d`: drop-ins for nn.Conv1d and nn.Conv2d."""

from __future__ import annotations

import copy
import json

import oracle
import pytest
import torch
from helpers import DEVICES, DTYPES, FORMATS, assert_unchanged, gaussian, parameters_of, same_packed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import loftq_kernels as lk
from loftq_kernels.checkpoints.manifest import CONFIG_NAME

SMALL = {"rank": 4, "num_iter": 2}
# Each option alone, then together; an even kernel with "same" pads one more on one side; depthwise: one row per group.
GEOMETRIES_2D = [
    {"kernel_size": 3},
    {"kernel_size": 1},
    {"kernel_size": (3, 2), "stride": (2, 1)},
    {"kernel_size": 3, "groups": 4},
    {"kernel_size": 3, "groups": 8, "padding": 1},
    {"kernel_size": 3, "dilation": (2, 3)},
    {"kernel_size": 3, "padding": (2, 1)},
    {"kernel_size": (3, 4), "padding": "same", "dilation": (1, 2)},
    {"kernel_size": (2, 3), "padding": "valid"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": (4, 3), "padding": "same", "padding_mode": "replicate"},
    {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular", "stride": 2},
    {"kernel_size": (3, 5), "stride": (2, 3), "padding": (2, 4), "dilation": (2, 2), "groups": 2, "bias": False},
]
GEOMETRIES_1D = [
    {"kernel_size": 5},
    {"kernel_size": 4, "padding": "same", "groups": 2},
    {"kernel_size": 3, "stride": 2, "padding": 3, "dilation": 2, "padding_mode": "circular"},
]
SIZES = {2: (11, 13), 1: (17,)}
GEOMETRIES = [(2, g) for g in GEOMETRIES_2D] + [(1, g) for g in GEOMETRIES_1D]


def make_conv(dimensions: int = 2, dtype=torch.float32, **geometry) -> nn.Conv1d | nn.Conv2d:
    torch.manual_seed(0)
    geometry = {"kernel_size": 3, **geometry}
    return (nn.Conv2d if dimensions == 2 else nn.Conv1d)(8, 16, **geometry, dtype=dtype)


def layer_of(conv: nn.Module, format: str = "nf4", **options):
    cls = lk.QuantLoRAConv2d if isinstance(conv, nn.Conv2d) else lk.QuantLoRAConv1d
    return cls.from_conv(conv, lk.QuantConfig(format, **{**SMALL, **options}))


def exact_conv(layer, conv: nn.Module) -> nn.Module:
    """conv in float64 with the kernel Q + s B A and the layer's bias."""
    dense = copy.deepcopy(conv).double()
    kernel = oracle.dequantize(layer.packed)
    if layer.has_adapter:
        kernel = kernel + layer.scaling * layer.lora_B.detach().double().cpu() @ layer.lora_A.detach().double().cpu()
    dense.weight.data = kernel.view_as(dense.weight)
    return dense


class TestForward:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize(("dimensions", "geometry"), GEOMETRIES, ids=str)
    def test_is_the_dense_convolution(self, dimensions, geometry, device):
        """Of Q + s B A, to 1e-5."""
        conv = make_conv(dimensions, **geometry)
        layer = layer_of(conv, lora_alpha=8, rank=3).to(device)
        assert layer.scaling == pytest.approx(8 / 3) and layer.lora_B.any()
        x = gaussian(2, 8, *SIZES[dimensions])
        expected = exact_conv(layer, conv)(x.double())
        actual = layer(x.to(device))
        assert actual.shape == expected.shape
        assert (actual.double().cpu() - expected).abs().max() <= 1e-5 * expected.abs().max()
        torch.testing.assert_close(layer(x[0].to(device)).cpu(), actual[0].cpu(), rtol=1e-4, atol=1e-5)  # unbatched

    @pytest.mark.parametrize("format", FORMATS)
    def test_formats(self, format):
        conv = make_conv()
        layer, x = layer_of(conv, format, group_size=32), gaussian(2, 8, 9, 9)
        torch.testing.assert_close(layer(x).double(), exact_conv(layer, conv)(x.double()), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes(self, dtype):
        conv = make_conv(dtype=dtype, padding=1)
        layer, x = layer_of(conv), gaussian(2, 8, 9, 9, dtype=dtype)
        assert layer.bias.dtype == layer.weight.dtype == layer(x).dtype == dtype
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32  # which does not lose small steps
        error = (layer(x).double() - exact_conv(layer, conv)(x.double())).abs().max()
        assert error <= 16 * torch.finfo(dtype).eps

    def test_double(self):
        layer, x = layer_of(make_conv()).double(), gaussian(2, 8, 9, 9, dtype=torch.float64)
        torch.testing.assert_close(layer(x), layer.merged_conv()(x), rtol=1e-12, atol=1e-12)

    def test_empty_batch_and_channels_last(self):
        layer = layer_of(make_conv())
        assert layer(torch.zeros(0, 8, 9, 9)).shape == (0, 16, 7, 7)
        x = gaussian(2, 8, 9, 9)
        torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), layer(x), rtol=1e-4, atol=1e-5)

    def test_autocast(self):
        layer = layer_of(make_conv())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(gaussian(2, 8, 9, 9))
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16 and layer.lora_A.grad.dtype == torch.float32

    def test_compile(self):
        layer, x = layer_of(make_conv(padding=1)), gaussian(2, 8, 9, 9)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))

    @pytest.mark.parametrize("shape", [(2, 7, 9, 9), (8, 9), (8,), (1, 2, 8, 9, 9)], ids=str)
    def test_wrong_shapes(self, shape):
        with pytest.raises(ValueError, match=r"in_channels=8, height, width\]"):
            layer_of(make_conv())(torch.zeros(shape))

    def test_integers(self):
        with pytest.raises(TypeError, match=r"torch\.int64"):
            layer_of(make_conv())(torch.ones(2, 8, 9, 9, dtype=torch.int64))


class TestTraining:
    @pytest.mark.parametrize(("dimensions", "geometry"), [GEOMETRIES[i] for i in (7, 11, 12, 14)], ids=str)
    def test_gradients(self, dimensions, geometry):
        """Of x and the adapter, and the second derivatives of x, in float64."""
        layer = layer_of(make_conv(dimensions, **geometry), rank=2).double()
        x = gaussian(1, 8, *(n - 4 for n in SIZES[dimensions]), dtype=torch.float64).requires_grad_()
        dense = layer.merged_conv()
        probe = gaussian(*dense(x).shape, seed=1, dtype=torch.float64)
        (expected,) = torch.autograd.grad((dense(x) * probe).sum(), x)
        (actual,) = torch.autograd.grad((layer(x) * probe).sum(), x)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
        kernel = torch.autograd.grad((dense(x) * probe).sum(), dense.weight)[0].flatten(1)
        lora_A, lora_B = torch.autograd.grad((layer(x) * probe).sum(), (layer.lora_A, layer.lora_B))
        torch.testing.assert_close(lora_A, layer.scaling * layer.lora_B.T @ kernel, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(lora_B, layer.scaling * kernel @ layer.lora_A.T, rtol=1e-9, atol=1e-10)

    def test_second_derivatives(self):
        layer = layer_of(make_conv(kernel_size=2, groups=2), rank=2).double()
        x = gaussian(1, 8, 3, 3, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradgradcheck(lambda x: layer(x).square(), x)

    def test_keeps_no_dense_kernel(self):
        """Between forward and backward nothing of the kernel's size is held but its codes."""
        layer = lk.QuantLoRAConv2d(64, 64, 3, padding=1, format="nf2", rank=1)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            layer(gaussian(1, 64, 2, 2).requires_grad_()).sum()
        assert saved and max(t.nbytes for t in saved) < 4 * 64 * 64 * 9 / 8

    def test_only_the_adapter_learns(self):
        layer, x, target = layer_of(make_conv()), gaussian(4, 8, 9, 9), gaussian(4, 16, 7, 7, seed=1)
        before = parameters_of(layer)
        trained = [p for p in layer.parameters() if p.requires_grad]
        optimizer, losses = torch.optim.Adam(trained, lr=1e-2), []
        for _ in range(15):
            optimizer.zero_grad()
            loss = (layer(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.95 * losses[0]
        changed = {name for name, tensor in parameters_of(layer).items() if not torch.equal(tensor, before[name])}
        assert changed == {"lora_A", "lora_B"}

    def test_bias_can_be_trained(self):
        layer = layer_of(make_conv())
        layer.bias.requires_grad_()
        layer(gaussian(2, 8, 9, 9)).sum().backward()
        torch.testing.assert_close(layer.bias.grad, torch.full((16,), 98.0))


class TestConstruction:
    def test_new_layer(self):
        layer = lk.QuantLoRAConv2d(8, 16, (3, 5), groups=2, rank=4, lora_alpha=8)
        assert layer.scaling == 2 and layer.lora_A.shape == (4, 60) and layer.lora_B.shape == (16, 4)
        assert not layer(gaussian(1, 8, 9, 9)).any() and layer.lora_A.any()
        layer.packed.validate()

    def test_from_conv(self):
        conv = make_conv(padding=1).eval()
        before = parameters_of(conv)
        layer = lk.QuantLoRAConv2d.from_conv(conv)
        assert_unchanged(conv, before)
        assert not layer.training and layer.rank == 16 and layer.bias is not conv.bias
        assert same_packed(layer_of(conv, rank=None).packed, lk.quantize(conv.weight.detach().flatten(1)))

    def test_takes_the_class_it_replaces(self):
        class Sub(nn.Conv2d):
            pass

        for module in (nn.Conv1d(8, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.Linear(8, 8), Sub(8, 8, 3)):
            with pytest.raises(TypeError, match=f"takes a torch.nn.Conv2d, got {type(module).__name__}"):
                lk.QuantLoRAConv2d.from_conv(module)

    def test_init_of_another_shape(self):
        with pytest.raises(ValueError, match=r"\(16, 70\), the kernel flattens to \(16, 72\)"):
            lk.QuantLoRAConv2d.from_init(lk.loftq_init(gaussian(16, 70), rank=4), make_conv())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"kernel_size": 0}, "kernel_size=0"),
            ({"kernel_size": (3, 2.5)}, r"kernel_size=\(3, 2\.5\)"),
            ({"stride": 0}, "stride=0"),
            ({"dilation": (0, 1)}, r"dilation=\(0, 1\)"),
            ({"padding": -1}, "padding=-1"),
            ({"padding": "full"}, "full"),
            ({"padding": "same", "stride": 2}, "same"),
            ({"padding_mode": "mirror"}, "padding_mode"),
            ({"groups": 3}, "divisible"),
            ({"groups": 0}, "groups=0"),
            ({"in_channels": 0}, "in_channels=0"),
            ({"out_channels": -4}, "out_channels=-4"),
            ({"rank": 17}, "rank=17 is outside 1..16"),
            ({"format": "nf9"}, "nf9"),
            ({"group_size": 48}, "group_size=48"),
        ],
        ids=str,
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            lk.QuantLoRAConv2d(**{"in_channels": 8, "out_channels": 16, "kernel_size": 3, **options})

    def test_not_finite(self):
        conv = make_conv()
        conv.weight.data[3, 1, 0, 2] = float("nan")
        with pytest.raises(ValueError, match="nan in row 3, column 11"):
            layer_of(conv)

    def test_repr(self):
        text = repr(layer_of(make_conv(padding="same", groups=2)))
        for part in ("QuantLoRAConv2d(8, 16", "kernel_size=(3, 3)", "padding='same'", "groups=2", "nf4", "rank=4"):
            assert part in text
        assert "dilation" not in text

    @pytest.mark.parametrize(("dimensions", "geometry"), [GEOMETRIES[i] for i in (11, 12, 15)], ids=str)
    def test_merged_conv(self, dimensions, geometry):
        layer = layer_of(make_conv(dimensions, **geometry)).eval()
        merged, x = layer.merged_conv(), gaussian(2, 8, *SIZES[dimensions])
        assert type(merged) in (nn.Conv1d, nn.Conv2d) and not merged.training
        torch.testing.assert_close(merged(x), layer(x), rtol=1e-4, atol=1e-5)
        layer.disable_adapter()
        torch.testing.assert_close(layer.merged_conv()(x), layer(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(layer.weight, layer.dequantize()) and layer.weight.shape == merged.weight.shape


class TestMoves:
    @pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
    def test_dtypes(self, convert):
        layer = layer_of(make_conv(), "int4")
        packed = layer.packed.clone()
        getattr(layer, convert)()
        assert same_packed(layer.packed, packed) and layer.lora_A.dtype == layer.bias.dtype != torch.float32

    def test_state_dict(self):
        layer = layer_of(make_conv(groups=2), "int4")
        blank = lk.QuantLoRAConv2d(8, 16, 3, groups=2, format="int4", rank=4)
        blank.load_state_dict(layer.state_dict())
        x = gaussian(2, 8, 9, 9)
        assert torch.equal(blank(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
        with pytest.raises(RuntimeError, match="codebook is not that of format nf4"):
            lk.QuantLoRAConv2d(8, 16, 3, groups=2, rank=4).load_state_dict(layer.state_dict())

    def test_meta(self):
        layer = layer_of(make_conv()).to("meta")
        assert layer(torch.zeros(2, 8, 9, 9, device="meta")).shape == (2, 16, 7, 7)


class Block(nn.Module):
    def __init__(self, width: int, stride: int = 1, inner: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(width // stride, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=inner, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.skip = nn.Conv2d(width // stride, width, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.skip(x))


class ResNet(nn.Module):
    """A stem, three blocks, one of them grouped, a depthwise and a transposed convolution and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1, padding_mode="reflect")
        self.blocks = nn.Sequential(Block(32), Block(64, 2), Block(64, inner=2))
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.up = nn.ConvTranspose2d(64, 64, 2, 2)
        self.sequence = nn.Conv1d(64, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.up(self.depthwise(self.blocks(self.stem(x))))
        return self.head(self.sequence(x.flatten(2)).mean(2))


def resnet(seed: int = 0) -> ResNet:
    torch.manual_seed(seed)
    return ResNet().eval()


IMAGES = gaussian(2, 3, 10, 10)


class TestModels:
    def quantized(self, **fields) -> tuple[ResNet, lk.QuantizationReport]:
        model = resnet()
        cfg = lk.QuantConfig(**{"format": "int8", "layer_types": ("linear", "conv"), **SMALL, **fields})
        return model, lk.quantize_model(model, cfg, progress=False)

    def test_off_by_default(self):
        model, report = self.quantized(format="int4", layer_types=("linear",))
        assert [layer.name for layer in report.layers] == ["head"] and not report.skipped

    def test_resnet(self):
        model, report = self.quantized()
        assert len(report.layers) == 9 and report.skipped.keys() == {"depthwise", "up", "head"}
        assert all("packed it would take" in report.skipped[name] for name in ("depthwise", "head"))
        assert "ConvTranspose2d" in report.skipped["up"]
        assert type(model.stem) is lk.QuantLoRAConv2d and type(model.sequence) is lk.QuantLoRAConv1d
        assert torch.nn.functional.cosine_similarity(model(IMAGES), resnet()(IMAGES)).min() > 0.999
        stem = next(layer for layer in report.layers if layer.name == "stem")
        assert (stem.out_features, stem.in_features) == (32, 27) and 0 < stem.error < 0.01
        trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {"lora_A", "lora_B"}
        model.train()(IMAGES).sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    def test_convolutions_alone_and_by_pattern(self):
        model, report = self.quantized(layer_types="conv", include="blocks.*", overrides={"*.skip": None})
        assert type(model.head) is nn.Linear and len(report.layers) == 6 and "blocks.1.skip" in report.skipped

    @pytest.mark.parametrize("target", ["meta", "dense", "quantized"])
    def test_round_trip(self, target, tmp_path):
        model, _ = self.quantized(overrides={"blocks.0.*": {"format": "nf2", "rank": None}})
        lk.save_quantized(model, tmp_path)
        if target == "meta":
            with torch.device("meta"):
                into = ResNet().eval()
        else:
            into = resnet(5) if target == "dense" else self.quantized(rank=2)[0]
        loaded = lk.load_quantized(tmp_path, into)
        assert torch.equal(loaded(IMAGES), model(IMAGES))
        assert loaded.blocks[0].conv1.rank is None and loaded.stem.padding_mode == "reflect"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"stride": 2}, r"layer 'stem' has .*'stride': \[2, 2\]"),
            ({"padding_mode": "zeros"}, "layer 'stem' has .*'padding_mode': 'zeros'"),
            ({"kernel_size": 5}, r"layer 'stem' has shape \(32, 75\), the checkpoint holds \(32, 27\)"),
        ],
        ids=str,
    )
    def test_loaded_into_another_geometry(self, change, message, tmp_path):
        model, _ = self.quantized()
        lk.save_quantized(model, tmp_path)
        other = resnet()
        geometry = {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", **change}
        other.stem = nn.Conv2d(3, 32, **geometry)
        before = parameters_of(other)
        with pytest.raises(ValueError, match=message):
            lk.load_quantized(tmp_path, other)
        assert_unchanged(other, before)
        other.stem = nn.Linear(27, 32)
        with pytest.raises(ValueError, match="'stem' is a Linear, the checkpoint holds a layer of kind conv2d"):
            lk.load_quantized(tmp_path, other)

    @pytest.mark.parametrize(
        "changes",
        [
            {"kind": "conv3d"},
            {"kind": ["conv2d"]},
            {"kind": "conv1d"},
            {"kind": "linear"},
            {"geometry": None},
            {"geometry": {}},
            {"geometry": {"stride": [1, 1]}},
            {"groups": 2},
            {"in_channels": 10**18},
            {"kernel_size": [3, 3, 3]},
            {"padding": "full"},
            {"rank": 28},
        ],
        ids=str,
    )
    def test_edited_checkpoints(self, changes, tmp_path):
        """Nothing is built of a description that is not the model's."""
        model, _ = self.quantized(include="stem")
        lk.save_quantized(model, tmp_path)
        values = json.loads((tmp_path / CONFIG_NAME).read_text())
        stem = values["layers"]["stem"]
        for name, value in changes.items():
            (stem if name in stem else stem["geometry"])[name] = value
        (tmp_path / CONFIG_NAME).write_text(json.dumps(values))
        with pytest.raises(ValueError, match="stem"):
            lk.load_quantized(tmp_path, resnet())

    def test_no_dense_kernel_is_built_by_loading(self, tmp_path):
        model = nn.Sequential(nn.Conv2d(64, 64, 3))
        lk.quantize_model(model, lk.QuantConfig("nf2", rank=1, layer_types="conv"), progress=False)
        lk.save_quantized(model, tmp_path)
        with torch.device("meta"):
            empty = nn.Sequential(nn.Conv2d(64, 64, 3))

        class Watch(TorchDispatchMode):
            largest = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor) and not out.is_meta:
                    self.largest = max(self.largest, out.nbytes)
                return out

        with Watch() as watch:
            lk.load_quantized(tmp_path, empty)
        assert 0 < watch.largest < 4 * 64 * 576 / 8

    def test_the_model_is_a_convolution(self):
        with pytest.raises(ValueError, match=r"itself an nn\.Conv2d.*from_conv"):
            lk.quantize_model(make_conv(), lk.QuantConfig(layer_types="conv"), progress=False)

    @pytest.mark.parametrize("kinds", [(), ("convolution",), "lin", ("linear", None)], ids=str)
    def test_unknown_layer_types(self, kinds):
        with pytest.raises(ValueError, match="layer_types="):
            lk.QuantConfig(layer_types=kinds)
