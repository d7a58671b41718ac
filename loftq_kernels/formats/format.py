"""What a format is, and the registry of those that exist. A new format is one entry in `vocabulary.FORMATS`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from loftq_kernels import vocabulary
from loftq_kernels.formats import codebooks


@dataclass(frozen=True)
class Format:
    """A way to store a weight: w ~ codebook[code] * scale + offset, one scale (and offset) per group.

    ``scale_rule`` is one of "absmax": max|w| / codebook[-1]; "minmax": (max - min) / (2^bits - 1), with an offset;
    "mean_std": mean + 2.5 std.
    """

    name: str
    bits: int
    family: str  # The family of its code book: "normal_float", "integers" or "uniform".
    scale_rule: str

    @property
    def affine(self) -> bool:
        """Whether each group has an offset beside its scale."""
        return self.scale_rule == "minmax"

    @cached_property
    def _table(self) -> Tensor:
        return getattr(codebooks, self.family)(self.bits)

    def codebook(self, device: torch.device | str | None = None) -> Tensor:
        """Float32 [2^bits], ascending; a fresh copy."""
        return self._table.to(device="cpu" if device is None else device, copy=True)


_FORMATS = {name: Format(name, *word) for name, word in vocabulary.FORMATS.items()}


def format_names() -> tuple[str, ...]:
    """The names that ``format=`` accepts."""
    return tuple(_FORMATS)


def get_format(name: str) -> Format:
    """The format of that name. Raises ValueError, listing the names, when there is none."""
    if not isinstance(name, str) or name not in _FORMATS:
        raise ValueError(f"unknown format {name!r}; known: {', '.join(_FORMATS)}")
    return _FORMATS[name]
