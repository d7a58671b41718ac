"""A batch in which each row has an adapter of its own, beside the one of the layer, in one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from loftq_kernels.formats import qlora_linear
from loftq_kernels.nn.base import QuantLoRAModule
from loftq_kernels.nn.kept import kept
from loftq_kernels.nn.stacking import Factors, concatenated


def product_of_rows(layer: QuantLoRAModule, x: Tensor, adapters: Sequence[Factors], rows: Sequence[int]) -> Tensor:
    """``layer(x)`` with adapters[rows[i]] for x[i], or the layer alone where that is -1; for inference only.

    x [len(rows), ..., in], rows of numbers below len(adapters). What the adapters become for the op is kept between
    calls until one of them changes. Raises RuntimeError where a gradient would be needed.
    """
    own = layer.low_rank()
    sources = [factor for term in (*adapters, *([own] if own else [])) for factor in term[:2]]
    settings = tuple(term.scaling for term in (*adapters, *([own] if own else [])))
    if not sources:
        return layer(x)
    lora_A, lora_B = kept(layer, "rows", sources, lambda: _slots(own, adapters), settings=settings)
    ids = torch.tensor(rows, device=x.device) + (own is not None)  # slot 0 is the layer's own adapter alone
    ids = ids.view(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1]) if x.dim() > 1 else ids
    return qlora_linear(x, layer.packed, lora_A, lora_B, bias=layer.bias, adapter_ids=ids)


def _slots(own: Factors | None, adapters: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """lora_A [S, r, in] and lora_B [S, out, r]: the layer's own adapter, then it with each of the others; padded."""
    slots = [concatenated([term]) if own is None else concatenated([own, term]) for term in adapters]
    slots = slots if own is None else [concatenated([own]), *slots]
    rank = max(slot.lora_A.shape[0] for slot in slots)
    lora_A = torch.stack([pad(slot.lora_A, (0, 0, 0, rank - slot.lora_A.shape[0])) for slot in slots])
    lora_B = torch.stack([pad(slot.lora_B, (0, rank - slot.lora_B.shape[1])) for slot in slots])
    return lora_A, lora_B
