"""What the tensor file of a checkpoint holds, and whether that is what a model needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from loftq_kernels.checkpoints import hosted
from loftq_kernels.checkpoints.manifest import CheckpointConfig
from loftq_kernels.formats import get_format
from loftq_kernels.models.report import ADAPTER, BUFFER, DENSE, PACKED_STATE, TensorReport
from loftq_kernels.nn.base import PACKED, QuantLoRAModule
from loftq_kernels.nn.extras import reason_of_extras
from loftq_kernels.nn.kinds import is_conv1d, kind_of, matrix_shape
from loftq_kernels.nn.wrappers import named_tensors, submodule
from loftq_kernels.ops.checks import DTYPES_BY_NAME
from loftq_kernels.ops.constant import Constant
from loftq_kernels.storage import files

_LEGACY_DTYPE = ".output_like"  # a tensor by which embeddings told their dtype in files of earlier versions
_EXTRA_STATE = "._extra_state"  # of layers in a state_dict, which transformers writes as it is
_SAFETENSORS_DTYPES = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
_SAFETENSORS_DTYPES |= {torch.float64: "F64"}  # offsets that a float64 adapter was merged into
_TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "U8": "uint8", "I8": "int8"}
_TORCH_NAMES |= {"I16": "int16", "I32": "int32", "I64": "int64", "BOOL": "bool"}
_TORCH_NAMES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
_TORCH_NAMES |= {"U16": "uint16", "U32": "uint32", "U64": "uint64", "C64": "complex64"}


def tensor_names(stored: files.TensorFiles) -> list[str]:
    """The tensors of a checkpoint, without what its JSON tells, too: extra states (and of earlier versions, dtypes)."""
    return [name for name in stored.keys() if not name.endswith((_LEGACY_DTYPE, _EXTRA_STATE))]  # noqa: SIM118


def dtype_of(name: str, stored: str) -> torch.dtype:
    """The dtype that a safetensors header names. Raises ValueError for those that this torch lacks."""
    dtype = getattr(torch, _TORCH_NAMES.get(stored, ""), None)
    if dtype is None:
        raise ValueError(f"tensor {name!r} is {stored}, which torch {torch.__version__} has no dtype for")
    return dtype


def with_dtypes(config: CheckpointConfig, stored: files.TensorFiles) -> CheckpointConfig:
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


def with_ties(config: CheckpointConfig, model: nn.Module, stored: files.TensorFiles) -> CheckpointConfig:
    """The config with the ties that plain files leave to the model: of a shared tensor, one name is enough.

    The weights of layers that the checkpoint holds packed are no tensors of it, whatever they share with others now.
    """
    names = set(tensor_names(stored))
    packed = {f"{name}.weight" for name in config.layers}
    source_of = {id(tensor): name for name, tensor in named_tensors(model) if name in names}
    ties = {
        name: source
        for name, tensor in named_tensors(model)
        if name not in names | packed and (source := source_of.get(id(tensor))) is not None
    }
    return replace(config, tied=ties | config.tied)


def tensor_reports(path: str | Path) -> list[TensorReport]:
    """Every tensor of a checkpoint, with its bytes and whether it is packed, an adapter, dense or a buffer.

    Reads the file's header alone. Raises as `load_quantized`.
    """
    path = Path(path)
    config = hosted.read_config(path)
    reports = []
    with files.open_all(config.paths(path)) as stored:
        for name in tensor_names(stored):
            own = stored.get_slice(name)
            shape = tuple(own.get_shape())
            nbytes = torch.Size(shape).numel() * dtype_of(name, own.get_dtype()).itemsize
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
    return BUFFER if name in config.buffers else DENSE


def check_places(model: nn.Module, config: CheckpointConfig) -> None:
    """Every layer of the checkpoint has a layer of its kind, shape and geometry to replace."""
    layers = config.layers
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
        if config.plain and is_conv1d(old):  # a square matrix does not tell which way round it is
            raise ValueError(
                f"layer {name!r} is a Conv1D, whose weight is [in_features, out_features], but was quantized by its "
                f"name as [out_features, in_features]: quantize the folder with its model, on the command line by "
                "--model-class MODULE:CLASS"
            )
        if (shape := matrix_shape(old)) != (spec.out_features, spec.in_features):
            raise ValueError(
                f"layer {name!r} has shape {shape}, the checkpoint holds ({spec.out_features}, {spec.in_features})"
            )
        if (geometry := kind.geometry_of(old)) != spec.geometry:
            raise ValueError(f"layer {name!r} has {geometry}, the checkpoint holds {spec.geometry}")
        if not isinstance(old, QuantLoRAModule) and (reason := reason_of_extras(old, kind)):
            raise ValueError(f"layer {name!r} {reason}: load into a model without")


def check_tensors(
    model: nn.Module, layers: Mapping[str, QuantLoRAModule], config: CheckpointConfig, stored: files.TensorFiles
) -> None:
    """The file holds what the model with its quantized layers needs: every name, shape, packed dtype and code book."""
    inside = tuple(f"{name}." for name in layers)
    expected = {name: tensor for name, tensor in named_tensors(model) if not name.startswith(inside)}
    persistent = {name for name, _ in named_tensors(model, persistent=True) if not name.startswith(inside)}
    for layer_name, layer in layers.items():
        own = {f"{layer_name}.{name}": tensor for name, tensor in named_tensors(layer)}
        expected.update(own)
        persistent.update(own)
    names = set(tensor_names(stored))
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
        _check_like(name, expected[name], stored)
    for name, source in config.tied.items():
        here, there = expected[name], expected[source]
        if here.shape != there.shape or isinstance(here, nn.Parameter) != isinstance(there, nn.Parameter):
            raise ValueError(f"the checkpoint ties {name!r} {tuple(here.shape)} to {source!r} {tuple(there.shape)}")
    for layer_name, layer in layers.items():
        _check_packed(layer_name, layer, config.tied, stored)


def check_layers(layers: Mapping[str, QuantLoRAModule], tied: Mapping[str, str], stored: files.TensorFiles) -> None:
    """The files hold every tensor of the layers, by the layers' names, in their shapes and packed dtypes."""
    names = set(tensor_names(stored))
    for layer_name, layer in layers.items():
        for part, tensor in named_tensors(layer):
            key = tied.get(f"{layer_name}.{part}", f"{layer_name}.{part}")
            if key not in names:
                raise ValueError(
                    f"the files lack {key!r}: they are truncated, those of another model, or a checkpoint of what was "
                    "trained alone, which a Trainer resumes from"
                )
            _check_like(key, tensor, stored)
        _check_packed(layer_name, layer, tied, stored)


def _check_like(name: str, needed: Tensor, stored: files.TensorFiles) -> None:
    shape, dtype = tuple(stored.get_slice(name).get_shape()), stored.get_slice(name).get_dtype()
    if shape != tuple(needed.shape):
        raise ValueError(f"tensor {name!r} has shape {shape}, the model needs {tuple(needed.shape)}")
    if dtype.startswith(("F", "BF")) != needed.is_floating_point():
        raise ValueError(f"tensor {name!r} is {dtype}, the model needs {needed.dtype}")


def _is_trainable(tensor: Tensor | None) -> bool:
    return isinstance(tensor, nn.Parameter) and not isinstance(tensor, Constant) and tensor.is_floating_point()


def _check_packed(layer_name: str, layer: QuantLoRAModule, tied: Mapping[str, str], stored: files.TensorFiles) -> None:
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
