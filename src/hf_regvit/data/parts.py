"""Check that the splits of a labeled data set fit each other, and draw limited parts of them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from .loading import load_images
from .source import ImageSource, MissingSplitError

Data = str | Path | ImageSource


def _missing_part(error: MissingSplitError, task: str) -> ValueError:
    return ValueError(
        f"{error} Task '{task}' needs separate training and test images: give train_data, or a train_val_split such "
        "as 0.2 to hold out test images from this data."
    )


def _part(data: Data, split: Literal["train", "validation"] | None) -> ImageSource:
    """Load one split of the data, or all of it if that split does not exist."""
    if isinstance(data, ImageSource):
        return data
    try:
        return load_images(data, split=split)
    except MissingSplitError:
        return load_images(data, split=None)


def _some(source: ImageSource, max_images: int | None, seed: int, *, by_class: bool = True) -> ImageSource:
    if max_images is None or len(source) <= max_images:
        return source
    if by_class and source.labels is not None:
        return source.subset(_of_every_class(source.labels, max_images, seed))
    return source.subset(sorted(np.random.default_rng(seed).permutation(len(source))[:max_images].tolist()))


def _of_every_class(labels: Sequence[int], count: int, seed: int) -> list[int]:
    """Return `count` ascending indices: one per class first, then in proportion to the class sizes."""
    rng, values = np.random.default_rng(seed), np.asarray(labels)
    turn = np.empty(len(values))
    for label in np.unique(values):
        members = rng.permutation(np.flatnonzero(values == label))
        turn[members] = (np.arange(len(members)) + 0.5) / len(members)
        turn[members[0]] = 0
    order = np.lexsort((rng.permutation(len(values)), turn))  # ties are broken at random
    return sorted(order[:count].tolist())


def _in_classes_of(train: ImageSource, judged: ImageSource) -> ImageSource:
    """Map the labels of the test images to the class ids of the training images, if all their class names exist there.

    Separately stored splits number their classes independently: a folder may lack a class, and a column of plain
    numbers may end earlier.
    """
    names, theirs = train.label_names, judged.label_names
    if names == theirs or names is None or theirs is None or judged.labels is None:
        return judged
    if not all(0 <= label < len(theirs) and theirs[label] in names for label in set(judged.labels)):
        return judged  # `_check_labels` raises an error that lists the difference
    position = {name: label for label, name in enumerate(names)}
    return replace(judged, labels=[position[theirs[label]] for label in judged.labels], label_names=names)


def _check_labels(train: ImageSource, judged: ImageSource) -> None:
    for source in (train, judged):
        if source.labels is None:
            raise ValueError(
                f"'{source.name}' has no labels, which tasks on whole images need. Use one folder per class, or a "
                "label column."
            )
        if min(source.labels) < 0:
            raise ValueError(
                f"'{source.name}' contains the label {min(source.labels)}, but class ids start at 0. Remove these "
                "images or correct their labels."
            )
    if train.label_names != judged.label_names:
        mine, other = train.label_names or (), judged.label_names or ()
        differing = sorted(set(mine) ^ set(other))[:5] or ["the same names in another order"]
        raise ValueError(
            f"'{train.name}' has {len(mine)} classes and '{judged.name}' has {len(other)}; they differ in: "
            f"{', '.join(differing)}. Use the same class names in the same order in both."
        )
    assert train.labels is not None
    assert judged.labels is not None
    if len(set(train.labels)) < 2:
        raise ValueError(
            f"All {len(train)} training images of '{train.name}' are of one class. Give images of at least 2 classes."
        )
    if unseen := set(judged.labels) - set(train.labels):
        names = [str(label) if train.label_names is None else train.label_names[label] for label in sorted(unseen)[:5]]
        raise ValueError(
            f"{len(unseen)} classes of the test images of '{judged.name}' have no training images: "
            f"{', '.join(names)}. Add training images or remove those classes."
        )
