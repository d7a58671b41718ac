"""Which backend serves an op: the names that ``backend=`` accepts, and where their kernels are taken from."""

from __future__ import annotations

from types import ModuleType

import torch

from loftq_kernels.ops import extension, reference, triton_backend, triton_routes

BACKENDS = ("reference", "cpu", "triton")


def available_backends() -> tuple[str, ...]:
    """The names that ``backend=`` accepts on this machine."""
    triton_device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    missing = {
        "cpu": extension.library is None,
        "triton": triton_routes.unavailable(triton_device) is not None,
    }
    return tuple(name for name in BACKENDS if not missing.get(name))


def select_backend(backend: str | None, device: torch.device) -> str | None:
    """Check that ``backend`` exists and takes tensors of device; None becomes "reference" where there is no other."""
    if backend is None:
        return None if extension.library is not None else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {BACKENDS} (None: by the device of the tensors)")
    if backend == "cpu" and extension.library is None:
        raise RuntimeError(
            f"backend='cpu' needs the compiled extension, which did not load ({extension.LOAD_ERROR}); "
            f"{extension.HOW_TO_BUILD}"
        )
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend='cpu' takes CPU tensors, got {device}")
    if backend == "triton":
        reason = triton_routes.unavailable(device)
        if reason is not None:
            raise ValueError(f"backend='triton' cannot take tensors on {device}: {reason}")
    return backend


def kernels_of(backend: str | None, device: torch.device) -> ModuleType | torch._ops._OpNamespace:
    """Where the op functions come from: the dispatcher, or a backend's module when that backend is forced."""
    selected = None if backend is None else select_backend(backend, device)
    if selected == "reference":
        return reference
    # CUDA tensors reach Triton through the dispatcher, which has the derivatives; only tests interpret Triton.
    return triton_backend if selected == "triton" and device.type == "cpu" else torch.ops.loftq_kernels
