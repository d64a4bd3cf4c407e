"""``pipedock train``: pipeline training from a run.yaml."""

import argparse
import contextlib
import signal
from pathlib import Path
from typing import Any, Dict, Iterator, Optional

from . import exporting, self_test
from .progress import Progress, say

HELP = "fine-tune all weights (or train from scratch) with pipeline parallelism"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="run.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a key of run.yaml; may be repeated")
    parser.add_argument("--resume", nargs="?", const="newest", choices=["newest", "auto"], metavar="auto",
                        help="continue from the newest whole checkpoint; auto: start if there is none")  # fmt: skip
    parser.add_argument("--allow-changed-data", action="store_true",
                        help="let --resume go on although the data, its packing or the batch size changed")  # fmt: skip
    parser.add_argument("--hostfile", metavar="FILE", type=Path, help='the machine as DeepSpeed names it: "node1 slots=8"')
    parser.add_argument("--stack-check", action="store_true", help="only check the installed versions")
    parser.add_argument("--self-test", action="store_true",
                        help="only compare training on this machine with transformers, on a tiny model")  # fmt: skip
    parser.add_argument("--print-config", action="store_true", help="only print run.yaml with every default filled in")


def run(args: argparse.Namespace) -> Optional[Dict[str, Any]]:
    from pipeline_train import compat
    from pipeline_train.errors import UserError

    if args.stack_check:
        found = compat.versions()
        compat.check_deepspeed(found["deepspeed"])
        return {"ok": True, "versions": found, "notes": compat.notes(found)}
    if args.self_test:
        return self_test.run(args)
    if args.config is None:
        raise UserError("name a run.yaml with --config")
    from pipeline_train import config

    loaded = config.load(args.config, tuple(args.set))
    if args.print_config:
        import msgspec

        return {"config": msgspec.to_builtins(loaded)}
    with _nothing_to_save():
        return _train(loaded, args)


@contextlib.contextmanager
def _nothing_to_save() -> Iterator[None]:
    """Before and after the ranks' lifetime there is nothing to save: SIGUSR1 is ignored, by the ranks too until they listen,
    and SIGTERM ends the command with a line of its own."""
    from pipeline_train.errors import Stopped

    def stopped(number: int, frame: Any) -> None:
        raise Stopped("stopped by SIGTERM")

    before = [(n, signal.signal(n, handler)) for n, handler in ((signal.SIGUSR1, signal.SIG_IGN), (signal.SIGTERM, stopped))]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _train(loaded: Any, args: argparse.Namespace) -> Dict[str, Any]:
    from pipeline_train import selftest_run
    from pipeline_train.prepare import prepare
    from pipeline_train.report import Keeper

    exporting.check_before(loaded, args.resume is not None)
    prepared = prepare(loaded, Path(args.config), args.resume, say, args.allow_changed_data, args.hostfile)
    exporting.check_model(loaded.export, prepared.dims)
    out = str(prepared.out)
    if prepared.done >= prepared.total:
        say("%s: finished already, at step %d of %d" % (out, prepared.done, prepared.total))
        done = {"out": out, "steps": prepared.done, "checkpoint": str(prepared.resume), "finished": True}
        return dict(done, loss_first=None, loss_last=None, seconds=0.0, tokens=0, peak_gib=[], **exporting.export(prepared, False))
    selftest_run.once(prepared, say)
    parallel = prepared.config.parallel
    say("%s: steps %d to %d, %d stages x %d replicas, layers per stage %s, %s on %s" % (
        out, prepared.done + 1, prepared.total, parallel.pipe, parallel.data, parallel.parts, prepared.config.model.dtype,
        "%d GPUs" % (parallel.pipe * parallel.data) if prepared.gpus else "CPU",
    ))  # fmt: skip
    keeper = Keeper(prepared.out, prepared.done, say)
    with exporting.nothing_half_done(prepared.config.export):
        summary = _launch(prepared, keeper)
        say("peak memory per stage: %s GiB" % ", ".join("%.2f" % gib for gib in summary["peak_gib"]))
        say("report: %s" % (prepared.out / "report.html"))
        try:
            written = summary.pop("finish", None)
            return dict(summary, out=out, **exporting.export(prepared, True, written))
        finally:
            keeper.write()  # with the proof, whether it holds or not


def _launch(prepared: Any, keeper: Any) -> Dict[str, Any]:
    """Train, shown on the terminal and in report.html, however it ends; -> the summary."""
    from pipeline_train.errors import RunFailed, Stopped
    from pipeline_train.launch import launch

    run = prepared.config
    progress = Progress(prepared.total, run.run.name, run.parallel.pipe, run.micro_batches)

    def show(message: Dict[str, Any]) -> None:
        progress.show(message)
        keeper.show(message)

    try:
        summary = launch(prepared, show, finish=exporting.by_ranks(run.export))
    except (RunFailed, KeyboardInterrupt) as error:
        progress.close()
        state = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped" if isinstance(error, Stopped) else "failed"
        keeper.end(state, str(error))
        say(kept(prepared.out))
        raise
    finally:
        progress.close()
    keeper.end("finished")
    return summary


def kept(out: Path) -> str:
    """What an interrupted run leaves, and how to go on, in one line."""
    from pipeline_train import manifest
    from pipeline_train.errors import UserError

    try:
        newest = manifest.find_checkpoint(out)
    except manifest.Unreadable as error:
        return str(error)
    except UserError:
        return "%s: nothing was saved yet; --resume auto starts again. train.save_every sets how often a run is saved" % out
    return "%s: %s is kept; continue with --resume" % (out, newest.name)


def text(document: Dict[str, Any]) -> str:
    if "config" in document:
        import yaml

        return str(yaml.safe_dump(document["config"], sort_keys=False, allow_unicode=True)).rstrip()
    if "cases" in document:
        return self_test.text(document)
    if "versions" in document:
        lines = ["%s %s" % (name, version or "-") for name, version in document["versions"].items()]
        return "\n".join(lines + ["note: %s" % note for note in document["notes"]] + ["ok"])
    if document.get("finished"):
        lines = ["%(out)s: finished" % document]
    else:
        figures = "%(steps)d steps, loss %(loss_first).4f -> %(loss_last).4f, %(tokens)d tokens in %(seconds).1f s"
        lines = [("%(out)s: " + figures) % document]
    lines.append("checkpoint %(checkpoint)s" % document)
    if "export" in document:
        lines.append("exported to %(export)s and proved" % document)
    return "\n".join(lines)
