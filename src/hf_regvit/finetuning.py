"""Fine-tuning of a RegViT, or of any ViT that `convert` reads, on labeled images; the entry point is `finetune(args)`.

This module is independent of the task. It opens the model, selects the parameters to train (all, low-rank updates, the
head), runs `FinetuningTrainer` and writes the result folder. Each task is one class that implements the `Task`
protocol, selected by `--task`. To add a task:

1. Write the class in a module of its own (see `classification.ImageClassification`). Its constructor reads and checks
   the data before any model is loaded. Its method `datasets(processor)` builds `TrainImages` and `EvaluationImages` of
   `finetuning_data` from two callables that turn an image into `pixel_values` and `labels`.
2. Add `"task-name": ("module", "ClassName")` to `_TASKS`, the main metric to `finetuning_arguments.METRICS` and the
   others to `OTHER_METRICS` there.
3. Add new options as fields of `FinetuningArguments`. Everything else (resuming, best model, several processes, LoRA,
   registers, cards, pushing) is provided by this module.

The loss of a training batch must be a mean over its images (or pixels), because Trainer divides it by the number of
micro-batches.
"""

import copy
import itertools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import EarlyStoppingCallback, EvalPrediction, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerControl, TrainerState

from .alarms import FiniteGuard, NonFiniteError, out_of_memory, without_ids
from .callbacks import MetricsFile, TrainingProgress
from .checkpoints import STATE, WEIGHTS, CheckpointedTrainer, verify_checkpoint
from .configuration_regvit import RegViTConfig
from .distillation import full_tensor
from .finetuning_arguments import METRICS, OTHER_METRICS, FinetuningArguments
from .finetuning_data import BAD_IMAGES, Task, TrainSampler, fingerprint, stack
from .finetuning_folder import draw_finetuning_curves, write_finetuning_card
from .finetuning_model import choose_trained, inject_lora, merge_lora, open_for_task
from .model_card import finetuning_facts, public_recipe
from .optimization import ParameterRule, parameter_rules
from .run_folder import RunRecord, package_versions, run_environment, write_json

__all__ = ["FinetuningArguments", "FinetuningTrainer", "Task", "finetune"]

logger = logging.getLogger(__name__)

# Module and class of each task, imported on demand.
_TASKS = {
    "image-classification": ("classification", "ImageClassification"),
    "semantic-segmentation": ("finetuning_dense", "SemanticSegmentation"),
    "depth-estimation": ("finetuning_dense", "DepthEstimation"),
}

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
        from .checkpoints import _from_first

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


# ---- The whole job -----------------------------------------------------------------------------------------------


def finetune(
    args: FinetuningArguments,
    *,
    model: RegViTConfig | nn.Module | None = None,
    task: Task | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> nn.Module:
    """Fine-tune a model and write a folder that `transformers.pipeline` can load.

    `output_dir` receives the model with its image processor, code files and card, `metrics.json`, `metrics.jsonl`,
    `curves.png`, figures of the task, `resolved_recipe.yaml`, `environment.json` and checkpoints.

    Args:
        args: Arguments of the run.
        model: RegViT of any class (not modified), or a configuration to start from scratch. Default: the model that
            `args` names.
        task: Task instance with its own data. Default: created from `args`.
        callbacks: Additional trainer callbacks.

    Returns:
        The best model of the run (the last one without evaluations), in eval mode, with low-rank updates merged.

    Raises:
        ValueError: Data or labels cannot be used (the error names them), or arguments contradict each other.
        NonFiniteError: A loss or gradient is NaN or infinite.
        TrainingInterrupted: SIGTERM or SIGUSR1 was received; a checkpoint has been saved.
    """
    set_seed(args.seed)
    output = Path(cast(str, args.output_dir))
    if args.process_index == 0 and not args.resume_from_checkpoint:
        (output / BAD_IMAGES).unlink(missing_ok=True)  # left by an earlier run; the images may have been repaired
    if task is None:
        task = _make_task(args)
    opened = open_for_task(args, task, model)
    processor, changes = opened.processor, opened.changes
    network = choose_trained(opened.network, args, new_registers=opened.new_registers)
    if args.world_size > 1 and hasattr(task, "for_several_processes"):
        network = task.for_several_processes(network)
    if args.process_index == 0:
        start = args.model_name_or_path or (f"preset '{args.preset}'" if model is None else "the given model")
        logger.info("Starting from %s. %s", start, " ".join(changes))
    observers = [RunRecord(output, args.resolved()), *callbacks, MetricsFile(output / "metrics.jsonl")]
    trainer = FinetuningTrainer(network, args, task, processor=processor, callbacks=observers)
    started = time.perf_counter(), time.process_time()
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except NonFiniteError:
        if trainer.is_world_process_zero():
            draw_finetuning_curves(output, shown=task.shown)
        raise
    final = _final_evaluation(trainer)
    result = _whole_model(_whole_state(trainer.model), trainer.model, task, args)
    report = _report(trainer, final, started) | {"changes": changes}
    report["parameters"]["result"] = cast(Any, result).num_parameters()
    if trainer.is_world_process_zero():
        _write_folder(output, result, trainer, processor=processor, report=report)
    trainer.accelerator.wait_for_everyone()
    trainer.push_result(output)  # one process pushes; the others need not wait for the Hub
    return result


def _make_task(args: FinetuningArguments) -> Task:
    if args.task not in _TASKS:
        raise ValueError(f"Unknown task '{args.task}'. Choose from {', '.join(_TASKS)}.")
    known, metric = (METRICS[args.task][0], *OTHER_METRICS[args.task]), str(args.metric_for_best_model)
    plain = metric.removeprefix("eval_")
    if plain not in known and not plain.startswith("iou_"):  # Trainer would fail only after an epoch
        raise ValueError(
            f"metric_for_best_model is '{metric}', which task {args.task} does not report. Choose from "
            f"{', '.join(known)}."
        )
    module, name = _TASKS[args.task]
    return getattr(import_module(f".{module}", __package__), name)(args)


def _final_evaluation(trainer: FinetuningTrainer) -> dict[str, float]:
    """Return the metrics of the result; the last evaluation is reused if its weights were the same."""
    if trainer.task.validation is None or trainer.args.eval_strategy == "no":
        return {}
    state = trainer.state
    last = next((entry for entry in reversed(state.log_history) if "eval_loss" in entry), {})
    reloaded = trainer.args.load_best_model_at_end and state.best_global_step != state.global_step
    if last.get("step") == state.global_step and not reloaded and trainer.evaluations:
        return {name: value for name, value in last.items() if name.startswith("eval_")}
    return trainer.evaluate()


def _whole_state(trained: nn.Module) -> dict[str, Tensor]:
    """Return every tensor on the CPU of every process, gathered if FSDP2 has sharded it."""
    return {name: full_tensor(tensor.detach()).cpu().contiguous() for name, tensor in trained.state_dict().items()}


def _whole_model(state: Mapping[str, Tensor], trained: nn.Module, task: Task, args: FinetuningArguments) -> nn.Module:
    """Return a plain model with the tensors of a trained one, low-rank updates merged."""
    result = task.model_class(copy.deepcopy(cast(Any, trained).config))
    if args.mode == "lora":
        result = inject_lora(result, args)
    result.load_state_dict(state)
    if args.mode == "lora":
        result = merge_lora(result)
    return result.eval()


def _report(trainer: FinetuningTrainer, final: Mapping[str, float], started: tuple[float, float]) -> dict[str, Any]:
    """Return the content of `metrics.json`."""
    args, task, state = trainer.args, trainer.task, trainer.state
    parameters = list(trainer.model.parameters())
    best = args.load_best_model_at_end and state.best_global_step
    protocol, interval_of = task.protocol()
    named = {key.removeprefix("eval_"): value for key, value in final.items()}
    return {
        "task": task.name,
        "mode": args.mode,
        "eval": {name: value for name, value in named.items() if name not in _SPEED},
        "intervals": task.intervals() if final else {},
        "interval_of": interval_of,
        "protocol": protocol,
        "described": task.describe(),
        "step_of_the_result": best or state.global_step,
        "steps": state.global_step,
        "epochs": state.epoch,
        "images": {
            "train": len(task.train),
            "validation": 0 if task.validation is None else len(task.validation),
            "seen": state.global_step * args.images_per_step,
        },
        "parameters": {
            "all": sum(p.numel() for p in parameters),
            "trained": sum(p.numel() for p in parameters if p.requires_grad),
        },
        "seconds": time.perf_counter() - started[0],
        "processor_seconds": time.process_time() - started[1],
        "seed": args.seed,
    }


def _write_folder(
    output: Path, result: nn.Module, trainer: FinetuningTrainer, *, processor: Any, report: dict[str, Any]
) -> None:
    """Write model, processor, metrics, figures and card of a finished run."""
    task, args = trainer.task, trainer.args
    cast(Any, result).save_pretrained(output)
    processor.save_pretrained(output)
    write_json(output / "metrics.json", report)
    curves = draw_finetuning_curves(output, shown=task.shown)
    pictures = ({curves.name: "Learning curves"} if curves else {}) | task.write_panels(output, result, processor)
    write_finetuning_card(
        output,
        recipe=args.resolved(),
        report=report,
        environment=run_environment(args),
        pictures=pictures,
        **trainer.hub_names(),
    )
    minutes, unusable = report["seconds"] / 60, output / BAD_IMAGES
    logger.info("Done in %.1f minutes. Model, card, curves and metrics are in %s.", minutes, output)
    if unusable.is_file():
        count = len(unusable.read_text(encoding="utf-8").splitlines())
        logger.warning("%d images could not be used; they are listed in %s.", count, unusable)
