"""LoftQ's alternation by the compiled driver; csrc/loftq/loftq.h states what it does and what memory it takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_kernels.initializers import parallel
from loftq_kernels.initializers.drivers import low_rank
from loftq_kernels.initializers.options import SolverOptions
from loftq_kernels.initializers.result import AdapterInit


def run(weights: list[Tensor], options: SolverOptions) -> list[AdapterInit]:
    """Same-shape weights [N, K] on one device through num_iter alternations, as `plain.run`."""
    codebook = options.format.codebook(weights[0].device)
    exact = options.mode == "exact"
    results = _alternate(weights, codebook, options, exact)
    inits = []
    for i, weight in enumerate(weights):
        result = results[i] if results else None
        if not exact and (result is None or not result.sound):
            (result,) = _alternate([weight], codebook, options, exact=True)
        inits.append(result.init(weight, codebook, options))
    return inits


@dataclass(frozen=True)
class _Result:
    codes: Tensor
    scale: Tensor
    offset: Tensor
    lora_A: Tensor  # without elements if scales of the first iterate did not fit their dtype, and so lora_B
    lora_B: Tensor
    numbers: Tensor  # the error, whether the factors can be trusted (0 or 1), and the error after every alternation

    @property
    def sound(self) -> bool:
        return self.numbers[1] != 0

    def init(self, weight: Tensor, codebook: Tensor, options: SolverOptions) -> AdapterInit:
        error, _, *errors = self.numbers.tolist()
        lora_A, lora_B = (self.lora_A, self.lora_B) if self.lora_A.numel() else (None, None)
        packed = options.packed(self.codes, self.scale, self.offset, codebook, weight.shape[1])
        return AdapterInit(packed, lora_A, lora_B, options.scaling, error, errors)


def _alternate(weights: list[Tensor], codebook: Tensor, options: SolverOptions, exact: bool) -> list[_Result]:
    """Results by matrix; none if the fast solver failed. Python runs between the alternations and delivers Ctrl-C."""
    ops = torch.ops.loftq_kernels
    number = ops.loftq_number()  # Nothing is kept under it yet that an exception here could leave behind.
    try:
        with _out_of_memory_by_name():
            _begin(number, weights, codebook, options, exact)
            for _ in range(options.num_iter):
                parallel.poll()
                if not ops.loftq_step(number):
                    break
            return [_Result(*tensors) for tensors in zip(*ops.loftq_results(number), strict=True)]
    finally:
        ops.loftq_end(number)


@contextlib.contextmanager
def _out_of_memory_by_name() -> Iterator[None]:
    """Raises torch.OutOfMemoryError, a RuntimeError, where an op that the driver calls has no memory.

    Its exception loses its type in torch's C interface, and keeps its text from torch 2.13 on.
    """
    try:
        yield
    except RuntimeError as error:
        if type(error) is RuntimeError and any(words in str(error) for words in _OUT_OF_MEMORY):
            raise torch.OutOfMemoryError(str(error)) from error
        raise


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # of CUDA, of CPUs, of CPUs on Windows


def _begin(number: int, weights: list[Tensor], codebook: Tensor, options: SolverOptions, exact: bool) -> None:
    long_side, short_side = max(weights[0].shape), min(weights[0].shape)
    width = min(low_rank.block_width(options.rank), short_side)
    torch.ops.loftq_kernels.loftq_begin(
        number,
        weights,
        codebook,
        low_rank.gaussian(long_side, width, options.seed, weights[0].device),
        options.rank,
        options.scaling,
        exact,
        options.order == "svd_first",
        torch.float32 if exact else _operand_dtype(weights[0].device, options),
        low_rank.COLD_STEPS,
        options.warm_steps,
        options.group_size,
        options.format.scale_rule,
        options.scale_dtype,
        options.scale_search,
    )


def _operand_dtype(device: torch.device, options: SolverOptions) -> torch.dtype:
    """Bfloat16 where the hardware multiplies it, float32 elsewhere.

    Rounding a flat residual to bfloat16 adds noise far below the residual's smallest singular value. For steep
    residuals the driver falls back on the exact solver.
    """
    if options.order == "svd_first":  # The low-rank term is then most of the weight.
        return torch.float32
    native = device.type != "cpu" or (torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if native else torch.float32
