"""Find the files behind a path or pattern, and decide which split each belongs to."""

import difflib
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePath

import numpy as np
from PIL import Image

from .decoding import BadImageError, known_formats, say_once
from .source import MissingSplitError, Split, listed

logger = logging.getLogger(__name__)

BUILTIN = "builtin:"  # prefix with a colon, which no Hub id and hardly any folder has
BUILTIN_SETS = ("photos", "digits")
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
_CONTAINERS = {".parquet": "parquet", ".tar": "tar"}  # kinds of files that hold many images, by suffix
_COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
# Files that only this package or `Trainer` writes. A folder that contains all files of one of these sets is a run, a
# checkpoint, a bundle, features or a report, and the images in it are figures, not data.
_OUTPUTS = (
    {"resolved_recipe.yaml"}, {"trainer_state.json"}, {"modeling_regvit.py"}, {"extraction.json"},
    {"retrofit_report.json"}, {"report.json", "report.md"}, {"report.json", "report.html"}, {"comparison.json"},
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Files behind a path or pattern: `kind` is "images" or one of `_CONTAINERS`; `files` are those of kind and split.

    `every` are the files of that kind in all splits, `train` those of the training split, `others` are files of other
    types, `problems` the folders that cannot be listed, and `notes` sentences for the user about what is left out and
    how splits were recognized.
    """

    root: Path
    kind: str
    files: list[Path]
    every: list[Path] = field(default_factory=list)
    train: set[Path] = field(default_factory=set)

    others: list[Path] = field(default_factory=list)
    problems: tuple[BadImageError, ...] = ()
    notes: tuple[str, ...] = ()


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of the image formats that `open_image` decodes, as Pillow knows them, in lower case."""
    formats = {*known_formats(), "MPO"}  # MPO: several JPEG images in one file, the first of which is read
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def kind_of(file: PurePath) -> str:
    """Return "images", a kind of `_CONTAINERS`, or "other" by the suffix of a file."""
    suffix = file.suffix.lower()
    # Compressed archives do not allow random access; they count as tar here so that opening them raises an error.
    if file.name.lower().endswith(_COMPRESSED_TAR):
        return "tar"
    return "images" if suffix in image_suffixes() else _CONTAINERS.get(suffix, "other")


def is_hidden(name: str | PurePath) -> bool:
    """Return True for names that never hold data: `.hidden`, `._image.jpg`, and `__MACOSX/` in archives from a Mac."""
    parts = str(name).split("/")
    return any(part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in parts)


def parts_below(root: PurePath, files: Iterable[PurePath]) -> list[tuple[str, ...]]:
    """Return the parts of each file's path below `root`, ten times as fast as `relative_to`."""
    depth = len(root.parts)
    return [file.parts[depth:] for file in files]


# --- Finding


def find_files(data: str | Path, split: Split | None) -> Found | None:
    """Find the files behind a path or pattern; return None if `data` can only be the id of a Hub data set.

    An existing path is never treated as a pattern, even if its name contains `*`, `?` or `[`.

    Raises:
        FileNotFoundError: `data` is neither an existing path nor a possible Hub id, or no file matches the pattern.
        MissingSplitError: The source does not have the split.
        ValueError: The files are of other kinds, or `data` is a URL.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        return _in_folder(path, split)
    if path.is_file():
        return _single_files(data, path, [path], split)
    if "://" in str(data):
        raise ValueError(
            f"'{data}' is a URL, but only local files and Hub data sets can be read. Download it first, or give the "
            "id of a Hub data set, owner/name."
        )
    if any(sign in str(data) for sign in "*?["):
        anchor = next(parent for parent in path.parents if parent.is_dir())
        matches = sorted(file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file())
        matches = [file for file in matches if not is_hidden(file.relative_to(anchor))] or matches
        if not matches:
            raise FileNotFoundError(f"No file matches the pattern '{data}'.")
        return _single_files(data, anchor, matches, split)
    is_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", str(data)) is not None
    if not is_id or path.is_symlink() or (os.sep in str(data) and path.parent.is_dir()):
        raise FileNotFoundError(does_not_exist(data))
    return None


def does_not_exist(data: str | Path) -> str:
    """Return the message for a path that does not exist."""
    path = Path(data).expanduser().absolute()
    if path.is_symlink():
        return f"'{data}' is a link to '{path.readlink()}', which does not exist."
    parent = next(p for p in path.parents if p.is_dir())
    message = f"'{data}' does not exist. The nearest existing folder is '{parent}'."
    near = difflib.get_close_matches(str(data).removeprefix(BUILTIN), BUILTIN_SETS, n=1)
    return f"{message} Did you mean '{BUILTIN}{near[0]}'?" if near else message


def _in_folder(root: Path, split: Split | None) -> Found:
    every, problems, notes = walk(root)
    kinds = [kind_of(file) for file in every]
    # A pipe or a device never ends. Among images it is a bad image, which keeps its place in the report.
    special = {file for file, kind in zip(every, kinds) if kind != "images" and file.exists() and not file.is_file()}
    if special:
        names = listed([str(file.relative_to(root)) for file in sorted(special)])
        notes.append(f"'{root}': these are pipes or devices, not files, and are left out: {names}.")
    kinds = ["other" if file in special else kind for file, kind in zip(every, kinds)]
    kind = next((kind for kind in ("images", *_CONTAINERS.values()) if kind in kinds), "images")
    files = [file for file, its in zip(every, kinds) if its == kind]
    others = [file for file, its in zip(every, kinds) if its != kind]
    if files:
        notes += _notes_on_others(root, kind, others)
    if split is None or not files:
        return Found(root, kind, files, files, set(files), others, problems, tuple(notes))
    splits = splits_of(files, root)
    notes += _note_on_splits(root, files, splits)
    wanted, train = split_meant(splits, split, str(root)), split_meant(splits, "train", str(root))
    selected = [file for file, part in zip(files, splits, strict=True) if part == wanted]
    if not selected:
        looked = "', '".join(_SPLIT_NAMES[split])
        raise MissingSplitError(
            f"'{root}' has no {split} split. Looked for '{looked}', found {outermost(root, files)}. "
            "Add such a subfolder, or use split=None for all images."
        )
    trained = {file for file, part in zip(files, splits) if part == train}
    return Found(root, kind, selected, files, trained, others, problems, tuple(notes))


def _notes_on_others(root: Path, kind: str, others: Sequence[Path]) -> list[str]:
    notes = []
    if links := [file for file in others if file.is_symlink() and not file.exists()]:
        names = listed([str(file.relative_to(root)) for file in links])
        notes.append(f"'{root}': {len(links)} links lead to files or folders that do not exist: {names}.")
    if tables := [file.name for file in others if file.stem == "metadata" and kind == "images"]:
        notes.append(
            f"'{root}': '{tables[0]}' is not read; classes come from one subfolder per class. To use its columns, "
            "load the folder with datasets' `imagefolder` and save it as parquet."
        )
    counts = Counter(file.suffix.lower() or "without suffix" for file in others if file not in links)
    if counts:
        shown = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
        files = f"{kind.removesuffix('s')} files"
        notes.append(f"'{root}' is read as a folder of {files}. Files of other types are left out: {shown}.")

    return notes


def walk(root: Path) -> tuple[list[Path], tuple[BadImageError, ...], list[str]]:
    """Return all files below `root` in a fixed order, the folders that could not be listed, and notes.

    Symbolic links are followed; each folder is visited once, so loops end. Hidden files and folders, and folders that
    hold results of this package, are left out.
    """
    files: list[Path] = []
    problems: list[BadImageError] = []
    outputs: list[str] = []
    seen = set()

    def unreadable(error: OSError) -> None:
        reason = f"the folder cannot be listed: {error.strerror}"
        problems.append(BadImageError(str(error.filename), reason, "permission"))
        logger.warning("%s", problems[-1])

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=unreadable):
        status = os.stat(folder)  # noqa: PTH116 - os.walk returns strings, and names that are not UTF-8 stay intact
        is_output = Path(folder) != root and any(marks <= set(names) for marks in _OUTPUTS)
        if is_output:
            outputs.append(str(Path(folder).relative_to(root)))
        if is_output or (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
        files.extend(Path(folder, name) for name in names if not is_hidden(name))
    notes = [f"'{root}': results of this package are not read as data: {listed(outputs)}."] if outputs else []
    return sorted(files), tuple(problems), notes


def _single_files(data: str | Path, root: Path, files: list[Path], split: Split | None) -> Found:
    """Return a single file or the files of a pattern, which must be all parquet or all tar."""
    kinds = {kind_of(file) for file in files}
    if len(kinds) > 1 or not kinds <= {*_CONTAINERS.values()}:
        found = sorted({file.suffix for file in files})
        raise ValueError(
            f"'{data}' is a file of type '{found[0]}'. Expected a folder of images, parquet files or tar files."
        )
    if split == "validation":
        raise MissingSplitError(
            f"'{data}' consists of single files and has no validation split. Give the folder, or use split=None."
        )
    return Found(root, kinds.pop(), files)


# --- Splits


def stratified_split(labels: Sequence[int], *, held_out_share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split indices into training and held-out ones with the same class proportions.

    Args:
        labels: Class id of each image.
        held_out_share: Share of held-out images in (0, 1), rounded within each class, but with at least one image on
            each side. The only image of a class goes to the training side.
        seed: Random seed.

    Returns:
        Indices of the training images and of the held-out images, both ascending.
    """
    rng = np.random.default_rng(seed)
    values, held = np.asarray(labels), []
    for label in np.unique(values):
        members = rng.permutation(np.flatnonzero(values == label))
        count = min(max(round(len(members) * held_out_share), 1), len(members) - 1)
        held.extend(members[:count].tolist())
    held_out = set(held)
    return [i for i in range(len(values)) if i not in held_out], sorted(held_out)


@cache
def split_named(name: str, *, only_beginning: bool = False) -> str | None:
    """Return the split that a name such as `train2017`, `Testing` or `val_1` stands for; None if there is none.

    With `only_beginning`, the name may continue after the word for the split, as in `train-00001.tar`.
    """
    for split, names in _SPLIT_NAMES.items():
        words = "|".join(names)
        pattern = rf"({words})(?![a-z])" if only_beginning else rf"({words})([-_. ]?\d+)*$"
        if re.match(pattern, name.lower()):
            return split
    return None


def split_folders(paths: Sequence[tuple[str, ...]]) -> list[int | None]:
    """Return the depth of the folder that names the split of each file; None if there is none.

    Folders directly below the root are recognized by their name alone. Deeper folders count only if some of them hold
    training images and others held-out images; otherwise, a class called `dev` would be mistaken for a split.

    Args:
        paths: Parts of the path of each file below the root.
    """
    depths = [next((i for i, part in enumerate(parts[:-1]) if split_named(part)), None) for parts in paths]
    if 0 in depths:
        return [0 if depth == 0 else None for depth in depths]
    splits = {split_named(parts[depth]) for parts, depth in zip(paths, depths) if depth is not None}
    return depths if "train" in splits and len(splits) > 1 else [None] * len(paths)


def splits_of(files: Sequence[PurePath], root: PurePath) -> list[str | None]:
    """Return the split of each file: `train`, `validation`, `test` or None.

    The split is recognized by the name of a folder or, for parquet and tar files, by the beginning of the file name.
    `test` is a split only if there is also `train`; otherwise it is an ordinary name.
    """
    paths, found = parts_below(root, files), []
    for file, parts, depth in zip(files, paths, split_folders(paths), strict=True):
        if depth is not None:
            found.append(split_named(parts[depth]))
        else:
            is_shard = kind_of(file) in _CONTAINERS.values()
            found.append(split_named(file.name, only_beginning=True) if is_shard else None)
    return without_lonely_test(found)


def without_lonely_test(splits: list[str | None]) -> list[str | None]:
    """Return the splits, with None in place of `test` if no file is in `train`."""
    return splits if "train" in splits else [None if split == "test" else split for split in splits]


def _note_on_splits(root: Path, files: Sequence[Path], splits: Sequence[str | None]) -> list[str]:
    """Return a sentence about the contents of each split, or no sentence if all files are in splits of usual names."""
    paths, places = parts_below(root, files), []
    for parts, split, depth in zip(paths, splits, split_folders(paths), strict=True):
        by_name = split_named(parts[-1], only_beginning=True) if split and depth is None else None
        places.append(by_name or "/".join(parts[: (depth or 0) + 1]))
    counts = Counter(zip(splits, places))
    heldout = "validation" if "validation" in splits else "test"

    def shown(*wanted: str | None) -> str:
        names = [f"'{place}' ({count})" for (split, place), count in counts.items() if split in wanted]
        return ", ".join(names[:8]) + (" and others" if len(names) > 8 else "")

    train = "train" if "train" in splits else None
    left_out = shown(*({None, "test"} - {train, heldout}))
    unusual = {place for split, place in counts if split} - {name for names in _SPLIT_NAMES.values() for name in names}
    if not any(splits) or not (left_out or unusual):
        return []
    return [
        f"'{root}': training images: {shown(train) or 'none'}; held-out images: {shown(heldout) or 'none'}; left out: "
        f"{left_out or 'none'}."
    ]


def split_meant(parts: Collection[str | None], split: Split, name: str) -> str | None:
    """Return which of the values from `splits_of`, given as `parts`, marks the files of a split.

    Without `train`, the files in no split (None) are the training images. Without `validation`, `test` is used, with a
    warning about the data called `name`.
    """
    if split == "train":
        return "train" if "train" in parts else None
    if "validation" not in parts and "test" in parts:
        say_once(f"'{name}' has no validation split, so its test split is used as the held-out images.")
        return "test"
    return "validation"


def outermost(root: Path, files: Iterable[Path]) -> str:
    """Return the quoted names directly below `root`, as a list for messages."""
    return listed(sorted({parts[0] for parts in parts_below(root, files)}))
