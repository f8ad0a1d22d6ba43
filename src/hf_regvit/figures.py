"""What a RegViT sees, drawn: attention maps of CLS and registers, PCA of patch tokens, norm maps, and a page of them.

Shape letters: T = 1 + R + N tokens, R registers, N patches in a grid of (rows, columns), D width. All maps keep the
true grid of the picture; nothing is cropped to a square.

Figures are matplotlib objects without pyplot, so they need no display and leave no global state behind.
"""

import base64
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .modeling_regvit import RegViTModel

# Perceptually uniform, readable in grey and with colour-blind eyes.
_ATTENTION_COLORS = "magma"
_NORM_COLORS = "viridis"
_INK = "#222222"
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
        attention: (1 + R, rows, columns) attention in the last block, mean over the heads, from CLS and each register
            to every patch. The sum over a map is the share of attention that goes to patches.
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


def read_token_maps(model: "RegViTModel", pixel_values: Tensor) -> list[TokenMaps]:
    """Run a RegViT once and lay its tokens out on the grid.

    Attention weights exist only in the "eager" implementation; afterwards the model has its own again, and its mode.

    Args:
        model: A `RegViTModel`.
        pixel_values: (B, 3, H, W) normalised; sides are multiples of the patch, in any proportion.

    Returns:
        One entry per picture, on the CPU.
    """
    device = next(model.parameters()).device
    with torch.no_grad(), _eager_and_eval(model):
        output = model(pixel_values.to(device), output_attentions=True, output_hidden_states=True)
    rows, columns = model.embeddings.patch_embeddings.grid_of(pixel_values)
    weights = output.attentions[-1].float().mean(1)  # (B, T, T), queries then keys
    _, _, from_patches = model.split_tokens(weights.transpose(1, 2))  # (B, N, T), keys then queries
    cls_token, registers, _ = model.split_tokens(from_patches.transpose(1, 2))
    attention = torch.cat([cls_token, registers], dim=1)  # (B, 1 + R, N)
    _, _, raw = model.split_tokens(output.hidden_states[-1].float())
    norms = raw.norm(dim=-1)  # (B, N)
    return [
        TokenMaps(
            attention=attention[i].unflatten(-1, (rows, columns)).cpu(),
            patch_tokens=output.patch_tokens[i].float().unflatten(0, (rows, columns)).cpu(),
            norms=norms[i].unflatten(-1, (rows, columns)).cpu(),
            registers=output.register_tokens[i].float().cpu(),
        )
        for i in range(len(pixel_values))
    ]


@contextmanager
def _eager_and_eval(model: "RegViTModel") -> Iterator[None]:
    implementation, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("eager")
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        model.train(training)


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
    _draw_attention(axes[1:-2], image, maps.attention)
    _draw_colors(axes[-2], image, pca_colors(maps.patch_tokens), "PCA of patches")
    _draw_norms(figure, axes[-1], image, maps.norms)
    return figure


def progress_figure(images: Sequence[Image.Image], maps: Sequence[TokenMaps], *, title: str = "") -> "Figure":
    """The same pictures at one moment of a training run: picture, PCA of the patches, attention of CLS.

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
    from matplotlib.figure import Figure

    height, width = 180, round(180 * images[0].width / images[0].height)  # pixels of one panel
    colors = pca_colors(torch.cat([each.patch_tokens.flatten(0, 1) for each in maps]))
    split = colors.split([each.norms.numel() for each in maps])
    magma = matplotlib.colormaps[_ATTENTION_COLORS]
    rows: dict[str, list[Image.Image]] = {title: list(images), "PCA of patches": [], "attention of CLS": []}
    for each, patches in zip(maps, split, strict=True):
        rows["PCA of patches"].append(_pixels(patches.unflatten(0, each.norms.shape)))
        attention = each.attention[0]
        low, high = torch.quantile(attention.flatten(), torch.tensor([0.01, 0.995])).tolist()
        shade = ((attention - low) / max(high - low, 1e-12)).clamp(0, 1)
        rows["attention of CLS"].append(_pixels(torch.from_numpy(magma(shade.numpy())[..., :3])))
    # One picture per row: an axis for each of its panels would take a second to draw.
    gap, head = 6, 26
    size = (len(images) * (width + gap) + gap, len(rows) * (height + head))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(size[0] / _DOTS_PER_INCH, size[1] / _DOTS_PER_INCH))
        for number, (name, panels) in enumerate(rows.items()):
            strip = Image.new("RGB", (size[0], height), "white")
            for column, panel in enumerate(panels):
                strip.paste(panel.resize((width, height), Image.Resampling.BICUBIC), (gap + column * (width + gap), 0))
            bottom = 1 - (number + 1) * (height + head) / size[1]
            axis = figure.add_axes((0, bottom, 1, height / size[1]))
            axis.set_axis_off()
            axis.imshow(strip)
            axis.set_title(name, loc="left", x=gap / size[0], color=_INK)
    return figure


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
    ("accuracy on held-out images", {"eval_knn_10": "10-NN", "eval_linear": "linear"}),
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
        figure = Figure(figsize=(10.5, 2.6 * rows), layout="constrained")
        for index, (title, curves, names) in enumerate(drawn):
            axis = figure.add_subplot(rows, 3, index + 1)
            axis.set_title(title, color=_INK)
            for color, (key, points) in zip(_LINE_COLORS, curves.items(), strict=False):
                target = axis
                if key == "effective_rank" and curves["feature_std"]:
                    target = axis.twinx()
                    target.grid(False)
                    target.set_ylabel(names[key], color=color)
                if points:
                    steps, values = zip(*points, strict=True)
                    target.plot(steps, values, color=color, lw=1.2, label=names[key], marker="o", ms=2)
            if "entropy" in title and num_prototypes:
                axis.axhline(math.log(num_prototypes), color=_INK, lw=0.8, ls="--", label="ln K")
            if any(points and key != "effective_rank" for key, points in curves.items()):
                axis.legend(fontsize=6, framealpha=0.6, edgecolor="none")
            axis.set_xlabel("step")
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


def _draw_attention(axes: Sequence["Axes"], image: Image.Image, attention: Tensor) -> None:
    names = ["CLS", *(f"register {i + 1}" for i in range(len(attention) - 1))]
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
