"""What two processes over gloo do when they fine-tune; `test_finetune_two_processes.py` compares it with one."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainerCallback
from two_processes import sharding

from builders import SignalAt, WreckFrom
from hf_regvit.finetuning.trainer import FinetuningTrainer
from hf_regvit.training.signals import TrainingInterrupted
from tiny_dense import dense_run
from tiny_finetune import backbone, run, source

# Adam divides a gradient by its own size, so the rounding of one near zero would become a whole step.
COMMON = {
    "adam_epsilon": 1e-3, "label_smoothing_factor": 0.1, "class_weights": ["balanced"], "save_strategy": "epoch",
    "save_total_limit": None,
}  # fmt: skip
TRAIN = {"labels": [0] * 12 + [1] * 8 + [2] * 4}


@dataclass
class Seen(TrainerCallback):
    """Metrics of every evaluation, in order."""

    names: tuple[str, ...] = ("loss", "accuracy", "f1", "mean_class_accuracy")
    metrics: list[dict[str, float]] = field(default_factory=list)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.metrics.append({f"eval_{name}": metrics[f"eval_{name}"] for name in self.names})


def outcome(folder: Path, *, callbacks=(), model=None, validation=10, **overrides) -> dict:
    """One run as everything that two runs have to agree on. Ten pictures do not divide by two times eight."""
    seen = Seen()
    backend = {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
    result, args = run(
        folder, train=source(24, **TRAIN), validation=source(validation, start=100), model=model,
        callbacks=[seen, *callbacks], **{**COMMON, **backend, **overrides},
    )  # fmt: skip
    return {"state": dict(result.state_dict()), "metrics": seen.metrics, "rank": args.process_index}


def interrupted(folder: Path, **overrides) -> dict:
    try:
        outcome(folder, callbacks=[SignalAt(1, process=1)], **overrides)
    except TrainingInterrupted as stop:
        return {"message": str(stop), "resumed": outcome(folder, resume_from_checkpoint="last", **overrides)}
    return {}


def sharded(folder: Path, **overrides) -> dict:
    """Every mode with FSDP2, and a run that ends after its first epoch and goes on."""
    with sharding(FinetuningTrainer) as fsdp:
        results = {mode: outcome(folder / mode, mode=mode, **fsdp, **overrides) for mode in ("full", "lora", "linear")}
        overrides["resume_from_checkpoint"] = str(folder / "full" / "checkpoint-3")
        results["resumed"] = outcome(folder / "resumed", **fsdp, **overrides)
    return results


def dense(folder: Path, task: str, **overrides) -> dict:
    """Masks or depth; the data lie beside the folder, under the name of the task."""
    seen = Seen(("mean_iou" if task == "semantic-segmentation" else "rmse",))
    backend = {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
    data = str(folder.parent / task)
    fixed = {"adam_epsilon": 1e-3, "save_strategy": "no", "load_best_model_at_end": False, "save_total_limit": None}
    result = dense_run(folder, data, task, callbacks=[seen], **{**fixed, **backend, **overrides})
    return {"state": dict(result.state_dict()), "metrics": seen.metrics}


def scenarios(folder: Path) -> dict:
    """Name and result of everything that two processes are asked to do."""
    half = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    two = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    registers = backbone(num_register_tokens=0)
    with sharding(FinetuningTrainer) as fsdp:  # the head's batch norm and its linear layer are sharded as well
        fsdp_dense = {
            "masks": dense(folder / "sharded_masks", "semantic-segmentation", **fsdp, **two),
            "depth": dense(folder / "sharded_depth", "depth-estimation", **fsdp, **two),
        }
    return {
        "full": outcome(folder / "full", **half),
        "lora": outcome(folder / "lora", mode="lora", **half),
        "registers": outcome(folder / "registers", mode="linear", model=registers, num_register_tokens=2, **half),
        "best": outcome(folder / "best", callbacks=[WreckFrom(3)], max_grad_norm=1e9, **half),
        "signal": interrupted(folder / "signal", **half),
        "fsdp": sharded(folder / "fsdp", **half),
        "masks": dense(folder / "masks", "semantic-segmentation", **two),
        "depth": dense(folder / "depth", "depth-estimation", **two),
        "fsdp_dense": fsdp_dense,
    }
