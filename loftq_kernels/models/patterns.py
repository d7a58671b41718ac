"""Every pattern that somebody wrote must match a layer: errors with near names for those that do not."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable

from torch import nn

from loftq_kernels.models.config import QuantConfig
from loftq_kernels.nn.kinds import kind_of
from loftq_kernels.nn.names import matches, names_module
from loftq_kernels.nn.wrappers import named_modules

_NEAR = 3


def check_patterns(model: nn.Module, cfg: QuantConfig) -> None:
    """Raise ValueError for a pattern of cfg that matches no module of the model, naming similar ones.

    So does one of ``include``, ``exclude`` or ``overrides`` that matches nothing but modules with layers inside.
    """
    modules = dict(named_modules(model, remove_duplicate=False))
    names = [name for name in modules if name]
    layers = {name for name, module in modules.items() if kind_of(module) is not None}
    around = {whole for name in layers for whole in _holders(name)} - layers
    for field, pattern in cfg.patterns():
        matching = names_module if field == "modules_to_save" else matches
        found = [name for name in names if matching(name, pattern)]
        if not found:
            raise ValueError(f"{field}: the pattern {pattern!r} matches no module of the model{_hint(pattern, names)}")
        if field != "modules_to_save" and around.issuperset(found):
            raise ValueError(
                f"{field}: the pattern {pattern!r} matches {found[0]!r}, which is no layer but has layers inside, and "
                f"patterns are held against the layers' whole names: write {_inside(pattern)!r} for these"
            )


def _holders(name: str) -> Iterable[str]:
    """Names of the modules that a module is inside of."""
    return itertools.accumulate(name.split(".")[:-1], "{}.{}".format)


def _inside(pattern: str) -> str:
    """The pattern of what is inside the modules that a pattern matches."""
    return f"re:(?:{pattern[3:]})\\..*" if pattern.startswith("re:") else f"{pattern}.*"


def _hint(pattern: str, names: list[str]) -> str:
    """What a mistyped pattern may mean: names that end with it, or similar ones, by themselves or their last part."""
    if any(matches(name, f"*.{pattern}") for name in names):
        return f": patterns are held against whole names, write {f'*.{pattern}'!r}"
    text = pattern.removeprefix("re:").strip("*.^$")
    by_last = {name.rpartition(".")[2]: name for name in reversed(names)}
    near = difflib.get_close_matches(text, names, _NEAR)
    parts = difflib.get_close_matches(text.rpartition(".")[2], by_last, _NEAR)
    near += [by_last[part] for part in parts if by_last[part] not in near]
    listed = ", ".join(map(repr, (near or names)[: _NEAR if near else 5]))
    return f"; near: {listed}" if near else f"; it has {listed}, ..."
