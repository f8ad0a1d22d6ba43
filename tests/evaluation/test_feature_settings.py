"""Settings of patch features: views mapped back exactly, pooling, files, errors, and the choice on half the images."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from builders import mask_folder, noise, normal, tiny_model, tiny_timm
from hf_regvit import FeatureSettings, TokenReader, choose_features, extract_features, open_model, patch_maps
from hf_regvit.app.cli import run
from hf_regvit.data.maps import load_depth, load_masks
from hf_regvit.evaluation.dense_features import (
    _cell_targets,
    _ridge,
    model_sizes,
    read_dense_features,
    read_views,
    settings_for,
)
from hf_regvit.evaluation.extraction import ExtractionSettings, TokenFeatures, extract_to_folder, iterate_shards
from hf_regvit.models.processing import default_image_processor

SIZES = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
         "num_register_tokens": 2, "layerscale_value": 1.0}  # fmt: skip
TASK_MASKS = [np.kron(np.arange(6).reshape(2, 3) % 2, np.ones((10, 8))).astype(np.uint8) for _ in range(8)]


def reader_of(**fields) -> TokenReader:
    return TokenReader(tiny_model(**SIZES | fields), default_image_processor(32))


def equivariant_reader() -> TokenReader:
    """A model whose patches depend on the mean colors of their own cells only: blocks and positions do nothing."""
    reader = reader_of()
    with torch.no_grad():
        for name, value in reader.model.named_parameters():
            if "position" in name or "lambda1" in name:
                value.zero_()
            if "projection.weight" in name or name.endswith("patch_embeddings.weight"):
                value.copy_(value.mean(dim=(2, 3), keepdim=True).expand_as(value))
    return reader


def test_views_of_an_equivariant_model_are_the_identity():
    reader, pixels = equivariant_reader(), normal(2, 3, 32, 48)
    one = read_views(reader, pixels, (1, 3), views=1)
    four = read_views(reader, pixels, (1, 3), views=4)
    for layer in (1, 3):
        assert four.patches(layer).std(dim=1).mean() > 1e-3  # the cells differ
        torch.testing.assert_close(four.patches(layer), one.patches(layer), atol=1e-5, rtol=0)


def test_views_are_the_mean_of_four_readings_and_commute_with_flips():
    reader, pixels = reader_of(), normal(2, 3, 32, 48)
    found = read_views(reader, pixels, (2,), views=4)
    total = torch.zeros(2, 4, 6, 16)
    for flipped in (False, True):
        for shift in (0, 1):
            view = pixels.numpy()[..., ::-1] if flipped else pixels.numpy()
            view = np.roll(view, (8 * shift, 8 * shift), axis=(2, 3))
            reading = reader.read(torch.from_numpy(view.copy()), layers=(2,))
            maps = reader.final_norm(reading.patches()).detach().numpy().reshape(2, 4, 6, 16)
            maps = np.roll(maps, (-shift, -shift), axis=(1, 2))
            total += torch.from_numpy((maps[:, :, ::-1] if flipped else maps).copy()) / 4
    torch.testing.assert_close(found.patches().unflatten(1, (4, 6)), total, atol=1e-5, rtol=0)
    mirrored = read_views(reader, pixels.flip(-1), (2,), views=4).patches().unflatten(1, (4, 6))
    torch.testing.assert_close(mirrored, total.flip(2), atol=1e-5, rtol=0)
    assert (read_views(reader, pixels, (2,)).patches() - found.patches()).abs().max() > 1e-3


def test_patch_maps_read_larger_images_and_pool_to_the_grid():
    reader, images = reader_of(), [noise(i) for i in range(3)]
    np.testing.assert_array_equal(patch_maps(reader, images), reader.patch_maps(images))
    large = patch_maps(reader, images, layer=2, image_size=64, batch_size=2)
    pooled = patch_maps(reader, images, layer=2, image_size=64, pool_to_grid=True)
    assert large.shape == (3, 8, 8, 16)
    np.testing.assert_allclose(pooled, large.reshape(3, 4, 2, 4, 2, 16).mean((2, 4)), atol=1e-5)
    settings = FeatureSettings(2, 1, 64, True)
    np.testing.assert_array_equal(patch_maps(reader, images, settings=settings), pooled)


def test_a_file_gives_the_same_features_in_every_use(tmp_path):
    reader, images = reader_of(), [noise(i) for i in range(3)]
    settings = FeatureSettings(2, 4, 64, True, model_sizes(reader))
    settings.save(tmp_path / "dense_settings.json")
    assert FeatureSettings.load(tmp_path / "dense_settings.json") == settings
    maps = patch_maps(reader, images, settings=tmp_path / "dense_settings.json")
    extract_to_folder(reader, images, tmp_path / "out", settings=ExtractionSettings(dense=settings), progress=False)
    (shard,) = iterate_shards(tmp_path / "out")
    assert isinstance(shard, TokenFeatures)
    np.testing.assert_allclose(shard.patches.unflatten(1, shard.grid), maps, atol=1e-5)
    plain = extract_features(reader, images, layer=2)
    assert plain.grid == shard.grid == (4, 4)
    with pytest.raises(ValueError, match="another extraction"):
        extract_to_folder(reader, images, tmp_path / "out", progress=False)


def test_dense_features_take_views_and_pooling():
    reader, images = reader_of(), [noise(0, (48, 32))]
    options = {"layers": (2,), "image_size": 64, "views": 4}
    large = read_dense_features(reader, images, flip=True, **options)
    pooled = read_dense_features(reader, images, flip=False, pool_to_grid=True, **options)
    assert large.maps[0].shape == (8, 12, 16)
    assert pooled.input_size(0) == (32, 48)
    expected = functional.avg_pool2d(large.maps[0].permute(2, 0, 1), 2).permute(1, 2, 0)
    torch.testing.assert_close(pooled.maps[0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(large.flipped.maps[0], large.maps[0].flip(1), atol=1e-5, rtol=0)
    assert pooled.transform.endswith("4 views averaged, pooled to the grid of the model's image size")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer": 9}, "Block 9 does not exist"),
        ({"layer": "nine"}, "layer='nine' is not a whole number"),
        ({"views": 2}, "views=2 must be 1 or 4"),
        ({"image_size": 60}, "image_size=60 is not a multiple of the patch size 8. Use 64"),
        ({"image_size": 0}, "image_size=0 must be a positive number"),
        ({"pool_to_grid": "yes"}, "pool_to_grid='yes' must be true or false"),
        ({"model": {"family": "clip"}}, "chosen for a model with"),
    ],
)
def test_values_that_do_not_fit_are_errors(values, message):
    with pytest.raises(ValueError, match=message):
        FeatureSettings(**values).for_reader(reader_of())


def test_files_models_and_combinations_that_do_not_fit_are_errors(tmp_path):
    reader, path = reader_of(), tmp_path / "settings.json"
    path.write_text(json.dumps({"layer": 1, "block": 2}))
    with pytest.raises(ValueError, match="not a file of feature settings: unknown block"):
        settings_for(path, reader)
    with pytest.raises(ValueError, match="settings and layer are given"):
        patch_maps(reader, noise(0), layer=1, settings=FeatureSettings())
    other = reader_of(hidden_size=32)
    with pytest.raises(ValueError, match="Run regvit dense for this model"):
        settings_for(FeatureSettings(model=model_sizes(reader)), other)
    with pytest.raises(ValueError, match="views=4 needs image sides that are multiples"):
        read_views(open_model(tiny_timm(img_size=32, patch_size=8)), normal(1, 3, 36, 32), (-1,), views=4)
    fixed = tiny_timm(img_size=32, patch_size=8, dynamic_img_size=False)
    with pytest.raises(ValueError, match="reads only"):
        settings_for(FeatureSettings(image_size=64), TokenReader(fixed))


def test_cell_targets_are_shares_of_valid_pixels():
    mask = np.full((8, 8), 255, np.uint8)
    mask[:4, :4], mask[0, 0], mask[4:, 4:6] = 1, 0, 0
    shares, weights = _cell_targets(mask, 2, (2, 2), is_mask=True)
    np.testing.assert_allclose(weights, [1, 0, 0, 0.5])
    np.testing.assert_allclose(shares, [[1 / 16, 15 / 16], [0, 0], [0, 0], [1, 0]], atol=1e-9)
    meters, weights = _cell_targets(np.array([[2.0, 0.0], [4.0, np.nan]], np.float32), 1, (1, 1), is_mask=False)
    np.testing.assert_allclose([meters.item(), weights.item()], [3, 0.5])


def test_the_ridge_is_that_of_scikit_learn():
    from sklearn.linear_model import Ridge

    x, y, w = normal(60, 5).double() + 2, normal(60, 3, seed=1).double(), normal(60, seed=2).double().abs()
    inputs = torch.cat([x, torch.ones(60, 1)], dim=1)
    weight, bias = _ridge((inputs * w[:, None]).T @ torch.cat([inputs, y], dim=1))
    centered = x - (w[:, None] * x).sum(0) / w.sum()
    penalty = 1e-3 * (w[:, None] * centered**2).sum().item() / 5
    model = Ridge(alpha=penalty).fit(x.numpy(), y.numpy(), sample_weight=w.numpy())
    np.testing.assert_allclose(weight.T, model.coef_, atol=1e-8)
    np.testing.assert_allclose(bias, model.intercept_, atol=1e-8)


@pytest.mark.parametrize("kind", ["masks", "depth"])
def test_a_choice_is_made_on_one_half_and_compared_on_the_other(tmp_path, kind):
    maps = TASK_MASKS if kind == "masks" else [(1000 + 500 * mask.astype(np.uint16)) for mask in TASK_MASKS]
    data = mask_folder(tmp_path, maps, kind=kind)
    source = load_masks(data) if kind == "masks" else load_depth(data)
    reader = reader_of()
    choice = choose_features(reader, source, source, views=(1, 4), image_sizes=[32, 64], pool_to_grid=True)
    assert len(choice.candidates) == 4 * 4  # three blocks and the embedding
    assert [choice.candidates[0][name] for name in ("layer", "views", "image_size")] == [3, 1, 32]
    best = max if kind == "masks" else min
    assert choice.candidates[choice.chosen]["choice"] == best(one["choice"] for one in choice.candidates)
    difference = choice.candidates[choice.chosen]["test"] - choice.candidates[0]["test"]
    assert choice.difference == pytest.approx(difference, abs=1e-9)
    assert choice.interval[0] <= choice.difference <= choice.interval[1]
    assert choice.counts == (8, 4, 4)
    assert {one["pool_to_grid"] for one in choice.candidates if one["image_size"] == 64} == {True}
    assert FeatureSettings.load(choice.save(tmp_path / "out")) == choice.settings
    assert choice.settings.for_reader(reader).layer == choice.settings.layer
    assert "default" in choice.summary()
    with pytest.raises(ValueError, match="3 test images"):
        choose_features(reader, source, source.subset(range(3)), views=(1,))


def test_the_score_of_depth_is_the_rmse_alone(tmp_path):
    """Recompute one candidate with scikit-learn; the other errors of depth grow with the quality, or have no unit."""
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    maps = [rng.integers(500, 4000, (20, 24)).astype(np.uint16) for _ in range(8)]
    source, reader = load_depth(mask_folder(tmp_path, maps, kind="depth")), reader_of()
    choice = choose_features(reader, source, source, layers=(2,), views=(1,), image_sizes=[32])
    features = read_dense_features(reader, source, layers=(2,), flip=False)
    cells = [
        _cell_targets(depth, 1, one.shape[:2], is_mask=False) for one, depth in zip(features.maps, source.targets)
    ]
    inputs = torch.cat([one.flatten(0, 1) for one in features.maps]).double().numpy()
    means, weights = (torch.cat([pair[i] for pair in cells]).numpy() for i in (0, 1))
    centered = inputs - np.average(inputs, axis=0, weights=weights)
    variance = np.average(centered**2, axis=0, weights=weights).mean()
    probe = Ridge(alpha=1e-3 * variance * weights.sum()).fit(inputs, means[:, 0], sample_weight=weights)
    errors = []
    for one, depth in zip(features.maps, source.targets):
        low = torch.from_numpy(probe.predict(one.flatten(0, 1).double().numpy()).reshape(1, 1, *one.shape[:2])).float()
        high = functional.interpolate(low, size=depth.shape, mode="bilinear", align_corners=False)[0, 0].numpy()
        errors.append(np.sqrt(np.square(high.clip(1e-3) - depth)[depth > 0].mean()))
    order = np.random.default_rng(0).permutation(8)
    found = next(one for one in choice.candidates if one["layer"] == 2)
    assert found["choice"] == pytest.approx(np.mean(np.array(errors)[order[:4]]), rel=1e-4)
    assert found["test"] == pytest.approx(np.mean(np.array(errors)[order[4:]]), rel=1e-4)


def test_the_command_writes_settings_that_evaluate_takes(tmp_path):
    for split in ("train", "validation"):
        mask_folder(tmp_path / "data", TASK_MASKS, split=split)
    model = tiny_model(**SIZES)
    model.save_pretrained(tmp_path / "model")
    default_image_processor(32).save_pretrained(tmp_path / "model")
    common = {"model": str(tmp_path / "model"), "data": str(tmp_path / "data"), "device": "cpu"}
    outcome = run("dense", common | {"views": [1], "output_dir": str(tmp_path / "dense")})
    path = str(tmp_path / "dense" / "dense_settings.json")
    assert outcome.lines["settings"] == path
    chosen = json.loads((tmp_path / "dense" / "dense_settings.json").read_text())
    options = {"tasks": ["segmentation"], "dense_steps": 2, "dense_settings": path, "output_dir": str(tmp_path / "e")}
    run("evaluate", common | options | {"model": [common["model"]]})
    (score,) = json.loads((tmp_path / "e" / "report.json").read_text())["reports"][0]["scores"]
    assert score["settings"]["layer"] == str(chosen["layer"])
    with pytest.raises(ValueError, match="num_dense_blocks must be 1"):
        run("evaluate", common | options | {"model": [common["model"]], "num_dense_blocks": 4})
    with pytest.raises(ValueError, match="Unknown task 'boxes'"):
        run("dense", common | {"task": "boxes"})
