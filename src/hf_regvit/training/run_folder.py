"""Folder of a pretraining run: starting points of continued pretraining, and output files.

- `backbone/`: EMA teacher for `AutoModel.from_pretrained`, image processor, model card.
- `training/`: student, teacher heads and centers as safetensors, for continued pretraining (`--init_from`).
- `panels/`: PCA and attention of fixed images during the run; `curves.png`: learning curves.
- `metrics.jsonl`, `report.json`, `resolved_recipe.yaml`, `environment.json`, and checkpoints.
"""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

# ---- Output files ------------------------------------------------------------------------------------------------


class RunRecord(TrainerCallback):
    """Write `resolved_recipe.yaml` and `environment.json` when training starts.

    They are not written earlier, because a rejected attempt to resume must not overwrite the files of the run.

    Args:
        folder: Run folder.
        recipe: Options of the run.
    """

    def __init__(self, folder: str | Path, recipe: Mapping[str, Any]) -> None:
        self.folder, self.recipe = Path(folder), dict(recipe)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write both files."""
        if state.is_world_process_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "resolved_recipe.yaml").write_text(yaml.safe_dump(self.recipe, sort_keys=False))
            write_json(self.folder / "environment.json", run_environment(args))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a dictionary as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that a run depends on."""
    from importlib.metadata import version

    names = ("hf_regvit", "torch", "torchvision", "transformers", "accelerate", "safetensors", "numpy", "pillow")
    return {name: version(name) for name in names}


def run_environment(args: TrainingArguments) -> dict[str, Any]:
    """Return the environment of a run for comparison with other runs, without host names and paths."""
    return {
        "packages": package_versions(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type,
        "processes": args.world_size,
        "cpu_threads": torch.get_num_threads(),
    }
