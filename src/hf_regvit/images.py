"""Images in: every source of pictures behind one `load_images`."""

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
# Pictures that a folder may hold and that nothing here decodes; they are left out with a warning, not in silence.
_OTHER_PICTURES = frozenset({".heic", ".heif", ".jxl", ".jp2", ".svg", ".eps", ".pdf", ".psd", ".dng", ".cr2", ".nef"})
_PART_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


class MissingSplitError(ValueError):
    """The source is there, but it has no part of that name."""


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
    `encoded` gives the bytes as they are stored; None where the pictures are drawn. `parts` are the sizes of the
    sources that were joined into this one, in order. `problems` are what could not be listed: unreadable folders,
    truncated shards.
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
            raise IndexError(f"Image {index} of '{self.name}', which has {len(self)}.")
        index %= len(self)
        label = None if self.labels is None else self.labels[index]
        return ImageRecord(image=self.read(index), label=label, id=self.ids[index])

    def subset(self, indices: Sequence[int]) -> "ImageSource":
        """The images at `indices`, in that order, with the same label names."""
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
    """Open a source of images, or several as one.

    - `photos`: tiles of 64 px from the 21 photographs inside scikit-image and scikit-learn; 2,214 training tiles from
      the left 70 % of each, 719 held-out tiles from the rest, no pixel in both. The label is the photograph.
    - `digits`: scikit-learn's 1,797 handwritten digits at 32 px, split 80 : 20 within each class, always the same way.
    - a folder of images, nested at any depth. If every image lies in a sub-folder, the outermost sub-folders are the
      classes. `train/` and `validation/` (also `val`, `valid`, `dev`) are honoured; without them all is training data.
      Beside `train/`, a folder `test/` is the held-out part if there is no other, and is left alone if there is.
    - a parquet file, or a folder of them, told apart by the same words in file or folder names.
    - a tar file in the manner of WebDataset (`000017.jpg`, `000017.cls`), or a folder of them, told apart likewise. An
      index of positions is made at the start, so every image can be read at random; nothing is ever unpacked.
    - a pattern of such files: `shards/train-*.tar`.
    - the id of a data set on the Hub, whose splits have the same names; `owner/name:config` where it comes in several
      configurations.

    Several sources count one after another: `["a", "b"]` has the images of `a`, then those of `b`, their ids led by
    the source's name. Labels stay if all have the same classes.

    Args:
        data: One of the above or several. A path wins over a Hub id.
        split: `"train"`, `"validation"`, or None for everything.
        image_column: Column of a parquet file or Hub data set; default: the only image column, or `image`.
        label_column: Integer or ClassLabel column; default `label` where it is one.
        limits: Which images to accept when they are read; default `ImageLimits()`.
        ignore_extra_classes: Leave out, with a warning, the held-out images of a folder whose class has no training
            images there, instead of refusing.

    Raises:
        FileNotFoundError: No such path (the nearest existing parent is named), or no such data set.
        MissingSplitError: No such part; a ValueError.
        ValueError: Nothing usable there or no such column; says what was looked for and found.
    """
    if split not in (None, "train", "validation"):
        raise ValueError(f"split={split!r} is unknown. Use 'train', 'validation' or None (all images).")
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
        raise ValueError(f"data={list(map(str, data))}: expected one or more sources, each once.")
    sources, missing = [], []
    for one in data:
        try:
            sources.append(load(one))
        except MissingSplitError as error:  # held-out images need not exist in every source
            if split == "train":
                raise
            missing.append(error)
    if not sources:
        raise MissingSplitError(" ".join(map(str, missing)))
    return sources[0] if len(data) == 1 else join_sources(sources)


def join_sources(sources: Sequence[ImageSource]) -> ImageSource:
    """Several sources one after another, as one.

    Ids are led by the source's name. Labels stay where every source has the same label names in the same order;
    otherwise a number would mean two things, and the result has none.
    """
    names = sources[0].label_names
    same = names is not None and all(source.label_names == names for source in sources)
    if not same and any(source.labels is not None for source in sources):
        logger.info("The sources have different classes; the joined one has no labels.")
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
        say_once(f"'{data}' is the embedded data set, not the folder of that name here; for that say './{data}'.")
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
    """What a path or pattern stands for: `kind` is "images", "parquet" or "tar"; `files` are those of the split."""

    root: Path
    kind: str
    files: list[Path]
    everything: list[Path]
    problems: tuple[BadImageError, ...] = ()


def _find_files(data: str | Path, split: Split | None) -> _Files | None:
    """The files behind a path or pattern; None for what can only be the id of a data set on the Hub.

    Raises:
        FileNotFoundError: Neither a path nor an id.
        MissingSplitError: No such part.
        ValueError: No files of a known kind.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        every, problems = _walk(path)
        by_kind = {kind: [file for file in every if _kind_of(file) == kind] for kind in ("images", "parquet", "tar")}
        kind = next((kind for kind in by_kind if by_kind[kind]), "images")
        left_out = Counter(
            file.suffix.lower() for file in every if _kind_of(file) not in (kind, "other")
        )  # a folder of pictures may well hold a text file
        if left_out:
            counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(left_out.items()))
            say_once(f"'{data}': read as a folder of {kind}; left out: {counts}.")
        if kind == "images":  # chooses the split itself: classes are numbered over both
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
    message = f"'{data}' does not exist; the nearest existing folder is '{parent}'."
    near = difflib.get_close_matches(str(data), EMBEDDED_SOURCES, n=1)
    return f"{message} Did you mean '{near[0]}'?" if near else message


def _one_file(data: str | Path, root: Path, files: list[Path], split: Split | None) -> _Files:
    """Files named one by one or by a pattern; parquet and tar only, all of one kind."""
    kinds = {_kind_of(file) for file in files}
    if kinds not in ({"parquet"}, {"tar"}):
        found = sorted({file.suffix for file in files})
        raise ValueError(
            f"'{data}' is a file of type '{found[0]}'. Give a folder of images, or parquet or tar files of one kind."
        )
    if split == "validation":
        raise MissingSplitError(f"'{data}' names files and has no validation part. Give the folder, or split=None.")
    return _Files(root, kinds.pop(), files, files)


def _kind_of(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix in _SUFFIXES:
        return "images"
    if suffix in _OTHER_PICTURES:
        return "picture of another format"
    # A compressed archive has no positions to read at; it is told so rather than overlooked.
    return suffix[1:] if suffix in (".parquet", ".tar") else "tar" if _is_compressed_tar(file) else "other"


def _is_compressed_tar(file: Path) -> bool:
    return file.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))


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


def _read_at(read: Callable[[int], Any], indices: list[int], index: int) -> Any:
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


def _walk(root: Path) -> tuple[list[Path], tuple[BadImageError, ...]]:
    """All files below `root` in a fixed order, and the folders that could not be listed.

    Links are followed, each folder once (loops), hidden names left out.
    """
    files: list[Path] = []
    problems: list[BadImageError] = []
    seen = set()

    def unreadable(error: OSError) -> None:
        reason = f"the folder cannot be listed: {error.strerror}"
        problems.append(BadImageError(str(error.filename), reason, "permission"))
        logger.warning("%s", problems[-1])

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=unreadable):
        status = os.stat(folder)  # noqa: PTH116 - os.walk deals in strings, and bytes that are no UTF-8 stay intact
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files.extend(Path(folder, name) for name in names if not name.startswith("."))
    return sorted(files), tuple(problems)


def parts_of(files: Sequence[Path], root: Path) -> list[str | None]:
    """`train`, `validation`, `test` or None: the part that each file belongs to.

    Told by its outermost folder below `root` or, for tables and shards, by how its name begins. `test` is a part only
    beside `train`: without, it is a name like any other.
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
    """Which of `parts_of` a split of the data called `name` is.

    Without a training part of its own, training is all that is in no part. Without a validation part, `test` is it.
    """
    if split == "train":
        return "train" if "train" in parts else None
    if "validation" not in parts and "test" in parts:
        say_once(f"'{name}' has no validation part: its test part is what is held out.")
        return "test"
    return "validation"


def _part(root: Path, files: list[Path], parts: list[str | None], split: Split | None) -> list[Path]:
    """The files of one part, perhaps none; `parts` are theirs, from `parts_of`."""
    if split is None:
        return files
    wanted = part_meant(parts, split, str(root))
    return [file for file, part in zip(files, parts, strict=True) if part == wanted]


def _select_split(root: Path, files: list[Path], parts: list[str | None], split: Split | None) -> list[Path]:
    selected = _part(root, files, parts, split)
    if split is not None and not selected:
        looked = "', '".join(_PART_NAMES[split])
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


def _image_folder(
    found: _Files, split: Split | None, *, limits: ImageLimits, ignore_extra_classes: bool
) -> ImageSource:
    root, images = found.root, found.files
    if not images:
        others = found.everything
        listing = f"{len(others)} other files ({_outermost(root, others)})" if others else "nothing"
        raise ValueError(
            f"No images in '{root}' or below. Looked for {' '.join(sorted(_SUFFIXES))}, .parquet and .tar; "
            f"found {listing}."
        )
    parts = parts_of(images, root)
    selected = _select_split(root, images, parts, split)
    class_of = {
        file: _class_of(file, root, below_part=part is not None) for file, part in zip(images, parts, strict=True)
    }
    classes = [class_of[file] for file in selected]
    # Both parts must number the classes alike, so the training part gives the list wherever there is one.
    known = {class_of[file] for file in _part(root, images, parts, "train")} if split else set(classes)
    known = known or set(classes)
    names, labels = None, None
    if "" not in known and "" not in classes:
        if extra := sorted(set(classes) - known):
            if not ignore_extra_classes or not known & set(classes):
                raise ValueError(
                    f"'{root}' has classes only in its {split} part: {extra[:8]}. Move them, or add training images; "
                    "for fine-tuning --ignore_extra_classes leaves them out."
                )
            kept = [(file, name) for file, name in zip(selected, classes) if name in known]
            logger.warning(
                "'%s': %d %s images are of classes without training images and are left out: %s.",
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
    """The outermost folder below `root` or its split folder; empty for a file that lies in none."""
    parts = file.relative_to(root).parts[int(below_part) :]
    return parts[0] if len(parts) > 1 else ""


def _read_file(root: Path, ids: list[str], index: int) -> bytes:
    return read_bytes(root / ids[index], str(root / ids[index]))


@dataclass(frozen=True)
class _FileNames:
    """What an error calls image i: its whole path."""

    root: Path
    ids: list[str]

    def __call__(self, index: int) -> str:
        return str(self.root / self.ids[index])


@dataclass(frozen=True)
class _RowNames:
    """What an error calls image i of a table or shard."""

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
    """A source whose images are decoded by `open_image` from stored bytes."""
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
        # `datasets` maps an Arrow copy from its cache folder, so that files larger than memory work.
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
    except (FileNotFoundError, ConnectionError) as error:  # DatasetNotFoundError is the former, offline the latter
        raise FileNotFoundError(
            f"{_does_not_exist(data)} As a data set on the Hub it could not be loaded either: {error}"
        ) from error
    except RuntimeError as error:  # data sets that bring a program; it is never run
        raise ValueError(f"The data set '{data}' cannot be used: {error}") from error
    table = _hub_part(tables, data, split)
    return table_images(table, data, image_column=image_column, label_column=label_column, limits=limits)


def _hub_tables(data: str, **options: Any) -> Mapping[str, Any]:
    """All splits of `name` or `name:config`.

    Raises:
        ValueError: There are several configurations and none is chosen, or not that one; they are listed.
    """
    from datasets import get_dataset_config_names, load_dataset

    name, _, config = data.partition(":")
    try:
        return load_dataset(name, config or None, **options)
    except ValueError as error:
        if not str(error).startswith(("Config name is missing", "BuilderConfig")):
            raise
        known = ", ".join(f"'{name}:{one}'" for one in get_dataset_config_names(name))
        problem = f"has no configuration '{config}'" if config else "comes in several configurations"
        raise ValueError(f"the data set '{name}' {problem}; say which: {known}.") from error


def _hub_part(tables: Mapping[str, Any], data: str, split: Split | None) -> Any:
    """One part of a data set of the Hub by the names of its splits, as with folders; all of it for None.

    Raises:
        MissingSplitError: No such part; the names are listed.
    """
    from datasets import concatenate_datasets

    named = [next((p for p, names in _PART_NAMES.items() if name.lower() in names), None) for name in tables]
    parts = _without_lonely_test(named)
    wanted = part_meant(parts, split, data) if split else None
    chosen = [table for table, part in zip(tables.values(), parts, strict=True) if split is None or part == wanted]
    if not chosen:
        raise MissingSplitError(
            f"the data set '{data}' has no {split} part; its splits are {', '.join(map(repr, tables))}. Use "
            "split=None for all images."
        )
    return chosen[0] if len(chosen) == 1 else concatenate_datasets(chosen)


def _choose_columns(
    features: Any, name: str, *, image_column: str | None, label_column: str | None
) -> tuple[str, str | None]:
    """Names of the image column and of the label column, if any.

    Raises:
        ValueError: No such column, or no way to tell; lists what there is.
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
            f"'{name}': {'no image column' if column is None else f'column {column!r} holds no images'}. "
            f"Columns: {', '.join(features)}; with images: {', '.join(candidates) or 'none'}. Set image_column."
        )
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
    return column, label_column or ("label" if "label" in integers else None)


def table_images(
    table: "datasets.Dataset",
    name: str,
    *,
    image_column: str | None,
    label_column: str | None,
    limits: ImageLimits | None = None,
) -> ImageSource:
    """A source from a `datasets` table: encoded images are decoded by `open_image`, as everywhere."""
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    features = table.features
    column, label_column = _choose_columns(features, name, image_column=image_column, label_column=label_column)
    labels = names = None
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


# --- Tar files in the manner of WebDataset: members of one sample share the name up to its first dot


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
        listing = "; ".join(problem.reason for problem in problems[:3]) or "only members of other kinds"
        raise ValueError(f"No images in the tar files of '{found.root}': {listing}.")
    for problem in problems:
        logger.warning("%s", problem)
    known = [label for label in classes if label is not None]
    labels_ = known if len(known) == len(classes) else None
    names = tuple(str(i) for i in range(max(known) + 1)) if labels_ is not None else None
    positions = np.array(places, dtype=np.int64)  # (images, 3): shard, first byte, bytes
    encoded = partial(_read_member, found.files, positions)
    name = str(found.root)
    return _stored_images(name, ids, encoded, _RowNames(name, ids), limits, labels_, names, problems=tuple(problems))


def _sample_key(member: str) -> str:
    folder, _, name = member.rpartition("/")
    return f"{folder}/{name.split('.')[0]}"


def _index_tar(file: Path) -> tuple[list[tuple[str, int, int]], dict[str, int], list[BadImageError]]:
    """Images of one tar file as (name, first byte, bytes), class numbers by sample, and what is wrong with the file.

    Nothing is unpacked. Links, devices and names that would lead out of a folder are left out; what comes after a
    damaged place cannot be found and is left out too.
    """
    if _is_compressed_tar(file):
        raise ValueError(f"'{file}' is compressed, so its images have no positions. Unpack it to .tar, or stream it.")
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
                    problems.append(BadImageError(f"{file}#{name}", "a link or a path that leads out", "blocked"))
                elif member.offset_data + member.size > size:
                    problems.append(BadImageError(f"{file}#{name}", "the archive ends inside of it", "archive"))
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
    # `tarfile` takes any unreadable header but the first for the end; a real end is a block of zeros.
    with file.open("rb") as stream:
        stream.seek(end)
        block = stream.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0") or not block:
        what = "a damaged header" if block else "no end mark (truncated?)"
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
        raise BadImageError(str(files[shard]), f"the archive ends inside of image {index}", "archive")
    return data


# --- Streams: images in the order in which they come, for data that is never on this machine as a whole


@dataclass(frozen=True)
class StreamRecord:
    """One image on its way: an id that is the same in every pass, the bytes as stored (None: an empty cell)."""

    id: str
    data: bytes | None
    label: int | None = None


@dataclass(frozen=True)
class ImageStream:
    """Images in order, shard by shard. `open_shard(i)` reads shard i from its beginning, every time alike."""

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
    """Open parquet files, tar files in the manner of WebDataset, or a data set of the Hub for reading in order.

    Nothing is copied to a cache. A folder of images needs no stream: its files are read one by one anyway.

    Args:
        data: A file, a folder of files, a pattern, or the id of a data set on the Hub.
        split: Which part.
        image_column: Column with the images; default: the only one, or `image`.
        label_column: Integer or ClassLabel column; default `label` where it is one.

    Raises:
        FileNotFoundError: No such path or data set.
        MissingSplitError: No such part.
        ValueError: A folder of images or an embedded set, or no such column.
    """
    from datasets import ClassLabel, load_dataset
    from datasets import Image as ImageFeature

    found = None if data in EMBEDDED_SOURCES else _find_files(data, split)
    if data in EMBEDDED_SOURCES or (found is not None and found.kind == "images"):
        raise ValueError(f"'{data}' is read image by image as it is; leave out --streaming.")
    try:
        if found is None:
            table = _hub_part(_hub_tables(str(data), streaming=True), str(data), split)
        else:
            files = [str(file) for file in found.files]
            kind = "webdataset" if found.kind == "tar" else "parquet"
            table = load_dataset(kind, data_files=files, split="train", streaming=True)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{_does_not_exist(data)} As a data set on the Hub it could not be streamed either: {error}"
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
        if "__key__" in row:  # a tar file: the member's own name stays the same when shards are added
            id = f"{Path(row['__url__']).name}#{row['__key__']}.{column}"
        label = row[label_column] if label_column else None
        label = int(label) if isinstance(label, int) and label >= 0 else None
        try:
            data = _cell_bytes(row[column], id)
        except BadImageError:
            data = None
        yield StreamRecord(id, data, label)


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
