"""The host side of decode: what shapes, dtypes and the device decide of a launch (its `Plan`), and the launch.

A decode step makes hundreds of launches, so callers keep plans, by all that a plan depends on: `Call` and the device.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import autotune, configs
from .codebooks import codebook_values, make_decoder
from .configs import Config, cdiv
from .contract import TILE, code_bits, num_groups
from .counters import counter_zeros
from .decode_linear import decode_linear_kernel
from .decode_lora import CHUNK, down_plan
from .device import Device, device_of
from .lora import block_r


class Call(NamedTuple):
    """What a plan depends on, besides the device."""

    rows: int
    columns: int
    out_features: int
    group_size: int
    dtype: torch.dtype  # of x
    scale_dtype: torch.dtype
    aligned: bool  # whether scales and offsets start at multiples of 8 bytes
    affine: bool
    adapters: int
    rank: int  # 0 without adapters
    by_row: bool  # whether rows have adapters of their own
    entries: tuple[float, ...]  # of the code book

    @property
    def bits(self) -> int:
        return code_bits(len(self.entries))

    @property
    def groups(self) -> int:
        return num_groups(self.columns, self.group_size)


def call_of(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    group_size: int,
    lora_A: Tensor | None,
    adapter_ids: Tensor | None,
) -> Call:
    """The `Call` of arguments as `decode_linear` has them."""
    stack = (0, 0) if lora_A is None else (1, lora_A.shape[0]) if lora_A.dim() == 2 else lora_A.shape[:2]
    return Call(
        rows=x.numel() // x.shape[-1],
        columns=x.shape[-1],
        out_features=codes.shape[0],
        group_size=group_size,
        dtype=x.dtype,
        scale_dtype=scale.dtype,
        aligned=is_aligned(scale, offset),
        affine=offset is not None,
        adapters=max(stack[0], 1),
        rank=0 if 0 in stack else stack[1],
        by_row=adapter_ids is not None,
        entries=codebook_values(codebook),
    )


def is_aligned(scale: Tensor, offset: Tensor | None) -> bool:
    """Whether scales and offsets may be loaded 8 bytes at a time, from their start on."""
    return scale.data_ptr() % 8 == 0 and (offset is None or offset.data_ptr() % 8 == 0)


class Plan(NamedTuple):
    """All of a launch but its tensors."""

    grid: tuple[int, int]
    workspace: int  # float32 elements
    counters: int
    sizes: tuple[int, ...]  # the kernel's M, N, K, row_units, G, R, S
    num_downs: int
    split_tiles: int
    constexprs: dict[str, object]

    def launch(
        self,
        x: Tensor,
        codes: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        codebook: Tensor,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        adapter_ids: Tensor | None,
        scaling: float,
        bias: Tensor | None,
    ) -> Tensor:
        """y of `decode_linear`, for the arguments that the plan was made for or others of the same `Call`."""
        shape, device = x.shape, x.device
        y = x.new_empty((*shape[:-1], self.sizes[1]))
        workspace = counters = None
        if self.workspace:
            workspace = torch.empty(self.workspace, dtype=torch.float32, device=device)
            counters = counter_zeros(device, self.counters)
        if self.num_downs == 0:
            lora_A = lora_B = adapter_ids = None
        decode_linear_kernel[self.grid](
            x,
            codes,
            scale,
            offset,
            codebook,
            lora_A,
            lora_B,
            adapter_ids,
            bias,
            y,
            workspace,
            counters,
            *self.sizes,
            scaling,
            self.num_downs,
            self.split_tiles,
            **self.constexprs,
        )
        return y


def make_plan(call: Call, device: Device, config: Config | None = None, splits: int | None = None) -> Plan:
    """The plan of a call. config, splits: in place of those that the table and the device give."""
    if config is None:
        config = _config(call, device)
    config = config.for_group(call.group_size)
    if splits is None:
        shape = call.bits, call.rows, call.out_features, call.columns
        splits = configs.splits(config, *shape, device.multiprocessors)
    block_m = config.block_m
    row_blocks, tiles = cdiv(call.rows, block_m), cdiv(call.out_features, config.block_n)
    downs, counters, memory = down_plan(call.rank, call.columns, call.rows, block_m, by_row=call.by_row)
    parts = row_blocks * tiles * splits * config.block_n * block_m if splits > 1 else 0
    row_units = cdiv(call.columns, TILE) * call.bits
    return Plan(
        grid=(downs + tiles * splits, row_blocks),
        workspace=parts + row_blocks * memory,
        counters=row_blocks * (counters + tiles),
        sizes=(call.rows, call.out_features, call.columns, row_units, call.groups, call.rank, call.adapters),
        num_downs=downs,
        split_tiles=cdiv(cdiv(call.columns, config.block_k), splits) * config.tiles,
        constexprs=_constexprs(call, device, config, splits),
    )


def _config(call: Call, device: Device) -> Config:
    if call.dtype == torch.float32:
        return configs.DECODE_FLOAT32
    return configs.choose("decode", device, call.bits, call.rows, call.out_features, call.columns)


def _constexprs(call: Call, device: Device, config: Config, splits: int) -> dict[str, object]:
    """The kernel's constexprs and Triton's options."""
    half, adapters = call.dtype != torch.float32, call.rank > 0
    registers = configs.decode_registers(config, call.bits, affine=call.affine, adapters=adapters, half=half)
    return {
        "DECODER": make_decoder(call.entries, call.dtype, asm=device.ptx, sums=call.affine),
        "GROUP": max(call.group_size, 0),
        "EVEN": call.columns % config.block_k == 0,
        "WIDE": wide(config, call.group_size, call.groups, call.scale_dtype) if call.aligned else 1,
        "SPLITS": splits,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "TILES": config.tiles,
        "BLOCK_R": block_r(call.rank),
        "CHUNK": CHUNK,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **({} if registers is None else {"maxnreg": registers}),
    }


def wide(config: Config, group_size: int, groups: int, dtype: torch.dtype) -> int:
    """How many scales of a row the kernel may load at a time, aligned to as many."""
    if group_size < 0 or dtype == torch.float32:
        return 1
    step = config.block_k // group_size
    return next(count for count in (4, 2, 1) if step % count == 0 and groups % count == 0)


def plan_for(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    group_size: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    adapter_ids: Tensor | None,
    scaling: float,
    bias: Tensor | None,
) -> Plan:
    """The plan for arguments as `decode_linear` has them. Where autotuning is on, its configuration is measured first,
    by launches with these arguments, unless it is known."""
    call, device = call_of(x, codes, scale, offset, codebook, group_size, lora_A, adapter_ids), device_of(x.device)
    if call.dtype == torch.float32 or not autotune.enabled(x.device):
        return make_plan(call, device)
    tensors = x, codes, scale, offset, codebook, lora_A, lora_B, adapter_ids, scaling, bias
    plan_of = cache(lambda config: make_plan(call, device, config))
    key = configs.key_of("decode", device, call.bits, call.rows, call.out_features)
    config = autotune.tuned(key, group_size, x.device, lambda config: plan_of(config).launch(*tensors))
    return make_plan(call, device, config)


def decode_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    group_size: int,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    adapter_ids: Tensor | None = None,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    config: Config | None = None,
    splits: int | None = None,
    device: Device | None = None,
) -> Tensor:
    """y = x @ (codebook[codes] * scale + offset).T + scaling * (x @ lora_A[id].T) @ lora_B[id].T + bias, in one launch.

    It plans anew at every call, for tests and tools: the ops remember plans.

    Args:
        x: [..., K] contiguous, float16, bfloat16 or float32, with M > 0 rows and K > 0; meant for M <= 16, right for
            any M that makes up to 65535 blocks of rows.
        codes, scale, offset, codebook, group_size: the stored weight [N, K], N > 0.
        lora_A, lora_B: [R, K] and [N, R], or [S, R, K] and [S, N, R]; contiguous, each of any dtype that x may have;
            rounded to that of x. Both or neither.
        adapter_ids: [M] int32 or int64, which of the S adapters a row has: -1 for none. A row with an id below -1, or
            of S and more, becomes NaN (not where R or S is 0: then ids are not read). None: all rows have the first.
        bias: [N], contiguous.
        config, splits, device: in place of the table's and of the device that x is on.

    Returns y [..., N] in the dtype of x.
    """
    call = call_of(x, codes, scale, offset, codebook, group_size, lora_A, adapter_ids)
    plan = make_plan(call, device or device_of(x.device), config, splits)
    return plan.launch(x, codes, scale, offset, codebook, lora_A, lora_B, adapter_ids, scaling, bias)
