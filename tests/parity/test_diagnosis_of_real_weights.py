"""Diagnosis of the real ViT-Tiny of `shared/data` on 100 images: reference numbers before and after the retrofit."""

import io

import numpy as np
import pytest

from helpers import requires_shared, shared_dir
from hf_regvit import add_test_time_registers, convert, diagnose

pytestmark = [requires_shared, pytest.mark.slow]

NEURONS = [[7, 417], [6, 189]]  # those of the retrofit of this model


def first_images(count):
    """First images of the ImageNet samples."""
    import datasets
    from PIL import Image

    file = str(shared_dir() / "data" / "imagenet_samples" / "validation.parquet")
    rows = datasets.Dataset.from_parquet(file).cast_column("image", datasets.Image(decode=False)).select(range(count))
    return [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]


@pytest.fixture(scope="module")
def images():
    return first_images(100)


@pytest.fixture(scope="module")
def source():
    return convert(shared_dir() / "data" / "vit_tiny_patch16_224", verify=False)


@pytest.fixture(scope="module")
def before(source, images):
    return diagnose(source, images, progress=False)


@pytest.fixture(scope="module")
def after(source, images):
    return diagnose(add_test_time_registers(source, NEURONS, num_register_tokens=4), images, progress=False)


# Mass per head and the range of the value ratio, over the outliers before and over the registers after.
SINKS = {
    9: ([0.27, 0.35, 0.40], [0.26, 0.34, 0.39], (0.16, 0.23)),
    10: ([0.65, 0.53, 0.56], [0.64, 0.52, 0.54], (0.11, 0.14)),
    11: ([0.77, 0.81, 0.61], [0.74, 0.81, 0.61], (0.09, 0.13)),
    12: ([0.62, 0.57, 0.61], [0.61, 0.56, 0.60], (0.14, 0.16)),
}


@pytest.mark.parametrize("block", SINKS)
def test_registers_take_over_the_attention_with_the_same_values(before, after, block):
    *masses, (low, high) = SINKS[block]
    for report, name, expected in zip((before, after), ("outliers", "registers"), masses, strict=True):
        found = report.sinks["sets"][name]
        assert np.allclose(found["mass"][block - 1], expected, atol=0.03), name
        assert low - 0.03 <= min(found["ratio"][block - 1])
        assert max(found["ratio"][block - 1]) <= high + 0.03


def test_number_of_sinks_per_image(before, after):
    per_image = {name: entry["per_image"] for name, entry in before.sinks["sets"].items()}
    assert per_image["outliers"]["events"] == pytest.approx(7.8, abs=0.4)
    assert per_image["outliers"]["nop"] == pytest.approx(7.65, abs=0.4)
    assert per_image["outliers"]["routed"] == pytest.approx(3.13, abs=0.4)
    assert per_image["outliers"]["broadcast"] == 0
    assert per_image["top"]["events"] == pytest.approx(7.94, abs=0.4)
    assert per_image["column"]["events"] == 0  # the published rule sees none of them
    assert max(map(max, before.sinks["sets"]["column"]["mass"][1:])) == pytest.approx(0.22, abs=0.02)
    per_image = {name: entry["per_image"] for name, entry in after.sinks["sets"].items()}
    assert "outliers" not in per_image
    assert per_image["registers"]["events"] == pytest.approx(7.7, abs=0.4)
    assert per_image["column"]["events"] == 0
    assert {kind for row in after.sinks["sets"]["registers"]["class"][9:] for kind in row} == {"N"}
