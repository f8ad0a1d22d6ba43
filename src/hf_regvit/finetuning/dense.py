"""Semantic segmentation and depth estimation as tasks of `finetune`: data, loss, and metrics at target size.

Training images are cropped, scaled and flipped together with their maps, and their colors are changed. In evaluation
the whole image is resized to one size, as the saved processor does, and the prediction is resized to the image's own
mask or depth map before it is scored. The scores are therefore those of `pipeline`.

Shape letters: B images, C classes, (h, w) input of the model, (H, W) pixels of an image's own map.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..data.joint_transform import JointTransform, resize_map
from ..data.maps import (
    IGNORE,
    Array,
    DenseSource,
    TargetReport,
    check_targets,
    image_size,
    read_class_names,
)
from ..data.source import ImageRecord
from ..evaluation.intervals import bootstrap_interval
from ..figures.masks import depth_figure, mask_figure
from ..models.modeling_regvit import RegViTForDepthEstimation, RegViTForSemanticSegmentation, scale_invariant_log_loss
from ..models.processing import dense_processor
from ..training.distributed import SharedBatchNorm
from .arguments import FinetuningArguments
from .data import EvaluationImages, TrainImages, bad_images, open_data, stack, weights_of_classes

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

    def __init__(self, source: DenseSource, transform: JointTransform | None, processor: Any) -> None:
        self.source, self.transform, self.processor = source, transform, processor

    def __call__(self, record: ImageRecord, index: int) -> dict[str, Any]:
        """Return `pixel_values` (3, h, w) and `labels` (h, w)."""
        target = self.source.target(index)
        if self.transform is None:
            pixels = _processed(self.processor, record.image)
            return {
                "pixel_values": pixels,
                "labels": torch.from_numpy(resize_map(target, (pixels.shape[1], pixels.shape[2]))),
            }
        # Torch's generator is seeded for this image, epoch and repeat; one of its numbers seeds NumPy.
        rng = np.random.default_rng(int(torch.randint(2**62, ()).item()))
        picture, target, inside = self.transform(record.image, target, rng)
        values = torch.from_numpy(picture).permute(2, 0, 1).float() / 255  # (3, h, w)
        mean, std = (torch.tensor(values_)[:, None, None] for values_ in (_mean(self.processor), _std(self.processor)))
        values = (values - mean) / std * torch.from_numpy(inside)  # padding is 0 after normalization
        return {"pixel_values": values, "labels": torch.from_numpy(target)}


class DenseEvalItem:
    """Conversion of an image to an evaluation item: pixels from the saved processor, the map at its own size.

    Maps are padded on the right and at the bottom to the largest of the split, so that they can be stacked; `sizes`
    holds their original (height, width).
    """

    def __init__(self, source: DenseSource, processor: Any, *, left_out: Sequence[int] = ()) -> None:
        self.source, self.processor, self.left_out = source, processor, tuple(left_out)
        sizes = [image_size(source, index) for index in range(len(source))]
        self.largest = max(height for _, height in sizes), max(width for width, _ in sizes)

    def _padded(self, target: Array) -> Tensor:
        fill = IGNORE if self.source.kind == "masks" else 0
        whole = np.full(self.largest, fill, dtype=target.dtype)
        whole[: target.shape[0], : target.shape[1]] = target
        return torch.from_numpy(whole)

    def __call__(self, record: ImageRecord, index: int) -> dict[str, Any]:
        """Return `pixel_values` (3, h, w), padded `labels` and `sizes` (2,)."""
        target = self.source.target(index)
        if self.left_out:
            target = np.where(np.isin(target, self.left_out), IGNORE, target).astype(target.dtype)
        return {
            "pixel_values": _processed(self.processor, record.image),
            "labels": self._padded(target),
            "sizes": torch.tensor(target.shape),
        }

    def blank(self) -> dict[str, Any]:
        """Return a placeholder for an unusable image; its whole map is ignored."""
        masks = self.source.kind == "masks"
        nothing = np.full((1, 1), IGNORE, dtype=np.uint8) if masks else np.zeros((1, 1), dtype=np.float32)
        return {
            "pixel_values": torch.zeros(3, self.processor.size["height"], self.processor.size["width"]),
            "labels": self._padded(nothing),
            "sizes": torch.tensor(nothing.shape),
        }


def _processed(processor: Any, image: Any) -> Tensor:
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


def _mean(processor: Any) -> list[float]:
    return list(processor.image_mean)


def _std(processor: Any) -> list[float]:
    return list(processor.image_std)


def _at_own_size(maps: Tensor, sizes: Tensor) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Yield for every image of (B, C, h, w) its map resized to (C, H, W), and (H, W)."""
    for one, size in zip(maps, sizes.tolist()):
        height, width = int(size[0]), int(size[1])
        yield (
            F.interpolate(one[None].float(), size=(height, width), mode="bilinear", align_corners=False)[0],
            (
                height,
                width,
            ),
        )


# ---- Common base of both tasks -----------------------------------------------------------------------------------


class _DenseTask:
    """Base of tasks with one map per image; the subclasses define the kind of map."""

    name: str
    model_class: Any
    shown: Sequence[str]
    measures: Sequence[str]  # metrics that get an interval
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

    def _options(self) -> dict[str, Any]:
        raise NotImplementedError

    def _new_metric(self) -> Any:
        raise NotImplementedError

    def _transform(self, size: tuple[int, int]) -> JointTransform:
        raise NotImplementedError

    def _left_out(self) -> Sequence[int]:
        return ()

    def image_processor(self, processor: Any, config: Any) -> Any:
        """Return a processor with one size for all images, in the median aspect ratio of the training images."""
        shorter = self.args.image_size or min(config.image_shape)
        size = self._read_at = typical_size(self.train, shorter, config.patch_shape)
        logger.info("Images are resized to %d x %d pixels (height x width).", *size)
        return dense_processor(processor, size)

    def datasets(self, processor: Any) -> tuple[Dataset, Dataset | None]:
        """Return the training and validation images as model inputs."""
        args = self.args
        size = processor.size["height"], processor.size["width"]
        transform = None if args.augmentation == "none" else self._transform(size)
        train = TrainImages(
            self.train,
            DenseTrainItem(self.train, transform, processor),
            seed=args.seed,
            bad_images=bad_images(args, self.train),
        )
        if self.validation is None:
            return train, None
        item = DenseEvalItem(self.validation, processor, left_out=self._left_out())
        guard = bad_images(args, self.validation)
        return train, EvaluationImages(self.validation, item, blank=item.blank, bad_images=guard)

    def train_collator(self) -> Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]:
        """Return the function that stacks items."""
        return stack

    def reduce(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the predictions unchanged; they are small already."""
        return logits

    def start_metrics(self) -> None:
        """Reset the metrics."""
        self._metric = self._new_metric()
        self._rows: list[Array] = []  # metric rows of every image, for the intervals

    def update_metrics(self, predictions: Any, labels: Any) -> None:
        """Add one gathered batch, image by image."""
        for one, truth in zip(np.asarray(predictions), np.asarray(labels), strict=True):
            self._metric.add(prediction=one, reference=truth)
            self._rows += [row for row in self._metric.reduce([one], [truth]) if np.any(row)]

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Return the bootstrap intervals of all metrics, from resampled images."""
        rows = np.asarray(self._rows, dtype=np.float64)

        def interval(name: str) -> tuple[float, float]:
            return bootstrap_interval(
                rows, seed=self.args.seed, statistic=lambda some: self._metric.result(some)[name]
            )

        return {name: interval(name) for name in self.measures} if len(rows) > 1 else {}

    def protocol(self) -> tuple[str, str]:
        """Return descriptions of the evaluation protocol and of the intervals."""
        height, width = self._read_at
        return (
            f"Whole images, resized to {height} x {width} pixels; predictions are resized to the image's own "
            f"{'mask' if self.train.kind == 'masks' else 'depth map'} before scoring"
        ), "2,000 bootstrap resamples"

    def _panel_rows(self, model: Any, processor: Any) -> list[tuple[Any, Array, Array]]:
        """Return image, ground truth and prediction of some evenly spaced validation images."""
        source = self.validation
        if source is None:
            return []
        rows = []
        places = np.linspace(0, len(source) - 1, min(_PANEL_IMAGES, len(source))).round().astype(int)
        for index in places.tolist():
            truth, picture = source.target(index), source.read(index)
            with torch.no_grad():
                batch = {
                    "pixel_values": _processed(processor, picture)[None],
                    "labels": torch.from_numpy(truth)[None],
                    "sizes": torch.tensor([truth.shape]),
                }
                predicted = self.loss(model, batch, training=False)[1]["logits"][0]
            rows.append((picture, truth, predicted.numpy()))
        return rows

    def loss(self, model: Any, batch: dict[str, Tensor], *, training: bool) -> tuple[Tensor, Any]:
        raise NotImplementedError


# ---- Segmentation ------------------------------------------------------------------------------------------------


class SemanticSegmentation(_DenseTask):
    """Semantic segmentation task for `finetune`; see `hf_regvit.finetuning.Task`.

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

    def __init__(
        self, args: FinetuningArguments, train: DenseSource | None = None, validation: DenseSource | None = None
    ) -> None:
        super().__init__(args, train, validation)
        self.names = self.train.class_names
        self.weights = pixel_weights(args.class_weights, self.report, self.names)
        if args.gradient_accumulation_steps > 1:
            logger.warning(
                "The batch norm of the head sees one micro-batch at a time, so %d micro-batches of %d images are not "
                "equivalent to one batch of %d. To avoid this, use more processes instead of "
                "gradient_accumulation_steps.",
                args.gradient_accumulation_steps,
                args.per_device_train_batch_size * args.world_size,
                args.images_per_step,
            )

    def for_several_processes(self, network: Any) -> Any:
        """Replace the batch norm of the head by one with statistics over all processes."""
        own = network.head_norm
        shared = SharedBatchNorm(own.num_features, eps=own.eps, momentum=own.momentum).to(own.weight)
        shared.load_state_dict(own.state_dict())
        for name, parameter in own.named_parameters():
            shared.get_parameter(name).requires_grad_(parameter.requires_grad)
        network.head_norm = shared.train(own.training)
        return network

    def _options(self) -> dict[str, Any]:
        args = self.args
        names: Any = args.class_names
        if names and len(names) == 1 and names[0].endswith(".json"):
            names = read_class_names(names[0])
        return {
            "class_names": names,
            "ignore_values": args.ignore_values,
            "reduce_labels": args.do_reduce_labels,
        }

    def _new_metric(self) -> Any:
        from ..evaluation.metrics import MeanIoU

        return MeanIoU(num_classes=len(self.train.class_names), ignore_index=IGNORE)

    def _transform(self, size: tuple[int, int]) -> JointTransform:
        return JointTransform(size, flip_probability=self.args.flip_probability)

    def _left_out(self) -> Sequence[int]:
        if not self.args.ignore_extra_classes:
            return ()
        return [i for i, name in enumerate(self.names) if not self.report.class_pixels[name]]

    def config_fields(self) -> dict[str, Any]:
        """Return the class names, and the blocks that the head reads if they were given."""
        fields: dict[str, Any] = {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: label for label, name in enumerate(self.names)},
            "semantic_loss_ignore_index": IGNORE,
        }
        return fields | ({"head_layers": self.args.head_layers} if self.args.head_layers else {})

    def fits_head(self, config: Any) -> bool:
        """Return True if a head with this configuration has the same classes in the same order."""
        return [config.id2label.get(i) for i in range(config.num_labels)] == list(self.names)

    def loss(self, model: Any, batch: dict[str, Tensor], *, training: bool) -> tuple[Tensor, Any]:
        """Return the mean cross-entropy over all pixels, ignored ones counting as 0, and predictions as class ids.

        Because the sum is divided by all pixels (as in mmsegmentation), the loss of a batch is the mean of the losses
        of its parts.
        """
        logits = model(pixel_values=batch["pixel_values"]).logits  # (B, C, h, w)
        labels = batch["labels"]
        if training:
            weights = None if self.weights is None else self.weights.to(logits.device)
            total = F.cross_entropy(
                logits.float(), labels.long(), weight=weights, ignore_index=IGNORE, reduction="sum"
            )
            return total / labels.numel(), {"logits": logits}
        predicted = torch.zeros_like(labels)
        losses = []
        for i, (own, (height, width)) in enumerate(_at_own_size(logits, batch["sizes"])):
            truth = labels[i, :height, :width].long()
            predicted[i, :height, :width] = own.argmax(0).to(labels.dtype)
            losses.append(
                F.cross_entropy(own[None], truth[None], ignore_index=IGNORE, reduction="sum") / truth.numel()
            )
        return torch.stack(losses).mean(), {"logits": predicted}

    def compute_metrics(self) -> dict[str, float]:
        """Return the metrics of all batches since `start_metrics`, with `iou_*` for the classes that occur."""
        scores = self._metric.compute()
        named = zip(self.names, scores["per_category_iou"], strict=True)
        means = {key: scores[key] for key in ("mean_iou", "mean_accuracy", "overall_accuracy")}
        return means | {f"iou_{name}": value for name, value in named if not np.isnan(value)}

    def write_panels(self, folder: Path, model: Any, processor: Any) -> dict[str, str]:
        """Write `masks.png` with image, ground truth and prediction of some validation images."""
        from ..figures.maps import save_figure

        rows = self._panel_rows(model, processor)
        if not rows:
            return {}
        save_figure(mask_figure(rows, self.names), folder / "masks.png")
        return {"masks.png": "Image, ground truth and prediction"}

    def describe(self) -> dict[str, str]:
        """Return a summary of the training masks."""
        return {"training masks": self.report.summary()}


def pixel_weights(wanted: Sequence[str] | None, report: TargetReport, names: Sequence[str]) -> Tensor | None:
    """Return (C,) weights whose mean over the counted training pixels is 1; `balanced` is inverse to their number."""
    return weights_of_classes(wanted, np.array([report.class_pixels[name] for name in names]), names)


# ---- Depth -------------------------------------------------------------------------------------------------------


class DepthEstimation(_DenseTask):
    """Depth estimation task for `finetune`; see `hf_regvit.finetuning.Task`.

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

    def _options(self) -> dict[str, Any]:
        return {"depth_scale": self.args.depth_scale, "max_depth": self.args.max_depth}

    def _new_metric(self) -> Any:
        from ..evaluation.metrics import DepthErrors

        return DepthErrors(max_depth=self.args.max_depth)

    def _transform(self, size: tuple[int, int]) -> JointTransform:
        return JointTransform.for_depth(size, flip_probability=self.args.flip_probability)

    def config_fields(self) -> dict[str, Any]:
        """Return the range of the bins, and the blocks that the head reads if they were given."""
        fields: dict[str, Any] = {"max_depth": self.args.max_depth}
        return fields | ({"head_layers": self.args.head_layers} if self.args.head_layers else {})

    def fits_head(self, config: Any) -> bool:
        """Return True if a head with this configuration has bins for the same depths."""
        return config.max_depth == self.args.max_depth

    def loss(self, model: Any, batch: dict[str, Tensor], *, training: bool) -> tuple[Tensor, Any]:
        """Return the scale-invariant log loss, averaged over images, and predictions in meters."""
        depth = model(pixel_values=batch["pixel_values"]).predicted_depth  # (B, h, w)
        labels = batch["labels"]
        if training:
            pairs = list(zip(depth.float(), labels))
            return torch.stack([_depth_loss(one, truth) for one, truth in pairs]).mean(), {"logits": depth}
        predicted = torch.zeros_like(labels)
        losses = []
        for i, (own, (height, width)) in enumerate(_at_own_size(depth[:, None], batch["sizes"])):
            predicted[i, :height, :width] = own[0]
            losses.append(_depth_loss(own[0], labels[i, :height, :width]))
        return torch.stack(losses).mean(), {"logits": predicted}

    def compute_metrics(self) -> dict[str, float]:
        """Return the metrics of all batches since `start_metrics`."""
        return self._metric.compute()

    def write_panels(self, folder: Path, model: Any, processor: Any) -> dict[str, str]:
        """Write `depth.png` with image, ground truth and prediction of some validation images, on one scale in m."""
        from ..figures.maps import save_figure

        rows = self._panel_rows(model, processor)
        if not rows:
            return {}
        save_figure(depth_figure(rows), folder / "depth.png")
        return {"depth.png": "Image, ground truth and prediction"}

    def describe(self) -> dict[str, str]:
        """Return a summary of the training depth maps."""
        return {"training depth": self.report.summary()}


def _depth_loss(depth: Tensor, truth: Tensor) -> Tensor:
    return scale_invariant_log_loss(depth, truth.float(), truth > 0)
