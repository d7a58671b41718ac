"""adapter_model.safetensors, as PEFT writes and reads it: which tensor is which factor of which layer."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from loftq_kernels.nn.adapters import quantized_layers
from loftq_kernels.nn.base import QuantLoRAModule
from loftq_kernels.nn.conv import QuantLoRAConv1d, QuantLoRAConv2d
from loftq_kernels.nn.embedding import QuantLoRAEmbedding
from loftq_kernels.nn.stacking import Factors
from loftq_kernels.ops.constant import plain
from loftq_kernels.storage import files

if TYPE_CHECKING:
    from safetensors import safe_open

TENSOR_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_PICKLE = "adapter_model.bin"
_METADATA_KEY = "loftq_kernels"  # in the header of the file, which PEFT does not look at
_FLOATS = ("F16", "BF16", "F32", "F64")


class Keys(NamedTuple):
    """The ends of the names of a layer's two tensors: of the one that the input meets first, and of the other."""

    first: str
    second: str


_LINEAR, _EMBEDDING = Keys(".lora_A.weight", ".lora_B.weight"), Keys(".lora_embedding_A", ".lora_embedding_B")


def keys_of(layer: QuantLoRAModule) -> Keys:
    return _EMBEDDING if isinstance(layer, QuantLoRAEmbedding) else _LINEAR


def unsupported(layer: QuantLoRAModule) -> str | None:
    """Why PEFT's adapter of such a layer is none that this package has; None where it is."""
    if not isinstance(layer, QuantLoRAConv1d | QuantLoRAConv2d):
        return None
    plain_one = layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
    if plain_one:
        return None
    return "PEFT's adapters of convolutions with groups, dilation or padding_mode compute something else"


def file_shapes(layer: QuantLoRAModule, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a layer's two tensors in the file."""
    rows, columns = layer.packed.shape
    if isinstance(layer, QuantLoRAEmbedding):
        return (rank, rows), (columns, rank)
    if isinstance(layer, QuantLoRAConv1d | QuantLoRAConv2d):
        return (rank, layer.in_channels, *layer.kernel_size), (rows, rank, *[1] * len(layer.kernel_size))
    return (rank, columns), (rows, rank)


def to_file(layer: QuantLoRAModule, factors: Factors) -> tuple[Tensor, Tensor]:
    """A layer's two tensors for the file; a table's rows are what the input meets first."""
    lora_A, lora_B = factors.lora_A.detach(), factors.lora_B.detach()
    pair = (lora_B.T, lora_A.T) if isinstance(layer, QuantLoRAEmbedding) else (lora_A, lora_B)
    shapes = file_shapes(layer, len(lora_A))
    return tuple(tensor.reshape(shape).contiguous() for tensor, shape in zip(pair, shapes, strict=True))


def from_file(layer: QuantLoRAModule, first: Tensor, second: Tensor, scaling: float) -> Factors:
    """The inverse of `to_file`, on the layer's device."""
    first, second = (tensor.flatten(1).to(layer.codes.device) for tensor in (first, second))
    if isinstance(layer, QuantLoRAEmbedding):
        return Factors(second.T.contiguous(), first.T.contiguous(), scaling)
    return Factors(first, second, scaling)


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[safe_open]:
    """The tensor file of a folder. Raises FileNotFoundError, or ValueError for pickles and damaged files."""
    file = folder / TENSOR_FILE
    if not file.is_file() and (folder / _PICKLE).exists():
        raise ValueError(
            f"{folder / _PICKLE} is a pickle, which can run any code when it is read: if you trust it, load it in PEFT "
            f"and save_pretrained it again, which writes {TENSOR_FILE}"
        )
    with files.open_tensors(file) as stored:
        yield stored


def check_tensor(stored: safe_open, key: str, shape: Iterable[int], *, what: str) -> None:
    """Raise ValueError unless the header gives a tensor this shape and a floating-point dtype."""
    own = stored.get_slice(key)
    if own.get_dtype() not in _FLOATS:
        raise ValueError(f"tensor {key!r} is {own.get_dtype()}, not one of {_FLOATS}")
    if list(own.get_shape()) != list(shape):
        raise ValueError(f"tensor {key!r} has shape {own.get_shape()}, {what} needs {list(shape)}")


def read_finite(stored: safe_open, key: str) -> Tensor:
    tensor = stored.get_tensor(key)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"tensor {key!r} holds NaN or Inf")
    return tensor


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the packed weights of a model, by which an adapter knows the base that it was trained on."""
    digest = hashlib.sha256()
    for name, layer in sorted(quantized_layers(model).items()):
        digest.update(f"{name}:{layer.format.name}:{layer.group_size};".encode())
        for tensor in layer.stored():
            if tensor is not None:
                digest.update(plain(tensor).cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def header(base: str | None) -> dict[str, str]:
    """The file's metadata; ``base`` is the fingerprint of the packed weights, if it stands on them alone."""
    values = {"relative_to": "weights"} if base is None else {"relative_to": "packed", "fingerprint": base}
    return {"format": "pt", _METADATA_KEY: json.dumps({"version": 1, **values})}


def base_of(metadata: Mapping[str, str] | None) -> str | None:
    """The fingerprint in a file's metadata; None for adapters that stand on top of the start, as PEFT's do."""
    text = (metadata or {}).get(_METADATA_KEY)
    if text is None:
        return None
    try:
        values = json.loads(text)
        if values["version"] != 1:
            raise ValueError(f"version {values['version']!r} is newer than this package")
        return {"weights": lambda: None, "packed": lambda: str(values["fingerprint"])}[values["relative_to"]]()
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the metadata {_METADATA_KEY!r} of the tensor file is damaged: {error}") from error
