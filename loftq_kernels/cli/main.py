"""The parser of the command line, and what becomes of failures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import loftq_kernels as lk
from loftq_kernels.cli import commands, options
from loftq_kernels.models.allocate import DEFAULT_CANDIDATES
from loftq_kernels.models.plan import COUNTS


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. A foreseeable failure is one line on standard error and status 2."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("loftq-kernels: interrupted", file=sys.stderr)
        return 130
    # RuntimeError: what torch raises for a device, for memory and for types that it has no kernel for.
    except (OSError, ValueError, TypeError, ImportError, RuntimeError, MemoryError, ArithmeticError) as error:
        print(f"loftq-kernels: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loftq-kernels", description=(lk.__doc__ or "").partition("\n")[0])
    parser.add_argument("--version", action="version", version=lk.__version__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_demo, _add_quantize, _add_plan, _add_inspect, _add_check, _add_bench, _add_info):
        add(subparsers)
    return parser


def _add_demo(subparsers) -> None:
    demo = subparsers.add_parser(
        "demo", help="quantize a real sentence model to 2 and 4 bits and show what that did to it"
    )
    demo.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the plot and the model")
    demo.add_argument("--sentences", type=int, default=400, help="how many sentences to compare (default 400)")
    demo.set_defaults(run=commands.demo)


def _add_quantize(subparsers) -> None:
    quantize = subparsers.add_parser("quantize", help="quantize a local transformers or safetensors folder")
    quantize.add_argument("model_dir", type=Path)
    quantize.add_argument("output_dir", type=Path)
    quantize.add_argument("--plan", type=Path, metavar="FILE", help="formats by layer, from `loftq-kernels plan`")
    options.add_config_arguments(quantize)
    quantize.set_defaults(run=commands.quantize)


def _add_plan(subparsers) -> None:
    plan = subparsers.add_parser("plan", help="choose each layer's format for a budget of bits, into a JSON file")
    plan.add_argument("model_dir", type=Path)
    plan.add_argument("plan_file", type=Path)
    plan.add_argument("--budget", type=float, required=True, help="bits per weight on average, e.g. 2.5")
    plan.add_argument(
        "--candidate",
        action="append",
        type=options.candidate,
        metavar="FORMAT[,FIELD=VALUE...]",
        help=f'e.g. "nf2" or "nf4,group_size=32,rank=8" (repeatable; default {" ".join(DEFAULT_CANDIDATES)})',
    )
    plan.add_argument("--count", choices=COUNTS, help="what counts as bits (default packed)")
    plan.add_argument("--absolute", action="store_true", help="add up absolute errors instead of relative ones")
    plan.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="solve this plan again for the budget, measure nothing"
    )
    options.add_config_arguments(plan)
    plan.set_defaults(run=commands.plan)


def _add_inspect(subparsers) -> None:
    inspect = subparsers.add_parser("inspect", help="describe a quantized folder")
    inspect.add_argument("model_dir", type=Path)
    inspect.set_defaults(run=commands.inspect)


def _add_check(subparsers) -> None:
    check = subparsers.add_parser("check", help="try every kernel of this machine against the reference")
    check.set_defaults(run=commands.check)


def _add_bench(subparsers) -> None:
    bench = subparsers.add_parser("bench", help="run the benchmarks of the source tree (python -m bench)")
    bench.add_argument("arguments", nargs=argparse.REMAINDER)
    bench.set_defaults(run=commands.bench)


def _add_info(subparsers) -> None:
    info = subparsers.add_parser("info", help="versions, devices and kernels of this installation")
    info.set_defaults(run=commands.info)
