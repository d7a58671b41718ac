"""The compiled part, if it was built. Loading it registers the C++ kernels for CPU tensors with the dispatcher.

It is a shared library and no Python module: one file serves every Python, and every torch from ``OLDEST_TORCH`` on.
"""

from __future__ import annotations

import ctypes
import json
import math
import warnings
from pathlib import Path

import torch

from loftq_kernels import threads

OLDEST_TORCH = (2, 10)  # The first one with the C interface that the library uses; csrc/aten/version.h says the same.
LIBRARY = Path(__file__).parents[1] / "libloftq_torch.so"
HOW_TO_BUILD = "build it with: pip install --no-build-isolation . in the source tree (needs a C++20 compiler)"

# What Python calls in the library, and the types that those return.
FUNCTIONS = {
    "loftq_build_info": ctypes.c_char_p,
    "loftq_cpu_isa": ctypes.c_char_p,
    "loftq_cpu_isas": ctypes.c_int,
    "loftq_load_error": ctypes.c_char_p,
    "loftq_set_thread_limit": None,
    "loftq_thread_limit": ctypes.c_int,
}


class Library:
    """What the compiled part tells about itself; its kernels are ops. Raises ImportError where it cannot be loaded."""

    def __init__(self, path: Path, torch_version: str = torch.__version__):
        if _release(torch_version) < OLDEST_TORCH:
            raise ImportError(f"torch is {torch_version}, and it needs {_dotted(OLDEST_TORCH)} or later: upgrade torch")
        if not path.parent.is_dir():
            raise ImportError(f"no library can be loaded from the archive {path.parents[1]}: unpack it")
        if not path.exists():
            raise ImportError(f"there is no {path}")
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise ImportError(f"torch {torch_version} does not load it: {error}") from error
        for name, result in FUNCTIONS.items():
            if not hasattr(self._library, name):
                raise ImportError(f"{path} is of another version of loftq_kernels: it has no {name}")
            getattr(self._library, name).restype = result
        failure = self._library.loftq_load_error()
        if failure is not None:
            raise ImportError(f"torch {torch_version} refuses the kernels of {path}: {_first_line(failure)}")
        self._info = json.loads(self._library.loftq_build_info())
        self.GROUP_SIZES = tuple(self._info.pop("group_sizes"))
        self.CODE_BITS = tuple(self._info.pop("code_bits"))

    def build_info(self) -> dict:
        """What it was built with: torch, torch_at_least (the oldest one that it runs with), compiler and cuda."""
        return dict(self._info)

    def cpu_isa(self) -> str:
        """The CPU instruction set in use; the environment variable LOFTQ_CPU_ISA forces one, or raises ValueError."""
        reason = ctypes.c_char_p()
        name = self._library.loftq_cpu_isa(ctypes.byref(reason))
        if name is None:
            raise ValueError(reason.value.decode())
        return name.decode()

    def cpu_isas(self) -> tuple[str, ...]:
        """The CPU instruction sets that this machine and build have, widest first."""
        names = (ctypes.c_char_p * 8)()
        return tuple(name.decode() for name in names[: self._library.loftq_cpu_isas(names, len(names))])

    def limit_threads(self, quota: float | None) -> None:
        """Let CPU kernels use at most so many processors' worth of threads, rounded up; None for as many as torch has.

        Under a quota of a control group, threads beyond it are stopped together until its next period, every time.
        """
        self._library.loftq_set_thread_limit(0 if quota is None else math.ceil(quota))

    def thread_limit(self) -> int:
        """The most threads that a CPU kernel uses; 2^31 - 1 where there is no limit."""
        return self._library.loftq_thread_limit()


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _first_line(message: bytes) -> str:
    """Of a message of torch, which may go on with a page of C++."""
    return message.decode(errors="replace").strip().partition("\n")[0]


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


LOAD_ERROR: str | None = None
try:
    library: Library | None = Library(LIBRARY)
    library.limit_threads(threads.cpu_quota())
except ImportError as error:
    library, LOAD_ERROR = None, str(error)

_warned: set[str] = set()


def warn_slow(device_type: str, reason: str | None = None) -> None:
    """Warn, once per device type, that the slow plain-torch reference computes the result.

    On CPUs that happens when the extension is missing; on other devices when an op has no kernel for them.
    """
    if device_type in _warned or device_type == "meta" or (device_type == "cpu" and library is not None):
        return
    _warned.add(device_type)
    missing = f"the compiled extension did not load ({LOAD_ERROR}); {HOW_TO_BUILD}"
    reason = reason or (missing if library is None else "there is no kernel")
    warnings.warn(
        f"loftq_kernels: {device_type} tensors are served by the slow plain-torch reference: {reason}", stacklevel=4
    )
