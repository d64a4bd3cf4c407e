"""The proof of a live server: it reads prompts as they were trained, computes what transformers does, and stops where it should.

document = prove("http://127.0.0.1:8082", "exports/my-model", "run.yaml")

prompts     records of the run (or fixed ones), with training's own ids
servers     text-generation-inference 0.8 to 3.3, the embedded server, vLLM: each asked in its own way
work        who is asked what, in which order
checks      token ids, chat token ids, end of sequence
reference   transformers on the same folder
numbers     log-probabilities and greedy answers against it
difference  what a wrong id looks like
"""

import json
import os
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from pipeline_train import config as configs
from pipeline_train import families
from pipeline_train.data.encode import TextCodec
from pipeline_train.data.records import Record
from pipeline_train.errors import RunFailed, UserError

from ..client import ClientError, Unauthorized
from . import checks, prompts, servers
from .work import Options, Say, Work

__all__ = ["Options", "prove"]


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
    work = Work(server, codec, model, raw, options, say)
    work.document.update(url=url, model=model, records_of=source)
    with server:
        try:
            done = work.checks(records, talks=train_config is not None or bool(codec.tokenizer.chat_template))
        except Unauthorized as error:
            raise servers.refused(url, error) from None
        except ClientError as error:
            raise RunFailed("%s: %s" % (url, str(error).replace(url + ": ", "")), document=work.document) from None
    if train_config is not None:
        done.insert(0, checks.stored(codec, Path(configs.load(train_config).run.out) / "data", records))
    document = dict(
        work.document,
        holds=all(check.holds is not False for check in done),
        checks=[check.document() for check in done],
        seconds=round(time.perf_counter() - started, 3),
    )
    if options.output is not None:
        _write(Path(options.output), document)
    failed = [check for check in done if check.holds is False]
    if failed:
        others = ["%d more there" % (len(failed[0].failures) - 1)] if len(failed[0].failures) > 1 else []
        others += ["%s too" % check.name for check in failed[1:]]
        more = " (%s)" % ", ".join(others) if others else ""
        raise RunFailed("%s: %s: %s%s" % (url, failed[0].name, failed[0].failures[0], more), document=document)
    return document


def _trained(model: str, train_config: Optional[str], number: int) -> Tuple[str, TextCodec, List[Record]]:
    """(where the records are from, the codec that made training's ids of them, more of them than are needed)."""
    if train_config is None:
        return "fixed records", TextCodec.load(model), prompts.fixed_records()
    run = configs.load(train_config)
    codec = TextCodec.load(run.model.path, run.data.template)
    return run.data.train, codec, prompts.chosen_records(run.data.train, run.data.on_bad, 4 * number)


def _check_options(options: Options) -> None:
    for name, least in (("records", 1), ("new_tokens", 2)):
        if getattr(options, name) < least:
            raise UserError("--%s %d: expected at least %d" % (name.replace("_", "-"), getattr(options, name), least))
    if options.tolerance is not None and not 0 < options.tolerance < 10:
        raise UserError("--tolerance %s: expected nats between 0 and 10, such as 0.001" % options.tolerance)
    if options.output is not None:
        _check_writable(Path(options.output))


def _no_folder(model: str) -> Dict[str, Any]:
    raise UserError("--model %s: no such folder; name the one that is served" % model)


def _check_writable(path: Path) -> None:
    """Before minutes of work, not after them. Leaves no file where there was none."""
    target = os.path.realpath(str(path))  # not a link that leads there
    before = os.path.exists(target)
    try:
        path.open("a").close()
    except OSError as error:
        raise _unwritable(path, error) from None
    if not before:
        os.unlink(target)


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError("--output %s: cannot be written: %s" % (path, error.strerror))


def _write(path: Path, document: Dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from None
