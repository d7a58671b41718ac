"""Round to nearest without an adapter: what ``rank=None`` means, and where QLoRA's and QA-LoRA's starts begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loftq_kernels.formats import quantize
from loftq_kernels.initializers import parallel
from loftq_kernels.initializers.config import LayerConfig
from loftq_kernels.initializers.options import check_scaling, seed_of
from loftq_kernels.initializers.result import AdapterInit
from loftq_kernels.initializers.statistics import InputStatistics
from loftq_kernels.ops import checks


def nearest_init(
    weight: Tensor,
    format: str = "nf4",
    *,
    group_size: int = 64,
    scaling: float = 1.0,
    scale_dtype: torch.dtype = torch.float16,
    scale_search: bool = False,
    name: str = "weight",
) -> AdapterInit:
    """Q = quantize(W), no adapter, and the error ||W - Q||_F / ||W||_F. Raises as `quantize`."""
    checks.check_weight(name, weight)
    scaling = check_scaling(scaling)
    packed = quantize(weight, format, group_size, scale_dtype=scale_dtype, scale_search=scale_search, name=name)
    norm = torch.linalg.vector_norm(weight.detach(), dtype=torch.float64).item()
    residual = weight.detach().float() - packed.dequantize()
    error = torch.linalg.vector_norm(residual, dtype=torch.float64).item() / norm if norm > 0 else 0.0
    return AdapterInit(packed, None, None, scaling, error, [error])


def run(weights: Sequence[Tensor], cfg: LayerConfig, **options) -> list[AdapterInit]:
    """`nearest_init` of each weight, as a `LayerConfig` says."""
    return one_by_one(weights, cfg, lambda weight, seed, **own: nearest_init(weight, cfg.format, **own), **options)


def one_by_one(
    weights: Sequence[Tensor],
    cfg: LayerConfig,
    method: Callable[..., AdapterInit],
    *,
    statistics: Sequence[InputStatistics] | None,
    device: torch.device | str | None,
    progress: Callable[[int], None] | None,
    names: Sequence[str] | None,
) -> list[AdapterInit]:
    """Call method(weight, seed=, name=, ...) for each weight. It needs no data, so statistics are ignored.

    The seed of a matrix is made from ``cfg.seed`` and its name; a single weight without a name gets ``cfg.seed``.
    """
    if not len(weights):
        return []
    alone = names is None and len(weights) == 1
    names = [f"weights[{i}]" for i in range(len(weights))] if names is None else names

    def run_one(named: tuple[str, Tensor]) -> AdapterInit:
        name, weight = named
        init = method(
            weight if device is None else weight.to(device),
            group_size=cfg.group_size,
            scaling=cfg.scaling,
            scale_dtype=cfg.scale_dtype,
            scale_search=cfg.scale_search,
            seed=cfg.seed if alone else seed_of(cfg.seed, name),
            name=name,
        )
        return init.to(weight.device)

    target = weights[0].device if device is None else torch.device(device)
    division = parallel.divide(len(weights), weights[0].shape, target)
    done = None if progress is None else lambda _: progress(1)
    return parallel.each(run_one, list(zip(names, weights, strict=True)), division, done)
