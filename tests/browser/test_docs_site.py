"""The documentation in a real browser: no messages, complete, fits a phone, searchable, no external requests."""

import os
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "index",
    "quickstart",
    "how_to/look_into_a_model",
    "concepts/artifacts",
    "reference/models",
    "reference/command_line",
    "faq",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return site


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("name", "width", "height"), [("desktop", 1280, 900), ("phone", 390, 844)])
def test_pages_are_whole_quiet_and_offline(browser, screenshots, address, name, width, height):
    page = browser.new_page(viewport={"width": width, "height": height})
    messages, requests, num_commands = [], [], 0
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    for path in PAGES:
        page.goto(f"{address}{path}.html", wait_until="networkidle")
        assert page.locator("h1").count() == 1, path
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{path} scrolls sideways"
        broken = page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)")
        assert broken == [], path
        num_commands += page.locator(".language-bash code").count()
        cut = "[...document.querySelectorAll('.language-bash code')].filter(e => e.scrollWidth > e.clientWidth)"
        assert page.evaluate(f"{cut}.map(e => e.innerText)") == [], f"long commands of {path} are not wrapped"
        page.screenshot(path=screenshots / f"docs_{path.replace('/', '_')}_{name}.png", full_page=path == "index")
    assert num_commands >= 10
    assert messages == []
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
    page.close()


@pytest.mark.parametrize("opened", ["from a server", "from the disk"])
def test_search_finds_a_class(browser, address, site, opened):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    messages = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(f"{address if opened == 'from a server' else site.as_uri() + '/'}index.html")
    field = page.get_by_role("textbox", name="Search")
    field.click()
    # What is typed before the index has been read is lost on a slow machine.
    expect(page.locator(".md-search-result__meta")).to_have_text("Type to start searching", timeout=60_000)
    field.press_sequentially("PretrainingArguments")
    # On a slow machine the results of what was typed first are seen before those of the whole word.
    expect(page.locator(".md-search-result__list")).to_contain_text("PretrainingArguments", timeout=30_000)
    page.locator(".md-search-result__list a").first.click()
    expect(page.locator("h1")).to_have_text(re.compile("Training"), timeout=30_000)
    assert messages == []
    page.close()
