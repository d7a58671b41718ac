"""Attention of decode steps on CPUs, for any model of transformers: ``model.set_attn_implementation("loftq_sdpa")``.

PyTorch's product for grouped-query attention (``enable_gqa``) computes on a CPU one query head at a time. A decode step
has one query per head, and the heads that share keys and values can stand in the place of as many queries: the sums are
the same, and they take about a tenth of the time. Everything else goes to transformers' own "sdpa".
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "loftq_sdpa"
_OF_SDPA = ("position_bias", "cache", "softcap")  # Arguments that are left to it, or that it refuses.


def register() -> None:
    """Make the name known to transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """y = softmax(scaling * query key^T) value, as transformers' "sdpa" computes it.

    Shapes: query [B, H, M, D], key [B, G, T, D], value [B, G, T, E], H a multiple of G -> y [B, M, H, E].
    """
    batch, heads, rows, _ = query.shape
    groups = key.shape[1]
    special = attention_mask is not None or any(options.get(name) is not None for name in _OF_SDPA)
    if rows > 1 or groups == heads or special or query.device.type != "cpu":
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    packed = query.reshape(batch, groups, heads // groups, -1)
    y = scaled_dot_product_attention(packed, key, value, dropout_p=dropout, scale=scaling)
    return y.reshape(batch, rows, heads, -1), None


register()
