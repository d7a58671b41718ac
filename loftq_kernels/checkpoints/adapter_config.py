"""adapter_config.json, as PEFT 0.21 writes and reads it: what an adapter's tensors are scaled by and belong to."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from loftq_kernels import arguments
from loftq_kernels.nn.wrappers import named_modules
from loftq_kernels.storage import documents

CONFIG_FILE = "adapter_config.json"
_LONGEST_PATTERN = 4000

# Options that change what the tensors mean, and what to do about it.
_REFUSED = {
    "use_dora": "DoRA also scales the rows of the base: load it with PEFT",
    "lora_bias": "the adapter has biases of its own: train it with lora_bias=False, or load it with PEFT",
    "use_qalora": "PEFT's QA-LoRA divides its input by groups: load it with PEFT",
    "alora_invocation_tokens": "an activated LoRA starts at a token of each row: load it with PEFT",
    "trainable_token_indices": "it replaces rows of the embedding: load it with PEFT",
    "target_parameters": "it adapts parameters that belong to no linear layer: load it with PEFT",
    "layer_replication": "it repeats layers of the model: load it with PEFT",
}
# Options that only matter in training, or that the tensors' own names and shapes tell.
_IRRELEVANT = {
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
    ),
    *("fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout"),
    *("lora_ga_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision"),
    *("task_type", "velora_config"),
}
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class AdapterConfig:
    """What a LoRA adapter's config says about its tensors; layers are named as in the base model."""

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] | str | None = None  # the ends of names, or a regular expression
    modules_to_save: tuple[str, ...] = ()
    partial: bool = False  # whether options beside target_modules choose among the layers that it names

    def rank(self, layer: str) -> int:
        return _by_pattern(self.rank_pattern, layer, self.r)

    def scaling(self, layer: str) -> float:
        """lora_alpha / r, or / sqrt(r) with use_rslora."""
        rank = self.rank(layer)
        return _by_pattern(self.alpha_pattern, layer, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, layer: str) -> bool:
        """Whether target_modules alone says that the adapter has factors for a layer."""
        if self.partial or self.target_modules is None:
            return False
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, layer) is not None
        return ends_with(layer, self.target_modules)

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """Raises FileNotFoundError, or ValueError naming the file and the option that cannot be honoured."""
        file = folder / CONFIG_FILE
        values = documents.read_foreign(
            file, missing=f"does not exist: {folder} holds no adapter of PEFT (download those of the Hub)"
        )
        try:
            return cls._parse(values)
        except (TypeError, ValueError, re.error) as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def _parse(cls, values: dict[str, Any]) -> AdapterConfig:
        _check_options(values)
        targets, modules = values.get("target_modules"), values.get("modules_to_save") or ()
        if not isinstance(targets, str | None):
            targets = tuple(_strings("target_modules", targets))
        for pattern in (targets if isinstance(targets, str) else "", *_patterns(values)):
            _check_pattern(pattern)
        return cls(
            r=arguments.whole_number("r", values.get("r"), 1),
            lora_alpha=_alpha("lora_alpha", values.get("lora_alpha")),
            use_rslora=arguments.flag("use_rslora", values.get("use_rslora", False)),
            rank_pattern={k: arguments.whole_number(k, v, 1) for k, v in (values.get("rank_pattern") or {}).items()},
            alpha_pattern={k: _alpha(k, v) for k, v in (values.get("alpha_pattern") or {}).items()},
            target_modules=None if targets == "all-linear" else targets,
            modules_to_save=tuple(_strings("modules_to_save", modules)),
            partial=any(values.get(key) for key in ("exclude_modules", "layers_pattern"))
            or values.get("layers_to_transform") is not None,
        )

    def to_json(self, model: nn.Module) -> str:
        """The document, with what PEFT wants to know of the model."""
        values = {
            "peft_type": "LORA",
            "task_type": task_type(model),
            "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", "") or None,
            "inference_mode": True,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": 0.0,
            "use_rslora": self.use_rslora,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "target_modules": self.target_modules if isinstance(self.target_modules, str) else [*self.target_modules],
            "modules_to_save": list(self.modules_to_save) or None,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        }
        return json.dumps(values, indent=2)

    @classmethod
    def describing(
        cls, model: nn.Module, shapes: Mapping[str, tuple[int, float]], modules_to_save: Iterable[str]
    ) -> AdapterConfig:
        """The config of an adapter with these layers, each (rank, scaling): patterns name those unlike most others."""
        alphas = {layer: (rank, _plain(rank * scaling)) for layer, (rank, scaling) in shapes.items()}
        ((r, alpha), _), *_ = Counter(alphas.values()).most_common(1)
        return cls(
            r=r,
            lora_alpha=alpha,
            rank_pattern={f"^{re.escape(layer)}": rank for layer, (rank, _) in alphas.items() if rank != r},
            alpha_pattern={f"^{re.escape(layer)}": own for layer, (_, own) in alphas.items() if own != alpha},
            target_modules=target_modules(model, set(shapes)),
            modules_to_save=tuple(modules_to_save),
        )


def ends_with(name: str, ends: Iterable[str]) -> bool:
    """Whether a name is one of ends or ends with one after a dot, as PEFT reads lists of target_modules."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def target_modules(model: nn.Module, layers: set[str]) -> tuple[str, ...] | str:
    """What makes PEFT adapt exactly these of a model's modules: the ends of their names, else a regular expression."""
    ends = tuple(sorted({layer.rpartition(".")[2] for layer in layers}))
    names = {name for name, _ in named_modules(model, remove_duplicate=False) if ends_with(name, ends)}
    return ends if names == layers else "|".join(re.escape(layer) for layer in sorted(layers))


def task_type(model: nn.Module) -> str | None:
    """PEFT's, where it changes nothing but the wrapper's class: for classifiers PEFT would also ask for a new head."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        of_text = getattr(model, "main_input_name", None) == "input_ids"
        return "SEQ_2_SEQ_LM" if of_text and name.endswith(("ForConditionalGeneration", "Seq2SeqLM")) else None
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def _check_options(values: dict[str, Any]) -> None:
    if values.get("peft_type") != "LORA":
        raise ValueError(
            f"peft_type is {values.get('peft_type')!r}; of PEFT's adapters, LORA can stand on these layers"
        )
    if reason := next((f"{key}={values[key]!r}: {why}" for key, why in _REFUSED.items() if values.get(key)), None):
        raise ValueError(reason)
    if values.get("bias", "none") != "none":
        raise ValueError(f"bias={values['bias']!r}: biases of the base were trained, too: train with bias='none'")
    init = values.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_CHANGES_THE_BASE):
        raise ValueError(
            f"init_lora_weights={init!r} has changed the base that the adapter was trained on: save it in PEFT with "
            "path_initial_model_for_weight_conversion, which makes an ordinary adapter of it"
        )
    known = {own.name for own in fields(AdapterConfig)} | _REFUSED.keys() | _IRRELEVANT
    known |= {"peft_type", "bias", "init_lora_weights"}
    for key, value in values.items():
        if key not in known and value not in (None, False, 0, "", {}, []):
            raise ValueError(
                f"{key}={value!r} is an option that is not known here, and may change the product: load it with PEFT"
            )


def _by_pattern(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """PEFT's `get_pattern_key`: the first pattern that the end of the name matches, after a dot or as a whole."""
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), default)


def _check_pattern(pattern: str) -> None:
    """Raise ValueError for what is no pattern, and for one that a file may have to keep its reader busy for years."""
    if re.search(r"\)[*+{]", pattern) or len(pattern) > _LONGEST_PATTERN:
        raise ValueError(
            f"the pattern {pattern[:80]!r} repeats a group or is longer than {_LONGEST_PATTERN} characters, which can "
            "take forever to match: write it without"
        )
    re.compile(pattern)


def _patterns(values: Mapping[str, Any]) -> list[str]:
    patterns = []
    for name in ("rank_pattern", "alpha_pattern"):
        own = values.get(name) or {}
        if not isinstance(own, dict):
            raise ValueError(f"{name}={own!r} must map layers to numbers")
        patterns += own
    return patterns


def _strings(name: str, values: Any) -> list[str]:
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name}={values!r} must be a list of names")
    return list(values)


def _alpha(name: str, value: Any) -> float:
    return arguments.number(name, value, above=-1e30, below=1e30)


def _plain(value: float) -> float:
    """An int where it is one, as PEFT has it."""
    return int(value) if float(value).is_integer() else value
