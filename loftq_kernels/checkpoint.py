"""`save_quantized` and `load_quantized`: a folder with one safetensors file and a JSON description of the layers.

The JSON names the tensor file by its content hash and is replaced last, so that a reader finds either the old
checkpoint or the new one, whenever a save is cut short. Loading builds the model on the meta device: no dense weight of
a quantized layer is ever allocated, and nothing of the model is changed before the whole checkpoint has been checked.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from loftq_kernels import pretrained, storage
from loftq_kernels.checkpoint_config import CONFIG_NAME, CheckpointConfig, LayerSpec, geometry_of
from loftq_kernels.convert import layer_type, train_only_adapters, weight_matrix
from loftq_kernels.formats import get_format
from loftq_kernels.nn.base import PACKED_BUFFERS, QuantLoRAModule

if TYPE_CHECKING:
    from safetensors import safe_open

_SAFETENSORS_DTYPES = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
_SAFETENSORS_DTYPES |= {torch.float64: "F64"}  # offsets that a float64 adapter was merged into


def save_quantized(model: nn.Module, path: str | Path) -> None:
    """Write a model that has quantized layers into the folder path, with everything needed to load it.

    If anything fails, a checkpoint that was there before stays as it was. Raises ValueError when the model has no
    quantized layer, or tensors on the meta device.
    """
    path = Path(path)
    layers = {
        name: LayerSpec.of(module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantLoRAModule)
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no QuantLoRALinear (or its like); call quantize_model first")
    if "" in layers:
        raise ValueError("the model is itself a quantized layer: put it into a module, or save its state_dict")
    for name in layers:
        model.get_submodule(name).packed.validate()
    tensors, tied = _collect_tensors(model)
    on_meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if on_meta:
        raise ValueError(f"tensors on the meta device have no values to save: {', '.join(on_meta[:5])}")
    path.mkdir(parents=True, exist_ok=True)
    previous = _tensor_file_of(path)
    pending = path / f".tensors.{os.getpid()}.tmp"
    written: Path | None = None  # to be removed again unless the config comes to name it
    try:
        storage.save_tensors(pending, tensors, {"format": "pt"})
        digest = _sha256(pending)
        tensor_file = f"model-{digest[:12]}.safetensors"
        text = CheckpointConfig(layers, tensor_file, digest, pretrained.describe(model), tied).to_json()
        if previous != tensor_file:
            written = path / tensor_file
        pending.replace(path / tensor_file)
        with storage.replacing(path / CONFIG_NAME) as temporary:
            temporary.write_text(text, encoding="utf-8")
        written = None
    finally:
        pending.unlink(missing_ok=True)
        if written is not None:
            written.unlink(missing_ok=True)
    if previous is not None and previous != tensor_file:
        (path / previous).unlink(missing_ok=True)


def load_quantized(
    path: str | Path, model: nn.Module | None = None, *, device: torch.device | str = "cpu", verify: bool = True
) -> nn.Module:
    """Load what `save_quantized` wrote; the dense weights of quantized layers are never built.

    Args:
        path: the folder.
        model: the dense architecture to load into, best built under ``torch.device("meta")``; its linear layers are
            replaced in place and only the adapters are left trainable. None rebuilds the transformers model that was
            saved, in eval mode.
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
    if model is None:
        if config.transformers is None:
            raise ValueError(f"{path} does not hold a transformers model: pass the architecture as model=")
        model = pretrained.skeleton(config.transformers)
    _check_places(model, config.layers)
    layers = {name: spec.build() for name, spec in config.layers.items()}
    with storage.open_tensors(file) as stored:
        _check_tensors(model, layers, config, stored)
        tensors = {name: stored.get_tensor(name).to(device) for name in stored.keys()}  # noqa: SIM118
    for name, layer in layers.items():
        _assign(model, name, layer.train(model.get_submodule(name).training))
    for name, tensor in tensors.items():
        _assign(model, name, tensor)
    for name, source in config.tied.items():
        _assign(model, name, _get(model, source))
    train_only_adapters(model)
    return model


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
        source = first_name.setdefault(id(tensor), name)
        if source == name:
            tensors[name] = tensor
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
            old = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"{type(model).__name__} has no layer {name!r}, which the checkpoint holds") from error
        kind, shape = _place(old)
        if kind != spec.kind:
            raise ValueError(
                f"layer {name!r} is a {type(old).__name__}, the checkpoint holds a layer of kind {spec.kind}"
            )
        if shape != (spec.out_features, spec.in_features):
            raise ValueError(
                f"layer {name!r} has shape {shape}, the checkpoint holds ({spec.out_features}, {spec.in_features})"
            )
        if (geometry := geometry_of(old, kind)) != spec.geometry:
            raise ValueError(f"layer {name!r} has {geometry}, the checkpoint holds {spec.geometry}")


def _place(module: nn.Module) -> tuple[str | None, tuple[int, ...] | None]:
    """The kind of layer that a module, dense or quantized, can be replaced by, and the shape of its matrix."""
    if isinstance(module, QuantLoRAModule):
        return module.kind, tuple(module.packed.shape)
    kind = layer_type(module)
    if kind == "conv":
        kind = {nn.Conv1d: "conv1d", nn.Conv2d: "conv2d"}.get(type(module))
    return (None, None) if kind is None else (kind, tuple(weight_matrix(module).shape))


def _check_tensors(
    model: nn.Module, layers: Mapping[str, QuantLoRAModule], config: CheckpointConfig, stored: safe_open
) -> None:
    """The file holds what the model with its quantized layers needs: every name, shape, packed dtype and code book."""
    inside = tuple(f"{name}." for name in layers)
    expected = {name: tensor for name, tensor in _named_tensors(model) if not name.startswith(inside)}
    persistent = {name for name in model.state_dict(keep_vars=True) if not name.startswith(inside)}
    for layer_name, layer in layers.items():
        own = {f"{layer_name}.{name}": tensor for name, tensor in _named_tensors(layer)}
        expected.update(own)
        persistent.update(own)
    names = set(stored.keys())
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
    for name in PACKED_BUFFERS:
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
    return getattr(model.get_submodule(parent), attribute)


def _assign(model: nn.Module, name: str, value: Tensor | nn.Module) -> None:
    """Put a module, buffer or parameter in the place of the one of that name."""
    parent, _, attribute = name.rpartition(".")
    owner = model.get_submodule(parent)
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
