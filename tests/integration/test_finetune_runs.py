"""Fine-tuning as a user runs it: the command line, every kind of start, what others load, signals, pushes."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)

from builders import SignalAt
from hf_regvit import RegViTForImageClassification
from hf_regvit.app.cli import main
from hf_regvit.hub.bundle import bundle
from hf_regvit.hub.card import card_header, check_card
from hf_regvit.models.processing import default_image_processor
from hf_regvit.training.signals import TrainingInterrupted
from tiny_finetune import SIDE, backbone, picture, run
from tiny_run import same_state

pytestmark = pytest.mark.usefixtures("without_figures")

FLAGS = [
    "--use_cpu", "--report_to", "none", "--disable_tqdm", "True", "--per_device_train_batch_size", "8",
    "--num_train_epochs", "1", "--save_strategy", "no", "--load_best_model_at_end", "False", "--learning_rate", "1e-3",
]  # fmt: skip


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Class folders with a validation part and a file that is no picture."""
    root = tmp_path_factory.mktemp("classes")
    for part, count in (("train", 8), ("validation", 3)):
        for label, name in enumerate(("blue", "green", "red")):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                picture(number + 100 * (part == "validation"), label).save(root / part / name / f"{number}.png")
    (root / "train" / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    return root


@pytest.fixture(scope="module")
def saved_backbone(tmp_path_factory):
    """What a pretraining run leaves: `run/backbone`."""
    folder = tmp_path_factory.mktemp("run")
    backbone(use_mask_token=True).save_pretrained(folder / "backbone")
    default_image_processor(SIDE).save_pretrained(folder / "backbone")
    return folder


def finetuned(capsys, *flags):
    assert main(["finetune", *map(str, flags), *FLAGS, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("inside", ["", "backbone"])
def test_from_a_pretraining_run_to_a_pipeline(classes, saved_backbone, tmp_path, capsys, inside):
    start, output = saved_backbone / inside, tmp_path / "out"
    result = finetuned(
        capsys, "--model", start, "--data", classes, "--output_dir", output, "--max_bad_share", "0.2",
        "--num_train_epochs", "1",
    )  # fmt: skip
    assert set(result) >= {"output_dir", "accuracy", "f1", "loss"}
    loaded = AutoModelForImageClassification.from_pretrained(output)
    assert loaded.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert loaded.config.use_mask_token is False
    classify = pipeline("image-classification", model=str(output), device="cpu")
    told = {entry["label"]: entry["score"] for entry in classify(picture(7, 2))}
    pixels = default_image_processor(SIDE)(images=picture(7, 2), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = loaded(pixels).logits.softmax(-1)[0].tolist()
    assert list(map(told.get, ("blue", "green", "red"))) == pytest.approx(expected, abs=1e-6)
    assert "broken.jpg" in (output / "bad_images.jsonl").read_text()
    assert not any("/" in str(row) and str(classes) in str(row) for row in (output / "README.md").read_text().split())


def test_from_a_vit_of_transformers_with_registers_added(classes, tmp_path, capsys):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=SIDE, patch_size=8
    )
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    default_image_processor(SIDE).save_pretrained(tmp_path / "vit")
    finetuned(
        capsys, "--model", tmp_path / "vit", "--train_dir", classes / "train", "--validation_dir",
        classes / "validation", "--output_dir", tmp_path / "out", "--num_register_tokens", "3", "--mode", "lora",
        "--max_bad_share", "0.2",
    )  # fmt: skip
    loaded = RegViTForImageClassification.from_pretrained(tmp_path / "out")
    assert (loaded.config.num_register_tokens, loaded.config.num_labels) == (3, 3)


def test_parquet_with_images_and_labels(tmp_path, capsys, saved_backbone):
    import datasets

    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])})
    for part, count in (("train", 16), ("validation", 5)):
        rows = {"picture": [], "kind": [i % 2 for i in range(count)]}
        for i in range(count):
            stream = io.BytesIO()
            picture(i, 2 * (i % 2)).save(stream, "PNG")
            rows["picture"].append({"bytes": stream.getvalue(), "path": None})
        (tmp_path / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / f"{part}.parquet")
    finetuned(
        capsys, "--model_name_or_path", saved_backbone, "--dataset_name", tmp_path / "data", "--image_column_name",
        "picture", "--label_column_name", "kind", "--output_dir", tmp_path / "out", "--mode", "linear",
    )  # fmt: skip
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["images"] == {"train": 16, "validation": 5, "seen": 16}
    assert metrics["parameters"]["trained"] == 2 * (2 * 16) + 2  # CLS and mean patch, two classes


def test_what_is_wrong_with_the_labels_is_one_line(classes, saved_backbone, tmp_path, capsys):
    only = tmp_path / "only"
    (only / "red").mkdir(parents=True)
    picture(0, 2).save(only / "red" / "0.png")
    flags = ["--model", str(saved_backbone), "--data", str(only), "--output_dir", str(tmp_path / "out")]
    assert main(["finetune", *flags, *FLAGS]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "single class, 'red'" in error
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_dry_run_prints_the_difference_and_trains_nothing(classes, saved_backbone, tmp_path, capsys):
    flags = ["--model", str(saved_backbone), "--data", str(classes), "--output_dir", str(tmp_path / "out")]
    assert main(["finetune", *flags, *FLAGS, "--dry_run", "--layer_decay", "0.7"]) == 0
    assert "layer_decay: 0.7" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_deit3_recipe_trains_from_scratch(classes, tmp_path, capsys):
    """The recipe file itself, with everything it switches on; only sizes, rate, precision and workers are others."""
    recipe = Path(__file__).parents[2] / "examples" / "deit3_vits16_from_scratch.yaml"
    output = tmp_path / "out"
    result = finetuned(
        capsys, "--config", recipe, "--data", classes, "--output_dir", output, "--preset", "tiny",
        "--image_size", "16", "--patch_size", "8", "--max_steps", "6", "--bf16", "False",
        "--dataloader_num_workers", "0", "--max_bad_share", "0.2", "--logging_steps", "1",
    )  # fmt: skip
    used = yaml.safe_load((output / "resolved_recipe.yaml").read_text())
    assert (used["loss"], used["augmentation"], used["repeated_augmentation"]) == ("bce", "three_augment", 3)
    assert (used["mixup_alpha"], used["cutmix_alpha"], used["drop_path_rate"]) == (0.8, 1.0, 0.05)
    model = RegViTForImageClassification.from_pretrained(output)
    assert (model.config.num_register_tokens, model.config.drop_path_rate) == (4, 0.05)
    assert any(name.endswith("layer_scale1.lambda1") for name in model.state_dict())
    assert 0 <= result["accuracy"] <= 1
    losses = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    card = (output / "README.md").read_text()
    for row in (
        "| loss | bce |",
        "| repeated augmentation | 3 |",
        "| augmentation | three_augment |",
        "| CutMix | 1.0 |",
    ):
        assert row in card


@pytest.mark.slow
def test_f60_a_signal_saves_and_the_run_goes_on_exactly(tmp_path):
    options = {"eval_strategy": "no", "drop_path_rate": 0.2}
    unbroken, _ = run(tmp_path / "a", **options)
    with pytest.raises(TrainingInterrupted) as stop:
        run(tmp_path / "b", callbacks=[SignalAt(1)], **options)
    assert stop.value.code == 85
    resumed, _ = run(tmp_path / "b", resume_from_checkpoint="last", **options)
    assert same_state(unbroken.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("mode", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_a_push_holds_what_loading_needs_and_nothing_private(tmp_path, hub, mode):
    result, _ = run(
        tmp_path / "run", mode=mode, num_train_epochs=1, push_to_hub=True, hub_model_id="someone/tiny",
        hub_strategy="every_save",
    )  # fmt: skip
    files = hub.files("someone/tiny")
    first = hub.repos["someone/tiny"].commits[1].files
    assert set(files) - {".gitattributes"} == {
        "README.md", "config.json", "configuration_regvit.py", "manifest.json", "metrics.json", "model.safetensors",
        "modeling_regvit.py", "preprocessor_config.json",
    }  # fmt: skip
    assert str(tmp_path).encode() not in b"".join(files.values())
    card = files["README.md"].decode()
    check_card(card.replace("---\n", "---\nlicense: mit\n", 1))  # only the author can choose a license
    assert "model-index" in card_header(card)
    assert 'name = "someone/tiny"' in files["README.md"].decode()
    unfinished = first["README.md"].decode()  # of a checkpoint: the same card with what is known by then
    check_card(unfinished.replace("---\n", "---\nlicense: mit\n", 1))
    assert "The training of this model is not finished." in unfinished
    assert f"| trained weights | {mode} |" in unfinished
    for number, commit in enumerate((first, files)):  # the push of a checkpoint can be loaded as well
        folder = tmp_path / f"download{number}"
        folder.mkdir()
        for name, content in commit.items():
            (folder / name).write_bytes(content)
        loaded = RegViTForImageClassification.from_pretrained(folder)
    assert same_state(loaded.state_dict(), result.state_dict())


@pytest.mark.slow
def test_the_card_of_a_run_is_the_one_that_is_published(tmp_path):
    run(tmp_path / "run", num_train_epochs=1, mode="lora")
    bundle(tmp_path / "run", tmp_path / "bundle", card={"license": "mit"})
    cards = [(tmp_path / name / "README.md").read_text() for name in ("run", "bundle")]
    index = [card_header(card)["model-index"][0]["results"] for card in cards]
    assert index[0] == index[1]
    start, end = "## Training data", "## Intended use"
    ours, theirs = (card[card.index(start) : card.index(end)] for card in cards)
    assert theirs.replace("\nAll settings are in `recipe.yaml`.\n", "") == ours
    assert "Top-1 accuracy" in ours


@pytest.mark.slow
def test_the_result_is_loaded_where_the_package_is_not(tmp_path):
    """In a process that cannot import hf_regvit, through the code files beside the weights."""
    result, _ = run(tmp_path / "run", num_train_epochs=1, mode="lora")
    picture(3, 1).save(tmp_path / "picture.png")
    code = (
        "import json, sys; sys.modules['hf_regvit'] = None\n"
        "from transformers import pipeline\n"
        "p = pipeline('image-classification', model='run', trust_remote_code=True, device='cpu')\n"
        "print(json.dumps({e['label']: e['score'] for e in p('picture.png')}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    pixels = default_image_processor(SIDE)(images=Image.open(tmp_path / "picture.png"), return_tensors="pt")
    with torch.no_grad():
        scores = result(**pixels).logits.softmax(-1)[0].tolist()
    assert list(map(told.get, ("blue", "green", "red"))) == pytest.approx(scores, abs=1e-6)


@pytest.mark.slow
def test_the_script_takes_the_options_of_the_example_script(classes, saved_backbone, tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "run_image_classification.py"
    flags = ["--model_name_or_path", saved_backbone, "--train_dir", classes / "train", "--validation_dir"]
    flags += [
        classes / "validation",
        "--output_dir",
        tmp_path / "out",
        "--max_bad_share",
        "0.2",
        "--do_train",
        "--do_eval",
    ]
    command = [sys.executable, str(script), *map(str, flags), *FLAGS, "--max_steps", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "confusion_matrix.png").is_file()
