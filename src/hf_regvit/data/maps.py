"""Loading and checking of images with a map of the same size: the class id or the depth of every pixel.

    train = load_masks("camvid", split="train", ignore_values=(11, 255))
    print(check_targets(train).summary())  # before training
    record, mask = train[0], train.target(0)  # RGB image; (H, W) class ids, 255 where a pixel is ignored

A `DenseSource` is an `ImageSource` (images by index, ids, subsets) that also gives the map of every image. Maps come
from a column of a parquet file or Hub data set, or from a folder next to the images, paired by name.

Shape letters: H and W pixels, C classes.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..models.saving import read_json
from .decoding import BadImageError, ImageLimits, image_facts, open_map, read_bytes
from .files import split_meant, splits_of, walk
from .labels import plain
from .loading import load_images, open_source
from .source import ImageSource, MissingSplitError, Reading, Split, read_at, row_name
from .tables import cell_bytes, holds_images

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

Array = NDArray[Any]
Kind = Literal["masks", "depth"]

IGNORE = 255  # class id of ignored pixels in all results of this module
_LARGEST = 65535  # largest stored value of a class
_NAMED_ROWS = 5  # rows that an error names for each kind of problem
_IMAGE_FOLDERS = ("images", "image", "imgs")
_MAP_FOLDERS: dict[Kind, tuple[str, ...]] = {
    "masks": ("masks", "mask", "annotations", "labels"),
    "depth": ("depth", "depths", "depth_maps"),
}
_MAP_COLUMNS: dict[Kind, tuple[str, ...]] = {
    "masks": ("mask", "annotation", "label", "segmentation"),
    "depth": ("depth", "depth_map", "label"),
}
_NAMES_FILES = ("classes.json", "id2label.json")
_MAP_SUFFIXES = (".png", ".tif", ".tiff", ".npy", ".bmp", ".webp", ".gif")


class DenseDataError(ValueError):
    """Masks or depth maps that cannot be used for training; the message names the rows."""


# --- Meaning of stored values


@dataclass(frozen=True)
class MaskFormat:
    """Mapping from stored values to classes.

    Args:
        names: Names of the C classes, in the order of their ids.
        values: Stored value of each class. Ids follow this order: values 1 and 2 become ids 0 and 1.
        ignore_values: Stored values of ignored pixels; they become 255.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    ignore_values: tuple[int, ...] = (IGNORE,)

    def __post_init__(self) -> None:
        if len(self.names) != len(self.values) or len(set(self.values)) != len(self.values):
            raise ValueError(
                f"Got {len(self.names)} names and values {self.values}; expected a unique value per name."
            )
        if len(self.names) > IGNORE:
            raise ValueError(f"There are {len(self.names)} classes, but at most {IGNORE} are supported.")
        if wrong := [value for value in self.values if value not in range(_LARGEST + 1)]:
            raise ValueError(
                f"The stored values {wrong[:5]} cannot be classes; expected integers from 0 to {_LARGEST}."
            )
        if both := sorted(set(self.values) & set(self.ignore_values)):
            raise ValueError(
                f"The stored values {both} are both classes and ignored. Remove them from values or ignore_values."
            )

    def unknown(self, stored: Array) -> list[int]:
        """Return the stored values that are neither classes nor ignored, sorted."""
        return sorted(set(np.unique(stored).tolist()) - set(self.values) - set(self.ignore_values))

    def ids(self, stored: Array) -> Array:
        """Convert stored values to (H, W) uint8 class ids; ignored and unknown values become 255."""
        stored = _whole_numbers(stored)
        outside = (stored < 0) | (stored > _LARGEST)  # outside the lookup table; -1 often marks ignored pixels
        if not stored.size or stored.dtype.kind == "f" or self.unknown(stored[outside]):
            found = self.unknown(stored)[:5]
            raise DenseDataError(f"The mask holds the values {found}; expected integers from 0 to {_LARGEST}.")
        table = np.full(_LARGEST + 1, IGNORE, dtype=np.uint8)
        table[list(self.values)] = np.arange(len(self.values))
        return np.where(outside, np.uint8(IGNORE), table[np.where(outside, 0, stored)])


def _whole_numbers(stored: Array) -> Array:
    """Convert class values stored as floats (1.0) to integers; return other values unchanged."""
    whole = stored.dtype.kind == "f" and np.isfinite(stored).all() and (stored == np.rint(stored)).all()
    return stored.astype(np.int64) if whole else stored


@dataclass(frozen=True)
class DepthFormat:
    """Mapping from stored values to depths.

    Args:
        scale: Meters per stored unit: 0.001 for millimeters, 1/256 for KITTI. None: 0.001 for integers, which is the
            unit of most 16-bit depth images, and 1 for floats.
        max_depth: Largest valid depth in meters (65.535 often marks a missing measurement).
    """

    scale: float | None = None
    max_depth: float = 10.0

    def __post_init__(self) -> None:
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"depth_scale={self.scale} must be above 0; it is in meters per stored unit.")
        if not self.max_depth > 0:
            raise ValueError(f"max_depth={self.max_depth} must be above 0; it is in meters.")

    def meters(self, stored: Array) -> Array:
        """Convert stored values to (H, W) float32 meters; 0 where there is no depth. `max_depth` is not applied."""
        scale = self.scale if self.scale is not None else (0.001 if stored.dtype.kind in "iu" else 1.0)
        values = stored.astype(np.float32) * np.float32(scale)
        return np.where(np.isfinite(values) & (values > 0), values, np.float32(0))


# --- Sources


@dataclass(frozen=True, repr=False, kw_only=True)
class DenseSource(ImageSource):
    """Images, each with a map.

    Args in addition to those of `ImageSource`:
        kind: "masks" or "depth".
        stored: Function that returns the stored map of an image, (H, W).
        map_name: Function that returns the name of that map for error messages.
        format: Meaning of the stored values.
    """

    kind: Kind
    stored: Callable[[int], Array]
    map_name: Callable[[int], str]
    format: MaskFormat | DepthFormat = field(default_factory=DepthFormat)

    def target(self, index: int) -> Array:
        """Return (H, W) uint8 class ids with 255 for ignored pixels, or float32 meters with 0 for missing depth.

        Raises:
            BadImageError: The map cannot be read.
        """
        stored = self.stored(index)
        if isinstance(self.format, MaskFormat):
            return self.format.ids(stored)
        meters = self.format.meters(stored)
        return np.where(meters <= self.format.max_depth, meters, np.float32(0))

    @property
    def targets(self) -> Sequence[Array]:
        """All maps by index, read on access."""
        return _Targets(self)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes of masks; empty for depth."""
        return self.format.names if isinstance(self.format, MaskFormat) else ()

    def subset(self, indices: Sequence[int]) -> "DenseSource":
        """Return the images at `indices`, in that order, with their maps."""
        indices = [int(i) for i in indices]
        stored, named = partial(read_at, self.stored, indices), partial(read_at, self.map_name, indices)
        return replace(super().subset(indices), stored=stored, map_name=named)  # type: ignore


class _Targets(Sequence[Array]):
    def __init__(self, source: DenseSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Array:  # type: ignore[override]  # slices are not needed
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.source.target(index % len(self))


def load_masks(
    data: str | Path,
    *,
    split: Split | None = "train",
    mask_format: MaskFormat | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    ignore_values: Sequence[int] | None = None,
    reduce_labels: bool = False,
    image_column: str | None = None,
    mask_column: str | None = None,
    limits: ImageLimits | None = None,
) -> DenseSource:
    """Load images with masks of class ids.

    Args:
        data: Parquet file, folder of them or Hub data set with an image and a mask column; or a folder with `images/`
            and `masks/` (also `annotations/`, `labels/`), paired by name, with `train/` and `validation/` above or
            below.
        split: "train", "validation", or None for all images.
        mask_format: Format of another split of the same data, to use the same class ids; the next three arguments are
            then ignored.
        class_names: Names by stored value: a mapping, or a list that begins at 0 (at 1 with `reduce_labels`). Default:
            `classes.json` or `id2label.json` in the folder; without such a file, the values that occur are the names.
        ignore_values: Stored values of ignored pixels. Default: 255, unless it has a name.
        reduce_labels: True if 0 is background to ignore, and the first class is stored as 1 (ADE20k).
        image_column: Image column. Default: the only image column, or `image`.
        mask_column: Mask column. Default: the only other image column, or one called `mask`, `annotation` or `label`.
        limits: Limits that images must satisfy.

    Raises:
        FileNotFoundError: The path or Hub data set does not exist.
        MissingSplitError: The data does not have the split.
        DenseDataError: There are no masks, or images and masks cannot be paired.
        ValueError: There are no usable images, or the names do not match the values.
    """
    source = _load(data, "masks", split, Reading(image_column, mask_column, limits or ImageLimits()))
    if mask_format is None:
        names = class_names if class_names is not None else _names_beside(Path(data))
        mask_format = _mask_format(source, names, ignore_values, reduce_labels=reduce_labels)
    return replace(source, format=mask_format)


def load_depth(
    data: str | Path,
    *,
    split: Split | None = "train",
    depth_scale: float | None = None,
    max_depth: float = 10.0,
    image_column: str | None = None,
    depth_column: str | None = None,
    limits: ImageLimits | None = None,
) -> DenseSource:
    """Load images with depth maps in meters.

    Args:
        data: Source as for `load_masks`; the folder of maps is called `depth`, and may hold 16-bit images, float TIFF
            or `.npy` files.
        split: "train", "validation", or None for all images.
        depth_scale: Meters per stored unit. Default: 0.001 for integers, 1 for floats.
        max_depth: Largest valid depth in meters.
        image_column: Image column. Default: the only image column, or `image`.
        depth_column: Depth column. Default: the only other image column, or one called `depth` or `depth_map`.
        limits: Limits that images must satisfy.

    Raises:
        FileNotFoundError: The path or Hub data set does not exist.
        MissingSplitError: The data does not have the split.
        DenseDataError: There are no depth maps, or images and maps cannot be paired.
        ValueError: There are no usable images.
    """
    meaning = DepthFormat(depth_scale, max_depth)
    source = _load(data, "depth", split, Reading(image_column, depth_column, limits or ImageLimits()))
    return replace(source, format=meaning)


def _load(data: str | Path, kind: Kind, split: Split | None, reading: Reading) -> DenseSource:
    root = Path(data).expanduser()
    if _has_image_folder(root):
        return _from_folder(root, kind, split, reading)
    source = load_images(data, split=split, image_column=reading.image_column, limits=reading.limits)
    if source.table is None:
        maps = "/ or ".join(_MAP_FOLDERS[kind])
        raise DenseDataError(
            f"'{data}' has images but no {kind}. Expected a folder that contains images/ and {maps}/, or a parquet "
            "file or data set with a second image column."
        )
    return _from_table(source, kind, reading.label_column)


# Folders


def has_masks(data: str | Path) -> bool:
    """Return True for a folder with `images/` and a folder of masks, there or below."""
    root = Path(data).expanduser()
    return _has_image_folder(root) and next(_maps_by_key(root, "masks"), None) is not None


def without_masks(source: ImageSource) -> ImageSource:
    """Return the images of a folder that has masks: those below `images/`, which are not classes."""
    kept = [i for i, id in enumerate(source.ids) if set(Path(id).parts[:-1]) & set(_IMAGE_FOLDERS)]
    return replace(source.subset(kept), labels=None, label_names=None)


def _has_image_folder(root: Path) -> bool:
    places = (root, *root.iterdir()) if root.is_dir() else ()
    return any((place / name).is_dir() for place in places for name in _IMAGE_FOLDERS)


def _from_folder(root: Path, kind: Kind, split: Split | None, reading: Reading) -> DenseSource:
    """Load a folder with `images/` next to `masks/`, or both inside `train/` and `validation/`."""
    everything = open_source(root, None, reading)
    pairs: dict[str, str] = {}  # from the id of an image to its path without suffix and without the folder "images"
    for id in everything.ids:
        parts = Path(id).parts
        place = next((i for i, part in enumerate(parts[:-1]) if part in _IMAGE_FOLDERS), None)
        if place is not None:
            pairs[id] = _key(parts, place)
    maps = dict(_maps_by_key(root, kind))
    part_of = _parts_by_key(root, [*pairs.values(), *maps])
    wanted = split_meant({part_of[key] for key in pairs.values()}, split, str(root)) if split else None
    if split is not None:
        pairs = {id: key for id, key in pairs.items() if part_of[key] == wanted}
        if not pairs:
            found = sorted({str(part) for part in part_of.values() if part}) or ["none"]
            raise MissingSplitError(
                f"'{root}' has no {split} split. Splits found: {', '.join(found)}. Add a folder for it, or use "
                "split=None for all images."
            )
    lonely = [id for id, key in pairs.items() if key not in maps]
    if lonely:
        raise DenseDataError(
            f"'{root}': {len(lonely)} of {len(pairs)} images have no file of the same name among the {kind}, such as "
            f"{', '.join(repr(id) for id in lonely[:3])}. {len(maps)} maps were found in folders named "
            f"{' or '.join(_MAP_FOLDERS[kind])} ({' '.join(_MAP_SUFFIXES)}). Add the missing maps, or remove "
            "these images."
        )
    index = {id: i for i, id in enumerate(everything.ids)}
    source = everything.subset([index[id] for id in pairs])
    files = [str(maps[pairs[id]]) for id in source.ids]
    used = set(pairs.values())
    left = [key for key in maps if key not in used and (split is None or part_of[key] == wanted)]
    if left:
        raise DenseDataError(
            f"'{root}': {len(left)} {kind} have no image of the same name, such as '{maps[left[0]].name}'. Remove "
            "them, or add the images."
        )
    # The folders "images" and "masks" are not classes; maps, which may be .npy files, are not left out.
    notes = tuple(note for note in source.notes if not note.startswith(f"'{root}' is read as a folder of"))
    source = replace(source, labels=None, label_names=None, notes=notes)
    return DenseSource(**vars(source), kind=kind, stored=partial(_read_file_map, files), map_name=files.__getitem__)


def _parts_by_key(root: Path, keys: Sequence[str]) -> dict[str, str | None]:
    """Return the split of each file, given by a folder above or below `images/`."""
    files = [root.joinpath(*(part for part in Path(key).parts if part != "*")) for key in keys]
    return dict(zip(keys, splits_of(files, root), strict=True))


def _maps_by_key(root: Path, kind: Kind) -> Iterator[tuple[str, Path]]:
    for file in walk(root)[0]:
        parts = file.relative_to(root).parts
        place = next((i for i, part in enumerate(parts[:-1]) if part in _MAP_FOLDERS[kind]), None)
        if place is not None and file.suffix.lower() in _MAP_SUFFIXES:
            yield _key(parts, place), file


def _key(parts: Sequence[str], place: int) -> str:
    """Return the path that an image and its map share, without suffix and without the folder "images" or "masks"."""
    return plain(Path(*parts[:place], "*", *parts[place + 1 :]).with_suffix("").as_posix())


def _read_file_map(files: Sequence[str], index: int) -> Array:
    return _decode_map(read_bytes(files[index], files[index]), files[index])


# Tables


def _from_table(source: ImageSource, kind: Kind, column: str | None) -> DenseSource:
    from datasets import Image as ImageFeature

    table = source.table
    assert table is not None  # `_load` has checked it
    features = table.features
    candidates = [
        name for name, feature in features.items() if holds_images(feature) or type(feature).__name__ == "Array2D"
    ]
    if column is None:
        column = next((name for name in _MAP_COLUMNS[kind] if name in candidates), None)
        column = candidates[0] if column is None and len(candidates) == 1 else column
    if column is None or column not in candidates:
        raise DenseDataError(
            f"'{source.name}': {'no unique column' if column is None else f'column {column!r} is not a column'} with "
            f"{kind}. Columns: {', '.join(features)}; with maps (images or arrays besides the image column): "
            f"{', '.join(candidates) or 'none'}. Set label_column."
        )
    if isinstance(features[column], ImageFeature):
        table = table.cast_column(column, ImageFeature(decode=False))
    table = table.select_columns([column])
    called = partial(_name_of_row, source.name, column, tuple(source.ids))
    stored = partial(_read_cell_map, table, column, called)
    return DenseSource(**vars(source), kind=kind, stored=stored, map_name=called)


def _name_of_row(source: str, column: str, ids: Sequence[str], index: int) -> str:
    return f"{row_name(source, ids, index)}, column {column}"


def _read_cell_map(table: "datasets.Dataset", column: str, called: Callable[[int], str], index: int) -> Array:
    cell = table[index][column]
    if isinstance(cell, list):
        return np.asarray(cell)
    return _decode_map(cell_bytes(cell, called(index)), called(index))


def _decode_map(data: bytes, name: str) -> Array:
    """Decode an image or NumPy file to (H, W) values.

    Raises:
        BadImageError: The data cannot be decoded, or has colors.
    """
    if data.startswith(b"\x93NUMPY"):
        try:
            values = np.load(BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise BadImageError(name, f"{error}", "corrupt") from error
    else:
        image = open_map(data, name=name, limits=ImageLimits(min_side=1))
        values = np.asarray(image)
        if image.mode == "RGB" and (values == values[..., :1]).all():
            values = values[..., 0]  # a gray image that was saved with three equal channels
        elif image.mode not in ("1", "L", "P", "I", "F") and not image.mode.startswith("I;16"):
            reason = (
                f"it has the color mode {image.mode}, expected a single channel. If colors encode classes, convert "
                "them to class ids first"
            )
            raise BadImageError(name, reason, "value range")
    if values.ndim != 2 or values.dtype.kind not in "biuf":
        raise BadImageError(name, f"it holds {values.shape} values of type {values.dtype}, expected (H, W)", "corrupt")
    return values.astype(np.uint8) if values.dtype == bool else values


# Names of classes


def _names_beside(data: Path) -> Mapping[int, str] | Sequence[str] | None:
    folder = data if data.is_dir() else data.parent
    file = next((folder / name for name in _NAMES_FILES if (folder / name).is_file()), None)
    return None if file is None else read_class_names(file)


def read_class_names(file: str | Path) -> Mapping[int, str] | Sequence[str]:
    """Read class names from a JSON file: a list, or a mapping from stored values to names.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file holds something else.
    """
    content = read_json(file)
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return tuple(content)
    if isinstance(content, dict) and all(key.lstrip("-").isdigit() for key in content):
        return {int(key): str(name) for key, name in content.items()}
    raise ValueError(f"'{file}' must hold a JSON list of names, or a mapping from stored values to names.")


def _mask_format(
    source: DenseSource,
    names: Sequence[str] | Mapping[int, str] | None,
    ignore_values: Sequence[int] | None,
    *,
    reduce_labels: bool,
) -> MaskFormat:
    first = 1 if reduce_labels else 0
    if names is None:
        ignored = set(ignore_values if ignore_values is not None else (IGNORE,)) | ({0} if reduce_labels else set())
        found: set[int] = set()
        for index in range(len(source)):
            with suppress(BadImageError):  # `check_targets` lists them all
                found.update(np.unique(_whole_numbers(source.stored(index))).tolist())
            if len(found) > IGNORE + 1:
                raise DenseDataError(
                    f"'{source.name}': the masks hold more than {IGNORE} different values up to "
                    f"'{source.map_name(index)}', so these cannot be classes. Lossy compression (JPEG) and "
                    "smooth resizing create such values; save masks losslessly and resize them by nearest neighbor."
                )
        kept = sorted(found - ignored)
        if not kept:
            raise DenseDataError(
                f"'{source.name}': the masks hold only values that are ignored, {sorted(found)}. Change ignore_values."
            )
        logger.info("'%s': no class names are given, so the values in the masks, %s, are used.", source.name, kept)
        return MaskFormat(tuple(str(value) for value in kept), tuple(kept), tuple(sorted(ignored)))
    named = dict(names) if isinstance(names, Mapping) else {first + i: name for i, name in enumerate(names)}
    if ignore_values is None:
        ignore_values = () if IGNORE in named else (IGNORE,)
    ignored = set(ignore_values) | ({0} if reduce_labels else set())
    classes = {value: name for value, name in sorted(named.items()) if value not in ignored}
    if not classes:
        raise ValueError(
            f"All {len(named)} named values are among the ignored values {sorted(ignored)}. Change one of the two."
        )
    return MaskFormat(tuple(classes.values()), tuple(classes), tuple(sorted(ignored)))


# --- Checks before training


@dataclass(frozen=True)
class TargetReport:
    """Statistics of the maps of a source.

    Args:
        kind: "masks" or "depth".
        num_images: Number of images.
        class_pixels: Number of pixels of each class by name, for masks.
        class_images: Number of images that contain each class by name, for masks.
        counted_share: Share of all pixels that have a class, or a valid depth up to `max_depth`.
        depth_range: Smallest, median (of the images' medians) and largest depth in meters, for depth.
    """

    kind: Kind
    num_images: int
    class_pixels: dict[str, int]
    class_images: dict[str, int]
    counted_share: float
    depth_range: tuple[float, float, float] | None

    def summary(self) -> str:
        """Return the report as one line."""
        if self.depth_range is not None:
            low, middle, high = self.depth_range
            return (
                f"{self.num_images} images, {self.counted_share:.1%} of the pixels have a valid depth, {low:.2f} to "
                f"{high:.2f} m, median {middle:.2f} m"
            )
        missing = [name for name, count in self.class_images.items() if not count]
        return (
            f"{self.num_images} images, {len(self.class_pixels)} classes, {self.counted_share:.1%} of the pixels have "
            "a class" + (f", classes without pixels: {', '.join(missing)}" if missing else "")
        )


def check_targets(source: DenseSource, *, several_classes: bool = True) -> TargetReport:
    """Read every map and compare it with its image and format.

    Args:
        source: Images with maps.
        several_classes: Whether to reject masks of a single class, from which nothing can be learned.

    Raises:
        DenseDataError: A map cannot be read, has a different size than its image, holds values that are not classes,
            or has no valid depth; or all pixels are of one class. The message lists all kinds with their first rows.
    """
    faults: dict[str, list[str]] = {}
    num_classes = len(source.class_names)
    pixels, images = np.zeros(num_classes, dtype=np.int64), np.zeros(num_classes, dtype=np.int64)
    counted = total = 0
    medians, extremes = [], []
    for index in range(len(source)):
        try:
            stored = source.stored(index)
            size = image_size(source, index)
        except BadImageError as error:
            faults.setdefault("cannot be read", []).append(str(error))
            continue
        name = source.map_name(index)
        if stored.shape[::-1] != size:
            text = f"'{name}' is {stored.shape[1]} x {stored.shape[0]}, its image {size[0]} x {size[1]}"
            faults.setdefault("have a different size than their image", []).append(text)
            continue
        total += stored.size
        if isinstance(source.format, MaskFormat):
            if wrong := source.format.unknown(stored):
                shown = ", ".join(str(value) for value in wrong[:5]) + (" ..." if len(wrong) > 5 else "")
                faults.setdefault("hold values that are not classes", []).append(f"'{name}' holds {shown}")
                continue
            ids = source.format.ids(stored)
            counts = np.bincount(ids[ids != IGNORE], minlength=num_classes)
            pixels += counts
            images += counts > 0
            counted += int(counts.sum())
            continue
        meters = source.format.meters(stored)
        known = meters[(meters > 0) & (meters <= source.format.max_depth)]
        if not known.size:
            beyond = meters.max(initial=0)
            text = f"'{name}' {f'begins at {meters[meters > 0].min():.4g} m' if beyond else 'is 0 everywhere'}"
            faults.setdefault(f"have no depth up to {source.format.max_depth:g} m", []).append(text)
            continue
        counted += known.size
        medians.append(float(np.median(known)))
        extremes.append((float(known.min()), float(known.max())))
    if faults:
        raise DenseDataError(_describe(faults, source))
    names = source.class_names
    if several_classes and names and (pixels > 0).sum() < 2:
        only = names[int(pixels.argmax())]
        raise DenseDataError(
            f"'{source.name}': all labeled pixels belong to one class, '{only}' ({pixels.max()} pixels; "
            f"{1 - counted / max(1, total):.1%} of all are ignored), but at least two are needed. If an ignored "
            f"value ({', '.join(map(str, source.format.ignore_values))}) is a class, give it a name."  # type: ignore[union-attr]
        )
    depth = None
    if medians:
        depth = (min(low for low, _ in extremes), float(np.median(medians)), max(high for _, high in extremes))
        _check_unit(source, depth)
    return TargetReport(
        kind=source.kind,
        num_images=len(source),
        class_pixels=dict(zip(names, pixels.tolist())),
        class_images=dict(zip(names, images.tolist())),
        counted_share=counted / max(1, total),
        depth_range=depth,
    )


def _check_unit(source: DenseSource, depth: tuple[float, float, float]) -> None:
    """Raise an error for a median below 1 cm, which indicates a wrong unit rather than a scene."""
    if depth[1] < 0.01:
        scale = getattr(source.format, "scale", None)
        raise DenseDataError(
            f"'{source.name}': half of the depths are below {depth[1]:.2g} m, so the unit is probably wrong. Set "
            f"depth_scale (meters per stored unit), which is {scale}; None means 0.001 for integers and 1 for floats."
        )


def image_size(source: ImageSource, index: int) -> tuple[int, int]:
    """Return (width, height) of the upright image, from its header only if it is stored in encoded form."""
    if source.encoded is None:
        return source.read(index).size
    facts = image_facts(source.encoded(index), name=str(source.ids[index]))
    return (facts.size[1], facts.size[0]) if facts.orientation >= 5 else facts.size


_ADVICE = {
    "cannot be read": "Replace or remove these rows.",
    "have a different size than their image": "Resize them by nearest neighbor, or pair them with the right images. "
    "Note that images are rotated as their EXIF data says, and maps are not.",
    "hold values that are not classes": "Name these values (class_names), ignore them (ignore_values), or set "
    "reduce_labels if 0 is background. Lossy compression (JPEG) and smooth resizing create such values.",
}


def _describe(faults: Mapping[str, Sequence[str]], source: DenseSource) -> str:
    what = "masks" if source.kind == "masks" else "depth maps"
    lines = []
    for fault, rows in faults.items():
        shown = "; ".join(rows[:_NAMED_ROWS]) + (f" and {len(rows) - _NAMED_ROWS} more" if rows[_NAMED_ROWS:] else "")
        advice = _ADVICE.get(fault, "Set depth_scale (meters per stored unit) or max_depth, or remove these rows.")
        lines.append(f"{len(rows)} of {len(source)} {what} {fault}: {shown}. {advice}")
    if isinstance(source.format, MaskFormat) and "hold values that are not classes" in faults:
        lines.append(
            f"Classes: {', '.join(f'{v} {n}' for v, n in zip(source.format.values[:12], source.format.names))}"
            f"{' ...' if len(source.format.names) > 12 else ''}; ignored: "
            f"{', '.join(map(str, source.format.ignore_values)) or 'nothing'}."
        )
    return f"'{source.name}': " + "\n".join(lines)
