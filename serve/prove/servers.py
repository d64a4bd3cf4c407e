"""The servers that can be proved, each asked in its own way: text-generation-inference 0.8 to 3.3 (the embedded one too), vLLM.

vLLM's routes as its repository has them at 030ea52: vllm/entrypoints/serve/tokenize/protocol.py (prompt | messages, special tokens
added to a prompt and not to a chat; answers count, max_model_len, tokens), vllm/entrypoints/openai/completion/{protocol,serving}.py
(prompt_logprobs, return_token_ids, return_tokens_as_token_ids), GET /version and max_model_len in GET /v1/models.
"""

from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from pipeline_train.data.template import Messages
from pipeline_train.errors import RunFailed, UserError

from ..client import Client, ClientError, Generation, NotFound, TimedOut, Unauthorized, Unavailable, Unreachable

Told = Tuple[int, Optional[float]]  # a token and its log-probability, None where the server tells none


class Seen(NamedTuple):
    """A greedy answer. ``prompt``: what the model was given, [] when the server does not tell. ``finish``: length, eos_token or
    stop_sequence."""

    prompt: List[Told]
    tokens: List[Told]
    finish: str


class Tgi(Client):
    """``name``: for people. ``longest``: tokens of prompt and answer together. ``dtype``: what it computes in, None: not told."""

    tokenizes = "POST /tokenize"
    tells = "details.prefill"
    unheard = (
        "the server tells none of them (details.prefill is empty). Start it with --enable-prefill-logprobs, which 3.2.2 and later "
        "know, or leave them out with --no-prompt-logprobs"
    )

    def learn(self, info: Dict[str, Any]) -> None:
        engine = " (%s)" % info["engine"] if info.get("engine") else ""
        self.name = "text-generation-inference %s%s" % (info["version"], engine)
        prompt = info.get("max_input_tokens") or info.get("max_input_length") or 1000
        self.longest = min(int(prompt), int(info.get("max_total_tokens") or prompt))
        self.dtype: Optional[str] = (info.get("model_dtype") or "").replace("torch.", "") or None

    def text_ids(self, text: str) -> Optional[List[int]]:
        """What /generate makes of a text; None before 1.4, which has no route for that."""
        try:
            return [token.id for token in self.tokenize(text)]
        except NotFound:
            return None

    def chat_ids(self, messages: Messages) -> Optional[Tuple[List[int], Optional[str]]]:
        """(what the chat route makes of messages, the text in between); None before 2.3."""
        try:
            found = self.chat_tokenize(messages)
        except NotFound:
            return None
        return [token.id for token in found.tokens], found.text

    def chat_length(self, messages: Messages) -> Optional[int]:
        """How many tokens a chat really gives the model; None before 1.4."""
        try:
            return self.chat(messages, max_tokens=1, temperature=0.0).prompt_tokens
        except NotFound:
            return None

    def greedy(self, text: str, count: int, prompt: bool = True) -> Seen:
        asked = {"decoder_input_details": True} if prompt else {}
        made: Generation = self.generate(text, max_new_tokens=count, do_sample=False, **asked)
        return Seen(
            [(token.id, token.logprob) for token in made.prefill],
            [(token.id, token.logprob) for token in made.tokens],
            made.finish_reason,
        )


class Vllm(Client):
    """The same questions to vLLM's OpenAI routes. Its chat_ids come without the text in between."""

    tokenizes = "POST /tokenize"
    tells = "prompt_logprobs"
    unheard = "the server tells none of them (prompt_logprobs is empty); leave them out with --no-prompt-logprobs"
    dtype: Optional[str] = None

    def learn(self, version: Dict[str, Any], models: Dict[str, Any]) -> None:
        self.name = "vLLM %s" % version.get("version", "of an unknown version")
        self.model = str(models["data"][0]["id"])
        self.longest = int(models["data"][0].get("max_model_len") or 1000)

    def text_ids(self, text: str) -> Optional[List[int]]:
        return self._ids({"prompt": text})

    def chat_ids(self, messages: Messages) -> Optional[Tuple[List[int], Optional[str]]]:
        ids = self._ids({"messages": messages})
        return None if ids is None else (ids, None)

    def chat_length(self, messages: Messages) -> Optional[int]:
        body = {"model": self.model, "messages": messages, "max_tokens": 1, "temperature": 0}
        length: Optional[int] = (self._json("POST", "/v1/chat/completions", body).get("usage") or {}).get("prompt_tokens")
        return length

    def greedy(self, text: str, count: int, prompt: bool = True) -> Seen:
        """Sampling defaults of the folder's generation_config.json, which vLLM applies, are overruled."""
        body = {"model": self.model, "prompt": text, "max_tokens": count, "temperature": 0, "top_p": 1.0, "repetition_penalty": 1.0,
                "logprobs": 1, "return_tokens_as_token_ids": True, "return_token_ids": True}  # fmt: skip
        document = self._json("POST", "/v1/completions", dict(body, prompt_logprobs=1) if prompt else body)
        choice = document["choices"][0]
        told = choice.get("logprobs") or {}
        tokens = [(int(name.rpartition(":")[2]), value) for name, value in zip(told["tokens"], told["token_logprobs"])]
        stopped = choice.get("finish_reason") == "stop"
        named = isinstance(choice.get("stop_reason"), str)  # a stop text; an end token is None or its id
        finish = "stop_sequence" if stopped and named else "eos_token" if stopped else str(choice.get("finish_reason"))
        return Seen(self._given(text, choice), tokens, finish)

    def _given(self, text: str, choice: Dict[str, Any]) -> List[Told]:
        rows = choice.get("prompt_logprobs") or []
        ids = choice.get("prompt_token_ids") or (self.text_ids(text) if rows else None) or []  # older versions tell no ids
        if len(ids) != len(rows):
            return []
        return [(one, (row or {}).get(str(one), {}).get("logprob")) for one, row in zip(ids, rows)]

    def _ids(self, body: Dict[str, Any]) -> Optional[List[int]]:
        try:
            return list(self._json("POST", "/tokenize", dict(body, model=self.model))["tokens"])
        except NotFound:
            return None


def connect(url: str, api_key: Optional[str], timeout: float) -> "Tgi | Vllm":
    """Find out who answers at ``url``. UserError when nobody does, or nobody that can be proved."""
    settings: Dict[str, Any] = {"api_key": api_key, "timeout": timeout, "retries": 2}
    server = Tgi(url, **settings)
    try:
        info = server._json("GET", "/info", None)
    except NotFound:
        return _vllm(url, settings)
    except ClientError as error:
        raise refused(url, error) from None
    if not isinstance(info, dict) or "version" not in info or not {"max_input_tokens", "max_input_length"} & set(info):
        raise UserError("%s: /info is not text-generation-inference's; expected that server, or vLLM" % url)
    server.learn(info)
    return server


def _vllm(url: str, settings: Dict[str, Any]) -> Vllm:
    server = Vllm(url, **settings)
    try:
        version, models = (server._json("GET", path, None) for path in ("/version", "/v1/models"))
        server.learn(version, models)
    except (NotFound, LookupError, AttributeError, TypeError):
        raise UserError(
            "%s: has neither /info nor /version and /v1/models; expected text-generation-inference or vLLM" % url
        ) from None
    except ClientError as error:
        raise refused(url, error) from None
    return server


def refused(url: str, error: ClientError) -> Exception:
    """What to tell of a server that cannot be asked."""
    why = str(error).replace(url.rstrip("/") + ": ", "")
    if isinstance(error, (Unreachable, TimedOut)):
        return UserError("%s: no server there (%s); start one with pipedock serve --model DIR" % (url, why))
    if isinstance(error, Unauthorized):
        return UserError("%s: the API key is missing or wrong; --api-key-file F sends one" % url)
    if isinstance(error, Unavailable):
        return RunFailed("%s: the server is not ready (%s)" % (url, why))
    return UserError("%s: expected text-generation-inference or vLLM there: %s" % (url, why))
