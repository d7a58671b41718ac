"""What docs/huggingface.md says does not work: each call of its table ends with the sentence beside it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hf_models
import pytest
import torch
from documents import REPOSITORY

import loftq_kernels as lk
from loftq_kernels import cli

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("fastapi")

DOCUMENT = (REPOSITORY / "docs" / "huggingface.md").read_text(encoding="utf-8")
TABLE = DOCUMENT.partition("## What does not work")[2]
ROWS = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", TABLE, re.M)[1:])  # after the head
LORA = {"target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Folders of a dense model, quantized ones, and adapters."""
    place = tmp_path_factory.mktemp("place")
    with hf_models.quiet():
        dense = hf_models.dense_model("llama")
        dense.save_pretrained(place / "dense")
        quantized().save_pretrained(place / "quantized", max_shard_size="20KB")
        other = quantized()
        other.model.norm.weight.data += 1
        other.save_pretrained(place / "other", max_shard_size="20KB")
        shutil.copytree(place / "quantized", place / "mixed")
        shutil.copy(next((place / "other").glob("model-00001*")), place / "mixed")
        shutil.copytree(place / "quantized", place / "newer")
        config = json.loads((place / "newer" / "config.json").read_text())
        config["quantization_config"]["loftq_format_version"] += 1
        (place / "newer" / "config.json").write_text(json.dumps(config))
        lk.save_adapter(quantized(format="nf2"), place / "own")
        for name, options in {"dora": {"use_dora": True}, "lora": {}}.items():
            peft.get_peft_model(hf_models.dense_model("llama"), peft.LoraConfig(**LORA, **options)).save_pretrained(
                place / name
            )
        shutil.copytree(place / "lora", place / "pissa")
        config = json.loads((place / "pissa" / "adapter_config.json").read_text())
        (place / "pissa" / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
        shutil.copytree(place / "lora", place / "pickle")
        (place / "pickle" / "adapter_model.safetensors").rename(place / "pickle" / "adapter_model.bin")
        encoder = hf_models.dense_model("bert")
        lk.quantize_model(encoder, hf_models.adapter_config(), progress=False)
        encoder.save_pretrained(place / "encoder")
    return place


def quantized(**options):
    model = hf_models.dense_model("llama")
    lk.quantize_model(model, hf_models.adapter_config(**options), progress=False)
    return model


def load(folder: Path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def adapted(**options):
    return peft.get_peft_model(quantized(), peft.LoraConfig(**{**LORA, **options}))


def in_a_group():
    model = quantized()
    attention = model.model.layers[0].self_attn
    group = lk.QuantLoRALinearGroup([attention.q_proj, attention.k_proj])
    return peft.get_peft_model(model, peft.LoraConfig(**LORA)), group


def train_compiled(place: Path):
    arguments = transformers.TrainingArguments(str(place / "runs"), use_cpu=True)
    return transformers.Trainer(torch.compile(load(place / "quantized"), backend="eager"), arguments, train_dataset=[])


def served(folder: Path, capsys) -> None:
    status = cli.main(["serve", str(folder), "--port", "0"])
    assert status == 2
    raise RuntimeError(capsys.readouterr().err)


# By the table's first column: what is called there. Each raises.
CALLS: dict[str, Callable[[Path], list[Callable]]] = {
    '`LoftqConfig(formt="nf2")`': lambda place: [lambda: lk.LoftqConfig(formt="nf2")],
    '`LoftqConfig(init="eora")` without statistics': lambda place: [
        lambda: load(place / "dense", quantization_config=lk.LoftqConfig(init="eora"))
    ],
    'a dense folder with `device_map={"": "disk"}`': lambda place: [
        lambda: load(place / "dense", quantization_config=lk.LoftqConfig(), device_map={"": "disk"})
    ],
    "our folder with `quantization_config=BitsAndBytesConfig(...)`": lambda place: [
        lambda: load(place / "quantized", quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True))
    ],
    "a folder of a newer format": lambda place: [
        lambda: load(place / "newer"),
        lambda: lk.load_quantized(place / "newer"),
    ],
    "a folder with shards of two saves": lambda place: [
        lambda: load(place / "mixed"),
        lambda: lk.load_quantized(place / "mixed"),
    ],
    "`.half()` of a model that `from_pretrained` made": lambda place: [lambda: load(place / "quantized").half()],
    "`model.requires_grad_(True)`": lambda place: [lambda: quantized().requires_grad_(True)],
    "`model.resize_token_embeddings(n)` with a quantized head": lambda place: [
        lambda: quantized(quantize_head=True).resize_token_embeddings(100)
    ],
    "`Trainer(torch.compile(model), ...)` of such a model": lambda place: [lambda: train_compiled(place)],
    '`LoraConfig(init_lora_weights="pissa")`, olora, corda, lora_ga': lambda place: [
        lambda init=init: adapted(init_lora_weights=init) for init in ("pissa", "olora", "corda", "lora_ga")
    ],
    "`LoraConfig(use_qalora=True)`": lambda place: [lambda: adapted(use_qalora=True)],
    "`modules_to_save` of PEFT with quantized layers in it": lambda place: [lambda: adapted(modules_to_save=["mlp"])],
    "other tuners of PEFT on quantized layers, such as OFT and LoHa": lambda place: [
        lambda tuner=tuner: peft.get_peft_model(quantized(), tuner(**LORA))
        for tuner in (peft.OFTConfig, peft.LoHaConfig)
    ],
    "PEFT on the layers of a `QuantLoRALinearGroup`": lambda place: [in_a_group],
    "`lk.save_adapter` and `lk.load_adapter` of a PeftModel": lambda place: [
        lambda: lk.save_adapter(adapted(), place / "new"),
        lambda: lk.load_adapter(adapted(), place / "lora", name="x"),
    ],
    **{
        f"`lk.load_adapter` of {what}": lambda place, name=name: [
            lambda: lk.load_adapter(quantized(), place / name, name="x")
        ]
        for what, name in (
            ("a DoRA", "dora"),
            ("PiSSA and its like", "pissa"),
            ("a pickle", "pickle"),
            ("another model's own adapter", "own"),
        )
    },
    "`lk.load_adapter` for layers that are dense here": lambda place: [
        lambda: lk.load_adapter(quantized(exclude=("*q_proj",)), place / "lora", name="x")
    ],
    "`lk.use_adapters` of a name that is not loaded": lambda place: [
        lambda: lk.use_adapters(quantized(), ["x"]).__enter__()
    ],
    "`loftq-kernels serve` of an encoder": lambda place: [lambda capsys: served(place / "encoder", capsys)],
    "`loftq-kernels serve` of a folder without a tokenizer": lambda place: [
        lambda capsys: served(place / "quantized", capsys)
    ],
}


def test_every_row_has_a_call():
    assert ROWS.keys() == CALLS.keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ROWS)
def test_what_does_not_work(row, place, capsys):
    for call in CALLS[row](place):
        given = {"capsys": capsys} if "capsys" in call.__code__.co_varnames else {}
        with hf_models.quiet(), pytest.raises((ValueError, RuntimeError, TypeError)) as raised:
            call(**given)
        assert ROWS[row] in str(raised.value)


def test_a_process_that_does_not_import_us(place):
    """transformers warns, and the layers are dense and random."""
    code = (
        f"import transformers; model = transformers.AutoModelForCausalLM.from_pretrained({str(place / 'quantized')!r});"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Unknown quantization type" in DOCUMENT and "Unknown quantization type, got loftq" in done.stderr
    assert done.stdout == "Linear\n"


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_the_config_alone_is_dense(place):
    config = load(place / "quantized").config
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert not hf_models.quantized_layers(model)
