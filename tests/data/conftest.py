"""Fixtures of the tests of data."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def arrow_cache(tmp_path_factory):
    """Store the Arrow copies of `datasets` in a folder of the test run, not in the user's home."""
    import datasets

    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("arrow")
    yield
    datasets.config.HF_DATASETS_CACHE = before
