"""Image sources: folders, parquet and tar files, Hub data sets and built-in sets behind one `load_images`."""

import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .builtin import _digits, _image_tiles
from .decoding import ImageLimits, read_bytes, say_once
from .files import (
    _SUFFIXES,
    EMBEDDED_SOURCES,
    _does_not_exist,
    _Files,
    _kind_of,
    _outermost,
    _part,
    _select_split,
    _walk,
    splits_of,
)
from .source import ImageSource, MissingSplitError, Split, _FileNames, _stored_images, join_sources
from .tables import ImageStream, _choose_columns, _hub, _hub_split, _hub_tables, _parquet, _stream_shard
from .tar import _tar

logger = logging.getLogger(__name__)


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
        return _image_tiles(split)
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
        return _Files(path, kind, _select_split(path, files, splits_of(files, path), split), every, problems)
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
    parts = splits_of(images, root)
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
            table = _hub_split(_hub_tables(str(data), streaming=True), str(data), split)
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
