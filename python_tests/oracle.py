"""What the package should compute, written a second time: slowly, one group and one code at a time, from the documents.

Sources: the storage contract (docstring of `loftq_kernels.storage.packing`), the rules of
csrc/include/loftq/quantize.h, the formulas of QLoRA, LoftQ and PEFT. Nothing here uses the package's own code.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FLT_MIN = np.finfo(np.float32).tiny
SEARCH_FACTORS = [1 - i / 32 for i in range(25)]
BITS = {
    "nf2": 2,
    "nf4": 4,
    "int2": 2,
    "int4": 4,
    "int8": 8,
    "int2_sym": 2,
    "int4_sym": 4,
    "int8_sym": 8,
    "uniform2": 2,
    "uniform4": 4,
}


def scale_rule(format: str) -> str:
    if format.startswith("uniform"):
        return "mean_std"
    return "minmax" if format.startswith("int") and not format.endswith("_sym") else "absmax"


def codebook(format: str) -> np.ndarray:
    """Float32 [2^bits]; the formulas of LoftQ's quantizer as PEFT shipped it, `torch.linspace` in float32 included."""
    bits = BITS[format]
    levels = 2**bits
    if format.startswith("int"):
        return np.arange(-(levels // 2), levels // 2).astype(np.float32)
    if format.startswith("uniform"):
        return torch.linspace(-1, 1, levels).numpy()
    from scipy.stats import norm

    offset = 0.9677083
    positive = norm.ppf(torch.linspace(offset, 0.5, levels // 2 + 1)[:-1]).tolist()
    negative = (-norm.ppf(torch.linspace(offset, 0.5, levels // 2)[:-1])).tolist()
    values = torch.tensor(positive + [0.0] + negative, dtype=torch.float32).sort().values
    return (values / values.max()).numpy()


def decode_code(row: np.ndarray, column: int, bits: int) -> int:
    """The code of one column of a packed row: byte j of tile t, field i holds column 64 t + j + i * (64 / P)."""
    bytes_per_tile = 64 * bits // 8  # 64 / P as well: P = 8 / bits codes per byte
    tile, within = divmod(column, 64)
    field, byte = divmod(within, bytes_per_tile)
    return (int(row[tile * bytes_per_tile + byte]) >> (field * bits)) & (2**bits - 1)


def decode_codes(codes: Tensor, columns: int, bits: int) -> np.ndarray:
    """[N, columns] of `decode_code`."""
    rows = codes.cpu().numpy()
    return np.array([[decode_code(row, k, bits) for k in range(columns)] for row in rows]).reshape(len(rows), columns)


def group_bounds(columns: int, group_size: int) -> list[tuple[int, int]]:
    width = columns if group_size == -1 else group_size
    return [(first, min(first + width, columns)) for first in range(0, columns, width)] if columns else []


def dequantize(packed) -> Tensor:
    """Float64 [N, K] of the stored tensors."""
    rows, columns = packed.shape
    codes = decode_codes(packed.codes, columns, packed.bits)
    table = packed.codebook.double().cpu().numpy()
    scale = packed.scale.double().cpu().numpy()
    offset = np.zeros_like(scale) if packed.offset is None else packed.offset.double().cpu().numpy()
    dense = np.zeros((rows, columns))
    for g, (first, last) in enumerate(group_bounds(columns, packed.group_size)):
        dense[:, first:last] = table[codes[:, first:last]] * scale[:, g : g + 1] + offset[:, g : g + 1]
    return torch.from_numpy(dense)


def qlora_linear(x: Tensor, packed, lora_A=None, lora_B=None, scaling=1.0, bias=None) -> Tensor:
    """y = x @ (codebook[codes] * scale + offset).T + scaling * (x @ lora_A.T) @ lora_B.T + bias, in float64."""
    x = x.detach().double().cpu()
    y = x @ dequantize(packed).T
    if lora_A is not None:
        y = y + scaling * (x @ lora_A.detach().double().cpu().T) @ lora_B.detach().double().cpu().T
    return y if bias is None else y + bias.detach().double().cpu()


def _round_to(value: np.float32, dtype: torch.dtype) -> np.float32:
    return np.float32(torch.tensor(value, dtype=torch.float32).to(dtype).float().item())


def _sum(values: np.ndarray) -> np.float64:
    """The float64 sum that every backend forms: 32 interleaved partial sums, folded by halves."""
    partial = np.zeros(32)
    for first in range(0, len(values), 32):
        block = values[first : first + 32]
        partial[: len(block)] += block
    while len(partial) > 1:
        half = len(partial) // 2
        partial = partial[:half] + partial[half:]
    return partial[0]


def _base_scale(w: np.ndarray, table: np.ndarray, rule: str) -> np.float32:
    absmax = np.abs(w).max() / table[-1]
    if rule == "minmax":
        return (w.max() - w.min()) / np.float32(len(table) - 1)
    if rule == "absmax":
        return absmax
    wide = w.astype(np.float64)
    mean = _sum(wide) / len(w)
    variance = _sum((wide - mean) ** 2) / (len(w) - 1) if len(w) > 1 else np.nan
    scale = np.float32(mean + 2.5 * np.sqrt(variance))
    return scale if scale > 0 else absmax


def quantize_group(w: np.ndarray, table: np.ndarray, rule: str, scale_dtype: torch.dtype, search: bool):
    """Codes, stored scale and stored offset (0 unless affine) of one group of float32 weights."""
    f32 = np.float32
    base = _base_scale(w, table, rule)
    midpoints = (table[:-1] + table[1:]) / f32(2)
    best, best_error = None, np.inf
    for factor in SEARCH_FACTORS if search else [1.0]:
        scale, offset = _round_to(f32(factor) * base, scale_dtype), f32(0)
        if rule == "minmax":
            span = w.max() - w.min()
            shifted = w.min() + f32((1 - factor) * 0.5) * span
            offset = _round_to(shifted + f32(len(table) // 2) * scale, scale_dtype)
        normalized = (w - offset) * (f32(1) / max(scale, FLT_MIN))
        codes = (normalized[:, None] > midpoints).sum(1)  # midpoints strictly below: the lower entry on a tie
        decoded = table[codes] * scale + offset
        error = _sum((w - decoded).astype(np.float64) ** 2)
        if best is None or error < best_error:
            best, best_error = (codes, scale, offset), error
    return best


def quantize(weight: Tensor, format: str, group_size: int, scale_dtype: torch.dtype, search: bool = False):
    """Codes [N, K], scale [N, G] and offset [N, G] as numpy arrays."""
    dense = weight.detach().float().cpu().numpy()
    table, rule = codebook(format), scale_rule(format)
    bounds = group_bounds(dense.shape[1], group_size)
    codes = np.zeros(dense.shape, dtype=np.int64)
    scale = np.zeros((len(dense), len(bounds)), dtype=np.float32)
    offset = np.zeros_like(scale)
    for n, row in enumerate(dense):
        for g, (first, last) in enumerate(bounds):
            codes[n, first:last], scale[n, g], offset[n, g] = quantize_group(
                row[first:last], table, rule, scale_dtype, search
            )
    return codes, scale, offset


def relative_error(weight: Tensor, init) -> float:
    """||W - Q - scaling * B @ A||_F / ||W||_F in float64 of what an initializer returned."""
    exact = weight.detach().double().cpu()
    approximation = init.packed.dequantize(torch.float64).cpu()
    if init.lora_A is not None:
        approximation = approximation + init.scaling * init.lora_B.double().cpu() @ init.lora_A.double().cpu()
    return (torch.linalg.norm(exact - approximation) / torch.linalg.norm(exact)).item()


def loftq_nearest(weight: Tensor, table: Tensor, scale_of) -> Tensor:
    """LoftQ's own quantizer: flat blocks of 64, argmin |w / scale - level|, dequantized; K must be a multiple of 64."""
    blocks = weight.reshape(-1, 64)
    scale = scale_of(blocks)
    codes = ((blocks / scale).unsqueeze(-1) - table).abs().argmin(-1)
    return (table[codes] * scale).view_as(weight)


def loftq_loop(weight: Tensor, rank: int, num_iter: int, quantize_dequantize) -> list[tuple[Tensor, Tensor]]:
    """(Q, B A) of every alternation of PEFT's `loftq_init`, by a full SVD."""
    iterates, residual = [], weight.clone()
    for _ in range(num_iter):
        quantized = quantize_dequantize(residual)
        u, s, vh = torch.linalg.svd(weight - quantized, full_matrices=False)
        root = s[:rank].sqrt()
        product = (u[:, :rank] * root) @ (root[:, None] * vh[:rank])
        iterates.append((quantized, product))
        residual = weight - product
    return iterates
