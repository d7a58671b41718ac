"""EoRA (Liu et al., 2024, arXiv 2410.21271): a low-rank term makes up for the output error of a quantized weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loftq_kernels.formats import PackedTensor, get_format
from loftq_kernels.initializers import loftq
from loftq_kernels.initializers.config import LayerConfig, Method
from loftq_kernels.initializers.drivers.gram import resolve_mode
from loftq_kernels.initializers.engine import run_batch
from loftq_kernels.initializers.options import SolverOptions, check_scaling
from loftq_kernels.initializers.result import AdapterInit
from loftq_kernels.initializers.statistics import InputStatistics
from loftq_kernels.ops import checks


def eora_init(
    weight: Tensor,
    statistics: InputStatistics,
    format: str = "nf4",
    rank: int = 16,
    *,
    packed: PackedTensor | None = None,
    group_size: int = 64,
    scaling: float = 1.0,
    svd: str = "auto",
    scale_dtype: torch.dtype = torch.float16,
    scale_search: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> AdapterInit:
    """Q = quantize(W), and the adapter that minimises ||X (W - Q - scaling * lora_B @ lora_A)^T||_F over rank r

    With S = X^T X / n = G L G^T the paper projects the residual E = W - Q into S's eigenspace, E G L^(1/2), truncates
    its SVD and projects back with L^(-1/2) G^T. The product is U U^T E, U the leading eigenvectors of E S E^T: that
    needs no inverse, hence no damping, and is what is computed, in float64.

    Args:
        weight: [N, K], floating point.
        statistics: of the layer's input, K channels (`collect_activations`, `InputStatistics.from_inputs`).
        packed: Q [N, K], quantized already by any method. It is kept as it is, and ``format``, ``group_size``,
            ``scale_dtype`` and ``scale_search`` are ignored. None: round to nearest as those arguments say.
        rank, scaling, svd, seed, device, backend: as for `loftq_init`; svd="auto" is "exact" here.

    Returns an `AdapterInit` with ``weighted_error``. Raises as `loftq_init`, and ValueError for statistics of another
    width, with NaN or Inf, or that are no Gram matrix, and for ``packed`` of another shape.
    """
    if packed is None:
        return loftq.loftq_init(
            weight,
            format,
            rank,
            1,
            statistics=statistics,
            group_size=group_size,
            scaling=scaling,
            svd=svd,
            scale_dtype=scale_dtype,
            scale_search=scale_search,
            seed=seed,
            device=device,
            backend=backend,
        )
    checks.check_weight("weight", weight)
    rank = checks.check_rank(rank, *weight.shape)
    scaling = check_scaling(scaling)
    if not isinstance(packed, PackedTensor):
        raise TypeError(f"packed must be a PackedTensor, got {type(packed).__name__}")
    if packed.shape != weight.shape:
        raise ValueError(f"packed has shape {tuple(packed.shape)}, the weight {tuple(weight.shape)}")
    options = SolverOptions(
        format=get_format(packed.format.name),
        rank=rank,
        num_iter=1,
        group_size=packed.group_size,
        scaling=scaling,
        mode=resolve_mode(svd),
        warm_steps=0,
        order="quantize_first",
        scale_dtype=packed.scale.dtype,
        scale_search=False,
        seed=seed,
    )
    return run_batch(
        [weight],
        ["weight"],
        options,
        device=device,
        backend=backend,
        progress=None,
        statistics=[statistics],
        packed=[packed],
    )[0]


def _run(weights: Sequence[Tensor], cfg: LayerConfig, **options):
    """EoRA is the first alternation of the weighted LoftQ."""
    return loftq.run(weights, cfg, num_iter=1, order="quantize_first", **options)


METHOD = Method("eora", {"lora": _run}, needs_statistics=True, takes_statistics=True)
