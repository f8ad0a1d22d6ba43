"""Self-contained HTML page of an `ArtifactReport`: findings, example images, positions, and method.

The page loads nothing from outside: charts are inline SVG, images are embedded, and the only script moves the block
slider. Maps are drawn with one pixel per patch and enlarged by the browser without smoothing, so that the page shows
exactly what was measured.
"""

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..diagnosis.report import ArtifactReport

# Okabe-Ito colors, which color-blind readers can tell apart. Orange always means outlier, blue normal, green register.
_OUTLIER, _NORMAL, _REGISTER, _INK, _SOFT = "#d55e00", "#0072b2", "#009e73", "#222", "#6b6b6b"


def write_report(report: ArtifactReport, path: str | Path) -> Path:
    """Write the report page.

    Args:
        report: Result of `diagnose` or `ArtifactReport.load`.
        path: HTML file to write; its folder is created if needed.

    Returns:
        Path of the HTML file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report_page(report), encoding="utf-8")
    return path


def report_page(report: ArtifactReport) -> str:
    """Return the report page as HTML text."""
    name = html.escape(str(report.model["name"]))
    sections = [
        _head(report),
        _section("Norms by block", _NORMS_TEXT, _norms(report)),
        _section("Example images", _IMAGES_TEXT, _pictures(report)),
        _section("Positions of the outliers", _places_text(report), _places(report)),
        _section("Properties of the outliers", "", _signs(report)),
    ]
    if report.registers is not None:
        sections.append(_section("Registers", "", _registers(report)))
    if report.probes is not None:
        sections.append(_section("Information in single tokens", _PROBES_TEXT, _tables(report.probes)))
    sections.append(_section("Method", "", _method(report)))
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>Artifact report: {name}</title><style>{_STYLE}</style></head>\n'
        f"<body><main>\n{body}\n</main><script>{_SCRIPT}</script></body></html>\n"
    )


# --- Sections


def _head(report: ArtifactReport) -> str:
    model = report.model
    cards = [
        ("outlier share", f"{report.outlier_share:.2%}", "of all patch tokens"),
        ("norm ratio", "-" if report.norm_ratio is None else f"{report.norm_ratio:.1f}", "outlier to normal median"),
        ("cut-off", f"{report.cutoff:.4g}", f"norm; method: {report.method}"),
        ("reported block", f"{report.layer} of {model['num_layers']}", "modes furthest apart, or the last"),
        ("emergence", _cell(report.emergence_layer), "first block with two modes"),
        ("images", f"{report.num_images:,}", f"{_by(report.outliers['grid'])} patches each"),
    ]  # fmt: skip
    tiles = "".join(
        f"<div class=card><span>{label}</span><b>{html.escape(value)}</b><i>{html.escape(note)}</i></div>"
        for label, value, note in cards
    )
    kind = "found" if report.bimodal else "clean"
    notes = "".join(f"<p class=warning>{html.escape(text)}</p>" for text in report.warnings)
    registers = model["num_register_tokens"]
    return (
        f"<header><p class=over>Artifact report</p><h1>{html.escape(str(model['name']))}</h1>"
        f"<p class=sub>{html.escape(str(model['family']))}, {model['num_layers']} blocks, width "
        f"{model['hidden_size']}, {registers} register{'' if registers == 1 else 's'}, "
        f"{model['parameters'] / 1e6:.1f} M parameters</p>"
        f'<p class="verdict {kind}">{html.escape(report.verdict)}</p><div class=cards>{tiles}</div>{notes}</header>'
    )


_NORMS_TEXT = (
    "L2 norms of the patch tokens in the residual stream, before the final norm. Left: all blocks; darker cells hold "
    "more tokens, and an orange line marks the cut-off of each block whose norms have two modes. Right: one block, "
    "selected with the slider. Block 0 is the embedding."
)


def _norms(report: ArtifactReport) -> str:
    edges = np.log10(np.asarray(report.histogram_edges))
    charts = "".join(
        f'<div class="layer" data-layer="{record["layer"]}"{"" if record["layer"] == report.layer else " hidden"}>'
        f"{_histogram(record, edges, report)}</div>"
        for record in report.layers
    )
    numbers = [record["layer"] for record in report.layers]
    slider = (
        f"<label class=slider>block <output>{report.layer}</output>"
        f"<input type=range id=layer min=0 max={len(numbers) - 1} value={numbers.index(report.layer)} "
        f"data-layers='{json.dumps(numbers)}' aria-label=\"block\"></label>"
    )
    return f"<div class=two><div>{_layer_heat(report, edges)}</div><div>{charts}{slider}</div></div>"


def _layer_heat(report: ArtifactReport, edges: np.ndarray) -> str:
    left, top, width, row = 56, 8, 420, max(min(300 // len(report.layers), 22), 6)
    height = row * len(report.layers)
    x = _scale(edges[0], edges[-1], left, left + width)
    parts = []
    for i, record in enumerate(reversed(report.layers)):  # the last block on top
        counts = np.asarray(record["histogram"], dtype=float)
        shade = np.log1p(counts) / max(math.log1p(counts.max()), 1e-9)
        y = top + i * row
        for b in np.flatnonzero(counts):
            parts.append(
                f'<rect x="{x(edges[b]):.1f}" y="{y}" width="{x(edges[b + 1]) - x(edges[b]) + 0.3:.1f}" '
                f'height="{row - 1}" fill="{_NORMAL}" fill-opacity="{0.06 + 0.94 * shade[b]:.2f}"/>'
            )
        if record["bimodal"]:
            at = x(math.log10(record["cutoff"]))
            parts.append(f'<path d="M{at:.1f} {y}v{row - 1}" stroke="{_OUTLIER}" stroke-width="2.5"/>')
        weight = ' font-weight="700"' if record["layer"] == report.layer else ""
        if row >= 10 or (record["layer"] % 4 == 0):
            parts.append(
                f'<text x="{left - 8}" y="{y + row / 2 + 3.5}" text-anchor="end"{weight}>{record["layer"]}</text>'
            )
    parts.append(_x_axis(edges, x, top + height + 2, "norm of patch tokens"))
    middle = top + height / 2
    parts.append(f'<text x="12" y="{middle}" transform="rotate(-90 12 {middle})" text-anchor="middle">block</text>')
    return _svg(left + width + 14, top + height + 44, parts, "patch norms of every block")


def _histogram(record: Mapping[str, Any], edges: np.ndarray, report: ArtifactReport) -> str:
    left, top, width, height = 56, 26, 420, 210
    counts = np.asarray(record["histogram"], dtype=float)
    total = counts.sum()
    x = _scale(edges[0], edges[-1], left, left + width)
    # Logarithmic shares, from one token upward: on a linear axis 2 % would be invisible beside 98 %.
    floor = 10 ** math.floor(math.log10(1 / max(total, 10)))
    y = _scale(math.log10(floor), 0, top + height, top)
    parts = []
    cut = math.log10(record["cutoff"])
    for b in np.flatnonzero(counts):
        high = y(math.log10(counts[b] / total))
        middle = (edges[b] + edges[b + 1]) / 2
        color = _OUTLIER if record["bimodal"] and middle > cut else _NORMAL
        parts.append(
            f'<rect x="{x(edges[b]):.1f}" y="{high:.1f}" width="{x(edges[b + 1]) - x(edges[b]) - 0.4:.1f}" '
            f'height="{top + height - high:.1f}" fill="{color}"/>'
        )
    for exponent in range(round(math.log10(floor)), 1):
        at = y(exponent)
        parts.append(f'<path d="M{left} {at:.1f}h{width}" stroke="#000" stroke-opacity=".08"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 3.5:.1f}" text-anchor="end">{10.0**exponent * 100:g} %</text>')
    if record["bimodal"]:
        parts.append(f'<path d="M{x(cut):.1f} {top}v{height}" stroke="{_OUTLIER}" stroke-dasharray="4 3"/>')
        parts.append(
            f'<text x="{x(cut) + 5:.1f}" y="{top + 12}" fill="{_OUTLIER}">cut-off {record["cutoff"]:.4g}</text>'
        )
    for key, color, label in (("cls_norm", _INK, "CLS"), ("register_norms", _REGISTER, "registers")):
        norms = np.atleast_1d(record.get(key, [])).astype(float)
        for norm in norms:
            at = x(min(max(math.log10(max(norm, 1e-12)), edges[0]), edges[-1]))
            parts.append(
                f'<path d="M{at:.1f} {top - 2}l-4 -8h8z" fill="{color}"><title>{label}: {norm:.4g}</title></path>'
            )
    state = "two modes" if record["bimodal"] else "one mode"
    title = f"block {record['layer']}: {state}, {record['share']:.2%} of the tokens above the cut-off"
    legend = f'<text x="{left}" y="12" font-weight="700">{title}</text>'
    parts += [
        legend,
        _x_axis(edges, x, top + height + 2, "norm; triangles: medians of CLS (black), registers (green)"),
    ]
    return _svg(left + width + 14, top + height + 44, parts, f"patch norms of block {record['layer']}")


_IMAGES_TEXT = (
    "A few images as the model received them. Norms are those of the reported block, with an orange frame around each "
    "outlier. Attention is that of the last block, averaged over heads; each map has its own color scale. One square "
    "is one patch."
)


def _pictures(report: ArtifactReport) -> str:
    rows = []
    for example in report.examples:
        norms = np.asarray(example["norms"], dtype=float)
        panels = [_image_panel(example["picture"], "image", f"{example['num_outliers']} outliers")]
        outlined = norms > report.cutoff if report.bimodal else np.zeros_like(norms, dtype=bool)
        panels.append(_map_panel(norms, "viridis", f"norm, block {report.layer}", outlined, log=True))
        if example["attention_cls"] is not None:
            panels.append(_map_panel(np.asarray(example["attention_cls"]), "magma", "attention of CLS"))
        panels += [
            _map_panel(np.asarray(values), "magma", f"attention of register {i + 1}")
            for i, values in enumerate(example["attention_registers"])
        ]
        # With registers, the panels of one image fill a whole row, so that none is left alone on the next.
        wide = f' wide" style="--panels:{len(panels)}' if len(panels) > 3 else ""
        rows.append(f'<div class="example{wide}" title="{html.escape(str(example["id"]))}">{"".join(panels)}</div>')
    return f"<div class=examples>{''.join(rows)}</div>" if rows else "<p>The report contains no example images.</p>"


def _image_panel(picture: str, label: str, note: str) -> str:
    return (
        f'<figure><img alt="{label}" src="data:image/jpeg;base64,{picture}">'
        f"<figcaption>{label}<i>{note}</i></figcaption></figure>"
    )


def _map_panel(
    values: np.ndarray, colors: str, label: str, outlined: np.ndarray | None = None, *, log: bool = False
) -> str:
    """Return a (rows, columns) map with one pixel per patch; cells of `outlined` get an orange frame."""
    from matplotlib import colormaps

    drawn = np.log(np.maximum(values, 1e-12)) if log else values
    low, high = np.quantile(drawn, [0.01, 1.0 if log else 0.995])
    shade = np.clip((drawn - low) / max(high - low, 1e-12), 0, 1)
    pixels = (colormaps[colors](shade)[..., :3] * 255).round().astype(np.uint8)
    note = f"{values.min():.3g} to {values.max():.3g}" if log else f"{values.sum():.0%} on patches"
    rows, columns = values.shape
    frames = ""
    if outlined is not None and outlined.any():
        cells = "".join(
            f'<rect x="{c + 0.06:g}" y="{r + 0.06:g}" width=".88" height=".88"/>' for r, c in np.argwhere(outlined)
        )
        box = f'viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" aria-hidden="true"'
        frames = f"<svg class=over-map {box}>{cells}</svg>"
    return (
        f'<figure><div class=map><img class=pixels alt="{html.escape(label)}" style="aspect-ratio:{columns}/{rows}" '
        f'src="data:image/png;base64,{_png(pixels)}">{frames}</div>'
        f"<figcaption>{html.escape(label)}<i>{note}</i></figcaption></figure>"
    )


def _places_text(report: ArtifactReport) -> str:
    outliers = report.outliers
    if not outliers["total"]:
        return "No patch token lies above the cut-off."
    border = outliers["border_share"]
    return (
        "The map shows the share of images in which each cell of the patch grid is an outlier. "
        f"{outliers['images_with']:.0%} of the images have at least one outlier. An image has "
        f"{outliers['per_image']:.1f} outliers on average and {outliers['most_in_one_image']} at most. {border:.0%} "
        f"of the outliers lie on the border, which makes up {outliers['border_cells']:.0%} of the grid."
    )


def _places(report: ArtifactReport) -> str:
    share = np.asarray(report.outliers["position_map"], dtype=float)
    panels = [_position_panel(share, "viridis", "outlier share per cell", f"0 to {share.max():.1%} of the images")]
    if report.attention is not None:
        mean = np.asarray(report.attention["mean_map"], dtype=float)
        panels.append(_position_panel(mean, "magma", "mean attention of CLS", f"{mean.sum():.0%} on patches"))
    return f"<div class=row>{''.join(panels)}</div>"


def _position_panel(values: np.ndarray, colors: str, label: str, note: str) -> str:
    from matplotlib import colormaps

    shade = values / max(values.max(), 1e-12)
    pixels = (colormaps[colors](shade)[..., :3] * 255).round().astype(np.uint8)
    rows, columns = values.shape
    return (
        f'<figure><div class=map><img class=pixels alt="{label}" src="data:image/png;base64,{_png(pixels)}" '
        f'style="aspect-ratio:{columns}/{rows}"></div><figcaption>{label}<i>{note}</i></figcaption></figure>'
    )


def _signs(report: ArtifactReport) -> str:
    neighbours, direction = report.neighbours, report.outliers["direction"]
    rows = [
        ("median cosine to the neighbors at the input", neighbours["median_outlier"], neighbours["median_normal"]),
        ("mean |cosine| between tokens of different images", direction["outlier"], direction["normal"]),
    ]  # fmt: skip
    table = _table(
        ["property", "outliers", "other patches"],
        [[name, _number(outlier), _number(normal)] for name, outlier, normal in rows],
    )
    auroc = neighbours["auroc"]
    text = (
        "<p>A patch that repeats its neighbors is redundant, so its token can be used to store other information. The "
        "similarity to the neighbors separates outliers from other patches with an AUROC of "
        f"<b>{_number(auroc)}</b> (0.5 is chance).</p>"
        if auroc is not None
        else "<p>There are no outliers to compare with the other patches.</p>"
    )
    chart = _two_densities(neighbours) if auroc is not None else ""
    attention = ""
    if report.attention is not None:
        names = {
            "mass_on_patches": "attention of CLS to patches",
            "mass_on_outliers": "attention of CLS to outliers",
            "mass_on_registers": "attention of CLS to registers",
            "top_mass": "share of the patch attention on the top 2 % of patches",
            "entropy_share": "entropy relative to uniform attention",
        }
        statistics = report.attention["statistics"]
        attention = _table(
            ["CLS in the last block", "mean", "std over images"],
            [
                [label, f"{statistics[key]['mean']:.3f}", f"{statistics[key]['std']:.3f}"]
                for key, label in names.items()
                if key in statistics
            ],
        )
    rank = report.patches["effective_rank"]
    tail = f"<p>Effective rank of the patch tokens of an image: <b>{rank['mean']:.1f}</b> ± {rank['std']:.1f}.</p>"
    return f"{text}<div class=two><div>{chart}</div><div>{table}{attention}{tail}</div></div>"


def _two_densities(neighbours: Mapping[str, Any]) -> str:
    left, top, width, height = 16, 20, 420, 170
    edges = np.asarray(neighbours["histogram_edges"], dtype=float)
    # The axis covers the occupied bins only, which are often few.
    normal, outlier = (np.asarray(neighbours[f"histogram_{kind}"], dtype=float) for kind in ("normal", "outlier"))
    used = np.flatnonzero(normal + outlier)
    first, last = max(used[0] - 1, 0), min(used[-1] + 2, len(edges) - 1)
    x = _scale(edges[first], edges[last], left, left + width)
    densities = [counts[first:last] / max(counts.sum(), 1) for counts in (normal, outlier)]
    y = _scale(0, max(density.max() for density in densities) * 1.08, top + height, top)
    parts = []
    for density, color in zip(densities, (_NORMAL, _OUTLIER), strict=True):
        steps = [f"M{x(edges[first]):.1f} {y(0):.1f}"]
        for b, value in enumerate(density):
            steps.append(f"V{y(value):.1f}H{x(edges[first + b + 1]):.1f}")
        steps.append(f"V{y(0):.1f}Z")
        parts.append(
            f'<path d="{"".join(steps)}" fill="{color}" fill-opacity=".3" stroke="{color}" stroke-width="1.3"/>'
        )
    for value in np.linspace(edges[first], edges[last], 5):
        parts.append(f'<text x="{x(value):.1f}" y="{top + height + 14}" text-anchor="middle">{value:.2f}</text>')
    parts.append(
        f'<text x="{left + width / 2}" y="{top + height + 30}" text-anchor="middle">mean cosine to neighbors</text>'
        f'<text x="{left}" y="12" fill="{_NORMAL}">normal patches</text>'
        f'<text x="{left + 100}" y="12" fill="{_OUTLIER}">outliers</text>'
    )
    return _svg(left + width + 16, top + height + 38, parts, "neighbor similarity of outliers and other patches")


def _registers(report: ArtifactReport) -> str:
    record = report.registers or {}
    rows = [
        ["number of registers", str(record["count"])],
        ["median norm of each register at the reported block", ", ".join(f"{norm:.4g}" for norm in record["norms"])],
        ["median register norm / median patch norm", _number(record["norm_ratio"])],
        ["mean cosine between the registers of an image", _number(record["cosine"])],
        ["mean cosine of one register between images", _number(record["cosine_across_images"])],
    ]
    text = _table(["registers", ""], rows)
    if report.controls:
        text += (
            "<h3>Controls: registers replaced between the blocks</h3><p>Registers are replaced by their mean over "
            "images, by those of another image, by noise, or by zeros. If the mean or the registers of another image "
            "change the tokens little, their image-specific content matters little. Zeros overstate the effect, "
            "because the model has never seen such inputs.</p>" + _controls(report.controls)
        )
    return text


def _controls(controls: Mapping[str, Any]) -> str:
    kinds = {name: entry for name, entry in controls.items() if isinstance(entry, Mapping)}
    names = {"cls_cosine": "cosine of CLS", "patch_cosine": "cosine of patches", "knn": "5-NN accuracy"}
    shown = {key: label for key, label in names.items() if any(e.get(key) is not None for e in kinds.values())}
    rows = [[kind, *(_number(entry.get(key), 4) for key in shown)] for kind, entry in kinds.items()]
    first, last = controls["blocks"]
    return _table(["registers", *shown.values()], rows) + (
        f"<p class=lead>{controls['num_images']} images. Registers are replaced at the outputs of blocks {first} to "
        f"{last}. Cosines compare the tokens after the final norm with those of the unmodified model.</p>"
    )


_PROBES_TEXT = (
    "Linear probes on single tokens predict the position of the patch in the grid, its pixels, and the class of the "
    "image. If outliers predict position and pixels worse but the class better than other patches do, they no longer "
    "describe their own patch."
)


def _tables(content: Mapping[str, Any]) -> str:
    """Return nested results as tables: loose values first, then one table per dictionary of dictionaries."""
    loose, nested = [], []
    for key, value in content.items():
        label = html.escape(str(key).replace("_", " "))
        if isinstance(value, Mapping) and value and all(isinstance(entry, Mapping) for entry in value.values()):
            columns = list(dict.fromkeys(name for entry in value.values() for name in entry))
            rows = [
                [str(name).replace("_", " "), *(_cell(entry.get(c)) for c in columns)] for name, entry in value.items()
            ]
            nested.append(_table([label, *(c.replace("_", " ") for c in columns)], rows, escape=False))
        else:
            loose.append([label, _cell(value)])
    return (_table(["setting", ""], loose, escape=False) if loose else "") + "".join(nested)


def _method(report: ArtifactReport) -> str:
    model = report.model
    settings = [
        ["decision", html.escape(report.reason)],
        ["separation (Ashman's D)", f"{report.separation:.2f}"],
        ["cost per image", f"{model['gmacs']:.2f} G multiply-adds for {_by(report.outliers['grid'])} patches"],
        *([html.escape(str(key)), _cell(value)] for key, value in report.settings.items()),
        ["versions", html.escape(", ".join(f"{key} {value}" for key, value in report.versions.items()))],
        ["wall time (s)", html.escape(", ".join(f"{key} {value:.1f}" for key, value in report.seconds.items()))],
    ]
    skipped = ""
    if report.skipped:
        rows = [[html.escape(str(v)) for v in entry.values()] for entry in report.skipped[:50]]
        skipped = f"<h3>Skipped images: {len(report.skipped)}</h3>" + _table(["image", "reason"], rows, escape=False)
    return f"<div class=settings>{_table(['setting', ''], settings, escape=False)}</div>{skipped}"


# --- Parts of a page


def _section(title: str, text: str, content: str) -> str:
    lead = f"<p class=lead>{text}</p>" if text else ""
    return f"<section><h2>{title}</h2>{lead}{content}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, escape: bool = True) -> str:
    def cells(values: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(v) if escape else v}</{tag}>" for v in values)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{cells(head, 'th')}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return html.escape(str(value))
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return html.escape(", ".join(f"{key} {_cell(entry)}" for key, entry in value.items()))
    if isinstance(value, list | tuple):
        return html.escape(", ".join(_cell(entry) for entry in value[:24]) + (" ..." if len(value) > 24 else ""))
    return html.escape(str(value))


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _by(grid: Sequence[int]) -> str:
    return f"{grid[0]} x {grid[1]}"


def _scale(low: float, high: float, start: float, end: float) -> Any:
    return lambda value: start + (value - low) / max(high - low, 1e-12) * (end - start)


def _x_axis(edges: np.ndarray, x: Any, y: float, label: str) -> str:
    """Return an axis with ticks at 1, 2 and 5 times powers of ten; `edges` are base-10 logarithms."""
    ticks = [m * 10.0**e for e in range(math.floor(edges[0]), math.ceil(edges[-1]) + 1) for m in (1, 2, 5)]
    ticks = [tick for tick in ticks if edges[0] <= math.log10(tick) <= edges[-1]]
    if len(ticks) > 9:
        ticks = [tick for tick in ticks if f"{tick:e}".startswith("1")]
    marks = "".join(
        f'<path d="M{x(math.log10(t)):.1f} {y}v4" stroke="{_SOFT}"/>'
        f'<text x="{x(math.log10(t)):.1f}" y="{y + 16}" text-anchor="middle">{t:g}</text>'
        for t in ticks
    )
    middle = (x(edges[0]) + x(edges[-1])) / 2
    return f'{marks}<text x="{middle:.1f}" y="{y + 34}" text-anchor="middle">{label}</text>'


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg class=chart viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _png(pixels: np.ndarray) -> str:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f5f2; color: #222; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .3rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; }
.over { margin: 0; color: #6b6b6b; font-size: .8rem; letter-spacing: .08em; text-transform: uppercase; }
.sub, .lead, figcaption i { color: #6b6b6b; }
.sub { margin: 0 0 1rem; }
.lead { margin: 0 0 1rem; max-width: 46rem; }
.verdict { font-size: 1.1rem; padding: .9rem 1.1rem; border-radius: .6rem; background: #fff;
  border-left: .4rem solid; }
.verdict.found { border-color: #d55e00; }
.verdict.clean { border-color: #009e73; }
.warning { margin: .5rem 0 0; font-size: .9rem; color: #8a4a00; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; }
.card { background: #fff; border-radius: .6rem; padding: .7rem .9rem; display: flex; flex-direction: column; }
.card span, .card i { font-size: .78rem; color: #6b6b6b; font-style: normal; }
.card b { font-size: 1.45rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
section { background: #fff; border-radius: .6rem; padding: 1.3rem 1.4rem; margin-top: 1.25rem; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.5rem;
  align-items: start; }
.chart { width: 100%; height: auto; display: block; font: 11px system-ui, sans-serif; fill: #444; }
.slider { display: flex; gap: .6rem; align-items: center; font-size: .9rem; margin-top: .3rem; }
.slider input { flex: 1; accent-color: #0072b2; min-height: 2rem; }
.slider output { font-weight: 700; min-width: 1.6em; font-variant-numeric: tabular-nums; }
.examples { display: flex; flex-wrap: wrap; gap: 1.2rem 2rem; }
.example { display: flex; flex-wrap: wrap; gap: .6rem; }
.example figure { width: 9.2rem; }
.example.wide { display: grid; grid-template-columns: repeat(var(--panels), minmax(0, 1fr)); width: 100%; }
.example.wide figure { width: auto; }
.settings td:first-child { white-space: nowrap; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: .9rem; }
.row figure { width: min(19rem, 100%); }
figure { margin: 0; }
figure img { width: 100%; display: block; border-radius: .25rem; }
img.pixels { image-rendering: pixelated; }
.map { position: relative; }
.over-map { position: absolute; inset: 0; width: 100%; height: 100%; fill: none; stroke: #ff7a1a; stroke-width: .12; }
figcaption { font-size: .8rem; line-height: 1.3; margin-top: .25rem; }
figcaption i { display: block; font-style: normal; font-size: .74rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; margin: .6rem 0; width: 100%;
  font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; border-bottom: 1px solid #bbb; overflow-wrap: normal; white-space: nowrap; }
th, td { padding: .3rem .7rem .3rem 0; vertical-align: top; }
td { border-bottom: 1px solid #eee; overflow-wrap: anywhere; }
@media (max-width: 34rem) { main { padding: 1rem .6rem 3rem; } section { padding: 1rem .8rem; }
  .example figure { width: calc(33% - .45rem); }
  .example.wide { grid-template-columns: repeat(3, minmax(0, 1fr)); } h1 { font-size: 1.5rem; } }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""

_SCRIPT = """
const slider = document.getElementById('layer');
if (slider) {
  const numbers = JSON.parse(slider.dataset.layers);
  slider.addEventListener('input', () => {
    const layer = numbers[slider.value];
    slider.parentElement.querySelector('output').textContent = layer;
    for (const chart of document.querySelectorAll('.layer')) chart.hidden = chart.dataset.layer !== String(layer);
  });
}
"""
