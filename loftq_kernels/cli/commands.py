"""What each command does."""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import loftq_kernels as lk
from loftq_kernels.checkpoints.manifest import CONFIG_NAME, CheckpointConfig
from loftq_kernels.checkpoints.tensor_file import tensor_reports
from loftq_kernels.cli import options
from loftq_kernels.models.allocate import DEFAULT_CANDIDATES, solve_plan
from loftq_kernels.models.report import dense_line
from loftq_kernels.ops import extension
from loftq_kernels.storage import files

# What a transformers user needs beside the weights: configs, tokenizers, processors, chat templates.
_COMPANIONS = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".bpe", ".spm", ".vocab"}
_NOT_COMPANIONS = (CONFIG_NAME, "*.index.json", "training_args*", "trainer_state*", "adapter_config.json")
_FOLDERS = ("chat_templates", "additional_chat_templates")


def demo(args: argparse.Namespace) -> int:
    from loftq_kernels.cli.demo import run_demo

    return run_demo(args.output, args.sentences)


def quantize(args: argparse.Namespace) -> None:
    options.check_device(args.device)
    options.check_output(args.output_dir, folder=True)
    plan = None if args.plan is None else lk.BitPlan.load(args.plan)
    statistics = options.statistics(args)
    cfg = options.config(args)
    model = options.dense_model(args)
    report = lk.quantize_model(model, cfg, statistics=statistics, plan=plan, device=args.device)
    lk.save_quantized(model, args.output_dir)
    copy_companions(args.model_dir, args.output_dir)
    print(report)
    print(f"saved to {args.output_dir}")


def plan(args: argparse.Namespace) -> None:
    options.check_device(args.device)
    options.check_output(args.plan_file, folder=False)
    if args.source is not None:
        given = {name: getattr(args, name) for name in ("candidate", "count", "absolute", "calibration")}
        if measured := [f"--{name}" for name, value in given.items() if value]:
            raise ValueError(f"--from measures nothing: {', '.join(measured)} cannot change the errors of that plan")
        made = solve_plan(lk.BitPlan.load(args.source), args.budget)
    else:
        made = lk.plan_bits(
            options.dense_model(args),
            args.budget,
            args.candidate or DEFAULT_CANDIDATES,
            options.config(args),
            statistics=options.statistics(args),
            count=args.count or "packed",
            relative=not args.absolute,
            device=args.device,
        )
    made.save(args.plan_file)
    print(made)
    print(f"saved to {args.plan_file}")


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to a model beside its weights, which save_quantized has written."""
    if source.resolve() == target.resolve():
        return
    for file in source.iterdir():
        if file.is_file() and _is_companion(file):
            _copy(file, target / file.name)
    for name in _FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True, copy_function=_copy)


def _is_companion(file: Path) -> bool:
    if any(file.match(name) for name in _NOT_COMPANIONS):
        return False
    return file.suffix in _COMPANIONS or file.name.startswith("tokenizer.")  # tokenizer.model.v3, as Mistral has it


def _copy(source: str | Path, target: str | Path) -> None:
    with files.replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def inspect(args: argparse.Namespace) -> None:
    config = CheckpointConfig.read(args.model_dir)
    file = args.model_dir / config.tensor_file
    print(f"{'layer':<52} {'shape':>13} {'format':>9} {'group':>5} {'rank':>5} {'scaling':>8}")
    for name, spec in config.layers.items():
        shape = f"{spec.out_features}x{spec.in_features}"
        rank = "-" if spec.rank is None else spec.rank
        disabled = "" if spec.adapter_enabled else "  adapter disabled"
        print(f"{name:<52} {shape:>13} {spec.format:>9} {spec.group_size:>5} {rank:>5} {spec.scaling:>8g}{disabled}")
    model = "none" if config.transformers is None else config.transformers["class"]
    size = f"{file.stat().st_size / 2**20:.1f} MiB" if file.is_file() else "missing"
    print(f"{len(config.layers)} quantized layers; transformers model: {model}; {config.tensor_file}: {size}")
    if file.is_file():
        print(dense_line(tensor_reports(args.model_dir)))


def check(args: argparse.Namespace) -> int:
    from loftq_kernels.cli.check import run_checks

    return run_checks()


def bench(args: argparse.Namespace) -> int:
    """The benchmarks are no part of the package: they run as a process of their own in the source tree."""
    places = (Path.cwd(), Path(lk.__file__).resolve().parents[1])
    tree = next((place for place in places if (place / "bench" / "__main__.py").is_file()), None)
    if tree is None:
        raise ImportError("the benchmarks are part of the source tree: run this from its top folder")
    return subprocess.run([sys.executable, "-m", "bench", *args.arguments], cwd=tree, check=False).returncode


def info(args: argparse.Namespace) -> None:
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
