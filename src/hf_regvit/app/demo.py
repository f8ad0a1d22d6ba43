"""Interactive demo: a web page to explore one vision transformer, or two of them side by side.

A single HTML component shows all maps. A map is a small image with one pixel per patch that the browser lays over the
input image, so that a click needs no drawing. The page loads nothing from elsewhere: no fonts, scripts or analytics.
"""

import html
import importlib.util
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode

import torch
from PIL import Image
from torch import nn

from ..data.builtin import builtin_images
from ..data.decoding import ImageLimits, open_image
from ..figures.maps import attention_overlay_figure, lost_figure, overview_figure, save_figure
from ..figures.pages import data_url, render
from ..models.saving import NoSpaceError, free_bytes, whole_file
from ..models.tokens import TokenReader
from .demo_page import TEMPLATES, MapRequest, read_views, results_page
from .exploration import Explorer, InputImage, Place, View

if TYPE_CHECKING:
    import gradio as gr
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

_Shown = TypeVar("_Shown")
_TITLE = "What does a vision transformer look at?"
_NO_COMPARISON = "none"
EXAMPLES = ("china", "motorcycle", "chelsea", "flower", "coffee", "astronaut", "rocket", "camera")
MAX_UPLOAD = "20mb"
_UPLOAD_LIMITS = ImageLimits(max_pixels=50_000_000)


# --- Files ---


def write_figures(views: Mapping[str, View], image: InputImage, request: MapRequest, folder: Path) -> Path:
    """Write the maps as figures for a paper: a ZIP archive of PNG files, drawn by `hf_regvit.figures`."""
    path, names = folder / f"{_file_name(image.name)}_figures.zip", _file_names(views)
    with whole_file(path) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
        for name, view in views.items():
            row, column = cell = view.cell(request.place)
            figures = {
                "overview": overview_figure(view.image, view.maps()),
                "object": lost_figure(view.image, view.object),
            }
            if view.attention is not None:
                heads = [view.attention_from(("patch", *cell), head=i) for i in range(view.description.num_heads)]
                figures[f"patch_{row}_{column}_heads"] = attention_overlay_figure(
                    view.image, torch.stack(heads), name=f"patch {row}, {column}", cell=cell
                )
            for label, figure in figures.items():
                file = folder / "figure.png"
                save_figure(figure, file)
                archive.write(file, f"{names[name]}/block_{view.layer}_{label}.png")
                file.unlink()
    return path


def write_features(views: Mapping[str, View], image: InputImage, folder: Path) -> Path:
    """Write CLS, registers and patches as a safetensors file; for two models, as a ZIP archive of two files."""
    paths, names = [], _file_names(views)
    for name, view in views.items():
        path = folder / f"{_file_name(image.name)}_{names[name]}_block_{view.layer}.safetensors"
        view.features(image.name).save(path)
        paths.append(path)
    if len(paths) == 1:
        return paths[0]
    archive_path = folder / f"{_file_name(image.name)}_features.zip"
    with whole_file(archive_path) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
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
    models: Mapping[str, TokenReader | nn.Module | str | Path],
    *,
    device: str = "auto",
    compare: str | None = None,
    cache_bytes: int = 512 << 20,
    reference: Sequence[Image.Image] | None = None,
    dense_settings: str | None = None,
) -> "gr.Blocks":
    """Build the demo as a Gradio app; start it with `app.launch(**launch_options())`.

    Args:
        models: Models by the name to show: name to open, module or reader; see `open_model`. The first is shown.
        device: Device for models given by name; "auto" is the first of cuda, mps, xpu and cpu that exists.
        compare: Name of the model to show beside it.
        cache_bytes: Memory for the readings of images, in bytes.
        reference: Images that show which norms are usual in a model; default the built-in images.
        dense_settings: File of `regvit dense` with the block, image size and views to begin with.

    Raises:
        ImportError: Gradio is missing.
        ValueError: No models, a model of an unknown family, or a name in `compare` that is not in `models`.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("The demo needs Gradio. Run: pip install 'hf_regvit[demo]'")
    if compare is not None and compare not in models:
        raise ValueError(f"compare='{compare}' is not one of the models. Choose from {', '.join(models)}.")
    explorer = Explorer(models, device=device, cache_bytes=cache_bytes, reference=reference, settings=dense_settings)
    return _Page(explorer, compare).app


def launch_options(*, port: int | None = None, host: str | None = None) -> dict[str, Any]:
    """Return options for `app.launch`: local machine only, no sharing, no files of the disk, no external fonts.

    Requests for other hosts than this machine are refused, so that a page elsewhere cannot reach the demo through a
    name that leads here, and so are bodies that are larger than an image may be. With another address to listen on,
    the host is checked only in a Space, whose name `SPACE_HOST` gives.

    Args:
        port: Port to listen on; 0 or None selects the first free one from 7860 on.
        host: Address to listen on; default the variable `GRADIO_SERVER_NAME`, or 127.0.0.1.
    """
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    address, space = host or os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), os.environ.get("SPACE_HOST")
    hosts = ["127.0.0.1", "localhost", space] if space else ["127.0.0.1", "localhost"]
    if address not in hosts and not space:
        hosts = ["*"]
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(_LimitedBody)]
    theme = gr.themes.Default(
        primary_hue="orange", neutral_hue="stone", radius_size="md", font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip
    return {
        "server_name": address, "server_port": port or None, "app_kwargs": {"middleware": guards},
        "share": False, "strict_cors": True,
        "allowed_paths": [], "max_file_size": MAX_UPLOAD, "state_session_capacity": 200, "max_threads": 8,
        "show_error": False, "enable_monitoring": False, "ssr_mode": False, "pwa": False, "mcp_server": False,
        "footer_links": [], "quiet": True, "theme": theme,
        "css": _part("demo.css"),
    }  # fmt: skip


def serve(
    model: Sequence[str],
    *,
    compare: str | None,
    port: int,
    cache_mib: int,
    host: str | None = None,
    device: str = "auto",
    dense_settings: str | None = None,
) -> dict[str, Any]:
    """Load models, serve the page on this machine, and wait for Ctrl-C.

    Args:
        model: Names of the models to choose from, as for `open_model`.
        compare: Folder or Hub id of another model to show beside the first.
        port: Port to listen on; 0 selects the first free one from 7860 on.
        cache_mib: Memory for the readings of images, in MiB.
        host: Address to listen on; see `launch_options`.
        device: Device to compute on; "auto" is the first of cuda, mps, xpu and cpu that exists.
        dense_settings: File of `regvit dense` with the block, image size and views to begin with.

    Returns:
        Dictionary with the `address` of the page.
    """
    names = list(dict.fromkeys([*model, *([compare] if compare else [])]))
    shown = {name: _name_of(name, names) for name in names}
    models = {shown[name]: name for name in names}
    with _own_files():
        beside = shown[compare] if compare else None
        app = build_app(
            models, device=device, compare=beside, cache_bytes=cache_mib << 20, dense_settings=dense_settings
        )
        try:
            _, address, _ = app.launch(**launch_options(port=port, host=host), prevent_thread_lock=True)
            logger.info("The demo is running at %s. Press Ctrl-C to stop it.", address)
            if host not in (None, "127.0.0.1", "localhost"):
                logger.warning("Everyone who reaches %s can use this page, without a password.", address)
            tunnel = "From another machine, open a tunnel there: ssh -N -L %d:127.0.0.1:%d USER@THIS_MACHINE"
            logger.info(tunnel, app.server_port, app.server_port)
            app.block_thread()
        except OSError as error:
            if "empty port" not in str(error):
                raise
            raise OSError(
                f"Port {port} is already in use, perhaps by another demo. Choose another port with --port, or use "
                "--port 0 for the first free one."
            ) from error
        finally:
            app.close()
    return {"address": address}


@contextmanager
def _own_files() -> Iterator[None]:
    """Keep the files of visitors in a folder of this process, and remove it at every exit, also by SIGTERM."""
    with tempfile.TemporaryDirectory(prefix="regvit_demo_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            del os.environ["GRADIO_TEMP_DIR"]


class _LimitedBody:
    """ASGI middleware that refuses a body larger than an upload may be, and uploads when the disk is nearly full."""

    def __init__(self, app: "ASGIApp") -> None:
        self.app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Pass a request on, and count the bytes of its body."""
        left = 21 << 20  # `MAX_UPLOAD` and the form around it
        length = dict(scope.get("headers", ())).get(b"content-length", b"0")
        refused = None
        if scope["type"] == "http" and (not length.isdigit() or int(length) > left):
            refused = 413, b"The request is too large."
        elif scope["type"] == "http" and scope["path"].endswith("/upload") and _free_for_uploads() < 2 * left:
            refused = 507, b"The disk of the server is full."  # Gradio would leave half of the file behind
        if refused:
            await send({"type": "http.response.start", "status": refused[0], "headers": []})
            await send({"type": "http.response.body", "body": refused[1]})
            return

        async def limited() -> "Message":
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            return message if left >= 0 else {"type": "http.disconnect"}

        await self.app(scope, limited, send)


def _free_for_uploads() -> int:
    """Return the free space for uploads in bytes, after those that stopped half-way ten minutes ago are removed."""
    folder = Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir())
    if "GRADIO_TEMP_DIR" in os.environ:
        for part in folder.glob("tmp*"):
            if part.is_file() and time.time() - part.stat().st_mtime > 600:
                part.unlink(missing_ok=True)
    return free_bytes(folder)


def _name_of(source: str, others: Sequence[str]) -> str:
    """Return the last two parts of a folder (the last is often `backbone`), or all if another model ends the same."""
    last = "/".join(Path(source).resolve().parts[-2:])
    alike = [other for other in others if "/".join(Path(other).resolve().parts[-2:]) == last]
    return last if Path(source).is_dir() and len(alike) == 1 else source


class _Page:
    """Components of the page and their event handlers."""

    def __init__(self, explorer: Explorer, compare: str | None) -> None:
        import gradio as gr

        self.explorer = explorer
        # Removed when the program ends.
        self.downloads = tempfile.TemporaryDirectory(dir=os.environ.get("GRADIO_TEMP_DIR"))
        chosen = builtin_images()
        self.examples = {name: InputImage.of(chosen[name], name) for name in EXAMPLES}
        # Gradio's copies of uploads and downloads are deleted after an hour.
        self.app = gr.Blocks(analytics_enabled=False, title=_TITLE, delete_cache=(600, 3600))
        with self.app:
            # None until the page has loaded: Gradio resets an expired state to it, which must not show an example.
            self.image = gr.State(None, time_to_live=3600)
            self.place = gr.State((0.5, 0.5))
            gr.HTML(_part("demo_head.html", title=_TITLE), elem_id="head")
            with gr.Row(elem_id="layout", equal_height=False):
                with gr.Column(elem_id="choose", min_width=0):
                    self._choose(compare)
                with gr.Column(elem_id="results", min_width=0):
                    self.results = gr.HTML(js_on_load=_part("demo_maps.js"), elem_id="maps", min_height=400)
                    with gr.Row():
                        self.figures = gr.Button("Download figures (PNG)", size="md", elem_id="get-figures")
                        self.features = gr.Button("Download features (safetensors)", size="md", elem_id="get-features")
                    self.file = gr.DownloadButton("File", visible="hidden", elem_id="file")
                    with gr.Accordion("How to read the maps", open=False):
                        gr.Markdown(_part("demo_help.md", num_reference=explorer.num_reference))
            self._connect()
        self.app.queue(max_size=32, default_concurrency_limit=2, api_open=False)

    def _choose(self, compare: str | None) -> None:
        import gradio as gr

        names = list(self.explorer.readers)
        side, layer, head = self._options(names[0], self.explorer.default_side(names[0]))
        self.upload = gr.File(label="Your image", show_label=False, file_types=["image"], height=132, elem_id="upload")
        thumbs = {name: data_url(_thumbnail(each.image), "JPEG") for name, each in self.examples.items()}
        script = _part("demo_thumbs.js")
        self.gallery = gr.HTML(_part("demo_thumbs.html", images=thumbs), js_on_load=script, elem_id="examples")
        with gr.Accordion("Model, resolution, block, head", open=True, elem_id="settings"):
            self.model = gr.Dropdown(names, value=names[0], label="Model", elem_id="model")
            self.compare = gr.Dropdown(
                [_NO_COMPARISON, *names], value=compare or _NO_COMPARISON, label="Compare with", elem_id="compare"
            )
            self.side = gr.Slider(label="Resolution: shorter side in pixels", elem_id="side", **side)
            self.layer = gr.Slider(step=1, label="Block", elem_id="layer", **layer)
            self.head = gr.Dropdown(label="Attention head", elem_id="head-choice", **head)

    def _connect(self) -> None:
        import gradio as gr

        def pick(event: gr.EventData) -> InputImage:
            return self.examples[event.name]

        def point(event: gr.EventData) -> Place:
            return float(event.x), float(event.y)

        def restore(request: gr.Request) -> list[Any]:
            """Return the state that the address of the page asks for, as far as it exists."""
            asked, models = dict(request.query_params), self.explorer.readers
            model = asked["model"] if asked.get("model") in models else next(iter(models))
            compare = asked["compare"] if asked.get("compare") in (_NO_COMPARISON, *models) else self.compare.value
            numbers = {name: int(value) for name, value in asked.items() if value.isdecimal() and len(value) < 6}
            side, layer, head = self._adapt(model, numbers.get("side", self.explorer.default_side(model)))
            layer["value"] = min(max(numbers.get("block", layer["value"]), 1), layer["maximum"])
            head["value"] = min(numbers.get("head", 0), len(head["choices"]) - 1)
            place = tuple(min(numbers.get(name, 5000), 9999) / 10_000 for name in ("x", "y"))
            image = self.examples.get(asked.get("image", ""), self.examples[EXAMPLES[0]])
            return [image, place, model, compare, side, layer, head]

        asked = [self.image, self.place, self.model, self.compare, self.side, self.layer, self.head]
        # One reading at a time. Of several requests during a reading (a moving slider, repeated clicks), the last one
        # is served; by default Gradio would drop them all. The place of each click must be stored, and in order.
        common: dict[str, Any] = {"concurrency_id": "read", "concurrency_limit": 1, "api_visibility": "private"}
        quick: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        show: dict[str, Any] = {
            "fn": _show_errors("The maps could not be computed", self._show), "inputs": asked, "outputs": self.results,
            "show_progress": "minimal", "trigger_mode": "always_last", **common,
        }  # fmt: skip
        stored: dict[str, Any] = {"trigger_mode": "multiple", "concurrency_limit": 1, **quick}
        self.app.load(restore, None, asked, **quick).success(**show)
        self.app.load(None, js=_ON_A_PHONE, api_visibility="private")
        read = _show_errors("This file cannot be used", self._open)
        opened = self.upload.upload(read, self.upload, self.image, **quick)
        opened.success(**show)
        opened.success(None, js=_NONE_PICKED, api_visibility="private")
        for ended in (opened.success, opened.failure):  # clear the field for the next file in both cases
            ended(lambda: None, None, self.upload, **quick)
        self.gallery.select(pick, None, self.image, **stored).success(**show)
        self.results.select(point, None, self.place, **stored).success(**show)
        self.model.input(
            self._adapt, [self.model, self.side], [self.side, self.layer, self.head], trigger_mode="always_last",
            **quick,
        ).success(**show)  # fmt: skip
        for setting in (self.compare, self.side, self.layer, self.head):
            setting.input(**show)
        for button, write in ((self.figures, self._figures), (self.features, self._features)):
            told = _show_errors("The file could not be created", write)
            done = button.click(told, asked, self.file, show_progress_on=[button], **common)
            done.success(None, js=_PRESS, api_visibility="private")

    def _views(
        self, image: InputImage | None, place: Place, model: str, compare: str, side: float, layer: float, head: int
    ) -> tuple[dict[str, View], MapRequest]:
        if image is None:
            raise ValueError(
                "The image is no longer available: images are kept for an hour at most. Select or upload it again."
            )
        names = (model,) if compare in (_NO_COMPARISON, model) else (model, compare)
        request = MapRequest(names, side=int(side), layer=int(layer), head=head, place=place)
        return read_views(self.explorer, image, request), request

    def _show(self, image: InputImage, place: Place, *settings: Any) -> str:
        views, request = self._views(image, place, *settings)
        names = ("model", "compare", "side", "block", "head")
        x, y = (int(10_000 * share) for share in request.place)
        known = next((name for name, each in self.examples.items() if image and each.key == image.key), "")
        state = {"image": known, **dict(zip(names, settings)), "x": x, "y": y}  # an upload has no address
        return results_page(views, request, address=urlencode(state))

    def _open(self, path: str) -> InputImage:
        name = Path(path).name
        return InputImage.of(open_image(path, name=name, limits=_UPLOAD_LIMITS), Path(name).stem)

    def _adapt(self, model: str, side: float) -> list[dict[str, Any]]:
        """Adapt the controls to another model."""
        import gradio as gr

        return [gr.update(**options) for options in self._options(model, side)]

    def _options(self, model: str, side: float) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Return the controls of a model: a similar resolution, its first block to show, and the mean over heads."""
        description, usual = self.explorer.readers[model].description, self.explorer.default_side(model)
        step, blocks = max(description.patch_size), description.num_layers
        low, high = min(4 * step, usual), max(48 * step, usual)  # 4 to 48 patches, and the size of the model
        heads = [("mean over heads", 0), *((f"head {i}", i) for i in range(1, description.num_heads + 1))]
        return (
            {"minimum": low, "maximum": high, "step": step, "value": min(max(round(side / step) * step, low), high)},
            {
                "minimum": 1,
                "maximum": max(blocks, 2),  # the range of a slider must not be empty
                "value": max(self.explorer.settings[model].layer, 1),
                "interactive": blocks > 1,
            },
            {"choices": heads, "value": 0},
        )

    def _figures(self, image: InputImage, place: Place, *settings: Any) -> str:
        views, request = self._views(image, place, *settings)
        return str(write_figures(views, image, request, self._folder()))

    def _features(self, image: InputImage, place: Place, *settings: Any) -> str:
        views, _ = self._views(image, place, *settings)
        return str(write_features(views, image, self._folder()))

    def _folder(self) -> Path:
        """Create a folder for a download, and delete old ones; the page fetches its file at once."""
        folders = sorted(Path(self.downloads.name).iterdir(), key=lambda folder: folder.stat().st_mtime)
        for old in folders[:-4]:
            shutil.rmtree(old)
        return Path(tempfile.mkdtemp(dir=self.downloads.name))


def _part(template: str, **values: Any) -> str:
    return render(template, folder=TEMPLATES, **values)


def _show_errors(title: str, function: Callable[..., _Shown]) -> Callable[..., _Shown]:
    """Wrap a handler so that its errors appear on the page. Details of unexpected errors go to the log only."""
    import gradio as gr

    @wraps(function)
    def told(*args: Any) -> _Shown:
        try:
            return function(*args)
        except ValueError as error:  # unusable images and settings; the message says what to do
            words = html.escape(f"{title}. {error or type(error).__name__}")
        except NoSpaceError as error:
            logger.error("%s. %s", title, error)
            words = f"{title}. The disk of the server is full."
        except (RuntimeError, OSError, MemoryError):
            logger.exception("%s", title)
            words = f"{title}. The log of the server contains the reason. A lower resolution may help."
        raise gr.Error(words, duration=20, print_exception=False)

    return told


def _thumbnail(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((112, 112), Image.Resampling.LANCZOS)


_NONE_PICKED = "() => document.querySelectorAll('.thumbs button').forEach(b => b.setAttribute('aria-pressed', false))"

# On a phone, open settings would push the maps off the screen.
_ON_A_PHONE = "() => { if (innerWidth < 768) document.querySelector('#settings button').click(); }"

# The file is ready only after the handler has returned, so a script must click the download link.
_PRESS = "() => setTimeout(() => (document.querySelector('#file a') || document.querySelector('#file')).click(), 100)"
