"""``pipedock train`` as a user runs it: real processes, packed data, checkpoints, resume, death.

One model (tied llama, grouped queries), one data set, two epochs with an evaluation; few launches, many looks at each.
"""

import json
import random
import shutil

import pytest
import torch

from pipeline_train import manifest, metrics, trace
from tests.runs import at_step, killed, lines_of, make, same_end, saved, train, when_saved

SEED, TOTAL, EPOCH = 7, 18, 6  # steps of the run and of an epoch


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A finished run in root/out: three epochs, saves after every 3 steps, so at every epoch's end, behind the next steps."""
    root = tmp_path_factory.mktemp("run")
    make(
        root, parallel={"pipe": 2, "recompute": "blocks"}, batch={"global": 6}, optim={"lr": 1e-3, "warmup": 2},
        train={"epochs": 3, "save_every": 3, "eval_every": 4, "keep": 3},
    )  # fmt: skip
    done = train(root, "--json", "--trace")
    assert done.returncode == 0, done.stderr[-2000:]
    (root / "answer.json").write_text(done.stdout)
    (root / "stderr.txt").write_text(done.stderr)
    return root


def test_the_answer_and_the_folder_are_what_the_interface_says(root):
    answer = json.loads((root / "answer.json").read_text())
    total = answer["steps"]
    assert total == TOTAL
    assert set(answer) == {"out", "steps", "loss_first", "loss_last", "seconds", "tokens", "peak_gib", "checkpoint"}
    assert answer["loss_last"] < answer["loss_first"] and len(answer["peak_gib"]) == 2 and min(answer["peak_gib"]) > 0.05
    lines = metrics.read(root / "out" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, total + 1))
    keys = {"step", "loss", "grad_norm", "lr", "tokens", "learnt_tokens", "tokens_per_s", "mfu", "step_s", "mem_gib"}
    assert all(keys <= set(line) for line in lines if line["kind"] == "step")
    assert {line["epoch"] for line in lines if line["kind"] == "step"} == {0, 1, 2}
    assert [line["epoch"] for line in lines if line["kind"] == "step"][EPOCH - 1 : EPOCH + 1] == [0, 1]
    assert sum(line["tokens"] for line in lines if line["kind"] == "step") == answer["tokens"]
    startup = [line for line in lines if line["kind"] == "startup"]
    assert [line["step"] for line in startup] == [1] and min(startup[0]["seconds"].values()) >= 0
    assert list(startup[0]["seconds"]) == ["libraries", "joining", "stage", "data", "weights", "first_step"]
    assert "start-up took " in (root / "stderr.txt").read_text()
    saves = [line for line in lines if line["kind"] == "save"]
    assert [line["step"] for line in saves] == list(range(3, total + 1, 3))
    assert all(line["path"] == "checkpoints/step_%06d" % line["step"] and line["asynchronous"] for line in saves)
    assert all(0 < line["stall_s"] and 0 < line["seconds"] for line in saves)
    assert [line["step"] for line in lines if line["kind"] == "eval"] == list(range(4, total, 4)) + [total]
    assert "step %d/%d  loss" % (total, total) in (root / "stderr.txt").read_text()
    assert "peak memory per stage:" in (root / "stderr.txt").read_text()
    assert json.loads((root / "out" / "resolved" / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 1


def test_the_third_step_is_traced_and_drawn(root):
    """global 6, micro 1: six micro-batches through two stages."""
    events = json.loads((root / "out" / "trace.json").read_text())
    assert events["otherData"] == {"step": 3}
    step, spans = trace.read(root / "out" / "trace.json")
    assert step == 3
    for stage in (0, 1):
        mine = [span for span in spans if span.stage == stage]
        names = [span.name for span in mine]
        assert (names.count("ForwardPass"), names.count("BackwardPass"), names.count("OptimizerStep")) == (6, 6, 1)
        assert [span.micro for span in mine if span.name == "ForwardPass"] == list(range(6))
        assert all(a.start + a.seconds <= b.start + 1e-6 for a, b in zip(mine, mine[1:])) and mine[0].start > 0
    first, last = ([span for span in spans if span.stage == stage and span.name == "ForwardPass"] for stage in (0, 1))
    assert all(a.start + a.seconds < b.start + b.seconds for a, b in zip(first, last))  # through stage 0, then stage 1
    page = (root / "out" / "report.html").read_text()
    assert "Step 3, what each stage computed when" in page and "1F1B with these stages" in page


def test_checkpoints_are_whole_self_contained_and_pruned(root):
    answer = json.loads((root / "answer.json").read_text())
    folders = saved(root / "out")
    assert len(folders) == 3 and str(folders[-1]) == answer["checkpoint"]  # keep: 3
    assert (root / "out" / "checkpoints" / "latest").read_text() == folders[-1].name + "\n"
    document = manifest.read(folders[-1])
    assert (document["kind"], document["step"], document["layers"], document["tied"]) == ("checkpoint", answer["steps"], 5, True)
    for name, entry in document["files"].items():
        assert manifest.file_entry(folders[-1] / name) == entry
    names = set(document["files"])
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert {manifest.layer_file(n) for n in range(5)} | {manifest.optim_file(n) for n in range(5)} <= names
    assert {p.name for p in folders[-1].iterdir()} == names | {"manifest.json"}


def test_checkpoints_read_back_strictly(root):
    from safetensors.torch import load_file

    from pipeline_train.weights import open_source

    source = open_source(str(root / "out"))
    source.check()
    head, embed = source.layer(4), source.layer(0)
    assert torch.equal(head["lm_head.weight"], embed["embed_tokens.weight"]) and head["lm_head.weight"].dtype == torch.float32
    state = load_file(str(source.folder / manifest.optim_file(2)))
    assert set(state) == {"%s::%s" % (name, moment) for name in source.layer(2) for moment in ("exp_avg", "exp_avg_sq")}


def resumed(root, name, *arguments, without=lambda line: False):
    """Copy the run as if it had died after its first kept checkpoint, at an epoch's end, and some lines of its metrics had never
    been written; resume it, -> its folder."""
    out = root / name
    shutil.copytree(str(root / "out"), str(out))
    first, *others = saved(out)
    assert first.name == "step_%06d" % (2 * EPOCH)
    for other in others:
        shutil.rmtree(str(other))
    (out / "checkpoints" / "latest").write_text(first.name + "\n")
    lines = (out / "metrics.jsonl").read_text().splitlines(True)
    kept = [line for line in lines if json.loads(line)["step"] <= 2 * EPOCH and not without(json.loads(line))]
    (out / "metrics.jsonl").write_text("".join(kept) + '{"step": 9, "lo')  # a torn tail
    done = train(root, "--set", "run.out=%s" % out, "--resume", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_resume_is_bit_equal_and_neither_evaluation_nor_the_way_of_saving_disturbs_it(root):
    """The first run evaluated after every fourth step and saved behind the next steps; this one evaluates at the end and waits."""
    out = resumed(root, "again", "--set", "train.eval_every=1000", "--set", "train.async_save=false")
    same_end(root / "out", out)
    assert [line["asynchronous"] for step, line in sorted(lines_of(out, "save").items())][-2:] == [False, False]


def test_resume_at_other_stages_replicas_and_without_eval_has_the_same_losses(root):
    out = resumed(root, "other", "--set", "parallel.pipe=1", "--set", "parallel.data=2", "--set", "data.eval=null")
    wanted, found = lines_of(root / "out", "step"), lines_of(out, "step")
    assert sorted(found) == sorted(wanted)
    assert [found[s]["loss"] for s in sorted(found)] == pytest.approx([wanted[s]["loss"] for s in sorted(wanted)], rel=1e-5)
    assert [found[s]["grad_norm"] for s in sorted(found)] == pytest.approx(
        [wanted[s]["grad_norm"] for s in sorted(wanted)], rel=1e-4
    )


def test_a_finished_run_resumes_to_exit_0(root):
    done = train(root, "--resume", "auto", "--json")
    assert done.returncode == 0 and "finished already" in done.stderr
    assert json.loads(done.stdout)["finished"] is True


def test_an_evaluation_that_was_cut_off_is_made_up_for(root):
    """Killed between the last save and the end of the last evaluation, made up for on one stage; then before step 12, which a
    resume goes on from."""
    wanted = lines_of(root / "out", "eval")
    out = root / "cut"
    shutil.copytree(str(root / "out"), str(out))
    lines = (out / "metrics.jsonl").read_text().splitlines(True)
    (out / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] < TOTAL or '"eval"' not in line))
    assert TOTAL not in lines_of(out, "eval")
    done = train(root, "--set", "run.out=%s" % out, "--resume", "--json", "--set", "parallel.pipe=1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the evaluation after step %d, which metrics.jsonl lacks" % TOTAL in done.stderr and "peak memory" not in done.stderr
    answer = json.loads(done.stdout)
    assert answer["finished"] and answer["loss_last"] is None and answer["checkpoint"].endswith("step_%06d" % TOTAL)
    assert lines_of(out, "eval")[TOTAL]["loss"] == pytest.approx(wanted[TOTAL]["loss"], rel=1e-5)
    assert "finished already" in train(root, "--set", "run.out=%s" % out, "--resume").stderr
    out = resumed(root, "between", without=lambda line: line["kind"] == "eval" and line["step"] == 2 * EPOCH)
    assert {step: line["loss"] for step, line in lines_of(out, "eval").items()} == {s: line["loss"] for s, line in wanted.items()}


def test_the_stack_check_and_the_printed_config(root):
    done = train(root, "--stack-check", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["ok"] is True
    assert train(root, "--stack-check").stdout.rstrip().endswith("ok")
    printed = train(root, "--print-config", "--set", "optim.lr=2e-5").stdout
    assert "lr: 2.0e-05" in printed and "save_every: 3" in printed


def test_a_killed_run_goes_on_as_if_nothing_had_happened(root):
    """kill -9 of one rank when the first epoch's last step is saved, then of all ranks at a random step: exit 1, no process left,
    the cause told. Resumed each time, it ends in the same bytes as the run that nobody killed."""
    out, step = root / "killed", random.Random(SEED).randint(EPOCH + 4, TOTAL - 3)
    said = killed(root, out, when_saved(EPOCH), {1})
    assert said.strip().splitlines()[-1].startswith("pipedock train: rank 1: was killed by SIGKILL")
    assert manifest.find_checkpoint(out).name in ("step_%06d" % EPOCH, "step_%06d" % (EPOCH + 3))
    said = killed(root, out, at_step(step), "all")
    assert ": was killed by SIGKILL" in said.strip().splitlines()[-1], (SEED, step)
    done = train(root, "--set", "run.out=%s" % out, "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    same_end(root / "out", out)


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_step(root):
    from safetensors.torch import load_file, save_file

    shutil.copytree(str(root / "model"), str(root / "broken"))
    tensors = load_file(str(root / "broken" / "model.safetensors"))
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, str(root / "broken" / "model.safetensors"), metadata={"format": "pt"})
    done = train(root, "--set", "run.out=%s" % (root / "nan"), "--set", "model.path=%s" % (root / "broken"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("pipedock train: rank ") and ": step 1: the loss is not a number; stopped before the step, " in line
    assert ". Its samples: " in line
    assert "train.jsonl:" in line and ". These weights hold NaN or Inf: norm.weight of layer 4. Log: " in line
    assert not (root / "nan" / "checkpoints").exists()
