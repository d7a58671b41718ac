"""Our layers become known to another package as soon as both are imported, in either order; this imports no other.

`when_imported` puts one finder before those of Python. It finds nothing itself: it lets them find a host's module, and
has ours registered when that module has been executed. The module keeps the spec and loader that it would have had.
"""

from __future__ import annotations

import importlib
import importlib.abc
import re
import sys
import threading
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, NamedTuple


class Host(NamedTuple):
    """A module of another package, and ours that it is to know."""

    module: str  # of the host; ours is registered once it has been executed
    ours: str  # calls its function `register()` when it is imported; it may be called again, after a reload of the host
    versions: str  # of the host's package that it works with, for the warning


HOSTS = (
    Host("transformers.quantizers.auto", "loftq_kernels.integrations.transformers", "5.20 and newer"),
    Host("transformers.modeling_utils", "loftq_kernels.integrations.saving", "5.20 and newer"),
    Host("peft.tuners.lora.model", "loftq_kernels.integrations.peft", "0.21"),
    Host("peft.utils.hotswap", "loftq_kernels.integrations.peft_hotswap", "0.21"),
)


def register_all() -> None:
    """`when_imported` for each of `HOSTS`."""
    for host in HOSTS:
        when_imported(*host)


def when_imported(module: str, ours: str, versions: str) -> None:
    """Have ``ours.register()`` called now if ``module`` is loaded, and whenever it is imported or reloaded later.

    Saying it again changes nothing.

    The import of the host succeeds in any case. Where ours does not work with it, a RuntimeWarning says so, and which
    ``versions`` of its package do.
    """
    host = Host(module, ours, versions)
    known = host in _finder.hosts.values()
    _finder.hosts[module] = host
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    if module in sys.modules and not known:
        importlib.import_module(module)  # waits for another thread that is importing it
        _register(host)


def _register(host: Host) -> None:
    try:
        ours = importlib.import_module(host.ours)
        if not ours.__spec__._initializing:  # else it is ours that imports the host, and registers at its end
            ours.register()
    except Exception as error:
        package = host.module.partition(".")[0]
        warnings.warn(
            f"{package} {_version_of(package)} does not know the layers of loftq_kernels, which work with {package} "
            f"{host.versions}: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def is_older(version: str, than: str) -> bool:
    """Whether a version is older than another, by their first two numbers."""
    one, other = (tuple(int(number) for number in re.findall(r"\d+", text)[:2]) for text in (version, than))
    return one < other


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what the finders behind it find; of a host's module the loader then registers ours."""

    def __init__(self):
        self.hosts: dict[str, Host] = {}
        self._asking = threading.local()  # the module that this thread asks the other finders for

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        host = self.hosts.get(name)
        if host is None or getattr(self._asking, "name", None) == name:
            return None
        self._asking.name = name
        try:
            spec = _found(name, path, target)
        finally:
            self._asking.name = None
        if spec is not None and hasattr(spec.loader, "exec_module"):
            _call_after_execution(spec.loader, host)
        return spec


def _found(name: str, path: Any, target: ModuleType | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        if finder is not _finder and hasattr(finder, "find_spec"):
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                return spec
    return None


def _call_after_execution(loader: Any, host: Host) -> None:
    """Have this loader, an object of its own for each search, register ours when it has executed the host's module."""
    execute: Callable[[ModuleType], None] = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        if module.__name__ == host.module:
            loader.__dict__.pop("exec_module", None)
            _register(host)

    if hasattr(loader, "__dict__") and "exec_module" not in vars(loader):
        loader.exec_module = exec_module


_finder = _Finder()
