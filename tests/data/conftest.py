"""Fixtures of the tests of data."""

import pytest
from PIL import Image

from hf_regvit.data.builtin import builtin_images
from hf_regvit.data.decoding import say_once
from hf_regvit.data.loading import load_images
from hf_regvit.data.source import ImageSource


@pytest.fixture(scope="module", autouse=True)
def arrow_cache(tmp_path_factory):
    """Store the Arrow copies of `datasets` in a folder of the test run, not in the user's home."""
    import datasets

    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("arrow")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(autouse=True)
def say_again():
    """Log warnings that appear once per process in every test."""
    say_once.cache_clear()


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """Photograph of 120 x 80 pixels."""
    return builtin_images()["chelsea"].resize((120, 80), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def tiles() -> ImageSource:
    """The built-in tiles of photographs."""
    return load_images("builtin:photos")
