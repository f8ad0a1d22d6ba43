"""Schedules of a run, and the learning-rate and weight-decay rules of the parameters.

Every time-dependent number is a pure function of the optimizer step, so that resuming needs no extra state.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..evaluation.schedules import cosine_schedule
from ..training.parameter_groups import ParameterRule, group_parameters


class StepValues(NamedTuple):
    """Values of the schedules at one step."""

    learning_rate: float
    last_layer_learning_rate: float
    weight_decay: float
    teacher_momentum: float
    teacher_temperature: float


@dataclass(frozen=True)
class Schedules:
    """Schedules of all numbers that change during a run. Durations are in optimizer steps.

    Source: released DINOv2 training code and `vitl16_short` / `vitl14` configurations.
    """

    total_steps: int
    learning_rate: float
    min_learning_rate: float
    warmup_steps: int
    freeze_last_layer_steps: int
    weight_decay: float
    weight_decay_end: float
    teacher_momentum: float
    teacher_momentum_end: float
    warmup_teacher_temperature: float
    teacher_temperature: float
    warmup_teacher_temperature_steps: int
    freeze_backbone_steps: int = 0

    def at(self, step: int) -> StepValues:
        """Return the values at a 0-based optimizer step; after the last step, the final values."""
        learning_rate = cosine_schedule(
            step,
            base=self.learning_rate,
            final=self.min_learning_rate,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
        )
        return StepValues(
            learning_rate=learning_rate,
            last_layer_learning_rate=0.0 if step < self.freeze_last_layer_steps else learning_rate,
            weight_decay=cosine_schedule(
                step, base=self.weight_decay, final=self.weight_decay_end, total_steps=self.total_steps
            ),
            teacher_momentum=cosine_schedule(
                step, base=self.teacher_momentum, final=self.teacher_momentum_end, total_steps=self.total_steps
            ),
            # The warm-up is as long as the schedule itself, so the value rises linearly and then stays constant.
            teacher_temperature=cosine_schedule(
                step,
                base=self.teacher_temperature,
                final=self.teacher_temperature,
                total_steps=self.warmup_teacher_temperature_steps,
                warmup_steps=self.warmup_teacher_temperature_steps,
                warmup_start=self.warmup_teacher_temperature,
            ),
        )


def parameter_groups(student: nn.Module, rules: dict[str, ParameterRule]) -> list[dict[str, Any]]:
    """Return optimizer groups of the trainable parameters, one per distinct rule, separate for backbone and heads.

    Args:
        student: Module whose parameter names are the keys of `rules`.
        rules: Rules from `parameter_rules`.

    Returns:
        Groups with `params`, `lr`, `weight_decay`, `is_backbone` and the fields of `ParameterRule`. `lr` and
        `weight_decay` are 0 until `set_rates` sets them before every step.
    """
    entries = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            rule, is_backbone = rules[name], name.startswith("backbone.")
            settings = {"lr": 0.0, "weight_decay": 0.0, "is_backbone": is_backbone, **rule._asdict()}
            entries.append(((rule, is_backbone), parameter, settings))
    return group_parameters(entries)


def set_rates(optimizer: torch.optim.Optimizer, values: StepValues, *, freeze_backbone: bool = False) -> None:
    """Set learning rate and weight decay of one step in the groups made by `parameter_groups`.

    A frozen last layer has a learning rate of 0 and therefore no weight decay, but its Adam moments keep accumulating,
    as in the official code. The same holds for a frozen backbone.

    Args:
        optimizer: Optimizer with the groups of `parameter_groups`.
        values: Schedule values of the step.
        freeze_backbone: Whether to freeze the backbone, as in the first steps of continued pretraining.
    """
    for group in optimizer.param_groups:
        rate = values.last_layer_learning_rate if group["is_last_layer"] else values.learning_rate
        if freeze_backbone and group["is_backbone"]:
            rate = 0.0
        group["lr"] = rate * group["lr_multiplier"]
        group["weight_decay"] = values.weight_decay * group["wd_multiplier"]
