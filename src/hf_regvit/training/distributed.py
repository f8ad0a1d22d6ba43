"""Helpers for several processes: gathered tensors, batch norm over all processes."""

import os
import socket
import time
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def num_processes() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def from_first(value: T) -> T:
    """Return the value of process 0 on every process."""
    if num_processes() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


Peer = tuple[int, str, int]  # rank, machine and id of a process


def processes_of_run() -> list[Peer]:
    """Return all processes of the run; a collective. Empty if there is only one."""
    if num_processes() == 1:
        return []
    from accelerate.utils import gather_object

    return gather_object([(dist.get_rank(), socket.gethostname(), os.getpid())])


def lost_processes(peers: Sequence[Peer]) -> list[str]:
    """Return the names of the processes on this machine that have ended, waiting briefly for one that is ending."""
    import psutil

    def has_ended(process: int) -> bool:
        try:
            return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    here = {rank: process for rank, machine, process in peers if machine == socket.gethostname()}
    end = time.monotonic() + 3.0
    lost: list[str] = []
    while here and not lost and time.monotonic() < end:
        lost = [f"Process {rank} of {len(peers)} (id {one})" for rank, one in here.items() if has_ended(one)]
        time.sleep(0.1)
    return lost


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor that FSDP2 has sharded (a collective); return any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(trained: nn.Module) -> dict[str, Tensor]:
    """Return every tensor on the CPU of every process, gathered if FSDP2 has sharded it."""
    return {name: full_tensor(tensor.detach()).cpu().contiguous() for name, tensor in trained.state_dict().items()}


class _SumOverProcesses(torch.autograd.Function):
    """Differentiable sum of a tensor over all processes; gradients are summed over all processes as well."""

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _SumOverProcesses.apply(gradient)


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Gather (n, D) from all processes, which must have equal n, with gradients; a collective.

    Returns:
        (processes * n, D) rows in the order of the processes, and the index of the first row of this process. The
        gradient of a row is the sum of its gradients on all processes.
    """
    count = num_processes()
    if count == 1:
        return rows, 0
    first = dist.get_rank() * len(rows)
    after = (count - 1) * len(rows) - first
    return _SumOverProcesses.apply(F.pad(rows, (0, 0, first, after))), first


class SharedBatchNorm(nn.BatchNorm1d):
    """Batch norm with statistics over all processes, the same as if one process saw the whole batch.

    torch's `SyncBatchNorm` supports GPUs only. The tensors and their names are those of `BatchNorm1d`.
    """

    # The base class allows None, for settings that are not used here.
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (n, F) to the same shape; n may differ between processes."""
        if not self.training:
            return super().forward(input)
        values = input.float()
        count = _SumOverProcesses.apply(values.new_tensor([float(len(values))]))
        mean = _SumOverProcesses.apply(values.sum(0)) / count
        variance = _SumOverProcesses.apply((values - mean).square().sum(0)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        return ((values - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias).to(input)
