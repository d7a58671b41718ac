"""User adapters of a whole model, by name: active for all rows of a batch, or for each row its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from loftq_kernels.nn.adapter_slots import AdapterSlots, NamedAdapter, RowNames, assigned
from loftq_kernels.nn.adapters import quantized_layers
from loftq_kernels.nn.base import QuantLoRAModule
from loftq_kernels.nn.conv import QuantLoRAConv1d, QuantLoRAConv2d
from loftq_kernels.nn.kept import forget


def layers_with_slots(model: nn.Module) -> dict[str, QuantLoRAModule]:
    """The quantized layers that hold user adapters, by name."""
    return {name: layer for name, layer in quantized_layers(model).items() if layer.slots is not None}


def loaded_adapters(model: nn.Module) -> dict[str, bool]:
    """Name -> whether the adapter stands in the place of the start adapter, of every adapter that is loaded."""
    return {
        name: adapter.replaces
        for layer in layers_with_slots(model).values()
        for name, adapter in layer.slots.loaded.items()
    }


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """What `set_adapter` was called with."""
    return next((layer.slots.active for layer in layers_with_slots(model).values()), ())


def add_adapter(model: nn.Module, name: str, adapters: Mapping[str, NamedAdapter]) -> None:
    """Hold an adapter's factors, by layer, in the place of those that had the name. If it was active, it stays so.

    Raises ValueError, changing nothing, where active adapters would no longer go together.
    """
    active = active_adapters(model)
    replacing = loaded_adapters(model) | {name: any(one.replaces for one in adapters.values())}
    _check_together(active, replacing)
    for layer_name, layer in quantized_layers(model).items():
        if layer_name in adapters:
            layer.slots = layer.slots or AdapterSlots()
            layer.slots.hold(name, adapters[layer_name])
        elif layer.slots is not None:
            layer.slots.drop(name)
    _activate(model, active)


def set_adapter(model: nn.Module, names: str | Sequence[str] | None) -> None:
    """Add loaded user adapters to every layer that they have factors for: one, the sum of several, or with None none.

    Start adapters stay as they are, unless one of the adapters stands in their place. Each layer computes its weight,
    its start adapter and the active ones in one product. `disable_adapter` of a layer leaves out its start adapter
    alone. It changes the model for everybody, so no other thread may compute with it meanwhile.

    The factors are copied into a slot that is as wide as the largest adapter loaded: code of `torch.compile` is not
    compiled again, and CUDA graphs compute with the new adapters. Compiled anew is where there was none active, where
    several together are wider than the slot, and where an adapter takes the place of the start adapter.

    Raises ValueError for names that are not loaded, a name given twice, and two that both take the start's place.
    """
    chosen = () if names is None else (names,) if isinstance(names, str) else tuple(names)
    _check_names(model, chosen)
    if twice := next((name for name in chosen if chosen.count(name) > 1), None):
        raise ValueError(f"adapter {twice!r} is named twice: its term would count twice; scale its lora_alpha instead")
    _check_together(chosen, loaded_adapters(model))
    _activate(model, chosen)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Forget a loaded user adapter; where it was active, the others stay so. No thread may be computing with it.

    Raises ValueError for names that are not loaded.
    """
    _check_names(model, (name,))
    left = tuple(other for other in active_adapters(model) if other != name)
    for layer in layers_with_slots(model).values():
        layer.slots.drop(name)
        forget(layer)
    _activate(model, left)


def _activate(model: nn.Module, names: tuple[str, ...]) -> None:
    for layer in layers_with_slots(model).values():
        layer.slots.activate(names)


def _check_names(model: nn.Module, names: Sequence[str | None]) -> None:
    loaded = loaded_adapters(model)
    for name in names:
        if name not in loaded:
            raise ValueError(
                f"no adapter {name!r} is loaded: load_adapter(model, folder, name=...) does; {_list(loaded)}"
            )


def _list(loaded: Mapping[str, bool]) -> str:
    return f"loaded are {', '.join(map(repr, loaded))}" if loaded else "none is loaded"


def _check_together(names: Sequence[str], replacing: Mapping[str, bool]) -> None:
    replacing_ones = [name for name in names if replacing[name]]
    if len(replacing_ones) > 1:
        raise ValueError(
            f"adapters {replacing_ones[0]!r} and {replacing_ones[1]!r} both stand in the place of the start adapter: "
            "one of them can be active; save_adapter(..., start=...) writes one that stands on top of it"
        )


@contextlib.contextmanager
def use_adapters(model: nn.Module, names_per_batch_row: Sequence[str | None]) -> Iterator[None]:
    """Within ``with``, row i of a batch computes with the user adapter of that name, or with None without one.

    A single name is for all rows, however many there are.

    Every row has the start adapter (unless its adapter takes that place), and none those that `set_adapter` has made
    active. It is for inference, in forward and generate, also with beams and several returned sequences, which repeat
    each row in turn; each layer is one product. Layers cut their input into equal parts, one for each row: a part of
    the model that batches something else, as the images of a vision tower or the tokens of an expert, must have no such
    adapter. It is the calling thread that has the adapters, so that a server may run different ones in several
    threads; a thread that is started inside does not inherit them (`asyncio.to_thread` does). Meanwhile functions of
    `torch.compile` run without being compiled, in all threads.

    Raises ValueError for names that are not loaded and for convolutions that have such an adapter; the call of the
    model raises ValueError where a layer's input does not divide into so many rows.
    """
    names = None if isinstance(names_per_batch_row, str) else tuple(names_per_batch_row)
    if not names:
        raise ValueError(f"names_per_batch_row={names_per_batch_row!r} must list a name, or None, for each row")
    _check_names(model, [name for name in names if name is not None])
    layers = {layer_name: layer for layer_name, layer in layers_with_slots(model).items() if layer.slots.loaded}
    for layer_name, layer in layers.items():
        is_conv = isinstance(layer, QuantLoRAConv1d | QuantLoRAConv2d)
        if is_conv and len(set(names)) > 1 and not layer.slots.loaded.keys().isdisjoint(names):
            raise ValueError(f"layer {layer_name!r} is a convolution, which has none for each row: use set_adapter")
    rows = RowNames(names)
    token = assigned.set(MappingProxyType({**assigned.get(), **{id(layer.slots): rows for layer in layers.values()}}))
    try:
        with _eager:
            yield
    finally:
        assigned.reset(token)


class _Eager:
    """Within ``with``, in any thread, compiled functions run as they were written: compiled code reads no context."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._stance = torch.compiler.set_stance("force_eager")

    def __exit__(self, *_) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._stance.__exit__(None, None, None)


_eager = _Eager()
