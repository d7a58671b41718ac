"""Where commands write: whether they can, and whether something is there that they must not replace."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from loftq_kernels.checkpoints import hosted
from loftq_kernels.checkpoints.manifest import CONFIG_NAME
from loftq_kernels.checkpoints.manifest import VERSION_KEY as CHECKPOINT_KEY
from loftq_kernels.models.plan import VERSION_KEY as PLAN_KEY
from loftq_kernels.storage import files

_OF_DEMOS = {"model", "demo.json", "demo.md", "demo.png"}
_MIB = 2**20


def check_folder(path: Path, overwrite: bool, what: str, is_ours: Callable[[Path], bool]) -> None:
    """Raise unless the folder can be written: it is new or empty, or holds what is ours and may be replaced."""
    _check_place(path, folder=True)
    held = [] if not path.exists() else sorted(file.name for file in path.iterdir() if not _is_left_over(file))
    if held and not is_ours(path):
        listed = ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
        raise ValueError(f"{path} is not empty and no {what} (it holds {listed}): choose another folder")
    if held and not overwrite:
        raise ValueError(f"{path} holds a {what}: give --overwrite to replace it, or choose another folder")
    _try(path, _existing(path), tempfile.TemporaryDirectory)


def check_file(path: Path, overwrite: bool, what: str, is_ours: Callable[[Path], bool]) -> None:
    """Raise unless the file can be written: it is new, or ours and may be replaced."""
    _check_place(path, folder=False)
    if path.exists() and not is_ours(path):
        raise ValueError(f"{path} exists and is no {what}: choose another file")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} is a {what}: give --overwrite to replace it, or choose another file")
    _try(path, path.resolve().parent, tempfile.NamedTemporaryFile)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder has our manifest, also a damaged one's."""
    return any(CHECKPOINT_KEY in _text(path / name) for name in (CONFIG_NAME, hosted.CONFIG_NAME))


def is_plan(path: Path) -> bool:
    return PLAN_KEY in _parsed(path)


def is_demo(path: Path) -> bool:
    """Whether a folder has the results of a demo, or of one that was cut short its model and nothing else."""
    cut_short = is_checkpoint(path / "model") and {file.name for file in path.iterdir()} <= _OF_DEMOS
    return cut_short or {"machine", "sentences", "rows"} <= _parsed(path / "demo.json").keys()


def check_space(path: Path, nbytes: int) -> None:
    """Raise where a folder's disk cannot hold so many bytes more."""
    free = shutil.disk_usage(_existing(path)).free
    if nbytes > free:
        needed = f"the result takes {nbytes / _MIB:.0f} MiB"
        raise OSError(f"{path} cannot be written: {needed}, and its disk has {free / _MIB:.0f} MiB left")


def _check_place(path: Path, *, folder: bool) -> None:
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to what is not there: remove it, or choose another place")
    if path.exists() and path.is_dir() != folder:
        raise ValueError(f"{path} is a {'file, not a folder' if folder else 'folder, not a file'}")
    place = _existing(path) if folder else path.resolve().parent
    if not place.is_dir():
        raise ValueError(f"{place} is not a folder: {path} cannot be written")


def _try(path: Path, place: Path, make: Callable[..., AbstractContextManager]) -> None:
    """Make something in a folder and remove it: what a user may do there, permissions alone do not say."""
    try:
        with make(dir=place, prefix=".loftq-kernels-"):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {place} takes nothing new ({error.strerror})") from error


def _existing(path: Path) -> Path:
    """The path, or the innermost of the folders around it that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _is_left_over(file: Path) -> bool:
    """Whether a file is temporary, of a writer of ours that is dead."""
    return file in files.abandoned(file.parent, r"[\w.-]+")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError:
        return ""


def _parsed(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one for anything else."""
    try:
        values = json.loads(_text(path))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
