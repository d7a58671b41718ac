"""`QuantConfig`: what a model gets, that is what each of its matrices gets (`LayerConfig`) and which of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from loftq_kernels import arguments
from loftq_kernels.initializers.config import LayerConfig, from_json, layer_fields
from loftq_kernels.nn.kinds import LAYER_TYPES
from loftq_kernels.nn.names import matches, names_whole

DENSE = "dense"  # in the place of a format: leaves the layers of an override as they are
HEAD_NAMES = ("lm_head", "*.lm_head")  # output heads by name, in models that do not tell theirs


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    """A lone pattern or several of them, as a tuple of valid ones."""
    if not isinstance(value, str | Iterable) or isinstance(value, bytes | Mapping):
        raise TypeError(f"{name} must be a pattern or a tuple of them, got {value!r}")
    patterns = (value,) if isinstance(value, str) else tuple(value)
    for pattern in patterns:
        _check_pattern(name, pattern)
    return patterns


def _check_pattern(name: str, pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"{name} must hold strings, got {pattern!r}")
    try:
        matches("", pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error


def _changes_of(pattern: str, value: Any) -> Mapping[str, Any] | None:
    """An override as changed fields, or None to leave the layers dense, of any form that it may be written in."""
    if value is None or (isinstance(value, str) and value == DENSE):
        return None
    if isinstance(value, str):
        return {"format": value}
    if type(value) is LayerConfig:  # A QuantConfig has patterns of its own, which would have no effect.
        return {f.name: getattr(value, f.name) for f in layer_fields()}
    if not isinstance(value, Mapping):
        raise TypeError(
            f"override {pattern!r} must be a format, a dict of changed fields, a LayerConfig, None or {DENSE!r}, "
            f"got {value!r}"
        )
    return value


def _no_change(self, *args, **kwargs):
    raise TypeError("a QuantConfig cannot be changed: make another, dataclasses.replace(cfg, overrides=...)")


class _Fixed(dict):
    """A dict that stays as it is, so that a config's hash does."""

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _no_change

    def __reduce__(self):
        return _Fixed, (dict(self),)


@dataclass(frozen=True)
class QuantConfig(LayerConfig):
    """What `quantize_model` and `QuantLoRALinear.from_linear` do: the fields of `LayerConfig`, and which layers.

    Attributes:
        format .. seed: as for `LayerConfig`, for every layer that no override changes.
        include, exclude: patterns of layer names (`nn.Module.named_modules`): a glob matched against the whole name, in
            which ``*`` crosses dots, or "re:" and a regular expression that must match the whole name. A layer is
            quantized when it matches some of ``include`` and none of ``exclude``. A pattern that matches no layer of
            the model is an error.
        overrides: pattern -> what the layers get instead: the name of a format, changed fields of `LayerConfig` (a
            dict), a whole `LayerConfig`, or None or "dense" to leave the layers dense. They are kept as dicts and None.
            The first match wins. With another init or adapter in it, order and rank_energy go back to their defaults
            where they are for others.
        layer_types: which kinds of layers are quantized, of `LAYER_TYPES`. Linear layers alone by default, as LoftQ,
            QLoRA and bitsandbytes do: embeddings are read a few rows at a time and often tied to the head, and
            convolutions are a small part of most language models.
        modules_to_save: names or patterns of modules that stay dense and are trained in full, as PEFT calls them: a
            fresh classification head, say. A name also stands for modules whose own names end with it. Their
            parameters keep requires_grad=True, and come back trainable from a file.
        quantize_head: also quantize the output head: the model's ``get_output_embeddings()``, or layers named lm_head.
            It stays dense by default, whatever ``exclude`` says: its error goes straight into the logits. A head that
            is tied to the embedding gets a packed weight of its own, and ``config.tie_word_embeddings`` becomes False;
            the embedding stays dense, or is quantized for itself where ``layer_types`` says so.

    Hashable, and JSON by `to_dict` and `from_dict`. Raises ValueError or TypeError, with the value, for fields out of
    range.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, Any] | LayerConfig | str | None] = field(default_factory=dict)
    layer_types: tuple[str, ...] = ("linear",)
    modules_to_save: tuple[str, ...] = ()
    quantize_head: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("include", "exclude", "modules_to_save"):
            self._set(**{name: _patterns(name, getattr(self, name))})
        self._set(quantize_head=arguments.flag("quantize_head", self.quantize_head))
        kinds = self.layer_types
        kinds = tuple(kinds) if isinstance(kinds, Iterable) and not isinstance(kinds, str) else (kinds,)
        if not kinds or any(kind not in LAYER_TYPES for kind in kinds):
            raise ValueError(f"layer_types={self.layer_types!r} must hold some of {LAYER_TYPES}")
        self._set(layer_types=kinds)
        if not isinstance(self.overrides, Mapping):
            raise TypeError(f"overrides must map patterns to formats or changed fields, got {self.overrides!r}")
        overrides = {pattern: self._checked(pattern, own) for pattern, own in self.overrides.items()}
        self._set(overrides=_Fixed(overrides))

    def _checked(self, pattern: Any, changes: Any) -> _Fixed | None:
        """A copy of an override's changes, their values as `LayerConfig` keeps them."""
        _check_pattern("overrides", pattern)
        changes = _changes_of(pattern, changes)
        if changes is None:
            return None
        changed = self._overridden(pattern, changes)
        return _Fixed({name: getattr(changed, name) for name in changes})

    def _key(self) -> tuple:
        """What makes two configs equal: overrides in their order too, for the first match wins."""
        overrides = ((p, None if own is None else frozenset(own.items())) for p, own in self.overrides.items())
        return *(getattr(self, f.name) for f in fields(self) if f.name != "overrides"), tuple(overrides)

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    @property
    def layer(self) -> LayerConfig:
        """What a layer gets that no override changes."""
        return LayerConfig(**{f.name: getattr(self, f.name) for f in layer_fields()})

    def _overridden(self, pattern: str, changes: Mapping[str, Any]) -> LayerConfig:
        known = {f.name for f in layer_fields()}
        if unknown := sorted(map(str, set(changes) - known)):
            raise ValueError(f"override {pattern!r} sets {', '.join(unknown)}; it can set {', '.join(sorted(known))}")
        return self.layer.changed(changes)

    def selects(self, *names: str) -> bool:
        """Whether ``include`` and ``exclude`` let the layer be quantized that has these names, usually one."""
        return _any_match(names, self.include) and not _any_match(names, self.exclude)

    def saves(self, *names: str) -> bool:
        """Whether ``modules_to_save`` names the module with these names, or one that it is part of."""
        return any(names_whole(name, self.modules_to_save) for name in names)

    def for_layer(self, *names: str) -> LayerConfig | None:
        """What the layer with these names gets, by the first override that matches one; None leaves it dense."""
        for pattern, changes in self.overrides.items():
            if _any_match(names, (pattern,)):
                return None if changes is None else self._overridden(pattern, changes)
        return self.layer

    def patterns(self) -> Iterator[tuple[str, str]]:
        """(field, pattern) of every pattern that somebody wrote: those of ``include`` only where it is not all."""
        for name in ("include", "exclude", "overrides", "modules_to_save"):
            for pattern in getattr(self, name):
                if (name, pattern) != ("include", "*"):
                    yield name, pattern

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """What `to_dict` gave, perhaps with fields left out. Raises ValueError for unknown ones."""
        overrides = values.get("overrides", {}) if isinstance(values, Mapping) else None
        if isinstance(overrides, Mapping):
            own = {p: from_json(own) if isinstance(own, Mapping) else own for p, own in overrides.items()}
            values = {**values, "overrides": own}
        return super().from_dict(values)


def _any_match(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(matches(name, pattern) for pattern in patterns for name in names)
