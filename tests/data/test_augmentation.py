"""Resize, colour operations, the parameters of a view, and the multi-crop of DINOv2."""

import random
import sys

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import RandomResizedCrop

from hf_regvit.data import augmentation as A
from hf_regvit.data import builtin
from hf_regvit.data.augmentation import MultiCrop, ViewParameters
from hf_regvit.data.joint_transform import JointTransform
from hf_regvit.models import processing
from hf_regvit.pretraining.crops import MultiCropDataset
from hf_regvit.training.samplers import EpochSampler
from oracles import torchvision_view

NAMES = ("brightness", "contrast", "saturation", "hue")


def levels(actual: np.ndarray, expected: Image.Image | np.ndarray) -> np.ndarray:
    """Signed difference in grey levels."""
    return actual.astype(int) - np.asarray(expected).astype(int)


# ---- Resize: Against Pillow, whose weights have 22 bits where torch's have up to 15: a rounding apart, rarely.


@pytest.mark.parametrize(
    ("size", "to"),
    [((350, 340), 224), ((186, 170), 96), ((60, 80), 96), ((300, 40), 96), ((7, 5), 32), ((96, 96), 96),
     ((1500, 1100), 96), ((200, 150), 14)],
)  # fmt: skip
def test_resize_pillow_bicubic_with_antialias(size, to):
    image = builtin.builtin_images()["chelsea"].resize(size)
    rgb = np.asarray(image)
    rgbx = np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])
    difference = levels(A.resize(rgbx, to)[:, :, :3], image.resize((to, to), Image.Resampling.BICUBIC))
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.02
    assert (A.resize(rgb, to) == A.resize(rgbx, to)[:, :, :3]).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2)])
def test_resize_tiny_crops(size):
    image = builtin.builtin_images()["chelsea"].resize(size)
    difference = levels(A.resize(np.asarray(image), 16), image.resize((16, 16), Image.Resampling.BICUBIC))
    assert np.abs(difference).max() <= 1


def test_resize_the_fast_path_of_torch_is_taken():
    """With planes it would return planes: twice the time, and a copy for whoever reads pixels."""
    assert A.resize(np.zeros((50, 40, 4), np.uint8), 32).flags.c_contiguous


def test_resize_the_image_is_not_changed(photo):
    pixels = np.array(photo)
    A.resize(pixels, 120)
    assert (pixels == np.asarray(photo)).all()


# ---- Colour: Against torchvision on Pillow images, which the released weights were trained with.


@pytest.mark.parametrize("factor", [0.6, 0.93, 1.0, 1.4])
def test_colour_brightness_and_contrast(photo, factor):
    pixels = np.asarray(photo)
    difference = levels(A.adjust_brightness(pixels, factor), TF.adjust_brightness(photo, factor))
    assert (difference == 0).all()
    difference = levels(A.adjust_contrast(pixels, factor), TF.adjust_contrast(photo, factor))
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.01  # with a factor of 0.6 one result in five is a whole number, or nearly


@pytest.mark.parametrize("seed", range(3))
def test_colour_brightness_and_contrast_of_every_value(seed):
    """All 256 values under random factors: brightness is right to a share of 1e-4, contrast everywhere."""
    rng = np.random.default_rng(seed)
    values = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2))
    brightness = []
    for factor in rng.uniform(0.6, 1.4, 60):
        pixels = np.asarray(values)
        brightness.append(levels(A.adjust_brightness(pixels, factor), TF.adjust_brightness(values, factor)))
        assert (levels(A.adjust_contrast(pixels, factor), TF.adjust_contrast(values, factor)) == 0).all()
    difference = np.array(brightness)
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 1e-3


@pytest.mark.parametrize("shape", [(16, 16), (2, 3), (7, 30), (25, 14)])
def test_colour_a_mean_gray_of_one_half_is_rounded_up(shape):
    """Factor 0 leaves the mean gray level alone; a tie must not depend on the processor's order of summation."""
    for low in range(255):
        pixels = np.full((*shape, 3), low, np.uint8)
        pixels.reshape(-1, 3)[::2] += 1
        assert (A.adjust_contrast(pixels, 0.0) == low + 1).all()
        expected = TF.adjust_contrast(Image.fromarray(pixels), 0.0)
        assert (levels(A.adjust_contrast(pixels, 0.0), expected) == 0).all()


def test_colour_contrast_leaves_a_flat_image_alone():
    """A blend of equal levels is that level, whatever the rounding of the processor."""
    factors = np.random.default_rng(0).uniform(0.0, 2.0, 16)
    for level in range(256):
        flat = np.full((4, 4, 3), level, np.uint8)
        assert all((A.adjust_contrast(flat, factor) == level).all() for factor in factors)


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.2])
def test_colour_saturation(photo, factor):
    difference = levels(A.adjust_saturation(np.asarray(photo), factor), TF.adjust_saturation(photo, factor))
    assert np.abs(difference).max() <= 1


def test_colour_saturation_has_no_bias(photo):
    """Rounding where Pillow cuts off would be half a grey level."""
    factors = np.random.default_rng(0).uniform(0.8, 1.2, 20)
    pixels = np.asarray(photo)
    difference = [levels(A.adjust_saturation(pixels, f), TF.adjust_saturation(photo, f)).mean() for f in factors]
    assert abs(np.mean(difference)) < 0.03


@pytest.mark.parametrize("shift", [-0.1, -0.03, 0.0, 0.07, 0.1])
def test_colour_hue(photo, shift):
    difference = levels(A.adjust_hue(np.asarray(photo), shift), TF.adjust_hue(photo, shift))
    assert np.abs(difference).mean() < 0.6  # both round hue, saturation and value to 8 bits
    assert np.abs(difference).max() <= 10


@pytest.mark.parametrize(("size", "sigma"), [(9, 0.1), (9, 0.7), (9, 2.0), (3, 1.0)])
def test_colour_blur(photo, size, sigma):
    actual = A.gaussian_blur(np.asarray(photo), kernel_size=size, sigma=sigma)
    difference = levels(actual, TF.gaussian_blur(photo, [size, size], [sigma, sigma]))
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 1e-3  # ties of rounding only


def test_colour_blur_of_a_crop_smaller_than_the_kernel():
    flat = np.full((4, 4, 3), 77, np.uint8)
    assert (A.gaussian_blur(flat, kernel_size=9, sigma=2.0) == flat).all()


@pytest.mark.parametrize("parameters", [{"grayscale": True}, {"solarize": True}])
def test_colour_grayscale_and_solarize(photo, parameters):
    actual = A.distort(np.asarray(photo), ViewParameters(box=(0, 0, 120, 80), **parameters))
    expected = TF.rgb_to_grayscale(photo, 3) if "grayscale" in parameters else TF.solarize(photo, 128)
    assert np.abs(levels(actual, expected)).max() <= ("grayscale" in parameters)


def test_colour_operations_leave_their_input_alone(photo):
    pixels = np.array(photo)
    everything = tuple((name, 0.7 if name != "hue" else 0.1) for name in NAMES)
    for parameters in ({"jitter": everything}, {"grayscale": True}, {"sigma": 1.0}, {"solarize": True}):
        changed = A.distort(pixels, ViewParameters(box=(0, 0, 120, 80), **parameters))
        assert (changed != pixels).any()
        assert (pixels == np.asarray(photo)).all()


def rendered(multi_crop: MultiCrop, image: Image.Image, parameters: ViewParameters) -> np.ndarray:
    """`parameters` as global crop 1, (S, S, 3)."""
    plain = ViewParameters(box=(0, 0, *image.size))
    crops = multi_crop.render(image, plain, [plain, parameters] + [plain] * multi_crop.num_local_crops)
    return crops["global_crops"][1].permute(1, 2, 0).numpy()


box = (20, 10, 90, 75)
multi_crop = MultiCrop(global_size=64, local_size=32, num_local_crops=0)


@pytest.mark.parametrize("flip", [False, True])
def test_view_geometry_alone_is_the_same_to_a_grey_level(photo, flip):
    parameters = ViewParameters(box=box, flip=flip)
    difference = levels(rendered(multi_crop, photo, parameters), torchvision_view(photo, parameters, 64))
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.02


@pytest.mark.parametrize("order", [(2, 0, 3, 1), (0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_view_order_of_operations(photo, order):
    """All branches on; any other order, also of grayscale, blur and solarize, is farther away."""
    amounts = (1.32, 0.76, 0.88, -0.04)
    jitter = tuple((NAMES[i], amounts[i]) for i in order)
    parameters = ViewParameters(box, flip=True, jitter=jitter, sigma=1.05, solarize=True)
    actual = rendered(multi_crop, photo, parameters)
    difference = np.abs(levels(actual, torchvision_view(photo, parameters, 64)))
    # A grey level of 128 may be solarized on one side only; elsewhere the roundings add up to 3.
    assert np.median(difference) <= 1
    assert (difference > 3).mean() < 0.02
    swapped = ViewParameters(box, flip=True, jitter=jitter[::-1], sigma=1.05, solarize=True)
    assert np.abs(levels(actual, torchvision_view(photo, swapped, 64))).mean() > 2 * difference.mean()
    early = torchvision_view(photo, ViewParameters(box, flip=True, jitter=jitter, solarize=True), 64)
    early = TF.gaussian_blur(early, [9, 9], [1.05, 1.05])
    assert np.abs(levels(actual, early)).mean() > 2 * difference.mean()


def test_view_local_crops_see_nothing_outside_of_their_box(photo):
    pixels = np.asarray(photo).copy()
    inside = np.zeros(pixels.shape[:2], bool)
    inside[10:75, 20:90] = True
    pixels[~inside] = 0
    parameters = ViewParameters(box=box)
    blackened = rendered(multi_crop, Image.fromarray(pixels), parameters)
    assert (blackened == rendered(multi_crop, photo, parameters)).all()


def test_parameters_every_number_has_its_place():
    """Other probabilities, ranges and modes of blur change what they name, and nothing else."""
    base = MultiCrop().parameters((500, 375), seed=1, epoch=2, sample_id=3)[1]
    for options, fields in (
        ({"flip_probability": 0.0}, {"flip"}),
        ({"jitter_probability": 0.0}, {"jitter"}),
        ({"brightness": 0.1}, {"jitter"}),
        ({"grayscale_probability": 1.0}, {"grayscale"}),
        ({"blur": "as_written"}, {"sigma"}),
        ({"blur_sigma": (1.0, 1.5)}, {"sigma"}),
        ({"solarize_probability": 1.0}, {"solarize"}),
        ({"global_scale": (0.1, 0.2), "local_scale": (0.3, 0.4)}, {"box"}),
    ):
        changed = MultiCrop(**options).parameters((500, 375), seed=1, epoch=2, sample_id=3)[1]
        differing = {
            name
            for a, b in zip(base, changed, strict=True)
            for name in ViewParameters.__dataclass_fields__
            if getattr(a, name) != getattr(b, name)
        }
        assert differing == fields


@pytest.mark.parametrize(
    ("blur", "expected"), [("as_trained", (0.0, 0.9, 0.5, 0.5)), ("as_written", (1.0, 0.1, 0.5, 0.5))]
)
def test_parameters_blur_probabilities(blur, expected):
    multi_crop = MultiCrop(blur=blur, num_local_crops=2)
    views = [multi_crop.parameters((60, 40), seed=3, epoch=0, sample_id=i)[1] for i in range(600)]
    for view, probability in enumerate(expected):
        share = np.mean([row[view].sigma is not None for row in views])
        assert abs(share - probability) <= 3.5 * np.sqrt(probability * (1 - probability) / 600)


def test_parameters_only_the_second_global_crop_can_be_solarized():
    multi_crop = MultiCrop(solarize_probability=1.0, num_local_crops=3)
    _, views = multi_crop.parameters((60, 40), seed=0, epoch=0, sample_id=0)
    assert [view.solarize for view in views] == [False, True, False, False, False]


def test_parameters_numbers_do_not_overlap_and_rows_do_not_move():
    keys = [(s, e, i) for s in (0, 1) for e in (0, 1) for i in (0, 1)]
    blocks = [A.random_numbers(*key, rows=5) for key in keys]
    assert len(np.unique(np.concatenate(blocks))) == len(keys) * 5 * 64
    assert (A.random_numbers(0, 1, 1, rows=12)[:5] == A.random_numbers(0, 1, 1, rows=5)).all()


def test_parameters_slow_twin_of_the_numbers():
    """Row r starts at block 16 r of the counter: one generator per row, nothing drawn before it."""
    rows = A.random_numbers(9, 4, 7, rows=6)
    for r, row in enumerate(rows):
        generator = np.random.Generator(np.random.Philox(key=9, counter=[16 * r, 0, 7, 4]))
        assert (np.array([generator.random() for _ in range(64)]) == row).all()


def test_parameters_crop_boxes_have_the_distribution_of_torchvision():
    size, scale, ratio = (120, 80), (0.32, 1.0), (3 / 4, 4 / 3)
    rng = np.random.default_rng(0)
    boxes = [A.random_crop_box(size, rng.random(40), scale=scale, aspect_ratio=ratio) for _ in range(3000)]
    ours = np.array(boxes)
    torch.manual_seed(0)
    blank = torch.empty(3, 80, 120)
    theirs = np.array([RandomResizedCrop.get_params(blank, scale, ratio) for _ in range(3000)])  # top, left, h, w
    width, height = ours[:, 2] - ours[:, 0], ours[:, 3] - ours[:, 1]
    for a, column in ((ours[:, 1], 0), (ours[:, 0], 1), (height, 2), (width, 3)):
        b = theirs[:, column]
        assert abs(a.mean() - b.mean()) < 4 * np.hypot(a.std(), b.std()) / np.sqrt(3000)
        assert abs(a.std() / b.std() - 1) < 0.07
    assert (ours >= 0).all()
    assert (ours[:, 2] <= 120).all()
    assert (ours[:, 3] <= 80).all()


@pytest.mark.parametrize(("size", "box"), [((300, 10), (143, 0, 156, 10)), ((10, 300), (0, 143, 10, 156))])
def test_parameters_crop_box_falls_back_to_the_centre(size, box):
    """No box of this area fits a strip: torchvision takes the largest central box of an admissible aspect."""
    numbers = np.random.default_rng(0).random(40)
    actual = A.random_crop_box(size, numbers, scale=(0.9, 1.0), aspect_ratio=(3 / 4, 4 / 3))
    blank = torch.empty(3, *size[::-1])
    top, left, height, width = RandomResizedCrop.get_params(blank, (0.9, 1.0), (3 / 4, 4 / 3))
    assert actual == (left, top, left + width, top + height) == box


def draw(multi_crop: MultiCrop, image: Image.Image, **key: int) -> dict[str, torch.Tensor]:
    return multi_crop(image, **{"seed": 1, "epoch": 2, "sample_id": 3} | key)


def test_multi_crop_shapes_and_types(photo):
    multi_crop = MultiCrop(global_size=32, local_size=16, num_local_crops=3, patch_size=8)
    crops = draw(multi_crop, photo)
    assert crops["global_crops"].shape == (2, 3, 32, 32)
    assert crops["local_crops"].shape == (3, 3, 16, 16)
    assert all(crop.dtype == torch.uint8 and crop.is_contiguous() for crop in crops.values())


def test_multi_crop_each_crop_is_its_own_view(photo):
    multi_crop = MultiCrop(global_size=32, local_size=16, num_local_crops=3)
    _, views = multi_crop.parameters(photo.size, seed=1, epoch=2, sample_id=3)
    crops = draw(multi_crop, photo)
    for crop, view in zip([*crops["global_crops"], *crops["local_crops"]], views, strict=True):
        difference = levels(crop.permute(1, 2, 0).numpy(), torchvision_view(photo, view, crop.shape[-1]))
        assert (np.abs(difference) > 4).mean() < 0.02


def test_multi_crop_no_local_crops(photo):
    crops = draw(MultiCrop(global_size=32, local_size=16, num_local_crops=0), photo)
    assert crops["local_crops"].shape == (0, 3, 16, 16)


def test_multi_crop_other_modes_are_converted(photo):
    multi_crop = MultiCrop(global_size=32, local_size=16, num_local_crops=1)
    gray = photo.convert("L")
    assert torch.equal(draw(multi_crop, gray)["global_crops"], draw(multi_crop, gray.convert("RGB"))["global_crops"])


def test_multi_crop_draws_depend_on_seed_epoch_sample_and_view_only(photo):
    multi_crop = MultiCrop(global_size=32, local_size=16, num_local_crops=2)
    before = photo.copy()
    reference = draw(multi_crop, photo)
    np.random.seed(7)  # noqa: NPY002 - global generators must not matter
    random.seed(7)
    torch.manual_seed(7)
    again = draw(multi_crop, photo)
    assert all(torch.equal(reference[key], again[key]) for key in reference)
    for change in ({"seed": 2}, {"epoch": 3}, {"sample_id": 4}):
        assert not torch.equal(reference["global_crops"], draw(multi_crop, photo, **change)["global_crops"])
    assert not torch.equal(reference["global_crops"][0], reference["global_crops"][1])
    # One local crop more leaves the others as they are.
    more = draw(MultiCrop(global_size=32, local_size=16, num_local_crops=3), photo)
    assert torch.equal(more["local_crops"][:2], reference["local_crops"])
    assert photo == before


@pytest.mark.parametrize("num_workers", [1, 2])
def test_multi_crop_workers_and_the_order_of_calls_change_no_pixel(tiles, num_workers):
    multi_crop = MultiCrop(global_size=32, local_size=16, num_local_crops=2)
    dataset = MultiCropDataset(tiles.subset(range(0, 2214, 300)), multi_crop, seed=5)
    backwards = {i: dataset[(0, i)] for i in reversed(range(len(dataset)))}
    sampler = EpochSampler(len(dataset), seed=5)
    loader = DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=num_workers)
    items = list(loader)
    assert sorted(item["sample_id"] for item in items) == list(range(len(dataset)))
    for item in items:
        for name in ("global_crops", "local_crops"):
            assert torch.equal(item[name], backwards[item["sample_id"]][name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_size": 96, "patch_size": 14}, r"local_size=96 is not a multiple of patch_size=14. Use 98"),
        ({"global_scale": (0.5, 1.2)}, "global_scale"),
        ({"local_scale": (0.4, 0.2)}, "local_scale"),
        ({"flip_probability": 1.5}, "flip_probability=1.5"),
        ({"hue": 0.7}, r"hue=0.7 must be in \[0, 0.5\]"),
        ({"blur": "yes"}, "blur='yes'"),
        ({"blur_kernel_size": 4}, "odd"),
        ({"num_local_crops": -1}, "num_local_crops=-1"),
        ({"locals_from_globals": True, "local_size": 240}, "local_size=240 is larger than global_size=224"),
    ],
)
def test_multi_crop_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        MultiCrop(**options)


def test_missing_packages_of_extras_are_named(monkeypatch, tiles):
    monkeypatch.setitem(sys.modules, "cv2", None)
    for start in (lambda: MultiCropDataset(tiles, MultiCrop(32, 16), seed=0), lambda: JointTransform((32, 32))):
        with pytest.raises(ImportError, match=r"need OpenCV\. Run: pip install 'hf_regvit\[train\]'"):
            start()
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ImportError, match=r"part of scikit-image\. Run: pip install 'hf_regvit\[samples\]'"):
        builtin.builtin_images()


def test_options_of_dinov3_no_flip(photo):
    multi_crop = MultiCrop(flip_probability=0)
    assert not any(v.flip for i in range(20) for v in multi_crop.parameters((9, 9), seed=0, epoch=0, sample_id=i)[1])


def test_options_of_dinov3_shared_jitter_is_applied_once_to_the_whole_image(photo):
    multi_crop = MultiCrop(global_size=32, local_size=16, num_local_crops=2, share_jitter=True)
    key = {"seed": 0, "epoch": 0, "sample_id": 2}
    whole, views = multi_crop.parameters(photo.size, **key)
    assert whole.jitter
    assert not any(view.jitter or view.grayscale for view in views)
    jittered = Image.fromarray(A.distort(np.asarray(photo), whole))
    plain = MultiCrop(global_size=32, local_size=16, num_local_crops=2, jitter_probability=0)
    unchanged = ViewParameters(box=(0, 0, *photo.size))
    expected, actual = plain.render(jittered, unchanged, views), multi_crop(photo, **key)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_options_of_dinov3_share_of_images_that_are_jittered():
    multi_crop = MultiCrop(share_jitter=True, num_local_crops=0)
    drawn = [multi_crop.parameters((9, 9), seed=0, epoch=0, sample_id=i)[0] for i in range(600)]
    assert abs(np.mean([bool(whole.jitter) for whole in drawn]) - 0.8) < 3.5 * np.sqrt(0.16 / 600)
    assert abs(np.mean([whole.grayscale for whole in drawn]) - 0.2) < 3.5 * np.sqrt(0.16 / 600)


def test_options_of_dinov3_local_crops_are_windows_of_the_global_ones(photo):
    options = {"jitter_probability": 0, "grayscale_probability": 0, "solarize_probability": 0}
    multi_crop = MultiCrop(
        global_size=32, local_size=16, patch_size=4, num_local_crops=4, locals_from_globals=True, **options
    )
    corners = set()
    for i in range(40):
        key = {"seed": 0, "epoch": 0, "sample_id": i}
        _, views = multi_crop.parameters(photo.size, **key)
        sharp = [ViewParameters(box=view.box, flip=view.flip) for view in views]
        crops = multi_crop.render(photo, ViewParameters(box=(0, 0, *photo.size)), sharp)
        for j, view in enumerate(views[2:]):
            left, top, right, bottom = view.box
            assert not view.flip
            assert (right - left, bottom - top) == (16, 16)
            window = crops["global_crops"][j // 2, :, top:bottom, left:right]
            assert torch.equal(crops["local_crops"][j], window)
            corners.update([left, top])
    assert corners == {0, 4, 8, 12, 16}


def test_normalize_pixels_torchvision(photo):
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    expected = TF.normalize(TF.to_tensor(photo), processing.IMAGENET_MEAN, processing.IMAGENET_STD)
    batch = A.normalize_pixels(torch.stack([pixels, pixels])[None])
    assert batch.shape == (1, 2, 3, 80, 120)
    torch.testing.assert_close(batch[0, 1], expected, atol=2e-6, rtol=1e-5)


def test_normalize_pixels_no_local_crops():
    assert A.normalize_pixels(torch.zeros(0, 4, 3, 8, 8, dtype=torch.uint8)).shape == (0, 4, 3, 8, 8)


def test_normalize_pixels_normalising_twice_is_refused():
    with pytest.raises(TypeError, match=r"torch\.float32.*uint8"):
        A.normalize_pixels(torch.zeros(3, 8, 8))


def test_draws_reach_both_ends_of_their_ranges():
    transform = MultiCrop(num_local_crops=4, jitter_probability=1.0)
    hues, sigmas, factors = [], [], []
    for sample in range(150):
        _, views = transform.parameters((300, 200), seed=1, epoch=0, sample_id=sample)
        for view in views:
            amounts = dict(view.jitter)
            hues.append(amounts["hue"])
            factors.append(amounts["brightness"])
            sigmas += [] if view.sigma is None else [view.sigma]
    for values, low, high in ((hues, -0.1, 0.1), (sigmas, 0.1, 2.0), (factors, 0.6, 1.4)):
        assert low <= min(values) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < max(values) <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.05 * (high - low))  # tolerance: of a sample


@pytest.mark.parametrize(
    ("size", "numbers", "box"),
    [
        # Half of 10 x 20 as a square is as wide as the image: all eleven places are equally likely.
        ((10, 20), (0.5, 0.5, 0.0, 0.0), (0, 0, 10, 10)),
        ((10, 20), (0.5, 0.5, 0.999, 0.999), (0, 10, 10, 20)),
        ((20, 10), (0.5, 0.5, 0.999, 0.999), (10, 0, 20, 10)),
        ((40, 5), (0.5, 0.5, 0.9, 0.9), (17, 0, 22, 5)),  # no square of half the area fits: the largest, central
    ],
)
def test_a_crop_may_be_as_large_as_the_image_and_lie_at_its_edge(size, numbers, box):
    assert A.random_crop_box(size, numbers * 10, scale=(0.5, 0.5), aspect_ratio=(1.0, 1.0)) == box
