"""What layers compute from their adapters for the kernels, kept between calls until one of its tensors changes.

Two things are: QA-LoRA's lora_A over columns, and the factors of several adapters on top of each other (`stacking`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

T = TypeVar("T")


_ENDS = 64  # bytes at each end of a tensor's memory


class _Source(NamedTuple):
    """A tensor that something was made of, as it was then."""

    tensor: Tensor  # itself, so that no other tensor can get its id
    memory: Tensor  # its memory of that time, so that no other tensor can get its address
    version: int
    ends: bytes  # of its memory, on a CPU
    values: Tensor | None  # a copy, where it is told by its values whether it is the same


class _Kept(NamedTuple):
    sources: tuple[_Source, ...]
    settings: Hashable
    made: Any


_kept: WeakKeyDictionary[nn.Module, dict[Hashable, _Kept]] = WeakKeyDictionary()


def kept(
    layer: nn.Module,
    what: Hashable,
    sources: Sequence[Tensor],
    make: Callable[[], T],
    *,
    settings: Hashable = None,
    by_value: bool = False,
) -> T:
    """``make()``; without gradients the result of the last call for ``what``, while sources and settings are the same.

    A change is told by PyTorch's count of writes, by the memory of a tensor and, on a CPU, by its first and last bytes.
    Some optimizers write uncounted; they do so between calls with gradients or before a change from `train` to `eval`,
    after which nothing is kept. Other uncounted writes, such as ``p.data.copy_``, are seen on a CPU if they change the
    ends, and not on other devices: call `forget` after them. With ``by_value`` sources on a CPU, which are to be few
    values, are compared by value as a whole.

    While a CUDA graph is captured, everything is made within the graph, which then sees every later change.
    """
    if torch.compiler.is_compiling():
        return make()
    if any(_is_differentiated(source) for source in sources):
        forget(layer)
        return make()
    if not all(_can_be_told(source) for source in sources) or _is_captured(sources):
        return make()
    of_layer = _kept.get(layer)
    last = None if of_layer is None else of_layer.get(what)
    if last is not None and last.settings == settings and _are_same(last.sources, sources):
        return last.made
    with torch.inference_mode(False), torch.no_grad():  # A backward cannot save what is made in inference mode.
        made = make()
        noted = tuple(_noted(source, by_value) for source in sources)
    if sources and sources[0].is_cuda:
        torch.cuda.current_stream(sources[0].device).synchronize()  # Other streams will read it.
    _kept.setdefault(layer, {})[what] = _Kept(noted, settings, made)
    return made


def forget(layer: nn.Module) -> None:
    """Make everything of a layer anew at its next call."""
    _kept.pop(layer, None)


def _noted(source: Tensor, by_value: bool) -> _Source:
    memory = source.detach()
    values = memory.clone() if by_value and source.is_cpu else None
    return _Source(source, memory, source._version, _ends(source), values)


def _ends(source: Tensor) -> bytes:
    """The first and last bytes of a contiguous tensor on a CPU, which is what can be looked at in a microsecond."""
    if not (source.is_cpu and source.is_contiguous() and source.numel()):
        return b""
    first, nbytes = source.data_ptr(), source.nbytes
    count = min(_ENDS, nbytes)
    return ctypes.string_at(first, count) + ctypes.string_at(first + nbytes - count, count)


def _are_same(noted: Sequence[_Source], sources: Sequence[Tensor]) -> bool:
    return len(noted) == len(sources) and all(map(_is_same, noted, sources))


def _is_same(noted: _Source, source: Tensor) -> bool:
    if noted.tensor is not source or noted.memory.data_ptr() != source.data_ptr():
        return False
    if noted.values is not None:
        return torch.equal(noted.values, source)
    return noted.version == source._version and noted.ends == _ends(source)


def _can_be_told(source: Tensor) -> bool:
    """Whether PyTorch counts the writes to a tensor: not to those of inference mode, nor inside subclasses."""
    return type(source) in (Tensor, nn.Parameter) and not source.is_inference()


def _is_captured(sources: Sequence[Tensor]) -> bool:
    return bool(sources) and sources[0].is_cuda and torch.cuda.is_current_stream_capturing()


def _is_differentiated(source: Tensor) -> bool:
    """Whether a gradient or tangent of a tensor may be wanted, or a transform of torch.func is at work."""
    if torch.is_grad_enabled() and source.requires_grad:
        return True
    return torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
