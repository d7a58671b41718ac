"""The initializers by name. Each takes same-shape weights and a `QuantConfig` and returns an `AdapterInit` each.

The data-aware ones also take the `InputStatistics` of each weight's layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loftq_kernels.initializers.aser import aser_init_batch
from loftq_kernels.initializers.loftq import loftq_init_batch
from loftq_kernels.initializers.qalora import qalora_init
from loftq_kernels.initializers.qlora import qlora_init
from loftq_kernels.initializers.result import AdapterInit
from loftq_kernels.initializers.statistics import InputStatistics

if TYPE_CHECKING:
    from loftq_kernels.config import QuantConfig

Progress = Callable[[int], None] | None
Statistics = Sequence[InputStatistics] | None


def _loftq(weights: Sequence[Tensor], cfg: QuantConfig, *, num_iter: int | None = None, **options):
    return loftq_init_batch(
        weights,
        cfg.format,
        cfg.rank,
        num_iter or cfg.num_iter,
        group_size=cfg.group_size,
        scaling=cfg.scaling,
        svd=cfg.svd,
        order=cfg.order,
        scale_dtype=cfg.scale_dtype,
        scale_search=cfg.scale_search,
        seed=cfg.seed,
        **options,
    )


def _eora(weights: Sequence[Tensor], cfg: QuantConfig, **options):
    """EoRA is the first alternation of the weighted LoftQ."""
    return _loftq(weights, replace(cfg, order="quantize_first"), num_iter=1, **options)


def _aser(weights: Sequence[Tensor], cfg: QuantConfig, *, statistics: Statistics, **options):
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


def _one_by_one(
    weights: Sequence[Tensor],
    cfg: QuantConfig,
    method: Callable[..., AdapterInit],
    *,
    device,
    progress: Progress,
    names: Sequence[str] | None,
    statistics: Statistics,
):
    """Data-free: statistics are not looked at."""
    results = []
    for i, weight in enumerate(weights):
        init = method(
            weight if device is None else weight.to(device),
            cfg.format,
            cfg.rank,
            group_size=cfg.group_size,
            scaling=cfg.scaling,
            scale_dtype=cfg.scale_dtype,
            scale_search=cfg.scale_search,
            seed=cfg.seed + i,
            name=names[i] if names is not None else f"weights[{i}]",
        )
        results.append(init.to(weight.device))
        if progress is not None:
            progress(1)
    return results


def _qlora(weights: Sequence[Tensor], cfg: QuantConfig, **options):
    return _one_by_one(weights, cfg, qlora_init, **options)


def _qalora(weights: Sequence[Tensor], cfg: QuantConfig, **options):
    """Data-free in both its starts."""
    return _one_by_one(weights, cfg, partial(qalora_init, num_iter=cfg.num_iter, init=cfg.init), **options)


_INITIALIZERS = {"loftq": _loftq, "qlora": _qlora, "eora": _eora, "aser": _aser}
_NEED_STATISTICS = ("eora", "aser")
_TAKE_STATISTICS = (*_NEED_STATISTICS, "loftq")


def initializer_names() -> tuple[str, ...]:
    """The names that ``QuantConfig(init=...)`` accepts."""
    return tuple(_INITIALIZERS)


def needs_statistics(cfg: QuantConfig) -> bool:
    """Whether a layer with this config cannot be initialized without statistics of its input."""
    return takes_statistics(cfg) and cfg.init in _NEED_STATISTICS


def takes_statistics(cfg: QuantConfig) -> bool:
    """Whether a layer with this config is initialized otherwise when there are statistics of its input."""
    return cfg.rank is not None and not cfg.has_qalora and cfg.init in _TAKE_STATISTICS


def initialize(
    weights: Sequence[Tensor],
    cfg: QuantConfig,
    *,
    statistics: Statistics = None,
    device: torch.device | str | None = None,
    progress: Progress = None,
    names: Sequence[str] | None = None,
) -> list[AdapterInit]:
    """Quantize same-shape weights and choose their adapters as cfg says; ``rank=None`` rounds to nearest without one.

    ``statistics``, one a weight, are what init "eora" and "aser" need (ValueError without) and "loftq" takes, unless
    the adapter is "qalora", whose starts are data-free; ``device`` is where to compute, ``progress(n)`` is told of n
    more matrices done, ``names`` appear in errors.
    """
    if statistics is None and needs_statistics(cfg):
        raise ValueError(f"init={cfg.init!r} needs statistics of the layer's input: see collect_activations")
    run = _qlora if cfg.rank is None else _INITIALIZERS[cfg.init]
    if cfg.has_qalora:
        run = _qalora
    return run(weights, cfg, statistics=statistics, device=device, progress=progress, names=names)
