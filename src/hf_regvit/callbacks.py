"""Observers of a training run: progress bar, metrics file, k-NN accuracy of the teacher. None of them changes it."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback, TrainerControl, TrainerState

from .probes import knn_accuracy


class Observer(TrainerCallback):
    """A callback that measures something; the trainer adds what it has measured to the next log line.

    Going through the trainer's own log, instead of writing somewhere, puts every measurement into the metrics file
    and every tracker that `report_to` names.
    """

    def __init__(self) -> None:
        self._measured: dict[str, float] = {}

    def take(self) -> dict[str, float]:
        """What was measured since the last call."""
        measured, self._measured = self._measured, {}
        return measured


class TrainingProgress(ProgressCallback):
    """Trainer's progress bar with its remaining time, plus loss and images per second, and no printed dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Opens the bar at the step where the run starts."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None and state.global_step:
            # Steps of an earlier process would make the rate, and so the remaining time, too good.
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
        """Shows loss and speed behind the bar; other measurements, such as k-NN accuracy, stay until the next one."""
        if self.training_bar is None or not logs:
            return
        shown = {"loss": "{:.3f}", "images_per_second": "{:.0f}"}
        names = {"images_per_second": "images/s"}
        values = {names.get(key, key): text.format(logs[key]) for key, text in shown.items() if key in logs}
        values |= {key.removeprefix("eval_"): f"{logs[key]:.1%}" for key in logs if key.startswith("eval_knn")}
        self._shown |= values
        self.training_bar.set_postfix(self._shown)


class MetricsFile(TrainerCallback):
    """Appends every log line to a JSON-lines file: one object per line, `step` first.

    Args:
        path: the file. A resumed run drops the lines after the step it starts from, so that no step occurs twice.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Empties the file, up to the step of a resumed run."""
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() and state.global_step else []
        kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        self.path.write_text("".join(f"{line}\n" for line in kept))

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes one line."""
        if state.is_world_process_zero and logs:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


@torch.no_grad()
def backbone_features(
    backbone: nn.Module, images: Sequence[Any], *, image_processor: Any, batch_size: int = 256
) -> Tensor:
    """CLS and mean patch of every image, side by side; registers are left out.

    Both parts are the tokens after the final norm. Together they are what DINOv2's linear probe reads; on small
    backbones the mean patch carries colour and texture that CLS has no room for.

    Args:
        backbone: RegViT; its train or eval mode is left as it is, so switch to eval before.
        images: n PIL images.
        image_processor: makes `pixel_values` of a list of images.
        batch_size: images per forward.

    Returns:
        `(n, 2 * D)` float32 on the CPU.
    """
    device = next(backbone.parameters()).device
    rows = []
    for start in range(0, len(images), batch_size):
        batch = [images[index] for index in range(start, min(start + batch_size, len(images)))]
        pixels = image_processor(images=batch, return_tensors="pt")["pixel_values"]
        outputs = backbone(pixels.to(device))
        rows.append(torch.cat([outputs.pooler_output, outputs.patch_tokens.mean(dim=1)], dim=-1).float().cpu())
    return torch.cat(rows)


class OnlineKNN(Observer):
    """Weighted k-NN accuracy of the teacher on held-out images, every so many steps.

    Args:
        train_images: PIL images whose labels vote.
        train_labels: their classes.
        heldout_images: PIL images to classify.
        heldout_labels: their classes.
        image_processor: the processor that the backbone will be saved with.
        every_steps: optimizer steps between two evaluations; the first is before step 0, the last after the last step.
        k: numbers of neighbours.

    Raises:
        ValueError: different numbers of images and labels, or `every_steps` below 1.

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
        every_steps: int,
        k: Sequence[int] = (10,),
    ) -> None:
        super().__init__()
        for images, labels, name in (
            (train_images, train_labels, "training"),
            (heldout_images, heldout_labels, "held-out"),
        ):
            if len(images) != len(labels):
                raise ValueError(
                    f"{len(images)} {name} images have {len(labels)} labels; expected one label per image."
                )
        if every_steps < 1:
            raise ValueError(f"every_steps is {every_steps}; expected the steps between two evaluations, at least 1.")
        self.train_images, self.heldout_images = train_images, heldout_images
        self.train_labels, self.heldout_labels = torch.as_tensor(train_labels), torch.as_tensor(heldout_labels)
        self.image_processor, self.every_steps, self.k = image_processor, every_steps, tuple(k)

    def accuracy(self, backbone: nn.Module) -> dict[int, float]:
        """Share of right answers in [0, 1] per number of neighbours, of a backbone in eval mode."""
        train, heldout = (
            backbone_features(backbone, images, image_processor=self.image_processor)
            for images in (self.train_images, self.heldout_images)
        )
        return knn_accuracy(train, self.train_labels, heldout, self.heldout_labels, k=self.k)

    def _measure(self, model: Any) -> None:
        started = time.perf_counter()
        accuracies = self.accuracy(model.teacher_backbone)
        self._measured = {f"eval_knn_{k}": accuracy for k, accuracy in accuracies.items()}
        self._measured["eval_seconds"] = time.perf_counter() - started

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measures the untrained teacher; it goes into the first log line."""
        if state.global_step == 0:
            self._measure(kwargs["model"])

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measures at every `every_steps`-th step and asks for a log line."""
        if state.global_step % self.every_steps == 0 or state.global_step == state.max_steps:
            self._measure(kwargs["model"])
            control.should_log = True
