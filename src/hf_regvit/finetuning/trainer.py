"""The Trainer of fine-tuning: loaders, optimizer groups and progress."""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import EarlyStoppingCallback, EvalPrediction, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerControl, TrainerState

from ..hub.facts import finetuning_facts, public_recipe
from ..models.manifest import STATE, WEIGHTS, verify_checkpoint
from ..training.callbacks import TrainingProgress
from ..training.distributed import full_tensor
from ..training.finite import FiniteGuard, out_of_memory, without_ids
from ..training.parameter_groups import ParameterRule, parameter_rules
from ..training.run_folder import package_versions
from ..training.trainer import CheckpointedTrainer
from .arguments import FinetuningArguments
from .data import Task, TrainSampler, fingerprint, stack
from .model import _whole_model

logger = logging.getLogger(__name__)

_SPEED = ("runtime", "samples_per_second", "steps_per_second", "epoch")  # these describe the evaluation, not the model
_TOKENS = ("position_embeddings", "cls_token", "register_tokens", "mask_token")


# ---- Trainer -----------------------------------------------------------------------------------------------------


class _RunRules(TrainerCallback):
    """Callback for reproducible runs: sets the sampler's epoch and seeds the random draws of drop path per step."""

    def __init__(self, sampler: TrainSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Trainer and accelerate do not set the epoch of the sampler if the loader skips the beginning of an epoch.
        self.sampler.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        entropy = np.random.SeedSequence([args.seed, state.global_step, args.process_index])
        seed = int(entropy.generate_state(1, np.uint64)[0])
        torch.default_generator.manual_seed(seed)
        if args.device.type == "cuda":
            torch.cuda.manual_seed(seed)


class _Progress(TrainingProgress):
    """Progress bar that also shows the metric of the last evaluation."""

    def __init__(self, metric: str) -> None:
        super().__init__()
        self.metric = metric

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Store the metric of an evaluation until the next one."""
        value = (logs or {}).get(f"eval_{self.metric}")
        if value is not None:
            self._shown[self.metric] = f"{value:.4f}"
        super().on_log(args, state, control, logs, **kwargs)


@dataclass
class _Batches:
    """Source of the batches of an epoch: Trainer's iterator, or its replacement after a worker failure."""

    of_epoch: Any
    source: Iterator[dict[str, Tensor]]
    failed: bool = False


class FinetuningTrainer(CheckpointedTrainer):
    """`transformers.Trainer` for a `Task`, with atomic checkpoints, exact resuming, and the task's loss and metrics.

    Args:
        model: Model to train; frozen parameters have `requires_grad=False`.
        args: Arguments of the run.
        task: Task with its data, loss and metrics.
        processor: Image processor that is saved with the result.
        callbacks: Additional trainer callbacks.
    """

    args: FinetuningArguments

    def __init__(
        self,
        model: nn.Module,
        args: FinetuningArguments,
        task: Task,
        *,
        processor: Any,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"This process sees {args.n_gpu} GPUs, but one GPU per process is required. Start with `accelerate "
                "launch`, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
        self.task, self.processor, self.evaluations = task, processor, 0
        self._batches: _Batches | None = None
        train, validation = task.datasets(processor)
        self._sampler = TrainSampler(
            len(cast(Any, train)),
            seed=args.seed,
            images_per_step=args.images_per_step,
            repeats=args.repeated_augmentation,
        )
        self._guard = FiniteGuard(cast(str, args.output_dir), names=task.train.ids)
        own: list[TrainerCallback] = [_RunRules(self._sampler), self._guard]
        if args.early_stopping_patience:
            own.append(EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold))
        super().__init__(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=validation,
            data_collator=stack,
            compute_metrics=cast(Any, self._measure),
            preprocess_logits_for_metrics=task.reduce,
            callbacks=[*own, *callbacks],
        )
        self._guard.check_gradients = self.accelerator.scaler is None
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(_Progress(str(args.metric_for_best_model)))

    def _measure(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        self.task.update_metrics(prediction.predictions, prediction.label_ids)
        return self.task.compute_metrics() if compute_result else {}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as Trainer does, with the metrics of the task."""
        self.task.start_metrics()
        self.evaluations += 1
        return super().evaluate(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader of batches in the order of `TrainSampler`, distributed over the processes."""
        return self._data_loader(self._sampler)

    def _data_loader(self, sampler: TrainSampler) -> DataLoader:
        args = self.args
        loader = DataLoader(
            cast(Dataset, self.train_dataset),
            batch_size=args.per_device_train_batch_size,
            sampler=sampler,
            drop_last=True,
            collate_fn=self.task.train_collator(),
            num_workers=args.dataloader_num_workers,
            timeout=args.dataloader_timeout if args.dataloader_num_workers else 0,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the batches of one step, and restart data loader workers once if they hang or die.

        Raises:
            RuntimeError: A worker hangs or dies a second time; the error names the images it may have been reading.
        """
        if self._batches is None or self._batches.of_epoch is not epoch_iterator:
            self._batches = _Batches(epoch_iterator, epoch_iterator)
        batches: list[dict[str, Tensor]] = []
        while len(batches) < num_batches:
            try:
                with self.worker_deaths.waiting():
                    batches.append(next(self._batches.source))
            except StopIteration:
                break
            except RuntimeError as error:
                if "DataLoader" not in str(error):
                    raise
                size = self.args.per_device_train_batch_size * self.args.world_size
                rest = self._sampler.after(self.state.global_step, len(batches) * size)
                # The loader reads one batch ahead.
                names = ", ".join(str(self.task.train.ids[index]) for _, index, _ in itertools.islice(rest, 2 * size))
                if self._batches.failed:
                    error.add_note(f"This happened twice. A worker was reading one of these images: {names}.")
                    raise
                logger.warning(
                    "%s The workers are restarted. A worker was reading one of these images: %s.", error, names
                )
                loader = self._data_loader(rest)
                cast(Any, loader).set_epoch(rest.epoch)  # accelerate's loader counts epochs itself, from 0
                self._batches = _Batches(epoch_iterator, iter(loader), failed=True)
        return batches, None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer with one parameter group per pair of multipliers; the schedule scales each rate."""
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer_class(optimizer_groups(self.model, self.args), **options)
        return self.optimizer

    def _get_learning_rate(self) -> float:
        # Trainer would log the first group, which has the smallest rate under layer-wise decay.
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the task's loss; `FiniteGuard` checks once per step over all processes that it is finite."""
        batch = without_ids(inputs)
        loss, outputs = self.task.loss(model, batch, training=self.model.training)
        if self.model.training:
            self._guard.see_batch(inputs.get("sample_ids"), inputs.get("epochs"), {"loss": loss})
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = super()._clip_grad_norm(model)
        self._guard.see_gradients({"model": torch.as_tensor(full_tensor(norm))})
        return norm

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does, with a detailed error when memory runs out.

        Raises:
            NonFiniteError: A loss or gradient is NaN or infinite.
            torch.OutOfMemoryError: Memory ran out; the error states the measured peak and options that reduce it.
        """
        try:
            return super().train(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, self.args, step=self.state.global_step) from error

    # Pushes publish the merged model, as at the end of the run.

    def hub_model(self, state: Mapping[str, Tensor]) -> nn.Module:
        """Return the model of a checkpoint with low-rank updates merged, so that it loads without peft."""
        return _whole_model(state, self.model, self.task, self.args)

    def hub_processor(self) -> Any:
        """Return the image processor of the result."""
        return self.processor

    def hub_facts(self) -> dict[str, Any]:
        """Return the recipe for the model card."""
        return finetuning_facts(public_recipe(self.args.resolved()))

    # Best model

    def _load_best_model(self) -> None:
        """Load the best checkpoint as a resumed run would: verified, with every tensor, on every process.

        Trainer's own implementation only logs missing tensors, and only process 0 knows the folder.
        """
        from ..training.distributed import _from_first

        folder = Path(_from_first(self.state.best_model_checkpoint))
        if not folder.is_dir():
            raise FileNotFoundError(
                f"The best checkpoint, of step {self.state.best_global_step}, could not be written to {folder}. "
                "Resume from the last checkpoint in the run folder, or free disk space and run again."
            )
        logger.info(
            "The result is %s with %s %.4g.", folder.name, self.args.metric_for_best_model, self.state.best_metric
        )
        verify_checkpoint(folder, required=(WEIGHTS, STATE))  # save_only_model leaves no optimizer state
        self._load_from_checkpoint(str(folder), self.model)

    # Resuming

    def resume_state(self) -> dict[str, Any]:
        """Return the recipe, the images per step, the fingerprints of both splits, and package versions."""
        parts = {"train": self.task.train, "validation": self.task.validation}
        return {
            "images_per_step": self.args.images_per_step,
            "data": {name: fingerprint(part) for name, part in parts.items() if part is not None},
            "recipe": self.args.resolved(),
            "packages": package_versions(),
        }

    def check_resume_state(self, saved: dict[str, Any]) -> None:
        """Log differences from the run that wrote a checkpoint, and reject those that change its images or tensors.

        Raises:
            ValueError: The task, the mode or the LoRA options differ, or the images or images per step differ without
                the option that allows it.
        """
        now = self.resume_state()
        for part, unimportant in (("recipe", {"output_dir", "resume_from_checkpoint"}), ("packages", set())):
            old, new = saved.get(part, {}), now[part]
            for name in sorted(({*old, *new}) - unimportant):
                if old.get(name) != new.get(name):
                    logger.warning(
                        "Changed since the checkpoint: %s is now %s (was %s).", name, new.get(name), old.get(name)
                    )
        for name in ("task", "mode", "lora_r", "lora_target_modules"):
            if name in saved.get("recipe", {}) and saved["recipe"][name] != now["recipe"][name]:
                raise ValueError(
                    f"{name} is {now['recipe'][name]}, but the checkpoint was written with {saved['recipe'][name]} "
                    "and holds other tensors. Restore the old value, or start from the model of the earlier run."
                )
        for part, facts in saved.get("data", {}).items():  # earlier releases saved fewer facts
            now["data"][part] = {key: now["data"].get(part, {}).get(key) for key in facts}
        for name, option in (("images_per_step", "allow_batch_change"), ("data", "allow_data_change")):
            if name in saved and saved[name] != now[name] and not getattr(self.args, option):
                raise ValueError(
                    f"{name} is {now[name]}, but the checkpoint was written with {saved[name]}. The resumed run would "
                    "not see the same images per step as an uninterrupted one. Restore the old value, or allow this "
                    f"with --{option}."
                )


def optimizer_groups(model: nn.Module, args: FinetuningArguments) -> list[dict[str, Any]]:
    """Group the trained parameters by learning rate and weight decay; only matrices decay.

    Source: layer-wise decay as in BEiT (arXiv 2106.08254); choice of decayed parameters as in timm and DeiT.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    renamed = {name.replace("regvit.", "backbone.", 1): name for name in trained}
    num_layers = cast(Any, model).config.num_hidden_layers
    rules = parameter_rules(renamed, num_layers=num_layers, layer_decay=args.layer_decay)
    groups: dict[ParameterRule, dict[str, Any]] = {}
    for alias, name in renamed.items():
        rule = rules[alias]
        if name.endswith(_TOKENS):
            rule = rule._replace(wd_multiplier=0.0)
        if not alias.startswith("backbone."):
            rule = rule._replace(lr_multiplier=rule.lr_multiplier * args.head_learning_rate_multiplier)
        new = {
            "params": [],
            "lr": cast(float, args.learning_rate) * rule.lr_multiplier,
            "weight_decay": args.weight_decay * rule.wd_multiplier,
        }
        groups.setdefault(rule, new)["params"].append(trained[name])
    return list(groups.values())
