"""`QuantizationReport`: every byte of the model is in it, with what it is and why it is dense."""

from __future__ import annotations

import pytest
import torch
from helpers import gaussian, tiny_bert, tiny_gpt2, tiny_model
from torch import nn

import loftq_kernels as lk

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}


def quantize(model: nn.Module, **fields) -> lk.QuantizationReport:
    return lk.quantize_model(model, lk.QuantConfig(**{"rank": 4, "num_iter": 1, **fields}), progress=False)


def bytes_of_model(model: nn.Module) -> int:
    """Parameters and buffers, each once."""
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def of_transformers(name: str, **config) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, name.partition("For")[0].removesuffix("Model") + "Config")(vocab_size=50, **config)
    return getattr(transformers, name)(config).eval()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(64, 64), nn.Linear(64, 64)
        self.token = nn.Parameter(torch.zeros(1, 1, 64))


MODELS = {
    "plain": tiny_model,
    "gpt2": tiny_gpt2,
    "bert": tiny_bert,
    "t5": lambda: of_transformers(
        "T5ForConditionalGeneration", d_model=64, d_kv=32, d_ff=96, num_layers=1, num_heads=2
    ),
    "mixtral": lambda: of_transformers(
        "MixtralForCausalLM", **SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    ),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 128, batch_first=True), 2).eval(),
    "recurrent": Recurrent,
    "half": lambda: tiny_model().bfloat16(),
    "shared": lambda: nn.ModuleList([nn.Linear(64, 64)] * 2 + [nn.BatchNorm1d(64)]),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fields", [{}, {"rank": None}, {"layer_types": ("linear", "embedding", "conv")}], ids=str)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
class TestBytes:
    def test_add_up(self, name, fields):
        """To the model's bytes exactly, by state, each parameter and buffer once and under its own name."""
        model = MODELS[name]()
        report = quantize(model, **fields)
        assert report.model_bytes == bytes_of_model(model)
        states = ("packed", "adapter", "dense", "buffer")
        assert sum(map(report.bytes_of, states)) == report.model_bytes
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert {t.name: (t.shape, t.nbytes, t.trained) for t in report.tensors} == {
            key: (tuple(value.shape), value.nbytes, value.requires_grad) for key, value in named.items()
        }
        assert report.bytes_of("buffer") == sum(buffer.nbytes for buffer in model.buffers())
        assert report.bytes_of("packed") == sum(layer.packed_bytes for layer in report.layers)

    def test_dense_ones_have_reasons(self, name, fields):
        report = quantize(MODELS[name](), **fields)
        assert all(bool(tensor.reason) == (tensor.state == "dense") for tensor in report.tensors)
        dense = sum(tensor.nbytes for tensor in report.left_dense)
        assert report.dense_share == dense / report.model_bytes and f"{report.dense_share:.1%}" in report.summary
        sizes = [tensor.nbytes for tensor in report.left_dense]
        assert sizes == sorted(sizes, reverse=True)


class TestReasons:
    def of(self, report: lk.QuantizationReport, name: str) -> str:
        return next(tensor.reason for tensor in report.tensors if tensor.name == name)

    def test_experts(self):
        """3-D parameters of experts are most of such a model, and no layer."""
        report = quantize(MODELS["mixtral"]())
        experts = [tensor for tensor in report.left_dense if "experts" in tensor.name and len(tensor.shape) == 3]
        assert len(experts) == 4 and all("3-D parameter of MixtralExperts" in tensor.reason for tensor in experts)
        assert sum(t.nbytes for t in experts) == 4 * 2 * 4 * 3 * 64 * 96  # float32, layers, experts, matrices
        assert "experts.gate_up_proj" in report.summary
        assert all(str(tensor) in str(report).splitlines() for tensor in experts)

    @pytest.mark.filterwarnings("ignore:enable_nested_tensor")
    def test_attention_of_torch(self):
        report = quantize(MODELS["encoder"]())
        reason = self.of(report, "layers.0.self_attn.in_proj_weight")
        assert "a 2-D parameter of MultiheadAttention, which is no layer that can be quantized" in reason
        assert "NonDynamicallyQuantizableLinear" in self.of(report, "layers.0.self_attn.out_proj.weight")
        assert "self_attn.in_proj_weight" in str(report)

    def test_the_rest(self):
        report = quantize(Recurrent(), layer_types="linear")
        assert "2-D parameter of LSTM" in self.of(report, "lstm.weight_ih_l0")
        assert "3-D parameter of Recurrent" in self.of(report, "token")
        assert self.of(report, "lstm.bias_ih_l0") == self.of(report, "head.bias") == "a vector"
        model = nn.ModuleDict({"embed": nn.Embedding(64, 64), "a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
        model["c"] = nn.Linear(64, 64)
        report = quantize(model, exclude="a", modules_to_save="b")
        assert self.of(report, "embed.weight") == "layer_types=('linear',) leaves out 'embedding'"
        assert self.of(report, "a.weight") == report.skipped["a"] == "excluded by include/exclude patterns"
        assert "modules_to_save" in self.of(report, "b.weight") and "left dense, trained" not in report.summary
        assert [tensor.name for tensor in report.tensors if tensor.trained] == [
            "b.weight",
            "b.bias",
            "c.lora_A",
            "c.lora_B",
        ]


class TestSummary:
    def test_layers_quantized_before(self):
        model = tiny_model()
        first = quantize(model, include="layers.*")
        assert first.already == [] and "before" not in first.summary
        second = quantize(model, format="nf2")
        assert len(second.layers) == 1 and "1 layers, " in second.summary
        assert second.summary.count("; 4 layers were quantized before; left dense: ") == 1
        third = quantize(model)
        assert third.layers == [] and len(third.already) == 5
        assert third.summary.startswith("5 layers were quantized before; left dense: ")
        assert "mean error" not in third.summary and third.model_bytes == bytes_of_model(model)

    def test_largest_parts_by_name(self):
        """The blocks of a model are one part: names without numbers."""
        model = nn.ModuleDict({"a": nn.Linear(64, 64)})
        model["blocks"] = nn.ModuleList(nn.Embedding(64, 64) for _ in range(3))
        report = quantize(model)
        dense = 3 * 4 * 64 * 64 + 4 * 64
        assert f"{dense / report.model_bytes:.1%} (blocks.weight 48.0 KiB, a.bias 0.2 KiB)" in report.summary

    def test_everything_dense_is_an_error(self):
        with pytest.raises(ValueError, match="no layer to quantize"):
            quantize(nn.Sequential(nn.Linear(4, 512)))


class TestPlan:
    def test_dense(self):
        """The plan names what it does not plan: with biases and norms, without buffers."""
        model = tiny_model()
        cfg = lk.QuantConfig(rank=4, num_iter=1, exclude="head")
        plan = lk.plan_bits(model, 4, ["nf2", "nf4"], cfg, progress=False)
        expected = {key: p.nbytes for key, p in model.named_parameters() if "layers" not in key or "bias" in key}
        assert plan.dense == expected and "head.weight" in plan.dense
        share = sum(expected.values()) / (sum(expected.values()) + sum(plan.bits(n) for n in plan.layers) // 8)
        assert f"left dense: {share:.1%}" in str(plan) and "head.weight" in str(plan)

    def test_layers_below_the_rank(self):
        """No candidate fits the head of 10 rows: the config quantizes it all the same, so that it is not left dense."""
        model, cfg = tiny_model(), lk.QuantConfig(rank=16, num_iter=1)
        with pytest.warns(UserWarning, match=r"leaves out 1 layers .*\(head\).*as cfg says"):
            plan = lk.plan_bits(model, 4, ["nf2", "nf4"], cfg, progress=False)
        report = lk.quantize_model(model, cfg, plan=plan, progress=False)
        assert "head" not in plan.layers and "head" in [layer.name for layer in report.layers]
        dense = {tensor.name: tensor.nbytes for tensor in report.tensors if tensor.state == "dense"}
        assert plan.dense == dense

    def test_after_a_part_was_quantized(self):
        """Packed weights and adapters of layers that were done before are not dense."""
        model = tiny_model()
        quantize(model, include="layers.0.*")
        plan = lk.plan_bits(model, 4, ["nf2", "nf4"], lk.QuantConfig(rank=4, num_iter=1), progress=False)
        assert sorted(plan.layers) == ["head", "layers.1.down", "layers.1.up"]
        assert {name.rpartition(".")[2] for name in plan.dense} == {"bias", "weight"}
        assert [name for name in plan.dense if name.endswith("weight")] == ["norm.weight"]


def test_a_report_of_a_compiled_model_has_plain_names():
    model = tiny_model()
    report = quantize(torch.compile(model, backend="eager"))
    assert {tensor.name for tensor in report.tensors} == {*dict(model.named_parameters()), *dict(model.named_buffers())}
    assert model(gaussian(2, 64)).shape == (2, 10)
