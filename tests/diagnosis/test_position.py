"""Position in tokens: slow twins of the regression and of the cells, the removal, and its control."""

import numpy as np
import pytest
import torch

from hf_regvit import remove_position
from hf_regvit.diagnosis.position import (
    PositionMoments,
    cell_accuracy,
    cell_positions,
    fit_position_removal,
    position_record,
    ridge_r2,
    without_position,
)
from hf_regvit.models.tokens import TokenReader
from planted_defects import MODELS, PROCESSOR, sample


def tokens_with_position(count=10, grid=(4, 5), width=12, strength=1.0, seed=0):
    """Random tokens (n, N, D), with the position added along two directions."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, grid[0] * grid[1], width, generator=generator)
    directions = torch.randn(2, width, generator=torch.Generator().manual_seed(77))
    return tokens + strength * cell_positions(grid).float() @ directions + 3


def moments_of(tokens, grid, *, batch=3):
    found = PositionMoments(grid, len(tokens), seed=0)
    for start in range(0, len(tokens), batch):
        found.add(tokens[start : start + batch], 1, start)
    return found


def slow_r2(tokens, targets, fit, other):
    """R2 of each target of a ridge regression on standardized features, fitted on some images, from the rows."""
    x, z = tokens[fit].reshape(-1, tokens.shape[-1]).double().numpy(), targets[fit].reshape(-1, 2).numpy()
    mean, scale = x.mean(axis=0), x.std(axis=0)
    standard = (x - mean) / scale
    left = standard.T @ standard + 1e-3 * len(x) * np.eye(x.shape[1])
    weight = np.linalg.solve(left, standard.T @ (z - z.mean(axis=0)))
    y, truth = tokens[other].reshape(-1, tokens.shape[-1]).double().numpy(), targets[other].reshape(-1, 2).numpy()
    error = ((truth - z.mean(axis=0) - (y - mean) / scale @ weight) ** 2).sum(axis=0)
    return 1 - error / ((truth - truth.mean(axis=0)) ** 2).sum(axis=0)


@pytest.mark.parametrize("batch", [1, 3, 10])
def test_r2_equals_its_slow_twin(batch):
    tokens = tokens_with_position()
    found = moments_of(tokens, (4, 5), batch=batch)
    r2 = ridge_r2(found.moments[1])
    even, odd = list(range(0, 10, 2)), list(range(1, 10, 2))
    assert r2[:2].numpy() == pytest.approx(slow_r2(tokens, found.targets[..., 1:3], even, odd), abs=1e-9)
    assert r2[2:].numpy() == pytest.approx(slow_r2(tokens, found.targets[..., 3:], even, odd), abs=1e-9)
    assert r2[:2].min() > 0.3


def test_permuted_positions_are_those_of_the_same_image():
    found = PositionMoments((3, 4), 5, seed=1)
    order = found.targets[..., 3:]
    assert not torch.equal(order, found.targets[..., 1:3])
    for image in order:
        assert sorted(image.tolist()) == sorted(cell_positions((3, 4)).tolist())
    assert not torch.equal(order[0], order[1])
    assert cell_positions((1, 3)).tolist() == [[0, 0], [0, 0.5], [0, 1]]


def test_removal_leaves_nothing_for_a_linear_map_and_changes_two_directions():
    grid = (4, 5)
    found = moments_of(tokens_with_position(400), grid, batch=50)
    removal = fit_position_removal(found.moments[1], grid)
    e = removal.projection
    torch.testing.assert_close(e @ e, e, atol=1e-9, rtol=0)
    assert torch.linalg.matrix_rank(e) == 2
    unseen = tokens_with_position(400, seed=5)
    after = removal(unseen)
    assert torch.linalg.matrix_rank((after - unseen).reshape(-1, 12), rtol=1e-4) == 2
    torch.testing.assert_close(removal(after), after, atol=1e-5, rtol=0)
    fresh = moments_of(unseen, grid, batch=50)
    before, left = ridge_r2(fresh.moments[1]), ridge_r2(moments_of(after, grid, batch=50).moments[1])
    assert before[:2].min() > 0.3
    assert left[:2].abs().max() < 0.01  # the removal was fitted to other images
    moved = without_position(fresh.moments[1], removal)
    torch.testing.assert_close(moved, moments_of(after.double(), grid, batch=50).moments[1], atol=0.05, rtol=1e-5)
    assert ridge_r2(without_position(found.moments[1], removal))[:2].abs().max() < 1e-9


def test_position_is_removed_from_the_maps_of_a_model():
    """Fit on some images, and regress on others, with the public names only."""
    model, fitted, unseen = MODELS["vit"](), sample(96, seed=0), sample(96, seed=1)
    with torch.no_grad():
        model.embeddings.position_embeddings[0, 1:] += cell_positions((12, 12)).float() @ torch.randn(2, 96)
    removal = remove_position(model, fitted.images, processor=PROCESSOR, max_images=96)
    assert removal.grid == (12, 12)
    maps = torch.from_numpy(TokenReader(model, PROCESSOR).patch_maps(unseen.images))  # (n, rows, columns, D)
    before, after = (
        ridge_r2(moments_of(each.flatten(1, 2), (12, 12), batch=32).moments[1])[:2] for each in (maps, removal(maps))
    )
    assert before.min() > 0.5
    assert -0.05 < after.min() <= after.max() < 0.01  # an evaluation on other images is slightly below 0 by chance


def test_a_single_row_has_one_direction():
    tokens = tokens_with_position(grid=(1, 6))
    removal = fit_position_removal(moments_of(tokens, (1, 6)).moments[1], (1, 6))
    assert torch.linalg.matrix_rank(removal.projection) == 1


def test_cells_equal_their_slow_twin_and_see_a_code_without_order():
    code = torch.randn(20, 12, generator=torch.Generator().manual_seed(3))
    tokens = tokens_with_position(strength=0.0) * 0.4 + code
    x, y = (part.reshape(-1, 12).double().numpy() for part in (tokens[::2], tokens[1::2]))
    labels = np.tile(np.arange(20), 5)
    mean, scale = x.mean(axis=0), x.std(axis=0)
    standard = (x - mean) / scale
    weight = np.linalg.solve(
        standard.T @ standard + 1e-3 * len(x) * np.eye(12), standard.T @ (np.eye(20)[labels] - 1 / 20)
    )
    expected = (((y - mean) / scale @ weight).argmax(axis=1) == labels).mean()
    assert cell_accuracy(tokens) == pytest.approx(expected, abs=1e-9)
    assert expected > 0.8
    found = moments_of(tokens, (4, 5))
    found.moments["final"] = found.moments[1]
    record = position_record(found, tokens, (4, 5))
    assert record["cell_accuracy"] == pytest.approx(expected)
    assert record["layers"] == [1]
    assert record["removed"]["cosine"] < 1
