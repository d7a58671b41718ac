"""LoftQ's alternation by the compiled driver; csrc/loftq/loftq.h states what it does and what memory it takes."""

from __future__ import annotations

import torch
from torch import Tensor

from loftq_kernels.initializers.drivers import low_rank
from loftq_kernels.initializers.options import SolverOptions
from loftq_kernels.initializers.result import AdapterInit
from loftq_kernels.ops import extension


def run(weights: list[Tensor], options: SolverOptions) -> list[AdapterInit]:
    """Same-shape weights [N, K] on one device through num_iter alternations, as `plain.run`."""
    codebook = options.format.codebook(weights[0].device)
    long_side, short_side = max(weights[0].shape), min(weights[0].shape)
    width = min(low_rank.block_width(options.rank), short_side)
    results = extension._C.loftq_batch(
        weights=weights,
        codebook=codebook,
        start=low_rank.gaussian(long_side, width, options.seed, weights[0].device),
        rank=options.rank,
        num_iter=options.num_iter,
        scaling=options.scaling,
        exact=options.mode == "exact",
        svd_first=options.order == "svd_first",
        operand_dtype=_operand_dtype(weights[0].device, options),
        cold_steps=low_rank.COLD_STEPS,
        warm_steps=options.warm_steps,
        group_size=options.group_size,
        scale_rule=options.format.scale_rule,
        scale_dtype=options.scale_dtype,
        scale_search=options.scale_search,
    )
    return [
        AdapterInit(
            packed=options.packed(result.codes, result.scale, result.offset, codebook, weight.shape[1]),
            lora_A=result.lora_A,
            lora_B=result.lora_B,
            scaling=options.scaling,
            error=result.error,
            errors=result.errors,
        )
        for weight, result in zip(weights, results, strict=True)
    ]


def _operand_dtype(device: torch.device, options: SolverOptions) -> torch.dtype:
    """Bfloat16 where the hardware multiplies it, float32 elsewhere.

    Rounding a flat residual to bfloat16 adds noise far below the residual's smallest singular value. For steep
    residuals the driver falls back on the exact solver.
    """
    if options.mode == "exact" or options.order == "svd_first":  # The low-rank term is then most of the weight.
        return torch.float32
    native = device.type != "cpu" or (torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if native else torch.float32
