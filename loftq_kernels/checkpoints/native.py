"""`save_quantized` and `load_quantized`: a folder with one safetensors file and a JSON description of the layers.

The JSON names the tensor file by its content hash and is replaced last, so that a reader finds either the old
checkpoint or the new one, whenever a save is cut short. Loading builds the model on the meta device: no dense weight of
a quantized layer is ever allocated, and nothing of the model is changed before the whole checkpoint has been checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from loftq_kernels.checkpoints import architecture
from loftq_kernels.checkpoints.manifest import CONFIG_NAME, CheckpointConfig, LayerSpec
from loftq_kernels.formats import PackedTensor, get_format
from loftq_kernels.models.report import ADAPTER, BUFFER, DENSE, PACKED_STATE, TensorReport
from loftq_kernels.nn.adapters import adapter_parameters, train_only_adapters
from loftq_kernels.nn.base import PACKED, QuantLoRAModule
from loftq_kernels.nn.kinds import kind_of, matrix_shape
from loftq_kernels.nn.wrappers import is_fully_sharded, named_modules, plain_name, set_submodule, submodule, unwrapped
from loftq_kernels.ops.checks import DTYPES_BY_NAME, is_sharded
from loftq_kernels.ops.constant import Constant, plain
from loftq_kernels.storage import files

if TYPE_CHECKING:
    from safetensors import safe_open

_LEGACY_DTYPE = ".output_like"  # a tensor by which embeddings told their dtype in files of earlier versions
_SAFETENSORS_DTYPES = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
_SAFETENSORS_DTYPES |= {torch.float64: "F64"}  # offsets that a float64 adapter was merged into
_TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "U8": "uint8", "I8": "int8"}
_TORCH_NAMES |= {"I16": "int16", "I32": "int32", "I64": "int64", "BOOL": "bool"}
_TORCH_NAMES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_BYTES = {name: getattr(torch, own).itemsize for name, own in _TORCH_NAMES.items()}
_PENDING = "tensors"  # of a tensor file until its content has given it a name


def save_quantized(model: nn.Module, path: str | Path) -> None:
    """Write a model that has quantized layers into the folder path, with everything needed to load it.

    If anything fails, a checkpoint that was there before stays as it was. Of a model that is sharded (fully_shard,
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
    tensors, tied = _collect_tensors(model)
    with _one_writer(model) as writes:
        if writes:
            _write(path, model, layers, tensors, tied)


@contextlib.contextmanager
def _one_writer(model: nn.Module) -> Iterator[bool]:
    """Whether this process writes the model. Of a sharded one the first does, and the others wait for it."""
    if not any(is_sharded(tensor) for _, tensor in _named_tensors(model)):
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
        _packed_of(name, submodule(model, name), tensors, tied).validate()
    path.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(path)
    with files.replacing(path / _PENDING) as pending:
        files.write_tensors(pending, tensors, {"format": "pt"})
        digest = _sha256(pending)
        config = CheckpointConfig(
            layers=layers,
            tensor_file=f"model-{digest[:12]}.safetensors",
            sha256=digest,
            transformers=architecture.describe(model),
            tied=tied,
            trained=_trained(model),
            plain=isinstance(model, architecture.PlainModel),
        )
        _publish(path, pending, config)


def _packed_of(
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

    The temporary name, which tells the writer, stays beside the final one until the config is written: where the
    writer is killed in between, `_remove_unfinished` knows both.
    """
    files.sync(pending)
    previous, new = _tensor_file_of(path), path / config.tensor_file
    is_new = previous != config.tensor_file
    try:
        try:
            os.link(pending, new)
        except OSError:  # the name is taken, or the file system has no links
            pending.replace(new)
        with files.replacing(path / CONFIG_NAME) as temporary:
            temporary.write_text(config.to_json(), encoding="utf-8")
    except BaseException:
        if is_new:
            new.unlink(missing_ok=True)
        raise
    pending.unlink(missing_ok=True)
    if previous is not None and is_new:
        (path / previous).unlink(missing_ok=True)


def _remove_unfinished(path: Path) -> None:
    """Remove what saves that were killed have left: temporary files, and tensor files that no config came to name."""
    current = _tensor_file_of(path)
    nested = {file.name[1:].rsplit(".", 2)[0] for file in path.glob(f"..{_PENDING}.*.tmp")}  # of earlier versions
    for left in itertools.chain.from_iterable(files.abandoned(path / name) for name in (_PENDING, *nested)):
        for file in path.glob("model-????????????.safetensors"):
            if file.name != current and file.samefile(left):
                file.unlink(missing_ok=True)
        left.unlink(missing_ok=True)


def _trained(model: nn.Module) -> list[str]:
    """Names of dense parameters that are trained beside the adapters, as modules_to_save has them."""
    adapters = {id(parameter) for parameter in adapter_parameters(model).values()}
    return [plain_name(n) for n, p in model.named_parameters() if p.requires_grad and id(p) not in adapters]


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
    config = CheckpointConfig.read(path)
    file = path / config.tensor_file
    if not file.is_file():
        raise FileNotFoundError(f"{path / CONFIG_NAME} names {config.tensor_file}, which does not exist")
    if verify and (digest := _sha256(file)) != config.sha256:
        raise ValueError(f"{file} is truncated or corrupted: SHA-256 is {digest}, {CONFIG_NAME} says {config.sha256}")
    with files.open_tensors(file) as stored:
        config = _with_dtypes(config, stored)
        model = _architecture(path, config, stored) if model is None else model
        target = unwrapped(model)
        if sharded := [name for name, tensor in _named_tensors(target) if is_sharded(tensor)]:
            raise ValueError(f"{sharded[0]!r} is sharded: load into the whole model, then call fully_shard")
        _check_places(target, config.layers)
        layers = {name: spec.build() for name, spec in config.layers.items()}
        _check_tensors(target, layers, config, stored)
        tensors = {name: stored.get_tensor(name).to(device) for name in _names(stored)}
    for name, layer in layers.items():
        set_submodule(target, name, layer.train(submodule(target, name).training))
    for name, tensor in tensors.items():
        _assign(target, name, tensor)
    for name, source in config.tied.items():
        _assign(target, name, _get(target, source))
    train_only_adapters(target)
    for name in config.trained:
        _get(target, name).requires_grad_(True)
    return model


def tensor_reports(path: str | Path) -> list[TensorReport]:
    """Every tensor of a checkpoint, with its bytes and whether it is packed, an adapter, dense or a buffer.

    Reads the file's header alone. Raises as `load_quantized`.
    """
    path = Path(path)
    config = CheckpointConfig.read(path)
    reports = []
    with files.open_tensors(path / config.tensor_file) as stored:
        for name in _names(stored):
            own = stored.get_slice(name)
            shape = tuple(own.get_shape())
            nbytes = torch.Size(shape).numel() * _BYTES[own.get_dtype()]
            state = _state(name, config)
            reason = "left dense when the model was quantized" if state == DENSE else ""
            reports.append(TensorReport(name, shape, nbytes, state, name in config.trained, reason))
    return reports


def _state(name: str, config: CheckpointConfig) -> str:
    owner, _, key = name.rpartition(".")
    if owner in config.layers and key in PACKED:
        return PACKED_STATE
    if owner in config.layers and key != "bias":
        return ADAPTER
    return BUFFER if key.startswith(("running_", "num_batches", "position_ids", "inv_freq")) else DENSE


def _names(stored: safe_open) -> list[str]:
    """The tensors of a file; without those by which embeddings told their dtype in earlier versions."""
    return [name for name in stored.keys() if not name.endswith(_LEGACY_DTYPE)]  # noqa: SIM118


def _with_dtypes(config: CheckpointConfig, stored: safe_open) -> CheckpointConfig:
    """The config with the dtypes of layers that it leaves to their adapters and biases to tell."""
    names = set(stored.keys())
    layers = {}
    for name, spec in config.layers.items():
        if spec.dtype is None:
            telling = [f"{name}{_LEGACY_DTYPE}", f"{name}.lora_A", f"{name}.bias"]
            found = [_TORCH_NAMES.get(stored.get_slice(key).get_dtype()) for key in telling if key in names]
            wide = "float64" if spec.scale_dtype == "float64" else None
            spec = replace(spec, dtype=next((own for own in found if own in DTYPES_BY_NAME), wide))
        layers[name] = spec
    return replace(config, layers=layers)


def _architecture(path: Path, config: CheckpointConfig, stored: safe_open) -> nn.Module:
    """The model that was saved, on the meta device."""
    if config.transformers is not None:
        return architecture.skeleton(config.transformers)
    if not config.plain:
        raise ValueError(f"{path} does not hold a transformers model: pass the architecture as model=")
    inside = tuple(f"{name}." for name in config.layers)
    tensors = {}
    for name in _names(stored):
        if not name.startswith(inside):
            own = stored.get_slice(name)
            dtype = getattr(torch, _TORCH_NAMES[own.get_dtype()])
            tensors[name] = torch.empty(own.get_shape(), dtype=dtype, device="meta")
    for name, spec in config.layers.items():
        tensors[f"{name}.weight"] = torch.empty(spec.out_features, spec.in_features, device="meta")
        if spec.bias:
            tensors[f"{name}.bias"] = torch.empty(spec.out_features, device="meta")
    return architecture.plain_model(tensors, config.layers)


def _tensor_file_of(path: Path) -> str | None:
    """The tensor file of the checkpoint that is in path; None where there is none that can be read."""
    try:
        return CheckpointConfig.read(path).tensor_file
    except (FileNotFoundError, ValueError):
        return None


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, under every name of a shared one."""
    return itertools.chain(
        module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    )


def _collect_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor (also buffers that state_dict leaves out) by its first name; the other names of shared ones."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for name, tensor in _named_tensors(model):
        name = plain_name(name)
        source = first_name.setdefault(id(tensor), name)
        if source == name:
            tensors[name] = _whole(tensor)
        else:
            tied[name] = source
    return tensors, tied


def _whole(tensor: Tensor) -> Tensor:
    """The plain tensor; one that is sharded is gathered to process 0, while the others hold nothing of it."""
    if not is_sharded(tensor):
        return plain(tensor)
    return tensor.detach().full_tensor().to("cpu" if torch.distributed.get_rank() == 0 else "meta")


def _check_places(model: nn.Module, layers: Mapping[str, LayerSpec]) -> None:
    """Every layer of the checkpoint has a layer of its kind, shape and geometry to replace."""
    for name, spec in layers.items():
        inner = [other for other in layers if other.startswith(f"{name}.")]
        if inner:
            raise ValueError(f"the checkpoint holds {inner[0]!r} inside the layer {name!r}")
        try:
            old = submodule(model, name)
        except AttributeError as error:
            raise ValueError(f"{type(model).__name__} has no layer {name!r}, which the checkpoint holds") from error
        kind = kind_of(old)
        if kind is None or kind.name != spec.kind:
            raise ValueError(
                f"layer {name!r} is a {type(old).__name__}, the checkpoint holds a layer of kind {spec.kind}"
            )
        if (shape := matrix_shape(old)) != (spec.out_features, spec.in_features):
            raise ValueError(
                f"layer {name!r} has shape {shape}, the checkpoint holds ({spec.out_features}, {spec.in_features})"
            )
        if (geometry := kind.geometry_of(old)) != spec.geometry:
            raise ValueError(f"layer {name!r} has {geometry}, the checkpoint holds {spec.geometry}")


def _check_tensors(
    model: nn.Module, layers: Mapping[str, QuantLoRAModule], config: CheckpointConfig, stored: safe_open
) -> None:
    """The file holds what the model with its quantized layers needs: every name, shape, packed dtype and code book."""
    inside = tuple(f"{name}." for name in layers)
    expected = {plain_name(name): tensor for name, tensor in _named_tensors(model)}
    expected = {name: tensor for name, tensor in expected.items() if not name.startswith(inside)}
    persistent = {plain_name(name) for name in model.state_dict(keep_vars=True)}
    persistent = {name for name in persistent if not name.startswith(inside)}
    for layer_name, layer in layers.items():
        own = {f"{layer_name}.{name}": tensor for name, tensor in _named_tensors(layer)}
        expected.update(own)
        persistent.update(own)
    names = set(_names(stored))
    missing = sorted(
        name
        for name, tensor in expected.items()
        if name not in names and name not in config.tied and (name in persistent or tensor.is_meta)
    )
    unexpected = sorted(names - expected.keys())
    unknown_ties = sorted(n for n, source in config.tied.items() if n not in expected or source not in names)
    for what, found in (("lacks", missing), ("holds unknown", unexpected), ("ties unknown", unknown_ties)):
        if found:
            raise ValueError(f"the checkpoint {what} tensors of {type(model).__name__}: {', '.join(found[:5])}")
    for name in names:
        shape, dtype = tuple(stored.get_slice(name).get_shape()), stored.get_slice(name).get_dtype()
        if shape != tuple(expected[name].shape):
            raise ValueError(f"tensor {name!r} has shape {shape}, the model needs {tuple(expected[name].shape)}")
        if dtype.startswith(("F", "BF")) != expected[name].is_floating_point():
            raise ValueError(f"tensor {name!r} is {dtype}, the model needs {expected[name].dtype}")
    for name, source in config.tied.items():
        here, there = expected[name], expected[source]
        if here.shape != there.shape or isinstance(here, nn.Parameter) != isinstance(there, nn.Parameter):
            raise ValueError(f"the checkpoint ties {name!r} {tuple(here.shape)} to {source!r} {tuple(there.shape)}")
    for layer_name, layer in layers.items():
        _check_packed(layer_name, layer, config.tied, stored)


def _check_packed(layer_name: str, layer: QuantLoRAModule, tied: Mapping[str, str], stored: safe_open) -> None:
    for name in PACKED:
        buffer = getattr(layer, name)
        if buffer is None:
            continue
        key = f"{layer_name}.{name}"
        dtype = stored.get_slice(tied.get(key, key)).get_dtype()
        if dtype != _SAFETENSORS_DTYPES[buffer.dtype]:
            raise ValueError(f"tensor {key!r} is {dtype}, the layer needs {buffer.dtype}")
    key = f"{layer_name}.codebook"
    codebook = stored.get_tensor(tied.get(key, key))
    if not torch.equal(codebook.cpu(), get_format(layer.format.name).codebook()):
        raise ValueError(f"tensor {key!r} is not the code book of format {layer.format.name}")


def _get(model: nn.Module, name: str) -> Tensor:
    parent, _, attribute = name.rpartition(".")
    return getattr(submodule(model, parent), attribute)


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
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
