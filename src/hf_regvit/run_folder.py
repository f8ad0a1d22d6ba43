"""Folder of a pretraining run: starting points of continued pretraining, and output files.

- `backbone/`: EMA teacher for `AutoModel.from_pretrained`, image processor, model card.
- `training/`: student, teacher heads and centers as safetensors, for continued pretraining (`--init_from`).
- `panels/`: PCA and attention of fixed images during the run; `curves.png`: learning curves.
- `metrics.jsonl`, `report.json`, `resolved_recipe.yaml`, `environment.json`, and checkpoints.
"""

import copy
import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from .callbacks import read_metrics
from .distillation import SelfDistillation
from .modeling_regvit import RegViTModel

logger = logging.getLogger(__name__)

BACKBONE, TRAINING = "backbone", "training"


# ---- Starting points ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartingPoint:
    """Starting point of continued pretraining.

    Attributes:
        student: Student backbone, ready to train: with mask token, registers and positions of the training grid.
        teacher: Teacher backbone; the same object if the source has no separate student.
        training: Folder `training/` of the previous run, with heads and centers; None if the heads are new.
        changes: Sentences that describe the changes made to the source.
    """

    student: RegViTModel
    teacher: RegViTModel
    training: Path | None
    changes: tuple[str, ...]


def starting_point(
    source: str | Path,
    *,
    num_register_tokens: int,
    image_size: int,
    register_init_std: float = 0.02,
    drop_path_rate: float = 0.0,
    drop_path_mode: str = "batch_subset",
    seed: int = 0,
) -> StartingPoint:
    """Open the source given as `--init_from`.

    Args:
        source: Folder of a pretraining run (student, teacher, heads and centers are loaded), folder or Hub id of a
            RegViT, or any model that `hf_regvit.convert` reads (its classifier and pooler are dropped).
        num_register_tokens: Number of registers to add to a model that has none; existing registers are kept.
        image_size: Side of the training images in pixels; stored positions are resampled to their grid.
        register_init_std: Standard deviation of registers that are added.
        drop_path_rate: Drop path rate of the student in training.
        drop_path_mode: Drop path mode, as in `RegViTConfig`.
        seed: Random seed for registers that are added.

    Raises:
        ValueError: If the side is not a multiple of the patch size, the tokens of the model have no final norm, or
            the source is a checkpoint of an unfinished run.
        OSError: If the source cannot be read.
    """
    folder = Path(source)
    if (folder / "trainer_state.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"'{source}' is a checkpoint of a run that must be finished first. Resume it with "
            f"resume_from_checkpoint={source} (set max_steps to its step to finish at once), then start from the run "
            "folder."
        )
    run = folder if (folder / BACKBONE / "config.json").is_file() else None
    teacher = _open_backbone(
        str(folder / BACKBONE) if run else str(source), drop_path_rate=drop_path_rate, drop_path_mode=drop_path_mode
    )
    training = folder / TRAINING if run and (folder / TRAINING / "student.safetensors").is_file() else None
    student = teacher
    if training is not None:
        student = copy.deepcopy(teacher)
        _load_part(student, load_file(training / "student.safetensors"), "backbone.", str(training))
    changes: list[str] = []
    for backbone in [student] if student is teacher else [student, teacher]:
        changes = _prepare(
            backbone,
            num_register_tokens=num_register_tokens,
            image_size=image_size,
            register_init_std=register_init_std,
            seed=seed,
        )
    if training is None:
        changes.append("The heads are new; use --freeze_backbone_steps to freeze the backbone until they are trained.")
    return StartingPoint(student, teacher, training, tuple(changes))


def _open_backbone(source: str, **changes: Any) -> RegViTModel:
    """Load a RegViT, or convert any other model to one; heads and poolers are dropped."""
    from transformers import PreTrainedConfig

    from .conversion import check_source, convert

    check_source(source)
    fields: dict[str, Any] = {}
    if not Path(source).is_file():
        fields, _ = PreTrainedConfig.get_config_dict(source)
    if fields.get("model_type") == "regvit":
        model: Any = RegViTModel.from_pretrained(source, use_mask_token=True, discard_registers=False)
    else:
        model = convert(source)
        model = getattr(model, "regvit", model)
    config = copy.deepcopy(model.config)
    if config.final_norm != "tokens":
        raise ValueError(
            f"'{source}' has final_norm='{config.final_norm}', but the losses need a final norm of each token "
            "(final_norm='tokens'). Start from a model that pools CLS."
        )
    changes |= {"use_mask_token": True, "discard_registers": False, "pooler_act": None}
    for name, value in changes.items():
        setattr(config, name, value)
    backbone = RegViTModel(config, add_pooling_layer=False)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("pooler.")}
    missing, unexpected = backbone.load_state_dict(state, strict=False)
    if set(missing) - {"embeddings.mask_token"} or unexpected:
        raise ValueError(
            f"'{source}' has missing tensors {missing} and unexpected tensors {unexpected}; expected a plain backbone."
        )
    if missing:
        nn.init.zeros_(cast(Tensor, backbone.embeddings.mask_token))
    # A loaded model is in eval mode, and its parameters may be frozen.
    return backbone.train().requires_grad_(True)


@torch.no_grad()
def _prepare(
    backbone: RegViTModel, *, num_register_tokens: int, image_size: int, register_init_std: float, seed: int
) -> list[str]:
    """Add registers if there are none, resample positions to the training grid, and describe the changes."""
    config = backbone.config
    changes: list[str] = []
    if not config.num_register_tokens and num_register_tokens:
        config.register_init_std = register_init_std
        backbone.resize_register_tokens(num_register_tokens, seed=seed)
        changes.append(f"It has no registers; {num_register_tokens} new ones are added (--num_register_tokens).")
    elif config.num_register_tokens != num_register_tokens:
        changes.append(f"It keeps its {config.num_register_tokens} registers; --num_register_tokens is ignored.")
    return changes + fit_positions(backbone, image_size, option="global_crop_size")


@torch.no_grad()
def fit_positions(backbone: RegViTModel, image_size: int, *, option: str) -> list[str]:
    """Resample the stored positions in place to the grid of square images, and describe the change, if any.

    Args:
        backbone: Backbone of any image size.
        image_size: Side of the images in pixels.
        option: Name of the option for the image size, for the error message.

    Raises:
        ValueError: If the side is not a multiple of the patch size.
    """
    config, embeddings = backbone.config, backbone.embeddings
    rows, columns = config.patch_shape
    if image_size % rows or image_size % columns:
        raise ValueError(
            f"{option} is {image_size}, but the patches of the model to start from have {rows} x {columns} pixels. "
            f"Set {option} to a multiple of the patch size."
        )
    grid, before = (image_size // rows, image_size // columns), config.grid
    if grid == before:
        return []
    prefix = embeddings.position_embeddings[:, : embeddings.num_position_prefix]
    table = torch.cat([prefix, embeddings.resample_positions(grid)], dim=1)
    embeddings.position_embeddings = nn.Parameter(table.contiguous())
    config.image_size = image_size
    embeddings.train(embeddings.training)  # clears resampled tables that are cached from the old one
    return [f"Its positions are resampled from {before[0]} x {before[1]} to {grid[0]} x {grid[1]} patches."]


def restore_training(network: SelfDistillation, start: StartingPoint) -> None:
    """Load teacher, heads and centers of a starting point into a network that was built from its student.

    The Gram teacher is set to the loaded teacher instead of the student.

    Raises:
        ValueError: If the sizes of the heads differ from the network.
    """
    network.teacher_backbone.load_state_dict(start.teacher.state_dict())
    if network.gram_teacher is not None:
        network.refresh_gram_teacher()
    if start.training is None:
        return
    student = load_file(start.training / "student.safetensors")
    teacher = load_file(start.training / "teacher_heads.safetensors")
    heads = [name for name in network.student if name.endswith("_head")]
    found = sorted({name.split(".")[0] for name in student if not name.startswith("backbone.")})
    if found != sorted(heads):
        raise ValueError(
            f"'{start.training}' holds {', '.join(found)}, but the arguments require {', '.join(heads)}. Set "
            f"separate_ibot_head as in that run, or start from '{start.training.parent / BACKBONE}' with new heads."
        )
    for name in heads:
        _load_part(network.student[name], student, f"{name}.", str(start.training))
        _load_part(network.teacher[name], teacher, f"{name}.", str(start.training))
    centers = start.training / "centers.safetensors"
    saved = load_file(centers) if centers.is_file() else {}
    for name in ("dino_center", "ibot_center"):
        center = getattr(network, name)
        if center is not None and any(key.startswith(f"{name}.") for key in saved):
            _load_part(center, saved, f"{name}.", str(centers))
        elif center is not None:
            logger.warning("'%s' has no %s, so it starts at zero.", start.training, name)


def _load_part(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str, where: str) -> None:
    part = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    actual = {name: tuple(value.shape) for name, value in part.items()}
    if actual != expected:
        name = next(n for n in {**expected, **actual} if expected.get(n) != actual.get(n))
        raise ValueError(
            f"'{prefix}{name}' in '{where}' has shape {actual.get(name)}, expected {expected.get(name)}. Set the "
            f"sizes of the heads (--head_*) as in the resolved_recipe.yaml of that run, or start from its "
            f"'{BACKBONE}' folder with new heads."
        )
    module.load_state_dict(part)


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


def draw_curves(folder: str | Path, *, num_prototypes: int | None = None) -> Path | None:
    """Draw `curves.png` of a run from its `metrics.jsonl`; return None if the run was too short to log a loss."""
    from .figures import curves_figure, save_figure

    lines = read_metrics(Path(folder) / "metrics.jsonl")
    if not any("loss" in line for line in lines):
        return None
    path = Path(folder) / "curves.png"
    save_figure(curves_figure(lines, num_prototypes=num_prototypes), path)
    return path
