"""run.yaml: defaults, overrides, and one clear line for every mistake."""

import pytest
import yaml

from pipeline_train import config
from pipeline_train.errors import UserError

BASE = {"run": {"out": "runs/x"}, "model": {"path": "m"}, "data": {"train": "d.jsonl"}, "parallel": {"pipe": 2}}


def merged(changes):
    raw = {k: dict(v) for k, v in BASE.items()}
    for section, keys in changes.items():
        raw[section] = {**raw.get(section, {}), **keys} if isinstance(keys, dict) else keys
    return raw


def test_the_required_keys_are_enough_and_the_resolved_file_loads_to_the_same():
    made = config.parse(BASE)
    assert (made.run.seed, made.batch.micro, made.rows_per_step, made.micro_batches, made.world) == (42, 1, 8, 8, 2)
    assert (made.optim.lr, made.optim.betas, made.optim.clip, made.train.keep) == (1e-5, [0.9, 0.95], 1.0, 3)
    assert config.parse(yaml.safe_load(config.resolved_yaml(made))) == made


def test_the_documented_example_loads():
    text = """
run:      {name: bloom-560m-sft, out: runs/bloom-560m, seed: 42}
model:    {path: /models/bloom-560m, dtype: bf16, init: pretrained}
data:     {train: data/train.jsonl, eval: data/eval.jsonl, seq_len: 2048, template: auto, pack: true, on_bad: fail}
parallel: {pipe: 4, data: 1, parts: auto, recompute: blocks}
batch:    {micro: 1, global: 64}
optim:    {type: adamw, lr: 1e-5, betas: [0.9, 0.95], weight_decay: 0.1, clip: 1.0, warmup: 100, schedule: cosine, floor: 0.1}
train:    {epochs: 2, save_every: 400, keep: 3, log_every: 10}
deepspeed: {zero_optimization: {stage: 1}}
export:   {dir: exports/bloom-560m, target: hf}
serve:    {engine: tgi, version: "3.3", shards: 2, port: 8082}
"""
    made = config.parse(yaml.safe_load(text))
    assert made.optim.lr == 1e-5 and made.micro_batches == 64 and made.serve.shards == 2


def test_numbers_that_yaml_takes_for_text_in_deepspeeds_own_sections():
    text = "{reduce_bucket_size: 5e8, allgather_bucket_size: 1.5e1, overlap_comm: true, tag: 5e, more: [1e3]}"
    raw = yaml.safe_load(
        "{run: {out: o}, model: {path: m}, data: {train: t}, parallel: {pipe: 1}, "
        "deepspeed: {zero_optimization: %s, tensorboard: {job_name: 12e4}}}" % text
    )
    assert config.parse(raw).deepspeed == {
        "zero_optimization": {
            "reduce_bucket_size": 500000000,
            "allgather_bucket_size": 15,
            "overlap_comm": True,
            "tag": "5e",
            "more": ["1e3"],
        },
        "tensorboard": {"job_name": "12e4"},
    }


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"parallel": {"pats": 1}}, 'parallel.pats: unknown key. Did you mean "parts"?'),
        ({"zzz": {}}, "zzz: unknown key. Known here: run, model,"),
        ({"optim": {"loss_scale": {"windw": 1}}}, 'optim.loss_scale.windw: unknown key. Did you mean "window"?'),
        ({"parallel": {"pipe": "two"}}, "parallel.pipe: expected a whole number, got 'two'"),
        ({"model": {"dtype": "float32"}}, "model.dtype: expected auto or fp32 or bf16 or fp16, got 'float32'"),
        ({"parallel": {"parts": "even"}}, "parallel.parts: expected auto or a list, got 'even'"),
        ({"optim": {"lr": "fast"}}, "optim.lr: expected a number, got 'fast'"),
        ({"optim": {"lr": "nan"}}, "optim.lr: nan is out of range"),
        ({"optim": {"lr": 0}}, "optim.lr: 0.0 is out of range"),
        ({"optim": {"betas": [0.9]}}, "optim.betas: expected two numbers in [0, 1), got [0.9]"),
        ({"optim": {"floor": 2}}, "optim.floor: 2.0 is out of range"),
        ({"train": {"epochs": 0}}, "train.epochs: must be 1 or more, got 0"),
        ({"data": {"seq_len": 4}}, "data.seq_len: must be 8 or more, got 4"),
        ({"run": {"out": " "}}, "run.out: is empty"),
        ({"parallel": {"parts": [1, 2, 3]}}, "parallel.parts: has 3 stages, parallel.pipe is 2. Make them equal."),
        ({"parallel": {"parts": [4, 0]}}, "parallel.parts: stage 1 is empty; every stage needs at least one layer."),
        ({"parallel": {"axes": ["pipe", "model"]}}, "parallel.axes: expected [pipe, data] or [data, pipe]"),
        ({"batch": {"micro": 4, "global": 10}}, "batch.global: 10 rows cannot be split into micro-batches of 4 on "
                                                "1 data-parallel ranks; use a multiple of 4, such as 8."),
        ({"deepspeed": {"gradient_clipping": 1}}, "deepspeed.gradient_clipping: is set from optim.clip"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "stage 0 or 1"),
        ({"model": "m"}, "model: expected a section, got 'm'"),
        ({"data": {"train": ["a.jsonl", "b.jsonl"]}}, "data.train: expected text, got ['a.jsonl', 'b.jsonl']"),
        ({"data": {"train": ["%d.jsonl" % n for n in range(99)]}}, "'5.jsonl', ...]"),
        ({"batch": {"micro": None}}, "batch.micro: expected a whole number, got nothing"),
        ({"deepspeed": {1: 2}}, "deepspeed: its keys must be text"),
        ({"data": {"train": [["a"] * 9] * 9}}, "data.train: expected text, got [[...], [...], [...], [...], [...], [...], ...]"),
        ({"optim": {"use_triton": "maybe"}}, "optim.use_triton: expected auto or true or false, got 'maybe'"),
        ({"optim": {"use_triton": 3}}, "optim.use_triton: expected auto or true or false, got 3"),
        ({"data": {"seq_len": "long"}}, "data.seq_len: expected a whole number or nothing, got 'long'"),
        ({"parallel": {"parts": [1, "x"]}}, "parallel.parts[1]: expected a whole number, got 'x'"),
        ({"parallel": {"parts": 3}}, "parallel.parts: expected auto or a list, got 3"),
        ({"optim": {"lr": float("inf")}}, "optim.lr: inf is out of range"),
        ({"optim": {"clip": float("inf")}}, "optim.clip: inf is out of range"),
        ({"optim": {"loss_scale": {"initial": 0}}}, "optim.loss_scale.initial: 0 is out of range"),
        ({"optim": {"loss_scale": {"window": 0}}}, "optim.loss_scale.window: 0 is out of range"),
        ({"optim": {"loss_scale": {"hysteresis": 0}}}, "optim.loss_scale.hysteresis: 0 is out of range"),
        ({"optim": {"loss_scale": {"min": 0}}}, "optim.loss_scale.min: 0.0 is out of range"),
        ({"optim": {"loss_scale": {"min": 131072}}}, "optim.loss_scale.initial: 65536 is out of range"),
        ({"optim": {"loss_scale": {"max_overflows": 0}}}, "optim.loss_scale.max_overflows: 0 is out of range"),
        ({"run": {"hang_s": 9}}, "run.hang_s: must be 10 or more seconds, got 9"),
        ({"train": {"epochs": 10**20}}, "train.epochs: 100000000000000000000 is more than any run has"),
        ({"run": {"seed": -1}}, "run.seed: must be between 0 and"),
        ({"run": {"seed": 10**23}}, "run.seed: "),
        ({"parallel": {"data": 10**6}}, "pipe 2 x data 1000000 is 2000000 processes, at most 4096"),
        ({"run": {"out": "a\0b"}}, "run.out: no file can have this name"),
        ({"model": {"path": "x" * 300}}, "model.path: no file can have this name"),
        ({"serve": {"port": -1}}, "serve: port must be in 1..65535 and shards 1 or more, got -1 and 1"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(changes, message):
    with pytest.raises(UserError) as error:
        config.parse(merged(changes))
    assert str(error.value).startswith("run.yaml: ") and message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match=r"run.yaml: parallel.pipe: missing"):
        config.parse({**BASE, "parallel": {}})
    with pytest.raises(UserError, match=r"run.yaml: model: missing"):
        config.parse({k: v for k, v in BASE.items() if k != "model"})


@pytest.mark.parametrize("key", sorted(config.OWNED))
def test_owned_deepspeed_keys_are_refused(key):
    with pytest.raises(UserError, match=r"deepspeed.%s: is set from" % key):
        config.parse(merged({"deepspeed": {key: 1}}))


def test_files_and_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    with pytest.raises(UserError, match="no such file"):
        config.load(path)
    path.write_text("a: [")
    with pytest.raises(UserError, match="run.yaml: not valid YAML"):
        config.load(path)
    path.write_text("just text")
    with pytest.raises(UserError, match="expected sections such as run:"):
        config.load(path)
    for text in ("name: 2024-13-45", "a: !!float x", "a: !!bool x", "a: !!int ''", "a: " + "1" * 5000, "[" * 5000):
        path.write_text(text)
        with pytest.raises(UserError, match="run.yaml: not valid YAML") as error:
            config.load(path)
        assert "\n" not in str(error.value)
    path.write_text("parallel: {pipe: 2}\nrun: {}\nparallel: {pipe: 1}\n")
    with pytest.raises(UserError, match='run.yaml: not valid YAML: the key "parallel" is given twice .* line 3'):
        config.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8 text"):
        config.load(path)
    path.write_text(yaml.safe_dump(BASE))
    made = config.load(path, ("optim.lr=2e-5", "batch.global=16", "parallel.parts=[3, 4]"))
    assert (made.optim.lr, made.batch.global_rows, made.parallel.parts) == (2e-5, 16, [3, 4])
    for item, message in [("optim.lr", "expected section.key=value"), ("optim..lr=1", "expected section.key=value"),
                          ("run.out.x=1", "out is not a section"), ("optim.lr=[", "not valid YAML"),
                          ("run.name=2024-99-99", "not valid YAML")]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            config.load(path, (item,))
    with pytest.raises(UserError, match='optim.lrr: unknown key. Did you mean "lr"'):
        config.load(path, ("optim.lrr=1",))


def test_against_the_model():
    made = config.parse(merged({"parallel": {"pipe": 2, "parts": [12, 13]}, "data": {"seq_len": 4096}}))
    with pytest.raises(UserError) as error:
        config.check_against_model(made, 26, None)
    assert str(error.value) == (
        'run.yaml: parallel.parts: sums to 25, the model has 26 layers (embed + 24 blocks + head). Use "auto" or fix the list.'
    )
    with pytest.raises(UserError, match="4096 is over the model's 2048 positions"):
        config.check_against_model(made, 25, 2048)
    config.check_against_model(made, 25, 4096)
    with pytest.raises(UserError, match="2 stages, but the model has only 1 layers"):
        config.check_against_model(config.parse(BASE), 1, None)


def test_a_section_with_nothing_in_it_has_its_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(SMALL_TEXT + "optim:\ntrain:\nexport:\n")
    made = config.load(path)
    assert made.optim == config.parse(yaml.safe_load(SMALL_TEXT)).optim and made.export is None
    path.write_text("model: {path: m}\nrun:\n")
    with pytest.raises(UserError, match="run.yaml: run.out: missing|run.yaml: parallel: missing|run.yaml: data: missing"):
        config.load(path)


def test_a_home_folder_in_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    raw = yaml.safe_load("{run: {out: ~/o}, model: {path: ~/m}, data: {train: ~/t, eval: ~/e, cache: ~/c}, parallel: {pipe: 1}}")
    made = config.parse(dict(raw, export={"dir": "~/x"}))
    data = made.data
    assert [made.run.out, made.model.path, data.train, data.eval, data.cache, made.export.dir] == [
        "/home/x/" + name for name in "omtecx"]  # fmt: skip
    assert config.parse(yaml.safe_load(SMALL_TEXT)).data.cache == "auto"


@pytest.mark.parametrize("content, message", [
    (b"", "expected sections such as run:, model:, data: and parallel:, found nothing"),
    ("run: {out: o}\n".encode("utf-16"), "not UTF-8 text (invalid start byte); save it as UTF-8"),
    (b"run: {\n  out: [", "not valid YAML: while parsing a flow node expected the node content, but found '<stream end>' in line"),
])  # fmt: skip
def test_a_file_that_is_no_run_yaml(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        config.load(path)
    assert str(caught.value).startswith("%s: %s" % (path, message))


SMALL_TEXT = "run: {out: o}\nmodel: {path: m}\ndata: {train: t}\nparallel: {pipe: 1}\n"
