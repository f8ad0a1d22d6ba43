"""Semantic segmentation and depth estimation as tasks of `finetune`: data, loss, and metrics at target size.

Training images are cropped, scaled and flipped together with their maps, and their colors are changed. In evaluation
the whole image is resized to one size, as the saved processor does, and the prediction is resized to the image's own
mask or depth map before it is scored. The scores are therefore those of `pipeline`.

Shape letters: B images, C classes, (h, w) input of the model, (H, W) pixels of an image's own map.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers.image_processing_utils import BaseImageProcessor

from ..data.joint_transform import JointTransform, resize_map
from ..data.maps import IGNORE, Array, DenseSource, TargetReport, check_targets, image_size, read_class_names
from ..data.source import ImageRecord
from ..evaluation.intervals import bootstrap_interval
from ..figures.masks import depth_figure, mask_figure
from ..models.configuration_regvit import RegViTConfig
from ..models.modeling_regvit import RegViTForDepthEstimation, RegViTForSemanticSegmentation, scale_invariant_log_loss
from ..models.processing import dense_processor, statistics_of
from ..training.distributed import SharedBatchNorm
from .arguments import FinetuningArguments
from .data import Item, class_weights, open_data, output_size, processed
from .tasks import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_PANEL_IMAGES = 4
_FOR_CLASSES_OF_IMAGES = {
    "mixup_alpha": 0.0, "cutmix_alpha": 0.0, "random_erasing": 0.0, "color_jitter": 0.0, "label_smoothing_factor": 0.0,
    "loss": "cross_entropy", "pooling": None,
}  # fmt: skip


# ---- Data --------------------------------------------------------------------------------------------------------


def _check_options(args: FinetuningArguments) -> None:
    wrong = [name for name, default in _FOR_CLASSES_OF_IMAGES.items() if getattr(args, name) != default]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} cannot be used with task {args.task}. Leave out these options.")
    if args.augmentation not in ("none", "crop"):
        raise ValueError(f"augmentation is '{args.augmentation}', but task {args.task} supports 'crop' or 'none'.")
    if args.class_weights and args.task != "semantic-segmentation":
        raise ValueError("class_weights apply only to tasks with classes. Leave them out.")


def typical_size(source: DenseSource, shorter: int, patch: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) in whole patches with the median aspect ratio of the images."""
    sizes = [image_size(source, index) for index in range(len(source))]
    ratio = float(np.median([width / height for width, height in sizes]))
    height, width = (shorter, shorter * ratio) if ratio >= 1 else (shorter / ratio, shorter)
    rows, columns = max(1, round(height / patch[0])), max(1, round(width / patch[1]))
    return rows * patch[0], columns * patch[1]


class DenseTrainItem:
    """Conversion of an image and its map to a training item; a class, so that spawned workers can pickle it."""

    def __init__(self, source: DenseSource, transform: JointTransform | None, processor: BaseImageProcessor) -> None:
        self.source, self.transform, self.processor = source, transform, processor

    def __call__(self, record: ImageRecord, index: int) -> Item:
        """Return `pixel_values` (3, h, w) and `labels` (h, w)."""
        target = self.source.target(index)
        if self.transform is None:
            pixels = processed(self.processor, record.image)
            return {
                "pixel_values": pixels,
                "labels": torch.from_numpy(resize_map(target, (pixels.shape[1], pixels.shape[2]))),
            }
        # Torch's generator is seeded for this image, epoch and repeat; one of its numbers seeds NumPy.
        rng = np.random.default_rng(int(torch.randint(2**62, ()).item()))
        picture, target, inside = self.transform(record.image, target, rng)
        values = torch.from_numpy(picture).permute(2, 0, 1).float() / 255  # (3, h, w)
        mean, std = (torch.tensor(value)[:, None, None] for value in statistics_of(self.processor))
        values = (values - mean) / std * torch.from_numpy(inside)  # padding is 0 after normalization
        return {"pixel_values": values, "labels": torch.from_numpy(target)}


class DenseEvalItem:
    """Conversion of an image to an evaluation item: pixels from the saved processor, the map at its own size.

    Maps are padded on the right and at the bottom to the largest of the split, so that they can be stacked; `sizes`
    holds their original (height, width).
    """

    def __init__(self, source: DenseSource, processor: BaseImageProcessor, *, left_out: Sequence[int] = ()) -> None:
        self.source, self.processor, self.left_out = source, processor, tuple(left_out)
        sizes = [image_size(source, index) for index in range(len(source))]
        self.largest = max(height for _, height in sizes), max(width for width, _ in sizes)

    def _padded(self, target: Array) -> Tensor:
        fill = IGNORE if self.source.kind == "masks" else 0
        whole = np.full(self.largest, fill, dtype=target.dtype)
        whole[: target.shape[0], : target.shape[1]] = target
        return torch.from_numpy(whole)

    def __call__(self, record: ImageRecord, index: int) -> Item:
        """Return `pixel_values` (3, h, w), padded `labels` and `sizes` (2,)."""
        target = self.source.target(index)
        if self.left_out:
            target = np.where(np.isin(target, self.left_out), IGNORE, target).astype(target.dtype)
        return {
            "pixel_values": processed(self.processor, record.image),
            "labels": self._padded(target),
            "sizes": torch.tensor(target.shape),
        }

    def blank(self) -> Item:
        """Return a placeholder for an unusable image; its whole map is ignored."""
        masks = self.source.kind == "masks"
        nothing = np.full((1, 1), IGNORE, dtype=np.uint8) if masks else np.zeros((1, 1), dtype=np.float32)
        return {
            "pixel_values": torch.zeros(3, *output_size(self.processor)),
            "labels": self._padded(nothing),
            "sizes": torch.tensor(nothing.shape),
        }


# ---- Common base of both tasks -----------------------------------------------------------------------------------


class _DenseTask(Task, Protocol):
    """Base of tasks with one map per image; the subclasses define the kind of map."""

    measures: Sequence[str]  # metrics that get an interval
    panels: str  # file of the figure
    report: TargetReport
    _metric: Any
    _rows: list[Array]  # metric rows of every image, for the intervals
    _read_at: tuple[int, int]  # (height, width) of the input
    train: DenseSource
    validation: DenseSource | None

    def __init__(
        self, args: FinetuningArguments, train: DenseSource | None = None, validation: DenseSource | None = None
    ) -> None:
        self.args = args
        _check_options(args)
        if train is None:
            parts = open_data(args, **self._options())
            self.train, self.validation = cast(DenseSource, parts.train), cast(DenseSource | None, parts.heldout)
            self.report = cast(TargetReport, parts.targets)
        else:
            self.train, self.validation, self.report = train, validation, check_targets(train)
        self.start_metrics()
        self._read_at = (0, 0)

    # What the subclasses define.

    def _options(self) -> dict[str, Any]: ...  # of loading the maps

    def _new_metric(self) -> Any: ...

    def _transform(self, size: tuple[int, int]) -> JointTransform: ...

    def _target_fields(self) -> dict[str, Any]: ...  # of the configuration

    def _maps(self, model: nn.Module, pixel_values: Tensor) -> Tensor: ...  # output (B, C, h, w) of the model

    def _training_loss(self, maps: Tensor, labels: Tensor) -> Tensor: ...

    def _scored(self, own: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]: ...  # prediction (H, W) and loss of a map

    def _figure(self, rows: list[tuple[Image.Image, Array, Array]]) -> "Figure": ...

    # What they share.

    def image_processor(self, processor: BaseImageProcessor, config: RegViTConfig) -> BaseImageProcessor:
        """Return a processor with one size for all images, in the median aspect ratio of the training images."""
        shorter = self.args.image_size or min(config.image_shape)
        size = self._read_at = typical_size(self.train, shorter, config.patch_shape)
        logger.info("Images are resized to %d x %d pixels (height x width).", *size)
        return dense_processor(processor, size)

    def train_item(self, processor: BaseImageProcessor) -> DenseTrainItem:
        """Return the augmentation of a training image and its map."""
        transform = None if self.args.augmentation == "none" else self._transform(output_size(processor))
        return DenseTrainItem(self.train, transform, processor)

    def evaluation_item(self, processor: BaseImageProcessor) -> DenseEvalItem:
        """Return the preprocessing of a validation image and its map."""
        left_out: list[int] = []
        if self.args.ignore_extra_classes:
            counts = [self.report.class_pixels[name] for name in self.train.class_names]
            left_out = [label for label, count in enumerate(counts) if not count]
        return DenseEvalItem(cast(DenseSource, self.validation), processor, left_out=left_out)

    def config_fields(self) -> dict[str, Any]:
        """Return the class names or the largest depth, and the blocks that the head reads if they were given."""
        return self._target_fields() | ({"head_layers": self.args.head_layers} if self.args.head_layers else {})

    def loss(self, model: nn.Module, batch: dict[str, Tensor], *, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of one batch and, in evaluation, predictions at the size of each target."""
        maps, labels = self._maps(model, batch["pixel_values"]), batch["labels"]
        if training:
            return self._training_loss(maps, labels), {"logits": maps}
        predicted, losses = torch.zeros_like(labels), []
        for i, (height, width) in enumerate(batch["sizes"].tolist()):
            own = F.interpolate(maps[i, None].float(), size=(height, width), mode="bilinear", align_corners=False)
            one, loss = self._scored(own[0], labels[i, :height, :width])
            predicted[i, :height, :width] = one.to(labels.dtype)
            losses.append(loss)
        return torch.stack(losses).mean(), {"logits": predicted}

    def start_metrics(self) -> None:
        """Reset the metrics."""
        self._metric, self._rows = self._new_metric(), []

    def update_metrics(self, predictions: Tensor, labels: Tensor) -> None:
        """Add one gathered batch, image by image."""
        for one, truth in zip(predictions, labels, strict=True):
            self._metric.add(prediction=one, reference=truth)
            self._rows += [row for row in self._metric.reduce([one], [truth]) if np.any(row)]

    def compute_metrics(self) -> dict[str, float]:
        """Return the metrics of all batches since `start_metrics`."""
        return self._metric.compute()

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Return the bootstrap intervals of all metrics, from resampled images."""
        rows = np.asarray(self._rows, dtype=np.float64)

        def interval(name: str) -> tuple[float, float]:
            return bootstrap_interval(
                rows, seed=self.args.seed, statistic=lambda some: self._metric.result(some)[name]
            )

        return {name: interval(name) for name in self.measures} if len(rows) > 1 else {}

    def write_panels(self, folder: Path, model: nn.Module, processor: BaseImageProcessor) -> dict[str, str]:
        """Write a figure with image, ground truth and prediction of some evenly spaced validation images."""
        from ..figures.maps import save_figure

        if (source := self.validation) is None:
            return {}
        rows = []
        places = np.linspace(0, len(source) - 1, min(_PANEL_IMAGES, len(source))).round().astype(int)
        for index in places.tolist():
            truth, image = source.target(index), source.read(index)
            batch = {
                "pixel_values": processed(processor, image)[None],
                "labels": torch.from_numpy(truth)[None],
                "sizes": torch.tensor([truth.shape]),
            }
            with torch.no_grad():
                predicted = self.loss(model, batch, training=False)[1]["logits"][0]
            rows.append((image, truth, predicted.numpy()))
        save_figure(self._figure(rows), folder / self.panels)
        return {self.panels: "Image, ground truth and prediction"}

    def describe(self) -> dict[str, str]:
        """Return a summary of the training maps."""
        return {f"training {self.train.kind}": self.report.summary()}

    def protocol(self) -> tuple[str, str]:
        """Return descriptions of the evaluation protocol and of the intervals."""
        height, width = self._read_at
        return (
            f"Whole images, resized to {height} x {width} pixels; predictions are resized to the image's own "
            f"{'mask' if self.train.kind == 'masks' else 'depth map'} before scoring"
        ), "2,000 bootstrap resamples"


# ---- Segmentation ------------------------------------------------------------------------------------------------


class SemanticSegmentation(_DenseTask):
    """Semantic segmentation task for `finetune`.

    Args:
        args: Arguments of the run.
        train: Training images with masks, used instead of those that `args` names.
        validation: Validation images with masks that belong to `train`.

    Raises:
        DenseDataError: The masks cannot be used.
    """

    name = "semantic-segmentation"
    model_class = RegViTForSemanticSegmentation
    shown = ("mean_iou", "overall_accuracy")
    measures = ("mean_iou", "mean_accuracy", "overall_accuracy")
    panels = "masks.png"

    def __init__(
        self, args: FinetuningArguments, train: DenseSource | None = None, validation: DenseSource | None = None
    ) -> None:
        super().__init__(args, train, validation)
        self.names = self.train.class_names
        counts = np.array([self.report.class_pixels[name] for name in self.names])
        self.weights = class_weights(args.class_weights, counts, self.names)
        if args.gradient_accumulation_steps > 1:
            logger.warning(
                "The batch norm of the head sees one micro-batch at a time, so %d micro-batches of %d images are not "
                "equivalent to one batch of %d. To avoid this, use more processes instead of "
                "gradient_accumulation_steps.", args.gradient_accumulation_steps,
                args.per_device_train_batch_size * args.world_size, args.images_per_step,
            )  # fmt: skip

    def for_several_processes(self, network: nn.Module) -> None:
        """Replace the batch norm of the head by one with statistics over all processes."""
        own: Any = network.head_norm
        shared = SharedBatchNorm(own.num_features, eps=own.eps, momentum=own.momentum).to(own.weight)
        shared.load_state_dict(own.state_dict())
        for name, parameter in own.named_parameters():
            shared.get_parameter(name).requires_grad_(parameter.requires_grad)
        network.head_norm = shared.train(own.training)

    def _options(self) -> dict[str, Any]:
        args = self.args
        names: Mapping[int, str] | Sequence[str] | None = args.class_names
        if names and len(names) == 1 and names[0].endswith(".json"):
            names = read_class_names(names[0])
        return {"class_names": names, "ignore_values": args.ignore_values, "reduce_labels": args.do_reduce_labels}

    def _new_metric(self) -> Any:
        from ..evaluation.metrics import MeanIoU

        return MeanIoU(num_classes=len(self.train.class_names), ignore_index=IGNORE)

    def _transform(self, size: tuple[int, int]) -> JointTransform:
        return JointTransform(size, flip_probability=self.args.flip_probability)

    def _target_fields(self) -> dict[str, Any]:
        return Task.config_fields(self) | {"semantic_loss_ignore_index": IGNORE}

    def _maps(self, model: nn.Module, pixel_values: Tensor) -> Tensor:
        return model(pixel_values=pixel_values).logits

    def _training_loss(self, maps: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy over all pixels, ignored ones counting as 0.

        Because the sum is divided by all pixels (as in mmsegmentation), the loss of a batch is the mean of the losses
        of its parts.
        """
        weights = None if self.weights is None else self.weights.to(maps.device)
        total = F.cross_entropy(maps.float(), labels.long(), weight=weights, ignore_index=IGNORE, reduction="sum")
        return total / labels.numel()

    def _scored(self, own: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        total = F.cross_entropy(own[None], truth[None].long(), ignore_index=IGNORE, reduction="sum")
        return own.argmax(0), total / truth.numel()

    def compute_metrics(self) -> dict[str, float]:
        """Return the metrics of all batches since `start_metrics`, with `iou_*` for the classes that occur."""
        scores = self._metric.compute()
        named = zip(self.names, scores["per_category_iou"], strict=True)
        means = {key: scores[key] for key in self.measures}
        return means | {f"iou_{name}": value for name, value in named if not np.isnan(value)}

    def _figure(self, rows: list[tuple[Image.Image, Array, Array]]) -> "Figure":
        return mask_figure(rows, self.names)


# ---- Depth -------------------------------------------------------------------------------------------------------


class DepthEstimation(_DenseTask):
    """Depth estimation task for `finetune`: the scale-invariant log loss, averaged over images.

    Args:
        args: Arguments of the run.
        train: Training images with depth maps, used instead of those that `args` names.
        validation: Validation images with depth maps that belong to `train`.

    Raises:
        DenseDataError: The depth maps cannot be used.
    """

    name = "depth-estimation"
    model_class = RegViTForDepthEstimation
    shown = ("abs_rel", "delta1")
    measures = ("rmse", "abs_rel", "delta1", "delta2", "delta3")
    panels = "depth.png"

    def _options(self) -> dict[str, Any]:
        return {"depth_scale": self.args.depth_scale, "max_depth": self.args.max_depth}

    def _new_metric(self) -> Any:
        from ..evaluation.metrics import DepthErrors

        return DepthErrors(max_depth=self.args.max_depth)

    def _transform(self, size: tuple[int, int]) -> JointTransform:
        return JointTransform.for_depth(size, flip_probability=self.args.flip_probability)

    def _target_fields(self) -> dict[str, Any]:
        return {"max_depth": self.args.max_depth}

    def fits_head(self, config: RegViTConfig) -> bool:
        """Return True if a head with this configuration has bins for the same depths."""
        return config.max_depth == self.args.max_depth

    def _maps(self, model: nn.Module, pixel_values: Tensor) -> Tensor:
        return model(pixel_values=pixel_values).predicted_depth[:, None]

    def _training_loss(self, maps: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([_depth_loss(one, truth) for one, truth in zip(maps[:, 0].float(), labels)]).mean()

    def _scored(self, own: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        return own[0], _depth_loss(own[0], truth)

    def _figure(self, rows: list[tuple[Image.Image, Array, Array]]) -> "Figure":
        return depth_figure(rows)


def _depth_loss(depth: Tensor, truth: Tensor) -> Tensor:
    return scale_invariant_log_loss(depth, truth.float(), truth > 0)
