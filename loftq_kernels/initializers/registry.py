"""The initializers by name. Each takes same-shape weights and a `QuantConfig` and returns an `AdapterInit` each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loftq_kernels.initializers.loftq import loftq_init_batch
from loftq_kernels.initializers.qalora import qalora_init
from loftq_kernels.initializers.qlora import qlora_init
from loftq_kernels.initializers.result import AdapterInit

if TYPE_CHECKING:
    from loftq_kernels.config import QuantConfig

Progress = Callable[[int], None] | None


def _loftq(weights: Sequence[Tensor], cfg: QuantConfig, **options):
    return loftq_init_batch(
        weights,
        cfg.format,
        cfg.rank,
        cfg.num_iter,
        group_size=cfg.group_size,
        scaling=cfg.scaling,
        svd=cfg.svd,
        order=cfg.order,
        scale_dtype=cfg.scale_dtype,
        scale_search=cfg.scale_search,
        seed=cfg.seed,
        **options,
    )


def _qlora(weights: Sequence[Tensor], cfg: QuantConfig, *, device, progress: Progress, names: Sequence[str] | None):
    results = []
    for i, weight in enumerate(weights):
        name = names[i] if names is not None else f"weights[{i}]"
        init = qlora_init(
            weight if device is None else weight.to(device),
            cfg.format,
            cfg.rank,
            group_size=cfg.group_size,
            scaling=cfg.scaling,
            scale_dtype=cfg.scale_dtype,
            scale_search=cfg.scale_search,
            seed=cfg.seed + i,
            name=name,
        )
        results.append(init.to(weight.device))
        if progress is not None:
            progress(1)
    return results


def _qalora(weights: Sequence[Tensor], cfg: QuantConfig, *, device, progress: Progress, names: Sequence[str] | None):
    results = []
    for i, weight in enumerate(weights):
        init = qalora_init(
            weight if device is None else weight.to(device),
            cfg.format,
            cfg.rank,
            cfg.num_iter,
            init=cfg.init,
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


_INITIALIZERS = {"loftq": _loftq, "qlora": _qlora}


def initializer_names() -> tuple[str, ...]:
    """The names that ``QuantConfig(init=...)`` accepts."""
    return tuple(_INITIALIZERS)


def initialize(
    weights: Sequence[Tensor],
    cfg: QuantConfig,
    *,
    device: torch.device | str | None = None,
    progress: Progress = None,
    names: Sequence[str] | None = None,
) -> list[AdapterInit]:
    """Quantize same-shape weights and choose their adapters as cfg says; ``rank=None`` rounds to nearest without one.

    ``device`` is where to compute, ``progress(n)`` is told of n more matrices done, ``names`` appear in errors.
    """
    run = _qlora if cfg.rank is None else _INITIALIZERS[cfg.init]
    if cfg.rank is not None and cfg.adapter == "qalora":
        run = _qalora
    return run(weights, cfg, device=device, progress=progress, names=names)
