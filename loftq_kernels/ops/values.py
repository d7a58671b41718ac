"""Checks that read data: finite weights, and scales that fit their dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loftq_kernels.ops import checks
from loftq_kernels.storage import packing

NEGLIGIBLE = 2.0**-10  # of a matrix's norm: the 8-bit formats lose five times as much to rounding
# Elements that torch reduces on the calling thread. More of them take all its threads, and beside a busy process each
# such step may wait for some milliseconds: that is longer than the quantization whose scales are checked.
_ON_ONE_THREAD = 1 << 14


def kernel_dtype(weight: Tensor, name: str = "weight") -> Tensor:
    """weight itself, or in float32 if it has a dtype (float64) that the quantize kernels do not read."""
    if weight.dtype in checks.SCALE_DTYPES:
        return weight
    narrow = weight.float()
    largest = check_finite(weight, name)
    if largest > 0 and not torch.finfo(torch.float32).tiny <= largest <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name} has magnitude {largest:.4g}, beyond the range of float32, which formats are read in")
    return narrow


def check_finite(weight: Tensor, name: str = "weight", *, first_row: int = 0) -> float:
    """Return max|weight|. Raises ValueError with the place of the first NaN or Inf in weight [N, K]."""
    if weight.numel() == 0:
        return 0.0
    low, high = (extreme.item() for extreme in weight.aminmax())  # It allocates nothing of the weight's size.
    if math.isfinite(low) and math.isfinite(high):
        return max(-low, high)
    row, column = (~torch.isfinite(weight)).nonzero()[0].tolist()
    raise ValueError(f"{name} holds {weight[row, column].item()} in row {first_row + row}, column {column}")


def _extremes(scales: Tensor) -> tuple[float, float]:
    """Least and largest of a small tensor's elements; NaN if one is NaN, and (1, 1) of none."""
    if scales.numel() == 0:
        return 1.0, 1.0
    pieces = [scales] if scales.device.type != "cpu" else scales.reshape(-1).split(_ON_ONE_THREAD)
    found = [(low.item(), high.item()) for low, high in (piece.aminmax() for piece in pieces)]
    if any(math.isnan(low) for low, _ in found):
        return math.nan, math.nan
    return min(low for low, _ in found), max(high for _, high in found)


def check_scales(weight: Tensor, scale: Tensor, offset: Tensor | None, group_size: int, name: str = "weight") -> None:
    """Raise ValueError for faults that only values show: NaN or Inf in weight, scales beyond the range of their dtype.

    Reads the small scale tensor first, and the weight again only to explain a failure or a zero scale.
    """
    check_finite_scales(weight, scale, offset, name)
    check_zero_scales(weight, scale, offset, group_size, name)


def check_finite_scales(weight: Tensor, scale: Tensor, offset: Tensor | None, name: str = "weight") -> None:
    """Raise ValueError where a scale or offset of weight, or of weight less a low-rank term, is not finite."""
    if all(map(math.isfinite, (*_extremes(scale), *(() if offset is None else _extremes(offset))))):
        return
    finite = torch.isfinite(scale)
    if offset is not None:
        finite = finite & torch.isfinite(offset)
    row, group = (~finite).nonzero()[0].tolist()
    check_finite(weight[row : row + 1], name, first_row=row)
    raise ValueError(_range_message(name, row, group, weight[row].abs().max().item(), scale.dtype))


def check_zero_scales(
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    group_size: int,
    name: str = "weight",
    low_rank: tuple[Tensor, Tensor, float] | None = None,
) -> None:
    """Raise where scales that round to zero lose weights that matter.

    A zero scale is right for a constant group, which its offset holds rounded, and it may drop what is negligible
    against the whole matrix (a nearly dead row): with D what W less the offset and the low-rank term (lora_A, lora_B,
    scaling) leaves in those groups, entries count as lost where |D| > |W| / 2, and ||lost||_F may be up to
    `NEGLIGIBLE` * ||W||_F, below the rounding errors of any format.
    """
    if min(_extremes(scale)) > 0:
        return
    rows = (scale == 0).any(1).nonzero().flatten()
    if rows.numel() == 0:
        return

    def per_column(groups: Tensor) -> Tensor:
        return packing.spread_groups(groups[rows], weight.shape[1], group_size)

    own = weight[rows].float()
    deviation = own if offset is None else own - per_column(offset).float()
    if low_rank is not None:
        lora_A, lora_B, scaling = low_rank
        deviation = torch.addmm(deviation, lora_B[rows].float(), lora_A.float(), alpha=-scaling)
    lost = deviation.abs() * ((deviation.abs() > own.abs() / 2) & per_column(scale == 0))
    allowed = NEGLIGIBLE * torch.linalg.vector_norm(weight, dtype=torch.float64)
    if torch.linalg.vector_norm(lost, dtype=torch.float64) > allowed:
        row, column = divmod(lost.argmax().item(), weight.shape[1])
        group = column // packing.group_width(weight.shape[1], group_size)
        raise ValueError(_range_message(name, int(rows[row]), group, lost[row, column].item(), scale.dtype))


def _range_message(name: str, row: int, group: int, magnitude: float, dtype: torch.dtype) -> str:
    advice = "rescale the weight" if dtype == torch.float32 else "use scale_dtype=torch.float32"
    return (
        f"{name} row {row}, group {group}: magnitude {magnitude:.4g} gives a scale that does not fit {dtype}; {advice}"
    )
