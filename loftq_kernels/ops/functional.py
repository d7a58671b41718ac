"""Public wrappers: check the arguments once, choose the backend, call the op."""

from __future__ import annotations

import math
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loftq_kernels.ops import autograd, checks, extension, reference, triton_backend

if TYPE_CHECKING:
    from loftq_kernels.formats.packed_tensor import PackedTensor

BACKENDS = ("reference", "cpu", "triton")
_PLAIN_TYPES = frozenset((type(None), Tensor, torch.nn.Parameter))  # of arguments that are no tensor subclass


def available_backends() -> tuple[str, ...]:
    """The names that ``backend=`` accepts on this machine."""
    triton_device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    missing = {
        "cpu": extension._C is None,
        "triton": triton_backend.unavailable(triton_device) is not None,
    }
    return tuple(name for name in BACKENDS if not missing.get(name))


def select_backend(backend: str | None, device: torch.device) -> str | None:
    """Check that ``backend`` exists and takes tensors of device; None becomes "reference" where there is no other."""
    if backend is None:
        return None if extension._C is not None else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {BACKENDS} (None: by the device of the tensors)")
    if backend == "cpu" and extension._C is None:
        raise RuntimeError(
            f"backend='cpu' needs the compiled extension, which did not load ({extension.LOAD_ERROR}); "
            f"{extension.HOW_TO_BUILD}"
        )
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend='cpu' takes CPU tensors, got {device}")
    if backend == "triton":
        reason = triton_backend.unavailable(device)
        if reason is not None:
            raise ValueError(f"backend='triton' cannot take tensors on {device}: {reason}")
    return backend


def _kernels(backend: str | None, device: torch.device) -> ModuleType | torch._ops._OpNamespace:
    """Where the op functions are taken from: the dispatcher, or the reference module when that is forced."""
    selected = None if backend is None else select_backend(backend, device)
    if selected == "reference":
        return reference
    # CUDA tensors come to Triton through the dispatcher, where derivatives are; interpreted it is for tests alone.
    return triton_backend if selected == "triton" and device.type == "cpu" else torch.ops.loftq_kernels


def quantize_tensors(
    weight: Tensor,
    codebook: Tensor,
    group_size: int,
    scale_rule: str,
    scale_dtype: torch.dtype,
    scale_search: bool,
    *,
    backend: str | None = None,
    name: str = "weight",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """weight [N, K] -> codes, scale, offset (None unless affine). The algorithm is stated in `reference.quantize`.

    Raises ValueError for NaN or Inf in weight (naming the row), a meta tensor, or scales that do not fit scale_dtype.
    """
    checks.check_quantize(weight, codebook, group_size, scale_rule, scale_dtype, scale_search)
    if weight.is_meta:
        raise ValueError(f"{name} {tuple(weight.shape)} is on the meta device: it has no values")
    if backend == "triton":
        raise ValueError("backend='triton' has kernels for products and dequantize; quantize has none there")
    weight = kernel_dtype(weight.detach(), name)
    with torch.inference_mode(False):  # what is made under inference mode could not be saved for a backward
        codes, scale, offset = _kernels(backend, weight.device).quantize(
            weight, codebook, group_size, scale_rule, scale_dtype, scale_search
        )
    affine = offset if scale_rule == "minmax" else None
    check_scales(weight, scale, affine, group_size, name)
    return codes, scale, affine


def kernel_dtype(weight: Tensor, name: str = "weight") -> Tensor:
    """weight, in float32 where it is of a type (float64) that the quantize kernels do not read."""
    if weight.dtype in checks.SCALE_DTYPES:
        return weight
    narrow = weight.float()
    largest = check_finite(weight, name)
    if largest > 0 and not torch.finfo(torch.float32).tiny <= largest <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name} has magnitude {largest:.4g}, beyond the range of float32, which formats are read in")
    return narrow


def check_finite(weight: Tensor, name: str = "weight", *, first_row: int = 0) -> float:
    """max|weight|; raises ValueError with the place of the first NaN or Inf in weight [N, K], where there is one."""
    if weight.numel() == 0:
        return 0.0
    low, high = (extreme.item() for extreme in weight.aminmax())  # allocates nothing of the weight's size
    if math.isfinite(low) and math.isfinite(high):
        return max(-low, high)
    row, column = (~torch.isfinite(weight)).nonzero()[0].tolist()
    raise ValueError(f"{name} holds {weight[row, column].item()} in row {first_row + row}, column {column}")


def check_scales(weight: Tensor, scale: Tensor, offset: Tensor | None, group_size: int, name: str = "weight") -> None:
    """Raise for what only the values tell: NaN or Inf in weight, or scales beyond the range of their dtype.

    Looks at the small scale tensor first; the weight is read again only to explain a failure or a zero scale.
    """
    check_finite_scales(weight, scale, offset, name)
    _check_zero_scales(weight, scale, offset, group_size, name)


def check_finite_scales(weight: Tensor, scale: Tensor, offset: Tensor | None, name: str = "weight") -> None:
    """Raise where a scale or offset of weight, or of weight less a low-rank term, is not finite."""
    finite = torch.isfinite(scale)
    if offset is not None:
        finite = finite & torch.isfinite(offset)
    if not finite.all():
        row, group = (~finite).nonzero()[0].tolist()
        check_finite(weight[row : row + 1], name, first_row=row)
        raise ValueError(_range_message(name, row, group, weight[row].abs().max().item(), scale.dtype))


def _check_zero_scales(weight: Tensor, scale: Tensor, offset: Tensor | None, group_size: int, name: str) -> None:
    """A zero scale is right for a constant group, which its offset holds rounded. It may also drop noise below the
    matrix's own float32 resolution (a row of zeros less a low-rank term), but never weights that matter."""
    rows = (scale == 0).any(1).nonzero().flatten()
    if rows.numel() == 0:
        return
    width = weight.shape[1] if group_size == -1 else group_size

    def per_column(groups: Tensor) -> Tensor:
        return groups[rows].repeat_interleave(width, dim=1)[:, : weight.shape[1]]

    deviation = weight[rows].float()
    if offset is not None:
        deviation = deviation - per_column(offset).float()
    negligible = weight.abs().max().float() * torch.finfo(torch.float32).eps
    lost = (deviation.abs() > (weight[rows].float().abs() / 2).clamp(min=negligible)) & per_column(scale == 0)
    if lost.any():
        row, column = lost.nonzero()[0].tolist()
        magnitude = deviation[row, column].abs().item()
        raise ValueError(_range_message(name, int(rows[row]), column // width, magnitude, scale.dtype))


def _range_message(name: str, row: int, group: int, magnitude: float, dtype: torch.dtype) -> str:
    advice = "rescale the weight" if dtype == torch.float32 else "use scale_dtype=torch.float32"
    return (
        f"{name} row {row}, group {group}: magnitude {magnitude:.4g} gives a scale that does not fit {dtype}; {advice}"
    )


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
    those of index adapter_ids[m], or none where that is -1. Adapters of lower rank are padded with zeros. On a GPU, and
    with more than 16 rows, Inf or NaN in an adapter may also reach rows of others that are multiplied beside its own.

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
    CPU, for ids out of range; on a GPU, which would have to be waited for, the rows with such ids become NaN,
    also where S or r is 0.
    """
    if adapter_ids is not None:
        return _linear_multi(x, packed, lora_A, lora_B, adapter_ids, scaling, bias, backend)
    return linear_tensors(
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
    if not torch.compiler.is_compiling():  # in a traced graph the op itself raises
        autograd.refuse_multi(autograd.differentiated({"x": x, "lora_A": lora_A, "lora_B": lora_B, "bias": bias}))
    if adapter_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        checks.check_adapter_ids(adapter_ids, lora_A.shape[0])
    kernels = _kernels(backend, x.device)
    if packed.scale.dtype == torch.float64:  # as `_wide_linear`
        kernels = reference if x.dtype == torch.float64 else kernels
        scale, offset = (_narrow(t, x.dtype) for t in (packed.scale, packed.offset))
        weight = packed.codes, scale, offset, packed.codebook, packed.group_size
    return kernels.qlora_linear_multi(autocast(x), *weight, lora_A, lora_B, adapter_ids, float(scaling), bias)


def linear_tensors(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    group_size: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    bias: Tensor | None,
    *,
    in_features: int,
    backend: str | None = None,
) -> Tensor:
    """`qlora_linear` on the stored tensors. A decode step calls it hundreds of times: the kernels check what keeps them
    from wild memory, and only when they refuse do the checks of this package look for the reason."""
    args = codes, scale, offset, codebook, group_size, lora_A, lora_B
    if scale.dtype == torch.float64:
        return _wide_linear(x, *args, scaling, bias, in_features=in_features, backend=backend)
    if backend is None and not torch.compiler.is_compiling() and _by_hand(x, codes, lora_A, lora_B, bias):
        if x.shape[-1:] != (in_features,):
            checks.check_qlora_linear(x, *args[:4], in_features, *args[4:], bias)
        return triton_backend.qlora_linear(autocast(x), *args, float(scaling), bias)
    checks.check_floating("x", x)
    if backend is not None or torch.compiler.is_compiling() or x.shape[-1:] != (in_features,):
        checks.check_qlora_linear(x, *args[:4], in_features, *args[4:], bias)
        return _kernels(backend, x.device).qlora_linear(autocast(x), *args, float(scaling), bias)
    try:
        return torch.ops.loftq_kernels.qlora_linear(autocast(x), *args, float(scaling), bias)
    except Exception:
        checks.check_qlora_linear(x, *args[:4], in_features, *args[4:], bias)
        raise


def _wide_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    group_size: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    bias: Tensor | None,
    *,
    in_features: int,
    backend: str | None,
) -> Tensor:
    """Float64 scales and offsets, which the kernels do not read: plain torch for float64 x, rounded for any other."""
    adapter = lora_A, lora_B, scaling, bias
    checks.check_qlora_linear(x, codes, scale, offset, codebook, in_features, group_size, lora_A, lora_B, bias)
    if x.dtype == torch.float64:
        return reference.qlora_linear(x, codes, scale, offset, codebook, group_size, *adapter)
    scale, offset = _narrow(scale, x.dtype), _narrow(offset, x.dtype)
    return linear_tensors(
        x, codes, scale, offset, codebook, group_size, *adapter, in_features=in_features, backend=backend
    )


def _narrow(stored: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Float64 scales or offsets as x of dtype is multiplied by them."""
    return stored if stored is None or dtype == torch.float64 else stored.float()


def _by_hand(x: Tensor, codes: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the dispatcher would do nothing but call the Triton backend, in tens of microseconds: CUDA tensors of no
    subclass, no gradient or tangent wanted, no mode (fake tensors, tracing, functorch) that wants to see the op."""
    if type(x) is not Tensor or not x.is_cuda or type(codes) is not Tensor:
        return False
    if not _PLAIN_TYPES.issuperset((type(lora_A), type(lora_B), type(bias))):
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, lora_A, lora_B, bias)):
        return False
    return (
        "qlora_linear" in triton_backend.registered
        and not autograd.forward_mode()  # which is true under any dispatch mode
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()
    )


def autocast(x: Tensor) -> Tensor:
    if x.is_meta or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def dequantize_tensors(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
    *,
    backend: str | None = None,
) -> Tensor:
    """``codebook[codes] * scale + offset`` [N, K], computed in float32 (float64 for float64), rounded once to dtype."""
    checks.check_packed(codes, scale, offset, codebook, in_features, group_size)
    if not dtype.is_floating_point:
        raise TypeError(f"dequantize to dtype={dtype}: a floating-point dtype is needed")
    if scale.dtype == torch.float64:  # which the kernels do not read
        wide = reference.dequantize(codes, scale, offset, codebook, in_features, group_size, torch.float64)
        return wide.to(dtype)
    return _kernels(backend, codes.device).dequantize(codes, scale, offset, codebook, in_features, group_size, dtype)
