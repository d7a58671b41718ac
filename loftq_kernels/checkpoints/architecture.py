"""What a model is built from without its tensors: transformers' class and config, or a tree of named modules."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

OLDEST = "5.20"  # version of transformers whose interface for quantizers ours is written for
NEEDS_HF = f"transformers {OLDEST} or newer is needed: pip install 'loftq_kernels[hf]'"


class PlainModel(nn.Module):
    """Modules named like the tensors of a folder that has no architecture: something to quantize and save, not to call.

    Its result loads into the real model: ``load_quantized(path, model=YourModel())``.
    """

    def forward(self, *args, **kwargs):
        raise NotImplementedError(
            "this model was made from tensor names and has no forward: load its quantized folder into your own model, "
            "load_quantized(path, model=YourModel())"
        )


def import_transformers() -> ModuleType:
    """The package, which `integrations` makes a host as it is imported. Raises ImportError that says how to get it."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(NEEDS_HF) from error
    return transformers


def model_class(name: str) -> type[nn.Module]:
    """transformers' model class of that name. Raises ValueError where there is none."""
    transformers = import_transformers()
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"{name!r} is not a model class of transformers {transformers.__version__}")
    return cls


def architecture_of(file: Path) -> str:
    """The model class that a config.json names."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    architectures = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(architectures, list) or not architectures:
        raise ValueError(f"{file} names no architecture: architectures is {architectures!r}")
    return architectures[0]


def is_of_transformers(model: nn.Module) -> bool:
    """Whether a model's class is one of transformers' or derived from one; imports nothing."""
    mro = type(model).__mro__
    return any(cls.__name__ == "PreTrainedModel" and cls.__module__ == "transformers.modeling_utils" for cls in mro)


def skeleton(described: dict[str, Any]) -> nn.Module:
    """The transformers model that earlier versions have described, in eval mode, with every tensor on the meta device.

    ``described`` is its class, config and generation_config.
    """
    transformers = import_transformers()
    try:
        cls = model_class(described["class"])
        config = cls.config_class.from_dict(described["config"])
        with torch.device("meta"):
            model = cls(config)
        if "generation_config" in described:
            model.generation_config = transformers.GenerationConfig.from_dict(described["generation_config"])
    except Exception as error:  # transformers raises many kinds for an edited or foreign config
        raise ValueError(f"the checkpoint's description does not rebuild a transformers model: {error!r}") from error
    return model.eval()


def plain_model(tensors: Mapping[str, Tensor], linear: Iterable[str]) -> PlainModel:
    """Modules named like the tensors; those named in ``linear`` are nn.Linear of their weight [out_features,
    in_features] and bias [out_features], all else are parameters.

    Raises ValueError for names that make no tree, and for a linear layer of other tensors.
    """
    leaves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        leaves.setdefault(stem, {})[leaf] = tensor
    linear = set(linear)
    root = PlainModel()
    try:
        for stem, own in sorted(leaves.items()):  # Parents come before children, so that no layer replaces one.
            _grow(root, stem, own, stem in linear)
    except KeyError as error:  # what nn.Module does not take as a name
        raise ValueError(f"tensor names do not make a tree of modules: {error}") from error
    return root.eval()


def _grow(root: nn.Module, stem: str, own: Mapping[str, Tensor], linear: bool) -> None:
    if linear:
        parent, _, attribute = stem.rpartition(".")
        _child(root, parent).add_module(attribute, _linear_of(stem, own))
        return
    owner = _child(root, stem)
    for leaf, tensor in own.items():
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def is_linear(own: Mapping[str, Tensor]) -> bool:
    """Whether tensors can be those of an nn.Linear: a floating 2-D "weight" [N, K], perhaps with a "bias" [N]."""
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or weight.dim() != 2 or not weight.is_floating_point() or own.keys() - {"weight", "bias"}:
        return False
    return bias is None or bias.shape == weight.shape[:1]


def _linear_of(name: str, own: Mapping[str, Tensor]) -> nn.Linear:
    if not is_linear(own):
        shapes = {leaf: tuple(tensor.shape) for leaf, tensor in own.items()}
        raise ValueError(f"{name!r} holds {shapes}, which is no linear layer")
    weight, bias = own["weight"], own.get("bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _child(root: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else ():
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]
    return root
