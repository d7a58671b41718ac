"""`QuantConfig`: what a model gets, that is what each of its matrices gets (`LayerConfig`) and which of them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from loftq_kernels import arguments
from loftq_kernels.initializers.config import LayerConfig, from_json, layer_fields
from loftq_kernels.nn.kinds import LAYER_TYPES

_WILDCARDS = re.compile(r"[*?[]")
HEAD_NAMES = ("lm_head", "*.lm_head")  # output heads by name, in models that do not tell theirs


def matches(name: str, pattern: str) -> bool:
    """Whether a layer name matches a glob ("*" crosses dots), or wholly matches the regular expression after "re:"."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    if not _WILDCARDS.search(pattern):  # A plan has one such pattern per layer, and asks for every layer.
        return name == pattern
    return fnmatch.fnmatchcase(name, pattern)


def names_module(name: str, pattern: str) -> bool:
    """As `matches`; a pattern without wildcards also matches names that end with it, as PEFT's modules_to_save do."""
    return matches(name, pattern) or name.endswith(f".{pattern}")


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    """A lone pattern or several of them, as a tuple of valid ones."""
    if not isinstance(value, str | Iterable):
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


@dataclass(frozen=True)
class QuantConfig(LayerConfig):
    """What `quantize_model` and `QuantLoRALinear.from_linear` do: the fields of `LayerConfig`, and which layers.

    Attributes:
        format .. seed: as for `LayerConfig`, for every layer that no override changes.
        include, exclude: patterns of layer names (`nn.Module.named_modules`): a glob matched against the whole name, in
            which ``*`` crosses dots, or "re:" and a regular expression that must match the whole name. A layer is
            quantized when it matches some of ``include`` and none of ``exclude``. A pattern that matches no layer of
            the model is an error.
        overrides: pattern -> changed fields of `LayerConfig` (a dict), or None to leave the layers dense. The first
            match wins. With another init or adapter in it, order and rank_energy go back to their defaults where they
            are for others.
        layer_types: which kinds of layers are quantized, of `LAYER_TYPES`. Linear layers alone by default, as LoftQ,
            QLoRA and bitsandbytes do: embeddings are read a few rows at a time and often tied to the head, and
            convolutions are a small part of most language models.
        modules_to_save: names or patterns of modules that stay dense and are trained in full, as PEFT calls them: a
            fresh classification head, say. A name also stands for modules whose own names end with it. Their
            parameters keep requires_grad=True, and come back trainable from a file.
        quantize_head: also quantize the output head: the model's ``get_output_embeddings()``, or layers named lm_head.
            It stays dense by default, whatever ``exclude`` says: its error goes straight into the logits.

    Hashable, and JSON by `to_dict` and `from_dict`. Raises ValueError or TypeError, with the value, for fields out of
    range.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
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
        if not kinds or set(kinds) - set(LAYER_TYPES):
            raise ValueError(f"layer_types={self.layer_types!r} must hold some of {LAYER_TYPES}")
        self._set(layer_types=kinds)
        if not isinstance(self.overrides, Mapping):
            raise TypeError(f"overrides must map patterns to changed fields or None, got {self.overrides!r}")
        self._set(overrides={pattern: self._checked(pattern, own) for pattern, own in self.overrides.items()})

    def _checked(self, pattern: Any, changes: Any) -> dict[str, Any] | None:
        """A copy of an override's changes, their values as `LayerConfig` keeps them."""
        _check_pattern("overrides", pattern)
        if changes is None:
            return None
        if not isinstance(changes, Mapping):
            raise TypeError(f"override {pattern!r} must be a dict of changed fields, or None, got {changes!r}")
        changed = self._overridden(pattern, changes)
        return {name: getattr(changed, name) for name in changes}

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
        if unknown := sorted(set(changes) - known):
            raise ValueError(f"override {pattern!r} sets {', '.join(unknown)}; it can set {', '.join(sorted(known))}")
        return self.layer.changed(changes)

    def selects(self, *names: str) -> bool:
        """Whether ``include`` and ``exclude`` let the layer be quantized that has these names, usually one."""
        return _any_match(names, self.include) and not _any_match(names, self.exclude)

    def saves(self, *names: str) -> bool:
        """Whether ``modules_to_save`` names the module with these names, or one that it is part of."""
        return any(names_module(whole, p) for p in self.modules_to_save for name in names for whole in _prefixes(name))

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
        overrides = values.get("overrides", {})
        if isinstance(overrides, Mapping):
            overrides = {p: from_json(own) if isinstance(own, Mapping) else own for p, own in overrides.items()}
        return super().from_dict({**values, "overrides": overrides})


def _any_match(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(matches(name, pattern) for pattern in patterns for name in names)


def _prefixes(name: str) -> Iterator[str]:
    """The name and those of the modules that hold it, the outermost first."""
    parts = name.split(".")
    return (".".join(parts[:i]) for i in range(1, len(parts) + 1))
