"""transformers' Trainer on quantized models: training, resuming, the best model, adapters alone on disk."""

from __future__ import annotations

import contextlib
import copy
import math
from pathlib import Path

import hf_models
import pytest
import torch
from helpers import load_file, parameters_of
from torch import nn

import loftq_kernels as lk

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SEQUENCES = torch.randint(3, 90, (16, 9), generator=torch.Generator().manual_seed(1))
DATA = [{"input_ids": one, "labels": one} for one in SEQUENCES]
FEW = DATA[:4]


@pytest.fixture(autouse=True)
def _quiet():
    with hf_models.quiet():
        yield


def quantized_model(dtype: torch.dtype = torch.float32, layers: int = 2, **options) -> nn.Module:
    """With dropout, so that a run depends on the state of the random numbers."""
    model = hf_models.dense_model("llama", num_hidden_layers=layers).to(dtype)
    model.config.attention_dropout = 0.1
    lk.quantize_model(model, hf_models.adapter_config(**options), progress=False)
    return model


def trainer_of(model: nn.Module, folder: Path, data=DATA, *, callbacks=(), **options):
    arguments = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no"}
    arguments |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "seed": 1}
    more = {key: options.pop(key) for key in ("eval_dataset", "compute_metrics", "data_collator") if key in options}
    args = transformers.TrainingArguments(str(folder), **{**arguments, **options})
    return transformers.Trainer(model, args, train_dataset=data, callbacks=list(callbacks), **more)


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: own.detach().clone() for name, own in model.named_parameters() if own.requires_grad}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and [name for name in one if not torch.equal(one[name], other[name])] == []


def test_trains_adapters_alone(tmp_path):
    model = quantized_model(modules_to_save=["norm"])
    before = parameters_of(model)
    trainer = trainer_of(model, tmp_path, FEW, max_steps=40, per_device_train_batch_size=4, learning_rate=2e-2)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 1
    moved = {name for name, value in parameters_of(model).items() if not torch.equal(value, before[name])}
    assert moved == trained_parameters(model).keys() and "model.norm.weight" in moved


@pytest.mark.parametrize("context", [contextlib.nullcontext, lk.exclude_frozen_parameters])
def test_resumes_where_it_was(context, tmp_path, caplog):
    """Bit for bit what an uninterrupted run gives, also from checkpoints without frozen parameters."""
    model = quantized_model()
    with context(model):
        trainer_of(model, tmp_path, save_strategy="steps", save_steps=3).train()
    again = quantized_model()
    transformers.logging.set_verbosity_warning()
    with context(again):
        trainer_of(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(parameters_of(model), parameters_of(again))
    assert "missing keys" not in caplog.text and "unexpected keys" not in caplog.text


class Kept(transformers.TrainerCallback):
    """The trained parameters after every step."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = trained_parameters(model)


@pytest.mark.parametrize("context", [contextlib.nullcontext, lk.exclude_frozen_parameters])
def test_keeps_the_best(context, tmp_path):
    """The second of four checkpoints is the best, and stays."""
    model, kept, scores = quantized_model(), Kept(), iter([1.0, 3.0, 2.0, 0.0])
    trainer = trainer_of(
        model,
        tmp_path,
        max_steps=4,
        callbacks=[kept],
        eval_dataset=FEW,
        compute_metrics=lambda _: {"score": next(scores)},
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
        **{"save_total_limit": 1, "load_best_model_at_end": True, "metric_for_best_model": "score"},
    )
    frozen = parameters_of(model)
    with context(model):
        trainer.train()
    assert_same(trained_parameters(model), kept.after[2])
    assert_same({**parameters_of(model), **kept.after[4]}, {**frozen, **kept.after[4]})
    left = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert "checkpoint-2" in left and left <= {"checkpoint-2", "checkpoint-4"}


def test_checkpoints_without_frozen_parameters(tmp_path):
    model = quantized_model(modules_to_save=["norm"], lora_alpha=8)
    trained = trained_parameters(model)
    with lk.exclude_frozen_parameters(model):
        trainer_of(model, tmp_path, max_steps=1, save_strategy="steps").train()
    stored = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert {key for key in stored if not key.endswith("_extra_state")} == trained.keys()
    again = quantized_model(modules_to_save=["norm"])  # of another scaling
    result = again.load_state_dict(stored, strict=False)
    assert not result.unexpected_keys and all("lora" not in key for key in result.missing_keys)
    with torch.no_grad():
        assert torch.equal(again(SEQUENCES).logits, model.eval()(SEQUENCES).logits)
    model.save_pretrained(tmp_path / "whole")
    assert "model.layers.0.mlp.up_proj.codes" in load_file(tmp_path / "whole" / "model.safetensors")


def test_exclude_frozen_parameters_ends_with_an_error():
    model = quantized_model()
    before = set(model._keys_to_ignore_on_save)
    with pytest.raises(KeyError), lk.exclude_frozen_parameters(model):
        assert "lm_head.weight" in model._keys_to_ignore_on_save
        raise KeyError
    assert model._keys_to_ignore_on_save == before
    with (
        pytest.raises(TypeError, match="Linear is no model of transformers"),
        lk.exclude_frozen_parameters(nn.Linear(2, 2)),
    ):
        pass


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant, tmp_path):
    """What is computed twice comes out the same."""
    plain, saving = quantized_model(), quantized_model()
    trainer_of(plain, tmp_path, max_steps=3).train()
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    trainer_of(saving, tmp_path, max_steps=3, **options).train()
    assert saving.is_gradient_checkpointing
    assert_same(parameters_of(plain), parameters_of(saving))


@pytest.mark.parametrize("name", ["gpt2", "t5", "gemma3", "falcon", "whisper", "wav2vec2", "vit", "mixtral"])
def test_gradient_checkpointing_of_other_architectures(name):
    model = copy.deepcopy(hf_models.quantized(name)[0]).train()
    gradients = []
    for use_reentrant in (None, False, True):
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()  # transformers does so for models of tokens alone
        model.zero_grad()
        torch.manual_seed(0)
        model(**hf_models.inputs(name)).loss.backward()
        gradients.append({key: own.grad for key, own in model.named_parameters() if own.grad is not None})
    assert gradients[0]
    for others in gradients[1:]:  # Without a cache of keys, attention may round in another order.
        assert others.keys() == gradients[0].keys()
        for key, gradient in gradients[0].items():
            assert (gradient - others[key]).norm() <= 1e-5 * gradient.norm(), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16(dtype, tmp_path):
    """Autocast, whatever the model is in: the optimizer has adapters of float32."""
    model = quantized_model(dtype=dtype)
    trainer = trainer_of(model, tmp_path, FEW, max_steps=12, bf16=True, per_device_train_batch_size=4)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.3
    assert {own.dtype for own in trained_parameters(model).values()} == {torch.float32}
    assert model.lm_head.weight.dtype == dtype


def test_gradient_accumulation(tmp_path):
    """Two batches of two are one of four."""
    models = [quantized_model(), quantized_model()]
    for model, (size, steps) in zip(models, ((4, 1), (2, 2)), strict=True):
        model.config.attention_dropout = 0.0
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "optim": "sgd"}
        trainer_of(model, tmp_path, max_steps=3, learning_rate=1.0, **options).train()
    one, other = map(trained_parameters, models)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)


def padded(examples) -> dict[str, torch.Tensor]:
    """Sequences of several lengths in one batch, as a collator of transformers pads them: to the right."""
    width = max(len(one["input_ids"]) for one in examples)
    batch = {"input_ids": hf_models.PAD, "attention_mask": 0, "labels": -100}
    rows = {
        key: [nn.functional.pad(one[key], (0, width - len(one[key])), value=value) for one in examples]
        for key, value in batch.items()
    }
    return {key: torch.stack(row) for key, row in rows.items()}


def test_padded_batches(tmp_path):
    """The loss of a padded batch is the mean over the tokens that are there."""
    model = quantized_model()
    lengths = [9, 4, 6, 2, 8, 7, 3, 5]
    data = [{"input_ids": one[:n], "labels": one[:n]} for one, n in zip(SEQUENCES, lengths, strict=False)]
    data = [{**one, "attention_mask": torch.ones_like(one["input_ids"])} for one in data]
    trainer = trainer_of(model, tmp_path, data, eval_dataset=data, data_collator=padded, max_steps=2)
    model.eval()
    with torch.no_grad():
        sums = [
            model(input_ids=one["input_ids"][None], labels=one["labels"][None]).loss * (n - 1)
            for one, n in zip(data, lengths, strict=True)
        ]
    assert math.isclose(trainer.evaluate()["eval_loss"], (sum(sums) / sum(n - 1 for n in lengths)).item(), rel_tol=1e-5)
    trainer.train()
    assert math.isfinite(losses(trainer)[-1])


def test_evaluates_by_generating(tmp_path):
    """Seq2SeqTrainer generates what it scores, between steps."""
    model = copy.deepcopy(hf_models.quantized("t5")[0])
    rows = [{"input_ids": one, "labels": one} for one in hf_models.TOKENS]
    args = transformers.Seq2SeqTrainingArguments(
        str(tmp_path),
        **{"max_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"},
        **{"predict_with_generate": True, "generation_max_length": 6, "generation_num_beams": 2},
    )
    trainer = transformers.Seq2SeqTrainer(model, args, train_dataset=rows)
    trainer.train()
    found = trainer.predict(rows)
    expected = model.generate(hf_models.TOKENS, max_length=6, num_beams=2)
    assert (found.predictions[:, : expected.shape[1]] == expected.numpy()).all() and found.metrics["test_loss"] > 0


def test_compiled_by_trainer(tmp_path):
    plain, compiled = quantized_model(layers=1), quantized_model(layers=1)
    for model, options in ((plain, {}), (compiled, {"torch_compile": True, "torch_compile_backend": "aot_eager"})):
        model.config.attention_dropout = 0.0
        trainer_of(model, tmp_path, max_steps=2, **options).train()
    one, other = map(trained_parameters, (plain, compiled))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)
    plain.save_pretrained(tmp_path / "quantized")
    loaded = type(plain).from_pretrained(tmp_path / "quantized")
    with pytest.raises(ValueError, match="torch.compile"):  # what transformers lets nobody do with what it has loaded
        trainer_of(torch.compile(loaded), tmp_path)
