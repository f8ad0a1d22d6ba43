"""The Trainer of self-distillation: one step, its schedules, its data."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, cast

import torch
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_callback import TrainerControl, TrainerState

from ..hub.facts import pretraining_facts, public_recipe
from ..models.modeling_regvit import RegViTModel
from ..models.saving import as_bytes
from ..training.finite import free_memory, memory_advice, without_ids
from ..training.parameter_groups import parameter_rules
from ..training.run_folder import names_digest
from ..training.samplers import EpochSampler, StreamSampler
from ..training.trainer import Collator, RunTrainer, StepSeeds
from .arguments import PretrainingArguments
from .continuation import memory_of_step
from .crops import MultiCropStream
from .distillation import SelfDistillation, TeacherTargets
from .feature_distillation import FeatureDistillation
from .network import StudentAndTeacher, tensors_below
from .schedules import Schedules, StepValues, parameter_groups, set_rates

logger = logging.getLogger(__name__)

EXPORTED = "teacher.backbone."  # prefix of the tensors that are exported


class _StepRules(StepSeeds):
    """Callback that applies the schedules before each optimizer step and updates the teacher after it."""

    schedules: Schedules
    values: StepValues

    def __init__(self, args: PretrainingArguments) -> None:
        self.args = args

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.schedules = self.args.schedules(state.max_steps)
        self.values = self.schedules.at(state.global_step)
        model = kwargs["model"]
        # `joint_targets` runs outside `forward` and also needs gathered parameters.
        if isinstance(model, FSDPModule) and isinstance(model, SelfDistillation):
            register_fsdp_forward_method(cast(nn.Module, model), "joint_targets")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_step_begin(args, state, control)
        self.values = self.schedules.at(state.global_step)
        frozen = state.global_step < self.schedules.freeze_backbone_steps
        set_rates(kwargs["optimizer"], self.values, freeze_backbone=frozen)
        kwargs["model"].begin_step(self.values.teacher_temperature)

    def on_optimizer_step(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        kwargs["model"].update_teacher(self.values.teacher_momentum)
        # global_step does not include the step that ends here yet.
        every = self.args.gram_refresh_steps if self.args.gram_loss_weight else 0
        if every and (state.global_step + 1) % every == 0:
            kwargs["model"].refresh_gram_teacher()


class DinoTrainer(RunTrainer):
    """`RunTrainer` for one of the two objectives; connects the recipe, which other modules implement, to Trainer.

    A checkpoint holds the whole module (student, teacher, heads and centers), the optimizer and the position in the
    data. A stream is reread from the start of its epoch up to the position.

    Args:
        model: Student, teacher and losses.
        args: Arguments of the run.
        train_dataset: Map-style dataset with a length, indexed by `(epoch, index)`; see
            `hf_regvit.data.MultiCropDataset`.
        data_collator: Function that makes the keyword arguments of `model.forward` from a list of items.
        high_resolution: Dataset and collator of the last `args.high_resolution_steps`, with the same images. The
            position table is resampled in every forward pass; the optimizer and all schedules continue.
        callbacks: Observers.
        image_processor: Image processor that is published with the teacher when checkpoints are pushed.

    Raises:
        ValueError: If one process has several GPUs (`DataParallel`).
    """

    model: StudentAndTeacher
    args: PretrainingArguments
    image_processor: BaseImageProcessor  # `pretrain` always gives one
    fixed_options = ("mode", "num_trained_blocks", "lora_r", "lora_target_modules")

    def __init__(
        self,
        model: StudentAndTeacher,
        args: PretrainingArguments,
        *,
        train_dataset: Dataset,
        data_collator: Collator,
        high_resolution: tuple[Dataset, Collator] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        image_processor: BaseImageProcessor | None = None,
    ) -> None:
        source = getattr(train_dataset, "source", None)
        sampler: EpochSampler | StreamSampler
        if isinstance(train_dataset, MultiCropStream):
            sampler = train_dataset.sampler(rank=args.process_index, world_size=args.world_size)
        else:
            sampler = EpochSampler(
                len(cast(Sized, train_dataset)),
                **args.subset("seed", "images_per_step"),
                parts=getattr(source, "parts", ()),
                weights=args.data_weights,
            )
        self._rules = _StepRules(args)
        self._high_resolution = high_resolution
        self._targets: list[TeacherTargets] = []
        self._micro_batches: list[dict[str, Tensor]] = []
        self._terms: dict[str, tuple[Tensor | float, int]] = {}
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            train_collator=data_collator,
            sampler=sampler,
            names=getattr(source, "ids", ()),
            rules=self._rules,
            callbacks=callbacks,
            image_processor=image_processor,
        )
        if args.torch_compile:
            # Compile the blocks only: the number of masked patches, a shape of the whole module, varies per batch.
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
            model.compile_blocks(backend=args.torch_compile_backend, mode=args.torch_compile_mode)

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator with the same precision for every parallelism: autocast over float32 parameters.

        For FSDP2, accelerate would also use bf16 to gather parameters, reduce gradients, and pass mask weights and the
        loss. This would round the prototypes, which run in float32. Parameters are gathered in float32 instead, at
        twice the number of bytes.
        """
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()

    # Data.

    def training_data(self) -> tuple[Dataset, Collator]:
        """Return the data set and the collator of the current step, which the high-resolution steps replace."""
        steps, first = self.args.high_resolution_steps, self.args.first_high_resolution_step(self.state.max_steps)
        if steps and self.state.global_step >= first:
            return cast(tuple[Dataset, Collator], self._high_resolution)
        return super().training_data()

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """Return the micro-batches of one step; with Sinkhorn, their targets are computed jointly."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_batches = batches if len(batches) > 1 and self.model.joins_targets else []
        return batches, count

    def data_facts(self) -> dict[str, Any]:
        """Return the number of images and a hash of their names in order, or None if they have no names."""
        if isinstance(self.train_dataset, MultiCropStream):
            return {"shards": [stream.num_shards for stream in self.train_dataset.streams]}
        count = len(cast(Sized, self.train_dataset))
        return {"images": count, "names_sha256": names_digest(self.names) if self.names else None}

    def data_position(self) -> tuple[int, int]:
        """Return epoch and images, or for a stream, which has no epochs, 0 and the images of all processes so far."""
        if not isinstance(self.sampler, StreamSampler):
            return super().data_position()
        steps = self.state.global_step - self._first_step
        return 0, self.sampler.skip * self.args.world_size + steps * self.args.images_per_step

    def start_data_at(self, epoch: int, images: int) -> int:
        """Start the data at a position; return the epoch of the first batch."""
        if not isinstance(self.sampler, StreamSampler):
            return super().start_data_at(epoch, images)
        self.sampler.start_at(images // self.args.world_size)
        return 0

    def resume_state(self) -> dict[str, Any]:
        """Return the state of every run; for a stream, the number of processes; for distillation, the teachers."""
        state = super().resume_state()
        if isinstance(self.sampler, StreamSampler):
            state["processes"] = self.args.world_size
        if isinstance(self.model, FeatureDistillation):
            state["teachers"] = self.model.digests
        return state

    def check_resume_state(self, saved: dict[str, Any]) -> None:
        """Check the state of every run; warn if a stream is read by another number of processes.

        Raises:
            ValueError: The frozen teachers have other weights, or what the base class checks.
        """
        super().check_resume_state(saved)
        if isinstance(self.model, FeatureDistillation) and saved.get("teachers") != self.model.digests:
            raise ValueError(
                f"The weights of teacher={self.args.teacher} differ from those of the run that wrote the checkpoint. "
                "Restore the old teachers, or start a new run from its backbone with --init_from."
            )
        if saved.get("processes", self.args.world_size) != self.args.world_size:
            logger.warning(
                "The stream was read by %d processes and is now read by %d. Images of the current pass may be "
                "repeated or skipped.", saved["processes"], self.args.world_size,
            )  # fmt: skip

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        start = super()._init_training_state(max_steps, *args, **kwargs)
        if self.is_world_process_zero():
            self._announce(max_steps)
        return start

    def _announce(self, total_steps: int) -> None:
        """Log the length of the run and the peak learning rate, and warn of durations that exceed the run."""
        schedules, per_step, epochs = self.args.schedules(total_steps), self.args.images_per_step, ""
        if isinstance(self.sampler, EpochSampler):
            epochs = f", {total_steps * per_step / self.sampler.images_per_epoch:.4g} epochs"
        logger.info(
            "%d steps of %d images%s. The learning rate rises to %.4g within %d steps.",
            total_steps, per_step, epochs, schedules.learning_rate, schedules.warmup_steps,
        )  # fmt: skip
        needed, free = memory_of_step(self.model, self.args), free_memory(self.args.device)
        shown = ", ".join(f"{name} {as_bytes(size)}" for name, size in needed.items())
        logger.info("Memory of a process, estimated: %s. Free: %s.", shown, as_bytes(free))
        if sum(needed.values()) - needed["weights"] > free and not self.is_fsdp_enabled:  # the weights are loaded
            logger.warning("Memory will probably run out. Try, in this order: %s.", memory_advice(self.args))
        names = "warmup_steps", "freeze_last_layer_steps", "freeze_backbone_steps", "warmup_teacher_temperature_steps"
        for name in names:
            if getattr(schedules, name) > total_steps:
                logger.warning(
                    "%s is %d, longer than the run of %d steps. Use a value below 1 to give a fraction of the run.",
                    name, getattr(schedules, name), total_steps,
                )  # fmt: skip

    # The step.

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return one group per pair of multipliers."""
        student = self.model.student
        rules = parameter_rules(
            [name for name, _ in student.named_parameters()],
            num_layers=self.model.student_backbone.config.num_hidden_layers,
            **self.args.subset("layer_decay", "patch_embed_lr_multiplier"),
        )
        return parameter_groups(student, rules)

    def _get_learning_rate(self) -> float:
        # The first group of the optimizer has the smallest rate; the log shows the rate for a multiplier of 1.
        return self._rules.values.learning_rate

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        # Unscale once, before the parts are clipped separately: a second unscaling under fp16 raises an error.
        self.accelerator.unscale_gradients()
        norms = self.model.clip_gradients(self.args.max_grad_norm)
        self.guard.see_gradients(norms)
        self._record({f"grad_norm_{name}": norm for name, norm in norms.items()})
        self._record({f"clipped_{name}": (norm > self.args.max_grad_norm).float() for name, norm in norms.items()})
        return torch.stack(list(norms.values())).norm()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss of one micro-batch; `FiniteGuard` checks once per step that it is finite everywhere."""
        tensors: dict[str, Any] = without_ids(inputs)
        if self._micro_batches:  # first micro-batch of a step: compute the targets of all of them jointly
            batches = [self._prepare_inputs(without_ids(batch)) for batch in self._micro_batches]
            self._micro_batches = []
            with self.accelerator.autocast():
                self._targets = cast(SelfDistillation, self.model).joint_targets(batches)
        if self._targets:
            tensors = {**tensors, "targets": self._targets.pop(0)}
        with self.accelerator.autocast():
            outputs = model(**tensors)
        self.guard.see_batch(inputs.get("sample_ids"), inputs.get("epochs"), outputs)
        self._record({name: value for name, value in outputs.items() if name != "loss"})
        return outputs["loss"]

    def _record(self, terms: dict[str, Tensor]) -> None:
        """Sum terms on the device, so that their means are read once per log line instead of once per step."""
        for name, value in terms.items():
            total, count = self._terms.get(name, (0.0, 0))
            self._terms[name] = (total + value.detach(), count + 1)

    def step_values(self) -> Mapping[str, float]:
        """Return the mean of every term since the last log line, over steps and processes, and the schedules."""
        terms, self._terms = self._terms, {}
        means = torch.stack([torch.as_tensor(total).float() / count for total, count in terms.values()])
        means = self.accelerator.reduce(means, reduction="mean")
        return dict(zip(terms, means.tolist(), strict=True)) | self._rules.values._asdict()

    # Pushes publish the backbone of the teacher, as at the end of the run.

    def hub_model(self, state: Mapping[str, Tensor]) -> RegViTModel:
        """Return the teacher backbone from the tensors of a checkpoint."""
        backbone = RegViTModel(copy.deepcopy(self.model.student_backbone.config))
        backbone.load_state_dict(tensors_below(EXPORTED, self.model.plain(state)))
        return backbone.eval()

    def hub_facts(self) -> dict[str, Any]:
        """Return the recipe as fields of the model card."""
        return pretraining_facts(public_recipe(self.args.resolved()))
