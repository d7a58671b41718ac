"""PEFT on models that hold our layers: `get_peft_model`, `PeftModel.from_pretrained`, `add_adapter` and the rest.

Nothing is to be called: importing both packages, in either order, is enough (`register`). PEFT has no public hook for
layers that it does not know, so `register` replaces five of its functions by ones that add ours, and this is the one
place that does, but for `peft_hotswap`. `peft_layers` says what the layers compute; `docs/huggingface.md` what works.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from peft.tuners import tuners_utils
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.config import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import other
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from peft.utils.peft_types import TaskType
from torch import nn

from loftq_kernels.checkpoints import hosted
from loftq_kernels.integrations.peft_layers import LAYERS, AroundQuantized
from loftq_kernels.integrations.register import is_older
from loftq_kernels.nn.adapters import quantized_layers
from loftq_kernels.nn.base import QuantLoRAModule
from loftq_kernels.nn.linear import QuantLoRALinear

OLDEST = "0.21"
_OURS = "_loftq_kernels"  # marks the functions that stand in the place of PEFT's


def register() -> None:
    """Make our layers known to PEFT. Calling it again changes nothing, unless PEFT's modules were reloaded.

    Raises ImportError for a PEFT that is too old and AttributeError for one that lacks a function, changing nothing.
    """
    if is_older(version("peft"), OLDEST):
        raise ImportError(f"peft {version('peft')} is too old: pip install 'peft>={OLDEST}'")
    model, tuner = lora_model.LoraModel, tuners_utils.BaseTuner
    replaced = (
        (model, model._create_new_module, _create_new_module),
        (tuner, tuner.inject_adapter, _inject_adapter),
        (tuner, tuner._unload_and_optionally_merge, _unload),
        (None, tuners_utils._maybe_include_all_linear_layers, _include_all_linear_layers),
        (None, other.prepare_model_for_kbit_training, _prepare_model_for_kbit_training),
    )
    for cls, original, ours in replaced:
        stand_in(original, ours, cls)


def stand_in(original: Callable, ours: Callable, cls: type | None = None) -> None:
    """Put ``ours``, which takes the original first, in the place of a method of cls, or of a function wherever it is.

    A function is replaced in every module that has imported it, under whatever name; ours looks like the original.
    """
    if hasattr(original, _OURS):
        return

    @functools.wraps(original)
    def replacement(*args, **kwargs):
        return ours(original, *args, **kwargs)

    setattr(replacement, _OURS, True)
    name = original.__name__
    if cls is not None:
        setattr(cls, name, staticmethod(replacement) if isinstance(vars(cls)[name], staticmethod) else replacement)
        return
    for module in list(sys.modules.values()):
        for alias in [alias for alias, value in list(getattr(module, "__dict__", {}).items()) if value is original]:
            setattr(module, alias, replacement)


def _create_new_module(original: Callable, lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs):
    """PEFT's choice of a LoRA layer for a target, with ours among those that it can choose.

    It has a private table for that, `LoraConfig._register_custom_module`, which belongs to one config and is not saved.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, QuantLoRAModule):
        if (parameter := kwargs.get("parameter_name")) is not None:
            raise ValueError(
                f"target_parameters names {parameter!r} of a {type(base).__name__}, whose weight is no parameter: name "
                "the layer in target_modules"
            )
        if base is not target:
            raise ValueError(
                f"a {type(base).__name__} inside a {type(target).__name__} cannot have a LoRA adapter as well: unload "
                "that one first"
            )
        lora_config._register_custom_module(LAYERS)
    return original(lora_config, adapter_name, target, **kwargs)


def _inject_adapter(original: Callable, tuner: tuners_utils.BaseTuner, model: nn.Module, *args, **kwargs) -> None:
    """PEFT's injection; ValueError where a tuner passes over a layer of ours that it was to have put an adapter on.

    So it is, before anything is changed, where modules_to_save names one, which PEFT would train in full.
    """
    _check_modules_to_save(model, tuner.peft_config[args[0] if args else kwargs["adapter_name"]])
    original(tuner, model, *args, **kwargs)
    for name in tuner.targeted_module_names:
        layer = model.get_submodule(name)
        if isinstance(layer, QuantLoRAModule):
            raise ValueError(
                f"{type(tuner).__name__} has put no adapter on {name!r}, a {type(layer).__name__}: use LoraConfig, or "
                "keep the layer dense with QuantConfig(exclude=...)"
            )


def _unload(original: Callable, tuner: tuners_utils.BaseTuner, *args, **kwargs) -> nn.Module:
    """PEFT's unloading; a model that it has left without quantized layers is no longer said to be quantized."""
    model = original(tuner, *args, **kwargs)
    if not quantized_layers(model):
        for module in model.modules():
            quantizer = vars(module).get("hf_quantizer")
            if quantizer is not None and quantizer.quantization_config.quant_method == hosted.METHOD:
                quantizer.remove_quantization_config(module)
    return model


def _check_modules_to_save(model: nn.Module, peft_config: Any) -> None:
    for key in getattr(peft_config, "modules_to_save", None) or ():
        for name, module in model.named_modules():
            inside = quantized_layers(module) if f".{name}".endswith(f".{key}") else {}
            for layer in inside.values():
                raise ValueError(
                    f"modules_to_save={key!r} would train all of {name!r}, which holds a {type(layer).__name__}, whose "
                    "packed weight is constant: name it in target_modules, or keep it dense with "
                    "QuantConfig(exclude=...)"
                )


def _include_all_linear_layers(original: Callable, peft_config: Any, model: nn.Module) -> Any:
    """PEFT's reading of target_modules="all-linear", with our linear layers; like PEFT's without the output layer."""
    asked = getattr(peft_config, "target_modules", None)
    peft_config = original(peft_config, model)
    if isinstance(asked, str) and asked.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        inside = {
            f"{name}.{key}"
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer)
            for key, _ in module.named_modules()
            if key
        }
        heads = _heads(model, peft_config)
        peft_config.target_modules |= {
            name
            for name, module in model.named_modules()
            if isinstance(module, QuantLoRALinear) and name not in inside and module not in heads
        }
    return peft_config


def _heads(model: nn.Module, peft_config: Any) -> set[nn.Module]:
    """The layers that "all-linear" leaves out: the output embeddings, else the head of a classifier."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None and getattr(peft_config, "task_type", None) == TaskType.SEQ_CLS:
        head = next((h for name in SEQ_CLS_HEAD_NAMES if (h := getattr(model, name, None)) is not None), None)
    return set() if head is None else set(head.modules())


def _prepare_model_for_kbit_training(original: Callable, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """PEFT's preparation, for which our model is one loaded in 4 bits: all else is frozen and upcast to float32.

    Quantized layers stay as they are: their scales, offsets and code books have the dtypes that the codes were chosen
    with, and their adapters those that they are trained in.
    """
    layers = quantized_layers(model).values()
    if not layers:
        return original(model, *args, **kwargs)
    with _hidden(layers), _as_loaded_in_4bit(model):
        return original(model, *args, **kwargs)


@contextmanager
def _hidden(layers: Any) -> Iterator[None]:
    """The layers without parameters."""
    held = [(layer, dict(layer._parameters)) for layer in layers]
    try:
        for layer, parameters in held:
            layer._parameters.update(dict.fromkeys(parameters))
        yield
    finally:
        for layer, parameters in held:
            layer._parameters.update(parameters)


@contextmanager
def _as_loaded_in_4bit(model: nn.Module) -> Iterator[None]:
    """What PEFT takes for a model that gradient checkpointing is meant for."""
    before = vars(model).get("is_loaded_in_4bit")
    model.is_loaded_in_4bit = True
    try:
        yield
    finally:
        del model.is_loaded_in_4bit
        if before is not None:
            model.is_loaded_in_4bit = before


def merge_and_unload(model: nn.Module, *, requantize: bool = False, **kwargs: Any) -> nn.Module:
    """``model.merge_and_unload(**kwargs)`` of a PeftModel, and what becomes of the quantized layers with adapters.

    Dense layers by default, which compute exactly what the adapters did; with ``requantize=True`` quantized ones, as
    LoftQ does it, with the format, group size and rank of the base: smaller, and off by the error of quantization.
    Layers without adapters stay quantized in both cases. Raises TypeError for a model without `merge_and_unload`.
    """
    if not hasattr(model, "merge_and_unload"):
        raise TypeError(f"merge_and_unload takes a PeftModel, as get_peft_model returns, got {type(model).__name__}")
    layers = [module for module in model.modules() if isinstance(module, AroundQuantized)]
    for layer in layers:
        layer.requantize_merged = requantize
    try:
        with torch.no_grad():
            return model.merge_and_unload(**kwargs)
    finally:
        for layer in layers:
            layer.requantize_merged = False


register()
