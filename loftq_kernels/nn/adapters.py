"""The adapters of a whole model: which parameters they are, training them alone, merging them."""

from __future__ import annotations

from torch import nn

from loftq_kernels.nn import merging
from loftq_kernels.nn.base import QuantLoRAModule
from loftq_kernels.nn.wrappers import named_modules, unwrapped


def quantized_layers(model: nn.Module) -> dict[str, QuantLoRAModule]:
    """The quantized layers of a model by name; a layer used twice appears once."""
    return {name: module for name, module in named_modules(model) if isinstance(module, QuantLoRAModule)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every lora_A and lora_B of the quantized layers of a model, by name; a layer used twice appears once."""
    return {
        f"{name}.{key}" if name else key: parameter
        for name, layer in quantized_layers(model).items()
        for key in ("lora_A", "lora_B")
        if (parameter := getattr(layer, key)) is not None
    }


def train_only_adapters(model: nn.Module) -> None:
    """requires_grad = True for every lora_A and lora_B of quantized layers, False for all other parameters.

    The adapters of PEFT on top of them stay as PEFT has set them.
    """
    model = unwrapped(model)
    adapters = {id(parameter) for parameter in adapter_parameters(model).values()}
    foreign = foreign_adapters(model)
    for parameter in model.parameters():
        if id(parameter) not in foreign:
            parameter.requires_grad_(id(parameter) in adapters)


def foreign_adapters(model: nn.Module) -> set[int]:
    """Ids of the parameters that PEFT's tuner layers of a model hold beside the layer that each of them wraps."""
    found: set[int] = set()
    for module in model.modules():
        if is_peft_layer(module):
            base = {id(p) for p in module.base_layer.parameters()} if hasattr(module, "base_layer") else set()
            found |= {id(p) for p in module.parameters()} - base
    return found


def is_peft_layer(module: nn.Module) -> bool:
    """Whether module is one of PEFT's tuner layers, which hold adapters beside a base layer; imports nothing."""
    return any(c.__name__ in ("BaseTunerLayer", "AuxiliaryTrainingWrapper") for c in type(module).__mro__)


def merge_adapters(model: nn.Module, *, requantize: bool = False, scale_search: bool = False) -> dict[str, float]:
    """`merge_adapter` of every quantized layer of a model, in place: the error that each merge added, by name.

    With ``requantize=True`` old and new packed weights of all layers exist together for a while.

    Raises ValueError, naming a layer and before anything is changed, where an adapter can only be merged with
    ``requantize=True``, is disabled, or holds NaN or Inf.
    """
    return merging.merge_all(quantized_layers(model), requantize=requantize, scale_search=scale_search)
