"""QA-LoRA's lora_A as the kernels take it, kept between calls until it changes."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class _Expansion(NamedTuple):
    """An expanded lora_A, and what it was made of."""

    parameter: Tensor
    version: int
    address: int
    values: Tensor
    expanded: Tensor


_kept: WeakKeyDictionary[nn.Module, _Expansion] = WeakKeyDictionary()


def expanded(layer: nn.Module, lora_A: Tensor) -> Tensor:
    """``layer.over_columns(lora_A)``; without gradients the result of the last call, as long as lora_A is the same.

    On a CPU that is told by its values, which are few, [rank, G]: also writes to ``.data`` are seen. On other devices
    they would have to be waited for, so that it is told by PyTorch's count of writes, which misses those to ``.data``.
    """
    if torch.compiler.is_compiling() or _is_differentiated(lora_A) or type(lora_A) not in (Tensor, nn.Parameter):
        return layer.over_columns(lora_A)
    kept = _kept.get(layer)
    if kept is not None and _is_same(kept, lora_A):
        return kept.expanded
    made = layer.over_columns(lora_A.detach())
    if lora_A.is_cuda and torch.cuda.is_current_stream_capturing():
        return made  # What a graph computes has no values before the graph runs.
    version = -1 if lora_A.is_inference() else lora_A._version
    values = lora_A.detach().clone() if lora_A.device.type == "cpu" else lora_A
    _kept[layer] = _Expansion(lora_A, version, lora_A.data_ptr(), values, made)
    return made


def _is_same(kept: _Expansion, lora_A: Tensor) -> bool:
    if kept.parameter is not lora_A or kept.address != lora_A.data_ptr() or lora_A.is_inference():
        return False
    if lora_A.device.type == "cpu":
        return torch.equal(kept.values, lora_A)
    return kept.version == lora_A._version


def _is_differentiated(lora_A: Tensor) -> bool:
    """Whether a gradient or tangent of lora_A may be wanted, or a transform of torch.func is at work."""
    if torch.is_grad_enabled() and lora_A.requires_grad:
        return True
    return torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
