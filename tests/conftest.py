"""Puts `tests/` on the path, keeps every test offline and quiet."""

import functools
import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
# The Arrow copies of `datasets` go into a folder of the test run, not into the user's home.
_ARROW = tempfile.TemporaryDirectory(prefix="regvit-arrow-")
os.environ["HF_DATASETS_CACHE"] = _ARROW.name
# Waiting for the disk shows nothing: only a machine that loses its power would notice. Processes of tests do wait.
os.fsync = lambda descriptor: None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--max-error-share", type=float, metavar="SHARE",
        help="print the comparisons whose error is above this share of their tolerance, and fail if there are any",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """In CI a missing folder of golden files is an error: parametrised over nothing, those tests would just vanish."""
    from helpers import shared_dir

    if (limit := config.getoption("--max-error-share")) is not None:
        from tolerances import ToleranceRecorder

        config.pluginmanager.register(ToleranceRecorder(config, limit))

    if os.environ.get("CI") and not os.environ.get("REGVIT_WITHOUT_SHARED") and shared_dir() is None:
        pytest.exit("../shared is missing. Set REGVIT_WITHOUT_SHARED=1 where that is meant.", returncode=4)


# Folders with the files that take longest, and `tests/` itself, come first, so that two test processes end at about
# the same time. The browser comes last: a loader worker that is forked while it runs would keep it from ending.
PLACES = {"attacks": 0, "distributed": 0, "integration": 0, "parity": 0, "tests": 0, "browser": 2}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the tests of whole runs and end with those in the browser; the order of the others stays."""
    items.sort(key=lambda item: PLACES.get(item.path.parent.name, 1))


# Folders of the unit tests, one a room of the package, and the tests of whole runs.
ROOMS = {
    "models", "data", "evaluation", "diagnosis", "figures", "hub", "training", "pretraining", "finetuning", "app",
    "integration",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def few_objects(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keep what earlier files imported or cached from slowing down the tests of this one.

    Trainer collects garbage after every run, which takes as long as there are objects: in the last files it took
    longer than the runs.
    """
    gc.collect()
    gc.freeze()  # no later collection looks at these objects
    yield
    for cached in vars(request.module).values():
        if isinstance(cached, functools._lru_cache_wrapper):
            cached.cache_clear()


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run tests in one thread: two threads only wait for each other on tensors as small as these."""
    threads = torch.get_num_threads()
    if request.path.parent.name in ROOMS:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Fake Hub that huggingface_hub uses in this process, with retries that take no time."""
    import hf_regvit.hub.publish  # noqa: F401  (before the class is replaced, because its annotations name it)
    from fake_hub import FakeHub, connect
    from hf_regvit.hub import upload

    quick = upload.RetryPolicy(attempts=3, first_wait=0.01, longest_wait=1.0, timeout=5.0)
    with FakeHub() as hub:
        connect(monkeypatch, hub)
        monkeypatch.setattr(upload, "RetryPolicy", lambda: quick)
        yield hub


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Draw no figures of a run, except in `TESTS_OF_FIGURES`: they can take ten times as long as the run."""
    import hf_regvit.finetuning.run as finetuning
    import hf_regvit.pretraining.run as pretraining
    from hf_regvit.finetuning.classification import ImageClassification
    from hf_regvit.finetuning.dense import DepthEstimation, SemanticSegmentation

    if request.node.name not in getattr(request.module, "TESTS_OF_FIGURES", ()):
        monkeypatch.setattr(pretraining, "draw_curves", lambda folder, num_prototypes: None)
        monkeypatch.setattr(finetuning, "draw_finetuning_curves", lambda folder, shown: None)
        for task in (ImageClassification, SemanticSegmentation, DepthEstimation):
            monkeypatch.setattr(task, "write_panels", lambda self, folder, model, processor: {})


@pytest.fixture(scope="session")
def tiles() -> Any:
    """Tiles of the built-in photographs, a source of images."""
    from hf_regvit.data.loading import load_images

    return load_images("builtin:photos")
