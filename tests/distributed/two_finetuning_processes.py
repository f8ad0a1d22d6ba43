"""What two processes over gloo do when they fine-tune; `test_finetune_two_processes.py` compares it with one."""

import os
import socket
from pathlib import Path

import torch
import torch.multiprocessing as mp
from transformers import TrainerCallback
from two_processes import sharding

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


class Seen(TrainerCallback):
    """Metrics of every evaluation, in order."""

    def __init__(self, *names):
        self.names, self.metrics = names or ("loss", "accuracy", "f1", "mean_class_accuracy"), []

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.metrics.append({f"eval_{name}": metrics[f"eval_{name}"] for name in self.names})


class Wreck(TrainerCallback):
    """Steps of the second epoch that ruin the model, so that the best checkpoint is the first."""

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step >= 3:
            for group in optimizer.param_groups:
                group["lr"] = 3.0


class SignalOne(TrainerCallback):
    """A scheduler that signals the second process alone, in the second step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 1:
            import signal

            os.kill(os.getpid(), signal.SIGTERM)


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
        outcome(folder, callbacks=[SignalOne()], **overrides)
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
    seen = Seen("mean_iou" if task == "semantic-segmentation" else "rmse")
    backend = {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
    data = str(folder.parent / task)
    fixed = {"adam_epsilon": 1e-3, "save_strategy": "no", "load_best_model_at_end": False, "save_total_limit": None}
    result = dense_run(folder, data, task, callbacks=[seen], **{**fixed, **backend, **overrides})
    return {"state": dict(result.state_dict()), "metrics": seen.metrics}


def sharded_dense(folder: Path, **overrides) -> dict:
    """The head's batch norm and its linear layer are sharded as well."""
    with sharding(FinetuningTrainer) as fsdp:
        return {
            "masks": dense(folder / "sharded_masks", "semantic-segmentation", **fsdp, **overrides),
            "depth": dense(folder / "sharded_depth", "depth-estimation", **fsdp, **overrides),
        }


def scenarios(folder: Path) -> dict:
    """Name and result of everything that two processes are asked to do."""
    half = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    two = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    registers = backbone(num_register_tokens=0)
    return {
        "full": outcome(folder / "full", **half),
        "lora": outcome(folder / "lora", mode="lora", **half),
        "registers": outcome(folder / "registers", mode="linear", model=registers, num_register_tokens=2, **half),
        "best": outcome(folder / "best", callbacks=[Wreck()], max_grad_norm=1e9, **half),
        "signal": interrupted(folder / "signal", **half),
        "fsdp": sharded(folder / "fsdp", **half),
        "masks": dense(folder / "masks", "semantic-segmentation", **two),
        "depth": dense(folder / "depth", "depth-estimation", **two),
        "fsdp_dense": sharded_dense(folder, **two),
    }


def _process(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2"
    )
    torch.set_num_threads(1)
    for name, result in scenarios(Path(folder)).items():
        torch.save(result, Path(folder, f"{name}.{rank}.pt"))
    torch.distributed.destroy_process_group()


def start(folder: Path) -> None:
    """Runs every scenario on two processes and waits for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, (port, str(folder)), nprocs=2)
