"""Labelled images for fine-tuning: training and validation part, the order of a run, seeded draws, bad images.

Every draw of the augmentation is a function of (seed, epoch, image, repeat) alone, so neither the number of workers
or processes nor a stop in the middle of an epoch changes a pixel. torchvision's transforms draw from torch's global
generator; `draws` sets it for the time of one image and puts it back.
"""

import contextlib
import copy
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .configuration_regvit import RegViTConfig
from .data import BadImages, TooManyBadImagesError
from .finetuning_arguments import FinetuningArguments
from .image_guard import BadImageError
from .images import ImageRecord, ImageSource, MissingSplitError, load_images, stratified_split

logger = logging.getLogger(__name__)

BAD_IMAGES = "bad_images.jsonl"  # in the folder of a run
IGNORED = -100  # the label of an image that takes no part in the metrics, as in torch's cross entropy

_SUBSET, _REPLACEMENTS, _MIXING = 0x5E, 0xBAD, 0x313  # last numbers of seeds: they keep kinds of draws apart
_REPLACEMENT_TRIES = 100


class Task(Protocol):
    """What `finetune` has to know about a task. Batches have `pixel_values` and `labels`, whatever these are.

    A task may also have `image_processor(processor, config)`, which returns another processor to train and save with,
    and `for_several_processes(network)`, which returns the network as several processes have to train it.

    Attributes:
        name: as in `--task`.
        model_class: with the backbone as `regvit`.
        shown: metrics whose curves are drawn, without "eval_".
        train: training images, for the fingerprint of a checkpoint.
        validation: None where nothing is evaluated.
    """

    name: str
    model_class: Any
    shown: Sequence[str]
    train: ImageSource
    validation: ImageSource | None

    def config_fields(self) -> dict[str, Any]:
        """Fields of `RegViTConfig` for this task: `id2label`, `head_layers`, ..."""

    def fits_head(self, config: RegViTConfig) -> bool:
        """Whether the head of a model with this configuration can be taken over."""

    def datasets(self, processor: Any) -> tuple[Dataset, Dataset | None]:
        """Training images, indexed by the keys of `TrainSampler`, and validation images in order."""

    def train_collator(self) -> Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]:
        """From training items to a batch; `finetuning_data.stack` unless images are mixed."""

    def loss(self, model: Any, batch: dict[str, Tensor], *, training: bool) -> tuple[Tensor, Any]:
        """Loss and outputs (with `logits`, or only the prediction in its place) of one batch."""

    def reduce(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The smallest form of the predictions that the metrics need, before they are gathered."""

    def start_metrics(self) -> None:
        """Called before every evaluation."""

    def update_metrics(self, predictions: Any, labels: Any) -> None:
        """One batch of all processes, as arrays."""

    def compute_metrics(self) -> dict[str, float]:
        """Called after the last batch; the names get "eval_" in front."""

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % intervals over the validation images of some metrics of the last evaluation."""

    def write_panels(self, folder: Path, model: Any, processor: Any) -> dict[str, str]:
        """Pictures into the result folder, from the last evaluation; their titles by file name, for the card."""

    def describe(self) -> dict[str, str]:
        """What the data hold, in words, for the card."""

    def protocol(self) -> tuple[str, str]:
        """How a validation image is judged, and what the intervals are, in words."""


class LabelError(ValueError):
    """Labels that a classifier cannot be trained with; the message names the classes or rows."""


def weights_of_classes(wanted: Sequence[str] | None, counts: np.ndarray, names: Sequence[str]) -> Tensor | None:
    """(C,) weights whose mean over what is counted is 1, so that the learning rate keeps its meaning.

    Args:
        wanted: None, `["balanced"]` (inverse to the counts), or one number per class.
        counts: (C,) training images or pixels of every class.
        names: of the C classes.

    Raises:
        LabelError: no balance, and not one number of at least 0 per class.
    """
    if not wanted:
        return None
    counts = counts.astype(np.float64)
    if list(wanted) == ["balanced"]:
        weights = np.divide(1.0, counts, out=np.zeros_like(counts), where=counts > 0)
    else:
        try:
            weights = np.array([float(value) for value in wanted])
        except ValueError as error:
            raise LabelError(f"class_weights is {list(wanted)}; expected 'balanced' or numbers ({error}).") from error
        if len(weights) != len(names) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
            shown = ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise LabelError(
                f"class_weights are {len(weights)} numbers; expected {len(names)} that are finite, none negative and "
                f"not all 0, one per class in this order: {shown}."
            )
    return torch.tensor(weights * counts.sum() / (weights * counts).sum(), dtype=torch.float32)


# ---- Parts -------------------------------------------------------------------------------------------------------


def open_parts(args: FinetuningArguments) -> tuple[ImageSource, ImageSource | None]:
    """Training and validation images as the arguments name them, before anything is held out.

    Returns:
        The validation part is None where the sources have none.

    Raises:
        ValueError: no source is named.
        FileNotFoundError: no such path or data set.
    """
    columns: Any = {"image_column": args.image_column, "label_column": args.label_column}
    if args.data is None and args.train_dir is None:
        raise ValueError(
            "no images to train on. Give --data (a folder, parquet files, a Hub data set) or --train_dir."
        )
    if args.data is not None:
        try:
            train = load_images(args.data, split="train", **columns)
        except MissingSplitError as error:
            raise MissingSplitError(f"{error} With --train_dir in place of --data all of it is trained on.") from error
        if args.validation_dir is None:
            try:
                return train, load_images(
                    args.data, split="validation", ignore_extra_classes=args.ignore_extra_classes, **columns
                )
            except MissingSplitError:
                return train, None
    else:
        train = load_images(str(args.train_dir), split=None, **columns)
    if args.validation_dir is None:
        return train, None
    return train, load_images(args.validation_dir, split=None, **columns)


def hold_out(
    train: ImageSource, args: FinetuningArguments, labels: Sequence[int] | None = None
) -> tuple[ImageSource, ImageSource]:
    """Splits off `train_val_split` of the images, of every class alike where there are `labels`; drawn with the seed.

    Raises:
        ValueError: nothing would be left to validate on.
    """
    classes = labels if labels is not None else [0] * len(train)
    kept, held = stratified_split(classes, held_out_share=args.train_val_split, seed=args.seed)
    if not held or not kept:
        raise ValueError(
            f"'{train.name}' has {len(train)} images, too few to hold out {args.train_val_split:.0%} of every class. "
            "Give --validation_dir, more images, or --eval_strategy no."
        )
    logger.info(
        "No validation part: %d of %d images are held out (--train_val_split %g, seed %d).",
        len(held), len(train), args.train_val_split, args.seed,
    )  # fmt: skip
    return train.subset(kept), train.subset(held)


def limited(source: ImageSource, count: int | None, *, seed: int) -> ImageSource:
    """At most `count` images, drawn with the seed."""
    if count is None or count >= len(source):
        return source
    return source.subset(np.random.default_rng([seed, _SUBSET]).permutation(len(source))[:count].tolist())


def fingerprint(source: ImageSource) -> dict[str, Any]:
    """How many images there are, and hashes of their names in order and of what they are labelled with.

    Rows of a table are called by their numbers, so that names alone would not tell one table from another.
    """
    names = "\0".join(map(str, source.ids)).encode("utf-8", "surrogateescape")
    meaning = getattr(source, "format", None) or (source.label_names, list(source.labels or ()))
    return {
        "images": len(source),
        "names_sha256": hashlib.sha256(names).hexdigest(),
        "labels_sha256": hashlib.sha256(repr(meaning).encode("utf-8", "surrogateescape")).hexdigest(),
    }


# ---- Order and draws ---------------------------------------------------------------------------------------------


class TrainSampler(Sampler[tuple[int, int, int]]):
    """Yields `(epoch, index, repeat)` in an order that depends on the seed and the epoch alone.

    The order is that of the whole run; processes take their shares of it, so the images of a step are the same on any
    number of processes. With repeated augmentation an image comes several times in a row, each time augmented anew,
    and an epoch, whose length stays, has that much fewer images.

    Args:
        num_samples: images of the training part.
        seed: of the run.
        images_per_step: images of an optimizer step over all processes; an epoch is cut to a multiple of it.
        repeats: times each image comes.

    Raises:
        ValueError: fewer images than one step takes.

    Source: Hoffer et al., "Augment your batch" (arXiv 1901.09335); Berman et al., "MultiGrain" (arXiv 1902.05509).
    """

    def __init__(self, num_samples: int, *, seed: int, images_per_step: int, repeats: int = 1) -> None:
        if num_samples < images_per_step:
            raise ValueError(
                f"there are {num_samples} training images for steps of {images_per_step}; expected at least one full "
                "step per epoch. Lower per_device_train_batch_size or gradient_accumulation_steps, start fewer "
                "processes, or give more images."
            )
        self.num_samples, self.seed, self.images_per_step, self.repeats = num_samples, seed, images_per_step, repeats
        self.epoch = self.first = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; the trainer and accelerate call it."""
        self.epoch = epoch

    def after(self, step: int, images: int) -> "TrainSampler":
        """The rest of an epoch in the same order, after so many optimizer steps and images of the next one."""
        rest = copy.copy(self)
        steps_per_epoch = self.num_samples // self.images_per_step
        rest.epoch, rest.first = step // steps_per_epoch, step % steps_per_epoch * self.images_per_step + images
        return rest

    def __len__(self) -> int:
        return self.num_samples // self.images_per_step * self.images_per_step - self.first

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        epoch = self.epoch
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
        for place in range(self.first, self.first + len(self)):
            yield epoch, int(order[place // self.repeats]), place % self.repeats


@contextlib.contextmanager
def draws(*entropy: int) -> Iterator[None]:
    """Inside the block torch's global CPU generator starts from these numbers; afterwards it is as it was."""
    # With their number behind them, because zeros at the end change nothing.
    seed = int(np.random.SeedSequence([*entropy, len(entropy)]).generate_state(1, np.uint64)[0])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


# ---- Data sets ---------------------------------------------------------------------------------------------------

Make = Callable[[ImageRecord, int], dict[str, Any]]


class TrainImages(Dataset[dict[str, Any]]):
    """Augmented images with their targets, indexed by the keys of `TrainSampler`.

    Args:
        source: the images.
        make: from an image and its index in `source` to tensors `pixel_values` and `labels`; it may draw from torch's
            global generator.
        seed: of the run.
        bad_images: records images that cannot be used; another one, with its own label, takes the place of each.
    """

    def __init__(self, source: ImageSource, make: Make, *, seed: int, bad_images: BadImages) -> None:
        self.source, self.make, self.seed, self.bad_images = source, make, seed, bad_images
        for problem in source.problems:
            bad_images.note(problem)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Any]:
        epoch, index, repeat = key
        others = np.random.default_rng([self.seed, epoch, index, _REPLACEMENTS])
        used = index
        for _ in range(_REPLACEMENT_TRIES):
            try:
                record = self.source[used]
                with draws(self.seed, epoch, index, repeat):
                    made = self.make(record, used)
            except BadImageError as error:
                self.bad_images.bad(error, epoch=epoch, index=used)
                used = int(others.integers(len(self.source)))
            else:
                self.bad_images.good(used)
                return {**made, "sample_ids": used, "epochs": epoch}
        raise TooManyBadImagesError(
            f"{_REPLACEMENT_TRIES} images of '{self.source.name}', drawn one after another, cannot be used. "
            "Run `regvit data-check` on them."
        )


class EvaluationImages(Dataset[dict[str, Any]]):
    """Validation images as the saved processor makes them, in order.

    Args:
        source: the images.
        make: as for `TrainImages`, without draws.
        blank: what stands in for an image that cannot be used: pixels of the right shape, and a target that the
            metrics leave out.
        bad_images: records such images.
    """

    def __init__(
        self, source: ImageSource, make: Make, *, blank: Callable[[], dict[str, Any]], bad_images: BadImages
    ) -> None:
        self.source, self.make, self.blank, self.bad_images = source, make, blank, bad_images

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            made = self.make(self.source[index], index)
        except BadImageError as error:
            self.bad_images.bad(error, epoch=0, index=index)
            return self.blank()
        self.bad_images.good(index)
        return made


def bad_images(args: FinetuningArguments, source: ImageSource) -> BadImages:
    """The guard of one part; both parts write into one file of the run."""
    record = Path(str(args.output_dir)) / BAD_IMAGES
    return BadImages(record, max_bad_share=args.max_bad_share, num_images=len(source))


def stack(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of items: tensors stacked, numbers as int64."""
    batch = {}
    for name, first in items[0].items():
        values = [item[name] for item in items]
        batch[name] = torch.stack(values) if isinstance(first, Tensor) else torch.tensor(values)
    return batch


class MixingCollator:
    """Stacks items and mixes them with mixup or CutMix; the targets become class probabilities.

    Pairs are made inside a micro-batch, as in DeiT, so a run on another number of processes mixes other pairs. The
    draws depend on the seed, the epoch and the images of the micro-batch.

    Args:
        num_classes: C; `labels` (B,) become (B, C).
        mixup_alpha: of the Beta distribution, 0 for no mixup.
        cutmix_alpha: likewise for CutMix; where both are on, each batch draws one of them.
        probability: share of the micro-batches that are mixed at all.
        seed: of the run.

    Source: Zhang et al. 2018 (arXiv 1710.09412), Yun et al. 2019 (arXiv 1905.04899), as in torchvision's `v2`.
    """

    def __init__(
        self, num_classes: int, *, mixup_alpha: float, cutmix_alpha: float, probability: float, seed: int
    ) -> None:
        from torchvision.transforms import v2

        self.num_classes, self.probability, self.seed = num_classes, probability, seed
        self.mixers: list[Any] = []
        if mixup_alpha:
            self.mixers.append(v2.MixUp(alpha=mixup_alpha, num_classes=num_classes))
        if cutmix_alpha:
            self.mixers.append(v2.CutMix(alpha=cutmix_alpha, num_classes=num_classes))

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """One micro-batch, `labels` as (B, C) float32."""
        batch = stack(items)
        with draws(self.seed, int(batch["epochs"][0]), *batch["sample_ids"].tolist(), _MIXING):
            if torch.rand(()).item() < self.probability:
                mixer = self.mixers[int(torch.randint(len(self.mixers), ()))]
                batch["pixel_values"], batch["labels"] = mixer(batch["pixel_values"], batch["labels"])
            else:
                batch["labels"] = torch.nn.functional.one_hot(batch["labels"], self.num_classes).float()
        return batch
