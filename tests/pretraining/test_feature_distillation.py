"""Distillation from frozen teachers: targets, loss, gradients, exact resuming and the complete job."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModel

import builders
import oracles
from hf_regvit import open_model
from hf_regvit.models.processing import IMAGENET_MEAN, IMAGENET_STD, UnknownProcessorError
from hf_regvit.pretraining.arguments import PretrainingArguments
from hf_regvit.pretraining.continuation import memory_of_step
from hf_regvit.pretraining.feature_distillation import FrozenTeacher
from hf_regvit.pretraining.losses import feature_loss
from hf_regvit.pretraining.run import pretrain
from tiny_run import Crops, arguments, feature_network, frozen_teacher, same_state, tiny_batch, trained

pytestmark = pytest.mark.usefixtures("without_figures")


def test_loss_equals_its_loop():
    predictions, targets = 2 * builders.normal(6, 5), builders.normal(6, 5, seed=1)
    loss, cosine = feature_loss(predictions, targets)
    assert loss.item() == pytest.approx(oracles.feature_loss(predictions, targets), abs=1e-5)
    assert cosine.item() == pytest.approx(F.cosine_similarity(predictions, targets).mean().item(), abs=1e-5)


def test_loss_is_zero_for_the_targets_and_differentiable_at_zero():
    targets = builders.normal(4, 7)
    assert feature_loss(targets, targets)[0].item() == pytest.approx(0, abs=1e-5)
    zeros = torch.zeros(4, 7, requires_grad=True)
    feature_loss(zeros, targets)[0].backward()
    assert zeros.grad.isfinite().all()
    assert zeros.grad.abs().sum() > 0


@pytest.mark.parametrize("registers", [0, 3])
def test_targets_are_the_normalized_tokens_of_the_teacher_without_its_registers(registers):
    """The crops are normalized as the teacher expects and resized to as many patches as the student has."""
    teacher = frozen_teacher(num_register_tokens=registers)
    crops = builders.normal(2, 3, 16, 16)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    own = ((crops * std + mean) - 0.5) / torch.tensor([0.25, 0.5, 0.75]).view(3, 1, 1)
    with torch.no_grad():
        tokens = teacher.reader.model(F.interpolate(own, size=(32, 32), mode="bicubic", antialias=True))
    cls, patches = teacher(crops, (4, 4))
    expected = torch.tensor([oracles.layer_norm(row) for row in tokens.last_hidden_state[:, 0].tolist()])
    torch.testing.assert_close(cls, expected, atol=1e-4, rtol=0)
    rows = tokens.patch_tokens.flatten(0, 1).tolist()
    expected = torch.tensor([oracles.layer_norm(row) for row in rows]).unflatten(0, (2, 16))
    torch.testing.assert_close(patches, expected, atol=1e-4, rtol=0)


def test_the_normalization_of_the_crops_does_not_matter():
    """A student that starts from CLIP has crops normalized as CLIP expects; the teacher sees the same image."""
    model, levels = frozen_teacher().reader, torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    targets = []
    for mean, std in ((IMAGENET_MEAN, IMAGENET_STD), ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])):
        shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        targets.append(FrozenTeacher(model, mean=mean, std=std)((levels - shift) / scale, (4, 4))[1])
    torch.testing.assert_close(*targets, atol=1e-4, rtol=0)


def test_a_teacher_that_reads_one_size_only_gives_the_grid_of_the_student():
    model = builders.tiny_timm(img_size=32, patch_size=4, dynamic_img_size=False)
    teacher = FrozenTeacher(open_model(model, processor=frozen_teacher().reader.processor))
    size = teacher.reader.description.image_size
    assert teacher.size_for((3, 5)) == size
    _, patches = teacher(builders.normal(2, 3, 12, 20), (3, 5))
    assert patches.shape == (2, 15, teacher.reader.description.hidden_size)
    # A teacher whose patches are all equal has equal patches on every grid: resampling has no border effect.
    constant = torch.full((2, 3, 12, 20), 0.3)
    for parameter in model.parameters():
        parameter.data.zero_()
    model.norm.bias.data.copy_(builders.normal(model.norm.bias.numel()))
    _, patches = teacher(constant, (3, 5))
    torch.testing.assert_close(patches, patches[:1, :1].expand_as(patches), atol=1e-5, rtol=0)


def test_a_teacher_without_cls_gives_the_mean_of_its_patches():
    model = builders.tiny_source("SiglipVisionModel")
    processor = frozen_teacher().reader.processor
    teacher = FrozenTeacher(open_model(model, processor=processor))
    description = teacher.reader.description
    assert not description.has_cls
    crops = builders.normal(2, 3, *description.image_size)
    teacher_grid = tuple(side // step for side, step in zip(description.image_size, description.patch_size))
    cls, _ = teacher(crops, teacher_grid)
    pixels = crops * teacher._scale + teacher._shift
    reading = teacher.reader.read(pixels, reduce=lambda tokens, _: teacher.reader.final_norm(tokens))
    expected = F.layer_norm(reading.at().mean(dim=1), cls.shape[1:])
    torch.testing.assert_close(cls, expected, atol=1e-5, rtol=0)


def test_high_norms_of_the_teacher_do_not_weigh_more():
    """Targets have unit variance, so a teacher with artifacts of norm 500 does not drown the other tokens."""
    teacher = frozen_teacher()
    before = teacher(builders.normal(2, 3, 16, 16), (4, 4))
    teacher.reader.model.layernorm.weight.data.mul_(50)
    teacher.reader.model.layernorm.bias.data.mul_(50)
    after = teacher(builders.normal(2, 3, 16, 16), (4, 4))
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
        torch.testing.assert_close(other.var(dim=-1, correction=0), torch.ones(other.shape[:-1]), atol=1e-3, rtol=0)


def test_loss_of_a_batch_equals_loops_over_crops_and_teachers():
    network = feature_network(teachers=[frozen_teacher(), frozen_teacher(seed=8)], cls_weight=0.5, patch_weight=2.0)
    batch = tiny_batch(masked=True)
    outputs = network(**batch)
    backbone, sums = network.student_backbone, {"cls": 0.0, "patch": 0.0}
    for index, teacher in enumerate(network.teachers):
        cls_head, patch_head = (network.student[name][index] for name in ("cls_head", "patch_head"))
        cls_rows, cls_targets, patch_rows, patch_targets = [], [], [], []
        for crop, mask in zip(batch["global_crops"], batch["masks"], strict=True):
            output, (of_cls, of_patches) = backbone(crop, bool_masked_pos=mask), teacher(crop, (4, 4))
            cls_rows.append(cls_head(output.last_hidden_state[:, 0]))
            cls_targets.append(of_cls)
            patch_rows.append(patch_head(output.patch_tokens).flatten(0, 1))
            patch_targets.append(of_patches.flatten(0, 1))
        mean = (cls_targets[0] + cls_targets[1]) / 2
        for crop in batch["local_crops"]:
            cls_rows.append(cls_head(backbone(crop).last_hidden_state[:, 0]))
            cls_targets.append(mean)
        sums["cls"] += 0.5 / 2 * oracles.feature_loss(torch.cat(cls_rows), torch.cat(cls_targets))
        sums["patch"] += 2.0 / 2 * oracles.feature_loss(torch.cat(patch_rows), torch.cat(patch_targets))
    assert outputs["cls_loss"].item() == pytest.approx(sums["cls"], abs=1e-5)
    assert outputs["patch_loss"].item() == pytest.approx(sums["patch"], abs=1e-5)
    assert outputs["loss"].item() == pytest.approx(sums["cls"] + sums["patch"], abs=1e-5)


def test_standardized_targets_have_mean_0_and_variance_1_over_the_images():
    network = feature_network(teachers=[frozen_teacher(), frozen_teacher(seed=8)])
    pixels = builders.normal(40, 3, 16, 16)
    before = network.teachers[1](pixels, (4, 4))
    network.standardize(pixels)
    for teacher, statistics in zip(network.teachers, network.statistics, strict=True):
        for rows in statistics(*teacher(pixels, (4, 4))):
            rows = rows.flatten(0, -2)
            torch.testing.assert_close(rows.mean(dim=0), torch.zeros(24), atol=1e-4, rtol=0)
            torch.testing.assert_close(rows.var(dim=0, correction=0), torch.ones(24), atol=1e-3, rtol=0)
    scaled = network.statistics[1](*before)
    for part, rows, (mean, spread) in zip(
        scaled, before, (network.statistics[1].cls, network.statistics[1].patches), strict=True
    ):
        torch.testing.assert_close(part * spread + mean, rows, atol=1e-4, rtol=0)


def test_a_channel_without_spread_is_not_scaled():
    network = feature_network()
    network.standardize(builders.normal(1, 3, 16, 16).expand(3, -1, -1, -1).contiguous())
    targets = network.statistics[0](*network.teachers[0](builders.normal(1, 3, 16, 16), (4, 4)))
    torch.testing.assert_close(targets[0], torch.zeros(1, 24), atol=1e-4, rtol=0)  # all images were this one


def test_gradients_reach_the_whole_student_and_nothing_else():
    network = feature_network()
    network(**tiny_batch())["loss"].backward()
    assert all(parameter.grad is not None for parameter in network.student.parameters())
    assert not any(parameter.requires_grad for parameter in network.teacher.parameters())
    assert not any(parameter.requires_grad for parameter in network.teachers[0].reader.model.parameters())
    assert not any("reader" in name for name in network.state_dict())


def test_the_memory_of_a_run_includes_the_frozen_teachers(tmp_path):
    network = feature_network()
    held = sum(tensor.nbytes for tensor in network.state_dict().values())
    frozen = sum(tensor.nbytes for tensor in network.teachers[0].reader.model.state_dict().values())
    assert memory_of_step(network, arguments(tmp_path))["weights"] == held + frozen


def test_a_student_learns_the_features(tmp_path):
    steps = {"max_steps": 60, "learning_rate": 1e-2, "layer_decay": 1.0, "warmup_steps": 0, "logging_steps": 1}
    trainer = trained(tmp_path, network=feature_network(), **steps)
    cosines = [entry["patch_cosine"] for entry in trainer.state.log_history if "patch_cosine" in entry]
    assert abs(cosines[0]) < 0.3
    assert sum(cosines[-5:]) / 5 > 0.6


@pytest.mark.parametrize("resume_at", [2, 3])
def test_resumed_run_repeats_the_unbroken_one_bit_for_bit(tmp_path, resume_at):
    run = {"save_strategy": "steps", "save_steps": resume_at, "gradient_accumulation_steps": 2, "dataset": Crops(12)}
    network = feature_network()
    network.standardize(builders.normal(8, 3, 16, 16))  # the checkpoint holds the statistics
    whole = trained(tmp_path / "whole", network=network, **run)
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{resume_at}")
    resumed = trained(tmp_path / "resumed", network=feature_network(seed=99), resume=checkpoint, **run)
    assert resumed.state.global_step == 6
    assert same_state(whole.model.state_dict(), resumed.model.state_dict())


def test_resuming_with_another_teacher_is_an_error(tmp_path):
    run = {"save_strategy": "steps", "save_steps": 3}
    trained(tmp_path / "whole", network=feature_network(), **run)
    other = feature_network(teachers=[frozen_teacher(seed=6)])
    with pytest.raises(ValueError, match=r"weights of teacher=.* differ from those of the run"):
        trained(tmp_path / "resumed", network=other, resume=str(tmp_path / "whole" / "checkpoint-3"), **run)


def saved_teacher(folder, **fields):
    model = frozen_teacher(**fields).reader.model
    return str(builders.save_model(model, folder, model.image_processor))


@pytest.mark.slow
def test_the_complete_job_writes_a_student_that_auto_classes_load(tmp_path):
    teachers = [saved_teacher(tmp_path / "a"), saved_teacher(tmp_path / "b", seed=8)]
    saving = {"save_strategy": "steps", "save_steps": 6}
    args = arguments(tmp_path / "run", teacher=teachers, num_local_crops=None, mask_probability=None, **saving)
    assert (args.num_local_crops, args.mask_probability) == (0, 0.0)
    student = pretrain(args, train_dataset=Crops())
    loaded = AutoModel.from_pretrained(tmp_path / "run" / "backbone")
    assert same_state(student.state_dict(), loaded.state_dict())
    statistics = load_file(tmp_path / "run" / "checkpoint-6" / "model.safetensors")["statistics.0.patches"]
    assert not torch.equal(statistics[1], torch.ones(24))
    training = load_file(tmp_path / "run" / "training" / "student.safetensors")
    assert {"cls_head.1.weight", "patch_head.0.bias"} <= training.keys()
    card = (tmp_path / "run" / "backbone" / "README.md").read_text()
    assert "distilled" in card
    assert "`a`, `b`" in card
    assert str(tmp_path) not in card
    again = pretrain(
        arguments(tmp_path / "again", teacher=teachers, init_from=str(tmp_path / "run"), max_steps=1),
        train_dataset=Crops(),
    )
    assert not same_state(again.state_dict(), student.state_dict())


def test_self_distillation_cannot_start_with_the_heads_of_a_distillation(tmp_path):
    args = arguments(tmp_path / "run", teacher=[saved_teacher(tmp_path / "a")], max_steps=1)
    pretrain(args, train_dataset=Crops())
    with pytest.raises(ValueError, match=r"holds cls_head, patch_head, but the arguments require dino_head.*backbone"):
        pretrain(arguments(tmp_path / "next", init_from=str(tmp_path / "run")), train_dataset=Crops())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": ["x"], "gram_loss_weight": 1.0}, "gram_loss_weight is 1.0; expected 0 with --teacher"),
        ({"teacher": ["x"], "paka_loss_weight": 0.5}, "paka_loss_weight is 0.5; expected 0 with --teacher"),
        (
            {"teacher": ["x"], "ibot_visible_patches": True},
            "ibot_visible_patches is True; expected False with --teach",
        ),
        ({"teacher": ["x"], "average_heads_only": True}, "average_heads_only is True; expected False with --teacher"),
        (
            {"ibot_visible_patches": True, "ibot_loss_weight": 0.0},
            "ibot_visible_patches is True; expected False with --ibot_loss_weight 0",
        ),
        ({"teacher_image_size": 224}, "teacher_image_size is 224; expected no value without --teacher"),
    ],
)
def test_options_that_contradict_each_other_are_errors(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        PretrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)


def test_errors_of_teachers(tmp_path):
    with pytest.raises(UnknownProcessorError):
        FrozenTeacher(builders.tiny_model())
    with pytest.raises(ValueError, match=r"image size of 30 x 30 pixels is not a multiple of the patch size of 8 x 8"):
        FrozenTeacher(frozen_teacher().reader, image_size=30)
    with pytest.raises(ValueError, match=r"weights of CLS and patches are 0\.0 and 0\.0"):
        feature_network(cls_weight=0.0, patch_weight=0.0)
