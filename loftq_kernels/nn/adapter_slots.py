"""The user adapters of one layer: those that are loaded, the one that all rows get, and those that each row gets.

They are no parameters: nobody trains them, and no state_dict or checkpoint holds them. `named_adapters` has what is
done with those of a whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from loftq_kernels.nn.kept import kept
from loftq_kernels.nn.stacking import Factors, common_dtype, concatenated


class NamedAdapter(NamedTuple):
    """An adapter of a layer, and whether it stands in the place of the layer's own (start) adapter or on top of it."""

    factors: Factors
    replaces: bool = False


_NONE = None, False


class AdapterSlots:
    """What a layer holds of user adapters.

    The active ones are summed into one slot, ``live``, whose memory stays as long as their ranks fit. Those that are
    active later are written into that memory: compiled code and captured CUDA graphs, which read it, see them.
    """

    def __init__(self) -> None:
        self.loaded: dict[str, NamedAdapter] = {}
        self.active: tuple[str, ...] = ()
        self.live: Factors | None = None
        self.replaces = False  # whether an active one stands in the place of the start adapter

    def hold(self, name: str, adapter: NamedAdapter) -> None:
        """Have an adapter, in the place of one of its name, in a new dict: other threads may be reading the old one."""
        self.loaded = {**self.loaded, name: adapter}

    def drop(self, name: str) -> None:
        """Have no adapter of this name."""
        self.loaded = {other: adapter for other, adapter in self.loaded.items() if other != name}

    def activate(self, names: Iterable[str]) -> None:
        """Fill the live slot with the sum of these adapters, of which the layer may have some, all or none."""
        names = tuple(names)
        chosen = [self.loaded[name] for name in names if name in self.loaded]
        self.active, self.replaces = names, any(adapter.replaces for adapter in chosen)
        if not names or not self.loaded:
            self.live = None
            return
        with torch.inference_mode(False), torch.no_grad():
            self._fill([adapter.factors for adapter in chosen])

    def _fill(self, terms: Sequence[Factors]) -> None:
        """Write the sum of terms into the slot, zeros below its rank; a new slot fits the largest adapter loaded."""
        loaded = [adapter.factors for adapter in self.loaded.values()]
        rank = max(sum(len(term.lora_A) for term in terms), *(len(one.lora_A) for one in loaded))
        like = torch.empty(0, dtype=common_dtype(loaded), device=loaded[0].lora_A.device)
        if self.live is None or not _fits(self.live.lora_A, like, rank):
            rows, columns = len(loaded[0].lora_B), loaded[0].lora_A.shape[1]
            self.live = Factors(like.new_zeros(rank, columns), like.new_zeros(rows, rank), 1.0)
        total = concatenated(terms) if terms else None
        filled = 0 if total is None else len(total.lora_A)
        if total is not None:
            self.live.lora_A[:filled].copy_(total.lora_A)
            self.live.lora_B[:, :filled].copy_(total.lora_B)
        self.live.lora_A[filled:].zero_()
        self.live.lora_B[:, filled:].zero_()

    def now(self) -> tuple[Factors | None, bool]:
        """What all rows get in this call, and whether that is in the place of the start adapter.

        Raises ValueError inside a `use_adapters` by which the rows' weights differ.
        """
        rows = rows_of(self)
        if rows is None:
            return self.live, self.replaces
        if not rows.alike:
            raise ValueError(
                "use_adapters gives the rows different weights here, and there is no one weight for all rows"
            )
        return self.loaded.get(rows.names[0], _NONE)

    @property
    def what(self) -> Hashable:
        """Under which name a layer keeps what it makes of `now`."""
        rows = rows_of(self)
        return "stacked" if rows is None else ("stacked", rows.names[0])

    def reason_not_to_merge(self) -> str | None:
        """Why the start adapter cannot move into the packed weight now; None where it can."""
        if self.live is not None:
            return (
                f"the user adapters {', '.join(self.active)} are active, and merging moves the layer's own adapter "
                "alone: call set_adapter(model, None) first"
            )
        replacing = [name for name, adapter in self.loaded.items() if adapter.replaces]
        if replacing:
            return (
                f"the user adapter {replacing[0]} stands in the place of the layer's own, which would become part of "
                f"the weight: call delete_adapter(model, {replacing[0]!r}) first"
            )
        return None

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply what `.to(...)` applies to parameters."""
        self.loaded = {name: NamedAdapter(_moved(one, fn), replaces) for name, (one, replaces) in self.loaded.items()}
        self.live = None if self.live is None else _moved(self.live, fn)

    def describe(self) -> str:
        """For `extra_repr`."""
        return ", ".join(f"{name} (active)" if name in self.active else name for name in self.loaded)


def _moved(factors: Factors, fn: Callable[[Tensor], Tensor]) -> Factors:
    return Factors(fn(factors.lora_A), fn(factors.lora_B), factors.scaling)


def _fits(live: Tensor, like: Tensor, rank: int) -> bool:
    return len(live) >= rank and live.dtype == like.dtype and live.device == like.device


class RowNames:
    """Which adapter each row of a batch gets: a name, or None for the start adapter alone."""

    def __init__(self, names: Sequence[str | None]):
        self.names = tuple(names)
        self.alike = len(set(self.names)) == 1
        self._ids: dict[tuple, Tensor] = {}

    def share(self, shape: Sequence[int]) -> int:
        """How many rows of an input [*shape, in] belong to each row of the batch. Raises ValueError for a fraction."""
        batch, rows = len(self.names), torch.Size(shape).numel()
        if batch > 1 and (not shape or (shape[0] if len(shape) > 1 else rows) % batch):
            raise ValueError(
                f"use_adapters names {batch} rows, and a layer's input [{', '.join(map(str, shape))}, in_features] "
                "does not divide into as many: name one adapter, or None, for each row of the batch"
            )
        return rows // batch

    def ids(self, index: Mapping[str, int], none: int, shape: Sequence[int], device: torch.device) -> Tensor:
        """Ids [*shape] of the rows of an input [*shape, in], of which each row of the batch has equally many, in order.

        A batch of B rows comes as [B, T, in], flattened as [B * T, in], or with k beams for each row as [B * k, T, in];
        each is cut into B equal parts.
        """
        numbers = tuple(index.get(name, none) for name in self.names)
        key = numbers, tuple(shape), device
        if key not in self._ids:
            own = torch.tensor(numbers, device=device)
            self._ids[key] = own.repeat_interleave(self.share(shape)).view(shape)
        return self._ids[key]


# For each `AdapterSlots` by its id, so that other models that run meanwhile are not meant. Each thread has its own.
assigned: ContextVar[Mapping[int, RowNames]] = ContextVar("assigned", default=MappingProxyType({}))


def rows_of(slots: AdapterSlots | None) -> RowNames | None:
    """The rows' adapters, where the call is inside a `use_adapters` of the layer's model."""
    return None if slots is None or torch.compiler.is_compiling() else assigned.get().get(id(slots))


def mixed_rows_of(slots: AdapterSlots | None) -> RowNames | None:
    """`rows_of`, where the rows' adapters differ."""
    rows = rows_of(slots)
    return None if rows is None or rows.alike else rows


class ByRow(NamedTuple):
    """Adapters for each row, as `qlora_linear` takes them with adapter_ids."""

    lora_A: Tensor  # [S, r, in]
    lora_B: Tensor  # [S, out, r], scalings included
    ids: Tensor  # as the leading dimensions of the input; -1 is none


def by_row(
    layer: nn.Module,
    loaded: Mapping[str, NamedAdapter],
    rows: RowNames,
    shared: Sequence[Factors],
    start: int,
    shape: Sequence[int],
) -> ByRow:
    """Every loaded adapter on top of the ``shared`` terms, and those alone for rows without; kept until one changes.

    The first ``start`` of the shared terms are the start adapter's, which some adapters replace.
    """
    own = [[*(shared[start:] if one.replaces else shared), one.factors] for one in loaded.values()]
    entries = [list(shared), *own] if shared else own
    sources = [*shared, *(one.factors for one in loaded.values())]
    replaced = tuple((name, one.replaces) for name, one in loaded.items())
    settings = tuple(term.scaling for term in sources), len(shared), start, replaced
    tensors = [factor for term in sources for factor in term[:2]]
    lora_A, lora_B = kept(layer, "by row", tensors, lambda: _padded(entries), settings=settings)
    first = 1 if shared else 0
    index = {name: first + i for i, name in enumerate(loaded)}
    return ByRow(lora_A, lora_B, rows.ids(index, first - 1, shape, lora_A.device))


def _padded(entries: Sequence[Sequence[Factors]]) -> tuple[Tensor, Tensor]:
    """[S, r, in] and [S, out, r] of the sums of terms, zeros where their rank is below the largest, of one dtype."""
    sums = [concatenated(terms) for terms in entries]
    rank, dtype = max(len(one.lora_A) for one in sums), common_dtype(sums)
    lora_A = [functional.pad(one.lora_A.to(dtype), (0, 0, 0, rank - len(one.lora_A))) for one in sums]
    lora_B = [functional.pad(one.lora_B.to(dtype), (0, rank - len(one.lora_A))) for one in sums]
    return torch.stack(lora_A), torch.stack(lora_B)
