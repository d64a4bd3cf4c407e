"""The asynchronous client; see ``client``, which exports it."""

import asyncio
from typing import Any, AsyncIterator, Awaitable, Callable, Dict, Tuple

from . import replies
from .calls import Ending, Lines, Messages, Settings, chat_body, generate_body, reason
from .replies import Chat, ChatPiece, ClientError, Generation, GenerationFailed, Piece, Place, Templated, TimedOut, Unreachable


class AsyncClient(Settings):
    """``Client`` with coroutines and async iterators. Cancelling a task or leaving an iterator closes its connection, which frees
    the server's place at once. Close it, or use ``async with``."""

    def __init__(self, url: str, **settings: Any) -> None:
        import httpx

        super().__init__(url, **settings)
        self._errors = httpx
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(headers=self.headers, timeout=self.timeout, limits=limits, trust_env=False)

    async def generate(self, inputs: str, **parameters: Any) -> Generation:
        return replies.generation_of(await self._json("POST", "/generate", generate_body(inputs, parameters)))

    async def generate_stream(self, inputs: str, **parameters: Any) -> AsyncIterator[Piece]:
        ending = Ending()
        async for document in self._events("/generate_stream", generate_body(inputs, parameters)):
            yield ending(replies.piece_of(document))
        ending.check()

    async def chat(self, messages: Messages, **parameters: Any) -> Chat:
        return replies.chat_of(await self._json("POST", "/v1/chat/completions", chat_body(messages, parameters, False)))

    async def chat_stream(self, messages: Messages, **parameters: Any) -> AsyncIterator[ChatPiece]:
        ending = Ending()
        async for document in self._events("/v1/chat/completions", chat_body(messages, parameters, True)):
            yield ending(replies.chat_piece_of(document))
        ending.check()

    async def tokenize(self, inputs: str) -> Tuple[Place, ...]:
        return replies.places_of(await self._json("POST", "/tokenize", {"inputs": inputs, "parameters": {}}))

    async def chat_tokenize(self, messages: Messages) -> Templated:
        return replies.templated_of(await self._json("POST", "/chat_tokenize", chat_body(messages, {}, False)))

    async def health(self) -> bool:
        """Whether the server is up and well, asked once."""
        try:
            await (await self._open("GET", "/health", None, self.end())).aclose()
            return True
        except ClientError:
            return False

    async def info(self) -> Dict[str, Any]:
        return dict(await self._json("GET", "/info", None))

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _json(self, method: str, path: str, body: Any) -> Any:
        async def once(end: float) -> Any:
            response = await self._open(method, path, body, end)
            try:
                return replies.document(await self._whole(response, end), self.url + path)
            finally:
                await response.aclose()

        return await self._again(once)

    async def _events(self, path: str, body: Any) -> AsyncIterator[Dict[str, Any]]:
        """Retries until the first event is there: an overloaded server says so inside the stream."""

        async def once(end: float) -> Any:
            response = await self._open("POST", path, body, end)
            stream = self._documents(response, end)
            try:
                return response, stream, await stream.__anext__()
            except StopAsyncIteration:
                return response, stream, {}
            except (ClientError, asyncio.CancelledError):
                await response.aclose()
                raise

        response, stream, first = await self._again(once)
        try:
            if first:
                yield first
            async for document in stream:
                yield document
        finally:
            await response.aclose()

    async def _documents(self, response: Any, end: float) -> AsyncIterator[Dict[str, Any]]:
        lines = Lines()
        async for chunk in self._chunks(response, end):
            for line in lines.add(chunk):
                document = replies.event(line)
                if document is not None:
                    yield document

    async def _chunks(self, response: Any, end: float) -> AsyncIterator[bytes]:
        try:
            async for chunk in response.aiter_bytes():
                self.wait(end)
                yield chunk
        except self._errors.TimeoutException:
            raise TimedOut("%s: nothing for %g s" % (self.url, self.timeout)) from None
        except self._errors.HTTPError as error:
            raise GenerationFailed("%s: the answer broke off (%s)" % (self.url, reason(error))) from None

    async def _whole(self, response: Any, end: float) -> bytes:
        return b"".join([chunk async for chunk in self._chunks(response, end)])

    async def _again(self, once: Callable[[float], Awaitable[Any]]) -> Any:
        end, attempt = self.end(), 0
        while True:
            try:
                return await once(end)
            except ClientError as error:
                await asyncio.sleep(self.pause(attempt, error, end))
                attempt += 1

    async def _open(self, method: str, path: str, body: Any, end: float) -> Any:
        request = self._http.build_request(method, self.url + path, json=body, timeout=self.wait(end))
        try:
            response = await self._http.send(request, stream=True)
        except self._errors.TimeoutException:
            raise TimedOut("%s: no answer within %g s" % (self.url, self.timeout)) from None
        except self._errors.HTTPError as error:
            raise Unreachable("%s: %s" % (self.url, reason(error))) from None
        if response.status_code != 200:
            try:
                raise replies.error_of(response.status_code, await self._whole(response, end))
            finally:
                await response.aclose()
        return response
