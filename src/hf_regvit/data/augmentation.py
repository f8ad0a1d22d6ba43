"""Multi-crop augmentation of DINOv2 on 8-bit images: geometry with torch, color and blur with OpenCV.

S and s are the sides of a global and a local crop in pixels, L the number of local crops, H and W the sides of the
image. Pixels stay 8-bit integers, (height, width, channel), until a batch is normalized with `normalize_pixels`.

Every random draw is a pure function of (seed, epoch, sample id, view), so neither the number of workers nor a stop in
the middle of an epoch changes any pixel.

Design for speed: crops are cut before they are resized. torch's antialiased bicubic filter on 8-bit tensors computes
the same as Pillow's and is several times faster, most of all on four interleaved channels (OpenCV's INTER_AREA is
slower and loses a fifth of the power at half the finest scale). Brightness, contrast and saturation are one vectorized
pass each, hue is one addition in 8-bit HSV, the blur is separable, and one generator serves all views of an image.
"""

import importlib.util
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..models.processing import IMAGENET_MEAN, IMAGENET_STD

# Probability of blur for global crop 0, global crop 1 and the local crops. The official blur class passes 1 - p to its
# "apply with probability" wrapper, so released weights were trained with the first row, although the code suggests the
# second. Source: dinov2 pull request 411, dinov3 issue 286.
_BLUR_PROBABILITIES = {"as_trained": (0.0, 0.9, 0.5), "as_written": (1.0, 0.1, 0.5)}

_JITTER_OPERATIONS = ("brightness", "contrast", "saturation", "hue")
_JITTER_ORDERS = tuple(itertools.permutations(range(4)))

# Every parameter of a view has a fixed position among the view's random numbers, so disabling one operation does not
# change the others. Positions 0 to 39 are ten tries of a crop box.
_BOX_TRIES = 10
_FLIP, _JITTER, _ORDER, _AMOUNTS, _GRAYSCALE, _BLUR, _SIGMA, _SOLARIZE = 40, 41, 42, 43, 47, 48, 49, 50
_NUMBERS_PER_VIEW = 64


def require_opencv() -> None:
    """Raise an ImportError that names the extra, unless OpenCV is installed."""
    if importlib.util.find_spec("cv2") is None:
        raise ImportError("Augmentations need OpenCV. Run: pip install 'hf_regvit[train]'")


@dataclass(frozen=True)
class ViewParameters:
    """Random parameters of one crop.

    Args:
        box: (left, top, right, bottom) of the crop, in pixels of the image.
        flip: True to flip horizontally.
        jitter: Operations and amounts in the order in which they are applied; empty for none. Brightness, contrast
            and saturation are factors; hue is a fraction of the color circle.
        grayscale: True to convert to grayscale.
        sigma: Standard deviation of the blur, in pixels of the crop; None for no blur.
        solarize: True to invert all values from 128 up.
    """

    box: tuple[int, int, int, int]
    flip: bool = False
    jitter: tuple[tuple[str, float], ...] = ()
    grayscale: bool = False
    sigma: float | None = None
    solarize: bool = False


@dataclass(frozen=True)
class MultiCrop:
    """Two global and several local crops of one image, augmented independently, as DINOv2 does.

    Order, on 8-bit RGB: random resized crop (bicubic with antialias), horizontal flip, color jitter in random order,
    grayscale, Gaussian blur, solarize (global crop 1 only). Sizes are in pixels, scales are shares of the image's
    area, and probabilities are in [0, 1]. With a jitter range x, brightness, contrast and saturation factors are drawn
    from [1 - x, 1 + x], and hue shifts from [-x, x] turns of the color circle.

    Options of DINOv3: `flip_probability=0` keeps left and right distinct. `share_jitter` applies one color jitter and
    one grayscale to the whole image before the crops are cut. `locals_from_globals` cuts the first half of the local
    crops from global crop 0 and the others from global crop 1, before their colors change, at offsets that are
    multiples of `patch_size` (of 1 if it is None), without resizing or flipping them again; the contrast then uses the
    mean of the local crop, where dinov3 uses the mean of the global crop. `gram_size` adds the global crops once more
    at that size, with the same distortions, for the teacher of Gram anchoring.

    Raises:
        ValueError: A size is not a multiple of `patch_size`, a scale or probability is out of range, or the kernel
            size is even.

    Source: arXiv 2304.07193 and 2508.10104; values of dinov2 `data/augmentations.py`, options of dinov3's.
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
    share_jitter: bool = False
    locals_from_globals: bool = False
    gram_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("global_size", "local_size", "gram_size"):
            size, patch = getattr(self, name), self.patch_size or 1
            if size is None:
                continue
            if size < patch or size % patch:
                nearest = max(round(size / patch), 1) * patch
                raise ValueError(f"{name}={size} is not a multiple of patch_size={patch}. Use {nearest}.")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name}=({low}, {high}) must be two shares of the area, 0 < low <= high <= 1.")
        for name in ("flip", "jitter", "grayscale", "solarize"):
            if not 0 <= getattr(self, f"{name}_probability") <= 1:
                raise ValueError(f"{name}_probability={getattr(self, f'{name}_probability')} must be in [0, 1].")
        for name, limit in (("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= limit:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, {limit}].")
        if self.blur not in _BLUR_PROBABILITIES:
            raise ValueError(f"Unknown blur={self.blur!r}. Use {' or '.join(map(repr, _BLUR_PROBABILITIES))}.")
        if self.blur_kernel_size < 1 or self.blur_kernel_size % 2 == 0:
            raise ValueError(f"blur_kernel_size={self.blur_kernel_size} must be odd and positive.")
        if self.num_local_crops < 0:
            raise ValueError(f"num_local_crops={self.num_local_crops} must be 0 or more.")
        if self.locals_from_globals and self.local_size > self.global_size:
            raise ValueError(
                f"local_size={self.local_size} is larger than global_size={self.global_size}, but with "
                "locals_from_globals, local crops are cut from global ones. Reduce local_size."
            )

    def __call__(self, image: Image.Image, *, seed: int, epoch: int, sample_id: int) -> dict[str, Tensor]:
        """Draw the crops of one image.

        Args:
            image: RGB image of any size.
            seed: Random seed of the run.
            epoch: Number of completed passes over the data.
            sample_id: Index of the image in its source.

        Returns:
            `global_crops` (2, 3, S, S) and `local_crops` (L, 3, s, s), uint8; see `normalize_pixels`. If `gram_size`
            is set, also `gram_crops` (2, 3, S', S').
        """
        whole, views = self.parameters(image.size, seed=seed, epoch=epoch, sample_id=sample_id)
        return self.render(image, whole, views)

    def parameters(
        self, size: tuple[int, int], *, seed: int, epoch: int, sample_id: int
    ) -> tuple[ViewParameters, list[ViewParameters]]:
        """Draw the parameters for an image of `size` (width, height) as a whole, and for each of its 2 + L crops."""
        first, *rows = random_numbers(seed, epoch, sample_id, rows=3 + self.num_local_crops).tolist()
        whole = ViewParameters(box=(0, 0, *size), **self._distort_color(first) if self.share_jitter else {})
        return whole, [self._view_parameters(size, view, numbers) for view, numbers in enumerate(rows)]

    def render(self, image: Image.Image, whole: ViewParameters, views: Sequence[ViewParameters]) -> dict[str, Tensor]:
        """Create the crops that `parameters` describes, with the shapes that `__call__` returns."""
        pixels = _four_channels(image)  # (H, W, 4)
        if whole.jitter or whole.grayscale:
            import cv2

            pixels = cv2.cvtColor(distort(cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB), whole), cv2.COLOR_RGB2RGBA)
        crops = [_resized_crop(pixels, view, self.global_size) for view in views[:2]]
        for i, view in enumerate(views[2:]):
            if self.locals_from_globals:
                left, top, right, bottom = view.box
                crops.append(crops[2 * i // self.num_local_crops][top:bottom, left:right])
            else:
                crops.append(_resized_crop(pixels, view, self.local_size))
        kernel_size = self.blur_kernel_size
        crops = [distort(crop, view, blur_kernel_size=kernel_size) for crop, view in zip(crops, views, strict=True)]
        rendered = {
            "global_crops": _stack_planes(crops[:2], self.global_size),
            "local_crops": _stack_planes(crops[2:], self.local_size),
        }
        if self.gram_size is not None:
            larger = [_resized_crop(pixels, view, self.gram_size) for view in views[:2]]
            distorted = [distort(crop, view, blur_kernel_size=kernel_size) for crop, view in zip(larger, views)]
            rendered["gram_crops"] = _stack_planes(distorted, self.gram_size)
        return rendered

    def _view_parameters(self, size: tuple[int, int], view: int, numbers: Sequence[float]) -> ViewParameters:
        is_global = view < 2
        if is_global or not self.locals_from_globals:
            scale = self.global_scale if is_global else self.local_scale
            box = random_crop_box(size, numbers, scale=scale, aspect_ratio=self.aspect_ratio)
            flip = numbers[_FLIP] < self.flip_probability
        else:
            step = self.patch_size or 1
            # dinov3 never draws the last offset; here all offsets that fit are equally likely.
            steps = (self.global_size - self.local_size) // step + 1
            left, top = int(numbers[0] * steps) * step, int(numbers[1] * steps) * step
            box, flip = (left, top, left + self.local_size, top + self.local_size), False
        has_blur = numbers[_BLUR] < _BLUR_PROBABILITIES[self.blur][min(view, 2)]
        return ViewParameters(
            box=box,
            flip=flip,
            sigma=_between(numbers[_SIGMA], *self.blur_sigma) if has_blur else None,
            solarize=view == 1 and numbers[_SOLARIZE] < self.solarize_probability,
            **{} if self.share_jitter else self._distort_color(numbers),
        )

    def _distort_color(self, numbers: Sequence[float]) -> dict[str, Any]:
        """Return the fields `jitter` and `grayscale`."""
        jitter: tuple[tuple[str, float], ...] = ()
        if numbers[_JITTER] < self.jitter_probability:
            amounts = (
                _between(numbers[_AMOUNTS], 1 - self.brightness, 1 + self.brightness),
                _between(numbers[_AMOUNTS + 1], 1 - self.contrast, 1 + self.contrast),
                _between(numbers[_AMOUNTS + 2], 1 - self.saturation, 1 + self.saturation),
                _between(numbers[_AMOUNTS + 3], -self.hue, self.hue),
            )
            order = _JITTER_ORDERS[int(numbers[_ORDER] * len(_JITTER_ORDERS))]
            jitter = tuple((_JITTER_OPERATIONS[i], amounts[i]) for i in order)
        return {"jitter": jitter, "grayscale": numbers[_GRAYSCALE] < self.grayscale_probability}


def random_numbers(seed: int, epoch: int, sample_id: int, *, rows: int) -> np.ndarray:
    """Draw random numbers for one image and epoch, (rows, 64) in [0, 1): row 0 for the image, row 1 + v for view v.

    Philox is counter-based: the seed is the key, and (sample, epoch) with the row select blocks of its counter. So no
    two views of a run share a number, any view can be reached directly, and adding rows does not change the others.
    """
    bits = np.random.Philox(key=seed, counter=[0, 0, sample_id, epoch])
    return np.random.Generator(bits).random((rows, _NUMBERS_PER_VIEW))


def random_crop_box(
    size: tuple[int, int], numbers: Sequence[float], *, scale: Sequence[float], aspect_ratio: Sequence[float]
) -> tuple[int, int, int, int]:
    """Return the box of a random resized crop: area uniform in `scale`, aspect log-uniform, position uniform.

    Args:
        size: (width, height) of the image in pixels.
        numbers: 40 numbers in [0, 1): area, aspect, left, top of ten tries. If all fail, the box is the largest
            centered one with an admissible aspect.
        scale: Smallest and largest share of the image's area.
        aspect_ratio: Smallest and largest width / height.

    Returns:
        (left, top, right, bottom) in pixels.

    Source: arXiv 1409.4842 (Inception); torchvision's `RandomResizedCrop` for the details.
    """
    width, height = size
    low, high = math.log(aspect_ratio[0]), math.log(aspect_ratio[1])
    for i in range(0, 4 * _BOX_TRIES, 4):
        area = width * height * _between(numbers[i], scale[0], scale[1])
        aspect = math.exp(_between(numbers[i + 1], low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(numbers[i + 2] * (width - w + 1)), int(numbers[i + 3] * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(round(height * aspect_ratio[1]), 1))
    h = min(height, max(round(width / aspect_ratio[0]), 1))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def normalize_pixels(
    pixels: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """Normalize crops for a model: (value / 255 - mean) / std per channel.

    Args:
        pixels: (..., 3, H, W) uint8, on any device; a whole batch at once is cheapest.
        mean: Mean of each channel. Default: that of ImageNet.
        std: Standard deviation of each channel. Default: that of ImageNet.

    Returns:
        (..., 3, H, W) float32 on the same device.

    Raises:
        TypeError: The pixels are not uint8, so they may have been normalized already.
    """
    if pixels.dtype != torch.uint8:
        raise TypeError(f"Pixels of type {pixels.dtype} cannot be normalized. Expected torch.uint8, 0 to 255.")
    shift, scale = torch.tensor([[*mean], [*std]], device=pixels.device).view(2, 3, 1, 1)
    return pixels.float().mul_(1 / (255 * scale)).sub_(shift / scale)


def distort(pixels: np.ndarray, parameters: ViewParameters, *, blur_kernel_size: int = 9) -> np.ndarray:
    """Apply color changes, blur and solarize to one crop, (H, W, 3) uint8, which is already cut and flipped."""
    import cv2

    for operation, amount in parameters.jitter:
        pixels = _ADJUST[operation](pixels, amount)
    if parameters.grayscale:
        pixels = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if parameters.sigma is not None:
        pixels = gaussian_blur(pixels, kernel_size=blur_kernel_size, sigma=parameters.sigma)
    if parameters.solarize:
        pixels = cv2.LUT(pixels, _SOLARIZED)
    return pixels


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize to a square with antialiased bicubic interpolation, equal to Pillow's within one gray level.

    Args:
        pixels: (H, W, C) uint8, one to four channels; four are fastest.
        size: Side of the result in pixels.

    Source: Keys 1981 with a = -0.5, the kernel stretched when shrinking; torch's kernel is from Pillow-SIMD.
    """
    # The copy is needed because torch is slow on slices of a larger image. `view` gives the batch dimension its true
    # stride; with any other, torch uses the code for planar images, which is twice as slow.
    batch = torch.from_numpy(pixels.copy()).view(1, *pixels.shape).permute(0, 3, 1, 2)  # (1, C, H, W)
    resized = F.interpolate(batch, (size, size), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


# The color operations take and return (H, W, 3) uint8, in one pass over the pixels each. They match torchvision's on
# Pillow images within one gray level, and for hue within 0.4 on average (Pillow's 8-bit HSV is the coarser one).


def adjust_brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blend with black: 0 is black, 1 the image."""
    import cv2

    return cv2.convertScaleAbs(pixels, alpha=factor, beta=-_CUT_OFF)


def adjust_contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the image's mean gray: 0 is flat gray, 1 the image."""
    import cv2

    # A table of all 256 levels in Pillow's arithmetic: OpenCV's weighted sum rounds differently on other processors.
    gray = np.float32(_mean_gray(pixels))
    blended = gray + np.float32(factor) * (np.arange(256, dtype=np.float32) - gray)
    return cv2.LUT(pixels, blended.clip(0, 255).astype(np.uint8))


def adjust_saturation(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the gray image: 0 is gray, 1 the image."""
    import cv2

    matrix = np.empty((3, 4), dtype=np.float32)  # the last column is added
    matrix[:, :3] = (1 - factor) * _LUMA + factor * np.eye(3)
    matrix[:, 3] = -_CUT_OFF
    return cv2.transform(pixels, matrix)


def adjust_hue(pixels: np.ndarray, shift: float) -> np.ndarray:
    """Rotate the hue by `shift` of a full circle, in 8-bit HSV."""
    import cv2

    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    turn = np.zeros(hsv.shape[1:], dtype=np.uint8)  # one row of pixels, because adding rows is fastest
    turn[:, 0] = int(shift * 255) % 256
    rows = hsv.reshape(len(hsv), -1)
    np.add(rows, turn.reshape(-1), out=rows)  # uint8 overflow wraps around, as hue does
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def gaussian_blur(pixels: np.ndarray, *, kernel_size: int, sigma: float) -> np.ndarray:
    """Apply a separable Gaussian blur with mirrored border, computed in float32 and rounded once.

    Args:
        pixels: (H, W, 3) uint8.
        kernel_size: Number of taps, odd.
        sigma: Standard deviation in pixels.
    """
    import cv2

    kernel = cv2.getGaussianKernel(kernel_size, sigma, cv2.CV_32F)
    # Mirroring needs more pixels than half the kernel size; smaller crops repeat their edge instead.
    border = cv2.BORDER_REFLECT_101 if min(pixels.shape[:2]) > kernel_size // 2 else cv2.BORDER_REPLICATE
    # OpenCV's 8-bit filter would use 8-bit weights; `convertScaleAbs` only rounds here.
    return cv2.convertScaleAbs(cv2.sepFilter2D(pixels, cv2.CV_32F, kernel, kernel, borderType=border))


_ADJUST = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}
_LUMA = np.array([0.299, 0.587, 0.114])  # of Rec. 601, as Pillow's "L"
_LUMA_16_BITS = (19595, 38470, 7471)  # Pillow's integers for it; they add up to 2^16
# Pillow cuts fractions off where OpenCV rounds: less half a gray level it is the same but for whole numbers, which
# rounding half to even would lose. Float32 resolves the difference at 255.
_CUT_OFF = 0.5 - 2e-5
_SOLARIZED = np.where(np.arange(256) < 128, np.arange(256), 255 - np.arange(256)).astype(np.uint8)


def _mean_gray(pixels: np.ndarray) -> int:
    """Return the mean gray level of (H, W, 3) uint8, rounded half up; exact, hence the same on every processor.

    Source: Pillow's "L" and `ImageEnhance.Contrast`, which also rounds the gray level of each pixel.
    """
    import cv2

    # The sums are whole numbers below 2^53, which float64 holds exactly. `cv2.mean` would multiply by 1 / (H * W).
    sums = (int(value) for value in cv2.sumElems(pixels)[:3])
    weighted = sum(weight * value for weight, value in zip(_LUMA_16_BITS, sums, strict=True))
    whole = pixels.shape[0] * pixels.shape[1] << 16  # the weighted sum of an image in which every value is 1
    return (2 * weighted + whole) // (2 * whole)


def _four_channels(image: Image.Image) -> np.ndarray:
    """Return (H, W, 4) uint8, read-only; Pillow stores RGB with four bytes, so this is faster than three channels."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return np.frombuffer(rgb.tobytes("raw", "RGBX"), dtype=np.uint8).reshape(rgb.height, rgb.width, 4)


def _resized_crop(pixels: np.ndarray, parameters: ViewParameters, size: int) -> np.ndarray:
    """Cut, resize and flip a crop: (H, W, 4) to (size, size, 3) uint8."""
    import cv2

    left, top, right, bottom = parameters.box
    # Cutting first keeps pixels outside the crop out of the filter.
    crop = cv2.cvtColor(resize(pixels[top:bottom, left:right], size), cv2.COLOR_RGBA2RGB)
    return cv2.flip(crop, 1) if parameters.flip else crop


def _stack_planes(crops: Sequence[np.ndarray], size: int) -> Tensor:
    """Stack (H, W, 3) arrays to (n, 3, size, size) uint8."""
    import cv2

    planes = torch.empty(len(crops), 3, size, size, dtype=torch.uint8)
    for crop, target in zip(crops, planes.numpy(), strict=True):
        cv2.split(crop, list(target))  # writes into `target`, five times faster than NumPy's transposed copy
    return planes


def _between(number: float, low: float, high: float) -> float:
    return low + (high - low) * number
