"""transformers' OpenAI-compatible server, ``transformers serve``, over one quantized model and named adapters of it.

Server, endpoints and generation are transformers' own (`transformers.cli.serve.Serve`). Here is what it does not have:
names that stand for adapters of one model in memory, and a refusal of every other name, where it would download or load
what a request asks for. Private API of transformers is used in `_built` alone, and by the names in `_PRIVATE`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import fastapi  # noqa: F401
    import openai  # noqa: F401, for transformers' server
    import transformers
    import uvicorn
except ImportError as error:
    raise ImportError(f"the server needs {error.name}: pip install 'loftq_kernels[serve]'") from error

from loftq_kernels.checkpoints.architecture import model_class
from loftq_kernels.checkpoints.hosted import read_config
from loftq_kernels.checkpoints.native import load_quantized
from loftq_kernels.integrations.register import register_all
from loftq_kernels.integrations.serving_requests import NoSuchModel, Stopping, guard, streamers
from loftq_kernels.nn.named_adapters import active_adapters, set_adapter

_TRIED = "5.20 to 5.24"
_UNKNOWN = f"transformers {transformers.__version__} has another server than those of {_TRIED}, which can be extended"

try:
    from transformers.cli.serve import Serve
    from transformers.cli.serving.utils import GenerateManager
except ImportError as error:
    raise ImportError(f"{_UNKNOWN}: {error}") from error

# What becomes ours of the server that `Serve` makes: attribute of it -> its methods.
_PRIVATE = {
    "_model_manager": ("process_model_name", "load_model_and_processor"),
    "_generation_state": ("get_manager",),
}
_SECONDS_TO_STOP = 30  # for one forward pass of a long prompt, and for clients that do not read their answers


def load(folder: Path, device: str) -> tuple[Any, Any]:
    """The model of a quantized folder and its tokenizer or processor, read from that folder alone.

    Raises ValueError for a model that the server has no endpoint for, and OSError where there is no tokenizer.
    """
    _check_kind(folder)
    try:
        processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise OSError(f"{folder} has no tokenizer: copy its files there from the folder of the dense model") from error
    register_all()  # The quantizer: the process of the command may not have asked for it yet.
    return load_quantized(folder, device=device), processor


def _check_kind(folder: Path) -> None:
    """Raise ValueError unless the server can answer with what a folder's model generates."""
    told = read_config(folder).transformers
    kind = model_class(told["class"])
    if not kind.can_generate():
        raise ValueError(
            f"{folder} holds a {told['class']}, which generates no text: transformers' server has no endpoint for "
            "embeddings or classes; load it by from_pretrained"
        )
    config = kind.config_class.from_dict(told["config"])
    if config.is_encoder_decoder and kind.main_input_name == "input_ids":
        raise ValueError(
            f"{folder} holds a {told['class']}, an encoder-decoder of text: transformers' server would cut off the "
            "start of its answers; load it by from_pretrained"
        )


def server(model: Any, processor: Any, *, bases: Sequence[str], adapters: Sequence[str]) -> Server:
    """A server, not started, of a model in memory: its ``run(sockets=[...])`` serves until it is told to exit.

    bases: names of the model without an adapter, the first of which ``/v1/models`` lists. adapters: names under which
    `load_adapter` has loaded some; requests activate them by `set_adapter`, so the model is the server's meanwhile.

    Raises ValueError for an adapter that is not loaded, and ImportError, naming the version, where transformers' server
    is not as it is known here.
    """
    for name in [*adapters, None]:
        set_adapter(model, name)  # A name that is not loaded fails here: in a request's thread nobody would hear of it.
    models = Models(model, processor, bases, adapters)
    config = _built(models).server.config
    config.timeout_graceful_shutdown = _SECONDS_TO_STOP
    guard(config.app, list(models.adapters))
    return Server(config, models)


class _Unstarted(Serve):
    def start_server(self) -> None:
        """`Serve` starts itself when it is made; the models are not in place by then."""


def _built(models: Models) -> Serve:
    """transformers' server, where names of models are looked up in ``models`` alone."""
    serve = _Unstarted(log_level="error", non_blocking=True)
    for place, methods in _PRIVATE.items():
        owner = getattr(serve, place, None)
        if missing := [name for name in methods if not hasattr(owner, name)]:
            raise ImportError(f"{_UNKNOWN}: it has no {place}.{missing[0]}")
        for name in methods:
            setattr(owner, name, getattr(models, name))
    manager = serve._model_manager
    setattr(manager, "list_models" if hasattr(manager, "list_models") else "get_gen_models", models.list_models)
    return serve


class Models:
    """The names that requests may choose by, and what they stand for: one model in memory and adapters of it.

    The methods stand in for those of the same names of transformers' ModelManager and GenerationState.
    """

    def __init__(self, model: Any, processor: Any, bases: Sequence[str], adapters: Sequence[str]):
        self.model, self.processor = model, processor
        self.adapters: Mapping[str, str | None] = {**dict.fromkeys(bases), **{name: name for name in adapters}}
        self.base, self.created = bases[0], int(time.time())
        self._thread = GenerateManager()
        self._managers = {name: _Requests(self._thread, model, own) for name, own in self.adapters.items()}

    def process_model_name(self, name: str) -> str:
        """The name, if it is one of ours. Every endpoint asks here before it looks for a model."""
        if name not in self.adapters:
            raise NoSuchModel(f"there is no model {name!r} here; served are: {', '.join(self.adapters)}")
        return name

    def load_model_and_processor(
        self, name: str, progress_callback: Callable | None = None, gguf_file: str | None = None, **_: Any
    ) -> tuple[Any, Any]:
        """The model, which is there already. name: one that `process_model_name` has let through."""
        if gguf_file is not None:
            raise NoSuchModel(f"there is no model '{name}:{gguf_file}' here; served are: {', '.join(self.adapters)}")
        if progress_callback is not None:
            progress_callback({"status": "ready", "model": name, "cached": True})
        return self.model, self.processor

    def get_manager(self, name: str, use_cb: bool = False) -> GenerateManager:
        """What generates for this name."""
        return self._managers[name]

    def list_models(self) -> list[dict[str, Any]]:
        """What ``GET /v1/models`` says; ``parent`` is the model that an adapter belongs to."""
        named = [self.base, *(name for name, adapter in self.adapters.items() if adapter is not None)]
        card = {"object": "model", "created": self.created, "owned_by": "loftq_kernels"}
        return [{"id": name, **card, "parent": None if name == self.base else self.base} for name in named]

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Every generation, under way or still to begin, fails at its next token; at the end none is under way.

        Without it a server would wait for long answers, and a process that ends while torch computes may crash.
        """

        def refuse(*_: Any) -> None:
            raise Stopping("the server is stopping")

        handle = self.model.register_forward_pre_hook(refuse)
        try:
            yield
            with contextlib.suppress(TimeoutError):
                self._thread.submit(int).result(timeout=_SECONDS_TO_STOP)  # It comes last in the queue.
        finally:
            handle.remove()
            set_adapter(self.model, None)


class _Requests(GenerateManager):
    """Generation for one name, in the thread of all: so the model has each request's own adapter while it answers.

    A thread for each name would also have a team of torch's threads each, which would fight for the processors.
    """

    def __init__(self, shared: GenerateManager, model: Any, adapter: str | None):  # It starts no thread of its own.
        self._shared, self._model = shared, model
        self._active = () if adapter is None else (adapter,)

    def generate_streaming(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        queue, streamer = super().generate_streaming(*args, **kwargs)
        streamers.get().append(streamer)
        return queue, streamer

    def submit(self, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        return self._shared.submit(self._run, fn, *args, **kwargs)

    def async_submit(self, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        return self._shared.async_submit(self._run, fn, *args, **kwargs)

    def _run(self, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        if active_adapters(self._model) != self._active:
            set_adapter(self._model, self._active)
        return fn(*args, **kwargs)


class Server(uvicorn.Server):
    """uvicorn's server, which ends running answers when it is told to exit."""

    def __init__(self, config: uvicorn.Config, models: Models):
        super().__init__(config)
        self.models = models

    async def shutdown(self, sockets: list | None = None) -> None:
        with self.models.stopping():
            await super().shutdown(sockets)
