"""Images with texts: where the texts of a data set are, and training items drawn by (seed, epoch, image)."""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..data.augmentation import random_crop_box, random_numbers, resize
from ..data.bad_images import BadImages
from ..data.decoding import BadImageError, say_once
from ..data.files import find_files
from ..data.loading import open_source
from ..data.parts import Parts, open_parts
from ..data.source import ImageSource, Reading
from ..data.tar import tar_texts
from ..training.run_folder import BAD_IMAGES
from ..training.samplers import first_usable
from .arguments import ImageTextArguments

_METADATA = ("metadata.jsonl", "metadata.csv")
_FLIP, _TEXT = 41, 42  # places in the random numbers of an image; 0 to 39 are those of the crop
_MOST_TEXTS = 100_000  # images whose texts train the tokenizer and are compared when a run is resumed


@dataclass(frozen=True)
class CaptionedImages:
    """Training images with their texts, and labeled images for the evaluation.

    Attributes:
        source: Training images.
        texts: Text, list of texts or None of each image.
        labeled: Labeled images; None if there are none.
        templates: Sentences with {} for a class name.
    """

    source: ImageSource
    texts: Sequence[object]
    labeled: Parts | None
    templates: Sequence[str]

    def texts_of(self, index: int) -> list[str]:
        """Return the texts of an image that are not empty."""
        value = self.texts[index]
        texts = value if isinstance(value, list) else [value]
        return [text.strip() for text in texts if isinstance(text, str) and text.strip()]

    def corpus(self) -> Iterator[str]:
        """Yield the texts of all images, or of 100,000 images at equal distances."""
        for index in range(0, len(self.source), max(1, len(self.source) // _MOST_TEXTS)):
            yield from self.texts_of(index)


def open_captioned(args: ImageTextArguments) -> CaptionedImages:
    """Open the images and texts that the arguments name.

    Raises:
        FileNotFoundError: A source does not exist.
        ValueError: There are no texts, or the labels cannot be used; see `open_parts`.
    """
    templates, options = args.templates or ["a photo of a {}."], args.subset("image_column", "label_column")
    source = open_source(args.data, "train", Reading(**options))
    texts = _texts_of(source, args)
    if texts is None and (args.templates is None or source.labels is None):
        columns = source.table.column_names if source.table is not None else "none"
        raise ValueError(
            f"'{args.data}' has no texts: no column text or caption (other columns: {columns}), no "
            f"{' or '.join(_METADATA)}, no .txt in tar files. Set text_column, or give labeled images and templates."
        )
    labeled, labeled_data = None, args.eval_data or (args.data if texts is None else None)
    if labeled_data is not None:
        labeled = open_parts(labeled_data, heldout_share=args.train_val_split, seed=args.seed, options=options)
        labeled.log()
        if labeled_data == args.data:  # without a validation split, images are held out from these
            source = labeled.train
            texts = None if texts is None else _texts_of(source, args)
    if texts is None:
        prompts = [class_prompts(name, templates) for name in source.label_names or ()]
        texts = [prompts[label] for label in source.labels or ()]
    return CaptionedImages(source, texts, labeled, templates)


def class_prompts(name: str, templates: Sequence[str]) -> list[str]:
    """Return the sentences on a class; underscores in its name become spaces."""
    return [template.replace("{}", name.replace("_", " ")) for template in templates]


def _texts_of(source: ImageSource, args: ImageTextArguments) -> Sequence[object] | None:
    """Return the texts of a column, of a metadata file or of tar files; None if there are none."""
    names = [args.text_column] if args.text_column else ["text", "caption"]
    found = find_files(args.data, "train")
    metadata = [file for file in found.others if file.name in _METADATA] if found and found.kind == "images" else []
    for note in () if metadata else source.notes:  # with metadata, they say that it is not read
        say_once(note)
    texts: Sequence[object] = []
    if source.table is not None:
        texts = next((source.table[name] for name in names if name in source.table.column_names), texts)
    elif found is not None and found.kind == "tar":
        texts = tar_texts(found, source.ids)
    elif found is not None and metadata:
        by_image: dict[str, list[object]] = {}
        for file in metadata:
            for image, text in _read_metadata(file, names):
                path = os.path.normpath(file.parent.relative_to(found.root) / image)
                by_image.setdefault(path, []).extend(text if isinstance(text, list) else [text])
        texts = [by_image.get(id) for id in source.ids]
    return texts if any(text is not None for text in texts) else None


def _read_metadata(file: Path, names: Sequence[str]) -> Iterator[tuple[str, object]]:
    """Yield the file name and the text of each entry of a metadata file.

    Raises:
        ValueError: An entry cannot be read, or has no file name or no text column; the message names it.
    """
    with file.open(encoding="utf-8-sig", newline="") as lines:
        entries = csv.DictReader(lines) if file.suffix == ".csv" else (line for line in lines if line.strip())
        for number, entry in enumerate(entries, 1):
            try:
                row: Any = json.loads(entry) if isinstance(entry, str) else entry
                yield row["file_name"] + "", row[next(name for name in names if name in row)]
            except (ValueError, TypeError, LookupError, StopIteration, RecursionError) as error:
                raise ValueError(
                    f"'{file}', entry {number}: {str(entry)[:80]!r} cannot be read; expected file_name and "
                    f"{' or '.join(names)}. Correct it, or set text_column."
                ) from error


class ImageTextDataset(Dataset[dict[str, Any]]):
    """Augmented images with one of their texts, indexed by the keys (epoch, index) of `EpochSampler`.

    An item has `pixel_values` (3, S, S) uint8 and `text`. Crop, flip and text are drawn from (seed, epoch, index). An
    image that cannot be read or has no text is recorded and replaced by another image with its own text.

    Args:
        images: Images with texts.
        args: Options of the run, of which the image size is the side S of the crops in pixels.
    """

    def __init__(self, images: CaptionedImages, args: ImageTextArguments) -> None:
        self.images, self.args = images, args.subset("seed", "image_size", "crop_scale", "flip_probability")
        record, count = args.folder / BAD_IMAGES, len(images.source)
        self.bad_images = BadImages(record, max_bad_share=args.max_bad_share, num_images=count)
        for problem in images.source.problems:
            self.bad_images.note(problem)

    def __len__(self) -> int:
        return len(self.images.source)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        seed, side, scale, flip = self.args.values()
        numbers, source = random_numbers(seed, *key, rows=1)[0].tolist(), self.images.source

        def read(index: int) -> dict[str, Any]:
            if not (texts := self.images.texts_of(index)):
                raise BadImageError(source.ids[index], "it has no text", "no text")
            image = source[index].image
            box = random_crop_box(image.size, numbers, scale=scale, aspect_ratio=(3 / 4, 4 / 3))
            pixels = torch.from_numpy(resize(np.asarray(image.crop(box)), side)).permute(2, 0, 1)
            pixels = pixels.flip(-1) if numbers[_FLIP] < flip else pixels
            return {"pixel_values": pixels.contiguous(), "text": texts[int(numbers[_TEXT] * len(texts))]}

        used, item = first_usable(read, key, seed=seed, count=len(self), bad_images=self.bad_images)
        return {**item, "sample_ids": used, "epochs": key[0]}
