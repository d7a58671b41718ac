"""Dense models from local folders."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import TOKENS, gaussian, save_file, tiny_bert, tiny_gpt2
from torch import nn

from loftq_kernels.checkpoints import architecture, dense


class TestTransformers:
    @pytest.mark.parametrize("build", [tiny_bert, tiny_gpt2])
    def test_load(self, build, tmp_path):
        model = build()
        model.save_pretrained(tmp_path)
        loaded = dense.load_dense(tmp_path)
        assert type(loaded) is type(model) and not loaded.training
        assert torch.equal(loaded(TOKENS)[0], model(TOKENS)[0])

    def test_dtype_is_that_of_the_file(self, tmp_path):
        tiny_bert().bfloat16().save_pretrained(tmp_path)
        assert dense.load_dense(tmp_path).dtype == torch.bfloat16

    @pytest.mark.parametrize("build", [tiny_bert, tiny_gpt2])
    def test_skeleton(self, build):
        model = build()
        described = json.loads(json.dumps(architecture.describe(model)))
        empty = architecture.skeleton(described)
        assert type(empty) is type(model) and not empty.training
        shapes = {name: p.shape for name, p in model.named_parameters()}
        assert {name: p.shape for name, p in empty.named_parameters()} == shapes
        assert all(p.is_meta for p in empty.parameters())

    def test_other_models_are_not_described(self):
        assert architecture.describe(nn.Linear(3, 3)) is None

    @pytest.mark.parametrize("architectures", [None, [], ["NoSuchModel"], ["pipeline"], [5]])
    def test_architecture(self, architectures, tmp_path):
        tiny_bert().save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"architectures": architectures}))
        with pytest.raises(ValueError, match="architecture|not a model class"):
            dense.load_dense(tmp_path)

    def test_config_that_is_not_json(self, tmp_path):
        tiny_bert().save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(ValueError, match="config.json"):
            dense.load_dense(tmp_path)


class TestPlainFolder:
    @pytest.fixture
    def tensors(self):
        return {
            "embed.weight": gaussian(20, 64),
            "body.0.up.weight": gaussian(96, 64),
            "body.0.up.bias": gaussian(96),
            "body.0.norm.weight": gaussian(64),
            "body.0.norm.bias": gaussian(64),
            "body.0.ids": torch.arange(5),
            "conv.weight": gaussian(4, 3, 2),
            "odd.weight": gaussian(6, 5),
            "odd.extra": gaussian(2),
            "mixed.weight": gaussian(6, 5),
            "mixed.bias": gaussian(7),
            "body.0.up.child.weight": gaussian(8, 8),
            "scale": gaussian(1),
        }

    def test_tree(self, tensors, tmp_path):
        """Files are put together; only what can be nothing else becomes a linear layer; every name stays."""
        names = sorted(tensors)
        for i in range(2):
            save_file({name: tensors[name] for name in names[i::2]}, tmp_path / f"model-{i}.safetensors")
        model = dense.load_dense(tmp_path)
        state = model.state_dict()
        assert state.keys() == tensors.keys() and all(torch.equal(state[name], t) for name, t in tensors.items())
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert linear == {"embed", "body.0.up", "body.0.up.child"}
        up = model.get_submodule("body.0.up")
        assert (up.out_features, up.in_features) == (96, 64) and not model.training

    def test_corrupted(self, tensors, tmp_path):
        save_file(tensors, tmp_path / "model.safetensors")
        data = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(data[:100])
        with pytest.raises(ValueError, match="model.safetensors.*truncated"):
            dense.load_dense(tmp_path)


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        dense.load_dense(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no .safetensors file"):
        dense.load_dense(tmp_path)


def test_pickles_are_not_read(tmp_path):
    torch.save({"weight": gaussian(3, 3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled weights are not read"):
        dense.load_dense(tmp_path)
