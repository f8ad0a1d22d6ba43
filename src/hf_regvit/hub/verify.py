"""Load a bundle in a clean process without hf_regvit and compare its outputs with the original's."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.loading import BundleError, checkpoint_folder
from .bundle import read_bundle
from .facts import TASKS

CLEAN_PROCESS = Path(__file__).parent / "templates" / "clean_process.py"
TOLERANCE = 1e-5  # both absolute and relative


# ---- Verify ------------------------------------------------------------------------------------------------------


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
    task, auto_class, _ = TASKS[made.model_class]
    pipelines, not_run = _pipelines_of(task, source)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pictures = _pictures(folder)
        questions = {
            "images": list(pictures), "auto_classes": sorted({"AutoModel", auto_class}), "pipelines": pipelines
        }  # fmt: skip
        (folder / "questions.json").write_text(json.dumps(questions))
        answers, facts = _run_clean_process(made.folder.resolve(), folder, timeout=timeout)
        expected, words = _expected(source, list(pictures.values()), questions)
    strangers = {name: ".".join(found) for name, found in facts["classes"].items()}
    for name, found in strangers.items():
        if not found.startswith("transformers_modules."):
            raise BundleError(f"{name} loaded {found} instead of a class from the code files of the bundle.")
    compared = _compare(answers, expected, "")
    compared |= _compare_labels(facts["pipelines"], words)
    return Verification(compared, strangers, not_run)


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


def _pictures(folder: Path) -> dict[str, Any]:
    """Save and return two images of different shapes with structure at several scales."""
    from PIL import Image

    pictures = {}
    for number, (rows, columns) in enumerate(((240, 320), (300, 225))):
        rng = np.random.default_rng(number)
        layers = [
            np.asarray(
                Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).resize((columns, rows)),
                dtype=np.float64,
            )
            for size in (4, 16, 64)
        ]
        picture = Image.fromarray(np.mean(layers, axis=0).astype(np.uint8))
        picture.save(folder / f"{number}.png")
        pictures[f"{number}.png"] = picture
    return pictures


def _run_clean_process(
    bundle_folder: Path, folder: Path, *, timeout: float
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors.torch import load_file

    # Exclude the user's settings, caches, network and token.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON", "HUGGING"))}
    environment |= {
        "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }  # fmt: skip
    command = [sys.executable, "-P", str(CLEAN_PROCESS), str(bundle_folder), str(folder), str(torch.get_num_threads())]
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
    return load_file(folder / "answers.safetensors"), json.loads((folder / "answers.json").read_text())


def _expected(
    source: Path, images: Sequence[Any], questions: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the outputs of the original in this process, under the names that the clean process uses."""
    import transformers

    tensors: dict[str, Tensor] = {}
    words: dict[str, Any] = {}
    processor = transformers.AutoImageProcessor.from_pretrained(source)
    for auto_class in questions["auto_classes"]:
        with _silence_transformers():  # AutoModel reports that it does not load the head of a classifier
            model = _in_fresh_memory(getattr(transformers, auto_class).from_pretrained(source))
        for number, image in enumerate(images):
            inputs = processor(image, return_tensors="pt")
            tensors[f"{number}.pixel_values"] = inputs["pixel_values"]
            with torch.inference_mode():
                for key, value in model(**inputs).items():
                    if isinstance(value, Tensor):
                        tensors[f"{number}.{auto_class}.{key}"] = value
    for task in questions["pipelines"]:
        with _silence_transformers():
            tool: Any = transformers.pipeline(task, model=str(source))
        _in_fresh_memory(tool.model)
        for number, image in enumerate(images):
            name = f"{number}.{task}"
            if task == "image-feature-extraction":
                tensors[name] = tool(image, return_tensors=True)
            elif task == "image-classification":
                words[name] = tool(image, top_k=5)
            elif task == "depth-estimation":
                tensors[name] = tool(image)["predicted_depth"]
            else:
                words[name] = [[entry["label"], sum(entry["mask"].histogram()[1:])] for entry in tool(image)]
    return tensors, words


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


def _in_fresh_memory(model: Any) -> Any:
    """Copy the weights as `clean_process.py` does: kernels round differently for addresses in a mapped file."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


def _compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> dict[str, float]:
    if found.keys() != expected.keys():
        raise BundleError(f"The outputs of the bundle are {sorted(found)}, those of the original {sorted(expected)}.")
    differences = {}
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise BundleError(
                f"{name}: shape {tuple(found[name].shape)} differs from {tuple(value.shape)} of the original."
            )
        difference = (found[name].float() - value.float()).abs()
        allowed = TOLERANCE * (1 + value.float().abs())
        differences[name] = float(difference.max()) if difference.numel() else 0.0  # a model without registers
        if not bool((difference <= allowed).all()):
            raise BundleError(
                f"{name}: the outputs differ by up to {differences[name]:.2g} from the original (tolerance "
                f"{TOLERANCE:g}). The bundle is not the model from which it was made."
            )
    return differences


def _compare_labels(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float]:
    """Compare the labels in their order, and their scores or pixel counts."""
    differences = {}
    for name, entries in expected.items():
        pairs = [(e["label"], e["score"]) if isinstance(e, dict) else tuple(e) for e in entries]
        other = [(e["label"], e["score"]) if isinstance(e, dict) else tuple(e) for e in found[name]]
        off = max((abs(a[1] - b[1]) for a, b in zip(pairs, other)), default=0.0)
        if [a[0] for a in pairs] != [b[0] for b in other] or off > TOLERANCE:
            raise BundleError(f"{name}: the pipeline returns {other}, that of the original {pairs}.")
        differences[name] = float(off)
    return differences
