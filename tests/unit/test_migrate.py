"""pipedock migrate: gdGPT's own keys, values and forms, and nothing lost silently (M20)."""

import json

import pytest
import yaml

from pipedock import main
from pipeline_train import config, deepspeed_keys
from pipeline_train.errors import UserError
from pipeline_train.migrate import migrate

OLD = {
    "train_micro_batch_size_per_gpu": 2,
    "train_batch_size": 128,
    "dataloader_drop_last": True,
    "steps_per_print": 20,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "1e-5", "betas": [0.9, 0.999], "weight_decay": 4e-5, "eps": 1e-8},
        "no_wd_kws": ["bias", "[a-zA-Z]*norm"],
    },
    "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 100, "warmup_min_ratio": 0.02, "cos_min_ratio": 0.2}},
    "gradient_clipping": 2.0,
    "bf16": {"enabled": False},
    "fp16": {"enabled": True, "auto_cast": False, "loss_scale": 0, "initial_scale_power": 12, "loss_scale_window": 500,
             "hysteresis": 3, "min_loss_scale": 2},
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    "model_topo": {"process_topology": {"axes": ["pipe", "data"], "dims": [8, 2]}, "parts": [1, 5, 5, 5, 5, 5, 5, 1]},
    "from_scratch": False,
    "model_path": "./saved_bloomz_7b1_mt_pp/",
    "save_path": "./checkpoints/",
    "n_epoches": 3,
    "max_seq_len": 1024,
    "data_path": "./dataset.json",
    "use_grad_ckpt": True,
    "use_flash_attn": False,
}  # fmt: skip


def change(**changes):
    old = json.loads(json.dumps(OLD))
    old.update(changes)
    return json.dumps({k: v for k, v in old.items() if v is not None})


def test_every_key_of_the_ancestor_arrives():
    text, notes, lost = migrate(json.dumps(OLD))
    new = config.parse(yaml.safe_load(text))
    assert (new.parallel.pipe, new.parallel.data, new.parallel.parts) == (8, 2, [1, 5, 5, 5, 5, 5, 5, 1])
    assert (new.parallel.recompute, new.parallel.offload) == ("blocks", True)
    assert (new.batch.micro, new.rows_per_step, new.micro_batches) == (2, 128, 32)
    assert (new.optim.type, new.optim.lr, new.optim.betas, new.optim.weight_decay) == ("adamw", 1e-5, [0.9, 0.999], 4e-5)
    assert (new.optim.clip, new.optim.schedule, new.optim.warmup, new.optim.floor) == (2.0, "cosine", 100, 0.2)
    scale = new.optim.loss_scale
    assert (new.model.dtype, scale.initial, scale.window, scale.hysteresis, scale.min) == ("fp16", 4096, 500, 3, 2.0)
    assert (new.run.out, new.model.init, new.data.train, new.data.seq_len) == (
        "./checkpoints/",
        "pretrained",
        "./dataset.json",
        1024,
    )
    assert (new.train.epochs, new.train.log_every, new.data.pack, new.data.template) == (3, 20, False, "default")
    assert new.deepspeed == {"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}}
    assert lost == []
    said = {n["key"]: n["note"] for n in notes}
    assert "without effect" in said["zero_optimization.offload_param"]
    assert {"model_path", "data.pack", "dataloader_drop_last", "use_flash_attn", "scheduler.params.warmup_min_ratio"} <= set(said)


def test_yaml_and_json_mean_the_same():
    assert migrate(yaml.safe_dump(OLD, sort_keys=False)) == migrate(json.dumps(OLD))


def test_what_cannot_come_along_is_listed():
    _, _, lost = migrate(change(aux_max_z_loss={"weight": 2e-4}, some_new_key=1))
    assert lost == ["aux_max_z_loss.weight", "some_new_key"]
    arithmetic = {"communication_data_type": "fp16", "prescale_gradients": True, "gradient_predivide_factor": 2.0}
    text, _, lost = migrate(change(**arithmetic))
    assert lost == list(arithmetic) and not set(arithmetic) & set(yaml.safe_load(text)["deepspeed"])


def test_absent_keys_keep_the_meaning_they_had_there():
    text, notes, _ = migrate(change(scheduler=None, gradient_clipping=None, fp16=None, optimizer={"type": "Lion"}))
    new = config.parse(yaml.safe_load(text))
    assert (new.optim.schedule, new.optim.clip, new.model.dtype) == ("constant", 0.0, "fp32")
    assert (new.optim.type, new.optim.betas, new.optim.weight_decay) == ("lion", [0.9, 0.99], 0.0)
    assert any(n["key"] == "optimizer.no_wd_kws" and n["note"].startswith("absent") for n in notes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_topo": None}, "no model_topo section"),
        ({"model_topo": {"process_topology": {"axes": ["pipe", "data"], "dims": [8]}}}, "axes ['pipe', 'data'] with dims [8]"),
        ({"model_topo": {"process_topology": {"axes": ["pipe", "model"], "dims": [4, 2]}}}, "pipedock has the axes pipe and data"),
        ({"data_path": None}, "data_path: expected str, got None"),
        ({"optimizer": {"type": "OneBitAdam"}}, "optimizer.type: OneBitAdam is not implemented"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "fast"}}}, "optimizer.params.lr: expected a number, got 'fast'"),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type: OneCycle has no counterpart"),
        ({"train_batch_size": "many"}, "train_batch_size: expected a positive integer, got 'many'"),
        ({"zero_optimization": 3}, "zero_optimization: expected a section, got 3"),
        ({"zero_optimization": {"stage": 3}}, "stage 0 or 1"),
        ({"train_batch_size": 130}, "batch.global: 130 rows cannot be split"),
    ],
)
def test_refusals_say_what_and_where(changes, message):
    with pytest.raises(UserError) as error:
        migrate(change(**changes), "old.json")
    assert str(error.value).startswith("old.json: ") and message in str(error.value)


def test_other_inputs_become_the_nearest_thing():
    text, notes, _ = migrate(change(
        model_topo={"process_topology": {"axes": ["data", "pipe"], "dims": [2, 4]}, "parts": "parameters"},
        fp16={"enabled": True, "loss_scale": 128}, wall_clock_breakdown=True,
        scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3}}, zero_optimization={},
    ))  # fmt: skip
    new = config.parse(yaml.safe_load(text))
    assert (new.parallel.pipe, new.parallel.data, new.parallel.axes, new.parallel.parts) == (4, 2, ["data", "pipe"], "auto")
    assert (new.optim.schedule, new.optim.warmup, new.deepspeed) == ("constant", 1000, {"wall_clock_breakdown": True})
    assert {"model_topo.parts", "fp16.loss_scale", "scheduler.params.warmup_max_lr"} <= {n["key"] for n in notes}


def test_what_train_would_refuse_is_changed_or_left_out_with_a_note():
    zero = {"stage": 0, "reduce_bucket_size": "5e8", "cpu_offload": True, "round_robin_gradients": True, "overlap_com": True}
    text, notes, lost = migrate(change(zero_optimization=zero, activation_checkpointing={"cpu_checkpointing": True}))
    new = config.parse(yaml.safe_load(text))
    assert new.parallel.offload and new.deepspeed == {"zero_optimization": {"stage": 1, "reduce_bucket_size": 500000000}}
    deepspeed_keys.check(new.deepspeed, "run.yaml", lambda line: None)
    said = {n["key"]: n["note"] for n in notes}
    assert said["zero_optimization.cpu_offload"] == "became parallel.offload" and lost == []
    assert said["zero_optimization.stage"].startswith("0 became 1: a pipeline at 0 clips every stage")
    assert said["zero_optimization.round_robin_gradients"].startswith("left out: deals the gradients out in another order")
    assert said["zero_optimization.overlap_com"] == 'left out: is not passed on to DeepSpeed; did you mean "overlap_comm"?'
    assert "parallel.recompute" in said["activation_checkpointing"]


def test_what_contradicts_itself_is_told():
    text, notes, _ = migrate(change(gradient_accumulation_steps=4, n_epoches=2.5, bf16={"enabled": True}))
    new, said = config.parse(yaml.safe_load(text)), {n["key"]: n["note"] for n in notes}
    assert (new.micro_batches, new.train.epochs, new.model.dtype) == (32, 2, "fp16")
    assert said["gradient_accumulation_steps"] == ("4 contradicts 128 rows a step of micro-batches of 2 on 2 replicas: left out, "
                                                   "train_batch_size holds")  # fmt: skip
    assert said["n_epoches"].startswith("2.5 became 2; train.max_steps") and said["bf16.enabled"].startswith("fp16.enabled is true")
    assert not {"gradient_accumulation_steps", "n_epoches", "bf16.enabled"} & {n["key"] for n in migrate(json.dumps(OLD))[1]}


def test_verb_writes_once_and_lists(tmp_path, capfd):
    source, target = tmp_path / "ds_config_pp.json", tmp_path / "run.yaml"
    source.write_text(change(aux_max_z_loss={"weight": 1}))
    assert main(["migrate", "--config", str(source), "--output", str(target)]) == 0
    out = capfd.readouterr().out
    assert "not carried over: aux_max_z_loss.weight" in out and "note: model_path" in out
    assert config.load(target).parallel.pipe == 8
    assert main(["migrate", "--config", str(source), "--output", str(target)]) == 2
    assert "exists already; name another file with --output" in capfd.readouterr().err
    assert main(["migrate", "--config", str(tmp_path / "no.json")]) == 2
    assert "no.json: cannot be read" in capfd.readouterr().err
    source.write_text("{: [")
    assert main(["migrate", "--config", str(source), "--output", str(tmp_path / "x")]) == 2
    assert "neither JSON nor YAML" in capfd.readouterr().err
    source.write_text(change())
    assert main(["migrate", "--config", str(source), "--output", str(tmp_path / "no" / "x")]) == 2
    assert "cannot be written" in capfd.readouterr().err
