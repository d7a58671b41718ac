"""The ops on CUDA tensors by way of Triton. Triton is imported at the first call, never with the package.

With TRITON_INTERPRET=1 the same functions take CPU tensors, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from types import SimpleNamespace

import torch
from torch import Tensor

from loftq_kernels.ops import checks, extension, reference
from loftq_kernels.ops.schemas import NAMESPACE

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST_ARCHITECTURE = 80  # the kernels need bfloat16 tensor cores and asynchronous copies


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
    architecture = _device(device).architecture
    if architecture < OLDEST_ARCHITECTURE:
        return f"{device} has compute capability {architecture / 10}, the kernels need 8.0"
    return None


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _device(device: torch.device) -> SimpleNamespace:
    """architecture (90 for compute capability 9.0), multiprocessors, and whether PTX may be used."""
    if device.type == "cpu":  # interpreted: as an H200, without PTX
        return SimpleNamespace(architecture=90, multiprocessors=132, asm=False)
    properties = torch.cuda.get_device_properties(device)
    return SimpleNamespace(
        architecture=10 * properties.major + properties.minor,
        multiprocessors=properties.multi_processor_count,
        asm=True,
    )


@functools.cache
def _launchers() -> SimpleNamespace:
    from loftq_kernels.triton_kernels import (
        autotune,
        chunked,
        codebooks,
        configs,
        decode_linear,
        dequantize,
        grad_input,
        lora,
        paths,
        prefill_linear,
        tiles,
    )

    return SimpleNamespace(
        **{name: getattr(module, name) for module, name in (
            (chunked, "chunked_linear"),
            (chunked, "chunked_grad_input"),
            (codebooks, "codebook_values"),
            (decode_linear, "decode_linear"),
            (dequantize, "launch_dequantize"),
            (grad_input, "launch_grad_input"),
            (lora, "launch_lora_shrink"),
            (lora, "launch_lora_expand"),
            (prefill_linear, "launch_prefill_linear"),
            (tiles, "decode_constexprs"),
        )},
        autotune=autotune,
        configs=configs,
        paths=paths,
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """[..., K] as a matrix whose rows are contiguous and, where K is a multiple of 16, at addresses that 16 bytes may
    be read from: a kernel that reads single elements is another one, slower than a copy and short of registers."""
    x = x.reshape(-1, x.shape[-1])
    aligned = x.is_contiguous() or (x.stride(-1) == 1 and x.stride(0) * x.element_size() % 16 == 0)
    return x if aligned and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _check_scale_dtype(scale: Tensor) -> None:
    """Float64 scales, which the wrappers round: the kernels would take their bytes for those of 16-bit ones."""
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
        return _launchers().launch_dequantize(*weight, group_size, out)


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
    """As `reference.qlora_linear`. path: "decode", "prefill" or "chunked" instead of what `paths` says."""
    weight = codes, scale, offset, codebook, group_size
    decision = _decision(x, *weight, lora_A, lora_B, None, bias, path)
    if decision == "reference":
        _warn_unavailable(x.device)
        return reference.qlora_linear(x, *weight, lora_A, lora_B, scaling, bias, dequantize=_dequantize)
    leaves = x, lora_A, lora_B, bias
    if x.device.type == "cpu" and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves):
        raise RuntimeError("backend='triton' on CPU tensors is for tests and has no derivatives: use torch.no_grad()")
    if decision == "decode":
        return _decode(x, weight, lora_A, lora_B, None, scaling, bias)
    if lora_A is not None:
        lora_A, lora_B = lora_A.unsqueeze(0), lora_B.unsqueeze(0)
    return _linear(x, weight, lora_A, lora_B, None, scaling, bias, decision)


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
    """As `reference.qlora_linear_multi`; a row whose id is below -1, or not below the number of adapters, becomes NaN,
    also where there are no adapters or all are of rank 0."""
    weight = codes, scale, offset, codebook, group_size
    decision = _decision(x, *weight, lora_A, lora_B, adapter_ids, bias, path)
    if decision == "reference":
        _warn_unavailable(x.device)
        return reference.qlora_linear_multi(
            x, *weight, lora_A, lora_B, adapter_ids, scaling, bias, dequantize=_dequantize
        )
    if 0 in lora_A.shape[:2]:  # the kernels are launched without adapters, and so without ids
        y = qlora_linear(x, *weight, None, None, scaling, bias, path=path)
        wrong = (adapter_ids < -1) | (adapter_ids >= lora_A.shape[0])
        return y.masked_fill_(wrong.unsqueeze(-1), float("nan"))
    adapter_ids = adapter_ids.reshape(-1).contiguous()
    if decision == "decode":
        return _decode(x, weight, lora_A, lora_B, adapter_ids, scaling, bias)
    return _linear(x, weight, lora_A, lora_B, adapter_ids, scaling, bias, decision)


_decisions: dict[tuple, str] = {}


def _decision(x, codes, scale, offset, codebook, group_size, lora_A, lora_B, adapter_ids, bias, path) -> str:
    """ "decode", "prefill", "chunked", "empty" or "reference", for arguments that have been checked.

    A decode step calls it hundreds of times, so what has been decided for dtypes, shapes and devices is remembered:
    the checks look at nothing else.
    """
    try:
        key = (
            *(x.dtype, x.shape, x.device, codes.dtype, codes.shape, codes.device, group_size, path),
            *(scale.dtype, scale.shape, scale.device, codebook.dtype, codebook.shape, codebook.device),
            None if offset is None else (offset.dtype, offset.shape, offset.device),
            None if lora_A is None else (lora_A.dtype, lora_A.shape, lora_A.device),
            None if lora_B is None else (lora_B.dtype, lora_B.shape, lora_B.device),
            None if adapter_ids is None else (adapter_ids.dtype, adapter_ids.shape, adapter_ids.device),
            None if bias is None else (bias.dtype, bias.shape, bias.device),
        )
        known = _decisions.get(key)
    except (AttributeError, TypeError):  # not tensors: the checks say so
        key = known = None
    if known is not None:
        return known
    weight = codes, scale, offset, codebook
    if adapter_ids is None:
        checks.check_floating("x", x)
        checks.check_qlora_linear(x, *weight, x.shape[-1] if x.dim() else 0, group_size, lora_A, lora_B, bias)
    else:
        checks.check_qlora_linear_multi(x, *weight, group_size, lora_A, lora_B, adapter_ids, bias)
    _check_scale_dtype(scale)
    if x.dtype not in DTYPES or unavailable(x.device):
        return "reference"
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if rows == 0 or codes.shape[0] == 0:
        decision = "empty"
    elif path is not None:
        if path not in ("decode", "prefill", "chunked"):
            raise ValueError(f"path={path!r} is none of decode, prefill and chunked")
        decision = path
    else:
        about, bits = _device(x.device), codebook.numel().bit_length() - 1
        shape = rows, codes.shape[0], x.shape[-1], bits, about.architecture, about.multiprocessors
        decision = _launchers().paths.choose_linear(*shape, half=x.dtype != torch.float32)
    if key is not None:
        if len(_decisions) >= 4096:
            _decisions.clear()
        _decisions[key] = decision
    return decision


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return _contiguous(tensor if tensor.dtype == dtype else tensor.to(dtype))


def _decode(
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor | None, Tensor, int],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    adapter_ids: Tensor | None,
    scaling: float,
    bias: Tensor | None,
) -> Tensor:
    """The decode launch with everything contiguous and adapters in the dtype of x."""
    codes, scale, offset, codebook, group_size = weight
    dtype, device = x.dtype, x.device
    if lora_A is not None:
        lora_A, lora_B = _like(lora_A, dtype), _like(lora_B, dtype)
    arguments = (
        x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format),
        _contiguous(codes),
        _contiguous(scale),
        _contiguous(offset),
        _contiguous(codebook),
        group_size,
        lora_A,
        lora_B,
        adapter_ids,
        scaling,
        _contiguous(bias),
    )
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _launchers().decode_linear(*arguments)
    with torch.cuda.device(device):
        return _launchers().decode_linear(*arguments)


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
    launch, device, out_features = _launchers(), _device(x.device), weight[0].shape[0]
    if lora_A is not None and lora_A.shape[1] == 0:
        lora_A = lora_B = None  # an adapter of nothing
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
            h = launch.launch_lora_shrink(rows, lora_A, adapter_ids, scaling, device.multiprocessors)
        if path == "prefill" and half:
            decoding = launch.decode_constexprs(launch.codebook_values(weight[3]), x.dtype, device.asm, along=True)
            arguments = *weight, decoding, h, lora_B, adapter_ids, bias, y
            shape = decoding["BITS"], rows.shape[0], out_features, rows.shape[1]

            def run(tile) -> None:
                splits = launch.configs.splits(tile, *shape, device.multiprocessors)
                launch.launch_prefill_linear(rows, *arguments, tile, splits)

            run(_tile("prefill", x.device, shape, weight[4], run))
        else:
            chunk_bytes = launch.paths.device_of(device.architecture).chunk_bytes
            launch.chunked_linear(rows, *weight, bias, y, chunk_bytes)
            if h is not None:
                launch.launch_lora_expand(y, h, lora_B, adapter_ids)
    return y.view(*x.shape[:-1], out_features)


def _tile(kernel: str, device: torch.device, shape: tuple[int, int, int, int], group_size: int, run):
    """The configuration for a launch of shape (bits, rows, columns, what is summed over); run: launches with one, for a
    search to time."""
    configs, autotune, about = _launchers().configs, _launchers().autotune, _device(device)
    tuned = None
    if autotune.enabled(device):
        key = configs.key_of(kernel, about.architecture, *shape[:3], about.multiprocessors)
        tuned = autotune.tuned(key, group_size, device, run)
    return tuned or configs.choose(kernel, about.architecture, *shape, about.multiprocessors)


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
    """As `reference.qlora_linear_grad_input`. path: "fused" or "chunked" instead of what `paths` says."""
    checks.check_grad_input(grad_y, codes, scale, offset, codebook, in_features, group_size, lora_A, lora_B)
    _check_scale_dtype(scale)
    if grad_y.dtype not in DTYPES or unavailable(grad_y.device):
        _warn_unavailable(grad_y.device)
        return reference.qlora_linear_grad_input(
            *(grad_y, codes, scale, offset, codebook, in_features, group_size, lora_A, lora_B, scaling),
            dequantize=_dequantize,
        )
    launch, device = _launchers(), _device(grad_y.device)
    if grad_y.numel() == 0 or in_features == 0:
        return grad_y.new_zeros(*grad_y.shape[:-1], in_features)
    rows = _rows(grad_y)
    grad_x = grad_y.new_empty(rows.shape[0], in_features)
    codes, scale, offset, codebook = (None if t is None else t.contiguous() for t in (codes, scale, offset, codebook))
    weight = codes, scale, offset, codebook, group_size
    shape = rows.shape[0], in_features, rows.shape[1], codebook.numel().bit_length() - 1
    half = grad_y.dtype != torch.float32
    if path is None:
        path = launch.paths.choose_grad_input(*shape, device.architecture, device.multiprocessors, half=half)
    with _on(grad_y.device):
        h = None
        if lora_A is not None and lora_A.shape[0] > 0:
            h = launch.launch_lora_shrink(rows, lora_B.T.unsqueeze(0), None, scaling, device.multiprocessors)
        if path == "fused" and half:
            entries = launch.codebook_values(codebook)
            decoding = launch.decode_constexprs(entries, grad_y.dtype, device.asm, along=False)
            arguments = *weight, decoding, h, None if h is None else lora_A, grad_x
            shape = decoding["BITS"], rows.shape[0], in_features, rows.shape[1]

            def run(tile) -> None:
                launch.launch_grad_input(rows, *arguments, tile)

            run(_tile("grad_input", grad_y.device, shape, group_size, run))
        else:
            chunk_bytes = launch.paths.device_of(device.architecture).chunk_bytes
            launch.chunked_grad_input(rows, *weight, grad_x, chunk_bytes)
            if h is not None:
                launch.launch_lora_expand(grad_x, h, lora_A.T.unsqueeze(0), None)
    return grad_x.view(*grad_y.shape[:-1], in_features)


def _dequantize(*args) -> Tensor:
    return torch.ops.loftq_kernels.dequantize(*args)


def _on(device: torch.device):
    """Triton launches on the current device, whatever its arguments are on. Mostly they are the same."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _warn_unavailable(device: torch.device) -> None:
    reason = unavailable(device)
    if reason is not None:
        extension.warn_slow(device.type, reason)


registered: set[str] = set()  # ops whose CUDA kernels are these


def _register() -> None:
    """CUDA kernels of the ops; dequantize only where the extension was built without one of its own."""
    for kernel in (qlora_linear, qlora_linear_multi, qlora_linear_grad_input, dequantize):
        name = f"{NAMESPACE}::{kernel.__name__}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
            torch.library.impl(name, "CUDA", kernel)
            registered.add(kernel.__name__)


_register()
