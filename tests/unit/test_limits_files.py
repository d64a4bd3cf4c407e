"""``serve.limits``: what lies in the folder (section 4.5 of the contract), and that our exports are what each server needs."""

import dataclasses
import json

import pytest

from pipeline_train.errors import UserError
from serve.limits import Files, Question, judge, look
from tests.limits import (
    BARE_BLOOM,
    BLOOM_7B,
    LLAMA_7B,
    NEW_LLAMA,
    OLD_LLAMA,
    PREFIXED_BLOOM,
    accepted,
    ask,
    bloom,
    llama,
    note,
    refused,
)  # fmt: skip
from tests.models import make_hf, tiny_config
from tests.tokenizers import tiny_tokenizer

UNTIED_BLOOM, TIED_LLAMA = bloom(tie_word_embeddings=False), llama(tie_word_embeddings=True)


def but(files, without=(), more=(), **changes):
    """``files`` with other names or facts."""
    names = tuple(name for name in files.names if name not in without) + tuple(more)
    return dataclasses.replace(files, names=names, **changes)


# Weights -------------------------------------------------------------------------------------------------------------------


def test_a_folder_without_weights():
    for engine, version, target in (("tgi", "0.8", "tgi-0.8"), ("tgi", "3.3", "tgi-3"), ("vllm", None, "vllm")):
        files = Files(("config.json", "tokenizer.json", "tokenizer.model"))
        reasons = ask(LLAMA_7B, engine, version, 2, "t4", files=files, where="m").reasons
        assert [
            reason
            for reason in reasons
            if "no weights" in reason and reason.endswith("--output m-%s --target %s" % (target, target))
        ]


def test_08_wants_bins_of_a_llama_on_one_gpu_with_flash_attention():
    reason = refused(LLAMA_7B, "tgi", "0.8", 1, "t4", files=but(OLD_LLAMA, ("pytorch_model.bin",)))
    assert "no *.bin files" in reason and "--target tgi-0.8" in reason
    for files in (OLD_LLAMA, but(OLD_LLAMA, ("model.safetensors",), safetensors=None)):
        accepted(LLAMA_7B, "tgi", "0.8", 1, "t4", files=files)
    for shards, gpu in ((2, "t4"), (1, "v100")):
        accepted(LLAMA_7B, "tgi", "0.8", shards, gpu, files=but(OLD_LLAMA, ("pytorch_model.bin",)))
    accepted(LLAMA_7B, "tgi", "3.3", 1, "t4", files=NEW_LLAMA)
    accepted(BLOOM_7B, "tgi", "0.8", 1, "a100", files=BARE_BLOOM)


@pytest.mark.parametrize("version", ["0.8", "3.3"])
def test_bins_alone_are_converted_where_the_folder_can_be_written(version):
    files = but(OLD_LLAMA, ("model.safetensors",), safetensors=None)
    verdict = accepted(LLAMA_7B, "tgi", version, 1, "t4", files=files)
    assert verdict.writable and "must be writable" in note(verdict, "safetensors beside the *.bin")
    assert not accepted(LLAMA_7B, "tgi", version, 1, "t4", files=OLD_LLAMA).writable
    assert not accepted(LLAMA_7B, "vllm", None, 1, "t4", files=files).writable


def test_other_bins_are_weights_to_08():
    files = but(OLD_LLAMA, more=("training_args.bin", "optimizer.bin"))
    reasons = ask(LLAMA_7B, "tgi", "0.8", 1, "t4", files=files).reasons
    assert len(reasons) == 2 and all("takes every *.bin for weights" in reason and "move it out" in reason for reason in reasons)
    accepted(LLAMA_7B, "tgi", "0.8", 2, "t4", files=files)  # shards read *.safetensors
    accepted(LLAMA_7B, "tgi", "3.3", 1, "t4", files=files)


def test_parts_that_an_index_names_and_that_are_not_there():
    files = but(NEW_LLAMA, missing=tuple("model-0000%d-of-00005.safetensors" % n for n in range(1, 6)))
    reason = refused(LLAMA_7B, "tgi", "3.3", 1, "t4", files=files)
    assert (
        "model-00001-of-00005" in reason
        and "and 2 more: named by the index, or a link, and not there" in reason
        and "--target tgi-3" in reason
    )
    files = but(NEW_LLAMA, missing=("a.safetensors", "b.safetensors", "c.safetensors"))
    assert "a.safetensors, b.safetensors, c.safetensors: named" in refused(LLAMA_7B, "tgi", "3.3", 1, "t4", files=files)
    accepted(
        LLAMA_7B, "tgi", "3.3", 1, "t4", files=but(NEW_LLAMA, missing=("pytorch_model-00001-of-00002.bin",))
    )  # nobody reads it


# Tokenizers ----------------------------------------------------------------------------------------------------------------


def test_no_tokenizer_at_all():
    for engine, version in (("tgi", "3.3"), ("vllm", None)):
        files = but(NEW_LLAMA, ("tokenizer.json",))
        assert "no tokenizer (none of tokenizer.json" in refused(LLAMA_7B, engine, version, 1, "a100", files=files)
        accepted(LLAMA_7B, engine, version, 1, "a100", files=but(files, more=("tokenizer.model",)))


def test_08_loads_a_llamas_slow_tokenizer_with_flash_attention():
    files = but(OLD_LLAMA, ("tokenizer.model",))
    for shards in (1, 2):
        assert "no tokenizer.model: with flash attention TGI 0.8.2" in refused(LLAMA_7B, "tgi", "0.8", shards, "t4", files=files)
    accepted(LLAMA_7B, "tgi", "0.8", 1, "v100", files=files)
    accepted(LLAMA_7B, "tgi", "3.3", 1, "t4", files=files)
    verdict = accepted(LLAMA_7B, "tgi", "0.8", 1, "t4", files=but(OLD_LLAMA, ("tokenizer.json",)))
    assert note(verdict, "prompts are not checked for their length")


def test_08_cannot_read_todays_merges_where_it_needs_tokenizer_json():
    pairs = but(BARE_BLOOM, merge_pairs=True)
    assert "its merges are lists" in refused(BLOOM_7B, "tgi", "0.8", 1, "a100", files=pairs)
    accepted(BLOOM_7B, "tgi", "3.3", 1, "a100", files=pairs)
    assert "no tokenizer.json: bloom has no other" in refused(
        BLOOM_7B, "tgi", "0.8", 1, "a100", files=but(BARE_BLOOM, ("tokenizer.json",), ("tokenizer.model",))
    )
    verdict = accepted(LLAMA_7B, "tgi", "0.8", 1, "t4", files=but(OLD_LLAMA, merge_pairs=True))
    assert note(verdict, "prompts are not checked for their length")


def test_33_does_not_read_chat_template_jinja():
    for found, said in (("jinja", True), ("read", False), ("", False)):
        verdict = accepted(LLAMA_7B, "tgi", "3.3", 1, "a100", files=but(NEW_LLAMA, chat_template=found), where="m")
        assert any("chat_template.jinja" in text and "--target tgi-3" in text for text in verdict.notes) is said
        assert not any(
            "chat_template" in text for text in accepted(LLAMA_7B, "vllm", files=but(NEW_LLAMA, chat_template=found)).notes
        )


# Names of tensors, heads ---------------------------------------------------------------------------------------------------


def test_blooms_own_head():
    """3.3 and vLLM take the embedding; 0.8 has its head."""
    reason = refused(UNTIED_BLOOM, "tgi", "3.3", 1, "a100", files=BARE_BLOOM, where="m")
    assert "takes the embedding for bloom's head" in reason and "use --version 0.8" in reason and "--target tgi-0.8" in reason
    assert "does not load bloom's lm_head.weight" in refused(UNTIED_BLOOM, "vllm", None, 1, "a100", files=PREFIXED_BLOOM)
    assert refused(UNTIED_BLOOM, "tgi", "3.3", 1, "a100") and refused(UNTIED_BLOOM, "vllm")  # config.json alone says it, too
    accepted(UNTIED_BLOOM, "tgi", "0.8", 2, "a100", files=but(PREFIXED_BLOOM, same_head=False))
    equal = but(BARE_BLOOM, safetensors=frozenset({"word_embeddings.weight", "lm_head.weight"}), same_head=True)
    accepted(UNTIED_BLOOM, "tgi", "3.3", 1, "a100", files=equal)
    verdict = accepted(BLOOM_7B, "tgi", "3.3", 1, "a100", files=but(equal, same_head=False))
    assert "is not the embedding" in note(verdict, "lm_head.weight")


def test_blooms_head_in_shards_of_08():
    """Filled from a tensor named exactly word_embeddings.weight, or from lm_head.weight."""
    headless = but(PREFIXED_BLOOM, safetensors=frozenset({"transformer.word_embeddings.weight"}))
    assert "find no head: there is no lm_head.weight" in refused(BLOOM_7B, "tgi", "0.8", 2, "a100", files=headless)
    for shards, files in ((2, PREFIXED_BLOOM), (2, BARE_BLOOM), (1, headless), (1, PREFIXED_BLOOM), (1, BARE_BLOOM)):
        accepted(BLOOM_7B, "tgi", "0.8", shards, "a100", files=files)
    bins = Files(("config.json", "pytorch_model.bin", "tokenizer.json"), bins=PREFIXED_BLOOM.safetensors)
    assert "converting *.bin to safetensors drops a tied lm_head" in refused(BLOOM_7B, "tgi", "0.8", 2, "a100", files=bins)
    accepted(UNTIED_BLOOM, "tgi", "0.8", 2, "a100", files=bins)  # not shared, so not dropped
    both = but(BARE_BLOOM, safetensors=frozenset({"word_embeddings.weight", "lm_head.weight"}), same_head=False)
    assert "take word_embeddings.weight for the head" in refused(UNTIED_BLOOM, "tgi", "0.8", 2, "a100", files=both)
    assert "the transformers in TGI 0.8.2 refuses such files" in refused(UNTIED_BLOOM, "tgi", "0.8", 1, "a100", files=both)


def test_a_prefix_in_bins_is_found_too():
    bins = Files(("config.json", "pytorch_model.bin", "tokenizer.json"), bins=PREFIXED_BLOOM.safetensors)
    assert "finds bloom's without that prefix only" in refused(BLOOM_7B, "tgi", "3.3", 1, "a100", files=bins)
    for engine in ("tgi", "vllm"):
        verdict = accepted(
            BLOOM_7B, engine, "0.8" if engine == "tgi" else None, 1, "a100", files=dataclasses.replace(bins, bins=None)
        )
        assert note(verdict, "not judged: the tensors' names")
    for files in (
        None,
        Files(("tokenizer.json",)),
        dataclasses.replace(bins, names=bins.names + ("a.safetensors",), broken=("a.safetensors",)),
    ):
        assert not any("the tensors' names" in text for text in ask(BLOOM_7B, files=files).notes)  # there is worse, or nothing


def test_a_llamas_head():
    """0.8 ties nothing; 3.3 and vLLM follow config.json."""
    names = frozenset({"model.embed_tokens.weight"})
    headless = but(OLD_LLAMA, bins=names, safetensors=names)
    for shards in (1, 2):
        reason = refused(TIED_LLAMA, "tgi", "0.8", shards, "t4", files=headless)
        assert "no lm_head.weight" in reason and "--target tgi-0.8" in reason
        accepted(TIED_LLAMA, "tgi", "0.8", shards, "t4", files=OLD_LLAMA)
    accepted(TIED_LLAMA, "tgi", "0.8", 1, "v100", files=headless)  # through transformers, which ties
    for engine, version in (("tgi", "3.3"), ("vllm", None)):
        accepted(TIED_LLAMA, engine, version, 1, "a100", files=headless)
        assert "the export is not whole" in refused(llama(tie_word_embeddings=False), engine, version, 1, "a100", files=headless)


def test_each_kind_of_file_is_judged_by_its_own_names():
    """One shard of 0.8 reads the .bin files, two the others."""
    files = but(OLD_LLAMA, bins=frozenset({"model.embed_tokens.weight"}))
    assert "no lm_head.weight" in refused(TIED_LLAMA, "tgi", "0.8", 1, "t4", files=files)
    accepted(TIED_LLAMA, "tgi", "0.8", 2, "t4", files=files)


# Real folders --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model of each family as transformers saves it, and its export for each server."""
    pytest.importorskip("transformers", reason="makes the models")
    from export.to_hf import to_hf

    root = tmp_path_factory.mktemp("limits")
    found = {}
    for family, kind in (("llama", "spm"), ("bloom", "bpe")):
        plain = root / family
        make_hf(plain, tiny_config(family, vocab_size=600))
        tiny_tokenizer(plain, kind)
        found[family, "hf"] = str(plain)
        for target in ("tgi-0.8", "tgi-3", "vllm"):
            found[family, target] = str(root / (family + "-" + target))
            to_hf(str(plain), found[family, target], target=target)
    return found


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("target, engine, version", [("tgi-0.8", "tgi", "0.8"), ("tgi-3", "tgi", "3.3"), ("vllm", "vllm", None)])
@pytest.mark.parametrize("shards", [1, 2])
def test_what_to_hf_writes_for_a_server_is_what_it_can_load(folders, family, target, engine, version, shards):
    where = folders[family, target]
    config, files, nbytes = look(where)
    verdict = judge(Question(config, engine, version, shards, "t4", files=files, nbytes=nbytes, where=where))
    assert verdict.reasons == [] and not any("not judged: the tensors" in text for text in verdict.notes)
    assert nbytes > 0 and not verdict.writable


def test_an_export_for_another_server_is_refused_with_the_command_that_helps(folders):
    config, files, _ = look(folders["bloom", "hf"])
    reasons = ask(config, "tgi", "3.3", 1, "a100", files=files, where=folders["bloom", "hf"]).reasons
    assert len(reasons) == 1 and reasons[0].endswith("--target tgi-3")
    config, files, _ = look(folders["llama", "hf"])
    assert any("no *.bin files" in reason for reason in ask(config, "tgi", "0.8", 1, "t4", files=files).reasons)


def test_look_reads_names_of_both_kinds(folders, tmp_path):
    torch = pytest.importorskip("torch")
    _, files, _ = look(folders["llama", "tgi-0.8"])
    assert files.bins == files.safetensors and "lm_head.weight" in files.bins and files.chat_template == ""
    _, files, nbytes = look(folders["bloom", "hf"])
    assert "transformer.word_embeddings.weight" in files.safetensors and files.bins is None and nbytes > 0
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("bloom")))
    torch.save({"word_embeddings.weight": torch.zeros(4, 4), "ln_f.bias": torch.zeros(4)}, str(tmp_path / "pytorch_model.bin"))
    _, files, nbytes = look(str(tmp_path))
    assert files.bins == {"word_embeddings.weight", "ln_f.bias"} and nbytes == (tmp_path / "pytorch_model.bin").stat().st_size


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_look_compares_a_blooms_head_with_its_embedding(tmp_path, equal, prefix):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("bloom")))
    one = torch.arange(12.0).reshape(4, 3)
    safetensors.save_file({prefix + "word_embeddings.weight": one}, str(tmp_path / "model-1.safetensors"))
    safetensors.save_file({"lm_head.weight": one.clone() if equal else one + 1}, str(tmp_path / "model-2.safetensors"))
    assert look(str(tmp_path))[1].same_head is equal


def test_look_finds_what_is_missing_and_how_merges_and_templates_are_written(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    index = {
        "weight_map": {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors", "c.weight": "model-2.safetensors"}
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "chat_template.jinja").write_text("x")
    for merges, pairs in ((["a b"], False), ([["a", "b"]], True), ([], False)):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "merges": merges}}))
        files = look(str(tmp_path))[1]
        assert files.merge_pairs is pairs and files.missing == ("model-2.safetensors",) and files.chat_template == "jinja"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "x"}))
    assert look(str(tmp_path))[1].chat_template == "jinja"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    assert look(str(tmp_path))[1].chat_template == "read"


BROKEN = {
    "empty": b"", "header": b"12345678", "noise": b"\xff" * 64, "list": (2).to_bytes(8, "little") + b"[]",
    "number": (9).to_bytes(8, "little") + b'{"a":1}  ',
    "cut": (40).to_bytes(8, "little") + b'{"a.weight":{"data_offsets":[0,8]}}     1234567',
}  # fmt: skip


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_files_that_are_not_whole(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "tokenizer.json").write_bytes(content)
    config, files, _ = look(str(tmp_path))
    assert files.safetensors is None and files.broken == ("model.safetensors",)
    assert "model.safetensors: not a whole safetensors file" in refused(config, "tgi", "3.3", 1, "a100", files=files)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    files = look(str(tmp_path))[1]
    assert files.bins is None and note(accepted(config, "tgi", "3.3", 1, "a100", files=files), "not judged: the tensors' names")


def test_a_whole_file_and_a_link_to_nothing(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    (tmp_path / "model.safetensors").write_bytes(BROKEN["cut"] + b"8")
    assert look(str(tmp_path))[1].safetensors == {"a.weight"} and look(str(tmp_path))[1].broken == ()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    files = look(str(tmp_path))[1]
    assert files.missing == ("model.safetensors",) and files.broken == ()


def test_folders_that_are_none(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        look(str(tmp_path / "none"))
    with pytest.raises(UserError, match="config.json: no such file"):
        look(str(tmp_path))
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "layer_000.safetensors").write_text("")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "run"):
        with pytest.raises(UserError, match="pipeline weights; export them first: pipedock to-hf --input "):
            look(str(folder))
