"""Templates, charts and the report page as text; the browser tests look at the rendered pages."""

import csv
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from builders import with_outliers
from hf_regvit import RegViTConfig, RegViTModel
from hf_regvit.diagnosis.diagnose import diagnose
from hf_regvit.figures.diagnosis_page import report_page, write_report
from hf_regvit.figures.maps import distinct_registers
from hf_regvit.figures.pages import cell_text, chart, data_url, render
from hf_regvit.models.processing import default_image_processor


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    config = RegViTConfig(
        image_size=32, patch_size=4, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, num_register_tokens=2
    )
    model = with_outliers(RegViTModel(config).eval(), cells=(10,), factor=100)
    images = [Image.effect_noise((48, 40), 60).convert("RGB") for _ in range(12)]
    return diagnose(model, images, processor=default_image_processor(32), progress=False)


def figure(text="norm"):
    from matplotlib.figure import Figure

    made = Figure(figsize=(3, 2))
    axis = made.add_subplot()
    axis.plot([1, 2], [1, 2], color="#0072b2", marker="v", gid=f"hover:{text}")
    axis.set_title("CLS & <patches>", color="#222222")
    return made


def test_text_is_escaped_and_missing_values_are_errors(tmp_path):
    (tmp_path / "x.html").write_text(
        "{% from 'macros.html' import section %}{% call section(a) %}{{ b }}{% endcall %}"
    )
    page = render("x.html", folder=tmp_path, a="<b>", b="1 & 2")
    assert "<h2>&lt;b&gt;</h2>" in page
    assert "1 &amp; 2" in page
    with pytest.raises(Exception, match="'b' is undefined"):
        render("x.html", folder=tmp_path, a="")


def test_a_chart_follows_the_page_and_shows_numbers_under_the_pointer():
    svg = chart(figure("CLS: <1>"), 'norms of "x"')
    assert svg.startswith("<svg viewBox=")
    assert 'aria-label="norms of &#34;x&#34;"' in svg
    assert "<title>CLS: &lt;1&gt;</title>" in svg
    assert "CLS &amp; &lt;patches&gt;" in svg
    assert "currentColor" in svg
    assert "var(--normal)" in svg
    for absent in ("#222222", "#0072b2", "http", "<style", "DejaVu", "hover:"):
        assert absent not in svg


def test_charts_of_one_page_have_their_own_ids_and_are_reproducible():
    first, second = chart(figure(), "a"), chart(figure(), "b")
    assert first == chart(figure(), "a")
    ids = [set(re.findall(r' id="([^"]*)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for found, svg in zip(ids, (first, second), strict=True):
        references = set(re.findall(r'(?:href="#|url\(#)([^")]*)', svg))
        assert references <= found


def test_images_as_addresses():
    image = Image.new("RGB", (2, 2))
    assert data_url(image).startswith("data:image/png;base64,iVBOR")
    assert data_url(image, "JPEG").startswith("data:image/jpeg;base64,/9j/")
    assert data_url(b"abc") == "data:image/png;base64,YWJj"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (True, "True"), (1 / 3, "0.3333"), ("<a>", "<a>"), ({"a": 0.5, "b": None}, "a 0.5, b -"),
        ([1, 2.0], "1, 2"), (list(range(30)), ", ".join(map(str, range(24))) + " ..."),
    ],
)  # fmt: skip
def test_values_in_tables(value, text):
    assert cell_text(value) == text


def test_the_report_page_says_what_the_report_says(report):
    probes = {"num_images": 12, "position": {"outlier": {"top_1": 0.5}, "normal": {"top_1": None}}}
    changed = replace(
        report, model=report.model | {"name": "<script>alert(1)</script>"}, warnings=["few <b>images</b>"],
        probes=probes, skipped=[{"id": "bad<1>.png", "reason": "broken & gone"}],
    )  # fmt: skip
    page = report_page(changed)
    assert page.startswith("<!doctype html>")
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3  # title, heading, table
    for text in (
        "few &lt;b&gt;images&lt;/b&gt;", "bad&lt;1&gt;.png", "broken &amp; gone", "<th>top 1</th>", "<td>0.5</td>",
        "register 2 attention", "Controls: registers replaced", f"{report.outlier_share:.2%}",
        f"cut-off {report.cutoff:.4g}", "prefers-color-scheme: dark",
    ):  # fmt: skip
        assert text in page
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Norms by block", "Attention sinks", "Position", "Example images", "Positions of the outliers",
        "Properties of the outliers", "Registers", "Information in single tokens", "Appendix: decision and settings",
    ]  # fmt: skip
    assert re.findall(r'class="layer chart" data-layer="(\d)"', page) == ["0", "1", "2", "3"]
    assert page.count(" hidden>") == 3
    framed = sum(example["num_outliers"] for example in report.examples)
    assert page.count("class=outlier") == 2 * framed > 0  # on the image and on its norms
    assert [page.count(f"<h3>{example['id']}</h3>") for example in report.examples] == [1] * len(report.examples)
    assert "<code>regvit retrofit --model MODEL --data IMAGES --output_dir repaired</code>" in page
    assert "layer" not in re.sub(r"<style>.*?</style>|<script>.*?</script>|<[^>]*>", "", page, flags=re.DOTALL)
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)', page))
    assert "http" not in page
    assert page == report_page(changed)


def test_the_numbers_of_every_block_are_a_file_beside_the_page(report, tmp_path):
    page = write_report(report, tmp_path / "new" / "report.html", model="my model", data="photos").read_text()
    assert "regvit retrofit --model &#39;my model&#39; --data photos" in page
    found = list(csv.DictReader((tmp_path / "new" / "blocks.csv").open()))
    assert [row["block"] for row in found] == ["0", "1", "2", "3"]
    assert [float(row["cut-off"]) for row in found] == [record["cutoff"] for record in report.layers]
    assert [row["two modes"] for row in found] == [str(record["bimodal"]) for record in report.layers]


def test_equal_registers_are_one_map():
    rows = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(0))
    rows[2] = rows[1] * (1 + 1e-5)
    rows[3] = rows[1]
    names, maps = zip(*distinct_registers(rows))
    assert names == ("register 1", "registers 2 to 4", "register 5")
    assert torch.equal(torch.stack(maps), rows[[0, 1, 4]])
    assert distinct_registers(rows[:0]) == []


def test_a_report_without_outliers_cls_and_examples_has_a_page(report):
    bare = replace(
        report, bimodal=False, examples=[], attention=None, registers=None, controls=None, norm_ratio=None,
        emergence_layer=None, outliers=report.outliers | {"total": 0},
        neighbours=report.neighbours | {"auroc": None, "median_outlier": None},
    )  # fmt: skip
    page = report_page(bare)
    for text in (
        "No patch token lies above the cut-off.", "The report contains no example images.",
        "There are no outliers to compare with the other patches.", "no distinct outliers",
        '<td data-name="from block">-</td>',
    ):  # fmt: skip
        assert text in page
    assert "CLS in the last block" not in page
    assert "<h2>Registers</h2>" not in page
