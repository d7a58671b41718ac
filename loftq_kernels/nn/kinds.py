"""`LayerKind`: what a kind of layer is, in one record each. The one place that tells kinds of layers apart.

A new kind is a module class (a `QuantLoRAModule`) and one entry in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loftq_kernels.initializers import AdapterInit
from loftq_kernels.nn.base import QuantLoRAModule
from loftq_kernels.nn.conv import QuantLoRAConv1d, QuantLoRAConv2d
from loftq_kernels.nn.embedding import QuantLoRAEmbedding, unsupported
from loftq_kernels.nn.linear import QuantLoRALinear
from loftq_kernels.vocabulary import LAYER_TYPES as LAYER_TYPES

Blank = Callable[..., QuantLoRAModule]
# Subclasses that compute what their base does: Falcon's adds the bias of nn.Linear in a second step.
_PLAIN_SUBCLASSES = {("transformers.models.falcon.modeling_falcon", "FalconLinear")}


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer.

    Attributes:
        name: in checkpoints.
        layer_type: which entry of ``QuantConfig.layer_types`` asks for it.
        owns: whether a dense module is of this kind, quantizable or not.
        why_not: why such a module cannot be quantized, by its class or options; None where it can.
        layer: the class of its quantized layers; None where there is none.
        matrix: of a dense weight, the matrix [out_features, in_features] that is quantized.
        place: (dense module, initializer's result, adapter_dtype) -> the quantized layer that takes its place.
        blank: (rows, columns, bias, geometry, ``**options``) -> a layer of zeros, to be filled from a file.
        observed: whether calibration observes its inputs as rows [tokens, in_features].
        arity: a dense module of this kind is made from so many ones, which shows what such modules have by themselves.
        dims: of a dense module's weight.
    """

    name: str
    layer_type: str
    owns: Callable[[nn.Module], bool]
    why_not: Callable[[nn.Module], str | None]
    layer: type[QuantLoRAModule] | None
    matrix: Callable[[Tensor], Tensor]
    place: Callable[[nn.Module, AdapterInit, torch.dtype | None], QuantLoRAModule] | None = None
    blank: Blank | None = None
    observed: bool = False
    arity: int = 2
    dims: int = 2

    def matrix_of(self, module: nn.Module) -> Tensor:
        """The matrix [out_features, in_features] of a dense module's weight, detached."""
        return self.matrix(module.weight.detach())

    def geometry_of(self, module: nn.Module) -> dict[str, Any]:
        """What a dense or quantized layer is made from beside the shape of its matrix, as JSON values."""
        values = {name: getattr(module, name) for name in self.layer.geometry_names}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def adapters(self) -> tuple[str, ...]:
        """Kinds of adapters that its layers can have."""
        return () if self.layer is None else self.layer.adapters


def is_conv1d(module: nn.Module) -> bool:
    """Whether module is transformers' Conv1D: y = x @ weight + bias with weight [in, out]; imports nothing."""
    return _is_conv1d_class(type(module))


def _is_conv1d_class(cls: type) -> bool:
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def _isinstance(base: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: isinstance(module, base)


def _no_subclass(base: type[nn.Module], also: Callable[[nn.Module], str | None] = lambda _: None):
    """Refuses subclasses, which may read their weight directly, and what ``also`` gives a reason for."""

    def why_not(module: nn.Module) -> str | None:
        cls = type(module)
        if cls is not base and (cls.__module__, cls.__name__) not in _PLAIN_SUBCLASSES:
            return f"is a {cls.__name__}, a subclass of nn.{base.__name__} that may read its weight directly"
        reason = also(module)
        return None if reason is None else f"has {reason}"

    return why_not


def _linear(module: nn.Module, init: AdapterInit, adapter_dtype: torch.dtype | None) -> QuantLoRALinear:
    return QuantLoRALinear.from_init(init, module.bias, dtype=module.weight.dtype, adapter_dtype=adapter_dtype)


def _blank_linear(rows: int, columns: int, bias: bool, geometry: Mapping, **options) -> QuantLoRALinear:
    return QuantLoRALinear(columns, rows, bias, **options)


def _embedding(module: nn.Module, init: AdapterInit, adapter_dtype: torch.dtype | None) -> QuantLoRAEmbedding:
    dtype = module.weight.dtype
    return QuantLoRAEmbedding.from_init(init, module.padding_idx, dtype=dtype, adapter_dtype=adapter_dtype)


def _blank_embedding(rows: int, columns: int, bias: bool, geometry: Mapping, **options) -> QuantLoRAEmbedding:
    return QuantLoRAEmbedding(rows, columns, **geometry, **_of_lora(options))


def _of_lora(options: dict[str, Any]) -> dict[str, Any]:
    """Options of layers that have ordinary adapters alone, without those that say so."""
    return {name: value for name, value in options.items() if name not in ("adapter", "offset")}


def _conv_kind(name: str, dense: type[nn.Module], layer: type[QuantLoRAModule], dims: int) -> LayerKind:
    return LayerKind(
        name=name,
        layer_type="conv",
        owns=lambda module: type(module) is dense,
        why_not=lambda module: None,
        layer=layer,
        matrix=lambda weight: weight.flatten(1),
        place=lambda module, init, adapter_dtype: layer.from_init(init, module, adapter_dtype=adapter_dtype),
        blank=lambda rows, columns, bias, geometry, **options: layer(**geometry, bias=bias, **_of_lora(options)),
        arity=3,
        dims=dims,
    )


_LINEAR = LayerKind(
    name="linear",
    layer_type="linear",
    owns=_isinstance(nn.Linear),
    why_not=_no_subclass(nn.Linear),
    layer=QuantLoRALinear,
    matrix=lambda weight: weight,
    place=_linear,
    blank=_blank_linear,
    observed=True,
)
_TRANSPOSED_LINEAR = LayerKind(  # transformers' Conv1D; once quantized it is a linear layer like any other
    name="linear",
    layer_type="linear",
    owns=lambda module: any(map(_is_conv1d_class, type(module).__mro__)),
    why_not=lambda m: None if is_conv1d(m) else f"is a {type(m).__name__}, which may read its weight directly",
    layer=QuantLoRALinear,
    matrix=lambda weight: weight.T,
    place=_linear,
    blank=_blank_linear,
    observed=True,
)
_EMBEDDING = LayerKind(
    name="embedding",
    layer_type="embedding",
    owns=_isinstance(nn.Embedding),
    why_not=_no_subclass(nn.Embedding, unsupported),
    layer=QuantLoRAEmbedding,
    matrix=lambda weight: weight,
    place=_embedding,
    blank=_blank_embedding,
)
_OTHER_CONVOLUTIONS = LayerKind(
    name="conv",
    layer_type="conv",
    owns=_isinstance(nn.modules.conv._ConvNd),
    why_not=lambda m: f"is a {type(m).__name__}; of convolutions, nn.Conv1d and nn.Conv2d are quantized",
    layer=None,
    matrix=lambda weight: weight.flatten(1),
)
KINDS: tuple[LayerKind, ...] = (  # the first that owns a module is its kind
    _LINEAR,
    _TRANSPOSED_LINEAR,
    _conv_kind("conv1d", nn.Conv1d, QuantLoRAConv1d, 3),
    _conv_kind("conv2d", nn.Conv2d, QuantLoRAConv2d, 4),
    _EMBEDDING,
    _OTHER_CONVOLUTIONS,
)


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a dense or quantized layer; None for all other modules."""
    if isinstance(module, QuantLoRAModule):
        return kind_named(module.kind)
    return next((kind for kind in KINDS if kind.owns(module)), None)


def kind_named(name: str) -> LayerKind:
    """The kind of that name. Raises ValueError, listing the names, for others."""
    known = {kind.name: kind for kind in reversed(KINDS) if kind.layer is not None}
    if name not in known:
        raise ValueError(f"kind {name!r} is not one of {sorted(known)}")
    return known[name]


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """[out_features, in_features] of the matrix of a dense or quantized layer."""
    if isinstance(module, QuantLoRAModule):
        return tuple(module.packed.shape)
    return tuple(kind_of(module).matrix_of(module).shape)
