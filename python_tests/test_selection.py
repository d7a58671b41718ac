"""Which layers are quantized: patterns, output heads, modules_to_save, PEFT's parts, what a layer carries, its size."""

from __future__ import annotations

import gc
import re
import weakref

import pytest
import torch
from helpers import TOKENS, gaussian, parameters_of, tiny_model
from torch import nn
from torch.nn.utils import prune

import loftq_kernels as lk
from loftq_kernels.models import convert
from loftq_kernels.nn.base import QuantLoRAModule

LAYERS = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "head"]


def quantize(model: nn.Module, freeze: bool = True, **fields) -> lk.QuantizationReport:
    cfg = lk.QuantConfig(**{"rank": 4, "num_iter": 1, **fields})
    return lk.quantize_model(model, cfg, progress=False, freeze=freeze)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def causal(name: str, **changes) -> nn.Module:
    """A tiny model of transformers with an untied head."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name.startswith("T5"):
        sizes = {"d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 1, "num_heads": 2}
    config = getattr(transformers, name.partition("For")[0] + "Config")(
        vocab_size=50, **{"tie_word_embeddings": False, **sizes, **changes}
    )
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


class TestPatterns:
    @pytest.mark.parametrize("wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"exclude": "haed"}, "exclude: the pattern 'haed' matches no module of the model; near: 'head'"),
            ({"exclude": ("head", "*.dwon")}, r"'\*\.dwon' matches no module.*near: 'layers\.0\.down'"),
            ({"include": r"re:layers\.\d\.uq"}, r"include: the pattern 're:.*matches no module.*layers\.0\.up"),
            ({"include": ("layers.*", "lm_head")}, "'lm_head' matches no module.*near: .*'head'"),
            ({"overrides": {"layers.2.*": {"rank": 2}}}, r"overrides: the pattern 'layers\.2\.\*' matches no module"),
            ({"overrides": {"zzz": None}}, "'zzz' matches no module of the model; it has 'layers', 'layers.0'"),
            ({"modules_to_save": "haed"}, "modules_to_save: the pattern 'haed' matches no module.*near: 'head'"),
            ({"exclude": "down"}, r"'down' matches no module of the model: .*write '\*\.down'"),
            ({"exclude": "layers.0"}, r"matches 'layers\.0', which is no layer but has layers inside.*'layers\.0\.\*'"),
            ({"include": "layers"}, r"write 'layers\.\*'"),
            ({"overrides": {r"re:layers\.[01]": None}}, r"write 're:\(\?:layers\\\\\.\[01\]\)\\\\\.\.\*'"),
        ],
        ids=str,
    )
    def test_that_select_nothing(self, wrap, fields, message):
        model = tiny_model()
        with pytest.raises(ValueError, match=message):
            quantize(wrap(model), **fields)
        assert all(type(model.get_submodule(name)) is nn.Linear for name in LAYERS)

    def test_what_the_messages_say_to_write(self):
        for pattern in ("*.down", "layers.0.*", r"re:(?:layers\.[01])\..*"):
            assert quantize(tiny_model(), exclude=pattern).skipped

    def test_a_module_with_layers_inside_and_a_parameter_of_its_own(self):
        """It is no layer itself: excluding it would leave nothing dense."""
        model = tiny_model()
        model.layers[0].register_parameter("gamma", nn.Parameter(torch.ones(64)))
        with pytest.raises(ValueError, match=r"write 'layers\.0\.\*'"):
            quantize(model, exclude="layers.0")

    def test_patterns_of_other_modules_are_fine(self):
        """A norm is there to be matched; a mistyped name is not."""
        assert len(quantize(tiny_model(), exclude=("norm", "head")).layers) == 4

    def test_in_a_model_inside_others(self):
        """Blocks compiled one by one keep their plain names."""
        model = tiny_model()
        model.layers[0] = torch.compile(model.layers[0], backend="eager")
        report = quantize(model, overrides=lk.first_layers(model, 1, "nf2"))
        formats = {layer.name: layer.format for layer in report.layers}
        assert formats == dict.fromkeys(LAYERS[:2], "nf2") | dict.fromkeys(LAYERS[2:], "nf4")

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"norm": {"rank": 2}}, "'norm' changes no layer: 'norm' is no layer that can be quantized"),
            ({"conv": {"rank": 2}}, r"'conv' changes no layer: layer_types=\('linear',\) leaves out conv"),
            ({"c*": {"rank": 2}}, "leaves out conv"),
            ({"lm_head": {"rank": 2}}, "'lm_head' is the output head, which quantize_head=True quantizes"),
            ({"*": {"rank": 2}, "down": None}, r"'\*' stands before 'down' and matches all of it"),
        ],
        ids=str,
    )
    def test_overrides_without_effect(self, overrides, message):
        parts = {"down": nn.Linear(64, 64), "norm": nn.LayerNorm(64), "conv": nn.Conv1d(64, 64, 1)}
        model = nn.ModuleDict({**parts, "lm_head": nn.Linear(64, 64)})
        for run in (lambda cfg: lk.quantize_model(model, cfg), lambda cfg: lk.plan_bits(model, 4, ["nf4"], cfg)):
            with pytest.raises(ValueError, match=message):
                run(lk.QuantConfig(rank=4, overrides=overrides))
        assert type(model["down"]) is nn.Linear

    def test_a_general_override_behind_special_ones(self):
        model = tiny_model()
        overrides = {"layers.0.up": {"rank": 2}, "layers.0.*": {"rank": 3}, "*.up": None, "*": {"format": "nf2"}}
        ranks = {layer.name: (layer.rank, layer.format) for layer in quantize(model, overrides=overrides).layers}
        expected = {"layers.0.up": (2, "nf4"), "layers.0.down": (3, "nf4")}
        assert ranks == {**expected, "layers.1.down": (4, "nf2"), "head": (4, "nf2")}

    @pytest.mark.parametrize(
        ("fields", "rank"),
        [({"exclude": "b.1"}, None), ({"modules_to_save": "b.1"}, None), ({"overrides": {"b.1": {"rank": 2}}}, 2)],
        ids=str,
    )
    def test_every_name_of_a_shared_module_counts(self, fields, rank):
        shared = nn.Linear(64, 64)
        model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.Linear(64, 64), shared)})
        quantize(model, **fields)
        assert model["a"] is model["b"][1] and getattr(model["a"], "rank", None) == rank
        assert shared.weight.requires_grad == (model["a"] is not shared or "modules_to_save" in fields)


class TestFirstLayers:
    def test_blocks_without_layers_inside(self):
        """They count as blocks; a pattern for what is inside of them would match nothing."""
        parts = [nn.Linear(64, 64), nn.ReLU(), nn.Sequential(nn.Linear(64, 64), nn.ReLU()), nn.Linear(64, 64)]
        model = nn.Sequential(*parts)
        overrides = lk.first_layers(model, 3, {"format": "nf2"})
        assert list(overrides) == ["0", "2.*"]
        report = quantize(model, overrides=overrides)
        assert [(layer.name, layer.format) for layer in report.layers] == [("0", "nf2"), ("2.0", "nf2"), ("3", "nf4")]

    def test_blocks_of_other_layer_types(self):
        model = nn.Sequential(nn.Sequential(nn.Conv1d(64, 64, 1)), nn.Sequential(nn.Linear(64, 64)), nn.Linear(64, 64))
        report = quantize(model, overrides=lk.first_layers(model, 2, "nf2"))
        assert [(layer.name, layer.format) for layer in report.layers] == [("1.0", "nf2"), ("2", "nf4")]


class TestHeads:
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize(
        ("name", "head"),
        [
            ("LlamaForCausalLM", "lm_head"),
            ("GPTNeoXForCausalLM", None),
            ("BertForMaskedLM", "cls.predictions.decoder"),
            ("T5ForConditionalGeneration", "lm_head"),
        ],
    )
    def test_stays_dense(self, name, head, nested):
        """Whatever exclude says, also in a model that holds the language model."""
        inner = causal(name)
        dense = inner.get_output_embeddings()
        model = nn.ModuleDict({"inner": inner}) if nested else inner
        some = next(n for n, m in model.named_modules() if type(m) is nn.Linear and m is not dense)
        report = quantize(model, exclude=some)
        assert inner.get_output_embeddings() is dense and dense.weight.shape == (50, 64)
        heads = [name for name, reason in report.skipped.items() if "output head" in reason]
        assert len(heads) == 1 and (head is None or heads[0].endswith(head))

    def test_quantize_head(self):
        model = causal("LlamaForCausalLM")
        assert "lm_head" in [layer.name for layer in quantize(model, quantize_head=True).layers]
        assert isinstance(model.get_output_embeddings(), lk.QuantLoRALinear)

    def test_by_name_in_a_plain_model(self):
        model = nn.ModuleDict({"lm_head": nn.Linear(64, 64), "x": nn.ModuleDict({"lm_head": nn.Linear(64, 64)})})
        model["body"] = nn.Linear(64, 64)
        assert sorted(quantize(model).skipped) == ["lm_head", "x.lm_head"]


class TestModulesToSave:
    @pytest.mark.parametrize("freeze", [True, False])
    @pytest.mark.parametrize(
        ("pattern", "saved"),
        [("head", ["head"]), ("up", ["layers.0.up", "layers.1.up"]), ("layers.1", LAYERS[2:4]), ("norm", ["norm"])],
        ids=str,
    )
    def test_dense_and_trained(self, pattern, saved, freeze):
        model = tiny_model()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        report = quantize(model, freeze, modules_to_save=pattern)
        names = {f"{name}.{key}" for name in saved for key, _ in model.get_submodule(name).named_parameters()}
        adapters = {name for name in dict(model.named_parameters()) if "lora_" in name}
        assert trained(model) == names | adapters and len(report.layers) == 5 - len(set(saved) & set(LAYERS))
        reasons = {tensor.reason for tensor in report.tensors if tensor.name in names}
        assert all("modules_to_save" in reason for reason in reasons)

    def test_training_the_adapters_alone_again(self):
        model = tiny_model()
        quantize(model, modules_to_save="head")
        before = trained(model)
        lk.train_only_adapters(model, also=("head",))
        assert trained(model) == before >= {"head.weight"}
        lk.train_only_adapters(model)
        assert trained(model) == {name for name in before if "lora_" in name}

    def test_training_biases_of_quantized_layers(self):
        model = tiny_model()
        quantize(model)
        adapters = trained(model)
        lk.train_only_adapters(model, also="layers.1")
        assert trained(model) == adapters | {"layers.1.up.bias", "layers.1.down.bias"}
        with pytest.raises(ValueError, match="also: the pattern 'haed' matches no module of the model"):
            lk.train_only_adapters(model, also=("norm", "haed"))
        assert trained(model) == adapters | {"layers.1.up.bias", "layers.1.down.bias"}

    def test_not_calibrated(self):
        cfg = lk.QuantConfig(modules_to_save=("head", "layers.1"))
        assert sorted(lk.collect_activations(tiny_model(), [gaussian(9, 64)], cfg, progress=False)) == sorted(
            LAYERS[:2]
        )

    def test_quantized_before(self):
        model = tiny_model()
        quantize(model, include="head")
        with pytest.raises(ValueError, match="modules_to_save: 'head' is quantized already"):
            quantize(model, modules_to_save="head")


class TestPeft:
    def wrapped(self, name: str = "LoraConfig", **fields) -> nn.Module:
        peft = pytest.importorskip("peft")
        model = causal("LlamaForCausalLM", attention_bias=True)
        return peft.get_peft_model(model, getattr(peft, name)(**fields))

    @pytest.mark.parametrize(
        ("name", "fields"),
        [
            ("LoraConfig", {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
            ("LoraConfig", {"r": 4, "target_modules": ["q_proj"], "use_dora": True}),
            ("LoraConfig", {"r": 4, "target_modules": ["q_proj"], "bias": "all"}),
            ("LoraConfig", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
            ("LoraConfig", {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}),
            ("LoraConfig", {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
            ("LoraConfig", {"r": 4, "target_modules": [], "target_parameters": ["mlp.up_proj.weight"]}),
            ("IA3Config", {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
            ("AdaLoraConfig", {"target_modules": ["q_proj"], "total_step": 10}),
            ("PromptTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}),
            (
                "PrefixTuningConfig",
                {
                    "task_type": "CAUSAL_LM",
                    "num_virtual_tokens": 3,
                    "prefix_projection": True,
                    "encoder_hidden_size": 64,
                },
            ),
        ],
        ids=str,
    )
    def test_stays_as_it_is(self, name, fields):
        """What PEFT trains is trained as before and no quantized layer; what it wraps is quantized; the model runs."""
        model = self.wrapped(name, **fields)
        before, dense = trained(model), model(TOKENS).logits
        own = {key: p for key, p in model.named_parameters() if p.requires_grad and not key.endswith(".bias")}
        linear = [key for key, m in model.base_model.named_modules() if type(m) is nn.Linear and "lora_" not in key]
        report = quantize(model, format="int8", rank=None, layer_types=("linear", "embedding"))
        assert trained(model) == before
        assert all(dict(model.named_parameters())[key] is parameter for key, parameter in own.items())
        done = {layer.name.removeprefix("base_model.") for layer in report.layers if "proj" in layer.name}
        read = {key for key in linear if "target_parameters" in fields and "up_proj" in key}
        assert done == {key for key in linear if "lm_head" not in key} - read and len(done) >= 12
        assert model.get_base_model().get_submodule("model.layers.0.self_attn.k_proj").bias is not None
        similar = torch.nn.functional.cosine_similarity(model(TOKENS).logits, dense, -1).min()
        assert similar > 0.99 and report.model_bytes == sum(
            t.nbytes for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
        )

    def test_several_adapters(self):
        peft = pytest.importorskip("peft")
        model = self.wrapped(r=4, target_modules=["q_proj"])
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
        before = trained(model)
        report = quantize(model, rank=None)
        assert (
            len(report.layers) == 14 and trained(model) == before and not any("lora_" in n.name for n in report.layers)
        )
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        assert isinstance(layer.base_layer, lk.QuantLoRALinear) and layer.lora_A["other"].weight.shape == (2, 64)

    def test_the_head_below_an_adapter(self):
        model = self.wrapped(r=4, target_modules=["lm_head"])
        report = quantize(model, rank=None)
        assert type(model.get_base_model().lm_head.base_layer) is nn.Linear
        assert "base_model.model.lm_head.base_layer" in report.skipped

    def test_the_report_counts_its_adapters_as_adapters(self):
        model = self.wrapped(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
        report = quantize(model, rank=None)
        lora = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
        assert report.bytes_of("adapter") == sum(parameter.nbytes for parameter in lora) > 0
        copies = [t for t in report.tensors if "lm_head" in t.name]
        assert sorted((t.state, t.trained) for t in copies) == [("dense", False), ("dense", True)]


def add_hook_of_accelerate(layer: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(layer, hooks.ModelHook())


CARRIED = {
    "forward hook": (lambda m: m.register_forward_hook(lambda *args: None), "forward hooks"),
    "with kwargs": (lambda m: m.register_forward_hook(lambda *args, **kw: None, with_kwargs=True), "hooks"),
    "always": (lambda m: m.register_forward_hook(lambda *args: None, always_call=True), "hooks"),
    "pre hook": (lambda m: m.register_forward_pre_hook(lambda *args: None), "forward pre hooks"),
    "backward hook": (lambda m: m.register_full_backward_hook(lambda *args: None), "backward hooks"),
    "state_dict hook": (lambda m: m.register_state_dict_post_hook(lambda *args: None), "state dict hooks"),
    "state_dict pre hook": (lambda m: m.register_state_dict_pre_hook(lambda *args: None), "state dict pre hooks"),
    "load hook": (lambda m: m.register_load_state_dict_pre_hook(lambda *args: None), "load state dict pre hooks"),
    "load post hook": (lambda m: m.register_load_state_dict_post_hook(lambda *args: None), "load state dict post"),
    "forward": (lambda m: setattr(m, "forward", lambda x: x), "has 'forward' of its own"),
    "compiled": (lambda m: m.compile(), "_compiled_call_impl"),
    "accelerate": (add_hook_of_accelerate, "of its own"),
    "weight hook": (lambda m: m.weight.register_hook(lambda g: g), "its weight has hooks"),
    "gradient hook": (lambda m: m.weight.register_post_accumulate_grad_hook(lambda p: None), "its weight has hooks"),
    "buffer": (lambda m: m.register_buffer("mask", torch.ones(1)), "holds 'mask'"),
    "parameter": (lambda m: m.register_parameter("gain", nn.Parameter(torch.ones(1))), "holds 'gain'"),
    "module": (lambda m: m.add_module("gate", nn.ReLU()), "holds 'gate'"),
    "tensor": (lambda m: setattr(m, "mask", torch.ones(1)), "holds 'mask'"),
    "a taken name": (lambda m: setattr(m, "scaling", 2), "an attribute 'scaling' of its own"),
    "a method's name": (lambda m: setattr(m, "merge_adapter", 2), "an attribute 'merge_adapter' of its own"),
    "parametrization": (lambda m: nn.utils.parametrizations.weight_norm(m), "Parametrized"),
    "old weight_norm": (lambda m: nn.utils.weight_norm(m), "hooks"),
    "old spectral_norm": (lambda m: nn.utils.spectral_norm(m), "hooks"),
    "pruning": (lambda m: prune.l1_unstructured(m, "weight", 0.3), "hooks"),
    "subclass": (lambda m: setattr(m, "__class__", type("Mine", (type(m),), {})), "is a Mine"),
}
DENSE = {
    "linear": lambda: nn.Linear(64, 64),
    "embedding": lambda: nn.Embedding(64, 64),
    "conv": lambda: nn.Conv2d(64, 64, 1),
    "transposed": lambda: pytest.importorskip("transformers").pytorch_utils.Conv1D(64, 64),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
class TestWhatALayerCarries:
    @pytest.mark.parametrize("kind", DENSE)
    @pytest.mark.parametrize("case", CARRIED)
    def test_skipped_with_the_reason(self, case, kind):
        change, message = CARRIED[case]
        model = nn.ModuleDict({"a": DENSE[kind](), "b": nn.Linear(64, 64)})
        change(model["a"])
        before = model["a"]
        report = quantize(model, layer_types=("linear", "embedding", "conv"))
        assert model["a"] is before and message in report.skipped["a"]
        assert type(model["b"]) is lk.QuantLoRALinear

    @pytest.mark.parametrize("kind", [kind for kind in DENSE if kind != "embedding"])
    @pytest.mark.parametrize(
        "register", [lambda p: p.register_hook(lambda g: g), lambda p: p.register_post_accumulate_grad_hook(print)]
    )
    def test_hooks_of_the_bias(self, kind, register):
        model = nn.ModuleDict({"a": DENSE[kind](), "b": nn.Linear(64, 64)})
        register(model["a"].bias)
        assert quantize(model, layer_types=("linear", "conv")).skipped["a"].startswith("its bias has hooks")

    @pytest.mark.parametrize("kind", DENSE)
    def test_carried_over(self, kind):
        model = nn.ModuleDict({"a": DENSE[kind](), "b": nn.Linear(64, 64)})
        layer = model["a"].eval()
        layer.note, layer.is_special = {"a": 1}, True
        layer.register_forward_hook(lambda *args: None).remove()
        if kind != "embedding":
            layer.bias.decay = 0.5
            layer.bias.requires_grad_(False)
        quantize(model, freeze=False, layer_types=("linear", "embedding", "conv"))
        new = model["a"]
        assert isinstance(new, QuantLoRAModule) and new.note == {"a": 1} and new.is_special
        assert new.bias is None or (new.bias.decay == 0.5 and not new.bias.requires_grad)
        assert model["b"].bias.requires_grad and not new.training

    def test_a_removed_hook_leaves_nothing(self):
        model = nn.Sequential(nn.Linear(64, 64))
        model[0].register_forward_hook(lambda *args: None).remove()
        assert not quantize(model).skipped


def frozen(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


STRANGE = {
    "sparse": (lambda: frozen(torch.eye(64).to_sparse()), "torch.sparse_coo", 64 * (2 * 8 + 4)),
    "csr": (lambda: frozen(torch.eye(64).to_sparse_csr()), "torch.sparse_csr", (65 + 64) * 8 + 64 * 4),
    "csc": (lambda: frozen(torch.eye(64).to_sparse_csc()), "torch.sparse_csc", (65 + 64) * 8 + 64 * 4),
    "vector": (lambda: frozen(torch.ones(64)), r"shape \(64,\)", 256),
    "scalar": (lambda: frozen(torch.ones(())), r"shape \(\)", 4),
    "stack": (lambda: frozen(torch.ones(2, 64, 64)), r"shape \(2, 64, 64\)", 2 * 64 * 64 * 4),
    "bool": (lambda: frozen(torch.ones(64, 64, dtype=torch.bool)), "torch.bool", 64 * 64),
    "complex": (lambda: frozen(torch.ones(64, 64, dtype=torch.complex64)), "torch.complex64", 64 * 64 * 8),
    "integer": (lambda: frozen(torch.ones(64, 64, dtype=torch.int8)), "torch.int8", 64 * 64),
    "none": (lambda: None, "NoneType", None),
}


@pytest.mark.filterwarnings("ignore:Sparse C.. tensor support is in beta state")
class TestStrangeWeights:
    """What somebody has put in a weight's place is left as it is, with the reason, and counted to the byte."""

    @pytest.mark.parametrize("kind", DENSE)
    @pytest.mark.parametrize("case", STRANGE)
    def test_skipped_with_the_reason(self, case, kind):
        make, message, nbytes = STRANGE[case]
        model = nn.ModuleDict({"a": DENSE[kind](), "b": nn.Linear(64, 64)})
        model["a"].weight = weight = make()
        report = quantize(model, layer_types=("linear", "embedding", "conv"))
        assert re.search(message, report.skipped["a"]) and [layer.name for layer in report.layers] == ["b"]
        assert model["a"].weight is weight
        assert [t.nbytes for t in report.tensors if t.name == "a.weight"] == ([] if nbytes is None else [nbytes])

    @pytest.mark.parametrize("fields", [{}, {"modules_to_save": "a"}], ids=str)
    @pytest.mark.parametrize("make", [lambda: nn.LazyLinear(10), lambda: nn.LazyConv2d(8, 3)])
    def test_without_a_shape_yet(self, make, fields):
        """It is frozen or trained as any other, and gets its shape when the model runs."""
        model = nn.ModuleDict({"a": make(), "b": nn.Linear(64, 64)})
        report = quantize(model, layer_types=("linear", "conv"), **fields)
        assert fields or "without a shape: run the model once" in report.skipped["a"]
        assert [(t.shape, t.nbytes) for t in report.tensors if t.name == "a.weight"] == [((), 0)]
        model["a"](torch.zeros(1, 3, 64, 64))
        assert model["a"].weight.numel() > 0 and model["a"].weight.requires_grad == bool(fields)
        if not fields and type(model["a"]) is nn.Linear:
            assert [layer.name for layer in quantize(model).layers] == ["a"]

    def test_sparse_parameters_of_other_modules(self):
        model = nn.ModuleDict({"norm": nn.LayerNorm(64), "b": nn.Linear(64, 64)})
        model["norm"].register_parameter("mask", frozen(torch.eye(64).to_sparse()))
        assert [t.nbytes for t in quantize(model).tensors if t.name == "norm.mask"] == [64 * 20]

    def test_no_layer_is_left(self):
        """The error counts layers by reason, and does not list them all."""
        model = nn.ModuleList([nn.Linear(64, 64) for _ in range(9)] + [nn.Linear(4, 64), nn.Embedding(64, 64)])
        model[3].weight = frozen(torch.ones(64))
        with pytest.raises(ValueError, match="skipped: 8 such as '0' .excluded by.*1 such as '9' .packed") as info:
            quantize(model, exclude="[0-24-8]", include=("[0-8]", "9"))
        assert "'1'" not in str(info.value) and "1 such as '3' (its weight has shape (64,)" in str(info.value)


class TestSharedBias:
    def pair(self, *parts: nn.Module) -> nn.ModuleDict:
        model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": parts[0] if parts else nn.Linear(64, 64)})
        model["b"].bias = model["a"].bias
        return model

    @pytest.mark.parametrize("freeze", [True, False])
    def test_of_two_layers_stays_one(self, freeze):
        model = self.pair()
        report = quantize(model, freeze)
        assert len(report.layers) == 2 and model["a"].bias is model["b"].bias
        assert model["a"].bias.requires_grad is not freeze
        assert report.model_bytes == sum(p.nbytes for p in model.parameters())

    def test_with_a_module_that_stays_dense(self):
        model = self.pair(nn.LayerNorm(64))
        quantize(model)
        assert type(model["a"]) is lk.QuantLoRALinear and model["a"].bias is model["b"].bias

    def test_is_saved(self, tmp_path):
        model = self.pair()
        quantize(model, format="int8")
        with torch.no_grad():
            model["a"].bias.fill_(3)
        lk.save_quantized(model, tmp_path / "saved")
        other = lk.load_quantized(tmp_path / "saved", self.pair())
        assert torch.equal(other["b"](torch.zeros(1, 64)), torch.full((1, 64), 3.0))

    def test_of_another_dtype(self):
        """The layer would have it in the weight's dtype."""
        model = self.pair()
        model["a"].weight.data = model["a"].weight.data.bfloat16()
        report = quantize(model)
        assert "its bias, torch.float32 on cpu, is shared" in report.skipped["a"]
        assert model["a"].bias is model["b"].bias


class TestSizes:
    @pytest.mark.parametrize(
        ("layer", "packed", "dense"),
        [
            (lambda: nn.Linear(4, 512), 512 * (32 + 2) + 64, 512 * 4 * 4),
            (lambda: nn.Linear(16, 512).half(), 512 * (32 + 2) + 64, 512 * 16 * 2),
            (lambda: nn.Conv2d(64, 64, 2, groups=64), 64 * (32 + 2) + 64, 64 * 4 * 4),
            (lambda: nn.Embedding(300, 5), 300 * (32 + 2) + 64, 300 * 5 * 4),
        ],
        ids=["narrow", "half", "depthwise", "embedding"],
    )
    def test_would_grow(self, layer, packed, dense):
        """A row is padded to 64 columns: 32 bytes of codes and a scale of 2, and a code book of 64 bytes."""
        model = nn.ModuleDict({"a": layer(), "b": nn.Linear(64, 64)})
        reason = quantize(model, layer_types=("linear", "embedding", "conv")).skipped["a"]
        assert f"packed it would take {packed} bytes" in reason and reason.endswith(f"take {dense}")

    @pytest.mark.parametrize("shape", [(10, 64), (64, 10)])
    @pytest.mark.parametrize(
        ("fields", "scaling"),
        [({}, 1), ({"lora_alpha": 20}, 2), ({"lora_alpha": 20, "use_rslora": True}, 20 / 10**0.5)],
    )
    def test_rank_above_the_smaller_side(self, shape, fields, scaling):
        model = nn.Sequential(nn.Linear(shape[1], shape[0]).double(), nn.Linear(64, 64))
        report = quantize(model, rank=16, **fields)
        layer = next(layer for layer in report.layers if layer.name == "0")
        assert layer.rank == model[0].rank == 10 and model[0].scaling == pytest.approx(scaling)
        scaled = f"; scaling {scaling:g}" if fields else ""
        assert layer.note == f"rank 16 limited to 10, its smaller side{scaled}" and layer.note in str(report)
        assert model[1].rank == 16

    def test_rank_above_the_groups(self):
        model = nn.Sequential(nn.Linear(130, 64))
        report = quantize(model, format="int4", adapter="qalora", rank=8)
        assert model[0].rank == 3 and report.layers[0].note == "rank 8 limited to 3, its groups"

    def test_rank_energy(self):
        model = tiny_model()
        statistics = lk.collect_activations(model, [gaussian(200, 64)], progress=False)
        cfg = lk.QuantConfig(init="aser", rank=32, rank_energy=0.999, lora_alpha=16)
        report = lk.quantize_model(model, cfg, statistics=statistics, progress=False)
        assert report.layers[-1].name == "head" and model.head.rank <= 10
        assert report.layers[-1].note == "rank 32 limited to 10, its smaller side; scaling 1.6"


class TestAdapterDtype:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_default(self, dtype):
        model = tiny_model().to(dtype)
        quantize(model)
        assert {model.head.lora_A.dtype, model.layers[0]["up"].lora_B.dtype} == {torch.float32}
        assert model.head.dtype == dtype and model(gaussian(2, 64, dtype=dtype)).dtype == dtype

    def test_explicit_and_by_override(self):
        model = tiny_model().bfloat16()
        quantize(model, adapter_dtype=torch.bfloat16, overrides={"head": {"adapter_dtype": torch.float32}})
        assert model.layers[0]["up"].lora_A.dtype == torch.bfloat16 and model.head.lora_A.dtype == torch.float32

    @pytest.mark.parametrize(("dtype", "least", "most"), [(None, 1.0, 1.0), (torch.bfloat16, 0.0, 0.5)])
    def test_small_steps(self, dtype, least, most):
        """Steps of 1e-5 change every number of a float32 adapter; in bfloat16 most are lost."""
        model = tiny_model().bfloat16()
        quantize(model, adapter_dtype=dtype)
        adapters = [p for p in model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in adapters]
        with torch.no_grad():
            for p in adapters:
                p.add_(torch.full_like(p, 1e-5))
        changed = sum((p != old).sum().item() for p, old in zip(adapters, before, strict=True))
        assert least <= changed / sum(p.numel() for p in adapters) <= most

    def test_layers_without_adapter_and_bias(self):
        """Nothing in them is bfloat16, and they say so all the same."""
        parts = [nn.Linear(64, 64, bias=False), nn.Embedding(64, 64), nn.Conv1d(64, 64, 1, bias=False)]
        model = nn.Sequential(*parts, nn.Conv2d(64, 64, 1, bias=False)).bfloat16()
        quantize(model, rank=None, layer_types=("linear", "embedding", "conv"))
        for layer in model:
            assert layer.weight.dtype == layer.dtype == layer.dequantize().dtype == torch.bfloat16


class TestMemory:
    """Dense layers are held by nobody once their batch is swapped in: without the garbage collector's help."""

    @pytest.fixture(autouse=True)
    def _no_collector(self):
        gc.collect()
        gc.disable()
        yield
        gc.enable()

    def model(self) -> nn.ModuleList:
        """Shapes in turn, so that the last layer belongs to the group that is done first."""
        shapes = [(64, 64), (32, 64)] * 18
        return nn.ModuleList(nn.Linear(k, n) for n, k in [*shapes, (64, 64)])

    def watched(self, model, monkeypatch, fail_at: int | None = None, **options) -> list[tuple[int, int]]:
        """(dense weights alive, layers not yet swapped) when each batch is to be initialized."""
        refs = [weakref.ref(r) for layer in model for r in (layer, layer.weight)]
        seen, left, initialize = [], len(refs) // 2, convert.initialize

        def spy(weights, *args, **kwargs):
            nonlocal left
            seen.append((sum(ref() is not None for ref in refs), 2 * left))
            if len(seen) == fail_at:
                raise KeyboardInterrupt
            left -= len(weights)
            return initialize(weights, *args, **kwargs)

        monkeypatch.setattr(convert, "initialize", spy)
        try:
            lk.quantize_model(model, lk.QuantConfig(rank=4, num_iter=1), progress=False, **options)
        except KeyboardInterrupt:
            assert fail_at is not None
        seen.append((sum(ref() is not None for ref in refs), 2 * left))
        return seen

    def test_batch_by_batch(self, monkeypatch):
        seen = self.watched(self.model(), monkeypatch)
        assert len(seen) == 5 and all(alive == left for alive, left in seen) and seen[-1] == (0, 0)

    def test_with_statistics(self, monkeypatch):
        model = self.model()
        wide = gaussian(100, 64)
        statistics = {str(i): lk.InputStatistics.from_inputs(wide) for i in range(len(model))}
        assert all(alive == left for alive, left in self.watched(model, monkeypatch, statistics=statistics))

    def test_with_a_plan(self, monkeypatch):
        model = self.model()
        plan = lk.plan_bits(model, 4, ["nf2", "nf4"], lk.QuantConfig(rank=4, num_iter=1), progress=False)
        assert all(alive == left for alive, left in self.watched(model, monkeypatch, plan=plan))

    def test_after_an_interruption(self, monkeypatch):
        seen = self.watched(self.model(), monkeypatch, fail_at=3)
        assert len(seen) == 4 and all(alive == left for alive, left in seen) and seen[-1][1] > 0


class TestSeeds:
    """What is random in a layer's start follows from the config's seed and the layer's name, and from nothing else."""

    def starts(self, n: int = 20, **fields) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.ModuleList(nn.Linear(128, 64) for _ in range(n))
        quantize(model, **{"init": "qlora", **fields})
        return {name: p for name, p in model.named_parameters() if name.endswith("lora_A")}

    @pytest.mark.parametrize("fields", [{}, {"adapter": "qalora", "rank": 2}], ids=str)
    def test_no_two_layers_alike(self, fields):
        starts = list(self.starts(**fields).values())
        assert len(starts) == 20
        assert not any(torch.equal(a, b) for i, a in enumerate(starts) for b in starts[:i])

    @pytest.mark.parametrize("init", ["qlora", "loftq"])
    def test_whatever_else_is_quantized(self, init, monkeypatch):
        whole = self.starts(init=init)
        without = self.starts(init=init, exclude=("0", "7"))
        assert len(without) == 18 and all(torch.equal(p, whole[name]) for name, p in without.items())
        monkeypatch.setattr("loftq_kernels.models.select._LAYERS_PER_BATCH", 3)
        monkeypatch.setattr("loftq_kernels.models.select.available_cpus", lambda: 2)
        assert all(torch.equal(p, whole[name]) for name, p in self.starts(init=init).items())

    def test_seed(self):
        first, again, other = self.starts(seed=5), self.starts(seed=5), self.starts(seed=6)
        assert all(torch.equal(p, again[name]) and not torch.equal(p, other[name]) for name, p in first.items())

    def test_wrappers_have_no_part_in_names(self):
        plain, wrapped = tiny_model(), tiny_model()
        quantize(plain, init="qlora")
        quantize(torch.compile(wrapped, backend="eager"), init="qlora")
        torch.testing.assert_close(parameters_of(wrapped), parameters_of(plain), rtol=0, atol=0)
