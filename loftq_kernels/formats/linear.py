"""`qlora_linear` on a `PackedTensor`: the public product of x by a packed weight and its adapters."""

from __future__ import annotations

import torch
from torch import Tensor

from loftq_kernels.formats.packed_tensor import PackedTensor
from loftq_kernels.ops import checks, differentiation, functional, reference
from loftq_kernels.ops.backends import kernels_of


def qlora_linear(
    x: Tensor,
    packed: PackedTensor,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    adapter_ids: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = x @ (codebook[codes] * scale + offset).T + scaling * (x @ lora_A.T) @ lora_B.T + bias

    With ``adapter_ids`` each row of x has an adapter of its own: lora_A is [S, r, K], lora_B [S, N, r], and row m takes
    adapter number adapter_ids[m], or none where that is -1. Pad adapters of lower rank with zeros. On a GPU, with more
    than 16 rows, Inf or NaN in one adapter may also reach rows of other adapters that are multiplied beside its own.

    Args:
        x: [..., K], float16, bfloat16, float32 or float64; under autocast it is cast as for `nn.Linear`.
        packed: the weight [N, K].
        lora_A, lora_B: [r, K] and [N, r], both or neither; cast to the dtype of x.
        scaling: lora_alpha / r.
        bias: [N], cast to the dtype of x.
        adapter_ids: int32 or int64 of the leading dimensions of x, on its device; rows sorted by id are fastest.
        backend: one of `available_backends()`; None lets the device of x choose.

    Returns [..., N] in the dtype of x. Differentiable in x, lora_A, lora_B and bias; the weight is a constant.
    Also under `torch.func` and in forward mode. A derivative with respect to parts of the weight raises RuntimeError.
    With adapter_ids it is for inference only, and raises RuntimeError where a gradient or tangent would be needed.
    Raises TypeError for dtypes that are not floating point, ValueError for shapes or devices that do not agree or, on a
    CPU, for ids out of range. On a GPU a check of ids would have to wait for the device, so the rows with such ids
    become NaN instead, even where S or r is 0.
    """
    if adapter_ids is not None:
        return _linear_multi(x, packed, lora_A, lora_B, adapter_ids, scaling, bias, backend)
    return functional.linear_tensors(
        x,
        packed.codes,
        packed.scale,
        packed.offset,
        packed.codebook,
        packed.group_size,
        lora_A,
        lora_B,
        scaling,
        bias,
        in_features=packed.shape[1],
        backend=backend,
    )


def _linear_multi(
    x: Tensor,
    packed: PackedTensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    adapter_ids: Tensor,
    scaling: float,
    bias: Tensor | None,
    backend: str | None,
) -> Tensor:
    weight = packed.codes, packed.scale, packed.offset, packed.codebook, packed.group_size
    checks.check_qlora_linear_multi(x, *weight, lora_A, lora_B, adapter_ids, bias, packed.shape[1])
    if not torch.compiler.is_compiling():  # In a traced graph the op itself raises.
        differentiation.refuse_multi(
            differentiation.differentiated({"x": x, "lora_A": lora_A, "lora_B": lora_B, "bias": bias})
        )
    if adapter_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        checks.check_adapter_ids(adapter_ids, lora_A.shape[0])
    kernels = kernels_of(backend, x.device)
    if packed.scale.dtype == torch.float64:  # The same choice as in `_wide_linear`.
        kernels = reference if x.dtype == torch.float64 else kernels
        scale, offset = (functional.narrow(t, x.dtype) for t in (packed.scale, packed.offset))
        weight = packed.codes, scale, offset, packed.codebook, packed.group_size
    return kernels.qlora_linear_multi(
        functional.autocast(x), *weight, lora_A, lora_B, adapter_ids, float(scaling), bias
    )
