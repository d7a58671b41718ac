"""Merging: moving an adapter into the packed weight, exactly into the offsets or by quantizing again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from loftq_kernels.formats import PackedTensor, quantize
from loftq_kernels.ops.checks import SCALE_DTYPES
from loftq_kernels.ops.constant import Constant
from loftq_kernels.storage.packing import group_width


class Mergeable(nn.Module):
    """What `QuantLoRAModule` does to fold its adapter into its weight; it provides the tensors."""

    def check_mergeable(self, *, requantize: bool = False) -> None:
        """Raise the ValueError that `merge_adapter` would raise for the kind or state of the adapter."""
        if self.slots is not None and (reason := self.slots.reason_not_to_merge()):
            raise ValueError(reason)
        if self.lora_A is None:
            return
        if type(self._parameters["codes"]) is not Constant:  # nn.Parameter or DTensor, which fully_shard puts back
            raise ValueError(
                "fully_shard manages the layer's parameters and would undo the merge: merge before fully_shard, or in "
                "one process, after save_quantized and load_quantized"
            )
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

        Raises ValueError, changing nothing, for an ordinary adapter without ``requantize``, a disabled adapter, NaN or
        Inf in the adapter, and user adapters that are active or stand in the place of this one.
        """
        packed, error = self.merged_packed(requantize=requantize, scale_search=scale_search)
        self.take_merged(packed)
        return error

    def merged_packed(self, *, requantize: bool = False, scale_search: bool = False) -> tuple[PackedTensor, float]:
        """The packed weight that `merge_adapter` would leave, and the error that it would return; changes nothing."""
        self.check_mergeable(requantize=requantize)
        if self.lora_A is None:
            return self.packed, 0.0
        with torch.inference_mode(False), torch.no_grad():  # In this order: the first switches gradients on.
            return self._with_offsets() if self.adapter == "qalora" else self._requantized(scale_search)

    def take_merged(self, packed: PackedTensor) -> None:
        """Hold what `merged_packed` returned, without an adapter."""
        if self.lora_A is None:
            return
        self.hold(packed)
        self.lora_A = self.lora_B = self.rank = None
        self.scaling, self.adapter = 1.0, "lora"

    def _with_offsets(self) -> tuple[PackedTensor, float]:
        wide = torch.float64 if self.lora_A.dtype == torch.float64 else torch.float32
        width = group_width(self._columns, self.group_size)
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


def merge_all(
    layers: Mapping[str, Mergeable], *, requantize: bool = False, scale_search: bool = False
) -> dict[str, float]:
    """`merge_adapter` of each layer: the error that each merge added, by name; nothing is changed if one fails.

    With ``requantize=True`` old and new packed weights of all layers exist together for a while.
    """
    merged: dict[str, tuple[PackedTensor, float]] = {}
    for check in (True, False):  # What takes no time comes first.
        for name, layer in layers.items():
            try:
                if check:
                    layer.check_mergeable(requantize=requantize)
                else:
                    merged[name] = layer.merged_packed(requantize=requantize, scale_search=scale_search)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
    for name, layer in layers.items():
        layer.take_merged(merged[name][0])
    return {name: error for name, (_, error) in merged.items()}
