"""Two processes over gloo on loopback that go through the same scenarios, and what both gave back."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

Scenarios = Callable[[Path], dict[str, Any]]


@dataclass
class Runs:
    """Folder of the runs, their results by name as `runs(name)`, and those of one process to compare with."""

    folder: Path
    one: dict[str, Any] = field(default_factory=dict)
    hub: Any = None

    def __call__(self, name: str) -> list[dict[str, Any]]:
        return [torch.load(self.folder / f"{name}.{rank}.pt", weights_only=False) for rank in (0, 1)]


def _process(rank: int, port: int, scenarios: Scenarios, folder: Path) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2"
    )
    torch.set_num_threads(1)
    for name, result in scenarios(folder).items():
        torch.save(result, folder / f"{name}.{rank}.pt")
    torch.distributed.destroy_process_group()


def start(scenarios: Scenarios, folder: Path) -> None:
    """Run every scenario on two processes and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, (port, scenarios, folder), nprocs=2)
