"""Comparison of several checkpoints, e.g. with 0, 1, 2, 4 and 8 registers: diagnoses on the same images in a table."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ..models.families import describe_model
from ..models.loading import load_model, short_names
from ..models.tokens import read_many
from .diagnose import diagnose
from .report import ArtifactReport, Result, html_table, markdown_table


@dataclass(frozen=True, repr=False)
class ComparisonReport(Result):
    """Diagnoses of several checkpoints on the same images: one table row each, and the full reports."""

    rows: list[dict[str, Any]]
    reports: dict[str, ArtifactReport]
    settings: dict[str, Any]

    file_name: ClassVar = "comparison.json"

    def to_dict(self) -> dict[str, Any]:
        """Return rows and settings; the reports are saved separately."""
        return {"rows": self.rows, "settings": self.settings}

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
        return "\n".join([self.table(), *(f"{name}: {report.verdict}" for name, report in self.reports.items())])

    def table(self) -> str:
        """Return the rows as a Markdown table."""
        return markdown_table(self._cells())

    def _repr_html_(self) -> str:
        return html_table(self._cells())

    def _cells(self) -> list[list[Any]]:
        return [list(self.rows[0]), *(list(row.values()) for row in self.rows)]


def compare_checkpoints(
    names: Sequence[str | Path],
    images: Any,
    *,
    throughput_rounds: int = 5,
    device: str | torch.device | None = None,
    **settings: Any,
) -> ComparisonReport:
    """Diagnose several checkpoints, e.g. with 0, 1, 2, 4 and 8 registers, and tabulate results, cost and speed.

    Args:
        names: Folders or Hub ids, as for `load_model`. All models are in memory at once, because their speed is
            measured in alternation.
        images: Images as for `diagnose`.
        throughput_rounds: Number of passes over 8 images per model, in alternation, after one pass to warm up; the
            median is reported.
        device: Device to compute on; default the CPU.
        settings: Keyword arguments of `diagnose`.

    Raises:
        ValueError: Fewer than two names, or the same one twice.
    """
    called = short_names(names)
    if len(set(called)) < len(names) or len(names) < 2:
        raise ValueError(f"names={[str(name) for name in names]} must contain at least two different checkpoints.")
    loaded = {short: load_model(name, device=device) for short, name in zip(called, names)}
    reports = {
        name: diagnose(model, images, processor=processor, **settings) for name, (model, processor) in loaded.items()
    }
    speeds: dict[str, list[float]] = {name: [] for name in loaded}
    for _ in range(throughput_rounds + 1):
        for name, (model, _) in loaded.items():
            height, width = describe_model(model).image_size
            start = time.perf_counter()
            read_many(model, torch.zeros(8, 3, height, width), {"patch_embedding": (0,)})
            speeds[name].append(8 / (time.perf_counter() - start))
    baseline = reports[called[0]].model["gmacs"]
    rows = [
        {"model": name, **_row(report, baseline), "images_per_second": float(np.median(speeds[name][1:]))}
        for name, report in reports.items()
    ]
    threads = {"threads": torch.get_num_threads(), "throughput_batch": 8, "throughput_rounds": throughput_rounds}
    return ComparisonReport(rows=rows, reports=reports, settings=next(iter(reports.values())).settings | threads)


def _row(report: ArtifactReport, baseline: float) -> dict[str, Any]:
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
        "gmacs_delta": report.model["gmacs"] / baseline - 1,
    }
