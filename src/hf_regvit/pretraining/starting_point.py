"""Start pretraining from an earlier run or from a model that is not ours."""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from ..models.foreign_weights import BACKBONE
from ..models.loading import TRAINING, fit_positions, open_backbone
from ..models.manifest import check_weights
from ..models.modeling_regvit import RegViTModel
from .distillation import SelfDistillation
from .network import StudentAndTeacher, tensors_below

logger = logging.getLogger(__name__)


# ---- Starting points ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartingPoint:
    """Starting point of continued pretraining.

    Attributes:
        student: Student backbone, ready to train: with mask token, registers and positions of the training grid.
        teacher: Teacher backbone; the same object if the source has no separate student.
        training: Folder `training/` of the previous run, with heads and centers; None if the heads are new.
        changes: Sentences that describe the changes made to the source.
        new_registers: True if registers were added.
    """

    student: RegViTModel
    teacher: RegViTModel
    training: Path | None
    changes: tuple[str, ...]
    new_registers: bool = False


def starting_point(
    source: str | Path,
    *,
    num_register_tokens: int,
    image_size: int,
    register_init_std: float = 0.02,
    drop_path_rate: float = 0.0,
    drop_path_mode: str = "batch_subset",
    position: str | None = None,
    pos_embed_rescale: float | None = None,
    mode: str = "full",
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
        position: "learned" or "rotary" if the source has to have these positions.
        pos_embed_rescale: Training range of rotary coordinates, as in `RegViTConfig`; None keeps that of the source.
        mode: Trained parts of the backbone, as in `PretrainingArguments`. Unless it is "full", the student backbone
            also starts from the teacher, because both share what is not trained.
        seed: Random seed for registers that are added.

    Raises:
        ValueError: If the side is not a multiple of the patch size, the tokens of the model have no final norm, its
            positions are of another kind, or the source is a checkpoint of an unfinished run.
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
    teacher = open_backbone(
        str(folder / BACKBONE) if run else str(source), drop_path_rate=drop_path_rate, drop_path_mode=drop_path_mode
    )
    found = "learned" if teacher.config.rope_theta is None else "rotary"
    if position not in (None, found) or (pos_embed_rescale is not None and found == "learned"):
        raise ValueError(
            f"'{source}' has {found} positions, which training cannot change, but position={position} and "
            f"pos_embed_rescale={pos_embed_rescale} ask for others. Remove them, or train without --init_from."
        )
    teacher.config.pos_embed_rescale = pos_embed_rescale or teacher.config.pos_embed_rescale
    training = folder / TRAINING if run and (folder / TRAINING / "student.safetensors").is_file() else None
    student = teacher
    if training is not None:
        check_weights(training)
    if training is not None and mode == "full":
        student = copy.deepcopy(teacher)
        _load_part(student, load_file(training / "student.safetensors"), "backbone.", str(training))
    changes: list[str] = []
    new_registers = not teacher.config.num_register_tokens and num_register_tokens > 0
    for backbone in [student] if student is teacher else [student, teacher]:
        config, changes = backbone.config, []
        if not config.num_register_tokens and num_register_tokens:
            config.register_init_std = register_init_std
            backbone.resize_register_tokens(num_register_tokens, seed=seed)
            changes.append(f"It has no registers; {num_register_tokens} new ones are added (--num_register_tokens).")
        elif config.num_register_tokens != num_register_tokens:
            changes.append(f"It keeps its {config.num_register_tokens} registers; --num_register_tokens is ignored.")
        if config.register_neurons:
            changes.append(f"{len(config.register_neurons)} of its neurons keep writing into test-time registers.")
        changes += fit_positions(backbone, image_size, option="global_crop_size")
    if training is None:
        changes.append("The heads are new; the backbone is frozen for --freeze_backbone_steps until they are trained.")
    return StartingPoint(student, teacher, training, tuple(changes), new_registers)


def restore_training(network: StudentAndTeacher, start: StartingPoint) -> None:
    """Load teacher, heads and centers of a starting point into a network that was built from its student.

    The Gram teacher is set to the loaded teacher instead of the student.

    Raises:
        ValueError: If the sizes of the heads differ from the network.
    """
    if start.teacher is not start.student:
        network.teacher_backbone.load_state_dict(start.teacher.state_dict())
    if isinstance(network, SelfDistillation) and network.gram_teacher is not None:
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
    part = tensors_below(prefix, tensors)
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
