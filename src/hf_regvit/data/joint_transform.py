"""Random augmentation of an image together with its map of classes or depth, for training.

Shape letters: H and W pixels of the original, h and w of the result.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from .augmentation import adjust_hue, adjust_saturation, require_opencv
from .maps import IGNORE, Array, DenseDataError


@dataclass(frozen=True)
class JointTransform:
    """Joint random augmentation of an image and its map: scale, rotation, crop, flip, color.

    The image is resized bicubically and the map by nearest neighbor, so no new values appear in the map. Depths are
    not rescaled with the image. Empty areas of a crop are padded: black in the image, 255 or 0 in the map.

    Args:
        size: (height, width) of the result in pixels.
        shorter_side: Shorter side of the image in pixels before the random scale. Default: the shorter side of `size`.
        scale: Smallest and largest random factor of `shorter_side`.
        max_class_share: Largest share of one class among the valid pixels of a crop. Other crops are drawn again, at
            most ten times.
        flip_probability: Probability of a horizontal flip.
        rotation: Largest angle in degrees; a rotation is applied with probability 0.5.
        photometric: Color augmentation. "segmentation": brightness, contrast, saturation and hue, each with
            probability 0.5. "depth": gamma, brightness and color balance, together with probability 0.5. "none".
        fill: Value of empty areas in the map: 255 for masks, 0 for depth.

    Source: training pipelines of facebookresearch/dinov2's linear segmentation and depth, which are those of
    mmsegmentation; `PhotoMetricDistortion` there for the ranges.
    """

    size: tuple[int, int]
    shorter_side: int | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    max_class_share: float = 0.75
    flip_probability: float = 0.5
    rotation: float = 0.0
    photometric: Literal["segmentation", "depth", "none"] = "segmentation"
    fill: int = IGNORE

    def __post_init__(self) -> None:
        require_opencv()
        if min(self.size) < 1 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"size={self.size} must be positive, and scale={self.scale} an ascending range above 0.")

    @classmethod
    def for_depth(cls, size: tuple[int, int], *, flip_probability: float = 0.5) -> "JointTransform":
        """Create the published augmentation for depth: scales of 1 to 1.15, small rotations, its own color changes."""
        return cls(size, None, (1.0, 1.15), 1.0, flip_probability, rotation=2.5, photometric="depth", fill=0)

    def __call__(self, image: Image.Image, target: Array, rng: np.random.Generator) -> tuple[Array, Array, Array]:
        """Augment one image and its map.

        Args:
            image: RGB image.
            target: Map of the same size, (H, W).
            rng: Source of all random numbers.

        Returns:
            (h, w, 3) uint8 pixels, (h, w) map, (h, w) bool: True for image, False for padding.

        Raises:
            DenseDataError: The sizes differ.
        """
        if target.shape[::-1] != image.size:
            raise DenseDataError(
                f"The map has (width, height) {target.shape[::-1]}, but its image {image.size}. Expected equal sizes."
            )
        factor = rng.uniform(*self.scale) * (self.shorter_side or min(self.size)) / min(image.size)
        width, height = (max(1, round(side * factor)) for side in image.size)
        pixels = np.array(image.resize((width, height), Image.Resampling.BICUBIC))  # a writable copy
        target = resize_map(target, (height, width))
        inside = np.ones((height, width), dtype=bool)
        if self.rotation and rng.random() < 0.5:
            pixels, target, inside = self._rotated(pixels, target, rng.uniform(-self.rotation, self.rotation))
        top, left = self._crop_place(target, rng)
        pixels, target, inside = (_cut(values, top, left, self.size) for values in (pixels, target, inside))
        if rng.random() < self.flip_probability:
            pixels, target, inside = pixels[:, ::-1], target[:, ::-1], inside[:, ::-1]
        pixels = self._colored(np.ascontiguousarray(pixels), rng)
        pixels, target, inside = (
            _padded(values, self.size, fill) for values, fill in ((pixels, 0), (target, self.fill), (inside, False))
        )
        return pixels, target, inside

    def _rotated(self, pixels: Array, target: Array, degrees: float) -> tuple[Array, Array, Array]:
        turned = Image.fromarray(pixels).rotate(degrees, Image.Resampling.BILINEAR)
        # Pillow rotates an image of indices, which then select values from the map, so its dtype does not matter.
        places = np.arange(1, target.size + 1, dtype=np.int32).reshape(target.shape)
        picked = np.asarray(Image.fromarray(places).rotate(degrees, Image.Resampling.NEAREST))
        values = np.concatenate([np.array([self.fill], dtype=target.dtype), target.ravel()])[picked]
        return np.array(turned), values, picked > 0

    def _crop_place(self, target: Array, rng: np.random.Generator) -> tuple[int, int]:
        free = [max(0, have - want) for have, want in zip(target.shape, self.size)]
        place = (0, 0)
        for _ in range(10):
            place = int(rng.integers(free[0] + 1)), int(rng.integers(free[1] + 1))
            if self.max_class_share >= 1 or not any(free):
                break
            crop = _cut(target, *place, self.size)
            counts = np.unique(crop[crop != self.fill], return_counts=True)[1]
            if len(counts) > 1 and counts.max() < self.max_class_share * counts.sum():
                break
        return place

    def _colored(self, pixels: Array, rng: np.random.Generator) -> Array:
        if self.photometric == "depth":
            if rng.random() < 0.5:
                return pixels
            gamma, brightness = rng.uniform(0.9, 1.1), rng.uniform(0.75, 1.25)
            balance = rng.uniform(0.9, 1.1, size=3)
            values = 255 * (pixels / 255.0) ** gamma * brightness * balance
            return np.clip(values, 0, 255).round().astype(np.uint8)
        if self.photometric == "none":
            return pixels
        contrast_first = rng.random() < 0.5
        chosen = rng.random(4) < 0.5
        shift, contrast, saturation = rng.uniform(-32, 32), rng.uniform(0.5, 1.5), rng.uniform(0.5, 1.5)
        hue = rng.integers(-18, 18) / 180  # in turns; the original uses 8-bit hues of two degrees each
        values = pixels.astype(np.float32)
        values = values + shift if chosen[0] else values
        if chosen[1] and contrast_first:
            values = values * contrast
        pixels = np.clip(values, 0, 255).round().astype(np.uint8)
        pixels = adjust_saturation(pixels, saturation) if chosen[2] else pixels
        pixels = adjust_hue(pixels, hue) if chosen[3] else pixels
        if chosen[1] and not contrast_first:
            pixels = np.clip(pixels.astype(np.float32) * contrast, 0, 255).round().astype(np.uint8)
        return pixels


def resize_map(target: Array, size: tuple[int, int]) -> Array:
    """Resize a map to (height, width) by nearest neighbor with centers aligned as in Pillow, without new values."""
    rows, columns = (
        np.minimum(((np.arange(new) + 0.5) * old / new).astype(np.int64), old - 1)
        for new, old in zip(size, target.shape)
    )
    return target[rows[:, None], columns]


def _cut(values: Array, top: int, left: int, size: tuple[int, int]) -> Array:
    return values[top : top + size[0], left : left + size[1]]


def _padded(values: Array, size: tuple[int, int], fill: int) -> Array:
    missing = [(0, want - have) for want, have in zip(size, values.shape)]
    if not any(after for _, after in missing):
        return np.ascontiguousarray(values)
    return np.pad(values, [*missing, (0, 0)][: values.ndim], constant_values=fill)
