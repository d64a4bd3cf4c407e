"""Loss, gradients and weights of the real pipeline (DeepSpeed, several processes) against transformers in this process.

Every launch works through many cases, because starting a rank costs seconds. With PIPEDOCK_MATRIX=FILE all cases of matrix.py
are run, not only the quick ones, and their worst figures are left in FILE (ci/matrix.sh).
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline_train import compat, config, selftest
from tests.free_port import free_port
from tests.integration import matrix
from tests.integration.pipeline_rank import EVALUATED, make_rows
from tests.models import make_hf

BF16 = compat.release(compat.versions()["deepspeed"] or "") >= (0, 9, 3)  # compat.check_dtype refuses it before
RANK = Path(__file__).with_name("pipeline_rank.py")
FIGURES = os.environ.get("PIPEDOCK_MATRIX")
SELECTIVE = compat.release(torch.__version__) >= (2, 4)  # compat.check_selective
HERE = [c for c in matrix.MATRIX + matrix.EXTRA if (c.dtype != "bf16" or BF16) and (c.recompute != "selective" or SELECTIVE)]
CASES = [case for case in HERE if case.quick or FIGURES]
AT_ONCE = 20  # cases of one launch: each leaves 30 sockets of its process groups open, and 1024 is a usual limit
MODELS = matrix.models()
WORLDS = pytest.mark.parametrize("world", sorted({case.world for case in CASES}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model name -> its folder."""
    root = tmp_path_factory.mktemp("models")
    for name, raw in MODELS.items():
        make_hf(root / name, raw)
    return {name: root / name for name in MODELS}


def launch(world, cases, folder, folders):
    """-> {case: [what each rank left]}."""
    documents = [
        {"name": case.name, "run": case.run(folders[case.model]), "steps": matrix.STEPS, "offload": case.offload} for case in cases
    ]
    (folder / "cases.json").write_text(json.dumps(documents))
    env = dict(os.environ, WORLD_SIZE=str(world), LOCAL_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()),
               OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")  # fmt: skip
    ranks = []
    for rank in range(world):
        log = open(str(folder / ("log.%d" % rank)), "w")
        command = [sys.executable, str(RANK), str(folder)]
        ranks.append(subprocess.Popen(command, env=dict(env, RANK=str(rank), LOCAL_RANK=str(rank)), stdout=log, stderr=log))
    try:
        codes = [rank.wait(timeout=240 + 20 * len(cases)) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * world, (folder / ("log.%d" % next(r for r, c in enumerate(codes) if c))).read_text()[-3000:]
    return {case: [torch.load(str(folder / ("%s.%d.pt" % (case.name, r)))) for r in range(world)] for case in cases}


@pytest.fixture(scope="module")
def launched(folders, tmp_path_factory):
    """World size -> {case: [what each rank left]}; launched when it is first asked for."""
    done = {}

    def get(world):
        if world not in done:
            cases = [case for case in CASES if case.world == world]
            found = {}
            for first in range(0, len(cases), AT_ONCE):
                folder = tmp_path_factory.mktemp("world%d" % world)
                found.update(launch(world, cases[first : first + AT_ONCE], folder, folders))
            done[world] = found
        return done[world]

    return get


@pytest.fixture(scope="module")
def reference(folders):
    """Case -> what transformers and torch alone make of it; one for all cases with the same rows and optimizer."""
    done = {}

    def get(case):
        key = (case.model, case.rows, case.packed, case.optim)
        if key not in done:
            run = config.parse(dict(case.run(folders[case.model]), parallel={"pipe": 1}))

            def rows_of(step):
                return make_rows(step, case.rows, matrix.WIDTH, matrix.VOCAB, case.packed)

            optimizer_of = lion(run) if case.optim == "lion" else selftest.adamw(run)
            made = selftest.plain(str(folders[case.model]), run, rows_of, matrix.STEPS, optimizer_of)
            assert max(made["norms"]) > matrix.CLIP  # or clipping would not be tested
            with torch.no_grad():
                made["evaluated"] = float(selftest.loss_of(made.pop("model"), rows_of(EVALUATED)))
            done[key] = made
        return done[key]

    return get


def lion(run):
    from lion_pytorch import Lion

    return lambda groups: Lion(groups, lr=run.optim.lr, betas=tuple(run.optim.betas), use_triton=False)


@pytest.fixture(scope="module")
def measured(launched, reference):
    """World size -> {case: selftest.compare's figures, with "evaluated" and "loss_at_last"}."""
    done = {}

    def get(world):
        if world not in done:
            compared = {}
            for case, ranks in launched(world).items():
                wanted, names = reference(case), selftest.hf_names(MODELS[case.model], case.model.endswith("tied"))
                found = selftest.compare(ranks, wanted, names)
                found["evaluated"] = selftest.furthest([(rank["evaluated"], wanted["evaluated"]) for rank in ranks])
                compared[case] = found
            done[world] = compared
        return done[world]

    yield get
    if FIGURES:
        Path(FIGURES).write_text(report(done))


def report(done):
    """The worst figures of every dtype and optimizer, and how many cases there were."""
    found = {case: figures for world in done.values() for case, figures in world.items()}
    lines = ["%d cases, %d of them the matrix" % (len(found), len([case for case in found if case in matrix.MATRIX]))]
    names = ("loss", "grad_norm", "gradients", "losses", "evaluated")
    for kind in sorted({(case.dtype, case.optim) for case in found}):
        chosen = {case: figures for case, figures in found.items() if (case.dtype, case.optim) == kind}
        lines.append("%s %s, %d cases, worst: " % (kind + (len(chosen),)) + ", ".join(
            "%s %.1e" % (name, max(figures[name] for figures in chosen.values())) for name in names))  # fmt: skip
        case = max(chosen, key=lambda case: chosen[case]["gradients"])
        lines.append("  gradients furthest in %s, %s" % (case.name, chosen[case]["where"]))
    return "\n".join(lines) + "\n"


def exceeding(figures, dtype, **limits):
    """The cases that are further off, with what is."""
    return [
        (case.name, name, found[name], found["where"])
        for case, found in figures.items()
        for name, limit in limits.items()
        if case.dtype == dtype and not found[name] <= limit
    ]


@WORLDS
def test_the_first_step_has_transformers_gradients(world, measured):
    assert exceeding(measured(world), "fp32", loss=1e-5, grad_norm=1e-5, gradients=1e-5) == []


@WORLDS
def test_twenty_clipped_steps_stay_with_transformers(world, measured):
    assert exceeding(measured(world), "fp32", losses=1e-4, evaluated=1e-4) == []


@pytest.mark.skipif(not BF16, reason="no bf16 pipeline in this DeepSpeed")
@WORLDS
def test_bf16_follows_at_a_distance(world, measured):
    """A dozen roundings to 8 bits in a row; the master weights and the sums over micro-batches are fp32."""
    found = measured(world)
    assert exceeding(found, "bf16", loss=0.02, grad_norm=0.03, gradients=0.2, losses=0.05, evaluated=0.05) == []
    assert all(figures["gradients"] > 1e-4 for case, figures in found.items() if case.dtype == "bf16"), "that was fp32"


@WORLDS
def test_tied_copies_are_equal_after_twenty_steps(world, launched):
    """Bit by bit with one or two replicas; more may be summed up in another order on the last stage. DeepSpeed's optimizer for
    the CPU rounds the last few elements of a partition otherwise than the rest, and the copies lie at different places of it."""
    found = 0
    for case, ranks in launched(world).items():
        if not case.model.endswith("tied"):
            continue
        copies = [w for rank in ranks for slot, w in rank["weights"].items()
                  if slot.endswith(("embed_tokens.weight", "word_embeddings.weight", "lm_head.weight"))]  # fmt: skip
        assert len(copies) >= 2
        if case.data <= 2 and case.offload != "deepspeed":
            assert all(torch.equal(copies[0], copy) for copy in copies[1:]), case.name
        else:
            assert all(selftest.off(copy, copies[0]) <= 1e-6 for copy in copies[1:]), case.name
        found += 1
    assert found


@WORLDS
def test_norms_and_biases_are_not_decayed(world, launched):
    for case, ranks in launched(world).items():
        found = {}
        for rank in ranks:
            found.update(rank["decays"])
        plain = {slot for slot in found if slot.endswith("bias") or "norm" in slot or "ln_f" in slot}
        assert {found[slot] for slot in plain} == {0.0} and {found[slot] for slot in set(found) - plain} == {0.1}, case.name
        assert set(found) == set(selftest.hf_names(MODELS[case.model], False)), case.name


def test_lion_and_offloaded_optimizers_resume_bit_by_bit(launched):
    kinds = set()
    for case, ranks in launched(2).items():
        for rank in ranks if case.optim == "lion" or case.offload else []:
            first, again = rank["repeated"]
            assert len(first) == len(again) == (2 if case.optim == "lion" else 3)
            assert all(torch.equal(a[slot], b[slot]) for a, b in zip(first, again) for slot in a), case.name
            assert any(not torch.equal(first[0][slot], rank["weights"][slot]) for slot in first[0]), "the step did nothing"
            kinds.add((case.optim, case.offload))
    assert {("lion", ""), ("adamw", "torch")} <= kinds


def test_a_save_makes_copies_equal_that_have_drifted_apart(launched):
    """With three or more replicas an all-reduce may add in another order on the last stage; here the drift is planted."""
    tied = 0
    for case, ranks in launched(2).items():
        if case.pipe == 1 or not case.model.endswith("tied"):
            assert ranks[0]["settled"] is None
            continue
        first, last = (rank["settled"] for rank in ranks)
        assert len(first) == (3 if case.optim == "lion" else 4) and all(torch.equal(a, b) for a, b in zip(first, last))
        embedding = ranks[0]["weights"]["0/embed_tokens.weight" if case.model.startswith("llama") else "0/word_embeddings.weight"]
        assert torch.equal(first[0], embedding)
        tied += 1
    assert tied >= 2


def test_the_matrix_is_whole_and_its_quick_part_covers_every_pair():
    def values(case):
        return (
            case.pipe,
            case.data,
            case.rows // (case.micro * case.data),
            case.model.split("-")[0],
            "tied" in case.model,
            case.packed,
        )

    axes = [(1, 2, 4), (1, 2), (1, 4), ("bloom", "llama"), (False, True), (False, True)]
    assert sorted(map(values, matrix.MATRIX)) == sorted(itertools.product(*axes))
    assert {case.parts for case in matrix.MATRIX if case.pipe == 4} == {"auto", (1, 2, 2, 1)}
    quick = [values(case) for case in matrix.MATRIX if case.quick]
    for (a, first), (b, second) in itertools.combinations(enumerate(axes), 2):
        missing = set(itertools.product(first, second)) - {(case[a], case[b]) for case in quick}
        assert missing <= {(4, 2)}, (a, b)
    assert any(case.data >= 3 for case in matrix.EXTRA)
