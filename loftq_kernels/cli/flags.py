"""Messages of the Python API in the words of the command line: ``init='eora'`` becomes ``--init eora``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping

_VALUE = r"'[^'\n]*'|\([^()]*\)|[\w.+-]*[\w]|"


def spelled(message: str, options: Mapping[str, argparse.Action]) -> str:
    """A message in which ``name=value``, ``name=`` and a first ``name:`` stand for the options of these names.

    What is quoted by itself, such as the name of a layer or of a candidate, stays as it is.
    """
    if not options:
        return message
    names = "|".join(map(re.escape, sorted(options, key=len, reverse=True)))
    pattern = re.compile(rf"(?<!\w)'[^'\n]*'|^(?P<first>{names}):|(?<![\w.])(?P<name>{names})=(?P<value>{_VALUE})")
    return pattern.sub(lambda found: _spelled(found, options), message)


def _spelled(found: re.Match, options: Mapping[str, argparse.Action]) -> str:
    if found["first"]:
        return f"{_flag(options[found['first']])}:"
    if found["name"] is None:
        return found[0]
    return _given(options[found["name"]], found["value"])


def _given(option: argparse.Action, value: str) -> str:
    """How an option is given, with a value as Python writes it; "" stands for any."""
    flag = _flag(option)
    if option.nargs == 0:
        return flag if value in ("True", "") else f"no {flag}"
    if value == "None":
        return f"no {flag}"
    if value.startswith("("):
        items = [_plain(item) for item in value[1:-1].split(",") if item.strip()]
        return " ".join(f"{flag} {item}" for item in items) or f"no {flag}"
    return f"{flag} {_plain(value) or option.metavar or option.dest.upper()}"


def _flag(option: argparse.Action) -> str:
    return option.option_strings[0] if option.option_strings else option.dest.upper()


def _plain(value: str) -> str:
    return value.strip().strip("'").removeprefix("torch.")
