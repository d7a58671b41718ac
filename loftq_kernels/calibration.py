"""`collect_activations`: the statistics of every layer's input over calibration data, streamed, and their file."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loftq_kernels import storage
from loftq_kernels.config import QuantConfig
from loftq_kernels.convert import is_conv1d
from loftq_kernels.initializers import InputStatistics
from loftq_kernels.nn import QuantLoRALinear
from loftq_kernels.progress import tqdm

_METADATA_KEY = "loftq_activation_statistics"
_VERSION = 1
_TENSORS = ("gram", "mean", "abs_mean", "abs_max")
# Rows of x that are multiplied in float32 at a time: a sum of so many products has a relative error of some 1e-6, which
# the float64 sum over all of them keeps; a float32 sum over 10^6 tokens would lose two more digits.
_ROWS_AT_ONCE = 1024


class ActivationStatistics(Mapping[str, InputStatistics]):
    """Layer name -> `InputStatistics`, as `quantize_model` takes it. Layers with one input share one object."""

    def __init__(self, layers: Mapping[str, InputStatistics]):
        self._layers = dict(layers)

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
            "version": _VERSION,
            "layers": {name: place[id(own)] for name, own in self.items()},
            "tokens": [own.tokens for own in distinct],
        }
        storage.save_tensors(path, tensors, {_METADATA_KEY: json.dumps(described)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> ActivationStatistics:
        """Read what `save` wrote; names, shapes and dtypes are checked before a tensor is made.

        Raises FileNotFoundError, or ValueError naming what is wrong with the file. Values are checked where they are
        used: by the initializers.
        """
        with storage.open_tensors(path, device) as file:
            try:
                layers, tokens = _parse((file.metadata() or {}).get(_METADATA_KEY))
                _check_header(file, len(tokens))
            except ValueError as error:
                raise ValueError(f"{path} does not hold activation statistics: {error}") from error
            distinct = [
                InputStatistics(*(file.get_tensor(f"{i}.{what}") for what in _TENSORS), tokens=count)
                for i, count in enumerate(tokens)
            ]
        return cls({name: distinct[i] for name, i in layers.items()})


def _parse(text: str | None) -> tuple[dict[str, int], list[int]]:
    """The JSON of a file -> the place of each layer's statistics, and their token counts."""
    if text is None:
        raise ValueError(f"its header has no {_METADATA_KEY!r}")
    try:
        described = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not JSON: {error}") from error
    if not isinstance(described, dict) or described.get("version") != _VERSION:
        raise ValueError(f"its header is not of version {_VERSION}")
    layers, tokens = described.get("layers"), described.get("tokens")
    if not isinstance(tokens, list) or not all(type(count) is int and count >= 1 for count in tokens):
        raise ValueError("tokens must be a list of positive integers")
    if not isinstance(layers, dict) or not layers:
        raise ValueError("layers must be a dict that is not empty")
    for name, place in layers.items():
        if type(place) is not int or not 0 <= place < len(tokens):
            raise ValueError(f"layer {name!r} has statistics {place!r} of {len(tokens)}")
    return layers, tokens


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


def collect_activations(
    model: nn.Module,
    batches: Iterable[Any],
    cfg: QuantConfig | None = None,
    *,
    progress: bool = True,
    device: torch.device | str | None = None,
    share_inputs: bool = True,
) -> ActivationStatistics:
    """Run the model over batches and return the statistics of the inputs of the layers that cfg selects.

    Of a layer's tokens x_t [K]: S = sum_t x_t x_t^T / n, means of x and |x|, max |x|, n. Products are made in float32
    (float64 for float64 inputs), 1024 tokens at a time, and summed in float64; results are float32. Memory does not
    grow with the number of tokens: 8 K^2 bytes for each different input until the end, 4 K^2 after. Layers that were
    given the same tensor object (q, k and v) have one input. Where a whole model is too much, collect some of the
    layers in one run (``cfg.include``), quantize these, and go on.

    Args:
        model: with nn.Linear, transformers' Conv1D or `QuantLoRALinear` layers; run in eval mode without gradients, and
            left as it was, hooks and training flags included, also after an error or Ctrl-C.
        batches: each a tensor (model(x)), a tuple or list (model(*batch)) or a mapping (model(**batch)); tensors are
            moved to the model's device. A mapping's "attention_mask" [batch, tokens] says which tokens count (those
            that are not 0), in layers whose input is [batch, tokens, K] or [batch * tokens, K]; others, such as a
            pooler's, count whole, and masks of other dimensions are left to the model. In encoder-decoder models it is
            the mask of the encoder's layers and of what the decoder is given of the encoder's output; the decoder's
            own tokens count as "decoder_attention_mask" says, all without one.
        cfg: which layers, by ``include``, ``exclude`` and ``overrides``; default `QuantConfig()`.
        progress: show a bar on standard error.
        device: where the sums are kept; default: where the inputs are.
        share_inputs: False treats every layer on its own, for models in which layers have a common input in one batch
            and different ones in the next.

    Layers that no token reached (experts never chosen) have no entry. Warns of layers with fewer tokens than channels:
    S is singular then, which the initializers here can do with, but it says nothing about most directions.
    Raises ValueError when no layer is selected, for no batch or no token, for NaN, Inf or squares beyond float32 in a
    layer's input (naming layer and batch), for an encoder-decoder model whose encoder is not to be found
    (``get_encoder()``) where a mask could be either's; TypeError for a batch of another kind.
    """
    cfg = cfg or QuantConfig()
    if not isinstance(cfg, QuantConfig):
        raise TypeError(f"cfg must be a QuantConfig, got {cfg!r}")
    if isinstance(batches, Tensor | Mapping | str):
        raise TypeError(f"batches must be an iterable of batches, got one {type(batches).__name__}")
    collector = _Collector(share_inputs, device)
    layers = {name: module for name, module in model.named_modules() if _is_selected(name, module, cfg)}
    if not layers:
        raise ValueError(f"no linear layer to observe: include={cfg.include}, exclude={cfg.exclude}")
    encoder = _encoder(model)
    target = next((p.device for p in model.parameters()), torch.device("cpu"))
    total = len(batches) if isinstance(batches, Sized) else None
    with _observing(model, layers, encoder, collector):
        for number, batch in enumerate(
            tqdm(batches, desc="calibrate", unit="batch", total=total, disable=not progress)
        ):
            arguments, keywords = _arguments(_to_device(batch, target))
            collector.start(number, keywords, _is_encoder_decoder(model, keywords), encoder is not None)
            model(*arguments, **keywords)
            collector.finish()
    with torch.inference_mode(False), torch.no_grad():
        return collector.results()


def _is_selected(name: str, module: nn.Module, cfg: QuantConfig) -> bool:
    """As `quantize_model`, which leaves subclasses of nn.Linear alone."""
    known = type(module) is nn.Linear or isinstance(module, QuantLoRALinear) or is_conv1d(module)
    return known and cfg.selects(name) and cfg.for_layer(name) is not None


def _is_encoder_decoder(model: nn.Module, keywords: Mapping[str, Any]) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) or "decoder_input_ids" in keywords


def _encoder(model: nn.Module) -> nn.Module | None:
    """As transformers' models tell it, which return themselves if they have none."""
    get_encoder = getattr(model, "get_encoder", None)
    encoder = get_encoder() if callable(get_encoder) else None
    return encoder if isinstance(encoder, nn.Module) and encoder is not model else None


def _arguments(batch: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    raise TypeError(f"a batch must be a tensor, a tuple, a list or a mapping, got {type(batch).__name__}")


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to_device(own, device) for key, own in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_to_device(own, device) for own in value)
    return value


@contextlib.contextmanager
def _observing(
    model: nn.Module, layers: Mapping[str, nn.Module], encoder: nn.Module | None, collector: _Collector
) -> Iterator[None]:
    """Hooks on, eval mode, no gradients; all as before on the way out."""
    training = [(module, module.training) for module in model.modules()]
    handles = []
    encoding = set() if encoder is None else set(encoder.modules())
    try:
        if encoder is not None:
            handles.append(encoder.register_forward_hook(functools.partial(_keep_encoded, collector)))
        for name, module in layers.items():
            hook = functools.partial(_hook, collector, _Layer(name, module in encoding))
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        model.eval()
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training:
            module.training = flag


def _hook(collector: _Collector, layer: _Layer, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    x = args[0] if args else next(iter(kwargs.values()), None)
    if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 0:  # of anything else the layer itself complains
        with torch.autocast(x.device.type, enabled=False):
            collector.observe(layer, x)


def _keep_encoded(collector: _Collector, module: nn.Module, args: tuple, output: Any) -> None:
    state = getattr(output, "last_hidden_state", None)
    if state is None:
        state = output[0] if isinstance(output, tuple) and output else output
    collector.encoded = state if isinstance(state, Tensor) else None


@dataclass(eq=False)
class _Layer:
    name: str
    in_encoder: bool = False
    sums: _Sums | None = None
    inputs: int = 0  # that it has had; those of its sums, between two batches


class _Sums:
    """Running sums over the tokens of one input, which one layer or several have."""

    def __init__(self, channels: int, device: torch.device):
        self.layers: list[_Layer] = []
        self.inputs = 0
        self.tokens = 0
        self.gram = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        self.total, self.abs_total, self.abs_max = torch.zeros(3, channels, dtype=torch.float64, device=device)
        self._latest: weakref.ref[Tensor] | None = None
        self._version: int | None = None

    def add(self, x: Tensor, rows: Tensor) -> bool:
        """Add rows [n, K], those of x that count; False where a square is not finite."""
        self.inputs += 1
        self._latest, self._version = weakref.ref(x), _version(x)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        for chunk in rows.split(_ROWS_AT_ONCE):
            if len(chunk) == 0:
                continue
            product = chunk.T @ chunk
            if not torch.isfinite(product.diagonal()).all():
                return False
            size = chunk.abs()
            self.gram += product.to(self.gram.device)
            self.total += chunk.sum(0, dtype=torch.float64).to(self.gram.device)
            self.abs_total += size.sum(0, dtype=torch.float64).to(self.gram.device)
            torch.maximum(self.abs_max, size.amax(0).to(self.abs_max), out=self.abs_max)
            self.tokens += len(chunk)
        return True

    def is_latest(self, x: Tensor) -> bool:
        """Whether x, unchanged, is what was added last. A weak reference: an address may be another tensor's by now."""
        version = _version(x)
        return self._latest is not None and self._latest() is x and version is not None and version == self._version

    def statistics(self) -> InputStatistics:
        """Means, in float32; the sums are given up."""
        vectors = (self.total / self.tokens, self.abs_total / self.tokens, self.abs_max)
        gram, self.gram = self.gram.div_(self.tokens).float(), None
        return InputStatistics(gram, *(vector.float() for vector in vectors), tokens=self.tokens)


def _version(x: Tensor) -> int | None:
    """Counts writes to x; None where nothing does (tensors made in inference mode), so that those are never shared."""
    return None if x.is_inference() else x._version


def _mask(mask: Any) -> Tensor | None:
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _fits(x: Tensor, shape: torch.Size) -> bool:
    """Whether x is [batch, tokens, K] or [batch * tokens, K]."""
    return x.shape[:-1] in (shape, (math.prod(shape),))


class _Collector:
    def __init__(self, share_inputs: bool, device: torch.device | str | None):
        self.share_inputs, self.device = share_inputs, device
        self.sums: list[_Sums] = []
        self.by_input: dict[int, _Sums] = {}  # id of an input of this batch -> where it went
        self.batches = 0
        self.mask: Tensor | None = None
        self.decoder_mask: Tensor | None = None
        self.decoder_shape: torch.Size | None = None  # [batch, tokens] of encoder-decoder models
        self.encoded: Tensor | None = None

    def start(self, number: int, keywords: Mapping[str, Any], encoder_decoder: bool, encoder_known: bool) -> None:
        self.batches = number + 1
        self.by_input.clear()
        self.encoded = None
        self.mask, self.decoder_mask = (_mask(keywords.get(f"{of}attention_mask")) for of in ("", "decoder_"))
        self.decoder_shape = None
        if not encoder_decoder:
            return
        known = [keywords.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels", "input_ids")]
        self.decoder_shape = next((own.shape[:2] for own in known if isinstance(own, Tensor)), torch.Size())
        one_for_both = self.mask is not None and not self.mask.all() and self.mask.shape == self.decoder_shape
        if one_for_both and not encoder_known:
            raise ValueError(
                f"the attention_mask of batch {number} is the encoder's, but the decoder's inputs have its shape "
                f"{tuple(self.mask.shape)}, too, and the model has no get_encoder() to tell whose layers are whose"
            )

    def finish(self) -> None:
        """Layers with common sums must all have had every input: their calls, not only their first, are the same."""
        self.by_input.clear()
        self.encoded = None
        for sums in self.sums:
            for layer in sums.layers:
                if layer.inputs != sums.inputs:
                    raise self._parted(layer)

    def _parted(self, layer: _Layer) -> ValueError:
        names = ", ".join(repr(other.name) for other in layer.sums.layers)
        return ValueError(
            f"layers {names} had a common input at first, but not in batch {self.batches - 1}: pass share_inputs=False"
        )

    def observe(self, layer: _Layer, x: Tensor) -> None:
        if layer.sums is None:
            found = self.by_input.get(id(x)) if self.share_inputs else None
            # Only sums of nothing but this input can be shared; later ones hold what this layer has not had.
            if found is not None and found.inputs == 1 and found.is_latest(x):
                layer.sums, layer.inputs = found, 1
                found.layers.append(layer)
                return
            layer.sums = _Sums(x.shape[-1], x.device if self.device is None else torch.device(self.device))
            layer.sums.layers.append(layer)
            self.sums.append(layer.sums)
        elif layer.inputs < layer.sums.inputs:  # another layer has brought the input already
            if layer.inputs != layer.sums.inputs - 1 or not layer.sums.is_latest(x):
                raise self._parted(layer)
            layer.inputs += 1
            return
        layer.inputs += 1
        self.by_input[id(x)] = layer.sums
        rows = self._counted(layer, x)
        if not layer.sums.add(x, rows):
            wrong = "holds NaN or Inf" if not torch.isfinite(rows).all() else "is too large: its squares overflow"
            raise ValueError(f"the input of layer {layer.name!r} {wrong} in batch {self.batches - 1}")

    def _counted(self, layer: _Layer, x: Tensor) -> Tensor:
        """x [..., K] -> [n, K], without the tokens that the mask leaves out."""
        rows, mask = x.detach().reshape(-1, x.shape[-1]), self._mask_of(layer, x)
        if mask is None or not _fits(x, mask.shape):
            return rows
        return rows[mask.flatten().to(x.device)]

    def _mask_of(self, layer: _Layer, x: Tensor) -> Tensor | None:
        """Whose tokens x holds is told by the layer, by the tensor (cross-attention is given the encoder's output
        itself) and, where the two have different lengths, by the shape."""
        if self.decoder_shape is None or layer.in_encoder or x is self.encoded:
            return self.mask
        return self.decoder_mask if _fits(x, self.decoder_shape) else self.mask

    def results(self) -> ActivationStatistics:
        if self.batches == 0:
            raise ValueError("batches is empty: there is nothing to calibrate on")
        reached = [sums for sums in self.sums if sums.tokens]
        if not reached:
            raise ValueError(f"no token reached a selected layer in {self.batches} batches")
        by_layer = {}
        few = []
        for sums in reached:
            own = sums.statistics()
            names = [layer.name for layer in sums.layers]
            if not torch.isfinite(own.gram).all():
                raise ValueError(f"the input of layer {names[0]!r} is too large: its squares overflow float32")
            by_layer |= dict.fromkeys(names, own)
            if own.tokens < own.channels:
                few.append(f"{names[0]} ({own.tokens} tokens, {own.channels} channels)")
        if few:
            warnings.warn(
                f"{len(few)} inputs have fewer tokens than channels, so that their Gram matrices are singular: "
                f"{', '.join(few[:3])}{', ...' if len(few) > 3 else ''}; calibrate on more data",
                stacklevel=3,
            )
        return ActivationStatistics(by_layer)
