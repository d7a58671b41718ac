"""QA-LoRA (Xu et al., ICLR 2024): an adapter of group means, which the groups' offsets can take in exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from loftq_kernels import arguments
from loftq_kernels.formats import quantize
from loftq_kernels.initializers import nearest, parallel
from loftq_kernels.initializers.config import LayerConfig
from loftq_kernels.initializers.options import check_scaling, check_schedule
from loftq_kernels.initializers.result import AdapterInit
from loftq_kernels.ops import checks, differentiation
from loftq_kernels.ops.values import check_finite, check_finite_scales
from loftq_kernels.storage import packing

QALORA_STARTS = ("loftq", "qlora")


def expand_groups(lora_A: Tensor, in_features: int, group_size: int) -> Tensor:
    """lora_A [r, G] of the group means as the matrix [r, in_features] that multiplies x itself: x P^T with P[k] = 1/g.

    The mean of a group is its sum divided by ``group_size`` (in_features for -1), even in a partial last group, for x
    is padded with zeros. That is `nn.AvgPool1d(group_size)` of the authors' code and of PEFT. Differentiable.
    """
    width = packing.group_width(in_features, group_size)
    return (lora_A / width).repeat_interleave(width, dim=1)[:, :in_features]


def qalora_init(
    weight: Tensor,
    format: str = "int4",
    rank: int = 16,
    num_iter: int = 5,
    *,
    init: str = "loftq",
    group_size: int = 64,
    scaling: float = 1.0,
    scale_dtype: torch.dtype = torch.float16,
    scale_search: bool = False,
    seed: int = 0,
    name: str = "weight",
) -> AdapterInit:
    """Q and the adapter of  y = x Q^T + s avg(x) A^T B^T,  A [r, G], avg(x) [M, G] the means of x over groups of g.

    ``init="qlora"``: Q = quantize(W), A ~ U(-1/sqrt(G), 1/sqrt(G)), B = 0. ``init="loftq"`` alternates, as LoftQ does,

        Q_t = quantize(W - D_{t-1});    D_t = the matrix of rank r, constant in each group, nearest to W - Q_t;  D_0 = 0

    and returns the best iterate. With E the residual's group means and n the groups' widths, D_t sqrt(n) is the
    truncated SVD of E sqrt(n). Affine formats follow a shift of a group, so later iterates hardly improve.

    Arguments as for `loftq_init`; rank is 1 .. min(N, G). Returns an `AdapterInit` with adapter="qalora".
    Raises as `loftq_init`.
    """
    arguments.choice("init", init, QALORA_STARTS)
    checks.check_weight(name, weight)
    scaling = check_scaling(scaling)
    num_iter, seed = check_schedule(num_iter, "quantize_first", "auto", seed)
    group_size = packing.check_group_size(group_size)
    rank = checks.check_rank(rank, weight.shape[0], packing.num_groups(weight.shape[1], group_size), "groups")
    options = {"group_size": group_size, "scale_dtype": scale_dtype, "scale_search": scale_search, "name": name}
    if init == "qlora":
        start = nearest.nearest_init(weight, format, scaling=scaling, **options)
        start.lora_A, start.lora_B = _zero_start(weight, rank, start.packed.scale.shape[1], seed)
        start.adapter = "qalora"
        return start
    weight = differentiation.to_quantize(name, weight)
    with (
        differentiation.outside_transforms(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(weight.device.type, enabled=False),
    ):
        check_finite(weight, name)
        return _alternate(weight.float(), format, rank, num_iter, scaling, options)


def _zero_start(weight: Tensor, rank: int, groups: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(rank, groups, generator=generator, dtype=torch.float32, device="cpu")
    lora_A = ((2 * uniform - 1) / math.sqrt(groups)).to(weight.device)
    return lora_A, torch.zeros(weight.shape[0], rank, dtype=torch.float32, device=weight.device)


def _alternate(weight: Tensor, format: str, rank: int, num_iter: int, scaling: float, options: dict) -> AdapterInit:
    columns, group_size = weight.shape[1], options["group_size"]
    norm = torch.linalg.vector_norm(weight, dtype=torch.float64).item()
    low_rank = torch.zeros_like(weight)
    best: AdapterInit | None = None
    errors: list[float] = []
    for _ in range(num_iter):
        parallel.poll()
        packed = quantize(weight - low_rank, format, **options)
        check_finite_scales(weight, packed.scale, packed.offset, options["name"])
        residual = weight - packed.dequantize()
        lora_A, lora_B = _group_factors(residual, rank, group_size, scaling)
        low_rank = scaling * lora_B @ expand_groups(lora_A, columns, group_size)
        error = torch.linalg.vector_norm(residual - low_rank, dtype=torch.float64).item()
        errors.append(error / norm if norm > 0 else 0.0)
        if best is None or errors[-1] < best.error:
            best = AdapterInit(packed, lora_A, lora_B, scaling, errors[-1], errors, adapter="qalora")
    return best


def _group_factors(residual: Tensor, rank: int, group_size: int, scaling: float) -> tuple[Tensor, Tensor]:
    """lora_A [r, G] and lora_B [N, r]: s/g B A is, group by group, the rank-r matrix nearest to the residual [N, K]."""
    columns = residual.shape[1]
    width = packing.group_width(columns, group_size)
    grouped = pad(residual.double(), (0, -columns % width)).unflatten(1, (-1, width))
    ones = torch.ones(1, columns, dtype=torch.float64, device=residual.device)
    root = pad(ones, (0, -columns % width)).view(-1, width).sum(1).sqrt()  # The root of the columns per group.
    u, sigma, vh = torch.linalg.svd(grouped.sum(2) / root, full_matrices=False)
    half = (sigma[:rank] * (width / scaling)).sqrt()
    return (half[:, None] * vh[:rank] / root).float(), (u[:, :rank] * half).float()


def run(weights: Sequence[Tensor], cfg: LayerConfig, **options) -> list[AdapterInit]:
    """`qalora_init` of each weight as a `LayerConfig` says. Neither of its starts uses data."""

    def one(weight: Tensor, **own) -> AdapterInit:
        return qalora_init(weight, cfg.format, cfg.rank, cfg.num_iter, init=cfg.init, **own)

    return nearest.one_by_one(weights, cfg, one, **options)
