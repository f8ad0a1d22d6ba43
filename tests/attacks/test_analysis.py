"""Full disks and kills under `extract`, `evaluate`, `diagnose` and `retrofit`: one sentence, no half file."""

import json
import re
import shutil
import signal

import pytest
from full_disks import error_line, files_up_to
from kill_points import forked
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from builders import noise, planted_model, save_model
from hf_regvit.app import cli
from hf_regvit.models.processing import default_image_processor
from hf_regvit.models.tokens import TokenReader

pytestmark = pytest.mark.attacks

OPTIONS = {
    "extract": ["--shard_size", "16"],
    "evaluate": ["--tasks", "knn", "--knn_k", "3"],
    "diagnose": [],
    "retrofit": ["--top_k", "1", "--num_register_tokens", "1"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Model with outliers, and 40 images of two classes in class folders."""
    root = tmp_path_factory.mktemp("inputs")
    save_model(planted_model(), root / "model", default_image_processor(64, resize=64))
    for number in range(40):
        folder = root / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        noise(number, (64, 64)).save(folder / f"{number:02}.png")
    return root


def command(name, inputs, output):
    files = ["--model", str(inputs / "model"), "--data", str(inputs / "images"), "--output_dir", str(output)]
    return [name, *files, *OPTIONS[name]]


def assert_all_files_are_whole(folder):
    for path in folder.rglob("*"):
        assert not path.name.startswith("."), f"{path} is left"
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert file.keys()
        elif path.suffix == ".html":
            assert path.read_text().endswith("</html>\n")


@pytest.mark.parametrize("num_bytes", [0, 3_000, 30_000, 300_000])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_disk_that_fills_up_is_one_sentence_and_leaves_no_half_file(name, num_bytes, inputs, tmp_path, capsys):
    with files_up_to(num_bytes):
        status = cli.main(command(name, inputs, tmp_path / "out"))
    shown = capsys.readouterr()
    assert_all_files_are_whole(tmp_path)
    if status:
        assert str(tmp_path) in error_line(shown.err)
        # The numbers that took the time are printed with the error.
        result = {"evaluate": "| knn ", "diagnose": "verdict ", "retrofit": "verdict "}
        assert name == "extract" or result[name] in shown.err
    else:
        assert num_bytes > 0
    assert cli.main(command(name, inputs, tmp_path / "out")) == (name == "retrofit" and status == 0)
    assert_all_files_are_whole(tmp_path)


@pytest.mark.parametrize("name", OPTIONS)
def test_space_is_looked_for_before_the_model_runs(name, inputs, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    monkeypatch.setattr(TokenReader, "read_many", lambda *args, **options: pytest.fail("the work began"))
    assert cli.main(command(name, inputs, tmp_path / "out")) == 1
    error_line(capsys.readouterr().err)
    assert not list(tmp_path.rglob("*.*"))


def test_scores_survive_a_cache_that_cannot_be_written(inputs, tmp_path, caplog):
    with files_up_to(20_000):  # enough for the report and its page, too little for the training features
        status = cli.main([*command("evaluate", inputs, tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")])
    assert status == 0
    assert "The features are not cached and will be computed again next time." in caplog.text
    assert json.loads((tmp_path / "out" / "report.json").read_text())["reports"][0]["scores"]
    assert all(path.stat().st_size < 20_000 for path in (tmp_path / "cache").iterdir())
    assert_all_files_are_whole(tmp_path)


# --- Kills

KILLS = {"extract": 15, "evaluate": 15, "diagnose": 15, "retrofit": 15}


def contents(folder):
    """Files by name, as far as they do not depend on time: JSON without seconds, tensors, otherwise the size."""
    found = {}
    for path in sorted(folder.rglob("*.*")):
        text = path.read_text() if path.suffix == ".json" else str(path.stat().st_size)
        if path.suffix == ".safetensors":  # its header may hold seconds
            text = str({name: hash(tensor.numpy().tobytes()) for name, tensor in load_file(path).items()})
        text = re.sub(r'("[a-z_]*seconds": )(\{[^}]*\}|[\d.]+)', r"\1", text)
        found[str(path.relative_to(folder))] = (
            None if path.suffix in (".html", ".md") or path.name == "manifest.json" else text
        )
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_a_killed_command_leaves_whole_files_and_the_next_one_finishes_its_work(name, inputs, tmp_path):
    status, changes = forked(lambda: cli.main(command(name, inputs, tmp_path / "whole")), tmp_path)
    assert (status, changes >= 5) == (0, True)
    for number in range(KILLS[name]):
        output = tmp_path / f"{number}"
        kill_at = 1 + number * (changes - 1) // max(KILLS[name] - 1, 1)
        status, _ = forked(lambda output=output: cli.main(command(name, inputs, output)), tmp_path, kill_at)
        assert status == -signal.SIGKILL, (kill_at, changes)
        for path in output.rglob(".*"):  # invisible until the next run
            assert re.search(r"^\.(unfinished-|.*\.partial$)", path.name)
        for path in [path for path in output.rglob("*.json") if "/." not in str(path)]:
            json.loads(path.read_text())
        if name == "retrofit" and (output / "config.json").exists():  # whole; figure and page may miss
            assert {path.name for path in (tmp_path / "whole").glob("*.*")} - {
                path.name for path in output.glob("*.*")
            } <= {"before_after.png", "retrofit.html"}
            continue
        assert cli.main(command(name, inputs, output)) == 0
        assert_all_files_are_whole(output)
        assert contents(output) == contents(tmp_path / "whole"), (kill_at, changes)
