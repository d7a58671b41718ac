"""``loftq-kernels serve``: everything is checked and in memory before the port answers; signals end it cleanly."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import signal
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import loftq_kernels as lk
from loftq_kernels.checkpoints import hosted, manifest
from loftq_kernels.cli import preflight

_ADAPTER_CONFIG = "adapter_config.json"
# Read by huggingface_hub and transformers when they are imported: nothing is looked up, downloaded or reported.
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")


def serve(args: argparse.Namespace) -> None:
    _check_folder(args.model_dir)
    adapters = _adapters(args)
    preflight.check_device(args.device)
    os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    from loftq_kernels.integrations import serving  # It says so, where what it needs is missing.

    with _bound(args.host, args.port) as sock:
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, processor = serving.load(args.model_dir, device)
        for name, folder in adapters.items():
            _load_adapter(model, name, folder)
        names = _names(args.model_dir)
        server = serving.server(model, processor, bases=names, adapters=list(adapters))
        sock.listen()  # Whoever has read the line may connect; uvicorn answers in a moment.
        print(f"serving {', '.join([names[0], *adapters])} at {_url(sock)}; Ctrl-C ends it", flush=True)
        _run(server, sock)
    print("stopped")


def _check_folder(folder: Path) -> None:
    """Raise unless a folder holds a quantized transformers model, as far as its JSON files tell."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give one that loftq-kernels quantize has written")
    if not hosted.is_hosted(folder) and not (folder / manifest.CONFIG_NAME).is_file():
        raise ValueError(
            f"{folder} holds no model that loftq_kernels has quantized: loftq-kernels quantize {folder} OUT_DIR makes "
            "one, and transformers serve takes it as it is"
        )
    config = hosted.read_config(folder)
    if config.transformers is None:
        raise ValueError(f"{folder} holds no transformers model, and the server is transformers'")
    config.paths(folder)


def _adapters(args: argparse.Namespace) -> dict[str, Path]:
    """The adapters by name, each in a folder that looks like one of an adapter."""
    adapters: dict[str, Path] = {}
    for name, folder in args.adapter or ():
        if name in adapters or name in _names(args.model_dir):
            raise ValueError(f"--adapter {name}={folder}: {name!r} is the name of {adapters.get(name, args.model_dir)}")
        if not (folder / _ADAPTER_CONFIG).is_file():
            raise FileNotFoundError(f"--adapter {name}={folder}: {folder / _ADAPTER_CONFIG} does not exist")
        adapters[name] = folder
    return adapters


def _names(folder: Path) -> list[str]:
    """What requests may call the model without an adapter; the first is the one that the server lists."""
    return list(dict.fromkeys((folder.resolve().name, str(folder), str(folder.resolve()))))


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that has the port; nobody can connect before the server listens."""
    with contextlib.ExitStack() as stack:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            sock = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError as error:
            raise OSError(
                f"--host {host} --port {port}: {error.strerror}; choose another, --port 0 is any free one"
            ) from error
        yield sock


def _load_adapter(model: torch.nn.Module, name: str, folder: Path) -> None:
    try:
        lk.load_adapter(model, folder, name=name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--adapter {name}={folder}: {error}") from error


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    if not ipaddress.ip_address(host).is_loopback:
        warnings.warn(
            f"{host} is no loopback address: whoever reaches port {port} may ask, without a password", stacklevel=2
        )
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _run(server: Any, sock: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, which uvicorn handles and then raises again."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[sock])
    finally:
        signal.signal(signal.SIGTERM, previous)
