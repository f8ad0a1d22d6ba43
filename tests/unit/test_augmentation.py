"""Colour operations, crop boxes, and the multi-crop of DINOv2."""

import io
import random

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from hf_regvit import augmentation as A
from hf_regvit import images
from hf_regvit.augmentation import MultiCrop
from hf_regvit.images import load_images


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return images.photographs()["chelsea"].resize((120, 80), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def tiles() -> images.ImageSource:
    return load_images("photos")


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def make_folder(root, names, size=(20, 16)):
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (i * 20 % 256, 40, 90)).save(path)
    return root


# --- Multi-crop


class TestColour:
    """Against torchvision on Pillow images, which the released weights were trained with."""

    @pytest.mark.parametrize("factor", [0.6, 0.93, 1.0, 1.4])
    def test_brightness_and_contrast(self, photo, factor):
        pixels = np.asarray(photo)
        assert (A.adjust_brightness(pixels, factor) == np.asarray(TF.adjust_brightness(photo, factor))).all()
        difference = A.adjust_contrast(pixels, factor).astype(int) - np.asarray(TF.adjust_contrast(photo, factor))
        assert np.abs(difference).max() <= 1

    @pytest.mark.parametrize("factor", [0.8, 1.0, 1.2])
    def test_saturation(self, photo, factor):
        actual = A.adjust_saturation(np.asarray(photo), factor).astype(int)
        difference = actual - np.asarray(TF.adjust_saturation(photo, factor))
        assert np.abs(difference).max() <= 1

    @pytest.mark.parametrize("shift", [-0.1, -0.03, 0.0, 0.07, 0.1])
    def test_hue(self, photo, shift):
        difference = A.adjust_hue(np.asarray(photo), shift).astype(int) - np.asarray(TF.adjust_hue(photo, shift))
        assert np.abs(difference).mean() < 0.6  # both round hue, saturation and value to 8 bits
        assert np.abs(difference).max() <= 10

    @pytest.mark.parametrize(("size", "sigma"), [(9, 0.1), (9, 0.7), (9, 2.0), (3, 1.0)])
    def test_blur(self, photo, size, sigma):
        actual = A.gaussian_blur(np.asarray(photo), kernel_size=size, sigma=sigma).astype(int)
        difference = actual - np.asarray(TF.gaussian_blur(photo, [size, size], [sigma, sigma]))
        assert np.abs(difference).max() <= 1
        assert (difference != 0).mean() < 1e-3  # ties of rounding only

    def test_blur_of_a_crop_smaller_than_the_kernel(self):
        flat = np.full((4, 4, 3), 77, np.uint8)
        assert (A.gaussian_blur(flat, kernel_size=9, sigma=2.0) == flat).all()


class Scripted:
    """A generator that returns given numbers: every branch of a view can be forced."""

    def __init__(self, values, permutation=(0, 1, 2, 3)):
        self.values, self.order = list(values), permutation

    def random(self):
        return self.values.pop(0)

    def integers(self, high):
        return int(self.values.pop(0) * high)

    def permutation(self, n):
        return list(self.order)


class TestView:
    crop = (0.3, 0.4, 0.3, 0.7)  # area, aspect, left, top
    no = (0.99,)

    def test_order_of_operations(self, photo):
        """All branches on, in the order of the specification, composed from torchvision's functions."""
        multi_crop = MultiCrop(global_size=64, local_size=32)
        draws = [*self.crop, 0.0, 0.0, 0.9, 0.2, 0.6, 0.3, 0.0, 0.0, 0.5, 0.0]
        rng = Scripted(draws, permutation=(2, 0, 3, 1))
        actual = multi_crop.view(photo, 1, rng)
        assert rng.values == []
        box = A.random_crop_box(photo.size, scale=(0.32, 1), aspect_ratio=(3 / 4, 4 / 3), rng=Scripted(self.crop))
        image = photo.crop(box).resize((64, 64), Image.Resampling.BICUBIC)
        image = TF.adjust_saturation(TF.hflip(image), 0.8 + 0.6 * 0.4)
        image = TF.adjust_hue(TF.adjust_brightness(image, 0.6 + 0.9 * 0.8), -0.1 + 0.3 * 0.2)
        image = TF.rgb_to_grayscale(TF.adjust_contrast(image, 0.6 + 0.2 * 0.8), 3)
        image = TF.gaussian_blur(image, [9, 9], [0.1 + 0.5 * 1.9] * 2)
        solarized = np.asarray(TF.solarize(image, 128)).astype(int)
        difference = np.abs(actual.astype(int) - solarized)
        # A grey level of 128 may be solarized on one side only; elsewhere the roundings add up to 2.
        assert np.median(difference) <= 1
        assert (difference > 3).mean() < 0.03

    def test_each_crop_without_augmentation_is_bicubic_with_antialias(self, photo):
        multi_crop = MultiCrop(global_size=64, local_size=32)
        rng = Scripted([*self.crop, *self.no * 4])
        box = A.random_crop_box(photo.size, scale=(0.05, 0.32), aspect_ratio=(3 / 4, 4 / 3), rng=Scripted(self.crop))
        expected = TF.resized_crop(
            photo, box[1], box[0], box[3] - box[1], box[2] - box[0], [32, 32], TF.InterpolationMode.BICUBIC
        )
        assert (multi_crop.view(photo, 5, rng) == np.asarray(expected)).all()
        assert rng.values == []

    def test_only_the_second_global_crop_can_be_solarized(self, photo):
        multi_crop = MultiCrop(global_size=32, local_size=32)
        for view, count in ((0, 4), (1, 5), (2, 4), (9, 4)):
            rng = Scripted([*self.crop, *self.no * count])
            multi_crop.view(photo, view, rng)
            assert rng.values == []


class CountBlur:
    """Share of views that were blurred, with the probabilities as they come out of the real generator."""

    def __init__(self, monkeypatch, **options):
        self.count = 0
        monkeypatch.setattr(A, "gaussian_blur", self.blur)
        self.multi_crop = MultiCrop(global_size=8, local_size=8, **options)

    def blur(self, pixels, **_):
        self.count += 1
        return pixels

    def share(self, image, view, draws=400):
        self.count = 0
        for i in range(draws):
            self.multi_crop.view(image, view, A.view_generator(3, 0, i, view))
        return self.count / draws


@pytest.mark.parametrize(
    ("blur", "expected"), [("as_trained", (0.0, 0.9, 0.5, 0.5)), ("as_written", (1.0, 0.1, 0.5, 0.5))]
)
def test_blur_probabilities(monkeypatch, blur, expected):
    counter = CountBlur(monkeypatch, blur=blur)
    image = Image.new("RGB", (10, 10))
    for view, probability in enumerate(expected):
        standard = np.sqrt(probability * (1 - probability) / 400)
        assert abs(counter.share(image, view) - probability) <= 3.5 * standard


def test_shares_of_flip_grayscale_and_solarize():
    """On a picture that is red on the left and green on the right each operation can be read off a crop."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, :16, 0], pixels[:, 16:, 1] = 250, 250
    multi_crop = MultiCrop(
        global_size=8,
        local_size=8,
        global_scale=(1, 1),
        aspect_ratio=(1, 1),
        jitter_probability=0,
        blur_sigma=(0.1, 0.1),
    )
    draws, gray, solarized, flipped = 600, [], [], []
    for i in range(draws):
        crop = multi_crop.view(Image.fromarray(pixels), 1, A.view_generator(0, 0, i, 1)).astype(int)
        gray.append((crop.max(-1) == crop.min(-1)).all())
        # Level of the right half: 250, or as grey 147; solarized 5, or as grey 108.
        solarized.append(max(crop[4, 0].max(), crop[4, -1].max()) < (125 if gray[-1] else 50))
        if not gray[-1] and not solarized[-1]:
            flipped.append(crop[4, 0, 1] > 125)
    assert abs(np.mean(gray) - 0.2) < 3.5 * np.sqrt(0.16 / draws)
    assert abs(np.mean(flipped) - 0.5) < 3.5 * np.sqrt(0.25 / len(flipped))
    assert abs(np.mean(solarized) - 0.2) < 3.5 * np.sqrt(0.16 / draws)


def test_crop_boxes_have_the_distribution_of_torchvision():
    size, scale, ratio = (120, 80), (0.32, 1.0), (3 / 4, 4 / 3)
    rng = np.random.default_rng(0)
    ours = np.array([A.random_crop_box(size, scale=scale, aspect_ratio=ratio, rng=rng) for _ in range(3000)])
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
def test_crop_box_falls_back_to_the_centre(size, box):
    """No box of this area fits a strip: torchvision takes the largest central box of an admissible aspect."""
    rng = np.random.default_rng(0)
    actual = A.random_crop_box(size, scale=(0.9, 1.0), aspect_ratio=(3 / 4, 4 / 3), rng=rng)
    top, left, height, width = RandomResizedCrop.get_params(torch.empty(3, *size[::-1]), (0.9, 1.0), (3 / 4, 4 / 3))
    assert actual == (left, top, left + width, top + height) == box


class TestMultiCrop:
    def test_shapes_and_normalisation(self, photo):
        multi_crop = MultiCrop(global_size=32, local_size=16, num_local_crops=3, patch_size=8)
        crops = multi_crop(photo, seed=0, epoch=0, sample_id=0)
        assert crops["global_crops"].shape == (2, 3, 32, 32)
        assert crops["local_crops"].shape == (3, 3, 16, 16)
        assert crops["global_crops"].dtype == torch.float32
        for view in range(2):
            pixels = multi_crop.view(photo, view, A.view_generator(0, 0, 0, view))
            expected = TF.normalize(TF.to_tensor(pixels), images.IMAGENET_MEAN, images.IMAGENET_STD)
            torch.testing.assert_close(crops["global_crops"][view], expected, atol=2e-6, rtol=1e-5)

    def test_no_local_crops(self, photo):
        crops = MultiCrop(global_size=32, local_size=16, num_local_crops=0)(photo, seed=0, epoch=0, sample_id=0)
        assert crops["local_crops"].shape == (0, 3, 16, 16)

    def test_draws_depend_on_seed_epoch_sample_and_view_only(self, photo):
        multi_crop = MultiCrop(global_size=32, local_size=16, num_local_crops=2)
        before = photo.copy()
        reference = multi_crop(photo, seed=1, epoch=2, sample_id=3)
        np.random.seed(7)  # noqa: NPY002 - global generators must not matter
        random.seed(7)
        torch.manual_seed(7)
        again = multi_crop(photo, seed=1, epoch=2, sample_id=3)
        assert all(torch.equal(reference[key], again[key]) for key in reference)
        for change in ({"seed": 2}, {"epoch": 3}, {"sample_id": 4}):
            other = multi_crop(photo, **{"seed": 1, "epoch": 2, "sample_id": 3} | change)
            assert not torch.equal(reference["global_crops"], other["global_crops"])
        assert not torch.equal(reference["global_crops"][0], reference["global_crops"][1])
        # One local crop more leaves the others as they are.
        more = MultiCrop(global_size=32, local_size=16, num_local_crops=3)(photo, seed=1, epoch=2, sample_id=3)
        assert torch.equal(more["local_crops"][:2], reference["local_crops"])
        assert photo == before

    def test_streams_of_neighbouring_views_do_not_overlap(self):
        keys = [(s, e, i, v) for s in (0, 1) for e in (0, 1) for i in (0, 1) for v in (0, 1)]
        streams = [A.view_generator(*key).random(500) for key in keys]
        assert len(np.unique(np.concatenate(streams))) == 500 * len(keys)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"local_size": 96, "patch_size": 14}, r"local_size=96 is not a multiple of patch_size=14. Use 98"),
            ({"global_scale": (0.5, 1.2)}, "global_scale"),
            ({"local_scale": (0.4, 0.2)}, "local_scale"),
            ({"flip_probability": 1.5}, "flip_probability=1.5"),
            ({"hue": 0.7}, r"hue=0.7 must lie in \[0, 0.5\]"),
            ({"blur": "yes"}, "blur='yes'"),
            ({"blur_kernel_size": 4}, "odd"),
            ({"num_local_crops": -1}, "num_local_crops=-1"),
        ],
    )
    def test_wrong_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            MultiCrop(**options)
