"""Nodes without a shared disk: which layers lie on a node, and which checkpoint is whole on every one of them. No torch."""

from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

from . import manifest, manifest_where, run_folder
from .config_schema import RunConfig
from .errors import UserError
from .place import Place

Exchange = Callable[[Dict[str, Any]], List[Dict[str, Any]]]  # control.Channel.exchange: every node's document, on every node
SHOWN = 5  # steps named of a node


def layers_here(run: RunConfig, place: Place) -> List[int]:
    """The layers of the stages on this node. ``run`` is resolved: parallel.parts counts layers. All of them where the disk is
    shared or there is one node."""
    parts = run.parallel.parts
    assert not isinstance(parts, str), "prepare resolves it"
    if place.shared or len(place.nodes) == 1:
        return list(range(sum(parts)))
    pipe, data = run.parallel.pipe, run.parallel.data
    stages = {rank // data if list(run.parallel.axes) == ["pipe", "data"] else rank % pipe for rank in place.ranks}
    return [layer for stage in sorted(stages) for layer in range(sum(parts[:stage]), sum(parts[: stage + 1]))]


def check_layout(checkpoint: Path, layers: List[int]) -> None:
    """Whether a resume that reads these layers finds their files here. Raises UserError, one line, naming the nodes that have them
    and the command that brings them."""
    document = manifest.read(checkpoint)
    names = [name for layer in layers for name in (manifest.layer_file(layer), manifest.optim_file(layer))]
    manifest_where.require(checkpoint, document, names, everywhere=True)


class Saved(NamedTuple):
    """A step that a node has whole. ``sha256``: its manifest's, the same on every node of one save."""

    step: int
    sha256: str


def agreed(everyone: List[List[Saved]]) -> List[int]:
    """The steps that every node has whole from one save, newest first."""
    common = set.intersection(*[{Saved(*saved) for saved in node} for node in everyone])
    return sorted((saved.step for saved in common), reverse=True)


def find_together(exchange: Exchange, place: Place, out: Path, resume: Optional[str], say: run_folder.Say) -> Optional[Path]:
    """run_folder.find for nodes without a shared disk: the newest checkpoint that is whole on every node, sizes and hashes. All
    nodes must call it.

    Raises UserError as find does, and when checkpoints are there but none on every node."""
    found = run_folder.used(out, resume)
    documents = exchange({"saved": run_folder.whole_steps(out), "found": len(found)})
    everyone = [[Saved(*saved) for saved in document["saved"]] for document in documents]
    if not any(document["found"] for document in documents):
        return run_folder.find(out, resume, say)
    steps = agreed(everyone)
    for step in sorted({saved.step for node in everyone for saved in node} - set(steps), reverse=True):
        if not steps or step > steps[0]:
            say("passed over: step_%06d: not whole on every node (%s)" % (step, _has(step, everyone, place)))
    for step in steps:
        problem, path = "", out / "checkpoints" / ("step_%06d" % step)
        try:
            run_folder.check_whole(path)
        except manifest.Unreadable:
            raise
        except UserError as error:
            problem = str(error)
        problems = [document["problem"] for document in exchange({"problem": problem})]
        if not any(problems):
            return path
        node = next(number for number, line in enumerate(problems) if line)
        say("passed over: node %d (%s): %s" % (node, place.nodes[node].name, problems[node]))
    told = "; ".join("node %d (%s) has %s" % (number, place.nodes[number].name, _steps(saved))
                     for number, saved in enumerate(everyone))  # fmt: skip
    raise UserError("%s: --resume: no checkpoint is whole on every node: %s. What others have of it comes back by "
                    "pipedock gather --input %s --everywhere %s, on every node. Or give run.out another folder."
                    % (out, told, out, manifest_where.TOGETHER))  # fmt: skip


def _has(step: int, everyone: List[List[Saved]], place: Place) -> str:
    lacks = ["%d (%s)" % (number, place.nodes[number].name) for number, node in enumerate(everyone)
             if step not in [saved.step for saved in node]]  # fmt: skip
    if not lacks:
        return "they come from different saves"
    return "not on node%s %s" % ("s" if len(lacks) > 1 else "", ", ".join(lacks))


def _steps(saved: List[Saved]) -> str:
    names = [str(one.step) for one in saved]
    more = ", ... (%d more)" % (len(names) - SHOWN) if len(names) > SHOWN else ""
    return "step%s %s%s" % ("s" if len(names) > 1 else "", ", ".join(names[:SHOWN]), more) if names else "none"
