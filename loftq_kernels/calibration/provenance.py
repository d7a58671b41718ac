"""Which tensors of a running model do not depend on the batch: those computed from its parameters and buffers alone."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Functions whose result has the values of their first argument, whatever the others are.
_AS_FIRST = frozenset((Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as))
# Positions count as constants, as they do in models that keep the same numbers in a buffer. All other functions without
# tensor arguments may depend on the batch: torch.tensor is given Python numbers that may have been read from it, and
# what empty or zeros return is often filled by kernels of which no function tells.
_POSITIONS = frozenset((torch.arange, torch.linspace))
# These give access to memory through which it can be written without a change of the tensor's version.
_OPENED = frozenset(
    (
        Tensor.data.__get__,
        Tensor.data.__set__,
        Tensor.data_ptr,
        Tensor.numpy,
        Tensor.__array__,
        Tensor.__dlpack__,
        Tensor.untyped_storage,
        Tensor.storage,
    )
)
_WRITTEN = -1  # stands for the version of a tensor that may be written unseen: none has it
_NUMBERS = (int, float, complex, bool, str, types.NoneType, types.EllipsisType)
_PLAIN = (*_NUMBERS, torch.dtype, torch.device, torch.layout, torch.memory_format)


class Provenance(TorchFunctionMode):
    """While it is on, remembers the results of functions of which every tensor argument is constant.

    Constant are the model's parameters and buffers, and such results. Everything else, such as what functions return
    that torch does not announce, counts as depending on the batch. A tensor is known by a weak reference to the object
    and by its version, which every write changes, writes through views included: `buffer[:n] = data` ends its being
    constant, for good.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        for tensor in [*model.parameters(), *model.buffers()]:
            self._remember(tensor)

    def is_constant(self, x: Tensor) -> bool:
        known = self._known.get(id(x))
        if known is not None and known[0]() is x:
            return known[1] == x._version
        if type(x) is nn.Parameter:  # offloaded weights come as new parameters at each forward
            self._remember(x)
            return id(x) in self._known
        return False

    def forget_dead(self) -> None:
        """Called between batches, so that the table does not grow."""
        self._known = {key: known for key, known in self._known.items() if known[0]() is not None}

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        constant = self._gives_constant(func, args, kwargs)
        result = func(*args, **kwargs)
        if constant:
            self._remember(result)
        return result

    def _gives_constant(self, func: Callable, args: tuple, kwargs: Mapping[str, Any]) -> bool:
        first = args[0] if args else None
        if isinstance(first, Tensor):
            if not self.is_constant(first):
                return False  # nearly all calls end here
            if func in _OPENED:
                self._known[id(first)] = (weakref.ref(first), _WRITTEN)
                return False
            if func in _AS_FIRST:
                return True
        if self._may_depend(args) or self._may_depend(kwargs) or _allocates(func):
            return False
        return _holds_tensor(args) or _holds_tensor(kwargs) or func in _POSITIONS

    def _may_depend(self, value: Any) -> bool:
        """Whether an argument holds a tensor that is not constant, or something that might."""
        if isinstance(value, Tensor):
            return not self.is_constant(value)
        if isinstance(value, _PLAIN):
            return False
        parts = _parts(value)
        return parts is None or any(self._may_depend(part) for part in parts)

    def _remember(self, result: Any) -> None:
        if isinstance(result, Tensor):
            if not result.is_inference():  # tensors made in inference mode do not count writes
                self._known[id(result)] = (weakref.ref(result), result._version)
        elif isinstance(result, tuple | list):
            for part in result:
                self._remember(part)


def _parts(value: Any) -> tuple | None:
    """What an argument is made of; None where nobody knows."""
    if isinstance(value, tuple | list):
        return tuple(value)
    if isinstance(value, Mapping):
        return tuple(value.values())
    return (value.start, value.stop, value.step) if isinstance(value, slice) else None


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or any(map(_holds_tensor, _parts(value) or ()))


def _allocates(func: Callable) -> bool:
    """Whether func takes nothing but the shape of its arguments: its result is memory to be filled."""
    name = getattr(func, "__name__", "")
    return name.startswith("new_") or name.endswith("_like")
