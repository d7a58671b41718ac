"""Dense models in local folders: transformers ones, and plain safetensors files. Nothing is fetched or unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from loftq_kernels import storage

_NEEDS_HF = "transformers models need: pip install 'loftq_kernels[hf]'"


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(_NEEDS_HF) from error
    return transformers


def _model_class(name: str) -> type[nn.Module]:
    transformers = _transformers()
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"{name!r} is not a model class of transformers {transformers.__version__}")
    return cls


def describe(model: nn.Module) -> dict[str, Any] | None:
    """What `skeleton` rebuilds a transformers model from, as JSON values; None for any other model."""
    if not type(model).__module__.startswith("transformers."):
        return None
    described = {"class": type(model).__name__, "config": json.loads(model.config.to_json_string(use_diff=False))}
    if getattr(model, "generation_config", None) is not None:
        described["generation_config"] = json.loads(model.generation_config.to_json_string(use_diff=False))
    return described


def skeleton(described: dict[str, Any]) -> nn.Module:
    """The model of `describe`, in eval mode, with every tensor on the meta device."""
    transformers = _transformers()
    try:
        cls = _model_class(described["class"])
        config = cls.config_class.from_dict(described["config"])
        with torch.device("meta"):
            model = cls(config)
        if "generation_config" in described:
            model.generation_config = transformers.GenerationConfig.from_dict(described["generation_config"])
    except Exception as error:  # transformers raises many kinds for an edited or foreign config
        raise ValueError(f"the checkpoint's description does not rebuild a transformers model: {error!r}") from error
    return model.eval()


def load_dense(path: str | Path) -> nn.Module:
    """The model in a local folder: of transformers if there is a config.json, else a tree built from tensor names.

    Raises FileNotFoundError when there is no such folder or no safetensors file in it, ValueError for files that
    cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path} holds no .safetensors file (pickled weights are not read)")
    if not (path / "config.json").is_file():
        return _tree_from_files(files)
    cls = _model_class(_architecture(path / "config.json"))
    from safetensors import SafetensorError  # transformers needs it: it is there

    try:
        return cls.from_pretrained(path, local_files_only=True, use_safetensors=True, dtype="auto").eval()
    except SafetensorError as error:
        raise ValueError(f"{path} holds a safetensors file that is truncated or corrupted: {error}") from error


def _architecture(file: Path) -> str:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    architectures = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(architectures, list) or not architectures:
        raise ValueError(f"{file} names no architecture: architectures is {architectures!r}")
    return architectures[0]


def _tree_from_files(files: list[Path]) -> nn.Module:
    """Modules named like the tensors: a floating 2-D "weight" alone or with a "bias" [N] is an nn.Linear."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = storage.load_tensors(file)[0]
        if twice := found.keys() & tensors.keys():
            raise ValueError(f"{file} holds {min(twice)!r}, which another file of the folder holds, too")
        tensors.update(found)
    leaves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        leaves.setdefault(stem, {})[leaf] = tensor
    try:
        return _tree(leaves).eval()
    except KeyError as error:  # what nn.Module does not take as a name
        raise ValueError(f"tensor names do not make a tree of modules: {error}") from error


def _tree(leaves: dict[str, dict[str, Tensor]]) -> nn.Module:
    root = nn.Module()
    for stem, own in sorted(leaves.items()):  # parents before children, so that a linear layer never replaces one
        module = _linear_of(own) if stem else None
        if module is not None:
            parent, _, attribute = stem.rpartition(".")
            _child(root, parent).add_module(attribute, module)
            continue
        owner = _child(root, stem)
        for leaf, tensor in own.items():
            owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    return root


def _linear_of(own: dict[str, Tensor]) -> nn.Linear | None:
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or weight.dim() != 2 or not weight.is_floating_point() or own.keys() - {"weight", "bias"}:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _child(root: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else ():
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]
    return root
