"""What a dense module carries beside its weight and bias, and whether a replacement can carry it on."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from loftq_kernels.nn.kinds import LayerKind


@cache
def _own_attributes(cls: type[nn.Module], arity: int) -> frozenset[str]:
    """Attributes that modules of a class have by themselves."""
    with torch.device("meta"):
        return frozenset(vars(cls(*(1,) * arity)))


@cache
def _names_of_replacement(cls: type[nn.Module], arity: int) -> frozenset[str]:
    """Attributes, methods included, of the quantized layers of a class."""
    return frozenset(dir(cls(*(1,) * arity, rank=None, device="meta"))) - frozenset(dir(nn.Module()))


def _extras(module: nn.Module, kind: LayerKind) -> dict[str, Any]:
    own = _own_attributes(type(module), kind.arity)
    return {name: value for name, value in vars(module).items() if name not in own}


def reason_of_extras(module: nn.Module, kind: LayerKind) -> str | None:
    """What of a module its replacement would lose: hooks, functions, tensors and modules of its own."""
    if hooks := [name.strip("_").replace("_", " ") for name, own in vars(module).items() if "hooks" in name and own]:
        return f"has hooks, which a replacement would lose ({', '.join(hooks)})"
    for key, parameter in module._parameters.items():
        if parameter is not None and (parameter._backward_hooks or parameter._post_accumulate_grad_hooks):
            return f"its {key} has hooks, which a replacement would lose"
    extras = _extras(module, kind)
    if taken := [name for name in extras if name in _names_of_replacement(kind.layer, kind.arity)]:
        return f"has an attribute {taken[0]!r} of its own, which means something else in a quantized layer"
    if functions := [name for name, value in extras.items() if callable(value) and not isinstance(value, type)]:
        return f"has {functions[0]!r} of its own, which a replacement would lose"
    held = [*module._parameters, *module._buffers, *module._modules]
    held += [name for name, value in extras.items() if isinstance(value, Tensor)]
    if beside := [name for name in held if name not in ("weight", "bias")]:
        return f"holds {beside[0]!r} beside its weight, which a replacement would lose"
    return None


def carry_over(old: nn.Module, new: nn.Module, kind: LayerKind, *, same_bias: bool = False) -> None:
    """Give a replacement the attributes that somebody has set on the module before it, and on its bias.

    With ``same_bias`` its bias becomes the same parameter, which other modules have, too.
    """
    for name, value in _extras(old, kind).items():
        setattr(new, name, value)
    if same_bias:
        new.bias = old.bias
    elif new.bias is not None:
        vars(new.bias).update(vars(old.bias))
        new.bias.requires_grad_(old.bias.requires_grad)
