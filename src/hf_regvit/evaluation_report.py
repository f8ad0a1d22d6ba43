"""What an evaluation found: scores with protocol and interval, reports of one model, tables of several.

A score keeps what every judged image contributed, so that two models can be compared image by image, also long after.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .intervals import STATISTICS, Rows, bootstrap_interval, paired_difference
from .object_discovery import LostEvaluation

# task: (in words, task of the Hub, what a model-index calls the metric)
_TASKS = {
    "knn": ("Weighted kNN", "image-classification"),
    "linear": ("Linear probe", "image-classification"),
    "logistic": ("Logistic regression", "image-classification"),
    "few_shot": ("Few-shot kNN", "image-classification"),
    "robustness": ("kNN at other sizes", "image-classification"),
    "retrieval": ("Retrieval", "image-feature-extraction"),
    "segmentation": ("Linear segmentation", "image-segmentation"),
    "depth": ("Linear depth", "depth-estimation"),
    "lost": ("Object discovery", "object-detection"),
}
_HUB_METRICS = {"top1": "accuracy", "top5": "top_5_accuracy", "map": "mean_average_precision"}
_IN_METRES = ("rmse",)
_RATIOS = ("abs_rel",)
_LOWER_IS_BETTER = (*_IN_METRES, *_RATIOS)


@dataclass(frozen=True)
class Score:
    """One number of one model, how it was made, and how sure it is.

    Args:
        task: As in `evaluation.TASKS`.
        variant: What tells scores of one task apart, the same for every model: `k=10`, `5 a class`.
        metric: top1, top5, map, mean_iou, rmse, abs_rel, delta1 or corloc: shares in [0, 1], rmse in metres.
        value: The number.
        interval: 95 %, from 2,000 resamples of the judged images.
        protocol: In words; one sentence for the whole task.
        settings: With numbers: k, layer, what was chosen and where.
        data: Name of the judged images.
        num_train: Images fitted on.
        num_images: Images judged.
        images: Fingerprint of their ids; only scores of the same images can be compared pairwise.
        seed: Of draws and resamples.
        seconds: Wall time of this task, without reading features.
        columns: What every image contributed: (numbers, images), one number for most metrics.
        statistic: How they make the value; a name in `intervals.STATISTICS`.
    """

    task: str
    variant: str
    metric: str
    value: float
    interval: tuple[float, float]
    protocol: str
    settings: dict[str, Any]
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
        """From the rows of every judged image, (n, numbers).

        Raises:
            ValueError: Not one row an image.
        """
        rows = np.asarray(rows, dtype=np.float64).reshape(len(rows), -1)
        if len(rows) != len(ids):
            raise ValueError(f"{len(rows)} rows for {len(ids)} images; expected one each.")
        of = STATISTICS[statistic]
        return cls(
            value=of(rows),
            interval=bootstrap_interval(rows, seed=seed, statistic=of),
            data=Path(data).name,  # reports are published; where the data lie here is nobody's business
            num_images=len(ids),
            images=fingerprint_of_names(ids),
            seed=seed,
            columns=tuple(tuple(column) for column in rows.T.tolist()),
            statistic=statistic,
            **what,
        )

    @property
    def key(self) -> tuple[str, str, str]:
        """What the scores of several models have in common."""
        return self.task, self.variant, self.metric

    @property
    def name(self) -> str:
        """For a reader: `Weighted kNN, top1, k=10`."""
        return ", ".join(part for part in (_TASKS[self.task][0], self.metric, self.variant) if part)

    def difference(self, other: "Score") -> tuple[float, tuple[float, float]]:
        """How far this score is above another of the same images, and the paired 95 % interval of that.

        Raises:
            ValueError: Another task, or other images.
        """
        if self.key != other.key or self.images != other.images or self.data != other.data:
            raise ValueError(
                f"'{self.name}' on {self.num_images} images of {self.data} and '{other.name}' on {other.num_images} "
                f"of {other.data} cannot be compared pairwise. Evaluate both models on the same images."
            )
        rows = (np.array(score.columns).T for score in (other, self))
        return paired_difference(*rows, seed=self.seed, statistic=STATISTICS[self.statistic])

    def ahead_of(self, other: "Score") -> tuple[float, tuple[float, float]]:
        """How much better this score is than another of the same images, and the paired 95 % interval of that.

        The difference, for errors (rmse, abs_rel) with the opposite sign: above 0 is better for every metric.

        Raises:
            ValueError: Another task, or other images.
        """
        gain, (low, high) = self.difference(other)
        if self.metric in _LOWER_IS_BETTER:
            return 0.0 - gain, (0.0 - high, 0.0 - low)  # no "-0.000"
        return gain, (low, high)

    def show(self, value: float, interval: tuple[float, float], *, signed: bool = False) -> str:
        """A number of this kind with its interval: `89.8 % [87.2, 92.4]`."""
        sign = "+" if signed else ""
        if self.metric in _LOWER_IS_BETTER:
            unit = " m" if self.metric in _IN_METRES else ""
            return f"{value:{sign}.3f}{unit} [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"
        return f"{100 * value:{sign}.1f} % [{100 * interval[0]:{sign}.1f}, {100 * interval[1]:{sign}.1f}]"


def fingerprint_of_names(names: Sequence[str]) -> str:
    """16 hexadecimal digits that change when a name or the order does."""
    digest = hashlib.blake2b(digest_size=8)
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


@dataclass(frozen=True)
class EvaluationReport:
    """Every number of one model, with how it was made.

    Args:
        model: As it was named.
        data: Name of the images judged on, where a task has none of its own.
        seed: Of all draws.
        versions: Of this package and what it stands on.
        scores: In the order of the tasks.
        notes: What a reader has to know: images left out, a model without CLS.
        reading_seconds: Wall time of reading features; `cached_seconds` is what reading them again would have cost.
        cached_seconds: See above.
        lost: Object discovery in full; None where it was not asked for.
        weights: Fingerprint of the model's weights, so that nobody publishes the numbers of another one; "" unknown.
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

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "EvaluationReport":
        """The report again."""
        scores = tuple(
            Score(**score | {"interval": tuple(score["interval"]), "columns": tuple(map(tuple, score["columns"]))})
            for score in content["scores"]
        )
        lost = None if content["lost"] is None else LostEvaluation.from_dict(content["lost"])
        return cls(**content | {"scores": scores, "notes": tuple(content["notes"]), "lost": lost})

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON; folders are made."""
        return EvaluationTable((self,)).save_json(path)

    @classmethod
    def load(cls, path: str | Path, *, model: str | None = None) -> "EvaluationReport":
        """A report from the file, or the folder with `report.json`, of an evaluation.

        Args:
            path: Of the file or the folder.
            model: Which one, where several models were evaluated.

        Raises:
            FileNotFoundError: No such file.
            ValueError: No evaluation, or several models and none named.
        """
        reports = EvaluationTable.load(path).reports
        names = [report.model for report in reports]
        if model is None and len(reports) == 1:
            return reports[0]
        if model not in names:
            raise ValueError(f"'{path}' holds the models {', '.join(names)}; model={model!r} must name one of them.")
        return reports[names.index(model)]

    def summary(self) -> dict[str, Any]:
        """The numbers with their settings, without what every image contributed."""
        return {
            "model": self.model,
            "data": self.data,
            "seed": self.seed,
            "notes": list(self.notes),
            "scores": [{k: v for k, v in asdict(score).items() if k != "columns"} for score in self.scores],
        }

    def model_index(self, name: str) -> list[dict[str, Any]]:
        """The `model-index` of a model card: one result for every task and data set, with metrics inside.

        Args:
            name: Of the model, as its card calls it.
        """
        results: dict[tuple[str, str], dict[str, Any]] = {}
        for score in self.scores:
            kind = _TASKS[score.task][1]
            key = (kind, score.data)
            result = results.setdefault(
                key,
                {
                    "task": {"type": kind, "name": kind.replace("-", " ").capitalize()},
                    "dataset": {"name": score.data, "type": re.sub(r"[^\w./-]+", "-", score.data)},
                    "metrics": [],
                },
            )
            result["metrics"].append(
                {
                    "type": _HUB_METRICS.get(score.metric, score.metric),
                    "name": score.name,
                    "value": round(score.value, 4),
                    "args": {
                        "confidence_interval": [round(bound, 4) for bound in score.interval],
                        "num_train_images": score.num_train,
                        "num_images": score.num_images,
                        "seed": score.seed,
                        "protocol": score.protocol,
                        **score.settings,
                    },
                }
            )
        return [{"name": name, "results": list(results.values())}]


@dataclass(frozen=True)
class EvaluationTable:
    """Reports of one or several models, side by side."""

    reports: tuple[EvaluationReport, ...]

    def rows(self) -> Iterator[tuple[Score, EvaluationReport, Score | None]]:
        """Every score with its report and the same score of the first model, models under one another."""
        first = {score.key: score for score in self.reports[0].scores}
        keys = list(dict.fromkeys(score.key for report in self.reports for score in report.scores))
        for key in keys:
            for report in self.reports:
                for score in report.scores:
                    if score.key == key:
                        yield score, report, first.get(key) if report is not self.reports[0] else None

    def markdown(self) -> str:
        """One table, the protocols below it."""
        several = len(self.reports) > 1
        head = ["task", "metric", "variant", "model", "result, 95 %", "layer", "chosen", "images", "seed", "seconds"]
        if several:
            head.insert(5, f"ahead of {self.reports[0].model}")
        lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        protocols: dict[tuple[str, str], list[str]] = {}  # models may differ in what stands for an image
        for score, report, reference in self.rows():
            users = protocols.setdefault((score.task, score.protocol), [])
            if report.model not in users:
                users.append(report.model)
            cells = [
                score.task,
                score.metric,
                score.variant,
                report.model,
                score.show(score.value, score.interval),
                str(score.settings.get("layer", "")),
                str(score.settings.get("chosen", "")),
                f"{score.num_train} / {score.num_images}",
                str(score.seed),
                f"{score.seconds:.1f}",
            ]
            if several:
                cells.insert(5, "" if reference is None else score.show(*score.ahead_of(reference), signed=True))
            lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
        lines += ["", "images: fitted on / judged. Intervals: 2,000 resamples of the judged images, paired."]
        if several and any(score.metric in _LOWER_IS_BETTER for score, _, _ in self.rows()):
            lines += ["ahead of: above 0 is better, also for errors (rmse, abs_rel), where the smaller one is."]
        lines += [""]
        for (task, protocol), users in protocols.items():
            whose = "" if len(users) == len(self.reports) else f" ({', '.join(users)})"
            lines.append(f"- {task}{whose}: {protocol}")
        for report in self.reports:
            lines += [f"- {report.model}: {note}" for note in report.notes]
            cached = f", others from the cache (worth {report.cached_seconds:.1f} s)" if report.cached_seconds else ""
            lines.append(f"- {report.model}: features read in {report.reading_seconds:.1f} s{cached}")
        return "\n".join(lines) + "\n"

    def save(self, folder: str | Path) -> Path:
        """Write `report.json` and `report.md`; returns the folder."""
        folder = Path(folder)
        self.save_json(folder / "report.json")
        (folder / "report.md").write_text("# Evaluation\n\n" + self.markdown(), encoding="utf-8")
        return folder

    def save_json(self, path: str | Path) -> Path:
        """Write one JSON file, `{"reports": [...]}`; folders are made."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"reports": [report.to_dict() for report in self.reports]}, indent=1, allow_nan=False)
        # A number of every image on a line of its own would bury the rest: arrays without nesting go on one line.
        text = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s*\]", lambda part: "[" + re.sub(r"\n\s*", " ", part[1]) + "]", text)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "EvaluationTable":
        """From the file that `save` wrote, or its folder.

        Raises:
            FileNotFoundError: No such file.
            ValueError: It is no evaluation.
        """
        path = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no evaluation at '{path}'. Run `regvit evaluate` with this output_dir.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(tuple(EvaluationReport.from_dict(report) for report in content["reports"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"'{path}' is no report of this version of regvit evaluate: {error!r}.") from error
