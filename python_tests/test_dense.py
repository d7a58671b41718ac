"""Dense models from local folders."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import TOKENS, gaussian, load_file, save_file, tiny_bert, tiny_gpt2
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
        described = {"class": type(model).__name__, "config": json.loads(model.config.to_json_string(use_diff=False))}
        empty = architecture.skeleton(described)
        assert type(empty) is type(model) and not empty.training
        shapes = {name: p.shape for name, p in model.named_parameters()}
        assert {name: p.shape for name, p in empty.named_parameters()} == shapes
        assert all(p.is_meta for p in empty.parameters())

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
        """Files are put together; what the patterns name becomes a linear layer, nothing else; every name stays."""
        names = sorted(tensors)
        for i in range(2):
            save_file({name: tensors[name] for name in names[i::2]}, tmp_path / f"model-{i}.safetensors")
        model = dense.load_dense(tmp_path, layers=["embed", "*.up", "re:.*child"])
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
            dense.load_dense(tmp_path, layers=["embed"])

    def test_a_lone_pattern(self, tensors, tmp_path):
        save_file(tensors, tmp_path / "model.safetensors")
        one, listed = (dense.load_dense(tmp_path, layers=layers) for layers in ("embed", ["embed"]))
        assert isinstance(one.embed, nn.Linear) and isinstance(listed.embed, nn.Linear)

    def test_nothing_is_guessed(self, tensors, tmp_path):
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"no config.json, and shapes do not tell.*layers=.*model="):
            dense.load_dense(tmp_path)
        for pattern in ("body.0.norm", "conv", "odd", "mixed", "nothing"):  # no matrix with a bias to match
            with pytest.raises(ValueError, match=f"'{pattern}' matches none of its matrices: "):
                dense.load_dense(tmp_path, layers=["embed", pattern])

    @pytest.mark.parametrize(
        "tensors", [{"a.weight": gaussian(4, 4), "a": gaussian(3)}, {"forward.weight": gaussian(4, 4)}], ids=str
    )
    def test_names_that_make_no_tree(self, tensors, tmp_path):
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="tensor names do not make a tree of modules"):
            dense.load_dense(tmp_path, layers=["*"])


class TestGivenModel:
    """The plain files of a GPT-2: its matrices are [in, out], its head is tied and stored once."""

    @pytest.fixture
    def folder(self, tmp_path):
        tensors = {name: t.clone() for name, t in tiny_gpt2().state_dict().items() if name != "lm_head.weight"}
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    def blank(self):
        model = tiny_gpt2()
        for parameter in model.parameters():
            parameter.data.zero_()
        return model

    def test_fills_it(self, folder):
        model = self.blank()
        assert dense.load_dense(folder, model=model) is model and not model.training
        assert model.lm_head.weight is model.transformer.wte.weight
        assert torch.equal(model(TOKENS).logits, tiny_gpt2()(TOKENS).logits)

    def test_dtype_is_that_of_the_file(self, folder):
        assert dense.load_dense(folder, model=self.blank().bfloat16()).lm_head.weight.dtype == torch.float32

    def test_shared_tensors_that_differ(self, folder):
        save_file({"lm_head.weight": gaussian(50, 64)}, folder / "other.safetensors")
        with pytest.raises(ValueError, match="shares .*lm_head.weight, which differ in the files"):
            dense.load_dense(folder, model=self.blank())

    def test_another_model(self, folder):
        with pytest.raises(ValueError, match='the files are not those of Linear: .*Missing key.*"weight"'):
            dense.load_dense(folder, model=nn.Linear(3, 3))

    def test_without_values(self, tmp_path):
        class Shifted(nn.Linear):
            def __init__(self):
                super().__init__(4, 4, bias=False)
                self.register_buffer("shift", torch.ones(4), persistent=False)

        save_file({"weight": gaussian(4, 4)}, tmp_path / "model.safetensors")
        with torch.device("meta"):
            empty = Shifted()
        with pytest.raises(ValueError, match="Shifted has no values for shift: do not build it on meta"):
            dense.load_dense(tmp_path, model=empty)


class TestDamaged:
    """transformers would fill with random values what these lack."""

    def folder(self, tmp_path, **changes):
        tiny_bert().save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return tmp_path

    def test_more_layers_than_tensors(self, tmp_path):
        with pytest.raises(ValueError, match="BertModel needs 16 tensors that the files lack: encoder.layer.2"):
            dense.load_dense(self.folder(tmp_path, num_hidden_layers=3))

    def test_other_shapes(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"needs 'embeddings.LayerNorm.bias' of shape \(128,\), the file holds \(64,\)"
        ):
            dense.load_dense(self.folder(tmp_path, hidden_size=128))

    def test_weights_of_which_the_scales_stand_elsewhere(self, tmp_path):
        folder = self.folder(tmp_path)
        tensors = load_file(folder / "model.safetensors")
        name = "encoder.layer.0.output.dense.weight"
        tensors[name], tensors[f"{name}_scale_inv"] = (64 * tensors[name]).to(torch.float8_e4m3fn), torch.ones(1, 1)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="would read scaled weights without '.*weight_scale_inv'"):
            dense.load_dense(folder)


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        dense.load_dense(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no .safetensors file"):
        dense.load_dense(tmp_path)


def test_pickles_are_not_read(tmp_path):
    torch.save({"weight": gaussian(3, 3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled weights are not read"):
        dense.load_dense(tmp_path)
