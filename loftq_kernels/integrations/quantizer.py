"""`LoftqConfig` and `LoftqQuantizer`: what transformers is told of quantized models, and what it calls for them."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from loftq_kernels.calibration.activations import ActivationStatistics
from loftq_kernels.checkpoints import architecture, hosted
from loftq_kernels.checkpoints.manifest import CheckpointConfig
from loftq_kernels.checkpoints.native import packed_of, whole
from loftq_kernels.checkpoints.tensor_file import check_layers, check_places, tensor_names
from loftq_kernels.integrations.loading import Arrivals
from loftq_kernels.models.config import QuantConfig
from loftq_kernels.models.plan import BitPlan
from loftq_kernels.models.select import output_heads
from loftq_kernels.nn.adapters import peft_parts, quantized_layers, train_only_adapters
from loftq_kernels.nn.base import PACKED, QuantLoRAModule
from loftq_kernels.nn.extras import carry_over
from loftq_kernels.nn.kinds import kind_of
from loftq_kernels.nn.wrappers import named_modules, named_tensors, set_submodule, submodule
from loftq_kernels.ops.constant import restore_constants
from loftq_kernels.storage import files


class LoftqConfig(QuantizationConfigMixin):
    """What ``from_pretrained(folder, quantization_config=...)`` makes of a dense model: the fields of `QuantConfig`.

    Args:
        statistics, plan: as for `quantize_model`, a file's path or what was read from it; config.json does not keep
            them.
        fields: those of `QuantConfig`, with dtypes also by name; what they are not is an error that names near ones.

    In a folder that holds a quantized model it also says what lies in the tensors (`contents`).
    """

    def __init__(
        self,
        *,
        statistics: ActivationStatistics | Mapping[str, Any] | str | Path | None = None,
        plan: BitPlan | str | Path | None = None,
        **fields: Any,
    ):
        self.quant_method = hosted.METHOD
        self.config, self.contents = hosted.parse_section(fields)
        self.statistics, self.plan = statistics, plan

    @classmethod
    def of(cls, config: QuantConfig | None) -> LoftqConfig:
        """That of a `QuantConfig`; None where nobody knows it any more."""
        made = cls()
        made.config = config
        return made

    def to_dict(self) -> dict[str, Any]:
        return hosted.section(self.config, self.contents)

    def __getattr__(self, name: str) -> Any:
        """The fields of the `QuantConfig`."""
        if name in _FIELDS and self.__dict__.get("config") is not None:
            return getattr(self.config, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __iter__(self):
        yield from self.to_dict().items()

    def __deepcopy__(self, memo: dict) -> LoftqConfig:
        """transformers copies the config of a model, which may hold gigabytes of statistics."""
        return copy.copy(self)


_FIELDS = frozenset(field.name for field in dataclasses.fields(QuantConfig))


class LoftqQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves a model of ours.

    Of a folder that is quantized it puts empty layers into the model, which transformers fills; of a dense one it takes
    each weight as it is read and quantizes it (`Arrivals`). ``report`` is then that of `quantize_model`.
    """

    report = None
    _arrivals: Arrivals | None = None
    _placed: Mapping[str, str] = {}  # names of layers in the model -> in the folder
    _fresh: Sequence[str] = ()  # names of parameters that the folder has no tensors for

    # ---- what the quantizer can

    is_trainable = is_qat_trainable = is_compileable = True

    def is_serializable(self) -> bool:
        return True

    # ---- loading

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        parts = device_map.values() if isinstance(device_map, dict) else ()
        if not self.pre_quantized and "disk" in parts:
            raise ValueError(
                "device_map puts layers on the disk, and a dense model cannot be quantized there while it loads: "
                "quantize it without, save_pretrained it, and load that folder with this device_map"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The model's own dtype where config.json names that of an adapter, which transformers took for it."""
        dtypes = self.quantization_config.contents.dtypes if self.pre_quantized and self._contents else []
        taken, actual = (getattr(torch, name) for name in dtypes) if dtypes else (dtype, dtype)
        return actual if dtype == taken else dtype

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return self._arrivals is not None and self._arrivals.expects(param_name)

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes per weight, by which device_map="auto" divides a model among devices."""
        if self.param_needs_quantization(model, param_name):
            return self._arrivals.bytes_per_weight(param_name)
        return param.element_size()

    def get_quantize_ops(self) -> Any:
        return self._arrivals.operation()

    @property
    def _contents(self) -> hosted.Contents | None:
        return self.quantization_config.contents

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            if self._contents is not None:
                raise ValueError("the folder is dense, and this LoftqConfig is that of a quantized one: make a new one")
            self._arrivals = Arrivals(model, config.config, config.statistics, config.plan)
        elif self._contents is None:
            raise ValueError("config.json names no quantized layers: it is damaged, or not that of these tensors")
        else:
            self._place(model, [Path(file) for file in checkpoint_files or ()])

    def _place(self, model: nn.Module, checkpoint_files: list[Path]) -> None:
        """Put empty layers in the places of the dense ones, once names, kinds, shapes and tensors are found right."""
        self._placed = _places(model, self._contents)
        specs = {place: self._contents.layers[name] for place, name in self._placed.items()}
        check_places(model, CheckpointConfig(layers=specs, tensor_files=(), sha256=None))
        as_saved = self._contents.dtypes and self._contents.dtypes[1] == _name_of(model.config.dtype)
        layers = {}
        for place, spec in specs.items():
            old = submodule(model, place)
            layers[place] = spec.build(None if as_saved else old.weight.dtype)
            carry_over(old, layers[place], kind_of(old))
        if checkpoint_files:
            stored = {name: layers[place] for place, name in self._placed.items()}
            with files.open_all(checkpoint_files) as opened:
                folder = checkpoint_files[0].parent
                hosted.check_one_save(folder, self._contents.sha256, opened.metadata())
                check_layers(stored, self._contents.tied, opened)
                self._fresh = _fresh(model, self._placed, tensor_names(opened))
        for place, layer in layers.items():  # What shares its tensors with another layer waits until that is loaded.
            set_submodule(model, place, nn.Identity() if self._first_place(place) else layer)

    def _first_place(self, place: str) -> str | None:
        """Where the layer stands that this place shares; None where it has one of its own."""
        source = self._contents.tied.get(f"{self._placed[place]}.codes")
        name = None if source is None else source.rpartition(".")[0]
        return next((other for other, own in self._placed.items() if own == name), None)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.pre_quantized:
            self._finish(model)
        else:
            self.report = self._arrivals.finish()
        self._arrivals = None
        adopt_inner(model, self.quantization_config.config)

    def _finish(self, model: nn.Module) -> None:
        """Make what transformers has loaded layers again: packed tensors constant, adapters trained."""
        for place in self._placed:
            if (first := self._first_place(place)) is not None:
                set_submodule(model, place, submodule(model, first))
        for place, name in self._placed.items():
            layer, spec = submodule(model, place), self._contents.layers[name]
            restore_constants(layer, PACKED)
            if (layer.scaling, layer.adapter_enabled) != (spec.scaling, spec.adapter_enabled):
                raise ValueError(
                    f"layer {name!r} has scaling {layer.scaling:g} in the tensors and {spec.scaling:g} in config.json: "
                    "the folder is damaged"
                )
            if not (layer.scale.is_meta or bool(torch.isfinite(layer.scale).all())):
                raise ValueError(f"layer {name!r} has a scale that is not finite: the folder is damaged")
        train_only_adapters(model)
        parameters = dict(model.named_parameters())
        for name in self._contents.trained:
            if (parameter := parameters.get(_own_name(model, name, parameters))) is not None:
                parameter.requires_grad_(True)
        for name in self._fresh:
            parameters[name].requires_grad_(True)
        if self._fresh:
            warnings.warn(f"the folder has no {', '.join(self._fresh[:5])}: new, dense and trained", stacklevel=2)

    # ---- saving

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The tensors to write, with what config.json is to say of them."""
        if getattr(model, "_hf_peft_config_loaded", False):  # Then transformers writes PEFT's adapters alone.
            return None, {}
        if peft_parts(model):
            raise ValueError(
                "the model has adapters of PEFT, without which its folder would be another model: save_pretrained of "
                "the PeftModel saves those alone, and unload() or merge_and_unload() leaves a model that can be saved"
            )
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        contents = hosted.Contents.of(model)
        ignored = {*contents.tied, *(getattr(model, "_keys_to_ignore_on_save", None) or ())}
        state = {
            name: whole(tensor) for name, tensor in model.state_dict(keep_vars=True).items() if name not in ignored
        }
        _validate(model, contents, state)
        state = remove_tied_weights_from_state_dict(state, model)
        sha256 = hosted.digest(state)
        self.quantization_config.contents = dataclasses.replace(contents, sha256=sha256)
        model.config.quantization_config = self.quantization_config
        return state, {} if sha256 is None else {hosted.DIGEST_KEY: sha256}

    # ---- back to a dense model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        """Dense layers that compute the same, adapters included, in the place of the quantized ones."""
        if isinstance(dtype, str):  # as the config of a model has it once the model has been saved
            dtype = getattr(torch, dtype)
        for name, layer in quantized_layers(model).items():
            set_submodule(model, name, getattr(layer, layer.dense_copy)().to(dtype))
        for module in model.modules():
            vars(module).pop("resize_token_embeddings", None)
        return model


def _validate(model: nn.Module, contents: hosted.Contents, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError for packed tensors to be written that no layer could be made from.

    Those of other processes are not here, and those that `exclude_frozen_parameters` leaves out not in ``state``.
    """
    for name in contents.layers:
        key = f"{name}.codes"
        codes = state.get(contents.tied.get(key, key))
        if codes is not None and not codes.is_meta:
            packed_of(name, submodule(model, name), state, contents.tied).validate()


def _name_of(dtype: torch.dtype | str | None) -> str:
    return str(dtype).removeprefix("torch.")


def _places(model: nn.Module, contents: hosted.Contents) -> dict[str, str]:
    """Where in the model the folder's layers belong: name in the model -> name in the folder.

    A base model inside the saved one, or around it, has names with a prefix less or more, and may lack the head.
    """
    modules = dict(named_modules(model, remove_duplicate=False))
    placed = {_own_name(model, name, modules): name for name in contents.layers}
    absent = [name for place, name in placed.items() if place not in modules]
    if absent and type(model).__name__ in (getattr(model.config, "architectures", None) or ()):
        raise ValueError(f"{type(model).__name__} has no layer {absent[0]!r}, which config.json names")
    if len(absent) == len(placed):
        raise ValueError(f"{type(model).__name__} has none of the quantized layers, such as {absent[0]!r}")
    if absent:
        warnings.warn(f"{type(model).__name__} has no place for {', '.join(absent[:5])}, left out", stacklevel=2)
    return {place: name for place, name in placed.items() if place in modules}


def _fresh(model: nn.Module, places: Iterable[str], stored: Iterable[str]) -> list[str]:
    """The model's dense parameters that a folder has no tensors for: those of a new head.

    Raises ValueError where the model is of the class that the folder was saved from, which had them all.
    """
    tensors = dict(named_tensors(model, persistent=True))
    found = {_own_name(model, name, tensors) for name in stored}
    for pair in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if not found.isdisjoint(pair):
            found |= set(pair)
    shared = {id(tensors[name]) for name in found & tensors.keys()}
    inside = tuple(f"{place}." for place in places)
    missing = [n for n, own in tensors.items() if not n.startswith(inside) and n not in found and id(own) not in shared]
    for attribute in ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_save"):
        patterns = getattr(model, attribute, None) or ()
        missing = [name for name in missing if not any(re.search(pattern, name) for pattern in patterns)]
    if missing and type(model).__name__ in (getattr(model.config, "architectures", None) or ()):
        raise ValueError(
            f"the files lack {missing[0]!r}, which is neither in them nor a layer that config.json names: they are "
            "truncated, or those of another model"
        )
    return [name for name in missing if isinstance(tensors[name], nn.Parameter)]


def _own_name(model: nn.Module, name: str, known: Mapping[str, Any]) -> str:
    """The model's name for what a folder calls ``name``: as it is, or without or with the prefix of base models."""
    prefix = f"{model.base_model_prefix}."
    names = (name, name.removeprefix(prefix), prefix + name)
    return next((own for own in names if own in known), name)


def _refuse_to_resize(*args: Any, **kwargs: Any) -> None:
    """In the place of the method of a model whose head is quantized, which would find that out half-way."""
    raise ValueError(
        "the output head is quantized and cannot be resized: call resize_token_embeddings before quantizing"
    )


def adopt_inner(model: nn.Module, cfg: QuantConfig | None) -> None:
    """Give the models inside a model what their own ``save_pretrained`` needs, and let no save rename tensors."""
    for module in model.modules():
        if architecture.is_of_transformers(module):
            module._weight_conversions = []
            if any(isinstance(head, QuantLoRAModule) for head in output_heads(module)):
                module.resize_token_embeddings = _refuse_to_resize
            if module is not model:
                module.hf_quantizer = LoftqQuantizer(LoftqConfig.of(cfg), pre_quantized=True)
