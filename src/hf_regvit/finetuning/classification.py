"""Image classification as a task of `finetune`: label checks, augmentation, loss and metrics.

Shape letters: B images, C classes, S side of an image in pixels.
"""

import csv
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.image_processing_utils import BaseImageProcessor

from ..data.source import ImageRecord, ImageSource
from ..evaluation.intervals import wilson_interval
from ..figures.masks import confusion_figure
from ..models.modeling_regvit import RegViTForImageClassification
from ..models.processing import statistics_of
from .arguments import FinetuningArguments
from .data import IGNORED, Item, MixingCollator, class_weights, open_data, output_size, processed, stack
from .tasks import Task

logger = logging.getLogger(__name__)


# ---- Augmentation ------------------------------------------------------------------------------------------------


def training_transform(
    args: FinetuningArguments, *, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> nn.Module:
    """Build the transform of an image to (3, S, S) normalized pixels; torchvision draws from torch's generator.

    Source: the training scripts of DeiT (arXiv 2012.12877) and DeiT-III (arXiv 2204.07118): random resized crop and
    horizontal flip first, then RandAugment, or one of grayscale, solarize and blur followed by color jitter; random
    erasing last.
    """
    from torchvision.transforms import InterpolationMode, v2

    steps: list[nn.Module] = [
        v2.RandomResizedCrop(image_size, scale=tuple(args.crop_scale), interpolation=InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(args.flip_probability),
    ]
    if args.augmentation == "randaugment":
        fill, bilinear = [round(255 * value) for value in mean], InterpolationMode.BILINEAR
        steps.append(
            v2.RandAugment(args.randaugment_num_ops, args.randaugment_magnitude, interpolation=bilinear, fill=fill)
        )
    elif args.augmentation == "three_augment":
        blur = v2.GaussianBlur(kernel_size=9, sigma=(0.1, 2.0))
        steps.append(v2.RandomChoice([v2.RandomGrayscale(p=1.0), v2.RandomSolarize(threshold=128, p=1.0), blur]))
    if args.color_jitter:
        steps.append(v2.ColorJitter(args.color_jitter, args.color_jitter, args.color_jitter))
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    if args.random_erasing:
        steps.append(v2.RandomErasing(p=args.random_erasing))
    return v2.Compose(steps)


class ClassificationItem:
    """Conversion of an image to an item of a data set; a class, so that spawned workers can pickle it.

    Args:
        processor: Image processor that is saved with the model.
        transform: Augmentation, in place of the processor.
    """

    def __init__(self, processor: BaseImageProcessor, transform: nn.Module | None = None) -> None:
        self.processor, self.transform = processor, transform

    def __call__(self, record: ImageRecord, index: int) -> Item:
        """Return `pixel_values` (3, S, S) and `labels`."""
        if self.transform is None:
            return {"pixel_values": processed(self.processor, record.image), "labels": record.label}
        return {"pixel_values": self.transform(record.image).as_subclass(Tensor), "labels": record.label}

    def blank(self) -> Item:
        """Return a placeholder for an unusable image."""
        return {"pixel_values": torch.zeros(3, *output_size(self.processor)), "labels": IGNORED}


# ---- Loss and metrics --------------------------------------------------------------------------------------------


def classification_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    kind: str = "cross_entropy",
    smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the mean loss over the images, weighted by class without dividing by the sum of the weights.

    The loss of a batch is therefore the mean of the losses of its parts, on any number of processes and
    micro-batches.

    Args:
        logits: (B, C) class logits.
        targets: (B,) class ids, or (B, C) class probabilities of mixed images.
        kind: `cross_entropy`, or `bce` (binary cross-entropy per class), in which every class of a mixed image is a
            full positive and the loss is also averaged over the classes.
        smoothing: Share of the target that is spread over all classes.
        weights: (C,) class weights with mean 1 over the images.

    Source: arXiv 2204.07118 and the released DeiT-III code for `bce`; Szegedy et al. 2016 for smoothing.
    """
    logits = logits.float()
    num_classes = logits.shape[-1]
    if targets.ndim == 1:
        targets = F.one_hot(targets, num_classes)
    shares = targets.to(logits)  # (B, C)
    asked = (shares > 0).to(shares) if kind == "bce" else shares
    asked = asked * (1 - smoothing) + smoothing / num_classes
    if kind == "bce":
        losses = F.binary_cross_entropy_with_logits(logits, asked, reduction="none").mean(-1)  # (B,)
    else:
        losses = -(asked * logits.log_softmax(-1)).sum(-1)  # (B,)
    if weights is not None:
        losses = losses * (shares @ weights.to(shares))
    return losses.mean()


class ClassificationMetrics:
    """Accumulator of top-1, top-5 and mean class accuracy and macro F1, based on the metrics of `metrics`.

    Args:
        num_classes: Number of classes, C.

    Attributes:
        confusion: (C, C) counts of the last `compute`; rows are true classes, columns are predicted classes.
    """

    def __init__(self, num_classes: int) -> None:
        from ..evaluation.metrics import ClassScores, TopKAccuracy

        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.skipped = self.counted = 0
        self._top = TopKAccuracy(k=(1, 5) if num_classes > 5 else (1,))
        self._classes = ClassScores(num_classes=num_classes)

    def update(self, logits: np.ndarray | Tensor, labels: np.ndarray | Tensor) -> None:
        """Add one batch of (B, C) scores and (B,) class ids; images with label -100 are ignored."""
        scores, truth = torch.as_tensor(logits).cpu(), torch.as_tensor(labels).cpu()
        use = truth != IGNORED
        self.skipped += int((~use).sum())
        self.counted += int(use.sum())
        for metric in (self._top, self._classes):
            metric.add_batch(predictions=scores[use], references=truth[use])

    def compute(self) -> dict[str, float]:
        """Return metrics in [0, 1], with a 95 % interval of the accuracy; class means skip classes without images.

        Raises:
            ValueError: No image had a label.
        """
        top, classes = cast(dict[str, Any], self._top.compute()), cast(dict[str, Any], self._classes.compute())
        self.confusion = torch.tensor(classes["confusion_matrix"])
        metrics: dict[str, float] = {"accuracy": top["top1"]}
        metrics |= {name: classes[name] for name in ("mean_class_accuracy", "f1")}
        metrics["accuracy_low"], metrics["accuracy_high"] = wilson_interval(top["top1"], self.counted)
        if "top5" in top:
            metrics["top5_accuracy"] = top["top5"]
        return metrics | ({"skipped_images": float(self.skipped)} if self.skipped else {})


# ---- The task ----------------------------------------------------------------------------------------------------


class ImageClassification(Task):
    """Image classification task for `finetune`.

    Args:
        args: Arguments of the run.
        train: Labeled training images, used instead of those that `args` names.
        validation: Labeled validation images that belong to `train`.

    Raises:
        LabelError: The labels cannot be used.
    """

    name = "image-classification"
    model_class = RegViTForImageClassification
    shown = ("accuracy", "f1")

    def __init__(
        self, args: FinetuningArguments, train: ImageSource | None = None, validation: ImageSource | None = None
    ) -> None:
        self.args = args
        if train is None:
            parts = open_data(args)
            train, validation = parts.train, parts.heldout
        self.train, self.validation = train, validation
        self.names = train.label_names or ()
        counts = np.bincount(np.asarray(train.labels or (), dtype=int), minlength=len(self.names))
        self.weights = class_weights(args.class_weights, counts, self.names)
        self._metrics = ClassificationMetrics(len(self.names))
        self._last: dict[str, float] = {}

    def config_fields(self) -> dict[str, Any]:
        """Return the class names, and the pooling of the head if it was given."""
        return super().config_fields() | ({"pooling": self.args.pooling} if self.args.pooling else {})

    def train_item(self, processor: BaseImageProcessor) -> ClassificationItem:
        """Return the augmentation of a training image."""
        size = output_size(processor)[0]
        if self.args.augmentation == "none":
            return ClassificationItem(processor)
        mean, std = statistics_of(processor)
        return ClassificationItem(processor, training_transform(self.args, image_size=size, mean=mean, std=std))

    def evaluation_item(self, processor: BaseImageProcessor) -> ClassificationItem:
        """Return the preprocessing of a validation image, exactly as the saved processor does it."""
        return ClassificationItem(processor)

    def train_collator(self) -> Callable[[Sequence[Item]], dict[str, Tensor]]:
        """Return the collator, with mixup and CutMix if they are enabled."""
        args = self.args
        if not args.mixup_alpha and not args.cutmix_alpha:
            return stack
        alphas = args.subset("mixup_alpha", "cutmix_alpha")
        return MixingCollator(len(self.names), probability=args.mixup_probability, seed=args.seed, **alphas)

    def loss(self, model: nn.Module, batch: dict[str, Tensor], *, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the outputs of one batch; evaluation uses no smoothing and no weights."""
        labels = batch["labels"]
        outputs = model(pixel_values=batch["pixel_values"])
        if training:
            smoothing = self.args.label_smoothing_factor
            loss = classification_loss(
                outputs.logits, labels, kind=self.args.loss, smoothing=smoothing, weights=self.weights
            )
            return loss, outputs
        use = labels != IGNORED
        if not use.any():
            return outputs.logits.sum() * 0.0, outputs
        return classification_loss(outputs.logits[use], labels[use], kind=self.args.loss), outputs

    def reduce(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the logits in float32, to be gathered from all processes for the metrics."""
        return logits.float()

    def start_metrics(self) -> None:
        """Reset the metrics."""
        self._metrics = ClassificationMetrics(len(self.names))

    def update_metrics(self, predictions: Tensor, labels: Tensor) -> None:
        """Add one gathered batch."""
        self._metrics.update(predictions, labels)

    def compute_metrics(self) -> dict[str, float]:
        """Return the metrics of all batches since `start_metrics`."""
        self._last = self._metrics.compute()
        return self._last

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Return the Wilson interval of the accuracy."""
        return {"accuracy": (self._last["accuracy_low"], self._last["accuracy_high"])}

    def write_panels(self, folder: Path, model: nn.Module, processor: BaseImageProcessor) -> dict[str, str]:
        """Write the confusion matrix of the last evaluation as PNG and CSV; return the titles of the figures."""
        from ..figures.maps import save_figure

        matrix = self._metrics.confusion
        if not self._last:
            return {}
        with (folder / "confusion_matrix.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")  # class names may contain commas
            table.writerow(["true\\predicted", *self.names])
            table.writerows([name, *row] for name, row in zip(self.names, matrix.tolist(), strict=True))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            save_figure(confusion_figure(matrix, self.names), folder / "confusion_matrix.png")
        for warning in said:
            if "missing from font" not in str(warning.message):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        if any("missing from font" in str(warning.message) for warning in said):
            logger.warning(
                "The font of matplotlib lacks characters of the class names in confusion_matrix.png; see "
                "confusion_matrix.csv for the full names."
            )
        return {"confusion_matrix.png": "Confusion matrix"}

    def protocol(self) -> tuple[str, str]:
        """Return descriptions of the evaluation protocol and of the interval."""
        return "One view per image, as the saved image processor produces it", "Wilson score"
