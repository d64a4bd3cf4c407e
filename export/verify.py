"""The proof that an export is the trained model: same keys, same bits, same logits and hidden states as plain transformers.

Every step that can still be taken after a failure is taken: proof.json tells the whole story, the message its first failure.
"""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from pipeline_train import manifest
from pipeline_train.errors import RunFailed, UserError
from pipeline_train.weights import Source, find_folder, open_source, same_bits

from . import beside, naming, sidecars
from .from_hf import SHORT, main_dtype, versions
from .measure import Meter, Progress, peak_gib
from .shards import Item
from .to_hf import cast, step_of

PROOF = "proof.json"


def verify(
    checkpoint: str,
    export: str,
    prompts: Optional[List[str]] = None,
    tolerance: float = 1e-5,
    progress: Optional[Progress] = None,
) -> Dict[str, Any]:
    """Prove ``export`` (an HF folder) equal to ``checkpoint`` (a run, checkpoint, from-hf or HF folder); write <export>/proof.json.

    ``prompts``: texts to compare on, None: a few fixed ones, if the export has a tokenizer; fixed random ids always.
    ``tolerance``: largest |difference| allowed in logits and in every layer's hidden states, relative to the largest value there.
    Returns the proof. Raises UserError when a folder is not what it should be, RunFailed (after writing the proof, with
    "holds": false) when it does not hold.
    """
    start = time.perf_counter()
    folder = Path(export)
    if not os.path.isfile(str(folder / "config.json")):
        raise UserError("%s: no config.json there; name the folder that `pipedock to-hf` wrote" % export)
    if not 0 < tolerance < 1:
        raise UserError("--tolerance %s: expected a number between 0 and 1, such as 1e-5" % tolerance)
    source = open_source(checkpoint)
    source.check()
    if source.manifest is not None:
        manifest.check_hashes(source.folder, source.manifest, optimizer=False)
    if folder.resolve() == source.folder.resolve():
        raise UserError("%s: is the checkpoint itself; nothing would be proved" % export)
    if manifest.is_layer_folder(folder):
        raise UserError("%s: holds layer files, not an export; make one with `pipedock to-hf`" % export)
    proof: Dict[str, Any] = {
        "format": "pipedock-proof/1",
        "holds": False,
        "checkpoint": str(checkpoint),
        "export": str(export),
        "kind": source.kind,
        "step": step_of(source),
        "manifest": _manifest_hash(source.folder) if source.manifest is not None else None,
        "family": source.family.name,
        "tied": source.dims.tied,
        "tolerance": tolerance,
    }
    failures = _prove(source, folder, prompts, tolerance, progress, proof)
    proof.update(holds=not failures, failures=failures, files=_files(folder), versions=_versions())
    proof.update(seconds=round(time.perf_counter() - start, 3), peak_gib=round(peak_gib(), 3))
    other = _held(folder) if failures else None
    if other is not None and other["manifest"] != proof["manifest"]:
        # Asked about the wrong checkpoint, most likely: the proof against the right one stays.
        raise RunFailed("%s: is not the model of %s: %s. It is the proved export of %s, and keeps that proof."
                        % (export, checkpoint, failures[0], other["checkpoint"]), document=proof)  # fmt: skip
    try:
        (folder / PROOF).write_text(json.dumps(proof, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunFailed("%s: cannot be written: %s" % (folder / PROOF, error.strerror)) from None
    if failures:
        more = "; %d more kinds of difference in %s" % (len(failures) - 1, folder / PROOF) if len(failures) > 1 else ""
        raise RunFailed("%s: is not the checkpoint's model: %s%s" % (export, failures[0], more), document=proof)
    return proof


def proved(export: str, checkpoint: str, step: int) -> bool:
    """Whether ``export`` carries a proof that holds for this step of this run or checkpoint: made from the very checkpoint that is
    there now, with every file of the export as it was then, and no weights added."""
    proof = _held(Path(export))
    try:
        return proof is not None and (proof["step"], proof["manifest"]) == (step, _manifest_hash(find_folder(checkpoint)))
    except (OSError, UserError):
        return False


def _held(folder: Path) -> Optional[Dict[str, Any]]:
    """The proof of an export if it held and the export's files are still those it was made of."""
    try:
        proof = json.loads((folder / PROOF).read_text(encoding="utf-8"))
        files = proof["files"]
        same = files and all(entry == manifest.file_entry(folder / name) for name, entry in files.items())
        whole = same and not beside.weight_files(folder) - set(files)
        return proof if whole and proof["holds"] is True and {"step", "manifest", "checkpoint"} <= set(proof) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _prove(source: Source, folder: Path, prompts: Optional[List[str]], tolerance: float, progress: Optional[Progress],
           proof: Dict[str, Any]) -> List[str]:  # fmt: skip
    """Fill the proof step by step; returns the failures in order."""
    try:
        target = open_source(str(folder))
        failures = _keys(source, target, proof)
        target.check()
    except UserError as error:
        return [str(error)]
    failures += _config(source, target, proof) + beside.strays(target)
    steps: List[Callable[[], List[str]]] = [
        lambda: beside.identity(source, target),
        lambda: beside.files(source, folder),
        lambda: beside.tokenization(source.folder, folder, prompts),
    ]
    if _shapes(source, target):
        steps.append(lambda: _tensors(source, target, progress, proof))
        steps.append(lambda: _arithmetic(source, target, prompts, tolerance, proof))
    for step in steps:
        try:
            failures += step()
        except (RunFailed, UserError) as error:
            failures += [str(error)] if str(error) not in failures else []
    return failures


def _keys(source: Source, target: Source, proof: Dict[str, Any]) -> List[str]:
    """Exactly the tensors an export of this model has."""
    expected = {name for name, _, _ in naming.exported(source.family, source.dims)}
    found = set(target.names())
    proof["keys"] = {"expected": len(expected), "missing": sorted(expected - found), "extra": sorted(found - expected)}
    return ["%d tensor(s) %s: %s" % (len(keys), what, ", ".join(keys[:5]))
            for what, keys in (("missing", sorted(expected - found)), ("extra", sorted(found - expected))) if keys]  # fmt: skip


def _config(source: Source, target: Source, proof: Dict[str, Any]) -> List[str]:
    """Every size and switch that decides the arithmetic; and the dtype that "auto" would load."""
    ours, theirs = dataclasses.asdict(source.dims), dataclasses.asdict(target.dims)
    differing = {key: [ours[key], theirs[key]] for key in ours if ours[key] != theirs[key]}
    proof["config"] = {"differing": differing}
    failures = ["config.json: %s is %s in the checkpoint, %s in the export" % (key, a, b) for key, (a, b) in differing.items()]
    said = target.config.get("torch_dtype", target.config.get("dtype"))
    items = [Item("", target.entry(layer, slot.name).dtype, slot.size(target.dims)) for layer, slot in target.slots()]
    held, _ = main_dtype(items)
    proof["dtype"] = SHORT[held]
    if said != sidecars.TORCH_NAMES[held]:
        failures.append("config.json: torch_dtype is %s, the weights are %s" % (said, sidecars.TORCH_NAMES[held]))
    return failures


def _shapes(source: Source, target: Source) -> bool:
    """Whether the two have the same parameters, so that they can be compared further."""
    ours, theirs = ({(layer, s.name, s.size(x.dims)) for layer, s in x.slots()} for x in (source, target))
    return ours == theirs


def _tensors(source: Source, target: Source, progress: Optional[Progress], proof: Dict[str, Any]) -> List[str]:
    """Every tensor bit-equal to the checkpoint's, rounded to the export's dtype; tied copies bit-equal on both sides."""
    failures = []
    for side in (source, target):
        try:
            side.check_tied()
        except (UserError, RunFailed) as error:
            failures.append(str(error))
    items = []
    for layer, slot in target.slots():
        items.append(
            Item(
                source.family.hf_name(slot, layer), target.entry(layer, slot.name).dtype, slot.size(target.dims), (layer, slot.name)
            )
        )
    meter = Meter(sum(item.nbytes for item in items), progress)
    differing = []
    for item in items:
        pairs = zip(source.pieces(*item.source), target.pieces(*item.source))
        if not all(same_bits(cast(master, item.dtype, item.name), exported) for master, exported in pairs):
            differing.append(item.name)
        meter.add(item.nbytes)
    proof["tensors"] = {"compared": len(items), "differing": differing}
    if differing:
        failures.append("%d tensor(s) differ in their bits: %s" % (len(differing), ", ".join(differing[:5])))
    return failures


def _arithmetic(source: Source, target: Source, texts: Optional[List[str]], tolerance: float, proof: Dict[str, Any]) -> List[str]:
    """Hidden states of every layer and logits: our blocks on the checkpoint against transformers on the export."""
    from . import forward

    rows = [forward.random_ids(source.dims)]
    used: List[str] = []
    if any(name.startswith("tokenizer") for name in sidecars.names(target.folder)):
        used = list(forward.TEXTS if texts is None else texts)
        rows += forward.text_ids(target.folder, used, source.dims)
    elif texts:
        raise UserError("%s: has no tokenizer, so texts cannot be compared" % target.folder)
    proof["prompts"] = {"texts": used, "rows": len(rows), "tokens": sum(map(len, rows))}
    theirs = forward.hf_states(target.folder, rows, source)
    dtypes = {(layer, slot.name): target.entry(layer, slot.name).dtype for layer, slot in target.slots()}
    found: List[Dict[str, Any]] = []
    for (layer, what), ours in forward.our_states(source, dtypes, rows):
        found.append(dict({"layer": layer, "what": what}, **forward.difference(ours, theirs.pop((layer, what)))))
    shown = [{key: None if value != value else value for key, value in row.items()} for row in found]  # JSON has no NaN
    proof["layers"], proof["logits"] = shown[:-1], shown[-1]
    return _beyond(found, tolerance)


def _beyond(found: List[Dict[str, Any]], tolerance: float) -> List[str]:
    first = next((row for row in found if not row["relative"] <= tolerance), None)
    if first is None:
        return []
    return ["layer %(layer)d (%(what)s) is the first that differs from transformers: %(relative).3g of its largest value" % first
            + ", over the tolerance of %g" % tolerance]  # fmt: skip


def _files(folder: Path) -> Dict[str, Any]:
    """Size and sha256 of every file of the export but the proof itself."""
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / PROOF]
    return {p.relative_to(folder).as_posix(): manifest.file_entry(p) for p in paths}


def _manifest_hash(folder: Path) -> str:
    return str(manifest.file_entry(folder / manifest.NAME)["sha256"])


def _versions() -> Dict[str, str]:
    import transformers

    return dict(versions(), transformers=transformers.__version__)
