"""Load a bundle in a clean process without hf_regvit and compare its outputs with the original's."""

import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ..models.configuration_regvit import CheckpointError
from ..models.foreign_weights import quiet_transformers
from ..models.loading import checkpoint_folder
from ..models.saving import explain_full_disk, keeping, read_json, write_json
from .bundle import read_bundle
from .clean_process import __file__ as clean_process
from .clean_process import outputs_of
from .facts import TASKS

_BYTES = 2**22  # of images, code and outputs, for models of up to 100 million parameters
_NOTE = "The check of a bundle writes to the temporary folder, which TMPDIR chooses. The bundle is whole."
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
        CheckpointError: The bundle cannot be loaded in the clean process, or its outputs differ; see `read_bundle`.
    """
    made = read_bundle(bundle_folder)
    source = made.folder if original is None else checkpoint_folder(original)
    task = TASKS[made.model_class]
    pipelines, not_run = _pipelines_of(task.pipeline_tag, source)
    questions = {"auto_classes": sorted({"AutoModel", task.auto_class}), "pipelines": pipelines}
    place = tempfile.TemporaryDirectory()
    with place, keeping(lambda: _NOTE), explain_full_disk(Path(place.name), Path(place.name), needed=_BYTES):
        folder = Path(place.name)
        images = {"0.png": _test_image(0, (240, 320)), "1.png": _test_image(1, (300, 225))}
        for name, image in images.items():
            image.save(folder / name)
        write_json(folder / "questions.json", {"images": list(images), **questions})
        _run_clean_process(made.folder.resolve(), folder, timeout=timeout)
        tensors = load_file(folder / "answers.safetensors")
        labels, loaded = read_json(folder / "answers.json")
    for name, found in loaded.items():
        if not found.startswith("transformers_modules."):
            raise CheckpointError(f"{name} loaded {found} instead of a class from the code files of the bundle.")
    with quiet_transformers(logging.CRITICAL):  # pipelines log an error for model types of other packages
        expected, expected_labels, _ = outputs_of(str(source), list(images.values()), **questions, trusted=False)
    compared = _compare(tensors, expected) | _compare_labels(labels, expected_labels)
    return Verification(compared, loaded, not_run)


_NEEDED = {
    "image-segmentation": "post_process_semantic_segmentation", "depth-estimation": "post_process_depth_estimation"
}  # fmt: skip


def _pipelines_of(task: str, source: Path) -> tuple[list[str], dict[str, str]]:
    """Return the pipelines to run, and the reason for one that is not run."""
    from transformers import AutoImageProcessor

    pipelines = list(dict.fromkeys(["image-feature-extraction", task]))
    processor = AutoImageProcessor.from_pretrained(source)
    if task in _NEEDED and not hasattr(processor, _NEEDED[task]):
        return pipelines[:1], {task: f"the processor {type(processor).__name__} has no {_NEEDED[task]}"}
    return pipelines, {}


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
        raise CheckpointError(
            f"Loading '{bundle_folder}' in a clean process took more than {timeout:.0f} s."
        ) from error
    if full := re.search(r"(?:Errno|os error) (27|28|122)\b", done.stderr):  # the numbers of a full disk
        raise OSError(int(full[1]), os.strerror(int(full[1])))
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise CheckpointError(f"'{bundle_folder}' cannot be loaded without hf_regvit:\n{last}")


def _compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    shapes, needed = ({name: tuple(t.shape) for name, t in side.items()} for side in (found, expected))
    if shapes != needed:
        raise CheckpointError(f"The bundle returns tensors of the shapes {shapes}, the original {needed}.")
    differences = {}
    for name, value in expected.items():
        difference = (found[name].float() - value.float()).abs()
        differences[name] = float(difference.max()) if difference.numel() else 0.0  # a model without registers
        if not bool((difference <= TOLERANCE * (1 + value.float().abs())).all()):
            raise CheckpointError(
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
            raise CheckpointError(f"{name}: the pipeline returns {other}, that of the original {pairs}.")
        differences[name] = off
    return differences
