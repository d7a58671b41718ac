"""What each command does."""

from __future__ import annotations

import argparse
import platform

import torch

import loftq_kernels as lk
from loftq_kernels.cli import companions, options, preflight
from loftq_kernels.cli.check import run_checks
from loftq_kernels.cli.demo import run_demo
from loftq_kernels.cli.flags import spelled
from loftq_kernels.cli.inspect import inspect
from loftq_kernels.cli.serve import serve
from loftq_kernels.ops import extension


def demo(args: argparse.Namespace) -> int:
    preflight.demo(args)
    return run_demo(args.output, args.sentences)


def quantize(args: argparse.Namespace) -> None:
    inputs = preflight.quantize(args)
    model = options.dense_model(args)
    report = lk.quantize_model(
        model, inputs.cfg, statistics=inputs.statistics, plan=inputs.plan, device=args.device, progress=True
    )
    lk.save_quantized(model, args.output_dir)
    companions.copy(args.model_dir, args.output_dir)
    print(spelled(str(report), args.parser.spelled))
    print(f"saved to {args.output_dir}")


def plan(args: argparse.Namespace) -> None:
    inputs = preflight.plan(args)
    made = _measured(args, inputs) if inputs.plan is None else lk.solve_plan(inputs.plan, args.budget)
    made.save(args.plan_file)
    print(made)
    print(f"saved to {args.plan_file}")


def _measured(args: argparse.Namespace, inputs: preflight.Inputs) -> lk.BitPlan:
    wanted = options.plan_options(args)
    model = options.dense_model(args)
    return lk.plan_bits(model, args.budget, statistics=inputs.statistics, device=args.device, progress=True, **wanted)


def check(args: argparse.Namespace) -> int:
    return run_checks()


def info(args: argparse.Namespace) -> None:
    print(f"loftq_kernels {lk.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    if extension.library is None:
        print(f"extension: not loaded ({extension.LOAD_ERROR}); {extension.HOW_TO_BUILD}")
    else:
        print(f"extension: {extension.library.build_info()}")
        print(f"CPU kernels: {extension.library.cpu_isa()} (available: {', '.join(extension.library.cpu_isas())})")
    print(f"backends: {', '.join(lk.available_backends())}; CPU threads: {torch.get_num_threads()}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"CUDA devices: {', '.join(devices) or 'none'}")
    print(f"formats: {', '.join(lk.format_names())}")


COMMANDS = {
    "demo": demo,
    "quantize": quantize,
    "plan": plan,
    "inspect": inspect,
    "serve": serve,
    "check": check,
    "info": info,
}
