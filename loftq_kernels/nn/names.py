"""Patterns of module names: globs, and regular expressions after "re:"."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterable, Iterator

_WILDCARDS = re.compile(r"[*?[]")


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


def names_whole(name: str, patterns: Iterable[str]) -> bool:
    """Whether some pattern names the module (`names_module`), or one that it is part of."""
    return any(names_module(whole, pattern) for pattern in patterns for whole in _prefixes(name))


def _prefixes(name: str) -> Iterator[str]:
    """The name and those of the modules that hold it, the outermost first."""
    return itertools.accumulate(name.split("."), "{}.{}".format)
