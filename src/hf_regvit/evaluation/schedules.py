"""Learning-rate schedules as functions of the optimizer step, so that resuming needs no state.

`poly_with_warmup` and `cosine_with_warmup` return factors of the learning rate, `cosine_schedule` the value itself.
"""

import math


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
    """Return the value of a schedule: zeros, then a linear warm-up, then half a cosine period.

    The warm-up includes both ends, so its last value is already `base`, and the cosine starts at `base` again. The
    cosine is close to `final` at `total_steps - 1` and exactly `final` from `total_steps` on.

    Args:
        step: 0-based optimizer step.
        base: Value at the end of the warm-up.
        final: Value at and after the end.
        total_steps: Length of the whole schedule in steps.
        warmup_steps: Number of steps from `warmup_start` to `base`.
        warmup_start: First value of the warm-up.
        freeze_steps: Number of initial steps with the value 0.

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


def poly_with_warmup(step: int, num_steps: int, warmup_ratio: float, *, start: float = 1e-6) -> float:
    """Return the learning rate factor: a linear decay from 1 to 0 with a linear warm-up from `start`."""
    return (1 - step / num_steps) * _warmup(step, round(num_steps * warmup_ratio), start)


def cosine_with_warmup(step: int, num_steps: int, warmup_ratio: float, *, start: float = 1e-3) -> float:
    """Return the learning rate factor: half a cosine from 1 to 0 with a linear warm-up from `start`."""
    factor = 0.5 * (1 + math.cos(math.pi * step / num_steps))
    return factor * _warmup(step, round(num_steps * warmup_ratio), start)


def _warmup(step: int, steps: int, start: float) -> float:
    return 1 - (1 - step / steps) * (1 - start) if step < steps else 1.0
