"""Heads on frozen features against their slow twins: one SGD per head, scikit-learn, loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_regvit.evaluation.knn import few_shot_indices
from hf_regvit.evaluation.linear import (
    LEARNING_RATES,
    LOGISTIC_CS,
    HeadSettings,
    LinearGrid,
    LinearHeads,
    _batches,
    _Group,
    head_inputs,
    logistic_path,
    merit,
    train_linear_heads,
)

CLASSES = 4


@pytest.fixture(scope="module")
def features():
    """(40, 3, 6) vectors, (40, 6) mean patches and labels that they separate only partly."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % CLASSES
    centers = torch.randn(CLASSES, 6, generator=generator)
    vectors = torch.randn(40, 3, 6, generator=generator) + centers[labels][:, None]
    return vectors, torch.randn(40, 6, generator=generator) + 0.5 * centers[labels], labels


def test_the_official_grid():
    assert len(LEARNING_RATES) == 13
    assert (LEARNING_RATES[0], LEARNING_RATES[-1]) == (1e-5, 1e-1)
    assert len(LOGISTIC_CS) == 45
    assert (LOGISTIC_CS[0], LOGISTIC_CS[-1]) == (pytest.approx(1e-6), pytest.approx(1e5))
    grid = LinearGrid()
    assert len(grid.learning_rates) * len(grid.num_blocks) * len(grid.mean_patch) == 52


def alone(x, labels, rate, grid, seed):
    """Train one head with torch's own SGD, autograd and cosine schedule."""
    weight = torch.empty(x.shape[1], CLASSES).normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
    weight.requires_grad_()
    bias = torch.zeros(CLASSES, requires_grad=True)
    batch_size = min(grid.batch_size, len(x))
    optimizer = torch.optim.SGD([weight, bias], lr=rate * batch_size / 256, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, grid.num_steps, eta_min=0)
    for batch in _batches(len(x), batch_size, grid.num_steps, seed):
        optimizer.zero_grad()
        F.cross_entropy(x[batch] @ weight + bias, labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return weight.detach(), bias.detach()


@pytest.mark.parametrize("batch_size", [16, 64])  # 64 exceeds the number of images
def test_heads_trained_at_once_are_those_trained_alone(features, batch_size):
    vectors, mean_patch, labels = features
    grid = LinearGrid((0.1, 2.0, 8.0), (1, 3), num_steps=25, batch_size=batch_size)
    heads = train_linear_heads(vectors, mean_patch, labels, num_classes=CLASSES, grid=grid, seed=3)
    found = dict(heads.scores(vectors, mean_patch))
    assert len(found) == 3 * 2 * 2
    for head, scores in found.items():
        x = head_inputs(vectors, mean_patch, head.num_blocks, head.mean_patch)
        assert x.shape == (40, (head.num_blocks + head.mean_patch) * 6)
        weight, bias = alone(x, labels, head.learning_rate, grid, seed=3)
        torch.testing.assert_close(scores, x @ weight + bias, atol=2e-5, rtol=1e-4)
    trained = {head.learning_rate: merit(scores, labels) for head, scores in found.items() if head.num_blocks == 3}
    assert trained[2.0] > trained[0.1]  # otherwise the heads compared would be untrained


def test_a_head_of_a_grid_of_its_own_is_the_same(features):
    vectors, mean_patch, labels = features
    grid = LinearGrid((0.1, 2.0), (1, 2), num_steps=20, batch_size=16)
    options = {"num_classes": CLASSES, "seed": 1}
    together = dict(train_linear_heads(vectors, mean_patch, labels, grid=grid, **options).scores(vectors, mean_patch))
    head = HeadSettings(2, True, 2.0)
    (pair,) = train_linear_heads(vectors, mean_patch, labels, grid=grid.only(head), **options).scores(
        vectors, mean_patch
    )
    assert pair[0] == head
    torch.testing.assert_close(pair[1], together[head], atol=1e-5, rtol=1e-5)
    assert str(head) == "2 blocks + mean patch, lr 2"


def test_inputs_are_the_last_blocks_side_by_side():
    vectors, mean_patch = torch.arange(12.0).reshape(1, 3, 4), torch.full((1, 4), 99.0)
    assert head_inputs(vectors, mean_patch, 2, True)[0].tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 99, 99, 99, 99]
    assert head_inputs(vectors, mean_patch, 1, False)[0].tolist() == [8, 9, 10, 11]


def test_batches_pass_over_everything_before_they_repeat():
    batches = list(_batches(10, 4, 5, seed=0))
    assert all(len(batch) == 4 for batch in batches)
    drawn = torch.cat(batches)
    assert sorted(drawn[:10].tolist()) == list(range(10)) == sorted(drawn[10:].tolist())
    assert drawn[:10].tolist() != drawn[10:].tolist()
    assert torch.equal(torch.cat(list(_batches(10, 4, 5, seed=0))), drawn)


def test_of_equally_right_heads_the_surer_one_is_chosen():
    right, unsure = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.1, 0.0]])
    truth = torch.tensor([0])
    assert merit(right, truth) > merit(unsure, truth)
    assert merit(torch.tensor([[0.0, 9.0]]), truth) < merit(unsure, truth)
    settings = tuple(HeadSettings(1, False, rate) for rate in (0.1, 0.2))
    group = _Group(1, False, torch.tensor([[0.1, 0.0, 2.0, 0.0]]), torch.zeros(4))
    best, accuracy = LinearHeads(settings, (group,), 2).best(torch.ones(1, 1, 1), torch.ones(1, 1), truth)
    assert (best.learning_rate, accuracy) == (0.2, 1.0)


@pytest.mark.parametrize("num_classes", [2, CLASSES])
@pytest.mark.parametrize("c", [1e-3, 0.1, 10.0])
def test_logistic_regression_is_at_the_minimum_of_its_objective(features, c, num_classes):
    from sklearn.linear_model import LogisticRegression

    vectors, _, labels = features
    x, labels = (vectors[:, -1] * 3 + 1).double(), labels % num_classes  # neither centered nor of unit length
    (model,) = logistic_path(x, labels, num_classes=num_classes, cs=(c,), tolerance=1e-10)
    weight, bias = model.weight.clone().requires_grad_(), model.bias.clone().requires_grad_()
    objective = F.cross_entropy(x @ weight + bias, labels) + weight.square().sum() / (2 * c * len(x))
    for slope in torch.autograd.grad(objective, (weight, bias)):
        # L-BFGS stops where the objective no longer changes in float64; there is no smaller slope than about 1e-6.
        assert slope.abs().max() < 5e-6
    torch.testing.assert_close(model(x), (x @ model.weight + model.bias).float())
    if num_classes > 2:  # scikit-learn's own fit of two classes has another penalty
        other = LogisticRegression(C=c, max_iter=2000, tol=1e-10).fit(x.numpy(), labels.numpy())
        expected = torch.from_numpy(other.predict_proba(x.numpy())).float()
        torch.testing.assert_close(model(x).softmax(1), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(model.weight.T, torch.from_numpy(other.coef_), atol=1e-3, rtol=1e-3)


def test_a_class_without_training_images_is_never_predicted(features):
    vectors, _, labels = features
    x, labels = vectors[:, -1], labels.clamp(max=2)
    for present in (labels, labels[labels < 2], labels[labels == 1]):
        (model,) = logistic_path(x[: len(present)], present, num_classes=5, cs=(1.0,))
        assert set(model(x).argmax(1).tolist()) <= set(present.tolist())
        assert torch.isfinite(model(x)[:, present.unique()]).all()


def test_a_path_ends_where_each_c_alone_does(features):
    vectors, _, labels = features
    x, cs = vectors[:, -1], (1e-3, 0.1, 10.0)
    path = list(logistic_path(x, labels, num_classes=CLASSES, cs=cs))
    assert [model.c for model in path] == list(cs)
    for model in path:
        (single,) = logistic_path(x, labels, num_classes=CLASSES, cs=(model.c,))
        torch.testing.assert_close(model(x).softmax(1), single(x).softmax(1), atol=1e-4, rtol=0)
    norms = [model.weight.norm().item() for model in path]
    assert norms == sorted(norms)  # a larger C regularizes less


def test_few_shot_draws_so_many_of_every_class():
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 3, 3, 3])
    chosen = few_shot_indices(labels, 2, seed=0)
    assert labels[chosen].bincount().tolist() == [2, 2, 0, 2]
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    draws = {tuple(few_shot_indices(labels, 2, seed=seed).tolist()) for seed in range(20)}
    assert len(draws) > 10
    assert tuple(few_shot_indices(labels, 2, seed=0).tolist()) == tuple(chosen.tolist())
    with pytest.raises(ValueError, match="Class 0 has 3 training images, but 4 per class were requested"):
        few_shot_indices(labels, 4, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels have shape \(3,\) for 40 images"),
        ({"num_classes": 3}, r"Labels span \[0, 3\], but must lie in \[0, 3\)"),
        ({"mean_patch": torch.zeros(40, 5)}, r"mean_patch \(40, 5\) do not match"),
        ({"grid": LinearGrid(num_blocks=(4,))}, "do not match heads of"),
    ],
)
def test_what_cannot_be_trained_is_named(features, change, message):
    vectors, mean_patch, labels = features
    given = {"vectors": vectors, "mean_patch": mean_patch, "labels": labels, "num_classes": CLASSES} | change
    with pytest.raises(ValueError, match=message):
        train_linear_heads(given.pop("vectors"), given.pop("mean_patch"), given.pop("labels"), **given)


@pytest.mark.parametrize(
    "change", [{"learning_rates": ()}, {"learning_rates": (0.0,)}, {"num_blocks": (0,)}, {"num_steps": 0}]
)
def test_empty_grids_are_refused(change):
    with pytest.raises(ValueError, match="LinearGrid"):
        LinearGrid(**change)


def test_cs_ascend(features):
    vectors, _, labels = features
    with pytest.raises(ValueError, match="must be above 0 and in ascending order"):
        next(logistic_path(vectors[:, 0], labels, num_classes=CLASSES, cs=(1.0, 0.1)))
    assert math.isclose(np.log10(LOGISTIC_CS[1] / LOGISTIC_CS[0]), 11 / 44)
