"""Alarms of a pretraining run: non-finite numbers, collapse, identical registers, and running out of memory.

A loss or gradient that is not finite always stops the run, because all later results would be meaningless. Signs of
collapse log a warning, and stop the run only with `--stop_on_collapse`: their thresholds are heuristic, and a false
alarm must not stop an unattended run. Every message names the options to change.

The origin of the thresholds is documented above `RULES`.
"""

import base64
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from .callbacks import MetricsFile, read_metrics
from .distillation import full_tensor

logger = logging.getLogger(__name__)


class NonFiniteError(FloatingPointError):
    """NaN or infinity in a loss or gradient; the step was not applied."""


class CollapseError(RuntimeError):
    """Stop of a run whose representation collapses."""


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
    of the step, for every affected process; `nan_batch.safetensors` holds the weights. `replay_nan_batch` repeats the
    step from these files.

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

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Store the random state at the start of the step."""
        self._batches, self._norms = [], {}
        self._random_state = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self._random_state["cuda"] = torch.cuda.get_rng_state()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check losses and gradients of all processes.

        Raises:
            NonFiniteError: If one of them is NaN or infinite.
        """
        if not self._batches:
            return
        norms = self._norms or self._gradient_norms(kwargs["model"].student)
        loss_is_finite = torch.isfinite(torch.stack([batch.outputs["loss"] for batch in self._batches])).all()
        gradient_is_finite = torch.isfinite(torch.stack(list(norms.values()))).all()
        if not self.check_gradients:
            gradient_is_finite = torch.ones_like(gradient_is_finite)
        flags = torch.stack([loss_is_finite, gradient_is_finite])[None].to(torch.uint8)
        if args.world_size > 1:
            from accelerate.utils import gather

            flags = gather(flags)  # (processes, 2)
        if flags.all():
            return
        self._stop(args, state, kwargs["model"], norms, flags.bool().cpu())

    @staticmethod
    def _gradient_norms(student: nn.Module) -> dict[str, Tensor]:
        norms = {}
        for name, part in student.named_children():
            gradients = [p.grad for p in part.parameters() if p.grad is not None]
            norms[name] = torch.stack([full_tensor(gradient.float().norm()) for gradient in gradients]).norm()
        return norms

    def _stop(
        self, args: Any, state: TrainerState, model: nn.Module, norms: Mapping[str, Tensor], finite: Tensor
    ) -> None:
        record = self._record(args, state, norms)
        records = [record]
        if args.world_size > 1:
            from accelerate.utils import gather_object

            records = gather_object([record])
        in_loss = [rank for rank, (loss, _) in enumerate(finite.tolist()) if not loss]
        # If every loss is finite, the NaN comes from the backward pass, and all processes have the averaged gradient.
        guilty = in_loss or list(range(len(records)))
        if state.is_world_process_zero:
            self._write(state, [records[rank] for rank in guilty], in_loss=bool(in_loss), model=model)
        raise NonFiniteError(self._message(args, state, records, guilty, in_loss=bool(in_loss)))

    def _record(self, args: Any, state: TrainerState, norms: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            "rank": args.process_index,
            "micro_batches": [
                {
                    "sample_ids": None if batch.sample_ids is None else batch.sample_ids.tolist(),
                    "epochs": None if batch.epochs is None else batch.epochs.tolist(),
                    "images": self._names_of(batch),
                    "terms": {name: _number(value) for name, value in batch.outputs.items()},
                }
                for batch in self._batches
            ],
            "gradient_norms": {name: _number(norm) for name, norm in norms.items()},
            "random_state": {
                name: base64.b64encode(bytes(value.numpy())).decode() for name, value in self._random_state.items()
            },
        }

    def _names_of(self, batch: _MicroBatch) -> list[str]:
        if not self.names or batch.sample_ids is None:
            return []
        return [str(self.names[index]) for index in batch.sample_ids.tolist()]

    def _write(self, state: TrainerState, records: list[dict[str, Any]], *, in_loss: bool, model: nn.Module) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "step": state.global_step,
            "epoch": state.epoch,
            "where": "loss" if in_loss else "gradient",
            "teacher_temperature": getattr(model, "teacher_temperature", None),
            "processes": records,
        }
        (self.folder / "nan_batch.json").write_text(json.dumps(content, indent=1) + "\n")
        tensors = model.state_dict()
        if not any(hasattr(tensor, "full_tensor") for tensor in tensors.values()):  # shards cannot be replayed
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(weights, self.folder / "nan_batch.safetensors", metadata={"format": "pt"})

    def _message(
        self,
        args: Any,
        state: TrainerState,
        records: Sequence[dict[str, Any]],
        guilty: Sequence[int],
        *,
        in_loss: bool,
    ) -> str:
        bad = records[guilty[0]]
        batch = next(
            (b for b in bad["micro_batches"] if isinstance(b["terms"]["loss"], str)), bad["micro_batches"][-1]
        )
        terms, norms = (
            ", ".join(f"{name}={float(value):.4g}" for name, value in values.items() if name != "loss")
            for values in (batch["terms"], bad["gradient_norms"])
        )
        rank = f" on rank {', '.join(map(str, guilty))}" if args.world_size > 1 else ""
        if in_loss:
            what = f"The loss is {batch['terms']['loss']} at step {state.global_step}{rank} ({terms})"
        else:
            what = f"The loss is finite at step {state.global_step}, but its gradient is not (norms: {norms})"
        saved = [path for path in self.folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
        newest = max(saved, key=lambda path: int(path.name.split("-")[1]), default=None)
        resume = f"Resume from {newest.name}" if newest else "There is no checkpoint yet (--save_steps). Start again"
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


def replay_nan_batch(
    folder: str | Path, network: nn.Module, dataset: Any, collate: Callable[[list[Any]], dict[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """Repeat the forward passes of the step that `FiniteGuard` stopped, for the first recorded process.

    Args:
        folder: Run folder with `nan_batch.json` and `nan_batch.safetensors`.
        network: `SelfDistillation` of the same recipe, in train mode; receives the weights of that step.
        dataset: Dataset indexed by `(epoch, sample id)`.
        collate: Collator of the run.

    Returns:
        Outputs of the network for each micro-batch.

    Raises:
        ValueError: If the batches have no sample ids.
    """
    folder = Path(folder)
    capture = json.loads((folder / "nan_batch.json").read_text())
    process = capture["processes"][0]
    network.load_state_dict(load_file(folder / "nan_batch.safetensors"))
    network.teacher_temperature = capture["teacher_temperature"]
    states = {name: _random_state(text) for name, text in process["random_state"].items()}
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    device = next(network.parameters()).device
    outputs = []
    for batch in process["micro_batches"]:
        if batch["sample_ids"] is None:
            raise ValueError(
                f"'{folder / 'nan_batch.json'}' names no images, because the collator returned no sample_ids. Use a "
                "collator that returns sample_ids and epochs."
            )
        items = [dataset[key] for key in zip(batch["epochs"], batch["sample_ids"], strict=True)]
        inputs = {name: value.to(device) for name, value in collate(items).items()}
        outputs.append(network(**without_ids(inputs)))
    return outputs


def _random_state(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def without_ids(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch without `sample_ids` and `epochs`, which are not inputs of the network."""
    return {name: value for name, value in batch.items() if name not in ("sample_ids", "epochs")}


# ---- Memory ------------------------------------------------------------------------------------------------------


def out_of_memory(error: torch.OutOfMemoryError, args: Any, *, step: int) -> torch.OutOfMemoryError:
    """Return an error with the measured peak and the three options that help most, in the order to try them."""
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    # transformers is renaming this option; read both names while both exist.
    checkpointing = (
        "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"
    )
    recomputes = args.gradient_checkpointing or getattr(args, checkpointing)
    pretrains = hasattr(args, "global_crop_size")  # False for fine-tuning
    smallest = 4 if pretrains and args.koleo_loss_weight else 2  # KoLeo needs two images in the halved batch
    own = [
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
    advice = "; ".join(text for helps, text in options if helps)
    three = "; ".join(advice.split("; ")[:3])
    return torch.OutOfMemoryError(f"Out of memory at step {step}: {_peak(args.device)}. Try, in this order: {three}.")


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
    import platform

    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


# ---- Collapse ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alarm:
    """Raised alarm: its name, the optimizer step, and a message with advice."""

    name: str
    step: int
    message: str


@dataclass(frozen=True)
class Recipe:
    """Settings of a run that the rules read.

    Attributes:
        num_prototypes: Number of prototypes K of the DINO head.
        images: Number of images B per process and micro-batch.
        num_local_crops: Number of local crops L.
        dino_loss_weight: Weight of the DINO terms.
        num_register_tokens: Number of registers R.
        width: Width D of the backbone.
    """

    num_prototypes: int
    images: int
    num_local_crops: int
    dino_loss_weight: float
    num_register_tokens: int
    width: int

    @property
    def ln_k(self) -> float:
        """Entropy of a uniform target, in nats."""
        return math.log(self.num_prototypes)

    @property
    def uniform_loss(self) -> float:
        """Sum of the DINO terms of a student that assigns equal probability to all prototypes, in nats."""
        terms = 2 * self.num_local_crops + 2
        return self.dino_loss_weight * self.ln_k * terms / (max(2 * self.num_local_crops, 1) + 2)


Rule = Callable[[Mapping[str, float], Recipe], str | None]


def _uniform_targets(values: Mapping[str, float], recipe: Recipe) -> str | None:
    share = values["teacher_entropy"] / recipe.ln_k
    if share < UNIFORM_SHARE:
        return None
    return (
        f"The targets are almost uniform: their entropy is {values['teacher_entropy']:.3f} nats, {share:.1%} of ln K "
        f"= {recipe.ln_k:.3f}. Lower --teacher_temperature and --warmup_teacher_temperature (usual: 0.04 to 0.07), or "
        "lower --head_num_prototypes."
    )


def _loss_at_ln_k(values: Mapping[str, float], recipe: Recipe) -> str | None:
    if not recipe.dino_loss_weight:
        return None
    loss = values.get("dino_local_loss", 0.0) + values["dino_global_loss"]
    if abs(loss / recipe.uniform_loss - 1) > LOSS_MARGIN:
        return None
    return (
        f"The DINO loss is {loss:.3f}, which is the loss of an untrained network ({recipe.uniform_loss:.3f}, from ln "
        "K). Lower the teacher temperatures or raise --learning_rate. In a short run, lower --teacher_momentum; in a "
        "run of a few hundred steps, set --layerscale_value 1."
    )


def _one_prototype(values: Mapping[str, float], recipe: Recipe) -> str | None:
    marginal = values["teacher_marginal_entropy"]
    most = min(recipe.ln_k, math.log(2 * recipe.images))
    if marginal >= FEW_PROTOTYPES * most:
        return None
    return (
        f"All images are assigned to few prototypes: the mean target of a batch has an entropy of {marginal:.3f} "
        f"nats, but {most:.3f} is possible. Lower --center_momentum (usual: 0.9) or set --centering sinkhorn; raise "
        "--teacher_temperature if it is below 0.04."
    )


def _same_features(values: Mapping[str, float], recipe: Recipe) -> str | None:
    std, rank = values["feature_std"], values["effective_rank"]
    if std >= SMALLEST_STD and rank >= SMALLEST_RANK:
        return None
    return (
        f"The teacher has almost the same features for all images: the standard deviation of CLS is {std:.3f} (1 if "
        f"features point in all directions) and the effective rank is {rank:.2f} of {recipe.width} dimensions. Raise "
        "--koleo_loss_weight (usual: 0.1), lower --learning_rate, and check the other alarms; in a run of a few "
        "hundred steps, set --layerscale_value 1."
    )


def _same_registers(values: Mapping[str, float], recipe: Recipe) -> str | None:
    if values["register_cosine"] <= SAME_REGISTERS:
        return None
    return (
        f"The {recipe.num_register_tokens} registers are identical: their mean cosine is "
        f"{values['register_cosine']:.5f}. Identical registers get identical gradients and never diverge. Raise "
        "--register_init_std (default: 0.02; use 1 in a run of a few hundred steps), or set --num_register_tokens 1."
    )


# Measured on builtin:photos with a ViT of 2 blocks and width 96, K = 256, B = 16, 60 steps; smallest and largest
# value from step 5 on, with the recipe of tests/integration/test_alarms_in_runs.py and several seeds:
#
#                                           entropy/ln K  loss/ln K   marginal/ln 2B  std of CLS  effective rank
#   healthy, softmax centering, 5 seeds     0.13 - 0.41   0.32 - 0.69   0.55 - 1.03   0.69 - 0.80   3.1 - 3.6
#   healthy, Sinkhorn, 2 seeds              0.77 - 0.83   0.91 - 1.10   1.59 - 1.60   0.73 - 0.86   3.2 - 3.7
#   no centering, temperatures 1, 3 seeds   0.997         0.998 - 1.000 1.60          0.73 - 0.88   3.7 - 6.4
#   no centering, 2 seeds, from step 30 on  0.02 - 0.06   0.08 - 0.19   0.22 - 0.35   0.70 - 0.76   3.0 - 3.2
#   LayerScale 1e-5, K = 2048, from step 20 0.98 - 0.999  1.02 - 1.05   2.17 - 2.20   0.01 - 0.09   1.00 - 1.05
#
# With a warm-up of 3 steps and a log line every 5 steps, the third row raises its alarm at step 15, the fourth (4
# seeds) at step 25 or 30, and the healthy rows never. The last row learns nothing in so few steps, so its alarm is
# correct. The entropy of Sinkhorn cannot fall below about ln(K / 2B): the official ratio of 21 with K = 131072 starts
# near 0.8. Its loss passes through ln K while it decreases, so a rule must hold for several log lines.
UNIFORM_SHARE = 0.98
LOSS_MARGIN = 0.01
FEW_PROTOTYPES = 0.4
# Below the final values of the last row and far below a healthy run: CLS is the same for all images.
SMALLEST_STD = 0.05
SMALLEST_RANK = 1.2
# Registers with the default initial spread of 0.02 reach a cosine of 0.89 in these 60 steps and exceed 0.95 in 400;
# identical registers have a cosine of 1 to the last digit.
SAME_REGISTERS = 0.999

# Name, values that the rule reads, rule, and a flag to check it from the first line on. An untrained network also has
# uniform targets, so the other rules wait for the end of the learning-rate warm-up.
RULES: tuple[tuple[str, tuple[str, ...], Rule, bool], ...] = (
    ("uniform_targets", ("teacher_entropy",), _uniform_targets, False),
    ("loss_at_ln_k", ("dino_global_loss",), _loss_at_ln_k, False),
    ("one_prototype", ("teacher_marginal_entropy",), _one_prototype, False),
    ("same_features", ("feature_std", "effective_rank"), _same_features, False),
    ("same_registers", ("register_cosine",), _same_registers, True),
)


class CollapseAlarms(TrainerCallback):
    """Check every log line against `RULES`, and raise an alarm once per rule that holds for several lines in a row.

    Alarms are logged as warnings, written to the metrics file, and kept in `raised` for the report.

    Args:
        recipe: Settings of the run that the rules read.
        first_step: Step from which all rules are checked (the register rule starts at once); default: the end of the
            warm-up.
        patience: Number of consecutive lines for which a rule must hold.
        stop: Whether an alarm stops the run.
        metrics: Metrics file that alarms are written to.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        first_step: int | None = None,
        patience: int = 3,
        stop: bool = False,
        metrics: MetricsFile | None = None,
    ) -> None:
        self.recipe, self.first_step, self.patience = recipe, first_step, patience
        self.stop, self.metrics = stop, metrics
        self.raised: list[Alarm] = []
        self._in_a_row: dict[str, int] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Read the length of the warm-up and, in a resumed run, the earlier alarms."""
        if self.first_step is None:
            self.first_step = args.schedules(state.max_steps).warmup_steps
        if state.global_step and self.metrics is not None and self.metrics.path.exists():
            lines = read_metrics(self.metrics.path)
            self.raised = [Alarm(line["alarm"], line["step"], line["message"]) for line in lines if "alarm" in line]

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check one log line; a line without the values of a rule does not affect its count."""
        for name, keys, rule, at_once in RULES:
            if any(key not in (logs or {}) for key in keys) or any(alarm.name == name for alarm in self.raised):
                continue
            asked = at_once or state.global_step >= (self.first_step or 0)
            message = rule(logs or {}, self.recipe) if asked else None
            self._in_a_row[name] = self._in_a_row.get(name, 0) + 1 if message else 0
            if message and self._in_a_row[name] >= self.patience:
                self.record(Alarm(name, state.global_step, message), state)
        stop = self.stop and bool(self.raised)
        if self.stop and args.world_size > 1:
            from accelerate.utils import broadcast_object_list

            stop = broadcast_object_list([stop])[0]  # measurements may differ between processes in the last digit
        if stop:
            control.should_training_stop = True

    def record(self, alarm: Alarm, state: TrainerState) -> None:
        """Keep an alarm for the report, log it and write it to the metrics file."""
        self.raised.append(alarm)
        if not state.is_world_process_zero:
            return
        logger.warning("Alarm at step %d, %s: %s", alarm.step, alarm.name, alarm.message)
        if self.metrics is not None:
            self.metrics.append({"step": alarm.step, "alarm": alarm.name, "message": alarm.message})
