"""The pipeline of this machine against plain transformers in one process, on a tiny random model; one rank of it.

``python -m pipeline_train.selftest FOLDER``, started by selftest_run.py; reads FOLDER/cases.json: a list of selftest_run.case.
Every rank trains its stage for a few clipped AdamW steps; rank 0 then repeats them with transformers in fp32 on the CPU and
reports how far loss, gradient norm, gradients and the losses of the steps are off.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import torch
import torch.distributed as dist

from . import checkpoint, config, engine, families, worker
from .config_schema import RunConfig
from .data.feed import StepRows
from .engine import Pipeline
from .loop import micro_batches
from .optimizer import learning_rate
from .plan import bounds
from .pulse import Pulse
from .random_model import make_model
from .watch import COMPARING

Rows = Callable[[int], StepRows]  # the rows of a step
Tensors = Dict[str, torch.Tensor]
FAR = 1e9  # stands for a difference that is no number


def make_rows(step: int, rows: int, width: int, vocab: int, packed: bool = True) -> StepRows:
    """1 to 3 samples in each row (one when not ``packed``), 10 to 90 % of a sample's tokens learnt, the last row empty when
    there are more than two. A pure function: every rank and the reference make the same."""
    random = np.random.default_rng(step)
    ids = random.integers(3, vocab, (rows, width))
    positions, segments = np.zeros((rows, width), np.int64), np.zeros((rows, width), np.int64)
    targets = np.full((rows, width), -100, np.int64)
    for row in range(rows - 1 if rows > 2 else rows):
        end = 0
        for segment in range(1, int(random.integers(2, 5)) if packed else 2):
            length = int(random.integers(2, width // 3 if packed else width))
            place = slice(end, end + length)
            positions[row, place], segments[row, place] = np.arange(length), segment
            learnt = random.random(length) < random.uniform(0.1, 0.9)
            learnt[0] |= row == 0 and segment == 1  # a step with nothing to learn would compare nothing
            targets[row, place] = np.where(learnt, random.integers(3, vocab, length), -100)
            end += length
    learnt_tokens = int((targets != -100).sum())
    return StepRows(ids, positions, segments, targets, int((segments > 0).sum()), learnt_tokens, 0, [0])


def loss_of(model: Any, rows: StepRows) -> torch.Tensor:
    """Mean cross entropy over the step's learnt tokens, each sample of each row in a forward pass of its own."""
    total = torch.zeros(())
    for row in range(len(rows.ids)):
        for segment in range(1, int(rows.segments[row].max()) + 1):
            place = rows.segments[row] == segment
            logits = model(torch.from_numpy(rows.ids[row, place])[None]).logits[0]
            targets = torch.from_numpy(rows.targets[row, place])
            total = total + torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
    return total / max(1, rows.learnt_tokens)


def plain(folder: str, run: RunConfig, rows_of: Rows, steps: int, optimizer_of: Callable[..., Any]) -> Dict[str, Any]:
    """Train the HF folder with transformers alone, fp32, on the CPU -> losses, norms, gradients (first step's, clipped), model.

    ``optimizer_of``: the parameter groups -> a torch optimizer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).float().train()
    named = dict(model.named_parameters())
    matrices = [p for p in named.values() if p.dim() > 1]
    vectors = [p for p in named.values() if p.dim() == 1]
    optimizer = optimizer_of(
        [{"params": matrices, "weight_decay": run.optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    )
    out: Dict[str, Any] = {"losses": [], "norms": [], "model": model}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.optim, step, steps)
        optimizer.zero_grad()
        loss = loss_of(model, rows_of(step))
        loss.backward()
        out["losses"].append(float(loss.detach()))
        out["norms"].append(float(torch.nn.utils.clip_grad_norm_(list(named.values()), run.optim.clip)))
        if step == 0:
            out["gradients"] = {name: p.grad.clone() for name, p in named.items()}
        optimizer.step()
    return out


def adamw(run: RunConfig) -> Callable[..., Any]:
    optim = run.optim
    return lambda groups: torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps)


def read_all(pipe: Pipeline, moment: Optional[str] = None) -> Tensors:
    """ "<layer>/<slot>" -> master weight or moment, whole, of this rank's layers."""
    return {
        "%d/%s" % (layer, name): pipe.read_whole(p, moment)
        for layer in pipe.stage.layers
        for name, p in checkpoint.named(pipe, layer).items()
    }


def piped(pipe: Pipeline, rows_of: Rows, steps: int) -> Dict[str, Any]:
    """Train the pipeline -> losses, norms and the first step's clipped gradients of this rank's layers."""
    run = pipe.config
    old = run.optim.betas[1 if run.optim.type == "lion" else 0]  # the moment's decay: it started at zero, so it is (1-old) x g
    out: Dict[str, Any] = {"losses": [], "norms": []}
    for step in range(steps):
        rows = rows_of(step)
        batches = micro_batches(rows, run.batch.micro, pipe.data_rank, run.parallel.data)
        result = pipe.train(batches, rows.learnt_tokens, learning_rate(run.optim, step, steps))
        out["losses"].append(result.loss)
        out["norms"].append(result.grad_norm)
        if step == 0:
            out["gradients"] = {name: moment / (1 - old) for name, moment in read_all(pipe, "exp_avg").items()}
    return out


def hf_names(raw: Dict[str, Any], tied: bool) -> Dict[str, str]:
    """ "<layer>/<slot>" -> the transformers parameter; a tied head is the embedding there."""
    family, dims = families.family_of(raw), families.dims_of(raw)
    slots = [(layer, slot) for layer in range(dims.layers) for slot in family.layer_slots(dims, layer)]
    names = {"%d/%s" % (layer, slot.name): family.hf_name(slot, layer) for layer, slot in slots}
    return {slot: family.tied[0] if tied and name == family.tied[1] else name for slot, name in names.items()}


def off(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """max|difference| / max|theirs|."""
    found = float((mine.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-12))
    return found if found < FAR else FAR


def furthest(pairs: List[Tuple[Any, Any]]) -> float:
    """The worst of numbers compared one by one, relative; None is no number."""
    return max(off(torch.tensor(np.nan if a is None else a), torch.tensor(b)) for a, b in pairs)


def compare(everyone: List[Dict[str, Any]], wanted: Dict[str, Any], names: Dict[str, str]) -> Dict[str, Any]:
    """What every rank measured against transformers -> {"loss", "grad_norm", "gradients", "losses": worst relative difference,
    "where": the tensor whose gradient is furthest off}."""
    gradients = {}  # type: Dict[str, float]
    for mine in everyone:
        for slot, gradient in mine["gradients"].items():
            gradients[slot] = max(gradients.get(slot, 0.0), off(gradient, wanted["gradients"][names[slot]]))
    assert set(gradients) == set(names), "a parameter was not compared"
    where = max(gradients, key=lambda slot: gradients[slot])
    return {
        "loss": furthest([(mine["losses"][0], wanted["losses"][0]) for mine in everyone]),
        "grad_norm": furthest([(mine["norms"][0], wanted["norms"][0]) for mine in everyone]),
        "gradients": gradients[where],
        "losses": furthest([pair for mine in everyone for pair in zip(mine["losses"], wanted["losses"])]),
        "where": where,
    }


def run_case(case: Dict[str, Any], folder: Path, cuda: bool, pulse: Pulse) -> Dict[str, Any]:
    """-> compare's figures on rank 0, {} on the others. All ranks together."""
    if dist.get_rank() == 0:
        make_model(case["model"], folder / "model")
    dist.barrier()
    run = config.parse(dict(case["run"], model=dict(case["run"]["model"], path=str(folder / "model"))))
    dims = families.dims_of(families.read_config(run.model.path))
    seq_len = run.data.seq_len
    assert seq_len is not None
    pipe = Pipeline(run, dims, bounds(dims, run.parallel.pipe, run.parallel.parts, seq_len), cuda, pulse)
    checkpoint.start(pipe)

    def rows_of(step: int) -> StepRows:
        return make_rows(step, run.rows_per_step, seq_len or 0, dims.vocab)

    everyone = [None] * dist.get_world_size()  # type: List[Any]
    mine = piped(pipe, rows_of, case["steps"])
    pulse.tick(COMPARING)
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() != 0:
        return {}
    wanted = plain(run.model.path, run, rows_of, case["steps"], adamw(run))
    assert max(wanted["norms"]) > run.optim.clip, "clipping was not tested"
    return compare(everyone, wanted, hf_names(case["model"], dims.tied))


def main() -> None:
    folder = Path(sys.argv[1])

    def work(pulse: Pulse) -> Dict[str, Any]:
        cuda = os.environ.get("DS_ACCELERATOR") != "cpu"
        engine.connect(cuda, int(os.environ["LOCAL_RANK"]))
        cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
        figures = [run_case(case, folder / ("case_%d" % number), cuda, pulse) for number, case in enumerate(cases)]
        dist.barrier()
        return {"figures": figures}

    worker.answer_for(folder, work)


if __name__ == "__main__":
    main()
