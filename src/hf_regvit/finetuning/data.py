"""Labeled images for fine-tuning: training and validation splits, sampling order, seeded augmentation, bad images.

The random numbers of the augmentation depend only on (seed, epoch, image, repeat), so neither the number of workers or
processes nor an interruption within an epoch changes a pixel. torchvision's transforms use torch's global generator;
`draws` seeds it for one image and restores it afterwards.
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

from ..data.bad_images import BadImages, TooManyBadImagesError
from ..data.decoding import BadImageError
from ..data.parts import LabelError, Parts, open_parts
from ..data.source import ImageRecord, ImageSource, MissingSplitError, listed
from ..models.configuration_regvit import RegViTConfig
from .arguments import FinetuningArguments

logger = logging.getLogger(__name__)

BAD_IMAGES = "bad_images.jsonl"  # in the run folder
IGNORED = -100  # label of an image that the metrics ignore, as in torch's cross-entropy

_REPLACEMENTS, _MIXING = 0xBAD, 0x313  # last numbers of seeds; they separate the random streams
_REPLACEMENT_TRIES = 100
_KINDS = {"image-classification": "classes", "semantic-segmentation": "masks", "depth-estimation": "depth"}


class Task(Protocol):
    """Interface of a task for `finetune`. Batches hold `pixel_values` and `labels`; the task defines the labels.

    A task may also define `image_processor(processor, config)`, which returns a different processor to train with and
    to save, and `for_several_processes(network)`, which returns the network adapted to training with several
    processes.

    Attributes:
        name: Task name, as in `--task`.
        model_class: Model class with the backbone as attribute `regvit`.
        shown: Metrics whose curves are plotted, without "eval_".
        train: Training images; their fingerprint is saved in checkpoints.
        validation: Validation images; None disables evaluation.
    """

    name: str
    model_class: Any
    shown: Sequence[str]
    train: ImageSource
    validation: ImageSource | None

    def config_fields(self) -> dict[str, Any]:
        """Return fields of `RegViTConfig` for this task: `id2label`, `head_layers`, ..."""

    def fits_head(self, config: RegViTConfig) -> bool:
        """Return True if the head of a model with this configuration can be reused."""

    def datasets(self, processor: Any) -> tuple[Dataset, Dataset | None]:
        """Return training images, indexed by the keys of `TrainSampler`, and validation images in order."""

    def train_collator(self) -> Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]:
        """Return the function that collates training items; `finetuning_data.stack` unless images are mixed."""

    def loss(self, model: Any, batch: dict[str, Tensor], *, training: bool) -> tuple[Tensor, Any]:
        """Return the loss and the outputs of one batch; in evaluation `logits` may hold the prediction instead."""

    def reduce(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Reduce predictions to the smallest form that the metrics need, before they are gathered."""

    def start_metrics(self) -> None:
        """Reset the metrics; called before every evaluation."""

    def update_metrics(self, predictions: Any, labels: Any) -> None:
        """Add one batch, gathered from all processes, as arrays."""

    def compute_metrics(self) -> dict[str, float]:
        """Return the metrics after the last batch; Trainer prepends "eval_" to their names."""

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Return 95 % confidence intervals over the validation images for metrics of the last evaluation."""

    def write_panels(self, folder: Path, model: Any, processor: Any) -> dict[str, str]:
        """Write figures of the last evaluation to the result folder; return their titles by file name."""

    def describe(self) -> dict[str, str]:
        """Return descriptions of the data for the card."""

    def protocol(self) -> tuple[str, str]:
        """Return descriptions of the evaluation protocol and of the intervals."""


def weights_of_classes(wanted: Sequence[str] | None, counts: np.ndarray, names: Sequence[str]) -> Tensor | None:
    """Return (C,) class weights whose mean over the counts is 1, so that the learning rate keeps its meaning.

    Args:
        wanted: None, `["balanced"]` (inverse to the counts), or one number per class.
        counts: (C,) numbers of training images or pixels per class.
        names: Names of the C classes.

    Raises:
        LabelError: `wanted` is neither "balanced" nor one finite, non-negative number per class.
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
            raise LabelError(
                f"class_weights is {list(wanted)}. Give 'balanced' or one number per class ({error})."
            ) from error
        if len(weights) != len(names) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
            raise LabelError(
                f"class_weights holds {len(weights)} numbers, but {len(names)} are needed, one per class in this "
                f"order: {listed(names)}. They must be finite and not negative, and at least one must be above 0."
            )
    return torch.tensor(weights * counts.sum() / (weights * counts).sum(), dtype=torch.float32)


# ---- Splits ------------------------------------------------------------------------------------------------------


def open_data(args: FinetuningArguments, **options: Any) -> Parts:
    """Open the training and validation images that the arguments name, checked for their task.

    Args:
        args: Arguments of the run.
        options: Arguments of `load_images`, `load_masks` or `load_depth` besides the columns.

    Raises:
        ValueError: No source is given, or the images, labels or maps cannot be used; see `open_parts`.
    """
    kind: Any = _KINDS[args.task]
    if args.data is None and args.train_dir is None:
        what = "a folder" if kind == "classes" else "or a folder with images/ and masks/ or depth/"
        raise ValueError(
            f"There are no images to train on. Give --data (parquet files, a Hub data set, {what}) or --train_dir."
        )
    column = {"classes": "label_column", "masks": "mask_column", "depth": "depth_column"}[kind]
    try:
        parts = open_parts(
            args.data,
            train=args.train_dir,
            heldout=args.validation_dir,
            kind=kind,
            heldout_share=None if args.eval_strategy == "no" else args.train_val_split,
            seed=args.seed,
            max_train=args.max_train_samples,
            max_heldout=args.max_eval_samples,
            ignore_extra_classes=args.ignore_extra_classes,
            options={"image_column": args.image_column, column: args.label_column, **options},
        )
    except MissingSplitError as error:
        raise MissingSplitError(f"{error} Use --train_dir instead of --data to train on all images.") from error
    parts.log()
    return parts


def fingerprint(source: ImageSource) -> dict[str, Any]:
    """Return the number of images, and hashes of their names in order and of their labels.

    Rows of a table are named by their numbers, so names alone would not distinguish two tables.
    """
    names = "\0".join(map(str, source.ids)).encode("utf-8", "surrogateescape")
    meaning = getattr(source, "format", None) or (source.label_names, list(source.labels or ()))
    return {
        "images": len(source),
        "names_sha256": hashlib.sha256(names).hexdigest(),
        "labels_sha256": hashlib.sha256(repr(meaning).encode("utf-8", "surrogateescape")).hexdigest(),
    }


# ---- Order and seeding -------------------------------------------------------------------------------------------


class TrainSampler(Sampler[tuple[int, int, int]]):
    """Yield `(epoch, index, repeat)` in an order that depends only on the seed and the epoch.

    The order is global and distributed over the processes, so the images of a step are the same on any number of
    processes. With repeated augmentation an image appears several times in a row with different augmentations, and an
    epoch, whose length stays the same, covers correspondingly fewer images.

    Args:
        num_samples: Number of training images.
        seed: Random seed of the run.
        images_per_step: Number of images per optimizer step over all processes; an epoch is truncated to a multiple.
        repeats: Number of consecutive repetitions of each image.

    Raises:
        ValueError: There are fewer images than one step needs.

    Source: Hoffer et al., "Augment your batch" (arXiv 1901.09335); Berman et al., "MultiGrain" (arXiv 1902.05509).
    """

    def __init__(self, num_samples: int, *, seed: int, images_per_step: int, repeats: int = 1) -> None:
        if num_samples < images_per_step:
            raise ValueError(
                f"There are {num_samples} training images for steps of {images_per_step} images, but an epoch needs "
                "at least one full step. Lower per_device_train_batch_size or gradient_accumulation_steps, start "
                "fewer processes, or give more images."
            )
        self.num_samples, self.seed, self.images_per_step, self.repeats = num_samples, seed, images_per_step, repeats
        self.epoch = self.first = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; called by the trainer and by accelerate."""
        self.epoch = epoch

    def after(self, step: int, images: int) -> "TrainSampler":
        """Return the rest of an epoch in the same order, after `step` optimizer steps and `images` of the next."""
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
    """Seed torch's global CPU generator from these numbers within the context, and restore it afterwards."""
    # Their count is appended because SeedSequence ignores trailing zeros.
    seed = int(np.random.SeedSequence([*entropy, len(entropy)]).generate_state(1, np.uint64)[0])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


# ---- Data sets ---------------------------------------------------------------------------------------------------

Make = Callable[[ImageRecord, int], dict[str, Any]]


class TrainImages(Dataset[dict[str, Any]]):
    """Augmented images with their targets, indexed by the keys of `TrainSampler`.

    Args:
        source: Images to read.
        make: Function from an image and its index in `source` to tensors `pixel_values` and `labels`; it may use
            torch's global generator.
        seed: Random seed of the run.
        bad_images: Recorder of unusable images; each is replaced by another image with its own label.
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
            f"{_REPLACEMENT_TRIES} randomly chosen images of '{self.source.name}' in a row cannot be used. "
            "Run `regvit data-check` on this data."
        )


class EvaluationImages(Dataset[dict[str, Any]]):
    """Validation images, preprocessed by the saved processor, in order.

    Args:
        source: Images to read.
        make: Function as for `TrainImages`, but deterministic.
        blank: Function that returns a placeholder for an unusable image: pixels of the right shape, and a target that
            the metrics ignore.
        bad_images: Recorder of unusable images.
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
    """Return the recorder of unusable images of one split; both splits write to one file of the run."""
    record = Path(str(args.output_dir)) / BAD_IMAGES
    return BadImages(record, max_bad_share=args.max_bad_share, num_images=len(source))


def stack(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Collate items to a batch: tensors are stacked, numbers become int64 tensors."""
    batch = {}
    for name, first in items[0].items():
        values = [item[name] for item in items]
        batch[name] = torch.stack(values) if isinstance(first, Tensor) else torch.tensor(values)
    return batch


class MixingCollator:
    """Collator that stacks items and mixes them with mixup or CutMix; the targets become class probabilities.

    Images are paired within a micro-batch, as in DeiT, so a run with a different number of processes mixes other
    pairs. The random numbers depend on the seed, the epoch and the images of the micro-batch.

    Args:
        num_classes: Number of classes, C; `labels` (B,) become (B, C).
        mixup_alpha: Parameter of the Beta distribution of mixup; 0 disables it.
        cutmix_alpha: Parameter of the Beta distribution of CutMix; 0 disables it. If both are enabled, one is chosen
            at random for each batch.
        probability: Probability of mixing a micro-batch.
        seed: Random seed of the run.

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
        """Return one micro-batch with `labels` as (B, C) float32."""
        batch = stack(items)
        with draws(self.seed, int(batch["epochs"][0]), *batch["sample_ids"].tolist(), _MIXING):
            if torch.rand(()).item() < self.probability:
                mixer = self.mixers[int(torch.randint(len(self.mixers), ()))]
                batch["pixel_values"], batch["labels"] = mixer(batch["pixel_values"], batch["labels"])
            else:
                batch["labels"] = torch.nn.functional.one_hot(batch["labels"], self.num_classes).float()
        return batch
