"""`BitPlan`: which format each layer gets, as a JSON file that can be read, edited, solved again and applied."""

from __future__ import annotations

import dataclasses
import glob
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq_kernels import arguments, vocabulary
from loftq_kernels.formats import empty_packed
from loftq_kernels.initializers import LayerConfig
from loftq_kernels.models.config import QuantConfig, matches
from loftq_kernels.ops.checks import SCALE_DTYPES_BY_NAME, check_rank
from loftq_kernels.storage import documents
from loftq_kernels.vocabulary import CANDIDATE_FIELDS

PLAN_VERSION = 1
COUNTS = tuple(vocabulary.COUNTS)
VERSION_KEY = "loftq_plan_version"


@dataclass(frozen=True)
class PlannedLayer:
    """One layer: the shape of its matrix, the candidate chosen, and the measured squared error under each."""

    shape: tuple[int, int]  # [out_features, in_features]
    choice: str
    errors: dict[str, float] = field(default_factory=dict)
    adapter_bits: int = 32  # of one number of lora_A and lora_B

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class BitPlan:
    """Candidates by name, and for every layer which of them it gets. What `plan_bits` returns.

    Attributes:
        candidates: name -> values of the `QuantConfig` fields format, group_size, rank, scale_dtype, scale_search.
        layers: layer name -> `PlannedLayer`.
        budget: the bits per weight that were asked for; what the plan takes is `average_bits`.
        count: what counts as bits: "codes" those of the codes alone, as LoftQ's "2.5 bits" are counted; "packed" all
            of the packed weight: codes and their padding, scales, offsets and code book, as
            `QuantizationReport.bits_per_weight`; "total" also lora_A and lora_B.
            Never counted: biases, and what stays dense.
        dense: parameters of the model that the plan does not name, with their bytes as they stay.
    """

    candidates: dict[str, dict[str, Any]]
    layers: dict[str, PlannedLayer]
    budget: float
    count: str = "packed"
    dense: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        arguments.choice("count", self.count, COUNTS)
        arguments.number("budget", self.budget, above=0, note=" (bits per weight)")
        for name, values in self.candidates.items():
            _check_candidate(name, values)
        for name, layer in self.layers.items():
            if layer.choice not in self.candidates:
                raise ValueError(f"layer {name!r}: choice {layer.choice!r} is not one of {list(self.candidates)}")
            rank = self.candidates[layer.choice]["rank"]
            if rank is not None:
                try:
                    check_rank(rank, *layer.shape)
                except ValueError as error:
                    raise ValueError(f"layer {name!r}: candidate {layer.choice!r}: {error}") from error

    def bits(self, name: str, candidate: str | None = None) -> int:
        """Bits that a layer takes under a candidate (default: the one chosen), counted as `count` says."""
        layer = self.layers[name]
        return counted_bits(self.candidates[candidate or layer.choice], layer, self.count)

    @property
    def average_bits(self) -> float:
        """Bits per weight of all planned layers together, counted as `count` says."""
        weights = sum(layer.weights for layer in self.layers.values())
        return sum(self.bits(name) for name in self.layers) / max(weights, 1)

    @property
    def error(self) -> float:
        """Sum of the measured errors of the choices; nan if a choice was edited to one that was not measured."""
        return sum(layer.errors.get(layer.choice, math.nan) for layer in self.layers.values())

    def config(self, cfg: QuantConfig | None = None) -> QuantConfig:
        """cfg with one override per planned layer, before its own; fields that no candidate sets stay as cfg has them.

        Layers that the plan does not name are treated as cfg says.
        """
        cfg = cfg or QuantConfig()
        overrides: dict[str, Mapping[str, Any] | None] = {}
        for name, layer in self.layers.items():
            own = next((changes for pattern, changes in cfg.overrides.items() if matches(name, pattern)), {})
            # A layer that an override leaves dense stays dense.
            overrides[_pattern(name)] = None if own is None else {**own, **settings(self.candidates[layer.choice])}
        return dataclasses.replace(cfg, overrides={**overrides, **cfg.overrides})

    def check_names(self, names: Iterable[str]) -> None:
        """Raise ValueError unless every planned layer is among the names of a model's modules."""
        known = set(names)
        if unknown := next((name for name in self.layers if name not in known), None):
            raise ValueError(f"the plan is of another model: there is no layer {unknown!r} to quantize")

    def check_model(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless every planned layer is among shapes, with the shape that it was planned for."""
        self.check_names(shapes)
        for name, layer in self.layers.items():
            if tuple(shapes[name]) != layer.shape:
                raise ValueError(f"the plan has {name!r} with shape {layer.shape}, the model {tuple(shapes[name])}")

    def save(self, path: str | Path) -> None:
        """Write the JSON file; an existing one stays as it was if that fails."""
        values = {
            VERSION_KEY: PLAN_VERSION,
            "budget": self.budget,
            "count": self.count,
            "average_bits": round(self.average_bits, 6),  # For the reader; it is computed anew when the file is loaded.
        }
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
        layers = {name: dataclasses.asdict(layer) for name, layer in self.layers.items()}
        for key, entries in (("candidates", self.candidates), ("layers", layers)):
            lines.append(f" {json.dumps(key)}: {_one_per_line(entries)}")
        lines.append(f' "dense": {json.dumps(self.dense)}')
        documents.write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def load(cls, path: str | Path) -> BitPlan:
        """Read what `save` wrote, edited or not. Raises FileNotFoundError, or ValueError naming what is wrong where."""
        values = documents.read(path, VERSION_KEY, PLAN_VERSION)
        try:
            return _parse(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def __str__(self) -> str:
        used = {name: 0 for name in self.candidates}
        for layer in self.layers.values():
            used[layer.choice] += layer.weights
        weights = max(sum(used.values()), 1)
        shares = ", ".join(f"{name} {count / weights:.1%}" for name, count in used.items())
        return (
            f"{len(self.layers)} layers, {self.average_bits:.3f} bits/weight ({self.count}) of a budget of "
            f"{self.budget:g}, error {self.error:.6g}; of the weights: {shares}{self._dense_share()}"
        )

    def _dense_share(self) -> str:
        """What share of the planned model's bytes is dense."""
        left = sum(self.dense.values())
        planned = sum(self.bits(name) for name in self.layers) // 8
        largest = sorted(self.dense, key=self.dense.get, reverse=True)[:3]
        named = f" ({', '.join(largest)}, ...)" if largest else ""
        return f"; not planned, and left dense: {left / max(left + planned, 1):.1%} of the model's bytes{named}"


def counted_bits(candidate: Mapping[str, Any], layer: PlannedLayer, count: str) -> int:
    """Bits of a layer as a candidate stores it; `BitPlan` says what each count holds."""
    rows, columns = layer.shape
    options = settings(candidate)
    packed = empty_packed(
        rows, columns, options["format"], options["group_size"], scale_dtype=options["scale_dtype"], device="meta"
    )
    if count == "codes":
        return rows * columns * packed.bits
    adapter = (candidate["rank"] or 0) * (rows + columns) * layer.adapter_bits
    return 8 * packed.nbytes + (adapter if count == "total" else 0)


def settings(candidate: Mapping[str, Any]) -> dict[str, Any]:
    """A candidate's JSON values as `QuantConfig` takes them."""
    return {**candidate, "scale_dtype": SCALE_DTYPES_BY_NAME[candidate["scale_dtype"]]}


def _one_per_line(values: Mapping[str, Any]) -> str:
    """A JSON object with one entry per line, for editing by hand."""
    return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in values.items()) + "\n }"


def _check_candidate(name: str, values: Any) -> None:
    if not isinstance(values, dict) or sorted(values) != sorted(CANDIDATE_FIELDS):
        raise ValueError(f"candidate {name!r} must hold {', '.join(CANDIDATE_FIELDS)}; got {values!r}")
    try:
        if values["scale_dtype"] not in SCALE_DTYPES_BY_NAME:
            raise ValueError(f"scale_dtype {values['scale_dtype']!r} is not one of {sorted(SCALE_DTYPES_BY_NAME)}")
        LayerConfig(**settings(values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"candidate {name!r}: {error}") from error


def _pattern(name: str) -> str:
    """An override's pattern that matches this name alone."""
    return glob.escape(name)


def _parse(values: Any) -> BitPlan:
    needed = {"candidates": dict, "layers": dict, "budget": object, "count": object}
    documents.check_keys(values, needed, {"average_bits": object, "dense": dict})
    dense = values.get("dense", {})
    if wrong := [name for name, size in dense.items() if type(size) is not int or size < 0]:
        raise ValueError(f"dense: {wrong[0]!r} has {dense[wrong[0]]!r} bytes")
    layers = {name: _parse_layer(name, layer) for name, layer in values["layers"].items()}
    return BitPlan(values["candidates"], layers, values["budget"], values["count"], dense)


def _parse_layer(name: str, values: Any) -> PlannedLayer:
    known = [f.name for f in dataclasses.fields(PlannedLayer)]
    if not isinstance(values, dict) or not {"shape", "choice"} <= values.keys() <= set(known):
        raise ValueError(f"layer {name!r}: expected the keys {known}, got {values!r}")
    shape, errors = values["shape"], values.get("errors", {})
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"layer {name!r}: shape={shape!r} must be [out_features, in_features]")
    if not isinstance(errors, dict) or not all(_is_error(error) for error in errors.values()):
        raise ValueError(f"layer {name!r}: errors={errors!r} must map candidates to numbers >= 0")
    if not isinstance(values["choice"], str):
        raise ValueError(f"layer {name!r}: choice={values['choice']!r} must be the name of a candidate")
    if values.get("adapter_bits", 32) not in (16, 32, 64):
        raise ValueError(f"layer {name!r}: adapter_bits={values['adapter_bits']!r} is not 16, 32 or 64")
    return PlannedLayer(**{**values, "shape": tuple(shape)})


def _is_error(value: Any) -> bool:
    return arguments.plain_number(value) is not None and 0 <= value < math.inf
