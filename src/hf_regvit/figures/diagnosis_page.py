"""Self-contained HTML page of an `ArtifactReport`: findings, example images, positions, and method.

Maps have one pixel per patch and are enlarged by the browser without smoothing, so that the page shows exactly the
measured values.
"""

import csv
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..diagnosis.comparison import ComparisonReport
from ..diagnosis.findings import findings, next_step
from ..diagnosis.report import ArtifactReport
from ..diagnosis.retrofit import RetrofitResult
from ..models.results import Record
from ..models.saving import whole_file
from .maps import (
    INK,
    STYLE,
    TokenMaps,
    attention_limits,
    color_image,
    colored,
    distinct_registers,
    layer_norm_figure,
    norm_ticks,
    pca_colors,
    stretch,
)
from .pages import cell_text, chart, data_url, number_text, render, write_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito colors, which color-blind readers can tell apart. Orange always means outlier, blue normal, green register.
_OUTLIER, _NORMAL, _REGISTER = "#d55e00", "#0072b2", "#009e73"
_NAMES = {"layers": "blocks", "cutoff": "cut-off"}
_CONTROL_NAMES = {"cls_cosine": "cosine of CLS", "patch_cosine": "cosine of patches", "knn": "5-NN accuracy"}


def write_report(report: ArtifactReport, path: str | Path, **names: str) -> Path:
    """Write the report page, and `blocks.csv` with the numbers of every block beside it.

    Args:
        report: Result of `diagnose` or `ArtifactReport.load`.
        path: HTML file to write; its folder is created if needed.
        **names: Names of model and data in the command for the next step; see `next_step`.

    Returns:
        Path of the HTML file.
    """
    path = write_page(report_page(report, **names), path)
    with whole_file(path.with_name("blocks.csv")) as unfinished, unfinished.open("w", newline="") as file:
        csv.writer(file).writerows(_blocks(report))
    return path


def report_page(report: ArtifactReport, **names: str) -> str:
    """Return the report page as HTML text; see `write_report`."""
    sentence, command = next_step(report, **names)
    return render(
        "diagnosis.html",
        report=report,
        findings=findings(report),
        next_step=sentence,
        command=f"regvit {shlex.join(command)}",
        blocks=[[cell_text(value) for value in row] for row in _blocks(report)],
        charts=_charts(report),
        neighbors=report.neighbours,
        examples=[{"id": example["id"], "panels": _example(example, report)} for example in report.examples],
        positions=_positions(report),
        controls=_controls(report.controls or {}),
        settings=[
            [_NAMES.get(key, key.replace("_", " ")), cell_text(value)] for key, value in report.settings.items()
        ],
        skipped=[list(entry.values()) for entry in report.skipped[:50]],
    )


def write_comparison(report: ComparisonReport, path: str | Path) -> Path:
    """Write a page that compares the six numbers of several models, and the attention of the first and the last."""
    found = {name: findings(each) for name, each in report.reports.items()}
    changes = {each["name"]: _change(each) for each in report.differences}
    measured, attention = report.attention or {}, []
    for name in ("outliers", "registers") if measured else ():
        first, last = (f"{measured['means'][f'{name}, {place}']:.1%}" for place in ("first", "last"))
        attention.append([name, first, last, *_change(measured[name])])
    page = render(
        "comparison.html",
        report=report,
        models=dict(zip(found, report.folders())),
        numbers=[
            [row[0].name, *(each.value for each in row), *changes.get(row[0].name, ("", ""))]
            for row in zip(*found.values())
        ],
        attention=attention,
        examples=_before_after(*list(report.reports.values())[:: len(found) - 1]),
    )
    return write_page(page, path)


def _before_after(first: ArtifactReport, last: ArtifactReport) -> list[Record]:
    """Return norms and attention of CLS of two models for the example images that both have, norms on one scale."""
    shown = []
    for pair in zip(first.examples, last.examples):
        if pair[0]["id"] == pair[1]["id"]:
            both, sides = torch.cat([_logs(one).flatten() for one in pair]), ("first model", "last model")
            norms = [
                _norm_map(one, report, both, f"norm, {side}") for one, report, side in zip(pair, (first, last), sides)
            ]
            attention = [
                attention_panel(one["attention_cls"], f"CLS attention, {side}")
                for one, side in zip(pair, sides) if one["attention_cls"] is not None
            ]  # fmt: skip
            shown.append({"id": pair[0]["id"], "panels": [_picture(pair[0], first), *norms, *attention]})
    return shown


def write_retrofit(
    result: RetrofitResult,
    before: Sequence[TokenMaps],
    after: Sequence[TokenMaps],
    path: str | Path,
    *,
    command: Sequence[str],
) -> Path:
    """Write the page of a retrofit: verdict, next command, and maps of the test images before and after.

    Args:
        result: Result of `retrofit`.
        before: Maps of its example images in the source.
        after: Maps of the same images in the result.
        path: HTML file to write.
        command: Words of the next command.
    """
    head, *rows = result.report.table_rows()
    examples = [
        {
            "id": f"test image {i}",
            "panels": [image_panel(result.transform.picture(pixels)), *_retrofit_maps(*sides)],
        }
        for i, (pixels, *sides) in enumerate(zip(result.examples, before, after), 1)
    ]
    page = render("retrofit.html", report=result.report, command=f"regvit {shlex.join(command)}", head=head,
                  rows=rows, examples=examples)  # fmt: skip
    return write_page(page, path)


@dataclass(frozen=True)
class Panel:
    """Image or map for the template.

    Args:
        label: Name below the panel.
        note: Short text below the name.
        image: Data URL.
        grid: (rows, columns) of the cells of a map or of the pixels of an image.
        kind: "pixels" for a map, whose cells are not smoothed, or "image".
        outliers: (row, column) of each cell that gets a frame.
    """

    label: str
    note: str
    image: str
    grid: Sequence[int]
    kind: str = "pixels"
    outliers: Sequence[Sequence[int]] = ()


def image_panel(image: Image.Image) -> Panel:
    """Return an image for the template."""
    url = data_url(image, "JPEG")
    return Panel("image", "as the model received it", url, (image.height, image.width), kind="image")


def _retrofit_maps(before: TokenMaps, after: TokenMaps) -> list[Panel]:
    """Return norms on one scale, attention of the registers (equal ones once), one PCA for both, attention of CLS."""
    sides = {"before": before, "after": after}
    logs = torch.stack([maps.norms for maps in sides.values()]).clamp(min=1e-12).log()
    shades = stretch(logs, torch.quantile(logs, 0.01).item(), logs.max().item())
    colors = pca_colors(torch.stack([maps.patch_tokens for maps in sides.values()]))
    norms, pca, cls = [], [], []
    for (side, maps), shade, image in zip(sides.items(), shades, colors):
        norms.append(map_panel(shade, "viridis", f"norm {side}", f"{maps.norms.min():.3g} to {maps.norms.max():.3g}"))
        pca.append(Panel(f"PCA {side}", "one PCA for both", data_url(color_image(image)), shade.shape))
        first = len(maps.attention) - len(maps.registers)
        cls += [attention_panel(values, f"CLS attention {side}") for values in maps.attention[:first]]
    registers = distinct_registers(after.attention[len(after.attention) - len(after.registers) :])
    return [*norms, *(attention_panel(values, f"{name} attention") for name, values in registers), *pca, *cls]


def _change(found: Record) -> tuple[str, str]:
    """Return a difference and its interval as text: percentage points of shares, else plain numbers."""
    plain = found.get("name") in ("use of this attention", "position in the output")
    words = [f"{value:+.2f}" if plain else f"{100 * value:+.1f} points" for value in
             (found["difference"], *(found["interval"] or ()))]  # fmt: skip
    if found.get("name") == "use of this attention":
        words[0] += " heads per image"
    return words[0], " to ".join(word.removesuffix(" points") for word in words[1:])


# --- Charts


def _charts(report: ArtifactReport) -> Record:
    import matplotlib

    style = STYLE | {"axes.edgecolor": INK, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        return {
            "blocks": chart(layer_norm_figure(report), "patch norms of every block"),
            "histograms": {
                record["layer"]: chart(_histogram(record, report), f"patch norms of block {record['layer']}")
                for record in report.layers
            },
            "position": report.position and chart(_position(report.position), "position in the tokens of every block"),
            "neighbors": report.neighbours["auroc"] is not None
            and chart(_densities(report.neighbours), "neighbor similarity of outliers and other patches"),
        }


def _axes(height: float) -> tuple["Figure", "Axes"]:
    """Return a figure with one pair of axes, laid out in inches: constrained layout would draw everything twice."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, height))
    return figure, figure.add_axes((0.55 / 4.6, 0.4 / height, 3.95 / 4.6, 1 - 0.65 / height))


def _histogram(record: Record, report: ArtifactReport) -> "Figure":
    """Draw the shares of the patch norms of one block. On a linear axis 2% would be invisible beside 98%."""
    from matplotlib.ticker import NullLocator

    figure, axis = _axes(2.6)
    edges, counts = np.asarray(report.histogram_edges), np.asarray(record["histogram"], dtype=float)
    shares = np.where(counts, counts, np.nan) / counts.sum()
    floor = 10.0 ** math.floor(math.log10(1 / max(counts.sum(), 10)))  # at most one token
    high = record["bimodal"] & (np.sqrt(edges[:-1] * edges[1:]) > record["cutoff"])
    for color, kept in ((_NORMAL, ~high), (_OUTLIER, high)):
        axis.stairs(np.where(kept, shares, np.nan), edges, baseline=floor, fill=True, color=color)
    axis.set(xscale="log", yscale="log", xlim=(edges[0], edges[-1]), ylim=(floor, 1), xlabel="norm of patch tokens")
    norm_ticks(axis)
    axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(axis="y", color=INK, alpha=0.12, lw=0.6)
    axis.set_axisbelow(True)
    if record["bimodal"]:
        axis.axvline(record["cutoff"], color=_OUTLIER, lw=1, ls="--")
        axis.annotate(f"cut-off {record['cutoff']:.4g}", (record["cutoff"], 0.6), xytext=(4, 0), color=_OUTLIER,
                      textcoords="offset points", va="top")  # fmt: skip
    for key, color, name in (("cls_norm", INK, "CLS"), ("register_norms", _REGISTER, "register")):
        for norm in np.atleast_1d(record.get(key, [])):
            axis.plot(np.clip(norm, edges[0], edges[-1]), 1.02, transform=axis.get_xaxis_transform(), clip_on=False,
                      marker="v", color=color, ms=5, mew=0, gid=f"hover:{name}: {norm:.4g}")  # fmt: skip
    modes = "two modes" if record["bimodal"] else "one mode"
    title = f"block {record['layer']}: {modes}, {record['share']:.2%} of the tokens above the cut-off"
    axis.set_title(title, loc="left", color=INK, pad=10)
    return figure


def _position(found: Record) -> "Figure":
    """Draw the R2 of the position per layer, with the permuted control."""
    figure, axis = _axes(2.3)
    for key, color, name in (("r2", _NORMAL, "position"), ("r2_permuted", INK, "permuted positions")):
        axis.plot(found["layers"], found[key], color=color, marker="o", ms=3, label=name)
    axis.set(xlabel="block", ylim=(min(-0.1, *found["r2_permuted"]), 1.05))
    axis.legend(loc="upper right", frameon=False)
    return figure


def _densities(neighbors: Record) -> "Figure":
    """Draw the similarity to the neighbors, over the occupied bins only, which are often few."""
    figure, axis = _axes(2.3)
    edges = np.asarray(neighbors["histogram_edges"], dtype=float)
    counts = {kind: np.asarray(neighbors[f"histogram_{kind}"], dtype=float) for kind in ("normal", "outlier")}
    used = np.flatnonzero(sum(counts.values()))
    for kind, color, name in (("normal", _NORMAL, "normal patches"), ("outlier", _OUTLIER, "outliers")):
        shares = counts[kind] / max(counts[kind].sum(), 1)
        axis.stairs(shares, edges, fill=True, color=color, alpha=0.3, label=name)
        axis.stairs(shares, edges, color=color, lw=1)
    axis.set(xlim=(edges[max(used[0] - 1, 0)], edges[min(used[-1] + 2, len(edges) - 1)]), ylim=(0, None),
             xlabel="mean cosine to neighbors", ylabel="share of the patches")  # fmt: skip
    axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.legend(loc="upper left", frameon=False)
    return figure


# --- Maps


def _blocks(report: ArtifactReport) -> list[list[object]]:
    """Return the numbers of every block, on which the decision rests, with a head."""
    names = {"layer": "block", "median": "median norm", "max": "largest norm", "cutoff": "cut-off",
             "share": "share above it", "separation": "separation", "bimodal": "two modes"}  # fmt: skip
    return [list(names.values()), *([record[name] for name in names] for record in report.layers)]


def map_panel(shade: Tensor, colors: str, label: str, note: str) -> Panel:
    """Return a map for the template; `shade` is in [0, 1]."""
    return Panel(label, note, data_url(colored(shade, colors)), shade.shape)


def _example(example: Record, report: ArtifactReport) -> list[Panel]:
    """Return the image, its norms, and the attention of CLS (if any) and of each register."""
    beyond = [
        map_panel(stretch(torch.tensor(values, dtype=torch.float64), 0, high), "viridis", label, note)
        for key, high, label, note in (
            ("repetition", 1.0, "repetition", "cosine in other images"),
            ("received", 10.0, "received attention", "bright: 10 times uniform"),
        )
        if (values := example.get(key)) is not None
    ]
    registers = distinct_registers(torch.tensor(example["attention_registers"], dtype=torch.float64))
    maps = [] if example["attention_cls"] is None else [("CLS", example["attention_cls"])]
    return [
        _picture(example, report),
        _norm_map(example, report, _logs(example)),
        *beyond,
        *(attention_panel(values, f"{name} attention") for name, values in [*maps, *registers]),
    ]


def _logs(example: Record) -> Tensor:
    return torch.tensor(example["norms"], dtype=torch.float64).clamp(min=1e-12).log()


def _outliers(example: Record, report: ArtifactReport) -> list[list[int]]:
    return (_logs(example).exp() > report.cutoff).nonzero().tolist() if report.bimodal else []


def _picture(example: Record, report: ArtifactReport) -> Panel:
    """Return the image with a frame around each outlier."""
    note = f"{example['num_outliers']} outliers" if report.bimodal else "no distinct outliers"
    url = f"data:image/jpeg;base64,{example['picture']}"
    return Panel("image", note, url, example["grid"], kind="image", outliers=_outliers(example, report))


def _norm_map(example: Record, report: ArtifactReport, scale: Tensor, label: str = "norm") -> Panel:
    """Return the norms in the range of `scale`, logarithms of norms."""
    logs = _logs(example)
    low, high = torch.quantile(scale, 0.01).item(), scale.max().item()
    note = f"block {report.layer}, {logs.min().exp():.3g} to {logs.max().exp():.3g}"
    return replace(map_panel(stretch(logs, low, high), "viridis", label, note), outliers=_outliers(example, report))


def attention_panel(values: Sequence[Sequence[float]] | Tensor, label: str) -> Panel:
    """Return an attention map for the template, on a scale of its own."""
    attention = torch.as_tensor(values, dtype=torch.float64)
    shade = stretch(attention, *attention_limits(attention))
    return map_panel(shade, "magma", label, f"{attention.sum():.0%} on patches")


def _positions(report: ArtifactReport) -> list[Panel]:
    """Return where the outliers are, and the mean attention of CLS (if any)."""
    share = torch.tensor(report.outliers["position_map"], dtype=torch.float64)
    most = f"0 to {share.max():.1%} of the images"
    panels = [map_panel(stretch(share, 0, share.max().item()), "viridis", "outlier share per cell", most)]
    if report.attention is not None:
        mean = torch.tensor(report.attention["mean_map"], dtype=torch.float64)
        note = f"{mean.sum():.0%} on patches"
        panels.append(map_panel(stretch(mean, 0, mean.max().item()), "magma", "mean attention of CLS", note))
    return panels


# --- Tables


def _controls(controls: Record) -> tuple[list[str], list[list[str]]]:
    kinds = {kind: entry for kind, entry in controls.items() if isinstance(entry, Mapping)}
    names = {key: name for key, name in _CONTROL_NAMES.items() if any(e.get(key) is not None for e in kinds.values())}
    rows = [[kind, *(number_text(entry.get(key), 4) for key in names)] for kind, entry in kinds.items()]
    rows = [row for row in rows if set(row[1:]) != {"-"}]  # the unmodified model has no cosines with itself
    return ["registers", *names.values()], rows
