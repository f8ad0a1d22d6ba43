"""What two processes over gloo on the loopback interface do; `test_two_processes.py` compares what they leave behind.

Starting two interpreters takes ten times as long as everything they do, so they are started once and run one scenario
after the other. Each scenario writes `NAME.RANK.pt`.
"""

import math
import os
import signal
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainerCallback

from builders import SignalAt
from hf_regvit.pretraining.run import pretrain
from hf_regvit.pretraining.trainer import DinoTrainer
from hf_regvit.training.checkpoints import list_checkpoints
from hf_regvit.training.distributed import full_tensor
from hf_regvit.training.finite import NonFiniteError
from hf_regvit.training.signals import TrainingInterrupted
from tiny_run import Crops, MasksOfTheImage, arguments, feature_network, tiny_config, trained

PER_PROCESS = 3
# Adam divides a gradient by its own size, so the rounding of a gradient near zero would become a whole step. With this
# epsilon the step stays proportional to small gradients, and a difference of 1e-6 in them stays one.
COMMON = {"koleo_loss_weight": 0.0, "adam_epsilon": 1e-3, "warmup_steps": 0, "max_steps": 4, "teacher_momentum": 0.8}
IMAGES = 20
OPTIONAL = {
    "paka_loss_weight": 1.0, "ibot_visible_patches": True, "average_heads_only": True, "gram_loss_weight": 1.0
}  # fmt: skip
# Gram anchoring is refreshed by the trainer.
WITH_OPTIONAL = {"options": OPTIONAL, "gram_loss_weight": 1.0, "gram_refresh_steps": 2}


@dataclass
class Recorder(TrainerCallback):
    """Gradients of the first step after clipping, and seeds of the steps."""

    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seeds.append(torch.initial_seed())
        if not self.gradients:
            self.gradients = {
                name: full_tensor(parameter.grad).clone() for name, parameter in model.student.named_parameters()
            }


def outcome(folder: Path, *, resume: str | None = None, collator=None, callbacks=(), **overrides) -> dict:
    """One run, as a dictionary of everything that two runs have to agree on."""
    recorder, data = Recorder(), Crops(IMAGES)
    options = {"centering": overrides.pop("centering", "softmax"), "koleo_loss_weight": 0.0}
    options |= overrides.pop("options", {})
    config = tiny_config(drop_path_rate=overrides.pop("drop_path_rate", 0.0))
    backend = {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
    fields = {"per_device_train_batch_size": PER_PROCESS, "centering": options["centering"], **COMMON, **backend}
    trainer = trained(
        folder, config=config, options=options, dataset=data, collator=collator or MasksOfTheImage(),
        callbacks=[recorder, *callbacks], resume=resume, **(fields | overrides),
    )  # fmt: skip
    return {
        "state": {name: full_tensor(tensor.detach()).clone() for name, tensor in trainer.model.state_dict().items()},
        "gradients": recorder.gradients,
        "seeds": recorder.seeds,
        "seen": data.seen,
        "steps": trainer.state.global_step,
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "sharded": type(trainer.model).__name__,
        "failed_saves": trainer.failed_saves,
    }


@contextmanager
def sharding(trainer: type = DinoTrainer):
    """Makes accelerate shard over CPU processes too, which it only does for accelerators."""
    from accelerate.state import DistributedType, PartialState

    create = trainer.create_accelerator_and_postprocess

    def pretend(self):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        create(self)

    trainer.create_accelerator_and_postprocess = pretend
    try:
        yield {"fsdp": True}
    finally:
        trainer.create_accelerator_and_postprocess = create


class UnequalMasks(MasksOfTheImage):
    """The second process gets fewer masked patches than the first."""

    def __call__(self, samples):
        batch = super().__call__(samples)
        if os.environ["RANK"] == "1":
            keep = torch.arange(len(batch["mask_indices"])) < 2
            for name in ("mask_indices", "mask_weights"):
                batch[name] = batch[name][keep]
        return batch


def stopped(folder: Path, callback: TrainerCallback, **overrides) -> dict:
    """A run that a callback stops: the message of its error and, after a signal, the resumed run."""
    try:
        outcome(folder, callbacks=[callback], **overrides)
    except NonFiniteError as error:
        return {"message": str(error)}
    except TrainingInterrupted as stop:
        return {"code": stop.code, "message": str(stop), "resumed": outcome(folder, resume="last")}
    return {}


def scenarios(folder: Path) -> dict:
    """Name and result of everything that two processes are asked to do."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    results = {}
    for centering in ("softmax", "sinkhorn"):
        results[f"ddp_{centering}"] = outcome(folder / f"ddp_{centering}", centering=centering, **saving)
        with sharding() as fsdp:
            results[f"fsdp_{centering}"] = outcome(folder / f"fsdp_{centering}", centering=centering, **fsdp, **saving)
    results["ddp_bf16"] = outcome(folder / "ddp_bf16", bf16=True)
    with sharding() as fsdp:
        results["fsdp_bf16"] = outcome(folder / "fsdp_bf16", bf16=True, **fsdp)
    results["accumulated"] = outcome(
        folder / "accumulated", centering="sinkhorn", per_device_train_batch_size=1, gradient_accumulation_steps=3
    )
    with sharding() as fsdp:
        results["fsdp_accumulated"] = outcome(
            folder / "fsdp_accumulated", centering="sinkhorn", per_device_train_batch_size=1,
            gradient_accumulation_steps=3, **fsdp,
        )  # fmt: skip
        results["fsdp_resumed"] = outcome(
            folder / "fsdp_resumed", resume=str(folder / "fsdp_softmax" / "checkpoint-2"), **fsdp
        )
        results["fsdp_from_ddp"] = outcome(
            folder / "fsdp_from_ddp", resume=str(folder / "ddp_softmax" / "checkpoint-2"), **fsdp
        )
        sharded = {**fsdp, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
        results["sharded_files"] = outcome(folder / "sharded", **sharded, **saving)
        results["sharded_files_resumed"] = outcome(
            folder / "sharded_resumed", resume=str(folder / "sharded" / "checkpoint-2"), **sharded
        )
    results["ddp_from_fsdp"] = outcome(folder / "ddp_from_fsdp", resume=str(folder / "fsdp_softmax" / "checkpoint-2"))
    results["ddp_optional"] = outcome(folder / "ddp_optional", **WITH_OPTIONAL, **saving)
    with sharding() as fsdp:
        results["fsdp_optional"] = outcome(folder / "fsdp_optional", **WITH_OPTIONAL, **fsdp)
        results["optional_resumed"] = outcome(
            folder / "optional_resumed", resume=str(folder / "ddp_optional" / "checkpoint-2"), **WITH_OPTIONAL, **fsdp
        )
    results["ddp_teacher"] = outcome(folder / "ddp_teacher", network=feature_network())
    with sharding() as fsdp:
        results["fsdp_teacher"] = outcome(folder / "fsdp_teacher", network=feature_network(), **fsdp)
    results["from_one_process"] = outcome(folder / "from_one", resume=str(folder / "one" / "checkpoint-2"))
    results["unequal_masks"] = outcome(folder / "unequal", collator=UnequalMasks())
    results["drop_path"] = outcome(folder / "drop_path", drop_path_rate=0.5)
    results["signal"] = stopped(folder / "signal", SignalAt(2, signal.SIGUSR1, process=1))
    results["disk_full"] = disk_full(folder / "disk_full")
    results["not_finite"] = stopped(folder / "not_finite", NanInOne())
    with sharding() as fsdp:
        results["not_finite_fsdp"] = stopped(folder / "not_finite_fsdp", NanInOne(), max_grad_norm=0.0, **fsdp)
        results["disk_full_fsdp"] = disk_full(folder / "disk_full_fsdp", **fsdp)
        # The whole job: every process returns the teacher, the first writes it.
        short = {**COMMON, "max_steps": 2, "monitor_steps": 1, "panel_steps": 1, "ddp_backend": "gloo", **fsdp}
        args = arguments(folder / "export", per_device_train_batch_size=PER_PROCESS, **short)
        results["export"] = {"state": pretrain(args, train_dataset=Crops(IMAGES)).state_dict()}
    return results


def disk_full(folder: Path, **overrides) -> dict:
    """Only the first process writes the optimizer; the second must not wait for it for ever."""
    save = torch.save

    def full(value, path, *args, **kwargs):
        if str(path).endswith("optimizer.pt") and "checkpoint-2" in str(path):
            raise OSError(28, "No space left on device")
        return save(value, path, *args, **kwargs)

    torch.save = full
    try:
        result = outcome(folder, save_strategy="steps", save_steps=2, **overrides)
    finally:
        torch.save = save
    return {**result, "checkpoints": [path.name for path in list_checkpoints(folder)]}


class NanInOne(TrainerCallback):
    """The second process multiplies its loss by NaN in the third step."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if args.process_index == 1 and state.global_step == 2:
            model.register_forward_hook(lambda module, args, out: {**out, "loss": out["loss"] * math.nan})
