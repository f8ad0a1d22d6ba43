"""Evaluation of frozen backbones: `evaluate_backbone` runs tasks on frozen features and returns one report.

Features are extracted once per model and set of images, can be cached on disk, and are shared by the tasks.
Hyperparameters (a learning rate, a penalty, the settings of LOST) are selected on images that are not test images. If
the settings say otherwise, the report states it. `compare_backbones` puts several models into one table.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.maps import DenseSource
from ..data.parts import Data, Draw, open_parts
from ..data.source import ImageSource
from ..models.loading import distinct_names, open_model, weights_fingerprint
from ..models.results import Record, library_versions
from ..models.tokens import TokenReader
from .boxes import Box
from .cache import FrozenFeatures, image_digests, read_features
from .object_discovery import BoxFormat, LostEvaluation, ground_truth_boxes
from .report import EvaluationReport, EvaluationTable, Score
from .tasks import Sampling, Task, select_tasks, settings_from

logger = logging.getLogger(__name__)

Model = TokenReader | nn.Module | str | Path
Boxes = tuple[ImageSource, list[list[Box]]]

# --- Entry points


def evaluate_backbone(
    model: Model,
    data: Data,
    *,
    tasks: Sequence[str] = ("knn", "linear"),
    train: Data | None = None,
    task_data: Mapping[str, Data] | None = None,
    name: str | None = None,
    device: str | torch.device = "auto",
    cache_dir: str | Path | None = None,
    seed: int = 0,
    **options: object,
) -> EvaluationReport:
    """Run tasks on the frozen features of one model.

    Args:
        model: Name, module or reader; see `open_model`. It is not modified.
        data: Images with the targets that the tasks need: labels, masks, depth maps, boxes. Without `train`, its
            training split is used for fitting and its validation split for testing; if there is no validation split,
            a share of the training images is held out, as in `finetune`. LOST selects its settings on one half of all
            images and is tested on the other.
        tasks: Tasks to run, from `TASKS`.
        train: Images for fitting and selection; `data` (its validation split, if it has one) is then used for testing
            only.
        task_data: Data for single tasks that need other images: `{"segmentation": "camvid"}`.
        name: Name of the model in the report. Default: the name in its configuration.
        device: Device of a model given by name; see `open_model`.
        cache_dir: Folder for cached features; None disables the cache.
        seed: Random seed for sampling, splits and confidence intervals.
        options: Settings of the tasks, named as on the command line: `knn_k=[5, 10]`, `max_images=500`.

    Raises:
        ValueError: A task or option is unknown, labels or boxes are missing, the classes of the splits differ, or
            there are too few images.
    """
    chosen, own = _tasks(tasks, options), dict(task_data or {})
    if unknown := set(own) - {task.name for task in chosen}:
        raise ValueError(
            f"task_data names {sorted(unknown)}, which are not among the tasks {list(tasks)}. Add these tasks or "
            "remove their data."
        )
    shared = {"sampling": settings_from(Sampling, options), "cache_dir": cache_dir, "seed": seed}
    reader = open_model(model, device=device)
    common = TaskParts(data, train, **shared)
    parts = {task.name: TaskParts(own[task.name], **shared) if task.name in own else common for task in chosen}
    scores: list[Score] = []
    for task in chosen:
        logger.info("%s: %s", name or reader.description.name, task.name)
        scores += task.run(reader, parts[task.name], seed=seed)
    opened = list(dict.fromkeys(parts.values()))
    return EvaluationReport(
        name or reader.description.name,
        opened[0].name,
        seed,
        library_versions(),
        scores=tuple(scores),
        notes=tuple(note for one in opened for note in one.notes),
        reading_seconds=round(sum(one.reading_seconds for one in opened), 2),
        cached_seconds=round(sum(one.cached_seconds for one in opened), 2),
        lost=next((one.lost for one in opened if one.lost is not None), None),
        weights=weights_fingerprint(reader.model),
    )


def compare_backbones(
    models: Sequence[Model],
    data: Data,
    *,
    on_report: Callable[[EvaluationTable], None] | None = None,
    **options: Any,
) -> EvaluationTable:
    """Compare several models on the same images, with paired differences to the first model.

    Args:
        models: Names, modules or readers; see `open_model`.
        data: Images with targets; see `evaluate_backbone`.
        on_report: Callback that receives the table so far after every model, so that a later failure does not lose
            earlier results.
        options: Options of `evaluate_backbone`, the same for all models.

    Raises:
        ValueError: `models` is empty or names a model twice, or an option is invalid; see `evaluate_backbone`.
    """
    if not models:
        raise ValueError("models is empty. Give at least one model.")
    table = EvaluationTable(())
    for model, name in zip(models, distinct_names(models)):
        report = evaluate_backbone(model, data, **{"name": name} | options)
        table = EvaluationTable((*table.reports, report))
        if on_report is not None:
            on_report(table)
    return table


def score_features(
    train: "LabeledFeatures",
    test: "LabeledFeatures",
    *,
    tasks: Sequence[str] = ("knn", "linear", "logistic", "few_shot", "retrieval"),
    seed: int = 0,
    **options: object,
) -> Iterator[Score]:
    """Score tasks on feature vectors from any source: a model, another library, raw pixels.

    Args:
        train: Training features.
        test: Test features.
        tasks: Tasks to run: knn, linear, logistic, few_shot, retrieval.
        seed: Random seed for sampling, splits and confidence intervals.
        options: Settings of the tasks, named as on the command line.

    Raises:
        ValueError: There are too few images for k or for the shots.
    """
    parts = TaskParts(test.data, _features={("train", None): train, ("test", None): test})
    for task in _tasks(tasks, options):
        yield from task.run(None, parts, seed=seed)  # type: ignore[arg-type]  # nothing is left to read


def _tasks(names: Sequence[str], options: Mapping[str, object]) -> list[Task]:
    return [task(settings_from(task.Settings, options)) for task in select_tasks(names)]


# --- Images and features of the tasks


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

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, rows: Sequence[int]) -> "LabeledFeatures":
        """Return the features of the images at these rows."""
        return replace(self, features=self.features.subset(rows), labels=self.labels[list(rows)])


@dataclass(eq=False)
class TaskParts:
    """Training and test images of the tasks on one data set, each opened and read once, when a task asks for them.

    Args:
        data: Data with a training and a held-out split, or only test images if `train` is given.
        train: Training images, if they are stored separately.
        sampling: Numbers of images.
        cache_dir: Folder for cached features; None disables the cache.
        seed: Random seed for sampling and splits.
    """

    data: Data
    train: Data | None = None
    sampling: Sampling = field(default_factory=Sampling)
    cache_dir: str | Path | None = None
    seed: int = 0
    notes: list[str] = field(default_factory=list)
    reading_seconds: float = 0.0
    cached_seconds: float = 0.0
    lost: LostEvaluation | None = None
    _features: dict[tuple[str, int | None], LabeledFeatures] = field(default_factory=dict)
    _digests: dict[str, list[bytes]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the data."""
        return Path(self.data.name if isinstance(self.data, ImageSource) else self.data).name

    @cached_property
    def images(self) -> dict[str, ImageSource]:
        """Labeled training and test images, by "train" and "test"."""
        train, test = self._open("classes", draw="every_class")
        self._digests = {"train": image_digests(train), "test": image_digests(test)}
        known = set(self._digests["train"])
        seen = sum(digest in known for digest in self._digests["test"])
        if seen > len(test) / 2:
            raise ValueError(
                f"{seen} of the {len(test)} test images of '{test.name}' are identical to training images, byte for "
                "byte. Give other training images, or none to use the splits of the data."
            )
        if seen:
            self.notes.append(f"{seen} of {len(test)} test images are identical to training images, byte for byte.")
            logger.warning("%s: %s", test.name, self.notes[-1])
        return {"train": train, "test": test}

    def features(
        self, reader: TokenReader, part: Literal["train", "test"], image_size: int | None = None
    ) -> LabeledFeatures:
        """Return the vectors of the last blocks of the labeled images.

        Args:
            reader: Reader of the model.
            part: "train" or "test".
            image_size: Side of the center crop in pixels. Default: the model's image size.
        """
        if (part, image_size) not in self._features:
            self._features[part, image_size] = self._read(reader, part, image_size)
        return self._features[part, image_size]

    def maps(self, kind: Literal["masks", "depth"], **options: object) -> list[DenseSource]:
        """Return training and test images with maps; `options` are those of `load_masks` or `load_depth`."""
        return self._open(kind, options=options)

    def boxes(self, *, column: str | None, box_format: str) -> tuple[Boxes | None, Boxes]:
        """Return the training images, if they are stored separately, and the test images with their boxes."""

        def load(data: Data) -> Boxes:
            count = self.sampling.max_images
            images = open_parts(train=data, kind="images", max_train=count, draw="in_order", seed=self.seed).train
            form: BoxFormat = box_format  # type: ignore[assignment]  # checked there
            return images, ground_truth_boxes(images, column=column, box_format=form)

        return None if self.train is None else load(self.train), load(self.data)

    def _open(
        self, kind: Literal["classes", "masks", "depth"], *, draw: Draw = "in_order", options: Record | None = None
    ) -> list[Any]:
        """Open the training and the test images, and note if the test images were held out."""
        for data in (self.data, self.train):
            if kind != "classes" and isinstance(data, ImageSource) and not isinstance(data, DenseSource):
                raise ValueError(
                    f"The task needs {kind}, but '{data.name}' was given as an ImageSource without. Give its path."
                )
        count, share = self.sampling.max_images, self.sampling.train_val_split
        parts = open_parts(
            self.data,
            train=self.train,
            kind=kind,
            heldout_share=share if self.train is None else None,
            need_heldout=True,
            seed=self.seed,
            max_train=count,
            max_heldout=count,
            draw=draw,
            options=options,
        )
        parts.log()
        self.notes += [line for line in parts.report if parts.held_out_from_train and line.startswith("Held out:")]
        return [parts.train, parts.heldout]

    def _read(self, reader: TokenReader, part: str, image_size: int | None) -> LabeledFeatures:
        source, side = self.images[part], image_size or min(reader.description.image_size)
        label = "training images" if part == "train" else "test images"
        features = read_features(
            reader,
            source,
            transform=reader.transform_for(image_size=side),
            batch_size=self.sampling.batch_size,
            cache_dir=self.cache_dir,
            digests=self._digests[part],
            label=f"{label}, {side} px",
        )
        if features.from_cache:
            self.cached_seconds += features.seconds
        else:
            self.reading_seconds += features.seconds
        if features.skipped:
            self.notes.append(f"{len(features.skipped)} of {len(source)} {label} could not be read and were skipped.")
        if features.kind != "CLS" and part == "train":
            self.notes.append("The model has no CLS token, so tasks on whole images use the mean of its patch tokens.")
        by_id = dict(zip(source.ids, source.labels or ()))
        labels = torch.tensor([by_id[name] for name in features.ids])
        num_classes = 1 + max(max(one.labels or ()) for one in self.images.values())
        return LabeledFeatures(features, labels, num_classes, source.name)
