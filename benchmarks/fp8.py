"""Whether a run with run.fp8 learns what the same run in bf16 learns, on the user's own kind of data.

    python benchmarks/fp8.py --records alpaca.json                                              # on a GPU
    DS_ACCELERATOR=cpu python benchmarks/fp8.py --records alpaca.json --hidden 64 --blocks 2 --seq-len 128 --rows 2 --steps 20

Trains a random llama on the records three times: in bf16, with run.fp8, and in bf16 with another seed (other weights at the start,
another order). A tenth of the records is kept for evaluation. Prints a JSON row for each as it ends: losses, averaged over tenths
of the run, and evaluations; then how far fp8 is from bf16, beside how far the other seed is. Exit code 1 when fp8 is farther at
the end than --within.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline_train import metrics  # noqa: E402
from tests.tokenizers import tiny_tokenizer  # noqa: E402

SETS = {"bf16": [], "fp8": ["run.fp8=true"], "bf16, another seed": ["run.seed=43"]}  # type: Dict[str, List[str]]


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """Model, records and run.yaml."""
    records = json.loads(Path(args.records).read_text(encoding="utf-8"))
    kept = len(records) // 10
    for name, part in (("eval", records[:kept]), ("train", records[kept:])):
        (folder / (name + ".json")).write_text(json.dumps(part), encoding="utf-8")
    tiny_tokenizer(folder / "model", texts=[json.dumps(record, ensure_ascii=False) for record in records], vocab=args.vocab)
    heads = max(1, args.hidden // 128)
    model = {
        "model_type": "llama", "vocab_size": args.vocab, "hidden_size": args.hidden, "intermediate_size": args.hidden * 11 // 4,
        "num_hidden_layers": args.blocks, "num_attention_heads": heads, "num_key_value_heads": heads, "eos_token_id": 2,
        "max_position_embeddings": args.seq_len,
    }  # fmt: skip
    (folder / "model" / "config.json").write_text(json.dumps(model))
    run = {
        "run": {"out": "-", "self_test": False, "compile": args.compile},
        "model": {"path": str(folder / "model"), "init": "random", "dtype": "bf16"},
        "data": {"train": str(folder / "train.json"), "eval": str(folder / "eval.json"), "seq_len": args.seq_len},
        "parallel": {"pipe": 1}, "batch": {"micro": args.rows, "global": 4 * args.rows},
        "optim": {"lr": args.rate, "warmup": max(1, args.steps // 20)},
        "train": {"max_steps": args.steps, "epochs": 1000, "eval_every": max(1, args.steps // 2)},
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(run))


def trained(folder: Path, name: str) -> Dict[str, Any]:
    out = folder / name
    command = [
        sys.executable,
        str(ROOT / "pipedock.py"),
        "train",
        "--config",
        str(folder / "run.yaml"),
        "--set",
        "run.out=%s" % out,
    ]
    for item in SETS[name]:
        command += ["--set", item]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit("%s: %s" % (name, done.stderr.strip()[-2000:]))
    lines = metrics.read(out / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "step"]
    tenth = max(1, len(steps) // 10)
    means = [
        sum(line["loss"] for line in steps[at : at + tenth]) / len(steps[at : at + tenth]) for at in range(0, len(steps), tenth)
    ]
    later = sorted(line["step_s"] for line in steps[len(steps) // 2 :])
    row = {
        "run": name, "losses": [round(mean, 5) for mean in means],
        "eval": [round(line["loss"], 5) for line in lines if line["kind"] == "eval"],
        "step_s": round(later[len(later) // 2], 4), "gib": max(max(line["mem_gib"]) for line in steps),
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--records", required=True, help="a JSON list of records that pipedock trains on")
    sizes = {"hidden": 1024, "blocks": 8, "seq-len": 1024, "rows": 4, "steps": 100, "vocab": 9472}
    for name, usual in sizes.items():
        parser.add_argument("--" + name, type=int, default=usual)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--within", type=float, default=0.02, help="of bf16's loss over the last tenth, and of its last evaluation")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), args)
        rows = {mode: trained(Path(name), mode) for mode in SETS}
    far = {mode: {key: round(rows[mode][key][-1] / rows["bf16"][key][-1] - 1, 5) for key in ("losses", "eval")} for mode in rows}
    print(json.dumps(dict({key: value for key, value in vars(args).items() if key != "records"}, apart=far)))
    return int(any(abs(apart) > args.within for apart in far["fp8"].values()))


if __name__ == "__main__":
    sys.exit(main())
