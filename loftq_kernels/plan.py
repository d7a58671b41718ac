"""`BitPlan`: which format each layer gets, as a JSON file that can be read, edited, solved again and applied."""

from __future__ import annotations

import dataclasses
import glob
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from loftq_kernels import storage
from loftq_kernels.config import QuantConfig, matches
from loftq_kernels.formats import empty_packed
from loftq_kernels.ops.checks import SCALE_DTYPES_BY_NAME, check_rank

PLAN_VERSION = 1
COUNTS = ("codes", "packed", "total")
CANDIDATE_FIELDS = ("format", "group_size", "rank", "scale_dtype", "scale_search")
_MAX_PLAN_BYTES = 64 << 20  # far above any real one; refuses to read something else that carries the name


@dataclass(frozen=True)
class PlannedLayer:
    """One layer: the shape of its matrix, the candidate chosen, and the measured squared error under each."""

    shape: tuple[int, int]  # [out_features, in_features]
    choice: str
    errors: dict[str, float] = field(default_factory=dict)
    adapter_bits: int = 32  # of one number of lora_A and lora_B: those of the dense weight's dtype

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class BitPlan:
    """Candidates by name, and for every layer which of them it gets. What `plan_bits` returns.

    Attributes:
        candidates: name -> values of the `QuantConfig` fields format, group_size, rank, scale_dtype, scale_search.
        layers: layer name -> `PlannedLayer`.
        budget: the bits a weight that were asked for; what the plan takes is `average_bits`.
        count: what counts as bits: "codes" those of the codes alone, as LoftQ's "2.5 bits" are counted; "packed" all
            of the packed weight: codes and their padding, scales, offsets and code book, as
            `QuantizationReport.bits_per_weight`; "total" also lora_A and lora_B in the dtype of the dense weight.
            Never counted: biases, and layers that stay dense.
    """

    candidates: dict[str, dict[str, Any]]
    layers: dict[str, PlannedLayer]
    budget: float
    count: str = "packed"

    def __post_init__(self):
        if self.count not in COUNTS:
            raise ValueError(f"count={self.count!r} is not one of {COUNTS}")
        _check_budget(self.budget)
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
        """Bits a weight of all planned layers together, counted as `count` says."""
        weights = sum(layer.weights for layer in self.layers.values())
        return sum(self.bits(name) for name in self.layers) / max(weights, 1)

    @property
    def error(self) -> float:
        """Sum of the measured errors of the choices; nan if a choice was edited to one that was not measured."""
        return sum(layer.errors.get(layer.choice, math.nan) for layer in self.layers.values())

    def config(self, cfg: QuantConfig | None = None) -> QuantConfig:
        """cfg with one override a planned layer, before its own; fields that no candidate sets stay as cfg has them.

        Layers that the plan does not name are treated as cfg says.
        """
        cfg = cfg or QuantConfig()
        overrides: dict[str, Mapping[str, Any] | None] = {}
        for name, layer in self.layers.items():
            own = next((changes for pattern, changes in cfg.overrides.items() if matches(name, pattern)), {})
            # A layer left dense stays so: whoever says it by hand means it.
            overrides[_pattern(name)] = None if own is None else {**own, **settings(self.candidates[layer.choice])}
        return dataclasses.replace(cfg, overrides={**overrides, **cfg.overrides})

    def check_model(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless every planned layer is among shapes, with the shape that it was planned for."""
        for name, layer in self.layers.items():
            if name not in shapes:
                raise ValueError(f"the plan is of another model: there is no layer {name!r} to quantize")
            if tuple(shapes[name]) != layer.shape:
                raise ValueError(f"the plan has {name!r} with shape {layer.shape}, the model {tuple(shapes[name])}")

    def save(self, path: str | Path) -> None:
        """Write the JSON file; an existing one stays as it was if that fails."""
        values = {
            "loftq_plan_version": PLAN_VERSION,
            "budget": self.budget,
            "count": self.count,
            "average_bits": round(self.average_bits, 6),  # for the reader: computed anew when the file is loaded
        }
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
        lines.append(f' "candidates": {_one_a_line(self.candidates)}')
        layers = {name: dataclasses.asdict(layer) for name, layer in self.layers.items()}
        lines.append(f' "layers": {_one_a_line(layers)}')
        with storage.replacing(path) as temporary:
            temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> BitPlan:
        """Read what `save` wrote, edited or not. Raises FileNotFoundError, or ValueError naming what is wrong where."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        if path.stat().st_size > _MAX_PLAN_BYTES:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, more than any plan")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
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
            f"{self.budget:g}, error {self.error:.6g}; of the weights: {shares}"
        )


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


def _one_a_line(values: Mapping[str, Any]) -> str:
    """A JSON object with an entry a line, for editing by hand."""
    return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in values.items()) + "\n }"


def _check_budget(budget: float) -> None:
    number = isinstance(budget, int | float) and not isinstance(budget, bool)
    if not number or not 0 < budget < math.inf:
        raise ValueError(f"budget={budget!r} must be a finite number of bits per weight > 0")


def _check_candidate(name: str, values: Any) -> None:
    if not isinstance(values, dict) or sorted(values) != sorted(CANDIDATE_FIELDS):
        raise ValueError(f"candidate {name!r} must hold {', '.join(CANDIDATE_FIELDS)}; got {values!r}")
    try:
        if values["scale_dtype"] not in SCALE_DTYPES_BY_NAME:
            raise ValueError(f"scale_dtype {values['scale_dtype']!r} is not one of {sorted(SCALE_DTYPES_BY_NAME)}")
        QuantConfig(**settings(values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"candidate {name!r}: {error}") from error


def _pattern(name: str) -> str:
    """An override's pattern that matches this name alone."""
    return glob.escape(name)


def _parse(values: Any) -> BitPlan:
    version = values.get("loftq_plan_version") if isinstance(values, dict) else None
    if version != PLAN_VERSION:
        raise ValueError(f"loftq_plan_version is {version!r}, this version reads {PLAN_VERSION}")
    known = {"loftq_plan_version", "average_bits", *(f.name for f in dataclasses.fields(BitPlan))}
    needed = known - {"average_bits"}
    if sorted(values.keys() - {"average_bits"}) != sorted(needed):
        raise ValueError(f"expected the keys {sorted(known)}, got {sorted(values)}")
    for name in ("candidates", "layers"):
        if not isinstance(values[name], dict):
            raise ValueError(f"{name} must be an object, got {values[name]!r}")
    layers = {name: _parse_layer(name, layer) for name, layer in values["layers"].items()}
    return BitPlan(values["candidates"], layers, values["budget"], values["count"])


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
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def first_layers(
    model: nn.Module, n: int, changes: str | Mapping[str, Any] = "nf4", *, blocks: str | None = None
) -> dict[str, dict[str, Any]]:
    """LoftQ's mixed precision: overrides that give the first n blocks of a model other settings than the rest.

        QuantConfig("nf2", overrides=first_layers(model, 4, "nf4"))     # the first four blocks 4 bits, the rest 2

    Args:
        model: holds its blocks (layers, as the paper calls them) in an `nn.ModuleList` or `nn.Sequential`.
        n: 0 .. the number of blocks.
        changes: a format, or `QuantConfig` fields, for the layers inside the first n blocks.
        blocks: the list's name, e.g. "model.layers"; None takes the list with the most parameters.

    Raises ValueError when there is no such list, when several are equally large (naming them; as in a model with an
    encoder and a decoder) and for n out of range. Source: LoftQ (Li et al., 2024), section 4.
    """
    name = _largest_list(model) if blocks is None else blocks
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} has no module {name!r}") from error
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        raise ValueError(f"{name!r} is a {type(module).__name__}, not a list of blocks")
    if type(n) is not int or not 0 <= n <= len(module):
        raise ValueError(f"n={n!r} is outside 0 .. {len(module)}, the number of blocks in {name!r}")
    if n == 0:
        return {}
    changes = {"format": changes} if isinstance(changes, str) else dict(changes)
    prefix = f"{name}." if name else ""
    overrides = {}
    for child in list(module._modules)[:n]:
        escaped = glob.escape(prefix + child)
        overrides[f"{escaped}.*"] = changes
        overrides[escaped] = changes  # a block may itself be a linear layer
    return overrides


def _largest_list(model: nn.Module) -> str:
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
    }
    if not sizes:
        raise ValueError(f"{type(model).__name__} has no list of blocks (nn.ModuleList or nn.Sequential)")
    largest = [name for name, size in sizes.items() if size == max(sizes.values())]
    if len(largest) > 1:
        raise ValueError(f"several lists of blocks are equally large: {', '.join(largest)}; choose with blocks=")
    return largest[0]
