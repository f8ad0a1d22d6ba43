"""The artifact report in a real browser: it renders without messages, fits a phone, and its slider works."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from builders import noise, planted_model, tiny_model, write
from helpers import load_script
from hf_regvit import RegViTConfig, RegViTModel
from hf_regvit.diagnosis.comparison import compare_checkpoints
from hf_regvit.diagnosis.diagnose import diagnose
from hf_regvit.diagnosis.retrofit import retrofit
from hf_regvit.evaluation.report import EvaluationReport, EvaluationTable, Score
from hf_regvit.figures.diagnosis_page import write_comparison, write_report, write_retrofit
from hf_regvit.figures.evaluation_page import write_evaluation
from hf_regvit.figures.maps import read_token_maps
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


SCREENS = [
    (f"{name}_{scheme}", {"viewport": {"width": width, "height": height}, "color_scheme": scheme})
    for name, width, height in (("desktop", 1280, 900), ("phone", 390, 844))
    for scheme in ("light", "dark")
]


def opened(browser, path, name, screen, screenshots):
    """Open a page that must be free of messages and requests, and fit the screen."""
    page = browser.new_page(**screen)
    messages, requests = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    assert messages == []
    outside = [each for each in requests if not each.startswith("data:")]
    assert outside == [path.as_uri()], "the page requests something from outside"
    assert page.evaluate("document.documentElement.scrollWidth") <= screen["viewport"]["width"]
    broken = page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
    assert broken == 0
    shade = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (shade == "rgb(22, 21, 20)") == (screen["color_scheme"] == "dark")
    page.screenshot(path=screenshots / f"{name}.png", full_page=True)
    return page


@pytest.mark.parametrize(("name", "screen"), SCREENS)
def test_page_renders_without_errors(browser, screenshots, report, tmp_path, name, screen):
    report = replace(report, warnings=["<b>markup must be shown, not run</b>"])
    page = opened(browser, write_report(report, tmp_path / "report.html"), f"report_{name}", screen, screenshots)
    sections = ["Norms by block", "Attention sinks", "Position", "Example images"]
    assert page.locator("h2").all_inner_texts()[:4] == sections
    assert page.locator(".findings .card").count() == 6
    assert page.locator(".heads").count() == 3  # registers, CLS, the most attended tokens
    assert page.locator(".heads").first.locator("g").count() == 3 * 2  # blocks and heads
    assert page.evaluate("document.images.length") >= 6 * 5  # image, norm, CLS, two registers
    assert "<b>markup" in page.locator(".warning").inner_text()
    page.close()


def test_maps_lie_over_the_image_and_grow(browser, report, tmp_path):
    page = browser.new_page()
    page.goto(write_report(report, tmp_path / "report.html").as_uri())
    map_ = page.locator(".example .pixels").first
    assert map_.evaluate("e => getComputedStyle(e).opacity") == "1"
    page.locator("#opacity").fill("40")
    assert map_.evaluate("e => getComputedStyle(e).opacity") == "0.4"
    assert map_.evaluate("e => getComputedStyle(e.parentElement).backgroundImage").startswith('url("data:image/jpeg')
    narrow = map_.bounding_box()["width"]
    map_.click()
    assert page.locator("dialog .pixels").bounding_box()["width"] > 2 * narrow
    page.keyboard.press("Escape")
    assert page.locator("dialog").is_hidden()
    page.locator(".chart:visible").first.press("Enter")
    assert page.locator("dialog svg").is_visible()
    page.locator("dialog").click()
    assert page.locator("dialog").is_hidden()
    page.close()


def test_the_next_command_can_be_copied(browser, report, tmp_path):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(write_report(report, tmp_path / "report.html", model="m", data="photos").as_uri())
    page.locator(".command button").click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == page.locator(".command code").inner_text()
    for name in ("report.json", "blocks.csv"):
        assert page.locator(f'a[href="{name}"]').count() == 1
    context.close()


@pytest.mark.parametrize(("name", "screen"), SCREENS[::3])
def test_the_comparison_shows_before_and_after(browser, screenshots, tmp_path, name, screen):
    models = [tiny_model(num_register_tokens=count, seed=count) for count in (0, 2)]
    images = [Image.effect_noise((20, 16), 60).convert("RGB") for _ in range(12)]
    settings = {"processor": default_image_processor(16), "progress": False, "throughput_rounds": 1}
    compared = compare_checkpoints(models, images, **settings)
    path = write_comparison(compared, tmp_path / "comparison.html")
    page = opened(browser, path, f"comparison_{name}", screen, screenshots)
    first = page.locator(".example").first
    assert first.locator("figcaption").all_inner_texts()[1].startswith("norm, first model")
    assert first.locator("figure").count() == 5
    page.close()


def test_slider_changes_the_layer(browser, report, tmp_path):
    page = browser.new_page()
    page.goto(write_report(report, tmp_path / "report.html").as_uri())
    for layer in (0, 3):
        page.locator("#layer").fill(str(layer))
        assert page.locator(".layer:visible").get_attribute("data-layer") == str(layer)
        assert page.locator("output").inner_text() == str(layer)
    page.close()


@pytest.mark.parametrize(("name", "screen"), SCREENS[::3])
def test_the_page_of_a_retrofit(browser, screenshots, tmp_path, name, screen):
    images, quiet = [noise(i, (64, 64)) for i in range(40)], {"progress": False, "top_k": 1}
    result = retrofit(planted_model(), images, processor=default_image_processor(64), num_register_tokens=4, **quiet)
    before, after = (read_token_maps(model, result.examples) for model in (result.source, result.model))
    path = write_retrofit(result, before, after, tmp_path / "retrofit.html", command=("demo", "--model", "my model"))
    page = opened(browser, path, f"retrofit_{name}", screen, screenshots)
    assert page.locator(".verdict").inner_text() == result.report.verdict
    assert page.locator(".command code").inner_text() == "regvit demo --model 'my model'"
    labels = page.locator(".example").first.locator("figcaption").all_inner_texts()
    assert [label.split("\n")[0] for label in labels] == [
        "image", "norm before", "norm after", "registers 1 to 4 attention", "PCA before", "PCA after",
        "CLS attention before", "CLS attention after",
    ]  # fmt: skip
    assert "so they stay equal" in page.locator("section").first.inner_text()
    assert page.locator("table tbody tr").count() == 5
    page.close()


def score(task, metric, rows):
    what = {"task": task, "variant": "", "metric": metric, "protocol": f"how {task} is measured", "settings": {}}
    ids = [str(i) for i in range(len(rows))]
    return Score.measured(np.array(rows), ids=ids, data="pets", seed=0, num_train=30, seconds=1.0, **what)


@pytest.mark.parametrize(("name", "screen"), SCREENS)
def test_the_page_of_an_evaluation(browser, screenshots, tmp_path, name, screen):
    names = ("a <b>", "vit_tiny_patch16_224_with_a_long_name/backbone")
    scores = [
        (score("knn", "top1", [1.0] * hits + [0.0] * (20 - hits)), score("depth", "rmse", np.linspace(0.2, top, 5)))
        for hits, top in ((10, 0.6), (15, 0.5))
    ]
    table = EvaluationTable(
        tuple(EvaluationReport(one, "pets", 0, {}, both) for one, both in zip(names, scores, strict=True))
    )
    path = write_evaluation(table, tmp_path / "report.html")
    page = opened(browser, path, f"evaluation_{name}", screen, screenshots)
    assert page.locator(".verdict").all_inner_texts() == table.verdicts()
    assert page.locator(".chart svg").count() == 2  # percent and meters
    assert page.locator("table tbody tr").count() == 4
    titles = page.locator(".chart title").all_text_contents()
    assert [text.split(":")[0] for text in titles[:2]] == [f"{one}, Weighted kNN, top1" for one in names]
    assert page.locator("li").first.inner_text() == "knn: how knn is measured"
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


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    """Run the demo on 24 labeled images, two steps."""
    folder = tmp_path_factory.mktemp("demo")
    for i in range(24):
        path = folder / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(i, (40, 32)).save(path)
    sizes = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "global_crop_size": 32,
        "local_crop_size": 16, "num_local_crops": 1, "head_num_prototypes": 32, "head_hidden_size": 32,
        "head_bottleneck_size": 16, "per_device_train_batch_size": 8, "max_steps": 2, "logging_steps": 1,
    }  # fmt: skip
    recipe = write(folder / "tiny.yaml", "\n".join(["report_to: none", *(f"{k}: {v}" for k, v in sizes.items())]))
    demo = load_script("examples/demo.py")
    run = folder / "run"
    assert demo.main(["--data", str(folder / "images"), "--config", str(recipe), "--output_dir", str(run)]) == 0
    return run / "demo.html"


@pytest.mark.parametrize(("name", "screen"), SCREENS)
def test_the_page_of_make_demo(browser, screenshots, demo_run, name, screen):
    page = opened(browser, demo_run, f"make_demo_{name}", screen, screenshots)
    assert page.locator(".pair figure").count() == 4 * (1 + 2 * 7)
    first, second = (page.locator(".pair").first.locator("figure").nth(i).bounding_box() for i in (1, 8))
    assert page.locator(".pair figcaption").nth(1).inner_text().startswith("CLS, before")
    assert page.locator(".pair figcaption").nth(8).inner_text().startswith("CLS, after")
    if name.startswith("desktop"):  # before and after lie above each other, on a phone beside each other
        assert first["x"] == second["x"]
    else:
        assert first["y"] == second["y"]
    assert page.locator(".nearest .right, .nearest .wrong").count() == 4 * 2 * 5
    assert page.locator(".quote p").inner_text().startswith("In ")
    assert page.locator(".chart svg").count() >= 2
    page.close()
