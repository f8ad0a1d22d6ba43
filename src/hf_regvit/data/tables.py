"""Images in tables: parquet files, data sets of the Hub, streams."""

import glob
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from .decoding import BadImageError, lfs_pointer, read_bytes, say_once
from .files import Found, does_not_exist, image_suffixes, split_meant, split_named, without_lonely_test
from .labels import plain
from .source import ImageSource, MissingSplitError, Reading, Split, listed, row_name, stored_image

if TYPE_CHECKING:
    import datasets


def parquet_table(found: Found, *, streaming: bool = False) -> Any:
    """Open parquet files as one table of `datasets`.

    Raises:
        ValueError: A file cannot be read, or `datasets` cannot read its path.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if chained := next((file for file in found.files if "::" in str(file)), None):
        raise ValueError(
            f"'{chained}' has '::' in its path, which `datasets` reads as a chain of URLs. Rename the file or folder."
        )
    try:
        # `datasets` memory-maps an Arrow copy in its cache folder, so files may be larger than memory. It takes names
        # for patterns.
        files = [glob.escape(str(file)) for file in found.files]
        return load_dataset("parquet", data_files=files, split="train", streaming=streaming)
    except (DatasetGenerationError, ValueError) as error:
        pointer = next((hint for file in found.files if (hint := lfs_pointer(file))), None)
        listing = ", ".join(file.name for file in found.files[:8])
        reason = pointer or error.__cause__ or error
        raise ValueError(f"'{found.root}' cannot be read as parquet ({listing}): {reason}") from error


def hub_table(data: str, split: Split | None, *, streaming: bool = False) -> Any:
    """Open one split of a Hub data set, `name` or `name:config`; None opens all of them.

    Raises:
        FileNotFoundError: There is no such data set, or the Hub cannot be reached.
        MissingSplitError: There is no such split; the message lists the existing ones.
        ValueError: The configuration is missing or unknown; the message lists the known ones.
    """
    from datasets import get_dataset_config_names, load_dataset

    name, _, config = data.partition(":")
    try:
        return _hub_split(load_dataset(name, config or None, streaming=streaming), data, split)
    except (FileNotFoundError, ConnectionError) as error:  # DatasetNotFoundError is a FileNotFoundError
        raise FileNotFoundError(
            f"{does_not_exist(data)} It could not be loaded as a Hub data set either: {error}"
        ) from error
    except (RuntimeError, tarfile.TarError) as error:  # such as a loading script, which is never run
        raise ValueError(f"The Hub data set '{data}' cannot be used: {error}") from error
    except ValueError as error:
        if not str(error).startswith(("Config name is missing", "BuilderConfig")):
            raise
        known = ", ".join(f"'{name}:{one}'" for one in get_dataset_config_names(name))
        problem = f"has no configuration '{config}'" if config else "has several configurations"
        raise ValueError(f"The Hub data set '{name}' {problem}. Choose one of {known}.") from error


def _hub_split(tables: Mapping[str, Any], data: str, split: Split | None) -> Any:
    """Select one split by the same names as for folders."""
    from datasets import concatenate_datasets

    parts = without_lonely_test([split_named(name) for name in tables])
    wanted = split_meant(parts, split, data) if split else None
    used = {"train" if "train" in parts else None, "validation" if "validation" in parts else "test"}
    if split and (left := [name for name, part in zip(tables, parts) if part not in used]):
        say_once(f"'{data}': the splits {listed(left)} are left out.")
    chosen = [table for table, part in zip(tables.values(), parts, strict=True) if split is None or part == wanted]
    if not chosen:
        raise MissingSplitError(
            f"The Hub data set '{data}' has no {split} split. Its splits are {', '.join(map(repr, tables))}. Use "
            "split=None for all images."
        )
    return chosen[0] if len(chosen) == 1 else concatenate_datasets(chosen)


def holds_images(feature: object) -> bool:
    """Return True for a column of encoded images: of images, of bytes, or of {bytes, path} as pandas writes it."""
    from datasets import Image as ImageFeature

    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"} and holds_images(feature["bytes"])
    return isinstance(feature, ImageFeature) or "binary" in str(getattr(feature, "dtype", ""))


def _is_text(feature: object) -> bool:
    return str(getattr(feature, "dtype", "")).endswith("string")


def _other_images(features: "datasets.Features", first_row: Callable[[], Mapping[str, Any]]) -> str:
    """Return sentences on columns that concern images but do not hold one per row."""
    found = []
    for column, feature in features.items():
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        if inner is not None and holds_images(inner):
            found.append(f"Column '{column}' holds lists of images; write one image per row (`explode` of pandas).")
        elif _is_text(feature):
            value = first_row().get(column)
            if isinstance(value, str) and PurePath(value).suffix.lower() in image_suffixes():
                found.append(
                    f"Column '{column}' holds paths such as '{value}', not images: give the folder of these files, or "
                    "store their bytes in the table."
                )
    return " ".join(["", *found])


def choose_columns(
    features: "datasets.Features", name: str, reading: Reading, first_row: Callable[[], Mapping[str, Any]]
) -> tuple[str, str | None]:
    """Return the names of the image column and of the label column, if any.

    Raises:
        ValueError: The column does not exist or is ambiguous; the message lists the columns.
    """
    from datasets import ClassLabel, Value

    candidates = [column for column, feature in features.items() if holds_images(feature)]
    column, label_column = reading.image_column, reading.label_column
    column = column or ("image" if "image" in candidates else candidates[0] if len(candidates) == 1 else None)
    if column is None or column not in candidates:
        hint = "" if candidates else _other_images(features, first_row)
        hint = hint or " Set image_column."
        raise ValueError(
            f"'{name}': {'no unique image column' if column is None else f'column {column!r} does not hold images'}. "
            f"Columns: {', '.join(features)}; with images: {', '.join(candidates) or 'none'}.{hint}"
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


def table_images(table: "datasets.Dataset", name: str, reading: Reading) -> ImageSource:
    """Create a source from a `datasets` table whose encoded images are decoded with `open_image`."""
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    features = table.features
    column, label_column = choose_columns(
        features,
        name,
        reading,
        lambda: table.select_columns([c for c in features if _is_text(features[c])])[0] if len(table) else {},
    )
    labels = names = None
    if label_column is not None:
        feature = features[label_column]
        labels = [-1 if value is None else value for value in table[label_column]]
        # On the Hub, unlabeled rows (in most test splits) have the label -1.
        labels = labels if min(labels, default=-1) >= 0 else None
        if labels is not None:
            is_named = isinstance(feature, ClassLabel)
            names = tuple(map(plain, feature.names)) if is_named else tuple(str(i) for i in range(max(labels) + 1))
    if isinstance(features[column], ImageFeature):
        table = table.cast_column(column, ImageFeature(decode=False))
    ids = [f"row/{i}" for i in range(len(table))]
    encoded = partial(_read_row, table.select_columns([column]), column, name, reading.follow_paths)
    read = partial(stored_image, encoded, partial(row_name, name, ids), reading.limits)
    others = table.remove_columns([column])
    return ImageSource(name, ids, read, labels, names, others if others.column_names else None, encoded)


def _read_row(table: "datasets.Dataset", column: str, name: str, follow_paths: bool, index: int) -> bytes:
    return cell_bytes(table[index][column], f"{name}, row {index}", follow_paths=follow_paths)


def cell_bytes(cell: Any, name: str, *, follow_paths: bool = False) -> bytes:
    """Return the encoded image in a cell: bytes, a path, or both as {bytes, path}.

    A path in a file from elsewhere could name any file of this machine. Without `follow_paths`, only files in the
    cache of `datasets` are read, which is where the library stores the images of Hub data sets.

    Raises:
        BadImageError: The cell is empty, or its file cannot be read or must not be.
    """
    from datasets import config

    if isinstance(cell, dict):
        cell = cell["bytes"] if cell["bytes"] is not None else cell.get("path")
    if isinstance(cell, str) and not follow_paths:
        caches = (config.HF_CACHE_HOME, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH)
        if not any(Path(cell).resolve().is_relative_to(Path(cache).resolve()) for cache in caches):
            raise BadImageError(name, f"it holds only the path '{cell}', not the bytes of the image", "blocked")
    if cell is None:
        raise BadImageError(name, "the cell is empty", "empty")
    return cell if isinstance(cell, bytes) else read_bytes(cell, name)


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


def table_stream(table: "datasets.IterableDataset", name: str, reading: Reading) -> ImageStream:
    """Create a stream of the images of a streamed table of `datasets`, which stay encoded."""
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    features = table.features or table._resolve_features().features
    column, label_column = choose_columns(features, name, reading, lambda: next(iter(table), {}))
    feature = features[label_column] if label_column else None
    names = tuple(map(plain, feature.names)) if isinstance(feature, ClassLabel) else None
    if isinstance(features[column], ImageFeature):
        table = table.cast_column(column, ImageFeature(decode=False))
    open_shard = partial(_stream_shard, table, name, column, label_column, reading.follow_paths)
    return ImageStream(name, table.num_shards, open_shard, names)


def _stream_shard(
    table: "datasets.IterableDataset", name: str, column: str, label_column: str | None, follow_paths: bool, shard: int
) -> Iterator[StreamRecord]:
    rows = table.shard(num_shards=table.num_shards, index=shard) if table.num_shards > 1 else table
    for number, row in enumerate(rows):
        id = f"{name}#shard{shard}/row{number}"
        if "__key__" in row:  # a tar file of the Hub: the member's name does not change when shards are added
            id = f"{Path(row['__url__']).name}#{row['__key__']}.{column}"
            if not number and row[column] is None:
                raise ValueError(
                    f"'{id}' does not exist: `datasets` takes the columns of a Hub data set of tar files from its "
                    f"first shard, which holds '{column}' images, unlike this one. Download the shards and stream "
                    "the folder; then columns are found in each shard."
                )
        label = row[label_column] if label_column else None
        label = int(label) if isinstance(label, int) and label >= 0 else None
        try:
            data = cell_bytes(row[column], id, follow_paths=follow_paths)
        except BadImageError:
            data = None
        yield StreamRecord(id, data, label)
