"""Head, schedules, parameter rules, the self-distillation module, the trainer and the complete job on tiny data."""

import copy
import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, HfArgumentParser, TrainerCallback

import oracles
from builders import PoisonAt, Recorder, StopAt, noise, spy
from helpers import slow_except
from hf_regvit import RegViTModel
from hf_regvit.models.manifest import write_manifest
from hf_regvit.pretraining.arguments import PretrainingArguments
from hf_regvit.pretraining.crops import DinoCollator
from hf_regvit.pretraining.distillation import HeadShape, PrototypeHead, SelfDistillation
from hf_regvit.pretraining.monitors import OnlineKNN, backbone_features
from hf_regvit.pretraining.run import pretrain
from hf_regvit.pretraining.schedules import cosine_schedule, parameter_groups, set_rates
from hf_regvit.pretraining.trainer import DinoTrainer
from hf_regvit.training.callbacks import MetricsFile, TrainingProgress
from hf_regvit.training.finite import without_ids
from hf_regvit.training.parameter_groups import parameter_rules
from losses_on_logits import student_outputs
from tiny_run import (
    GRID,
    PATCH,
    SHAPE,
    Crops,
    MasksOfTheImage,
    arguments,
    same_state,
    tiny_batch,
    tiny_config,
    tiny_network,
    trained,
)

pytestmark = pytest.mark.usefixtures("without_figures")

# ---- Head ----


def test_head_equals_its_loop():
    torch.manual_seed(0)
    head = PrototypeHead(5, SHAPE).requires_grad_(False)
    for parameter in head.parameters():
        parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(3, 5)
    layers = [(head.mlp[index].weight, head.mlp[index].bias) for index in (0, 2, 4)]
    expected = oracles.prototype_logits(x, layers, head.last_layer.weight_g, head.last_layer.weight_v)
    torch.testing.assert_close(head(x), torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_head_initialisation():
    torch.manual_seed(0)
    head = PrototypeHead(384, HeadShape(num_prototypes=4096, hidden_size=512, bottleneck_size=64))
    for index in (0, 2, 4):
        assert head.mlp[index].weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not head.mlp[index].bias.any()
    v = head.last_layer.weight_v
    assert torch.equal(head.last_layer.weight_g, torch.ones(4096, 1))
    assert head.last_layer.weight_g.requires_grad
    assert v.abs().max().item() <= 1 / 8
    assert v.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.05)


def test_head_gives_float32_logits_under_autocast_and_survives_a_copy():
    head = PrototypeHead(5, SHAPE)
    x = torch.randn(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(x)
    assert logits.dtype == torch.float32
    twin = copy.deepcopy(head)
    assert torch.equal(twin(x), head(x))


def test_head_on_no_rows_gives_every_parameter_a_zero_gradient():
    head = PrototypeHead(5, SHAPE)
    head(torch.zeros(0, 5)).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())


def test_head_sizes_are_checked():
    with pytest.raises(ValueError, match=r"num_prototypes .* is 0"):
        HeadShape(num_prototypes=0)


# ---- Schedules ----


@pytest.mark.parametrize(("warmup", "frozen"), [(0, 0), (5, 0), (1, 3), (6, 4)])
def test_cosine_schedule_equals_its_table(warmup, frozen):
    table = oracles.cosine_table(base=2.0, final=0.5, total=20, warmup=warmup, warmup_start=0.1, frozen=frozen)
    assert len(table) == 20
    for step, value in enumerate([*table, 0.5, 0.5]):
        actual = cosine_schedule(
            step, base=2.0, final=0.5, total_steps=20, warmup_steps=warmup, warmup_start=0.1, freeze_steps=frozen
        )
        assert actual == pytest.approx(value, rel=1e-12)


def test_durations_below_one_are_shares_of_the_run(tmp_path):
    args = arguments(tmp_path, warmup_steps=0.1, freeze_last_layer_steps=3, warmup_teacher_temperature_steps=0.25)
    for total in (40, 200):
        schedules = args.schedules(total)
        assert schedules.warmup_steps == total // 10
        assert schedules.freeze_last_layer_steps == 3
        assert schedules.warmup_teacher_temperature_steps == total // 4
    assert schedules.at(2).last_layer_learning_rate == 0
    assert schedules.at(3).last_layer_learning_rate == schedules.at(3).learning_rate > 0


def test_learning_rate_grows_with_the_root_of_the_batch(tmp_path):
    args = arguments(tmp_path, learning_rate=4e-3, learning_rate_reference_batch=1024, gradient_accumulation_steps=2)
    assert args.images_per_step == 6
    assert args.schedules(10).learning_rate == pytest.approx(4e-3 * math.sqrt(6 / 1024))


def test_constant_schedules_stay_after_their_warm_ups(tmp_path):
    options = {"learning_rate": 3e-3, "warmup_steps": 5, "weight_decay": 0.04, "teacher_momentum": 0.9}
    cosine, constant = (arguments(tmp_path, schedule=name, **options).schedules(20) for name in ("cosine", "constant"))
    for step in range(5):
        assert constant.at(step).learning_rate == cosine.at(step).learning_rate
    for step in (5, 12, 19, 20, 1000):
        values = constant.at(step)
        assert (values.learning_rate, values.weight_decay, values.teacher_momentum) == (3e-3, 0.04, 0.9)
        assert values.teacher_temperature == pytest.approx(cosine.at(step).teacher_temperature)
    assert cosine.at(19).learning_rate < 1e-3
    with pytest.raises(ValueError, match="schedule is 'linear'"):
        arguments(tmp_path, schedule="linear")


# ---- Parameter rules ----


def test_every_parameter_of_the_network_has_its_rule():
    network = tiny_network(ibot_head=SHAPE)
    names = [name for name, _ in network.student.named_parameters()]
    rules = parameter_rules(names, num_layers=2, layer_decay=0.5, patch_embed_lr_multiplier=0.2)
    assert rules["backbone.embeddings.register_tokens"] == (0.125, 1.0, False)
    assert rules["backbone.embeddings.patch_embeddings.projection.bias"] == (0.125 * 0.2, 0.0, False)
    assert rules["backbone.layers.1.layer_scale2.lambda1"] == (0.5, 0.0, False)
    assert rules["backbone.layernorm.weight"] == (1.0, 0.0, False)
    assert rules["ibot_head.last_layer.weight_g"] == (1.0, 1.0, True)
    groups = parameter_groups(network.student, rules)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in network.student.parameters())


def test_an_unknown_parameter_is_refused():
    with pytest.raises(ValueError, match=r"'neck\.weight'"):
        parameter_rules(["backbone.neck.weight"], num_layers=2)


# ---- Self-distillation ----


def test_teacher_starts_as_the_student_and_stays_in_eval_mode():
    network = tiny_network()
    for (name, student), (other, teacher) in zip(
        network.student.named_parameters(), network.teacher.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(student, teacher)
        assert not teacher.requires_grad
    network.train()
    assert not any(module.training for module in network.teacher.modules())
    assert all(module.training for module in network.student.modules())


def test_teacher_update_equals_the_closed_form():
    network = tiny_network()
    name = "backbone.layers.0.attention.qkv.weight"
    student, teacher = (dict(half.named_parameters())[name] for half in (network.student, network.teacher))
    start, states, momenta = teacher.flatten()[:5].tolist(), [], [0.9, 0.5, 1.0]
    for momentum in momenta:
        with torch.no_grad():
            student.add_(torch.randn_like(student))
        states.append(student.flatten()[:5].tolist())
        network.update_teacher(momentum)
    expected = oracles.ema(start, states, momenta)
    torch.testing.assert_close(teacher.flatten()[:5], torch.tensor(expected))


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
@pytest.mark.parametrize("num_local", [0, 2])
def test_terms_equal_their_loops(centering, num_local):
    network = tiny_network(centering=centering)
    batch = tiny_batch(num_local=num_local)
    network.begin_step(0.05)
    targets = network.teacher_targets(batch["global_crops"], batch["mask_indices"])
    student = student_outputs(network, batch)
    outputs = network(**batch)
    # Without local crops the official divisor is 3: it counts one term too many.
    divisor = {0: 3, 2: 6}[num_local]
    if num_local:
        local = oracles.dino_loss(student.local_logits, targets.cls)
        assert outputs["dino_local_loss"].item() == pytest.approx(local / divisor, rel=1e-4)
    else:
        assert "dino_local_loss" not in outputs
    across = sum(oracles.dino_loss(student.global_logits[[s]], targets.cls[[1 - s]]) for s in (0, 1))
    assert outputs["dino_global_loss"].item() == pytest.approx(across / divisor, rel=1e-4)
    koleo = sum(oracles.koleo_loss(crop) for crop in student.cls_features)
    assert outputs["koleo_loss"].item() == pytest.approx(0.1 * koleo, rel=1e-4)
    rows = zip(targets.masked.tolist(), student.masked_logits.tolist(), batch["mask_weights"].tolist(), strict=True)
    ibot = sum(weight * oracles.cross_entropy(t, s, 0.1) for t, s, weight in rows) / 6
    assert outputs["ibot_loss"].item() == pytest.approx(ibot, rel=1e-4)
    terms = [value for name, value in outputs.items() if name.endswith("_loss")]
    assert outputs["loss"].item() == pytest.approx(sum(term.item() for term in terms), rel=1e-6)


def test_uniform_outputs_give_the_known_losses():
    """All logits are equal, so H = ln K for every term, divided by the divisor; half of the crops are masked."""
    network = tiny_network(koleo_loss_weight=0)
    for head in (network.student["dino_head"], network.teacher["dino_head"]):
        torch.nn.init.zeros_(head.last_layer.weight_g)
    batch = tiny_batch(batch=2)  # masks 2 of the 4 crops
    batch["local_crops"] = torch.randn(8, 2, 3, 8, 8)
    outputs = network(**batch)
    ln_k = math.log(12)
    assert outputs["dino_local_loss"].item() == pytest.approx(ln_k * 16 / 18, rel=1e-5)
    assert outputs["dino_global_loss"].item() == pytest.approx(ln_k * 2 / 18, rel=1e-5)
    assert outputs["ibot_loss"].item() == pytest.approx(ln_k / 2, rel=1e-5)
    assert outputs["teacher_entropy"].item() == pytest.approx(ln_k, rel=1e-5)
    assert outputs["teacher_marginal_entropy"].item() == pytest.approx(ln_k, rel=1e-5)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("ibot_head", [None, SHAPE])
def test_every_student_parameter_gets_a_gradient_even_without_masks(masked, ibot_head):
    network = tiny_network(ibot_head=ibot_head)
    outputs = network(**tiny_batch(masked=masked))
    assert torch.isfinite(outputs["loss"])
    outputs["loss"].backward()
    assert [name for name, parameter in network.student.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad is None for parameter in network.teacher.parameters())
    registers = network.student["backbone"].embeddings.register_tokens
    assert registers.grad.any()
    if not masked:
        assert outputs["ibot_loss"].item() == 0


def test_an_empty_batch_of_masks_leaves_the_center_finite():
    network = tiny_network()
    for step in range(3):
        network.begin_step(0.05)
        network(**tiny_batch(seed=step, masked=step == 2))
    network.begin_step(0.05)
    assert torch.isfinite(network.ibot_center.center).all()
    assert network.ibot_center.center.any()


def test_centers_lag_by_one_step_and_stand_still_in_eval():
    network = tiny_network()
    network.begin_step(0.05)
    network(**tiny_batch())
    assert not network.dino_center.center.any()
    network.begin_step(0.05)
    moved = network.dino_center.center.clone()
    assert moved.any()
    network.eval()
    network(**tiny_batch())
    network.begin_step(0.05)
    assert torch.equal(network.dino_center.center, moved)


@pytest.mark.parametrize("name", ["dino", "ibot", "koleo"])
def test_a_weight_of_zero_switches_a_loss_off(name):
    network = tiny_network(**{f"{name}_loss_weight": 0.0}, ibot_head=SHAPE)
    outputs = network(**tiny_batch())
    outputs["loss"].backward()
    assert not any(key.startswith(name) for key in outputs)
    if name != "koleo":
        assert not any(parameter.grad.any() for parameter in network.student[f"{name}_head"].parameters())


def test_local_crops_do_not_influence_one_another():
    """Crop-major order: changing one image changes only the rows of that image."""
    network = tiny_network()
    batch = tiny_batch()
    other = {**batch, "local_crops": batch["local_crops"].clone()}
    other["local_crops"][1, 2] += 1
    before, after = (student_outputs(network, b) for b in (batch, other))
    changed = (before.local_logits != after.local_logits).any(-1)
    assert changed.nonzero().tolist() == [[1, 2]]
    assert torch.equal(before.global_logits, after.global_logits)


def test_separate_clipping_leaves_small_parts_alone():
    network = tiny_network()
    network(**tiny_batch())["loss"].backward()
    for part, norm in (("backbone", 10.0), ("dino_head", 0.5)):
        gradients = [parameter.grad for parameter in network.student[part].parameters()]
        scale = norm / math.sqrt(sum(g.square().sum().item() for g in gradients))
        for gradient in gradients:
            gradient.mul_(scale)
    norms = network.clip_gradients(1.0)
    assert norms["backbone"].item() == pytest.approx(10.0, rel=1e-4)
    assert norms["dino_head"].item() == pytest.approx(0.5, rel=1e-4)
    after = {
        part: math.sqrt(sum(p.grad.square().sum().item() for p in network.student[part].parameters()))
        for part in norms
    }
    assert after["backbone"] == pytest.approx(1.0, rel=1e-4)
    assert after["dino_head"] == pytest.approx(0.5, rel=1e-4)


def test_bad_networks_are_refused():
    with pytest.raises(ValueError, match="use_mask_token=True"):
        tiny_network(config=tiny_config(use_mask_token=False))
    with pytest.raises(ValueError, match="'center'"):
        tiny_network(centering="center")
    with pytest.raises(ValueError, match="none below 0"):
        tiny_network(koleo_loss_weight=-1.0)
    with pytest.raises(ValueError, match="one above 0"):
        tiny_network(dino_loss_weight=0.0, ibot_loss_weight=0.0, koleo_loss_weight=0.0)


# ---- Trainer ----


@pytest.mark.parametrize(
    ("resume_at", "centering"),
    [pytest.param(2, "softmax", marks=pytest.mark.slow), (3, "softmax"), (5, "sinkhorn")],
)
def test_resumed_run_repeats_the_unbroken_one_bit_for_bit(tmp_path, resume_at, centering):
    """3 steps per epoch: step 2 is inside the first epoch, 3 at its end, 5 inside the second; with drop path."""
    config = tiny_config(drop_path_rate=0.3, drop_path_mode="batch_subset")
    run = {"config": config, "options": {"centering": centering}, "save_strategy": "steps", "save_steps": resume_at}
    run["logging_steps"] = 1
    whole = trained(tmp_path / "whole", **run)
    checkpoint = tmp_path / "whole" / f"checkpoint-{resume_at}"
    # Other initial weights, so that only the checkpoint can make the two runs equal.
    torch.manual_seed(99)
    resumed = trained(tmp_path / "resumed", resume=str(checkpoint), **run)
    assert resumed.state.global_step == whole.state.global_step == 6
    assert same_state(whole.model.state_dict(), resumed.model.state_dict())
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, resumed)]
    assert losses[0] == losses[1]


def test_data_order_follows_seed_and_epoch(tmp_path):
    dataset = Crops()
    trained(tmp_path, dataset=dataset)
    assert [epoch for epoch, _ in dataset.seen[:9]] == [0] * 9  # the tenth image would make an incomplete batch
    assert len({index for _, index in dataset.seen[:9]}) == 9
    again = Crops()
    trained(tmp_path, dataset=again)
    assert dataset.seen == again.seen


def test_accumulated_micro_batches_equal_the_mean_of_their_gradients(tmp_path):
    """Two micro-batches of 3: the gradient is the mean of both, the teacher and the centers move once."""
    seen = {}

    class Spy(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.setdefault("gradient", model.student["backbone"].layernorm.weight.grad.clone())
            seen.setdefault("pending", model.dino_center.pending_count.item())

    dataset = Crops(6)
    trained(
        tmp_path,
        dataset=dataset,
        callbacks=[Spy()],
        gradient_accumulation_steps=2,
        max_steps=1,
        max_grad_norm=0.0,
        logging_steps=1,
    )
    from hf_regvit.pretraining.crops import DinoCollator

    network = tiny_network()
    network.begin_step(0.04)
    collate = DinoCollator((GRID, GRID), mask_probability=1.0, seed=7)
    for half in (dataset.seen[:3], dataset.seen[3:6]):
        (network(**without_ids(collate([dataset[key] for key in half])))["loss"] / 2).backward()
    torch.testing.assert_close(seen["gradient"], network.student["backbone"].layernorm.weight.grad)
    assert seen["pending"] == 12  # two micro-batches of two crops of three images


@pytest.mark.parametrize(
    ("centering", "options"),
    slow_except(
        [("softmax", {}), ("sinkhorn", {}), ("sinkhorn", {"paka_loss_weight": 1.0, "ibot_visible_patches": True})],
        ("sinkhorn", {}),
    ),
)
def test_accumulation_with_joint_targets_equals_one_big_batch(tmp_path, centering, options):
    """2 micro-batches of 3, or one of 6, for two epochs; no KoLeo or drop path, which depend on the micro-batch."""
    states, gradients = [], []

    for pieces in (1, 2):
        recorder = Recorder()
        trainer = trained(
            tmp_path / str(pieces),
            dataset=Crops(14),
            collator=MasksOfTheImage(),
            callbacks=[recorder],
            options={"centering": centering, "koleo_loss_weight": 0.0, **options},
            centering=centering,
            per_device_train_batch_size=6 // pieces,
            gradient_accumulation_steps=pieces,
            max_steps=4,
            warmup_steps=0,
            teacher_momentum=0.8,
            adam_epsilon=1e-3,
        )
        states.append(trainer.model.state_dict())
        gradients.append(recorder.gradients[0])
    for name, gradient in gradients[0].items():  # sums over images and tokens, whose error grows with their size
        atol = 2e-5 * gradient.abs().max().item()
        torch.testing.assert_close(gradients[1][name], gradient, atol=atol, rtol=0)
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, atol=1e-5, rtol=0)


def test_joint_targets_are_those_of_the_whole_batch():
    """Targets differ from those of the halves, because Sinkhorn-Knopp depends on its rows."""
    network = tiny_network(centering="sinkhorn")
    halves = [tiny_batch(seed=seed) for seed in (0, 1)]
    whole = torch.cat([half["global_crops"] for half in halves], dim=1)
    positions = torch.cat([halves[0]["masks"], halves[1]["masks"]], dim=1).flatten().nonzero().flatten()
    expected = network.teacher_targets(whole, positions)
    joint = network.joint_targets(halves)
    torch.testing.assert_close(torch.cat([targets.cls for targets in joint], dim=1), expected.cls)
    # Crop-major: the masked patches of the whole are those of crop 0 of both halves, then those of crop 1.
    first = [half["mask_indices"] < 3 * GRID**2 for half in halves]
    rows = [targets.masked[keep] for keep_of in (first, [~f for f in first]) for targets, keep in zip(joint, keep_of)]
    torch.testing.assert_close(torch.cat(rows), expected.masked)
    alone = network.teacher_targets(halves[0]["global_crops"], halves[0]["mask_indices"])
    assert not torch.allclose(alone.cls, joint[0].cls, rtol=1e-3)


@pytest.mark.slow
def test_the_last_steps_see_larger_crops_of_the_images_whose_turn_it_is(tmp_path, monkeypatch):
    """3 steps per epoch; the phase begins with step 4, within the second epoch, and continues in the third."""
    small, large, plain = Crops(), Crops(global_size=6 * PATCH), Crops()
    forward = spy(monkeypatch, SelfDistillation, "forward")
    run = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "high_resolution_steps": 4}
    larger = (large, DinoCollator((6, 6), mask_probability=1.0, seed=7))
    whole = trained(tmp_path / "a", dataset=small, high_resolution=larger, **run)
    assert [call.kwargs["global_crops"].shape[-1] for call in forward.call_args_list] == [16] * 4 + [24] * 4
    trained(tmp_path / "b", dataset=plain, max_steps=8)
    assert large.seen[:12] == plain.seen[12:24]
    name = "embeddings.position_embeddings"
    assert whole.model.student_backbone.get_parameter(name).shape[1] == 1 + GRID**2  # resampled as it is used
    for step in (3, 6):
        resumed = trained(
            tmp_path / f"c{step}", high_resolution=larger, resume=str(tmp_path / "a" / f"checkpoint-{step}"), **run
        )
        assert same_state(whole.model.state_dict(), resumed.model.state_dict())


def test_high_resolution_steps_need_data(tmp_path):
    with pytest.raises(ValueError, match="requires a MultiCropDataset, not Crops"):
        pretrain(arguments(tmp_path, high_resolution_steps=2), train_dataset=Crops())
    with pytest.raises(ValueError, match="streaming has none"):
        arguments(tmp_path, high_resolution_steps=2, streaming=True)


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs in one process.*DataParallel.*accelerate launch"):
        DinoTrainer(tiny_network(), args, train_dataset=Crops(), data_collator=MasksOfTheImage())


def test_last_layer_stands_still_while_it_is_frozen(tmp_path):
    recorder, start = Recorder(), tiny_network().student["dino_head"]
    trained(tmp_path, callbacks=[recorder], freeze_last_layer_steps=3, warmup_steps=0)
    last, first = "student.dino_head.last_layer.weight_v", "student.dino_head.mlp.0.weight"
    assert torch.equal(recorder.weights[2][last], start.last_layer.weight_v)
    assert not torch.equal(recorder.weights[2][first], start.mlp[0].weight)
    assert not torch.equal(recorder.weights[3][last], start.last_layer.weight_v)


def test_schedules_reach_optimizer_teacher_and_log(tmp_path):
    rates = []

    class Spy(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            group = max(optimizer.param_groups, key=lambda group: (group["lr_multiplier"], group["wd_multiplier"]))
            rates.append((group["lr"], group["weight_decay"], model.teacher_temperature))

    trainer = trained(tmp_path, callbacks=[Spy()], logging_steps=1, freeze_last_layer_steps=0)
    schedules = trainer.args.schedules(6)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step in range(6):
        values = schedules.at(step)
        assert rates[step] == (values.learning_rate, values.weight_decay, values.teacher_temperature)
        assert logged[step]["learning_rate"] == values.learning_rate
        assert logged[step]["teacher_momentum"] == values.teacher_momentum
        parts = sum(value for name, value in logged[step].items() if name.endswith("_loss"))
        assert logged[step]["loss"] == pytest.approx(parts, rel=1e-5)
        assert logged[step]["images_per_second"] > 0
        assert {"grad_norm_backbone", "grad_norm_dino_head", "teacher_entropy"} <= logged[step].keys()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):

    with pytest.raises(FloatingPointError, match=r"at step 2 .*koleo_loss"):
        trained(tmp_path, callbacks=[PoisonAt(2, "student.backbone.layernorm.weight")])


def test_the_optimizer_moves_the_student_and_only_the_average_the_teacher(tmp_path):
    start = tiny_network()
    trainer = trained(tmp_path, teacher_momentum=0.9, warmup_steps=0)
    name = "backbone.layers.0.mlp.fc1.weight"
    student, teacher, before = (
        dict(half.named_parameters())[name] for half in (trainer.model.student, trainer.model.teacher, start.student)
    )
    moved, followed = (student - before).norm(), (teacher - before).norm()
    assert 0 < followed < moved


def test_a_frozen_backbone_shares_no_group_with_the_heads(tmp_path):
    network = tiny_network()
    network.student_backbone.embeddings.cls_token.requires_grad_(False)
    names = dict(network.student.named_parameters())
    groups = parameter_groups(network.student, parameter_rules(names, num_layers=2))  # one rate for everything
    assert (
        sum(len(group["params"]) for group in groups) == len(names) - 1
    )  # parameters without gradient are in no group
    optimizer = torch.optim.AdamW(groups)
    set_rates(optimizer, arguments(tmp_path, warmup_steps=0).schedules(10).at(2), freeze_backbone=True)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in names.items():
        if parameter.requires_grad:
            assert (rates[id(parameter)] == 0) == name.startswith("backbone."), name


def test_set_rates_freezes_only_the_last_layer(tmp_path):
    network = tiny_network()
    names = [name for name, _ in network.student.named_parameters()]
    optimizer = torch.optim.AdamW(parameter_groups(network.student, parameter_rules(names, num_layers=2)))
    set_rates(optimizer, arguments(tmp_path, freeze_last_layer_steps=4, warmup_steps=0).schedules(10).at(2))
    assert {group["lr"] == 0 for group in optimizer.param_groups if group["is_last_layer"]} == {True}
    assert {group["lr"] == 0 for group in optimizer.param_groups if not group["is_last_layer"]} == {False}


# ---- Arguments ----


def test_arguments_are_checked(tmp_path):
    for overrides, message in (
        ({"global_crop_scale": [0.5, 0.2]}, "global_crop_scale is"),
        ({"mask_ratio": [0.1]}, "mask_ratio is"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"optim": "sgd"}, "optim is"),
        ({"per_device_train_batch_size": 1}, "koleo_loss_weight=0"),
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type is 'linear'; .* --schedule"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "save_strategy is 'best'"),
        ({"blur_sigma": [0.1]}, r"blur_sigma is \[0.1\]"),
        ({"teacher_momentum": 1.5}, "teacher_momentum is 1.5"),
        ({"mask_probability": 2}, "mask_probability is 2"),
        ({"teacher_temperature": 0.0}, "teacher_temperature is 0.0"),
        ({"monitor_steps": -1}, "monitor_steps is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments(tmp_path, **overrides)


def test_every_argument_has_a_help_text_and_the_parser_reads_them():
    own = PretrainingArguments.own_options()
    fields = PretrainingArguments.__dataclass_fields__
    assert [name for name in own if not fields[name].metadata.get("help")] == []
    (args,) = HfArgumentParser(PretrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", "runs/x", "--global_crop_scale", "0.4", "1.0", "--hidden_size", "96", "--use_cpu"]
    )
    assert args.global_crop_scale == [0.4, 1.0]
    assert args.hidden_size == 96
    assert args.backbone_config().use_mask_token


def test_resolved_recipe_makes_the_same_arguments(tmp_path):
    args = arguments(tmp_path, max_grad_norm=1.5, adam_beta2=0.99, centering="sinkhorn")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(args.resolved()))
    (again,) = HfArgumentParser(PretrainingArguments).parse_yaml_file(str(path), allow_extra_keys=False)
    assert again.resolved() == args.resolved()
    assert (again.max_grad_norm, again.adam_beta2, again.centering) == (1.5, 0.99, "sinkhorn")


# ---- The job ----


def test_pretrain_writes_everything_and_returns_the_teacher(tmp_path):
    args = arguments(tmp_path, separate_ibot_head=True, ibot_head_num_prototypes=8, ibot_head_bottleneck_size=4)
    teacher = pretrain(args, train_dataset=Crops())
    assert isinstance(teacher, RegViTModel)
    assert not teacher.training
    loaded = AutoModel.from_pretrained(tmp_path / "backbone")
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).last_hidden_state, teacher(pixels).last_hidden_state)
    assert (tmp_path / "backbone" / "preprocessor_config.json").is_file()
    student = load_file(tmp_path / "training" / "student.safetensors")
    heads = load_file(tmp_path / "training" / "teacher_heads.safetensors")
    centers = load_file(tmp_path / "training" / "centers.safetensors")
    assert student["ibot_head.last_layer.weight_v"].shape == (8, 4)
    assert "dino_head.mlp.0.weight" in heads
    assert centers["ibot_center.center"].shape == (8,)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]
    recipe = yaml.safe_load((tmp_path / "resolved_recipe.yaml").read_text())
    assert recipe["head_num_prototypes"] == 12
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["steps"], report["images_seen"]) == (6, 18)
    assert report["parameters"]["backbone"] == sum(p.numel() for p in teacher.parameters())


def test_pretrain_continues_from_a_backbone_without_mask_token(tmp_path):
    torch.manual_seed(3)
    backbone = RegViTModel(tiny_config(use_mask_token=False))
    before = copy.deepcopy(backbone.state_dict())
    teacher = pretrain(arguments(tmp_path, max_steps=1, warmup_steps=0), model=backbone, train_dataset=Crops())
    assert same_state(before, backbone.state_dict())
    # One step at momentum 0.992 hardly moves the teacher.
    torch.testing.assert_close(
        teacher.embeddings.register_tokens, before["embeddings.register_tokens"], atol=1e-4, rtol=0
    )
    assert teacher.config.use_mask_token


def test_pretrain_resumes_from_the_last_checkpoint_and_keeps_one_line_per_step(tmp_path):
    save = {"save_strategy": "steps", "save_steps": 4, "resume_from_checkpoint": "last", "logging_steps": 1}

    whole = pretrain(arguments(tmp_path / "a", **save), train_dataset=Crops())
    pretrain(arguments(tmp_path / "b", **save), train_dataset=Crops(), callbacks=[StopAt(5)])
    resumed = pretrain(arguments(tmp_path / "b", **save), train_dataset=Crops())
    assert same_state(whole.state_dict(), resumed.state_dict())
    lines = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_refused_resume_leaves_the_record_of_the_run(tmp_path):
    save = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    pretrain(arguments(tmp_path, **save), train_dataset=Crops())
    recipe = (tmp_path / "resolved_recipe.yaml").read_text()
    with pytest.raises(ValueError, match="another model: size mismatch"):
        pretrain(
            arguments(tmp_path, head_num_prototypes=20, resume_from_checkpoint="last", **save), train_dataset=Crops()
        )
    assert (tmp_path / "resolved_recipe.yaml").read_text() == recipe


@pytest.mark.slow
def test_the_report_counts_the_time_before_a_resume(tmp_path):
    save = {"save_strategy": "steps", "save_steps": 2}
    pretrain(arguments(tmp_path, max_steps=2, **save), train_dataset=Crops())
    first = json.loads((tmp_path / "checkpoint-2" / "resume_state.json").read_text())["seconds"]
    assert 0 < first <= json.loads((tmp_path / "report.json").read_text())["seconds"]
    state = tmp_path / "checkpoint-2" / "resume_state.json"
    state.write_text(state.read_text().replace(f'"seconds": {first}', '"seconds": 5000.0'))
    write_manifest(tmp_path / "checkpoint-2")
    pretrain(arguments(tmp_path, max_steps=4, resume_from_checkpoint="last", **save), train_dataset=Crops())
    assert 5000 < json.loads((tmp_path / "report.json").read_text())["seconds"] < 5100


def test_a_run_says_how_long_it_is_and_what_does_not_fit_its_length(tmp_path, caplog):
    with caplog.at_level("INFO", logger="hf_regvit"):
        options = {"learning_rate": 0.5, "learning_rate_reference_batch": 1024}
        pretrain(arguments(tmp_path, max_steps=4, warmup_steps=50, **options), train_dataset=Crops())
    rate = 0.5 * (3 / 1024) ** 0.5
    expected = f"4 steps of 3 images, 1.333 epochs. The learning rate rises to {rate:.4g} within 50 steps."
    assert expected in caplog.messages
    warning = "warmup_steps is 50, longer than the run of 4 steps. Use a value below 1 to give a fraction of the run."
    assert warning in caplog.text
    assert "freeze_last_layer_steps is" not in caplog.text


def test_pretrain_refuses_less_than_one_batch(tmp_path):
    with pytest.raises(ValueError, match="There are 2 training images for steps of 3"):
        pretrain(arguments(tmp_path), train_dataset=Crops(2))


def test_pretrain_builds_its_own_data(tmp_path):
    """Built-in digits through the real multi-crop and mask code."""
    args = arguments(
        tmp_path,
        data="digits",
        max_steps=2,
        global_crop_size=24,
        patch_size=8,
        local_crop_size=16,
        evaluation_size=32,
    )
    teacher = pretrain(args)
    assert teacher.config.image_size == 24
    processor = json.loads((tmp_path / "backbone" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 32}
    assert processor["crop_size"] == {"height": 32, "width": 32}


def test_crops_have_the_values_of_an_image_processor_without_normalization(tmp_path, monkeypatch):
    from hf_regvit.models.processing import default_image_processor

    processor = default_image_processor(16)
    processor.do_normalize, processor.image_mean, processor.image_std = False, None, None
    forward = spy(monkeypatch, SelfDistillation, "forward")
    pretrain(arguments(tmp_path, data="digits", max_steps=1, monitor_steps=1), image_processor=processor)
    pixels = forward.call_args.kwargs["global_crops"]
    assert 0 <= pixels.min() < pixels.max() <= 1


def test_pretrain_ends_on_larger_crops(tmp_path, monkeypatch):
    forward = spy(monkeypatch, SelfDistillation, "forward")
    args = arguments(
        tmp_path,
        data="digits",
        max_steps=4,
        global_crop_size=24,
        patch_size=8,
        local_crop_size=16,
        high_resolution_steps=0.5,
        high_resolution_size=32,
    )
    pretrain(args)
    assert [call.kwargs["global_crops"].shape[-1] for call in forward.call_args_list] == [24, 24, 32, 32]
    assert json.loads((tmp_path / "backbone" / "preprocessor_config.json").read_text())["crop_size"]["height"] == 32


# ---- Observers ----


def test_features_are_cls_and_mean_patch():
    from hf_regvit.models.processing import default_image_processor

    backbone, images = tiny_network().teacher["backbone"], [noise(i, (16, 16)) for i in range(5)]
    processor = default_image_processor(16)
    features = backbone_features(backbone, images, image_processor=processor, batch_size=2)
    outputs = backbone(processor(images=images[3:4], return_tensors="pt")["pixel_values"])
    expected = torch.cat([outputs.pooler_output[0], outputs.patch_tokens[0].mean(0)])
    assert features.shape == (5, 32)
    torch.testing.assert_close(features[3], expected)


def test_online_knn_logs_the_teacher_and_changes_nothing(tmp_path):
    from hf_regvit.models.processing import default_image_processor

    labeled = list(zip([noise(i, (16, 16)) for i in range(8)], [0, 1] * 4, strict=True))
    knn = OnlineKNN(labeled, labeled, image_processor=default_image_processor(16), every_steps=4, k=1)
    with_knn = trained(tmp_path / "a", callbacks=[knn, MetricsFile(tmp_path / "metrics.jsonl")])
    measured = [(entry["step"], entry["eval_knn_1"]) for entry in with_knn.state.log_history if "eval_knn_1" in entry]
    # Held-out images are the training images: the nearest neighbor is the image itself.
    assert measured == [(0, 1.0), (4, 1.0), (6, 1.0)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_knn_1" in line] == [0, 4, 6]
    without = trained(tmp_path / "b")
    assert same_state(with_knn.model.state_dict(), without.model.state_dict())


def test_progress_bar_shows_loss_and_speed(tmp_path, capsys):
    trainer = trained(tmp_path, disable_tqdm=False)
    shown = capsys.readouterr()
    assert any(isinstance(callback, TrainingProgress) for callback in trainer.callback_handler.callbacks)
    assert "images/s=" in shown.err
    assert "loss=" in shown.err
    assert "{'" not in shown.out + shown.err
