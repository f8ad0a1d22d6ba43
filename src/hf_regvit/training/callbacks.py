"""Observers of a training run: progress bar, metrics file, k-NN and linear accuracy. They do not change the run."""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback, TrainerControl, TrainerState

from ..figures.curves import metrics_lines
from ..models.saving import whole_file

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
        figures: Image files by name that were drawn since the last log line, for the trackers.
        seconds: Time spent on measurements so far.
        is_main_process: True if this process writes files.
    """

    def __init__(self, every_steps: float = 1, *, at_least: int = 1, at_most: int | None = None) -> None:
        self.every_steps, self.at_least, self.at_most = every_steps, at_least, at_most
        self.figures: dict[str, Path] = {}
        self.seconds = 0.0
        self.is_main_process = True
        self._seconds_told = 0.0
        self._measured: dict[str, float] = {}

    def take(self) -> tuple[dict[str, float], float]:
        """Return the measurements since the last call, and the seconds that they took."""
        taken = self._measured, self.seconds - self._seconds_told
        self._measured, self._seconds_told = {}, self.seconds
        return taken

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

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the untrained network, except in a resumed run."""
        self.is_main_process = state.is_world_process_zero
        if state.global_step == 0:
            self._observe(kwargs["model"], 0)

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure if the step is due, and request a log line."""
        step = state.global_step
        if step % self.interval(state.max_steps) == 0 or step == state.max_steps:
            self._observe(kwargs["model"], step)
            control.should_log = True


class TrainingProgress(ProgressCallback):
    """Progress bar of Trainer with loss, speed and accuracy added, and without printed dictionaries.

    Args:
        metric: Metric of an evaluation to show, without "eval_".
    """

    def __init__(self, metric: str | None = None) -> None:
        super().__init__()
        self.metric = metric
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Open the bar at the step at which the run starts."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None and state.global_step:
            # Counting the steps of an earlier process would overestimate the speed.
            self.training_bar.initial = self.training_bar.n = self.current_step = state.global_step
            self.training_bar.refresh()

    def on_log(
        self, args: object, state: TrainerState, control: TrainerControl, logs: Mapping[str, float] = {}, **kwargs: Any
    ) -> None:
        """Show loss and speed next to the bar; other measurements, such as k-NN accuracy, stay until the next one."""
        if self.training_bar is None:
            return
        for key, value in logs.items():
            name = key.removeprefix("eval_")
            if key.startswith(("eval_knn", "eval_linear")):
                self._shown[name] = f"{value:.1%}"
            elif key == f"eval_{self.metric}":
                self._shown[name] = f"{value:.4f}"
            elif key in ("loss", "images_per_second"):
                shown = f"{value:.3f}" if key == "loss" else f"{value:.0f}"
                self._shown["loss" if key == "loss" else "images/s"] = shown
        self.training_bar.set_postfix(self._shown)


class MetricsFile(TrainerCallback):
    """Append every log line to a JSON Lines file, with `step` as the first key.

    Args:
        path: Path of the file. A resumed run removes the lines after the step it starts from, and does not repeat
            those of that step. If the file cannot be written, for example on a full disk, lines are lost and training
            continues.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._is_torn = False  # True if the last line may be incomplete
        # Step and keys of the lines of the step at which a run was resumed.
        self._known: set[tuple[int, frozenset[str]]] = set()

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Clear the file; a resumed run keeps the lines up to its step."""
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not (self.path.exists() and state.global_step):
            self.path.write_text("")
            return
        with whole_file(self.path) as unfinished, unfinished.open("w") as file:
            for line in metrics_lines(self.path):
                if line["step"] <= state.global_step:
                    file.write(f"{json.dumps(line)}\n")
                if line["step"] == state.global_step:
                    self._known.add((line["step"], frozenset(line)))

    def on_log(
        self, args: object, state: TrainerState, control: TrainerControl, logs: Mapping[str, float] = {}, **kwargs: Any
    ) -> None:
        """Write one log line, unless a run that was resumed at this step has the line already."""
        if not state.is_world_process_zero or not logs:
            return
        line = {"step": state.global_step, **logs}
        if (key := (state.global_step, frozenset(line))) in self._known:
            self._known.remove(key)
        else:
            self.append(line)

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
