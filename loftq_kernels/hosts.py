"""Libraries whose models save and load themselves: what the package asks of one, and the list of those at work.

`integrations` registers a host as soon as its library is imported. What stands below asks here, and imports neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn


class Host(Protocol):
    """What a library does for its own models."""

    def owns(self, model: nn.Module) -> bool:
        """Whether a model is one of the library's."""

    def adopt(self, model: nn.Module, cfg: Any) -> None:
        """Let the library know of a model of its own that has just been quantized as cfg says (None: as a file did)."""

    def save(self, model: nn.Module, path: Path, max_shard_size: int | str | None) -> None:
        """Write a quantized model the way the library does, replacing one that is there."""

    def load(self, path: Path, device: torch.device) -> nn.Module:
        """The model that the library's own call loads from a folder, in eval mode."""


_hosts: dict[str, Host] = {}


def register(name: str, host: Host) -> None:
    _hosts[name] = host


def host_of(model: nn.Module) -> Host | None:
    """The library that saves and loads a model; None for one that we save ourselves."""
    return next((host for host in _hosts.values() if host.owns(model)), None)


def hosted_parts(model: nn.Module) -> Iterator[tuple[Host, nn.Module]]:
    """The outermost modules of a model, itself among them, that a library saves and loads, each with its library."""
    if (host := host_of(model)) is not None:
        yield host, model
        return
    for child in model.children():
        yield from hosted_parts(child)


def host_named(name: str) -> Host | None:
    """The host of a library that has been imported."""
    return _hosts.get(name)
