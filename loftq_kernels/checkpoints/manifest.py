"""The JSON file of a quantized checkpoint: which layers there are, where their tensors lie. All values are checked."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loftq_kernels import arguments
from loftq_kernels.formats import get_format
from loftq_kernels.initializers.result import ADAPTERS
from loftq_kernels.nn.base import QuantLoRAModule
from loftq_kernels.nn.kinds import LayerKind, kind_named
from loftq_kernels.ops.checks import DTYPES_BY_NAME, SCALE_DTYPES_BY_NAME, STORED_DTYPES_BY_NAME, check_rank
from loftq_kernels.storage import documents
from loftq_kernels.storage.packing import check_group_size, num_groups

CONFIG_NAME = "loftq_config.json"
FORMAT_VERSION = 1
VERSION_KEY = "loftq_format_version"
TENSOR_FILE = re.compile(r"model-[0-9a-f]{12}\.safetensors")


@dataclass(frozen=True)
class LayerSpec:
    """What it takes to rebuild one quantized layer without its tensors; in_features and out_features are the columns
    and rows of its packed matrix."""

    in_features: int
    out_features: int
    bias: bool
    format: str
    group_size: int
    rank: int | None
    scaling: float
    scale_dtype: str
    # Left out of the JSON where they have these values, so that checkpoints of ordinary layers are as they always were.
    kind: str = "linear"
    geometry: dict[str, Any] = field(default_factory=dict)  # the layer's other arguments, as its kind gives them
    adapter: str = "lora"
    offset: bool = False  # whether a format that is not affine has one, as after merging an adapter
    adapter_enabled: bool = True
    dtype: str | None = None  # of the layer; None where lora_A, or else the bias, tells it
    adapter_dtype: str | None = None  # of lora_A and lora_B; None where the tensors tell it

    @classmethod
    def of(cls, layer: QuantLoRAModule) -> LayerSpec:
        out_features, in_features = layer.packed.shape
        return cls(
            in_features=in_features,
            out_features=out_features,
            bias=layer.bias is not None,
            format=layer.format.name,
            group_size=layer.group_size,
            rank=layer.rank,
            scaling=layer.scaling,
            scale_dtype=_name_of(layer.scale.dtype),
            kind=layer.kind,
            geometry=kind_named(layer.kind).geometry_of(layer),
            adapter=layer.adapter,
            offset=layer.offset is not None and not layer.format.affine,
            adapter_enabled=layer.adapter_enabled,
            dtype=_dtype_to_tell(layer),
        )

    def to_values(self) -> dict[str, Any]:
        """The JSON object."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in _OPTIONAL or value != _OPTIONAL[name]}

    @classmethod
    def parse(cls, name: str, values: Any) -> LayerSpec:
        """Raise ValueError, naming the layer and what is wrong, unless values describe a layer that can be built."""
        fields = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(values, dict) or not set(fields) - _OPTIONAL.keys() <= values.keys() <= set(fields):
            raise ValueError(f"layer {name!r}: expected the keys {fields}, got {values!r}")
        spec = cls(**values)
        try:
            spec._check_sizes()
            spec._check_kind()
        except (TypeError, ValueError) as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        return spec

    def _check_sizes(self) -> None:
        for size in ("in_features", "out_features"):
            arguments.whole_number(size, getattr(self, size), 1)
        for name in ("bias", "offset", "adapter_enabled"):
            arguments.flag(name, getattr(self, name))
        arguments.choice("adapter", self.adapter, ADAPTERS)
        get_format(self.format)
        check_group_size(self.group_size)
        if self.rank is not None:
            inner = num_groups(self.in_features, self.group_size) if self.adapter == "qalora" else self.in_features
            check_rank(self.rank, self.out_features, inner)
        arguments.choice("scale_dtype", self.scale_dtype, sorted(self._scale_dtypes()))
        for name in ("dtype", "adapter_dtype"):
            if getattr(self, name) is not None:
                arguments.choice(name, getattr(self, name), sorted(DTYPES_BY_NAME))
        arguments.number("scaling", self.scaling, above=1e-30, below=1e30)

    def _check_kind(self) -> None:
        """What the geometry's values must be is told by the model that the layer is loaded into."""
        names = sorted(self.layer_kind.layer.geometry_names)
        if not isinstance(self.geometry, dict) or sorted(self.geometry) != names:
            raise ValueError(f"geometry={self.geometry!r} must hold {names}")
        if self.kind != "linear" and (self.adapter != "lora" or self.offset):
            raise ValueError(f"kind {self.kind!r} with adapter={self.adapter!r}, offset={self.offset!r}")

    def _scale_dtypes(self) -> dict[str, torch.dtype]:
        return STORED_DTYPES_BY_NAME if self.has_merged_offset else SCALE_DTYPES_BY_NAME

    @property
    def has_merged_offset(self) -> bool:
        """Whether there are offsets that an adapter may have been merged into, which may be of float64."""
        return self.kind == "linear" and (self.offset or get_format(self.format).affine)

    @property
    def layer_kind(self) -> LayerKind:
        return kind_named(self.kind)

    def build(self, dtype: torch.dtype | None = None) -> QuantLoRAModule:
        """The layer on the meta device; ``dtype`` instead of its own where a model is loaded in another one."""
        own = None if self.dtype is None else DTYPES_BY_NAME[self.dtype]
        layer = self.layer_kind.blank(
            self.out_features,
            self.in_features,
            self.bias,
            self.geometry,
            format=self.format,
            group_size=self.group_size,
            rank=self.rank,
            adapter=self.adapter,
            offset=self.has_merged_offset,
            scale_dtype=STORED_DTYPES_BY_NAME[self.scale_dtype],
            dtype=dtype or own,
            adapter_dtype=None if self.adapter_dtype is None else DTYPES_BY_NAME[self.adapter_dtype],
            device="meta",
        )
        layer.scaling, layer.adapter_enabled = self.scaling, self.adapter_enabled
        return layer


_OPTIONAL = {
    "kind": "linear",
    "geometry": {},
    "adapter": "lora",
    "offset": False,
    "adapter_enabled": True,
    "dtype": None,
    "adapter_dtype": None,
}


def _dtype_to_tell(layer: QuantLoRAModule) -> str | None:
    """A layer's dtype, unless its tensors tell it."""
    telling = layer.bias if layer.lora_A is None else layer.lora_A
    return None if telling is not None and telling.dtype == layer.dtype else _name_of(layer.dtype)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class CheckpointConfig:
    """What a folder says of its tensors: in our own JSON file, or in transformers' (see `hosted`)."""

    layers: dict[str, LayerSpec]
    tensor_files: tuple[str, ...]
    sha256: str | None  # of the one file, or (hosted) of the tensors; None where they could not be read as a whole
    transformers: dict[str, Any] | None = None  # what `architecture.skeleton` rebuilds the model from
    tied: dict[str, str] = field(default_factory=dict)  # name -> the name under which the same tensor is stored
    # Left out of the JSON where they are empty.
    trained: list[str] = field(default_factory=list)  # dense parameters that are trained beside the adapters
    buffers: list[str] = field(default_factory=list)  # stored tensors that are buffers; not told by earlier versions
    plain: bool = False  # whether the model is a `PlainModel`, which the tensors' names rebuild
    hosted: bool = False  # whether it is the folder of a library that loads it itself

    def to_json(self) -> str:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "hosted"}
        layers = {name: spec.to_values() for name, spec in values.pop("layers").items()}
        (file,) = values.pop("tensor_files")
        for name in ("trained", "buffers", "plain"):
            if not values[name]:
                del values[name]
        return json.dumps({VERSION_KEY: FORMAT_VERSION, "layers": layers, "tensor_file": file, **values}, indent=1)

    @classmethod
    def read(cls, path: Path) -> CheckpointConfig:
        """The config in a folder of ours. Raises FileNotFoundError, or ValueError naming what is wrong where."""
        file = path / CONFIG_NAME
        missing = f"does not exist: {path} is not a quantized checkpoint"
        values = documents.read(file, VERSION_KEY, FORMAT_VERSION, missing=missing)
        try:
            return cls._parse(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def _parse(cls, values: dict[str, Any]) -> CheckpointConfig:
        documents.check_keys(
            values,
            {"layers": dict, "tensor_file": str, "sha256": str},
            {"transformers": object, "tied": dict, "trained": list, "buffers": list, "plain": bool},
        )
        file = values["tensor_file"]
        if not TENSOR_FILE.fullmatch(file):
            raise ValueError(f"tensor_file {file!r} is not model-<12 hexadecimal digits>.safetensors")
        layers = {name: LayerSpec.parse(name, spec) for name, spec in values["layers"].items()}
        own = {name: value for name, value in values.items() if name not in ("tensor_file", "layers")}
        config = cls(layers=layers, tensor_files=(file,), **own)
        if config.transformers is not None and not isinstance(config.transformers, dict):
            raise ValueError(f"transformers must be a dict, got {config.transformers!r}")
        return config.checked()

    def checked(self) -> CheckpointConfig:
        """The config. Raises ValueError where it names tensors by what is no name."""
        for name in (*self.tied.values(), *self.trained, *self.buffers):
            if not isinstance(name, str):
                raise ValueError(f"{name!r} is not the name of a tensor")
        return self

    def paths(self, folder: Path) -> list[Path]:
        """The tensor files. Raises FileNotFoundError for one that is not there."""
        for name in self.tensor_files:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} names {name}, which does not exist: the folder is not complete")
        return [folder / name for name in self.tensor_files]
