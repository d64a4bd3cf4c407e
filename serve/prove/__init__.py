"""The proof of a live server: it reads prompts as they were trained, computes what transformers does, and stops where it should.

document = prove("http://127.0.0.1:8082", "exports/my-model", "run.yaml")

prompts     records of the run (or fixed ones), with training's own ids
servers     text-generation-inference 0.8 to 3.3, the embedded server, vLLM: each asked in its own way
checks      token ids, chat token ids, end of sequence
reference   transformers on the same folder
numbers     log-probabilities and greedy answers against it
difference  what a wrong id looks like
"""

import json
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from pipeline_train import config as configs
from pipeline_train import families
from pipeline_train.data.encode import TextCodec
from pipeline_train.data.records import Record
from pipeline_train.errors import RunFailed, UserError

from ..client import ClientError, Unauthorized
from . import checks, numbers, prompts, servers
from .checks import Answer, Check
from .prompts import Prompt

Say = Callable[[str], None]


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


def prove(
    url: str, model: str, train_config: Optional[str] = None, options: Optional[Options] = None, say: Say = lambda line: None
) -> Dict[str, Any]:
    """Compare the server at ``url`` with the model folder and, given ``train_config`` (run.yaml), with what its run was trained on.

    Returns the document: {holds, server, checks: [{name, holds, compared, failures, ...}], ...}; nothing is written but
    ``options.output``. Raises UserError when there is no such server, folder or run; RunFailed, with the document, when a check
    fails: its message names the check, the record and what differs.
    """
    started = time.perf_counter()
    options = options or Options()
    _check_options(options)
    raw = families.read_config(model) if Path(model).is_dir() else _no_folder(model)
    source, codec, records = _trained(model, train_config, options.records)
    codec.check_vocab(int(raw.get("vocab_size") or 0), "%s/config.json" % model)
    server = servers.connect(url, options.api_key, options.timeout)
    document: Dict[str, Any] = {"format": "pipedock-prove/1", "holds": False, "url": url, "server": server.name, "model": model,
                                "records_of": source}  # fmt: skip
    with server:
        try:
            done = _prove(server, codec, records, model, raw, options, document, say)
        except Unauthorized:
            raise UserError("%s: the API key is missing or wrong; --api-key-file F sends one" % url) from None
        except ClientError as error:
            raise RunFailed("%s: %s" % (url, str(error).replace(url + ": ", "")), document=document) from None
    if train_config is not None:
        done.insert(0, _stored(codec, train_config, records))
    document.update(
        holds=all(check.holds is not False for check in done),
        checks=[check.document() for check in done],
        notes=list(codec.notes),
        seconds=round(time.perf_counter() - started, 3),
    )
    if options.output is not None:
        _write(options.output, document)
    failed = [check for check in done if check.holds is False]
    if failed:
        others = ["%d more there" % (len(failed[0].failures) - 1)] if len(failed[0].failures) > 1 else []
        others += ["%s too" % check.name for check in failed[1:]]
        more = " (%s)" % ", ".join(others) if others else ""
        raise RunFailed("%s: %s: %s%s" % (url, failed[0].name, failed[0].failures[0], more), document=document)
    return document


def _prove(
    server: "servers.Tgi | servers.Vllm",
    codec: TextCodec,
    records: Sequence[Record],
    model: str,
    raw: Dict[str, Any],
    options: Options,
    document: Dict[str, Any],
    say: Say,
) -> List[Check]:
    asked = _asked(server, codec, records, options)
    document["records"] = sorted({prompt.where.partition(", answer")[0] for prompt in asked})
    say("asking %s, %d prompts" % (server.name, len(asked)))
    answers = checks.ask(server, asked, options.new_tokens, options.prompt_logprobs)
    ids = checks.token_ids(server, codec, asked, answers)
    done = [checks.folder(codec, model, asked), ids, checks.chat_ids(server, codec, asked)]
    if options.weights:
        done += _computed(server, codec, answers, model, raw, options, document, say)
    return done + [checks.ends(codec, answers)]


def _computed(
    server: "servers.Tgi | servers.Vllm",
    codec: TextCodec,
    answers: List[Answer],
    model: str,
    raw: Dict[str, Any],
    options: Options,
    document: Dict[str, Any],
    say: Say,
) -> List[Check]:
    """What needs the weights. Answers to other ids than training's say nothing here."""
    from .reference import Reference, served_dtype

    right = [one for one in answers if not one.seen.prompt or [i for i, _ in one.seen.prompt] == one.ids]
    dtype = served_dtype(server.dtype, options.dtype, raw)
    say("computing the same with transformers, from %s" % model)
    reference = Reference(model, dtype)
    tolerance = options.tolerance or (0.001 if dtype == "float32" else 0.02)
    bounds = reference.bounds([one.ids for one in right], tolerance)
    document["dtype"] = dtype
    scored = numbers.score(reference, right)
    done = [numbers.greedy(codec, right, scored, bounds)]
    if options.prompt_logprobs:
        done.insert(0, numbers.prompt_logprobs(codec, scored, bounds, server.unheard))
    wrong = [check for check in done if check.failures and check.compared]
    if wrong:
        found = numbers.cause(codec, reference, scored, bounds) or (
            "the server has another head or other weights than %s, or rounds more than %s does (--dtype)" % (model, dtype)
        )
        wrong[0].failures[0] += "; " + found
    return done


def _asked(server: "servers.Tgi | servers.Vllm", codec: TextCodec, records: Sequence[Record], options: Options) -> List[Prompt]:
    longest = server.longest - max(options.new_tokens, checks.CLOSING_COUNT)
    found: List[Prompt] = []
    for number, some in enumerate(prompts.prompts_of(codec, records, longest)):
        if number == options.records:
            break
        found += some
    if not found:
        raise UserError("no record is short enough for the %d tokens that %s takes" % (server.longest, server.name))
    return found


def _trained(model: str, train_config: Optional[str], number: int) -> Tuple[str, TextCodec, List[Record]]:
    """(where the records are from, the codec that made training's ids of them, more of them than are needed)."""
    if train_config is None:
        return "fixed records", TextCodec.load(model), prompts.fixed_records()
    run = configs.load(train_config)
    codec = TextCodec.load(run.model.path, run.data.template)
    return run.data.train, codec, prompts.chosen_records(run.data.train, run.data.on_bad, 4 * number)


def _stored(codec: TextCodec, train_config: str, records: Sequence[Record]) -> Check:
    """What was taken for training's ids here are those that the run was trained on, where its encoded data is still there."""
    check = Check("trained ids", "tokens")
    compared, data = 0, Path(configs.load(train_config).run.out) / "data"
    for record in records if "strftime_now" not in codec.chat_template else []:  # a run has one date, a server another
        trained, made = prompts.stored_ids(data, record.line), codec.encode(record).ids
        if trained is None:
            continue
        compared += 1
        check.compared += len(trained)
        if made[: len(trained)] != trained:
            check.failures.append("%s: encoded now, it has other ids than the run was trained on (%s): the tokenizer, the template "
                                  "or the records were changed since" % (record.where, data))  # fmt: skip
    check.figures = {"records": compared, "from": str(data), "why": "none of these records is in %s any more" % data}
    return check


def _check_options(options: Options) -> None:
    for name, least in (("records", 1), ("new_tokens", 2)):
        if getattr(options, name) < least:
            raise UserError("--%s %d: expected at least %d" % (name.replace("_", "-"), getattr(options, name), least))
    if options.tolerance is not None and not 0 < options.tolerance < 10:
        raise UserError("--tolerance %s: expected nats between 0 and 10, such as 0.001" % options.tolerance)


def _no_folder(model: str) -> Dict[str, Any]:
    raise UserError("--model %s: no such folder; name the one that is served" % model)


def _write(path: str, document: Dict[str, Any]) -> None:
    try:
        Path(path).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError("--output %s: cannot be written: %s" % (path, error.strerror)) from None
