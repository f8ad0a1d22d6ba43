"""The public functions as one would guess them: names, modules and readers; folders and lists; results and errors."""

import json

import pytest
import timm
import torch

from builders import noise, save_images, save_model, tiny_model
from hf_regvit import RegViTModel, diagnose
from hf_regvit.diagnosis.comparison import ComparisonReport, compare_checkpoints
from hf_regvit.diagnosis.register_neurons import find_register_neurons
from hf_regvit.diagnosis.report import ArtifactReport
from hf_regvit.diagnosis.retrofit import RetrofitReport, RetrofitResult, retrofit
from hf_regvit.models.loading import open_model
from hf_regvit.models.processing import UnknownProcessorError, default_image_processor
from hf_regvit.models.results import html_table, markdown_table

SIDE, WIDTH, DEPTH = 64, 48, 4
PLANTED = [1, 9]  # block and neuron


IMAGES = [noise(seed, (SIDE, SIDE)) for seed in range(40)]


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("images"), IMAGES)


SIZES = {
    "image_size": SIDE, "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 3,
    "num_register_tokens": 0, "layerscale_value": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_model(tiny_model(**SIZES), tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def timm_model():
    """Create a timm model in which one neuron writes a huge vector into the first and the last patch."""
    torch.manual_seed(0)
    sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes).eval()
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    direction = (direction - direction.mean()) / (direction - direction.mean()).norm()
    block, neuron = PLANTED
    with torch.no_grad():
        model.pos_embed.normal_(std=0.8)  # the two cells have ordinary norms
        model.pos_embed[0, [1, 64]] += 7 * direction
        mlp = model.blocks[block].mlp
        mlp.fc1.weight[neuron] = 3 * direction
        mlp.fc1.bias[neuron] = -12
        mlp.fc2.weight[:, neuron] = 30 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(4)) / WIDTH**0.5
    return model


def measured(report):
    """Return what does not depend on names, ids and time."""
    return {"layers": report.layers, "neighbours": report.neighbours, "attention": report.attention}


def test_diagnose_takes_a_name_and_a_folder(checkpoint, image_folder):
    report = diagnose(str(checkpoint), str(image_folder), progress=False)
    assert (report.model["name"], report.num_images) == ("plain", 40)
    assert measured(diagnose(checkpoint, image_folder, progress=False)) == measured(report)


def test_diagnose_takes_a_module_and_a_list_of_images(checkpoint, image_folder):
    by_name = diagnose(checkpoint, image_folder, progress=False)
    module = RegViTModel.from_pretrained(checkpoint)
    assert measured(diagnose(module, IMAGES, progress=False)) == measured(by_name)
    reader = open_model(tiny_model(**SIZES), processor=default_image_processor(SIDE))
    assert measured(diagnose(reader, IMAGES, progress=False)) == measured(by_name)
    assert module.device == torch.device("cpu")  # "auto" leaves a module where it is


def test_diagnose_takes_a_source_of_load_images_and_a_timm_model(timm_model):
    report = diagnose(timm_model, "digits", max_images=32, progress=False)
    assert report.model["family"] == "timm"
    assert report.emergence_layer == PLANTED[0] + 1


@pytest.mark.slow
def test_retrofit_takes_a_timm_model_and_a_folder(timm_model, image_folder, tmp_path):
    result = retrofit(timm_model, image_folder, top_k=2, progress=False)
    assert isinstance(result.model, RegViTModel)
    assert result.model.config.register_neurons[0] == PLANTED
    assert result.report.judged["after"]["outlier_share"] == 0
    assert result.summary() == result.report.summary()
    assert result.to_dict() == result.report.to_dict()
    folder = result.save(tmp_path / "made")
    assert RetrofitReport.load(folder) == result.report
    after = diagnose(folder, image_folder, progress=False)  # the image processor is saved too
    assert not after.bimodal
    assert after.settings["preprocessing"] == open_model(result.model).transform.description
    with pytest.raises(FileExistsError, match="already contains a checkpoint"):
        result.save(folder)
    with pytest.raises(FileExistsError, match="already contains a checkpoint"):  # before any work
        retrofit("no/such model", image_folder, output_dir=folder)


def test_retrofit_of_a_reader_keeps_the_given_processor(timm_model, image_folder, tmp_path):
    processor = default_image_processor(SIDE, resize=SIDE)
    reader = open_model(timm_model, processor=processor)
    result = retrofit(reader, image_folder, top_k=1, num_register_tokens=1, progress=False, output_dir=tmp_path / "a")
    assert result.report.settings["preprocessing"] == processor.to_json_string()
    assert open_model(tmp_path / "a").processor.to_dict() == processor.to_dict()


def test_compare_checkpoints_takes_names_and_modules(checkpoint, image_folder, tmp_path):
    module = RegViTModel.from_pretrained(checkpoint)
    found = compare_checkpoints([checkpoint, module], image_folder, progress=False, throughput_rounds=1)
    assert [row["model"] for row in found.rows] == ["plain", "plain-2"]
    assert measured(found.reports["plain"]) == measured(found.reports["plain-2"])
    assert json.loads(found.save(tmp_path).read_text())["rows"] == found.rows
    for twice in ([module, module], [checkpoint, str(checkpoint)]):
        with pytest.raises(ValueError, match="names a model twice"):
            compare_checkpoints(twice, image_folder)


def test_without_a_processor_nothing_is_guessed(checkpoint):
    module = tiny_model(**SIZES)
    for call in (diagnose, retrofit, find_register_neurons):
        with pytest.raises(UnknownProcessorError, match="Pass processor="):
            call(module, IMAGES)
    with pytest.raises(UnknownProcessorError, match="Pass processor="):
        compare_checkpoints([checkpoint, module], IMAGES)


def test_results_are_short_in_a_notebook(planted_results):
    report, comparison, result = planted_results
    assert repr(report) == f"<ArtifactReport: {report.verdict}>"
    assert repr(comparison) == "<ComparisonReport: 1 of 2 checkpoints have artifact tokens.>"
    assert repr(result) == f"<RetrofitResult: {result.report.verdict}>"
    for outcome in planted_results:
        assert len(repr(outcome)) < 400
        table = outcome._repr_html_()
        assert table.startswith("<table><tr><td>")
        assert table.count("<tr>") == table.count("</tr>") > 2
        assert json.loads(json.dumps(outcome.to_dict())) == outcome.to_dict()
        assert outcome.summary()


@pytest.fixture(scope="module")
def planted_results(timm_model, checkpoint, image_folder):
    report = diagnose(timm_model, image_folder, progress=False)
    comparison = compare_checkpoints([checkpoint, timm_model], image_folder, progress=False, throughput_rounds=1)
    result = retrofit(timm_model, image_folder, progress=False, top_k=1, num_register_tokens=1)
    assert (type(report), type(comparison), type(result)) == (ArtifactReport, ComparisonReport, RetrofitResult)
    return report, comparison, result


def test_tables_escape_and_align():
    rows = [["name", "value"], ["a<b", 1 / 3], ["c", None]]
    assert markdown_table(rows).splitlines() == [
        "| name | value  |", "| ---- | ------ |", "| a<b  | 0.3333 |", "| c    | -      |"
    ]  # fmt: skip
    assert html_table(rows).count("a&lt;b") == 1


def test_reports_of_earlier_versions_are_read(checkpoint, image_folder, tmp_path):
    report = diagnose(checkpoint, image_folder, progress=False)
    (tmp_path / "report.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    assert ArtifactReport.load(tmp_path) == report
    assert report.save(tmp_path / "new").read_bytes() == (tmp_path / "report.json").read_bytes()
