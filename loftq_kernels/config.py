"""`QuantConfig`: how weights are quantized and their adapters chosen."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from loftq_kernels import packing
from loftq_kernels.formats import get_format
from loftq_kernels.initializers.aser import OUTLIER_CHANNELS, check_aser
from loftq_kernels.initializers.loftq import check_schedule
from loftq_kernels.initializers.qalora import QALORA_STARTS
from loftq_kernels.initializers.registry import initializer_names
from loftq_kernels.initializers.result import ADAPTERS
from loftq_kernels.ops.checks import check_scale_options

_WILDCARDS = re.compile(r"[*?[]")
_DEFAULT_ORDER = "quantize_first"
LAYER_TYPES = ("linear", "conv", "embedding")


def adapter_scaling(rank: int | None, lora_alpha: float | None, use_rslora: bool = False) -> float:
    """lora_alpha / rank, or lora_alpha / sqrt(rank) for rsLoRA; 1 when lora_alpha is None or there is no adapter."""
    if lora_alpha is None or rank is None:
        return 1.0
    number = isinstance(lora_alpha, int | float) and not isinstance(lora_alpha, bool)
    if not number or not 0 < lora_alpha < math.inf:
        raise ValueError(f"lora_alpha={lora_alpha!r} must be a finite number > 0, or None for scaling 1")
    return lora_alpha / (math.sqrt(rank) if use_rslora else rank)


def matches(name: str, pattern: str) -> bool:
    """Whether a layer name matches a glob ("*" crosses dots), or wholly matches the regular expression after "re:"."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    if not _WILDCARDS.search(pattern):  # a plan has one such pattern a layer, and asks for every layer
        return name == pattern
    return fnmatch.fnmatchcase(name, pattern)


def _check_pattern(pattern: str) -> None:
    try:
        matches("", pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error


@dataclass(frozen=True)
class QuantConfig:
    """What `quantize_model` and `QuantLoRALinear.from_linear` do to a layer.

    Attributes:
        format, group_size, scale_dtype, scale_search: as for `quantize`.
        rank: of the adapter; None for no adapter (round to nearest).
        lora_alpha: None means scaling 1; otherwise scaling = lora_alpha / rank, or / sqrt(rank) with ``use_rslora``.
        adapter: "lora", or "qalora" for one of group means, which merges exactly (`QuantLoRALinear.merge_adapter`); for
            linear layers alone, others are skipped with the reason.
        init: one of `initializer_names()`; of them "loftq" and "qlora" know adapter="qalora", without statistics.
        num_iter, svd, order, seed: as for `loftq_init`; order="svd_first" for init="loftq" with adapter="lora" alone.
        rank_energy, outlier_channels: as for `aser_init`; with rank_energy, for init="aser" alone, ``rank`` is the most
            that a layer may have, and scaling is still that of ``rank``.
        include, exclude: patterns of layer names (`nn.Module.named_modules`): a glob matched against the whole name, in
            which ``*`` crosses dots, or "re:" and a regular expression that must match the whole name. A layer is
            quantized when it matches some of ``include`` and none of ``exclude``.
        overrides: pattern -> changed fields (a dict), or None to leave the layers dense. The first match wins. With
            another init or adapter in it, order and rank_energy go back to their defaults where they are for others.
        layer_types: which kinds of layers are quantized, of `LAYER_TYPES`. Linear layers alone by default, as LoftQ,
            QLoRA and bitsandbytes do: embeddings are read a few rows at a time and often tied to the head, and
            convolutions are a small part of most language models.

    Raises ValueError or TypeError, with the value, for fields out of range.
    """

    format: str = "nf4"
    group_size: int = 64
    rank: int | None = 16
    lora_alpha: float | None = None
    use_rslora: bool = False
    adapter: str = "lora"
    init: str = "loftq"
    num_iter: int = 5
    svd: str = "auto"
    order: str = _DEFAULT_ORDER
    rank_energy: float | None = None
    outlier_channels: int = OUTLIER_CHANNELS
    scale_dtype: torch.dtype = torch.float16
    scale_search: bool = False
    seed: int = 0
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ("lm_head", "*.lm_head")
    overrides: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    layer_types: tuple[str, ...] = ("linear",)

    def __post_init__(self):
        get_format(self.format)
        packing.check_group_size(self.group_size)
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ValueError(f"rank={self.rank!r} must be an integer >= 1, or None for no adapter")
        adapter_scaling(self.rank or 1, self.lora_alpha, self.use_rslora)
        if self.init not in initializer_names():
            raise ValueError(f"unknown init {self.init!r}; known: {', '.join(initializer_names())}")
        if self.adapter not in ADAPTERS:
            raise ValueError(f"adapter={self.adapter!r} is not one of {ADAPTERS}")
        if self.adapter == "qalora" and self.init not in QALORA_STARTS:
            raise ValueError(f"adapter='qalora' takes init of {QALORA_STARTS}, got {self.init!r}")
        check_schedule(self.num_iter, self.order, self.svd, self.seed)
        check_aser(self.rank_energy, self.outlier_channels)
        if self.rank_energy is not None and self.init != "aser":
            raise ValueError(f"rank_energy={self.rank_energy!r} is for init='aser' alone, got init={self.init!r}")
        if self.order != _DEFAULT_ORDER and (self.init != "loftq" or self.adapter == "qalora"):
            what = "adapter='qalora'" if self.adapter == "qalora" else f"init={self.init!r}"
            raise ValueError(f"order={self.order!r} is for init='loftq' with adapter='lora' alone, got {what}")
        check_scale_options(self.scale_dtype, self.scale_search)
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if isinstance(patterns, str):  # a lone pattern, rather than its characters
                patterns = (patterns,)
            for pattern in patterns:
                if not isinstance(pattern, str):
                    raise TypeError(f"{name} must hold strings, got {pattern!r}")
            object.__setattr__(self, name, tuple(patterns))
        kinds = (self.layer_types,) if isinstance(self.layer_types, str) else tuple(self.layer_types)
        if not kinds or set(kinds) - set(LAYER_TYPES):
            raise ValueError(f"layer_types={self.layer_types!r} must hold some of {LAYER_TYPES}")
        object.__setattr__(self, "layer_types", kinds)
        for pattern in (*self.include, *self.exclude, *self.overrides):
            _check_pattern(pattern)
        for pattern, changes in self.overrides.items():
            if changes is not None:
                self._overridden(pattern, changes)

    @property
    def scaling(self) -> float:
        return adapter_scaling(self.rank, self.lora_alpha, self.use_rslora)

    @property
    def has_qalora(self) -> bool:
        """Whether layers get an adapter of group means: with rank None they get none of any kind."""
        return self.adapter == "qalora" and self.rank is not None

    def _overridden(self, pattern: str, changes: Mapping[str, Any]) -> QuantConfig:
        fields = {f.name for f in dataclasses.fields(self)} - {"include", "exclude", "overrides", "layer_types"}
        unknown = sorted(set(changes) - fields)
        if unknown:
            raise ValueError(f"override {pattern!r} sets {', '.join(unknown)}; it can set {', '.join(sorted(fields))}")
        unused = {}  # of fields that the base has for another init
        if changes.get("init", self.init) != "aser":
            unused["rank_energy"] = None
        if changes.get("init", self.init) != "loftq" or changes.get("adapter", self.adapter) == "qalora":
            unused["order"] = _DEFAULT_ORDER
        return dataclasses.replace(self, **{"overrides": {}, **unused, **changes})

    def selects(self, name: str) -> bool:
        """Whether ``include`` and ``exclude`` let the layer of that name be quantized."""
        return any(matches(name, p) for p in self.include) and not any(matches(name, p) for p in self.exclude)

    def for_layer(self, name: str) -> QuantConfig | None:
        """This config with the first matching override applied; None when that override leaves the layer dense."""
        for pattern, changes in self.overrides.items():
            if matches(name, pattern):
                return None if changes is None else self._overridden(pattern, changes)
        return self
