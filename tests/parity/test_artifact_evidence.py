"""Real weights that show the phenomenon: a ViT-Tiny whose corner patches turn into outliers in block 8.

What the data sheet of the weights says by hand has to come out of the diagnosis, told nothing. Smaller samples than in
`benchmarks/artifact_evidence.py`, which prints the published numbers.
"""

import numpy as np
import pytest
import torch

from helpers import requires_shared, shared_dir
from hf_regvit.data.loading import load_images
from hf_regvit.diagnosis.diagnose import diagnose
from hf_regvit.diagnosis.token_probes import token_probes
from hf_regvit.models.loading import open_model

pytestmark = [pytest.mark.slow, requires_shared]


@pytest.fixture(scope="module")
def vit_tiny():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    reader = open_model(shared_dir() / "data" / "vit_tiny_patch16_224", device="cpu")
    yield reader.model, reader.processor
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def halves(vit_tiny):
    model, processor = vit_tiny
    samples = load_images(shared_dir() / "data" / "imagenet_samples", split=None)
    parts = [samples.subset(range(start, 240, 2)) for start in (0, 1)]
    return [diagnose(model, part, processor=processor, detail_images=32, progress=False) for part in parts]


def test_the_outliers_are_found_in_both_halves(halves):
    for report in halves:
        assert report.bimodal
        assert 60 < report.cutoff < 250
        assert 0.015 < report.outlier_share < 0.025
        assert (report.layer, report.emergence_layer) == (8, 8)
        assert report.num_images == 120
    first, second = halves
    assert first.cutoff == pytest.approx(second.cutoff, rel=0.1)
    assert first.norm_ratio == pytest.approx(second.norm_ratio, rel=0.1)


def test_early_layers_are_clean(halves):
    for report in halves:
        assert [record["layer"] for record in report.layers if record["bimodal"]] == [8, 9, 10, 11, 12]


def test_what_the_outliers_are_like(halves):
    report = halves[0]
    position = np.array(report.outliers["position_map"])
    assert sorted(zip(*np.nonzero(position > 0.8), strict=True)) == [(0, 0), (0, 13), (13, 0), (13, 13)]
    assert report.outliers["direction"]["outlier"] > 0.95
    assert report.outliers["direction"]["normal"] < 0.5
    assert report.neighbours["auroc"] > 0.55
    assert report.neighbours["median_outlier"] > report.neighbours["median_normal"]
    assert report.attention["statistics"]["mass_on_outliers"]["mean"] > 5 * report.outlier_share


def test_random_weights_of_the_same_shape_are_clean(vit_tiny):
    model, processor = vit_tiny
    torch.manual_seed(0)
    fresh = type(model)(model.config).eval()
    samples = load_images(shared_dir() / "data" / "imagenet_samples", split=None)
    report = diagnose(fresh, samples, processor=processor, max_images=60, detail_images=8, progress=False)
    assert not any(record["bimodal"] for record in report.layers)
    assert report.verdict.startswith("No distinct outliers")


def test_local_information_is_replaced_by_global(vit_tiny, halves):
    """The same tokens one block before and at the end: position and pixels are lost, the class is gained."""
    model, processor = vit_tiny
    data = shared_dir() / "data" / "caltech101"
    train, test = (load_images(data, split=split) for split in ("train", "validation"))
    before, after = (
        token_probes(
            model,
            train,
            test_images=test,
            cutoff=halves[0].cutoff,
            cutoff_layer=8,
            layer=layer,
            max_images=300,
            max_tokens=4096,
            num_seeds=2,
            processor=processor,
        )
        for layer in (7, 12)
    )
    assert after.pixels["outlier"]["l2"]["mean"] > 1.2 * after.pixels["normal"]["l2"]["mean"]
    assert after.pixels["outlier"]["r2"]["mean"] < 0.2 < after.pixels["normal"]["r2"]["mean"]
    assert after.position["outlier"]["distance"]["mean"] > after.position["normal"]["distance"]["mean"]
    assert after.image_class["outlier"]["top1"]["mean"] > after.image_class["normal"]["top1"]["mean"] + 0.2
    assert after.image_class["outlier"]["top1"]["mean"] > before.image_class["outlier"]["top1"]["mean"] + 0.2
    assert after.position["outlier"]["top1"]["mean"] < before.position["outlier"]["top1"]["mean"] - 0.05
    assert after.pixels["outlier"]["r2"]["mean"] < before.pixels["outlier"]["r2"]["mean"] - 0.2
