"""QLoRA's start (Dettmers et al., 2023): round to nearest, A Kaiming-uniform, B zero: the adapter adds nothing yet."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loftq_kernels.initializers import nearest, qalora
from loftq_kernels.initializers.config import LayerConfig, Method
from loftq_kernels.initializers.options import check_seed
from loftq_kernels.initializers.result import AdapterInit
from loftq_kernels.ops import checks


def qlora_init(
    weight: Tensor,
    format: str = "nf4",
    rank: int | None = 16,
    *,
    group_size: int = 64,
    scaling: float = 1.0,
    scale_dtype: torch.dtype = torch.float16,
    scale_search: bool = False,
    seed: int = 0,
    name: str = "weight",
) -> AdapterInit:
    """Q = quantize(W); lora_A [r, K] ~ U(-1/sqrt(K), 1/sqrt(K)), as PEFT and `nn.Linear` draw it; lora_B [N, r] = 0.

    ``rank=None`` gives no adapter: plain round to nearest. Raises as `quantize`, and ValueError for a rank outside
    1 .. min(N, K); errors call the weight ``name``.
    """
    checks.check_weight(name, weight)
    seed = check_seed(seed)
    if rank is not None:
        rank = checks.check_rank(rank, *weight.shape)
    init = nearest.nearest_init(
        weight,
        format,
        group_size=group_size,
        scaling=scaling,
        scale_dtype=scale_dtype,
        scale_search=scale_search,
        name=name,
    )
    if rank is not None:
        out_features, in_features = weight.shape
        bound = 1 / math.sqrt(in_features)
        uniform = torch.rand(
            rank, in_features, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu"
        )
        init.lora_A = ((2 * uniform - 1) * bound).to(weight.device)
        init.lora_B = torch.zeros(out_features, rank, dtype=torch.float32, device=weight.device)
    return init


def _run(weights: Sequence[Tensor], cfg: LayerConfig, **options) -> list[AdapterInit]:
    return nearest.one_by_one(weights, cfg, lambda w, **own: qlora_init(w, cfg.format, cfg.rank, **own), **options)


METHOD = Method("qlora", {"lora": _run, "qalora": qalora.run})
