"""`QuantLoRAEmbedding`: a drop-in for nn.Embedding."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
from helpers import (
    DEVICES,
    DTYPES,
    FORMATS,
    TOKENS,
    assert_unchanged,
    gaussian,
    parameters_of,
    same_packed,
    tiny_bert,
    tiny_gpt2,
)
from torch import nn

import loftq_kernels as lk
from loftq_kernels.nn import embedding as module

SMALL = {"rank": 4, "num_iter": 2}
INDICES = torch.tensor([[0, 7, 49], [7, 7, 3]])


def make_embedding(padding_idx: int | None = None, dtype=torch.float32) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(50, 70, padding_idx, dtype=dtype)


def make_layer(format: str = "nf4", padding_idx: int | None = None, **options) -> lk.QuantLoRAEmbedding:
    cfg = lk.QuantConfig(format, **{**SMALL, **options})
    return lk.QuantLoRAEmbedding.from_embedding(make_embedding(padding_idx), cfg)


class TestForward:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("group_size", [32, 64, -1])
    @pytest.mark.parametrize("format", FORMATS)
    def test_is_the_dequantized_look_up(self, format, group_size, device):
        """Bit for bit."""
        layer = make_layer(format, rank=None, group_size=group_size).to(device)
        for indices in (INDICES, INDICES.int(), torch.tensor(5), torch.zeros(0, 3, dtype=torch.int64)):
            y = layer(indices.to(device))
            assert y.shape == (*indices.shape, 70)
            assert torch.equal(y.cpu(), layer.packed.dequantize().cpu()[indices])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes(self, dtype):
        embedding = make_embedding(dtype=dtype)
        layer = lk.QuantLoRAEmbedding.from_embedding(embedding, lk.QuantConfig(rank=None))
        assert layer(INDICES).dtype == layer.weight.dtype == dtype
        assert torch.equal(layer(INDICES), layer.dequantize()[INDICES])
        assert layer.double()(INDICES).dtype == torch.float64
        assert not any(
            p.requires_grad or p.is_floating_point() and p.dtype == torch.float64 for p in layer.parameters()
        )

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_adapter(self, dtype):
        layer = make_layer(lora_alpha=8).to(dtype)
        table = oracle.dequantize(layer.packed) + 2 * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
        y = layer(INDICES)
        assert y.dtype == dtype and (y.double() - table[INDICES]).abs().max() <= 16 * torch.finfo(dtype).eps
        layer.disable_adapter()
        assert torch.equal(layer(INDICES), layer.dequantize()[INDICES]) and not layer.has_adapter
        layer.enable_adapter()
        assert torch.equal(layer(INDICES), y)

    def test_decodes_the_rows_asked_for(self, monkeypatch):
        decoded, original = [], module.dequantize_tensors
        monkeypatch.setattr(
            module, "dequantize_tensors", lambda codes, *rest: decoded.append(len(codes)) or original(codes, *rest)
        )
        make_layer()(INDICES)
        assert decoded == [6]

    def test_autocast_leaves_the_table_alone(self):
        """As nn.Embedding: only the adapter's product runs in bfloat16."""
        layer = make_layer()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(INDICES)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, layer(INDICES), rtol=0, atol=0.02)

    def test_compile(self):
        layer = make_layer(padding_idx=3)
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(INDICES), layer(INDICES))

    @pytest.mark.parametrize("bad", [50, -1, 10**9])
    def test_outside_the_table(self, bad):
        with pytest.raises(IndexError, match=rf"index {bad} is outside 0 \.\. 49"):
            make_layer()(torch.tensor([0, bad]))

    @pytest.mark.parametrize("indices", [torch.zeros(3), torch.zeros(3, dtype=torch.bool), [1, 2]], ids=str)
    def test_not_integers(self, indices):
        with pytest.raises(TypeError, match="int64 or int32"):
            make_layer()(indices)


class TestPadding:
    @pytest.mark.parametrize("padding_idx", [3, -47])
    @pytest.mark.parametrize("format", FORMATS)
    def test_the_row_is_the_quantized_one(self, format, padding_idx):
        """A row of zeros stays one in every format with a zero, and in affine ones, whose offset holds it."""
        layer = make_layer(format, padding_idx=padding_idx)
        assert layer.padding_idx == 3 and not layer.lora_B[3].any()
        row = layer(torch.tensor(3))
        assert torch.equal(row, layer.dequantize()[3])
        if not format.startswith("uniform"):  # linspace(-1, 1, 2^b) has no zero
            assert not row.any()

    def test_gets_no_gradient(self):
        layer = make_layer(padding_idx=3)
        layer(torch.tensor([3, 7, 3])).square().sum().backward()
        assert not layer.lora_B.grad[3].any() and layer.lora_B.grad[7].any()
        alone = make_layer(padding_idx=3)
        alone(torch.tensor([3])).sum().backward()
        assert not alone.lora_A.grad.any()


class TestTraining:
    def test_gradients(self):
        layer = make_layer().double()
        dense = layer.merged_embedding()
        probe = gaussian(*INDICES.shape, 70, dtype=torch.float64)
        (table,) = torch.autograd.grad((dense(INDICES) * probe).sum(), dense.weight)
        lora_A, lora_B = torch.autograd.grad((layer(INDICES) * probe).sum(), (layer.lora_A, layer.lora_B))
        torch.testing.assert_close(lora_A, layer.lora_B.T @ table, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(lora_B, table @ layer.lora_A.T, rtol=1e-10, atol=1e-12)

    def test_only_the_adapter_learns(self):
        layer, target = make_layer(), gaussian(2, 3, 70)
        before = parameters_of(layer)
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
        (layer(INDICES) - target).square().sum().backward()
        optimizer.step()
        changed = {name for name, tensor in parameters_of(layer).items() if not torch.equal(tensor, before[name])}
        assert changed == {"lora_A", "lora_B"}


class TestConstruction:
    def test_new_layer(self):
        layer = lk.QuantLoRAEmbedding(50, 70, rank=4, dtype=torch.bfloat16)
        assert layer.lora_A.shape == (4, 70) and layer.lora_B.shape == (50, 4) and layer.lora_A.any()
        assert not layer(INDICES).any() and layer(INDICES).dtype == torch.bfloat16

    def test_from_embedding(self):
        embedding = make_embedding().eval()
        before = parameters_of(embedding)
        layer = lk.QuantLoRAEmbedding.from_embedding(embedding)
        assert_unchanged(embedding, before)
        assert layer.rank == 16 and not layer.training
        assert torch.nn.functional.cosine_similarity(layer(INDICES), embedding(INDICES), -1).min() > 0.98

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"max_norm": 1.0}, "max_norm=1.0"), ({"sparse": True}, "sparse"), ({"scale_grad_by_freq": True}, "by_freq")],
        ids=str,
    )
    def test_options_it_cannot_honour(self, options, message):
        embedding = nn.Embedding(50, 70, **options)
        with pytest.raises(ValueError, match=message):
            lk.QuantLoRAEmbedding.from_embedding(embedding)
        model = nn.ModuleDict({"table": embedding, "linear": nn.Linear(64, 64)})
        cfg = lk.QuantConfig(layer_types=("linear", "embedding"), **SMALL)
        assert message in lk.quantize_model(model, cfg, progress=False).skipped["table"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_norm": 2.0}, "max_norm=2.0"),
            ({"padding_idx": 50}, "padding_idx=50"),
            ({"padding_idx": -51}, "padding_idx=-51"),
            ({"padding_idx": 1.5}, "padding_idx=1.5"),
            ({"rank": 51}, "rank=51"),
            ({"num_embeddings": 0}, "=0 must be an integer >= 1"),
            ({"format": "nf9"}, "nf9"),
        ],
        ids=str,
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            lk.QuantLoRAEmbedding(**{"num_embeddings": 50, "embedding_dim": 70, "rank": None, **options})

    def test_takes_embeddings_only(self):
        class Sub(nn.Embedding):
            pass

        for other in (nn.Linear(50, 70), nn.EmbeddingBag(50, 70), Sub(50, 70)):
            with pytest.raises(TypeError, match=type(other).__name__):
                lk.QuantLoRAEmbedding.from_embedding(other)

    def test_not_finite(self):
        embedding = make_embedding()
        embedding.weight.data[3, 7] = float("inf")
        with pytest.raises(ValueError, match="inf in row 3, column 7"):
            lk.QuantLoRAEmbedding.from_embedding(embedding)

    def test_repr(self):
        assert "QuantLoRAEmbedding(50, 70, padding_idx=3, format=nf4" in repr(make_layer(padding_idx=3))

    def test_merged(self):
        layer = make_layer(padding_idx=3).eval()
        merged = layer.merged_embedding()
        assert type(merged) is nn.Embedding and merged.padding_idx == 3 and not merged.training
        torch.testing.assert_close(merged(INDICES), layer(INDICES))


class TestMoves:
    @pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
    def test_dtypes(self, convert):
        layer = make_layer("int4")
        packed = layer.packed.clone()
        getattr(layer, convert)()
        assert same_packed(layer.packed, packed) and layer(INDICES).dtype == layer.lora_A.dtype != torch.float32

    def test_state_dict(self):
        layer = make_layer("int4")
        assert set(layer.state_dict()) == {"codes", "scale", "offset", "codebook", "lora_A", "lora_B", "_extra_state"}
        blank = lk.QuantLoRAEmbedding(50, 70, format="int4", rank=4)
        blank.load_state_dict(layer.state_dict())
        assert torch.equal(blank(INDICES), layer(INDICES))
        assert torch.equal(copy.deepcopy(layer)(INDICES), layer(INDICES))


class TestModels:
    CFG = lk.QuantConfig("int8", layer_types=("linear", "embedding"), **SMALL)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("rank", [None, 4])
    def test_bert_round_trip(self, rank, dtype, tmp_path):
        """Its token types are two rows: packed they would grow, so that they stay dense."""
        model = tiny_bert().to(dtype)
        dense = model(TOKENS).last_hidden_state
        cfg = lk.QuantConfig("int8", rank=rank, num_iter=1, layer_types=("linear", "embedding"))
        report = lk.quantize_model(model, cfg, progress=False)
        assert type(model.embeddings.word_embeddings) is lk.QuantLoRAEmbedding
        assert len(report.layers) == 15 and report.skipped.keys() == {"embeddings.token_type_embeddings"}
        lk.save_quantized(model, tmp_path)
        loaded = lk.load_quantized(tmp_path)
        assert torch.equal(loaded(TOKENS).last_hidden_state, model(TOKENS).last_hidden_state)
        similarity = torch.nn.functional.cosine_similarity(loaded(TOKENS).last_hidden_state.float(), dense.float(), -1)
        assert similarity.min() > 0.998 and loaded.embeddings.word_embeddings.padding_idx == 0

    def test_a_tied_table_is_left(self):
        model = tiny_gpt2()
        report = lk.quantize_model(model, self.CFG, progress=False)
        assert "shared with lm_head.weight" in report.skipped["transformer.wte"]
        assert type(model.transformer.wpe) is lk.QuantLoRAEmbedding

    def test_loaded_into_another_padding(self, tmp_path):
        model = nn.Sequential(make_embedding(3))
        lk.quantize_model(model, self.CFG, progress=False)
        lk.save_quantized(model, tmp_path)
        other = nn.Sequential(make_embedding())
        with pytest.raises(ValueError, match="'0' has {'padding_idx': None}, the checkpoint holds {'padding_idx': 3}"):
            lk.load_quantized(tmp_path, other)
        assert type(other[0]) is nn.Embedding
