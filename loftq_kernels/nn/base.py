"""`QuantLoRAModule`: what the quantized layers share: a packed weight, an adapter, a bias."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from loftq_kernels.config import adapter_scaling
from loftq_kernels.formats import PackedTensor, empty_packed, get_format, quantize
from loftq_kernels.initializers import AdapterInit
from loftq_kernels.initializers.qalora import expand_groups
from loftq_kernels.nn.weight_view import QuantizedWeight, read_only_error
from loftq_kernels.ops import linear_tensors
from loftq_kernels.ops.checks import SCALE_DTYPES, check_rank

PACKED_BUFFERS = ("codes", "scale", "offset", "codebook")


class QuantLoRAModule(nn.Module):
    """A matrix W [rows, columns] = codebook[codes] * scale + offset + scaling * lora_B @ lora_A, and a bias [rows].

    The base of the layers, which say what they compute with it. The packed weight lives in buffers whose dtypes never
    change (`.to(dtype)` moves the adapter and the bias only) and is constant; the adapter is trained, the bias frozen.
    A new one holds the zero weight, lora_A Kaiming-uniform and lora_B zero.

    With ``adapter="qalora"`` lora_A is [rank, G], and `over_columns` of it stands above. ``offset``: have offsets also
    in a format without, as a layer has that such an adapter was merged into. Both are for `QuantLoRALinear` alone.
    """

    kind: str  # of layer, in checkpoints
    adapters: tuple[str, ...] = ("lora",)  # that a layer of this kind can have
    dense_copy: str  # the name of the method that returns the dense layer
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
        adapter: str = "lora",
        offset: bool = False,
    ):
        super().__init__()
        self._check_adapter(adapter)
        self.adapter = adapter
        packed = empty_packed(rows, columns, format, group_size, scale_dtype=scale_dtype, offset=offset, device=device)
        inner, called = (packed.scale.shape[1], "groups") if adapter == "qalora" else (columns, "in_features")
        if rank is not None:
            check_rank(rank, rows, inner, called)
        self.rank, self.scaling = rank, adapter_scaling(rank, lora_alpha, use_rslora)
        self.adapter_enabled = True
        self.format, self.group_size = packed.format, group_size
        self._columns = columns
        for name in PACKED_BUFFERS:
            self.register_buffer(name, getattr(packed, name))

        def parameter(*shape: int, trained: bool) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=packed.device, dtype=dtype), requires_grad=trained)

        for name in ("lora_A", "lora_B", "bias"):
            self.register_parameter(name, None)
        if rank is not None:
            self.lora_A = parameter(rank, inner, trained=True)
            self.lora_B = parameter(rows, rank, trained=True)
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if bias:
            self.bias = parameter(rows, trained=False)

    @classmethod
    def _check_adapter(cls, adapter: str) -> None:
        """Raise ValueError unless layers of this kind can have such an adapter."""
        if adapter not in cls.adapters:
            raise ValueError(f"adapter={adapter!r} is not one of {cls.adapters}, those of {cls.__name__}")

    @classmethod
    def _init_options(cls, init: AdapterInit, dtype: torch.dtype | None) -> dict:
        """The arguments of a layer, made on the meta device, that `_fill` can put an initializer's result into."""
        cls._check_adapter(init.adapter)
        options = {
            "format": init.packed.format.name,
            "group_size": init.packed.group_size,
            "rank": None if init.lora_A is None else init.lora_A.shape[0],
            "scale_dtype": init.packed.scale.dtype,
            "device": "meta",
            "dtype": dtype,
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
        for name in PACKED_BUFFERS:
            setattr(self, name, getattr(packed, name))
        self.codebook = packed.codebook.clone()  # layers initialized together share one, which safetensors refuses
        for name, value in (("lora_A", init.lora_A), ("lora_B", init.lora_B), ("bias", bias)):
            if value is not None:
                old = getattr(self, name)
                value = value.detach().to(device=packed.device, dtype=old.dtype, copy=True)
                setattr(self, name, nn.Parameter(value, requires_grad=old.requires_grad))

    @property
    def packed(self) -> PackedTensor:
        """The quantized weight; shares its tensors with the layer."""
        return PackedTensor(
            self.codes,
            self.scale,
            self.offset,
            self.codebook,
            in_features=self._columns,
            group_size=self.group_size,
            format=self.format,
        )

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter and it is enabled."""
        return self.lora_A is not None and self.adapter_enabled

    def enable_adapter(self) -> None:
        """Add the adapter's term again after `disable_adapter`."""
        self.adapter_enabled = True

    def disable_adapter(self) -> None:
        """Leave the adapter's term out of `forward`, of the merged layer and of `weight`; its values stay."""
        self.adapter_enabled = False

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        """The shape in which the dense layer holds its weight."""
        return self.codes.shape[0], self._columns

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense quantized weight in the dense layer's shape, without the adapter; dtype as `weight` by default."""
        return self.packed.dequantize(dtype or self._dtype).view(self._weight_shape)

    @property
    def _dtype(self) -> torch.dtype:
        parameter = self.lora_A if self.lora_A is not None else self.bias
        if parameter is None:  # float64 scales are those of a float64 layer
            return self.scale.dtype if self.scale.dtype == torch.float64 else torch.get_default_dtype()
        return parameter.dtype

    @property
    def weight(self) -> Tensor:
        """The weight that `forward` computes with, adapter included, as a read-only `QuantizedWeight`.

        Its shape, dtype and device cost nothing, `F.linear(x, layer.weight, bias)` is the product with the packed
        weight, other reads decode. Writes raise RuntimeError. Under `torch.compile` it is the decoded tensor itself,
        which the compiler drops where nothing but its dtype is read.
        """
        return self.dense_weight(detach=False) if torch.compiler.is_dynamo_compiling() else QuantizedWeight(self)

    def dense_weight(self, *, detach: bool = True) -> Tensor:
        """The weight that `forward` computes with, decoded into new memory, in the dense layer's shape and dtype.

        Without ``detach`` it is differentiable in lora_A and lora_B.
        """
        return self._merged(detach=detach).to(self._dtype).view(self._weight_shape)

    def _merged(self, *, detach: bool = True) -> Tensor:
        dense = self.packed.dequantize(torch.promote_types(self._dtype, torch.float32))
        if not self.has_adapter:
            return dense
        lora_A, lora_B = (t.detach() if detach else t for t in (self.lora_A, self.lora_B))
        lora_A, lora_B = self.over_columns(lora_A.to(dense.dtype)), lora_B.to(dense.dtype)
        if detach:
            return dense.addmm_(lora_B, lora_A, alpha=self.scaling)
        with full_precision(dense):  # not in place, which torch.func cannot differentiate
            return torch.addmm(dense, lora_B, lora_A, alpha=self.scaling)

    def product(self, x: Tensor, bias: Tensor | None, *, detach: bool = False) -> Tensor:
        """x @ W.T + bias, W [rows, columns] being the weight that `forward` computes with; see `qlora_linear`.

        With ``detach`` no gradient reaches the adapter.
        """
        buffers, parameters = self._buffers, self._parameters  # nn.Module's attribute look-up takes longer, eight times
        adapted = self.adapter_enabled
        lora_A, lora_B = (parameters["lora_A"], parameters["lora_B"]) if adapted else (None, None)
        if lora_A is not None and self.adapter != "lora":
            lora_A = self.over_columns(lora_A)
        if lora_A is not None and detach:
            lora_A, lora_B = lora_A.detach(), lora_B.detach()
        return linear_tensors(
            x,
            buffers["codes"],
            buffers["scale"],
            buffers["offset"],
            buffers["codebook"],
            self.group_size,
            lora_A,
            lora_B,
            self.scaling,
            bias,
            in_features=self._columns,
        )

    def __setattr__(self, name: str, value: object) -> None:
        if name == "weight":
            raise read_only_error(self, "assigning to weight")
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

    def check_mergeable(self, *, requantize: bool = False) -> None:
        """Raise the ValueError that `merge_adapter` would raise for the kind or state of the adapter."""
        if self.lora_A is None:
            return
        if not self.adapter_enabled:
            raise ValueError("the adapter is disabled, and merging would add it: call enable_adapter first")
        if self.adapter == "lora" and not requantize:
            raise ValueError(
                f"a rank-{self.rank} adapter changes each weight of a group differently, which the group's scale and "
                "offset cannot hold: merge_adapter(requantize=True) rounds again and returns the error that adds, the "
                "dense merged_linear() (or its like) is exact, and adapter='qalora' of linear layers merges exactly"
            )

    def merge_adapter(self, *, requantize: bool = False, scale_search: bool = False) -> float:
        """Move the adapter into the packed weight, in place; returns the relative error ||W - W'||_F / ||W||_F it adds.

        adapter="qalora": exact, the error is 0. The codes stay; the offsets (of zero where the format has none) become

            offset'[n, g] = offset[n, g] + scaling / group_size * (lora_B @ lora_A)[n, g]

        and are stored, with the scales, in float32 (float64 in a float64 layer, for which there is no fast kernel): in
        float16 they would be rounded by 5e-4 of themselves. adapter="lora": the merged weight is quantized anew,
        only with ``requantize=True``, its scales searched with ``scale_search=True`` (a layer does not know whether
        its own were, so say it again). A layer without adapter stays as it is. Then lora_A, lora_B and rank are None.

        Raises ValueError, changing nothing, for an ordinary adapter without ``requantize``, a disabled adapter, or NaN
        or Inf in the adapter.
        """
        packed, error = self.merged_packed(requantize=requantize, scale_search=scale_search)
        self.take_merged(packed)
        return error

    def merged_packed(self, *, requantize: bool = False, scale_search: bool = False) -> tuple[PackedTensor, float]:
        """The packed weight that `merge_adapter` would leave, and the error that it would return; changes nothing."""
        self.check_mergeable(requantize=requantize)
        if self.lora_A is None:
            return self.packed, 0.0
        with torch.inference_mode(False), torch.no_grad():  # in this order: the first switches gradients on
            return self._with_offsets() if self.adapter == "qalora" else self._requantized(scale_search)

    def take_merged(self, packed: PackedTensor) -> None:
        """Hold what `merged_packed` returned, without an adapter."""
        if self.lora_A is None:
            return
        for name in PACKED_BUFFERS:
            setattr(self, name, getattr(packed, name))
        self.lora_A = self.lora_B = self.rank = None
        self.scaling, self.adapter = 1.0, "lora"

    def _with_offsets(self) -> tuple[PackedTensor, float]:
        wide = torch.float64 if self.lora_A.dtype == torch.float64 else torch.float32
        width = self._columns if self.group_size == -1 else self.group_size
        offset = (self.scaling / width) * (self.lora_B.double() @ self.lora_A.double())
        if self.offset is not None:
            offset += self.offset.double()
        offset = offset.to(wide)
        if not torch.isfinite(offset).all():
            raise ValueError(
                f"merged offsets are not finite: lora_A or lora_B holds NaN, Inf or more than {wide} can hold"
            )
        packed = self.packed
        packed.scale, packed.offset = self.scale.to(wide), offset
        return packed, 0.0

    def _requantized(self, scale_search: bool) -> tuple[PackedTensor, float]:
        dense = self._merged()
        dtype = self.scale.dtype if self.scale.dtype in SCALE_DTYPES else torch.float32
        packed = quantize(
            dense,
            self.format.name,
            self.group_size,
            scale_dtype=dtype,
            scale_search=scale_search,
            name="the merged weight",
        )
        norm, difference = dense.norm().item(), (dense - packed.dequantize(dense.dtype)).norm().item()
        return packed, difference / norm if norm > 0 else 0.0

    def _describe_weight(self) -> str:
        """The end of `extra_repr`: format and adapter."""
        adapter = "no adapter" if self.rank is None else f"rank={self.rank}, scaling={self.scaling:g}"
        if self.rank is not None and self.adapter != "lora":
            adapter = f"adapter={self.adapter}, {adapter}"
        if self.rank is not None and not self.adapter_enabled:
            adapter += " (disabled)"
        return f"format={self.format.name}, group_size={self.group_size}, {adapter}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLoRAModule:
        """Let `.to(dtype)`, `.half()` and the like change the device of the packed weight but never its dtypes."""
        fixed = {id(buffer) for name, buffer in self._buffers.items() if name in PACKED_BUFFERS}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) not in fixed or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Refuse a checkpoint of another format: shapes alone cannot tell nf2 from uniform2."""
        error_messages: list[str] = args[-1]
        known = len(error_messages)
        codebook = state_dict.get(prefix + "codebook")
        if codebook is not None and not codebook.is_meta:
            expected = get_format(self.format.name).codebook(codebook.device)
            if codebook.shape != expected.shape or not torch.equal(codebook.float(), expected):
                error_messages.append(
                    f"{prefix}codebook is not that of format {self.format.name}: {codebook.flatten()[:4].tolist()}..."
                )
        for name in PACKED_BUFFERS:
            stored, own = state_dict.get(prefix + name), getattr(self, name)
            if stored is not None and own is not None and stored.dtype != own.dtype:
                # Copying would round codes, or the scales that they were chosen against.
                error_messages.append(f"{prefix}{name} is {stored.dtype}, this layer stores {own.dtype}")
        if len(error_messages) == known:
            super()._load_from_state_dict(state_dict, prefix, *args)


def full_precision(tensor: Tensor) -> AbstractContextManager:
    """Where sums of float32 stay in float32: autocast, if it is on, is switched off."""
    kind = tensor.device.type
    if tensor.is_meta or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
