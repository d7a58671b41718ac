"""Every pattern that somebody wrote must match a layer: errors with near names for those that do not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn

from loftq_kernels.models.config import QuantConfig, matches, names_module
from loftq_kernels.nn.wrappers import named_modules

_NEAR = 3


def check_patterns(model: nn.Module, cfg: QuantConfig) -> None:
    """Raise ValueError for a pattern of cfg that matches no module that holds weights, naming similar ones."""
    names = [name for name, _ in named_modules(model, remove_duplicate=False) if name]
    holders = {
        name
        for name, module in named_modules(model, remove_duplicate=False)
        if module._parameters or not module._modules
    }
    for field, pattern in cfg.patterns():
        matching = names_module if field == "modules_to_save" else matches
        found = [name for name in names if matching(name, pattern)]
        if field != "modules_to_save":
            _check_holders(field, pattern, found, holders)
        if not found:
            raise ValueError(f"{field}: the pattern {pattern!r} matches no module of the model{_near(pattern, names)}")


def _check_holders(field: str, pattern: str, found: list[str], holders: set[str]) -> None:
    """A pattern that matches nothing but modules of modules selects nothing: patterns are held against whole names."""
    if found and not holders.intersection(found):
        inside = f"{found[0]}.*"
        raise ValueError(
            f"{field}: the pattern {pattern!r} matches {found[0]!r}, which has layers inside but no weight of its own: "
            f"write {inside!r} for these"
        )


def _near(pattern: str, names: Iterable[str]) -> str:
    """The names that a mistyped pattern may mean, by themselves or by their last part."""
    text = pattern.removeprefix("re:").strip("*.^$")
    names = list(names)
    by_last = {name.rpartition(".")[2]: name for name in reversed(names)}
    last = text.rpartition(".")[2]
    near = difflib.get_close_matches(text, names, _NEAR)
    near += [by_last[part] for part in difflib.get_close_matches(last, by_last, _NEAR) if by_last[part] not in near]
    return (
        f"; near: {', '.join(map(repr, near[:_NEAR]))}" if near else f"; it has {', '.join(map(repr, names[:5]))}, ..."
    )
