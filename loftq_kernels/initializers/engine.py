"""What all initializers share: checked weights go through a driver, one per thread, or as many as a GPU can hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loftq_kernels.formats import PackedTensor
from loftq_kernels.initializers import parallel
from loftq_kernels.initializers.drivers import compiled, plain, weighted
from loftq_kernels.initializers.options import SolverOptions
from loftq_kernels.initializers.result import AdapterInit
from loftq_kernels.initializers.statistics import InputStatistics, check_statistics
from loftq_kernels.ops import checks, differentiation
from loftq_kernels.ops.backends import select_backend
from loftq_kernels.ops.values import check_finite, check_finite_scales, check_zero_scales, kernel_dtype

# Below this magnitude of a weight the scales of 8-bit integers, 1/255 of the range, lose digits in float32.
SMALLEST = 2.0**-116


def run_batch(
    weights: list[Tensor],
    names: list[str],
    options: SolverOptions,
    *,
    device: torch.device | str | None,
    backend: str | None,
    progress: Callable[[int], None] | None,
    statistics: Sequence[InputStatistics] | None = None,
    packed: Sequence[PackedTensor] | None = None,
    left_out: Sequence[Tensor] | None = None,
) -> list[AdapterInit]:
    """Run checked weights, as many at a time as fit, through the driver that options and statistics select.

    ``packed`` holds weights that are quantized already and only get an adapter. ``left_out`` holds, for each weight,
    int64 indices of the columns that Q leaves out and the adapter holds whole. Both need statistics.
    """
    weights = [differentiation.to_quantize(name, weight) for name, weight in zip(names, weights, strict=True)]
    with differentiation.outside_transforms():
        return _run_all(weights, names, options, device, backend, progress, statistics, packed, left_out)


def _run_all(
    weights: list[Tensor],
    names: list[str],
    options: SolverOptions,
    device: torch.device | str | None,
    backend: str | None,
    progress: Callable[[int], None] | None,
    statistics: Sequence[InputStatistics] | None,
    packed: Sequence[PackedTensor] | None,
    left_out: Sequence[Tensor] | None,
) -> list[AdapterInit]:
    """`run_batch` of plain tensors."""
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
    shape, copies = (rows, columns), parallel.WORKSPACE_COPIES
    if statistics is not None:
        if len(statistics) != len(weights):
            raise ValueError(f"{len(statistics)} statistics for {len(weights)} weights")
        parallel.each(
            lambda pair: check_statistics(*pair, columns),
            list(zip(statistics, names, strict=True)),
            parallel.divide_reading(len(weights), columns, target),
        )
        shape, copies = (max(rows, columns), columns), 2 * copies  # All is float64, plus Gram factors.
    chunk = chunk_size(*shape, target, copies)
    pieces = [slice(first, first + chunk) for first in range(0, len(weights), chunk)]
    division = parallel.divide(len(pieces), shape, target, copies)
    cache = weighted.FactorCache(division.workers)

    def run_piece(these: slice) -> list[AdapterInit]:
        labels = names[these]
        batch = [kernel_dtype(w, n).to(target) for w, n in zip(weights[these], labels, strict=True)]
        calibration = None
        if statistics is not None:
            stored = None if packed is None else [p.to(target) for p in packed[these]]
            columns_out = None if left_out is None else [channels.to(target) for channels in left_out[these]]
            calibration = weighted.Calibration(statistics[these], labels, stored, columns_out, cache)
        return [init.to(source) for init in _run(batch, labels, options, backend, calibration)]

    done = None if progress is None else lambda i: progress(len(weights[pieces[i]]))
    return [init for inits in parallel.each(run_piece, pieces, division, done) for init in inits]


def chunk_size(rows: int, columns: int, device: torch.device, copies: int = parallel.WORKSPACE_COPIES) -> int:
    """How many matrices go through the driver together, of which each needs so many float32 copies of its shape.

    A CPU gains nothing from a batch: one matrix at a time keeps memory low, progress fine-grained and Ctrl-C prompt.
    On a GPU the working set of the batch stays below `workspace_bytes`.
    """
    if device.type == "cpu":
        return 1
    return max(1, workspace_bytes(device) // (copies * 4 * rows * columns))


def workspace_bytes(device: torch.device) -> int:
    """A quarter of a GPU's memory: batched eigh takes hardly longer for tens of matrices than for one.

    All memory counts, not what is free at the moment, so that the same call is always divided in the same way.
    """
    return torch.cuda.get_device_properties(device).total_memory // 4 if device.type == "cuda" else 1 << 33


def _run(
    weights: list[Tensor],
    names: list[str],
    options: SolverOptions,
    backend: str | None,
    calibration: weighted.Calibration | None = None,
) -> list[AdapterInit]:
    """All drivers assume finite weights, and let scales that do not fit their dtype show in the result.

    Zero scales are fine there: a group of W - s B A may well be zero. Refused are a matrix too small for any scale, and
    scales that round to zero where the adapter does not make up for what that loses.
    """
    for name, weight in zip(names, weights, strict=True):
        check_magnitude(weight, name, options.scale_dtype)
    use_compiled = _select_driver(backend, weights[0].device)
    # The caller's autocast and inference mode must not apply here: products run in the dtypes that the driver chooses
    # (float32 ones as precisely as torch.set_float32_matmul_precision says), and the results can be trained.
    with torch.autocast(weights[0].device.type, enabled=False), torch.inference_mode(False), torch.no_grad():
        if calibration is not None:
            inits = weighted.run(weights, options, calibration, backend="cpu" if use_compiled else "reference")
        else:
            inits = (compiled if use_compiled else plain).run(weights, options)
    for name, weight, init in zip(names, weights, inits, strict=True):
        held = weight, init.packed.scale, init.packed.offset
        check_finite_scales(*held, name)
        if calibration is None:  # which weighs columns by their inputs, and leaves some to the adapter alone
            low_rank = init.lora_A, init.lora_B, init.scaling
            check_zero_scales(*held, options.group_size, name, low_rank)
    return inits


def _select_driver(backend: str | None, device: torch.device) -> bool:
    """Whether the compiled driver serves. Raises ValueError for a backend that has no initializer."""
    if backend == "triton":
        raise ValueError(
            "backend='triton' has kernels for products and dequantize; initializers take None, 'cpu' or 'reference'"
        )
    return select_backend(backend, device) != "reference"


def check_magnitude(weight: Tensor, name: str, scale_dtype: torch.dtype) -> None:
    """Raise ValueError for NaN, Inf, or a weight that is too small as a whole for its scales."""
    largest = check_finite(weight, name)
    if 0 < largest < SMALLEST:
        raise ValueError(f"{name} has magnitude {largest:.4g}, too small for float32 scales; rescale the weight")
    if largest > 0 and torch.tensor(largest, device="cpu").to(scale_dtype) == 0:
        raise ValueError(
            f"{name} has magnitude {largest:.4g}: its scales do not fit {scale_dtype}; use scale_dtype=torch.float32"
        )


def check_batch(weights: list[Tensor], names: list[str], rank: int) -> int:
    """Return rank as an int. Raises ValueError or TypeError unless the weights are matrices that can go together."""
    if len(names) != len(weights):
        raise ValueError(f"{len(names)} names for {len(weights)} weights")
    for name, weight in zip(names, weights, strict=True):
        checks.check_weight(name, weight)
        for what in ("shape", "dtype", "device"):
            mine, first = getattr(weight, what), getattr(weights[0], what)
            if mine != first:
                raise ValueError(f"a batch must agree in {what}: {name} has {mine}, {names[0]} has {first}")
    return checks.check_rank(rank, *weights[0].shape) if weights else rank
