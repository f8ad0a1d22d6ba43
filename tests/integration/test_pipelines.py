"""The stock pipelines of transformers on RegViT checkpoints, with the package imported."""

import numpy as np
import pytest
import torch
from transformers import BitImageProcessor, DPTImageProcessor, pipeline

from builders import noise, save_model, tiny_model
from hf_regvit import (
    RegViTForDepthEstimation,
    RegViTForImageClassification,
    RegViTForSemanticSegmentation,
    RegViTModel,
)

GRID, REGISTERS, WIDTH = (4, 5), 3, 32
STATISTICS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


# The default layerscale_value would leave CLS of an untrained model nearly the same for every image.
FIELDS = {"hidden_size": WIDTH, "num_register_tokens": REGISTERS, "num_labels": 5, "layerscale_value": 1.0}


PROCESSOR = BitImageProcessor(
    size={"shortest_edge": 40}, crop_size={"height": 8 * GRID[0], "width": 8 * GRID[1]}, **STATISTICS
)


@pytest.fixture(scope="module")
def classifier() -> RegViTForImageClassification:
    fields = {**FIELDS, "id2label": {i: f"kind {i}" for i in range(5)}}
    model = tiny_model(RegViTForImageClassification, **fields)
    with torch.no_grad():
        model.classifier.weight.mul_(50)  # probabilities that differ
    return model


@pytest.fixture(scope="module")
def folder(classifier, tmp_path_factory) -> str:
    return str(save_model(classifier, tmp_path_factory.mktemp("classifier"), PROCESSOR))


def test_features_are_the_last_hidden_state(classifier, folder):
    # From the folder of a classifier: the pipeline takes the backbone out of it.
    image = noise(0, (64, 50))
    features = pipeline("image-feature-extraction", model=folder)
    assert type(features.model) is RegViTModel
    with torch.inference_mode():
        expected = classifier.regvit(**PROCESSOR(image, return_tensors="pt"))
    found = features(image, return_tensors=True)
    assert found.shape == (1, 1 + REGISTERS + GRID[0] * GRID[1], WIDTH)
    torch.testing.assert_close(found, expected.last_hidden_state, atol=1e-6, rtol=1e-5)
    assert features(image) == found.tolist()


def test_pooled_feature_is_the_pooler_output(classifier, folder):
    image = noise(0, (64, 50))
    found = pipeline("image-feature-extraction", model=folder, pool=True)(image, return_tensors=True)
    with torch.inference_mode():
        expected = classifier.regvit(**PROCESSOR(image, return_tensors="pt")).pooler_output
    assert found.shape == (1, WIDTH)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_features_without_registers():
    torch.manual_seed(0)
    model = tiny_model(**FIELDS, discard_registers=True)
    found = pipeline("image-feature-extraction", model=model, image_processor=PROCESSOR)(
        noise(0, (64, 50)), return_tensors=True
    )
    assert found.shape == (1, 1 + GRID[0] * GRID[1], WIDTH)


def test_classes_are_the_softmax_of_the_logits(classifier, folder):
    image = noise(0, (64, 50))
    found = pipeline("image-classification", model=folder)(image, top_k=5)
    with torch.inference_mode():
        probabilities = classifier(**PROCESSOR(image, return_tensors="pt")).logits[0].softmax(0)
    scores = {entry["label"]: entry["score"] for entry in found}
    assert scores == {f"kind {i}": pytest.approx(probabilities[i].item(), abs=1e-6) for i in range(5)}
    assert [entry["score"] for entry in found] == sorted(scores.values(), reverse=True)
    assert probabilities.max() > 2 * probabilities.min()  # or the order would mean nothing


def test_several_labels_get_a_sigmoid():
    torch.manual_seed(0)
    model = tiny_model(RegViTForImageClassification, **FIELDS, problem_type="multi_label_classification")
    image = noise(0, (64, 50))
    found = pipeline("image-classification", model=model, image_processor=PROCESSOR)(image, top_k=5)
    with torch.inference_mode():
        expected = model(**PROCESSOR(image, return_tensors="pt")).logits[0].sigmoid()
    assert sorted(entry["score"] for entry in found) == pytest.approx(sorted(expected.tolist()), abs=1e-6)


def test_images_of_all_kinds_in_batches(folder, tmp_path):
    noise(1, (70, 40)).save(tmp_path / "image.png")
    images = [
        noise(0, (64, 50)),
        str(tmp_path / "image.png"),
        noise(2, (50, 50)).convert("L"),
        noise(3, (45, 60)).convert("RGBA"),
    ]
    features = pipeline("image-feature-extraction", model=folder, pool=True)
    classes = pipeline("image-classification", model=folder, top_k=5)
    alone = [(np.array(features(image)), classes(image)) for image in images]
    for i, (pooled, kinds) in enumerate(zip(features(images, batch_size=3), classes(images, batch_size=3))):
        np.testing.assert_allclose(np.array(pooled), alone[i][0], atol=1e-5)
        assert [k["label"] for k in kinds] == [k["label"] for k in alone[i][1]]
        assert [k["score"] for k in kinds] == pytest.approx([k["score"] for k in alone[i][1]], abs=1e-5)
    assert not np.allclose(alone[0][0], alone[1][0], atol=1e-3)


def test_depth_pipeline():
    # The stock processor of our checkpoints has no post-processing for depth; DPT's has.
    torch.manual_seed(0)
    model = tiny_model(RegViTForDepthEstimation, **FIELDS, num_depth_bins=16, min_depth=1, max_depth=9)
    processor = DPTImageProcessor(size={"height": 32, "width": 40}, do_pad=False, **STATISTICS)
    image = noise(0, (64, 50))
    found = pipeline("depth-estimation", model=model, image_processor=processor)(image)
    assert found["depth"].size == image.size
    assert found["predicted_depth"].shape == (50, 64)
    assert 1 <= found["predicted_depth"].min() < found["predicted_depth"].max() <= 9


def test_segmentation_pipeline():
    torch.manual_seed(0)
    model = tiny_model(RegViTForSemanticSegmentation, **FIELDS)
    processor = DPTImageProcessor(size={"height": 32, "width": 40}, do_pad=False, **STATISTICS)
    image = noise(0, (64, 50))
    found = pipeline("image-segmentation", model=model, image_processor=processor)(image, subtask="semantic")
    masks = np.stack([np.array(entry["mask"]) for entry in found])
    assert masks.shape == (len(found), 50, 64)
    assert {entry["label"] for entry in found} <= set(model.config.id2label.values())
    assert ((masks == 255).sum(0) == 1).all()  # every pixel belongs to one class
