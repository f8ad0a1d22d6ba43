"""What two processes do that continue a model; `test_continuation_two_processes.py` compares the results."""

import os
from pathlib import Path

import torch
from two_processes import COMMON, IMAGES, PER_PROCESS, sharding

from builders import Recorder
from hf_regvit import RegViTModel, pretrain
from hf_regvit.training.checkpoints import list_checkpoints
from tiny_run import Crops, MasksOfTheImage, arguments, tiny_config

MODES = ("full", "lora", "last_blocks")


def outcome(folder: Path, mode: str, **overrides) -> dict:
    """Continue a model whose two blocks and low-rank updates are far from zero, for four steps."""
    backend = {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
    fields = {**COMMON, **backend, "per_device_train_batch_size": PER_PROCESS, "learning_rate": 1e-2}
    fields |= {"gram_loss_weight": 1.0, "num_trained_blocks": 1, "save_strategy": "steps", "save_steps": 2}
    args = arguments(folder, mode=mode, **{**fields, **overrides})
    torch.manual_seed(0)
    recorder = Recorder()
    result = pretrain(
        args, model=RegViTModel(tiny_config()), train_dataset=Crops(IMAGES), data_collator=MasksOfTheImage(),
        callbacks=[recorder],
    )  # fmt: skip
    return {"teacher": result.state_dict(), "checkpoints": [path.name for path in list_checkpoints(folder)]}


def scenarios(folder: Path) -> dict:
    """Return name and result of everything that two processes are asked to do."""
    results = {}
    for mode in MODES:
        results[mode] = outcome(folder / mode, mode)
        first = str(folder / mode / "checkpoint-2")
        results[f"{mode}_resumed"] = outcome(folder / f"{mode}_resumed", mode, resume_from_checkpoint=first)
        with sharding() as fsdp:
            results[f"{mode}_sharded"] = outcome(folder / f"{mode}_sharded", mode, **fsdp)
            from_ddp = outcome(folder / f"{mode}_sharded_resumed", mode, resume_from_checkpoint=first, **fsdp)
            results[f"{mode}_sharded_from_ddp"] = from_ddp
    return results
