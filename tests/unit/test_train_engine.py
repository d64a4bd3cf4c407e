"""The schedule, the DeepSpeed dict, the optimizer groups: what can be checked without starting a pipeline."""

import pytest

pytest.importorskip("deepspeed")
from pipeline_train import config, engine, loop, optimizer  # noqa: E402
from pipeline_train.metrics import Metrics, read  # noqa: E402
from pipeline_train.plan.cards import peak_flops  # noqa: E402


def run(**sections):
    raw = {"run": {"out": "o"}, "model": {"path": "m", "dtype": "fp32"}, "data": {"train": "t"}, "parallel": {"pipe": 2}}
    for name, section in sections.items():
        raw[name] = dict(raw.get(name, {}), **section)
    return config.parse(raw)


@pytest.mark.parametrize("schedule, middle, last", [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)])
def test_schedules(schedule, middle, last):
    optim = run(optim={"lr": 2.0, "schedule": schedule, "warmup": 10, "floor": 0.1}).optim
    rate = [optimizer.learning_rate(optim, step, 110) for step in range(111)]
    assert rate[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rate[10] == 2.0 and rate[60] == pytest.approx(2.0 * middle) and rate[110] == pytest.approx(2.0 * last)
    assert all(a >= b for a, b in zip(rate[10:], rate[11:]))


def test_the_deepspeed_dict_has_zero_1_and_clipping_whatever_the_user_says():
    made = engine.deepspeed_config(run(), cuda=False)
    assert made["zero_optimization"]["stage"] == 1 and made["gradient_clipping"] == 1.0
    assert (made["train_batch_size"], made["gradient_accumulation_steps"], made["train_micro_batch_size_per_gpu"]) == (8, 8, 1)
    assert not {"fp16", "bf16", "optimizer"} & set(made)


def test_the_users_section_is_merged_key_by_key():
    made = engine.deepspeed_config(
        run(deepspeed={"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True}), False
    )
    assert made["zero_optimization"]["reduce_bucket_size"] == 7 and made["zero_optimization"]["stage"] == 1
    assert made["wall_clock_breakdown"] is True


def test_dtypes():
    fp16 = run(model={"dtype": "fp16"}, optim={"loss_scale": {"initial": 4096, "window": 5, "hysteresis": 3, "min": 2.0}})
    assert engine.deepspeed_config(fp16, True)["fp16"] == {
        "enabled": True, "loss_scale": 0, "initial_scale_power": 12, "loss_scale_window": 5, "hysteresis": 3, "min_loss_scale": 2.0,
    }  # fmt: skip
    bf16 = engine.deepspeed_config(run(model={"dtype": "bf16"}), True)
    assert bf16["bf16"] == {"enabled": True} and bf16["data_types"] == {"grad_accum_dtype": "fp32"}


def test_offload_takes_any_optimizer():
    made = engine.deepspeed_config(run(parallel={"offload": True}, optim={"type": "lion", "lr": 1e-4}), True)
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert made["zero_force_ds_cpu_optimizer"] is False and "optimizer" not in made


def test_a_step_is_cut_into_the_micro_batches_of_each_replica():
    from tests.integration.pipeline_rank import make_rows

    rows = make_rows(0, 8, 24, 99)
    seen = []
    for replica in range(2):
        batches = list(loop.micro_batches(rows, 2, replica, 2))
        assert len(batches) == 2
        for (ids, positions, segments), targets in batches:
            assert ids.shape == positions.shape == segments.shape == targets.shape == (2, 24)
            seen += [tuple(row) for row in ids.tolist()]
    assert seen == [tuple(row) for row in rows.ids.tolist()]


def test_metrics_repair_a_torn_tail_and_write_no_nan(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kind": "step"}\n{"step": 2, "ki')
    log = Metrics(path)
    log.write("step", step=2, loss=float("nan"), grad_norm=float("inf"), lr=1e-5)
    log.close()
    assert read(path) == [
        {"step": 1, "kind": "step"}, {"step": 2, "loss": None, "grad_norm": None, "lr": 1e-5, "kind": "step"},
    ]  # fmt: skip
    path.write_text('{"torn')
    Metrics(path).close()
    assert path.read_text() == ""


def test_device_peaks():
    assert (
        peak_flops("NVIDIA H100 80GB HBM3") == 989e12
        and peak_flops("Tesla T4") == 65e12
        and peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    )
    assert peak_flops("NVIDIA A10G") == 125e12 and peak_flops("some card") == 0.0
