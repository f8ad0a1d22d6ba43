"""The contrastive losses against slow implementations in float64, and at values that are known."""

import math

import pytest
import torch
import torch.nn.functional as F

import oracles
from hf_regvit.image_text.losses import sigmoid_loss, softmax_loss


def pairs(count=5, width=7):
    generator = torch.Generator().manual_seed(3)
    return [F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2)]


@pytest.mark.parametrize("scale", [1.0, 14.3])
def test_losses_equal_their_slow_twins(scale):
    images, texts = pairs()
    factor, bias = (torch.tensor(value, dtype=torch.float64) for value in (scale, -3.5))
    softmax = softmax_loss(images, texts, scale=factor)
    sigmoid = sigmoid_loss(images, texts, scale=factor, bias=bias)
    assert softmax.item() == pytest.approx(oracles.image_text_softmax_loss(images, texts, scale), rel=1e-12)
    assert sigmoid.item() == pytest.approx(oracles.image_text_sigmoid_loss(images, texts, scale, -3.5), rel=1e-12)


def test_losses_of_pairs_that_are_all_alike():
    """All cosines are 1: each of 4 texts is equally likely, and the logit of every pair is scale + bias = 0."""
    rows = torch.eye(1, 6, dtype=torch.float64).repeat(4, 1)
    scale = torch.tensor(10.0, dtype=torch.float64)
    assert softmax_loss(rows, rows, scale=scale).item() == pytest.approx(math.log(4), abs=1e-12)
    assert sigmoid_loss(rows, rows, scale=scale, bias=-scale).item() == pytest.approx(4 * math.log(2), abs=1e-12)


@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])
def test_a_loss_is_lower_for_the_right_pairs(loss):
    images, texts = pairs()
    options = {"scale": torch.tensor(10.0)} | ({"bias": torch.tensor(-5.0)} if loss is sigmoid_loss else {})
    assert loss(images, images, **options) < loss(images, texts, **options)
