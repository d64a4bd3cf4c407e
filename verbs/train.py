"""``pipedock train``: pipeline training from a run.yaml."""

import argparse
from pathlib import Path
from typing import Any, Dict, Optional

from . import exporting, self_test, together
from .progress import Progress, say

HELP = "fine-tune all weights (or train from scratch) with pipeline parallelism"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="run.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a key of run.yaml; may be repeated")
    parser.add_argument("--resume", nargs="?", const="newest", choices=["newest", "auto"], metavar="auto",
                        help="continue from the newest whole checkpoint; auto: start if there is none")  # fmt: skip
    parser.add_argument("--allow-changed-data", action="store_true",
                        help="let --resume go on although the data, its packing or the batch size changed")  # fmt: skip
    together.add(parser)
    parser.add_argument("--trace", action="store_true",
                        help="write the third step, instruction by instruction, to <out>/trace.json (run.trace)")  # fmt: skip
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

    if args.trace:
        args.set.append("run.trace=true")
    loaded = config.load(args.config, tuple(args.set))
    if args.print_config:
        import msgspec

        return {"config": msgspec.to_builtins(loaded)}
    hosts = together.hosts_of(args)
    with together.Calm().kept() as calm, together.joined(args, loaded, hosts, calm) as party:
        return _train(loaded, args, party, hosts[0] if hosts is not None else None)


def _train(loaded: Any, args: argparse.Namespace, party: Any, host: Any) -> Dict[str, Any]:
    """``party``: the other nodes, None on one machine. Node 0 shows progress, writes the report and exports."""
    from pipeline_train import selftest_run
    from pipeline_train.prepare import prepare
    from pipeline_train.report import Keeper

    leads = party is None or party.place.node == 0
    together.check(party, loaded)
    if leads:
        exporting.check_before(loaded, args.resume is not None)
    prepared = prepare(loaded, Path(args.config), args.resume, say, args.allow_changed_data, party, host)
    exporting.check_model(loaded.export, prepared.dims, prepared.config.model.dtype, leads)
    out = str(prepared.out)
    if prepared.done >= prepared.total and not prepared.evaluate:
        end = "step %d of %d" % (prepared.done, prepared.total)
        if prepared.done > prepared.total:
            end = "step %d; by run.yaml it would end at step %d now" % (prepared.done, prepared.total)
        say("%s: finished already, at %s" % (out, end))
        done = {"out": out, "steps": prepared.done, "checkpoint": str(prepared.resume), "finished": True}
        done.update(loss_first=None, loss_last=None, seconds=0.0, tokens=0, peak_gib=[])
        return dict(done, **_export(prepared, party, False))
    together.check(party, prepared.config, prepared)
    if party is None:
        selftest_run.once(prepared, say)
    else:
        selftest_run.once(prepared, say, party.place.node, party.channel.check)
    parallel, how = prepared.config.parallel, prepared.config.run
    dtype = prepared.config.model.dtype + (", fp8 products" if how.fp8 else "") + (", compiled" if how.compile else "")
    work = "steps %d to %d" % (prepared.done + 1, prepared.total)
    if prepared.evaluate:
        work = "the evaluation after step %d, which metrics.jsonl lacks" % prepared.done
    say("%s: %s, %d stages x %d replicas, layers per stage %s, %s on %s" % (
        out, work, parallel.pipe, parallel.data, parallel.parts, dtype,
        "%d GPUs" % (parallel.pipe * parallel.data) if prepared.gpus else "CPU",
    ))  # fmt: skip
    if not leads:
        summary = _launch(prepared, party, None)
        summary.pop("finish", None)
        checkpoint = str(prepared.out.resolve() / "checkpoints" / Path(summary["checkpoint"]).name)  # this node's
        return dict(summary, out=out, checkpoint=checkpoint, **_export(prepared, party, not prepared.evaluate))
    keeper = Keeper(prepared.out, prepared.done, say)
    with exporting.nothing_half_done(prepared.config.export):
        summary = _launch(prepared, party, keeper)
        if not prepared.evaluate:
            say("peak memory per stage: %s GiB" % ", ".join("%.2f" % gib for gib in summary["peak_gib"]))
        say("report: %s" % (prepared.out / "report.html"))
        try:
            return dict(summary, out=out, **_export(prepared, party, not prepared.evaluate, summary.pop("finish", None)))
        finally:
            keeper.write()  # with the proof, whether it holds or not


def _export(prepared: Any, party: Any, trained: bool, written: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
    """On node 0, see exporting.export; the other nodes give it what it lacks."""
    leads = party is None or party.place.node == 0
    together.bring(party, prepared, leads and exporting.to_do(prepared, trained))
    return exporting.export(prepared, trained, written) if leads else {}


def _launch(prepared: Any, party: Any, keeper: Any) -> Dict[str, Any]:
    """Train, however it ends shown on the terminal and in report.html where there is a ``keeper``; -> the summary."""
    from pipeline_train.errors import RunFailed, Stopped
    from pipeline_train.launch import launch

    run = prepared.config
    team, addresses = together.team(party)
    finished = {"finished": True} if prepared.evaluate else {}
    finish = None if prepared.evaluate else exporting.by_ranks(run.export)
    if keeper is None:
        return dict(launch(prepared, lambda message: None, team, addresses, finish), **finished)
    progress = Progress(prepared.total, run.run.name, run.parallel.pipe, run.micro_batches)

    def show(message: Dict[str, Any]) -> None:
        progress.show(message)
        keeper.show(message)

    try:
        summary = launch(prepared, show, team, addresses, finish)
    except (RunFailed, KeyboardInterrupt) as error:
        progress.close()
        state = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped" if isinstance(error, Stopped) else "failed"
        keeper.end(state, str(error))
        say(kept(prepared.out))
        raise
    finally:
        progress.close()
    keeper.end("finished")
    return dict(summary, **finished)


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
