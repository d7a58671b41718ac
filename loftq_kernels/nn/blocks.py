"""The list of a model's blocks (layers, as papers call them), and overrides for the first of them."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Mapping
from typing import Any

from torch import nn

from loftq_kernels import arguments
from loftq_kernels.nn.kinds import kind_of
from loftq_kernels.nn.wrappers import named_modules, submodule, unwrapped


def largest_lists(model: nn.Module) -> list[str]:
    """Names of the `nn.ModuleList` or `nn.Sequential` with the most bytes of parameters: several where they tie."""
    sizes = {
        name: sum(parameter.nbytes for parameter in module.parameters())
        for name, module in named_modules(model)
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
    }
    return [name for name, size in sizes.items() if size == max(sizes.values())]


def checkpointed_blocks(model: nn.Module) -> list[nn.Module]:
    """What a backward can recompute: the modules of transformers that support it, else those of the largest lists."""
    model = unwrapped(model)
    marked = [m for m in model.modules() if any(c.__name__ == "GradientCheckpointingLayer" for c in type(m).__mro__)]
    return marked or [block for name in largest_lists(model) for block in submodule(model, name)]


def first_layers(
    model: nn.Module, n: int, changes: str | Mapping[str, Any] = "nf4", *, blocks: str | None = None
) -> dict[str, dict[str, Any]]:
    """LoftQ's mixed precision: overrides that give the first n blocks of a model other settings than the rest.

        QuantConfig("nf2", overrides=first_layers(model, 4, "nf4"))     # the first four blocks 4 bits, the rest 2

    Args:
        model: holds its blocks (layers, as the paper calls them) in an `nn.ModuleList` or `nn.Sequential`.
        n: 0 .. the number of blocks; those without layers inside count, and get no override.
        changes: a format, or `LayerConfig` fields, for the layers inside the first n blocks.
        blocks: the list's name, e.g. "model.layers"; None takes the list with the most parameters.

    Raises ValueError when there is no such list, when several are equally large (naming them; as in a model with an
    encoder and a decoder) and for n out of range. Source: LoftQ (Li et al., 2024), section 4.
    """
    model = unwrapped(model)
    name = _one_list(model) if blocks is None else blocks
    try:
        module = submodule(model, name)
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} has no module {name!r}") from error
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        raise ValueError(f"{name!r} is a {type(module).__name__}, not a list of blocks")
    n = arguments.whole_number("n", n)
    if not 0 <= n <= len(module):
        raise ValueError(f"n={n!r} is outside 0 .. {len(module)}, the number of blocks in {name!r}")
    changes = {"format": changes} if isinstance(changes, str) else dict(changes)
    prefix = f"{name}." if name else ""
    overrides = {}
    for child, block in itertools.islice(module._modules.items(), n):
        escaped = glob.escape(prefix + child)
        if kind_of(unwrapped(block)) is not None:
            overrides[escaped] = changes
        elif any(kind_of(inner) is not None for inner in block.modules()):  # A pattern must match a layer.
            overrides[f"{escaped}.*"] = changes
    return overrides


def _one_list(model: nn.Module) -> str:
    largest = largest_lists(model)
    if not largest:
        raise ValueError(f"{type(model).__name__} has no list of blocks (nn.ModuleList or nn.Sequential)")
    if len(largest) > 1:
        raise ValueError(f"several lists of blocks are equally large: {', '.join(largest)}; choose with blocks=")
    return largest[0]
