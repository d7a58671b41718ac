"""`save_quantized` and `load_quantized`: a folder with one safetensors file and a JSON description of the layers.

Models of a library that has a way of its own to save them (transformers: see `hosted`) are saved and loaded that way.
For all others the JSON names the tensor file by its content hash and is replaced last, so that a reader finds either
the old checkpoint or the new one, whenever a save is cut short. Loading builds the model on the meta device: no dense
weight of a quantized layer is ever allocated, and nothing of the model is changed before the whole checkpoint has been
checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from loftq_kernels import hosts
from loftq_kernels.checkpoints import architecture, hosted
from loftq_kernels.checkpoints.manifest import CONFIG_NAME, TENSOR_FILE, CheckpointConfig, LayerSpec
from loftq_kernels.checkpoints.tensor_file import (
    check_places,
    check_tensors,
    dtype_of,
    tensor_names,
    with_dtypes,
    with_ties,
)
from loftq_kernels.formats import PackedTensor
from loftq_kernels.models.ties import untie
from loftq_kernels.nn.adapters import train_only_adapters
from loftq_kernels.nn.base import PACKED, QuantLoRAModule
from loftq_kernels.nn.extras import carry_over
from loftq_kernels.nn.kinds import kind_of
from loftq_kernels.nn.wrappers import (
    is_fully_sharded,
    named_modules,
    named_tensors,
    set_submodule,
    submodule,
    tensor_of,
    unwrapped,
)
from loftq_kernels.ops.checks import is_sharded
from loftq_kernels.ops.constant import Constant, plain
from loftq_kernels.storage import documents, files

_TENSOR_FILE_ENTRY = re.compile(rf'"tensor_file"\s*:\s*"({TENSOR_FILE.pattern})"')
_PENDING = "tensors"  # of a tensor file until its content has given it a name
_MARK = "unfinished"  # of a file with the names of tensor files that are being exchanged


def save_quantized(model: nn.Module, path: str | Path, *, max_shard_size: int | str | None = None) -> None:
    """Write a model that has quantized layers into the folder path, with everything needed to load it.

    Of a transformers model that is what its ``save_pretrained`` writes, and ``from_pretrained`` reads it, too;
    ``max_shard_size`` (bytes, or "5GB") divides its tensors among files, as there. Of any other model it is one
    safetensors file and a JSON file.

    A checkpoint that was there before is replaced, its tensor files removed; if anything fails, it stays as it was.
    Other files of the folder are left alone. Of a model that is sharded (fully_shard,
    tensor parallel plans) every process has to call this: its tensors are gathered one by one, process 0 writes, and
    the others return when it has.

    Raises ValueError when the model has no quantized layer, or tensors on the meta device.
    """
    path, model = Path(path), unwrapped(model)
    for module in filter(is_fully_sharded, model.modules()):
        module.reshard()  # the root keeps the copies that it computed with, perhaps in a lower precision
    layers = {
        name: LayerSpec.of(module)
        for name, module in named_modules(model, remove_duplicate=False)
        if isinstance(module, QuantLoRAModule)
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no QuantLoRALinear (or its like); call quantize_model first")
    if "" in layers:
        raise ValueError("the model is itself a quantized layer: put it into a module, or save its state_dict")
    if (host := hosts.host_of(model)) is not None:
        host.save(model, path, max_shard_size)
        return
    if architecture.is_of_transformers(model):
        raise ImportError(f"{type(model).__name__} is a model of transformers: {architecture.NEEDS_HF}")
    if max_shard_size is not None:
        raise ValueError(f"max_shard_size is for transformers models, {type(model).__name__} is written as one file")
    tensors, tied = _collect_tensors(model)
    with one_writer(model) as writes:
        if writes:
            _write(path, model, layers, tensors, tied)


@contextlib.contextmanager
def one_writer(model: nn.Module) -> Iterator[bool]:
    """Whether this process writes the model. Of a sharded one the first does, and the others wait for it."""
    if not any(is_sharded(tensor) for _, tensor in named_tensors(model)):
        yield True
        return
    try:
        yield torch.distributed.get_rank() == 0
    finally:
        torch.distributed.barrier()


def _write(
    path: Path, model: nn.Module, layers: dict[str, LayerSpec], tensors: dict[str, Tensor], tied: dict[str, str]
) -> None:
    """Check the tensors and write them."""
    on_meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if on_meta:
        raise ValueError(f"tensors on the meta device have no values to save: {', '.join(on_meta[:5])}")
    for name in layers:
        packed_of(name, submodule(model, name), tensors, tied).validate()
    files.require_safetensors()
    path.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path)
    with files.replacing(path / _PENDING) as pending:
        files.write_tensors(pending, tensors, {"format": "pt"})
        digest = _sha256(pending)
        config = CheckpointConfig(
            layers=layers,
            tensor_files=(f"model-{digest[:12]}.safetensors",),
            sha256=digest,
            tied=tied,
            trained=hosted.trained_beside(model),
            buffers=_buffers(model, tensors),
            plain=isinstance(model, architecture.PlainModel),
        )
        _publish(path, pending, config)


def packed_of(
    name: str, layer: QuantLoRAModule, tensors: Mapping[str, Tensor], tied: Mapping[str, str]
) -> PackedTensor:
    """A layer's packed weight as it is going to be written."""
    keys = [f"{name}.{part}" for part in PACKED]
    held = layer.packed
    return PackedTensor(
        *(tensors.get(tied.get(key, key)) for key in keys),
        in_features=held.shape[1],
        group_size=held.group_size,
        format=held.format,
    )


def _publish(path: Path, pending: Path, config: CheckpointConfig) -> None:
    """Give a written tensor file its name, let the config name it, and remove the one that the config named before.

    Meanwhile a temporary file names both, one of which is superfluous whenever the writer is killed.
    """
    files.sync(pending)
    previous, (new,) = _tensor_file_of(path), config.tensor_files
    with files.replacing(path / _MARK) as mark:
        mark.write_text(f"{new}\n{previous or ''}", encoding="utf-8")
        try:
            pending.replace(path / new)
            documents.write_text(path / CONFIG_NAME, config.to_json())
        except BaseException:
            if _tensor_file_of(path) != new:
                (path / new).unlink(missing_ok=True)
            raise
        if previous not in (None, new):
            (path / previous).unlink(missing_ok=True)
        mark.unlink()


def remove_unfinished(path: Path) -> None:
    """Remove what saves that were killed have left: temporary files, and tensor files that the config does not name."""
    current = _tensor_file_of(path)
    for mark in files.abandoned(path, _MARK):
        for name in mark.read_text(encoding="utf-8", errors="replace").splitlines():
            if TENSOR_FILE.fullmatch(name) and name != current:
                (path / name).unlink(missing_ok=True)
        mark.unlink(missing_ok=True)
    files.remove_abandoned(path, rf"{_PENDING}|\.{_PENDING}\.\d+\.tmp")  # the second of earlier versions


def _buffers(model: nn.Module, stored: Mapping[str, Tensor]) -> list[str]:
    """Names of the stored tensors that are buffers."""
    parameters = {id(parameter) for parameter in model.parameters()}
    return [name for name, tensor in named_tensors(model) if name in stored and id(tensor) not in parameters]


def load_quantized(
    path: str | Path, model: nn.Module | None = None, *, device: torch.device | str = "cpu", verify: bool = True
) -> nn.Module:
    """Load what `save_quantized` wrote; the dense weights of quantized layers are never built.

    Args:
        path: the folder.
        model: the dense architecture to load into, best built under ``torch.device("meta")``; its linear layers are
            replaced in place. None rebuilds the transformers model that was saved, in eval mode, or a `PlainModel` of
            a folder that had no architecture. Left trainable are the adapters, and what was trained beside them.
        device: where the tensors go.
        verify: compare the tensor file with the SHA-256 in the config first.

    Raises FileNotFoundError for missing files and ValueError, naming file, layer or tensor, for a checkpoint that is
    truncated, corrupted, of another format or not of this model; ``model`` is unchanged in that case.
    """
    path, device = Path(path), torch.device(device)
    if device.type == "meta":
        raise ValueError("device='meta' holds no values; build the model there and load it to a real device")
    config = hosted.read_config(path)
    paths = config.paths(path)
    if verify and not config.hosted and (digest := _sha256(paths[0])) != config.sha256:
        raise ValueError(
            f"{paths[0]} is truncated or corrupted: SHA-256 is {digest}, {CONFIG_NAME} says {config.sha256}"
        )
    with files.open_all(paths) as stored:
        if config.hosted:
            _check_hosted(path, config, stored, verify)
        if config.hosted and model is None:
            return _load_hosted(path, device)
        config = with_dtypes(config, stored)
        model = _architecture(path, config, stored) if model is None else model
        target = unwrapped(model)
        if sharded := [name for name, tensor in named_tensors(target) if is_sharded(tensor)]:
            raise ValueError(f"{sharded[0]!r} is sharded: load into the whole model, then call fully_shard")
        check_places(target, config)
        config = with_ties(config, target, stored) if config.plain or config.hosted else config
        layers = {name: spec.build() for name, spec in config.layers.items()}
        check_tensors(target, layers, config, stored)
        tensors = {name: stored.get_tensor(name).to(device) for name in tensor_names(stored)}
    for name, layer in layers.items():
        old = submodule(target, name)
        if not isinstance(old, QuantLoRAModule):
            carry_over(old, layer, kind_of(old))
        set_submodule(target, name, layer.train(old.training))
    untie(target)
    for name, tensor in tensors.items():
        assign(target, name, tensor)
    for name, source in config.tied.items():
        assign(target, name, tensor_of(target, source))
    train_only_adapters(target)
    for name in config.trained:
        tensor_of(target, name).requires_grad_(True)
    for host, part in hosts.hosted_parts(target):
        host.adopt(part, None)
    return model


def _check_hosted(path: Path, config: CheckpointConfig, stored: files.TensorFiles, verify: bool) -> None:
    """Raise ValueError for files of another save than the config's; with ``verify`` also for changed tensors."""
    hosted.check_one_save(path, config.sha256, stored.metadata())
    if verify and config.sha256 is not None:
        found = hosted.digest({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
        if found != config.sha256:
            raise ValueError(f"{path} is corrupted: the SHA-256 of its tensors is {found}, not {config.sha256}")


def _load_hosted(path: Path, device: torch.device) -> nn.Module:
    architecture.import_transformers()  # Importing it makes it a host, unless it is too old.
    host = hosts.host_named("transformers")
    if host is None:
        raise ImportError(architecture.NEEDS_HF)
    return host.load(path, device)


def _architecture(path: Path, config: CheckpointConfig, stored: files.TensorFiles) -> nn.Module:
    """The model that was saved, on the meta device."""
    if config.transformers is not None:
        return architecture.skeleton(config.transformers)
    if not config.plain:
        raise ValueError(f"{path} does not hold a transformers model: pass the architecture as model=")
    inside = tuple(f"{name}." for name in config.layers)
    tensors = {}
    for name in tensor_names(stored):
        if not name.startswith(inside):
            own = stored.get_slice(name)
            tensors[name] = torch.empty(own.get_shape(), dtype=dtype_of(name, own.get_dtype()), device="meta")
    for name, spec in config.layers.items():
        tensors[f"{name}.weight"] = torch.empty(spec.out_features, spec.in_features, device="meta")
        if spec.bias:
            tensors[f"{name}.bias"] = torch.empty(spec.out_features, device="meta")
    return architecture.plain_model(tensors, config.layers)


def _tensor_file_of(path: Path) -> str | None:
    """The tensor file of the checkpoint that is in path, also of a damaged or newer one; None where none is named."""
    try:
        return CheckpointConfig.read(path).tensor_files[0]
    except FileNotFoundError:
        return None
    except ValueError:
        with open(path / CONFIG_NAME, encoding="utf-8", errors="replace") as file:
            named = _TENSOR_FILE_ENTRY.search(file.read(documents.MOST_BYTES))
        return None if named is None else named[1]


def _collect_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor (also buffers that state_dict leaves out) by its first name; the other names of shared ones."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for name, tensor in named_tensors(model):
        source = first_name.setdefault(id(tensor), name)
        if source == name:
            tensors[name] = whole(tensor)
        else:
            tied[name] = source
    return tensors, tied


def whole(tensor: Tensor) -> Tensor:
    """The plain tensor; one that is sharded is gathered to process 0, while the others hold nothing of it."""
    if not is_sharded(tensor):
        return plain(tensor)
    return tensor.detach().full_tensor().to("cpu" if torch.distributed.get_rank() == 0 else "meta")


def assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a buffer or parameter in the place of the one of that name."""
    parent, _, attribute = name.rpartition(".")
    owner = submodule(model, parent)
    if isinstance(owner, QuantLoRAModule) and attribute in PACKED:
        owner._parameters[attribute] = value if isinstance(value, Constant) else Constant(value)
        return
    if attribute in owner._parameters and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    setattr(owner, attribute, value)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()  # Python 3.10 has no file_digest
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()
