"""Prometheus metrics under the original's names, and one of our own. A series appears with its first use, as there."""

import threading
import time
from typing import Any, Dict, List, Optional

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

DURATIONS = [0.00015 * 1.5**step for step in range(35)]  # seconds
SIZES = [float(2**step) for step in range(11)]

LABELS = {  # the metrics that have one
    "tgi_request_failure": "err",
    "tgi_batch_concat": "reason",
    "tgi_batch_inference_count": "method",
    "tgi_batch_inference_success": "method",
    "tgi_batch_inference_failure": "method",
    "tgi_batch_inference_duration": "method",
    "tgi_batch_forward_duration": "method",
    "tgi_batch_decode_duration": "method",
}
HELP = {
    "tgi_request_count": "Requests received",
    "tgi_request_success": "Requests answered",
    "tgi_request_failure": "Requests refused or failed, by reason",
    "tgi_request_duration": "Seconds from a request to its answer",
    "tgi_request_validation_duration": "Seconds spent checking and tokenizing a request",
    "tgi_request_queue_duration": "Seconds a request waited for its first forward pass",
    "tgi_request_inference_duration": "Seconds from a request's first forward pass to its last token",
    "tgi_request_mean_time_per_token_duration": "Inference seconds per generated token of a request",
    "tgi_request_generated_tokens": "Generated tokens per request",
    "tgi_request_input_length": "Prompt tokens per request",
    "tgi_request_max_new_tokens": "Tokens a request may generate",
    "tgi_queue_size": "Requests waiting to join the batch",
    "tgi_batch_current_size": "Requests in the batch",
    "tgi_batch_current_max_tokens": "Tokens the requests in the batch may come to hold",
    "tgi_batch_next_size": "Requests in each forward pass",
    "tgi_batch_inference_count": "Forward passes begun",
    "tgi_batch_inference_success": "Forward passes done",
    "tgi_batch_inference_failure": "Forward passes failed",
    "tgi_batch_inference_duration": "Seconds per step: forward pass, choice and text",
    "tgi_batch_forward_duration": "Seconds per forward pass",
    "tgi_batch_decode_duration": "Seconds per step choosing tokens and spelling them",
    "pipedock_batch_pause_count": "Times that a request left the batch for a while, because room got short",
}


class Metrics:
    """All series of one server. Methods may be called from any thread."""

    def __init__(self, max_input_tokens: int, max_total_tokens: int) -> None:
        disable_created_metrics()
        self._registry = CollectorRegistry()
        self._made: Dict[str, Any] = {}
        self._lock = threading.Lock()
        self._lengths = {"tgi_request_input_length": _linear(max_input_tokens)}
        self._total = _linear(max_total_tokens)

    def count(self, name: str, label: str = "") -> None:
        metric = self._get(Counter, name)
        (metric.labels(label) if label else metric).inc()

    def gauge(self, name: str, value: float) -> None:
        self._get(Gauge, name).set(value)

    def observe(self, name: str, value: float, label: str = "") -> None:
        metric = self._get(Histogram, name)
        (metric.labels(label) if label else metric).observe(value)

    def begin(self, method: str, rows: int) -> float:
        """A forward pass for so many requests -> when that was."""
        self.count("tgi_batch_inference_count", method)
        self.observe("tgi_batch_next_size", rows)
        return time.perf_counter()

    def end(self, method: str, started: float, forward: Optional[float] = None) -> None:
        """``forward``: when the model had computed."""
        now = time.perf_counter()
        self.count("tgi_batch_inference_success", method)
        self.observe("tgi_batch_forward_duration", (forward or now) - started, method)
        self.observe("tgi_batch_inference_duration", now - started, method)

    def text(self) -> bytes:
        """The text exposition. The library puts ``_total`` behind counters' names, the original does not."""
        text = generate_latest(self._registry).decode("utf-8")
        with self._lock:
            counters = [name for name, metric in self._made.items() if isinstance(metric, Counter)]
        for name in counters:
            text = text.replace(name + "_total", name)
        return text.encode("utf-8")

    def _get(self, kind: type, name: str) -> Any:
        with self._lock:
            if name not in self._made:
                more = {"buckets": self._buckets(name)} if kind is Histogram else {}
                labels = [LABELS[name]] if name in LABELS else []
                self._made[name] = kind(name, HELP[name], labels, registry=self._registry, **more)
            return self._made[name]

    def _buckets(self, name: str) -> List[float]:
        if name.endswith("_duration"):
            return DURATIONS
        return SIZES if name == "tgi_batch_next_size" else self._lengths.get(name, self._total)


def _linear(most: int) -> List[float]:
    return [most * step / 100 for step in range(1, 101)]
