"""Evaluation of frozen backbones: `evaluate_backbone` runs tasks on frozen features and returns one report.

Features are extracted once per model and set of images, can be cached on disk, and are shared by the tasks.
Hyperparameters (a learning rate, a penalty, the settings of LOST) are selected on images that are not test images. If
the protocol says otherwise, the report states it. `compare_backbones` puts several models into one table.
"""

import difflib
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from ..data.files import stratified_split
from ..data.loading import load_images
from ..data.maps import DenseSource, check_targets, load_depth, load_masks
from ..data.parts import Data, _check_labels, _in_classes_of, _missing_part, _part, _some
from ..data.source import ImageSource, MissingSplitError, Split
from ..models.configuration_regvit import __version__
from ..models.families import describe_model
from ..models.loading import load_model, short_names, weights_fingerprint
from ..models.processing import EvaluationTransform
from .cache import image_digests, read_features
from .dense_features import four_blocks, read_dense_features
from .dense_heads import LinearDepthResult, LinearSegmentationResult, linear_depth, linear_segmentation
from .image_tasks import hits, knn_votes, neighbours, score_features
from .object_discovery import LostEvaluation, evaluate_lost, ground_truth_boxes
from .report import EvaluationReport, EvaluationTable, Score
from .tasks import ON_FEATURES, TASKS, LabeledFeatures, Protocol, Task

logger = logging.getLogger(__name__)

# --- Entry points


def evaluate_backbone(
    model: nn.Module,
    data: Data,
    *,
    tasks: Sequence[Task] = ("knn", "linear"),
    train: Data | None = None,
    task_data: Mapping[str, Data] | None = None,
    name: str | None = None,
    processor: Any = None,
    protocol: Protocol | None = None,
    cache_dir: str | Path | None = None,
    seed: int = 0,
) -> EvaluationReport:
    """Run tasks on the frozen features of one model.

    Args:
        model: Model that `features.read_tokens` supports; it is not modified.
        data: Images with the targets that the tasks need: labels, masks, depth maps, boxes. Without `train`, its
            training split is used for fitting and its validation split for testing; LOST selects its settings on one
            half of all images and is tested on the other.
        tasks: Tasks to run, from `TASKS`.
        train: Images for fitting and selection; `data` (its validation split, if it has one) is then used for testing
            only.
        task_data: Data for single tasks that need other images: `{"segmentation": "camvid"}`.
        name: Name of the model in the report. Default: the name in its configuration.
        processor: Image processor; only its mean and standard deviation are used. Default: the model's own.
        protocol: Settings of the tasks; see `Protocol`.
        cache_dir: Folder for cached features; None disables the cache.
        seed: Random seed for sampling, splits and confidence intervals.

    Raises:
        ValueError: A task is unknown, labels or boxes are missing, the classes of the splits differ, or there are too
            few images.
    """
    return _Evaluation(
        model=model,
        name=name or describe_model(model).name,
        data=data,
        train=train,
        task_data=task_data or {},
        processor=processor,
        protocol=protocol or Protocol(),
        cache_dir=cache_dir,
        seed=seed,
    ).run(_checked(tasks))


def compare_backbones(
    models: Sequence[str | Path],
    data: Data,
    *,
    device: str | torch.device | None = None,
    on_report: Callable[[EvaluationTable], None] | None = None,
    **options: Any,
) -> EvaluationTable:
    """Compare several models on the same images, with paired differences to the first model.

    Args:
        models: Folders, Hub ids or timm/NAME.
        data: Images with targets; see `evaluate_backbone`.
        device: Device to compute on.
        on_report: Callback that receives the table so far after every model, so that a later failure does not lose
            earlier results.
        options: Options of `evaluate_backbone`, the same for all models.

    Raises:
        ValueError: `models` is empty or names a model twice, or an option is invalid; see `evaluate_backbone`.
    """
    if not models or len(set(map(str, models))) < len(models):
        raise ValueError(f"models={[str(model) for model in models]}: expected at least one model. Name each once.")
    _checked(options.get("tasks", ("knn",)))  # before the first model is loaded
    table = EvaluationTable(())
    for path, name in zip(models, short_names(models)):
        model, processor = load_model(path, device=device)
        report = evaluate_backbone(model, data, **{"name": name, "processor": processor} | options)
        table = EvaluationTable((*table.reports, report))
        if on_report is not None:
            on_report(table)
    return table


def _checked(tasks: Sequence[str]) -> tuple[Task, ...]:
    for task in tasks:
        if task not in TASKS:
            nearest = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.0)[0]
            raise ValueError(f"Unknown task '{task}'. Did you mean '{nearest}'? Choose from {', '.join(TASKS)}.")
    if not tasks:
        raise ValueError(f"tasks is empty. Choose from {', '.join(TASKS)}.")
    return tuple(task for task in TASKS if task in tasks)


@dataclass
class _Evaluation:
    """State of the evaluation of one model; collects scores and notes."""

    model: nn.Module
    name: str
    data: Data
    train: Data | None
    task_data: Mapping[str, Data]
    processor: Any
    protocol: Protocol
    cache_dir: str | Path | None
    seed: int
    notes: list[str] = field(default_factory=list)
    reading_seconds: float = 0.0
    cached_seconds: float = 0.0

    def run(self, tasks: tuple[Task, ...]) -> EvaluationReport:
        """Run the tasks in the order of `TASKS` and return the report."""
        if unknown := set(self.task_data) - set(tasks):
            raise ValueError(
                f"task_data names {sorted(unknown)}, which are not among the tasks {list(tasks)}. Add these tasks or "
                "remove their data."
            )
        scores: list[Score] = []
        lost = None
        # Tasks on the same images share their features.
        groups: dict[str, list[Task]] = {}
        for task in tasks:
            if task in (*ON_FEATURES, "robustness"):
                groups.setdefault(task if task in self.task_data else "", []).append(task)
        for group in groups.values():
            scores += self._classification(group)
        for task in tasks:
            if task in ("segmentation", "depth"):
                scores += self._dense(task)
            if task == "lost":
                lost = self._lost()
                scores.append(_lost_score(lost, self._name_of(task), self.seed))
        versions = {
            "hf_regvit": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        return EvaluationReport(
            self.name,
            self._name_of(tasks[0]),
            self.seed,
            versions,
            scores=tuple(sorted(scores, key=lambda score: TASKS.index(score.task))),  # type: ignore[arg-type]
            notes=tuple(self.notes),
            reading_seconds=round(self.reading_seconds, 2),
            cached_seconds=round(self.cached_seconds, 2),
            lost=lost,
            weights=weights_fingerprint(self.model),
        )

    def _data_of(self, task: str) -> Data:
        return self.task_data.get(task, self.data)

    def _name_of(self, task: str) -> str:
        data = self._data_of(task)
        return Path(data.name if isinstance(data, ImageSource) else data).name

    def _classification(self, tasks: Sequence[Task]) -> list[Score]:
        train_images, judged_images = self._parts(tasks[0])
        judged_images = _in_classes_of(train_images, judged_images)
        _check_labels(train_images, judged_images)
        digests = image_digests(train_images), image_digests(judged_images)
        self._check_overlap(*digests, judged_images.name)
        num_classes = 1 + max(*train_images.labels, *judged_images.labels)  # type: ignore[misc]  # checked
        side = self.protocol.image_size or min(describe_model(self.model).image_size)
        train = self._labelled(train_images, side, num_classes, "training images", digests[0])
        judged = self._labelled(judged_images, side, num_classes, "test images", digests[1])
        if train.features.kind != "CLS":
            self.notes.append("The model has no CLS token, so tasks on whole images use the mean of its patch tokens.")
        scores = list(
            score_features(
                train,
                judged,
                tasks=[task for task in tasks if task in ON_FEATURES],
                protocol=self.protocol,
                seed=self.seed,
            )
        )
        if "robustness" in tasks:
            scores += self._robustness(train, judged_images, digests[1], side)
        return scores

    def _labelled(
        self, source: ImageSource, side: int, num_classes: int, label: str, digests: Sequence[bytes]
    ) -> LabeledFeatures:
        features = read_features(
            self.model,
            source,
            transform=EvaluationTransform.for_model(self.model, self.processor, image_size=side),
            batch_size=self.protocol.batch_size,
            cache_dir=self.cache_dir,
            digests=digests,
            label=f"{label}, {side} px",
        )
        if features.from_cache:
            self.cached_seconds += features.seconds
        else:
            self.reading_seconds += features.seconds
        if features.skipped:
            self.notes.append(f"{len(features.skipped)} of {len(source)} {label} could not be read and were skipped.")
        return LabeledFeatures.of(features, source, num_classes)

    def _robustness(
        self, train: LabeledFeatures, judged_images: ImageSource, digests: Sequence[bytes], side: int
    ) -> list[Score]:
        patch = max(describe_model(self.model).patch_size)
        sizes = self.protocol.image_sizes or [
            max(1, round(side * share / patch)) * patch for share in (0.5, 0.75, 1.25)
        ]
        scores = []
        for size in dict.fromkeys(sizes):
            started = time.perf_counter()
            judged = self._labelled(judged_images, size, train.num_classes, "test images", digests)
            k = neighbours(self.protocol, len(train))[0]
            votes = knn_votes(train, judged, (k,), self.protocol.temperature)[k]
            scores.append(
                judged.score(
                    hits(votes, judged.labels),
                    task="robustness",
                    variant=f"{size} px",
                    metric="top1",
                    protocol=f"test images at another size against training images at {side} px; kNN with k={k}, "
                    "otherwise as in knn",
                    settings={"k": k, "image_size": size, "train_image_size": side, "layer": judged.layer},
                    num_train=len(train),
                    seed=self.seed,
                    seconds=time.perf_counter() - started,
                )
            )
        return scores

    def _check_overlap(self, train: Sequence[bytes], judged: Sequence[bytes], name: str) -> None:
        """Reject or report test images that are also training images, which would inflate every score."""
        known = set(train)
        seen = sum(digest in known for digest in judged)
        if seen > len(judged) / 2:
            raise ValueError(
                f"{seen} of the {len(judged)} test images of '{name}' are identical to training images, byte for "
                "byte. Give other training images, or none to use the splits of the data."
            )
        if seen:
            self.notes.append(f"{seen} of {len(judged)} test images are identical to training images, byte for byte.")
            logger.warning("%s: %s", name, self.notes[-1])

    def _parts(self, task: str) -> tuple[ImageSource, ImageSource]:
        """Return the training images and the test images of a task."""
        data, protocol, seed = self._data_of(task), self.protocol, self.seed
        train = self.train if task not in self.task_data else None
        if train is not None:
            parts = _part(train, "train"), _part(data, "validation")
        elif protocol.train_val_split is not None:
            everything = _part(data, None)
            if everything.labels is None:
                raise ValueError(
                    f"'{everything.name}' has no labels, so train_val_split cannot split it by class. Give labeled "
                    "images, or separate training images."
                )
            chosen = stratified_split(everything.labels, held_out_share=protocol.train_val_split, seed=seed)
            parts = everything.subset(chosen[0]), everything.subset(chosen[1])
        else:
            try:
                if isinstance(data, ImageSource):
                    raise MissingSplitError(f"'{data.name}' is a single set of images without splits.")
                parts = load_images(data, split="train"), load_images(data, split="validation")
            except MissingSplitError as error:
                raise _missing_part(error, task) from error
        count = protocol.max_images
        # Keep at least one training image per class, even if max_images is smaller.
        least = None if count is None else max(count, len(set(parts[0].labels or ())))
        return _some(parts[0], least, seed), _some(parts[1], count, seed)

    def _dense(self, task: Task) -> list[Score]:
        protocol = self.protocol
        depth = describe_model(self.model).num_layers
        layers = (-1,) if protocol.num_dense_blocks == 1 else four_blocks(depth)
        train, judged = self._dense_parts(task)
        features = [
            read_dense_features(
                self.model,
                part,
                layers=layers,
                processor=self.processor,
                image_size=protocol.dense_image_size,
                batch_size=protocol.batch_size,
            )
            for part in (train, judged)
        ]
        self.reading_seconds += sum(part.seconds for part in features)
        result: LinearSegmentationResult | LinearDepthResult
        if task == "segmentation":
            names = train.class_names
            result = linear_segmentation(
                features[0], train.targets, features[1], judged.targets, class_names=names,
                settings=protocol.segmentation, seed=self.seed,
            )  # fmt: skip
            metrics = {"mean_iou": result.counts.reshape(len(judged), -1)}
        else:
            result = linear_depth(
                features[0], train.targets, features[1], judged.targets, settings=protocol.depth, seed=self.seed
            )
            metrics = {name: result.errors[:, [i]] for i, name in enumerate(("rmse", "abs_rel", "delta1"))}
        return [
            Score.measured(
                rows,
                ids=result.ids,
                data=judged.name,
                seed=self.seed,
                statistic="mean_iou" if metric == "mean_iou" else "mean",
                task=task,
                variant="",
                metric=metric,
                protocol=result.protocol,
                settings={"layer": ", ".join(map(str, result.layers)), "num_steps": result.settings.num_steps},
                num_train=result.num_train,
                seconds=result.seconds,
            )
            for metric, rows in metrics.items()
        ]

    def _dense_parts(self, task: Task) -> tuple[DenseSource, DenseSource]:
        """Return training and test images with masks or depth maps, with the same class ids in both."""
        protocol, data = self.protocol, self._data_of(task)
        train_data = self.train if self.train is not None and task not in self.task_data else data

        def load(data: Data, split: Split | None, like: DenseSource | None = None) -> DenseSource:
            if isinstance(data, ImageSource):
                raise ValueError(
                    f"Task '{task}' needs masks or depth maps, but '{data.name}' was given as an ImageSource. Give "
                    "its path instead."
                )
            if task == "depth":
                return load_depth(
                    data, split=split, depth_scale=protocol.depth_scale, max_depth=protocol.depth.max_depth
                )
            return load_masks(
                data,
                split=split,
                mask_format=None if like is None else like.format,  # type: ignore[arg-type]  # of masks: a MaskFormat
                ignore_values=protocol.ignore_values,
                reduce_labels=protocol.reduce_labels,
            )

        if train_data is data and protocol.train_val_split is not None:
            everything = load(data, None)
            order = np.random.default_rng(self.seed).permutation(len(everything)).tolist()
            count = min(max(1, round(len(order) * protocol.train_val_split)), len(order) - 1)
            parts = everything.subset(sorted(order[count:])), everything.subset(sorted(order[:count]))
        else:
            try:
                train = load(train_data, "train")
                parts = train, load(data, "validation", train)
            except MissingSplitError as error:
                if train_data is data:
                    raise _missing_part(error, task) from error
                parts = train, load(data, None, train)
        chosen = [_some(part, protocol.max_images, self.seed, by_class=False) for part in parts]
        for part in chosen:
            assert isinstance(part, DenseSource)
            check_targets(part)
        return chosen[0], chosen[1]  # type: ignore[return-value]  # asserted

    def _lost(self) -> LostEvaluation:
        protocol = self.protocol
        column: dict[str, Any] = {"column": protocol.boxes, "box_format": protocol.box_format}
        judged = _some(_part(self._data_of("lost"), None), protocol.max_images, self.seed, by_class=False)
        choosing = None
        if self.train is not None and "lost" not in self.task_data:
            images = _some(_part(self.train, None), protocol.max_images, self.seed, by_class=False)
            choosing = images, ground_truth_boxes(images, **column)
        return evaluate_lost(
            self.model,
            judged,
            ground_truth_boxes(judged, **column),
            train=choosing,
            grid=protocol.lost_grid,
            processor=self.processor,
            max_side=protocol.max_side,
            seed=self.seed,
        )


# --- Object discovery


def _lost_score(lost: LostEvaluation, data: str, seed: int) -> Score:
    score = lost.scores["lost"]
    threshold = lost.protocol["iou_threshold"]
    chosen = "as given" if lost.choice is None else f"{lost.settings} (of {lost.choice['num_settings']})"
    return Score.measured(
        np.asarray(score.overlaps) >= threshold,
        ids=lost.ids,
        data=data,
        seed=seed,
        task="lost",
        variant="",
        metric="corloc",
        protocol=f"LOST, one box per image, CorLoc at IoU {threshold}, longer side up to "
        f"{lost.protocol['max_side']} px",
        settings={
            "layer": lost.settings.layer,
            "chosen": chosen,
            "compared_with": {name: other.corloc for name, other in lost.scores.items() if name != "lost"},
        },
        num_train=0 if lost.choice is None else lost.choice["num_images"],
        seconds=lost.seconds,
    )
