"""Classes of images that are stored as files: by folder, or by a `.cls` or `.json` file of the same name."""

import json
import unicodedata
from collections.abc import Collection, Mapping, Sequence

LABEL_SUFFIXES = (".cls", ".json")
MOST_LABEL = 2**20  # bytes that are read of a file with a label
_KEYS = ("label", "cls", "class", "class_name", "target")  # of labels in a JSON file


def plain(name: str) -> str:
    """Return a name in the Unicode form NFC, so that names that look equal are equal. Macs write file names in NFD."""
    return unicodedata.normalize("NFC", name)


def sample_key(name: str) -> str:
    """Return the path up to the first dot of its file name, which an image and its label share."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.split('.')[0]}"


def label_in_file(name: str, content: bytes, label_column: str | None = None) -> int | str | None:
    """Return the class in a `.cls` or `.json` file, as a number or a name; None if it holds none."""
    try:
        value = json.loads(content) if name.endswith(".json") else content.decode().strip()
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        value = next((value[key] for key in ([label_column] if label_column else _KEYS) if key in value), None)
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    is_class = (isinstance(value, str) and value) or (isinstance(value, int) and not isinstance(value, bool))
    return value if is_class else None


def add_label(labels: dict[str, int | str], name: str, content: bytes, label_column: str | None) -> None:
    """Add the class in a `.cls` or `.json` file to `labels` by its name without suffix; `.cls` takes precedence."""
    stem, label = name.rpartition(".")[0], label_in_file(name, content, label_column)
    if label is not None and (stem not in labels or name.endswith(".cls")):
        labels[stem] = label


def label_of(name: str, labels: Mapping[str, int | str]) -> int | str | None:
    """Return the class of an image: that of the longest name before one of its dots, as `0001` of `0001.seg.png`."""
    folder, slash, file = name.rpartition("/")
    parts = file.split(".")
    stems = (folder + slash + ".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
    return next((labels[stem] for stem in stems if stem in labels), None)


def number_classes(
    classes: Sequence[int | str | None], known: Sequence[int | str | None] = ()
) -> tuple[list[int] | None, tuple[str, ...] | None]:
    """Return class ids and class names; (None, None) if an image has no class.

    Args:
        classes: Numbers or names. Numbers are ids and name themselves; names are numbered in alphabetical order.
        known: Classes of the training images, which are numbered first, so that the ids are the same in each split.
    """
    if None in classes or not classes or None in known:
        return None, None
    if all(isinstance(name, int) for name in (*classes, *known)):
        numbers = [number for number in classes if isinstance(number, int)]
        return numbers, tuple(map(str, range(max(int(number or 0) for number in (*classes, *known)) + 1)))
    first, own = ({plain(str(name)) for name in part} for part in (known, classes))
    names = (*sorted(first), *sorted(own - first))
    position = {name: i for i, name in enumerate(names)}
    return [position[plain(str(name))] for name in classes], names


def classes_by_folder(paths: Sequence[tuple[str, ...]], split_depths: Sequence[int | None]) -> Sequence[str | None]:
    """Return the class of each file: the outermost folder, below its split folder if it has one.

    If there are none below the split folders, the outermost folders above them are the classes (`cat/train`,
    `dog/train`), provided that there are several.

    Args:
        paths: Parts of the relative path of each file.
        split_depths: Depth of the folder that names the split of each file, or None.
    """
    below = []
    for path, depth in zip(paths, split_depths, strict=True):
        parts = path if depth is None else path[depth + 1 :]
        below.append(plain(parts[0]) if len(parts) > 1 else None)
    above = [plain(path[0]) if depth else None for path, depth in zip(paths, split_depths)]
    return above if not any(below) and None not in above and len(set(above)) > 1 else below


def note_on_names(name: str, folders: Collection[str]) -> list[str]:
    """Return a sentence if names differ in their Unicode form only after normalization."""
    changed = sorted({plain(folder) for folder in folders if plain(folder) != folder})
    if not changed:
        return []
    return [f"'{name}': names are compared in the Unicode form NFC, such as '{changed[0]}', which is stored as NFD."]
