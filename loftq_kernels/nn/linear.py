"""`QuantLoRALinear`: `nn.Linear` with a quantized weight and a low-rank adapter."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from loftq_kernels.config import QuantConfig, adapter_scaling
from loftq_kernels.formats import PackedTensor, empty_packed, get_format, quantize
from loftq_kernels.initializers import AdapterInit, initialize
from loftq_kernels.initializers.qalora import expand_groups
from loftq_kernels.initializers.result import ADAPTERS
from loftq_kernels.ops import linear_tensors
from loftq_kernels.ops.checks import SCALE_DTYPES, check_rank

PACKED_BUFFERS = ("codes", "scale", "offset", "codebook")


class QuantLoRALinear(nn.Module):
    """y = x @ (codebook[codes] * scale + offset).T + scaling * (x @ lora_A.T) @ lora_B.T + bias

    A drop-in for `nn.Linear` in inference and training. The packed weight lives in buffers whose dtypes never change
    (`.to(dtype)` moves the adapter and the bias only) and is constant; the adapter is trained, the bias frozen.
    A new layer holds the zero weight, lora_A Kaiming-uniform and lora_B zero, to be filled by a checkpoint;
    `from_linear` and `from_init` make one from a weight.

    With ``adapter="qalora"`` (Xu et al., ICLR 2024) the adapter sees the means of x over the quantization groups,

        scaling * (avg(x) @ lora_A.T) @ lora_B.T,   lora_A [rank, G],   avg(x) [..., G] = sums over groups / group_size,

    so that it is constant in each group and `merge_adapter` can move it into the offsets exactly.

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`; dtype is that of adapter and bias.
        format, group_size, scale_dtype: as for `quantize`.
        rank: 1 .. min(in_features, out_features), or None for no adapter; for "qalora" 1 .. min(G, out_features).
        adapter: "lora" or "qalora".
        offset: have offsets in any format, as a layer has that an adapter was merged into.
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
        adapter: str = "lora",
        scale_dtype: torch.dtype = torch.float16,
        offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        if adapter not in ADAPTERS:
            raise ValueError(f"adapter={adapter!r} is not one of {ADAPTERS}")
        self.adapter = adapter
        if rank is not None and adapter == "lora":
            check_rank(rank, out_features, in_features)
        self.rank, self.scaling = rank, adapter_scaling(rank, lora_alpha, use_rslora)
        self.adapter_enabled = True
        packed = empty_packed(
            out_features, in_features, format, group_size, scale_dtype=scale_dtype, offset=offset, device=device
        )
        self.format, self.group_size = packed.format, group_size
        for name in PACKED_BUFFERS:
            self.register_buffer(name, getattr(packed, name))

        def parameter(*shape: int, trained: bool) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=packed.device, dtype=dtype), requires_grad=trained)

        for name in ("lora_A", "lora_B", "bias"):
            self.register_parameter(name, None)
        if rank is not None:
            if adapter == "qalora":
                check_rank(rank, out_features, packed.scale.shape[1], "groups")
            inner = packed.scale.shape[1] if adapter == "qalora" else in_features
            self.lora_A = parameter(rank, inner, trained=True)
            self.lora_B = parameter(out_features, rank, trained=True)
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if bias:
            self.bias = parameter(out_features, trained=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, cfg: QuantConfig | None = None) -> QuantLoRALinear:
        """Quantize the weight of an `nn.Linear` as cfg says (default: LoftQ, NF4, rank 16); it is not changed."""
        cfg = cfg or QuantConfig()
        if type(linear) is not nn.Linear:
            raise TypeError(f"from_linear takes a torch.nn.Linear, got {type(linear).__name__}")
        init = initialize([linear.weight.detach()], cfg)[0]
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
                adapter=init.adapter,
                scale_dtype=packed.scale.dtype,
                offset=packed.offset is not None,
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
        lora_A = parameters["lora_A"] if adapted else None
        if lora_A is not None and self.adapter == "qalora":
            lora_A = expand_groups(lora_A, self.in_features, self.group_size)
        return linear_tensors(
            x,
            buffers["codes"],
            buffers["scale"],
            buffers["offset"],
            buffers["codebook"],
            self.group_size,
            lora_A,
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
        if parameter is None:  # float64 scales are those of a float64 layer
            return self.scale.dtype if self.scale.dtype == torch.float64 else torch.get_default_dtype()
        return parameter.dtype

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
            if self.adapter == "qalora":
                lora_A = expand_groups(lora_A, self.in_features, self.group_size)
            dense.addmm_(lora_B, lora_A, alpha=self.scaling)
        return dense

    def check_mergeable(self, *, requantize: bool = False) -> None:
        """Raise the ValueError that `merge_adapter` would raise for the kind or state of the adapter."""
        if self.lora_A is None:
            return
        if not self.adapter_enabled:
            raise ValueError("the adapter is disabled, and merging would add it: call enable_adapter first")
        if self.adapter == "lora" and not requantize:
            raise ValueError(
                f"a rank-{self.rank} adapter changes each weight of a group differently, which the group's scale and "
                "offset cannot hold: merge_adapter(requantize=True) rounds again and returns the error that adds, "
                "merged_linear() is exact and dense, and adapter='qalora' merges exactly"
            )

    def merge_adapter(self, *, requantize: bool = False) -> float:
        """Move the adapter into the packed weight, in place; returns the relative error ||W - W'||_F / ||W||_F it adds.

        adapter="qalora": exact, the error is 0. The codes stay; the offsets (of zero where the format has none) become

            offset'[n, g] = offset[n, g] + scaling / group_size * (lora_B @ lora_A)[n, g]

        and are stored, with the scales, in float32 (float64 in a float64 layer, for which there is no fast kernel): in
        float16 they would be rounded by 5e-4 of themselves. adapter="lora": the merged weight is quantized anew,
        only with ``requantize=True``. A layer without adapter stays as it is. Then lora_A, lora_B and rank are None.

        Raises ValueError, changing nothing, for an ordinary adapter without ``requantize``, a disabled adapter, or NaN
        or Inf in the adapter.
        """
        self.check_mergeable(requantize=requantize)
        if self.lora_A is None:
            return 0.0
        with torch.inference_mode(False), torch.no_grad():  # in this order: the first switches gradients on
            packed, error = self._with_offsets() if self.adapter == "qalora" else self._requantized()
        for name in PACKED_BUFFERS:
            setattr(self, name, getattr(packed, name))
        self.lora_A = self.lora_B = self.rank = None
        self.scaling, self.adapter = 1.0, "lora"
        return error

    def _with_offsets(self) -> tuple[PackedTensor, float]:
        wide = torch.float64 if self.lora_A.dtype == torch.float64 else torch.float32
        width = self.in_features if self.group_size == -1 else self.group_size
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

    def _requantized(self) -> tuple[PackedTensor, float]:
        dense = self._merged()
        dtype = self.scale.dtype if self.scale.dtype in SCALE_DTYPES else torch.float32
        packed = quantize(dense, self.format.name, self.group_size, scale_dtype=dtype, name="the merged weight")
        norm, difference = dense.norm().item(), (dense - packed.dequantize(dense.dtype)).norm().item()
        return packed, difference / norm if norm > 0 else 0.0

    def merged_linear(self) -> nn.Linear:
        """A plain `nn.Linear` that computes the same: weight = Q + scaling * lora_B @ lora_A, dense."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self._dtype)
        linear.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    def extra_repr(self) -> str:
        adapter = "no adapter" if self.rank is None else f"rank={self.rank}, scaling={self.scaling:g}"
        if self.rank is not None and self.adapter != "lora":
            adapter = f"adapter={self.adapter}, {adapter}"
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
