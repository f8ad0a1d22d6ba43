"""Turn images of any kind into batches for a model, and report those that were skipped."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..models.processing import EvaluationTransform
from .decoding import BadImageError, open_image
from .loading import load_images
from .source import ImageSource
from .tables import ImageStream, table_images

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SkippedImage:
    """Id of an image that could not be used, and the reason."""

    id: str
    reason: str


@dataclass(frozen=True)
class _ImageItems:
    """Ordered images that are opened one at a time; `total` is None for a stream."""

    name: str
    items: Callable[[], Iterator[tuple[str, Callable[[], Image.Image]]]]
    total: int | None


def _pictures(images: Any) -> _ImageItems:
    """Wrap any supported kind of input in one interface."""
    if isinstance(images, str | Path):
        images = load_images(images, split=None)
    library = type(images).__module__.split(".")[0]
    if library == "datasets" and hasattr(images, "num_rows") and not isinstance(images, dict):
        images = table_images(images, "the dataset")
    if isinstance(images, ImageSource):
        source = images
        return _ImageItems(
            source.name,
            lambda: ((source.ids[i], partial(_image_of, source, i)) for i in range(len(source))),
            len(source),
        )
    if isinstance(images, ImageStream):
        return _ImageItems(images.name, partial(_stream_items, images), None)
    if library == "datasets" and not isinstance(images, dict):
        return _ImageItems("the stream", partial(_row_items, images), None)
    if isinstance(images, Sequence):
        wrong = next((image for image in images if not isinstance(image, str | Path | Image.Image)), None)
        if wrong is None:
            names = [f"image/{i}" if isinstance(x, Image.Image) else str(x) for i, x in enumerate(images)]
            listed = list(zip(names, images))
            return _ImageItems(
                "the list", lambda: ((n, partial(open_image, x, name=n)) for n, x in listed), len(images)
            )
        images = wrong
    raise TypeError(
        f"images holds a {type(images).__name__}, expected a folder, a list of paths or Pillow images, an "
        "ImageSource or ImageStream, or one split of a `datasets` dataset. Pass pixel tensors to read_tokens instead."
    )


def _image_of(source: ImageSource, index: int) -> Image.Image:
    return source[index].image


def _stream_items(stream: ImageStream) -> Iterator[tuple[str, Callable[[], Image.Image]]]:
    for shard in range(stream.num_shards):
        for record in stream.open_shard(shard):
            yield record.id, partial(open_image, record.data or b"", name=record.id)


def _row_items(stream: Any) -> Iterator[tuple[str, Callable[[], Image.Image]]]:
    from datasets import Image as ImageFeature

    features = stream.features or {}
    columns = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    for column in columns:  # keep images encoded, so that a broken image does not stop the iteration
        stream = stream.cast_column(column, ImageFeature(decode=False))
    columns = columns or [name for name, feature in features.items() if "binary" in str(getattr(feature, "dtype", ""))]
    column = "image" if "image" in columns or not columns else columns[0]
    for i, row in enumerate(stream):
        if column not in row:
            raise ValueError(
                f"The stream has no image column; its columns are {', '.join(row)}. Rename one of them to 'image'."
            )
        cell = row[column]
        if isinstance(cell, dict):
            cell = cell["bytes"] if cell["bytes"] is not None else cell["path"]
        yield f"row/{i}", partial(open_image, b"" if cell is None else cell, name=f"row/{i}")


class PreparedImages:
    """Iterable of batches of normalized pixels, as (ids, (B, 3, H, W)).

    The order of the images is kept. A batch contains images of a single size, so a change of size starts a new batch.
    Images that cannot be used are left out and listed in `skipped`. Only one batch is in memory at a time.
    """

    def __init__(self, pictures: _ImageItems, transform: EvaluationTransform, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is too small. Use at least 1.")
        self._pictures, self.transform, self.batch_size = pictures, transform, batch_size
        self.name, self.total = pictures.name, pictures.total  # total is None for a stream
        self.skipped: list[SkippedImage] = []

    def __iter__(self) -> Iterator[tuple[list[str], torch.Tensor]]:
        num_used = 0
        for ids, pixel_values in self.batches():
            num_used += len(ids)
            yield ids, pixel_values
        report_skipped(num_used, self.skipped, self.name)

    def ids(self) -> Iterator[str]:
        """Iterate over the ids of all images, usable or not, without opening them."""
        return (name for name, _ in self._pictures.items())

    def parts(self, size: int) -> Iterator["PreparedImages"]:
        """Split the images into portions of `size`, which are opened only when a portion is iterated."""
        items = self._pictures.items()
        while portion := list(islice(items, size)):
            pictures = _ImageItems(self.name, partial(iter, portion), len(portion))
            yield PreparedImages(pictures, self.transform, self.batch_size)

    def batches(self) -> Iterator[tuple[list[str], torch.Tensor]]:
        """Iterate over the batches like `__iter__`, but without the final `report_skipped`."""
        self.skipped.clear()
        ids: list[str] = []
        pixels: list[torch.Tensor] = []
        for name, read in self._pictures.items():
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
    images: Any,
    transform: EvaluationTransform,
    *,
    batch_size: int = 32,
    max_images: int | None = None,
    seed: int | None = None,
) -> PreparedImages:
    """Prepare batches of pixels from images of any supported kind.

    Args:
        images: Folder, list of paths or Pillow images, `ImageSource`, `ImageStream`, or `datasets` dataset (also
            streaming).
        transform: Transform of the images, usually `EvaluationTransform.for_model(model)`.
        batch_size: Number of images per batch.
        max_images: Maximum number of images, or None for all.
        seed: Random seed to draw `max_images` images, keeping their order. With None, and for streams, the first
            images are used.

    Raises:
        TypeError: `images` is of another kind.
        ValueError: `batch_size` or `max_images` is below 1, or (at the end of the iteration) no image could be used.
    """
    pictures = _pictures(images)
    if max_images is not None:
        if max_images < 1:
            raise ValueError(f"max_images={max_images} is too small. Use at least 1, or None for all images.")
        pictures = _some(pictures, max_images, seed)
    return PreparedImages(pictures, transform, batch_size)


def _some(pictures: _ImageItems, max_images: int, seed: int | None) -> _ImageItems:
    if pictures.total is None or pictures.total <= max_images or seed is None:
        total = None if pictures.total is None else min(pictures.total, max_images)
        return _ImageItems(pictures.name, lambda: islice(pictures.items(), max_images), total)
    drawn = set(np.random.default_rng(seed).permutation(pictures.total)[:max_images].tolist())
    return _ImageItems(
        pictures.name, lambda: (item for i, item in enumerate(pictures.items()) if i in drawn), max_images
    )
