"""The LoftQ initializer's quality: final relative errors of the fast solver against the exact one."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from torch import Tensor

import loftq_kernels as lk
from bench import harness

FORMATS, RANKS, KINDS = ("nf4", "nf2", "int2", "uniform2"), (8, 16, 64), ("gaussian", "outliers", "low rank + noise")
LIMIT = 1.002  # of the exact solver's final error
# At 4096 the exact solver takes minutes a case on two cores: a sample of the grid there, and Gaussian weights at 2048.
LARGE = [((2048, 2048), "gaussian", name, rank) for name in FORMATS for rank in RANKS]
LARGE += [((4096, 4096), "outliers", "nf2", 16), ((4096, 11008), "gaussian", "nf4", 64)]


def run(output: Path, *, quick: bool) -> None:
    results = quality(quick)
    harness.write_json(output / "init_quality.json", results)
    plot(results["rows"], output / "init_quality.png")


def matrix(kind: str, rows: int, columns: int) -> Tensor:
    """Gaussian weights; 1% of the columns 20 times larger; or rank 32 below Gaussian noise a third of its size."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    if kind == "outliers":
        weight[:, torch.randperm(columns, generator=generator)[: columns // 100]] *= 20
    elif kind == "low rank + noise":
        factors = torch.randn(rows, 32, generator=generator), torch.randn(32, columns, generator=generator)
        weight = 0.3 * weight + factors[0] @ factors[1] * (0.02 / 32**0.5)
    return weight


def quality(quick: bool) -> dict:
    """Every case once with T = 5; the errors at T = 1 are the first of those."""
    cases = []
    for shape in ((512, 512),) if quick else ((1024, 1024), (1000, 1300)):
        for kind, name, rank in itertools.product(KINDS, FORMATS, RANKS):
            cases.append((shape, kind, name, rank))
    if not quick:
        cases += LARGE
    rows = [_compare(matrix(kind, *shape), kind, name, rank) for shape, kind, name, rank in cases]
    layers = minilm_layers()
    for name, rank in itertools.product(FORMATS, RANKS):
        rows += [_compare(weight, f"MiniLM {layer}", name, rank) for layer, weight in layers[: 4 if quick else None]]
    worst = {key: max(rows, key=lambda row: row[key]) for key in ("ratio at T=1", "ratio at T=5")}
    summary = {
        "cases": len(rows),
        "limit": LIMIT,
        "beyond the limit": sum(max(row["ratio at T=1"], row["ratio at T=5"]) > LIMIT for row in rows),
        "worst": worst,
        "T=5 worse than T=1": sum(row["fast T=5"] > row["fast T=1"] for row in rows),
        "adapter worse than none": sum(row["fast T=1"] > row["no adapter"] for row in rows),
    }
    print(json.dumps(summary, indent=1))
    return {"summary": summary, "rows": rows}


def minilm_layers() -> list[tuple[str, Tensor]]:
    """The linear weights of all-MiniLM-L6-v2."""
    from loftq_kernels.demo import minilm_folder
    from loftq_kernels.storage import open_tensors

    with open_tensors(minilm_folder() / "model.safetensors") as file:
        names = [name for name in file.keys() if name.endswith("weight") and "embeddings" not in name]  # noqa: SIM118
        return [(name, file.get_tensor(name)) for name in names if len(file.get_slice(name).get_shape()) == 2]


def _compare(weight: Tensor, kind: str, name: str, rank: int) -> dict:
    exact = lk.loftq_init(weight, name, rank, 5, svd="exact")
    fast = lk.loftq_init(weight, name, rank, 5, svd="fast")
    rounded = (weight - lk.quantize(weight, name).dequantize()).norm() / weight.norm()
    return {
        "shape": list(weight.shape),
        "weights": kind,
        "format": name,
        "rank": rank,
        "no adapter": rounded.item(),
        "exact T=1": exact.errors[0],
        "fast T=1": fast.errors[0],
        "exact T=5": exact.error,
        "fast T=5": fast.error,
        "ratio at T=1": fast.errors[0] / exact.errors[0],
        "ratio at T=5": fast.error / exact.error,
    }


def plot(rows: list[dict], path: Path) -> None:
    """How far the fast solver's errors lie above the exact ones, case by case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for key in ("ratio at T=1", "ratio at T=5"):
        axis.plot(sorted(100 * (row[key] - 1) for row in rows), label=key.removeprefix("ratio at "))
    axis.axhline(100 * (LIMIT - 1), color="black", linewidth=0.8, linestyle="--")
    axis.set(title="LoftQ error above the exact solver's", xlabel="case, sorted", ylabel="%")
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
