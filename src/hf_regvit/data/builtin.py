"""The built-in image sets, made from images that ship inside scikit-image and scikit-learn."""

import importlib.util
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from .decoding import open_image
from .files import stratified_split
from .source import ImageSource, Split

# Images that are part of the two wheels. They are read directly, because `skimage.data` may download files.
_FILES = (
    *(f"skimage/data/{name}" for name in (
        "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
        "gravel.png", "horse.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png",
        "retina.jpg", "rocket.jpg", "text.png", "clock_motion.png",
    )),
    "sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg",
)  # fmt: skip
_TILE, _STRIDE = 64, 32  # pixels
_BUILTIN_IMAGES = {Path(file).stem.split("_")[0]: file for file in _FILES}


def builtin_images() -> dict[str, Image.Image]:
    """Return the 21 full images behind `photos` by name, RGB at their original size. No network is needed.

    Raises:
        ImportError: scikit-image is not installed.
        BadImageError: An installed version does not include one of the files.
    """
    roots = {}
    for package in ("skimage", "sklearn"):
        spec = importlib.util.find_spec(package)  # avoids the import, which takes seconds
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(
                "The built-in images ('photos') are part of scikit-image. Run: pip install 'hf_regvit[samples]'"
            )
        roots[package] = Path(spec.submodule_search_locations[0]).parent
    return {name: open_image(roots[file.split("/")[0]] / file) for name, file in _BUILTIN_IMAGES.items()}


@cache
def _builtin_images_384() -> dict[str, Image.Image]:
    resized = {}
    for name, image in builtin_images().items():
        scale = 384 / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        resized[name] = image.resize(size, Image.Resampling.BICUBIC)
    return resized


def builtin_source(name: str, split: Split | None) -> ImageSource:
    """Open `photos` or `digits`."""
    return _image_tiles(split) if name == "photos" else _digits(split)


def _image_tiles(split: Split | None) -> ImageSource:
    ids, boxes, labels = [], [], []
    photos = _builtin_images_384()
    for label, (name, image) in enumerate(photos.items()):
        border = 0.7 * image.width
        for top in range(0, image.height - _TILE + 1, _STRIDE):
            for left in range(0, image.width - _TILE + 1, _STRIDE):
                # A tile that crosses the border is in neither split, so that no pixel is in both.
                part = "train" if left + _TILE <= border else "validation" if left >= border else None
                if part is not None and split in (None, part):
                    ids.append(f"{name}/{part}/{top:03d}_{left:03d}")
                    boxes.append((label, (left, top, left + _TILE, top + _TILE)))
                    labels.append(label)
    read = partial(_read_tile, tuple(photos.values()), boxes)
    return ImageSource(name="photos", ids=ids, read=read, labels=labels, label_names=tuple(photos))


def _read_tile(photos: tuple[Image.Image, ...], boxes: list[tuple[int, tuple]], index: int) -> Image.Image:
    photo, box = boxes[index]
    return photos[photo].crop(box)


def _digits(split: Split | None) -> ImageSource:
    from sklearn.datasets import load_digits

    scans = load_digits()
    # 8 x 8 pixels with 17 gray levels, 0 to 16.
    pixels = np.rint(scans.images * (255 / 16)).astype(np.uint8)
    names = tuple(str(digit) for digit in range(10))
    labels = scans.target.tolist()
    ids = [f"digit/{i:04d}" for i in range(len(labels))]
    source = ImageSource(name="digits", ids=ids, read=partial(_read_digit, pixels), labels=labels, label_names=names)
    if split is None:
        return source
    train, held_out = stratified_split(labels, held_out_share=0.2, seed=0)
    return source.subset(train if split == "train" else held_out)


def _read_digit(pixels: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(pixels[index]).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
