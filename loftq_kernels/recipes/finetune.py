"""Fine-tune 2-bit and 4-bit models, their adapters alone, from LoftQ's start and from QLoRA's.

A small language model is trained from scratch on English, quantized, and fine-tuned on Python code: text that every
Python carries. ``python -m loftq_kernels.recipes.finetune`` takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import loftq_kernels as lk
from loftq_kernels.progress import progress_bar
from loftq_kernels.recipes import small_lm

FORMATS, STARTS = ("nf2", "nf4"), ("qlora", "loftq")
EVERY = 20  # steps between validations


@dataclass(frozen=True)
class Run:
    """Fine-tuning of one quantized model: validation perplexity on code over the steps."""

    format: str
    init: str
    rank: int
    weight_error: float  # mean over layers, before fine-tuning
    steps: list[int]
    perplexity: list[float]


def finetune(base: nn.Module, format: str, init: str, rank: int, *, steps: int, lr: float, seed: int) -> Run:
    """Quantize a copy of base and train its adapters on code; the data depends on seed alone, not on the start."""
    model = copy.deepcopy(base)
    report = lk.quantize_model(model, lk.QuantConfig(format, rank=rank, init=init, seed=seed), progress=False)
    text, held_out = small_lm.code()
    at, perplexity = [0], [small_lm.perplexity(model, held_out)]
    for step, _ in small_lm.train(model, text, steps=steps, lr=lr, batch=8, seed=seed, warmup=5):
        if step % EVERY == 0 or step == steps:
            at.append(step)
            perplexity.append(small_lm.perplexity(model, held_out))
    return Run(format, init, rank, report.error, at, perplexity)


def table(runs: Sequence[Run], dense: float) -> str:
    """Markdown: perplexity on code before and after; ``dense`` is that of the full-precision model, not fine-tuned."""
    lines = [
        "| weights | start | rank | weight error | before | after |",
        "|---|---|---:|---:|---:|---:|",
        f"| float32 | not fine-tuned | | 0 | {dense:.3f} | |",
    ]
    lines += [
        f"| {run.format} | {run.init} | {run.rank} | {run.weight_error:.4f} | {run.perplexity[0]:.3f} "
        f"| {run.perplexity[-1]:.3f} |"
        for run in runs
    ]
    return "\n".join(lines)


def plot(runs: Sequence[Run], path: Path) -> None:
    """Validation perplexity over the steps."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the recipe's plot needs: pip install matplotlib") from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for run in runs:
        style = "-" if run.init == "loftq" else "--"
        axis.plot(
            run.steps, run.perplexity, style, color=f"C{FORMATS.index(run.format)}", label=f"{run.format}, {run.init}"
        )
    axis.set(title="Adapters fine-tuned on code", xlabel="step", ylabel="validation perplexity")
    axis.legend()
    figure.savefig(path, format="png", dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loftq_kernels.recipes.finetune", description=__doc__)
    parser.add_argument("--pretrain-steps", type=int, default=450, help="of the base model (default 450)")
    parser.add_argument("--steps", type=int, default=120, help="of fine-tuning (default 120)")
    parser.add_argument("--lr", type=float, default=2e-3, help="of fine-tuning (default 2e-3)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    output = Path("finetune-output")
    parser.add_argument("--output", type=Path, default=output, help=f"folder for table and plot (default {output})")
    args = parser.parse_args(argv)
    for name in ("pretrain_steps", "steps", "rank"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    args.output.mkdir(parents=True, exist_ok=True)
    with progress_bar(total=args.pretrain_steps, desc="train the base model", unit="step", show=True) as bar:
        base = small_lm.pretrained(args.pretrain_steps, args.seed, progress=lambda step: bar.update())
    dense = small_lm.perplexity(base, small_lm.code()[1])
    runs = []
    starts = [(format, init) for format in FORMATS for init in STARTS]
    for format, init in progress_bar(starts, desc="fine-tune", unit="model", show=True):
        runs.append(finetune(base, format, init, args.rank, steps=args.steps, lr=args.lr, seed=args.seed))
    text = table(runs, dense)
    print(f"\n{sum(p.numel() for p in base.parameters())} weights, {torch.get_num_threads()} threads\n\n{text}\n")
    (args.output / "finetune.md").write_text(text + "\n", encoding="utf-8")
    results = {"dense": dense, "runs": [asdict(run) for run in runs]}
    (args.output / "finetune.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    plot(runs, args.output / "finetune.png")
    print(f"table, figures and curves: {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
