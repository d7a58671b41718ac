"""Which layers of a model are quantized, in which batches, and why the others are not."""

from __future__ import annotations

import glob
import itertools
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from loftq_kernels import arguments
from loftq_kernels.formats import empty_packed
from loftq_kernels.initializers import InputStatistics, LayerConfig
from loftq_kernels.initializers.statistics import check_statistics as check_fit
from loftq_kernels.models.config import HEAD_NAMES, QuantConfig, matches
from loftq_kernels.models.patterns import check_patterns
from loftq_kernels.nn.adapters import is_peft_layer, quantized_layers
from loftq_kernels.nn.blocks import largest_lists
from loftq_kernels.nn.kinds import LAYER_TYPES, LayerKind, kind_of
from loftq_kernels.nn.wrappers import named_modules, submodule, unwrapped
from loftq_kernels.storage.packing import num_groups

LEFT_DENSE = "left dense by an override"
_LAYERS_PER_BATCH = 16  # initialized before they are swapped in: bounds the memory that holds finished layers
_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


@dataclass(frozen=True)
class Candidate:
    """A dense layer to quantize."""

    names: tuple[str, ...]  # a module used in several places has several names
    module: nn.Module
    kind: LayerKind
    cfg: LayerConfig
    statistics: InputStatistics | None = None
    note: str = ""  # what it gets other than its config says

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def weight(self) -> Tensor:
        """The matrix that is quantized, [out_features, in_features]."""
        return self.kind.matrix_of(self.module)


@dataclass
class Selection:
    """The layers to quantize, and the reasons why others are not; ``already`` are those that are quantized."""

    candidates: list[Candidate] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    already: list[str] = field(default_factory=list)


def select_layers(model: nn.Module, cfg: QuantConfig) -> Selection:
    """The layers of a model that cfg asks for.

    Raises ValueError for a pattern that matches nothing (see `check_patterns`), for an override that changes no layer,
    and for a model that is itself a layer.
    """
    check_patterns(model, cfg)
    selection = Selection(already=list(quantized_layers(model)))
    context = _Context(model, cfg)
    for module, names in context.names_of.items():
        kind = kind_of(module)
        if kind is None or kind.layer_type not in cfg.layer_types or names[0] in selection.already:
            continue
        if names[0] == "":
            raise ValueError(
                f"the model is itself an nn.{type(module).__name__} and cannot replace itself: use "
                "QuantLoRALinear.from_linear, QuantLoRAConv2d.from_conv or QuantLoRAEmbedding.from_embedding"
            )
        layer_cfg = cfg.for_layer(names[0])
        reason = context.reason_to_skip(module, names[0], kind, layer_cfg)
        if reason is None:
            limited, note = limited_rank(layer_cfg, tuple(kind.matrix_of(module).shape))
            selection.candidates.append(Candidate(tuple(names), module, kind, limited, note=note))
        else:
            selection.skipped[names[0]] = reason
    _check_overrides(cfg, selection)
    return selection


def _check_overrides(cfg: QuantConfig, selection: Selection) -> None:
    """An override with changes must change something: a layer that it names may be left dense for another reason."""
    chosen = [*(candidate.name for candidate in selection.candidates), *selection.already]
    for pattern, changes in cfg.overrides.items():
        if changes is None or any(matches(name, pattern) for name in chosen):
            continue
        left = next((name for name in selection.skipped if matches(name, pattern)), None)
        if left is not None:
            raise ValueError(f"overrides: {pattern!r} changes no layer: {left!r} {selection.skipped[left]}")


class _Context:
    """What the reasons need to know of the whole model."""

    def __init__(self, model: nn.Module, cfg: QuantConfig):
        self.cfg = cfg
        self.names_of: dict[nn.Module, list[str]] = defaultdict(list)
        self.owners: dict[int, list[str]] = defaultdict(list)  # id of a parameter -> names
        self.inside_peft: set[int] = set()  # ids of modules that are PEFT's adapters
        for name, module in named_modules(model, remove_duplicate=False):
            if module not in self.names_of:
                for key, parameter in module.named_parameters(recurse=False):
                    self.owners[id(parameter)].append(f"{name}.{key}" if name else key)
                if is_peft_layer(module):
                    self.inside_peft |= _peft_parts(module)
            self.names_of[module].append(name)
        self.head = output_head(model)

    def reason_to_skip(
        self, module: nn.Module, name: str, kind: LayerKind, layer_cfg: LayerConfig | None
    ) -> str | None:
        return self._reason_of_name(module, name, layer_cfg) or self._reason_of_module(module, name, kind, layer_cfg)

    def _reason_of_name(self, module: nn.Module, name: str, layer_cfg: LayerConfig | None) -> str | None:
        if self.cfg.saves(name):
            return "stays dense and is trained, as modules_to_save says"
        if id(module) in self.inside_peft:
            return "is an adapter of PEFT"
        if not self.cfg.selects(name):
            return "excluded by include/exclude patterns"
        if not self.cfg.quantize_head and (module is self.head or any(matches(name, p) for p in HEAD_NAMES)):
            return "is the output head, which quantize_head=True quantizes"
        return LEFT_DENSE if layer_cfg is None else None

    def _reason_of_module(self, module: nn.Module, name: str, kind: LayerKind, layer_cfg: LayerConfig) -> str | None:
        if reason := kind.why_not(module):
            return reason
        if shared := [owner for owner in self.owners[id(module.weight)] if owner != f"{name}.weight"]:
            return f"its weight is shared with {', '.join(shared)}"
        return (
            reason_of_extras(module, kind)
            or _reason_of_weight(module.weight)
            or _reason_of_size(module, kind, layer_cfg)
        )


def output_head(model: nn.Module) -> nn.Module | None:
    """The output head as transformers' models tell it; None where a model does not."""
    get_head = getattr(unwrapped(model), "get_output_embeddings", None)
    try:
        head = get_head() if callable(get_head) else None
    except (NotImplementedError, AttributeError):  # of models that have no head
        head = None
    return head if isinstance(head, nn.Module) else None


def _peft_parts(layer: nn.Module) -> set[int]:
    """Ids of the modules inside one of PEFT's layers, except those of the layer that it wraps."""
    base = getattr(layer, "base_layer", None)
    wrapped = {id(module) for module in base.modules()} if isinstance(base, nn.Module) else set()
    return {id(module) for module in layer.modules()} - wrapped - {id(layer)}


def _reason_of_weight(weight: Tensor) -> str | None:
    if type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if weight.dtype in _NARROW:
        return f"its weight is {weight.dtype}, of which a scale stands elsewhere: load the model dequantized"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if weight.layout != torch.strided:
        return f"its weight has layout {weight.layout}"
    return "its weight is on the meta device: it has no values" if weight.is_meta else None


def _reason_of_size(module: nn.Module, kind: LayerKind, layer_cfg: LayerConfig) -> str | None:
    matrix = kind.matrix_of(module)
    if min(matrix.shape) == 0:
        return f"its shape is {tuple(matrix.shape)}"
    if layer_cfg.rank is not None and layer_cfg.adapter not in kind.adapters:
        return f"is an nn.{type(module).__name__}: adapter={layer_cfg.adapter!r} is for linear layers alone"
    packed = packed_bytes(matrix, layer_cfg)
    if packed < matrix.nbytes:
        return None
    # A row is padded to 64 columns, of which a depthwise kernel has k * k and a layer of 4 inputs 4.
    return f"packed it would take {packed} bytes, dense its {tuple(matrix.shape)} take {matrix.nbytes}"


def packed_bytes(matrix: Tensor, cfg: LayerConfig) -> int:
    """Bytes that a matrix [N, K] takes packed as cfg says: `PackedTensor.nbytes`."""
    return empty_packed(*matrix.shape, cfg.format, cfg.group_size, scale_dtype=cfg.scale_dtype, device="meta").nbytes


def limited_rank(cfg: LayerConfig, shape: tuple[int, int]) -> tuple[LayerConfig, str]:
    """cfg with a rank that the matrix can have, and a note where that is less than asked for."""
    rows, columns = shape
    inner = num_groups(columns, cfg.group_size) if cfg.has_qalora else columns
    most = min(rows, inner)
    if cfg.rank is None or cfg.rank <= most:
        return cfg, ""
    what = "its groups" if cfg.has_qalora and inner < rows else "its smaller side"
    return replace(cfg, rank=most), f"rank {cfg.rank} limited to {most}, {what}"


# ---- what a module carries beside its weight


@cache
def _own_attributes(cls: type[nn.Module], arity: int) -> frozenset[str]:
    """Attributes that modules of a class have by themselves."""
    with torch.device("meta"):
        return frozenset(vars(cls(*(1,) * arity)))


def _extras(module: nn.Module, kind: LayerKind) -> dict[str, Any]:
    own = _own_attributes(type(module), kind.arity)
    return {name: value for name, value in vars(module).items() if name not in own}


def reason_of_extras(module: nn.Module, kind: LayerKind) -> str | None:
    """What of a module its replacement would lose: hooks, functions, tensors and modules of its own."""
    if hooks := [name.strip("_").replace("_", " ") for name, own in vars(module).items() if "hooks" in name and own]:
        return f"has hooks, which a replacement would lose ({', '.join(hooks)})"
    for key, parameter in module._parameters.items():
        if parameter is not None and (parameter._backward_hooks or parameter._post_accumulate_grad_hooks):
            return f"its {key} has hooks, which a replacement would lose"
    extras = _extras(module, kind)
    if functions := [name for name, value in extras.items() if callable(value) and not isinstance(value, type)]:
        return f"has {functions[0]!r} of its own, which a replacement would lose"
    held = [*module._parameters, *module._buffers, *module._modules]
    held += [name for name, value in extras.items() if isinstance(value, Tensor)]
    if beside := [name for name in held if name not in ("weight", "bias")]:
        return f"holds {beside[0]!r} beside its weight, which a replacement would lose"
    return None


def carry_over(old: nn.Module, new: nn.Module, kind: LayerKind) -> None:
    """Give a replacement the attributes that somebody has set on the module before it."""
    for name, value in _extras(old, kind).items():
        if not hasattr(new, name):
            setattr(new, name, value)


# ---- statistics


def with_statistics(candidates: list[Candidate], statistics: Mapping[str, InputStatistics] | None) -> list[Candidate]:
    """The candidates with the statistics that their initializers need or take.

    Layers that no token reached (`ActivationStatistics.unreached`) get the data-free way, with one warning. Raises
    ValueError for layers that lack statistics otherwise, or whose statistics do not fit.
    """
    if statistics is not None and not isinstance(statistics, Mapping):
        raise TypeError(f"statistics must map layer names to InputStatistics, got {type(statistics).__name__}")
    unreached = set(getattr(statistics, "unreached", ()))
    chosen, without = [], []
    for candidate in candidates:
        if statistics is not None and candidate.cfg.takes_statistics and candidate.name in unreached:
            without.append(candidate.name)
            chosen.append(_data_free(candidate))
        else:
            chosen.append(replace(candidate, statistics=_statistics_of(candidate, statistics)))
    if without:
        warnings.warn(
            f"no calibration token reached {len(without)} layers, which are initialized without data: "
            f"{', '.join(without[:3])}{', ...' if len(without) > 3 else ''}",
            stacklevel=3,
        )
    return chosen


def _data_free(candidate: Candidate) -> Candidate:
    cfg = candidate.cfg.changed({"init": "loftq"}) if candidate.cfg.needs_statistics else candidate.cfg
    notes = (candidate.note, "no calibration token reached it: initialized without data")
    return replace(candidate, cfg=cfg, note="; ".join(note for note in notes if note))


def _statistics_of(candidate: Candidate, statistics: Mapping[str, InputStatistics] | None) -> InputStatistics | None:
    """What the initializer of a layer gets; ValueError unless it is there, where needed, and fits."""
    name, cfg = candidate.name, candidate.cfg
    if not candidate.kind.observed and (statistics is None or name not in statistics):
        if cfg.needs_statistics:
            raise ValueError(
                f"init={cfg.init!r} needs statistics of layer {name!r}, an nn.{type(candidate.module).__name__}, but "
                "calibration knows linear layers alone: give it init='loftq' by an override"
            )
        return None
    if statistics is None:
        if cfg.needs_statistics:
            raise ValueError(f"init={cfg.init!r} of layer {name!r} needs statistics=: see collect_activations")
        return None
    if not cfg.takes_statistics:
        return None
    if name not in statistics:
        known = ", ".join(itertools.islice(statistics, 3))
        raise ValueError(
            f"the statistics lack layer {name!r} (they hold {len(statistics)} layers: {known}, ...): they are another "
            "model's, or were collected with patterns that leave it out; exclude it, or give it init='qlora' by an "
            "override"
        )
    return check_fit(statistics[name], f"layer {name!r}", candidate.weight.shape[1])


# ---- batches


def in_batches(candidates: list[Candidate]) -> Iterator[list[Candidate]]:
    """Layers that an initializer can take together: of one shape, dtype, device and config, all with statistics or
    none. The list is emptied, so that a layer is held by nobody once its batch is done."""
    groups: dict[tuple, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        weight, known = candidate.weight, candidate.statistics is not None
        groups[tuple(weight.shape), weight.dtype, weight.device, candidate.cfg, known].append(candidate)
    candidates.clear()
    for group in groups.values():
        while group:
            batch = group[:_LAYERS_PER_BATCH]
            del group[:_LAYERS_PER_BATCH]
            yield batch


# ---- LoftQ's rule of mixed precision


def first_layers(
    model: nn.Module, n: int, changes: str | Mapping[str, Any] = "nf4", *, blocks: str | None = None
) -> dict[str, dict[str, Any]]:
    """LoftQ's mixed precision: overrides that give the first n blocks of a model other settings than the rest.

        QuantConfig("nf2", overrides=first_layers(model, 4, "nf4"))     # the first four blocks 4 bits, the rest 2

    Args:
        model: holds its blocks (layers, as the paper calls them) in an `nn.ModuleList` or `nn.Sequential`.
        n: 0 .. the number of blocks.
        changes: a format, or `LayerConfig` fields, for the layers inside the first n blocks.
        blocks: the list's name, e.g. "model.layers"; None takes the list with the most parameters.

    Raises ValueError when there is no such list, when several are equally large (naming them; as in a model with an
    encoder and a decoder) and for n out of range. Source: LoftQ (Li et al., 2024), section 4.
    """
    model = unwrapped(model)
    name = _one_list(model) if blocks is None else blocks
    try:
        module = submodule(model, name)
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} has no module {name!r}") from error
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        raise ValueError(f"{name!r} is a {type(module).__name__}, not a list of blocks")
    n = arguments.whole_number("n", n)
    if not 0 <= n <= len(module):
        raise ValueError(f"n={n!r} is outside 0 .. {len(module)}, the number of blocks in {name!r}")
    changes = {"format": changes} if isinstance(changes, str) else dict(changes)
    prefix = f"{name}." if name else ""
    overrides = {}
    for child, block in itertools.islice(module._modules.items(), n):
        escaped = glob.escape(prefix + child)
        overrides[escaped if kind_of(block) is not None else f"{escaped}.*"] = changes
    return overrides


def _one_list(model: nn.Module) -> str:
    largest = largest_lists(model)
    if not largest:
        raise ValueError(f"{type(model).__name__} has no list of blocks (nn.ModuleList or nn.Sequential)")
    if len(largest) > 1:
        raise ValueError(f"several lists of blocks are equally large: {', '.join(largest)}; choose with blocks=")
    return largest[0]


def why_dense(cfg: QuantConfig, selection: Selection):
    """For `report.account`: a function that says why a dense parameter of a module is dense."""

    def reason(name: str, module: nn.Module, tensor: Tensor) -> str:
        if name in selection.skipped:
            return selection.skipped[name]
        if cfg.saves(name):
            return "trained, as modules_to_save says"
        kind = kind_of(module)
        if kind is not None and kind.layer_type not in cfg.layer_types:
            return f"layer_types={cfg.layer_types} leaves out {kind.layer_type!r}"
        if tensor.dim() < 2:
            return "a vector"
        return (
            f"a {tensor.dim()}-D parameter of {type(module).__name__}, which is no layer that can be quantized "
            f"(those are {', '.join(LAYER_TYPES)})"
        )

    return reason
