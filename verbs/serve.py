"""``pipedock serve``: start a server for a model folder, watch it, stop it."""

import argparse
import json
import signal
import sys
import threading
from typing import Any, Dict, Optional

from . import api_key, flags

HELP = "serve a model folder over HTTP (text-generation-inference's contract); --detach, --status, --logs, --stop"

ENGINE = "embedded: in a process of this machine, CPU or one GPU; tgi, vllm: in a container, by Docker"
CONTAINERS = (  # flag, metavar, help: for --engine tgi and vllm
    ("version", "V", "0.8 or 3.3 of tgi, 0.18 of vllm; by default the newest"),
    ("gpu", "CARD", "judge for this card (t4, v100, a100 ...) instead of this machine's"),
    ("driver", "D", "judge for this driver (515.65.01) instead of this machine's"),
    ("shm-size", "SIZE", "shared memory for the shards; by default 64g for tgi 0.8, 1g for 3.3, 8g for vllm"),
    ("image", "NAME", "take this image for that version's: a mirror's, or one of your own"),
)
TIMEOUT_S = 3600.0  # from the start of the server until it answers: a 65B from a slow disk, converted first
TOKENS = ("max-concurrent-requests", "max-input-tokens", "max-total-tokens")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="Hugging Face model folder with tokenizer, as pipedock to-hf writes it")
    parser.add_argument("--engine", default="embedded", metavar="ENGINE", help=ENGINE)
    parser.add_argument("--port", type=int, default=8082, help="default 8082")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1, this machine only")
    parser.add_argument("--api-key-file", metavar="F", help="file with the key that clients must send as a bearer token")
    parser.add_argument("--no-proof", action="store_true", help="serve an export that is not proved, or changed since; says so")
    parser.add_argument("--detach", action="store_true", help="return when the server is healthy and leave it running")
    parser.add_argument("--stop", action="store_true", help="stop the server on --port; requests under way have time to end")
    parser.add_argument("--status", action="store_true", help="say whether a server runs on --port")
    parser.add_argument("--logs", action="store_true", help="print what the server on --port has said, also one that failed")
    parser.add_argument("--dtype", metavar="X", help="float16, bfloat16 or float32; by default the engine's own choice")
    for name in TOKENS:
        parser.add_argument("--" + name, metavar="N", type=flags.whole(1), help="the engine's own setting of that name")
    parser.add_argument("--cors-allow-origin", metavar="URL", help="let browsers on this origin call")
    containers = parser.add_argument_group("with --engine tgi and vllm")
    containers.add_argument("--num-shard", metavar="N", type=flags.whole(1), default=1, help="split over N GPUs; default 1")
    for name, metavar, text in CONTAINERS:
        containers.add_argument("--" + name, metavar=metavar, help=text)


def run(args: argparse.Namespace) -> Optional[Dict[str, Any]]:
    from pipeline_train.errors import UserError

    if not 0 < args.port < 65536:
        raise UserError("--port %d: expected 1 to 65535" % args.port)
    if args.stop:
        return _stop(args.port)
    if args.status:
        return _status(args.port)
    if args.logs:
        return _logs(args.port)
    if args.model is None:
        raise UserError("--model DIR is missing (only --stop, --status and --logs go without)")
    return _serve(args)


def text(document: Dict[str, Any]) -> str:
    if "said" in document:
        return str(document["said"])
    note = " (%s)" % document["note"] if document.get("note") else ""
    if "stopped" in document:
        if not document["stopped"]:
            return "nothing to stop on port %d%s" % (document["port"], note)
        return "stopped %s (%s)" % (document["model"], _where(document))
    if not document["running"]:
        return document.get("ended") or "no server of ours on port %d%s" % (document["port"], note)
    port = document["port"]
    state = "" if document["healthy"] else ", not healthy: see pipedock serve --logs --port %d" % port
    first = "%s at %s (%s%s)" % (document["model"], document["url"], _where(document), state)
    first = "already running: " * bool(document.get("already")) + first
    return "\n".join([first] + ["  " + line for line in document["try"]] + ["stop it: pipedock serve --stop --port %d" % port])


def _where(document: Dict[str, Any]) -> str:
    if "container" not in document:
        return "pid %d" % document["pid"]
    return "%s %s, container %s" % (document["engine"], document["version"], document["container"])


def _settings(args: argparse.Namespace) -> Any:
    from serve.settings import DTYPES, Settings

    return Settings(
        args.model, args.engine, args.port, args.host, api_key.read(args.api_key_file),
        dtype=DTYPES.get(args.dtype, args.dtype), max_input_tokens=args.max_input_tokens, max_total_tokens=args.max_total_tokens,
        max_concurrent_requests=args.max_concurrent_requests, cors_allow_origin=args.cors_allow_origin, version=args.version,
        image=args.image, shards=args.num_shard, gpu=args.gpu, driver=args.driver, shm_size=args.shm_size,
        need_proof=not args.no_proof,
    )  # fmt: skip


def _serve(args: argparse.Namespace) -> Optional[Dict[str, Any]]:
    from pipeline_train.errors import RunFailed
    from serve.launch import check, settled, start

    settings, progress = _settings(args), Progress()
    check(settings)
    try:
        known = settled(settings, progress, TIMEOUT_S)
    finally:
        progress.end()
    if known is not None:
        return dict(_document(known), already=True)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda *_: _interrupt(stopping))
    try:
        server = start(settings, progress, progress.keep, TIMEOUT_S, own_session=args.detach)
    finally:
        progress.end()
    document = _document(server.state)
    if args.detach:
        return document
    args.answer.write((json.dumps(document, ensure_ascii=False) if args.json else text(document)) + "\n")
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
    """Copy the server's log to stderr until it ends; Ctrl-C or SIGTERM end it cleanly, a second Ctrl-C at once."""
    from pipeline_train.errors import RunFailed
    from serve.state import GRACE_S

    try:
        for line in server.lines():
            sys.stderr.write(line)
        code = server.wait()
        if code != 0:
            raise server.ended(code)
    except KeyboardInterrupt:
        stopping.set()
        sys.stderr.write("\nstopping; requests under way are finished first, for up to %d s; Ctrl-C again: at once\n" % GRACE_S)
        try:
            code = server.stop()
        except KeyboardInterrupt:
            code = server.stop_now()
        if code != 0:
            raise RunFailed("asked to stop, the server ended with code %d; its log: %s" % (code, server.state.log))


def _document(known: Any) -> Dict[str, Any]:
    from serve.reach import healthy

    return {"running": True, "healthy": healthy(known.url), **known.document()}


def _nothing(document: Dict[str, Any]) -> Dict[str, Any]:
    """There is no server; a note when that is not quite sure, or one runs on another port."""
    from serve import state
    from serve.launch import not_asked

    why, others = not_asked(), ", ".join(map(str, state.ports()))
    notes = ["containers were not looked for: " + why] if why else []
    notes += ["of ours there is one on port %s, for --port" % others] if others else []
    return dict(document, note="; ".join(notes)) if notes else document


def _status(port: int) -> Dict[str, Any]:
    from serve.launch import find

    known = find(port)
    if known is None:
        return _nothing({"running": False, "port": port})
    if known.alive:
        return _document(known)
    ended = "%s on port %d has ended%s: see pipedock serve --logs --port %d; --stop removes what is left"
    return {"running": False, "port": port, "ended": ended % (known.model, port, known.how, port)}


def _logs(port: int) -> Dict[str, Any]:
    from pipeline_train.errors import UserError
    from serve import state
    from serve.launch import find
    from serve.reach import tail

    known = find(port)
    if known is not None:
        return {"port": port, "said": known.said()}
    if not state.log_file(port).is_file():
        raise UserError("port %d: no server of ours has been there, so there is no log" % port)
    return {"port": port, "said": tail(str(state.log_file(port)), None)}


def _stop(port: int) -> Dict[str, Any]:
    from serve.launch import find

    known = find(port)
    if known is None:
        return _nothing({"stopped": False, "port": port})
    document = known.document()
    sys.stderr.write("stopping; requests under way are finished first\n")
    known.stop()
    return {"stopped": True, **{name: document[name] for name in document if name not in ("try", "url", "log")}}


class Progress:
    """One line on a terminal that counts up; otherwise a line every ten seconds. ``keep``: a line that stays."""

    def __init__(self) -> None:
        self._calls, self._open = 0, False

    def __call__(self, line: str) -> None:
        self._calls += 1
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K" + line)
            self._open = True
        elif self._calls % 10 == 1:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def keep(self, line: str) -> None:
        self.end()
        sys.stderr.write(line + "\n")

    def end(self) -> None:
        if self._open:
            sys.stderr.write("\n")
        self._open = False
