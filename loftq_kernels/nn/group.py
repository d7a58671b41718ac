"""`QuantLoRALinearGroup`: projections of the same input, such as q, k and v or gate and up, in one product."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from loftq_kernels.formats import PackedTensor
from loftq_kernels.nn.adapter_slots import mixed_rows_of
from loftq_kernels.nn.linear import QuantLoRALinear
from loftq_kernels.nn.stacking import Factors
from loftq_kernels.ops import linear_tensors
from loftq_kernels.ops.constant import Constant, plain

_STACKED = ("codes", "scale", "offset")
_groups: WeakKeyDictionary[QuantLoRALinear, WeakSet[QuantLoRALinearGroup]] = WeakKeyDictionary()


def is_grouped(layer: object) -> bool:
    """Whether a layer is in a group, which computes with it without calling it."""
    return bool(_groups.get(layer))


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _state_of(parameter: Tensor | None) -> tuple[int, int]:
    """(version, address) of a parameter, by which changes of its values are noticed."""
    return (0, 0) if parameter is None else (parameter._version, parameter.data_ptr())


def _factors(term: Factors | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if term is None else term[:2]


class QuantLoRALinearGroup:
    """(y_0, y_1, ...) with y_i = layers[i](x), as one product with the weights on top of each other.

    There is one call instead of one per layer, x is read once, and all adapters' x @ lora_A.T are computed at once. The
    packed weights move into common tensors, and the layers' own tensors become views of them: nothing is held twice,
    and the layers work, save and load as before. Layers that are moved or loaded anew are gathered again at the next
    call. A call without gradients also keeps a copy of the adapters, in which each lora_B fills a block of its own,
    scaling included. The copy is made anew when an adapter, bias or scaling has changed, with two exceptions:

    * PyTorch does not record writes to ``parameter.data`` (``p.data.copy_(...)``) or by the replay of a CUDA graph:
      call `invalidate` after them.
    * A CUDA graph that is captured after a call always reads the copy of that call. It never sees a later change, even
      after `invalidate`: capture it anew.

    The group is no module: it holds the layers of a model, whose names in checkpoints stay as they are.

        self.qkv = lk.QuantLoRALinearGroup([self.q_proj, self.k_proj, self.v_proj])
        q, k, v = self.qkv(x)

    Args:
        layers: `QuantLoRALinear`s of one in_features, format, group_size, scale dtype and device, all with offsets or
            none; ranks, scalings, biases and kinds of adapter may differ. Merging the adapters (`merge_adapter`) of
            only some layers may make them differ: the next call then raises, and says in what.

    Shapes: x [..., in_features] -> a tuple of [..., layers[i].out_features], views of one tensor. Differentiable as the
    layers are. Raises TypeError for other modules, ValueError for layers that do not fit together.
    """

    def __init__(self, layers: Sequence[QuantLoRALinear]):
        self.layers = tuple(layers)
        if not self.layers:
            raise ValueError("a group needs at least one layer")
        for layer in self.layers:
            if not isinstance(layer, QuantLoRALinear):
                raise TypeError(f"a group takes QuantLoRALinear layers, got {type(layer).__name__}")
        if len(set(map(id, self.layers))) != len(self.layers):
            raise ValueError("a layer is in the group twice")
        self.out_features = [layer.out_features for layer in self.layers]
        self._in_graphs: list[tuple[Tensor | None, ...]] = []
        self._stack()
        for layer in self.layers:
            _groups.setdefault(layer, WeakSet()).add(self)

    def invalidate(self) -> None:
        """Forget the copy of adapters and biases. Call it after writes to their ``.data``, which leave no trace."""
        self._cached = None

    def _check(self) -> None:
        first = self.layers[0]
        for i, layer in enumerate(self.layers):
            for name in ("in_features", "group_size"):
                if getattr(layer, name) != getattr(first, name):
                    raise ValueError(f"layers[{i}] has {name}={getattr(layer, name)}, layers[0] {getattr(first, name)}")
            if layer.format != first.format:
                raise ValueError(f"layers[{i}] has format {layer.format.name}, layers[0] {first.format.name}")
            if layer.scale.dtype != first.scale.dtype:
                raise ValueError(f"layers[{i}] has scales in {layer.scale.dtype}, layers[0] in {first.scale.dtype}")
            if (layer.offset is None) != (first.offset is None):
                has = ["no offsets" if one.offset is None else "offsets" for one in (layer, first)]
                raise ValueError(f"layers[{i}] has {has[0]}, layers[0] {has[1]}: merge the adapters of all or of none")
            if layer.codes.device != first.codes.device:
                raise ValueError(f"layers[{i}] is on {layer.codes.device}, layers[0] on {first.codes.device}")

    def _stack(self) -> None:
        """Gather the packed weights into common tensors and make the layers' tensors views of them."""
        self._check()
        if _capturing(self.layers[0].codes):
            raise RuntimeError(
                "the layers of a group were moved or loaded: call it once before its CUDA graph is captured"
            )
        first = self.layers[0]
        stacked = {}
        with torch.no_grad(), torch.inference_mode(False):
            for name in _STACKED:
                if getattr(first, name) is None:
                    stacked[name] = None
                    continue
                stacked[name] = torch.cat([plain(getattr(layer, name)) for layer in self.layers])
                for layer, view in zip(self.layers, stacked[name].split(self.out_features), strict=True):
                    layer._parameters[name] = Constant(view)
        self._packed = PackedTensor(
            *(stacked[name] for name in _STACKED),
            plain(first.codebook),
            in_features=first.in_features,
            group_size=first.group_size,
            format=first.format,
        )
        self._views = tuple(getattr(layer, name) for layer in self.layers for name in _STACKED)
        self._cached: tuple[list, tuple[Tensor | None, Tensor | None, Tensor | None]] | None = None

    @property
    def packed(self) -> PackedTensor:
        """The stacked weight [sum of out_features, in_features]; shares its memory with the layers."""
        now = (layer._parameters[name] for layer in self.layers for name in _STACKED)
        if any(own is not view for own, view in zip(now, self._views, strict=True)):
            self._stack()  # A layer was moved, or loaded with assign=True.
        return self._packed

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        if any(mixed_rows_of(layer.slots) is not None for layer in self.layers):
            return tuple(layer(x) for layer in self.layers)  # Inside `use_adapters` each has adapters for each row.
        packed = self.packed
        lora_A, lora_B, bias = self._adapters_and_bias()
        y = linear_tensors(
            x,
            packed.codes,
            packed.scale,
            packed.offset,
            packed.codebook,
            packed.group_size,
            lora_A,
            lora_B,
            1.0,
            bias,
            in_features=packed.shape[1],
        )
        return y.split(self.out_features, -1)

    def _adapters_and_bias(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Stacked lora_A [sum of ranks, K], block-diagonal lora_B with the scalings, stacked bias.

        They are kept until a layer's own change, except when gradients flow through them or a compiler traces.
        """
        terms = [layer.low_rank() for layer in self.layers]
        of_layers = [p for layer, term in zip(self.layers, terms, strict=True) for p in (*_factors(term), layer.bias)]
        scalings = [None if term is None else term.scaling for term in terms]
        own = [p for p in of_layers if p is not None]
        traced = torch.compiler.is_compiling() or any(p.is_inference() for p in own)
        if traced or (torch.is_grad_enabled() and any(p.requires_grad for p in own)):
            return self._stacked_adapters_and_bias(terms)
        capturing = _capturing(self.layers[0].codes)
        if self._cached is not None and self._is_current(self._cached[0], of_layers, scalings):
            stacked = self._cached[1]
            if capturing and not any(stacked is kept for kept in self._in_graphs):
                self._in_graphs.append(stacked)  # The graph reads this memory, and its end is never reported.
            return stacked
        with torch.inference_mode(False), torch.no_grad():
            stacked = self._stacked_adapters_and_bias(terms)
        if not capturing:  # Results inside a graph have no values before it runs.
            if own and own[0].is_cuda:
                torch.cuda.current_stream(own[0].device).synchronize()  # Other streams will read the copy.
            # Keep the parameters themselves: their replacements may get the same ids and addresses.
            of_parameters = [(p, *_state_of(p)) for p in of_layers]
            self._cached = [*of_parameters, *scalings], stacked
        return stacked

    def _is_current(self, made_of: list, of_layers: list[Tensor | None], scalings: list[float | None]) -> bool:
        """Whether a copy that was made of these tensors and scalings still agrees with the layers."""
        if made_of[len(of_layers) :] != scalings:
            return False
        return all(
            kept is p and (version, address) == _state_of(p)
            for (kept, version, address), p in zip(made_of, of_layers, strict=False)
        )

    def _stacked_adapters_and_bias(
        self, terms: Sequence[Factors | None]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        lora_A = lora_B = bias = None
        if any(term is not None for term in terms):
            lora_A = torch.cat([term.lora_A for term in terms if term is not None])
            blocks, column = [], 0
            for layer, term in zip(self.layers, terms, strict=True):
                if term is None:
                    blocks.append(lora_A.new_zeros(layer.out_features, len(lora_A)))
                    continue
                after = len(lora_A) - column - len(term.lora_A)
                blocks.append(torch.nn.functional.pad(term.lora_B * term.scaling, (column, after)))
                column += len(term.lora_A)
            lora_B = torch.cat(blocks)
        if any(layer.bias is not None for layer in self.layers):
            zeros = next(layer.bias for layer in self.layers if layer.bias is not None).new_zeros
            bias = torch.cat([zeros(n.out_features) if n.bias is None else n.bias for n in self.layers])
        return lora_A, lora_B, bias
