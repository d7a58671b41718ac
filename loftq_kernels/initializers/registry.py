"""All methods and how to run them: same-shape weights and a `LayerConfig` in, one `AdapterInit` per weight out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loftq_kernels.initializers import aser, eora, loftq, nearest, qlora
from loftq_kernels.initializers.config import LayerConfig, register
from loftq_kernels.initializers.result import AdapterInit
from loftq_kernels.initializers.statistics import InputStatistics

for _method in (loftq.METHOD, qlora.METHOD, eora.METHOD, aser.METHOD):
    register(_method)


def initialize(
    weights: Sequence[Tensor],
    cfg: LayerConfig,
    *,
    statistics: Sequence[InputStatistics] | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int], None] | None = None,
    names: Sequence[str] | None = None,
) -> list[AdapterInit]:
    """Quantize same-shape weights and choose their adapters as cfg says; ``rank=None`` rounds to nearest without one.

    ``statistics`` has one entry per weight: init "eora" and "aser" need them (ValueError without), "loftq" uses them
    if they are given, and adapter="qalora" ignores them. ``device`` is where to compute; ``progress(n)`` is called when
    n more matrices are done. ``names`` appear in errors, and the seed of each matrix is made from its name.
    """
    if statistics is None and cfg.needs_statistics:
        raise ValueError(f"init={cfg.init!r} needs statistics of the layer's input: see collect_activations")
    run = nearest.run if cfg.rank is None else cfg.method.runs[cfg.adapter]
    return run(weights, cfg, statistics=statistics, device=device, progress=progress, names=names)
