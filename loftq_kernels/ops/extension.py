"""The compiled part, if it was built. Importing it registers the C++ kernels for CPU tensors with the dispatcher."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

LOAD_ERROR: str | None = None
try:
    _C: ModuleType | None = importlib.import_module("loftq_kernels._C")
except ImportError as error:
    _C, LOAD_ERROR = None, str(error)

HOW_TO_BUILD = "build it with: LOFTQ_REQUIRE_EXT=1 pip install --no-build-isolation -e . (needs a C++20 compiler)"
_warned: set[str] = set()


def warn_slow(device_type: str, reason: str | None = None) -> None:
    """Warn, once per device type, that the slow plain-torch reference computes the result.

    On CPUs that happens when the extension is missing; on other devices when an op has no kernel for them.
    """
    if device_type in _warned or device_type == "meta" or (device_type == "cpu" and _C is not None):
        return
    _warned.add(device_type)
    missing = f"the compiled extension is missing ({LOAD_ERROR}); {HOW_TO_BUILD}"
    reason = reason or (missing if _C is None else "there is no kernel")
    warnings.warn(
        f"loftq_kernels: {device_type} tensors are served by the slow plain-torch reference: {reason}", stacklevel=4
    )
