"""Options that commands share, and how they become a `QuantConfig`, a candidate of a plan, or a dense model."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

import torch
from torch import nn

import loftq_kernels as lk
from loftq_kernels.checkpoints.dense import load_dense
from loftq_kernels.initializers.result import ADAPTERS
from loftq_kernels.models.plan import CANDIDATE_FIELDS
from loftq_kernels.nn.kinds import LAYER_TYPES
from loftq_kernels.ops.checks import DTYPES_BY_NAME, SCALE_DTYPES_BY_NAME
from loftq_kernels.storage.packing import GROUP_SIZES


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", default="nf4", choices=lk.format_names())
    parser.add_argument("--group-size", type=int, default=64, choices=GROUP_SIZES, help="-1: the whole row")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter; 0 for none (default 16)")
    parser.add_argument("--lora-alpha", type=float, help="scaling = alpha / rank; default: scaling 1")
    parser.add_argument("--use-rslora", action="store_true", help="scaling = alpha / sqrt(rank)")
    parser.add_argument("--adapter", default="lora", choices=ADAPTERS, help="qalora: of group means, merges exactly")
    parser.add_argument(
        "--adapter-dtype", choices=tuple(DTYPES_BY_NAME), help="default: float32 for float16 and bfloat16 models"
    )
    parser.add_argument("--init", default="loftq", choices=lk.initializer_names())
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="statistics of the layers' inputs (lk.collect_activations)"
    )
    parser.add_argument("--rank-energy", type=float, help="aser: least rank with this share of singular values")
    parser.add_argument("--outlier-channels", type=int, default=32, help="aser: columns left to the adapter")
    parser.add_argument("--num-iter", type=int, default=5, help="LoftQ alternations (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    parser.add_argument("--scale-dtype", default="float16", choices=tuple(SCALE_DTYPES_BY_NAME))
    parser.add_argument("--scale-search", action="store_true", help="search each group's scale of least error")
    _add_layer_arguments(parser)
    parser.add_argument("--device", help="where to compute, e.g. cuda")


def _add_layer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--include", action="append", metavar="PATTERN", help="layer names to quantize (repeatable)")
    parser.add_argument("--exclude", action="append", metavar="PATTERN", help="layer names to leave (repeatable)")
    parser.add_argument("--quantize-head", action="store_true", help="also the output head, which stays dense else")
    parser.add_argument(
        "--modules-to-save",
        action="append",
        metavar="NAME",
        help="modules that stay dense and are trained in full, such as a fresh classifier (repeatable)",
    )
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
    parser.add_argument(
        "--model-class",
        metavar="MODULE:CLASS",
        help="of a folder without config.json: the model that its tensors belong to, made without arguments",
    )


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
        overrides=dict(_override(text) for text in args.override),
        layer_types=tuple(args.layer_type or ("linear",)),
        modules_to_save=tuple(args.modules_to_save or ()),
        quantize_head=args.quantize_head,
    )


def dense_model(args: argparse.Namespace) -> nn.Module:
    """The model in ``args.model_dir``: of plain files, the layers that --include names, or --model-class."""
    if args.model_class is not None:
        return load_dense(args.model_dir, model=_made(args.model_class))
    return load_dense(args.model_dir, layers=args.include)


def _made(place: str) -> nn.Module:
    """The model of MODULE:CLASS, of modules that Python finds from the current folder, too."""
    module, colon, name = place.partition(":")
    if not (module and colon and name):
        raise ValueError(f"--model-class {place!r} is not MODULE:CLASS")
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module), name)()
    except Exception as error:  # of whatever the user's code raises
        raise ValueError(f"--model-class {place!r} cannot be made: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(made, nn.Module):
        raise ValueError(f"--model-class {place!r} makes a {type(made).__name__}, not a torch.nn.Module")
    return made


def statistics(args: argparse.Namespace) -> lk.ActivationStatistics | None:
    return None if args.calibration is None else lk.ActivationStatistics.load(args.calibration)


def candidate(text: str) -> dict:
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


def check_device(device: str | None) -> None:
    """Raise ValueError unless torch can use the device."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: this torch was built without CUDA
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error


def check_output(path: Path, *, folder: bool) -> None:
    """Raise, before a long run, where its result could not be written: a folder, which is made, or a file in one."""
    if path.exists() and path.is_dir() != folder:
        raise ValueError(f"{path} is a {'file, not a folder' if folder else 'folder, not a file'}")
    parents = path.absolute().parents
    place = next(place for place in (path, *parents) if place.exists()) if folder else parents[0]
    if not place.is_dir():
        raise ValueError(f"{place} is not a folder: {path} cannot be written")
    if not os.access(place, os.W_OK):
        raise ValueError(f"{place} is read-only: {path} cannot be written")


def _override(text: str) -> tuple[str, dict | None]:
    pattern, equals, format_name = text.rpartition("=")
    if not (pattern and equals):
        raise ValueError(f"--override {text!r} is not PATTERN=FORMAT")
    return pattern, None if format_name == "dense" else {"format": format_name}
