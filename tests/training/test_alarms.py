"""NaN, memory and collapse: when an alarm is raised, its message and its files."""

import base64
import json
import logging
import math
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_regvit.pretraining.collapse import RULES, CollapseAlarms, CollapseError, Recipe
from hf_regvit.pretraining.crops import DinoCollator
from hf_regvit.pretraining.monitors import artifact_statistics
from hf_regvit.pretraining.run import pretrain
from hf_regvit.training.callbacks import MetricsFile
from hf_regvit.training.finite import FiniteGuard, NonFiniteError, out_of_memory, without_ids
from tiny_run import GRID, SHAPE, Crops, arguments, same_state, tiny_batch, tiny_config, tiny_network, trained

pytestmark = pytest.mark.usefixtures("without_figures")


class BadCrops(Crops):
    """One image in ten has a pixel that is NaN."""

    def __getitem__(self, key):
        item = super().__getitem__(key)
        if key[1] == 4:
            item["global_crops"][0, 0, 0, 0] = math.nan
        return item


# ---- NaN and infinity ----


def test_f54_a_loss_that_is_nan_stops_the_run_and_names_the_images(tmp_path):
    dataset = BadCrops()
    with pytest.raises(NonFiniteError) as stopped:
        trained(tmp_path, dataset=dataset, save_strategy="steps", save_steps=1, save_total_limit=1)
    step = next(i for i, (_, index) in enumerate(dataset.seen) if index == 4) // 3
    assert step > 0  # otherwise there would be no checkpoint
    capture = json.loads((tmp_path / "nan_batch.json").read_text())
    assert (capture["step"], capture["where"]) == (step, "loss")
    (process,) = capture["processes"]
    (batch,) = process["micro_batches"]
    expected = dataset.seen[3 * step : 3 * step + 3]
    assert list(zip(batch["epochs"], batch["sample_ids"], strict=True)) == expected
    assert batch["terms"]["loss"] == "nan"
    message = str(stopped.value)
    assert f"The loss is nan at step {step} (" in message
    assert f"Resume from checkpoint-{step} with --learning_rate 0.001 (now 0.002)" in message
    assert "nan_batch.json" in message
    # Nothing of the step was applied: the weights are those of the last checkpoint, and finite.
    kept = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    now = load_file(tmp_path / "nan_batch.safetensors")
    weights = [name for name in now if name.startswith(("student.", "teacher."))]
    assert all(torch.equal(now[name], kept[name]) for name in weights)


def test_f54_the_capture_suffices_to_repeat_the_step(tmp_path):
    dataset, config = BadCrops(), tiny_config(drop_path_rate=0.5, drop_path_mode="batch_subset")
    options = {"config": config, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    with pytest.raises(NonFiniteError):
        trained(tmp_path, dataset=dataset, **options)
    capture = json.loads((tmp_path / "nan_batch.json").read_text())
    (process,) = capture["processes"]
    network = tiny_network(config=config, seed=5)
    network.load_state_dict(load_file(tmp_path / "nan_batch.safetensors"))
    network.teacher_temperature = capture["teacher_temperature"]
    collate = DinoCollator((GRID, GRID), mask_probability=1.0, seed=7)
    torch.manual_seed(99)  # the draws of the step come from the recorded state alone
    state = bytearray(base64.b64decode(process["random_state"]["cpu"]))
    torch.set_rng_state(torch.frombuffer(state, dtype=torch.uint8))
    outputs = []
    for batch in process["micro_batches"]:
        items = [dataset[key] for key in zip(batch["epochs"], batch["sample_ids"], strict=True)]
        outputs.append(network(**without_ids(collate(items))))
    for replayed, batch in zip(outputs, capture["processes"][0]["micro_batches"], strict=True):
        for name, value in batch["terms"].items():
            assert str(replayed[name].item()) == str(value), name
    # The draws of drop path matter: with others, the half without the NaN has another loss.
    (finite,) = [b for b in capture["processes"][0]["micro_batches"] if b["terms"]["loss"] != "nan"]
    items = [dataset[key] for key in zip(finite["epochs"], finite["sample_ids"], strict=True)]
    losses = set()
    for seed in range(5):
        torch.manual_seed(seed)
        losses.add(network(**without_ids(collate(items)))["loss"].item())
    assert len(losses) > 1


@pytest.mark.slow
def test_f54_a_gradient_that_is_infinite_stops_the_run(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.student["dino_head"].mlp[0].weight.register_hook(lambda gradient: gradient * math.inf)

    for clip in (3.0, 0.0):
        with pytest.raises(
            NonFiniteError, match=r"The loss is finite at step 2, but its gradient is not .*dino_head=(nan|inf)"
        ):
            trained(tmp_path / str(clip), callbacks=[Poison()], max_grad_norm=clip)
        assert json.loads((tmp_path / str(clip) / "nan_batch.json").read_text())["where"] == "gradient"


def guard_with(tmp_path, losses, norms, **options):
    guard = FiniteGuard(tmp_path, **options)
    args = SimpleNamespace(world_size=1, process_index=0, learning_rate=1e-3, fp16=False, bf16=True, max_grad_norm=3.0)
    state = SimpleNamespace(global_step=7, epoch=0.5, is_world_process_zero=True)
    guard.on_step_begin(args, state, None)
    for loss in losses:
        guard.see_batch(torch.tensor([3, 1]), torch.tensor([0, 0]), {"loss": torch.tensor(loss)})
    guard.see_gradients({"backbone": torch.tensor(norms)})
    return guard, args, state


def test_f54_a_gradient_scaler_may_overflow(tmp_path):
    network = tiny_network()
    guard, args, state = guard_with(tmp_path, [1.0], math.inf, check_gradients=False)
    guard.on_pre_optimizer_step(args, state, None, model=network)
    guard, args, state = guard_with(tmp_path, [1.0, math.inf], 1.0, check_gradients=False)
    with pytest.raises(NonFiniteError, match="The loss is inf at step 7"):
        guard.on_pre_optimizer_step(args, state, None, model=network)


def test_f55_the_process_with_the_nan_is_named(tmp_path, monkeypatch):
    """Two processes; this one is fine, and the messages of the other one are set by hand."""
    import accelerate.utils

    guard, args, state = guard_with(tmp_path, [1.0], math.nan)  # the backward pass has spread the NaN
    args.world_size = 2
    other = json.loads(json.dumps(guard._record(args.process_index)))
    other |= {"rank": 1}
    other["micro_batches"][0] |= {"sample_ids": [8, 9], "terms": {"loss": "nan"}}
    monkeypatch.setattr(
        accelerate.utils, "gather", lambda flags: torch.cat([flags, torch.tensor([[0, 0]], dtype=flags.dtype)])
    )
    monkeypatch.setattr(accelerate.utils, "gather_object", lambda records: [*records, other])
    with pytest.raises(NonFiniteError, match="The loss is nan at step 7 on rank 1"):
        guard.on_pre_optimizer_step(args, state, None, model=tiny_network())
    (process,) = json.loads((tmp_path / "nan_batch.json").read_text())["processes"]
    assert (process["rank"], process["micro_batches"][0]["sample_ids"]) == (1, [8, 9])


def test_f54_pretrain_reports_the_alarm(tmp_path):
    with pytest.raises(NonFiniteError):
        pretrain(arguments(tmp_path, logging_steps=1), train_dataset=BadCrops())
    report = json.loads((tmp_path / "report.json").read_text())
    (alarm,) = report["alarms"]
    assert alarm["name"] == "not_finite"
    assert "--learning_rate" in alarm["message"]
    assert report["stopped"]
    assert report["steps"] == alarm["step"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["message"] for line in lines if "alarm" in line] == [alarm["message"]]
    assert not (tmp_path / "backbone").exists()


def test_f54_the_command_line_says_it_in_one_line(monkeypatch, capsys):
    from hf_regvit.app import cli

    monkeypatch.setitem(cli.RUNS, "pretrain", Mock(side_effect=NonFiniteError("the loss is nan at step 3")))
    assert cli.main(["pretrain"]) == 1
    assert capsys.readouterr().err == "error: the loss is nan at step 3\n"


# ---- Memory ----


def test_f66_out_of_memory_says_what_to_change(tmp_path, monkeypatch):
    from hf_regvit.pretraining.distillation import SelfDistillation

    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    monkeypatch.setattr(SelfDistillation, "forward", Mock(side_effect=error))
    with pytest.raises(torch.OutOfMemoryError) as stopped:
        trained(tmp_path, per_device_train_batch_size=8)
    message = str(stopped.value)
    assert message.startswith("Out of memory at step 0: this process used ")
    assert float(message.split(" GiB at the peak")[0].split()[-1]) > 0.05
    for flag in (
        "--per_device_train_batch_size 4 --gradient_accumulation_steps 2",
        "_checkpointing True",
        "--bf16 True",
    ):
        assert flag in message
    assert "Tried to allocate" in str(stopped.value.__cause__)


def test_f66_options_that_are_taken_are_not_advised_again(tmp_path):
    args = arguments(tmp_path, per_device_train_batch_size=2, bf16=True, num_local_crops=8, head_num_prototypes=65536)
    args.gradient_checkpointing = True
    message = str(out_of_memory(args, step=3))
    assert "--num_local_crops 4; --head_num_prototypes 16384; a smaller --preset." in message


# ---- Collapse ----

OPTIONS = {"head_num_prototypes": 256, "per_device_train_batch_size": 16, "num_local_crops": 2}
OPTIONS |= {"dino_loss_weight": 1.0, "stop_on_collapse": False}
RECIPE = (
    SimpleNamespace(init_from="x", learning_rate=1e-4, gram_loss_weight=2.0, **OPTIONS),
    SimpleNamespace(num_register_tokens=4, hidden_size=96),
)
HEALTHY = {
    "loss": 4.0, "dino_local_loss": 1.3, "dino_global_loss": 0.7, "teacher_entropy": 1.0,
    "teacher_marginal_entropy": 2.3, "feature_std": 0.7, "effective_rank": 3.2, "register_cosine": 0.4,
    "eval_patch_agreement": 0.5,
}  # fmt: skip
LN_K = math.log(256)
SICK = {
    "uniform_targets": ({"teacher_entropy": 0.99 * LN_K}, "--teacher_temperature"),
    "loss_at_ln_k": ({"dino_local_loss": LN_K * 4 / 6, "dino_global_loss": LN_K * 2 / 6}, "--learning_rate"),
    "one_prototype": ({"teacher_marginal_entropy": 0.9}, "--center_momentum"),
    "same_features": ({"feature_std": 0.01}, "--koleo_loss_weight"),
    "same_registers": ({"register_cosine": 1.0}, "--register_init_std"),
    "below_start": ({"eval_patch_agreement": 0.4}, "--gram_loss_weight"),
}


def alarms_after(lines, *, steps=None, first_step=0, **options):
    alarms = CollapseAlarms(*RECIPE, first_step=first_step, **options)
    control = SimpleNamespace(should_training_stop=False)
    for number, line in enumerate(lines):
        state = SimpleNamespace(global_step=steps[number] if steps else 10 * number, is_world_process_zero=True)
        alarms.on_log(SimpleNamespace(world_size=1), state, control, logs=line)
    return alarms, control


def test_f56_a_healthy_line_raises_nothing():
    assert alarms_after([HEALTHY] * 10)[0].raised == []


@pytest.mark.parametrize("name", SICK)
def test_f56_each_alarm_goes_off_alone_and_names_its_option(name, caplog):
    values, option = SICK[name]
    with caplog.at_level(logging.WARNING):
        alarms, control = alarms_after([HEALTHY, *[HEALTHY | values] * 5])
    (alarm,) = alarms.raised  # once, however long it lasts
    assert (alarm.name, alarm.step) == (name, 30)
    assert option in alarm.message
    assert [record.message for record in caplog.records] == [f"Alarm at step 30, {name}: {alarm.message}"]
    assert not control.should_training_stop


def test_f56_every_rule_has_a_case():
    assert [name for name, *_ in RULES] == list(SICK)


def test_f56_a_rank_of_one_is_collapse_too():
    alarms, _ = alarms_after([HEALTHY | {"effective_rank": 1.1}] * 3)
    assert [alarm.name for alarm in alarms.raised] == ["same_features"]


def test_f56_an_alarm_needs_several_lines_on_end():
    sick = HEALTHY | SICK["uniform_targets"][0]
    assert alarms_after([sick, sick, HEALTHY, sick, sick])[0].raised == []
    assert [alarm.step for alarm in alarms_after([sick, sick, HEALTHY, sick, sick, sick])[0].raised] == [50]
    # A line without the value, such as one with k-NN only, neither counts nor resets the count.
    assert len(alarms_after([sick, {"eval_knn_10": 0.5}, sick, sick])[0].raised) == 1


def test_f56_collapse_waits_for_the_warm_up_and_registers_do_not():
    sick = HEALTHY | SICK["uniform_targets"][0] | SICK["same_registers"][0]
    alarms, _ = alarms_after([sick] * 6, first_step=20)
    assert [(alarm.name, alarm.step) for alarm in alarms.raised] == [("same_registers", 20), ("uniform_targets", 40)]


def test_f56_the_warm_up_is_that_of_the_schedule(tmp_path):
    args = arguments(tmp_path, warmup_steps=0.1)
    alarms = CollapseAlarms(args, tiny_config())
    alarms.on_train_begin(args, SimpleNamespace(max_steps=400, global_step=0), None)
    assert alarms.first_step == 40


@pytest.mark.slow
def test_f56_stop_on_collapse_ends_the_run(tmp_path):
    """Prototypes of length zero keep the targets uniform."""

    class Uniform(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            for half in (model.student, model.teacher):
                torch.nn.init.zeros_(half["dino_head"].last_layer.weight_g)

    options = {"logging_steps": 1, "warmup_steps": 0, "max_steps": 8, "koleo_loss_weight": 0.0}
    with pytest.raises(CollapseError, match=r"Stopped at step 3 by the alarm .*--learning_rate"):
        pretrain(
            arguments(tmp_path / "stop", stop_on_collapse=True, **options),
            train_dataset=Crops(),
            callbacks=[Uniform()],
        )
    report = json.loads((tmp_path / "stop" / "report.json").read_text())
    assert report["steps"] == 3
    assert report["stopped"]
    pretrain(arguments(tmp_path / "warn", **options), train_dataset=Crops(), callbacks=[Uniform()])
    warned = json.loads((tmp_path / "warn" / "report.json").read_text())
    assert warned["steps"] == 8
    assert not warned["stopped"]
    assert {alarm["name"] for alarm in warned["alarms"]} == {"uniform_targets", "loss_at_ln_k"}
    assert {alarm["step"] for alarm in warned["alarms"]} == {3}
    card = (tmp_path / "warn" / "backbone" / "README.md").read_text()
    assert "step 3: The targets are almost uniform" in card


def test_f56_a_resumed_run_remembers_its_alarms(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    first, _ = alarms_after([HEALTHY | SICK["one_prototype"][0]] * 3, metrics=metrics)
    args, config = arguments(tmp_path), tiny_config()
    resumed = CollapseAlarms(args, config, metrics=metrics)
    state = SimpleNamespace(max_steps=400, global_step=30)
    resumed.on_train_begin(args, state, None)
    assert resumed.raised == first.raised
    fresh = CollapseAlarms(args, config, metrics=metrics)
    fresh.on_train_begin(args, SimpleNamespace(max_steps=400, global_step=0), None)
    assert fresh.raised == []


def test_f56_alarms_are_written_to_the_metrics_file(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    alarms, _ = alarms_after([HEALTHY | SICK["one_prototype"][0]] * 3, metrics=metrics)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 20, "alarm": "one_prototype", "message": alarms.raised[0].message}


@pytest.mark.parametrize("num_local", [0, 2])
def test_f56_the_loss_of_a_network_that_knows_nothing(num_local):
    network = tiny_network(dino_loss_weight=0.5)
    for half in (network.student, network.teacher):
        torch.nn.init.zeros_(half["dino_head"].last_layer.weight_g)
    outputs = network(**tiny_batch(num_local=num_local))
    options = {"num_local_crops": num_local, "dino_loss_weight": 0.5, "head_num_prototypes": SHAPE.num_prototypes}
    recipe = Recipe(SimpleNamespace(**options), tiny_config())
    measured = sum(value.item() for name, value in outputs.items() if name.startswith("dino_"))
    assert recipe.uniform_loss == pytest.approx(measured, rel=1e-5)
    assert recipe.ln_k == pytest.approx(outputs["teacher_entropy"].item(), rel=1e-5)


def test_f47_identical_registers_are_seen_and_different_ones_are_not():
    network, pixels = tiny_network(), torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    apart = artifact_statistics(network.teacher_backbone, pixels)
    with torch.no_grad():
        network.teacher_backbone.embeddings.register_tokens.fill_(0.01)
    same = artifact_statistics(network.teacher_backbone, pixels)
    assert alarms_after([HEALTHY | apart] * 3)[0].raised == []
    assert [alarm.name for alarm in alarms_after([HEALTHY | same] * 3)[0].raised] == ["same_registers"]


def test_f47_a_run_with_identical_registers_raises_the_alarm(tmp_path):
    class Same(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            for half in (model.student_backbone, model.teacher_backbone):
                torch.nn.init.constant_(half.embeddings.register_tokens, 0.02)

    teacher = pretrain(
        arguments(tmp_path, monitor_steps=1, logging_steps=1, max_steps=3, warmup_steps=0),
        train_dataset=Crops(),
        callbacks=[Same()],
    )
    registers = teacher.embeddings.register_tokens[0]
    assert torch.equal(registers[0], registers[1])  # identical gradients keep them identical
    (alarm,) = [
        a for a in json.loads((tmp_path / "report.json").read_text())["alarms"] if a["name"] == "same_registers"
    ]
    assert "--register_init_std" in alarm["message"]


def test_ids_are_taken_out_of_the_batch():
    batch = DinoCollator((GRID, GRID), seed=0)([Crops()[(2, 5)], Crops()[(2, 1)]])
    assert batch["sample_ids"].tolist() == [5, 1]
    assert batch["epochs"].tolist() == [2, 2]
    assert set(batch) - set(without_ids(batch)) == {"sample_ids", "epochs"}
    assert same_state(without_ids(batch), {name: batch[name] for name in without_ids(batch)})
