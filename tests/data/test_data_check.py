"""Tests of `regvit data-check`: counts, and that exactly the true duplicates are found."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from builders import mask_folder, write
from helpers import requires_shared, shared_dir
from hf_regvit.app.cli import main
from hf_regvit.data import builtin as images
from hf_regvit.data.check import check_data, difference_hash, near_pairs
from hf_regvit.data.loading import load_images


@pytest.fixture(scope="module")
def photos() -> dict[str, Image.Image]:
    return {name: image.resize((150, 100)) for name, image in images.builtin_images().items()}


@pytest.fixture
def folder(tmp_path, photos):
    """Two classes, ten training and two validation images, all different."""
    root = tmp_path / "set"
    for i, (name, image) in enumerate(photos.items()):
        if i < 12:
            path = root / ("train" if i < 10 else "val") / ("a" if i % 2 else "b") / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return root


def test_near_duplicates_hash_bit_by_bit():
    """Slow twin: 64 comparisons of neighbors."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9), dtype=np.uint8)
    bits = "".join("1" if int(pixels[y, x]) > int(pixels[y, x + 1]) + 2 else "0" for y in range(8) for x in range(8))
    assert difference_hash(Image.fromarray(pixels)) == int(bits, 2)


def test_near_duplicates_flat_images_have_no_hash():
    assert difference_hash(Image.new("RGB", (9, 8), (30, 30, 30))) is None


def test_near_duplicates_small_changes_move_few_bits_and_other_images_many(photos):
    hashes = {name: difference_hash(image.resize((9, 8), Image.Resampling.BOX)) for name, image in photos.items()}
    moved = []
    for name, image in photos.items():
        buffer = io.BytesIO()
        image.resize((110, 74)).save(buffer, "JPEG", quality=80)
        changed = difference_hash(Image.open(buffer).resize((9, 8), Image.Resampling.BOX))
        assert (hashes[name] ^ changed).bit_count() <= 9, name
        moved.append((hashes[name] ^ changed).bit_count())
    assert np.mean(np.array(moved) <= 6) > 0.85
    names = list(hashes)
    others = [(hashes[a] ^ hashes[b]).bit_count() for i, a in enumerate(names) for b in names[:i]]
    assert min(others) > 9


@pytest.mark.parametrize("limit", [0, 1, 4, 9, 16])
def test_near_duplicates_pairs_equal_the_slow_twin(limit):
    rng = np.random.default_rng(limit)
    centres = rng.integers(0, 2**64, 12, dtype=np.uint64)
    hashes = np.repeat(centres, 25)
    for i in range(len(hashes)):
        for bit in rng.integers(0, 64, rng.integers(0, 8)):
            hashes[i] ^= np.uint64(1) << np.uint64(bit)
    expected = [
        (i, j)
        for i in range(len(hashes))
        for j in range(i + 1, len(hashes))
        if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= limit
    ]
    assert expected
    assert [tuple(pair) for pair in near_pairs(hashes, limit).tolist()] == expected


def test_near_duplicates_many_equal_ones_in_chunks():
    pairs = near_pairs(np.full(700, 7, dtype=np.uint64), 2)
    assert len(pairs) == 700 * 699 // 2


def test_near_duplicates_nothing():
    assert near_pairs(np.empty(0, dtype=np.uint64), 4).shape == (0, 2)


def test_report_clean_folder(folder):
    report = check_data(folder, batch_size=4, image_size=64)
    assert report.splits["train"].classes == {"a": 5, "b": 5}
    assert (report.splits["train"].images, report.splits["validation"].usable) == (10, 2)
    assert report.formats == {"PNG": 12}
    assert report.modes == {"RGB": 12}
    assert report.bits == {"8": 12}
    assert report.width == {"min": 150, "5%": 150, "median": 150, "95%": 150, "max": 150}
    assert report.shorter_side_histogram == {"96-127": 12}
    assert report.exact_duplicates.groups == report.near_duplicates.groups == 0
    assert (report.bad, report.problems) == ([], [])
    assert (report.steps_per_epoch, report.upsampled_share) == (2, 0.0)
    assert report.verdict == "A training run can use this data: 10 usable images."
    assert check_data(folder, image_size=101).upsampled_share == 1.0
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_report_F31_exact_twins_within_and_across_the_splits(folder):
    train = sorted((folder / "train").rglob("*.png"))
    shutil.copy(train[0], folder / "val" / "a" / "twin.png")
    shutil.copy(train[1], folder / "train" / "b" / "copy.png")
    found = check_data(folder).exact_duplicates
    assert (found.groups, found.surplus, found.across_splits) == (2, 2, 1)
    twins = [f"train: {train[0].relative_to(folder)}", "validation: val/a/twin.png"]
    assert twins in found.examples


def test_report_F31_near_twins_across_the_splits(folder):
    original = folder / "train" / "b" / "astronaut.png"
    Image.open(original).resize((100, 67)).save(folder / "val" / "b" / "smaller.jpg", quality=85)
    report = check_data(folder)
    assert report.exact_duplicates.groups == 0
    found = report.near_duplicates
    assert (found.groups, found.surplus, found.across_splits) == (1, 1, 1)
    assert found.examples == [["train: train/b/astronaut.png", "validation: val/b/smaller.jpg"]]
    assert "validation images that duplicate a training image: 1" in report.summary()
    assert check_data(folder, near_limit_bits=0).near_duplicates.groups <= 1


def test_report_F31_exact_twins_are_not_near_twins_again(folder):
    shutil.copy(folder / "train" / "b" / "astronaut.png", folder / "val" / "a" / "twin.png")
    report = check_data(folder)
    assert (report.exact_duplicates.groups, report.near_duplicates.groups) == (1, 0)


def test_report_equal_hashes_of_other_colours_are_no_twins(folder, photos):
    """The same edges at another brightness have equal hashes but different thumbnails."""
    dark = photos["astronaut"].point(lambda value: value // 2)
    dark.save(folder / "train" / "a" / "dark.png")
    one, other = (image.resize((9, 8), Image.Resampling.BOX) for image in (dark, photos["astronaut"]))
    assert (difference_hash(one) ^ difference_hash(other)).bit_count() <= 6
    assert check_data(folder).near_duplicates.groups == 0


def test_report_bad_images_and_the_verdict(folder):
    (folder / "train" / "a" / "empty.png").write_bytes(b"")
    report = check_data(folder, batch_size=4)
    assert report.verdict == "A training run can use this data: 10 usable images, 1 bad."
    (folder / "train" / "a" / "page.png").write_bytes(b"<html>")
    Image.new("RGB", (1, 1)).save(folder / "train" / "b" / "dot.png")
    report = check_data(folder, batch_size=4)
    assert sorted(record["kind"] for record in report.bad) == ["empty", "not an image", "too small"]
    assert (report.splits["train"].images, report.splits["train"].usable) == (13, 10)
    assert "would stop: 3 of 13 training images are bad, and 1 are allowed" in report.verdict
    assert "bad images: 3" in report.summary()
    assert "can use this data" in check_data(folder, batch_size=4, max_bad_share=0.3).verdict
    assert report.exact_duplicates.groups == 0


def test_report_small_data_sets_and_those_without_training_part(folder):
    assert "fewer than one step of 64" in check_data(folder).verdict
    shutil.rmtree(folder / "train")
    report = check_data(folder)
    assert report.verdict == "The data has no training split."
    assert list(report.splits) == ["validation"]


def test_report_traits(folder, photos):
    rgba = photos["horse"].convert("RGBA")
    rgba.putalpha(Image.new("L", rgba.size, 100))
    rgba.save(folder / "train" / "a" / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    photos["coffee"].save(folder / "train" / "a" / "turned.jpg", exif=exif)
    Image.fromarray(np.arange(60 * 60, dtype=np.uint16).reshape(60, 60)).save(folder / "train" / "a" / "deep.png")
    frames = [photos["cell"], photos["clock"]]
    frames[0].save(folder / "train" / "a" / "moving.gif", save_all=True, append_images=frames[1:])
    report = check_data(folder)
    assert report.traits == {
        "animated (first frame counts)": 1,
        "with transparency (composited on white)": 1,
        "turned upright by EXIF": 1,
        "nearly black (nothing above 16 of 255; 12-bit values in 16-bit files? multiply them by 16)": 1,
    }
    assert report.bits["16"] == 1
    assert report.height["max"] == 150  # of the upright image


def test_report_names_that_a_terminal_cannot_show(folder):
    (folder / "train" / "a" / "caf\udce9.png").write_bytes(b"")
    summary = check_data(folder).summary()
    summary.encode("utf-8")
    assert "caf\\udce9.png" in summary


def test_report_drawn_images():
    report = check_data("digits", batch_size=100, near_limit_bits=0)
    assert report.splits["train"].images == 1438
    assert report.formats == {}
    assert report.steps_per_epoch == 14
    assert "the images are generated" in report.summary()


def test_report_workers_find_the_same(folder):
    assert check_data(folder, num_workers=2) == check_data(folder)


def test_report_wrong_options(folder):
    with pytest.raises(ValueError, match="near_limit_bits=17"):
        check_data(folder, near_limit_bits=17)
    with pytest.raises(ValueError, match="batch_size=0"):
        check_data(folder, batch_size=0)


def test_command_to_read_and_as_json(folder, capsys):
    assert main(["data-check", "--data", str(folder), "--batch_size", "4"]) == 0
    printed = capsys.readouterr()
    assert "train: 10 images, 10 usable, 2 classes of 5 images each: 5 a, 5 b" in printed.out
    verdict = "verdict: A training run can use this data: 10 usable images."
    assert printed.out.endswith(f"{verdict}\nnext: regvit pretrain --data {folder} --output_dir runs/a\n")
    assert "images: 100%" in printed.err
    assert main(["data-check", "--data", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["images"] == 10


def test_command_missing_data(tmp_path, capsys):
    assert main(["data-check", "--data", str(tmp_path / "nothing")]) == 1
    assert "does not exist. The nearest existing folder" in capsys.readouterr().err


@requires_shared
@pytest.mark.slow
def test_real_photographs_of_pets(tmp_path, monkeypatch):
    """The pairs were inspected: the same cats, cropped or scaled differently, in both splits."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    report = check_data(shared_dir() / "data" / "oxford_pets3")
    assert (report.splits["train"].usable, report.splits["validation"].usable) == (383, 108)
    assert report.bad == []
    assert ["train: row/118", "validation: row/92"] in report.near_duplicates.examples
    assert report.near_duplicates.across_splits == 2


def test_report_checks_masks(tmp_path):
    masks = [np.full((20, 24), 1 + i % 2, dtype=np.uint8) for i in range(4)]
    mask_folder(tmp_path, masks, split="train")
    mask_folder(tmp_path, masks[:2], split="validation")
    report = check_data(tmp_path)
    assert {name: part.images for name, part in report.splits.items()} == {"train": 4, "validation": 2}
    assert report.splits["train"].classes is None  # the folders `images` and `masks` are no classes
    assert "masks: Held out: 2 images, 2 classes, 100.0% of the pixels have a class." in report.notes
    assert report.problems == []
    mask_folder(tmp_path, [b"no image", np.ones((3, 3), dtype=np.uint8), masks[1]], split="train")
    write(tmp_path / "classes.json", '{"1": "one"}')
    [problem] = check_data(tmp_path).problems
    assert problem["kind"] == "masks"
    for words in (
        "1 of 4 masks cannot be read", "1 of 4 masks have a different size than their image",
        "2 of 4 masks hold values that are not classes",
    ):  # fmt: skip
        assert words in problem["reason"]
    (tmp_path / "train" / "masks" / "03.png").unlink()
    assert "no file of the same name among the masks" in check_data(tmp_path).problems[0]["reason"]


def test_representations_are_short():
    report = check_data("builtin:digits", near_limit_bits=0)
    assert repr(report) == f"<DataReport: {report.verdict}>"
    assert report._repr_html_().startswith("<pre>data: builtin:digits\n")
    assert repr(load_images("builtin:digits")) == "<ImageSource 'digits': 1438 images, 10 classes>"
    assert repr(load_images("builtin:digits").subset([0, 1])) == "<ImageSource 'digits': 2 images, 10 classes>"
