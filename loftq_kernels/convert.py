"""`quantize_model`: replace the linear layers of a model, in place, and report what that did."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from loftq_kernels import packing
from loftq_kernels.config import QuantConfig
from loftq_kernels.initializers import initialize
from loftq_kernels.nn import QuantLoRALinear
from loftq_kernels.ops.functional import check_finite

_LAYERS_A_BATCH = 16  # initialized before they are swapped in: bounds the memory that holds finished layers


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer: its error ||W - Q - s B A||_F / ||W||_F and the bytes it took and takes."""

    name: str
    out_features: int
    in_features: int
    format: str
    rank: int | None
    error: float
    bytes_before: int
    bytes_after: int
    packed_bytes: int

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
        lines.append(
            f"{len(self.layers)} layers, {self.bits_per_weight:.3f} bits/weight, mean error {self.error:.4f}, "
            f"{self.bytes_before / 2**20:.1f} -> {self.bytes_after / 2**20:.1f} MiB, {self.seconds:.1f} s"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Candidate:
    names: tuple[str, ...]  # a module used in several places has several names
    module: nn.Module
    cfg: QuantConfig

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features]; transformers' Conv1D stores the transpose."""
        weight = self.module.weight.detach()
        return weight.T if is_conv1d(self.module) else weight


def is_conv1d(module: nn.Module) -> bool:
    """Whether module is transformers' Conv1D: y = x @ weight + bias with weight [in, out]; imports nothing."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def quantize_model(
    model: nn.Module,
    cfg: QuantConfig | None = None,
    *,
    progress: bool = True,
    freeze: bool = True,
    device: torch.device | str | None = None,
) -> QuantizationReport:
    """Replace `nn.Linear` (and transformers' Conv1D) by `QuantLoRALinear`, in place, as cfg says.

    Same-shape layers go through the initializer together. A layer that cannot be quantized is left as it is, with the
    reason in the report: a subclass of nn.Linear, a weight shared with another module, hooks, a rank above its smaller
    side. Layers are swapped as they are done, so a model whose conversion was cut short (Ctrl-C, or scales
    of a later layer that do not fit) still works, and a second call goes on.

    Args:
        model: changed in place; its modules keep their device and training mode.
        cfg: default `QuantConfig()`: LoftQ, NF4, rank 16.
        progress: show a bar on standard error.
        freeze: also set requires_grad=False on every parameter that is not an adapter's.
        device: where to compute, if not where the weights are.

    Raises ValueError, before anything is changed, for a weight with NaN or Inf (naming layer and row), for a model that
    is itself an nn.Linear, and when no layer matches.
    """
    cfg = cfg or QuantConfig()
    if not isinstance(cfg, QuantConfig):
        raise TypeError(f"cfg must be a QuantConfig, got {cfg!r}")
    started = time.perf_counter()
    report = QuantizationReport()
    candidates = list(_candidates(model, cfg, report.skipped))
    already = any(isinstance(module, QuantLoRALinear) for module in model.modules())
    if not candidates and not already:
        raise ValueError(
            f"no layer to quantize: include={cfg.include}, exclude={cfg.exclude}, skipped: {report.skipped}"
        )
    for candidate in candidates:
        check_finite(candidate.weight, f"{candidate.names[0]}.weight")
    try:
        with tqdm(total=len(candidates), desc="quantize", unit="layer", disable=not progress) as bar:
            for batch in _batches(candidates):
                report.layers += _replace(model, batch, device, bar)
    finally:  # layers that were swapped before an interruption are as they would be after a whole run
        if freeze:
            train_only_adapters(model)
    order = {candidate.names[0]: i for i, candidate in enumerate(candidates)}
    report.layers.sort(key=lambda layer: order[layer.name])
    report.seconds = time.perf_counter() - started
    return report


def train_only_adapters(model: nn.Module) -> None:
    """requires_grad = True for every lora_A and lora_B of quantized layers, False for all other parameters."""
    adapters = set()
    for module in model.modules():
        if isinstance(module, QuantLoRALinear):
            adapters.update(id(p) for p in (module.lora_A, module.lora_B) if p is not None)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in adapters)


def merge_adapters(model: nn.Module, *, requantize: bool = False) -> dict[str, float]:
    """`QuantLoRALinear.merge_adapter` of every layer of a model, in place: the error that each merge added, by name.

    Raises ValueError, naming a layer and before anything is changed, where an adapter can only be merged with
    ``requantize=True``, or is disabled.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLoRALinear)}
    for name, layer in layers.items():
        try:
            layer.check_mergeable(requantize=requantize)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
    return {name: layer.merge_adapter(requantize=requantize) for name, layer in layers.items()}


def _candidates(model: nn.Module, cfg: QuantConfig, skipped: dict[str, str]) -> Iterator[_Candidate]:
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
        if not (isinstance(module, nn.Linear) or is_conv1d(module)):
            continue
        if names[0] == "":
            raise ValueError(
                "the model is itself an nn.Linear and cannot replace itself: use QuantLoRALinear.from_linear"
            )
        layer_cfg = cfg.for_layer(names[0])
        reason = _reason_to_skip(module, names[0], cfg, layer_cfg, owners)
        if reason is None:
            yield _Candidate(tuple(names), module, layer_cfg)
        else:
            skipped[names[0]] = reason


def _reason_to_skip(
    module: nn.Module, name: str, cfg: QuantConfig, layer_cfg: QuantConfig | None, owners: dict[int, list[str]]
) -> str | None:
    if not cfg.selects(name):
        return "excluded by include/exclude patterns"
    if layer_cfg is None:
        return "left dense by an override"
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, a subclass of nn.Linear that may read its weight directly"
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
    smaller = min(weight.shape)
    if smaller == 0 or (layer_cfg.rank or 0) > smaller:
        return f"rank={layer_cfg.rank} exceeds the smaller side of its shape {tuple(weight.shape)}"
    in_features = weight.shape[0] if is_conv1d(module) else weight.shape[1]
    groups = packing.num_groups(in_features, layer_cfg.group_size)
    if layer_cfg.adapter == "qalora" and (layer_cfg.rank or 0) > groups:
        return f"rank={layer_cfg.rank} of adapter='qalora' exceeds its {groups} groups"
    return None


def _batches(candidates: list[_Candidate]) -> Iterator[list[_Candidate]]:
    """Layers that an initializer can take together: same shape, dtype, device and options."""
    groups: dict[tuple, list[_Candidate]] = defaultdict(list)
    for candidate in candidates:
        weight = candidate.weight
        groups[tuple(weight.shape), weight.dtype, weight.device, repr(candidate.cfg)].append(candidate)
    for group in groups.values():
        iterator = iter(group)
        while batch := list(itertools.islice(iterator, _LAYERS_A_BATCH)):
            yield batch


def _replace(
    model: nn.Module, batch: list[_Candidate], device: torch.device | str | None, bar: tqdm
) -> Iterator[LayerReport]:
    """Initialize the layers of a batch together, then swap each in."""
    cfg = batch[0].cfg
    names = [f"{candidate.names[0]}.weight" for candidate in batch]
    inits = initialize([c.weight for c in batch], cfg, device=device, progress=bar.update, names=names)
    for candidate, init in zip(batch, inits, strict=True):
        old = candidate.module
        layer = QuantLoRALinear.from_init(init, old.bias, dtype=old.weight.dtype).train(old.training)
        for name in candidate.names:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer)
        yield LayerReport(
            name=candidate.names[0],
            out_features=layer.out_features,
            in_features=layer.in_features,
            format=layer.format.name,
            rank=layer.rank,
            error=init.error,
            bytes_before=_module_bytes(old),
            bytes_after=_module_bytes(layer),
            packed_bytes=layer.packed.nbytes,
        )


def _module_bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in itertools.chain(module.parameters(), module.buffers()))
