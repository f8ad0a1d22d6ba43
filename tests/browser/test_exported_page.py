"""The page of `regvit export --format web` in a real browser: its numbers, its requests, its messages."""

import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import expect

from builders import planted_model, randomized, tiny_model
from hf_regvit import RegViTForImageClassification
from hf_regvit.hub.export import export
from hf_regvit.hub.export_page import PACKAGE
from hf_regvit.hub.exported import load_exported
from hf_regvit.models.processing import default_image_processor

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60_000  # ms; the machine may be busy


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """Unpacked npm package, downloaded once."""
    folder = tmp_path_factory.mktemp("runtime")
    npm = shutil.which("npm")
    command = [npm, "pack", PACKAGE, "--silent"]
    if npm is None or subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode:
        assert not os.environ.get("CI"), "npm or its registry is missing"
        pytest.skip("needs npm and its registry")
    shutil.unpack_archive(next(folder.glob("*.tgz")), folder, filter="data")
    return folder / "package"


@pytest.fixture(scope="module")
def models():
    sizes = {"image_size": 64, "num_labels": 5, "num_register_tokens": 3}
    models = {"before": planted_model(), "after": randomized(tiny_model(RegViTForImageClassification, **sizes))}
    for model in models.values():
        model.image_processor = default_image_processor(64)
    return models


@pytest.fixture(scope="module")
def folder(models, runtime, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    export(models["before"], folder / "before", format="web", web_runtime=runtime)
    export(models["after"], folder / "after", format=["web", "onnx"], input="uint8", web_runtime=runtime)
    return folder


@pytest.fixture(scope="module")
def address(folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def picture(folder, models):
    """Image that is cropped, but not resized: browsers resize in another way."""
    side = models["before"].image_processor.size["shortest_edge"]
    noise = Image.effect_noise((side, side), 80)
    colors = Image.merge("RGB", (noise, noise.rotate(90), Image.radial_gradient("L").resize((side, side))))
    colors.save(folder / "picture.png")
    return folder / "picture.png"


@pytest.fixture
def visit(browser):
    pages = []

    def start(url, width=1280, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.messages, page.addresses = [], []
        page.on("console", lambda message: page.messages.append(message.text))
        page.on("pageerror", lambda error: page.messages.append(str(error)))
        page.on("request", lambda request: page.addresses.append(request.url))
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        page.goto(url)
        pages.append(page)
        return page

    yield start
    for page in pages:
        page.close()


def components_of(patches):
    centered = patches.astype(np.float64) - patches.mean(0, dtype=np.float64)
    left, sizes, _ = np.linalg.svd(centered, full_matrices=False)
    return (left * sizes)[:, :3].T


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_the_numbers_of_the_page_are_those_of_python(
    visit, address, folder, models, picture, screenshots, width, scheme
):
    page = visit(f"{address}/before/index.html?other=../after", width, scheme)
    expect(page.locator("#status")).to_have_text("Ready")
    page.locator("#file").set_input_files(picture)
    expect(page.locator("#status")).to_contain_text("Computed in")
    fields = "one => ({norms: one.norms, attention: one.attention, components: one.components, " \
             "outliers: one.outliers, cls: one.cls})"  # fmt: skip
    for (name, model), found in zip(models.items(), page.evaluate(f"window.found.map({fields})")):
        loaded = load_exported(folder / name)
        wanted = {key: values[0] for key, values in loaded(picture).items()}
        np.testing.assert_allclose(found["norms"], wanted["norms"], rtol=1e-3)
        np.testing.assert_allclose(found["attention"], wanted["attention"], rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(found["cls"], wanted["cls"], atol=1e-3)
        for component, expected in zip(np.array(found["components"]), components_of(wanted["patches"])):
            sign = np.sign(component @ expected)
            np.testing.assert_allclose(sign * component, expected, atol=2e-2 * np.abs(expected).max())
        assert found["outliers"] == np.flatnonzero(wanted["norms"] > 2 * np.median(wanted["norms"])).tolist()
        levels = loaded.pixels(picture)
        if levels.dtype == np.uint8:
            continue
        backbone = model.base_model.eval()
        backbone.set_attn_implementation("eager")
        with torch.inference_mode():
            output = backbone(torch.from_numpy(levels), output_attentions=True, output_hidden_states=True)
        tokens = output.hidden_states[-1][0, 1:]
        np.testing.assert_allclose(wanted["norms"], tokens.norm(dim=-1), rtol=1e-4)
        np.testing.assert_allclose(wanted["attention"][0], output.attentions[-1][0].mean(0)[0, 1:], rtol=1e-3)
    assert page.locator("section").count() == 2
    assert page.locator("section").first.locator("figcaption").all_inner_texts()[1].endswith("2 outliers")
    assert page.locator("section").last.locator("canvas").count() == 3 + 1 + 3
    assert page.messages == []
    assert len(page.addresses) > 5
    assert [url for url in page.addresses if not url.startswith((address, "data:", "blob:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    page.screenshot(path=screenshots / f"exported_page_{width}_{scheme}.png", full_page=True)


def test_an_image_in_the_address_is_shown_at_once(visit, address, picture):
    page = visit(f"{address}/before/?image=../{picture.name}")
    expect(page.locator("#status")).to_contain_text("Computed in")
    assert page.locator("section").count() == 1
    assert page.messages == []
    missing = visit(f"{address}/before/?image=../nothing.png")
    expect(missing.locator("#status")).to_have_text("There is no image ../nothing.png here.")
    foreign = visit(f"{address}/before/?image=https://example.org/a.png")
    expect(foreign.locator("#status")).to_have_text("There is no image https://example.org/a.png here.")


def test_the_file_gives_the_logits_of_python_in_the_browser(visit, address, folder):
    loaded = load_exported(folder / "after")
    with np.load(folder / "after" / "check.npz") as stored:
        levels, wanted = stored["images"], stored["logits"].reshape(2, 5)
    assert levels.shape == (2, *loaded.size, 3)
    found = visit(f"{address}/after/").evaluate(
        """async ([bytes, shape]) => {
            const ort = await import('./runtime/ort.wasm.min.mjs');
            const session = await ort.InferenceSession.create('onnx/model.onnx', {executionProviders: ['wasm']});
            const {logits} = await session.run({pixels: new ort.Tensor('uint8', Uint8Array.from(bytes), shape)});
            return Array.from(logits.data);
        }""",
        [levels.ravel().tolist(), list(levels.shape)],
    )
    np.testing.assert_allclose(np.reshape(found, (2, 5)), wanted, atol=1e-4)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_the_documentation_embeds_a_page(visit, address, folder, screenshots, width, scheme):
    if not (folder / "site").exists():
        build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder / "site")]
        environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
        page = os.environ.get("EXPORTED_PAGE", str(folder / "before"))
        subprocess.run(build, cwd=ROOT, check=True, env=environment | {"EXPORTED_PAGE": page})
    page = visit(f"{address}/site/how_to/export_a_model.html", width, scheme)
    frame = page.locator("iframe.exported-page")
    frame.scroll_into_view_if_needed()
    inner = frame.content_frame
    expect(inner.locator("#status")).to_contain_text("Computed in")
    assert inner.locator("canvas").count() >= 4
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert inner.locator("html").evaluate("html => html.scrollWidth <= html.clientWidth")
    assert page.messages == []
    assert [url for url in page.addresses if not url.startswith((address, "data:", "blob:"))] == []
    page.screenshot(path=screenshots / f"docs_exported_page_{width}_{scheme}.png")


def test_the_page_says_what_is_wrong(visit, address, picture, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    page = visit(f"{address}/before/")
    expect(page.locator("#status")).to_have_text("Ready")
    page.locator("#file").set_input_files(tmp_path / "text.png")
    expect(page.locator("#status")).to_have_text("text.png is not an image that this browser can read.")
    page.locator("#file").set_input_files(picture)
    expect(page.locator("#status")).to_contain_text("Computed in")
    assert page.messages == []
    missing = visit(f"{address}/before/?other=../nothing")
    expect(missing.locator("#status")).to_have_text("There is no export at /nothing/.")
    foreign = visit(f"{address}/before/?other=https://example.org/a")
    expect(foreign.locator("#status")).to_have_text("The other export must be here, too.")
    assert not any("example.org" in url for url in foreign.addresses[1:])


def test_the_folder_has_its_runtime_and_the_license(folder):
    names = {path.relative_to(folder / "before").as_posix() for path in Path(folder, "before").rglob("*")}
    assert {"index.html", "page.js", "page.css", "onnx/model.onnx", "proof.json", "runtime/LICENSE.txt"} <= names
    assert set(load_exported(folder / "before").proof["page"]) == {"onnxruntime-web", "sha256"}
