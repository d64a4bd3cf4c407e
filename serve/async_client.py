"""The asynchronous client; see ``client``, which exports it."""

import asyncio
import time
from typing import Any, AsyncIterator, Awaitable, Callable, Dict, Tuple, Type

from . import replies
from .calls import FOREVER, MISSING, OTHER, Dialect, Lines, Settings, reason, roomed
from .dialects import Call, Messages, understood
from .results import (
    Chat,
    ChatPiece,
    ClientError,
    Generation,
    GenerationFailed,
    Piece,
    Place,
    Templated,
    TimedOut,
    Unreachable,
)
from .within import within


class AsyncClient(Settings):
    """``Client`` with coroutines and async iterators. Cancelling a task or leaving an iterator closes its connection, which frees
    the server's place at once. Close it, or use ``async with``."""

    def __init__(self, url: str, **settings: Any) -> None:
        import httpx

        super().__init__(url, **settings)
        self._errors = httpx
        limits = httpx.Limits(max_connections=None)
        tls = url.startswith("https://")  # reading the certificates takes 0.1 s: not where there is nothing to verify
        self._http = httpx.AsyncClient(headers=self.headers, timeout=self.timeout, limits=limits, trust_env=False, verify=tls)

    async def generate(self, inputs: str, **parameters: Any) -> Generation:
        return await self._whole(lambda dialect: dialect.generate(inputs, parameters, False))

    def generate_stream(self, inputs: str, **parameters: Any) -> AsyncIterator[Piece]:
        return self._pieces(lambda dialect: dialect.generate(inputs, parameters, True))

    async def chat(self, messages: Messages, **parameters: Any) -> Chat:
        return await self._whole(lambda dialect: dialect.chat(messages, parameters, False))

    def chat_stream(self, messages: Messages, **parameters: Any) -> AsyncIterator[ChatPiece]:
        return self._pieces(lambda dialect: dialect.chat(messages, parameters, True))

    async def tokenize(self, inputs: str) -> Tuple[Place, ...]:
        return await self._whole(lambda dialect: dialect.tokenize(inputs), OTHER)

    async def chat_tokenize(self, messages: Messages) -> Templated:
        return await self._whole(lambda dialect: dialect.chat_tokenize(messages))

    async def health(self) -> bool:
        """Whether the server is up and well, asked once."""
        try:
            await (await self._open("GET", "/health", None, self.end())).aclose()
            return True
        except ClientError:
            return False

    async def info(self) -> Dict[str, Any]:
        return dict(await self._json("GET", "/info", None, self.end()))

    async def wait_ready(self, seconds: float = 600.0) -> None:
        """Return when the server is up and well, asking about every half second; TimedOut."""
        end = time.monotonic() + seconds
        while not await self.health():
            if time.monotonic() > end:
                raise TimedOut("%s: not ready within %g s" % (self.url, seconds))
            await asyncio.sleep(0.5)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _whole(self, make: Callable[[Dialect], Call], strange: Tuple[Type[ClientError], ...] = MISSING) -> Any:
        async def once(end: float) -> Any:
            call = await self._call(make, end)
            return understood(call.read, await self._json("POST", call.path, call.body, end))

        return await self._taught(once, strange)

    async def _pieces(self, make: Callable[[Dialect], Call]) -> AsyncIterator[Any]:
        async def begun(end: float) -> Any:
            call = await self._call(make, end)
            return (call.pieces(), *await self._begin(call.path, call.body, end))

        pieces, response, documents, first = await self._taught(begun)
        try:
            for piece in pieces.add(first) if first else ():
                yield piece
            async for document in documents:
                for piece in pieces.add(document):
                    yield piece
            for piece in pieces.end():
                yield piece
        finally:
            await response.aclose()

    async def _call(self, make: Callable[[Dialect], Call], end: float) -> Call:
        call = make(self.dialect)
        return call if call.room is None else roomed(call, await self._maybe("POST", "/tokenize", call.room, end))

    async def _taught(self, once: Callable[[float], Awaitable[Any]], strange: Tuple[Type[ClientError], ...] = MISSING) -> Any:
        """``once(end)``, and again if an error of the ``strange`` kinds comes from a server of another kind."""
        end = self.end()
        try:
            return await once(end)
        except strange as error:
            models = await self._maybe("GET", "/v1/models", None, end)
            self.adopt(error, models, await self._maybe("GET", "/version", None, end))
            return await once(end)

    async def _maybe(self, method: str, path: str, body: Any, end: float) -> Any:
        """The answer of a route that may be missing, or None."""
        try:
            return await self._json(method, path, body, end)
        except ClientError:
            return None

    async def _json(self, method: str, path: str, body: Any, end: float = FOREVER) -> Any:
        async def once() -> Any:
            response = await self._open(method, path, body, end)
            try:
                return replies.document(await self._read(response, end), self.url + path)
            finally:
                await response.aclose()

        return await self._again(once, end)

    async def _begin(self, path: str, body: Any, end: float) -> Any:
        """A stream with its first document. Retries until that is there: an overloaded server says so inside the stream."""

        async def once() -> Any:
            response = await self._open("POST", path, body, end)
            stream = self._documents(response, end)
            try:
                return response, stream, await stream.__anext__()
            except StopAsyncIteration:
                return response, stream, {}
            except BaseException:
                await response.aclose()
                raise

        return await self._again(once, end)

    async def _documents(self, response: Any, end: float) -> AsyncIterator[Dict[str, Any]]:
        lines = Lines()
        async for chunk in self._chunks(response, end):
            for line in lines.add(chunk):
                document = replies.event(line)
                if document is not None:
                    yield document

    async def _chunks(self, response: Any, end: float) -> AsyncIterator[bytes]:
        """The body as it arrives. With a deadline each read gets what is left of it: the library's timeout does not shrink."""
        chunks = response.aiter_bytes()
        try:
            while True:
                left, read = self.wait(end), chunks.__anext__()
                yield await (read if self.deadline is None else within(read, left))
        except StopAsyncIteration:
            return
        except (asyncio.TimeoutError, self._errors.TimeoutException):
            self.wait(end)
            raise TimedOut("%s: nothing for %g s" % (self.url, self.timeout)) from None
        except self._errors.HTTPError as error:
            raise GenerationFailed("%s: the answer broke off (%s)" % (self.url, reason(error))) from None

    async def _read(self, response: Any, end: float) -> bytes:
        return b"".join([chunk async for chunk in self._chunks(response, end)])

    async def _again(self, once: Callable[[], Awaitable[Any]], end: float) -> Any:
        attempt = 0
        while True:
            try:
                return await once()
            except ClientError as error:
                await asyncio.sleep(self.pause(attempt, error, end))
                attempt += 1

    async def _open(self, method: str, path: str, body: Any, end: float) -> Any:
        request = self._http.build_request(method, self.url + path, json=body, timeout=self.wait(end))
        try:
            response = await self._http.send(request, stream=True)
        except self._errors.TimeoutException:
            self.wait(end)
            raise TimedOut("%s: no answer within %g s" % (self.url, self.timeout)) from None
        except self._errors.HTTPError as error:
            raise Unreachable("%s: %s" % (self.url, reason(error))) from None
        if response.status_code != 200:
            try:
                text = await self._read(response, end)
            finally:
                await response.aclose()
            raise replies.error_of(response.status_code, text, response.headers.get("retry-after", ""))
        return response
