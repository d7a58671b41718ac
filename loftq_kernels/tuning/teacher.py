"""Final hidden states: how a model's are read, and how a teacher's are kept on disk so that it can leave memory."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loftq_kernels.nn.wrappers import unwrapped
from loftq_kernels.progress import progress_bar
from loftq_kernels.storage import documents, files

if TYPE_CHECKING:
    from safetensors import safe_open

Batch = Tensor | Mapping[str, Tensor]
States = tuple[Tensor, Tensor | None]  # final hidden states [..., width] and logits [..., classes], if there are any
Hidden = Callable[[nn.Module, Batch], Tensor | States]

_INDEX = "teacher.json"
_VERSION_KEY, _VERSION = "loftq_teacher_version", 1
_SAMPLES = 64  # Values per tensor in a fingerprint: few, so that it takes seconds for a model of gigabytes.


def check_batches(batches: Iterable[Batch], what: str = "batches") -> list[Batch]:
    """The batches as a list. Raises ValueError when there are none or one is empty, TypeError for other things."""
    if isinstance(batches, Tensor | Mapping | str):
        raise TypeError(f"{what} must be a sequence of batches, got a single {type(batches).__name__}")
    batches = list(batches)
    if not batches:
        raise ValueError(f"{what} is empty: there is nothing to tune on")
    for i, batch in enumerate(batches):
        tensors = _tensors(batch, f"{what}[{i}]")
        if not tensors or any(tensor.numel() == 0 for tensor in tensors.values()):
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise ValueError(f"{what}[{i}] is empty: {shapes}")
    return batches


def _tensors(batch: Batch, what: str = "a batch") -> dict[str, Tensor]:
    named = dict(batch) if isinstance(batch, Mapping) else {"": batch}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{what} must be a tensor or a mapping of tensors, got {type(tensor).__name__} {name!r}")
    return named


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def batch_key(batch: Batch) -> str:
    """SHA-256 of names, shapes, dtypes and values: the key of the batch's cached states."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(batch).items()):
        _add(digest, name, tensor, tensor)
    return digest.hexdigest()


def fingerprint(model: nn.Module, exclude: Iterable[Tensor] = ()) -> str:
    """SHA-256 of the names, shapes, dtypes and 64 values of each parameter and buffer, to tell models apart."""
    model, left_out = unwrapped(model), {id(tensor) for tensor in exclude}
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if id(tensor) not in left_out:
            step = max(1, tensor.numel() // _SAMPLES)
            _add(digest, name, tensor, tensor.detach().flatten()[::step])
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor, values: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
    flat = values.detach().reshape(-1).cpu().contiguous()
    digest.update(flat.view(torch.uint8).numpy().tobytes())


def final_states(model: nn.Module, batch: Batch, hidden: Hidden | None = None) -> States:
    """(hidden states after the last norm, logits or None) of a batch, by ``hidden(model, batch)`` if that is given.

    A transformers model is called with the batch (a tensor becomes ``input_ids``) and only its inner
    model's ``last_hidden_state`` is kept, not the states of the layers below. Any other model is called
    with the tensor, or the mapping's entries except ``labels`` as keywords, and returns the states or (states, logits).
    """
    if hidden is not None:
        states = hidden(model, batch)
    elif hasattr(model, "base_model") and hasattr(model, "config"):
        states = _transformers_states(model, batch)
    else:
        states = model(batch) if isinstance(batch, Tensor) else model(**_inputs(batch))
    if isinstance(states, Tensor):
        states = states, None
    good = isinstance(states, tuple | list) and len(states) == 2 and isinstance(states[0], Tensor)
    if not good or not (states[1] is None or isinstance(states[1], Tensor)):
        raise TypeError(
            f"{type(model).__name__} gave {type(states).__name__}, not hidden states or (hidden states, logits): "
            "pass hidden=, a function of (model, batch) that returns them"
        )
    return states[0], states[1]


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _transformers_states(model: nn.Module, batch: Batch) -> States:
    inner = [model.base_model]
    if hasattr(model, "get_decoder"):  # OPT's head calls the decoder, not the base model.
        inner.append(model.get_decoder())
    caught: list[Tensor] = []

    def keep(module, arguments, output) -> None:
        state = getattr(output, "last_hidden_state", None)
        if state is None and module is not model:  # A whole model's tuple begins with loss or logits.
            state = output[0] if type(output) is tuple and output else output
        if isinstance(state, Tensor):
            caught.append(state)

    hooks = [module.register_forward_hook(keep) for module in {id(m): m for m in inner if m is not None}.values()]
    try:
        inputs = {"input_ids": batch} if isinstance(batch, Tensor) else _inputs(batch)
        cache = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
        output = model(**inputs, **cache)
    finally:
        for hook in hooks:
            hook.remove()
    if not caught:
        raise ValueError(
            f"{type(model).__name__} shows no final hidden states: neither its base model nor its decoder returned "
            "any; pass hidden=, a function of (model, batch) that does"
        )
    return caught[-1], getattr(output, "logits", None)


def cache_teacher(
    teacher: nn.Module | Callable[[], nn.Module],
    batches: Iterable[Batch],
    path: str | Path,
    *,
    hidden: Hidden | None = None,
    progress: bool | None = None,
) -> None:
    """Write the teacher's final hidden states of every batch into the folder path, one safetensors file per batch.

    Files are named by the content of their batch; those that are there already are kept, so that an interrupted call
    goes on. A function that loads the teacher is called only if states are missing, and the model dropped afterwards.

    Raises ValueError for empty data, states that are not finite, and a folder that holds states of another teacher.
    """
    batches, path = check_batches(batches), Path(path)
    missing = [batch for batch in batches if not _file(path, batch).is_file()]
    if not missing and not isinstance(teacher, nn.Module):
        TeacherCache(path, batches)
        return
    loaded = teacher if isinstance(teacher, nn.Module) else teacher()
    if not isinstance(loaded, nn.Module):
        raise TypeError(f"the teacher function returned {type(loaded).__name__}, not a model")
    _write_index(path, fingerprint(loaded))
    source = LiveTeacher(loaded, hidden)
    for batch in progress_bar(missing, desc="teacher", unit="batch", show=progress if missing else False):
        metadata = {"batch": batch_key(batch), "teacher": source.key}
        files.save_tensors(_file(path, batch), {"hidden": source.states(batch).cpu()}, metadata)
    del loaded, source, teacher
    gc.collect()  # Modules hold reference cycles, which would keep the teacher in memory for a while.
    TeacherCache(path, batches)


def _file(path: Path, batch: Batch) -> Path:
    return path / f"states-{batch_key(batch)[:24]}.safetensors"


def _write_index(path: Path, key: str) -> None:
    files.require_safetensors()
    path.mkdir(parents=True, exist_ok=True)
    files.remove_abandoned(path, r"states-[0-9a-f]+\.safetensors")
    if (path / _INDEX).exists():
        stored = _read_index(path)
        if stored != key:
            raise ValueError(f"{path} holds the states of another teacher ({stored[:12]}, this one is {key[:12]})")
        return
    documents.write(path / _INDEX, _VERSION_KEY, _VERSION, {"teacher": key})


def _read_index(path: Path) -> str:
    missing = f"does not exist: {path} is not a cache of teacher states"
    values = documents.read(path / _INDEX, _VERSION_KEY, _VERSION, missing=missing)
    if not isinstance(values.get("teacher"), str):
        raise ValueError(f"{path / _INDEX} names no teacher (truncated or corrupted?): {values!r}")
    return values["teacher"]


class LiveTeacher:
    """States computed whenever they are asked for, by a model in memory."""

    def __init__(self, model: nn.Module, hidden: Hidden | None = None):
        self.model, self.hidden, self.key = model, hidden, fingerprint(model)
        tensor = next(iter(model.parameters()), None)
        self.device = torch.device("cpu") if tensor is None else tensor.device

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """[..., width], finite; the model's dropout is off and its mode as before."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            states = final_states(self.model, to_device(batch, self.device), self.hidden)[0].detach()
        finally:
            for module, mode in modes.items():
                module.training = mode
        return _finite(states, "the teacher's hidden states")


class TeacherCache:
    """States that `cache_teacher` wrote, read from disk whenever they are asked for."""

    def __init__(self, path: str | Path, batches: Sequence[Batch]):
        """Raises FileNotFoundError or ValueError unless path holds intact states of every batch."""
        self.path = Path(path)
        self.key = _read_index(self.path)
        for i, batch in enumerate(batches):
            file = _file(self.path, batch)
            if not file.is_file():
                raise ValueError(
                    f"{self.path} has no states of batch {i} of {len(batches)}: call cache_teacher with it"
                )
            with files.open_tensors(file) as stored:
                self._check(file, stored, batch)

    def _check(self, file: Path, stored: safe_open, batch: Batch) -> None:
        metadata = stored.metadata() or {}
        if metadata.get("teacher") != self.key or metadata.get("batch") != batch_key(batch):
            raise ValueError(f"{file} holds states of another teacher or batch: delete it")
        if list(stored.keys()) != ["hidden"]:
            raise ValueError(f"{file} holds {list(stored.keys())}, not the tensor 'hidden'")

    def states(self, batch: Batch) -> Tensor:
        """[..., width], on the CPU."""
        file = _file(self.path, batch)
        with files.open_tensors(file) as stored:
            self._check(file, stored, batch)
            return _finite(stored.get_tensor("hidden"), str(file))


def _finite(states: Tensor, what: str) -> Tensor:
    if not torch.isfinite(states).all():
        raise ValueError(f"{what} hold NaN or Inf")
    return states
