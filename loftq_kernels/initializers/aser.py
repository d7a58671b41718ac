"""ASER (Zhao et al., AAAI 2025, arXiv 2411.07762): whitened SVD of the residual, outlier channels smoothed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from loftq_kernels import arguments
from loftq_kernels.formats import get_format
from loftq_kernels.initializers import parallel
from loftq_kernels.initializers.config import OUTLIER_CHANNELS, LayerConfig, Method, check_rank_energy
from loftq_kernels.initializers.drivers.gram import resolve_mode
from loftq_kernels.initializers.engine import check_batch, run_batch
from loftq_kernels.initializers.options import SolverOptions, check_scaling
from loftq_kernels.initializers.result import AdapterInit
from loftq_kernels.initializers.statistics import InputStatistics, check_statistics


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
        rank: of the adapter; with ``rank_energy`` its upper limit.
        rank_energy: in (0, 1]: take the least r with sum_{j <= r} D_jj >= rank_energy * sum_j D_jj instead.
        outlier_channels: at most so many, and at most rank / 2, as the low-rank term has to carry them. 0: none.
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
    scaling = check_scaling(scaling)
    check_rank_energy(rank_energy)
    outlier_channels = arguments.whole_number("outlier_channels", outlier_channels, 0, error=TypeError)
    rank = check_batch(weights, names, rank)
    if not weights:
        return []
    options = SolverOptions(
        format=get_format(format),
        rank=rank,
        num_iter=1,
        group_size=group_size,
        scaling=scaling,
        mode=resolve_mode(svd),
        warm_steps=0,
        order="quantize_first",
        scale_dtype=scale_dtype,
        scale_search=scale_search,
        seed=seed,
        rank_energy=rank_energy,
    )
    run = partial(run_batch, weights, names, options, device=device, backend=backend, progress=progress)
    count = min(outlier_channels, rank // 2)
    if count == 0:
        return run(statistics=statistics)

    def outliers_of(layer: tuple[Tensor, InputStatistics, str]) -> Tensor:
        weight, own, name = layer
        return outlier_channels_of(weight.detach(), check_statistics(own, name, weight.shape[1]), count)

    layers = list(zip(weights, statistics, names, strict=True))
    outliers = parallel.each(outliers_of, layers, parallel.divide(len(layers), weights[0].shape, weights[0].device))
    inits = run(statistics=statistics, left_out=outliers)
    for init, own, channels in zip(inits, statistics, outliers, strict=True):
        init.smoothing = smoothing_vector(own, channels).to(init.packed.device)
    return inits


def outlier_channels_of(weight: Tensor, statistics: InputStatistics, count: int) -> Tensor:
    """Int64 indices of the ``count`` columns with the largest mean|x_k| * mean|w_k|, without those where it is zero."""
    strength = statistics.abs_mean.to(weight.device).double() * weight.double().abs().mean(0)
    values, channels = strength.topk(min(count, len(strength)))
    return channels[values > 0]


def smoothing_vector(statistics: InputStatistics, channels: Tensor) -> Tensor:
    """ASER's m [K], float32: mean|x_k| divided by its minimum over the outlier channels; 1 for all other channels."""
    size = statistics.abs_mean.to(channels.device)
    smoothing = torch.ones_like(size, dtype=torch.float32)
    if len(channels):
        smoothing[channels] = (size[channels] / size[channels].min()).float()
    return smoothing


def _run(weights: Sequence[Tensor], cfg: LayerConfig, *, statistics: Sequence[InputStatistics], **options):
    return aser_init_batch(
        weights,
        statistics,
        cfg.format,
        cfg.rank,
        rank_energy=cfg.rank_energy,
        outlier_channels=cfg.outlier_channels,
        group_size=cfg.group_size,
        scaling=cfg.scaling,
        svd=cfg.svd,
        scale_dtype=cfg.scale_dtype,
        scale_search=cfg.scale_search,
        seed=cfg.seed,
        **options,
    )


METHOD = Method("aser", {"lora": _run}, needs_statistics=True, takes_statistics=True, options=("rank_energy",))
