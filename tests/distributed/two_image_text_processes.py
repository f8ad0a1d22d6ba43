"""What two processes over gloo do on images with texts; `test_image_text_two_processes.py` compares it with one."""

import os
from pathlib import Path

import torch
import torch.nn.functional as F

from builders import SignalAt
from hf_regvit.image_text.losses import sigmoid_loss, softmax_loss
from hf_regvit.image_text.run import train_image_text
from hf_regvit.training.signals import TrainingInterrupted
from tiny_image_text import arguments

LOSSES = ("softmax", "sigmoid")
PAIRS, WIDTH = 6, 5


def loss_and_gradients(loss: str, rank: int = 0, processes: int = 1) -> dict:
    """Loss of the rows of one process in float64, and the gradients of all its leaves."""
    generator = torch.Generator().manual_seed(1)
    whole = [torch.randn(PAIRS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)]
    leaves = {
        name: rows.chunk(processes)[rank].clone().requires_grad_()
        for name, rows in zip(("images", "texts"), whole, strict=True)
    }
    leaves |= {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in {"scale": 7.0, "bias": -4.0}.items()
    }
    rows = [F.normalize(leaves[name], dim=-1) for name in ("images", "texts")]
    if loss == "softmax":
        value = softmax_loss(*rows, scale=leaves["scale"])
    else:
        value = sigmoid_loss(*rows, scale=leaves["scale"], bias=leaves["bias"])
    value.backward()
    return {"loss": value.item()} | {name: leaf.grad for name, leaf in leaves.items()}


def outcome(folder: Path, callbacks=(), **overrides) -> dict:
    """State of the encoder after one run; Adam's epsilon keeps the rounding of tiny gradients small."""
    backend = {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
    args = arguments(folder, folder.parent / "data", adam_epsilon=1e-3, **backend, **overrides)
    return dict(train_image_text(args, callbacks=callbacks).state_dict())


def interrupted(folder: Path, **overrides) -> dict:
    try:
        outcome(folder, [SignalAt(1, process=1)], **overrides)
    except TrainingInterrupted:
        return outcome(folder, resume_from_checkpoint="last", **overrides)
    return {}


def scenarios(folder: Path) -> dict:
    """Name and result of everything that two processes are asked to do."""
    half = {"per_device_train_batch_size": 4}
    results = {loss: outcome(folder / loss, loss=loss, **half) for loss in LOSSES}
    results["resumed"] = interrupted(folder / "interrupted", **half)
    rank = int(os.environ["RANK"])
    return results | {f"gradients_{loss}": loss_and_gradients(loss, rank, 2) for loss in LOSSES}
