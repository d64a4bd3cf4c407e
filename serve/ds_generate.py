"""Offline generation by DeepSpeed's inference engine, tensor parallel: each rank holds 1/N of every block's matrices.

    deepspeed --num_gpus N --module serve.ds_generate --model DIR --prompts FILE [--max-new-tokens 128]
    torchrun --nproc_per_node N -m serve.ds_generate --model DIR --prompt TEXT

Greedy, so the texts are those of transformers' generate(do_sample=False). Rank 0 writes one JSON object per prompt to stdout, in
their order: {"prompt", "text", "ids", "tokens", "tokens_per_s"}; "tokens_per_s" counts all new tokens of the prompt's batch.
Everything else goes to stderr (but the deepspeed launcher writes lines of its own, "[date] ...", to stdout). Exit 2: what was asked
for is wrong, in one line; 1: it failed.
"""

import argparse
import json
import os
import sys
import time
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, TextIO, Tuple

from pipeline_train import compat, families
from pipeline_train.errors import UserError
from pipeline_train.leaving import leave

from .ds_prompts import Prompt, encode, read_prompts

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MOST_RANKS = 64  # of those that a message lists
HOLD_S = 10.0  # for rank 0 to say what is wrong


class Ranks(NamedTuple):
    """This process among the others, from the launcher's environment; ``cuda``: a GPU each."""

    rank: int
    local: int
    world: int
    cuda: bool


def main(argv: Optional[List[str]] = None) -> int:
    args, ranks = _arguments(argv), _ranks()
    sys.stdout.flush()
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # DeepSpeed writes to stdout
    try:
        run(args, ranks, answer)
    except UserError as error:
        if ranks.rank > 0:  # which has found the same; the launcher ends all ranks as soon as one has ended
            time.sleep(HOLD_S)
        print("serve.ds_generate: %s" % error, file=sys.stderr)
        return 2
    finally:
        sys.stdout.flush()
        os.dup2(answer.fileno(), 1)
        answer.close()
    return 0


def run(args: argparse.Namespace, ranks: Ranks, answer: TextIO) -> None:
    """Check everything that can be wrong, then load, cut, generate. Raises UserError before any weight is read."""
    config = families.read_config(args.model)
    dims = families.dims_of(config)
    check_ranks(dims, ranks.world)
    dtype = dtype_of(args.dtype, config, ranks.cuda)
    texts = read_prompts(args.prompt, args.prompts)
    for name, value in (("--max-new-tokens", args.max_new_tokens), ("--batch", args.batch)):
        if value < 1:
            raise UserError("%s %d: at least 1 is needed" % (name, value))
    tokenizer = load_tokenizer(args.model)
    prompts = encode(tokenizer, texts, args.max_new_tokens, dims)
    longest = max(len(prompt.ids) for prompt in prompts) + args.max_new_tokens
    engine, share = load(args.model, dims, dtype, ranks, longest)
    stops = _stop_ids(engine.module)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops, default=0)
    generate(engine, prompts[: args.batch], min(2, args.max_new_tokens), pad, ranks)  # the first call also sets things up
    total, seconds = 0, 0.0
    for first in range(0, len(prompts), args.batch):
        batch = prompts[first : first + args.batch]
        began = time.perf_counter()
        rows = [cut(row, stops) for row in generate(engine, batch, args.max_new_tokens, pad, ranks)]
        spent = time.perf_counter() - began
        new = sum(len(row) for row in rows)
        total, seconds = total + new, seconds + spent
        if ranks.rank == 0:
            for line in lines(tokenizer, batch, rows, new / spent):
                answer.write(line + "\n")
            answer.flush()
    if ranks.rank == 0:
        say = "serve.ds_generate: %d tokens in %.2f s, %.1f tokens/s; ranks: %d, each with %.0f %% of the weights in %s"
        print(say % (total, seconds, total / seconds, ranks.world, 100 * share, dtype), file=sys.stderr)


def check_ranks(dims: families.Dims, world: int) -> None:
    """Every rank takes the same number of heads, of key-value heads and of the feed-forward's columns. Raises UserError."""
    parts = (("heads", dims.heads), ("key-value heads", dims.kv_heads), ("feed-forward columns", dims.ffn))
    for name, number in parts:
        if number % world:
            fits = [n for n in range(1, MOST_RANKS + 1) if all(number % n == 0 for _, number in parts)]
            raise UserError(
                "%d ranks cannot share this model's %d %s evenly; take one of these numbers of ranks: %s"
                % (world, number, name, ", ".join(str(n) for n in fits))
            )


def dtype_of(wanted: Optional[str], config: Dict[str, Any], cuda: bool) -> str:
    """ "fp32", "bf16" or "fp16": what was asked for, else the model's own (on a CPU fp32). Raises UserError."""
    names = {name: short for short, name in DTYPES.items()}
    own = names.get(str(config.get("torch_dtype", config.get("dtype"))), "fp32")
    dtype = wanted or (own if cuda else "fp32")
    version = compat.versions()["deepspeed"]
    if dtype == "bf16" and not compat.has_bf16(version):
        raise UserError("bf16 is not known to the inference engine of deepspeed %s; give --dtype fp16 or fp32" % version)
    if dtype == "fp16" and not cuda:
        raise UserError("--dtype fp16: needs a GPU, and none is here; give --dtype fp32")
    return dtype


def load_tokenizer(folder: str) -> Any:
    """The folder's tokenizer. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - the many ways of a folder without a tokenizer
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError("%s: its tokenizer cannot be loaded: %s" % (folder, reason)) from None


def load(folder: str, dims: families.Dims, dtype: str, ranks: Ranks, longest: int) -> Tuple[Any, float]:
    """-> DeepSpeed's inference engine around transformers' model, ``ranks.world`` ways; the share of the weights that this rank
    holds. ``longest``: tokens of a prompt and its answer. Raises UserError when there are no weights."""
    import torch

    if ranks.cuda:
        torch.cuda.set_device(ranks.local)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM

    if not ranks.cuda:
        compat.quiet_cpu_ops()
    if ranks.world > 1:
        deepspeed.init_distributed("nccl" if ranks.cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    config = AutoConfig.from_pretrained(folder)
    name = "dtype" if hasattr(config, "dtype") else "torch_dtype"
    number = getattr(torch, DTYPES[dtype])
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, **{name: number})
    except OSError as error:
        raise UserError("%s: its weights cannot be loaded: %s" % (folder, str(error).strip().splitlines()[0])) from None
    more = {"injection_policy": _policy(model)} if dims.family == "llama" else {}
    whole = _elements(model)
    engine = deepspeed.init_inference(
        model.eval(), tensor_parallel={"tp_size": ranks.world}, dtype=number, replace_with_kernel_inject=False,
        max_out_tokens=max(1024, longest), **more
    )  # fmt: skip
    return engine, _elements(engine.module) / whole


def _elements(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _policy(model: Any) -> Dict[Any, Tuple[str, ...]]:
    """llama's: the two matrices of a block whose products are summed over the ranks. 0.9.2 does not find them by itself; bloom's it
    does, and replaces its ALiBi then only."""
    return {type(model.model.layers[0]): ("self_attn.o_proj", "mlp.down_proj")}


def generate(engine: Any, batch: List[Prompt], new: int, pad: int, ranks: Ranks) -> List[List[int]]:
    """The new tokens of each prompt, with whatever follows the end of its answer. All ranks call it together."""
    import torch

    width = max(len(prompt.ids) for prompt in batch)
    rows = [[pad] * (width - len(prompt.ids)) + prompt.ids for prompt in batch]
    masks = [[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in batch]
    device = "cuda" if ranks.cuda else "cpu"
    with torch.no_grad():
        out = engine.generate(
            input_ids=torch.tensor(rows, device=device), attention_mask=torch.tensor(masks, device=device),
            max_new_tokens=new, do_sample=False, num_beams=1, pad_token_id=pad,
        )  # fmt: skip
    return [[int(token) for token in row] for row in out[:, width:].tolist()]


def cut(row: List[int], stops: List[int]) -> List[int]:
    """The row up to its first end of sequence, which belongs to it."""
    for place, token in enumerate(row):
        if token in stops:
            return row[: place + 1]
    return row


def lines(tokenizer: Any, batch: List[Prompt], rows: List[List[int]], rate: float) -> Iterator[str]:
    for prompt, row in zip(batch, rows):
        document = {
            "prompt": prompt.text, "text": tokenizer.decode(row, skip_special_tokens=True), "ids": row, "tokens": len(row),
            "tokens_per_s": round(rate, 2),
        }  # fmt: skip
        yield json.dumps(document, ensure_ascii=False)


def _stop_ids(model: Any) -> List[int]:
    """What ends an answer: generation_config.json's, else config.json's, as transformers' generate reads them."""
    stops = model.generation_config.eos_token_id
    return [] if stops is None else [int(stop) for stop in (stops if isinstance(stops, (list, tuple)) else [stops])]


def _ranks() -> Ranks:
    import torch

    rank, local, world = (int(os.environ.get(name, first)) for name, first in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    return Ranks(rank, local, world, torch.cuda.is_available())


def _arguments(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="serve.ds_generate", description="greedy generation, tensor parallel by DeepSpeed")
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder of a bloom or llama, with its tokenizer")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help='one prompt a line, or .jsonl of {"prompt": ...}; - is stdin')
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="prompts generated together; default 16")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: the model's own; fp32 on a CPU")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher gives it
    return parser.parse_args(argv)


if __name__ == "__main__":
    leave(main())
