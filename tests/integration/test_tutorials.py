"""Run every bash and Python block of the tutorials in order, in one folder, as a reader would type it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from builders import encoded, image_table, json_lines, mask_folder, noise, save_model, tiny_source
from helpers import load_script
from hf_regvit import RegViTConfig, RegViTModel

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
PAGES = [*TUTORIALS, DOCS / "how_to" / "export_a_model.md"]
IN_A_KERNEL = "compare_two_backbones"  # its notebook is run, which has the same code


BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.S | re.M)


@pytest.fixture
def workplace(tmp_path) -> Path:
    """Create a folder with 48 images cut from the embedded ones, and a recipe that takes seconds."""
    from hf_regvit.data.builtin import builtin_images

    folder = tmp_path / "my_photos"
    folder.mkdir()
    photos = builtin_images()
    photos["chelsea"].save(folder / "cat.png")
    for number in range(47):
        name = list(photos)[number % len(photos)]
        left, top = 11 * number % 90, 7 * number % 60
        inside = folder / name
        inside.mkdir(exist_ok=True)
        photos[name].crop((left, top, left + 100, top + 100)).save(inside / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    recipe = (ROOT / "examples" / "own_images_cpu.yaml").read_text()
    shrink = {
        "per_device_train_batch_size": 8, "num_hidden_layers": 2, "head_num_prototypes": 64, "save_steps": 4,
        "logging_steps": 2,
    }  # fmt: skip
    for option, value in shrink.items():
        recipe, count = re.subn(rf"^{option}: .*$", f"{option}: {value}", recipe, flags=re.M)
        assert count == 1, option
    # One bad file in 49 is above the one percent that a real run tolerates.
    (tmp_path / "recipe.yaml").write_text(recipe + "max_bad_share: 0.05\n")
    recipe = (ROOT / "examples" / "continue_dinov3_cpu.yaml").read_text()
    shrink = {
        "per_device_train_batch_size": 8, "head_num_prototypes": 64, "save_steps": 4, "knn_steps": 2,
        "global_crop_size": 64, "local_crop_size": 32,
    }  # fmt: skip
    for option, value in shrink.items():
        recipe, count = re.subn(rf"^{option}: .*$", f"{option}: {value}", recipe, flags=re.M)
        assert count == 1, option
    (tmp_path / "continue.yaml").write_text(recipe + "max_bad_share: 0.05\n")
    geometry = {"num_register_tokens": 4, "patch_size": 16, "image_size": 64, "key_bias": False}
    dinov3 = tiny_source("DINOv3ViTModel", **geometry)
    save_model(dinov3, tmp_path / "dinov3")
    # Three classes of twelve small images, cut from three of the embedded ones.
    for name, photo in (("cats", "chelsea"), ("dogs", "coffee"), ("others", "rocket")):
        (tmp_path / "my_classes" / name).mkdir(parents=True)
        for number in range(12):
            left, top = 17 * number, 9 * number
            tile = photos[photo].crop((left, top, left + 96, top + 96))
            tile.save(tmp_path / "my_classes" / name / f"{number:03d}.png")
    # An untrained backbone in the layout of `regvit pretrain`
    torch.manual_seed(0)
    config = RegViTConfig.from_preset("tiny", num_hidden_layers=2, image_size=32, patch_size=8)
    save_model(RegViTModel(config), tmp_path / "backbone")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("tutorial", [page for page in PAGES if page.stem != IN_A_KERNEL], ids=lambda page: page.stem)
def test_tutorial_runs(tutorial, workplace):
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    steps = BLOCK.findall(tutorial.read_text())
    assert steps
    for language, code in steps:
        code = code.replace("--max_steps 60", "--max_steps 8").replace("--signal=INT 90", "--signal=INT 25")
        command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    if tutorial.stem == "train_on_your_own_images":
        check_run_folder(workplace / "runs" / "first", tutorial.read_text())
        assert "broken.jpg" in (workplace / "runs" / "first" / "bad_images.jsonl").read_text()
    if tutorial.stem == "continue_dinov3_on_your_own_images":
        lines = json_lines(workplace / "runs" / "lora" / "metrics.jsonl")
        assert [line["step"] for line in lines if "eval_patch_agreement" in line] == [0, 2, 4, 6, 8]
        assert list((workplace / "comparison").iterdir())
    if tutorial.stem == "fine_tune_on_your_own_folder":
        check_run_folder(workplace / "runs" / "full", tutorial.read_text())


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_a_notebook_is_its_tutorial(tutorial):
    wanted = load_script("scripts/dev/write_notebooks.py").notebook_of(tutorial)
    found = nbformat.read(ROOT / "docs" / "notebooks" / f"{tutorial.stem}.ipynb", as_version=4)
    assert found == wanted, "run python scripts/dev/write_notebooks.py"
    blocks = [
        ("%%bash\n" if language == "bash" else "") + code for language, code in BLOCK.findall(tutorial.read_text())
    ]
    assert [cell.source for cell in found.cells if cell.cell_type == "code"] == [code.rstrip("\n") for code in blocks]


@pytest.mark.slow
def test_a_notebook_runs_in_a_kernel(workplace, monkeypatch):
    from nbclient import NotebookClient

    bin_folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(ROOT / "docs" / "notebooks" / f"{IN_A_KERNEL}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(workplace)}}).execute()
    assert any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.slow
def test_the_quickstart_runs(workplace):
    """Run the quickstart without the installation and the demo server, with a local folder in place of Hub ids."""
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    save_model(tiny_source("Dinov2WithRegistersModel", image_size=28, patch_size=14), workplace / "dinov2")
    ran = []
    for language, code in BLOCK.findall((ROOT / "docs" / "quickstart.md").read_text()):
        lines = code.replace("\\\n", " ").splitlines()
        code = "\n".join(line for line in lines if not line.startswith(("pip install", "regvit demo")))
        code = re.sub(r"facebook/dinov2[\w-]*", "dinov2", code)
        code = code.replace("regvit doctor", "regvit doctor --no_self_test").replace("max_steps 10", "max_steps 2")
        command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        ran += re.findall(r"^regvit (\w+)", code, flags=re.M)
        for shape in re.findall(r"# (\(\d+, .*?\))", code):
            assert f"torch.Size([{shape[1:-1]}])" in done.stdout
    assert ran == ["doctor", "diagnose", "convert", "pretrain"]
    assert (workplace / "diagnosis" / "report.html").is_file()
    assert (workplace / "runs" / "first" / "backbone" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_page_on_dense_features_runs(workplace):
    """Run the page without the demo, with a small model, its image sizes, and small data of every kind."""
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    maps = [np.kron(np.arange(6).reshape(2, 3) % 2, np.ones((10, 8))).astype(np.uint8)] * 6
    for split in ("train", "validation"):
        mask_folder(workplace / "scenes", maps, split=split)
    for name in ("a.jpg", "b.jpg"):
        noise(0, (48, 40)).save(workplace / name)
    rows = [encoded(noise(seed, (48, 40))) for seed in range(4)]
    image_table(workplace / "boxes.parquet", image=rows, bbox=[[4.0, 4.0, 20.0, 20.0]] * 4)
    ran = []
    for language, code in BLOCK.findall((ROOT / "docs" / "how_to" / "better_dense_features.md").read_text()):
        code = "\n".join(line for line in code.splitlines() if not line.startswith("regvit demo"))
        for word, small in {
            "MODEL": "backbone", "FOLDER": "scenes", "IMAGES": "my_photos", "BOXES": "boxes.parquet",
            "224 448": "32 64", "layer=9": "layer=1", "--tasks segmentation": "--tasks segmentation --dense_steps 4",
        }.items():  # fmt: skip
            code = code.replace(word, small)
        command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        ran += re.findall(r"^regvit (\w+)", code, flags=re.M)
    assert ran == ["dense", "extract", "evaluate", "evaluate"]
    assert (workplace / "dense" / "dense_settings.json").is_file()
    assert (workplace / "objects" / "report.json").is_file()


@pytest.mark.slow
def test_the_page_on_similar_images_runs(workplace):
    """Run the page with a small model and one process for all its Python, which is one program in pieces."""
    torch.manual_seed(0)  # LayerScale 1, or CLS would be the same for all images
    config = RegViTConfig.from_preset(
        "tiny", num_hidden_layers=2, image_size=32, patch_size=8, layerscale_value=1.0, initializer_range=0.2
    )
    save_model(RegViTModel(config), workplace / "random")
    names = {"MODEL": "random", "FOLDER": "my_photos", "QUERY.jpg": "my_photos/cat.png"}
    code = {"bash": "", "python": ""}
    for language, block in BLOCK.findall((ROOT / "docs" / "how_to" / "search_a_folder.md").read_text()):
        for word, small in names.items():
            block = block.replace(word, small)
        code[language] += block
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    options = {"cwd": workplace, "env": environment, "capture_output": True, "text": True, "check": False}
    for command in (["bash", "-euc", code["bash"]], [sys.executable, "-c", code["python"]]):
        done = subprocess.run(command, **options)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    lines = done.stdout.splitlines()
    assert lines[0].startswith("1.000")
    assert lines[0].endswith(".png")
    assert float(lines[-1].removeprefix("recall of the 10 nearest: ")) >= 0.95


def check_run_folder(folder: Path, text: str) -> None:
    """Check that the run folder has the files of the tutorial's table, except those that only some runs have."""
    names = re.findall(r"^\| (`.*?`) \|(?!.*if there were any)", text, flags=re.M)
    for name in re.findall(r"`([^`]+)`", " ".join(names)):
        assert list(folder.glob(name.rstrip("/"))), name


def test_shell_is_there():
    assert shutil.which("bash")


def test_images_of_the_tutorials_exist():
    for tutorial in PAGES:
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", tutorial.read_text()):
            Image.open(tutorial.parent / picture).verify()
