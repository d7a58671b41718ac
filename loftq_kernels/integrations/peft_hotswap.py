"""PEFT's hot-swapping on our layers: what they keep between calls is made anew after it, for it writes uncounted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.utils import hotswap
from torch import nn

from loftq_kernels.integrations.peft import stand_in
from loftq_kernels.integrations.peft_layers import AroundQuantized


def register() -> None:
    """Stand in for the function that all of PEFT's and transformers' ways to swap an adapter call."""
    stand_in(hotswap.hotswap_adapter_from_state_dict, _hotswap_adapter_from_state_dict)


def _hotswap_adapter_from_state_dict(original: Callable, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    try:
        original(model, *args, **kwargs)
    finally:
        for layer in model.modules():
            if isinstance(layer, AroundQuantized):
                layer.forget_kept()


register()
