"""Folder of a run: its lock, its recipe and its environment.

A pretraining run leaves `backbone/` (EMA teacher for `AutoModel.from_pretrained`, image processor, model card),
`training/` (student, teacher heads and centers, for `--init_from`), `panels/`, `curves.png` and `report.json`; a
fine-tuning run leaves the model itself and `metrics.json`. Both leave `metrics.jsonl`, `resolved_recipe.yaml`,
`environment.json` and checkpoints.
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback, TrainingArguments
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_callback import TrainerControl, TrainerState

from ..models.manifest import whole_checkpoint
from ..models.saving import NoSpaceError, explain_full_disk, whole_file, write_json
from .arguments import RunArguments
from .distributed import from_first

logger = logging.getLogger(__name__)

LOCK, BAD_IMAGES = "run.lock", "bad_images.jsonl"
# A run on another machine renews its lock every half minute, so a lock that is this old belongs to no run.
_RENEW_SECONDS, _STALE_SECONDS = 30.0, 600.0


class RunFolderInUseError(RuntimeError):
    """Refusal to start a run in the folder of another run that has not ended."""


# ---- Lock --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def run_lock(args: RunArguments) -> Iterator[None]:
    """Keep other runs out of the run folder inside the block, and remove the lock at every exit.

    Process 0 writes `run.lock` with its process id, machine and start time. A lock whose process has ended, or on
    another machine has not renewed it for ten minutes, is replaced.

    Raises:
        RunFolderInUseError: Another run uses the folder; raised on every process.
    """
    folder, problem = args.folder, None
    is_new = not folder.exists()
    if args.process_index == 0:
        try:
            _take_lock(folder / LOCK)
        except (OSError, RunFolderInUseError) as error:
            problem = error
    if (problem := from_first(problem)) is not None:
        raise problem
    try:
        yield
    finally:
        if args.process_index == 0:
            (folder / LOCK).unlink(missing_ok=True)
            if is_new:
                with contextlib.suppress(OSError):  # not empty: the run has left something
                    folder.rmdir()


def _take_lock(path: Path) -> None:
    import psutil

    path.parent.mkdir(parents=True, exist_ok=True)
    own = {
        "process": os.getpid(),
        "machine": socket.gethostname(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "process_started": psutil.Process().create_time(),
        "process_namespace": _process_namespace(),
    }
    while True:
        try:
            _write_lock(path, json.dumps(own) + "\n")
            return
        except FileExistsError:
            text = _text_of(path)
        if text is None:  # released meanwhile
            continue
        holder = _holder(text)
        who = f"process {holder.get('process')} on {holder.get('machine')}, started {holder.get('started')}"
        if _is_running(holder, path):
            raise RunFolderInUseError(
                f"'{path.parent}' is in use by {who}. Two runs in one folder would mix their checkpoints. Wait for "
                f"that run, or set another output_dir. If it has ended, delete '{path}'."
            )
        logger.warning("The run of %s has ended without removing '%s', which is replaced.", who, path)
        aside = path.with_name(f"{path.name}.{os.getpid()}.stale")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            path.rename(aside)
            if _text_of(aside) != text:  # and has taken the lock already
                aside.rename(path)
            aside.unlink(missing_ok=True)


def _write_lock(path: Path, content: str) -> None:
    """Create a lock, or leave none if the disk is full."""
    try:
        with explain_full_disk(path, needed=len(content)), path.open("x") as file:
            file.write(content)
    except NoSpaceError:
        path.unlink(missing_ok=True)
        raise


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _holder(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        content = json.loads(text)
        if isinstance(content, dict):
            return content
    return {}


def _process_namespace() -> str | None:
    """Return the name of the process namespace; containers may share a host name, but not their process ids."""
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return None


def _is_running(holder: Mapping[str, Any], path: Path) -> bool:
    import psutil

    if (holder.get("machine"), holder.get("process_namespace")) != (socket.gethostname(), _process_namespace()):
        with contextlib.suppress(FileNotFoundError):
            return time.time() - path.stat().st_mtime < _STALE_SECONDS
        return False
    try:
        process = psutil.Process(holder["process"])
        same = abs(process.create_time() - holder["process_started"]) < 5  # or the id was given to another process
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# ---- Output files ------------------------------------------------------------------------------------------------


class RunRecord(TrainerCallback):
    """Write `resolved_recipe.yaml` and `environment.json` when training starts, and renew the lock of the folder.

    They are not written earlier, because a rejected attempt to resume must not overwrite the files of the run.

    Args:
        folder: Run folder.
        recipe: Options of the run.
    """

    def __init__(self, folder: str | Path, recipe: Mapping[str, Any]) -> None:
        self.folder, self.recipe, self._renewed = Path(folder), dict(recipe), 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Write both files."""
        if state.is_world_process_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(self.folder / "resolved_recipe.yaml") as unfinished:
                unfinished.write_text(yaml.safe_dump(self.recipe, sort_keys=False))
            write_json(self.folder / "environment.json", run_environment(args))

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Renew the lock, at most twice a minute."""
        if state.is_world_process_zero and time.monotonic() - self._renewed > _RENEW_SECONDS:
            self._renewed = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self.folder / LOCK)

    on_prediction_step = on_step_end


Processor = ProcessorMixin | BaseImageProcessor


def write_model(folder: Path, model: PreTrainedModel, processor: Processor | None, *, needed: int = 0) -> None:
    """Write a model and its processor, if there is one, with a manifest; an earlier one is replaced."""
    with whole_checkpoint(folder, needed=needed) as staged:
        model.save_pretrained(staged)
        if processor is not None:
            processor.save_pretrained(staged)


def names_digest(names: Iterable[object]) -> str:
    """Return the sha256 of image names in their order."""
    return hashlib.sha256("\0".join(map(str, names)).encode("utf-8", "surrogateescape")).hexdigest()


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that a run depends on."""
    from importlib.metadata import version

    names = ("hf_regvit", "torch", "torchvision", "transformers", "accelerate", "safetensors", "numpy", "pillow")
    return {name: version(name) for name in names}


def run_environment(args: TrainingArguments) -> dict[str, Any]:
    """Return the environment of a run for comparison with other runs, without host names and paths."""
    return {
        "packages": package_versions(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type,
        "processes": args.world_size,
        "cpu_threads": torch.get_num_threads(),
    }
