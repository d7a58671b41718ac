"""`LayerConfig`: what one matrix gets, and the table of methods that choose it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loftq_kernels import arguments, vocabulary
from loftq_kernels.formats import get_format
from loftq_kernels.initializers.options import check_schedule
from loftq_kernels.initializers.result import ADAPTERS, AdapterInit
from loftq_kernels.ops.checks import DTYPES_BY_NAME, check_scale_options
from loftq_kernels.storage import packing

# Fields that a method must name among its options, and the values that mean "not used".
METHOD_OPTIONS: Mapping[str, Any] = {"order": "quantize_first", "rank_energy": None}
OUTLIER_CHANNELS = 32  # ASER's f, at rank 64


@dataclass(frozen=True)
class Method:
    """One way to choose codes and adapter: what `register` takes. A new one is one file and one entry in `registry`.

    Attributes:
        name: what ``init=`` calls it.
        runs: kind of adapter -> function of (weights, cfg, statistics=, device=, progress=, names=) that returns an
            `AdapterInit` for each of the same-shape weights.
        needs_statistics, takes_statistics: whether the method requires `InputStatistics` of the layers' inputs, and
            whether it uses them when they are given; for ordinary adapters only.
        options: the fields of `METHOD_OPTIONS` that the method uses (with an ordinary adapter).
    """

    name: str
    runs: Mapping[str, Callable[..., list[AdapterInit]]]
    needs_statistics: bool = False
    takes_statistics: bool = False
    options: tuple[str, ...] = ()


_METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Make a method known as ``init=method.name``. Raises ValueError for a name that `vocabulary` does not explain."""
    arguments.choice("method", method.name, vocabulary.INITIALIZERS)
    _METHODS[method.name] = method


def initializer_names() -> tuple[str, ...]:
    """The names that ``QuantConfig(init=...)`` accepts."""
    return tuple(_METHODS)


def adapter_scaling(rank: int | None, lora_alpha: float | None, use_rslora: bool = False) -> float:
    """lora_alpha / rank, or lora_alpha / sqrt(rank) for rsLoRA; 1 when lora_alpha is None or there is no adapter."""
    if lora_alpha is None or rank is None:
        return 1.0
    lora_alpha = arguments.number("lora_alpha", lora_alpha, above=0, note=", or None for scaling 1")
    return lora_alpha / (math.sqrt(rank) if use_rslora else rank)


@dataclass(frozen=True)
class LayerConfig:
    """What one matrix gets: a format, an adapter, and how both are chosen. Hashable; `to_dict` gives JSON values.

    Attributes:
        format, group_size, scale_dtype, scale_search: as for `quantize`.
        rank: of the adapter; None for no adapter (round to nearest).
        lora_alpha: None means scaling 1; otherwise scaling = lora_alpha / rank, or / sqrt(rank) with ``use_rslora``.
        adapter: "lora", or "qalora" for one of group means, which merges exactly (`QuantLoRALinear.merge_adapter`).
            Only linear layers can have the latter: others are skipped, with the reason.
        adapter_dtype: of lora_A and lora_B. None means the dtype of the layer, but float32 in float16 and bfloat16
            layers, as in PEFT: the 8 significant bits of a bfloat16 would lose training steps of 1e-5.
        init: one of `initializer_names()`. Only "loftq" and "qlora" support adapter="qalora", without statistics.
        num_iter, svd, order: as for `loftq_init`; order="svd_first" only with init="loftq" and adapter="lora".
        seed: of everything random; what a layer draws (lora_A of init="qlora") follows from it and the layer's name.
        rank_energy, outlier_channels: as for `aser_init`. rank_energy is only for init="aser": ``rank`` is then the
            largest rank that a layer may have, and scaling is still computed from ``rank``.

    Raises ValueError or TypeError, with the value, for fields out of range.
    """

    format: str = "nf4"
    group_size: int = 64
    rank: int | None = 16
    lora_alpha: float | None = None
    use_rslora: bool = False
    adapter: str = "lora"
    adapter_dtype: torch.dtype | None = None
    init: str = "loftq"
    num_iter: int = 5
    svd: str = "auto"
    order: str = METHOD_OPTIONS["order"]
    rank_energy: float | None = None
    outlier_channels: int = OUTLIER_CHANNELS
    scale_dtype: torch.dtype = torch.float16
    scale_search: bool = False
    seed: int = 0

    def __post_init__(self):
        self._set(format=get_format(self.format).name)
        self._set(group_size=packing.check_group_size(self.group_size))
        if self.rank is not None:
            self._set(rank=arguments.whole_number("rank", self.rank, 1, note=", or None for no adapter"))
        self._set(use_rslora=arguments.flag("use_rslora", self.use_rslora))
        adapter_scaling(self.rank or 1, self.lora_alpha, self.use_rslora)
        if self.lora_alpha is not None:
            self._set(lora_alpha=arguments.plain_number(self.lora_alpha))
        num_iter, seed = check_schedule(self.num_iter, self.order, self.svd, self.seed)
        outlier_channels = arguments.whole_number("outlier_channels", self.outlier_channels, 0, error=TypeError)
        self._set(num_iter=num_iter, seed=seed, outlier_channels=outlier_channels)
        self._set(rank_energy=check_rank_energy(self.rank_energy))
        check_scale_options(self.scale_dtype, self.scale_search)
        self._set(scale_search=arguments.flag("scale_search", self.scale_search))
        if self.adapter_dtype is not None and self.adapter_dtype not in DTYPES_BY_NAME.values():
            raise ValueError(f"adapter_dtype={self.adapter_dtype!r} is not one of {tuple(DTYPES_BY_NAME.values())}")
        self._check_method()

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_method(self) -> None:
        arguments.choice("init", self.init, _METHODS, "init")
        arguments.choice("adapter", self.adapter, ADAPTERS)
        if self.adapter not in self.method.runs:
            starts = tuple(method.name for method in _METHODS.values() if self.adapter in method.runs)
            raise ValueError(f"adapter={self.adapter!r} takes init of {starts}, got {self.init!r}")
        for name, unused in METHOD_OPTIONS.items():
            if getattr(self, name) != unused and not self._honours(name):
                methods = [method for method in _METHODS.values() if name in method.options]
                owners = " or ".join(f"init={method.name!r}" for method in methods)
                if any(len(method.runs) > 1 for method in methods):
                    owners += " with adapter='lora'"
                got = f"init={self.init!r}" if self.adapter == "lora" else f"adapter={self.adapter!r}"
                raise ValueError(f"{name}={getattr(self, name)!r} is for {owners} alone, got {got}")

    def _honours(self, option: str) -> bool:
        return option in self.method.options and self.adapter == "lora"

    @property
    def method(self) -> Method:
        """The method that ``init`` names."""
        return _METHODS[self.init]

    @property
    def scaling(self) -> float:
        return adapter_scaling(self.rank, self.lora_alpha, self.use_rslora)

    @property
    def has_qalora(self) -> bool:
        """Whether layers get an adapter of group means. With rank None they get no adapter."""
        return self.adapter == "qalora" and self.rank is not None

    @property
    def takes_statistics(self) -> bool:
        """Whether a layer with this config is initialized differently when its input has statistics."""
        return self.rank is not None and self.adapter == "lora" and self.method.takes_statistics

    @property
    def needs_statistics(self) -> bool:
        """Whether a layer with this config cannot be initialized without statistics of its input."""
        return self.takes_statistics and self.method.needs_statistics

    def adapter_dtype_of(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of lora_A and lora_B in a layer of that dtype."""
        return default_adapter_dtype(dtype) if self.adapter_dtype is None else self.adapter_dtype

    def changed(self, changes: Mapping[str, Any]) -> LayerConfig:
        """This config with some fields changed. Options that the new method does not use are reset."""
        draft = {**{f.name: getattr(self, f.name) for f in layer_fields()}, **changes}
        method = _METHODS[arguments.choice("init", draft["init"], _METHODS, "init")]
        for name, unused in METHOD_OPTIONS.items():
            if name not in changes and (name not in method.options or draft["adapter"] != "lora"):
                draft[name] = unused
        return LayerConfig(**draft)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {f.name: to_json(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerConfig:
        """The config that `to_dict` described; fields may be left out. Raises ValueError for unknown ones,
        TypeError for what is no mapping."""
        if not isinstance(values, Mapping):
            raise TypeError(f"{cls.__name__}.from_dict takes a mapping of fields to values, got {values!r}")
        unknown = sorted(map(str, set(values) - {f.name for f in dataclasses.fields(cls)}))
        if unknown:
            raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}")
        return cls(**from_json(values))


def layer_fields() -> tuple[dataclasses.Field, ...]:
    """The fields of a `LayerConfig`: what an override may change."""
    return dataclasses.fields(LayerConfig)


def default_adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """PEFT's default: float32 for adapters of float16 and bfloat16 layers, the layer's own dtype for others."""
    return torch.promote_types(dtype, torch.float32)


def check_rank_energy(rank_energy: float | None) -> float | None:
    """rank_energy as a plain number. Raises ValueError unless it is a share in (0, 1], or None."""
    if rank_energy is None:
        return None
    plain = arguments.plain_number(rank_energy)
    if plain is None or not 0 < plain <= 1:
        raise ValueError(f"rank_energy={rank_energy!r} must be in (0, 1], or None for a fixed rank")
    return plain


def to_json(value: Any) -> Any:
    """A field's value as JSON has it: dtypes by name, tuples as lists."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {key: to_json(own) for key, own in value.items()}
    return [to_json(own) for own in value] if isinstance(value, tuple | list) else value


def from_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as `to_json` gave them, dtypes and tuples restored."""
    restored = {}
    for name, value in values.items():
        if isinstance(value, str) and str(name).endswith("_dtype"):
            value = DTYPES_BY_NAME.get(value, value)
        restored[name] = tuple(value) if isinstance(value, list) else value
    return restored
