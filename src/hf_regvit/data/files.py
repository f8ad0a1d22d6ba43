"""Find the image files of a folder and decide which split each belongs to."""

import difflib
import logging
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .decoding import BadImageError, say_once
from .source import MissingSplitError, Split, listed

logger = logging.getLogger(__name__)
EMBEDDED_SOURCES = ("photos", "digits")

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"})
# Image formats that this package does not decode; files of these types are left out with a warning, not silently.
_UNSUPPORTED_SUFFIXES = frozenset(
    {".heic", ".heif", ".jxl", ".jp2", ".svg", ".eps", ".pdf", ".psd", ".dng", ".cr2", ".nef"}
)
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


@dataclass(frozen=True)
class _Files:
    """Files behind a path or pattern: `kind` is "images", "parquet" or "tar"; `files` are those of the split."""

    root: Path
    kind: str
    files: list[Path]
    everything: list[Path]
    problems: tuple[BadImageError, ...] = ()


def _does_not_exist(data: str | Path) -> str:
    parent = next(p for p in Path(data).expanduser().absolute().parents if p.is_dir())
    message = f"'{data}' does not exist. The nearest existing folder is '{parent}'."
    near = difflib.get_close_matches(str(data), EMBEDDED_SOURCES, n=1)
    return f"{message} Did you mean '{near[0]}'?" if near else message


def _kind_of(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix in _SUFFIXES:
        return "images"
    if suffix in _UNSUPPORTED_SUFFIXES:
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


def splits_of(files: Sequence[Path], root: Path) -> list[str | None]:
    """Return the split of each file: `train`, `validation`, `test` or None.

    It is recognized by the outermost folder below `root` or, for parquet and tar files, by the beginning of the file
    name. `test` is a split only if there is also `train`; otherwise it is an ordinary name.
    """
    return _without_lonely_test([_split_named(file, root) for file in files])


def _split_named(file: Path, root: Path) -> str | None:
    parts = file.relative_to(root).parts
    for part, names in _SPLIT_NAMES.items():
        if len(parts) > 1 and parts[0].lower() in names:
            return part
        named = _kind_of(file) in ("parquet", "tar")
        if named and re.match(rf"({'|'.join(names)})(?![a-z])", file.name.lower()):
            return part
    return None


def _without_lonely_test(parts: list[str | None]) -> list[str | None]:
    return parts if "train" in parts else [None if part == "test" else part for part in parts]


def split_meant(parts: Collection[str | None], split: Split, name: str) -> str | None:
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
    wanted = split_meant(parts, split, str(root))
    return [file for file, part in zip(files, parts, strict=True) if part == wanted]


def _select_split(root: Path, files: list[Path], parts: list[str | None], split: Split | None) -> list[Path]:
    selected = _part(root, files, parts, split)
    if split is not None and not selected:
        looked = "', '".join(_SPLIT_NAMES[split])
        raise MissingSplitError(
            f"'{root}' has no {split} split. Looked for '{looked}', found {_outermost(root, files)}. "
            "Add such a subfolder, or use split=None for all images."
        )
    return selected


def _outermost(root: Path, files: Sequence[Path]) -> str:
    return listed(sorted({file.relative_to(root).parts[0] for file in files}))
