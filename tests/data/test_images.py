"""Tests of image sources, image decoding and the evaluation processor."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from datasets import ClassLabel, Value
from PIL import Image

from builders import encoded as encode
from builders import image_table
from builders import plain_images as make_folder
from helpers import requires_shared, shared_dir
from hf_regvit.data import builtin
from hf_regvit.data import decoding as image_guard
from hf_regvit.data import files as files_module
from hf_regvit.data import loading as loading_module
from hf_regvit.data import source as source_module
from hf_regvit.data.decoding import BadImageError, open_image
from hf_regvit.data.loading import load_images
from hf_regvit.models import processing

# --- One image


def test_open_image_plain_rgb_is_unchanged(photo):
    image = open_image(encode(photo, "PNG"))
    assert image.mode == "RGB"
    assert (np.asarray(image) == np.asarray(photo)).all()


def test_open_image_path_and_bytes_agree(photo, tmp_path):
    (tmp_path / "a.jpg").write_bytes(encode(photo, "JPEG"))
    assert open_image(tmp_path / "a.jpg") == open_image((tmp_path / "a.jpg").read_bytes())


def test_open_image_missing_file(tmp_path):
    with pytest.raises(BadImageError, match="No such file"):
        open_image(tmp_path / "gone.jpg")


def test_open_image_error_survives_pickling():
    error = pickle.loads(pickle.dumps(BadImageError("a/b.jpg", "it is empty")))
    assert str(error) == "Cannot use image 'a/b.jpg': it is empty."


# --- Sources


def test_photos_counts_and_names(tiles):
    held_out = load_images("photos", split="validation")
    assert (len(tiles), len(held_out)) == (2214, 719)
    assert len(load_images("photos", split=None)) == 2214 + 719
    assert tiles.label_names == held_out.label_names == tuple(builtin.builtin_images())
    assert set(tiles.labels) == set(held_out.labels) == set(range(21))
    assert len(set(tiles.ids) | set(held_out.ids)) == 2214 + 719


def test_photos_a_tile_is_64_px_of_its_photograph(tiles):
    record = tiles[1000]
    assert record.image.size == (64, 64)
    name, _, place = record.id.split("/")
    assert tiles.label_names[record.label] == name
    top, left = map(int, place.split("_"))
    whole = builtin._builtin_images_384()[name]
    assert min(whole.size) == 384
    assert record.image == whole.crop((left, top, left + 64, top + 64))


def test_photos_no_pixel_is_in_both_parts(tiles):
    widths = {name: image.width for name, image in builtin._builtin_images_384().items()}
    for source, inside in (
        (tiles, lambda left, width: left + 64 <= 0.7 * width),
        (load_images("photos", split="validation"), lambda left, width: left >= 0.7 * width),
    ):
        for id in source.ids:
            name, _, place = id.split("/")
            assert inside(int(place.split("_")[1]), widths[name])


def test_photos_photographs_are_whole_and_need_no_network(monkeypatch):
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("went to the network"))
    photos = builtin.builtin_images()
    assert len(photos) == 21
    assert photos["astronaut"].size == (512, 512)
    assert all(image.mode == "RGB" for image in photos.values())
    # The horse is a silhouette on a transparent background, which must become white.
    assert np.asarray(photos["horse"]).max() == 255


def test_photos_source_can_be_sent_to_a_worker(tiles):
    copy = pickle.loads(pickle.dumps(tiles))
    assert copy[7].image == tiles[7].image


def test_photos_index_out_of_range(tiles):
    assert tiles[-1].id == tiles.ids[-1]
    with pytest.raises(IndexError, match="2214"):
        tiles[2214]


def test_digits_split_is_fixed_and_stratified():
    train, held_out = load_images("digits"), load_images("digits", split="validation")
    assert len(train) + len(held_out) == len(load_images("digits", split=None)) == 1797
    assert not set(train.ids) & set(held_out.ids)
    shares = np.bincount(held_out.labels) / (np.bincount(train.labels) + np.bincount(held_out.labels))
    assert np.abs(shares - 0.2).max() < 0.01
    assert held_out.ids == load_images("digits", split="validation").ids


def test_digits_image():
    record = load_images("digits")[0]
    assert record.image.size == (32, 32)
    assert record.image.mode == "RGB"
    assert np.asarray(record.image).max() > 200


def test_stratified_split_has_each_class_in_both_parts():
    labels = [0] * 10 + [1] * 2 + [2]
    train, held_out = files_module.stratified_split(labels, held_out_share=0.2, seed=0)
    assert sorted(train + held_out) == list(range(13))
    assert [labels[i] for i in held_out] == [0, 0, 1]  # the only image of a class goes to the training split
    assert (train, held_out) == files_module.stratified_split(labels, held_out_share=0.2, seed=0)
    assert (train, held_out) != files_module.stratified_split(labels, held_out_share=0.2, seed=1)
    assert {labels[i] for i in files_module.stratified_split(labels, held_out_share=0.99, seed=0)[0]} == {0, 1, 2}
    for count, share, expected in ((9, 0.2, 2), (7, 0.2, 1), (10, 0.18, 2), (3, 0.1, 1), (2, 0.9, 1), (1, 0.5, 0)):
        assert len(files_module.stratified_split([0] * count, held_out_share=share, seed=0)[1]) == expected  # rounded


def test_folder_flat_folder_has_no_labels(tmp_path):
    source = load_images(make_folder(tmp_path, ["b.png", "a.jpg", ".hidden.png", "notes.txt.png"]))
    assert source.ids == ["a.jpg", "b.png", "notes.txt.png"]
    assert source.labels is None
    assert source[0].label is None
    assert source[0].image.size == (20, 16)


def test_folder_classes_are_the_outermost_folders(tmp_path):
    source = load_images(make_folder(tmp_path, ["dog/2020/jan/x.png", "cat/y.png", "cat/deep/z.png"]))
    assert source.label_names == ("cat", "dog")
    assert dict(zip(source.ids, source.labels, strict=True)) == {
        "cat/deep/z.png": 0,
        "cat/y.png": 0,
        "dog/2020/jan/x.png": 1,
    }


def test_folder_one_image_outside_of_the_class_folders_means_no_labels(tmp_path):
    assert load_images(make_folder(tmp_path, ["dog/x.png", "y.png"])).labels is None


@pytest.mark.parametrize("name", ["validation", "val", "valid", "dev"])
def test_folder_train_and_validation_folders(tmp_path, name):
    make_folder(tmp_path, ["train/cat/a.png", "train/dog/b.png", f"{name}/dog/c.png"])
    train, held_out = load_images(tmp_path), load_images(tmp_path, split="validation")
    assert train.ids == ["train/cat/a.png", "train/dog/b.png"]
    assert held_out.ids == [f"{name}/dog/c.png"]
    # A class without held-out images keeps its id.
    assert held_out.label_names == ("cat", "dog")
    assert held_out.labels == [1]
    assert len(load_images(tmp_path, split=None)) == 3


def test_folder_training_images_outside_of_class_folders_leave_the_validation_part_unlabelled_too(tmp_path):
    make_folder(tmp_path, ["train/a.png", "train/cat/b.png", "val/cat/c.png"])
    assert load_images(tmp_path).labels is None
    assert load_images(tmp_path, split="validation").labels is None


def test_folder_no_validation_part(tmp_path):
    make_folder(tmp_path, ["cat/a.png", "dog/b.png"])
    with pytest.raises(source_module.MissingSplitError, match=r"no validation split.*'cat', 'dog'"):
        load_images(tmp_path, split="validation")


def test_folder_no_training_part(tmp_path):
    make_folder(tmp_path, ["val/cat/a.png"])
    with pytest.raises(source_module.MissingSplitError, match="no train split"):
        load_images(tmp_path)
    assert load_images(tmp_path, split="validation").label_names == ("cat",)


def test_folder_broken_file_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"")
    source = load_images(tmp_path)
    with pytest.raises(BadImageError, match=r"broken\.jpg.*empty"):
        source[0]


def test_folder_single_file_of_another_type(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"'\.zip'"):
        load_images(tmp_path / "images.zip")


def test_folder_unknown_split():
    with pytest.raises(ValueError, match="Unknown split='test'"):
        load_images("photos", split="test")


def test_folder_subset(tiles):
    part = tiles.subset([5, 3])
    assert [part[0].id, part[1].id] == [tiles.ids[5], tiles.ids[3]]
    assert part[1].image == tiles[3].image
    assert part.labels == [tiles.labels[5], tiles.labels[3]]


PIXELS = [encode(Image.new("RGB", (19, 17), (i, 0, 0)), "PNG") for i in range(4)]
PETS = {"label": ClassLabel(names=["cat", "dog"])}


def test_tables_one_file(tmp_path):
    image_table(tmp_path / "pets.parquet", types=PETS, image=PIXELS, label=[0, 1, 0, 1])
    source = load_images(tmp_path / "pets.parquet")
    assert len(source) == 4
    assert source.label_names == ("cat", "dog")
    assert source.labels == [0, 1, 0, 1]
    assert source[3].image.getpixel((0, 0)) == (3, 0, 0)
    assert source[3].image.size == (19, 17)
    with pytest.raises(source_module.MissingSplitError, match="no validation split"):
        load_images(tmp_path / "pets.parquet", split="validation")


def test_tables_folder_with_parts(tmp_path):
    image_table(tmp_path / "train-00000-of-00002.parquet", types=PETS, image=PIXELS, label=[0, 1, 0, 1])
    image_table(tmp_path / "train-00001-of-00002.parquet", types=PETS, image=PIXELS, label=[0, 1, 0, 1])
    image_table(tmp_path / "validation.parquet", types=PETS, image=PIXELS[:1], label=[0])
    assert len(load_images(tmp_path)) == 8
    assert len(load_images(tmp_path, split="validation")) == 1
    assert len(load_images(tmp_path, split=None)) == 9


def test_tables_plain_integers_and_no_labels(tmp_path):
    image_table(tmp_path / "a.parquet", types={"fine": Value("int64")}, img=PIXELS, fine=[0, 1, 0, 1])
    assert load_images(tmp_path).labels is None
    source = load_images(tmp_path, label_column="fine")
    assert source.label_names == ("0", "1")


def test_tables_rows_marked_as_unlabelled(tmp_path):
    image_table(tmp_path / "a.parquet", types={"label": Value("int64")}, image=PIXELS, label=[-1] * 4)
    assert load_images(tmp_path).labels is None


def test_tables_a_text_column_called_label_is_left_alone(tmp_path):
    import datasets

    cell = {"bytes": encode(Image.new("RGB", (5, 4)), "PNG"), "path": None}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": [cell], "label": ["cat"]}, features=features)
    table.to_parquet(str(tmp_path / "a.parquet"))
    assert load_images(tmp_path).labels is None
    with pytest.raises(ValueError, match=r"'label' has type Value\('string'\).*Such columns: none"):
        load_images(tmp_path, label_column="label")


@requires_shared
def test_tables_real_parquet():
    source = load_images(shared_dir() / "data" / "oxford_pets3", split="validation", image_column="image")
    assert len(source) == 108
    record = source[0]
    assert record.image.mode == "RGB"
    assert source.label_names[record.label]


@pytest.mark.parametrize(
    ("splits", "train", "validation"),
    [
        ("train validation test", [0], [1]),
        ("train test", [0], [1]),
        ("train val", [0], [1]),
        ("train", [0], None),
        ("test", [0], None),
        ("full", [0], None),
        ("part1 part2 validation", [0, 1], [2]),
        ("validation", None, [0]),
    ],
)
def test_tables_hub_splits_by_their_names(splits, train, validation, monkeypatch):
    """Labels are the index of the split. Hub data sets often have only `train` and `test`."""
    import datasets

    names = splits.split()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    cell = {"bytes": encode(Image.new("RGB", (5, 4)), "PNG"), "path": None}
    tables = {
        name: datasets.Dataset.from_dict({"image": [cell], "label": [i]}, features=features)
        for i, name in enumerate(names)
    }

    def load_dataset(name, config, streaming=False):
        assert (name, config) == ("some-one/pictures", None)
        return {name: table.to_iterable_dataset() if streaming else table for name, table in tables.items()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_images("some-one/pictures", split=None).labels == list(range(len(names)))
    for split, expected in (("train", train), ("validation", validation)):
        if expected is None:
            for opened in (load_images, loading_module.stream_images):
                with pytest.raises(
                    source_module.MissingSplitError, match=f"no {split} split. Its splits are '{names[0]}"
                ):
                    opened("some-one/pictures", split=split)
        else:
            assert load_images("some-one/pictures", split=split).labels == expected
            stream = loading_module.stream_images("some-one/pictures", split=split)
            rows = [row for shard in range(stream.num_shards) for row in stream.open_shard(shard)]
            assert [row.label for row in rows] == expected


@pytest.mark.parametrize(
    ("folders", "train", "validation"),
    [
        ("train/a train/b test/a", {"train/a", "train/b"}, {"test/a"}),
        ("train/a val/a test/a", {"train/a"}, {"val/a"}),
        ("test a b", {"test", "a", "b"}, None),  # a class called "test"
        ("test val/test", {"test"}, {"val/test"}),
    ],
)
def test_tables_a_test_folder_is_held_out_where_there_is_no_other(folders, train, validation, photo, tmp_path):
    for folder in folders.split():
        (tmp_path / folder).mkdir(parents=True)
        photo.save(tmp_path / folder / "x.png")
    found = load_images(tmp_path, split="train")
    assert {str(Path(id).parent) for id in found.ids} == train
    if validation is None:
        with pytest.raises(source_module.MissingSplitError, match="no validation split"):
            load_images(tmp_path, split="validation")
    else:
        held_out = load_images(tmp_path, split="validation")
        assert {str(Path(id).parent) for id in held_out.ids} == validation
    everything = load_images(tmp_path, split=None)
    assert len(everything) == len(folders.split())
    if "test/a" in folders and "train" in folders:
        assert "test" not in everything.label_names


def test_tables_hub_configurations_are_chosen_by_name(monkeypatch, tmp_path):
    """`datasets` reads a folder with a data set card in the same way as a repository."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    cell = {"bytes": encode(Image.new("RGB", (5, 4)), "PNG"), "path": None}
    lines = []
    for label, config in enumerate(("full", "mini")):
        (tmp_path / config).mkdir()
        table = datasets.Dataset.from_dict({"image": [cell], "label": [label]}, features=features)
        table.to_parquet(tmp_path / config / "train.parquet")
        lines.append(f"- config_name: {config}\n  data_files:\n  - split: train\n    path: {config}/train.parquet\n")
    (tmp_path / "README.md").write_text("---\nconfigs:\n" + "".join(lines) + "---\n")
    for name in ("load_dataset", "get_dataset_config_names"):
        inner = getattr(datasets, name)
        monkeypatch.setattr(
            datasets, name, lambda id, *args, inner=inner, **kwargs: inner(str(tmp_path), *args, **kwargs)
        )
    assert load_images("some-one/pictures:mini").labels == [1]
    (row,) = loading_module.stream_images("some-one/pictures:full").open_shard(0)
    assert row.label == 0
    for opened in (load_images, loading_module.stream_images):
        with pytest.raises(ValueError, match=r"several configurations\. Choose one of 'some-one/pictures:full', '"):
            opened("some-one/pictures")
        with pytest.raises(ValueError, match=r"no configuration 'small'\. Choose one of 'some-one/pictures:full'"):
            opened("some-one/pictures:small")


def test_tables_neither_path_nor_hub():
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'builtin:photos'.*Hub"):
        load_images("photo")
    with pytest.raises(FileNotFoundError, match=r"nearest existing folder.*Hub"):
        load_images("nobody/nothing")


# --- Evaluation


def test_default_image_processor(photo, tmp_path):
    from transformers import AutoImageProcessor

    processor = processing.default_image_processor(56)
    saved = processor.to_dict()
    assert saved["image_processor_type"] == "BitImageProcessor"
    assert saved["size"] == {"shortest_edge": 64}
    assert saved["crop_size"] == {"height": 56, "width": 56}
    assert tuple(saved["image_mean"]) == (0.485, 0.456, 0.406)
    assert processing.default_image_processor((42, 84)).size == {"shortest_edge": 96}
    assert processing.default_image_processor(64, resize=64).size == {"shortest_edge": 64}
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    pixels = processor(photo, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, again(photo, return_tensors="pt")["pixel_values"])
    # The same by hand: shortest edge 64, center 56, normalize. transformers resizes tensors; Pillow rounds once more.
    resized = photo.resize((96, 64), Image.Resampling.BICUBIC).crop((20, 4, 76, 60))
    expected = TF.normalize(TF.to_tensor(resized), processing.IMAGENET_MEAN, processing.IMAGENET_STD)
    assert (pixels[0] - expected).abs().mean() < 0.005


def test_a_folder_called_like_a_builtin_data_set_wins(tmp_path, monkeypatch, caplog):
    make_folder(tmp_path, ["digits/mine.png"])
    monkeypatch.chdir(tmp_path)
    image_guard.say_once.cache_clear()
    for name in ("digits", "./digits"):
        assert load_images(name, split=None).ids == ["mine.png"]
    assert caplog.text == ""
    assert len(load_images("builtin:digits", split=None)) == 1797
    (tmp_path / "digits").rename(tmp_path / "mine")
    assert len(load_images("digits", split=None)) == 1797
    assert "'digits' is the built-in data set, because no such path exists. Write 'builtin:digits'" in caplog.text
