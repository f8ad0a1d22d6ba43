"""The six numbers of a report, the next step, and the comparison of two models; reports of earlier versions."""

import json
from dataclasses import replace

import pytest

from hf_regvit import add_test_time_registers, diagnose
from hf_regvit.diagnosis import diagnose as diagnose_module
from hf_regvit.diagnosis.comparison import compare_checkpoints
from hf_regvit.diagnosis.findings import findings, last_mass, next_step, relocation
from hf_regvit.diagnosis.report import ArtifactReport
from hf_regvit.figures.diagnosis_page import report_page, write_comparison
from planted_defects import MODELS, PROCESSOR, QUIET, plant_neuron, plant_sink, sample


@pytest.fixture(scope="module")
def models():
    """A model whose heads park their attention on outliers, and the same one with a register instead."""
    model, seen = MODELS["regvit"](), sample(64, seed=0)
    direction = plant_neuron(model, seen, ratio=20.0)
    for head in range(3):
        plant_sink(model, direction, blocks=(4, 5), head=head, parks=True)
    return model, add_test_time_registers(model, [[2, 37]], num_register_tokens=3)


@pytest.fixture(scope="module")
def compared(models):
    return compare_checkpoints(models, sample(24, seed=1).images, throughput_rounds=1, **QUIET)


def test_six_numbers_of_a_model_with_a_planted_sink(compared):
    report = next(iter(compared.reports.values()))
    found = findings(report)
    assert [each.name for each in found] == [
        "tokens that do not describe their place", "attention they take", "use of this attention",
        "first block with outliers", "position in the output", "repaired for image sizes",
    ]  # fmt: skip
    assert found[0].number == pytest.approx(report.outliers["per_image"] / 144)
    assert found[1].number > 0.5
    assert found[2].value.startswith("a parking place (value 0.")
    assert found[2].number == pytest.approx(6, abs=0.5)  # three heads in two blocks
    assert (found[3].value, found[5].value) == ("block 3", "not repaired")


def test_attention_is_relocated_not_removed(compared, tmp_path):
    assert compared.conclusion.startswith("The attention was relocated, not removed: ")
    assert compared.conclusion.endswith("still a parking place.")
    assert compared.conclusion in compared.summary()
    outliers, registers = compared.attention["outliers"], compared.attention["registers"]
    assert outliers["interval"][0] <= outliers["difference"] <= outliers["interval"][1] < -0.4
    assert registers["interval"][0] <= registers["difference"] <= registers["interval"][1]
    assert registers["difference"] == pytest.approx(-outliers["difference"], abs=0.15)
    first, last = compared.reports.values()
    assert relocation(last, first) is None
    changes = {each["name"]: each for each in compared.differences}
    assert list(changes) == [found.name for found in findings(first) if found.key is not None]
    for found, other in zip(findings(first), findings(last)):
        if found.key is not None:
            assert changes[found.name]["difference"] == pytest.approx(other.number - found.number, abs=2e-4)
    assert changes["tokens that do not describe their place"]["interval"][1] < 0
    low, high = changes["use of this attention"]["interval"]
    assert low <= changes["use of this attention"]["difference"] <= high
    assert changes["position in the output"]["interval"] is None
    page = write_comparison(compared, tmp_path / "comparison.html").read_text()
    assert compared.conclusion in page
    assert "95 % interval" in page
    assert f"{changes['position in the output']['difference']:+.2f}" in page
    assert "heads per image" in page
    assert page.count("norm, first model") == page.count("norm, last model") == 2 * len(first.examples) > 0
    for folder in compared.folders():
        assert f'href="{folder}/report.html"' in page
    assert json.loads(compared.save(tmp_path).read_text())["attention"] == compared.attention


@pytest.mark.slow
def test_the_images_are_opened_once_per_model(models, monkeypatch):
    """The comparison of the attention uses the pixels of the diagnosis, and the masses are those of a diagnosis."""
    opened = []
    read = diagnose_module.prepare_images
    monkeypatch.setattr(
        diagnose_module, "prepare_images", lambda *args, **kw: opened.append(args) or read(*args, **kw)
    )
    report = compare_checkpoints(models, sample(24, seed=1).images, throughput_rounds=1, **QUIET)
    assert len(opened) == 2
    first, last = report.reports.values()
    means = report.attention["means"]
    assert means["outliers, first"] == pytest.approx(last_mass(first, "outliers"), abs=1e-3)
    assert means["registers, last"] == pytest.approx(last_mass(last, "registers"), abs=1e-3)
    assert means["outliers, last"] < 0.2 * means["outliers, first"]


def test_the_next_step_is_the_first_that_applies(compared):
    first, last = compared.reports.values()
    spurious = {**first.spurious, "flagged": 5, "both": 0}
    clean = {"bimodal": False, "emergence_layer": None}

    def step(report):
        sentence, command = next_step(report, model="m", data="photos")
        return f"{sentence} {' '.join(command)}"

    assert "before the first block" in step(replace(first, emergence_layer=0))
    assert step(first).endswith("that you use. retrofit --model m --data photos --output_dir repaired")
    assert "although it has registers" in step(replace(last, bimodal=True))
    assert "cannot move them" in step(replace(first, spurious=spurious, **clean))
    position = {**first.position, "final": 0.4}
    quiet = replace(first, sinks=None, spurious={**spurious, "both": 5}, **clean)
    assert step(replace(quiet, position=position)).endswith("a fixed layout. demo --model m")
    usable = step(replace(quiet, position={**position, "final": 0.1}))
    assert usable.startswith("Use the model as it is. Tested:")
    assert usable.endswith("extract --model m --data photos --output_dir features")


def test_reports_of_earlier_versions_load_and_have_a_page(compared, tmp_path):
    record = next(iter(compared.reports.values())).to_dict()
    for name in ("sinks", "spurious", "position"):
        del record[name]
    del record["model"]["register_sizes"], record["model"]["test_time_registers"]
    for example in record["examples"]:
        del example["repetition"], example["received"]
    (tmp_path / "report.json").write_text(json.dumps(record))
    report = ArtifactReport.load(tmp_path)
    assert report.sinks is report.spurious is report.position is None
    assert findings(report) == []
    assert "Norms by block" in report_page(report)
    assert "Attention sinks" not in report_page(report)


def test_a_model_whose_attention_cannot_be_read_has_the_other_numbers(models, monkeypatch):
    from hf_regvit.models.tokens import TokenReader

    monkeypatch.setattr(TokenReader, "reads_attention", False)
    report = diagnose(models[0], sample(12, seed=2).images, processor=PROCESSOR, progress=False)
    assert report.sinks is None
    assert "hijackers" not in report.spurious
    assert [each.value for each in findings(report)[1:3]] == ["not measured", "not measured"]
    assert "Attention sinks" not in report_page(report)
