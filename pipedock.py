"""The ``pipedock`` command: maps verbs to ``verbs/*``, lazily, so that ``-h`` never waits for torch.

A verb module has ``HELP`` (one line), ``add(parser)``, ``run(args) -> document or None`` and ``text(document) -> str``.
"""

import argparse
import contextlib
import errno
import importlib
import json
import os
import re
import signal
import sys
from typing import Iterator, List, Optional, TextIO

from pipeline_train.errors import RunFailed, UserError

VERBS = {
    "plan": "verbs.plan",
    "data": "verbs.data",
    "train": "verbs.train",
    "preflight": "verbs.preflight",
    "report": "verbs.report",
    "migrate": "verbs.migrate",
    "from-hf": "verbs.from_hf",
    "to-hf": "verbs.to_hf",
    "verify": "verbs.verify",
    "gather": "verbs.gather",
    "check": "verbs.check",
    "serve": "verbs.serve",
    "ask": "verbs.ask",
    "prove": "verbs.prove",
    "bench": "verbs.bench",
}


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line, not a page of usage; a document, too, where ``given`` has --json."""

    given: List[str] = []

    def error(self, message: str) -> None:  # type: ignore[override]
        text = "%s. See %s -h" % (message, self.prog)
        if "--json" in self.given:
            print(json.dumps({"error": text}, ensure_ascii=False))
        self.exit(2, "%s: %s\n" % (self.prog, text))


HOME = re.compile(r"(--[a-z-]+=)~/")


class Version(argparse.Action):
    """Looked up only when asked for: reading package metadata takes as long as everything else here."""

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        from importlib import metadata

        try:
            print("pipedock %s" % metadata.version("pipedock"))
        except metadata.PackageNotFoundError:
            print("pipedock, not installed (run from its source folder)")
        parser.exit(0)


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="pipedock", description="One road from data to a served model.")
    top.add_argument("--version", action=Version, nargs=0, help="print the installed version")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    for name, module_name in VERBS.items():
        module = importlib.import_module(module_name)
        verb = verbs.add_parser(name, help=module.HELP, description=module.HELP)
        module.add(verb)
        verb.add_argument("--json", action="store_true", help="print exactly one JSON document on stdout")
        verb.set_defaults(module=module, parser=verb)
    return top


@contextlib.contextmanager
def answer_stream() -> Iterator[TextIO]:
    """The real stdout, for the answer alone: libraries (DeepSpeed first) write there too, and go to stderr meanwhile."""
    if sys.stdout is None or sys.stderr is None:  # closed by the caller: nobody wants what goes there
        for missing in [number for number in range(3) if not _is_open(number)]:
            os.dup2(os.open(os.devnull, os.O_RDWR), missing)
        sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)
    sys.stdout.flush()
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")  # half characters in names of files
    os.dup2(2, 1)
    try:
        yield answer
        answer.flush()
    finally:
        sys.stdout.flush()
        os.dup2(answer.fileno(), 1)
        with contextlib.suppress(OSError):
            answer.close()


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def main(argv: Optional[List[str]] = None) -> int:
    args = argparse.Namespace(verb="", json=False)
    # Shells expand --output ~/x, and leave --output=~/x alone.
    Parser.given = [
        HOME.sub(lambda start: start[1] + os.path.expanduser("~/"), word) for word in (sys.argv[1:] if argv is None else argv)
    ]
    try:
        args, unknown = parser().parse_known_args(Parser.given)
        if unknown:
            args.parser.error("unrecognized arguments: %s" % " ".join(unknown))
        with answer_stream() as args.answer:
            return run(args)
    except KeyboardInterrupt:
        print("pipedock %s: interrupted" % args.verb, file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader (head, less) has gone
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        print("pipedock %s: the answer cannot be written: %s" % (args.verb, error.strerror), file=sys.stderr)
        return 1


def run(args: argparse.Namespace) -> int:
    """One verb -> its exit code. With --json there is one document whatever happens; an error's has the key "error"."""
    try:
        document, code = args.module.run(args), 0
    except (UserError, RunFailed) as error:
        with contextlib.suppress(OSError):
            print("pipedock %s: %s" % (args.verb, error), file=sys.stderr)
        code = 2 if isinstance(error, UserError) else 1
        document = dict(getattr(error, "document", {}), error=str(error)) if args.json else None
    if document is not None:
        args.answer.write((json.dumps(document, ensure_ascii=False) if args.json else args.module.text(document)) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
