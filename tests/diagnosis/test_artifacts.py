"""Diagnosis of artifact tokens: gate on planted and clean norms, slow twins of every formula, complete reports."""

import copy
import itertools
import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetModel, SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTModel

from builders import noise, save_images, with_outliers
from builders import pixels as random_pixels
from hf_regvit import RegViTConfig, RegViTModel
from hf_regvit.app import cli
from hf_regvit.diagnosis.comparison import compare_checkpoints
from hf_regvit.diagnosis.controls import _knn, _registers_replaced, _replacement, register_controls
from hf_regvit.diagnosis.diagnose import artifact_snapshot, count_macs, diagnose
from hf_regvit.diagnosis.outliers import (
    Cutoff,
    TwoModes,
    _failed_conditions,
    attention_statistics,
    channel_outliers,
    compare_values,
    direction_spread,
    effective_rank,
    emergence_layer,
    find_cutoff,
    fit_two_modes,
    log_norms,
    neighbor_similarity,
    register_cosine,
    reported_layer,
)
from hf_regvit.diagnosis.report import ArtifactReport
from hf_regvit.models.processing import EvaluationTransform, default_image_processor
from hf_regvit.models.tokens import TokenReader

# --- Two modes and a cut-off ---


def slow_mixture(values, share, iterations=300):
    """Expectation-maximization on single values, without bins."""
    ordered = sorted(values, reverse=True)
    threshold = ordered[max(1, round(share * len(values))) - 1]
    posterior = [float(value >= threshold) for value in values]
    for _ in range(iterations):
        modes = []
        for weights in ([1 - p for p in posterior], posterior):
            mass = sum(weights)
            mean = sum(w * v for w, v in zip(weights, values)) / mass
            variance = sum(w * (v - mean) ** 2 for w, v in zip(weights, values)) / mass
            modes.append((mass / len(values), mean, max(math.sqrt(variance), 0.01)))
        posterior = []
        for value in values:
            low, high = (w / s * math.exp(-(((value - m) / s) ** 2) / 2) for w, m, s in modes)
            posterior.append(high / (low + high))
    return sorted(modes, key=lambda mode: mode[1])


def planted(*, share, ratio, count=20000, spread=0.15, high_spread=0.15, seed=0, scale=20.0):
    """Log-normal norms with a second mode at `ratio` times the first."""
    generator = np.random.default_rng(seed)
    norms = scale * np.exp(generator.normal(0, spread, count))
    high = round(share * count)
    norms[:high] = ratio * scale * np.exp(generator.normal(0, high_spread, high))
    return generator.permutation(norms).astype(np.float32)


@pytest.mark.parametrize(("share", "ratio"), [(0.1, 4.0), (0.03, 10.0)])
def test_mixture_equals_its_slow_twin(share, ratio):
    values = np.log(planted(share=share, ratio=ratio, count=400, seed=1))
    fast = fit_two_modes(values)[0]
    low, high = slow_mixture(values.tolist(), 0.05)
    bin_width = float(np.ptp(values)) / 500  # the fast one knows a value no better than its bin
    assert fast.low_mean == pytest.approx(low[1], abs=bin_width)
    assert fast.high_mean == pytest.approx(high[1], abs=bin_width)
    assert fast.low_std == pytest.approx(low[2], abs=bin_width)
    assert fast.high_std == pytest.approx(high[2], abs=bin_width)
    assert fast.high_share == pytest.approx(high[0], abs=1e-3)


def test_fits_come_in_the_order_of_their_likelihood():
    values = np.log(planted(share=0.02, ratio=8))

    scores = [
        np.log(
            sum(
                w / s * np.exp(-(((values - m) / s) ** 2) / 2)
                for w, m, s in (
                    (1 - fit.high_share, fit.low_mean, fit.low_std),
                    (fit.high_share, fit.high_mean, fit.high_std),
                )
            )
        ).mean()
        for fit in fit_two_modes(values)
    ]
    assert len(scores) == 5
    assert all(a >= b - 1e-3 for a, b in itertools.pairwise(scores))  # on bins and on values they differ a little


def test_of_unlike_fits_the_likeliest_comes_first_and_low_is_below_high():
    generator = np.random.default_rng(0)

    def groups(*parts):
        return np.concatenate([generator.normal(mean, std, count) for mean, std, count in parts])

    three = groups((0, 0.1, 15000), (-1.5, 0.1, 4500), (2.5, 0.2, 400))
    broad = groups((0, 0.1, 19000), (-0.2, 1.0, 1000))  # the mode that starts as the upper one ends as the lower
    scores = []
    for values in (three, broad):
        fits = fit_two_modes(values)
        assert all(fit.low_mean < fit.high_mean for fit in fits)
        for fit in fits:
            densities = [
                weight / std * np.exp(-(((values - mean) / std) ** 2) / 2)
                for weight, mean, std in (
                    (1 - fit.high_share, fit.low_mean, fit.low_std),
                    (fit.high_share, fit.high_mean, fit.high_std),
                )
            ]
            scores.append(np.log(sum(densities)).mean())
    assert scores[0] > scores[1] + 0.5  # two optima: the main mode against the rest, and the few above
    assert fit_two_modes(three)[1].high_share == pytest.approx(0.02, rel=0.05)
    (fit, *_) = fit_two_modes(broad)
    assert (fit.low_std > 0.5, fit.high_std < 0.2, fit.high_share > 0.9) == (True, True, True)


def test_separation_and_boundary_of_known_modes():
    modes = TwoModes(low_mean=1.0, low_std=0.3, high_mean=3.0, high_std=0.4, high_share=0.5)
    assert modes.separation == pytest.approx(math.sqrt(2) * 2 / 0.5)
    assert modes.ratio == pytest.approx(math.exp(2))
    assert math.log(modes.boundary) == pytest.approx(2.0)  # equal shares: the middle
    rare = replace(modes, high_share=0.01)
    pooled = 0.99 * 0.09 + 0.01 * 0.16
    densities = [
        math.log(w) - (math.log(rare.boundary) - m) ** 2 / (2 * pooled) for w, m in ((0.99, 1.0), (0.01, 3.0))
    ]
    assert densities[0] == pytest.approx(densities[1])  # equally likely there, with the pooled variance
    assert rare.boundary > modes.boundary


@pytest.mark.parametrize("share", [0.002, 0.02, 0.1])
@pytest.mark.parametrize("ratio", [5.0, 10.0, 40.0])
def test_planted_outliers_are_found(share, ratio):
    norms = planted(share=share, ratio=ratio)
    found = find_cutoff(norms)
    assert found.bimodal, found.reason
    assert found.method == "mixture"
    assert found.share == pytest.approx(share, rel=0.02)
    low, high = np.split(np.sort(norms), [-round(share * len(norms))])
    assert found.ratio == pytest.approx(np.median(high) / np.median(low), rel=0.02)
    assert 20 * 1.4 < found.cutoff < 20 * ratio / 1.4
    assert f"{found.separation:.1f}" in found.reason


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("high_spread", [0.05, 0.4])
def test_two_disjoint_samples_agree_within_ten_percent(seed, high_spread):
    norms = planted(share=0.02, ratio=20, count=8000, high_spread=high_spread, seed=seed)
    first, second = (find_cutoff(norms[start::2]) for start in (0, 1))
    assert first.bimodal
    assert second.bimodal
    assert first.cutoff == pytest.approx(second.cutoff, rel=0.1)  # tolerance: of two samples


def clean_norms():
    generator = np.random.default_rng(0)
    count = 20000
    white = planted(share=0.4, ratio=6)
    return {
        "log-normal": np.exp(generator.normal(3, 0.4, count)),
        "heavy tail": np.exp(3 + 0.15 * generator.standard_t(4, count)),
        "exponential tail": np.exp(3 + generator.exponential(0.5, count)),
        "long lower tail": np.exp(3 - generator.exponential(0.6, count)),
        "uniform": generator.uniform(1, 30, count),
        "two large groups": white,
        "modes only twice apart": planted(share=0.02, ratio=2, spread=0.05, high_spread=0.05),
        "few stray tokens": np.concatenate([planted(share=0, ratio=1, count=5000), np.full(9, 900.0)]),
        "rare low tokens": planted(share=0.98, ratio=10),
        "constant": np.full(count, 7.0),
        "mostly zero": np.where(np.arange(count) % 3 == 0, 5.0, 0.0),
    }


@pytest.mark.parametrize("name", sorted(clean_norms()))
def test_clean_norms_have_no_distinct_outliers(name):
    norms = clean_norms()[name]
    found = find_cutoff(norms)
    assert not found.bimodal, found
    assert found.method == "fallback"
    assert found.reason
    assert found.share == (norms > found.cutoff).mean()
    assert json.dumps(found.to_dict())


def test_fallback_where_most_norms_are_equal_is_six_plain_deviations():
    norms = np.concatenate([np.full(600, 5.0), np.random.default_rng(0).uniform(4, 6, 400)])  # no robust deviation
    found = find_cutoff(norms)
    assert found.method == "fallback"
    assert found.cutoff == pytest.approx(5 * math.exp(6 * np.log(norms).std()))


def test_norms_near_zero_count_as_a_ten_thousandth_of_the_median():
    norms = np.array([0.0, 1e-9, 2e-3, 20.0, 20.0, 20.0, 50.0])
    assert log_norms(norms) == pytest.approx(np.log([2e-3, 2e-3, 2e-3, 20, 20, 20, 50]))


def test_a_mode_of_equal_tokens_has_a_width():
    for fit in fit_two_modes(np.log(np.concatenate([np.full(2000, 10.0), np.full(100, 80.0)]))):
        assert min(fit.low_std, fit.high_std) == pytest.approx(0.01)


def two_groups(modes, *, low=2000, high=40, valley=0):
    """Return log norms: `low` and `high` values at the centers, and `valley` values at the boundary."""
    return np.concatenate(
        [
            np.full(low, modes.low_mean),
            np.full(high, modes.high_mean),
            np.full(valley, math.log(modes.boundary) + 1e-9),
        ]
    )


@pytest.mark.parametrize(
    ("modes", "groups", "reason"),
    [
        ({}, {}, None),
        ({"high_std": 1.70}, {}, "separation D=2.0, needs > 2"),  # sqrt(2 / (0.1² + 1.70²)) * 2.4 = 1.993
        ({"high_std": 1.69}, {}, None),  # 2.005
        ({"high_mean": math.log(2.99)}, {}, "centers 3.0 times apart, need at least 3"),
        ({"high_mean": math.log(3.01)}, {}, None),
        ({"high_share": 0.0009}, {}, "upper mode holds 0.09% of the tokens, needs 0.1% to 15%"),
        ({"high_share": 0.0011}, {}, None),
        ({"high_share": 0.151}, {}, "upper mode holds 15.10% of the tokens"),
        ({"high_share": 0.149}, {}, None),
        ({}, {"high": 9}, "9 tokens above the boundary, needs at least 10"),
        ({}, {"high": 10}, None),
        ({}, {"valley": 21}, "no gap between the modes (21 tokens around the boundary, 40 around the upper mode)"),
        ({}, {"valley": 20}, None),
    ],
)
def test_every_part_of_the_gate_by_itself(modes, groups, reason):
    fit = TwoModes(**{"low_mean": 0.0, "low_std": 0.1, "high_mean": 2.4, "high_std": 0.1, "high_share": 0.02} | modes)
    found = _failed_conditions(fit, two_groups(fit, **groups))
    if reason is None:
        assert found == []
    else:
        (text,) = found
        assert text.startswith(reason)


def test_the_window_of_the_valley_is_half_a_deviation_to_either_side():
    fit = TwoModes(low_mean=0.0, low_std=0.1, high_mean=2.4, high_std=0.4, high_share=0.02)
    for distance, counted in ((0.19, True), (0.21, False)):
        near = np.full(30, math.log(fit.boundary) - distance)
        values = np.concatenate([two_groups(fit, high=40), near])
        assert bool(_failed_conditions(fit, values)) == counted


def test_a_norm_at_the_cutoff_is_no_outlier_of_a_layer():
    norms = np.array([1.0, 2.0, 3.0, 4.0, 6.0])
    found = find_cutoff(norms, cutoff=4.0)
    assert (found.share, found.ratio) == (0.2, 6.0 / 2.5)


def test_fallback_is_six_robust_deviations_above_the_median():
    norms = clean_norms()["log-normal"]
    values = np.log(norms)
    middle = np.median(values)
    expected = math.exp(middle + 6 * 1.4826 * np.median(np.abs(values - middle)))
    assert find_cutoff(norms).cutoff == pytest.approx(expected)


def test_a_fixed_cutoff_is_used_but_the_modes_are_still_judged():
    norms = planted(share=0.02, ratio=10)
    found = find_cutoff(norms, cutoff=30.0)
    assert (found.cutoff, found.method, found.bimodal) == (30.0, "fixed", True)
    assert found.share == (norms > 30).mean()
    assert find_cutoff(norms, cutoff=1e6).ratio is None


@pytest.mark.parametrize(
    ("norms", "cutoff", "message"),
    [
        (np.array([]), "auto", "0 norms"),
        (np.array([1.0, np.nan]), "auto", "2 norms, of which 1 are not finite"),
        (np.ones(5), "otsu", "'otsu' is neither"),
        (np.ones(5), -3.0, "neither 'auto' nor a positive norm"),
    ],
)
def test_norms_and_cutoffs_that_cannot_be_used(norms, cutoff, message):
    with pytest.raises(ValueError, match=message):
        find_cutoff(norms, cutoff=cutoff)


def cutoff_of(*, bimodal, ratio):
    modes = TwoModes(0.0, 0.1, math.log(ratio), 0.1, 0.02)
    return Cutoff(1.0, bimodal, "mixture", 0.02, ratio, modes.separation, "", modes)


def test_reported_layer_is_the_first_of_the_plateau():
    cutoffs = {
        layer: cutoff_of(bimodal=layer in (0, 2, 5, 6, 7), ratio=ratio)
        for layer, ratio in enumerate([90, 50, 4, 60, 60, 20, 38, 39])
    }
    assert reported_layer(cutoffs) == 6  # 38 is within 5 % of 39; layer 0 is no block; 1, 3 and 4 are not bimodal
    assert emergence_layer(cutoffs, 6) == 5
    assert emergence_layer(cutoffs, 2) == 2
    assert emergence_layer(cutoffs, 4) is None
    assert reported_layer({i: cutoff_of(bimodal=False, ratio=9) for i in (0, 1, 2)}) == 2
    assert reported_layer({0: cutoff_of(bimodal=True, ratio=9)}) == 0


# --- Slow twins ---


def test_neighbour_similarity_equals_its_slow_twin():
    rows, columns = 3, 5
    embeddings = torch.randn(2, rows * columns, 4, generator=torch.Generator().manual_seed(0))
    actual = neighbor_similarity(embeddings, (rows, columns))
    for image in range(2):
        for row in range(rows):
            for column in range(columns):
                here = embeddings[image, row * columns + column]
                cosines = [
                    torch.cosine_similarity(here, embeddings[image, r * columns + c], dim=0).item()
                    for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
                    if 0 <= r < rows and 0 <= c < columns
                ]
                assert actual[image, row * columns + column].item() == pytest.approx(
                    sum(cosines) / len(cosines), abs=1e-6
                )


def test_neighbours_of_odd_grids():
    assert neighbor_similarity(torch.ones(1, 4, 2), (1, 4)).tolist() == [[pytest.approx(1.0)] * 4]
    assert neighbor_similarity(torch.zeros(1, 4, 2), (2, 2)).tolist() == [[0.0] * 4]
    with pytest.raises(ValueError, match="1 patches"):
        neighbor_similarity(torch.ones(1, 1, 2), (1, 1))
    with pytest.raises(ValueError, match="6 patches on a grid of 2 x 2"):
        neighbor_similarity(torch.ones(1, 6, 2), (2, 2))


def test_group_comparison_equals_its_slow_twin():
    generator = np.random.default_rng(0)
    values = np.round(generator.normal(size=80), 1)  # rounding makes ties
    outlier = generator.random(80) < 0.2
    actual = compare_values(values, outlier)
    normal, high = values[~outlier], values[outlier]
    wins = sum((h > n) + 0.5 * (h == n) for h in high for n in normal)
    gaps = [abs((normal <= x).mean() - (high <= x).mean()) for x in values]
    assert actual["auroc"] == pytest.approx(wins / len(normal) / len(high))
    assert actual["ks"] == pytest.approx(max(gaps))
    assert actual["median_normal"] == np.median(normal)
    assert (actual["num_normal"], actual["num_outlier"]) == (len(normal), len(high))
    nobody = compare_values(values, np.zeros(80, dtype=bool))
    assert nobody["auroc"] is None
    assert nobody["median_outlier"] is None


def test_effective_rank_equals_its_slow_twin_and_known_cases():
    tokens = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(0))
    for image, actual in zip(tokens, effective_rank(tokens), strict=True):
        unit = np.array([row / np.linalg.norm(row) for row in image.double().numpy()])
        weights = np.linalg.svd(unit, compute_uv=False) ** 2
        weights /= weights.sum()
        assert actual.item() == pytest.approx(math.exp(-sum(w * math.log(w) for w in weights)), rel=1e-6)
    assert effective_rank(torch.eye(5)[None] * 3).item() == pytest.approx(5)
    assert effective_rank(torch.ones(1, 7, 4)).item() == pytest.approx(1)
    wide = torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(1))
    assert 1 < effective_rank(wide).item() <= 4


def test_register_cosine_equals_its_slow_twin():
    registers = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    for image, actual in zip(registers, register_cosine(registers), strict=True):
        pairs = [torch.cosine_similarity(image[i], image[j], dim=0) for i in range(3) for j in range(3) if i != j]
        assert actual.item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-6)
    with pytest.raises(ValueError, match="1 registers"):
        register_cosine(registers[:, :1])


def test_direction_spread_compares_images_only_with_others():
    generator = torch.Generator().manual_seed(0)
    tokens, image = torch.randn(6, 4, generator=generator), torch.tensor([0, 0, 0, 1, 1, 2])
    expected = [
        torch.cosine_similarity(tokens[i], tokens[j], dim=0).abs()
        for i in range(6)
        for j in range(6)
        if image[i] != image[j]
    ]
    assert direction_spread(tokens, image) == pytest.approx(torch.stack(expected).mean().item(), abs=1e-6)
    assert direction_spread(tokens, torch.zeros(6)) is None
    assert direction_spread(tokens[:0], image[:0]) is None
    sign = torch.tensor([[1.0], [-1.0]]).repeat(3, 1)
    assert direction_spread(sign * tokens[:1], image) == pytest.approx(1.0)  # a direction has no sign
    many = torch.randn(50, 4, generator=generator)
    drawn = [direction_spread(many, torch.arange(50), max_tokens=10, seed=s) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_large_channels_and_massive_activations():
    tokens = torch.full((10, 8), 0.1)
    tokens[:, 3] = -20.0
    found = channel_outliers(tokens, top=2)
    assert found["channels"][0] == 3
    assert found["magnitudes"][0] == pytest.approx(200)
    assert found["massive_share"] == 0  # 20 is below 100
    tokens[0, 5] = 500.0
    assert channel_outliers(tokens)["massive_share"] == pytest.approx(1 / 80)
    for ground, peak in ((0.01, 99.0), (0.2, 150.0)):  # large for its model and not by itself, and the reverse
        tokens = torch.full((10, 8), ground)
        tokens[0, 5] = peak
        assert channel_outliers(tokens)["massive_share"] == 0


def test_attention_statistics_equal_their_slow_twin():
    heads, prefix, registers, patches = 3, 4, 3, 60
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(2, heads, prefix + patches, generator=generator).pow(3).softmax(dim=-1)
    actual = attention_statistics(attention, num_prefix_tokens=prefix, num_register_tokens=registers)
    for image in range(2):
        mean = [sum(attention[image, h, t].item() for h in range(heads)) / heads for t in range(prefix + patches)]
        on_patches = sum(mean[prefix:])
        scaled = [value / on_patches for value in mean[prefix:]]
        entropy = -sum(p * math.log(p) for p in scaled)
        head_entropies = []
        for head in attention[image, :, prefix:].tolist():
            head_entropies.append(-sum(p / sum(head) * math.log(p / sum(head)) for p in head))
        expected = {
            "mass_on_patches": on_patches,
            "mass_on_registers": sum(mean[1:4]),
            "entropy": entropy,
            "entropy_share": entropy / math.log(patches),
            "head_entropy": sum(head_entropies) / heads,
            "top_mass": sum(sorted(scaled, reverse=True)[:2]),  # 2 % of 60, rounded up
        }
        assert set(actual) == set(expected)
        for name, value in expected.items():
            assert actual[name][image].item() == pytest.approx(value, rel=1e-5), name
    uniform = attention_statistics(torch.full((1, 2, 61), 1 / 61), num_prefix_tokens=1, num_register_tokens=0)
    assert uniform["entropy_share"].item() == pytest.approx(1)
    assert uniform["mass_on_registers"].item() == 0


@pytest.mark.parametrize(
    ("size", "patch", "giga", "more"),
    [("small", 16, 4.60, 0.0219), ("base", 16, 17.6, 0.0211), ("large", 14, 81.0, 0.0162)],
)
def test_cost_equals_the_published_table(size, patch, giga, more):
    """GMACs at 224 pixels without registers, and the increase by four registers."""
    macs = {}
    for registers in (0, 4):
        with torch.device("meta"):
            model = RegViTModel(
                RegViTConfig.from_preset(size, patch_size=patch, image_size=224, num_register_tokens=registers)
            )
        macs[registers] = count_macs(TokenReader(model), (224 // patch) ** 2)
    # tolerance: the table has three digits, and counts the norms and the final block in its own way
    assert (macs[0] / 1e9, macs[4] / macs[0] - 1) == (pytest.approx(giga, rel=0.006), pytest.approx(more, abs=0.0003))


# --- Ranks and registers ---


def slow_rank(rows):
    unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows]
    singular = np.linalg.svd(np.array(unit), compute_uv=False)
    weights = [s * s / sum(t * t for t in singular) for s in singular]
    return math.exp(-sum(w * math.log(w) for w in weights if w > 1e-15))


def test_register_diversity_equals_loops():
    rng = np.random.default_rng(0)
    registers = rng.normal(size=(3, 4, 6))
    cosines, ranks = [], []
    for image in registers.tolist():
        pairs = [(a, b) for i, a in enumerate(image) for b in image[i + 1 :]]
        cosines.append(
            sum(
                sum(x * y for x, y in zip(a, b, strict=True))
                / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
                for a, b in pairs
            )
            / len(pairs)
        )
        ranks.append(slow_rank(image))
    tokens = torch.from_numpy(registers)
    assert register_cosine(tokens).tolist() == pytest.approx(cosines, abs=1e-6)
    assert effective_rank(tokens).tolist() == pytest.approx(ranks)
    assert register_cosine(torch.ones(2, 4, 6)).tolist() == pytest.approx([1, 1])
    assert effective_rank(torch.ones(2, 4, 6)).tolist() == pytest.approx([1, 1])
    with pytest.raises(ValueError, match="1 registers"):
        register_cosine(torch.ones(2, 1, 3))


def test_effective_rank_equals_singular_values():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20, 5)) * [5, 3, 1, 0.1, 0.01]
    (rank,) = effective_rank(torch.from_numpy(features)[None]).tolist()
    assert rank == pytest.approx(slow_rank(features.tolist()), rel=1e-5)
    assert effective_rank(torch.eye(4)[None]).tolist() == pytest.approx([4])


# --- Whole diagnoses ---

TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 64, "patch_size": 8}


def tiny_model(registers=2, **changes):
    torch.manual_seed(0)
    model = RegViTModel(RegViTConfig(num_register_tokens=registers, **TINY | changes)).eval()
    with torch.no_grad():  # fresh weights leave every block nearly the identity, and its tokens deaf to each other
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:
                parameter.fill_(1.0)
            elif parameter.ndim == 2 and "layers" in name:
                parameter.mul_(20)
            elif "register" in name or "cls" in name:
                parameter.copy_(torch.randn(parameter.shape))
    return model


PHOTOS = [noise(seed, (8, 8)).resize((64, 64), Image.Resampling.BICUBIC) for seed in range(16)]


PROCESSOR = default_image_processor(64)
QUIET = {"processor": PROCESSOR, "progress": False}


@pytest.fixture(scope="module")
def planted_report():
    return diagnose(with_outliers(tiny_model()), PHOTOS, batch_size=7, **QUIET)


def test_a_planted_population_is_described(planted_report):
    report = planted_report
    assert report.bimodal
    assert report.emergence_layer == 2
    assert report.layer == 2
    assert report.outlier_share == 2 / 64
    assert report.norm_ratio == pytest.approx(40, rel=0.2)
    assert report.num_images == 16
    assert "16 images" in report.warnings[0]
    position = np.array(report.outliers["position_map"])
    assert position.shape == (8, 8)
    assert sorted(zip(*np.nonzero(position), strict=True)) == [(0, 0), (1, 1)]
    assert position[0, 0] == 1
    assert report.outliers["per_image"] == 2
    assert report.outliers["images_with"] == 1
    assert report.outliers["border_share"] == 0.5
    assert report.outliers["border_cells"] == 28 / 64
    assert report.neighbours["num_outlier"] == 32
    assert [record["layer"] for record in report.layers] == [0, 1, 2, 3, 4]
    assert [record["bimodal"] for record in report.layers] == [False, False, True, True, True]
    assert all(sum(record["histogram"]) == 16 * 64 for record in report.layers)
    assert len(report.histogram_edges) == len(report.layers[0]["histogram"]) + 1
    assert len(report.layers[2]["register_norms"]) == 2
    assert len(report.examples) == 6
    assert report.examples[0]["num_outliers"] == 2
    assert np.array(report.examples[0]["norms"]).shape == (8, 8)
    assert len(report.examples[0]["attention_registers"]) == 2
    assert "artifact tokens: at block 2 of 4, 3.12%" in report.verdict


def test_top_level_of_the_report_and_its_ten_lines(planted_report, tmp_path):
    report = planted_report
    assert list(report.to_dict())[:7] == [
        "cutoff", "bimodal", "outlier_share", "norm_ratio", "layer", "emergence_layer", "num_images"
    ]  # fmt: skip
    assert ArtifactReport.load(report.save(tmp_path / "new" / "folder").parent) == report
    assert len(report.summary().splitlines()) == 10 + len(report.warnings)
    assert report.verdict in report.summary()
    assert all(math.isfinite(value) for value in report.seconds.values())


@pytest.mark.parametrize("registers", [0, 2])
def test_a_fresh_model_has_no_distinct_outliers(registers):
    report = diagnose(tiny_model(registers), PHOTOS, **QUIET)
    assert not report.bimodal
    assert report.emergence_layer is None
    assert report.layer == 4
    assert report.method == "fallback"
    assert report.verdict.startswith("No distinct outliers")
    assert not any(record["bimodal"] for record in report.layers)
    assert (report.registers is None) == (registers == 0)
    assert (report.controls is None) == (registers == 0)
    assert report.summary()


def test_the_numbers_are_those_of_the_raw_stream():
    """Recompute norms, attention and neighbor similarity from the outputs of the model."""
    model = tiny_model()
    report = diagnose(model, PHOTOS, **QUIET)
    model.set_attn_implementation("eager")
    transform = EvaluationTransform.for_model(model, PROCESSOR)
    with torch.no_grad():
        output = model(
            torch.stack([transform(photo) for photo in PHOTOS]), output_hidden_states=True, output_attentions=True
        )
    for record, hidden in zip(report.layers, output.hidden_states, strict=True):
        norms = hidden.norm(dim=-1)
        assert record["median"] == pytest.approx(np.median(norms[:, 3:]), rel=1e-5)
        assert record["max"] == pytest.approx(norms[:, 3:].max().item(), rel=1e-5)
        assert record["cls_norm"] == pytest.approx(np.median(norms[:, 0]), rel=1e-5)
        assert record["register_norms"] == pytest.approx(np.median(norms[:, 1:3], axis=0).tolist(), rel=1e-5)
    row = output.attentions[-1][:, :, 0].mean(dim=1)  # (n, T)
    measured = report.attention["statistics"]
    assert measured["mass_on_registers"]["mean"] == pytest.approx(row[:, 1:3].sum(1).mean().item(), rel=1e-4)
    assert np.array(report.attention["mean_map"]).ravel() == pytest.approx(row[:, 3:].mean(0).numpy(), abs=1e-5)
    final = output.last_hidden_state
    assert report.patches["effective_rank"]["mean"] == pytest.approx(
        effective_rank(final[:, 3:]).mean().item(), rel=1e-4
    )
    assert report.registers["cosine"] == pytest.approx(register_cosine(final[:, 1:3]).mean().item(), abs=1e-5)
    across = [
        torch.cosine_similarity(final[i, r], final[j, r], dim=0).item()
        for r in (1, 2)
        for i in range(16)
        for j in range(16)
        if i != j
    ]
    assert report.registers["cosine_across_images"] == pytest.approx(np.mean(across), abs=1e-4)


def test_details_are_those_of_the_images_they_name():
    """Rectangular images, with an outlier at a different place in each, and details of every fourth image."""
    model, wide = tiny_model(), [photo.resize((96, 64)) for photo in PHOTOS]

    def hook(module, args, output):
        tokens = output[0].clone()
        cells = tokens[:, 3:, 0].argmax(dim=1)
        tokens[torch.arange(len(tokens)), 3 + cells] *= 40
        return (tokens, *output[1:])

    model.layers[1].register_forward_hook(hook)
    whole = EvaluationTransform.for_model(model, PROCESSOR, keep_aspect=True)
    report = diagnose(model, wide, processor=whole, detail_images=4, batch_size=5, progress=False)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        pixels = torch.stack([whole(photo) for photo in wide])
        output = model(pixels, output_hidden_states=True, output_attentions=True)
    states, weights = output.hidden_states[report.layer], output.attentions[-1].mean(dim=1)  # (n, T, D), (n, T, T)
    norms = states.norm(dim=-1)
    is_outlier, kept = norms[:, 3:] > report.cutoff, [0, 4, 8, 12]
    assert report.bimodal
    assert is_outlier.sum(dim=1).tolist() == [1] * 16
    places = Counter(is_outlier.nonzero()[:, 1].tolist())
    assert len(places) > 4
    for cell in report.outliers["top_cells"]:
        assert cell["share"] == places[cell["row"] * 12 + cell["column"]] / 16
    assert report.outliers["most_in_one_image"] == report.outliers["images_with"] == 1
    on_border = sum(count for cell, count in places.items() if cell // 12 in (0, 7) or cell % 12 in (0, 11))
    assert report.outliers["border_share"] == on_border / 16
    assert report.outliers["border_cells"] == 36 / 96

    outliers = torch.stack([states[i, 3:][is_outlier[i]][0] for i in kept])
    cosines = [torch.cosine_similarity(a, b, dim=0).abs() for a, b in itertools.combinations(outliers, 2)]
    direction, channels = report.outliers["direction"], report.outliers["channels"]
    assert direction["outlier"] == pytest.approx(torch.stack(cosines).mean().item(), rel=1e-4)
    assert channels["outlier"]["channels"] == channel_outliers(outliers)["channels"]
    normal = torch.cat([states[i, 3:][~is_outlier[i]] for i in kept])
    image = torch.arange(4).repeat_interleave(95)
    assert direction["normal"] == pytest.approx(direction_spread(normal, image, max_tokens=380), rel=1e-4)

    masses = (weights[:, 0, 3:] * is_outlier).sum(dim=1)
    measured = report.attention["statistics"]["mass_on_outliers"]
    assert measured["mean"] == pytest.approx(masses.mean().item(), rel=1e-4)
    assert measured["std"] == pytest.approx(masses.std(correction=0).item(), rel=1e-4)
    expected = np.median(norms[:, 1:3]) / np.median(norms[:, 3:])
    assert report.registers["norm_ratio"] == pytest.approx(expected, rel=1e-5)
    rank = effective_rank(output.last_hidden_state[kept, 3:])
    measured = report.patches["effective_rank"]
    assert (measured["mean"], measured["std"], measured["num_images"]) == (
        pytest.approx(rank.mean().item(), rel=1e-4), pytest.approx(rank.std(correction=0).item(), rel=1e-3), 4
    )  # fmt: skip
    assert [example["id"] for example in report.examples] == [f"image/{i}" for i in kept]
    for i, example in zip(kept, report.examples, strict=True):
        for name, expected in (
            ("norms", norms[i, 3:].view(8, 12)),
            ("attention_cls", weights[i, 0, 3:].view(8, 12)),
            ("attention_registers", weights[i, 1:3, 3:].view(2, 8, 12)),
        ):
            # tolerance: a report keeps four significant digits, an error of up to 5e-4
            assert np.array(example[name]) == pytest.approx(expected.numpy(), rel=1e-3), name


def test_batches_and_repetition_do_not_change_the_report(planted_report):
    model = with_outliers(tiny_model())
    first, (again, other) = planted_report, (diagnose(model, PHOTOS, batch_size=size, **QUIET) for size in (7, 5))

    apart = {"seconds": None, "settings": None}
    assert first.to_dict() | apart == again.to_dict() | apart
    assert other.cutoff == pytest.approx(first.cutoff, rel=1e-5)
    assert other.outliers["position_map"] == first.outliers["position_map"]
    assert other.neighbours["auroc"] == pytest.approx(first.neighbours["auroc"], abs=1e-3)
    assert other.patches["effective_rank"]["mean"] == pytest.approx(first.patches["effective_rank"]["mean"], rel=1e-4)


def test_the_model_is_left_as_it_was():
    model = tiny_model().train()
    before = copy.deepcopy(model.state_dict())
    diagnose(model, PHOTOS, **QUIET)
    artifact_snapshot(model, torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_max_images_draws_with_the_seed():
    model = tiny_model(0)
    ids = [
        [example["id"] for example in diagnose(model, PHOTOS, max_images=9, seed=seed, layers=(2,), **QUIET).examples]
        for seed in (0, 0, 1)
    ]
    assert ids[0] == ids[1] != ids[2]
    assert len(ids[0]) == 6


def test_layers_and_cutoff_can_be_given():
    report = diagnose(with_outliers(tiny_model()), PHOTOS, layers=(1, -1), cutoff=0.5, **QUIET)
    assert [record["layer"] for record in report.layers] == [1, 4]
    assert (report.layer, report.cutoff, report.method, report.bimodal) == (4, 0.5, "fixed", True)


def test_probe_tables_come_with_the_report():
    report = diagnose(with_outliers(tiny_model()), PHOTOS, probes=True, **QUIET)
    assert set(report.probes["position"]) == {"normal", "outlier"}
    assert report.probes["settings"]["cutoff_layer"] == report.layer
    assert "no labels" in report.probes["notes"][0]


# --- Invalid input ---


def test_too_few_images():
    with pytest.raises(ValueError, match=r"7 images can be used \(0 were skipped\).*at least 8"):
        diagnose(tiny_model(), PHOTOS[:7], **QUIET)
    with pytest.raises(ValueError, match="max_images=3 at least 8"):
        diagnose(tiny_model(), PHOTOS, max_images=3, **QUIET)


def test_a_folder_of_broken_images(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.jpg").write_bytes(b"not an image at all")
    with pytest.raises(ValueError, match=r"None of the 12 images"):
        diagnose(tiny_model(), tmp_path, **QUIET)


def test_single_colour_images_are_left_out_and_named(tmp_path):
    for i, photo in enumerate(PHOTOS[:10]):
        photo.save(tmp_path / f"photo{i}.png")
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    report = diagnose(tiny_model(), tmp_path, **QUIET)
    assert report.num_images == 10
    assert {image["id"]: image["reason"] for image in report.skipped}["red.png"] == "single color"
    assert {image["id"] for image in report.skipped} == {"red.png", "broken.png"}
    assert "2 images were skipped" in report.warnings[1]


def test_an_image_that_varies_in_one_channel_only_is_used():
    black = Image.new("L", (64, 64))
    reds = [Image.merge("RGB", (photo.getchannel("R"), black, black)) for photo in PHOTOS[:8]]
    report = diagnose(tiny_model(), reds, **QUIET)
    assert (report.num_images, report.skipped) == (8, [])


def test_nothing_but_single_colours():
    flat = [Image.new("RGB", (64, 64), (i, i, i)) for i in range(20)]
    with pytest.raises(ValueError, match=r"0 images can be used \(20 were skipped, e.g. 'image/0': single color\)"):
        diagnose(tiny_model(), flat, **QUIET)


def test_sizes_are_brought_to_one_or_refused():
    mixed = [photo.resize((64 + 16 * (i % 3), 64)) for i, photo in enumerate(PHOTOS)]
    assert diagnose(tiny_model(), mixed, **QUIET).num_images == 16
    whole = EvaluationTransform.for_model(tiny_model(), PROCESSOR, keep_aspect=True)
    with pytest.raises(
        ValueError, match=r"'image/1' has 8 x 10 patches, but the images before it have 8 x 8.*one size"
    ):
        diagnose(tiny_model(), mixed, processor=whole, progress=False)


def test_rectangles_of_one_size_keep_their_grid():
    wide = [photo.resize((96, 64)) for photo in PHOTOS]
    whole = EvaluationTransform.for_model(tiny_model(), PROCESSOR, keep_aspect=True)
    report = diagnose(with_outliers(tiny_model(), cells=(12,)), wide, processor=whole, progress=False)
    assert report.outliers["grid"] == [8, 12]
    assert np.array(report.outliers["position_map"])[1, 0] == 1


def test_a_family_without_global_patches_is_refused():
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"))
    with pytest.raises(ValueError, match=r"(?s)resnet.*plain vision transformer"):
        diagnose(model, PHOTOS, **QUIET)


def test_a_model_without_cls_is_diagnosed_without_attention():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = SiglipVisionModel(SiglipVisionConfig(image_size=64, patch_size=8, **sizes)).eval()
    report = diagnose(model, PHOTOS, **QUIET)
    assert report.attention is None
    assert "cls_norm" not in report.layers[0]
    assert report.examples[0]["attention_cls"] is None
    assert "no CLS token" in report.summary()
    assert artifact_snapshot(model, torch.randn(2, 3, 64, 64))["effective_rank"] > 1


def test_weights_that_are_not_finite_name_image_and_layer():
    model = tiny_model()
    with torch.no_grad():
        next(parameter for name, parameter in model.layers[2].named_parameters() if "mlp" in name).fill_(math.nan)
    with pytest.raises(ValueError, match="Image 'image/0' has NaN or infinite tokens at block 3"):
        diagnose(model, PHOTOS, **QUIET)


def test_a_vit_of_transformers_is_read_the_same_way():
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(intermediate_size=64, **TINY), add_pooling_layer=False).eval()
    report = diagnose(model, PHOTOS, **QUIET)
    assert report.model["family"] == "vit"
    assert not report.bimodal


# --- Register controls ---


def slow_control(model, pixel_values, values):
    """Run the blocks one after the other and overwrite the registers in between."""
    with torch.no_grad():
        tokens = TokenReader(model).read_many(pixel_values, {"residual": (0,)})["residual"].at(0)
        for layer, block in enumerate(model.layers, start=1):
            output = block(tokens)
            tokens = (output[0] if isinstance(output, tuple) else output).clone()
            if layer < len(model.layers):
                tokens[:, 1:3] = values(layer)
        return model.layernorm(tokens)


@pytest.mark.parametrize("kind", ["zero", "mean", "shuffle"])
def test_controls_equal_their_slow_twin(kind):
    model, pixels = tiny_model(), random_pixels(6, 64, 64)
    clean = TokenReader(model).read_many(pixels, {"residual": "all"})["residual"]
    undisturbed = model.layernorm(clean.at(4))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3)).tolist()
    partner = {order[i]: order[i - 1] for i in range(6)}
    assert all(a != b for a, b in partner.items())

    def values(layer):
        registers = clean.registers(layer)
        if kind == "zero":
            return torch.zeros_like(registers)
        if kind == "mean":
            return registers.mean(dim=0, keepdim=True).expand_as(registers)
        return torch.stack([registers[partner[i]] for i in range(6)])

    expected = torch.cosine_similarity(slow_control(model, pixels, values), undisturbed, dim=-1)
    result = register_controls(model, pixels, batch_size=4, seed=3)
    assert result[kind]["cls_cosine"] == pytest.approx(expected[:, 0].mean().item(), abs=1e-5)
    assert result[kind]["patch_cosine"] == pytest.approx(expected[:, 3:].mean().item(), abs=1e-5)
    assert result[kind]["cls_cosine"] < 1 - 1e-4


def test_controls_without_effect_and_their_order():
    model = tiny_model()
    same = random_pixels(1, 64, 64).expand(4, -1, -1, -1)
    result = register_controls(model, same)
    for kind in ("mean", "shuffle", "noise"):  # equal images have equal registers and no variance
        assert result[kind]["cls_cosine"] == pytest.approx(1, abs=1e-5)
        assert result[kind]["patch_cosine"] == pytest.approx(1, abs=1e-5)
    assert result["zero"]["patch_cosine"] < 0.999
    assert not any(module._forward_hooks for module in model.modules())


def test_noise_has_the_moments_of_the_registers():
    registers = torch.randn(40_000, 2, 3, generator=torch.Generator().manual_seed(0)) * 3 + 5
    noise = _replacement("noise", registers, 1, 0)
    torch.testing.assert_close(noise.mean(0), registers.mean(0), atol=0.2, rtol=0)
    torch.testing.assert_close(noise.std(0), registers.std(0), atol=0.2, rtol=0)
    assert not torch.equal(noise, _replacement("noise", registers, 2, 0))
    assert torch.equal(noise, _replacement("noise", registers, 1, 0))
    two = registers[:2]  # the variance of these images, not of what they were drawn from
    drawn = torch.randn(two.shape, generator=torch.Generator().manual_seed(3001))
    expected = two.mean(0) + drawn * (two[0] - two[1]).abs() / 2
    torch.testing.assert_close(_replacement("noise", two, 1, 3), expected)


def test_neighbour_accuracy_where_labels_exist():
    model = tiny_model()
    base = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.arange(24) // 2 % 2  # both classes in both halves
    pixels = base[labels] + 0.01 * random_pixels(24, 64, 64)
    result = register_controls(model, pixels, labels=labels)
    assert result["clean"]["knn"] == 1.0
    assert result["mean"]["knn"] == 1.0
    assert register_controls(model, pixels[:10], labels=labels[:10])["clean"]["knn"] is None
    alone = torch.arange(len(labels))  # every image a class of its own: no neighbour can be right
    assert register_controls(model, pixels, labels=alone)["clean"]["knn"] is None


def test_neighbour_accuracy_equals_its_loop():
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randn(41, 3, 4, generator=generator), torch.randint(3, (41,), generator=generator)
    right = 0
    for i in range(41):
        others = [j for j in range(41) if j % 2 != i % 2]  # the other half judges
        cosines = {j: torch.cosine_similarity(tokens[i, 0], tokens[j, 0], dim=0).item() for j in others}
        votes = dict.fromkeys(range(3), 0.0)
        for j in sorted(others, key=lambda j: -cosines[j])[:5]:
            votes[labels[j].item()] += math.exp(cosines[j] / 0.07)
        right += max(votes, key=lambda label: votes[label]) == labels[i]
    assert _knn(tokens, labels) == pytest.approx(right / 41)
    same = torch.zeros(20, dtype=torch.long)
    assert _knn(tokens[:20], same) == 1.0
    assert _knn(tokens[:19], same[:19]) is None


def test_controls_that_cannot_be_made():
    with pytest.raises(ValueError, match="no registers"):
        register_controls(tiny_model(0), random_pixels(6, 64, 64))
    with pytest.raises(ValueError, match="at least two images, got 1"):
        register_controls(tiny_model(), random_pixels(1, 64, 64))


def test_hooks_are_gone_after_an_error(monkeypatch):
    model = tiny_model()
    with pytest.raises(RuntimeError), _registers_replaced(TokenReader(model), {1: torch.zeros(3, 5, 7)}):
        model(random_pixels(6, 64, 64))
    assert not any(module._forward_hooks for module in model.modules())


# --- During training, and several checkpoints ---


def test_snapshot_agrees_with_the_diagnosis(planted_report):
    model, report = with_outliers(tiny_model()), planted_report
    transform = EvaluationTransform.for_model(model, PROCESSOR)
    values = artifact_snapshot(model, torch.stack([transform(photo) for photo in PHOTOS]))
    assert all(isinstance(value, float) and math.isfinite(value) for value in values.values())
    expected = {
        "outlier_share": report.outlier_share,
        "norm_ratio": report.norm_ratio,
        "separation": report.separation,
        "cutoff": report.cutoff,
        "layer": 2,
        "bimodal": 1,
        "norm_median": report.layers[2]["median"],
        "norm_max": report.layers[2]["max"],
        "effective_rank": report.patches["effective_rank"]["mean"],
        "register_cosine": report.registers["cosine"],
        "attention_entropy": report.attention["statistics"]["entropy_share"]["mean"],
        "attention_registers": report.attention["statistics"]["mass_on_registers"]["mean"],
    }
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-4), name
    assert set(values) == {*expected, "register_norm"}
    reading = TokenReader(model).read_many(torch.stack([transform(photo) for photo in PHOTOS]), {"residual": (2,)})[
        "residual"
    ]
    norms = reading.registers(2).norm(dim=-1)
    assert values["register_norm"] == pytest.approx(np.median(norms), rel=1e-5)
    assert np.median(norms) != pytest.approx(norms.mean().item(), rel=1e-3)


def test_snapshot_of_models_with_fewer_parts():
    values = artifact_snapshot(tiny_model(0), random_pixels(6, 64, 64))
    assert "register_norm" not in values
    assert "attention_registers" not in values
    one = artifact_snapshot(tiny_model(1), random_pixels(6, 64, 64))
    assert "register_norm" in one
    assert "register_cosine" not in one


@pytest.fixture
def checkpoints(tmp_path):
    folders = []
    for registers in (0, 2):
        folders.append(tmp_path / f"reg{registers}")
        tiny_model(registers).save_pretrained(folders[-1])
        PROCESSOR.save_pretrained(folders[-1])
    return folders


def test_several_checkpoints_make_a_table(checkpoints):
    comparison = compare_checkpoints(checkpoints, PHOTOS, progress=False, throughput_rounds=1)
    plain, registers = comparison.rows
    assert (plain["registers"], registers["registers"]) == (0, 2)
    assert plain["cls_to_registers"] == 0
    assert 0 < registers["cls_to_registers"] < 1
    assert plain["gmacs_delta"] == 0
    assert 0 < registers["gmacs_delta"] < 0.1
    assert registers["parameters"] - plain["parameters"] == 2 * 32
    assert plain["images_per_second"] > 0
    assert [row["model"] for row in comparison.rows] == ["reg0", "reg2"] == list(comparison.reports)
    written = comparison.save(checkpoints[0].parent / "out").read_text()
    assert str(checkpoints[0].parent) not in written  # reports are published
    table = comparison.table().splitlines()
    assert len(table) == 4
    assert len({line.count("|") for line in table}) == 1
    with pytest.raises(ValueError, match="names a model twice"):
        compare_checkpoints(checkpoints[:1] * 2, PHOTOS)


@pytest.mark.slow
def test_command_writes_report_and_page(checkpoints, tmp_path, capsys):
    image_folder = save_images(tmp_path / "images", PHOTOS[:9])
    out = tmp_path / "out"
    args = ["diagnose", "--model", str(checkpoints[1]), "--data", str(image_folder), "--output_dir", str(out)]
    assert cli.main(args) == 0
    printed = capsys.readouterr().out
    assert "verdict     No distinct outliers" in printed
    assert json.loads((out / "report.json").read_text())["num_images"] == 9
    assert (out / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_command_takes_a_cutoff(checkpoints, tmp_path, capsys):
    image_folder = save_images(tmp_path / "images", PHOTOS[:9])
    args = ["diagnose", "--model", str(checkpoints[1]), "--data", str(image_folder), "--output_dir", str(tmp_path)]
    assert cli.main([*args, "--json", "--cutoff", "2.5"]) == 0
    assert json.loads(capsys.readouterr().out)["cutoff"] == 2.5


@pytest.mark.slow
def test_command_compares_models(checkpoints, tmp_path, capsys):
    image_folder = save_images(tmp_path / "images", PHOTOS[:9])
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text("of an earlier diagnosis, of one model")
    models = [option for folder in checkpoints for option in ("--model", str(folder))]
    args = ["diagnose", *models, "--data", str(image_folder), "--output_dir", str(out), "--layers", "4"]
    assert cli.main(args) == 0
    assert "| model | registers |" in capsys.readouterr().out
    assert len(json.loads((out / "comparison.json").read_text())["rows"]) == 2
    assert (out / "1-reg2" / "report.json").is_file()
    assert (out / "0-reg0" / "report.html").is_file()
    assert not (out / "report.json").exists()


def test_command_with_wrong_values(checkpoints, tmp_path, capsys):
    image_folder = save_images(tmp_path / "images", PHOTOS[:9])
    args = ["diagnose", "--model", str(checkpoints[0]), "--data", str(image_folder)]
    assert cli.main([*args, "--cutoff", "high"]) == 1
    assert "--cutoff high is not a number" in capsys.readouterr().err
    assert cli.main([*args, "--dry_run", "--max_images", "50"]) == 0
    assert "max_images: 50" in capsys.readouterr().out
