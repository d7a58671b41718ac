"""The compiled part, if it was built. Importing it registers the C++ kernels for CPU tensors with the dispatcher."""

from __future__ import annotations

import importlib
import json
import re
import warnings
from pathlib import Path
from types import ModuleType

import torch

# What the build wrote beside the library: the torch that it was built with, and the versions "from" and "before" which
# it works with.
RECORD = Path(__file__).parent.parent / "_build.json"

HOW_TO_BUILD = "build it for this torch with: pip install --no-build-isolation . in the source tree (C++20 compiler)"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _why_not(record: dict[str, str | None], torch_version: str) -> str | None:
    """Why a library with this record must not be loaded: one for another torch could crash the process."""
    first, end = record["from"], record["before"]
    if _version(first) <= _version(torch_version) and (end is None or _version(torch_version) < _version(end)):
        return None
    fits = f"{first} or newer" if end is None else f"{first} to before {end}"
    return f"it was built with torch {record['torch']} and needs torch {fits}, but this is torch {torch_version}"


def _load() -> tuple[ModuleType | None, str | None]:
    """The library, or why there is none."""
    try:
        if RECORD.is_file() and (reason := _why_not(json.loads(RECORD.read_text("utf-8")), torch.__version__)):
            return None, reason
        return importlib.import_module("loftq_kernels._C"), None
    except ImportError as error:
        archive = None if RECORD.parent.is_dir() else RECORD.parents[1]
        return None, str(error) if archive is None else f"no library can be loaded from the archive {archive}"
    except (OSError, ValueError, KeyError) as error:
        return None, f"{RECORD} cannot be read: {type(error).__name__}: {error}"


_C, LOAD_ERROR = _load()
_warned: set[str] = set()


def warn_slow(device_type: str, reason: str | None = None) -> None:
    """Warn, once per device type, that the slow plain-torch reference computes the result.

    On CPUs that happens when the extension is missing; on other devices when an op has no kernel for them.
    """
    if device_type in _warned or device_type == "meta" or (device_type == "cpu" and _C is not None):
        return
    _warned.add(device_type)
    missing = f"the compiled extension did not load ({LOAD_ERROR}); {HOW_TO_BUILD}"
    reason = reason or (missing if _C is None else "there is no kernel")
    warnings.warn(
        f"loftq_kernels: {device_type} tensors are served by the slow plain-torch reference: {reason}", stacklevel=4
    )
