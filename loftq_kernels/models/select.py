"""Which layers of a model are quantized, in which batches, and why the others are not."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from loftq_kernels.formats import empty_packed
from loftq_kernels.initializers import InputStatistics, LayerConfig
from loftq_kernels.models.config import HEAD_NAMES, QuantConfig
from loftq_kernels.models.patterns import check_patterns
from loftq_kernels.models.ties import reason_against_untying
from loftq_kernels.nn.adapters import peft_parts, quantized_layers
from loftq_kernels.nn.extras import reason_of_extras
from loftq_kernels.nn.kinds import LAYER_TYPES, LayerKind, kind_of
from loftq_kernels.nn.names import matches
from loftq_kernels.nn.wrappers import named_modules, unwrapped
from loftq_kernels.ops.checks import is_sharded
from loftq_kernels.storage.packing import num_groups
from loftq_kernels.threads import available_cpus

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
    shares_bias: bool = False  # with a module that keeps it
    tied_to: str = ""  # of a head: the embedding whose weight it shares, which keeps that weight

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


def select_layers(model: nn.Module, cfg: QuantConfig, *, values: bool = True) -> Selection:
    """The layers of a model that cfg asks for. Without ``values`` it may be on the meta device.

    Raises ValueError for a pattern that matches nothing (see `check_patterns`), for a model that is itself a layer, and
    for modules_to_save that are quantized already.
    """
    check_patterns(model, cfg)
    selection = Selection(already=list(quantized_layers(model)))
    if saved := [name for name in selection.already if cfg.saves(name)]:
        raise ValueError(f"modules_to_save: {saved[0]!r} is quantized already and cannot be trained in full")
    context = Context(model, cfg, values)
    for module, names in context.names_of.items():
        kind = kind_of(module)
        if kind is None or kind.layer_type not in cfg.layer_types or names[0] in selection.already:
            continue
        if names[0] == "":
            raise ValueError(
                f"the model is itself an nn.{type(module).__name__} and cannot replace itself: use "
                "QuantLoRALinear.from_linear, QuantLoRAConv2d.from_conv or QuantLoRAEmbedding.from_embedding"
            )
        layer_cfg = cfg.for_layer(*names)
        reason = context.reason_to_skip(module, names, kind, layer_cfg)
        if reason is None:
            limited, note = limited_rank(layer_cfg, tuple(kind.matrix_of(module).shape))
            shared, tied_to = context.shares_bias(module), context.embedding_of(module)
            notes = "; ".join(filter(None, (note, tied_to and f"was tied to {tied_to}, which keeps its own weight")))
            selection.candidates.append(
                Candidate(tuple(names), module, kind, limited, note=notes, shares_bias=shared, tied_to=tied_to)
            )
        else:
            selection.skipped[names[0]] = reason
    return selection


def check_overrides(model: nn.Module, cfg: QuantConfig, selection: Selection) -> None:
    """An override must take effect: raise ValueError for one that names no layer, one that is left dense for another
    reason, or only such as an earlier and wider override takes."""
    modules = dict(named_modules(model, remove_duplicate=False))
    chosen = {name for candidate in selection.candidates for name in candidate.names} | {*selection.already}
    reached: dict[str, set[str]] = {}  # pattern -> names of modules that it matches
    for pattern, changes in cfg.overrides.items():
        mine = {name for name in modules if matches(name, pattern)}
        if first := next((earlier for earlier, names in reached.items() if mine < names), None):
            raise ValueError(f"overrides: {first!r} stands before {pattern!r} and matches all of it: put it behind")
        reached[pattern] = mine
        if changes is None or not mine or chosen & mine:
            continue
        if reason := _no_effect(cfg, selection, pattern, {name: modules[name] for name in sorted(mine)}):
            raise ValueError(f"overrides: {pattern!r} changes no layer: {reason}")


def _no_effect(cfg: QuantConfig, selection: Selection, pattern: str, matched: dict[str, nn.Module]) -> str | None:
    """Why an override of these modules changes no layer; None for that of a whole block without layers of the types."""
    if left := next((name for name in selection.skipped if name in matched), None):
        return f"{left!r} {selection.skipped[left]}"
    kinds = {kind.layer_type for module in matched.values() if (kind := kind_of(module)) is not None}
    if not kinds:
        return f"{next(iter(matched))!r} is no layer that can be quantized"
    return None if pattern.endswith(".*") else f"layer_types={cfg.layer_types} leaves out {', '.join(sorted(kinds))}"


class Context:
    """What the reasons need to know of the whole model."""

    def __init__(self, model: nn.Module, cfg: QuantConfig, values: bool = True):
        self.cfg, self.values = cfg, values
        self.names_of: dict[nn.Module, list[str]] = defaultdict(list)
        self.owners: dict[int, list[str]] = defaultdict(list)  # id of a parameter -> names
        for name, module in named_modules(model, remove_duplicate=False):
            if module not in self.names_of:
                for key, parameter in module.named_parameters(recurse=False):
                    self.owners[id(parameter)].append(f"{name}.{key}" if name else key)
            self.names_of[module].append(name)
        self.of_peft = peft_parts(unwrapped(model))
        self.read_by_peft = {base for part in self.of_peft if (base := _read_directly(part)) is not None}
        self.heads = output_heads(model)
        self.model = model

    def reason_to_skip(
        self, module: nn.Module, names: list[str], kind: LayerKind, layer_cfg: LayerConfig | None
    ) -> str | None:
        return self.reason_of_name(module, names, layer_cfg) or self._reason_of_module(
            module, names[0], kind, layer_cfg
        )

    def reason_of_name(self, module: nn.Module, names: list[str], layer_cfg: LayerConfig | None) -> str | None:
        """Why cfg leaves a layer dense, whatever its weight is; None where it does not."""
        if self.cfg.saves(*names):
            return "stays dense and is trained, as modules_to_save says"
        if module in self.of_peft:
            return "is PEFT's: an adapter, a copy in its modules_to_save or a prompt encoder"
        if not self.cfg.selects(*names):
            return "excluded by include/exclude patterns"
        if not self.cfg.quantize_head and self._is_head(module):
            return "is the output head, which quantize_head=True quantizes"
        if layer_cfg is not None and module in self.read_by_peft:
            return "has a weight that PEFT reads directly, for target_parameters or trainable_token_indices"
        return LEFT_DENSE if layer_cfg is None else None

    def _reason_of_module(self, module: nn.Module, name: str, kind: LayerKind, layer_cfg: LayerConfig) -> str | None:
        if is_lazy(module.weight):
            return f"is a {type(module).__name__} without a shape: run the model once, then quantize it"
        if reason := kind.why_not(module):
            return reason
        return (
            self._reason_of_tie(module, name)
            or _reason_of_weight(module.weight, kind, self.values)
            or self._reason_of_bias(module)
            or reason_of_extras(module, kind)
            or _reason_of_size(module, kind, layer_cfg)
        )

    def _reason_of_tie(self, module: nn.Module, name: str) -> str | None:
        """Why a layer whose weight others have, too, stays dense; None for a head that its config asks for by
        quantize_head and that shares it with the embedding alone, and for that embedding once the head is quantized.
        """
        owners = self.owners[id(module.weight)]
        others = [owner for owner in owners if owner != f"{name}.weight"]
        if not others:
            return None
        shared = f"its weight is shared with {', '.join(others)}"
        pair = [*map(self._module_of, owners)]
        heads = [one for one in pair if self._is_head(one)]
        if not self.cfg.quantize_head or len(pair) != 2 or len(heads) != 1 or not any(map(_is_embedding, pair)):
            return shared
        if against := reason_against_untying(self.model, {*owners}):
            return f"{shared}, and {against}"
        if module is heads[0]:
            return None
        names = self.names_of[heads[0]]
        of_head = self.reason_to_skip(heads[0], names, kind_of(heads[0]), self.cfg.for_layer(*names))
        return None if of_head is None and "linear" in self.cfg.layer_types else shared

    def embedding_of(self, module: nn.Module) -> str:
        """The name of the embedding that a head, which may be quantized, shares its weight with; "" where none."""
        owners = [*map(self._module_of, self.owners[id(module.weight)])] if self._is_head(module) else []
        return next((self.names_of[one][0] for one in owners if _is_embedding(one)), "")

    def _module_of(self, parameter: str) -> nn.Module:
        return self.model.get_submodule(parameter.rpartition(".")[0])

    def _is_head(self, module: nn.Module) -> bool:
        return module in self.heads or any(map(_is_head_name, self.names_of[module]))

    def _reason_of_bias(self, module: nn.Module) -> str | None:
        """Why a bias that other modules have, too, cannot stay one parameter."""
        bias = getattr(module, "bias", None)
        if not self.shares_bias(module) or (bias.dtype, bias.device) == (module.weight.dtype, module.weight.device):
            return None
        weight = module.weight
        return (
            f"its bias, {bias.dtype} on {bias.device}, is shared with other modules, and would become a copy in the "
            f"weight's {weight.dtype} on {weight.device}"
        )

    def shares_bias(self, module: nn.Module) -> bool:
        """Whether another module, or the same one by another name, has the same parameter as the module's bias."""
        return len(self.owners[id(getattr(module, "bias", None))]) > 1


def output_heads(model: nn.Module) -> set[nn.Module]:
    """The output heads as transformers' models tell them, of the model and of models inside it; PEFT may wrap them."""
    heads: set[nn.Module] = set()
    for _, module in named_modules(model):
        get_head = getattr(module, "get_output_embeddings", None)
        try:
            head = get_head() if callable(get_head) else None
        except (NotImplementedError, AttributeError):  # of models that have no head
            continue
        while isinstance(head, nn.Module):
            heads.add(head)
            head = getattr(head, "base_layer", None)
    return heads


def _is_embedding(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind is not None and kind.layer_type == "embedding"


def _is_head_name(name: str) -> bool:
    name = name.removesuffix(".base_layer")  # where PEFT keeps the layer that it wraps
    return any(matches(name, pattern) for pattern in HEAD_NAMES)


def _read_directly(module: nn.Module) -> nn.Module | None:
    """The layer inside one of PEFT's wrappers that does not call it, but reads its weight; None for other modules."""
    reads = type(module).__name__ in ("ParamWrapper", "TrainableTokensLayer")
    return getattr(module, "base_layer", None) if reads else None


def _reason_of_weight(weight: Tensor, kind: LayerKind, values: bool) -> str | None:
    if is_sharded(weight):
        return "its weight is sharded: quantize the whole model, then call fully_shard"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if weight.dtype in _NARROW:
        return f"its weight is {weight.dtype}, of which a scale stands elsewhere: load the model dequantized"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if weight.layout != torch.strided:
        return f"its weight has layout {weight.layout}"
    if weight.dim() != kind.dims:
        return f"its weight has shape {tuple(weight.shape)}, not the {kind.dims} dimensions of its kind"
    return "its weight is on the meta device: it has no values" if weight.is_meta and values else None


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
    limited = replace(cfg, rank=most)
    scaled = "" if cfg.lora_alpha is None else f"; scaling {limited.scaling:g}"
    return limited, f"rank {cfg.rank} limited to {most}, {what}{scaled}"


def in_batches(candidates: list[Candidate]) -> Iterator[list[Candidate]]:
    """Layers that an initializer can take together: of one shape, dtype, device and config, all with statistics or
    none. The list is emptied, so that a layer is held by nobody once its batch is done."""
    groups = alike(candidates)
    candidates.clear()
    for group in groups:
        # On a CPU each thread of the initializer takes a layer of its own.
        most = max(_LAYERS_PER_BATCH, available_cpus()) if group[0].weight.is_cpu else _LAYERS_PER_BATCH
        most = math.ceil(len(group) / math.ceil(len(group) / most))  # No layer is left over for a batch of its own.
        while group:
            batch = group[:most]
            del group[:most]
            yield batch


def alike(candidates: list[Candidate]) -> list[list[Candidate]]:
    """In groups that can go together; by a function of its own, whose variables hold no layer while batches run."""
    groups: dict[tuple, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        weight, known = candidate.weight, candidate.statistics is not None
        groups[tuple(weight.shape), weight.dtype, weight.device, candidate.cfg, known].append(candidate)
    return list(groups.values())


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
        if is_lazy(tensor):
            return f"a parameter of {type(module).__name__} without a shape before the model has run"
        if tensor.dim() < 2:
            return "a vector"
        return (
            f"a {tensor.dim()}-D parameter of {type(module).__name__}, which is no layer that can be quantized "
            f"(those are {', '.join(LAYER_TYPES)})"
        )

    return reason
