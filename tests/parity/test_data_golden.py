"""Block masks and collation against the official DINOv2 code."""

import random

import numpy as np
import pytest
import torch

from helpers import golden_json, load_golden, requires_shared, shared_dir
from hf_regvit.pretraining.crops import batch_masks, block_mask, masked_positions

pytestmark = requires_shared


CASES: list[tuple[tuple[int, int], int, dict]] = []  # grid, largest number of masked patches, statistics
if shared_dir():
    for part in (golden_json("masking"), golden_json("masking")["small_grid"]):
        grid, largest = tuple(part["grid"]), int(part["max_num_patches"])
        CASES += [(grid, largest, entry) for entry in part["statistics"]]


def test_seeded_masks_are_those_of_the_official_generator():
    golden = golden_json("masking")
    for sample in golden["samples"]:
        rng = random.Random(sample["python_random_seed"])
        mask = block_mask(tuple(golden["grid"]), sample["requested"], rng)
        assert ["".join("#" if cell else "." for cell in row) for row in mask] == sample["rows"]


def test_the_default_largest_rectangle_is_half_the_grid():
    golden = golden_json("masking")
    kwargs = {"max_patches": int(golden["max_num_patches"])}
    for seed in range(20):
        default = block_mask(tuple(golden["grid"]), 98, random.Random(seed))
        assert (default == block_mask(tuple(golden["grid"]), 98, random.Random(seed), **kwargs)).all()


@pytest.mark.parametrize(("grid", "largest", "golden"), CASES)
def test_statistics_of_masks(grid, largest, golden):
    rng = random.Random(0)
    draws = np.stack([block_mask(grid, golden["requested"], rng, max_patches=largest) for _ in range(golden["draws"])])
    counts = draws.sum((1, 2))
    # Both means scatter: three standard errors of their difference.
    error = 3 * golden["std"] * np.sqrt(2 / golden["draws"])
    assert abs(counts.mean() - golden["mean"]) < error
    assert counts.max() == golden["max"] == golden["requested"]
    assert counts.min() >= golden["min"] - 1
    expected = np.array(golden["per_cell_frequency"])
    standard = np.sqrt(2 * expected * (1 - expected) / golden["draws"])
    assert (np.abs(draws.mean(0) - expected) / standard).max() < 4.5  # the largest of up to 196 cells


@pytest.mark.parametrize(
    "golden",
    golden_json("masking")["collate"] if shared_dir() else [],
    ids=lambda case: f"{case['global_crops']}crops",
)
def test_statistics_of_batches(golden):
    grid, crops = tuple(golden["grid"]), golden["global_crops"]
    rng = random.Random(1)
    options = {"mask_ratio": golden["mask_ratio"], "mask_probability": golden["mask_probability"]}
    batches = np.stack([batch_masks(grid, crops, rng, **options) for _ in range(golden["draws"])])
    counts = batches.reshape(golden["draws"], crops, -1).sum(-1)
    assert sorted(set((counts > 0).sum(1).tolist())) == golden["masked_images_per_batch"]
    totals = counts.sum(1)
    assert totals.max() <= golden["upperbound"][0]
    error = 3 * golden["total_masked_std"] * np.sqrt(2 / golden["draws"])
    assert abs(totals.mean() - golden["total_masked_mean"]) < error
    shares = counts[counts > 0] / golden["n_tokens"]
    # Strips of the ratio range and whole patches: 0.01 is two patches of 196.
    for quantile, expected in golden["masked_fraction_quantiles"].items():
        assert abs(np.quantile(shares, float(quantile)) - expected) <= 0.0103


def test_collation_of_given_masks():
    tensors, config = load_golden("train/collate.safetensors")
    size = config["B"]
    masks = tensors["in.masks"].bool()
    indices, weights = masked_positions(masks)
    assert torch.equal(indices, tensors["out.mask_indices_list"])
    assert torch.equal(weights, tensors["out.masks_weight"])
    assert len(indices) == tensors["out.n_masked_patches"].item()
    # The same through (2, B, N), as the collator calls it.
    assert torch.equal(masked_positions(masks.view(2, size, -1))[0], indices)
