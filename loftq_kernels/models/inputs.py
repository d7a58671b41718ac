"""Statistics of the layers' inputs for the layers that are quantized: which get them, and which must."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from dataclasses import replace

from loftq_kernels import threads
from loftq_kernels.initializers import InputStatistics
from loftq_kernels.initializers.statistics import check_statistics
from loftq_kernels.models.select import Candidate


def with_statistics(
    candidates: list[Candidate], statistics: Mapping[str, InputStatistics] | None, *, warn: bool = True, level: int = 3
) -> list[Candidate]:
    """The candidates with the statistics that their initializers need or take.

    Layers that no token reached (`ActivationStatistics.unreached`) get the data-free way, with one warning (if asked
    for: who calls this again for the same layers has warned), at the stack ``level`` of `warnings.warn`. Raises
    ValueError for layers that lack statistics otherwise, or whose statistics do not fit.
    """
    if statistics is not None and not isinstance(statistics, Mapping):
        raise TypeError(f"statistics must map layer names to InputStatistics, got {type(statistics).__name__}")
    unreached = set(getattr(statistics, "unreached", ()))
    chosen, without = [], []
    with threads.own_threads(1):  # Checks are short, and a mapping of the user's is asked in this thread.
        for candidate in candidates:
            if statistics is not None and candidate.cfg.takes_statistics and candidate.name in unreached:
                without.append(candidate.name)
                chosen.append(_data_free(candidate))
            else:
                chosen.append(replace(candidate, statistics=_statistics_of(candidate, statistics)))
    if without and warn:
        warnings.warn(
            f"no calibration token reached {len(without)} layers, which are initialized without data: "
            f"{', '.join(without[:3])}{', ...' if len(without) > 3 else ''}",
            stacklevel=level,
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
    return check_statistics(statistics[name], f"layer {name!r}", candidate.weight.shape[1])
