"""The multi-crop augmentation of DINOv2 on 8-bit pictures: geometry with Pillow, colour and blur with OpenCV.

S and s are the sides of a global and a local crop in pixels, L the number of local crops.

Every random draw is a pure function of (seed, epoch, sample id, view), so neither the number of workers nor a stop in
the middle of an epoch changes a single pixel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .images import IMAGENET_MEAN, IMAGENET_STD

# Probability of blur for global crop 0, global crop 1 and the local crops. The official blur class hands 1 - p to its
# "apply with probability" wrapper: released weights were trained with the first row, though the code reads like the
# second. Source: dinov2 pull request 411, dinov3 issue 286.
_BLUR_PROBABILITIES = {"as_trained": (0.0, 0.9, 0.5), "as_written": (1.0, 0.1, 0.5)}


@dataclass(frozen=True)
class MultiCrop:
    """Two global and several local crops of one image, augmented independently, as DINOv2 does.

    Order, on 8-bit RGB: random resized crop (bicubic with antialias), horizontal flip, colour jitter in random order,
    grayscale, Gaussian blur, solarize (global crop 1 only), normalisation. Sizes are pixels, scales shares of the
    image's area, probabilities lie in [0, 1]. Jitter ranges mean: brightness, contrast and saturation factors from
    [1 - x, 1 + x], hue shift from [-x, x] turns of the colour circle.

    Raises:
        ValueError: A size that is no multiple of `patch_size`, a scale or probability out of range, an even kernel.

    Source: arXiv 2304.07193; values of dinov2 `data/augmentations.py`.
    """

    global_size: int = 224
    local_size: int = 96
    num_local_crops: int = 8
    global_scale: Sequence[float] = (0.32, 1.0)
    local_scale: Sequence[float] = (0.05, 0.32)
    patch_size: int | None = None
    aspect_ratio: Sequence[float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.5
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale_probability: float = 0.2
    blur: Literal["as_trained", "as_written"] = "as_trained"
    blur_kernel_size: int = 9
    blur_sigma: Sequence[float] = (0.1, 2.0)
    solarize_probability: float = 0.2
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("global_size", "local_size"):
            size, patch = getattr(self, name), self.patch_size or 1
            if size < patch or size % patch:
                nearest = max(round(size / patch), 1) * patch
                raise ValueError(f"{name}={size} is not a multiple of patch_size={patch}. Use {nearest}.")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name}=({low}, {high}) must be two shares of the area, 0 < low <= high <= 1.")
        for name in ("flip", "jitter", "grayscale", "solarize"):
            if not 0 <= getattr(self, f"{name}_probability") <= 1:
                raise ValueError(f"{name}_probability={getattr(self, f'{name}_probability')} must lie in [0, 1].")
        for name, limit in (("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= limit:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, {limit}].")
        if self.blur not in _BLUR_PROBABILITIES:
            raise ValueError(f"blur={self.blur!r} is unknown. Use {' or '.join(map(repr, _BLUR_PROBABILITIES))}.")
        if self.blur_kernel_size < 1 or self.blur_kernel_size % 2 == 0:
            raise ValueError(f"blur_kernel_size={self.blur_kernel_size} must be odd and positive.")
        if self.num_local_crops < 0:
            raise ValueError(f"num_local_crops={self.num_local_crops} must be 0 or more.")

    def __call__(self, image: Image.Image, *, seed: int, epoch: int, sample_id: int) -> dict[str, Tensor]:
        """Draw the crops of one image.

        Args:
            image: RGB, any size.
            seed: Of the run.
            epoch: Passes over the data so far.
            sample_id: Index of the image in its source.

        Returns:
            `global_crops` (2, 3, S, S) and `local_crops` (L, 3, s, s), normalised float32.
        """
        views = range(2 + self.num_local_crops)
        crops = [self.view(image, view, view_generator(seed, epoch, sample_id, view)) for view in views]
        return {
            "global_crops": self._normalize(crops[:2], self.global_size),
            "local_crops": self._normalize(crops[2:], self.local_size),
        }

    def view(self, image: Image.Image, view: int, rng: np.random.Generator) -> np.ndarray:
        """One augmented crop, (S, S, 3) uint8. Views 0 and 1 are the global crops, 2 and up the local ones."""
        import cv2

        is_global = view < 2
        size, scale = (self.global_size, self.global_scale) if is_global else (self.local_size, self.local_scale)
        box = random_crop_box(image.size, scale=scale, aspect_ratio=self.aspect_ratio, rng=rng)
        # Crop first: with `resize(box=...)` the filter would see pixels outside of the crop.
        crop = np.asarray(image.crop(box).resize((size, size), Image.Resampling.BICUBIC))
        if rng.random() < self.flip_probability:
            crop = cv2.flip(crop, 1)
        if rng.random() < self.jitter_probability:
            crop = self._jitter(crop, rng)
        if rng.random() < self.grayscale_probability:
            crop = cv2.cvtColor(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        if rng.random() < _BLUR_PROBABILITIES[self.blur][min(view, 2)]:
            crop = gaussian_blur(crop, kernel_size=self.blur_kernel_size, sigma=_uniform(rng, *self.blur_sigma))
        if view == 1 and rng.random() < self.solarize_probability:
            crop = np.where(crop < 128, crop, 255 - crop)
        return crop

    def _jitter(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        brightness = _uniform(rng, 1 - self.brightness, 1 + self.brightness)
        contrast = _uniform(rng, 1 - self.contrast, 1 + self.contrast)
        saturation = _uniform(rng, 1 - self.saturation, 1 + self.saturation)
        hue = _uniform(rng, -self.hue, self.hue)
        for operation in rng.permutation(4):
            if operation == 0:
                pixels = adjust_brightness(pixels, brightness)
            elif operation == 1:
                pixels = adjust_contrast(pixels, contrast)
            elif operation == 2:
                pixels = adjust_saturation(pixels, saturation)
            else:
                pixels = adjust_hue(pixels, hue)
        return pixels

    def _normalize(self, crops: list[np.ndarray], size: int) -> Tensor:
        if not crops:
            return torch.zeros(0, 3, size, size)
        pixels = np.empty((len(crops), 3, size, size), dtype=np.float32)
        for i, crop in enumerate(crops):
            pixels[i] = crop.transpose(2, 0, 1)  # converts and reorders in one pass over the memory
        mean, std = (torch.tensor(list(values)).view(3, 1, 1) for values in (self.mean, self.std))
        return torch.from_numpy(pixels).mul_(1 / (255 * std)).sub_(mean / std)


def view_generator(seed: int, epoch: int, sample_id: int, view: int) -> np.random.Generator:
    """The random numbers of one view of one image in one epoch.

    Philox is counter-based: the seed is the key, and (epoch, sample, view) select blocks of its counter, so no two
    views of a run share a number and nothing has to be stepped through to reach one.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, view, sample_id, epoch]))


def random_crop_box(
    size: tuple[int, int], *, scale: Sequence[float], aspect_ratio: Sequence[float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Box of a random resized crop: area uniform in `scale`, aspect log-uniform, position uniform.

    Args:
        size: (width, height) of the image in pixels.
        scale: Smallest and largest share of the image's area.
        aspect_ratio: Smallest and largest width / height.
        rng: Source of the draws; at most 10 tries, then the largest central box of an admissible aspect.

    Returns:
        (left, top, right, bottom) in pixels.

    Source: arXiv 1409.4842 (Inception); torchvision's `RandomResizedCrop` for the details.
    """
    width, height = size
    low, high = math.log(aspect_ratio[0]), math.log(aspect_ratio[1])
    for _ in range(10):
        area = width * height * _uniform(rng, scale[0], scale[1])
        aspect = math.exp(_uniform(rng, low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(round(height * aspect_ratio[1]), 1))
    h = min(height, max(round(width / aspect_ratio[0]), 1))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


# The colour operations take and return (H, W, 3) uint8. They follow torchvision's on Pillow images; OpenCV is several
# times faster on small crops and differs by rounding: at most one grey level, in hue 0.4 on average (the 8-bit HSV of
# Pillow is the coarser of the two).


def adjust_brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blend with black: 0 is black, 1 the image."""
    return _blend_with_constant(pixels, 0, factor)


def adjust_contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the image's mean grey: 0 is flat grey, 1 the image."""
    import cv2

    return _blend_with_constant(pixels, int(cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0] + 0.5), factor)


def adjust_saturation(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the grey image: 0 is grey, 1 the image."""
    import cv2

    gray = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(pixels, factor, gray, 1 - factor, 0)


def adjust_hue(pixels: np.ndarray, shift: float) -> np.ndarray:
    """Turn the hue by `shift` of a full circle, in 8-bit HSV."""
    import cv2

    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    hsv[:, :, 0] += np.uint8(int(shift * 255) % 256)  # wraps round, as hue does
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def gaussian_blur(pixels: np.ndarray, *, kernel_size: int, sigma: float) -> np.ndarray:
    """Separable Gaussian blur with mirrored border, computed in float32 and rounded once.

    Args:
        pixels: (H, W, 3) uint8.
        kernel_size: Taps, odd.
        sigma: Standard deviation, pixels.
    """
    import cv2

    kernel = cv2.getGaussianKernel(kernel_size, sigma, cv2.CV_32F)
    # Mirroring needs more pixels than half a kernel; tiny crops repeat their edge instead.
    border = cv2.BORDER_REFLECT_101 if min(pixels.shape[:2]) > kernel_size // 2 else cv2.BORDER_REPLICATE
    return np.rint(cv2.sepFilter2D(pixels, cv2.CV_32F, kernel, kernel, borderType=border)).astype(np.uint8)


def _blend_with_constant(pixels: np.ndarray, base: int, factor: float) -> np.ndarray:
    import cv2

    # base + factor (value - base), cut off rather than rounded, as Pillow does, through a table of 256 values.
    values = base + np.float32(factor) * (np.arange(256, dtype=np.float32) - base)
    return cv2.LUT(pixels, np.clip(values, 0, 255).astype(np.uint8))


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()  # four times faster than rng.uniform for a scalar
