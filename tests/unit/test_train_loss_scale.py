"""When fp16 overflows end a run; what DeepSpeed does at each of them is in tests/integration/test_train_trouble.py."""

import pytest

from pipeline_train.config_schema import LossScale
from pipeline_train.errors import RunFailed
from pipeline_train.loss_scale import OverflowLimit


def test_some_overflows_in_a_row_are_normal_and_a_good_step_forgets_them():
    limit = OverflowLimit(LossScale(max_overflows=3))
    for step in range(1, 40):
        limit.after(step, step % 3 != 0, 1024.0, "a.jsonl:1")


def test_too_many_in_a_row_end_the_run():
    limit = OverflowLimit(LossScale(max_overflows=3))
    limit.after(7, True, 1024.0, "")
    limit.after(8, True, 512.0, "")
    with pytest.raises(RunFailed) as error:
        limit.after(9, True, 256.0, "a.jsonl:1, a.jsonl:5")
    assert str(error.value) == (
        "step 9: 3 fp16 overflows in a row (optim.loss_scale.max_overflows), the loss scale is 256. Lower optim.lr, train in bf16, "
        "or look at its samples: a.jsonl:1, a.jsonl:5"
    )


def test_an_overflow_at_the_smallest_scale_ends_the_run():
    limit = OverflowLimit(LossScale(min=0.5))
    limit.after(1, True, 1.0, "")
    limit.after(2, False, 0.5, "")
    with pytest.raises(RunFailed) as error:
        limit.after(3, True, 0.5, "a.jsonl:2")
    assert str(error.value) == (
        "step 3: the gradient overflows fp16 at the smallest loss scale (optim.loss_scale.min: 0.5). Lower optim.lr or "
        "optim.loss_scale.min, train in bf16, or look at its samples: a.jsonl:2"
    )
