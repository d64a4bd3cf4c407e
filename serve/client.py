"""Clients for servers that speak text-generation-inference's contract, 0.8 to 3.3: the embedded one and the original.

    client = Client("http://127.0.0.1:8082")
    print(client.generate("### Human: hello\\n### Assistant:", max_new_tokens=20).text)
    for piece in client.generate_stream("Once upon", temperature=0.7, seed=1):
        print(piece.text, end="", flush=True)
    print(client.chat([{"role": "user", "content": "hello"}]).content)

``AsyncClient`` has the same methods as coroutines and async iterators. What can pass (429, 502-504, connection refused while a
server loads) is tried again with growing pauses; nothing is repeated once a token has arrived. All else is a ``ClientError``.
"""

import time
from typing import Any, Callable, Dict, Iterator, Tuple

import requests

from . import replies
from .async_client import AsyncClient  # noqa: F401
from .calls import Ending, Lines, Messages, Settings, chat_body, generate_body, reason
from .replies import (  # noqa: F401 - the client's vocabulary, importable from here
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
        return replies.generation_of(self._json("POST", "/generate", generate_body(inputs, parameters)))

    def generate_stream(self, inputs: str, **parameters: Any) -> Iterator[Piece]:
        ending = Ending()
        for document in self._events("/generate_stream", generate_body(inputs, parameters)):
            yield ending(replies.piece_of(document))
        ending.check()

    def chat(self, messages: Messages, **parameters: Any) -> Chat:
        return replies.chat_of(self._json("POST", "/v1/chat/completions", chat_body(messages, parameters, False)))

    def chat_stream(self, messages: Messages, **parameters: Any) -> Iterator[ChatPiece]:
        ending = Ending()
        for document in self._events("/v1/chat/completions", chat_body(messages, parameters, True)):
            yield ending(replies.chat_piece_of(document))
        ending.check()

    def tokenize(self, inputs: str) -> Tuple[Place, ...]:
        """The tokens of a prompt as /generate would read it, special ones included (3.3 and the embedded server)."""
        return replies.places_of(self._json("POST", "/tokenize", {"inputs": inputs, "parameters": {}}))

    def chat_tokenize(self, messages: Messages) -> Templated:
        """What the server's chat template makes of ``messages`` (3.3 and the embedded server)."""
        return replies.templated_of(self._json("POST", "/chat_tokenize", chat_body(messages, {}, False)))

    def health(self) -> bool:
        """Whether the server is up and well, asked once."""
        try:
            self._open("GET", "/health", None, self.end()).close()
            return True
        except ClientError:
            return False

    def info(self) -> Dict[str, Any]:
        return dict(self._json("GET", "/info", None))

    def close(self) -> None:
        self._session.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _json(self, method: str, path: str, body: Any) -> Any:
        def once(end: float) -> Any:
            with self._open(method, path, body, end) as response:
                return replies.document(b"".join(self._chunks(response, end)), self.url + path)

        return self._again(once)

    def _events(self, path: str, body: Any) -> Iterator[Dict[str, Any]]:
        """Retries until the first event is there: an overloaded server says so inside the stream."""

        def once(end: float) -> Tuple[requests.Response, Iterator[Dict[str, Any]], Dict[str, Any]]:
            response = self._open("POST", path, body, end)
            try:
                stream = self._documents(response, end)
                return response, stream, next(stream, {})
            except ClientError:
                response.close()
                raise

        response, stream, first = self._again(once)
        with response:
            if first:
                yield first
            yield from stream

    def _documents(self, response: requests.Response, end: float) -> Iterator[Dict[str, Any]]:
        lines = Lines()
        for chunk in self._chunks(response, end):
            for line in lines.add(chunk):
                document = replies.event(line)
                if document is not None:
                    yield document

    def _chunks(self, response: requests.Response, end: float) -> Iterator[bytes]:
        """The body as it arrives."""
        try:
            for chunk in response.iter_content(None):
                self.wait(end)
                yield chunk
        except requests.ConnectionError as error:  # a pause that was too long comes out as this, too
            if "timed out" in str(error).lower():
                raise TimedOut("%s: nothing for %g s" % (self.url, self.timeout)) from None
            raise GenerationFailed("%s: the answer broke off (%s)" % (self.url, reason(error))) from None
        except requests.RequestException as error:
            raise GenerationFailed("%s: the answer broke off (%s)" % (self.url, reason(error))) from None

    def _again(self, once: Callable[[float], Any]) -> Any:
        end, attempt = self.end(), 0
        while True:
            try:
                return once(end)
            except ClientError as error:
                time.sleep(self.pause(attempt, error, end))
                attempt += 1

    def _open(self, method: str, path: str, body: Any, end: float) -> requests.Response:
        try:
            response = self._session.request(method, self.url + path, json=body, stream=True, timeout=self.wait(end))
        except requests.Timeout:
            raise TimedOut("%s: no answer within %g s" % (self.url, self.timeout)) from None
        except requests.RequestException as error:
            raise Unreachable("%s: %s" % (self.url, reason(error))) from None
        if response.status_code != 200:
            with response:
                raise replies.error_of(response.status_code, b"".join(self._chunks(response, end)))
        return response
