"""`QuantLoRAModule`: what the quantized layers share: a packed weight, an adapter, a bias."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from loftq_kernels.formats import PackedTensor, empty_packed, get_format
from loftq_kernels.initializers import AdapterInit
from loftq_kernels.initializers.config import adapter_scaling, default_adapter_dtype
from loftq_kernels.initializers.qalora import expand_groups
from loftq_kernels.nn.expansion import expanded
from loftq_kernels.nn.merging import Mergeable
from loftq_kernels.nn.weight_view import QuantizedWeight, read_only_error
from loftq_kernels.ops import linear_tensors
from loftq_kernels.ops.checks import check_rank, is_sharded
from loftq_kernels.ops.constant import Constant, keep_dtypes, loading, restore_constants
from loftq_kernels.ops.functional import full_precision

PACKED = ("codes", "scale", "offset", "codebook")
_STATE = "_extra_state"  # nn.Module's key of what `get_extra_state` returns
_warned: list[list[str] | None] = [None]  # the missing keys of the load that warned last: one list for all its layers


class QuantLoRAModule(Mergeable):
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
        return self.packed.dequantize(dtype or self.dtype).view(self._weight_shape)

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
        return self._merged(detach=detach).to(self.dtype).view(self._weight_shape)

    def _merged(self, *, detach: bool = True) -> Tensor:
        dense = self.packed.dequantize(torch.promote_types(self.dtype, torch.float32))
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
        parameters = self._parameters
        codes, scale, offset, codebook = self.stored()
        adapted = self.adapter_enabled
        lora_A, lora_B = (parameters["lora_A"], parameters["lora_B"]) if adapted else (None, None)
        if lora_A is not None and self.adapter != "lora":
            lora_A = expanded(self, lora_A)
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
            self.scaling,
            bias,
            in_features=self._columns,
        )

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
        device = self.codes.device
        super()._apply(keep_dtypes(fn, self, PACKED), recurse)
        restore_constants(self, PACKED)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        return self

    def get_extra_state(self) -> Tensor:
        """What tensors do not tell: float64 [scaling, 1 if the adapter is enabled else 0, in_features], on the CPU."""
        values = self.scaling, float(self.adapter_enabled), float(self._columns)
        return torch.tensor(values, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what `get_extra_state` returned, now or before it had in_features. Raises ValueError for others."""
        values = state.flatten().tolist() if isinstance(state, Tensor) and state.numel() in (2, 3) else (0.0, None)
        if not 1e-30 < values[0] < 1e30 or values[1] not in (0.0, 1.0):
            raise ValueError(f"_extra_state must be [scaling, adapter_enabled, in_features], got {state!r}")
        if message := self._other_width(state):
            raise ValueError(message)
        self.scaling, self.adapter_enabled = values[0], bool(values[1])

    def _other_width(self, state: object) -> str | None:
        """What keeps an extra state from being this layer's: rows of 63 columns are packed as wide as rows of 64."""
        width = state.flatten()[2].item() if isinstance(state, Tensor) and state.numel() == 3 else self._columns
        return None if width == self._columns else f"in_features is {width:g}, this layer's is {self._columns}"

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.lora_A is None:
            destination.pop(prefix + _STATE, None)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Refuse a checkpoint of another format or width: shapes alone cannot tell nf2 from uniform2, or 63 from 64."""
        wrong = [message for name in PACKED if (message := self._misfit(name, state_dict.get(prefix + name)))]
        wrong += [message for message in [self._other_width(state_dict.get(prefix + _STATE))] if message]
        error_msgs.extend(prefix + message for message in wrong)
        if wrong:
            return
        with loading():
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        restore_constants(self, PACKED)
        if prefix + _STATE not in state_dict:
            self._note_missing_state(prefix, missing_keys)

    def _misfit(self, name: str, stored: Tensor | None) -> str | None:
        """What keeps a stored tensor of the packed weight from being this layer's; None where nothing does."""
        own = getattr(self, name)
        if stored is None or own is None:
            return None
        if stored.dtype != own.dtype:  # Copying would round codes, or the scales that they were chosen against.
            return f"{name} is {stored.dtype}, this layer stores {own.dtype}"
        if name != "codebook" or stored.is_meta:
            return None
        if is_sharded(stored) and is_sharded(own):
            stored, expected = stored.to_local(), own.to_local()
        else:
            expected = get_format(self.format.name).codebook(stored.device)
        if stored.shape == expected.shape and torch.equal(stored, expected):
            return None
        return f"{name} is not that of format {self.format.name}: {stored.flatten()[:4].tolist()}..."

    def _note_missing_state(self, prefix: str, missing_keys: list[str]) -> None:
        """State dicts of earlier versions lack it: what the layer has stays, which is right for the same config."""
        if prefix + _STATE in missing_keys:
            missing_keys.remove(prefix + _STATE)
        if self.lora_A is None or (self.scaling == 1 and self.adapter_enabled) or _warned[0] is missing_keys:
            return
        _warned[0] = missing_keys
        warnings.warn(
            f"the state_dict does not say what the adapter of {prefix.rstrip('.') or 'the layer'} is scaled by: "
            f"it keeps scaling={self.scaling:g}, adapter_enabled={self.adapter_enabled}, and so does every other layer "
            "without this entry",
            stacklevel=2,
        )
