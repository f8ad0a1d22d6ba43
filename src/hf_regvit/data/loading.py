"""Image sources: folders, parquet and tar files, Hub data sets and built-in sets behind one `load_images`."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from .builtin import builtin_source
from .decoding import ImageLimits, read_bytes, say_once
from .files import BUILTIN, BUILTIN_SETS, Found, find_files, image_suffixes, outermost, parts_below, split_folders
from .labels import LABEL_SUFFIXES, MOST_LABEL, add_label, classes_by_folder, label_of, note_on_names, number_classes
from .source import ImageSource, MissingSplitError, Reading, Split, file_name, join_sources, listed, stored_image
from .tables import ImageStream, hub_table, parquet_table, table_images, table_stream
from .tar import stream_tar, tar_source

logger = logging.getLogger(__name__)

Data = str | Path | Sequence[str | Path]


def load_images(
    data: Data,
    *,
    split: Split | None = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    limits: ImageLimits | None = None,
) -> ImageSource:
    """Open one image source, or several as one.

    - `builtin:photos`: 64-pixel tiles of the 21 images bundled with scikit-image and scikit-learn. The left 70 % of
      each image gives 2,214 training tiles and the rest 719 held-out tiles; no pixel is in both splits. The label is
      the image that a tile comes from.
    - `builtin:digits`: scikit-learn's 1,797 handwritten digits at 32 px, with a fixed 80:20 split within each class.
    - A folder of images, nested at any depth. If every image is in a subfolder, the outermost subfolders are the
      classes; otherwise `.cls` or `.json` files named like the images may hold the classes. Folders called `train` and
      `validation` (also `training`, `val`, `valid`, `dev`, with a number as in `train2017`) at any depth are the
      splits; without them, all images are training images. A folder `test` or `testing` next to `train` is used as
      the held-out split if there is no validation folder. Hidden files and results of this package are left out.
    - A parquet file, or a folder of them; splits are recognized by the same words in file or folder names.
    - A tar file in WebDataset format (`000017.jpg`, `000017.cls`), or a folder of them, with splits as for parquet. An
      index of byte positions is built when the files are opened, for random access; nothing is unpacked.
    - A pattern of such files: `shards/train-*.tar`.
    - The id of a Hub data set whose splits use the same names; `owner/name:config` if it has several configurations.

    Several sources are concatenated: `["a", "b"]` has the images of `a`, then those of `b`, with the source's name as
    a prefix of each id. Labels are kept if all sources have the same classes.

    Args:
        data: One of the above, or a sequence of them. An existing path takes precedence over a pattern, a Hub id and
            the short names `photos` and `digits` of the built-in sets.
        split: `"train"`, `"validation"`, or None for all images.
        image_column: Image column of a parquet file or Hub data set. Default: `image`, or the only image column.
        label_column: Integer or ClassLabel column. Default: `label`, if it has one of these types.
        limits: Limits that images must satisfy when they are read. Default: `ImageLimits()`.

    Returns:
        Images with their ids and, if the source has them, their labels. Class ids are the same in both splits of a
        folder; classes without training images come last.

    Raises:
        FileNotFoundError: The path (the nearest existing parent is named) or the Hub data set does not exist.
        MissingSplitError: The source does not have the split. This is a kind of ValueError.
        ValueError: The source has no usable images, or the column does not exist; the message lists what was found.
    """
    reading = Reading(image_column, label_column, limits or ImageLimits())
    source = open_source(data, split, reading)
    for note in source.notes:
        say_once(note)
    return source


def open_source(data: Data, split: Split | None, reading: Reading) -> ImageSource:
    """Open sources as `load_images` does, but leave their `notes` to the caller instead of logging them."""
    if split not in (None, "train", "validation"):
        raise ValueError(f"Unknown split={split!r}. Use 'train', 'validation' or None (all images).")
    if isinstance(data, str | Path):
        return _open_one(data, split, reading)
    if len(data) != len(set(map(str, data))) or not data:
        raise ValueError(
            f"data={list(map(str, data))} is empty or has duplicates. Give one or more sources, each once."
        )
    sources, missing = [], []
    for one in data:
        try:
            sources.append(_open_one(one, split, reading))
        except MissingSplitError as error:  # not every source needs held-out images
            if split == "train":
                raise
            missing.append(error)
    if not sources:
        raise MissingSplitError(" ".join(map(str, missing)))
    return sources[0] if len(data) == 1 else join_sources(sources)


def _builtin_name(data: str | Path) -> str | None:
    """Return the name of the built-in set that `data` stands for; a path of that name takes precedence."""
    name = str(data).removeprefix(BUILTIN)
    if name not in BUILTIN_SETS or Path(data).exists():
        return None
    if name == str(data):
        say_once(f"'{name}' is the built-in data set, because no such path exists. Write '{BUILTIN}{name}' instead.")
    return name


def _open_one(data: str | Path, split: Split | None, reading: Reading) -> ImageSource:
    if name := _builtin_name(data):
        return builtin_source(name, split)
    found = find_files(data, split)
    if found is None:
        return table_images(hub_table(str(data), split), str(data), reading)
    if found.kind == "parquet":
        source = table_images(parquet_table(found), str(found.root), reading)
        return replace(source, problems=found.problems, notes=found.notes)
    if found.kind == "tar":
        return tar_source(found, reading)
    return _image_folder(found, reading)


def _image_folder(found: Found, reading: Reading) -> ImageSource:
    root, selected = found.root, found.files
    if not selected:
        raise ValueError(_why_no_images(found))
    paths = parts_below(root, found.every)
    by_folder = classes_by_folder(paths, split_folders(paths))
    class_of: dict[Path, int | str | None] = dict(zip(found.every, by_folder, strict=True))
    notes = [*found.notes]
    if None not in by_folder:
        notes += note_on_names(str(root), {part for parts in parts_below(root, selected) for part in parts[:-1]})
    elif sides := [file for file in found.others if file.suffix in LABEL_SUFFIXES and file.is_file()]:
        beside: dict[str, int | str] = {}
        for side in sides:
            with side.open("rb") as file:
                add_label(beside, str(side), file.read(MOST_LABEL), reading.label_column)
        class_of = {file: label_of(str(file), beside) for file in found.every}
    # Class ids must be the same in both splits, so the training split defines the classes if there is one.
    known = {class_of[file] for file in found.train}
    labels, names = number_classes([class_of[file] for file in selected], tuple(known))
    if labels and known and (extra := {class_of[file] for file in selected} - known):
        notes.append(f"'{root}': {len(extra)} classes have no training images: {listed(sorted(map(str, extra)))}.")

    ids = ["/".join(parts) for parts in parts_below(root, selected)]
    encoded = partial(_read_file, root, ids)
    read = partial(stored_image, encoded, partial(file_name, root, ids), reading.limits)
    return ImageSource(
        str(root), ids, read, labels, names, encoded=encoded, problems=found.problems, notes=tuple(notes)
    )


def _why_no_images(found: Found) -> str:
    root, others = found.root, found.others
    listing = f"{len(others)} other files ({outermost(root, others)})" if others else "nothing"
    names = {file.name for file in others}
    saved = " It was written by datasets' `save_to_disk`; load it with `load_from_disk`, save it with `to_parquet`."
    return (
        f"There are no images in '{root}' or its subfolders. Looked for {' '.join(sorted(image_suffixes()))}, "
        f".parquet and .tar; found {listing}.{saved if names & {'dataset_dict.json', 'state.json'} else ''}"
        f"{' '.join(('', *found.notes))}"
    )


def _read_file(root: Path, ids: list[str], index: int) -> bytes:
    return read_bytes(root / ids[index], str(root / ids[index]))


def stream_images(
    data: str | Path,
    *,
    split: Split = "train",
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageStream:
    """Open parquet files, tar files in WebDataset format, or a Hub data set for sequential reading.

    Nothing is copied to a cache. Image folders cannot be streamed and need not be: `load_images` does not read a file
    before its image is used.

    Args:
        data: File, folder of files, pattern, or the id of a Hub data set.
        split: `"train"` or `"validation"`.
        image_column: Image column, or for tar files the suffix of the images. Default: the column `image`, or the only
            image column; all images of tar files.
        label_column: Integer or ClassLabel column. Default: `label`, if it has one of these types.

    Raises:
        FileNotFoundError: The path or Hub data set does not exist.
        MissingSplitError: The source does not have the split.
        ValueError: `data` is a folder of images or a built-in set, or the column does not exist.
    """
    reading = Reading(image_column, label_column)
    found = None if (builtin := _builtin_name(data)) else find_files(data, split)
    if builtin or (found is not None and found.kind == "images"):
        raise ValueError(
            f"'{data}' cannot be streamed: only parquet files, tar files and Hub data sets can. Remove --streaming."
        )
    for note in () if found is None else found.notes:
        say_once(note)
    if found is not None and found.kind == "tar":
        return stream_tar(str(data), found.files, reading)
    table = hub_table(str(data), split, streaming=True) if found is None else parquet_table(found, streaming=True)
    return table_stream(table, str(data), reading)
