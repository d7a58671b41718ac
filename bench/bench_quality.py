"""RILQ against LoftQ at 2 bits over ranks, and fine-tuning from the start of LoftQ and from that of QLoRA.

The model is `recipes.small_lm`, trained from scratch for each seed; perplexities are of held-out text. Memory is that
of whole processes, on a larger model with random weights.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

import loftq_kernels as lk
from bench import harness, quality_memory
from bench.quality_memory import CACHED, TOGETHER
from bench.subject import Subject
from loftq_kernels.recipes import finetune, small_lm

SUBJECT = Subject(takes="40 min", quick="1 min", asked=True)
FORMATS, RANKS = ("nf2", "int2"), (2, 8, 32)
QALORA_RANK, QALORA_GROUP = 4, 32  # Width 128 has four groups of 32, so no larger rank is possible.
MEMORY_SIZES = {"width": 768, "layers": 6, "heads": 8, "hidden": 2048}  # 43 M weights, 0.17 GB in float32


@dataclass(frozen=True)
class Sizes:
    """How much to run."""

    seeds: tuple[int, ...]
    pretrain_steps: int
    rilq_steps: int
    finetune_steps: int
    batches: int  # Batches of 8 x 128 tokens for RILQ, a fifth of them held out.
    ranks: tuple[int, ...] = RANKS
    memory_sizes: tuple[tuple[str, int], ...] = tuple(MEMORY_SIZES.items())


FULL = Sizes((0, 1, 2), 600, 80, 100, 50)
QUICK = Sizes((0,), 20, 4, 4, 5, (2, 8), (("width", 512), ("layers", 4), ("heads", 8), ("hidden", 1024)))


def run(output: Path, *, quick: bool) -> None:
    """JSON, curves and the table of docs/quality.md; rows are written as they come."""
    sizes, started = QUICK if quick else FULL, time.perf_counter()
    path = harness.result_file(output, "quality", quick=quick)
    rows: list[dict] = []
    curves: list[dict] = []
    for seed in harness.progress(sizes.seeds, lambda seed: f"seed {seed}: pretraining, RILQ, fine-tuning"):
        base = small_lm.pretrained(sizes.pretrain_steps, seed)
        rows += tuned(base, seed, sizes)
        curves += fine_tuned(base, seed, sizes)
        results = {"sizes": asdict(sizes), "summary": summarize(rows, curves), "rows": rows, "fine-tuning": curves}
        harness.write_json(path, results)
    results |= {"memory": quality_memory.memory(dict(sizes.memory_sizes)), "merged, microseconds": merged_speed()}
    results["seconds"] = time.perf_counter() - started
    harness.write_json(path, results)
    table = markdown(results)
    path.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)


def tuned(base: nn.Module, seed: int, sizes: Sizes) -> list[dict]:
    """Held-out perplexity of the dense model, and for each format and rank of LoftQ's start, then after RILQ."""
    text, held_out = small_lm.english()
    generator = torch.Generator().manual_seed(1000 + seed)
    batches = [small_lm.windows(text, 8, generator) for _ in range(sizes.batches)]
    dense = {"seed": seed, "format": "float32", "rank": None, "adapter": "none"}
    rows = [{**dense, "start": small_lm.perplexity(base, held_out), "rilq": None, "seconds": None}]
    adapters = [("lora", rank, 64) for rank in sizes.ranks] + [("qalora", QALORA_RANK, QALORA_GROUP)]
    for format in FORMATS:
        for adapter, rank, group_size in adapters:
            model = copy.deepcopy(base)
            cfg = lk.QuantConfig(format, group_size, rank=rank, adapter=adapter, seed=seed)
            lk.quantize_model(model, cfg, progress=False)
            row = {"seed": seed, "format": format, "rank": rank, "adapter": adapter}
            row["start"] = small_lm.perplexity(model, held_out)
            started = time.perf_counter()
            lk.rilq_tune(model, base, batches, rilq_config(sizes, adapter), progress=False)
            row |= {"rilq": small_lm.perplexity(model, held_out), "seconds": time.perf_counter() - started}
            if adapter == "qalora":
                lk.merge_adapters(model)
                row["merged"] = small_lm.perplexity(model, held_out)
            rows.append(row)
    return rows


def rilq_config(sizes: Sizes, adapter: str) -> lk.RilqConfig:
    """A model of a million weights takes a learning rate 20 times that of the paper.

    Group means divide by 32, so the same step in A moves the output less: they take an even larger rate.
    """
    lr = 2e-3 if adapter == "lora" else 1e-2
    return lk.RilqConfig(lr=lr, steps=sizes.rilq_steps, accumulate=1, validate_every=20, gradient_checkpointing=False)


def fine_tuned(base: nn.Module, seed: int, sizes: Sizes) -> list[dict]:
    return [
        {
            "seed": seed,
            **asdict(finetune.finetune(base, format, init, 8, steps=sizes.finetune_steps, lr=2e-3, seed=seed)),
        }
        for format in finetune.FORMATS
        for init in finetune.STARTS
    ]


def summarize(rows: Sequence[dict], curves: Sequence[dict]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, and whether the claims hold."""
    spreads = {}
    for format in FORMATS:
        for column in ("start", "rilq"):
            values = [
                [row[column] for row in rows if (row["seed"], row["format"], row["adapter"]) == (seed, format, "lora")]
                for seed in _seeds(rows)
            ]
            spreads[format, column] = [max(of_seed) - min(of_seed) for of_seed in values]

    def perplexity(format: str, rank: int, column: str) -> float:
        return mean(_values(rows, format, "lora", rank, column))

    def last(format: str, init: str) -> list[float]:
        return [curve["perplexity"][-1] for curve in curves if (curve["format"], curve["init"]) == (format, init)]

    claims = {}
    for format in FORMATS:
        claims[f"{format}: RILQ r=2 below LoftQ r=8"] = perplexity(format, 2, "rilq") < perplexity(format, 8, "start")
        halved = mean(spreads[format, "rilq"]) <= mean(spreads[format, "start"]) / 2
        claims[f"{format}: RILQ's spread over ranks at most half of LoftQ's"] = halved
    claims["2 bits: fine-tuned from LoftQ below from QLoRA"] = mean(last("nf2", "loftq")) < mean(last("nf2", "qlora"))
    claims["4 bits: fine-tuned from LoftQ at most as from QLoRA"] = mean(last("nf4", "loftq")) <= mean(
        last("nf4", "qlora")
    )
    return {
        "spread over ranks": {f"{format} {column}": _mean_and_deviation(v) for (format, column), v in spreads.items()},
        "fine-tuned": {
            f"{format} {init}": _mean_and_deviation(last(format, init))
            for format in finetune.FORMATS
            for init in finetune.STARTS
        },
        "claims": claims,
    }


def _seeds(rows: Iterable[dict]) -> list[int]:
    return sorted({row["seed"] for row in rows})


def _values(rows: Iterable[dict], format: str, adapter: str, rank: int | None, column: str) -> list[float]:
    key = format, adapter, rank
    return [row[column] for row in rows if (row["format"], row["adapter"], row["rank"]) == key]


def _mean_and_deviation(values: Sequence[float]) -> dict[str, float]:
    return {"mean": mean(values), "deviation": stdev(values) if len(values) > 1 else 0.0}


def merged_speed(size: int = 2048) -> list[dict]:
    """Microseconds for one row of x: without adapter, with a QA-LoRA adapter, and with that merged."""
    linear, x = nn.Linear(size, size, bias=False), torch.randn(1, size)
    rows = []
    for format in ("nf2", "int2", "nf4", "int4"):
        plain = lk.QuantLoRALinear.from_linear(linear, lk.QuantConfig(format, rank=None, scale_dtype=torch.float32))
        adapted = lk.QuantLoRALinear.from_linear(linear, lk.QuantConfig(format, rank=8, adapter="qalora"))
        merged = copy.deepcopy(adapted)
        merged.merge_adapter()
        layers = {"no adapter": plain, "qalora": adapted, "merged": merged}
        with torch.no_grad():
            times = harness.timings({name: partial(layer, x) for name, layer in layers.items()}, repeats=100)
        rows.append(harness.timed_row({"format": format}, times, per_second=1e6))
    return rows


def markdown(results: dict[str, Any]) -> str:
    """The figures as docs/quality.md shows them."""
    rows, summary = results["rows"], results["summary"]

    def cell(values: list[float]) -> str:
        return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"

    lines = [
        f"Full precision: {cell(_values(rows, 'float32', 'none', None, 'start'))}.",
        "",
        "| weights | adapter | LoftQ's start | after RILQ |",
        "|---|---|---:|---:|",
    ]
    for format in FORMATS:
        for rank in results["sizes"]["ranks"]:
            start, after = (cell(_values(rows, format, "lora", rank, column)) for column in ("start", "rilq"))
            lines.append(f"| {format} | r={rank} | {start} | {after} |")
        spread = summary["spread over ranks"]
        both = (spread[f"{format} {column}"] for column in ("start", "rilq"))
        texts = (f"{value['mean']:.3f} ± {value['deviation']:.3f}" for value in both)
        lines.append(f"| {format} | largest - smallest | {' | '.join(texts)} |")
        merged = (cell(_values(rows, format, "qalora", QALORA_RANK, column)) for column in ("start", "merged"))
        lines.append(f"| {format} | QA-LoRA r={QALORA_RANK}, g={QALORA_GROUP}, merged | {' | '.join(merged)} |")
    lines += ["", "| weights | start | before | fine-tuned |", "|---|---|---:|---:|"]
    for format in finetune.FORMATS:
        for init in finetune.STARTS:
            of_run = [c["perplexity"] for c in results["fine-tuning"] if (c["format"], c["init"]) == (format, init)]
            lines.append(f"| {format} | {init} | {cell([p[0] for p in of_run])} | {cell([p[-1] for p in of_run])} |")
    lines += ["", "| RILQ's process | peak memory, MB |", "|---|---:|"]
    lines += [f"| {name} | {results['memory'][name] / 1e6:.0f} |" for name in ("cache", "tune", CACHED, TOGETHER)]
    lines += ["", "| one row, 2048 x 2048, µs | no adapter | QA-LoRA | merged |", "|---|---:|---:|---:|"]
    lines += [
        f"| {row['format']} | {row['no adapter']:.0f} | {row['qalora']:.0f} | {row['merged']:.0f} |"
        for row in results["merged, microseconds"]
    ]
    lines += ["", *(f"* {claim}: {'yes' if holds else 'NO'}" for claim, holds in _claims(results).items())]
    return "\n".join(lines) + "\n"


def _claims(results: dict[str, Any]) -> dict[str, bool]:
    peaks = results["memory"]
    less = peaks[CACHED] < peaks[TOGETHER]
    return {**results["summary"]["claims"], "RILQ with cached states takes less memory than with the teacher": less}
