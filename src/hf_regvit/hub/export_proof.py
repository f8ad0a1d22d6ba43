"""Prove an exported file: run it in a clean process without torch and hf_regvit, and compare it with PyTorch."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from ..evaluation.intervals import paired_difference
from .export_network import NamedOutputs
from .exported import Arrays, ExportError, difference

# Limits by precision. `max_error` is multiplied by the largest value of the output if that is above 1.
BOUNDS: dict[str, dict[str, float]] = {
    "f32": {"max_error": 1e-4, "cosine_min": 0.99999},
    "f16": {"cosine_min": 0.9995},
    "bf16": {"cosine_mean": 0.998},
    "int8": {"cosine_mean": 0.98, "cosine_p1": 0.90, "cls_cosine_mean": 0.99, "agreement": 0.95},
}
BOUNDS["int8-weights"] = BOUNDS["int8"]

_IN_CLEAN_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import run
folder, work, engine, precision, threads = sys.argv[1:]
model = run.load_exported(folder, engine=engine, precision=precision, threads=int(threads))
answers = {}
with np.load(work + "/questions.npz") as questions:
    for name in questions.files:
        if name == "wrong_size":
            try:
                model(questions[name])
            except run.ExportError:
                continue
            raise SystemExit("An image of another size was not refused.")
        answers |= {f"{name}.{output}": values for output, values in model(questions[name]).items()}
loaded = {"torch", "hf_regvit"}.intersection(sys.modules) - {engine}
if loaded:
    raise SystemExit(f"The process has loaded {loaded}.")
np.savez(work + "/answers.npz", **answers)
"""


@dataclass(frozen=True)
class Question:
    """Input of a comparison, and the outputs of PyTorch.

    Attributes:
        kind: "random" for random pixels, "images", "check" for the images of `check.npz`, or "held-out" for images
            of the user.
        pixels: Input of the network.
        expected: Outputs of the network by name.
        labels: Class ids of the images, if they are those of the classifier.
    """

    kind: str
    pixels: np.ndarray
    expected: Arrays
    labels: np.ndarray | None = None

    @classmethod
    def ask(cls, kind: str, network: NamedOutputs, pixels: torch.Tensor, labels: np.ndarray | None = None) -> Self:
        """Run the network in PyTorch on its input."""
        outputs = {name: value.numpy() for name, value in network.ask(pixels).items()}
        return cls(kind, pixels.numpy(), outputs, labels)


def answers_of(
    folder: Path, engine: str, precision: str, questions: Sequence[Question], *, wrong_size: np.ndarray | None
) -> list[Arrays]:
    """Run a file of an export in a clean process on the inputs of all questions.

    Args:
        folder: Folder with the file, `proof.json` and `run.py`.
        engine: Engine of the file.
        precision: Precision as for `load_exported`.
        questions: Questions; their inputs are run one after the other.
        wrong_size: Input of a size that must be refused, if there is one.

    Raises:
        ExportError: The process fails.
    """
    inputs = {str(i): question.pixels for i, question in enumerate(questions)}
    if wrong_size is not None:
        inputs["wrong_size"] = wrong_size
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    with tempfile.TemporaryDirectory(dir=folder.resolve().parent) as work:  # the disk that has space for the files
        np.savez(Path(work, "questions.npz"), **inputs)  # type: ignore[arg-type]  # names of arrays
        words = [str(folder.resolve()), work, engine, precision, str(torch.get_num_threads())]
        done = subprocess.run(
            [sys.executable, "-P", "-B", "-c", _IN_CLEAN_PROCESS, *words], env=environment, cwd=work,
            capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode:
            last = "\n".join(done.stderr.strip().splitlines()[-8:])
            raise ExportError(f"The {precision} file for {engine} cannot be run in a clean process:\n{last}")
        with np.load(Path(work, "answers.npz")) as stored:
            found = dict(stored)
    return [{name: found[f"{i}.{name}"] for name in question.expected} for i, question in enumerate(questions)]


# ---- Comparison --------------------------------------------------------------------------------------------------


def cosines(name: str, found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return the cosine of each vector: of each token, position of a map or pixel of class scores, or of each image.

    Tokens (B, N, D) and vectors (B, D) have their channels last, maps (B, C, H, W) second, and depth (B, H, W) none.
    """
    first, second = (np.asarray(one, dtype=np.float64) for one in (found, expected))
    if name == "depth":
        first, second = (one.reshape(len(one), -1) for one in (first, second))
    elif first.ndim == 4:
        first, second = (np.moveaxis(one, 1, -1) for one in (first, second))
    lengths = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return ((first * second).sum(-1) / np.maximum(lengths, 1e-300)).ravel()


def compare(questions: Sequence[Question], answers: Sequence[Arrays]) -> dict[str, Any]:
    """Compare the answers with PyTorch.

    Returns:
        `checks`, a record of each question; `outputs`, for each output the largest error, also relative to its largest
        value, and the mean, 1st percentile and minimum of the cosines; `agreement`, the share of equal classes, and
        `top1_change` with its 95 % confidence interval in points, if there are labels.
    """
    checks: list[dict[str, Any]] = []
    outputs: dict[str, dict[str, float]] = {}
    for question, found in zip(questions, answers):
        errors = {name: difference(found[name], expected)[0] for name, expected in question.expected.items()}
        sides = question.pixels.shape[1:3] if question.pixels.dtype == np.uint8 else question.pixels.shape[2:4]
        checks.append(
            {"pixels": question.kind, "batch": len(question.pixels), "size": list(sides), "max_error": errors}
        )
    for name in questions[0].expected:
        scale = max(1.0, *(float(np.abs(question.expected[name]).max()) for question in questions))
        error = max(check["max_error"][name] for check in checks)
        all_cosines = np.concatenate(
            [cosines(name, found[name], question.expected[name]) for question, found in zip(questions, answers)]
        )
        outputs[name] = {
            "max_error": error, "relative_error": error / scale, "cosine_mean": float(all_cosines.mean()),
            "cosine_p1": float(np.quantile(all_cosines, 0.01)), "cosine_min": float(all_cosines.min()),
        }  # fmt: skip
    return {"checks": checks, "outputs": outputs} | _agreement(questions, answers)


def _agreement(questions: Sequence[Question], answers: Sequence[Arrays]) -> dict[str, Any]:
    """Return the share of equal classes over images that are no noise and, with labels, the change of top-1."""
    pairs = [(q, found) for q, found in zip(questions, answers) if q.kind != "random" and "logits" in q.expected]
    if not pairs:
        return {}
    equal = [(q.expected["logits"].argmax(1) == found["logits"].argmax(1)).ravel() for q, found in pairs]
    result: dict[str, Any] = {"agreement": float(np.concatenate(equal).mean())}
    labeled = [(q, found) for q, found in pairs if q.labels is not None]
    if labeled:
        before, after = (
            np.concatenate([side["logits"].argmax(1) == q.labels for q, side in sides]).astype(np.float64)[:, None]
            for sides in ([(q, q.expected) for q, _ in labeled], labeled)
        )
        change, (low, high) = paired_difference(before, after, seed=0)
        result |= {"top1": 100 * float(after.mean()), "top1_change": 100 * change}
        result |= {"top1_change_interval": [100 * low, 100 * high], "labeled_images": len(after)}
    return result


def failures(precision: str, found: Mapping[str, Any]) -> list[str]:
    """Return a phrase for every number that misses its bound."""
    bounds, missed = BOUNDS[precision], []
    for name, numbers in found["outputs"].items():
        if "max_error" in bounds and not numbers["relative_error"] <= bounds["max_error"]:
            missed.append(f"error {numbers['max_error']:.2g} of {name} (bound {bounds['max_error']:g} of its range)")
        for key in ("cosine_mean", "cosine_p1", "cosine_min"):
            bound = bounds.get(f"{name}_{key}", bounds.get(key))
            if bound is not None and not numbers[key] >= bound:
                missed.append(f"{key} {numbers[key]:.4f} of {name} (bound {bound:g})")
    if "agreement" in bounds and found.get("agreement", 1.0) < bounds["agreement"]:
        missed.append(f"agreement {100 * found['agreement']:.1f} % (bound {100 * bounds['agreement']:g} %)")
    return missed
