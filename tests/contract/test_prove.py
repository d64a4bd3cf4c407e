"""``pipedock prove`` against the whole embedded server: both families, the default format and a model's own template; and a copy of
the folder with something planted is served instead, which must be caught and called by its name."""

import json
from pathlib import Path

import pytest

from pipeline_train.errors import RunFailed, UserError
from serve.prove import Options, prove
from tests.contract import prove_folders as made
from tests.contract.prove_servers import embedded

CASES = {
    "llama-default": ("llama", "spm", None, {}),
    "llama-own": ("llama", "bpe-bos", made.WITH_BOS, {}),
    "bloom-default": ("bloom", "bpe", None, {}),
    "bloom-own": ("bloom", "bpe-bos", made.WITH_BOS, {"tie_word_embeddings": False}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A function from a case's name to its Run, made once."""
    known = {}

    def run(name):
        if name not in known:
            family, tokenizer, template, more = CASES[name]
            known[name] = made.Run(tmp_path_factory.mktemp(name), family, tokenizer, template, **more)
        return known[name]

    return run


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_server_of_the_run_is_proved(runs, name):
    run = runs(name)
    before = {path.name: path.stat().st_mtime_ns for path in Path(run.model).iterdir()}
    with embedded(run.model) as url:
        document = prove(url, run.model, run.config)
        fixed = prove(url, run.model)
    found = {check["name"]: check for check in document["checks"]}
    assert document["holds"] and all(check["failures"] == [] for check in document["checks"])
    assert document["server"] == "text-generation-inference 3.3.6-dev0 (pipedock embedded)" and document["dtype"] == "float32"
    assert sorted(where.rpartition(":")[2] for where in document["records"]) == ["1", "2", "3", "4"]
    ids, chats = found["token ids"], found["chat token ids"]
    assert ids["by"] == ["POST /tokenize", "details.prefill"] and ids["prompts"] == 5
    assert ids["bos"] == ("no BOS" if name == "bloom-default" else "<s> once")
    assert chats["prompts"] == (4 if name.endswith("own") else 3)  # the default instruct prompt is no conversation
    assert found["prompt log-probabilities"]["compared"] > 100 and found["prompt log-probabilities"]["largest"] < 1e-4
    assert found["greedy answers"]["answers"] == 9 and found["greedy answers"]["compared"] > 20
    assert found["end of sequence"]["compared"] >= 5  # each answer ends, asked for or to be closed only
    assert found["trained ids"]["holds"] is None  # the run has encoded nothing
    assert fixed["holds"] and fixed["records_of"] == "fixed records" and len(fixed["records"]) == 6
    assert {path.name: path.stat().st_mtime_ns for path in Path(run.model).iterdir()} == before


HUMAN, START, BOS = "### Human", "<|im_start|>assistant", "{{ bos_token }}"
CHAT, TEXT, NUMBERS, END = "chat token ids", "token ids", "prompt log-probabilities", "end of sequence"
PLANTS = [  # case, what is done to the served folder, the check that must fail first, what its message must say
    ("llama-default", made.template(HUMAN, "### User"), CHAT, [
        "train.jsonl:2, answer 1 (chat)", "another chat template", 'on "User: What is the capita" instead of "Human: What is']),
    ("llama-own", made.template(START, "<|im_start|>model"), CHAT, [
        "train.jsonl:1 (chat)", "another chat template", 'on "model', 'instead of "assistant']),
    ("bloom-own", made.template(BOS, BOS + BOS), CHAT, [
        "train.jsonl:1 (chat)", "token 1: expected", 'got 2 "<s>": BOS (<s>) twice']),
    ("llama-own", made.template(BOS, ""), CHAT, [
        "train.jsonl:1 (chat)", 'token 0: expected 2 "<s>"', "BOS (<s>) is missing"]),
    ("bloom-default", made.fewer_merges, TEXT, [
        "train.jsonl:1 (POST /tokenize)", "token 0: expected", "another tokenizer than training's"]),
    ("llama-default", made.bos(0), TEXT, [
        "train.jsonl:1 (POST /tokenize)", 'token 0: expected 1 "<s>"', "BOS (<s>) is missing"]),
    ("bloom-own", made.bos(2), TEXT, [
        "train.jsonl:1 (POST /tokenize)", "token 1: expected", "BOS (<s>) twice"]),
    ("llama-default", made.other_head, NUMBERS, [
        "train.jsonl:", "as transformers computes, got", "another head or other weights"]),
    ("bloom-own", made.embedding_as_head, NUMBERS, [
        "train.jsonl:", "its head is the input embedding", "--target tgi-3"]),
    ("llama-own", made.no_end, END, ["train.jsonl:", "the answer goes on after", "<|im_end|>"]),
    ("bloom-own", made.no_end, END, ["train.jsonl:", "the answer goes on after", "<|im_end|>"]),
]  # fmt: skip


@pytest.mark.parametrize("name, change, check, words", PLANTS, ids=["%s-%d" % (row[2], i) for i, row in enumerate(PLANTS)])
def test_what_is_planted_in_the_server_is_named(runs, tmp_path, name, change, check, words):
    run = runs(name)
    with embedded(made.planted(run.model, tmp_path / "served", change)) as url:
        with pytest.raises(RunFailed) as caught:
            prove(url, run.model, run.config)
    message = str(caught.value)
    assert message.startswith("%s: %s: " % (url, check)) and "\n" not in message
    assert [word for word in words if word not in message] == []
    found = {one["name"]: one["holds"] for one in caught.value.document["checks"]}
    assert found[check] is False and found["the folder's token ids"] is True and caught.value.document["holds"] is False


def test_a_server_with_a_key(runs):
    run = runs("llama-own")
    with embedded(run.model, "--api-key", "S3cret") as url:
        with pytest.raises(UserError, match="the API key is missing or wrong; --api-key-file F sends one"):
            prove(url, run.model)
        assert prove(url, run.model, options=Options(weights=False, api_key="S3cret"))["holds"]


def test_a_server_that_refuses_what_is_asked(runs, tmp_path):
    """Here because it has no chat template."""
    run = runs("llama-own")
    served = made.planted(run.model, tmp_path / "served", made.no_template)
    with embedded(served) as url, pytest.raises(RunFailed) as caught:
        prove(url, run.model, run.config, Options(weights=False))
    wanted = "chat token ids: %s:1 (chat): the server refuses the conversation: Template error: template not found"
    assert wanted % json.loads(Path(run.config).read_text())["data"]["train"] in str(caught.value)


def test_a_folder_of_another_run_is_told_from_a_wrong_server(runs, tmp_path):
    run = runs("bloom-default")
    other = made.planted(run.model, tmp_path / "served", made.fewer_merges)
    with embedded(other) as url, pytest.raises(RunFailed) as caught:
        prove(url, other, run.config)
    assert "the folder's token ids: " in str(caught.value) and "train.jsonl:1 (%s): token 0" % other in str(caught.value)


def test_ids_are_those_that_lie_in_the_run_s_folder(runs, tmp_path):
    """The encoded data of the run itself; and a record that was changed since."""
    from pipeline_train import config
    from pipeline_train.data.feed import prepare

    run = runs("llama-own")
    lines = [json.dumps(record) for record in made.RECORDS]
    data, out = tmp_path / "train.jsonl", tmp_path / "out"
    data.write_text("\n".join(lines) + "\n")
    settings = json.loads(Path(run.config).read_text())
    settings["run"]["out"], settings["data"] = str(out), {"train": str(data), "cache": "off"}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings))
    (out / "data").mkdir(parents=True)
    prepare(config.load(path), run.codec, "train", out / "data", 512)
    options = Options(weights=False)
    with embedded(run.model) as url:
        stored = prove(url, run.model, str(path), options)["checks"][0]
        assert (stored["name"], stored["holds"], stored["records"]) == ("trained ids", True, 4) and stored["compared"] > 100
        data.write_text("\n".join([lines[0].replace("three", "four")] + lines[1:]) + "\n")
        with pytest.raises(
            RunFailed, match="trained ids: .*train.jsonl:1: encoded now, it has other ids than the run was trained on"
        ):
            prove(url, run.model, str(path), options)
