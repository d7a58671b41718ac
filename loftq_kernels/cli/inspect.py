"""``loftq-kernels inspect``: what a quantized folder holds, to the byte, and what error its layers make."""

from __future__ import annotations

import argparse
import glob
from collections.abc import Mapping
from pathlib import Path

from loftq_kernels.checkpoints.hosted import read_config
from loftq_kernels.checkpoints.layers import HALF_BYTES, StoredLayer, dense_matrix, stored_layers, weight_errors
from loftq_kernels.checkpoints.manifest import CheckpointConfig
from loftq_kernels.checkpoints.tensor_file import tensor_reports
from loftq_kernels.cli import options
from loftq_kernels.models.report import ADAPTER, BUFFER, DENSE, PACKED_STATE, TensorReport, dense_line, size_text


def inspect(args: argparse.Namespace) -> None:
    """Print a line for each layer, and what all of them take together."""
    config = read_config(args.model_dir)
    tensors = tensor_reports(args.model_dir)
    layers = stored_layers(config, tensors)
    errors = {} if args.against is None else _errors(args, config)
    print(
        f"{'layer':<44} {'shape':>13} {'format':>9} {'group':>5} {'rank':>5} {'scaling':>8} {'bits/w':>7} "
        f"{'error':>7} {'KiB':>9}"
    )
    for name, layer in layers.items():
        print(_line(name, layer, errors.get(name)))
    model = "none" if config.transformers is None else config.transformers["class"]
    print(f"{len(layers)} quantized layers; transformers model: {model}")
    print(_bits(layers, errors))
    print(_sizes(config, layers, tensors))
    print(dense_line(tensors))


def _errors(args: argparse.Namespace, config: CheckpointConfig) -> dict[str, float]:
    """The layers' errors against the dense model, which is held against the checkpoint by its shapes before."""
    names = [glob.escape(name) for name in config.layers]  # of a folder that has no architecture
    wanted = argparse.Namespace(model_dir=Path(args.against), model_class=args.model_class, include=names)
    if (shapes := options.outline(wanted)) is not None:
        for name, spec in config.layers.items():
            dense_matrix(name, (spec.out_features, spec.in_features), shapes)
    return weight_errors(args.model_dir, options.dense_model(wanted))


def _line(name: str, layer: StoredLayer, error: float | None) -> str:
    spec = layer.spec
    rank = "-" if spec.rank is None else spec.rank
    shown = "-" if error is None else f"{error:.4f}"
    disabled = "" if spec.adapter_enabled else "  adapter disabled"
    return (
        f"{name:<44} {f'{spec.out_features}x{spec.in_features}':>13} {spec.format:>9} {spec.group_size:>5} {rank:>5} "
        f"{spec.scaling:>8g} {layer.bits_per_weight:>7.3f} {shown:>7} {layer.nbytes / 1024:>9.1f}{disabled}"
    )


def _bits(layers: Mapping[str, StoredLayer], errors: Mapping[str, float]) -> str:
    weights = sum(layer.weights for layer in layers.values())
    bits = 8 * sum(layer.packed_bytes for layer in layers.values()) / weights
    mean = f"mean error {sum(errors.values()) / len(errors):.4f}" if errors else "errors: with --against DENSE_DIR"
    return f"{_count(weights)} weights in {bits:.3f} bits each; {mean}"


def _count(number: int) -> str:
    """A number of weights in the unit that fits: 512, 3.07 thousand, 21.23 million, 8.03 billion."""
    units = (("billion", 10**9), ("million", 10**6), ("thousand", 10**3))
    fitting = (f"{number / size:.2f} {name}" for name, size in units if number >= size)
    return next(fitting, str(number))


def _sizes(config: CheckpointConfig, layers: Mapping[str, StoredLayer], tensors: list[TensorReport]) -> str:
    """What the file takes, by kinds of tensors, and what the dense model would take in 16 bits."""
    total = sum(tensor.nbytes for tensor in tensors)
    half = _half_bytes(config, layers, tensors)
    states = {"packed": PACKED_STATE, "adapters": ADAPTER, "dense": DENSE, "buffers": BUFFER}
    nbytes = {name: sum(own.nbytes for own in tensors if own.state == state) for name, state in states.items()}
    kinds = ", ".join(f"{name} {size_text(size)}" for name, size in nbytes.items() if size)
    return f"{size_text(total)} ({kinds}): {total / half:.1%} of the {size_text(half)} that the model takes in 16 bits"


def _half_bytes(config: CheckpointConfig, layers: Mapping[str, StoredLayer], tensors: list[TensorReport]) -> int:
    """Layers that share their tensors count once; buffers stay what they are."""
    owners = {config.tied.get(f"{name}.codes", f"{name}.codes"): layer for name, layer in layers.items()}
    inside = tuple(f"{name}." for name in layers)
    rest = [tensor for tensor in tensors if not tensor.name.startswith(inside)]
    numbers = (_numel(tensor) * HALF_BYTES if tensor.state == DENSE else tensor.nbytes for tensor in rest)
    return sum(layer.half_bytes for layer in owners.values()) + sum(numbers)


def _numel(tensor: TensorReport) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count
