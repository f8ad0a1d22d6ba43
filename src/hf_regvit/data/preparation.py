"""Turn images of any kind into batches for a model, and report those that were skipped."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from ..models.processing import EvaluationTransform, open_images
from ..models.tokens import TokenReader
from .decoding import BadImageError, open_image
from .loading import load_images
from .source import ImageSource, Reading
from .tables import ImageStream, table_images, table_stream

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SkippedImage:
    """Id of an image that could not be used, and the reason."""

    id: str
    reason: str


Item = tuple[str, Callable[[], Image.Image]]  # id of an image, and the function that opens it


@dataclass(frozen=True)
class _ImageItems:
    """Ordered images that are opened one at a time; `total` is None for a stream."""

    name: str
    items: Callable[[], Iterator[Item]]
    total: int | None


def _items_of(images: object) -> _ImageItems:
    """Wrap any supported kind of input in one interface."""
    if isinstance(images, str | Path):
        images = load_images(images, split=None)
    library = "" if isinstance(images, dict) else type(images).__module__.split(".")[0]
    if library == "datasets" and hasattr(images, "num_rows"):
        images = table_images(images, "the dataset", Reading(follow_paths=True))
    if isinstance(images, ImageSource):
        return _ImageItems(images.name, partial(_source_items, images), len(images))
    if isinstance(images, ImageStream):
        return _ImageItems(images.name, partial(_stream_items, images), None)
    if library == "datasets":
        return _ImageItems("the stream", partial(_row_items, images), None)
    if isinstance(images, Sequence):
        kinds = str | Path | Image.Image | np.ndarray | torch.Tensor
        wrong = next((image for image in images if not isinstance(image, kinds)), None)
        if wrong is None:
            return _ImageItems("the list", partial(_list_items, images), len(images))
        images = wrong
    raise TypeError(
        f"images holds a {type(images).__name__}, expected a folder, a list of paths, Pillow images, arrays or "
        "tensors, an ImageSource or ImageStream, or one split of a `datasets` dataset. Pass normalized pixels to "
        "read_tokens instead."
    )


def _source_items(source: ImageSource) -> Iterator[Item]:
    return ((id, partial(source.read, i)) for i, id in enumerate(source.ids))


def _list_items(images: Sequence[object]) -> Iterator[Item]:
    for i, image in enumerate(images):
        if isinstance(image, str | Path | Image.Image):
            name = f"image/{i}" if isinstance(image, Image.Image) else str(image)
            yield name, partial(open_image, image, name=name)
        else:
            yield f"image/{i}", partial(next, open_images([image]))


def _stream_items(stream: ImageStream) -> Iterator[Item]:
    for shard in range(stream.num_shards):
        for record in stream.open_shard(shard):
            yield record.id, partial(open_image, record.data or b"", name=record.id)


def _row_items(table: "datasets.IterableDataset") -> Iterator[Item]:
    if table.features is not None:
        stream = table_stream(table, "the stream", Reading(follow_paths=True))
        yield from ((f"row/{i}", read) for i, (_, read) in enumerate(_stream_items(stream)))
        return
    for i, row in enumerate(table):  # rows of a generator, whose types are not known
        if "image" not in row:
            raise ValueError(
                f"The stream has no image column; its columns are {', '.join(row)}. Rename one of them to 'image'."
            )
        cell = row["image"] or b""
        yield f"row/{i}", partial(open_image, cell.get("bytes") or cell["path"] if isinstance(cell, dict) else cell)


class PreparedImages:
    """Iterable of batches of normalized pixels, as (ids, (B, 3, H, W)).

    The order of the images is kept. A batch contains images of a single size, so a change of size starts a new batch.
    Images that cannot be used are left out and listed in `skipped`. Only one batch is in memory at a time.
    """

    def __init__(self, items: _ImageItems, transform: EvaluationTransform, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is too small. Use at least 1.")
        self._items, self.transform, self.batch_size = items, transform, batch_size
        self.name, self.total = items.name, items.total  # total is None for a stream
        self.skipped: list[SkippedImage] = []

    def __iter__(self) -> Iterator[tuple[list[str], torch.Tensor]]:
        num_used = 0
        for ids, pixel_values in self.batches():
            num_used += len(ids)
            yield ids, pixel_values
        report_skipped(num_used, self.skipped, self.name)

    def ids(self) -> Iterator[str]:
        """Iterate over the ids of all images, usable or not, without opening them."""
        return (name for name, _ in self._items.items())

    def parts(self, size: int) -> Iterator["PreparedImages"]:
        """Split the images into portions of `size`, which are opened only when a portion is iterated."""
        items = self._items.items()
        while portion := list(islice(items, size)):
            yield PreparedImages(
                _ImageItems(self.name, partial(iter, portion), len(portion)), self.transform, self.batch_size
            )

    def batches(self) -> Iterator[tuple[list[str], torch.Tensor]]:
        """Iterate over the batches like `__iter__`, but without the final `report_skipped`."""
        self.skipped.clear()
        ids: list[str] = []
        pixels: list[torch.Tensor] = []
        for name, read in self._items.items():
            try:
                pixel_values = self.transform(read())
            except BadImageError as error:
                self.skipped.append(SkippedImage(name, error.reason))
                continue
            if pixels and (len(pixels) == self.batch_size or pixels[0].shape != pixel_values.shape):
                yield ids, torch.stack(pixels)
                ids, pixels = [], []
            ids.append(name)
            pixels.append(pixel_values)
        if pixels:
            yield ids, torch.stack(pixels)


def report_skipped(num_used: int, skipped: Sequence[SkippedImage], name: str) -> None:
    """Warn if some images were skipped, and raise if none could be used.

    Args:
        num_used: Number of images that could be used.
        skipped: Images that could not be used.
        name: Name of the image source in the message.

    Raises:
        ValueError: `num_used` is 0.
    """
    shown = "; ".join(f"'{image.id}': {image.reason}" for image in skipped[:3])
    if not num_used:
        raise ValueError(
            f"None of the {len(skipped)} images of {name} can be used ({shown or 'it is empty'}). Check the files."
        )
    if skipped:
        logger.warning("%d of %d images were skipped (%s).", len(skipped), num_used + len(skipped), shown)


def prepare_images(
    images: object,
    transform: EvaluationTransform | TokenReader,
    *,
    batch_size: int = 32,
    max_images: int | None = None,
    seed: int | None = None,
) -> PreparedImages:
    """Prepare batches of pixels from images of any supported kind.

    Args:
        images: Folder, list of paths, Pillow images, arrays or tensors, `ImageSource`, `ImageStream`, or `datasets`
            dataset (also streaming).
        transform: Transform of the images, or the reader of a model whose own transform is used.
        batch_size: Number of images per batch.
        max_images: Maximum number of images, or None for all.
        seed: Random seed to draw `max_images` images, keeping their order. With None, and for streams, the first
            images are used.

    Raises:
        TypeError: `images` is of another kind.
        ValueError: `batch_size` or `max_images` is below 1, or (at the end of the iteration) no image could be used.
    """
    if isinstance(transform, TokenReader):
        transform = transform.transform
    items = _items_of(images)
    if max_images is not None:
        if max_images < 1:
            raise ValueError(f"max_images={max_images} is too small. Use at least 1, or None for all images.")
        items = _some(items, max_images, seed)
    return PreparedImages(items, transform, batch_size)


def _some(items: _ImageItems, max_images: int, seed: int | None) -> _ImageItems:
    if items.total is None or items.total <= max_images or seed is None:
        total = None if items.total is None else min(items.total, max_images)
        return _ImageItems(items.name, lambda: islice(items.items(), max_images), total)
    drawn = set(np.random.default_rng(seed).permutation(items.total)[:max_images].tolist())
    return _ImageItems(items.name, lambda: (item for i, item in enumerate(items.items()) if i in drawn), max_images)
