"""Test weighted kNN and linear probes: slow references, chunking, and invalid input."""

import math

import pytest
import torch

from hf_regvit.evaluation.knn import knn_accuracy, knn_classify
from hf_regvit.evaluation.linear import ridge_regression, softmax_regression


def slow_knn(train, labels, test, k, temperature, num_classes):
    """Compute weighted kNN by its definition, one test image at a time."""
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


@pytest.mark.parametrize(("seed", "temperature"), [(0, 0.07), (1, 0.07), (2, 0.5)])
def test_equals_the_slow_twin(seed, temperature):
    train, labels, test = random_problem(seed)
    expected = slow_knn(train, labels, test, (1, 5, 12), temperature, 4)
    options = {} if temperature == 0.07 else {"temperature": temperature}
    actual = knn_classify(train, labels, test, k=(1, 5, 12), num_classes=4, **options)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert torch.allclose(actual[12].sum(1), torch.ones(11))
    assert (actual[5].sum(1) < 1).all()  # the softmax runs over the largest k


def test_chunks_do_not_change_the_result():
    train, labels, test = random_problem()
    whole = knn_classify(train, labels, test, k=(5,))
    for chunk_size in (1, 4, 11, 100):
        torch.testing.assert_close(knn_classify(train, labels, test, k=(5,), chunk_size=chunk_size), whole)
    for bank_chunk_size in (1, 4, 12, 36, 37, 100):  # below, at and above k, and with a short last chunk
        parts = knn_classify(train, labels, test, k=(5,), chunk_size=4, bank_chunk_size=bank_chunk_size)
        torch.testing.assert_close(parts, whole)


def test_every_image_may_be_a_neighbour():
    train, labels, test = random_problem()
    torch.testing.assert_close(
        knn_classify(train, labels, test, k=(37,), num_classes=4)[37],
        slow_knn(train, labels, test, (37,), 0.07, 4)[37], atol=1e-5, rtol=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"k=\(38,\) is out of range: values must be in \[1, 37\]"):
        knn_classify(train, labels, test, k=(38,))


@pytest.mark.parametrize("bank_chunk_size", [1, 2, 3])
def test_of_equal_images_in_different_parts_the_earlier_one_stays(bank_chunk_size):
    train, labels = torch.ones(6, 3), torch.tensor([2, 1, 0, 1, 0, 0])
    found = knn_classify(train, labels, torch.ones(1, 3), k=(1,), bank_chunk_size=bank_chunk_size)[1]
    assert found.argmax().item() == 2


def test_no_more_similarities_are_held_than_a_chunk_has(monkeypatch):
    train, labels, test = random_problem()
    held = []
    top = torch.Tensor.topk

    def watched(self, *args, **kwargs):
        held.append(self.numel())
        return top(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", watched)
    knn_classify(train, labels, test, k=(2,), chunk_size=3, bank_chunk_size=10)
    assert max(held) == 3 * 10


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
        ({"num_classes": 2}, r"lie in \[0, 2\)"),
        ({"train_labels": torch.zeros(5)}, "one label per image"),
        ({"test_features": torch.zeros(3, 7)}, "with the same width"),
        ({"test_features": torch.zeros(0, 6)}, "no test features"),
        ({"test_features": torch.full((3, 6), torch.nan)}, "test_features contain NaN"),
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


# --- Linear models ---


def test_softmax_regression_equals_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(120, 5, generator=generator) * torch.tensor([1.0, 10, 0.1, 3, 1]) + 4
    labels = (features[:, 0] + features[:, 1] / 10 + torch.randn(120, generator=generator)).round().long().clamp(3, 6)
    labels = labels - 3
    model = softmax_regression(features, labels, num_classes=4, l2=1e-2)
    standard = ((features - features.mean(0)) / features.std(0, correction=0)).double().numpy()
    reference = LogisticRegression(C=1 / (1e-2 * 120), tol=1e-8, max_iter=5000).fit(standard, labels.numpy())

    def objective(weight, bias):
        scores = torch.from_numpy(standard) @ weight + bias
        return (torch.nn.functional.cross_entropy(scores, labels) + 1e-2 / 2 * weight.square().sum()).item()

    coefficients = [torch.from_numpy(values) for values in (reference.coef_.T, reference.intercept_)]
    assert objective(model.weight, model.bias) == pytest.approx(objective(*coefficients), abs=2e-6)
    assert (model(features).argmax(1).numpy() == reference.predict(standard)).all()


def test_ridge_regression_solves_its_normal_equations():
    generator = torch.Generator().manual_seed(0)
    features, targets = torch.randn(30, 4, generator=generator) * 7 + 2, torch.randn(30, 3, generator=generator)
    l2 = 0.05
    model = ridge_regression(features, targets, l2=l2)
    standard = ((features - features.mean(0)) / features.std(0, correction=0)).double()
    rows = torch.cat((standard, math.sqrt(l2 * 30) * torch.eye(4).double()))  # the penalty as four extra observations
    centred = targets.double() - targets.double().mean(0)
    expected = torch.linalg.lstsq(rows, torch.cat((centred, torch.zeros(4, 3).double()))).solution
    torch.testing.assert_close(model.weight.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(features).mean(0), targets.mean(0), atol=1e-5, rtol=0)


def test_constant_channels_do_no_harm():
    features = torch.cat((torch.randn(40, 2, generator=torch.Generator().manual_seed(0)), torch.full((40, 1), 5.0)), 1)
    labels = (features[:, 0] > 0).long()
    assert (softmax_regression(features, labels, num_classes=2)(features).argmax(1) == labels).float().mean() > 0.95
    assert torch.isfinite(ridge_regression(features, features[:, :1], l2=1e-6)(features)).all()


@pytest.mark.parametrize("fit", [lambda x, y: softmax_regression(x, y, num_classes=2), ridge_regression])
def test_linear_models_want_one_target_each(fit):
    with pytest.raises(ValueError, match="expected one each"):
        fit(torch.randn(5, 2), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="expected one each"):
        fit(torch.randn(0, 2), torch.zeros(0, dtype=torch.long))
