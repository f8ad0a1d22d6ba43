"""Folder of a run: repeating the run, loading it, continuing from it, and starting from a third-party model."""

import json
import re
import shutil

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    TrainerCallback,
)

from builders import Recorder, tinted_folder, tiny_source
from helpers import requires_shared, shared_dir
from hf_regvit import RegViTForImageClassification, RegViTModel
from hf_regvit.app import cli
from hf_regvit.pretraining.arguments import PretrainingArguments
from hf_regvit.pretraining.run import pretrain
from hf_regvit.pretraining.starting_point import restore_training, starting_point
from tiny_run import Crops, arguments, same_state, tiny_config, tiny_network

pytestmark = pytest.mark.usefixtures("without_figures")
TESTS_OF_FIGURES = {"test_a_run_leaves_everything"}

RECIPE = """
preset: tiny
hidden_size: 16
num_hidden_layers: 2
num_attention_heads: 2
patch_size: 8
layerscale_value: 1.0
register_init_std: 1.0
global_crop_size: 32
local_crop_size: 16
num_local_crops: 2
head_num_prototypes: 32
head_hidden_size: 16
head_bottleneck_size: 8
per_device_train_batch_size: 8
learning_rate: 1.0e-3
learning_rate_reference_batch: 0
drop_path_rate: 0.2
max_steps: 6
logging_steps: 2
save_strategy: "no"
disable_tqdm: true
use_cpu: true
report_to: none
linear_probe: true
seed: 3
"""


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A run through the command line, and its output."""
    root = tmp_path_factory.mktemp("run")
    data = tinted_folder(root / "pictures", ("class0", "class1"), train=12, validation=4)
    (root / "recipe.yaml").write_text(RECIPE)
    torch.set_num_threads(1)
    status = cli.main(
        ["pretrain", "--config", str(root / "recipe.yaml"), "--data", str(data), "--output_dir", str(root / "a")]
    )
    assert status == 0
    return root


def test_a_run_leaves_everything(first_run):
    run = first_run / "a"
    assert {path.name for path in run.iterdir()} >= {
        "backbone", "training", "panels", "curves.png", "metrics.jsonl", "report.json", "resolved_recipe.yaml",
        "environment.json",
    }  # fmt: skip
    assert sorted(path.name for path in (run / "panels").iterdir()) == [
        "step_000000.png", "step_000002.png", "step_000004.png", "step_000006.png"
    ]  # fmt: skip
    assert Image.open(run / "curves.png").width > 1000
    report = json.loads((run / "report.json").read_text())
    assert report["steps"] == 6
    assert not report["stopped"]
    assert 0 < report["monitor_share"] < 1
    assert [entry["step"] for entry in report["knn"]] == [0, 6]
    assert all(0 <= entry["eval_knn_10"] <= 1 and 0 <= entry["eval_linear"] <= 1 for entry in report["knn"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "register_cosine" in lines[0]  # before the first step
    assert {"images_per_second", "data_wait_share", "eta_seconds", "memory_mib", "clipped_backbone"} <= lines[1].keys()


def test_the_backbone_loads_and_its_card_can_be_published(first_run):
    folder = first_run / "a" / "backbone"
    model, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    output = model(**processor(Image.new("RGB", (50, 60)), return_tensors="pt"))
    assert output.register_tokens.shape == (1, 4, 16)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "`pictures`, without labels: 48 images seen" in card
    assert re.search(r"\| length \| 6 steps, \d+ s \|", card)
    assert str(first_run) not in card
    for name in ("k-NN, k = 10", "linear"):
        assert re.search(rf"\| {name} \| `pictures` \| \d+\.\d % \|", card)
    code = re.search(r"```python\n(.*?)```", card, re.S).group(1)
    picture = first_run / "image.jpg"
    Image.new("RGB", (40, 40), "red").save(picture)
    exec(code.replace("path/to/this/folder", str(folder)).replace("image.jpg", str(picture)), {})


@pytest.mark.slow
def test_the_resolved_recipe_repeats_the_run(first_run):
    again = first_run / "again"
    recipe = first_run / "a" / "resolved_recipe.yaml"
    assert cli.main(["pretrain", "--config", str(recipe), "--output_dir", str(again)]) == 0
    for file in ("backbone/model.safetensors", "training/student.safetensors", "training/centers.safetensors"):
        assert same_state(load_file(first_run / "a" / file), load_file(again / file)), file
    losses = [
        [line["loss"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
        for run in (first_run / "a", again)
    ]
    assert losses[0] == losses[1]
    first, second = (yaml.safe_load((run / "resolved_recipe.yaml").read_text()) for run in (first_run / "a", again))
    assert {key for key in first if first[key] != second[key]} == {"output_dir"}


# ---- Continuing from a run ----


def trained_run(folder, **overrides):
    pretrain(arguments(folder, teacher_momentum=0.5, warmup_steps=0, **overrides), train_dataset=Crops())
    return folder


@pytest.mark.slow
def test_a_run_starts_from_another_one_bit_for_bit(tmp_path):
    run = trained_run(tmp_path / "a", separate_ibot_head=True, ibot_head_num_prototypes=8)
    before = {}

    class Spy(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            before.update({name: tensor.clone() for name, tensor in model.state_dict().items()})

    args = arguments(
        tmp_path / "b", init_from=str(run), separate_ibot_head=True, ibot_head_num_prototypes=8, max_steps=1, seed=99
    )
    pretrain(args, train_dataset=Crops(), callbacks=[Spy()])
    student = load_file(run / "training" / "student.safetensors")
    teacher = load_file(run / "backbone" / "model.safetensors")
    heads = load_file(run / "training" / "teacher_heads.safetensors")
    centers = load_file(run / "training" / "centers.safetensors")
    expected = {f"student.{name}": tensor for name, tensor in student.items()}
    expected |= {f"teacher.backbone.{name}": tensor for name, tensor in teacher.items()}
    expected |= {f"teacher.{name}": tensor for name, tensor in heads.items()} | centers
    expected |= {f"gram_teacher.{name}": tensor for name, tensor in teacher.items()}
    assert same_state(before, expected)
    # Student and teacher must differ for a meaningful test.
    name = "backbone.layers.0.mlp.fc1.weight"
    assert not torch.equal(before[f"student.{name}"], before[f"teacher.{name}"])
    assert before["dino_center.center"].any()


@pytest.mark.slow
def test_gram_anchoring_holds_on_to_the_teacher_that_a_run_starts_from(tmp_path):
    start = starting_point(trained_run(tmp_path / "a"), num_register_tokens=4, image_size=16)
    network = tiny_network(gram_loss_weight=2.0)
    network.student_backbone.load_state_dict(start.student.state_dict())
    restore_training(network, start)
    assert same_state(network.gram_teacher.state_dict(), start.teacher.state_dict())
    assert not same_state(
        start.student.state_dict(), start.teacher.state_dict()
    )  # they must differ for a meaningful test


@pytest.mark.slow
def test_other_heads_are_refused_and_new_ones_are_possible(tmp_path):
    run = trained_run(tmp_path / "a", max_steps=1)
    with pytest.raises(ValueError, match=r"weight_g' in .* has shape \(12, 1\), expected \(24, 1\).*'backbone'"):
        pretrain(arguments(tmp_path / "b", init_from=str(run), head_num_prototypes=24), train_dataset=Crops())
    with pytest.raises(ValueError, match="but the arguments require dino_head, ibot_head"):
        pretrain(arguments(tmp_path / "b", init_from=str(run), separate_ibot_head=True), train_dataset=Crops())
    args = arguments(tmp_path / "c", init_from=str(run / "backbone"), head_num_prototypes=24, max_steps=1)
    teacher = pretrain(args, train_dataset=Crops())
    assert teacher.config.num_register_tokens == 4


@pytest.mark.slow
def test_a_checkpoint_is_finished_before_another_run_starts_from_it(tmp_path):
    run = trained_run(tmp_path / "a", max_steps=4, save_strategy="steps", save_steps=2)
    shutil.rmtree(run / "backbone")
    with pytest.raises(ValueError, match=r"checkpoint-2' is a checkpoint of a run .* \(set max_steps to its step"):
        starting_point(run / "checkpoint-2", num_register_tokens=4, image_size=16)
    resume = {"resume_from_checkpoint": str(run / "checkpoint-2"), "max_steps": 2}
    teacher = pretrain(
        arguments(run, **resume), train_dataset=Crops()
    )  # no step is left, so only the result is written
    stored = load_file(run / "checkpoint-2" / "model.safetensors")
    assert all(
        torch.equal(stored[f"teacher.backbone.{name}"], tensor) for name, tensor in teacher.state_dict().items()
    )
    start = starting_point(run, num_register_tokens=4, image_size=16)
    assert same_state(start.teacher.state_dict(), teacher.state_dict())


@pytest.mark.slow
def test_other_centering_starts_with_centers_of_zero(tmp_path, caplog):
    run = trained_run(tmp_path / "a", max_steps=1, centering="sinkhorn")
    start = starting_point(run, num_register_tokens=4, image_size=16)
    network = tiny_network()
    restore_training(network, start)
    assert "no dino_center, so it starts at zero" in caplog.text
    assert not network.dino_center.center.any()


@pytest.mark.slow
def test_another_crop_size_resamples_positions_of_both_halves(tmp_path):
    run = trained_run(tmp_path / "a")
    start = starting_point(run, num_register_tokens=4, image_size=24)
    assert start.changes == ("Its positions are resampled from 4 x 4 to 6 x 6 patches.",)
    for backbone, file, prefix in (
        (start.teacher, "backbone/model.safetensors", ""),
        (start.student, "training/student.safetensors", "backbone."),
    ):
        stored = load_file(run / file)[f"{prefix}embeddings.position_embeddings"]
        source = RegViTModel(tiny_config())
        with torch.no_grad():
            source.embeddings.position_embeddings.copy_(stored)
            expected = torch.cat([stored[:, :1], source.embeddings.resample_positions((6, 6))], dim=1)
        assert torch.equal(backbone.embeddings.position_embeddings, expected)
        assert backbone.config.image_size == 24
    pixels = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        native = AutoModel.from_pretrained(run / "backbone").eval()(pixels).last_hidden_state
        torch.testing.assert_close(start.teacher.eval()(pixels).last_hidden_state, native, atol=1e-5, rtol=1e-5)


def test_frozen_backbone_stands_still_and_then_moves(tmp_path):
    torch.manual_seed(0)
    RegViTModel(tiny_config(use_mask_token=False)).save_pretrained(tmp_path / "vit")
    before = load_file(tmp_path / "vit" / "model.safetensors")
    recorder = Recorder()
    args = arguments(
        tmp_path / "run", init_from=str(tmp_path / "vit"), freeze_backbone_steps=2, warmup_steps=0, max_steps=4
    )
    pretrain(args, train_dataset=Crops(), callbacks=[recorder])
    states = [{name.removeprefix("student."): value for name, value in state.items()} for state in recorder.weights]
    for state in states[:2]:
        assert all(torch.equal(state[f"backbone.{name}"], before[name]) for name in before)
    assert not torch.equal(states[1]["dino_head.mlp.0.weight"], states[0]["dino_head.mlp.0.weight"])
    moved = [name for name in before if not torch.equal(states[3][f"backbone.{name}"], before[name])]
    assert set(moved) == set(before)


# ---- Starting from a third-party model ----


def small_timm(folder):
    import timm

    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=3
    )
    folder.mkdir()
    config = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4},
        "num_classes": 3,
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (folder / "config.json").write_text(json.dumps(config))
    from safetensors.torch import save_file

    save_file(model.state_dict(), folder / "model.safetensors")
    return model.eval()


@pytest.mark.parametrize("kind", ["small_vit", "small_dinov2", "small_timm"])
def test_a_model_without_registers_gets_some(kind, tmp_path, caplog):
    if kind == "small_timm":
        source = small_timm(tmp_path / "source")
    else:
        source = tiny_source({"small_vit": "ViTModel", "small_dinov2": "Dinov2Model"}[kind])
        source.save_pretrained(tmp_path / "source")
    start = starting_point(tmp_path / "source", num_register_tokens=0, image_size=32)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = source.forward_features(pixels) if kind == "small_timm" else source(pixels).last_hidden_state
        torch.testing.assert_close(start.teacher.eval()(pixels).last_hidden_state, tokens, atol=2e-5, rtol=1e-4)
    assert start.student is start.teacher
    args = arguments(tmp_path / "run", init_from=str(tmp_path / "source"), global_crop_size=32, local_crop_size=16)
    args.max_steps, args.num_register_tokens, args.register_init_std = 1, 3, 0.5
    with caplog.at_level("INFO"):
        teacher = pretrain(args, train_dataset=Crops(global_size=32, local_size=16))
    assert "no registers; 3 new ones are added" in caplog.text
    assert "The heads are new" in caplog.text
    assert "Ignored: --patch_size 4 (it has 8), --hidden_size 16 (it has 32)" in caplog.text
    assert teacher.embeddings.register_tokens.shape == (1, 3, 32)
    assert 0.2 < teacher.embeddings.register_tokens.std() < 0.8
    assert teacher.config.use_mask_token
    names = teacher.state_dict().keys()
    assert not [name for name in names if "pooler" in name or "classifier" in name]


def test_registers_that_are_there_stay(tmp_path):
    torch.manual_seed(0)
    model = RegViTForImageClassification(tiny_config(use_mask_token=False, num_register_tokens=2, num_labels=3))
    model.save_pretrained(tmp_path / "source")
    start = starting_point(tmp_path / "source", num_register_tokens=4, image_size=16, drop_path_rate=0.3)
    assert start.changes[0] == "It keeps its 2 registers; --num_register_tokens is ignored."
    assert torch.equal(start.student.embeddings.register_tokens, model.regvit.embeddings.register_tokens)
    assert not start.student.embeddings.mask_token.any()
    assert start.student.training
    assert start.student.layers[1].drop_path_rate == 0.3
    assert all(parameter.requires_grad for parameter in start.student.parameters())


def test_the_same_seed_draws_the_same_registers(tmp_path):
    tiny_source("ViTForImageClassification", num_labels=3).save_pretrained(tmp_path / "source")
    drawn = [
        starting_point(tmp_path / "source", num_register_tokens=2, image_size=32, seed=seed).student.embeddings
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0].register_tokens, drawn[1].register_tokens)
    assert not torch.equal(drawn[0].register_tokens, drawn[2].register_tokens)


def test_what_cannot_be_started_from_is_said(tmp_path):
    with pytest.raises(ValueError, match="both init_from="):
        pretrain(arguments(tmp_path, init_from="x"), model=tiny_config(), train_dataset=Crops())
    with pytest.raises(OSError, match="nowhere"):
        pretrain(arguments(tmp_path, init_from=str(tmp_path / "nowhere")), train_dataset=Crops())
    tiny_source("ViTForImageClassification", num_labels=3).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"global_crop_size is 20, .* 8 x 8"):
        starting_point(tmp_path / "source", num_register_tokens=4, image_size=20)


@requires_shared
@pytest.mark.slow
def test_continued_pretraining_of_the_real_vit_tiny(tmp_path):
    """ImageNet weights without registers, 48-pixel crops instead of 224: it trains, and k-NN starts far above zero."""
    source = shared_dir() / "data" / "vit_tiny_patch16_224"
    recipe = {
        "output_dir": str(tmp_path), "init_from": str(source), "data": "photos",
        "global_crop_size": 48, "local_crop_size": 32, "num_local_crops": 1, "head_num_prototypes": 128,
        "head_hidden_size": 64, "head_bottleneck_size": 32, "per_device_train_batch_size": 4, "max_steps": 2,
        "learning_rate": 1e-4, "learning_rate_reference_batch": 0, "freeze_backbone_steps": 1, "warmup_steps": 0,
        "layer_decay": 0.8, "teacher_momentum": 0.998, "monitor_steps": 1, "panel_steps": 0, "knn_max_images": 200,
        "koleo_loss_weight": 0.0, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "report_to": "none",
    }  # fmt: skip
    torch.set_num_threads(1)
    pretrain(PretrainingArguments(**recipe))
    loaded = AutoModel.from_pretrained(tmp_path / "backbone")
    assert loaded.config.image_size == 48
    assert loaded.config.num_register_tokens == 4
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["knn"][0]["step"] == 0
    assert report["knn"][0]["eval_knn_10"] > 0.4  # 21 images; chance is below 0.1
    assert all(torch.isfinite(tensor).all() for tensor in loaded.state_dict().values())
