"""Results of an evaluation: scores with protocol and interval, reports for one model, tables for several.

A score keeps the contribution of every test image, so two models can be compared image by image at any later time.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..models.results import Record, as_tuples, html_table, markdown_table
from ..models.saving import read_json, whole_file
from .cache import fingerprint
from .intervals import STATISTICS, Rows, bootstrap_interval, paired_difference, wilson_interval
from .object_discovery import LostEvaluation
from .tasks import TASKS

_HUB_METRICS = {"top1": "accuracy", "top5": "top_5_accuracy", "map": "mean_average_precision"}
_IN_METERS = ("rmse",)
_RATIOS = ("abs_rel",)
_COUNTS = ("top1", "top5", "corloc")  # shares of the images
_LOWER_IS_BETTER = (*_IN_METERS, *_RATIOS)


@dataclass(frozen=True)
class Score:
    """Result of one metric for one model, with its protocol and confidence interval.

    Args:
        task: Task name, one of `evaluation.TASKS`.
        variant: Label that distinguishes the scores of one task, the same for every model: `k=10`, `n=5`.
        metric: top1, top5, map, mean_iou, rmse, abs_rel, delta1 or corloc: shares in [0, 1], rmse in meters.
        value: Value of the metric on all test images.
        interval: 95 % confidence interval from 2,000 resamples of the test images; that of Wilson for 0 and 100 % of
            the images, where all resamples are equal.
        protocol: Description of the protocol, one sentence for the whole task.
        settings: Settings as values: k, layer, the selected candidate and where it was selected.
        data: Name of the test data.
        num_train: Number of training images.
        num_images: Number of test images.
        images: Fingerprint of the ids of the test images; only scores on the same images can be compared pairwise.
        seed: Random seed for sampling and resampling.
        seconds: Wall time of this task, without feature extraction.
        columns: Contributions of the test images, (numbers, images); most metrics have one number per image.
        statistic: Function that turns the contributions into the value; a name in `intervals.STATISTICS`.
    """

    task: str
    variant: str
    metric: str
    value: float
    interval: tuple[float, float]
    protocol: str
    settings: Record
    data: str
    num_train: int
    num_images: int
    images: str
    seed: int
    seconds: float
    columns: tuple[tuple[float, ...], ...] = field(repr=False)
    statistic: str = "mean"

    @classmethod
    def measured(
        cls, rows: Rows, *, ids: Sequence[str], data: str, seed: int, statistic: str = "mean", **what: Any
    ) -> "Score":
        """Build a score from one row of numbers per test image, (n, numbers).

        Raises:
            ValueError: The number of rows differs from the number of images.
        """
        rows = np.asarray(rows, dtype=np.float64).reshape(len(rows), -1)
        if len(rows) != len(ids):
            raise ValueError(f"Got {len(rows)} rows for {len(ids)} images. Pass exactly one row per image.")
        of = STATISTICS[statistic]
        value = of(rows)
        if what.get("metric") in _COUNTS and value in (0, 1):
            interval = wilson_interval(value, len(ids))
        else:
            interval = bootstrap_interval(rows, seed=seed, statistic=of)
        return cls(
            value=value,
            interval=interval,
            data=Path(data).name,  # reports are published, so local paths must not appear in them
            num_images=len(ids),
            images=fingerprint(ids, digest_size=8),
            seed=seed,
            columns=tuple(tuple(column) for column in rows.T.tolist()),
            statistic=statistic,
            **what,
        )

    @property
    def key(self) -> tuple[str, str, str]:
        """Return the key that identifies the same score of different models."""
        return self.task, self.variant, self.metric

    @property
    def name(self) -> str:
        """Return the name shown to readers, such as `Weighted kNN, top1, k=10`."""
        title = TASKS[self.task].title if self.task in TASKS else self.task
        return ", ".join(part for part in (title, self.metric, self.variant) if part)

    def ahead_of(self, other: "Score") -> tuple[float, tuple[float, float]]:
        """Return the improvement over another score on the same images, with the paired 95 % confidence interval.

        This is the difference, with the opposite sign for errors (rmse, abs_rel): above 0 is better for every metric.
        If two models are right on the same images, the interval is Wilson's for the share of images that may differ.

        Raises:
            ValueError: The other score is of another task or of other images.
        """
        if self.key != other.key or self.images != other.images or self.data != other.data:
            raise ValueError(
                f"'{self.name}' on {self.num_images} images of {self.data} and '{other.name}' on {other.num_images} "
                f"images of {other.data} cannot be compared pairwise. Evaluate both models on the same images."
            )
        rows = (np.array(score.columns).T for score in (other, self))
        gain, (low, high) = paired_difference(*rows, seed=self.seed, statistic=STATISTICS[self.statistic])
        if self.metric in _COUNTS and self.columns == other.columns and {0, 1}.issuperset(self.columns[0]):
            high = wilson_interval(0, self.num_images)[1]
            low = -high
        if self.metric in _LOWER_IS_BETTER:
            return 0.0 - gain, (0.0 - high, 0.0 - low)  # avoids "-0.000"
        return gain, (low, high)

    @property
    def unit(self) -> str:
        """Unit of the value in tables and charts."""
        return "m" if self.metric in _IN_METERS else "ratio" if self.metric in _RATIOS else "%"

    def show(self, value: float, interval: tuple[float, float], *, signed: bool = False) -> str:
        """Format a value of this metric with its interval: `89.8 % [87.2, 92.4]`; a difference is in points."""
        sign, percent = ("+", "points") if signed else ("", "%")
        if self.metric in _LOWER_IS_BETTER:
            unit = " m" if self.metric in _IN_METERS else ""
            return f"{value:{sign}.3f}{unit} [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"
        return f"{100 * value:{sign}.1f} {percent} [{100 * interval[0]:{sign}.1f}, {100 * interval[1]:{sign}.1f}]"


@dataclass(frozen=True, repr=False)
class EvaluationReport:
    """All scores of one model, with the information needed to reproduce them.

    Args:
        model: Name of the model, as given.
        data: Name of the test data of the first task.
        seed: Random seed for sampling, splits and confidence intervals.
        versions: Versions of this package, its main dependencies and Python.
        scores: Scores in the order of the tasks.
        notes: Remarks for the reader, such as skipped images or a model without CLS.
        reading_seconds: Wall time of feature extraction.
        cached_seconds: Wall time that was saved by features from the cache.
        lost: Full results of object discovery; None if the task was not requested.
        weights: Fingerprint of the model's weights, which prevents publishing the scores of another model; "" if
            unknown.
    """

    model: str
    data: str
    seed: int
    versions: dict[str, str]
    scores: tuple[Score, ...] = ()
    notes: tuple[str, ...] = ()
    reading_seconds: float = 0.0
    cached_seconds: float = 0.0
    lost: LostEvaluation | None = None
    weights: str = ""

    def __repr__(self) -> str:
        found = [f"{score.name} {score.show(score.value, score.interval)}" for score in self.scores]
        return f"EvaluationReport({self.model} on {self.data}: {'; '.join(found)})"

    def _repr_html_(self) -> str:
        return EvaluationTable((self,))._repr_html_()

    def to_dict(self) -> Record:
        """Return the report as a JSON-serializable dict."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Record) -> "EvaluationReport":
        """Build a report from the output of `to_dict`."""
        scores = tuple(Score(**{key: as_tuples(value) for key, value in score.items()}) for score in content["scores"])
        lost = None if content["lost"] is None else LostEvaluation.from_dict(content["lost"])
        return cls(**content | {"scores": scores, "notes": tuple(content["notes"]), "lost": lost})

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON and create missing folders."""
        return EvaluationTable((self,)).save_json(path)

    @classmethod
    def load(cls, path: str | Path, *, model: str | None = None) -> "EvaluationReport":
        """Load one report from the JSON file of an evaluation.

        Args:
            path: Path of the file, or of the folder with `report.json`.
            model: Name of the model; required if the file holds several.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is not an evaluation report, or `model` is not one of its models.
        """
        reports = EvaluationTable.load(path).reports
        names = [report.model for report in reports]
        if model is None and len(reports) == 1:
            return reports[0]
        if model not in names:
            raise ValueError(f"'{path}' holds the models {', '.join(names)}; model={model!r} must be one of them.")
        return reports[names.index(model)]

    def summary(self) -> Record:
        """Return the scores with their settings, without the contributions of single images."""
        return {
            "model": self.model,
            "data": self.data,
            "seed": self.seed,
            "notes": list(self.notes),
            "scores": [{k: v for k, v in asdict(score).items() if k != "columns"} for score in self.scores],
        }

    def model_index(self, name: str) -> list[Record]:
        """Return the `model-index` of a model card: one result per task type and data set, with its metrics.

        Args:
            name: Name of the model on its card.
        """
        from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

        found = []
        for score in self.scores:
            kind = TASKS[score.task].hub_type if score.task in TASKS else "image-feature-extraction"
            protocol = {
                "confidence_interval": [round(bound, 4) for bound in score.interval],
                "num_train_images": score.num_train,
                "num_images": score.num_images,
                "seed": score.seed,
                "protocol": score.protocol,
            }
            found.append(
                EvalResult(
                    task_type=kind,
                    task_name=kind.replace("-", " ").capitalize(),
                    dataset_name=score.data,
                    dataset_type=re.sub(r"[^\w./-]+", "-", score.data),
                    metric_type=_HUB_METRICS.get(score.metric, score.metric),
                    metric_name=score.name,
                    metric_value=round(score.value, 4),
                    metric_args=protocol | score.settings,
                )
            )
        return eval_results_to_model_index(name, found)


@dataclass(frozen=True, repr=False)
class EvaluationTable:
    """Reports of one or several models, side by side."""

    reports: tuple[EvaluationReport, ...]

    def rows(self) -> Iterator[tuple[Score, EvaluationReport, Score | None]]:
        """Yield every score with its report and the same score of the first model, grouped by score."""
        by_key = [{score.key: score for score in report.scores} for report in self.reports]
        for key in dict.fromkeys(key for scores in by_key for key in scores):
            for report, scores in zip(self.reports, by_key):
                if key in scores:
                    yield scores[key], report, by_key[0].get(key) if report is not self.reports[0] else None

    @cached_property
    def gains(self) -> dict[tuple[str, ...], tuple[float, tuple[float, float]]]:
        """Differences to the first model with their intervals, by key of the score and model."""
        return {(*s.key, report.model): s.ahead_of(first) for s, report, first in self.rows() if first is not None}

    def verdicts(self) -> list[str]:
        """Return sentences like `knn: B shows no difference to A: +0.0 points [-1.2, +1.2] (top1).` for each task."""
        found: dict[str, list[str]] = {}
        for score, report, first in self.rows():
            if first is not None:
                gain, (low, high) = self.gains[*score.key, report.model]
                word = "is better than" if low > 0 else "is worse than" if high < 0 else "shows no difference to"
                of = ", ".join(filter(None, (score.metric, score.variant)))
                start = f"{score.task}: {report.model} {word} {self.reports[0].model}: "
                found.setdefault(start, []).append(f"{score.show(gain, (low, high), signed=True)} ({of})")
        return [f"{start}{', '.join(numbers)}." for start, numbers in found.items()]

    def cells(self) -> list[list[str]]:
        """Return the table as text: the names of the columns, then one row per score."""
        several, found = len(self.reports) > 1, list[list[str]]()
        for score, report, reference in self.rows():
            ahead = "" if reference is None else score.show(*self.gains[*score.key, report.model], signed=True)
            cells = {
                "task": score.task,
                "metric": score.metric,
                "variant": score.variant,
                "model": report.model,
                "result [95 % CI]": score.show(score.value, score.interval),
                **({f"difference to {self.reports[0].model}": ahead} if several else {}),
                "block": str(score.settings.get("layer", "")),
                "selected": str(score.settings.get("chosen", "")),
                "images": f"{score.num_train} / {score.num_images}",
                "seed": str(score.seed),
                "seconds": f"{score.seconds:.1f}",
            }
            found += [list(cells.values())] if found else [list(cells), list(cells.values())]
        return found

    def markdown(self) -> str:
        """Return a Markdown table of all scores, followed by the verdicts, the protocols and the notes."""
        about, *notes = self.remarks()
        verdicts = [f"- {verdict}" for verdict in self.verdicts()]
        lines = [markdown_table(self.cells()), "", *verdicts, *[""][: len(verdicts)], about, ""]
        return "\n".join(lines + [f"- {note}" for note in notes]) + "\n"

    def remarks(self) -> list[str]:
        """Return what the columns mean, then the protocols and the notes."""
        lines = [
            "images: training images / test images. Intervals: 95 % bootstrap intervals from 2,000 resamples of the "
            "test images, after Wilson for 0 and 100 %; differences are paired by image."
        ]
        protocols: dict[tuple[str, str], dict[str, None]] = {}  # models may differ in the vector of an image
        for score, report, _ in self.rows():
            protocols.setdefault((score.task, score.protocol), {})[report.model] = None
        if len(self.reports) > 1 and any(score.metric in _LOWER_IS_BETTER for score, _, _ in self.rows()):
            lines[0] += " A difference above 0 is better for every metric, including errors (rmse, abs_rel)."
        for (task, protocol), users in protocols.items():
            whose = "" if len(users) == len(self.reports) else f" ({', '.join(users)})"
            lines.append(f"{task}{whose}: {protocol}")
        for report in self.reports:
            lines += [f"{report.model}: {note}" for note in report.notes]
            cached = f"; the cache saved another {report.cached_seconds:.1f} s" if report.cached_seconds else ""
            lines.append(f"{report.model}: feature extraction took {report.reading_seconds:.1f} s{cached}")
        return lines

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.reports)) or "EvaluationTable without reports"

    def _repr_html_(self) -> str:
        return html_table(self.cells())

    def to_dict(self) -> Record:
        """Return all reports as a JSON-serializable dict."""
        return {"reports": [report.to_dict() for report in self.reports]}

    def save(self, folder: str | Path) -> Path:
        """Write `report.json` and `report.md`, and return the folder."""
        folder = Path(folder)
        self.save_json(folder / "report.json")
        with whole_file(folder / "report.md") as unfinished:
            unfinished.write_text("# Evaluation\n\n" + self.markdown(), encoding="utf-8")
        return folder

    def save_json(self, path: str | Path) -> Path:
        """Write one JSON file, `{"reports": [...]}`, and create missing folders."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        # One line per image would make the file unreadable, so arrays without nesting are written on one line.
        text = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s*\]", lambda part: "[" + re.sub(r"\n\s*", " ", part[1]) + "]", text)
        with whole_file(path) as unfinished:
            unfinished.write_text(text + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "EvaluationTable":
        """Load the table from the file that `save` wrote, or from its folder.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is not an evaluation report.
        """
        path = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no evaluation report at '{path}'. Run `regvit evaluate` with this output_dir first."
            )
        try:
            return cls(tuple(EvaluationReport.from_dict(report) for report in read_json(path)["reports"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"'{path}' is not an evaluation report that this version can read: {error!r}. Run `regvit evaluate` "
                "again to write a new one."
            ) from error
