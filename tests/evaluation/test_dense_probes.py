"""Linear segmentation and linear depth: features, schedules, losses and scores against slow twins and the models."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import ViTConfig, ViTModel

from builders import tiny_model
from hf_regvit import RegViTConfig, RegViTForDepthEstimation, RegViTForSemanticSegmentation, convert
from hf_regvit.evaluation.dense_features import DenseFeatures, four_blocks, read_dense_features
from hf_regvit.evaluation.dense_heads import (
    DepthSettings,
    SegmentationSettings,
    _depth_at_input,
    _mask_at_input,
    bins_to_meters,
    cosine_with_warmup,
    linear_depth,
    linear_segmentation,
    poly_with_warmup,
)
from hf_regvit.evaluation.intervals import mean_iou
from hf_regvit.evaluation.metrics import DepthErrors, MeanIoU
from hf_regvit.models.loading import open_model
from hf_regvit.models.processing import EvaluationTransform

TINY = {
    "image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_register_tokens": 2, "layerscale_value": 1.0,
}  # fmt: skip
TRANSFORM = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
NAMES = ("dark", "bright")


class Statistics:
    """Minimal image processor for whole images."""

    image_mean, image_std = TRANSFORM["image_mean"], TRANSFORM["image_std"]


MODEL = tiny_model(**TINY)


def scene(seed: int, size=(32, 32)) -> tuple[Image.Image, np.ndarray]:
    """Bright and dark cells of 8 pixels with noise, and which is which; the last rows are ignored."""
    rng = np.random.default_rng(seed)
    cells = rng.random((size[1] // 8, size[0] // 8)) < 0.5
    cells.flat[:2] = (True, False)
    mask = np.kron(cells, np.ones((8, 8), dtype=np.uint8)).astype(np.uint8)
    pixels = np.where(mask[..., None] == 1, 200, 50) + rng.integers(-25, 25, (*mask.shape, 3))
    mask = mask.copy()
    mask[-2:] = 255
    return Image.fromarray(pixels.astype(np.uint8)), mask


def scenes(seeds, size=(32, 32)):
    pairs = [scene(seed, size) for seed in seeds]
    return [image for image, _ in pairs], [mask for _, mask in pairs]


def read(model, images, **options) -> DenseFeatures:
    return read_dense_features(open_model(model, processor=Statistics()), images, **options)


# --- Features


def test_features_are_the_normed_patch_tokens_of_each_block():
    images, _ = scenes(range(3))
    features = read(MODEL, images, layers=(2, -1), batch_size=2)
    pixels = torch.stack([EvaluationTransform.for_model(MODEL, Statistics(), keep_aspect=True)(i) for i in images])
    for side, values in ((features, pixels), (features.flipped, pixels.flip(-1))):
        with torch.no_grad():
            states = MODEL(values, output_hidden_states=True).hidden_states
            tokens = [MODEL.layernorm(states[block]) for block in (2, 4)]
        for i in range(3):
            expected = torch.cat([t[i, 3:].view(4, 4, 16) for t in tokens], dim=-1)
            torch.testing.assert_close(side.maps[i], expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(side.cls[i], torch.cat([t[i, 0] for t in tokens]), atol=1e-5, rtol=1e-5)
    assert (features.layers, features.width, len(features), features.input_size(0)) == ((2, 4), 32, 3, (32, 32))


def test_images_keep_their_proportions():
    images = [scene(0, (64, 32))[0], scene(1, (32, 48))[0], scene(2, (64, 32))[0]]
    features = read(MODEL, images, flip=False)
    assert [tuple(m.shape) for m in features.maps] == [(4, 8, 16), (6, 4, 16), (4, 8, 16)]
    assert features.flipped is None
    pixels = EvaluationTransform.for_model(MODEL, Statistics(), keep_aspect=True)(images[1])[None]
    with torch.no_grad():
        tokens = MODEL(pixels).last_hidden_state[0, 3:]
    torch.testing.assert_close(features.maps[1].flatten(0, 1), tokens, atol=1e-5, rtol=1e-5)


def test_an_image_that_cannot_be_used_is_an_error_because_its_target_would_be_left(tmp_path):
    scene(0)[0].save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"1 of 2 images cannot be used, first 'b.png'"):
        read(MODEL, tmp_path)


def test_four_blocks_are_the_published_ones():
    # 0-based in the protocol: 2 5 8 11, 4 11 17 23, 9 19 29 39
    assert [four_blocks(n) for n in (12, 24, 40)] == [(3, 6, 9, 12), (5, 12, 18, 24), (10, 20, 30, 40)]
    assert four_blocks(4) == (1, 2, 3, 4)
    assert four_blocks(6) == (2, 3, 5, 6)  # ends of quarters, rounded up
    with pytest.raises(ValueError, match="has 3 blocks"):
        four_blocks(3)


# --- Schedules and settings


def test_schedules_equal_their_twins():
    for num_steps, ratio in ((200, 0.1), (40, 0.0)):
        warmup = round(num_steps * ratio)
        for step in range(num_steps):
            base = 1 - step / num_steps
            ramp = 1e-6 + (1 - 1e-6) * step / warmup if step < warmup else 1.0
            assert poly_with_warmup(step, num_steps, ratio) == pytest.approx(base * ramp, rel=1e-12)
            base = (1 + math.cos(math.pi * step / num_steps)) / 2
            ramp = 1e-3 + (1 - 1e-3) * step / warmup if step < warmup else 1.0
            assert cosine_with_warmup(step, num_steps, ratio) == pytest.approx(base * ramp, rel=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SegmentationSettings(num_steps=0), "num_steps=0"),
        (lambda: SegmentationSettings(flip_probability=2), "flip_probability=2"),
        (lambda: SegmentationSettings(learning_rate=0), "learning_rate=0"),
        (lambda: DepthSettings(min_depth=0), "min_depth=0"),
        (lambda: DepthSettings(num_bins=1), "num_bins=1"),
    ],
)
def test_settings_that_cannot_be_meant(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- Segmentation


@pytest.fixture(scope="module")
def segmented():
    train, train_masks = scenes(range(12))
    test, test_masks = scenes(range(50, 56))
    parts = read(MODEL, train), read(MODEL, test)
    settings = SegmentationSettings(num_steps=60, batch_size=4, learning_rate=1e-2)
    result = linear_segmentation(parts[0], train_masks, parts[1], test_masks, class_names=NAMES, settings=settings)
    return result, parts, (train_masks, test_masks), settings


def test_the_head_learns_what_is_linear_in_the_patches(segmented):
    result = segmented[0]
    assert result.scores["mean_iou"] > 0.8
    assert (len(result.ids), result.num_train, result.layers) == (6, 12, (4,))
    assert {"iou_dark", "iou_bright"} <= set(result.scores)
    assert mean_iou(result.rows) == pytest.approx(result.scores["mean_iou"], abs=1e-12)
    assert "60 steps of 4 images with flips" in result.protocol
    assert result.to_dict()["settings"]["num_steps"] == 60


def test_the_head_predicts_the_same_inside_the_model(segmented):
    """The probe's weights in RegViTForSemanticSegmentation give the probe's counts."""
    result, _, (_, test_masks), _ = segmented
    whole = RegViTForSemanticSegmentation(RegViTConfig(**TINY, num_labels=2)).eval()
    whole.regvit.load_state_dict(MODEL.state_dict(), strict=False)
    missing = whole.load_state_dict(result.head, strict=False)
    assert not missing.unexpected_keys and all(key.startswith("regvit.") for key in missing.missing_keys)  # noqa: PT018
    metric = MeanIoU(num_classes=2)
    transform = EvaluationTransform.for_model(whole, Statistics(), keep_aspect=True)
    for seed, truth in zip(range(50, 56), test_masks):
        with torch.no_grad():
            logits = whole(transform(scene(seed)[0])[None]).logits
        metric.add(prediction=logits[0].argmax(0), reference=truth.astype(np.int64))
    assert metric.compute()["mean_iou"] == pytest.approx(result.scores["mean_iou"], abs=1e-9)


def test_one_step_of_segmentation_equals_its_twin(segmented):
    """Batch norm, linear layer, bilinear logits, cross-entropy over labeled pixels, AdamW, written out."""
    _, (features, test), (masks, test_masks), _ = segmented
    few = replace(features, maps=features.maps[:3], flipped=None, ids=features.ids[:3])
    settings = SegmentationSettings(num_steps=2, warmup_ratio=0.0, batch_size=3, learning_rate=0.1, weight_decay=0.5)
    result = linear_segmentation(few, masks[:3], test, test_masks, class_names=NAMES, settings=settings, seed=5)
    start = linear_segmentation(
        few, masks[:3], test, test_masks, class_names=NAMES, seed=5,
        settings=SegmentationSettings(num_steps=1, learning_rate=1e-12, weight_decay=0.0, batch_size=3),
    ).head  # fmt: skip
    norm, linear = torch.nn.BatchNorm2d(16), torch.nn.Conv2d(16, 2, 1)
    with torch.no_grad():
        linear.weight.copy_(start["classifier.weight"][:, :, None, None])
        linear.bias.copy_(start["classifier.bias"])
    optimizer = torch.optim.AdamW([*norm.parameters(), *linear.parameters()], lr=0.1, weight_decay=0.5)
    maps = torch.stack(few.maps).permute(0, 3, 1, 2)
    truth = torch.tensor(np.stack(masks[:3])).long()
    for step in range(2):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 2)
        logits = functional.interpolate(linear(norm(maps)), size=(32, 32), mode="bilinear", align_corners=False)
        total, count = 0.0, 0
        for image, target in zip(logits, truth):
            for label in (0, 1):
                where = target == label
                total = total - image.log_softmax(0)[label][where].sum()
                count += int(where.sum())
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    assert result.train_loss == pytest.approx((total / count).item(), rel=1e-4)  # AdamW alone is invariant to scale
    torch.testing.assert_close(result.head["classifier.weight"], linear.weight[:, :, 0, 0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(result.head["head_norm.running_mean"], norm.running_mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(result.head["head_norm.running_var"], norm.running_var, atol=1e-5, rtol=1e-4)


def test_same_seed_same_numbers_another_seed_others(segmented):
    result, parts, (train_masks, test_masks), settings = segmented
    again, other = (
        linear_segmentation(
            parts[0], train_masks, parts[1], test_masks, class_names=NAMES, settings=settings, seed=seed
        )
        for seed in (0, 1)
    )
    np.testing.assert_array_equal(again.rows, result.rows)
    # Sums in float32 depend on where in memory a tensor begins, so the last bit may differ within one process.
    torch.testing.assert_close(again.head["classifier.weight"], result.head["classifier.weight"], atol=1e-6, rtol=0)
    assert not torch.allclose(other.head["classifier.weight"], result.head["classifier.weight"])


def test_images_of_different_sizes_and_masks_of_their_own_size():
    sizes = [(32, 32), (48, 32), (32, 64), (48, 32)]
    pairs = [scene(i, size) for i, size in enumerate(sizes)]
    images, masks = [p[0] for p in pairs], [np.kron(p[1], np.ones((2, 2), dtype=np.uint8)) for p in pairs]
    images = [image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST) for image in images]
    features = read(MODEL, images, image_size=32)
    settings = SegmentationSettings(num_steps=80, batch_size=4, learning_rate=1e-2)
    result = linear_segmentation(features, masks, features, masks, class_names=NAMES, settings=settings)
    assert result.rows[:, 4:].sum(1).tolist() == [float((m != 255).sum()) for m in masks]
    assert result.scores["mean_iou"] > 0.75
    head = torch.nn.Sequential(torch.nn.BatchNorm2d(16), torch.nn.Conv2d(16, 2, 1)).eval()
    state = {name: value for name, value in result.head.items() if name.startswith("head_norm")}
    head[0].load_state_dict({name.removeprefix("head_norm."): value for name, value in state.items()})
    head[1].load_state_dict({"weight": result.head["classifier.weight"][:, :, None, None],
                             "bias": result.head["classifier.bias"]})  # fmt: skip
    for i, (maps, mask) in enumerate(zip(features.maps, masks, strict=True)):
        with torch.no_grad():
            logits = head(maps.permute(2, 0, 1)[None])
        for size in (features.input_size(i), mask.shape):  # first to the size at which the image was read
            logits = functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        said, counted = logits[0].argmax(0).numpy(), mask != 255
        expected = [
            [((said == c) & (mask == c)).sum(), ((said == c) & counted).sum(), (mask == c).sum()] for c in (0, 1)
        ]
        assert result.rows[i].reshape(3, 2).T.tolist() == expected


def test_masks_that_do_not_fit_are_named(segmented):
    _, (train, test), (train_masks, test_masks), settings = segmented
    options = {"class_names": NAMES, "settings": settings}
    with pytest.raises(ValueError, match="12 training images have 11 targets"):
        linear_segmentation(train, train_masks[1:], test, test_masks, **options)
    wrong = [*train_masks[:-1], np.full((32, 32), 7, dtype=np.uint8)]
    with pytest.raises(ValueError, match="contains 7; expected class ids 0 to 1"):
        linear_segmentation(train, wrong, test, test_masks, **options)


def test_a_converted_model_and_its_source_give_the_same_numbers():
    torch.manual_seed(1)
    source = ViTModel(
        ViTConfig(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                  intermediate_size=32), add_pooling_layer=False,
    ).eval()  # fmt: skip
    train, train_masks = scenes(range(6), (48, 32))
    test, test_masks = scenes(range(20, 23), (48, 32))
    settings = SegmentationSettings(num_steps=20, batch_size=4, learning_rate=1e-2)
    results = []
    for network in (source, convert(source).eval()):
        parts = read(network, train), read(network, test)
        results.append(
            linear_segmentation(parts[0], train_masks, parts[1], test_masks, class_names=NAMES, settings=settings)
        )
    assert results[0].scores["mean_iou"] == pytest.approx(results[1].scores["mean_iou"], abs=2e-3)


# --- Depth


def depth_scenes(seeds):
    """Dark is near, bright is far; some pixels are not measured."""
    images, masks = scenes(seeds)
    depths = [np.where(mask == 1, 4.0, 1.5).astype(np.float32) for mask in masks]
    for depth, mask in zip(depths, masks):
        depth[mask == 255] = 0
        depth[0, 0] = np.nan
        depth[0, 1] = 30.0
    return images, depths


FAST = DepthSettings(num_steps=120, batch_size=4, learning_rate=1e-2, num_bins=32)


@pytest.fixture(scope="module")
def measured():
    train, train_depths = depth_scenes(range(12))
    test, test_depths = depth_scenes(range(50, 55))
    parts = read(MODEL, train), read(MODEL, test)
    return (
        linear_depth(parts[0], train_depths, parts[1], test_depths, settings=FAST),
        parts,
        (train_depths, test_depths),
    )


def test_training_depths_are_picked_and_never_mixed(measured):
    _, (features, _), _ = measured
    depth = np.random.default_rng(0).uniform(1, 9, (80, 112)).astype(np.float32)
    depth[::2, ::3], depth[1::5] = 0.0, np.nan
    depth[2, 2], depth[0, 0] = 11.0, 5e-4  # outside of the range at both ends
    # To 32 x 32: the pixel that contains the center of every new one.
    rows, columns = (((np.arange(32) + 0.5) * side / 32).astype(int) for side in depth.shape)
    valid = np.where((depth >= FAST.min_depth) & (depth <= FAST.max_depth), depth, 0)
    picked = _depth_at_input(features, [depth], 0, FAST)
    np.testing.assert_array_equal(picked.numpy(), valid[rows[:, None], columns])
    mask = np.random.default_rng(1).integers(0, 2, (80, 112)).astype(np.uint8)
    np.testing.assert_array_equal(_mask_at_input(features, [mask], 0, 2).numpy(), mask[rows[:, None], columns])


def test_depth_is_learnt_and_scored_over_measured_pixels(measured):
    result, _, (_, test_depths) = measured
    constant = DepthErrors(max_depth=10).compute(predictions=[np.full((32, 32), 2.5)] * 5, references=test_depths)
    assert result.scores["rmse"] < 0.8 * constant["rmse"]
    assert result.scores["abs_rel"] < 0.7 * constant["abs_rel"]
    assert result.rows.shape == (5, 5)
    assert result.rows.mean(0).tolist() == pytest.approx(list(result.scores.values()))
    assert "32 bins, CLS concatenated, x4, averaged with mirror image" in result.protocol


def test_the_gradient_of_depth_is_scaled_down_to_its_norm(measured):
    _, parts, (train_depths, test_depths) = measured
    options = {"num_steps": 3, "warmup_ratio": 0.0, "weight_decay": 0.0, "num_bins": 8}

    def weight(**more):
        settings = DepthSettings(**options | more)
        result = linear_depth(parts[0], train_depths, parts[1], test_depths, settings=settings)
        return result.head["classifier.weight"]

    start = weight(learning_rate=1e-12)
    # Adam is invariant to the scale of a gradient, except far below its epsilon of 1e-8.
    torch.testing.assert_close(weight(max_grad_norm=1e-13), start, atol=1e-6, rtol=0)
    assert (weight() - start).abs().max() > 1e-3


def test_the_depth_head_predicts_the_same_inside_the_model(measured):
    result, parts, (train_depths, test_depths) = measured
    alone = replace(FAST, average_flip=False)
    result = linear_depth(parts[0], train_depths, parts[1], test_depths, settings=alone)
    whole = RegViTForDepthEstimation(RegViTConfig(**TINY, num_depth_bins=32, max_depth=10.0)).eval()
    whole.regvit.load_state_dict(MODEL.state_dict(), strict=False)
    assert not whole.load_state_dict(result.head, strict=False).unexpected_keys
    transform = EvaluationTransform.for_model(whole, Statistics(), keep_aspect=True)
    metric = DepthErrors(max_depth=10)
    for seed, truth in zip(range(50, 55), test_depths):
        with torch.no_grad():
            predicted = whole(transform(scene(seed)[0])[None]).predicted_depth[0]
        metric.add(prediction=predicted, reference=truth)
    assert metric.compute()["rmse"] == pytest.approx(result.scores["rmse"], abs=1e-5)


def test_the_depth_head_of_several_blocks_is_the_models_too():
    images, depths = depth_scenes(range(4))
    features = read(MODEL, images, layers=four_blocks(4))
    settings = DepthSettings(num_steps=4, batch_size=2, num_bins=16, average_flip=False)
    result = linear_depth(features, depths, features, depths, settings=settings)
    whole = RegViTForDepthEstimation(RegViTConfig(**TINY, num_depth_bins=16, head_layers=[0, 1, 2, 3])).eval()
    whole.regvit.load_state_dict(MODEL.state_dict(), strict=False)
    whole.load_state_dict(result.head, strict=False)
    transform = EvaluationTransform.for_model(whole, Statistics(), keep_aspect=True)
    metric = DepthErrors(max_depth=10)
    with torch.no_grad():
        for image, truth in zip(images, depths):
            metric.add(prediction=whole(transform(image)[None]).predicted_depth[0], reference=truth)
    assert metric.compute()["rmse"] == pytest.approx(result.scores["rmse"], abs=1e-5)


def test_bins_equal_the_slow_twin_with_features_enlarged_first():
    """Apply the linear layer after upsampling, as published, pixel by pixel."""
    settings = DepthSettings(num_bins=8, min_depth=0.5, max_depth=4.0)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 6, 3, 2, generator=generator)
    weight, bias = torch.randn(8, 6, generator=generator), torch.randn(8, generator=generator)
    bins = torch.einsum("kf,bfij->bkij", weight, features) + bias[:, None, None]
    large = functional.interpolate(features, scale_factor=4, mode="bilinear", align_corners=False)
    expected = torch.zeros(12, 8)
    for i in range(12):
        for j in range(8):
            scores = [max(0.0, float(weight[k] @ large[0, :, i, j] + bias[k])) + 0.1 for k in range(8)]
            centers = [0.5 + k * 3.5 / 7 for k in range(8)]
            expected[i, j] = sum(s * c for s, c in zip(scores, centers)) / sum(scores)
    torch.testing.assert_close(bins_to_meters(bins, (12, 8), settings)[0], expected, atol=1e-5, rtol=1e-5)


def test_the_first_steps_of_depth_see_the_mean_alone(measured):
    """Compute one step of the mean term by hand; its gradient does not depend on single pixels."""
    _, (train, test), (depths, test_depths) = measured
    settings = DepthSettings(num_steps=1, batch_size=12, warmup_ratio=0, num_bins=8, mean_only_ratio=1.0)
    result = linear_depth(train, depths, test, test_depths, settings=settings, seed=3)
    both = linear_depth(
        train, depths, test, test_depths, seed=3,
        settings=DepthSettings(num_steps=1, batch_size=12, warmup_ratio=0, num_bins=8, mean_only_ratio=0.0),
    )  # fmt: skip
    assert result.train_loss < both.train_loss
    generator = torch.Generator().manual_seed(3 + 0x4EAD)
    weight, bias = torch.empty(8, 32), torch.empty(8)
    for values in (weight, bias):
        torch.nn.init.uniform_(values, -1 / math.sqrt(32), 1 / math.sqrt(32), generator=generator)
    flips = np.random.default_rng([3, 0xF11]).random(12) < 0.5
    order = np.random.default_rng([3, 0x0DD]).permutation(12)
    errors = []
    for place, index in enumerate(order):
        side = train.flipped if flips[place] else train
        tokens = torch.cat([side.maps[index], side.cls[index].expand(4, 4, 16)], dim=-1)  # (4, 4, 32)
        bins = (tokens @ weight.T + bias).permute(2, 0, 1)[None]
        depth = bins_to_meters(bins, (32, 32), settings)[0]
        truth = torch.tensor(depths[index].copy()).nan_to_num(0)
        truth = torch.where(truth > 10, 0, truth)
        truth = truth.flip(-1) if flips[place] else truth
        errors.append((torch.log(depth + 1e-3) - torch.log(truth + 1e-3))[truth > 0])
    expected = math.sqrt(0.15) * abs(float(torch.cat(errors).mean()))
    assert result.train_loss == pytest.approx(expected, rel=1e-5)


def test_the_mirror_image_is_averaged_in_the_test(measured):
    result, parts, (train_depths, test_depths) = measured
    with pytest.raises(ValueError, match="average_flip needs flipped test features"):
        linear_depth(parts[0], train_depths, replace(parts[1], flipped=None), test_depths, settings=FAST)
    alone = replace(FAST, average_flip=False)
    other = linear_depth(parts[0], train_depths, parts[1], test_depths, settings=alone)
    assert other.scores["rmse"] != result.scores["rmse"]
    torch.testing.assert_close(other.head["classifier.weight"], result.head["classifier.weight"], atol=1e-5, rtol=0)


def test_depth_without_a_measured_pixel_is_named(measured):
    _, parts, (train_depths, test_depths) = measured
    empty = [np.zeros((32, 32), dtype=np.float32), *train_depths[1:]]
    with pytest.raises(ValueError, match=r"no pixel between 0.001 and 10.0 meters"):
        linear_depth(parts[0], empty, parts[1], test_depths, settings=FAST)
