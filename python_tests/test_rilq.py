"""RILQ: the loss and its gradients, the teacher's cache, resuming, and what it refuses."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers import assert_unchanged, gaussian, parameters_of, tiny_bert, tiny_gpt2
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import loftq_kernels as lk
from loftq_kernels.nn.adapters import adapter_parameters
from loftq_kernels.nn.blocks import checkpointed_blocks
from loftq_kernels.tuning import rilq, state, teacher
from loftq_kernels.tuning.tuner import Tuner, discrepancy

VOCABULARY = 50


class TinyLM(nn.Module):
    """Blocks of two linear layers over tokens, each position for itself; returns (states after the norm, logits)."""

    def __init__(self, width: int = 64, layers: int = 2):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 96), nn.ReLU(), nn.Dropout(0.5), nn.Linear(96, width)) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        x = self.norm(x)
        return x, self.lm_head(x)


def tokens(count: int = 8, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (2, 12), generator=generator) for _ in range(count)]


def dense_lm(seed: int = 0, **sizes) -> TinyLM:
    torch.manual_seed(seed)
    return TinyLM(**sizes)


def quantized(model: nn.Module, format="nf2", **options) -> nn.Module:
    """Starts that need statistics get them from the tokens that `tune` takes."""
    model = copy.deepcopy(model)
    cfg = lk.QuantConfig(format, 32, **{"rank": 2, **options})
    statistics = lk.collect_activations(model, tokens(), cfg, progress=False) if cfg.init in ("eora", "aser") else None
    lk.quantize_model(model, cfg, statistics=statistics, progress=False)
    return model


def pair(**options) -> tuple[nn.Module, nn.Module]:
    model = dense_lm()
    return quantized(model, **options), model


def config(**changes) -> lk.RilqConfig:
    return lk.RilqConfig(**{"lr": 1e-2, "steps": 12, "accumulate": 2, "validate_every": 3, **changes})


def tune(model, dense, batches=None, cfg=None, **options) -> lk.RilqResult:
    return lk.rilq_tune(
        model, dense, tokens() if batches is None else batches, cfg or config(), progress=False, **options
    )


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in adapter_parameters(model).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class TestLoss:
    @pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
    def test_equation(self, weight):
        model, dense = pair()
        held_out = tokens(3, seed=5)
        result = tune(model, dense, cfg=config(weight=weight, steps=1), validation=held_out)
        start, dense = quantized(dense).eval(), dense.eval()
        expected = 0.0
        with torch.no_grad():
            for batch in held_out:
                states, logits = start(batch)
                ce = cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
                expected += (weight * mse_loss(states, dense(batch)[0]) + (1 - weight) * ce).item() / 3
        assert result.start_loss == pytest.approx(expected, rel=1e-5)

    def test_masked_tokens_do_not_count(self):
        batch = {"input_ids": tokens(1)[0], "attention_mask": torch.ones(2, 12, dtype=torch.long)}
        batch["attention_mask"][1, 5:] = 0
        other = {**batch, "input_ids": batch["input_ids"].clone()}
        other["input_ids"][1, 5:] = 7
        (model, dense), losses = pair(), []
        for held_out in (batch, other):
            losses.append(tune(copy.deepcopy(model), dense, cfg=config(steps=1), validation=[held_out]).start_loss)
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)

    def test_labels(self):
        batch = {"input_ids": tokens(1)[0], "labels": torch.full((2, 12), -100)}
        batch["labels"][0, 4] = 9
        model, dense = pair()
        result = tune(copy.deepcopy(model), dense, cfg=config(steps=1, weight=0), validation=[batch])
        with torch.no_grad():
            expected = -model.eval()(batch["input_ids"])[1][0, 3].log_softmax(-1)[9].item()
        assert result.start_loss == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize("adapter", ["lora", "qalora"])
    def test_gradients_match_dense_float64(self, adapter, checkpointing):
        """One update of plain gradient descent's direction: autograd through W = Q + s B A, dense and in float64."""
        model, dense = (m.double().eval() for m in pair(adapter=adapter, lora_alpha=4))
        batch = tokens(1)[0]
        expected = dense_gradients(model, dense, batch)
        cfg = config(accumulate=1, gradient_checkpointing=checkpointing)
        tuner = Tuner(model, adapter_parameters(model), teacher.LiveTeacher(dense), [batch], [batch], cfg, None, None)
        with rilq._checkpointed(model):
            tuner._losses(batch)[0].backward()
        assert len(expected) == 8
        for name, parameter in tuner.adapters.items():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)

    def test_nothing_dense_is_kept(self):
        """What the forward saves for the backward holds no matrix of a weight's shape in floating point."""
        model, dense = pair()
        shapes = {tuple(layer.weight.shape) for layer in model.modules() if isinstance(layer, lk.QuantLoRALinear)}
        assert shapes == {(96, 64), (64, 96)}
        saved = []

        def pack(tensor: Tensor) -> Tensor:
            saved.append((tuple(tensor.shape), tensor.dtype))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            tune(model, dense, cfg=config(steps=1, gradient_checkpointing=False))
        kept = {shape for shape, dtype in saved if dtype.is_floating_point}
        assert kept and not kept & (shapes | {shape[::-1] for shape in shapes})


def dense_gradients(model: nn.Module, dense: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """By `torch.func` on a dense twin whose weights are functions of copies of the adapters."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in adapter_parameters(model).items()}
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, lk.QuantLoRALinear):
            lora_A, lora_B = leaves[f"{name}.lora_A"], leaves[f"{name}.lora_B"]
            if layer.adapter == "qalora":
                lora_A = lora_A.repeat_interleave(layer.group_size, 1)[:, : layer.in_features] / layer.group_size
            weights[f"{name}.weight"] = layer.dequantize(torch.float64) + layer.scaling * lora_B @ lora_A
    states, logits = torch.func.functional_call(dense, weights, (batch,))
    ce = cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    loss = 0.5 * mse_loss(states, dense(batch)[0].detach()) + 0.5 * ce
    return dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))


class TestTuning:
    @pytest.mark.parametrize(
        "options", [{}, {"init": "qlora"}, {"init": "eora"}, {"adapter": "qalora"}, {"format": "int2"}], ids=str
    )
    def test_loss_falls_and_only_adapters_change(self, options):
        model, dense = pair(**options)
        before, teacher_before = parameters_of(model), parameters_of(dense)
        model.train()
        learning = {name: p.requires_grad for name, p in model.named_parameters()}
        result = tune(model, dense, batches=tokens(16), cfg=config(weight=1.0, lr=3e-3, steps=30, patience=30))
        assert result.best_loss < result.start_loss and result.best_step > 0
        assert result.train[-1].loss < result.train[0].loss and len(result.train) == result.steps == 30
        chosen = adapter_parameters(model)
        for name, tensor in parameters_of(model).items():
            assert torch.equal(tensor, before[name]) == (name not in chosen), name
        assert_unchanged(dense, teacher_before)
        assert learning == {name: p.requires_grad for name, p in model.named_parameters()}
        assert all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())
        assert not any("forward" in m.__dict__ for m in model.modules())

    def test_best_is_restored(self):
        """With a learning rate that wrecks the model: it stops early, and what it holds scores the best loss."""
        model, dense = pair()
        held_out = tokens(3, seed=5)
        result = tune(model, dense, cfg=config(lr=3.0, steps=100, patience=2), validation=held_out)
        losses = [point.loss for point in result.validation]
        assert result.stopped == "patience" and result.steps < 100
        assert result.best_loss == min(losses) and len(losses) - 1 - losses.index(min(losses)) == 2
        again = tune(model, dense, cfg=config(steps=1), validation=held_out)
        assert again.start_loss == result.best_loss

    def test_start_is_a_candidate(self):
        model, dense = pair()
        before = adapters(model)
        result = tune(model, dense, cfg=config(lr=5.0, steps=3))
        assert result.best_step == 0 and same(adapters(model), before)

    def test_checkpointing_changes_no_bit(self):
        results = []
        for checkpointing in (False, True):
            model, dense = pair()
            results.append((tune(model, dense, cfg=config(gradient_checkpointing=checkpointing)), adapters(model)))
        assert results[0][0] == results[1][0] and same(results[0][1], results[1][1])

    def test_bfloat16_adapters(self):
        """Updates far below bfloat16's resolution add up in the float32 copies."""
        model, dense = (m.bfloat16() for m in pair())
        before = adapters(model)
        result = tune(model, dense, cfg=config(lr=1e-4, steps=40, patience=100))
        assert result.best_step > 0 and not same(adapters(model), before)
        assert all(value.dtype == torch.bfloat16 for value in adapters(model).values())

    def test_merge_after_tuning(self):
        model, dense = pair(adapter="qalora")
        tune(model, dense)
        expected = model.eval()(tokens()[0])[1]
        lk.merge_adapters(model)
        torch.testing.assert_close(model(tokens()[0])[1], expected, rtol=1e-5, atol=1e-5)

    def test_layers_of_every_kind(self):
        class ConvLM(TinyLM):
            def __init__(self):
                super().__init__()
                self.embed = nn.Embedding(VOCABULARY, 64, padding_idx=0)
                self.conv = nn.Conv1d(64, 64, 3, padding=1)

            def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
                x = self.embed(input_ids)
                x = self.norm(x + self.conv(x.transpose(1, 2)).transpose(1, 2) + self.layers[0](x))
                return x, self.lm_head(x)

        torch.manual_seed(0)
        dense = ConvLM()
        overrides = {"layers*": {"adapter": "qalora"}}
        model = quantized(dense, layer_types=("linear", "conv", "embedding"), overrides=overrides)
        assert [m.kind for m in (model.embed, model.conv)] == ["embedding", "conv1d"]
        before, start = adapters(model), parameters_of(model)
        assert len(before) == 2 * 6 and model.layers[0][0].adapter == "qalora"
        result = tune(model, dense)
        assert result.best_loss < 0.98 * result.start_loss
        after = adapters(model)
        for name in ("embed", "conv", "layers.0.0", "layers.0.3"):
            assert not torch.equal(after[f"{name}.lora_B"], before[f"{name}.lora_B"])
        assert not after["embed.lora_B"][0].any()  # the padding row is Q's alone
        assert all(torch.equal(t, start[n]) for n, t in parameters_of(model).items() if n not in before)

    def test_callback_and_plot(self, tmp_path):
        (model, dense), seen = pair(), []
        result = lk.rilq_tune(model, dense, tokens(), config(), progress=seen.append, plot=tmp_path / "loss.png")
        assert seen == result.train and (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


class TestModels:
    def llama(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **sizes)).eval()

    @pytest.mark.parametrize("make", ["llama", "gpt2"])
    def test_transformers(self, make):
        dense = self.llama() if make == "llama" else tiny_gpt2()
        batch = {"input_ids": tokens()[0], "attention_mask": torch.ones(2, 12, dtype=torch.long)}
        states, logits = teacher.final_states(dense, batch)
        expected = dense(**batch, output_hidden_states=True)
        assert torch.equal(states, expected.hidden_states[-1]) and torch.equal(logits, expected.logits)
        results = [
            tune(
                quantized(dense), dense, cfg=config(gradient_checkpointing=checkpointing, weight=1.0, lr=1e-3, steps=6)
            )
            for checkpointing in (False, True)
        ]
        assert results[0] == results[1] and results[0].best_loss < results[0].start_loss
        assert checkpointed_blocks(dense) and not any("forward" in m.__dict__ for m in dense.modules())

    def test_bare_transformers_model(self):
        """An encoder without a head has states, but no logits."""
        dense = tiny_bert()
        model = quantized(dense)
        with pytest.raises(ValueError, match="no logits.*weight=1"):
            tune(model, dense)
        result = tune(model, dense, cfg=config(weight=1.0))
        assert result.best_loss < result.start_loss and result.train[0].ce == 0

    def t5(self):
        from transformers import T5Config, T5ForConditionalGeneration

        sizes = {"d_model": 64, "d_ff": 96, "d_kv": 32, "num_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY}
        torch.manual_seed(0)
        return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()

    def test_encoder_decoder(self):
        """T5's base model is the model itself: the states are the decoder's, not the logits. Its mask is its own."""
        dense, short, long = self.t5(), tokens()[0][:, :7], tokens()[1]
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[:, 4:] = 0
        batch = {"input_ids": long, "attention_mask": mask, "decoder_input_ids": short}
        states, logits = teacher.final_states(dense, batch)
        expected = dense(**batch, output_hidden_states=True)
        torch.testing.assert_close(states, expected.decoder_hidden_states[-1])
        torch.testing.assert_close(logits, expected.logits)
        batches = [{**batch, "decoder_input_ids": other} for other in tokens(4)]  # as long as the encoder's
        model = quantized(dense, exclude=("lm_head", "*.wo"))
        with pytest.raises(ValueError, match="encoder-decoder.*weight=1"):
            tune(copy.deepcopy(model), dense, batches)
        result = tune(model, dense, batches, config(weight=1.0, lr=1e-3))
        assert result.best_loss < result.start_loss
        a, b = torch.zeros(2, 12, 3), torch.ones(2, 12, 3)
        b[:, 6:] = 3
        seen = torch.ones(2, 12)
        seen[:, 6:] = 0
        assert discrepancy(a, b, batches[0]).item() == 5
        assert discrepancy(a, b, {**batches[0], "decoder_attention_mask": seen}).item() == 1

    def test_no_states_to_be_seen(self):
        """A model that is its own base model, without decoder, whose output begins with logits."""

        class Opaque(TinyLM):
            config = type("Config", (), {})()

            @property
            def base_model(self):
                return self

            def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
                return super().forward(input_ids)[::-1]

        torch.manual_seed(0)
        dense = Opaque()
        with pytest.raises(ValueError, match="Opaque.*pass hidden="):
            tune(quantized(dense), dense)
        result = tune(quantized(dense), dense, hidden=lambda m, x: m(x)[::-1], cfg=config(lr=1e-3))
        assert result.best_loss < result.start_loss

    @pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForTokenClassification", "BertLMHeadModel"])
    def test_next_token_needs_a_causal_model(self, kind):
        import transformers

        torch.manual_seed(0)
        dense = getattr(transformers, kind)(tiny_bert().config).eval()
        model = quantized(dense, exclude="classifier" if kind == "BertForTokenClassification" else "cls.*")
        before = adapters(model)
        with pytest.raises(ValueError, match=f"{kind}.*weight=1"):
            tune(model, dense)
        assert same(adapters(model), before)
        assert tune(model, dense, cfg=config(weight=1.0, lr=1e-3, steps=3)).steps == 3

    def test_bert_as_a_decoder(self):
        from transformers import BertLMHeadModel

        torch.manual_seed(0)
        dense = BertLMHeadModel(tiny_bert(is_decoder=True).config).eval()
        assert tune(quantized(dense, exclude=("cls.*",)), dense, cfg=config(steps=3)).train[0].ce > 0

    def test_hidden_function(self):
        """A model over floating inputs, which returns something of its own."""
        dense = nn.ModuleDict({"body": nn.Linear(64, 64), "head": nn.Linear(64, 5)})
        model = quantized(dense)
        batches = [gaussian(6, 64, seed=i) for i in range(6)]
        result = tune(
            model, dense, batches, config(weight=1.0, lr=1e-3), hidden=lambda m, x: m["head"](torch.relu(m["body"](x)))
        )
        assert result.best_loss < result.start_loss
        with pytest.raises(ValueError, match="no token ids"):
            tune(model, dense, batches, hidden=lambda m, x: (m["body"](x), m["head"](x)))
        with pytest.raises(TypeError, match="pass hidden="):
            tune(model, dense, batches, hidden=lambda m, x: {"states": x})


class TestTeacher:
    def test_cached_equals_live(self, tmp_path):
        model, dense = pair()
        start, live = adapters(model), tune(model, dense)
        tuned = adapters(model)
        lk.cache_teacher(dense, tokens(), tmp_path / "a", progress=False)
        for source, options in (
            (tmp_path / "a", {}),
            (str(tmp_path / "a"), {}),
            (dense, {"cache": tmp_path / "b"}),
            (lambda: dense, {"cache": tmp_path / "c"}),
            (lambda: dense, {}),
        ):
            for name, parameter in adapter_parameters(model).items():
                parameter.data.copy_(start[name])
            assert tune(model, source, **options) == live and same(adapters(model), tuned)

    def test_function_is_called_only_for_missing_states(self, tmp_path):
        calls, dense = [], dense_lm()

        def load() -> nn.Module:
            calls.append(1)
            return dense

        for batches, expected in ((tokens(3), 1), (tokens(3), 1), (tokens(4), 2)):
            lk.cache_teacher(load, batches, tmp_path, progress=False)
            assert len(calls) == expected
        assert len(list(tmp_path.glob("*.safetensors"))) == 4

    def test_loaded_teacher_is_dropped(self, tmp_path):
        import weakref

        alive = []

        def load() -> nn.Module:
            model = dense_lm()
            alive.append(weakref.ref(model))
            return model

        tune(quantized(dense_lm()), load, cfg=config(steps=1), hidden=lambda m, x: check_dropped(m, x, alive))

    def test_dropout_is_off_and_the_mode_stays(self):
        dense = dense_lm().train()
        first, second = (teacher.LiveTeacher(dense).states(tokens()[0]) for _ in range(2))
        assert torch.equal(first, second) and dense.layers[0][2].training

    def test_another_teacher(self, tmp_path):
        lk.cache_teacher(dense_lm(), tokens(), tmp_path, progress=False)
        with pytest.raises(ValueError, match="another teacher"):
            lk.cache_teacher(dense_lm(seed=1), tokens(), tmp_path, progress=False)
        with pytest.raises(ValueError, match="another teacher"):
            tune(quantized(dense_lm()), dense_lm(seed=1), cache=tmp_path)

    def test_missing_and_damaged(self, tmp_path):
        model, dense = pair()
        with pytest.raises(FileNotFoundError, match="teacher.json"):
            tune(model, tmp_path)
        lk.cache_teacher(dense, tokens(6), tmp_path, progress=False)
        with pytest.raises(ValueError, match="no states of batch 6 of 8"):
            tune(model, tmp_path)
        file = teacher._file(tmp_path, tokens()[0])
        other = teacher._file(tmp_path, tokens()[1])
        whole = file.read_bytes()
        for damaged in (whole[:-10], b"", other.read_bytes()):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=file.name):
                tune(model, tmp_path, tokens(6))
        file.write_bytes(whole)
        for text in ("{", "[]", '{"loftq_teacher_version": 9, "teacher": "x"}'):
            (tmp_path / "teacher.json").write_text(text)
            with pytest.raises(ValueError, match="teacher.json"):
                tune(model, tmp_path, tokens(6))

    @pytest.mark.parametrize("cached", [False, True])
    def test_other_shape(self, cached, tmp_path):
        model, dense = quantized(dense_lm()), dense_lm(width=32)
        before = adapters(model)
        with pytest.raises(ValueError, match=r"\(2, 12, 64\), the teacher's \(2, 12, 32\)"):
            tune(model, dense, cache=tmp_path if cached else None)
        assert same(adapters(model), before)

    def test_not_finite(self, tmp_path):
        dense = dense_lm()
        dense.norm.bias.data[3] = float("nan")
        for options in ({}, {"cache": tmp_path}):
            with pytest.raises(ValueError, match="teacher's hidden states hold NaN"):
                tune(quantized(dense_lm()), dense, **options)

    @pytest.mark.parametrize("wrong", [None, 3, lambda: "model"], ids=str)
    def test_not_a_teacher(self, wrong):
        with pytest.raises(TypeError, match="teacher"):
            tune(quantized(dense_lm()), wrong)


def check_dropped(model: nn.Module, batch: Tensor, alive: list) -> tuple[Tensor, Tensor]:
    """Called for the teacher first, then for the quantized model, when the teacher must be gone."""
    quantized_model = any(isinstance(m, lk.QuantLoRALinear) for m in model.modules())
    assert len(alive) == 1 and (alive[0]() is None) == quantized_model
    return model(batch)


class Interrupt(Exception):
    pass


def interrupt_at(step: int):
    def callback(point) -> None:
        if point.step == step:
            raise Interrupt

    return callback


class TestResume:
    @pytest.mark.parametrize("adapter", ["lora", "qalora"])
    @pytest.mark.parametrize("step", [2, 7, 9])
    def test_interrupted_run_ends_the_same(self, step, adapter, tmp_path):
        """Before the first save after an update, between two and right after one: bit for bit, history included."""
        model, dense = pair(adapter=adapter)
        interrupted = copy.deepcopy(model)
        expected = tune(model, dense)
        with pytest.raises(Interrupt):
            lk.rilq_tune(interrupted, dense, tokens(), config(), state_dir=tmp_path, progress=interrupt_at(step))
        assert tune(interrupted, dense, state_dir=tmp_path) == expected
        assert same(adapters(interrupted), adapters(model))

    def test_after_an_interruption_the_model_holds_the_best(self, tmp_path):
        model, dense = pair()
        held_out = tokens(3, seed=5)
        with pytest.raises(Interrupt):
            lk.rilq_tune(
                model, dense, tokens(), config(), validation=held_out, state_dir=tmp_path, progress=interrupt_at(7)
            )
        done = json.loads((tmp_path / "rilq.json").read_text())["done"]
        again = tune(model, dense, cfg=config(steps=1), validation=held_out)
        assert done["step"] == 6 and again.start_loss == done["best_loss"]

    def test_more_steps(self, tmp_path):
        model, dense = pair()
        other = copy.deepcopy(model)
        expected = tune(model, dense)
        tune(other, dense, cfg=config(steps=6), state_dir=tmp_path)
        assert tune(other, dense, state_dir=tmp_path) == expected
        assert same(adapters(other), adapters(model))
        assert tune(other, dense, state_dir=tmp_path) == expected  # done: nothing more happens
        assert len(list(tmp_path.iterdir())) == 2

    @pytest.mark.parametrize("steps", [5, 8])
    @pytest.mark.parametrize("lr", [1e-2, 5.0], ids=["end is best", "end is not"])
    def test_more_steps_after_an_end_between_validations(self, lr, steps, tmp_path):
        """The validation at the end is part of that run's result, and no longer of the one that goes on."""
        model, dense = pair()
        first, straight = copy.deepcopy(model), copy.deepcopy(model)
        expected = tune(model, dense, cfg=config(lr=lr))
        short = tune(first, dense, cfg=config(lr=lr, steps=steps), state_dir=tmp_path)
        assert short == tune(straight, dense, cfg=config(lr=lr, steps=steps)) and same(
            adapters(first), adapters(straight)
        )
        assert short.validation[-1].step == steps
        for _ in range(2):  # finished: told again as it was
            assert tune(first, dense, cfg=config(lr=lr, steps=steps), state_dir=tmp_path) == short
            assert same(adapters(first), adapters(straight))
        assert tune(first, dense, cfg=config(lr=lr), state_dir=tmp_path) == expected
        assert same(adapters(first), adapters(model))

    def test_another_start(self, tmp_path):
        """The same packed weights under other adapters: neither those of the beginning nor the best ones."""
        model, dense = pair()
        start = copy.deepcopy(model)
        tune(model, dense, cfg=config(steps=3), state_dir=tmp_path)
        for change in (lambda t: t.zero_(), lambda t: t[0, 0].add_(1e-3)):
            for held in (start, model):
                other = copy.deepcopy(held)
                with torch.no_grad():
                    change(other.layers[1][3].lora_B)
                before = adapters(other)
                with pytest.raises(ValueError, match="adapters differ from those that the state was made from"):
                    tune(other, dense, state_dir=tmp_path)
                assert same(adapters(other), before)
        results = [tune(held, dense, state_dir=tmp_path) for held in (start, model)]
        assert results[0] == results[1] and same(adapters(start), adapters(model))

    def test_failed_save(self, tmp_path, monkeypatch):
        """A best that could not be saved is not left in the model, which the older state would not know then."""
        model, dense = pair()
        other = copy.deepcopy(model)
        expected = tune(other, dense)
        save = state.save

        def full(folder, settings, done, tensors):
            if done.step == 6:
                raise OSError("no space left")
            save(folder, settings, done, tensors)

        monkeypatch.setattr(state, "save", full)
        with pytest.raises(OSError, match="no space"):
            tune(model, dense, state_dir=tmp_path)
        monkeypatch.undo()
        assert tune(model, dense, state_dir=tmp_path) == expected and same(adapters(model), adapters(other))

    def test_bfloat16(self, tmp_path):
        """The best is kept in float32, the model holds it rounded."""
        model, dense = (m.bfloat16() for m in pair())
        other = copy.deepcopy(model)
        expected = tune(other, dense)
        tune(model, dense, cfg=config(steps=6), state_dir=tmp_path)
        assert tune(model, dense, state_dir=tmp_path) == expected and same(adapters(model), adapters(other))

    @pytest.mark.parametrize("what", ["scaling", "adapter_enabled"])
    def test_another_scaling(self, what, tmp_path):
        model, dense = pair()
        tune(model, dense, cfg=config(steps=3), state_dir=tmp_path)
        setattr(model.layers[0][0], what, 0.5 if what == "scaling" else False)
        with pytest.raises(ValueError, match=f"another run.*{what}"):
            tune(model, dense, state_dir=tmp_path)

    def test_another_run(self, tmp_path):
        model, dense = pair()
        tune(model, dense, cfg=config(steps=3), state_dir=tmp_path)
        for what, run in {
            "lr": lambda: tune(model, dense, cfg=config(lr=1e-3), state_dir=tmp_path),
            "batches": lambda: tune(model, dense, tokens(8, seed=1), state_dir=tmp_path),
            "teacher": lambda: tune(model, dense_lm(seed=1), state_dir=tmp_path),
            "model": lambda: tune(quantized(dense_lm(seed=1)), dense, state_dir=tmp_path),
            "adapters": lambda: tune(quantized(dense, rank=3), dense, state_dir=tmp_path),
        }.items():
            before = sorted(file.read_bytes() for file in tmp_path.iterdir())
            with pytest.raises(ValueError, match=f"another run.*{what}"):
                run()
            assert sorted(file.read_bytes() for file in tmp_path.iterdir()) == before

    def test_damaged(self, tmp_path):
        model, dense = pair()
        tune(model, dense, cfg=config(steps=3), state_dir=tmp_path)
        tensors = tmp_path / "state-3.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-10])
        with pytest.raises(ValueError, match="state-3.safetensors"):
            tune(model, dense, state_dir=tmp_path)
        tensors.unlink()
        with pytest.raises(FileNotFoundError, match="state-3.safetensors"):
            tune(model, dense, state_dir=tmp_path)
        for text in ("{", "[]", '{"loftq_rilq_version": 9}'):
            (tmp_path / "rilq.json").write_text(text)
            with pytest.raises(ValueError, match="rilq.json"):
                tune(model, dense, state_dir=tmp_path)


class TestBadInput:
    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            ([], "batches is empty"),
            ([torch.zeros(0, 12, dtype=torch.long)] * 3, r"batches\[0\] is empty"),
            ([{}] * 3, r"batches\[0\] is empty"),
            (tokens(1), "one batch cannot be split"),
        ],
        ids=["none", "no rows", "no tensors", "one"],
    )
    def test_empty_data(self, batches, message):
        model, dense = pair()
        with pytest.raises(ValueError, match=message):
            tune(model, dense, batches)

    def test_empty_validation(self):
        model, dense = pair()
        with pytest.raises(ValueError, match="validation is empty"):
            tune(model, dense, validation=[])

    @pytest.mark.parametrize(
        "batches", [tokens(1)[0], {"input_ids": tokens(1)[0]}, [[1, 2]], ["text", "text"]], ids=str
    )
    def test_not_batches(self, batches):
        model, dense = pair()
        with pytest.raises(TypeError):
            tune(model, dense, batches)

    def test_no_adapters(self):
        with pytest.raises(ValueError, match="no adapters"):
            tune(quantized(dense_lm(), rank=None), dense_lm())

    def test_disabled_adapters(self):
        model, dense = pair()
        layers = [layer for layer in model.modules() if isinstance(layer, lk.QuantLoRALinear)]
        for layer in layers:
            layer.disable_adapter()
        with pytest.raises(ValueError, match="enable_adapter"):
            tune(model, dense)
        before = adapters(model)
        layers[0].enable_adapter()
        tune(model, dense, cfg=config(weight=1.0, lr=1e-3))
        now = adapters(model)
        assert [name for name in now if not torch.equal(now[name], before[name])] == [
            "layers.0.0.lora_A",
            "layers.0.0.lora_B",
        ]

    def test_loss_is_not_finite(self):
        model, dense = pair()
        before = adapters(model)
        model.layers[1][3].bias.data[0] = float("nan")
        with pytest.raises(FloatingPointError, match="update 0: the loss is nan"):
            tune(model, dense)
        assert same(adapters(model), before)

    def test_diverging_run_leaves_the_best(self):
        """NaN half-way: the error names the update, the model holds finite adapters."""
        model, dense = pair()
        with pytest.raises(FloatingPointError, match=r"update [1-9]"):
            tune(model, dense, cfg=config(lr=1e30))
        assert all(value.isfinite().all() for value in adapters(model).values())

    @pytest.mark.parametrize(
        "change",
        [{"weight": 1.5}, {"lr": 0.0}, {"lr": float("nan")}, {"steps": 0}, {"accumulate": 1.5}, {"patience": True}]
        + [{"validation_share": 1.0}, {"validate_every": -1}],
        ids=str,
    )
    def test_config(self, change):
        with pytest.raises(ValueError, match=f"{next(iter(change))}="):
            lk.RilqConfig(**change)
