"""Training and held-out images opened together: which split, which draw, which checks, and what the report says."""

import logging

import numpy as np
import pytest

from builders import class_folder, mask_folder, parquet_file, write
from hf_regvit.data.files import stratified_split
from hf_regvit.data.loading import load_images
from hf_regvit.data.maps import DenseDataError
from hf_regvit.data.parts import LabelError, draw_images, heldout_streams, hold_out, open_parts
from hf_regvit.data.source import MissingSplitError


def test_the_splits_of_one_source(tmp_path):
    class_folder(tmp_path / "train", ant=4, bee=3)
    class_folder(tmp_path / "val", ant=2, bee=1)
    parts = open_parts(tmp_path)
    assert (len(parts.train), len(parts.heldout), parts.held_out_from_train) == (7, 3, False)
    assert parts.report == (
        f"Training: 7 images of 2 classes from '{tmp_path}'.",
        f"Held out: 3 images of 2 classes from '{tmp_path}'.",
    )


def test_a_share_is_held_out_only_where_there_is_no_validation_split(tmp_path):
    root = class_folder(tmp_path / "a", ant=10, bee=20)
    parts = open_parts(root, heldout_share=0.2, seed=3)
    kept, held = stratified_split(load_images(root).labels, held_out_share=0.2, seed=0)
    assert parts.held_out_from_train
    assert list(parts.train.ids) == load_images(root).subset(kept).ids
    assert list(parts.heldout.ids) == load_images(root).subset(held).ids
    assert parts.report[1].startswith("Held out: 6 of 30 training images (train_val_split 0.2)")
    assert open_parts(root, heldout_share=0.2, seed=4).heldout.ids == parts.heldout.ids
    both = tmp_path / "b"
    class_folder(both / "train", ant=4, bee=4)
    class_folder(both / "validation", ant=1, bee=1)
    assert len(open_parts(both, heldout_share=0.5).heldout) == 2
    assert len(open_parts(train=both, heldout_share=0.2).heldout) == 2  # of all ten images


def test_held_out_images_of_their_own(tmp_path):
    first, second = class_folder(tmp_path / "a", ant=2, bee=2, cow=2), class_folder(tmp_path / "b", bee=1, cow=2)
    assert open_parts(train=first, heldout=second).heldout.labels == [1, 2, 2]  # numbered as the training images
    assert open_parts(second, train=first, seed=1).heldout.labels == [1, 2, 2]  # no validation split: all of it
    with pytest.raises(LabelError, match=r"1 classes without training images: 'ant'"):
        open_parts(train=second, heldout=first)
    parts = open_parts(train=second, heldout=first, ignore_extra_classes=True)
    assert "2 validation images of 1 classes without training images are ignored: 'ant'." in parts.report


def test_an_open_source_beside_its_data(tmp_path):
    """As the monitors of pretraining do: the training images are open, the validation split is not."""
    root = class_folder(tmp_path, ant=8, bee=8)
    train = load_images(root)
    parts = open_parts(root, train=train, kind="images", heldout_share=0.25, seed=0)
    assert parts.held_out_from_train
    assert (len(parts.train), len(parts.heldout)) == (12, 4)
    with pytest.raises(MissingSplitError, match="single set of images"):
        open_parts(train, need_heldout=True)


def test_missing_splits(tmp_path):
    root = class_folder(tmp_path / "a" / "val", ant=2, bee=2).parent
    with pytest.raises(MissingSplitError, match="no train split"):
        open_parts(root)
    with pytest.raises(MissingSplitError, match="no validation split"):
        open_parts(root / "val", need_heldout=True)
    assert open_parts(root / "val").heldout is None
    with pytest.raises(ValueError, match="no images to train on"):
        open_parts(heldout=root)
    with pytest.raises(ValueError, match=r"has 4 images, too few to hold out 10%"):
        hold_out(load_images(class_folder(tmp_path / "b", a=1, b=1, c=1, d=1)), 0.1)


@pytest.mark.parametrize("draw", ["shuffled", "in_order", "every_class"])
def test_draws(draw):
    source = load_images("digits")
    drawn = draw_images(source, 11, seed=5, draw=draw)
    assert len(drawn) == len(set(drawn.ids)) == 11
    assert drawn.ids == draw_images(source, 11, seed=5, draw=draw).ids
    assert drawn.ids != draw_images(source, 11, seed=6, draw=draw).ids
    assert (sorted(drawn.ids) == list(drawn.ids)) is (draw != "shuffled")
    assert len(set(drawn.labels)) == 10 or draw != "every_class"
    assert draw_images(source, None, seed=5) is source


def test_every_class_keeps_an_image_of_each_training_class():
    parts = open_parts("digits", max_train=3, max_heldout=3, draw="every_class")
    assert (len(parts.train), len(parts.heldout)) == (10, 3)


def test_images_need_no_labels(tmp_path):
    for i in range(6):
        write(tmp_path / f"{i}.png", i)
    with pytest.raises(LabelError, match=r"6 images are not in a subfolder"):
        open_parts(tmp_path)
    parts = open_parts(tmp_path, kind="images", heldout_share=0.5)
    assert (len(parts.train), len(parts.heldout)) == (3, 3)


def test_masks_have_the_classes_of_the_training_masks(tmp_path):
    rng = np.random.default_rng(0)
    masks = [rng.integers(1, 3, (20, 24), dtype=np.uint8) for _ in range(4)]
    mask_folder(tmp_path, masks, split="train")
    mask_folder(tmp_path, masks[:2], split="validation")
    parts = open_parts(tmp_path, kind="masks")
    assert parts.heldout.format == parts.train.format
    assert parts.targets.num_images == 4
    assert parts.report[0].startswith("Training: ")
    mask_folder(tmp_path, [mask + np.uint8(mask == 2) for mask in masks[:3]], split="validation")
    names = {"class_names": {1: "one", 2: "two", 3: "three"}}
    with pytest.raises(DenseDataError, match="1 classes without a training pixel: three"):
        open_parts(tmp_path, kind="masks", options=names)
    assert len(open_parts(tmp_path, kind="masks", options=names, ignore_extra_classes=True).heldout) == 3
    assert len(open_parts(train=tmp_path, kind="masks", options=names, heldout_share=0.3).heldout) == 2


def test_the_report_is_logged_by_its_kind(tmp_path, caplog):
    root = class_folder(tmp_path, ant=3, bee=3, cow=3, dog=3)
    parts = open_parts(root, heldout_share=0.3, max_train=3, seed=1)
    with caplog.at_level(logging.INFO):
        parts.log()
    assert [record.levelname for record in caplog.records][:2] == ["INFO", "INFO"]
    assert any(
        record.levelname == "WARNING" and "have no training images" in record.message for record in caplog.records
    )


def test_streams(tmp_path):
    from builders import encoded

    for split in ("train", "validation"):
        parquet_file(tmp_path / "a" / f"{split}.parquet", image=[encoded(0)], label=[0])
    parquet_file(tmp_path / "b" / "train.parquet", image=[encoded(1)], label=[0])
    [heldout] = heldout_streams([tmp_path / "a", tmp_path / "b"])
    assert heldout.name == str(tmp_path / "a")
