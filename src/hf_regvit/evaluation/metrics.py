"""Metrics as `evaluate.Metric` classes, for Trainer, `evaluate.combine` and several processes; all work offline.

    from hf_regvit.evaluation.metrics import MeanIoU
    MeanIoU(num_classes=3).compute(predictions=masks, references=true_masks)

Settings of a metric (k, classes, depths) are arguments of its constructor, so that `compute` takes only data and
metrics can be combined. Inputs are lists, NumPy arrays or tensors on any device. Invalid values raise an error that
names them; nothing is rounded.

`evaluate` itself would convert every number to a Python object and write it to an Arrow buffer, which takes 16 bytes
per pixel for a pair of masks. Here, every batch is reduced to the few sums that the result needs before it is stored,
so masks and depth maps are released when `add_batch` returns. `evaluate` merges the sums of several processes: give
each process its `process_id`, and all processes the same `num_process`, `experiment_id` and a shared `cache_dir`.
`compute` returns the result in process 0, and None in the others. A single process keeps the sums in memory and writes
no file.

Shape letters: n and B samples, C classes, H and W pixels, N patches, R registers, D width.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, TypedDict, Unpack

import evaluate
import numpy as np
import torch

from ..models.results import Record

Array = np.ndarray
Batch = Iterable[object]  # predictions or references: a list, an array or a tensor


class ProcessOptions(TypedDict, total=False):
    """Options of every metric; see `evaluate.Metric`."""

    num_process: int
    process_id: int
    experiment_id: str | None
    cache_dir: str | None


class _SumsMetric(evaluate.Metric):
    """Base class of the metrics, which reduces every batch to rows of numbers that `evaluate` stores and gathers.

    A subclass checks and reduces a batch in `reduce`, and computes the result from the rows of all batches and
    processes in `result`.
    """

    about: ClassVar[str]  # one sentence, then the inputs

    def __init__(self, **options: Unpack[ProcessOptions]) -> None:
        if unknown := set(options) - ProcessOptions.__annotations__.keys():  # `evaluate` would ignore them in silence
            raise TypeError(f"{type(self).__name__}() got unknown options: {', '.join(sorted(unknown))}.")
        super().__init__(keep_in_memory=options.get("num_process", 1) == 1, **options)

    def reduce(self, predictions: Batch, references: Batch) -> Array:
        """Reduce a batch to rows of numbers, (rows, numbers)."""
        raise NotImplementedError

    def result(self, rows: Array) -> Record:
        """Return the values of the metric from all rows, (rows, numbers)."""
        raise NotImplementedError

    def _info(self) -> evaluate.MetricInfo:
        from datasets import Features, List, Value

        # The rows are stored in the first column. The second one stays empty but must exist, because
        # `evaluate.combine` passes every metric the inputs that match its column names.
        return evaluate.MetricInfo(
            description=self.about,
            inputs_description=f"\n\n        {self.about}\n",
            citation="",
            features=Features({name: List(Value("float64")) for name in ("predictions", "references")}),
        )

    def add_batch(self, *, predictions: Batch | None = None, references: Batch | None = None) -> None:
        """Add a batch, of which only the reduced rows are kept."""
        if predictions is None or references is None:
            missing = "predictions" if predictions is None else "references"
            raise ValueError(f"{type(self).__name__} takes predictions and references, but {missing} are missing.")
        rows = self.reduce(predictions, references).astype(np.float64)
        if len(rows):
            super().add_batch(predictions=list(rows), references=[[]] * len(rows))

    def add(self, *, prediction: object = None, reference: object = None, **plural: object) -> None:
        """Add one sample, without the batch axis; `evaluate.combine` passes it as `predictions` and `references`."""
        given = {"predictions": prediction, "references": reference} | plural
        self.add_batch(predictions=[given["predictions"]], references=[given["references"]])

    def compute(self, *, predictions: Batch | None = None, references: Batch | None = None) -> Record | None:
        """Return the result over all samples and reset the metric; None in processes other than the first."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if self.writer is None:  # a process without samples takes part in the gathering with an empty file
            self.selected_feature_format = self.features
            self._init_writer()
        return super().compute()

    def _compute(self, predictions: list[list[float]], references: list[list[float]]) -> Record:
        if not predictions:
            raise ValueError(
                f"{type(self).__name__} has no data to compute from: no sample was added, or all were ignored. Call "
                "add_batch first."
            )
        return self.result(np.asarray(predictions, dtype=np.float64))


# --- Checks


def _array(name: str, value: object) -> Array:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() else value).numpy()  # NumPy has no bfloat16
    if isinstance(value, list | tuple) and any(isinstance(item, torch.Tensor) for item in value):
        value = [_array(name, item) for item in value]
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} have rows of different lengths. Give rows of one shape.") from error
    if array.dtype.kind not in "iufb":
        raise TypeError(f"{name} are of type {array.dtype}, but must be numbers.")
    return array


def _integers(name: str, value: object) -> Array:
    array = _array(name, value)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(
            f"{name} are of type {array.dtype} (such as {array.flat[0]}), but must be integer class ids. They are "
            "not rounded: take the argmax of scores, or cast labels to integers."
        )
    return array.astype(np.int64)


def _check_ids(ids: dict[str, Array], num_classes: int, also: str = "") -> None:
    for name, classes in ids.items():
        wrong = classes[(classes < 0) | (classes >= num_classes)]
        if len(wrong):
            raise ValueError(f"{name} contain class id {wrong[0]}; expected 0 to {num_classes - 1}{also}.")


def _numbers(name: str, value: object) -> Array:
    array = _array(name, value)
    if array.dtype.kind == "b":
        raise TypeError(f"{name} are booleans, but must be numbers.")
    return array.astype(np.float64)


def _finite(name: str, value: object) -> Array:
    array = _numbers(name, value)
    if not np.isfinite(array).all():
        where = np.argwhere(~np.isfinite(array))[0].tolist()
        raise ValueError(f"{name} contain {array[tuple(where)]} at {where}, but must be finite numbers.")
    return array


def _map_pairs(
    predictions: Batch, references: Batch, convert: Callable[[str, object], Array], example: str
) -> list[tuple[Array, Array]]:
    """Return the converted maps (H, W) of a batch; every prediction has the size of its reference."""
    maps: list[list[Array]] = []
    for name, batch in (("predictions", predictions), ("references", references)):
        maps.append([convert(name, one) for one in batch])
        for i, one in enumerate(maps[-1]):
            if one.ndim != 2:
                raise ValueError(f"{name}[{i}] has shape {one.shape}, but must be (height, width): {example}.")
    predicted, true = maps
    if len(predicted) != len(true):
        raise ValueError(f"Got {len(predicted)} predictions for {len(true)} references. Give one for each.")
    for i, (one, truth) in enumerate(zip(predicted, true)):
        if one.shape != truth.shape:
            raise ValueError(
                f"predictions[{i}] {one.shape} and references[{i}] {truth.shape} differ in shape. Resize the "
                "prediction to the size of the reference first."
            )
    return list(zip(predicted, true))


# --- Labels


class TopKAccuracy(_SumsMetric):
    """Share of samples whose class is among the k highest scores: `top1`, `top5`, ..., in [0, 1].

    Among equal scores the class with the lower id ranks first, as in argmax.

    Args:
        k: Values of k. Values above 1 require scores as predictions.
        options: Options of `evaluate.Metric`.
    """

    about = (
        "Top-k accuracy. predictions: (n, C) scores, or (n,) integer class ids for k = 1. references: (n,) integer "
        "class ids in [0, C)."
    )

    def __init__(self, *, k: Sequence[int] = (1,), **options: Unpack[ProcessOptions]) -> None:
        if not k or min(k) < 1:
            raise ValueError(f"k={tuple(k)} must be one or more integers of at least 1.")
        self.k = tuple(k)
        super().__init__(**options)

    def reduce(self, predictions: Batch, references: Batch) -> Array:
        """Return for every sample the number of classes that rank before its own."""
        truth = _integers("references", references)
        scores = _array("predictions", predictions)
        if truth.ndim != 1 or len(scores) != len(truth) or scores.ndim not in (1, 2):
            raise ValueError(
                f"predictions {scores.shape} must be (n, classes) or (n,), with references (n,), not {truth.shape}."
            )
        if not len(truth):
            return np.empty((0, 1))
        if truth.min() < 0:
            raise ValueError(f"references contain {truth.min()}, but class ids start at 0. Remove unlabeled samples.")
        if scores.ndim == 1:
            if max(self.k) > 1:
                raise ValueError(
                    f"k={self.k} needs scores (n, classes), but predictions {scores.shape} are class ids. Pass scores "
                    "or use k=1."
                )
            return np.where(_integers("predictions", predictions) == truth, 0.0, np.inf)[:, None]
        scores = _finite("predictions", scores)
        if max(self.k) > scores.shape[1] or truth.max() >= scores.shape[1]:
            raise ValueError(
                f"The scores cover {scores.shape[1]} classes, too few for k={self.k} or reference id {truth.max()}. "
                "Pass scores of all classes."
            )
        own = np.take_along_axis(scores, truth[:, None], axis=1)
        earlier = np.arange(scores.shape[1]) < truth[:, None]
        return ((scores > own) | ((scores == own) & earlier)).sum(1, keepdims=True)

    def result(self, rows: Array) -> Record:
        """Return the accuracies by name."""
        return {f"top{k}": float((rows[:, 0] < k).mean()) for k in self.k}


class ClassScores(_SumsMetric):
    """Mean class accuracy and macro F1 of a classifier, in [0, 1], and the confusion matrix they are computed from.

    `mean_class_accuracy` and `f1` are means over the classes that occur in the references. `per_class` is the accuracy
    of each class, NaN for a class without samples. Among equal scores the class with the lower id is predicted, as in
    `TopKAccuracy`.

    Args:
        num_classes: Number of classes, C; class ids are 0 to C - 1.
        options: Options of `evaluate.Metric`.
    """

    about = (
        "Mean class accuracy and macro F1. predictions: (n, C) scores or (n,) integer class ids. references: (n,) "
        "integer class ids in [0, C)."
    )

    def __init__(self, *, num_classes: int, **options: Unpack[ProcessOptions]) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes} must be at least 2.")
        self.num_classes = num_classes
        super().__init__(**options)

    def reduce(self, predictions: Batch, references: Batch) -> Array:
        """Return the true and the predicted class id of every sample."""
        truth, said = _integers("references", references), _array("predictions", predictions)
        if said.ndim == 2 and said.shape[1] == self.num_classes:
            said = _finite("predictions", said).argmax(axis=1)
        if truth.ndim != 1 or said.shape != truth.shape:
            raise ValueError(
                f"predictions {said.shape} must be (n, {self.num_classes}) or (n,), with references (n,), not "
                f"{truth.shape}."
            )
        said = _integers("predictions", said)
        _check_ids({"predictions": said, "references": truth}, self.num_classes)
        return np.stack([truth, said], axis=1)

    def result(self, rows: Array) -> Record:
        """Return the means over classes, the accuracy of each class, and (C, C) counts with true classes as rows."""
        places = rows.astype(np.int64) @ np.array([self.num_classes, 1])
        confusion = np.bincount(places, minlength=self.num_classes**2).reshape(self.num_classes, -1)
        right, true, said = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        present = true > 0
        with np.errstate(invalid="ignore"):  # 0 / 0: a class without samples
            found = right / true
        return {
            "mean_class_accuracy": float(found[present].mean()),
            "f1": float((2 * right[present] / (true + said)[present]).mean()),
            "per_class": found.tolist(),
            "confusion_matrix": confusion.tolist(),
        }


class MeanAveragePrecision(_SumsMetric):
    """Mean average precision of retrieval: `map`, the average precision averaged over queries, in [0, 1].

    The average precision of a query is the mean of the precisions at the ranks of its relevant images. Among equal
    scores the image with the lower index ranks first.
    """

    about = (
        "Mean average precision. predictions: (n, gallery) scores, higher for closer images. references: (n, "
        "gallery), true for relevant images, at least one per query."
    )

    def reduce(self, predictions: Batch, references: Batch) -> Array:
        """Return the average precision of every query."""
        scores, relevant = _finite("predictions", predictions), _array("references", references).astype(bool)
        if scores.ndim != 2 or scores.shape != relevant.shape:
            raise ValueError(
                f"predictions {scores.shape} and references {relevant.shape} must have the same shape (n, gallery)."
            )
        if not relevant.any(axis=1).all():
            query = int(np.flatnonzero(~relevant.any(axis=1))[0])
            raise ValueError(f"No image of the gallery is relevant to query {query}. Remove such queries.")
        order = np.argsort(-scores, axis=1, kind="stable")
        hits = np.take_along_axis(relevant, order, axis=1)  # (n, gallery), best first
        precision = hits.cumsum(axis=1) / np.arange(1, hits.shape[1] + 1)
        return ((precision * hits).sum(axis=1) / hits.sum(axis=1))[:, None]

    def result(self, rows: Array) -> Record:
        """Return the mean over queries."""
        return {"map": float(rows[:, 0].mean())}


# --- Maps


class MeanIoU(_SumsMetric):
    """Mean intersection over union of segmentation: overlap of every class over all pixels, averaged over classes.

    The value of a class that occurs in neither predictions nor references is NaN and left out of the means. A class
    that occurs only in predictions has an overlap of 0. The results have the names of the metric `mean_iou` of
    `evaluate`.

    Args:
        num_classes: Number of classes, C; class ids are 0 to C - 1.
        ignore_index: Value of reference pixels to ignore, whatever is predicted there; None counts all pixels.
        options: Options of `evaluate.Metric`.
    """

    about = (
        "Mean intersection over union. predictions and references: (B, H, W) integer class ids, or lists of (H, W) of "
        "different sizes."
    )

    def __init__(self, *, num_classes: int, ignore_index: int | None = 255, **options: Unpack[ProcessOptions]) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes} must be at least 2 (background counts).")
        if ignore_index is not None and 0 <= ignore_index < num_classes:
            raise ValueError(
                f"ignore_index={ignore_index} is one of the {num_classes} class ids. Use another value or None."
            )
        self.num_classes, self.ignore_index = num_classes, ignore_index
        super().__init__(**options)

    def reduce(self, predictions: Batch, references: Batch) -> Array:
        """Return one row: the numbers of agreeing, predicted and true pixels of every class."""
        sums = np.zeros((3, self.num_classes))
        example = "class ids instead of scores (take the argmax), without a channel axis"
        pairs = _map_pairs(predictions, references, _integers, example)
        for one, truth in pairs:
            counted = np.ones(truth.shape, dtype=bool) if self.ignore_index is None else truth != self.ignore_index
            one, truth = one[counted], truth[counted]
            also = f" or, in references, ignore_index={self.ignore_index}"
            _check_ids({"predictions": one, "references": truth}, self.num_classes, also)
            for row, classes in zip(sums, (truth[one == truth], one, truth)):
                row += np.bincount(classes, minlength=self.num_classes)
        return sums.reshape(1, -1)[: len(pairs)]

    def result(self, rows: Array) -> Record:
        """Return the means and the values of every class."""
        both, predicted, true = rows.sum(0).reshape(3, self.num_classes)
        if not true.sum():
            raise ValueError(
                f"Every reference pixel is ignore_index={self.ignore_index}, so there is nothing to score. Add images "
                "with labeled pixels."
            )
        with np.errstate(invalid="ignore"):  # 0 / 0: a class that does not occur
            iou, accuracy = both / (predicted + true - both), both / true
        return {
            "mean_iou": float(np.nanmean(iou)),
            "mean_accuracy": float(np.nanmean(accuracy)),
            "overall_accuracy": float(both.sum() / true.sum()),
            "per_category_iou": iou.tolist(),
            "per_category_accuracy": accuracy.tolist(),
        }


class DepthErrors(_SumsMetric):
    """Depth errors: `rmse` (in the unit of the maps), `abs_rel`, and `delta1` to `delta3`, shares in [0, 1].

    Every metric is computed over the valid pixels of an image and then averaged over images with equal weight.
    Delta i is the share of pixels with max(prediction / truth, truth / prediction) below 1.25^i.

    Args:
        min_depth: Minimum valid depth; reference pixels below are ignored, and predictions are clipped to it.
        max_depth: Maximum valid depth; reference pixels above are ignored, and predictions are clipped to it. None
            disables the limit.
        options: Options of `evaluate.Metric`.

    Source: arXiv 1406.2283 for the metrics.
    """

    about = (
        "Depth errors. predictions and references: (B, H, W) depths, or lists of (H, W) of different sizes. "
        "Reference pixels that are 0, negative or not finite count as not measured and are ignored."
    )

    def __init__(
        self, *, min_depth: float = 1e-3, max_depth: float | None = None, **options: Unpack[ProcessOptions]
    ) -> None:
        if not 0 < min_depth < (np.inf if max_depth is None else max_depth):
            raise ValueError(f"min_depth={min_depth} must be above 0 and below max_depth={max_depth}.")
        self.min_depth, self.max_depth = min_depth, max_depth
        super().__init__(**options)

    def reduce(self, predictions: Batch, references: Batch) -> Array:
        """Return rmse, abs_rel and the three deltas of every image with valid pixels."""
        rows = []
        far = np.inf if self.max_depth is None else self.max_depth
        pairs = _map_pairs(predictions, references, _numbers, "depths without a channel axis")
        for i, (one, truth) in enumerate(pairs):
            valid = np.isfinite(truth) & (truth >= self.min_depth) & (truth <= far)
            if not valid.any():
                continue
            one, truth = one[valid], truth[valid]
            if not np.isfinite(one).all():
                raise ValueError(
                    f"predictions[{i}] contains NaN or infinite values at pixels with a measured depth. Predictions "
                    "must be finite there."
                )
            one = one.clip(self.min_depth, far)
            ratio = np.maximum(one / truth, truth / one)
            rows.append(
                [
                    np.sqrt(np.square(one - truth).mean()),
                    (np.abs(one - truth) / truth).mean(),
                    *((ratio < 1.25**power).mean() for power in (1, 2, 3)),
                ]
            )
        return np.asarray(rows).reshape(-1, 5)

    def result(self, rows: Array) -> Record:
        """Return the means over images."""
        return dict(zip(("rmse", "abs_rel", "delta1", "delta2", "delta3"), rows.mean(0).tolist()))
