"""The rule for writes into a constant: a copy of its own dtype and shape is written, and nothing else ever is.

Any other write must leave the constant as it is up to rounding, or is a RuntimeError. A target here is a plain tensor
on the constant's memory; `constant` has the tensor classes whose writes come here.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

REMEDY = (
    "average or update the adapters alone, which are the parameters that lk.train_only_adapters(model) leaves trainable"
)
ROUNDINGS = 4  # units in the last place within which a computed value counts as the old one
PART = 2**18  # elements compared at a time, in float64

_OPERATORS = ("add", "and", "floordiv", "lshift", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor")
IN_PLACE_OPERATORS = ("__setitem__", *(f"__i{name}__" for name in _OPERATORS))
# The names of these end in an underscore, but they write no values.
_NO_WRITES = frozenset(
    ("detach_", "requires_grad_", "set_", "share_memory_")
    + ("resize_", "resize_as_", "resize_as_sparse_", "sparse_resize_", "sparse_resize_and_clear_", "as_strided_")
    + ("squeeze_", "unsqueeze_", "swapaxes_", "swapdims_", "t_", "transpose_")
)


_loading = threading.local()


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Where `copy_` writes a state dict's values into constants: however near to the old ones, to the last bit."""
    before = is_loading()
    _loading.now = True
    try:
        yield
    finally:
        _loading.now = before


def is_loading() -> bool:
    return getattr(_loading, "now", False)


class Guarded:
    """Marks the tensor classes whose memory is a constant's; ``held`` is a plain tensor on it, where there is one."""

    held: Tensor | None = None


def writes(name: str) -> bool:
    """Whether the function of this name writes into its first argument."""
    if name in IN_PLACE_OPERATORS:
        return True
    return name.endswith("_") and not name.endswith("__") and name not in _NO_WRITES


def plain(value: Any) -> Any:
    """The value itself; of a `Guarded` tensor, a plain one on the same memory."""
    if isinstance(value, Guarded):
        if value.held is not None:
            return value.held
        with torch._C.DisableTorchFunctionSubclass():
            return Tensor.detach(value)
    return value


def all_plain(value: Any) -> Any:
    """`plain` of every tensor in nested lists, tuples and dicts."""
    if type(value) in (list, tuple):
        return type(value)(all_plain(item) for item in value)
    if type(value) is dict:
        return {key: all_plain(item) for key, item in value.items()}
    return plain(value)


def refuse_gradient(asked: bool) -> None:
    if asked:
        raise RuntimeError(
            "a packed weight is constant and takes no gradient: lk.train_only_adapters(model) sets what trains"
        )


def rounding_of(tensor: Tensor) -> float:
    """The unit in the last place of 1.0 in the dtype that the tensor was computed in."""
    return torch.finfo(tensor.dtype if tensor.is_floating_point() else torch.float64).eps


def _change(old: Tensor, new: Tensor, rounding: float) -> float:
    """The largest |new - old|, or 0 where no element moved by more than rounding explains; NaN for another shape."""
    if new.shape != old.shape:
        return math.nan
    parts = zip(old.reshape(-1).split(PART), new.reshape(-1).split(PART), strict=True)
    return max((_change_of_part(a.double(), b.double(), rounding) for a, b in parts), default=0.0)


def _change_of_part(old: Tensor, new: Tensor, rounding: float) -> float:
    difference = (new - old).abs_().masked_fill_(new == old, 0.0)
    if (difference <= old.abs_().mul_(ROUNDINGS * rounding)).all():
        return 0.0
    return difference.nan_to_num_(nan=math.inf).max().item()


def settle(target: Tensor, value: Tensor, rounding: float, name: str) -> None:
    """Raise RuntimeError unless `value` equals the constant `target` up to rounding. Nothing is written either way."""
    if target.is_meta or value.is_meta:
        return
    change = _change(target, value.to(target.device), rounding)
    if change != 0:
        raise RuntimeError(
            f"{name} would change a {target.dtype} part {tuple(target.shape)} of a packed weight, which is constant, "
            f"by up to {change:.3g}: {REMEDY}"
        )


def admits_copy(target: Tensor, source: Any, *, exact: bool = False) -> bool:
    """Whether `source` is to be written into `target`. Only values of its own dtype and shape are; others `settle`.

    Float values that equal the old ones up to rounding are taken for an average, and not written; unless ``exact``,
    or while a state dict is loaded.
    """
    source = torch.as_tensor(source, device=target.device)
    if source.dtype != target.dtype or source.shape != target.shape:
        settle(target, source.expand(target.shape), rounding_of(source), "copy_")
        return False
    if exact or is_loading() or target.is_meta or source.is_meta or not target.is_floating_point():
        return True
    return _change(target, source, rounding_of(source)) != 0


def _on_copies(func: Callable, target: Tensor, args: Iterable, kwargs: dict) -> tuple[Any, float]:
    """What func leaves in a float64 copy of `target`, its first argument, and the rounding of what it computed with."""
    roundings = [torch.finfo(torch.float64).eps]

    def copied(value: Any) -> Any:
        own = plain(value)
        if not isinstance(own, Tensor):
            return value
        if own is value and own.ndim:  # an operand that was computed outside, in its own precision
            roundings.append(rounding_of(own))
        return own.double() if own.is_floating_point() or own.dtype == target.dtype else own

    wide = target.double().clone()
    try:
        func(wide, *tree_map(copied, tuple(args)), **tree_map(copied, kwargs))
    except (RuntimeError, TypeError, IndexError):  # no such function of float64, as of bits; or a true error, again
        wide = target.clone()
        func(wide, *all_plain(tuple(args)), **all_plain(kwargs))
    return wide, max(roundings)


def write(func: Callable, name: str, target: Tensor, args: tuple, kwargs: dict) -> None:
    """Apply the in-place func to the constant whose memory is `target`: copy, leave it as it is, or RuntimeError."""
    if target.is_meta:
        return
    with torch.no_grad():
        if name == "copy_":
            source = args[0] if args else kwargs["src"]
            if admits_copy(target, plain(source), exact=isinstance(source, Guarded)):
                target.copy_(plain(source))
            return
        value, rounding = _on_copies(func, target, args, kwargs)
        settle(target, value, rounding, name)
