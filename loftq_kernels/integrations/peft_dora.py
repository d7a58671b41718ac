"""DoRA on a quantized layer: y = m / ||W + s B A|| * (x @ (W + s B A).T) + bias, with W = Q + s0 B0 A0.

||.|| is the norm of each row, through which no gradient flows, as in PEFT (Liu et al., arXiv 2402.09353, section 4.3).
Of a row n of W, w, and of B, b, it is

    ||w + s b A||^2 = ||w||^2 + 2 s b . (A w) + s^2 b (A A^T) b^T,

where A w for all rows is the layer's product of r rows. So W is decoded for ||w|| alone, in blocks of rows, and that is
kept until the layer changes. Without gradients the whole norm is kept until the adapter changes. The norm's relative
error is that of float32 times ||w||^2 / ||w + s b A||^2.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from loftq_kernels.nn.kept import forget, kept
from loftq_kernels.nn.linear import QuantLoRALinear
from loftq_kernels.ops import dequantize_tensors

# `Linear` below is PEFT's around a `QuantLoRALinear`: a `LoraQuantizedLinear` of `peft_layers`.

_BLOCK = 1 << 22  # weights that are decoded at a time


class QuantizedDora(DoraLinearVariant):
    """PEFT's DoRA with the norms of this module; merging is PEFT's, into a dense layer."""

    @staticmethod
    def init(module: Linear, adapter_name: str, **kwargs: Any) -> None:
        layer = DoraLinearLayer(fan_in_fan_out=False)
        module.lora_magnitude_vector[adapter_name] = layer
        layer.weight = nn.Parameter(_norm(module, adapter_name))

    @staticmethod
    def forward(module: Linear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """result + (c - 1) W x' + c s B A x' with c = m / norm and x' = dropout(x).

        Without dropout W x' is result without its bias, so also the terms of adapters before this one are scaled. With
        it the base needs a product of its own, for x'.
        """
        name, base = active_adapter, module.get_base_layer()
        scale = dora_scale(module, name)
        if module._drops(name):
            x = module.lora_dropout[name](x)
            before = base.product(x, None)
        else:
            before = result if base.bias is None else result - base.bias
        term = module.lora_B[name](module.lora_A[name](x)) * module.scaling[name]
        return result + (scale - 1) * before + scale * term


def dora_scale(module: Linear, name: str) -> Tensor:
    """m / ||W + s B A|| [out], differentiable in m."""
    magnitude = module.lora_magnitude_vector[name]
    lora_A, lora_B, scaling = module.factors(name)
    if torch.is_grad_enabled() and (lora_A.requires_grad or lora_B.requires_grad):
        forget(magnitude)  # An optimizer may write to the factors without PyTorch's counting it.
        norm = _norm(module, name)
    else:
        sources = [lora_A, lora_B, *_sources(module.get_base_layer())]
        with torch.no_grad():
            settings = scaling, _own_scaling(module.get_base_layer())
            norm = kept(magnitude, "norm", sources, lambda: _norm(module, name), settings=settings)
    return magnitude.weight / norm.to(magnitude.weight.dtype)


@torch.no_grad()
def _norm(module: Linear, name: str) -> Tensor:
    """||W + s B A|| [out], in float32 at least."""
    lora_A, lora_B, scaling = module.factors(name)
    base = module.get_base_layer()
    wide = torch.promote_types(base.dtype, torch.float32)
    if lora_A.is_meta:
        return torch.empty(base.out_features, dtype=wide, device="meta")
    with torch.autocast(lora_A.device.type, enabled=False):
        lora_A, lora_B = lora_A.detach().to(wide), lora_B.detach().to(wide)
        across = base.product(lora_A, None, detach=True).mT  # [out, r] = W A^T
        squares = _kept_squares(module, base, wide)
        squares = squares + scaling * (lora_B * (2 * across + scaling * (lora_B @ (lora_A @ lora_A.mT)))).sum(1)
    return squares.clamp_min(0).sqrt()


def _kept_squares(module: Linear, base: QuantLoRALinear, dtype: torch.dtype) -> Tensor:
    sources = _sources(base)
    if any(source.requires_grad for source in sources):  # A start adapter that is trained: see `dora_scale`.
        return _squares(base, dtype)
    return kept(module, "squares", sources, lambda: _squares(base, dtype), settings=(dtype, _own_scaling(base)))


def _sources(base: QuantLoRALinear) -> list[Tensor]:
    """The tensors that W is made of."""
    own = base.low_rank()
    return [tensor for tensor in (*base.stored(), *(own[:2] if own else ())) if tensor is not None]


def _own_scaling(base: QuantLoRALinear) -> float | None:
    own = base.low_rank()
    return None if own is None else own.scaling


def _squares(base: QuantLoRALinear, dtype: torch.dtype) -> Tensor:
    """||w||^2 of each row of W [out]."""
    codes, scale, offset, codebook = base.stored()
    own = base.low_rank()
    rows = max(1, _BLOCK // base.in_features)
    squares = []
    for start in range(0, base.out_features, rows):
        block = slice(start, start + rows)
        part = None if offset is None else offset[block]
        dense = dequantize_tensors(codes[block], scale[block], part, codebook, base.in_features, base.group_size, dtype)
        if own is not None:
            dense.addmm_(own.lora_B[block].to(dtype), own.lora_A.to(dtype), alpha=own.scaling)
        squares.append(dense.square().sum(1))
    return torch.cat(squares)
