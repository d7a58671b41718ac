"""One check function per op, called by its fake kernel and by its public wrapper. Messages carry the values."""

from __future__ import annotations

import torch
from torch import Tensor

from loftq_kernels import arguments, vocabulary
from loftq_kernels.ops.reference import SCALE_RULES
from loftq_kernels.storage import packing

SCALE_DTYPES_BY_NAME = {name: getattr(torch, name) for name in vocabulary.SCALE_DTYPES}
SCALE_DTYPES = tuple(SCALE_DTYPES_BY_NAME.values())
# The dtypes of stored scales and offsets. Float64 comes from merging a float64 adapter, never from `quantize`.
DTYPES_BY_NAME = STORED_DTYPES_BY_NAME = {name: getattr(torch, name) for name in vocabulary.DTYPES}
STORED_DTYPES = tuple(STORED_DTYPES_BY_NAME.values())


def check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def check_weight(name: str, weight: Tensor) -> None:
    """Check a dense weight that is to be quantized: a floating-point matrix with values."""
    check_floating(name, weight)
    if weight.dtype.itemsize < 2:
        raise TypeError(f"{name} is {weight.dtype}: quantize from a wider type")
    if weight.layout != torch.strided:
        raise ValueError(f"{name} has layout {weight.layout}, expected a dense tensor")
    if weight.dim() != 2:
        raise ValueError(f"{name} must be [out_features, in_features], got shape {tuple(weight.shape)}")
    if weight.is_meta:
        raise ValueError(f"{name} {tuple(weight.shape)} is on the meta device: it has no values")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device} but {other_name} is on {other.device}")


def bits_of(codebook: Tensor) -> int:
    bits = packing.bits_of(codebook)
    if bits not in packing.BITS or codebook.numel() != 2**bits or codebook.dim() != 1:
        raise ValueError(f"codebook has shape {tuple(codebook.shape)}: expected [2^bits] with bits in {packing.BITS}")
    if codebook.dtype != torch.float32:
        raise ValueError(
            f"codebook must be float32, got {codebook.dtype}: a MixedPrecisionPolicy of fully_shard casts all of its "
            "group, so call fully_shard of each quantized layer, without one, before that of what is around it"
        )
    return bits


def check_quantize(
    weight: Tensor, codebook: Tensor, group_size: int, scale_rule: str, scale_dtype: torch.dtype, scale_search: bool
) -> None:
    check_floating("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out_features, in_features], got shape {tuple(weight.shape)}")
    bits_of(codebook)
    packing.check_group_size(group_size)
    arguments.choice("scale_rule", scale_rule, SCALE_RULES)
    check_scale_options(scale_dtype, scale_search)
    check_same_device("weight", weight, "codebook", codebook)


def check_scale_options(scale_dtype: torch.dtype, scale_search: bool) -> None:
    arguments.choice("scale_dtype", scale_dtype, SCALE_DTYPES)
    arguments.flag("scale_search", scale_search)


def check_low_rank(weight: Tensor, low_rank: Tensor) -> None:
    """Check the tensor that `quantize_residual_` overwrites: contiguous, with the shape and device of weight."""
    if low_rank.shape != weight.shape or low_rank.dtype not in SCALE_DTYPES or not low_rank.is_contiguous():
        raise ValueError(
            f"low_rank must be contiguous {tuple(weight.shape)} of {SCALE_DTYPES}, got {low_rank.dtype} "
            f"{tuple(low_rank.shape)} with strides {low_rank.stride()}"
        )
    check_same_device("low_rank", low_rank, "weight", weight)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which each process holds a part; imports nothing of torch.distributed."""
    return hasattr(tensor, "to_local")


def check_packed(
    codes: Tensor, scale: Tensor, offset: Tensor | None, codebook: Tensor, in_features: int, group_size: int
) -> None:
    """The stored tensors of one weight agree with each other and with in_features."""
    if not torch.compiler.is_compiling() and is_sharded(codes):
        raise ValueError(
            f"the packed weight is sharded (codes {tuple(codes.shape)}, of which {tuple(codes.to_local().shape)} are "
            "here): call unshard() of the module that was given to fully_shard first, on every process, or compute "
            "with the shards themselves, to_local()"
        )
    bits = bits_of(codebook)
    packing.check_group_size(group_size)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"codes must be uint8 [N, bytes], got {codes.dtype} {tuple(codes.shape)}")
    expected = packing.row_bytes(in_features, bits)
    if codes.shape[1] != expected:
        raise ValueError(
            f"codes rows have {codes.shape[1]} bytes; {in_features} columns at {bits} bits need {expected}"
        )
    if scale.dtype not in STORED_DTYPES:
        raise ValueError(f"scale has dtype {scale.dtype}, expected one of {STORED_DTYPES}")
    groups = (codes.shape[0], packing.num_groups(in_features, group_size))
    for name, tensor in (("scale", scale), ("offset", offset)):
        if tensor is None:
            continue
        if tensor.shape != groups:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {groups} at group_size={group_size}")
        if tensor.dtype != scale.dtype:
            raise ValueError(f"{name} is {tensor.dtype} but scale is {scale.dtype}")
        check_same_device(name, tensor, "codes", codes)
    check_same_device("codebook", codebook, "codes", codes)


def check_qlora_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    in_features: int,
    group_size: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
) -> None:
    check_floating("x", x)
    out_features = codes.shape[0]
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}: its last dimension must be in_features={in_features}")
    check_packed(codes, scale, offset, codebook, in_features, group_size)
    check_same_device("x", x, "codes", codes)
    check_adapter(lora_A, lora_B, out_features, in_features, codes)
    if bias is not None:
        check_floating("bias", bias)
        if bias.shape != (out_features,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({out_features},)")
        check_same_device("bias", bias, "codes", codes)


def check_adapter(
    lora_A: Tensor | None, lora_B: Tensor | None, out_features: int, in_features: int, codes: Tensor
) -> None:
    if (lora_A is None) != (lora_B is None):
        raise ValueError("lora_A and lora_B must be given together or not at all")
    if lora_A is None:
        return
    check_floating("lora_A", lora_A)
    check_floating("lora_B", lora_B)
    if lora_A.dim() != 2 or lora_A.shape[1] != in_features:
        raise ValueError(f"lora_A has shape {tuple(lora_A.shape)}, expected [rank, {in_features}]")
    if lora_B.shape != (out_features, lora_A.shape[0]):
        raise ValueError(f"lora_B has shape {tuple(lora_B.shape)}, expected ({out_features}, {lora_A.shape[0]})")
    check_same_device("lora_A", lora_A, "codes", codes)
    check_same_device("lora_B", lora_B, "codes", codes)


def check_grad_input(
    grad_y: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    in_features: int,
    group_size: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
) -> None:
    check_floating("grad_y", grad_y)
    check_packed(codes, scale, offset, codebook, in_features, group_size)
    if grad_y.dim() == 0 or grad_y.shape[-1] != codes.shape[0]:
        raise ValueError(f"grad_y has shape {tuple(grad_y.shape)}: its last dimension must be {codes.shape[0]}")
    check_same_device("grad_y", grad_y, "codes", codes)
    check_adapter(lora_A, lora_B, codes.shape[0], in_features, codes)


def check_adapter_grad(x: Tensor, grad_y: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    check_floating("x", x)
    check_floating("grad_y", grad_y)
    if x.dim() == 0 or grad_y.dim() == 0 or x.shape[:-1] != grad_y.shape[:-1]:
        raise ValueError(f"grad_y has shape {tuple(grad_y.shape)}, which does not fit x of shape {tuple(x.shape)}")
    check_same_device("grad_y", grad_y, "x", x)
    check_adapter(lora_A, lora_B, grad_y.shape[-1], x.shape[-1], x)


def check_qlora_linear_multi(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    group_size: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    adapter_ids: Tensor,
    bias: Tensor | None,
    in_features: int | None = None,
) -> None:
    """Check everything but the values of adapter_ids: to read them is to wait for a GPU. See `check_adapter_ids`."""
    check_floating("x", x)
    if in_features is None:
        in_features = x.shape[-1] if x.dim() else 0
    check_qlora_linear(x, codes, scale, offset, codebook, in_features, group_size, None, None, bias)
    if lora_A is None or lora_B is None:
        raise ValueError("adapter_ids needs lora_A [S, rank, in_features] and lora_B [S, out_features, rank]")
    check_floating("lora_A", lora_A)
    check_floating("lora_B", lora_B)
    if lora_A.dim() != 3 or lora_A.shape[2] != in_features:
        raise ValueError(
            f"lora_A has shape {tuple(lora_A.shape)}, expected [S, rank, {in_features}] beside adapter_ids"
        )
    expected = (lora_A.shape[0], codes.shape[0], lora_A.shape[1])
    if lora_B.shape != expected:
        raise ValueError(f"lora_B has shape {tuple(lora_B.shape)}, expected {expected}")
    if not isinstance(adapter_ids, Tensor):
        raise TypeError(f"adapter_ids must be a tensor, got {type(adapter_ids).__name__}")
    if adapter_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"adapter_ids must be int32 or int64, got {adapter_ids.dtype}")
    if adapter_ids.shape != x.shape[:-1]:
        raise ValueError(f"adapter_ids has shape {tuple(adapter_ids.shape)}, expected {tuple(x.shape[:-1])} as x")
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B), ("adapter_ids", adapter_ids)):
        check_same_device(name, tensor, "codes", codes)


def check_adapter_ids(adapter_ids: Tensor, adapters: int) -> None:
    """Raise ValueError unless each id is that of an adapter, or -1 for none. Reads values, so use it in host memory."""
    if adapter_ids.numel() == 0:
        return
    low, high = (int(extreme) for extreme in adapter_ids.aminmax())
    if low < -1 or high >= adapters:
        wrong = low if low < -1 else high
        raise ValueError(f"adapter_ids holds {wrong}; {adapters} adapters have ids 0..{adapters - 1}, and -1 is none")


def check_rank(rank: int, out_features: int, in_features: int, inner: str = "in_features") -> int:
    """Return rank as an int. Raises TypeError or ValueError unless it lies in 1 .. the smaller side.

    ``inner`` is the name of in_features (the columns of lora_A) in messages.
    """
    rank = arguments.whole_number("rank", rank, note=" (None means no adapter)", error=TypeError)
    if not 1 <= rank <= min(out_features, in_features):
        raise ValueError(
            f"rank={rank} is outside 1..{min(out_features, in_features)} = min(out_features={out_features}, "
            f"{inner}={in_features}); rank=None means no adapter"
        )
    return rank


def check_matrices(name: str, matrices: Tensor, *, square: bool) -> None:
    """Check a batch for the ops on small matrices: [B, m, n] with m >= n, or [B, n, n], in float32 or float64."""
    if matrices.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {matrices.dtype}")
    expected = "[B, n, n]" if square else "[B, m, n] with m >= n"
    fits = matrices.dim() == 3 and matrices.shape[1] >= matrices.shape[2]
    if not fits or (square and matrices.shape[1] != matrices.shape[2]):
        raise ValueError(f"{name} has shape {tuple(matrices.shape)}, expected {expected}")
