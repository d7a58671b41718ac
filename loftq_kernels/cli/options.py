"""What the arguments of commands stand for: a `QuantConfig`, candidates of a plan, statistics, a dense model."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import loftq_kernels as lk
from loftq_kernels.checkpoints import dense
from loftq_kernels.checkpoints.dense import load_dense
from loftq_kernels.checkpoints.quiet import quiet_transformers
from loftq_kernels.ops.checks import DTYPES_BY_NAME, SCALE_DTYPES_BY_NAME
from loftq_kernels.vocabulary import DEFAULT_CANDIDATES


def config(args: argparse.Namespace) -> lk.QuantConfig:
    return lk.QuantConfig(
        format=args.format,
        group_size=args.group_size,
        rank=args.rank or None,
        lora_alpha=args.lora_alpha,
        use_rslora=args.use_rslora,
        adapter=args.adapter,
        adapter_dtype=None if args.adapter_dtype is None else DTYPES_BY_NAME[args.adapter_dtype],
        init=args.init,
        num_iter=args.num_iter,
        rank_energy=args.rank_energy,
        outlier_channels=args.outlier_channels,
        scale_dtype=SCALE_DTYPES_BY_NAME[args.scale_dtype],
        scale_search=args.scale_search,
        seed=args.seed,
        include=tuple(args.include or ("*",)),
        exclude=tuple(args.exclude or ()),
        overrides={pattern: _with_dtypes(own) for pattern, own in args.override or ()},
        layer_types=tuple(args.layer_type or ("linear",)),
        modules_to_save=tuple(args.modules_to_save or ()),
        quantize_head=args.quantize_head,
    )


def plan_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `plan_bits` takes beside the model, the budget, statistics and a device."""
    return {
        "candidates": [_with_dtypes(own) for own in args.candidate or DEFAULT_CANDIDATES],
        "cfg": config(args),
        "count": args.count or "packed",
        "relative": not args.absolute,
    }


def _with_dtypes(values: Mapping[str, Any] | str) -> dict[str, Any] | str:
    """Fields, or the name of a format, with dtypes in the place of their names."""
    if isinstance(values, str) or "scale_dtype" not in values:
        return values
    return {**values, "scale_dtype": SCALE_DTYPES_BY_NAME[values["scale_dtype"]]}


def statistics(args: argparse.Namespace) -> lk.ActivationStatistics | None:
    return None if args.calibration is None else lk.ActivationStatistics.load(args.calibration)


def dense_model(args: argparse.Namespace) -> nn.Module:
    """The model in ``args.model_dir``: of plain files, the layers that --include names, or --model-class."""
    if args.model_class is not None:
        return load_dense(args.model_dir, model=made(args.model_class))
    with quiet_transformers():
        return load_dense(args.model_dir, layers=args.include)


def outline(args: argparse.Namespace) -> nn.Module | None:
    """The same without values, on the meta device; None where it cannot be had there. Raises as `dense_model`."""
    if args.model_class is None:
        return dense.outline(args.model_dir, layers=args.include)
    try:
        with torch.device("meta"):
            model = made(args.model_class)
    except ValueError:
        made(args.model_class)  # Whether it is the device or the class that is wrong.
        dense.tensor_files(args.model_dir)
        return None
    return dense.outline(args.model_dir, model=model)


def made(place: str) -> nn.Module:
    """The model of MODULE:CLASS, of modules that Python finds from the current folder, too."""
    module, _, name = place.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        model = getattr(importlib.import_module(module), name)()
    except Exception as error:  # of whatever the user's code raises
        raise ValueError(f"--model-class {place} cannot be made: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model-class {place} makes a {type(model).__name__}, not a torch.nn.Module")
    return model
