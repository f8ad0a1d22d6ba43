"""The demo: a page on which anybody can look into a vision transformer, and into two of them side by side.

One HTML component shows all maps. A map is a picture of a few pixels, one per patch, laid over the photograph by the
browser, so a click costs no drawing. Nothing on the page comes from elsewhere: no fonts, no scripts, no analytics.
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
_MEAN = "mean of all"
_SMOOTH = 4  # times finer than the patches; the browser does the rest

_TITLE = "What does a vision transformer look at?"
_LEAD = (
    "It cuts a picture into patches that ask each other for information: attention. Large models reuse a few "
    "background patches as notepads. Those become <b>artifacts</b>, with a huge norm and no longer showing what is "
    "there. <b>Registers</b> are extra tokens that take the notes instead."
)
_HELP = """
- **Click any map**: the square moves there, and the first maps answer for that patch. The dot under the mouse shows
  the same place in all maps.
- **Orange frames** mark artifacts. The cut-off is not chosen by hand: it lies between two distinct groups of norms,
  over {reference} photographs and for every block. A model without such groups has no frames.
- **Attention** maps are bright where a token looks, each on its own scale; below is the share that goes to patches at
  all (the rest goes to CLS and to the registers), and the peak: how many times the mean patch the brightest one gets.
  A peak near 1 is a flat map, however colourful.
- **PCA** paints tokens that say similar things in similar colours. Artifacts break the areas of one colour.
- **Object** is LOST, which needs no labels: it grows from a patch that few others resemble.
- **Block** walks through the depth of the model, **head** through the parts of its attention.
- All is computed on this machine, pictures are forgotten after an hour, and nothing is sent anywhere else.
"""


@dataclass(frozen=True)
class Question:
    """What somebody asks. `place` is (x, y) in [0, 1) from the top left; `head` counts from 1, 0 is the mean."""

    models: tuple[str, ...]
    side: int
    layer: int
    head: int = 0
    place: tuple[float, float] = (0.5, 0.5)


# --- The page without the framework: questions in, HTML and files out ---


def look(explorer: Explorer, picture: Picture, question: Question) -> dict[str, View]:
    """The view of every model. Block n of the first model is compared with the block as far from the end of others."""
    depth = explorer.descriptions[question.models[0]].num_layers
    views = {}
    for name in question.models:
        layer = max(explorer.descriptions[name].num_layers - (depth - question.layer), 1)
        views[name] = explorer.view(picture, name, side=question.side, layer=layer)
    return views


def results_page(views: Mapping[str, View], question: Question) -> str:
    """All maps of one picture as HTML; two models are A and B."""
    shown = dict(zip("AB", views.values()))
    head = None if question.head == 0 else question.head - 1
    heads = "mean over the heads" if head is None else f"head {question.head}"
    patch = [
        _kind("Picture", "What the model gets. Orange frames are artifacts.", shown, partial(_picture, question)),
        _kind("Where it looks", f"Bright is where this patch asks; {heads}.", shown, partial(_patch, question, head)),
        _kind("Patches like it", "Bright patches say nearly the same.", shown, partial(_similar, question)),
    ]
    whole = [
        _kind("Where CLS looks", f"CLS sums the picture up; {heads}.", shown, partial(_query, head, "cls")),
        _kind("Norms", "Length of the tokens. Orange: out of proportion.", shown, _norms),
        _kind("PCA", "Similar colours: similar tokens.", shown, _colors),
        _kind("Object", "Found without any labels, by LOST.", shown, _object),
    ]
    body = _section(
        "One patch", "The white square. Click on any map to move it, or use the arrow keys on the picture.", patch
    )
    body += _section("The whole picture", "What the chosen block makes of it.", whole)
    counts = {letter: view.description.num_register_tokens for letter, view in shown.items()}
    if most := max(counts.values()):
        kinds = []
        for i in range(most):
            owners = {letter: view for letter, view in shown.items() if i < counts[letter]}
            kinds.append(_kind(f"Register {i + 1}", f"What it gathers; {heads}.", owners, partial(_query, head, i)))
        body += _section("The registers", "Tokens with no place in the picture. Bright is where they look.", kinds)
    cards = "".join(_card(name, view, letter) for (name, view), letter in zip(views.items(), "AB"))
    if len(shown) == 2:
        cards = f"<p class=verdict>{_verdict(*views.values())}</p>{cards}"
    first = next(iter(views.values()))
    image, (row, column) = first.image, first.cell(question.place)
    style = f"--picture:url(data:image/jpeg;base64,{_jpeg(image)});--ratio:{image.width}/{image.height}"
    # For the arrow keys, which walk over the patches of the first model.
    grid = f"data-rows={first.grid[0]} data-columns={first.grid[1]} data-row={row} data-column={column}"
    return f'<div class="looks models-{len(views)}" style="{style}" {grid}><div class=cards>{cards}</div>{body}</div>'


def _section(title: str, text: str, kinds: Sequence[str]) -> str:
    columns = "three" if len(kinds) == 3 else "four"
    return f'<section><h2>{title}</h2><p>{text}</p><div class="kinds {columns}">{"".join(kinds)}</div></section>'


def _verdict(a: View, b: View) -> str:
    """Both models in one sentence."""
    in_a, in_b = int(a.outliers.sum()), int(b.outliers.sum())
    if in_a and in_b:
        return f"Both have artifacts in this picture: A {in_a}, B {in_b}."
    if not in_a and not in_b:
        return "Neither has artifacts in this picture."
    return f"{'A' if in_a else 'B'} has {max(in_a, in_b)} artifacts in this picture, {'B' if in_a else 'A'} has none."


def _card(name: str, view: View, letter: str) -> str:
    """One model's verdict on the picture."""
    d, outliers = view.description, view.outliers
    count, total = int(outliers.sum()), outliers.numel()
    if count:
        big, usual = view.norms[outliers].median().item(), view.norms[~outliers].median().item()
        are = "is an artifact" if count == 1 else "are artifacts"
        kind = "found"
        words = f"<b>{count} of {total} patches {are}</b>: {big / usual:.0f} times the norm of the others."
    elif view.cutoff is None:
        kind, words = "clean", "<b>No distinct artifacts</b> in this model at this block."
    else:
        kind, words = "clean", "<b>No artifacts in this picture</b>, though the model makes them in others."
    if d.has_cls:
        share = f"{view.attention_from('cls')[outliers].sum().item():.0%}"
        words += f"<span class=share style=--share:{share}>Artifacts take {share} of CLS's attention.<i></i></span>"
    registers = f"{d.num_register_tokens} registers" if d.num_register_tokens else "no registers"
    size = f"{view.image.width} x {view.image.height} px = {view.grid[1]} x {view.grid[0]} patches"
    return (
        f'<div class="card {kind}"><i class=letter>{letter}</i><div><h3>{html.escape(name)}</h3>'
        f"<p>{words}</p><small>{registers}, block {view.layer} of {d.num_layers}, {size}</small></div></div>"
    )


def _kind(title: str, text: str, shown: Mapping[str, View], draw: Callable[[View, str], str]) -> str:
    """One kind of map for every model, by letter."""
    maps = "".join(draw(view, letter) for letter, view in shown.items())
    return f"<article><h3>{title}</h3><p>{text}</p><div class=pair>{maps}</div></article>"


def _figure(
    view: View, letter: str, label: str, *, layers: str = "", note: str = "", grey: bool = False, keys: bool = False
) -> str:
    """The photograph, what lies over it, and a note below. `layers` are images and drawings; `keys`: takes arrows."""
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
    label = f"the picture; the patch in column {column + 1}, row {row + 1} is asked about"
    marks = _frames(view, view.outliers) + _frames(view, _at(view, (row, column)), kind="query")
    if letter == "A":
        label += ", the arrow keys choose another one"
    return _figure(view, letter, label, layers=marks, note=note, keys=letter == "A")


def _patch(question: Question, head: int | None, view: View, letter: str) -> str:
    cell = view.cell(question.place)
    return _attention(view, letter, "the clicked patch", cell, head)


def _query(head: int | None, query: Any, view: View, letter: str) -> str:
    if query == "cls" and not view.description.has_cls:
        return _missing(letter, "This model has no CLS token.")
    return _attention(view, letter, "CLS" if query == "cls" else f"register {query + 1}", query, head)


def _attention(view: View, letter: str, name: str, query: Any, head: int | None) -> str:
    if head is not None and head >= view.description.num_heads:
        return _missing(letter, f"This model has {view.description.num_heads} heads.")
    map_ = view.attention_from(query, head=head)
    # A few patches with most of the attention would leave the rest of the map black.
    low, high = torch.quantile(map_.flatten(), torch.tensor([0.01, 0.995])).tolist()
    shade = ((map_ - low) / max(high - low, 1e-12)).clamp(0, 1)
    marks = _frames(view, _at(view, query), kind="query") if isinstance(query, tuple) else ""
    layers = _image(_overlay(shade)) + marks
    # Maps have scales of their own; this tells a map with a peak from one that is flat.
    note = f"{map_.sum():.1%} on patches, peak {map_.max() / map_.mean():.2g} x"
    return _figure(view, letter, f"attention of {name}", layers=layers, note=note, grey=True)


def _similar(question: Question, view: View, letter: str) -> str:
    cell = view.cell(question.place)
    map_ = view.similarity_to(cell)
    low = map_.min().item()
    shade = (map_ - low) / max(1 - low, 1e-6)
    layers = _image(_smooth(_colored(shade, "viridis"))) + _frames(view, _at(view, cell), kind="query")
    return _figure(view, letter, "similarity to the clicked patch", layers=layers, note=f"cosine {low:.2f} to 1")


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
    # Dark around the mask, the box in orange.
    dark = torch.zeros(rows, columns, 4)
    dark[..., 3] = 0.62 * (~found.mask).float()
    box = f'<rect x="{x1}" y="{y1}" width="{x2 - x1}" height="{y2 - y1}" class=box />'
    layers = _image(_pixels(dark), kind="pixels") + _drawing(view, box)
    note = f"{int(found.mask.sum())} of {rows * columns} patches"
    if found.degenerate:
        note = "uncertain: patches hardly differ"
    return _figure(view, letter, "the object that LOST finds", layers=layers, note=note)


# --- Pixels ---


def _at(view: View, cell: tuple[int, int]) -> Tensor:
    mask = torch.zeros(view.grid, dtype=torch.bool)
    mask[cell] = True
    return mask


def _frames(view: View, mask: Tensor, *, kind: str = "outlier") -> str:
    cells = mask.nonzero().tolist()
    kinds = ("under", kind) if kind == "query" else (kind,)  # white on dark, to be seen on a white wall too
    shapes = (f'<rect x="{c}" y="{r}" width="1" height="1" class={name} />' for r, c in cells for name in kinds)
    return _drawing(view, "".join(shapes))


def _drawing(view: View, shapes: str) -> str:
    rows, columns = view.grid
    box = f'viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" aria-hidden="true"'
    return f"<svg {box}>{shapes}</svg>" if shapes else ""


def _colored(shade: Tensor, colors: str) -> Image.Image:
    """(rows, columns) in [0, 1] as a picture of that many pixels."""
    from matplotlib import colormaps

    return Image.fromarray((colormaps[colors](shade.numpy())[..., :3] * 255).round().astype(np.uint8))


def _overlay(shade: Tensor) -> Image.Image:
    """Attention as colour over grey: where there is none, the photograph shows through."""
    fine = Image.fromarray((shade.numpy() * 255).round().astype(np.uint8))
    fine = fine.resize((fine.width * _SMOOTH, fine.height * _SMOOTH), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.asarray(fine, dtype=np.float32) / 255)
    colored = _colored(values, "magma")
    colored.putalpha(Image.fromarray((230 * values.sqrt().numpy()).round().astype(np.uint8)))
    return colored


def _pixels(values: Tensor) -> Image.Image:
    """(rows, columns, 3 or 4) in [0, 1] as a picture of that many pixels."""
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
    """The same maps for a paper: a ZIP of PNG files, drawn by `hf_regvit.figures`."""
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
    """CLS, registers and patches as safetensors, one file; of two models a ZIP of two."""
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
    """Of at most 80 bytes: with two of them in it a name stays below the 255 bytes of most file systems."""
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
    return plain.encode()[:80].decode(errors="ignore")


def _file_names(views: Mapping[str, View]) -> dict[str, str]:
    """Names of the models for files; those that would fall together get the letters that the page gives them."""
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
    """The demo as a Gradio app; start it with `app.launch(**launch_options())`.

    Args:
        models: Model and image processor by name, as `features.load_model` gives them. The first is shown.
        compare: Name of the model to show beside it.
        cache_bytes: Memory for what was read of pictures.
        reference: Pictures that tell which norms are usual in a model; default the embedded photographs.

    Raises:
        ImportError: Gradio is missing.
        ValueError: No models, one of no known family, or `compare` that is none of them.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("The demo needs Gradio. Run: pip install 'hf_regvit[demo]'")
    if compare is not None and compare not in models:
        raise ValueError(f"compare='{compare}' is not among the models {', '.join(models)}.")
    reference = list(photographs().values()) if reference is None else list(reference)
    return _Page(Explorer(models, cache_bytes=cache_bytes, reference=reference), compare, len(reference)).app


def launch_options(*, port: int | None = None) -> dict[str, Any]:
    """What `app.launch` is told: this machine only, nothing shared, no files of the disk, no fonts from elsewhere.

    Args:
        port: To listen on; 0 or None takes the first free one from 7860.
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
    """Load models, show the page on this machine and wait until somebody presses Ctrl-C.

    Args:
        model_name_or_path: As for `features.load_model`.
        compare: Another one, shown beside the first.
        port: To listen on; 0 takes the first free one from 7860.
        cache_mib: Memory for pictures that were read.
        device: Where to compute.

    Returns:
        The page's address.
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
            f"Port {port} of this machine is taken, perhaps by another demo. Choose one with --port, or --port 0 for "
            "the first free one."
        ) from error
    logger.info("The demo is at %s (Ctrl-C ends it).", address)
    try:
        app.block_thread()
    finally:
        app.close()
    return {"address": address}


def _name_of(source: str, others: Sequence[str]) -> str:
    """A folder's last two parts (the last is often called `backbone`), or all where another one ends alike."""
    last = "/".join(Path(source).resolve().parts[-2:])
    alike = [other for other in others if "/".join(Path(other).resolve().parts[-2:]) == last]
    return last if Path(source).is_dir() and len(alike) == 1 else source


class _Page:
    """Components and what happens between them."""

    def __init__(self, explorer: Explorer, compare: str | None, num_reference: int) -> None:
        import gradio as gr

        self.explorer = explorer
        self.downloads = tempfile.TemporaryDirectory(prefix="regvit_demo_")  # gone when the program ends
        chosen = photographs()
        self.examples = {name: Picture.of(chosen[name], name) for name in EXAMPLES}
        # Gradio's copies of uploads and downloads are deleted after an hour.
        self.app = gr.Blocks(analytics_enabled=False, title=_TITLE, delete_cache=(600, 3600))
        with self.app:
            # Nothing until the page is loaded: a forgotten picture must not turn into an example at the next click.
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
            label="Your picture", show_label=False, file_types=["image"], height=132, elem_id="upload"
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
                label="Resolution: shorter side, pixels",
            )  # fmt: skip
            self.layer = gr.Slider(step=1, label="Block", elem_id="layer", **_blocks(description.num_layers))
            self.head = gr.Dropdown(
                _heads(description.num_heads), value=0, label="Head of the attention", elem_id="head-choice"
            )

    def _connect(self) -> None:
        import gradio as gr

        def pick(event: gr.EventData) -> Picture:
            return self.examples[event.name]

        def point(event: gr.EventData) -> tuple[float, float]:
            return float(event.x), float(event.y)

        asked = [self.picture, self.place, self.model, self.compare, self.side, self.layer, self.head]
        # One reading at a time. Of what is asked meanwhile (a slider that is being moved, clicks in a row) the last
        # counts; Gradio's default would drop all of it. A click's place has to be stored each time, and in order.
        common: dict[str, Any] = {"concurrency_id": "read", "concurrency_limit": 1, "api_visibility": "private"}
        quick: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        show: dict[str, Any] = {
            "fn": _told("This could not be shown", self._show), "inputs": asked, "outputs": self.results,
            "show_progress": "minimal", "trigger_mode": "always_last", **common,
        }  # fmt: skip
        stored: dict[str, Any] = {"trigger_mode": "multiple", "concurrency_limit": 1, **quick}
        self.app.load(lambda: self.examples[EXAMPLES[0]], None, self.picture, **quick).success(**show)
        self.app.load(None, js=_ON_A_PHONE, api_visibility="private")
        read = _told("This file cannot be used", self._open)
        opened = self.upload.upload(read, self.upload, self.picture, **quick)
        opened.success(**show)
        opened.success(None, js=_NONE_PICKED, api_visibility="private")
        for ended in (opened.success, opened.failure):  # the field is free for the next file, good or bad
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
                _told("The file could not be made", write), asked, self.file, show_progress_on=[button], **common
            )
            done.success(None, js=_PRESS, api_visibility="private")

    def _views(self, picture: Picture | None, place: Any, *settings: Any) -> tuple[dict[str, View], Question]:
        if picture is None:
            raise ValueError("The picture is not kept any more (an hour at most). Choose or upload it again.")
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
        """Sliders and heads of another model: about the same resolution, the last block, the mean of the heads."""
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
        """Range of the resolution: 4 to 48 patches, and where a model was made for fewer or more, those too."""
        step, usual = max(self.explorer.descriptions[model].patch_size), self.explorer.default_side(model)
        return min(4 * step, usual), max(48 * step, usual)

    def _figures(self, picture: Picture, place: Any, *settings: Any) -> str:
        views, question = self._views(picture, place, *settings)
        return str(write_figures(views, picture, question, self._folder()))

    def _features(self, picture: Picture, place: Any, *settings: Any) -> str:
        views, _ = self._views(picture, place, *settings)
        return str(write_features(views, picture, self._folder()))

    def _folder(self) -> Path:
        """A new folder for a download; Gradio copies what it serves, so the ones before the last can go."""
        folders = sorted(Path(self.downloads.name).iterdir(), key=lambda folder: folder.stat().st_mtime)
        for old in folders[:-4]:
            shutil.rmtree(old)
        return Path(tempfile.mkdtemp(dir=self.downloads.name))


def _told(title: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Errors of a handler as messages on the page. What was not foreseen goes to the log, not to the visitor."""
    import gradio as gr

    @wraps(function)
    def told(*args: Any) -> Any:
        try:
            return function(*args)
        except ValueError as error:  # bad pictures and settings; the text says what to do
            raise gr.Error(html.escape(f"{title}. {error}"), duration=20, print_exception=False) from error
        except (RuntimeError, OSError, MemoryError) as error:
            logger.exception("%s", title)
            words = f"{title}. The log of the machine that computes says why. A lower resolution may help."
            raise gr.Error(words, duration=20, print_exception=False) from error

    return told


def _blocks(count: int) -> dict[str, Any]:
    """The slider of the blocks, at the last one. A slider has to have a range, also over a single block."""
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

# There the settings would push the maps off the screen.
_ON_A_PHONE = "() => { if (innerWidth < 768) document.querySelector('#settings button').click(); }"

# The file is ready only now, and a link can be pressed only by a script.
_PRESS = "() => setTimeout(() => (document.querySelector('#file a') || document.querySelector('#file')).click(), 100)"
