"""Where the Triton backend takes a call: whether Triton can serve it, by which kernels, and by which decode plan.

Triton is imported at the first call that needs it, never with the package.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType
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
def products() -> ModuleType:
    """The module that launches the kernels, and with it imports Triton."""
    return importlib.import_module("loftq_kernels.triton_kernels.products")


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
        route = products().decode_plan(x, weight, lora_A, lora_B, adapter_ids, bias)
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
    chosen = products().choose_linear(x, weight)
    if path is None or chosen == "empty":
        return chosen
    if path not in ("decode", "prefill", "chunked"):
        raise ValueError(f"path={path!r} is none of decode, prefill and chunked")
    return path
