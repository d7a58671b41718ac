"""`save_quantized` and `load_quantized`: a folder with one safetensors file and a JSON description of the layers.

The JSON names the tensor file by its content hash and is replaced last, so that a reader finds either the old
checkpoint or the new one, whenever a save is cut short. Loading builds the model on the meta device: no dense weight of
a quantized layer is ever allocated, and nothing of the model is changed before the whole checkpoint has been checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from loftq_kernels.checkpoints import architecture
from loftq_kernels.checkpoints.manifest import CONFIG_NAME, TENSOR_FILE, CheckpointConfig, LayerSpec
from loftq_kernels.formats import get_format
from loftq_kernels.models.report import ADAPTER, BUFFER, DENSE, PACKED_STATE, TensorReport
from loftq_kernels.models.select import carry_over, reason_of_extras
from loftq_kernels.nn.adapters import adapter_parameters, train_only_adapters
from loftq_kernels.nn.base import PACKED, QuantLoRAModule
from loftq_kernels.nn.kinds import kind_of, matrix_shape
from loftq_kernels.nn.wrappers import named_modules, named_tensors, set_submodule, submodule, unwrapped
from loftq_kernels.ops.checks import DTYPES_BY_NAME
from loftq_kernels.ops.constant import Constant, plain
from loftq_kernels.storage import documents, files

if TYPE_CHECKING:
    from safetensors import safe_open

_LEGACY_DTYPE = ".output_like"  # a tensor by which embeddings told their dtype in files of earlier versions
_SAFETENSORS_DTYPES = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
_SAFETENSORS_DTYPES |= {torch.float64: "F64"}  # offsets that a float64 adapter was merged into
_TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "U8": "uint8", "I8": "int8"}
_TORCH_NAMES |= {"I16": "int16", "I32": "int32", "I64": "int64", "BOOL": "bool"}
_TORCH_NAMES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
_TORCH_NAMES |= {"U16": "uint16", "U32": "uint32", "U64": "uint64", "C64": "complex64"}
_PENDING = "tensors"  # of a tensor file until its content has given it a name
_MARK = "unfinished"  # of a file with the names of tensor files that are being exchanged


def save_quantized(model: nn.Module, path: str | Path) -> None:
    """Write a model that has quantized layers into the folder path, with everything needed to load it.

    If anything fails, a checkpoint that was there before stays as it was. Raises ValueError when the model has no
    quantized layer, or tensors on the meta device.
    """
    path, model = Path(path), unwrapped(model)
    layers = {
        name: LayerSpec.of(module)
        for name, module in named_modules(model, remove_duplicate=False)
        if isinstance(module, QuantLoRAModule)
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no QuantLoRALinear (or its like); call quantize_model first")
    if "" in layers:
        raise ValueError("the model is itself a quantized layer: put it into a module, or save its state_dict")
    for name in layers:
        submodule(model, name).packed.validate()
    tensors, tied = _collect_tensors(model)
    on_meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if on_meta:
        raise ValueError(f"tensors on the meta device have no values to save: {', '.join(on_meta[:5])}")
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


def _publish(path: Path, pending: Path, config: CheckpointConfig) -> None:
    """Give a written tensor file its name, let the config name it, and remove the one that the config named before.

    Meanwhile a temporary file names both, one of which is superfluous whenever the writer is killed.
    """
    files.sync(pending)
    previous, new = _tensor_file_of(path), config.tensor_file
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


def _remove_unfinished(path: Path) -> None:
    """Remove what saves that were killed have left: temporary files, and tensor files that the config does not name."""
    current = _tensor_file_of(path)
    for mark in files.abandoned(path, _MARK):
        for name in mark.read_text(encoding="utf-8", errors="replace").splitlines():
            if TENSOR_FILE.fullmatch(name) and name != current:
                (path / name).unlink(missing_ok=True)
        mark.unlink(missing_ok=True)
    files.remove_abandoned(path, rf"{_PENDING}|\.{_PENDING}\.\d+\.tmp")  # the second of earlier versions


def _trained(model: nn.Module) -> list[str]:
    """Names of dense parameters that are trained beside the adapters, as modules_to_save has them."""
    adapters = {id(parameter) for parameter in adapter_parameters(model).values()}
    names = {id(p): n for n, p in reversed(list(named_tensors(model))) if p.requires_grad and id(p) not in adapters}
    return sorted(names.values())


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
        _check_places(target, config.layers)
        layers = {name: spec.build() for name, spec in config.layers.items()}
        _check_tensors(target, layers, config, stored)
        tensors = {name: stored.get_tensor(name).to(device) for name in _names(stored)}
    for name, layer in layers.items():
        old = submodule(target, name)
        if not isinstance(old, QuantLoRAModule):
            carry_over(old, layer, kind_of(old))
        set_submodule(target, name, layer.train(old.training))
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
            nbytes = torch.Size(shape).numel() * _dtype_of(name, own.get_dtype()).itemsize
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


def _dtype_of(name: str, stored: str) -> torch.dtype:
    """The dtype that a safetensors header names. Raises ValueError for those that this torch lacks."""
    dtype = getattr(torch, _TORCH_NAMES.get(stored, ""), None)
    if dtype is None:
        raise ValueError(f"tensor {name!r} is {stored}, which torch {torch.__version__} has no dtype for")
    return dtype


def _names(stored: safe_open) -> list[str]:
    """The tensors of a file; without those by which embeddings told their dtype in earlier versions."""
    return [name for name in stored.keys() if not name.endswith(_LEGACY_DTYPE)]  # noqa: SIM118


def _with_dtypes(config: CheckpointConfig, stored: safe_open) -> CheckpointConfig:
    """The config of an earlier version with the dtypes of its layers, which their adapters and biases tell."""
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
            tensors[name] = torch.empty(own.get_shape(), dtype=_dtype_of(name, own.get_dtype()), device="meta")
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


def _collect_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor (also buffers that state_dict leaves out) by its first name; the other names of shared ones."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for name, tensor in named_tensors(model):
        source = first_name.setdefault(id(tensor), name)
        if source == name:
            tensors[name] = plain(tensor)
        else:
            tied[name] = source
    return tensors, tied


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
        if not isinstance(old, QuantLoRAModule) and (reason := reason_of_extras(old, kind)):
            raise ValueError(f"layer {name!r} {reason}: load into a model without")


def _check_tensors(
    model: nn.Module, layers: Mapping[str, QuantLoRAModule], config: CheckpointConfig, stored: safe_open
) -> None:
    """The file holds what the model with its quantized layers needs: every name, shape, packed dtype and code book."""
    inside = tuple(f"{name}." for name in layers)
    expected = {name: tensor for name, tensor in named_tensors(model) if not name.startswith(inside)}
    persistent = {name for name, _ in named_tensors(model, persistent=True) if not name.startswith(inside)}
    for layer_name, layer in layers.items():
        own = {f"{layer_name}.{name}": tensor for name, tensor in named_tensors(layer)}
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
    untrainable = sorted(name for name in config.trained if not _is_trainable(expected.get(name)))
    wrong = {"lacks": missing, "holds unknown": unexpected, "ties unknown": unknown_ties, "trains unknown": untrainable}
    for what, found in wrong.items():
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


def _is_trainable(tensor: Tensor | None) -> bool:
    return isinstance(tensor, nn.Parameter) and not isinstance(tensor, Constant) and tensor.is_floating_point()


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
