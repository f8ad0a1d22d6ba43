"""What changes over a run and per parameter: schedules, and the learning-rate and weight-decay rules.

Every time-dependent number is a pure function of the optimizer step, so that resuming needs no state of its own.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

# ---- Schedules ---------------------------------------------------------------------------------------------------


def cosine_schedule(
    step: int,
    *,
    base: float,
    final: float,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_start: float = 0.0,
    freeze_steps: int = 0,
) -> float:
    """Zeros, then a linear warm-up, then half a cosine period; a pure function of the step.

    The warm-up includes both ends, so its last value is already `base`, and the cosine starts at `base` again. The
    cosine comes near `final` at `total_steps - 1` and is exactly `final` from `total_steps` on.

    Args:
        step: 0-based optimizer step.
        base: value at the top.
        final: value at and after the end.
        total_steps: length of the whole schedule.
        warmup_steps: steps from `warmup_start` to `base`.
        warmup_start: first value of the warm-up.
        freeze_steps: leading steps with the value 0.

    Returns:
        The value at `step`.

    Source: released DINOv2 training code (`CosineScheduler`).
    """
    if step >= total_steps:
        return final
    if step < freeze_steps:
        return 0.0
    step -= freeze_steps
    if step < warmup_steps:
        return warmup_start + (base - warmup_start) * step / max(warmup_steps - 1, 1)
    step -= warmup_steps
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * step / (total_steps - warmup_steps - freeze_steps)))


class StepValues(NamedTuple):
    """What the schedules say for one step."""

    learning_rate: float
    last_layer_learning_rate: float
    weight_decay: float
    teacher_momentum: float
    teacher_temperature: float


@dataclass(frozen=True)
class Schedules:
    """Every number of a run that depends on time. All durations are optimizer steps.

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
        """Values at the 0-based optimizer step; after the last step the final ones."""
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
            # A warm-up as long as the schedule itself: linear, then constant.
            teacher_temperature=cosine_schedule(
                step,
                base=self.teacher_temperature,
                final=self.teacher_temperature,
                total_steps=self.warmup_teacher_temperature_steps,
                warmup_steps=self.warmup_teacher_temperature_steps,
                warmup_start=self.warmup_teacher_temperature,
            ),
        )


# ---- Parameter groups --------------------------------------------------------------------------------------------


class ParameterRule(NamedTuple):
    """Multipliers of one parameter. Parameters with the same rule share an optimizer group."""

    lr_multiplier: float
    wd_multiplier: float
    is_last_layer: bool


def _backbone_depth(name: str, num_layers: int) -> int:
    """0 for everything before the blocks, i + 1 for block i, L + 1 after them."""
    first, *rest = name.split(".")
    if first == "embeddings":
        return 0
    if first == "layers":
        return int(rest[0]) + 1
    if first == "layernorm":
        return num_layers + 1
    raise ValueError(
        f"no learning-rate rule for the backbone parameter {name!r}; expected embeddings.*, layers.N.* or "
        "layernorm.*. Pretraining supports the plain RegViT backbone, without an extra pooler or norm."
    )


def parameter_rules(
    names: Iterable[str],
    *,
    num_layers: int,
    layer_decay: float = 1.0,
    patch_embed_lr_multiplier: float = 1.0,
) -> dict[str, ParameterRule]:
    """Learning-rate and weight-decay multiplier of every student parameter, by explicit rules on its name.

    Weight decay is 0 for biases, norms and LayerScale gains, and 1 for everything else, the CLS token, registers,
    mask token, positions and prototypes included. The learning rate of the backbone falls by `layer_decay` per block
    towards the input; final norm and heads keep 1; the patch embedding is slowed down once more.

    Args:
        names: parameter names with the submodule in front: `backbone.*`, `dino_head.*`, `ibot_head.*`.
        num_layers: L, blocks of the backbone.
        layer_decay: factor per block, 1 for none.
        patch_embed_lr_multiplier: extra factor of patch projection weight and bias.

    Returns:
        One rule per name, in the order of `names`.

    Raises:
        ValueError: a backbone parameter that no rule covers.

    Source: released DINOv2 training code (`get_params_groups_with_decay`).
    """
    rules = {}
    for name in names:
        lr_multiplier = 1.0
        if name.startswith("backbone."):
            inner = name.removeprefix("backbone.")
            lr_multiplier = layer_decay ** (num_layers + 1 - _backbone_depth(inner, num_layers))
            if inner.startswith("embeddings.patch_embeddings."):
                lr_multiplier *= patch_embed_lr_multiplier
        undecayed = name.endswith((".bias", ".lambda1")) or "norm" in name
        rules[name] = ParameterRule(lr_multiplier, 0.0 if undecayed else 1.0, ".last_layer." in name)
    return rules


def parameter_groups(student: nn.Module, rules: dict[str, ParameterRule]) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters of `student`, one per distinct rule, backbone and heads apart.

    Args:
        student: module whose `named_parameters` are the keys of `rules`.
        rules: from `parameter_rules`.

    Returns:
        Groups with `params`, `lr`, `weight_decay`, `is_backbone` and the fields of `ParameterRule`. The schedules set
        `lr` and `weight_decay` before every step; until then nothing moves.
    """
    groups: dict[tuple[ParameterRule, bool], dict[str, Any]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            rule, is_backbone = rules[name], name.startswith("backbone.")
            new = {"params": [], "lr": 0.0, "weight_decay": 0.0, "is_backbone": is_backbone, **rule._asdict()}
            groups.setdefault((rule, is_backbone), new)["params"].append(parameter)
    return list(groups.values())


def set_rates(optimizer: torch.optim.Optimizer, values: StepValues, *, freeze_backbone: bool = False) -> None:
    """Writes learning rate and weight decay of one step into the groups made by `parameter_groups`.

    A frozen last layer has a learning rate of 0 and so no decay either, but its Adam moments keep accumulating, as in
    the official code. A frozen backbone is the same: its moments are ready when it thaws.

    Args:
        optimizer: with the groups of `parameter_groups`.
        values: of the step.
        freeze_backbone: whether the backbone stands still, as in the first steps of continued pretraining.
    """
    for group in optimizer.param_groups:
        rate = values.last_layer_learning_rate if group["is_last_layer"] else values.learning_rate
        if freeze_backbone and group["is_backbone"]:
            rate = 0.0
        group["lr"] = rate * group["lr_multiplier"]
        group["weight_decay"] = values.weight_decay * group["wd_multiplier"]
