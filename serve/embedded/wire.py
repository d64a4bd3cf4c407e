"""ASGI pieces: reading bodies within a limit, noticing that the client has gone, and streams of events."""

import asyncio
import hmac
import logging
from typing import Any, AsyncGenerator, Awaitable, Dict, FrozenSet, List, Optional, Tuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from . import serde
from .errors import ApiError
from .shapes import encode

LOG = logging.getLogger("pipedock.serve")
STREAM_HEADERS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


class ClientGone(Exception):
    """The client closed the connection before its answer was ready."""


async def read_json(request: Request, check: serde.Check, limit: int) -> Any:
    """The checked body, or serde.BodyError with the code and text of the original's extractor."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
        raise serde.BodyError(415, "Expected request with `Content-Type: application/json`")
    too_long = serde.BodyError(413, "Failed to buffer the request body: length limit exceeded")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise too_long
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_long
        parts.append(part)
    return serde.parse(b"".join(parts), check)


async def until_gone(receive: Receive, work: Awaitable[Any]) -> Any:
    """The result of ``work``, which is cancelled (ClientGone) when the client closes the connection."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone()
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events from an async generator, which is closed at once when the client goes."""

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Optional[Dict[str, str]] = None) -> None:
        super().__init__()
        self._events = events
        self._more = [(key.encode("latin-1"), value.encode("latin-1")) for key, value in (headers or {}).items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS + self._more})
        try:
            await until_gone(receive, self._pump(send))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGone:
            pass
        finally:
            await self._events.aclose()

    async def _pump(self, send: Send) -> None:
        async for chunk in self._events:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})


def json_response(body: Any, status: int = 200, headers: Optional[Dict[str, str]] = None) -> Response:
    return Response(encode(body), status, headers, "application/json")


async def on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return json_response(error.body(), error.status)


async def on_body_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, serde.BodyError)
    return Response(error.text, error.status, media_type="text/plain")


async def on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def empty(request: Request, error: Exception) -> Response:
    """404 and 405: the code alone."""
    return Response(status_code=getattr(error, "status_code", 500), headers=getattr(error, "headers", None))


class Cut:
    """A request that is still under way when the server's time to stop is over ends with one line, and with a 503 where its answer
    has not begun, instead of a traceback and a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noted(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            LOG.warning("%s was cut: it was not done when the server had to stop", scope.get("path", "a request"))
            if scope["type"] == "http" and not begun:
                await Response("the server is stopping", 503, media_type="text/plain")(scope, receive, send)


class ApiKey:
    """401 with an empty body unless ``Authorization: Bearer KEY`` is right, on the given (method, path) pairs.

    The original compares the whole header in lower case; here also in constant time.
    """

    def __init__(self, app: ASGIApp, key: str, guarded: FrozenSet[Tuple[str, str]]) -> None:
        self._app, self._guarded = app, guarded
        self._wanted = ("Bearer " + key).lower().encode("utf-8")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (scope["method"], scope["path"]) in self._guarded:
            given: List[bytes] = [value for name, value in scope["headers"] if name == b"authorization"]
            if not given or not hmac.compare_digest(given[0].decode("latin-1").lower().encode("utf-8"), self._wanted):
                await Response(status_code=401)(scope, receive, send)
                return
        await self._app(scope, receive, send)
