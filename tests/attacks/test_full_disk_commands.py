"""Full disks under the commands that publish, show and check: one sentence with file and bytes, nothing left."""

import re
import shutil
import tempfile

import pytest
from full_disks import error_line, files_up_to, small_disk

from builders import class_folder, encoded, noise, save_model, tiny_model
from hf_regvit.app import cli
from hf_regvit.app.demo import launch_options, write_features, write_figures
from hf_regvit.app.demo_page import MapRequest, read_views
from hf_regvit.app.exploration import Explorer, InputImage
from hf_regvit.models.processing import default_image_processor
from hf_regvit.models.saving import NoSpaceError
from hf_regvit.models.tokens import TokenReader
from hf_regvit.training.run_folder import RunFolderInUseError, run_lock
from tiny_run import arguments

pytestmark = pytest.mark.attacks
SIZES = (0, 3_000, 60_000, 300_000)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model alone, and a run with its curves and a diagnosis."""
    root = tmp_path_factory.mktemp("models")
    save_model(tiny_model(), root / "alone", default_image_processor(32))
    shutil.copytree(root / "alone", root / "run" / "backbone")
    recipe = "data: [photos]\nglobal_crop_size: 32\nnum_local_crops: 2\nlocal_crop_size: 16\nlearning_rate: 0.1\n"
    recipe += "per_device_train_batch_size: 4\nhead_num_prototypes: 8\ncentering: softmax\n"
    (root / "run" / "resolved_recipe.yaml").write_text(recipe)
    noise(0, (640, 480)).save(root / "run" / "curves.png")
    class_folder(root / "images", a=8, b=8)
    diagnose = ["diagnose", "--model", root / "alone", "--data", root / "images", "--output_dir", root / "diagnosis"]
    assert cli.main([*map(str, diagnose), "--max_images", "16"]) == 0
    return root


def publish(models, kind, output):
    named = ["publish", "--model", str(models / kind), "--license", "mit", "--output_dir", str(output)]
    return [*named, "--reports", str(models / "diagnosis")] if kind == "run" else [*named, "--data", "images"]


@pytest.mark.parametrize("kind", ["alone", "run"])
def test_publish_on_a_full_disk_is_one_sentence_and_leaves_no_half_bundle(kind, models, tmp_path, capsys):
    for size in SIZES:
        with files_up_to(size):
            status = cli.main(publish(models, kind, tmp_path / str(size) / "bundle"))
        shown = capsys.readouterr().err
        assert (status, size) in ((1, size), (0, 300_000)), shown
        if status:
            line = error_line(shown)
            assert "/.unfinished-" not in line
            whole = (tmp_path / str(size) / "bundle" / "manifest.json").exists()
            assert ("The bundle is whole." in shown) == whole
            assert whole or not list(tmp_path.rglob("*.*"))
    assert cli.main(publish(models, kind, tmp_path / "300000" / "bundle")) == 0


@pytest.mark.parametrize("format", ["onnx", "openvino", "torch"])
def test_export_on_a_full_disk_is_one_sentence_and_leaves_nothing(format, models, tmp_path, capsys):
    output = tmp_path / "new" / "files"
    words = ["export", "--model", str(models / "alone"), "--output_dir", str(output), "--format", format]
    for size in (500, 60_000):  # before and while the file is written
        with files_up_to(size):
            assert cli.main(words) == 1
        error_line(capsys.readouterr().err)
        assert list(output.parent.iterdir()) == []


def test_publish_with_a_full_temporary_folder_keeps_the_bundle(models, tmp_path, capsys, monkeypatch):
    bundle = tmp_path / "bundle"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for size in (40_000, 400_000, 900_000):  # for the images, the code files, the answers
        with small_disk(tmp_path / "temporary", size):
            status = cli.main(publish(models, "alone", bundle))
            shown = capsys.readouterr().err
            assert status == 0 or "which TMPDIR chooses. The bundle is whole." in shown
            assert status == 0 or str(tmp_path / "temporary") in error_line(shown)
            assert status == 1 or size == 900_000
            assert list((tmp_path / "temporary").iterdir()) == []
        (tmp_path / "temporary").rmdir()
    assert (bundle / "manifest.json").exists()


@pytest.mark.parametrize("size", [0, 500, 2_000, 4_000])
def test_downloads_of_the_demo_are_written_whole_or_not_at_all(size, tmp_path):
    processor = default_image_processor(32)
    explorer = Explorer({name: TokenReader(tiny_model(), processor) for name in "ab"}, reference=[noise()])
    image, request = InputImage.of(noise(), "x"), MapRequest(("a", "b"), side=32, layer=2)
    views = read_views(explorer, image, request)
    for write in (
        lambda: write_features(views, image, tmp_path),
        lambda: write_figures(views, image, request, tmp_path),
    ):
        with files_up_to(size), pytest.raises(NoSpaceError, match=r"could not be written .* it needs"):
            write()
        assert not list(tmp_path.glob("*.zip"))
        assert not list(tmp_path.glob(".*"))


def test_uploads_to_the_demo_are_refused_before_the_disk_is_full(tmp_path, monkeypatch):
    """Gradio would answer 500, and keep the half of the file that did fit, so that nobody could upload any more."""
    gr = pytest.importorskip("gradio")
    import httpx

    with small_disk(tmp_path / "disk", 50 << 20) as disk:
        monkeypatch.setenv("GRADIO_TEMP_DIR", str(disk))
        with gr.Blocks(analytics_enabled=False) as app:
            gr.File()
        options = {name: value for name, value in launch_options(port=0).items() if name in ("app_kwargs", "quiet")}
        _, address, _ = app.launch(**options, prevent_thread_lock=True)
        try:
            with httpx.Client(base_url=address, timeout=60) as client:
                for fill, expected in ((0, 200), (20 << 20, 507)):
                    (disk / "other").write_bytes(bytes(fill))
                    answer = client.post("/gradio_api/upload", files={"files": ("a.png", encoded(0))})
                    assert answer.status_code == expected
                assert answer.text == "The disk of the server is full."
                assert client.get("/").status_code == 200
        finally:
            app.close()
        assert not [path for path in disk.iterdir() if path.is_file() and path.name != "other"]


def test_a_lock_that_cannot_be_written_is_one_sentence_and_is_not_left(tmp_path):
    args = arguments(tmp_path / "run")
    with (
        files_up_to(10),
        pytest.raises(NoSpaceError, match=r"run\.lock' could not be written .* it needs about 0\.\d"),
        run_lock(args),
    ):
        pytest.fail("the run began")
    assert not (tmp_path / "run" / "run.lock").exists()
    with run_lock(args), pytest.raises(RunFolderInUseError), run_lock(args):
        pass


@pytest.mark.parametrize("command", ["data-check", "doctor"])
def test_commands_that_write_nothing_need_no_space(command, tmp_path, capsys):
    class_folder(tmp_path / "images", a=4, b=4)
    before = sorted(tmp_path.rglob("*"))
    options = ["--data", str(tmp_path / "images")] if command == "data-check" else ["--no_self_test"]
    with files_up_to(0):
        assert cli.main([command, *options]) == 0
    assert "Traceback" not in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


# KiB
DISKS = {"pretrain": (32, 512, 2048, 3072), "publish": (32, 256, 1024, 4096), "extract": (16, 64, 128, 256)}


@pytest.mark.parametrize("command", DISKS)
def test_a_real_small_disk_agrees_with_the_simulated_ones(command, models, tmp_path, capsys):
    class_folder(tmp_path / "images", a=20, b=20)
    statuses = []
    for size in DISKS[command]:
        with small_disk(tmp_path / str(size), size << 10) as disk:
            output = disk / "out"
            named = ["--data", str(tmp_path / "images"), "--output_dir", str(output)]
            words = {
                "pretrain": ["pretrain", *named, *PRETRAIN],
                "publish": publish(models, "run", output),
                "extract": ["extract", "--model", str(models / "alone"), "--shard_size", "8", *named],
            }
            statuses.append(cli.main(words[command]))
            shown = capsys.readouterr().err
            if statuses[-1]:
                assert str(disk) in error_line(shown)
            assert not [path for path in disk.rglob(".*") if re.search("unfinished|partial|saving", path.name)]
            whole = {"pretrain": "backbone/config.json", "publish": "manifest.json", "extract": "index.json"}[command]
            assert (output / whole).exists() == (statuses[-1] == 0)
    assert statuses[0] == 1
    assert statuses[-1] == 0


PRETRAIN = [
    "--preset", "tiny", "--hidden_size", "16", "--num_hidden_layers", "2", "--num_attention_heads", "2",
    "--patch_size", "4", "--global_crop_size", "16", "--local_crop_size", "8", "--num_local_crops", "2",
    "--head_num_prototypes", "12", "--head_hidden_size", "10", "--head_bottleneck_size", "6", "--use_cpu",
    "--per_device_train_batch_size", "8", "--max_steps", "4", "--save_steps", "2", "--knn_steps", "0",
    "--monitor_steps", "0", "--panel_steps", "0", "--dataloader_num_workers", "0",
]  # fmt: skip
