"""`make demo` from end to end on small folders: table, checkpoint, page, interruption and repetition."""

import json
import re
from pathlib import Path

import pytest
import torch

from builders import write
from helpers import load_script
from hf_regvit.data.loading import load_images

TINY = """
preset: tiny
hidden_size: 24
num_hidden_layers: 2
num_attention_heads: 2
patch_size: 8
global_crop_size: 32
local_crop_size: 16
num_local_crops: 2
head_num_prototypes: 64
head_hidden_size: 32
head_bottleneck_size: 16
per_device_train_batch_size: 16
max_steps: 4
save_strategy: steps
save_steps: 2
report_to: none
seed: 3
"""


demo = load_script("examples/demo.py")


def write_tiles(folder: Path, *, count: int, labelled: bool, every: int = 25) -> Path:
    """Write tiles of the built-in images as a folder of PNG files, like that of a user."""
    source = load_images("photos")
    for index in range(0, count * every, every):
        record = source[index]
        path = folder / (source.label_names[record.label] if labelled else "") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        record.image.save(path)
    return folder


@pytest.mark.slow
def test_labelled_folder_from_end_to_end(tmp_path, capsys, monkeypatch):
    recipe = write(tmp_path / "tiny.yaml", TINY)
    data = write_tiles(tmp_path / "tiles", count=60, labelled=True)
    (data / "astronaut" / "broken.jpg").write_bytes(b"<html>404</html>")
    run = tmp_path / "run"
    arguments = ["--data", str(data), "--config", str(recipe), "--output_dir", str(run)]
    assert demo.main(arguments) == 0
    output = capsys.readouterr()
    assert "broken.jpg" in output.err
    assert "HTML" in output.err
    for row in ("raw 16x16 pixels", "color mean and deviation", "RegViT, untrained", "RegViT, trained"):
        assert row in output.out
    scores = json.loads((run / "scores.json").read_text())
    assert all(0 <= value <= 1 for score in scores.values() for value in score.values())

    # One page that loads nothing from elsewhere, with the numbers of this run.
    assert f"Page         {(run / 'demo.html').as_uri()}" in output.out
    page = (run / "demo.html").read_text()
    assert set(re.findall(r'(?<!:)(?:src|href)="([^"]{5})', page)) == {"data:"}
    assert not re.search(r"@import|url\((?![$#]|data:)|https?://", page)
    shown = {f"<td>{value:.1%}</td>" for score in scores.values() for value in score.values()}
    assert shown <= set(re.findall(r"<td>[^<]*</td>", page))
    text = " ".join(re.search(r"class=.verdict[^>]*><p>(.*?)</p>", page, re.DOTALL)[1].split())
    assert text in " ".join(output.out.split())  # the paragraph to quote is printed, too
    tested = load_images(run / "images", split="validation")
    assert f"classify {max(scores['trained'].values()):.1%} of {len(tested)} held-out images correctly" in text
    assert page.count(" class=pixels ") == 4 * 2 * 7  # images, before and after, CLS and 4 registers, PCA and norm
    assert "The loss is a cross-entropy" in page
    assert "The loss is a cross-entropy" in output.out

    # Files for the user: weights as safetensors, image processor, card with the table, figures.
    backbone = run / "backbone"
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"} <= {
        path.name for path in backbone.iterdir()
    }
    card = (backbone / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| raw 16x16 pixels" in card
    assert str(tmp_path) not in card  # a card may be published
    assert not list(run.glob("checkpoint-*"))

    # A second call does not train, score or draw again.
    monkeypatch.setattr(demo, "pretrain", lambda *_, **__: pytest.fail("trained again"))
    before = {str(path): path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert demo.main(arguments) == 0
    again = capsys.readouterr().out
    assert "reusing the finished run" in again
    assert "RegViT, trained" in again
    after = {str(path): path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.slow
def test_folder_without_labels(tmp_path, capsys):
    """Fewer images than a batch, no classes: the demo still trains, and says why there is no comparison."""
    recipe = write(tmp_path / "tiny.yaml", TINY)
    data = write_tiles(tmp_path / "tiles", count=9, labelled=False)
    assert demo.main(["--data", str(data), "--config", str(recipe), "--output_dir", str(tmp_path / "run")]) == 0
    output = capsys.readouterr().out
    assert "9 for training, no labeled test images" in output
    assert "The kNN comparison was skipped" in output
    assert not (tmp_path / "run" / "scores.json").exists()
    page = (tmp_path / "run" / "demo.html").read_text()
    assert "Accuracy was not measured" in page
    assert page.count("<div class=nearest>") == 4  # images and their neighbors need no labels
    assert "held-out" not in page


class Stop:
    """Simulate Ctrl-C in the middle of step `at`."""

    def __init__(self, monkeypatch, at: int) -> None:
        from hf_regvit.pretraining.trainer import DinoTrainer

        self.count, self.at, self.step = 0, at, DinoTrainer.training_step
        monkeypatch.setattr(DinoTrainer, "training_step", lambda trainer, *args: self(trainer, *args))

    def __call__(self, trainer, *args):
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt
        return self.step(trainer, *args)


@pytest.mark.slow
def test_interrupted_run_continues_and_ends_where_an_unbroken_one_does(tmp_path, capsys, monkeypatch):
    recipe = write(tmp_path / "tiny.yaml", TINY)
    from safetensors.torch import load_file

    data = write_tiles(tmp_path / "tiles", count=20, labelled=False)
    arguments = ["--data", str(data), "--config", str(recipe), "--output_dir"]
    assert demo.main([*arguments, str(tmp_path / "unbroken")]) == 0
    with monkeypatch.context() as patch:
        Stop(patch, at=4)
        assert demo.main([*arguments, str(tmp_path / "run")]) == 130
    assert "Run the same command to continue" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoint-2").exists()
    # An interrupted save is newer, and must not be used.
    (tmp_path / "run" / "checkpoint-3").mkdir()
    (tmp_path / "run" / "checkpoint-3" / "trainer_state.json").write_text('{"epoch": ')
    assert demo.main([*arguments, str(tmp_path / "run")]) == 0
    assert "Pretraining   continuing" in capsys.readouterr().out
    expected = load_file(tmp_path / "unbroken" / "backbone" / "model.safetensors")
    actual = load_file(tmp_path / "run" / "backbone" / "model.safetensors")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_other_recipe_or_other_images_start_over(tmp_path, capsys):
    recipe = write(tmp_path / "tiny.yaml", TINY)
    data = write_tiles(tmp_path / "tiles", count=18, labelled=False)
    arguments = ["--data", str(data), "--config", str(recipe), "--output_dir", str(tmp_path / "run")]
    assert demo.main(arguments) == 0
    recipe.write_text(TINY.replace("max_steps: 4", "max_steps: 2"))
    assert demo.main(arguments) == 0
    assert "another recipe, so the run starts over" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "report.json").read_text())["steps"] == 2
    (data / "0.png").unlink()
    assert demo.main(arguments) == 0
    output = capsys.readouterr().out
    assert "The images have changed, so the run starts over." in output
    assert "17 for training" in output
    assert demo.main([*arguments, "--fresh"]) == 0
    assert "reusing" not in capsys.readouterr().out


def test_errors_are_one_line(tmp_path, capsys):
    recipe = write(tmp_path / "tiny.yaml", TINY)

    def error(*arguments: str) -> str:
        assert demo.main(["--config", str(recipe), *arguments]) == 1
        return capsys.readouterr().err

    run = ["--output_dir", str(tmp_path / "run")]
    assert "does not exist" in error("--data", str(tmp_path / "nowhere"), *run)
    (tmp_path / "empty").mkdir()
    assert "found nothing" in error("--data", str(tmp_path / "empty"), *run)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"")
    assert "None of the 1 images" in error("--data", str(tmp_path / "bad"), *run)
    one = write_tiles(tmp_path / "one", count=1, labelled=False)
    assert "1 readable training image" in error("--data", str(one), *run)
    # A folder with other files is never emptied.
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("x")
    assert "is not the folder of a demo run" in error(
        "--data", "digits", "--fresh", "--output_dir", str(tmp_path / "thesis")
    )
    assert "is not the folder of a demo run" in error("--data", str(one), "--output_dir", str(tmp_path / "thesis"))
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def test_images_of_the_default_data_are_whole():
    images = demo.shown_images("photos", load_images("photos"))
    assert [image.mode for _, image in images] == ["RGB"] * 4
    assert dict(images)["astronaut"].size == (512, 512)


def test_the_paragraph_claims_no_more_than_was_measured():
    class Labeled:
        label_names = ("a", "b")

        def __len__(self):
            return 50

    facts = {"time": "9 s", "threads": "2 CPU threads", "model": "a network", "images": "50 images without labels"}
    facts["classes"] = "classes"
    scores = {name: {"cosine": 0.5, "euclidean": 0.25} for name in ("trained", "untrained", *demo.SIMPLE)}
    ordinary = {"bimodal": 0.0, "outlier_share": 0.0, "norm_max": 9.0, "norm_median": 4.0}
    parts = Labeled(), Labeled()
    text = demo.quote(facts, scores, ordinary, *parts)
    assert "classify 50.0% of 50 held-out images correctly (2 classes)" in text
    assert "no patch of the images shown has more than 2.2 times the median norm" in text
    assert "held-out" not in demo.quote(facts, {}, ordinary, *parts)
    text = demo.quote(facts, scores, ordinary | {"bimodal": 1.0, "outlier_share": 0.021}, *parts)
    assert "2.10% of its patches have outlying norms" in text
    assert "no artifact" not in text


def test_names_of_run_folders(tmp_path):
    assert demo.slug("photos") == "photos"
    first, second = (demo.slug(str(tmp_path / name / "my images")) for name in ("a", "b"))
    assert first != second
    assert first.startswith("my-images-")
