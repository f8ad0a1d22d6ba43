"""Curves of a run, drawn from its metrics file."""

import contextlib
import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .maps import INK, LINE_COLORS, STYLE, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def metrics_lines(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Iterate over the lines of a `metrics.jsonl`, except those that were truncated by a crash or a full disk."""
    with Path(path).open(errors="replace") as file:
        while line := file.readline(2**20):  # a longer line is read in parts, so that no file fills the memory
            with contextlib.suppress(ValueError, RecursionError):
                content = json.loads(line)
                if isinstance(content, dict) and isinstance(content.get("step"), int):
                    yield content


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read the last 100,000 lines of a `metrics.jsonl`."""
    return list(deque(metrics_lines(path), maxlen=100_000))


# Panels of `curves_figure`: title, and keys of the metrics file with their names in the legend.
_CURVES: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "loss terms",
        {
            "loss": "sum",
            "dino_local_loss": "DINO local",
            "dino_global_loss": "DINO global",
            "ibot_loss": "iBOT",
            "koleo_loss": "KoLeo",
            "gram_loss": "Gram",
        },
    ),
    (
        "entropy of the targets (nats)",
        {
            "teacher_entropy": "one target",
            "teacher_marginal_entropy": "mean of the batch",
            "teacher_student_kl": "KL(teacher || student)",
        },
    ),
    ("accuracy on labeled images", {"eval_knn_10": "10-NN", "eval_linear": "linear"}),
    ("spread of CLS", {"feature_std": "std (1 = evenly spread)", "effective_rank": "effective rank"}),
    (
        "registers and outliers",
        {
            "register_cosine": "cosine between registers",
            "cls_to_register_attention": "attention of CLS to registers",
            "outlier_share": "outlier share",
        },
    ),
    ("images per second", {"images_per_second": "training"}),
)


def curves_figure(lines: Sequence[Mapping[str, Any]], *, num_prototypes: int | None = None) -> "Figure":
    """Draw the learning curves of a run.

    Args:
        lines: Lines of `metrics.jsonl`, as dictionaries with `step`.
        num_prototypes: Number of prototypes K; adds a line at ln K, the entropy of a uniform target.

    Raises:
        ValueError: No line has a value to draw.
    """
    import matplotlib
    from matplotlib.figure import Figure

    drawn = [
        (title, {key: [(line["step"], line[key]) for line in lines if key in line] for key in names}, names)
        for title, names in _CURVES
    ]
    drawn = [entry for entry in drawn if any(entry[1].values())]
    if not drawn:
        raise ValueError(f"None of the {len(lines)} lines has a value to draw. Expected keys such as 'loss'.")
    with matplotlib.rc_context(STYLE | {"axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.5}):
        rows = -(-len(drawn) // 3)
        figure = Figure(figsize=(10.5, 2.6 * rows))
        # Constrained layout is slow, because it draws everything several times.
        figure.subplots_adjust(0.05, 0.2 / rows, 0.97, 1 - 0.1 / rows, wspace=0.3, hspace=0.36)
        for index, (title, curves, names) in enumerate(drawn):
            axis = figure.add_subplot(rows, 3, index + 1)
            axis.set_title(title, color=INK)
            for color, (key, points) in zip(LINE_COLORS, curves.items(), strict=False):
                target = axis
                if key == "effective_rank" and curves["feature_std"]:
                    target = axis.twinx()
                    target.grid(False)
                    axis.plot([], [], color=color, lw=1.2, label=f"{names[key]} (right)")
                if points:
                    steps, values = zip(*points, strict=True)
                    target.plot(steps, values, color=color, lw=1.2, label=names[key], marker="o", ms=2)
            if "entropy" in title and num_prototypes:
                axis.axhline(math.log(num_prototypes), color=INK, lw=0.8, ls="--", label="ln K")
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=6, framealpha=0.6, edgecolor="none")
            axis.set_xlabel("step")
    return figure


CURVES = "curves.png"


def draw_finetuning_curves(folder: Path, *, shown: Sequence[str]) -> Path | None:
    """Plot the losses, the metrics `shown` and the learning rate of `metrics.jsonl`; None if nothing was logged."""
    from matplotlib.figure import Figure

    path = folder / "metrics.jsonl"
    lines = read_metrics(path) if path.is_file() else []
    panels: list[tuple[str, dict[str, str]]] = [("loss", {"loss": "training", "eval_loss": "validation"})]
    panels += [(name, {f"eval_{name}": "validation"}) for name in shown]
    panels += [("learning rate", {"learning_rate": "maximum over groups"})]
    curves = [(title, {label: _points(lines, key) for key, label in keys.items()}) for title, keys in panels]
    curves = [(title, drawn) for title, drawn in curves if any(drawn.values())]
    if not curves:
        return None
    figure = Figure(figsize=(3.6 * len(curves), 3.0))
    # Constrained layout would draw everything several times, which is slow.
    figure.subplots_adjust(0.16 / len(curves), 0.16, 1 - 0.06 / len(curves), 0.9, wspace=0.3)
    for axis, (title, drawn) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        for label, points in drawn.items():
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.3, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(color="#dddddd", lw=0.5)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7)
    target = folder / CURVES
    save_figure(figure, target)
    return target


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return (step, value) pairs of a metric, the first value of each step.

    A second value at the last step belongs to the best checkpoint, which is evaluated after the training.
    """
    values: dict[int, float] = {}
    for line in lines:
        if key in line:
            values.setdefault(line["step"], line[key])
    return list(values.items())


def draw_curves(folder: str | Path, *, num_prototypes: int | None = None) -> Path | None:
    """Draw `curves.png` of a run from its `metrics.jsonl`; return None if the run was too short to log a loss."""
    from .maps import save_figure

    lines = read_metrics(Path(folder) / "metrics.jsonl")
    if not any("loss" in line for line in lines):
        return None
    path = Path(folder) / "curves.png"
    save_figure(curves_figure(lines, num_prototypes=num_prototypes), path)
    return path
