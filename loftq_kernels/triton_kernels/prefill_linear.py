"""y = x @ (codebook[codes] * scale + offset).T + h @ lora_B.T + bias in large tiles, for prefill."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loftq_kernels.triton_kernels.codes import decode, setup_decode
from loftq_kernels.triton_kernels.configs import Config, cdiv
from loftq_kernels.triton_kernels.lora import add_lora, block_r
from loftq_kernels.triton_kernels.tiles import scaled, tile_of_program


@triton.jit
def _load_groups(scale, offset, rows, column, num_groups, GROUP: tl.constexpr, PARTS: tl.constexpr):
    """scale and offset (0 without) of a step's first group, and of its second where PARTS is 2."""
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


@triton.jit(do_not_specialize=["M"])  # `setup_decode` makes a zero of it that ptxas must not know
def _prefill_linear_kernel(
    x,  # [M, K]
    codes,  # [N, row_bytes] uint8
    scale,  # [N, G]
    offset,  # [N, G] or None
    codebook,
    h,  # [M, R] or None
    lora_B,  # [1, N, R]
    bias,  # [N] or None
    y,  # [M, N]
    M,
    N,
    K,
    R,
    num_groups,
    stride_x,
    stride_codes,
    stride_scale,
    stride_y,
    stride_bn,
    stride_br,
    BITS: tl.constexpr,
    SETUP: tl.constexpr,
    ASM: tl.constexpr,
    TABLE: tl.constexpr,
    FIELD: tl.constexpr,
    UNIT: tl.constexpr,
    SHIFT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SWIZZLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid_m, pid_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, SWIZZLE)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_in = tl.minimum(n, N - 1).to(tl.int64)
    m_in = tl.minimum(m, M - 1).to(tl.int64)
    dtype: tl.constexpr = x.dtype.element_ty

    # ---- main loop: a step is one packed run of bytes, whose fields are FIELDS slices of WIDTH columns
    setup_decode(M >> 31, SETUP)
    FIELDS: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = 32 if BITS == 8 else 8 * BITS  # at 8 bits half a tile, lest a step have two groups of 32
    STEP: tl.constexpr = WIDTH * FIELDS
    PARTS: tl.constexpr = 2 if GROUP == 32 and STEP > 32 else 1
    k = tl.arange(0, WIDTH)
    code_tile = codes + n_in[:, None] * stride_codes + k[None, :]
    x_tile = x + m_in[None, :] * stride_x + k[:, None]
    rows = n_in * stride_scale
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    # Scales are fetched a step ahead: two bytes a row are too few for Triton to pipeline.
    s0, s1, o0, o1 = _load_groups(scale, offset, rows, 0, num_groups, GROUP, PARTS)
    for step in tl.range(0, tl.cdiv(K, STEP), num_stages=STAGES):
        packed = tl.load(code_tile + step * WIDTH)
        # All fields are decoded before the first product: on Hopper only the last product of a step runs
        # asynchronously, beside the decoding of the next.
        fields = decode(packed, codebook, ASM, TABLE, BITS, FIELD)
        ws = ()
        for i in tl.static_range(FIELDS):
            s = s0 if i * PARTS < FIELDS else s1
            o = o0 if i * PARTS < FIELDS else o1
            ws = ws + (scaled(fields[i], s[:, None], o[:, None], offset is not None, UNIT, SHIFT, dtype),)
        s0, s1, o0, o1 = _load_groups(scale, offset, rows, (step + 1) * STEP, num_groups, GROUP, PARTS)
        for i in tl.static_range(FIELDS):
            column = step * STEP + i * WIDTH
            xs = tl.load(x_tile + column, mask=(column + k)[:, None] < K, other=0.0)
            acc = tl.dot(ws[i], xs, acc)

    # ---- adapter, bias, store
    if h is not None:
        acc = add_lora(acc, h, lora_B, None, m, n, M, N, R, 1, 0, stride_bn, stride_br, dtype, BLOCK_R, False)
    if bias is not None:
        acc += tl.load(bias + n_in).to(tl.float32)[:, None]
    place = y + m.to(tl.int64)[None, :] * stride_y + n[:, None]
    tl.store(place, acc.to(dtype), mask=(n[:, None] < N) & (m[None, :] < M))


def launch_prefill_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    group_size: int,
    decoding: dict[str, object],
    h: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    tile: Config,
) -> Tensor:
    """y [M, N] = x [M, K] @ W.T + h [M, R] @ lora_B [N, R].T + bias [N]; x, h and y float16 or bfloat16, last stride 1.

    h and lora_B are both given or neither; lora_B and bias of any dtype and strides.
    """
    (rows, in_features), out_features = x.shape, codes.shape[0]
    rank = 0 if h is None else h.shape[1]
    grid = (cdiv(rows, tile.block_m) * cdiv(out_features, tile.block_n),)
    _prefill_linear_kernel[grid](
        x,
        codes,
        scale,
        offset,
        codebook,
        h,
        lora_B,
        bias,
        y,
        rows,
        out_features,
        in_features,
        rank,
        scale.shape[1],
        x.stride(0),
        codes.stride(0),
        scale.stride(0),
        y.stride(0),
        *((0, 0) if lora_B is None else lora_B.stride()),
        **decoding,
        GROUP=group_size,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_R=block_r(rank),
        SWIZZLE=8,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        enable_fp_fusion=False,  # weights as `dequantize` gives them, product and sum rounded each
    )
    return y
