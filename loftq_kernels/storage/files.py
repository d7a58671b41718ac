"""Files that are written whole or not at all, and safetensors files, read with every size checked.

A file is written under a temporary name that tells who writes it, and renamed when it is complete. What a writer that
was killed has left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from safetensors import safe_open

_LONG_DEAD = 24 * 3600.0  # seconds without a write, after which a temporary file is abandoned, whoever its writer is
_writing: set[str] = set()  # names of temporary files that this process is writing
_numbers = itertools.count()


def require_safetensors() -> ModuleType:
    """Imported where a file is read or written, for the kernels alone run without it; else raises ImportError."""
    import safetensors.torch

    return safetensors


def _machine() -> str:
    """What process numbers are unique in: the host, and on Linux the name space that containers have of their own."""
    space = ""
    with contextlib.suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{socket.gethostname()[:64]}-{space}").strip("-") or "unknown"


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside path; on success it is renamed over path, on failure it is removed.

    Of a link the file that it leads to is replaced, and the link stays.
    A name that is gone at the end has been moved by the caller. Temporary files that dead writers of the same path have
    left are removed first.
    """
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder")
    remove_abandoned(path.parent, re.escape(path.name))
    temporary = path.with_name(f".{path.name}.{_machine()}.{os.getpid()}-{next(_numbers)}.tmp")
    _writing.add(temporary.name)
    try:
        yield temporary
        if temporary.exists():
            sync(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        _writing.discard(temporary.name)


@contextlib.contextmanager
def working_folder(folder: Path, name: str) -> Iterator[Path]:
    """Yield a new folder inside folder, which is removed at the end; so are those that dead writers have left."""
    for left in abandoned(folder, name):
        shutil.rmtree(left, ignore_errors=True)
    made = folder / f".{name}.{_machine()}.{os.getpid()}-{next(_numbers)}.tmp"
    _writing.add(made.name)
    try:
        made.mkdir()
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        _writing.discard(made.name)


def sync(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def remove_abandoned(folder: Path, name: str) -> None:
    """Remove the temporary files of `abandoned`."""
    for left in abandoned(folder, name):
        left.unlink(missing_ok=True)


def abandoned(folder: Path, name: str) -> list[Path]:
    """Temporary files in folder, of files whose names match a regular expression, that dead writers have left.

    Those of earlier versions (".name.pid.tmp") are included.
    """
    pattern = re.compile(rf"\.(?:{name})\.(?:(?P<machine>[A-Za-z0-9-]+)\.)?(?P<process>\d+)(?:-\d+)?\.tmp")
    left = []
    with contextlib.suppress(OSError):
        for file in folder.iterdir():
            found = pattern.fullmatch(file.name)
            if found and _is_dead(file, found["machine"], int(found["process"])):
                left.append(file)
    return left


def _is_dead(file: Path, machine: str | None, process: int) -> bool:
    """Whether the writer of a temporary file is gone: by its process where that is this machine's, and by its age."""
    if file.name in _writing:
        return False
    if _is_old(file):
        return True
    if machine not in (None, _machine()):
        return False
    if process == os.getpid():
        return True  # of an earlier process of that number, which the first of a container always has
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # of another user: alive
        return False
    return False


def _is_old(file: Path) -> bool:
    """Whether nobody has written to a file for a day."""
    with contextlib.suppress(OSError):
        return time.time() - file.stat().st_mtime > _LONG_DEAD
    return False


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata as one safetensors file, atomically."""
    with replacing(path) as temporary:
        write_tensors(temporary, tensors, metadata)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a name that nobody reads yet, readable by whom the umask says."""
    own = {name: _own_storage(tensor.detach()) for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # safetensors makes files that the owner alone can read
    with full_disk_told(path):
        require_safetensors().torch.save_file(own, path, metadata=dict(metadata))
    path.chmod(mode)


@contextlib.contextmanager
def full_disk_told(path: Path) -> Iterator[None]:
    """Turn the error by which safetensors hides a full disk into OSError."""
    safetensors = require_safetensors()
    try:
        yield
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _own_storage(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where it is a view into something larger (safetensors refuses those)."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def open_tensors(path: str | Path, device: torch.device | str = "cpu") -> Iterator[safe_open]:
    """Open a safetensors file lazily. The library checks the header's sizes against the file's before anything is read.

    Raises FileNotFoundError, or ValueError for a file that is truncated, corrupted or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    safetensors = require_safetensors()
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file (truncated or corrupted?): {error}") from error


class TensorFiles:
    """Several open safetensors files, read like one.

    Raises ValueError for a tensor that two of them hold.
    """

    def __init__(self, opened: Mapping[Path, safe_open]):
        self._owners: dict[str, safe_open] = {}
        for path, file in opened.items():
            names = file.keys()
            if twice := sorted(set(names) & self._owners.keys()):
                raise ValueError(f"{path} holds {twice[0]!r}, which another file of the folder holds, too")
            self._owners |= dict.fromkeys(names, file)
        self._files = list(opened.values())

    def keys(self) -> list[str]:
        return sorted(self._owners)

    def get_slice(self, name: str):
        return self._owners[name].get_slice(name)

    def get_tensor(self, name: str) -> Tensor:
        return self._owners[name].get_tensor(name)

    def metadata(self) -> list[dict[str, str]]:
        """That of each file."""
        return [file.metadata() or {} for file in self._files]


@contextlib.contextmanager
def open_all(paths: Iterable[str | Path], device: torch.device | str = "cpu") -> Iterator[TensorFiles]:
    """Open the safetensors files of one checkpoint, as `open_tensors` does one."""
    with contextlib.ExitStack() as stack:
        yield TensorFiles({Path(path): stack.enter_context(open_tensors(path, device)) for path in paths})


def load_tensors(path: str | Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file and its metadata."""
    with open_tensors(path, device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
