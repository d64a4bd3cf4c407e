"""Rules about what lies in the folder. Each appends to the verdict. Standard library only."""

from typing import FrozenSet, Optional

from .case import Case
from .question import Files, Verdict

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")


def weights(case: Case, verdict: Verdict) -> None:
    """That there are weights of a kind that the server loads, and all of them."""
    files = case.asked.files
    if files is None:
        verdict.note("not judged: the files (config.json alone was asked about)")
        return
    tensors, bins = files.ending(".safetensors"), files.ending(".bin")
    if not tensors and not bins:
        verdict.refuse("no weights (*.safetensors or *.bin): %s" % case.export(target_of(case)))
    kinds = [".bin"] if not tensors else [".safetensors"]
    if case.old and case.flash and case.asked.shards == 1:
        kinds.append(".bin")
        if tensors and not bins:
            verdict.refuse("no *.bin files: with flash attention, on one shard, %s loads a llama from these only: %s" % (
                case.title, case.export("tgi-0.8")))  # fmt: skip
    gone = [name for name in files.missing if name.endswith(tuple(kinds))]
    if gone:
        listed = ", ".join(gone[:3]) + (" and %d more" % (len(gone) - 3) if len(gone) > 3 else "")
        verdict.refuse(
            "%s: named by the index, or a link, and not there: copy or export again: %s" % (listed, case.export(target_of(case)))
        )
    for name in files.broken if ".safetensors" in kinds else ():
        verdict.refuse("%s: not a whole safetensors file, perhaps cut off: copy or export again: %s" % (
            name, case.export(target_of(case))))  # fmt: skip
    if case.old and ".bin" in kinds:
        _strangers(case, files, verdict)
    if case.engine.name == "tgi" and not tensors and bins:
        verdict.writable = True
        verdict.note("%s writes model*.safetensors beside the *.bin at its first start: the folder must be writable" % case.title)


def _strangers(case: Case, files: Files, verdict: Verdict) -> None:
    """0.8 takes every *.bin for weights (S/utils/hub.py:weight_files@v0.8.2)."""
    for name in files.names:
        if name.endswith(".bin") and name not in files.ending(".bin"):
            verdict.refuse("%s: %s takes every *.bin for weights and fails on it: move it out of the folder" % (name, case.title))


def target_of(case: Case) -> str:
    """The target of to-hf that writes for this server."""
    return {"0.8": "tgi-0.8", "3.3": "tgi-3"}.get(case.engine.line, "vllm")


def tokenizer(case: Case, verdict: Verdict) -> None:
    files = case.asked.files
    if files is None:
        return
    if not any(name in files.names for name in TOKENIZERS):
        verdict.refuse("no tokenizer (none of %s): copy the model's beside the weights" % ", ".join(TOKENIZERS))
        return
    if case.old:
        _old_tokenizer(case, files, verdict)
    if case.engine.line == "3.3" and files.chat_template == "jinja":
        verdict.note(
            "%s does not read chat_template.jinja, so that the chat route answers with an error: %s writes the template into "
            "tokenizer_config.json" % (case.title, case.export("tgi-3"))
        )


def _old_tokenizer(case: Case, files: Files, verdict: Verdict) -> None:
    slow = case.flash
    if slow and "tokenizer.model" not in files.names:
        verdict.refuse(
            "no tokenizer.model: with flash attention %s loads a llama's slow tokenizer only: copy the original model's beside the "
            "weights, or use --version 3.3" % case.title
        )
    if case.sizes.model_type == "bloom" and "tokenizer.json" not in files.names:
        verdict.refuse("no tokenizer.json: bloom has no other tokenizer: copy that of the original model beside the weights")
    if files.merge_pairs and not slow:
        verdict.refuse("tokenizer.json: its merges are lists, which the tokenizers in %s cannot read: %s" % (
            case.title, case.export("tgi-0.8")))  # fmt: skip
    elif files.merge_pairs or "tokenizer.json" not in files.names:
        verdict.note("no tokenizer.json that %s can read: prompts are not checked for their length" % case.title)


def names(case: Case, verdict: Verdict) -> None:
    """Names of tensors, and whether the head that the server computes with is the model's."""
    kind = case.sizes.model_type
    found = _loaded(case)
    if kind == "bloom":
        {"0.8": _bloom_old, "3.3": _bloom_new}.get(case.engine.line, _bloom_vllm)(case, found, verdict)
    elif kind == "llama" and found is not None and "lm_head.weight" not in found:
        if case.old and case.flash:
            verdict.refuse("no lm_head.weight in the files: %s does not tie a llama's head to its embedding: %s" % (
                case.title, case.export("tgi-0.8")))  # fmt: skip
        elif case.sizes.tied is False:
            verdict.refuse(
                "no lm_head.weight in the files, and config.json says tie_word_embeddings false: the export is not whole"
            )
    files = case.asked.files
    if files is not None and found is None and not files.broken and (files.ending(".bin") or files.ending(".safetensors")):
        verdict.note("not judged: the tensors' names, these files do not tell them without loading")


def _loaded(case: Case) -> Optional[FrozenSet[str]]:
    """Names of the tensors in those files that the server loads; None when unknown."""
    files = case.asked.files
    if files is None:
        return None
    if case.old and case.flash and case.asked.shards == 1:
        return files.bins
    return files.safetensors if files.ending(".safetensors") else files.bins


def _bloom_old(case: Case, found: Optional[FrozenSet[str]], verdict: Verdict) -> None:
    """S/models/bloom.py@v0.8.2: shards take the head from a tensor named exactly word_embeddings.weight, or lm_head.weight."""
    files = case.asked.files
    if found is None or files is None:
        return
    bare, head = "word_embeddings.weight" in found, "lm_head.weight" in found
    if case.asked.shards == 1:
        if bare and head:
            verdict.refuse(
                "lm_head.weight beside keys without the prefix transformer.: the transformers in %s refuses such files: %s"
                % (case.title, case.export("tgi-0.8"))
            )
        return
    converted = not files.ending(".safetensors") and case.sizes.tied is not False  # conversion drops a shared lm_head
    if not bare and (not head or converted):
        why = "there is no lm_head.weight, and the embedding has the prefix transformer."
        why = "converting *.bin to safetensors drops a tied lm_head.weight" if head else why
        verdict.refuse("shards of %s find no head: %s: %s" % (case.title, why, case.export("tgi-0.8")))
    if bare and case.sizes.tied is False and files.same_head is not True:
        verdict.refuse(
            "shards of %s take word_embeddings.weight for the head, and this model has its own: %s"
            % (case.title, case.export("tgi-0.8"))
        )


def _bloom_new(case: Case, found: Optional[FrozenSet[str]], verdict: Verdict) -> None:
    """2.2 to 3.3.7: S/models/causal_lm.py:560-568 and S/utils/weights.py:177-192, bloom_modeling.py:823-827@v3.3.7."""
    files = case.asked.files
    same = None if files is None else files.same_head
    if case.sizes.tied is False and same is not True:
        verdict.refuse(
            "%s takes the embedding for bloom's head, whatever the files hold, and this model has its own (tie_word_embeddings "
            "is false): use --version 0.8 (%s)" % (case.title, case.export("tgi-0.8"))
        )
    elif same is False:
        verdict.note("lm_head.weight in the files is not the embedding; config.json says tied, so the embedding is served")
    assert case.sizes.family is not None  # model_type is bloom
    prefix = case.sizes.family.facts.tgi_bare_prefix
    if found is not None and any(name.startswith(prefix) for name in found):
        verdict.refuse("the tensors' names begin with %s, and %s finds bloom's without that prefix only: %s" % (
            prefix, case.title, case.export("tgi-3")))  # fmt: skip


def _bloom_vllm(case: Case, found: Optional[FrozenSet[str]], verdict: Verdict) -> None:
    """vllm/model_executor/models/bloom.py: lm_head.weight is skipped; one that is not tied would keep its random start."""
    if case.sizes.tied is False:
        verdict.refuse(
            "%s does not load bloom's lm_head.weight, and config.json says that the head is not the embedding: use --engine tgi "
            "--version 0.8, or, if they are equal, %s" % (case.title, case.export("vllm"))
        )
