"""Comparison of several checkpoints, e.g. with 0, 1, 2, 4 and 8 registers: diagnoses on the same images in a table."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models.families import describe_model
from ..models.loading import load_model, short_names
from ..models.tokens import read_many
from .diagnose import diagnose
from .report import ArtifactReport


@dataclass(frozen=True)
class ComparisonReport:
    """Diagnoses of several checkpoints on the same images: one table row each, and the full reports."""

    rows: list[dict[str, Any]]
    reports: dict[str, ArtifactReport]
    settings: dict[str, Any]

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
        path = Path(folder) / "comparison.json"
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return path

    def summary(self) -> str:
        """Return the table, followed by the verdict on each checkpoint."""
        return "\n".join([self.table(), *(f"{name}: {report.verdict}" for name, report in self.reports.items())])

    def table(self) -> str:
        """Return the rows as a Markdown table."""
        names = list(self.rows[0])
        lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
        for row in self.rows:
            lines.append(f"| {' | '.join(_cell(row[name]) for name in names)} |")
        return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


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
    rows = []
    for name, report in reports.items():
        attention = report.attention["statistics"] if report.attention else {}
        rows.append(
            {
                "model": name,
                "registers": report.model["num_register_tokens"],
                "bimodal": report.bimodal,
                "layer": report.layer,
                "outlier_share": report.outlier_share,
                "norm_ratio": report.norm_ratio,
                "separation": report.separation,
                "cls_to_registers": attention.get("mass_on_registers", {}).get("mean"),
                "attention_entropy": attention.get("entropy_share", {}).get("mean"),
                "register_cosine": report.registers["cosine"] if report.registers else None,
                "effective_rank": report.patches["effective_rank"]["mean"],
                "parameters": report.model["parameters"],
                "gmacs": report.model["gmacs"],
                "gmacs_delta": report.model["gmacs"] / baseline - 1,
                "images_per_second": float(np.median(speeds[name][1:])),
            }
        )
    threads = {"threads": torch.get_num_threads(), "throughput_batch": 8, "throughput_rounds": throughput_rounds}
    return ComparisonReport(rows=rows, reports=reports, settings=next(iter(reports.values())).settings | threads)
