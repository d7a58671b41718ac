"""Every architecture at home in transformers: saved, loaded, trained by Trainer, its adapter saved and loaded."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import hf_models
import pytest
import torch
from helpers import parameters_of
from hf_models import ARCHITECTURES, logits
from torch import Tensor, nn

import loftq_kernels as lk

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SHARD = "20KB"


@pytest.fixture(autouse=True)
def _quiet():
    with hf_models.quiet():
        yield


def outputs(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return logits(model.eval()(**hf_models.inputs(name)))


def saved(model: nn.Module, folder: Path, **options) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def assert_same_tensors(model: nn.Module, other: nn.Module) -> None:
    """Bit for bit, dtypes and which are trained included."""
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name
    trained = [[name for name, own in m.named_parameters() if own.requires_grad] for m in (model, other)]
    assert trained[0] == trained[1]
    classes = [{name: type(own) for name, own in m.named_parameters()} for m in (model, other)]
    assert classes[0] == classes[1]


def train_one_step(model: nn.Module, name: str, folder: Path) -> None:
    data = [
        {key: value[i] for key, value in hf_models.inputs(name).items() if isinstance(value, Tensor)} for i in (0, 1)
    ]
    args = transformers.TrainingArguments(
        str(folder),
        **{"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no"},
        **{"report_to": [], "use_cpu": True, "disable_tqdm": True, "optim": "sgd", "max_grad_norm": 0.0},
        remove_unused_columns=False,
    )

    def collate(examples):
        batch = {key: torch.stack([one[key] for one in examples]) for key in examples[0]}
        return {**batch, **ARCHITECTURES[name].loss}

    transformers.Trainer(model, args, train_dataset=data, data_collator=collate).train()


@pytest.mark.parametrize("name", hf_models.NAMES)
def test_architectures(name, tmp_path):
    """quantize -> save_pretrained -> from_pretrained -> one step of Trainer -> save_adapter -> load_adapter."""
    model = copy.deepcopy(hf_models.quantized(name)[0])
    folder = saved(model, tmp_path / "model", max_shard_size=SHARD)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "loftq"
    cls = type(model)
    loaded = cls.from_pretrained(folder)
    assert_same_tensors(model, loaded)
    before = outputs(loaded, name)
    assert torch.equal(before, outputs(model, name))

    start = parameters_of(loaded)
    train_one_step(loaded, name, tmp_path / "trainer")
    moved = {key for key, value in parameters_of(loaded).items() if not torch.equal(value, start[key])}
    assert moved and all(".lora_" in key for key in moved)
    after = outputs(loaded, name)
    assert not torch.equal(before, after)

    lk.save_adapter(loaded, tmp_path / "adapter")
    again = cls.from_pretrained(folder)
    lk.load_adapter(again, tmp_path / "adapter", name="tuned")
    assert torch.equal(outputs(again, name), before), "it is not active yet"
    lk.set_adapter(again, "tuned")
    assert torch.equal(outputs(again, name), after)
    lk.delete_adapter(again, "tuned")
    lk.load_adapter(again, tmp_path / "adapter", name=None)
    assert_same_tensors(again, loaded)


@pytest.mark.parametrize("name", hf_models.NAMES)
def test_quantized_while_loading(name, tmp_path):
    """from_pretrained(quantization_config=) of a dense folder is quantize_model of the dense model, head and all."""
    options = {"format": "nf2", "layer_types": ("linear", "conv", "embedding"), "quantize_head": True}
    dense = hf_models.dense_model(name)
    dense.save_pretrained(tmp_path / "dense", max_shard_size=SHARD)
    report = lk.quantize_model(dense, hf_models.adapter_config(**options), progress=False)
    asked = lk.LoftqConfig(**hf_models.OPTIONS, **options)
    loaded = type(dense).from_pretrained(tmp_path / "dense", quantization_config=asked)
    assert_same_tensors(dense, loaded)
    assert torch.equal(outputs(dense, name), outputs(loaded, name))
    reported = loaded.hf_quantizer.report
    assert [layer.name for layer in reported.layers] == [layer.name for layer in report.layers]
    assert reported.skipped == report.skipped and reported.model_bytes == report.model_bytes
    again = type(dense).from_pretrained(saved(loaded, tmp_path / "quantized"))
    assert_same_tensors(loaded, again)
    assert torch.equal(outputs(loaded, name), outputs(again, name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return saved(copy.deepcopy(hf_models.quantized("llama")[0]), tmp_path_factory.mktemp("llama"), max_shard_size=SHARD)


def causal(folder: Path, **options) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


ON_DISK = {"model.layers.1": "disk", "lm_head": "disk"}
ON_CPU = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": "auto", "max_memory": {"cpu": 60_000}},
        {"device_map": {"": "disk"}},
        {"device_map": {**ON_CPU, **ON_DISK}},
        {"low_cpu_mem_usage": True},
    ],
    ids=str,
)
def test_device_maps(options, folder, tmp_path):
    """Wherever the layers lie; what is offloaded is saved again as it was."""
    expected = outputs(hf_models.quantized("llama")[0], "llama")
    loaded = causal(folder, offload_folder=tmp_path / "offload", **options)
    assert torch.equal(outputs(loaded, "llama"), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(causal(tmp_path / "again"), "llama"), expected)


def test_accelerate_offloads(folder, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    expected = outputs(hf_models.quantized("llama")[0], "llama")
    for offload in (accelerate.cpu_offload, lambda m: accelerate.disk_offload(m, tmp_path, execution_device="cpu")):
        loaded = causal(folder)
        offload(loaded)
        assert torch.equal(outputs(loaded, "llama"), expected)


HALF = [("llama", torch.bfloat16), ("gemma3", torch.float16), ("t5", torch.bfloat16), ("whisper", torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), HALF, ids=str)
def test_half_precision(name, dtype, tmp_path):
    """A model of 16 bits, and one of float32 that is loaded in 16 bits: scales and adapters keep their dtypes."""
    hf_models.dense_model(name).save_pretrained(tmp_path / "dense")
    cls = hf_models.model_class(name)
    model = cls.from_pretrained(tmp_path / "dense", dtype=dtype)
    lk.quantize_model(model, hf_models.adapter_config(), progress=False)
    hf_models.fill_adapters(model)
    loaded = cls.from_pretrained(saved(model, tmp_path / "half", max_shard_size=SHARD))
    assert loaded.dtype == dtype
    assert_same_tensors(model, loaded)
    given = {key: own.to(dtype) if own.is_floating_point() else own for key, own in hf_models.inputs(name).items()}
    with torch.no_grad():
        assert torch.equal(logits(loaded(**given)), logits(model.eval()(**given)))
    whole = copy.deepcopy(hf_models.quantized(name)[0])
    cast = cls.from_pretrained(saved(whole, tmp_path / "whole"), dtype=dtype)
    assert cast.dtype == dtype and logits(cast(**given)).dtype == dtype
    for key, layer in hf_models.quantized_layers(cast).items():
        other = whole.get_submodule(key)
        assert layer.dtype == dtype and layer.scale.dtype == other.scale.dtype
        assert torch.equal(layer.codes, other.codes) and torch.equal(layer.scale, other.scale)


CONFIGS = [
    ("gpt2", {"layer_types": ("linear", "conv", "embedding"), "quantize_head": True}),
    ("clip", {"layer_types": ("linear", "conv", "embedding")}),
    ("wav2vec2", {"layer_types": ("linear", "conv")}),
    ("bert", {"modules_to_save": ["classifier"], "format": "nf2"}),
    ("t5", {"adapter": "qalora", "format": "int4"}),
    ("llava", {"rank": None}),
]


@pytest.mark.parametrize(("name", "options"), CONFIGS, ids=str)
def test_other_configs(name, options, tmp_path):
    model = hf_models.dense_model(name)
    lk.quantize_model(model, hf_models.adapter_config(**options), progress=False)
    loaded = type(model).from_pretrained(saved(model, tmp_path))
    assert_same_tensors(model, loaded)
    assert torch.equal(outputs(loaded, name), outputs(model, name))
    assert type(loaded.hf_quantizer.quantization_config.config) is lk.QuantConfig


@pytest.mark.filterwarnings("ignore:.*has no place for:UserWarning")
@pytest.mark.parametrize("name", ["gpt2", "t5", "bert", "mamba", "llava"])
def test_other_classes_read_the_same_folder(name, tmp_path):
    """The base model in the folder of a whole one, and the whole one around a base, which has a head of its own."""
    model = copy.deepcopy(hf_models.quantized(name)[0])
    base = transformers.AutoModel.from_pretrained(saved(model, tmp_path / "whole"))
    assert type(base) is not type(model)
    expected = model.base_model.state_dict()
    around = type(model).from_pretrained(saved(base, tmp_path / "base"))
    for found in (base.state_dict(), around.base_model.state_dict()):
        common = found.keys() & expected.keys()
        assert {key for key in expected if key.endswith(".codes") and "classifier" not in key} <= common
        different = [key for key in common if not torch.equal(found[key], expected[key])]
        assert not [key for key in different if not key.startswith(("lm_head", "classifier"))]


def test_a_classifier_on_a_language_model(folder):
    with_head = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    model = hf_models.quantized("llama")[0]
    with torch.no_grad():
        assert torch.equal(with_head.model(hf_models.TOKENS)[0], model.model(hf_models.TOKENS)[0])


def test_dequantized_after_a_save(tmp_path):
    """transformers keeps the dtype by its name from then on."""
    model = copy.deepcopy(hf_models.quantized("llama")[0])
    expected = outputs(model, "llama")
    saved(model, tmp_path)
    torch.testing.assert_close(outputs(model.dequantize(), "llama"), expected, rtol=1e-4, atol=1e-5)
    assert not hf_models.quantized_layers(model)
