"""What an initializer returns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from loftq_kernels import vocabulary
from loftq_kernels.formats import PackedTensor

ADAPTERS = tuple(vocabulary.ADAPTERS)


@dataclass
class AdapterInit:
    """A quantized weight and the adapter that goes with it: W ~ Q + scaling * lora_B @ lora_A.

    With adapter "qalora", lora_A is [r, G], and `qalora.expand_groups` of it takes its place in the equation.

    Attributes:
        packed: Q, [N, K].
        lora_A, lora_B: float32 [r, K] and [N, r], or None when there is no adapter.
        scaling: the factor the module applies to lora_B @ lora_A; already divided out of both (square root on each).
        error: ||W - Q - scaling B A||_F / ||W||_F of what is returned (0 for W = 0).
        errors: the same after every alternation; ``error`` is the least of them, or that of the iterate with the least
            weighted error where statistics were given.
        weighted_error: ||X (W - Q - scaling B A)^T||_F / ||X W^T||_F over the calibration tokens X [n, K], the relative
            error of the layer's output; None without statistics.
        weighted_errors: the same after every alternation.
        smoothing: float32 [K], ASER's m. Whoever quantizes activations first divides them by m, and multiplies the
            columns of the weight by it; m is 1 except for outlier channels. The returned Q, A and B are for x as it
            is: without quantized activations there is nothing to do. None for other methods.
        adapter: "lora", or "qalora" for one of group means.
    """

    packed: PackedTensor
    lora_A: Tensor | None
    lora_B: Tensor | None
    scaling: float
    error: float
    errors: list[float] = field(default_factory=list)
    weighted_error: float | None = None
    weighted_errors: list[float] = field(default_factory=list)
    smoothing: Tensor | None = None
    adapter: str = "lora"

    def to(self, device: torch.device | str) -> AdapterInit:
        """The same on another device."""
        return replace(
            self,
            packed=self.packed.to(device),
            lora_A=None if self.lora_A is None else self.lora_A.to(device),
            lora_B=None if self.lora_B is None else self.lora_B.to(device),
            smoothing=None if self.smoothing is None else self.smoothing.to(device),
        )
