"""The list of a model's blocks (layers, as transformers' papers call them)."""

from __future__ import annotations

from torch import nn

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
