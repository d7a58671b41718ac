"""The running sums of a calibration run: which layer's input goes into which sums, and which tokens count."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loftq_kernels.calibration.activations import ActivationStatistics
from loftq_kernels.calibration.masks import spread, token_axes, token_mask
from loftq_kernels.initializers import InputStatistics

# Rows of x that are multiplied in float32 at a time: a sum of so many products has a relative error of some 1e-6, which
# the float64 sum over all of them keeps; a float32 sum over 10^6 tokens would lose two more digits.
_ROWS_AT_ONCE = 1024


@dataclass(eq=False)
class Layer:
    name: str
    in_encoder: bool = False
    sums: _Sums | None = None
    inputs: int = 0  # that it has had; those of its sums, between two batches
    has_tokens: bool = False  # whether any of them depended on the batch
    tokens_first: bool = False  # whether they are [tokens, batch, K]


class _Sums:
    """Running sums over the tokens of one input, which one layer or several have."""

    def __init__(self, channels: int, device: torch.device):
        self.layers: list[Layer] = []
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


def _named(names: Iterable[str]) -> str:
    names = list(names)
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


class Collector:
    def __init__(self, layers: Iterable[Layer], share_inputs: bool, device: torch.device | str | None):
        self.layers = list(layers)
        self.share_inputs, self.device = share_inputs, device
        self.sums: list[_Sums] = []
        self.by_input: dict[int, _Sums] = {}  # id of an input of this batch -> where it went
        self.batches = 0
        self.mask: Tensor | None = None
        self.decoder_mask: Tensor | None = None
        self.decoder_shape: torch.Size | None = None  # [batch, tokens] of encoder-decoder models
        self.encoded: Tensor | None = None
        self.masks_used = False
        self.mask_without_use: tuple[int, ...] | None = None  # the shape of one that leaves out tokens, and fitted none

    def start(self, number: int, keywords: Mapping[str, Any], encoder_decoder: bool, encoder_known: bool) -> None:
        self.batches = number + 1
        self.by_input.clear()
        self.encoded = None
        self.mask, self.decoder_mask = (
            token_mask(keywords.get(key), f"the {key} of batch {number}")
            for key in ("attention_mask", "decoder_attention_mask")
        )
        self.decoder_shape = None
        if not encoder_decoder:
            return
        known = [keywords.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels", "input_ids")]
        self.decoder_shape = next((own.shape[:2] for own in known if isinstance(own, Tensor)), torch.Size())
        one_for_both = self.mask is not None and self.mask.shape == self.decoder_shape
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

    def _parted(self, layer: Layer) -> ValueError:
        names = ", ".join(repr(other.name) for other in layer.sums.layers)
        return ValueError(
            f"layers {names} had a common input at first, but not in batch {self.batches - 1}: pass share_inputs=False"
        )

    def observe(self, layer: Layer, x: Tensor, constant: bool) -> None:
        """Count an input of a layer. One that is constant, that is, does not depend on the batch, holds no tokens: it
        counts as long as the layer has had no other."""
        if constant and layer.has_tokens:
            return
        if not constant and not layer.has_tokens:
            self._forget_inputs(layer)
            layer.has_tokens = True
        self._add(layer, x)

    def _forget_inputs(self, layer: Layer) -> None:
        if layer.sums is None:
            return
        layer.sums.layers.remove(layer)
        if not layer.sums.layers:
            self.sums.remove(layer.sums)
        layer.sums, layer.inputs = None, 0

    def _add(self, layer: Layer, x: Tensor) -> None:
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

    def _counted(self, layer: Layer, x: Tensor) -> Tensor:
        """x [..., K] -> [n, K], without the tokens that the mask leaves out."""
        rows, mask = x.detach().reshape(-1, x.shape[-1]), self._mask_of(layer, x)
        if mask is None:
            return rows
        shape = x.shape[:-1]
        axes = token_axes(shape, mask.shape, layer.tokens_first)
        if axes is None:
            self.mask_without_use = tuple(mask.shape)
            return rows
        self.masks_used = True
        layer.tokens_first = axes == (1, 0)
        return rows[spread(mask, shape, axes).to(x.device)]

    def _mask_of(self, layer: Layer, x: Tensor) -> Tensor | None:
        """Whose tokens x holds is told by the layer, by the tensor (cross-attention is given the encoder's output
        itself) and, where the two have different lengths, by the shape."""
        if not layer.has_tokens:
            return None
        if self.decoder_shape is None or layer.in_encoder or x is self.encoded:
            return self.mask
        if len(self.decoder_shape) == 2 and token_axes(x.shape[:-1], self.decoder_shape) is not None:
            return self.decoder_mask
        return self.mask

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
        unreached = [layer.name for layer in self.layers if layer.name not in by_layer]
        self._warn(few, unreached)
        return ActivationStatistics(by_layer, unreached)

    def _warn(self, few: list[str], unreached: list[str]) -> None:
        said = []
        if few:
            said.append(
                f"{len(few)} inputs have fewer tokens than channels, so that their Gram matrices are singular: "
                f"{_named(few)}; calibrate on more data"
            )
        if unreached:
            said.append(
                f"no token reached {len(unreached)} of {len(self.layers)} layers, which have no statistics and will be "
                f"initialized without data: {_named(unreached)}"
            )
        if self.mask_without_use is not None and not self.masks_used:
            said.append(
                f"an attention mask of shape {self.mask_without_use} fits the input of no selected layer: padding "
                "counts as tokens"
            )
        for text in said:
            warnings.warn(text, stacklevel=4)
