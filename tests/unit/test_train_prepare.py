"""Every mistake of a run is one line, found before any process starts."""

import errno
import json
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import yaml

pytest.importorskip("torch")
pytest.importorskip("transformers")
from pipeline_train import checkpoint_folder, compat, config, host, manifest, native, plan, prepare, run_folder  # noqa: E402
from pipeline_train.data import template  # noqa: E402
from pipeline_train.errors import UserError  # noqa: E402
from tests.models import computed, make_hf, tiny_config  # noqa: E402
from tests.tokenizers import tiny_tokenizer  # noqa: E402

V100 = compat.Gpus(2, "Tesla V100-SXM2-32GB", False)
H100 = compat.Gpus(2, "NVIDIA H100 80GB HBM3", True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer(folder, "bpe")
    make_hf(folder, computed(tiny_config("llama", vocab_size=600, tie_word_embeddings=True, num_key_value_heads=2)))
    return folder


@pytest.fixture
def start(model, tmp_path, monkeypatch):
    """start(resume=None, **sections) -> Prepared; the model and data are fine unless a section says otherwise."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(compat, "gpus", lambda: compat.Gpus(0, "", False))
    data = tmp_path / "train.jsonl"
    data.write_text(
        "".join(json.dumps({"type": "pretrain", "text": "Red, green and blue number %d." % n}) + "\n" for n in range(40))
    )

    def run(resume=None, allow=False, **sections):
        raw = {
            "run": {"out": str(tmp_path / "out")}, "model": {"path": str(model)}, "data": {"train": str(data), "seq_len": 32},
            "parallel": {"pipe": 2}, "batch": {"global": 4},
        }  # fmt: skip
        for name, section in sections.items():
            raw[name] = dict(raw.get(name, {}), **section)
        source = tmp_path / "run.yaml"
        source.write_text(json.dumps(raw))
        run.said = []
        return prepare.prepare(config.load(source), source, resume, run.said.append, allow)

    run.out = tmp_path / "out"
    return run


def refused(start, *words, resume=None, **sections):
    with pytest.raises(UserError) as error:
        start(resume, **sections)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert not (start.out / "logs").exists()  # no process started, nothing was resolved


def test_a_good_run_is_resolved(start, model):
    done = start(data={"seq_len": None})
    assert (done.gpus, done.resume, done.done) == (0, None, 0)
    assert done.config.model.dtype == "fp32" and done.config.data.seq_len == 128 and sum(done.config.parallel.parts) == 5
    again = config.load(start.out / "resolved" / "run.yaml")
    assert config.resolved_yaml(again) == config.resolved_yaml(done.config)
    assert (start.out / "resolved" / "original.yaml").read_bytes() == (start.out.parent / "run.yaml").read_bytes()
    names = {p.name for p in (start.out / "resolved" / "model").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    planned = json.loads((start.out / "resolved" / "plan.json").read_text())
    assert planned["parts"] == done.config.parallel.parts and planned["gib"] == plan.memory_of(
        done.config, done.dims, planned["stack"]
    )
    assert len(planned["gib"]) == done.config.parallel.pipe and all(stage["total"] > 0 for stage in planned["gib"])
    assert json.loads((start.out / "resolved" / "versions.json").read_text())["deepspeed"]


def test_the_user_is_told_what_the_data_holds(start):
    start()
    line = next(line for line in start.said if " records, " in line)
    assert "train.jsonl: 40 records, 0 bad, " in line and line.endswith("0 truncated, 0 dropped, 0 with nothing to learn")
    assert any(line.startswith("rows of 32 tokens, ") for line in start.said)


def test_data_that_is_mostly_lost_is_told_of_behind_its_counts(start, tmp_path):
    lost, good = {"instruction": "word " * 200, "output": "x"}, {"instruction": "a", "output": "x " * 4}
    (tmp_path / "lost.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [lost] * 9 + [good] * 8))
    start(data={"train": str(tmp_path / "lost.jsonl"), "eval": str(tmp_path / "lost.jsonl"), "seq_len": 128})
    (counts,) = [number for number, line in enumerate(start.said) if "17 records, " in line]
    (alarm,) = [number for number, line in enumerate(start.said) if "NOT LEARNT: 9 of 17 records give nothing" in line]
    assert alarm > counts and " records, " not in "".join(start.said[alarm:])


def test_epochs_and_max_steps_decide_the_length(start):
    one = start().total
    assert start(train={"epochs": 3}).total == 3 * one
    assert start(train={"epochs": 3, "max_steps": one + 1}).total == one + 1
    assert start(train={"max_steps": 1000}).total == one


@pytest.mark.parametrize("sections, words", [
    ({"parallel": {"parts": [2, 2]}}, ["parallel.parts: sums to 4, the model has 5 layers (embed + 3 blocks + head)"]),
    ({"parallel": {"parts": [5, 0]}}, ["parallel.parts: stage 1 is empty"]),
    ({"parallel": {"pipe": 6}}, ["parallel.pipe: 6 stages, but the model has only 5 layers"]),
    ({"batch": {"global": 5, "micro": 2}}, ["batch.global: 5 rows cannot be split", "multiple of 2"]),
    ({"parallel": {"pip": 2}}, ["parallel.pip: unknown key", '"pipe"']),
    ({"data": {"seq_len": 256}}, ["data.seq_len: 256 is over the model's 128 positions"]),
    ({"data": {"train": "/nowhere/train.jsonl"}}, ["/nowhere/train.jsonl"]),
    ({"data": {"eval": "/nowhere/eval.jsonl"}}, ["/nowhere/eval.jsonl"]),
    ({"model": {"path": "/nowhere/model"}}, ["/nowhere/model"]),
    ({"model": {"dtype": "fp16"}}, ["model.dtype: fp16 needs a GPU"]),
    ({"deepspeed": {"zero_optimization": {"stage": 0}}}, ["deepspeed.zero_optimization.stage: 0", "use 1"]),
    ({"deepspeed": {"train_batch_size": 8}}, ["deepspeed.train_batch_size: is set from batch.global"]),
    ({"deepspeed": {"zero_optimization": {"round_robin_gradients": True}}},
     ["deepspeed.zero_optimization.round_robin_gradients: deals the gradients out in another order", "remove it"]),
    ({"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}, ["is set from parallel.offload"]),
    ({"deepspeed": {"zero_optimization": {"stag": 1}}},
     ["deepspeed.zero_optimization.stag: is not passed on to DeepSpeed", 'did you mean "stage"?']),
    ({"deepspeed": {"zero_optimization": {"stage": True}}},
     ["deepspeed.zero_optimization.stage: expected a positive whole number, got True"]),
    ({"deepspeed": {"zero_optimization": {"overlap_comm": 1}}}, ["overlap_comm: expected true or false, got 1"]),
    ({"deepspeed": {"zero_optimization": {"reduce_bucket_size": "many"}}}, ["expected a positive whole number, got 'many'"]),
    ({"deepspeed": {"torch_autocast": {"enabled": True}}}, ["deepspeed.torch_autocast: changes the arithmetic", "model.dtype"]),
    ({"deepspeed": {"data_types": {"grad_accum_dtype": "bf16"}}}, ["deepspeed.data_types: changes the arithmetic"]),
    ({"deepspeed": {"communication_data_type": "fp16"}}, ["deepspeed.communication_data_type: 'fp16' changes the arithmetic"]),
    ({"deepspeed": {"prescale_gradients": True}}, ["deepspeed.prescale_gradients: changes how gradients are averaged"]),
    ({"deepspeed": {"gradient_predivide_factor": 2.0}}, ["deepspeed.gradient_predivide_factor: changes how"]),
    ({"deepspeed": {"sparse_gradients": True}}, ["deepspeed.sparse_gradients: is not passed on to DeepSpeed", "passes on: "]),
    ({"run": {"out": "/tmp/a\0b"}}, ["run.out"]),
    ({"run": {"out": "/tmp/" + "x" * 300}}, ["run.out"]),
])  # fmt: skip
def test_wrong_keys(start, sections, words):
    refused(start, *words, **sections)


def test_what_a_gpu_cannot_do(start, monkeypatch):
    monkeypatch.setattr(compat, "gpus", lambda: V100)
    refused(start, "parallel: pipe 2 x data 2 needs 4 GPUs, this machine has 2", parallel={"data": 2})
    refused(start, "model.dtype: Tesla V100-SXM2-32GB has no bf16; use fp16", model={"dtype": "bf16"})
    refused(start, "optim.loss_scale.initial: must be a power of two, got 1000", optim={"loss_scale": {"initial": 1000}})
    assert start().config.model.dtype == "fp16"
    monkeypatch.setattr(compat, "gpus", lambda: H100)
    done = start()
    best = "bf16" if compat.has_bf16(compat.versions()["deepspeed"]) else "fp16"
    assert (done.config.model.dtype, done.gpus) == (best, 2)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert start(parallel={"data": 2}).gpus == 0


def test_cards_that_torch_cannot_use_are_told(start, monkeypatch):
    monkeypatch.setattr(
        plan.cards, "cards_here", lambda: [plan.cards.Here("0", "u", None, "580.1"), plan.cards.Here("1", "v", None, "580.1")]
    )
    torch = compat.versions()["torch"]
    start()
    (told,) = [line for line in start.said if line.startswith("WARNING")]
    assert told == (
        "WARNING: training on the CPU: nvidia-smi sees 2 GPUs (driver 580.1), torch %s can use none. pip install a torch built for "
        "CUDA, not a +cpu one (pipedock preflight says more); DS_ACCELERATOR=cpu says that the CPU is meant" % torch
    )
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    start()
    assert not [line for line in start.said if line.startswith("WARNING")]


def test_a_stack_with_wrong_gradients_is_refused_first(start, monkeypatch):
    monkeypatch.setattr(compat, "versions", lambda: {"deepspeed": "0.17.0"})
    refused(start, "deepspeed 0.17.0 is refused", model={"path": "/nowhere"})


def test_offload_on_a_cpu_is_said_to_do_nothing(start):
    assert start(parallel={"offload": True}).config.parallel.offload is False
    assert "parallel.offload: has no effect on the CPU" in start.said


def test_wrong_model_folders(start, model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(str(model), str(broken))
    (broken / "model.safetensors").unlink()
    refused(start, str(broken), model={"path": str(broken)})
    assert start(model={"path": str(broken), "init": "random"}).total  # needs no weights
    shutil.rmtree(str(start.out))
    shutil.copyfile(str(model / "model.safetensors"), str(broken / "model.safetensors"))
    raw = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(dict(raw, num_hidden_layers=4)))
    refused(start, "missing", "model.layers.3.", model={"path": str(broken)})
    (broken / "config.json").write_text(json.dumps(dict(raw, vocab_size=100)))
    refused(start, "ids up to", "vocab_size", model={"path": str(broken), "init": "random"})
    (broken / "config.json").unlink()
    refused(start, "config.json", model={"path": str(broken)})


def test_an_out_folder_that_cannot_be_made(start, tmp_path):
    (tmp_path / "file").write_text("")
    refused(start, "run.yaml: run.out:", "cannot be made: Not a directory", run={"out": str(tmp_path / "file" / "out")})


def test_deepspeed_keys_that_only_change_speed_pass(start):
    zero = {"stage": 1, "reduce_bucket_size": 5e8, "overlap_comm": False, "offload_param": {"device": "cpu"}}
    start(deepspeed={"zero_optimization": zero, "wall_clock_breakdown": True, "communication_data_type": "fp32",
                     "activation_checkpointing": {"cpu_checkpointing": True}})  # fmt: skip
    assert "deepspeed.activation_checkpointing: has no effect; parallel.recompute says what is computed again" in start.said
    assert "deepspeed.zero_optimization.offload_param: has no effect below stage 3" in start.said


def test_a_second_train_on_the_folder_is_refused_while_the_first_lives(start):
    code = "import sys, time; sys.path.insert(0, %r)\nfrom pathlib import Path\nfrom pipeline_train import run_folder\n"
    code += "run_folder.take(Path(%r), 'run.yaml', print); print('taken', flush=True); time.sleep(60)"
    code = code % (str(Path(__file__).resolve().parents[2]), str(start.out))
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "taken\n"
        for resume in (None, "auto"):
            refused(start, "another pipedock train (pid %d) is using this folder" % first.pid, resume=resume)
        assert not (start.out / "data").exists()
    finally:
        first.kill()
        first.communicate()
    start()  # the lock went with its holder
    assert (start.out / ".lock").read_text() == "%d\n" % os.getpid()


def used(start, step=4, total_layers=5, **feed):
    """Make <out> hold a checkpoint of the run that ``start()`` describes."""
    facts = dict(json.loads((start.out / "resolved" / "data.json").read_text()), **feed)
    facts.pop("pad_id")
    folder = start.out / "checkpoints" / ("step_%06d" % step)
    folder.mkdir(parents=True)
    shutil.copyfile(str(start.out / "resolved" / "model" / "config.json"), str(folder / "config.json"))
    files = {"config.json": manifest.file_entry(folder / "config.json")}
    for name in [file(layer) for layer in range(total_layers) for file in (manifest.layer_file, manifest.optim_file)]:
        (folder / name).write_bytes(b"x")
        files[name] = manifest.file_entry(folder / name)
    manifest.write(folder, {
        "format": manifest.FORMAT, "kind": "checkpoint", "family": "llama", "run_dtype": "fp32", "layer_dtype": "fp32",
        "tied": True, "layers": total_layers, "step": step, "files": files, "versions": {}, "run_name": "",
        "training": {"optimizer": "adamw", "optimizer_steps": step, "feed": facts, "loss_scaler": {}},
    })  # fmt: skip
    return folder


def test_a_used_folder_needs_resume_and_resume_needs_a_checkpoint(start):
    advice = "Start it with --resume auto, or give run.out another folder.$"
    with pytest.raises(UserError, match="--resume: no checkpoint to continue from. " + advice):
        start("newest")
    assert start("auto").resume is None
    (start.out / "metrics.jsonl").write_text('{"kind": "start"}\n')
    (start.out / "checkpoints" / "step_000002.bak").mkdir(parents=True)  # somebody's copy, not a checkpoint of the run
    with pytest.raises(UserError, match="already holds a run, which has saved no checkpoint. " + advice):
        start()
    assert start("auto").resume is None  # it died before its first checkpoint
    folder = used(start)
    with pytest.raises(UserError, match="already holds a run. Continue it with --resume"):
        start()
    for mode in ("newest", "auto"):
        assert (start(mode).resume, start(mode).done) == (folder, 4)


def test_a_folder_of_other_files_is_not_made_a_run(start):
    start.out.mkdir()
    (start.out / "mine.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"run.out: .*: holds other files \(mine.jsonl\); give the run a folder of its own"):
        start("auto")
    assert [path.name for path in start.out.iterdir()] == ["mine.jsonl"]


def test_a_save_that_was_cut_short_is_cleared_away(start):
    start()
    left = start.out / "checkpoints" / ".tmp-step_000008"
    left.mkdir(parents=True)
    (left / "layer_000.safetensors").write_bytes(b"x" * 100)
    used(start)
    assert start("newest").done == 4 and not left.exists()


def test_resume_takes_the_newest_whole_checkpoint_and_says_what_it_passed_over(start):
    start()
    whole, cut, rotten = used(start, 4), used(start, 8), used(start, 10)
    (cut / manifest.layer_file(2)).write_bytes(b"")
    (rotten / manifest.layer_file(2)).write_bytes(b"y")  # the same size
    assert start("newest").resume == whole
    passed = [line for line in start.said if line.startswith("passed over: ")]
    assert len(passed) == 2 and "step_000010" in passed[0] and "step_000008" in passed[1]
    (whole / manifest.layer_file(2)).unlink()
    with pytest.raises(UserError, match="--resume: none of its 3 checkpoints is whole. Give run.out another folder"):
        start("auto")


SAVES = '{"kind": "start"}\n{"kind": "save", "step": 4}\n{"kind": "step", "note": "save"}\n["save"]\n'
SAVES += '{"kind": "save", "step": 8}\n{"kind": "save"'


@pytest.mark.parametrize("mode", ["auto", "newest"])
def test_a_run_whose_checkpoints_are_gone_does_not_start_again(start, mode):
    start()
    (start.out / "metrics.jsonl").write_text(SAVES)
    message = "%s: metrics.jsonl tells of 2 saves, but checkpoints/ %s: is its disk mounted? To start again, give run.out another "
    message += "folder or delete metrics.jsonl"
    before = contents(start.out)
    for there in ("is not there", "holds none"):
        with pytest.raises(UserError) as error:
            start(mode)
        assert str(error.value) == message % (start.out, there) and contents(start.out) == before
        (start.out / "checkpoints").mkdir(exist_ok=True)
    used(start)
    assert start(mode).done == 4
    shutil.rmtree(str(start.out / "checkpoints"))
    (start.out / "metrics.jsonl").unlink()
    assert start("auto").resume is None


def fails(monkeypatch, owner, name, path, number=errno.EIO):
    """owner.name ends in this error for this path."""
    original = getattr(owner, name)

    def call(given, *arguments, **options):
        if str(given) == str(path):
            raise OSError(number, os.strerror(number), str(path))
        return original(given, *arguments, **options)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("mode", [None, "auto", "newest"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_folder_of_checkpoints_that_cannot_be_read_does_not_hold_none(start, monkeypatch, mode, number):
    start()
    (start.out / "checkpoints").mkdir()
    fails(monkeypatch, manifest.os, "listdir", start.out / "checkpoints", number)
    with pytest.raises(UserError, match="out/checkpoints: cannot be read: %s. " % os.strerror(number)):
        start(mode)


@pytest.mark.parametrize("mode", ["auto", "newest"])
@pytest.mark.parametrize("name", ["manifest.json", "layer_001.safetensors", "optim_002.safetensors"])
def test_a_checkpoint_that_cannot_be_read_is_not_passed_over(start, monkeypatch, mode, name):
    start()
    used(start, 4)
    path = used(start, 8) / name
    if name == manifest.NAME:
        fails(monkeypatch, Path, "read_text", path, errno.EACCES)
    else:
        fails(monkeypatch, manifest, "file_entry", path, errno.EACCES)
    with pytest.raises(UserError, match="step_000008/%s: cannot be read: Permission denied. That does not make the check.* move it "
                       "away to do without it$" % name):  # fmt: skip
        start(mode)
    assert not [line for line in start.said if "passed over" in line]


def test_metrics_that_cannot_be_read_are_one_line(start, monkeypatch):
    start()
    (start.out / "metrics.jsonl").write_text(SAVES)

    def unreadable(path, mode="r", **options):
        if path.endswith("metrics.jsonl") and mode == "rb":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open(path, mode, **options)

    monkeypatch.setattr(run_folder, "open", unreadable, raising=False)
    with pytest.raises(UserError, match="metrics.jsonl: cannot be read: Input/output error"):
        start("auto")


@pytest.mark.parametrize("changes, words", [
    ({"step": 6}, "step: 6, but the folder is named step_000008"),
    ({"family": "bloom"}, "family: 'bloom', but config.json beside it says 'llama'"),
    ({"family": "\n"}, "family: '\\n', but config.json beside it says 'llama'"),
    ({"tied": False}, "tied: False, but config.json beside it says True"),
    ({"layers": 4}, "layers: 4, but config.json beside it says 5"),
    ({"kind": "from-hf"}, "kind: a run resumes from a checkpoint, this is from-hf"),
    ({"training": {}}, "training.optimizer: missing or not what it should be (None)"),
    ({"training": {"feed": {"now": "soon"}}}, "training.feed.now: missing or not what it should be ('soon')"),
    ({"training": {"feed": {"seq_len": [1]}}}, "training.feed.seq_len: missing or not what it should be (a list)"),
    ({"training": {"feed": None}}, "training.feed: missing or not what it should be (None)"),
    ({"training": {"loss_scaler": {"update_scale": 1}}}, "training.loss_scaler.'update_scale': missing or not"),
    ({"training": {"optimizer_steps": "8"}}, "training.optimizer_steps: missing or not what it should be ('8')"),
])  # fmt: skip
def test_a_manifest_that_says_what_cannot_be_is_passed_over(start, changes, words):
    start()
    whole, wrong = used(start, 4), used(start, 8)
    document = manifest.read(wrong)
    if changes.get("training"):
        changes = {"training": dict(document["training"], **changes["training"])}
    (wrong / "manifest.json").write_text(json.dumps(dict(document, **changes)))
    assert start("newest").resume == whole
    passed = [line for line in start.said if line.startswith("passed over: ")]
    assert len(passed) == 1 and passed[0].startswith("passed over: %s/manifest.json: %s" % (wrong, words)), passed
    assert "\n" not in passed[0]


@pytest.mark.parametrize("name", [".tmp-probe", "checkpoints", "metrics.jsonl"])
def test_what_cannot_be_written_is_seen_before_the_work(start, monkeypatch, name):
    if name == ".tmp-probe":
        fails(monkeypatch, Path, "mkdir", start.out / name, errno.EROFS)
        refused(start, "run.yaml: run.out: %s: cannot be written: Read-only file system" % (start.out / name))
    else:
        start.out.mkdir()
        (start.out / ".lock").touch()
        (start.out / name).write_text("") if name == "checkpoints" else (start.out / name).mkdir()
        refused(start, "run.yaml: run.out: %s" % (start.out / name), ": cannot be written: ", resume="auto")
    assert not (start.out / "data").exists()


def test_a_folder_of_checkpoints_that_cannot_be_written_is_seen_before_the_work(start, monkeypatch):
    probe = start.out / "checkpoints" / ".tmp-probe"
    probe.mkdir(parents=True)  # a start that was killed here
    (start.out / probe.name).mkdir()
    start()
    assert not probe.exists() and not (start.out / ".tmp-probe").exists()
    fails(monkeypatch, Path, "mkdir", probe, errno.EACCES)
    with pytest.raises(UserError, match="run.yaml: run.out: %s: cannot be written: Permission denied$" % probe):
        start()


@pytest.mark.parametrize("sections, words", [
    ({"data": {"seq_len": 64}}, "data.seq_len"), ({"batch": {"global": 8}}, "batch.global"),
    ({"data": {"pack": False}}, "data.pack"), ({"run": {"seed": 7}}, "run.seed"), ({"optim": {"type": "lion"}}, "optim.type"),
])  # fmt: skip
def test_a_resume_with_something_changed_says_what(start, sections, words):
    start()
    used(start)
    before = contents(start.out)
    with pytest.raises(UserError, match="--resume: (%s) changed since the checkpoint at step 4" % words):
        start("newest", **dict(sections, run=dict({"out": str(start.out)}, **sections.get("run", {}))))
    assert contents(start.out) == before


def contents(out):
    return {p: p.read_bytes() for folder in ("resolved", "data") for p in (out / folder).rglob("*") if p.is_file()}


WHAT_IS_TRAINED_ON = "data.train, data.learn, data.over_long, data.on_bad or the tokenizer"


def test_a_resume_with_other_data_is_refused(start):
    start()
    used(start)
    path = start.out.parent / "train.jsonl"
    path.write_text(path.read_text().replace("number 3.", "number 4."))
    with pytest.raises(UserError, match="--resume: %s changed since the checkpoint at step 4 .*" % WHAT_IS_TRAINED_ON +
                       "Change it back, go on with other data by --allow-changed-data, or start a new run.out.$"):  # fmt: skip
        start("newest")


def test_a_resume_with_other_data_goes_on_where_that_is_allowed_and_says_from_where(start):
    total = start().total
    used(start, step=13)
    path = start.out.parent / "train.jsonl"
    path.write_text(path.read_text().replace("number 3.", "number 4."))
    done = start("newest", allow=True, train={"epochs": 3})
    assert (done.done, done.total, total) == (13, 30, 10)
    said = [line for line in start.said if line.startswith("--")]
    assert said[0].startswith("--resume: %s changed since the checkpoint at step 13 (" % WHAT_IS_TRAINED_ON)
    assert said[1] == (
        "--allow-changed-data: the step number goes on counting: the next step is 14 of 30, which is step 4 of 10 in epoch 2 of "
        "the new data. What lies before it is not learnt in that epoch, what was learnt already may come again."
    )
    assert len(said) == 3 and said[2].startswith("--resume: train.epochs was 1, is 3")


@pytest.mark.parametrize("name, sections", [
    ("data.seq_len", {"data": {"seq_len": 64}}), ("batch.global", {"batch": {"global": 8}}),
    ("data.pack", {"data": {"pack": False}}),
])  # fmt: skip
def test_rows_of_another_kind_are_other_data_too(start, name, sections):
    start()
    used(start)
    done = start("newest", allow=True, **dict(sections, train={"epochs": 9}))
    assert done.done == 4
    assert [line for line in start.said if line.startswith("--resume: %s changed since the checkpoint at step 4 (" % name)]


def test_the_flag_without_a_resume_is_refused(start):
    with pytest.raises(UserError, match="^--allow-changed-data: goes with --resume; a new run takes its data as it is$"):
        start(allow=True)


def test_what_no_flag_allows(start, model, tmp_path):
    start()
    used(start)
    with pytest.raises(UserError, match="optim.type changed since the .*Change it back, or start a new run.out.$"):
        start("newest", allow=True, optim={"type": "lion"})
    other = tmp_path / "other"
    shutil.copytree(str(model), str(other))
    raw = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(dict(raw, rms_norm_eps=0.01)))
    with pytest.raises(UserError, match="model.path .*changed since the .*Change it back, or start a new run.out.$"):
        start("newest", allow=True, model={"path": str(other), "init": "random"})


def test_other_data_with_nothing_left_to_do_is_refused(start):
    total = start().total
    used(start, step=total - 1)
    with pytest.raises(UserError, match="--allow-changed-data: the run has done %d steps, and the new data makes only [12] in all. "
                       "Raise train.epochs, or start a new run.out.$" % (total - 1)):  # fmt: skip
        start("newest", allow=True, batch={"global": 40})


def free(monkeypatch, nbytes):
    usage = shutil.disk_usage("/")._replace(free=nbytes)
    monkeypatch.setattr(checkpoint_folder.shutil, "disk_usage", lambda path: usage)


def test_a_disk_without_room_for_one_checkpoint_is_refused_before_the_work(start, monkeypatch):
    needed = checkpoint_folder.nbytes(start().dims, "adamw")
    shutil.rmtree(str(start.out))
    free(monkeypatch, needed - 1)
    refused(start, "run.yaml: run.out: %s: a checkpoint needs %s, only %s are free on that disk. Make room, or name another folder."
            % (start.out, host.size(needed), host.size(needed - 1)))  # fmt: skip
    free(monkeypatch, needed)
    start()
    assert [line for line in start.said if "train.keep" in line] == []  # one save, at the end


def test_a_disk_without_room_for_all_that_are_to_be_kept_is_said(start, monkeypatch):
    needed = checkpoint_folder.nbytes(start().dims, "adamw")
    free(monkeypatch, 4 * needed - 1)
    start(train={"save_every": 1, "keep": 3})  # and a fourth while it is written
    assert [line for line in start.said if "train.keep" in line] == [
        "run.yaml: run.out: %s: train.keep: 3 takes up to %s more on that disk, only %s are free; a save that does not fit "
        "ends the run" % (start.out, host.size(4 * needed), host.size(4 * needed - 1))
    ]
    start(train={"save_every": 1, "keep": 2})
    assert [line for line in start.said if "train.keep" in line] == []
    used(start, step=4)  # it is there already, three more to come
    start("newest", train={"save_every": 1, "keep": 3, "epochs": 9})
    assert [line for line in start.said if "takes up to" in line] == []


@pytest.mark.parametrize("every, done, total, saves", [(4, 0, 12, 3), (4, 0, 13, 4), (4, 8, 13, 2), (13, 0, 13, 1), (4, 13, 13, 0)])
def test_the_saves_to_come_are_counted(every, done, total, saves):
    steps = [n for n in range(done + 1, total + 1) if n % every == 0 or n == total]
    assert prepare._saves(every, done, total) == saves == len(steps)


@pytest.mark.parametrize("changes, words", [
    ({"rope_theta": 5e5}, "rope_theta of config.json"), ({"rms_norm_eps": 0.01}, "norm_eps of config.json"),
    ({"tie_word_embeddings": False}, "tied of config.json"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling of config.json"),
])  # fmt: skip
def test_a_resume_with_another_model_of_the_same_shape_is_refused(start, model, tmp_path, changes, words):
    start()
    used(start)
    other = tmp_path / "other"
    shutil.copytree(str(model), str(other))
    raw = json.loads((other / "config.json").read_text())
    raw.pop("rope_parameters", None)
    (other / "config.json").write_text(json.dumps({**raw, "rope_theta": 10000.0, **changes}))
    before = contents(start.out)
    with pytest.raises(UserError) as error:
        start("newest", model={"path": str(other), "init": "random"})
    message = str(error.value)
    assert message.startswith("--resume: model.path (") and words in message and "changed since the checkpoint at step 4" in message
    assert contents(start.out) == before


def test_what_may_change_at_a_resume_is_said(start, monkeypatch):
    monkeypatch.setattr(compat, "has_bf16", lambda version: True)  # whatever stack this is
    start()
    used(start)
    resolved = start.out / "resolved" / "run.yaml"
    was = yaml.safe_load(resolved.read_text())
    resolved.write_text(yaml.safe_dump(dict(was, run=dict(was["run"], fp8=True))))  # a CPU without a compiler has neither
    done = start("newest", parallel={"pipe": 1, "data": 2}, optim={"lr": 1.0}, train={"epochs": 3}, model={"dtype": "bf16"})
    assert done.done == 4
    said = [line for line in start.said if line.startswith("--resume: ")]
    assert [line.split(" was ")[0] for line in said] == [
        "--resume: optim.lr", "--resume: train.epochs", "--resume: model.dtype", "--resume: run.fp8",
    ]  # fmt: skip
    assert said[3].endswith("was True, is False from here on")
    assert said[0].endswith("is 1.0 from here on")


def test_with_nothing_left_to_train_what_was_trained_stays_on_record(start, tmp_path):
    start(train={"max_steps": 4})
    used(start)
    before = contents(start.out)
    elsewhere = str(tmp_path / "export")
    done = start("newest", train={"max_steps": 2}, optim={"lr": 1.0}, parallel={"pipe": 1, "data": 2}, export={"dir": elsewhere})
    assert done.done == 4 and done.total == 2 and not [line for line in start.said if line.startswith("--resume: ")]
    after = contents(start.out)
    name = next(name for name in before if str(name).endswith("resolved/run.yaml"))
    was, now = (config.parse(yaml.safe_load(one.pop(name))) for one in (before, after))
    assert now.export.dir == elsewhere and was.export is None
    now.export = None
    assert now == was and before == after


@pytest.fixture
def finished(start, tmp_path):
    """finished(lines, **data): a run of four steps that was to be evaluated, with those lines in metrics.jsonl, started again."""
    source = tmp_path / "eval.jsonl"

    def run(lines, **data):
        shutil.copyfile(str(tmp_path / "train.jsonl"), str(source))
        start(train={"max_steps": 4}, data=data)
        used(start)
        (start.out / "metrics.jsonl").write_bytes(lines)
        run.before = contents(start.out)
        return start(
            "newest", train={"max_steps": 4}, data={"eval": str(source)}, optim={"lr": 1.0}, parallel={"pipe": 1, "data": 2}
        )

    run.source = str(source)
    return run


STARTED = b'{"kind": "start", "step": 0, "total_steps": 4}\n'
EVALUATED = b'{"kind": "eval", "step": 4, "loss": 1.0}\n'


def test_a_cut_off_evaluation_is_that_of_what_was_trained(finished, start):
    """Another learning rate in run.yaml is for another run; other stages are for this evaluation, and not what was trained on."""
    done = finished(STARTED, eval=finished.source)
    assert done.evaluate and (done.done, done.total) == (4, 4)
    assert done.config.optim.lr == 1e-5 and (done.config.parallel.pipe, done.config.parallel.data) == (1, 2)
    assert not [line for line in start.said if line.startswith("--resume: ")]
    after = contents(start.out)
    assert done.file == start.out / "resolved" / "evaluation.yaml" and after.pop(done.file)
    assert config.resolved_yaml(config.load(done.file)) == config.resolved_yaml(done.config)
    assert {name: after[name] for name in finished.before} == finished.before


@pytest.mark.parametrize("lines, left", [
    (EVALUATED, False), (EVALUATED.replace(b"4", b"3"), True), (EVALUATED + STARTED, True), (b"", True),
    (STARTED + EVALUATED + STARTED.replace(b"0", b"4"), False),
    (b"\x00\xff{\n[1]\n{}\n" + b"[" * 100000 + b"\n" + EVALUATED, False),
    (b'{"kind": "eval"}\n{"step": 4}\n{"step": "4", "kind": "eval"}\n', True), (b'{"kind": "eval", "step": 4', True),
])  # fmt: skip
def test_whether_an_evaluation_is_left_is_read_from_metrics_whatever_is_in_it(finished, lines, left):
    assert finished(lines, eval=finished.source).evaluate is left


def test_a_run_that_was_not_to_be_evaluated_is_finished(finished):
    assert not finished(STARTED).evaluate


def test_what_is_to_be_evaluated_cannot_be_written(finished, start, monkeypatch):
    record = start.out / "resolved" / "evaluation.yaml"
    fails(monkeypatch, Path, "write_text", record, errno.ENOSPC)
    with pytest.raises(UserError, match="^run.out: %s: cannot be written: No space left on device$" % record):
        finished(STARTED, eval=finished.source)


def test_a_finished_run_whose_record_cannot_be_written_says_so(start, tmp_path, monkeypatch):
    start(train={"max_steps": 4})
    used(start)
    record = start.out / "resolved" / "run.yaml"
    fails(monkeypatch, Path, "write_text", record, errno.EROFS)
    assert start("newest", train={"max_steps": 4}).done == 4  # nothing to write
    with pytest.raises(UserError, match="^run.out: %s: cannot be written: Read-only file system$" % record):
        start("newest", train={"max_steps": 4}, export={"dir": str(tmp_path / "export")})


def test_a_template_that_writes_the_date_keeps_the_first_starts_at_a_resume(start, tmp_path, monkeypatch):
    class Clock(datetime):
        day = 1

        @classmethod
        def now(cls, tz=None):
            return cls(2024, 5, cls.day, 23, 59, 58)

    monkeypatch.setattr(prepare, "datetime", Clock)
    monkeypatch.setattr(template, "datetime", Clock)
    chat = tmp_path / "chat.jinja"
    chat.write_text("{{ 'Today is ' + strftime_now('%d %b %Y') + '\\n' }}" + template.DEFAULT_CHAT_TEMPLATE)
    record = json.dumps({"type": "conversation", "rounds": [["ask", "Which colour?"], ["ans", "Red."]]})
    (tmp_path / "train.jsonl").write_text((record + "\n") * 40)
    data = {"template": str(chat), "seq_len": 64}
    start(data=data)
    assert any("encoded with 2024-05-01, a server's prompts carry the day they are sent" in line for line in start.said)
    used(start)
    Clock.day = 2
    assert start("newest", data=data).done == 4
    assert json.loads((start.out / "resolved" / "data.json").read_text())["now"] == "2024-05-01T23:59:58"
    shutil.rmtree(str(start.out))
    start(data=data)
    assert json.loads((start.out / "resolved" / "data.json").read_text())["now"] == "2024-05-02T23:59:58"
    template.fix_now(None)


def test_lion_without_its_package_is_refused_before_anything_starts(start, monkeypatch):
    monkeypatch.setattr(native, "without_lion", lambda: "the package lion-pytorch is not installed")
    refused(start, "optim.type: the package lion-pytorch is not installed; install it, or use adamw", optim={"type": "lion"})


def test_one_machine_does_not_resume_a_node_s_part(start):
    start(parallel={"pipe": 1})
    folder = used(start)
    document = manifest.parse(folder)
    where = {name: [int(name.endswith("_004.safetensors"))] for name in document["files"]}
    manifest.write(folder, dict(document, where={"nodes": ["a", "b"], "files": where}))
    (folder / "node").write_text("0\n")
    for name in (manifest.layer_file(4), manifest.optim_file(4)):
        (folder / name).unlink()
    with pytest.raises(UserError, match="step_000004: layer_004.safetensors and 1 more file lie on node 1 .b.: bring them"):
        start("newest", parallel={"pipe": 1})


def test_settings_without_effect_are_told(start):
    start(optim={"warmup": 1000}, train={"max_steps": 2, "eval_every": 1})
    assert "run.yaml: optim.warmup: 1000 steps, and the run has 2: optim.lr is never reached" in start.said
    assert "run.yaml: train.eval_every: nothing is evaluated without data.eval" in start.said
