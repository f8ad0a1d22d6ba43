"""Puts `tests/` on the path, keeps every test offline and quiet."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")


def pytest_configure(config: pytest.Config) -> None:
    """In CI a missing folder of golden files is an error: parametrised over nothing, those tests would just vanish."""
    from helpers import shared_dir

    if os.environ.get("CI") and not os.environ.get("REGVIT_WITHOUT_SHARED") and shared_dir() is None:
        pytest.exit("../shared is missing. Set REGVIT_WITHOUT_SHARED=1 where that is meant.", returncode=4)
