"""Figures of masks, depth maps and confusion matrices."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from ..data.maps import IGNORE, Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def confusion_figure(matrix: Tensor, names: Sequence[str]) -> "Figure":
    """Plot the shares of each true class as shades of blue, and list the most frequent confusions by name.

    Args:
        matrix: (C, C) counts; rows are true classes.
        names: C class names; shown at the axes for up to 40 classes.
    """
    from matplotlib.figure import Figure

    counts = matrix.double().numpy()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(max(4.0, 0.22 * len(names) + 2), 11.0)
    width = size + 3.6
    figure = Figure(figsize=(width, size))
    names_at_axes = 1.3 if len(names) <= 40 else 0.6  # inches
    figure.subplots_adjust(names_at_axes / width, names_at_axes / size, 0.98, 1 - 0.4 / size, wspace=0.05)
    axis, beside = figure.subplots(1, 2, width_ratios=[size, 3.2])
    shown = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(shown, ax=axis, shrink=0.6, label="share of the true class")
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    if len(names) <= 40:
        short = [name if len(name) <= 18 else f"{name[:17]}…" for name in names]
        axis.set_xticks(range(len(names)), short, rotation=90, fontsize=7, parse_math=False)
        axis.set_yticks(range(len(names)), short, fontsize=7, parse_math=False)
    if len(names) <= 12:
        for row, column in np.ndindex(*counts.shape):
            if counts[row, column]:
                color = "white" if shares[row, column] > 0.5 else "black"
                axis.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=color, fontsize=7)
    off = counts - np.diag(np.diag(counts))
    worst = [divmod(int(place), len(names)) for place in np.argsort(-off, axis=None, kind="stable")[:15]]
    lines = [f"{off[row, column]:3.0f}  {names[row]} -> {names[column]}" for row, column in worst if off[row, column]]
    beside.axis("off")
    beside.set_title("most frequent confusions", fontsize=9, loc="left")
    # Class names are not formulas, even with dollar signs; matplotlib ignores `parse_math` in wrapped text.
    text = "\n".join(lines).replace("$", r"\$") or "none"
    beside.text(0, 1, text, va="top", fontsize=8, family="monospace", wrap=True)
    axis.set_title(f"{int(np.trace(counts))} of {int(counts.sum())} correct", fontsize=10)
    return figure


# ---- Panels ------------------------------------------------------------------------------------------------------

# Palette of Okabe and Ito, then Tol's "muted": distinguishable with every common kind of color blindness.
_COLORS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#332288", "#999933", "#882255",
    "#555555", "#117733", "#DDCC77", "#AA4499", "#88CCEE", "#CC6677",
)  # fmt: skip
_NOT_COUNTED = (255, 255, 255)


def class_colors(num_classes: int) -> Array:
    """Return (C, 3) uint8 colors; from the 17th class on the palette repeats, darker each time."""
    base = np.array([[int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in _COLORS])
    rounds = -(-num_classes // len(base))
    return np.concatenate([base * 0.65**i for i in range(rounds)])[:num_classes].round().astype(np.uint8)


def mask_figure(rows: Sequence[tuple[Image.Image, Array, Array]], names: Sequence[str]) -> "Figure":
    """Plot image, ground truth and prediction side by side, one image per row; ignored pixels are white.

    Args:
        rows: Image, (H, W) true and (H, W) predicted class ids of each row.
        names: Class names for the legend.
    """
    from matplotlib.patches import Patch

    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(names)] = class_colors(len(names))
    table[IGNORE] = _NOT_COUNTED
    figure, axes = _three_columns(rows)
    for beside, (_, truth, predicted) in zip(axes, rows):
        beside[1].imshow(table[truth], interpolation="nearest")
        beside[2].imshow(table[np.where(truth == IGNORE, IGNORE, predicted)], interpolation="nearest")
    present = sorted({int(value) for _, *maps in rows for one in maps for value in np.unique(one)} - {IGNORE})
    handles = [Patch(color=table[value] / 255, label=names[value]) for value in present[:32]]
    ncols = min(6, len(handles))
    below = figure.legend(handles=handles, loc="outside lower center", ncols=ncols, fontsize=8, frameon=False)
    for name in below.get_texts():
        name.set_parse_math(False)  # class names are not formulas, even with dollar signs
    return figure


def depth_figure(rows: Sequence[tuple[Image.Image, Array, Array]]) -> "Figure":
    """Plot image, ground truth and prediction side by side, one image per row; unmeasured pixels are white.

    Args:
        rows: Image, (H, W) true and (H, W) predicted depth of each row in meters; 0 is not measured. All depths share
            one color scale.
    """
    figure, axes = _three_columns(rows)
    known = np.concatenate([truth[truth > 0] for _, truth, _ in rows])
    low, high = np.quantile(known, [0.01, 0.99]).tolist() if known.size else (0.0, 1.0)
    for beside, (_, truth, predicted) in zip(axes, rows):
        for axis, values in ((beside[1], np.where(truth > 0, truth, np.nan)), (beside[2], predicted)):
            drawn = axis.imshow(values, cmap="cividis", vmin=low, vmax=high, interpolation="nearest")
    figure.colorbar(drawn, ax=axes, location="bottom", shrink=0.5, aspect=40, pad=0.02, label="meters")
    return figure


def _three_columns(rows: Sequence[tuple[Image.Image, Array, Array]]) -> tuple["Figure", np.ndarray]:
    from matplotlib.figure import Figure

    height = sum(3.0 * image.height / image.width for image, _, _ in rows)
    figure = Figure(figsize=(9.6, height + 0.9), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for axis, title in zip(axes[0], ("image", "ground truth", "prediction")):
        axis.set_title(title, fontsize=10)
    for beside, (image, _, _) in zip(axes, rows):
        beside[0].imshow(image)
        for axis in beside:
            axis.axis("off")
    return figure, axes
