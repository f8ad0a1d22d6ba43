"""Image sources: folders, parquet and tar files, Hub data sets and built-in sets behind one `load_images`."""

import difflib
import importlib.util
import logging
import os
import re
import tarfile
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from .image_guard import BadImageError, ImageLimits, open_image, read_bytes, say_once

if TYPE_CHECKING:
    import datasets
    from transformers import BitImageProcessor

logger = logging.getLogger(__name__)

Split = Literal["train", "validation"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EMBEDDED_SOURCES = ("photos", "digits")

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"})
# Image formats that this package does not decode; files of these types are left out with a warning, not silently.
_OTHER_PICTURES = frozenset({".heic", ".heif", ".jxl", ".jp2", ".svg", ".eps", ".pdf", ".psd", ".dng", ".cr2", ".nef"})
_PART_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


class MissingSplitError(ValueError):
    """The source exists, but it does not have the requested split."""


@dataclass(frozen=True)
class ImageRecord:
    """Image of a source with its metadata: RGB image, class id or None, and an id unique within the source."""

    image: Image.Image
    label: int | None
    id: str


@dataclass(frozen=True)
class ImageSource:
    """Images by index, decoded on access. `labels` and `label_names` are None if the source has no classes.

    `table` holds the other columns of a parquet file or Hub data set (boxes, masks), in the same row order as the
    images. `encoded` returns the stored bytes of an image; it is None if the images are generated. `parts` are the
    sizes of the sources that were joined into this one, in order. `problems` describes what could not be listed:
    unreadable folders, truncated shards.
    """

    name: str
    ids: Sequence[str]
    read: Callable[[int], Image.Image]
    labels: Sequence[int] | None = None
    label_names: tuple[str, ...] | None = None
    table: "datasets.Dataset | None" = None
    encoded: Callable[[int], bytes] | None = None
    parts: tuple[int, ...] = ()
    problems: tuple[BadImageError, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> ImageRecord:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Image index {index} is out of range: '{self.name}' has {len(self)} images.")
        index %= len(self)
        label = None if self.labels is None else self.labels[index]
        return ImageRecord(image=self.read(index), label=label, id=self.ids[index])

    def subset(self, indices: Sequence[int]) -> "ImageSource":
        """Return the images at `indices`, in that order, with the same label names."""
        indices = [int(i) for i in indices]
        return replace(
            self,
            ids=[self.ids[i] for i in indices],
            read=partial(_read_at, self.read, indices),
            labels=None if self.labels is None else [self.labels[i] for i in indices],
            table=None if self.table is None else self.table.select(indices),
            encoded=None if self.encoded is None else partial(_read_at, self.encoded, indices),
            parts=(),
        )


Data = str | Path | Sequence[str | Path]


def load_images(
    data: Data,
    *,
    split: Split | None = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    limits: ImageLimits | None = None,
    ignore_extra_classes: bool = False,
) -> ImageSource:
    """Open one image source, or several as one.

    - `photos`: 64-pixel tiles of the 21 images bundled with scikit-image and scikit-learn. The left 70 % of each image
      gives 2,214 training tiles and the rest 719 held-out tiles; no pixel is in both splits. The label is the image
      that a tile comes from.
    - `digits`: scikit-learn's 1,797 handwritten digits at 32 px, with a fixed 80:20 split within each class.
    - A folder of images, nested at any depth. If every image is in a subfolder, the outermost subfolders are the
      classes. `train/` and `validation/` (also `val`, `valid`, `dev`) are used as splits; without them, all images are
      training images. Next to `train/`, a folder `test/` is used as the held-out split only if there is no other one.
    - A parquet file, or a folder of them; splits are recognized by the same words in file or folder names.
    - A tar file in WebDataset format (`000017.jpg`, `000017.cls`), or a folder of them, with splits as for parquet. An
      index of byte positions is built when the files are opened, for random access; nothing is unpacked.
    - A pattern of such files: `shards/train-*.tar`.
    - The id of a Hub data set whose splits use the same names; `owner/name:config` if it has several configurations.

    Several sources are concatenated: `["a", "b"]` has the images of `a`, then those of `b`, with the source's name as
    a prefix of each id. Labels are kept if all sources have the same classes.

    Args:
        data: One of the above, or a sequence of them. An existing path takes precedence over a Hub id.
        split: `"train"`, `"validation"`, or None for all images.
        image_column: Image column of a parquet file or Hub data set. Default: the only image column, or `image`.
        label_column: Integer or ClassLabel column. Default: `label`, if it has one of these types.
        limits: Limits that images must satisfy when they are read. Default: `ImageLimits()`.
        ignore_extra_classes: Whether to leave out, with a warning, the held-out images of a folder whose class has no
            training images, instead of raising an error.

    Raises:
        FileNotFoundError: The path (the nearest existing parent is named) or the Hub data set does not exist.
        MissingSplitError: The source does not have the split; a ValueError.
        ValueError: The source has no usable images, or the column does not exist; the message lists what was found.
    """
    if split not in (None, "train", "validation"):
        raise ValueError(f"Unknown split={split!r}. Use 'train', 'validation' or None (all images).")
    load = partial(
        _load_one,
        split=split,
        image_column=image_column,
        label_column=label_column,
        limits=limits or ImageLimits(),
        ignore_extra_classes=ignore_extra_classes,
    )
    if isinstance(data, str | Path):
        return load(data)
    if len(data) != len(set(map(str, data))) or not data:
        raise ValueError(
            f"data={list(map(str, data))} is empty or has duplicates. Give one or more sources, each once."
        )
    sources, missing = [], []
    for one in data:
        try:
            sources.append(load(one))
        except MissingSplitError as error:  # not every source needs held-out images
            if split == "train":
                raise
            missing.append(error)
    if not sources:
        raise MissingSplitError(" ".join(map(str, missing)))
    return sources[0] if len(data) == 1 else join_sources(sources)


def join_sources(sources: Sequence[ImageSource]) -> ImageSource:
    """Concatenate several sources.

    Each id is prefixed with the name of its source. Labels are kept if every source has the same label names in the
    same order; otherwise a class id would be ambiguous, so the result has no labels.
    """
    names = sources[0].label_names
    same = names is not None and all(source.label_names == names for source in sources)
    if not same and any(source.labels is not None for source in sources):
        logger.info("The sources have different classes, so the joined source has no labels.")
    starts = [0, *accumulate(len(source) for source in sources)][:-1]
    encoded = [source.encoded for source in sources if source.encoded is not None]
    return ImageSource(
        name=" + ".join(source.name for source in sources),
        ids=[f"{source.name}/{id}" for source in sources for id in source.ids],
        read=partial(_read_joined, [source.read for source in sources], starts),
        labels=[label for source in sources for label in source.labels or ()] if same else None,
        label_names=names if same else None,
        encoded=partial(_read_joined, encoded, starts) if len(encoded) == len(sources) else None,
        parts=tuple(len(source) for source in sources),
        problems=tuple(problem for source in sources for problem in source.problems),
    )


def _read_joined(reads: Sequence[Callable[[int], Any]], starts: list[int], index: int) -> Any:
    part = bisect_right(starts, index) - 1
    return reads[part](index - starts[part])


def _load_one(
    data: str | Path,
    *,
    split: Split | None,
    image_column: str | None,
    label_column: str | None,
    limits: ImageLimits,
    ignore_extra_classes: bool,
) -> ImageSource:
    if data in EMBEDDED_SOURCES and Path(data).exists():
        say_once(f"'{data}' refers to the built-in data set, not to the local path. For the path, use './{data}'.")
    if data == "photos":
        return _photo_tiles(split)
    if data == "digits":
        return _digits(split)
    found = _find_files(data, split)
    if found is None:
        return _hub(str(data), split, image_column=image_column, label_column=label_column, limits=limits)
    if found.kind == "parquet":
        return _parquet(found, image_column=image_column, label_column=label_column, limits=limits)
    if found.kind == "tar":
        return _tar(found, limits=limits)
    return _image_folder(found, split, limits=limits, ignore_extra_classes=ignore_extra_classes)


@dataclass(frozen=True)
class _Files:
    """Files behind a path or pattern: `kind` is "images", "parquet" or "tar"; `files` are those of the split."""

    root: Path
    kind: str
    files: list[Path]
    everything: list[Path]
    problems: tuple[BadImageError, ...] = ()


def _find_files(data: str | Path, split: Split | None) -> _Files | None:
    """Find the files behind a path or pattern; return None if `data` can only be the id of a Hub data set.

    Raises:
        FileNotFoundError: `data` is neither an existing path nor a possible id.
        MissingSplitError: The source does not have the split.
        ValueError: There are no files of a supported kind.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        every, problems = _walk(path)
        by_kind = {kind: [file for file in every if _kind_of(file) == kind] for kind in ("images", "parquet", "tar")}
        kind = next((kind for kind in by_kind if by_kind[kind]), "images")
        left_out = Counter(
            file.suffix.lower() for file in every if _kind_of(file) not in (kind, "other")
        )  # other files, such as a README, are common in image folders and not worth a warning
        if left_out:
            counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(left_out.items()))
            say_once(f"'{data}' is read as a folder of {kind} files. Files of other types are left out: {counts}.")
        if kind == "images":  # `_image_folder` selects the split, because class ids cover both splits
            return _Files(path, kind, by_kind[kind], every, problems)
        files = by_kind[kind]
        return _Files(path, kind, _select_split(path, files, parts_of(files, path), split), every, problems)
    if path.is_file():
        return _one_file(data, path, [path], split)
    if any(sign in str(data) for sign in "*?["):
        anchor = next(parent for parent in path.parents if not any(sign in str(parent) for sign in "*?["))
        matches = sorted(file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file())
        if not matches:
            raise FileNotFoundError(f"No file matches the pattern '{data}'.")
        return _one_file(data, anchor, matches, split)
    is_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", str(data)) is not None
    if not is_id or (os.sep in str(data) and path.parent.is_dir()):
        raise FileNotFoundError(_does_not_exist(data))
    return None


def _does_not_exist(data: str | Path) -> str:
    parent = next(p for p in Path(data).expanduser().absolute().parents if p.is_dir())
    message = f"'{data}' does not exist. The nearest existing folder is '{parent}'."
    near = difflib.get_close_matches(str(data), EMBEDDED_SOURCES, n=1)
    return f"{message} Did you mean '{near[0]}'?" if near else message


def _one_file(data: str | Path, root: Path, files: list[Path], split: Split | None) -> _Files:
    """Accept a single file or the files of a pattern; parquet and tar only, all of one kind."""
    kinds = {_kind_of(file) for file in files}
    if kinds not in ({"parquet"}, {"tar"}):
        found = sorted({file.suffix for file in files})
        raise ValueError(
            f"'{data}' is a file of type '{found[0]}'. Expected a folder of images, parquet files or tar files."
        )
    if split == "validation":
        raise MissingSplitError(
            f"'{data}' consists of single files and has no validation split. Give the folder, or use split=None."
        )
    return _Files(root, kinds.pop(), files, files)


def _kind_of(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix in _SUFFIXES:
        return "images"
    if suffix in _OTHER_PICTURES:
        return "unsupported image format"
    # Compressed archives do not allow random access; they count as tar here so that opening them raises an error.
    return suffix[1:] if suffix in (".parquet", ".tar") else "tar" if _is_compressed_tar(file) else "other"


def _is_compressed_tar(file: Path) -> bool:
    return file.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))


def stratified_split(labels: Sequence[int], *, held_out_share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split indices into training and held-out ones with the same class proportions, each class in both.

    Args:
        labels: Class id of each image.
        held_out_share: Share of held-out images in (0, 1), rounded within each class. The only image of a class goes
            to the training split.
        seed: Random seed.
    """
    rng = np.random.default_rng(seed)
    values, held = np.asarray(labels), []
    for label in np.unique(values):
        members = rng.permutation(np.flatnonzero(values == label))
        count = min(max(round(len(members) * held_out_share), 1), len(members) - 1)
        held.extend(members[:count].tolist())
    held_out = set(held)
    return [i for i in range(len(values)) if i not in held_out], sorted(held_out)


def _read_at(read: Callable[[int], Any], indices: list[int], index: int) -> Any:
    return read(indices[index])


# Images that are part of the two wheels. They are read directly, because `skimage.data` may download files.
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
    """Return the 21 full images behind `photos` by name, RGB at their original size. No network is needed.

    Raises:
        ImportError: scikit-image or scikit-learn is not installed.
        BadImageError: An installed version does not include one of the files.
    """
    roots = {}
    for package in ("skimage", "sklearn"):
        spec = importlib.util.find_spec(package)  # avoids the import, which takes seconds
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(
                "The built-in images ('photos') need scikit-image and scikit-learn. "
                "Run: pip install scikit-image scikit-learn"
            )
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
                # A tile that crosses the border is in neither split, so that no pixel is in both.
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
    # 8 x 8 pixels with 17 gray levels, 0 to 16.
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


def _walk(root: Path) -> tuple[list[Path], tuple[BadImageError, ...]]:
    """Return all files below `root` in a fixed order, and the folders that could not be listed.

    Symbolic links are followed; each folder is visited once, so loops end. Hidden files and folders are left out.
    """
    files: list[Path] = []
    problems: list[BadImageError] = []
    seen = set()

    def unreadable(error: OSError) -> None:
        reason = f"the folder cannot be listed: {error.strerror}"
        problems.append(BadImageError(str(error.filename), reason, "permission"))
        logger.warning("%s", problems[-1])

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=unreadable):
        status = os.stat(folder)  # noqa: PTH116 - os.walk returns strings, and names that are not UTF-8 stay intact
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files.extend(Path(folder, name) for name in names if not name.startswith("."))
    return sorted(files), tuple(problems)


def parts_of(files: Sequence[Path], root: Path) -> list[str | None]:
    """Return the split of each file: `train`, `validation`, `test` or None.

    It is recognized by the outermost folder below `root` or, for parquet and tar files, by the beginning of the file
    name. `test` is a split only if there is also `train`; otherwise it is an ordinary name.
    """
    return _without_lonely_test([_part_named(file, root) for file in files])


def _part_named(file: Path, root: Path) -> str | None:
    parts = file.relative_to(root).parts
    for part, names in _PART_NAMES.items():
        if len(parts) > 1 and parts[0].lower() in names:
            return part
        named = _kind_of(file) in ("parquet", "tar")
        if named and re.match(rf"({'|'.join(names)})(?![a-z])", file.name.lower()):
            return part
    return None


def _without_lonely_test(parts: list[str | None]) -> list[str | None]:
    return parts if "train" in parts else [None if part == "test" else part for part in parts]


def part_meant(parts: Collection[str | None], split: Split, name: str) -> str | None:
    """Return the value of `parts_of` that a split of the data called `name` corresponds to.

    Without a training split, training images are those in no split. Without a validation split, `test` is used.
    """
    if split == "train":
        return "train" if "train" in parts else None
    if "validation" not in parts and "test" in parts:
        say_once(f"'{name}' has no validation split, so its test split is used as the held-out images.")
        return "test"
    return "validation"


def _part(root: Path, files: list[Path], parts: list[str | None], split: Split | None) -> list[Path]:
    """Return the files of one split, possibly none; `parts` are the results of `parts_of` for `files`."""
    if split is None:
        return files
    wanted = part_meant(parts, split, str(root))
    return [file for file, part in zip(files, parts, strict=True) if part == wanted]


def _select_split(root: Path, files: list[Path], parts: list[str | None], split: Split | None) -> list[Path]:
    selected = _part(root, files, parts, split)
    if split is not None and not selected:
        looked = "', '".join(_PART_NAMES[split])
        raise MissingSplitError(
            f"'{root}' has no {split} split. Looked for '{looked}', found {_outermost(root, files)}. "
            "Add such a subfolder, or use split=None for all images."
        )
    return selected


def _outermost(root: Path, files: Sequence[Path], limit: int = 8) -> str:
    names = sorted({file.relative_to(root).parts[0] for file in files})
    return ", ".join(repr(name) for name in names[:limit]) + (
        f" and {len(names) - limit} more" if len(names) > limit else ""
    )


def _image_folder(
    found: _Files, split: Split | None, *, limits: ImageLimits, ignore_extra_classes: bool
) -> ImageSource:
    root, images = found.root, found.files
    if not images:
        others = found.everything
        listing = f"{len(others)} other files ({_outermost(root, others)})" if others else "nothing"
        raise ValueError(
            f"There are no images in '{root}' or its subfolders. Looked for {' '.join(sorted(_SUFFIXES))}, .parquet "
            f"and .tar; found {listing}."
        )
    parts = parts_of(images, root)
    selected = _select_split(root, images, parts, split)
    class_of = {
        file: _class_of(file, root, below_part=part is not None) for file, part in zip(images, parts, strict=True)
    }
    classes = [class_of[file] for file in selected]
    # Class ids must be the same in both splits, so the training split defines the classes if there is one.
    known = {class_of[file] for file in _part(root, images, parts, "train")} if split else set(classes)
    known = known or set(classes)
    names, labels = None, None
    if "" not in known and "" not in classes:
        if extra := sorted(set(classes) - known):
            if not ignore_extra_classes or not known & set(classes):
                raise ValueError(
                    f"'{root}' has classes that occur only in its {split} split: {extra[:8]}. Move these folders, or "
                    "add training images for them. For fine-tuning, --ignore_extra_classes leaves them out."
                )
            kept = [(file, name) for file, name in zip(selected, classes) if name in known]
            logger.warning(
                "'%s': %d %s images belong to classes without training images and are left out: %s.",
                root, len(selected) - len(kept), split, ", ".join(map(repr, extra[:8])),
            )  # fmt: skip
            selected, classes = [file for file, _ in kept], [name for _, name in kept]
        names = tuple(sorted(known))
        position = {name: i for i, name in enumerate(names)}
        labels = [position[name] for name in classes]
    ids = [file.relative_to(root).as_posix() for file in selected]
    read_file = partial(_read_file, root, ids)
    return _stored_images(
        str(root), ids, read_file, _FileNames(root, ids), limits, labels, names, problems=found.problems
    )


def _class_of(file: Path, root: Path, *, below_part: bool) -> str:
    """Return the outermost folder below `root` or its split folder; an empty string for a file in no such folder."""
    parts = file.relative_to(root).parts[int(below_part) :]
    return parts[0] if len(parts) > 1 else ""


def _read_file(root: Path, ids: list[str], index: int) -> bytes:
    return read_bytes(root / ids[index], str(root / ids[index]))


@dataclass(frozen=True)
class _FileNames:
    """Name of image i in error messages: its full path."""

    root: Path
    ids: list[str]

    def __call__(self, index: int) -> str:
        return str(self.root / self.ids[index])


@dataclass(frozen=True)
class _RowNames:
    """Name of image i of a table or shard in error messages."""

    source: str
    ids: Sequence[str]

    def __call__(self, index: int) -> str:
        return f"{self.source}, {self.ids[index].replace('row/', 'row ')}"


def _stored_images(
    name: str,
    ids: Sequence[str],
    encoded: Callable[[int], bytes],
    called: Callable[[int], str],
    limits: ImageLimits,
    labels: Sequence[int] | None,
    label_names: tuple[str, ...] | None,
    *,
    problems: tuple[BadImageError, ...] = (),
) -> ImageSource:
    """Create a source whose images are decoded from stored bytes with `open_image`."""
    read = partial(_decode, encoded, called, limits)
    return ImageSource(name, ids, read, labels, label_names, encoded=encoded, problems=problems)


def _decode(
    encoded: Callable[[int], bytes], called: Callable[[int], str], limits: ImageLimits, index: int
) -> Image.Image:
    return open_image(encoded(index), name=called(index), limits=limits)


def _parquet(found: _Files, *, image_column: str | None, label_column: str | None, limits: ImageLimits) -> ImageSource:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    name = str(found.root)
    try:
        # `datasets` memory-maps an Arrow copy in its cache folder, so files may be larger than memory.
        table = load_dataset("parquet", data_files=[str(file) for file in found.files], split="train")
    except (DatasetGenerationError, ValueError) as error:
        files = ", ".join(file.name for file in found.files[:8])
        raise ValueError(f"'{name}' cannot be read as parquet ({files}): {error.__cause__ or error}") from error
    source = table_images(table, name, image_column=image_column, label_column=label_column, limits=limits)
    return replace(source, problems=found.problems)


def _hub(
    data: str, split: Split | None, *, image_column: str | None, label_column: str | None, limits: ImageLimits
) -> ImageSource:
    try:
        tables = _hub_tables(data)
    except (FileNotFoundError, ConnectionError) as error:  # DatasetNotFoundError is a FileNotFoundError
        raise FileNotFoundError(
            f"{_does_not_exist(data)} It could not be loaded as a Hub data set either: {error}"
        ) from error
    except RuntimeError as error:  # data sets with a loading script, which is never run
        raise ValueError(f"The Hub data set '{data}' cannot be used: {error}") from error
    table = _hub_part(tables, data, split)
    return table_images(table, data, image_column=image_column, label_column=label_column, limits=limits)


def _hub_tables(data: str, **options: Any) -> Mapping[str, Any]:
    """Load all splits of `name` or `name:config`.

    Raises:
        ValueError: The configuration is missing or unknown; the message lists the known ones.
    """
    from datasets import get_dataset_config_names, load_dataset

    name, _, config = data.partition(":")
    try:
        return load_dataset(name, config or None, **options)
    except ValueError as error:
        if not str(error).startswith(("Config name is missing", "BuilderConfig")):
            raise
        known = ", ".join(f"'{name}:{one}'" for one in get_dataset_config_names(name))
        problem = f"has no configuration '{config}'" if config else "has several configurations"
        raise ValueError(f"The Hub data set '{name}' {problem}. Choose one of {known}.") from error


def _hub_part(tables: Mapping[str, Any], data: str, split: Split | None) -> Any:
    """Select one split of a Hub data set by name, with the same names as for folders; None selects all of them.

    Raises:
        MissingSplitError: There is no such split; the message lists the existing ones.
    """
    from datasets import concatenate_datasets

    named = [next((p for p, names in _PART_NAMES.items() if name.lower() in names), None) for name in tables]
    parts = _without_lonely_test(named)
    wanted = part_meant(parts, split, data) if split else None
    chosen = [table for table, part in zip(tables.values(), parts, strict=True) if split is None or part == wanted]
    if not chosen:
        raise MissingSplitError(
            f"The Hub data set '{data}' has no {split} split. Its splits are {', '.join(map(repr, tables))}. Use "
            "split=None for all images."
        )
    return chosen[0] if len(chosen) == 1 else concatenate_datasets(chosen)


def _choose_columns(
    features: Any, name: str, *, image_column: str | None, label_column: str | None
) -> tuple[str, str | None]:
    """Return the names of the image column and of the label column, if any.

    Raises:
        ValueError: The column does not exist or is ambiguous; the message lists the columns.
    """
    from datasets import ClassLabel, Value
    from datasets import Image as ImageFeature

    candidates = [
        column
        for column, feature in features.items()
        if isinstance(feature, ImageFeature) or (isinstance(feature, Value) and feature.dtype.endswith("binary"))
    ]
    column = image_column or ("image" if "image" in candidates else candidates[0] if len(candidates) == 1 else None)
    if column is None or column not in candidates:
        raise ValueError(
            f"'{name}': {'no unique image column' if column is None else f'column {column!r} does not hold images'}. "
            f"Columns: {', '.join(features)}; with images: {', '.join(candidates) or 'none'}. Set image_column."
        )
    # A text column called "label" is not an error: the data set may be meant for pretraining, which needs no labels.
    integers = [
        column
        for column, feature in features.items()
        if isinstance(feature, ClassLabel) or (isinstance(feature, Value) and "int" in feature.dtype)
    ]
    if label_column is not None and label_column not in integers:
        raise ValueError(
            f"'{name}': label column {label_column!r} has type {features.get(label_column)}, expected integers or "
            f"ClassLabel. Such columns: {', '.join(integers) or 'none'}. All columns: {', '.join(features)}. Set "
            "label_column."
        )
    return column, label_column or ("label" if "label" in integers else None)


def table_images(
    table: "datasets.Dataset",
    name: str,
    *,
    image_column: str | None,
    label_column: str | None,
    limits: ImageLimits | None = None,
) -> ImageSource:
    """Create a source from a `datasets` table whose encoded images are decoded with `open_image`."""
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    features = table.features
    column, label_column = _choose_columns(features, name, image_column=image_column, label_column=label_column)
    labels = names = None
    if label_column is not None:
        feature = features[label_column]
        labels = [-1 if value is None else value for value in table[label_column]]
        # On the Hub, unlabeled rows (in most test splits) have the label -1.
        labels = labels if min(labels, default=-1) >= 0 else None
        if labels is not None:
            is_named = isinstance(feature, ClassLabel)
            names = tuple(feature.names) if is_named else tuple(str(i) for i in range(max(labels) + 1))
    if isinstance(features[column], ImageFeature):
        table = table.cast_column(column, ImageFeature(decode=False))
    ids = [f"row/{i}" for i in range(len(table))]
    encoded = partial(_read_row, table.select_columns([column]), column, name)
    source = _stored_images(name, ids, encoded, _RowNames(name, ids), limits or ImageLimits(), labels, names)
    others = table.remove_columns([column])
    return replace(source, table=others if others.column_names else None)


def _read_row(table: "datasets.Dataset", column: str, name: str, index: int) -> bytes:
    return _cell_bytes(table[index][column], f"{name}, row {index}")


def _cell_bytes(cell: Any, name: str) -> bytes:
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell["bytes"] is not None else cell["path"]
    if cell is None:
        raise BadImageError(name, "the cell is empty", "empty")
    return cell if isinstance(cell, bytes) else read_bytes(cell, name)


# --- Tar files in WebDataset format: members of one sample share their name up to the first dot


def _tar(found: _Files, *, limits: ImageLimits) -> ImageSource:
    ids: list[str] = []
    places: list[tuple[int, int, int]] = []
    classes: list[int | None] = []
    problems = list(found.problems)
    for shard, file in enumerate(found.files):
        members, labels, faults = _index_tar(file)
        called = file.relative_to(found.root).as_posix() if file != found.root else file.name
        for member, offset, size in members:
            ids.append(f"{called}#{member}")
            places.append((shard, offset, size))
            classes.append(labels.get(_sample_key(member)))
        problems += faults
    if not ids:
        listing = "; ".join(problem.reason for problem in problems[:3]) or "they hold only other types of files"
        raise ValueError(f"There are no images in the tar files of '{found.root}': {listing}.")
    for problem in problems:
        logger.warning("%s", problem)
    known = [label for label in classes if label is not None]
    labels_ = known if len(known) == len(classes) else None
    names = tuple(str(i) for i in range(max(known) + 1)) if labels_ is not None else None
    positions = np.array(places, dtype=np.int64)  # (images, 3): shard, first byte, number of bytes
    encoded = partial(_read_member, found.files, positions)
    name = str(found.root)
    return _stored_images(name, ids, encoded, _RowNames(name, ids), limits, labels_, names, problems=tuple(problems))


def _sample_key(member: str) -> str:
    folder, _, name = member.rpartition("/")
    return f"{folder}/{name.split('.')[0]}"


def _index_tar(file: Path) -> tuple[list[tuple[str, int, int]], dict[str, int], list[BadImageError]]:
    """Index one tar file: images as (name, first byte, number of bytes), class ids by sample, and problems.

    Nothing is unpacked. Links, devices and paths that lead outside the archive are left out, as is everything after a
    damaged header.
    """
    if _is_compressed_tar(file):
        raise ValueError(
            f"'{file}' is compressed, so its images cannot be read at random. Decompress it to .tar, or stream it."
        )
    images: list[tuple[str, int, int]] = []
    labels: dict[str, int] = {}
    problems: list[BadImageError] = []
    size = file.stat().st_size
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                name = member.name
                if member.isdir():
                    continue
                if not member.isreg() or name.startswith("/") or ".." in name.split("/"):
                    problems.append(BadImageError(f"{file}#{name}", "a link, or a path out of the archive", "blocked"))
                elif member.offset_data + member.size > size:
                    problems.append(BadImageError(f"{file}#{name}", "the archive ends inside this file", "archive"))
                elif Path(name).suffix.lower() in _SUFFIXES:
                    images.append((name, member.offset_data, member.size))
                elif name.endswith(".cls"):
                    content = archive.extractfile(member)
                    text = content.read(32).strip() if content else b""
                    if text.isdigit():
                        labels[_sample_key(name)] = int(text)
            end = archive.offset
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        reason = f"the archive is damaged after {len(images)} images: {error}"
        return images, labels, [*problems, BadImageError(str(file), reason, "archive")]
    # `tarfile` treats any unreadable header except the first one as the end; a real end is a block of zeros.
    with file.open("rb") as stream:
        stream.seek(end)
        block = stream.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0") or not block:
        what = "the archive has a damaged header" if block else "the archive has no end marker (truncated?)"
        problems.append(BadImageError(str(file), f"{what} after {len(images)} images", "archive"))
    return images, labels, problems


def _read_member(files: list[Path], positions: np.ndarray, index: int) -> bytes:
    shard, offset, size = (int(value) for value in positions[index])
    try:
        with files[shard].open("rb") as stream:
            stream.seek(offset)
            data = stream.read(size)
    except OSError as error:
        raise BadImageError(str(files[shard]), f"{error.strerror or error}", "missing") from error
    if len(data) < size:
        raise BadImageError(str(files[shard]), f"the archive ends inside image {index}", "archive")
    return data


# --- Streams: sequential reading, for data that does not fit on this machine


@dataclass(frozen=True)
class StreamRecord:
    """Image of a stream: an id that is the same in every pass, and the stored bytes (None for an empty cell)."""

    id: str
    data: bytes | None
    label: int | None = None


@dataclass(frozen=True)
class ImageStream:
    """Images in order, shard by shard. `open_shard(i)` reads shard i from its beginning, always in the same order."""

    name: str
    num_shards: int
    open_shard: Callable[[int], Iterator[StreamRecord]]
    label_names: tuple[str, ...] | None = None


def stream_images(
    data: str | Path,
    *,
    split: Split = "train",
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageStream:
    """Open parquet files, tar files in WebDataset format, or a Hub data set for sequential reading.

    Nothing is copied to a cache. A folder of images does not need a stream: its files are read one by one anyway.

    Args:
        data: File, folder of files, pattern, or the id of a Hub data set.
        split: `"train"` or `"validation"`.
        image_column: Image column. Default: the only image column, or `image`.
        label_column: Integer or ClassLabel column. Default: `label`, if it has one of these types.

    Raises:
        FileNotFoundError: The path or Hub data set does not exist.
        MissingSplitError: The source does not have the split.
        ValueError: `data` is a folder of images or a built-in set, or the column does not exist.
    """
    from datasets import ClassLabel, load_dataset
    from datasets import Image as ImageFeature

    found = None if data in EMBEDDED_SOURCES else _find_files(data, split)
    if data in EMBEDDED_SOURCES or (found is not None and found.kind == "images"):
        raise ValueError(
            f"'{data}' cannot be streamed: only parquet files, tar files and Hub data sets can. Remove --streaming."
        )
    try:
        if found is None:
            table = _hub_part(_hub_tables(str(data), streaming=True), str(data), split)
        else:
            files = [str(file) for file in found.files]
            kind = "webdataset" if found.kind == "tar" else "parquet"
            table = load_dataset(kind, data_files=files, split="train", streaming=True)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{_does_not_exist(data)} It could not be streamed as a Hub data set either: {error}"
        ) from error
    except MissingSplitError:
        raise
    except (RuntimeError, ValueError, tarfile.TarError) as error:
        raise ValueError(f"'{data}' cannot be streamed: {error}") from error
    features = table.features or table._resolve_features().features
    column, label_column = _choose_columns(features, str(data), image_column=image_column, label_column=label_column)
    if label_column is None and found is not None and found.kind == "tar" and "cls" in features:
        label_column = "cls"
    feature = features[label_column] if label_column else None
    names = tuple(feature.names) if isinstance(feature, ClassLabel) else None
    if isinstance(features[column], ImageFeature):
        table = table.cast_column(column, ImageFeature(decode=False))
    open_shard = partial(_stream_shard, table, str(data), column, label_column)
    return ImageStream(str(data), table.num_shards, open_shard, names)


def _stream_shard(
    table: "datasets.IterableDataset", name: str, column: str, label_column: str | None, shard: int
) -> Iterator[StreamRecord]:
    rows = table.shard(num_shards=table.num_shards, index=shard) if table.num_shards > 1 else table
    for number, row in enumerate(rows):
        id = f"{name}#shard{shard}/row{number}"
        if "__key__" in row:  # a tar file: the member's name does not change when shards are added
            id = f"{Path(row['__url__']).name}#{row['__key__']}.{column}"
        label = row[label_column] if label_column else None
        label = int(label) if isinstance(label, int) and label >= 0 else None
        try:
            data = _cell_bytes(row[column], id)
        except BadImageError:
            data = None
        yield StreamRecord(id, data, label)


# --- Evaluation: the standard image processor that is saved with every checkpoint


def default_image_processor(image_size: int | tuple[int, int], *, resize: int | None = None) -> "BitImageProcessor":
    """Create the processor saved with checkpoints: shortest edge, center crop, bicubic, ImageNet statistics.

    It is a class of transformers, so loading it needs neither this package nor remote code. All values are set
    explicitly, because the defaults of the class are those of CLIP.

    Args:
        image_size: Side of the crop in pixels, or (height, width).
        resize: Shortest edge before the crop, pixels. Default: 256/224 of the (longer) crop side, as in DINOv2's
            evaluation protocol.
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
