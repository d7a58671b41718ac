"""Which tokens an attention mask leaves out, and where they are in a layer's input."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def token_mask(mask: Any, name: str) -> Tensor | None:
    """bool [batch, tokens], False for padding; None where there is none, or no mask of at least two dimensions.

    A mask [batch, tokens] holds 0 for padding, or is what attention adds to its scores: 0 for tokens and negative
    numbers for padding. In one [batch, ..., tokens] of more dimensions, such as [batch, 1, queries, tokens], padding is
    what no query attends to. Raises ValueError for a mask with numbers of both signs.
    """
    if not isinstance(mask, Tensor) or mask.dim() < 2 or mask.numel() == 0:
        return None
    allowed = _allowed(mask, name)
    allowed = allowed if allowed.dim() == 2 else allowed.flatten(1, -2).any(1)
    return None if allowed.all() else allowed


def _allowed(mask: Tensor, name: str) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    low, high = (bound.item() for bound in mask.aminmax())
    if low < 0 < high:
        raise ValueError(
            f"{name} holds numbers from {low:g} to {high:g}: of a mask either 0 means padding, or negative numbers do"
        )
    added = low < 0 or (high == 0 and mask.is_floating_point())  # to the scores
    return mask == 0 if added else mask != 0


def token_axes(shape: torch.Size, tokens: torch.Size, tokens_first: bool = False) -> tuple[int, ...] | None:
    """Where an input [*shape, K] has the axes of tokens [batch, tokens]; () if they are one axis, None if nowhere.

    Known are [batch, tokens, K] with other axes before or after tokens (attention heads), [tokens, batch, K] and
    [batch * tokens, K]. Where batch and tokens are equal, ``tokens_first`` tells.
    """
    batch, length = tokens
    if tokens_first and shape == (length, batch):
        return (1, 0)
    if len(shape) >= 2 and shape[0] == batch and length in shape[1:]:
        return (0, shape.index(length, 1))
    if shape == (length, batch):
        return (1, 0)
    return () if shape == (math.prod(tokens),) else None


def spread(mask: Tensor, shape: torch.Size, axes: tuple[int, ...]) -> Tensor:
    """A mask [batch, tokens] for each row of an input [*shape, K], as bool [rows]."""
    if axes == ():
        return mask.flatten()
    if axes == (1, 0):
        return mask.T.flatten()
    sizes = [1] * len(shape)
    sizes[0], sizes[axes[1]] = mask.shape
    return mask.reshape(sizes).expand(shape).flatten()
