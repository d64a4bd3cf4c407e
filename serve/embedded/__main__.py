"""``python -m serve.embedded --model-id DIR``: load, prove, listen, serve, drain."""

import json
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

from pipeline_train.errors import RunFailed, UserError
from pipeline_train.leaving import leave

from ..proved import check_proof
from . import args
from .args import Options
from .parent import end_with_parent
from .worker import NAME

LOG = logging.getLogger("pipedock.serve")


def main(argv: Optional[List[str]] = None) -> int:
    try:
        options = args.read(sys.argv[1:] if argv is None else argv)
        _log_to_stderr(options.json_output)
        end_with_parent()
        serve(options)
        return 0
    except UserError as error:
        print("serve: %s" % error, file=sys.stderr)
        return 2
    except RunFailed as error:
        print("serve: %s" % error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def serve(options: Options) -> None:
    """Until SIGTERM or SIGINT; then running requests are finished first."""
    for note in options.notes:
        LOG.warning(note)
    local = model_folder(options.model_id)
    listener = bind(options.hostname, options.port)
    if local and not options.proof_checked:
        check_proof(options.model_id, LOG.info, required=not options.no_proof)
    # Waiting OpenMP threads spin for a quarter of a millisecond, then sleep. Some milliseconds, as usual, cost a time slice at each
    # of a step's hundreds of barriers as soon as other work is there; to sleep at once costs as much when there is none.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from . import build  # torch and transformers, only when the flags are in order

    started = time.perf_counter()
    app, service = build.build(options)
    LOG.info(
        "Loaded %s in %.1f s, up to %d tokens a request",
        options.model_id,
        time.perf_counter() - started,
        service.limits.max_total_tokens,
    )
    # After its own handlers uvicorn raises the signal once more: by then everything is done.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    build.run(app, service, listener, options)
    LOG.info("Stopped. Peak memory %.2f GiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def bind(hostname: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: a taken port is known at once, connections are refused until the model is there."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(hostname, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, number)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except OSError as error:
        raise UserError(
            "cannot listen on %s port %d: %s; choose another --port or --hostname" % (hostname, port, error.strerror or error)
        ) from None


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: Dict[str, Any] = {"timestamp": self.formatTime(record), "level": record.levelname, "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _log_to_stderr(as_json: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in ("httpx", "torch"):
        logging.getLogger(name).setLevel(logging.WARNING)


def model_folder(path: str) -> bool:
    """True for a folder; False for what may be a hub name. UserError for a path that is not there."""
    if Path(path).is_dir():
        return True
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError("%s: no such folder" % path)
    return False


def end(code: int) -> None:
    """Exit; not in Python's own way while the model thread may compute."""
    if any(thread.name == NAME for thread in threading.enumerate()):
        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    end(main())
