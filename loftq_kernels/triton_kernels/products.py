"""The ops by these kernels, for arguments that have been checked: which kernel, how it is launched, what is copied.

`functional` checks arguments; so does whoever calls these functions directly.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from . import autotune, configs, paths
from .chunked import chunked_grad_input, chunked_linear
from .codebooks import codebook_values
from .configs import Config
from .contract import bits_of
from .decode_launch import Plan, plan_for
from .dequantize import launch_dequantize
from .device import device_of
from .grad_input import launch_grad_input
from .lora import launch_lora_down, launch_lora_up
from .prefill_linear import launch_prefill_linear
from .tiles import tile_decoder

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of x and of what comes out
Weight = tuple[Tensor, Tensor, Tensor | None, Tensor, int]  # codes, scale, offset, codebook, group_size


def on(device: torch.device):
    """A context in which `device` is the current one: Triton launches there, whatever device its arguments are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _readable(adapter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A contiguous adapter in a dtype that the kernel loads and converts by itself; a float64 one becomes dtype."""
    return contiguous(adapter.to(dtype) if adapter is not None and adapter.dtype not in DTYPES else adapter)


def _rows(x: Tensor) -> Tensor:
    """[..., K] as a matrix whose rows are contiguous and, where K is a multiple of 16, start at multiples of 16 bytes.

    For other addresses Triton compiles another kernel, which reads single elements: it is slower than a copy, and short
    of registers.
    """
    x = x.reshape(-1, x.shape[-1])
    aligned = x.is_contiguous() or (x.stride(-1) == 1 and x.stride(0) * x.element_size() % 16 == 0)
    return x if aligned and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _readable_weight(weight: Weight) -> Weight:
    return (*map(contiguous, weight[:4]), weight[4])


def dequantize(weight: Weight, in_features: int, dtype: torch.dtype) -> Tensor:
    """codebook[codes] * scale + offset [N, in_features], of one of `DTYPES`."""
    codes = weight[0]
    out = codes.new_empty(codes.shape[0], in_features, dtype=dtype)
    with on(codes.device):
        return launch_dequantize(*_readable_weight(weight), out)


def choose_linear(x: Tensor, weight: Weight) -> str:
    """ "decode", "prefill", "chunked", or "empty" where y has no elements or is the bias alone."""
    rows, out_features = x.numel() // x.shape[-1] if x.shape[-1] else 0, weight[0].shape[0]
    if rows == 0 or out_features == 0:
        return "empty"
    half = x.dtype != torch.float32
    return paths.choose_linear(rows, out_features, x.shape[-1], bits_of(weight[3]), device_of(x.device), half=half)


def decode_arguments(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    adapter_ids: Tensor | None,
    scaling: float,
    bias: Tensor | None,
) -> tuple:
    """What `Plan.launch` takes: everything contiguous, x at a multiple of 16 bytes."""
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


def decode_plan(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    adapter_ids: Tensor | None,
    bias: Tensor | None,
) -> Plan:
    """The plan of a decode launch. Where autotuning is on, making it launches kernels; no plan depends on scaling."""
    ids = None if adapter_ids is None else adapter_ids.reshape(-1).contiguous()
    arguments = decode_arguments(x, weight, lora_A, lora_B, ids, 1.0, bias)
    with on(x.device):
        return plan_for(*arguments[:5], weight[4], *arguments[5:])


def decode(
    plan: Plan,
    x: Tensor,
    weight: Weight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    adapter_ids: Tensor | None,
    scaling: float,
    bias: Tensor | None,
) -> Tensor:
    """y [..., N] by the decode kernel. adapter_ids: [M], contiguous."""
    arguments = decode_arguments(x, weight, lora_A, lora_B, adapter_ids, scaling, bias)
    device = x.device  # As `on`, without a context where none is needed: this is called hundreds of times per token.
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return plan.launch(*arguments)
    with torch.cuda.device(device):
        return plan.launch(*arguments)


def large_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    adapter_ids: Tensor | None,
    scaling: float,
    bias: Tensor | None,
    path: str,
) -> Tensor:
    """y [..., N] by large tiles ("prefill"), through a library GEMM ("chunked"), or "empty".

    lora_A [S, r, K], lora_B [S, N, r]; adapter_ids [M]: which of them a row has, None: the first. float32 x goes to the
    library GEMM.
    """
    out_features = weight[0].shape[0]
    if path == "empty":
        y = x.new_zeros(*x.shape[:-1], out_features)
        return y if bias is None else y + bias.to(y.dtype)
    if lora_A is not None and lora_A.shape[1] == 0:
        lora_A = lora_B = None
    rows, weight, bias, device = _rows(x), _readable_weight(weight), contiguous(bias), device_of(x.device)
    with on(x.device):
        y = x.new_empty(rows.shape[0], out_features)
        h = None
        if lora_A is not None:
            h = launch_lora_down(rows, lora_A, adapter_ids, scaling, device.multiprocessors)
        if path == "prefill" and x.dtype != torch.float32:
            _prefill(rows, weight, h, lora_B, adapter_ids, bias, y)
        else:
            chunked_linear(rows, *weight, bias, y, device.chunk_bytes)
            if h is not None:
                launch_lora_up(y, h, lora_B, adapter_ids)
    return y.view(*x.shape[:-1], out_features)


def _prefill(rows: Tensor, weight: Weight, h, lora_B, adapter_ids, bias, y: Tensor) -> None:
    """Write the product of rows [M, K] of 16 bits, the low-rank term of h and the bias to y [M, N], in one kernel."""
    device = device_of(rows.device)
    decoder = tile_decoder(codebook_values(weight[3]), rows.dtype, device.ptx, along=True)
    shape = decoder.decoder.bits, rows.shape[0], y.shape[1], rows.shape[1]

    def run(tile: Config) -> None:
        splits = configs.splits(tile, *shape, device.multiprocessors)
        launch_prefill_linear(rows, *weight, decoder, h, lora_B, adapter_ids, bias, y, tile, splits)

    run(_tile("prefill", rows.device, shape, weight[4], run))


def _tile(kernel: str, device: torch.device, shape: tuple[int, int, int, int], group_size: int, run) -> Config:
    """The configuration for a launch of shape (bits, rows, columns, what is summed over). run launches with a given
    configuration, for a search to time."""
    about = device_of(device)
    tuned = None
    if autotune.enabled(device):
        tuned = autotune.tuned(configs.key_of(kernel, about, *shape[:3]), group_size, device, run)
    return tuned or configs.choose(kernel, about, *shape)


def grad_input(
    grad_y: Tensor,
    weight: Weight,
    in_features: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    path: str | None = None,
) -> Tensor:
    """grad_x [..., in_features], with lora_A [r, K] and lora_B [N, r]. path: "fused" or "chunked", None: by `paths`."""
    if grad_y.numel() == 0 or in_features == 0:
        return grad_y.new_zeros(*grad_y.shape[:-1], in_features)
    rows, weight, device = _rows(grad_y), _readable_weight(weight), device_of(grad_y.device)
    half = grad_y.dtype != torch.float32
    if path is None:
        bits = bits_of(weight[3])
        path = paths.choose_grad_input(rows.shape[0], in_features, rows.shape[1], bits, device, half=half)
    with on(grad_y.device):
        grad_x = grad_y.new_empty(rows.shape[0], in_features)
        h = None
        if lora_A is not None and lora_A.shape[0] > 0:
            h = launch_lora_down(rows, lora_B.T.unsqueeze(0), None, scaling, device.multiprocessors)
        if path == "fused" and half:
            _fused_grad_input(rows, weight, h, lora_A, grad_x)
        else:
            chunked_grad_input(rows, *weight, grad_x, device.chunk_bytes)
            if h is not None:
                launch_lora_up(grad_x, h, lora_A.T.unsqueeze(0), None)
    return grad_x.view(*grad_y.shape[:-1], in_features)


def _fused_grad_input(rows: Tensor, weight: Weight, h, lora_A, grad_x: Tensor) -> None:
    """Write the gradient of the input for rows [M, N] of 16 bits, with the low-rank term of h, to grad_x [M, K]."""
    device = device_of(rows.device)
    decoder = tile_decoder(codebook_values(weight[3]), rows.dtype, device.ptx, along=False)
    arguments = *weight, decoder, h, None if h is None else lora_A, grad_x
    shape = decoder.decoder.bits, rows.shape[0], grad_x.shape[1], rows.shape[1]

    def run(tile: Config) -> None:
        launch_grad_input(rows, *arguments, tile)

    run(_tile("grad_input", rows.device, shape, weight[4], run))
