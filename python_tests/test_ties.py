"""Heads that are tied to the embedding, quantized because `quantize_head` asks for it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import loftq_kernels as lk

transformers = pytest.importorskip("transformers")

IDS = torch.randint(96, (2, 7), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
DECODER = SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
TIED = {
    "llama": ("LlamaForCausalLM", DECODER),
    "gemma": ("GemmaForCausalLM", DECODER | {"head_dim": 32}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 96, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 2}),
}
OF_A_SUBCLASS = ("gemma",)  # of nn.Embedding, which scales what it looks up and stays dense.
SMALL = {"rank": 4, "num_iter": 1, "quantize_head": True}
BOTH = ("linear", "embedding")


def tied(name: str) -> nn.Module:
    cls, fields = TIED.get(name, TIED["llama"])
    torch.manual_seed(0)
    return getattr(transformers, cls)(getattr(transformers, cls).config_class(**fields)).eval()


def quantized(model: nn.Module, **fields) -> lk.QuantizationReport:
    return lk.quantize_model(model, lk.QuantConfig("nf4", **SMALL | fields), progress=False)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("types", [("linear",), BOTH], ids=["head", "head and embedding"])
@pytest.mark.parametrize("name", TIED)
class TestQuantized:
    def test_layers(self, name, types):
        """The head is what its own weight gives by itself; the embedding is dense and as it was, or another layer."""
        model = tied(name)
        before = model.get_input_embeddings().weight.detach().clone()
        report = quantized(model, layer_types=types)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        alone = nn.Linear(*reversed(before.shape), bias=False)
        alone.weight = nn.Parameter(before)
        expected = lk.QuantLoRALinear.from_linear(alone, lk.LayerConfig("nf4", rank=4, num_iter=1))
        assert type(head) is lk.QuantLoRALinear and torch.equal(head.dequantize(), expected.dequantize())
        if types == BOTH and name not in OF_A_SUBCLASS:
            assert type(embedding) is lk.QuantLoRAEmbedding and embedding.lora_B is not head.lora_B
        else:
            assert torch.equal(embedding.weight, before)
        assert not report.skipped.keys() & {"lm_head"}

    def test_tie_weights_does_not_undo_it(self, name, types):
        model = tied(name)
        quantized(model, layer_types=types)
        expected = logits(model)
        assert not model.config.tie_word_embeddings and not model.config.get_text_config().tie_word_embeddings
        assert not model.all_tied_weights_keys
        model.tie_weights()
        model.tie_weights(recompute_mapping=False)
        assert torch.equal(logits(model), expected) and torch.equal(logits(copy.deepcopy(model)), expected)

    def test_saved_and_loaded(self, name, types, tmp_path):
        """Also into a model that is tied itself."""
        model = tied(name)
        quantized(model, layer_types=types)
        lk.save_quantized(model, tmp_path)
        for loaded in (lk.load_quantized(tmp_path), lk.load_quantized(tmp_path, tied(name))):
            assert type(loaded.get_output_embeddings()) is lk.QuantLoRALinear
            assert torch.equal(logits(loaded), logits(model)) and not loaded.config.tie_word_embeddings
            loaded.tie_weights()
            assert torch.equal(logits(loaded), logits(model))

    def test_training(self, name, types):
        """Each has an adapter of its own, which a gradient reaches."""
        model = tied(name).train()
        quantized(model, layer_types=types)
        model(input_ids=IDS, labels=IDS).loss.backward()
        adapted = [model.get_output_embeddings()]
        adapted += [model.get_input_embeddings()] * (types == BOTH and name not in OF_A_SUBCLASS)
        assert all(layer.lora_A.grad is not None and layer.lora_B.grad.abs().sum() > 0 for layer in adapted)

    def test_the_report(self, name, types):
        """Each byte once: the shared weight was the embedding's, which has it still if it stays dense."""
        model = tied(name)
        dense = sum(p.nbytes for p in model.parameters())
        report = quantized(model, layer_types=types)
        (head,) = (layer for layer in report.layers if layer.name == "lm_head")
        assert head.bytes_before == 0 and head.note.endswith(", which keeps its own weight")
        now = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        assert report.model_bytes == now
        freed = report.bytes_before - report.bytes_after
        assert sum(p.nbytes for p in model.parameters()) == dense - freed


class TestNotQuantized:
    def test_by_default(self):
        model = tied("llama")
        report = quantized(model, quantize_head=False, layer_types=BOTH)
        assert "quantize_head=True quantizes" in report.skipped["lm_head"]
        assert "shared with lm_head.weight" in report.skipped["model.embed_tokens"]
        assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
        assert model.all_tied_weights_keys

    @pytest.mark.parametrize(
        "fields", [{"exclude": "lm_head"}, {"overrides": {"lm_head": None}}, {"modules_to_save": "lm_head"}], ids=str
    )
    def test_a_head_that_the_config_leaves_dense_keeps_its_embedding(self, fields):
        model = tied("llama")
        report = quantized(model, layer_types=BOTH, **fields)
        assert "shared with lm_head.weight" in report.skipped["model.embed_tokens"]
        assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight

    def test_a_head_that_cannot_be_quantized_keeps_its_embedding(self):
        model = tied("llama")
        model.lm_head.register_forward_hook(lambda *_: None)
        report = quantized(model, layer_types=BOTH)
        assert "has hooks" in report.skipped["lm_head"]
        assert "shared with lm_head.weight" in report.skipped["model.embed_tokens"]

    @pytest.mark.parametrize(
        ("cls", "fields", "head", "other"),
        [
            (
                "T5ForConditionalGeneration",
                {"vocab_size": 96, "d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 1, "num_heads": 2},
                "lm_head",
                "encoder.embed_tokens.weight",
            ),
            (
                "BertForMaskedLM",
                SIZES | {"num_attention_heads": 2, "max_position_embeddings": 32},
                "cls.predictions.decoder",
                "cls.predictions.bias",
            ),
        ],
    )
    def test_one_config_that_ties_more(self, cls, fields, head, other):
        """Untied, T5 would compute something else and BERT lose the bias when it is loaded."""
        model = getattr(transformers, cls)(getattr(transformers, cls).config_class(**fields)).eval()
        report = quantized(model)
        assert "its weight is shared with " in report.skipped[head] and model.config.tie_word_embeddings
        assert other in report.skipped[head]


def test_a_model_of_ones_own():
    """No config says anything of its tie."""
    model = nn.ModuleDict({"embedding": nn.Embedding(96, 64), "lm_head": nn.Linear(64, 96)})
    model["lm_head"].weight = model["embedding"].weight
    report = quantized(model)
    assert [layer.name for layer in report.layers] == ["lm_head"] and report.skipped == {}
    assert model["lm_head"](torch.ones(1, 64)).shape == (1, 96)
    assert "was tied to embedding, which keeps its own weight" in report.layers[0].note
