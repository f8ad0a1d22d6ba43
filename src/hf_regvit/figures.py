"""What a model sees, drawn: attention of CLS, registers and patches, PCA of patch tokens, norms, LOST, and a page.

Shape letters: T = 1 + R + N tokens, R registers, N patches in a grid of (rows, columns), D width. All maps keep the
true grid of the picture; nothing is cropped to a square.

Figures are matplotlib objects without pyplot, so they need no display and leave no global state behind.
"""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from .families import final_norm
from .features import read_many

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .artifacts import ArtifactReport
    from .lost import LostResult
    from .modeling_regvit import RegViTModel

# Perceptually uniform, readable in grey and with colour-blind eyes.
_ATTENTION_COLORS = "magma"
_NORM_COLORS = "viridis"
_INK = "#222222"
_MARK = "#ff7a1a"  # seeds, queries, cut-offs, found boxes
_LINE_COLORS = ("#222222", "#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito, told apart by all eyes
_DOTS_PER_INCH = 120
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 8,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": 8,
    "axes.titlepad": 4,
    "axes.linewidth": 0.5,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class TokenMaps:
    """What one picture gives in one model, on its own grid.

    Attributes:
        attention: (1 + R, rows, columns) attention in the last block, mean over the heads, from CLS (where there is
            one) and each register to every patch. The sum over a map is the share of attention that goes to patches.
        patch_tokens: (rows, columns, D) patch tokens after the final norm.
        norms: (rows, columns) L2 norm of the patch tokens before the final norm, where artifacts show.
        registers: (R, D) register tokens after the final norm.
    """

    attention: Tensor
    patch_tokens: Tensor
    norms: Tensor
    registers: Tensor

    def register_similarity(self) -> float | None:
        """Mean cosine between two registers, 1 = they say the same; None with fewer than two."""
        count = len(self.registers)
        if count < 2:
            return None
        unit = torch.nn.functional.normalize(self.registers, dim=-1)
        return ((unit @ unit.T).sum().item() - count) / (count * (count - 1))


def read_token_maps(model: nn.Module, pixel_values: Tensor) -> list[TokenMaps]:
    """Run a model once and lay its tokens out on the grid; the model comes back as it was.

    Args:
        model: Of any family that `hf_regvit.features.read_tokens` knows. Without CLS the attention rows start with
            the registers.
        pixel_values: (B, 3, H, W) normalised; sides are multiples of the patch, in any proportion.

    Returns:
        One entry per picture, on the CPU.
    """
    readings = read_many(model, pixel_values, {"residual": (-1,), "attention": (-1,)})
    residual, attention = readings["residual"], readings["attention"]
    with torch.no_grad():
        final = final_norm(model)(residual.at())  # (B, T, D)
    first = residual.num_prefix_tokens
    rows = [attention.registers()]  # (B, heads, R, T)
    if (cls_row := attention.cls()) is not None:
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


def read_attention(
    model: nn.Module, pixel_values: Tensor, *, query: str | int | tuple[int, int] = "cls", layer: int = -1
) -> Tensor:
    """Where one token looks, head by head.

    Args:
        model: Of any family that `hf_regvit.features.read_tokens` knows.
        pixel_values: (B, 3, H, W) normalised.
        query: `"cls"`, the number of a register from 0, or the (row, column) of a patch.
        layer: Block, 1 to L, or negative from the end.

    Returns:
        (B, heads, rows, columns) attention from the query to every patch, on the CPU. A map sums to the share of the
        attention that goes to patches.

    Raises:
        ValueError: The model has no such token; says which there are.
    """
    reading = read_many(model, pixel_values, {"attention": (layer,)})["attention"]
    rows, columns = reading.grid
    if query == "cls":
        row = reading.cls()
        if row is None:
            raise ValueError("query='cls', but the model has no CLS token. Give the (row, column) of a patch.")
    elif isinstance(query, int):
        if not 0 <= query < reading.num_register_tokens:
            raise ValueError(f"query={query}: the model has {reading.num_register_tokens} registers, counted from 0.")
        row = reading.registers()[:, :, query]
    elif isinstance(query, tuple) and 0 <= query[0] < rows and 0 <= query[1] < columns:
        row = reading.patches()[:, :, query[0] * columns + query[1]]
    else:
        raise ValueError(
            f"query={query!r}: expected 'cls', a register's number, or a cell of the {rows} x {columns} patches."
        )
    return row[..., reading.num_prefix_tokens :].float().unflatten(-1, reading.grid).cpu()  # (B, heads, rows, columns)


def pca_colors(tokens: Tensor) -> Tensor:
    """The three main directions of tokens as red, green and blue.

    Args:
        tokens: (..., D), at least two of them. One PCA over all, so colours compare within one call only.

    Returns:
        (..., 3) in [0, 1]: each component stretched from its 1st to its 99th percentile. Signs are fixed by the
        largest weight of a direction, so the same tokens always give the same colours.

    Raises:
        ValueError: Fewer than two tokens, or fewer than three dimensions.
    """
    flat = tokens.reshape(-1, tokens.shape[-1]).double()
    if len(flat) < 2 or flat.shape[1] < 3:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}; PCA needs two tokens of three dimensions at least."
        )
    centered = flat - flat.mean(0)
    _, directions = torch.linalg.eigh(centered.T @ centered)  # ascending eigenvalues, columns
    directions = directions[:, [-1, -2, -3]]  # (D, 3)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    components = centered @ (directions * largest.sign())
    low, high = torch.quantile(components, torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)
    colors = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colors.float().reshape(*tokens.shape[:-1], 3)


def attention_map_figure(image: Image.Image, attention: Tensor) -> "Figure":
    """The picture, and where CLS and each register look.

    Args:
        image: The picture, in the proportion of the grid.
        attention: (1 + R, rows, columns), as in `TokenMaps`.
    """
    figure, axes = _panels(image, 1 + len(attention))
    _draw_image(axes[0], image, "picture")
    _draw_attention(axes[1:], image, attention)
    return figure


def pca_figure(images: Sequence[Image.Image], tokens: Sequence[Tensor]) -> "Figure":
    """Pictures above, the PCA of their patch tokens below; one PCA for all, so equal colours mean equal content.

    Args:
        images: n pictures.
        tokens: n tensors (rows, columns, D); the grids may differ.

    Raises:
        ValueError: Not one map per picture, or none.
    """
    if len(images) != len(tokens) or not images:
        raise ValueError(f"{len(images)} pictures for {len(tokens)} token maps; expected one each, and one at least.")
    colors = pca_colors(torch.cat([map_.flatten(0, 1) for map_ in tokens]))
    split = colors.split([map_.shape[0] * map_.shape[1] for map_ in tokens])
    figure, axes = _panels(images[0], len(images), num_rows=2)
    for i, (image, map_) in enumerate(zip(images, tokens, strict=True)):
        _draw_image(axes[i], image, "picture")
        _draw_colors(axes[len(images) + i], image, split[i].unflatten(0, map_.shape[:2]), "PCA of patches")
    return figure


def norm_map_figure(image: Image.Image, norms: Tensor) -> "Figure":
    """The picture and the norm of its patch tokens; a few bright patches on plain ground are artifacts.

    Args:
        image: The picture, in the proportion of the grid.
        norms: (rows, columns), as in `TokenMaps`.
    """
    figure, axes = _panels(image, 2, with_bar=True)
    _draw_image(axes[0], image, "picture")
    _draw_norms(figure, axes[1], image, norms)
    return figure


def overview_figure(image: Image.Image, maps: TokenMaps) -> "Figure":
    """One row: picture, attention of CLS and of each register, PCA of the patch tokens, norm map."""
    figure, axes = _panels(image, len(maps.attention) + 3, with_bar=True)
    _draw_image(axes[0], image, "picture")
    has_cls = len(maps.attention) > len(maps.registers)
    _draw_attention(axes[1:-2], image, maps.attention, first=0 if has_cls else 1)
    _draw_colors(axes[-2], image, pca_colors(maps.patch_tokens), "PCA of patches")
    _draw_norms(figure, axes[-1], image, maps.norms)
    return figure


def before_after_figure(
    images: Sequence[Image.Image], before: Sequence[TokenMaps], after: Sequence[TokenMaps]
) -> "Figure":
    """One row a picture: norms, attention of CLS and PCA of the patches of a model, and of what was made of it.

    Norms have a scale of their own on each side: on that of the artifacts everything else would be one colour.

    Args:
        images: n pictures in the proportion of their grids.
        before: What `read_token_maps` gave for them in the model.
        after: Likewise, in the other one.

    Raises:
        ValueError: Not two maps a picture, or none.
    """
    if not len(images) == len(before) == len(after) or not images:
        raise ValueError(
            f"{len(images)} pictures, {len(before)} and {len(after)} maps; expected one of each at least."
        )
    figure, axes = _panels(images[0], 7, num_rows=len(images))
    for row, (image, *sides) in enumerate(zip(images, before, after)):
        panels = axes[7 * row : 7 * row + 7]
        _draw_image(panels[0], image, "picture")
        for column, (name, maps) in enumerate(zip(("before", "after"), sides)):
            low, high = maps.norms.min().item(), maps.norms.max().item()
            title = f"norm {name}: {low:.0f} to {high:.0f}"
            _draw_map(panels[1 + column], image, maps.norms, title, cmap=_NORM_COLORS)
            _draw_attention(panels[3 + column : 4 + column], image, maps.attention[:1])
            panels[3 + column].set_title(f"attention of CLS {name}", fontsize=8, color=_INK)
            panels[3 + column].set_xlabel("")  # its place is the next row's title
            _draw_colors(panels[5 + column], image, pca_colors(maps.patch_tokens), f"PCA {name}")
    return figure


def progress_picture(images: Sequence[Image.Image], maps: Sequence[TokenMaps], *, title: str = "") -> Image.Image:
    """The same pictures at one moment of a training run: picture, PCA of the patches, attention of CLS.

    Pasted together without matplotlib, which takes a second for that many panels, in the middle of a run.

    Args:
        images: n pictures of one size.
        maps: what `read_token_maps` gave for them; one PCA for all, so equal colours mean equal content.
        title: Above the first picture, e.g. the step.

    Raises:
        ValueError: Not one map per picture, or none.
    """
    if len(images) != len(maps) or not images:
        raise ValueError(f"{len(images)} pictures for {len(maps)} token maps; expected one each, and one at least.")
    import matplotlib
    from PIL import ImageDraw, ImageFont

    colors = pca_colors(torch.cat([each.patch_tokens.flatten(0, 1) for each in maps]))
    split = colors.split([each.norms.numel() for each in maps])
    magma = matplotlib.colormaps[_ATTENTION_COLORS]
    rows: list[tuple[str, list[Image.Image]]] = [
        (title, list(images)),
        ("PCA of patches", []),
        ("attention of CLS", []),
    ]
    for each, patches in zip(maps, split, strict=True):
        rows[1][1].append(_pixels(patches.unflatten(0, each.norms.shape)))
        attention = each.attention[0]
        low, high = torch.quantile(attention.flatten(), torch.tensor([0.01, 0.995])).tolist()
        shade = ((attention - low) / max(high - low, 1e-12)).clamp(0, 1)
        rows[2][1].append(_pixels(torch.from_numpy(magma(shade.numpy())[..., :3])))
    height, gap, head = 180, 6, 24  # pixels
    width = round(height * images[0].width / images[0].height)
    page = Image.new("RGB", (len(images) * (width + gap) + gap, len(rows) * (height + head) + gap), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    for number, (name, panels) in enumerate(rows):
        top = number * (height + head)
        pen.text((gap, top + 4), name, fill=_INK, font=font)
        for column, panel in enumerate(panels):
            scaled = panel.resize((width, height), Image.Resampling.BICUBIC)
            page.paste(scaled, (gap + column * (width + gap), top + head))
    return page


# Panels of `curves_figure`: title, then what to draw of the metrics file and its name in the legend.
_CURVES: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "loss terms",
        {
            "loss": "sum",
            "dino_local_loss": "DINO local",
            "dino_global_loss": "DINO global",
            "ibot_loss": "iBOT",
            "koleo_loss": "KoLeo",
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
    ("accuracy on labelled images", {"eval_knn_10": "10-NN", "eval_linear": "linear"}),
    ("spread of CLS", {"feature_std": "std, 1 = everywhere alike", "effective_rank": "effective rank"}),
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
    """Learning curves of a run.

    Args:
        lines: Of `metrics.jsonl`, as dictionaries with `step`.
        num_prototypes: K; draws ln K, the entropy of a target that says nothing.

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
        raise ValueError(f"None of the {len(lines)} lines has a value that this figure draws, such as 'loss'.")
    with matplotlib.rc_context(_STYLE | {"axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.5}):
        rows = -(-len(drawn) // 3)
        figure = Figure(figsize=(10.5, 2.6 * rows))
        # Constrained layout would draw everything several times over.
        figure.subplots_adjust(0.05, 0.2 / rows, 0.97, 1 - 0.1 / rows, wspace=0.3, hspace=0.36)
        for index, (title, curves, names) in enumerate(drawn):
            axis = figure.add_subplot(rows, 3, index + 1)
            axis.set_title(title, color=_INK)
            for color, (key, points) in zip(_LINE_COLORS, curves.items(), strict=False):
                target = axis
                if key == "effective_rank" and curves["feature_std"]:
                    target = axis.twinx()
                    target.grid(False)
                    axis.plot([], [], color=color, lw=1.2, label=f"{names[key]} (right)")
                if points:
                    steps, values = zip(*points, strict=True)
                    target.plot(steps, values, color=color, lw=1.2, label=names[key], marker="o", ms=2)
            if "entropy" in title and num_prototypes:
                axis.axhline(math.log(num_prototypes), color=_INK, lw=0.8, ls="--", label="ln K")
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=6, framealpha=0.6, edgecolor="none")
            axis.set_xlabel("step")
    return figure


def attention_overlay_figure(
    image: Image.Image, attention: Tensor, *, name: str = "CLS", cell: tuple[int, int] | None = None
) -> "Figure":
    """Attention laid over the picture: the mean over the heads, then every head.

    Args:
        image: The picture, in the proportion of the grid.
        attention: (heads, rows, columns), one entry of `read_attention`.
        name: Of the query, for the titles.
        cell: (row, column) of the query where it is a patch; marked.
    """
    heads = len(attention)
    columns = min(heads + 2, 5)
    num_rows = -(-(heads + 2) // columns)
    figure, axes = _panels(image, columns, num_rows=num_rows)
    _draw_image(axes[0], image, "picture")
    maps = [attention.mean(0), *attention]
    titles = [f"{name}, mean of {heads} heads", *(f"head {i + 1}" for i in range(heads))]
    for axis, title, map_ in zip(axes[1:], titles, maps):
        # The picture in grey below, so that colour means attention and nothing else.
        axis.imshow(image.convert("L"), cmap="gray", vmin=0, vmax=255)
        low, high = torch.quantile(map_.flatten(), torch.tensor([0.01, 0.995])).tolist()
        shade = ((map_ - low) / max(high - low, 1e-12)).clamp(0, 1)
        _draw_map(axis, image, map_, title, cmap=_ATTENTION_COLORS, vmin=low, vmax=max(high, low + 1e-12),
                  alpha=_smooth(0.9 * shade.sqrt(), image))  # fmt: skip
    if cell is not None:
        height, width = image.height / attention.shape[1], image.width / attention.shape[2]
        for axis in axes[: heads + 2]:
            _mark(axis, (cell[1] + 0.5) * width, (cell[0] + 0.5) * height)
    for axis in axes[heads + 2 :]:
        axis.set_visible(False)
    return figure


def layer_norm_figure(report: "ArtifactReport") -> "Figure":
    """Histogram of the patch norms of every layer, with the cut-off where a layer has two modes.

    Args:
        report: From `diagnose`.
    """
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    edges = np.asarray(report.histogram_edges)
    counts = np.asarray([record["histogram"] for record in report.layers], dtype=float)  # (layers, bins)
    shade = np.log1p(counts) / np.log1p(counts.max(axis=1, keepdims=True)).clip(min=1e-9)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 0.9 + 0.17 * len(counts)), layout="constrained")
        axis = figure.add_subplot()
        rows = np.asarray([record["layer"] for record in report.layers])
        # matplotlib wants the edges of the rows, not their middles.
        axis.pcolormesh(edges, np.append(rows - 0.5, rows[-1] + 0.5), np.ma.masked_equal(shade, 0), cmap="Blues",
                        vmin=-0.1, vmax=1)  # fmt: skip
        for record in report.layers:
            if record["bimodal"]:
                axis.vlines(record["cutoff"], record["layer"] - 0.45, record["layer"] + 0.45, color=_MARK, lw=2)
        axis.set(xscale="log", xlabel="norm of a patch token before the final norm", ylabel="layer")
        axis.set_title(f"outliers: {report.outlier_share:.2%} at layer {report.layer}" if report.bimodal else
                       "no distinct outliers", color=_INK)  # fmt: skip
    return figure


def write_report_figures(report: "ArtifactReport", folder: str | Path) -> list[Path]:
    """The pictures of a diagnosis as PNG files: `layer_norms.png`, `positions.png`, and one row per example.

    Args:
        report: From `diagnose`.
        folder: Made if needed.

    Returns:
        The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"layer_norms": layer_norm_figure(report)}
    share = torch.tensor(report.outliers["position_map"])
    blank = Image.new("RGB", (share.shape[1] * 16, share.shape[0] * 16))
    figures["positions"], axes = _panels(blank, 1)
    _draw_map(axes[0], blank, share, f"outliers: in up to {share.max():.0%} of images", cmap=_NORM_COLORS)
    for number, example in enumerate(report.examples):
        image = Image.open(BytesIO(base64.b64decode(example["picture"]))).convert("RGB")
        rows = [] if example["attention_cls"] is None else [example["attention_cls"]]
        attention = torch.tensor(rows + example["attention_registers"])
        figure, axes = _panels(image, len(attention) + 2, with_bar=True)
        _draw_image(axes[0], image, "picture")
        if len(attention):
            _draw_attention(axes[1:-1], image, attention, first=1 - len(rows))
        _draw_norms(figure, axes[-1], image, torch.tensor(example["norms"]))
        figures[f"example_{number:02d}"] = figure
    paths = []
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png")
        paths.append(folder / f"{name}.png")
    return paths


def lost_figure(image: Image.Image, result: "LostResult", *, truth: Sequence[Sequence[float]] = ()) -> "Figure":
    """Object discovery step by step: seed and inverse degree, similarity to the seed, expansion, mask, box.

    Args:
        image: The picture, padded to whole patches as LOST saw it.
        result: From `hf_regvit.lost.lost_box`.
        truth: Boxes to draw beside the found one, (x1, y1, x2, y2) in pixels.
    """
    from matplotlib.patches import Rectangle

    rows, columns = result.degrees.shape
    height, width = image.height / rows, image.width / columns
    figure, axes = _panels(image, 6)
    _draw_image(axes[0], image, "picture")
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
        axis.plot(
            (seed_column + 0.5) * width, (seed_row + 0.5) * height, marker="s", ms=6, mfc="none", mec=_MARK, mew=1.5
        )
    x1, y1, x2, y2 = result.box((round(height), round(width)), (image.height, image.width))
    boxes = [((x1, y1, x2, y2), _MARK, "-"), *((tuple(box), "#ffffff", "--") for box in truth)]
    for (left, top, right, bottom), color, style in boxes:
        frame = Rectangle((left, top), right - left, bottom - top, fill=False, ec=color, lw=2, ls=style)
        axes[5].add_patch(frame)
    return figure


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Writes a figure as PNG."""
    Path(path).write_bytes(_png(figure))


def overview_page(
    model: "RegViTModel",
    images: Mapping[str, Image.Image],
    *,
    image_processor: Any,
    out_dir: str | Path,
    title: str = "What the registers do",
    short_side: int | None = None,
) -> Path:
    """Write a page of whole photographs with their attention maps, PCA and norms.

    Args:
        model: A `RegViTModel`; comes back in the mode and with the attention implementation it had.
        images: Pictures by name, any size and proportion.
        image_processor: Gives the normalisation; resizing and cropping are left out, the grid follows the picture.
        out_dir: Gets `index.html` with all pictures inside, and one PNG per picture.
        title: Heading of the page.
        short_side: Pixels of the shorter side in the model, rounded to patches; default 32 patches.

    Returns:
        Path of `index.html`.

    Raises:
        ValueError: No images.
    """
    if not images:
        raise ValueError("images is empty; give at least one picture by name.")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, (name, image) in enumerate(images.items()):
        resized = fit_to_patches(image.convert("RGB"), patch=model.config.patch_shape, short_side=short_side)
        pixels = image_processor(images=resized, do_resize=False, do_center_crop=False, return_tensors="pt")
        (maps,) = read_token_maps(model, pixels["pixel_values"])
        png = _png(overview_figure(resized, maps))
        # The number keeps names apart that differ in characters only which a file name cannot have.
        file = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)[:80]
        (out_dir / f"{number:03d}_{file}.png").write_bytes(png)
        rows, columns = maps.norms.shape
        caption = f"{resized.width} x {resized.height} px, {columns} x {rows} patches"
        if (similarity := maps.register_similarity()) is not None:
            caption += f", mean cosine between registers {similarity:.2f}"
        entries.append((name, caption, png))
    page = out_dir / "index.html"
    page.write_text(_page_text(title, model, entries), encoding="utf-8")
    return page


def fit_to_patches(image: Image.Image, *, patch: tuple[int, int], short_side: int | None = None) -> Image.Image:
    """Resize a picture, keeping its proportion as closely as whole patches allow.

    Args:
        image: The picture.
        patch: (height, width) of a patch in pixels.
        short_side: Wanted length of the shorter side in pixels; default 32 patches.
    """
    scale = (32 * max(patch) if short_side is None else short_side) / min(image.size)
    height = max(round(image.height * scale / patch[0]), 1) * patch[0]
    width = max(round(image.width * scale / patch[1]), 1) * patch[1]
    return image.resize((width, height), Image.Resampling.BICUBIC)


# --- Drawing


def _panels(
    image: Image.Image, columns: int, *, num_rows: int = 1, with_bar: bool = False
) -> tuple["Figure", list["Axes"]]:
    """A figure whose panels have the proportion of the picture, laid out in inches so that nothing is squeezed."""
    import matplotlib
    from matplotlib.figure import Figure

    area, gap, head, foot = 2.6, 0.08, 0.24, 0.2  # square inches of a panel; inches
    aspect = min(max(image.height / image.width, 1 / 3), 3)
    width = (area / aspect) ** 0.5  # every picture gets the same area, tall or wide
    height = width * aspect
    size = (columns * (width + gap) + gap + (0.4 if with_bar else 0), num_rows * (height + head) + foot)
    with matplotlib.rc_context(_STYLE):
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
    axis.set_title(title, fontsize=8, color=_INK)


def _draw_map(axis: "Axes", image: Image.Image, map_: Tensor, title: str, **options: Any) -> Any:
    """A map over the extent of its picture, upsampled for the eye."""
    extent = (0, image.width, image.height, 0)
    axis.set_title(title, fontsize=8, color=_INK)
    return axis.imshow(map_.numpy(), interpolation="bicubic", extent=extent, **options)


def _mark(axis: "Axes", x: float, y: float) -> None:
    axis.plot(x, y, marker="s", ms=6, mfc="none", mec=_MARK, mew=1.5)


def _smooth(map_: Tensor, image: Image.Image) -> Any:
    """A map in [0, 1] at the size of its picture, as `_draw_map` enlarges it."""
    import numpy as np

    pixels = Image.fromarray((map_ * 255).round().byte().numpy()).resize(image.size, Image.Resampling.BICUBIC)
    return np.asarray(pixels, dtype=np.float32) / 255


def _draw_attention(axes: Sequence["Axes"], image: Image.Image, attention: Tensor, *, first: int = 0) -> None:
    """Maps of CLS and registers in order; `first=1` where there is no CLS."""
    names = ["CLS", *(f"register {i + 1}" for i in range(len(attention)))][first : first + len(attention)]
    for axis, name, map_ in zip(axes, names, attention, strict=True):
        # A few patches with most of the attention would leave the rest of the map black.
        low, high = torch.quantile(map_.flatten(), torch.tensor([0.01, 0.995])).tolist()
        limits = {"vmin": low, "vmax": max(high, low + 1e-12)}
        _draw_map(axis, image, map_, f"attention of {name}", cmap=_ATTENTION_COLORS, **limits)
        axis.set_xlabel(f"{map_.sum().item():.1%} on patches", fontsize=7, labelpad=2)


def _draw_colors(axis: "Axes", image: Image.Image, colors: Tensor, title: str) -> None:
    # Matplotlib's bicubic overshoots the range of colours; Pillow's is cut off at it.
    _draw_image(axis, _pixels(colors).resize(image.size, Image.Resampling.BICUBIC), title)


def _pixels(colors: Tensor) -> Image.Image:
    """(rows, columns, 3) in [0, 1] as a picture of that many pixels."""
    return Image.fromarray((colors * 255).round().byte().numpy())


def _draw_norms(figure: "Figure", axis: "Axes", image: Image.Image, norms: Tensor) -> None:
    drawn = _draw_map(axis, image, norms, "norm of patches", cmap=_NORM_COLORS)
    panel, inch = axis.get_position(), 1 / figure.get_figwidth()
    bar = figure.add_axes((panel.x1 + 0.05 * inch, panel.y0, 0.07 * inch, panel.height))
    figure.colorbar(drawn, cax=bar).outline.set_linewidth(0.5)
    bar.tick_params(labelsize=6, width=0.5, length=2, pad=1)


def _png(figure: "Figure") -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    return buffer.getvalue()


def _page_text(title: str, model: "RegViTModel", entries: Sequence[tuple[str, str, bytes]]) -> str:
    config = model.config
    pictures = "\n".join(
        f"<figure><figcaption><b>{html.escape(name)}</b> <span>{html.escape(size)}</span></figcaption>"
        f'<img alt="maps of {html.escape(name)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'
        for name, size, png in entries
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto; max-width: 90rem;
  padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; }}
p {{ max-width: 60rem; }}
figure {{ margin: 1.2rem 0; }}
figcaption span {{ color: #666; font-size: 0.85rem; }}
img {{ max-width: 100%; height: auto; display: block; }}
</style></head><body>
<h1>{html.escape(title)}</h1>
<p>A RegViT of {config.num_hidden_layers} blocks, width {config.hidden_size}, patch {config.patch_shape[0]} x
{config.patch_shape[1]} px, {config.num_register_tokens} registers, on whole pictures. <b>Attention</b>: last block,
mean over heads, from CLS and from each register to every patch, each map on its own scale; below it the share of
attention that goes to patches at all. Registers whose cosine is near 1 have not parted (yet) and look at the same.
<b>PCA</b>: the three main directions of the picture's patch tokens as red, green, blue. <b>Norm</b>: length of the
patch tokens before the final norm; isolated bright spots are artifacts.</p>
{pictures}
</body></html>
"""
