"""An image source: random access to the images of a data set, with names, ids and classes."""

import logging
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from PIL import Image

from .decoding import BadImageError, ImageLimits, open_image

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

Split = Literal["train", "validation"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Reading:
    """Columns and limits with which a source is read; a column that is None is chosen by its type and name.

    `follow_paths` allows a table to name image files on this machine: only for tables that the user has built.
    """

    image_column: str | None = None
    label_column: str | None = None
    limits: ImageLimits = field(default_factory=ImageLimits)
    follow_paths: bool = False


class MissingSplitError(ValueError):
    """The source exists, but it does not have the requested split."""


def listed(names: Sequence[str]) -> str:
    """Return the first eight names in quotation marks for a message, and the number of the others."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(map(repr, names[:8])) + more


@dataclass(frozen=True)
class ImageRecord:
    """Image of a source with its metadata: RGB image, class id or None, and an id unique within the source."""

    image: Image.Image
    label: int | None
    id: str


@dataclass(frozen=True, repr=False)
class ImageSource:
    """Images by index, decoded on access. `labels` and `label_names` are None if the source has no classes.

    `table` holds the other columns of a parquet file or Hub data set (boxes, masks), in the same row order as the
    images. `encoded` returns the stored bytes of an image; it is None if the images are generated. `parts` are the
    sizes of the sources that were joined into this one, in order. `problems` describes what could not be listed:
    unreadable folders, truncated shards. `notes` are sentences on what was left out of the source, or taken in.
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
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        classes = "" if self.labels is None else f", {len(self.label_names or set(self.labels))} classes"
        return f"<{type(self).__name__} '{self.name}': {len(self)} images{classes}>"

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> ImageRecord:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Image index {index} is out of range: '{self.name}' has {len(self)} images.")
        index %= len(self)
        label = None if self.labels is None else self.labels[index]
        return ImageRecord(image=self.read(index), label=label, id=self.ids[index])

    def counted(self) -> str:
        """Return a phrase with the numbers of images and classes and the name of the source."""
        images = f"{len(self):,} image{'s' * (len(self) != 1)}"
        count = None if self.labels is None else len(set(self.labels))
        classes = "" if count is None else f" of {count} class{'es' * (count != 1)}"
        return f"{images}{classes} from '{self.name}'"

    def subset(self, indices: Sequence[int]) -> "ImageSource":
        """Return the images at `indices`, in that order, with the same label names."""
        indices = [int(i) for i in indices]
        return replace(
            self,
            ids=[self.ids[i] for i in indices],
            read=partial(read_at, self.read, indices),
            labels=None if self.labels is None else [self.labels[i] for i in indices],
            table=None if self.table is None else self.table.select(indices),
            encoded=None if self.encoded is None else partial(read_at, self.encoded, indices),
            parts=(),
        )


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
        notes=tuple(dict.fromkeys(note for source in sources for note in source.notes)),
    )


def _read_joined(reads: Sequence[Callable[[int], _T]], starts: list[int], index: int) -> _T:
    part = bisect_right(starts, index) - 1
    return reads[part](index - starts[part])


def read_at(read: Callable[[int], _T], indices: list[int], index: int) -> _T:
    """Read the item of a subset: `index` counts in the subset, `indices` has the places in the whole."""
    return read(indices[index])


def file_name(root: Path, ids: Sequence[str], index: int) -> str:
    """Return the name of image `index` of a folder in error messages: its full path."""
    return str(root / ids[index])


def row_name(source: str, ids: Sequence[str], index: int) -> str:
    """Return the name of image `index` of a table or shard in error messages."""
    return f"{source}, {ids[index].replace('row/', 'row ')}"


def stored_image(
    encoded: Callable[[int], bytes], called: Callable[[int], str], limits: ImageLimits, index: int
) -> Image.Image:
    """Decode stored image `index`, which is named `called(index)` in error messages."""
    return open_image(encoded(index), name=called(index), limits=limits)
