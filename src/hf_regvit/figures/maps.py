"""Maps of attention, PCA of patch tokens, norms and LOST, and the figures that show them.

Shape letters: T = 1 + R + N tokens, R registers, N patches in a grid of (rows, columns), D width. All maps keep the
true grid of the image; nothing is cropped to a square.

Figures are matplotlib objects without pyplot, so they need no display and leave no global state behind.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..models.loading import open_model
from ..models.saving import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.typing import RcKeyType

    from ..diagnosis.report import ArtifactReport
    from ..evaluation.lost import LostResult
    from ..models.tokens import Layers, Site, TokenReader

# Perceptually uniform, and readable in gray and for color-blind readers.
_ATTENTION_COLORS = "magma"
_NORM_COLORS = "viridis"
INK = "#222222"
_MARK = "#ff7a1a"  # seeds, queries, cut-offs, found boxes
# Okabe-Ito, safe for color blindness; at least as many as a panel of `curves` has lines.
LINE_COLORS = ("#222222", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
_DOTS_PER_INCH = 120
STYLE: "dict[RcKeyType, str | float]" = {
    "font.family": "sans-serif",
    "font.size": 8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 8,
    "axes.titlepad": 4,
    "axes.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class TokenMaps:
    """Maps of one image in one model, on the grid of the image.

    Attributes:
        attention: (1 + R, rows, columns) attention in the last block, averaged over heads, from CLS (if any) and each
            register to every patch. The sum over a map is the share of attention on patches.
        patch_tokens: (rows, columns, D) patch tokens after the final norm.
        norms: (rows, columns) L2 norms of the patch tokens before the final norm, where artifacts are visible.
        registers: (R, D) register tokens after the final norm.
    """

    attention: Tensor
    patch_tokens: Tensor
    norms: Tensor
    registers: Tensor


def read_token_maps(model: "TokenReader | nn.Module | str | Path", pixel_values: Tensor) -> list[TokenMaps]:
    """Run a model once and arrange its tokens on the grid; the model is not modified.

    Args:
        model: Name, module or reader; see `open_model`. Without CLS, the attention rows start with the registers. If
            its attention cannot be read, there are no rows.
        pixel_values: (B, 3, H, W) normalized pixels; sides are multiples of the patch size, with any aspect ratio.

    Returns:
        Maps of each image, on the CPU.
    """
    reader = open_model(model)
    sites: dict[Site, Layers] = {"residual": (-1,)}
    if reader.reads_attention:
        sites["attention"] = (-1,)
    readings = reader.read_many(pixel_values, sites)
    residual, attention = readings["residual"], readings.get("attention")
    with torch.no_grad():
        final = reader.final_norm(residual.at())  # (B, T, D)
    first = residual.num_prefix_tokens
    rows = [attention.registers() if attention else final.new_zeros(len(final), 1, 0, final.shape[1])]
    if attention and (cls_row := attention.cls()) is not None:
        rows.insert(0, cls_row[:, :, None])
    maps = torch.cat(rows, dim=2).float().mean(1)[..., first:]  # (B, 1 + R, N)
    norms = residual.patches().float().norm(dim=-1)  # (B, N)
    return [
        TokenMaps(
            attention=maps[i].unflatten(-1, residual.grid).cpu(),
            patch_tokens=final[i, first:].float().unflatten(0, residual.grid).cpu(),
            norms=norms[i].unflatten(-1, residual.grid).cpu(),
            registers=final[i, first - residual.num_register_tokens : first].float().cpu(),
        )
        for i in range(len(pixel_values))
    ]


def pca_colors(tokens: Tensor) -> Tensor:
    """Map the first three principal components of tokens to red, green and blue.

    Args:
        tokens: (..., D) tokens, at least two. One PCA covers all of them, so colors are comparable within a call only.

    Returns:
        (..., 3) colors in [0, 1]; each component is stretched from its 1st to its 99th percentile. Signs are fixed by
        the largest weight of a direction, so that the same tokens always give the same colors.

    Raises:
        ValueError: Fewer than two tokens, or fewer than three dimensions.
    """
    flat = tokens.reshape(-1, tokens.shape[-1]).double()
    if len(flat) < 2 or flat.shape[1] < 3:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}, but PCA needs at least two tokens of three dimensions."
        )
    centered = flat - flat.mean(0)
    _, directions = torch.linalg.eigh(centered.T @ centered)  # ascending eigenvalues, columns
    directions = directions[:, [-1, -2, -3]]  # (D, 3)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    components = centered @ (directions * largest.sign())
    low, high = torch.quantile(components, torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)
    colors = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colors.float().reshape(*tokens.shape[:-1], 3)


def attention_limits(attention: Tensor) -> tuple[float, float]:
    """Return the range of an attention map to draw; a few patches with most of the attention would hide the rest."""
    low, high = torch.quantile(attention.flatten(), torch.tensor([0.01, 0.995], dtype=attention.dtype)).tolist()
    return low, max(high, low + 1e-12)


def distinct_registers(attention: Tensor) -> list[tuple[str, Tensor]]:
    """Return the maps of registers (R, rows, columns) by name; equal neighbors are one map, `registers 1 to 4`.

    Test-time registers start as zeros and receive the same values, so they stay equal.
    """
    groups: list[list[int]] = []
    for i, map_ in enumerate(attention):
        same = bool(groups) and torch.allclose(map_, attention[groups[-1][0]], rtol=0, atol=1e-3 * float(map_.max()))
        groups[-1:] = [[*groups[-1], i]] if same else [*groups[-1:], [i]]
    return [
        (f"register {one[0] + 1}" if len(one) == 1 else f"registers {one[0] + 1} to {one[-1] + 1}", attention[one[0]])
        for one in groups
    ]


def stretch(values: Tensor, low: float, high: float) -> Tensor:
    """Map [low, high] to [0, 1], and clip values outside."""
    return ((values - low) / max(high - low, 1e-12)).clamp(0, 1)


def colored(shade: Tensor, colors: str) -> Image.Image:
    """Return (rows, columns) values in [0, 1] as an image with one pixel per value.

    Args:
        shade: Values to color.
        colors: Name of a colormap of matplotlib.
    """
    import matplotlib

    return color_image(torch.from_numpy(matplotlib.colormaps[colors](shade.numpy())[..., :3]))


def color_image(colors: Tensor) -> Image.Image:
    """Return (rows, columns, 3 or 4) colors in [0, 1] as an image with one pixel per cell."""
    return Image.fromarray((colors * 255).round().byte().numpy())


def overview_figure(image: Image.Image, maps: TokenMaps) -> "Figure":
    """Draw one row: image, attention of CLS and of each register, PCA of the patch tokens, norm map."""
    figure, axes = _panels(image, len(maps.attention) + 3, with_bar=True)
    _draw_image(axes[0], image, "image")
    has_cls = len(maps.attention) > len(maps.registers)
    _draw_attention(axes[1:-2], image, maps.attention, first=0 if has_cls else 1)
    _draw_colors(axes[-2], image, pca_colors(maps.patch_tokens), "PCA of patches")
    _draw_norms(figure, axes[-1], image, maps.norms)
    return figure


def before_after_figure(
    images: Sequence[Image.Image], before: Sequence[TokenMaps], after: Sequence[TokenMaps]
) -> "Figure":
    """Draw one row per image: norms, attention of CLS and PCA of the patches, before and after a change of the model.

    Norms have separate scales before and after, because on the scale of the artifacts all others would look the same.

    Args:
        images: n images with the aspect ratio of their grids.
        before: Maps of the original model from `read_token_maps`, one per image.
        after: Maps of the changed model, one per image.

    Raises:
        ValueError: Different numbers of images and maps, or none.
    """
    if not len(images) == len(before) == len(after) or not images:
        raise ValueError(
            f"Got {len(images)} images, {len(before)} maps before and {len(after)} maps after. Pass the same number "
            "of each, at least one."
        )
    figure, axes = _panels(images[0], 7, num_rows=len(images))
    for row, (image, *sides) in enumerate(zip(images, before, after)):
        panels = axes[7 * row : 7 * row + 7]
        _draw_image(panels[0], image, "image")
        for column, (name, maps) in enumerate(zip(("before", "after"), sides)):
            low, high = maps.norms.min().item(), maps.norms.max().item()
            title = f"norm {name}: {low:.0f} to {high:.0f}"
            _draw_map(panels[1 + column], image, maps.norms, title, cmap=_NORM_COLORS)
            token = "CLS" if len(maps.attention) > len(maps.registers) else "register 1"
            if len(maps.attention):
                _draw_attention(panels[3 + column : 4 + column], image, maps.attention[:1])
            panels[3 + column].set_title(f"attention of {token} {name}", fontsize=8, color=INK)
            panels[3 + column].set_xlabel("")  # the title of the next row takes its place
            _draw_colors(panels[5 + column], image, pca_colors(maps.patch_tokens), f"PCA {name}")
    return figure


def progress_figure(images: Sequence[Image.Image], maps: Sequence[TokenMaps], *, title: str = "") -> Image.Image:
    """Draw images, PCA of their patches and attention of CLS at one step of a training run.

    The panels are pasted with Pillow, because matplotlib takes a second for this many panels and would delay the run.

    Args:
        images: n images of one size.
        maps: Maps from `read_token_maps`, one per image; one PCA covers all, so equal colors mean similar tokens.
        title: Text above the first image, e.g. the step.

    Raises:
        ValueError: Different numbers of images and maps, or none.
    """
    if len(images) != len(maps) or not images:
        raise ValueError(
            f"Got {len(images)} images for {len(maps)} token maps. Pass one map per image, and at least one."
        )
    from PIL import ImageDraw, ImageFont

    colors = pca_colors(torch.cat([each.patch_tokens.flatten(0, 1) for each in maps]))
    split = colors.split([each.norms.numel() for each in maps])
    attention = [each.attention[0] for each in maps]
    rows = [
        (title, images),
        ("PCA of patches", [color_image(part.unflatten(0, each.norms.shape)) for part, each in zip(split, maps)]),
        (
            "attention of CLS",
            [colored(stretch(each, *attention_limits(each)), _ATTENTION_COLORS) for each in attention],
        ),
    ]
    height, gap, head = 180, 6, 24  # pixels
    width = round(height * images[0].width / images[0].height)
    page = Image.new("RGB", (len(images) * (width + gap) + gap, len(rows) * (height + head) + gap), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    for number, (name, panels) in enumerate(rows):
        top = number * (height + head)
        pen.text((gap, top + 4), name, fill=INK, font=font)
        for column, panel in enumerate(panels):
            scaled = panel.resize((width, height), Image.Resampling.BICUBIC)
            page.paste(scaled, (gap + column * (width + gap), top + head))
    return page


def attention_overlay_figure(
    image: Image.Image, attention: Tensor, *, name: str = "CLS", cell: tuple[int, int] | None = None
) -> "Figure":
    """Draw attention over the image: the mean over heads, then every head.

    Args:
        image: Input image, with the aspect ratio of the grid.
        attention: (heads, rows, columns) attention, such as one entry of `TokenReader.attention_maps`.
        name: Name of the query, for the titles.
        cell: (row, column) to mark if the query is a patch.
    """
    heads = len(attention)
    columns = min(heads + 2, 5)
    num_rows = -(-(heads + 2) // columns)
    figure, axes = _panels(image, columns, num_rows=num_rows)
    _draw_image(axes[0], image, "image")
    maps = [attention.mean(0), *attention]
    titles = [f"{name}, mean over {heads} heads", *(f"head {i + 1}" for i in range(heads))]
    for axis, title, map_ in zip(axes[1:], titles, maps):
        # The image is drawn in gray, so that color shows attention only.
        axis.imshow(image.convert("L"), cmap="gray", vmin=0, vmax=255)
        low, high = attention_limits(map_)
        _draw_map(axis, image, map_, title, cmap=_ATTENTION_COLORS, vmin=low, vmax=high,
                  alpha=_smooth(0.9 * stretch(map_, low, high).sqrt(), image))  # fmt: skip
    if cell is not None:
        height, width = image.height / attention.shape[1], image.width / attention.shape[2]
        for axis in axes[: heads + 2]:
            _mark(axis, (cell[1] + 0.5) * width, (cell[0] + 0.5) * height)
    for axis in axes[heads + 2 :]:
        axis.set_visible(False)
    return figure


def layer_norm_figure(report: "ArtifactReport") -> "Figure":
    """Draw histograms of the patch norms of every block, with the cut-off of each block with two modes.

    Args:
        report: Result of `diagnose`.
    """
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    edges = np.asarray(report.histogram_edges)
    counts = np.asarray([record["histogram"] for record in report.layers], dtype=float)  # (layers, bins)
    shade = np.log1p(counts) / np.log1p(counts.max(axis=1, keepdims=True)).clip(min=1e-9)
    # More tokens make a cell less transparent, which works on light and dark pages.
    blues = LinearSegmentedColormap.from_list("blues", ["#0072b210", "#0072b2"])
    with matplotlib.rc_context(STYLE | {"axes.edgecolor": INK}):
        figure = Figure(figsize=(4.6, 0.9 + 0.17 * len(counts)), layout="constrained")
        axis = figure.add_subplot()
        rows = np.asarray([record["layer"] for record in report.layers])
        # matplotlib expects the edges of the rows, not their centers.
        axis.pcolormesh(edges, np.append(rows - 0.5, rows[-1] + 0.5), np.ma.masked_equal(shade, 0), cmap=blues,
                        vmin=0, vmax=1, rasterized=True)  # fmt: skip
        for record in report.layers:
            if record["bimodal"]:
                words = (
                    f"hover:block {record['layer']}: {record['share']:.2%} above the cut-off {record['cutoff']:.4g}"
                )
                axis.vlines(record["cutoff"], record["layer"] - 0.45, record["layer"] + 0.45, color=_MARK, lw=2,
                            gid=words)  # fmt: skip
        axis.set(xscale="log", xlabel="norm of patch tokens before the final norm", ylabel="block")
        norm_ticks(axis)
        axis.set_title(f"outliers: {report.outlier_share:.2%} at block {report.layer}" if report.bimodal else
                       "no distinct outliers", color=INK)  # fmt: skip
    return figure


def norm_ticks(axis: "Axes") -> None:
    """Label a logarithmic x-axis at 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())


def write_report_figures(report: "ArtifactReport", folder: str | Path) -> list[Path]:
    """Write the figures of a diagnosis as PNG files: `layer_norms.png`, `positions.png`, and one row per example.

    Args:
        report: Result of `diagnose`.
        folder: Output folder, created if needed.

    Returns:
        Paths of the files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"layer_norms": layer_norm_figure(report)}
    share = torch.tensor(report.outliers["position_map"])
    blank = Image.new("RGB", (share.shape[1] * 16, share.shape[0] * 16))
    figures["positions"], axes = _panels(blank, 1)
    _draw_map(axes[0], blank, share, f"outliers: up to {share.max():.0%} of the images", cmap=_NORM_COLORS)
    for number, example in enumerate(report.examples):
        image = Image.open(BytesIO(base64.b64decode(example["picture"]))).convert("RGB")
        rows = [] if example["attention_cls"] is None else [example["attention_cls"]]
        attention = torch.tensor(rows + example["attention_registers"])
        figure, axes = _panels(image, len(attention) + 2, with_bar=True)
        _draw_image(axes[0], image, "image")
        if len(attention):
            _draw_attention(axes[1:-1], image, attention, first=1 - len(rows))
        _draw_norms(figure, axes[-1], image, torch.tensor(example["norms"]))
        figures[f"example_{number:02d}"] = figure
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png")
    return [folder / f"{name}.png" for name in figures]


def lost_figure(image: Image.Image, result: "LostResult") -> "Figure":
    """Draw the steps of LOST: seed and inverse degree, similarity to the seed, expansion, mask, box.

    Args:
        image: Image padded to whole patches, as LOST received it.
        result: Result of `evaluation.lost.lost_box`.
    """
    from matplotlib.patches import Rectangle

    rows, columns = result.degrees.shape
    height, width = image.height / rows, image.width / columns
    figure, axes = _panels(image, 6)
    _draw_image(axes[0], image, "image")
    _draw_map(axes[1], image, 1.0 / (1.0 + result.degrees.float()), "inverse degree, seed", cmap=_ATTENTION_COLORS)
    _draw_map(axes[2], image, result.seed_similarity.float(), "similarity to the seed", cmap=_NORM_COLORS)
    expanded = torch.zeros(rows * columns)
    expanded[result.expansion] = 1
    for axis, map_, title in (
        (axes[3], expanded.view(rows, columns), "expansion"),
        (axes[4], result.mask.float(), "mask"),
    ):
        _draw_image(axis, image, title)
        hidden = map_.numpy() == 0
        axis.imshow(hidden, extent=(0, image.width, image.height, 0), cmap="gray_r", alpha=0.75 * hidden,
                    interpolation="nearest")  # fmt: skip
    _draw_image(axes[5], image, "box")
    seed_row, seed_column = divmod(result.seed, columns)
    for axis in axes[1:5]:
        _mark(axis, (seed_column + 0.5) * width, (seed_row + 0.5) * height)
    x1, y1, x2, y2 = result.box((round(height), round(width)), (image.height, image.width))
    axes[5].add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=_MARK, lw=2))
    return figure


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure as a PNG file, whole or not at all."""
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=_DOTS_PER_INCH)


# --- Drawing


def _panels(
    image: Image.Image, columns: int, *, num_rows: int = 1, with_bar: bool = False
) -> tuple["Figure", list["Axes"]]:
    """Create a figure whose panels have the aspect ratio of the image, laid out in inches to avoid distortion."""
    import matplotlib
    from matplotlib.figure import Figure

    area, gap, head, foot = 2.6, 0.08, 0.24, 0.2  # square inches of a panel; inches
    aspect = min(max(image.height / image.width, 1 / 3), 3)
    width = (area / aspect) ** 0.5  # tall and wide images get the same area
    height = width * aspect
    size = (columns * (width + gap) + gap + (0.4 if with_bar else 0), num_rows * (height + head) + foot)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        axes = []
        for row in range(num_rows):
            bottom = size[1] - (row + 1) * (head + height)
            for column in range(columns):
                left = gap + column * (width + gap)
                axis = figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))
                axis.set(xticks=[], yticks=[])
                axes.append(axis)
    return figure, axes


def _draw_image(axis: "Axes", image: Image.Image, title: str) -> None:
    axis.imshow(image)
    axis.set_title(title, fontsize=8, color=INK)


def _draw_map(axis: "Axes", image: Image.Image, map_: Tensor, title: str, **options: Any) -> "AxesImage":
    """Draw a map over the extent of its image, with smooth upsampling."""
    extent = (0, image.width, image.height, 0)
    axis.set_title(title, fontsize=8, color=INK)
    return axis.imshow(map_.numpy(), interpolation="bicubic", extent=extent, **options)


def _mark(axis: "Axes", x: float, y: float) -> None:
    axis.plot(x, y, marker="s", ms=6, mfc="none", mec=_MARK, mew=1.5)


def _smooth(map_: Tensor, image: Image.Image) -> np.ndarray:
    """Return a map in [0, 1] at the size of its image, enlarged as in `_draw_map`."""
    pixels = Image.fromarray((map_ * 255).round().byte().numpy()).resize(image.size, Image.Resampling.BICUBIC)
    return np.asarray(pixels, dtype=np.float32) / 255


def _draw_attention(axes: Sequence["Axes"], image: Image.Image, attention: Tensor, *, first: int = 0) -> None:
    """Draw the maps of CLS and registers in order; use `first=1` if there is no CLS."""
    names = ["CLS", *(f"register {i + 1}" for i in range(len(attention)))][first : first + len(attention)]
    for axis, name, map_ in zip(axes, names, attention, strict=True):
        low, high = attention_limits(map_)
        _draw_map(axis, image, map_, f"attention of {name}", cmap=_ATTENTION_COLORS, vmin=low, vmax=high)
        axis.set_xlabel(f"{map_.sum().item():.1%} on patches", fontsize=7, labelpad=2)


def _draw_colors(axis: "Axes", image: Image.Image, colors: Tensor, title: str) -> None:
    # Bicubic upsampling overshoots the range of colors in matplotlib; Pillow clips it.
    _draw_image(axis, color_image(colors).resize(image.size, Image.Resampling.BICUBIC), title)


def _draw_norms(figure: "Figure", axis: "Axes", image: Image.Image, norms: Tensor) -> None:
    drawn = _draw_map(axis, image, norms, "norm of patches", cmap=_NORM_COLORS)
    panel, inch = axis.get_position(), 1 / figure.get_figwidth()
    bar = figure.add_axes((panel.x1 + 0.05 * inch, panel.y0, 0.07 * inch, panel.height))
    figure.colorbar(drawn, cax=bar).outline.set_linewidth(0.5)
    bar.tick_params(labelsize=6, width=0.5, length=2, pad=1)
