"""Linear probes on single tokens: slow twins of the scores, planted tokens, and invalid input."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from hf_regvit import RegViTConfig, RegViTModel
from hf_regvit.data.source import ImageSource
from hf_regvit.diagnosis import token_probes as probes
from hf_regvit.diagnosis.token_probes import pixel_scores, position_scores, token_probes
from hf_regvit.models.processing import EvaluationTransform, default_image_processor
from hf_regvit.models.tokens import TokenReader


def test_position_scores_equal_their_slow_twin():
    generator = torch.Generator().manual_seed(0)
    predicted, true = (torch.randint(0, 15, (40,), generator=generator) for _ in range(2))
    predicted[:10] = true[:10]
    distances = [
        math.hypot(p // 5 - t // 5, p % 5 - t % 5) for p, t in zip(predicted.tolist(), true.tolist(), strict=True)
    ]
    scores = position_scores(predicted, true, (3, 5))
    assert scores["top1"] == pytest.approx(sum(d == 0 for d in distances) / 40)
    assert scores["distance"] == pytest.approx(sum(distances) / 40, rel=1e-6)
    counts = [true.tolist().count(cell) for cell in range(15)]
    assert scores["prior_top1"] == max(counts) / 40


def test_pixel_scores_equal_their_slow_twin():
    generator = torch.Generator().manual_seed(0)
    true = torch.rand(20, 12, generator=generator)
    predicted = true + 0.1 * torch.randn(20, 12, generator=generator)
    mean = [sum(row[i] for row in true.tolist()) / 20 for i in range(12)]
    errors = [math.dist(p, t) for p, t in zip(predicted.tolist(), true.tolist(), strict=True)]
    spread = [math.dist(t, mean) for t in true.tolist()]
    scores = pixel_scores(predicted, true)
    assert scores["l2"] == pytest.approx(sum(errors) / 20, rel=1e-5)
    assert scores["spread"] == pytest.approx(sum(spread) / 20, rel=1e-5)
    assert scores["r2"] == pytest.approx(1 - sum(e * e for e in errors) / sum(s * s for s in spread), rel=1e-4)
    assert pixel_scores(true.mean(0).expand(20, 12), true)["r2"] == pytest.approx(0, abs=1e-6)


SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


def toy_model(registers=1):
    """Create a model whose patches keep pixels and position, with CLS and registers of the image and two outliers."""
    torch.manual_seed(0)
    model = RegViTModel(RegViTConfig(num_register_tokens=registers, **SIZES)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:
                parameter.fill_(0.3)
            elif "position" in name or "projection.weight" in name or parameter.ndim == 2:
                parameter.mul_(50 if "position" in name else 10)

    def plant(module, args, output):  # replaces these patches with the same vector in every image
        tokens = output[0].clone()
        direction = torch.linspace(-1, 1, 48)
        for cell in (0, 5):
            # ... except for a small component that depends on the whole image
            tokens[:, 1 + registers + cell] = 300 * direction + 30 * tokens[:, 1 + registers :].mean(dim=1)
        return (tokens, *output[1:])

    model.layers[1].register_forward_hook(plant)
    return model


@pytest.fixture(scope="module")
def coloured_images():
    """Create two classes that differ in their mean color; every patch has its own texture."""
    generator = np.random.default_rng(0)
    images, labels = [], []
    for i in range(60):
        noise = generator.integers(0, 120, (8, 8, 3)).repeat(4, axis=0).repeat(4, axis=1)
        noise[..., i % 2] += 100
        images.append(Image.fromarray(noise.astype(np.uint8)))
        labels.append(i % 2)
    return ImageSource("toy", [str(i) for i in range(60)], images.__getitem__, labels, ("red", "green"))


PROBE = {"cutoff": 150.0, "processor": default_image_processor(32, resize=32)}


@pytest.fixture(scope="module")
def toy_probes(coloured_images):
    return token_probes(toy_model(), coloured_images, **PROBE)


def test_probes_see_what_was_planted(toy_probes):
    """Check that normal patches predict position and pixels; outliers, CLS and registers predict the class."""
    report = toy_probes
    assert report.position["normal"]["top1"]["mean"] > 0.9
    assert report.position["normal"]["num_test"] == 18 * 14
    assert report.position["outlier"]["num_test"] == 18 * 2
    assert report.position["outlier"]["top1"]["mean"] < 0.6
    assert report.position["outlier"]["prior_top1"]["mean"] == 0.5
    assert report.pixels["normal"]["l2"]["mean"] < 0.8 * report.pixels["outlier"]["l2"]["mean"]
    assert report.pixels["normal"]["r2"]["mean"] > report.pixels["outlier"]["r2"]["mean"] + 0.2
    assert set(report.image_class) == {"cls", "register", "normal", "outlier"}
    assert report.image_class["outlier"]["top1"]["mean"] > 0.9
    assert report.image_class["cls"]["top1"] == {"mean": report.image_class["cls"]["top1"]["mean"], "std": 0.0}
    assert (report.image_class["outlier"]["num_train"], report.image_class["outlier"]["num_test"]) == (42, 18)
    assert report.pixels["normal"]["l2"]["std"] > 0  # seeds draw other training patches
    assert report.notes == []
    assert report.settings["chance"]["position_top1"] == 1 / 16


def test_probe_tables_are_plain_values(toy_probes):
    assert json.loads(json.dumps(toy_probes.to_dict())) == toy_probes.to_dict()


def test_probes_repeat_themselves_and_follow_the_seed(coloured_images, toy_probes):
    assert token_probes(toy_model(), coloured_images, **PROBE).to_dict() == toy_probes.to_dict()
    other = token_probes(toy_model(), coloured_images, seed=5, num_seeds=1, **PROBE)
    assert other.pixels["normal"]["l2"]["mean"] != toy_probes.pixels["normal"]["l2"]["mean"]
    assert other.pixels["normal"]["l2"]["std"] == 0


def test_images_are_never_on_both_sides(coloured_images):
    chosen = probes._draw_test_images(torch.tensor(coloured_images.labels), 60)
    assert int(chosen.sum()) == 18
    assert coloured_images.labels.count(0) * 0.3 == sum(
        label == 0 for label, test in zip(coloured_images.labels, chosen.tolist(), strict=True) if test
    )
    given = token_probes(
        toy_model(),
        coloured_images.subset(range(40)),
        test_images=coloured_images.subset(range(40, 60)),
        num_seeds=1,
        **PROBE,
    )
    assert (given.settings["train_images"], given.settings["test_images"]) == (40, 20)


def test_pixels_of_a_patch_are_those_the_model_saw(coloured_images):
    model = toy_model()
    reader = TokenReader(model, PROBE["processor"])
    batch = torch.stack([reader.transform(coloured_images[i].image) for i in range(2)])
    cells = probes._Sampler(reader, 150.0, (-1, -1), 1, 0).pixels(batch, (4, 4))
    plain = np.asarray(coloured_images[1].image, dtype=np.float32) / 255
    expected = torch.from_numpy(plain[8:16, 24:32]).permute(2, 0, 1).reshape(-1)  # row 1, column 3
    torch.testing.assert_close(cells[1, 7], expected, atol=1e-5, rtol=0)


def test_a_few_patches_stand_for_an_image_and_outliers_are_added(coloured_images):
    model = toy_model()
    reader = TokenReader(model, PROBE["processor"])
    batch = torch.stack([reader.transform(coloured_images[i].image) for i in range(20)])
    read = probes._Sampler(reader, 150.0, (-1, -1), 1, 0).read_batch(batch, 100, 10).rows
    assert torch.equal(torch.bincount(read["image"][read["uniform"]])[100:], torch.full((20,), 10))
    assert torch.equal(torch.bincount(read["image"][read["outlier"]])[100:], torch.full((20,), 2))
    assert (read["uniform"] | read["outlier"]).all()
    drawn = torch.bincount(read["cells"][read["uniform"]], minlength=16)
    assert 4 < drawn.min() <= drawn.max() < 20  # of 20 images; the expected number is 12.5 for every cell
    report = token_probes(model, coloured_images, max_tokens=600, num_seeds=1, **PROBE)  # 10 of 16 patches each
    added = sum((read["outlier"] & ~read["uniform"]).tolist())
    assert added > 0
    assert report.position["outlier"]["num_test"] == 18 * 2
    assert 18 * 8 <= report.position["normal"]["num_test"] <= 18 * 10  # only drawn patches, without the outliers
    assert report.position["normal"]["num_test"] < 18 * 14


def test_every_seed_has_its_own_token_of_an_image():
    labels = torch.arange(40) % 2
    generator = torch.Generator().manual_seed(0)
    clear = torch.eye(4)[labels] + 0.01 * torch.randn(40, 4, generator=generator)
    single = torch.stack([clear, torch.randn(40, 4, generator=generator)])  # the second draw is uninformative

    def sample(rows):
        present = {"cls": torch.ones(20, dtype=torch.bool)}
        return probes._Sample({}, {"cls": single[:, rows]}, present, labels[rows], (1, 1))

    found = probes._class_probes(sample(slice(0, 20)), sample(slice(20, 40)), 2, [])["cls"]["top1"]
    assert 0.55 < found["mean"] < 0.95
    assert found["std"] == pytest.approx((1 - (2 * found["mean"] - 1)) / math.sqrt(2))  # two runs, so n - 1 is 1
    single[1] = clear.roll(1, dims=1)  # as informative as the first, but in other channels; scored with its own fit
    found = probes._class_probes(sample(slice(0, 20)), sample(slice(20, 40)), 2, [])["cls"]["top1"]
    assert found == {"mean": 1.0, "std": 0.0}


def test_probes_without_outliers_labels_or_registers(coloured_images):
    images = [coloured_images[i].image for i in range(60)]
    report = token_probes(toy_model(0), images, cutoff=1e6, processor=PROBE["processor"], num_seeds=1)
    assert set(report.position) == set(report.pixels) == {"normal"}
    assert report.image_class == {}
    assert "No patch of the test images is above the cutoff 1e+06" in report.notes[0]
    assert "no labels" in report.notes[1]
    labelled = token_probes(toy_model(0), coloured_images, cutoff=1e6, processor=PROBE["processor"], num_seeds=1)
    assert set(labelled.image_class) == {"cls", "normal"}
    assert "skipped for tokens of kind 'outlier'" in labelled.notes[1]


def test_test_images_are_drawn_by_class_where_a_class_has_three():
    assert probes._draw_test_images(torch.tensor([0, 0, 0, 1, 1]), 5).tolist() == [False, False, True, False, False]
    assert probes._draw_test_images(torch.arange(6), 6).tolist() == [False, False, True, False, False, True]


def test_probes_want_one_grid(coloured_images):
    model = toy_model()
    whole = EvaluationTransform.for_model(model, PROBE["processor"], keep_aspect=True)
    images = [coloured_images[i].image.resize((32 + 8 * (i % 2), 32)) for i in range(8)]
    with pytest.raises(ValueError, match="has 4 x 5 patches, but the images before it have 4 x 4"):
        token_probes(model, images, cutoff=150.0, processor=whole)
