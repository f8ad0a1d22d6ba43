"""Evaluation tasks on feature vectors of whole images, each score with its protocol and confidence interval.

Shape letters: n training images, m test images, B blocks, D width, C classes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.files import stratified_split
from .knn import few_shot_indices, knn_classify
from .linear import LinearGrid, logistic_path, merit, train_linear_heads
from .report import Score
from .tasks import ON_FEATURES, LabeledFeatures, Measured, Protocol, Task

_OFFICIAL_KS = (10, 20, 100, 200)
_OFFICIAL_SHOTS = (1, 5, 10)
_QUERIES = 256  # number of retrieval queries ranked at once


def score_features(
    train: LabeledFeatures,
    judged: LabeledFeatures,
    *,
    tasks: Sequence[Task] = ON_FEATURES,
    protocol: Protocol | None = None,
    seed: int = 0,
) -> Iterator[Score]:
    """Score tasks on feature vectors from any source: a model, another library, raw pixels.

    Args:
        train: Training features.
        judged: Test features.
        tasks: Tasks to run: knn, linear, logistic, few_shot, retrieval.
        protocol: Settings of the tasks; see `Protocol`.
        seed: Random seed for sampling, splits and confidence intervals.

    Raises:
        ValueError: There are too few images for k or for the shots.
    """
    protocol = protocol or Protocol()
    kind = train.features.kind
    functions: dict[str, tuple[Callable[..., Iterator[Measured]], str]] = {
        "knn": (
            _knn_scores,
            f"weighted votes of the k nearest {kind} vectors by cosine similarity, T={protocol.temperature:g}",
        ),
        "linear": (_linear_scores, _linear_protocol(protocol, kind)),
        "logistic": (_logistic_scores, _logistic_protocol(protocol, kind)),
        "few_shot": (
            _few_shot_scores,
            f"n training images per class, mean of {protocol.num_tries} draws; kNN with k=n on {kind} vectors",
        ),
        "retrieval": (
            _retrieval_scores,
            f"training images ranked for every test image by cosine similarity of {kind} vectors; images of the same "
            "class are relevant",
        ),
    }
    for task in tasks:
        measure, words = functions[task]
        started = time.perf_counter()
        measured = list(measure(train, judged, protocol, seed))
        seconds = time.perf_counter() - started
        for variant, metric, rows, settings in measured:
            yield judged.score(
                rows,
                task=task,
                variant=variant,
                metric=metric,
                protocol=words,
                settings={"layer": train.layer} | settings,
                num_train=len(train),
                seed=seed,
                seconds=seconds,
            )


def hits(scores: Tensor, labels: Tensor) -> Tensor:
    """Return (m,) 1 where the class of the highest score is correct and 0 elsewhere; uses `metrics.TopKAccuracy`."""
    from .metrics import TopKAccuracy

    ranks = np.asarray(TopKAccuracy().reduce(scores, labels))[:, 0]
    return torch.from_numpy((ranks < 1).astype(np.float64))


def neighbours(protocol: Protocol, num_train: int) -> tuple[int, ...]:
    """Return the numbers of neighbors: as given, or the official ones limited to the number of training images."""
    if protocol.knn_ks is None:
        return tuple(dict.fromkeys(min(k, num_train) for k in _OFFICIAL_KS))
    if not protocol.knn_ks or min(protocol.knn_ks) < 1 or max(protocol.knn_ks) > num_train:
        raise ValueError(
            f"k={list(protocol.knn_ks)}: every k must be at least 1 and at most {num_train}, the number of training "
            "images. Give more training images or a smaller k."
        )
    return tuple(protocol.knn_ks)


def knn_votes(
    train: LabeledFeatures, judged: LabeledFeatures, ks: Sequence[int], temperature: float
) -> dict[int, Tensor]:
    """Return the class scores of the test images for each k, (m, C), from the last block read."""
    return knn_classify(
        train.features.last,
        train.labels,
        judged.features.last,
        k=ks,
        temperature=temperature,
        num_classes=train.num_classes,
    )


def _knn_scores(train: LabeledFeatures, judged: LabeledFeatures, protocol: Protocol, seed: int) -> Iterator[Measured]:
    for k, votes in knn_votes(train, judged, neighbours(protocol, len(train)), protocol.temperature).items():
        yield f"k={k}", "top1", hits(votes, judged.labels), {"k": k, "temperature": protocol.temperature}


def _held_out(train: LabeledFeatures, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of nine tenths of the training images and of the other tenth, stratified by class."""
    fit, held = stratified_split(train.labels.tolist(), held_out_share=0.1, seed=seed)
    if not held:
        raise ValueError(
            "Every class has a single training image, so none can be held out for selection. Add images, or select on "
            "the test images with select_on='judged'."
        )
    return torch.tensor(fit), torch.tensor(held)


def _selection_description(protocol: Protocol) -> str:
    if protocol.select_on == "judged":
        return "selected on the test images themselves (official protocol, optimistic)"
    return "selected on a held-out tenth of the training images, then refitted on all of them"


def _linear_protocol(protocol: Protocol, kind: str) -> str:
    grid = protocol.linear
    return (
        f"linear heads on {kind}, {grid.num_steps} SGD steps of {grid.batch_size} images, momentum 0.9, cosine "
        f"schedule to 0, no augmentation; {_selection_description(protocol)}"
    )


def _logistic_protocol(protocol: Protocol, kind: str) -> str:
    return (
        f"L-BFGS on unscaled {kind} vectors, best of {len(protocol.logistic_cs)} values of C; "
        f"{_selection_description(protocol)}"
    )


def _linear_scores(
    train: LabeledFeatures, judged: LabeledFeatures, protocol: Protocol, seed: int
) -> Iterator[Measured]:
    grid, features = protocol.linear, train.features
    available = features.vectors.shape[1]
    grid = LinearGrid(
        grid.learning_rates,
        tuple(dict.fromkeys(min(count, available) for count in grid.num_blocks)),
        # If the vectors are mean patches already, adding the mean patch again has no effect.
        grid.mean_patch if features.kind == "CLS" else (False,),
        grid.num_steps,
        grid.batch_size,
    )

    def fit(rows: Tensor, grid: LinearGrid) -> Any:
        return train_linear_heads(
            features.vectors[rows],
            features.mean_patch[rows],
            train.labels[rows],
            num_classes=train.num_classes,
            grid=grid,
            seed=seed,
        )

    everything = torch.arange(len(train))
    if protocol.select_on == "judged":
        heads, chooser, rows = fit(everything, grid), judged, torch.arange(len(judged))
    else:
        fitted, rows = _held_out(train, seed)
        heads, chooser = fit(fitted, grid), train
    best, accuracy = heads.best(
        chooser.features.vectors[rows], chooser.features.mean_patch[rows], chooser.labels[rows]
    )
    final = heads if protocol.select_on == "judged" else fit(everything, grid.only(best))
    scores = dict(final.scores(judged.features.vectors, judged.features.mean_patch))[best]
    yield (
        "",
        "top1",
        hits(scores, judged.labels),
        {
            "chosen": f"{best} (of {len(heads.settings)})",
            "select_on": protocol.select_on,
            "accuracy_where_chosen": accuracy,
            "num_images_to_choose": len(rows),
            "num_steps": grid.num_steps,
            "batch_size": min(grid.batch_size, len(train)),
        },
    )


def _logistic_scores(
    train: LabeledFeatures, judged: LabeledFeatures, protocol: Protocol, seed: int
) -> Iterator[Measured]:
    vectors, labels, cs = train.features.last, train.labels, protocol.logistic_cs
    everything = torch.arange(len(train))
    if protocol.select_on == "judged":
        fitted, chooser, rows = everything, judged, torch.arange(len(judged))
    else:
        (fitted, rows), chooser = _held_out(train, seed), train
    best, best_merit = None, (-1.0, 0.0)
    for model in logistic_path(vectors[fitted], labels[fitted], num_classes=train.num_classes, cs=cs):
        this = merit(model(chooser.features.last[rows]), chooser.labels[rows])
        if this > best_merit:
            best, best_merit = model, this
    assert best is not None
    if protocol.select_on == "held_out":
        best = next(logistic_path(vectors, labels, num_classes=train.num_classes, cs=(best.c,)))
    yield (
        "",
        "top1",
        hits(best(judged.features.last), judged.labels),
        {
            "chosen": f"C {best.c:.3g} (of {len(cs)})",
            "select_on": protocol.select_on,
            "accuracy_where_chosen": best_merit[0],
            "num_images_to_choose": len(rows),
        },
    )


def _few_shot_scores(
    train: LabeledFeatures, judged: LabeledFeatures, protocol: Protocol, seed: int
) -> Iterator[Measured]:
    fewest = int(torch.bincount(train.labels)[train.labels.unique()].min())
    shots = protocol.shots or [n for n in _OFFICIAL_SHOTS if n <= fewest]
    for n in shots:
        tries = []
        for attempt in range(protocol.num_tries):
            rows = few_shot_indices(train.labels, n, seed=seed + attempt)
            votes = knn_classify(
                train.features.last[rows],
                train.labels[rows],
                judged.features.last,
                k=(n,),
                temperature=protocol.temperature,
                num_classes=train.num_classes,
            )[n]
            tries.append(hits(votes, judged.labels))
        right = torch.stack(tries)  # (tries, m)
        spread = right.mean(dim=1).std(correction=1).item() if len(tries) > 1 else 0.0
        yield (
            f"n={n}",
            "top1",
            right.mean(dim=0),
            {"per_class": n, "k": n, "num_tries": len(tries), "std_over_tries": round(spread, 4)},
        )


def _retrieval_scores(
    train: LabeledFeatures, judged: LabeledFeatures, protocol: Protocol, seed: int
) -> Iterator[Measured]:
    from .metrics import MeanAveragePrecision

    metric = MeanAveragePrecision()
    gallery = F.normalize(train.features.last, dim=1)
    rows = []
    for queries, labels in zip(judged.features.last.split(_QUERIES), judged.labels.split(_QUERIES)):
        cosines = F.normalize(queries, dim=1) @ gallery.T  # (queries, n)
        rows.append(np.asarray(metric.reduce(cosines, labels[:, None] == train.labels[None])))
    yield "", "map", torch.from_numpy(np.concatenate(rows)), {}
