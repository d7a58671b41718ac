"""``python -m bench [SUBJECT ...]``: run benchmarks, one file per subject; by default all that this machine can run."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

GPU_SUBJECTS = ("small_matrix", "gpu")
SUBJECTS = (
    "quantize",
    "cpu",
    "busy",
    "init",
    "init_quality",
    "init_h200",
    "sass",
    "plan",
    "quality",
    "data_aware",
    *GPU_SUBJECTS,
)
ON_REQUEST = ("autotune", "overhead")  # The first searches for minutes; a busy machine blurs the second.
RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"of {', '.join(SUBJECTS + ON_REQUEST)}")
    parser.add_argument("--quick", action="store_true", help="smaller shapes and fewer repetitions, to try it out")
    parser.add_argument("--seconds", type=float, help="gpu: time after which what is left is named and not measured")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON and plots")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.subjects) - set(SUBJECTS + ON_REQUEST))
    if unknown:
        parser.error(f"unknown subject {', '.join(unknown)}; known: {', '.join(SUBJECTS + ON_REQUEST)}")
    args.output.mkdir(parents=True, exist_ok=True)
    here = [subject for subject in SUBJECTS if subject not in GPU_SUBJECTS or torch.cuda.is_available()]
    for subject in args.subjects or here:
        options = {"seconds": args.seconds} if subject == "gpu" and args.seconds is not None else {}
        importlib.import_module(f"bench.bench_{subject}").run(args.output, quick=args.quick, **options)
    print(f"results in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
