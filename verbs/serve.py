"""``pipedock serve``: start a server for a model folder, watch it, stop it."""

import argparse
import signal
import sys
import threading
import time
from typing import Any, Dict, List, Optional

HELP = "serve a model folder over HTTP (text-generation-inference's contract); --detach, --status, --stop"

PASSED_ON = ("dtype", "max-concurrent-requests", "max-input-tokens", "max-total-tokens", "cors-allow-origin")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="Hugging Face model folder with tokenizer, as pipedock to-hf writes it")
    parser.add_argument(
        "--engine", default="embedded", metavar="ENGINE", help="embedded: in a process of this machine, CPU or one GPU"
    )
    parser.add_argument("--port", type=int, default=8082, help="default 8082")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1, this machine only")
    parser.add_argument("--api-key-file", metavar="F", help="file with the key that clients must send as a bearer token")
    parser.add_argument(
        "--no-proof", action="store_true", help="serve an export that is not proved, or changed since; says so loudly"
    )
    parser.add_argument("--detach", action="store_true", help="return when the server is healthy and leave it running")
    parser.add_argument("--stop", action="store_true", help="stop the server on --port; requests under way are finished")
    parser.add_argument("--status", action="store_true", help="say whether a server runs on --port")
    for name in PASSED_ON:
        parser.add_argument("--" + name, metavar="X", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> Optional[Dict[str, Any]]:
    from pipeline_train.errors import UserError

    if not 0 < args.port < 65536:
        raise UserError("--port %d: expected 1 to 65535" % args.port)
    if args.stop:
        return _stop(args.port)
    if args.status:
        return _status(args.port)
    if args.model is None:
        raise UserError("--model DIR is missing (only --stop and --status go without)")
    return _serve(args)


def text(document: Dict[str, Any]) -> str:
    if "stopped" in document:
        return (
            "stopped %(model)s (pid %(pid)d)" % document if document["stopped"] else "nothing to stop on port %(port)d" % document
        )
    if not document["running"]:
        return "no server of ours on port %(port)d" % document
    state = "" if document["healthy"] else ", not healthy: see %s" % document["log"]
    lines = ["%s at %s (pid %d%s)" % (document["model"], document["url"], document["pid"], state)]
    return "\n".join(
        lines + ["  " + line for line in document["try"]] + ["stop it: pipedock serve --stop --port %(port)d" % document]
    )


def _serve(args: argparse.Namespace) -> Optional[Dict[str, Any]]:
    from pipeline_train.errors import RunFailed
    from serve.launch import launch

    key = _key(args.api_key_file) if args.api_key_file else None
    flags: List[str] = []
    for name in PASSED_ON:
        value = getattr(args, name.replace("-", "_"))
        flags += ["--" + name, value] if value is not None else []
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: _interrupt(stopping))
    server = launch(args.model, args.engine, args.port, args.host, key, flags, progress=Progress(), own_session=args.detach,
                    need_proof=not args.no_proof)  # fmt: skip
    document = _document(args.port, bool(key))
    if args.detach:
        return document
    args.answer.write((_json(document) if args.json else text(document)) + "\n")
    args.answer.flush()
    try:
        follow(server, stopping)
    except RunFailed as error:
        if not args.json:
            raise
        sys.stderr.write("pipedock serve: %s\n" % error)  # the one document is out already
        raise SystemExit(1)
    return None


def _interrupt(stopping: threading.Event) -> None:
    """SIGTERM is treated like Ctrl-C, once."""
    if not stopping.is_set():
        stopping.set()
        raise KeyboardInterrupt


def follow(server: Any, stopping: threading.Event) -> None:
    """Copy the server's log to stderr until it ends; Ctrl-C or SIGTERM end it cleanly."""
    from pipeline_train.errors import RunFailed
    from serve import state
    from serve.launch import tail

    try:
        with open(server.state.log, encoding="utf-8", errors="replace") as log:
            while server.process.poll() is None:
                line = log.readline()
                if line:
                    sys.stderr.write(line)
                else:
                    time.sleep(0.2)
            sys.stderr.write(log.read())
    except KeyboardInterrupt:
        stopping.set()
        sys.stderr.write("\nstopping; requests under way are finished first\n")
        server.stop()
    state.forget(server.state.port)
    code = server.process.returncode
    if code != 0:
        raise RunFailed("the server ended with code %d; the end of %s:\n%s" % (code, server.state.log, tail(server.state.log)))


def _document(port: int, api_key: bool = False) -> Dict[str, Any]:
    from serve import state
    from serve.launch import curl_lines, healthy

    running = state.read(port)
    if running is None:
        return {"running": False, "port": port}
    return {
        "running": True,
        "healthy": healthy(running.url),
        "port": port,
        "url": running.url,
        "model": running.model,
        "engine": running.engine,
        "pid": running.pid,
        "log": running.log,
        "try": curl_lines(running.url, api_key),
    }


def _status(port: int) -> Dict[str, Any]:
    return _document(port)


def _stop(port: int) -> Dict[str, Any]:
    from pipeline_train.errors import RunFailed
    from serve import state
    from serve.launch import DRAIN_S

    running = state.read(port)
    if running is None:
        return {"stopped": False, "port": port}
    if not state.stop(running, DRAIN_S):
        raise RunFailed("port %d: pid %d still runs after %d s; see %s" % (port, running.pid, DRAIN_S, running.log))
    state.forget(port)
    return {"stopped": True, "port": port, "pid": running.pid, "model": running.model}


def _key(path: str) -> str:
    from pipeline_train.errors import UserError

    try:
        with open(path, encoding="utf-8") as handle:
            key = handle.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("--api-key-file %s: %s" % (path, getattr(error, "strerror", None) or "not text"))
    if not key or len(key.split()) != 1:
        raise UserError("--api-key-file %s: expected one word" % path)
    return key


def _json(document: Dict[str, Any]) -> str:
    import json

    return json.dumps(document, ensure_ascii=False)


class Progress:
    """One line on a terminal that counts up; otherwise a line every ten seconds."""

    def __init__(self) -> None:
        self._calls = 0

    def __call__(self, line: str) -> None:
        self._calls += 1
        if sys.stderr.isatty():
            sys.stderr.write("\r" + line)
        elif self._calls % 10 == 1:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()
