"""Dense models in local folders: transformers ones, and plain safetensors files. Nothing is fetched or unpickled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from loftq_kernels.checkpoints import hosted
from loftq_kernels.checkpoints.architecture import (
    architecture_of,
    is_linear,
    model_class,
    plain_model,
)
from loftq_kernels.checkpoints.manifest import CONFIG_NAME
from loftq_kernels.checkpoints.tensor_file import dtype_of
from loftq_kernels.models.config import matches
from loftq_kernels.nn.wrappers import named_tensors, submodule, tensor_of, unwrapped
from loftq_kernels.storage import files

_SCALES = ("scale", "scale_inv", "scales", "SCB", "absmax", "qzeros")  # of weights that others have quantized
_NAME_LAYERS = (
    "name the layers whose weights are [out_features, in_features] (layers=), "
    "or give the model that the tensors belong to (model=)"
)


def load_dense(
    path: str | Path, *, layers: Iterable[str] | str | None = None, model: nn.Module | None = None
) -> nn.Module:
    """The model in a local folder, with its tensors.

    Args:
        path: a folder with a config.json of transformers, or plain safetensors files.
        layers: plain files: patterns (or one) of the names of their linear layers, whose weights are [out_features,
            in_features]. Nothing is guessed from shapes: GPT-2's matrices are transposed, and embedding tables look
            like linear layers.
        model: plain files: the model that they belong to; filled in place, and returned.

    Raises FileNotFoundError when there is no such folder or no safetensors file in it, ValueError for files that
    cannot be read or lack tensors, a quantized folder, finished or not, plain files without ``layers`` or ``model``,
    and patterns that match no matrix.
    """
    path = Path(path)
    found = tensor_files(path)
    if model is not None:
        return _filled(model, _all_tensors(found))
    if (path / "config.json").is_file():
        return _from_transformers(path)
    return _named_layers(path, _all_tensors(found), _given(path, layers))


def outline(
    path: str | Path, *, layers: Iterable[str] | str | None = None, model: nn.Module | None = None
) -> nn.Module | None:
    """The model of `load_dense` without values, on the meta device, from config.json and the headers of the files.

    A ``model`` that the files belong to has to be on that device.
    None where transformers cannot build its model there, which loading may all the same. Raises as `load_dense` for
    what needs no values.
    """
    path = Path(path)
    found = tensor_files(path)
    headers = _all_headers(found)
    if model is not None:
        return _filled(model, headers)
    if not (path / "config.json").is_file():
        return _named_layers(path, headers, _given(path, layers))
    cls = model_class(architecture_of(path / "config.json"))
    try:
        config = cls.config_class.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            model = cls(config)
    except Exception:  # What is wrong with it, loading tells.
        return None
    return model.to(_dtype_of(config, headers)).eval()


def _dtype_of(config, headers: Mapping[str, Tensor]) -> torch.dtype | None:
    """The dtype that transformers loads a model in: of its config, or else of its first floating tensor."""
    told = getattr(config, "dtype", None)
    told = getattr(torch, told, None) if isinstance(told, str) else told
    return told or next((tensor.dtype for tensor in headers.values() if tensor.is_floating_point()), None)


def tensor_files(path: Path) -> list[Path]:
    """The safetensors files of a dense model's folder. Raises FileNotFoundError or ValueError for other folders."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder")
    if (path / CONFIG_NAME).is_file() or hosted.is_hosted(path):
        told = CONFIG_NAME if (path / CONFIG_NAME).is_file() else f"a {hosted.CONFIG_NAME} that says so"
        raise ValueError(f"{path} is already quantized: it holds {told}; load it with load_quantized")
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise FileNotFoundError(f"{path} holds no .safetensors file (pickled weights are not read)")
    return found


def _given(path: Path, layers: Iterable[str] | str | None) -> tuple[str, ...]:
    if layers is None:
        raise ValueError(f"{path} has no config.json, and shapes do not tell an architecture: {_NAME_LAYERS}")
    return (layers,) if isinstance(layers, str) else tuple(layers)


def _from_transformers(path: Path) -> nn.Module:
    cls = model_class(architecture_of(path / "config.json"))
    options = {"local_files_only": True, "use_safetensors": True, "dtype": "auto"}
    told_of = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # for errors that name the tensors
    try:
        model, told = cls.from_pretrained(path, **options, **told_of)
    except Exception as error:  # transformers and safetensors raise many kinds for a damaged folder
        wrong = f"cannot be loaded as {cls.__name__} (truncated, corrupted or of another model?)"
        raise ValueError(f"{path} {wrong}: {type(error).__name__}: {error}") from error
    _check_told(f"{path}: {cls.__name__}", told)
    return model.eval()


def _check_told(what: str, told: dict[str, Iterable]) -> None:
    """Raise ValueError for tensors that transformers fills with random values, or reads without their scales."""
    for name, stored, needed in sorted(told["mismatched_keys"]):
        raise ValueError(f"{what} needs {name!r} of shape {tuple(needed)}, the file holds {tuple(stored)}")
    if missing := sorted(told["missing_keys"]):
        raise ValueError(f"{what} needs {len(missing)} tensors that the files lack: {', '.join(missing[:5])}")
    if scales := sorted(name for name in told["unexpected_keys"] if name.endswith(_SCALES)):
        raise ValueError(f"{what} would read scaled weights without {scales[0]!r}: load and save it dequantized first")


def _all_headers(found: list[Path]) -> dict[str, Tensor]:
    """The tensors of files on the meta device; the headers alone are read."""
    return _united(found, _header)


def _header(file: Path) -> dict[str, Tensor]:
    with files.open_tensors(file) as stored:
        slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
        return {
            name: torch.empty(own.get_shape(), dtype=dtype_of(name, own.get_dtype()), device="meta")
            for name, own in slices.items()
        }


def _all_tensors(found: list[Path]) -> dict[str, Tensor]:
    return _united(found, lambda file: files.load_tensors(file)[0])


def _united(found: list[Path], read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in found:
        own = read(file)
        if twice := own.keys() & tensors.keys():
            raise ValueError(f"{file} holds {min(twice)!r}, which another file of the folder holds, too")
        tensors.update(own)
    if packed := [name for name in tensors if name.endswith(".codes") and f"{name[:-5]}codebook" in tensors]:
        raise ValueError(
            f"{found[0].parent} holds packed weights, {packed[0]!r}, without a {CONFIG_NAME}: an unfinished save?"
        )
    return tensors


def _filled(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """The model with the tensors; parameters that it shares stay shared, and one name of theirs is enough."""
    target = unwrapped(model)
    shared: dict[int, list[str]] = {}
    for name, tensor in named_tensors(target, persistent=True):
        shared.setdefault(id(tensor), []).append(name)
    for names in shared.values():
        given = [name for name in names if name in tensors]
        if any(not _equal(tensors[name], tensors[given[0]]) for name in given[1:]):
            raise ValueError(f"{type(target).__name__} shares {', '.join(given)}, which differ in the files")
        tensors.update(dict.fromkeys(names, tensors[given[0]]) if given else {})
    try:
        target.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"the files are not those of {type(target).__name__}: {' '.join(str(error).split())}"
        ) from error
    for first, *others in shared.values():
        for name in others:
            setattr(submodule(target, name.rpartition(".")[0]), name.rpartition(".")[2], tensor_of(target, first))
    held = any(not tensor.is_meta for tensor in tensors.values())
    if held and (empty := [name for name, tensor in named_tensors(target) if tensor.is_meta]):
        raise ValueError(f"{type(target).__name__} has no values for {', '.join(empty[:5])}: do not build it on meta")
    return model.eval()


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether tensors hold the same; of those on the meta device, whether they can."""
    return one.shape == other.shape if one.is_meta else torch.equal(one, other)


def _named_layers(path: Path, tensors: dict[str, Tensor], patterns: tuple[str, ...]) -> nn.Module:
    owners: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        owners.setdefault(stem, {})[leaf] = tensor
    matrices = [stem for stem, own in owners.items() if stem and is_linear(own)]
    chosen = [stem for stem in matrices if any(matches(stem, pattern) for pattern in patterns)]
    for pattern in patterns:
        if not any(matches(stem, pattern) for stem in matrices):
            raise ValueError(f"{path}: {pattern!r} matches none of its matrices: {', '.join(matrices[:8])}, ...")
    return plain_model(tensors, chosen)
