"""Adapters in PEFT's files: what is saved here loads in PEFT with equal logits, and the other way round."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import TOKENS, gaussian, load_file, parameters_of, save_file, tiny_gpt2, tiny_model
from torch import nn

import loftq_kernels as lk
from loftq_kernels.nn.adapters import adapter_parameters, quantized_layers
from loftq_kernels.nn.named_adapters import active_adapters, loaded_adapters

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def tiny_llama(seed: int = 0, layers: int = 2, **changes):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=50, num_hidden_layers=layers, **{**sizes, **changes})
    return transformers.LlamaForCausalLM(config).eval()


def quantized(dense: nn.Module, **options) -> nn.Module:
    """A copy, quantized with a start adapter that does something."""
    model = copy.deepcopy(dense)
    lk.quantize_model(model, lk.QuantConfig(**{"rank": 3, "num_iter": 1, "lora_alpha": 6, **options}))
    return model.eval()


def trained(model: nn.Module, seed: int = 5) -> nn.Module:
    """A copy after a step with made-up gradients, of everything that is trained."""
    model = copy.deepcopy(model)
    for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(gaussian(*parameter.shape, seed=seed + i), alpha=0.05)
    return model


def with_weights(dense: nn.Module, model: nn.Module, *, start: bool) -> nn.Module:
    """The dense twin with a quantized model's weights: with its adapters or without."""
    twin = copy.deepcopy(dense)
    for name, layer in quantized_layers(model).items():
        weight = layer.dense_weight() if start else layer.dequantize()
        own = twin.get_submodule(name).weight.data
        own.copy_(weight.T if type(twin.get_submodule(name)).__name__ == "Conv1D" else weight)
    return twin


def logits(model: nn.Module, tokens=TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


def equal(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def differ(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() > 1e-3


def in_peft(base: nn.Module, folder: Path) -> nn.Module:
    """PEFT's model of an adapter folder, which it must find every tensor of."""
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    own = {name for name in model.state_dict() if "lora_" in name}
    assert {name.replace(".default", "") for name in own} == {k for k in load_file(folder / TENSORS) if "lora_" in k}
    return model


def by_peft(base: nn.Module, folder: Path, **options) -> nn.Module:
    """A model with an adapter that PEFT has made, of random values, and saved."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options})
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            parameter.data = gaussian(*parameter.shape, seed=30 + i) * 0.1
    model.save_pretrained(str(folder))
    return model


class TestSavedHere:
    """Trained here, loaded by PEFT."""

    def test_on_the_dequantized_base(self, tmp_path):
        dense = tiny_llama()
        model = trained(quantized(dense))
        lk.save_adapter(model, tmp_path)
        equal(logits(in_peft(with_weights(dense, model, start=False), tmp_path)), logits(model))
        config = json.loads((tmp_path / CONFIG).read_text())
        assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM" and config["r"] == 3
        assert config["lora_alpha"] == 6 and config["rank_pattern"] == config["alpha_pattern"] == {}
        assert sorted(config["target_modules"]) == sorted(
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        )

    @pytest.mark.parametrize("kind", ["model", "adapter", "checkpoint", "state"])
    def test_the_difference_to_its_start(self, tmp_path, kind):
        """On any base of the original weights: W + (T - S); and here on Q + S."""
        dense = tiny_llama()
        start = quantized(dense)
        model, where = trained(start), tmp_path / "start"
        if kind == "model":
            where = start
        elif kind == "adapter":
            lk.save_adapter(start, where)
        elif kind == "checkpoint":
            lk.save_quantized(start, where)
        else:
            where.mkdir()
            save_file({k: v.contiguous().clone() for k, v in start.state_dict().items()}, where / "model.safetensors")
        lk.save_adapter(model, tmp_path / "tuned", start=where)
        assert json.loads((tmp_path / "tuned" / CONFIG).read_text())["r"] == 6
        expected = with_weights(dense, model, start=True)
        for name, layer in quantized_layers(start).items():
            own = expected.get_submodule(name).weight.data
            own += dense.get_submodule(name).weight.data - layer.dense_weight()
        equal(logits(in_peft(dense, tmp_path / "tuned")), logits(expected))
        lk.load_adapter(start, tmp_path / "tuned", name="tuned")
        lk.set_adapter(start, "tuned")
        equal(logits(start), logits(model))

    def test_as_peft_subtracts(self, tmp_path):
        """The files are what PEFT makes of the two adapters with path_initial_model_for_weight_conversion."""
        dense = tiny_llama()
        start = quantized(dense)
        model = trained(start)
        for folder, one in (("start", start), ("trained", model)):
            lk.save_adapter(one, tmp_path / folder)
        lk.save_adapter(model, tmp_path / "mine", start=tmp_path / "start")
        config = json.loads((tmp_path / "trained" / CONFIG).read_text()) | {"init_lora_weights": "olora"}
        theirs = in_peft(with_weights(dense, start, start=False), tmp_path / "trained")
        theirs.peft_config["default"].init_lora_weights = config["init_lora_weights"]
        theirs.save_pretrained(
            str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
        mine, own = (load_file(tmp_path / which / TENSORS) for which in ("mine", "theirs"))
        assert mine.keys() == own.keys()
        scaled = json.loads((tmp_path / "theirs" / CONFIG).read_text())
        for key in mine:
            if "lora_A" in key:
                assert torch.equal(mine[key], own[key])
                other = key.replace("lora_A", "lora_B")
                scale = scaled["lora_alpha"] / scaled["r"]
                torch.testing.assert_close(mine[other] @ mine[key], scale * own[other] @ own[key])

    def test_conv1d_of_gpt2(self, tmp_path):
        """PEFT notices by the layer's class which way round its weight is."""
        dense = tiny_gpt2()
        model = trained(quantized(dense))
        lk.save_adapter(model, tmp_path)
        with pytest.warns(UserWarning, match="fan_in_fan_out is set to False but the target module is `Conv1D`"):
            theirs = in_peft(with_weights(dense, model, start=False), tmp_path)
        equal(logits(theirs), logits(model))

    def test_qalora_over_columns(self, tmp_path):
        dense = tiny_llama()
        start = quantized(dense, adapter="qalora", format="int4", group_size=32)
        model = trained(start)
        lk.save_adapter(model, tmp_path / "own")
        equal(logits(in_peft(with_weights(dense, model, start=False), tmp_path / "own")), logits(model))
        lk.save_adapter(model, tmp_path / "difference", start=start)
        lk.load_adapter(start, tmp_path / "difference", name="tuned")
        lk.set_adapter(start, "tuned")
        equal(logits(start), logits(model))
        lk.set_adapter(start, None)
        lk.load_adapter(start, tmp_path / "own", name=None)
        equal(logits(start), logits(model))

    def test_layers_differ(self, tmp_path):
        """Ranks and scalings of their own, and names that end alike, of which some are dense."""
        dense = tiny_llama()
        overrides = {"*layers.0.self_attn.q_proj": {"rank": 5, "lora_alpha": 5}, "*.o_proj": {"lora_alpha": 1.5}}
        model = trained(quantized(dense, overrides={**overrides, "*layers.1.mlp.*": "dense"}))
        lk.save_adapter(model, tmp_path)
        equal(logits(in_peft(with_weights(dense, model, start=False), tmp_path)), logits(model))
        config = json.loads((tmp_path / CONFIG).read_text())
        assert isinstance(config["target_modules"], str)
        assert list(config["rank_pattern"].values()) == [5] and len(config["alpha_pattern"]) == 3
        lk.load_adapter(model, tmp_path, name="same")
        before = logits(model)
        lk.set_adapter(model, "same")
        equal(logits(model), before)

    def test_embeddings(self, tmp_path):
        dense = tiny_llama(tie_word_embeddings=False)
        model = trained(quantized(dense, layer_types=("linear", "embedding")))
        lk.save_adapter(model, tmp_path / "own")
        theirs = in_peft(with_weights(dense, model, start=False), tmp_path / "own")
        equal(logits(theirs), logits(model))
        theirs.save_pretrained(str(tmp_path / "again"))  # it adds its copy of the table
        start = with_weights(dense, model, start=False)
        on_top = quantized(dense, layer_types=("linear", "embedding"))
        base = with_weights(dense, on_top, start=True)
        lk.load_adapter(on_top, tmp_path / "again", name="again")
        lk.set_adapter(on_top, "again")
        equal(logits(on_top), logits(in_peft(base, tmp_path / "own")))
        assert start is not None

    def test_convolutions(self, tmp_path):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.one = nn.Conv1d(4, 8, 3, stride=2, padding=1)
                self.two = nn.Conv2d(1, 6, (3, 2))

            def forward(self, x):
                return self.two(self.one(x).unsqueeze(1))

        torch.manual_seed(0)
        dense, x = Model(), gaussian(2, 4, 12)
        model = trained(quantized(dense, layer_types=("conv",)))
        lk.save_adapter(model, tmp_path)
        theirs = in_peft(with_weights(dense, model, start=False), tmp_path)
        with torch.no_grad():
            equal(theirs(x), model(x))
        lk.load_adapter(model, tmp_path, name="same")
        lk.set_adapter(model, "same")
        with torch.no_grad():
            equal(theirs(x), model(x))

    def test_other_convolutions_are_refused(self, tmp_path):
        model = quantized(nn.Sequential(nn.Conv1d(4, 8, 3, dilation=2)), layer_types=("conv",))
        with pytest.raises(ValueError, match="layer '0': PEFT's adapters of convolutions with groups, dilation"):
            lk.save_adapter(model, tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_modules_that_are_trained_in_full(self, tmp_path):
        dense = tiny_llama()
        options = {"modules_to_save": ("lm_head", "model.norm")}
        start = quantized(dense, **options)
        model = trained(start)
        differ(model.lm_head.weight, start.lm_head.weight)
        lk.save_adapter(model, tmp_path)
        assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == ["model.norm", "lm_head"]
        assert f"{PREFIX}lm_head.weight" in load_file(tmp_path / TENSORS)
        equal(logits(in_peft(with_weights(dense, model, start=False), tmp_path)), logits(model))
        with pytest.raises(ValueError, match="also holds the module '.*', trained in full, of which the model has one"):
            lk.load_adapter(start, tmp_path, name="tuned")
        lk.load_adapter(start, tmp_path, name=None)
        equal(logits(start), logits(model))
        assert start.lm_head.weight.requires_grad and all(p.requires_grad for p in adapter_parameters(start).values())

    def test_a_classifier(self, tmp_path):
        """PEFT wraps heads that it knows by name; the file has what it looks for."""
        config = tiny_llama().config
        config.num_labels, config.pad_token_id = 3, 0
        dense = transformers.LlamaForSequenceClassification(config).eval()
        model = trained(quantized(dense, modules_to_save=("score",)))
        lk.save_adapter(model, tmp_path)
        equal(logits(in_peft(with_weights(dense, model, start=False), tmp_path)), logits(model))

    def test_a_user_adapter_back_out(self, tmp_path):
        dense = tiny_llama()
        model = quantized(dense)
        by_peft(dense, tmp_path / "user", r=4, lora_alpha=3, rank_pattern={"layers.1.self_attn.q_proj": 7})
        lk.load_adapter(model, tmp_path / "user", name="user")
        lk.save_adapter(model, tmp_path / "again", name="user")
        one, two = (load_file(tmp_path / which / TENSORS) for which in ("user", "again"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
        base = with_weights(dense, model, start=True)
        equal(logits(in_peft(base, tmp_path / "again")), logits(in_peft(base, tmp_path / "user")))
        lk.save_adapter(trained(model), tmp_path / "own")
        lk.load_adapter(model, tmp_path / "own", name="own")
        lk.save_adapter(model, tmp_path / "own again", name="own")
        with pytest.raises(ValueError, match="adapter that stands on other packed weights"):
            lk.load_adapter(quantized(tiny_llama(seed=3)), tmp_path / "own again", name="own")


class TestLoadedHere:
    """Trained by PEFT, loaded here."""

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"use_rslora": True, "lora_alpha": 3},
            {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6}, "alpha_pattern": {"^model.layers.0.*": 5}},
            {"target_modules": r".*layers\.1\..*\.(up|down)_proj"},
            {"target_modules": ["k_proj", "down_proj"], "layers_to_transform": [1]},
            {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
            {"init_lora_weights": "gaussian", "lora_dropout": 0.5},
        ],
        ids=["plain", "rslora", "patterns", "regex", "layers", "all-linear", "gaussian"],
    )
    def test_on_top_of_the_start(self, tmp_path, options):
        dense = tiny_llama()
        model = quantized(dense)
        base = with_weights(dense, model, start=True)
        theirs = by_peft(base, tmp_path, **options)
        before = logits(model)
        lk.load_adapter(model, tmp_path, name="theirs")
        assert torch.equal(logits(model), before)  # not active yet
        lk.set_adapter(model, "theirs")
        equal(logits(model), logits(theirs))
        differ(logits(model), before)

    def test_two_at_once(self, tmp_path):
        dense = tiny_llama()
        model = quantized(dense)
        base = with_weights(dense, model, start=True)
        by_peft(base, tmp_path / "a")
        by_peft(base, tmp_path / "b", r=2, target_modules=["up_proj", "v_proj"])
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a"), adapter_name="a")
        theirs.load_adapter(str(tmp_path / "b"), adapter_name="b")
        for name in "ab":
            lk.load_adapter(model, tmp_path / name, name=name)
        theirs.base_model.set_adapter(["a", "b"])
        lk.set_adapter(model, ["a", "b"])
        equal(logits(model), logits(theirs.eval()))
        with torch.no_grad(), lk.use_adapters(model, ["b", None]):
            rows = model(TOKENS).logits
        theirs.set_adapter("b")
        equal(rows[0], logits(theirs)[0])
        equal(rows[1], logits(base)[1])

    def test_conv1d_of_gpt2(self, tmp_path):
        dense = tiny_gpt2()
        model = quantized(dense)
        base = with_weights(dense, model, start=True)
        theirs = by_peft(base, tmp_path, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
        lk.load_adapter(model, tmp_path, name="theirs")
        lk.set_adapter(model, "theirs")
        equal(logits(model), logits(theirs))

    def test_half_precision_values_stay(self, tmp_path):
        dense = tiny_llama()
        model = quantized(dense)
        by_peft(dense, tmp_path)
        halves = {key: tensor.half() for key, tensor in load_file(tmp_path / TENSORS).items()}
        save_file(halves, tmp_path / TENSORS)
        lk.load_adapter(model, tmp_path, name="a")
        factors = model.model.layers[0].self_attn.q_proj.slots.loaded["a"].factors
        key = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
        assert factors.lora_A.dtype == torch.float16 and torch.equal(factors.lora_A, halves[key])

    def test_a_layer_with_two_names(self, tmp_path):
        """Its adapter may be saved under the one that is not the first."""

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.one = nn.Linear(64, 64)
                self.two = self.one

            def forward(self, x):
                return self.two(torch.relu(self.one(x)))

        model, x = Model(), gaussian(2, 64)
        lk.quantize_model(model, lk.QuantConfig(rank=3, num_iter=1))
        lk.save_adapter(model, tmp_path)
        retensor(tmp_path, lambda t: [t.update({k.replace("one", "two"): t.pop(k)}) for k in list(t)])
        rewrite(tmp_path, lambda values: values.update(target_modules=["two"]))
        rewrite(tmp_path, lambda values: values.update(lora_alpha=6))
        lk.load_adapter(model, tmp_path, name="twice")
        lk.set_adapter(model, "twice")
        expected = nn.Linear(64, 64)
        expected.weight.data = model.one.dequantize() + 3 * model.one.lora_B.data @ model.one.lora_A.data
        expected.bias.data = model.one.bias.data
        with torch.no_grad():
            equal(model(x), expected(torch.relu(expected(x))))

    def test_loaded_in_inference_mode(self, tmp_path):
        """As a server does: the factors count their writes all the same, and what is made of them is kept."""
        model = quantized(tiny_llama())
        by_peft(tiny_llama(), tmp_path)
        with torch.inference_mode():
            lk.load_adapter(model, tmp_path, name="a")
            lk.set_adapter(model, "a")
        slots = model.model.layers[0].self_attn.q_proj.slots
        assert not slots.live.lora_A.is_inference() and not slots.loaded["a"].factors.lora_B.is_inference()

    def test_hot_swap(self, tmp_path):
        dense = tiny_llama()
        model = quantized(dense)
        base = with_weights(dense, model, start=True)
        by_peft(base, tmp_path / "one")
        two = by_peft(base, tmp_path / "two", r=2, target_modules=["q_proj", "o_proj"])
        lk.load_adapter(model, tmp_path / "one", name="user")
        lk.set_adapter(model, "user")
        lk.load_adapter(model, tmp_path / "two", name="user")
        equal(logits(model), logits(two))
        assert active_adapters(model) == ("user",) and loaded_adapters(model) == {"user": False}


def rewrite(folder: Path, change) -> None:
    values = json.loads((folder / CONFIG).read_text())
    change(values)
    (folder / CONFIG).write_text(json.dumps(values))


def retensor(folder: Path, change) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


class TestRefused:
    """Each with its sentence, and the model as it was."""

    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        by_peft(tiny_llama(), tmp_path)
        return tmp_path

    @staticmethod
    def check(folder: Path, message: str, *, model: nn.Module | None = None, error=ValueError, name: str | None = "x"):
        model = quantized(tiny_llama()) if model is None else model
        before = parameters_of(model)
        with pytest.raises(error, match=message):
            lk.load_adapter(model, folder, name=name)
        assert not loaded_adapters(model)
        assert all(torch.equal(tensor, before[key]) for key, tensor in parameters_of(model).items())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"peft_type": "IA3"}, "peft_type is 'IA3'; of PEFT's adapters, LORA can"),
            ({"peft_type": None}, "peft_type is None"),
            ({"use_dora": True}, "use_dora=True: DoRA also scales the rows of the base: load it with PEFT"),
            ({"lora_bias": True}, "lora_bias=True: .* train it with lora_bias=False"),
            ({"bias": "all"}, "bias='all': biases of the base were trained, too"),
            ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' has changed the base"),
            ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
            ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq' has changed the base"),
            ({"use_qalora": True}, "use_qalora=True"),
            ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
            ({"layer_replication": [[0, 2]]}, "layer_replication"),
            ({"arrow_config": {"top_k": 3}}, "arrow_config=.* is an option that is not known here"),
            ({"r": 0}, "r=0 must be an integer >= 1"),
            ({"r": "4"}, "r='4' must be an integer"),
            ({"r": 5}, r"has shape \[4, 64\], layer '.*' with rank 5 \(by adapter_config.json\) needs \[5, 64\]"),
            ({"lora_alpha": "8"}, "lora_alpha='8' must be a finite number"),
            ({"rank_pattern": {"q_proj": 3}}, "needs .3, 64"),
            ({"rank_pattern": [3]}, r"rank_pattern=\[3\] must map layers to numbers"),
            ({"rank_pattern": {"(": 3}}, "unterminated subpattern"),
            ({"target_modules": 3}, "target_modules=3 must be a list of names"),
            (
                {"target_modules": ["q_proj", "v_proj", "k_proj"]},
                "no tensors for layer 'model.layers.0.self_attn.k_proj'",
            ),
        ],
    )
    def test_configs(self, folder, change, message):
        rewrite(folder, lambda values: values.update(change))
        self.check(folder, message)

    def test_damaged_json(self, folder):
        text = (folder / CONFIG).read_text()
        (folder / CONFIG).write_text(text[: len(text) // 2])
        self.check(folder, f"{re.escape(str(folder / CONFIG))}: this is not JSON")
        (folder / CONFIG).write_text("[1]")
        self.check(folder, "expected an object, got list")
        (folder / CONFIG).write_bytes(b"\xff\xfe{}")
        self.check(folder, "adapter_config.json: ")
        (folder / CONFIG).unlink()
        self.check(folder, "adapter_config.json does not exist: .* holds no adapter of PEFT", error=FileNotFoundError)

    def test_damaged_tensors(self, folder):
        content = (folder / TENSORS).read_bytes()
        for damaged in (content[: len(content) // 2], content[:5], b"", b"\xff" * 64):
            (folder / TENSORS).write_bytes(damaged)
            self.check(folder, "is not a readable safetensors file")

    def test_a_header_that_asks_for_memory(self, folder):
        """Nothing is allocated for sizes that the file does not have."""
        header = {f"{Q}.lora_A.weight": {"dtype": "F32", "shape": [1 << 40, 64], "data_offsets": [0, 1 << 48]}}
        text = json.dumps(header).encode()
        (folder / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
        self.check(folder, "is not a readable safetensors file")

    def test_pickles(self, folder):
        (folder / TENSORS).rename(folder / "adapter_model.bin")
        self.check(folder, "adapter_model.bin is a pickle, which can run any code .* load it in PEFT")
        (folder / "adapter_model.bin").unlink()
        self.check(folder, "adapter_model.safetensors does not exist", error=FileNotFoundError)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda t: t.pop(f"{Q}.lora_B.weight"),
                r"q_proj' is a linear and needs .* the adapter has \('.lora_A.weight'",
            ),
            (
                lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 32)}),
                r"has shape \[4, 32\], .* needs \[4, 64\]",
            ),
            (
                lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(64, 3)}),
                r"has shape \[64, 3\], .* needs \[64, 4\]",
            ),
            (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 64).int()}), "is I32, not one of"),
            (lambda t: t[f"{Q}.lora_A.weight"].fill_(float("nan")), "lora_A.weight' holds NaN or Inf"),
            (lambda t: t.update({"x.lora_A.weight": torch.zeros(1)}), "'x.lora_A.weight' is none of PEFT's"),
            (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.zeros(64)}), "magnitude_vector' is no lora_A"),
            (lambda t: t.update({f"{PREFIX}lm_head.weight": torch.zeros(1)}), "lm_head.weight' is no lora_A or lora_B"),
            (
                lambda t: t.update({f"{PREFIX}model.norm.lora_A.weight": t.pop(f"{Q}.lora_A.weight")}),
                r"layer 'model.norm' is dense here \(LlamaRMSNorm\), and user adapters stand on quantized layers",
            ),
            (lambda t: t.clear(), "holds no lora_A and lora_B"),
        ],
    )
    def test_tensors(self, folder, change, message):
        retensor(folder, change)
        self.check(folder, message)

    def test_another_model(self, folder):
        self.check(folder, r"lora_A.weight' has shape \[4, 64\]", model=quantized(tiny_llama(hidden_size=32)))
        self.check(folder, "no tensors for layer 'model.layers.2", model=quantized(tiny_llama(layers=3)))
        self.check(folder, "has no layer 'model.layers.1.*, which the adapter", model=quantized(tiny_llama(layers=1)))
        self.check(folder, "TinyModel has no layer 'model.layers.0", model=quantized(tiny_model()))

    def test_models_with_and_without_a_head(self, folder, tmp_path):
        self.check(folder, r"with 'model' around this model.*\(AutoModelFor...\)", model=quantized(tiny_llama()).model)
        by_peft(tiny_llama().model, tmp_path / "inner")
        self.check(tmp_path / "inner", "on what is 'model' here .* load it into model.model")
        inner = quantized(tiny_llama())
        lk.load_adapter(inner.model, tmp_path / "inner", name="inner")

    def test_dense_layers(self, folder):
        model = quantized(tiny_llama(), exclude=("*q_proj",))
        self.check(folder, r"'model.layers.0.self_attn.q_proj' is dense here \(Linear\)", model=model)

    def test_offloaded_models(self, folder):
        model = quantized(tiny_llama())
        model.model.layers[0].self_attn.q_proj.to("meta")
        with pytest.raises(ValueError, match="q_proj' is on the meta device, offloaded or not loaded"):
            lk.load_adapter(model, folder, name="x")

    def test_models_that_have_no_adapters_of_ours(self, folder):
        with pytest.raises(ValueError, match="LlamaForCausalLM has no quantized layer: call quantize_model"):
            lk.load_adapter(tiny_llama(), folder, name="x")
        wrapped = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
        for call in (lambda: lk.load_adapter(wrapped, folder, name="x"), lambda: lk.save_adapter(wrapped, folder)):
            with pytest.raises(ValueError, match="adapters of PEFT: save and load them with PEFT"):
                call()

    @pytest.mark.parametrize("name", ["", 3])
    def test_names(self, folder, name):
        self.check(folder, "must be a name, or None", name=name)

    def test_without_a_name(self, folder, tmp_path):
        """What goes into the model's own adapters must be such an adapter, of the same ranks and layers."""
        self.check(folder, "stands on top of the start adapters: load it under a name", name=None)
        dense = tiny_llama()
        lk.save_adapter(quantized(dense), tmp_path / "own")
        self.check(tmp_path / "own", "has rank 2, the file's adapter 3", model=quantized(dense, rank=2), name=None)
        self.check(tmp_path / "own", "other packed weights", model=quantized(dense, num_iter=5), name=None)
        fewer = quantized(dense)
        layer = fewer.model.layers[1].mlp.up_proj
        layer.lora_A = layer.lora_B = layer.rank = None
        self.check(tmp_path / "own", "'.*1.mlp.up_proj' has an adapter in the file alone", model=fewer, name=None)
        lk.save_adapter(fewer, tmp_path / "fewer")
        for name in (None, "x"):
            self.check(tmp_path / "fewer", "'.*1.mlp.up_proj' has an adapter in the model alone", name=name)

    def test_other_packed_weights(self, tmp_path):
        lk.save_adapter(quantized(tiny_llama()), tmp_path)
        self.check(
            tmp_path, "stands on other packed weights: save it from its own", model=quantized(tiny_llama(seed=1))
        )

    @pytest.mark.parametrize("metadata", ["{", "[]", '{"version": 2}', '{"version": 1, "relative_to": "moon"}'])
    def test_damaged_metadata(self, folder, metadata):
        save_file(load_file(folder / TENSORS), folder / TENSORS, {"loftq_kernels": metadata})
        self.check(folder, "metadata 'loftq_kernels' of the tensor file is damaged")


class TestNotSaved:
    def test_refusals(self, tmp_path):
        dense = tiny_llama()
        model = quantized(dense)
        target = tmp_path / "new"

        def check(message, which=model, error=ValueError, **options):
            with pytest.raises(error, match=message):
                lk.save_adapter(which, target, **options)
            assert not target.exists()

        check("no adapter 'x' is loaded", name="x")
        check("start= belongs to the model's own adapter", name="x", start=model)
        check("no layer has an adapter of its own", quantized(dense, rank=None, lora_alpha=None))
        check("other packed weights than the model", start=quantized(tiny_llama(seed=1)))
        check("holds neither an adapter nor a quantized model", start=tmp_path, error=FileNotFoundError)
        lk.save_quantized(quantized(tiny_llama(seed=1)), tmp_path / "other")
        check("other packed weights than the model", start=tmp_path / "other")
        lk.save_adapter(quantized(tiny_llama(seed=1)), tmp_path / "other adapter")
        check("other packed weights than the model", start=tmp_path / "other adapter")
        biased = quantized(tiny_llama(attention_bias=True))
        biased.model.layers[0].self_attn.q_proj.bias.requires_grad_()
        check("the bias of the quantized layer 'model.layers.0.self_attn.q_proj' is trained", biased)
        named = quantized(nn.ModuleDict({"head": nn.LayerNorm(8), "inner": nn.ModuleDict({"head": nn.Linear(64, 64)})}))
        named["head"].requires_grad_(True)
        check("the trained module 'head' cannot be named in modules_to_save, .* for 'inner.head', too", named)
        layer = quantized_layers(model)["model.layers.1.mlp.up_proj"]
        layer.disable_adapter()
        check("the adapter of layer 'model.layers.1.mlp.up_proj' is disabled")

    def test_nothing_of_peft_is_needed(self):
        import subprocess
        import sys

        code = (
            "import sys, loftq_kernels as lk; lk.load_adapter, lk.save_adapter;"
            "assert not {'peft', 'transformers'} & sys.modules.keys()"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
