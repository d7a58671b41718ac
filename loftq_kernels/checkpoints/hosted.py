"""The folder of a quantized transformers model: safetensors, an index of them, and a config.json that says it all.

transformers writes and reads such folders itself. What we add is the section "quantization_config": the fields of
`QuantConfig`, and what lies in the tensors (`Contents`). Tensors have the names that the model has for them.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loftq_kernels.checkpoints.manifest import CONFIG_NAME as NATIVE_CONFIG_NAME
from loftq_kernels.checkpoints.manifest import TENSOR_FILE, VERSION_KEY, CheckpointConfig, LayerSpec
from loftq_kernels.models.config import QuantConfig
from loftq_kernels.nn.adapters import adapter_parameters
from loftq_kernels.nn.base import QuantLoRAModule
from loftq_kernels.nn.wrappers import named_modules, named_tensors
from loftq_kernels.ops.checks import DTYPES_BY_NAME
from loftq_kernels.storage import documents

CONFIG_NAME = "config.json"
METHOD = "loftq"
DIGEST_KEY = "loftq_tensors_sha256"  # in the header of each file: that all are of one save
_VERSION = 2
_SECTION = "quantization_config"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FILE = re.compile(r"[\w.-]+\.safetensors")
_WEIGHTS = re.compile(rf"model(-\d{{5}}-of-\d{{5}})?\.safetensors|{TENSOR_FILE.pattern}")


@dataclass(frozen=True)
class Contents:
    """What lies in the tensors of a folder, for the section to say.

    ``layers`` has a layer that is used in several places under each of its names, ``tied`` leads from the names of its
    tensors that are not stored to those that are. ``dtypes`` is [what transformers takes for the model's dtype, what it
    is], which differ where a quantized layer comes first, whose adapter has another one.
    """

    layers: dict[str, LayerSpec]
    tied: dict[str, str] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    sha256: str | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Contents:
        """Those of a model, without the hash of its tensors."""
        layers: dict[str, LayerSpec] = {}
        tied: dict[str, str] = {}
        first: dict[nn.Module, str] = {}
        for name, module in named_modules(model, remove_duplicate=False):
            if not isinstance(module, QuantLoRAModule):
                continue
            source = first.setdefault(module, name)
            layers[name] = _spec(module)
            if source != name:
                tied |= {f"{name}.{key}": f"{source}.{key}" for key, _ in named_tensors(module)}
        persistent = {name for name, _ in named_tensors(model, persistent=True)}
        buffers = sorted(name for name, _ in model.named_buffers() if name in persistent)
        return cls(layers, tied, trained_beside(model), buffers, _dtypes(model))

    def to_values(self) -> dict[str, Any]:
        """JSON values; what is empty is left out."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name)}
        return {**values, "layers": _grouped(self.layers)}

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Contents:
        """Raises ValueError, naming what is wrong, for values that `to_values` has not given."""
        kinds = {"tied": dict, "trained": list, "buffers": list, "dtypes": list, "sha256": str}
        documents.check_keys(dict(values), {"layers": list}, kinds)
        for name in (*values.get("tied", {}).values(), *values.get("trained", ()), *values.get("buffers", ())):
            if not isinstance(name, str):
                raise ValueError(f"{name!r} is not the name of a tensor")
        if not values["layers"]:
            raise ValueError("layers is empty: no layer is quantized")
        dtypes = values.get("dtypes", [])
        if len(dtypes) not in (0, 2) or not all(isinstance(name, str) and name in DTYPES_BY_NAME for name in dtypes):
            raise ValueError(f"dtypes={dtypes!r} must hold two of {', '.join(DTYPES_BY_NAME)}")
        return cls(**{**values, "layers": _ungrouped(values["layers"])})


def trained_beside(model: nn.Module) -> list[str]:
    """Names of dense parameters that are trained beside the adapters, as modules_to_save has them."""
    adapters = {id(parameter) for parameter in adapter_parameters(model).values()}
    names = {id(p): n for n, p in reversed(list(named_tensors(model))) if p.requires_grad and id(p) not in adapters}
    return sorted(names.values())


def _spec(layer: QuantLoRAModule) -> LayerSpec:
    adapter_dtype = None if layer.lora_A is None else _name(layer.lora_A.dtype)
    return dataclasses.replace(LayerSpec.of(layer), dtype=_name(layer.dtype), adapter_dtype=adapter_dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(model: nn.Module) -> list[str]:
    taken = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    own = {module.dtype for _, module in named_modules(model) if isinstance(module, QuantLoRAModule)}
    actual = own.pop() if len(own) == 1 else taken
    return [_name(taken), _name(actual)]


def _grouped(layers: Mapping[str, LayerSpec]) -> list[dict[str, Any]]:
    """Layers that differ in nothing but their names stand together."""
    names: dict[str, list[str]] = {}
    for name, spec in layers.items():
        names.setdefault(json.dumps(spec.to_values(), sort_keys=True), []).append(name)
    return [{**json.loads(values), "modules": own} for values, own in names.items()]


def _ungrouped(groups: list[Any]) -> dict[str, LayerSpec]:
    layers: dict[str, LayerSpec] = {}
    for group in groups:
        names = group.get("modules") if isinstance(group, dict) else None
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"layers: expected objects with a list of names, modules, got {group!r}")
        spec = LayerSpec.parse(names[0], {key: value for key, value in group.items() if key != "modules"})
        if twice := [name for name in names if name in layers]:
            raise ValueError(f"layers: {twice[0]!r} stands there twice")
        layers |= dict.fromkeys(names, spec)
    return layers


_FIELDS = {f.name for f in dataclasses.fields(QuantConfig)}
_KEYS = _FIELDS | {"quant_method", VERSION_KEY} | {f.name for f in dataclasses.fields(Contents)}


def section(cfg: QuantConfig | None, contents: Contents | None) -> dict[str, Any]:
    """The "quantization_config" of a folder that holds such contents; without them, of a model to be quantized.

    cfg is None where nobody knows it: of a model that was loaded from a folder of an earlier version.
    """
    told = {} if contents is None else {VERSION_KEY: _VERSION, **contents.to_values()}
    return {"quant_method": METHOD, **({} if cfg is None else cfg.to_dict()), **told}


def parse_section(values: Mapping[str, Any]) -> tuple[QuantConfig | None, Contents | None]:
    """What `section` was made from. Raises ValueError, naming what is wrong, for a damaged or newer one."""
    _check_fields(values)
    own = dict(values)
    if (method := own.pop("quant_method", METHOD)) != METHOD:
        raise ValueError(f"quant_method is {method!r}, not {METHOD!r}")
    version = own.pop(VERSION_KEY, None)
    if version is not None and (type(version) is not int or version != _VERSION):
        raise ValueError(
            f"{VERSION_KEY} is {version!r}, and this version of loftq_kernels reads {_VERSION}: "
            "the folder is damaged, or a newer version wrote it"
        )
    known = {f.name for f in dataclasses.fields(Contents)}
    told = {name: own.pop(name) for name in known & own.keys()}
    if (version is None) != ("layers" not in told):
        raise ValueError(f"{VERSION_KEY} and layers belong together, one of them is missing")
    try:
        cfg = None if version is not None and not own else QuantConfig.from_dict(own)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return cfg, None if version is None else Contents.parse(told)


def _check_fields(values: Mapping[str, Any]) -> None:
    if unknown := sorted(set(values) - _KEYS):
        near = difflib.get_close_matches(unknown[0], _FIELDS, 3)
        hint = f"near: {', '.join(map(repr, near))}" if near else f"it has {', '.join(sorted(_FIELDS))}"
        raise ValueError(
            f"LoftqConfig has no field {unknown[0]!r}; {hint} (a folder that has it was written by a newer version)"
        )


def is_hosted(path: Path) -> bool:
    """Whether the config.json of a folder says that it is quantized by this package."""
    try:
        values = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    found = values.get(_SECTION) if isinstance(values, dict) else None
    return isinstance(found, dict) and found.get("quant_method") == METHOD


def read_config(path: Path) -> CheckpointConfig:
    """What a quantized folder of either kind says of itself.

    Raises FileNotFoundError for what is missing, and ValueError, naming what is wrong where, for what is damaged.
    """
    if not is_hosted(path):
        return CheckpointConfig.read(path)
    values = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
    try:
        _, contents = parse_section(values[_SECTION])
        if contents is None:
            raise ValueError("it names no layers: the model has not been quantized yet, or the file is damaged")
        architectures = values.get("architectures") or [None]
        own = {f.name: getattr(contents, f.name) for f in dataclasses.fields(contents) if f.name != "dtypes"}
        told = {"class": architectures[0], "config": values}
        config = CheckpointConfig(tensor_files=_file_names(path), transformers=told, hosted=True, **own)
        return config.checked()
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path / CONFIG_NAME}: {error}") from error


def _file_names(path: Path) -> tuple[str, ...]:
    """The names of the tensor files, as transformers chooses them: the single one, else those of the index.

    A save_pretrained of one file leaves the index of an earlier one that had several.
    """
    if (path / _SINGLE).is_file() or not (path / _INDEX).is_file():
        return (_SINGLE,)
    try:
        names = set(json.loads((path / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{_INDEX} is no index of tensors: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or not _FILE.fullmatch(name):
            raise ValueError(f"{_INDEX} names {name!r}, which is no safetensors file of the folder")
    return tuple(sorted(names))


def check_one_save(path: Path, sha256: str | None, headers: list[dict[str, str]]) -> None:
    """Raise ValueError where a file's header names other tensors than the config does: of another save."""
    for header in headers:
        told = header.get(DIGEST_KEY)
        if sha256 is not None and told is not None and told != sha256:
            raise ValueError(
                f"{path} holds files of two saves: {CONFIG_NAME} names the tensors {sha256[:12]}, a file {told[:12]}; "
                "save the model again, into an empty folder"
            )


def weight_files(path: Path) -> list[Path]:
    """Every file of a folder that a save of either kind has written its tensors to, with our own JSON file."""
    own = [file for file in path.glob("model*.safetensors") if _WEIGHTS.fullmatch(file.name)]
    return [*own, *(path / name for name in (_INDEX, NATIVE_CONFIG_NAME) if (path / name).is_file())]


def digest(tensors: Mapping[str, Tensor]) -> str | None:
    """SHA-256 of tensors with their names, dtypes and shapes; None where some are on the meta device (offloaded)."""
    if any(tensor.is_meta for tensor in tensors.values()):
        return None
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()
