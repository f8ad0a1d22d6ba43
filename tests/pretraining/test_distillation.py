"""Training step: the same numbers as a plain forward and plain losses, with less computation and memory."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.multiprocessing as mp

import oracles
from builders import gradients_of
from hf_regvit import RegViTModel
from hf_regvit.pretraining.distillation import HeadShape, PrototypeHead, SelfDistillation, TeacherTargets
from hf_regvit.pretraining.losses import koleo_loss
from losses_on_logits import dino_loss, ibot_loss, student_outputs
from tiny_run import GRID, PATCH, SHAPE, same_state, tiny_batch, tiny_config, tiny_network, trained

MODES = [("batch_subset", 0.5), ("sample", 0.4), ("batch_subset", 0.0)]  # of five samples: not a half is kept
SIZE = GRID * PATCH


# ---- Tokens that a loss reads ----


@pytest.mark.parametrize(("mode", "rate"), MODES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fields", [{}, {"layerscale_value": None, "use_swiglu_ffn": True, "num_register_tokens": 0}])
def test_tokens_read_equal_those_of_the_whole_last_block(mode, rate, training, fields):
    torch.manual_seed(0)
    config = tiny_config(drop_path_rate=rate, drop_path_mode=mode, **fields)
    backbone = RegViTModel(config).double().train(training)
    pixels = torch.randn(5, 3, SIZE, SIZE, dtype=torch.float64)
    masks = torch.rand(5, GRID**2) < 0.3
    patches = torch.tensor([3, 17, 16, 79, 40, 41])  # of the flattened (5, 16), in any order

    results = []
    for whole in (True, False):
        torch.manual_seed(3)  # attention and MLP of the last block then keep unlike samples
        if whole:
            output = backbone(pixels, bool_masked_pos=masks)
            cls, rows = output.pooler_output, output.patch_tokens.flatten(0, 1)[patches]
        else:
            cls, rows = SelfDistillation._tokens(backbone, pixels, patches, masks)
        weights = torch.linspace(-1, 1, cls.numel() + rows.numel(), dtype=torch.float64)
        loss = (torch.cat([cls, rows]).flatten() * weights).sum()
        results.append((cls, rows, gradients_of(loss, backbone)))
    for expected, actual in zip(*results, strict=True):
        if isinstance(expected, dict):
            for name, gradient in expected.items():
                torch.testing.assert_close(actual[name], gradient, atol=1e-12, rtol=1e-10, msg=name)
        else:
            torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-10)


def test_the_last_block_computes_no_other_token():
    network, batch = tiny_network(), tiny_batch()
    rows = []
    hook = network.student_backbone.layers[-1].mlp.register_forward_hook(lambda *args: rows.append(args[2].shape))
    network(**batch)
    hook.remove()
    # 6 global CLS with 5 masked patches, then 6 local CLS.
    assert rows == [(6 + 5, 16), (6, 16)]


def test_a_backbone_of_one_block():
    network = tiny_network(config=tiny_config(num_hidden_layers=1))
    loss = network(**tiny_batch())["loss"]
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("fields", [{"final_norm": "pooled"}, {"pooler_act": "tanh"}])
def test_backbones_whose_cls_is_something_else_are_refused(fields):
    with pytest.raises(ValueError, match="after the final norm"):
        tiny_network(config=tiny_config(**fields))


def test_targets_can_be_used_where_gradients_are_recorded():
    """The teacher runs in inference mode, whose tensors a backward pass rejects; its targets are ordinary tensors."""
    network, batch = tiny_network(paka_loss_weight=1.0), tiny_batch()
    one = network.teacher_targets(batch["global_crops"], batch["mask_indices"])
    (joint,) = network.joint_targets([batch])
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in (*one, *joint))
    assert all(torch.equal(single, other) for single, other in zip(one, joint, strict=True))


@pytest.mark.parametrize("gram_loss_weight", [0.0, 1.0])
def test_only_the_student_is_ever_in_training_mode(gram_loss_weight):
    network = tiny_network(config=tiny_config(drop_path_rate=0.5), gram_loss_weight=gram_loss_weight)
    network.train()  # as Trainer does before every step
    frozen = [network.teacher, *([] if network.gram_teacher is None else [network.gram_teacher])]
    assert all(module.training for module in network.student.modules())
    assert not any(module.training for part in frozen for module in part.modules())


def test_centers_do_not_move_by_what_is_only_evaluated():
    network = tiny_network(centering="softmax").eval()
    network(**tiny_batch())
    assert not any(center.pending_count for center in (network.dino_center, network.ibot_center))
    network.train()
    network(**tiny_batch())
    assert all(center.pending_count for center in (network.dino_center, network.ibot_center))


def test_heads_start_as_in_the_released_code():
    torch.manual_seed(0)
    head = PrototypeHead(64, HeadShape(num_prototypes=300, hidden_size=96, bottleneck_size=36, num_layers=3))
    for layer in head.mlp[::2]:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not layer.bias.any()
    assert torch.equal(head.last_layer.weight_g, torch.ones(300, 1))
    assert head.last_layer.weight_v.abs().max().item() == pytest.approx(1 / 6, rel=1e-3)
    assert head.last_layer.weight_v.std().item() == pytest.approx(1 / 6 / math.sqrt(3), rel=0.03)


def test_a_head_in_half_precision_survives_a_zero_bottleneck():
    head = PrototypeHead(16, SHAPE).half()
    logits = head(torch.zeros(2, 16, dtype=torch.float16))  # zero biases: the bottleneck is zero
    assert torch.equal(logits, torch.zeros(2, SHAPE.num_prototypes))


# ---- Losses without logits ----


@pytest.mark.parametrize(("centering", "num_local"), [("softmax", 0), ("softmax", 3), ("sinkhorn", 3)])
@pytest.mark.parametrize("ibot_head", [None, SHAPE])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.0, 1.0), (1.0, 0.0)])
def test_step_equals_the_losses_on_stored_logits(centering, ibot_head, num_local, weights):
    dino, ibot = weights
    network = tiny_network(
        centering=centering, ibot_head=ibot_head, dino_loss_weight=dino, ibot_loss_weight=ibot, koleo_loss_weight=0.2
    ).double()
    batch = tiny_batch(num_local=num_local)
    batch = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    network.begin_step(0.05)
    targets = network.teacher_targets(batch["global_crops"], batch["mask_indices"])
    student = student_outputs(network, batch)
    divisor = max(2 * num_local, 1) + 2
    expected = 0.2 * (koleo_loss(student.cls_features[0]) + koleo_loss(student.cls_features[1]))
    if dino:
        across = dino_loss(student.global_logits[[0]], targets.cls[[1]])
        across = across + dino_loss(student.global_logits[[1]], targets.cls[[0]])
        local = dino_loss(student.local_logits, targets.cls) if num_local else 0
        expected = expected + dino * (across + local) / divisor
    if ibot:
        expected = expected + ibot * ibot_loss(
            student.masked_logits, targets.masked, batch["mask_weights"], num_crops=6
        )
    tied = sum(logits[:0].sum() for logits in (student.global_logits, student.masked_logits))
    reference = gradients_of(expected + tied, network.student)
    loss = network(**batch)["loss"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # targets are float32
    for name, gradient in gradients_of(loss, network.student).items():
        torch.testing.assert_close(gradient, reference[name], atol=1e-8, rtol=1e-5, msg=name)


def test_every_setting_of_the_losses_reaches_them():
    other = dataclasses.replace(SHAPE, num_prototypes=7)
    network = tiny_network(
        ibot_head=other,
        center_momentum=0.3,
        student_temperature=0.2,
        dino_loss_weight=0.9,
        ibot_loss_weight=0.6,
        koleo_loss_weight=0.2,
        koleo_neighbours=2,
    )
    batch = tiny_batch(num_local=3)
    targets = network.teacher_targets(batch["global_crops"], batch["mask_indices"])
    student = student_outputs(network, batch)
    terms = network(**batch)
    t = 0.2
    across = oracles.dino_loss(student.global_logits[[0]], targets.cls[[1]], t)
    across += oracles.dino_loss(student.global_logits[[1]], targets.cls[[0]], t)
    koleo = sum(oracles.koleo_loss(crop, neighbors=2) for crop in student.cls_features)
    masked = ibot_loss(
        student.masked_logits, targets.masked, batch["mask_weights"], num_crops=6, student_temperature=t
    )
    expected = {
        "dino_global_loss": 0.9 * across / 8,
        "dino_local_loss": 0.9 * oracles.dino_loss(student.local_logits, targets.cls, t) / 8,
        "ibot_loss": 0.6 * masked.item(),
        "koleo_loss": 0.2 * koleo,
    }
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-5), name
    assert terms["loss"].item() == pytest.approx(sum(expected.values()), rel=1e-5)
    for center, count in ((network.dino_center, 12), (network.ibot_center, 7)):
        assert (center.momentum, center.center.shape) == (0.3, (count,))


def test_a_network_without_any_loss_is_refused():
    off = {f"{name}_loss_weight": 0.0 for name in ("dino", "ibot", "koleo")}
    with pytest.raises(
        ValueError, match=r"\(0.0, 0.0, 0.0, 0.0, 0.0\); expected none below 0 and at least one above 0"
    ):
        tiny_network(**off)
    with pytest.raises(ValueError, match="none below 0"):
        tiny_network(ibot_loss_weight=-1.0)


def test_koleo_is_told_to_look_at_other_processes(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "hf_regvit.pretraining.distillation.koleo_loss",
        lambda crop, **how: asked.append(how["gathered"]) or crop.sum() * 0,
    )
    for gathered in (True, False):
        tiny_network(koleo_gathered=gathered)(**tiny_batch())
    assert asked == [True, True, False, False]  # once a global crop


def test_what_is_told_of_the_targets_equals_its_loop():
    network, batch = tiny_network(), tiny_batch(num_local=3)
    generator = torch.Generator().manual_seed(0)
    probabilities = (4 * torch.randn(2, 3, 12, generator=generator)).softmax(-1)  # sharp and distinct
    student = student_outputs(network, batch).global_logits
    told = network(**batch, targets=TeacherTargets(probabilities, torch.full((5, 12), 1 / 12)))

    def entropy(row):
        return -sum(p * math.log(p) for p in row if p > 0)

    rows = probabilities.flatten(0, 1).tolist()
    single = sum(map(entropy, rows)) / len(rows)
    crossed = probabilities.flip(0).flatten(0, 1).tolist()
    pairs = zip(crossed, student.flatten(0, 1).tolist(), strict=True)
    divergence = sum(oracles.cross_entropy(row, logits, 0.1) for row, logits in pairs) / len(rows) - single
    marginal = entropy([sum(column) / len(rows) for column in zip(*rows, strict=True)])
    assert marginal > single + 0.05
    assert told["teacher_entropy"].item() == pytest.approx(single, rel=1e-4)
    assert told["teacher_marginal_entropy"].item() == pytest.approx(marginal, rel=1e-4)
    assert told["teacher_student_kl"].item() == pytest.approx(divergence, rel=1e-4)
    assert told["used_prototypes"].item() == len({row.index(max(row)) for row in rows})


def test_nothing_as_large_as_the_logits_is_kept_for_the_backward_pass():
    network = tiny_network(dino_head=dataclasses.replace(SHAPE, num_prototypes=500))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda t: t
    ):
        network(**tiny_batch())["loss"].backward()
    assert (500, 6) in kept  # the prototypes
    assert not [shape for shape in kept if shape[-1:] == (500,) and len(shape) > 1]


def test_autocast_leaves_losses_targets_and_last_layer_in_float32():
    network, batch = tiny_network(), tiny_batch()
    exact = network(**batch)
    exact["loss"].backward()
    plain = {name: parameter.grad.clone() for name, parameter in network.student.named_parameters()}
    network.zero_grad()
    seen = []
    head = network.student["dino_head"]
    head.last_layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        targets = network.teacher_targets(batch["global_crops"], batch["mask_indices"])
        outputs = network(**batch)
    assert seen == [torch.bfloat16]  # the input is rounded, but the computation is not
    assert all(tensor.dtype == torch.float32 for tensor in (*targets[:2], *outputs.values()))
    torch.testing.assert_close(targets.cls.sum(-1), torch.ones(2, 3))
    for name, value in outputs.items():
        assert value.item() == pytest.approx(exact[name].item(), rel=0.05, abs=0.05), name
    outputs["loss"].backward()
    for name, parameter in network.student.named_parameters():
        assert parameter.grad.dtype == torch.float32
        if plain[name].norm() > 1e-2:
            similarity = torch.cosine_similarity(parameter.grad.flatten(), plain[name].flatten(), dim=0)
            assert similarity > 0.98, name


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_activation_checkpointing_changes_no_bit(drop_path):
    config = tiny_config(drop_path_rate=drop_path, drop_path_mode="batch_subset")
    network, batch = tiny_network(config=config), tiny_batch()

    torch.manual_seed(3)
    plain = gradients_of(network(**batch)["loss"], network.student)
    network.gradient_checkpointing_enable()
    torch.manual_seed(3)
    for name, gradient in gradients_of(network(**batch)["loss"], network.student).items():
        torch.testing.assert_close(gradient, plain[name], atol=0, rtol=0, msg=name)


def test_the_option_for_activation_checkpointing_works_in_a_run(tmp_path):
    plain = trained(tmp_path / "a", max_steps=2)
    name = "activation_checkpointing" if hasattr(plain.args, "activation_checkpointing") else "gradient_checkpointing"
    recomputed = trained(tmp_path / "b", max_steps=2, **{name: True})
    layers = (*recomputed.model.student_backbone.layers, *recomputed.model.teacher_backbone.layers)
    assert [layer.gradient_checkpointing for layer in layers] == [True, True, False, False]
    assert same_state(plain.model.state_dict(), recomputed.model.state_dict())


@pytest.mark.slow
def test_compiled_blocks_give_the_same_numbers_under_the_same_names():
    config = tiny_config(drop_path_rate=0.4, drop_path_mode="batch_subset", num_hidden_layers=1)
    network, batch = tiny_network(config=config, gram_loss_weight=1.0), tiny_batch()
    names = list(network.state_dict())
    results = []
    for compiled in (False, True):
        if compiled:
            network.compile_blocks(backend="aot_eager", fullgraph=True)
        torch.manual_seed(3)
        loss = network(**batch)["loss"]
        results.append((loss.item(), gradients_of(loss, network.student)))
    assert list(network.state_dict()) == names
    (plain, expected), (again, actual) = results
    assert again == pytest.approx(plain, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_the_option_for_compiling_compiles_the_blocks_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # the argument sets it; the fixture restores it
    plain = trained(tmp_path / "plain", max_steps=2)
    compiled = trained(tmp_path / "compiled", max_steps=2, torch_compile=True, torch_compile_backend="aot_eager")
    assert type(compiled.model_wrapped) is SelfDistillation
    assert all(layer._compiled_call_impl is not None for layer in compiled.model.student_backbone.layers)
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


# ---- Gram anchoring ----


def apart(**options):
    """Return a network whose student and teacher differ."""
    network = tiny_network(**options)
    with torch.no_grad():
        for parameter in network.student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def gram_network():
    return apart(gram_loss_weight=2.0)


def test_gram_term_equals_its_loop():
    network, batch = gram_network(), tiny_batch()
    student = network.student_backbone(
        batch["global_crops"].flatten(0, 1), bool_masked_pos=batch["masks"].flatten(0, 1)
    )
    anchor = network.gram_teacher(batch["global_crops"].flatten(0, 1))
    outputs = network(**batch)
    expected = oracles.gram_loss(student.patch_tokens.detach(), anchor.patch_tokens)
    assert outputs["gram_loss"].item() == pytest.approx(2 * expected, rel=1e-4)
    terms = [value.item() for name, value in outputs.items() if name.endswith("_loss")]
    assert outputs["loss"].item() == pytest.approx(sum(terms), rel=1e-6)


def test_gram_leaves_the_other_terms_as_they_are():
    batch = tiny_batch()
    without, with_gram = tiny_network()(**batch), tiny_network(gram_loss_weight=1.0)(**batch)
    for name, value in without.items():
        if name != "loss":
            torch.testing.assert_close(with_gram[name], value)


def test_gram_teacher_stands_still_until_it_is_refreshed():
    network, batch = gram_network(), tiny_batch()
    start = {name: tensor.clone() for name, tensor in network.gram_teacher.state_dict().items()}
    assert not any(parameter.requires_grad for parameter in network.gram_teacher.parameters())
    network.train()
    assert not network.gram_teacher.training
    network(**batch)["loss"].backward()
    assert all(parameter.grad is None for parameter in network.gram_teacher.parameters())
    network.update_teacher(0.5)
    for name, tensor in network.gram_teacher.state_dict().items():
        assert torch.equal(tensor, start[name])
    network.refresh_gram_teacher()
    teacher = network.teacher_backbone.state_dict()
    for name, tensor in network.gram_teacher.state_dict().items():
        assert torch.equal(tensor, teacher[name])
    assert not torch.equal(teacher["layernorm.bias"], start["layernorm.bias"])


def test_larger_gram_crops_are_brought_to_the_grid_of_the_student():
    network, batch = gram_network(), tiny_batch()
    large = torch.nn.functional.interpolate(batch["global_crops"].flatten(0, 1), scale_factor=2).unflatten(0, (2, 3))
    outputs = network(**batch, gram_crops=large)
    student = network.student_backbone(
        batch["global_crops"].flatten(0, 1), bool_masked_pos=batch["masks"].flatten(0, 1)
    )
    patches = network.gram_teacher(large.flatten(0, 1)).patch_tokens  # (6, 64, 16)
    maps = patches.transpose(1, 2).reshape(6, 16, 2 * GRID, 2 * GRID)
    maps = torch.nn.functional.interpolate(maps, size=(GRID, GRID), mode="bicubic", align_corners=False)
    anchor = torch.stack([maps[:, :, row, column] for row, column in itertools.product(range(GRID), repeat=2)], dim=1)
    expected = oracles.gram_loss(student.patch_tokens.detach(), anchor)
    assert outputs["gram_loss"].item() == pytest.approx(2 * expected, rel=1e-4)


def test_without_gram_there_is_no_third_network():
    network = tiny_network()
    assert network.gram_teacher is None
    assert not [name for name in network.state_dict() if name.startswith("gram")]


# ---- Patch kernel alignment, visible patches, average of the heads ----


def test_paka_term_equals_its_loop():
    network, batch = apart(paka_loss_weight=0.7), tiny_batch()
    crops = batch["global_crops"].flatten(0, 1)
    student = network.student_backbone(crops, bool_masked_pos=batch["masks"].flatten(0, 1)).patch_tokens.detach()
    outputs = network(**batch)
    expected = oracles.paka_loss(student, network.teacher_backbone(crops).patch_tokens)
    assert outputs["paka_loss"].item() == pytest.approx(0.7 * expected, rel=1e-4)
    terms = [value.item() for name, value in outputs.items() if name.endswith("_loss")]
    assert outputs["loss"].item() == pytest.approx(sum(terms), rel=1e-6)


@pytest.mark.parametrize("ibot_head", [None, SHAPE])
@pytest.mark.parametrize("masked", [True, False])
def test_visible_patches_are_taught_as_in_a_loop(masked, ibot_head):
    network = apart(ibot_visible_patches=True, ibot_loss_weight=0.6, ibot_head=ibot_head, paka_loss_weight=0.1)
    batch = tiny_batch(masked=masked)
    crops, masks = batch["global_crops"].flatten(0, 1), batch["masks"].flatten(0, 1)
    with torch.no_grad():
        student = network.student_backbone(crops, bool_masked_pos=masks).patch_tokens
        logits, targets = (
            part[("dino" if ibot_head is None else "ibot") + "_head"](tokens.flatten(0, 1)).unflatten(0, (6, -1))
            for part, tokens in (
                (network.student, student), (network.teacher, network.teacher_backbone(crops).patch_tokens)
            )
        )  # fmt: skip
    targets = (targets / network.teacher_temperature).softmax(-1)  # the center is still zero
    expected = {"ibot_loss": 0.0, "ibot_visible_loss": 0.0}
    for crop, patch in itertools.product(range(6), range(GRID**2)):
        row = oracles.cross_entropy(targets[crop, patch].tolist(), logits[crop, patch].tolist(), 0.1)
        expected["ibot_loss" if masks[crop, patch] else "ibot_visible_loss"] += 0.6 * row / GRID**2 / 6
    outputs = network(**batch)
    for name, value in expected.items():
        assert outputs[name].item() == pytest.approx(value, rel=1e-4, abs=1e-9), name
    terms = [value.item() for name, value in outputs.items() if name.endswith("_loss")]
    assert outputs["loss"].item() == pytest.approx(sum(terms), rel=1e-6)
    assert network.ibot_center.pending_count == 6 * GRID**2


OPTIONS = [
    ({"paka_loss_weight": 1.0}, {"paka_loss"}, set()),
    ({"ibot_visible_patches": True}, {"ibot_visible_loss"}, {"ibot_loss"}),
    ({"average_heads_only": True}, set(), set()),
]


@pytest.mark.parametrize(("options", "added", "changed"), OPTIONS)
def test_optional_objectives_leave_the_other_terms_as_they_are(options, added, changed):
    batch = tiny_batch()
    without, off, on = (apart(**chosen)(**batch) for chosen in ({}, dict.fromkeys(options, 0), options))
    assert same_state(without, off)
    assert on.keys() - off.keys() == added
    for name in off.keys() - {"loss"} - changed:
        torch.testing.assert_close(on[name], off[name])


def test_only_the_heads_of_the_teacher_are_averages():
    network = apart(average_heads_only=True, ibot_head=SHAPE)
    start = {name: tensor.clone() for name, tensor in network.teacher.state_dict().items()}
    network.update_teacher(0.9)
    student = network.student.state_dict()
    for name, tensor in network.teacher.state_dict().items():
        expected = student[name] if name.startswith("backbone.") else 0.9 * start[name] + 0.1 * student[name]
        torch.testing.assert_close(tensor, expected, atol=0 if name.startswith("backbone.") else 1e-6, rtol=0)
    assert not any(module.training for module in network.teacher.modules())


def test_a_run_with_all_optional_objectives_resumes_bit_for_bit(tmp_path):
    options = {name: value for chosen, *_ in OPTIONS for name, value in chosen.items()}
    save = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "warmup_steps": 0, "options": options}
    whole = trained(tmp_path / "a", **save)
    resumed = trained(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-2"), **save)
    assert same_state(whole.model.state_dict(), resumed.model.state_dict())
    assert same_state(whole.model.teacher_backbone.state_dict(), whole.model.student_backbone.state_dict())
    logged = [line for line in whole.state.log_history if "loss" in line]
    assert all({"paka_loss", "ibot_visible_loss"} <= line.keys() for line in logged)


# ---- KoLeo over all processes ----


def _run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = koleo_loss(features[3 * rank : 3 * rank + 3], gathered=True, neighbors=2)
    loss.backward()
    torch.save((loss.detach(), features.grad), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_gathered_koleo_of_two_processes_equals_one(tmp_path):
    mp.spawn(_run_rank, args=(str(tmp_path),), nprocs=2)
    losses, grads = zip(*(torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)), strict=True)
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = koleo_loss(features, neighbors=2)
    loss.backward()
    # Data parallelism takes the mean over the processes.
    torch.testing.assert_close(sum(losses) / 2, loss.detach())
    torch.testing.assert_close(sum(grads) / 2, features.grad)
    assert loss.item() == pytest.approx(oracles.koleo_loss(features.detach(), neighbors=2), rel=1e-5)
