"""Interactive demo: a web page to explore one vision transformer, or two of them side by side.

A single HTML component shows all maps. A map is a small image with one pixel per patch that the browser lays over the
input image, so that a click needs no drawing. The page loads nothing from elsewhere: no fonts, scripts or analytics.
"""

import base64
import html
import importlib.util
import logging
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .exploration import Explorer, Picture, View
from .features import load_model
from .figures import attention_overlay_figure, lost_figure, overview_figure, save_figure
from .image_guard import ImageLimits, open_image
from .images import photographs

if TYPE_CHECKING:
    import gradio as gr

logger = logging.getLogger(__name__)

EXAMPLES = ("china", "motorcycle", "chelsea", "flower", "coffee", "astronaut", "rocket", "camera")
MAX_UPLOAD = "20mb"
_LIMITS = ImageLimits(max_pixels=50_000_000)
_TEMPLATES = Path(__file__).parent / "templates"
_NOBODY = "none"
_MEAN = "mean over heads"
_SMOOTH = 4  # pixels per patch and side; the browser enlarges further

_TITLE = "What does a vision transformer look at?"
_LEAD = (
    "It cuts an image into patches, which exchange information through attention. Many large models use a few "
    "background patches to store information about the whole image. These patches become <b>artifacts</b>: their "
    "norm is very large, and they no longer describe what they show. <b>Registers</b> are extra tokens that store "
    "this information instead."
)
_HELP = """
- **Click any map** to select a patch. The white square moves there, and the maps under "One patch" show the
  selected patch. The dot under the mouse pointer marks the same place in all maps.
- **Orange frames** mark artifacts. The cut-off is not set by hand. It lies between two distinct groups of norms,
  measured on {reference} reference images for each block. If a block has no such groups, the maps have no frames.
- **Attention** maps are bright where a token attends, and each map has its own scale. The caption gives the share of
  the attention on patches (the rest goes to CLS and to the registers), and the peak, which is the largest attention
  to a patch divided by the mean over patches. A map with a peak near 1 is flat, however colorful it looks.
- **PCA** shows similar tokens in similar colors. Artifacts interrupt areas of uniform color.
- **Object** shows the object that LOST finds without labels. LOST starts from the patch that resembles the fewest
  others.
- **Block** selects how deep in the model the maps are read, and **head** selects one attention head.
- Everything is computed on the machine that runs this demo. Uploaded images are deleted after an hour at most, and
  nothing is sent elsewhere.
"""


@dataclass(frozen=True)
class Question:
    """Settings of one request. `place` is (x, y) in [0, 1) from the top left; `head` counts from 1, 0 is the mean."""

    models: tuple[str, ...]
    side: int
    layer: int
    head: int = 0
    place: tuple[float, float] = (0.5, 0.5)


# --- The page without Gradio: questions in, HTML and files out ---


def look(explorer: Explorer, picture: Picture, question: Question) -> dict[str, View]:
    """Return the view of each model. In the second model, the block is as far from the last one as in the first."""
    depth = explorer.descriptions[question.models[0]].num_layers
    views = {}
    for name in question.models:
        layer = max(explorer.descriptions[name].num_layers - (depth - question.layer), 1)
        views[name] = explorer.view(picture, name, side=question.side, layer=layer)
    return views


def results_page(views: Mapping[str, View], question: Question) -> str:
    """Return all maps of one image as HTML; two models are labeled A and B."""
    shown = dict(zip("AB", views.values()))
    head = None if question.head == 0 else question.head - 1
    heads = "mean over the heads" if head is None else f"head {question.head}"
    patch = [
        _kind("Image", "Input of the model. Orange frames mark artifacts.", shown, partial(_picture, question)),
        _kind(
            "Attention of the patch",
            f"Bright where the patch attends; {heads}.",
            shown,
            partial(_patch, question, head),
        ),
        _kind("Similar patches", "Bright where tokens are similar to the patch.", shown, partial(_similar, question)),
    ]
    whole = [
        _kind("Attention of CLS", f"CLS summarizes the image; {heads}.", shown, partial(_query, head, "cls")),
        _kind("Norms", "L2 norms of the patches. Orange frames mark artifacts.", shown, _norms),
        _kind("PCA", "Similar tokens have similar colors.", shown, _colors),
        _kind("Object", "Found by LOST, without labels.", shown, _object),
    ]
    body = _section(
        "One patch", "Marked by the white square. Click any map to move it, or use the arrow keys on the image.", patch
    )
    body += _section("Whole image", "All patches at the selected block.", whole)
    counts = {letter: view.description.num_register_tokens for letter, view in shown.items()}
    if most := max(counts.values()):
        kinds = []
        for i in range(most):
            owners = {letter: view for letter, view in shown.items() if i < counts[letter]}
            kinds.append(
                _kind(f"Register {i + 1}", f"Bright where it attends; {heads}.", owners, partial(_query, head, i))
            )
        body += _section(
            "Registers", "Extra tokens that belong to no place in the image, and what they attend to.", kinds
        )
    cards = "".join(_card(name, view, letter) for (name, view), letter in zip(views.items(), "AB"))
    if len(shown) == 2:
        cards = f"<p class=verdict>{_verdict(*views.values())}</p>{cards}"
    first = next(iter(views.values()))
    image, (row, column) = first.image, first.cell(question.place)
    style = f"--picture:url(data:image/jpeg;base64,{_jpeg(image)});--ratio:{image.width}/{image.height}"
    # For the arrow keys, which move over the patches of the first model.
    grid = f"data-rows={first.grid[0]} data-columns={first.grid[1]} data-row={row} data-column={column}"
    return f'<div class="looks models-{len(views)}" style="{style}" {grid}><div class=cards>{cards}</div>{body}</div>'


def _section(title: str, text: str, kinds: Sequence[str]) -> str:
    columns = "three" if len(kinds) == 3 else "four"
    return f'<section><h2>{title}</h2><p>{text}</p><div class="kinds {columns}">{"".join(kinds)}</div></section>'


def _verdict(a: View, b: View) -> str:
    """Compare the artifacts of both models in one sentence."""
    in_a, in_b = int(a.outliers.sum()), int(b.outliers.sum())
    if in_a and in_b:
        return f"Both models have artifacts in this image: {in_a} in A, {in_b} in B."
    if not in_a and not in_b:
        return "Neither model has artifacts in this image."
    return f"{'A' if in_a else 'B'} has artifacts in this image ({max(in_a, in_b)}), {'B' if in_a else 'A'} has none."


def _card(name: str, view: View, letter: str) -> str:
    """Return the card that says how many artifacts one model has in the image."""
    d, outliers = view.description, view.outliers
    count, total = int(outliers.sum()), outliers.numel()
    if count:
        big, usual = view.norms[outliers].median().item(), view.norms[~outliers].median().item()
        are = "is an artifact" if count == 1 else "are artifacts"
        kind = "found"
        words = f"<b>{count} of {total} patches {are}</b>, with {big / usual:.0f} times the norm of the others."
    elif view.cutoff is None:
        kind, words = "clean", "<b>No distinct artifacts</b> were found in this model at this block."
    else:
        kind, words = "clean", "<b>No artifacts in this image</b>, but the model has artifacts in others."
    if d.has_cls:
        share = f"{view.attention_from('cls')[outliers].sum().item():.0%}"
        words += (
            f"<span class=share style=--share:{share}>Artifacts receive {share} of the attention of CLS.<i></i></span>"
        )
    registers = f"{d.num_register_tokens} registers" if d.num_register_tokens else "no registers"
    size = f"{view.image.width} x {view.image.height} px = {view.grid[1]} x {view.grid[0]} patches"
    return (
        f'<div class="card {kind}"><i class=letter>{letter}</i><div><h3>{html.escape(name)}</h3>'
        f"<p>{words}</p><small>{registers}, block {view.layer} of {d.num_layers}, {size}</small></div></div>"
    )


def _kind(title: str, text: str, shown: Mapping[str, View], draw: Callable[[View, str], str]) -> str:
    """Return one kind of map for every model, by letter."""
    maps = "".join(draw(view, letter) for letter, view in shown.items())
    return f"<article><h3>{title}</h3><p>{text}</p><div class=pair>{maps}</div></article>"


def _figure(
    view: View, letter: str, label: str, *, layers: str = "", note: str = "", grey: bool = False, keys: bool = False
) -> str:
    """Return the input image with `layers` (images, drawings) over it and a note below; `keys`: accepts arrow keys."""
    base = "base grey" if grey else "base"
    role = "role=application tabindex=0" if keys else "role=img"
    return (
        f'<figure><div class=map {role} aria-label="{html.escape(label)}"><div class="{base}"></div>{layers}'
        f"<i class=dot></i></div><figcaption><i class=letter>{letter}</i> {note}</figcaption></figure>"
    )


def _missing(letter: str, reason: str) -> str:
    caption = f"<figcaption><i class=letter>{letter}</i></figcaption>"
    return f'<figure><div class="map empty"><span>{reason}</span></div>{caption}</figure>'


def _picture(question: Question, view: View, letter: str) -> str:
    row, column = view.cell(question.place)
    note = f"patch {column + 1}, {row + 1}"  # as (x, y)
    label = f"input image; the patch in column {column + 1}, row {row + 1} is selected"
    marks = _frames(view, view.outliers) + _frames(view, _at(view, (row, column)), kind="query")
    if letter == "A":
        label += "; the arrow keys select another one"
    return _figure(view, letter, label, layers=marks, note=note, keys=letter == "A")


def _patch(question: Question, head: int | None, view: View, letter: str) -> str:
    cell = view.cell(question.place)
    return _attention(view, letter, "the selected patch", cell, head)


def _query(head: int | None, query: Any, view: View, letter: str) -> str:
    if query == "cls" and not view.description.has_cls:
        return _missing(letter, "This model has no CLS token.")
    return _attention(view, letter, "CLS" if query == "cls" else f"register {query + 1}", query, head)


def _attention(view: View, letter: str, name: str, query: Any, head: int | None) -> str:
    if head is not None and head >= view.description.num_heads:
        return _missing(letter, f"This model has only {view.description.num_heads} heads.")
    map_ = view.attention_from(query, head=head)
    # Clip, or a few patches with most of the attention would leave the rest of the map black.
    low, high = torch.quantile(map_.flatten(), torch.tensor([0.01, 0.995])).tolist()
    shade = ((map_ - low) / max(high - low, 1e-12)).clamp(0, 1)
    marks = _frames(view, _at(view, query), kind="query") if isinstance(query, tuple) else ""
    layers = _image(_overlay(shade)) + marks
    # Each map has its own scale; the note tells a map with a peak from a flat one.
    note = f"{map_.sum():.1%} on patches, peak {map_.max() / map_.mean():.2g} x mean"
    return _figure(view, letter, f"attention of {name}", layers=layers, note=note, grey=True)


def _similar(question: Question, view: View, letter: str) -> str:
    cell = view.cell(question.place)
    map_ = view.similarity_to(cell)
    low = map_.min().item()
    shade = (map_ - low) / max(1 - low, 1e-6)
    layers = _image(_smooth(_colored(shade, "viridis"))) + _frames(view, _at(view, cell), kind="query")
    return _figure(view, letter, "similarity to the selected patch", layers=layers, note=f"cosine {low:.2f} to 1")


def _norms(view: View, letter: str) -> str:
    norms = view.norms
    low, high = norms.min().item(), norms.max().item()
    shade = (norms - low) / max(high - low, 1e-12)
    layers = _image(_colored(shade, "viridis"), kind="pixels") + _frames(view, view.outliers)
    return _figure(view, letter, "norms of the patches", layers=layers, note=f"{low:.3g} to {high:.3g}")


def _colors(view: View, letter: str) -> str:
    return _figure(view, letter, "PCA of the patches", layers=_image(_smooth(_pixels(view.colors))))


def _object(view: View, letter: str) -> str:
    found = view.object
    rows, columns = view.grid
    x1, y1, x2, y2 = found.cells
    # Darken everything outside of the mask; the box is orange.
    dark = torch.zeros(rows, columns, 4)
    dark[..., 3] = 0.62 * (~found.mask).float()
    box = f'<rect x="{x1}" y="{y1}" width="{x2 - x1}" height="{y2 - y1}" class=box />'
    layers = _image(_pixels(dark), kind="pixels") + _drawing(view, box)
    note = f"{int(found.mask.sum())} of {rows * columns} patches"
    if found.degenerate:
        note = "uncertain: patches hardly differ"
    return _figure(view, letter, "object found by LOST", layers=layers, note=note)


# --- Pixels ---


def _at(view: View, cell: tuple[int, int]) -> Tensor:
    mask = torch.zeros(view.grid, dtype=torch.bool)
    mask[cell] = True
    return mask


def _frames(view: View, mask: Tensor, *, kind: str = "outlier") -> str:
    cells = mask.nonzero().tolist()
    kinds = ("under", kind) if kind == "query" else (kind,)  # white on black, visible on white areas too
    shapes = (f'<rect x="{c}" y="{r}" width="1" height="1" class={name} />' for r, c in cells for name in kinds)
    return _drawing(view, "".join(shapes))


def _drawing(view: View, shapes: str) -> str:
    rows, columns = view.grid
    box = f'viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" aria-hidden="true"'
    return f"<svg {box}>{shapes}</svg>" if shapes else ""


def _colored(shade: Tensor, colors: str) -> Image.Image:
    """Return (rows, columns) values in [0, 1] as a colored image with one pixel per value."""
    from matplotlib import colormaps

    return Image.fromarray((colormaps[colors](shade.numpy())[..., :3] * 255).round().astype(np.uint8))


def _overlay(shade: Tensor) -> Image.Image:
    """Return attention as a colored image that is transparent where there is no attention."""
    fine = Image.fromarray((shade.numpy() * 255).round().astype(np.uint8))
    fine = fine.resize((fine.width * _SMOOTH, fine.height * _SMOOTH), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.asarray(fine, dtype=np.float32) / 255)
    colored = _colored(values, "magma")
    colored.putalpha(Image.fromarray((230 * values.sqrt().numpy()).round().astype(np.uint8)))
    return colored


def _pixels(values: Tensor) -> Image.Image:
    """Return (rows, columns, 3 or 4) values in [0, 1] as an image with one pixel per cell."""
    return Image.fromarray((values * 255).round().byte().numpy())


def _smooth(image: Image.Image) -> Image.Image:
    return image.resize((image.width * _SMOOTH, image.height * _SMOOTH), Image.Resampling.BICUBIC)


def _image(image: Image.Image, *, kind: str = "smooth") -> str:
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return f'<img class={kind} alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _jpeg(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, format="JPEG", quality=90)
    return base64.b64encode(buffer.getvalue()).decode()


# --- Files ---


def write_figures(views: Mapping[str, View], picture: Picture, question: Question, folder: Path) -> Path:
    """Write the maps as figures for a paper: a ZIP archive of PNG files, drawn by `hf_regvit.figures`."""
    path, names = folder / f"{_file_name(picture.name)}_figures.zip", _file_names(views)
    with zipfile.ZipFile(path, "w") as archive:
        for name, view in views.items():
            row, column = cell = view.cell(question.place)
            heads = torch.stack([view.attention_from(cell, head=i) for i in range(view.description.num_heads)])
            maps = view.maps()
            figures = {
                "overview": overview_figure(view.image, maps),
                f"patch_{row}_{column}_heads": attention_overlay_figure(
                    view.image, heads, name=f"patch {row}, {column}", cell=cell
                ),
                "object": lost_figure(view.image, view.object),
            }  # fmt: skip
            for label, figure in figures.items():
                file = folder / "figure.png"
                save_figure(figure, file)
                archive.write(file, f"{names[name]}/block_{view.layer}_{label}.png")
                file.unlink()
    return path


def write_features(views: Mapping[str, View], picture: Picture, folder: Path) -> Path:
    """Write CLS, registers and patches as a safetensors file; for two models, as a ZIP archive of two files."""
    paths, names = [], _file_names(views)
    for name, view in views.items():
        path = folder / f"{_file_name(picture.name)}_{names[name]}_block_{view.layer}.safetensors"
        view.features(picture.name).save(path)
        paths.append(path)
    if len(paths) == 1:
        return paths[0]
    archive_path = folder / f"{_file_name(picture.name)}_features.zip"
    with zipfile.ZipFile(archive_path, "w") as archive:
        for path in paths:
            archive.write(path, path.name)
    return archive_path


def _file_name(name: str) -> str:
    """Return a safe name of at most 80 bytes, so that two of them fit into the 255 bytes that file systems allow."""
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
    return plain.encode()[:80].decode(errors="ignore")


def _file_names(views: Mapping[str, View]) -> dict[str, str]:
    """Return file names for the models; names that would collide get the letters A and B that the page uses."""
    names = {name: _file_name(name) for name in views}
    if len(set(names.values())) == len(names):
        return names
    return {name: f"{letter}_{file}" for letter, (name, file) in zip("AB", names.items())}


# --- The page ---


def build_app(
    models: Mapping[str, tuple[nn.Module, Any]],
    *,
    compare: str | None = None,
    cache_bytes: int = 512 << 20,
    reference: Sequence[Image.Image] | None = None,
) -> "gr.Blocks":
    """Build the demo as a Gradio app; start it with `app.launch(**launch_options())`.

    Args:
        models: Model and image processor by name, as returned by `features.load_model`. The first is shown.
        compare: Name of the model to show beside it.
        cache_bytes: Memory for the readings of images, in bytes.
        reference: Images that show which norms are usual in a model; default the built-in images.

    Raises:
        ImportError: Gradio is missing.
        ValueError: No models, a model of an unknown family, or a name in `compare` that is not in `models`.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("The demo needs Gradio. Run: pip install 'hf_regvit[demo]'")
    if compare is not None and compare not in models:
        raise ValueError(f"compare='{compare}' is not one of the models. Choose from {', '.join(models)}.")
    reference = list(photographs().values()) if reference is None else list(reference)
    return _Page(Explorer(models, cache_bytes=cache_bytes, reference=reference), compare, len(reference)).app


def launch_options(*, port: int | None = None) -> dict[str, Any]:
    """Return options for `app.launch`: local machine only, no sharing, no files of the disk, no external fonts.

    Args:
        port: Port to listen on; 0 or None selects the first free one from 7860 on.
    """
    import gradio as gr

    theme = gr.themes.Default(
        primary_hue="orange", neutral_hue="stone", radius_size="md", font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip
    return {
        "server_name": "127.0.0.1", "server_port": port or None, "share": False, "strict_cors": True,
        "allowed_paths": [], "max_file_size": MAX_UPLOAD, "state_session_capacity": 200, "max_threads": 8,
        "show_error": False, "enable_monitoring": False, "ssr_mode": False, "pwa": False, "mcp_server": False,
        "footer_links": [], "quiet": True, "theme": theme,
        "css": (_TEMPLATES / "demo.css").read_text(encoding="utf-8"),
    }  # fmt: skip


def serve(
    model_name_or_path: Sequence[str], *, compare: str | None, port: int, cache_mib: int, device: str | None
) -> dict[str, Any]:
    """Load models, serve the page on this machine, and wait for Ctrl-C.

    Args:
        model_name_or_path: Folders or Hub ids, as for `features.load_model`.
        compare: Folder or Hub id of another model to show beside the first.
        port: Port to listen on; 0 selects the first free one from 7860 on.
        cache_mib: Memory for the readings of images, in MiB.
        device: Device to compute on.

    Returns:
        Dictionary with the `address` of the page.
    """
    names = list(dict.fromkeys([*model_name_or_path, *([compare] if compare else [])]))
    shown = {name: _name_of(name, names) for name in names}
    models = {shown[name]: load_model(name, device=device) for name in names}
    app = build_app(models, compare=shown[compare] if compare else None, cache_bytes=cache_mib << 20)
    try:
        _, address, _ = app.launch(**launch_options(port=port), prevent_thread_lock=True)
    except OSError as error:
        if "empty port" not in str(error):
            raise
        raise OSError(
            f"Port {port} is already in use, perhaps by another demo. Choose another port with --port, or use "
            "--port 0 for the first free one."
        ) from error
    logger.info("The demo is running at %s. Press Ctrl-C to stop it.", address)
    try:
        app.block_thread()
    finally:
        app.close()
    return {"address": address}


def _name_of(source: str, others: Sequence[str]) -> str:
    """Return the last two parts of a folder (the last is often `backbone`), or all if another model ends the same."""
    last = "/".join(Path(source).resolve().parts[-2:])
    alike = [other for other in others if "/".join(Path(other).resolve().parts[-2:]) == last]
    return last if Path(source).is_dir() and len(alike) == 1 else source


class _Page:
    """Components of the page and their event handlers."""

    def __init__(self, explorer: Explorer, compare: str | None, num_reference: int) -> None:
        import gradio as gr

        self.explorer = explorer
        self.downloads = tempfile.TemporaryDirectory(prefix="regvit_demo_")  # removed when the program ends
        chosen = photographs()
        self.examples = {name: Picture.of(chosen[name], name) for name in EXAMPLES}
        # Gradio's copies of uploads and downloads are deleted after an hour.
        self.app = gr.Blocks(analytics_enabled=False, title=_TITLE, delete_cache=(600, 3600))
        with self.app:
            # None until the page has loaded: Gradio resets an expired state to it, which must not show an example.
            self.picture = gr.State(None, time_to_live=3600)
            self.place = gr.State((0.5, 0.5))
            gr.HTML(f"<header><h1>{_TITLE}</h1><p>{_LEAD}</p></header>", elem_id="head")
            with gr.Row(elem_id="layout", equal_height=False):
                with gr.Column(elem_id="choose", min_width=0):
                    self._choose(compare)
                with gr.Column(elem_id="results", min_width=0):
                    script = (_TEMPLATES / "demo_maps.js").read_text(encoding="utf-8")
                    self.results = gr.HTML(js_on_load=script, elem_id="maps", min_height=400)
                    with gr.Row():
                        self.figures = gr.Button("Download figures (PNG)", size="md", elem_id="get-figures")
                        self.features = gr.Button("Download features (safetensors)", size="md", elem_id="get-features")
                    self.file = gr.DownloadButton("File", visible="hidden", elem_id="file")
                    with gr.Accordion("How to read the maps", open=False):
                        gr.Markdown(_HELP.format(reference=num_reference))
            self._connect()
        self.app.queue(max_size=32, default_concurrency_limit=2, api_open=False)

    def _choose(self, compare: str | None) -> None:
        import gradio as gr

        names = list(self.explorer.models)
        description = self.explorer.descriptions[names[0]]
        self.upload = gr.File(
            label="Your image", show_label=False, file_types=["image"], height=132, elem_id="upload"
        )  # fmt: skip
        thumbnails = "".join(
            f'<button type=button title="{name}" data-name="{name}" aria-pressed={str(name == EXAMPLES[0]).lower()}>'
            f'<img alt="{name}" '
            f'src="data:image/jpeg;base64,{_jpeg(_thumbnail(picture.image))}"></button>'
            for name, picture in self.examples.items()
        )
        self.gallery = gr.HTML(f"<div class=thumbs>{thumbnails}</div>", js_on_load=_PICK, elem_id="examples")
        with gr.Accordion("Model, resolution, block, head", open=True, elem_id="settings"):
            self.model = gr.Dropdown(names, value=names[0], label="Model", elem_id="model")
            self.compare = gr.Dropdown(
                [_NOBODY, *names], value=compare or _NOBODY, label="Compare with", elem_id="compare"
            )
            step = max(description.patch_size)
            low, high = self._sides(names[0])
            self.side = gr.Slider(
                low, high, value=self.explorer.default_side(names[0]), step=step, elem_id="side",
                label="Resolution: shorter side in pixels",
            )  # fmt: skip
            self.layer = gr.Slider(step=1, label="Block", elem_id="layer", **_blocks(description.num_layers))
            self.head = gr.Dropdown(
                _heads(description.num_heads), value=0, label="Attention head", elem_id="head-choice"
            )

    def _connect(self) -> None:
        import gradio as gr

        def pick(event: gr.EventData) -> Picture:
            return self.examples[event.name]

        def point(event: gr.EventData) -> tuple[float, float]:
            return float(event.x), float(event.y)

        asked = [self.picture, self.place, self.model, self.compare, self.side, self.layer, self.head]
        # One reading at a time. Of several requests during a reading (a moving slider, repeated clicks), the last one
        # is served; by default Gradio would drop them all. The place of each click must be stored, and in order.
        common: dict[str, Any] = {"concurrency_id": "read", "concurrency_limit": 1, "api_visibility": "private"}
        quick: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        show: dict[str, Any] = {
            "fn": _told("The maps could not be computed", self._show), "inputs": asked, "outputs": self.results,
            "show_progress": "minimal", "trigger_mode": "always_last", **common,
        }  # fmt: skip
        stored: dict[str, Any] = {"trigger_mode": "multiple", "concurrency_limit": 1, **quick}
        self.app.load(lambda: self.examples[EXAMPLES[0]], None, self.picture, **quick).success(**show)
        self.app.load(None, js=_ON_A_PHONE, api_visibility="private")
        read = _told("This file cannot be used", self._open)
        opened = self.upload.upload(read, self.upload, self.picture, **quick)
        opened.success(**show)
        opened.success(None, js=_NONE_PICKED, api_visibility="private")
        for ended in (opened.success, opened.failure):  # clear the field for the next file in both cases
            ended(lambda: None, None, self.upload, **quick)
        self.gallery.select(pick, None, self.picture, **stored).success(**show)
        self.results.select(point, None, self.place, **stored).success(**show)
        self.model.input(
            self._adapt, [self.model, self.side], [self.side, self.layer, self.head], trigger_mode="always_last",
            **quick,
        ).success(**show)  # fmt: skip
        for setting in (self.compare, self.side, self.layer, self.head):
            setting.input(**show)
        for button, write in ((self.figures, self._figures), (self.features, self._features)):
            done = button.click(
                _told("The file could not be created", write), asked, self.file, show_progress_on=[button], **common
            )
            done.success(None, js=_PRESS, api_visibility="private")

    def _views(self, picture: Picture | None, place: Any, *settings: Any) -> tuple[dict[str, View], Question]:
        if picture is None:
            raise ValueError(
                "The image is no longer available: images are kept for an hour at most. Select or upload it again."
            )
        model, compare, side, layer, head = settings
        names = (model,) if compare in (_NOBODY, model) else (model, compare)
        question = Question(names, side=int(side), layer=int(layer), head=int(head), place=tuple(place))
        return look(self.explorer, picture, question), question

    def _show(self, picture: Picture, place: Any, *settings: Any) -> str:
        views, question = self._views(picture, place, *settings)
        return results_page(views, question)

    def _open(self, path: str) -> Picture:
        name = Path(path).name
        return Picture.of(open_image(path, name=name, limits=_LIMITS), Path(name).stem)

    def _adapt(self, model: str, side: float) -> tuple[Any, Any, Any]:
        """Adapt the controls to another model: a similar resolution, the last block, the mean over heads."""
        import gradio as gr

        description = self.explorer.descriptions[model]
        step, (low, high) = max(description.patch_size), self._sides(model)
        value = min(max(round(side / step) * step, low), high)
        return (
            gr.update(minimum=low, maximum=high, step=step, value=value),
            gr.update(**_blocks(description.num_layers)),
            gr.update(choices=_heads(description.num_heads), value=0),
        )

    def _sides(self, model: str) -> tuple[int, int]:
        """Return the range of the resolution: 4 to 48 patches, extended to the image size of the model if outside."""
        step, usual = max(self.explorer.descriptions[model].patch_size), self.explorer.default_side(model)
        return min(4 * step, usual), max(48 * step, usual)

    def _figures(self, picture: Picture, place: Any, *settings: Any) -> str:
        views, question = self._views(picture, place, *settings)
        return str(write_figures(views, picture, question, self._folder()))

    def _features(self, picture: Picture, place: Any, *settings: Any) -> str:
        views, _ = self._views(picture, place, *settings)
        return str(write_features(views, picture, self._folder()))

    def _folder(self) -> Path:
        """Create a folder for a download and delete old ones; Gradio has copied the files that it serves from them."""
        folders = sorted(Path(self.downloads.name).iterdir(), key=lambda folder: folder.stat().st_mtime)
        for old in folders[:-4]:
            shutil.rmtree(old)
        return Path(tempfile.mkdtemp(dir=self.downloads.name))


def _told(title: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a handler so that its errors appear on the page. Details of unexpected errors go to the log only."""
    import gradio as gr

    @wraps(function)
    def told(*args: Any) -> Any:
        try:
            return function(*args)
        except ValueError as error:  # unusable images and settings; the message says what to do
            raise gr.Error(html.escape(f"{title}. {error}"), duration=20, print_exception=False) from error
        except (RuntimeError, OSError, MemoryError) as error:
            logger.exception("%s", title)
            words = f"{title}. The log of the server contains the reason. A lower resolution may help."
            raise gr.Error(words, duration=20, print_exception=False) from error

    return told


def _blocks(count: int) -> dict[str, Any]:
    """Return options of the block slider, set to the last block. Its range must not be empty, even for one block."""
    return {"minimum": 1, "maximum": max(count, 2), "value": count, "interactive": count > 1}


def _heads(count: int) -> list[tuple[str, int]]:
    return [(_MEAN, 0), *((f"head {i + 1}", i + 1) for i in range(count))]


def _thumbnail(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((112, 112), Image.Resampling.LANCZOS)


_PICK = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button) return;
  for (const each of element.querySelectorAll('button')) each.setAttribute('aria-pressed', each === button);
  trigger('select', {name: button.dataset.name});
});
"""

_NONE_PICKED = (
    "() => document.querySelectorAll('.thumbs button').forEach((b) => b.setAttribute('aria-pressed', false))"
)

# On a phone, open settings would push the maps off the screen.
_ON_A_PHONE = "() => { if (innerWidth < 768) document.querySelector('#settings button').click(); }"

# The file is ready only after the handler has returned, so a script must click the download link.
_PRESS = "() => setTimeout(() => (document.querySelector('#file a') || document.querySelector('#file')).click(), 100)"
