"""`plan_bits`: the error of every layer under every candidate, and the best choice of them within a budget of bits.

Source: LQ-LoRA (Guo et al., ICLR 2024), with the errors measured after the initializer, adapter included.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loftq_kernels.initializers import AdapterInit, InputStatistics, parallel
from loftq_kernels.initializers.qalora import expand_groups
from loftq_kernels.initializers.statistics import check_statistics
from loftq_kernels.models.config import QuantConfig
from loftq_kernels.models.convert import check_weights, initialize_batch
from loftq_kernels.models.inputs import with_statistics
from loftq_kernels.models.plan import BitPlan, PlannedLayer, settings
from loftq_kernels.models.report import DENSE, account
from loftq_kernels.models.select import Candidate, check_overrides, in_batches, select_layers
from loftq_kernels.models.solve import check_feasible, milp, solve_plan
from loftq_kernels.nn.wrappers import unwrapped
from loftq_kernels.ops.checks import SCALE_DTYPES_BY_NAME
from loftq_kernels.progress import progress_bar
from loftq_kernels.vocabulary import CANDIDATE_FIELDS, DEFAULT_CANDIDATES


def plan_bits(
    model: nn.Module,
    budget: float,
    candidates: Sequence[str | Mapping[str, Any]] = DEFAULT_CANDIDATES,
    cfg: QuantConfig | None = None,
    *,
    statistics: Mapping[str, InputStatistics] | None = None,
    count: str = "packed",
    relative: bool = True,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> BitPlan:
    """Quantize every layer under every candidate, and choose one per layer: least total error within the budget.

    The error of a layer, E = W - Q - s B A, is ||E||_F^2 / ||W||_F^2, or with statistics tr(E S E^T) / tr(W S W^T):
    the squared relative error of its output over the calibration tokens. The model is not changed.

    Args:
        model: a dense model, as for `quantize_model`.
        budget: bits per weight, on average over all planned layers, counted as ``count`` says.
        candidates: formats, or `QuantConfig` fields (of format, group_size, rank, scale_dtype, scale_search); what
            they do not set is as in cfg.
        cfg: everything else: initializer, patterns, layer_types. Its overrides choose layers to leave dense and fields
            that candidates cannot set.
        statistics: by layer name, from `collect_activations`; the initializer that cfg names also gets them, if it
            takes any. Convolutions and embeddings, which calibration does not observe, are initialized without
            statistics and count by the error of their weights, which can be added to relative errors only.
        count: "codes", "packed" or "total", see `BitPlan`; candidates of different ranks need "total".
        relative: every layer counts the same, however large. False leaves out the denominators, as LQ-LoRA does.
            docs/mixed_precision.md compares the two: relative errors gave the better models.
        device: where to compute, if not where the weights are.
        progress: None shows a bar where somebody watches (a terminal, a notebook), True also plain lines where standard
            error is redirected.

    Raises ImportError without SciPy; ValueError for a budget below what the cheapest candidates take (saying how much
    that is), bad candidates, count="total" with adapter="qalora", NaN or Inf in a weight or in statistics, statistics
    that lack a layer or do not fit it, and a model with no layer to quantize; RuntimeError when the solver fails. Warns
    when its time is over, and the best plan so far is returned.
    """
    cfg, model = cfg or QuantConfig(), unwrapped(model)
    empty, found = _survey(model, budget, candidates, cfg, statistics, count, relative)
    layers = _measure(found, empty.layers, statistics, relative, device, progress)
    planned = {f"{name}.weight" for name in layers.keys() | _by_config(model, cfg, layers)}
    dense = {t.name: t.nbytes for t in account(model) if t.state == DENSE and t.name not in planned}
    return solve_plan(dataclasses.replace(empty, layers=layers, dense=dense), budget)


def check_plan(
    model: nn.Module,
    budget: float,
    candidates: Sequence[str | Mapping[str, Any]] = DEFAULT_CANDIDATES,
    cfg: QuantConfig | None = None,
    *,
    statistics: Mapping[str, InputStatistics] | None = None,
    count: str = "packed",
    relative: bool = True,
) -> None:
    """Raise as `plan_bits` does for all that names and shapes tell: the model may be on the meta device."""
    cfg = cfg or QuantConfig()
    _survey(unwrapped(model), budget, candidates, cfg, statistics, count, relative, values=False)


def _survey(
    model: nn.Module,
    budget: float,
    candidates: Sequence[str | Mapping[str, Any]],
    cfg: QuantConfig,
    statistics: Mapping[str, InputStatistics] | None,
    count: str,
    relative: bool,
    *,
    values: bool = True,
) -> tuple[BitPlan, dict[str, list[Candidate]]]:
    """The plan without errors, and the layers that can have each candidate. Raises for what no measurement can mend."""
    milp()
    named = _named_candidates(candidates, cfg)
    if count != "total" and len({fields["rank"] for fields in named.values()}) > 1:
        raise ValueError(f"candidates of different ranks need count='total': count={count!r} makes adapters free")
    empty = BitPlan(named, {}, budget, count)
    found, skipped = {}, {}
    for name, fields in named.items():
        selection = select_layers(model, _config_of(fields, cfg), values=values)
        check_overrides(model, cfg, selection)
        skipped |= selection.skipped
        fitting = _that_fit(selection.candidates, fields["rank"], skipped)
        found[name] = with_statistics(fitting, statistics, warn=values and not found, level=4)
    if not any(found.values()):
        raise ValueError(f"no layer to plan: include={cfg.include}, exclude={cfg.exclude}, skipped: {skipped}")
    _check_measures(found, statistics, count, relative)
    plan = dataclasses.replace(empty, layers=_unmeasured(found))
    options = [(name, candidate.name) for name, listed in found.items() for candidate in listed]
    check_feasible(plan, ((layer, plan.bits(layer, name)) for name, layer in options))
    return plan, found


def _unmeasured(found: Mapping[str, list[Candidate]]) -> dict[str, PlannedLayer]:
    """Every layer in the order of the model, with the first candidate that it can have."""
    layers = {}
    for name, listed in found.items():
        for own in listed:
            bits = 8 * own.cfg.adapter_dtype_of(own.weight.dtype).itemsize
            layers.setdefault(own.name, PlannedLayer(tuple(own.weight.shape), name, adapter_bits=bits))
    return layers


def _check_measures(
    found: Mapping[str, list[Candidate]],
    statistics: Mapping[str, InputStatistics] | None,
    count: str,
    relative: bool,
) -> None:
    """Raise ValueError for adapters that cannot be counted, and for errors that cannot be added."""
    listed = [candidate for own in found.values() for candidate in own]
    grouped = [own.name for own in listed if own.cfg.has_qalora]
    if count == "total" and grouped:
        raise ValueError(f"count='total' counts ordinary adapters, but layer {grouped[0]!r} has adapter='qalora'")
    unknown = [own.name for own in listed if _gram(statistics, own) is None]
    if statistics is not None and unknown and not relative:
        raise ValueError(
            f"layer {unknown[0]!r} has no statistics: absolute errors of its weights and of other layers' outputs "
            "cannot be added; use relative errors"
        )


def _by_config(model: nn.Module, cfg: QuantConfig, layers: Mapping[str, PlannedLayer]) -> set[str]:
    """Layers that no candidate fits, and that are quantized as cfg says all the same; warns of them."""
    others = [c.name for c in select_layers(model, cfg).candidates if c.name not in layers]
    if others:
        warnings.warn(
            f"the plan leaves out {len(others)} layers that no candidate fits "
            f"({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}): quantize_model treats them as cfg says",
            stacklevel=3,
        )
    return set(others)


def _that_fit(candidates: list[Candidate], rank: int | None, skipped: dict[str, str]) -> list[Candidate]:
    """The layers that can have the rank. A plan names exact ranks: they are not limited layer by layer."""
    for candidate in candidates:
        if rank is not None and candidate.cfg.rank != rank:
            skipped[candidate.name] = f"rank={rank} exceeds what its shape {tuple(candidate.weight.shape)} can have"
    return [candidate for candidate in candidates if rank is None or candidate.cfg.rank == rank]


def _named_candidates(candidates: Sequence[str | Mapping[str, Any]], cfg: QuantConfig) -> dict[str, dict[str, Any]]:
    """Complete JSON values by name: the format, and whatever else differs among the candidates."""
    if isinstance(candidates, str | Mapping):
        candidates = [candidates]
    dtype_names = {dtype: name for name, dtype in SCALE_DTYPES_BY_NAME.items()}
    completed = []
    for candidate in candidates:
        changes = {"format": candidate} if isinstance(candidate, str) else candidate
        if not isinstance(changes, Mapping) or set(changes) - set(CANDIDATE_FIELDS):
            raise ValueError(f"candidate {candidate!r} must be a format or set some of {', '.join(CANDIDATE_FIELDS)}")
        changed = dataclasses.replace(cfg, overrides={}, **changes)
        values = {name: getattr(changed, name) for name in CANDIDATE_FIELDS}
        completed.append({**values, "scale_dtype": dtype_names[changed.scale_dtype]})
    if not completed:
        raise ValueError("candidates is empty: there is nothing to choose from")
    telling = [f for f in CANDIDATE_FIELDS if f == "format" or len({values[f] for values in completed}) > 1]
    named = {}
    for values in completed:
        name = " ".join(values[f] if f == "format" else f"{f}={values[f]}" for f in telling)
        if name in named:
            raise ValueError(f"candidate {name!r} is given twice")
        named[name] = values
    return named


def _config_of(values: Mapping[str, Any], cfg: QuantConfig) -> QuantConfig:
    """cfg under a candidate, whose fields win over those of overrides."""
    overrides = {
        pattern: None if changes is None else {k: v for k, v in changes.items() if k not in CANDIDATE_FIELDS}
        for pattern, changes in cfg.overrides.items()
    }
    return dataclasses.replace(cfg, overrides=overrides, **settings(values))


def _measure(
    found: Mapping[str, list[Candidate]],
    layers: Mapping[str, PlannedLayer],
    statistics: Mapping[str, InputStatistics] | None,
    relative: bool,
    device: torch.device | str | None,
    progress: bool | None,
) -> dict[str, PlannedLayer]:
    """The layers with their errors under each candidate that they can take."""
    weights = {c.name: c.weight for listed in found.values() for c in listed}
    grams = {c.name: _gram(statistics, c) for listed in found.values() for c in listed}
    check_weights(weights)
    errors: dict[str, dict[str, float]] = {name: {} for name in weights}
    with progress_bar(total=sum(map(len, found.values())), desc="plan", unit="layer", show=progress) as bar:
        for candidate, listed in found.items():
            for batch in in_batches(listed):
                for name, error in _errors_of(batch, initialize_batch(batch, device, bar.update), grams, relative):
                    errors[name][candidate] = error
    return {name: dataclasses.replace(layer, errors=errors[name]) for name, layer in layers.items()}


def _errors_of(
    batch: list[Candidate], inits: list[AdapterInit], grams: Mapping[str, Tensor | None], relative: bool
) -> list[tuple[str, float]]:
    """Name and error of each layer of a batch."""

    def error(pair: tuple[Candidate, AdapterInit]) -> tuple[str, float]:
        own, init = pair
        return own.name, _error(own.weight, init, grams[own.name], relative)

    weight = batch[0].weight
    division = parallel.divide(len(batch), weight.shape, weight.device)
    return parallel.each(error, list(zip(batch, inits, strict=True)), division)


def _gram(statistics: Mapping[str, InputStatistics] | None, candidate: Candidate) -> Tensor | None:
    """The Gram matrix that measures the errors of a layer's outputs; None to measure those of its weight."""
    name = candidate.name
    if statistics is None:
        return None
    if name not in statistics:
        if not candidate.kind.observed or name in getattr(statistics, "unreached", ()):
            return None
        raise ValueError(f"the statistics lack layer {name!r}: they are of another model, or no token reached it")
    return check_statistics(statistics[name], f"layer {name!r}", candidate.weight.shape[1]).gram


def _error(weight: Tensor, init: AdapterInit, gram: Tensor | None, relative: bool) -> float:
    """The squared error of one layer."""
    if gram is None:
        norm = torch.linalg.vector_norm(weight, dtype=torch.float64).item()
        return init.error**2 * (1.0 if relative else norm**2)
    residual = weight.float() - init.packed.dequantize()
    if init.lora_A is not None:
        lora_A = init.lora_A
        if init.adapter == "qalora":
            lora_A = expand_groups(lora_A, weight.shape[1], init.packed.group_size)
        residual.addmm_(init.lora_B, lora_A, alpha=-init.scaling)
    error = _weighted_norm(residual, gram)
    whole = _weighted_norm(weight.float(), gram) if relative else 1.0
    return error / whole if whole > 0 else 0.0


def _weighted_norm(matrix: Tensor, gram: Tensor) -> float:
    """tr(M G M^T), at least 0: rounding may leave a Gram matrix with negative eigenvalues."""
    product = matrix @ gram.to(device=matrix.device, dtype=matrix.dtype)
    return max(0.0, torch.sum(product * matrix, dtype=torch.float64).item())
