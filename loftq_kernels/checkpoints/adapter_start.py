"""The adapters that training has started from, and what training has added to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from loftq_kernels.checkpoints import adapter_tensors as tensors_of
from loftq_kernels.checkpoints.adapter_config import CONFIG_FILE as ADAPTER_CONFIG
from loftq_kernels.checkpoints.adapter_config import AdapterConfig
from loftq_kernels.checkpoints.manifest import CONFIG_NAME, CheckpointConfig
from loftq_kernels.nn.adapters import quantized_layers
from loftq_kernels.nn.base import QuantLoRAModule
from loftq_kernels.nn.stacking import Factors
from loftq_kernels.nn.wrappers import unwrapped
from loftq_kernels.storage import files

_OTHER_BASE = "start={} has other packed weights than the model: it is not what training has started from"


def difference(trained: Mapping[str, Factors], start: Mapping[str, Factors]) -> dict[str, Factors]:
    """s B A - s0 B0 A0 of each layer as one adapter [A; A0], [s B, -s0 B0], in float32 at least."""
    if trained.keys() != start.keys():
        raise ValueError(f"start has no adapter for {sorted(trained.keys() ^ start.keys())[0]!r}, or the model none")
    return {name: _minus(term, start[name]) for name, term in trained.items()}


def _minus(term: Factors, start: Factors) -> Factors:
    dtype = torch.promote_types(torch.promote_types(term.lora_A.dtype, start.lora_A.dtype), torch.float32)
    lora_A = torch.cat([one.lora_A.detach().to(dtype).cpu() for one in (term, start)])
    pair = zip((term, start), (term.scaling, -start.scaling), strict=True)
    return Factors(lora_A, torch.cat([one.lora_B.detach().to(dtype).cpu() * scale for one, scale in pair], dim=1), 1.0)


def start_terms(model: nn.Module, start: nn.Module | str | Path) -> dict[str, Factors]:
    """The adapters of a model, of the folder of one, or of one that `save_adapter` has written; lora_A over columns.

    Raises FileNotFoundError, or ValueError where its packed weights are not the model's.
    """
    if isinstance(start, nn.Module):
        start = unwrapped(start)
        if tensors_of.fingerprint(start) != tensors_of.fingerprint(model):
            raise ValueError(_OTHER_BASE.format(type(start).__name__))
        layers = quantized_layers(start).items()
        terms = {name: Factors(layer.lora_A, layer.lora_B, layer.scaling) for name, layer in layers if layer.rank}
    elif (Path(start) / ADAPTER_CONFIG).is_file():
        return _of_adapter(model, Path(start))
    else:
        terms = _of_checkpoint(model, Path(start))
    layers = quantized_layers(model)
    return {name: term._replace(lora_A=layers[name].over_columns(term.lora_A)) for name, term in terms.items()}


def _of_adapter(model: nn.Module, folder: Path) -> dict[str, Factors]:
    config, layers = AdapterConfig.read(folder), quantized_layers(model)
    with tensors_of.opened(folder) as stored:
        if tensors_of.base_of(stored.metadata()) != tensors_of.fingerprint(model):
            raise ValueError(_OTHER_BASE.format(folder))
        terms = {}
        for name, layer in layers.items():
            keys = [f"{tensors_of.PREFIX}{name}{end}" for end in tensors_of.keys_of(layer)]
            if layer.lora_A is not None:
                terms[name] = tensors_of.from_file(layer, *map(stored.get_tensor, keys), config.scaling(name))
    return terms


def _of_checkpoint(model: nn.Module, folder: Path) -> dict[str, Factors]:
    """From the safetensors files of a folder, which hold a layer's tensors under its name."""
    tensors = _Folder(folder)
    specs = CheckpointConfig.read(folder).layers if (folder / CONFIG_NAME).is_file() else {}
    terms = {}
    for name, layer in quantized_layers(model).items():
        if layer.lora_A is None:
            continue
        _check_same_codes(name, layer, tensors, folder)
        state = tensors.get(f"{name}._extra_state")
        scaling = specs[name].scaling if state is None and name in specs else state.flatten()[0].item()
        terms[name] = Factors(tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"], scaling)
    return terms


def _check_same_codes(name: str, layer: QuantLoRAModule, tensors: _Folder, folder: Path) -> None:
    for part, own in zip(("codes", "scale"), layer.stored(), strict=False):
        stored = tensors.get(f"{name}.{part}")
        if stored is None or not torch.equal(stored.to(own.device), own):
            raise ValueError(_OTHER_BASE.format(folder))


class _Folder:
    """The tensors of all safetensors files in a folder, read when they are asked for."""

    def __init__(self, folder: Path):
        self._folder, self._file_of = folder, {}
        for file in sorted(folder.glob("*.safetensors")):
            with files.open_tensors(file) as stored:
                self._file_of |= dict.fromkeys(stored.keys(), file)
        if not self._file_of:
            raise FileNotFoundError(f"start={folder} holds neither an adapter nor a quantized model")

    def get(self, name: str) -> Tensor | None:
        return self[name] if name in self._file_of else None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise ValueError(f"start={self._folder} has no tensor {name!r}")
        with files.open_tensors(self._file_of[name]) as stored:
            return stored.get_tensor(name)
