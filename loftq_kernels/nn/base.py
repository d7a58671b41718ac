"""`QuantLoRAModule`: what the quantized layers share: a packed weight, an adapter, a bias."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from loftq_kernels.config import adapter_scaling
from loftq_kernels.formats import PackedTensor, empty_packed, get_format
from loftq_kernels.initializers import AdapterInit
from loftq_kernels.ops.checks import check_rank

PACKED_BUFFERS = ("codes", "scale", "offset", "codebook")


class QuantLoRAModule(nn.Module):
    """A matrix W [rows, columns] = codebook[codes] * scale + offset + scaling * lora_B @ lora_A, and a bias [rows].

    The base of the layers, which say what they compute with it. The packed weight lives in buffers whose dtypes never
    change (`.to(dtype)` moves the adapter and the bias only) and is constant; the adapter is trained, the bias frozen.
    A new one holds the zero weight, lora_A Kaiming-uniform and lora_B zero.
    """

    kind: str  # of layer, in checkpoints
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
    ):
        super().__init__()
        if rank is not None:
            check_rank(rank, rows, columns)
        self.rank, self.scaling = rank, adapter_scaling(rank, lora_alpha, use_rslora)
        self.adapter_enabled = True
        packed = empty_packed(rows, columns, format, group_size, scale_dtype=scale_dtype, device=device)
        self.format, self.group_size = packed.format, group_size
        self._columns = columns
        for name in PACKED_BUFFERS:
            self.register_buffer(name, getattr(packed, name))

        def parameter(*shape: int, trained: bool) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=packed.device, dtype=dtype), requires_grad=trained)

        for name in ("lora_A", "lora_B", "bias"):
            self.register_parameter(name, None)
        if rank is not None:
            self.lora_A = parameter(rank, columns, trained=True)
            self.lora_B = parameter(rows, rank, trained=True)
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if bias:
            self.bias = parameter(rows, trained=False)

    @staticmethod
    def _init_options(init: AdapterInit, dtype: torch.dtype | None) -> dict:
        """The arguments of a layer, made on the meta device, that `_fill` can put an initializer's result into."""
        return {
            "format": init.packed.format.name,
            "group_size": init.packed.group_size,
            "rank": None if init.lora_A is None else init.lora_A.shape[0],
            "scale_dtype": init.packed.scale.dtype,
            "device": "meta",
            "dtype": dtype,
        }

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
        return torch.get_default_dtype() if parameter is None else parameter.dtype

    @property
    def weight(self) -> Tensor:
        """The dense weight that `forward` computes with, adapter included, made anew at every access and detached.

        For code that inspects ``layer.weight`` (its dtype, its device, or PyTorch's own transformer fast path).
        """
        return self._merged().to(self._dtype).view(self._weight_shape)

    def _merged(self) -> Tensor:
        dense = self.packed.dequantize(torch.promote_types(self._dtype, torch.float32))
        if self.has_adapter:
            lora_A, lora_B = self.lora_A.detach().to(dense.dtype), self.lora_B.detach().to(dense.dtype)
            dense.addmm_(lora_B, lora_A, alpha=self.scaling)
        return dense

    def _describe_weight(self) -> str:
        """The end of `extra_repr`: format and adapter."""
        adapter = "no adapter" if self.rank is None else f"rank={self.rank}, scaling={self.scaling:g}"
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
