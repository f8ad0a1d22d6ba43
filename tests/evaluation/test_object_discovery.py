"""Tests of object discovery: forms of ground-truth boxes, choosing on one half and testing on the other, commands."""

import io
import json
import math

import numpy as np
import pytest
import torch
from datasets import List, Value
from PIL import Image as Pillow

from builders import image_table, tiny_model
from hf_regvit import FeatureSettings
from hf_regvit.app import cli
from hf_regvit.data.loading import load_images
from hf_regvit.evaluation.boxes import best_iou
from hf_regvit.evaluation.intervals import bootstrap_interval
from hf_regvit.evaluation.lost import AttentionSettings, LostSettings, discover_objects
from hf_regvit.evaluation.object_discovery import (
    Overlaps,
    choose,
    ground_truth_boxes,
    halves,
    images_with_boxes,
    measure_overlaps,
    score_methods,
)
from hf_regvit.evaluation.report import EvaluationReport
from hf_regvit.evaluation.run import evaluate_backbone
from hf_regvit.evaluation.tasks import TASKS, settings_from
from hf_regvit.models.loading import open_model
from hf_regvit.models.processing import default_image_processor

WIDTH, HEIGHT = 48, 32


def scene(seed):
    """A bright block on noise, as bytes of a PNG, and its box as x, y, w, h."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 60, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    x, y = int(rng.integers(0, 24)), int(rng.integers(0, 12))
    pixels[y : y + 16, x : x + 20] += 160
    data = io.BytesIO()
    Pillow.fromarray(pixels).save(data, "PNG")
    return data.getvalue(), [x, y, 20, 16]


COCO = {"bbox": List(List(Value("float64"))), "iscrowd": List(Value("bool"))}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Nine images with one box, one with a crowd only, one that is broken."""
    scenes = [scene(seed) for seed in range(10)]
    rows = [data for data, _ in scenes] + [b"not an image"]
    boxes = [{"bbox": [box], "iscrowd": [i == 4]} for i, (_, box) in enumerate(scenes)]
    boxes.append({"bbox": [[0, 0, 5, 5]], "iscrowd": [False]})
    types = {"objects": COCO, "number": Value("int64")}
    columns = {"image": rows, "objects": boxes, "number": list(range(11))}
    return image_table(tmp_path_factory.mktemp("data") / "scenes.parquet", types=types, **columns)


MODEL = tiny_model()


READER = open_model(MODEL, processor=default_image_processor(32))


OPTIONS = {
    "lost_features": ["k", "out"], "lost_layers": [-1, -2], "lost_centers": ["none", "image"],
    "lost_biases": [0.0, -0.2], "tasks": ["lost"],
}  # fmt: skip


# --- Ground truth


def test_crowds_are_no_ground_truth(data):
    source = load_images(data, split=None)
    truth = ground_truth_boxes(source)
    assert truth[4] == []
    x, y, w, h = scene(2)[1]
    assert truth[2] == [(x, y, x + w, y + h)]
    kept, boxes, without = images_with_boxes(source, truth)
    assert (len(kept), without) == (10, 1)
    assert (kept.ids[4], boxes[4]) == ("row/5", truth[5])


@pytest.mark.parametrize(
    ("feature", "cells", "box_format", "expected"),
    [
        (List(Value("float32")), [[1, 2, 3, 4], [0, 0, 5, 5]], "xywh", [[(1, 2, 4, 6)], [(0, 0, 5, 5)]]),
        (List(List(Value("int64"))), [[[1, 2, 3, 4], [1, 1, 0, 9]], []], "xywh", [[(1, 2, 4, 6)], []]),
        (List(List(Value("int64"))), [[[1, 2, 3, 4]], [[0, 0, 9, 9]]], "xyxy", [[(1, 2, 3, 4)], [(0, 0, 9, 9)]]),
        ({"bbox": List(List(Value("int64")))}, [{"bbox": [[1, 2, 3, 4]]}, {"bbox": []}], "xywh", [[(1, 2, 4, 6)], []]),
    ],
)
def test_forms_of_boxes(tmp_path, feature, cells, box_format, expected):
    source = load_images(
        image_table(tmp_path / "a.parquet", types={"objects": feature}, image=[scene(0)[0]] * 2, objects=cells),
        split=None,
    )
    assert ground_truth_boxes(source, box_format=box_format) == expected
    assert ground_truth_boxes(source.subset([1, 0]), column="objects", box_format=box_format) == expected[::-1]


@pytest.mark.parametrize(
    ("feature", "cells", "change", "message"),
    [
        (Value("int64"), [3, 4], {}, "3 is not a box of four numbers"),
        (List(Value("int64")), [[1, 2, 3], [1, 2, 3]], {}, r"\[1, 2, 3\] is not a box"),
        ({"area": List(Value("int64"))}, [{"area": [3]}] * 2, {}, "the record has the fields area, but not 'bbox'"),
        (List(Value("int64")), [[5, 5, 3, 4]] * 2, {"box_format": "xyxy"}, r"is not \(x1, y1, x2, y2\)"),
        (List(Value("int64")), [[5, 5, 3, 4]] * 2, {"box_format": "cxcywh"}, "Unknown box_format='cxcywh'"),
        (List(Value("int64")), [[5, 5, 3, 4]] * 2, {"column": "faces"}, "looked for faces, found objects"),
    ],
)
def test_wrong_boxes_are_named(tmp_path, feature, cells, change, message):
    source = load_images(
        image_table(tmp_path / "a.parquet", types={"objects": feature}, image=[scene(0)[0]] * 2, objects=cells),
        split=None,
    )
    with pytest.raises(ValueError, match=message):
        ground_truth_boxes(source, **change)


def test_folders_of_images_have_no_boxes(tmp_path):
    (tmp_path / "a.png").write_bytes(scene(0)[0])
    with pytest.raises(ValueError, match="a folder of images has none; use parquet"):
        evaluate_backbone(READER, tmp_path, tasks=["lost"])


def test_boxes_in_the_wrong_format_are_noticed(tmp_path, caplog):
    corners = [[20, 10, 44, 30], [24, 8, 40, 28]]
    path = image_table(
        tmp_path / "a.parquet",
        types={"objects": List(Value("int64"))},
        image=[scene(i)[0] for i in range(2)],
        objects=corners,
    )
    source = load_images(path, split=None)
    truth = ground_truth_boxes(source)
    measure_overlaps(READER, source, truth, [LostSettings()])
    assert "In 2 of 2 images, such as 'row/0', a ground-truth box extends beyond the image" in caplog.text


# --- Choice and test


def table(hits, sizes=None, methods=None):
    """Overlaps of LOST with k = 1, 2, ..., then two heads, each 0.5 or 0."""
    iou = np.array(hits, dtype=float) / 2
    count, num_methods = iou.shape
    methods = methods or [
        *(LostSettings(k=k) for k in range(1, num_methods - 1)),
        AttentionSettings(0),
        AttentionSettings(1),
    ]
    return Overlaps(
        methods=tuple(methods),
        ids=tuple(str(i) for i in range(count)),
        iou=iou,
        degenerate=np.zeros(iou.shape, dtype=bool),
        sizes=sizes or ((10, 10),) * count,
        truth=([(0, 0, 10, 10)],) * count,
    )


def test_the_best_is_chosen_and_of_equals_the_first():
    choice = choose(table([[0, 1, 1, 0, 1], [0, 1, 0, 0, 1], [0, 0, 1, 1, 1]]))
    assert choice.settings.k == 2
    assert choice.methods == (LostSettings(k=2), AttentionSettings(1), LostSettings())
    assert [(settings.k, corloc) for settings, corloc in choice.ranking] == [
        (2, pytest.approx(2 / 3)), (3, pytest.approx(2 / 3)), (1, 0.0)
    ]  # fmt: skip
    assert choice.to_dict()["num_settings"] == 3
    assert choice.center == 0.8  # for a box as large as the image, 0.64 of the area is the first share above a half


def test_middle_boxes_cover_what_they_say():
    measured = table([[0, 0, 0]], sizes=((10, 20),))
    assert measured.center_box(0.5)[0] == pytest.approx(5 * 5 / (10 * 10 + 10 * 5 - 5 * 5))
    assert measured.center_box(1.0)[0] == pytest.approx(0.5)


def test_scores_compare_on_the_same_images():
    methods = [LostSettings(k=1), AttentionSettings(0), AttentionSettings(1)]
    measured = table([[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 1, 0]], methods=methods)
    scores = score_methods(measured, center=1.0, seed=0)
    assert scores["lost"].corloc == 0.75
    assert scores["attention"].corloc == 0.5
    assert scores["attention"].ahead[0] == 0.25
    assert scores["attention"].ahead[1][0] < 0.25 < scores["attention"].ahead[1][1]
    assert scores["lost"].ahead == (0.0, (0.0, 0.0))
    assert scores["full_image"].overlaps == (1.0,) * 4


def test_overlaps_just_below_the_threshold_are_no_hits_wherever_they_are_counted():
    scores = score_methods(table([[0.99994, 0, 1.0], [1.2, 0, 0.99998]]), center=1.0, seed=0)
    assert (scores["lost"].corloc, scores["vanilla"].corloc) == (0.5, 0.5)
    for score in scores.values():
        assert np.mean(np.asarray(score.overlaps) >= 0.5) == score.corloc


def test_halves_are_disjoint_complete_and_repeatable():
    first, second = halves(9, seed=3)
    assert sorted(first + second) == list(range(9))
    assert (len(first), len(second)) == (4, 5)
    assert halves(9, seed=3) == (first, second)
    assert halves(9, seed=4) != (first, second)


def test_bootstrap_interval_is_that_of_a_proportion():
    hits = np.array([1.0] * 60 + [0.0] * 140)
    low, high = bootstrap_interval(hits, seed=0)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 200)
    assert low == pytest.approx(0.3 - half, abs=0.01)
    assert high == pytest.approx(0.3 + half, abs=0.01)
    assert bootstrap_interval(hits, seed=0) == (low, high)
    assert bootstrap_interval(np.ones(5), seed=1) == (1.0, 1.0)


def test_settings_chosen_on_one_half_are_tested_on_the_other(data, tmp_path):
    report = evaluate_backbone(READER, data, seed=1, **OPTIONS)
    lost = report.lost
    source = load_images(data, split=None)
    truth = dict(zip(source.ids, ground_truth_boxes(source), strict=True))
    kept = [i for i in range(11) if truth[f"row/{i}"]]
    first, second = halves(len(kept), seed=1)
    judged = [f"row/{kept[i]}" for i in second if kept[i] != 10]  # 10 is broken
    assert list(lost.ids) == judged
    assert lost.num_without_boxes == 1
    assert lost.num_skipped == len(second) - len(judged)
    assert lost.choice["num_settings"] == 2 * 2 * 2 * (1 + 2)
    # The number equals that of the public function with these settings, on images not used for choosing.
    chosen = {name: getattr(lost.settings, name) for name in ("feature", "layer", "center", "l2norm", "bias", "k")}
    subset = source.subset([int(name.split("/")[1]) for name in judged])
    objects = discover_objects(READER, subset, **chosen)
    overlaps = best_iou([found.box for found in objects], [truth[name] for name in judged])
    assert lost.corloc == pytest.approx((overlaps >= 0.5).double().mean().item())
    # These settings are the best on the images used for choosing.
    others = source.subset([kept[i] for i in first])
    settings = settings_from(TASKS["lost"].Settings, {k: v for k, v in OPTIONS.items() if k != "tasks"}).candidates(2)
    boxes = [truth[name] for name in others.ids]
    seen = measure_overlaps(READER, others, boxes, settings)
    assert lost.settings == settings[int(seen.corloc().argmax())]
    assert lost.choice["best"][0] == {"settings": str(lost.settings), "corloc": pytest.approx(seen.corloc().max())}

    report.save(tmp_path / "new" / "report.json")
    saved = json.loads((tmp_path / "new" / "report.json").read_text())["reports"][0]
    assert saved["lost"]["settings"] == chosen
    assert saved["lost"]["protocol"]["max_side"] == 640
    assert saved["lost"]["scores"]["lost"]["corloc"] == lost.corloc
    assert saved["versions"]["torch"] == torch.__version__
    text = "\n".join(report.lost.lines(report.seed))
    assert str(lost.settings) in text
    assert f"best of 24 on {len(first)} other images (seed 1)" in text
    (score,) = report.scores
    assert (score.task, score.metric, score.value) == ("lost", "corloc", lost.corloc)
    assert score.interval == lost.scores["lost"].interval
    assert score.settings["chosen"] == f"{lost.settings} (of 24)"
    assert EvaluationReport.load(tmp_path / "new" / "report.json") == report


def test_one_setting_is_tested_on_everything(data):
    one = {"lost_features": ["k"], "lost_layers": [-1], "lost_centers": ["image"], "lost_l2norm": ["false"]}
    report = evaluate_backbone(READER, data, tasks=["lost"], **one)
    assert report.lost.choice is None
    assert len(report.lost.ids) == 9
    assert report.lost.settings == LostSettings(center="image")
    assert "settings as given" in report.lost.lines(0)[0]


def test_training_images_of_their_own(data):
    source = load_images(data, split=None)
    report = evaluate_backbone(READER, source.subset([7, 8, 9]), train=source.subset([0, 1, 2, 3]), **OPTIONS)
    assert report.lost.ids == ("row/7", "row/8", "row/9")
    assert report.lost.choice["num_images"] == 4


def test_a_file_of_dense_settings_sets_block_views_and_size(data, tmp_path):
    FeatureSettings(layer=1, views=4, image_size=48).save(tmp_path / "dense_settings.json")
    options = {"tasks": ["lost"], "lost_features": ["k"], "dense_settings": str(tmp_path / "dense_settings.json")}
    report = evaluate_backbone(READER, data, **options)
    assert report.lost.settings.layer == 1
    assert report.lost.protocol["dense"]["views"] == 4
    assert "shorter side 48 px, 4 views" in report.scores[0].protocol
    assert "pooled" not in report.scores[0].protocol
    assert EvaluationReport.load(report.save(tmp_path / "report.json")) == report


def test_vanilla_is_there_to_compare_with(data):
    scores = evaluate_backbone(READER, data, **OPTIONS).lost.scores
    assert list(scores) == ["lost", "vanilla", "attention", "center_box", "full_image"]
    assert scores["vanilla"].method == str(LostSettings())
    assert all(len(score.overlaps) == len(scores["lost"].overlaps) for score in scores.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_images": 1}, "of 1 images, but at least 2"),
        ({"lost_layers": [-9]}, "no setting for a model of 2 blocks"),
        ({"boxes": "number"}, "not a box of four numbers"),
        ({"dense_settings": "dense_settings.json"}, "dense_settings names a block, and so does lost_layers"),
    ],
)
def test_what_cannot_be_evaluated_is_named(data, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate_backbone(READER, data, **OPTIONS | change)


def test_layers_that_a_shallow_model_has_not_are_left_out():
    assert {settings.layer for settings in TASKS["lost"].Settings().candidates(2)} == {-1, -2}
    assert TASKS["lost"].Settings().candidates(12)[0] == LostSettings()


# --- Command line


@pytest.mark.slow
def test_two_models_on_the_command_line(data, tmp_path, capsys):
    for name in ("a", "b"):
        MODEL.save_pretrained(tmp_path / name)
        default_image_processor(32).save_pretrained(tmp_path / name)
    args = ["evaluate", "--model", str(tmp_path / "a"), "--model", str(tmp_path / "b"), "--tasks", "lost", "--data",
            str(data), "--lost_features", "k", "--lost_layers", "-1", "-2", "--lost_centers", "image",
            "--lost_l2norm", "false", "--output_dir", str(tmp_path / "out")]  # fmt: skip
    assert cli.main(args) == 0
    printed = capsys.readouterr().out
    assert printed.count("object discovery: CorLoc at IoU 0.5") == 2
    assert "best of 2 on 5 other images (seed 0)" in printed
    assert "| difference to a " in printed
    assert cli.main([*args, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [one["model"] for one in result["results"]] == ["a", "b"]
    reports = json.loads((tmp_path / "out" / "report.json").read_text())["reports"]
    assert reports[0]["lost"]["scores"] == reports[1]["lost"]["scores"]  # the same weights
    assert reports[0]["lost"]["settings"]["center"] == "image"


def test_a_bias_without_l2norm_is_one_of_dot_products(data, tmp_path, capsys):
    MODEL.save_pretrained(tmp_path / "a")
    default_image_processor(32).save_pretrained(tmp_path / "a")
    args = ["evaluate", "--model", str(tmp_path / "a"), "--tasks", "lost", "--data", str(data)]
    args += ["--lost_features", "v", "--lost_layers", "-1", "--lost_centers", "none", "--lost_l2norm", "false"]
    args += ["--lost_biases", "-3", "--output_dir", str(tmp_path), "--json"]
    assert cli.main(args) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["scores"][0]["task"] == "lost"
    settings = EvaluationReport.load(tmp_path).lost.settings
    assert (settings.l2norm, settings.bias, settings.feature) == (False, -3.0, "v")
    assert cli.main([*args, "--lost_l2norm", "maybe"]) == 1
    assert "contains an unknown value. Choose from true, false." in capsys.readouterr().err
