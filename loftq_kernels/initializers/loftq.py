"""LoftQ (Li et al., ICLR 2024): alternate quantization and truncated SVD so that Q + s B A starts close to W."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loftq_kernels.formats import get_format
from loftq_kernels.initializers import qalora
from loftq_kernels.initializers.config import LayerConfig, Method
from loftq_kernels.initializers.drivers import gram, low_rank
from loftq_kernels.initializers.engine import check_batch, run_batch
from loftq_kernels.initializers.options import SolverOptions, check_scaling, check_schedule
from loftq_kernels.initializers.result import AdapterInit
from loftq_kernels.initializers.statistics import InputStatistics


def loftq_init(
    weight: Tensor,
    format: str = "nf4",
    rank: int = 16,
    num_iter: int = 5,
    *,
    group_size: int = 64,
    scaling: float = 1.0,
    svd: str = "auto",
    order: str = "quantize_first",
    scale_dtype: torch.dtype = torch.float16,
    scale_search: bool = False,
    seed: int = 0,
    statistics: InputStatistics | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> AdapterInit:
    """Choose Q and the adapter together: minimise ||W - Q - scaling * lora_B @ lora_A||_F over alternations

        Q_t = quantize(W - s B_{t-1} A_{t-1});     s B_t A_t = SVD_r(W - Q_t);     B_0 A_0 = 0

    and return the best iterate (they are not monotone), U sqrt(S) and sqrt(S) V^T each divided by sqrt(scaling).

    Args:
        weight: [N, K], floating point.
        format, group_size, scale_dtype, scale_search: as for `quantize`.
        rank: 1 .. min(N, K).
        num_iter: alternations T >= 1; T = 1 is the SVD of the plain quantization residual.
        scaling: what the module multiplies lora_B @ lora_A by, lora_alpha / r; > 0.
        svd: "exact" (float64 Gram matrix and eigh), "fast" (block Krylov, then warm-started) or "auto": fast unless the
            matrix is small. docs/initializer.md says how far the final error of "fast" lies from that of "exact".
        order: "quantize_first" as above, or "svd_first", which takes the SVD of W - Q_{t-1} first (Q_0 = 0).
        seed: of the random start of "fast", -2^63 .. 2^64 - 1. The same seed gives the same bits on the same machine.
            From 8.4 million weights on (half of that with statistics) several threads serve one matrix where there
            are more threads than matrices; another number of them adds up in another order, which may round some
            codes the other way.
        statistics: of the layer's input. With them SVD_r minimises the error of the layer's output,
            ||X (W - Q - s B A)^T||_F, in float64; the best iterate is the one of least such error; "auto" is "exact".
        device: where to compute; the result is on the device of weight.
        backend: "reference" forces the driver in plain torch; None takes the compiled one where there is one.

    Raises ValueError for arguments out of range, NaN or Inf in weight and scales that do not fit scale_dtype.
    """
    return loftq_init_batch(
        [weight],
        format,
        rank,
        num_iter,
        group_size=group_size,
        scaling=scaling,
        svd=svd,
        order=order,
        scale_dtype=scale_dtype,
        scale_search=scale_search,
        seed=seed,
        statistics=None if statistics is None else [statistics],
        device=device,
        backend=backend,
    )[0]


def loftq_init_batch(
    weights: Sequence[Tensor] | Tensor,
    format: str = "nf4",
    rank: int = 16,
    num_iter: int = 5,
    *,
    group_size: int = 64,
    scaling: float = 1.0,
    svd: str = "auto",
    order: str = "quantize_first",
    scale_dtype: torch.dtype = torch.float16,
    scale_search: bool = False,
    seed: int = 0,
    statistics: Sequence[InputStatistics] | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
    progress: Callable[[int], None] | None = None,
    names: Sequence[str] | None = None,
) -> list[AdapterInit]:
    """`loftq_init` for same-shape matrices: a sequence of [N, K] or one [B, N, K]. Results do not depend on batching
    (those of large matrices up to rounding: see ``seed``). On CPUs each of torch's threads takes a matrix of its own.

    ``statistics`` has one entry per matrix; matrices with the same input should stand together and have the same entry.
    ``progress(n)`` is called whenever n more matrices are done. Raises as `loftq_init`, with the matrix's entry in
    ``names`` (default "weights[i]"), and ValueError for mixed shapes, dtypes or devices. An empty batch gives an empty
    list.
    """
    weights = list(weights)
    names = [f"weights[{i}]" for i in range(len(weights))] if names is None else list(names)
    quantizer = get_format(format)
    scaling = check_scaling(scaling)
    num_iter, seed = check_schedule(num_iter, order, svd, seed)
    rank = check_batch(weights, names, rank)
    if not weights:
        return []
    rows, columns = weights[0].shape
    mode = low_rank.resolve_mode(svd, rank, min(rows, columns)) if statistics is None else gram.resolve_mode(svd)
    options = SolverOptions(
        format=quantizer,
        rank=rank,
        num_iter=num_iter,
        group_size=group_size,
        scaling=scaling,
        mode=mode,
        warm_steps=low_rank.warm_steps(min(rows, columns), quantizer.bits),
        order=order,
        scale_dtype=scale_dtype,
        scale_search=scale_search,
        seed=seed,
    )
    return run_batch(weights, names, options, device=device, backend=backend, progress=progress, statistics=statistics)


def run(
    weights: Sequence[Tensor], cfg: LayerConfig, *, num_iter: int | None = None, order: str | None = None, **options
):
    """`loftq_init_batch` as a `LayerConfig` says."""
    return loftq_init_batch(
        weights,
        cfg.format,
        cfg.rank,
        num_iter or cfg.num_iter,
        group_size=cfg.group_size,
        scaling=cfg.scaling,
        svd=cfg.svd,
        order=order or cfg.order,
        scale_dtype=cfg.scale_dtype,
        scale_search=cfg.scale_search,
        seed=cfg.seed,
        **options,
    )


METHOD = Method("loftq", {"lora": run, "qalora": qalora.run}, takes_statistics=True, options=("order",))
