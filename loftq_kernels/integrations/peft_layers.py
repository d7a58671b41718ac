"""PEFT's LoRA layers around ours: what `peft` puts in a quantized layer's place when an adapter targets it.

y = x @ (Q + s0 B0 A0).T + bias  +  sum over active adapters of s (dropout(x) @ A.T) @ B.T

Q and the start adapter (s0, A0, B0) are the layer's own and frozen: to PEFT they are the base, and its files do not
hold them. Base, start adapter and active adapters are one product, where an adapter sees x itself. One that sees
dropout(x) in training is added in plain torch, for factors that see different inputs cannot be put together.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.lora import variants
from peft.tuners.lora.config import LoraConfig
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from loftq_kernels.formats import qlora_linear
from loftq_kernels.initializers import LayerConfig, initialize
from loftq_kernels.integrations.peft_dora import QuantizedDora, dora_scale
from loftq_kernels.nn.adapter_slots import NamedAdapter, RowNames, by_row
from loftq_kernels.nn.base import QuantLoRAModule
from loftq_kernels.nn.conv import QuantLoRAConv1d, QuantLoRAConv2d
from loftq_kernels.nn.embedding import QuantLoRAEmbedding
from loftq_kernels.nn.group import is_grouped
from loftq_kernels.nn.kept import forget
from loftq_kernels.nn.kinds import kind_of
from loftq_kernels.nn.linear import QuantLoRALinear
from loftq_kernels.nn.stacking import Factors

# Values of LoraConfig's init_lora_weights that leave the base weight alone.
INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
# Of its fields that stand for a variant of LoRA, those that ask nothing of the base layer but its output.
VARIANTS = ("use_dora", "alora_invocation_tokens", "arrow_config")
_DENSE = "or keep the layers dense with QuantConfig(exclude=...)"


class AroundQuantized:
    """What PEFT's layers do differently around ours: they never write to the base weight.

    `merge` notes the adapters, which the one product holds anyway: outputs stay bit for bit, `unmerge` is exact, and
    `base_layer` stays quantized. Unloading makes the layer that holds them (`merged_layer`).
    """

    requantize_merged = False  # whether unloading quantizes the merged weight again

    def update_layer(self, adapter_name: str, *args, config: LoraConfig, **kwargs) -> None:
        check_config(config, self.get_base_layer())
        self.fan_in_fan_out = False  # Also in the place of a transposed Conv1D the matrix is [out, in].
        super().update_layer(adapter_name, *args, config=config, **kwargs)

    def train(self, mode: bool = True) -> nn.Module:
        self.forget_kept()
        return super().train(mode)

    def forget_kept(self) -> None:
        """Make what is kept between calls anew at the next one, after writes that PyTorch does not count."""
        for module in (self, self.get_base_layer(), *self.lora_magnitude_vector.values()):
            forget(module)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        if isinstance(module, QuantLoRAEmbedding):
            return module.num_embeddings, module.embedding_dim
        if isinstance(module, QuantLoRALinear):
            return module.in_features, module.out_features
        return module.in_channels, module.out_channels

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Note that these adapters (None: the active ones) are part of the base from now on; see the class.

        Raises what PEFT's own merge into the dense layer raises, such as NotImplementedError for aLoRA and, with
        ``safe_merge``, ValueError for NaN or Inf.
        """
        if self._is_dense():
            return super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self._held()]
        if names:
            if safe_merge or any(name in self.lora_variant or self.lora_bias[name] for name in names):
                self._dense(self.merged_adapters + names, safe_merge)  # raises for what cannot be merged
            self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Let the active adapters count again instead of those that `merge` noted."""
        if self._is_dense():
            return super().unmerge()
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module that PEFT leaves in this one's place: `merged_layer`, or the base where nothing was merged."""
        names = list(self.merged_adapters)
        if merge:
            names += [name for name in check_adapters_to_merge(self, adapter_names) if name in self._held()]
        return self.merged_layer(names, safe_merge=safe_merge) if names else self.get_base_layer()

    def merged_layer(self, names: Sequence[str], *, safe_merge: bool = False) -> nn.Module:
        """The layer with the start adapter and these adapters in its weight.

        A dense `nn.Linear` (or its like), which is exact but for one rounding to the layer's dtype. With
        ``requantize_merged`` it is quantized again, as LoftQ does it, with the format, group size and rank of the base:
        smaller, and off by the error of that quantization.
        """
        dense, base = self._dense(names, safe_merge), self.get_base_layer()
        if not self.requantize_merged:
            warnings.warn(
                "merging adapters into quantized layers makes dense layers, which is exact and takes the memory of a "
                "dense model; loftq_kernels.integrations.peft.merge_and_unload(model, requantize=True) quantizes again",
                stacklevel=2,
            )
            return dense.to(base.dtype)
        kind = kind_of(base)
        cfg = LayerConfig(
            format=base.format.name,
            group_size=base.group_size,
            rank=base.rank,
            adapter=base.adapter,
            scale_dtype=base.scale.dtype,
        )
        init = initialize([kind.matrix_of(dense)], cfg)[0]
        quantized = kind.place(dense.to(base.dtype), init, None if base.rank is None else base.lora_A.dtype)
        return quantized.train(base.training)

    def _dense(self, names: Sequence[str], safe_merge: bool) -> nn.Module:
        """PEFT's own merge, into a dense layer of at least float32 that computes what the base does."""
        base, noted = self.base_layer, self.merged_adapters
        dense = getattr(base, base.dense_copy)()
        wide = torch.promote_types(base.dtype, torch.float32)
        dense.weight = nn.Parameter(base.dense_weight(dtype=wide))
        self.base_layer, self.merged_adapters = dense.to(wide).requires_grad_(False), []
        try:
            super().merge(safe_merge=safe_merge, adapter_names=list(names))
        finally:
            self.base_layer, self.merged_adapters = base, noted
        return dense

    def _is_dense(self) -> bool:
        """Whether `_dense` is at work, in which PEFT's merging merges and unmerges as it pleases."""
        return not isinstance(self.base_layer, QuantLoRAModule)

    def _held(self) -> set[str]:
        """Names of the adapters of this layer."""
        return {*self.lora_A, *self.lora_embedding_A}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.merged or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        with self._merged_as_active():
            return super().forward(x, *args, **kwargs)

    @contextmanager
    def _merged_as_active(self) -> Iterator[None]:
        """For PEFT's forward, which looks for merged adapters in the base weight."""
        merged, active = self.merged_adapters, self._active_adapter
        self.merged_adapters, self._active_adapter = [], list(merged)
        try:
            yield
        finally:
            self.merged_adapters, self._active_adapter = merged, active


class LoraQuantizedLinear(AroundQuantized, lora.Linear):
    """`peft.tuners.lora.Linear` around a `QuantLoRALinear`."""

    @property
    def lora_variants(self) -> dict:
        return {
            (): None,
            ("use_dora",): QuantizedDora,
            ("alora_invocation_tokens",): variants.ALoraLinearVariant,
            ("arrow_config",): variants.ArrowLinearVariant,
            ("mica",): variants.MiCALinearVariant,
        }

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names = of_variants = None
        if kwargs:
            self._check_forward_args(x, *args, **kwargs)
            of_variants = {name: kwargs.pop(name, None) for name in lora.VARIANT_KWARG_KEYS}
            adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names=adapter_names, **of_variants)
        lora_A = self.lora_A
        names = [name for name in self.merged_adapters or self.active_adapters if name in lora_A]
        if self.training and all(map(self._is_plain, names)):
            names.sort(key=self._drops)  # Their order makes no difference then: those with dropout come last.
        together = self._together(names)
        y = self._product(x, names[:together])
        if together == len(names):
            return y
        dtype = y.dtype
        for name in names[together:]:
            y = self._add(y, x, name, of_variants or {})
        return y.to(dtype)

    def _together(self, names: Sequence[str]) -> int:
        """How many adapters, from the first, can be in the product with the base: up to a DoRA, which scales it."""
        if _is_watched(self.base_layer):
            return 0
        if not self.training and not self.lora_variant:
            return len(names)
        for i, name in enumerate(names):
            if self._drops(name):
                return i
            if self._is_dora(name):
                return i + 1
            if not self._is_plain(name):
                return i
        return len(names)

    def _is_dora(self, name: str) -> bool:
        return isinstance(self.lora_variant.get(name), QuantizedDora)

    def _is_plain(self, name: str) -> bool:
        """Whether an adapter's term is s B A x: MiCA only trains otherwise."""
        return isinstance(self.lora_variant.get(name), (type(None), variants.MiCALinearVariant))

    def _drops(self, name: str) -> bool:
        dropout = self.lora_dropout[name]
        return self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0

    def factors(self, name: str) -> Factors:
        """An adapter's factors as the layers of this package take them."""
        return Factors(self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])

    def _product(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The base with these adapters, in one product; the last of them may be a DoRA, which scales what is before."""
        base = self.base_layer
        if not names:
            return base(x)  # so that hooks see it called
        more, bias = [self.factors(name) for name in names], base._parameters["bias"]
        beside = [self.scaling[name] * self.lora_B[name].bias for name in names if self.lora_bias[name]]
        if not self._is_dora(names[-1]):
            return base.product(x, _sum(bias, *beside) if beside else bias, more=more)
        dtype = (y := base.product(x, _sum(*beside), more=more)).dtype
        y = dora_scale(self, names[-1]) * y
        return (y if bias is None else y + bias).to(dtype)

    def _add(self, y: Tensor, x: Tensor, name: str, of_variants: dict[str, Any]) -> Tensor:
        """y with the term of one more adapter, as PEFT computes it, in the dtype of the adapter."""
        lora_A, lora_B = self.lora_A[name], self.lora_B[name]
        x = self._cast_input_dtype(x, lora_A.weight.dtype)
        if self._is_plain(name):
            return y + lora_B(lora_A(self.lora_dropout[name](x))) * self.scaling[name]
        return self.lora_variant[name].forward(self, active_adapter=name, x=x, result=y, **of_variants)

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Row i of the batch with adapter_names[i] ("__base__": none), in one product, which has no derivatives.

        Where a gradient is wanted, an adapter is more than two factors or something watches the base layer, each
        adapter's rows are computed by themselves, as PEFT does.
        """
        names = sorted({name for name in adapter_names if name in self.lora_A})
        adapters = {name: NamedAdapter(self.factors(name)) for name in names}
        base = self.base_layer
        wanted = (x, *(factor for one in adapters.values() for factor in one.factors[:2]), *base.parameters())
        differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in wanted)
        plain = all(self._is_plain(name) and not self.lora_bias[name] for name in names)
        if not names or differentiated or not plain or _is_watched(base):
            return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        rows = RowNames([name if name in adapters else None for name in adapter_names])
        shared = [own] if (own := base.low_rank()) else []
        slots = by_row(base, adapters, rows, shared, len(shared), x.shape[:-1])
        return qlora_linear(x, base.packed, slots.lora_A, slots.lora_B, bias=base.bias, adapter_ids=slots.ids)


class LoraQuantizedEmbedding(AroundQuantized, lora.Embedding):
    """`peft.tuners.lora.Embedding` around a `QuantLoRAEmbedding`: its look-up, and the adapters' beside it."""


class _LoraQuantizedConv(AroundQuantized):
    def update_layer(self, adapter_name: str, *args, config: LoraConfig, **kwargs) -> None:
        check_config(config, self.get_base_layer())
        # PEFT makes lora_A and lora_B of the base layer's class, which must be the dense one.
        base, self.base_layer = self.base_layer, self.base_layer.merged_conv()
        try:
            super(AroundQuantized, self).update_layer(adapter_name, *args, config=config, **kwargs)
        finally:
            self.base_layer = base


class LoraQuantizedConv1d(_LoraQuantizedConv, lora.Conv1d):
    """`peft.tuners.lora.Conv1d` around a `QuantLoRAConv1d`: its convolution, and the adapters' beside it."""


class LoraQuantizedConv2d(_LoraQuantizedConv, lora.Conv2d):
    """`peft.tuners.lora.Conv2d` around a `QuantLoRAConv2d`: its convolution, and the adapters' beside it."""


LAYERS: dict[type[QuantLoRAModule], type[lora.LoraLayer]] = {
    QuantLoRALinear: LoraQuantizedLinear,
    QuantLoRAEmbedding: LoraQuantizedEmbedding,
    QuantLoRAConv1d: LoraQuantizedConv1d,
    QuantLoRAConv2d: LoraQuantizedConv2d,
}


def check_config(config: LoraConfig, layer: QuantLoRAModule) -> None:
    """Raise ValueError for a LoraConfig that a quantized layer cannot honour, or a layer that would not honour it."""
    name = type(layer).__name__
    if (init := config.init_lora_weights) not in INITS:
        raise ValueError(
            f"init_lora_weights={init!r} rewrites the base weight, which {name} holds quantized: use one of {INITS} "
            f"(adapters fitted to the quantized weight come from quantize_model with QuantConfig(init=...)), {_DENSE}"
        )
    if config.use_qalora:
        raise ValueError(
            f"use_qalora=True is for GPTQ layers, not for {name}: quantize with QuantConfig(adapter='qalora'), whose "
            f"adapters merge exactly, {_DENSE}"
        )
    for field, definition in type(config).__dataclass_fields__.items():
        if definition.metadata.get("is_lora_variant") and field not in VARIANTS and getattr(config, field):
            raise ValueError(f"{field} is not supported around {name}: leave it out, {_DENSE}")
    if is_grouped(layer):
        raise ValueError(
            f"a {name} of a QuantLoRALinearGroup cannot have PEFT's adapters, which the group's product would leave "
            "out: call the layers one by one, without the group"
        )


def _sum(*terms: Tensor | None) -> Tensor | None:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


def _is_watched(layer: nn.Module) -> bool:
    """Whether hooks or a replaced forward (offloading, calibration) must see the layer called."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return bool(hooks) or "forward" in vars(layer)
