"""Load a bundle in a clean process without hf_regvit and compare its outputs with the original's."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ..models.loading import BundleError, checkpoint_folder
from ..models.saving import read_json, write_json
from .bundle import read_bundle
from .clean_process import __file__ as clean_process
from .clean_process import outputs_of
from .facts import TASKS

TOLERANCE = 1e-5  # both absolute and relative


@dataclass(frozen=True)
class Verification:
    """Result of loading a bundle in a clean process and comparing it with the original.

    Attributes:
        compared: Largest difference of each compared output.
        loaded: Class that each Auto class loaded, with its module.
        not_run: Reason for each pipeline that was skipped.
    """

    compared: dict[str, float]
    loaded: dict[str, str]
    not_run: dict[str, str]

    @property
    def largest_difference(self) -> float:
        """Largest difference over all compared outputs."""
        return max(self.compared.values())


def verify(bundle_folder: str | Path, *, original: str | Path | None = None, timeout: float = 600.0) -> Verification:
    """Load a bundle in a clean process, offline and without hf_regvit, and compare it with the original.

    The clean process runs AutoModel, the Auto class of the task, AutoImageProcessor and the pipelines of transformers
    on two images. All outputs must agree to 1e-5 with those of the original in this process.

    Args:
        bundle_folder: Folder made by `bundle`.
        original: Checkpoint or run from which the bundle was made. Default: the bundle, loaded by this package.
        timeout: Time limit of the process in seconds.

    Raises:
        BundleError: The bundle cannot be loaded in the clean process, or its outputs differ. See also `read_bundle`.
    """
    made = read_bundle(bundle_folder)
    source = made.folder if original is None else checkpoint_folder(original)
    task = TASKS[made.model_class]
    pipelines, not_run = _pipelines_of(task.pipeline_tag, source)
    questions = {"auto_classes": sorted({"AutoModel", task.auto_class}), "pipelines": pipelines}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        images = [_test_image(number, shape) for number, shape in enumerate(((240, 320), (300, 225)))]
        for number, image in enumerate(images):
            image.save(folder / f"{number}.png")
        names = [f"{number}.png" for number in range(len(images))]
        write_json(folder / "questions.json", {"images": names, **questions})
        _run_clean_process(made.folder.resolve(), folder, timeout=timeout)
        tensors = load_file(folder / "answers.safetensors")
        labels, loaded = read_json(folder / "answers.json")
    for name, found in loaded.items():
        if not found.startswith("transformers_modules."):
            raise BundleError(f"{name} loaded {found} instead of a class from the code files of the bundle.")
    with _silence_transformers():
        expected, expected_labels, _ = outputs_of(str(source), images, **questions, trusted=False)
    compared = _compare(tensors, expected) | _compare_labels(labels, expected_labels)
    return Verification(compared, loaded, not_run)


def _pipelines_of(task: str, source: Path) -> tuple[list[str], dict[str, str]]:
    from transformers import AutoImageProcessor

    needed = {
        "image-segmentation": "post_process_semantic_segmentation", "depth-estimation": "post_process_depth_estimation"
    }  # fmt: skip
    pipelines, not_run = ["image-feature-extraction"], {}
    if task != "image-feature-extraction":
        processor = AutoImageProcessor.from_pretrained(source)
        if task in needed and not hasattr(processor, needed[task]):
            not_run[task] = f"the processor {type(processor).__name__} has no {needed[task]}"
        else:
            pipelines.append(task)
    return pipelines, not_run


def _test_image(seed: int, shape: tuple[int, int]) -> Image.Image:
    """Return an image with structure at several scales."""
    rng = np.random.default_rng(seed)
    layers = []
    for size in (4, 16, 64):
        noise = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        layers.append(np.asarray(noise.resize(shape[::-1]), dtype=np.float64))
    return Image.fromarray(np.mean(layers, axis=0).astype(np.uint8))


def _run_clean_process(bundle_folder: Path, folder: Path, *, timeout: float) -> None:
    # Exclude the user's settings, caches, network and token.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON", "HUGGING"))}
    environment |= {
        "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }  # fmt: skip
    command = [sys.executable, "-P", clean_process, str(bundle_folder), str(folder), str(torch.get_num_threads())]
    try:
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise BundleError(f"Loading '{bundle_folder}' in a clean process took more than {timeout:.0f} s.") from error
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise BundleError(f"'{bundle_folder}' cannot be loaded without hf_regvit:\n{last}")


@contextmanager
def _silence_transformers() -> Iterator[None]:
    """Silence the reports on weights that are not loaded on purpose and on model types unknown to transformers."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    if found.keys() != expected.keys():
        raise BundleError(f"The outputs of the bundle are {sorted(found)}, those of the original {sorted(expected)}.")
    differences = {}
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise BundleError(
                f"{name}: shape {tuple(found[name].shape)} differs from {tuple(value.shape)} of the original."
            )
        difference = (found[name].float() - value.float()).abs()
        differences[name] = float(difference.max()) if difference.numel() else 0.0  # a model without registers
        if not bool((difference <= TOLERANCE * (1 + value.float().abs())).all()):
            raise BundleError(
                f"{name}: the outputs differ by up to {differences[name]:.2g} from the original (tolerance "
                f"{TOLERANCE:g}). The bundle is not the model from which it was made."
            )
    return differences


_Labels: TypeAlias = Mapping[str, Sequence[Sequence[str | float]]]  # name of an output: (label, score) pairs


def _compare_labels(found: _Labels, expected: _Labels) -> dict[str, float]:
    """Compare the labels in their order, and their scores or pixel counts."""
    differences = {}
    for name, pairs in expected.items():
        other = found[name]
        off = max((abs(float(a[1]) - float(b[1])) for a, b in zip(pairs, other)), default=0.0)
        if [a[0] for a in pairs] != [b[0] for b in other] or off > TOLERANCE:
            raise BundleError(f"{name}: the pipeline returns {other}, that of the original {pairs}.")
        differences[name] = off
    return differences
