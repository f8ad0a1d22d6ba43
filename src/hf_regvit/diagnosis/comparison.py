"""Comparison of several checkpoints, e.g. with 0, 1, 2, 4 and 8 registers: diagnoses on the same images in a table."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..evaluation.intervals import paired_difference
from ..models.loading import distinct_names, open_model
from ..models.processing import ImageProcessor
from ..models.results import Record, Result, markdown_table
from ..models.tokens import TokenReader
from .diagnose import ImageNumbers, measure
from .findings import findings, relocation
from .report import ArtifactReport
from .sinks import SinkReader, image_numbers


@dataclass(frozen=True, repr=False)
class ComparisonReport(Result):
    """Diagnoses of several checkpoints on the same images: one table row each, and the full reports.

    Attributes:
        rows: One record per checkpoint.
        reports: Report of each checkpoint, by name.
        settings: Settings of the diagnoses.
        attention: Attention in the last quarter of the blocks to the outliers of the first checkpoint, to the same
            patches of the last one, and to registers, with the differences and their 95 % intervals; None if it
            cannot be compared.
        differences: Last minus first checkpoint for the numbers of `findings` that have a difference, with its 95 %
            interval over images, if there is one.
    """

    rows: list[Record]
    reports: dict[str, ArtifactReport]
    settings: Record
    attention: Record | None = None
    differences: list[Record] = field(default_factory=list)

    file_name: ClassVar = "comparison.json"

    def to_dict(self) -> Record:
        """Return everything but the reports, which are saved separately."""
        rest = {"attention": self.attention, "differences": self.differences}
        return {"rows": self.rows, "settings": self.settings} | rest

    @property
    def conclusion(self) -> str | None:
        """Sentence on the attention that registers took over from outliers; None if they did not."""
        first, *_, last = self.reports.values()
        return relocation(first, last)

    def folders(self) -> dict[str, ArtifactReport]:
        """Return the reports by folder name: number and last part of the name of the checkpoint."""
        return {f"{i}-{Path(name).name}": report for i, (name, report) in enumerate(self.reports.items())}

    def save(self, folder: str | Path) -> Path:
        """Write `comparison.json`, and each `report.json` into its own folder; return the path of `comparison.json`.

        A report of a single model from an earlier diagnosis in the folder is removed, to avoid confusion.
        """
        for name in ("report.json", "report.html"):
            Path(folder, name).unlink(missing_ok=True)
        for name, report in self.folders().items():
            report.save(Path(folder) / name)
        return super().save(folder)

    @property
    def verdict(self) -> str:
        """Number of the checkpoints with artifact tokens."""
        return f"{sum(row['bimodal'] for row in self.rows)} of {len(self.rows)} checkpoints have artifact tokens."

    def summary(self) -> str:
        """Return the table, followed by the verdict on each checkpoint."""
        verdicts = [f"{name}: {report.verdict}" for name, report in self.reports.items()]
        return "\n".join([self.table(), *verdicts, *filter(None, [self.conclusion])])

    def table(self) -> str:
        """Return the rows as a Markdown table."""
        return markdown_table(self.table_rows())

    def table_rows(self) -> list[list[object]]:
        """Return the names of the columns, and one row per checkpoint."""
        names = ["block" if name == "layer" else name for name in self.rows[0]]
        return [names, *(list(row.values()) for row in self.rows)]


def compare_checkpoints(
    models: Sequence[TokenReader | nn.Module | str | Path],
    images: object,
    *,
    throughput_rounds: int = 5,
    processor: ImageProcessor | None = None,
    device: str | torch.device = "auto",
    **settings: Any,
) -> ComparisonReport:
    """Diagnose several checkpoints, e.g. with 0, 1, 2, 4 and 8 registers, and tabulate results, cost and speed.

    Args:
        models: Models, their names, or readers; see `open_model`. All of them are in memory at once, because their
            speed is measured in alternation.
        images: Images as for `diagnose`.
        throughput_rounds: Number of passes over 8 images per model, in alternation, after one pass to warm up; the
            median is reported.
        processor: Image processor for all models; default the own one of each.
        device: Device to compute on; see `open_model`.
        settings: Keyword arguments of `diagnose`.

    Raises:
        ValueError: Fewer than two models, or the same one twice.
        UnknownProcessorError: No image processor is given, and a model has none.
    """
    if len(models) < 2:
        raise ValueError(f"Got {len(models)} models, but a comparison needs at least two different checkpoints.")
    names = distinct_names(models)
    readers = {name: open_model(model, device=device, processor=processor) for name, model in zip(names, models)}
    reports: dict[str, ArtifactReport] = {}
    numbers: list[ImageNumbers] = []  # of the first and of the last model
    for name, reader in readers.items():
        reports[name], found = measure(reader, images, **settings)
        numbers = [*numbers[:1], found]
    speeds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(throughput_rounds + 1):
        for name, reader in readers.items():
            start = time.perf_counter()
            reader.read(torch.zeros(8, 3, *reader.description.image_size), site="patch_embedding")
            speeds[name].append(8 / (time.perf_counter() - start))
    first = next(iter(reports.values()))
    rows = [
        {"model": name, **_row(report, first), "images_per_second": float(np.median(speeds[name][1:]))}
        for name, report in reports.items()
    ]
    threads = {"threads": torch.get_num_threads(), "throughput_batch": 8, "throughput_rounds": throughput_rounds}
    attention = compare_attention(list(readers.values())[-1], *numbers)
    return ComparisonReport(
        rows=rows,
        reports=reports,
        settings=first.settings | threads,
        attention=attention,
        differences=compare_findings((first, list(reports.values())[-1]), numbers),
    )


def compare_attention(reader: TokenReader, first: ImageNumbers, last: ImageNumbers) -> Record | None:
    """Compare the attention in the last quarter of the blocks of the first and of the last model on the same images.

    Args:
        reader: Reader of the last model.
        first: Numbers of the first model, whose outliers are the set for both models.
        last: Numbers of the last model.

    Returns:
        None if the first model has no outliers, images or grids differ, or attention cannot be read.
    """
    patch = reader.description.patch_size
    patches = (last.pixels.shape[2] // patch[0]) * (last.pixels.shape[3] // patch[1])
    if first.outliers is None or first.outliers.shape[1] != patches or first.ids != last.ids:
        return None
    if not reader.reads_attention or "top.mass" not in first.values:
        return None
    sinks, start = SinkReader(reader, last.ids, patches, first.outliers), 0
    for pixels in last.pixels.split(min(32, sinks.max_batch)):
        reader.read_many(pixels, {"v": "all", "attention": "all"}, reduce=sinks.reductions(start))
        start += len(pixels)
    masses: dict[str, NDArray[np.float64]] = {}
    for place, values in (("first", first.values), ("last", image_numbers(sinks.numbers))):
        for name in ("outliers", "registers"):
            masses[f"{name}, {place}"] = values.get(f"{name}.mass", np.zeros(len(first.ids)))
    means = {name: float(mass.mean()) for name, mass in masses.items()}
    found: Record = {"num_images": len(first.ids), "means": means}
    for name in ("outliers", "registers"):
        found[name] = _difference(masses[f"{name}, first"], masses[f"{name}, last"])
    return found


def compare_findings(reports: tuple[ArtifactReport, ArtifactReport], numbers: Sequence[ImageNumbers]) -> list[Record]:
    """Return name, difference (last minus first) and 95 % interval of those of the six numbers that have a difference.

    The interval is None for the position, which is one number for all images, and if the images differ.
    """
    found, (first, last) = [], numbers
    for one, other in zip(*map(findings, reports)):
        if one.key is None or other.key is None or one.number is None or other.number is None:
            continue
        record: Record = {"name": one.name, "difference": other.number - one.number, "interval": None}
        if first.ids == last.ids and one.key in first.values:
            record |= _difference(first.values[one.key], last.values[other.key])
        found.append(record)
    return found


def _difference(first: NDArray[np.float64], last: NDArray[np.float64]) -> Record:
    """Return the mean difference over images and its 95 % interval."""
    difference, interval = paired_difference(first[:, None], last[:, None], seed=0)
    return {"difference": difference, "interval": list(interval)}


def _row(report: ArtifactReport, first: ArtifactReport) -> Record:
    attention = report.attention["statistics"] if report.attention else {}
    return {
        "registers": report.model["num_register_tokens"],
        **{name: getattr(report, name) for name in ("bimodal", "layer", "outlier_share", "norm_ratio", "separation")},
        "cls_to_registers": attention.get("mass_on_registers", {}).get("mean"),
        "attention_entropy": attention.get("entropy_share", {}).get("mean"),
        "register_cosine": report.registers["cosine"] if report.registers else None,
        "effective_rank": report.patches["effective_rank"]["mean"],
        "parameters": report.model["parameters"],
        "gmacs": report.model["gmacs"],
        "gmacs_delta": report.model["gmacs"] / first.model["gmacs"] - 1,
    }
