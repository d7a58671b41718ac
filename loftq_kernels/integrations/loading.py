"""Quantizing a dense transformers model while it loads: each weight as it is read, a few layers at a time."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loftq_kernels import threads
from loftq_kernels.calibration.activations import ActivationStatistics
from loftq_kernels.models.config import QuantConfig
from loftq_kernels.models.convert import Conversion, check_weights
from loftq_kernels.models.plan import BitPlan
from loftq_kernels.models.report import QuantizationReport
from loftq_kernels.models.select import Candidate, alike, packed_bytes
from loftq_kernels.nn.adapters import quantized_layers


def _tie(model: nn.Module) -> None:
    """Tie what transformers ties when all is loaded, so that layers that share a weight are known to do so."""
    for target, source in model.all_tied_weights_keys.items():
        owner, _, name = target.rpartition(".")
        setattr(model.get_submodule(owner), name, model.get_parameter_or_buffer(source))


class Arrivals:
    """The weights of a model that are being read, on their way to become quantized layers.

    Same-shape layers wait for each other until every thread of the initializer has one, so that the result is bit for
    bit that of `quantize_model`, and the memory that of a few layers.
    """

    def __init__(
        self,
        model: nn.Module,
        cfg: QuantConfig,
        statistics: ActivationStatistics | Mapping[str, Any] | str | Path | None,
        plan: BitPlan | str | Path | None,
    ):
        if isinstance(statistics, str | Path):
            statistics = ActivationStatistics.load(statistics)
        _tie(model)
        self.conversion = Conversion(model, cfg, statistics=statistics, plan=plan, values=False)
        candidates = self.conversion.candidates
        self._expected = {f"{name}.weight": own for own in candidates for name in own.names}
        # A head that is tied to the embedding has no weight in the folder: the embedding's is its own.
        self._tied = {f"{own.tied_to}.weight": f"{own.name}.weight" for own in candidates if own.tied_to}
        self._group = {own.name: i for i, group in enumerate(alike(candidates)) for own in group}
        self._left: dict[int, int] = defaultdict(int)  # layers of a group that have not been replaced yet
        for own in candidates:
            self._left[self._group[own.name]] += 1
        self._waiting: dict[int, list[Candidate]] = defaultdict(list)
        self._arrived: set[str] = set()
        self._failure: Exception | None = None

    def expects(self, name: str) -> bool:
        """Whether a parameter of that name is the weight of a layer to quantize."""
        return name in self._expected or name in self._tied

    def bytes_per_weight(self, name: str) -> float:
        """What the packed weight will take."""
        candidate = self._expected.get(name)
        if candidate is None:
            return self._expected[self._tied[name]].weight.element_size()
        return packed_bytes(candidate.weight, candidate.cfg) / candidate.weight.numel()

    def operation(self) -> Any:
        """What transformers runs on such a weight."""
        from transformers.core_model_loading import ConversionOps

        arrivals = self

        class Quantize(ConversionOps):
            """Takes the weights of layers to quantize out of what transformers loads."""

            def convert(self, input_dict: dict[str, Any], missing_keys: set[str] | None = None, **kwargs: Any) -> dict:
                tensors = {name: own[0] if isinstance(own, list) else own for name, own in input_dict.items()}
                taken = {name for tensor_name, tensor in tensors.items() for name in arrivals.take(tensor_name, tensor)}
                if missing_keys is not None:
                    missing_keys -= taken
                return {name: tensor for name, tensor in tensors.items() if name not in taken}

        return Quantize()

    def take(self, name: str, weight: Tensor) -> list[str]:
        """A tensor has been read: the names of the weights that it is taken for.

        What fails here, `finish` raises: transformers would bury it in a report.
        """
        taken = [own for own in (name, self._tied.get(name)) if own in self._expected]
        for own in taken:
            if self._failure is None:
                self._take(self._expected[own], weight)
        return taken

    def _take(self, candidate: Candidate, weight: Tensor) -> None:
        candidate.module.weight = nn.Parameter(weight, requires_grad=False)
        candidate.module.weight._is_hf_initialized = candidate.module._is_hf_initialized = True
        self._arrived.add(candidate.name)
        group = self._group[candidate.name]
        self._waiting[group].append(candidate)
        try:
            check_weights({candidate.name: candidate.weight})
            self._replace_full(group)
        except Exception as error:
            self._failure = error
            self._waiting.clear()

    def _replace_full(self, group: int) -> None:
        """Replace the waiting layers of a group, if as many as there are threads wait, and as many or none remain."""
        together = min(torch.get_num_threads(), threads.available_cpus())
        waiting, left = self._waiting[group], self._left[group]
        remaining = left - len(waiting)
        if remaining and (len(waiting) < together or remaining < together):
            return
        if any(bias is not None and bias.is_meta for bias in (getattr(own.module, "bias", None) for own in waiting)):
            return  # `finish` replaces them, when it has been read, too.
        self._left[group] = remaining
        self._waiting[group] = []
        self.conversion.replace(waiting)

    def finish(self) -> QuantizationReport:
        """Replace what still waits, and report. Raises what a layer before could not be quantized for.

        What the folder has no tensors for stays dense and is trained, with a warning: new heads, quantizable or not.
        """
        if self._failure is not None:
            raise self._failure
        for waiting in self._waiting.values():
            if waiting:
                self.conversion.replace(waiting)
        self.conversion.settle()
        for candidate in set(self._expected.values()):
            if candidate.name not in self._arrived:
                self.conversion.leave(candidate, "was not in the folder: new, dense and trained")
        self._train_new()
        return self.conversion.report()

    def _train_new(self) -> None:
        """Train the dense parameters that lack the mark by which transformers knows those that it has loaded."""
        parameters = self.conversion.model.named_parameters()
        layers = tuple(f"{name}." for name in quantized_layers(self.conversion.model))
        new = {n: p for n, p in parameters if not (n.startswith(layers) or getattr(p, "_is_hf_initialized", False))}
        for parameter in new.values():
            parameter.requires_grad_(True)
        if new:
            warnings.warn(f"the folder has no {', '.join(new)}: new, dense and trained", stacklevel=2)
