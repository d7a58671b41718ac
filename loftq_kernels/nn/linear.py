"""`QuantLoRALinear`: `nn.Linear` with a quantized weight and a low-rank adapter."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from loftq_kernels.config import QuantConfig, adapter_scaling
from loftq_kernels.formats import PackedTensor, empty_packed, get_format
from loftq_kernels.initializers import AdapterInit, InputStatistics, initialize
from loftq_kernels.ops import linear_tensors
from loftq_kernels.ops.checks import check_rank

PACKED_BUFFERS = ("codes", "scale", "offset", "codebook")


class QuantLoRALinear(nn.Module):
    """y = x @ (codebook[codes] * scale + offset).T + scaling * (x @ lora_A.T) @ lora_B.T + bias

    A drop-in for `nn.Linear` in inference and training. The packed weight lives in buffers whose dtypes never change
    (`.to(dtype)` moves the adapter and the bias only) and is constant; the adapter is trained, the bias frozen.
    A new layer holds the zero weight, lora_A Kaiming-uniform and lora_B zero, to be filled by a checkpoint;
    `from_linear` and `from_init` make one from a weight.

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`; dtype is that of adapter and bias.
        format, group_size, scale_dtype: as for `quantize`.
        rank: 1 .. min(in_features, out_features), or None for no adapter.
        lora_alpha, use_rslora: scaling = lora_alpha / rank (/ sqrt(rank) with use_rslora); None means scaling 1.

    Shapes: x [..., in_features] -> [..., out_features], in the dtype of x. Parameters lora_A [rank, in_features],
    lora_B [out_features, rank], bias [out_features]. Raises ValueError or TypeError for arguments out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: str = "nf4",
        group_size: int = 64,
        rank: int | None = 16,
        lora_alpha: float | None = None,
        use_rslora: bool = False,
        scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        if rank is not None:
            check_rank(rank, out_features, in_features)
        self.rank, self.scaling = rank, adapter_scaling(rank, lora_alpha, use_rslora)
        self.adapter_enabled = True
        packed = empty_packed(out_features, in_features, format, group_size, scale_dtype=scale_dtype, device=device)
        self.format, self.group_size = packed.format, group_size
        for name in PACKED_BUFFERS:
            self.register_buffer(name, getattr(packed, name))

        def parameter(*shape: int, trained: bool) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=packed.device, dtype=dtype), requires_grad=trained)

        for name in ("lora_A", "lora_B", "bias"):
            self.register_parameter(name, None)
        if rank is not None:
            self.lora_A = parameter(rank, in_features, trained=True)
            self.lora_B = parameter(out_features, rank, trained=True)
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if bias:
            self.bias = parameter(out_features, trained=False)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, cfg: QuantConfig | None = None, statistics: InputStatistics | None = None
    ) -> QuantLoRALinear:
        """Quantize the weight of an `nn.Linear` as cfg says (default: LoftQ, NF4, rank 16); it is not changed.

        ``statistics`` of its input are for the initializers that take them.
        """
        cfg = cfg or QuantConfig()
        if type(linear) is not nn.Linear:
            raise TypeError(f"from_linear takes a torch.nn.Linear, got {type(linear).__name__}")
        calibration = None if statistics is None else [statistics]
        init = initialize([linear.weight.detach()], cfg, statistics=calibration)[0]
        return cls.from_init(init, linear.bias, dtype=linear.weight.dtype).train(linear.training)

    @classmethod
    def from_init(
        cls, init: AdapterInit, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> QuantLoRALinear:
        """A layer that holds what an initializer returned; ``bias`` [out_features] is copied."""
        with torch.inference_mode(False):  # parameters made under inference mode could never be trained
            packed = init.packed
            rank = None if init.lora_A is None else init.lora_A.shape[0]
            out_features, in_features = packed.shape
            layer = cls(
                in_features,
                out_features,
                bias is not None,
                format=packed.format.name,
                group_size=packed.group_size,
                rank=rank,
                scale_dtype=packed.scale.dtype,
                device="meta",
                dtype=dtype,
            )
            layer.scaling = init.scaling
            for name in PACKED_BUFFERS:
                setattr(layer, name, getattr(packed, name))
            layer.codebook = packed.codebook.clone()  # layers initialized together share one, which safetensors refuses
            for name, value in (("lora_A", init.lora_A), ("lora_B", init.lora_B), ("bias", bias)):
                if value is not None:
                    old = getattr(layer, name)
                    value = value.detach().to(device=packed.device, dtype=old.dtype, copy=True)
                    setattr(layer, name, nn.Parameter(value, requires_grad=old.requires_grad))
            return layer

    @property
    def packed(self) -> PackedTensor:
        """The quantized weight; shares its tensors with the layer."""
        return PackedTensor(
            self.codes,
            self.scale,
            self.offset,
            self.codebook,
            in_features=self.in_features,
            group_size=self.group_size,
            format=self.format,
        )

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter and it is enabled."""
        return self.lora_A is not None and self.adapter_enabled

    def forward(self, x: Tensor) -> Tensor:
        buffers, parameters = self._buffers, self._parameters  # nn.Module's attribute look-up takes longer, eight times
        adapted = self.adapter_enabled
        return linear_tensors(
            x,
            buffers["codes"],
            buffers["scale"],
            buffers["offset"],
            buffers["codebook"],
            self.group_size,
            parameters["lora_A"] if adapted else None,
            parameters["lora_B"] if adapted else None,
            self.scaling,
            parameters["bias"],
            in_features=self.in_features,
        )

    def enable_adapter(self) -> None:
        """Add the adapter's term again after `disable_adapter`."""
        self.adapter_enabled = True

    def disable_adapter(self) -> None:
        """Leave the adapter's term out of `forward`, `merged_linear` and `weight`; its values stay."""
        self.adapter_enabled = False

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense quantized weight [out_features, in_features], without the adapter; dtype as `weight` by default."""
        return self.packed.dequantize(dtype or self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        parameter = self.lora_A if self.lora_A is not None else self.bias
        return torch.get_default_dtype() if parameter is None else parameter.dtype

    @property
    def weight(self) -> Tensor:
        """The dense weight that `forward` multiplies by, adapter included, made anew at every access and detached.

        For code that inspects ``linear.weight`` (its dtype, its device, or PyTorch's own transformer fast path).
        """
        return self._merged().to(self._dtype)

    def _merged(self) -> Tensor:
        dense = self.packed.dequantize(torch.promote_types(self._dtype, torch.float32))
        if self.has_adapter:
            lora_A, lora_B = self.lora_A.detach().to(dense.dtype), self.lora_B.detach().to(dense.dtype)
            dense.addmm_(lora_B, lora_A, alpha=self.scaling)
        return dense

    def merged_linear(self) -> nn.Linear:
        """A plain `nn.Linear` that computes the same: weight = Q + scaling * lora_B @ lora_A, dense."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self._dtype)
        linear.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    def extra_repr(self) -> str:
        adapter = "no adapter" if self.rank is None else f"rank={self.rank}, scaling={self.scaling:g}"
        if self.rank is not None and not self.adapter_enabled:
            adapter += " (disabled)"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format.name}, group_size={self.group_size}, {adapter}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLoRALinear:
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
