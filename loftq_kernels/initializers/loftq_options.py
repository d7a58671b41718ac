"""What the LoftQ drivers are told, once `loftq_init_batch` has checked it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_kernels.formats import Format, PackedTensor


@dataclass(frozen=True)
class LoftQOptions:
    """The arguments of `loftq_init`, and what "auto" means for these weights: ``mode`` "exact" or "fast".

    outlier_channels, rank_energy: as for `aser_init`; for the weighted driver alone.
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
    outlier_channels: int = 0
    rank_energy: float | None = None

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
