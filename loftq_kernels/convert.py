"""`quantize_model`: replace the layers of a model, in place, and report what that did."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from loftq_kernels import packing
from loftq_kernels.config import QuantConfig
from loftq_kernels.formats import empty_packed
from loftq_kernels.initializers import AdapterInit, InputStatistics, initialize, needs_statistics, takes_statistics
from loftq_kernels.initializers.statistics import check_statistics
from loftq_kernels.nn import QuantLoRAConv1d, QuantLoRAConv2d, QuantLoRAEmbedding, QuantLoRALinear, QuantLoRAModule
from loftq_kernels.nn.embedding import unsupported
from loftq_kernels.ops.functional import check_finite
from loftq_kernels.plan import BitPlan
from loftq_kernels.progress import tqdm

_LEFT_DENSE = "left dense by an override"
_LAYERS_A_BATCH = 16  # initialized before they are swapped in: bounds the memory that holds finished layers


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer: its error ||W - Q - s B A||_F / ||W||_F and the bytes it took and takes.

    ``weighted_error`` is that of the layer's output on calibration data, where the initializer was given statistics.
    """

    name: str
    out_features: int
    in_features: int
    format: str
    rank: int | None
    error: float
    bytes_before: int
    bytes_after: int
    packed_bytes: int
    weighted_error: float | None = None

    @property
    def bits_per_weight(self) -> float:
        """Of the packed weight alone: codes, scales, offsets and code book."""
        return 8 * self.packed_bytes / (self.out_features * self.in_features)


@dataclass
class QuantizationReport:
    """What `quantize_model` did: quantized layers, skipped ones with the reason, and the time it took."""

    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Of the packed weights of all layers together."""
        weights = sum(layer.out_features * layer.in_features for layer in self.layers)
        return 8 * sum(layer.packed_bytes for layer in self.layers) / max(weights, 1)

    @property
    def error(self) -> float:
        """Mean of the layers' relative errors."""
        return sum(layer.error for layer in self.layers) / max(len(self.layers), 1)

    @property
    def weighted_error(self) -> float | None:
        """Mean of the layers' weighted errors; None where no layer has one."""
        known = [layer.weighted_error for layer in self.layers if layer.weighted_error is not None]
        return sum(known) / len(known) if known else None

    def __str__(self) -> str:
        lines = [f"{'layer':<44} {'shape':>13} {'format':>8} {'rank':>5} {'bits/w':>7} {'error':>7}"]
        for layer in self.layers:
            rank = "-" if layer.rank is None else layer.rank
            shape = f"{layer.out_features}x{layer.in_features}"
            lines.append(
                f"{layer.name:<44} {shape:>13} {layer.format:>8} {rank:>5} "
                f"{layer.bits_per_weight:>7.3f} {layer.error:>7.4f}"
            )
        lines += [f"{name:<44} skipped: {reason}" for name, reason in self.skipped.items()]
        output = ""
        if self.weighted_error is not None:
            unknown = sum(layer.weighted_error is None for layer in self.layers)
            without = f"; {unknown} layers without statistics" if unknown else ""
            output = f" (of outputs: {self.weighted_error:.4f}{without})"
        lines.append(
            f"{len(self.layers)} layers, {self.bits_per_weight:.3f} bits/weight, mean error {self.error:.4f}{output}, "
            f"{self.bytes_before / 2**20:.1f} -> {self.bytes_after / 2**20:.1f} MiB, {self.seconds:.1f} s"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class Candidate:
    names: tuple[str, ...]  # a module used in several places has several names
    module: nn.Module
    cfg: QuantConfig

    @property
    def weight(self) -> Tensor:
        """The matrix that is quantized, [out_features, in_features]."""
        return weight_matrix(self.module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether module is transformers' Conv1D: y = x @ weight + bias with weight [in, out]; imports nothing."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


_CONVOLUTIONS = {nn.Conv1d: QuantLoRAConv1d, nn.Conv2d: QuantLoRAConv2d}


def layer_type(module: nn.Module) -> str | None:
    """Which of `LAYER_TYPES` a dense module belongs to, whether or not it can be quantized; None for all others."""
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return "linear"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    return "embedding" if isinstance(module, nn.Embedding) else None


def weight_matrix(module: nn.Module) -> Tensor:
    """A dense layer's weight as the matrix that is quantized: [out_features, in_features], a convolution's kernel
    flattened to [c_out, c_in / groups * k * k], an embedding's table as it is; transformers' Conv1D stores the
    transpose."""
    weight = module.weight.detach()
    return weight.T if is_conv1d(module) else weight.flatten(1)


def _quantized(module: nn.Module, init: AdapterInit) -> QuantLoRAModule:
    """The layer that takes the place of a dense one."""
    dtype = module.weight.dtype
    if type(module) in _CONVOLUTIONS:
        layer = _CONVOLUTIONS[type(module)].from_init(init, module)
    elif isinstance(module, nn.Embedding):
        layer = QuantLoRAEmbedding.from_init(init, module.padding_idx, dtype=dtype)
    else:
        layer = QuantLoRALinear.from_init(init, module.bias, dtype=dtype)
    return layer.train(module.training)


def quantize_model(
    model: nn.Module,
    cfg: QuantConfig | None = None,
    *,
    statistics: Mapping[str, InputStatistics] | None = None,
    plan: BitPlan | str | Path | None = None,
    progress: bool = True,
    freeze: bool = True,
    device: torch.device | str | None = None,
) -> QuantizationReport:
    """Replace `nn.Linear` (and transformers' Conv1D) by `QuantLoRALinear`, in place, as cfg says; convolutions and
    embeddings by `QuantLoRAConv1d`, `QuantLoRAConv2d` and `QuantLoRAEmbedding` where ``cfg.layer_types`` asks for it.

    Same-shape layers go through the initializer together. A layer that cannot be quantized is left as it is, with the
    reason in the report: a subclass of nn.Linear (or of the others), a weight shared with another module, hooks, a rank
    above its smaller side, a depthwise convolution that would grow, adapter="qalora" for any but a linear layer. Layers
    are swapped as they are done, so a model whose conversion was cut short (Ctrl-C, or scales of a later layer that do
    not fit) still works, and a second call goes on.

    Args:
        model: changed in place; its modules keep their device and training mode.
        cfg: default `QuantConfig()`: LoftQ, NF4, rank 16.
        statistics: by layer name, from `collect_activations` on the dense model: init "eora" and "aser" need them,
            "loftq" takes them. Calibration observes linear layers alone: convolutions and embeddings get the data-free
            LoftQ (their ``weighted_error`` is None), and cannot be initialized by "eora" and "aser".
        plan: a `BitPlan` or its file: chooses format, group size, rank and scales of the layers that it names; cfg says
            the rest, and all of layers that the plan does not name.
        progress: show a bar on standard error.
        freeze: also set requires_grad=False on every parameter that is not an adapter's.
        device: where to compute, if not where the weights are.

    Raises ValueError, before anything is changed, for a weight with NaN or Inf (naming layer and row), for a model that
    is itself such a layer, for a plan of another model or one that names a layer which is skipped (other than by an
    override None), when no layer matches, and for statistics that lack a layer or are of another width.
    """
    cfg = cfg or QuantConfig()
    if not isinstance(cfg, QuantConfig):
        raise TypeError(f"cfg must be a QuantConfig, got {cfg!r}")
    if statistics is not None and not isinstance(statistics, Mapping):
        raise TypeError(f"statistics must map layer names to InputStatistics, got {type(statistics).__name__}")
    started = time.perf_counter()
    report = QuantizationReport()
    if plan is not None:
        plan = plan if isinstance(plan, BitPlan) else BitPlan.load(plan)
        cfg = plan.config(cfg)
    candidates = list(quantizable_layers(model, cfg, report.skipped))
    if plan is not None:
        plan.check_model(_planned_shapes(model, candidates, report.skipped, plan, cfg))
    already = any(isinstance(module, QuantLoRAModule) for module in model.modules())
    if not candidates and not already:
        raise ValueError(
            f"no layer to quantize: include={cfg.include}, exclude={cfg.exclude}, skipped: {report.skipped}"
        )
    for candidate in candidates:
        check_finite(candidate.weight, f"{candidate.names[0]}.weight")
        _check_statistics(candidate, statistics)
    try:
        with tqdm(total=len(candidates), desc="quantize", unit="layer", disable=not progress) as bar:
            for batch in in_batches(candidates, statistics):
                report.layers += _replace(model, batch, statistics, device, bar)
    finally:  # layers that were swapped before an interruption are as they would be after a whole run
        if freeze:
            train_only_adapters(model)
    order = {candidate.names[0]: i for i, candidate in enumerate(candidates)}
    report.layers.sort(key=lambda layer: order[layer.name])
    report.seconds = time.perf_counter() - started
    return report


def _planned_shapes(
    model: nn.Module, candidates: list[Candidate], skipped: Mapping[str, str], plan: BitPlan, cfg: QuantConfig
) -> dict[str, tuple[int, ...]]:
    """Matrix shapes of the layers that a plan may name: to be quantized, left dense by hand, or done before.

    Raises ValueError, with the reason, for a layer that the plan names and that would be left dense otherwise.
    """
    shapes = {c.names[0]: tuple(c.weight.shape) for c in candidates}
    for name, module in model.named_modules():
        if isinstance(module, QuantLoRAModule):
            shapes[name] = tuple(module.packed.shape)
        elif name in skipped and skipped[name] == _LEFT_DENSE:
            shapes[name] = tuple(weight_matrix(module).shape)
        elif name in plan.layers and name in skipped:
            raise ValueError(f"the plan names layer {name!r}, which cannot be quantized: {skipped[name]}")
        elif name in plan.layers and (kind := layer_type(module)) not in (None, *cfg.layer_types):
            raise ValueError(
                f"the plan names layer {name!r}, an nn.{type(module).__name__}: layer_types={cfg.layer_types} of the "
                f"config must hold {kind!r}"
            )
    return shapes


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every lora_A and lora_B of the quantized layers of a model, by name; a layer used twice appears once."""
    return {
        f"{name}.{key}" if name else key: parameter
        for name, module in model.named_modules()
        if isinstance(module, QuantLoRAModule)
        for key in ("lora_A", "lora_B")
        if (parameter := getattr(module, key)) is not None
    }


def train_only_adapters(model: nn.Module) -> None:
    """requires_grad = True for every lora_A and lora_B of quantized layers, False for all other parameters."""
    adapters = {id(parameter) for parameter in adapter_parameters(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in adapters)


def merge_adapters(model: nn.Module, *, requantize: bool = False, scale_search: bool = False) -> dict[str, float]:
    """`merge_adapter` of every quantized layer of a model, in place: the error that each merge added, by name.

    With ``requantize=True`` old and new packed weights of all layers exist together for a while.

    Raises ValueError, naming a layer and before anything is changed, where an adapter can only be merged with
    ``requantize=True``, is disabled, or holds NaN or Inf.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLoRAModule)}
    merged = {}
    for check in (True, False):  # what takes no time first
        for name, layer in layers.items():
            try:
                if check:
                    layer.check_mergeable(requantize=requantize)
                else:
                    merged[name] = layer.merged_packed(requantize=requantize, scale_search=scale_search)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
    for name, layer in layers.items():
        layer.take_merged(merged[name][0])
    return {name: error for name, (_, error) in merged.items()}


def quantizable_layers(model: nn.Module, cfg: QuantConfig, skipped: dict[str, str]) -> Iterator[Candidate]:
    """The layers to quantize; the others of interest go into skipped with the reason."""
    names_of: dict[nn.Module, list[str]] = defaultdict(list)
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        first_visit = module not in names_of
        names_of[module].append(name)
        if first_visit:
            for key, parameter in module.named_parameters(recurse=False):
                owners[id(parameter)].append(f"{name}.{key}")
    for module, names in names_of.items():
        if layer_type(module) not in cfg.layer_types:
            continue
        if names[0] == "":
            raise ValueError(
                f"the model is itself an nn.{type(module).__name__} and cannot replace itself: use "
                "QuantLoRALinear.from_linear, QuantLoRAConv2d.from_conv or QuantLoRAEmbedding.from_embedding"
            )
        layer_cfg = cfg.for_layer(names[0])
        reason = _reason_to_skip(module, names[0], cfg, layer_cfg, owners)
        if reason is None:
            yield Candidate(tuple(names), module, layer_cfg)
        else:
            skipped[names[0]] = reason


def _reason_to_skip(
    module: nn.Module, name: str, cfg: QuantConfig, layer_cfg: QuantConfig | None, owners: dict[int, list[str]]
) -> str | None:
    if not cfg.selects(name):
        return "excluded by include/exclude patterns"
    if layer_cfg is None:
        return _LEFT_DENSE
    if reason := _reason_of_class(module):
        return reason
    weight = module.weight
    shared = [owner for owner in owners[id(weight)] if owner != f"{name}.weight"]
    if shared:
        return f"its weight is shared with {', '.join(shared)}"
    if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
        return "has hooks, which a replacement would lose"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if weight.is_meta:
        return "its weight is on the meta device: it has no values"
    matrix = weight_matrix(module)
    smaller = min(matrix.shape)
    if smaller == 0 or (layer_cfg.rank or 0) > smaller:
        return f"rank={layer_cfg.rank} exceeds the smaller side of its shape {tuple(matrix.shape)}"
    if layer_cfg.has_qalora:
        if layer_type(module) != "linear":
            return f"is an nn.{type(module).__name__}: adapter='qalora' is for linear layers alone"
        groups = packing.num_groups(matrix.shape[1], layer_cfg.group_size)
        if layer_cfg.rank > groups:
            return f"rank={layer_cfg.rank} of adapter='qalora' exceeds its {groups} groups"
    if layer_type(module) == "conv" and (packed := packed_bytes(matrix, layer_cfg)) >= matrix.nbytes:
        # A depthwise kernel has k * k columns, of which a packed row makes 64.
        return f"packed it would take {packed} bytes, its kernel {tuple(weight.shape)} takes {matrix.nbytes}"
    return None


def _reason_of_class(module: nn.Module) -> str | None:
    for base in (nn.Linear, nn.Embedding):
        if isinstance(module, base) and type(module) is not base:
            return f"is a {type(module).__name__}, a subclass of nn.{base.__name__} that may read its weight directly"
    if layer_type(module) == "conv" and type(module) not in _CONVOLUTIONS:
        return f"is a {type(module).__name__}; of convolutions, nn.Conv1d and nn.Conv2d are quantized"
    if isinstance(module, nn.Embedding) and (reason := unsupported(module)):
        return f"has {reason}"
    return None


def packed_bytes(matrix: Tensor, cfg: QuantConfig) -> int:
    """Bytes that a matrix [N, K] takes packed as cfg says: `PackedTensor.nbytes`."""
    return empty_packed(*matrix.shape, cfg.format, cfg.group_size, scale_dtype=cfg.scale_dtype, device="meta").nbytes


def in_batches(
    candidates: list[Candidate], statistics: Mapping[str, InputStatistics] | None
) -> Iterator[list[Candidate]]:
    """Layers that an initializer can take together: of one shape, dtype, device and options, all with statistics or
    none."""
    groups: dict[tuple, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        weight = candidate.weight
        known = _statistics_of(candidate, statistics) is not None
        groups[tuple(weight.shape), weight.dtype, weight.device, repr(candidate.cfg), known].append(candidate)
    for group in groups.values():
        iterator = iter(group)
        while batch := list(itertools.islice(iterator, _LAYERS_A_BATCH)):
            yield batch


def _statistics_of(candidate: Candidate, statistics: Mapping[str, InputStatistics] | None) -> InputStatistics | None:
    """What the initializer of a layer gets."""
    if statistics is None or not takes_statistics(candidate.cfg):
        return None
    return statistics.get(candidate.names[0])


def _check_statistics(candidate: Candidate, statistics: Mapping[str, InputStatistics] | None) -> None:
    """Raise ValueError unless there are, where they are needed, statistics of the layer, and they fit it."""
    name, cfg = candidate.names[0], candidate.cfg
    if layer_type(candidate.module) != "linear" and (statistics is None or name not in statistics):
        if needs_statistics(cfg):
            raise ValueError(
                f"init={cfg.init!r} needs statistics of layer {name!r}, an nn.{type(candidate.module).__name__}, but "
                "calibration knows linear layers alone: give it init='loftq' by an override"
            )
        return
    if statistics is None:
        if needs_statistics(cfg):
            raise ValueError(f"init={cfg.init!r} of layer {name!r} needs statistics=: see collect_activations")
        return
    if not takes_statistics(cfg):
        return
    if name not in statistics:
        known = ", ".join(itertools.islice(statistics, 3))
        raise ValueError(
            f"the statistics lack layer {name!r} (they hold {len(statistics)} layers: {known}, ...): they are another "
            "model's, or no token reached it; exclude it, or give it init='qlora' by an override"
        )
    check_statistics(statistics[name], f"layer {name!r}", candidate.weight.shape[1])


def _replace(
    model: nn.Module,
    batch: list[Candidate],
    statistics: Mapping[str, InputStatistics] | None,
    device: torch.device | str | None,
    bar: tqdm,
) -> Iterator[LayerReport]:
    """Initialize the layers of a batch together, then swap each in."""
    cfg = batch[0].cfg
    names = [f"{candidate.names[0]}.weight" for candidate in batch]
    own = [_statistics_of(candidate, statistics) for candidate in batch]
    own = None if own[0] is None else own
    inits = initialize([c.weight for c in batch], cfg, statistics=own, device=device, progress=bar.update, names=names)
    for candidate, init in zip(batch, inits, strict=True):
        old = candidate.module
        layer = _quantized(old, init)
        for name in candidate.names:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer)
        yield LayerReport(
            name=candidate.names[0],
            out_features=init.packed.shape[0],
            in_features=init.packed.shape[1],
            format=layer.format.name,
            rank=layer.rank,
            error=init.error,
            bytes_before=_module_bytes(old),
            bytes_after=_module_bytes(layer),
            packed_bytes=layer.packed.nbytes,
            weighted_error=init.weighted_error,
        )


def _module_bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in itertools.chain(module.parameters(), module.buffers()))
