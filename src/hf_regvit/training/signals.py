"""Stop signals and dead data workers during training."""

import contextlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from .distributed import num_processes

# ERESTART on Linux, "interrupted call should be restarted": the job did not fail but must be queued again.
REQUEUE_EXIT_CODE = 85
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT  # as of a program that Ctrl-C ends

# Signals that stop a run and how messages name them; a later one wins if processes receive different ones.
_STOPS = {"SIGUSR1": "SIGUSR1", "SIGTERM": "SIGTERM", "SIGINT": "Ctrl-C"}
# torchrun passes on the SIGINT that the terminal has already sent to every process.
_SAME_INTERRUPT_SECONDS = 2.0


class TrainingInterrupted(SystemExit):
    """Stop by a signal after a checkpoint was saved; the run can be resumed.

    If uncaught, the exit code is 85 (queue again), or 130 after Ctrl-C.
    """

    def __init__(self, message: str, *, code: int = REQUEUE_EXIT_CODE) -> None:
        super().__init__(code)
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopSignals(TrainerCallback):
    """Save a checkpoint and stop all processes after the current step at SIGTERM, SIGUSR1 or the first Ctrl-C.

    The second Ctrl-C stops the process at once. A scheduler may signal one process or all of them, at different steps.
    Therefore the processes exchange at every step if any of them was signaled. The exchange uses the CPU, so it never
    waits for an accelerator.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.stopped_by: str | None = None
        self.exit_code = REQUEUE_EXIT_CODE
        self._group: Any = None
        self._tells, self._interrupted_at = True, -float("inf")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            since, self._interrupted_at = time.monotonic() - self._interrupted_at, time.monotonic()
            if self.received == "SIGINT":
                if num_processes() > 1 and since < _SAME_INTERRUPT_SECONDS:
                    return
                raise KeyboardInterrupt
            if self._tells:  # a logger may be in the middle of a line
                os.write(2, b"\nCtrl-C: saving a checkpoint after this step. Press Ctrl-C again to stop at once.\n")
        self.received = signal.Signals(number).name

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block; has no effect outside of the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # A process in the background of a script ignores Ctrl-C, and continues to do so.
        numbers = [number for name in _STOPS if signal.getsignal(number := signal.Signals[name]) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Create a CPU process group if the processes only have one for accelerators."""
        self.stopped_by, self._tells = None, state.is_world_process_zero
        if num_processes() > 1 and self._group is None:
            self._group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Save and stop on all processes if one of them was signaled."""
        flag = torch.tensor([[None, *_STOPS].index(self.received)])
        if num_processes() > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        if flag.item():
            name = list(_STOPS)[int(flag) - 1]
            self.received, self.stopped_by = None, _STOPS[name]
            self.exit_code = INTERRUPTED_EXIT_CODE if name == "SIGINT" else REQUEUE_EXIT_CODE
            control.should_save = control.should_training_stop = True


def leave_signals_to_parent(worker: int) -> None:
    """Ignore Ctrl-C and SIGUSR1 in a data worker, so that the main process can finish its step; a `worker_init_fn`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class WorkerDeaths:
    """Delay the error for a dead worker until the next batch is requested.

    torch raises this error from a signal handler, wherever the main thread happens to be. In the middle of a step, the
    trainer could not recover from it.
    """

    def __init__(self) -> None:
        self._inner: Any = None
        self._waiting = False
        self._error: RuntimeError | None = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        try:
            self._inner(number, frame)
        except RuntimeError as error:
            self._error = error
            if self._waiting:
                raise

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Raise errors of dead workers inside the block, including workers that died before it.

        Raises:
            RuntimeError: If a worker died, also while it was sending a tensor. The message contains `DataLoader`, as
                in the error of torch.
        """
        current = signal.getsignal(signal.SIGCHLD)
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and callable(current) and current != self._handle:  # torch installs its handler with the workers
            self._inner = current
            signal.signal(signal.SIGCHLD, self._handle)
        try:
            self._waiting = True
            if self._error is not None:
                raise self._error
            yield
        except RuntimeError:
            self._error = None  # the error is delivered
            raise
        except (OSError, EOFError) as error:
            # The connection breaks before torch notices the death. Errors of a dataset have another traceback.
            files = (Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__))
            if not any("multiprocessing" in file.parts for file in files):
                raise
            raise self._reported() or RuntimeError(
                f"A DataLoader worker died while sending a batch: {error!r}."
            ) from error
        finally:
            self._waiting = False

    def _reported(self) -> RuntimeError | None:
        """Wait for torch's error for a worker that has just died; a late one would count as another death."""
        self._waiting = False
        end = time.monotonic() + 5
        while self._inner is not None and self._error is None and time.monotonic() < end:
            time.sleep(0.01)
        error, self._error = self._error, None
        return error

    def stop(self) -> None:
        """Restore the signal handler of torch."""
        if self._inner is not None and signal.getsignal(signal.SIGCHLD) == self._handle:
            signal.signal(signal.SIGCHLD, self._inner)
