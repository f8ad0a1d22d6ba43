"""The sixteen acceptance tests of the pretraining recipe: where each one is, and those that live nowhere else.

Source: `spec/dinov2_pretraining.md`, section 11.
"""

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_regvit import RegViTConfig, RegViTModel
from hf_regvit.pretraining.arguments import PretrainingArguments
from hf_regvit.training.parameter_groups import parameter_rules
from tiny_run import tiny_config

TESTS = Path(__file__).resolve().parents[1]
HERE = "parity/test_acceptance.py::"

INDEX = {
    "1 released register checkpoints": [
        "parity/test_conversion_golden.py::test_official_dinov2",
        "parity/test_conversion_golden.py::test_same_weights_three_libraries",
        "parity/test_conversion_golden.py::test_transformers",
        "parity/test_conversion_golden.py::test_round_trip_through_save_pretrained",
        "parity/test_dinov2_golden.py::test_masked_patches",
    ],
    "2 positions": [
        HERE + "test_the_position_table_never_reaches_the_registers",
        HERE + "test_without_positions_the_order_of_patches_does_not_matter",
        HERE + "test_the_two_resamplings_differ_at_98_pixels",
        "parity/test_dinov2_golden.py::test_position_table_at_every_grid",
    ],
    "3 initialisation": [
        "models/test_modeling.py::test_initialisation_has_the_statistics_of_dinov2",
        "models/test_modeling.py::test_f47_registers_differ_after_initialisation_and_stay_different",
    ],
    "4 masks": [
        "pretraining/test_data.py::test_masks_total_is_stratified_below_its_bound",
        "pretraining/test_data.py::test_masks_nothing_masked",
        "pretraining/test_pretraining.py::test_every_student_parameter_gets_a_gradient_even_without_masks",
    ],
    "5 drop path": [
        "models/test_drop_path.py::test_batch_subset_keeps_this_many_and_scales_by_their_share",
        "models/test_drop_path.py::test_batch_subset_expects_the_full_residual",
        "parity/test_dinov2_golden.py::test_batch_subset_drop_path",
    ],
    "6 uniform outputs": ["pretraining/test_pretraining.py::test_uniform_outputs_give_the_known_losses"],
    "7 Sinkhorn": [
        "pretraining/test_losses.py::test_sinkhorn_balances_prototypes",
        "pretraining/test_losses.py::test_sinkhorn_ignores_an_added_constant",
        "pretraining/test_losses.py::test_sinkhorn_neither_overflows_nor_vanishes",
        "parity/test_losses_golden.py::test_one_process_on_the_concatenation_equals_two",
        "parity/test_losses_golden.py::test_two_processes",
    ],
    "8 centers": [
        "pretraining/test_losses.py::test_center_equals_its_loop_and_lags_by_one_step",
        "pretraining/test_losses.py::test_no_rows_leave_the_center_as_it_is",
        "parity/test_losses_golden.py::test_ibot_centers_and_targets_step_by_step",
        "parity/test_losses_golden.py::test_two_processes",
    ],
    "9 KoLeo": [
        "pretraining/test_losses.py::test_koleo_of_identical_rows_is_finite_under_autocast",
        "pretraining/test_losses.py::test_koleo_of_an_orthonormal_batch",
    ],
    "10 parameter groups": [
        HERE + "test_learning_rates_of_a_network_of_24_blocks",
        "parity/test_ssl_golden.py::test_multipliers_of_every_parameter",
        "parity/test_ssl_golden.py::test_groups_are_fused_by_rule",
    ],
    "11 schedules": [
        HERE + "test_schedules_of_the_short_recipe_at_their_corners",
        "parity/test_ssl_golden.py::test_schedules",
    ],
    "12 moving average": [
        "pretraining/test_pretraining.py::test_teacher_update_equals_the_closed_form",
        "pretraining/test_pretraining.py::test_teacher_starts_as_the_student_and_stays_in_eval_mode",
        "distributed/test_two_processes.py::test_two_processes_equal_one_with_the_doubled_batch",
    ],
    "13 two processes": [
        "distributed/test_two_processes.py::test_two_processes_equal_one_with_the_doubled_batch",
        "pretraining/test_pretraining.py::test_local_crops_do_not_influence_one_another",
    ],
    "14 accumulation": [
        "distributed/test_two_processes.py::test_accumulated_sinkhorn_targets_equal_those_of_one_big_batch",
        "pretraining/test_pretraining.py::test_accumulated_micro_batches_equal_the_mean_of_their_gradients",
    ],
    "15 resume": [
        "pretraining/test_pretraining.py::test_resumed_run_repeats_the_unbroken_one_bit_for_bit",
        "distributed/test_two_processes.py::test_fsdp_resumes_bit_for_bit",
    ],
    "16 smoke run": [HERE + "test_smoke_run_learns_and_does_not_collapse"],
}


@pytest.mark.parametrize("item", INDEX)
def test_every_acceptance_test_exists(item):
    for reference in INDEX[item]:
        path, name = reference.split("::")
        tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, reference


def test_the_index_is_complete():
    assert [int(item.split()[0]) for item in INDEX] == list(range(1, 17))


# ---- 2: positions ----


def random_model(**fields) -> RegViTModel:
    """A model in double precision, in which weights as large as these do not enlarge the errors of rounding."""
    torch.manual_seed(0)
    model = RegViTModel(tiny_config(layerscale_value=1.0, **fields)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


@torch.no_grad()
def test_the_position_table_never_reaches_the_registers():
    model, pixels = random_model(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    before = model.split_tokens(model.embeddings(pixels))
    model.embeddings.position_embeddings.add_(1.0)
    after = model.split_tokens(model.embeddings(pixels))
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, True, False]


@torch.no_grad()
def test_without_positions_the_order_of_patches_does_not_matter():
    model, pixels = random_model(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    patches = torch.nn.functional.unfold(pixels, 4, stride=4)  # (B, 3 * 4 * 4, 16)
    shuffled = torch.nn.functional.fold(patches[:, :, order], (16, 16), 4, stride=4)
    assert not torch.allclose(model(shuffled).pooler_output, model(pixels).pooler_output, atol=1e-3)
    model.embeddings.position_embeddings.zero_()
    before, after = model(pixels), model(shuffled)
    torch.testing.assert_close(after.pooler_output, before.pooler_output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after.register_tokens, before.register_tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after.patch_tokens, before.patch_tokens[:, order], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_two_resamplings_differ_at_98_pixels():
    tables = []
    for fields in ({}, {"interpolate_offset": 0.1, "interpolate_antialias": False}):
        config = {"image_size": 224, "patch_size": 14, "hidden_size": 32, "num_hidden_layers": 1}
        model = random_model(**config, **fields)
        tables.append(model.embeddings.resample_positions((7, 7)))
        assert torch.equal(model.embeddings.resample_positions((16, 16)), model.embeddings.position_embeddings[:, 1:])
    assert tables[0].shape == (1, 49, 32)
    assert (tables[0] - tables[1]).abs().max() > 0.05


# ---- 10 and 11: parameter groups and schedules ----


def test_learning_rates_of_a_network_of_24_blocks():
    """Every parameter of a ViT-L with its official name's rule, written out; section 6.2 names four of the numbers."""
    config = RegViTConfig.from_preset("large", patch_size=14, image_size=224, use_mask_token=True)
    with torch.device("meta"):
        names = [f"backbone.{name}" for name, _ in RegViTModel(config).named_parameters()]
    rules = parameter_rules(names, num_layers=24, layer_decay=0.9, patch_embed_lr_multiplier=0.2)
    expected = {}
    for name in ("cls_token", "position_embeddings", "register_tokens", "mask_token"):
        expected[f"backbone.embeddings.{name}"] = (0.9**25, 1.0)
    for kind, decay in (("weight", 1.0), ("bias", 0.0)):
        expected[f"backbone.embeddings.patch_embeddings.projection.{kind}"] = (0.2 * 0.9**25, decay)
        expected[f"backbone.layernorm.{kind}"] = (1.0, 0.0)
        for block in range(24):
            rate, prefix = 0.9 ** (24 - block), f"backbone.layers.{block}"
            for name in ("attention.qkv", "attention.o_proj", "mlp.fc1", "mlp.fc2"):
                expected[f"{prefix}.{name}.{kind}"] = (rate, decay)
            for name in ("norm1", "norm2"):
                expected[f"{prefix}.{name}.{kind}"] = (rate, 0.0)
            for name in ("layer_scale1", "layer_scale2"):
                expected[f"{prefix}.{name}.lambda1"] = (rate, 0.0)
    assert rules.keys() == expected.keys()
    for name, rule in rules.items():
        assert (rule.lr_multiplier, rule.wd_multiplier) == pytest.approx(expected[name], rel=1e-12), name
    for name, rate in (
        ("embeddings.cls_token", 0.0718),
        ("embeddings.patch_embeddings.projection.weight", 0.01436),
        ("layers.0.norm1.weight", 0.0798),
        ("layers.23.norm1.weight", 0.9),
    ):
        # tolerance: the section gives three digits
        assert rules[f"backbone.{name}"].lr_multiplier == pytest.approx(rate, rel=1e-3)


def test_schedules_of_the_short_recipe_at_their_corners(tmp_path):
    arguments = PretrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2048, warmup_steps=12500,
        freeze_last_layer_steps=1250, warmup_teacher_temperature_steps=37500,
    )  # fmt: skip
    schedules = arguments.schedules(125_000)
    peak = 4e-3 * math.sqrt(2)

    def half_cosine(start, end, share):
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))

    rates = {0: 0.0, 1249: peak * 1249 / 12499, 1250: peak * 1250 / 12499, 12499: peak, 12500: peak}
    rates[124_999] = half_cosine(peak, 1e-6, 112_499 / 112_500)
    for step, rate in rates.items():
        values = schedules.at(step)
        assert values.learning_rate == pytest.approx(rate, rel=1e-12), step
        assert values.last_layer_learning_rate == (0 if step < 1250 else values.learning_rate), step
        share = step / 125_000
        assert values.weight_decay == pytest.approx(half_cosine(0.04, 0.4, share), rel=1e-12), step
        assert values.teacher_momentum == pytest.approx(half_cosine(0.992, 1.0, share), rel=1e-12), step
        temperature = min(0.04 + 0.03 * step / 37499, 0.07)
        assert values.teacher_temperature == pytest.approx(temperature, rel=1e-12), step


# ---- 16: smoke run ----


@pytest.mark.slow
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_smoke_run_learns_and_does_not_collapse(tmp_path, centering):
    """64 tiles of photographs: below the loss of uniform outputs, many prototypes in use, CLS tokens that differ."""
    from hf_regvit.data.augmentation import MultiCrop
    from hf_regvit.data.loading import load_images
    from hf_regvit.pretraining.crops import DinoCollator, MultiCropDataset
    from hf_regvit.pretraining.distillation import HeadShape, SelfDistillation
    from hf_regvit.pretraining.trainer import DinoTrainer

    prototypes, width = 64, 48
    torch.manual_seed(0)
    config = tiny_config(
        image_size=32, patch_size=8, hidden_size=width, num_attention_heads=3, layerscale_value=1.0,
        register_init_std=1.0,
    )  # fmt: skip
    network = SelfDistillation(RegViTModel(config), dino_head=HeadShape(prototypes, 128, 32), centering=centering)
    multi_crop = MultiCrop(
        global_size=32, local_size=16, global_scale=(0.4, 1.0), local_scale=(0.15, 0.4), num_local_crops=2,
        patch_size=8, blur_kernel_size=3, blur_sigma=(0.1, 1.0), grayscale_probability=0.05, hue=0.02, saturation=0.1,
        solarize_probability=0.0,
    )  # fmt: skip
    tiles = load_images("photos", split="train")
    tiles = tiles.subset(range(0, len(tiles), len(tiles) // 64)[:64])  # of many photographs
    trainer = DinoTrainer(
        network,
        PretrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, max_steps=200, per_device_train_batch_size=32, learning_rate=1e-3,
            learning_rate_reference_batch=0, teacher_momentum=0.98, teacher_temperature=0.04, weight_decay_end=0.1,
            layer_decay=1.0, patch_embed_lr_multiplier=1.0, logging_steps=1, save_strategy="no", disable_tqdm=True,
            seed=0,
        ),
        train_dataset=MultiCropDataset(tiles, multi_crop, seed=0),
        data_collator=DinoCollator((4, 4), seed=0),
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "ibot_loss" in entry]
    # What uniform outputs cost: all of the DINO terms, and iBOT on the half of the crops that is masked.
    uniform = 1.5 * math.log(prototypes)
    losses = [entry["dino_local_loss"] + entry["dino_global_loss"] + entry["ibot_loss"] for entry in logs]
    assert sum(losses[-20:]) / 20 < 0.9 * uniform
    assert min(entry["teacher_marginal_entropy"] for entry in logs[-20:]) > math.log(prototypes) / 2
    pixels = torch.stack([torch.from_numpy(np.array(tiles[i].image.resize((32, 32)))) for i in range(64)])
    with torch.no_grad():
        cls = network.teacher_backbone(pixels.permute(0, 3, 1, 2) / 64 - 2).pooler_output
    # 1 / sqrt(D) for directions that are spread over the whole sphere.
    assert torch.nn.functional.normalize(cls, dim=1).std(0).mean() > 0.5 / math.sqrt(width)
