"""What the command line takes as a value: each function makes one of a text, or says what is wrong with it.

No torch here: dtypes stay names, which `options` makes dtypes of.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loftq_kernels import vocabulary

DENSE = "dense"
OVERRIDE_FIELDS = (*vocabulary.CANDIDATE_FIELDS, "init")


def whole_number(least: int, most: float = math.inf) -> Callable[[str], int]:
    """An integer in least .. most."""

    def parse(text: str) -> int:
        number = _number(int, text)
        if number is None or not least <= number <= most:
            limits = f"of {least} or more" if most == math.inf else f"in {least} .. {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number {limits}")
        return number

    return parse


def number(*, above: float, most: float = math.inf) -> Callable[[str], float]:
    """A finite number above one limit, and at most another."""

    def parse(text: str) -> float:
        value = _number(float, text)
        if value is None or not above < value <= most or value == math.inf:
            limits = f"above {above:g}" + (f" and at most {most:g}" if most < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text!r} is no number {limits}")
        return value

    return parse


def _number(kind: type, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        return None


def candidate(text: str) -> dict[str, Any]:
    """FORMAT[,FIELD=VALUE...]: what a layer may get."""
    return _fields(text, vocabulary.CANDIDATE_FIELDS)


def override(text: str) -> tuple[str, dict[str, Any] | str]:
    """PATTERN=FORMAT[,FIELD=VALUE...]: the pattern, and what its layers get. Patterns may hold "=" themselves."""
    for place in (i for i, letter in enumerate(text) if letter == "=" and i > 0):
        format_name = text[place + 1 :].partition(",")[0]
        if format_name in vocabulary.FORMATS:
            return text[:place], _fields(text[place + 1 :], OVERRIDE_FIELDS)
        if text[place + 1 :] == DENSE:
            return text[:place], DENSE
    pattern, equals, format_name = text.rpartition("=")
    if pattern and equals:
        raise argparse.ArgumentTypeError(f"{text!r}: {_unknown_format(format_name)}, or {DENSE} to leave the layers")
    raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=FORMAT")


def model_class(text: str) -> str:
    """MODULE:CLASS."""
    module, _, name = text.partition(":")
    if not (module and name):
        raise argparse.ArgumentTypeError(f"{text!r} is not MODULE:CLASS")
    return text


def named_folder(text: str) -> tuple[str, Path]:
    """NAME=FOLDER."""
    name, _, folder = text.partition("=")
    if not (name and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, Path(folder)


def _fields(text: str, known: Sequence[str]) -> dict[str, Any]:
    format_name, *items = text.split(",")
    if format_name not in vocabulary.FORMATS:
        raise argparse.ArgumentTypeError(_unknown_format(format_name))
    values: dict[str, Any] = {"format": format_name}
    for item in items:
        name, _, value = item.partition("=")
        if name not in known[1:]:
            raise argparse.ArgumentTypeError(f"{item!r} is not FIELD=VALUE with a FIELD of {', '.join(known[1:])}")
        try:
            values[name] = _FIELDS[name](value)
        except (KeyError, ValueError, argparse.ArgumentTypeError) as error:
            raise argparse.ArgumentTypeError(f"{value!r} is no {name}") from error
    return values


def _unknown_format(name: str) -> str:
    return f"unknown format {name!r}; known: {', '.join(vocabulary.FORMATS)}"


def _one_of(known: Sequence[Any], kind: type = str) -> Callable[[str], Any]:
    return lambda text: known[list(known).index(kind(text))]


_FIELDS: dict[str, Callable[[str], Any]] = {
    "group_size": _one_of(vocabulary.GROUP_SIZES, int),
    "rank": lambda text: whole_number(0)(text) or None,  # 0 for no adapter, as --rank
    "scale_dtype": _one_of(vocabulary.SCALE_DTYPES),
    "scale_search": {"true": True, "false": False}.__getitem__,
    "init": _one_of(tuple(vocabulary.INITIALIZERS)),
}
