"""The demo in a real browser: upload, click, switch models, download, on a desktop and a phone, without network."""

import re
import time
import zipfile
from io import BytesIO

import pytest
from PIL import Image
from playwright.sync_api import expect

from builders import tiny_model, with_outliers
from hf_regvit.app import demo_page as demo
from hf_regvit.app.demo import build_app, launch_options
from hf_regvit.evaluation.extraction import TokenFeatures
from hf_regvit.models.processing import default_image_processor
from hf_regvit.models.tokens import TokenReader

pytestmark = pytest.mark.browser

PATIENCE = 30_000  # ms; the machine may be busy


@pytest.fixture(scope="module")
def address():
    sizes = {"image_size": 64, "hidden_size": 24, "num_hidden_layers": 3}
    plain = with_outliers(tiny_model(num_register_tokens=0, **sizes), block=3, cells=(11,), factor=100)
    models = {"without registers": plain, "with registers": tiny_model(seed=3, num_register_tokens=3, **sizes)}
    models = {name: TokenReader(model, default_image_processor(64)) for name, model in models.items()}
    app = build_app(models, reference=[Image.effect_noise((64, 64), 60 + i).convert("RGB") for i in range(20)])
    _, url, _ = app.launch(**launch_options(), prevent_thread_lock=True)
    yield url
    app.close()


class Visit:
    """Page of one visitor, with all its messages and requests."""

    def __init__(self, browser, address, width, height, query):
        self.page = browser.new_page(viewport={"width": width, "height": height}, has_touch=width < 500)
        self.messages, self.requests = [], []
        self.page.on("console", self.hear)
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        self.page.goto(address + query)
        expect(self.card(0)).to_contain_text("patches")

    def hear(self, message):
        if message.text != "Method not implemented.":  # a warning of Gradio's own uploader at every upload
            self.messages.append(f"{message.type}: {message.text}")

    def card(self, number):
        return self.page.locator(".maps .card").nth(number)

    def map(self, title):
        return self.page.locator("article", has=self.page.get_by_role("heading", name=title, exact=True))

    def choose(self, field, option):
        self.page.locator(f"#{field} input").click()
        self.page.get_by_role("option", name=option, exact=True).click()


@pytest.fixture
def visit(browser, address):
    visits = []

    def start(width=1280, height=900, query=""):
        visits.append(Visit(browser, address, width, height, query))
        return visits[-1]

    yield start
    for each in visits:
        each.page.close()


@pytest.mark.parametrize(("name", "width", "height"), [("desktop", 1280, 900), ("phone", 390, 844)])
def test_page_is_whole_quiet_and_offline(visit, address, screenshots, name, width, height):
    here = visit(width, height)
    expect(here.card(0)).to_contain_text("1 of 96 patches is an artifact")
    assert here.page.locator(".maps .map").count() == 7
    assert here.page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    broken = here.page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
    assert broken == 0
    boxes = [here.page.locator(".maps .map").nth(i).bounding_box() for i in range(7)]
    assert all(box["width"] >= 140 and box["x"] + box["width"] <= width for box in boxes)
    here.page.screenshot(path=screenshots / f"demo_{name}.png", full_page=True)
    examples, upload = (here.page.locator(place).bounding_box()["y"] for place in ("#examples", "#upload"))
    assert (examples < upload) == (width < 500)
    if width < 500:
        here.page.get_by_role("button", name="Model, resolution, block, head").click()
    here.choose("compare", "with registers")
    expect(here.card(1)).to_contain_text("with registers")
    expect(here.page.locator(".maps .map")).to_have_count(2 * 7 + 3)
    assert here.page.evaluate("document.documentElement.scrollWidth") <= width
    here.page.screenshot(path=screenshots / f"demo_compare_{name}.png", full_page=True)
    assert here.messages == []
    outside = [url for url in here.requests if not url.startswith((address, "data:", "blob:"))]
    assert outside == [], "the page requests something from outside"


def test_a_click_asks_about_that_patch(visit):
    here = visit()
    image, map_ = here.map("Image"), here.map("Attention of the patch")
    expect(image).to_contain_text("patch 7, 5")  # the middle of 12 x 8
    first = map_.locator("img").get_attribute("src")
    box = image.locator(".map").bounding_box()
    image.locator(".map").click(position={"x": box["width"] * 0.04, "y": box["height"] * 0.95})
    expect(image).to_contain_text("patch 1, 8")
    assert map_.locator("img").get_attribute("src") != first
    expect(map_.locator("rect.query")).to_have_attribute("y", "7")
    # Any map can be clicked, also one of the whole image.
    norms = here.map("Norms").locator(".map")
    box = norms.bounding_box()
    norms.click(position={"x": box["width"] * 0.54, "y": box["height"] * 0.05})
    expect(image).to_contain_text("patch 7, 1")
    assert here.messages == []


def test_the_address_shows_the_same_again(visit, address):
    here = visit()
    here.choose("compare", "with registers")
    expect(here.card(1)).to_contain_text("with registers")
    here.page.locator("#examples button[data-name=coffee]").click()
    here.page.wait_for_url(re.compile("image=coffee"))
    here.map("Norms").locator(".map").first.click(position={"x": 5, "y": 5})
    here.page.wait_for_url(re.compile(r"&x=[1-9]\d{2}&"))
    known = here.page.url
    assert "model=without+registers&compare=with+registers&side=64&block=3&head=0" in known
    other = visit(query=known.removeprefix(address.rstrip("/") + "/").replace("block=3", "block=2"))
    expect(other.card(1)).to_contain_text("block 2 of 3")
    assert other.page.url == known.replace("block=3", "block=2")
    expect(other.page.locator("#examples button[data-name=coffee]")).to_have_attribute("aria-pressed", "true")
    here.map("Norms").locator(".map").first.hover()
    place = here.map("Image").locator("figcaption").first.inner_text()
    assert other.map("Image").locator("figcaption").first.inner_text() == place
    broken = visit(query="?model=none&compare=%3Cb%3E&side=99999&block=77&head=77&x=1e9&image=../etc")
    expect(broken.card(0)).to_contain_text("without registers")
    assert here.messages == other.messages == broken.messages == []


def test_a_slider_lays_b_over_a(visit):
    here = visit()
    here.choose("compare", "with registers")
    expect(here.card(1)).to_contain_text("with registers")
    pair = here.map("Norms").locator(".map")
    assert pair.nth(0).bounding_box()["y"] != pair.nth(1).bounding_box()["y"]
    slider = here.page.locator(".wipe [type=range]")
    slider.fill("30")
    assert pair.nth(0).bounding_box() == pair.nth(1).bounding_box()
    clip = "e => getComputedStyle(e).clipPath"
    assert pair.nth(1).evaluate(clip) == "inset(0px 0px 0px 30%)"
    pair.nth(0).click(position={"x": 5, "y": 5})
    here.page.wait_for_url(re.compile(r"&x=[1-9]\d{2}&"))
    expect(here.page.locator(".maps.wiping")).to_have_count(1)  # new results keep it
    assert pair.nth(1).evaluate(clip) == "inset(0px 0px 0px 30%)"
    here.page.locator(".wipe [type=checkbox]").uncheck()
    expect(here.page.locator(".maps.wiping")).to_have_count(0)


def test_of_clicks_in_a_row_the_last_counts(visit, monkeypatch):
    draw = demo.results_page

    def slowly(*args):
        time.sleep(0.8)  # as long as a larger model takes
        return draw(*args)

    here = visit()
    monkeypatch.setattr(demo, "results_page", slowly)
    shown = here.page.locator(".maps .map").first
    for x, y in ((0.1, 0.9), (0.5, 0.5), (0.9, 0.05)):
        box = shown.bounding_box()
        shown.click(position={"x": box["width"] * x, "y": box["height"] * y})
        here.page.wait_for_timeout(100)
    expect(shown.locator("rect.query")).to_have_attribute("y", "0")
    expect(shown.locator("rect.query")).to_have_attribute("x", "10")
    for name in ("motorcycle", "flower", "camera"):  # only the last one is square
        here.page.locator(f".thumbs button[title={name}]").click()
        here.page.wait_for_timeout(100)
    expect(here.card(0)).to_contain_text("64 x 64 px")


def test_a_tap_on_a_phone_asks_too(visit):
    here = visit(390, 844)
    here.map("PCA").locator(".map").tap(position={"x": 3, "y": 3})
    expect(here.map("Image")).to_contain_text("patch 1, 1")


def test_images_are_chosen_and_uploaded(visit, tmp_path):
    here = visit()
    here.page.get_by_role("button", name="astronaut").click()
    expect(here.card(0)).to_contain_text("64 x 64 px = 8 x 8 patches")
    Image.effect_noise((200, 100), 80).convert("RGB").save(tmp_path / "mine.png")
    here.page.locator("#upload input[type=file]").set_input_files(tmp_path / "mine.png")
    expect(here.card(0)).to_contain_text("128 x 64 px = 16 x 8 patches")
    Image.effect_noise((100, 200), 80).convert("RGB").save(tmp_path / "next.jpg")
    here.page.locator("#upload input[type=file]").set_input_files(tmp_path / "next.jpg")
    expect(here.card(0)).to_contain_text("64 x 128 px = 8 x 16 patches")
    assert here.messages == []


@pytest.mark.parametrize("content", [b"this is no image", b""], ids=["text", "empty"])
def test_a_wrong_file_gives_a_message_and_the_page_goes_on(visit, screenshots, tmp_path, content):
    here = visit()
    (tmp_path / "fake.png").write_bytes(content)
    here.page.locator("#upload input[type=file]").set_input_files(tmp_path / "fake.png")
    toast = here.page.locator(".toast-body")
    expect(toast).to_contain_text("This file cannot be used")
    expect(toast).to_contain_text("fake.png")
    assert "/" not in toast.inner_text(), "no paths of the server"
    here.page.screenshot(path=screenshots / f"demo_message_{len(content)}.png")
    Image.effect_noise((200, 100), 80).convert("RGB").save(tmp_path / "good.png")
    here.page.locator("#upload input[type=file]").set_input_files(tmp_path / "good.png")  # the field is free again
    expect(here.card(0)).to_contain_text("16 x 8 patches")
    here.page.get_by_role("button", name="astronaut").click()
    expect(here.card(0)).to_contain_text("8 x 8 patches")


def test_model_block_head_and_resolution(visit):
    here = visit()
    here.choose("model", "with registers")
    expect(here.card(0)).to_contain_text("No distinct artifacts")
    expect(here.page.locator(".maps .map")).to_have_count(7 + 3)
    cls = here.map("Attention of CLS").locator("img")
    before = cls.get_attribute("src")
    here.choose("head-choice", "head 2")
    expect(here.map("Attention of CLS")).to_contain_text("head 2")
    assert cls.get_attribute("src") != before
    block = here.page.locator("#layer input[type=number]")
    block.fill("1")
    block.press("Enter")
    expect(here.card(0)).to_contain_text("block 1 of 3")
    side = here.page.locator("#side input[type=number]")
    side.fill("96")
    side.press("Enter")
    expect(here.card(0)).to_contain_text("144 x 96 px = 18 x 12 patches")
    assert here.messages == []


def test_downloads(visit, tmp_path):
    here = visit()
    with here.page.expect_download() as download:
        here.page.locator("#get-features").click()
    assert re.fullmatch(r"china_without_registers_block_3\.safetensors", download.value.suggested_filename)
    download.value.save_as(tmp_path / "features.safetensors")
    assert TokenFeatures.load(tmp_path / "features.safetensors").grid == (8, 12)
    with here.page.expect_download() as download:
        here.page.locator("#get-figures").click()
    download.value.save_as(tmp_path / "figures.zip")
    with zipfile.ZipFile(tmp_path / "figures.zip") as archive:
        assert len(archive.namelist()) == 3
        for name in archive.namelist():
            Image.open(BytesIO(archive.read(name))).verify()
    assert here.messages == []


def test_files_of_the_machine_are_not_served(visit, address):
    here = visit()
    for path in ("/etc/hostname", __file__):
        for route in ("gradio_api/file=", "file="):
            assert here.page.request.get(f"{address}{route}{path}").status in (403, 404), path


def test_the_arrow_keys_choose_a_patch(visit):
    here = visit()
    image = here.map("Image").locator(".map[tabindex]")
    for _ in range(60):  # from the top of the page, by Tab alone
        here.page.keyboard.press("Tab")
        if here.page.evaluate("document.activeElement.matches('.map[tabindex]')"):
            break
    expect(image).to_be_focused()
    map_ = here.map("Attention of the patch").locator("img")
    first = map_.get_attribute("src")
    for key in ("ArrowLeft", "ArrowLeft", "ArrowUp"):
        here.page.keyboard.press(key)
    expect(here.map("Image")).to_contain_text("patch 5, 4")
    expect(image).to_be_focused()  # although all maps were replaced
    expect(image).to_have_accessible_name(re.compile("column 5, row 4"))
    expect(map_).not_to_have_attribute("src", first)
    for _ in range(20):
        here.page.keyboard.press("ArrowLeft")
    expect(here.map("Image")).to_contain_text("patch 1, 4")
    expect(here.page.locator(".spoken")).to_contain_text("1 of 96 patches")
    here.page.mouse.click(5, 5)
    here.page.get_by_role("button", name="astronaut").click()
    expect(here.card(0)).to_contain_text("8 x 8 patches")
    expect(image).not_to_be_focused()  # the maps do not take the focus back after it moved elsewhere
    assert here.messages == []


def test_everything_that_can_be_used_has_a_name(visit):
    here = visit()
    for role in ("button", "textbox", "slider", "spinbutton", "listbox", "combobox", "application"):
        for control in here.page.get_by_role(role).all():
            if control.is_visible():
                expect(control).to_have_accessible_name(re.compile(r"\S"))
    for number in range(6):  # maps that are not controls; Gradio's own icons have no names
        expect(here.page.locator(".maps").get_by_role("img").nth(number)).to_have_accessible_name(re.compile(r"\S"))
    chosen = here.page.locator(".thumbs button[aria-pressed=true]")
    expect(chosen).to_have_count(1)
    expect(chosen).to_have_accessible_name("china")
    here.page.get_by_role("button", name="astronaut").click()
    expect(chosen).to_have_accessible_name("astronaut")
