"""The artifact report in a real browser: it renders without messages, fits a phone, and its slider works."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from hf_regvit import RegViTConfig, RegViTModel
from hf_regvit.diagnosis.diagnose import diagnose
from hf_regvit.figures.diagnosis_page import write_report
from hf_regvit.models.processing import default_image_processor

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report():
    """Report of a tiny random model with registers."""
    torch.manual_seed(0)
    config = RegViTConfig(
        image_size=32, patch_size=4, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, num_register_tokens=2
    )
    images = [Image.effect_noise((48, 40), 60).convert("RGB") for _ in range(12)]
    return diagnose(RegViTModel(config).eval(), images, processor=default_image_processor(32), progress=False)


@pytest.mark.parametrize(("name", "width", "height"), [("desktop", 1280, 900), ("phone", 390, 844)])
def test_page_renders_without_errors(browser, screenshots, report, tmp_path, name, width, height):
    report = replace(report, warnings=["<b>markup must be shown, not run</b>"])
    page = browser.new_page(viewport={"width": width, "height": height})
    messages, requests = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    url = write_report(report, tmp_path / "report.html").as_uri()
    page.goto(url)
    assert messages == []
    assert [each for each in requests if not each.startswith("data:")] == [url], (
        "the page requests something from outside"
    )
    sections = ["Norms by block", "Attention sinks", "Position", "Example images"]
    assert page.locator("h2").all_inner_texts()[:4] == sections
    assert page.locator(".findings .card").count() == 6
    assert page.locator(".heads").count() == 3  # registers, CLS, the most attended tokens
    assert page.locator(".heads").first.locator("g").count() == 3 * 2  # blocks and heads
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    broken = page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
    assert broken == 0
    assert page.evaluate("document.images.length") >= 6 * 5  # image, norm, CLS, two registers
    assert "<b>markup" in page.locator(".warning").inner_text()
    page.screenshot(path=screenshots / f"report_{name}.png", full_page=True)
    page.close()


def test_slider_changes_the_layer(browser, report, tmp_path):
    page = browser.new_page()
    page.goto(write_report(report, tmp_path / "report.html").as_uri())
    for layer in (0, 3):
        page.locator("#layer").fill(str(layer))
        assert page.locator(".layer:visible").get_attribute("data-layer") == str(layer)
        assert page.locator("output").inner_text() == str(layer)
    page.close()


def test_the_check_for_errors_can_fail(browser, tmp_path):
    (tmp_path / "bad.html").write_text("<script>console.error('x'); missing()</script>")
    seen = SimpleNamespace(messages=[])
    page = browser.new_page()
    page.on("console", lambda message: seen.messages.append(message.text))
    page.on("pageerror", lambda error: seen.messages.append(str(error)))
    page.goto((tmp_path / "bad.html").as_uri())
    assert len(seen.messages) == 2
    page.close()
