"""Alarms of a pretraining run: non-finite numbers, collapse, identical registers, and running out of memory.

A loss or gradient that is not finite always stops the run, because all later results would be meaningless. Signs of
collapse log a warning, and stop the run only with `--stop_on_collapse`: their thresholds are heuristic, and a false
alarm must not stop an unattended run. Every message names the options to change.

The origin of the thresholds is documented above `RULES`.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from ..figures.curves import read_metrics
from ..models.configuration_regvit import RegViTConfig
from ..training.callbacks import MetricsFile
from ..training.distributed import from_first
from .arguments import PretrainingArguments
from .comparison import quality

logger = logging.getLogger(__name__)


class CollapseError(RuntimeError):
    """Stop of a run whose representation collapses."""


# ---- Collapse ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alarm:
    """Raised alarm: its name, the optimizer step, and a message with advice."""

    name: str
    step: int
    message: str


class Recipe(NamedTuple):
    """Facts of a run that the rules read: its options, the configuration of its backbone, its starting point."""

    args: PretrainingArguments
    config: RegViTConfig
    start: Mapping[str, float] = {}  # quality of the starting model

    @property
    def ln_k(self) -> float:
        """Entropy of a uniform target, in nats."""
        return math.log(self.args.head_num_prototypes)

    @property
    def uniform_loss(self) -> float:
        """Sum of the DINO terms of a student that assigns equal probability to all prototypes, in nats."""
        pairs = 2 * self.args.num_local_crops
        return self.args.dino_loss_weight * self.ln_k * (pairs + 2) / (max(pairs, 1) + 2)


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
    if not recipe.args.dino_loss_weight:
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
    most = min(recipe.ln_k, math.log(2 * recipe.args.per_device_train_batch_size))
    if marginal >= FEW_PROTOTYPES * most:
        return None
    return (
        f"All images are assigned to few prototypes: the mean target of a batch has an entropy of {marginal:.3f} "
        f"nats, but {most:.3f} is possible. Lower --center_momentum (usual: 0.9) or set --centering sinkhorn; raise "
        "--teacher_temperature if it is below 0.04."
    )


def _same_features(values: Mapping[str, float], recipe: Recipe) -> str | None:
    std, rank, width = values["feature_std"], values["effective_rank"], recipe.config.hidden_size
    if std >= SMALLEST_STD and rank >= SMALLEST_RANK:
        return None
    return (
        f"The teacher has almost the same features for all images: the standard deviation of CLS is {std:.3f} (1 if "
        f"features point in all directions) and the effective rank is {rank:.2f} of {width} dimensions. Raise "
        "--koleo_loss_weight (usual: 0.1), lower --learning_rate, and check the other alarms; in a run of a few "
        "hundred steps, set --layerscale_value 1."
    )


def _same_registers(values: Mapping[str, float], recipe: Recipe) -> str | None:
    if values["register_cosine"] <= SAME_REGISTERS:
        return None
    return (
        f"The {recipe.config.num_register_tokens} registers are identical: their mean cosine is "
        f"{values['register_cosine']:.5f}. Identical registers get identical gradients and never diverge. Raise "
        "--register_init_std (default: 0.02; use 1 in a run of a few hundred steps), or set --num_register_tokens 1."
    )


def _below_start(values: Mapping[str, float], recipe: Recipe) -> str | None:
    start = recipe.start
    below = {name: value for name, value in quality(values).items() if value < start.get(name, -math.inf)}
    if not below:
        return None
    said = ", ".join(f"{name} is {value:.4f} ({start[name]:.4f} at the start)" for name, value in below.items())
    return (
        f"The features are worse than those of the starting model: {said}. Lower --learning_rate (now "
        f"{recipe.args.learning_rate:g}), raise --gram_loss_weight (now {recipe.args.gram_loss_weight:g}) or "
        "--freeze_backbone_steps, or set --mode lora. If a teacher was better than the start, it is in best/."
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
PATIENCE = 3  # consecutive log lines for which a rule must hold

# Name, values that the rule reads, rule, and a flag to check it from the first line on. An untrained network also has
# uniform targets, so the other rules wait for the end of the learning-rate warm-up.
RULES: tuple[tuple[str, tuple[str, ...], Rule, bool], ...] = (
    ("uniform_targets", ("teacher_entropy",), _uniform_targets, False),
    ("loss_at_ln_k", ("dino_global_loss",), _loss_at_ln_k, False),
    ("one_prototype", ("teacher_marginal_entropy",), _one_prototype, False),
    ("same_features", ("feature_std", "effective_rank"), _same_features, False),
    ("same_registers", ("register_cosine",), _same_registers, True),
    ("below_start", ("eval_patch_agreement",), _below_start, True),
)


class CollapseAlarms(TrainerCallback):
    """Check every log line against `RULES`, and raise an alarm once per rule that holds for several lines in a row.

    Alarms are logged as warnings, written to the metrics file, and kept in `raised` for the report.

    Args:
        args: Options of the run.
        config: Configuration of the backbone.
        first_step: Step from which all rules are checked (the register rule starts at once); default: the end of the
            warm-up.
        metrics: Metrics file that alarms are written to.
    """

    def __init__(
        self,
        args: PretrainingArguments,
        config: RegViTConfig,
        *,
        first_step: int | None = None,
        metrics: MetricsFile | None = None,
    ) -> None:
        self.recipe = Recipe(args, config)
        self.first_step, self.metrics = first_step, metrics
        self.raised: list[Alarm] = []
        self._in_a_row: dict[str, int] = {}

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Read the length of the warm-up and, in a resumed run, the earlier alarms."""
        if self.first_step is None:
            self.first_step = self.recipe.args.schedules(state.max_steps).warmup_steps
        if state.global_step and self.metrics is not None and self.metrics.path.exists():
            lines = read_metrics(self.metrics.path)
            self.raised = [Alarm(line["alarm"], line["step"], line["message"]) for line in lines if "alarm" in line]
            for line in lines:  # continues the counts
                self._check(line, line["step"], state)

    def on_log(
        self, args: object, state: TrainerState, control: TrainerControl, logs: Mapping[str, float] = {}, **kwargs: Any
    ) -> None:
        """Check one log line."""
        self._check(logs, state.global_step, state)
        # Measurements may differ between processes in the last digit.
        if self.recipe.args.stop_on_collapse and from_first(bool(self.raised)):
            control.should_training_stop = True

    def _check(self, values: Mapping[str, float], step: int, state: TrainerState) -> None:
        """Check the values of one step; if values of a rule are missing, its count does not change."""
        if step == 0 and self.recipe.args.init_from is not None:
            self.recipe = self.recipe._replace(start={**self.recipe.start, **quality(values)})
        for name, keys, rule, at_once in RULES:
            if any(key not in values for key in keys) or any(alarm.name == name for alarm in self.raised):
                continue
            message = rule(values, self.recipe) if at_once or step >= (self.first_step or 0) else None
            self._in_a_row[name] = self._in_a_row.get(name, 0) + 1 if message else 0
            if message and self._in_a_row[name] >= PATIENCE:
                self.record(Alarm(name, step, message), state)

    def record(self, alarm: Alarm, state: TrainerState) -> None:
        """Keep an alarm for the report, log it and write it to the metrics file."""
        self.raised.append(alarm)
        if not state.is_world_process_zero:
            return
        logger.warning("Alarm at step %d, %s: %s", alarm.step, alarm.name, alarm.message)
        if self.metrics is not None:
            self.metrics.append({"step": alarm.step, "alarm": alarm.name, "message": alarm.message})
