"""Two training steps, schedules and parameter groups against numbers of the official code (`golden/ssl`, `train`)."""

import pytest
import torch

from helpers import assert_golden, golden_json, load_golden, regvit_name, requires_shared, subtree
from hf_regvit import RegViTConfig, RegViTModel
from hf_regvit.pretraining.arguments import PretrainingArguments
from hf_regvit.pretraining.distillation import HeadShape, PrototypeHead, SelfDistillation
from hf_regvit.pretraining.schedules import Schedules, StepValues, cosine_schedule, parameter_groups, set_rates
from hf_regvit.training.parameter_groups import parameter_rules
from losses_on_logits import student_outputs

pytestmark = requires_shared

FILES = ["centering_shared_head", "sinkhorn_separate_heads"]


def our_name(official: str) -> str:
    """`backbone.blocks.0.ls1.gamma` -> `backbone.layers.0.layer_scale1.lambda1`; heads keep their names."""
    name = official.removeprefix("backbone.")
    return official if name == official else "backbone." + regvit_name(name)


def renamed(tensors: dict, prefix: str) -> dict:
    return {our_name(name): tensor for name, tensor in subtree(tensors, prefix).items()}


def build(golden: dict, config: dict) -> SelfDistillation:
    cfg, tiny = config["cfg"], config["tiny"]
    backbone = RegViTModel(
        RegViTConfig(
            hidden_size=tiny["embed_dim"],
            num_hidden_layers=tiny["depth"],
            num_attention_heads=tiny["num_heads"],
            image_size=cfg["crops"]["global_crops_size"],
            patch_size=cfg["student"]["patch_size"],
            num_register_tokens=cfg["student"]["num_register_tokens"],
            use_mask_token=True,
        )
    )
    shapes = {
        part: HeadShape(
            num_prototypes=cfg[part]["head_n_prototypes"],
            hidden_size=cfg[part]["head_hidden_dim"],
            bottleneck_size=cfg[part]["head_bottleneck_dim"],
            num_layers=cfg[part]["head_nlayers"],
        )
        for part in ("dino", "ibot")
    }
    network = SelfDistillation(
        backbone,
        dino_head=shapes["dino"],
        ibot_head=shapes["ibot"] if cfg["ibot"]["separate_head"] else None,
        centering="softmax" if cfg["train"]["centering"] == "centering" else "sinkhorn",
    )
    network.student.load_state_dict(renamed(golden, "student.sd."), strict=True)
    network.teacher.load_state_dict(renamed(golden, "teacher.sd."), strict=True)
    return network.double()


def batch_of(golden: dict, step: int, num_local: int) -> dict:
    tensors = subtree(golden, f"in.step{step}.")
    crops = {}
    for kind, count in (("global", 2), ("local", num_local)):
        pixels = tensors[f"collated_{kind}_crops"]
        crops[f"{kind}_crops"] = pixels.unflatten(0, (count, -1))
    return {
        **crops,
        "masks": tensors["collated_masks"].bool().unflatten(0, (2, -1)),
        "mask_indices": tensors["mask_indices_list"],
        "mask_weights": tensors["masks_weight"],
    }


def close(actual, expected, *, atol=2e-5, rtol=1e-4):
    assert_golden(actual.detach(), expected.reshape(actual.shape), atol=atol, rtol=rtol)


def without_key_bias(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Attention does not depend on the key bias; Adam turns the rounding noise of its gradient into whole steps."""
    if not name.endswith("qkv.bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])


@pytest.mark.parametrize("name", FILES)
def test_targets_and_logits_of_the_first_step(name):
    golden, config = load_golden(f"ssl/{name}.safetensors", double=True)
    network = build(golden, config)
    batch = batch_of(golden, 0, config["cfg"]["crops"]["local_crops_number"])
    network.begin_step(config["steps"][0]["teacher_temp"])
    targets = network.teacher_targets(batch["global_crops"], batch["mask_indices"])
    # The official array holds crop 1 first; the softmax at a low temperature is the most sensitive number here.
    close(targets.cls.flip(0), golden["out.step0.teacher_probs"])
    close(targets.masked, golden["out.step0.ibot_teacher_probs"])
    student = student_outputs(network, batch)
    close(student.global_logits.flatten(0, 1), golden["out.step0.student_global_logits"])
    close(student.local_logits, golden["out.step0.student_local_logits"])
    close(student.masked_logits, golden["out.step0.ibot_student_logits"])


@pytest.mark.parametrize("name", FILES)
def test_two_training_steps(name):
    golden, config = load_golden(f"ssl/{name}.safetensors", double=True)
    optim = config["cfg"]["optim"]
    network = build(golden, config)
    rules = parameter_rules(
        [name for name, _ in network.student.named_parameters()],
        num_layers=config["tiny"]["depth"],
        layer_decay=optim["layerwise_decay"],
        patch_embed_lr_multiplier=optim["patch_embed_lr_mult"],
    )
    optimizer = torch.optim.AdamW(parameter_groups(network.student, rules), betas=(0.9, 0.999), eps=1e-8, fused=True)
    for step, values in enumerate(config["steps"]):
        set_rates(
            optimizer,
            StepValues(
                learning_rate=values["lr"],
                last_layer_learning_rate=values["last_layer_lr"],
                weight_decay=values["wd"],
                teacher_momentum=values["momentum"],
                teacher_temperature=values["teacher_temp"],
            ),
        )
        network.begin_step(values["teacher_temp"])
        outputs = network(**batch_of(golden, step, config["cfg"]["crops"]["local_crops_number"]))
        expected = subtree(golden, f"out.step{step}.")
        close(outputs["loss"], expected["total_backpropagated"])
        close(outputs["dino_local_loss"], expected["dino_local_crops_loss"])
        close(outputs["dino_global_loss"], expected["dino_global_crops_loss"])
        # The official log shows half of what these two contribute.
        close(outputs["ibot_loss"], 2 * expected["ibot_loss"])
        close(outputs["koleo_loss"], 2 * expected["koleo_loss"])
        outputs["loss"].backward()
        if step == 0:
            gradients = renamed(golden, "grad.step0.")
            assert gradients.keys() == dict(network.student.named_parameters()).keys()
            for parameter_name, parameter in network.student.named_parameters():
                close(parameter.grad, gradients[parameter_name])
        norms = network.clip_gradients(optim["clip_grad"])
        assert norms.keys() == subtree(expected, "grad_norm.").keys()
        for part, norm in norms.items():
            close(norm, expected[f"grad_norm.{part}"], rtol=1e-5)
        optimizer.step()
        optimizer.zero_grad()
        network.update_teacher(values["momentum"])
        for part in ("dino", "ibot"):
            center = getattr(network, f"{part}_center")
            if center is None:
                assert not expected[f"{part}_center"].any()
            else:
                close(center.center, expected[f"{part}_center"])
    students, teachers = (dict(half.named_parameters()) for half in (network.student, network.teacher))
    final = renamed(golden, "final.student.")
    assert final.keys() == students.keys()
    for parameter_name, parameter in final.items():
        actual = without_key_bias(parameter_name, students[parameter_name])
        close(actual, without_key_bias(parameter_name, parameter), rtol=0)
    for parameter_name, parameter in renamed(golden, "final.teacher.").items():
        actual = without_key_bias(parameter_name, teachers[parameter_name])
        close(actual, without_key_bias(parameter_name, parameter), rtol=0)


def test_cosine_schedule_tables():
    for case in golden_json("cosine_scheduler"):
        renames = {
            "base_value": "base",
            "final_value": "final",
            "total_iters": "total_steps",
            "warmup_iters": "warmup_steps",
            "start_warmup_value": "warmup_start",
            "freeze_iters": "freeze_steps",
        }
        arguments = {renames[key]: value for key, value in case["args"].items()}
        for step, value in enumerate(case["values"]):
            assert cosine_schedule(step, **arguments) == pytest.approx(value, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", ["schedule_vitl16_short", "schedule_vitg14", "schedule_custom_small"])
def test_schedules(name, tmp_path):
    golden = golden_json(name)
    hyper, epoch = golden["hyper"], golden["epoch_length"]
    total = golden["total_iterations"]
    # Durations as shares of the run where that is exact, so that the conversion is tested too.
    arguments = PretrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=golden["global_batch"],
        learning_rate=golden["base_lr"],
        min_learning_rate=hyper["min_lr"],
        warmup_steps=hyper["warmup_epochs"] * epoch,
        freeze_last_layer_steps=hyper["freeze_last_layer_epochs"] * epoch,
        weight_decay=hyper["weight_decay"],
        weight_decay_end=hyper["weight_decay_end"],
        teacher_momentum=hyper["momentum_teacher"],
        teacher_momentum_end=hyper["final_momentum_teacher"],
        warmup_teacher_temperature=hyper["warmup_teacher_temp"],
        teacher_temperature=hyper["teacher_temp"],
        warmup_teacher_temperature_steps=hyper["warmup_teacher_temp_epochs"] * epoch,
    )
    schedules = arguments.schedules(total)
    assert isinstance(schedules, Schedules)
    assert schedules.learning_rate == pytest.approx(golden["lr_after_scaling"], rel=1e-12)
    columns = {
        "learning_rate": "lr",
        "last_layer_learning_rate": "last_layer_lr",
        "weight_decay": "weight_decay",
        "teacher_momentum": "momentum",
        "teacher_temperature": "teacher_temp",
    }
    for row, step in enumerate(golden["iterations"]):
        values = schedules.at(step)._asdict()
        for ours, theirs in columns.items():
            assert values[ours] == pytest.approx(golden[theirs][row], rel=1e-6, abs=1e-12), (ours, step)


@pytest.mark.parametrize("case", ["backbone", "backbone_chunked", "dino_head"])
def test_multipliers_of_every_parameter(case):
    golden = golden_json("param_groups_vits14_reg4")
    expected = {}
    for name, rule in golden[case]["parameters"].items():
        parts = name.split(".")
        if case == "backbone_chunked" and parts[0] == "blocks":
            del parts[1]
        part = "dino_head" if case == "dino_head" else "backbone"
        expected[our_name(".".join([part, *parts]))] = rule
    if case == "dino_head":
        with torch.device("meta"):
            names = [f"dino_head.{name}" for name, _ in PrototypeHead(384, HeadShape()).named_parameters()]
    else:
        sizes = {"patch_size": 14, "image_size": 518, "num_register_tokens": 4, "use_mask_token": True}
        config = RegViTConfig.from_preset("small", **sizes)
        with torch.device("meta"):
            names = [f"backbone.{name}" for name, _ in RegViTModel(config).named_parameters()]
    rules = parameter_rules(
        names,
        num_layers=12,
        layer_decay=golden["layerwise_decay"],
        patch_embed_lr_multiplier=golden["patch_embed_lr_mult"],
    )
    assert rules.keys() == expected.keys()
    for name, rule in rules.items():
        assert rule.lr_multiplier == pytest.approx(expected[name]["lr_multiplier"], rel=1e-6), name
        assert rule.wd_multiplier == expected[name]["wd_multiplier"], name
        assert rule.is_last_layer == expected[name]["is_last_layer"], name


def test_groups_are_fused_by_rule():
    golden = golden_json("param_groups_vits14_reg4")
    config = RegViTConfig.from_preset("small", patch_size=14, image_size=518, use_mask_token=True)
    with torch.device("meta"):
        student = torch.nn.ModuleDict({"backbone": RegViTModel(config)})
    rules = parameter_rules(
        [name for name, _ in student.named_parameters()],
        num_layers=12,
        layer_decay=golden["backbone"]["layerwise_decay"],
        patch_embed_lr_multiplier=golden["patch_embed_lr_mult"],
    )
    actual = {
        (round(group["lr_multiplier"], 6), group["wd_multiplier"]): (
            len(group["params"]),
            sum(parameter.numel() for parameter in group["params"]),
        )
        for group in parameter_groups(student, rules)
    }
    expected = {
        (round(group["lr_multiplier"], 6), group["wd_multiplier"]): (group["n_tensors"], group["n_elements"])
        for group in golden["backbone"]["fused_groups"]
    }
    assert actual == expected
