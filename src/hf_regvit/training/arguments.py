"""Options of all kinds of runs: pretraining, fine-tuning, training on images with texts."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..evaluation.image_tasks import option


def plain(value: object) -> Any:
    """Return the value of an option that transformers may hold as an enumeration."""
    return getattr(value, "value", value)


@dataclass
class RunArguments(TrainingArguments):
    """Options that all training runs share, in addition to those of `transformers.TrainingArguments`."""

    image_column: str | None = option(
        None, "Column with the images. Default: the only image column, or 'image'.", "--image_column_name"
    )
    label_column: str | None = option(
        None,
        "Column with the labels, masks or depth maps. Default: 'label', or the only other image column.",
        "--label_column_name",
    )
    max_bad_share: float = option(0.01, "Share of unusable images that stops the run; bad_images.jsonl lists them.")
    allow_batch_change: bool = option(
        False, "Whether to resume with another number of images per step, in steps unlike those of the earlier run."
    )
    allow_data_change: bool = option(False, "Whether to resume with a different list of images than the checkpoint.")
    track_model: bool = option(True, "Whether to send the finished model to trackers with files (trackio, wandb).")
    dataloader_timeout: int = option(600, "Seconds to wait for a batch before the workers are restarted, once.")

    # Options of Trainer with other defaults
    logging_steps: float = option(10, "Number of steps between log lines.")
    logging_nan_inf_filter: bool = option(False, "Whether to hide NaN losses from the log. Off: a run stops at them.")
    remove_unused_columns: bool = option(False, "Whether to drop columns of the data. Off: there are none.")
    dataloader_pin_memory: bool = option(False, "Whether to pin memory in data loaders; for accelerators only.")
    ddp_find_unused_parameters: bool | None = option(False, "Search for unused parameters in DDP. Off: none.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for item in dataclasses.fields(self):
            value = getattr(self, item.name, None)
            numbers = value if isinstance(value, list) else [value]
            finite = all(math.isfinite(number) for number in numbers if isinstance(number, float))
            self._expect(item.name, finite, "a finite number")

    @property
    def device(self) -> torch.device:
        """Device of this process. A CPU has no index, with which transformers 5.15 could not load an optimizer."""
        found = super().device
        return torch.device("cpu") if found.type == "cpu" else found

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(str(self.output_dir))

    @property
    def images_per_step(self) -> int:
        """Number of images per optimizer step over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @classmethod
    def own_options(cls) -> set[str]:
        """Return the names of all options that this package defines, also those of Trainer with other defaults."""
        own = cls.__mro__[: cls.__mro__.index(TrainingArguments)]
        return {name for one in own for name in one.__annotations__}

    def resolved(self) -> dict[str, Any]:
        """Return all options of this package and the non-default options of Trainer, as plain values for YAML."""
        own, recipe = self.own_options(), {}
        for item in dataclasses.fields(self):
            if not item.init or item.name == "hub_token":  # the recipe is written to files, so it must hold no token
                continue
            value, default = plain(getattr(self, item.name)), plain(item.default)
            if default is dataclasses.MISSING:
                default = None
            if item.name in own or (value != default and isinstance(value, bool | int | float | str | list)):
                recipe[item.name] = value
        return recipe

    def subset(self, *names: str) -> dict[str, Any]:
        """Return the values of some options, as keyword arguments of the same names."""
        return {name: getattr(self, name) for name in names}

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        """Raise a ValueError that shows an option and what was expected, unless the condition holds."""
        if not holds:
            value = plain(getattr(self, name))
            raise ValueError(f"{name} is {value!r}; expected {expected}.")

    def _expect_range(self, name: str, expected: str, *, above: float = -math.inf, at_most: float = math.inf) -> None:
        """Raise a ValueError unless an option holds two ascending numbers from 0 on between the limits."""
        value = getattr(self, name)
        good = len(value) == 2 and above < value[0] <= value[1] <= at_most and value[0] >= 0
        self._expect(name, good, expected)


@dataclass
class LoraArguments(RunArguments):
    """Options of runs that can train low-rank updates, with `--mode lora`."""

    lora_r: int = option(8, "Rank of the low-rank updates.")
    lora_alpha: float = option(16.0, "Scaling numerator of the low-rank updates; the scale is lora_alpha / lora_r.")
    lora_dropout: float = option(0.0, "Dropout probability of the inputs of the low-rank updates.")
    lora_target_modules: list[str] = option(
        ["qkv", "o_proj"],
        "Linear layers that receive low-rank updates: qkv, o_proj, fc1, fc2, gate_up_proj, down_proj.",
    )
