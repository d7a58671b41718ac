"""ASER (Zhao et al., AAAI 2025, arXiv 2411.07762): whitened SVD of the residual, outlier channels smoothed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loftq_kernels.formats import get_format
from loftq_kernels.initializers.loftq import check_batch, check_scaling, run_batch
from loftq_kernels.initializers.loftq_options import LoftQOptions
from loftq_kernels.initializers.result import AdapterInit
from loftq_kernels.initializers.statistics import InputStatistics
from loftq_kernels.initializers.weighted import resolve_mode

OUTLIER_CHANNELS = 32  # the paper's f, at rank 64


def aser_init(
    weight: Tensor,
    statistics: InputStatistics,
    format: str = "nf4",
    rank: int = 16,
    *,
    rank_energy: float | None = None,
    outlier_channels: int = OUTLIER_CHANNELS,
    group_size: int = 64,
    scaling: float = 1.0,
    svd: str = "auto",
    scale_dtype: torch.dtype = torch.float16,
    scale_search: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> AdapterInit:
    """Q = quantize(W without its outlier columns), and the adapter from the whitened SVD of what Q leaves

        E = W - Q;   E F = U D V^T with F F^T = S = X^T X / n;   s B A = U_r D_r V_r^T F^(-1) = U_r U_r^T E

    Outlier channels I are the largest of mean|x_k| * mean|w_k|. Their columns are left out of Q, so that they stretch
    no scale, and E holds them whole. ``AdapterInit.smoothing`` is m with m_k = mean|x_k| / min_I mean|x| for k in I and
    1 elsewhere: with 8-bit activations one quantizes x / m and multiplies column k of Q + s B A by m_k. Where x stays
    as it is, the two cancel, and `qlora_linear` needs neither.

    Args:
        rank: of the adapter; the most it may have with ``rank_energy``.
        rank_energy: in (0, 1]: take the least r with sum_{j <= r} D_jj >= rank_energy * sum_j D_jj instead.
        outlier_channels: at most this many, and at most rank / 2: the low-rank term has to carry them. 0: none.
        Others: as for `eora_init`.

    Returns an `AdapterInit` with ``weighted_error`` and ``smoothing``. Raises as `eora_init`.
    """
    return aser_init_batch(
        [weight],
        [statistics],
        format,
        rank,
        rank_energy=rank_energy,
        outlier_channels=outlier_channels,
        group_size=group_size,
        scaling=scaling,
        svd=svd,
        scale_dtype=scale_dtype,
        scale_search=scale_search,
        seed=seed,
        device=device,
        backend=backend,
        names=["weight"],
    )[0]


def aser_init_batch(
    weights: Sequence[Tensor],
    statistics: Sequence[InputStatistics],
    format: str = "nf4",
    rank: int = 16,
    *,
    rank_energy: float | None = None,
    outlier_channels: int = OUTLIER_CHANNELS,
    group_size: int = 64,
    scaling: float = 1.0,
    svd: str = "auto",
    scale_dtype: torch.dtype = torch.float16,
    scale_search: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    backend: str | None = None,
    progress: Callable[[int], None] | None = None,
    names: Sequence[str] | None = None,
) -> list[AdapterInit]:
    """`aser_init` for same-shape matrices; ``progress`` and ``names`` as for `loftq_init_batch`."""
    weights = list(weights)
    names = [f"weights[{i}]" for i in range(len(weights))] if names is None else list(names)
    check_scaling(scaling)
    check_aser(rank_energy, outlier_channels)
    check_batch(weights, names, rank)
    if not weights:
        return []
    options = LoftQOptions(
        format=get_format(format),
        rank=rank,
        num_iter=1,
        group_size=group_size,
        scaling=float(scaling),
        mode=resolve_mode(svd),
        warm_steps=0,
        order="quantize_first",
        scale_dtype=scale_dtype,
        scale_search=scale_search,
        seed=seed,
        outlier_channels=min(outlier_channels, rank // 2),
        rank_energy=rank_energy,
    )
    return run_batch(weights, names, options, device=device, backend=backend, progress=progress, statistics=statistics)


def check_aser(rank_energy: float | None, outlier_channels: int) -> None:
    """Raise ValueError or TypeError for options out of range."""
    if isinstance(outlier_channels, bool) or not isinstance(outlier_channels, int):
        raise TypeError(f"outlier_channels must be an int, got {outlier_channels!r}")
    if outlier_channels < 0:
        raise ValueError(f"outlier_channels={outlier_channels} must be >= 0")
    if rank_energy is None:
        return
    number = isinstance(rank_energy, int | float) and not isinstance(rank_energy, bool)
    if not number or not 0 < rank_energy <= 1:
        raise ValueError(f"rank_energy={rank_energy!r} must be in (0, 1], or None for a fixed rank")
