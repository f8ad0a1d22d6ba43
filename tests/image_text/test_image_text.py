"""Training on images with texts as a whole: the result folder, resuming, the bias of the sigmoid loss."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, VisionTextDualEncoderModel, VisionTextDualEncoderProcessor

from builders import SignalAt, json_lines, spy, tinted, tinted_folder
from helpers import load_script
from hf_regvit import RegViTModel
from hf_regvit.image_text.network import ImageTextNetwork
from hf_regvit.image_text.run import train_image_text
from hf_regvit.models.processing import default_image_processor
from hf_regvit.models.saving import read_json
from hf_regvit.training.finite import NonFiniteError
from hf_regvit.training.signals import TrainingInterrupted
from tiny_image_text import arguments, captioned_folder, tower
from tiny_run import same_state

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow  # each test is one or more whole runs


class Poison(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.encoder.visual_projection.weight.register_hook(lambda gradient: gradient * math.inf)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return captioned_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A finished run with the sigmoid loss and an evaluation: its arguments and its encoder."""
    folder = tmp_path_factory.mktemp("runs")
    classes = tinted_folder(folder / "classes", train=4, validation=4)
    args = arguments(folder / "run", data, loss="sigmoid", eval_data=str(classes), diagnosis_images=10)
    return args, train_image_text(args)


def test_the_result_folder_loads_with_transformers(finished):
    args, encoder = finished
    loaded = VisionTextDualEncoderModel.from_pretrained(args.folder).eval()
    processor = VisionTextDualEncoderProcessor.from_pretrained(args.folder)
    inputs = processor(
        text=["a red image", "blue"], images=[tinted(0, 1)], padding=True, truncation=True, return_tensors="pt"
    )
    with torch.inference_mode():
        expected, outputs = encoder(**inputs), loaded(**inputs)
    assert outputs.logits_per_image.shape == (1, 2)
    torch.testing.assert_close(outputs.logits_per_image, expected.logits_per_image, atol=1e-5, rtol=0)
    assert isinstance(loaded.vision_model, RegViTModel)
    assert processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True).strip() == "a red image"


def test_the_vision_model_alone_is_a_regvit(finished):
    args, encoder = finished
    backbone = RegViTModel.from_pretrained(args.folder / "backbone")
    assert same_state(backbone.state_dict(), encoder.vision_model.state_dict())
    assert (args.folder / "backbone" / "preprocessor_config.json").is_file()


def test_the_bias_is_in_the_checkpoints_and_in_the_result_file(finished):
    args, encoder = finished
    saved = load_file(args.folder / "checkpoint-4" / "model.safetensors")
    result = read_json(args.folder / "result.json")
    assert saved["logit_bias"].item() == result["logit_bias"] != -10
    assert result["logit_scale"] == pytest.approx(encoder.logit_scale.exp().item())
    assert "logit_bias" not in load_file(args.folder / "model.safetensors")


def test_the_result_file_has_accuracies_and_the_diagnosis(finished):
    args, _ = finished
    result = read_json(args.folder / "result.json")
    for name in ("zero_shot", "linear_probe"):
        low, high = result[name]["interval"]
        assert 0 <= low <= result[name]["top1"] <= high <= 1
        assert result[name]["images"] == 12
    assert result["zero_shot"]["chance"] == pytest.approx(1 / 3)
    before, after = result["artifacts"]["before"], result["artifacts"]["after"]
    assert before["num_images"] == after["num_images"] == 10
    assert before["max"] != after["max"]
    assert result["steps"] == 4


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_resumed_run_equals_an_uninterrupted_one(loss, data, tmp_path):
    whole = train_image_text(arguments(tmp_path / "whole", data, loss=loss))
    with pytest.raises(TrainingInterrupted):
        train_image_text(arguments(tmp_path / "parts", data, loss=loss), callbacks=[SignalAt(1)])
    resumed = train_image_text(arguments(tmp_path / "parts", data, loss=loss, resume_from_checkpoint="last"))
    assert same_state(whole.state_dict(), resumed.state_dict())
    states = [load_file(tmp_path / name / "checkpoint-4" / "model.safetensors") for name in ("whole", "parts")]
    assert same_state(*states)


def test_a_run_without_clipping_is_checked_for_finite_gradients(data, tmp_path):
    train_image_text(arguments(tmp_path / "run", data, max_grad_norm=0.0, save_strategy="no"))
    with pytest.raises(NonFiniteError, match=r"but its gradient is not \(norms: encoder=(nan|inf)\)"):
        train_image_text(
            arguments(tmp_path / "stopped", data, max_grad_norm=0.0, save_strategy="no"), callbacks=[Poison()]
        )


def test_images_have_the_values_of_an_image_processor_without_normalization(data, tmp_path, monkeypatch):
    processor = default_image_processor(16)
    processor.do_normalize = False
    processor.save_pretrained(tower(tmp_path / "tower"))
    forward = spy(monkeypatch, ImageTextNetwork, "forward")
    train_image_text(arguments(tmp_path / "run", data, max_steps=1, save_strategy="no"))
    pixels = forward.call_args.kwargs["pixel_values"]
    assert 0 <= pixels.min() < pixels.max() <= 1


def test_a_run_with_other_texts_or_another_loss_does_not_resume(data, tmp_path):
    train_image_text(arguments(tmp_path / "run", data))
    with pytest.raises(ValueError, match="loss is sigmoid, but the checkpoint was written with softmax"):
        train_image_text(arguments(tmp_path / "run", data, loss="sigmoid", resume_from_checkpoint="last"))
    other = captioned_folder(tmp_path / "other")
    lines = json_lines(other / "metadata.jsonl")
    lines[0]["text"] = "something else"
    (other / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r"data is .*texts_sha256"):
        train_image_text(arguments(tmp_path / "run", other, resume_from_checkpoint="last"))


def test_the_run_learns_which_text_belongs_to_an_image(data, tmp_path):
    classes = tinted_folder(tmp_path / "classes", train=4, validation=8)
    run = {"max_steps": 40, "learning_rate": 3e-3, "save_strategy": "no", "eval_data": str(classes)}
    train_image_text(arguments(tmp_path / "run", data, templates=["a {} picture"], **run))
    result = read_json(tmp_path / "run" / "result.json")
    assert result["zero_shot"]["top1"] >= 0.6  # chance is a third
    lines = [line["loss"] for line in json_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert lines[-1] < lines[0]


def test_the_command_of_the_page_runs(tmp_path, capsys):
    """With its recipe on tinted class folders, whose names make the texts, and a smaller image and text encoder."""
    page = (ROOT / "docs" / "how_to" / "train_on_images_with_texts.md").read_text()
    (command,) = re.findall(r"^python (scripts/\S+) (--config .*)$", page, flags=re.MULTILINE)
    words = shlex.split(command[1])
    places = {"--config": ROOT / words[words.index("--config") + 1], "--init_from": tower(tmp_path / "tower")}
    places |= {"--data": tinted_folder(tmp_path / "data", train=6, validation=4), "--output_dir": tmp_path / "run"}
    for option, place in places.items():
        words[words.index(option) + 1] = str(place)
    words += shlex.split("--image_size 16 --text_hidden_size 64 --per_device_train_batch_size 6 --max_steps 2")
    words += shlex.split("--diagnosis_images 8 --use_cpu --report_to none --disable_tqdm")
    script = load_script(command[0])
    assert script.main(words) == 0
    printed = capsys.readouterr().out
    for line in ("| zero shot ", "| linear probe ", "| chance ", "| outlier_share "):
        assert line in printed
    assert {"backbone", "result.json", "model.safetensors"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_the_script_reports_an_error_in_one_line(tmp_path, capsys):
    script = load_script("scripts/run_image_text_training.py")
    assert script.main(["--data", str(tmp_path / "none"), "--output_dir", str(tmp_path / "run"), "--use_cpu"]) == 1
    assert re.match(r"error: '.*none' does not exist", capsys.readouterr().err)
    with pytest.raises(SystemExit) as stop:
        script.main(["--text_colum", "a"])
    assert stop.value.code == 2
    assert "Did you mean '--text_column'?" in capsys.readouterr().err
    assert script.main(["--help"]) == 0
    assert "--text_column" in capsys.readouterr().out
