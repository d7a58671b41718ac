"""y = x @ (codebook[codes] * scale + offset).T + h @ lora_B[ids].T + bias in large tiles, for prefill."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import decode, setup_decode
from .configs import Config, cdiv
from .contract import TILE
from .counters import counter_zeros
from .lora import add_lora, block_r
from .tiles import TileDecoder, add_parts, scaled, tile_of


@triton.jit
def _load_groups(scale, offset, rows, column, num_groups, GROUP: tl.constexpr, PARTS: tl.constexpr):
    """(scale, scale, offset, offset) of a step's first group and, where PARTS is 2, of its second. Without offsets the
    scales stand in their place."""
    group = tl.minimum(column // GROUP, num_groups - 1) if GROUP > 0 else column * 0
    second = tl.minimum(group + PARTS - 1, num_groups - 1)
    s0 = tl.load(scale + rows + group).to(tl.float32)
    s1 = tl.load(scale + rows + second).to(tl.float32)
    if offset is None:
        return s0, s1, s0, s1
    else:
        return (
            s0,
            s1,
            tl.load(offset + rows + group).to(tl.float32),
            tl.load(offset + rows + second).to(tl.float32),
        )


# Do not specialize M: setup_decode derives a zero from it, and a constant M = 1 would reveal the tables to ptxas.
@triton.jit(do_not_specialize=["M", "S", "steps_per_split"])
def _prefill_linear_kernel(
    x,  # [M, K]
    codes,  # [N, row_bytes] uint8
    scale,  # [N, G]
    offset,  # [N, G] or None
    codebook,
    h,  # [M, R] or None
    lora_B,  # [S, N, R]
    adapter_ids,  # [M], or None: all rows take adapter 0
    bias,  # [N] or None
    y,  # [M, N]
    workspace,  # float32 [tiles, SPLITS, BLOCK_N, BLOCK_M], or None
    counters,  # int32 [tiles], zeros before and after; or None
    M,
    N,
    K,
    R,
    S,
    num_groups,
    stride_x,
    stride_codes,
    stride_scale,
    stride_y,
    stride_bs,
    stride_bn,
    stride_br,
    steps_per_split,
    TILE_DECODER: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SWIZZLE: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """A program multiplies one split of K for one tile of y. The last split to be done adds up all splits, adapters and
    bias."""
    tile, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    pid_m, pid_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, SWIZZLE)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_in = tl.minimum(n, N - 1).to(tl.int64)
    m_in = tl.minimum(m, M - 1).to(tl.int64)
    dtype: tl.constexpr = x.dtype.element_ty

    # ---- main loop: a step is one packed run of bytes, whose fields are FIELDS slices of WIDTH columns
    DECODER: tl.constexpr = TILE_DECODER.decoder
    BITS: tl.constexpr = DECODER.bits
    setup_decode(M >> 31, DECODER)
    FIELDS: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = 32 if BITS == 8 else 8 * BITS  # Half a tile at 8 bits, so that no step has two groups of 32.
    STEP: tl.constexpr = WIDTH * FIELDS
    PARTS: tl.constexpr = 2 if GROUP == 32 and STEP > 32 else 1
    k = tl.arange(0, WIDTH)
    code_tile = codes + n_in[:, None] * stride_codes + k[None, :]
    x_tile = x + m_in[None, :] * stride_x + k[:, None]
    rows = n_in * stride_scale
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    # Scales are fetched a step ahead by hand, as Triton does not pipeline loads of two bytes per row.
    first = split * steps_per_split
    s0, s1, o0, o1 = _load_groups(scale, offset, rows, first * STEP, num_groups, GROUP, PARTS)
    for step in tl.range(first, tl.minimum(first + steps_per_split, tl.cdiv(K, STEP)), num_stages=STAGES):
        packed = tl.load(code_tile + step * WIDTH)
        # All fields are decoded before the first product, because on Hopper only the last product of a step runs
        # asynchronously, beside the decoding of the next step.
        fields = decode(packed, codebook, DECODER, TILE_DECODER.field)
        ws = ()
        for i in tl.static_range(FIELDS):
            s = s0 if i * PARTS < FIELDS else s1
            o = o0 if i * PARTS < FIELDS else o1
            ws = ws + (scaled(fields[i], s[:, None], o[:, None], offset is not None, TILE_DECODER, dtype),)
        s0, s1, o0, o1 = _load_groups(scale, offset, rows, (step + 1) * STEP, num_groups, GROUP, PARTS)
        for i in tl.static_range(FIELDS):
            column = step * STEP + i * WIDTH
            xs = tl.load(x_tile + column, mask=(column + k)[:, None] < K, other=0.0)
            acc = tl.dot(ws[i], xs, acc)

    if SPLITS == 1:
        _finish(
            acc, h, lora_B, adapter_ids, bias, y, m, n, M, N, R, S, stride_y, stride_bs, stride_bn, stride_br, BLOCK_R
        )  # fmt: skip
    else:
        parts = workspace + tile.to(tl.int64) * (SPLITS * BLOCK_N * BLOCK_M)
        is_last, total = add_parts(acc, M - pid_m * BLOCK_M, parts, counters + tile, split, SPLITS)
        if is_last:
            _finish(
                total, h, lora_B, adapter_ids, bias, y, m, n, M, N, R, S, stride_y, stride_bs, stride_bn, stride_br,
                BLOCK_R,
            )  # fmt: skip


@triton.jit
def _finish(
    acc, h, lora_B, adapter_ids, bias, y, m, n, M, N, R, S, stride_y, stride_bs, stride_bn, stride_br,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Adds adapters and bias to acc [BLOCK_N, BLOCK_M] and stores its transpose into y."""
    dtype: tl.constexpr = y.dtype.element_ty
    if h is not None:
        acc = add_lora(
            acc, h, lora_B, adapter_ids, m, n, M, N, R, S, stride_bs, stride_bn, stride_br, dtype, BLOCK_R, False
        )
    if bias is not None:
        acc += tl.load(bias + tl.minimum(n, N - 1)).to(tl.float32)[:, None]
    place = y + m.to(tl.int64)[None, :] * stride_y + n[:, None]
    tl.store(place, acc.to(dtype), mask=(n[:, None] < N) & (m[None, :] < M))


def launch_prefill_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    group_size: int,
    decoder: TileDecoder,
    h: Tensor | None,
    lora_B: Tensor | None,
    adapter_ids: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    tile: Config,
    splits: int = 1,
) -> Tensor:
    """y [M, N] = x [M, K] @ W.T + h [M, R] @ lora_B[adapter_ids].T + bias [N].

    x, h and y are float16 or bfloat16 and have last stride 1. h and lora_B [S, N, R] are both given or neither; lora_B
    and bias [N] may have any dtype, lora_B any strides. adapter_ids [M] holds -1 for no adapter; rows with an id that
    no adapter has become NaN. splits: how many programs share the columns of a tile.
    """
    (rows, in_features), out_features = x.shape, codes.shape[0]
    rank = 0 if h is None else h.shape[1]
    tiles = cdiv(rows, tile.block_m) * cdiv(out_features, tile.block_n)
    step = 32 if decoder.decoder.bits == 8 else TILE
    workspace = counters = None
    if splits > 1:
        size = tiles * splits * tile.block_n * tile.block_m
        workspace = torch.empty(size, dtype=torch.float32, device=x.device)
        counters = counter_zeros(x.device, tiles)
    _prefill_linear_kernel[(tiles * splits,)](
        x,
        codes,
        scale,
        offset,
        codebook,
        h,
        lora_B,
        adapter_ids,
        bias,
        y,
        workspace,
        counters,
        rows,
        out_features,
        in_features,
        rank,
        1 if lora_B is None else lora_B.shape[0],
        scale.shape[1],
        x.stride(0),
        codes.stride(0),
        scale.stride(0),
        y.stride(0),
        *((0, 0, 0) if lora_B is None else lora_B.stride()),
        cdiv(cdiv(in_features, step), splits),
        TILE_DECODER=decoder,
        GROUP=group_size,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_R=block_r(rank),
        SWIZZLE=8,
        STAGES=tile.num_stages,
        SPLITS=splits,
        num_warps=tile.num_warps,
        enable_fp_fusion=False,  # Product and sum are rounded each, so that weights are those of `dequantize`.
    )
    return y
