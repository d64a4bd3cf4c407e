"""Rules about the model's shape, the cards and the driver. Each appends to the verdict. Standard library only."""

from . import gpus, split
from .case import Case
from .question import Verdict

KERNEL_LIMIT = 4096  # 0.8's fused bloom kernel asserts a shorter sequence (its transformers fork, modeling_bloom.py:334-336)
OLD_COMPUTES = (
    ("rope_theta", 10000.0),
    ("rope_scaling", None),
    ("attn_bias", False),
    ("mlp_bias", False),
)  # of 0.8, whatever is said


def shards(case: Case, verdict: Verdict) -> None:
    asked = case.asked.shards
    if asked < 1:
        verdict.refuse("--num-shard %d: expected 1 or more" % asked)
        return
    if case.asked.gpus is not None and asked > case.asked.gpus:
        verdict.refuse("--num-shard %d: there are %d GPUs here; use one of %s" % (asked, case.asked.gpus, case.valid_shards()))
    if asked > 1 and not case.shardable():
        verdict.refuse(_not_shardable(case))
    wrong = split.divides(case.engine, case.sizes, asked)
    if wrong:
        verdict.refuse("--num-shard %d does not divide %s: use one of %s" % (asked, ", ".join(wrong), case.valid_shards()))


def _not_shardable(case: Case) -> str:
    kind = case.sizes.model_type or "this model_type"
    if case.card.flash(case.engine):
        return "%s does not shard %s: use --num-shard 1, or --version 3.3" % (case.title, kind)
    needed = "7.5, 8.x or 9.0" if case.old else "7.5 or newer"
    where = "without a GPU" if case.card.cpu else "on a %s" % case.card.name
    return (
        "%s shards %s through flash attention only, and there is none %s (compute capability %s has it): use --num-shard 1, which "
        "is slow (padded batches), or another card" % (case.title, kind, where, needed)
    )


def cards(case: Case, verdict: Verdict) -> None:
    card = case.card
    if not card.known:
        verdict.note("not judged: the card (name it with --gpu)")
        return
    verdict.reasons += gpus.has_code(case.engine, card)
    if card.cpu and case.engine.name == "vllm":
        verdict.refuse("%s: this image needs a GPU: use --engine embedded" % case.title)
    if card.known and not card.cpu and card.capability == (7, 0) and not case.old:
        verdict.note(
            "%s on a %s: not sure to run; torch's builds for CUDA 12.8 are reported to have no code for compute capability 7.0%s"
            % (case.title, card.name, "" if case.engine.name == "vllm" else ". --version 0.8 has it")
        )


def drivers(case: Case, verdict: Verdict) -> None:
    if case.card.cpu:
        return
    verdict.reasons += gpus.driver_too_old(case.engine, case.asked.driver)
    verdict.notes += gpus.driver_note(case.engine, case.asked.driver)
    if case.asked.driver is None:
        verdict.note("not judged: the driver (name it with --driver); %s needs %s or newer for CUDA %s" % (
            case.title, gpus.DRIVERS[int(case.engine.cuda.split(".")[0])], case.engine.cuda))  # fmt: skip


def dtypes(case: Case, verdict: Verdict) -> None:
    wish, card = case.dtype, case.card
    only = "fp32" if card.cpu else "fp16"  # of 0.8
    if case.old and wish not in (None, only):
        verdict.refuse("--dtype %s: %s has no such choice, it computes in %s: leave it out, or use --version 3.3" % (
            case.asked.dtype, case.title, only))  # fmt: skip
    elif case.engine.name == "tgi" and wish == "fp32" and not card.cpu:
        verdict.refuse("--dtype fp32: %s computes in fp16 or bf16 on a GPU: leave it out" % case.title)
    elif wish == "bf16" and not card.bf16:
        verdict.refuse("--dtype bf16: a %s does not compute in bf16 (compute capability %d.%d, it needs 8.0): use fp16" % (
            (card.name,) + card.capability))  # fmt: skip
    if wish is None and case.sizes.dtype == "bf16" and not card.cpu:
        _bf16_weights(case, verdict)


def _bf16_weights(case: Case, verdict: Verdict) -> None:
    """A model in bf16 about which the user said nothing: fp16 has a smaller range, and a large activation becomes infinite."""
    if case.engine.name == "vllm":
        if not case.card.bf16:
            verdict.flags += ["--dtype", "float16"]
            verdict.note("the weights are bf16, which a %s does not compute in: served in fp16" % case.card.name)
    elif case.old or not case.card.bf16:
        verdict.note("the weights are bf16; %s serves them in fp16%s" % (
            case.title, "" if case.old else ", all that a %s computes in" % case.card.name))  # fmt: skip
    else:
        verdict.note("the weights are bf16; %s serves them in fp16 unless --dtype bfloat16 is given" % case.title)


def kernels(case: Case, verdict: Verdict) -> None:
    """TGI's custom kernel of bloom, and attention of llama on T4."""
    card, kind = case.card, case.sizes.model_type
    if case.engine.name != "tgi":
        return
    if kind == "bloom":
        reason = _without_kernel(case)
        if reason:
            verdict.flags.append("--disable-custom-kernels")
            verdict.note("--disable-custom-kernels: " + reason)
        elif case.old:
            verdict.note(
                "%s's kernel for bloom computes fewer than %d tokens; --max-total-tokens %d or more disables it"
                % (case.title, KERNEL_LIMIT, KERNEL_LIMIT)
            )
        return
    if case.flash and not case.old and card.known and card.capability == (7, 5):
        verdict.env["ATTENTION"] = "paged"
        verdict.note("ATTENTION=paged: flashinfer, %s's choice for this head size, is made for newer cards than a %s" % (
            case.title, card.name))  # fmt: skip
    if kind == "llama" and not case.flash:
        where = "without a GPU" if card.cpu else "on a %s" % card.name
        verdict.note("no flash attention %s: served through transformers in padded batches, which is slow%s" % (
            where, "" if card.cpu else "; give the container one GPU, or it is spread over all of them"))  # fmt: skip


def _without_kernel(case: Case) -> str:
    """Why bloom runs without its custom kernel, "" where it can have it."""
    if case.card.cpu:
        return "there is no GPU"
    if not case.old:
        return ""  # 3.3 leaves it out by itself where it does not fit (bloom_modeling.py:42-52,380@v3.3.7)
    if case.card.known and case.card.capability < (8, 0):
        return "%s's kernel for bloom is compiled for compute capability 8.0, a %s has %d.%d" % (
            (case.title, case.card.name) + case.card.capability)  # fmt: skip
    if (case.asked.max_total or 0) >= KERNEL_LIMIT:
        return "%s's kernel for bloom computes fewer than %d tokens" % (case.title, KERNEL_LIMIT)
    return ""


def arithmetic(case: Case, verdict: Verdict) -> None:
    """What a server would load and compute wrongly: 0.8's llama has no grouped queries and knows few of today's keys."""
    sizes, dims = case.sizes, case.sizes.dims
    if not case.old or sizes.model_type != "llama":
        return
    wrong = []
    if sizes.heads and sizes.kv_heads and sizes.heads != sizes.kv_heads:
        wrong.append("%d key-value heads for %d heads, it has no grouped queries" % (sizes.kv_heads, sizes.heads))
    if dims is not None:
        wrong += ["%s is %s, it computes with %s" % (key, getattr(dims, key), value)
                  for key, value in OLD_COMPUTES if getattr(dims, key) != value]  # fmt: skip
        if dims.q_size != dims.hidden:
            wrong.append("head_dim is %d, it computes %d" % (dims.head_dim, dims.hidden // dims.heads))
    elif case.asked.config.get("rope_scaling"):
        wrong.append("rope_scaling is %r, it computes without" % case.asked.config["rope_scaling"])
    for what in wrong:
        verdict.refuse("%s cannot compute this llama: %s. Use --version 3.3 or --engine vllm" % (case.title, what))


def unknown(case: Case, verdict: Verdict) -> None:
    """What is not judged of models that are not ours, or not as we know them."""
    sizes = case.sizes
    if not sizes.model_type:
        verdict.refuse("config.json: model_type: missing, every server needs it to know what to build")
    elif sizes.family is None:
        verdict.note(
            "not judged: whether %s knows model_type %r, its tensors and its key-value heads; heads, files, driver and what can be "
            "known of memory are" % (case.title, sizes.model_type)
        )
    elif sizes.dims is None:
        verdict.note("not judged: what the server makes of a key that our own blocks do not compute (%s)" % sizes.refused)
    if sizes.heads is None:
        verdict.note("not judged: the number of shards, config.json names no attention heads")
    if sizes.quantized:
        verdict.note("not judged: the quantization that config.json names")
