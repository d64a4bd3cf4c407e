"""``pipedock train --self-test``: this machine's pipeline against transformers in one process, in under a minute."""

import argparse
from typing import Any, Dict

from .progress import say


def run(args: argparse.Namespace) -> Dict[str, Any]:
    from pipeline_train import selftest_run

    return selftest_run.here(args.config, args.set, say)


def text(document: Dict[str, Any]) -> str:
    from pipeline_train import selftest_run

    lines = [
        "%(family)s, %(pipe)d stages x %(data)d replicas, %(dtype)s: loss %(loss).0e, gradient norm %(grad_norm).0e, "
        "gradients %(gradients).0e, %(steps)d steps %(losses).0e" % found
        for found in document["cases"]
    ]
    return "\n".join(lines + [selftest_run.told(document)])
