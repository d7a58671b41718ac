"""`QuantLoRAModule`: what the quantized layers share: a packed weight, an adapter, a bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from loftq_kernels.formats import PackedTensor, empty_packed, qlora_linear
from loftq_kernels.initializers import AdapterInit
from loftq_kernels.initializers.config import adapter_scaling, default_adapter_dtype
from loftq_kernels.initializers.qalora import expand_groups
from loftq_kernels.nn.adapter_slots import AdapterSlots, RowNames, by_row, rows_of
from loftq_kernels.nn.kept import forget, kept
from loftq_kernels.nn.layer_state import PACKED, LayerState
from loftq_kernels.nn.merging import Mergeable
from loftq_kernels.nn.stacking import Factors, stacked
from loftq_kernels.nn.weight_view import QuantizedWeight, read_only_error
from loftq_kernels.ops import linear_tensors
from loftq_kernels.ops.checks import check_rank
from loftq_kernels.ops.constant import Constant, keep_dtypes, restore_constants
from loftq_kernels.ops.functional import full_precision
from loftq_kernels.storage.packing import group_width


class QuantLoRAModule(LayerState, Mergeable):
    """A matrix W [rows, columns] = codebook[codes] * scale + offset + scaling * lora_B @ lora_A, and a bias [rows].

    The base of the layers, which say what they compute with it. The packed weight lives in frozen parameters
    (`Constant`), which FSDP and tensor parallel plans shard, DDP sends once and averaging leaves alone; their dtypes
    never change (`.to(dtype)` moves the adapter and the bias only). The adapter is trained, the bias frozen. A new one
    holds the zero weight, lora_A Kaiming-uniform and lora_B zero. ``dtype`` is that of the dense layer whose place it
    takes: of the bias, and of what `weight` says it is.

    Its state_dict holds the tensors by these names, and under "_extra_state" the scaling, whether the adapter is
    enabled and in_features, without which the same tensors would compute something else.

    With ``adapter="qalora"`` lora_A is [rank, G], and `over_columns` of it stands above. ``offset``: have offsets also
    in a format without, as a layer has that such an adapter was merged into. Both are for `QuantLoRALinear` alone.
    """

    kind: str  # of layer, in checkpoints: see `kinds`
    adapters: tuple[str, ...] = ("lora",)  # that a layer of this kind can have
    dense_copy: str  # the name of the method that returns the dense layer
    slots: AdapterSlots | None = None  # of user adapters, once one has been loaded
    geometry_names: tuple[str, ...] = ()  # attributes beside the matrix's shape that a layer of this kind is made from

    def __init__(
        self,
        rows: int,
        columns: int,
        bias: bool,
        *,
        format: str,
        group_size: int,
        rank: int | None,
        lora_alpha: float | None,
        use_rslora: bool,
        scale_dtype: torch.dtype,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        adapter_dtype: torch.dtype | None = None,
        adapter: str = "lora",
        offset: bool = False,
    ):
        super().__init__()
        self._check_adapter(adapter)
        self.adapter = adapter
        packed = empty_packed(rows, columns, format, group_size, scale_dtype=scale_dtype, offset=offset, device=device)
        inner, called = (packed.scale.shape[1], "groups") if adapter == "qalora" else (columns, "in_features")
        self.rank = None if rank is None else check_rank(rank, rows, inner, called)
        self.scaling = adapter_scaling(rank, lora_alpha, use_rslora)
        self.adapter_enabled = True
        self.format, self.group_size = packed.format, packed.group_size
        self._columns = packed.shape[1]
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        adapter_dtype = default_adapter_dtype(self.dtype) if adapter_dtype is None else adapter_dtype

        def parameter(*shape: int, dtype: torch.dtype, trained: bool) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=packed.device, dtype=dtype), requires_grad=trained)

        for name in ("lora_A", "lora_B", "bias", *PACKED):
            self.register_parameter(name, None)
        if rank is not None:
            self.lora_A = parameter(self.rank, inner, dtype=adapter_dtype, trained=True)
            self.lora_B = parameter(rows, self.rank, dtype=adapter_dtype, trained=True)
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if bias:
            self.bias = parameter(rows, dtype=self.dtype, trained=False)
        self.hold(packed)

    def hold(self, packed: PackedTensor) -> None:
        """Take over the tensors of a packed weight."""
        for name in PACKED:
            tensor = getattr(packed, name)
            self._parameters[name] = tensor if tensor is None or type(tensor) is Constant else Constant(tensor)

    @classmethod
    def _check_adapter(cls, adapter: str) -> None:
        """Raise ValueError unless layers of this kind can have such an adapter."""
        if adapter not in cls.adapters:
            raise ValueError(f"adapter={adapter!r} is not one of {cls.adapters}, those of {cls.__name__}")

    @classmethod
    def _init_options(
        cls, init: AdapterInit, dtype: torch.dtype | None, adapter_dtype: torch.dtype | None = None
    ) -> dict:
        """The arguments of a layer, made on the meta device, that `_fill` can put an initializer's result into."""
        cls._check_adapter(init.adapter)
        options = {
            "format": init.packed.format.name,
            "group_size": init.packed.group_size,
            "rank": None if init.lora_A is None else init.lora_A.shape[0],
            "scale_dtype": init.packed.scale.dtype,
            "device": "meta",
            "dtype": dtype,
            "adapter_dtype": adapter_dtype,
        }
        if "qalora" in cls.adapters:
            options |= {"adapter": init.adapter, "offset": init.packed.offset is not None}
        elif init.packed.offset is not None and not init.packed.format.affine:
            raise ValueError(
                f"{cls.__name__} takes no {init.packed.format.name} weight with offsets, as merging an adapter makes"
            )
        return options

    def _fill(self, init: AdapterInit, bias: Tensor | None) -> None:
        """Take over what an initializer returned, and a copy of bias."""
        packed = init.packed
        self.scaling = init.scaling
        self.hold(packed)
        # Layers that were initialized together share a code book, which safetensors would refuse.
        self._parameters["codebook"] = Constant(packed.codebook.clone())
        for name, value in (("lora_A", init.lora_A), ("lora_B", init.lora_B), ("bias", bias)):
            if value is not None:
                old = getattr(self, name)
                value = value.detach().to(packed.device, old.dtype).clone(memory_format=torch.contiguous_format)
                setattr(self, name, nn.Parameter(value, requires_grad=old.requires_grad))

    @property
    def packed(self) -> PackedTensor:
        """The quantized weight; shares its tensors with the layer."""
        return PackedTensor(
            *self.stored(),
            in_features=self._columns,
            group_size=self.group_size,
            format=self.format,
        )

    def stored(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """codes, scale, offset and codebook as ops take them: plain tensors, except where a compiler traces."""
        own = self._parameters  # nn.Module's own look-up of an attribute takes longer, eight times.
        held = own["codes"], own["scale"], own["offset"], own["codebook"]
        return held if is_compiling() else tuple([t.held if type(t) is Constant else t for t in held])

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter and it is enabled."""
        return self.lora_A is not None and self.adapter_enabled

    def train(self, mode: bool = True) -> QuantLoRAModule:
        forget(self)
        return super().train(mode)

    def enable_adapter(self) -> None:
        """Add the adapter's term again after `disable_adapter`."""
        self.adapter_enabled = True

    def disable_adapter(self) -> None:
        """Leave the adapter's term out of `forward`, of the merged layer and of `weight`; its values stay.

        User adapters (`set_adapter`) are no part of it, and stay active.
        """
        self.adapter_enabled = False

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        """The shape in which the dense layer holds its weight."""
        return self.codes.shape[0], self._columns

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense quantized weight in the dense layer's shape, without the adapter; dtype as `weight` by default."""
        return self.packed.dequantize(dtype or self.dtype).view(self._weight_shape)

    @property
    def weight(self) -> Tensor:
        """The weight that `forward` computes with, adapter included, as a read-only `QuantizedWeight`.

        Its shape, dtype and device cost nothing, `F.linear(x, layer.weight, bias)` is the product with the packed
        weight, other reads decode. Writes raise RuntimeError. Under `torch.compile` it is the decoded tensor itself,
        which the compiler drops where nothing but its dtype is read.
        """
        return self.dense_weight(detach=False) if torch.compiler.is_dynamo_compiling() else QuantizedWeight(self)

    def dense_weight(self, *, detach: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that `forward` computes with, decoded into new memory, in the dense layer's shape.

        In ``dtype``, or in that of `weight`. Without ``detach`` it is differentiable in lora_A and lora_B.
        """
        return self._merged(detach=detach).to(dtype or self.dtype).view(self._weight_shape)

    def _merged(self, *, detach: bool = True) -> Tensor:
        dense = self.packed.dequantize(torch.promote_types(self.dtype, torch.float32))
        for term in self._terms(dense.dtype):
            lora_A, lora_B = (t.to(dense.dtype) for t in term[:2])
            if detach:
                dense.addmm_(lora_B.detach(), lora_A.detach(), alpha=term.scaling)
                continue
            with full_precision(dense):  # not in place, which torch.func cannot differentiate
                dense = torch.addmm(dense, lora_B, lora_A, alpha=term.scaling)
        return dense

    def _terms(self, dtype: torch.dtype | None = None) -> list[Factors]:
        """The terms that `forward` adds to the quantized weight: of the start adapter and of active user adapters."""
        user, replaces = (None, False) if self.slots is None else self.slots.now()
        start = [] if replaces else self.start_terms(dtype)
        return start if user is None else [*start, user]

    def start_terms(self, dtype: torch.dtype | None = None) -> list[Factors]:
        """The layer's own adapter, if it is enabled, with lora_A over columns; of QA-LoRA it is computed in dtype."""
        own = self._parameters
        if own["lora_A"] is None or not self.adapter_enabled:
            return []
        lora_A = own["lora_A"]
        if self.adapter != "lora":
            lora_A = self._expanded(lora_A) if dtype is None else self.over_columns(lora_A.to(dtype))
        return [Factors(lora_A, own["lora_B"], self.scaling)]

    def _expanded(self, lora_A: Tensor) -> Tensor:
        """`over_columns`, kept until one of lora_A's [rank, G] values changes."""
        return kept(self, "expanded", [lora_A], lambda: self.over_columns(lora_A), by_value=True)

    def low_rank(self, more: Sequence[Factors] = ()) -> Factors | None:
        """All that stands beside the quantized weight, adapters and ``more``, as one term; None for nothing."""
        return stacked(self, [*self._terms(), *more], "stacked" if self.slots is None else self.slots.what)

    def product(self, x: Tensor, bias: Tensor | None, *, detach: bool = False, more: Sequence[Factors] = ()) -> Tensor:
        """x @ W.T + bias, W [rows, columns] being the weight that `forward` computes with; see `qlora_linear`.

        ``more`` adapters are added to W, in the same product: their factors are put on top of the layer's own along r
        (`stacking`). With ``detach`` no gradient reaches the adapters.
        """
        if (rows := rows_of(self.slots)) is not None:
            if not rows.alike:
                return self._product_by_row(x, bias, rows, more)
            rows.share(x.shape[:-1])
        codes, scale, offset, codebook = self.stored()
        lora_A, lora_B, scaling = self.low_rank(more) or (None, None, 1.0)
        if lora_A is not None and detach:
            lora_A, lora_B = lora_A.detach(), lora_B.detach()
        return linear_tensors(
            x,
            codes,
            scale,
            offset,
            codebook,
            self.group_size,
            lora_A,
            lora_B,
            scaling,
            bias,
            in_features=self._columns,
        )

    def _product_by_row(self, x: Tensor, bias: Tensor | None, rows: RowNames, more: Sequence[Factors]) -> Tensor:
        """`product` with the adapters that `use_adapters` has given to each row, in place of those of the slot."""
        start = self.start_terms()
        adapters = by_row(self, self.slots.loaded, rows, [*start, *more], len(start), x.shape[:-1])
        return qlora_linear(x, self.packed, adapters.lora_A, adapters.lora_B, adapter_ids=adapters.ids, bias=bias)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "weight":
            raise read_only_error(self, "assigning to weight")
        if name in PACKED and type(value) is Tensor:
            value = Constant(value)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            raise read_only_error(self, "deleting weight")
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            raise read_only_error(self, "registering a parameter weight")
        super().register_parameter(name, param)

    def over_columns(self, lora_A: Tensor) -> Tensor:
        """lora_A as the matrix [rank, columns] that x itself is multiplied by: "qalora" has one of groups."""
        return expand_groups(lora_A, self._columns, self.group_size) if self.adapter == "qalora" else lora_A

    def over_groups(self, lora_A: Tensor) -> Tensor:
        """The inverse of `over_columns`. Raises ValueError where a matrix of QA-LoRA differs within a group."""
        if self.adapter != "qalora":
            return lora_A
        width = group_width(self._columns, self.group_size)
        own = lora_A[:, ::width] * width
        if not torch.allclose(self.over_columns(own), lora_A, rtol=1e-5, atol=0):
            raise ValueError("lora_A differs within quantization groups, of which QA-LoRA has one value each")
        return own

    def _describe_weight(self) -> str:
        """The end of `extra_repr`: format and adapter."""
        adapter = "no adapter" if self.rank is None else f"rank={self.rank}, scaling={self.scaling:g}"
        if self.rank is not None and self.adapter != "lora":
            adapter = f"adapter={self.adapter}, {adapter}"
        if self.rank is not None and not self.adapter_enabled:
            adapter += " (disabled)"
        if self.slots is not None and self.slots.loaded:
            adapter += f", user adapters: {self.slots.describe()}"
        return f"format={self.format.name}, group_size={self.group_size}, {adapter}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLoRAModule:
        """Let `.to(dtype)`, `.half()` and the like change the device of the packed weight but never its dtypes."""
        device = self.codes.device
        super()._apply(keep_dtypes(fn, self, PACKED), recurse)
        restore_constants(self, PACKED)
        if self.slots is not None:
            self.slots.move(fn)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        return self
