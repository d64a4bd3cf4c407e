"""Everything that can be wrong with a run is found here, before any process starts; what the ranks need is left in <out>.

<out>/resolved/run.yaml      the configuration with every default filled in: dtype, seq_len and parts too
<out>/resolved/original.yaml the bytes the user gave      versions.json, data.json, model/ (config.json, tokenizer, template)
<out>/resolved/plan.json     the memory that plan expects of each stage
<out>/resolved/evaluation.yaml  run.yaml, where nothing but the last evaluation is left
<out>/data/                  the encoded samples
"""

from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from . import (
    checkpoint_folder,
    compat,
    config,
    families,
    hostfile,
    manifest,
    metrics,
    nodes,
    plan,
    resolved,
    run_folder,
    scattered,
    weights,
)
from .config_schema import RunConfig
from .data import feed, template
from .data.encode import TextCodec
from .data.store import default_seq_len
from .device import check_machine
from .errors import UserError
from .families import Dims
from .nodes import Party
from .place import Place

Say = Callable[[str], None]  # takes a line for the user


class Prepared(NamedTuple):
    """``config`` is resolved. ``resume``: the checkpoint to go on from, which has done ``done`` of ``total`` steps. ``evaluate``:
    nothing is left to train, but the evaluation behind the last step was cut off: ``config`` is what was trained then, laid out as
    it is to be evaluated."""

    config: RunConfig
    out: Path
    dims: Dims
    gpus: int
    total: int
    resume: Optional[Path]
    done: int
    evaluate: bool = False

    @property
    def file(self) -> Path:
        """``config``, for the ranks."""
        return resolved.file(self.out, self.evaluate)


def prepare(
    run: RunConfig,
    source: Path,
    resume: Optional[str],
    say: Say,
    allow_changed_data: bool = False,
    party: Optional[Party] = None,
    host: Optional[hostfile.Host] = None,
) -> Prepared:
    """Check, resolve, encode. ``source``: the user's run.yaml. ``resume``: None, "newest" or "auto". ``party``: the other nodes.
    ``host``: what a hostfile says of this machine.

    Raises UserError."""
    if allow_changed_data and resume is None:
        raise UserError("--allow-changed-data: goes with --resume; a new run takes its data as it is")
    here = run.world if party is None else len(party.place.ranks)
    found, gpus = check_machine(run, source.name, say, here, host)
    out = Path(run.run.out)
    if party is None:
        run_folder.take(out, source.name, say)
        checkpoint = run_folder.find(out, resume, say)
    else:
        party.check_device(gpus)
        party.open_folder(out, source.name)
        if party.follows:
            return _follow(party, out, gpus)
        checkpoint = party.find(out, resume)
    folder = _model_folder(run)
    run.model.path = str(folder)  # a hub name or a run means this folder from now on, on every rank
    stack = compat.stack(found)
    dims = _resolve_model(run, folder, source.name, plan.card_here() if gpus else None, stack, say)
    layers = scattered.layers_here(run, Place.alone(run.world) if party is None else party.place)
    facts = _facts(run)
    document = None if checkpoint is None else manifest.read(checkpoint)
    if checkpoint is not None and document is not None:  # before anything of the old run is overwritten
        run_folder.same_model(checkpoint, dims)
        run_folder.same_run(run, document, facts, allow_changed_data)
        scattered.check_layout(checkpoint, layers)
    codec = TextCodec.load(str(folder), run.data.template)
    codec.check_vocab(dims.vocab)
    facts.update(_freeze_date(codec, document, say, party.now if party is not None else None))
    facts["data"] = _encode(run, out, codec, say)
    total, per_epoch = _total_steps(run, out, codec.pad_id, say)
    done = 0 if document is None else int(document["step"])
    if document is not None:
        _say_new_data(run_folder.same_run(run, document, facts, allow_changed_data), done, total, per_epoch, say)
        if done < total:
            run_folder.say_changes(run, out, say)
    _say_pointless(run, done, total, source.name, say)
    saves = _saves(run.train.save_every or total, done, total)
    if saves:
        checkpoint_folder.check_room(run, dims, source.name, saves, say, layers, checkpoint)
    documents = {"versions.json": found, "data.json": dict(facts, pad_id=codec.pad_id), "plan.json": _planned(run, dims, stack)}
    evaluate = _evaluation_left(run, out, done, total, party)
    if done < total or not resolved.stays(run, out):
        resolved.write(run, out, source, folder, codec, documents)
    if evaluate:
        run = resolved.for_evaluation(run, out)
    prepared = Prepared(run, out, dims, gpus, total, checkpoint, done, evaluate)
    if party is not None and party.place.node == 0:
        party.share(_shared(prepared))
    return prepared


def _evaluation_left(run: RunConfig, out: Path, done: int, total: int, party: Optional[Party]) -> bool:
    """``Prepared.evaluate``; node 0 has metrics.jsonl and tells the others, see ``_shared``."""
    if party is not None and party.place.node:
        return bool(party.share()["evaluate"])
    wanted = done == total and run.data.eval is not None and resolved.evaluates(out)
    return wanted and not metrics.evaluated(out / "metrics.jsonl", done)


def _say_pointless(run: RunConfig, done: int, total: int, where: str, say: Say) -> None:
    if run.optim.warmup >= total > done:
        say("%s: optim.warmup: %d steps, and the run has %d: optim.lr is never reached" % (where, run.optim.warmup, total))
    if run.train.eval_every is not None and run.data.eval is None:
        say("%s: train.eval_every: nothing is evaluated without data.eval" % where)


def _shared(prepared: Prepared) -> Dict[str, Any]:
    """What node 0 tells those for whom it has prepared."""
    digest = manifest.file_entry(prepared.file)["sha256"]
    resume = prepared.resume.name if prepared.resume is not None else None
    return {"run": digest, "total": prepared.total, "done": prepared.done, "resume": resume, "evaluate": prepared.evaluate}


def _follow(party: Party, out: Path, gpus: int) -> Prepared:
    """For another node in the same folder: what node 0 has prepared there."""
    told = party.share()
    file = resolved.file(out, told["evaluate"])
    nodes.wait_for(file, told["run"], lambda path: str(manifest.file_entry(path)["sha256"]))
    run = config.load(file)
    dims = families.dims_of(families.read_config(str(out / "resolved" / "model")))
    resume = None if told["resume"] is None else out / "checkpoints" / told["resume"]
    return Prepared(run, out, dims, gpus, told["total"], resume, told["done"], told["evaluate"])


def _model_folder(run: RunConfig) -> Path:
    if run.model.init == "pretrained":
        return weights.find_folder(run.model.path)
    return weights.resolve(run.model.path, weights=False)


def _resolve_model(run: RunConfig, folder: Path, where: str, card: Optional[str], stack: str, say: Say) -> Dims:
    """seq_len and parts by the model and the card; checks every name and shape in the weight files, reading none."""
    raw = families.read_config(str(folder))
    dims = families.dims_of(raw)
    config.check_against_model(run, dims.layers, dims.max_positions, where)
    if run.run.fp8:
        plan.check_fp8_sizes(dims)
    if run.data.seq_len is None:
        run.data.seq_len = default_seq_len(raw, dims)
    if run.model.init == "pretrained":
        weights.open_source(str(folder)).check()
    run.parallel.parts = plan.parts_for(run, dims, card, stack)
    lack = plan.lack(run, dims, card, stack) if card is not None else None
    if lack is not None:
        say("%s: parallel: %s" % (where, lack))
    return dims


def _planned(run: RunConfig, dims: Dims, stack: str) -> Dict[str, Any]:
    """What each stage should need of a GPU, to stand beside what it is measured to need (mem_gib; a CPU's is something else)."""
    return {"stack": stack, "parts": run.parallel.parts, "gib": plan.memory_of(run, dims, stack)}


def _facts(run: RunConfig) -> Dict[str, Any]:
    """What must be the same when the run is resumed, as far as run.yaml says it."""
    return {"seq_len": run.data.seq_len, "rows_per_step": run.rows_per_step, "pack": run.data.pack, "seed": run.run.seed}


def _freeze_date(codec: TextCodec, document: Optional[Dict[str, Any]], say: Say, agreed: Optional[str]) -> Dict[str, str]:
    """For a chat template that writes the date: one date for all of a run, the first start's, ``agreed`` between several nodes.
    -> {"now": ...} or {}."""
    template.fix_now(None)
    if "strftime_now" not in codec.chat_template:
        return {}
    before = agreed if document is None else document["training"]["feed"].get("now")
    now = datetime.now().replace(microsecond=0) if before is None else datetime.fromisoformat(before)
    template.fix_now(now)
    say(
        "the chat template writes the date: the data is encoded with %s, a server's prompts carry the day they are sent"
        % now.date()
    )
    return {"now": now.isoformat()}


def _encode(run: RunConfig, out: Path, codec: TextCodec, say: Say) -> str:
    """Encode train and eval data; -> a hash of what is trained on."""
    seq_len = run.data.seq_len
    assert seq_len is not None
    try:
        (out / "data").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError("run.out: %s: cannot be made: %s" % (out / "data", error.strerror)) from None
    names = ("eval", "train") if run.data.eval is not None else ("train",)
    found = [feed.prepare(run, codec, which, out / "data", seq_len, say) for which in names]
    say("%(file)s: %(records)d records, %(bad)d bad, %(tokens)d tokens, %(learnt_tokens)d of them learnt, %(truncated)d truncated, "
        "%(dropped)d dropped, %(nothing_to_learn)d with nothing to learn" % found[-1])  # fmt: skip
    for line in dict.fromkeys(line for one in found for line in one["warnings"]):  # behind the counts, where they are seen
        say(line)
    return str(found[-1]["hash"][:16])


def _say_new_data(changes: List[str], done: int, total: int, per_epoch: int, say: Say) -> None:
    """What going on with other data means for the place in it. Raises UserError when nothing is left to do."""
    for line in changes:
        say(line)
    if changes and done >= total:
        raise UserError("--allow-changed-data: the run has done %d steps, and the new data makes only %d in all. Raise "
                        "train.epochs, or start a new run.out." % (done, total))  # fmt: skip
    if changes:
        epoch, step = divmod(done, per_epoch)
        say("--allow-changed-data: the step number goes on counting: the next step is %d of %d, which is step %d of %d in epoch %d "
            "of the new data. What lies before it is not learnt in that epoch, what was learnt already may come again."
            % (done + 1, total, step + 1, per_epoch, epoch + 1))  # fmt: skip


def _saves(every: int, done: int, total: int) -> int:
    """Saves to come: after every so many steps and at the end."""
    return max(0, total // every - done // every + int(total % every > 0 and done < total))


def _total_steps(run: RunConfig, out: Path, pad_id: int, say: Say) -> Tuple[int, int]:
    """Of the run, and of one epoch."""
    seq_len = run.data.seq_len
    assert seq_len is not None
    opened = feed.Feed.open(
        out / "data",
        "train",
        seq_len=seq_len,
        rows_per_step=run.rows_per_step,
        seed=run.run.seed,
        pack=run.data.pack,
        pad_id=pad_id,
    )
    say("rows of %d tokens, %.1f %% filled" % (seq_len, 100 * opened.efficiency()))
    total = run.train.epochs * opened.steps_per_epoch
    return total if run.train.max_steps is None else min(total, run.train.max_steps), opened.steps_per_epoch
