"""Atomic and verified checkpoints, a clean stop at a signal, and resuming from the newest valid checkpoint.

A checkpoint is written into a hidden folder next to its destination; `manifest.json`, with size and sha256 of every
other file, is written last; then everything is flushed and the folder is renamed. A run that is killed in between
leaves the hidden folder, which is never read and which the next run removes. Resuming uses the newest folder whose
files all match the manifest.

Single-process, DDP and FSDP2 runs (with full state dicts) write the same files, so a run can be resumed with another
number of processes and another kind of parallelism. The run folder must be on a file system that all processes share.
"""

import contextlib
import logging
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..models.configuration_regvit import CheckpointCorruptError, CheckpointError, check_weight_files
from ..models.foreign_weights import UNREADABLE, refused_pickle
from ..models.manifest import (
    OPTIMIZER,
    STATE,
    WEIGHTS,
    CheckpointIncompleteError,
    verify_checkpoint,
    write_manifest,
)  # fmt: skip
from ..models.saving import apply_umask, as_bytes, check_space, flush, free_bytes, num_bytes, read_object, write_json
from .distributed import from_first, lost_processes, num_processes, processes_of_run
from .pushing import PushingTrainer
from .signals import TrainingInterrupted, WorkerDeaths

logger = logging.getLogger(__name__)
STAGING = ".saving"  # folder inside the run folder in which a checkpoint is assembled
RESUME_STATE = "resume_state.json"
# Parts of the errors of gloo and NCCL for a process that has ended.
_LOST_CONNECTION = re.compile(r"gloo|pair\.cc|NCCL|connection (closed|reset)|broken pipe|store", re.IGNORECASE)


def list_checkpoints(run: Path) -> list[Path]:
    """Return the folders `checkpoint-N` of a run, sorted by N, without those renamed to `checkpoint-N.broken`."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = [p for p in run.glob(f"{prefix}*") if p.is_dir() and p.name.removeprefix(prefix).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(prefix)))


def _check_is_checkpoint(folder: Path) -> None:
    """Raise an error if a folder does not exist or is a run folder, before it is verified as a checkpoint."""
    if not folder.is_dir():
        raise CheckpointCorruptError(
            f"The folder '{folder}' does not exist. Pass a checkpoint folder, or 'last' for the newest one in "
            "output_dir."
        )
    if not (folder / OPTIMIZER).exists() and (inside := list_checkpoints(folder)):
        raise CheckpointCorruptError(
            f"'{folder}' is a run folder, not a checkpoint. It holds {', '.join(path.name for path in inside[-3:])}. "
            "Pass one of them, or pass this folder as output_dir and 'last' as resume_from_checkpoint."
        )


def newest_checkpoint(run: Path) -> Path | None:
    """Return the newest valid checkpoint of a run, or None if there is none.

    Every newer checkpoint that fails verification is renamed to `checkpoint-N.broken` and logged. A checkpoint that
    was saved without its optimizer is skipped but not renamed.

    Raises:
        CheckpointIncompleteError: If there are only checkpoints that were saved without a file that resuming needs.
    """
    incomplete: CheckpointIncompleteError | None = None
    for folder in reversed(list_checkpoints(run)):
        try:
            verify_checkpoint(folder)
        except CheckpointIncompleteError as error:
            incomplete = incomplete or error
            logger.warning("%s Trying the previous checkpoint.", error)
        except CheckpointCorruptError as error:
            aside = folder.with_name(f"{folder.name}.broken")
            if aside.exists():
                shutil.rmtree(aside)
            folder.rename(aside)
            logger.warning("%s The folder was renamed to %s. Trying the previous checkpoint.", error, aside.name)
        else:
            return folder
    if incomplete is not None:
        raise incomplete
    return None


def publish_checkpoint(staged: Path, final: Path) -> None:
    """Move a finished folder to its final name in one step, and replace a folder that already has that name."""
    apply_umask(staged)
    write_manifest(staged)
    old = staged.with_name(f"{final.name}.replaced")
    if final.exists():
        final.rename(old)
    staged.rename(final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def rotate_checkpoints(run: Path, limit: int | None, *, keep: Sequence[Path] = ()) -> None:
    """Delete the oldest checkpoints until `limit` are left.

    Args:
        run: Run folder.
        limit: Number of checkpoints to keep, at least 1; None or 0 keeps all.
        keep: Folders that are never deleted, such as the newest and the best one.
    """
    if not limit:
        return
    folders = list_checkpoints(run)
    kept = {path.resolve() for path in keep}
    for folder in folders[: max(len(folders) - limit, 0)]:
        if folder.resolve() not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def _is_write_error(error: BaseException) -> bool:
    """Return True if saving failed because of the disk instead of a bug."""
    # torch.save and the sharded writer report a full disk with their own error types.
    return isinstance(error, OSError | SafetensorError | CheckpointException) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("inline_container", "file write"))
    )


def _unreadable_state(folder: str, error: BaseException) -> CheckpointCorruptError:
    """Create the error for a state that cannot be loaded; it names the file, if one is not a plain file of tensors."""
    found: str | Path = folder
    for path in sorted([*Path(folder).glob("*.pt"), *Path(folder).glob("*.pth")]):
        try:
            with safe_globals():
                torch.load(path, map_location="cpu", weights_only=True)
        except UNREADABLE as one:
            found, error = path, one
            break
    advice = "Resume from another checkpoint, or start a new run from its weights."
    return refused_pickle(found, error, advice=advice)


@contextlib.contextmanager
def _reading_state(folder: str | None) -> Iterator[None]:
    """Turn the errors of a damaged or hostile file of a checkpoint into one that names it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        raise _unreadable_state(str(folder), error) from error


# ---- Trainer -----------------------------------------------------------------------------------------------------


class CheckpointedTrainer(PushingTrainer):
    """`transformers.Trainer` with atomic, verified checkpoints and a clean stop at a signal.

    A checkpoint that cannot be written, for example on a full disk, is removed and reported, and training continues.
    Subclasses define in `resume_state` and `check_resume_state` which settings a resumed run must match.
    """

    # Trainer declares wider types, for cases that do not occur here.
    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: LambdaLR

    def __init__(self, **options: Any) -> None:
        self.failed_saves = 0
        self.worker_deaths = WorkerDeaths()
        self._staging: Path | None = None
        self._write_error: BaseException | None = None
        self.save_problem = ""  # of the last checkpoint that could not be written: the reason and the space it needs
        super().__init__(**options)
        self.add_callback(self.signals)
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(
                f"fsdp is set, but accelerate does not shard on {self.args.device.type} with "
                f"{self.accelerator.distributed_type}; expected several accelerators. Remove fsdp; several CPU "
                "processes then train with DDP."
            )

    # Settings that a resumed run must match.

    def resume_state(self) -> dict[str, Any]:
        """Return the JSON content that is saved with the weights for `check_resume_state` of a later run."""
        raise NotImplementedError

    def check_resume_state(self, saved: dict[str, Any]) -> None:
        """Check the output of `resume_state` before the checkpoint is loaded; raise an error to reject it."""
        raise NotImplementedError

    # Starting and stopping.

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:  # type: ignore[override]
        """Train, optionally from a verified checkpoint.

        Args:
            resume_from_checkpoint: Checkpoint folder, or True or `"last"` for the newest valid checkpoint in
                `output_dir`. If there is none, `"last"` starts a new run.

        Raises:
            CheckpointCorruptError: If the given folder fails verification.
            FileExistsError: If a new run would mix its checkpoints with those of an earlier run.
            CheckpointIncompleteError: If there are only checkpoints without optimizer (`save_only_model`).
            ValueError: If `resume_from_checkpoint` is True and there is no checkpoint.
            TrainingInterrupted: If SIGTERM, SIGUSR1 or Ctrl-C arrived; a checkpoint is saved.
        """
        folder = self._checkpoint_to_resume(resume_from_checkpoint)
        self._check_space_of_run(folder)
        if folder is not None:
            logger.info("Resuming from %s.", folder)
            self._check_files(folder)
        self._peers = processes_of_run()
        try:
            with self.signals.listening():
                result = super().train(None if folder is None else str(folder))
        except UnpicklingError as error:
            raise _unreadable_state(str(folder), error) from error
        except RuntimeError as error:
            step, again = self.state.global_step, "Start again with resume_from_checkpoint=last."
            if _LOST_CONNECTION.search(str(error)) and (lost := lost_processes(self._peers)):
                raise RuntimeError(
                    f"{' and '.join(lost)} ended during the run, so process {self.args.process_index} stopped after "
                    f"step {step}. The reason is in the output of that process; if there is none, it was killed, "
                    f"often because memory ran out. {again}"
                ) from error
            if num_processes() > 1:
                error.add_note(f"Process {self.args.process_index} of {self.args.world_size}, step {step}. {again}")
            raise
        finally:
            self.worker_deaths.stop()
        if self.signals.stopped_by and self.state.global_step < self.state.max_steps:
            message = (
                f"The run was stopped by {self.signals.stopped_by} after step {self.state.global_step} of "
                f"{self.state.max_steps}. Continue with --resume_from_checkpoint last."
            )
            logger.warning("%s", message)
            raise TrainingInterrupted(message, code=self.signals.exit_code)
        return result

    def _check_files(self, folder: Path) -> None:
        """Check the types of the weights and the JSON files of a checkpoint before anything is loaded from it."""
        state, saved = folder / STATE, folder / RESUME_STATE
        try:
            check_weight_files(folder)
            best = TrainerState(**read_object(state)).best_model_checkpoint
            if best and Path(best).resolve().parent not in (folder.resolve().parent, self.args.folder.resolve()):
                raise CheckpointCorruptError(
                    f"'{state}' names the best checkpoint '{best}', which is in another folder and was not read. "
                    "Resume from a checkpoint of that folder, or start a new run from these weights."
                )
            self.check_resume_state(read_object(saved) if saved.is_file() else {})
        except (SafetensorError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointCorruptError(
                f"'{folder}' cannot be resumed from: its {STATE}, {RESUME_STATE} or weights are damaged ({error}). "
                "Use another checkpoint."
            ) from error

    def _check_space_of_run(self, resumed: Path | None) -> None:
        """Check before the first step that a checkpoint, with two moments of Adam, and the result fit on the disk."""
        result = num_bytes(self.model.state_dict().values()) + 2**20
        trained = num_bytes(value for value in self.model.parameters() if value.requires_grad)
        is_done = resumed is not None and resumed.name.endswith(f"-{self.args.max_steps}")
        saves = self.args.save_strategy != "no" and not is_done
        check_space(self.args.folder, result + (result + 2 * trained) * saves)

    @contextlib.contextmanager
    def writing_result(self) -> Iterator[None]:
        """Add to an error that the run is done, and how to write its result without training again."""
        try:
            yield
        except OSError as error:
            saved = [path.name for path in list_checkpoints(self.args.folder)[-1:]]
            error.add_note(
                f"All {self.state.global_step} steps are done. Free some space, then resume_from_checkpoint=last "
                f"writes the result from the last checkpoint ({saved[0] if saved else 'there is none'})."
            )
            raise

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Initialize the state; a finished run that a scheduler has queued again makes no further step."""
        start = super()._init_training_state(max_steps, *args, **kwargs)
        if not self._is_through(max_steps):
            return start
        logger.info("%d of %d steps are done. There is nothing left to train.", self.state.global_step, max_steps)
        return 2 * sys.maxsize, 0  # beyond the last epoch (sys.maxsize for a stream), so that the loop does not start

    def _is_through(self, max_steps: int) -> bool:
        return 0 < max_steps <= self.state.global_step

    def _checkpoint_to_resume(self, wanted: str | bool | None) -> Path | None:
        """Find the checkpoint on process 0; return it, or raise the error, on all processes."""
        answer: Path | CheckpointCorruptError | FileExistsError | None = None
        run = self.args.folder
        if self.is_world_process_zero():
            shutil.rmtree(run / STAGING, ignore_errors=True)
            if wanted:
                try:
                    if wanted is True or wanted == "last":
                        answer = newest_checkpoint(run)
                    else:
                        answer = Path(wanted)
                        _check_is_checkpoint(answer)
                        verify_checkpoint(answer)
                except CheckpointCorruptError as error:
                    answer = error
            elif (old := list_checkpoints(run)) and self.state.global_step == 0:
                answer = FileExistsError(
                    f"'{run}' holds {old[-1].name} of an earlier run. Continue that run with --resume_from_checkpoint "
                    "last, or set another output_dir for a new one."
                )
        answer = from_first(answer)
        if isinstance(answer, Exception):
            raise answer
        if answer is None and wanted is True:
            raise ValueError(
                f"There is no checkpoint in {run}, but resume_from_checkpoint is True. Remove it, or set it to 'last'."
            )
        if answer is None and wanted and self.is_world_process_zero():
            logger.info("There is no checkpoint in %s yet, so the run starts at its first step.", run)
        return answer

    # Saving.

    def _agree(self, good: bool) -> bool:
        """Return True if `good` is True on all processes."""
        if num_processes() == 1:
            return good
        flag = torch.tensor([int(good)], device=self.args.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag.item())

    @contextlib.contextmanager
    def _noting_write_errors(self) -> Iterator[None]:
        """Store the first write error of a checkpoint for later, as other processes may be waiting in a collective."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            if self._staging is None or not _is_write_error(error):
                raise
            self._write_error = self._write_error or error

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        run = Path(super()._get_output_dir(trial))
        final = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._write_error = None
        self._staging = run / STAGING
        try:
            with self._noting_write_errors():
                if self.args.should_save:
                    shutil.rmtree(self._staging, ignore_errors=True)
                    self._staging.mkdir(parents=True)
                    check_space(self._staging, self._checkpoint_bytes(model))
            if self._agree(self._write_error is None):
                with self._noting_write_errors():
                    super()._save_checkpoint(model, trial)
            if self._agree(self._write_error is None) and self.args.should_save:
                with self._noting_write_errors():
                    self._finish_checkpoint(self._staging / final.name, final)
            good = self._agree(self._write_error is None)
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
        finally:
            self._staging = None
        if not good:
            self.failed_saves += 1
            self.save_problem = (
                f"{self._write_error or 'the reason is in the log of another process'}; it needs about "
                f"{as_bytes(self._checkpoint_bytes(model))}, and {as_bytes(free_bytes(run))} are free"
            )
            logger.error(
                "ALARM: The checkpoint of step %d could not be written (%s). Training continues. The newest "
                "checkpoint is %s. Free some space in %s.",
                self.state.global_step, self.save_problem,
                max(list_checkpoints(run), default=None, key=lambda path: path.stat().st_mtime), run,
            )  # fmt: skip
        elif self.args.should_save:
            self.push_checkpoint(final)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(run, self.args.save_total_limit, keep=[final, *([Path(best)] if best else [])])

    def _finish_checkpoint(self, staged: Path, final: Path) -> None:
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(staged / STATE))
        write_json(staged / RESUME_STATE, self.resume_state())
        publish_checkpoint(staged, final)

    def _checkpoint_bytes(self, model: nn.Module) -> int:
        states = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        return num_bytes([*model.state_dict().values(), *states]) + 2**20

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with self._noting_write_errors():
            super()._save(output_dir, state_dict)

    def _save_scaler(self, output_dir: str) -> None:
        with self._noting_write_errors():
            super()._save_scaler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        with self._noting_write_errors():
            super()._save_rng_state(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._shards_with_full_state:
            with self._noting_write_errors():
                super()._save_optimizer_and_scheduler(output_dir)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, self.optimizer, options=options)  # by name, on process 0
        with self._noting_write_errors():
            if self.args.should_save:
                torch.save(_by_index(state), Path(output_dir, OPTIMIZER))
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir, "scheduler.pt"))

    # Loading.

    @property
    def _shards_with_full_state(self) -> bool:
        return self.is_fsdp_enabled and "FULL_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._shards_with_full_state:
            try:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            except RuntimeError as error:
                if "size mismatch" not in str(error):
                    raise
                first = next(line.strip() for line in str(error).splitlines() if "size mismatch" in line)
                raise CheckpointError(
                    f"{resume_from_checkpoint} holds another model: {first} Resume with the recipe that it was "
                    "written with; the log lists the changes."
                ) from error
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        tensors: dict[str, Any] = {}
        if self.is_world_process_zero():
            tensors.update(load_file(Path(resume_from_checkpoint, WEIGHTS)))
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model if model is None else model, tensors, options=options)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._shards_with_full_state:
            with _reading_state(checkpoint):
                super()._load_optimizer_and_scheduler(checkpoint)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        state = {}
        if self.is_world_process_zero():
            loaded = torch.load(Path(checkpoint, OPTIMIZER), map_location="cpu", weights_only=True)
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            order = [names[p] for group in self.optimizer.param_groups for p in group["params"]]
            state = _by_name(loaded, order)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(self.model, self.optimizer, state, options=options)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, "scheduler.pt"), weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading_state(checkpoint):
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raise an error for missing or unexpected tensors, which Trainer would only log."""
        if load_result.missing_keys or load_result.unexpected_keys:
            raise CheckpointError(
                f"The checkpoint has missing tensors {load_result.missing_keys} and unexpected tensors "
                f"{load_result.unexpected_keys}; expected exactly those of the trained model. Resume with the recipe "
                "that it was written with."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and add the number of checkpoints that could not be written, if any."""
        if self.failed_saves:
            logs["failed_checkpoints"] = self.failed_saves
        super().log(logs, start_time)


def _by_index(state: dict[str, Any]) -> dict[str, Any]:
    """Convert an optimizer state from parameter names to the indices of a single-process `state_dict()`."""
    if not state:
        return state
    order = [name for group in state["param_groups"] for name in group["params"]]
    index = {name: position for position, name in enumerate(order)}
    groups = [{**group, "params": [index[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {index[name]: value for name, value in state["state"].items()}, "param_groups": groups}


def _by_name(state: dict[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """Invert `_by_index`, given the parameter names in the order of the optimizer."""
    groups = [{**group, "params": [order[index] for index in group["params"]]} for group in state["param_groups"]]
    return {"state": {order[index]: value for index, value in state["state"].items()}, "param_groups": groups}
