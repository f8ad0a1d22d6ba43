"""Define evaluation tasks: their names, their protocol and the features that they share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..data.source import ImageSource
from .cache import FrozenFeatures
from .dense_heads import DepthSettings, SegmentationSettings
from .linear import LOGISTIC_CS, LinearGrid
from .object_discovery import BoxFormat, LostGrid
from .report import Score

Task = Literal[
    "knn", "linear", "logistic", "few_shot", "retrieval", "robustness", "segmentation", "depth", "lost"
]  # fmt: skip
TASKS: tuple[Task, ...] = (
    "knn", "linear", "logistic", "few_shot", "retrieval", "robustness", "segmentation", "depth", "lost"
)  # fmt: skip
ON_FEATURES: tuple[Task, ...] = ("knn", "linear", "logistic", "few_shot", "retrieval")


@dataclass(frozen=True)
class Protocol:
    """Settings of the evaluation tasks; the report describes them.

    Args:
        image_size: Side of the model input in pixels for tasks on whole images. The shorter side of an image is
            resized to 256/224 of it, followed by a center crop. Default: the model's own size.
        image_sizes: Sizes of the test images in `robustness`, in pixels. Default: 0.5, 0.75 and 1.25 times the
            model's own size, rounded to whole patches.
        knn_ks: Numbers of neighbors. Default: 10, 20, 100 and 200, each limited to the number of training images.
        temperature: Temperature of the kNN votes.
        linear: Heads of the linear probe.
        logistic_cs: Values of C for the logistic regression, ascending.
        select_on: Images on which the head and C are selected: "held_out", a stratified tenth of the training images,
            after which the selected model is refitted on all of them; or "judged", the test images themselves, which
            is optimistic but what the official linear evaluation does.
        shots: Numbers of training images per class in `few_shot`. Default: those of 1, 5 and 10 that every class has.
        num_tries: Number of random draws in `few_shot`; the mean over them is reported.
        segmentation: Settings of the segmentation head.
        depth: Settings of the depth head; pixels beyond its `max_depth` count as not measured.
        dense_image_size: Shorter side in pixels for segmentation and depth. Default: the model's own size.
        num_dense_blocks: Number of blocks whose tokens segmentation and depth read: 1, the last block, or 4, at the
            ends of the quarters.
        ignore_values: Stored mask values to ignore. Default: 255.
        reduce_labels: Whether 0 in masks is an ignored background and classes start at 1 (ADE20k).
        depth_scale: Meters per stored unit. Default: 0.001 for integers, 1 for floating-point values.
        boxes: Column of ground-truth boxes; see `ground_truth_boxes`.
        box_format: Format of the boxes; see `ground_truth_boxes`.
        lost_grid: Candidate settings of LOST. With a single candidate nothing is selected and all images are test
            images.
        max_side: Longer side in pixels to which LOST shrinks larger images.
        max_images: Maximum number of images of each set, sampled with the seed and stratified by class; the training
            images keep at least one per class.
        train_val_split: Share of images to hold out as test images, stratified by class, if the data has no
            validation split.
        batch_size: Number of images per forward pass.
    """

    image_size: int | None = None
    image_sizes: Sequence[int] | None = None
    knn_ks: Sequence[int] | None = None
    temperature: float = 0.07
    linear: LinearGrid = field(default_factory=LinearGrid)
    logistic_cs: Sequence[float] = LOGISTIC_CS
    select_on: Literal["held_out", "judged"] = "held_out"
    shots: Sequence[int] | None = None
    num_tries: int = 5
    segmentation: SegmentationSettings = field(default_factory=SegmentationSettings)
    depth: DepthSettings = field(default_factory=DepthSettings)
    dense_image_size: int | None = None
    num_dense_blocks: Literal[1, 4] = 1
    ignore_values: Sequence[int] | None = None
    reduce_labels: bool = False
    depth_scale: float | None = None
    boxes: str | None = None
    box_format: BoxFormat = "xywh"
    lost_grid: LostGrid = field(default_factory=LostGrid)
    max_side: int = 640
    max_images: int | None = None
    train_val_split: float | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.select_on not in ("held_out", "judged"):
            raise ValueError(f"select_on={self.select_on!r} is unknown. Use 'held_out' or 'judged'.")
        if self.train_val_split is not None and not 0 < self.train_val_split < 1:
            raise ValueError(f"train_val_split={self.train_val_split} must lie between 0 and 1.")
        if self.num_dense_blocks not in (1, 4):
            raise ValueError(f"num_dense_blocks={self.num_dense_blocks} must be 1 or 4.")
        if self.num_tries < 1:
            raise ValueError(f"num_tries={self.num_tries} must be at least 1.")


@dataclass(frozen=True, eq=False)
class LabeledFeatures:
    """Features of a set of images with their labels.

    Args:
        features: Features of all images.
        labels: (n,) class ids in [0, num_classes).
        num_classes: Number of classes, C.
        data: Name of the data.
    """

    features: FrozenFeatures
    labels: Tensor
    num_classes: int
    data: str

    @classmethod
    def of(cls, features: FrozenFeatures, source: ImageSource, num_classes: int) -> "LabeledFeatures":
        """Combine features with the labels of the images that could be read."""
        assert source.labels is not None
        by_id = dict(zip(source.ids, source.labels))
        return cls(features, torch.tensor([by_id[name] for name in features.ids]), num_classes, source.name)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def layer(self) -> int:
        """Return the number of the last block read."""
        return self.features.layers[-1]

    def score(self, rows: Tensor, **what: Any) -> Score:
        """Build a score from the contributions of these images."""
        return Score.measured(rows.double().numpy(), ids=self.features.ids, data=self.data, **what)


Measured = tuple[str, str, Tensor, dict[str, Any]]  # variant, metric, contribution of every image, settings
