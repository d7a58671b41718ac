"""`ActivationStatistics`: the statistics of many layers' inputs, and their file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from loftq_kernels.initializers import InputStatistics
from loftq_kernels.storage import documents, files

_METADATA_KEY = "loftq_activation_statistics"
_VERSION_KEY, _VERSION = "version", 1
_TENSORS = ("gram", "mean", "abs_mean", "abs_max")


class ActivationStatistics(Mapping[str, InputStatistics]):
    """Layer name -> `InputStatistics`, as `quantize_model` takes it. Layers with one input share one object.

    ``unreached`` are the names of layers that were observed and that no token reached, such as experts never chosen:
    they have no entry.
    """

    def __init__(self, layers: Mapping[str, InputStatistics], unreached: Iterable[str] = ()):
        self._layers = dict(layers)
        self.unreached = tuple(unreached)

    def __getitem__(self, name: str) -> InputStatistics:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def distinct(self) -> list[InputStatistics]:
        """Each statistics object once."""
        return list({id(own): own for own in self._layers.values()}.values())

    @property
    def nbytes(self) -> int:
        return sum(getattr(own, what).nbytes for own in self.distinct() for what in _TENSORS)

    def __repr__(self) -> str:
        distinct = self.distinct()
        return f"ActivationStatistics({len(self)} layers, {len(distinct)} inputs, {self.nbytes / 2**20:.1f} MiB)"

    def save(self, path: str | Path) -> None:
        """Write a safetensors file (float32); an existing one stays as it was if that fails."""
        distinct = self.distinct()
        place = {id(own): i for i, own in enumerate(distinct)}
        tensors = {
            f"{i}.{what}": getattr(own, what).to(torch.float32) for i, own in enumerate(distinct) for what in _TENSORS
        }
        described = {
            _VERSION_KEY: _VERSION,
            "layers": {name: place[id(own)] for name, own in self.items()},
            "tokens": [own.tokens for own in distinct],
            "unreached": list(self.unreached),
        }
        files.save_tensors(path, tensors, {_METADATA_KEY: json.dumps(described)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> ActivationStatistics:
        """Read what `save` wrote; names, shapes and dtypes are checked before a tensor is made.

        Raises FileNotFoundError, or ValueError naming what is wrong with the file. Values are checked where they are
        used: by the initializers.
        """
        with files.open_tensors(path, device) as file:
            try:
                layers, tokens, unreached = _parse((file.metadata() or {}).get(_METADATA_KEY))
                _check_header(file, len(tokens))
            except ValueError as error:
                raise ValueError(f"{path} does not hold activation statistics: {error}") from error
            distinct = [
                InputStatistics(*(file.get_tensor(f"{i}.{what}") for what in _TENSORS), tokens=count)
                for i, count in enumerate(tokens)
            ]
        return cls({name: distinct[i] for name, i in layers.items()}, unreached)


def _parse(text: str | None) -> tuple[dict[str, int], list[int], list[str]]:
    """The JSON of a file -> the place of each layer's statistics, their token counts, and the layers without any."""
    if text is None:
        raise ValueError(f"its header has no {_METADATA_KEY!r}")
    described = documents.parse(text, _VERSION_KEY, _VERSION)
    layers, tokens, unreached = described.get("layers"), described.get("tokens"), described.get("unreached", [])
    if not isinstance(tokens, list) or not all(type(count) is int and count >= 1 for count in tokens):
        raise ValueError("tokens must be a list of positive integers")
    if not isinstance(unreached, list) or not all(isinstance(name, str) for name in unreached):
        raise ValueError("unreached must be a list of names")
    if not isinstance(layers, dict) or not layers:
        raise ValueError("layers must be a dict that is not empty")
    for name, place in layers.items():
        if type(place) is not int or not 0 <= place < len(tokens):
            raise ValueError(f"layer {name!r} has statistics {place!r} of {len(tokens)}")
    return layers, tokens, unreached


def _check_header(file, count: int) -> None:
    expected = {f"{i}.{what}" for i in range(count) for what in _TENSORS}
    names = set(file.keys())
    for what, wrong in (("lacks", expected - names), ("holds unknown", names - expected)):
        if wrong:
            raise ValueError(f"it {what} tensors: {', '.join(sorted(wrong)[:5])}")
    for i in range(count):
        shapes = {what: file.get_slice(f"{i}.{what}").get_shape() for what in _TENSORS}
        channels = shapes["mean"][0] if shapes["mean"] else 0
        for what, shape in shapes.items():
            needed = [channels, channels] if what == "gram" else [channels]
            if shape != needed or channels < 1:
                raise ValueError(f"tensor '{i}.{what}' has shape {shape}, expected {needed}, not empty")
            if (dtype := file.get_slice(f"{i}.{what}").get_dtype()) != "F32":
                raise ValueError(f"tensor '{i}.{what}' is {dtype}, expected F32")
