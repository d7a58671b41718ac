"""The running sums of a calibration run: which layer's input goes into which sums, and which tokens count."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loftq_kernels.calibration.activations import ActivationStatistics
from loftq_kernels.calibration.masks import spread, token_axes, token_mask
from loftq_kernels.initializers import InputStatistics

# Rows of x that are multiplied in float32 at a time: a sum of so many products has a relative error of some 1e-6, which
# the float64 sum over all of them keeps; a float32 sum over 10^6 tokens would lose two more digits.
_ROWS_AT_ONCE = 1024


# Inputs of one layer whose sums are kept apart at a time: each costs as much memory as the layer's own sums.
_OPEN_AT_MOST = 4


@dataclass(eq=False)
class Layer:
    name: str
    in_encoder: bool = False
    group: _Group | None = None  # None before an input of the layer is settled
    open: list[_Input] = field(default_factory=list)  # its inputs of this batch that are not in its group's sums yet
    has_tokens: bool = False  # whether any of its inputs depended on the batch
    tokens_first: bool = False  # whether they are [tokens, batch, K]


class _Sums:
    """Running sums over tokens."""

    def __init__(self, channels: int, device: torch.device):
        self.tokens = 0
        self.gram = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        self.total, self.abs_total, self.abs_max = torch.zeros(3, channels, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> bool:
        """Add rows [n, K]; False where a square is not finite."""
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

    def copy(self) -> _Sums:
        new = copy.copy(self)
        new.gram, new.total, new.abs_total, new.abs_max = (
            own.clone() for own in (self.gram, self.total, self.abs_total, self.abs_max)
        )
        return new

    def merge(self, other: _Sums) -> None:
        """Add the tokens of other, which stays as it is."""
        self.gram += other.gram.to(self.gram.device)
        self.total += other.total.to(self.gram.device)
        self.abs_total += other.abs_total.to(self.gram.device)
        torch.maximum(self.abs_max, other.abs_max.to(self.gram.device), out=self.abs_max)
        self.tokens += other.tokens

    def statistics(self) -> InputStatistics:
        """Means, in float32; the sums are given up."""
        vectors = (self.total / self.tokens, self.abs_total / self.tokens, self.abs_max)
        gram, self.gram = self.gram.div_(self.tokens).float(), None
        return InputStatistics(gram, *(vector.float() for vector in vectors), tokens=self.tokens)


class _Group:
    """Layers that have had the same inputs, and the sums over these."""

    def __init__(self, layers: set[Layer], sums: _Sums):
        self.layers, self.sums = layers, sums
        for layer in layers:
            layer.group = self

    def split(self, part: set[Layer]) -> _Group:
        """The part leaves, with a copy of the sums."""
        self.layers -= part
        return _Group(part, self.sums.copy())


class _Input:
    """An input of this batch, for as long as further layers may be given it. Its sums are its own until it is settled,
    that is, added to those of the layers that took it: rows of x kept instead could be overwritten by then."""

    def __init__(self, x: Tensor, counts: tuple, sums: _Sums):
        self.key, self.x, self.version = id(x), weakref.ref(x), _version(x)  # weak: x need not live longer for this
        self.counts = counts  # the mask and its axes in x
        self.sums = sums
        self.takers: set[Layer] = set()  # in whose sums it is not yet

    def is_over(self) -> bool:
        """Whether no layer can be given it any more: x is gone, or has been written to."""
        x = self.x()
        return x is None or self.version is None or _version(x) != self.version

    def fits(self, layer: Layer, counts: tuple) -> bool:
        """Whether the layer, given x, is given this: as many times as an input comes, so many of these it takes."""
        return self.counts[0] is counts[0] and self.counts[1] == counts[1] and layer not in self.takers


def _version(x: Tensor) -> int | None:
    """Counts writes to x; None where nothing does (tensors made in inference mode), so that those are never shared."""
    return None if x.is_inference() else x._version


def _named(names: Iterable[str]) -> str:
    names = list(names)
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def _counted(x: Tensor, mask: Tensor | None, axes: tuple[int, ...] | None) -> Tensor:
    """x [..., K] -> [n, K], without the tokens that the mask leaves out."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return rows if mask is None else rows[spread(mask, x.shape[:-1], axes).to(x.device)]


class Collector:
    def __init__(self, layers: Iterable[Layer], share_inputs: bool, device: torch.device | str | None):
        self.layers = list(layers)
        self.share_inputs, self.device = share_inputs, device
        self.inputs: dict[int, list[_Input]] = {}  # by id of x: those of this batch that are not settled
        self.batches = 0
        self.mask: Tensor | None = None
        self.decoder_mask: Tensor | None = None
        self.decoder_shape: torch.Size | None = None  # [batch, tokens] of encoder-decoder models
        self.encoded: Tensor | None = None
        self.masks_used = False
        self.mask_without_use: tuple[int, ...] | None = None  # the shape of one that leaves out tokens, and fitted none

    def start(self, number: int, keywords: Mapping[str, Any], encoder_decoder: bool, encoder_known: bool) -> None:
        self.batches = number + 1
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
        """Settle what is left: layers that took other inputs than the rest of their group leave it."""
        for entry in [entry for entries in self.inputs.values() for entry in entries]:
            self._settle(entry)
        self.inputs.clear()
        self.encoded = None

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
        for entry in layer.open.copy():
            self._release(entry, {layer})
        if layer.group is not None:
            layer.group.layers.remove(layer)
            layer.group = None

    def _add(self, layer: Layer, x: Tensor) -> None:
        for entry in [entry for entry in layer.open if entry.is_over()]:
            self._settle(entry)
        counts = self._counts(layer, x)
        entry = self._found(layer, x, counts) if self.share_inputs else None
        if entry is None and self._is_alone(layer):
            group = layer.group or _Group({layer}, self._empty_sums(x))
            self._sum_up(layer, x, counts, group.sums)
        else:
            self._take(layer, entry or self._new_input(layer, x, counts))

    def _is_alone(self, layer: Layer) -> bool:
        """Whether no other layer has its inputs; before the first of them is settled, any other may."""
        return not self.share_inputs or (layer.group is not None and len(layer.group.layers) == 1)

    def _empty_sums(self, x: Tensor) -> _Sums:
        return _Sums(x.shape[-1], x.device if self.device is None else torch.device(self.device))

    def _found(self, layer: Layer, x: Tensor, counts: tuple) -> _Input | None:
        entries = self.inputs.get(id(x), [])
        for entry in [entry for entry in entries if entry.is_over()]:  # of another tensor at this address, or its past
            self._settle(entry)
        return next((entry for entry in entries if entry.fits(layer, counts)), None)

    def _new_input(self, layer: Layer, x: Tensor, counts: tuple) -> _Input:
        entry = _Input(x, counts, self._empty_sums(x))
        self._sum_up(layer, x, counts, entry.sums)
        self.inputs.setdefault(id(x), []).append(entry)
        return entry

    def _take(self, layer: Layer, entry: _Input) -> None:
        entry.takers.add(layer)
        layer.open.append(entry)
        group = layer.group
        if group is not None and group.layers <= entry.takers:
            self._settle_in(entry, group, group.layers.copy())
        elif len(layer.open) > _OPEN_AT_MOST:
            self._settle(layer.open[0])

    def _settle(self, entry: _Input) -> None:
        """Add an input to the sums of all that took it."""
        parts: dict[_Group | None, set[Layer]] = {}
        for layer in entry.takers:
            parts.setdefault(layer.group, set()).add(layer)
        first = parts.pop(None, None)
        for group, part in parts.items():
            self._settle_in(entry, group, part)
        if first is not None:  # last, since the sums of the input become theirs
            _Group(first, entry.sums)
            self._release(entry, first)

    def _settle_in(self, entry: _Input, group: _Group, part: set[Layer]) -> None:
        """Add an input to the sums of those of a group that took it; they leave the group if the others did not."""
        if len(part) < len(group.layers):
            group = group.split(part)
        group.sums.merge(entry.sums)
        self._release(entry, part)

    def _release(self, entry: _Input, layers: set[Layer]) -> None:
        """The layers are done with an input; with the last of them its sums go."""
        for layer in layers:
            layer.open.remove(entry)
        entry.takers -= layers
        if not entry.takers:
            self.inputs[entry.key].remove(entry)

    def _sum_up(self, layer: Layer, x: Tensor, counts: tuple, sums: _Sums) -> None:
        rows = _counted(x, *counts)
        if not sums.add(rows):
            wrong = "holds NaN or Inf" if not torch.isfinite(rows).all() else "is too large: its squares overflow"
            raise ValueError(f"the input of layer {layer.name!r} {wrong} in batch {self.batches - 1}")

    def _counts(self, layer: Layer, x: Tensor) -> tuple[Tensor | None, tuple[int, ...] | None]:
        """The mask that says which tokens of x count, and its axes in x; None where all do."""
        mask = self._mask_of(layer, x)
        if mask is None:
            return None, None
        axes = token_axes(x.shape[:-1], mask.shape, layer.tokens_first)
        if axes is None:
            self.mask_without_use = tuple(mask.shape)
            return None, None
        self.masks_used = True
        layer.tokens_first = axes == (1, 0)
        return mask, axes

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
        groups: dict[_Group, list[str]] = {}
        for layer in self.layers:
            if layer.group is not None and layer.group.sums.tokens:
                groups.setdefault(layer.group, []).append(layer.name)
        if not groups:
            raise ValueError(f"no token reached a selected layer in {self.batches} batches")
        by_layer = {}
        few = []
        for group, names in groups.items():
            own = group.sums.statistics()
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
