"""Images in, batches of crops and masks out: sources, the evaluation processor, multi-crop, block masks, collation.

Shape letters: B images, G global crops (2), L local crops, S and s side of a global and a local crop in pixels,
N patches of a global crop, M masked patches of the batch. Flattened crops are crop-major: crop 0 of all images first.

Every random draw is a pure function of (seed, epoch, sample id, view), so neither the number of workers nor a stop in
the middle of an epoch changes a single pixel.
"""

import difflib
import importlib.util
import math
import os
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

if TYPE_CHECKING:
    import datasets
    from transformers import BitImageProcessor

Split = Literal["train", "validation"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EMBEDDED_SOURCES = ("photos", "digits")

# Formats that Pillow decodes by itself: EPS would start Ghostscript, PDF and SVG are no pixel formats.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"})
_MAX_PIXELS = 89_478_485  # Pillow's own limit before it warns: a quarter of a GiB of RGB
_SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
}


# --- One image


class BadImageError(ValueError):
    """One image cannot be used: `path` says which, `reason` why."""

    def __init__(self, path: str, reason: str = "unreadable") -> None:
        super().__init__(path, reason)  # both, so that it survives the pickling between a worker and its parent
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"Cannot use image '{self.path}': {self.reason}."


class MissingSplitError(ValueError):
    """The source is there, but it has no part of that name."""


def open_image(source: str | Path | bytes, *, name: str | None = None) -> Image.Image:
    """Decode one image to 8-bit RGB, upright, the same way for training, evaluation and serving.

    EXIF orientation is applied; transparency is composited on white; 16-bit grey is scaled by its depth; CMYK, grey,
    palette and 1-bit images are converted; of an animation the first frame counts. A flipped bit inside JPEG data
    decodes without complaint everywhere and is not detected.

    Args:
        source: A path, or the bytes of an encoded file.
        name: What an error calls the image; default the path.

    Raises:
        BadImageError: Missing, empty, truncated, not an image, more than 89 million pixels (checked before decoding),
            or of a depth without a defined range (float, 32-bit integers).
    """
    name = name or (f"{len(source)} bytes in memory" if isinstance(source, bytes) else str(source))
    try:
        # Read first: one open file at most, and the first bytes are at hand if Pillow does not know them.
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise BadImageError(name, f"{error.strerror or error}") from error
    try:
        with Image.open(BytesIO(data), formats=_known_formats()) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise BadImageError(name, f"{image.width}x{image.height} pixels are more than {_MAX_PIXELS}")
            image.load()
            is_png = image.format == "PNG"  # the upright copy no longer knows
            return _to_rgb(ImageOps.exif_transpose(image), name, is_png=is_png)
    except Image.UnidentifiedImageError as error:
        raise BadImageError(name, _describe_unknown(data)) from error
    except BadImageError:
        raise
    # What Pillow's decoders raise on broken files: PNG alone knows SyntaxError, struct.error, zlib.error, ValueError.
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise BadImageError(name, f"{type(error).__name__}: {error}".rstrip(".")) from error


@cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # not every build of Pillow reads AVIF


def _describe_unknown(data: bytes) -> str:
    if not data:
        return "the file is empty"
    head = data[:256].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        return "it looks like HTML, XML or SVG (a failed download?), expected a pixel image"
    return f"no supported image format ({', '.join(_known_formats())}); the first bytes are {data[:8]!r}"


def _to_rgb(image: Image.Image, name: str, *, is_png: bool) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and is_png):
        values = np.asarray(image).astype(np.uint32)  # Pillow's own conversion clips at 255: a white picture
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImageError(name, f"mode {image.mode} has no defined range of values; save it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


# --- Sources


@dataclass(frozen=True)
class ImageRecord:
    """One image of a source: RGB picture, class index or None, and an id unique within the source."""

    image: Image.Image
    label: int | None
    id: str


@dataclass(frozen=True)
class ImageSource:
    """Images by index, decoded when asked for. `labels` and `label_names` are None where there are no classes."""

    name: str
    ids: Sequence[str]
    read: Callable[[int], Image.Image]
    labels: Sequence[int] | None = None
    label_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> ImageRecord:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Image {index} of '{self.name}', which has {len(self)}.")
        index %= len(self)
        label = None if self.labels is None else self.labels[index]
        return ImageRecord(image=self.read(index), label=label, id=self.ids[index])

    def subset(self, indices: Sequence[int]) -> "ImageSource":
        """The images at `indices`, in that order, with the same label names."""
        indices = [int(i) for i in indices]
        return ImageSource(
            name=self.name,
            ids=[self.ids[i] for i in indices],
            read=partial(_read_at, self.read, indices),
            labels=None if self.labels is None else [self.labels[i] for i in indices],
            label_names=self.label_names,
        )


def load_images(
    data: str | Path,
    *,
    split: Split | None = "train",
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageSource:
    """Open a source of images.

    - `photos`: tiles of 64 px from the 21 photographs inside scikit-image and scikit-learn; 2,214 training tiles from
      the left 70 % of each, 719 held-out tiles from the rest, no pixel in both. The label is the photograph.
    - `digits`: scikit-learn's 1,797 handwritten digits at 32 px, split 80 : 20 within each class, always the same way.
    - a folder of images, nested at any depth. If every image lies in a sub-folder, the outermost sub-folders are the
      classes. `train/` and `validation/` (also `val`, `valid`, `dev`) are honoured; without them all is training data.
    - a parquet file, or a folder of them, told apart by `train` and `validation` in file or folder names.
    - the id of a data set on the Hub.

    Args:
        data: One of the above. A path wins over a Hub id.
        split: `"train"`, `"validation"`, or None for everything.
        image_column: Column of a parquet file or Hub data set; default: the only image column, or `image`.
        label_column: Integer or ClassLabel column; default `label` where it is one.

    Raises:
        FileNotFoundError: No such path (the nearest existing parent is named), or no such data set.
        MissingSplitError: No such part; a ValueError.
        ValueError: Nothing usable there or no such column; says what was looked for and found.
    """
    if split not in (None, "train", "validation"):
        raise ValueError(f"split={split!r} is unknown. Use 'train', 'validation' or None (all images).")
    if data == "photos":
        return _photo_tiles(split)
    if data == "digits":
        return _digits(split)
    path = Path(data).expanduser()
    if path.is_dir():
        files = _walk(path)
        parquet = [file for file in files if file.suffix.lower() == ".parquet"]
        if parquet and not any(file.suffix.lower() in _SUFFIXES for file in files):
            parquet = _select_split(path, parquet, split)
            return _parquet(path, parquet, image_column=image_column, label_column=label_column)
        return _image_folder(path, files, split)
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise ValueError(f"'{data}' is a file of type '{path.suffix}'. Give a parquet file or a folder of images.")
        if split == "validation":
            raise MissingSplitError(
                f"'{data}' is one file and has no validation part. Give the folder, or split=None."
            )
        return _parquet(path, [path], image_column=image_column, label_column=label_column)
    parent = next(p for p in path.absolute().parents if p.is_dir())
    missing = f"'{data}' does not exist; the nearest existing folder is '{parent}'."
    if not re.fullmatch(r"[\w][\w.-]*(/[\w.-]+)?", str(data)) or (os.sep in str(data) and path.parent.is_dir()):
        raise FileNotFoundError(missing)
    if near := difflib.get_close_matches(str(data), EMBEDDED_SOURCES, n=1):
        missing += f" Did you mean '{near[0]}'?"
    return _hub(str(data), split, missing=missing, image_column=image_column, label_column=label_column)


def stratified_split(labels: Sequence[int], *, held_out_share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of a training and a held-out part with the same mix of classes, at least one of each class in both.

    Args:
        labels: Class index of each image.
        held_out_share: In (0, 1), rounded within each class. The only image of a class is for training.
        seed: Of the draw.
    """
    rng = np.random.default_rng(seed)
    values, held = np.asarray(labels), []
    for label in np.unique(values):
        members = rng.permutation(np.flatnonzero(values == label))
        count = min(max(round(len(members) * held_out_share), 1), len(members) - 1)
        held.extend(members[:count].tolist())
    held_out = set(held)
    return [i for i in range(len(values)) if i not in held_out], sorted(held_out)


def _read_at(read: Callable[[int], Image.Image], indices: list[int], index: int) -> Image.Image:
    return read(indices[index])


# Pictures that ship inside the two wheels. `skimage.data` might download others; these files are read directly.
_PHOTOGRAPHS = {
    "astronaut": "skimage/data/astronaut.png",
    "brick": "skimage/data/brick.png",
    "camera": "skimage/data/camera.png",
    "cell": "skimage/data/cell.png",
    "chelsea": "skimage/data/chelsea.png",
    "coffee": "skimage/data/coffee.png",
    "coins": "skimage/data/coins.png",
    "grass": "skimage/data/grass.png",
    "gravel": "skimage/data/gravel.png",
    "horse": "skimage/data/horse.png",
    "hubble": "skimage/data/hubble_deep_field.jpg",
    "ihc": "skimage/data/ihc.png",
    "moon": "skimage/data/moon.png",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "page": "skimage/data/page.png",
    "retina": "skimage/data/retina.jpg",
    "rocket": "skimage/data/rocket.jpg",
    "text": "skimage/data/text.png",
    "clock": "skimage/data/clock_motion.png",
    "china": "sklearn/datasets/images/china.jpg",
    "flower": "sklearn/datasets/images/flower.jpg",
}


def photographs() -> dict[str, Image.Image]:
    """The 21 whole photographs behind `photos`, RGB at their own size, by name. Needs no network.

    Raises:
        ImportError: scikit-image or scikit-learn is missing.
        BadImageError: An installed version no longer ships one of the files.
    """
    roots = {}
    for package in ("skimage", "sklearn"):
        spec = importlib.util.find_spec(package)  # finds the folder without the seconds that the import would take
        if spec is None or not spec.submodule_search_locations:
            raise ImportError("The photographs lie inside two packages. Run: pip install scikit-image scikit-learn")
        roots[package] = Path(spec.submodule_search_locations[0]).parent
    return {name: open_image(roots[file.split("/")[0]] / file) for name, file in _PHOTOGRAPHS.items()}


@cache
def _photographs_384() -> dict[str, Image.Image]:
    resized = {}
    for name, image in photographs().items():
        scale = 384 / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        resized[name] = image.resize(size, Image.Resampling.BICUBIC)
    return resized


def _photo_tiles(split: Split | None, *, tile: int = 64, stride: int = 32, train_share: float = 0.7) -> ImageSource:
    ids, boxes, labels = [], [], []
    photos = _photographs_384()
    for label, (name, image) in enumerate(photos.items()):
        border = train_share * image.width
        for top in range(0, image.height - tile + 1, stride):
            for left in range(0, image.width - tile + 1, stride):
                # A tile across the border belongs to neither part: both would see its pixels.
                part = "train" if left + tile <= border else "validation" if left >= border else None
                if part is not None and split in (None, part):
                    ids.append(f"{name}/{part}/{top:03d}_{left:03d}")
                    boxes.append((label, (left, top, left + tile, top + tile)))
                    labels.append(label)
    read = partial(_read_tile, tuple(photos.values()), boxes)
    return ImageSource(name="photos", ids=ids, read=read, labels=labels, label_names=tuple(photos))


def _read_tile(photos: tuple[Image.Image, ...], boxes: list[tuple[int, tuple]], index: int) -> Image.Image:
    photo, box = boxes[index]
    return photos[photo].crop(box)


def _digits(split: Split | None, *, size: int = 32) -> ImageSource:
    from sklearn.datasets import load_digits

    scans = load_digits()
    # 17 grey levels of 8 x 8 cells.
    pixels = np.rint(scans.images * (255 / 16)).astype(np.uint8)
    names = tuple(str(digit) for digit in range(10))
    labels = scans.target.tolist()
    ids = [f"digit/{i:04d}" for i in range(len(labels))]
    source = ImageSource(
        name="digits", ids=ids, read=partial(_read_digit, pixels, size), labels=labels, label_names=names
    )
    if split is None:
        return source
    train, held_out = stratified_split(labels, held_out_share=0.2, seed=0)
    return source.subset(train if split == "train" else held_out)


def _read_digit(pixels: np.ndarray, size: int, index: int) -> Image.Image:
    return Image.fromarray(pixels[index]).resize((size, size), Image.Resampling.BICUBIC).convert("RGB")


def _walk(root: Path) -> list[Path]:
    """All files below `root` in a fixed order. Links are followed, each folder once (loops), hidden names left out."""
    files: list[Path] = []
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        status = os.stat(folder)  # noqa: PTH116 - os.walk deals in strings, and bytes that are no UTF-8 stay intact
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files.extend(Path(folder, name) for name in names if not name.startswith("."))
    return sorted(files)


def _split_of(file: Path, root: Path) -> Split | None:
    """Which part a file belongs to, by its outermost folder or, for parquet, by how its name begins."""
    parts = file.relative_to(root).parts
    for split, folders in _SPLIT_FOLDERS.items():
        if len(parts) > 1 and parts[0].lower() in folders:
            return split
        if file.suffix.lower() == ".parquet" and re.match(rf"({'|'.join(folders)})(?![a-z])", file.stem.lower()):
            return split
    return None


def _part(root: Path, files: list[Path], split: Split | None) -> list[Path]:
    """The files of one part, perhaps none. Without a training part of its own, training is all that is in no part."""
    parts = [_split_of(file, root) for file in files]
    wanted = None if split == "train" and "train" not in parts else split
    return [file for file, part in zip(files, parts) if split is None or part == wanted]


def _select_split(root: Path, files: list[Path], split: Split | None) -> list[Path]:
    selected = _part(root, files, split)
    if split is not None and not selected:
        looked = "', '".join(_SPLIT_FOLDERS[split])
        raise MissingSplitError(
            f"'{root}' has no {split} part: looked for '{looked}' among {_outermost(root, files)}. "
            "Add such a sub-folder, or use split=None for all images."
        )
    return selected


def _outermost(root: Path, files: Sequence[Path], limit: int = 8) -> str:
    names = sorted({file.relative_to(root).parts[0] for file in files})
    return ", ".join(repr(name) for name in names[:limit]) + (
        f" and {len(names) - limit} more" if len(names) > limit else ""
    )


def _image_folder(root: Path, files: list[Path], split: Split | None) -> ImageSource:
    images = [file for file in files if file.suffix.lower() in _SUFFIXES]
    if not images:
        found = f"{len(files)} other files ({_outermost(root, files)})" if files else "nothing"
        raise ValueError(
            f"No images in '{root}' or below. Looked for {' '.join(sorted(_SUFFIXES))} and .parquet; found {found}."
        )
    selected = _select_split(root, images, split)
    classes = [_class_of(file, root) for file in selected]
    # Both parts must number the classes alike, so the training part gives the list wherever there is one.
    known = {_class_of(file, root) for file in _part(root, images, "train")} if split else set(classes)
    known = known or set(classes)
    names, labels = None, None
    if "" not in known and "" not in classes:
        if extra := sorted(set(classes) - known):
            raise ValueError(
                f"'{root}' has classes only in its {split} part: {extra[:8]}. Move them, or add training images."
            )
        names = tuple(sorted(known))
        position = {name: i for i, name in enumerate(names)}
        labels = [position[name] for name in classes]
    ids = [file.relative_to(root).as_posix() for file in selected]
    return ImageSource(name=str(root), ids=ids, read=partial(_read_file, root, ids), labels=labels, label_names=names)


def _class_of(file: Path, root: Path) -> str:
    """The outermost folder below `root` or its split folder; empty for a file that lies in none."""
    parts = file.relative_to(root).parts
    parts = parts[1:] if _split_of(file, root) else parts
    return parts[0] if len(parts) > 1 else ""


def _read_file(root: Path, ids: list[str], index: int) -> Image.Image:
    return open_image(root / ids[index])


def _parquet(root: Path, files: list[Path], *, image_column: str | None, label_column: str | None) -> ImageSource:
    from datasets import load_dataset

    # `datasets` maps an Arrow copy from its cache folder, so that files larger than memory work.
    table = load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    return _columns(table, str(root), image_column=image_column, label_column=label_column)


def _hub(
    data: str, split: Split | None, *, missing: str, image_column: str | None, label_column: str | None
) -> ImageSource:
    from datasets import concatenate_datasets, load_dataset

    try:
        table = load_dataset(data, split=split)
    except (FileNotFoundError, ConnectionError) as error:  # DatasetNotFoundError is the former, offline the latter
        raise FileNotFoundError(
            f"{missing} As a data set on the Hub it could not be loaded either: {error}"
        ) from error
    table = concatenate_datasets(list(table.values())) if split is None else table
    return _columns(table, data, image_column=image_column, label_column=label_column)


def _columns(
    table: "datasets.Dataset", name: str, *, image_column: str | None, label_column: str | None
) -> ImageSource:
    """A source from a table: encoded images are decoded by `open_image`, as everywhere."""
    from datasets import ClassLabel, Value
    from datasets import Image as ImageFeature

    features = table.features
    candidates = [
        column
        for column, feature in features.items()
        if isinstance(feature, ImageFeature) or (isinstance(feature, Value) and feature.dtype.endswith("binary"))
    ]
    column = image_column or ("image" if "image" in candidates else candidates[0] if len(candidates) == 1 else None)
    if column is None or column not in candidates:
        raise ValueError(
            f"'{name}': {'no image column' if column is None else f'column {column!r} holds no images'}. "
            f"Columns: {', '.join(features)}; with images: {', '.join(candidates) or 'none'}. Set image_column."
        )
    labels = names = None
    # A column of text called "label" is no reason to refuse a set that may be meant for pretraining.
    integers = [
        column
        for column, feature in features.items()
        if isinstance(feature, ClassLabel) or (isinstance(feature, Value) and "int" in feature.dtype)
    ]
    if label_column is not None and label_column not in integers:
        raise ValueError(
            f"'{name}': label column {label_column!r} is {features.get(label_column)}; with integers or ClassLabel: "
            f"{', '.join(integers) or 'there are none'}. Columns: {', '.join(features)}. Set label_column."
        )
    label_column = label_column or ("label" if "label" in integers else None)
    if label_column is not None:
        feature = features[label_column]
        labels = [-1 if value is None else value for value in table[label_column]]
        # The Hub marks unlabelled rows (most test splits) with -1.
        labels = labels if min(labels, default=-1) >= 0 else None
        if labels is not None:
            is_named = isinstance(feature, ClassLabel)
            names = tuple(feature.names) if is_named else tuple(str(i) for i in range(max(labels) + 1))
    if isinstance(features[column], ImageFeature):
        table = table.cast_column(column, ImageFeature(decode=False))
    ids = [f"row/{i}" for i in range(len(table))]
    return ImageSource(name, ids, partial(_read_row, table.select_columns([column]), column, name), labels, names)


def _read_row(table: "datasets.Dataset", column: str, name: str, index: int) -> Image.Image:
    cell: Any = table[index][column]
    where = f"{name}, row {index}"
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell["bytes"] is not None else cell["path"]
    if cell is None:
        raise BadImageError(where, "the cell is empty")
    return open_image(cell, name=where)


# --- Evaluation: the stock processor of the library, which every checkpoint carries


def default_image_processor(image_size: int | tuple[int, int], *, resize: int | None = None) -> "BitImageProcessor":
    """The processor saved with checkpoints: shortest edge, centre crop, bicubic, ImageNet statistics.

    It is a stock class, so a checkpoint needs neither this package nor remote code for it. All values are written out:
    the class defaults are those of CLIP.

    Args:
        image_size: Side of the crop in pixels, or (height, width).
        resize: Shortest edge before the crop, pixels. Default 256/224 of the (longer) crop side, the protocol of
            DINOv2's evaluation.
    """
    from transformers import BitImageProcessor

    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return BitImageProcessor(
        do_resize=True,
        size={"shortest_edge": round(max(height, width) * 256 / 224) if resize is None else resize},
        resample=Image.Resampling.BICUBIC,
        do_center_crop=True,
        crop_size={"height": height, "width": width},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
        do_convert_rgb=True,
    )


# --- Multi-crop

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


# --- Data set, sampler, masks, collator


class MultiCropDataset(Dataset[dict[str, Any]]):
    """Crops of the images of a source, indexed by `(epoch, index)` as `EpochSampler` yields them.

    Each item: `global_crops` (2, 3, S, S) and `local_crops` (L, 3, s, s) float32, `sample_id` and `epoch` int.

    Args:
        source: The images.
        multi_crop: The augmentation.
        seed: Of the run.
        cache_bytes: Decoded pictures kept in memory, per process. Small sources fit, large ones decode again.
    """

    def __init__(
        self, source: ImageSource, multi_crop: MultiCrop, *, seed: int, cache_bytes: int = 256 * 2**20
    ) -> None:
        self.source, self.multi_crop, self.seed, self.cache_bytes = source, multi_crop, seed, cache_bytes
        self._cache: dict[int, Image.Image] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        if not isinstance(key, tuple):
            raise TypeError(f"MultiCropDataset[{key!r}]: expected (epoch, index). Use EpochSampler as the sampler.")
        import cv2

        if torch.utils.data.get_worker_info() is not None and cv2.getNumThreads() > 1:
            cv2.setNumThreads(1)  # one worker is one core; OpenCV's pool would fight with the other workers
        epoch, index = key
        crops = self.multi_crop(self._image(index), seed=self.seed, epoch=epoch, sample_id=index)
        return {**crops, "sample_id": index, "epoch": epoch}

    def _image(self, index: int) -> Image.Image:
        image = self._cache.get(index)
        if image is None:
            image = self.source[index].image
            size = 4 * image.width * image.height  # Pillow stores RGB in four bytes
            if self._cached_bytes + size <= self.cache_bytes:
                self._cache[index] = image
                self._cached_bytes += size
        return image


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields `(epoch, index)` in an order that depends on the seed and the epoch alone.

    Args:
        num_samples: Images in the data set.
        seed: Of the run.
    """

    def __init__(self, num_samples: int, *, seed: int) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples}: there is nothing to sample from.")
        self.num_samples, self.seed, self.epoch = num_samples, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; Trainer and accelerate call it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        for index in np.random.default_rng([self.seed, epoch]).permutation(self.num_samples):
            yield epoch, int(index)


def block_mask(
    grid: tuple[int, int],
    num_masked: int,
    rng: random.Random,
    *,
    min_patches: int = 4,
    max_patches: int | None = None,
    min_aspect: float = 0.3,
) -> np.ndarray:
    """Mask a patch grid with random rectangles until `num_masked` patches are hidden, or a few less.

    Args:
        grid: (rows, columns) of patches.
        num_masked: Patches to hide. The result never has more, and usually 0 to 2 less: ten failed tries end it.
        rng: Source of the draws.
        min_patches: Smallest area a rectangle is drawn for, patches.
        max_patches: Most patches that one rectangle may add; default half of the grid as dinov2 computes it.
        min_aspect: Smallest height / width of a rectangle; the largest is its inverse.

    Returns:
        (rows, columns) bool, True = hidden from the student.

    Source: arXiv 2106.08254 (BEiT); dinov2 `data/masking.py` for the order of the draws.
    """
    rows, columns = grid
    max_patches = (rows // 2) * columns if max_patches is None else max_patches
    log_aspect = (math.log(min_aspect), math.log(1 / min_aspect))
    mask = np.zeros(grid, dtype=bool)
    count = 0
    while count < num_masked:
        cap = min(num_masked - count, max_patches)
        for _ in range(10):
            area = rng.uniform(min_patches, cap)
            aspect = math.exp(rng.uniform(*log_aspect))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
            block = mask[top : top + height, left : left + width]
            added = height * width - int(np.count_nonzero(block))
            if 0 < added <= cap:
                block[:] = True
                count += added
                break
        else:
            break
    return mask


def batch_masks(
    grid: tuple[int, int],
    num_crops: int,
    rng: random.Random,
    *,
    mask_ratio: Sequence[float] = (0.1, 0.5),
    mask_probability: float = 0.5,
) -> np.ndarray:
    """Masks for all global crops of a batch, (num_crops, rows, columns) bool.

    `int(num_crops * mask_probability)` crops get a mask. The range of ratios is cut into as many equal strips, one per
    masked crop, so the total over the batch hardly varies; then all masks are shuffled over the crops.

    Source: arXiv 2304.07193; dinov2 `data/collate.py` for the order of the draws.
    """
    num_masked_crops = int(num_crops * mask_probability)
    edges = np.linspace(mask_ratio[0], mask_ratio[1], num_masked_crops + 1).tolist()
    num_patches = grid[0] * grid[1]
    masks = [block_mask(grid, int(num_patches * rng.uniform(*strip)), rng) for strip in pairwise(edges)]
    masks += [np.zeros(grid, dtype=bool)] * (num_crops - num_masked_crops)
    rng.shuffle(masks)
    return np.stack(masks)


def masked_positions(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Where the masked patches are, and how much each counts.

    Args:
        masks: (..., N) bool, one row per crop.

    Returns:
        `mask_indices` (M,) int64 into the flattened masks, and `mask_weights` (M,) float32: one divided by the number
        of masked patches of the same crop, so that every masked crop counts alike.
    """
    rows = masks.flatten(0, -2)  # (crops, N)
    weights = (1.0 / rows.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(rows)
    return rows.flatten().nonzero().flatten(), weights[rows]


@dataclass(frozen=True)
class DinoCollator:
    """Stacks the items of `MultiCropDataset` crop-major and draws the masks of the global crops.

    Call it with a list of B items. The batch has `global_crops` (2, B, 3, S, S), `local_crops` (L, B, 3, s, s),
    `masks` (2, B, N) bool, `mask_indices` (M,) int64 into the flattened masks, `mask_weights` (M,) float32. The masks
    depend on the seed, the epoch and the ids of the items only.

    Args:
        grid: (rows, columns) of patches of a global crop.
        mask_ratio: Smallest and largest share of patches hidden in a masked crop.
        mask_probability: Share of global crops that are masked.
        seed: Of the run.
    """

    grid: tuple[int, int]
    mask_ratio: Sequence[float] = (0.1, 0.5)
    mask_probability: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.mask_ratio
        if not 0 <= low <= high <= 1 or not 0 <= self.mask_probability <= 1:
            raise ValueError(
                f"mask_ratio=({low}, {high}) must be in order within [0, 1], and mask_probability="
                f"{self.mask_probability} within [0, 1]."
            )

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate B items into one batch."""
        global_crops = torch.stack([sample["global_crops"] for sample in samples], dim=1)  # (2, B, 3, S, S)
        local_crops = torch.stack([sample["local_crops"] for sample in samples], dim=1)  # (L, B, 3, s, s)
        num_crops, batch_size = global_crops.shape[:2]
        entropy = [self.seed, samples[0]["epoch"], *(sample["sample_id"] for sample in samples)]
        rng = random.Random(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
        drawn = batch_masks(
            self.grid,
            num_crops * batch_size,
            rng,
            mask_ratio=self.mask_ratio,
            mask_probability=self.mask_probability,
        )
        masks = torch.from_numpy(drawn).view(num_crops, batch_size, -1)  # (2, B, N)
        mask_indices, mask_weights = masked_positions(masks)
        return {
            "global_crops": global_crops,
            "local_crops": local_crops,
            "masks": masks,
            "mask_indices": mask_indices,
            "mask_weights": mask_weights,
        }
