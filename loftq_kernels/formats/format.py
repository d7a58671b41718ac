"""What a format is, and the registry of those that exist. A new format is one entry in `_FORMATS`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

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


_FORMATS = {
    fmt.name: fmt
    for fmt in (
        Format("nf2", 2, "normal_float", "absmax"),
        Format("nf4", 4, "normal_float", "absmax"),
        Format("int2", 2, "integers", "minmax"),
        Format("int4", 4, "integers", "minmax"),
        Format("int8", 8, "integers", "minmax"),
        # Symmetric integers: absmax / (2^(b-1) - 1), no offset.
        Format("int2_sym", 2, "integers", "absmax"),
        Format("int4_sym", 4, "integers", "absmax"),
        Format("int8_sym", 8, "integers", "absmax"),
        Format("uniform2", 2, "uniform", "mean_std"),
        Format("uniform4", 4, "uniform", "mean_std"),
    )
}


def format_names() -> tuple[str, ...]:
    """The names that ``format=`` accepts."""
    return tuple(_FORMATS)


def get_format(name: str) -> Format:
    """The format of that name. Raises ValueError, listing the names, when there is none."""
    if not isinstance(name, str) or name not in _FORMATS:
        raise ValueError(f"unknown format {name!r}; known: {', '.join(_FORMATS)}")
    return _FORMATS[name]
