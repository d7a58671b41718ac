"""The ops on CUDA tensors by Triton kernels. Triton is imported at the first call, never with the package.

With TRITON_INTERPRET=1 the same functions take CPU tensors, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loftq_kernels.ops import checks, extension, reference
from loftq_kernels.ops.schemas import NAMESPACE
from loftq_kernels.triton_kernels import device as devices
from loftq_kernels.triton_kernels.codebooks import codebook_values, known_values

if TYPE_CHECKING:
    from loftq_kernels.triton_kernels.decode_launch import Plan

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_ROUTES = 4096  # More are not remembered: all are forgotten, and found again when they are needed.


def unavailable(device: torch.device) -> str | None:
    """Why Triton cannot serve tensors of device, or None where it can."""
    if not _is_installed():
        return "triton is not installed"
    if device.type == "cpu":
        interprets = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interprets else "CPU tensors need TRITON_INTERPRET=1, which is for tests"
    if device.type != "cuda":
        return f"{device} is not a CUDA device"
    if torch.version.hip:
        return "the kernels hold PTX, which AMD's GPUs do not run"
    capability = devices.device_of(device).capability
    if capability < devices.OLDEST:
        return f"{device} has compute capability {capability / 10}, the kernels need {devices.OLDEST / 10}"
    return None


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _launchers() -> SimpleNamespace:
    """The modules that import Triton, or are needed only beside those that do."""
    from loftq_kernels.triton_kernels import (
        autotune,
        chunked,
        configs,
        decode_launch,
        dequantize,
        grad_input,
        lora,
        paths,
        prefill_linear,
        tiles,
    )

    return SimpleNamespace(
        autotune=autotune,
        chunked=chunked,
        configs=configs,
        decode=decode_launch,
        dequantize=dequantize,
        grad_input=grad_input,
        lora=lora,
        paths=paths,
        prefill=prefill_linear,
        tiles=tiles,
    )


def _rows(x: Tensor) -> Tensor:
    """[..., K] as a matrix whose rows are contiguous and, where K is a multiple of 16, start at multiples of 16 bytes.

    For other addresses Triton compiles another kernel, which reads single elements: it is slower than a copy, and short
    of registers.
    """
    x = x.reshape(-1, x.shape[-1])
    aligned = x.is_contiguous() or (x.stride(-1) == 1 and x.stride(0) * x.element_size() % 16 == 0)
    return x if aligned and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _check_scale_dtype(scale: Tensor) -> None:
    """Reject float64 scales, which the wrappers round: the kernels would misread their bytes as 16-bit ones."""
    if scale.dtype not in checks.SCALE_DTYPES:
        raise ValueError(f"scale has dtype {scale.dtype}; the kernels take {checks.SCALE_DTYPES}")


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
    _check_scale_dtype(scale)
    if dtype not in DTYPES or unavailable(codes.device):
        _warn_unavailable(codes.device)
        return reference.dequantize(codes, scale, offset, codebook, in_features, group_size, dtype)
    weight = [None if t is None else t.contiguous() for t in (codes, scale, offset, codebook)]
    out = codes.new_empty(codes.shape[0], in_features, dtype=dtype)
    with _on(codes.device):
        return _launchers().dequantize.launch_dequantize(*weight, group_size, out)


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
    route = _route(x, *weight, lora_A, lora_B, None, bias, path)
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
    route = _route(x, *weight, lora_A, lora_B, adapter_ids, bias, path)
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


_routes: dict[tuple, Plan | str] = {}


def _route(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    group_size: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    adapter_ids: Tensor | None,
    bias: Tensor | None,
    path: str | None,
) -> Plan | str:
    """The plan of a decode launch, or "prefill", "chunked", "empty" or "reference".

    A decode step asks hundreds of times, so routes are remembered by all that checks, choice and plan look at. What
    has not been seen before is checked. Key: dtypes, shapes, devices, the alignment of scales and the code book's
    values, which `codebook_values` remembers by the code book's tensor.
    """
    try:
        key = (
            *(x.dtype, x.shape, x.device, codes.dtype, codes.shape, codes.device, group_size, path),
            *(scale.dtype, scale.shape, scale.device, codebook.dtype, codebook.shape, codebook.device),
            None if offset is None else (offset.dtype, offset.shape, offset.device, offset.data_ptr() % 8),
            None if lora_A is None else (lora_A.dtype, lora_A.shape, lora_A.device),
            None if lora_B is None else (lora_B.dtype, lora_B.shape, lora_B.device),
            None if adapter_ids is None else (adapter_ids.dtype, adapter_ids.shape, adapter_ids.device),
            None if bias is None else (bias.dtype, bias.shape, bias.device),
            scale.data_ptr() % 8,
            known_values(codebook),
        )
        known = _routes.get(key)
    except (AttributeError, TypeError):  # Something is no tensor: the checks say what.
        key = known = None
    if known is not None:
        return known
    weight = codes, scale, offset, codebook, group_size
    _check(x, weight, lora_A, lora_B, adapter_ids, bias)
    route = _choose(x, weight, path)
    if route == "decode":
        route = _plan(x, weight, lora_A, lora_B, adapter_ids, bias)
        key = None if key is None else (*key[:-1], codebook_values(codebook))
    if key is not None:
        if len(_routes) >= MOST_ROUTES:
            _routes.clear()
        _routes[key] = route
    return route


def _check(x, weight, lora_A, lora_B, adapter_ids, bias) -> None:
    """The checks of the op, which look at nothing but dtypes, shapes and devices."""
    *stored, group_size = weight
    if adapter_ids is None:
        checks.check_floating("x", x)
        checks.check_qlora_linear(x, *stored, x.shape[-1] if x.dim() else 0, group_size, lora_A, lora_B, bias)
    else:
        checks.check_qlora_linear_multi(x, *stored, group_size, lora_A, lora_B, adapter_ids, bias)
    _check_scale_dtype(weight[1])


def _choose(x: Tensor, weight: tuple, path: str | None) -> str:
    """ "decode", "prefill", "chunked", "empty" or "reference", for arguments that have been checked."""
    if x.dtype not in DTYPES or unavailable(x.device):
        return "reference"
    rows, out_features = x.numel() // x.shape[-1] if x.shape[-1] else 0, weight[0].shape[0]
    if rows == 0 or out_features == 0:
        return "empty"
    if path is None:
        bits, device = weight[3].numel().bit_length() - 1, devices.device_of(x.device)
        half = x.dtype != torch.float32
        return _launchers().paths.choose_linear(rows, out_features, x.shape[-1], bits, device, half=half)
    if path not in ("decode", "prefill", "chunked"):
        raise ValueError(f"path={path!r} is none of decode, prefill and chunked")
    return path


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _readable(adapter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A contiguous adapter that the kernel converts to dtype as it loads; float64, which it does not, in dtype."""
    return _contiguous(adapter.to(dtype) if adapter is not None and adapter.dtype not in DTYPES else adapter)


def _decode_arguments(x, weight, lora_A, lora_B, adapter_ids, scaling, bias) -> tuple:
    """What `decode_launch` takes: everything contiguous, x at a multiple of 16 bytes."""
    codes, scale, offset, codebook, _ = weight
    return (
        x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format),
        _contiguous(codes),
        _contiguous(scale),
        _contiguous(offset),
        _contiguous(codebook),
        _readable(lora_A, x.dtype),
        _readable(lora_B, x.dtype),
        adapter_ids,
        scaling,
        _contiguous(bias),
    )


def _plan(x, weight, lora_A, lora_B, adapter_ids, bias) -> Plan:
    """The plan of a launch, which where autotuning is on is made by launches. Scaling does not matter to it."""
    ids = None if adapter_ids is None else adapter_ids.reshape(-1).contiguous()
    arguments = _decode_arguments(x, weight, lora_A, lora_B, ids, 1.0, bias)
    with _on(x.device):
        return _launchers().decode.plan_for(*arguments[:5], weight[4], *arguments[5:])


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
    arguments = _decode_arguments(x, weight, lora_A, lora_B, adapter_ids, scaling, bias)
    device = x.device
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
    launch, device, out_features = _launchers(), devices.device_of(x.device), weight[0].shape[0]
    if lora_A is not None and lora_A.shape[1] == 0:
        lora_A = lora_B = None
    if path == "empty":
        y = x.new_zeros(*x.shape[:-1], out_features)
        return y if bias is None else y + bias.to(y.dtype)
    rows = _rows(x)
    weight = tuple(_contiguous(t) if isinstance(t, Tensor) else t for t in weight)
    bias = _contiguous(bias)
    half = x.dtype != torch.float32
    with _on(x.device):
        y = x.new_empty(rows.shape[0], out_features)
        h = None
        if lora_A is not None:
            h = launch.lora.launch_lora_down(rows, lora_A, adapter_ids, scaling, device.multiprocessors)
        if path == "prefill" and half:
            decoder = launch.tiles.tile_decoder(codebook_values(weight[3]), x.dtype, device.ptx, along=True)
            arguments = *weight, decoder, h, lora_B, adapter_ids, bias, y
            shape = decoder.decoder.bits, rows.shape[0], out_features, rows.shape[1]

            def run(tile) -> None:
                splits = launch.configs.splits(tile, *shape, device.multiprocessors)
                launch.prefill.launch_prefill_linear(rows, *arguments, tile, splits)

            run(_tile("prefill", x.device, shape, weight[4], run))
        else:
            launch.chunked.chunked_linear(rows, *weight, bias, y, device.chunk_bytes)
            if h is not None:
                launch.lora.launch_lora_up(y, h, lora_B, adapter_ids)
    return y.view(*x.shape[:-1], out_features)


def _tile(kernel: str, device: torch.device, shape: tuple[int, int, int, int], group_size: int, run):
    """The configuration for a launch of shape (bits, rows, columns, what is summed over). run launches with a given
    configuration, for a search to time."""
    configs, autotune, about = _launchers().configs, _launchers().autotune, devices.device_of(device)
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
    _check_scale_dtype(scale)
    if grad_y.dtype not in DTYPES or unavailable(grad_y.device):
        _warn_unavailable(grad_y.device)
        return reference.qlora_linear_grad_input(
            *(grad_y, codes, scale, offset, codebook, in_features, group_size, lora_A, lora_B, scaling),
            dequantize=_dequantize,
        )
    launch, device = _launchers(), devices.device_of(grad_y.device)
    if grad_y.numel() == 0 or in_features == 0:
        return grad_y.new_zeros(*grad_y.shape[:-1], in_features)
    rows = _rows(grad_y)
    grad_x = grad_y.new_empty(rows.shape[0], in_features)
    codes, scale, offset, codebook = (None if t is None else t.contiguous() for t in (codes, scale, offset, codebook))
    weight = codes, scale, offset, codebook, group_size
    shape = rows.shape[0], in_features, rows.shape[1], codebook.numel().bit_length() - 1
    half = grad_y.dtype != torch.float32
    if path is None:
        path = launch.paths.choose_grad_input(*shape, device, half=half)
    with _on(grad_y.device):
        h = None
        if lora_A is not None and lora_A.shape[0] > 0:
            h = launch.lora.launch_lora_down(rows, lora_B.T.unsqueeze(0), None, scaling, device.multiprocessors)
        if path == "fused" and half:
            decoder = launch.tiles.tile_decoder(codebook_values(codebook), grad_y.dtype, device.ptx, along=False)
            arguments = *weight, decoder, h, None if h is None else lora_A, grad_x
            shape = decoder.decoder.bits, rows.shape[0], in_features, rows.shape[1]

            def run(tile) -> None:
                launch.grad_input.launch_grad_input(rows, *arguments, tile)

            run(_tile("grad_input", grad_y.device, shape, group_size, run))
        else:
            launch.chunked.chunked_grad_input(rows, *weight, grad_x, device.chunk_bytes)
            if h is not None:
                launch.lora.launch_lora_up(grad_x, h, lora_A.T.unsqueeze(0), None)
    return grad_x.view(*grad_y.shape[:-1], in_features)


def _dequantize(*args) -> Tensor:
    return torch.ops.loftq_kernels.dequantize(*args)


def _on(device: torch.device):
    """A context in which `device` is the current one: Triton launches there, whatever device its arguments are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


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
