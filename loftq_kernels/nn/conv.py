"""`QuantLoRAConv1d` and `QuantLoRAConv2d`: convolutions with a quantized kernel and a low-rank adapter."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from loftq_kernels import arguments
from loftq_kernels.initializers import AdapterInit, LayerConfig, initialize
from loftq_kernels.nn.base import QuantLoRAModule
from loftq_kernels.nn.stacking import Factors
from loftq_kernels.ops.convolution import ConvGeometry, conv_tensors
from loftq_kernels.ops.functional import autocast


class _QuantLoRAConv(QuantLoRAModule):
    """y = conv(x, Q) + scaling * conv1x1(conv(x, A), B) + bias.

    The adapter is two convolutions in inference, too. Adding it to the decoded kernel instead saved up to a third on
    maps of 28 x 28 pixels and more, and cost as much again on small ones. This way inference also rounds as training
    does.
    """

    dense_copy = "merged_conv"
    _dense_class: type[nn.Conv1d] | type[nn.Conv2d]
    geometry_names = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | str | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        format: str = "nf4",
        group_size: int = 64,
        rank: int | None = 16,
        lora_alpha: float | None = None,
        use_rslora: bool = False,
        scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ):
        checked = _checked_geometry(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        # It checks and completes the arguments; the meta device allocates nothing.
        dense = self._dense_class(*checked, False, padding_mode, "meta")
        super().__init__(
            dense.out_channels,
            dense.weight[0].numel(),
            bias,
            format=format,
            group_size=group_size,
            rank=rank,
            lora_alpha=lora_alpha,
            use_rslora=use_rslora,
            scale_dtype=scale_dtype,
            device=device,
            dtype=dtype,
            adapter_dtype=adapter_dtype,
        )
        for name in self.geometry_names:
            setattr(self, name, getattr(dense, name))
        self._kernel = tuple(dense.weight.shape[1:])
        self._pads, inside = _split_padding(dense)
        self._geometry = ConvGeometry(self._kernel, group_size, self.stride, inside, self.dilation, self.groups)

    @classmethod
    def from_conv(cls, conv: nn.Module, cfg: LayerConfig | None = None) -> _QuantLoRAConv:
        """Quantize the kernel of a convolution as cfg says (default: LoftQ, NF4, rank 16); conv is not changed.

        Raises TypeError unless conv is of exactly the class that this one replaces, and ValueError as the initializer:
        for NaN or Inf, naming the flattened kernel's row, for ranks above min(c_out, c_in / groups * k) and for
        adapter="qalora".
        """
        if type(conv) is not cls._dense_class:
            raise TypeError(f"from_conv takes a torch.nn.{cls._dense_class.__name__}, got {type(conv).__name__}")
        cfg = cfg or LayerConfig()
        if cfg.has_qalora:
            cls._check_adapter(cfg.adapter)
        init = initialize([conv.weight.detach().flatten(1)], cfg)[0]
        return cls.from_init(init, conv, adapter_dtype=cfg.adapter_dtype)

    @classmethod
    def from_init(
        cls, init: AdapterInit, conv: nn.Module, *, adapter_dtype: torch.dtype | None = None
    ) -> _QuantLoRAConv:
        """A layer that holds what an initializer returned for ``conv.weight.flatten(1)``; the rest is as in conv."""
        with torch.inference_mode(False):  # Parameters made in inference mode could never be trained.
            geometry = {name: getattr(conv, name) for name in cls.geometry_names}
            options = cls._init_options(init, conv.weight.dtype, adapter_dtype)
            layer = cls(**geometry, bias=conv.bias is not None, **options)
            if init.packed.shape != layer.packed.shape:
                raise ValueError(
                    f"init holds a weight {tuple(init.packed.shape)}, the kernel flattens to "
                    f"{tuple(layer.packed.shape)} = (out_channels, in_channels / groups * kernel)"
                )
            layer._fill(init, conv.bias)
            return layer.train(conv.training)

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, *self._kernel

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        batched = x.dim() == len(self.kernel_size) + 2
        x = autocast(x if batched else x.unsqueeze(0))
        if self._pads:
            x = functional.pad(x, self._pads, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        y = conv_tensors(x, *self.stored(), self.bias, self._geometry)
        if (term := self.low_rank()) is not None:
            y = torch.add(y, self._adapter(x, term), alpha=term.scaling)
        return y if batched else y.squeeze(0)

    def _adapter(self, x: Tensor, term: Factors) -> Tensor:
        """B A x as two convolutions: k x k with r outputs per group, which share A, and 1 x 1."""
        g, zeros, ones = self._geometry, [0] * len(self.kernel_size), [1] * len(self.kernel_size)
        lora_A = term.lora_A.to(x.dtype).view(-1, *self._kernel).repeat(g.groups, *ones, 1)
        lora_B = term.lora_B.to(x.dtype).view(self.out_channels, -1, *ones)
        hidden = torch.convolution(x, lora_A, None, g.stride, g.padding, g.dilation, False, zeros, g.groups)
        return torch.convolution(hidden, lora_B, None, ones, zeros, ones, False, zeros, g.groups)

    def _check_input(self, x: Tensor) -> None:
        spatial = len(self.kernel_size)
        if x.dim() not in (spatial + 1, spatial + 2) or x.shape[-spatial - 1] != self.in_channels:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: expected [batch, in_channels={self.in_channels}, "
                f"{'height, width' if spatial == 2 else 'length'}], the batch optional"
            )

    def merged_conv(self) -> nn.Module:
        """A plain convolution that computes the same: kernel = Q + scaling * B A, dense."""
        geometry = {name: getattr(self, name) for name in self.geometry_names}
        conv = self._dense_class(**geometry, bias=self.bias is not None, device="meta", dtype=self.dtype)
        conv.weight = nn.Parameter(self.dense_weight())
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone())
        return conv.train(self.training)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        defaults = {
            "padding": (0,) * len(self.kernel_size),
            "dilation": (1,) * len(self.kernel_size),
            "groups": 1,
            "padding_mode": "zeros",
        }
        for name, default in defaults.items():
            value = getattr(self, name)
            if value != default:
                parts.append(f"{name}={value!r}")
        return ", ".join([*parts, f"bias={self.bias is not None}", self._describe_weight()])


class QuantLoRAConv1d(_QuantLoRAConv):
    """y = conv(x, Q) + scaling * conv1x1(conv(x, A), B) + bias, x [B, c_in, length]; else as `QuantLoRAConv2d`."""

    kind = "conv1d"
    _dense_class = nn.Conv1d


class QuantLoRAConv2d(_QuantLoRAConv):
    """y = conv(x, Q) + scaling * conv1x1(conv(x, A), B) + bias, a drop-in for `nn.Conv2d`.

    The kernel is stored as the matrix [c_out, c_in / groups * k * k] of its flattened filters: Q packed,
    lora_A [rank, c_in / groups * k * k], lora_B [c_out, rank]. The pair is a k x k convolution with ``rank``
    outputs per group, of the same stride, padding and dilation, and a 1 x 1 convolution. Source: LoftQ (Li et al.,
    2024), appendix. Each call decodes the dense kernel and drops it after use, in the backward as well. Moves,
    state_dict and training are as for `QuantLoRALinear`.

    Args:
        in_channels .. padding_mode, device, dtype: as for `nn.Conv2d`; dtype is that of the bias.
        format, group_size, scale_dtype, rank, lora_alpha, use_rslora, adapter_dtype: as for `QuantLoRALinear`;
            rank is 1 .. min(c_out, c_in / groups * k * k), or None for no adapter.

    Shapes: x [B, c_in, h, w] or [c_in, h, w], as `nn.Conv2d`; the result is in the dtype of x. Raises ValueError or
    TypeError for arguments out of range, and for an x of other shape or dtype.
    """

    kind = "conv2d"
    _dense_class = nn.Conv2d


def _checked_geometry(*values: int | str | tuple[int, ...]) -> list[int | str | tuple[int, ...]]:
    """As plain ints. Raises ValueError for what PyTorch leaves to the first call, or to a division by zero."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    return [_checked(name, value, 0 if name == "padding" else 1) for name, value in zip(names, values, strict=True)]


def _checked(name: str, value: int | str | tuple[int, ...], least: int) -> int | str | tuple[int, ...]:
    if name == "padding" and isinstance(value, str):
        return value  # nn.Conv2d knows the names
    several = isinstance(value, tuple | list)
    try:
        plain = tuple(arguments.whole_number(name, number, least) for number in (value if several else (value,)))
    except ValueError as error:
        raise ValueError(f"{name}={value!r} must hold integers >= {least}") from error
    return plain if several else plain[0]


def _split_padding(dense: nn.Conv1d | nn.Conv2d) -> tuple[list[int], tuple[int, ...]]:
    """(padding for `functional.pad` before the convolution, padding for the convolution itself).

    The convolution itself pads with zeros only, equally on both sides; "same" with an even kernel needs one more on
    the right.
    """
    pads = list(dense._reversed_padding_repeated_twice)  # last dimension first, as functional.pad takes it
    left, right = pads[0::2][::-1], pads[1::2][::-1]
    if dense.padding_mode == "zeros" and left == right:
        return [], tuple(left)
    return (pads if any(pads) else []), (0,) * len(left)
