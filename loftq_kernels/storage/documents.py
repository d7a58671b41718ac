"""JSON documents that the package writes: one reader, which checks size, syntax and version before anything else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loftq_kernels.storage.files import replacing

_IN_JSON = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
MOST_BYTES = 64 << 20  # Far above any real document: refuses to read something else that carries its name.


def read(path: str | Path, version_key: str, version: int, *, missing: str = "does not exist") -> dict[str, Any]:
    """The JSON object in a file, without its version.

    Raises FileNotFoundError (``missing`` ends the message), or ValueError naming the file and what is wrong with it.
    """
    text = _text(Path(path), missing)
    try:
        return parse(text, version_key, version)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_foreign(path: str | Path, *, missing: str = "does not exist") -> dict[str, Any]:
    """The JSON object in a file of another package, which has no version. Raises as `read`."""
    text = _text(Path(path), missing)
    try:
        values = _values(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected an object, got {type(values).__name__}")
    return values


def _text(path: Path, missing: str) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} {missing}")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than any such document")
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _values(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is not JSON (truncated or corrupted?): {error}") from error


def parse(text: str | bytes | None, version_key: str, version: int) -> dict[str, Any]:
    """The JSON object in a text, without its version. Raises ValueError for anything else."""
    if text is None:
        raise ValueError(f"it has no {version_key}")
    values = _values(text)
    stored = values.pop(version_key, None) if isinstance(values, dict) else None
    if type(stored) is not int or stored != version:
        raise ValueError(f"{version_key} is {stored!r}, this version reads {version}")
    return values


def as_json(values: Any) -> Any:
    """values as they come back from a file: tuples as lists, keys as strings."""
    return json.loads(json.dumps(values))


def check_keys(values: Any, needed: Mapping[str, type] | dict[str, type], optional: Mapping[str, type] | None = None):
    """values, if it is an object that has the needed keys, perhaps the optional ones and no others, of these types.

    Raises ValueError that names the key. The type ``object`` stands for any value.
    """
    optional = optional or {}
    known = {**needed, **optional}
    if not isinstance(values, dict) or not needed.keys() <= values.keys() <= known.keys():
        found = sorted(values) if isinstance(values, dict) else values
        raise ValueError(f"expected the keys {sorted(known)}, got {found!r}")
    for name, value in values.items():
        if not isinstance(value, known[name]) or (isinstance(value, bool) and known[name] not in (bool, object)):
            raise ValueError(f"{name} must be {_IN_JSON.get(known[name], known[name].__name__)}, got {value!r}")
    return values


def write(path: str | Path, version_key: str, version: int, values: Mapping[str, Any], *, indent: int | None = None):
    """Write an object with its version; a file that was there stays as it was if that fails."""
    write_text(path, json.dumps({version_key: version, **values}, indent=indent))


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
