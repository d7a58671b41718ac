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
    assert trained[0] == trained[1] and trained[0]
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
