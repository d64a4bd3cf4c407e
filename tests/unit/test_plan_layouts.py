"""What ``plan`` says of other ways to share the same GPUs between stages and replicas."""

import re
from typing import NamedTuple, Optional

import pytest

from bench import shapes
from pipeline_train.plan import plan

LLAMA_7B = shapes.model_of("llama-7b")
SAID = re.compile(
    r"(?P<pipe>\d+) stages? x (?P<data>\d+) replicas?, as many rows a step, would fit(?: and be (?P<times>[\d.]+) times as fast)?: "
    r"about (?P<speed>\d+) tokens/s \((?P<how>.+)\)"
)


class Said(NamedTuple):
    pipe: int
    data: int
    times: Optional[float]  # None: what was planned does not fit
    speed: int
    how: str


def said(found):
    """What the note about another layout says; None without one."""
    notes = [match.groupdict() for match in map(SAID.fullmatch, found["notes"]) if match]
    assert len(notes) <= 1
    for note in notes:
        times = note["times"] and float(note["times"])
        return Said(int(note["pipe"]), int(note["data"]), times, int(note["speed"]), note["how"])
    return None


@pytest.mark.parametrize("wish", [
    {"gpu": "a100-80g", "gpus": 8, "micro_batches": 32}, {"gpu": "v100-32g", "gpus": 8, "recompute": "blocks"},
    {"gpu": "h200", "gpus": 2, "data": 2, "link": "eth10"}, {"gpu": "h200", "gpus": 4, "micro": 4, "compile": True},
])  # fmt: skip
def test_a_faster_way_is_told_and_is_what_it_says(wish):
    found = plan(LLAMA_7B, **wish)
    better = said(found)
    gpus, data, batches = re.fullmatch(r"--gpus (\d+) --data (\d+) --micro-batches (\d+)", better.how).groups()
    assert int(gpus) == found["gpus"] == better.pipe * better.data and int(data) == better.data
    assert int(batches) * better.data == found["micro_batches"] * found["data"]
    other = plan(LLAMA_7B, **dict(wish, data=better.data, micro_batches=int(batches)))
    assert other["fits"] and other["pipe"] == better.pipe and round(other["tokens_per_s"]) == better.speed
    assert better.times == pytest.approx(other["tokens_per_s"] / found["tokens_per_s"], abs=0.006) and better.times >= 1.05
    assert said(other) is None


@pytest.mark.parametrize("wish", [
    {"gpu": "h200", "gpus": 2, "micro": 4, "micro_batches": 32, "compile": True},  # 3 % faster
    {"gpu": "h200", "gpus": 2, "link": "eth10"},  # slower
    {"gpu": "a100-80g", "gpus": 8, "micro_batches": 31},  # a step's rows cannot be shared by 2, 4, 8
    {"gpu": "a100-80g", "gpus": 7},
    {"gpu": "a100-40g", "gpus": 4, "recompute": "blocks", "micro_batches": 8},  # would not fit
])  # fmt: skip
def test_nothing_is_told_where_there_is_nothing_better(wish):
    found = plan(LLAMA_7B, **wish)
    assert found["fits"] and said(found) is None


def test_what_does_not_fit_may_if_shared_otherwise():
    found = plan(shapes.model_of("llama-13b"), gpu="a100-80g", gpus=8, data=8)
    assert not found["fits"] and said(found)[:3] == (2, 4, None)
    assert said(plan(shapes.model_of("llama-65b"), gpu="a100-80g", gpus=8, data=8)) is None  # in no way


def test_what_less_would_make_it_fit():
    """One thing where that is enough, else two; nothing where nothing is."""

    def notes(name, **wish):
        found = plan(shapes.model_of(name), **wish)
        assert not found["fits"]
        return [note for note in found["notes"] if note.endswith(" it would fit")]

    assert notes("llama-7b", gpu="l40s", gpus=2) == ["with --offload it would fit"]
    assert notes("llama-7b", gpu="h100-80g", gpus=2, micro=8) == ["with --recompute blocks it would fit"]
    assert notes("llama-7b", gpu="l40s", gpus=2, micro=4) == ["with --recompute blocks and --offload it would fit"]
    assert notes("llama-7b", gpu="l40s", gpus=2, micro=4, from_file=True) == [
        "with parallel.recompute: blocks and parallel.offload: true it would fit"
    ]
    assert plan(LLAMA_7B, gpu="l40s", gpus=2, micro=4, recompute="blocks", offload=True)["fits"]
    assert notes("llama-7b", gpu="4090", gpus=2) == []


def test_it_is_said_in_the_words_of_who_asked():
    wish = {"gpu": "a100-80g", "gpus": 8, "micro_batches": 32}
    own = [4, 4, 4, 5, 5, 4, 4, 4]
    assert said(plan(LLAMA_7B, **wish)).how == "--gpus 8 --data 8 --micro-batches 4"
    assert said(plan(LLAMA_7B, parts=own, **wish)).how == "--gpus 8 --data 8 --micro-batches 4, without --parts"
    assert said(plan(LLAMA_7B, from_file=True, **wish)).how == "parallel.pipe: 1, parallel.data: 8"
    assert said(plan(LLAMA_7B, parts=own, from_file=True, **wish)).how == "parallel.pipe: 1, parallel.data: 8, parallel.parts: auto"
