"""From options to a running server: model, tokenizer, limits, memory budget, application."""

import asyncio
import logging
import os
import socket
import sys
from contextlib import closing
from typing import Any, Dict, Tuple

import uvicorn
from starlette.applications import Starlette

from pipeline_train.errors import UserError

from .args import Options
from .batching import Scheduler
from .engine import Engine
from .http import make_app
from .memory import free_memory
from .metrics import Metrics
from .recorded import LEAST
from .service import Service
from .text import Text
from .validation import Limits
from .worker import Worker

LOG = logging.getLogger("pipedock.serve")
VERSION = "3.3.6-dev0"  # what the releases 3.3.6 and 3.3.7 of the original report
MAX_ROWS = 64
MEMORY_SHARE = 0.15  # of the free memory, for keys and values; tables that double may take several times their content


def build(options: Options) -> Tuple[Starlette, Service]:
    """Load everything. UserError when the folder cannot be served."""
    text = load_text(options)
    worker = Worker()
    engine = worker.do(lambda: load_engine(options))
    text.add_stop_ids(engine.generation_eos)
    if not text.stop_ids:
        LOG.warning("neither tokenizer nor generation_config.json name an end-of-sequence token: answers end at their length only")
    limits = limits_of(options, engine.max_positions, engine.known)
    metrics = Metrics(limits.max_input_tokens, limits.max_total_tokens)
    budget = options.max_batch_total_tokens or max(
        limits.max_total_tokens, int(free_memory(engine.device) * MEMORY_SHARE / max(1, engine.kv_bytes))
    )
    scheduler = Scheduler(engine, worker, text, metrics, options.max_batch_size or MAX_ROWS, budget)
    if engine.graphs and (options.max_batch_size or 0) > LEAST:
        LOG.warning(
            "--max-batch-size: with more than %d requests at once the last bits of an answer may depend on the others", LEAST
        )
    service = Service(
        text, scheduler, metrics, limits, options.max_concurrent_requests, options.validation_workers, info(options, engine, limits)
    )
    compute_type = os.environ.get("COMPUTE_TYPE", "cpu" if engine.device.type == "cpu" else "gpu+optimized")
    app = make_app(service, options.payload_limit, compute_type, options.api_key, list(options.cors_allow_origin))
    LOG.info("%s on %s, %s attention, batches of up to %d tokens", engine.dtype, engine.device, engine.attention, budget)
    return app, service


def run(app: Starlette, service: Service, listener: socket.socket, options: Options) -> None:
    """Serve until a signal. Requests under way get ``graceful_termination_timeout`` seconds."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=options.graceful_termination_timeout,
        timeout_keep_alive=75,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    server = uvicorn.Server(config)

    sys.setswitchinterval(0.001)  # the model thread gives way to the event loop sooner than Python's 5 ms

    async def work() -> None:
        await service.start()
        host, port = listener.getsockname()[:2]
        LOG.info("Connected: http://%s:%d", "[%s]" % host if ":" in host else host, port)
        await server.serve(sockets=[listener])

    with closing(listener):
        asyncio.run(work())
    service.stop()


def load_text(options: Options) -> Text:
    try:
        return Text(options.model_id, options.trust_remote_code, options.tokenizer_config_path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError("%s: no usable tokenizer (%s)" % (options.model_id, _first_line(error))) from None


def load_engine(options: Options) -> Engine:
    try:
        return Engine(options.model_id, options.dtype, options.revision, options.trust_remote_code)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError("%s: no usable model (%s)" % (options.model_id, _first_line(error))) from None


def limits_of(options: Options, positions: int, vocabulary: int) -> Limits:
    """The launcher's limits, where they are not given from what the model was made for."""
    total = options.max_total_tokens or positions
    if total > positions:
        raise UserError("--max-total-tokens %d: this model has positions for %d" % (total, positions))
    longest = options.max_input_tokens or total - 1
    if longest >= total:
        raise UserError("--max-input-tokens %d: must be less than the %d tokens in all" % (longest, total))
    return Limits(
        options.max_best_of,
        options.max_stop_sequences,
        options.max_top_n_tokens,
        longest,
        total,
        options.max_client_batch_size,
        vocabulary,
    )


def info(options: Options, engine: Engine, limits: Limits) -> Dict[str, Any]:
    """/info: the keys of 3.3 in their order, then what older scripts look for, then who really answers."""
    return {
        "model_id": options.model_id,
        "model_sha": None,
        "model_pipeline_tag": None,
        "max_concurrent_requests": options.max_concurrent_requests,
        "max_best_of": limits.max_best_of,
        "max_stop_sequences": limits.max_stop_sequences,
        "max_input_tokens": limits.max_input_tokens,
        "max_total_tokens": limits.max_total_tokens,
        "validation_workers": options.validation_workers,
        "max_client_batch_size": limits.max_client_batch_size,
        "router": "text-generation-router",
        "version": VERSION,
        "sha": None,
        "docker_label": None,
        "max_input_length": limits.max_input_tokens,
        "model_dtype": str(engine.dtype),
        "model_device_type": engine.device.type,
        "engine": "pipedock embedded",
    }


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
