"""Curves of a run, drawn from its metrics file."""

import contextlib
import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..models.results import Record
from .maps import INK, LINE_COLORS, STYLE, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def metrics_lines(path: str | os.PathLike) -> Iterator[Record]:
    """Iterate over the lines of a `metrics.jsonl`, except those that were truncated by a crash or a full disk."""
    with Path(path).open(errors="replace") as file:
        while line := file.readline(2**20):  # a longer line is read in parts, so that no file fills the memory
            with contextlib.suppress(ValueError, RecursionError):
                content = json.loads(line)
                if isinstance(content, dict) and isinstance(content.get("step"), int):
                    yield content


def read_metrics(path: str | os.PathLike) -> list[Record]:
    """Read the last 100,000 lines of a `metrics.jsonl`."""
    return list(deque(metrics_lines(path), maxlen=100_000))


Panels = Sequence[tuple[str, Mapping[str, str]]]  # title, and keys of the metrics file with their names in the legend

_PRETRAINING: Panels = (
    (
        "loss terms",
        {
            "loss": "sum",
            "dino_local_loss": "DINO local",
            "dino_global_loss": "DINO global",
            "ibot_loss": "iBOT",
            "ibot_visible_loss": "iBOT, visible patches",
            "koleo_loss": "KoLeo",
            "gram_loss": "Gram",
            "paka_loss": "PaKA",
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
    (
        "teachers",
        {
            "cls_loss": "loss of CLS",
            "patch_loss": "loss of patches",
            "cls_cosine": "cosine of CLS",
            "patch_cosine": "cosine of patches",
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


CURVES = "curves.png"


def curves_figure(
    lines: Sequence[Mapping[str, float]], panels: Panels = _PRETRAINING, *, num_prototypes: int | None = None
) -> "Figure":
    """Draw the curves of a run, and leave out panels without values.

    Args:
        lines: Lines of `metrics.jsonl`, as dictionaries with `step`.
        panels: Panels; default those of pretraining.
        num_prototypes: Number of prototypes K; adds a line at ln K, the entropy of a uniform target.

    Raises:
        ValueError: No line has a value to draw.
    """
    import matplotlib
    from matplotlib.figure import Figure

    drawn = [(title, {key: _points(lines, key) for key in names}, names) for title, names in panels]
    drawn = [entry for entry in drawn if any(entry[1].values())]
    if not drawn:
        raise ValueError(f"None of the {len(lines)} lines has a value to draw. Expected keys such as 'loss'.")
    with matplotlib.rc_context(STYLE | {"axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.5}):
        rows, columns = -(-len(drawn) // 3), min(len(drawn), 3)
        figure = Figure(figsize=(3.5 * columns, 2.6 * rows))
        # Constrained layout is slow, because it draws everything several times.
        left, right = 0.15 / columns, 1 - 0.09 / columns
        figure.subplots_adjust(left, 0.2 / rows, right, 1 - 0.1 / rows, wspace=0.3, hspace=0.36)
        for index, (title, curves, names) in enumerate(drawn):
            axis = figure.add_subplot(rows, columns, index + 1)
            axis.set_title(title, color=INK)
            for color, (key, points) in zip(LINE_COLORS, curves.items(), strict=False):
                target = axis
                if key == "effective_rank" and curves["feature_std"]:
                    target = axis.twinx()
                    target.grid(False)
                    axis.plot([], [], color=color, lw=1.2, label=f"{names[key]} (right)")
                if points:
                    target.plot(
                        list(points), list(points.values()), color=color, lw=1.2, label=names[key], marker="o", ms=2
                    )
            if "entropy" in title and num_prototypes:
                axis.axhline(math.log(num_prototypes), color=INK, lw=0.8, ls="--", label="ln K")
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=6, framealpha=0.6, edgecolor="none")
            axis.set_xlabel("step")
    return figure


def _points(lines: Sequence[Mapping[str, float]], key: str) -> dict[float, float]:
    """Return the first value of a metric at each step.

    A second value at the last step belongs to the best checkpoint, which is evaluated after the training.
    """
    values: dict[float, float] = {}
    for line in lines:
        if key in line:
            values.setdefault(line["step"], line[key])
    return values


def draw_curves(folder: Path, panels: Panels = _PRETRAINING, *, num_prototypes: int | None = None) -> Path | None:
    """Draw `curves.png` of a run from its `metrics.jsonl`; return None if the run was too short to log a value."""
    path = folder / "metrics.jsonl"
    lines = read_metrics(path) if path.is_file() else []
    if not any(key in line for line in lines for _, names in panels for key in names):
        return None
    save_figure(curves_figure(lines, panels, num_prototypes=num_prototypes), folder / CURVES)
    return folder / CURVES


def draw_finetuning_curves(folder: Path, *, shown: Sequence[str]) -> Path | None:
    """Draw the losses, the metrics `shown` and the learning rate as `draw_curves` does."""
    panels = [("loss", {"loss": "training", "eval_loss": "validation"})]
    panels += [(name, {f"eval_{name}": "validation"}) for name in shown]
    return draw_curves(folder, [*panels, ("learning rate", {"learning_rate": "maximum over groups"})])
