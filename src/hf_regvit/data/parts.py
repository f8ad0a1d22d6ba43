"""Open the training images and the held-out images of a job: which splits, which classes, how many, and why.

    parts = open_parts("photos", kind="classes", heldout_share=0.15, max_heldout=500)
    parts.log()  # what was taken, what was left out

Fine-tuning, evaluation, `data-check` and the monitors of pretraining open their images here.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .files import stratified_split
from .loading import load_images, stream_images
from .maps import DenseDataError, DenseSource, TargetReport, check_targets, load_depth, load_masks
from .source import ImageSource, MissingSplitError, Split, listed
from .tables import ImageStream

logger = logging.getLogger(__name__)

Data = str | Path | ImageSource
Draw = Literal["every_class", "in_order", "shuffled"]
_LOADERS: dict[str, Callable] = {
    "classes": load_images, "images": load_images, "masks": load_masks, "depth": load_depth,
}  # fmt: skip
_SUBSET = 0x5E  # last number of the seed of a shuffled draw; it separates the random streams


class LabelError(ValueError):
    """Labels that cannot be used to train or test a classifier; the message names the classes or rows."""


@dataclass(frozen=True)
class Parts:
    """Training and held-out images that fit each other.

    Args:
        train: Training images; a `DenseSource` for masks and depth.
        heldout: Held-out images with the class ids of `train`; None if there are none.
        held_out_from_train: True if they were drawn from the training images for lack of a validation split.
        report: Sentences on what was taken, what was left out, and why.
        targets: Statistics of the training maps, for masks and depth.
    """

    train: ImageSource
    heldout: ImageSource | None
    held_out_from_train: bool = False
    report: tuple[str, ...] = ()
    targets: TargetReport | None = None

    def log(self) -> None:
        """Log the report: counts as information, everything else as warnings."""
        for line in self.report:
            if line not in (*self.train.notes, *(self.heldout.notes if self.heldout else ())):  # said by the loader
                logger.log(logging.INFO if line.startswith(("Training:", "Held out:")) else logging.WARNING, line)


def open_parts(
    data: Data | Sequence[str | Path] | None = None,
    *,
    train: Data | None = None,
    heldout: Data | None = None,
    kind: Literal["classes", "masks", "depth", "images"] = "classes",
    heldout_share: float | None = None,
    need_heldout: bool = False,
    seed: int = 0,
    max_train: int | None = None,
    max_heldout: int | None = None,
    draw: Draw = "shuffled",
    ignore_extra_classes: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Parts:
    """Open training and held-out images, check that they fit each other, and draw the numbers that are asked for.

    Args:
        data: Source with splits: its training split is trained on, its validation split is held out.
        train: Training images stored separately, in place of the training split of `data`: all images. Beside `data`,
            their training split if there is one; `data` is then only held out, its validation split if there is one.
        heldout: Held-out images stored separately: all images.
        kind: Kind of target of an image: a class, a mask, a depth map, or none that must be checked (`images`).
        heldout_share: Share of the training images to hold out, stratified by class, if nothing else is held out.
            None holds out nothing. The images held out depend on the images alone, so a run and a later evaluation
            with the same share hold out the same ones, whatever their seeds.
        need_heldout: True if missing held-out images are an error.
        seed: Random seed of drawn images.
        max_train: Largest number of training images. Default: all.
        max_heldout: Largest number of held-out images. Default: all.
        draw: Way to draw a smaller number: `shuffled`; `in_order` keeps the order; `every_class` keeps the order and
            takes one image of every class first, then in proportion to the classes; training images keep at least one
            of every class.
        ignore_extra_classes: True to leave out held-out images (or accept pixels) of classes without training images
            (or pixels), instead of raising an error.
        options: Further arguments of `load_images`, `load_masks` or `load_depth`, such as `image_column`.

    Raises:
        FileNotFoundError: A source does not exist.
        MissingSplitError: `data` has no training split, or there is nothing held out although it is needed.
        LabelError: Labels are missing or out of range, there is a single class, or a held-out class is not trained.
        DenseDataError: Masks or depth maps cannot be used, or only the held-out ones have some class.
        ValueError: No source is given, or there are too few images to hold out any.
    """
    load = partial(_load, kind=kind, options=options or {})
    if train is not None:
        trained = load(train, None if data is None else "train", or_all=True)
    elif data is not None:
        trained = load(data, "train")
    else:
        raise ValueError("There are no images to train on. Give data with a training split, or train.")
    held, is_from_train = None, False
    if heldout is not None:
        held = load(heldout, None, like=trained)
    elif data is not None:
        try:
            can_be_all = train is not None and heldout_share is None
            held = load(data, "validation", like=trained, or_all=can_be_all)
        except MissingSplitError:
            if need_heldout and heldout_share is None:
                raise
    report: list[str] = []
    if kind == "classes":
        column = (options or {}).get("label_column")
        trained = _checked_labels(trained, "training", column)
        held = None if held is None else _checked_labels(held, "validation", column)
    if held is None and heldout_share is not None:
        whole, is_from_train = trained, True
        trained, held = hold_out(whole, heldout_share, by_class=kind in ("classes", "images"))
        share = f"train_val_split {heldout_share:g}"
        report.append(
            f"Held out: {len(held)} of {len(whole)} training images ({share}), as there is no validation split."
        )
    elif held is not None and kind == "classes":
        held = _of_known_classes(held, trained, report, ignore_extra_classes=ignore_extra_classes)
    least = len(set(trained.labels or ())) if draw == "every_class" else 0
    trained = draw_images(trained, None if max_train is None else max(max_train, least), seed=seed, draw=draw)
    held = None if held is None else draw_images(held, max_heldout, seed=seed, draw=draw)
    targets = None
    if kind == "classes":
        held = None if held is None else _numbered_as(trained, held)
        _check_classes(trained, report)
    elif kind in ("masks", "depth"):
        targets = _check_maps(trained, held, report, ignore_extra_classes=ignore_extra_classes)
    if targets is None:
        report[:0] = [
            f"Training: {trained.counted()}.",
            *([] if held is None or is_from_train else [f"Held out: {held.counted()}."]),
        ]
    notes = dict.fromkeys((*trained.notes, *(held.notes if held is not None else ())))
    return Parts(trained, held, is_from_train, (*report, *notes), targets)


def heldout_streams(
    data: Sequence[str | Path], *, image_column: str | None = None, label_column: str | None = None
) -> list[ImageStream]:
    """Open the validation streams of the sources that have one.

    Raises:
        FileNotFoundError: A source does not exist.
    """
    found = []
    for one in data:
        with suppress(MissingSplitError):
            found.append(stream_images(one, split="validation", image_column=image_column, label_column=label_column))
    return found


def _load(
    data: Data | Sequence[str | Path],
    split: Split | None,
    *,
    kind: str,
    options: Mapping[str, Any],
    like: ImageSource | None = None,
    or_all: bool = False,
) -> ImageSource:
    """Load one split, or with `or_all` everything where there is no such split."""
    if isinstance(data, ImageSource):
        if split == "validation" and not or_all:
            raise MissingSplitError(f"'{data.name}' is a single set of images without splits.")
        return data
    if kind == "masks" and isinstance(like, DenseSource):
        options = {**options, "mask_format": like.format}

    try:
        return _LOADERS[kind](data, split=split, **options)
    except MissingSplitError:
        if not or_all:
            raise
        return _LOADERS[kind](data, split=None, **options)


# --- Numbers of images


def hold_out(train: ImageSource, share: float, *, by_class: bool = True) -> tuple[ImageSource, ImageSource]:
    """Hold out a share of the images, of every class if they have classes.

    Raises:
        ValueError: There are too few images to hold out any.
    """
    classes = train.labels if by_class and train.labels is not None else [0] * len(train)
    kept, held = stratified_split(classes, held_out_share=share, seed=0)
    if not held or not kept:
        raise ValueError(
            f"'{train.name}' has {len(train)} images, too few to hold out {share:.0%} of every class. Give more "
            "images, or held-out images of their own, or train without evaluations."
        )
    return train.subset(kept), train.subset(held)


def draw_images(source: ImageSource, count: int | None, *, seed: int, draw: Draw = "shuffled") -> ImageSource:
    """Return at most `count` images, drawn with the seed; see `open_parts` for `draw`."""
    if count is None or count >= len(source):
        return source
    if draw == "shuffled":
        return source.subset(np.random.default_rng([seed, _SUBSET]).permutation(len(source))[:count].tolist())
    if draw == "every_class" and source.labels is not None:
        return source.subset(_of_every_class(source.labels, count, seed))
    return source.subset(sorted(np.random.default_rng(seed).permutation(len(source))[:count].tolist()))


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


# --- Classes


def _checked_labels(source: ImageSource, part: str, label_column: str | None) -> ImageSource:
    """Check the labels of one part; classes without names are named by their numbers."""
    if source.labels is None:
        raise LabelError(f"'{source.name}' has no labels in its {part} split: {_why_no_labels(source, label_column)}")
    names = source.label_names or tuple(map(str, range(max(source.labels, default=0) + 1)))
    wrong = [row for row, label in enumerate(source.labels) if not 0 <= label < len(names)]
    if wrong:
        rows = "; ".join(f"{source.ids[row]} has {source.labels[row]}" for row in wrong[:5])
        raise LabelError(
            f"'{source.name}': {len(wrong)} {part} images have a class id outside of 0 to {len(names) - 1} "
            f"({len(names)} classes): {rows}{' and others' if len(wrong) > 5 else ''}. Correct or remove these rows."
        )
    if len(names) < 2 and part == "training":
        raise LabelError(
            f"'{source.name}' has a single class, '{names[0]}'; a classifier needs at least two. Give a folder with "
            "one subfolder per class, or name the label column with --label_column."
        )
    return replace(source, label_names=names)


def _why_no_labels(source: ImageSource, label_column: str | None) -> str:
    column, table = label_column or "label", source.table
    if table is not None and column in table.column_names:
        values = table[column]
        missing = [row for row, value in enumerate(values) if value is None or (isinstance(value, int) and value < 0)]
        if missing:
            rows = ", ".join(source.ids[row] for row in missing[:5])
            return (
                f"{len(missing)} of {len(values)} rows of column '{column}' are empty or negative, for example "
                f"{rows}. Remove these rows, or use another split or --label_column."
            )
        return (
            f"column '{column}' holds {table.features[column]}; expected integers or ClassLabel. Convert it with "
            "datasets' class_encode_column, or name another --label_column."
        )
    if table is not None or "row/0" in source.ids[:1]:
        columns = "" if table is None else f" Columns: {', '.join(table.column_names)}."
        return f"there is no column 'label'.{columns} Name the label column with --label_column."
    advice = "Use one subfolder per class and place every image in one of them."
    if loose := [name for name in source.ids if "/" not in name]:
        return f"{len(loose)} images are not in a subfolder, for example '{loose[0]}'. {advice}"
    folder = source.ids[0].split("/")[0]
    return f"there are no class folders in '{folder}', whose name is that of a split and not of a class. {advice}"


def _of_known_classes(
    heldout: ImageSource, train: ImageSource, report: list[str], *, ignore_extra_classes: bool
) -> ImageSource:
    """Return the held-out images of classes that have training images; others are an error or left out."""
    names, known, labels = heldout.label_names or (), train.label_names or (), heldout.labels or ()
    used, trained = {names[label] for label in labels}, {known[label] for label in train.labels or ()}
    lacking = sorted(trained - used)
    if extra := sorted(used - trained):
        if not ignore_extra_classes:
            also = f" {len(lacking)} training classes are missing from validation: {listed(lacking)}."
            raise LabelError(
                f"'{heldout.name}' has {len(extra)} classes without training images: {listed(extra)}."
                f"{also if lacking else ''} Use the same class names in both splits, or ignore these images with "
                "--ignore_extra_classes."
            )
        kept = [row for row, label in enumerate(labels) if names[label] in trained]
        report.append(
            f"{len(labels) - len(kept)} validation images of {len(extra)} classes without training images are "
            f"ignored: {listed(extra)}."
        )
        heldout = heldout.subset(kept)
    if not heldout.labels:
        raise LabelError(
            f"'{heldout.name}' has no validation images of the {len(trained)} training classes. Use the same class "
            "names in both splits."
        )
    if lacking:
        report.append(f"{len(lacking)} of {len(known)} classes have no validation images: {listed(lacking)}.")
    return heldout


def _numbered_as(train: ImageSource, heldout: ImageSource) -> ImageSource:
    """Return the held-out images with the class ids of the training images, which separate sources number anew."""
    names, position = heldout.label_names or (), {name: i for i, name in enumerate(train.label_names or ())}
    labels = [position[names[label]] for label in heldout.labels or ()]
    return replace(heldout, labels=labels, label_names=train.label_names)


def _check_classes(train: ImageSource, report: list[str]) -> None:
    present, names = Counter(train.labels or ()), train.label_names or ()
    if len(present) < 2:
        only = listed([names[label] for label in present])
        raise LabelError(
            f"'{train.name}': all {len(train)} training images are of one class, {only}; a classifier needs at least "
            "two. Check that there is one folder per class, or check --label_column."
        )
    if empty := [name for label, name in enumerate(names) if not present[label]]:
        report.append(f"{len(empty)} of {len(names)} classes have no training images: {listed(empty)}.")


# --- Maps


def _check_maps(
    train: ImageSource, heldout: ImageSource | None, report: list[str], *, ignore_extra_classes: bool
) -> TargetReport:
    """Check all maps and return the statistics of the training maps."""
    assert isinstance(train, DenseSource)
    targets = check_targets(train)
    report.append(f"Training: {targets.summary()}.")
    if heldout is None:
        return targets
    assert isinstance(heldout, DenseSource)
    other = check_targets(heldout, several_classes=False)
    report.append(f"Held out: {other.summary()}.")
    extra = [name for name, count in other.class_pixels.items() if count and not targets.class_pixels[name]]
    if extra and not ignore_extra_classes:
        raise DenseDataError(
            f"'{heldout.name}': the validation masks contain {len(extra)} classes without a training pixel: "
            f"{', '.join(extra[:8])}. Give more training images, or ignore these pixels with --ignore_extra_classes."
        )
    return targets
