"""Evaluation tasks on one vector per image, each score with its protocol and confidence interval.

Shape letters: n training images, m test images, B blocks, D width, C classes.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.results import Record
    from ..models.tokens import TokenReader
    from .report import Score
    from .run import LabeledFeatures, TaskParts

    Measured = tuple[str, str, Tensor, Record]  # variant, metric, contribution of every image, settings


_OFFICIAL_KS = (10, 20, 100, 200)
_OFFICIAL_SHOTS = (1, 5, 10)
_QUERIES = 256  # number of retrieval queries ranked at once


def option(default: Any, help_text: str, *aliases: str, **metadata: object) -> Any:
    """Return a dataclass field with the help text and other spellings of its command-line option; lists are copied.

    Without a default (`dataclasses.MISSING`), the option is required.
    """
    default = default.copy if isinstance(default, list) else default
    kind = "default_factory" if callable(default) else "default"
    return field(**{kind: default}, metadata={"help": help_text, "aliases": list(aliases), **metadata})


# --- Settings that several tasks share


@dataclass
class VectorSettings:
    """Settings of every task on whole images."""

    image_size: int | None = option(None, "Side of the center crop in pixels. Default: the model's image size.")


@dataclass
class NeighborSettings(VectorSettings):
    """Settings of votes of the nearest training images."""

    knn_k: list[int] | None = option(
        None,
        "Numbers of nearest neighbors. Default: those of 10 20 100 200 that do not exceed the mean "
        "number of training images of a class.",
    )
    temperature: float = option(0.07, "Temperature of the kNN votes.")

    def numbers(self, labels: "Tensor") -> tuple[int, ...]:
        """Return the numbers of neighbors: as given, or the official ones for which a class has enough images."""
        num_train = len(labels)
        if self.knn_k is None:
            per_class = num_train // len(labels.unique())
            return tuple(k for k in _OFFICIAL_KS if k <= per_class) or (max(per_class, 1),)
        if not self.knn_k or min(self.knn_k) < 1 or max(self.knn_k) > num_train:
            raise ValueError(
                f"k={list(self.knn_k)}: every k must be at least 1 and at most {num_train}, the number of training "
                "images. Give more training images or a smaller k."
            )
        return tuple(self.knn_k)


@dataclass
class SelectionSettings(VectorSettings):
    """Settings of probes with a hyperparameter that is selected on images."""

    select_on: str = option(
        "held_out",
        "Images on which the linear probe is selected: held_out is a tenth of the training images; test "
        "is the test images, which is optimistic but what the official DINOv2 probe does.",
    )

    def __post_init__(self) -> None:
        if self.select_on == "judged":  # the name in older recipes
            self.select_on = "test"
        if self.select_on not in ("held_out", "test"):
            raise ValueError(f"select_on={self.select_on!r} is unknown. Use 'held_out' or 'test'.")

    def words(self) -> str:
        """Return the part of the protocol that describes the selection."""
        if self.select_on == "test":
            return "selected on the test images themselves (official protocol, optimistic)"
        return "selected on a held-out tenth of the training images, then refitted on all of them"

    def parts(
        self, train: "LabeledFeatures", test: "LabeledFeatures", seed: int
    ) -> "tuple[LabeledFeatures, LabeledFeatures]":
        """Return the features on which candidates are fitted, and those on which one is selected."""
        from ..data.files import stratified_split

        if self.select_on == "test":
            return train, test
        fit, held = stratified_split(train.labels.tolist(), held_out_share=0.1, seed=seed)
        if not held:
            raise ValueError(
                "Every class has a single training image, so none can be held out for selection. Add images, or "
                "select on the test images with select_on='test'."
            )
        return train.subset(fit), train.subset(held)


# --- Tasks


def _run(
    task: "Knn | Linear | Logistic | FewShot | Retrieval", reader: "TokenReader", parts: "TaskParts", *, seed: int
) -> "list[Score]":
    """Score everything that `task.measure` yields."""
    train, test = (parts.features(reader, part, task.settings.image_size) for part in ("train", "test"))
    started = time.perf_counter()
    measured = list(task.measure(train, test, seed))
    seconds, words = time.perf_counter() - started, task.protocol(train.features.kind)
    return [_score(task.name, one, train, test, words, seed, seconds) for one in measured]


@dataclass
class Knn:
    """Weighted votes of the nearest training images."""

    settings: NeighborSettings
    name, title, hub_type, needs = "knn", "Weighted kNN", "image-classification", "labels"
    Settings = NeighborSettings

    run = _run

    def protocol(self, kind: str) -> str:
        """Return the protocol in one sentence."""
        return f"weighted votes of the k nearest {kind} vectors by cosine similarity, T={self.settings.temperature:g}"

    def measure(self, train: "LabeledFeatures", test: "LabeledFeatures", seed: int) -> "Iterator[Measured]":
        """Yield the hits for every k."""
        temperature = self.settings.temperature
        for k, votes in _votes(train, test, self.settings.numbers(train.labels), temperature).items():
            yield f"k={k}", "top1", hits(votes, test.labels), {"k": k, "temperature": temperature}


@dataclass
class Linear:
    """Grid of linear heads of the official evaluation, trained by SGD in one pass."""

    @dataclass
    class Settings(SelectionSettings):
        """Settings of the grid; see `linear.LinearGrid`."""

        linear_steps: int = option(2000, "Number of SGD steps of the linear probe.")
        linear_batch_size: int = option(128, "Number of images per SGD step of the linear probe.")
        linear_learning_rates: list[float] | None = option(
            None, "Learning rates of the linear probe for 256 images. Default: 13 from 1e-5 to 0.1."
        )
        linear_num_blocks: list[int] = option([1, 4], "Numbers of last blocks whose vectors the linear probe reads.")

    settings: Settings
    name, title, hub_type, needs = "linear", "Linear probe", "image-classification", "labels"

    run = _run

    def protocol(self, kind: str) -> str:
        """Return the protocol in one sentence."""
        settings = self.settings
        return (
            f"linear heads on {kind}, {settings.linear_steps} SGD steps of {settings.linear_batch_size} images, "
            f"momentum 0.9, cosine schedule to 0, no augmentation; {settings.words()}"
        )

    def measure(self, train: "LabeledFeatures", test: "LabeledFeatures", seed: int) -> "Iterator[Measured]":
        """Yield the hits of the selected head."""
        from .linear import LEARNING_RATES, LinearGrid, LinearHeads, train_linear_heads

        settings, available = self.settings, train.features.vectors.shape[1]
        grid = LinearGrid(
            settings.linear_learning_rates or LEARNING_RATES,
            tuple(dict.fromkeys(min(count, available) for count in settings.linear_num_blocks)),
            # If the vectors are mean patches already, adding the mean patch again has no effect.
            (False, True) if train.features.kind == "CLS" else (False,),
            settings.linear_steps,
            settings.linear_batch_size,
        )

        def fit(part: "LabeledFeatures", grid: LinearGrid) -> LinearHeads:
            vectors, mean_patch = part.features.vectors, part.features.mean_patch
            return train_linear_heads(
                vectors, mean_patch, part.labels, num_classes=train.num_classes, grid=grid, seed=seed
            )

        fitted, chooser = settings.parts(train, test, seed)
        heads = fit(fitted, grid)
        best, accuracy = heads.best(chooser.features.vectors, chooser.features.mean_patch, chooser.labels)
        final = heads if fitted is train else fit(train, grid.only(best))
        scores = dict(final.scores(test.features.vectors, test.features.mean_patch))[best]
        chosen = _chosen(f"{best} (of {len(heads.settings)})", settings, accuracy, len(chooser))
        sizes = {"num_steps": grid.num_steps, "batch_size": min(grid.batch_size, len(train))}
        yield "", "top1", hits(scores, test.labels), chosen | sizes


@dataclass
class Logistic:
    """Logistic regression for many values of C."""

    @dataclass
    class Settings(SelectionSettings):
        """Settings of the path of C."""

        logistic_cs: list[float] | None = option(
            None, "Values of C of the logistic regression, ascending. Default: 45 from 1e-6 to 1e5."
        )

    settings: Settings
    name, title, hub_type, needs = "logistic", "Logistic regression", "image-classification", "labels"

    run = _run

    def protocol(self, kind: str) -> str:
        """Return the protocol in one sentence."""
        from .linear import LOGISTIC_CS

        count = len(self.settings.logistic_cs or LOGISTIC_CS)
        return f"L-BFGS on unscaled {kind} vectors, best of {count} values of C; {self.settings.words()}"

    def measure(self, train: "LabeledFeatures", test: "LabeledFeatures", seed: int) -> "Iterator[Measured]":
        """Yield the hits of the selected C."""
        from .linear import LOGISTIC_CS, logistic_path, merit

        cs, num_classes = self.settings.logistic_cs or LOGISTIC_CS, train.num_classes
        fitted, chooser = self.settings.parts(train, test, seed)
        models = logistic_path(fitted.features.last, fitted.labels, num_classes=num_classes, cs=cs)
        (accuracy, _), best = max(
            ((merit(model(chooser.features.last), chooser.labels), model) for model in models),
            key=lambda pair: pair[0],
        )
        if fitted is not train:
            best = next(logistic_path(train.features.last, train.labels, num_classes=num_classes, cs=(best.c,)))
        chosen = _chosen(f"C {best.c:.3g} (of {len(cs)})", self.settings, accuracy, len(chooser))
        yield "", "top1", hits(best(test.features.last), test.labels), chosen


@dataclass
class FewShot:
    """Votes of few training images per class, averaged over random draws."""

    @dataclass
    class Settings(VectorSettings):
        """Settings of the draws."""

        shots: list[int] | None = option(None, "Numbers of few-shot images per class. Default: 1 5 10.")
        num_tries: int = option(5, "Number of random draws of the few-shot images.")
        temperature: float = option(0.07, "Temperature of the kNN votes.")

        def __post_init__(self) -> None:
            if self.num_tries < 1:
                raise ValueError(f"num_tries={self.num_tries} must be at least 1.")

    settings: Settings
    name, title, hub_type, needs = "few_shot", "Few-shot kNN", "image-classification", "labels"

    run = _run

    def protocol(self, kind: str) -> str:
        """Return the protocol in one sentence."""
        return f"n training images per class, mean of {self.settings.num_tries} draws; kNN with k=n on {kind} vectors"

    def measure(self, train: "LabeledFeatures", test: "LabeledFeatures", seed: int) -> "Iterator[Measured]":
        """Yield the mean hits over the draws for every number of images per class."""
        import torch

        from .knn import few_shot_indices

        fewest = int(train.labels.bincount()[train.labels.unique()].min())
        for n in self.settings.shots or [n for n in _OFFICIAL_SHOTS if n <= fewest]:
            tries = []
            for attempt in range(self.settings.num_tries):
                drawn = train.subset(few_shot_indices(train.labels, n, seed=seed + attempt).tolist())
                tries.append(hits(_votes(drawn, test, (n,), self.settings.temperature)[n], test.labels))
            right = torch.stack(tries)  # (tries, m)
            spread = right.mean(dim=1).std(correction=1).item() if len(tries) > 1 else 0.0
            found = {"per_class": n, "k": n, "num_tries": len(tries), "std_over_tries": round(spread, 4)}
            yield f"n={n}", "top1", right.mean(dim=0), found


@dataclass
class Retrieval:
    """Training images ranked by similarity for every test image."""

    settings: VectorSettings
    name, title, hub_type, needs = "retrieval", "Retrieval", "image-feature-extraction", "labels"
    Settings = VectorSettings

    run = _run

    def protocol(self, kind: str) -> str:
        """Return the protocol in one sentence."""
        return (
            f"training images ranked for every test image by cosine similarity of {kind} vectors; images of the same "
            "class are relevant"
        )

    def measure(self, train: "LabeledFeatures", test: "LabeledFeatures", seed: int) -> "Iterator[Measured]":
        """Yield the average precision of every test image."""
        import numpy as np
        import torch
        from torch.nn.functional import normalize

        from .metrics import MeanAveragePrecision

        metric, gallery = MeanAveragePrecision(), normalize(train.features.last, dim=1)
        rows = []
        for queries, labels in zip(test.features.last.split(_QUERIES), test.labels.split(_QUERIES)):
            cosines = normalize(queries, dim=1) @ gallery.T  # (queries, n)
            rows.append(metric.reduce(cosines, labels[:, None] == train.labels[None]))
        yield "", "map", torch.from_numpy(np.concatenate(rows)), {}


@dataclass
class Robustness:
    """Votes for test images of other sizes than the training images."""

    @dataclass
    class Settings(NeighborSettings):
        """Settings of the sizes."""

        image_sizes: list[int] | None = option(
            None, "Image sizes of the robustness task in pixels. Default: 0.5, 0.75 and 1.25 times --image_size."
        )

    settings: Settings
    name, title, hub_type, needs = "robustness", "kNN at other sizes", "image-classification", "labels"

    def run(self, reader: "TokenReader", parts: "TaskParts", *, seed: int) -> "list[Score]":
        """Score every size."""
        settings, patch = self.settings, max(reader.description.patch_size)
        side = settings.image_size or min(reader.description.image_size)
        sizes = settings.image_sizes or [max(1, round(side * share / patch)) * patch for share in (0.5, 0.75, 1.25)]
        train = parts.features(reader, "train", settings.image_size)
        k = settings.numbers(train.labels)[0]
        words = (
            f"test images at another size against training images at {side} px; kNN with k={k}, otherwise as in knn"
        )
        scores = []
        for size in dict.fromkeys(sizes):
            started = time.perf_counter()
            test = parts.features(reader, "test", size)
            right = hits(_votes(train, test, (k,), settings.temperature)[k], test.labels)
            found = {"k": k, "image_size": size, "train_image_size": side}
            seconds = time.perf_counter() - started
            scores.append(_score(self.name, (f"{size} px", "top1", right, found), train, test, words, seed, seconds))
        return scores


# --- Shared by the tasks


def hits(scores: "Tensor", labels: "Tensor") -> "Tensor":
    """Return (m,) 1 where the class of the highest score is correct and 0 elsewhere; uses `metrics.TopKAccuracy`."""
    import torch

    from .metrics import TopKAccuracy

    return torch.as_tensor(TopKAccuracy().reduce(scores, labels))[:, 0].lt(1).double()


def _votes(
    train: "LabeledFeatures", test: "LabeledFeatures", ks: Sequence[int], temperature: float
) -> "dict[int, Tensor]":
    """Return the class scores of the test images for each k, (m, C), from the last block read."""
    from .knn import knn_classify

    vectors = train.features.last, train.labels, test.features.last
    return knn_classify(*vectors, k=ks, temperature=temperature, num_classes=train.num_classes)


def _chosen(words: str, settings: SelectionSettings, accuracy: float, count: int) -> "Record":
    return {
        "chosen": words,
        "select_on": settings.select_on,
        "accuracy_where_chosen": accuracy,
        "num_images_to_choose": count,
    }


def _score(
    task: str,
    measured: "Measured",
    train: "LabeledFeatures",
    test: "LabeledFeatures",
    words: str,
    seed: int,
    seconds: float,
) -> "Score":
    from .report import Score

    variant, metric, rows, settings = measured
    return Score.measured(
        rows.double().numpy(),
        ids=test.features.ids,
        data=test.data,
        seed=seed,
        task=task,
        variant=variant,
        metric=metric,
        protocol=words,
        settings={"layer": test.features.layers[-1]} | settings,
        num_train=len(train),
        seconds=seconds,
    )
