"""`quantize_model`: replace the layers of a model, in place, and report what that did."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from loftq_kernels import hosts
from loftq_kernels.initializers import AdapterInit, InputStatistics, initialize, parallel
from loftq_kernels.models.config import QuantConfig
from loftq_kernels.models.inputs import with_statistics
from loftq_kernels.models.plan import BitPlan
from loftq_kernels.models.report import LayerReport, QuantizationReport, account, module_bytes
from loftq_kernels.models.select import (
    LEFT_DENSE,
    Candidate,
    Selection,
    check_overrides,
    in_batches,
    select_layers,
    why_dense,
)
from loftq_kernels.models.ties import untie
from loftq_kernels.nn.adapters import quantized_layers, train_modules, train_only_adapters
from loftq_kernels.nn.extras import carry_over
from loftq_kernels.nn.kinds import kind_of, matrix_shape
from loftq_kernels.nn.wrappers import named_modules, set_submodule, unwrapped
from loftq_kernels.ops.values import check_finite
from loftq_kernels.progress import progress_bar

_REASONS = 5  # of layers that are skipped, in the error where all are


def quantize_model(
    model: nn.Module,
    cfg: QuantConfig | None = None,
    *,
    statistics: Mapping[str, InputStatistics] | None = None,
    plan: BitPlan | str | Path | None = None,
    progress: bool | None = None,
    freeze: bool = True,
    device: torch.device | str | None = None,
) -> QuantizationReport:
    """Replace `nn.Linear` (and transformers' Conv1D) by `QuantLoRALinear`, in place, as cfg says; convolutions and
    embeddings by `QuantLoRAConv1d`, `QuantLoRAConv2d` and `QuantLoRAEmbedding` where ``cfg.layer_types`` asks for it.

    Same-shape layers go through the initializer together. A layer that cannot be quantized is left as it is, with the
    reason in the report: a subclass of nn.Linear (or of the others), a weight shared with another module (other than
    that of a head, which ``cfg.quantize_head`` unties from the embedding), hooks or a forward of its own, a matrix that
    would grow, adapter="qalora" for any but a linear layer. A bias that several modules share stays shared. A rank
    above the smaller side becomes that side, with a note. Layers are swapped as they are done, each batch's dense ones
    freed then; so a model whose conversion was cut short (Ctrl-C, or scales of a later layer that do not fit) still
    works, and a second call goes on.

    Args:
        model: changed in place; its modules keep their device and training mode. May be inside torch.compile or DDP.
        cfg: default `QuantConfig()`: LoftQ, NF4, rank 16.
        statistics: by layer name, from `collect_activations` on the dense model: init "eora" and "aser" need them,
            "loftq" takes them. Calibration observes linear layers alone: convolutions and embeddings get the data-free
            LoftQ (their ``weighted_error`` is None), and cannot be initialized by "eora" and "aser". Layers that no
            token reached get the data-free way, with a warning.
        plan: a `BitPlan` or its file: chooses format, group size, rank and scales of the layers that it names; cfg says
            the rest, and all of layers that the plan does not name.
        progress: None shows a bar where somebody watches (a terminal, a notebook), True also plain lines where standard
            error is redirected.
        freeze: also set requires_grad=False on every parameter that is neither an adapter's nor named by
            ``cfg.modules_to_save``; what PEFT has in the model stays as PEFT has set it. Without it biases of replaced
            layers keep theirs.
        device: where to compute, if not where the weights are.

    Returns a `QuantizationReport`, which accounts for every byte of the model. Raises ValueError, before anything is
    changed, for a weight with NaN or Inf (naming layer and row), for a model that is itself such a layer, for a pattern
    that matches no layer, for a plan of another model or one that names a layer which is skipped (other than by an
    override None), when no layer matches, and for statistics that lack a layer or are of another width.
    """
    conversion = Conversion(model, cfg, statistics=statistics, plan=plan, device=device)
    check_weights({candidate.name: candidate.weight for candidate in conversion.candidates})
    candidates = conversion.candidates.copy()
    conversion.candidates.clear()
    try:
        with progress_bar(total=len(candidates), desc="quantize", unit="layer", show=progress) as bar:
            for batch in in_batches(candidates):
                conversion.replace(batch, bar.update)
    finally:  # Layers that were swapped before an interruption are as they would be after a whole run.
        conversion.settle(freeze=freeze)
    return conversion.report()


class Conversion:
    """`quantize_model` in steps, for those who bring the weights of a model one after the other.

    ``candidates`` are its layers to quantize. The model may be on the meta device, and each layer gets its weight
    before it is replaced. Raises as `quantize_model` for all that names and shapes tell.
    """

    def __init__(
        self,
        model: nn.Module,
        cfg: QuantConfig | None = None,
        *,
        statistics: Mapping[str, InputStatistics] | None = None,
        plan: BitPlan | str | Path | None = None,
        device: torch.device | str | None = None,
        values: bool = True,
    ):
        self._started = time.perf_counter()
        self.model, self.device = unwrapped(model), device
        self.cfg, plan = _planned(cfg, plan)
        self._selection = _checked_selection(self.model, self.cfg, plan, values=values)
        self.candidates = with_statistics(self._selection.candidates, statistics, level=4)
        self._order = {candidate.name: i for i, candidate in enumerate(self.candidates)}
        self._selection.candidates.clear()  # Nothing else may hold the dense layers.
        self._layers: list[LayerReport] = []

    def replace(self, batch: list[Candidate], done: Callable[[int], None] | None = None) -> None:
        """Initialize the layers of a batch together, then swap each in; the batch is emptied."""
        inits = initialize_batch(batch, self.device, done)[::-1]
        while batch:
            self._layers.append(_swap(self.model, batch.pop(0), inits.pop()))
        untie(self.model)

    def leave(self, candidate: Candidate, reason: str) -> None:
        """Leave a candidate dense, which the report gives the reason for."""
        self._selection.skipped[candidate.name] = reason

    def settle(self, *, freeze: bool = True) -> None:
        """Say which parameters are trained, and tell the libraries whose models it holds."""
        if freeze:
            train_only_adapters(self.model)
        train_modules(self.model, self.cfg.modules_to_save)
        for host, part in hosts.hosted_parts(self.model):
            if quantized_layers(part):
                host.adopt(part, self.cfg)

    def report(self) -> QuantizationReport:
        report = QuantizationReport(skipped=self._selection.skipped, already=self._selection.already)
        report.layers = sorted(self._layers, key=lambda layer: self._order[layer.name])
        report.tensors = account(self.model, why_dense(self.cfg, self._selection))
        report.seconds = time.perf_counter() - self._started
        return report


def check_quantize(
    model: nn.Module,
    cfg: QuantConfig | None = None,
    *,
    statistics: Mapping[str, InputStatistics] | None = None,
    plan: BitPlan | str | Path | None = None,
) -> Selection:
    """Raise as `quantize_model` does for all that names and shapes tell: the model may be on the meta device.

    Returns the layers that it would quantize, and the reasons why it would leave others.
    """
    model = unwrapped(model)
    cfg, plan = _planned(cfg, plan)
    selection = _checked_selection(model, cfg, plan, values=False)
    with_statistics(selection.candidates, statistics, warn=False)
    return selection


def _planned(cfg: QuantConfig | None, plan: BitPlan | str | Path | None) -> tuple[QuantConfig, BitPlan | None]:
    """The config that a plan makes of cfg, and the plan."""
    cfg = cfg or QuantConfig()
    if not isinstance(cfg, QuantConfig):
        raise TypeError(f"cfg must be a QuantConfig, got {cfg!r}")
    if plan is None:
        return cfg, None
    plan = plan if isinstance(plan, BitPlan) else BitPlan.load(plan)
    return plan.config(cfg), plan


def _checked_selection(model: nn.Module, cfg: QuantConfig, plan: BitPlan | None, *, values: bool = True) -> Selection:
    """The layers to quantize. Raises ValueError where there are none, or where they do not fit the plan."""
    if plan is not None:
        plan.check_names(name for name, _ in named_modules(model))
    selection = select_layers(model, cfg, values=values)
    if plan is not None:
        plan.check_model(_planned_shapes(model, selection, plan, cfg))
    check_overrides(model, cfg, selection)
    if not selection.candidates and not selection.already:
        raise ValueError(
            f"no layer to quantize: include={cfg.include}, exclude={cfg.exclude}, "
            f"layer_types={cfg.layer_types}; skipped: {_by_reason(selection.skipped)}"
        )
    return selection


def _by_reason(skipped: Mapping[str, str]) -> str:
    """The commonest reasons of skipped layers, each with its count and the name of one layer."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, reason in skipped.items():
        names[reason].append(name)
    order = sorted(names, key=lambda reason: -len(names[reason]))
    parts = [f"{len(names[reason])} such as {names[reason][0]!r} ({reason})" for reason in order[:_REASONS]]
    return ", ".join(parts + [f"{len(order) - _REASONS} more reasons"] * (len(order) > _REASONS)) or "none"


def check_weights(weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming layer and row, for the first weight with NaN or Inf."""
    largest = max(weights.values(), key=Tensor.numel, default=None)
    if largest is not None:
        division = parallel.divide(len(weights), largest.shape, largest.device, copies=1)
        parallel.each(lambda layer: check_finite(layer[1], f"{layer[0]}.weight"), list(weights.items()), division)


def _planned_shapes(
    model: nn.Module, selection: Selection, plan: BitPlan, cfg: QuantConfig
) -> dict[str, tuple[int, ...]]:
    """Matrix shapes of the layers that a plan may name: to be quantized, left dense by hand, or done before.

    Raises ValueError, with the reason, for a layer that the plan names and that would be left dense otherwise.
    """
    shapes = {c.name: tuple(c.weight.shape) for c in selection.candidates}
    modules = dict(named_modules(model))
    for name in (name for name in plan.layers if name in modules and name not in shapes):
        kind, reason = kind_of(modules[name]), selection.skipped.get(name)
        if name in selection.already or reason == LEFT_DENSE:
            shapes[name] = matrix_shape(modules[name])
        elif reason is not None:
            raise ValueError(f"the plan names layer {name!r}, which cannot be quantized: {reason}")
        elif kind is not None and kind.layer_type not in cfg.layer_types:
            raise ValueError(
                f"the plan names layer {name!r}, an nn.{type(modules[name]).__name__}: layer_types={cfg.layer_types} "
                f"of the config must hold {kind.layer_type!r}"
            )
    return shapes


def initialize_batch(
    batch: list[Candidate], device: torch.device | str | None, done: Callable[[int], None] | None
) -> list[AdapterInit]:
    """The initializer's results for the layers of a batch, which go through it together."""
    statistics = [candidate.statistics for candidate in batch]
    return initialize(
        [candidate.weight for candidate in batch],
        batch[0].cfg,
        statistics=None if statistics[0] is None else statistics,
        device=device,
        progress=done,
        names=[f"{candidate.name}.weight" for candidate in batch],
    )


def _swap(model: nn.Module, candidate: Candidate, init: AdapterInit) -> LayerReport:
    """Put the quantized layer in the place of the dense one."""
    old, kind = candidate.module, candidate.kind
    layer = kind.place(old, init, candidate.cfg.adapter_dtype).train(old.training)
    carry_over(old, layer, kind, same_bias=candidate.shares_bias)
    for name in candidate.names:
        set_submodule(model, name, layer)
    return LayerReport(
        name=candidate.name,
        out_features=init.packed.shape[0],
        in_features=init.packed.shape[1],
        format=layer.format.name,
        rank=layer.rank,
        error=init.error,
        bytes_before=module_bytes(old) - (old.weight.nbytes if candidate.tied_to else 0),
        bytes_after=module_bytes(layer),
        packed_bytes=layer.packed.nbytes,
        weighted_error=init.weighted_error,
        note=candidate.note,
    )
