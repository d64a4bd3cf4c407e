"""Rules about memory and lengths: what fits, and the flags that keep a server within it. Standard library only."""

from typing import Any, Dict, Optional

from . import memory, split
from .case import LEAST, Case
from .question import Verdict
from .shapes import KERNEL_LIMIT

OLD_INPUT, OLD_TOTAL, OLD_BATCH = 1000, 1512, 32000  # 0.8's defaults (L:42-235@v0.8.2)
PREFILL, BATCH = 4096, 16000  # 3.3's, of models without flash attention (L, backends/v3/src/lib.rs@v3.3.7)


def lengths(case: Case, verdict: Verdict) -> None:
    """The user's limits against each other and against the model's positions."""
    longest, total, positions = case.asked.max_input, case.asked.max_total, case.sizes.positions
    if longest is not None and total is not None and longest >= total:
        verdict.refuse("--max-input-tokens %d must be less than --max-total-tokens %d" % (longest, total))
    if total is None or positions is None or total <= positions:
        return
    if case.engine.name == "vllm" and case.sizes.model_type != "bloom":
        verdict.refuse("--max-total-tokens %d: the model has %d positions, and %s refuses more: use at most %d" % (
            total, positions, case.title, positions))  # fmt: skip
    elif case.engine.name == "tgi":
        verdict.note("--max-total-tokens %d: the model was made for %d positions, answers beyond are not to be trusted" % (
            total, positions))  # fmt: skip


def room(case: Case, verdict: Verdict) -> None:
    """Whether the weights fit, what is left, and the flags that follow."""
    if not case.card.known or case.card.cpu or case.asked.shards < 1:
        return
    fraction, found = _capacity(case)
    if found is None:
        verdict.note("not judged: memory, nothing here says how large the model is")
        return
    if found["max_context"] < LEAST:
        verdict.capacity = dict(found, fitting_context=0, max_context=0, max_batch_tokens=0)
        verdict.refuse(_too_large(case, found))
        return
    custom = case.old and case.sizes.model_type == "bloom" and "--disable-custom-kernels" not in verdict.flags
    if custom:
        found["max_context"] = min(found["max_context"], KERNEL_LIMIT - 1)
    verdict.capacity = found
    total = case.asked.max_total
    if total is not None and total > found["fitting_context"]:
        verdict.refuse(
            "--max-total-tokens %d: beside the weights %s holds one request of about %d tokens: use at most that%s"
            % (total, case.card.a, found["fitting_context"], _more_shards(case, total))
        )
    longest = case.asked.max_input
    positions = case.sizes.positions
    if total is None and longest is not None and positions is not None and longest >= positions:
        verdict.refuse("--max-input-tokens %d: the model has positions for %d tokens, prompt and answer: use less" % (
            longest, positions))  # fmt: skip
    elif total is None and longest is not None and longest >= found["max_context"]:
        verdict.refuse("--max-input-tokens %d: beside the weights %s holds one request of about %d tokens: use less%s" % (
            longest, case.card.a, found["max_context"], _more_shards(case, longest + 1)))  # fmt: skip
    _flags(case, verdict, found, fraction)


def _capacity(case: Case) -> Any:
    """-> (what vLLM must be told to use, None for its default; capacity or None)."""
    load = case.load(case.asked.shards)
    found = memory.capacity(load, case.card)
    if case.engine.name == "vllm" and found is not None and found["max_context"] < min(case.sizes.positions or 2048, 1024):
        tight = memory.capacity(load, case.card, memory.TIGHT)
        if tight is not None and tight["max_context"] >= LEAST:
            return memory.TIGHT, tight
    return None, found


def _too_large(case: Case, found: Dict[str, Any]) -> str:
    what = "%.1f GiB of weights (%s) on each of %d GPU%s: %s has room for %.1f GiB" % (
        found["weights_gib_per_gpu"], case.computes, case.asked.shards, "" if case.asked.shards == 1 else "s", case.card.a,
        found["usable_gib"])  # fmt: skip
    return what + (_more_shards(case, LEAST) or ": use a card with more memory")


def _more_shards(case: Case, tokens: int) -> str:
    """ ": use --num-shard 4" for the least number that holds a request of so many tokens; "" when none does."""
    for shards in split.valid(case.engine, case.sizes):
        if shards <= case.asked.shards or not case.shardable() or shards > (case.asked.gpus or shards):
            continue
        if case.fits(shards, tokens):
            return ", or --num-shard %d" % shards if tokens > LEAST else ": use --num-shard %d" % shards
    return ""


def _flags(case: Case, verdict: Verdict, found: Dict[str, Any], fraction: Optional[float]) -> None:
    if case.engine.name == "vllm":
        _vllm_flags(case, verdict, found, fraction)
    elif case.old:
        _old_flags(case, verdict, found)
    elif case.padded:
        _padded_flags(case, verdict, found)


def _vllm_flags(case: Case, verdict: Verdict, found: Dict[str, Any], fraction: Optional[float]) -> None:
    """vLLM ends at once when its cache cannot hold one request of the model's full length."""
    if fraction is not None:
        verdict.flags += ["--gpu-memory-utilization", "%.2f" % fraction]
    own = case.sizes.positions or case.asked.config.get("seq_length") or 2048  # what it takes for a model that names none
    if case.asked.max_total is None and found["max_batch_tokens"] < own:
        verdict.flags += ["--max-model-len", str(found["max_batch_tokens"] // LEAST * LEAST)]
    if case.sizes.model_type == "bloom" and (case.asked.max_total or 0) > own:
        verdict.env["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"  # ALiBi has no last position; the file names a training length


def _old_flags(case: Case, verdict: Verdict, found: Dict[str, Any]) -> None:
    """0.8 believes its own defaults: 32000 tokens of a batch, whatever the card holds."""
    context, batch, given, longest = found["max_context"], found["max_batch_tokens"], case.asked.max_total, case.asked.max_input
    if given is None and longest is not None:
        given = max(OLD_TOTAL, longest + OLD_TOTAL - OLD_INPUT)  # what serve makes of it
    if given is None and context < OLD_TOTAL:
        verdict.flags += ["--max-total-tokens", str(context), "--max-input-length", str(min(OLD_INPUT, context * 2 // 3))]
    elif given is None:
        verdict.note("without --max-input-tokens and --max-total-tokens %s takes prompts of %d tokens and requests of %d" % (
            case.title, OLD_INPUT, OLD_TOTAL))  # fmt: skip
    if batch < OLD_BATCH and (given or 0) <= OLD_BATCH:
        verdict.flags += ["--max-batch-total-tokens", str(max(batch, given or 0))]


def _padded_flags(case: Case, verdict: Verdict, found: Dict[str, Any]) -> None:
    """3.3 computes a prompt of --max-batch-prefill-tokens before it answers: what does not fit ends it."""
    asked, context, batch = case.asked, found["max_context"], found["max_batch_tokens"]
    longest = asked.max_input or (asked.max_total or 1) - 1  # of the prompts that the user wants
    prefill = max(longest, min(PREFILL, context))
    if not longest:
        verdict.note("without --max-total-tokens %s takes requests of %d tokens of this model" % (case.title, prefill))
    if prefill < PREFILL:
        verdict.flags += ["--max-batch-prefill-tokens", str(prefill)]
    if batch < BATCH:
        verdict.flags += ["--max-batch-total-tokens", str(max(batch, prefill, asked.max_total or 0))]
