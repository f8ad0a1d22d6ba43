"""Images in: one guarded way to open a picture, and every source of pictures behind one `load_images`."""

import difflib
import importlib.util
import os
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, ImageOps

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


def open_image(source: str | Path | bytes | Image.Image, *, name: str | None = None) -> Image.Image:
    """Decode one image to 8-bit RGB, upright, the same way for training, evaluation and serving.

    EXIF orientation is applied; transparency is composited on white; 16-bit grey is scaled by its depth; CMYK, grey,
    palette and 1-bit images are converted; of an animation the first frame counts. A flipped bit inside JPEG data
    decodes without complaint everywhere and is not detected.

    Args:
        source: A path, the bytes of an encoded file, or a Pillow image (which stays as it is).
        name: What an error calls the image; default the path.

    Raises:
        BadImageError: Missing, empty, truncated, not an image, more than 89 million pixels (checked before decoding),
            or of a depth without a defined range (float, 32-bit integers).
    """
    data = b""
    if not isinstance(source, Image.Image):
        name = name or (f"{len(source)} bytes in memory" if isinstance(source, bytes) else str(source))
        try:
            # Read first: one open file at most, and the first bytes are at hand if Pillow does not know them.
            data = source if isinstance(source, bytes) else Path(source).read_bytes()
        except OSError as error:
            raise BadImageError(name, f"{error.strerror or error}") from error
    name = name or "image in memory"
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source, name)
        with Image.open(BytesIO(data), formats=_known_formats()) as image:
            return _upright_rgb(image, name)
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


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.width * image.height > _MAX_PIXELS:
        raise BadImageError(name, f"{image.width}x{image.height} pixels are more than {_MAX_PIXELS}")
    image.load()
    is_png = image.format == "PNG"  # the upright copy no longer knows
    return _to_rgb(ImageOps.exif_transpose(image), name, is_png=is_png)


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
    """Images by index, decoded when asked for. `labels` and `label_names` are None where there are no classes.

    `table` holds the other columns of a parquet file or Hub data set (boxes, masks), row by row as the images.
    """

    name: str
    ids: Sequence[str]
    read: Callable[[int], Image.Image]
    labels: Sequence[int] | None = None
    label_names: tuple[str, ...] | None = None
    table: "datasets.Dataset | None" = None

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
            table=None if self.table is None else self.table.select(indices),
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
    return table_images(table, str(root), image_column=image_column, label_column=label_column)


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
    return table_images(table, data, image_column=image_column, label_column=label_column)


def table_images(
    table: "datasets.Dataset", name: str, *, image_column: str | None, label_column: str | None
) -> ImageSource:
    """A source from a `datasets` table: encoded images are decoded by `open_image`, as everywhere."""
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
    read = partial(_read_row, table.select_columns([column]), column, name)
    others = table.remove_columns([column])
    return ImageSource(name, ids, read, labels, names, others if others.column_names else None)


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
