"""Distillation: a student with registers learns the features of frozen teachers, which may be of any family.

Shape letters: B images, G global crops (2), L local crops, N patches of a global crop, D width of the student,
E width of a teacher. Flattened crops are crop-major: crop 0 of all images first.

Source: Oquab et al., "DINOv2" (2023), section 5, for the recipe: no masking, no stochastic depth, and a moving average
of the student as the result; Ranzinger et al., "AM-RADIO" (arXiv 2312.06709), for several teachers and for the mixture
of cosine and smooth L1; Baevski et al., "data2vec" (arXiv 2202.03555), for targets that are normalized per token;
Sariyildiz et al., "UNIC" (arXiv 2408.05088), for targets whose channels are standardized over the data.
"""

import copy
import hashlib
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.loading import open_model
from ..models.modeling_regvit import RegViTModel
from ..models.processing import IMAGENET_MEAN, IMAGENET_STD
from ..models.tokens import TokenReader
from .losses import feature_loss
from .network import StudentAndTeacher

Grid = tuple[int, int]

STANDARDIZED_ON = 128  # training images that give the mean and spread of each channel of the targets
_BATCH = 32  # images per forward pass


class FrozenTeacher:
    """Model of any family whose CLS token and patches a student learns; its registers are left out.

    Args:
        source: Model or its name; see `open_model`.
        image_size: Side in pixels to which global crops are resized. Default: the teacher gets as many patches as the
            student, or the only size that it can read.
        device: Device of a teacher given by name.
        mean: Mean of each channel that the crops are normalized with.
        std: Standard deviation of each channel that the crops are normalized with.

    Raises:
        UnknownProcessorError: The image processor of the teacher, whose normalization is needed, is not known.
        ValueError: The teacher cannot read images of `image_size`.
    """

    def __init__(
        self,
        source: str | nn.Module | TokenReader,
        *,
        image_size: int | None = None,
        device: str | torch.device = "auto",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        self.reader: TokenReader = open_model(source, device=device)
        self.reader.model.requires_grad_(False)
        self.image_size = image_size
        transform = self.reader.transform
        shift, scale, own_mean, own_std = (
            torch.tensor(values).view(-1, 1, 1) for values in (mean, std, transform.mean, transform.std)
        )
        self._scale, self._shift = scale / own_std, (shift - own_mean) / own_std
        self(torch.zeros(1, 3, 64, 64), (4, 4))  # an image size that it cannot read is an error now

    def size_for(self, grid: Grid) -> tuple[int, int]:
        """Return the size in pixels of crops of which the student makes `grid` patches."""
        description = self.reader.description
        if self.image_size is not None:
            return self.image_size, self.image_size
        if not self.reader.takes_other_sizes:
            return description.image_size
        rows, columns = (count * step for count, step in zip(grid, description.patch_size, strict=True))
        return rows, columns

    @torch.no_grad()
    def __call__(self, crops: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Compute the targets of crops.

        Args:
            crops: Pixels `(n, 3, S, S)`, normalized with `mean` and `std`.
            grid: Rows and columns of the student's patches.

        Returns:
            Float32 targets of CLS `(n, E)` and of the patches `(n, N, E)`, after the teacher's final norm, with mean 0
            and variance 1 over the E channels of each token. The CLS target of a model without CLS is the mean of its
            patches.
        """
        pixels = crops * self._scale.to(crops) + self._shift.to(crops)
        size = self.size_for(grid)
        if size != tuple(crops.shape[-2:]):
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
        reading = self.reader.read_final(pixels)
        summary, patches = reading.summary().float(), reading.patches().float()  # (n, E), (n, N, E)
        if reading.grid != grid:
            maps = patches.mT.unflatten(2, reading.grid)  # (n, E, rows, columns)
            patches = F.interpolate(maps, size=grid, mode="bilinear", antialias=True).flatten(2).mT
        width = (summary.shape[-1],)
        return F.layer_norm(summary, width), F.layer_norm(patches, width)

    def __repr__(self) -> str:
        return repr(self.reader).removeprefix("TokenReader")

    def digest(self) -> str:
        """Return the sha256 of the weights, which a resumed run compares."""
        total = hashlib.sha256()
        for name, tensor in sorted(self.reader.model.state_dict().items()):
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return total.hexdigest()


class TargetStatistics(nn.Module):
    """Mean and standard deviation of each channel of a teacher's targets over images, for CLS and for patches.

    Most of a token is the same in all images. A student that reproduces this part alone already has a cosine above 0.6
    but knows nothing about the images, so the targets are standardized. Until `measure` is called, they stay as they
    are.

    Args:
        width: Number of channels E.
    """

    cls: Tensor
    patches: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("cls", "patches"):
            self.register_buffer(name, torch.stack([torch.zeros(width), torch.ones(width)]))  # (2, E)

    @torch.no_grad()
    def measure(self, cls: Tensor, patches: Tensor) -> None:
        """Set the statistics to those of targets `(n, E)` and `(n, N, E)`; channels without spread stay unscaled."""
        for buffer, rows in ((self.cls, cls), (self.patches, patches.flatten(0, 1))):
            spread = rows.std(dim=0, correction=0)
            buffer.copy_(torch.stack([rows.mean(dim=0), torch.where(spread > 1e-3, spread, 1.0)]))

    def forward(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return standardized targets of the same shapes."""
        return (cls - self.cls[0]) / self.cls[1], (patches - self.patches[0]) / self.patches[1]


class FeatureDistillation(StudentAndTeacher):
    """Student, its moving average, and linear maps from its tokens to the features of frozen teachers.

    Children: `student` and `teacher`, each with `backbone`, `cls_head` and `patch_head`; a head has one linear layer
    per frozen teacher. `teacher` is the moving average of the student, as in the other objective, and is exported.
    `statistics` are those of the targets. The frozen teachers are no children: checkpoints do not hold them, and FSDP2
    does not shard them.

    Args:
        backbone: Student backbone with `config.use_mask_token=True`. It is not copied.
        teachers: Frozen teachers. Their losses are averaged.
        cls_weight: Weight of the loss of CLS.
        patch_weight: Weight of the loss of the patches.
        lora_scale: Factor of the student's low-rank updates, if it has some.

    Raises:
        ValueError: The backbone cannot be used, a weight is negative, or both are 0.
    """

    def __init__(
        self,
        backbone: RegViTModel,
        teachers: Sequence[FrozenTeacher],
        *,
        cls_weight: float = 1.0,
        patch_weight: float = 1.0,
        lora_scale: float | None = None,
    ) -> None:
        super().__init__(backbone, lora_scale=lora_scale)
        if min(cls_weight, patch_weight) < 0 or not cls_weight + patch_weight:
            raise ValueError(
                f"The weights of CLS and patches are {cls_weight} and {patch_weight}; expected none below 0 and at "
                "least one above 0."
            )
        self.teachers, self.cls_weight, self.patch_weight = list(teachers), cls_weight, patch_weight
        self.digests = [one.digest() for one in teachers]
        width, heads = backbone.config.hidden_size, [one.reader.description.hidden_size for one in teachers]
        cls_head, patch_head = (nn.ModuleList(nn.Linear(width, size) for size in heads) for _ in range(2))
        self.statistics = nn.ModuleList(TargetStatistics(size) for size in heads)
        self.student = nn.ModuleDict({"backbone": backbone, "cls_head": cls_head, "patch_head": patch_head})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.train()

    def frozen_tensors(self) -> list[Tensor]:
        """Return the weights of the frozen teachers."""
        return [tensor for teacher in self.teachers for tensor in teacher.reader.model.state_dict().values()]

    def standardize(self, pixels: Tensor) -> None:
        """Measure the statistics of the targets on normalized pixels `(n, 3, S, S)`, and use them from now on."""
        grid = self.student_backbone.embeddings.patch_embeddings.grid_of(pixels)
        for teacher, statistics in zip(self.teachers, self.statistics, strict=True):
            parts = [teacher(batch.to(teacher.reader.device), grid) for batch in pixels.split(_BATCH)]
            cls, patches = (torch.cat(part) for part in zip(*parts, strict=True))
            cast(TargetStatistics, statistics).measure(cls, patches)

    def forward(self, global_crops: Tensor, local_crops: Tensor, masks: Tensor, **_: Tensor) -> dict[str, Tensor]:
        """Compute the losses of one micro-batch.

        CLS and patches of a global crop learn those of the teacher for the same crop. CLS of a local crop learns the
        mean of the teacher's targets for the global crops of its image.

        Args:
            global_crops: Pixels `(G, B, 3, S, S)`, normalized as the teachers were told.
            local_crops: Normalized pixels `(L, B, 3, s, s)`; L may be 0.
            masks: Boolean masks `(G, B, N)`; masked patches are replaced by the mask token for the student.
            **_: Other entries of a batch, which only self-distillation needs.

        Returns:
            Dictionary of scalars. `loss` is to be differentiated. `cls_loss` and `patch_loss` are its detached
            weighted terms, which add up to it. `cls_cosine` and `patch_cosine` are the mean cosines to the targets.
        """
        backbone = self.student_backbone
        num_global, batch = global_crops.shape[:2]
        grid = backbone.embeddings.patch_embeddings.grid_of(global_crops[0])
        crops = global_crops.flatten(0, 1)
        output = backbone(crops, bool_masked_pos=masks.flatten(0, 1))
        cls, patches = output.last_hidden_state[:, 0], output.patch_tokens
        if len(local_crops):
            cls = torch.cat([cls, backbone(local_crops.flatten(0, 1)).last_hidden_state[:, 0]])
        terms: dict[str, Tensor] = {}
        heads = (cast(nn.ModuleList, self.student[name]) for name in ("cls_head", "patch_head"))
        for teacher, statistics, cls_head, patch_head in zip(self.teachers, self.statistics, *heads, strict=True):
            of_cls, of_patches = statistics(*teacher(crops, grid))
            mean = of_cls.unflatten(0, (num_global, batch)).mean(dim=0)
            of_cls = torch.cat([of_cls, mean.repeat(len(local_crops), 1)])
            found = {
                "cls": feature_loss(cls_head(cls), of_cls),
                "patch": feature_loss(patch_head(patches), of_patches),
            }
            for name, (loss, cosine) in found.items():
                weight = (self.cls_weight if name == "cls" else self.patch_weight) / len(self.teachers)
                terms[f"{name}_loss"] = terms.get(f"{name}_loss", 0) + weight * loss
                terms[f"{name}_cosine"] = terms.get(f"{name}_cosine", 0) + cosine / len(self.teachers)
        loss = terms["cls_loss"] + terms["patch_loss"]
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}
