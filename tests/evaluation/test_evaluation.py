"""Evaluation: scores against the plain functions, cached features, tables of models, reports, cards, errors."""

import json
import re
import shlex
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import SiglipVisionConfig, SiglipVisionModel

from builders import encoded, save_model, tinted, tinted_folder, tiny_model
from hf_regvit import extract_features
from hf_regvit.app import cli
from hf_regvit.app.arguments import evaluate_arguments
from hf_regvit.app.recipes import RecipeParser
from hf_regvit.data.files import stratified_split
from hf_regvit.data.loading import load_images
from hf_regvit.data.parts import draw_images
from hf_regvit.data.source import ImageSource, join_sources
from hf_regvit.evaluation.cache import FrozenFeatures, fingerprint, image_digests, read_features
from hf_regvit.evaluation.image_tasks import VectorSettings, option
from hf_regvit.evaluation.intervals import bootstrap_interval, mean_iou, paired_difference, wilson_interval
from hf_regvit.evaluation.knn import few_shot_indices, knn_accuracy
from hf_regvit.evaluation.linear import LinearGrid, logistic_path, train_linear_heads
from hf_regvit.evaluation.lost import LostSettings
from hf_regvit.evaluation.object_discovery import CorLocScore, LostEvaluation
from hf_regvit.evaluation.patch_tasks import lost_score
from hf_regvit.evaluation.report import EvaluationReport, EvaluationTable, Score
from hf_regvit.evaluation.run import LabeledFeatures, compare_backbones, evaluate_backbone, score_features
from hf_regvit.evaluation.tasks import TASKS, settings_from, task_options
from hf_regvit.models.loading import model_fingerprint, open_model, short_names
from hf_regvit.models.processing import default_image_processor
from hf_regvit_cli import parser_of

CLASSES = ("blue", "green", "red")
QUICK = {
    "linear_learning_rates": [0.1, 10.0], "linear_steps": 20, "logistic_cs": [0.1, 10.0], "num_tries": 2,
    "shots": [1, 2],
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tinted noise: 24 training and 12 validation images of three classes, in class folders."""
    return tinted_folder(tmp_path_factory.mktemp("data"), CLASSES, train=8, validation=4)


MODEL = tiny_model()


PROCESSOR = default_image_processor(32)


def evaluate(model, data, **options):
    return evaluate_backbone(open_model(model, processor=PROCESSOR), data, **QUICK | options)


@pytest.fixture(scope="module")
def report(data):
    return evaluate(MODEL, data, tasks=["retrieval", "few_shot", "logistic", "linear", "knn", "robustness"], seed=1)


def score_of(report, task, variant=""):
    (score,) = [score for score in report.scores if (score.task, score.variant) == (task, variant)]
    return score


# --- Scores


def features_of(model, data, part):
    source = load_images(data, split=part)
    return extract_features(open_model(model, processor=PROCESSOR), source).cls, torch.tensor(source.labels)


def test_knn_is_that_of_the_plain_functions(data, report):
    train, judged = features_of(MODEL, data, "train"), features_of(MODEL, data, "validation")
    assert [score.variant for score in report.scores if score.task == "knn"] == ["k=8"]  # images of a class
    for k, accuracy in knn_accuracy(*train, *judged, k=(8,)).items():
        score = score_of(report, "knn", f"k={k}")
        assert score.value == pytest.approx(accuracy)
        assert score.interval[0] <= score.value <= score.interval[1]
        assert (score.num_train, score.num_images, score.seed) == (24, 12, 1)
        assert score.settings == {"layer": 2, "k": k, "temperature": 0.07}


def test_few_shot_is_the_mean_of_its_draws(data, report):
    train, labels = features_of(MODEL, data, "train")
    judged = features_of(MODEL, data, "validation")
    for n in (1, 2):
        tries = []
        for seed in (1, 2):
            rows = few_shot_indices(labels, n, seed=seed)
            tries.append(knn_accuracy(train[rows], labels[rows], *judged, k=(n,))[n])
        score = score_of(report, "few_shot", f"n={n}")
        assert score.value == pytest.approx(np.mean(tries))
        # tolerance: a report has four decimals
        assert score.settings["std_over_tries"] == pytest.approx(np.std(tries, ddof=1), abs=1e-4)


def test_retrieval_is_the_mean_of_average_precisions(data, report):
    (train, labels), (judged, truth) = features_of(MODEL, data, "train"), features_of(MODEL, data, "validation")
    cosines = torch.nn.functional.normalize(judged, dim=1) @ torch.nn.functional.normalize(train, dim=1).T
    expected = []
    for row, label in zip(cosines.tolist(), truth, strict=True):
        found, precisions = 0, []
        for rank, i in enumerate(sorted(range(len(row)), key=lambda i: -row[i]), start=1):
            if labels[i] == label:
                found += 1
                precisions.append(found / rank)
        expected.append(np.mean(precisions))
    assert score_of(report, "retrieval").value == pytest.approx(np.mean(expected), abs=1e-6)


def test_logistic_regression_is_chosen_on_a_tenth_and_fitted_on_everything(data, report):
    (train, labels), (judged, truth) = features_of(MODEL, data, "train"), features_of(MODEL, data, "validation")
    score = score_of(report, "logistic")
    assert score.settings["num_images_to_choose"] == 3
    c = float(score.settings["chosen"].split()[1])
    assert c in QUICK["logistic_cs"]
    (fitted,) = logistic_path(train, labels, num_classes=3, cs=(c,))
    assert score.value == pytest.approx((fitted(judged).argmax(1) == truth).float().mean().item())


def test_sizes_of_robustness(report):
    sizes = [score.variant for score in report.scores if score.task == "robustness"]
    assert sizes == ["16 px", "24 px", "40 px"]


def test_at_its_own_size_robustness_is_knn(data):
    scores = evaluate(MODEL, data, tasks=["knn", "robustness"], image_sizes=[32], knn_k=[5]).scores
    assert scores[0].value == scores[1].value
    assert scores[0].columns == scores[1].columns


def clusters(count, seed, kind="CLS", blur=0.1):
    """Features of three classes around three unit vectors; with a blur of 0.8 they overlap."""
    labels = torch.arange(count) % 3
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.eye(8)[labels][:, None] + blur * torch.randn(count, 2, 8, generator=generator)
    features = FrozenFeatures(
        vectors, vectors.mean(1), (1, 2), kind, tuple(f"{seed}/{i}" for i in range(count)), (), 0
    )
    return LabeledFeatures(features, labels, 3, "clusters")


@pytest.mark.parametrize("kind", ["CLS", "mean patch"])
def test_every_task_tells_clusters_apart(kind):
    scores = list(score_features(clusters(30, 0, kind), clusters(12, 1, kind), **QUICK))
    assert {score.task for score in scores} == {"knn", "linear", "logistic", "few_shot", "retrieval"}
    counted = wilson_interval(1, 12)
    assert all(score.value == 1 for score in scores)
    assert all(score.interval == (counted if score.metric == "top1" else (1, 1)) for score in scores)
    assert all(kind in score.protocol for score in scores)
    linear = next(score for score in scores if score.task == "linear")
    # The model has two blocks instead of the official four; the mean patch is added only to CLS vectors.
    assert linear.settings["chosen"].endswith(f"(of {2 * 2 * (2 if kind == 'CLS' else 1)})")


def test_scores_go_through_the_metrics_of_the_package():
    from hf_regvit.evaluation.metrics import TopKAccuracy

    judged = clusters(12, 1)
    wrong = LabeledFeatures(judged.features, (judged.labels + (torch.arange(12) < 3)) % 3, 3, "clusters")
    (score,) = score_features(clusters(30, 0), wrong, tasks=["knn"], knn_k=[3])
    votes = torch.nn.functional.one_hot(judged.labels, 3).float()
    assert score.value == TopKAccuracy().compute(predictions=votes, references=wrong.labels)["top1"] == 0.75


def test_choosing_on_the_test_images_is_said_to_be_optimistic():
    options = QUICK | {"select_on": "test"}
    for score in score_features(clusters(30, 0), clusters(12, 1), tasks=["linear", "logistic"], **options):
        assert "on the test images themselves (official protocol, optimistic)" in score.protocol
        assert score.settings["num_images_to_choose"] == 12
        assert score.settings["accuracy_where_chosen"] == score.value
    for score in score_features(clusters(30, 0), clusters(12, 1), tasks=["linear", "logistic"], **QUICK):
        assert "selected on a held-out tenth of the training images" in score.protocol
        assert score.settings["num_images_to_choose"] == 3


def test_shots_are_the_official_ones_as_far_as_every_class_has_them():
    for count, shots in ((14, ["n=1"]), (15, ["n=1", "n=5"]), (30, ["n=1", "n=5", "n=10"])):  # of three classes
        scores = score_features(
            clusters(count, 0, blur=0.8), clusters(6, 1, blur=0.8), tasks=["few_shot"], num_tries=1
        )
        assert [score.variant for score in scores] == shots


def test_few_shot_votes_at_the_temperature_that_is_said():
    train, judged = clusters(30, 0, blur=0.8), clusters(150, 1, blur=0.8)
    found = {}
    for temperature in (0.02, 5.0):
        options = {"shots": [4], "num_tries": 1, "temperature": temperature}
        (score,) = score_features(train, judged, tasks=["few_shot"], seed=3, **options)
        rows = few_shot_indices(train.labels, 4, seed=3)
        expected = knn_accuracy(
            train.features.last[rows], train.labels[rows], judged.features.last, judged.labels, k=(4,),
            temperature=temperature,
        )[4]  # fmt: skip
        assert score.value == pytest.approx(expected)
        found[temperature] = score.columns
    assert found[0.02] != found[5.0]


def test_what_was_chosen_on_a_tenth_is_fitted_again_on_everything():
    train, judged = clusters(40, 0, blur=0.8), clusters(300, 1, blur=0.8)
    grid = LinearGrid((0.05, 1.0), (1, 2), (False, True), 60, 16)
    options = {
        "linear_learning_rates": [0.05, 1.0], "linear_num_blocks": [1, 2], "linear_steps": 60,
        "linear_batch_size": 16, "logistic_cs": [0.1, 1.0, 10.0],
    }  # fmt: skip
    fitted, held = stratified_split(train.labels.tolist(), held_out_share=0.1, seed=2)
    features, everything = train.features, list(range(40))

    def heads(rows, grid):
        parts = features.vectors[rows], features.mean_patch[rows], train.labels[rows]
        return train_linear_heads(*parts, num_classes=3, grid=grid, seed=2)

    def best_c():
        for model in logistic_path(features.last[fitted], train.labels[fitted], num_classes=3, cs=(0.1, 1.0, 10.0)):
            scores = model(features.last[held])
            right = (scores.argmax(1) == train.labels[held]).float().mean().item()
            yield (right, -torch.nn.functional.cross_entropy(scores, train.labels[held]).item()), model.c

    head, _ = heads(fitted, grid).best(features.vectors[held], features.mean_patch[held], train.labels[held])
    (_, linear), (_, partial) = (
        next(heads(rows, grid.only(head)).scores(judged.features.vectors, judged.features.mean_patch))
        for rows in (everything, fitted)
    )
    c = max(best_c())[1]
    (logistic,) = logistic_path(features.last, train.labels, num_classes=3, cs=(c,))
    scores = list(score_features(train, judged, tasks=["linear", "logistic"], seed=2, **options))
    for score, votes in zip(scores, (linear, logistic(judged.features.last)), strict=True):
        assert score.columns == (tuple((votes.argmax(1) == judged.labels).double().tolist()),)
    assert scores[0].settings["chosen"].startswith(str(head))
    assert not torch.equal(linear.argmax(1), partial.argmax(1))  # refitting on a tenth more images changes predictions


def test_models_without_cls_read_the_mean_patch(data):
    torch.manual_seed(0)
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    siglip = SiglipVisionModel(SiglipVisionConfig(**config, image_size=32, patch_size=8)).eval()
    report = evaluate(siglip, data, tasks=["knn"])
    assert "no CLS token, so tasks on whole images use the mean of its patch tokens" in report.notes[0]
    patches = [extract_features(open_model(siglip, processor=PROCESSOR), load_images(data, split=part)).patches.mean(1)
               for part in ("train", "validation")]  # fmt: skip
    labels = [torch.tensor(load_images(data, split=part).labels) for part in ("train", "validation")]
    expected = knn_accuracy(patches[0], labels[0], patches[1], labels[1], k=(8,))[8]
    assert score_of(report, "knn", "k=8").value == pytest.approx(expected)


# --- Intervals


@pytest.mark.parametrize("confidence", [0.95, 0.5])
def test_interval_of_a_mean_equals_its_loop(confidence):
    values = np.random.default_rng(3).normal(2.0, 1.0, (30, 1))
    rng, means = np.random.default_rng(5), []
    for _ in range(2000):
        means.append(sum(values[i, 0] for i in rng.integers(0, 30, 30).tolist()) / 30)
    means.sort()

    def quantile(share):
        place = share * (len(means) - 1)
        below = int(place)
        return means[below] + (place - below) * (means[min(below + 1, len(means) - 1)] - means[below])

    tail = (1 - confidence) / 2
    low, high = bootstrap_interval(values, seed=5, confidence=confidence)
    assert (low, high) == pytest.approx((quantile(tail), quantile(1 - tail)))
    assert confidence == pytest.approx(np.mean([low <= mean <= high for mean in means]), abs=1e-3)


def test_the_default_interval_is_one_of_95_percent_of_as_many_images():
    values = np.random.default_rng(3).normal(2.0, 1.0, 400)
    low, high = bootstrap_interval(values, seed=0)
    error = values.std() / 20  # of a mean of 400
    # tolerance: of 1,000 samples and a normal distribution
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error)


def test_a_method_is_not_ahead_of_itself():
    rows = np.random.default_rng(0).random((20, 1))
    assert paired_difference(rows, rows, seed=0) == (0, (0, 0))
    ahead, (low, high) = paired_difference(rows, rows + 0.1, seed=0)
    assert ahead == pytest.approx(0.1) == pytest.approx(low) == pytest.approx(high)  # paired, so no spread remains
    with pytest.raises(ValueError, match="not of the same images"):
        paired_difference(rows, rows[:5], seed=0)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(240, (10, 20)), (30, (10,)), (12, (4,)), (2, (1,)), (3 * 200, (10, 20, 100, 200))],
)  # fmt: skip
def test_the_default_ks_are_those_that_a_class_has_images_for(labels, expected):
    from hf_regvit.evaluation.image_tasks import Knn

    assert Knn.Settings().numbers(torch.arange(labels) % 3) == expected


def hit_report(name, hits):
    """Report of one score with these hits."""
    what = {"task": "knn", "variant": "k=5", "metric": "top1", "protocol": "p", "settings": {}, "num_train": 3}
    ids = [str(i) for i in range(len(hits))]
    score = Score.measured(np.array(hits, float), ids=ids, data="d", seed=0, seconds=1.0, **what)
    return EvaluationReport(name, "d", 0, {}, (score,))


def test_certain_scores_have_an_interval_after_wilson():
    from scipy.stats import binomtest

    reports = hit_report("a", [1] * 40), hit_report("b", [1] * 40), hit_report("c", [1] * 20 + [0] * 20)
    low, high = binomtest(40, 40).proportion_ci(method="wilson")
    assert reports[0].scores[0].interval == pytest.approx((low, high), abs=1e-6)
    low, high = binomtest(0, 40).proportion_ci(method="wilson")
    assert hit_report("", [0] * 40).scores[0].interval == pytest.approx((low, high), abs=1e-6)
    same, worse = EvaluationTable(reports).verdicts()
    assert same == f"knn: b shows no difference to a: +0.0 points [-{100 * high:.1f}, +{100 * high:.1f}] (top1, k=5)."
    assert worse.startswith("knn: c is worse than a: -50.0 points [-65.0, ")
    assert EvaluationTable(reports[::-1]).verdicts()[0].startswith("knn: b is better than c: +50.0 points [+35.0, ")
    assert EvaluationTable(reports[:1]).verdicts() == []


def test_mean_iou_of_rows_is_that_of_the_metric():
    from hf_regvit.evaluation.metrics import MeanIoU

    rng = np.random.default_rng(0)
    predicted, true = rng.integers(0, 3, (2, 6, 5, 5))
    metric = MeanIoU(num_classes=4)
    rows = np.concatenate([np.array(metric.reduce(p[None], t[None])) for p, t in zip(predicted, true, strict=True)])
    assert mean_iou(rows) == pytest.approx(metric.compute(predictions=predicted, references=true)["mean_iou"])
    rows[:, 4:8] += [0, 0, 0, 3]  # a class that is only predicted counts as missed, as in the metric
    assert mean_iou(rows) == pytest.approx(metric.result(rows)["mean_iou"])
    low, high = bootstrap_interval(rows, seed=0, statistic=mean_iou)
    drawn = [mean_iou(rows[rng.integers(0, 6, 6)]) for _ in range(2000)]
    assert low == pytest.approx(np.quantile(drawn, 0.025), abs=0.02)
    assert high == pytest.approx(np.quantile(drawn, 0.975), abs=0.02)


@pytest.mark.parametrize(("metric", "sign"), [("rmse", -1), ("abs_rel", -1), ("delta1", 1)])
def test_ahead_of_turns_errors_round_and_keeps_its_interval_in_order(metric, sign):
    what = {"task": "depth", "variant": "", "metric": metric, "protocol": "p", "settings": {}, "num_train": 3}
    rng = np.random.default_rng(0)
    first = rng.random((20, 1))
    second = first + 0.3 + rng.normal(0, 0.1, (20, 1))
    ids = [str(i) for i in range(20)]
    one, two = (Score.measured(rows, ids=ids, data="d", seed=0, seconds=0.0, **what) for rows in (first, second))
    gain, (low, high) = paired_difference(first, second, seed=0)
    assert low < gain < high
    expected = (gain, (low, high)) if sign > 0 else (-gain, (-high, -low))
    assert two.ahead_of(one)[0] == pytest.approx(expected[0])
    assert two.ahead_of(one)[1] == pytest.approx(expected[1])
    assert two.ahead_of(one)[1][0] < two.ahead_of(one)[1][1]


def test_two_segmentations_differ_by_their_mean_iou():
    rng = np.random.default_rng(0)
    rows = []
    for wrong in (0.1, 0.4):
        true = rng.integers(20, 60, (12, 3)).astype(float)
        both = np.round(true * (1 - wrong))
        rows.append(np.concatenate([both, both + rng.integers(0, 9, (12, 3)), true], axis=1))
    what = {"task": "segmentation", "variant": "", "metric": "mean_iou", "protocol": "p", "settings": {}}
    better, worse = (
        Score.measured(one, ids=list("abcdefghijkl"), data="d", seed=0, statistic="mean_iou", num_train=3, seconds=0.0,
                       **what) for one in rows
    )  # fmt: skip
    gain, (low, high) = better.ahead_of(worse)
    assert gain == pytest.approx(mean_iou(rows[0]) - mean_iou(rows[1]))
    assert gain == pytest.approx(better.value - worse.value)
    assert low < gain < high


def test_the_model_index_keeps_data_sets_apart():
    what = {"task": "knn", "metric": "top1", "protocol": "p", "settings": {}, "num_train": 3, "seconds": 0.0}
    scores = tuple(
        Score.measured(np.full((4, 1), value), ids=list("abcd"), data=data, seed=0, variant=variant, **what)
        for value, data, variant in ((0.5, "birds", "k=10"), (0.25, "birds", "k=20"), (1.0, "cars", "k=10"))
    )
    (entry,) = EvaluationReport("m", "birds", 0, {}, scores).model_index("m")
    found = {
        result["dataset"]["name"]: [metric["value"] for metric in result["metrics"]] for result in entry["results"]
    }
    assert found == {"birds": [0.5, 0.25], "cars": [1.0]}


def test_names_run_together_are_other_names():
    assert len({fingerprint(names) for names in (["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"])}) == 4


def test_an_overlap_at_the_threshold_is_a_hit_of_the_report_too():
    overlaps = (0.5, 0.4999, 0.8)
    score = CorLocScore("LOST", 2 / 3, (0.0, 1.0), (0.0, (0.0, 0.0)), overlaps)
    protocol = {"iou_threshold": 0.5, "max_side": 640, "padding": "zeros"}
    lost = LostEvaluation(LostSettings(), {"lost": score}, None, protocol, ("a", "b", "c"), 0, 0, 1.0)
    assert lost_score(lost, "d", 0).value == pytest.approx(2 / 3)


# --- Cache


@pytest.fixture
def counted(monkeypatch):
    """A model, and a list of the numbers of images it has processed."""
    model, seen = tiny_model(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(len(args[0])), with_kwargs=True)
    return model, seen


def read(model, source, cache_dir, size=32, **options):
    reader = open_model(model, processor=PROCESSOR)
    return read_features(
        reader, source, transform=reader.transform_for(image_size=size), cache_dir=cache_dir, **options
    )


def test_features_are_read_once(counted, data, tmp_path):
    model, seen = counted
    first = evaluate(model, data, tasks=["knn", "linear", "few_shot"], cache_dir=tmp_path)
    assert sum(seen) == 24 + 12
    second = evaluate(model, data, tasks=["knn", "linear", "few_shot"], cache_dir=tmp_path)
    assert sum(seen) == 24 + 12
    assert [score.columns for score in second.scores] == [score.columns for score in first.scores]
    assert (first.cached_seconds, second.reading_seconds) == (0, 0)
    assert second.cached_seconds == pytest.approx(first.reading_seconds, abs=0.01)


def test_what_changed_is_read_again(counted, data, tmp_path):
    model, seen = counted
    source = load_images(data, split="validation")
    first = read(model, source, tmp_path)

    def again(expected, model=model, source=source, **options):
        before = sum(seen)
        features = read(model, source, tmp_path, **options)
        assert sum(seen) - before == expected
        return features

    again(0)
    again(11, source=source.subset(range(11)))
    again(12, source=source.subset([*range(1, 12), 0]))  # the same images in another order
    again(12, source=replace(source, ids=[f"new/{name}" for name in source.ids]))  # features carry the names
    again(12, size=24)
    with torch.no_grad():
        model.layers[1].mlp.fc2.bias[3] += 1e-4
    changed = again(12)
    assert not torch.equal(changed.vectors, first.vectors)
    model.config.layer_norm_eps *= 2
    again(12)


def test_a_changed_image_is_read_again(counted, tmp_path):
    model, seen = counted
    (tmp_path / "a").mkdir()
    for i in range(3):
        tinted(i, i).save(tmp_path / "a" / f"{i}.png")
    read(model, load_images(tmp_path / "a"), tmp_path / "cache")
    before = image_digests(load_images(tmp_path / "a"))
    tinted(2, 7).save(tmp_path / "a" / "1.png")
    assert image_digests(load_images(tmp_path / "a")) != before
    read(model, load_images(tmp_path / "a"), tmp_path / "cache")
    assert seen == [3, 3]


def test_a_broken_cache_is_not_used(counted, data, tmp_path, caplog):
    model, seen = counted
    source = load_images(data, split="validation")
    first = read(model, source, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    second = read(model, source, tmp_path)
    assert "cannot be read" in caplog.text
    assert seen == [12, 12]
    assert torch.equal(first.vectors, second.vectors)
    third = read(model, source, tmp_path)
    assert third.from_cache
    assert (third.ids, third.layers, third.kind) == (first.ids, (1, 2), "CLS")


def test_the_name_of_a_model_is_no_part_of_it():
    other = tiny_model()
    other.config.name_or_path = "somewhere/else"
    assert model_fingerprint(other) == model_fingerprint(MODEL)
    assert model_fingerprint(tiny_model(seed=1)) != model_fingerprint(MODEL)


def test_vectors_are_normed_cls_of_every_block_and_the_mean_patch(data):
    source = load_images(data, split="validation")
    features = read(MODEL, source, None)
    for block in (1, 2):
        tokens = extract_features(open_model(MODEL, processor=PROCESSOR), source, layer=block)
        torch.testing.assert_close(features.vectors[:, block - 1], tokens.cls)
    torch.testing.assert_close(features.mean_patch, tokens.patches.mean(1))
    assert repr(tokens) == "TokenFeatures(12 images: cls (12, 32), registers (12, 4, 32), patches (12, 16, 32))"
    assert "<td>patches</td><td>(12, 16, 32)</td>" in tokens._repr_html_()


# --- Reports


def test_a_report_comes_back_from_its_file(report, tmp_path):
    report.save(tmp_path / "out" / "report.json")
    assert EvaluationReport.load(tmp_path / "out") == report
    assert EvaluationReport.load(tmp_path / "out" / "report.json", model=report.model) == report
    # The contributions of all images are on one line, not one line each.
    assert len((tmp_path / "out" / "report.json").read_text().splitlines()) < 40 * len(report.scores)
    with pytest.raises(FileNotFoundError, match="There is no evaluation report at"):
        EvaluationReport.load(tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"reports": [{"model": 1}]}')
    with pytest.raises(ValueError, match="is not an evaluation report that this version can read"):
        EvaluationReport.load(tmp_path / "other.json")


def test_model_index_is_what_the_hub_reads(report, data):
    index = report.model_index("someone/model")
    assert index[0]["name"] == "someone/model"
    card = ModelCardData(model_name="model", eval_results=model_index_to_eval_results(index)[1])
    results = {(one.task_type, one.metric_type, one.metric_name): one for one in card.eval_results}
    knn = results["image-classification", "accuracy", "Weighted kNN, top1, k=8"]
    # tolerance: a model index has four decimals
    assert knn.metric_value == pytest.approx(score_of(report, "knn", "k=8").value, abs=1e-4)
    assert knn.dataset_name == data.name  # not the path on this machine
    assert knn.metric_args["num_train_images"] == 24
    assert ("image-feature-extraction", "mean_average_precision", "Retrieval, map") in results
    assert len(results) == len(report.scores)
    assert str(data.parent) not in json.dumps(index)


@pytest.fixture
def folders(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        save_model(tiny_model(seed=seed), tmp_path / name, PROCESSOR)
    return tmp_path


def test_models_are_compared_on_the_same_images(folders, data):
    seen = []
    models = [folders / "a", folders / "b"]
    options = {"tasks": ["knn"], "knn_k": [3]}
    table = compare_backbones(models, data, on_report=lambda table: seen.append(len(table.reports)), **options)
    assert seen == [1, 2]
    (first, _, none), (second, report, reference) = table.rows()
    assert none is None
    assert reference is first
    assert report.model == "b"
    hits = [np.array(score.columns[0]) for score in (first, second)]
    ahead, (low, high) = second.ahead_of(first)
    assert ahead == pytest.approx(hits[1].mean() - hits[0].mean()) == pytest.approx(second.value - first.value)
    assert (low, high) == pytest.approx(bootstrap_interval(hits[1] - hits[0], seed=0))
    markdown = table.markdown()
    assert "| difference to a " in markdown
    (verdict,) = table.verdicts()
    assert verdict.endswith(f"to a: {second.show(ahead, (low, high), signed=True)} (top1, k=3).")
    assert f"\n- {verdict}\n" in markdown
    assert second.show(ahead, (low, high), signed=True) in markdown
    loaded = EvaluationTable.load(table.save(folders / "out"))
    assert loaded == table
    with pytest.raises(ValueError, match="holds the models a, b; model=None must be one of them"):
        EvaluationReport.load(folders / "out")
    assert EvaluationReport.load(folders / "out", model="b") == report


def test_other_images_are_not_compared(data):
    source = load_images(data, split="validation")
    train = load_images(data, split="train")
    one, two = (
        evaluate(MODEL, source.subset(rows), train=train, tasks=["retrieval"]).scores[0]
        for rows in (range(11), range(1, 12))
    )
    with pytest.raises(ValueError, match="cannot be compared pairwise"):
        one.ahead_of(two)


@pytest.mark.parametrize(("metric", "shown"), [("rmse", "+0.100 m [+0.100, +0.100]"), ("delta1", "-10.0 points [")])
def test_the_model_of_smaller_error_is_the_one_ahead(metric, shown):
    what = {"task": "depth", "variant": "", "metric": metric, "protocol": "p", "settings": {}, "num_train": 3}
    errors = np.linspace(0.2, 0.6, 5)
    reports = []
    for name, rows in (("a", errors), ("b", errors - 0.1)):
        score = Score.measured(rows, ids="vwxyz", data="d", seed=0, seconds=1.0, **what)
        reports.append(EvaluationReport(name, "d", 0, {}, (score,)))
    second, first = reports[1].scores[0], reports[0].scores[0]
    assert second.ahead_of(first)[0] == pytest.approx(0.1 if metric == "rmse" else -0.1)
    assert first.ahead_of(first) == (0.0, (0.0, 0.0))
    markdown = EvaluationTable(tuple(reports)).markdown()
    (line,) = [line for line in markdown.splitlines() if "| b " in line]
    assert f"| {shown}" in line
    assert ("above 0 is better" in markdown) == (metric == "rmse")


def test_models_are_called_by_what_tells_them_apart(tmp_path):
    for name in ("x/backbone", "y/backbone", "z"):
        (tmp_path / name).mkdir(parents=True)
    assert short_names([tmp_path / "x/backbone", "org/model"]) == ["backbone", "org/model"]
    assert short_names([tmp_path / "x/backbone", tmp_path / "y/backbone"]) == ["x/backbone", "y/backbone"]


# --- Dense tasks


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Six images with masks, or depths, of their brighter half."""
    root = tmp_path_factory.mktemp("dense")

    for kind in ("mask", "depth"):
        for part, count in (("train", 4), ("validation", 2)):
            rows = {"image": [], kind: []}
            for i in range(count):
                pixels = np.random.default_rng(i + 10 * count).integers(0, 90, (32, 32, 3)).astype(np.uint8)
                half = np.zeros((32, 32), dtype=np.uint8)
                half[:, 16:] = 1
                pixels[half == 1] += 150
                rows["image"].append({"bytes": encoded(pixels), "path": None})
                target = half if kind == "mask" else (1000 + 2000 * half.astype(np.int32)).astype(np.uint16)
                rows[kind].append({"bytes": encoded(target), "path": None})
            folder = root / kind
            folder.mkdir(exist_ok=True)
            Dataset.from_dict(rows, Features({"image": Image(), kind: Image()})).to_parquet(folder / f"{part}.parquet")
    return root


def test_segmentation_and_depth(data, dense):
    from hf_regvit.data.maps import load_depth
    from hf_regvit.evaluation.dense_features import read_dense_features
    from hf_regvit.evaluation.dense_heads import DepthSettings, linear_depth

    task_data = {"segmentation": dense / "mask", "depth": dense / "depth"}
    options = {"dense_steps": 40, "dense_learning_rate": 0.05, "dense_batch_size": 4, "task_data": task_data}
    report = evaluate(MODEL, data, tasks=["depth", "segmentation"], **options)
    scores = {score.metric: score for score in report.scores}
    assert list(scores) == ["mean_iou", "rmse", "abs_rel", "delta1"]
    assert scores["mean_iou"].value > 0.9
    assert (scores["mean_iou"].data, scores["rmse"].data) == ("mask", "depth")
    assert all((score.num_train, score.num_images) == (4, 2) for score in scores.values())
    assert scores["rmse"].show(0.5, (0.4, 0.6)) == "0.500 m [0.400, 0.600]"
    assert report.reading_seconds > 0
    parts = [load_depth(dense / "depth", split=split) for split in ("train", "validation")]
    features = [read_dense_features(open_model(MODEL, processor=PROCESSOR), part) for part in parts]
    settings = DepthSettings(num_steps=40, learning_rate=0.05, batch_size=4)
    plain = linear_depth(features[0], parts[0].targets, features[1], parts[1].targets, settings=settings)
    for metric in ("rmse", "abs_rel", "delta1"):
        assert scores[metric].value == pytest.approx(plain.scores[metric], rel=1e-4), metric


# --- What cannot be evaluated


def test_unknown_tasks_are_answered_with_the_nearest(data):
    with pytest.raises(ValueError, match=r"Unknown task 'linaer'. Did you mean 'linear'\? Choose from knn, linear"):
        evaluate(MODEL, data, tasks=["linaer"])
    with pytest.raises(ValueError, match="tasks is empty"):
        evaluate(MODEL, data, tasks=[])
    with pytest.raises(ValueError, match=r"task_data names \['depth'\]"):
        evaluate(MODEL, data, tasks=["knn"], task_data={"depth": data})


def test_an_evaluation_judges_what_a_fine_tuning_held_out(data):
    """With the share of the run, whatever the seeds; another share would test on training images."""
    from hf_regvit import FinetuningArguments
    from hf_regvit.finetuning.data import open_data

    folder = data / "train"
    args = FinetuningArguments(output_dir="unused", data=str(folder), use_cpu=True, train_val_split=0.25)
    held = open_data(args).heldout
    options = {"knn_k": [3], "tasks": ("knn",)}
    for seed in (0, 7):
        (score,) = evaluate(MODEL, str(folder), seed=seed, train_val_split=0.25, **options).scores
        assert score.num_images == len(held)
        assert score.images == fingerprint(held.ids, digest_size=8)
    (score,) = evaluate(MODEL, str(folder), train_val_split=0.5, **options).scores
    assert score.images != fingerprint(held.ids, digest_size=8)


def test_missing_validation_part(data):
    for options, counts in (({"train_val_split": 0.25}, (18, 6)), ({}, (21, 3))):
        report = evaluate(MODEL, data / "train", tasks=["knn"], knn_k=[3], **options)
        (score,) = report.scores
        assert (score.num_train, score.num_images) == counts
        assert report.notes[0].startswith(f"Held out: {counts[1]} of 24 training images")
    assert not evaluate(MODEL, data, tasks=["knn"], knn_k=[3]).notes


def test_more_neighbours_than_images(data):
    with pytest.raises(ValueError, match=r"k=\[5, 25\]: every k must be .* at most 24"):
        evaluate(MODEL, data, tasks=["knn"], knn_k=[5, 25])
    with pytest.raises(ValueError, match="has 8 training images, but 9 per class were requested"):
        evaluate(MODEL, data, tasks=["few_shot"], shots=[9])


def test_images_without_labels(tmp_path):
    for i in range(4):
        tinted(0, i).save(tmp_path / f"{i}.png")
    source = load_images(tmp_path)
    with pytest.raises(ValueError, match="has no labels in its training split: 2 images are not in a subfolder"):
        evaluate(MODEL, source.subset([0, 1]), train=source.subset([2, 3]))


def test_one_class_and_unseen_classes(data):
    train, judged = (load_images(data, split=part) for part in ("train", "validation"))
    of = {label: [i for i, one in enumerate(train.labels) if one == label] for label in range(3)}
    with pytest.raises(ValueError, match=r"all 8 training images are of one class, 'blue'"):
        evaluate(MODEL, judged.subset(range(4)), train=train.subset(of[0]))
    with pytest.raises(ValueError, match=r"has 1 classes without training images: 'red'"):
        evaluate(MODEL, judged, train=train.subset(of[0] + of[1]))


def test_other_classes_in_the_training_images(data, tmp_path):
    for name in ("blue", "yellow"):
        (tmp_path / name).mkdir()
        tinted(0, 1).save(tmp_path / name / "1.png")
    with pytest.raises(ValueError, match=r"has 2 classes without training images: 'green', 'red'"):
        evaluate(MODEL, data, train=tmp_path)


def test_folders_of_test_images_that_lack_a_class_are_numbered_by_name(data):
    train = load_images(data / "train", split=None)
    whole = load_images(data / "validation", split=None)
    part = replace(whole.subset(range(4, 12)), labels=[0] * 4 + [1] * 4, label_names=("green", "red"))
    (score,) = evaluate(MODEL, part, train=train, tasks=["knn"], knn_k=[3]).scores
    (same,) = evaluate(MODEL, whole.subset(range(4, 12)), train=train, tasks=["knn"], knn_k=[3]).scores
    assert score.columns == same.columns


@pytest.mark.parametrize("count", [1, 2, 7, 20, 29, 30])
def test_a_draw_has_so_many_images_and_every_class_that_fits(count):
    labels = [0] * 16 + [1] * 10 + [2] * 3 + [3]  # the last class has a single image
    source = ImageSource("", [str(i) for i in range(30)], lambda i: i, labels)
    drawn = [int(name) for name in draw_images(source, count, seed=4, draw="every_class").ids]
    assert drawn == sorted(set(drawn))
    assert len(drawn) == count
    found = np.bincount([labels[i] for i in drawn], minlength=4)
    assert (found > 0).sum() == min(4, count)
    share = np.array([16, 10, 3, 1]) * count / 30
    assert (np.abs(found - np.maximum(share, count >= 4)) <= 1.5).all()
    again = draw_images(source, count, seed=4, draw="every_class").ids
    assert list(map(int, again)) == drawn


def test_f27_a_set_with_one_image_a_class_can_be_drawn_from(data):
    train, judged = (load_images(data, split=part) for part in ("train", "validation"))
    single = judged.subset([0, 4, 8])
    (score,) = evaluate(MODEL, single, train=train, tasks=["knn"], knn_k=[3], max_images=2).scores
    assert (score.num_train, score.num_images) == (3, 2)  # one training image per class


def test_test_images_that_are_fitted_on(data, caplog):
    source = load_images(data, split="validation")
    with pytest.raises(ValueError, match=r"12 of the 12 test images .* are identical to training images"):
        evaluate(MODEL, source, train=source)
    train = load_images(data / "train", split=None)
    joined = join_sources([train, load_images(data / "validation", split=None).subset([0, 4])])
    report = evaluate(MODEL, load_images(data / "validation", split=None), train=joined, tasks=["retrieval"])
    assert report.notes == ("2 of 12 test images are identical to training images, byte for byte.",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"select_on": "tests"}, "select_on='tests' is unknown"),
        ({"train_val_split": 1.0}, r"train_val_split=1.0 must lie between"),
        ({"num_tries": 0}, "num_tries=0"),
        ({"num_dense_blocks": 2}, "num_dense_blocks=2 must be 1 or 4"),
        ({"lost_l2norm": ["yes"]}, "lost_l2norm=\\['yes'\\]"),
        ({"knn_ks": [3]}, "Unknown option 'knn_ks'. Did you mean 'knn_k'"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate_backbone("no model is opened", "no data are opened", tasks=list(TASKS), **change)


def test_the_old_name_of_the_test_images_is_accepted():
    old, new = (
        list(score_features(clusters(30, 0), clusters(12, 1), tasks=["linear"], **QUICK | {"select_on": name}))
        for name in ("judged", "test")
    )
    assert old[0].settings == new[0].settings
    assert old[0].settings["select_on"] == "test"


def test_a_model_is_named_once(data):
    with pytest.raises(ValueError, match="Name each once"):
        compare_backbones(["a", "a"], data)


# --- Tasks


@dataclass
class Centroid:
    """Nearest mean of a class: a task as a user would write it."""

    @dataclass
    class Settings(VectorSettings):
        """Settings of the nearest mean."""

        centroid_power: float = option(1.0, "Power of the distance to a mean.", "--power")

        def __post_init__(self):
            if self.centroid_power <= 0:
                raise ValueError(f"centroid_power={self.centroid_power} must be above 0.")

    settings: Settings
    name, title, hub_type, needs = "centroid", "Nearest mean", "image-classification", "labels"

    def run(self, reader, parts, *, seed):
        train, test = (parts.features(reader, part, self.settings.image_size) for part in ("train", "test"))
        means = torch.stack([train.features.last[train.labels == label].mean(0) for label in range(3)])
        right = torch.cdist(test.features.last, means).pow(self.settings.centroid_power).argmin(1) == test.labels
        score = Score.measured(
            right.double().numpy(), ids=test.features.ids, data=test.data, seed=seed, task=self.name, variant="",
            metric="top1", protocol="nearest mean of the training images of a class", settings={}, seconds=0.0,
            num_train=len(train),
        )  # fmt: skip
        return [score]


def test_a_task_is_one_class_and_one_entry_in_the_table(data, monkeypatch, tmp_path):
    monkeypatch.setitem(TASKS, Centroid.name, Centroid)
    report = evaluate(MODEL, data, tasks=["centroid", "knn"], knn_k=[3], centroid_power=2.0, image_size=32)
    score = score_of(report, "centroid")
    assert score.value > 0.5
    assert score.name == "Nearest mean, top1"
    assert report.model_index("m")[0]["results"][0]["task"]["type"] == "image-classification"
    assert "- centroid: nearest mean" in EvaluationTable((report,)).markdown()
    report.save(tmp_path / "report.json")
    with pytest.raises(ValueError, match=r"centroid_power=-1.0 must be above 0"):
        evaluate(MODEL, data, tasks=["centroid"], centroid_power=-1.0)
    with pytest.raises(ValueError, match=r"Did you mean 'centroid_power'\?"):
        evaluate(MODEL, data, centroid_pow=1.0)
    parser = RecipeParser(evaluate_arguments(), prog="regvit evaluate")
    given = ["--model", "a", "--data", "b", "--tasks", "centroid", "--power", "3"]
    (arguments,) = parser.parse(given)
    assert arguments.settings()["centroid_power"] == 3
    assert "Power of the distance to a mean." in parser.format_help()
    assert "retrieval, robustness, centroid (with labels)" in " ".join(parser.format_help().split())
    monkeypatch.delitem(TASKS, Centroid.name)
    assert EvaluationReport.load(tmp_path / "report.json") == report  # a report outlives its task
    assert score.name == "centroid, top1"
    assert "--centroid_power" not in RecipeParser(evaluate_arguments(), prog="regvit evaluate").format_help()


def test_two_tasks_cannot_disagree_on_an_option(monkeypatch):
    @dataclass
    class Other(Centroid):
        @dataclass
        class Settings:
            num_tries: int = option(7, "Another default than few_shot.")

        name = "other"

    monkeypatch.setitem(TASKS, "other", Other)
    with pytest.raises(ValueError, match="different defaults"):
        evaluate_arguments()


def test_every_option_has_a_help_text_and_a_task():
    for name, task in TASKS.items():
        assert (task.name, task.needs) == (name, task.needs)
        assert task.title
    assert all(one.metadata["help"].endswith(".") for _, one in task_options().values())
    given = ["--model", "a", "--model", "b", "--data", "c", "--reduce_labels", "--lost_l2norm", "false"]
    given += ["--lost_data", "d"]
    (arguments,) = RecipeParser(evaluate_arguments(), prog="x").parse(given)
    assert arguments.model == ["a", "b"]
    assert arguments.do_reduce_labels
    settings = arguments.settings()
    assert settings["task_data"] == {"lost": "d"}
    lost = settings_from(TASKS["lost"].Settings, {"lost_l2norm": ["false"], "lost_biases": [1.0]})
    assert {one.bias for one in lost.candidates(12)} == {1.0}
    assert len(TASKS["lost"].Settings().candidates(12)) == 4 * 4 * 3 * (1 + 5)


def test_modules_and_names_are_compared(folders, data):
    reader = open_model(MODEL, processor=PROCESSOR)
    table = compare_backbones([folders / "a", reader, open_model(tiny_model(seed=1), processor=PROCESSOR)], str(data),
                              tasks=["knn"], knn_k=[3])  # fmt: skip
    assert table.reports[0].model == "a"
    assert len({report.model for report in table.reports}) == 3
    assert table.reports[0].scores[0].columns == table.reports[1].scores[0].columns  # the same weights
    with pytest.raises(ValueError, match="Name each once"):
        compare_backbones([reader, reader], data)


# --- Command line


@pytest.mark.slow
def test_two_models_on_the_command_line(folders, data, capsys):
    args = ["evaluate", "--model", str(folders / "a"), "--model", str(folders / "b"), "--tasks", "knn", "linear"]
    args += ["--data", str(data), "--knn_k", "3", "5", "--linear_steps", "5", "--output_dir", str(folders / "out")]
    assert cli.main(args) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\| knn +\| top1 +\| k=5 +\| b +\|", printed)
    assert "linear heads on CLS, 5 SGD steps" in printed
    assert printed.replace("\n\nreport", "\nreport").startswith((folders / "out" / "report.md").read_text()[14:90])
    assert len(list((folders / "out" / "features").glob("*.safetensors"))) == 4
    command, *words = shlex.split(printed.splitlines()[-1].removeprefix("next: regvit "))
    values = parser_of(command).values(words)  # with placeholders for what only the user knows
    assert (command, values["model"], values["reports"]) == ("publish", str(folders / "b"), [str(folders / "out")])
    assert cli.main([*args, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [len(one["scores"]) for one in result["results"]] == [3, 3]
    assert "columns" not in result["results"][0]["scores"][0]
    table = EvaluationTable.load(folders / "out")
    assert table.reports[0].cached_seconds > 0  # of the second run
    assert cli.main([*args, "--tasks", "knm"]) == 1
    assert "Did you mean 'knn'?" in capsys.readouterr().err


def test_protocols_of_models_that_differ_stand_apart():
    tables = []
    for kind in ("CLS", "mean patch"):
        scores = tuple(score_features(clusters(30, 0, kind), clusters(12, 1, kind), tasks=["knn", "retrieval"]))
        tables.append(EvaluationReport(f"model with {kind}", "clusters", 0, {}, scores))
    text = EvaluationTable(tuple(tables)).markdown()
    assert "- knn (model with CLS): weighted votes of the k nearest CLS vectors" in text
    assert "- knn (model with mean patch): weighted votes of the k nearest mean patch vectors" in text
    alone = EvaluationTable((tables[0],)).markdown()
    assert "- knn: weighted votes of the k nearest CLS vectors" in alone
