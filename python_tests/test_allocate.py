"""Bit plans: what `plan_bits` chooses, the file it is kept in, and LoftQ's first-n rule."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import sys
import types

import pytest
import torch
from helpers import TinyModel, assert_unchanged, gaussian, minilm_weights, parameters_of, tiny_bert, tiny_model
from torch import nn

import loftq_kernels as lk
from loftq_kernels import cli
from loftq_kernels.models import solve
from loftq_kernels.models.solve import solve_plan

CFG = lk.QuantConfig(rank=4, num_iter=1)
X = gaussian(3, 64)


def plan_of(model: nn.Module, budget: float, *args, **options) -> lk.BitPlan:
    return lk.plan_bits(model, budget, *args, **{"cfg": CFG, "progress": False, **options})


def uneven_model() -> TinyModel:
    """Layers that 2 bits harm to different degrees: with Gaussian weights, few large ones, and values near a grid."""
    model = tiny_model()
    for i, layer in enumerate([model.layers[0]["up"], model.layers[1]["down"]]):
        weight = layer.weight.data
        weight.copy_(torch.sign(gaussian(*weight.shape, seed=i)) * 0.1 + 0.01 * gaussian(*weight.shape, seed=5))
    weight = model.layers[0]["down"].weight.data
    weight.copy_(gaussian(*weight.shape) ** 3 * 0.05)
    return model


@functools.cache
def minilm_plan() -> lk.BitPlan:
    """MiniLM's 37 linear layers under three group sizes at 2 and 4 bits, without adapters: fast, and fine-grained."""
    model = nn.Module()
    for name, weight in minilm_weights().items():
        *path, last = name.split(".")
        owner = model
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.ModuleList() if part == "layer" else nn.Module())
            owner = owner._modules[part]
        linear = nn.Linear(weight.shape[1], weight.shape[0], False, device="meta")
        linear.weight = nn.Parameter(weight)
        owner.add_module(last, linear)
    candidates = [{"format": f, "group_size": g} for f in ("nf2", "nf4") for g in (32, 64, 128)]
    return plan_of(model, 2.5, candidates, cfg=lk.QuantConfig(rank=None))


def with_choices(plan: lk.BitPlan, choose) -> lk.BitPlan:
    layers = {n: dataclasses.replace(layer, choice=choose(n)) for n, layer in plan.layers.items()}
    return dataclasses.replace(plan, layers=layers)


def of_gram(gram: torch.Tensor) -> lk.InputStatistics:
    channel = gram.diagonal()
    return lk.InputStatistics(gram, channel, channel, channel, tokens=1)


class TestBudget:
    @pytest.mark.parametrize("budget", [2.25, 2.5, 3.0, 3.5, 4.2])
    def test_is_used_up(self, budget):
        """To 0.01 bits per weight, and never exceeded."""
        plan = solve_plan(minilm_plan(), budget)
        assert budget - 0.01 <= plan.average_bits <= budget + 1e-6

    @pytest.mark.parametrize("name", ["nf2 group_size=32", "nf2 group_size=64", "nf4 group_size=64"])
    def test_no_worse_than_one_format_for_all(self, name):
        uniform = with_choices(minilm_plan(), lambda layer: name)
        plan = solve_plan(minilm_plan(), uniform.average_bits)
        assert plan.average_bits <= uniform.average_bits + 1e-6
        assert plan.error < 0.98 * uniform.error

    @pytest.mark.parametrize("n", [1, 2, 4])
    def test_better_than_the_first_n(self, n):
        first = tuple(f"encoder.layer.{i}." for i in range(n))
        rule = with_choices(minilm_plan(), lambda layer: f"nf{4 if layer.startswith(first) else 2} group_size=64")
        assert solve_plan(minilm_plan(), rule.average_bits).error < 0.98 * rule.error

    def test_more_bits_less_error(self):
        errors = [solve_plan(minilm_plan(), budget).error for budget in (2.2, 2.5, 3, 3.5, 4, 4.5)]
        assert errors == sorted(errors, reverse=True)

    def test_a_budget_above_everything(self):
        plan = solve_plan(minilm_plan(), 16)
        assert all(layer.errors[layer.choice] == min(layer.errors.values()) for layer in plan.layers.values())

    def test_infeasible(self):
        with pytest.raises(ValueError, match=r"budget=2 bits per weight is below 2\.125\d, the least .*nf2 group_size"):
            solve_plan(minilm_plan(), 2)
        with pytest.raises(ValueError, match="budget=1.5 .* is below"):
            plan_of(tiny_model(), 1.5)

    @pytest.mark.parametrize("budget", [0, -1, math.inf, math.nan, "2", None, True])
    def test_no_number(self, budget):
        with pytest.raises(ValueError, match="budget="):
            plan_of(tiny_model(), budget)

    @pytest.mark.parametrize("count", ["codes", "packed", "total"])
    def test_is_the_best_choice(self, count):
        """Of all there are, tried one by one."""
        candidates = ["nf2", "nf4", {"format": "int8", "group_size": 32}]
        plan = plan_of(uneven_model(), 9 if count == "total" else 4, candidates, count=count)
        names = list(plan.layers)
        best = math.inf
        for choices in itertools.product(plan.candidates, repeat=len(names)):
            other = with_choices(plan, dict(zip(names, choices, strict=True)).get)
            if other.average_bits <= plan.budget:
                best = min(best, other.error)
        assert plan.error == pytest.approx(best, rel=1.1e-4) and plan.average_bits <= plan.budget


class TestCounts:
    def test_packed_is_what_the_report_says(self):
        model = uneven_model()
        plan = plan_of(model, 3.5, ["nf2", "nf4", {"format": "int4", "group_size": 32, "scale_dtype": torch.float32}])
        report = lk.quantize_model(model, CFG, plan=plan, progress=False)
        assert report.bits_per_weight == pytest.approx(plan.average_bits, rel=1e-12)

    def test_codes_are_loftqs(self):
        plan = plan_of(tiny_model(), 2, ["nf2", "nf4"], count="codes")
        assert plan.average_bits == 2 and {layer.choice for layer in plan.layers.values()} == {"nf2"}
        assert solve_plan(plan, 4).average_bits == 4

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_total_has_the_adapters(self, dtype):
        """All that the layers take but biases."""
        model = tiny_model().to(dtype)
        candidates = [{"format": "nf2", "rank": 8}, {"format": "nf4", "rank": None}, {"format": "nf4", "rank": 2}]
        plan = plan_of(model, 6, candidates, count="total")
        report = lk.quantize_model(model, CFG, plan=plan, progress=False)
        biases = sum(
            m.bias.nbytes for m in model.modules() if getattr(m, "codes", None) is not None and m.bias is not None
        )
        weights = sum(layer.out_features * layer.in_features for layer in report.layers)
        assert 8 * (report.bytes_after - biases) / weights == pytest.approx(plan.average_bits)

    def test_ranks_that_cost_nothing(self):
        with pytest.raises(ValueError, match="count='total'"):
            plan_of(tiny_model(), 3, [{"rank": 4}, {"rank": 8}])


class TestErrors:
    def test_are_those_of_the_report(self):
        model = uneven_model()
        plan = plan_of(model, 3.2, ["nf2", "nf4"])
        report = lk.quantize_model(model, CFG, plan=plan, progress=False)
        for layer in report.layers:
            planned = plan.layers[layer.name]
            assert layer.format == planned.choice and layer.error**2 == pytest.approx(planned.errors[planned.choice])

    def test_absolute(self):
        model = uneven_model()
        relative, absolute = (plan_of(model, 3.2, ["nf2", "nf4"], relative=r) for r in (True, False))
        for name, layer in absolute.layers.items():
            norm = model.get_submodule(name).weight.norm().item()
            assert layer.errors["nf2"] == pytest.approx(norm**2 * relative.layers[name].errors["nf2"])

    @pytest.mark.parametrize("relative", [True, False])
    def test_with_statistics(self, relative):
        """The mean squared error of the outputs over the tokens."""
        model = uneven_model()
        inputs = {
            name: gaussian(200, module.in_features, seed=i) * torch.linspace(0.1, 3, module.in_features)
            for i, (name, module) in enumerate(model.named_modules())
            if isinstance(module, nn.Linear)
        }
        statistics = {name: lk.InputStatistics.from_inputs(x) for name, x in inputs.items()}
        plan = plan_of(model, 3.2, ["nf2", "nf4"], statistics=statistics, relative=relative)
        layer = lk.QuantLoRALinear.from_linear(model.head, dataclasses.replace(CFG, format="nf2"), statistics["head"])
        dense = inputs["head"] @ model.head.weight.T
        error = (dense - inputs["head"] @ layer.weight.T).square().sum() / (dense.square().sum() if relative else 200)
        assert plan.layers["head"].errors["nf2"] == pytest.approx(error.item(), rel=1e-3)

    def test_statistics_change_the_choice(self):
        model = tiny_model()
        loud = {n: (100.0 if n == "layers.1.up" else 1.0) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        statistics = {n: of_gram(scale * torch.eye(model.get_submodule(n).in_features)) for n, scale in loud.items()}
        plan = plan_of(model, 2.9, ["nf2", "nf4"], statistics=statistics, relative=False)
        assert plan.layers["layers.1.up"].choice == "nf4"

    @pytest.mark.parametrize(
        ("head", "error", "message"),
        [
            (None, ValueError, "lack layer 'head'"),
            (torch.eye(63), ValueError, "63 channels, the weight has 64 columns"),
            (torch.eye(64) * math.nan, ValueError, "gram holds NaN"),
            ([1.0], TypeError, "must be an InputStatistics, got list"),
        ],
        ids=["missing", "shape", "nan", "type"],
    )
    def test_bad_statistics(self, head, error, message):
        model = tiny_model()
        linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        statistics = {n: of_gram(torch.eye(m.in_features)) for n, m in linears.items()}
        statistics["head"] = of_gram(head) if isinstance(head, torch.Tensor) else head
        if head is None:
            del statistics["head"]
        with pytest.raises(error, match=message):
            plan_of(model, 3, statistics=statistics)

    def test_bad_weights(self):
        model = tiny_model()
        model.head.weight.data[7, 3] = math.nan
        with pytest.raises(ValueError, match=r"head\.weight holds nan in row 7, column 3"):
            plan_of(model, 3)


class TestCandidates:
    def test_the_model_is_not_changed(self):
        model = tiny_model()
        before = parameters_of(model)
        plan_of(model, 3)
        assert_unchanged(model, before)

    def test_names(self):
        plan = plan_of(tiny_model(), 3, ["nf2", {"format": "nf4", "group_size": 32}, {"group_size": 128}])
        assert list(plan.candidates) == ["nf2 group_size=64", "nf4 group_size=32", "nf4 group_size=128"]
        assert plan.candidates["nf2 group_size=64"] == {
            "format": "nf2", "group_size": 64, "rank": 4, "scale_dtype": "float16", "scale_search": False
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("candidates", "message"),
        [
            ([], "empty"),
            (["nf3"], "nf3"),
            (["nf2", "nf2"], "'nf2' is given twice"),
            ([{"num_iter": 3}], "num_iter"),
            ([{"group_size": 48}], "group_size=48"),
            ([3], "candidate 3"),
        ],
        ids=str,
    )
    def test_refused(self, candidates, message):
        with pytest.raises(ValueError, match=message):
            plan_of(tiny_model(), 3, candidates)

    def test_a_rank_that_some_layers_cannot_take(self):
        """The head has ten rows: there, only the smaller rank is a choice; where none is, the layer is not planned."""
        candidates = [{"format": "nf4", "rank": 16}, {"format": "nf4", "rank": 2}]
        plan = plan_of(tiny_model(), 40, candidates, count="total")
        choices = {name: layer.choice for name, layer in plan.layers.items()}
        assert choices.pop("head") == "nf4 rank=2" and set(choices.values()) == {"nf4 rank=16"}
        assert "head" not in plan_of(tiny_model(), 40, cfg=lk.QuantConfig(rank=16, num_iter=1)).layers

    def test_patterns_and_overrides(self):
        """Overrides leave layers dense and set what candidates do not; the rest is the candidates' business."""
        overrides = {"head": None, "layers.0.*": {"format": "int8", "init": "qlora"}}
        cfg = dataclasses.replace(CFG, exclude="*.1.down", overrides=overrides)
        model = tiny_model()
        plan = plan_of(model, 3, ["nf2", "nf4"], cfg=cfg)
        assert plan.layers.keys() == {"layers.0.up", "layers.0.down", "layers.1.up"}
        lk.quantize_model(model, cfg, plan=plan, progress=False)
        assert type(model.head) is nn.Linear and model.layers[0]["up"].format.name in ("nf2", "nf4")
        assert not model.layers[0]["up"].lora_B.any() and model.layers[1]["up"].lora_B.any()

    def test_nothing_to_plan(self):
        with pytest.raises(ValueError, match="no layer to plan"):
            plan_of(tiny_model(), 3, cfg=lk.QuantConfig(include="norm"))
        with pytest.raises(ValueError, match="include: the pattern 'nothing' matches no module"):
            plan_of(tiny_model(), 3, cfg=lk.QuantConfig(include="nothing"))

    def test_convolutions_and_embeddings(self):
        model = nn.ModuleDict({"table": nn.Embedding(50, 64), "conv": nn.Conv2d(8, 16, 3), "linear": nn.Linear(64, 64)})
        cfg = dataclasses.replace(CFG, layer_types=("linear", "conv", "embedding"))
        plan = plan_of(model, 4, cfg=cfg)
        assert {name: layer.shape for name, layer in plan.layers.items()} == {
            "table": (50, 64), "conv": (16, 72), "linear": (64, 64)
        }  # fmt: skip
        report = lk.quantize_model(model, cfg, plan=plan, progress=False)
        assert report.bits_per_weight == pytest.approx(plan.average_bits)

    def test_names_with_wildcards(self):
        model = nn.ModuleDict({"a*": nn.Linear(64, 64), "ab": nn.Linear(64, 64), "[x]": nn.Linear(64, 64)})
        plan = with_choices(plan_of(model, 3, ["nf2", "nf4"]), {"a*": "nf4", "ab": "nf2", "[x]": "nf4"}.get)
        lk.quantize_model(model, CFG, plan=plan, progress=False)
        assert [layer.format.name for layer in model.values()] == ["nf4", "nf2", "nf4"]


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"pip install 'loftq_kernels\[plan\]'"):
        plan_of(tiny_model(), 3)


def test_solver_at_its_limit(monkeypatch):
    """The best plan so far is taken, and said to be no more than that."""
    plan = plan_of(uneven_model(), 3, ["nf2", "nf4"])
    milp = solve.milp()

    def limited(*args, **options):
        result = milp(*args, **options)
        result.status = 1
        return result

    monkeypatch.setattr(solve, "milp", lambda: limited)
    with pytest.warns(UserWarning, match="plan may not be optimal"):
        assert solve_plan(plan, 3) == plan


def test_solver_fails(monkeypatch, tmp_path, capsys):
    plan = plan_of(uneven_model(), 3, ["nf2", "nf4"])
    plan.save(tmp_path / "plan.json")
    failed = types.SimpleNamespace(x=None, status=4, message="numerical difficulties")
    monkeypatch.setattr(solve, "milp", lambda: lambda *args, **options: failed)
    with pytest.raises(RuntimeError, match="not solved: numerical"):
        solve_plan(plan, 3)
    arguments = ["plan", "model", "other.json", "--budget", "3", "--from", tmp_path / "plan.json"]
    assert cli.main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "loftq-kernels: the integer program was not solved" in err


class TestOtherKinds:
    """Convolutions and embeddings have no statistics."""

    def plan(self, init: str, **options) -> lk.BitPlan:
        torch.manual_seed(0)
        model = nn.ModuleDict({"up": nn.Linear(64, 64), "conv": nn.Conv1d(64, 64, 1), "embed": nn.Embedding(64, 64)})
        cfg = dataclasses.replace(CFG, init=init, layer_types=("linear", "conv", "embedding"))
        return plan_of(model, 3, ["nf2", "nf4"], cfg=cfg, **options)

    def test_loftq(self):
        statistics = {"up": of_gram(torch.diag(torch.arange(1.0, 65.0)))}
        given, without = self.plan("loftq", statistics=statistics), self.plan("loftq")
        differ = [name for name in given.layers if given.layers[name].errors != without.layers[name].errors]
        assert differ == ["up"]
        with pytest.raises(ValueError, match="layer 'conv' has no statistics.*relative"):
            self.plan("loftq", statistics=statistics, relative=False)

    def test_eora(self):
        with pytest.raises(ValueError, match="'conv', an nn.Conv1d.*linear layers alone.*init='loftq'"):
            self.plan("eora", statistics={"up": of_gram(torch.eye(64))})


def test_progress_bar(capsys):
    """Where standard error is no terminal: nothing unless asked for, and then a line."""
    lk.plan_bits(tiny_model(), 3, ["nf2", "nf4"], CFG)
    assert capsys.readouterr().err == ""
    lk.plan_bits(tiny_model(), 3, ["nf2", "nf4"], CFG, progress=True)
    assert capsys.readouterr().err.startswith("plan: 10 of 10 layers, ")
    plan_of(tiny_model(), 3)
    assert capsys.readouterr().err == ""


class TestFile:
    @pytest.fixture
    def plan(self) -> lk.BitPlan:
        return plan_of(uneven_model(), 3, ["nf2", "nf4"])

    @pytest.fixture
    def file(self, plan, tmp_path):
        plan.save(tmp_path / "plan.json")
        return tmp_path / "plan.json"

    def test_round_trip(self, plan, file):
        assert lk.BitPlan.load(file) == plan
        values = json.loads(file.read_text())
        assert values["average_bits"] == pytest.approx(plan.average_bits, abs=1e-6)
        assert len(file.read_text().splitlines()) < 20  # One per layer.

    def test_applied_from_the_file(self, plan, file, tmp_path):
        """With its choices, and the model of mixed formats loads again."""
        models = [uneven_model(), uneven_model()]
        lk.quantize_model(models[0], CFG, plan=plan, progress=False)
        lk.quantize_model(models[1], plan.config(CFG), progress=False)
        assert torch.equal(models[0](X), models[1](X))
        assert len({m.format.name for m in models[0].modules() if isinstance(m, lk.QuantLoRALinear)}) == 2
        other = uneven_model()
        lk.quantize_model(other, CFG, plan=str(file), progress=False)
        lk.save_quantized(other, tmp_path / "model")
        with torch.device("meta"):
            empty = TinyModel().eval().to("meta")
        assert torch.equal(lk.load_quantized(tmp_path / "model", empty)(X), models[0](X))

    def test_edited(self, plan, file):
        """Another choice for a layer, a candidate that was not measured, and a layer left to the config."""
        values = json.loads(file.read_text())
        values["candidates"]["mine"] = {**values["candidates"]["nf4"], "format": "int8", "rank": None}
        values["layers"]["head"]["choice"] = "mine"
        del values["layers"]["layers.1.up"], values["average_bits"]
        file.write_text(json.dumps(values))
        edited = lk.BitPlan.load(file)
        assert math.isnan(edited.error) and edited.bits("head") == 8 * (10 * 64 + 10 * 4 + 1024)
        model = uneven_model()
        lk.quantize_model(model, dataclasses.replace(CFG, format="uniform4"), plan=edited, progress=False)
        assert model.head.format.name == "int8" and model.head.rank is None
        assert model.layers[1]["up"].format.name == "uniform4"

    def test_solved_again(self, plan, file):
        again = solve_plan(lk.BitPlan.load(file), 4)
        assert again == plan_of(uneven_model(), 4, ["nf2", "nf4"]) and again.error < plan.error

    def test_of_another_model(self, plan, file):
        for model, message in (
            (nn.Sequential(nn.Linear(64, 64)), "no layer 'layers.0.up'"),
            (tiny_model(width=128), r"'layers.0.up' with shape \(128, 64\), the model \(256, 128\)"),
        ):
            before = parameters_of(model)
            with pytest.raises(ValueError, match=message):
                lk.quantize_model(model, CFG, plan=file, progress=False)
            assert_unchanged(model, before)

    def test_goes_on_after_an_interruption(self, plan):
        """Layers that are done, and those that are left dense by hand, are no sign of another model."""
        model = uneven_model()
        left = dict.fromkeys(("layers.1.*", "head"))
        lk.quantize_model(model, dataclasses.replace(CFG, overrides=left), plan=plan, progress=False)
        lk.quantize_model(model, dataclasses.replace(CFG, overrides={"head": None}), plan=plan, progress=False)
        assert type(model.head) is nn.Linear and isinstance(model.layers[1]["down"], lk.QuantLoRALinear)

    def test_a_planned_layer_is_not_skipped(self, plan):
        """Whatever the reason, and before anything is changed."""
        for change, message in (
            (lambda m: {"include": "layers.*"}, "'head'.*excluded"),
            (lambda m: {"exclude": "head"}, "'head'.*excluded"),
            (lambda m: m.head.register_forward_hook(lambda *args: None), "'head'.*hooks"),
            (lambda m: setattr(m, "tied", nn.ParameterList([m.head.weight])), "'head'.*shared with tied"),
            (lambda m: {"layer_types": "conv"}, "'layers.0.up', an nn.Linear: layer_types=.* must hold 'linear'"),
        ):
            model = uneven_model()
            fields = change(model)
            cfg = dataclasses.replace(CFG, **fields) if isinstance(fields, dict) else CFG
            before = parameters_of(model)
            with pytest.raises(ValueError, match=message):
                lk.quantize_model(model, cfg, plan=plan, progress=False)
            assert_unchanged(model, before)
            assert not any(isinstance(module, lk.QuantLoRALinear) for module in model.modules())

    def test_layer_types(self):
        """A plan for convolutions and embeddings says what the config lacks."""
        model = nn.ModuleDict({"up": nn.Linear(64, 64), "conv": nn.Conv1d(64, 64, 1), "embed": nn.Embedding(64, 64)})
        cfg = dataclasses.replace(CFG, layer_types=("linear", "conv", "embedding"))
        plan = plan_of(model, 3, ["nf2", "nf4"], cfg=cfg)
        with pytest.raises(ValueError, match=r"'conv', an nn.Conv1d: layer_types=\('linear',\).* must hold 'conv'"):
            lk.quantize_model(model, CFG, plan=plan, progress=False)
        assert len(lk.quantize_model(model, cfg, plan=plan, progress=False).layers) == 3

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '{"a": 1}', "[" * 100_000, "\x00"])
    def test_not_a_plan(self, text, tmp_path):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ValueError, match=r"plan\.json"):
            lk.BitPlan.load(tmp_path / "plan.json")

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            lk.BitPlan.load(tmp_path / "nowhere")

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (["loftq_plan_version"], 2, "loftq_plan_version is 2"),
            (["budget"], "3", "budget='3'"),
            (["count"], "all", "count='all'"),
            (["layers"], [], "layers must be an object"),
            (["candidates"], None, "candidates must be an object"),
            (["stranger"], 1, "stranger"),
            (["candidates", "nf2", "format"], "nf3", "candidate 'nf2': unknown format 'nf3'"),
            (["candidates", "nf2", "group_size"], 48, "candidate 'nf2': group_size=48"),
            (["candidates", "nf2", "rank"], 0, "candidate 'nf2': rank=0"),
            (["candidates", "nf2", "scale_dtype"], "int8", "candidate 'nf2': scale_dtype 'int8'"),
            (["candidates", "nf2", "colour"], 1, "candidate 'nf2' must hold"),
            (["candidates", "nf2"], "nf2", "candidate 'nf2' must hold"),
            (["layers", "head"], 5, "layer 'head': expected the keys"),
            (["layers", "head", "choice"], "nf8", r"layer 'head': choice 'nf8' is not one of \['nf2', 'nf4'\]"),
            (["layers", "head", "choice"], ["nf2"], "layer 'head': choice"),
            (["layers", "head", "shape"], [10], "layer 'head': shape"),
            (["layers", "head", "shape"], [10, -64], "layer 'head': shape"),
            (["layers", "head", "shape"], [3, 64], "layer 'head': candidate 'nf.': rank=4 is outside 1..3"),
            (["layers", "head", "errors"], {"nf2": "low"}, "layer 'head': errors"),
            (["layers", "head", "errors"], {"nf2": -1}, "layer 'head': errors"),
            (["layers", "head", "adapter_bits"], 7, "layer 'head': adapter_bits=7"),
            (["layers", "head", "extra"], 7, "layer 'head': expected the keys"),
        ],
        ids=str,
    )
    def test_refused(self, path, value, message, file):
        values = json.loads(file.read_text())
        owner = values
        for key in path[:-1]:
            owner = owner[key]
        owner[path[-1]] = value
        file.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=rf"plan\.json: .*{message}"):
            lk.BitPlan.load(file)

    def test_without_errors_it_is_not_solved(self, plan):
        layers = {n: dataclasses.replace(layer, errors={}) for n, layer in plan.layers.items()}
        with pytest.raises(ValueError, match="layer 'layers.0.up' has no measured error"):
            solve_plan(dataclasses.replace(plan, layers=layers))
        with pytest.raises(ValueError, match="no layers"):
            solve_plan(dataclasses.replace(plan, layers={}))


class TestFirstLayers:
    def test_rule(self):
        model = tiny_model()
        report = lk.quantize_model(
            model, dataclasses.replace(CFG, format="nf2", overrides=lk.first_layers(model, 1)), progress=False
        )
        formats = {layer.name: layer.format for layer in report.layers}
        assert formats == {
            "layers.0.up": "nf4", "layers.0.down": "nf4", "layers.1.up": "nf2", "layers.1.down": "nf2", "head": "nf2"
        }  # fmt: skip

    def test_blocks_with_two_digits(self):
        """Block 1 is not block 10."""
        model = nn.ModuleDict({"h": nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(12))})
        cfg = dataclasses.replace(CFG, format="nf2", overrides=lk.first_layers(model, 2, {"format": "int8", "rank": 2}))
        report = lk.quantize_model(model, cfg, progress=False)
        assert [(layer.format, layer.rank) for layer in report.layers] == [("int8", 2)] * 2 + [("nf2", 4)] * 10

    def test_blocks_that_are_layers(self):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        overrides = lk.first_layers(model, 1)
        assert lk.QuantConfig("nf2", overrides=overrides).for_layer("0").format == "nf4"
        assert lk.QuantConfig("nf2", overrides=overrides).for_layer("1").format == "nf2"

    def test_models_of_transformers(self):
        bert = tiny_bert()
        cfg = lk.QuantConfig("nf2", overrides=lk.first_layers(bert, 1))
        assert cfg.for_layer("encoder.layer.0.attention.self.query").format == "nf4"
        assert cfg.for_layer("encoder.layer.1.attention.self.query").format == "nf2"
        assert cfg.for_layer("pooler.dense").format == "nf2"

    def test_none_of_them(self):
        assert lk.first_layers(tiny_model(), 0) == {}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((3,), r"n=3 is outside 0 \.\. 2"),
            ((-1,), "n=-1"),
            ((1.0,), r"n=1\.0"),
            ((1, "nf4", "norm"), "'norm' is a LayerNorm"),
            ((1, "nf4", "nothing"), "has no module 'nothing'"),
        ],
        ids=str,
    )
    def test_refused(self, arguments, message):
        n, changes, blocks = (*arguments, "nf4", None)[:3] if len(arguments) < 3 else arguments
        with pytest.raises(ValueError, match=message):
            lk.first_layers(tiny_model(), n, changes, blocks=blocks)

    def test_which_list(self):
        def stack() -> nn.ModuleList:
            return nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

        model = nn.ModuleDict({"encoder": stack(), "decoder": stack()})
        with pytest.raises(ValueError, match="equally large: encoder, decoder"):
            lk.first_layers(model, 1)
        assert set(lk.first_layers(model, 1, blocks="decoder")) == {"decoder.0"}
        with pytest.raises(ValueError, match="no list of blocks"):
            lk.first_layers(nn.Linear(64, 64), 1)


class TestCommandLine:
    @pytest.fixture
    def bert(self, tmp_path):
        tiny_bert().save_pretrained(tmp_path / "bert")
        return tmp_path / "bert"

    def run(self, capsys, *arguments) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return status, output.out, output.err

    def test_plan_then_quantize(self, bert, tmp_path, capsys):
        options = ["--candidate", "nf2", "--candidate", "nf4,group_size=32", "--rank", 4, "--num-iter", 1]
        status, out, _ = self.run(capsys, "plan", bert, tmp_path / "plan.json", "--budget", 3, *options)
        assert status == 0 and "13 layers" in out and "of a budget of 3" in out
        plan = lk.BitPlan.load(tmp_path / "plan.json")
        assert 2.9 < plan.average_bits <= 3
        arguments = ["--plan", tmp_path / "plan.json", "--rank", 4, "--num-iter", 1]
        status, out, _ = self.run(capsys, "quantize", bert, tmp_path / "out", *arguments)
        assert status == 0 and f"{plan.average_bits:.3f} bits/weight" in out
        loaded = lk.load_quantized(tmp_path / "out")
        for name, layer in plan.layers.items():
            packed = loaded.get_submodule(name).packed
            candidate = plan.candidates[layer.choice]
            assert (packed.format.name, packed.group_size) == (candidate["format"], candidate["group_size"])
        status, out, _ = self.run(
            capsys, "plan", bert, tmp_path / "more.json", "--budget", 4, "--from", tmp_path / "plan.json"
        )
        assert status == 0 and lk.BitPlan.load(tmp_path / "more.json") == solve_plan(plan, 4)

    def test_layer_types(self, bert, tmp_path, capsys):
        options = ["--layer-type", "embedding", "--rank", 0, "--format", "int8"]
        status, out, _ = self.run(capsys, "quantize", bert, tmp_path / "out", *options)
        assert status == 0 and "2 layers" in out and "packed it would take" in out
        status, out, _ = self.run(capsys, "inspect", tmp_path / "out")
        assert status == 0 and "embeddings.word_embeddings" in out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["plan", "bert", "plan.json", "--budget", "1"], "--budget 1 bits per weight is below 2."),
            (["plan", "bert", "plan.json", "--budget", "3", "--from", "nothing"], "nothing does not exist"),
            (["quantize", "bert", "out", "--plan", "nothing"], "nothing does not exist"),
            (["quantize", "bert", "out", "--rank-energy", "0.5"], "--rank-energy 0.5 is for --init aser alone"),
            (["plan", "bert", "plan.json", "--budget", "3", "--rank-energy", "0.5"], "--rank-energy 0.5"),
            (["plan", "bert", "plan.json", "--budget", "3", "--from", "x", "--candidate", "nf2"], "--candidate cannot"),
            (["plan", "bert", "plan.json", "--budget", "3", "--from", "x", "--count", "packed"], "--count cannot"),
            (["plan", "bert", "plan.json", "--budget", "3", "--from", "x", "--absolute"], "--absolute cannot"),
            (
                ["plan", "bert", "plan.json", "--budget", "3", "--from", "x", "--calibration", "y"],
                "--calibration cannot",
            ),
            (["quantize", "bert", "out", "--plan", "bert/config.json"], "loftq_plan_version"),
        ],
        ids=str,
    )
    def test_errors_are_one_line(self, arguments, message, bert, capsys, monkeypatch):
        monkeypatch.chdir(bert.parent)
        options = [] if "--from" in arguments else ["--rank", "4", "--num-iter", "1"]
        status, out, err = self.run(capsys, *arguments, *options)
        last = err.replace("\r", "\n").splitlines()[-1]
        assert status == 2 and out == "" and last.startswith("loftq-kernels: ") and message in last
        assert not (bert.parent / "plan.json").exists() and not (bert.parent / "out").exists()

    @pytest.mark.parametrize("candidate", ["nf2,colour=1", "nf2,rank=x", "nf2,scale_dtype=int8", "nf2,group_size"])
    def test_candidates(self, candidate, bert, capsys):
        with pytest.raises(SystemExit, match="2"):
            self.run(capsys, "plan", bert, "plan.json", "--budget", "3", "--candidate", candidate)
        assert "--candidate" in capsys.readouterr().err
