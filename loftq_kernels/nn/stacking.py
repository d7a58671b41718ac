"""Several adapters of one layer as one: their factors on top of each other along r, so that one product has them all.

s0 B0 A0 + s1 B1 A1 + ... = [s0 B0, s1 B1, ...] [A0; A1; ...]
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loftq_kernels.nn.kept import kept


class Factors(NamedTuple):
    """An adapter's term scaling * lora_B @ lora_A of a weight [out, in], in floating-point dtypes of any kind."""

    lora_A: Tensor  # [r, in]
    lora_B: Tensor  # [out, r]
    scaling: float


def stacked(layer: nn.Module, terms: Sequence[Factors], what: Hashable = "stacked") -> Factors | None:
    """One term that is the sum of all terms, None for none; of several it is `kept` as ``what`` until one changes."""
    if not terms:
        return None
    if len(terms) == 1:
        return terms[0]
    sources = [factor for term in terms for factor in term[:2]]
    return kept(layer, what, sources, lambda: concatenated(terms), settings=tuple(term.scaling for term in terms))


def concatenated(terms: Sequence[Factors]) -> Factors:
    """[A0; A1; ...] [sum of r, in] and [s0 B0, s1 B1, ...] [out, sum of r] in the `common_dtype`.

    Differentiable in every factor. Each lora_B is rounded once, to that dtype, when its scaling is multiplied in.
    """
    dtype = common_dtype(terms)
    lora_A = torch.cat([term.lora_A.to(dtype) for term in terms])
    lora_B = torch.cat([term.lora_B.to(dtype) * term.scaling for term in terms], dim=1)
    return Factors(lora_A, lora_B, 1.0)


def common_dtype(terms: Sequence[Factors]) -> torch.dtype:
    """The dtype that holds the values of all factors, at least float32 where a scaling is no power of two.

    Such a scaling rounds what it is multiplied with: in bfloat16 by 4e-3 of itself.
    """
    dtype = reduce(torch.promote_types, (factor.dtype for term in terms for factor in term[:2]))
    exact = all(abs(math.frexp(term.scaling)[0]) in (0.0, 0.5) for term in terms)
    return dtype if exact else torch.promote_types(dtype, torch.float32)
