"""Which kernel a product is given to: by rows, shape, bits and device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from loftq_kernels.triton_kernels.configs import TABLE  # noqa: E402
from loftq_kernels.triton_kernels.paths import DEVICES, choose_grad_input, choose_linear, device_of  # noqa: E402

SASS = Path(__file__).parent.parent / "bench" / "results" / "sass.json"
BITS = {"nf2": 2, "nf4": 4, "int4": 4, "int8": 8}
H200, A100 = (90, 132), (80, 108)


@pytest.mark.parametrize("capability", [*DEVICES, 120])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (1024, 4096), (50257, 768)], ids=str)
def test_every_row_count_has_a_path(shape, bits, capability):
    """decode for few rows; whatever their number, one of the other two beyond."""
    for rows in (1, 16, 17, 100, 1000, 5000):
        path = choose_linear(rows, *shape, bits, capability, 100, half=True)
        assert path in (("decode",) if rows <= 16 else ("prefill", "chunked"))
        assert choose_grad_input(rows, *shape, bits, capability, 100, half=True) in ("fused", "chunked")


def test_float32_has_no_large_tiles():
    assert choose_linear(16, 4096, 4096, 4, *H200, half=False) == "decode"
    assert choose_linear(17, 4096, 4096, 4, *H200, half=False) == "chunked"
    assert choose_grad_input(17, 4096, 4096, 4, *H200, half=False) == "chunked"


def test_few_rows_are_fused_and_many_are_not():
    """Chunks cost their bytes whatever the rows are, decoding in the product a share of it."""
    for device in (H200, A100):
        assert choose_linear(32, 4096, 4096, 4, *device, half=True) == "prefill"
        assert choose_linear(8192, 4096, 4096, 4, *device, half=True) == "chunked"
    assert choose_grad_input(256, 4096, 4096, 4, *H200, half=True) == "fused"
    assert choose_grad_input(2048, 4096, 4096, 4, *A100, half=True) == "chunked"  # decodes everything several times


def test_small_weights_are_fused():
    """Two launches take longer than their product."""
    assert choose_linear(4096, 256, 256, 4, *H200, half=True) == "prefill"


@pytest.mark.parametrize("kernel", ["prefill", "grad_input"])
@pytest.mark.parametrize("capability", DEVICES)
def test_instructions_are_those_that_were_counted(capability, kernel):
    """Within 15% of what lies between a kernel's tiles in the last `python -m bench sass`."""
    counted: dict[int, list[float]] = {}
    for row in json.loads(SASS.read_text(encoding="utf-8"))["kernels"]:
        if row["kernel"].startswith(kernel) and row["target"] == f"sm_{capability}":
            counted.setdefault(BITS[row["format"]], []).append(row["instructions/weight"])
    assert set(counted) == {2, 4, 8}
    for bits, figures in counted.items():
        assert 0.85 * min(figures) <= DEVICES[capability].instructions[kernel][bits] <= 1.15 * max(figures)


def test_devices_cover_the_table():
    assert set(DEVICES) >= {key.architecture for key in TABLE}
    assert device_of(86) is DEVICES[80] and device_of(103) is DEVICES[100] and device_of(120) is DEVICES[89]
