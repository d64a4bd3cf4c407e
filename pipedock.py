"""The ``pipedock`` command: maps verbs to ``verbs/*``, lazily, so that ``-h`` never waits for torch.

A verb module has ``HELP`` (one line), ``add(parser)``, ``run(args) -> document or None`` and ``text(document) -> str``.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
from typing import Iterator, List, Optional, TextIO

from pipeline_train.errors import RunFailed, UserError

VERBS = {
    "data": "verbs.data",
    "train": "verbs.train",
    "migrate": "verbs.migrate",
    "from-hf": "verbs.from_hf",
    "to-hf": "verbs.to_hf",
    "verify": "verbs.verify",
    "serve": "verbs.serve",
    "ask": "verbs.ask",
}


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line, not a page of usage."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, "%s: %s. See %s -h\n" % (self.prog, message, self.prog))


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="pipedock", description="One road from data to a served model.")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    for name, module_name in VERBS.items():
        module = importlib.import_module(module_name)
        verb = verbs.add_parser(name, help=module.HELP, description=module.HELP)
        module.add(verb)
        verb.add_argument("--json", action="store_true", help="print exactly one JSON document on stdout")
        verb.set_defaults(module=module)
    return top


@contextlib.contextmanager
def answer_stream() -> Iterator[TextIO]:
    """The real stdout, for the answer alone: libraries (DeepSpeed first) write there too, and go to stderr meanwhile."""
    sys.stdout.flush()
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        yield answer
        answer.flush()
    finally:
        sys.stdout.flush()
        os.dup2(answer.fileno(), 1)
        with contextlib.suppress(BrokenPipeError):
            answer.close()


def main(argv: Optional[List[str]] = None) -> int:
    args = argparse.Namespace(verb="")
    try:
        args = parser().parse_args(argv)
        with answer_stream() as args.answer:
            document = args.module.run(args)
            if document is not None:
                args.answer.write((json.dumps(document, ensure_ascii=False) if args.json else args.module.text(document)) + "\n")
        return 0
    except UserError as error:
        print("pipedock %s: %s" % (args.verb, error), file=sys.stderr)
        return 2
    except RunFailed as error:
        print("pipedock %s: %s" % (args.verb, error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pipedock %s: interrupted" % args.verb, file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader (head, less) has gone
        return 1


if __name__ == "__main__":
    sys.exit(main())
