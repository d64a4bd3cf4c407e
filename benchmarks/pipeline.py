"""How close a step is to what 1F1B allows: measured pipelined time against sum(t) + (M - 1) max(t), t: a stage's own time for a
micro-batch, forward and backward.

    python benchmarks/pipeline.py --output rows.json       # two processes that compute, a thread each; four that sleep

Stages that sleep stand for machines that one with few cores has not: each forward pass takes FORWARD_S more, a backward pass twice
as much, and what is left is our own and DeepSpeed's part.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import ours, shapes, train  # noqa: E402
from bench.rows import drawn  # noqa: E402
from bench.task import Case  # noqa: E402
from pipeline_train.report.schedule import bound  # noqa: E402

FORWARD_S = 0.05


class Sleeping(ours.Ours):
    """Our pipeline whose every forward and backward pass takes longer, and nothing but time."""

    def __init__(self, case, device):
        super().__init__(case, device)
        import time

        def slow(do, seconds):
            def instruction(engine, *args, **kwargs):
                time.sleep(seconds)
                return do(engine, *args, **kwargs)

            return instruction

        from deepspeed.runtime.pipe import schedule

        plain = dict(type(self.pipe.engine)._INSTRUCTION_MAP)
        plain[schedule.ForwardPass] = slow(plain[schedule.ForwardPass], FORWARD_S)
        plain[schedule.BackwardPass] = slow(plain[schedule.BackwardPass], 2 * FORWARD_S)
        self.pipe.engine._INSTRUCTION_MAP = plain
        from pipeline_train.instructions import Watched

        self.pipe.watched = Watched(self.pipe.engine, self.pipe.watched.pulse, False, fp16=False)


def shown(name, row):
    if "error" in row:
        return dict(row, what=name)
    micro = row["micro_batches"]
    stages = [one["busy_s"] / micro for one in row["ranks"]]
    least, took = bound(stages, micro), max(one["span_s"] for one in row["ranks"])
    return {"what": name, "stages": len(stages), "micro_batches": micro, "stage_s": [round(s, 4) for s in stages],
            "bound_s": round(least, 4), "pipelined_s": round(took, 4), "of_bound": round(least / took, 4),
            "step_s": round(row["step_s"], 4), "busy_share": round(sum(stages) * micro / len(stages) / took, 4)}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model = shapes.model_of("llama-tiny")
    tiny = dict(model, hidden_size=32, intermediate_size=64, num_attention_heads=2, vocab_size=128, num_hidden_layers=6)
    case = Case("ours", model, 256, 2, 16, dtype="fp32", steps=3, documents=drawn(60, 256))
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = [shown("two stages that compute", train.measured(replace(case, pipe=2), False))]
    print(json.dumps(rows[-1]), flush=True)
    small = replace(case, model=tiny, seq=16, micro=1, documents=[])
    for stages, micro_batches in ((2, 16), (4, 8), (4, 32)):
        one = replace(small, engine="benchmarks.pipeline:Sleeping", pipe=stages, micro_batches=micro_batches)
        rows.append(shown("stages that sleep", train.measured(one, False)))
        print(json.dumps(rows[-1]), flush=True)
    if args.output:
        args.output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
