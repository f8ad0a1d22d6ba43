"""Fixtures of the tests of data."""

import pytest
from PIL import Image

from hf_regvit.data.builtin import builtin_images
from hf_regvit.data.decoding import say_once


@pytest.fixture(autouse=True)
def say_again():
    """Log warnings that appear once per process in every test."""
    say_once.cache_clear()


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """Photograph of 120 x 80 pixels."""
    return builtin_images()["chelsea"].resize((120, 80), Image.Resampling.BICUBIC)
