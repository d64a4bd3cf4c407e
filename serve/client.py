"""Clients for servers that speak text-generation-inference's contract, 0.8 to 3.3 (the embedded one and the original), and vLLM.

    client = Client("http://127.0.0.1:8082")
    print(client.generate("### Human: hello\\n### Assistant:", max_new_tokens=20).text)
    for piece in client.generate_stream("Once upon", temperature=0.7, seed=1):
        print(piece.text, end="", flush=True)
    print(client.chat([{"role": "user", "content": "hello"}]).content)

``AsyncClient`` has the same methods as coroutines and async iterators. What can pass (429, 502-504, connection refused while a
server loads) is tried again with growing pauses; nothing is repeated once a token has arrived. All else is a ``ClientError``.
A server without /generate that lists models under /v1 is spoken to through its OpenAI routes from then on, which is said once.
"""

import time
from typing import Any, Callable, Dict, Iterator, Tuple, Type

import requests

from . import replies
from .async_client import AsyncClient  # noqa: F401
from .calls import FOREVER, MISSING, OTHER, Dialect, Lines, Settings, reason, roomed
from .dialects import Call, Messages, understood
from .results import (  # noqa: F401 - the client's vocabulary, importable from here
    Chat,
    ChatPiece,
    ClientError,
    Generation,
    GenerationFailed,
    Invalid,
    NotFound,
    Overloaded,
    Piece,
    Place,
    Templated,
    TimedOut,
    Token,
    Unauthorized,
    Unavailable,
    Unreachable,
)


class Client(Settings):
    """Synchronous, one connection pool, usable from several threads. ``parameters``: the names of the server's (max_new_tokens,
    temperature, stop, seed, ...; for chat OpenAI's: max_tokens, ...); None leaves one out."""

    def __init__(self, url: str, **settings: Any) -> None:
        super().__init__(url, **settings)
        self._session = requests.Session()
        self._session.trust_env = False  # no proxies, and no netrc that would replace the key
        self._session.headers.update(self.headers)

    def generate(self, inputs: str, **parameters: Any) -> Generation:
        return self._whole(lambda dialect: dialect.generate(inputs, parameters, False))

    def generate_stream(self, inputs: str, **parameters: Any) -> Iterator[Piece]:
        """Closing the iterator, or an exception (Ctrl-C) while it is read, closes the connection, which stops the server."""
        return self._pieces(lambda dialect: dialect.generate(inputs, parameters, True))

    def chat(self, messages: Messages, **parameters: Any) -> Chat:
        return self._whole(lambda dialect: dialect.chat(messages, parameters, False))

    def chat_stream(self, messages: Messages, **parameters: Any) -> Iterator[ChatPiece]:
        return self._pieces(lambda dialect: dialect.chat(messages, parameters, True))

    def tokenize(self, inputs: str) -> Tuple[Place, ...]:
        """The tokens of a prompt as the server would read it, special ones included (not at 0.8)."""
        return self._whole(lambda dialect: dialect.tokenize(inputs), OTHER)

    def chat_tokenize(self, messages: Messages) -> Templated:
        """What the server's chat template makes of ``messages`` (not at 0.8; vLLM tells ids only)."""
        return self._whole(lambda dialect: dialect.chat_tokenize(messages))

    def health(self) -> bool:
        """Whether the server is up and well, asked once."""
        try:
            self._open("GET", "/health", None, self.end()).close()
            return True
        except ClientError:
            return False

    def info(self) -> Dict[str, Any]:
        return dict(self._json("GET", "/info", None, self.end()))

    def wait_ready(self, seconds: float = 600.0) -> None:
        """Return when the server is up and well, asking about every half second; TimedOut."""
        end = time.monotonic() + seconds
        while not self.health():
            if time.monotonic() > end:
                raise TimedOut("%s: not ready within %g s" % (self.url, seconds))
            time.sleep(0.5)

    def close(self) -> None:
        self._session.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _whole(self, make: Callable[[Dialect], Call], strange: Tuple[Type[ClientError], ...] = MISSING) -> Any:
        def once(end: float) -> Any:
            call = self._call(make, end)
            return understood(call.read, self._json("POST", call.path, call.body, end))

        return self._taught(once, strange)

    def _pieces(self, make: Callable[[Dialect], Call]) -> Iterator[Any]:
        def begun(end: float) -> Tuple[Any, requests.Response, Iterator[Dict[str, Any]], Dict[str, Any]]:
            call = self._call(make, end)
            return (call.pieces(), *self._begin(call.path, call.body, end))

        pieces, response, documents, first = self._taught(begun)
        with response:
            if first:
                yield from pieces.add(first)
            for document in documents:
                yield from pieces.add(document)
            yield from pieces.end()

    def _call(self, make: Callable[[Dialect], Call], end: float) -> Call:
        call = make(self.dialect)
        return call if call.room is None else roomed(call, self._maybe("POST", "/tokenize", call.room, end))

    def _taught(self, once: Callable[[float], Any], strange: Tuple[Type[ClientError], ...] = MISSING) -> Any:
        """``once(end)``, and again if an error of the ``strange`` kinds comes from a server of another kind."""
        end = self.end()
        try:
            return once(end)
        except strange as error:
            self.adopt(error, self._maybe("GET", "/v1/models", None, end), self._maybe("GET", "/version", None, end))
            return once(end)

    def _maybe(self, method: str, path: str, body: Any, end: float) -> Any:
        """The answer of a route that may be missing, or None."""
        try:
            return self._json(method, path, body, end)
        except ClientError:
            return None

    def _json(self, method: str, path: str, body: Any, end: float = FOREVER) -> Any:
        def once() -> Any:
            with self._open(method, path, body, end) as response:
                return replies.document(b"".join(self._chunks(response, end)), self.url + path)

        return self._again(once, end)

    def _begin(self, path: str, body: Any, end: float) -> Tuple[requests.Response, Iterator[Dict[str, Any]], Dict[str, Any]]:
        """A stream with its first document. Retries until that is there: an overloaded server says so inside the stream."""

        def once() -> Tuple[requests.Response, Iterator[Dict[str, Any]], Dict[str, Any]]:
            response = self._open("POST", path, body, end)
            try:
                stream = self._documents(response, end)
                return response, stream, next(stream, {})
            except BaseException:
                response.close()
                raise

        return self._again(once, end)

    def _documents(self, response: requests.Response, end: float) -> Iterator[Dict[str, Any]]:
        lines = Lines()
        for chunk in self._chunks(response, end):
            for line in lines.add(chunk):
                document = replies.event(line)
                if document is not None:
                    yield document

    def _chunks(self, response: requests.Response, end: float) -> Iterator[bytes]:
        """The body as it arrives. Each read may take what is left of the deadline: a socket's timeout does not shrink by itself."""
        connection = getattr(response.raw, "connection", None)
        socket = getattr(connection, "sock", None)  # None when the server closes after this answer: one read may then be too long
        chunks = response.iter_content(None)
        try:
            while True:
                if socket is not None:
                    socket.settimeout(self.wait(end))
                chunk = next(chunks, None)
                if chunk is None:
                    return
                self.wait(end)
                yield chunk
        except requests.RequestException as error:
            self.wait(end)
            if "timed out" in str(error).lower():  # a pause that was too long comes as a ConnectionError
                raise TimedOut("%s: nothing for %g s" % (self.url, self.timeout)) from None
            raise GenerationFailed("%s: the answer broke off (%s)" % (self.url, reason(error))) from None

    def _again(self, once: Callable[[], Any], end: float) -> Any:
        attempt = 0
        while True:
            try:
                return once()
            except ClientError as error:
                time.sleep(self.pause(attempt, error, end))
                attempt += 1

    def _open(self, method: str, path: str, body: Any, end: float) -> requests.Response:
        try:
            response = self._session.request(method, self.url + path, json=body, stream=True, timeout=self.wait(end))
        except requests.Timeout:
            self.wait(end)
            raise TimedOut("%s: no answer within %g s" % (self.url, self.timeout)) from None
        except requests.RequestException as error:
            raise Unreachable("%s: %s" % (self.url, reason(error))) from None
        if response.status_code != 200:
            with response:
                text = b"".join(self._chunks(response, end))
            raise replies.error_of(response.status_code, text, response.headers.get("retry-after", ""))
        return response
