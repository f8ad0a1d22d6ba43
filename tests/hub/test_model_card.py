"""Tests of model cards: all sections exist, no placeholder is left, numbers come from files, text stays text."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from builders import noise, save_model, tiny_model
from hf_regvit import RegViTConfig, RegViTForImageClassification, RegViTModel
from hf_regvit.hub.card import SECTIONS, TEMPLATE, CardError, card_header, card_snippets, check_card, render_card
from hf_regvit.hub.facts import (
    ORIGINS,
    TASKS,
    CardArtifacts,
    CardFacts,
    CardFigure,
    CardScore,
    finetuning_facts,
    pretraining_facts,
    public_name,
    public_recipe,
)

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {**RegViTConfig(num_labels=3).to_dict(), "architectures": ["RegViTModel"]}
RECIPE = {
    "data": "photos", "output_dir": "runs/x", "hub_token": "t", "learning_rate": 0.001, "global_crop_size": 48,
    "local_crop_size": 24, "num_local_crops": 2, "per_device_train_batch_size": 32, "head_num_prototypes": 1024,
    "centering": "softmax", "seed": 0,
}  # fmt: skip
RUN = {
    "images_seen": 12_800, "steps": 400, "epochs": 5.8, "seconds": 258.0, "final": {"loss": 4.05}, "alarms": [],
    "knn": [{"step": 0, "eval_knn_10": 0.5}, {"step": 400, "eval_knn_10": 0.75, "eval_linear": 0.5}],
}  # fmt: skip


def facts(**fields):
    return CardFacts(**{"name": "tiny", "config": CONFIG, "parameters": 1234, "license": "mit", **fields})


def full_facts(**fields):
    result = {
        "task": {"type": "image-classification"}, "dataset": {"name": "photos", "type": "photos"},
        "metrics": [{"type": "accuracy", "value": 0.75}],
    }  # fmt: skip
    given = {
        "scores": (CardScore("kNN, k=10", "photos", "75.0 % [72.1, 78.0]", "2,214 / 719"),),
        "evaluation_notes": ("knn: cosine, weights exp(s / 0.07)",),
        "results": (result,),
        "artifacts": CardArtifacts("No outliers.", "model  tiny", 100, "resized", (CardFigure("figures/a.png", "A"),)),
        "data": "`photos`", "data_license": "CC0", "base_model": "someone/base", "base_model_license": "mit",
        "datasets": ("someone/photos",), "curves": "figures/curves.png", "recipe": (("seed", "0"),),
        "alarms": ({"step": 3, "message": "flat"},), "description": "More.", "environment": "1 process(es) on cpu",
    }  # fmt: skip
    return facts(**{**given, **fields})


def test_a_full_card_can_be_published(tmp_path):
    text = render_card(full_facts())
    (tmp_path / "figures").mkdir()
    for name in ("a", "curves"):
        (tmp_path / "figures" / f"{name}.png").touch()
    check_card(text, folder=tmp_path)
    for expected in (
        "# tiny", "kNN, k=10 | photos | 75.0 % [72.1, 78.0] | 2,214 / 719", "![A](figures/a.png)", "CC0",
        "step 3: flat", "![Learning curves](figures/curves.png)", "cosine, weights", "someone/base", "1,234",
    ):  # fmt: skip
        assert expected in text


@pytest.mark.parametrize("model_class", TASKS)
@pytest.mark.parametrize("origin", ORIGINS)
def test_every_kind_of_model_has_a_whole_card(model_class, origin):
    config = {**CONFIG, "architectures": [model_class]}
    text = render_card(facts(config=config, origin=origin))
    check_card(text)
    header = card_header(text)
    task, auto_class, _ = TASKS[model_class]
    assert header["pipeline_tag"] == task
    assert {"regvit", "registers", "custom_code"} <= set(header["tags"])
    (code,) = card_snippets(text)
    assert f"{auto_class}.from_pretrained(name, trust_remote_code=True)" in code
    compile(code, "card", "exec")


def test_the_header_is_what_the_hub_reads():
    card = ModelCard(render_card(full_facts()))
    data = card.data
    assert (data.license, data.library_name, data.base_model) == ("mit", "transformers", "someone/base")
    assert data.datasets == ["someone/photos"]
    (result,) = data.eval_results
    assert (result.metric_value, result.dataset_name, result.task_type) == (0.75, "photos", "image-classification")
    assert card_header(render_card(facts(base_model="vit_tiny"))).get("base_model") is None  # no id of the Hub


@pytest.mark.parametrize("section", SECTIONS)
def test_a_missing_section_is_named(section):
    text = render_card(full_facts())
    with pytest.raises(CardError, match=f"'{section}' is missing or empty"):
        check_card(text.replace(f"## {section}\n", f"### {section}\n"))


@pytest.mark.parametrize(
    "hole",
    [
        "{{ name }}", "{% if x %}", "TODO", "[More Information Needed]", "None", "nan", "| seed | None |",
        "nan % [1, 2]", "it saw None, then nothing", "[nan, 1.0]", "Terms: None.",
    ],
)  # fmt: skip
def test_a_place_that_was_not_filled_in_is_named(hole):
    with pytest.raises(CardError, match=r"the placeholder '.*' was not filled in"):
        check_card(render_card(full_facts()) + f"\n{hole}\n")


def test_words_that_look_like_a_place_that_was_not_filled_in():
    """A data set may have a class "None" or "nan", and authors may use these words in sentences."""
    names = {"0": "None", "1": "nan", "2": "{{ x }}"}
    config = {**CONFIG, "architectures": ["RegViTForSemanticSegmentation"], "id2label": names}
    words = {
        "description": "None of these images shows a person. It knows nan bread.",
        "evaluation_notes": ("IoU of each class: None 45.0 %, nan 12.0 %, TODO 1.0 %.",),
    }
    text = render_card(full_facts(config=config, **words))
    assert "| classes | 3: None, nan, {{ x }} |" in text
    check_card(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("license: mit\n", ""), "no 'license'"),
        (("license: mit", "license: other"), "license_name and license_link"),
        (("license: mit", "license: Apache-2.0"), "'Apache-2.0' is not a Hub license id; .* apache-2.0"),
        (("license: mit", "license: my own"), "'my own' is not a Hub license id"),
        (("pipeline_tag: image-feature-extraction\n", ""), "no 'pipeline_tag'"),
        (("```python", "```text"), "no Python snippet"),
    ],
)
def test_what_else_is_missing_is_named(change, said):
    text = render_card(full_facts())
    assert change[0] in text
    with pytest.raises(CardError, match=said):
        check_card(text.replace(*change))


def test_images_have_to_be_there(tmp_path):
    with pytest.raises(
        CardError, match=r"the figure 'figures/curves\.png' does not exist; the figure 'figures/a\.png'"
    ):
        check_card(render_card(full_facts()), folder=tmp_path)


def test_names_of_other_people_stay_text():
    hostile = "a|b\n## License\n<script>alert(1)</script>\n---\nlicense: evil"
    config = {**CONFIG, "architectures": ["RegViTForImageClassification"], "id2label": {0: hostile, 1: "dog"}}
    text = render_card(
        facts(config=config, data=hostile, scores=(CardScore(hostile, hostile, "1 %"),), description="{{ 7 * 7 }}")
    )
    assert "<script>" not in text
    assert text.count("\n## License\n") == 1
    assert card_header(text)["license"] == "mit"
    assert "{{ 7 * 7 }}" in text  # text of a value is never a template
    row = next(line for line in text.splitlines() if line.startswith("| classes"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3


def test_classes_come_in_their_order():
    config = {**CONFIG, "architectures": ["RegViTForImageClassification"]}
    config["id2label"] = {str(number): f"kind {number}" for number in (0, 10, 11, 1, 2)}
    assert "| classes | 5: kind 0, kind 1, kind 2, kind 10, kind 11 |" in render_card(facts(config=config))


def test_a_model_without_numbers_says_so():
    text = render_card(facts())
    for expected in (
        "Not evaluated.", "Not diagnosed.", "The quality of this model has not been measured.",
        "The training images and their biases are unknown.",
    ):  # fmt: skip
        assert expected in text
    full = render_card(full_facts())
    assert "Not evaluated" not in full
    assert "are artifacts (see above)" not in full
    assert "are artifacts (see above)" in render_card(
        full_facts(artifacts=CardArtifacts("Some.", "model", 100, "resized", has_outliers=True))
    )
    assert "has not been measured" not in full


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="origin='stolen'"):
        render_card(facts(origin="stolen"))
    with pytest.raises(ValueError, match="Unknown model class ViTModel"):
        render_card(facts(config={**CONFIG, "architectures": ["ViTModel"]}))


def test_facts_of_a_pretraining_run():
    found = CardFacts(**{**dataclasses.asdict(facts()), **pretraining_facts(RECIPE, RUN)})
    text = render_card(found)
    check_card(text)
    assert "`photos`, without labels: 12,800 images seen, 5.8 epochs." in text
    assert "| length | 400 steps, 4.3 minutes |" in text
    assert "| k-NN, k = 10 | `photos` | 75.0 % | - |" in text
    assert "The training was short: the model saw 12,800 images in total." in text
    assert "held-out" not in text  # the report does not say that images were held out
    judged = {"fitted_on": 1500, "judged": 500, "held_out": False}
    for held_out, words in ((True, "on held-out labeled images"), (False, "on images that the model was trained on")):
        report = {**RUN, "knn_images": [{**judged, "held_out": held_out}]}
        text = render_card(CardFacts(**{**dataclasses.asdict(facts()), **pretraining_facts(RECIPE, report)}))
        assert words in text
        assert "| k-NN, k = 10 | `photos` | 75.0 % | 1,500 / 500 |" in text
    assert pretraining_facts(RECIPE, {**RUN, "epochs": None})["data"].endswith("labels: 12,800 images seen.")
    unfinished = pretraining_facts(RECIPE)
    assert unfinished["limits"] == ("The training of this model is not finished.",)
    assert pretraining_facts({**RECIPE, "init_from": "/data/runs/old"})["base_model"] == "old"
    assert "limits" not in pretraining_facts(RECIPE, {**RUN, "images_seen": 10**8})


def test_facts_of_a_fine_tuning_run():
    recipe = {"data": "/data/birds", "model_name_or_path": "/runs/a/backbone", "mode": "lora", "learning_rate": 1e-3}
    report = {
        "images": {"train": 80, "validation": 20, "seen": 160}, "steps": 10, "epochs": 2.0, "step_of_the_result": 8,
        "eval": {"loss": 0.3, "accuracy": 0.9, "accuracy_low": 0.7, "brier_score": 0.1, "iou_sky": 0.5, "epoch": 2},
        "intervals": {"accuracy": (0.7, 0.95)}, "interval_of": "after Wilson", "protocol": "One view", "seconds": 30.0,
        "described": {"training masks": "80 images."}, "changes": ["The head is new."],
        "task": "semantic-segmentation",
        "seed": 3, "parameters": {"all": 20, "trained": 10},
    }  # fmt: skip
    found = finetuning_facts({**recipe, "load_best_model_at_end": True, "class_weights": ["balanced"]}, report)
    assert found["data"] == (
        "`birds`, with labels: 80 training images, 20 validation images; 160 images seen. Training masks: 80 images."
    )
    assert [(score.name, score.result, score.images) for score in found["scores"]] == [
        ("Top-1 accuracy", "90.0 % [70.0, 95.0]", "80 / 20"), ("Loss", "0.300", "80 / 20"),
        ("brier score", "0.100", "80 / 20"),
    ]  # fmt: skip
    (result,) = found["results"]
    assert result["task"]["type"] == "image-segmentation"
    assert [(m["type"], m["value"]) for m in result["metrics"]] == [("accuracy", 0.9), ("brier_score", 0.1)]
    assert result["metrics"][0]["args"] == {
        "num_images": 20, "seed": 3, "step": 8, "chosen_on_these_images": True, "confidence_interval": [0.7, 0.95],
    }  # fmt: skip
    assert {"IoU of each class: sky 50.0 %.", "One view."} < set(found["evaluation_notes"])
    assert dict(found["recipe"]) == {
        "start": "The head is new.", "trained weights": "lora", "learning rate": "0.001", "class weights": "balanced",
        "length": "10 steps, 2.0 epochs, 30 s including evaluations", "trained parameters": "10 of 20",
    }  # fmt: skip
    assert any("on only 20 images" in limit for limit in found["limits"])
    assert "The step was selected on these images." in found["evaluation_notes"][0]
    assert found["base_model"] == "backbone"
    assert "/data" not in render_card(CardFacts(**{**dataclasses.asdict(facts()), **found}))


def test_a_recipe_is_published_without_places_and_tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = public_recipe({**RECIPE, "data": ["/data/a", "owner/set"], "init_from": "~/x", "run_name": "me"})
    assert recipe["data"] == ["a", "owner/set"]
    assert recipe["init_from"] == "x"
    assert not {"output_dir", "hub_token", "run_name"} & set(recipe)
    (tmp_path / "owner" / "set").mkdir(parents=True)
    assert public_name("owner/set") == "set"  # a local folder, not an id


def test_the_template_is_in_the_package():
    assert TEMPLATE.is_file()
    assert (ROOT / "src/hf_regvit").resolve() in TEMPLATE.resolve().parents


CARDS = sorted((ROOT / "model_cards").glob("*.md"))


def test_there_is_a_card_of_every_way_to_get_a_model():
    origins = {origin for card in CARDS for origin in ORIGINS if origin in card_header(card.read_text())["tags"]}
    assert {"pretrained", "converted", "retrofitted"} <= origins


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_committed_cards_are_whole(path):
    from hf_regvit.hub.scan import scan

    text = path.read_text()
    check_card(text, folder=path.parent)
    scan(path.parent, [path.name])
    header = card_header(text)
    assert header["model-index"][0]["results"]
    assert "Not evaluated" not in text
    assert "Not diagnosed" not in text
    for picture in (path.parent / path.stem).iterdir():
        assert picture.stat().st_size < 500_000
    for result in header["model-index"][0]["results"]:
        for metric in result["metrics"]:
            assert metric["args"]["protocol"]
            assert len(metric["args"]["confidence_interval"]) == 2


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_the_snippet_of_a_committed_card_runs(path, tmp_path, monkeypatch):
    """Run the snippet on a small model of the same class, because the weights are not in the repository."""
    text = path.read_text()
    (code,) = card_snippets(text)
    classifier = "ForImageClassification" in code
    model_class = RegViTForImageClassification if classifier else RegViTModel
    save_model(tiny_model(model_class, num_labels=7), tmp_path / "model")
    noise(size=(50, 40)).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    assert "path/to/this/folder" in code
    scope: dict = {}
    exec(code.replace("path/to/this/folder", "model"), scope)
    assert scope["output"][0].isfinite().all()


def test_cards_are_yaml_that_others_read():
    text = render_card(full_facts())
    assert yaml.safe_load(text.split("---\n")[1])["model-index"][0]["name"] == "tiny"
    assert Path(TEMPLATE).read_text().count("\n## ") == len(SECTIONS)
