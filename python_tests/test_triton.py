"""Triton without a GPU: every kernel interpreted on the CPU, in a process of its own, and compiled for every target."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from cubins import SHARED_LIMITS, captured_launches, compile_launch  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import loftq_kernels as lk  # noqa: E402
from loftq_kernels.formats import get_format  # noqa: E402

HERE = Path(__file__).parent


def test_interpreted():
    """Triton decides when a kernel is defined whether it is interpreted: before any other test may have imported it."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu", str(HERE / "test_triton_kernels.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def _packed(format: str, group_size: int, n: int = 4096, k: int = 4096) -> lk.PackedTensor:
    """Shapes and strides of a weight, on the meta device; launchers look at nothing else but the code book."""
    packed = lk.formats.empty_packed(n, k, format, group_size, device="meta")
    packed.codebook = get_format(format).codebook()
    return packed


def _launch(kind: str, tile, format: str, group_size: int, dtype=torch.bfloat16) -> tuple:
    """The one launch of a launcher at 4096 x 4096 with adapter and, forward, bias."""
    from loftq_kernels.triton_kernels import dequantize, grad_input, lora, prefill_linear, tiles

    def empty(*shape: int, dtype=dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    packed = _packed(format, group_size)
    weight = packed.codes, packed.scale, packed.offset, packed.codebook, group_size
    x, h, lora_A, lora_B = empty(512, 4096), empty(512, 16), empty(16, 4096), empty(4096, 16)
    with captured_launches() as launches:
        decoding = tiles.decode_constexprs(tuple(packed.codebook.tolist()), dtype, True)
        if kind == "prefill":
            adapters = h, lora_B.unsqueeze(0), None
            prefill_linear.launch_prefill_linear(x, *weight, decoding, *adapters, empty(4096), empty(512, 4096), tile)
        elif kind == "grad_input":
            grad_input.launch_grad_input(x, *weight, decoding, h, lora_A, empty(512, 4096), tile)
        elif kind == "dequantize":
            dequantize.launch_dequantize(*weight, empty(4096, 4096))
        elif kind == "shrink":
            lora.launch_lora_shrink(x, lora_A.unsqueeze(0), empty(512, dtype=torch.int64), 0.5, 132)
        else:
            lora.launch_lora_expand(empty(512, 4096), h, lora_B.unsqueeze(0), empty(512, dtype=torch.int64))
    return launches[0]


def test_grids_of_a_million_rows(monkeypatch):
    """CUDA takes 2^31 - 1 blocks along x, but 65535 along y and z."""
    from loftq_kernels.triton_kernels import dequantize, grad_input, lora, tiles
    from loftq_kernels.triton_kernels.configs import Key, rows_of_table

    grids, rows = [], 1_000_000

    def run(kernel, *_, grid, **__) -> None:
        grids.append(grid)

    monkeypatch.setattr(JITFunction, "run", run)
    weight = _packed("nf4", 64, rows, 1024)
    stored = weight.codes, weight.scale, weight.offset, weight.codebook, 64
    x, y = (torch.empty(8 * rows, k, dtype=torch.bfloat16, device="meta") for k in (1024, 256))
    dequantize.launch_dequantize(*stored, x[:rows])
    h = lora.launch_lora_shrink(x, x[:16].unsqueeze(0), None, 1.0, 132)
    lora.launch_lora_expand(y, h, y[:16].T.unsqueeze(0), None)
    narrow = _packed("nf4", 64, 256, 1024)
    stored = narrow.codes, narrow.scale, narrow.offset, narrow.codebook, 64
    tile = rows_of_table(Key("grad_input", 90, 4, 64, "tall"))[0]
    decoding = tiles.decode_constexprs(tuple(narrow.codebook.tolist()), torch.bfloat16, True)
    grad_input.launch_grad_input(y, *stored, decoding, None, None, x, tile)
    assert len(grids) == 4
    for first, *others in grids:
        assert first < 2**31 and all(count <= 65535 for count in others)


def _tile_cases() -> list:
    """Every tile of every architecture for nf4; Hopper's largest for other widths, affine scales and groups of 32."""
    from loftq_kernels.triton_kernels.configs import Key, rows_of_table

    cases = []
    for kind in ("prefill", "grad_input"):
        for architecture in (80, 89, 90, 100):
            tiles = rows_of_table(Key(kind, architecture, 4, 64, "tall"))
            cases += [(kind, architecture, tile, "nf4", 64) for tile in tiles]
            if architecture == 100 and kind == "prefill":
                cases += [(kind, architecture, tile, "nf2", 64) for tile in tiles]
            if architecture == 90:
                others = (("nf2", 64), ("int4", 32), ("int8", 128))
                cases += [(kind, architecture, tiles[0], *other) for other in others]
    return cases


@pytest.mark.parametrize("kind, architecture, tile, format, group_size", _tile_cases(), ids=str)
def test_tiles_compile(kind, architecture, tile, format, group_size):
    """No spills, shared memory within the device's, tensor cores used."""
    cubin = compile_launch(*_launch(kind, tile, format, group_size), architecture)
    assert cubin.spills == 0
    assert cubin.shared <= SHARED_LIMITS[architecture]
    assert cubin.instructions["HGMMA" if architecture == 90 else "UTCHMMA" if architecture == 100 else "HMMA"] > 0


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("kind", ["dequantize", "shrink", "expand"])
def test_small_kernels_compile(kind, architecture):
    cubin = compile_launch(*_launch(kind, None, "nf4", 64), architecture)
    assert cubin.spills == 0 and cubin.shared <= SHARED_LIMITS[architecture]
    assert (cubin.tensor_core > 0) == (kind != "dequantize")
