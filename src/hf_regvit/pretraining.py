"""DINOv2-style self-supervised pretraining of a vision transformer with registers.

`pretrain(args)` runs the complete job. `DinoTrainer` connects `transformers.Trainer` to the two modules that implement
the recipe: `distillation` (student, teacher, heads, losses) and `optimization` (schedules, parameter rules).

Source: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision" (2023), and the released training
code, whose divisors, order of operations and schedules are followed exactly; Darcet et al., "Vision Transformers Need
Registers" (2024) for the registers, which take part in attention in every block but do not enter any loss.
"""

import copy
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import DynamoBackend
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerControl, TrainerState

from .alarms import (
    Alarm,
    CollapseAlarms,
    CollapseError,
    FiniteGuard,
    NonFiniteError,
    Recipe,
    out_of_memory,
    peak_memory_mib,
    without_ids,
)
from .augmentation import MultiCrop
from .callbacks import MetricsFile, Observer, OnlineKNN, TrainingProgress
from .checkpoints import CheckpointedTrainer
from .configuration_regvit import RegViTConfig
from .data import DinoCollator, EpochSampler, MultiCropDataset, MultiCropStream, StreamSampler
from .distillation import HeadShape, SelfDistillation, TeacherTargets, full_tensor
from .model_card import pretraining_facts, public_recipe, write_card_file
from .modeling_regvit import RegViTModel
from .monitors import observers
from .optimization import Schedules, StepValues, parameter_groups, parameter_rules, set_rates
from .pretraining_arguments import PretrainingArguments
from .run_folder import (
    BACKBONE,
    RunRecord,
    StartingPoint,
    draw_curves,
    package_versions,
    restore_training,
    run_environment,
    starting_point,
    write_json,
)

__all__ = ["DinoTrainer", "PretrainingArguments", "pretrain"]

logger = logging.getLogger(__name__)

EXPORTED = "teacher.backbone."  # prefix of the tensors that are exported


# ---- Trainer -----------------------------------------------------------------------------------------------------


class _StepRules(TrainerCallback):
    """Callback that applies the schedules before each optimizer step and updates the teacher after it."""

    schedules: Schedules
    values: StepValues

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.schedules = args.schedules(state.max_steps)
        self.values = self.schedules.at(state.global_step)
        model = kwargs["model"]
        if isinstance(model, FSDPModule):  # `joint_targets` runs outside `forward` and also needs gathered parameters
            register_fsdp_forward_method(cast(nn.Module, model), "joint_targets")

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.values = self.schedules.at(state.global_step)
        # Drop path is the only random draw of a step. Seeding it by (seed, step, process) makes it differ between
        # processes, independent of draws made by observers, and resumable without stored state.
        entropy = np.random.SeedSequence([args.seed, state.global_step, args.process_index])
        seed = int(entropy.generate_state(1, np.uint64)[0])
        torch.default_generator.manual_seed(seed)
        if args.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        frozen = state.global_step < self.schedules.freeze_backbone_steps
        set_rates(kwargs["optimizer"], self.values, freeze_backbone=frozen)
        kwargs["model"].begin_step(self.values.teacher_temperature)

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        kwargs["model"].update_teacher(self.values.teacher_momentum)
        # global_step does not include the step that ends here yet.
        if args.gram_loss_weight and (state.global_step + 1) % args.gram_refresh_steps == 0:
            kwargs["model"].refresh_gram_teacher()


@dataclass
class _Iterator:
    """Source of the batches of an epoch: the iterator of Trainer, or its replacement after a worker restart."""

    of_epoch: Any
    batches: Any
    high_resolution: bool = False
    failed: bool = False


class DinoTrainer(CheckpointedTrainer):
    """`transformers.Trainer` for `SelfDistillation`; connects the recipe, which other modules implement, to Trainer.

    A checkpoint holds the whole module (student, teacher, heads and centers), the optimizer and the position in the
    data. On a CPU, a resumed run reproduces the uninterrupted run bit for bit, with any number of workers. The set of
    images of a step does not depend on the number of processes, but their assignment to processes does. A stream
    (`IterableDataset`) is reread from the start of its epoch up to the position.

    Args:
        model: Student, teacher and losses.
        args: Arguments of the run.
        train_dataset: Map-style dataset with a length, indexed by `(epoch, index)`; see
            `hf_regvit.data.MultiCropDataset`.
        data_collator: Function that makes the keyword arguments of `SelfDistillation.forward` from a list of items.
        high_resolution: Dataset and collator of the last `args.high_resolution_steps`, with the same images. The
            position table is resampled in every forward pass; the optimizer and all schedules continue.
        callbacks: Observers.
        image_processor: Image processor that is published with the teacher when checkpoints are pushed.

    Raises:
        ValueError: If one process has several GPUs (`DataParallel`), or there is no data for the high-resolution
            steps.
    """

    model: SelfDistillation
    args: PretrainingArguments

    def __init__(
        self,
        model: SelfDistillation,
        args: PretrainingArguments,
        *,
        train_dataset: Dataset,
        data_collator: Any,
        high_resolution: tuple[Dataset, Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        image_processor: Any = None,
    ) -> None:
        if args.high_resolution_steps and high_resolution is None:
            raise ValueError(
                f"high_resolution_steps is {args.high_resolution_steps}, but no high-resolution data was given. Pass "
                "high_resolution=(dataset, collator)."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"There are {args.n_gpu} GPUs in one process, so Trainer would use DataParallel, which breaks the "
                "teacher. Start the run with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
        self._rules = _StepRules()
        self._sampler: EpochSampler | None = None
        self._stream_sampler: StreamSampler | None = None
        if isinstance(train_dataset, MultiCropStream):
            self._stream_sampler = train_dataset.sampler(rank=args.process_index, world_size=args.world_size)
        elif not isinstance(train_dataset, IterableDataset):
            parts = getattr(getattr(train_dataset, "source", None), "parts", ())
            self._sampler = EpochSampler(
                len(cast(Sized, train_dataset)),
                seed=args.seed,
                images_per_step=args.images_per_step,
                parts=parts,
                weights=args.data_weights,
            )
        self._position, self._first_step = (0, 0), 0  # start of a resumed run: (epoch, images), optimizer step
        self._high_resolution = high_resolution
        self._iterator: _Iterator | None = None
        self._targets: list[TeacherTargets] = []
        self._micro_batches: list[dict[str, Tensor]] = []
        self._terms: dict[str, tuple[Tensor | float, int]] = {}
        # Time and step at the last log line. The clock starts with the first step, so that setup is not counted.
        self._window = (0.0, -1)
        self._started = (0.0, 0)
        self._waited = 0.0  # seconds spent waiting for data since the last log line
        # Start time of training, and the training time of the checkpoint that it resumes from.
        self._began, self._seconds_before = time.perf_counter(), 0.0
        self._guard = FiniteGuard(cast(str, args.output_dir))
        self._image_processor = image_processor
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=data_collator,
            callbacks=[self._rules, self._guard, *callbacks],
        )
        if args.torch_compile:
            # Compile the blocks only: the number of masked patches, a shape of the whole module, varies per batch.
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
            model.compile_blocks(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        self._guard.check_gradients = self.accelerator.scaler is None  # a scaler skips overflowing steps itself
        # Trainer would print raw dictionaries, which the progress bar and the metrics file already cover.
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(TrainingProgress())

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator with the same precision for every parallelism: autocast over float32 parameters.

        For FSDP2, accelerate would also use bf16 to gather parameters, reduce gradients, and pass mask weights and the
        loss. This would round the prototypes, which run in float32. Parameters are gathered in float32 instead, at
        twice the number of bytes.
        """
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()

    # Data: each process reads its portion of one common order, starting at any position.

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        return self._sampler

    def get_train_dataloader(self) -> DataLoader:
        """Return the training data loader, with a timeout for workers."""
        if self._stream_sampler is not None:
            return self._data_loader(self._stream_sampler)
        if self._sampler is None:
            return super().get_train_dataloader()
        return self._data_loader(self._sampler)

    def _data_loader(self, sampler: EpochSampler | StreamSampler, *, high_resolution: bool = False) -> DataLoader:
        args = self.args
        dataset, collator = cast(Dataset, self.train_dataset), self.data_collator
        if high_resolution:
            dataset, collator = cast(tuple[Dataset, Any], self._high_resolution)
        loader = DataLoader(
            dataset,
            batch_size=args.per_device_train_batch_size,
            sampler=sampler,
            drop_last=True,
            collate_fn=collator,
            num_workers=args.dataloader_num_workers,
            timeout=args.dataloader_timeout if args.dataloader_num_workers else 0,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )
        if isinstance(sampler, StreamSampler):  # already restricted to this process
            from accelerate.data_loader import prepare_data_loader

            return prepare_data_loader(loader, self.accelerator.device, num_processes=1, put_on_device=True)
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the micro-batches of one step; measure the waiting time and restart failed workers once.

        Raises:
            RuntimeError: If a worker hangs or dies a second time. The message names the images that it may have been
                reading.
        """
        started = time.perf_counter()
        if self._iterator is None or self._iterator.of_epoch is not epoch_iterator:
            self._iterator = _Iterator(epoch_iterator, epoch_iterator)
        if self._is_high_resolution() and not self._iterator.high_resolution:
            self._iterator.high_resolution = True
            self._restart_workers(self._iterator, 0)
        batches: list[dict[str, Tensor]] = []
        while len(batches) < num_batches:
            try:
                with self.worker_deaths.waiting():
                    batches.append(next(self._iterator.batches))
            except StopIteration:
                break
            except RuntimeError as error:
                if self._sampler is None or "DataLoader" not in str(error):
                    raise
                names = ", ".join(self._undelivered_images(len(batches)))
                if self._iterator.failed:
                    error.add_note(f"This happened twice. One of these images was being read: {names}.")
                    raise
                logger.warning("%s Restarting the workers. One of these images was being read: %s.", error, names)
                self._iterator.failed = True
                self._restart_workers(self._iterator, len(batches))
        self._waited += time.perf_counter() - started
        self._micro_batches = batches if len(batches) > 1 and self.args.centering == "sinkhorn" else []
        return batches, None

    def _restart_workers(self, iterator: "_Iterator", micro_batches: int) -> None:
        sampler = self._sampler_after(micro_batches)
        loader = self._data_loader(sampler, high_resolution=iterator.high_resolution)
        cast(Any, loader).set_epoch(sampler.epoch)  # accelerate's loader would count epochs from 0
        iterator.batches = iter(loader)

    def _is_high_resolution(self) -> bool:
        """Return True if the current step is one of the high-resolution steps."""
        if not self.args.high_resolution_steps:
            return False
        return self.state.global_step >= self.args.first_high_resolution_step(self.state.max_steps)

    def _sampler_after(self, micro_batches: int) -> EpochSampler:
        """Return a sampler of the current epoch that starts `micro_batches` after the first image not yet used."""
        sampler = copy.copy(cast("EpochSampler", self._sampler))
        epoch, offset = sampler.position(self.state.global_step - self._first_step)
        per_micro_batch = self.args.per_device_train_batch_size * self.args.world_size
        sampler.start_at(epoch, offset, skip=micro_batches * per_micro_batch)
        sampler.set_epoch(epoch)
        return sampler

    def _undelivered_images(self, micro_batches: int) -> list[str]:
        """Return the image names of the next two micro-batches, because the loader reads one batch ahead."""
        args = self.args
        ahead = itertools.islice(
            self._sampler_after(micro_batches), 2 * args.per_device_train_batch_size * args.world_size
        )
        ids = getattr(getattr(self.train_dataset, "source", None), "ids", None)
        return [str(index) if ids is None else str(ids[index]) for _, index in ahead]

    @property
    def seconds(self) -> float:
        """Training time so far in seconds, including the run that was resumed."""
        return self._seconds_before + time.perf_counter() - self._began

    # Resuming: settings that must match, and the position to start at.

    def resume_state(self) -> dict[str, Any]:
        """Return data position, recipe, images per step, data fingerprint, package versions and time so far."""
        state = {
            "seconds": self.seconds,
            "images_per_step": self.args.images_per_step,
            "recipe": self.args.resolved(),
            "data": _fingerprint(self.train_dataset),
            "packages": package_versions(),
        }
        if self._sampler is not None:
            state["position"] = self._sampler.position(self.state.global_step - self._first_step)
        elif self._stream_sampler is not None:  # images of all processes since the start; a stream has no epochs
            steps = self.state.global_step - self._first_step
            state["position"] = (
                0,
                self._stream_sampler.skip * self.args.world_size + steps * self.args.images_per_step,
            )
            state["processes"] = self.args.world_size
        return state

    def check_resume_state(self, saved: dict[str, Any]) -> None:
        """Log differences from the run that wrote the checkpoint, and reject those that change its images.

        Raises:
            ValueError: If the number of images per step differs without `allow_batch_change`, or the images differ
                without `allow_data_change`.
        """
        now = self.resume_state()
        for part, unimportant in (("recipe", {"output_dir", "resume_from_checkpoint"}), ("packages", set())):
            old, new = saved.get(part, {}), now[part]
            for name in sorted(({*old, *new}) - unimportant):
                is_now, was = (values.get(name, "the default") for values in (new, old))
                if is_now != was:
                    logger.warning("Changed since the checkpoint: %s is %s, was %s.", name, is_now, was)
        for name, allowed in (
            ("images_per_step", self.args.allow_batch_change),
            ("data", self.args.allow_data_change),
        ):
            if name in saved and saved[name] != now[name] and not allowed:
                option = {"images_per_step": "allow_batch_change", "data": "allow_data_change"}[name]
                raise ValueError(
                    f"{name} is {now[name]}, but the checkpoint was written with {saved[name]}. The steps would see "
                    f"other images than in an uninterrupted run. Restore the old value, or pass --{option}."
                )
        if saved.get("processes", self.args.world_size) != self.args.world_size and self._stream_sampler is not None:
            logger.warning(
                "The stream was read by %d processes and is now read by %d. Images of the current pass may be "
                "repeated or skipped.", saved["processes"], self.args.world_size,
            )  # fmt: skip
        self._position = tuple(saved.get("position", (0, 0)))
        self._seconds_before = float(saved.get("seconds", 0.0))

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        start = super()._init_training_state(max_steps, *args, **kwargs)
        if self.is_world_process_zero():
            self._announce(max_steps)
        if self._is_through(max_steps):
            self._first_step = self.state.global_step
            return start
        if self._stream_sampler is not None:
            self._stream_sampler.start_at(self._position[1] // self.args.world_size)
            self._position, self._first_step = (0, 0), self.state.global_step
            return 0, 0
        if self._sampler is None:
            return start
        self._sampler.start_at(*self._position)
        self._sampler.start_at(*self._sampler.position(0))  # turns the end of an epoch into the start of the next
        self._position, self._first_step = (0, 0), self.state.global_step
        return self._sampler.start[0], 0

    def _announce(self, total_steps: int) -> None:
        """Log the length of the run and the peak learning rate, and warn of durations that exceed the run."""
        schedules, per_step = self.args.schedules(total_steps), self.args.images_per_step
        epochs = "" if self._sampler is None else f", {total_steps * per_step / len(self._sampler):.4g} epochs"
        logger.info(
            "%d steps of %d images%s. The learning rate rises to %.4g within %d steps.",
            total_steps, per_step, epochs, schedules.learning_rate, schedules.warmup_steps,
        )  # fmt: skip
        names = "warmup_steps", "freeze_last_layer_steps", "freeze_backbone_steps", "warmup_teacher_temperature_steps"
        for name in names:
            if getattr(schedules, name) > total_steps:
                logger.warning(
                    "%s is %d, longer than the run of %d steps. Use a value below 1 to give a fraction of the run.",
                    name, getattr(schedules, name), total_steps,
                )  # fmt: skip

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> Any:
        """Return Trainer's initial values, with enough epochs for a resumed run, which ends by its step count."""
        epochs, *others = super().set_initial_training_values(args, dataloader)
        return (epochs + (self._position != (0, 0)) * (self._position[0] + 1), *others)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._sampler is not None:  # Trainer would count from the step at which the run was resumed
            epoch, offset = self._sampler.position(self.state.global_step - self._first_step)
            self.state.epoch = epoch + offset / len(self._sampler)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # The step.

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the AdamW optimizer, with one parameter group per pair of multipliers."""
        if self.optimizer is None:
            student = self.model.student
            rules = parameter_rules(
                [name for name, _ in student.named_parameters()],
                num_layers=self.model.student_backbone.config.num_hidden_layers,
                layer_decay=self.args.layer_decay,
                patch_embed_lr_multiplier=self.args.patch_embed_lr_multiplier,
            )
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer_class(parameter_groups(student, rules), **options)
        return self.optimizer

    def _get_learning_rate(self) -> float:
        # The first group of the optimizer has the smallest rate; the log shows the rate for a multiplier of 1.
        return self._rules.values.learning_rate

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        # Unscale once, before the parts are clipped separately: a second unscaling under fp16 raises an error.
        self.accelerator.unscale_gradients()
        norms = self.model.clip_gradients(self.args.max_grad_norm)
        self._guard.see_gradients(norms)
        self._record({f"grad_norm_{name}": norm for name, norm in norms.items()})
        clipped = {name: (norm > self.args.max_grad_norm).float() for name, norm in norms.items()}
        self._record({f"clipped_{name}": share for name, share in clipped.items()})
        return torch.stack(list(norms.values())).norm()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of one micro-batch; `FiniteGuard` checks once per step that it is finite everywhere."""
        tensors: dict[str, Any] = without_ids(inputs)
        if self._micro_batches:  # first micro-batch of a step: compute the targets of all of them jointly
            batches = [self._prepare_inputs(without_ids(batch)) for batch in self._micro_batches]
            self._micro_batches = []
            with self.accelerator.autocast():
                self._targets = self.model.joint_targets(batches)
        if self._targets:
            tensors = {**tensors, "targets": self._targets.pop(0)}
        with self.accelerator.autocast():
            outputs = model(**tensors)
        self._guard.see_batch(inputs.get("sample_ids"), inputs.get("epochs"), outputs)
        self._record({name: value for name, value in outputs.items() if name != "loss"})
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run one forward and backward pass; the first call starts the clock."""
        if self._window[1] < 0:
            self.log({})  # log what the observers have measured before the first step
            self._window = self._started = (time.perf_counter(), self.state.global_step)
            self._waited = 0.0  # the first wait is the startup of the workers
        return super().training_step(model, inputs, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train the network, and report an out-of-memory error with advice.

        Raises:
            NonFiniteError: If a loss or gradient is NaN or infinite.
            torch.OutOfMemoryError: If memory runs out; the message has the measured peak and the options to change.
        """
        self._began = time.perf_counter()
        try:
            return super().train(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, self.args, step=self.state.global_step) from error

    def _record(self, terms: dict[str, Tensor]) -> None:
        """Sum terms on the device, so that their means are read once per log line instead of once per step."""
        for name, value in terms.items():
            total, count = self._terms.get(name, (0.0, 0))
            self._terms[name] = (total + value.detach(), count + 1)

    def _mean_terms(self) -> dict[str, float]:
        """Return the mean of every recorded term over the steps since the last log line and over the processes."""
        means = torch.stack([torch.as_tensor(total).float() / count for total, count in self._terms.values()])
        return dict(zip(self._terms, self.accelerator.reduce(means, reduction="mean").tolist(), strict=True))

    # Pushes publish the backbone of the teacher, as at the end of the run.

    def hub_model(self, state: Mapping[str, Tensor]) -> RegViTModel:
        """Return the teacher backbone from the tensors of a checkpoint."""
        return _teacher(self.model.student_backbone.config, state)

    def hub_processor(self) -> Any:
        """Return the image processor of the run."""
        return self._image_processor

    def hub_facts(self) -> dict[str, Any]:
        """Return the recipe as fields of the model card."""
        return pretraining_facts(public_recipe(self.args.resolved()))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the loss terms, schedules, speed, memory and measurements of the observers added."""
        measured, measuring = {}, 0.0
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Observer):
                measured.update(callback.take())
                measuring += callback.take_seconds()
        if measured:
            measured["eval_seconds"] = measuring
        logs.update(measured)
        if not logs:
            return
        if "loss" in logs and self._terms:
            logs.update(self._mean_terms())
            logs.update(self._rules.values._asdict())
            logs.update(self._speed(measuring))
            self._terms, self._waited = {}, 0.0
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


# ---- The job -----------------------------------------------------------------------------------------------------


def pretrain(
    args: PretrainingArguments,
    *,
    model: RegViTConfig | RegViTModel | None = None,
    train_dataset: Dataset | None = None,
    data_collator: Any = None,
    image_processor: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> RegViTModel:
    """Pretrain a backbone on unlabeled images and return the EMA teacher.

    Writes to `args.output_dir`: `backbone/` (the teacher as a RegViTModel with its image processor and a model card,
    for `AutoModel.from_pretrained`), `training/` (student, heads and centers as safetensors, for continued
    pretraining), `metrics.jsonl`, `panels/`, `curves.png`, `resolved_recipe.yaml` (all arguments, readable as a
    recipe), `environment.json`, `report.json` and the checkpoints of Trainer. A run that was stopped by an alarm
    writes everything except `backbone/` and `training/`.

    Args:
        args: Arguments of the run. `resume_from_checkpoint` is a checkpoint folder, or `"last"` for the newest valid
            checkpoint in `output_dir`, if there is one.
        model: Configuration of the backbone, or a backbone to continue from (copied, not modified); default: the
            backbone that `args` describe.
        train_dataset: Dataset indexed by `(epoch, index)` whose items hold `global_crops` (2, 3, S, S), `local_crops`
            (L, 3, s, s), `sample_id` and `epoch`; default: multi-crop views of `args.data`.
        data_collator: Function from a list of such items to the arguments of `SelfDistillation.forward`; default:
            stacks the items and draws block masks.
        image_processor: Image processor that is saved with the backbone; default: resize, center crop to
            `args.evaluation_size` or `args.global_crop_size`, ImageNet statistics.
        callbacks: Observers, such as `hf_regvit.callbacks.OnlineKNN`.

    Returns:
        The teacher backbone in eval mode.

    Raises:
        ValueError: If arguments contradict each other, or there are fewer images than one step needs.
        NonFiniteError: If a loss or gradient is NaN or infinite.
        CollapseError: If a collapse alarm is raised and `args.stop_on_collapse` is set.
    """
    from .images import default_image_processor

    set_seed(args.seed)
    start = _starting_point(args, model)
    network = _build_network(args, start.student if start else model)
    if start:
        restore_training(network, start)
    config = network.student_backbone.config
    if train_dataset is None:
        train_dataset = _build_dataset(args, config)
    if isinstance(train_dataset, MultiCropStream):
        if args.max_steps <= 0:
            raise ValueError(
                f"max_steps is {args.max_steps}, but a stream has no length, so epochs cannot end the run. Set "
                "--max_steps to at least 1."
            )
    elif (num_images := len(cast(Sized, train_dataset))) < args.images_per_step:
        raise ValueError(
            f"There are {num_images} images for steps of {args.images_per_step}; expected at least one full step per "
            "epoch. Lower per_device_train_batch_size or gradient_accumulation_steps, start fewer processes, or add "
            "images (--data accepts several sources)."
        )
    if data_collator is None:
        data_collator = _build_collator(args, config, args.global_crop_size)
    high_resolution = _enlarged(args, config, train_dataset) if args.high_resolution_steps else None
    if image_processor is None:
        size = args.evaluation_size
        last = args.high_resolution_size if args.high_resolution_steps else args.global_crop_size
        image_processor = default_image_processor(size or last, resize=size)
    output = Path(cast(str, args.output_dir))  # Trainer sets a default if it was not given
    watching = observers(
        args,
        train_dataset,
        image_processor=image_processor,
        folder=output,
        image_size=args.global_crop_size,
        panel_size=args.panel_size or args.global_crop_size,
    )
    metrics = MetricsFile(output / "metrics.jsonl")
    alarms = CollapseAlarms(_recipe_of(args, config), stop=args.stop_on_collapse, metrics=metrics)
    trainer = DinoTrainer(
        network,
        args,
        train_dataset=train_dataset,
        data_collator=data_collator,
        high_resolution=high_resolution,
        callbacks=[RunRecord(output, args.resolved()), *callbacks, *watching, metrics, alarms],
        image_processor=image_processor,
    )
    _train(trainer, alarms)
    state = _whole_state(network)
    backbone = _teacher(config, state)
    if trainer.is_world_process_zero():
        backbone.save_pretrained(output / "backbone")
        image_processor.save_pretrained(output / "backbone")
        _save_training_state(state, output / "training")
        report = json.loads((output / "report.json").read_text())
        facts = pretraining_facts(public_recipe(args.resolved()), report, run_environment(args))
        write_card_file(output / BACKBONE, parameters=backbone.num_parameters(), **trainer.hub_names(), **facts)
        trainer.push_result(output / BACKBONE)
    return backbone


def _starting_point(args: PretrainingArguments, model: RegViTConfig | RegViTModel | None) -> StartingPoint | None:
    if args.init_from is None:
        return None
    if model is not None:
        raise ValueError(f"Got both init_from='{args.init_from}' and a model; expected only one. Remove one of them.")
    start = starting_point(
        args.init_from,
        num_register_tokens=args.num_register_tokens,
        image_size=args.global_crop_size,
        register_init_std=args.register_init_std,
        drop_path_rate=args.drop_path_rate,
        drop_path_mode=args.drop_path_mode,
        seed=args.seed,
    )
    if args.process_index == 0:
        logger.info("Starting from '%s'. %s", args.init_from, " ".join(start.changes))
        if ignored := _ignored_fields(args, start.student.config):
            logger.warning("The backbone comes from '%s'. Ignored: %s.", args.init_from, ", ".join(ignored))
    return start


def _ignored_fields(args: PretrainingArguments, config: RegViTConfig) -> list[str]:
    """Return the backbone options that were given but differ from the backbone to start from."""
    names = ("patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "use_swiglu_ffn")
    defaults = {item.name: item.default for item in dataclasses.fields(args)}
    given = {name: getattr(args, name) for name in (*names, "layerscale_value")}
    return [
        f"{name} {value} (it has {getattr(config, name)})"
        for name, value in given.items()
        if value != defaults[name] and value != getattr(config, name)
    ]


def _recipe_of(args: PretrainingArguments, config: RegViTConfig) -> Recipe:
    return Recipe(
        num_prototypes=args.head_num_prototypes,
        images=args.per_device_train_batch_size,
        num_local_crops=args.num_local_crops,
        dino_loss_weight=args.dino_loss_weight,
        num_register_tokens=config.num_register_tokens,
        width=config.hidden_size,
    )


def _train(trainer: DinoTrainer, alarms: CollapseAlarms) -> None:
    """Train, and write the report and the curves even if an alarm stops the run.

    Raises:
        NonFiniteError: If a loss or gradient is NaN or infinite.
        CollapseError: If a collapse alarm is raised and alarms stop the run.
    """
    started = time.perf_counter()
    stopped: Exception | None = None
    try:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        if alarms.stop and alarms.raised:
            last = alarms.raised[-1]
            stopped = CollapseError(f"Stopped at step {last.step} by the alarm {last.name}: {last.message}")
    except NonFiniteError as error:
        alarms.record(Alarm("not_finite", trainer.state.global_step, str(error)), trainer.state)
        stopped = error
    output = Path(cast(str, trainer.args.output_dir))
    if trainer.is_world_process_zero():
        report = _report(trainer, since_start=time.perf_counter() - started)
        report |= {"alarms": [dataclasses.asdict(alarm) for alarm in alarms.raised], "stopped": stopped is not None}
        write_json(output / "report.json", report)
        draw_curves(output, num_prototypes=trainer.args.head_num_prototypes)
    if stopped is not None:
        raise stopped


def _build_network(args: PretrainingArguments, model: RegViTConfig | RegViTModel | None) -> SelfDistillation:
    """Build the network, with the student from a configuration, a backbone or the arguments."""
    if isinstance(model, RegViTModel):
        backbone = copy.deepcopy(model)
        if not model.config.use_mask_token:
            backbone = RegViTModel(_with_mask_token(model.config))
            missing, unexpected = backbone.load_state_dict(model.state_dict(), strict=False)
            if missing != ["embeddings.mask_token"] or unexpected:
                raise ValueError(
                    f"The backbone to continue from has missing tensors {missing} and unexpected tensors "
                    f"{unexpected}; expected a plain RegViTModel without an extra pooler."
                )
        # from_pretrained leaves a model in eval mode, and the caller may have frozen parts of it.
        backbone.train().requires_grad_(True)
    else:
        backbone = RegViTModel(args.backbone_config() if model is None else _with_mask_token(model))
    shape = HeadShape(args.head_num_prototypes, args.head_hidden_size, args.head_bottleneck_size, args.head_num_layers)
    ibot_shape = dataclasses.replace(
        shape, num_prototypes=args.ibot_head_num_prototypes, bottleneck_size=args.ibot_head_bottleneck_size
    )
    ratio = shape.num_prototypes / (2 * args.per_device_train_batch_size * args.world_size)
    if ratio > 32:
        logger.warning(
            "head_num_prototypes=%d is %.0f times the %d global crops of a micro-batch. Small runs need a ratio of at "
            "most 32; set, for example, head_num_prototypes=%d.",
            shape.num_prototypes,
            ratio,
            shape.num_prototypes // ratio,
            16 * shape.num_prototypes // ratio,
        )
    return SelfDistillation(
        backbone,
        dino_head=shape,
        ibot_head=ibot_shape if args.separate_ibot_head else None,
        centering=args.centering,
        center_momentum=args.center_momentum,
        student_temperature=args.student_temperature,
        dino_loss_weight=args.dino_loss_weight,
        ibot_loss_weight=args.ibot_loss_weight,
        koleo_loss_weight=args.koleo_loss_weight,
        koleo_gathered=args.koleo_gathered,
        koleo_neighbours=args.koleo_neighbours,
        gram_loss_weight=args.gram_loss_weight,
    )


def _with_mask_token(config: RegViTConfig) -> RegViTConfig:
    config = copy.deepcopy(config)
    config.use_mask_token = True
    return config


def _build_dataset(args: PretrainingArguments, config: RegViTConfig) -> Dataset:
    """Build the dataset of multi-crop views of `args.data`."""
    from .data import BadImages
    from .images import load_images, stream_images

    multi_crop = _build_multi_crop(args, config, args.global_crop_size, args.local_crop_size)
    columns: Any = {"image_column": args.image_column, "label_column": args.label_column}
    record = Path(cast(str, args.output_dir)) / "bad_images.jsonl"
    if args.process_index == 0 and not args.resume_from_checkpoint:
        record.unlink(missing_ok=True)  # left by an earlier run, whose images may have been repaired since
    if args.streaming:
        streams = [stream_images(one, **columns) for one in args.data]
        bad_images = BadImages(record, max_bad_share=args.max_bad_share)
        return MultiCropStream(streams, multi_crop, seed=args.seed, weights=args.data_weights, bad_images=bad_images)
    source = load_images(args.data, split="train", **columns)
    bad_images = BadImages(record, max_bad_share=args.max_bad_share, num_images=len(source))
    return MultiCropDataset(source, multi_crop, seed=args.seed, bad_images=bad_images)


def _build_multi_crop(
    args: PretrainingArguments, config: RegViTConfig, global_size: int, local_size: int
) -> MultiCrop:
    same_name = ["num_local_crops", "jitter_probability", "brightness", "contrast", "saturation", "hue"]
    same_name += ["grayscale_probability", "blur", "blur_kernel_size", "blur_sigma", "solarize_probability"]
    same_name += ["flip_probability", "share_jitter", "locals_from_globals"]
    return MultiCrop(
        global_size=global_size,
        local_size=local_size,
        global_scale=args.global_crop_scale,
        local_scale=args.local_crop_scale,
        patch_size=math.lcm(*config.patch_shape),
        **{name: getattr(args, name) for name in same_name},
    )


def _build_collator(args: PretrainingArguments, config: RegViTConfig, global_size: int) -> DinoCollator:
    rows, columns = (global_size // side for side in config.patch_shape)
    return DinoCollator(
        (rows, columns), mask_ratio=args.mask_ratio, mask_probability=args.mask_probability, seed=args.seed
    )


def _enlarged(args: PretrainingArguments, config: RegViTConfig, dataset: Dataset) -> tuple[Dataset, DinoCollator]:
    """Return a dataset of the same images, and its collator, with the crops of the high-resolution steps."""
    if not isinstance(dataset, MultiCropDataset):
        raise ValueError(
            f"high_resolution_steps requires a MultiCropDataset, not {type(dataset).__name__}. Use DinoTrainer and "
            "its high_resolution argument instead."
        )
    size, local_size = args.high_resolution_size, args.high_resolution_local_size or args.local_crop_size
    larger = copy.copy(dataset)  # shares the cache of decoded images
    larger.multi_crop = _build_multi_crop(args, config, size, local_size)
    return larger, _build_collator(args, config, size)


def _whole_state(network: SelfDistillation) -> dict[str, Tensor]:
    """Return all tensors of the network on the CPU of every process; tensors sharded by FSDP2 are gathered."""
    return {name: full_tensor(tensor.detach()).cpu().contiguous() for name, tensor in network.state_dict().items()}


def _teacher(config: RegViTConfig, state: Mapping[str, Tensor]) -> RegViTModel:
    """Return the teacher backbone from the tensors of the whole network."""
    backbone = RegViTModel(copy.deepcopy(config))
    backbone.load_state_dict({name.removeprefix(EXPORTED): state[name] for name in state if name.startswith(EXPORTED)})
    return backbone.eval()


def _save_training_state(state: dict[str, Tensor], folder: Path) -> None:
    """Save student, teacher heads and centers, one file each, for continued pretraining."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "student": {name.removeprefix("student."): state[name] for name in state if name.startswith("student.")},
        "teacher_heads": {
            name.removeprefix("teacher."): state[name]
            for name in state
            if name.startswith("teacher.") and "_head." in name
        },
        "centers": {name: state[name] for name in state if "_center." in name},
    }
    for name, tensors in parts.items():
        if tensors:
            save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})


def _fingerprint(dataset: Any) -> dict[str, Any]:
    """Return the number of images and a hash of their names in order, or None if they have no names."""
    ids = getattr(getattr(dataset, "source", None), "ids", None)
    count = len(dataset) if isinstance(dataset, Sized) else None
    if isinstance(dataset, MultiCropStream):
        return {"shards": [stream.num_shards for stream in dataset.streams]}
    return {
        "images": count,
        "names_sha256": None
        if ids is None
        else hashlib.sha256("\0".join(map(str, ids)).encode("utf-8", "surrogateescape")).hexdigest(),
    }


def _report(trainer: DinoTrainer, *, since_start: float) -> dict[str, Any]:
    """Return the summary of a run."""
    watching = sum(item.seconds for item in trainer.callback_handler.callbacks if isinstance(item, Observer))
    history = trainer.state.log_history
    losses = [entry for entry in history if "loss" in entry]
    judges = [item for item in trainer.callback_handler.callbacks if isinstance(item, OnlineKNN)]
    return {
        "steps": trainer.state.global_step,
        "images_seen": trainer.state.global_step * trainer.args.images_per_step,
        # A stream has no length; there, Trainer counts the fraction of the run instead.
        "epochs": None
        if isinstance(trainer.train_dataset, IterableDataset | MultiCropStream)
        else trainer.state.epoch,
        "seconds": trainer.seconds,
        "monitor_share": watching / max(since_start, 1e-9),
        "peak_memory_mib": peak_memory_mib(),
        "parameters": {
            name: sum(p.numel() for p in part.parameters()) for name, part in trainer.model.student.items()
        },
        "final": losses[-1] if losses else {},
        "knn": [
            {
                key: value
                for key, value in entry.items()
                if key.startswith(("eval_knn", "eval_linear")) or key == "step"
            }
            for entry in history
            if any(key.startswith("eval_knn") for key in entry)
        ],
        "knn_images": [
            {
                "fitted_on": len(judge.train_images),
                "judged": len(judge.heldout_images),
                "held_out": judge.is_held_out,
            }
            for judge in judges
        ],
    }
