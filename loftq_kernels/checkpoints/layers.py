"""The quantized layers of a checkpoint, one at a time: what each takes, and what error it makes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from loftq_kernels.checkpoints import hosted
from loftq_kernels.checkpoints.manifest import CheckpointConfig, LayerSpec
from loftq_kernels.checkpoints.native import assign
from loftq_kernels.checkpoints.tensor_file import with_dtypes
from loftq_kernels.models.report import PACKED_STATE, TensorReport
from loftq_kernels.nn.base import QuantLoRAModule
from loftq_kernels.nn.kinds import kind_of
from loftq_kernels.nn.wrappers import named_tensors, submodule
from loftq_kernels.storage import files

HALF_BYTES = 2  # of a number in float16 and bfloat16


@dataclass(frozen=True)
class StoredLayer:
    """A layer as the file has it: the bytes of its packed weight, and of all its tensors."""

    spec: LayerSpec
    packed_bytes: int
    nbytes: int

    @property
    def weights(self) -> int:
        return self.spec.out_features * self.spec.in_features

    @property
    def bits_per_weight(self) -> float:
        """Of the packed weight alone: codes, scales, offsets and code book."""
        return 8 * self.packed_bytes / self.weights

    @property
    def half_bytes(self) -> int:
        """Bytes of the dense layer in 16 bits."""
        return HALF_BYTES * (self.weights + (self.spec.out_features if self.spec.bias else 0))


def stored_layers(config: CheckpointConfig, tensors: list[TensorReport]) -> dict[str, StoredLayer]:
    """Every layer by name, from the file's header alone. Raises ValueError for a layer whose tensors it lacks."""
    by_name = {tensor.name: tensor for tensor in tensors}
    return {name: _stored(name, spec, config.tied, by_name) for name, spec in config.layers.items()}


def _stored(name: str, spec: LayerSpec, tied: dict[str, str], tensors: dict[str, TensorReport]) -> StoredLayer:
    keys = [f"{name}.{part}" for part, _ in named_tensors(spec.build())]
    if lost := [key for key in keys if tied.get(key, key) not in tensors]:
        raise ValueError(f"the tensor file lacks {lost[0]!r}: is it truncated, or another checkpoint's?")
    own = [tensors[tied.get(key, key)] for key in keys]
    packed = sum(tensor.nbytes for tensor in own if tensor.state == PACKED_STATE)
    return StoredLayer(spec, packed, sum(tensor.nbytes for tensor in own))


def read_layers(path: str | Path) -> Iterator[tuple[str, QuantLoRAModule]]:
    """Each layer of a checkpoint with its tensors, on the CPU, without the model around it."""
    path = Path(path)
    config = hosted.read_config(path)
    with files.open_all(config.paths(path)) as stored:
        for name, spec in with_dtypes(config, stored).layers.items():
            layer = spec.build()
            for part, _ in list(named_tensors(layer)):
                key = f"{name}.{part}"
                assign(layer, part, stored.get_tensor(config.tied.get(key, key)))
            yield name, layer


@torch.no_grad()
def weight_errors(path: str | Path, dense: nn.Module) -> dict[str, float]:
    """||W - W'||_F / ||W||_F by layer, W of the dense model and W' what the layer of the checkpoint computes with.

    Raises ValueError for a dense model that has no such layer.
    """
    return {name: _error(name, layer, dense) for name, layer in read_layers(path)}


def _error(name: str, layer: QuantLoRAModule, dense: nn.Module) -> float:
    weight = dense_matrix(name, tuple(layer.packed.shape), dense).float()
    norm = torch.linalg.vector_norm(weight, dtype=torch.float64).item()
    actual = layer.dense_weight().view(layer.packed.shape).float()
    return torch.linalg.vector_norm(weight - actual, dtype=torch.float64).item() / norm if norm else 0.0


def dense_matrix(name: str, shape: tuple[int, ...], dense: nn.Module) -> torch.Tensor:
    """The matrix of a dense model's layer. Raises ValueError unless it has that layer, in that shape."""
    try:
        module = submodule(dense, name)
    except AttributeError as error:
        raise ValueError(f"the dense model has no layer {name!r}: it is another model") from error
    kind = kind_of(module)
    if kind is None or isinstance(module, QuantLoRAModule):
        raise ValueError(f"{name!r} of the dense model is a {type(module).__name__}, no dense layer")
    matrix = kind.matrix_of(module)
    if tuple(matrix.shape) != shape:
        raise ValueError(f"layer {name!r} is {tuple(matrix.shape)} in the dense model, and {shape} in the checkpoint")
    return matrix
