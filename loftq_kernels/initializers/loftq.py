"""LoftQ (Li et al., ICLR 2024): alternate quantization and truncated SVD so that Q + s B A starts close to W."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loftq_kernels.formats import PackedTensor, get_format
from loftq_kernels.initializers import loftq_reference, low_rank, weighted
from loftq_kernels.initializers.loftq_options import LoftQOptions
from loftq_kernels.initializers.result import AdapterInit
from loftq_kernels.initializers.statistics import InputStatistics, check_statistics
from loftq_kernels.ops import checks, extension
from loftq_kernels.ops.functional import check_finite, check_finite_scales, kernel_dtype, select_backend

ORDERS = ("quantize_first", "svd_first")
SMALLEST = 2.0**-116  # of a weight: below it the scales of 8-bit integers, 1/255 of the range, lose digits in float32
_WORKSPACE_COPIES = 8  # of a matrix in float32: what the exact solver holds at most beside a square weight


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
        seed: of the random start of "fast", -2^63 .. 2^64 - 1; the same seed gives the same result.
        statistics: of the layer's input. Then SVD_r minimises, and the best iterate is that of, the error of the
            layer's output ||X (W - Q - s B A)^T||_F, in float64; "auto" is "exact".
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
    """`loftq_init` for same-shape matrices: a sequence of [N, K] or one [B, N, K]. Results do not depend on batching.

    ``statistics`` has one entry a matrix; matrices with the same input should stand together and have the same entry.
    ``progress(n)`` is called whenever n more matrices are done. Raises as `loftq_init`, with the matrix's entry in
    ``names`` (default "weights[i]"), and ValueError for mixed shapes, dtypes or devices. An empty batch gives an empty
    list.
    """
    weights = list(weights)
    names = [f"weights[{i}]" for i in range(len(weights))] if names is None else list(names)
    quantizer = get_format(format)
    check_scaling(scaling)
    check_schedule(num_iter, order, svd, seed)
    check_batch(weights, names, rank)
    if not weights:
        return []
    rows, columns = weights[0].shape
    mode = low_rank.resolve_mode(svd, rank, min(rows, columns)) if statistics is None else weighted.resolve_mode(svd)
    options = LoftQOptions(
        format=quantizer,
        rank=rank,
        num_iter=num_iter,
        group_size=group_size,
        scaling=float(scaling),
        mode=mode,
        warm_steps=low_rank.warm_steps(min(rows, columns), quantizer.bits),
        order=order,
        scale_dtype=scale_dtype,
        scale_search=scale_search,
        seed=seed,
    )
    return run_batch(weights, names, options, device=device, backend=backend, progress=progress, statistics=statistics)


def run_batch(
    weights: list[Tensor],
    names: list[str],
    options: LoftQOptions,
    *,
    device: torch.device | str | None,
    backend: str | None,
    progress: Callable[[int], None] | None,
    statistics: Sequence[InputStatistics] | None = None,
    packed: Sequence[PackedTensor] | None = None,
) -> list[AdapterInit]:
    """Checked weights, as many at a time as fit, through the driver that options and statistics ask for.

    ``packed`` are weights that are quantized already, for an adapter on top of them; they need statistics.
    """
    source = weights[0].device
    target = source if device is None else torch.device(device)
    if target.type == "meta":
        raise ValueError("device='meta' computes no values")
    checks.check_quantize(
        weights[0],
        options.format.codebook(source),
        options.group_size,
        options.format.scale_rule,
        options.scale_dtype,
        options.scale_search,
    )
    rows, columns = weights[0].shape
    chunk = chunk_size(rows, columns, target)
    if statistics is not None:
        if len(statistics) != len(weights):
            raise ValueError(f"{len(statistics)} statistics for {len(weights)} weights")
        for own, name in zip(statistics, names, strict=True):
            check_statistics(own, name, columns)
        chunk = max(1, chunk_size(max(rows, columns), columns, target) // 2)  # all in float64, Gram factors beside
    cache = weighted.FactorCache()
    results: list[AdapterInit] = []
    for first in range(0, len(weights), chunk):
        these = slice(first, first + chunk)
        labels = names[these]
        batch = [kernel_dtype(w.detach(), n).to(target) for w, n in zip(weights[these], labels, strict=True)]
        calibration = None
        if statistics is not None:
            stored = None if packed is None else [p.to(target) for p in packed[these]]
            calibration = weighted.Calibration(statistics[these], labels, stored, cache)
        results += [init.to(source) for init in _run(batch, labels, options, backend, calibration)]
        if progress is not None:
            progress(len(batch))
    return results


def chunk_size(rows: int, columns: int, device: torch.device) -> int:
    """Matrices that go through the driver together. A CPU gains nothing from a batch: one matrix at a time keeps memory
    low, progress fine and Ctrl-C prompt. On a GPU their working set stays below `workspace_bytes`."""
    if device.type == "cpu":
        return 1
    return max(1, workspace_bytes(device) // (_WORKSPACE_COPIES * 4 * rows * columns))


def workspace_bytes(device: torch.device) -> int:
    """A quarter of a GPU's memory: batched eigh takes hardly longer for tens of matrices than for one. Not of what is
    free at the moment, so that the same call is cut up the same way each time."""
    return torch.cuda.get_device_properties(device).total_memory // 4 if device.type == "cuda" else 1 << 33


def _run(
    weights: list[Tensor],
    names: list[str],
    options: LoftQOptions,
    backend: str | None,
    calibration: weighted.Calibration | None = None,
) -> list[AdapterInit]:
    """All drivers assume finite weights, and let scales that do not fit their dtype show in the result.

    Zero scales are fine there: a group of W - s B A may well be zero. Only a matrix too small for any scale is refused.
    """
    for name, weight in zip(names, weights, strict=True):
        check_magnitude(weight, name, options.scale_dtype)
    compiled = select_backend(backend, weights[0].device) != "reference"
    # Neither autocast nor inference mode of the caller reaches in: products run in the dtypes chosen here (float32 ones
    # as precisely as torch.set_float32_matmul_precision says), and the results can be trained.
    with torch.autocast(weights[0].device.type, enabled=False), torch.inference_mode(False), torch.no_grad():
        if calibration is not None:
            inits = weighted.run(weights, options, calibration, backend="cpu" if compiled else "reference")
        else:
            inits = _run_compiled(weights, options) if compiled else loftq_reference.run(weights, options)
    for name, weight, init in zip(names, weights, inits, strict=True):
        check_finite_scales(weight, init.packed.scale, init.packed.offset, name)
    return inits


def check_magnitude(weight: Tensor, name: str, scale_dtype: torch.dtype) -> None:
    """Raise ValueError for NaN, Inf, or a weight that is too small as a whole for its scales."""
    largest = check_finite(weight, name)
    if 0 < largest < SMALLEST:
        raise ValueError(f"{name} has magnitude {largest:.4g}, too small for float32 scales; rescale the weight")
    if largest > 0 and torch.tensor(largest, device="cpu").to(scale_dtype) == 0:
        raise ValueError(
            f"{name} has magnitude {largest:.4g}: its scales do not fit {scale_dtype}; use scale_dtype=torch.float32"
        )


def _run_compiled(weights: list[Tensor], options: LoftQOptions) -> list[AdapterInit]:
    """The driver in C++; csrc/loftq/loftq.h states what it does and what memory it takes."""
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


def _operand_dtype(device: torch.device, options: LoftQOptions) -> torch.dtype:
    """Bfloat16 where the hardware multiplies it, float32 elsewhere: rounding a flat residual to it adds noise far below
    its smallest singular value; for steep ones the driver falls back on the exact solver."""
    if options.mode == "exact" or options.order == "svd_first":  # there the low-rank term is most of the weight
        return torch.float32
    native = device.type != "cpu" or (torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if native else torch.float32


def check_batch(weights: list[Tensor], names: list[str], rank: int) -> None:
    if len(names) != len(weights):
        raise ValueError(f"{len(names)} names for {len(weights)} weights")
    for name, weight in zip(names, weights, strict=True):
        checks.check_weight(name, weight)
        for what in ("shape", "dtype", "device"):
            mine, first = getattr(weight, what), getattr(weights[0], what)
            if mine != first:
                raise ValueError(f"a batch must agree in {what}: {name} has {mine}, {names[0]} has {first}")
    if weights:
        checks.check_rank(rank, *weights[0].shape)


def check_scaling(scaling: float) -> None:
    """Its root divides float32 factors."""
    if isinstance(scaling, bool) or not isinstance(scaling, int | float) or not (1e-30 <= scaling <= 1e30):
        raise ValueError(f"scaling={scaling!r} must be a number in 1e-30 .. 1e30")


def check_schedule(num_iter: int, order: str, svd: str, seed: int) -> None:
    if isinstance(num_iter, bool) or not isinstance(num_iter, int) or not 1 <= num_iter < 2**31:
        raise ValueError(f"num_iter={num_iter!r} must be an integer in 1 .. 2^31 - 1")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {seed!r}")
    if not -(2**63) <= seed < 2**64:  # what torch.Generator takes
        raise ValueError(f"seed={seed} is outside -2^63 .. 2^64 - 1")
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is not one of {ORDERS}")
    if svd not in low_rank.SVD_MODES:
        raise ValueError(f"svd={svd!r} is not one of {low_rank.SVD_MODES}")
