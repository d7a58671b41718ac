"""PEFT on quantized layers computes what PEFT computes on a dense twin: forward, gradients, merging, files.

The twin is the same model with each quantized layer as `merged_linear`: the decoded weight, start adapter included.
"""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache

import pytest
import torch
from helpers import gaussian
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import loftq_kernels as lk

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from loftq_kernels.integrations import peft as ours  # noqa: E402
from loftq_kernels.integrations import peft_dora  # noqa: E402
from loftq_kernels.integrations.peft_layers import LoraQuantizedLinear  # noqa: E402

IDS = torch.randint(0, 128, (4, 7), generator=torch.Generator().manual_seed(0))
CONFIG = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
pytestmark = pytest.mark.filterwarnings(
    "ignore:merging adapters into quantized layers", "ignore::peft.utils.PeftWarning"
)


def llama(dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIG, **HEADS, **options)
    return transformers.LlamaForCausalLM(config).eval().to(dtype)


def quantized(model: nn.Module, **options) -> nn.Module:
    lk.quantize_model(model, lk.QuantConfig(**{"rank": 4, "lora_alpha": 8, **options}), progress=False)
    return model


def twin(model: nn.Module) -> nn.Module:
    """The model with dense copies of its quantized layers, frozen or not as they are."""
    dense = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if hasattr(layer, "dense_copy"):
            dense.set_submodule(name, getattr(layer, layer.dense_copy)())
    return dense


@cache
def _models() -> tuple[nn.Module, nn.Module]:
    model = quantized(llama(attention_bias=True))
    return model, twin(model)


def models() -> tuple[nn.Module, nn.Module]:
    """A quantized model and its dense twin, to be changed."""
    return copy.deepcopy(_models())


def lora(**options) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **options})


def fill(*wrapped: nn.Module) -> None:
    """Give models the same random values for everything that PEFT trains; magnitudes stay near their start."""
    values = {}
    for model in wrapped:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in sorted(model.named_parameters()):
            if any(part in name for part in ("lora_A.", "lora_B.", "lora_embedding_", "lora_magnitude")):
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                start = parameter.detach() if "magnitude" in name else 0
                parameter.data.copy_(values.setdefault(name, start + noise))


def wrapped(*configs: peft.LoraConfig, pair: tuple[nn.Module, nn.Module] | None = None) -> list[nn.Module]:
    """Both models with adapters "default", "a1", "a2", ... of the same values, in eval mode."""
    made = []
    for model in pair or models():
        model = peft.get_peft_model(model, copy.deepcopy(configs[0]))
        for i, config in enumerate(configs[1:]):
            model.add_adapter(f"a{i + 1}", copy.deepcopy(config))
        made.append(model.eval())
    fill(*made)
    return made


def close(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def agree(mine: nn.Module, theirs: nn.Module, **kwargs) -> Tensor:
    logits = mine(IDS, **kwargs).logits
    close(logits, theirs(IDS, **kwargs).logits)
    return logits


class Ops(TorchDispatchMode):
    """Counts the calls of this package's ops."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "loftq_kernels":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


LORAS = {
    "suffixes": {},
    "a pattern": {"target_modules": r".*layers\.1\..*(q|up)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 32}},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "mica": {"init_lora_weights": "mica"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "layers": {"layers_to_transform": [1]},
    "trained biases": {"bias": "lora_only", "target_modules": ["q_proj"]},
    "a head": {"modules_to_save": ["lm_head"]},
}


class TestOneAdapter:
    @pytest.mark.parametrize("options", LORAS.values(), ids=LORAS)
    def test_forward_gradients_and_merging(self, options):
        mine, theirs = wrapped(lora(**options))
        logits = agree(mine, theirs)
        trained = []
        for model in (mine, theirs):
            model(IDS, labels=IDS).loss.backward()
            trained.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        assert trained[0].keys() == trained[1].keys() and trained[0]
        for name, gradient in trained[0].items():
            close(gradient, trained[1][name])
        merged = mine.merge_and_unload()
        close(agree(merged, theirs.merge_and_unload()), logits)
        assert type(merged.model.layers[1].self_attn.q_proj) is nn.Linear

    @pytest.mark.parametrize("dora", [False, True])
    def test_dropout(self, dora):
        """The adapter sees dropout(x), base and start adapter see x: the same numbers are dropped as in PEFT."""
        mine, theirs = wrapped(lora(lora_dropout=0.5, use_dora=dora))
        results = []
        for model in (mine, theirs):
            torch.manual_seed(3)
            loss = model.train()(IDS, labels=IDS).loss
            loss.backward()
            results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
            model.eval()
        for a, b in zip(*results, strict=True):
            close(a, b)
        agree(mine, theirs)

    def test_a_disabled_start_adapter(self):
        """What the layer computes is the base, whatever it is."""
        model, _ = models()
        for layer in (m for m in model.modules() if isinstance(m, lk.QuantLoRALinear)):
            layer.disable_adapter()
        agree(*wrapped(lora(use_dora=True), pair=(model, twin(model))))

    @pytest.mark.parametrize(
        "options", [{"rank": None}, {"adapter": "qalora"}, {"format": "nf2", "init": "qlora"}], ids=str
    )
    def test_other_bases(self, options):
        model = quantized(llama(), **options)
        mine, theirs = wrapped(lora(), lora(use_dora=True), pair=(model, twin(model)))
        for active in ("default", ["default", "a1"]):
            for adapted in (mine, theirs):
                adapted.base_model.set_adapter(active)
            agree(mine, theirs)
        agree(mine.merge_and_unload(), theirs.merge_and_unload())

    def test_the_base_is_frozen_and_not_saved(self):
        mine, theirs = wrapped(lora())
        assert not [name for name, p in mine.named_parameters() if p.requires_grad and "base_layer" in name]
        a, b = (peft.get_peft_model_state_dict(model) for model in (mine, theirs))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    def test_all_linear_leaves_the_head(self):
        model = quantized(llama(), quantize_head=True)
        assert isinstance(model.lm_head, lk.QuantLoRALinear)
        config = peft.get_peft_model(model, lora(target_modules="all-linear")).peft_config["default"]
        assert len(config.target_modules) == 14 and not any("head" in name for name in config.target_modules)

    def test_all_linear_leaves_the_head_of_a_classifier(self):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**CONFIG, **HEADS, pad_token_id=0)
        model = quantized(transformers.LlamaForSequenceClassification(config), quantize_head=True)
        assert isinstance(model.score, lk.QuantLoRALinear)
        assert ours._heads(model, lora(task_type="SEQ_CLS")) == {model.score}

    def test_bfloat16(self):
        """The adapter stays float32, as PEFT has it; outputs are off by roundings of bfloat16."""
        model = quantized(llama(torch.bfloat16))
        mine, theirs = wrapped(lora(), lora(use_dora=True), pair=(model, twin(model)))
        for name in ("default", "a1"):
            logits = [m(IDS).logits for m in (mine, theirs) if m.set_adapter(name) is None]
            assert logits[0].dtype == torch.bfloat16
            assert (logits[0] - logits[1]).norm() < 0.02 * logits[1].norm()
        assert {p.dtype for name, p in mine.named_parameters() if "lora_" in name} == {torch.float32}
        assert mine.merge_and_unload().model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16

    def test_autocast(self):
        """Products in bfloat16, norms of DoRA in float32."""
        mine, theirs = wrapped(lora(), lora(use_dora=True))
        for name in ("default", "a1"):
            with torch.autocast("cpu", torch.bfloat16):
                logits = [m(IDS).logits.float() for m in (mine, theirs) if m.set_adapter(name) is None]
            assert (logits[0] - logits[1]).norm() < 0.02 * logits[1].norm()

    @pytest.mark.parametrize("dora", [False, True])
    def test_a_start_adapter_that_is_trained_too(self, dora):
        """Its gradients and PEFT's, from the one product and from products one by one, which a hook asks for."""
        found = []
        for hooked in (False, True):
            model = peft.get_peft_model(models()[0], lora(target_modules="all-linear", use_dora=dora)).train()
            fill(model)
            lk.train_only_adapters(model)
            if hooked:
                for layer in (m for m in model.modules() if isinstance(m, lk.QuantLoRALinear)):
                    layer.register_forward_hook(lambda *args: None)
            model(IDS, labels=IDS).loss.backward()
            found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        assert found[0].keys() == found[1].keys() and len(found[0]) == (70 if dora else 56)
        for name, gradient in found[0].items():
            close(gradient, found[1][name])

    def test_status(self):
        mine, _ = wrapped(lora())
        status = mine.get_model_status()
        assert status.enabled is True and status.active_adapters == ["default"] and not status.merged_adapters
        assert {layer.module_type for layer in mine.get_layer_status()} == {"lora.LoraQuantizedLinear"}

    def test_a_transposed_layer(self):
        """GPT-2's Conv1D [in, out]: PEFT's fan_in_fan_out is of the dense layer, ours holds [out, in]."""
        torch.manual_seed(0)
        config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=128, n_positions=16)
        dense = transformers.GPT2LMHeadModel(config).eval()
        model = quantized(copy.deepcopy(dense))
        for name, layer in model.named_modules():
            if isinstance(layer, lk.QuantLoRALinear):
                dense.get_submodule(name).weight.data = layer.dense_weight().T.contiguous()
        options = lora(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)
        mine, theirs = wrapped(options, pair=(model, dense))
        agree(mine, theirs)
        agree(mine.merge_and_unload(), theirs.merge_and_unload())

    def test_eva(self):
        """Its start is computed from the inputs of the layers, which are the twin's."""
        data = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}] * 2
        found = []
        for model in models():
            model = peft.get_peft_model(model, lora(init_lora_weights="eva", eva_config=peft.EvaConfig()))
            peft.initialize_lora_eva_weights(model, data, show_progress_bar=False)
            found.append(model.base_model.model.model.layers[1].mlp.down_proj.lora_A["default"].weight.abs())
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)

    def test_compiled(self):
        mine, _ = wrapped(lora(use_dora=True))
        with torch.no_grad():
            expected = mine(IDS).logits
            torch._dynamo.reset()
            close(torch.compile(mine, backend="eager", fullgraph=True)(IDS).logits, expected)

    def test_a_hook_on_the_base_is_called(self):
        """Calibration and offloading hook the layer: it is then called as it would be without PEFT."""
        mine, theirs = wrapped(lora())
        seen = []
        layer = mine.base_model.model.model.layers[0].self_attn.q_proj.base_layer
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
        agree(mine, theirs)
        assert len(seen) == 1


class TestSeveralAdapters:
    CONFIGS = (lora(), lora(target_modules=["q_proj", "k_proj"], r=2), lora(use_dora=True), lora(lora_dropout=0.5))

    @pytest.mark.parametrize(
        "names", [["a1"], ["default", "a1"], ["default", "a2"], ["a2", "a1"], ["a2", "default", "a1", "a3"]]
    )
    def test_at_once(self, names):
        mine, theirs = wrapped(*self.CONFIGS)
        for model in (mine, theirs):
            model.base_model.set_adapter(names)
        logits = agree(mine, theirs)
        for model in (mine, theirs):
            model.merge_adapter()
        assert torch.equal(agree(mine, theirs), logits), "merging notes the adapters, and changes no bit"
        for model in (mine, theirs):
            model.unmerge_adapter()
        assert torch.equal(agree(mine, theirs), logits)
        close(agree(mine.merge_and_unload(), theirs.merge_and_unload()), logits)

    def test_in_training_with_dropout_in_some(self):
        mine, theirs = wrapped(*self.CONFIGS)
        losses = []
        for model in (mine, theirs):
            model.base_model.set_adapter(["a3", "default", "a1"])
            torch.manual_seed(5)
            losses.append(model.train()(IDS, labels=IDS).loss)
        close(*losses)

    def test_life_of_adapters(self):
        mine, theirs = wrapped(*self.CONFIGS)
        base = models()[0](IDS).logits

        def both(method: str, *args, **kwargs) -> Tensor:
            for model in (mine, theirs):
                getattr(model, method)(*args, **kwargs)
            return agree(mine, theirs)

        with mine.disable_adapter():
            assert torch.equal(mine(IDS).logits, base)
        both("set_adapter", "a2")
        both("delete_adapter", "a2")
        both("add_weighted_adapter", ["default", "a1"], [0.7, -0.4], "cat", combination_type="cat")
        both("set_adapter", "cat")
        both("add_weighted_adapter", ["default", "a3"], [0.7, 0.4], "sum", combination_type="linear")
        both("set_adapter", "sum")
        both("merge_adapter", ["a1"])
        both("set_adapter", "default")  # which unmerges, with a warning
        both("merge_adapter", ["default"])
        with mine.disable_adapter():  # unmerges, too
            assert torch.equal(mine(IDS).logits, base)
        both("merge_adapter", ["default"])
        agree(mine.unload(), theirs.unload())  # what was merged stays

    def test_unloading_leaves_the_quantized_layers(self):
        mine, _ = wrapped(lora())
        model = mine.unload()
        assert isinstance(model.model.layers[0].self_attn.q_proj, lk.QuantLoRALinear)
        assert torch.equal(model(IDS).logits, models()[0](IDS).logits)

    def test_an_adapter_that_is_written_to(self):
        """Values that are kept between calls are made anew when an adapter changes, by whatever PEFT does to it."""
        mine, theirs = wrapped(*self.CONFIGS)
        for model in (mine, theirs):
            model.base_model.set_adapter(["a2", "default"])
        before = agree(mine, theirs)
        state = {key: 2 * value for key, value in peft.get_peft_model_state_dict(theirs, adapter_name="a2").items()}
        for model in (mine, theirs):
            peft.set_peft_model_state_dict(model, state, adapter_name="a2")
        changed = agree(mine, theirs)
        assert not torch.allclose(before, changed)
        for model in (mine, theirs):
            for layer in model.modules():
                if hasattr(layer, "set_scale"):
                    layer.set_scale("a2", 3)
                    layer.set_scale("default", 3)
        assert not torch.allclose(agree(mine, theirs), changed)

    def test_after_training(self):
        mine, theirs = wrapped(lora(use_dora=True))
        agree(mine, theirs)
        for model in (mine, theirs):
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1)
            for _ in range(2):
                model.train()(IDS, labels=IDS).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            model.eval()
        agree(mine, theirs)


class TestRows:
    """An adapter for each row of a batch."""

    NAMES = ["default", "__base__", "a1", "default"]

    def test_forward_and_generate(self):
        mine, theirs = wrapped(*TestSeveralAdapters.CONFIGS[:2])
        logits = agree(mine, theirs, adapter_names=self.NAMES)
        for row, name in enumerate(self.NAMES):
            with torch.no_grad(), mine.disable_adapter() if name == "__base__" else torch.no_grad():
                mine.set_adapter(name if name != "__base__" else "default")
                close(mine(IDS).logits[row], logits[row])
        options = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False}
        for beams in (1, 2):
            mixed = (
                m.generate(**options, num_beams=beams, adapter_names=self.NAMES, pad_token_id=0) for m in (mine, theirs)
            )
            assert torch.equal(*mixed)

    def test_with_gradients(self):
        """The one op has none: rows of each adapter are then computed by themselves."""
        mine, theirs = wrapped(*TestSeveralAdapters.CONFIGS[:2])
        close(mine(IDS, adapter_names=self.NAMES).logits, theirs(IDS, adapter_names=self.NAMES).logits)

    @pytest.mark.parametrize("rank", [None, 4])
    def test_without_a_start_adapter(self, rank):
        model = quantized(llama(), rank=rank)
        mine, theirs = wrapped(*TestSeveralAdapters.CONFIGS[:2], pair=(model, twin(model)))
        for names in (self.NAMES, ["__base__"] * 4, ["a1"] * 4):
            agree(mine, theirs, adapter_names=names)

    def test_refusals_of_peft(self):
        mine, _ = wrapped(*TestSeveralAdapters.CONFIGS)
        for names, message in ((["a2"] * 4, "DoRA"), (["nobody"] * 4, "non-existing"), (["default"], "Length")):
            with pytest.raises(ValueError, match=message):
                mine(IDS, adapter_names=names)


class TestOneProduct:
    """Base, start adapter and all active adapters are one call of the op per layer."""

    CONFIGS = tuple(lora(target_modules="all-linear", **options) for options in ({}, {"r": 2}, {"use_dora": True}))
    LAYERS = 14

    def model(self, *names: str) -> nn.Module:
        model = peft.get_peft_model(models()[0], copy.deepcopy(self.CONFIGS[0])).eval()
        for i, config in enumerate(self.CONFIGS[1:]):
            model.add_adapter(f"a{i + 1}", copy.deepcopy(config))
        fill(model)
        model.base_model.set_adapter(list(names))
        return model

    @pytest.mark.parametrize("names", [["default"], ["default", "a1"], ["default", "a2", "a1"]])
    def test_in_inference(self, names):
        model = self.model(*names)
        with torch.no_grad():
            model(IDS)  # norms of DoRA are kept from now on
            with Ops() as ops:
                model(IDS)
        assert ops.calls == {"qlora_linear": self.LAYERS}

    def test_in_training(self):
        model = self.model("default", "a1").train()
        with Ops() as ops:
            model(IDS)
        assert ops.calls == {"qlora_linear": self.LAYERS}

    def test_dora_in_training(self):
        """One more product, of r rows, for the norm; the base is decoded once."""
        model = self.model("a2").train()
        model(IDS)
        with Ops() as ops:
            model(IDS)
        assert ops.calls == {"qlora_linear": 2 * self.LAYERS}

    def test_rows(self):
        model = self.model("default")
        with torch.no_grad(), Ops() as ops:
            model(IDS, adapter_names=TestRows.NAMES)
        assert ops.calls == {"qlora_linear_multi": self.LAYERS}


class TestDora:
    def test_norms(self, monkeypatch):
        """||W + s B A|| by rows, against float64, in blocks of 7 rows, also where W is written to."""
        monkeypatch.setattr(peft_dora, "_BLOCK", 7 * 64)
        layer = lk.QuantLoRALinear.from_linear(nn.Linear(64, 33))
        module = LoraQuantizedLinear(layer, "default", config=lora(use_dora=True), r=4, lora_alpha=8)
        for parameter in (module.lora_A["default"].weight, module.lora_B["default"].weight):
            nn.init.normal_(parameter)
        for change in (lambda: None, layer.disable_adapter, lambda: layer.load_state_dict(self.other().state_dict())):
            with torch.no_grad():
                change()
                weight = layer.dense_weight().double() + module.get_delta_weight("default").double()
                norm = module.lora_magnitude_vector["default"].weight / peft_dora.dora_scale(module, "default")
            torch.testing.assert_close(norm.double(), weight.norm(dim=1), rtol=1e-6, atol=0)

    @staticmethod
    def other() -> lk.QuantLoRALinear:
        torch.manual_seed(9)
        return lk.QuantLoRALinear.from_linear(nn.Linear(64, 33))

    def test_a_new_one_changes_nothing(self):
        model, _ = models()
        before = model(IDS).logits
        close(peft.get_peft_model(model, lora(use_dora=True))(IDS).logits, before)


class TestMerging:
    def test_requantized(self):
        """Quantized again as LoftQ does it: the format, group size and rank of the base, off by its error."""
        mine, _ = wrapped(lora(use_dora=True))
        with torch.no_grad():
            logits = mine(IDS).logits
            before = mine.base_model.model.model.layers[0].self_attn.q_proj.base_layer
            model = ours.merge_and_unload(mine, requantize=True)
            after = model.model.layers[0].self_attn.q_proj
            assert isinstance(after, lk.QuantLoRALinear) and after.bias is not None
            for name in ("rank", "group_size", "format", "dtype"):
                assert getattr(after, name) == getattr(before, name)
            off = (model(IDS).logits - logits).norm() / logits.norm()
        assert 1e-4 < off < 0.15

    @pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
    @pytest.mark.parametrize("requantize", [False, True])
    def test_saved_by_transformers(self, tmp_path, targets, requantize):
        """Dense, partly dense or quantized again: config.json says what the tensors are."""
        mine, _ = wrapped(lora(target_modules=targets))
        model = ours.merge_and_unload(mine, requantize=requantize)
        model.save_pretrained(tmp_path)
        dense = targets == "all-linear" and not requantize
        assert ("quantization_config" in (tmp_path / "config.json").read_text()) != dense
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)

    def test_says_that_it_is_dense(self):
        mine, _ = wrapped(lora())
        with pytest.warns(UserWarning, match=r"exact and takes the memory of a dense model.*requantize=True"):
            ours.merge_and_unload(mine)

    def test_takes_a_model_of_peft(self):
        with pytest.raises(TypeError, match="takes a PeftModel.* got LlamaForCausalLM"):
            ours.merge_and_unload(models()[0])

    def test_some_adapters(self):
        mine, theirs = wrapped(*TestSeveralAdapters.CONFIGS)
        merged = [model.merge_and_unload(adapter_names=["a1"]) for model in (mine, theirs)]
        agree(*merged)
        assert isinstance(merged[0].model.layers[0].mlp.down_proj, lk.QuantLoRALinear), "has no adapter 'a1'"

    def test_what_is_not_finite(self):
        mine, _ = wrapped(lora())
        mine.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.data[0] = torch.nan
        for merge in (mine.merge_adapter, mine.merge_and_unload):
            with pytest.raises(ValueError, match="NaNs detected"):
                merge(safe_merge=True)

    def test_a_bias_without_one(self):
        mine, _ = wrapped(lora(lora_bias=True))
        with pytest.raises(RuntimeError, match="base layer has no bias"):
            mine.merge_adapter()

    def test_activated_lora(self):
        """aLoRA acts on the last tokens alone, and cannot be merged."""
        options = lora(alora_invocation_tokens=[5], task_type="CAUSAL_LM")
        mine, theirs = wrapped(options)
        logits = agree(mine, theirs, alora_offsets=[3, 0, None, 7])
        assert not torch.allclose(logits, models()[0](IDS).logits)
        with pytest.raises(NotImplementedError, match="aLoRA does not support merging"):
            mine.merge_adapter()


class TestFiles:
    @pytest.mark.parametrize("dora", [False, True])
    @pytest.mark.parametrize("low", [False, True])
    def test_to_and_from_a_dense_model(self, tmp_path, dora, low):
        mine, theirs = wrapped(lora(use_dora=dora))
        theirs.save_pretrained(tmp_path / "theirs")
        mine.save_pretrained(tmp_path / "mine")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "mine" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
        model, dense = models()
        loaded = peft.PeftModel.from_pretrained(model, tmp_path / "theirs", low_cpu_mem_usage=low)
        agree(loaded, theirs)
        agree(mine, peft.PeftModel.from_pretrained(dense, tmp_path / "mine", low_cpu_mem_usage=low))

    def test_of_a_saved_base(self, tmp_path):
        """The adapter's file names the folder of its base, and each of the usual ways loads both."""
        models()[0].save_pretrained(tmp_path / "base")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        mine = peft.get_peft_model(base, lora(target_modules="all-linear"))
        fill(mine)
        mine.eval().save_pretrained(tmp_path / "adapter")
        expected = mine(IDS).logits
        for cls in (transformers.AutoModelForCausalLM, peft.AutoPeftModelForCausalLM):
            assert torch.equal(cls.from_pretrained(tmp_path / "adapter")(IDS).logits, expected)

    def test_a_second_one(self, tmp_path):
        mine, theirs = wrapped(*TestSeveralAdapters.CONFIGS)
        theirs.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(models()[0], tmp_path, adapter_name="first")
        loaded.load_adapter(tmp_path / "a1", adapter_name="second")
        for model, name in ((loaded, "second"), (theirs, "a1")):
            model.set_adapter(name)
        agree(loaded, theirs)

    def test_methods_of_transformers(self, tmp_path):
        """model.add_adapter, load_adapter and theirs, without a PeftModel."""
        mine, theirs = models()
        before = mine(IDS).logits
        for model in (mine, theirs):
            model.add_adapter(lora())
        fill(mine, theirs)
        agree(mine, theirs)
        assert mine.get_adapter_state_dict().keys() == theirs.get_adapter_state_dict().keys()
        theirs.save_pretrained(tmp_path)
        again = models()[0]
        again.load_adapter(str(tmp_path))
        agree(again, theirs)
        mine.disable_adapters()
        assert torch.equal(mine(IDS).logits, before)
        mine.enable_adapters()
        mine.delete_adapter("default")
        assert torch.equal(mine(IDS).logits, before)

    @pytest.mark.parametrize("prepared", [False, True])
    def test_hot_swapping(self, tmp_path, prepared):
        """Another adapter's values in the memory of one, a smaller one with zeros where it was prepared for that."""
        from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

        configs = lora(), lora(r=2) if prepared else lora()
        for i, config in enumerate(configs):
            torch.manual_seed(i)
            config.init_lora_weights = False
            peft.get_peft_model(models()[1], config).save_pretrained(tmp_path / str(i))
        swapped = []
        for model in models():
            model = peft.PeftModel.from_pretrained(model, tmp_path / "0")
            if prepared:
                prepare_model_for_compiled_hotswap(model, target_rank=4)
            swapped.append(model)
        before = agree(*swapped)
        for model in swapped:
            hotswap_adapter(model, tmp_path / "1", "default")
        after = agree(*swapped)
        assert not torch.allclose(before, after)
        with torch.no_grad():
            close(after, peft.PeftModel.from_pretrained(models()[0], tmp_path / "1")(IDS).logits)

    def test_inject_adapter_in_model(self):
        mine, theirs = (peft.inject_adapter_in_model(lora(), model) for model in models())
        fill(mine, theirs)
        agree(mine, theirs)


class Net(nn.Module):
    """An embedding, convolutions and a linear layer."""

    def __init__(self):
        super().__init__()
        self.table, self.one = nn.Embedding(30, 16, padding_idx=0), nn.Conv1d(16, 8, 3, padding=1)
        self.two, self.linear = nn.Conv2d(4, 6, 2), nn.Linear(36, 12)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.one(self.table(ids).mT)
        return self.linear(self.two(x.unflatten(1, (4, 2))).flatten(1))


class TestOtherLayers:
    def pair(self) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        model = quantized(Net(), rank=2, layer_types=("linear", "embedding", "conv"), exclude=()).eval()
        assert len([m for m in model.modules() if hasattr(m, "dense_copy")]) == 4
        return model, twin(model)

    @pytest.mark.parametrize("dora", [False, True])
    def test_forward_gradients_and_merging(self, dora):
        ids = IDS % 30
        targets = ["table", "one", "two", "linear"]
        mine, theirs = wrapped(lora(r=2, target_modules=targets, use_dora=dora), pair=self.pair())
        results = []
        for model in (mine, theirs):
            y = model(ids)
            y.square().sum().backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            results.append((y, gradients))
        close(results[0][0], results[1][0])
        assert results[0][1].keys() == results[1][1].keys()
        for name, gradient in results[0][1].items():
            torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-4, atol=1e-4)
        if not dora:
            names = ["default", "__base__", "default", "default"]
            close(mine(ids, adapter_names=names), theirs(ids, adapter_names=names))
        mine.merge_adapter()
        close(mine(ids), results[0][0])
        with mine.disable_adapter():
            close(mine(ids), self.pair()[0](ids))
        merged = mine.merge_and_unload()
        close(merged(ids), theirs.merge_and_unload()(ids))
        assert [type(m) for m in merged.children()] == [nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Linear]

    def test_a_targeted_embedding_is_saved_as_an_adapter(self, tmp_path):
        model = quantized(llama(), layer_types=("linear", "embedding"))
        assert isinstance(model.model.embed_tokens, lk.QuantLoRAEmbedding)
        dense, again = twin(model), twin(model)
        mine, theirs = wrapped(lora(target_modules=["embed_tokens", "q_proj"]), pair=(model, dense))
        with pytest.warns(UserWarning, match="save_embedding_layers"):
            mine.save_pretrained(tmp_path)
        agree(peft.PeftModel.from_pretrained(again, tmp_path), theirs)

    def test_requantized(self):
        mine, _ = wrapped(lora(r=2, target_modules=["table", "one", "two"]), pair=self.pair())
        before = [type(m) for m in mine.get_base_model().children()]
        model = ours.merge_and_unload(mine, requantize=True)
        assert all(hasattr(m, "dense_copy") for m in model.children()) and before != [type(m) for m in model.children()]


def _group(model: nn.Module) -> lk.QuantLoRALinearGroup:
    attention = model.model.layers[0].self_attn
    return lk.QuantLoRALinearGroup([attention.q_proj, attention.k_proj])


REFUSED = {
    "pissa": (
        {"init_lora_weights": "pissa"},
        r"init_lora_weights='pissa' rewrites the base weight.*QuantConfig\(init=",
    ),
    "pissa_niter_4": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    "olora": ({"init_lora_weights": "olora"}, "use one of .*gaussian"),
    "corda": ({"init_lora_weights": "corda"}, "'corda'"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "'lora_ga'"),
    "qalora": ({"use_qalora": True}, r"use_qalora=True is for GPTQ.*adapter='qalora'"),
    "velora": ({"velora_config": peft.VeloraConfig()}, "velora_config is not supported.*QuantConfig"),
    "parameters": ({"target_parameters": ["v_proj.lora_A"]}, "target_parameters names 'lora_A'.*target_modules"),
    "modules": ({"modules_to_save": ["up_proj"]}, "modules_to_save='up_proj' would train all of .*packed weight"),
    "a block": ({"modules_to_save": ["mlp"]}, r"'model\.layers\.0\.mlp', which holds a QuantLoRALinear"),
}
TARGETS = {"target_modules": ["q_proj", "v_proj"]}
OTHER_TUNERS = {
    "IA3Config": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "AdaLoraConfig": {"total_step": 10, **TARGETS},
    "OFTConfig": {"oft_block_size": 4, **TARGETS},
    "BOFTConfig": {"boft_block_size": 4, **TARGETS},
    "VBLoRAConfig": {"num_vectors": 4, "vector_length": 8, "topk": 2, **TARGETS},
    "FourierFTConfig": {"n_frequency": 5, **TARGETS},
    "C3AConfig": {"block_size": 4, **TARGETS},
    "PolyConfig": {"n_tasks": 2, **TARGETS},
    **dict.fromkeys(("LoHaConfig", "LoKrConfig", "VeraConfig", "HRAConfig", "MissConfig", "RandLoraConfig"), TARGETS),
    **dict.fromkeys(
        ("ShiraConfig", "RoadConfig", "DeloraConfig", "GraloraConfig", "WaveFTConfig", "OSFConfig"), TARGETS
    ),
}
PROMPTS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
BESIDE_OUR_LAYERS = {
    "LNTuningConfig": {"target_modules": ["input_layernorm"]},
    "PromptTuningConfig": PROMPTS,
    "PrefixTuningConfig": PROMPTS,
    "PromptEncoderConfig": {**PROMPTS, "encoder_hidden_size": 16},
    "TrainableTokensConfig": {"token_indices": [1, 2], "target_modules": ["embed_tokens"]},
}


class TestRefusals:
    @pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
    def test_of_a_config(self, options, message):
        with pytest.raises(ValueError, match=message):
            peft.get_peft_model(models()[0], lora(**options))

    def test_of_a_second_adapter(self):
        mine, _ = wrapped(lora())
        with pytest.raises(ValueError, match="pissa"):
            mine.add_adapter("second", lora(init_lora_weights="pissa"))

    def test_of_a_group(self):
        """Its product would leave the adapter out; without the group the layers take one."""
        model = models()[0]
        group = _group(model)
        with pytest.raises(ValueError, match="QuantLoRALinearGroup cannot have PEFT's adapters.*one by one"):
            peft.get_peft_model(model, lora())
        del group
        peft.get_peft_model(model, lora())

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("name", OTHER_TUNERS)
    def test_of_other_tuners(self, name):
        """None computes with our layers as if they were dense: each says that it cannot."""
        config = getattr(peft, name)(**OTHER_TUNERS[name])
        with pytest.raises(
            (ValueError, TypeError), match="not supported|No layers types compatible|has put no adapter"
        ):
            peft.get_peft_model(models()[0], config)

    @pytest.mark.parametrize("name", BESIDE_OUR_LAYERS)
    def test_of_no_tuner_that_leaves_our_layers_alone(self, name):
        pair = []
        for model in models():
            torch.manual_seed(4)
            pair.append(peft.get_peft_model(model, getattr(peft, name)(**BESIDE_OUR_LAYERS[name])).eval())
        agree(*pair)

    def test_of_an_old_peft(self, monkeypatch):
        monkeypatch.setattr(ours, "version", lambda package: "0.20.1")
        with pytest.raises(ImportError, match=r"peft 0\.20\.1 is too old: pip install 'peft>=0\.21'"):
            ours.register()


class TestPreparation:
    def test_for_kbit_training(self):
        model = quantized(llama(torch.bfloat16), adapter_dtype=torch.bfloat16)
        layers = [m for m in model.modules() if isinstance(m, lk.QuantLoRALinear)]
        before = [[(p, p.dtype, p.requires_grad) for p in layer.parameters()] for layer in layers]
        prepared = peft.prepare_model_for_kbit_training(model)
        assert prepared is model and not hasattr(model, "is_loaded_in_4bit")
        for layer, kept in zip(layers, before, strict=True):
            now = list(layer.parameters())
            assert all(p is q and p.dtype == d and p.requires_grad == r for p, (q, d, r) in zip(now, kept, strict=True))
        for module in (model.model.norm, model.lm_head, model.model.embed_tokens):
            assert module.weight.dtype == torch.float32 and not module.weight.requires_grad
        assert model.model.layers[0].gradient_checkpointing and model.get_input_embeddings()(IDS).requires_grad
        adapted = peft.get_peft_model(model, lora()).train()
        adapted(IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)

    def test_of_a_dense_model_is_as_before(self):
        model = peft.prepare_model_for_kbit_training(llama(torch.bfloat16))
        assert {p.dtype for p in model.parameters()} == {torch.float32}


class TestTrl:
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "config", [lora(target_modules="all-linear", task_type="CAUSAL_LM"), None], ids=["peft", "own"]
    )
    def test_sft(self, tmp_path, dtype, config):
        """SFTTrainer trains PEFT's adapters, or the start adapters, and saves PEFT's."""
        trl = pytest.importorskip("trl")
        datasets = pytest.importorskip("datasets")
        tokenizers = pytest.importorskip("tokenizers")
        vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", *(f"w{i}" for i in range(20))])}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
        text = [" ".join(f"w{(i + j) % 20}" for j in range(8)) for i in range(20)]
        model = quantized(llama(dtype))
        lk.train_only_adapters(model)
        arguments = trl.SFTConfig(
            tmp_path,
            max_steps=6,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        data = datasets.Dataset.from_dict({"text": text})
        trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=fast, peft_config=config)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0] - 0.05
        names = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert len(names) == 28 and all((".default." in name) == (config is not None) for name in names)
        if config is not None:
            trainer.save_model(tmp_path / "saved")
            loaded = peft.PeftModel.from_pretrained(quantized(llama(dtype)), tmp_path / "saved")
            assert torch.equal(loaded(IDS).logits, trainer.model.eval()(IDS).logits)


def test_layers_apart_from_models():
    """`forward` of one layer against the formula in float64."""
    layer = lk.QuantLoRALinear.from_linear(nn.Linear(130, 33))
    model = peft.get_peft_model(nn.ModuleDict({"up": layer}), lora(target_modules=["up"], lora_alpha=12))
    fill(model)
    x, wrapper = gaussian(5, 130), model.base_model.model["up"]
    lora_A, lora_B, scaling = wrapper.factors("default")
    weight = layer.dense_weight().double() + scaling * lora_B.double() @ lora_A.double()
    expected = x.double() @ weight.T + layer.bias.double()
    assert scaling == 3 and isinstance(wrapper, LoraQuantizedLinear)
    torch.testing.assert_close(wrapper(x).double(), expected, rtol=1e-5, atol=1e-5)
