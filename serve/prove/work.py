"""One server, one folder, one codec: the prompts are sent, then everything that can be compared is."""

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Union

from pipeline_train.data.encode import TextCodec
from pipeline_train.data.records import Record
from pipeline_train.errors import UserError

from . import checks, numbers, prompts
from .checks import Answer, Check
from .prompts import Prompt
from .servers import Tgi, Vllm

Say = Callable[[str], None]
TOLERANCE, TOLERANCE_16 = 0.001, 0.02  # nats; the second where log-probabilities themselves are rounded to 16 bits


class Options(NamedTuple):
    """``records``: how many are asked; ``new_tokens``: the length of an answer; ``tolerance``: nats, None: 0.001, or 0.02 where the
    server computes in 16 bits; ``dtype``: what it computes in, where it does not tell; ``prompt_logprobs`` False: a server that
    tells none is fine; ``weights`` False: transformers' model is not loaded, nothing is computed; ``timeout``: seconds."""

    records: int = 6
    new_tokens: int = 16
    tolerance: Optional[float] = None
    dtype: Optional[str] = None
    prompt_logprobs: bool = True
    weights: bool = True
    api_key: Optional[str] = None
    timeout: float = 120.0
    output: Optional[str] = None


class Work:
    """``raw``: config.json of the folder ``model``. ``document``: what is found out about the server and the prompts."""

    def __init__(
        self, server: Union[Tgi, Vllm], codec: TextCodec, model: str, raw: Dict[str, Any], options: Options, say: Say
    ) -> None:
        self.server, self.codec, self.model, self.raw, self.options, self.say = server, codec, model, raw, options, say
        self.document: Dict[str, Any] = {"format": "pipedock-prove/1", "holds": False, "server": server.name, "notes": []}

    def checks(self, records: Sequence[Record], talks: bool) -> List[Check]:
        """All of them, in the order in which one explains the next. ``talks``: there is a chat template. ClientError, UserError,
        RunFailed."""
        asked = self._asked(records)
        self.document["records"] = sorted({prompt.where.partition(", answer")[0] for prompt in asked})
        self._note(asked)
        self.say("asking %s, %d prompts" % (self.server.name, len(asked)))
        answers = checks.ask(self.server, asked, self.options.new_tokens, self.options.prompt_logprobs)
        ids = checks.token_ids(self.server, self.codec, asked, answers)
        chats = checks.chat_ids(self.server, self.codec, asked) if talks else checks.no_chat()
        done = [checks.folder(self.codec, self.model, asked), ids, chats]
        if self.options.weights:
            done += self._computed(answers, [one for one in answers if one.prompt not in ids.wrong])
        return done + [checks.ends(self.codec, answers)]

    def _asked(self, records: Sequence[Record]) -> List[Prompt]:
        longest = self.server.longest - max(self.options.new_tokens, checks.CLOSING_COUNT)
        found: List[Prompt] = []
        for number, some in enumerate(prompts.prompts_of(self.codec, records, longest)):
            if number == self.options.records:
                break
            found += some
        if not found:
            raise UserError("no record is short enough for the %d tokens that %s takes" % (self.server.longest, self.server.name))
        return found

    def _note(self, asked: Sequence[Prompt]) -> None:
        bos = self.codec.tokenizer.bos_token
        if any(prompt.text is not None and prompt.chat_text == "%s%s" % (bos, prompt.text) for prompt in asked):
            self.document["notes"].append(
                "send prompts to /generate without the %s that the chat template writes: the server adds it" % bos
            )
        if any(prompt.text is None for prompt in asked):
            self.document["notes"].append("no text gives training's ids on /generate; use the chat route")

    def _computed(self, answers: Sequence[Answer], right: Sequence[Answer]) -> List[Check]:
        """What needs the weights, of the answers to the ids of training."""
        from .reference import Reference, served_dtype

        dtype = self.document["dtype"] = served_dtype(self.server.dtype, self.options.dtype, self.raw)
        self.say("computing the same with transformers, from %s" % self.model)
        reference = Reference(self.model, dtype)
        tolerance = self.options.tolerance or (TOLERANCE if dtype == "float32" else TOLERANCE_16)
        bounds = reference.bounds([one.ids for one in right], tolerance)
        scored = numbers.score(reference, right)
        done = [numbers.greedy(self.codec, right, scored, bounds)]
        if self.options.prompt_logprobs:
            mute = bool(answers) and not any(one.seen.prompt for one in answers)
            done.insert(0, numbers.prompt_logprobs(self.codec, scored, bounds, self.server.unheard if mute else None))
        wrong = [check for check in done if check.failures and check.compared]
        if wrong:
            wrong[0].failures[0] += "; " + (
                numbers.cause(self.codec, reference, scored, bounds)
                or "the server has another head or other weights than %s, or rounds more than %s does (--dtype)"
                % (self.model, dtype)
            )
        return done
