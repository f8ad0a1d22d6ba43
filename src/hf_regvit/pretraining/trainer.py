"""The Trainer of self-distillation: one step, its schedules, its checkpoints."""

import copy
import hashlib
import itertools
import logging
import time
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerControl, TrainerState

from ..hub.facts import pretraining_facts, public_recipe
from ..models.configuration_regvit import RegViTConfig
from ..models.modeling_regvit import RegViTModel
from ..training.callbacks import Observer, TrainingProgress
from ..training.finite import FiniteGuard, out_of_memory, peak_memory_mib, without_ids
from ..training.parameter_groups import parameter_rules
from ..training.run_folder import package_versions
from ..training.trainer import CheckpointedTrainer
from .arguments import PretrainingArguments
from .crops import MultiCropStream
from .distillation import SelfDistillation, TeacherTargets
from .samplers import EpochSampler, StreamSampler
from .schedules import Schedules, StepValues, parameter_groups, set_rates

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


def _teacher(config: RegViTConfig, state: Mapping[str, Tensor]) -> RegViTModel:
    """Return the teacher backbone from the tensors of the whole network."""
    backbone = RegViTModel(copy.deepcopy(config))
    backbone.load_state_dict({name.removeprefix(EXPORTED): state[name] for name in state if name.startswith(EXPORTED)})
    return backbone.eval()


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
