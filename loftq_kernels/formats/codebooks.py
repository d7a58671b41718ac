"""Code books, each derived from its formula; no table is written out anywhere in the package."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

# The tail probability at which the outermost level of a NormalFloat sits: QLoRA's offset, (1 - 1/32 + 1 - 1/30) / 2
# rounded to the seven digits that bitsandbytes and LoftQ use.
NORMAL_OFFSET = 0.9677083


def normal_float(bits: int) -> Tensor:
    """NF-b: quantiles of the normal distribution, zero included, scaled into [-1, 1]. Float32 [2^b], ascending.

        {Q(p) : p in linspace(o, 1/2, 2^(b-1) + 1)}  and  0  and  {-Q(p) : p in linspace(o, 1/2, 2^(b-1))},  p != 1/2,

    divided by the largest, with Q the normal quantile function and o = 0.9677083. Source: QLoRA (Dettmers et al. 2023)
    for b = 4, LoftQ (Li et al. 2024) for any b. At b = 4 it equals bitsandbytes' table bit for bit.
    """
    quantile = NormalDist().inv_cdf
    half = 2 ** (bits - 1)

    def side(steps: int) -> list[float]:
        return [quantile(p) for p in _linspace(NORMAL_OFFSET, 0.5, steps)[:-1].tolist()]

    levels = sorted(side(half + 1) + [0.0] + [-level for level in side(half)])
    table = torch.tensor(levels, dtype=torch.float32, device="cpu")
    return table / table.max()


def integers(bits: int) -> Tensor:
    """-2^(b-1) .. 2^(b-1) - 1 as float32 [2^b]."""
    half = 2 ** (bits - 1)
    return torch.arange(-half, half, dtype=torch.float32, device="cpu")


def uniform(bits: int) -> Tensor:
    """linspace(-1, 1, 2^b): the "uniform" code book of LoftQ as PEFT shipped it. Float32 [2^b]."""
    return _linspace(-1.0, 1.0, 2**bits)


def _linspace(start: float, end: float, steps: int) -> Tensor:
    # Device and dtype are spelled out: tables must not follow set_default_dtype or a torch.device("meta") context.
    return torch.linspace(start, end, steps, dtype=torch.float32, device="cpu")
