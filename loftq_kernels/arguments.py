"""Checks of plain arguments, the same in every signature: whole numbers, numbers, flags and choices.

Numbers may be of NumPy's types and come back as Python's, so that what is stored prints, hashes and becomes JSON alike.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any


def whole_number(
    name: str,
    value: Any,
    least: int | None = None,
    most: int | None = None,
    *,
    note: str = "",
    error: type | None = None,
) -> int:
    """value as an int in least .. most. Raises ValueError (or ``error`` for what is no whole number) with the value.

    Booleans are no numbers. ``note`` ends the message.
    """
    number = None
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        try:
            number = operator.index(value)
        except TypeError:
            number = None
    bounds = _bounds(least, most)
    if number is None:
        raise (error or ValueError)(f"{name}={value!r} must be an integer{bounds}{note}")
    if (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(f"{name}={value!r} must be an integer{bounds}{note}")
    return number


def _bounds(least: int | None, most: int | None) -> str:
    if least is None:
        return "" if most is None else f" <= {most}"
    return f" >= {least}" if most is None else f" in {least} .. {most}"


def number(name: str, value: Any, *, above: float = -math.inf, below: float = math.inf, note: str = "") -> float:
    """value as a float (an int stays one) strictly between the bounds. Raises ValueError with the value."""
    plain = plain_number(value)
    if plain is None or not above < plain < below:
        limits = f" > {above:g}" if above > -math.inf and below == math.inf else ""
        if below < math.inf:
            limits = f" between {above:g} and {below:g}"
        raise ValueError(f"{name}={value!r} must be a finite number{limits}{note}")
    return plain


def plain_number(value: Any) -> float | int | None:
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()  # numpy.float64 is a float by inheritance, and would stay what it is.
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def flag(name: str, value: Any) -> bool:
    """value as a bool. Raises TypeError for anything but True and False."""
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def choice(name: str, value: Any, choices: Iterable[Any], what: str | None = None) -> Any:
    """value, if it is one of choices. Raises ValueError that lists them."""
    choices = tuple(choices)
    if value not in choices:
        listed = ", ".join(map(str, choices)) if what else repr(choices)
        message = f"unknown {what} {value!r}; known: {listed}" if what else f"{name}={value!r} is not one of {listed}"
        raise ValueError(message)
    return value
