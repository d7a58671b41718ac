"""The JSON file of a quantized checkpoint: which layers there are, where their tensors lie. All values are checked."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq_kernels.formats import get_format
from loftq_kernels.initializers.result import ADAPTERS
from loftq_kernels.nn import QuantLoRALinear
from loftq_kernels.ops.checks import STORED_DTYPES_BY_NAME, check_rank
from loftq_kernels.packing import check_group_size, num_groups

CONFIG_NAME = "loftq_config.json"
FORMAT_VERSION = 1
_MAX_CONFIG_BYTES = 64 << 20  # far above any real one; refuses to read something else that carries the name
_TENSOR_FILE = re.compile(r"model-[0-9a-f]{12}\.safetensors")


@dataclass(frozen=True)
class LayerSpec:
    """What it takes to rebuild one `QuantLoRALinear` without its tensors."""

    in_features: int
    out_features: int
    bias: bool
    format: str
    group_size: int
    rank: int | None
    scaling: float
    scale_dtype: str
    adapter: str = "lora"
    offset: bool = False  # whether there is one; formats that are affine have one in any case

    @classmethod
    def of(cls, layer: QuantLoRALinear) -> LayerSpec:
        return cls(
            in_features=layer.in_features,
            out_features=layer.out_features,
            bias=layer.bias is not None,
            format=layer.format.name,
            group_size=layer.group_size,
            rank=layer.rank,
            scaling=layer.scaling,
            scale_dtype=str(layer.scale.dtype).removeprefix("torch."),
            adapter=layer.adapter,
            offset=layer.offset is not None,
        )

    @classmethod
    def parse(cls, name: str, values: Any) -> LayerSpec:
        """Raise ValueError, naming the layer and what is wrong, unless values describe a layer that can be built."""
        fields = [f.name for f in dataclasses.fields(cls)]
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        if not isinstance(values, dict) or not required <= values.keys() <= set(fields):
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
            if spec.scale_dtype not in STORED_DTYPES_BY_NAME:
                raise ValueError(f"scale_dtype {spec.scale_dtype!r} is not one of {sorted(STORED_DTYPES_BY_NAME)}")
            if spec.scale_dtype == "float64" and not spec.offset:
                raise ValueError("scale_dtype 'float64' without an offset")
            if not isinstance(spec.scaling, int | float) or not 1e-30 < spec.scaling < 1e30:
                raise ValueError(f"scaling={spec.scaling!r}")
        except (TypeError, ValueError) as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        return spec

    def build(self) -> QuantLoRALinear:
        """The layer on the meta device."""
        layer = QuantLoRALinear(
            self.in_features,
            self.out_features,
            self.bias,
            format=self.format,
            group_size=self.group_size,
            rank=self.rank,
            scale_dtype=STORED_DTYPES_BY_NAME[self.scale_dtype],
            adapter=self.adapter,
            offset=self.offset,
            device="meta",
        )
        layer.scaling = self.scaling
        return layer


@dataclass(frozen=True)
class CheckpointConfig:
    """The JSON file of a checkpoint."""

    layers: dict[str, LayerSpec]
    tensor_file: str
    sha256: str
    transformers: dict[str, Any] | None = None  # what `pretrained.skeleton` rebuilds the model from
    tied: dict[str, str] = field(default_factory=dict)  # name -> the name under which the same tensor is stored

    def to_json(self) -> str:
        values = {"loftq_format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
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
