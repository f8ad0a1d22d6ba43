"""Detect values that are not finite, record the batch, replay it; describe running out of memory."""

import base64
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from ..models.saving import num_bytes, whole_file, write_json
from .checkpoints import list_checkpoints
from .distributed import full_tensor, whole_state

logger = logging.getLogger(__name__)


class NonFiniteError(FloatingPointError):
    """NaN or infinity in a loss or gradient; the step was not applied."""


# ---- NaN and infinity --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _MicroBatch:
    sample_ids: Tensor | None
    epochs: Tensor | None
    outputs: dict[str, Tensor]


class FiniteGuard(TrainerCallback):
    """Stop a run before a step with a non-finite loss or gradient is applied, and record its batch.

    All processes decide together, after the backward pass, with one small exchange and one synchronization per step. A
    NaN in one process reaches the gradients of all, so the losses identify the process it came from.

    `nan_batch.json` in the run folder holds step, epoch, sample ids, loss terms and the random state at the beginning
    of the step, for every affected process; `nan_batch.safetensors` holds the weights. These files
    suffice to repeat the step.

    Args:
        folder: Run folder.
        check_gradients: Whether to check gradients; False if a gradient scaler handles overflows itself (fp16).
        names: Image names by sample id; they are recorded as well, and the message shows the first ones.
    """

    def __init__(self, folder: str | Path, *, check_gradients: bool = True, names: Sequence[object] = ()) -> None:
        self.folder, self.check_gradients, self.names = Path(folder), check_gradients, names
        self._batches: list[_MicroBatch] = []
        self._norms: dict[str, Tensor] = {}
        self._random_state: dict[str, Tensor] = {}

    def see_batch(self, sample_ids: Tensor | None, epochs: Tensor | None, outputs: Mapping[str, Tensor]) -> None:
        """Record the images of one micro-batch and the outputs of `SelfDistillation` for them."""
        values = {name: value.detach() for name, value in outputs.items()}
        self._batches.append(_MicroBatch(sample_ids, epochs, values))

    def see_gradients(self, norms: Mapping[str, Tensor]) -> None:
        """Record the gradient norms of the step by submodule, before clipping."""
        self._norms = {name: norm.detach() for name, norm in norms.items()}

    def on_step_begin(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Store the random state at the start of the step."""
        self._batches, self._norms = [], {}
        self._random_state = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self._random_state["cuda"] = torch.cuda.get_rng_state()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check losses and gradients of all processes.

        Raises:
            NonFiniteError: If one of them is NaN or infinite.
        """
        if not self._batches:
            return
        self._norms = self._norms or self._gradient_norms(kwargs["model"])
        loss_is_finite = torch.isfinite(torch.stack([batch.outputs["loss"] for batch in self._batches])).all()
        gradient_is_finite = torch.isfinite(torch.stack(list(self._norms.values()))).all()
        if not self.check_gradients:
            gradient_is_finite = torch.ones_like(gradient_is_finite)
        flags = torch.stack([loss_is_finite, gradient_is_finite])[None].to(torch.uint8)
        if args.world_size > 1:
            from accelerate.utils import gather

            flags = gather(flags)  # (processes, 2)
        if not flags.all():
            self._stop(args, state, kwargs["model"], flags.bool().cpu())

    @staticmethod
    def _gradient_norms(model: nn.Module) -> dict[str, Tensor]:
        norms = {}
        for name, part in getattr(model, "student", model).named_children():
            gradients = [p.grad for p in part.parameters() if p.grad is not None]
            norms[name] = torch.stack([full_tensor(gradient.float().norm()) for gradient in gradients]).norm()
        return norms

    def _stop(self, args: TrainingArguments, state: TrainerState, model: nn.Module, finite: Tensor) -> None:
        records = [self._record(args.process_index)]
        if args.world_size > 1:
            from accelerate.utils import gather_object

            records = gather_object(records)
        in_loss = [rank for rank, (loss, _) in enumerate(finite.tolist()) if not loss]
        # If every loss is finite, the NaN comes from the backward pass, and all processes have the averaged gradient.
        guilty = [records[rank] for rank in in_loss] or records
        if state.is_world_process_zero:
            try:
                self._write(state, guilty, in_loss=bool(in_loss), model=model)
            except OSError as error:  # must not hide the reason for the stop
                logger.error("ALARM: The batch could not be recorded. %s", error)
        raise NonFiniteError(self._message(args, state, guilty, in_loss=bool(in_loss)))

    def _record(self, rank: int) -> dict[str, Any]:
        return {
            "rank": rank,
            "micro_batches": [
                {
                    "sample_ids": None if batch.sample_ids is None else batch.sample_ids.tolist(),
                    "epochs": None if batch.epochs is None else batch.epochs.tolist(),
                    "images": [str(self.names[i]) for i in batch.sample_ids.tolist()]
                    if self.names and batch.sample_ids is not None
                    else [],
                    "terms": {name: _number(value) for name, value in batch.outputs.items()},
                }
                for batch in self._batches
            ],
            "gradient_norms": {name: _number(norm) for name, norm in self._norms.items()},
            "random_state": {
                name: base64.b64encode(bytes(value.numpy())).decode() for name, value in self._random_state.items()
            },
        }

    def _write(self, state: TrainerState, records: list[dict[str, Any]], *, in_loss: bool, model: nn.Module) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "step": state.global_step,
            "epoch": state.epoch,
            "where": "loss" if in_loss else "gradient",
            "teacher_temperature": getattr(model, "teacher_temperature", None),
            "processes": records,
        }
        write_json(self.folder / "nan_batch.json", content)
        if not any(isinstance(tensor, DTensor) for tensor in model.state_dict().values()):  # shards cannot be replayed
            weights = whole_state(model)
            with whole_file(self.folder / "nan_batch.safetensors", needed=num_bytes(weights.values())) as unfinished:
                save_file(weights, unfinished, metadata={"format": "pt"})

    def _message(
        self, args: TrainingArguments, state: TrainerState, guilty: Sequence[dict[str, Any]], *, in_loss: bool
    ) -> str:
        batches = guilty[0]["micro_batches"]
        batch = next((one for one in batches if isinstance(one["terms"]["loss"], str)), batches[-1])
        terms, norms = (
            ", ".join(f"{name}={float(value):.4g}" for name, value in values.items() if name != "loss")
            for values in (batch["terms"], guilty[0]["gradient_norms"])
        )
        rank = f" on rank {', '.join(str(record['rank']) for record in guilty)}" if args.world_size > 1 else ""
        if in_loss:
            what = f"The loss is {batch['terms']['loss']} at step {state.global_step}{rank} ({terms})"
        else:
            what = f"The loss is finite at step {state.global_step}, but its gradient is not (norms: {norms})"
        saved = list_checkpoints(self.folder)
        resume = f"Resume from {saved[-1].name}" if saved else "There is no checkpoint yet (--save_steps). Start again"
        lower = f"--learning_rate {args.learning_rate / 2:.3g} (now {args.learning_rate:.3g})"
        precision = " or --bf16 True instead of --fp16" if args.fp16 else " or in float32" if args.bf16 else ""
        clip = " or --max_grad_norm 3" if not args.max_grad_norm else ""
        some = f" ({', '.join(batch['images'][:3])}, ...)" if batch["images"] else ""
        return (
            f"{what}; expected a finite number. This step was not applied. The images{some} are listed in "
            f"{self.folder / 'nan_batch.json'}. {resume} with {lower}{precision}{clip}."
        )


def _number(value: Tensor) -> float | str:
    """Return a number, or a string if it is not finite, because JSON has no NaN."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def without_ids(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch without `sample_ids` and `epochs`, which are not inputs of the network."""
    return {name: value for name, value in batch.items() if name not in ("sample_ids", "epochs")}


# ---- Memory ------------------------------------------------------------------------------------------------------


def out_of_memory(args: TrainingArguments, *, step: int) -> torch.OutOfMemoryError:
    """Return an error with the measured peak and the three options that help most, in the order to try them."""
    advice = memory_advice(args)
    return torch.OutOfMemoryError(f"Out of memory at step {step}: {_peak(args.device)}. Try, in this order: {advice}.")


def memory_advice(args: Any) -> str:
    """Return the three options of a run that save most memory, in the order to try them."""
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    # transformers is renaming this option; read both names while both exist.
    checkpointing = (
        "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"
    )
    recomputes = args.gradient_checkpointing or getattr(args, checkpointing)
    pretrains = hasattr(args, "global_crop_size")  # False for fine-tuning
    smallest = 4 if pretrains and args.koleo_loss_weight else 2  # KoLeo needs two images in the halved batch
    own = [
        (args.init_from is not None and args.mode == "full", "--mode lora or last_blocks (fewer moments of Adam)"),
        (args.num_local_crops > 2, f"--num_local_crops {args.num_local_crops // 2}"),
        (args.head_num_prototypes > 4096, f"--head_num_prototypes {args.head_num_prototypes // 4}"),
        (True, "a smaller --preset"),
        (True, f"a smaller --global_crop_size (now {args.global_crop_size})"),
    ] if pretrains else [
        (args.mode != "linear", "--mode linear (only the head)"),
        (True, "a smaller --image_size or model"),
    ]  # fmt: skip
    options = [
        (
            batch >= smallest,
            f"--per_device_train_batch_size {batch // 2} --gradient_accumulation_steps {2 * accumulation} (same "
            "number of images per step)",
        ),
        (not recomputes, f"--{checkpointing} True (a third slower)"),
        (not (args.bf16 or args.fp16), "--bf16 True (halves the memory of activations)"),
        *own,
        (True, "a device with more memory"),
    ]
    return "; ".join([text for helps, text in options if helps][:3])


def free_memory(device: torch.device) -> int:
    """Return the free memory of a GPU, or of the machine, in bytes."""
    import psutil

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _peak(device: torch.device) -> str:
    gib = 2**30
    if device.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        name = torch.cuda.get_device_name(device)
        return f"the tensors of this process used {peak / gib:.2f} GiB at the peak, of {total / gib:.2f} GiB on {name}"
    peak_mib = peak_memory_mib()
    return "the peak is unknown" if peak_mib is None else f"this process used {peak_mib / 1024:.2f} GiB at the peak"


def peak_memory_mib() -> float | None:
    """Return the peak resident memory of this process in MiB, or None if the system does not report it."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
