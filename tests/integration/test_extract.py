"""Extraction as users run it: in memory and to shards, killed and taken up again, on one process and on two."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from builders import save_model, tiny_model
from hf_regvit import RegViTModel
from hf_regvit.app import cli
from hf_regvit.evaluation.extraction import (
    ExtractionSettings,
    TokenFeatures,
    extract_features,
    extract_to_folder,
    iterate_shards,
)
from hf_regvit.models.loading import open_model
from hf_regvit.models.processing import default_image_processor

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
NUM_IMAGES = 22


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of pictures of several sizes, every seventh of them broken."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        size = [(40, 32), (32, 48), (64, 64)][i % 3]
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        if i % 7 == 6:
            (folder / f"{i:03d}.png").write_bytes(b"broken")
    return folder


MODEL = tiny_model(**SIZES, num_register_tokens=2)
MODEL.image_processor = default_image_processor(32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_model(MODEL, tmp_path_factory.mktemp("model"))


SETTINGS = ExtractionSettings(batch_size=3, shard_size=5)
BAD = {"006.png", "013.png", "020.png"}


def shards_of(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("features-*.safetensors"))}


def assert_same_folder(one, other):
    assert shards_of(one) == shards_of(other)
    assert json.loads((Path(one) / "index.json").read_text()) == json.loads((Path(other) / "index.json").read_text())


@torch.no_grad()
def test_features_are_the_models_outputs(pictures):
    features = extract_features(MODEL, pictures, batch_size=4)
    processor = default_image_processor(32)
    assert len(features) == NUM_IMAGES - 3
    assert features.grid == (4, 4)
    assert {image.id for image in features.skipped} == BAD
    for i, name in enumerate(features.ids):
        output = MODEL(processor(images=Image.open(pictures / name), return_tensors="pt")["pixel_values"])
        torch.testing.assert_close(features.cls[i], output.pooler_output[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features.registers[i], output.register_tokens[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features.patches[i], output.patch_tokens[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_raw_features_of_another_block(pictures):
    images = [pictures / "000.png", pictures / "001.png"]
    raw = extract_features(MODEL, images, layer=1, final_norm=False)
    processor = default_image_processor(32)
    batch = torch.cat([processor(images=Image.open(path), return_tensors="pt")["pixel_values"] for path in images])
    states = MODEL(batch, output_hidden_states=True).hidden_states
    torch.testing.assert_close(raw.patches, states[1][:, 3:], atol=1e-5, rtol=1e-5)
    normed = extract_features(MODEL, images, layer=1)
    torch.testing.assert_close(normed.cls, MODEL.layernorm(states[1])[:, 0], atol=1e-5, rtol=1e-5)


def test_shards_hold_what_memory_holds(pictures, tmp_path):
    report = extract_to_folder(MODEL, pictures, tmp_path, settings=SETTINGS, progress=False)
    assert (report.complete, report.num_images, report.num_skipped) == (True, 19, 3)
    assert report.num_shards == report.num_shards_written == 5
    loaded, expected = TokenFeatures.load(tmp_path), extract_features(MODEL, pictures)
    assert (loaded.ids, loaded.skipped, loaded.grid) == (expected.ids, expected.skipped, expected.grid)
    for name in ("cls", "registers", "patches"):
        torch.testing.assert_close(getattr(loaded, name), getattr(expected, name), atol=1e-5, rtol=1e-5)
    assert sum(len(shard) for shard in iterate_shards(tmp_path)) == 19
    index = json.loads((tmp_path / "index.json").read_text())
    assert [len(shard["ids"]) + len(shard["skipped"]) for shard in index["shards"]] == [5, 5, 5, 5, 2]
    assert (index["layer"], index["dtype"], index["grid"], index["num_images"]) == (2, "float32", [4, 4], 19)
    assert not list(tmp_path.glob(".*"))
    tensors = load_file(tmp_path / "features-00000.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "cls": (5, 32), "registers": (5, 2, 32), "patches": (5, 16, 32)
    }  # fmt: skip


def test_an_unfinished_folder_goes_on(pictures, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    extract_to_folder(MODEL, pictures, whole, settings=SETTINGS, progress=False)
    extract_to_folder(MODEL, pictures, broken, settings=SETTINGS, progress=False)
    (broken / "index.json").unlink()
    (broken / "features-00001.safetensors").unlink()
    (broken / "features-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no index\.json.*resumes where it stopped"):
        TokenFeatures.load(broken)
    report = extract_to_folder(MODEL, pictures, broken, settings=SETTINGS, progress=False)
    assert report.num_shards_written == 2
    assert_same_folder(whole, broken)
    assert not list(broken.glob(".*"))


def test_another_extraction_is_not_mixed_in(pictures, checkpoint, tmp_path):
    extract_to_folder(MODEL, pictures, tmp_path, settings=SETTINGS, progress=False)
    with pytest.raises(ValueError, match=r"another extraction \(layer: 2, now 1\)"):
        extract_to_folder(MODEL, pictures, tmp_path, settings=ExtractionSettings(layer=1, shard_size=5))
    torch.manual_seed(1)
    other = RegViTModel(MODEL.config).eval()
    with pytest.raises(ValueError, match=r"another extraction \(weights: "):
        extract_to_folder(
            open_model(other, processor=default_image_processor(32)), pictures, tmp_path, settings=SETTINGS
        )
    with pytest.raises(ValueError, match=r"another extraction \(images: "):
        extract_to_folder(MODEL, [pictures / "000.png"], tmp_path, settings=SETTINGS)
    # The batch is no part of it: someone who ran out of memory goes on with smaller ones.
    extract_to_folder(MODEL, pictures, tmp_path, settings=ExtractionSettings(batch_size=1, shard_size=5))


def test_streams_give_the_same_shards(pictures, tmp_path):
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    rows = {"image": [{"path": None, "bytes": path.read_bytes()} for path in sorted(pictures.iterdir())]}
    table = Dataset.from_dict(rows, features=Features({"image": ImageFeature()}))
    for name, images in {"table": table, "stream": table.to_iterable_dataset()}.items():
        extract_to_folder(MODEL, images, tmp_path / name, settings=SETTINGS, progress=False)
    assert shards_of(tmp_path / "table") == shards_of(tmp_path / "stream")
    again = extract_to_folder(
        MODEL, table.to_iterable_dataset(), tmp_path / "stream", settings=SETTINGS, progress=False
    )
    assert (again.num_shards_written, again.num_images) == (0, 19)
    with pytest.raises(ValueError, match="contains other images than this part of the source"):
        extract_to_folder(MODEL, table.to_iterable_dataset().take(8), tmp_path / "stream", settings=SETTINGS)
    with pytest.raises(ValueError, match="more shards than the source needs"):
        extract_to_folder(MODEL, table.to_iterable_dataset().take(10), tmp_path / "stream", settings=SETTINGS)


@pytest.mark.parametrize("patches", [None, True])
def test_tables_are_read_by_pandas_and_datasets(pictures, tmp_path, patches):
    from datasets import load_dataset

    settings = ExtractionSettings(format="parquet", patches=patches, batch_size=3, shard_size=5)
    images = [*sorted(pictures.iterdir()), *[pictures / "006.png"] * 8]  # two shards have no readable image
    images = [pictures / "013.png"] * 5 + images
    report = extract_to_folder(MODEL, images, tmp_path, settings=settings, progress=False)
    assert (report.num_images, report.num_skipped, report.num_shards) == (19, 16, 7)
    expected = extract_features(MODEL, pictures)
    table = pandas.read_parquet(tmp_path / "parquet")
    assert list(table.columns) == ["id", "cls", "pooled", *(["patches"] if patches else [])]
    assert [Path(name).name for name in table.id] == list(expected.ids)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(torch.tensor(np.stack(table.cls)), expected.cls, **close)
    torch.testing.assert_close(torch.tensor(np.stack(table.pooled)), expected.patches.mean(1), **close)
    rows = load_dataset("parquet", data_dir=str(tmp_path / "parquet"), split="train").with_format("torch")
    torch.testing.assert_close(rows["cls"][:], expected.cls, **close)
    if patches:
        torch.testing.assert_close(torch.stack(list(rows["patches"])), expected.patches, **close)

    whole = {path.name: path.read_bytes() for path in (tmp_path / "parquet").iterdir()}
    assert len(whole) == 7
    for name in list(whole)[2:]:
        (tmp_path / "parquet" / name).unlink()
    (tmp_path / "index.json").unlink()
    again = extract_to_folder(MODEL, images, tmp_path, settings=settings, progress=False)
    assert again.num_shards_written == 5
    assert {path.name: path.read_bytes() for path in (tmp_path / "parquet").iterdir()} == whole
    with pytest.raises(ValueError, match=r"are tables\. Read them with pandas\.read_parquet"):
        TokenFeatures.load(tmp_path)
    with pytest.raises(ValueError, match="another extraction"):
        extract_to_folder(MODEL, images, tmp_path, settings=SETTINGS, progress=False)
    (tmp_path / "parquet" / "features-00000.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="contains no token features"):
        extract_to_folder(MODEL, images, tmp_path, settings=settings, progress=False)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_types_and_token_kinds(pictures, tmp_path, dtype):
    settings = ExtractionSettings(dtype=dtype, patches=False, max_images=4)
    extract_to_folder(MODEL, pictures, tmp_path, settings=settings, progress=False)
    features = TokenFeatures.load(tmp_path)
    assert features.cls.dtype == getattr(torch, dtype)
    assert features.patches.shape == (4, 0, 32)
    exact = extract_features(MODEL, [pictures / name for name in features.ids])
    torch.testing.assert_close(features.registers.float(), exact.registers, atol=0.05, rtol=0.01)


def test_a_damaged_model_writes_no_features(pictures, tmp_path):
    import copy

    damaged = copy.deepcopy(MODEL)
    damaged.layers[0].mlp.fc1.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"gives NaN or infinity at block 1\. Check its weights"):
        extract_to_folder(
            open_model(damaged, processor=default_image_processor(32)), pictures, tmp_path,
            settings=ExtractionSettings(layer=1), progress=False,
        )  # fmt: skip
    assert not list(tmp_path.glob("features-*"))


def test_numbers_that_do_not_fit_are_an_error(pictures, tmp_path):
    import copy

    large = copy.deepcopy(MODEL)
    large.layernorm.weight.data *= 1e6
    with pytest.raises(ValueError, match=r"do not fit into float16\. Use bfloat16 or float32"):
        extract_to_folder(
            open_model(large, processor=default_image_processor(32)), pictures, tmp_path,
            settings=ExtractionSettings(dtype="float16"), progress=False,
        )  # fmt: skip
    with pytest.raises(ValueError, match="dtype='int8' is unknown"):
        ExtractionSettings(dtype="int8")
    with pytest.raises(ValueError, match="does not exist in parquet files"):
        ExtractionSettings(dtype="bfloat16", format="parquet")
    with pytest.raises(ValueError, match="format='csv' is unknown, expected safetensors or parquet"):
        ExtractionSettings(format="csv")
    with pytest.raises(ValueError, match="shard_size=0 is too small"):
        ExtractionSettings(shard_size=0)


def test_models_without_cls(pictures, tmp_path):
    from transformers import IJepaConfig, IJepaModel

    model = IJepaModel(IJepaConfig(**SIZES, intermediate_size=32)).eval()
    features = extract_features(open_model(model, processor=default_image_processor(32)), pictures)
    assert features.cls is None
    features.save(tmp_path / "features.safetensors")
    loaded = TokenFeatures.load(tmp_path / "features.safetensors")
    assert loaded.cls is None
    assert loaded.ids == features.ids
    assert torch.equal(loaded.patches, features.patches)


def test_a_shard_of_bad_images_only(pictures, tmp_path):
    images = [pictures / "006.png", pictures / "013.png", pictures / "000.png"]
    settings = ExtractionSettings(shard_size=2)
    report = extract_to_folder(MODEL, images, tmp_path, settings=settings, progress=False)
    assert (report.num_images, report.num_skipped, report.num_shards) == (1, 2, 2)
    assert len(TokenFeatures.load(tmp_path)) == 1
    assert len(TokenFeatures.load(tmp_path).skipped) == 2
    with pytest.raises(ValueError, match="None of the 2 images"):
        extract_to_folder(MODEL, images[:2], tmp_path / "bad", settings=settings, progress=False)
    with pytest.raises(ValueError, match="None of the 2 images"):
        extract_features(MODEL, images[:2])


def test_processors_of_many_sizes_are_refused(pictures):
    from transformers import BitImageProcessor

    processor = BitImageProcessor(size={"shortest_edge": 32}, do_center_crop=False)
    images = [pictures / "002.png", pictures / "005.png", pictures / "003.png"]
    reader = open_model(MODEL, processor=processor)
    assert extract_features(reader, images[:2]).grid == (4, 4)
    other = open_model(MODEL, processor=BitImageProcessor(size={"shortest_edge": 36}, do_center_crop=False))
    with pytest.raises(ValueError, match="not a multiple of the patch size"):  # 40 x 32 is kept, 64 x 64 is halved
        extract_features(other, [pictures / "001.png", pictures / "007.png"])
    with pytest.raises(ValueError, match=r"different grids of patches, \[\(4, 4\), \(4, 5\)\]"):
        extract_features(reader, images)


def test_files_that_are_no_features(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match="contains no token features"):
        TokenFeatures.load(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError):
        TokenFeatures.load(tmp_path / "b.safetensors")


def test_the_command_line(checkpoint, pictures, tmp_path, capsys):
    args = ["extract", "--model", str(checkpoint), "--images", str(pictures), "--output_dir", str(tmp_path / "out")]
    args += ["--shard_size", "8", "--batch_size", "4", "--dtype", "float16", "--no_patches"]
    assert cli.main([*args, "--dry_run"]) == 0
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    assert cli.main([*args, "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert (report["complete"], report["num_images"], report["num_shards"]) == (True, 19, 3)
    assert "images/s" in printed.err
    assert TokenFeatures.load(tmp_path / "out").cls.dtype == torch.float16
    assert cli.main([*args[:-1], "--output_dir", str(tmp_path / "table"), "--format", "parquet"]) == 0
    assert np.stack(pandas.read_parquet(tmp_path / "table" / "parquet").cls).dtype == np.float16
    capsys.readouterr()
    assert cli.main([*args, "--layer", "1"]) == 1
    assert "another extraction (layer: 2, now 1)" in capsys.readouterr().err
    assert cli.main([*args[:4], str(tmp_path / "nothing"), "--output_dir", str(tmp_path / "x")]) == 1
    assert "does not exist" in capsys.readouterr().err


# --- Processes of their own ---


def command(checkpoint, pictures, out, *launcher):
    script = str(ROOT / "scripts" / "run_feature_extraction.py")
    return [
        *(launcher or [sys.executable]), script, "--model", str(checkpoint), "--images", str(pictures),
        "--output_dir", str(out), "--shard_size", "5", "--batch_size", "3",
    ]  # fmt: skip


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_a_killed_extraction_goes_on(checkpoint, pictures, tmp_path):
    """SIGKILL after the first shards; the second run computes the others only and the result is that of one run."""
    many = [str(path) for path in sorted(pictures.iterdir()) if path.name not in BAD]
    crowd = tmp_path / "crowd"
    crowd.mkdir()
    for copy in range(15):
        for path in many:
            (crowd / f"{copy:02d}_{Path(path).name}").write_bytes(Path(path).read_bytes())
    out = tmp_path / "killed"
    process = subprocess.Popen(
        command(checkpoint, crowd, out), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(shards_of(out)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = shards_of(out)
    total = -(-15 * len(many) // 5)
    assert 3 <= len(done) < total
    assert not (out / "index.json").exists()

    finished = subprocess.run(
        command(checkpoint, crowd, out), env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    report = json.loads(finished.stdout)
    assert report["num_shards_written"] == total - len(done)
    assert {name: shards_of(out)[name] for name in done} == done
    torch.set_num_threads(1)
    extract_to_folder(MODEL, crowd, tmp_path / "whole", settings=SETTINGS, progress=False)
    assert_same_folder(out, tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_write_what_one_writes(checkpoint, pictures, tmp_path):
    out = tmp_path / "two"
    # Despite its name `--multi_gpu` starts processes on CPUs too; with `--cpu` the launcher would start one only.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    options = {"num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no", "main_process_port": 0}
    for option, value in options.items():
        launcher += [f"--{option}", str(value)]
    finished = subprocess.run(
        command(checkpoint, pictures, out, *launcher), env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    torch.set_num_threads(1)
    extract_to_folder(MODEL, pictures, tmp_path / "one", settings=SETTINGS, progress=False)
    assert_same_folder(out, tmp_path / "one")
    written = [int(count) for count in re.findall(r"num_shards_written\W+(\d+)", finished.stdout)]
    assert written, "no process reported the complete folder"
    assert set(written) <= {2, 3}  # of 5 shards, each process had its share
