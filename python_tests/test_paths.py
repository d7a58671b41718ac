"""Which kernel a product is given to: by rows, shape, bits and device."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from loftq_kernels.triton_kernels.configs import TABLE  # noqa: E402
from loftq_kernels.triton_kernels.device import DEVICES, INTERPRETER, architecture_of, describe, device_of  # noqa: E402
from loftq_kernels.triton_kernels.paths import choose_grad_input, choose_linear  # noqa: E402

SASS = Path(__file__).parent.parent / "bench" / "results" / "sass.json"
BITS = {"nf2": 2, "nf4": 4, "int4": 4, "int8": 8}
H200, A100 = DEVICES[90], DEVICES[80]
COUNTED = (80, 89, 90, 100)


@pytest.mark.parametrize("capability", [*DEVICES, 120])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (1024, 4096), (50257, 768)], ids=str)
def test_every_row_count_has_a_path(shape, bits, capability):
    """decode for few rows; whatever their number, one of the other two beyond."""
    device = replace(describe(capability), capability=capability, multiprocessors=100)
    for rows in (1, 16, 17, 100, 1000, 5000):
        path = choose_linear(rows, *shape, bits, device, half=True)
        assert path in (("decode",) if rows <= 16 else ("prefill", "chunked"))
        assert choose_grad_input(rows, *shape, bits, device, half=True) in ("fused", "chunked")


def test_float32_has_no_large_tiles():
    assert choose_linear(16, 4096, 4096, 4, H200, half=False) == "decode"
    assert choose_linear(17, 4096, 4096, 4, H200, half=False) == "chunked"
    assert choose_grad_input(17, 4096, 4096, 4, H200, half=False) == "chunked"


def test_few_rows_are_fused_and_many_are_not():
    """Chunks cost the same bytes for any number of rows; decoding within the product costs a share of it."""
    for device in (H200, A100):
        assert choose_linear(32, 4096, 4096, 4, device, half=True) == "prefill"
        assert choose_linear(8192, 4096, 4096, 4, device, half=True) == "chunked"
    assert choose_grad_input(256, 4096, 4096, 4, H200, half=True) == "fused"
    assert choose_grad_input(2048, 4096, 4096, 4, A100, half=True) == "chunked"  # Fused, it decodes several times.


def test_small_weights_are_fused():
    """Two launches take longer than their product."""
    assert choose_linear(4096, 256, 256, 4, H200, half=True) == "prefill"


@pytest.mark.parametrize("kernel", ["prefill", "grad_input"])
@pytest.mark.parametrize("capability", COUNTED)
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
    assert all(device.capability == capability for capability, device in DEVICES.items())


def test_capabilities_that_have_no_record_of_their_own():
    """The newest that is not newer; sm_120 is served as sm_89, and capabilities below the oldest have its figures."""
    assert [architecture_of(capability) for capability in (80, 103, 120, 121)] == [80, 103, 89, 89]
    for capability, known in ((75, 80), (88, 87), (103, 100), (120, 89), (121, 89)):
        assert describe(capability) is DEVICES[known]
    # Of one architecture, they differ in what they have of it: shared memory in KiB, from the CUDA programming guide.
    shared = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}
    assert {capability: describe(capability).shared_memory >> 10 for capability in shared} == shared


def test_the_device_of_tensors(monkeypatch):
    """A CUDA device's own capability and multiprocessors beside its architecture's figures; tests interpret an H200."""

    class Properties:
        major, minor, multi_processor_count = 12, 0, 188

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    device = device_of.__wrapped__(torch.device("cuda", 0))
    assert device == replace(DEVICES[89], capability=120, multiprocessors=188) and device.ptx
    assert device_of(torch.device("cpu")) is INTERPRETER == replace(DEVICES[90], ptx=False)


def test_importing_touches_no_device_and_no_triton():
    code = """
import sys, torch
torch.cuda.get_device_properties = torch.cuda.is_available = torch.cuda._lazy_init = None  # whoever asks, fails
from loftq_kernels.triton_kernels import configs, device, paths
assert "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
