"""Figures, report and model of a run for its trackers, which receive scalars and options from transformers.

The callbacks of transformers log every line of the trainer to the trackers in `report_to`. Here, trackio, Weights &
Biases and TensorBoard also receive images during the run, and at its end curves, report and model. Trackio and Weights
& Biases keep files, with the same calls; TensorBoard shows the report as text and takes no model.
"""

import contextlib
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from ..hub.scan import public_files
from ..models.manifest import MANIFEST
from ..models.saving import read_json, write_json
from .pushing import PushingTrainer

logger = logging.getLogger(__name__)

RECORD = "trackers.json"  # digests of what each run of a tracker has received


class Trackers:
    """Trackers of a run. No failure of theirs ends the run, and they stay open until the result is written.

    A run of a tracker that is continued, because its id or name was given again, receives nothing a second time.

    Args:
        trainer: PushingTrainer, whose callbacks of trackers are changed.
    """

    def __init__(self, trainer: PushingTrainer) -> None:
        self.trainer = trainer
        self.callbacks: dict[str, Any] = {}  # by the name of the tracker, without those that have failed
        self._ends: list[Callable[[], None]] = []
        for callback in trainer.callback_handler.callbacks:
            if type(callback).__module__ == "transformers.integrations.integration_utils":
                name = type(callback).__name__.removesuffix("Callback").lower()
                self.callbacks[name] = callback
                for event in [event for event in dir(callback) if event.startswith("on_")]:
                    setattr(callback, event, partial(self._call, name, event, getattr(callback, event)))

    def _call(self, name: str, event: str, act: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Call a tracker that has not failed, and log a failure."""
        if event == "on_train_end":  # would close the tracker before there is a result
            self._ends.append(partial(self._call, name, "end", act, *args, **kwargs))
        elif name in self.callbacks:
            try:
                with contextlib.redirect_stdout(sys.stderr):  # trackio prints, but stdout is for results
                    act(*args, **kwargs)
            except Exception as error:  # a tracker may raise anything
                del self.callbacks[name]
                what = f"{name} failed at {event} ({type(error).__name__}: {error})"
                logger.warning("ALARM: %s. The run continues without it; metrics.jsonl has all measurements.", what)

    def figures(self, figures: Mapping[str, Path]) -> None:
        """Log image files by name."""
        for name, path in figures.items():
            self._send(f"figures/{name}", [path])

    def result(self, report: Path, figures: Sequence[Path] = ()) -> None:
        """Log the report of a run that has ended, a JSON file, and figures."""
        self.figures({path.stem: path for path in figures})
        self._send("report", [report])

    def finish(self, folder: Path) -> None:
        """Log the files of a finished model that may be published, unless `track_model` is off; close the trackers."""
        if self.trainer.args.track_model:
            self._send("model", [folder / name for name in sorted(public_files(folder), key=MANIFEST.__ne__)])
        while self._ends:
            self._ends.pop()()

    def _send(self, key: str, files: Sequence[Path]) -> None:
        for name in ("tensorboard", "trackio", "wandb"):
            self._call(name, key, self._send_once, name, key, files)

    def _send_once(self, name: str, key: str, files: Sequence[Path]) -> None:
        """Send files to a tracker, unless its run has received them; the first file identifies their content."""
        step, record = self.trainer.state.global_step, self.trainer.args.folder / RECORD
        if name == "tensorboard":
            writer = self.callbacks[name].tb_writer
            run, send = Path(writer.log_dir).name, partial(_to_tensorboard, writer)
        else:
            library = import_module(name)
            run = (library.run if name == "wandb" else library.context_vars.current_run.get()).id
            send = partial(_to_library, library, f"{key}-{run}")
        sent = read_json(record) if record.is_file() else {}
        received = sent.setdefault(f"{name} {run}", [])
        digest = hashlib.sha256(f"{key} {step}".encode() + files[0].read_bytes()).hexdigest()
        if digest not in received:
            send(key, step, files)
            received.append(digest)
            write_json(record, sent)


def _to_tensorboard(writer: Any, key: str, step: int, files: Sequence[Path]) -> None:
    if key.startswith("figures/"):
        writer.add_image(key, np.asarray(Image.open(files[0]).convert("RGB")), step, dataformats="HWC")
    elif key == "report":
        writer.add_text(key, f"```json\n{files[0].read_text(encoding='utf-8')}\n```", step)
    writer.flush()


def _to_library(library: ModuleType, title: str, key: str, step: int, files: Sequence[Path]) -> None:
    """Log to trackio or Weights & Biases, which have the same functions."""
    by_transformers = library.__name__ == "wandb" and os.getenv("WANDB_LOG_MODEL", "").lower() in ("end", "checkpoint")
    if key.startswith("figures/"):
        library.log({key: library.Image(str(files[0])), "train/global_step": step})
    elif key != "model" or not by_transformers:
        artifact = library.Artifact(title, type=key)
        for file in files:
            artifact.add_file(str(file), name=file.relative_to(files[0].parent).as_posix())
        library.log_artifact(artifact)
        logger.info("Logged the %s of the run to %s.", key, library.__name__)
