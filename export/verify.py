"""The proof that an export is the trained model: same keys, same bits, same logits and hidden states as plain transformers.

Every step that can still be taken after a failure is taken: proof.json tells the whole story, the message its first failure.
"""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from pipeline_train import manifest
from pipeline_train import proof as proofs
from pipeline_train.errors import RunFailed, UserError
from pipeline_train.families import Dims
from pipeline_train.weights import Source, find_folder, open_source, same_bits
from pipeline_train.weights.writing import Item

from . import beside, bins, card, compute, sidecars, targets
from .compute import Ask
from .from_hf import SHORT, main_dtype, versions
from .measure import Meter, Progress, peak_gib
from .targets import Target
from .to_hf import DTYPES, cast, step_of


def verify(
    checkpoint: str,
    export: str,
    prompts: Optional[List[str]] = None,
    tolerance: float = 1e-5,
    progress: Optional[Progress] = None,
    whole: Optional[bool] = None,
) -> Dict[str, Any]:
    """Prove ``export`` (an HF folder) equal to ``checkpoint`` (a run, checkpoint, from-hf or HF folder); write <export>/proof.json.

    ``prompts``: texts to compare on, None: a few fixed ones, if the export has a tokenizer; fixed random ids and samples that
    the run learnt always.
    ``tolerance``: largest |difference| allowed in logits and in every layer's hidden states, relative to the largest value there.
    ``whole``: whether transformers' whole model is compared besides its layers one by one, None: where it fits in memory.
    Returns the proof. Raises UserError when a folder is not what it should be, RunFailed (after writing the proof, with
    "holds": false) when it does not hold.
    """
    start = time.perf_counter()
    if not 0 < tolerance <= 0.01:
        raise UserError("--tolerance %s: expected a number up to 0.01, such as 1e-5: more proves nothing" % tolerance)
    folder, source = _open(checkpoint, export)
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
    before = proofs.stamps(folder)
    failures = _prove(source, folder, Ask(prompts, tolerance, progress, whole), proof)
    files = proofs.files(folder)
    if proofs.stamps(folder) != before:
        failures.append("its files changed while they were compared; run it again when nobody writes there")
    proof.update(holds=not failures, failures=failures, files=files, versions=_versions())
    proof.update(seconds=round(time.perf_counter() - start, 3), peak_gib=round(peak_gib(), 3))
    _keep(folder, proof)
    if failures:
        where = folder / proofs.NAME
        told = " in %s" % where if where.is_file() else ""
        more = "; %d more kinds of difference%s" % (len(failures) - 1, told) if len(failures) > 1 else ""
        raise RunFailed("%s: is not the checkpoint's model: %s%s" % (export, failures[0], more), document=proof)
    return proof


def proved(export: str, checkpoint: str, step: int) -> bool:
    """Whether ``export`` carries a proof that holds for this step of this run or checkpoint: made from the very checkpoint that is
    there now, with every file of the export as it was then, and no weights added."""
    held = proofs.held(Path(export))
    try:
        return held is not None and (held["step"], held["manifest"]) == (step, _manifest_hash(find_folder(checkpoint)))
    except (OSError, UserError):
        return False


def _open(checkpoint: str, export: str) -> Tuple[Path, Source]:
    """(the export's folder, the checkpoint's weights, whole and unchanged)."""
    folder = Path(export)
    if not os.path.isfile(str(folder / "config.json")):
        raise UserError("%s: no config.json there; name the folder that `pipedock to-hf` wrote" % export)
    source = open_source(checkpoint)
    source.check()
    if source.manifest is not None:
        manifest.check_hashes(source.folder, source.manifest, optimizer=False)
    if folder.resolve() == source.folder.resolve():
        raise UserError("%s: is the checkpoint itself; nothing would be proved" % export)
    if manifest.is_layer_folder(folder):
        raise UserError("%s: holds layer files, not an export; make one with `pipedock to-hf`" % export)
    return folder, source


def _keep(folder: Path, proof: Dict[str, Any]) -> None:
    """Write it beside the files it is about, but for a failure over a proof of another checkpoint that holds."""
    other = proofs.held(folder) if proof["failures"] else None
    if other is not None and other["manifest"] != proof["manifest"]:
        # Asked about the wrong checkpoint, most likely: the proof against the right one stays.
        raise RunFailed("%s: is not the model of %s: %s. It is the proved export of %s, and keeps that proof."
                        % (proof["export"], proof["checkpoint"], proof["failures"][0], other["checkpoint"]),
                        document=proof)  # fmt: skip
    if proof["failures"] and not proofs.is_export(folder):
        return  # a model of the user's own, most likely the wrong folder: it is served as before
    try:
        card.prove(folder, proof)
        aside = folder / (".%s.new" % proofs.NAME)  # the old one holds until this one is whole
        aside.write_text(json.dumps(proof, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(str(aside), str(folder / proofs.NAME))
    except OSError as error:
        raise RunFailed("%s: cannot be written: %s" % (folder / proofs.NAME, error.strerror)) from None


def _prove(source: Source, folder: Path, ask: Ask, proof: Dict[str, Any]) -> List[str]:
    """Fill the proof step by step; returns the failures in order."""
    try:
        target = open_source(str(folder))
        wanted = _target(folder)
        proof["target"] = wanted.name
        failures = _keys(source, target, wanted, proof)
        target.check()
        proof["dtype"] = _dtype(target)
    except UserError as error:
        return [str(error)]
    dims = targets.exported_dims(wanted, source.family, source.dims)
    bin_files = bins.files(folder) if targets.needs_bins(wanted, source.family) else set()
    failures += _config(dims, target, proof) + beside.strays(target, bin_files)
    steps: List[Callable[[], List[str]]] = [
        lambda: beside.identity(source, target),
        lambda: beside.files(source, folder, wanted.merges),
        lambda: beside.tokenization(source.folder, folder, ask.texts),
    ]
    if _shapes(source, target):
        steps.append(lambda: _tensors(source, target, ask.progress, proof))
        if targets.needs_bins(wanted, source.family):
            named = {name: (layer, slot.name) for name, layer, slot in targets.exported(wanted, source.family, source.dims)}
            steps.append(lambda: bins.differing(target, named))
        steps.append(lambda: compute.prove(source, target, dims, ask, proof))
    for step in steps:
        try:
            failures += step()
        except (RunFailed, UserError) as error:
            failures += [str(error)] if str(error) not in failures else []
    return failures


def _target(folder: Path) -> Target:
    """Whom the export says that it is for. Raises UserError."""
    path = folder / proofs.EXPORT
    return targets.find(str(sidecars.read_json(path).get("target"))) if path.is_file() else targets.find("hf")


def _keys(source: Source, target: Source, wanted: Target, proof: Dict[str, Any]) -> List[str]:
    """Exactly the tensors an export of this model has."""
    expected = {name for name, _, _ in targets.exported(wanted, source.family, source.dims)}
    found = set(target.names())
    proof["keys"] = {"expected": len(expected), "missing": sorted(expected - found), "extra": sorted(found - expected)}
    return ["%d tensor(s) %s: %s" % (len(keys), what, ", ".join(keys[:5]))
            for what, keys in (("missing", sorted(expected - found)), ("extra", sorted(found - expected))) if keys]  # fmt: skip


def _dtype(target: Source) -> str:
    """The dtype that holds most of the weights."""
    items = [Item("", target.entry(layer, slot.name).dtype, slot.size(target.dims)) for layer, slot in target.slots()]
    return SHORT[main_dtype(items)[0]]


def _config(expected: Dims, target: Source, proof: Dict[str, Any]) -> List[str]:
    """Every size and switch that decides the arithmetic; and the dtype that "auto" would load."""
    ours, theirs = dataclasses.asdict(expected), dataclasses.asdict(target.dims)
    differing = {key: [ours[key], theirs[key]] for key in ours if ours[key] != theirs[key]}
    proof["config"] = {"differing": differing}
    failures = ["config.json: %s is %s in the checkpoint, %s in the export" % (key, a, b) for key, (a, b) in differing.items()]
    said = target.config.get("torch_dtype", target.config.get("dtype"))
    held = sidecars.TORCH_NAMES[DTYPES[proof["dtype"]]]
    if said != held:
        failures.append("config.json: torch_dtype is %s, the weights are %s" % (said, held))
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


def _manifest_hash(folder: Path) -> str:
    return str(manifest.file_entry(folder / manifest.NAME)["sha256"])


def _versions() -> Dict[str, str]:
    import transformers

    return dict(versions(), transformers=transformers.__version__)
