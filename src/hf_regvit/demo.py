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
_NOBODY = "none"
_MEAN = "mean of all"
_SMOOTH = 4  # times finer than the patches; the browser does the rest

_TITLE = "What does a vision transformer look at?"
_LEAD = (
    "A vision transformer cuts a picture into patches and lets them ask each other for information: attention. "
    "Large models without <b>registers</b> reuse a few background patches as notepads. Those become <b>artifacts</b>: "
    "patches with a huge norm that no longer show what is there, and that attention keeps coming back to. Registers "
    "are extra tokens that take the notes instead."
)
_HELP = """
- **Click any map**: the square moves there, and the first maps answer for that patch. The dot under the mouse shows
  the same place in all maps.
- **Orange frames** mark artifacts. The cut-off is not chosen by hand: it lies between two distinct groups of norms,
  over {reference} photographs and for every block. A model without such groups has no frames.
- **Attention** maps are bright where a token looks, each on its own scale; below is the share that goes to patches at
  all. The rest goes to CLS, to the registers, or to the token itself.
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
        _kind("Picture", "What the model gets. Click anywhere.", shown, partial(_picture, question)),
        _kind("Where it looks", f"Its attention, {heads}.", shown, partial(_patch, question, head)),
        _kind("Patches like it", "Cosine of the tokens.", shown, partial(_similar, question)),
    ]
    whole = [
        _kind("Where CLS looks", f"CLS sums it up; {heads}.", shown, partial(_query, head, "cls")),
        _kind("Norms", "Bright is large. Orange: artifacts.", shown, _norms),
        _kind("PCA", "Similar colours: similar tokens.", shown, _colors),
        _kind("Object", "Found without labels, by LOST.", shown, _object),
    ]
    body = _section("The patch you clicked", patch) + _section("The whole picture", whole)
    counts = {letter: view.description.num_register_tokens for letter, view in shown.items()}
    if most := max(counts.values()):
        kinds = []
        for i in range(most):
            owners = {letter: view for letter, view in shown.items() if i < counts[letter]}
            kinds.append(_kind(f"Register {i + 1}", f"Its attention, {heads}.", owners, partial(_query, head, i)))
        body += _section("Where the registers look", kinds, narrow=min(counts.values()) == 0)
    cards = "".join(_card(name, view, letter) for (name, view), letter in zip(views.items(), "AB"))
    first = next(iter(views.values())).image
    style = f"--picture:url(data:image/jpeg;base64,{_jpeg(first)});--ratio:{first.width}/{first.height}"
    return f'<div class="looks models-{len(views)}" style="{style}"><div class=cards>{cards}</div>{body}</div>'


def _section(title: str, kinds: Sequence[str], *, narrow: bool = False) -> str:
    """`narrow` where each kind has one map although two models are shown."""
    return f'<section><h2>{title}</h2><div class="kinds{" narrow" * narrow}">{"".join(kinds)}</div></section>'


def _card(name: str, view: View, letter: str) -> str:
    """One model's verdict on the picture."""
    d, outliers = view.description, view.outliers
    count, total = int(outliers.sum()), outliers.numel()
    if count:
        big, usual = view.norms[outliers].median().item(), view.norms[~outliers].median().item()
        words = f"<b>{count} of {total} patches are artifacts</b>: norm {big:.0f}, the others {usual:.0f}."
        if d.has_cls:
            share = view.attention_from("cls")[outliers].sum().item()
            words += f" They draw {share:.0%} of the attention of CLS."
        kind = "found"
    elif view.cutoff is None:
        kind, words = "clean", "<b>No distinct artifacts</b> in this model at this block."
    else:
        kind, words = "clean", "<b>No artifacts in this picture</b>, though the model makes them in others."
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


def _figure(view: View, letter: str, label: str, *, layers: str = "", note: str = "", grey: bool = False) -> str:
    """The photograph, what lies over it, and a note below. `layers` are images and drawings."""
    base = "base grey" if grey else "base"
    return (
        f'<figure><div class=map role=img aria-label="{html.escape(label)}"><div class="{base}"></div>{layers}'
        f"<i class=dot></i></div><figcaption><i class=letter>{letter}</i> {note}</figcaption></figure>"
    )


def _missing(letter: str, reason: str) -> str:
    caption = f"<figcaption><i class=letter>{letter}</i></figcaption>"
    return f'<figure><div class="map empty"><span>{reason}</span></div>{caption}</figure>'


def _picture(question: Question, view: View, letter: str) -> str:
    row, column = view.cell(question.place)
    note = f"patch {column + 1}, {row + 1}"
    marks = _frames(view, view.outliers) + _frames(view, _at(view, (row, column)), kind="query")
    return _figure(view, letter, f"the picture, {note} marked", layers=marks, note=note)


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
    return _figure(view, letter, f"attention of {name}", layers=layers, note=f"{map_.sum():.1%} on patches", grey=True)


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
    return _drawing(view, "".join(f'<rect x="{c}" y="{r}" width="1" height="1" class={kind} />' for r, c in cells))


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
    path = folder / f"{_file_name(picture.name)}_figures.zip"
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
                archive.write(file, f"{_file_name(name)}/block_{view.layer}_{label}.png")
                file.unlink()
    return path


def write_features(views: Mapping[str, View], picture: Picture, folder: Path) -> Path:
    """CLS, registers and patches as safetensors, one file; of two models a ZIP of two."""
    paths = []
    for name, view in views.items():
        path = folder / f"{_file_name(picture.name)}_{_file_name(name)}_block_{view.layer}.safetensors"
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
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)[:80]


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
        "footer_links": [], "quiet": True, "theme": theme, "css": _STYLE,
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
    _, address, _ = app.launch(**launch_options(port=port), prevent_thread_lock=True)
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
            self.picture = gr.State(self.examples[EXAMPLES[0]], time_to_live=3600)
            self.place = gr.State((0.5, 0.5))
            gr.HTML(f"<header><h1>{_TITLE}</h1><p>{_LEAD}</p></header>", elem_id="head")
            with gr.Row(elem_id="layout", equal_height=False):
                with gr.Column(elem_id="choose", min_width=0):
                    self._choose(compare)
                with gr.Column(elem_id="results", min_width=0):
                    self.results = gr.HTML(js_on_load=_SCRIPT, elem_id="maps", min_height=400)
                    with gr.Row():
                        self.figures = gr.Button("Figures (PNG)", size="md", elem_id="get-figures")
                        self.features = gr.Button("Features (safetensors)", size="md", elem_id="get-features")
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
            f'<button type=button title="{name}" data-name="{name}"><img alt="{name}" '
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
            self.side = gr.Slider(
                4 * step, 48 * step, value=self.explorer.default_side(names[0]), step=step, elem_id="side",
                label="Resolution: shorter side, pixels",
            )  # fmt: skip
            self.layer = gr.Slider(
                1, description.num_layers, value=description.num_layers, step=1, label="Block", elem_id="layer"
            )
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
        # One reading at a time; of a slider that is being moved only the last position counts.
        common: dict[str, Any] = {"concurrency_id": "read", "concurrency_limit": 1, "api_visibility": "private"}
        quick: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        show: dict[str, Any] = {
            "fn": _told("This could not be shown", self._show), "inputs": asked, "outputs": self.results,
            "show_progress": "minimal", **common,
        }  # fmt: skip
        self.app.load(**show)
        self.app.load(None, js=_ON_A_PHONE, api_visibility="private")
        read = _told("This file cannot be used", self._open)
        opened = self.upload.upload(read, self.upload, self.picture, **quick)
        opened.success(**show)
        opened.then(lambda: None, None, self.upload, **quick)  # the field is free for the next file, good or bad
        self.gallery.select(pick, None, self.picture, **quick).success(**show)
        self.results.select(point, None, self.place, **quick).success(**show)
        self.model.input(
            self._adapt, [self.model, self.side], [self.side, self.layer, self.head], **quick
        ).success(**show)  # fmt: skip
        for setting in (self.compare, self.side, self.layer, self.head):
            setting.input(**show, trigger_mode="always_last")
        for button, write in ((self.figures, self._figures), (self.features, self._features)):
            done = button.click(
                _told("The file could not be made", write), asked, self.file, show_progress_on=[button], **common
            )
            done.success(None, js=_PRESS, api_visibility="private")

    def _views(self, picture: Picture, place: Any, *settings: Any) -> tuple[dict[str, View], Question]:
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
        step = max(description.patch_size)
        value = min(max(round(side / step), 4), 48) * step
        return (
            gr.update(minimum=4 * step, maximum=48 * step, step=step, value=value),
            gr.update(maximum=description.num_layers, value=description.num_layers),
            gr.update(choices=_heads(description.num_heads), value=0),
        )

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


def _heads(count: int) -> list[tuple[str, int]]:
    return [(_MEAN, 0), *((f"head {i + 1}", i + 1) for i in range(count))]


def _thumbnail(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((112, 112), Image.Resampling.LANCZOS)


# A click anywhere on a map asks about that place; the mouse shows the same place in all maps.
_SCRIPT = """
const place = (event) => {
  const map = event.target.closest('.map:not(.empty)');
  if (!map) return null;
  const box = map.getBoundingClientRect();
  const inside = (v) => Math.min(Math.max(v, 0), 0.9999);
  return {x: inside((event.clientX - box.left) / box.width), y: inside((event.clientY - box.top) / box.height)};
};
element.addEventListener('click', (event) => { const at = place(event); if (at) trigger('select', at); });
element.addEventListener('mousemove', (event) => {
  const looks = element.querySelector('.looks'), at = place(event);
  if (!looks) return;
  looks.classList.toggle('pointing', !!at);
  if (at) { looks.style.setProperty('--x', at.x * 100 + '%'); looks.style.setProperty('--y', at.y * 100 + '%'); }
});
element.addEventListener('mouseleave', () => element.querySelector('.looks')?.classList.remove('pointing'));
"""

_PICK = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (button) trigger('select', {name: button.dataset.name});
});
"""

# There the settings would push the maps off the screen.
_ON_A_PHONE = "() => { if (innerWidth < 768) document.querySelector('#settings button').click(); }"

# The file is ready only now, and a link can be pressed only by a script.
_PRESS = "() => setTimeout(() => (document.querySelector('#file a') || document.querySelector('#file')).click(), 100)"

_STYLE = """
:root { --soft: #57534e; }
.dark { --soft: #c9c4be; }
.gradio-container { max-width: 84rem !important; margin: 0 auto !important; }
#head header { padding: .4rem 0 .2rem; }
#head h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; font-weight: 700; }
#head p { max-width: 56rem; margin: 0; color: var(--soft); line-height: 1.5; }
#layout { display: grid; grid-template-columns: 19rem minmax(0, 1fr); gap: 1.25rem; align-items: start; }
#choose { position: sticky; top: .5rem; }
#upload { border-radius: .6rem; }
.thumbs { display: grid; grid-template-columns: repeat(4, 1fr); gap: .4rem; }
.thumbs button { padding: 0; border: 0; border-radius: .4rem; overflow: hidden; aspect-ratio: 1; cursor: pointer; }
.thumbs button:hover, .thumbs button:focus-visible { outline: 3px solid #ff7a1a; }
.thumbs img { width: 100%; height: 100%; object-fit: cover; margin: 0; display: block; }
.looks { --mark: #ff7a1a; color: var(--body-text-color); }
.looks h2 { font-size: 1.05rem; margin: 1.4rem 0 .5rem; font-weight: 650; }
.looks .cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: .75rem; }
.looks .card { display: flex; gap: .7rem; background: var(--block-background-fill); border-radius: .6rem;
  padding: .7rem .9rem; border: 1px solid var(--border-color-primary); border-left: .35rem solid; }
.looks .card.found { border-left-color: #d55e00; }
.looks .card.clean { border-left-color: #009e73; }
.looks .card h3 { font-size: .95rem; margin: 0; font-weight: 650; overflow-wrap: anywhere; }
.looks .card p { margin: .1rem 0; font-size: .92rem; line-height: 1.4; }
.looks small { color: var(--soft); font-size: .78rem; }
.looks .letter { display: none; font-style: normal; font-weight: 700; font-size: .72rem; line-height: 1.25rem;
  width: 1.25rem; height: 1.25rem; text-align: center; border-radius: 50%; flex: none;
  background: var(--body-text-color); color: var(--body-background-fill); }
.looks.models-2 .letter { display: inline-block; }
.looks .kinds { display: grid; gap: 1rem .9rem;
  grid-template-columns: repeat(auto-fill, minmax(min(14.5rem, 46%), 1fr)); }
.looks.models-2 .kinds:not(.narrow) { grid-template-columns: repeat(auto-fill, minmax(min(23.5rem, 100%), 1fr)); }
.looks article { display: grid; grid-template-rows: subgrid; grid-row: span 3; gap: 0; align-content: start; }
.looks .pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(0, 1fr)); gap: .5rem; }
.looks.models-2 .kinds:not(.narrow) .pair { grid-template-columns: 1fr 1fr; }
.looks article h3 { font-size: .9rem; font-weight: 600; margin: 0; }
.looks article p { font-size: .78rem; line-height: 1.35; margin: 0 0 .3rem; color: var(--soft); }
.looks figure { margin: 0; min-width: 0; }
.looks figcaption { font-size: .75rem; margin-top: .2rem; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.looks .map { position: relative; aspect-ratio: var(--ratio); overflow: hidden; border-radius: .3rem;
  cursor: crosshair; background: var(--block-background-fill); touch-action: manipulation; }
.looks .map > * { position: absolute; inset: 0; width: 100%; height: 100%; pointer-events: none; }
.looks .map img { object-fit: fill; max-width: none; border-radius: 0; }
.looks .base { background: var(--picture) center / 100% 100%; }
.looks .base.grey { filter: grayscale(1); }
.looks img.pixels { image-rendering: pixelated; }
.looks svg { fill: none; stroke: var(--mark); stroke-width: 2px; }
.looks svg rect { vector-effect: non-scaling-stroke; }
.looks svg .query { stroke: #fff; stroke-width: 2px; paint-order: stroke; filter: drop-shadow(0 0 .04px #000); }
.looks svg .box { stroke-width: 3px; }
.looks .map > .dot { display: none; left: var(--x); top: var(--y); width: 9px; height: 9px; inset-inline-end: auto;
  margin: -4.5px 0 0 -4.5px; border-radius: 50%; background: #fff; border: 1.5px solid #000; }
.looks.pointing .dot { display: block; }
.looks .map.empty { cursor: default; display: grid; place-items: center;
  border: 1px dashed var(--border-color-primary); }
.looks .map.empty span { position: static; width: auto; height: auto; padding: .5rem; font-size: .78rem;
  text-align: center; color: var(--soft); }
footer { display: none !important; }
@media (max-width: 48rem) {
  #layout { grid-template-columns: minmax(0, 1fr); }
  #choose { position: static; }
  #head h1 { font-size: 1.35rem; }
  .gradio-container { padding: .5rem !important; }
  .looks .kinds { gap: .9rem .6rem; }
}
"""
