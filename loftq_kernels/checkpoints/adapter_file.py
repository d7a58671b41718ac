"""`save_adapter` and `load_adapter`: adapters in PEFT's two files, adapter_config.json and adapter_model.safetensors.

What an adapter's term is added to depends on where the file comes from. PEFT's files stand on the original weights W,
for which a quantized layer and its start adapter stand as well: Q + S. A layer's own trained adapter T stands on the
packed weight alone, Q + T, and its file tells so in the header of the tensors, which PEFT does not look at.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from loftq_kernels.checkpoints import adapter_tensors as tensors_of
from loftq_kernels.checkpoints.adapter_config import CONFIG_FILE, AdapterConfig, ends_with
from loftq_kernels.checkpoints.adapter_start import difference, start_terms
from loftq_kernels.checkpoints.adapter_tensors import PREFIX, TENSOR_FILE
from loftq_kernels.nn.adapter_slots import NamedAdapter
from loftq_kernels.nn.adapters import adapter_parameters, peft_parts, quantized_layers
from loftq_kernels.nn.base import QuantLoRAModule
from loftq_kernels.nn.named_adapters import add_adapter, layers_with_slots, loaded_adapters
from loftq_kernels.nn.stacking import Factors
from loftq_kernels.nn.wrappers import named_modules, named_tensors, submodule, tensor_of, unwrapped
from loftq_kernels.ops.checks import is_sharded
from loftq_kernels.storage import documents, files

if TYPE_CHECKING:
    from safetensors import safe_open


def save_adapter(
    model: nn.Module, folder: str | Path, *, name: str | None = None, start: nn.Module | str | Path | None = None
) -> None:
    """Write an adapter as PEFT does: adapter_config.json and adapter_model.safetensors, which PEFT itself loads.

    Without ``name`` it is the model's own adapter, trained or not, and with it the modules that are trained in full
    (``QuantConfig(modules_to_save=...)``). There are two files of it:

    * without ``start``: the adapter as it is. In PEFT it belongs on the dequantized base, without a start adapter. Here
      `load_adapter` puts it in the place of the start adapter, on a model of the same packed weights only.
    * with ``start``, the adapter that training has started from (the model as it was, the folder of one, or a folder
      that ``save_adapter(model, folder)`` has written of it): the difference [A; A0], [s B, -s0 B0], of twice the rank.
      It stands on the original weights, in any precision, as what PEFT saves with
      ``path_initial_model_for_weight_conversion``. Here it goes on top of the start.

    With ``name`` it is the user adapter of that name, as it was loaded. lora_A of QA-LoRA is written over columns.

    Raises ValueError for a model without adapters, a disabled or sharded one, one that PEFT has wrapped (save that with
    PEFT), a start of other packed weights, and what PEFT's files cannot hold; nothing is written then.
    """
    folder, model = Path(folder), unwrapped(model)
    _check_own(model)
    if name is not None:
        if start is not None:
            raise ValueError(f"start= belongs to the model's own adapter, not to the user adapter {name!r}")
        adapters, modules = _named_terms(model, name), []
        base = tensors_of.fingerprint(model) if loaded_adapters(model)[name] else None
    else:
        adapters, modules = _own_terms(model), _trained_modules(model)
        base = tensors_of.fingerprint(model) if start is None else None
        if start is not None:
            adapters = difference(adapters, start_terms(model, start))
    layers = quantized_layers(model)
    stored = dict(_file_tensors(layers, adapters))
    for module in modules:
        stored |= {f"{PREFIX}{module}.{key}": t for key, t in submodule(model, module).state_dict().items()}
    shapes = {layer: (len(term.lora_A), term.scaling) for layer, term in adapters.items()}
    document = AdapterConfig.describing(model, shapes, modules).to_json(model)
    folder.mkdir(parents=True, exist_ok=True)
    files.save_tensors(folder / TENSOR_FILE, stored, tensors_of.header(base))
    documents.write_text(folder / CONFIG_FILE, document)


def load_adapter(model: nn.Module, folder: str | Path, *, name: str | None) -> None:
    """Load an adapter that PEFT or `save_adapter` has written, from a folder; it is not active before `set_adapter`.

    A file of PEFT, and one that was saved with ``start=``, goes on top of the start adapters. One that was saved
    without takes their place, and is refused on other packed weights. Adapters are frozen. They move with the model,
    are copied with it, and are in no state_dict, checkpoint or optimizer. Under a name that is loaded already the
    adapter takes the other's place, also where that is active: without compiling anew while its ranks fit the slot,
    see `set_adapter`.

    ``name=None`` writes the file into the model's own adapters, to go on training, say, together with the modules that
    were trained in full: the file must be one that was saved without ``start`` from such a model.

    Raises FileNotFoundError, or ValueError that names the tensor, layer or option: for damaged files and pickles, other
    kinds of adapters (DoRA, biases, initializations that changed the base), layers that the model lacks, has dense or
    of another shape, layers that the file lacks, ranks other than the config's. The model is unchanged in that case.
    """
    folder, target = Path(folder), unwrapped(model)
    _check_own(target)
    if name is not None and (not isinstance(name, str) or not name):
        raise ValueError(f"name={name!r} must be a name, or None for the model's own adapter")
    config = AdapterConfig.read(folder)
    with tensors_of.opened(folder) as stored:
        base = tensors_of.base_of(stored.metadata())
        contents = _contents(target, config, stored)
        if base is not None and base != tensors_of.fingerprint(target):
            raise ValueError(
                f"{folder} holds an adapter that stands on other packed weights: save it from its own model with "
                "start=, which makes an adapter of the original weights"
            )
        if name is not None and contents.modules:
            raise ValueError(
                f"{folder} also holds the module {next(iter(contents.modules)).rpartition('.')[0]!r}, trained in full, "
                "of which the model has one for all adapters: leave modules_to_save out, or load it with PEFT"
            )
        first = {id(layer): layer_name for layer_name, layer in quantized_layers(target).items()}
        with torch.inference_mode(False):  # PyTorch counts no writes to tensors that are made in inference mode.
            adapters = {
                first[id(submodule(target, layer))]: contents.read(stored, target, layer, config)
                for layer in contents.layers
            }
        modules = {name: tensors_of.read_finite(stored, key) for name, key in contents.modules.items()}
    own = {layer for layer, module in quantized_layers(target).items() if module.lora_A is not None}
    if base is not None and (missing := sorted(own - adapters.keys())):
        raise ValueError(f"layer {missing[0]!r} has an adapter in the model alone, in whose place the file has none")
    if name is not None:
        add_adapter(target, name, {layer: NamedAdapter(term, base is not None) for layer, term in adapters.items()})
        return
    if base is None:
        raise ValueError(f"{folder} holds an adapter that stands on top of the start adapters: load it under a name")
    _take(target, adapters, modules)


class _Contents(NamedTuple):
    """What a tensor file holds, checked against a model by its header alone."""

    layers: dict[str, tuple[str, str]]  # layer -> the names of its two tensors
    modules: dict[str, str]  # parameter or buffer of a module that is trained in full -> the name of its tensor

    def read(self, stored: safe_open, model: nn.Module, layer: str, config: AdapterConfig) -> Factors:
        pair = (tensors_of.read_finite(stored, key) for key in self.layers[layer])
        return tensors_of.from_file(submodule(model, layer), *pair, config.scaling(layer))


def _contents(model: nn.Module, config: AdapterConfig, stored: safe_open) -> _Contents:
    """Every tensor of the file has its place, and every layer that the config targets its tensors."""
    layers: dict[str, dict[str, str]] = {}
    modules: dict[str, str] = {}
    for key in stored.keys():  # noqa: SIM118
        if not key.startswith(PREFIX):
            raise ValueError(f"tensor {key!r} is none of PEFT's, whose names begin with {PREFIX!r}")
        name = key.removeprefix(PREFIX)
        if (found := _split(name)) is not None:
            layers.setdefault(found[0], {})[found[1]] = key
        elif ends_with_module(name, config.modules_to_save):
            modules[name] = key
        elif not name.endswith(".base_layer.weight"):  # PEFT's copy of a frozen embedding beside its adapter
            raise ValueError(f"tensor {key!r} is no lora_A or lora_B, nor of a module in modules_to_save")
    if not layers:
        raise ValueError(f"{TENSOR_FILE} holds no lora_A and lora_B")
    _check_layers(model, list(layers))
    for layer, keys in layers.items():
        _check_layer(layer, submodule(model, layer), keys, config, stored)
    adapted = {id(submodule(model, layer)) for layer in layers}
    for layer, module in quantized_layers(model).items():
        if id(module) not in adapted and config.targets(layer) and not ends_with_module(layer, config.modules_to_save):
            raise ValueError(
                f"the adapter has no tensors for layer {layer!r}, which its target_modules name: it is of another model"
            )
    _check_modules(model, modules, stored)
    return _Contents({layer: tuple(keys.values()) for layer, keys in layers.items()}, modules)


def ends_with_module(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a tensor's or module's name lies in one of the modules, which may be named by the ends of their names."""
    parts = name.split(".")
    return any(ends_with(".".join(parts[:end]), modules) for end in range(1, len(parts) + 1))


def _split(name: str) -> tuple[str, str] | None:
    """(layer, which of its tensors) of a tensor of an adapter."""
    for keys in (tensors_of._LINEAR, tensors_of._EMBEDDING):
        for end in keys:
            if name.endswith(end):
                return name.removesuffix(end), end
    return None


def _check_layers(model: nn.Module, layers: list[str]) -> None:
    """Every layer is one of the model's quantized ones. Else the error says what would help."""
    modules = dict(named_modules(model, remove_duplicate=False))
    missing = [layer for layer in layers if layer not in modules]
    if missing:
        raise ValueError(
            f"{type(model).__name__} has no layer {missing[0]!r}, which the adapter is for{_hint(modules, layers)}"
        )
    for layer in layers:
        if not isinstance(modules[layer], QuantLoRAModule):
            raise ValueError(
                f"layer {layer!r} is dense here ({type(modules[layer]).__name__}), and user adapters stand on "
                "quantized layers: quantize it, or load the adapter with PEFT"
            )


def _hint(modules: Mapping[str, nn.Module], layers: list[str]) -> str:
    """Where a prefix is all that differs, as between AutoModel and AutoModelForCausalLM."""
    head = layers[0].split(".")[0]
    if all(layer.removeprefix(f"{head}.") in modules for layer in layers):
        return f": it was trained with {head!r} around this model; load it into the model with a head (AutoModelFor...)"
    ends = [name for name in modules if name.endswith(f".{layers[0]}")]
    outer = ends[0].removesuffix(f".{layers[0]}") if len(ends) == 1 else None
    if outer is not None and all(f"{outer}.{layer}" in modules for layer in layers):
        return f": it was trained on what is {outer!r} here (AutoModel without a head); load it into model.{outer}"
    return ""


def _check_layer(
    name: str, layer: QuantLoRAModule, keys: dict[str, str], config: AdapterConfig, stored: safe_open
) -> None:
    if reason := tensors_of.unsupported(layer):
        raise ValueError(f"layer {name!r}: {reason}")
    expected = tensors_of.keys_of(layer)
    if set(keys) != set(expected):
        raise ValueError(
            f"layer {name!r} is a {layer.kind} and needs {expected}, the adapter has {tuple(sorted(keys))}"
        )
    rank = config.rank(name)
    what = f"layer {name!r} with rank {rank} (by {CONFIG_FILE})"
    for end, shape in zip(expected, tensors_of.file_shapes(layer, rank), strict=True):
        tensors_of.check_tensor(stored, keys[end], shape, what=what)
    keys |= {end: keys.pop(end) for end in expected}  # in this order


def _check_modules(model: nn.Module, modules: dict[str, str], stored: safe_open) -> None:
    own = dict(named_tensors(model))
    for name, key in modules.items():
        if name not in own:
            raise ValueError(f"{type(model).__name__} has no tensor {name!r}, which modules_to_save names")
        if list(stored.get_slice(key).get_shape()) != list(own[name].shape):
            shape = stored.get_slice(key).get_shape()
            raise ValueError(f"tensor {key!r} has shape {shape}, the model's {list(own[name].shape)}")


def _take(model: nn.Module, adapters: Mapping[str, Factors], modules: Mapping[str, Tensor]) -> None:
    """Write factors into the model's own adapters, and values into its dense modules."""
    layers = quantized_layers(model)
    for name, term in adapters.items():
        if layers[name].lora_A is None:
            raise ValueError(f"layer {name!r} has an adapter in the file alone: load it under a name")
        if len(term.lora_A) != layers[name].rank:
            raise ValueError(f"layer {name!r} has rank {layers[name].rank}, the file's adapter {len(term.lora_A)}")
    own = {name: layers[name].over_groups(term.lora_A) for name, term in adapters.items()}
    with torch.no_grad():
        for name, term in adapters.items():
            layers[name].lora_A.copy_(own[name])
            layers[name].lora_B.copy_(term.lora_B)
            layers[name].scaling = term.scaling
        for name, value in modules.items():
            tensor_of(model, name).copy_(value)


def _check_own(model: nn.Module) -> None:
    if peft_parts(model):
        raise ValueError("the model has adapters of PEFT: save and load them with PEFT (save_pretrained, load_adapter)")
    if any(is_sharded(tensor) for _, tensor in named_tensors(model)):
        raise ValueError("the model is sharded: use the whole model, after save_quantized and load_quantized")
    layers = quantized_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized layer: call quantize_model first")
    if away := next((name for name, layer in layers.items() if layer.codes.is_meta), None):
        raise ValueError(
            f"layer {away!r} is on the meta device, offloaded or not loaded: load the model without offload"
        )


def _own_terms(model: nn.Module) -> dict[str, Factors]:
    """The adapters of a model's layers, lora_A over columns."""
    layers = {name: layer for name, layer in quantized_layers(model).items() if layer.lora_A is not None}
    if not layers:
        raise ValueError("no layer has an adapter of its own: quantize_model with a rank, or name= a user adapter")
    if disabled := next((name for name, layer in layers.items() if not layer.adapter_enabled), None):
        raise ValueError(f"the adapter of layer {disabled!r} is disabled: call its enable_adapter first")
    return {name: layer.start_terms()[0] for name, layer in layers.items()}


def _named_terms(model: nn.Module, name: str) -> dict[str, Factors]:
    if name not in loaded_adapters(model):
        raise ValueError(f"no adapter {name!r} is loaded; loaded are {sorted(loaded_adapters(model))}")
    slots = {layer_name: layer.slots for layer_name, layer in layers_with_slots(model).items()}
    return {layer_name: own.loaded[name].factors for layer_name, own in slots.items() if name in own.loaded}


def _file_tensors(layers: Mapping[str, QuantLoRAModule], adapters: Mapping[str, Factors]):
    for name, term in adapters.items():
        if reason := tensors_of.unsupported(layers[name]):
            raise ValueError(f"layer {name!r}: {reason}")
        pair = tensors_of.to_file(layers[name], term)
        for end, tensor in zip(tensors_of.keys_of(layers[name]), pair, strict=True):
            yield f"{PREFIX}{name}{end}", tensor


def _trained_modules(model: nn.Module) -> list[str]:
    """The dense modules that are trained beside the adapters. Raises ValueError for those that PEFT could not load."""
    adapters = {id(parameter) for parameter in adapter_parameters(model).values()}
    modules = list(named_modules(model))
    trained = [
        (name, module)
        for name, module in modules
        if any(p.requires_grad and id(p) not in adapters for p in module.parameters(recurse=False))
    ]
    for name, module in trained:
        if isinstance(module, QuantLoRAModule):
            raise ValueError(
                f"the bias of the quantized layer {name!r} is trained, which PEFT's files do not hold: freeze it, or "
                "keep the model with save_quantized"
            )
        same = [other for other, _ in modules if other.endswith(name) and other != name]
        if not name or same or any(isinstance(inner, QuantLoRAModule) for inner in module.modules()):
            raise ValueError(
                f"the trained module {name!r} cannot be named in modules_to_save, where PEFT would take it for "
                f"{same[0] if same else 'more'!r}, too: freeze it, or keep the model with save_quantized"
            )
    return [name for name, _ in trained]
