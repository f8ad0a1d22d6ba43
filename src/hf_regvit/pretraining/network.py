"""Student and teacher backbones of a pretraining run: what every objective needs, whatever its losses."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..models.modeling_regvit import RegViTModel
from ..training.distributed import full_tensor
from ..training.lora import merged_state
from .losses import SoftmaxCenter


def tensors_below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, without the prefix."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


class StudentAndTeacher(nn.Module):
    """Student that is trained, and teacher that follows it as a moving average and is exported.

    Subclasses set the children `student` and `teacher`, which have a `backbone` each, and implement `forward`, which
    returns a dictionary with `loss` and the scalars to log. The teacher has no gradients, stays in eval mode and
    changes only through `update_teacher`.

    Args:
        backbone: Student backbone, which is checked.
        lora_scale: Factor of its low-rank updates, if it has some.

    Raises:
        ValueError: The backbone has no mask token, has a pooler, or does not normalize all tokens.
    """

    # Without this, Trainer guesses from the signature whether the loss is already divided by the accumulation steps.
    accepts_loss_kwargs = False
    # Modules that FSDP2 shards as one group each, in student and teacher; all other parameters form another group.
    _no_split_modules = ["RegViTLayer"]

    student: nn.ModuleDict
    teacher: nn.ModuleDict
    dino_center: SoftmaxCenter | None
    ibot_center: SoftmaxCenter | None
    gram_teacher: RegViTModel | None
    needs_cls = True  # False if the losses also read a backbone without CLS
    joins_targets = False  # True if the targets of all micro-batches of a step have to be computed together

    def __init__(self, backbone: RegViTModel, *, lora_scale: float | None = None) -> None:
        super().__init__()
        if not backbone.config.use_mask_token:
            raise ValueError(
                "The backbone has no mask token, which the student needs. Build it with use_mask_token=True."
            )
        if self.needs_cls and not backbone.config.use_cls_token:
            raise ValueError("The backbone has no CLS token, which the losses read. Build it with use_cls_token=True.")
        if backbone.config.final_norm != "tokens" or backbone.pooler is not None:
            raise ValueError(
                f"The backbone has final_norm={backbone.config.final_norm!r} and "
                f"{'no' if backbone.pooler is None else 'a'} pooler, but the losses read tokens after the final norm. "
                "Build it with final_norm='tokens' and add_pooling_layer=False."
            )
        self.gram_teacher = self.dino_center = self.ibot_center = None
        self.lora_scale = lora_scale

    @property
    def student_backbone(self) -> RegViTModel:
        """Backbone that is trained."""
        return cast(RegViTModel, self.student["backbone"])

    @property
    def teacher_backbone(self) -> RegViTModel:
        """Backbone that is exported: the moving average of the student backbone."""
        return cast(RegViTModel, self.teacher["backbone"])

    def whole_teacher_backbone(self) -> RegViTModel:
        """Return the teacher backbone, or a plain copy if it is sharded or has low-rank updates.

        If it is sharded, all processes must call this method.
        """
        teacher = self.teacher_backbone
        is_sharded = any(isinstance(parameter, DTensor) for parameter in teacher.parameters())
        if not is_sharded and self.lora_scale is None:
            return teacher
        whole = RegViTModel(teacher.config).eval()
        whole.to(device=next(teacher.parameters()).device)
        whole.load_state_dict(self.plain({name: full_tensor(value) for name, value in teacher.state_dict().items()}))
        return whole

    def plain(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a part of this network with its low-rank updates, if any, merged."""
        return dict(state) if self.lora_scale is None else merged_state(state, scale=self.lora_scale)

    def train(self, mode: bool = True) -> "StudentAndTeacher":
        """Set the mode of the student only; the teacher stays in eval mode, so stochastic depth never affects it."""
        super().train(mode)
        self.teacher.eval()
        if self.gram_teacher is not None:
            self.gram_teacher.eval()
        return self

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Enable recomputation of the student blocks in the backward pass. Arguments are those of transformers."""
        self.student_backbone.gradient_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Enable gradient checkpointing under the name that newer releases of transformers use."""
        self.student_backbone.activation_checkpointing_enable(*args, **kwargs)

    def compile_blocks(self, **options: Any) -> None:
        """Compile the blocks of all backbones in place, so that parameter names and checkpoints do not change.

        Args:
            **options: Keyword arguments of `torch.compile`.
        """
        for backbone in (self.student_backbone, self.teacher_backbone, self.gram_teacher):
            for layer in [] if backbone is None else backbone.layers:
                layer.compile(**options)

    def frozen_tensors(self) -> list[Tensor]:
        """Return the tensors that a step reads but that checkpoints do not hold."""
        return []

    def begin_step(self, teacher_temperature: float) -> None:
        """Prepare an optimizer step; called once before its first forward pass."""

    def clip_gradients(self, max_norm: float) -> dict[str, Tensor]:
        """Clip the gradients of the backbone and of every head separately, as in the official code.

        Args:
            max_norm: Largest gradient norm of each submodule.

        Returns:
            Gradient norm of each submodule before clipping, by name; over all shards if parameters are sharded.
        """
        return {
            name: full_tensor(nn.utils.clip_grad_norm_(part.parameters(), max_norm))
            for name, part in self.student.items()
        }

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Set `teacher = momentum * teacher + (1 - momentum) * student`; call once after every optimizer step."""
        trained = {name: value for name, value in self.student.named_parameters() if value.requires_grad}
        teacher = dict(self.teacher.named_parameters())
        values = [value.detach() for value in trained.values()]
        torch._foreach_lerp_([teacher[name] for name in trained], values, 1 - momentum)
