"""Tests of LOST, the attention box and IoU: slow twins, ties, degenerate and wrong input."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel

from builders import noise, tiny_model
from hf_regvit import FeatureSettings
from hf_regvit.evaluation.boxes import best_iou, box_iou
from hf_regvit.evaluation.dense_features import read_views
from hf_regvit.evaluation.lost import (
    AttentionSettings,
    LostSettings,
    _padded,
    attention_mask,
    cells_to_pixels,
    discover_objects,
    lost_box,
    lost_boxes,
    propose,
)
from hf_regvit.models.loading import open_model
from hf_regvit.models.processing import EvaluationTransform, default_image_processor
from hf_regvit.models.tokens import read_tokens


def attention_cells(attention, grid, *, mass):
    """Box around the mask of the attention, in patches."""
    return around({tuple(cell) for cell in attention_mask(attention, grid, mass=mass).nonzero().tolist()})


def flood(cells, start):
    """Cells connected with `start` by edges."""
    reached, queue = {start}, [start]
    while queue:
        row, column = queue.pop()
        for cell in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            if cell in cells and cell not in reached:
                reached.add(cell)
                queue.append(cell)
    return reached


def around(cells):
    rows, columns = zip(*cells, strict=True)
    return min(columns), min(rows), max(columns) + 1, max(rows) + 1


def slow_affinity(features, center, l2norm, bias):
    rows = [[float(x) for x in row] for row in features]
    if center == "image":
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        rows = [[x - m for x, m in zip(row, mean, strict=True)] for row in rows]
    if l2norm:
        rows = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows]
    gram = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in rows] for a in rows]
    if center == "row":
        gram = [[x - sum(row) / len(row) for x in row] for row in gram]
    return [[x + bias for x in row] for row in gram]


def slow_lost(features, grid, *, k, center, l2norm, bias):
    """The definition, patch by patch, in plain Python."""
    gram = slow_affinity(features.tolist(), center, l2norm, bias)
    count = len(gram)
    degrees = [sum(gram[i][j] > 0 for j in range(count) if j != i) for i in range(count)]
    ranked = sorted(range(count), key=lambda i: (degrees[i], i))
    seed = ranked[0]
    expansion = [p for p in ranked[:k] if gram[seed][p] > 0]
    scores = [sum(gram[s][j] for s in expansion) for j in range(count)]
    foreground = {divmod(j, grid[1]) for j in range(count) if scores[j] > 0}
    start = divmod(seed, grid[1])
    part = flood(foreground, start) if start in foreground else {start}
    return {
        "degrees": degrees,
        "seed": seed,
        "expansion": sorted(expansion),
        "scores": scores,
        "mask": part,
        "cells": around(part),
        "tied": degrees.count(degrees[seed]),
        "share": sum(degrees) / (count * (count - 1)),
    }


def scene(seed=0, grid=(6, 8), width=7, object_cells=((1, 2), (1, 3), (2, 2), (2, 3), (3, 3)), tilt=0.0):
    """Patches of a background and an object, two directions with noise; `tilt` is a direction common to all."""
    generator = torch.Generator().manual_seed(seed)
    background, thing, common = torch.randn(3, width, generator=generator)
    thing = thing - background * (thing @ background + 4.0) / (background @ background)
    features = background.repeat(grid[0] * grid[1], 1)
    for row, column in object_cells:
        features[row * grid[1] + column] = thing
    features = features + 0.3 * torch.randn(features.shape, generator=generator) + tilt * common
    return (features * 32).round() / 32  # sums of their products are exact in float32, in any order


@pytest.mark.parametrize(("center", "l2norm"), list(itertools.product(("none", "image", "row"), (False, True))))
@pytest.mark.parametrize(("bias", "k", "tilt"), [(0.0, 100, 0.0), (-0.3, 9, 1.0), (0.2, 3, 0.3), (-0.9, 20, 2.0)])
def test_equals_the_slow_twin(center, l2norm, bias, k, tilt):
    compared = 0
    for seed in range(20):
        if compared == 2:
            break
        features = scene(seed, tilt=tilt)
        gram = torch.tensor(slow_affinity(features.tolist(), center, l2norm, bias), dtype=torch.float64)
        if gram.abs().min() < 2e-5:
            continue  # within float32 rounding, the sign is not meaningful
        compared += 1
        expected = slow_lost(features, (6, 8), k=k, center=center, l2norm=l2norm, bias=bias)
        result = lost_box(features, (6, 8), LostSettings(k=k, center=center, l2norm=l2norm, bias=bias))
        torch.testing.assert_close(result.seed_similarity.flatten().double(), gram[result.seed], atol=2e-5, rtol=1e-5)
        assert result.degrees.flatten().tolist() == expected["degrees"]
        assert result.seed == expected["seed"]
        assert result.expansion.tolist() == expected["expansion"]
        torch.testing.assert_close(
            result.scores.flatten().double(), torch.tensor(expected["scores"]).double(), atol=2e-4, rtol=1e-4
        )
        assert {tuple(cell) for cell in result.mask.nonzero().tolist()} == expected["mask"]
        assert result.cells == expected["cells"]
        assert (result.tied_seeds, result.positive_share) == (expected["tied"], pytest.approx(expected["share"]))
    assert compared == 2


def test_finds_the_object_that_was_put_there():
    result = lost_box(scene(), (6, 8))
    assert result.cells == (2, 1, 4, 4)
    assert result.box((16, 16), (90, 60)) == (32.0, 16.0, 60.0, 64.0)  # clipped at the right edge of the image
    assert result.box((10, 16), (90, 100)) == (32.0, 10.0, 64.0, 40.0)
    assert not result.degenerate


def test_many_settings_at_once_equal_one_by_one():
    features = scene(tilt=1.0)
    settings = [
        LostSettings(center=center, l2norm=l2norm, bias=bias, k=k)
        for bias, k, l2norm, center in itertools.product((-0.4, 0.0), (3, 50), (True, False), ("row", "none", "image"))
    ]
    for one, result in zip(settings, lost_boxes(features, (6, 8), settings), strict=True):
        single = lost_box(features, (6, 8), one)
        assert (result.seed, result.cells) == (single.seed, single.cells)
        assert torch.equal(result.scores, single.scores)


def test_rows_of_the_affinity_are_handled_in_pieces(monkeypatch):
    features = scene(tilt=0.5)
    whole = lost_box(features, (6, 8), LostSettings(center="row", bias=-0.1))
    monkeypatch.setattr("hf_regvit.evaluation.lost._ROWS_AT_ONCE", 5)
    pieces = lost_box(features, (6, 8), LostSettings(center="row", bias=-0.1))
    assert torch.equal(whole.degrees, pieces.degrees)
    assert whole.cells == pieces.cells


def test_equal_degrees_are_ranked_by_position():
    features = torch.ones(12, 3)
    result = lost_box(features, (3, 4), LostSettings(k=5))
    assert (result.seed, result.expansion.tolist()) == (0, [0, 1, 2, 3, 4])
    assert result.tied_seeds == 12


def test_almost_all_similar_is_called_degenerate_with_its_number():
    tilted = lost_box(scene(tilt=20.0), (6, 8))
    assert tilted.degenerate
    assert tilted.positive_share == 1.0
    assert tilted.tied_seeds == 48
    # The purpose of the settings: with centering, the same features show the object again.
    assert lost_box(scene(tilt=20.0), (6, 8), LostSettings(center="image")).cells == (2, 1, 4, 4)
    # With a very low bias, no patches are similar, so there is no distinct seed either.
    assert lost_box(scene(), (6, 8), LostSettings(l2norm=True, bias=-1.5)).degenerate


@pytest.mark.parametrize(("features", "why"), [
    (torch.zeros(12, 3), "nothing is similar to anything, not even to itself"),
    (-torch.eye(12)[:, :5] * 0, "negative zero"),
])  # fmt: skip
def test_a_seed_in_the_background_is_the_whole_object(features, why):
    result = lost_box(features, (3, 4))
    assert result.cells == (0, 0, 1, 1), why
    assert result.mask.sum() == 1
    assert len(result.expansion) == 0
    assert result.seed_cells == (0, 0, 1, 1)


def test_a_seed_whose_own_score_is_negative():
    # The centered rows of the expansion are high at each other and low at the seed.
    for seed in range(200):
        features = torch.randn(12, 3, generator=torch.Generator().manual_seed(seed))
        result = lost_box(features, (3, 4), LostSettings(center="row", bias=-0.5))
        row, column = divmod(result.seed, 4)
        if len(result.expansion) and not result.scores[row, column] > 0:
            assert result.cells == (column, row, column + 1, row + 1)
            return
    pytest.fail("no such case among 200 draws; the branch would be untested")


def test_one_patch_and_half_precision():
    assert lost_box(torch.ones(1, 3), (1, 1)).cells == (0, 0, 1, 1)
    features = scene().bfloat16()
    assert lost_box(features, (6, 8)).cells == lost_box(features.float(), (6, 8)).cells


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (5, 8)}, r"\(48, 7\).*5 x 8"),
        ({"features": torch.zeros(1, 48, 7)}, r"expected \(patches, width\)"),
        ({"features": torch.full((48, 7), torch.nan)}, "NaN or infinity"),
        ({"k": 0}, "k=0"),
        ({"center": "column"}, "center='column'.*none, image, row"),
        ({"bias": float("nan")}, "bias=nan"),
    ],
)
def test_wrong_input_is_named(change, message):
    arguments = {"features": scene(), "grid": (6, 8)} | change
    with pytest.raises(ValueError, match=message):
        lost_box(arguments.pop("features"), arguments.pop("grid"), LostSettings(**arguments))


def test_exactly_at_its_bounds_an_affinity_is_not_degenerate_yet():
    result = lost_box(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), (4, 4))
    for change, expected in (
        ({"positive_share": 0.95, "tied_seeds": 8}, False),
        ({"positive_share": 0.951, "tied_seeds": 1}, True),
        ({"positive_share": 0.5, "tied_seeds": 9}, True),
    ):
        assert replace(result, **change).degenerate == expected


def test_shares_and_similarities_of_exactly_zero_are_not_positive():
    # Three patches along one axis, two along another, one at zero: all products are 0 or positive.
    features = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [0, 1], [0, 0]])
    result = lost_box(features, (2, 3))
    assert result.degrees.flatten().tolist() == [2, 2, 2, 1, 1, 0]
    assert result.positive_share == (3 * 2 + 2) / 30
    assert (result.seed, result.expansion.tolist(), result.cells) == (5, [], (2, 1, 3, 2))
    few = lost_box(features[:5].repeat(1, 1)[[0, 1, 2, 3, 4, 4]], (2, 3), LostSettings(k=2))
    assert few.degrees.flatten().tolist() == [2] * 6
    assert few.expansion.tolist() == [0, 1]
    assert (few.scores > 0).flatten().tolist() == [True] * 3 + [False] * 3


def test_padding_goes_by_the_height_and_the_width_of_a_patch():
    transform = EvaluationTransform.for_model(MODEL, PROCESSOR)
    pixels = _padded(noise(0, (37, 26)), transform, (8, 16), 1.0)
    assert tuple(pixels.shape) == (3, 32, 48)
    assert not pixels[:, 26:].any()
    assert not pixels[:, :, 37:].any()
    pixels = _padded(noise(0, (37, 26)), transform, (8, 16), 20 / 37)
    assert tuple(pixels.shape) == (3, 16, 32)  # read at 20 x 14


def test_settings_name_themselves():
    assert str(LostSettings()) == "feature=k layer=-1 center=none l2norm=False bias=0 k=100"
    with pytest.raises(ValueError, match="feature='keys'"):
        LostSettings(feature="keys")


# --- Attention


def slow_attention(attention, grid, mass):
    """Keep the patches outside the tail that holds 1 - mass; return the largest component, the first in a tie."""
    total, running, kept = sum(attention), 0.0, set()
    for position in sorted(range(len(attention)), key=lambda i: attention[i]):
        running += attention[position] / total
        if running > 1 - mass:
            kept.add(divmod(position, grid[1]))
    parts, left = [], sorted(kept)
    while left:
        parts.append(flood(kept, left[0]))
        left = [cell for cell in left if cell not in parts[-1]]
    return max(parts, key=len)  # the first in a tie


@pytest.mark.parametrize("mass", [0.2, 0.6, 0.95, 1.0])
def test_attention_equals_the_slow_twin(mass):
    for seed in range(8):
        attention = torch.randn(35, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(0)
        expected = slow_attention(attention.tolist(), (5, 7), mass)
        mask = attention_mask(attention, (5, 7), mass=mass)
        assert {tuple(cell) for cell in mask.nonzero().tolist()} == expected
        assert attention_cells(attention, (5, 7), mass=mass) == around(expected)


def test_the_others_may_hold_all_that_is_not_asked_for():
    # Two of four equal patches hold exactly the half that may be left out; in a tie, later ones are kept.
    assert attention_mask(torch.ones(4), (2, 2), mass=0.5).tolist() == [[False, False], [True, True]]


def test_of_equal_parts_the_first_in_reading_order_counts():
    attention = torch.zeros(4, 6)
    attention[3, 0] = attention[2, 0] = attention[0, 4] = attention[0, 5] = 1.0
    assert attention_cells(attention.flatten(), (4, 6), mass=1.0) == (4, 0, 6, 1)


@pytest.mark.parametrize(
    ("attention", "mass", "message"),
    [
        (torch.ones(5), 0.6, "2 x 3"),
        (torch.zeros(6), 0.6, "not all zero"),
        (torch.full((6,), torch.nan), 0.6, "finite"),
        (torch.tensor([3.0, -1, 0, 0, 0, 0]), 0.6, "not negative"),
        (torch.ones(6), 0.0, "mass=0"),
    ],
)
def test_wrong_attention_is_named(attention, mass, message):
    with pytest.raises(ValueError, match=message):
        attention_mask(attention, (2, 3), mass=mass)


# --- IoU and CorLoc


def test_iou_equals_counting_pixels():
    boxes = torch.tensor([[0, 0, 4, 3], [2, 1, 6, 6], [5, 5, 6, 6], [0, 0, 6, 6], [3, 3, 3, 5]])
    pixels = [{(x, y) for x in range(x1, x2) for y in range(y1, y2)} for x1, y1, x2, y2 in boxes.tolist()]
    actual = box_iou(boxes, boxes)
    for i, j in itertools.product(range(len(boxes)), repeat=2):
        union = len(pixels[i] | pixels[j])
        assert actual[i, j].item() == pytest.approx(len(pixels[i] & pixels[j]) / union if union else 0.0, abs=1e-6)


def test_exactly_half_counts_and_a_little_less_does_not():
    truth = [[(0.0, 0.0, 10.0, 10.0)]]
    assert best_iou([(0, 0, 10, 5)], truth).item() == 0.5  # CorLoc counts 0.5 and more
    assert best_iou([(0, 0, 10, 4.999)], truth).item() < 0.5


def test_any_box_of_the_image_will_do():
    truth = [[[0, 0, 2, 2], [10, 10, 20, 20]], [[0, 0, 2, 2]], [[5, 5, 9, 9]]]
    predictions = [(10, 10, 20, 18), (0, 0, 2, 2), (0, 0, 4, 4)]
    assert best_iou(predictions, truth).tolist() == pytest.approx([0.8, 1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([[0, 0, 1, 1]], [[], []], "1 predicted boxes for 2"),
        ([[0, 0, 1, 1]], [[]], "Image 0 has no ground-truth box"),
        ([[5, 5, 1, 1]], [[[0, 0, 1, 1]]], r"Convert \(x, y, w, h\) boxes"),
        ([[0, 0, 1, 1]], [[[0, 0, math.nan, 1]]], "finite"),
        ([[0, 0, 1]], [[[0, 0, 1, 1]]], r"\(number, 4\)"),
    ],
)
def test_wrong_boxes_are_named(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        best_iou(predictions, references)


def test_cells_become_pixels():
    assert cells_to_pixels((1, 2, 3, 4), patch_size=(14, 14), image_size=(50, 100)) == (14.0, 28.0, 42.0, 50.0)
    assert cells_to_pixels((1, 2, 5, 4), patch_size=(10, 14), image_size=(35, 60)) == (14.0, 20.0, 60.0, 35.0)


# --- On a model


MODEL = tiny_model(num_hidden_layers=3, num_attention_heads=4, num_register_tokens=2)


PROCESSOR = default_image_processor(32)
PROCESSOR.image_mean, PROCESSOR.image_std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def padded(image, width, height):
    """Normalized, then zeros on the right and bottom, pixel by pixel."""
    pixels = torch.zeros(1, 3, height, width)
    values = np.asarray(image)
    for y, x in itertools.product(range(image.height), range(image.width)):
        for c, (mean, std) in enumerate(zip((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), strict=True)):
            pixels[0, c, y, x] = (values[y, x, c] / 255 - mean) / std
    return pixels


def test_images_keep_their_size_and_are_padded_to_whole_patches():
    image = noise(0, (37, 26))
    pixels = padded(image, 40, 32)
    outputs = MODEL(pixels, output_hidden_states=True)
    for layer in (1, -1):
        tokens = outputs.hidden_states[layer][0, 3:].detach()  # without CLS and two registers
        expected = lost_box(tokens, (4, 5), LostSettings(center="image", k=6))
        (found,) = discover_objects(
            open_model(MODEL, processor=PROCESSOR), [image], feature="out", layer=layer, center="image", k=6
        )
        assert found.box == expected.box((8, 8), (26, 37))
        torch.testing.assert_close(found.result.scores, expected.scores, atol=1e-3, rtol=1e-3)
        assert found.image_size == (26, 37)


def test_queries_keys_and_values_are_the_projections():
    image = noise(0, (32, 24))
    pixels = padded(image, 32, 24)
    for feature in "qkv":
        tokens = read_tokens(MODEL, pixels, layers=(2,), site=feature).values[0][0, 3:]
        expected = lost_box(tokens, (3, 4), LostSettings(l2norm=True, bias=-0.1))
        (found,) = discover_objects(
            open_model(MODEL, processor=PROCESSOR), [image], feature=feature, layer=2, l2norm=True, bias=-0.1
        )
        assert found.result.cells == expected.cells
        torch.testing.assert_close(found.result.scores, expected.scores, atol=1e-4, rtol=1e-4)


def test_attention_boxes_read_the_row_of_cls():
    image = noise(0, (37, 26))
    MODEL.set_attn_implementation("eager")
    attention = MODEL(padded(image, 40, 32), output_attentions=True).attentions[-1][0, :, 0, 3:].detach()
    MODEL.set_attn_implementation("sdpa")
    methods = [AttentionSettings(), AttentionSettings(head=2), AttentionSettings(head=3, mass=0.3)]
    (proposal,) = propose(open_model(MODEL, processor=PROCESSOR), [image], methods)
    rows = (attention.mean(0), attention[2], attention[3])
    for method, row, box, mask in zip(methods, rows, proposal.boxes, proposal.results, strict=True):
        cells = attention_cells(row, (4, 5), mass=method.mass)
        assert box == cells_to_pixels(cells, patch_size=(8, 8), image_size=(26, 37))
        assert torch.equal(mask, attention_mask(row, (4, 5), mass=method.mass))


def test_many_methods_in_one_pass_equal_one_by_one():
    images = [noise(seed, (37, 26)) for seed in range(2)] + [noise(5, (24, 24))]
    methods = [
        LostSettings("v", 1),
        AttentionSettings(1),
        *(LostSettings(f, layer, center="row", bias=0.1) for f in ("q", "out") for layer in (2, -1)),
    ]
    together = list(propose(open_model(MODEL, processor=PROCESSOR), images, methods))
    assert [proposal.image_size for proposal in together] == [(26, 37), (26, 37), (24, 24)]
    for i, method in enumerate(methods):
        alone = list(propose(open_model(MODEL, processor=PROCESSOR), images, [method]))
        assert [proposal.boxes[i] for proposal in together] == [proposal.boxes[0] for proposal in alone]


def test_large_images_are_read_smaller_and_boxes_refer_to_the_original():
    image = noise(0, (90, 60))
    (large,) = discover_objects(open_model(MODEL, processor=PROCESSOR), [image], center="image", max_side=45)
    small = image.resize((45, 30), Image.Resampling.BICUBIC)
    (same,) = discover_objects(open_model(MODEL, processor=PROCESSOR), [small], center="image")
    assert large.image_size == (60, 90)
    assert large.box == tuple(2 * side for side in same.box)
    assert torch.equal(large.result.degrees, same.result.degrees)


def test_settings_of_dense_features_set_block_views_and_size(tmp_path):
    """Recompute the patches of one setting with `read_views`; other features use the same views."""
    image, reader = noise(0, (36, 24)), open_model(MODEL, processor=PROCESSOR)
    settings = FeatureSettings(layer=2, views=4, image_size=48, pool_to_grid=True)
    settings.save(tmp_path / "dense_settings.json")
    options = {"feature": "out", "center": "image", "dense_settings": tmp_path / "dense_settings.json"}
    (found,) = discover_objects(reader, [image], **options)
    pixels = padded(image.resize((72, 48), Image.Resampling.BICUBIC), 72, 48)
    patches = read_views(reader, pixels, (2,), views=4, grid=(4, 6), final_norm=False).patches()[0]
    expected = lost_box(patches, (4, 6), LostSettings(center="image"))
    assert found.result.cells == expected.cells
    torch.testing.assert_close(found.result.scores, expected.scores, atol=1e-4, rtol=1e-4)
    x1, y1, x2, y2 = expected.cells
    assert found.box == (6 * x1, 6 * y1, 6 * x2, 6 * y2)
    (keys,) = discover_objects(reader, [image], dense_settings=settings)
    assert keys.result.mask.shape == (4, 6)
    own = replace(settings, image_size=None)
    (same,) = discover_objects(reader, [image], dense_settings=own)
    assert same.result.mask.shape == (4, 6)  # the image size of the model, 32, times the aspect
    with pytest.raises(ValueError, match="settings and layer are given"):
        discover_objects(reader, [image], layer=1, dense_settings=settings)


def test_attention_keeps_its_grid_beside_pooled_features():
    image, reader = noise(0, (36, 24)), open_model(MODEL, processor=PROCESSOR)
    dense = FeatureSettings(layer=2, views=1, image_size=48, pool_to_grid=True)
    methods = [LostSettings("k", 2), AttentionSettings()]
    (both,) = propose(reader, [image], methods, dense=dense)
    lost, mask = both.results
    assert (tuple(lost.mask.shape), tuple(mask.shape)) == ((4, 6), (6, 9))
    (alone,) = propose(reader, [image], methods[1:], dense=dense)
    assert torch.equal(alone.results[0], mask)
    assert alone.boxes[0] == both.boxes[1]


def test_broken_images_are_left_out_and_names_kept(tmp_path, caplog):
    noise(0, (32, 24)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"not an image")
    noise(0, (40, 24)).save(tmp_path / "c.png")
    found = discover_objects(open_model(MODEL, processor=PROCESSOR), tmp_path, center="image")
    assert [one.id for one in found] == ["a.png", "c.png"]
    assert [one.image_size for one in found] == [(24, 32), (24, 40)]
    assert "1 of 3 images were skipped" in caplog.text


def test_a_degenerate_affinity_is_said_with_numbers(caplog):
    discover_objects(open_model(MODEL, processor=PROCESSOR), [noise(0, (32, 24))], l2norm=True, bias=2.0)
    assert "1 of 1 images have a degenerate affinity" in caplog.text
    assert "100.0 % of its entries are positive, and 12 patches (median) tie" in caplog.text
    caplog.clear()
    discover_objects(open_model(MODEL, processor=PROCESSOR), [noise(0, (32, 24))], center="image")
    assert "degenerate" not in caplog.text


def test_the_model_is_left_as_it_was():
    MODEL.train()
    before = {name: value.clone() for name, value in MODEL.state_dict().items()}
    list(propose(open_model(MODEL, processor=PROCESSOR), [noise(0, (32, 24))], [LostSettings(), AttentionSettings()]))
    assert MODEL.training
    MODEL.eval()
    assert all(torch.equal(value, before[name]) for name, value in MODEL.state_dict().items())


def test_settings_that_a_model_has_not_are_named():
    image = noise(0, (32, 24))
    with pytest.raises(ValueError, match="Block 4"):
        discover_objects(open_model(MODEL, processor=PROCESSOR), [image], layer=4)
    with pytest.raises(ValueError, match=r"head=4 does not exist\. Use 0 to 3"):
        list(propose(open_model(MODEL, processor=PROCESSOR), [image], [AttentionSettings(4)]))
    config = SiglipVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    without_cls = SiglipVisionModel(config).eval()
    assert len(discover_objects(open_model(without_cls, processor=PROCESSOR), [image])) == 1
    with pytest.raises(ValueError, match="no CLS token"):
        list(propose(open_model(without_cls, processor=PROCESSOR), [image], [AttentionSettings()]))
