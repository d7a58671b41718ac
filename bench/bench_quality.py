"""RILQ against LoftQ at 2 bits over ranks, and fine-tuning from the start of LoftQ and from that of QLoRA.

The model is `recipes.small_lm`, trained from scratch for each seed; perplexities are of held-out text. Memory is that
of whole processes, on a larger model with random weights.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
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
from bench import harness
from loftq_kernels.recipes import finetune, small_lm
from loftq_kernels.storage import files

FORMATS, RANKS = ("nf2", "int2"), (2, 8, 32)
QALORA_RANK, QALORA_GROUP = 4, 32  # Width 128 has four groups of 32, so no larger rank is possible.
MEMORY_SIZES = {"width": 768, "layers": 6, "heads": 8, "hidden": 2048}  # 43 M weights, 0.17 GB in float32
MEMORY_MODES = ("teacher cached", "teacher and model")


@dataclass(frozen=True)
class Sizes:
    """How much to run. The full ones take about a quarter of an hour on two cores."""

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
    path = output / ("quality_quick.json" if quick else "quality.json")
    rows: list[dict] = []
    curves: list[dict] = []
    for seed in sizes.seeds:
        base = small_lm.pretrained(sizes.pretrain_steps, seed)
        rows += tuned(base, seed, sizes)
        curves += fine_tuned(base, seed, sizes)
        results = {"sizes": asdict(sizes), "summary": summarize(rows, curves), "rows": rows, "fine-tuning": curves}
        harness.write_json(path, results)
    results |= {"memory": memory(sizes), "merged, microseconds": merged_speed()}
    results["seconds"] = time.perf_counter() - started
    harness.write_json(path, results)
    plot(results, path.with_suffix(".png"))
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
            seconds = harness.interleaved({k: partial(layer, x) for k, layer in layers.items()}, repeats=100)
        rows.append({"format": format, **{name: 1e6 * value for name, value in seconds.items()}})
    return rows


def memory(sizes: Sizes) -> dict[str, float]:
    """Peak resident bytes of processes that run RILQ, less those of one that runs it on a tiny model.

    "teacher cached" caches the states in one process and tunes in another; its figure is the larger of the two.
    """
    with tempfile.TemporaryDirectory() as folder:

        def peak(mode: str) -> int:
            command = [sys.executable, "-m", "bench.bench_quality", mode, folder, json.dumps(dict(sizes.memory_sizes))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{mode}: {done.stderr}")
            return int(done.stdout)

        peak("prepare")
        base = peak("nothing")
        peaks = {mode: peak(mode) - base for mode in ("cache", "tune", "both")}
    return peaks | {MEMORY_MODES[0]: max(peaks["cache"], peaks["tune"]), MEMORY_MODES[1]: peaks["both"]}


def measure(mode: str, folder: Path, sizes: dict[str, int]) -> int:
    """One process of `memory`; its peak resident bytes."""
    batches = list(torch.randint(small_lm.BYTES, (4, 2, 64), generator=torch.Generator().manual_seed(0)))
    cfg = lk.RilqConfig(steps=3, accumulate=1, validate_every=3)
    if mode == "prepare":
        torch.manual_seed(0)
        model = small_lm.SmallLM(**sizes)
        files.save_tensors(folder / "dense.safetensors", model.state_dict(), {})
        lk.quantize_model(model, lk.QuantConfig("nf2", rank=8, init="qlora"), progress=False)
        lk.save_quantized(model, folder / "quantized")
    if mode == "nothing":
        model = small_lm.SmallLM(width=32, layers=1, heads=1, hidden=32)
        teacher = copy.deepcopy(model)
        lk.quantize_model(model, lk.QuantConfig("nf2", rank=8), progress=False)
        lk.rilq_tune(model, teacher, batches, cfg, cache=folder / "tiny", progress=False)
    if mode == "cache":
        lk.cache_teacher(lambda: _dense(folder, sizes), batches, folder / "states", progress=False)
    if mode in ("tune", "both"):
        with torch.device("meta"):
            skeleton = small_lm.SmallLM(**sizes)
        model = lk.load_quantized(folder / "quantized", skeleton)
        teacher = folder / "states" if mode == "tune" else _dense(folder, sizes)
        lk.rilq_tune(model, teacher, batches, cfg, progress=False)
    # A process inherits ru_maxrss from the one that started it, so it is not used.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _dense(folder: Path, sizes: dict[str, int]) -> nn.Module:
    with torch.device("meta"):
        model = small_lm.SmallLM(**sizes)
    model.load_state_dict(files.load_tensors(folder / "dense.safetensors")[0], assign=True)
    return model.eval()


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
    lines += [f"| {name} | {results['memory'][name] / 1e6:.0f} |" for name in ("cache", "tune", *MEMORY_MODES)]
    lines += ["", "| one row, 2048 x 2048, µs | no adapter | QA-LoRA | merged |", "|---|---:|---:|---:|"]
    lines += [
        f"| {row['format']} | {row['no adapter']:.0f} | {row['qalora']:.0f} | {row['merged']:.0f} |"
        for row in results["merged, microseconds"]
    ]
    lines += ["", *(f"* {claim}: {'yes' if holds else 'NO'}" for claim, holds in _claims(results).items())]
    return "\n".join(lines) + "\n"


def _claims(results: dict[str, Any]) -> dict[str, bool]:
    peaks = results["memory"]
    less = peaks[MEMORY_MODES[0]] < peaks[MEMORY_MODES[1]]
    return {**results["summary"]["claims"], "RILQ with cached states takes less memory than with the teacher": less}


def plot(results: dict[str, Any], path: Path) -> None:
    """Perplexity over ranks, and over the steps of fine-tuning; lines are means over seeds, dots single seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    ranks, rows = results["sizes"]["ranks"], results["rows"]
    for i, format in enumerate(FORMATS):
        for column, style, label in (("start", "--", "LoftQ"), ("rilq", "-", "RILQ")):
            values = [_values(rows, format, "lora", rank, column) for rank in ranks]
            left.plot(range(len(ranks)), [mean(v) for v in values], style, color=f"C{i}", label=f"{format}, {label}")
            for at, of_rank in enumerate(values):
                left.plot([at] * len(of_rank), of_rank, ".", color=f"C{i}", markersize=4)
    left.set_xticks(range(len(ranks)), [f"r={rank}" for rank in ranks])
    left.set(title="2 bits, held-out English", ylabel="perplexity")
    for i, format in enumerate(finetune.FORMATS):
        for init, style in (("qlora", "--"), ("loftq", "-")):
            runs = [c for c in results["fine-tuning"] if (c["format"], c["init"]) == (format, init)]
            average = [mean(values) for values in zip(*(c["perplexity"] for c in runs), strict=True)]
            right.plot(runs[0]["steps"], average, style, color=f"C{i}", label=f"{format}, {init}")
    right.set(title="fine-tuned on code", xlabel="step", ylabel="perplexity")
    for axis in (left, right):
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)


if __name__ == "__main__":
    print(measure(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])))
