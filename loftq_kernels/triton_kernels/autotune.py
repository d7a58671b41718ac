"""``LOFTQ_AUTOTUNE=1``: configurations measured on the device at hand instead of the table's, and remembered on disk.

The first eager launch of a `Key` times every candidate on its own arguments. That takes seconds to minutes, mostly
for compiling; later processes read what it found. Nothing is read, queried or made before that first launch.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from . import configs
from .configs import Config, Key

VERSION = 1  # Of the file, and of what the fields of `Config` mean to the kernels.
Run = Callable[[Config], object]
# Signs of failures that a process does not recover from: all later candidates would fail too.
_LASTING = ("illegal memory access", "misaligned address", "illegal instruction", "launch failure", "assert triggered")


def enabled(device: torch.device) -> bool:
    """Whether launches are to be tuned now. Launches that a CUDA graph captures cannot be timed."""
    if device.type != "cuda" or not _wanted():
        return False
    return not torch.cuda.is_current_stream_capturing()


def _wanted() -> bool:
    value = os.environ.get("LOFTQ_AUTOTUNE", "").strip().lower()
    if value not in ("1", "true", "yes", "on", "0", "false", "no", "off", ""):
        raise ValueError(f"LOFTQ_AUTOTUNE={os.environ['LOFTQ_AUTOTUNE']} is neither on nor off: set it to 1 or 0")
    return value in ("1", "true", "yes", "on")


def holder() -> str:
    """The package that holds this folder, for which it keeps its cache and speaks: a copy elsewhere has its own."""
    return __package__.rpartition(".")[0] or __package__


def folder() -> Path:
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # A user without a home, as in containers that run under a mere number.
        caches = Path(tempfile.gettempdir())
    return caches / holder() / "autotune"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def measure(run: Callable[[], object]) -> float:
    """Microseconds of a call. L2 is flushed before it, as the other weights of a whole model would do."""
    from triton.testing import do_bench

    return 1e3 * do_bench(run, warmup=10, rep=40, return_mode="median")


def search(
    candidates: Iterable[Config], run: Run, time: Callable[[Callable[[], object]], float]
) -> dict[Config, float]:
    """Microseconds of the candidates, fastest first, without those that do not compile or do not fit the device."""
    times = {}
    for config in candidates:
        try:
            microseconds = time(lambda config=config: run(config))
        except Exception as error:  # Too little shared memory, too few registers, failures of ptxas and others.
            if isinstance(error, torch.cuda.OutOfMemoryError) or any(sign in str(error) for sign in _LASTING):
                raise
            continue
        if math.isfinite(microseconds) and microseconds > 0:
            times[config] = microseconds
    return dict(sorted(times.items(), key=lambda item: item[1]))


class Cache:
    """What was found for one kind of device, in a JSON file that a failure leaves as it was."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[Key, tuple[Config, float]] = {}
        self.hopeless: set[Key] = set()  # Keys for which nothing worked in this process.
        self.load()

    def load(self) -> None:
        """Add the file's rows. A warning tells what cannot be read or breaks a rule of `configs.why_invalid`."""
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if stored["version"] != VERSION:
                return  # It was found for other kernels.
            rows = list(stored["rows"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._warn(f"is ignored: {type(error).__name__}: {error}")
            return
        for row in rows:
            try:
                key, config, microseconds = Key(**row["key"]), Config(**row["config"]), float(row["microseconds"])
                wrong = _why_invalid(key, config)
            except (KeyError, TypeError, ValueError) as error:
                wrong = f"{type(error).__name__}: {error}"
            if wrong is None:
                self.rows.setdefault(key, (config, microseconds))
            else:
                self._warn(f"has a row that is ignored: {wrong}")

    def store(self, key: Key, config: Config, microseconds: float) -> None:
        """Remember a row, and write it together with those that other processes have written meanwhile."""
        self.rows[key] = config, microseconds
        self.load()
        rows = [
            {"key": key._asdict(), "config": asdict(config), "microseconds": time}
            for key, (config, time) in sorted(self.rows.items(), key=lambda item: item[0])
        ]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(self.path, json.dumps({"version": VERSION, "rows": rows}, indent=1) + "\n")
        except OSError as error:
            self._warn(f"cannot be written: {error}; what was found serves this process alone")

    def _warn(self, what: str) -> None:
        warnings.warn(f"{holder()}: the autotune cache {self.path} {what}", RuntimeWarning, stacklevel=3)


def _write_whole(path: Path, text: str) -> None:
    """Replace the file by one with this text. Readers see the old or the new one, and a failure leaves the old one."""
    number, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(number, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _why_invalid(key: Key, config: Config) -> str | None:
    if key.kernel not in configs.KERNELS or key.shape not in configs.SHAPES or key.bits not in (2, 4, 8):
        return f"there is no key {key}"
    if not all(type(value) is int for value in (key.architecture, key.rows, *asdict(config).values())):
        return f"{key}: {config} holds what is no whole number"
    return configs.why_invalid(key.kernel, config, key.bits, key.architecture)


_caches: dict[str, Cache] = {}
_lock = threading.Lock()


def cache_of(device: torch.device) -> Cache:
    """The cache that all devices of this device's name share."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", device_name(device)).strip("-") or "unknown"
    path = folder() / f"{name}.json"
    if str(path) not in _caches:
        _caches[str(path)] = Cache(path)
    return _caches[str(path)]


def tuned(key: Key, group_size: int, device: torch.device, run: Run) -> Config | None:
    """The fastest configuration for a key, from the cache or from a search with `run`, or None if none works.

    All formats, group sizes and adapters of a key share what the first of them found, unless it does not hold their
    groups.
    """
    with _lock:
        cache = cache_of(device)
        if key in cache.hopeless:
            return None
        if key not in cache.rows:
            times = search(configs.candidates(key, group_size), run, measure)
            if not times:
                cache.hopeless.add(key)
                return None
            cache.store(key, *next(iter(times.items())))
        config = cache.rows[key][0]
    fitted = config.for_group(group_size) if key.kernel == "decode" else config
    return None if configs.why_invalid(key.kernel, fitted, key.bits, key.architecture, group_size) else config


def table_rows(cache: Cache) -> str:
    """The rows of a cache as `configs.TABLE` writes them, to be pasted there."""
    lines = []
    for key, (config, microseconds) in sorted(cache.rows.items(), key=lambda item: item[0]):
        sizes = [config.block_m, config.block_n, config.block_k, config.num_warps, config.num_stages]
        sizes += [config.fill] if config.fill else []
        name = f'Key("{key.kernel}", {key.architecture}, {key.bits}, {key.rows}, "{key.shape}")'
        lines.append(f"    {name}: (Config({', '.join(map(str, sizes))}),),  # {microseconds:.1f} us")
    return "\n".join(lines)
