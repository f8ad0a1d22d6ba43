"""Metrics against loops over their definitions, combined, gathered over processes, offline, and with wrong input."""

import math
import socket
import subprocess
import sys
import textwrap
import threading
from unittest.mock import Mock

import evaluate
import numpy as np
import pytest
import torch

from hf_regvit.evaluation.metrics import (
    ClassScores,
    DepthErrors,
    MeanAveragePrecision,
    MeanIoU,
    TopKAccuracy,
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    refuse = Mock(side_effect=AssertionError("a metric opened a connection"))
    monkeypatch.setattr(socket.socket, "connect", refuse)


def in_batches(metric, size, **columns):
    """Pass the same data in several calls."""
    count = len(next(iter(columns.values())))
    for start in range(0, count, size):
        metric.add_batch(**{name: values[start : start + size] for name, values in columns.items()})
    return metric.compute()


# --- Slow twins


def test_top_k_equals_sorting():
    rng = np.random.default_rng(0)
    scores, truth = rng.integers(0, 4, (40, 6)) / 2.0, rng.integers(0, 6, 40)  # many equal scores
    hits = {1: 0, 3: 0}
    for row, label in zip(scores.tolist(), truth.tolist(), strict=True):
        ranked = sorted(range(6), key=lambda c: (-row[c], c))
        for k in hits:
            hits[k] += label in ranked[:k]
    expected = {f"top{k}": pytest.approx(count / 40) for k, count in hits.items()}
    metric = TopKAccuracy(k=(1, 3))
    assert metric.compute(predictions=scores, references=truth) == expected
    assert metric.compute(predictions=torch.tensor(scores), references=torch.tensor(truth)) == expected  # reset
    assert in_batches(metric, 7, predictions=scores.tolist(), references=truth.tolist()) == expected
    classes = scores.argmax(1)
    assert TopKAccuracy().compute(predictions=classes, references=truth)["top1"] == pytest.approx(hits[1] / 40)


def test_class_scores_equal_counting():
    rng = np.random.default_rng(0)
    truth, said = rng.integers(0, 4, 40), rng.integers(0, 5, 40)  # class 4 does not occur but is predicted
    found, f1 = [], []
    for one in range(4):
        right = sum(t == s == one for t, s in zip(truth, said))
        found.append(right / sum(truth == one))
        precision, recall = right / max(1, sum(said == one)), found[-1]
        f1.append(2 * precision * recall / (precision + recall) if right else 0.0)
    metric = ClassScores(num_classes=5)
    for predictions in (said, torch.nn.functional.one_hot(torch.from_numpy(said), 5).float()):
        result = in_batches(metric, 7, predictions=predictions, references=truth)
        assert result["mean_class_accuracy"] == pytest.approx(sum(found) / 4)
        assert result["f1"] == pytest.approx(sum(f1) / 4)
        assert result["per_class"] == pytest.approx([*found, math.nan], nan_ok=True)
        matrix = np.array(result["confusion_matrix"])
        for t, s in np.ndindex(5, 5):
            assert matrix[t, s] == sum((truth == t) & (said == s))
    with pytest.raises(ValueError, match="references contain class id 5; expected 0 to 4"):
        metric.add_batch(predictions=[0], references=[5])
    with pytest.raises(ValueError, match=r"predictions \(1, 3\) must be \(n, 5\) or \(n,\)"):
        metric.add_batch(predictions=[[0.1, 0.2, 0.3]], references=[1])


@pytest.mark.parametrize("ignore_index", [255, None])
def test_mean_iou_equals_counting_pixels(ignore_index):
    rng = np.random.default_rng(0)
    classes = 5
    predicted = [rng.integers(0, classes - 1, shape) for shape in ((4, 6), (3, 3), (5, 2))]
    true = [rng.integers(0, classes - 1, one.shape).astype(np.uint8) for one in predicted]
    if ignore_index is not None:
        true[0][1, :4] = 255
        predicted[0][1, 0] = 3
    both, either, right, total = [0] * classes, [0] * classes, 0, 0
    of_class = [0] * classes
    for one, truth in zip(predicted, true, strict=True):
        for guess, label in zip(one.ravel().tolist(), truth.ravel().tolist(), strict=True):
            if label == ignore_index:
                continue
            total, right = total + 1, right + (guess == label)
            of_class[label] += 1
            for c in range(classes):
                both[c] += guess == c == label
                either[c] += c in (guess, label)
    result = MeanIoU(num_classes=classes, ignore_index=ignore_index).compute(predictions=predicted, references=true)
    iou = [both[c] / either[c] if either[c] else math.nan for c in range(classes)]
    accuracy = [both[c] / of_class[c] if of_class[c] else math.nan for c in range(classes)]
    assert result["per_category_iou"] == pytest.approx(iou, nan_ok=True)
    assert math.isnan(result["per_category_iou"][4])  # does not occur, left out of the mean
    assert result["mean_iou"] == pytest.approx(np.nanmean(iou))
    assert result["per_category_accuracy"] == pytest.approx(accuracy, nan_ok=True)
    assert result["mean_accuracy"] == pytest.approx(np.nanmean(accuracy))
    assert result["overall_accuracy"] == pytest.approx(right / total)


def test_mean_iou_pools_pixels_over_batches():
    rng = np.random.default_rng(0)
    predicted, true = rng.integers(0, 3, (6, 4, 5)), rng.integers(0, 3, (6, 4, 5))
    metric = MeanIoU(num_classes=3)
    whole = metric.compute(predictions=predicted, references=true)
    assert in_batches(metric, 2, predictions=torch.tensor(predicted), references=torch.tensor(true)) == whole
    for one, truth in zip(predicted, true, strict=True):
        metric.add(prediction=one, reference=truth)
    assert metric.compute() == whole


def test_a_prediction_of_what_does_not_count_is_no_way_out():
    with pytest.raises(ValueError, match="predictions contain class id 255"):
        MeanIoU(num_classes=3).compute(predictions=[[[0, 255]]], references=[[[0, 1]]])
    allowed = MeanIoU(num_classes=3).compute(predictions=[[[0, 255]]], references=[[[0, 255]]])
    assert allowed["overall_accuracy"] == 1.0


def test_a_class_only_predicted_counts_as_missed():
    result = MeanIoU(num_classes=3).compute(predictions=[[[0, 2]]], references=[[[0, 0]]])
    assert result["per_category_iou"] == pytest.approx([0.5, math.nan, 0.0], nan_ok=True)
    assert result["mean_iou"] == pytest.approx(0.25)


def test_masks_are_not_kept():
    metric = MeanIoU(num_classes=4)
    mask = np.zeros((8, 256, 256), dtype=np.uint8)
    for _ in range(20):
        metric.add_batch(predictions=mask, references=mask)  # 21 MB of masks as bytes, 168 MB as integers of Arrow
    metric.writer.finalize()
    assert len(metric.buf_writer.getvalue()) < 20_000


def test_depth_equals_the_definitions():
    rng = np.random.default_rng(0)
    predicted = rng.uniform(0.5, 9, (3, 4, 5)).astype(np.float32)
    true = rng.uniform(0.5, 9, (3, 4, 5)).astype(np.float32)
    true[0, 0, :3] = (0.0, np.nan, -1.0)  # not measured
    true[1, 2] = 20.0  # beyond max_depth
    predicted[2, 1] = (-3.0, 0.0, 40.0, 8.0, 8.0)  # clipped to the range
    rows = []
    for one, truth in zip(predicted.tolist(), true.tolist(), strict=True):
        pairs = [
            (min(max(p, 1e-3), 10.0), t)
            for ps, ts in zip(one, truth, strict=True)
            for p, t in zip(ps, ts, strict=True)
            if 1e-3 <= t <= 10.0
        ]
        rows.append(
            [
                math.sqrt(sum((p - t) ** 2 for p, t in pairs) / len(pairs)),
                sum(abs(p - t) / t for p, t in pairs) / len(pairs),
                *(sum(max(p / t, t / p) < 1.25**i for p, t in pairs) / len(pairs) for i in (1, 2, 3)),
            ]
        )
    means = [sum(column) / 3 for column in zip(*rows, strict=True)]
    result = DepthErrors(max_depth=10.0).compute(predictions=predicted, references=true)
    assert list(result) == ["rmse", "abs_rel", "delta1", "delta2", "delta3"]
    assert list(result.values()) == pytest.approx(means)


def test_depths_at_the_ends_of_the_range_count_and_a_ratio_at_the_bound_is_beyond_it():
    # Numbers that are exact in floating point: ratios of 1, 1.25 and its square and cube.
    errors = DepthErrors(min_depth=1.0, max_depth=8.0)
    (ends,) = errors.reduce([[[1.0, 8.0, 3.0]]], [[[1.0, 8.0, 16.0]]])
    assert ends == pytest.approx([0, 0, 1, 1, 1])
    assert len(errors.reduce([[[3.0]]], [[[0.5]]])) == 0
    assert len(errors.reduce([[[3.0]]], [[[8.5]]])) == 0
    (bounds,) = errors.reduce([[[1.25, 1.5625, 1.953125, 1.0]]], [[[1.0, 1.0, 1.0, 1.25]]])
    assert bounds[2:].tolist() == [0.0, 0.5, 0.75]


def test_images_without_a_measured_pixel_do_not_count():
    metric = DepthErrors()
    result = metric.compute(predictions=[[[2.0]], [[np.nan]]], references=[[[1.0]], [[0.0]]])
    assert result["rmse"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="all were ignored"):
        metric.compute(predictions=[[[1.0]]], references=[[[0.0]]])


def test_average_precision_is_that_of_scikit_learn():
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    scores, relevant = rng.random((7, 30)), rng.random((7, 30)) < 0.2
    relevant[:, 0] = True
    metric = MeanAveragePrecision()
    metric.add_batch(predictions=scores[:3], references=relevant[:3])
    result = metric.compute(predictions=scores[3:], references=relevant[3:])
    expected = [average_precision_score(truth, row) for truth, row in zip(relevant, scores, strict=True)]
    assert result == {"map": pytest.approx(np.mean(expected))}
    # Among equal scores the first ranks first.
    result = MeanAveragePrecision().compute(
        predictions=[[3.0, 2.0, 1.0, 1.0]], references=[[False, True, False, True]]
    )
    assert result["map"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    with pytest.raises(ValueError, match="No image of the gallery is relevant to query 1"):
        MeanAveragePrecision().compute(predictions=[[1.0], [1.0]], references=[[True], [False]])
    with pytest.raises(ValueError, match=r"predictions \(2, 1\) and references \(1, 2\)"):
        MeanAveragePrecision().compute(predictions=[[1.0], [1.0]], references=[[True, False]])


# --- Together


def test_combine_by_shared_inputs():
    together = evaluate.combine([TopKAccuracy(k=(1, 2)), ClassScores(num_classes=3)])
    data = {"predictions": torch.eye(3), "references": torch.tensor([0, 1, 0])}
    at_once = together.compute(**data)
    assert (at_once["top1"], at_once["top2"]) == (pytest.approx(2 / 3), 1.0)
    assert at_once["mean_class_accuracy"] == pytest.approx(0.75)
    together.add_batch(predictions=data["predictions"][:2], references=data["references"][:2])
    together.add(prediction=data["predictions"][2], reference=0)
    assert str(together.compute()) == str(at_once)  # as text, because NaN differs from itself
    same_names = evaluate.combine([TopKAccuracy(), TopKAccuracy()])
    assert set(same_names.compute(**data)) == {"top_k_accuracy_0_top1", "top_k_accuracy_1_top1"}


TWO = {"predictions": [[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]], "references": [0, 0, 1]}


def gather(make, shares, cache_dir):
    """Run the metric in one thread per share; return what each thread returns or raises."""
    results = [None] * len(shares)

    def work(process):
        try:
            metric = make(num_process=len(shares), process_id=process, cache_dir=cache_dir, experiment_id="a")
            if shares[process]:
                metric.add_batch(**shares[process])
            results[process] = metric.compute()
        except Exception as error:
            results[process] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_instances_are_gathered_in_the_first(tmp_path):
    shares = [{name: values[:1] for name, values in TWO.items()}, {name: values[1:] for name, values in TWO.items()}]
    alone = TopKAccuracy(k=(1, 2)).compute(**TWO)
    assert gather(lambda **options: TopKAccuracy(k=(1, 2), **options), shares, str(tmp_path)) == [alone, None]


def test_a_process_without_samples_keeps_nobody_waiting(tmp_path):
    assert gather(TopKAccuracy, [TWO, None], str(tmp_path)) == [TopKAccuracy().compute(**TWO), None]
    assert gather(TopKAccuracy, [None, TWO], str(tmp_path)) == [TopKAccuracy().compute(**TWO), None]
    first, second = gather(TopKAccuracy, [None, None], str(tmp_path))
    assert isinstance(first, ValueError)
    assert "all were ignored" in str(first)
    assert second is None


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    program = textwrap.dedent(
        """
        import sys, time
        import numpy as np
        from hf_regvit.evaluation.metrics import DepthErrors, MeanIoU
        process, folder = int(sys.argv[1]), sys.argv[2]
        rng = np.random.default_rng(0)
        predicted, true = rng.integers(0, 4, (2, 10, 6, 6))
        depths = rng.uniform(1, 9, (2, 10, 6, 6))
        options = dict(num_process=2, process_id=process, cache_dir=folder, experiment_id="b")
        if process == 0:
            time.sleep(1)  # the others wait
        mine = slice(0, 3) if process == 0 else slice(3, 10)
        print(MeanIoU(num_classes=4, **options).compute(predictions=predicted[mine], references=true[mine]))
        print(DepthErrors(**options).compute(predictions=depths[0][mine], references=depths[1][mine]))
        """
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", program, str(i), str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    outputs = [run.communicate(timeout=300)[0].splitlines() for run in runs]
    rng = np.random.default_rng(0)
    predicted, true = rng.integers(0, 4, (2, 10, 6, 6))
    depths = rng.uniform(1, 9, (2, 10, 6, 6))
    assert outputs[0] == [
        str(MeanIoU(num_classes=4).compute(predictions=predicted, references=true)),
        str(DepthErrors().compute(predictions=depths[0], references=depths[1])),
    ]
    assert outputs[1] == ["None", "None"]


# --- Wrong input


@pytest.mark.parametrize(
    ("metric", "data", "error", "message"),
    [
        (TopKAccuracy, {"predictions": [0.9, 2.7], "references": [1, 2]}, TypeError, r"0\.9.*not rounded"),
        (TopKAccuracy, {"predictions": [[0.1, 0.9]], "references": [1.0]}, TypeError, r"references.*float64"),
        (TopKAccuracy, {"predictions": [[0.1, np.nan]], "references": [1]}, ValueError, r"nan at \[0, 1\]"),
        (TopKAccuracy, {"predictions": [[0.1, 0.9]], "references": [1, 0]}, ValueError, r"\(1, 2\).*\(2,\)"),
        (TopKAccuracy, {"predictions": [[0.1, 0.9]], "references": [2]}, ValueError, "cover 2 classes"),
        (TopKAccuracy, {"predictions": [[0.1, 0.9]], "references": [-1]}, ValueError, "start at 0"),
        (TopKAccuracy, {"predictions": [["a", "b"]], "references": [1]}, TypeError, "must be numbers"),
        (TopKAccuracy, {"predictions": [[1.0], [1.0, 2.0]], "references": [0, 1]}, ValueError, "different lengths"),
        (TopKAccuracy, {"predictions": [[0.1, 0.9]]}, ValueError, "references are missing"),
        (TopKAccuracy, {"predictions": [1], "references": [1], "k": 5}, TypeError, "unexpected keyword argument 'k'"),
        (MeanIoU, {"predictions": [[[0.0, 1.0]]], "references": [[[0, 1]]]}, TypeError, "argmax"),
        (MeanIoU, {"predictions": [[[0, 3]]], "references": [[[0, 1]]]}, ValueError, "class id 3; expected 0 to 2"),
        (MeanIoU, {"predictions": [[[0, 1]]], "references": [[[0, 7]]]}, ValueError, "references contain class id 7"),
        (MeanIoU, {"predictions": [[[0, 1]]], "references": [[[0], [1]]]}, ValueError, "Resize the prediction"),
        (MeanIoU, {"predictions": [[0, 1]], "references": [[0, 1]]}, ValueError, r"\(2,\), but must be \(height"),
        (MeanIoU, {"predictions": [[[0]]], "references": [[[255]]]}, ValueError, "nothing to score"),
        (DepthErrors, {"predictions": [[[np.nan]]], "references": [[[1.0]]]}, ValueError, "NaN or infinite"),
        (DepthErrors, {"predictions": [[[True]]], "references": [[[1.0]]]}, TypeError, "booleans"),
        (TopKAccuracy, {}, ValueError, "no data to compute from"),
    ],
)
def test_wrong_input_is_named(metric, data, error, message):
    settings = {"num_classes": 3} if metric is MeanIoU else {}
    with pytest.raises(error, match=message):
        metric(**settings).compute(**data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKAccuracy(k=(0,)), r"k=\(0,\)"),
        (lambda: MeanIoU(num_classes=1), "num_classes=1"),
        (lambda: MeanIoU(num_classes=3, ignore_index=2), "ignore_index=2"),
        (lambda: DepthErrors(min_depth=2, max_depth=1), "min_depth=2"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_misspelt_option_is_not_swallowed():
    with pytest.raises(TypeError, match="min_dept"):
        DepthErrors(min_dept=0.7)


def test_a_wrong_batch_leaves_the_right_ones():
    metric = TopKAccuracy()
    metric.add_batch(predictions=[1, 2], references=[1, 1])
    with pytest.raises(TypeError):
        metric.add_batch(predictions=[0.5], references=[1])
    assert metric.compute() == {"top1": 0.5}
