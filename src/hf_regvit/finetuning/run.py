"""Fine-tuning of a RegViT, or of any ViT that `convert` reads, on labeled images; the entry point is `finetune(args)`.

This module is independent of the task. It opens the model, selects the parameters to train (all, low-rank updates, the
head), runs `FinetuningTrainer` and writes the result folder. Each task is one class with the base `tasks.Task`,
selected by `--task`. To add a task:

1. Write the class in a module of its own (see `classification.ImageClassification`). Its constructor reads and checks
   the data before any model is loaded. `train_item` and `evaluation_item` return the functions that turn an image into
   `pixel_values` and `labels`.
2. Add an entry to the table `TASKS` in `arguments`.
3. Add new options as fields of `FinetuningArguments`. Everything else (resuming, best model, several processes, LoRA,
   registers, cards, pushing) is provided by this module.

The loss of a training batch must be a mean over its images (or pixels), because Trainer divides it by the number of
micro-batches.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback, set_seed

from ..figures.curves import CURVES, draw_finetuning_curves
from ..hub.card import write_card_file
from ..hub.facts import CardFigure, finetuning_facts, public_recipe
from ..hub.scan import may_be_published
from ..models.configuration_regvit import RegViTConfig
from ..models.saving import num_bytes, write_json
from ..training.callbacks import MetricsFile
from ..training.distributed import whole_state
from ..training.finite import NonFiniteError
from ..training.run_folder import BAD_IMAGES, RunRecord, run_environment, run_lock, write_model
from .arguments import TASKS, FinetuningArguments
from .model import choose_trained, open_for_task, whole_model
from .tasks import Task
from .trainer import FinetuningTrainer

logger = logging.getLogger(__name__)

_SPEED = ("runtime", "samples_per_second", "steps_per_second", "epoch")  # these describe the evaluation, not the model


# ---- The whole job -----------------------------------------------------------------------------------------------


def finetune(
    args: FinetuningArguments,
    *,
    model: RegViTConfig | nn.Module | None = None,
    task: Task | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> PreTrainedModel:
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
        RunFolderInUseError: Another run uses `output_dir`.
        TrainingInterrupted: SIGTERM, SIGUSR1 or Ctrl-C was received; a checkpoint has been saved.
    """
    with run_lock(args):
        set_seed(args.seed)
        output = args.folder
        if args.process_index == 0 and not args.resume_from_checkpoint:
            (output / BAD_IMAGES).unlink(missing_ok=True)  # left by an earlier run; the images may have been repaired
        if task is None:
            task = _make_task(args)
        opened = open_for_task(args, task, model)
        network = opened.network
        choose_trained(network, args, new_registers=opened.new_registers)
        if args.world_size > 1:
            task.for_several_processes(network)
        if args.process_index == 0:
            start = args.model_name_or_path or (f"preset '{args.preset}'" if model is None else "the given model")
            logger.info("Starting from %s. %s", start, " ".join(opened.changes))
        observers = [RunRecord(output, args.resolved()), *callbacks, MetricsFile(output / "metrics.jsonl")]
        trainer = FinetuningTrainer(network, args, task, processor=opened.processor, callbacks=observers)
        started = time.perf_counter(), time.process_time()
        try:
            trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        except NonFiniteError:
            if trainer.is_world_process_zero():
                draw_finetuning_curves(output, shown=task.shown)
            raise
        final = _final_evaluation(trainer)
        result = whole_model(whole_state(trainer.model), trainer.model, task, args)
        report = _report(trainer, final, started) | {"changes": opened.changes}
        report["parameters"]["result"] = result.num_parameters()
        if trainer.is_world_process_zero():
            with trainer.writing_result():
                _write_folder(output, result, trainer, report)
        trainer.accelerator.wait_for_everyone()
        trainer.push_result(output)  # one process pushes; the others need not wait for the Hub
        return result


def _make_task(args: FinetuningArguments) -> Task:
    entry = TASKS[args.task]
    known, metric = (*entry.metrics, "loss"), str(args.metric_for_best_model)
    plain = metric.removeprefix("eval_")
    if plain not in known and not plain.startswith("iou_"):  # Trainer would fail only after an epoch
        raise ValueError(
            f"metric_for_best_model is '{metric}', which task {args.task} does not report. Choose from "
            f"{', '.join(known)}."
        )
    return getattr(import_module(f".{entry.module}", __package__), entry.class_name)(args)


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
        "eval": {name: value for name, value in named.items() if name not in _SPEED and math.isfinite(value)},
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


def conclusion(report: Mapping[str, Any]) -> str:
    """Return the main metric as text, such as `Accuracy 100 % (36 of 36; 95 % interval 90 to 100)`, "" without one.

    Args:
        report: Content of `metrics.json`.
    """
    for name, interval in report["intervals"].items():
        value, unit = report["eval"][name], ("", 1) if name in ("rmse", "abs_rel") else (" %", 100)
        count = report["images"]["validation"] - int(report["eval"].get("skipped_images", 0))
        hits = f"{round(value * count)} of {count}; " if name == "accuracy" else ""
        shown, low, high = (f"{unit[1] * number:.3g}" for number in (value, *interval))
        title = name[:1].upper() + name[1:].replace("_", " ")
        return f"{title} {shown}{unit[0]} ({hits}95 % interval {low} to {high})"
    return ""


def _write_folder(output: Path, result: PreTrainedModel, trainer: FinetuningTrainer, report: dict[str, Any]) -> None:
    """Write model, processor, metrics, figures and card of a finished run."""
    task, args, processor = trainer.task, trainer.args, trainer.image_processor
    write_model(output, result, processor, needed=num_bytes(result.state_dict().values()))
    write_json(output / "metrics.json", report)
    curves = draw_finetuning_curves(output, shown=task.shown)
    pictures = ({curves.name: "Learning curves"} if curves else {}) | task.write_panels(output, result, processor)
    # The card is the one that `regvit publish` would write from the same files.
    facts = finetuning_facts(public_recipe(args.resolved()), report, run_environment(args))
    shown = {name: title for name, title in pictures.items() if may_be_published(name)}
    if shown.pop(CURVES, None):
        facts["curves"] = CURVES
    facts["pictures"] = tuple(CardFigure(name, title) for name, title in shown.items())
    write_card_file(output, parameters=report["parameters"]["result"], **facts, **trainer.hub_names())
    trainer.trackers.result(output / "metrics.json", [output / name for name in pictures])
    trainer.trackers.finish(output)
    minutes, unusable = report["seconds"] / 60, output / BAD_IMAGES
    logger.info("Done in %.1f minutes. Model, card, curves and metrics are in %s.", minutes, output)
    if unusable.is_file():
        count = len(unusable.read_text(encoding="utf-8").splitlines())
        logger.warning("%d images could not be used; they are listed in %s.", count, unusable)
