"""`InputStatistics`: what a calibration run keeps of a layer's input, and what data-aware initializers read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_kernels.ops import checks


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Sums over the n tokens x_t [K] that entered a layer, divided by n.

    Attributes:
        gram: S = sum_t x_t x_t^T / n, [K, K]; float32 from a calibration run; float64 is accepted as well.
        mean: sum_t x_t / n, [K].
        abs_mean: sum_t |x_t| / n, [K].
        abs_max: max_t |x_t|, [K].
        tokens: n.
    """

    gram: Tensor
    mean: Tensor
    abs_mean: Tensor
    abs_max: Tensor
    tokens: int

    @classmethod
    def from_inputs(cls, x: Tensor) -> InputStatistics:
        """Of one tensor x [..., K], n >= 1 tokens; computed and kept in float64. For small layers and tests."""
        checks.check_floating("x", x)
        tokens = x.detach().double().reshape(-1, x.shape[-1])
        if tokens.numel() == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}: there is no token to count")
        size = tokens.abs()
        return cls(tokens.T @ tokens / len(tokens), tokens.mean(0), size.mean(0), size.amax(0), len(tokens)).validate()

    @property
    def channels(self) -> int:
        """K."""
        return self.gram.shape[-1]

    def validate(self, name: str = "statistics", channels: int | None = None) -> InputStatistics:
        """Raise ValueError unless shapes agree, values are finite and, where given, ``channels`` fit; return self."""
        k = self.channels
        if self.gram.shape != (k, k):
            raise ValueError(f"{name}: gram has shape {tuple(self.gram.shape)}, expected [K, K]")
        if channels is not None and k != channels:
            raise ValueError(f"{name} have {k} channels, the weight has {channels} columns: another model's?")
        for what in ("mean", "abs_mean", "abs_max"):
            if getattr(self, what).shape != (k,):
                raise ValueError(f"{name}: {what} has shape {tuple(getattr(self, what).shape)}, expected ({k},)")
        for what in ("gram", "mean", "abs_mean", "abs_max"):
            if not torch.isfinite(getattr(self, what)).all():
                raise ValueError(f"{name}: {what} holds NaN or Inf")
        return self


def check_statistics(statistics: InputStatistics, name: str, channels: int) -> InputStatistics:
    """statistics, or TypeError or ValueError, with the name of the weight, for what does not fit its columns."""
    if not isinstance(statistics, InputStatistics):
        raise TypeError(f"statistics of {name} must be an InputStatistics, got {type(statistics).__name__}")
    return statistics.validate(f"statistics of {name}", channels)
