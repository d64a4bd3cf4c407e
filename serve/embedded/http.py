"""The routes of text-generation-inference 3.3 as a starlette application. The /v1 routes' bodies are in openai.py."""

import time
from typing import Any, Dict, List, Optional

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from . import openapi, params, serde, wire
from .errors import ApiError, unhealthy
from .native import generated, stream_events
from .openai import OpenAI
from .params import Request
from .row import Job
from .serde import Mismatch
from .service import Service
from .shapes import SimpleToken

GUARDED = ("/", "/generate", "/generate_stream", "/v1/chat/completions", "/v1/completions", "/invocations", "/tokenize")


def make_app(
    service: Service, payload_limit: int, compute_type: str, api_key: Optional[str] = None, origins: Optional[List[str]] = None
) -> Starlette:
    """``origins``: who may call from a browser; nobody unless given (the original allows everybody)."""
    routes = Native(service, payload_limit, compute_type).routes()
    middleware = [Middleware(wire.Cut)]
    if origins:
        middleware.append(
            Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["content-type"])
        )
    if api_key:
        guarded = frozenset(("POST", path) for path in GUARDED)
        middleware.append(Middleware(wire.ApiKey, key=api_key, guarded=guarded))
    handlers = {
        ApiError: wire.on_api_error,
        serde.BodyError: wire.on_body_error,
        wire.ClientGone: wire.on_gone,
        ClientDisconnect: wire.on_gone,
        HTTPException: wire.empty,
    }
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


class Native:
    """The handlers. ``compute_type`` goes into a header of every answer."""

    def __init__(self, service: Service, payload_limit: int, compute_type: str) -> None:
        self.service, self.limit, self.compute_type = service, payload_limit, compute_type
        self.openai = OpenAI(service)

    def routes(self) -> List[Route]:
        post = {
            "/": self.compat,
            "/generate": self.generate,
            "/generate_stream": self.generate_stream,
            "/v1/chat/completions": self.chat,
            "/v1/completions": self.completions,
            "/invocations": self.invocations,
            "/tokenize": self.tokenize,
            "/chat_tokenize": self.chat_tokenize,
        }
        get = {
            "/": self.health,
            "/health": self.health,
            "/ping": self.health,
            "/info": self.info,
            "/metrics": self.metrics,
            "/v1/models": self.models,
            "/docs": self.docs,
            "/api-doc/openapi.json": self.openapi,
        }
        both = set(post) & set(get)

        def either(path: str) -> Any:
            async def handler(request: HttpRequest) -> Response:
                return await (post if request.method == "POST" else get)[path](request)

            return handler

        found = [Route(path, either(path), methods=["GET", "POST"]) for path in sorted(both)]
        found += [Route(path, handler, methods=["POST"]) for path, handler in post.items() if path not in both]
        return found + [Route(path, handler, methods=["GET"]) for path, handler in get.items() if path not in both]

    async def compat(self, request: HttpRequest) -> Response:
        return await self._compat(request, await self._body(request, params.compat_request))

    async def generate(self, request: HttpRequest) -> Response:
        return await self._answer(request, await self._body(request, params.generate_request))

    async def generate_stream(self, request: HttpRequest) -> Response:
        return self._stream(await self._body(request, params.generate_request))

    async def chat(self, request: HttpRequest) -> Response:
        return await self._chat(request, await self._body(request, params.chat_request))

    async def completions(self, request: HttpRequest) -> Response:
        return await self._completions(request, await self._body(request, params.completion_request))

    async def invocations(self, request: HttpRequest) -> Response:
        """Whichever of the three kinds of body it is."""

        def check(value: Any, path: serde.Path) -> Any:
            for handler, struct in ((self._compat, params.compat_request), (self._chat, params.chat_request)):
                try:
                    return handler, struct(value, path)
                except Mismatch:
                    continue
            try:
                return self._completions, params.completion_request(value, path)
            except Mismatch:
                raise Mismatch(path, "data did not match any variant of untagged enum SagemakerRequest") from None

        handler, body = await self._body(request, check)
        return await handler(request, body)

    async def tokenize(self, request: HttpRequest) -> Response:
        body = await self._body(request, params.generate_request)
        found = await self.service.aside(self.service.text.offsets, body.inputs, True)
        return wire.json_response([SimpleToken(*one) for one in found])

    async def chat_tokenize(self, request: HttpRequest) -> Response:
        body = await self._body(request, params.chat_request)
        text = await self.service.aside(self.service.text.render, body["messages"])
        found = await self.service.aside(self.service.text.offsets, text, False)
        return wire.json_response({"tokenize_response": [SimpleToken(*one) for one in found], "templated_text": text})

    async def health(self, request: HttpRequest) -> Response:
        if not await self.service.healthy():
            raise unhealthy()
        return Response()

    async def info(self, request: HttpRequest) -> Response:
        return wire.json_response(self.service.info)

    async def metrics(self, request: HttpRequest) -> Response:
        return Response(self.service.metrics.text(), media_type="text/plain; charset=utf-8")

    async def models(self, request: HttpRequest) -> Response:
        name = self.service.info["model_id"]
        return wire.json_response({"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": name}]})

    async def openapi(self, request: HttpRequest) -> Response:
        return wire.json_response(openapi.document())

    async def docs(self, request: HttpRequest) -> Response:
        return Response(openapi.page(), media_type="text/html; charset=utf-8")

    async def _body(self, request: HttpRequest, check: serde.Check) -> Any:
        return await wire.read_json(request, check, self.limit)

    async def _compat(self, request: HttpRequest, body: Request) -> Response:
        return self._stream(body) if body.stream else await self._answer(request, body, as_list=True)

    async def _answer(self, request: HttpRequest, body: Request, as_list: bool = False) -> Response:
        started = time.perf_counter()
        best, others = await wire.until_gone(request.receive, self.service.generate(body))
        answer = generated(body, best, others)
        return wire.json_response([answer] if as_list else answer, headers=self._headers(body.inputs, best, started))

    def _stream(self, body: Request) -> Response:
        headers = {"x-compute-type": self.compute_type, "x-compute-characters": str(len(body.inputs))}
        return wire.EventStream(stream_events(self.service, body), headers)

    async def _chat(self, request: HttpRequest, body: Dict[str, Any]) -> Response:
        prompt = await self.openai.chat_prompt(body)
        if body["stream"]:
            return wire.EventStream(self.openai.chat_events(body, prompt), {"x-compute-type": self.compute_type})
        started = time.perf_counter()
        best, _ = await wire.until_gone(request.receive, self.service.generate(prompt))
        return wire.json_response(self.openai.chat_answer(body, best), headers=self._headers(prompt.inputs, best, started))

    async def _completions(self, request: HttpRequest, body: Dict[str, Any]) -> Response:
        prompts = self.openai.prompts(body)
        if body["stream"]:
            return wire.EventStream(self.openai.completion_events(prompts), {"x-compute-type": self.compute_type})
        return wire.json_response(
            await wire.until_gone(request.receive, self.openai.complete(prompts)), headers={"x-compute-type": self.compute_type}
        )

    def _headers(self, inputs: str, job: Job, started: float) -> Dict[str, str]:
        def ms(seconds: float) -> str:
            return str(int(max(0.0, seconds) * 1000))

        total, inference = time.perf_counter() - started, job.ended - job.started
        return {
            "x-compute-type": self.compute_type,
            "x-compute-time": str(total),
            "x-compute-characters": str(len(inputs)),
            "x-total-time": ms(total),
            "x-prompt-tokens": str(len(job.accepted.ids)),
            "x-generated-tokens": str(len(job.tokens)),
            "x-validation-time": ms(job.submitted - started),
            "x-queue-time": ms(job.started - job.submitted),
            "x-inference-time": ms(inference),
            "x-time-per-token": ms(inference / len(job.tokens)),
        }
