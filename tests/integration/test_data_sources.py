"""Tests of data sources: parquet, tar and folders, one or several, copied or streamed, up to a full run."""

import io
import json
import shutil

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from builders import image_table, tar_file
from helpers import requires_shared, shared_dir
from hf_regvit.app.cli import main
from hf_regvit.data import bad_images as bad_images_module
from hf_regvit.data import decoding as image_guard
from hf_regvit.data import source as images
from hf_regvit.data.loading import load_images, stream_images
from hf_regvit.pretraining.arguments import PretrainingArguments
from hf_regvit.pretraining.run import pretrain
from hf_regvit.training import samplers
from tiny_run import same_state

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    """Forty different encoded images of 48 x 40 pixels."""
    tiles = load_images("photos")
    encoded = []
    for i in range(40):
        buffer = io.BytesIO()
        tiles[50 * i].image.crop((0, 0, 48, 40)).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    return encoded


def write_parquet(path, pictures, *, first=0):
    import datasets

    labels = [(first + i) % 2 for i in range(len(pictures))]
    image_table(path, types={"label": datasets.ClassLabel(names=["a", "b"])}, image=pictures, label=labels)


def write_tar(path, pictures, *, first=0):
    members = {}
    for i, picture in enumerate(pictures, first):
        members |= {f"{i:06d}.png": picture, f"{i:06d}.cls": b"%d" % (i % 2)}
    tar_file(path, members)


def write_folder(root, pictures):
    for i, picture in enumerate(pictures):
        path = root / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)


@pytest.fixture(params=["parquet", "tar"])
def shards(request, tmp_path, pictures):
    """Three shards of 12 images."""
    write = {"parquet": write_parquet, "tar": write_tar}[request.param]
    for shard in range(3):
        write(
            tmp_path / "set" / f"train-{shard}.{request.param}",
            pictures[12 * shard : 12 * shard + 12],
            first=12 * shard,
        )
    return tmp_path / "set"


def test_sources_streamed_and_copied_are_the_same_images(shards, pictures):
    source, stream = load_images(shards), stream_images(shards)
    assert (len(source), stream.num_shards) == (36, 3)
    streamed = [record for shard in range(3) for record in stream.open_shard(shard)]
    assert [record.data for record in streamed] == pictures[:36]
    assert [source.encoded(i) for i in range(36)] == pictures[:36]
    assert [record.label for record in streamed] == list(source.labels) == [i % 2 for i in range(36)]
    assert len({record.id for record in streamed}) == 36
    # The same every time, in any order of shards.
    assert list(stream.open_shard(1)) == streamed[12:24]


def test_sources_ids_of_a_tar_stream_are_those_of_its_members(tmp_path, pictures):
    write_tar(tmp_path / "a.tar", pictures[:3])
    assert [record.id for record in stream_images(tmp_path / "a.tar").open_shard(0)] == [
        f"a.tar#{i:06d}.png" for i in range(3)
    ]
    assert list(load_images(tmp_path / "a.tar").ids) == [f"a.tar#{i:06d}.png" for i in range(3)]


def test_sources_f38_truncated_shards_in_a_stream(shards):
    path = sorted(shards.iterdir())[1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    bad = bad_images_module.BadImages(shards.parent / "bad_images.jsonl")
    sampler = samplers.StreamSampler([stream_images(shards)], seed=0, bad_images=bad)
    keys = []
    for key in sampler:
        if key[0] == 1:
            break
        keys.append(key)
    assert 24 <= len(keys) < 36
    assert "shard 1" in (shards.parent / "bad_images.jsonl").read_text()


def test_sources_folder_parquet_and_tar_mixed(tmp_path, pictures):
    write_folder(tmp_path / "folder", pictures[:10])
    write_parquet(tmp_path / "table.parquet", pictures[10:16])
    write_tar(tmp_path / "shard.tar", pictures[16:20])
    source = load_images([tmp_path / "folder", tmp_path / "table.parquet", tmp_path / "shard.tar"])
    assert source.parts == (10, 6, 4)
    assert len(set(source.ids)) == 20
    for i in (0, 9, 10, 15, 16, 19):
        order = [*range(0, 10, 2), *range(1, 10, 2), *range(10, 20)]  # class folders are read one after another
        assert (np.asarray(source[i].image) == np.asarray(image_guard.open_image(pictures[order[i]]))).all()
    assert source.labels is None  # the tar file numbers its classes, the others name them
    both = load_images([tmp_path / "folder", tmp_path / "table.parquet"])
    assert both.label_names == ("a", "b")
    assert both.labels == [0] * 5 + [1] * 5 + [0, 1] * 3
    subset = both.subset([12, 3])
    assert [subset.ids[0], subset.labels[0]] == [both.ids[12], 0]
    assert subset.encoded(0) == pictures[12]


def test_sources_a_held_out_part_in_one_source_only(tmp_path, pictures):
    write_folder(tmp_path / "one" / "train", pictures[:4])
    write_folder(tmp_path / "one" / "val", pictures[4:6])
    write_folder(tmp_path / "two", pictures[6:10])
    assert len(load_images([tmp_path / "one", tmp_path / "two"])) == 8
    assert len(load_images([tmp_path / "one", tmp_path / "two"], split="validation")) == 2
    with pytest.raises(images.MissingSplitError, match="no validation split"):
        load_images([tmp_path / "two", tmp_path / "one" / "train"], split="validation")
    with pytest.raises(ValueError, match="each once"):
        load_images([tmp_path / "two", tmp_path / "two"])


def test_sources_what_cannot_be_streamed(tmp_path, pictures):
    write_folder(tmp_path / "folder", pictures[:2])
    for source in (tmp_path / "folder", "photos"):
        with pytest.raises(ValueError, match="Remove --streaming"):
            stream_images(source)
    with pytest.raises(FileNotFoundError, match=r"could not be loaded as a Hub data set either"):
        stream_images("nobody/nothing")


@requires_shared
def test_sources_real_parquet_streamed():
    folder = shared_dir() / "data" / "oxford_pets3"
    source, stream = load_images(folder, split="validation"), stream_images(folder, split="validation")
    streamed = list(stream.open_shard(0))
    assert len(streamed) == len(source) == 108
    assert [record.label for record in streamed] == list(source.labels)
    assert stream.label_names == source.label_names
    assert streamed[50].data == source.encoded(50)


def arguments(tmp_path, name, source, **options) -> PretrainingArguments:
    defaults = dict(
        output_dir=str(tmp_path / name), data=source, global_crop_size=32, local_crop_size=16, num_local_crops=1,
        patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_register_tokens=2,
        head_num_prototypes=32, head_hidden_size=16, head_bottleneck_size=8, per_device_train_batch_size=4,
        koleo_loss_weight=0.0, max_steps=6, save_strategy="steps", save_steps=3, logging_steps=3, seed=3, use_cpu=True,
        disable_tqdm=True, report_to="none", monitor_steps=0, knn_steps=0, panel_steps=0,
    )  # fmt: skip
    return PretrainingArguments(**defaults | options)


@pytest.mark.slow
def test_runs_F01_F34_a_run_over_a_folder_with_a_bad_image(tmp_path, pictures):
    write_folder(tmp_path / "set", pictures)
    (tmp_path / "set" / "a" / "004.png").write_bytes(b"<!DOCTYPE html>")
    pretrain(arguments(tmp_path, "run", str(tmp_path / "set"), max_steps=12, max_bad_share=0.03))
    (record,) = map(json.loads, (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines())
    assert record["path"] == str(tmp_path / "set" / "a" / "004.png")
    assert record["kind"] == "not an image"
    assert record["epoch"] in (0, 1)
    # The next run in that folder does not keep records of images that were repaired.
    (tmp_path / "set" / "a" / "004.png").write_bytes(pictures[4])
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    pretrain(arguments(tmp_path, "run", str(tmp_path / "set"), max_steps=1))
    assert not (tmp_path / "run" / "bad_images.jsonl").exists()


def test_runs_F36_a_run_that_stops(tmp_path, pictures, capsys):
    write_folder(tmp_path / "set", pictures)
    for i in range(0, 40, 4):
        (tmp_path / "set" / "a" / f"{i:03d}.png").write_bytes(pictures[i][:200])
    recipe = {key: value for key, value in arguments(tmp_path, "run", "x").resolved().items() if value is not None}
    recipe["data"] = str(tmp_path / "set")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code = main(["pretrain", "--config", str(tmp_path / "recipe.yaml"), "--dataloader_num_workers", "1"])
    assert code == 1
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message.startswith("error: 2 of the ")
    assert "2 truncated" in message
    assert "--max_bad_share" in message


@pytest.mark.slow
def test_runs_weighted_sources(tmp_path, pictures):
    write_folder(tmp_path / "one", pictures[:24])
    write_folder(tmp_path / "two", pictures[24:32])
    sources = [str(tmp_path / "one"), str(tmp_path / "two")]
    pretrain(arguments(tmp_path, "run", sources, data_weights=[1.0, 1.0]))
    pretrain(arguments(tmp_path, "again", sources, data_weights=[1.0, 1.0], dataloader_num_workers=2))
    first, second = (load_file(tmp_path / name / "backbone" / "model.safetensors") for name in ("run", "again"))
    assert same_state(first, second)
    recipe = yaml.safe_load((tmp_path / "run" / "resolved_recipe.yaml").read_text())
    assert (recipe["data"], recipe["data_weights"]) == (sources, [1.0, 1.0])
    with pytest.raises(ValueError, match=r"data_weights=\[1.0\].*each of the 2 sources"):
        pretrain(arguments(tmp_path, "wrong", sources, data_weights=[1.0]))


def test_runs_options_on_the_command_line(tmp_path, capsys):
    flags = ["--data", "a", "b", "--data_weights", "3", "1", "--max_bad_share", "0.1", "--image_column", "img"]
    assert main(["pretrain", "--dry_run", "--json", "--output_dir", str(tmp_path), *flags]) == 0
    resolved = json.loads(capsys.readouterr().out)
    assert resolved["data"] == ["a", "b"]
    assert resolved["data_weights"] == [3.0, 1.0]
    assert (resolved["max_bad_share"], resolved["image_column"]) == (0.1, "img")


def test_runs_a_stream_needs_a_number_of_steps(shards, tmp_path):
    with pytest.raises(ValueError, match="Set --max_steps"):
        pretrain(arguments(tmp_path, "run", str(shards), streaming=True, max_steps=-1))


@pytest.mark.slow
def test_runs_streaming_resumes_bit_for_bit_with_any_number_of_workers(shards, tmp_path):
    """Twelve steps of four images cross the end of the first pass over 36 images. One image is bad."""
    if next(shards.iterdir()).suffix == ".tar":
        write_tar(shards / "train-3.tar", [b"<html>"], first=36)
    options = {"streaming": True, "max_bad_share": 0.1}
    watching = {"monitor_steps": 6, "panel_steps": 6}  # which changes nothing
    pretrain(arguments(tmp_path, "whole", str(shards), max_steps=12, save_steps=5, **options, **watching))
    options |= {"resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-5"), "dataloader_num_workers": 2}
    pretrain(arguments(tmp_path, "resumed", str(shards), max_steps=12, save_steps=5, **options))
    first, second = (load_file(tmp_path / name / "backbone" / "model.safetensors") for name in ("whole", "resumed"))
    assert same_state(first, second)
    saved = sorted((tmp_path / "whole").glob("checkpoint-*"))
    again = {**options, "max_steps": 12, "save_steps": 5, "resume_from_checkpoint": "last"}
    pretrain(arguments(tmp_path, "whole", str(shards), **again))  # started again after its end
    assert sorted((tmp_path / "whole").glob("checkpoint-*")) == saved
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert report["epochs"] is None  # a stream has no length
    assert report["images_seen"] == 48
    assert len(list((tmp_path / "whole" / "panels").iterdir())) == 3
