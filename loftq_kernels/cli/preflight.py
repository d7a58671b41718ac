"""What can be known before any work is done is checked here, before any model is loaded.

What is wrong with an argument by itself, the parser has said. Here it is what the machine, the files and the shapes of
the model make of it: shapes come from config.json and the headers of the files.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import nn

import loftq_kernels as lk
from loftq_kernels.checkpoints.dense import tensor_files
from loftq_kernels.cli import companions, options, output
from loftq_kernels.cli.demo import RESULT_BYTES, check_needs
from loftq_kernels.models.allocate import check_plan
from loftq_kernels.models.convert import check_quantize
from loftq_kernels.models.report import account
from loftq_kernels.models.select import Selection, packed_bytes
from loftq_kernels.models.solve import milp

_OF_SOLVING = {"model_dir", "plan_file", "overwrite", "budget", "source"}  # what plan reads where it measures nothing


@dataclass(frozen=True)
class Inputs:
    """What the arguments of quantize and plan name beside the model."""

    cfg: lk.QuantConfig
    statistics: lk.ActivationStatistics | None = None
    plan: lk.BitPlan | None = None


def demo(args: argparse.Namespace) -> None:
    output.check_folder(args.output, args.overwrite, "demo's folder", output.is_demo)
    check_needs(args.sentences)
    output.check_space(args.output, RESULT_BYTES)


def quantize(args: argparse.Namespace) -> Inputs:
    output.check_folder(args.output_dir, args.overwrite, "checkpoint of ours", output.is_checkpoint)
    check_device(args.device)
    cfg = options.config(args)
    plan = None if args.plan is None else lk.BitPlan.load(args.plan)
    tensor_files(args.model_dir)
    companions.check(args.model_dir, args.output_dir)
    statistics = options.statistics(args)
    shapes = options.outline(args)
    if shapes is None:
        _check_statistics(cfg, statistics)
    else:
        selection = check_quantize(shapes, cfg, statistics=statistics, plan=plan)
        output.check_space(args.output_dir, _least_bytes(shapes, selection))
    return Inputs(cfg, statistics, plan)


def plan(args: argparse.Namespace) -> Inputs:
    output.check_file(args.plan_file, args.overwrite, "plan of ours", output.is_plan)
    milp()
    if args.source is not None:
        return _plan_again(args)
    check_device(args.device)
    wanted = options.plan_options(args)
    tensor_files(args.model_dir)
    statistics = options.statistics(args)
    shapes = options.outline(args)
    if shapes is None:
        _check_statistics(wanted["cfg"], statistics)
    else:
        check_plan(shapes, args.budget, statistics=statistics, **wanted)
    return Inputs(wanted["cfg"], statistics)


def _plan_again(args: argparse.Namespace) -> Inputs:
    options_of_it = dict.fromkeys(args.parser.spelled.values())  # each once, in the order of the help
    given = [option for option in options_of_it if getattr(args, option.dest) != option.default]
    if measured := [option.option_strings[0] for option in given if option.dest not in _OF_SOLVING]:
        raise ValueError(f"--from measures nothing: {', '.join(measured)} cannot change the errors of that plan")
    return Inputs(options.config(args), plan=lk.BitPlan.load(args.source))


def _check_statistics(cfg: lk.QuantConfig, statistics: lk.ActivationStatistics | None) -> None:
    """All that is known of a model whose shapes are not."""
    if statistics is None and cfg.needs_statistics:
        raise ValueError(f"init={cfg.init!r} needs statistics=: see collect_activations")


def _least_bytes(shapes: nn.Module, selection: Selection) -> int:
    """Bytes of the tensors that quantize writes, adapters left out."""
    dense = sum(tensor.nbytes for tensor in account(shapes))
    packed = sum(packed_bytes(own.weight, own.cfg) for own in selection.candidates)
    return dense + packed - sum(own.weight.nbytes for own in selection.candidates)


def check_device(device: str | None) -> None:
    """Raise ValueError unless torch can use the device."""
    if device is not None and device.startswith("meta"):
        raise ValueError(f"--device {device} holds no values: nothing can be computed there")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: this torch was built without CUDA
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
