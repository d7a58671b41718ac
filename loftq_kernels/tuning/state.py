"""The state that resuming `rilq_tune` needs, in a folder: a JSON file and the safetensors file that it names.

The JSON is replaced last, so that a reader finds either the state before a save or the one after it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from loftq_kernels.storage import documents, files

_INDEX = "rilq.json"
_VERSION_KEY, _VERSION = "loftq_rilq_version", 2


class RilqPoint(NamedTuple):
    """Losses after ``step`` updates: the whole, the discrepancy and the cross-entropy."""

    step: int
    loss: float
    mse: float
    ce: float


@dataclass
class RilqProgress:
    """How far a run is; ``waiting`` counts the validations since the best one.

    ``end`` is the validation of a last update between two regular ones. It is kept apart, because a run that goes on
    has no such point. ``held`` are hashes of the adapters that a model of this run may hold between two calls:
    the initial ones and each best.
    """

    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    waiting: int = 0
    train: list[RilqPoint] = field(default_factory=list)
    validation: list[RilqPoint] = field(default_factory=list)
    end: RilqPoint | None = None
    held: list[str] = field(default_factory=list)


def save(folder: Path, settings: Mapping[str, Any], done: RilqProgress, tensors: Mapping[str, Tensor]) -> None:
    """Write a state; the one before it stays if that fails."""
    files.require_safetensors()
    folder.mkdir(parents=True, exist_ok=True)
    files.remove_abandoned(folder, r"state-\d+\.safetensors")
    name = f"state-{done.step}.safetensors"
    files.save_tensors(folder / name, tensors, {"step": str(done.step)})
    values = {"tensors": name, "settings": settings, "done": dataclasses.asdict(done)}
    documents.write(folder / _INDEX, _VERSION_KEY, _VERSION, values)
    for old in folder.glob("state-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)


def load(folder: Path, settings: Mapping[str, Any]) -> tuple[RilqProgress, dict[str, Tensor]] | None:
    """The state in folder, None if there is none.

    Raises ValueError for one that is damaged or was saved with other settings, which it names.
    """
    file = folder / _INDEX
    if not file.is_file():
        return None
    values = documents.read(file, _VERSION_KEY, _VERSION)
    try:
        stored, name = values["settings"], values["tensors"]
        done = RilqProgress(**values["done"])
        done.train, done.validation = ([RilqPoint(*p) for p in points] for points in (done.train, done.validation))
        done.end = None if done.end is None else RilqPoint(*done.end)
        if Path(name).name != name:
            raise ValueError(f"tensors lie in {name!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read (truncated or corrupted?): {error!r}") from error
    expected = documents.as_json(settings)
    if changed := sorted(key for key in expected.keys() | stored.keys() if expected.get(key) != stored.get(key)):
        raise ValueError(f"{folder} holds the state of another run: {', '.join(changed)} differ; choose another folder")
    tensors, metadata = files.load_tensors(folder / name)
    if metadata.get("step") != str(done.step):
        raise ValueError(f"{folder / name} is of update {metadata.get('step')}, {_INDEX} of {done.step}")
    return done, tensors
