"""Labeled images for fine-tuning: training and validation splits, sampling order, seeded augmentation, bad images.

The random numbers of the augmentation depend only on (seed, epoch, image, repeat), so neither the number of workers or
processes nor an interruption within an epoch changes a pixel. torchvision's transforms use torch's global generator;
`draws` seeds it for one image and restores it afterwards.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers.image_processing_utils import BaseImageProcessor

from ..data.bad_images import BadImages
from ..data.decoding import BadImageError
from ..data.parts import LabelError, Parts, open_parts
from ..data.source import ImageRecord, ImageSource, MissingSplitError, listed
from ..training.run_folder import BAD_IMAGES, names_digest
from ..training.samplers import first_usable
from .arguments import TASKS, FinetuningArguments

IGNORED = -100  # label of an image that the metrics ignore, as in torch's cross-entropy

_MIXING = 0x313  # last number of a seed; it separates the random streams


def class_weights(wanted: Sequence[str] | None, counts: np.ndarray, names: Sequence[str]) -> Tensor | None:
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
    kind = TASKS[args.task].kind
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
    meaning = getattr(source, "format", None) or (source.label_names, list(source.labels or ()))
    return {
        "images": len(source),
        "names_sha256": names_digest(source.ids),
        "labels_sha256": names_digest([repr(meaning)]),
    }


# ---- Data sets ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def draws(*entropy: int) -> Iterator[None]:
    """Seed torch's global CPU generator from these numbers within the context, and restore it afterwards."""
    # Their count is appended because SeedSequence ignores trailing zeros.
    seed = int(np.random.SeedSequence([*entropy, len(entropy)]).generate_state(1, np.uint64)[0])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


Item = dict[str, Any]  # pixels and target of an image, before they are collated
Make = Callable[[ImageRecord, int], Item]


class EvaluationItem(Protocol):
    """Function that turns an image and its index into an evaluation item; workers pickle it."""

    def __call__(self, record: ImageRecord, index: int) -> Item:
        """Return tensors `pixel_values` and `labels`."""

    def blank(self) -> Item:
        """Return a placeholder for an unusable image: pixels of the right shape, a target that the metrics ignore."""


def processed(processor: BaseImageProcessor, image: Image.Image) -> Tensor:
    """Return the processed pixels of one image, (3, H, W)."""
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


def output_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Return the (height, width) of a processor's output.

    Raises:
        ValueError: The output size depends on the image.
    """
    fields: Any = processor  # its base class does not declare them
    size = fields.crop_size if getattr(fields, "do_center_crop", False) else fields.size
    height, width = (size.get(name) if hasattr(size, "get") else getattr(size, name) for name in ("height", "width"))
    if not height or not width:
        raise ValueError(
            f"The image processor returns images of different sizes (size {dict(size)}, no center crop), which cannot "
            "be batched. Set --image_size."
        )
    return int(height), int(width)


class TrainImages(Dataset[Item]):
    """Augmented images with their targets, indexed by the keys of `EpochSampler`.

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

    def __getitem__(self, key: tuple[int, int, int]) -> Item:
        epoch, index, repeat = key

        def read(used: int) -> Item:
            record = self.source[used]
            with draws(self.seed, epoch, index, repeat):
                return self.make(record, used)

        used, made = first_usable(read, (epoch, index), seed=self.seed, count=len(self), bad_images=self.bad_images)
        return {**made, "sample_ids": used, "epochs": epoch}


class EvaluationImages(Dataset[Item]):
    """Validation images, preprocessed by the saved processor, in order.

    Args:
        source: Images to read.
        make: Function as for `TrainImages`, but deterministic, with a placeholder for an unusable image.
        bad_images: Recorder of unusable images.
    """

    def __init__(self, source: ImageSource, make: EvaluationItem, *, bad_images: BadImages) -> None:
        self.source, self.make, self.bad_images = source, make, bad_images

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        try:
            made = self.make(self.source[index], index)
        except BadImageError as error:
            self.bad_images.bad(error, epoch=0, index=index)
            return self.make.blank()
        self.bad_images.good(index)
        return made


def bad_images(args: FinetuningArguments, source: ImageSource) -> BadImages:
    """Return the recorder of unusable images of one split; both splits write to one file of the run."""
    record = args.folder / BAD_IMAGES
    return BadImages(record, max_bad_share=args.max_bad_share, num_images=len(source))


def stack(items: Sequence[Item]) -> dict[str, Tensor]:
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
        self.mixers: list[nn.Module] = []
        if mixup_alpha:
            self.mixers.append(v2.MixUp(alpha=mixup_alpha, num_classes=num_classes))
        if cutmix_alpha:
            self.mixers.append(v2.CutMix(alpha=cutmix_alpha, num_classes=num_classes))

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Return one micro-batch with `labels` as (B, C) float32."""
        batch = stack(items)
        with draws(self.seed, int(batch["epochs"][0]), *batch["sample_ids"].tolist(), _MIXING):
            if torch.rand(()).item() < self.probability:
                mixer = self.mixers[int(torch.randint(len(self.mixers), ()))]
                batch["pixel_values"], batch["labels"] = mixer(batch["pixel_values"], batch["labels"])
            else:
                batch["labels"] = torch.nn.functional.one_hot(batch["labels"], self.num_classes).float()
        return batch
