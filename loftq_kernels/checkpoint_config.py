"""The JSON file of a quantized checkpoint: which layers there are, where their tensors lie. All values are checked."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from loftq_kernels.formats import get_format
from loftq_kernels.initializers.result import ADAPTERS
from loftq_kernels.nn import QuantLoRAConv1d, QuantLoRAConv2d, QuantLoRAEmbedding, QuantLoRALinear, QuantLoRAModule
from loftq_kernels.ops.checks import SCALE_DTYPES_BY_NAME, STORED_DTYPES_BY_NAME, check_rank
from loftq_kernels.packing import check_group_size, num_groups

CONFIG_NAME = "loftq_config.json"
FORMAT_VERSION = 1
_MAX_CONFIG_BYTES = 64 << 20  # far above any real one; refuses to read something else that carries the name
_CLASSES = {cls.kind: cls for cls in (QuantLoRALinear, QuantLoRAConv1d, QuantLoRAConv2d, QuantLoRAEmbedding)}
_TENSOR_FILE = re.compile(r"model-[0-9a-f]{12}\.safetensors")


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
    geometry: dict[str, Any] = field(default_factory=dict)  # the layer's other arguments, as `geometry_of` gives them
    adapter: str = "lora"
    offset: bool = False  # whether a format that is not affine has one, as after merging an adapter

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
            scale_dtype=str(layer.scale.dtype).removeprefix("torch."),
            kind=layer.kind,
            geometry=geometry_of(layer, layer.kind),
            adapter=layer.adapter,
            offset=layer.offset is not None and not layer.format.affine,
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
            for size in (spec.in_features, spec.out_features):
                if type(size) is not int or size < 1:
                    raise ValueError(f"in_features={spec.in_features!r}, out_features={spec.out_features!r}")
            for flag in ("bias", "offset"):
                if not isinstance(getattr(spec, flag), bool):
                    raise ValueError(f"{flag}={getattr(spec, flag)!r}")
            if spec.adapter not in ADAPTERS:
                raise ValueError(f"adapter {spec.adapter!r} is not one of {ADAPTERS}")
            get_format(spec.format)
            check_group_size(spec.group_size)
            if spec.rank is not None:
                inner = num_groups(spec.in_features, spec.group_size) if spec.adapter == "qalora" else spec.in_features
                check_rank(spec.rank, spec.out_features, inner)
            if spec.kind not in _CLASSES:  # what its geometry must be is told by the model that it is loaded into
                raise ValueError(f"kind {spec.kind!r} is not one of {sorted(_CLASSES)}")
            if not isinstance(spec.geometry, dict) or sorted(spec.geometry) != sorted(spec.layer_class.geometry_names):
                raise ValueError(f"geometry={spec.geometry!r} must hold {sorted(spec.layer_class.geometry_names)}")
            if spec.kind != "linear" and (spec.adapter != "lora" or spec.offset):
                raise ValueError(f"kind {spec.kind!r} with adapter={spec.adapter!r}, offset={spec.offset!r}")
            dtypes = STORED_DTYPES_BY_NAME if spec.has_merged_offset else SCALE_DTYPES_BY_NAME
            if spec.scale_dtype not in dtypes:
                raise ValueError(f"scale_dtype {spec.scale_dtype!r} is not one of {sorted(dtypes)}")
            if not isinstance(spec.scaling, int | float) or not 1e-30 < spec.scaling < 1e30:
                raise ValueError(f"scaling={spec.scaling!r}")
        except (TypeError, ValueError) as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        return spec

    @property
    def has_merged_offset(self) -> bool:
        """Whether there are offsets that an adapter may have been merged into, which may be of float64."""
        return self.kind == "linear" and (self.offset or get_format(self.format).affine)

    @property
    def layer_class(self) -> type[QuantLoRAModule]:
        return _CLASSES[self.kind]

    def build(self) -> QuantLoRAModule:
        """The layer on the meta device."""
        arguments = dict(self.geometry)
        if self.kind == "linear":
            arguments.update(in_features=self.in_features, out_features=self.out_features, bias=self.bias)
            arguments.update(adapter=self.adapter, offset=self.has_merged_offset)
        elif self.kind == "embedding":
            arguments.update(num_embeddings=self.out_features, embedding_dim=self.in_features)
        else:
            arguments.update(bias=self.bias)
        layer = self.layer_class(
            **arguments,
            format=self.format,
            group_size=self.group_size,
            rank=self.rank,
            scale_dtype=STORED_DTYPES_BY_NAME[self.scale_dtype],
            device="meta",
        )
        layer.scaling = self.scaling
        return layer


_OPTIONAL = {"kind": "linear", "geometry": {}, "adapter": "lora", "offset": False}


def geometry_of(module: nn.Module, kind: str) -> dict[str, Any]:
    """What a dense or quantized layer of this kind is made from beside the shape of its matrix, as JSON values."""
    values = {name: getattr(module, name) for name in _CLASSES[kind].geometry_names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True)
class CheckpointConfig:
    """The JSON file of a checkpoint."""

    layers: dict[str, LayerSpec]
    tensor_file: str
    sha256: str
    transformers: dict[str, Any] | None = None  # what `pretrained.skeleton` rebuilds the model from
    tied: dict[str, str] = field(default_factory=dict)  # name -> the name under which the same tensor is stored

    def to_json(self) -> str:
        layers = {name: layer.to_values() for name, layer in self.layers.items()}
        values = {"loftq_format_version": FORMAT_VERSION, **dataclasses.asdict(self), "layers": layers}
        return json.dumps(values, indent=1)

    @classmethod
    def read(cls, path: Path) -> CheckpointConfig:
        file = path / CONFIG_NAME
        if not file.is_file():
            raise FileNotFoundError(f"{path} is not a quantized checkpoint: it has no {CONFIG_NAME}")
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, more than any description of layers")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not JSON (truncated or corrupted?): {error}") from error
        version = values.pop("loftq_format_version", None) if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(f"{file}: loftq_format_version is {version!r}, this version reads {FORMAT_VERSION}")
        try:
            config = cls(**values)
            for name, kind in (("layers", dict), ("tensor_file", str), ("sha256", str), ("tied", dict)):
                if not isinstance(getattr(config, name), kind):
                    raise ValueError(f"{name} must be a {kind.__name__}, got {getattr(config, name)!r}")
            if config.transformers is not None and not isinstance(config.transformers, dict):
                raise ValueError(f"transformers must be a dict, got {config.transformers!r}")
            layers = {name: LayerSpec.parse(name, spec) for name, spec in config.layers.items()}
            if not _TENSOR_FILE.fullmatch(config.tensor_file):
                raise ValueError(f"tensor_file {config.tensor_file!r} is not model-<12 hexadecimal digits>.safetensors")
            for name in config.tied.values():
                if not isinstance(name, str):
                    raise ValueError(f"{name!r} is not the name of a tensor")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error
        return dataclasses.replace(config, layers=layers)
