"""Where the Triton backend takes a call: whether Triton can serve it, by which kernels, and by which decode plan.

Triton is imported at the first call that needs it, never with the package.
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

from loftq_kernels.ops import checks
from loftq_kernels.triton_kernels import device as devices
from loftq_kernels.triton_kernels.codebooks import codebook_values, known_values

if TYPE_CHECKING:
    from loftq_kernels.triton_kernels.decode_launch import Plan

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_ROUTES = 4096  # At this number all are forgotten, and found again when they are needed.


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
def launchers() -> SimpleNamespace:
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


def on(device: torch.device):
    """A context in which `device` is the current one: Triton launches there, whatever device its arguments are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


_routes: dict[tuple, Plan | str] = {}


def route_of(
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
        _remember(key, route)
    return route


def _remember(key: tuple, route: Plan | str) -> None:
    if len(_routes) >= MOST_ROUTES:
        _routes.clear()
    _routes[key] = route


def check_scale_dtype(scale: Tensor) -> None:
    """Reject float64 scales, which the wrappers round: the kernels would misread their bytes as 16-bit ones."""
    if scale.dtype not in checks.SCALE_DTYPES:
        raise ValueError(f"scale has dtype {scale.dtype}; the kernels take {checks.SCALE_DTYPES}")


def _check(x, weight, lora_A, lora_B, adapter_ids, bias) -> None:
    """The checks of the op, which look at nothing but dtypes, shapes and devices."""
    *stored, group_size = weight
    if adapter_ids is None:
        checks.check_floating("x", x)
        checks.check_qlora_linear(x, *stored, x.shape[-1] if x.dim() else 0, group_size, lora_A, lora_B, bias)
    else:
        checks.check_qlora_linear_multi(x, *stored, group_size, lora_A, lora_B, adapter_ids, bias)
    check_scale_dtype(weight[1])


def _choose(x: Tensor, weight: tuple, path: str | None) -> str:
    """One of "decode", "prefill", "chunked", "empty" and "reference", for arguments that have been checked."""
    if x.dtype not in DTYPES or unavailable(x.device):
        return "reference"
    rows, out_features = x.numel() // x.shape[-1] if x.shape[-1] else 0, weight[0].shape[0]
    if rows == 0 or out_features == 0:
        return "empty"
    if path is None:
        bits, device = weight[3].numel().bit_length() - 1, devices.device_of(x.device)
        half = x.dtype != torch.float32
        return launchers().paths.choose_linear(rows, out_features, x.shape[-1], bits, device, half=half)
    if path not in ("decode", "prefill", "chunked"):
        raise ValueError(f"path={path!r} is none of decode, prefill and chunked")
    return path


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _readable(adapter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A contiguous adapter in a dtype that the kernel loads and converts by itself; a float64 one becomes dtype."""
    return contiguous(adapter.to(dtype) if adapter is not None and adapter.dtype not in DTYPES else adapter)


def decode_arguments(x, weight, lora_A, lora_B, adapter_ids, scaling, bias) -> tuple:
    """What `decode_launch` takes: everything contiguous, x at a multiple of 16 bytes."""
    codes, scale, offset, codebook, _ = weight
    return (
        x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format),
        contiguous(codes),
        contiguous(scale),
        contiguous(offset),
        contiguous(codebook),
        _readable(lora_A, x.dtype),
        _readable(lora_B, x.dtype),
        adapter_ids,
        scaling,
        contiguous(bias),
    )


def _plan(x, weight, lora_A, lora_B, adapter_ids, bias) -> Plan:
    """The plan of a decode launch. Where autotuning is on, making it launches kernels; no plan depends on scaling."""
    ids = None if adapter_ids is None else adapter_ids.reshape(-1).contiguous()
    arguments = decode_arguments(x, weight, lora_A, lora_B, ids, 1.0, bias)
    with on(x.device):
        return launchers().decode.plan_for(*arguments[:5], weight[4], *arguments[5:])
