"""What is known of a device: one record, for its kernels' configurations, the choice between kernels and launches.

Importing this module touches no device and imports no Triton. The figures are counted (products, instructions:
docs/gpu_kernels.md) or assumed (marked so); none is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache

import torch

OLDEST = 80  # The kernels need bfloat16 tensor cores and asynchronous copies.


@dataclass(frozen=True)
class Device:
    """A device, or what devices of one compute capability have in common.

    capability: 10 * major + minor, 90 for compute capability 9.0.
    multiprocessors: their number; in `DEVICES` that of a common card.
    shared_memory: bytes that one program may have.
    products: 16-bit multiply-adds per clock of one multiprocessor's tensor cores.
    l2_bytes: bytes that L2 moves per clock, assumed.
    chunk_bytes: size of a dense chunk that stays in L2 between its decoding and its product.
    instructions: instructions per weight of the fused loops, by kernel and bits.
    ptx: whether kernels may hold inline PTX, which Triton's interpreter does not run.
    """

    capability: int
    multiprocessors: int
    shared_memory: int
    products: int
    l2_bytes: int
    chunk_bytes: int
    instructions: dict[str, dict[int, int]] = field(hash=False)
    ptx: bool = True


_AMPERE = {"prefill": {2: 12, 4: 12, 8: 17}, "grad_input": {2: 38, 4: 48, 8: 32}}
_HOPPER = {"prefill": {2: 9, 4: 9, 8: 11}, "grad_input": {2: 11, 4: 11, 8: 10}}
_BLACKWELL = {"prefill": {2: 8, 4: 8, 8: 7}, "grad_input": {2: 11, 4: 11, 8: 9}}
_A100 = Device(80, 108, 163 << 10, 1024, 3000, 16 << 20, _AMPERE)  # It has 40 MB of L2 in two halves.
# By compute capability, of the cards named: A100, A10, Orin, L40S, H200 (50 MB of L2) and B200.
DEVICES = {
    80: _A100,
    86: replace(_A100, capability=86, multiprocessors=72, shared_memory=99 << 10),
    87: replace(_A100, capability=87, multiprocessors=16),
    89: Device(89, 142, 99 << 10, 512, 2000, 24 << 20, _AMPERE),
    90: Device(90, 132, 227 << 10, 2048, 3000, 24 << 20, _HOPPER),
    100: Device(100, 148, 227 << 10, 4096, 4000, 48 << 20, _BLACKWELL),
}
# Tests interpret what an H200 would launch, as that is the device the table's configurations were chosen for; with so
# many multiprocessors small shapes are split, so that the sums of splits are tested as well.
INTERPRETER = replace(DEVICES[90], ptx=False)


def architecture_of(capability: int) -> int:
    """The architecture whose kernels a device runs: its own, but sm_89 for sm_120 and newer, which have the shared
    memory of sm_89 and its kind of tensor cores."""
    return 89 if capability >= 120 else capability


def describe(capability: int) -> Device:
    """The record of `DEVICES` for a compute capability: the newest that is not newer, or the oldest for older ones."""
    architecture = architecture_of(capability)
    return DEVICES[max((known for known in DEVICES if known <= architecture), default=min(DEVICES))]


@cache
def device_of(device: torch.device) -> Device:
    """The record of a CUDA device, which is asked once; `INTERPRETER` for any other."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    return replace(describe(capability), capability=capability, multiprocessors=properties.multi_processor_count)
