"""Safetensors files, read with every size checked and written so that a failure leaves the old file intact."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from safetensors import safe_open


def _safetensors() -> ModuleType:
    """Imported where a file is read or written: the kernels alone run without it."""
    import safetensors.torch

    return safetensors


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside path; on success it is renamed over path, on failure it is removed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata as one safetensors file, atomically."""
    own = {name: _own_storage(tensor.detach()) for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        temporary.touch()
        mode = (
            temporary.stat().st_mode
        )  # as the umask would have it; safetensors creates files readable by the owner alone
        _safetensors().torch.save_file(own, temporary, metadata=dict(metadata))
        temporary.chmod(mode)


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
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file (truncated or corrupted?): {error}") from error


def load_tensors(path: str | Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file and its metadata."""
    with open_tensors(path, device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
