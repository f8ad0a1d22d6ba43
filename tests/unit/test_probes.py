"""Weighted kNN: slow twin, memory chunks, wrong input."""

import math

import pytest
import torch

from hf_regvit.probes import knn_accuracy, knn_classify


def slow_knn(train, labels, test, k, temperature, num_classes):
    """The definition, one test image at a time."""
    result = {}
    for neighbours in k:
        rows = []
        for query in test.tolist():
            norm = math.sqrt(sum(x * x for x in query))
            ranked = []
            for row, label in zip(train.tolist(), labels.tolist(), strict=True):
                length = math.sqrt(sum(x * x for x in row))
                ranked.append((sum(a * b for a, b in zip(query, row, strict=True)) / norm / length, label))
            ranked = sorted(ranked, reverse=True)[: max(k)]
            weights = [math.exp(similarity / temperature) for similarity, _ in ranked]
            scores = [0.0] * num_classes
            for weight, (_, label) in list(zip(weights, ranked, strict=True))[:neighbours]:
                scores[label] += weight / sum(weights)
            rows.append(scores)
        result[neighbours] = torch.tensor(rows)
    return result


def random_problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    train = torch.randn(37, 6, generator=generator) * 5
    labels = torch.randint(0, 4, (37,), generator=generator)
    return train, labels, torch.randn(11, 6, generator=generator) * 0.3


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_slow_twin(seed):
    train, labels, test = random_problem(seed)
    expected = slow_knn(train, labels, test, (1, 5, 12), 0.07, 4)
    actual = knn_classify(train, labels, test, k=(1, 5, 12), num_classes=4)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert torch.allclose(actual[12].sum(1), torch.ones(11))
    assert (actual[5].sum(1) < 1).all()  # the softmax runs over the largest k


def test_chunks_do_not_change_the_result():
    train, labels, test = random_problem()
    whole = knn_classify(train, labels, test, k=(5,))
    for chunk_size in (1, 4, 11, 100):
        torch.testing.assert_close(knn_classify(train, labels, test, k=(5,), chunk_size=chunk_size), whole)


def test_arguments_are_left_alone_and_half_precision_is_accepted():
    train, labels, test = random_problem()
    copies = [tensor.clone() for tensor in (train, labels, test)]
    full = knn_classify(train, labels, test, k=(3,))[3]
    assert all(torch.equal(a, b) for a, b in zip((train, labels, test), copies, strict=True))
    half = knn_classify(train.bfloat16(), labels.int(), test.bfloat16(), k=(3,))[3]
    assert half.dtype == full.dtype == torch.float32


def test_accuracy_counts_the_best_class():
    train = torch.eye(3)
    assert knn_accuracy(train, torch.arange(3), train, torch.tensor([0, 1, 0]), k=(1,))[1] == pytest.approx(2 / 3)
    # A class that only the test images have is never predicted and simply counts as wrong.
    assert knn_accuracy(train, torch.arange(3), train, torch.tensor([0, 1, 7]), k=(1,))[1] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (40,)}, r"k=\(40,\).*\[1, 37\]"),
        ({"k": (0,)}, "k="),
        ({"k": ()}, "k="),
        ({"num_classes": 2}, r"expected \[0, 2\)"),
        ({"train_labels": torch.zeros(5)}, "one per training image"),
        ({"test_features": torch.zeros(3, 7)}, "one width"),
        ({"test_features": torch.zeros(0, 6)}, "no test features"),
        ({"test_features": torch.full((3, 6), torch.nan)}, "test_features hold NaN"),
    ],
)
def test_wrong_input_is_named(change, message):
    train, labels, test = random_problem()
    arguments = {"train_features": train, "train_labels": labels, "test_features": test, "k": (5,)} | change
    with pytest.raises(ValueError, match=message):
        knn_classify(**arguments)


def test_labels_must_match_the_test_images():
    train, labels, test = random_problem()
    with pytest.raises(ValueError, match="2 test labels for 11"):
        knn_accuracy(train, labels, test, torch.zeros(2), k=(5,))
