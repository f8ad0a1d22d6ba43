"""Test weighted kNN and linear probes: slow references, chunking, planted tokens and invalid input."""

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
from hf_regvit.evaluation.knn import knn_accuracy, knn_classify
from hf_regvit.evaluation.linear import ridge_regression, softmax_regression
from hf_regvit.models.processing import EvaluationTransform, default_image_processor


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
        ({"num_classes": 2}, r"expected \[0, 2\)"),
        ({"train_labels": torch.zeros(5)}, "one per training image"),
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


# --- Probes on single tokens ---


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
    pictures, labels = [], []
    for i in range(60):
        noise = generator.integers(0, 120, (8, 8, 3)).repeat(4, axis=0).repeat(4, axis=1)
        noise[..., i % 2] += 100
        pictures.append(Image.fromarray(noise.astype(np.uint8)))
        labels.append(i % 2)
    return ImageSource("toy", [str(i) for i in range(60)], pictures.__getitem__, labels, ("red", "green"))


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
    assert len(toy_probes.table().splitlines()) == 2 + 2 + 2 + 4


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
    transform = EvaluationTransform.for_model(model, PROBE["processor"])
    reader = probes._SampleReader(model, transform, 150.0, (-1, -1), 1, 0)
    batch = torch.stack([transform(coloured_images[i].image) for i in range(2)])
    cells = reader._pixels(batch)
    plain = np.asarray(coloured_images[1].image, dtype=np.float32) / 255
    expected = torch.from_numpy(plain[8:16, 24:32]).permute(2, 0, 1).reshape(-1)  # row 1, column 3
    torch.testing.assert_close(cells[1, 7], expected, atol=1e-5, rtol=0)


def test_a_few_patches_stand_for_an_image_and_outliers_are_added(coloured_images):
    model = toy_model()
    transform = EvaluationTransform.for_model(model, PROBE["processor"])
    reader = probes._SampleReader(model, transform, 150.0, (-1, -1), 1, 0)
    batch = torch.stack([transform(coloured_images[i].image) for i in range(20)])
    read = reader._read_batch(batch, 100, 10)
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
        none = torch.zeros(0)
        present = {"cls": torch.ones(20, dtype=torch.bool)}
        return probes._Sample(none, none, none, none, none, {"cls": single[:, rows]}, present, labels[rows], (1, 1))

    found = probes._class_probes(sample(slice(0, 20)), sample(slice(20, 40)), 2, [])["cls"]["top1"]
    assert 0.55 < found["mean"] < 0.95
    assert found["std"] == pytest.approx((1 - (2 * found["mean"] - 1)) / math.sqrt(2))  # two runs, so n - 1 is 1
    single[1] = clear.roll(1, dims=1)  # as informative as the first, but in other channels; scored with its own fit
    found = probes._class_probes(sample(slice(0, 20)), sample(slice(20, 40)), 2, [])["cls"]["top1"]
    assert found == {"mean": 1.0, "std": 0.0}


def test_probes_without_outliers_labels_or_registers(coloured_images):
    pictures = [coloured_images[i].image for i in range(60)]
    report = token_probes(toy_model(0), pictures, cutoff=1e6, processor=PROBE["processor"], num_seeds=1)
    assert set(report.position) == set(report.pixels) == {"normal"}
    assert report.image_class == {}
    assert "No patch of the test images is above the cutoff 1e+06" in report.notes[0]
    assert "no labels" in report.notes[1]
    labelled = token_probes(toy_model(0), coloured_images, cutoff=1e6, processor=PROBE["processor"], num_seeds=1)
    assert set(labelled.image_class) == {"cls", "normal"}
    assert "skipped for tokens of kind 'outlier'" in labelled.notes[1]


def test_probes_want_one_grid(coloured_images):
    model = toy_model()
    whole = EvaluationTransform.for_model(model, PROBE["processor"], keep_aspect=True)
    pictures = [coloured_images[i].image.resize((32 + 8 * (i % 2), 32)) for i in range(8)]
    with pytest.raises(ValueError, match=r"grids of \[\(4, 4\), \(4, 5\)\]"):
        token_probes(model, pictures, cutoff=150.0, processor=whole)
