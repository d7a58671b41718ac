"""The ops on CUDA tensors by Triton kernels. Triton is imported at the first call, never with the package.

With TRITON_INTERPRET=1 the same functions take CPU tensors, for tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loftq_kernels.ops import checks, extension, reference
from loftq_kernels.ops.schemas import NAMESPACE
from loftq_kernels.ops.triton_routes import (
    DTYPES,
    check_scale_dtype,
    contiguous,
    decode_arguments,
    launchers,
    on,
    route_of,
    unavailable,
)
from loftq_kernels.triton_kernels import device as devices
from loftq_kernels.triton_kernels.codebooks import codebook_values

if TYPE_CHECKING:
    from loftq_kernels.triton_kernels.decode_launch import Plan


def _rows(x: Tensor) -> Tensor:
    """[..., K] as a matrix whose rows are contiguous and, where K is a multiple of 16, start at multiples of 16 bytes.

    For other addresses Triton compiles another kernel, which reads single elements: it is slower than a copy, and short
    of registers.
    """
    x = x.reshape(-1, x.shape[-1])
    aligned = x.is_contiguous() or (x.stride(-1) == 1 and x.stride(0) * x.element_size() % 16 == 0)
    return x if aligned and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """As `reference.dequantize`, bit for bit."""
    checks.check_packed(codes, scale, offset, codebook, in_features, group_size)
    check_scale_dtype(scale)
    if dtype not in DTYPES or unavailable(codes.device):
        _warn_unavailable(codes.device)
        return reference.dequantize(codes, scale, offset, codebook, in_features, group_size, dtype)
    weight = map(contiguous, (codes, scale, offset, codebook))
    out = codes.new_empty(codes.shape[0], in_features, dtype=dtype)
    with on(codes.device):
        return launchers().dequantize.launch_dequantize(*weight, group_size, out)


def qlora_linear(
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
    path: str | None = None,
) -> Tensor:
    """As `reference.qlora_linear`. path: "decode", "prefill" or "chunked" instead of what `paths` chooses."""
    weight = codes, scale, offset, codebook, group_size
    route = route_of(x, *weight, lora_A, lora_B, None, bias, path)
    if route == "reference":
        _warn_unavailable(x.device)
        return reference.qlora_linear(x, *weight, lora_A, lora_B, scaling, bias, dequantize=_dequantize)
    leaves = x, lora_A, lora_B, bias
    if x.device.type == "cpu" and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves):
        raise RuntimeError("backend='triton' on CPU tensors is for tests and has no derivatives: use torch.no_grad()")
    if not isinstance(route, str):
        return _decode(route, x, weight, lora_A, lora_B, None, scaling, bias)
    if lora_A is not None:
        lora_A, lora_B = lora_A.unsqueeze(0), lora_B.unsqueeze(0)
    return _linear(x, weight, lora_A, lora_B, None, scaling, bias, route)


def qlora_linear_multi(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    group_size: int,
    lora_A: Tensor,
    lora_B: Tensor,
    adapter_ids: Tensor,
    scaling: float,
    bias: Tensor | None,
    *,
    path: str | None = None,
) -> Tensor:
    """As `reference.qlora_linear_multi`. A row whose id is below -1, or not below the number of adapters, becomes NaN,
    also where there are no adapters or all have rank 0."""
    weight = codes, scale, offset, codebook, group_size
    route = route_of(x, *weight, lora_A, lora_B, adapter_ids, bias, path)
    if route == "reference":
        _warn_unavailable(x.device)
        return reference.qlora_linear_multi(
            x, *weight, lora_A, lora_B, adapter_ids, scaling, bias, dequantize=_dequantize
        )
    if 0 in lora_A.shape[:2]:  # The kernels are launched without adapters, and so without ids.
        y = qlora_linear(x, *weight, None, None, scaling, bias, path=path)
        wrong = (adapter_ids < -1) | (adapter_ids >= lora_A.shape[0])
        return y.masked_fill_(wrong.unsqueeze(-1), float("nan"))
    adapter_ids = adapter_ids.reshape(-1).contiguous()
    if not isinstance(route, str):
        return _decode(route, x, weight, lora_A, lora_B, adapter_ids, scaling, bias)
    return _linear(x, weight, lora_A, lora_B, adapter_ids, scaling, bias, route)


def _decode(
    plan: Plan,
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor | None, Tensor, int],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    adapter_ids: Tensor | None,
    scaling: float,
    bias: Tensor | None,
) -> Tensor:
    arguments = decode_arguments(x, weight, lora_A, lora_B, adapter_ids, scaling, bias)
    device = x.device  # As `on`, without a context where none is needed: this is called hundreds of times per token.
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return plan.launch(*arguments)
    with torch.cuda.device(device):
        return plan.launch(*arguments)


def _linear(
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor | None, Tensor, int],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    adapter_ids: Tensor | None,
    scaling: float,
    bias: Tensor | None,
    path: str,
) -> Tensor:
    """qlora_linear by large tiles, with adapters [S, r, K] and [S, N, r]; adapter_ids [M]: which of them a row has."""
    out_features = weight[0].shape[0]
    if path == "empty":
        y = x.new_zeros(*x.shape[:-1], out_features)
        return y if bias is None else y + bias.to(y.dtype)
    if lora_A is not None and lora_A.shape[1] == 0:
        lora_A = lora_B = None
    launch, device = launchers(), devices.device_of(x.device)
    rows, weight, bias = _rows(x), (*map(contiguous, weight[:4]), weight[4]), contiguous(bias)
    with on(x.device):
        y = x.new_empty(rows.shape[0], out_features)
        h = None
        if lora_A is not None:
            h = launch.lora.launch_lora_down(rows, lora_A, adapter_ids, scaling, device.multiprocessors)
        if path == "prefill" and x.dtype != torch.float32:
            _prefill(rows, weight, h, lora_B, adapter_ids, bias, y)
        else:
            launch.chunked.chunked_linear(rows, *weight, bias, y, device.chunk_bytes)
            if h is not None:
                launch.lora.launch_lora_up(y, h, lora_B, adapter_ids)
    return y.view(*x.shape[:-1], out_features)


def _prefill(rows: Tensor, weight: tuple, h, lora_B, adapter_ids, bias, y: Tensor) -> None:
    """Write the product of rows [M, K] of 16 bits, the low-rank term of h and the bias to y [M, N], in one kernel."""
    launch, device = launchers(), devices.device_of(rows.device)
    decoder = launch.tiles.tile_decoder(codebook_values(weight[3]), rows.dtype, device.ptx, along=True)
    arguments = *weight, decoder, h, lora_B, adapter_ids, bias, y
    shape = decoder.decoder.bits, rows.shape[0], y.shape[1], rows.shape[1]

    def run(tile) -> None:
        splits = launch.configs.splits(tile, *shape, device.multiprocessors)
        launch.prefill.launch_prefill_linear(rows, *arguments, tile, splits)

    run(_tile("prefill", rows.device, shape, weight[4], run))


def _tile(kernel: str, device: torch.device, shape: tuple[int, int, int, int], group_size: int, run):
    """The configuration for a launch of shape (bits, rows, columns, what is summed over). run launches with a given
    configuration, for a search to time."""
    configs, autotune, about = launchers().configs, launchers().autotune, devices.device_of(device)
    tuned = None
    if autotune.enabled(device):
        tuned = autotune.tuned(configs.key_of(kernel, about, *shape[:3]), group_size, device, run)
    return tuned or configs.choose(kernel, about, *shape)


def qlora_linear_grad_input(
    grad_y: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    in_features: int,
    group_size: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    *,
    path: str | None = None,
) -> Tensor:
    """As `reference.qlora_linear_grad_input`. path: "fused" or "chunked" instead of what `paths` chooses."""
    checks.check_grad_input(grad_y, codes, scale, offset, codebook, in_features, group_size, lora_A, lora_B)
    check_scale_dtype(scale)
    if grad_y.dtype not in DTYPES or unavailable(grad_y.device):
        _warn_unavailable(grad_y.device)
        return reference.qlora_linear_grad_input(
            *(grad_y, codes, scale, offset, codebook, in_features, group_size, lora_A, lora_B, scaling),
            dequantize=_dequantize,
        )
    if grad_y.numel() == 0 or in_features == 0:
        return grad_y.new_zeros(*grad_y.shape[:-1], in_features)
    launch, device = launchers(), devices.device_of(grad_y.device)
    rows, weight = _rows(grad_y), (*map(contiguous, (codes, scale, offset, codebook)), group_size)
    half = grad_y.dtype != torch.float32
    if path is None:
        bits = codebook.numel().bit_length() - 1
        path = launch.paths.choose_grad_input(rows.shape[0], in_features, rows.shape[1], bits, device, half=half)
    with on(grad_y.device):
        grad_x = grad_y.new_empty(rows.shape[0], in_features)
        h = None
        if lora_A is not None and lora_A.shape[0] > 0:
            h = launch.lora.launch_lora_down(rows, lora_B.T.unsqueeze(0), None, scaling, device.multiprocessors)
        if path == "fused" and half:
            _fused_grad_input(rows, weight, h, lora_A, grad_x)
        else:
            launch.chunked.chunked_grad_input(rows, *weight, grad_x, device.chunk_bytes)
            if h is not None:
                launch.lora.launch_lora_up(grad_x, h, lora_A.T.unsqueeze(0), None)
    return grad_x.view(*grad_y.shape[:-1], in_features)


def _fused_grad_input(rows: Tensor, weight: tuple, h, lora_A, grad_x: Tensor) -> None:
    """Write the gradient of the input for rows [M, N] of 16 bits, with the low-rank term of h, to grad_x [M, K]."""
    launch, device = launchers(), devices.device_of(rows.device)
    decoder = launch.tiles.tile_decoder(codebook_values(weight[3]), rows.dtype, device.ptx, along=False)
    arguments = *weight, decoder, h, None if h is None else lora_A, grad_x
    shape = decoder.decoder.bits, rows.shape[0], grad_x.shape[1], rows.shape[1]

    def run(tile) -> None:
        launch.grad_input.launch_grad_input(rows, *arguments, tile)

    run(_tile("grad_input", rows.device, shape, weight[4], run))


def _dequantize(*args) -> Tensor:
    return torch.ops.loftq_kernels.dequantize(*args)


def _warn_unavailable(device: torch.device) -> None:
    reason = unavailable(device)
    if reason is not None:
        extension.warn_slow(device.type, reason)


registered: set[str] = set()  # Ops whose CUDA kernels are these functions.


def _register() -> None:
    """Register the CUDA kernels of the ops, dequantize only where the extension was built without its own."""
    for kernel in (qlora_linear, qlora_linear_multi, qlora_linear_grad_input, dequantize):
        name = f"{NAMESPACE}::{kernel.__name__}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
            torch.library.impl(name, "CUDA", kernel)
            registered.add(kernel.__name__)


_register()
