"""The arguments of the drivers, which an initializer has checked, and the checks that initializers share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loftq_kernels import arguments
from loftq_kernels.formats import Format, PackedTensor
from loftq_kernels.storage import packing

ORDERS = ("quantize_first", "svd_first")
SVD_MODES = ("auto", "exact", "fast")


@dataclass(frozen=True)
class SolverOptions:
    """The arguments of `loftq_init`, with svd="auto" resolved for these weights: ``mode`` is "exact" or "fast".

    ``rank_energy`` is as for `aser_init`; only the weighted driver uses it.
    """

    format: Format
    rank: int
    num_iter: int
    group_size: int
    scaling: float
    mode: str
    warm_steps: int
    order: str
    scale_dtype: torch.dtype
    scale_search: bool
    seed: int
    rank_energy: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "group_size", packing.check_group_size(self.group_size))

    def packed(self, codes: Tensor, scale: Tensor, offset: Tensor, codebook: Tensor, in_features: int) -> PackedTensor:
        """The weight that the quantize ops returned, whose offset is empty for formats without one."""
        return PackedTensor(
            codes,
            scale,
            offset if self.format.affine else None,
            codebook,
            in_features=in_features,
            group_size=self.group_size,
            format=self.format,
        )


def check_scaling(scaling: Any) -> float:
    """Return scaling as a float. Raises ValueError outside 1e-30 .. 1e30: its root divides float32 factors."""
    plain = arguments.plain_number(scaling)
    if plain is None or not 1e-30 <= plain <= 1e30:
        raise ValueError(f"scaling={scaling!r} must be a number in 1e-30 .. 1e30")
    return float(plain)


def check_schedule(num_iter: Any, order: str, svd: str, seed: Any) -> tuple[int, int]:
    """(num_iter, seed) as ints. Raises ValueError for values out of range, TypeError for a seed that is no integer."""
    num_iter = arguments.whole_number("num_iter", num_iter, 1, 2**31 - 1)
    seed = check_seed(seed)
    arguments.choice("order", order, ORDERS)
    arguments.choice("svd", svd, SVD_MODES)
    return num_iter, seed


def check_seed(seed: Any) -> int:
    """seed as an int that torch.Generator takes. Raises ValueError or TypeError for others."""
    return arguments.whole_number("seed", seed, -(2**63), 2**64 - 1, error=TypeError)


def seed_of(seed: int, name: str) -> int:
    """The seed of the matrix of that name. Each matrix has its own seed, which does not depend on the batch."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
