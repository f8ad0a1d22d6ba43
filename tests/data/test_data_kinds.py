"""Kinds of data as people have them: names with signs of patterns, splits anywhere, side files, odd formats, hints."""

import json
import logging
import struct
import unicodedata
import zlib
from pathlib import PurePosixPath

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from builders import class_folder, encoded, image, parquet_file, tar_file, write
from hf_regvit.data.check import check_data
from hf_regvit.data.decoding import BadImageError, ImageLimits, image_facts, open_image
from hf_regvit.data.files import image_suffixes, is_hidden, split_named, splits_of
from hf_regvit.data.labels import label_in_file
from hf_regvit.data.loading import load_images, stream_images
from hf_regvit.data.maps import load_depth, load_masks
from hf_regvit.data.parts import open_parts
from hf_regvit.data.source import MissingSplitError, Reading
from hf_regvit.data.tables import table_stream


def records(stream):
    return [record for shard in range(stream.num_shards) for record in stream.open_shard(shard)]


# ---- Names with the signs of patterns


@pytest.mark.parametrize(
    ("name", "trap"),
    [
        ("set [1]", "set 1"),
        ("what?", "whats"),
        ("a*b", "aXb"),
        ("x{1,2}", "x1"),
        ("[!a]", "b"),
        ("**", "c"),
        ("a[", "a"),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "tar", "images"])
def test_a_path_that_exists_is_never_a_pattern(tmp_path, name, trap, kind):
    for folder, number in ((name, 1), (trap, 2)):
        if kind == "parquet":
            parquet_file(tmp_path / folder / "train.parquet", image=[encoded(number)])
        elif kind == "tar":
            tar_file(tmp_path / folder / "train.tar", {"0.png": encoded(number)})
        else:
            write(tmp_path / folder / "0.png", number)
    suffix = "png" if kind == "images" else kind
    (one,) = (load_images(tmp_path / name)[i].image for i in range(len(load_images(tmp_path / name))))
    assert np.array_equal(one, image(1))
    if kind != "images":
        assert np.array_equal(load_images(tmp_path / name / f"train.{suffix}")[0].image, image(1))
        assert np.array_equal(load_images(f"{tmp_path / name}/*.{suffix}")[0].image, image(1))
        assert np.array_equal(load_images(f"{tmp_path / name}/tr?in.*")[0].image, image(1))
        assert [record.data for record in records(stream_images(tmp_path / name))] == [encoded(1)]
        assert [record.data for record in records(stream_images(f"{tmp_path / name}/*.{suffix}"))] == [encoded(1)]


def test_a_pattern_still_is_one(tmp_path):
    for i in range(3):
        parquet_file(tmp_path / f"part {i}" / "x.parquet", image=[encoded(i)])
    assert len(load_images(str(tmp_path / "part [01]" / "*.parquet"))) == 2
    with pytest.raises(FileNotFoundError, match="No file matches"):
        load_images(str(tmp_path / "part [7]" / "*.parquet"))


# ---- Splits


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"), ("Training", "train"), ("train2017", "train"), ("TRAIN_01", "train"),
        ("val", "validation"),
        ("valid", "validation"), ("Validation", "validation"), ("val2017", "validation"), ("dev-2", "validation"),
        ("test", "test"), ("Testing", "test"), ("test2019", "test"), ("trains", None), ("testament", None),
        ("valley", None), ("training set", None), ("unlabeled", None), ("device", None), ("2017", None),
    ],
)  # fmt: skip
def test_names_of_splits(name, split):
    assert split_named(name) == split


@pytest.mark.parametrize(
    ("folders", "train", "heldout", "classes"),
    [
        ("images/train images/val", 2, 1, None),
        ("images/train2017 images/val2017", 2, 1, None),
        ("train2017 val2017", 2, 1, None),
        ("Training/cat Training/dog Testing/cat", 3, 1, ("cat", "dog")),
        ("data/train/cat data/train/dog data/test/cat", 3, 1, ("cat", "dog")),
        ("cat/train cat/val dog/train dog/val", 3, 2, ("cat", "dog")),
        ("a/b/c/Train_1/x a/b/c/Train_1/y a/b/c/Valid_1/x", 3, 1, ("x", "y")),
        ("train/cat train/dog unlabeled", 3, None, ("cat", "dog")),
        ("train/cat train/dog/dev test/cat val/dog", 3, 1, ("cat", "dog")),
        ("pets/dev pets/cat pets/dog", 4, None, ("pets",)),  # a class called "dev", not a split
        ("cat dog dev2", 3, 1, ("cat", "dog")),
        ("cat/test dog/test", 3, None, ("cat", "dog")),
    ],
)
def test_splits_of_images_at_any_depth(tmp_path, folders, train, heldout, classes):
    for i, folder in enumerate(folders.split()):
        for number in range(1 if i else 2):
            write(tmp_path / folder / f"{number}.png", 10 * i + number)
    source = load_images(tmp_path)
    assert (len(source), source.label_names) == (train, classes)
    if heldout is None:
        with pytest.raises(MissingSplitError):
            load_images(tmp_path, split="validation")
    else:
        other = load_images(tmp_path, split="validation")
        assert len(other) == heldout
        assert not set(source.ids) & set(other.ids)
    assert len(load_images(tmp_path, split=None)) == len(folders.split()) + 1


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize(
    "names",
    [
        ("default/train/0000", "default/validation/0000", "default/test/0000"),
        ("data/train-00000-of-00001", "data/validation-00000-of-00001", "data/test-00000-of-00001"),
        ("Training/a", "Val/a", "Testing/a"),
        ("train2017", "val2017", "test2017"),
        ("plain_text/part/train/0", "plain_text/part/dev/0", "plain_text/part/test/0"),
    ],
)
def test_splits_of_tables_and_archives(tmp_path, kind, names):
    for number, name in enumerate(names):
        content = [encoded(10 * number + i) for i in range(3 - number)]
        if kind == "parquet":
            parquet_file(tmp_path / f"{name}.parquet", image=content)
        else:
            tar_file(tmp_path / f"{name}.tar", {f"{i}.png": one for i, one in enumerate(content)})
    train, heldout = load_images(tmp_path), load_images(tmp_path, split="validation")
    assert (len(train), len(heldout), len(load_images(tmp_path, split=None))) == (3, 2, 6)
    assert np.array_equal(heldout[0].image, image(10))
    assert len(records(stream_images(tmp_path))) == 3
    assert len(records(stream_images(tmp_path, split="validation"))) == 2
    (note,) = [note for note in train.notes if "training images" in note]
    assert "left out: 'test" in note.lower() or "left out: 'plain_text/part/test" in note or "default/test" in note


def test_what_is_taken_and_left_out_is_said_once(tmp_path, caplog):
    class_folder(tmp_path / "train2017", cat=2, dog=2)
    class_folder(tmp_path / "val2017", cat=1, dog=1)
    write(tmp_path / "unlabeled" / "a.png", 9)
    with caplog.at_level(logging.INFO):
        parts = open_parts(tmp_path)
        parts.log()
    line = (
        f"'{tmp_path}': training images: 'train2017' (4); held-out images: 'val2017' (2); left out: 'unlabeled' (1)."
    )
    assert line in parts.report
    assert caplog.messages.count(line) == 1
    assert f"note: {line}" in check_data(tmp_path).summary()


def test_nothing_is_said_about_ordinary_splits(tmp_path, caplog):
    class_folder(tmp_path / "train", cat=2, dog=2)
    class_folder(tmp_path / "validation", cat=1, dog=1)
    load_images(tmp_path)
    assert load_images(tmp_path, split="validation").notes == ()
    assert caplog.text == ""


def test_splits_of_maps_below_and_above_the_folder_of_images(tmp_path):
    mask = Image.fromarray(np.random.default_rng(0).integers(0, 3, (20, 24)).astype(np.uint8))
    for root, form in (("below", "{kind}/{split}"), ("above", "{split}/{kind}")):
        for split, count in (("train2017", 3), ("val2017", 2)):
            for i in range(count):
                for kind, content in (("images", i), ("masks", mask)):
                    write(tmp_path / root / form.format(kind=kind, split=split) / f"{i}.png", content)
        assert len(load_masks(tmp_path / root)) == 3
        assert len(load_masks(tmp_path / root, split="validation")) == 2


def test_splits_of_files_is_a_pure_function():
    root = PurePosixPath("/d")
    assert splits_of([root / "a" / "train" / "x.png", root / "b" / "val" / "x.png"], root) == ["train", "validation"]
    assert splits_of([root / "train" / "x.png", root / "b" / "val" / "x.png"], root) == ["train", None]
    assert splits_of([root / "a" / "test" / "x.png"], root) == [None]


# ---- Our own results


@pytest.mark.parametrize(
    "marks",
    [
        ["resolved_recipe.yaml"], ["trainer_state.json"], ["modeling_regvit.py", "config.json"], ["extraction.json"],
        ["report.json", "report.md"], ["report.json", "report.html"], ["retrofit_report.json"],
    ],
)  # fmt: skip
def test_results_of_this_package_are_no_data(tmp_path, marks, caplog):
    class_folder(tmp_path, cat=2, dog=2)
    for mark in marks:
        write(tmp_path / "runs" / "x" / mark, b"{}")
    write(tmp_path / "runs" / "x" / "panels" / "step_000100.png", 5)
    source = load_images(tmp_path)
    assert (len(source), source.label_names) == (4, ("cat", "dog"))
    assert f"'{tmp_path}': results of this package are not read as data: 'runs/x'." in source.notes
    assert caplog.text.count("results of this package") == 1
    assert len(load_images(tmp_path / "runs" / "x")) == 1  # who names the folder itself, means it


def test_files_that_only_look_like_results_are_data(tmp_path):
    for name in ("report.json", "config.json", "index.json"):
        write(tmp_path / "a" / name, b"{}")
    class_folder(tmp_path, a=2, b=1)
    assert len(load_images(tmp_path)) == 3


# ---- Suffixes


def test_suffixes_are_those_of_pillow():
    assert {
        ".jpg",
        ".jfif",
        ".jpe",
        ".png",
        ".apng",
        ".pgm",
        ".pbm",
        ".pnm",
        ".mpo",
        ".tif",
        ".webp",
    } <= image_suffixes()
    assert not {".dcm", ".heic", ".jp2", ".pdf", ".eps", ".psd", ".svg"} & image_suffixes()


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [(".jfif", "JPEG"), (".JPE", "JPEG"), (".apng", "PNG"), (".pnm", "PPM"), (".mpo", "MPO"), (".pbm", "PPM")],
)
def test_unusual_suffixes_are_read(tmp_path, suffix, kind):
    content = image(3).convert("1") if suffix == ".pbm" else image(3)
    options = {"save_all": True, "append_images": [image(4)]} if kind == "MPO" else {}
    write(tmp_path / "folder" / f"a{suffix}", encoded(content, kind, **options))
    tar_file(tmp_path / "x.tar", {f"a{suffix}": encoded(content, kind, **options)})
    for source in (load_images(tmp_path / "folder"), load_images(tmp_path / "x.tar")):
        assert source[0].image.size == (24, 20)
    assert len(records(stream_images(tmp_path / "x.tar"))) == 1


def test_other_files_are_counted_by_suffix(tmp_path, caplog):
    for i in range(3):
        write(tmp_path / f"{i}.png", i)
    for name in ("a.dcm", "b.DCM", "c.heic", "no_suffix", "notes.txt"):
        write(tmp_path / name, b"x")
    report = check_data(tmp_path)
    line = f"'{tmp_path}' is read as a folder of image files. Files of other types are left out:"
    assert report.notes == [f"{line} 2 .dcm, 1 .heic, 1 .txt, 1 without suffix."]
    assert "1 without suffix" in report.summary()
    assert caplog.text.count("without suffix") == 1
    assert report.splits["train"].usable == 3


# ---- Archives


def test_each_shard_has_its_own_type_of_image(tmp_path):
    tar_file(tmp_path / "a.tar", {"0.jpg": encoded(0, "JPEG"), "1.jpg": encoded(1, "JPEG")})
    tar_file(tmp_path / "b.tar", {"2.png": encoded(2), "3.webp": encoded(3, "WEBP")})
    tar_file(tmp_path / "c.tar", {"readme.txt": b"nothing here"})
    stream = stream_images(tmp_path)
    assert [record.id for record in records(stream)] == ["a.tar#0.jpg", "a.tar#1.jpg", "b.tar#2.png", "b.tar#3.webp"]
    assert [open_image(record.data).size for record in records(stream)] == [(24, 20)] * 4
    assert [record.id for record in records(stream_images(tmp_path, image_column="png"))] == ["b.tar#2.png"]
    with pytest.raises(ValueError, match=r"no images of type 'bmp' \(image_column\) in its 3 tar files"):
        stream_images(tmp_path, image_column="bmp")
    with pytest.raises(ValueError, match="no images in its 1 tar files"):
        stream_images(tmp_path / "c.tar")


def test_compressed_archives_are_streamed(tmp_path):
    import gzip

    plain = tar_file(tmp_path / "x.tar", {"0.png": encoded(0), "0.cls": b"4"}).read_bytes()
    packed = write(tmp_path / "packed" / "x.tar.gz", gzip.compress(plain))
    assert [(record.id, record.label) for record in records(stream_images(packed))] == [("x.tar.gz#0.png", 4)]


@pytest.mark.parametrize(
    "name", ["._0.png", "a/._0.png", "__MACOSX/0.png", ".hidden/0.png", "./._x.jpg", ".DS_Store.png"]
)
def test_one_rule_for_hidden_names(tmp_path, name):
    assert is_hidden(name)
    assert not is_hidden("./a/0.png")
    members = {"./0.png": encoded(0), name: b"\x00\x05\x16\x07 not an image"}
    tar_file(tmp_path / "x.tar", members)
    for member, content in members.items():
        write(tmp_path / "folder" / member, content)
    for source in (load_images(tmp_path / "x.tar"), load_images(tmp_path / "folder")):
        assert len(source) == 1
        assert source.problems == ()
    assert len(records(stream_images(tmp_path / "x.tar"))) == 1


def test_hidden_tables_are_left_out_of_folders_and_patterns(tmp_path):
    parquet_file(tmp_path / "a.parquet", image=[encoded(0)])
    write(tmp_path / "._a.parquet", b"junk")
    assert len(load_images(tmp_path)) == len(load_images(str(tmp_path / "*.parquet"))) == 1


def test_hidden_maps_are_left_out(tmp_path):
    mask = Image.fromarray(np.arange(480, dtype=np.uint8).reshape(20, 24) % 3)
    for name in ("a", "b"):
        write(tmp_path / "images" / f"{name}.png", 1)
        write(tmp_path / "masks" / f"{name}.png", mask)
        write(tmp_path / "masks" / f"._{name}.png", b"junk")
    assert len(load_masks(tmp_path)) == 2


@pytest.mark.parametrize(
    ("files", "labels", "names"),
    [
        ({".cls": [b"cat", b"dog", b"cat\n"]}, [0, 1, 0], ("cat", "dog")),
        ({".cls": [b"2", b"0", b"1"]}, [2, 0, 1], ("0", "1", "2")),
        ({".json": [b'{"label": 1}', b'{"label": 0}', b'{"label": 1}']}, [1, 0, 1], ("0", "1")),
        ({".json": [b'{"cls": "b", "width": 3}', b'{"cls": "a"}', b'{"cls": "b"}']}, [1, 0, 1], ("a", "b")),
        ({".json": [b'"x"', b'"y"', b'"y"']}, [0, 1, 1], ("x", "y")),
        ({".cls": [b"cat", b"", b"dog"]}, None, None),
        ({".json": [b"{}", b"[]", b"broken"]}, None, None),
    ],
)
def test_one_rule_for_labels_beside_images(tmp_path, files, labels, names):
    members = {}
    for i in range(3):
        members[f"{i:03d}.png"] = encoded(i)
        members |= {f"{i:03d}{suffix}": contents[i] for suffix, contents in files.items()}
    tar_file(tmp_path / "x.tar", members)
    for member, content in members.items():
        write(tmp_path / "folder" / member, content)
    for source in (load_images(tmp_path / "x.tar"), load_images(tmp_path / "folder")):
        assert (source.labels, source.label_names) == (labels, names)
    numbers = labels if names and names[0].isdigit() else [None] * 3
    assert [record.label for record in records(stream_images(tmp_path / "x.tar"))] == numbers


def test_labels_beside_images_of_both_splits_share_their_numbers(tmp_path):
    for split, classes in (("train", "abc"), ("val", "cb")):
        for i, name in enumerate(classes):
            write(tmp_path / split / f"{i}.png", i)
            write(tmp_path / split / f"{i}.cls", name)
    parts = open_parts(tmp_path)
    assert (parts.train.labels, parts.heldout.labels) == ([0, 1, 2], [2, 1])


def test_names_with_dots_keep_their_own_labels(tmp_path):
    members = {}
    for i in range(5):
        members |= {f"img.{i:03d}.png": encoded(i), f"img.{i:03d}.cls": b"%d" % (4 - i)}
    members |= {"one.left.png": encoded(7), "one.right.png": encoded(8), "one.cls": b"3", "one.json": b'{"label": 9}'}
    tar_file(tmp_path / "x.tar", members)
    for name, content in members.items():
        write(tmp_path / "folder" / name, content)
    expected = [4, 3, 2, 1, 0, 3, 3]
    assert load_images(tmp_path / "folder").labels == load_images(tmp_path / "x.tar").labels == expected
    assert [record.label for record in records(stream_images(tmp_path / "x.tar"))] == expected


def test_a_long_shard_of_names_with_dots_is_streamed_in_pieces(tmp_path):
    tar_file(tmp_path / "x.tar", {f"2024.01.05_{i:03d}.png": encoded(0) for i in range(150)})
    assert len(records(stream_images(tmp_path / "x.tar"))) == 150


def test_a_named_key_of_json_labels():
    assert label_in_file("a.json", b'{"breed": "pug", "label": 3}', "breed") == "pug"
    assert label_in_file("a.json", b'{"breed": "pug", "label": true}') is None


def test_an_archive_of_class_folders(tmp_path):
    tar_file(tmp_path / "x.tar", {f"./{name}/{i}.png": encoded(i) for name in ("dog", "cat") for i in range(2)})
    source = load_images(tmp_path)
    assert (source.labels, source.label_names) == ([1, 1, 0, 0], ("cat", "dog"))


# ---- Tables by their content


@pytest.mark.parametrize("fields", [("bytes", "path"), ("path", "bytes"), ("bytes",)])
def test_a_struct_of_bytes_and_path_is_an_image(tmp_path, fields):
    """As pandas and polars write it: without the metadata of `datasets`, in any order of fields."""
    import pyarrow as pa

    kinds = {"bytes": pa.binary(), "path": pa.string()}
    rows = [{name: encoded(i) if name == "bytes" else f"{i}.png" for name in fields} for i in range(3)]
    column = pa.array(rows, pa.struct([(name, kinds[name]) for name in fields]))
    parquet_file(tmp_path / "x.parquet", photo=column, label=[0, 1, 0], note=["a", "b", "c"])
    source = load_images(tmp_path / "x.parquet")
    assert np.array_equal(source[2].image, image(2))
    assert source.labels == [0, 1, 0]
    assert [record.data for record in records(stream_images(tmp_path / "x.parquet"))] == [encoded(i) for i in range(3)]


def test_masks_in_a_struct(tmp_path):
    mask = encoded(Image.fromarray(np.arange(480, dtype=np.uint8).reshape(20, 24) % 2))
    rows = [{"bytes": encoded(i), "path": None} for i in range(2)]
    maps = [{"bytes": mask, "path": "m.png"} for _ in range(2)]
    parquet_file(tmp_path / "x.parquet", image=rows, mask=maps)
    assert load_masks(tmp_path / "x.parquet").target(1).shape == (20, 24)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["a/0.jpg", "a/1.jpg"], r"Column 'files' holds paths such as 'a/0.jpg', not images: give the folder"),
        (["0.TIF", "1.TIF"], r"Column 'files' holds paths such as '0.TIF'"),
        ([[b"1", b"2"], [b"3"]], r"Column 'files' holds lists of images; write one image per row"),
        ([[{"bytes": b"1", "path": "x"}], []], r"Column 'files' holds lists of images"),
        (["cat", "dog"], r"with images: none. Set image_column"),
    ],
)
def test_columns_that_concern_images_are_explained(tmp_path, column, message):
    parquet_file(tmp_path / "x.parquet", files=column, label=[0, 1])
    for opened in (load_images, stream_images):
        with pytest.raises(ValueError, match=message):
            opened(tmp_path / "x.parquet")


# ---- Bits and channels


def tiff(pixels, bits, photometric, *, extra=(), sample_format=1):
    """TIFF written by hand, uncompressed: (H, W, channels) numbers in whole bytes."""
    height, width, channels = pixels.shape
    data = pixels.astype({8: "<u1", 16: "<u2"}[bits]).tobytes()
    entries = [
        (256, 4, [width]), (257, 4, [height]), (258, 3, [bits] * channels), (259, 3, [1]), (262, 3, [photometric]),
        (273, 4, [8]), (277, 3, [channels]), (278, 4, [height]), (279, 4, [len(data)]), (284, 3, [1]),
        *([(338, 3, list(extra))] if extra else []), (339, 3, [sample_format] * channels),
    ]  # fmt: skip
    start, more = 8 + len(data), b""
    after = start + 2 + 12 * len(entries) + 4
    table = struct.pack("<H", len(entries))
    for tag, kind, values in entries:
        packed = b"".join(struct.pack("<H" if kind == 3 else "<I", value) for value in values)
        if len(packed) > 4:
            table += struct.pack("<HHII", tag, kind, len(values), after + len(more))
            more += packed
        else:
            table += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", start) + data + table + struct.pack("<I", 0) + more


def ramp(channels=1, bits=16, size=(20, 24)):
    values = np.linspace(0, 2**bits - 1, size[0] * size[1]).round().astype(np.uint16)
    return np.stack([np.roll(values, 7 * i) for i in range(channels)], -1).reshape(*size, channels)


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [8, 16])
def test_gray_tiff_of_either_polarity(bits, photometric):
    values = ramp(bits=bits)
    light = (values if photometric else values.max() - values)[..., 0].astype(np.float64)
    gray = np.asarray(open_image(tiff(values, bits, photometric)))[..., 0]
    assert np.abs(gray - light * 255 / (2**bits - 1)).max() <= 0.5
    assert image_facts(tiff(values, bits, photometric), name="x").bits == bits


@pytest.mark.parametrize("white", [65535, 1000, 4095, 300])
def test_pgm_of_more_than_8_bits(white):
    values = np.linspace(0, white, 480).round().astype(">u2").reshape(20, 24)
    content = b"P5\n# a comment\n24 20\n%d\n" % white + values.tobytes()
    gray = np.asarray(open_image(content))[..., 0]
    assert np.abs(gray - values.astype(np.float64) * 255 / white).max() <= 1
    assert image_facts(content, name="x").bits == 16


def test_12_bits_of_a_tiff_are_scaled_by_12_bits():
    values = np.linspace(0, 4095, 480).round().astype(np.uint16).reshape(20, 24)
    packed = bytearray()
    for one, other in values.reshape(-1, 2).tolist():
        packed += bytes([one >> 4, (one & 15) << 4 | other >> 8, other & 255])
    whole = bytearray(tiff(ramp(bits=8, size=(20, 36)), 8, 1))
    whole[8 : 8 + len(packed)] = packed
    for tag, value in ((256, 24), (258, 12)):
        place = whole.index(struct.pack("<H", tag), 8 + len(packed)) + 8
        whole[place : place + 2] = struct.pack("<H", value)
    gray = np.asarray(open_image(bytes(whole)))[..., 0]
    assert np.abs(gray - values * (255 / 4095)).max() <= 0.5


@pytest.mark.parametrize("channels", [2, 5, 7, 12])
@pytest.mark.parametrize("photometric", [1, 2])
def test_tiff_of_many_channels_is_refused_with_the_truth(channels, photometric):
    with pytest.raises(
        BadImageError, match=rf"a TIFF of {channels} channels of 8 bits \(unsigned integers.*RGB"
    ) as caught:
        open_image(tiff(ramp(channels, bits=8), 8, photometric))
    assert "TIFF, PPM" not in str(caught.value)


@pytest.mark.parametrize("extra", [(), (0,)])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_fourth_channel_that_is_no_transparency_is_left_out(extra, bits):
    values = ramp(4, bits=bits)
    pixels = np.asarray(open_image(tiff(values, bits, 2, extra=extra)))
    assert np.abs(pixels - values[..., :3] * (255 / (2**bits - 1))).max() <= 1


def test_a_fourth_channel_that_is_transparency_is_laid_on_white():
    values = ramp(4, bits=8)
    values[..., 3] = 0
    assert (np.asarray(open_image(tiff(values, 8, 2, extra=(2,)))) == 255).all()


def test_signed_numbers_are_refused_with_the_truth():
    content = tiff(ramp(bits=15), 16, 1, sample_format=2)
    with pytest.raises(BadImageError, match=r"its mode I \(signed or 32-bit integers\) has no defined value range"):
        open_image(content)
    assert open_image(content, limits=ImageLimits(value_range=(0, 32767))).size == (24, 20)


# ---- Reductions over nothing


@pytest.mark.parametrize("kind", ["pointers", "flat", "mixed", "empty files", "one flat"])
def test_a_report_where_no_image_has_a_hash(tmp_path, kind):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    for i in range(1 if kind == "one flat" else 4):
        flat = Image.new("RGB", (20, 20), (i, i, i))
        content = {"pointers": pointer, "empty files": b"", "mixed": [pointer, flat][i % 2]}.get(kind, flat)
        write(tmp_path / "a" / f"{i}.png", content)
    report = check_data(tmp_path)
    assert report.summary()
    json.dumps(report.to_dict())
    assert report.near_duplicates.groups == 0
    if kind == "pointers":
        assert "run `git lfs pull`" in report.bad[0]["reason"]


# ---- Unicode


@pytest.mark.parametrize("name", ["Café", "Ñandú", "Å"])
def test_class_names_in_two_unicode_forms_are_one_class(tmp_path, name, caplog):
    composed, apart = unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)
    class_folder(tmp_path / "train", **{composed: 3, "tea": 3})
    class_folder(tmp_path / "val", **{apart: 2, "tea": 2})
    parts = open_parts(tmp_path)
    assert parts.train.label_names == parts.heldout.label_names == tuple(sorted((composed, "tea")))
    assert len([line for line in parts.report if "Unicode form NFC" in line]) == 1
    assert caplog.text.count("Unicode form NFC") == 1
    tar_file(
        tmp_path / "x.tar",
        {"0.png": encoded(0), "0.cls": apart.encode(), "1.png": encoded(1), "1.cls": composed.encode()},
    )
    assert load_images(tmp_path / "x.tar").labels == [0, 0]
    parts = open_parts(train=tmp_path / "train", heldout=tmp_path / "val")
    assert sorted(parts.heldout.labels) == [0, 0, 1, 1]


def test_images_and_maps_in_two_unicode_forms_are_pairs(tmp_path):
    depth = Image.fromarray(np.full((20, 24), 1500, dtype=np.uint16))
    for name in ("Café", "über"):
        write(tmp_path / "images" / f"{unicodedata.normalize('NFC', name)}.png", 1)
        write(tmp_path / "depth" / f"{unicodedata.normalize('NFD', name)}.png", depth)
    assert load_depth(tmp_path).target(0).max() == pytest.approx(1.5)


# ---- Hints


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_of_an_imagefolder(tmp_path, name):
    write(tmp_path / "0.png", 0)
    write(tmp_path / name, "file_name,label\n0.png,1\n")
    (note,) = [note for note in load_images(tmp_path).notes if "is not read" in note]
    assert f"'{name}' is not read" in note


def test_a_folder_of_save_to_disk(tmp_path):
    import datasets

    table = datasets.Dataset.from_dict({"image": [encoded(0)]})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "all")
    for name in ("one", "all"):
        with pytest.raises(ValueError, match="written by datasets' `save_to_disk`; load it with `load_from_disk`"):
            load_images(tmp_path / name)


@pytest.mark.parametrize("name", ["x.jpg", "x.parquet", "x.tar"])
def test_pointers_of_git_lfs(tmp_path, name):
    write(tmp_path / "set" / name, "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match="git-lfs pointer and not the file itself; run `git lfs pull`"):
        load_images(tmp_path / "set")[0]


@pytest.mark.parametrize(
    "address", ["s3://bucket/set", "hf://datasets/a/b", "https://example.org/x.tar", "gs://a/*.parquet"]
)
def test_addresses(address):
    for opened in (load_images, stream_images):
        with pytest.raises(ValueError, match="is a URL, but only local files and Hub data sets can be read"):
            opened(address)


def test_links_that_lead_nowhere(tmp_path):
    write(tmp_path / "set" / "a.png", 0)
    (tmp_path / "set" / "b.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "set" / "train").symlink_to(tmp_path / "gone", target_is_directory=True)
    (tmp_path / "other").symlink_to(tmp_path / "gone")
    source = load_images(tmp_path / "set")
    with pytest.raises(BadImageError, match=r"it is a link to '.*gone.png', which does not exist"):
        source[1]
    assert any("1 links lead to files or folders that do not exist: 'train'" in note for note in source.notes)
    with pytest.raises(FileNotFoundError, match=r"is a link to '.*gone', which does not exist"):
        load_images(tmp_path / "other")


def test_names_of_the_builtin_sets(tmp_path, monkeypatch, caplog):
    write(tmp_path / "photos" / "mine.png", 0)
    monkeypatch.chdir(tmp_path)
    assert load_images("photos").ids == ["mine.png"]
    with pytest.raises(ValueError, match="cannot be streamed"):
        stream_images("photos")
    assert caplog.text == ""
    assert len(load_images("builtin:photos")) == 2214
    with pytest.raises(ValueError, match="Remove --streaming"):
        stream_images("builtin:digits")
    assert caplog.text == ""
    assert len(load_images("digits")) == 1438
    assert "'digits' is the built-in data set" in caplog.text
    with pytest.raises(FileNotFoundError, match="Did you mean 'builtin:digits'"):
        load_images("builtin:digit")
    assert zlib.crc32(load_images("builtin:digits")[0].image.tobytes()) == zlib.crc32(
        load_images("digits")[0].image.tobytes()
    )


@pytest.mark.parametrize("opened", [load_images, stream_images])
def test_parquet_paths_that_datasets_takes_for_chained_urls_are_refused(tmp_path, opened):
    parquet_file(tmp_path / "a::b" / "x.parquet", image=[encoded(0)])
    with pytest.raises(ValueError, match=r"has '::' in its path.*Rename"):
        opened(tmp_path / "a::b")


def test_hub_tar_streams_name_the_shard_that_lacks_the_column_of_the_first(tmp_path):
    shards = [tar_file(tmp_path / f"{kind}.tar", {f"0.{kind}": encoded(0, kind)}) for kind in ("jpeg", "png")]
    table = load_dataset("webdataset", data_files=[str(shard) for shard in shards], split="train", streaming=True)
    stream = table_stream(table, "owner/shards", Reading())
    assert [record.id for record in stream.open_shard(0)] == ["jpeg.tar#0.jpeg"]
    with pytest.raises(ValueError, match=r"'png.tar#0.jpeg' does not exist.*Download the shards"):
        list(stream.open_shard(1))
