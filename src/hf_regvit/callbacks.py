"""Observers of a training run: progress bar, metrics file, k-NN and linear accuracy. They do not change the run."""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback, TrainerControl, TrainerState

from .probes import knn_accuracy

logger = logging.getLogger(__name__)


class Observer(TrainerCallback):
    """Callback that takes measurements, which the trainer adds to its next log line.

    The log of the trainer passes every measurement to the metrics file and to all trackers in `report_to`.
    Measurements taken before the first step get a separate line.

    Args:
        every_steps: Number of optimizer steps between two measurements; a value below 1 is a fraction of the run. The
            first measurement is before step 0, the last after the last step.
        at_least: Smallest interval in steps if `every_steps` is a fraction.
        at_most: Largest interval in steps if `every_steps` is a fraction.

    Attributes:
        seconds: Time spent on measurements so far.
        is_main_process: Whether this process writes files.

    Raises:
        ValueError: If `every_steps` is not positive.
    """

    def __init__(self, every_steps: float = 1, *, at_least: int = 1, at_most: int | None = None) -> None:
        if not every_steps > 0:
            raise ValueError(
                f"every_steps is {every_steps}; expected the number of steps between two measurements (at least 1), "
                "or a fraction of the run above 0."
            )
        self.every_steps, self.at_least, self.at_most = every_steps, at_least, at_most
        self.seconds = 0.0
        self.is_main_process = True
        self._seconds_told = 0.0
        self._measured: dict[str, float] = {}

    def take(self) -> dict[str, float]:
        """Return the measurements since the last call."""
        measured, self._measured = self._measured, {}
        return measured

    def take_seconds(self) -> float:
        """Return the seconds spent on measurements since the last call."""
        seconds, self._seconds_told = self.seconds - self._seconds_told, self.seconds
        return seconds

    def measure(self, model: Any, step: int) -> dict[str, float]:
        """Return the measurements for a `SelfDistillation` by name; implemented by subclasses."""
        raise NotImplementedError

    def interval(self, total_steps: int) -> int:
        """Return the number of steps between two measurements in a run of `total_steps`."""
        if self.every_steps >= 1:
            return int(self.every_steps)
        return max(self.at_least, min(math.ceil(self.every_steps * total_steps), self.at_most or total_steps))

    def _observe(self, model: Any, step: int) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # do not count the time of the previous step, which may still be running
        started = time.perf_counter()
        self._measured.update(self.measure(model, step))
        self.seconds += time.perf_counter() - started

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the untrained network, except in a resumed run."""
        self.is_main_process = state.is_world_process_zero
        if state.global_step == 0:
            self._observe(kwargs["model"], 0)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure if the step is due, and request a log line."""
        step = state.global_step
        if step % self.interval(state.max_steps) == 0 or step == state.max_steps:
            self._observe(kwargs["model"], step)
            control.should_log = True


class TrainingProgress(ProgressCallback):
    """Progress bar of Trainer with loss and images per second added, and without printed dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Open the bar at the step at which the run starts."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None and state.global_step:
            # Counting the steps of an earlier process would overestimate the speed.
            self.training_bar.initial = self.training_bar.n = self.current_step = state.global_step
            self.training_bar.refresh()

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show loss and speed next to the bar; other measurements, such as k-NN accuracy, stay until the next one."""
        if self.training_bar is None or not logs:
            return
        shown = {"loss": "{:.3f}", "images_per_second": "{:.0f}"}
        names = {"images_per_second": "images/s"}
        values = {names.get(key, key): text.format(logs[key]) for key, text in shown.items() if key in logs}
        values |= {
            key.removeprefix("eval_"): f"{logs[key]:.1%}"
            for key in logs
            if key.startswith(("eval_knn", "eval_linear"))
        }
        self._shown |= values
        self.training_bar.set_postfix(self._shown)


class MetricsFile(TrainerCallback):
    """Append every log line to a JSON Lines file, with `step` as the first key.

    Args:
        path: Path of the file. A resumed run removes the lines after the step it starts from, so that no step occurs
            twice. If the file cannot be written, for example on a full disk, lines are lost and training continues.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._is_torn = False  # True if the last line may be incomplete

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Clear the file; a resumed run keeps the lines up to its step."""
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = read_metrics(self.path) if self.path.exists() and state.global_step else []
        kept = [line for line in lines if line["step"] <= state.global_step]
        self.path.write_text("".join(f"{json.dumps(line)}\n" for line in kept))

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one log line."""
        if state.is_world_process_zero and logs:
            self.append({"step": state.global_step, **logs})

    def append(self, line: dict[str, Any]) -> None:
        """Append a line."""
        try:
            with self.path.open("a") as file:
                file.write("\n" * self._is_torn + json.dumps(line) + "\n")
        except OSError as error:
            if not self._is_torn:
                logger.error("ALARM: '%s' cannot be written (%s). Training continues without it.", self.path, error)
            self._is_torn = True
        else:
            self._is_torn = False


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read the lines of a `metrics.jsonl`, and skip lines that were truncated by a crash or a full disk."""
    lines = []
    for line in Path(path).read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and "step" in line]


@torch.no_grad()
def backbone_features(
    backbone: nn.Module, images: Sequence[Any], *, image_processor: Any, batch_size: int = 256
) -> Tensor:
    """Extract the CLS token and the mean patch token of every image, concatenated; registers are not used.

    Both parts are tokens after the final norm, as in the linear probe of DINOv2. For small backbones, the mean patch
    token contains color and texture that CLS lacks.

    Args:
        backbone: RegViT in eval mode; the mode is not changed here.
        images: Sequence of n PIL images.
        image_processor: Processor that makes `pixel_values` from a list of images.
        batch_size: Number of images per forward pass.

    Returns:
        Features `(n, 2 * D)`, float32 on the CPU.
    """
    device = next(backbone.parameters()).device
    rows = []
    for start in range(0, len(images), batch_size):
        batch = [images[index] for index in range(start, min(start + batch_size, len(images)))]
        pixels = image_processor(images=batch, return_tensors="pt")["pixel_values"]
        outputs = backbone(pixels.to(device))
        rows.append(torch.cat([outputs.pooler_output, outputs.patch_tokens.mean(dim=1)], dim=-1).float().cpu())
    return torch.cat(rows)


def ridge_accuracy(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor) -> float:
    """Return the accuracy of a linear classifier on test images, in [0, 1].

    Solves least squares on one-hot classes with an L2 penalty in closed form, because a probe within a training run
    must be fast and free of hyperparameters. Features are standardized with the mean and standard deviation of the
    training images. Of five penalties, from 1e-3 to 10 times the number of images, the one with the smallest
    leave-one-out error on the training images is used. The accuracy is slightly below that of a tuned logistic
    regression.

    Args:
        train_features: Features `(n, D)`.
        train_labels: Class ids `(n,)`.
        test_features: Features `(m, D)`.
        test_labels: Class ids `(m,)`.

    Source: Hastie, Tibshirani and Friedman 2009, sections 3.4.1 and 7.10 (leave-one-out error of a linear smoother).
    """
    mean, deviation = train_features.double().mean(0), train_features.double().std(0, correction=0)
    train, test = (
        (features.double() - mean) / deviation.clamp(min=1e-6) for features in (train_features, test_features)
    )
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    targets = F.one_hot(train_labels.long(), classes).double()  # (n, C)
    offset = targets.mean(0)  # equals an unpenalized bias, because the features have mean 0
    eigenvalues, directions = torch.linalg.eigh(train.T @ train)  # (D,), (D, D)
    scores = train @ directions  # (n, D)
    projected = scores.T @ (targets - offset)
    best_error, best_weights = math.inf, torch.empty(0)
    for penalty in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
        shrunk = 1 / (eigenvalues.clamp(min=0) + penalty * len(train))
        weights = shrunk[:, None] * projected
        leverage = (scores.square() * shrunk).sum(1, keepdim=True) + 1 / len(train)  # (n, 1)
        error = ((targets - offset - scores @ weights) / (1 - leverage)).square().mean().item()
        if error < best_error:
            best_error, best_weights = error, directions @ weights
    return ((test @ best_weights + offset).argmax(1) == test_labels.to(test.device)).float().mean().item()


class OnlineKNN(Observer):
    """Measure the weighted k-NN accuracy of the teacher on held-out images, and optionally a linear probe.

    Args:
        train_images: PIL images that serve as neighbors.
        train_labels: Class ids of `train_images`.
        heldout_images: PIL images to classify.
        heldout_labels: Class ids of `heldout_images`.
        image_processor: Image processor that the backbone will be saved with.
        every_steps: Number of optimizer steps between two evaluations, or a fraction of the run, limited to 200 to
            5000 steps; the first evaluation is before step 0, the last after the last step.
        k: Numbers of neighbors.
        linear_probe: Whether to also log `eval_linear`, the accuracy of `ridge_accuracy` on the same features.
        is_held_out: Whether the images to classify are excluded from training; False if the run trains on them without
            their labels, which reports mention.

    Raises:
        ValueError: If the numbers of images and labels differ, or `every_steps` is not positive.

    Source: the k-NN protocol of DINOv2 (votes weighted by softmax of similarity / 0.07).
    """

    def __init__(
        self,
        train_images: Sequence[Any],
        train_labels: Sequence[int],
        heldout_images: Sequence[Any],
        heldout_labels: Sequence[int],
        *,
        image_processor: Any,
        every_steps: float,
        k: Sequence[int] = (10,),
        linear_probe: bool = False,
        is_held_out: bool = True,
    ) -> None:
        super().__init__(every_steps, at_least=200, at_most=5000)
        for images, labels, name in (
            (train_images, train_labels, "training"),
            (heldout_images, heldout_labels, "held-out"),
        ):
            if len(images) != len(labels):
                raise ValueError(
                    f"{len(images)} {name} images have {len(labels)} labels; expected one label per image."
                )
        self.train_images, self.heldout_images = train_images, heldout_images
        self.train_labels, self.heldout_labels = torch.as_tensor(train_labels), torch.as_tensor(heldout_labels)
        self.image_processor, self.k, self.linear_probe = image_processor, tuple(k), linear_probe
        self.is_held_out = is_held_out

    def accuracy(self, backbone: nn.Module) -> dict[int, float]:
        """Return the accuracy in [0, 1] of a backbone in eval mode, by number of neighbors."""
        train, heldout = self._features(backbone)
        return knn_accuracy(train, self.train_labels, heldout, self.heldout_labels, k=self.k)

    def _features(self, backbone: nn.Module) -> tuple[Tensor, Tensor]:
        train, heldout = (
            backbone_features(backbone, images, image_processor=self.image_processor)
            for images in (self.train_images, self.heldout_images)
        )
        return train, heldout

    def measure(self, model: Any, step: int) -> dict[str, float]:
        """Return `eval_knn_K` for every number of neighbors K, and `eval_linear` if enabled."""
        train, heldout = self._features(model.whole_teacher_backbone())
        if not (torch.isfinite(train).all() and torch.isfinite(heldout).all()):
            return {}  # FiniteGuard is about to stop the run, with a better message than a probe could give
        accuracies = knn_accuracy(train, self.train_labels, heldout, self.heldout_labels, k=self.k)
        measured = {f"eval_knn_{k}": accuracy for k, accuracy in accuracies.items()}
        if self.linear_probe:
            measured["eval_linear"] = ridge_accuracy(train, self.train_labels, heldout, self.heldout_labels)
        return measured
