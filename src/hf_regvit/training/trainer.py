"""Base of the trainers of pretraining and fine-tuning: data order, workers, seeds, resuming, speed, errors."""

import itertools
import logging
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput

from .arguments import RunArguments
from .callbacks import Observer, TrainingProgress
from .checkpoints import CheckpointedTrainer
from .distributed import full_tensor
from .finite import FiniteGuard, out_of_memory, peak_memory_mib
from .run_folder import package_versions
from .samplers import EpochSampler, StreamSampler
from .signals import leave_signals_to_parent
from .trackers import Trackers

logger = logging.getLogger(__name__)

Collator = Callable[[list[Any]], dict[str, Tensor]]  # from items of a data set to a batch

# Options of `DataLoader`, in Trainer with the prefix "dataloader_".
_LOADER_OPTIONS = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "multiprocessing_context")


class StepSeeds(TrainerCallback):
    """Callback that seeds the random draws of a step, such as drop path, by (seed, step, process).

    So they differ between processes, do not depend on draws of observers, and are resumable without stored state.
    """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Seed torch's generators of this process."""
        entropy = np.random.SeedSequence([args.seed, state.global_step, args.process_index])
        seed = int(entropy.generate_state(1, np.uint64)[0])
        torch.default_generator.manual_seed(seed)
        if args.device.type == "cuda":
            torch.cuda.manual_seed(seed)


@dataclass
class _Batches:
    """Source of the batches of an epoch: the iterator of Trainer, or its replacement after a worker restart."""

    of_epoch: Iterator[dict[str, Tensor]]
    source: Iterator[dict[str, Tensor]]
    dataset: Dataset
    failed: bool = False


class RunTrainer(CheckpointedTrainer):
    """`transformers.Trainer` with a reproducible data order and exact resuming; subclasses define the step.

    Each process reads its portion of one common order of images, which starts at any position. A checkpoint holds the
    position. On a CPU, a resumed run reproduces the uninterrupted run bit for bit, with any number of workers. The set
    of images of a step does not depend on the number of processes.

    Args:
        model: Model to train.
        args: Options of the run.
        train_dataset: Training data, indexed by the keys of the sampler.
        train_collator: Function that makes a training batch from a list of items.
        sampler: Order of the training images.
        names: Image names by index; messages show them.
        rules: Callback that is called first in every step.
        callbacks: Other callbacks.
        progress: Progress bar.
        **options: Other arguments of `transformers.Trainer`.

    Attributes:
        guard: Check of losses and gradients.
        trackers: Trackers of the run; close them after its result is written.
        fixed_options: Options that a resumed run cannot change, because the checkpoint would hold other tensors.

    Raises:
        ValueError: If one process has several GPUs (`DataParallel`).
    """

    train_dataset: Dataset  # Trainer declares a wider type
    fixed_options: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        args: RunArguments,
        *,
        train_dataset: Dataset,
        train_collator: Collator,
        sampler: EpochSampler | StreamSampler,
        names: Sequence[object] = (),
        rules: StepSeeds | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        progress: TrainingProgress | None = None,
        **options: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"There are {args.n_gpu} GPUs in one process, so Trainer would use DataParallel, which splits the "
                "step. Start the run with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
        self.train_collator, self.sampler, self.names = train_collator, sampler, names
        # Position of the data, (epoch, images), and optimizer step at which a resumed run starts.
        self._position: tuple[int, int] | None = None
        self._first_step = 0
        self._batches: _Batches | None = None
        # Time and step at the last log line. The clock starts with the first step, so that setup is not counted.
        self._window, self._started = (0.0, -1), (0.0, 0)
        self._waited = self._evaluated = 0.0  # seconds since the last log line
        # Start time of training, and the training time of the checkpoint that it resumes from.
        self._began, self._seconds_before = time.perf_counter(), 0.0
        self.guard = FiniteGuard(args.folder, names=names)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            callbacks=[rules or StepSeeds(), self.guard, *callbacks],
            **options,
        )
        self.trackers = Trackers(self)
        self.guard.check_gradients = self.accelerator.scaler is None  # a scaler skips overflowing steps itself
        # Trainer would print raw dictionaries, which the progress bar and the metrics file already cover.
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(progress or TrainingProgress())

    # Data.

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the trained parameters in groups with their settings of the optimizer."""
        raise NotImplementedError

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer with the groups of `parameter_groups`."""
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer_class(self.parameter_groups(), **options)
        return self.optimizer

    def training_data(self) -> tuple[Dataset, Collator]:
        """Return the data set and the collator of the current step."""
        return self.train_dataset, self.train_collator

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader of batches in the order of the sampler, distributed over the processes."""
        return self._data_loader(self.sampler, self.train_dataset, self.train_collator)

    def _data_loader(self, sampler: EpochSampler | StreamSampler, dataset: Dataset, collator: Collator) -> DataLoader:
        args = self.args
        loader = DataLoader(
            dataset,
            batch_size=args.per_device_train_batch_size,
            sampler=sampler,
            drop_last=True,
            collate_fn=collator,
            timeout=args.dataloader_timeout if args.dataloader_num_workers else 0,
            worker_init_fn=leave_signals_to_parent,
            **{name: getattr(args, f"dataloader_{name}") for name in _LOADER_OPTIONS},
        )
        if isinstance(sampler, StreamSampler):  # already restricted to this process
            from accelerate.data_loader import prepare_data_loader

            return prepare_data_loader(loader, self.accelerator.device, num_processes=1, put_on_device=True)
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """Return the micro-batches of one step; measure the waiting time and restart failed workers once.

        Raises:
            RuntimeError: If a worker hangs or dies a second time. The message names the images that it may have been
                reading.
        """
        started = time.perf_counter()
        if self._batches is None or self._batches.of_epoch is not epoch_iterator:
            self._batches = _Batches(epoch_iterator, epoch_iterator, self.train_dataset)
        if self.training_data()[0] is not self._batches.dataset:
            self._restart_workers(self._batches, 0)
        batches: list[dict[str, Tensor]] = []
        while len(batches) < num_batches:
            try:
                with self.worker_deaths.waiting():
                    batches.append(next(self._batches.source))
            except StopIteration:
                break
            except RuntimeError as error:
                if not isinstance(self.sampler, EpochSampler) or "DataLoader" not in str(error):
                    raise
                names = ", ".join(self._undelivered_images(len(batches)))
                if self._batches.failed:
                    error.add_note(f"This happened twice. One of these images was being read: {names}.")
                    raise
                logger.warning("%s Restarting the workers. One of these images was being read: %s.", error, names)
                self._batches.failed = True
                self._restart_workers(self._batches, len(batches))
        self._waited += time.perf_counter() - started
        return batches, None

    def _restart_workers(self, batches: _Batches, delivered: int) -> None:
        sampler = self._sampler_after(delivered)
        batches.dataset, collator = self.training_data()
        loader = self._data_loader(sampler, batches.dataset, collator)
        cast(Any, loader).set_epoch(sampler.epoch)  # accelerate's loader would count epochs from 0
        batches.source = iter(loader)

    def _sampler_after(self, micro_batches: int) -> EpochSampler:
        """Return a sampler of the current epoch that starts `micro_batches` after the first image not yet used."""
        images = micro_batches * self.args.per_device_train_batch_size * self.args.world_size
        return cast(EpochSampler, self.sampler).after(self.state.global_step - self._first_step, images)

    def _undelivered_images(self, micro_batches: int) -> list[str]:
        """Return the image names of the next two micro-batches, because the loader reads one batch ahead."""
        count = 2 * self.args.per_device_train_batch_size * self.args.world_size
        ahead = [key[1] for key in itertools.islice(self._sampler_after(micro_batches), count)]
        return [str(self.names[index] if self.names else index) for index in ahead]

    # Resuming: settings that must match, and the position to start at.

    def data_facts(self) -> dict[str, Any]:
        """Return what a resumed run compares of the data, such as the number of images and a hash of their names."""
        raise NotImplementedError

    def data_position(self) -> tuple[int, int]:
        """Return the epoch, and the number of its images that have been used."""
        return cast(EpochSampler, self.sampler).position(self.state.global_step - self._first_step)

    def start_data_at(self, epoch: int, images: int) -> int:
        """Start the data at a position; return the epoch of the first batch."""
        sampler = cast(EpochSampler, self.sampler)
        sampler.start_at(epoch, images)
        sampler.start_at(*sampler.position(0))  # turns the end of an epoch into the start of the next
        return sampler.start[0]

    def resume_state(self) -> dict[str, Any]:
        """Return data position, recipe, images per step, facts on the data, package versions and time so far."""
        return {
            "seconds": self.seconds,
            "images_per_step": self.args.images_per_step,
            "recipe": self.args.resolved(),
            "data": self.data_facts(),
            "packages": package_versions(),
            "position": self.data_position(),
        }

    def check_resume_state(self, saved: dict[str, Any]) -> None:
        """Log differences from the run that wrote a checkpoint, and reject those that change its images or tensors.

        Raises:
            ValueError: If an option of `fixed_options` differs, or the images or their number per step differ without
                the option that allows it.
        """
        now = self.resume_state()
        for part in ("recipe", "packages"):
            old, new = saved.get(part, {}), now[part]
            for name in sorted({*old, *new} - {"output_dir", "resume_from_checkpoint"}):
                is_now, was = (values.get(name, "the default") for values in (new, old))
                if is_now != was:
                    logger.warning("Changed since the checkpoint: %s is %s, was %s.", name, is_now, was)
        for name in self.fixed_options:
            if (was := saved.get("recipe", {}).get(name, is_now := now["recipe"][name])) != is_now:
                raise ValueError(
                    f"{name} is {is_now}, but the checkpoint was written with {was} and holds other tensors. Restore "
                    "the old value, or start from the model of the earlier run."
                )
        for name, option in (("images_per_step", "allow_batch_change"), ("data", "allow_data_change")):
            if name in saved and saved[name] != now[name] and not getattr(self.args, option):
                raise ValueError(
                    f"{name} is {now[name]}, but the checkpoint was written with {saved[name]}. The steps would see "
                    f"other images than in an uninterrupted run. Restore the old value, or pass --{option}."
                )
        position = saved.get("position")
        self._position = (operator.index(position[0]), operator.index(position[1])) if position else None
        self._seconds_before = 0.0 + saved.get("seconds", 0.0)

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: DataLoader
    ) -> tuple[int, int, int, int, int, int | None, int]:
        """Return Trainer's initial values, with enough epochs for a resumed run, which ends by its step count."""
        values = super().set_initial_training_values(args, dataloader)
        return (values[0] + (self._position[0] + 1 if self._position else 0), *values[1:])

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        start = super()._init_training_state(max_steps, *args, **kwargs)
        if not self._is_through(max_steps):
            start = self.start_data_at(*(self._position or self.data_position())), 0
        self._position, self._first_step = None, self.state.global_step
        return start

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.sampler, EpochSampler):  # Trainer would count from the step at which the run was resumed
            epoch, images = self.data_position()
            self.state.epoch = epoch + images / self.sampler.images_per_epoch
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # The step.

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run one forward and backward pass; the first call starts the clock."""
        if self._window[1] < 0:
            self.log({})  # log what the observers have measured before the first step
            self._window = self._started = (time.perf_counter(), self.state.global_step)
            self._waited = self._evaluated = 0.0  # the first wait is the startup of the workers
        return super().training_step(model, inputs, *args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = super()._clip_grad_norm(model)
        self.guard.see_gradients({"model": torch.as_tensor(full_tensor(norm))})
        return norm

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:  # type: ignore[override]
        """Train, and report an out-of-memory error with advice.

        Raises:
            NonFiniteError: If a loss or gradient is NaN or infinite.
            torch.OutOfMemoryError: If memory runs out; the message has the measured peak and the options to change.
        """
        self._began = time.perf_counter()
        try:
            return super().train(resume_from_checkpoint)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self.args, step=self.state.global_step) from error

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as Trainer does, outside of the time of the steps."""
        started = time.perf_counter()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._evaluated += time.perf_counter() - started

    # Speed.

    @property
    def seconds(self) -> float:
        """Training time so far in seconds, including the run that was resumed."""
        return self._seconds_before + time.perf_counter() - self._began

    def step_values(self) -> Mapping[str, float]:
        """Return what the log shows of the steps since the last line, besides Trainer's values."""
        return {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the values of the steps, speed, memory and measurements of the observers added."""
        measured, measuring = {}, 0.0
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Observer):
                values, seconds = callback.take()
                self.trackers.figures(callback.figures)
                callback.figures = {}
                measured.update(values)
                measuring += seconds
        if measured:
            measured["eval_seconds"] = measuring
        logs.update(measured)
        if not logs:
            return
        if "loss" in logs and self._window[1] >= 0:
            logs.update(self.step_values())
            logs.update(self._speed(measuring + self._evaluated))
            self._waited = self._evaluated = 0.0
        super().log(logs, start_time)

    def _speed(self, measuring: float) -> dict[str, float]:
        """Return speed since the last log line (excluding observers), remaining time (including them) and memory."""
        now, step = time.perf_counter(), self.state.global_step
        steps, seconds = step - self._window[1], max(now - self._window[0] - measuring, 1e-9)
        per_step = (now - self._started[0]) / max(step - self._started[1], 1)
        self._window = (now, step)
        values = {
            "images_per_second": self.args.images_per_step * steps / seconds,
            "data_wait_share": min(self._waited / seconds, 1.0),
            "eta_seconds": per_step * (self.state.max_steps - step),
        }
        if (peak := peak_memory_mib()) is not None:
            values["memory_mib"] = peak
        if self.args.device.type == "cuda":
            values["gpu_memory_mib"] = torch.cuda.max_memory_allocated(self.args.device) / 2**20
        return values
