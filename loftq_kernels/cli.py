"""The command line: ``loftq-kernels demo | plan | quantize | inspect | bench | info``."""

from __future__ import annotations

import argparse
import importlib
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import loftq_kernels as lk
from loftq_kernels import pretrained
from loftq_kernels.allocate import DEFAULT_CANDIDATES, UnsolvedError, solve_plan
from loftq_kernels.checkpoint_config import CONFIG_NAME, CheckpointConfig
from loftq_kernels.config import LAYER_TYPES
from loftq_kernels.initializers.result import ADAPTERS
from loftq_kernels.ops import extension
from loftq_kernels.ops.checks import SCALE_DTYPES_BY_NAME
from loftq_kernels.packing import GROUP_SIZES
from loftq_kernels.plan import CANDIDATE_FIELDS, COUNTS

# Text and JSON files that belong to a model's tokenizer; weights and configs are written by save_quantized.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
# Without an architecture an embedding table looks like a linear layer: these names are left dense.
_TABLE_NAMES = ("*embed*", "*wte", "*wpe", "*lm_head")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. A foreseeable failure is one line on standard error and status 2."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except (OSError, ValueError, TypeError, ImportError, UnsolvedError) as error:
        print(f"loftq-kernels: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loftq-kernels", description=lk.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=lk.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="quantize a real sentence model to 2 and 4 bits and show what that did to it"
    )
    demo.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the plot and the model")
    demo.add_argument("--sentences", type=int, default=400, help="how many sentences to compare (default 400)")
    demo.set_defaults(run=_demo)

    quantize = commands.add_parser("quantize", help="quantize a local transformers or safetensors folder")
    quantize.add_argument("model_dir", type=Path)
    quantize.add_argument("output_dir", type=Path)
    quantize.add_argument("--plan", type=Path, metavar="FILE", help="formats by layer, from `loftq-kernels plan`")
    _add_config_arguments(quantize)
    quantize.set_defaults(run=_quantize)

    plan = commands.add_parser("plan", help="choose each layer's format for a budget of bits, into a JSON file")
    plan.add_argument("model_dir", type=Path)
    plan.add_argument("plan_file", type=Path)
    plan.add_argument("--budget", type=float, required=True, help="bits a weight on average, e.g. 2.5")
    plan.add_argument(
        "--candidate",
        action="append",
        type=_candidate,
        metavar="FORMAT[,FIELD=VALUE...]",
        help=f'e.g. "nf2" or "nf4,group_size=32,rank=8" (repeatable; default {" ".join(DEFAULT_CANDIDATES)})',
    )
    plan.add_argument("--count", choices=COUNTS, help="what counts as bits (default packed)")
    plan.add_argument("--absolute", action="store_true", help="add up absolute errors instead of relative ones")
    plan.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="solve this plan again for the budget, measure nothing"
    )
    _add_config_arguments(plan)
    plan.set_defaults(run=_plan)

    inspect = commands.add_parser("inspect", help="describe a quantized folder")
    inspect.add_argument("model_dir", type=Path)
    inspect.set_defaults(run=_inspect)

    bench = commands.add_parser("bench", help="run the benchmarks of the source tree (python -m bench)")
    bench.add_argument("arguments", nargs=argparse.REMAINDER)
    bench.set_defaults(run=_bench)

    commands.add_parser("info", help="versions, devices and kernels of this installation").set_defaults(run=_info)
    return parser


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", default="nf4", choices=lk.format_names())
    parser.add_argument("--group-size", type=int, default=64, choices=GROUP_SIZES, help="-1: the whole row")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter; 0 for none (default 16)")
    parser.add_argument("--lora-alpha", type=float, help="scaling = alpha / rank; default: scaling 1")
    parser.add_argument("--use-rslora", action="store_true", help="scaling = alpha / sqrt(rank)")
    parser.add_argument("--adapter", default="lora", choices=ADAPTERS, help="qalora: of group means, merges exactly")
    parser.add_argument("--init", default="loftq", choices=lk.initializer_names())
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="statistics of the layers' inputs (lk.collect_activations)"
    )
    parser.add_argument("--rank-energy", type=float, help="aser: least rank with this share of singular values")
    parser.add_argument("--outlier-channels", type=int, default=32, help="aser: columns left to the adapter")
    parser.add_argument("--num-iter", type=int, default=5, help="LoftQ alternations (default 5)")
    parser.add_argument("--scale-dtype", default="float16", choices=tuple(SCALE_DTYPES_BY_NAME))
    parser.add_argument("--scale-search", action="store_true", help="search each group's scale of least error")
    parser.add_argument("--include", action="append", metavar="PATTERN", help="layer names to quantize (repeatable)")
    parser.add_argument("--exclude", action="append", metavar="PATTERN", help="layer names to leave (repeatable)")
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="PATTERN=FORMAT",
        help='another format for some layers, e.g. "*.layer.[01].*=nf4"; FORMAT "dense" leaves them (repeatable)',
    )
    parser.add_argument(
        "--layer-type",
        action="append",
        choices=LAYER_TYPES,
        help="kinds of layers to quantize (repeatable; default linear)",
    )
    parser.add_argument("--device", help="where to compute, e.g. cuda")


def _demo(args: argparse.Namespace) -> int:
    from loftq_kernels.demo import run_demo

    return run_demo(args.output, args.sentences)


def _quantize(args: argparse.Namespace) -> None:
    if (args.model_dir / CONFIG_NAME).is_file():
        raise ValueError(f"{args.model_dir} is already quantized: it holds {CONFIG_NAME}")
    _check_device(args.device)
    plan = None if args.plan is None else lk.BitPlan.load(args.plan)
    statistics = None if args.calibration is None else lk.ActivationStatistics.load(args.calibration)
    cfg = _config(args)
    model = pretrained.load_dense(args.model_dir)
    report = lk.quantize_model(model, cfg, statistics=statistics, plan=plan, device=args.device)
    lk.save_quantized(model, args.output_dir)
    _copy_tokenizer(args.model_dir, args.output_dir)
    print(report)
    print(f"saved to {args.output_dir}")


def _plan(args: argparse.Namespace) -> None:
    _check_device(args.device)
    if args.source is not None:
        given = {name: getattr(args, name) for name in ("candidate", "count", "absolute", "calibration")}
        if measured := [f"--{name}" for name, value in given.items() if value]:
            raise ValueError(f"--from measures nothing: {', '.join(measured)} cannot change the errors of that plan")
        plan = solve_plan(lk.BitPlan.load(args.source), args.budget)
    else:
        plan = lk.plan_bits(
            pretrained.load_dense(args.model_dir),
            args.budget,
            args.candidate or DEFAULT_CANDIDATES,
            _config(args),
            statistics=None if args.calibration is None else lk.ActivationStatistics.load(args.calibration),
            count=args.count or "packed",
            relative=not args.absolute,
            device=args.device,
        )
    plan.save(args.plan_file)
    print(plan)
    print(f"saved to {args.plan_file}")


def _candidate(text: str) -> dict:
    """FORMAT[,FIELD=VALUE...] as `plan_bits` takes it."""
    format_name, *fields = text.split(",")
    values: dict = {"format": format_name}
    for item in fields:
        name, _, value = item.partition("=")
        if name not in CANDIDATE_FIELDS[1:]:
            raise argparse.ArgumentTypeError(f"{item!r} is not FIELD=VALUE with a field of {CANDIDATE_FIELDS[1:]}")
        try:
            values[name] = _FIELD_VALUES[name](value)
        except (KeyError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"{value!r} is no {name}") from error
    return values


_FIELD_VALUES = {
    "group_size": int,
    "rank": lambda text: int(text) or None,  # 0 for no adapter, as --rank
    "scale_dtype": SCALE_DTYPES_BY_NAME.__getitem__,
    "scale_search": {"true": True, "false": False}.__getitem__,
}


def _config(args: argparse.Namespace) -> lk.QuantConfig:
    exclude = args.exclude
    if exclude is None:
        plain = not (args.model_dir / "config.json").is_file()
        exclude = lk.QuantConfig().exclude + (_TABLE_NAMES if plain else ())
    return lk.QuantConfig(
        format=args.format,
        group_size=args.group_size,
        rank=args.rank or None,
        lora_alpha=args.lora_alpha,
        use_rslora=args.use_rslora,
        adapter=args.adapter,
        init=args.init,
        num_iter=args.num_iter,
        rank_energy=args.rank_energy,
        outlier_channels=args.outlier_channels,
        scale_dtype=SCALE_DTYPES_BY_NAME[args.scale_dtype],
        scale_search=args.scale_search,
        include=tuple(args.include or ("*",)),
        exclude=tuple(exclude),
        overrides=dict(_override(text) for text in args.override),
        layer_types=tuple(args.layer_type or ("linear",)),
    )


def _check_device(device: str | None) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: this torch was built without CUDA
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error


def _override(text: str) -> tuple[str, dict | None]:
    pattern, equals, format_name = text.rpartition("=")
    if not (pattern and equals):
        raise ValueError(f"--override {text!r} is not PATTERN=FORMAT")
    return pattern, None if format_name == "dense" else {"format": format_name}


def _copy_tokenizer(source: Path, target: Path) -> None:
    if source.resolve() == target.resolve():
        return
    for file in {file for pattern in _TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()}:
        shutil.copyfile(file, target / file.name)


def _inspect(args: argparse.Namespace) -> None:
    config = CheckpointConfig.read(args.model_dir)
    file = args.model_dir / config.tensor_file
    print(f"{'layer':<52} {'shape':>13} {'format':>9} {'group':>5} {'rank':>5} {'scaling':>8}")
    for name, spec in config.layers.items():
        shape = f"{spec.out_features}x{spec.in_features}"
        rank = "-" if spec.rank is None else spec.rank
        print(f"{name:<52} {shape:>13} {spec.format:>9} {spec.group_size:>5} {rank:>5} {spec.scaling:>8g}")
    model = "none" if config.transformers is None else config.transformers["class"]
    size = f"{file.stat().st_size / 2**20:.1f} MiB" if file.is_file() else "missing"
    print(f"{len(config.layers)} quantized layers; transformers model: {model}; {config.tensor_file}: {size}")


def _bench(args: argparse.Namespace) -> int:
    try:
        runner = importlib.import_module("bench.__main__")
    except ModuleNotFoundError as error:
        raise ImportError("the benchmarks are part of the source tree: run this from its top folder") from error
    return runner.main(args.arguments)


def _info(args: argparse.Namespace) -> None:
    print(f"loftq_kernels {lk.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    if extension._C is None:
        print(f"extension: not loaded ({extension.LOAD_ERROR}); {extension.HOW_TO_BUILD}")
    else:
        print(f"extension: {extension._C.build_info()}")
        print(f"CPU kernels: {extension._C.cpu_isa()} (available: {', '.join(extension._C.cpu_isas())})")
    print(f"backends: {', '.join(lk.available_backends())}; CPU threads: {torch.get_num_threads()}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"CUDA devices: {', '.join(devices) or 'none'}")
    print(f"formats: {', '.join(lk.format_names())}")


if __name__ == "__main__":
    sys.exit(main())
