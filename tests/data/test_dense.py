"""Tests of images with masks or depth: every source, the checks before training, and the joint transforms."""

import io
import json

import numpy as np
import pytest
from datasets import Array2D, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from builders import encoded, image_table, mask_folder, noise
from helpers import requires_shared, shared_dir
from hf_regvit.data import joint_transform
from hf_regvit.data.augmentation import adjust_hue, adjust_saturation
from hf_regvit.data.decoding import BadImageError
from hf_regvit.data.joint_transform import JointTransform, resize_map
from hf_regvit.data.maps import DenseDataError, DepthFormat, MaskFormat, check_targets, load_depth, load_masks
from hf_regvit.data.source import MissingSplitError

SIZE = (24, 20)  # (width, height)


def mask(seed: int = 0, values=(0, 1, 2), size: tuple[int, int] = SIZE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.choice(np.array(values, dtype=np.uint8), (size[1], size[0]))


def columns_of(masks):
    images = [encoded(noise(i, SIZE)) for i in range(len(masks))]
    return {"image": images, "mask": [mask if isinstance(mask, bytes) else encoded(mask) for mask in masks]}


# --- Masks


def test_masks_of_a_folder_and_of_parquet_are_the_same(tmp_path):
    masks = [mask(i) for i in range(3)]
    sources = [
        load_masks(mask_folder(tmp_path / "folder", masks)),
        load_masks(image_table(tmp_path / "a.parquet", **columns_of(masks))),
    ]
    for source in sources:
        assert (len(source), source.class_names, source.kind) == (3, ("0", "1", "2"), "masks")
        for i in range(3):
            np.testing.assert_array_equal(source.target(i), masks[i])
            assert source[i].image.size == SIZE
            np.testing.assert_array_equal(np.asarray(source[i].image), np.asarray(noise(i, SIZE)))
        part = source.subset([2, 0]).subset([1])
        assert part.ids == [source.ids[0]]
        np.testing.assert_array_equal(part.targets[0], masks[0])
        assert len(part.targets) == 1


@pytest.mark.parametrize("layout", ["above", "below"])
def test_parts_of_a_folder(tmp_path, layout):
    for split, count in (("train", 3), ("val", 2)):
        if layout == "above":
            mask_folder(tmp_path, [mask(i) for i in range(count)], split=split)
        else:
            for i in range(count):
                for name, content in (("images", encoded(noise(i, SIZE))), ("masks", encoded(mask(i)))):
                    path = tmp_path / name / split / "town" / f"{split}{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
    assert len(load_masks(tmp_path)) == 3
    validation = load_masks(tmp_path, split="validation")
    assert len(validation) == 2
    assert all("val" in id for id in validation.ids)
    assert len(load_masks(tmp_path, split=None)) == 5


def test_a_folder_without_parts_has_no_validation_part(tmp_path):
    mask_folder(tmp_path, [mask()])
    with pytest.raises(MissingSplitError, match="no validation split"):
        load_masks(tmp_path, split="validation")


def test_images_without_masks_and_masks_without_images_are_named(tmp_path):
    mask_folder(tmp_path, [mask(i) for i in range(3)])
    (tmp_path / "masks" / "01.png").rename(tmp_path / "masks" / "other.png")
    with pytest.raises(DenseDataError, match=r"1 of 3 images have no file of the same name.*01.png"):
        load_masks(tmp_path)
    (tmp_path / "images" / "01.png").unlink()
    with pytest.raises(DenseDataError, match=r"1 masks have no image of the same name, such as 'other.png'"):
        load_masks(tmp_path)


def test_images_alone_are_told_what_is_missing(tmp_path):
    for i in range(2):
        noise(i, SIZE).save(tmp_path / f"{i}.png")
    with pytest.raises(DenseDataError, match=r"has images but no masks.*masks/"):
        load_masks(tmp_path)


def test_a_table_without_a_mask_column_lists_its_columns(tmp_path):
    rows = {"image": [{"bytes": encoded(noise(0, SIZE)), "path": None}], "place": [1]}
    Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "place": Value("int64")})).to_parquet(
        tmp_path / "a.parquet"
    )
    with pytest.raises(DenseDataError, match=r"no unique column with masks. Columns: place"):
        load_masks(tmp_path / "a.parquet")
    with pytest.raises(DenseDataError, match="column 'place' is not a column with masks"):
        load_masks(tmp_path / "a.parquet", mask_column="place")


def test_values_become_ids_in_order_and_ignored_ones_255():
    meaning = MaskFormat(("cat", "dog"), (7, 3), (0, 255))
    stored = np.array([[7, 3, 0], [255, 3, 9]], dtype=np.uint8)
    assert meaning.ids(stored).tolist() == [[0, 1, 255], [255, 1, 255]]
    assert meaning.unknown(stored) == [9]
    slow = [[meaning.values.index(v) if v in meaning.values else 255 for v in row] for row in stored.tolist()]
    assert meaning.ids(stored).tolist() == slow


@pytest.mark.parametrize("dtype", [np.int16, np.int64, np.float32, np.float64])
def test_arrays_with_minus_one_or_fractions_that_are_whole(tmp_path, dtype):
    values = mask(0, (0, 1)).astype(dtype)
    values[0] = -1
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    noise(0, SIZE).save(tmp_path / "images" / "a.png")
    np.save(tmp_path / "masks" / "a.npy", values)
    source = load_masks(tmp_path, ignore_values=[-1])
    assert (source.class_names, source.format.values) == (("0", "1"), (0, 1))
    check_targets(source)
    np.testing.assert_array_equal(source.target(0), np.where(values < 0, 255, values))
    with pytest.raises(DenseDataError, match=r"that are not classes.* holds -1"):
        check_targets(load_masks(tmp_path, class_names=["a", "b"]))
    with pytest.raises(DenseDataError, match=r"The mask holds the values \[-1\]; expected integers"):
        load_masks(tmp_path, class_names=["a", "b"]).target(0)
    if np.dtype(dtype).kind == "f":
        np.save(tmp_path / "masks" / "a.npy", values / 2)
        with pytest.raises(ValueError, match=r"\[-0.5, 0.5\] cannot be classes"):
            load_masks(tmp_path, ignore_values=[-1])


def test_names_by_list_mapping_file_and_with_reduced_labels(tmp_path):
    path = image_table(tmp_path / "a.parquet", **columns_of([mask(i, (0, 1, 2)) for i in range(2)]))
    named = load_masks(path, class_names=["sky", "road", "void"], ignore_values=[2])
    assert named.format == MaskFormat(("sky", "road"), (0, 1), (2,))
    assert load_masks(path, class_names={0: "a", 1: "b", 2: "c"}).format.values == (0, 1, 2)
    reduced = load_masks(path, class_names=["one", "two"], reduce_labels=True)
    assert reduced.format == MaskFormat(("one", "two"), (1, 2), (0, 255))
    assert set(np.unique(reduced.target(0))) == {0, 1, 255}
    (tmp_path / "id2label.json").write_text(json.dumps({"0": "x", "1": "y", "2": "z"}))
    assert load_masks(path).class_names == ("x", "y", "z")
    again = load_masks(path, mask_format=reduced.format)
    np.testing.assert_array_equal(again.target(1), reduced.target(1))


def test_255_is_a_class_when_it_has_a_name(tmp_path):
    path = image_table(tmp_path / "a.parquet", **columns_of([mask(i, (0, 255)) for i in range(2)]))
    with pytest.raises(DenseDataError, match=r"F27|to one class, '0'.*\(255\) is a class, give it a name"):
        check_targets(load_masks(path))
    source = load_masks(path, class_names={0: "background", 255: "object"})
    assert check_targets(source).class_images == {"background": 2, "object": 2}


@pytest.mark.parametrize(
    ("names", "values", "ignored", "message"),
    [
        (("a",), (0, 1), (255,), "1 names and values"),
        (("a", "b"), (1, 1), (255,), "a unique value per name"),
        (("a", "b"), (0, 1), (1,), r"\[1\] are both classes and ignored"),
        (("a", "b"), (-1, 1), (255,), r"\[-1\] cannot be classes"),
    ],
)
def test_a_format_that_cannot_be_meant(names, values, ignored, message):
    with pytest.raises(ValueError, match=message):
        MaskFormat(names, values, ignored)


@pytest.mark.parametrize("mode", ["1", "P", "I;16", "RGB"])
def test_masks_of_every_kind_of_image(tmp_path, mode):
    values = mask(0, (0, 1))
    picture = {
        "1": lambda: Image.fromarray(values.astype(bool)),
        "P": lambda: Image.fromarray(values).convert("P"),
        "I;16": lambda: Image.fromarray(values.astype(np.uint16)),
        "RGB": lambda: Image.fromarray(np.repeat(values[..., None], 3, axis=2)),
    }[mode]()
    if mode == "P":
        picture = Image.frombytes("P", SIZE, values.tobytes())
        picture.putpalette([0, 0, 0, 200, 10, 10])
    source = load_masks(mask_folder(tmp_path, [encoded(picture)]))
    np.testing.assert_array_equal(source.target(0), values)


def test_a_mask_in_colours_is_refused_by_name(tmp_path):
    source = load_masks(mask_folder(tmp_path, [mask(), encoded(noise(5, SIZE))]), class_names=["a", "b", "c"])
    with pytest.raises(DenseDataError, match=r"(?s)1 of 2 masks cannot be read.*01.png.*color mode RGB"):
        check_targets(source)


# --- Checks


def test_report_of_sound_masks_counts_by_hand(tmp_path):
    masks = [mask(i, (0, 1, 255)) for i in range(3)]
    report = check_targets(load_masks(mask_folder(tmp_path, masks), class_names=["a", "b", "never"]))
    assert report.num_images == 3
    assert report.class_pixels == {
        name: sum(int((m == v).sum()) for m in masks) for v, name in ((0, "a"), (1, "b"), (2, "never"))
    }
    assert report.class_images == {"a": 3, "b": 3, "never": 0}
    assert report.counted_share == pytest.approx(sum((m != 255).sum() for m in masks) / (3 * 480))
    assert "classes without pixels: never" in report.summary()


def test_f29_mask_values_outside_of_the_classes_are_named_with_their_rows(tmp_path):
    bad = mask(1)
    bad[3, 4], bad[5, 6] = 42, 99
    source = load_masks(image_table(tmp_path / "a.parquet", **columns_of([mask(0), bad])), class_names=["a", "b", "c"])
    with pytest.raises(DenseDataError) as caught:
        check_targets(source)
    text = str(caught.value)
    assert "1 of 2 masks hold values that are not classes" in text
    assert "row 1" in text
    assert "42, 99" in text
    assert "row 0" not in text
    assert "ignore_values" in text
    assert "2 c" in text


def test_masks_of_another_size_are_named_with_both_sizes(tmp_path):
    source = load_masks(mask_folder(tmp_path, [mask(0), mask(1, size=(20, 24))]), class_names=["a", "b", "c"])
    with pytest.raises(DenseDataError, match=r"01.png' is 20 x 24, its image 24 x 20"):
        check_targets(source)


def test_an_image_with_an_exif_turn_has_the_size_of_its_upright_mask(tmp_path):
    mask_folder(tmp_path, [mask(0, (0, 1))])
    (tmp_path / "images" / "00.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(0, (20, 24)).save(tmp_path / "images" / "00.jpg", exif=exif)
    source = load_masks(tmp_path)
    assert source[0].image.size == SIZE
    assert check_targets(source).num_images == 1


def test_f27_masks_of_a_single_class_are_refused(tmp_path):
    source = load_masks(mask_folder(tmp_path, [mask(i, (1,)) for i in range(2)]), class_names=["a", "b"])
    with pytest.raises(DenseDataError, match="all labeled pixels belong to one class, 'b'"):
        check_targets(source)


def test_masks_that_lost_their_classes_in_compression(tmp_path):
    smooth = np.arange(480, dtype=np.uint16).reshape(20, 24)
    with pytest.raises(DenseDataError, match=r"more than 255 different values.*JPEG"):
        load_masks(mask_folder(tmp_path, [smooth]))


def test_a_broken_mask_is_named_and_does_not_hide_the_others(tmp_path):
    wrong = mask(2)
    wrong[0, 0] = 9
    source = load_masks(mask_folder(tmp_path, [mask(0), encoded(mask(1))[:60], wrong]), class_names=["a", "b", "c"])
    with pytest.raises(DenseDataError) as caught:
        check_targets(source)
    assert "01.png" in str(caught.value)
    assert "02.png' holds 9" in str(caught.value)
    with pytest.raises(BadImageError, match=r"01\.png"):
        source.target(1)


# --- Depth


def test_depth_in_millimetres_metres_and_other_units(tmp_path):
    millimetres = np.random.default_rng(0).integers(500, 4000, (20, 24)).astype(np.uint16)
    millimetres[0, 0], millimetres[0, 1] = 0, 65535
    meters = millimetres.astype(np.float32) / 1000
    whole = load_depth(mask_folder(tmp_path / "a", [millimetres], kind="depth"))
    expected = np.where(meters > 10, 0, meters)
    np.testing.assert_allclose(whole.target(0), expected, rtol=1e-6)
    assert whole.target(0).dtype == np.float32
    assert whole.target(0)[0, 0] == 0
    assert whole.target(0)[0, 1] == 0
    meters[1, 1], meters[1, 2] = np.nan, -1
    stream = io.BytesIO()
    np.save(stream, meters)
    arrays = load_depth(mask_folder(tmp_path / "b", [stream.getvalue()], kind="depth", suffix=".npy"))
    expected[1, 1:3] = 0
    np.testing.assert_allclose(arrays.target(0), expected, rtol=1e-6)
    floats = mask_folder(tmp_path / "c", [encoded(meters, "TIFF")], kind="depth", suffix=".tif")
    np.testing.assert_allclose(load_depth(floats).target(0), expected, rtol=1e-6)
    kitti = load_depth(tmp_path / "a", depth_scale=1 / 256, max_depth=80)
    np.testing.assert_allclose(kitti.target(0), np.where(millimetres < 65535, millimetres / 256, 0), rtol=1e-6)


def test_depth_as_an_array_column(tmp_path):
    depths = [np.full((20, 24), 1.5 + i, dtype=np.float32) for i in range(2)]
    features = Features({"image": ImageFeature(), "depth_map": Array2D((20, 24), "float32")})
    rows = {"image": [{"bytes": encoded(noise(i, SIZE)), "path": None} for i in range(2)], "depth_map": depths}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    source = load_depth(tmp_path / "a.parquet")
    np.testing.assert_allclose(source.target(1), depths[1])
    assert check_targets(source).depth_range == (1.5, 2.0, 2.5)


def test_depth_faults_are_named(tmp_path):
    fine = np.full((20, 24), 1500, dtype=np.uint16)
    source = load_depth(mask_folder(tmp_path / "a", [fine, 0 * fine], kind="depth"))
    with pytest.raises(DenseDataError, match=r"1 of 2 depth maps have no depth up to 10 m: .*01.png' is 0 everywhere"):
        check_targets(source)
    source = load_depth(mask_folder(tmp_path / "b", [fine, fine[:10]], kind="depth"))
    with pytest.raises(DenseDataError, match=r"01.png' is 24 x 10, its image 24 x 20"):
        check_targets(source)


def test_a_wrong_unit_of_depth_is_noticed(tmp_path):
    mask_folder(tmp_path, [np.full((20, 24), 1500, dtype=np.uint16)], kind="depth")
    with pytest.raises(DenseDataError, match=r"begins at 1500 m.*depth_scale"):
        check_targets(load_depth(tmp_path, depth_scale=1.0))
    with pytest.raises(DenseDataError, match=r"half of the depths are below 0.0015 m"):
        check_targets(load_depth(tmp_path, depth_scale=1e-6))
    with pytest.raises(ValueError, match="depth_scale=0 must be above 0"):
        DepthFormat(0)


@requires_shared
def test_real_sets_are_as_their_data_sheets_say():
    data = shared_dir() / "data"
    camvid = load_masks(data / "camvid", split="validation", ignore_values=[11])
    assert (len(camvid), len(camvid.class_names), camvid.class_names[0]) == (60, 11, "sky")
    assert 0.9 < check_targets(camvid).counted_share < 1
    kitchen = load_depth(data / "depth_7scenes_kitchen", split="validation")
    low, middle, high = check_targets(kitchen).depth_range
    assert 0.5 < low < 1.2 < middle < high < 4.5


# --- Joint transforms


def test_resize_map_equals_pillow():
    values = mask(3, tuple(range(200)), (37, 23))
    for size in ((23, 37), (10, 11), (61, 90), (23, 90)):
        expected = np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.NEAREST))
        np.testing.assert_array_equal(resize_map(values, size), expected)


def twin_pair(size=(96, 64)):
    """Image whose colors encode the position of each pixel, and a map that encodes the same."""
    rows, columns = np.mgrid[0 : size[1], 0 : size[0]]
    right = columns >= size[0] // 2
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[..., 0] = np.where(right, 230, 20)
    pixels[..., 1] = np.where(rows >= size[1] // 2, 230, 20)
    return Image.fromarray(pixels), (2 * (rows >= size[1] // 2) + right).astype(np.uint8)


@pytest.mark.parametrize("seed", range(6))
def test_image_and_map_are_moved_together(seed):
    image, target = twin_pair()
    transform = JointTransform((48, 48), photometric="none", rotation=20.0)
    pixels, moved, inside = transform(image, target, np.random.default_rng(seed))
    assert pixels.shape == (48, 48, 3)
    assert moved.shape == inside.shape == (48, 48)
    assert (moved[~inside] == 255).all()
    assert (moved[inside] != 255).all()
    said = 2 * (pixels[..., 1] > 125) + (pixels[..., 0] > 125)
    agree = (said == moved)[inside].mean()
    assert agree > 0.93, agree  # all but the smooth borders between the four colors


def test_draws_depend_on_the_generator_alone_and_all_kinds_occur():
    image, target = twin_pair()
    transform = JointTransform((32, 32))
    one, two = (transform(image, target, np.random.default_rng(4)) for _ in range(2))
    for a, b in zip(one, two):
        np.testing.assert_array_equal(a, b)
    mirrored = [transform(image, target, np.random.default_rng(seed))[1] for seed in range(40)]
    left_is_right = [m[:, 0].min() % 2 == 1 and m[:, -1].max() % 2 == 0 for m in mirrored]
    assert 0 < sum(left_is_right) < 40


def test_a_crop_of_nearly_one_class_is_drawn_anew():
    target = np.zeros((64, 64), dtype=np.uint8)
    target[:, 32:] = 1
    image = Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8))
    options = {"scale": (2.0, 2.0), "shorter_side": 64, "flip_probability": 0.0, "photometric": "none"}
    shares = {}
    for limit in (0.75, 1.0):
        transform = JointTransform((32, 32), max_class_share=limit, **options)
        crops = [transform(image, target, np.random.default_rng(seed))[1] for seed in range(60)]
        shares[limit] = np.mean([max((crop == 0).mean(), (crop == 1).mean()) > 0.75 for crop in crops])
    assert shares[1.0] > 0.7 > shares[0.75] + 0.15


def test_the_shorter_side_is_that_of_the_image_before_the_crop():
    image, target = twin_pair((96, 64))
    options = {"scale": (1.0, 1.0), "flip_probability": 0.0, "max_class_share": 1.0, "photometric": "none"}
    transform = JointTransform((32, 48), shorter_side=32, **options)
    pixels, moved, inside = transform(image, target, np.random.default_rng(0))
    assert inside.all()
    np.testing.assert_array_equal(pixels, np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC)))
    np.testing.assert_array_equal(moved, resize_map(target, (32, 48)))


def test_what_is_no_measurement_has_no_metres_and_what_is_no_class_no_id():
    stored = np.array([[np.inf, -np.inf, np.nan, -1.0, 0.0, 2.5]])
    assert DepthFormat().meters(stored).tolist() == [[0, 0, 0, 0, 0, 2.5]]
    marked = MaskFormat(("a", "b"), (0, 7), ignore_values=(255, -1, 70_000))  # beyond 16 bits
    assert marked.ids(np.array([[0, 7, 255, -1, 70_000]])).tolist() == [[0, 1, 255, 255, 255]]
    with pytest.raises(DenseDataError, match=r"holds the values \[70001\]"):
        marked.ids(np.array([[0, 70_001]]))


def test_crops_lie_at_every_place_and_void_is_no_class():
    transform = JointTransform((4, 4), max_class_share=0.75)
    target = np.full((5, 6), 255, dtype=np.uint8)
    target[2:4, 2:4] = [[0, 1], [1, 0]]  # in every crop, each half of the valid pixels
    places = set()
    for seed in range(60):
        first = np.random.default_rng(seed)
        place = int(first.integers(2)), int(first.integers(3))
        assert transform._crop_place(target, np.random.default_rng(seed)) == place  # no crop is drawn again
        places.add(place)
    assert places == {(top, left) for top in range(2) for left in range(3)}


def test_depth_keeps_its_metres_and_its_holes():
    image = noise(1, (64, 48))
    depth = np.random.default_rng(0).uniform(1, 3, (48, 64)).astype(np.float32)
    depth[10:14] = 0
    transform = JointTransform.for_depth((32, 40))
    for seed in range(4):
        _, moved, inside = transform(image, depth, np.random.default_rng(seed))
        assert moved.dtype == np.float32
        assert set(np.unique(moved)) <= set(np.unique(depth)) | {0}
        assert (moved[~inside] == 0).all()


def test_colours_change_the_image_and_never_the_map():
    image, target = twin_pair((48, 48))
    fixed = {"scale": (1.0, 1.0), "flip_probability": 0.0, "max_class_share": 1.0}
    for kind in ("segmentation", "depth"):
        results = [
            JointTransform((48, 48), photometric=kind, **fixed)(image, target, np.random.default_rng(s))
            for s in range(8)
        ]
        assert len({r[0].tobytes() for r in results}) > 3
        for _, moved, inside in results:
            np.testing.assert_array_equal(moved, target)
            assert inside.all()


def test_the_hue_turns_as_far_as_published(monkeypatch):
    # mmsegmentation adds -18 to 17 to OpenCV hues of 0 to 179: a tenth of the circle in both directions.
    turns = []
    monkeypatch.setattr(joint_transform, "adjust_hue", lambda pixels, turn: turns.append(turn) or pixels)
    transform, pixels = JointTransform((4, 4)), np.full((4, 4, 3), 90, dtype=np.uint8)
    for seed in range(400):
        transform._colored(pixels, np.random.default_rng(seed))
    assert 150 < len(turns) < 250
    assert (min(turns), max(turns)) == (-18 / 180, 17 / 180)


@pytest.mark.parametrize("seed", range(8))
def test_colours_equal_their_loop(seed):
    pixels = np.random.default_rng(100 + seed).integers(0, 256, (3, 4, 3)).astype(np.uint8)

    rng = np.random.default_rng(seed)
    expected = pixels.copy()
    if rng.random() >= 0.5:
        gamma, brightness = rng.uniform(0.9, 1.1), rng.uniform(0.75, 1.25)
        balance = rng.uniform(0.9, 1.1, size=3)
        for place in np.ndindex(pixels.shape):
            expected[place] = min(
                max(round(255 * (pixels[place] / 255) ** gamma * brightness * balance[place[-1]]), 0), 255
            )
    depth = JointTransform.for_depth((3, 4))
    np.testing.assert_array_equal(depth._colored(pixels, np.random.default_rng(seed)), expected)

    rng = np.random.default_rng(seed)
    contrast_first, chosen = rng.random() < 0.5, rng.random(4) < 0.5
    shift, contrast, saturation = rng.uniform(-32, 32), rng.uniform(0.5, 1.5), rng.uniform(0.5, 1.5)
    turn = rng.integers(-18, 18) / 180
    expected = pixels.copy()
    for place in np.ndindex(pixels.shape):
        value = np.float32(pixels[place]) + (np.float32(shift) if chosen[0] else 0)
        expected[place] = min(
            max(round(value * np.float32(contrast) if chosen[1] and contrast_first else value), 0), 255
        )
    if chosen[2]:
        expected = adjust_saturation(expected, saturation)
    if chosen[3]:
        expected = adjust_hue(expected, turn)
    if chosen[1] and not contrast_first:
        for place in np.ndindex(pixels.shape):
            expected[place] = min(max(round(np.float32(expected[place]) * np.float32(contrast)), 0), 255)
    coloured = JointTransform((3, 4))._colored(pixels, np.random.default_rng(seed))
    np.testing.assert_allclose(
        coloured.astype(int), expected.astype(int), atol=1
    )  # float32 rounds values at .5 differently


def test_sizes_that_differ_are_refused_by_the_transform():
    with pytest.raises(DenseDataError, match="Expected equal sizes"):
        JointTransform((32, 32))(noise(0, SIZE), mask(0, size=(20, 20)), np.random.default_rng(0))
