"""The /v1 routes: OpenAI's request fields in terms of the native ones, and its bodies and chunks as the original writes them."""

import asyncio
import time
from typing import Any, AsyncGenerator, Dict, List, Optional

import msgspec

from .errors import ApiError, bad_tools
from .params import Parameters, Request
from .row import Job
from .service import Service
from .shapes import DONE, Token, data


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Body(msgspec.Struct):
    """Answers, chat chunks and the last chunk of a completion; ``id`` is always empty, as in the original."""

    object: str
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: List[Any]
    usage: Optional[Usage]


class CompletionChunk(msgspec.Struct):
    """The other chunks of a completion: another order and no usage."""

    object: str
    id: str
    created: int
    choices: List[Any]
    model: str
    system_fingerprint: str


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: None
    finish_reason: str


class OpenAI:
    """Bodies and streams for one service."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def chat_prompt(self, body: Dict[str, Any]) -> Request:
        """The conversation as one prompt. Errors of template and tools come before any stream."""
        if body["tools"] and body["tool_choice"] != "none":
            if body["response_format"] is not None:
                raise bad_tools("Grammar and tools are mutually exclusive")
            raise bad_tools("tools are not supported")
        text = await self.service.aside(self.service.text.render, body["messages"])
        presence = body["presence_penalty"]
        parameters = Parameters(
            max_new_tokens=body["max_tokens"],
            repetition_penalty=None if presence is None else presence + 2.0,  # the original's reading of it
            frequency_penalty=body["frequency_penalty"],
            top_p=body["top_p"],
            seed=body["seed"],
            stop=body["stop"] or [],
            top_n_tokens=body["top_logprobs"],
            grammar=body["response_format"],
            details=True,
            **_temperature(body["temperature"]),
        )
        return Request(text, parameters, bool(body["stream"]), special=False)

    def chat_answer(self, body: Dict[str, Any], job: Job) -> Body:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": job.generated_text},
            "logprobs": _logprobs(job.tokens, job.top_tokens) if body["logprobs"] else None,
            "finish_reason": _reason(job.finish_reason),
        }
        return self._chat_body(body, "chat.completion", int(time.time()), [choice], _usage([job]))

    async def chat_events(self, body: Dict[str, Any], prompt: Request) -> AsyncGenerator[bytes, None]:
        created = int(time.time())
        events = self.service.stream(prompt)
        usage = None
        try:
            async for job, event in events:
                if isinstance(event, bytes):
                    yield event
                    continue
                usage = _usage([job])
                choice = {
                    "index": 0,
                    "delta": {"role": "assistant", "content": "" if event.token.special else event.token.text},
                    "logprobs": _logprobs([event.token], [event.top]) if body["logprobs"] else None,
                    "finish_reason": _reason(event.finish_reason) if event.finish_reason else None,
                }
                yield data(self._chat_body(body, "chat.completion.chunk", created, [choice], None))
            if (body["stream_options"] or {}).get("include_usage"):
                yield data(self._chat_body(body, "chat.completion.chunk", created, [], usage))
        except ApiError as error:
            yield data(_error(error))
        finally:
            await events.aclose()
        yield DONE

    def prompts(self, body: Dict[str, Any]) -> List[Request]:
        """One native request per prompt of a completion request."""
        if body["suffix"] is not None:
            raise ApiError(
                422,
                "suffix not supported",
                "Suffix is not supported and can be achieved by preprocessing the prompt.",
                "validation",
            )
        most = self.service.limits.max_client_batch_size
        if len(body["prompt"]) > most:
            raise ApiError(
                422, "batch size exceeded", "Number of prompts exceeds the maximum allowed batch size of %d" % most, "validation"
            )
        parameters = Parameters(
            max_new_tokens=body["max_tokens"],
            repetition_penalty=body["repetition_penalty"],
            frequency_penalty=body["frequency_penalty"],
            top_p=body["top_p"],
            seed=body["seed"],
            stop=body["stop"] or [],
            details=True,
            **_temperature(body["temperature"]),
        )
        return [Request(prompt, parameters) for prompt in body["prompt"]]

    async def complete(self, prompts: List[Request]) -> Body:
        created = int(time.time())
        tasks = [asyncio.ensure_future(self.service.generate(prompt)) for prompt in prompts]
        try:
            jobs = [best for best, _ in await asyncio.gather(*tasks)]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        choices = [CompletionChoice(index, job.generated_text, None, _reason(job.finish_reason)) for index, job in enumerate(jobs)]
        return self._completion_body(created, choices, _usage(jobs))

    async def completion_events(self, prompts: List[Request]) -> AsyncGenerator[bytes, None]:
        """The chunks of all prompts as they come; ``choices[0].index`` tells them apart."""
        created = int(time.time())
        chunks: asyncio.Queue[Optional[bytes]] = asyncio.Queue()
        tasks = [
            asyncio.ensure_future(self._completion_chunks(index, prompt, created, chunks)) for index, prompt in enumerate(prompts)
        ]
        try:
            ended = 0
            while ended < len(tasks):
                chunk = await chunks.get()
                if chunk is None:
                    ended += 1
                else:
                    yield chunk
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        yield DONE

    async def _completion_chunks(self, index: int, prompt: Request, created: int, chunks: "asyncio.Queue[Optional[bytes]]") -> None:
        events = self.service.stream(prompt)
        try:
            async for job, event in events:
                if isinstance(event, bytes):
                    chunks.put_nowait(event)
                    continue
                text = "" if event.token.special else event.token.text
                choice = CompletionChoice(index, text, None, event.finish_reason or "")
                if event.finish_reason:
                    chunks.put_nowait(data(self._completion_body(created, [choice], _usage([job]))))
                else:
                    chunks.put_nowait(
                        data(CompletionChunk("text_completion", "", created, [choice], self._model(None), self._fingerprint()))
                    )
        except ApiError as error:
            chunks.put_nowait(data(_error(error)))
        finally:
            await events.aclose()
            chunks.put_nowait(None)

    def _completion_body(self, created: int, choices: List[CompletionChoice], usage: Usage) -> Body:
        return Body("text_completion", "", created, self._model(None), self._fingerprint(), choices, usage)

    def _chat_body(self, body: Dict[str, Any], kind: str, created: int, choices: List[Any], usage: Optional[Usage]) -> Body:
        return Body(kind, "", created, self._model(body["model"]), self._fingerprint(), choices, usage)

    def _model(self, asked: Optional[str]) -> str:
        """Any name but ``tgi`` is echoed."""
        return asked if asked and asked != "tgi" else str(self.service.info["model_id"])

    def _fingerprint(self) -> str:
        return "%s-%s" % (self.service.info["version"], self.service.info["docker_label"] or "native")


def _temperature(value: Optional[float]) -> Dict[str, Any]:
    """0 means greedy, absent means sampling at 1."""
    return {"do_sample": False, "temperature": None} if value == 0 else {"do_sample": True, "temperature": value}


def _reason(reason: str) -> str:
    return "stop" if reason == "eos_token" else reason


def _usage(jobs: List[Job]) -> Usage:
    prompt, completion = sum(len(job.accepted.ids) for job in jobs), sum(len(job.tokens) for job in jobs)
    return Usage(prompt, completion, prompt + completion)


def _logprobs(tokens: List[Token], top: List[List[Token]]) -> Dict[str, Any]:
    def each(token: Token, others: List[Token]) -> Dict[str, Any]:
        likeliest = [{"token": one.text, "logprob": one.logprob} for one in others]
        return {"token": token.text, "logprob": token.logprob, "top_logprobs": likeliest}

    return {"content": [each(token, top[place] if place < len(top) else []) for place, token in enumerate(tokens)]}


def _error(error: ApiError) -> Dict[str, Any]:
    """The error event of an OpenAI stream: its code is 422 whatever happened."""
    return {"error": {"message": error.text, "http_status_code": 422}}
