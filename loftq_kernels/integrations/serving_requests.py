"""Requests that a server refuses, how it says so, and what becomes of those whose client has left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

_MEDIA = {"image_url", "video_url", "audio_url"}
streamers: ContextVar[list[Any]] = ContextVar("streamers")  # those of a request


class NoSuchModel(HTTPException):
    """OpenAI's answer to a wrong model name."""

    code = "model_not_found"

    def __init__(self, message: str):
        super().__init__(404, message)


class Stopping(RuntimeError):
    """A generation was ended because the server is."""


def guard(app: fastapi.FastAPI, names: Sequence[str]) -> None:
    """Let a server, whose models have these names, answer errors in the form of OpenAI's API, which its clients read.

    It refuses requests that name no model, and those that would have it reach for the network or for files.
    """

    @app.exception_handler(HTTPException)
    async def refused(_: fastapi.Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, error.detail, getattr(error, "code", None))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: fastapi.Request, error: RequestValidationError) -> JSONResponse:
        return _error(422, "; ".join(str(own["msg"]) for own in error.errors()))

    @app.exception_handler(ValueError)
    async def invalid(_: fastapi.Request, error: ValueError) -> JSONResponse:
        return _error(400, error)

    @app.exception_handler(KeyError)
    async def incomplete(_: fastapi.Request, error: KeyError) -> JSONResponse:
        return _error(400, f"the request lacks {error}")

    @app.exception_handler(Stopping)
    async def stopping(_: fastapi.Request, error: Stopping) -> JSONResponse:
        return _error(503, error)

    @app.exception_handler(Exception)
    async def failed(_: fastapi.Request, error: Exception) -> JSONResponse:
        return _error(500, f"{type(error).__name__}: {error}")

    @app.middleware("http")
    async def named(request: fastapi.Request, call_next: Callable) -> Any:
        body = None
        if not request.headers.get("content-type", "").startswith("multipart/"):  # uploads of sounds
            with contextlib.suppress(ValueError, RecursionError):  # What is no JSON, the endpoint refuses.
                body = await request.json()
        if isinstance(body, dict) and not isinstance(body.get("model"), str):
            return _error(400, f"the request names no model; served are: {', '.join(names)}")
        if isinstance(body, dict) and (wrong := _misshapen(body)) is not None:
            return _error(400, wrong)
        if isinstance(body, dict) and (source := _outside(body)) is not None:
            return _error(
                400, f"{source!r} is not fetched or opened for a request: images and sounds come as data: URLs"
            )
        return await call_next(request)

    app.add_middleware(_Abandoned)


def _misshapen(body: dict[str, Any]) -> str | None:
    """What of a request has another type than the API says, over which transformers would stumble."""
    for key in ("messages", "tools"):
        value = body.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(one, dict) for one in value)):
            return f"{key} must be a list of objects, got {str(value)[:80]!r}"
    return None


def _outside(body: dict[str, Any]) -> Any:
    """The first image, film or sound of a request that transformers would fetch, or open as a file of this machine."""
    for part in _parts(body):
        for key in _MEDIA & part.keys():
            url = part[key].get("url") if isinstance(part[key], dict) else part[key]
            if not str(url).startswith("data:"):
                return url
        sound = part.get("input_audio")  # A text without its format may be base64, or a file's name.
        if sound is not None and not (isinstance(sound, dict) and sound.get("format")):
            return sound
    return None


def _parts(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The objects that messages consist of; ``input`` may list them without a message around them."""
    items = [item for key in ("messages", "input") if isinstance(body.get(key), list) for item in body[key]]
    for item in items:
        inside = [item.get(key) for key in ("content", "output")] if isinstance(item, dict) else []
        lists = [part for parts in inside if isinstance(parts, list) for part in parts]
        yield from (part for part in (item, *lists) if isinstance(part, dict))


def _error(status: int, message: Any, code: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": str(message), "type": kind, "param": None, "code": code}}, status)


class _Abandoned:
    """Ends the generation of a stream when its request is over, because the client has left, say.

    transformers does so where it is waiting for a token. Where it was sending one, its generator would hear of the end
    at the next garbage collection, and every other client would wait for an answer that nobody reads.
    """

    def __init__(self, app: Callable):
        self._app = app

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        own: list[Any] = []
        streamers.set(own)
        try:
            await self._app(scope, receive, send)
        finally:
            for streamer in own:
                streamer.cancel()
