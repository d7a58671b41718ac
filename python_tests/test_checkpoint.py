"""`save_quantized` and `load_quantized`: what comes back, what is refused, and what a failure leaves behind."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from helpers import (
    DEVICES,
    FORMATS,
    TOKENS,
    TinyModel,
    assert_unchanged,
    gaussian,
    load_file,
    parameters_of,
    save_file,
    tiny_bert,
    tiny_gpt2,
)
from helpers import tiny_model as dense_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import loftq_kernels as lk
from loftq_kernels.checkpoints.dense import load_dense
from loftq_kernels.checkpoints.manifest import CONFIG_NAME
from loftq_kernels.storage import files

pytest.importorskip("safetensors")
X = gaussian(3, 64)


def quantized_model(seed: int = 0, **fields) -> TinyModel:
    model = dense_model(seed)
    lk.quantize_model(model, lk.QuantConfig(**{"rank": 4, "num_iter": 1, **fields}), progress=False)
    return model


def skeleton() -> TinyModel:
    """Moved to meta as well: transformers patches torch.linspace so that it makes real values under that context."""
    with torch.device("meta"):
        return TinyModel().eval().to("meta")


@pytest.fixture
def model() -> TinyModel:
    return quantized_model()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    lk.save_quantized(model, tmp_path / "model")
    return tmp_path / "model"


def tensor_file(folder: Path) -> Path:
    return folder / json.loads((folder / CONFIG_NAME).read_text())["tensor_file"]


def edit(folder: Path, **changes) -> None:
    """Change top-level entries of the JSON."""
    values = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**values, **changes}))


def edit_layer(folder: Path, name: str, **changes) -> None:
    layers = json.loads((folder / CONFIG_NAME).read_text())["layers"]
    edit(folder, layers={**layers, name: {**layers[name], **changes}})


def rewrite_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors (None removes) and state the new checksum: what a hash cannot catch."""
    file = tensor_file(folder)
    tensors = {**load_file(file), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    edit(folder, sha256=hashlib.sha256(file.read_bytes()).hexdigest())


def assert_refused(folder: Path, match: str | None, error=ValueError) -> None:
    """Loading raises and leaves the model as it was."""
    target = dense_model(seed=5)
    before = parameters_of(target)
    with pytest.raises(error, match=match):
        lk.load_quantized(folder, target)
    assert_unchanged(target, before)
    assert not any(isinstance(module, lk.QuantLoRALinear) for module in target.modules())


class TestRoundTrip:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("format", FORMATS)
    def test_plain_model(self, format, device, tmp_path):
        model = quantized_model(format=format, group_size=32, lora_alpha=2, scale_dtype=torch.bfloat16)
        lk.save_quantized(model, tmp_path)
        loaded = lk.load_quantized(tmp_path, skeleton(), device=device)
        assert {t.device.type for t in parameters_of(loaded).values()} == {device}
        loaded.cpu()
        assert torch.equal(loaded(X), model(X))
        assert loaded.head.scaling == 0.5 and loaded.head.group_size == 32
        expected, actual = parameters_of(model), parameters_of(loaded)  # buffers outside state_dict are among them
        assert actual.keys() == expected.keys() and "shift" in actual
        assert all(torch.equal(actual[n], t) and actual[n].dtype == t.dtype for n, t in expected.items())

    @pytest.mark.parametrize("target", ["meta", "dense", "quantized", "other format"])
    def test_into(self, target, model, folder):
        into = {
            "meta": skeleton,
            "dense": lambda: dense_model(5),
            "quantized": lambda: quantized_model(5),
            "other format": lambda: quantized_model(5, format="int2", rank=7),
        }[target]()
        assert lk.load_quantized(folder, into) is into
        assert torch.equal(into(X), model(X))

    def test_mixed_layers(self, tmp_path):
        overrides = {"layers.0.*": {"format": "int2", "rank": None}, "layers.1.up": None, "head": {"rank": 10}}
        model = quantized_model(overrides=overrides)
        lk.save_quantized(model, tmp_path)
        loaded = lk.load_quantized(tmp_path, skeleton())
        assert torch.equal(loaded(X), model(X)) and type(loaded.layers[1]["up"]) is nn.Linear

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_dtypes(self, dtype, tmp_path):
        model = quantized_model().to(dtype)
        lk.save_quantized(model, tmp_path)
        loaded = lk.load_quantized(tmp_path, skeleton())
        assert torch.equal(loaded(X.to(dtype)), model(X.to(dtype)))

    def test_bert(self, tmp_path):
        model = tiny_bert()
        lk.quantize_model(model, lk.QuantConfig(rank=4, num_iter=1), progress=False)
        lk.save_quantized(model, tmp_path)
        loaded = lk.load_quantized(tmp_path)
        assert type(loaded) is type(model) and not loaded.training
        assert torch.equal(loaded(TOKENS).last_hidden_state, model(TOKENS).last_hidden_state)
        assert loaded.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}

    def test_gpt2_with_a_tied_head(self, tmp_path):
        model = tiny_gpt2()
        lk.quantize_model(model, lk.QuantConfig(format="nf2", rank=4, num_iter=1), progress=False)
        lk.save_quantized(model, tmp_path)
        loaded = lk.load_quantized(tmp_path)
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        assert sum("wte" in name or "lm_head" in name for name in load_file(tmp_path / "model.safetensors")) == 1
        torch.manual_seed(0)
        generate = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(loaded.generate(TOKENS, **generate), model.generate(TOKENS, **generate))

    def test_shared_module(self, tmp_path):
        def build():
            shared = nn.Linear(64, 64)
            return nn.Sequential(shared, nn.ReLU(), shared)

        model = build()
        lk.quantize_model(model, lk.QuantConfig(rank=4, num_iter=1), progress=False)
        lk.save_quantized(model, tmp_path)
        with torch.device("meta"):
            empty = build()
        loaded = lk.load_quantized(tmp_path, empty)
        assert torch.equal(loaded(X), model(X)) and loaded[0].lora_A is loaded[2].lora_A

    def test_only_adapters_are_trained(self, folder):
        loaded = lk.load_quantized(folder, skeleton())
        trained = {name.rpartition(".")[2] for name, p in loaded.named_parameters() if p.requires_grad}
        assert trained == {"lora_A", "lora_B"}
        loaded(X).sum().backward()
        assert loaded.head.lora_A.grad is not None

    def test_a_trained_adapter(self, model, folder):
        model.head.lora_B.data += 1
        lk.save_quantized(model, folder)
        assert torch.equal(lk.load_quantized(folder, skeleton())(X), model(X))

    def test_modes_are_those_of_the_target(self, folder):
        target = skeleton()
        target.layers[0]["up"].train()
        loaded = lk.load_quantized(folder, target)
        assert loaded.layers[0]["up"].training and not loaded.layers[0]["down"].training

    def test_saved_again_it_is_the_same(self, folder, tmp_path):
        lk.save_quantized(lk.load_quantized(folder, skeleton()), tmp_path / "again")
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
            file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()
        }

    def test_files(self, folder, model):
        assert sorted(file.name for file in folder.iterdir()) == sorted([CONFIG_NAME, tensor_file(folder).name])
        names = {name for name in model.state_dict() if not name.endswith("_extra_state")}  # which the JSON tells
        assert set(load_file(tensor_file(folder))) == names | {"shift"}

    def test_no_dense_weight_is_ever_built(self, tmp_path):
        """Into a skeleton on the meta device: no operation allocates as much as one dense weight."""
        with torch.device("meta"):
            empty = TinyModel(256).eval()
        model = dense_model(width=256)
        lk.quantize_model(model, lk.QuantConfig(format="nf2", rank=2, num_iter=1), progress=False)
        lk.save_quantized(model, tmp_path)

        class Watch(TorchDispatchMode):
            largest = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                for out in result if isinstance(result, tuple | list) else (result,):
                    if isinstance(out, torch.Tensor) and not out.is_meta:
                        self.largest = max(self.largest, out.nbytes)
                return result

        with Watch() as watch:
            lk.load_quantized(tmp_path, empty)
        assert 0 < watch.largest < 4 * 256 * 512 / 8


class TestSave:
    def test_nothing_quantized(self, tmp_path):
        with pytest.raises(ValueError, match="TinyModel has no QuantLoRALinear"):
            lk.save_quantized(dense_model(), tmp_path / "model")
        assert not (tmp_path / "model").exists()

    def test_meta_tensors(self, model, tmp_path):
        model.norm.to("meta")
        with pytest.raises(ValueError, match="meta device.*norm.weight"):
            lk.save_quantized(model, tmp_path)

    def test_replaces_the_old_one(self, folder):
        other = quantized_model(seed=5, format="nf2")
        lk.save_quantized(other, folder)
        assert torch.equal(lk.load_quantized(folder, skeleton())(X), other(X))
        assert len(list(folder.iterdir())) == 2, "the old tensors are gone"

    def test_replaces_an_unreadable_one(self, model, folder):
        (folder / CONFIG_NAME).write_text("{")
        lk.save_quantized(model, folder)
        assert torch.equal(lk.load_quantized(folder, skeleton())(X), model(X))

    def test_leaves_other_files_alone(self, model, folder):
        (folder / "tokenizer.json").write_text("{}")
        lk.save_quantized(quantized_model(seed=5), folder)
        assert (folder / "tokenizer.json").read_text() == "{}"

    @pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
    @pytest.mark.parametrize("step", ["tensors", "config", "rename"])
    def test_failure_leaves_the_old_one(self, step, error, model, folder, monkeypatch):
        expected, calls = model(X), []
        replace = files.os.replace

        def fail(*args, **kwargs):
            raise error

        def write_half(tensors, path, **kwargs):
            Path(path).write_bytes(b"half")
            raise error

        def fail_on_config(source, target):
            calls.append(target)
            return fail() if Path(target).name == CONFIG_NAME else replace(source, target)

        if step == "tensors":
            monkeypatch.setattr("safetensors.torch.save_file", write_half)
        elif step == "config":
            monkeypatch.setattr(Path, "write_text", fail)
        else:
            monkeypatch.setattr(files.os, "replace", fail_on_config)
        with pytest.raises(type(error)):
            lk.save_quantized(quantized_model(seed=5), folder)
        monkeypatch.undo()
        assert torch.equal(lk.load_quantized(folder, skeleton())(X), expected)
        assert not list(folder.glob("*tmp*")) and not list(folder.glob(".*"))


class TestCorruption:
    @pytest.mark.parametrize("kept", [0, 7, 100, 5000, -1])
    def test_truncated_tensors(self, folder, kept):
        file = tensor_file(folder)
        file.write_bytes(file.read_bytes()[:kept])
        assert_refused(folder, f"{file.name} is truncated or corrupted")
        with pytest.raises(ValueError, match=file.name):
            lk.load_quantized(folder, skeleton(), verify=False)

    def test_flipped_bits_of_tensors(self, folder):
        file, rng = tensor_file(folder), random.Random(0)
        data = file.read_bytes()
        for _ in range(40):
            flipped = bytearray(data)
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(flipped)
            with pytest.raises(ValueError, match="truncated or corrupted"):
                lk.load_quantized(folder, skeleton())

    def test_flipped_bits_of_the_header_unverified(self, folder):
        """Whoever waives the checksum gets a model or a ValueError, nothing else."""
        file, rng = tensor_file(folder), random.Random(0)
        data = file.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        for _ in range(60):
            flipped = bytearray(data)
            flipped[rng.randrange(header)] ^= 1 << rng.randrange(8)
            file.write_bytes(flipped)
            try:
                lk.load_quantized(folder, skeleton(), verify=False)
            except ValueError as error:
                assert str(error)

    def test_flipped_bits_of_the_config(self, folder):
        file, rng = folder / CONFIG_NAME, random.Random(0)
        data = file.read_bytes()
        refused = 0
        for _ in range(150):
            flipped = bytearray(data)
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(flipped)
            try:
                lk.load_quantized(folder, skeleton())
            except (ValueError, FileNotFoundError):
                refused += 1
        assert refused > 75  # white space and the digits of a scaling may change unnoticed

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", "\x00", '{"a": 1}', "[" * 100_000, "1" * 5000])
    def test_not_a_config(self, folder, text):
        (folder / CONFIG_NAME).write_text(text)
        assert_refused(folder, CONFIG_NAME)

    def test_truncated_config(self, folder):
        data = (folder / CONFIG_NAME).read_bytes()
        (folder / CONFIG_NAME).write_bytes(data[: len(data) // 2])
        assert_refused(folder, f"{CONFIG_NAME}: this is not JSON")

    def test_not_utf8(self, folder):
        (folder / CONFIG_NAME).write_bytes(b"\xff\xfe{}")
        assert_refused(folder, CONFIG_NAME)

    def test_huge_config(self, folder):
        with open(folder / CONFIG_NAME, "r+b") as file:
            file.truncate(1 << 30)  # sparse: takes no space
        assert_refused(folder, f"{CONFIG_NAME} has {1 << 30} bytes")

    @pytest.mark.parametrize("version", [0, 2, "1", None])
    def test_another_version(self, folder, version):
        edit(folder, loftq_format_version=version)
        assert_refused(folder, f"loftq_format_version is {version!r}")

    def test_missing(self, folder, tmp_path):
        assert_refused(tmp_path / "nowhere", f"nowhere.*{CONFIG_NAME}", FileNotFoundError)
        file = tensor_file(folder)
        file.unlink()
        assert_refused(folder, file.name, FileNotFoundError)

    @pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b", "..", ".", "", 5, None, ["x"]])
    def test_path_outside_the_folder(self, folder, name):
        tensor_file(folder).rename(folder.parent / "model.safetensors")
        edit(folder, tensor_file=name)
        assert_refused(folder, "tensor_file|does not exist|PathLike", (ValueError, FileNotFoundError))

    @pytest.mark.parametrize(
        "changes",
        [
            {"layers": []},
            {"layers": {"head": 5}},
            {"layers": None},
            {"tied": []},
            {"tied": {"head.lora_A": ["x"]}},
            {"tied": {"head.lora_A": "nothing"}},
            {"tied": None},
            {"non_persistent": 5},
            {"sha256": None},
            {"extra": 1},
        ],
        ids=str,
    )
    def test_entries_of_another_kind(self, folder, changes):
        edit(folder, **changes)
        assert_refused(folder, None)

    @pytest.mark.parametrize("field", ["in_features", "out_features"])
    @pytest.mark.parametrize("size", [10**18, 10**9, 10**30, 65, 0, -64, 64.0, "64", None, True])
    def test_sizes(self, folder, field, size):
        """Compared with the model before anything of that size is allocated."""
        edit_layer(folder, "head", **{field: size})
        assert_refused(folder, "head")

    @pytest.mark.parametrize(
        "changes",
        [
            {"rank": 10**9},
            {"rank": 5},
            {"rank": 0},
            {"rank": "4"},
            {"rank": None},
            {"bias": True},
            {"bias": "no"},
            {"format": "nf9"},
            {"format": ["nf4"]},
            {"format": "int4"},
            {"format": "int8"},
            {"group_size": 48},
            {"group_size": 32},
            {"group_size": "64"},
            {"scale_dtype": "float32"},
            {"scale_dtype": "int8"},
            {"scaling": 0},
            {"scaling": -1},
            {"scaling": "1"},
            {"scaling": None},
            {"surprise": 1},
        ],
        ids=str,
    )
    def test_layers_that_do_not_fit(self, folder, changes):
        edit_layer(folder, "head", **changes)
        assert_refused(folder, "head")

    @pytest.mark.parametrize("scaling", ["NaN", "Infinity", "1e999"])
    def test_scaling_is_finite(self, folder, scaling):
        text = (folder / CONFIG_NAME).read_text().replace('"scaling": 1.0', f'"scaling": {scaling}')
        (folder / CONFIG_NAME).write_text(text)
        assert_refused(folder, "scaling")

    @pytest.mark.parametrize(("stored", "claimed"), [("nf2", "uniform2"), ("nf4", "uniform4"), ("nf4", "int4_sym")])
    def test_another_format_of_the_same_shapes(self, stored, claimed, tmp_path):
        lk.save_quantized(quantized_model(format=stored), tmp_path)
        edit_layer(tmp_path, "head", format=claimed)
        assert_refused(tmp_path, f"head.codebook' is not the code book of format {claimed}")

    @pytest.mark.parametrize(
        "changes",
        [
            {"head__codes": None},
            {"shift": None},
            {"norm__bias": None},
            {"stranger": torch.zeros(3)},
            {"head__codes": torch.zeros(10, 31, dtype=torch.uint8)},
            {"head__codes": torch.zeros(10, 32, dtype=torch.int8)},
            {"head__scale": torch.zeros(10, 1)},
            {"head__codebook": torch.zeros(16)},
            {"head__lora_A": torch.zeros(4, 65)},
            {"head__lora_A": torch.zeros(4, 64, dtype=torch.int32)},
            {"norm__weight": torch.zeros(64, dtype=torch.uint8)},
        ],
        ids=lambda changes: str({name: t if t is None else (t.dtype, *t.shape) for name, t in changes.items()}),
    )
    def test_tensors_that_do_not_fit(self, folder, changes):
        """shift may only be missing where the model has a value for it, which a skeleton has not."""
        rewrite_tensors(folder, **changes)
        (name,) = changes
        with pytest.raises(ValueError, match=name.replace("__", ".")):
            lk.load_quantized(folder, skeleton())


class TestWrongModel:
    def test_without_the_layer(self, folder):
        with pytest.raises(ValueError, match="Sequential has no layer 'layers.0.up'"):
            lk.load_quantized(folder, nn.Sequential(nn.Linear(64, 64)))

    def test_of_another_width(self, folder):
        with pytest.raises(ValueError, match=r"'layers.0.up' has shape \(64, 32\), the checkpoint holds \(128, 64\)"):
            lk.load_quantized(folder, TinyModel(32))

    def test_with_something_else_in_the_place(self, folder):
        model = skeleton()
        model.head = nn.LayerNorm(64)
        with pytest.raises(ValueError, match="layer 'head' is a LayerNorm"):
            lk.load_quantized(folder, model)

    def test_with_more_parameters(self, folder):
        model = dense_model()
        model.extra = nn.Linear(3, 3)
        with pytest.raises(ValueError, match="lacks tensors of TinyModel: extra.bias"):
            lk.load_quantized(folder, model)

    def test_plain_model_needs_its_architecture(self, folder):
        with pytest.raises(ValueError, match="model="):
            lk.load_quantized(folder)

    @pytest.mark.parametrize("name", ["NoSuchModel", "pipeline", "__file__", "PreTrainedModel", 5, None])
    def test_class_that_is_no_model(self, folder, name):
        edit(folder, transformers={"class": name, "config": {}})
        with pytest.raises(ValueError, match="model"):
            lk.load_quantized(folder)

    @pytest.mark.parametrize("described", [{}, {"class": "BertModel"}, [], "BertModel"])
    def test_incomplete_description(self, folder, described):
        edit(folder, transformers=described)
        with pytest.raises(ValueError, match="description|model="):
            lk.load_quantized(folder)


class Mixed(nn.Module):
    """A layer of each kind, as the fixture in data/checkpoint_v1 has them."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 32, padding_idx=3)
        self.conv = nn.Conv1d(8, 16, 3, padding=1)
        self.first = nn.Linear(32, 64)
        self.merged = nn.Linear(64, 48)
        self.plain = nn.Linear(48, 32, bias=False)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 5)

    def forward(self, ids):
        x = self.table(ids)
        x = self.norm(self.plain(self.merged(self.first(x).relu())) + x)
        x = self.conv(x[..., :8].transpose(1, 2)).transpose(1, 2)
        return self.head(torch.cat([x, x], -1))


IDS = torch.arange(12).view(2, 6)


def mixed(seed: int = 0, dtype=torch.float32, **fields) -> Mixed:
    """Each layer with settings of its own, and an adapter that matters."""
    torch.manual_seed(seed)
    model = Mixed().eval().to(dtype)
    overrides = {
        "merged": {"format": "int4", "adapter": "qalora", "rank": 2},
        "plain": {"rank": None, "format": "int2", "scale_dtype": torch.bfloat16},
        "conv": {"rank": 3, "format": "nf2", "group_size": -1},
    }
    options = {"group_size": 32, "rank": 4, "layer_types": ("linear", "conv", "embedding"), "overrides": overrides}
    lk.quantize_model(model, lk.QuantConfig("nf4", **{**options, **fields}), progress=False)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model


def attributes(model: nn.Module) -> dict[str, object]:
    """Everything public that modules and tensors are beside their values."""
    found = {}
    for name, module in model.named_modules():
        found |= {f"{name}.{key}": value for key, value in vars(module).items() if not key.startswith("_")}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[name] = tensor.dtype, tuple(tensor.shape), tensor.requires_grad, type(tensor)
    return found


class TestNothingIsLost:
    @pytest.mark.parametrize("adapter_dtype", [None, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_attributes(self, dtype, adapter_dtype, tmp_path):
        """Scaling, switched-off adapters, dtypes of layers without an adapter, what is trained, padding, groups."""
        model = mixed(dtype=dtype, adapter_dtype=adapter_dtype, lora_alpha=32, modules_to_save=("head",))
        for layer in (model.table, model.conv, model.merged):
            layer.disable_adapter()
        model.norm.bias.requires_grad_(True)
        lk.save_quantized(model, tmp_path)
        with torch.device("meta"):
            target = Mixed().eval()
        loaded = lk.load_quantized(tmp_path, target)
        assert attributes(loaded) == attributes(model)
        assert (
            loaded.head.weight.requires_grad and loaded.norm.bias.requires_grad and not loaded.first.bias.requires_grad
        )
        assert torch.equal(loaded(IDS), model(IDS))
        model.table.enable_adapter(), loaded.table.enable_adapter()
        assert torch.equal(loaded(IDS), model(IDS))

    @pytest.mark.parametrize("kind", ["lora", "qalora"])
    def test_merged_layers(self, kind, tmp_path):
        model = mixed()
        (model.merged if kind == "qalora" else model.first).merge_adapter(requantize=kind == "lora")
        lk.save_quantized(model, tmp_path)
        loaded = lk.load_quantized(tmp_path, Mixed().eval())
        assert attributes(loaded) == attributes(model) and torch.equal(loaded(IDS), model(IDS))

    def test_what_the_target_carries(self, tmp_path):
        """Attributes of the modules that are replaced go over; hooks cannot, and are not dropped in silence."""
        lk.save_quantized(mixed(), tmp_path)
        target = Mixed().eval()
        target.first.note = "mine"
        assert lk.load_quantized(tmp_path, target).first.note == "mine"
        target = Mixed().eval()
        target.first.register_forward_hook(lambda *_: None)
        before = parameters_of(target)
        with pytest.raises(ValueError, match="layer 'first' has hooks, which a replacement would lose"):
            lk.load_quantized(tmp_path, target)
        assert_unchanged(target, before)

    @pytest.mark.parametrize(
        "changes", [{"adapter_enabled": "no"}, {"adapter_enabled": 1}, {"dtype": "int8"}, {"dtype": 3}], ids=str
    )
    def test_tampered(self, folder, changes):
        edit_layer(folder, "head", **changes)
        assert_refused(folder, next(iter(changes)))

    @pytest.mark.parametrize("changes", [{"trained": "norm.bias"}, {"trained": [3]}, {"plain": 1}], ids=str)
    def test_tampered_entries(self, folder, changes):
        edit(folder, **changes)
        assert_refused(folder, None)

    def test_trains_what_is_not_there(self, folder):
        edit(folder, trained=["norm.nothing"])
        assert_refused(folder, "norm.nothing")

    def test_cannot_train_codes(self, folder):
        for name in ("head.codes", "shift"):
            edit(folder, trained=[name])
            assert_refused(folder, f"trains unknown tensors of TinyModel: {name}")


class TestStateDict:
    """Equal tensors alone would compute something else: the scaling and the switch of the adapter are among them."""

    def source(self) -> nn.Module:
        model = mixed(lora_alpha=32)
        model.conv.disable_adapter()
        return model

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("through", ["memory", "torch", "safetensors"])
    def test_into_another_scaling(self, through, assign, tmp_path):
        model, other = self.source(), mixed(5)
        state = model.state_dict()
        if through == "torch":
            torch.save(state, tmp_path / "file")
            state = torch.load(tmp_path / "file", weights_only=True)
        elif through == "safetensors":
            save_file(state, tmp_path / "file")
            state = load_file(tmp_path / "file")
        assert not torch.equal(other(IDS), model(IDS))
        result = other.load_state_dict(state, assign=assign)
        assert not result.missing_keys and not result.unexpected_keys
        assert torch.equal(other(IDS), model(IDS)) and not other.conv.adapter_enabled and other.first.scaling == 8

    def test_of_an_earlier_version(self):
        """Without the key: what the layer has stays, with a warning where that may be wrong."""
        old = {name: tensor for name, tensor in mixed().state_dict().items() if not name.endswith("_extra_state")}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other = mixed(5)
            assert not other.load_state_dict(old).missing_keys
        assert torch.equal(other(IDS), mixed()(IDS))
        with pytest.warns(UserWarning, match="what the adapter of table is scaled by: it keeps scaling=8"):
            mixed(5, lora_alpha=32).load_state_dict(old)

    def test_warns_once_per_load(self):
        old = {name: tensor for name, tensor in mixed().state_dict().items() if not name.endswith("_extra_state")}
        model = mixed(5, lora_alpha=32)
        for _ in range(2):
            with pytest.warns(UserWarning, match="and so does every other layer without this entry") as caught:
                model.load_state_dict(old)
            assert len(caught) == 1

    def test_of_two_numbers(self):
        """As they were before they had in_features."""
        state = {name: t[:2] if name.endswith("_extra_state") else t for name, t in mixed().state_dict().items()}
        other = mixed(5, lora_alpha=32)
        other.load_state_dict(state)
        assert torch.equal(other(IDS), mixed()(IDS))

    @pytest.mark.parametrize("assign", [False, True])
    def test_of_another_width(self, assign):
        """63 columns are packed into as many bytes, scales and group means as 64."""
        options = {"adapter": "qalora", "rank": 1, "format": "int4", "dtype": torch.float32}
        narrow, wide = (nn.Sequential(lk.QuantLoRALinear(k, 8, **options)) for k in (63, 64))
        for one, two, sizes in ((narrow, wide, "63, this layer's is 64"), (wide, narrow, "64, this layer's is 63")):
            before = {name: tensor.clone() for name, tensor in two.state_dict().items()}
            with pytest.raises(RuntimeError, match=f"0.in_features is {sizes}"):
                two.load_state_dict(one.state_dict(), assign=assign)
            torch.testing.assert_close(two.state_dict(), before, rtol=0, atol=0)
            with pytest.raises(ValueError, match=f"in_features is {sizes}"):
                two[0].set_extra_state(one[0].get_extra_state())

    @pytest.mark.parametrize("state", [[0.0, 1.0], [1.0, 2.0], [float("nan"), 1.0], [1.0], [1.0] * 4], ids=str)
    def test_tampered(self, state):
        model = mixed()
        with pytest.raises(ValueError, match="_extra_state must be"):
            model.load_state_dict({**model.state_dict(), "first._extra_state": torch.tensor(state)})


class TestEarlierVersion:
    """data/checkpoint_v1 was written when packed weights were buffers: a table, a convolution, LoRA on nf4, a merged
    QA-LoRA, int2 without an adapter and a dense head."""

    FOLDER = Path(__file__).parent / "data" / "checkpoint_v1"

    @pytest.mark.parametrize("target", ["meta", "dense", "quantized"])
    def test_loads(self, target):
        """Sums of a product may be split otherwise by another number of threads; stored tensors are bit for bit."""
        model = mixed(5, exclude="head") if target == "quantized" else Mixed().eval()
        loaded = lk.load_quantized(self.FOLDER, model.to("meta") if target == "meta" else model)
        expected = load_file(self.FOLDER / "expected.safetensors")
        torch.testing.assert_close(loaded(expected["ids"]), expected["logits"], rtol=0, atol=1e-6)
        tensors = load_file(self.FOLDER / "model-080cba58ee91.safetensors")
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("output_like")}
        actual = parameters_of(loaded)
        assert actual.keys() == tensors.keys() and all(torch.equal(actual[name], tensors[name]) for name in tensors)
        assert loaded.table.padding_idx == 3 and loaded.first.scaling == 2 and loaded.plain.rank is None
        assert all(layer.adapter_enabled and layer.dtype == torch.float32 for layer in (loaded.table, loaded.plain))

    def test_is_written_anew(self, tmp_path):
        loaded = lk.load_quantized(self.FOLDER, Mixed().eval())
        lk.save_quantized(loaded, tmp_path)
        again = lk.load_quantized(tmp_path, Mixed().eval())
        assert attributes(again) == attributes(loaded) and torch.equal(again(IDS), loaded(IDS))

    @pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.0, [1]], ids=repr)
    def test_damaged_version(self, version, tmp_path):
        shutil.copytree(self.FOLDER, tmp_path / "copy")
        edit(tmp_path / "copy", loftq_format_version=version)
        with pytest.raises(ValueError, match="loftq_format_version is .*, this version reads 1"):
            lk.load_quantized(tmp_path / "copy", Mixed().eval())


class TestLayersNamedInPlainFiles:
    """Plain files are quantized by names; that the names were right shows when a model is there."""

    def quantized(self, model, pattern, tmp_path):
        tensors = {name: t.clone() for name, t in model.state_dict().items() if name != "lm_head.weight"}
        save_file(tensors, tmp_path / "model.safetensors")
        named = load_dense(tmp_path, layers=[pattern])
        lk.quantize_model(named, lk.QuantConfig("int8", rank=4), progress=False)
        lk.save_quantized(named, tmp_path / "quantized")
        return tmp_path / "quantized"

    @pytest.mark.parametrize("pattern", ["*.attn.c_proj", "re:.*h.1.attn.c_proj"])
    def test_square_conv1d(self, pattern, tmp_path):
        """Its weight is [in, out]; of a square one no shape tells that it was quantized as [out, in]."""
        folder = self.quantized(tiny_gpt2(), pattern, tmp_path)
        model = tiny_gpt2()
        before = {name: p.clone() for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match=r"'transformer.h.\d.attn.c_proj' is a Conv1D.*--model-class"):
            lk.load_quantized(folder, model)
        assert_unchanged(model, before)

    def test_tied_head_is_stored_once(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.LlamaConfig(**sizes, vocab_size=50, tie_word_embeddings=True)
        torch.manual_seed(0)
        dense = transformers.LlamaForCausalLM(config).eval()
        folder = self.quantized(dense, "*_proj", tmp_path)
        loaded = lk.load_quantized(folder, transformers.LlamaForCausalLM(config).eval())
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        wanted = dense(TOKENS).logits
        assert (loaded(TOKENS).logits - wanted).norm() < 0.02 * wanted.norm()
