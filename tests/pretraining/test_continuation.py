"""Continued pretraining: the families it starts from, what each mode trains, adapters, resuming, and defaults."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, TrainerCallback, TrainerState

from builders import (
    Recorder,
    json_lines,
    normal,
    plain_images,
    save_model,
    spy,
    tinted_folder,
    tiny_model,
    tiny_source,
    write,
)
from helpers import slow_except
from hf_regvit import RegViTModel, convert, pretrain
from hf_regvit.hub.card import CardError, card_header
from hf_regvit.hub.publish import publish
from hf_regvit.hub.scan import PrivateContentError
from hf_regvit.models.configuration_regvit import CheckpointError
from hf_regvit.models.processing import default_image_processor
from hf_regvit.pretraining.collapse import CollapseAlarms
from hf_regvit.pretraining.comparison import BestTeacher, masked_patches, mirror_agreement, patch_labels, score
from hf_regvit.pretraining.continuation import choose_trained, memory_of_step
from hf_regvit.pretraining.crops import DinoCollator
from hf_regvit.pretraining.distillation import SelfDistillation
from hf_regvit.pretraining.monitors import observers
from hf_regvit.pretraining.run import _build_dataset
from hf_regvit.pretraining.starting_point import starting_point
from hf_regvit.training.callbacks import MetricsFile
from hf_regvit.training.finite import without_ids
from tiny_run import (
    CROPS,
    GRID,
    PATCH,
    SHAPE,
    Crops,
    arguments,
    checkpoint_state,
    same_state,
    tiny_config,
    tiny_network,
)

pytestmark = pytest.mark.usefixtures("without_figures")

MODES = ("full", "lora", "last_blocks")
FAMILIES = (
    "ViTModel",
    "Dinov2Model",
    "Dinov2WithRegistersModel",
    "DINOv3ViTModel",
    "CLIPVisionModel",
    "SiglipVisionModel",
)
FAST = {"mode": "lora", "max_steps": 2, "warmup_steps": 0, "freeze_backbone_steps": 0, "learning_rate": 1e-2}


def continued(folder, source, **overrides):
    """Continue a model with crops of the tiny run; `source` has 4 x 4 patches of 4 pixels."""
    args = arguments(folder, init_from=str(source), **{**FAST, "teacher_momentum": 0.5, **overrides})
    return pretrain(args, train_dataset=Crops())


def own_model(folder, **fields):
    """Folder with a RegViT that has two registers and a trained mask token."""
    model = tiny_model(**tiny_config(**{"num_register_tokens": 2, **fields}).to_diff_dict())
    torch.nn.init.normal_(model.embeddings.mask_token)
    return save_model(model, folder)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", slow_except(FAMILIES, "DINOv3ViTModel"))
def test_every_family_is_continued_in_every_mode(family, mode, tmp_path):
    tiny_source(family, image_size=16, patch_size=4, hidden_size=16).save_pretrained(tmp_path / "source")
    start = starting_point(tmp_path / "source", num_register_tokens=4, image_size=16).teacher
    result = continued(tmp_path / "run", tmp_path / "source", mode=mode, num_trained_blocks=1)
    assert isinstance(result, RegViTModel)
    moved = {name for name, tensor in result.state_dict().items() if not torch.equal(tensor, start.state_dict()[name])}
    if mode == "full":  # a key without a bias has none that could move
        assert moved == set(start.state_dict())
    elif mode == "lora":
        linear = {f"layers.{block}.attention.{part}.weight" for block in (0, 1) for part in ("qkv", "o_proj")}
        assert moved - {"embeddings.register_tokens"} == {*linear, "embeddings.mask_token"}
    else:
        last = {name for name in start.state_dict() if name.startswith(("layers.1.", "layernorm."))}
        assert moved - {"embeddings.register_tokens"} == last
    had_registers = family == "Dinov2WithRegistersModel"
    assert ("embeddings.register_tokens" in moved) == (mode == "full" or not had_registers)
    pixels = torch.randn(2, 3, 16, 16)
    loaded = RegViTModel.from_pretrained(tmp_path / "run" / "backbone").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels).last_hidden_state, result(pixels).last_hidden_state)


def test_without_cls_the_losses_read_the_mean_patch():
    backbone = tiny_model(**tiny_config(use_cls_token=False, num_register_tokens=2).to_diff_dict())
    pixels, patches = torch.randn(3, 3, GRID * PATCH, GRID * PATCH), torch.tensor([0, 5, 17, 47])
    with torch.no_grad():
        image, rows = SelfDistillation._tokens(backbone, pixels, patches)
        output = backbone(pixels)
    torch.testing.assert_close(image, output.pooler_output)
    torch.testing.assert_close(rows, output.patch_tokens.flatten(0, 1)[patches])


def test_test_time_registers_of_any_block_are_continued(tmp_path):
    neurons = {"register_neurons": [[0, 3], [1, 5]], "num_register_tokens": 1, "num_test_time_registers": 1}
    model = tiny_model(**tiny_config(**neurons).to_diff_dict())
    pixels, patches = torch.randn(2, 3, GRID * PATCH, GRID * PATCH), torch.arange(2 * GRID**2)
    with torch.no_grad():
        cls, rows = SelfDistillation._tokens(model, pixels, patches)
        output = model(pixels)
        torch.testing.assert_close(cls, output.pooler_output)
        torch.testing.assert_close(rows, output.patch_tokens.flatten(0, 1))
    source = save_model(model, tmp_path / "source")
    assert "2 of its neurons keep writing" in " ".join(
        starting_point(source, num_register_tokens=4, image_size=16).changes
    )
    assert continued(tmp_path / "run", source, mode="full").config.register_neurons == [[0, 3], [1, 5]]


# --- Modes ---


@pytest.mark.parametrize("mode", MODES)
def test_only_what_is_trained_has_an_optimizer_state_and_a_moving_teacher(mode, tmp_path):
    recorder = Recorder()
    args = arguments(
        tmp_path / "run", init_from=str(own_model(tmp_path / "source")), mode=mode, num_trained_blocks=1, max_steps=2,
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    pretrain(args, train_dataset=Crops(), callbacks=[recorder])
    state = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    moments = torch.load(tmp_path / "run" / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    trained = {name for name in state if name.startswith("student.backbone.")}
    if mode == "lora":
        trained = {name for name in trained if "lora_" in name or "mask_token" in name}
    elif mode == "last_blocks":
        trained = {
            name for name in trained if name.startswith(("student.backbone.layers.1.", "student.backbone.layernorm"))
        }
    heads = {name for name in state if name.startswith("student.dino_head.")}
    assert len(moments) == len(trained) + len(heads)


def test_the_teacher_averages_the_updates_and_not_the_merged_weights():
    torch.manual_seed(0)
    args = arguments("unused", mode="lora", init_from="source", lora_r=2, lora_alpha=4)
    backbone = choose_trained(RegViTModel(tiny_config()), args, new_registers=False)
    network = SelfDistillation(backbone, dino_head=SHAPE, lora_scale=2.0)
    name = "layers.0.attention.qkv.lora_{}.default.weight"
    half = {part: network.student_backbone.get_parameter(name.format(part)) for part in "AB"}
    before = {part: value.detach().clone() for part, value in half.items()}
    with torch.no_grad():
        for value in half.values():
            value.add_(torch.randn_like(value))
    network.update_teacher(0.75)
    mean = {part: 0.75 * before[part] + 0.25 * half[part].detach() for part in "AB"}
    for part in "AB":
        torch.testing.assert_close(network.teacher_backbone.get_parameter(name.format(part)).detach(), mean[part])
    base = network.teacher_backbone.layers[0].attention.qkv.base_layer.weight
    merged = network.whole_teacher_backbone().layers[0].attention.qkv.weight
    torch.testing.assert_close(merged, base + 2.0 * mean["B"] @ mean["A"])


@pytest.mark.parametrize("family", slow_except([None, "DINOv3ViTModel", "CLIPVisionModel"], "DINOv3ViTModel"))
def test_merged_updates_equal_the_adapter_that_peft_loads(family, tmp_path):
    """In the published form, `backbone/`, in the network itself, and from the adapter of a few kilobytes."""
    source = tmp_path / "source"
    if family is None:
        own_model(source)
    else:
        tiny_source(family, image_size=16, patch_size=4, hidden_size=16).save_pretrained(source)
    targets = ["qkv", "o_proj", "fc1"]
    result = continued(tmp_path / "run", source, lora_target_modules=targets, max_steps=4)
    base = RegViTModel.from_pretrained(source) if family is None else convert(source)
    if not base.config.num_register_tokens:
        assert "base.resize_register_tokens(4)" in (tmp_path / "run" / "adapter" / "README.md").read_text()
        base.resize_register_tokens(4)
    pixels = normal(2, 3, 16, 16, dtype=torch.float64)  # the weights are those of float32, the sums are exact
    with torch.no_grad():
        before = base.eval().double()(pixels, output_hidden_states=True)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval().double()
        unmerged = loaded(pixels, output_hidden_states=True).hidden_states[-1]
        merged = result.double()(pixels, output_hidden_states=True).hidden_states[-1]
    assert (unmerged - before.hidden_states[-1]).abs().max() > 1e-3
    assert (unmerged - merged).abs().max() < 1e-5
    files = {path.name for path in (tmp_path / "run" / "adapter").iterdir()}
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name or "register_tokens" in name for name in saved)
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["r"] == 8


@pytest.mark.slow
def test_updates_are_published_without_the_model(tmp_path, hub):
    own_model(tmp_path / "source")
    continued(tmp_path / "run", tmp_path / "source", max_steps=2)
    adapter, bundled = tmp_path / "run" / "adapter", tmp_path / "bundle"
    options = {"output_dir": bundled, "card": {"license": "apache-2.0", "base_model": "me/base"}}
    with pytest.raises(CheckpointError, match=r"belong to 'source', .* name it with --base_model owner/name"):
        publish(adapter, "me/updates", output_dir=bundled, card={"license": "apache-2.0"})
    with pytest.raises(CardError, match=r"--license apache-2\.0"):
        publish(adapter, "me/updates", output_dir=bundled, card={"base_model": "me/base"})
    assert not bundled.exists()
    done = publish(adapter, "me/updates", push=True, **options)
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    assert {path.name for path in bundled.iterdir()} == names == set(done.bundle.names)
    assert set(hub.files("me/updates")) >= names
    assert publish(adapter, "me/updates", push=True, **options).sent.changed is False
    text = (bundled / "README.md").read_text()
    assert card_header(text)["base_model"] == "me/base"
    assert 'PeftModel.from_pretrained(base, "me/updates")' in text
    assert 'convert("me/base")' in text
    base = RegViTModel.from_pretrained(tmp_path / "source")
    loaded = peft.PeftModel.from_pretrained(base, bundled).merge_and_unload()
    merged = RegViTModel.from_pretrained(tmp_path / "run" / "backbone")
    trained = {name: tensor for name, tensor in merged.state_dict().items() if "mask_token" not in name}
    for name, tensor in trained.items():  # the mask token is for training alone
        torch.testing.assert_close(loaded.state_dict()[name], tensor, atol=1e-6, rtol=0)
    card = (adapter / "README.md").read_text()
    (adapter / "README.md").write_text(card + "\nhf_" + "aB3" * 10)
    with pytest.raises(PrivateContentError, match="a Hugging Face token"):
        publish(adapter, "me/updates", **options)
    assert (bundled / "README.md").read_text() == text  # the earlier bundle is whole
    (adapter / "README.md").write_text(card)
    tensors = load_file(adapter / "adapter_model.safetensors")
    first = next(name for name in tensors if ".lora_A." in name)
    save_file(tensors | {first: tensors[first] * float("nan")}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="has NaN or infinity"):
        publish(adapter, "me/updates", **options)
    save_file(tensors | {first: tensors[first][:, :-1].contiguous()}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"The update of .* but the merged model has"):
        publish(adapter, "me/updates", **options)


@pytest.mark.slow
def test_the_result_of_updates_can_be_continued_with_all_parameters(tmp_path):
    first = tmp_path / "first"
    continued(first, own_model(tmp_path / "source"))
    start = starting_point(first, num_register_tokens=2, image_size=16)
    assert start.training is not None
    assert start.student.state_dict().keys() == start.teacher.state_dict().keys()
    second = continued(tmp_path / "second", first, mode="full")
    assert not any("lora" in name for name in second.state_dict())


@pytest.mark.parametrize("mode", slow_except(["lora", "last_blocks"], "lora"))
def test_what_is_frozen_is_shared_by_student_and_teacher(mode, tmp_path):
    """Also if the run to continue from has a student of its own, whose frozen part the teacher could not follow."""
    first = tmp_path / "first"
    continued(first, own_model(tmp_path / "source"), mode="full", teacher_momentum=0.9)
    start = starting_point(first, num_register_tokens=2, image_size=16, mode=mode)
    assert start.student is start.teacher
    assert not same_state(
        starting_point(first, num_register_tokens=2, image_size=16).student.state_dict(), start.student.state_dict()
    )
    result = continued(tmp_path / "second", first, mode=mode, num_trained_blocks=1)
    frozen = "layers.0.mlp.fc1.weight"
    assert torch.equal(result.state_dict()[frozen], start.teacher.state_dict()[frozen])


@pytest.mark.parametrize(
    "mode", ["lora", pytest.param("last_blocks", marks=pytest.mark.slow), pytest.param("full", marks=pytest.mark.slow)]
)
def test_a_resumed_run_equals_an_uninterrupted_one(mode, tmp_path):
    source = own_model(tmp_path / "source", drop_path_rate=0.2)
    options = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "num_trained_blocks": 1,
        "mode": mode,
        "lora_dropout": 0.1,
    }
    whole = continued(tmp_path / "a", source, **options)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-4")
    resumed = continued(tmp_path / "b", source, resume_from_checkpoint="last", **options)
    assert same_state(whole.state_dict(), resumed.state_dict())
    assert same_state(*(checkpoint_state(tmp_path / run / "checkpoint-4") for run in "ab"))
    other = "full" if mode != "full" else "lora"
    with pytest.raises(ValueError, match=r"mode is .*but the checkpoint was written with"):
        continued(tmp_path / "a", source, resume_from_checkpoint="last", **{**options, "mode": other, "max_steps": 6})


def test_a_mode_that_cannot_be_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"mode is 'linear'; expected one of full, lora, last_blocks"):
        arguments(tmp_path, mode="linear")
    with pytest.raises(ValueError, match=r"mode is 'lora'.*none was given\. Add --init_from"):
        pretrain(arguments(tmp_path, mode="lora"), train_dataset=Crops())
    source = own_model(tmp_path / "source")
    with pytest.raises(ValueError, match=r"num_trained_blocks is 4, but the backbone has 2 blocks"):
        continued(tmp_path / "a", source, mode="last_blocks")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r"--mode lora needs peft\. Run: pip install 'hf_regvit\[peft\]'"):
        continued(tmp_path / "b", source)


# --- Defaults and statistics of the pixels ---


def test_defaults_are_careful_with_a_trained_model_and_options_win(tmp_path):
    def chosen(**options):
        options = {"learning_rate": None, **options}
        args = arguments(tmp_path / "run", **options)
        names = ("learning_rate", "teacher_momentum", "gram_loss_weight", "gram_refresh_steps", "weight_decay_end")
        return tuple(getattr(args, name) for name in (*names, "freeze_backbone_steps"))

    assert chosen() == (4e-3, 0.992, 0.0, 10000, 0.4, 0.0)
    assert chosen(init_from="x") == (1e-4, 0.998, 2.0, 0, 0.04, 0.1)
    assert chosen(init_from="x", mode="lora")[0] == 1e-3
    given = {"learning_rate": 1e-5, "teacher_momentum": 0.9, "gram_loss_weight": 0.0, "gram_refresh_steps": 7}
    given |= {"weight_decay_end": 0.3, "freeze_backbone_steps": 5.0}
    assert chosen(init_from="x", **given) == (1e-5, 0.9, 0.0, 7, 0.3, 5.0)
    continued(tmp_path / "first", own_model(tmp_path / "source"), mode="full")
    assert chosen(init_from=str(tmp_path / "first"))[-1] == 0.0  # its heads are trained


def test_gram_anchoring_keeps_the_starting_model(tmp_path):
    source = own_model(tmp_path / "source")
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    result = continued(tmp_path / "run", source, mode="full", **saving)
    state = load_file(tmp_path / "run" / "checkpoint-3" / "model.safetensors")
    start = load_file(source / "model.safetensors")
    assert all(torch.equal(state[f"gram_teacher.{name}"], tensor) for name, tensor in start.items())
    assert not same_state(result.state_dict(), start)


@pytest.mark.parametrize("family", ["CLIPVisionModel", None])
def test_pixels_are_normalized_as_the_starting_model_expects(family, tmp_path, caplog):
    source = tmp_path / "source"
    if family:
        tiny_source(family, image_size=16, patch_size=4, hidden_size=16).save_pretrained(source)
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(source)
        mean, std = CLIPImageProcessor().image_mean, CLIPImageProcessor().image_std
    else:
        tiny_model(**tiny_config().to_diff_dict()).save_pretrained(source)
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    seen = []

    class Raw(Crops):
        def __getitem__(self, key):
            item = super().__getitem__(key)
            return {
                **item,
                **{name: torch.full_like(item[name], 51, dtype=torch.uint8) for name in CROPS},
            }

    def look(module, args, kwargs, output):
        seen.append(kwargs["global_crops"][0, 0, :, 0, 0])

    class Hook(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.register_forward_hook(look, with_kwargs=True)

    args = arguments(tmp_path / "run", init_from=str(source), max_steps=1)
    pretrain(args, train_dataset=Raw(), callbacks=[Hook()])
    torch.testing.assert_close(seen[0], (51 / 255 - torch.tensor(mean)) / torch.tensor(std))
    saved = json.loads((tmp_path / "run" / "backbone" / "preprocessor_config.json").read_text())
    assert saved["image_mean"] == pytest.approx(mean)
    assert ("has no image processor, so the mean" in caplog.text) == (family is None)


def test_gram_crops_of_another_size_reach_the_gram_teacher(tmp_path, monkeypatch):
    forward = spy(monkeypatch, SelfDistillation, "forward")
    folder = plain_images(tmp_path / "images", [f"{index}.png" for index in range(6)])
    options = {"mode": "full", "max_steps": 1, "warmup_steps": 0, "gram_crop_size": 2 * GRID * PATCH}
    source = own_model(tmp_path / "source")
    args = arguments(tmp_path / "run", init_from=str(source), data=[str(folder)], blur_kernel_size=3, **options)
    pretrain(args)
    (call,) = forward.call_args_list
    assert call.kwargs["gram_crops"].shape == (2, 3, 3, 2 * GRID * PATCH, 2 * GRID * PATCH)
    assert call.kwargs["global_crops"].shape[-1] == GRID * PATCH
    with pytest.raises(ValueError, match="gram_crop_size is 32; expected no value without --gram_loss_weight"):
        arguments(tmp_path, gram_crop_size=32)


# --- Comparison with the start ---


def test_agreement_of_patches_equals_its_loop():
    patches, mirrored, grid = normal(2, 6, 5), normal(2, 6, 5, seed=1), (2, 3)
    found = 0
    for image in range(2):
        for row in range(2):
            for column in range(3):
                token = patches[image, row * 3 + column]
                places = [(r, c) for r in range(2) for c in range(3)]
                cosines = [torch.cosine_similarity(token, mirrored[image, r * 3 + 2 - c], dim=0) for r, c in places]
                found += places[int(torch.stack(cosines).argmax())] == (row, column)
    assert 0 < found < 12
    assert mirror_agreement(patches, mirrored, grid) == pytest.approx(found / 12)
    flipped = patches.unflatten(1, grid).flip(2).flatten(1, 2)
    assert mirror_agreement(patches, flipped, grid) == 1.0
    assert mirror_agreement(patches[:, :1].expand(-1, 6, -1), flipped, grid) < 0.5


def test_labels_of_patches_equal_their_loop():
    mask = np.random.default_rng(0).integers(0, 3, (6, 4), dtype=np.uint8)
    expected = [
        np.bincount(mask[row : row + 3, column : column + 2].ravel()).argmax() for row in (0, 3) for column in (0, 2)
    ]
    assert patch_labels(mask, (3, 2)).tolist() == expected


def test_masks_are_cut_as_their_images_are():
    """The left half of an image is class 1 and dark, the right half is class 2 and bright."""
    levels = np.repeat(np.where(np.arange(60) < 30, 0, 255).astype(np.uint8)[None], 40, axis=0)
    mask = np.where(levels == 0, 1, 2).astype(np.uint8)
    processor = default_image_processor(32)
    pixels, labels = masked_patches([Image.fromarray(levels).convert("RGB")], [mask], processor, (8, 8))
    cells = pixels[0].mean(0).unflatten(0, (4, 8)).unflatten(2, (4, 8)).mean((1, 3)).flatten()
    assert labels[0].tolist() == [1 if cell < 0 else 2 for cell in cells]
    assert labels[0].unflatten(0, (4, 4))[0].tolist() == [1, 1, 2, 2]


@pytest.mark.slow
def test_the_teacher_is_compared_with_the_start_and_the_best_is_kept(tmp_path):
    data = tinted_folder(tmp_path / "data", ("red", "blue"), train=12, validation=4)
    source = own_model(tmp_path / "source")
    options = {**FAST, "mode": "full", "max_steps": 6, "knn_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options |= {"data": str(data), "teacher_momentum": 0.5, "monitor_steps": 3, "init_from": str(source)}
    pretrain(arguments(tmp_path / "run", **options))
    lines = [line for line in json_lines(tmp_path / "run" / "metrics.jsonl") if "eval_patch_agreement" in line]
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert lines[0]["image_drift"] == pytest.approx(0, abs=1e-5)
    assert lines[0]["patch_drift"] == pytest.approx(0, abs=1e-5)
    assert lines[3]["patch_drift"] > lines[1]["patch_drift"] > 1e-4
    assert all("eval_knn_10" in line for line in lines)
    best = max(reversed(lines), key=lambda line: (line["eval_knn_10"], -line["step"]))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["best"] == {"step": best["step"], "score": pytest.approx(best["eval_knn_10"])}
    assert (tmp_path / "run" / "best").is_dir() == (best["step"] > 0)
    # A resumed run goes on from the scores of the earlier steps.
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    pretrain(arguments(tmp_path / "run", resume_from_checkpoint="last", **options))
    assert json.loads((tmp_path / "run" / "report.json").read_text())["best"] == report["best"]


def test_the_best_teacher_is_saved_and_a_worse_one_is_not(tmp_path):
    network = tiny_network()
    keeper = BestTeacher(tmp_path, default_image_processor(16), MetricsFile(tmp_path / "metrics.jsonl"))
    state = TrainerState(is_world_process_zero=True)
    saved = []
    for state.global_step, value in enumerate([0.5, 0.6, 0.4, 0.7]):
        with torch.no_grad():
            network.teacher_backbone.layernorm.bias.fill_(value)
        keeper.on_log(None, state, None, logs={"eval_knn_10": value}, model=network)
        keeper.on_log(None, state, None, logs={"loss": 9.0}, model=network)
        best = tmp_path / "best"
        saved.append(RegViTModel.from_pretrained(best).layernorm.bias[0].item() if best.exists() else None)
    assert saved == pytest.approx([None, 0.6, 0.6, 0.7])
    assert keeper.best == (3, 0.7)
    assert score({"eval_knn_10": 0.5, "eval_patch_knn_5": 0.7, "eval_patch_agreement": 0.1}) == pytest.approx(0.6)
    assert score({"eval_patch_agreement": 0.1}) == 0.1
    assert score({"loss": 1.0}) is None


def test_three_measurements_below_the_start_raise_an_alarm(tmp_path):
    alarms = CollapseAlarms(arguments(tmp_path, init_from="x"), tiny_config(), first_step=0)
    state = TrainerState(is_world_process_zero=True)

    def log(step, knn, agreement=0.5):
        state.global_step = step
        alarms.on_log(None, state, None, logs={"eval_knn_10": knn, "eval_patch_agreement": agreement})
        alarms.on_log(None, state, None, logs={"loss": 1.0})  # a line without measurements does not interrupt

    for step, knn in enumerate([0.8, 0.79, 0.79, 0.8, 0.79, 0.9]):
        log(step, knn)
    assert alarms.raised == []
    for step in (6, 7, 8):
        log(step, 0.9, agreement=0.4)
    (alarm,) = alarms.raised
    assert (alarm.name, alarm.step) == ("below_start", 8)
    assert "eval_patch_agreement is 0.4000 (0.5000 at the start)" in alarm.message
    assert "Lower --learning_rate (now 0.002)" in alarm.message
    plain = CollapseAlarms(arguments(tmp_path), tiny_config(), first_step=0)
    plain.on_log(None, TrainerState(), None, logs={"eval_knn_10": 0.8, "eval_patch_agreement": 0.5})
    assert plain.recipe.start == {}


def test_patches_are_classified_where_the_data_has_masks(tmp_path):
    """In a folder whose masks follow the brightness, patches of the starting model are classified above chance."""
    halves = [np.where(np.arange(32) < 8 + 2 * i, 0, 1).astype(np.uint8) for i in range(8)]
    for i, half in enumerate(halves):
        mask = np.repeat(half[None], 32, axis=0)
        write(tmp_path / "data" / "images" / f"{i}.png", Image.fromarray(mask * 200 + 20).convert("RGB"))
        write(tmp_path / "data" / "masks" / f"{i}.png", Image.fromarray(mask))
    args = arguments(tmp_path / "run", data=str(tmp_path / "data"), knn_steps=2)
    start = tiny_model(**tiny_config().to_diff_dict())
    dataset = _build_dataset(args, tiny_config())
    assert len(dataset) == 8  # the masks are not images to train on
    (comparison,) = observers(args, dataset, image_processor=default_image_processor(16), start=start)
    assert [len(labels) for _, labels in comparison.masked] == [6, 2]
    values = comparison.measure(SimpleNamespace(whole_teacher_backbone=lambda: start), 0)
    assert values["eval_patch_knn_5"] > 0.8
    assert values["patch_drift"] == pytest.approx(0, abs=1e-5)


# --- Memory ---


def kept_for_backward(network, batch):
    """Bytes of the tensors that autograd keeps, without the weights, and the loss."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = network(**batch)["loss"]
    return sum(size for size, _ in kept.values()), loss


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("fields", [{}, {"use_swiglu_ffn": True}, {"checkpointing": True}])
@pytest.mark.parametrize("mode", MODES)
def test_the_memory_that_is_stated_is_that_of_the_tensors(mode, fields, tmp_path):
    """By the difference of two depths, because the last block and the heads keep other tensors."""
    fields, counted, stated = dict(fields), [], []
    checkpointing = fields.pop("checkpointing", False)
    item = {"global_crops": normal(2, 3, 32, 32), "local_crops": normal(2, 3, 8, 8), "epoch": 0}
    samples = [{**item, "sample_id": index} for index in range(4)]
    batch = without_ids(DinoCollator((8, 8), mask_probability=1.0)(samples))
    args = arguments(tmp_path, mode=mode, init_from="x", global_crop_size=32, per_device_train_batch_size=4)
    for depth in (6, 12):
        args.num_trained_blocks = depth - 2
        config = tiny_config(hidden_size=48, num_hidden_layers=depth, image_size=32, num_attention_heads=1, **fields)
        backbone = choose_trained(RegViTModel(config), args, new_registers=False)
        network = SelfDistillation(backbone, dino_head=SHAPE, lora_scale=2.0 if mode == "lora" else None)
        if checkpointing:
            network.gradient_checkpointing_enable()
        total, loss = kept_for_backward(network, batch)
        counted.append(total)
        stated.append(memory_of_step(network, args))
        loss.backward()
        gradients = sum(one.grad.numel() * 4 for one in network.parameters() if one.grad is not None)
        assert stated[-1]["gradients and optimizer"] == 3 * gradients
        assert stated[-1]["weights"] == sum(tensor.numel() * 4 for tensor in network.state_dict().values())
    difference = stated[1]["activations"] - stated[0]["activations"]
    assert difference == pytest.approx(counted[1] - counted[0], rel=0.25)


def test_memory_is_stated_before_the_first_step_and_advice_follows_if_it_is_short(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", logger="hf_regvit")
    source = own_model(tmp_path / "source")
    continued(tmp_path / "a", source, max_steps=1)
    assert "Memory of a process, estimated: weights " in caplog.text
    assert "Memory will probably run out" not in caplog.text
    monkeypatch.setattr("hf_regvit.pretraining.trainer.free_memory", lambda device: 1000)
    continued(tmp_path / "b", source, max_steps=1, mode="full")
    assert "Memory will probably run out. Try, in this order: --" in caplog.text
    assert "--mode lora or last_blocks (fewer moments of Adam)" in caplog.text


@pytest.mark.slow
def test_a_tower_without_cls_has_all_measurements_and_panels(tmp_path):
    data = tinted_folder(tmp_path / "data", ("red", "blue"), train=6, validation=3)
    tiny_source("SiglipVisionModel", image_size=16, patch_size=4, hidden_size=16).save_pretrained(tmp_path / "source")
    options = {**FAST, "data": str(data), "init_from": str(tmp_path / "source"), "monitor_steps": 1, "knn_steps": 1}
    pretrain(arguments(tmp_path / "run", panel_steps=1, linear_probe=True, **options))
    (last,) = [
        line for line in json_lines(tmp_path / "run" / "metrics.jsonl") if line.get("loss") and line["step"] == 2
    ]
    assert {"feature_std", "outlier_share", "register_cosine", "image_drift", "eval_linear"} <= last.keys()
    assert "cls_to_register_attention" not in last
    assert (tmp_path / "run" / "panels" / "step_000002.png").is_file()
