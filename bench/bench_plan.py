"""Mixed precision on all-MiniLM-L6-v2: plans against one format for all and LoftQ's first-n rule, at equal bits."""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor, nn

import loftq_kernels as lk
from bench import harness
from loftq_kernels import demo

CANDIDATES = ("nf2", "nf4")
BLOCKS = (1, 2)  # of the first-n rule, whose bits are the plans' budgets: 2.58 and 2.91
TESTED, CALIBRATED = 60, 40  # sentences, the latter for each seed others


def run(output: Path, *, quick: bool) -> None:
    """Mean cosine between the embeddings of the quantized and the dense model, over sentences not calibrated on."""
    model, tokenizer = demo._load_model()
    sentences = demo.read_sentences(TESTED + 3 * CALIBRATED)
    tested = sentences[::2][:TESTED]
    others = [sentence for sentence in sentences if sentence not in set(tested)]
    expected = demo.embed(model, tokenizer, tested)
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for seed in range(1 if quick else 3):
        grams = collect(model, tokenizer, others[seed * CALIBRATED : (seed + 1) * CALIBRATED])
        for name, cfg, plan in variants(model, lk.QuantConfig("nf2", rank=16, num_iter=1, seed=seed), grams):
            quantized = copy.deepcopy(model)
            report = lk.quantize_model(quantized, cfg, plan=plan, progress=False)
            cosine = torch.nn.functional.cosine_similarity(demo.embed(quantized, tokenizer, tested), expected).mean()
            found[name].append((report.bits_per_weight, cosine.item()))
    rows = [row(name, values) for name, values in found.items()]
    harness.print_table(rows)
    harness.write_json(output / ("plan_quick.json" if quick else "plan.json"), {"rows": rows})


def collect(model: nn.Module, tokenizer, sentences: list[str]) -> dict[str, Tensor]:
    """X^T X of every linear layer's inputs over sentences."""
    grams: dict[str, Tensor] = {}

    def hook(name: str):
        def add(module, inputs):
            x = inputs[0].reshape(-1, module.in_features).double()
            grams[name] = grams.get(name, 0) + x.T @ x

        return add

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in model.named_modules() if type(m) is nn.Linear]
    demo.embed(model, tokenizer, sentences)
    for handle in handles:
        handle.remove()
    return grams


def variants(model: nn.Module, cfg: lk.QuantConfig, grams: dict[str, Tensor]) -> Iterator[tuple]:
    """(name, config, plan) of everything that is compared."""
    yield "nf2 everywhere", cfg, None
    budgets = []
    for n in BLOCKS:
        rule = dataclasses.replace(cfg, overrides=lk.first_layers(model, n))
        bits = {name: 4.25 if rule.for_layer(name).format == "nf4" else 2.25 for name in grams}
        weights = {name: model.get_submodule(name).weight.numel() for name in grams}
        budgets.append(sum(bits[name] * weights[name] for name in grams) / sum(weights.values()) + 0.002)  # code books
        yield f"first {n} of 6 blocks nf4", rule, None
    for what, statistics in (("weights", None), ("outputs", grams)):
        relative = lk.plan_bits(model, budgets[0], CANDIDATES, cfg, statistics=statistics, progress=False)
        for kind, plan in (("relative", relative), ("absolute", absolute(relative, model, statistics))):
            for budget in budgets:
                yield f"plan, {kind}, {what}, {budget:.2f}", cfg, lk.solve_plan(plan, budget)


def absolute(plan: lk.BitPlan, model: nn.Module, grams: dict[str, Tensor] | None) -> lk.BitPlan:
    """The plan with errors as `plan_bits(relative=False)` measures them: times ||W||^2, or tr(W G W^T)."""
    layers = {}
    for name, layer in plan.layers.items():
        weight = model.get_submodule(name).weight.detach().double()
        product = weight if grams is None else weight @ grams[name]
        norm = (product * weight).sum().item()
        errors = {candidate: error * norm for candidate, error in layer.errors.items()}
        layers[name] = dataclasses.replace(layer, errors=errors)
    return dataclasses.replace(plan, layers=layers)


def row(name: str, values: list[tuple[float, float]]) -> dict:
    bits, cosines = zip(*values, strict=True)
    spread = stdev(cosines) if len(cosines) > 1 else 0.0
    return {"": name, "bits/weight": mean(bits), "cosine": mean(cosines), "spread": spread, "seeds": len(cosines)}
