"""The adapters of a whole model: which parameters they are, training them alone, merging them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from loftq_kernels.nn import merging
from loftq_kernels.nn.base import PACKED, QuantLoRAModule
from loftq_kernels.nn.names import names_module, names_whole
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


def train_only_adapters(model: nn.Module, also: Iterable[str] = ()) -> None:
    """requires_grad = True for every lora_A and lora_B of quantized layers, False for all other parameters.

    ``also`` holds names or patterns of modules that are trained in full, as ``QuantConfig.modules_to_save``, which it
    is to repeat where the call comes after `quantize_model`. Of quantized layers that it names it means the biases.
    Raises ValueError for one that matches no module, before anything is changed.

    What PEFT has in the model stays as PEFT has set it: its adapters, and everything else in a `PeftModel`, such as
    biases that a config with bias="all" trains.
    """
    model = unwrapped(model)
    also = (also,) if isinstance(also, str) else tuple(also)
    names = [name for name, _ in named_modules(model, remove_duplicate=False)]
    for pattern in also:
        if not any(names_module(name, pattern) for name in names):
            raise ValueError(f"also: the pattern {pattern!r} matches no module of the model")
    adapters = {id(parameter) for parameter in adapter_parameters(model).values()}
    foreign = {id(p) for module in peft_parts(model) for p in module.parameters(recurse=False)}
    foreign |= {id(p) for module in model.modules() if _is_a(module, "PeftModel") for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) in adapters or id(parameter) not in foreign:
            parameter.requires_grad = id(parameter) in adapters  # also of lazy modules, unlike requires_grad_
    train_modules(model, also)


def train_modules(model: nn.Module, patterns: Iterable[str]) -> None:
    """requires_grad = True for the parameters of modules that patterns name, except for packed weights."""
    for name, module in named_modules(model, remove_duplicate=False):
        if names_whole(name, patterns):
            for key, parameter in module.named_parameters(recurse=False):
                if not (isinstance(module, QuantLoRAModule) and key in PACKED):
                    parameter.requires_grad = parameter.is_floating_point() or parameter.is_complex()


def peft_parts(model: nn.Module) -> set[nn.Module]:
    """The modules of a model that are PEFT's: adapters, copies in modules_to_save, prompt encoders; imports nothing.

    PEFT's tuner layers themselves are among them, the layers that they wrap are not.
    """
    found: set[nn.Module] = set()
    for module in model.modules():
        if _is_a(module, "BaseTunerLayer", "AuxiliaryTrainingWrapper"):
            base = getattr(module, "base_layer", None)
            found |= set(module.modules())  # of wrappers inside wrappers, too, which come after those around them
            found -= set(base.modules()) if isinstance(base, nn.Module) else set()
        elif _is_a(module, "PeftModel"):
            encoder = getattr(module, "prompt_encoder", None)
            found |= set(encoder.modules()) if isinstance(encoder, nn.Module) else set()
    return found


def peft_adapters(model: nn.Module) -> set[int]:
    """Ids of the parameters of PEFT's adapters and prompt encoders: not of the copies in its modules_to_save."""
    copies = (m for m in model.modules() if _is_a(m, "ModulesToSaveWrapper"))
    dense = {id(parameter) for module in copies for parameter in module.parameters()}
    return {id(p) for module in peft_parts(model) for p in module.parameters(recurse=False)} - dense


def _is_a(module: nn.Module, *classes: str) -> bool:
    """Whether a module's class, or one that it is derived from, is one of PEFT's with one of these names."""
    return any(c.__name__ in classes and c.__module__.startswith("peft.") for c in type(module).__mro__)


def merge_adapters(model: nn.Module, *, requantize: bool = False, scale_search: bool = False) -> dict[str, float]:
    """`merge_adapter` of every quantized layer of a model, in place: the error that each merge added, by name.

    With ``requantize=True`` old and new packed weights of all layers exist together for a while.

    It moves start adapters alone. User adapters that stand on top of them stay loaded, and right.

    Raises ValueError, naming a layer and before anything is changed, where an adapter can only be merged with
    ``requantize=True``, is disabled, or holds NaN or Inf, and where user adapters are active or stand in the place of a
    start adapter.
    """
    return merging.merge_all(quantized_layers(model), requantize=requantize, scale_search=scale_search)
