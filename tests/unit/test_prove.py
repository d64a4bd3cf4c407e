"""``pipedock prove`` against servers written from the contract: 0.8, 3.3 without prefill, vLLM; its messages and its document."""

import json
import math
import sys

import pytest

if sys.version_info < (3, 10):
    pytest.skip("serve/ is Python 3.10 and later", allow_module_level=True)

from pipedock import main  # noqa: E402
from pipeline_train import host  # noqa: E402
from pipeline_train.errors import RunFailed, UserError  # noqa: E402
from serve.prove import Options, checks, numbers, prompts, prove  # noqa: E402
from serve.prove.checks import Answer  # noqa: E402
from serve.prove.reference import Bounds, Reference, Scores, served_dtype  # noqa: E402
from serve.prove.servers import Seen  # noqa: E402
from tests.contract import prove_folders as made  # noqa: E402
from tests.contract.prove_servers import Tgi08, Vllm  # noqa: E402
from tests.contract.recorded import Stub, whole  # noqa: E402
from tests.free_port import free_port  # noqa: E402


class Tgi33(Tgi08):
    """Flash llama of 3.3 without --enable-prefill-logprobs: no prefill. A chat gives the model one token more than /chat_tokenize
    says."""

    def get(self, path):
        told = super().get(path)
        if told is not None:
            del told["max_input_length"], told["model_dtype"]
            told.update(version="3.3.6-dev0", max_input_tokens=511, max_total_tokens=512)
        return told

    def post(self, path, body):
        if path == "/generate":
            answer = super().post(path, body)
            answer["details"]["prefill"] = []
            return answer
        if path == "/tokenize":
            return self.listed(self.tokenizer(body["inputs"])["input_ids"])
        ids = self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)
        if path == "/chat_tokenize":
            return {"tokenize_response": self.listed(ids), "templated_text": self.tokenizer.decode(ids)}
        choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "length"}
        return {"model": "m", "choices": [choice], "usage": {"prompt_tokens": len(ids) + 1, "completion_tokens": 1}}

    @staticmethod
    def listed(ids):
        return [{"id": one, "text": "", "start": 0, "stop": 0} for one in ids]


class OldVllm(Vllm):
    old = True


class SecondBest(Tgi08):
    """Right numbers, but not the likeliest token."""

    def greedy(self, ids, count):
        values, new = self.logprobs(ids)[-1].topk(2)
        return [int(new[1])], [float(values[1])], "length"


class Early(Tgi08):
    """Calls whatever comes third the end."""

    def greedy(self, ids, count):
        new, values, finish = super().greedy(ids, count)
        return (new[:3], values[:3], "eos") if len(new) > 3 else (new, values, finish)


class Mute(Vllm):
    """NaN among the numbers."""

    def prompt(self, ids):
        return [*super().prompt(ids)[:-1], None]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return made.Run(tmp_path_factory.mktemp("own"), "bloom", "bpe-bos", made.WITH_BOS, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    return made.Run(tmp_path_factory.mktemp("default"), "llama", "bpe-bos")


def by_name(document):
    return {check["name"]: check for check in document["checks"]}


@pytest.mark.parametrize("server, told, chats", [
    (Tgi08, ["details.prefill"], 0),
    (Vllm, ["POST /tokenize", "prompt_logprobs"], 3),
    (OldVllm, ["POST /tokenize", "prompt_logprobs"], 3),
])  # fmt: skip
def test_other_servers_are_proved_by_what_they_offer(default, server, told, chats):
    with server(default.model) as fake:
        found = by_name(prove(fake.url, default.model, default.config))
    assert all(check["failures"] == [] for check in found.values())
    assert found["token ids"]["by"] == told and found["token ids"]["bos"] == "<s> once"
    assert found["chat token ids"]["prompts"] == chats and found["chat token ids"]["holds"] is (True if chats else None)
    assert found["prompt log-probabilities"]["compared"] > 100 and found["end of sequence"]["compared"] >= 5


def test_a_bos_that_the_template_wrote_is_not_sent_to_a_server_that_adds_one(own):
    with Tgi08(own.model) as fake:
        assert prove(fake.url, own.model, own.config)["notes"] == [
            "send prompts to /generate without the <s> that the chat template writes: the server adds it"
        ]
        sent = [body["inputs"] for path, body in fake.asked if path == "/generate"]
    assert len(sent) == 9 and not any("<s>" in text for text in sent)


PLANTS = {
    "tokenizer": (made.fewer_merges, "token ids", ["train.jsonl:1", "another tokenizer than training's"]),
    "missing-bos": (made.bos(0), "token ids", ["train.jsonl:1", "token 0: expected", "BOS (<s>) is missing"]),
    "doubled-bos": (made.bos(2), "token ids", ["train.jsonl:1", "token 1: expected", "BOS (<s>) twice"]),
    "head": (made.other_head, "prompt log-probabilities", ["train.jsonl:", "as transformers computes", "another head"]),
    "embedding-as-head": (made.embedding_as_head, "prompt log-probabilities", ["its head is the input embedding"]),
    "no-end": (made.no_end, "end of sequence", ["train.jsonl:", "goes on after", "<|im_end|>"]),
}
CHAT_PLANTS = {
    "template": (made.template("<|im_start|>assistant", "<|im_start|>model"), "chat token ids", [
        "train.jsonl:1 (chat)", "another chat template: from character", 'on "model']),
    "template-bos": (made.template("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"), "chat token ids", [
        "train.jsonl:1 (chat)", "BOS (<s>) twice"]),
    "template-no-bos": (made.template("{{ bos_token }}", ""), "chat token ids", ["train.jsonl:1 (chat)", "BOS (<s>) is missing"]),
}  # fmt: skip
ROWS = [(server, name) for server in (Tgi08, Vllm) for name in PLANTS] + [(Vllm, name) for name in CHAT_PLANTS]


@pytest.mark.parametrize("server, name", ROWS, ids=["%s-%s" % (server.__name__, name) for server, name in ROWS])
def test_what_is_planted_is_named(own, tmp_path, server, name):
    change, check, words = {**PLANTS, **CHAT_PLANTS}[name]
    with server(made.planted(own.model, tmp_path / "served", change)) as fake, pytest.raises(RunFailed) as caught:
        prove(fake.url, own.model, own.config)
    message = str(caught.value)
    assert message.startswith("%s: %s: " % (fake.url, check)) and [word for word in words if word not in message] == []
    if check == "token ids":  # nothing is said about numbers that belong to other ids
        found = by_name(caught.value.document)
        assert found["prompt log-probabilities"]["holds"] is None or found["prompt log-probabilities"]["holds"] is True
        assert found["greedy answers"]["holds"] is not False


def test_no_prefill_is_said_with_its_cure_and_may_be_left_out(default):
    with Tgi33(default.model) as fake:
        with pytest.raises(RunFailed) as caught:
            prove(fake.url, default.model)
        found = by_name(caught.value.document)
        assert "--enable-prefill-logprobs" in found["prompt log-probabilities"]["failures"][0]
        assert found["token ids"]["by"] == ["POST /tokenize"] and found["token ids"]["holds"]
        with pytest.raises(RunFailed) as caught:
            prove(fake.url, default.model, options=Options(prompt_logprobs=False))
        assert "prompt log-probabilities" not in by_name(caught.value.document)
        assert by_name(caught.value.document)["greedy answers"]["holds"]


def test_a_chat_that_gives_the_model_more_than_its_tokenize_route_says(default):
    with Tgi33(default.model) as fake, pytest.raises(RunFailed) as caught:
        prove(fake.url, default.model, default.config, Options(weights=False))
    message = str(caught.value)
    assert "chat token ids: " in message and "train.jsonl:2, answer 1 (chat): a chat gives the model 17 tokens" in message
    assert "training had 16: another chat template, or BOS twice" in message


def test_a_log_probability_that_is_none(own):
    with Mute(own.model) as fake, pytest.raises(
        RunFailed, match="prompt log-probabilities: .*token .*: no log-probability is told"
    ):
        prove(fake.url, own.model)


def test_an_answer_that_is_not_the_likeliest(own):
    with SecondBest(own.model) as fake, pytest.raises(
        RunFailed, match="greedy answers: .*:1: new token 0: expected .*, got "
    ) as caught:
        prove(fake.url, own.model, own.config)
    assert "the server has another head" in by_name(caught.value.document)["greedy answers"]["failures"][0]
    assert by_name(caught.value.document)["prompt log-probabilities"]["holds"]


def test_an_answer_that_ends_with_what_ends_nothing(own):
    with Early(own.model) as fake, pytest.raises(
        RunFailed, match="end of sequence: .* the answer ends with .*eos_token.*, which ended"
    ):
        prove(fake.url, own.model, own.config, Options(weights=False))


def test_answers_too_short_to_end_prove_no_end_and_what_helps_is_said(own):
    short = Answer("here", "here", [3, 7, 8], Seen([], [(6, -0.71)], "length"), 1)
    check = checks.ends(own.codec, [short])
    assert (check.compared, check.failures) == (0, [])
    helps = "ask for longer ones (--new-tokens), or with more of the run's records (--train-config, --records)"
    assert check.figures["why"] == "no answer of 1 came to an end; " + helps


def test_likely_tokens_differ_by_no_more_than_the_bounds(own):
    """A tie is as good as the likeliest; many small differences are not one larger one."""
    scores = Scores([math.nan, -1.0, -2.0, -0.7], [-1, 7, 8, 9, 5], [math.nan, -1.0, -2.0, -0.69, -0.5])
    answer = Answer("here", "here", [3, 7, 8], Seen([(3, None), (7, -1.04), (8, -2.04)], [(6, -0.71)], "length"), 1)
    scored = [(answer, scores)]
    check = numbers.greedy(own.codec, [answer], scored, Bounds(0.02, 1.0))
    assert (check.failures, check.figures["ties"], check.compared) == ([], 1, 1)
    assert "new token 0: expected 9 " in numbers.greedy(own.codec, [answer], scored, Bounds(0.005, 1.0)).failures[0]
    assert numbers.prompt_logprobs(own.codec, scored, Bounds(0.05, 0.05), None).failures == []
    found = numbers.prompt_logprobs(own.codec, scored, Bounds(0.05, 0.03), None).failures
    assert "0 of 2 differ by more than 0.05, all by 0.04 on average (allowed: 0.03)" in found[0]
    told = Answer("here", "here", [3, 7, 8], Seen([], [(9, -0.9)], "length"), 1)
    scores = Scores([math.nan, -1.0, -2.0, -0.69], *scores[1:])
    found = numbers.greedy(own.codec, [told], [(told, scores)], Bounds(0.02, 1.0)).failures
    assert "here: new token 0" in found[0] and "expected log-probability -0.69, got -0.9" in found[0]
    assert numbers.greedy(own.codec, [told], [], Bounds(0.02, 1.0)).failures == ["here: token 9 is not in the vocabulary"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_measured_where_the_server_rounds(own, dtype):
    exact, rounded = Reference(own.model, "float32"), Reference(own.model, dtype)
    rows = [prompt.ids for some in prompts.prompts_of(own.codec, prompts.fixed_records(), 512) for prompt in some]
    before = rounded.scores(rows[0])
    bounds = rounded.bounds(rows, 0.01)
    assert exact.bounds(rows, 0.01) == Bounds(0.01, 0.01)
    assert 0.01 < bounds.mean < bounds.one < 2.0
    after, wanted = rounded.scores(rows[0]), exact.scores(rows[0])
    gaps = [max(abs(a - b) for a, b in zip(x.logprob[1:], wanted.logprob[1:])) for x in (before, after)]
    assert gaps[1] < gaps[0] < bounds.one  # what was rounded stays so, what is computed with it is float32


def test_a_model_that_does_not_fit_is_not_loaded(own, monkeypatch):
    monkeypatch.setattr(host, "available_memory", lambda: 100_000)
    with Tgi08(own.model) as fake:
        with pytest.raises(
            UserError, match="takes 0.[0-9]+ MiB here, 0.10 MiB are free; --no-weights compares token ids and ends only"
        ):
            prove(fake.url, own.model)
        assert prove(fake.url, own.model, options=Options(weights=False))["holds"]


def test_what_the_server_most_likely_computes_in():
    assert served_dtype("float32", None, {}) == "float32"
    assert served_dtype("float32", "bfloat16", {}) == "bfloat16"
    assert served_dtype(None, None, {"torch_dtype": "bfloat16"}) == "bfloat16"
    assert served_dtype(None, None, {"torch_dtype": "float32"}) == "float16"


def test_the_verb_prints_each_check_and_writes_only_where_it_is_told(own, tmp_path, capfd):
    kept = tmp_path / "proof.json"
    with Vllm(own.model) as fake:
        command = ["prove", "--url", fake.url, "--model", own.model, "--train-config", own.config]
        assert main(command) == 0
        shown = capfd.readouterr().out
        assert main(command + ["--json", "--output", str(kept)]) == 0
        document = json.loads(capfd.readouterr().out)
    assert shown.startswith("%s (vLLM 0.11.0) serves %s as trained\n" % (fake.url, own.model))
    for name in ("trained ids", "token ids", "chat token ids", "prompt log-probabilities", "greedy answers", "end of sequence"):
        assert sum(line.strip().startswith(name) for line in shown.splitlines()) == 1
    assert "280 tokens of 5 prompts, <s> once; by POST /tokenize and prompt_logprobs" in shown
    assert "9 of 9 answers ended, by <|im_end|> or <|endoftext|>" in shown
    assert document["holds"] is True and document["format"] == "pipedock-prove/1"
    assert by_name(json.loads(kept.read_text())) == by_name(document)


def test_the_verb_fails_with_what_differs(own, tmp_path, capfd):
    with Tgi08(made.planted(own.model, tmp_path / "served", made.bos(0))) as fake:
        command = ["prove", "--url", fake.url + "/", "--model", own.model, "--no-weights"]
        assert main(command) == 1
        shown = capfd.readouterr()
        assert main(command + ["--json"]) == 1
        document = json.loads(capfd.readouterr().out)
    assert "pipedock prove: %s: token ids: fixed record 1 (details.prefill): token 0: expected 2" % fake.url in shown.err
    assert ") does NOT serve %s as it is\n" % own.model in shown.out and "WRONG" in shown.out and "ok" in shown.out
    assert document["error"].endswith(" (12 more there)")
    assert by_name(document)["token ids"]["failures"] and "greedy answers" not in by_name(document)


@pytest.mark.parametrize("answers, message", [
    ([whole(b"{}", 404)], "has neither /info nor /version and /v1/models; expected text-generation-inference or vLLM"),
    ([whole(b'{"version":"1"}')], "/info is not text-generation-inference's"),
    ([whole(b"<html>hello</html>", 400)], "expected text-generation-inference or vLLM there: an HTML page"),
    ([whole(b"[1]")], "/info is not text-generation-inference's"),
    ([whole(b"", 401)], "the API key is missing or wrong; --api-key-file F sends one"),
])  # fmt: skip
def test_what_is_no_server_for_it(own, answers, message):
    with Stub(*answers) as stub, pytest.raises(UserError) as caught:
        prove(stub.url, own.model)
    assert message in str(caught.value) and str(caught.value).startswith(stub.url)


def test_a_server_that_is_not_ready(own):
    body = b'{"error":"unhealthy","error_type":"healthcheck"}'
    with Stub(whole(body, 503)) as stub, pytest.raises(RunFailed, match="the server is not ready"):
        prove(stub.url, own.model)


def test_a_prompt_that_the_server_refuses(own):
    info = {"version": "0.8.2", "max_input_length": 1000, "max_total_tokens": 1512}
    refused = b'{"error":"Input validation error: `inputs` must have less than 9 tokens. Given: 40","error_type":"validation"}'
    with Stub(whole(json.dumps(info).encode()), whole(refused, 422)) as stub, pytest.raises(RunFailed) as caught:
        prove(stub.url, own.model)
    wanted = "%s: fixed record 1: the server refuses the prompt: Input validation error: `inputs` must have less than 9 tokens"
    assert str(caught.value).startswith(wanted % stub.url)


def test_user_errors(own, tmp_path, capfd):
    url = "http://127.0.0.1:%d" % free_port()
    empty = tmp_path / "empty"
    empty.mkdir()
    data = tmp_path / "run.yaml"
    data.write_text(
        json.dumps({"run": {"out": "o"}, "model": {"path": str(empty)}, "data": {"train": "x"}, "parallel": {"pipe": 1}})
    )
    key = str(tmp_path / "key")
    for more, message in (
        (["--model", own.model], "%s: no server there (Connection refused); start one with pipedock serve" % url),
        (["--model", str(tmp_path / "none")], "none: no such folder; name the one that is served"),
        (["--model", str(empty)], "empty/config.json: no such file"),
        (["--model", own.model, "--train-config", str(data)], "no tokenizer there"),
        (["--model", own.model, "--train-config", key], "key: no such file"),
        (["--model", own.model, "--records", "0"], "--records 0: expected at least 1"),
        (["--model", own.model, "--new-tokens", "1"], "--new-tokens 1: expected at least 2"),
        (["--model", own.model, "--tolerance", "0"], "--tolerance 0.0: expected nats between 0 and 10"),
        (["--model", own.model, "--api-key-file", key], "--api-key-file %s: No such file" % key),
    ):
        assert main(["prove", "--url", url, *more]) == 2
        shown = capfd.readouterr().err
        assert message in shown and shown.count("pipedock prove: ") == 1


def test_a_folder_without_a_chat_template_has_no_chat_to_compare(own, tmp_path):
    bare = made.planted(own.model, tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink(missing_ok=True)
    path = tmp_path / "bare" / "tokenizer_config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "chat_template"}))
    with Tgi33(bare) as fake:
        document = prove(fake.url, bare, options=Options(weights=False))
    chat = next(check for check in document["checks"] if check["name"] == "chat token ids")
    assert chat["holds"] is None and chat["why"] == "the folder has no chat template, so its server has no chat"


def test_user_errors_about_the_model(own, tmp_path):
    with pytest.raises(UserError, match="--output .*none/x: cannot be written: No such file"):  # before anybody is asked
        prove("http://127.0.0.1:9", own.model, options=Options(output=str(tmp_path / "none" / "x")))
    with pytest.raises(UserError, match="http://127.0.0.1:9"):
        prove("http://127.0.0.1:9", own.model, options=Options(output=str(tmp_path / "x"), timeout=2))
    assert not (tmp_path / "x").exists()
    (tmp_path / "link").symlink_to(tmp_path / "x")
    for name, text in (("link", "http://127.0.0.1:9"), ("a" * 300, "--output .*a: cannot be written: File name too long")):
        with pytest.raises(UserError, match=text):
            prove("http://127.0.0.1:9", own.model, options=Options(output=str(tmp_path / name), timeout=2))
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "x").exists()
    with Tgi08(own.model) as fake:
        with pytest.raises(UserError, match="--dtype int3: expected one of float32, float16, bfloat16"):
            prove(fake.url, own.model, options=Options(dtype="int3"))
        bare = made.planted(own.model, tmp_path / "bare")
        (tmp_path / "bare" / "model.safetensors").unlink()
        with pytest.raises(UserError, match="--model .*bare: transformers cannot load it"):
            prove(fake.url, bare)


def test_records_are_drawn_evenly_of_every_kind_and_always_the_same(tmp_path):
    path = tmp_path / "many.jsonl"
    rows = [{"type": "pretrain", "text": "text %d" % i} for i in range(300)]
    rows[150:150] = [made.RECORDS[0], made.RECORDS[1]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prompts.chosen_records(str(path), "fail", 12)
    assert found == prompts.chosen_records(str(path), "fail", 12) and len({one.line for one in found}) == 12
    assert {one.kind for one in found} == {"pretrain", "instruct", "conversation"}
    assert max(one.line for one in found) > 200 and min(one.line for one in found) < 100


def test_prompts_too_long_for_the_server_are_not_asked(own):
    records = prompts.fixed_records()
    every = [prompt for some in prompts.prompts_of(own.codec, records, 10_000) for prompt in some]
    short = [prompt for some in prompts.prompts_of(own.codec, records, 50) for prompt in some]
    assert 0 < len(short) < len(every) and max(len(prompt.ids) for prompt in short) <= 50
    assert all(prompt.closing is None or len(prompt.closing_ids) <= 50 for prompt in short)
    with Tgi08(own.model) as fake, pytest.raises(UserError, match="no record is short enough for the 1000 tokens"):
        prove(fake.url, own.model, options=Options(new_tokens=995))
