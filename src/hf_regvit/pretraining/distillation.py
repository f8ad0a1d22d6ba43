"""Student, EMA teacher, projection heads and losses of DINOv2 in one module with one forward.

Shape letters: B images, G global crops (2), L local crops, N patches of a global crop, M masked patches, D width,
K prototypes. Flattened crops are crop-major: crop 0 of all images first.

Source: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision" (2023), and the released training
code, whose divisors and order of operations are followed exactly; Darcet et al., "Vision Transformers Need
Registers" (2024) for the registers, which take part in attention in every block but do not enter any loss; Cao et al.,
"TIPSv2" (arXiv 2604.12012) for iBOT++ and the average of the heads alone.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..models.modeling_regvit import RegViTModel
from .losses import SoftmaxCenter, gram_loss, koleo_loss, paka_loss, prototype_cross_entropy, sinkhorn_knopp
from .network import StudentAndTeacher

# ---- Projection head ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadShape:
    """Sizes of one projection head: D -> hidden -> ... -> bottleneck -> prototypes.

    Attributes:
        num_prototypes: Number of output logits K.
        hidden_size: Width of the hidden layers.
        bottleneck_size: Width of the bottleneck, which is L2-normalized and compared with the prototypes.
        num_layers: Number of linear layers before the prototypes, at least 1.
    """

    num_prototypes: int = 65536
    hidden_size: int = 2048
    bottleneck_size: int = 256
    num_layers: int = 3

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} of a projection head is {value}; expected at least 1.")


class _Prototypes(nn.Module):
    """Weight-normalized linear layer without bias: row k is `g_k * v_k / |v_k|`.

    `torch.nn.utils.weight_norm` is not used, because its hook breaks `deepcopy` and hides g and v from sharding.
    """

    def __init__(self, in_features: int, num_prototypes: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, in_features).uniform_(-bound, bound))

    def forward(self, x: Tensor, objective: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        # The bf16 spacing of a logit near 1, divided by a temperature of 0.04, is 0.1 nat. Therefore this layer runs
        # in full precision, whatever the precision of the rest of the head.
        with torch.autocast(x.device.type, enabled=False):
            v, g = (p if p.dtype == torch.float64 else p.float() for p in (self.weight_v, self.weight_g))
            # Fused kernel for `g * v / |v|`: separate operations on K x 256 values take a tenth of a short step.
            weight = torch._weight_norm(v, g, 0)
            x = x.to(weight.dtype)
            return F.linear(x, weight) if objective is None else objective(x, weight)


class PrototypeHead(nn.Module):
    """Projection head of DINO and iBOT: MLP, L2 normalization, then the scaled cosine to each of K prototypes.

    Parameters are named `mlp.0|2|4.weight|bias`, `last_layer.weight_g` and `last_layer.weight_v`, as in released
    checkpoints; with a single layer, `mlp.weight` and `mlp.bias`.

    Args:
        in_features: Width D of a token.
        shape: Sizes of the head.
        bias: True if the MLP layers have a bias.

    Weights of the MLP are initialized from a truncated normal distribution with standard deviation 0.02 and its biases
    with 0, `weight_v` uniformly within +-1/sqrt(bottleneck), and `weight_g` with 1. All are trained.

    Source: the released DINOv2 head.
    """

    def __init__(self, in_features: int, shape: HeadShape, *, bias: bool = True) -> None:
        super().__init__()
        inner = [shape.hidden_size] * (shape.num_layers - 1)
        widths = [in_features, *inner, shape.bottleneck_size]
        layers: list[nn.Module] = []
        for index in range(shape.num_layers):
            linear = nn.Linear(widths[index], widths[index + 1], bias=bias)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if bias:
                nn.init.zeros_(linear.bias)
            layers += [linear, nn.GELU()]
        # No activation after the last layer. A single layer is not wrapped, so that its name has no index.
        self.mlp = layers[0] if shape.num_layers == 1 else nn.Sequential(*layers[:-1])
        self.last_layer = _Prototypes(shape.bottleneck_size, shape.num_prototypes)

    def forward(self, x: Tensor, objective: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        """Return float32 logits `(n, K)` of features `(n, D)`, or the value of `objective`; n may be 0.

        `objective` is called with the unit-length bottleneck `(n, bottleneck)` and the prototypes `(K, bottleneck)`.
        It is for losses that do not store all logits at once, and must be called here because the parameters of a
        sharded head are gathered only during `forward`.
        """
        x = self.mlp(x)
        # In fp16, an epsilon of 1e-12 becomes 0.
        x = F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
        return self.last_layer(x, objective)


# ---- Student, teacher, losses ------------------------------------------------------------------------------------


class TeacherTargets(NamedTuple):
    """Target probabilities, of which each row sums to 1, and patch tokens of the teacher; all without a gradient."""

    cls: Tensor  # (G, B, K)
    masked: Tensor  # (M, K')
    patches: Tensor | None = None  # (G * B * N, D), for PaKA only


class SelfDistillation(StudentAndTeacher):
    """Student, EMA teacher, projection heads and losses of DINOv2 in one module with one forward.

    Children: `student` and `teacher`, each with `backbone`, `dino_head` and, unless the heads are tied, `ibot_head`;
    with softmax centering also `dino_center` and `ibot_center`. The teacher starts as a copy of the student, has no
    gradients, stays in eval mode and changes only through `update_teacher`.

    Order of calls per optimizer step: `begin_step(temperature)` once, forward and backward per micro-batch,
    `clip_gradients`, the optimizer, `update_teacher(momentum)`.

    Args:
        backbone: Student backbone with `config.use_mask_token=True`. It is not copied.
        dino_head: Sizes of the head on CLS tokens.
        ibot_head: Sizes of the head on masked patches; None ties it to the DINO head.
        centering: `"softmax"` (running center) or `"sinkhorn"` (Sinkhorn-Knopp over the global batch).
        center_momentum: Share of the previous center that is kept per step; softmax centering only.
        student_temperature: Temperature that divides the student logits.
        dino_loss_weight: Weight of the two DINO terms; 0 also skips the local crops and the DINO logits.
        ibot_loss_weight: Weight of the iBOT term; 0 skips its logits.
        koleo_loss_weight: Weight of the KoLeo term of each global crop; 0 skips it.
        koleo_gathered: True if KoLeo searches neighbors in all processes instead of only the current one.
        koleo_neighbours: Number of nearest neighbors that KoLeo pushes each feature away from.
        gram_loss_weight: Weight of Gram anchoring. If above 0, there is also a `gram_teacher`, a frozen copy of the
            teacher backbone that changes only through `refresh_gram_teacher`.
        paka_loss_weight: Weight of patch kernel alignment with the teacher. As for Gram anchoring, student and teacher
            see the same global crops, so patches correspond one to one; the paper aligns the overlap of student crops
            with other, unaugmented teacher crops, after a projection head.
        ibot_visible_patches: True for iBOT++, where the visible patches of the student learn from the teacher as the
            masked ones do: the iBOT term is then the mean of H(t_i, s_i) over all patches i of all global crops,
            instead of over the masked patches of each crop.
        average_heads_only: True if only the heads of the teacher are averages. Its backbone is a copy of the student's
            after every step, which stays in eval mode. In TIPSv2, a contrastive loss beside it prevents a collapse;
            here, only the targets and KoLeo do.
        lora_scale: Factor of the low-rank updates, if the backbone has some.

    Raises:
        ValueError: The backbone has no mask token, has a pooler, or does not normalize all tokens; the centering is
            unknown; a weight is negative; or all weights are 0.
    """

    _no_split_modules = ["RegViTLayer", "PrototypeHead"]
    needs_cls = False

    def __init__(
        self,
        backbone: RegViTModel,
        *,
        dino_head: HeadShape,
        ibot_head: HeadShape | None = None,
        centering: str = "softmax",
        center_momentum: float = 0.9,
        student_temperature: float = 0.1,
        dino_loss_weight: float = 1.0,
        ibot_loss_weight: float = 1.0,
        koleo_loss_weight: float = 0.1,
        koleo_gathered: bool = False,
        koleo_neighbours: int = 1,
        gram_loss_weight: float = 0.0,
        paka_loss_weight: float = 0.0,
        ibot_visible_patches: bool = False,
        average_heads_only: bool = False,
        lora_scale: float | None = None,
    ) -> None:
        super().__init__(backbone, lora_scale=lora_scale)
        if centering not in ("softmax", "sinkhorn"):
            raise ValueError(f"centering is {centering!r}; expected 'softmax' or 'sinkhorn'.")
        weights = (dino_loss_weight, ibot_loss_weight, koleo_loss_weight, gram_loss_weight, paka_loss_weight)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(
                f"The loss weights (DINO, iBOT, KoLeo, Gram, PaKA) are {weights}; expected none below 0 and at least "
                "one above 0."
            )
        self.dino_loss_weight, self.ibot_loss_weight, self.koleo_loss_weight = weights[:3]
        self.gram_loss_weight, self.paka_loss_weight = weights[3:]
        self.koleo_gathered, self.koleo_neighbours = koleo_gathered, koleo_neighbours
        self.ibot_visible_patches, self.average_heads_only = ibot_visible_patches, average_heads_only
        self.joins_targets = centering == "sinkhorn"
        self.student_temperature = student_temperature
        self.teacher_temperature = 0.07
        width = backbone.config.hidden_size
        self.student = nn.ModuleDict({"backbone": backbone, "dino_head": PrototypeHead(width, dino_head)})
        if ibot_head is not None:
            self.student["ibot_head"] = PrototypeHead(width, ibot_head)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.gram_teacher = copy.deepcopy(self.teacher_backbone) if gram_loss_weight else None
        if centering == "softmax":
            masked_head = dino_head if ibot_head is None else ibot_head
            self.dino_center = SoftmaxCenter(dino_head.num_prototypes, momentum=center_momentum)
            self.ibot_center = SoftmaxCenter(masked_head.num_prototypes, momentum=center_momentum)
        self.train()

    def begin_step(self, teacher_temperature: float) -> None:
        """Set the teacher temperature and commit the centers; call once before the first forward of every step."""
        self.teacher_temperature = teacher_temperature
        for center in (self.dino_center, self.ibot_center):
            if center is not None:
                center.commit()

    def _logits(self, network: nn.ModuleDict, cls: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Return the head outputs of CLS tokens and of masked patches; empty for a loss whose weight is 0."""
        cls = cls if self.dino_loss_weight else cls[:0]
        masked = masked if self.ibot_loss_weight else masked[:0]
        if "ibot_head" in network:
            return network["dino_head"](cls), network["ibot_head"](masked)
        logits = network["dino_head"](torch.cat([cls, masked]))
        return logits[: len(cls)], logits[len(cls) :]

    def _probabilities(self, logits: Tensor, center: SoftmaxCenter | None) -> Tensor:
        if center is None:
            return sinkhorn_knopp(logits, temperature=self.teacher_temperature)
        probabilities = center(logits, temperature=self.teacher_temperature)
        if self.training:
            center.accumulate(logits)
        return probabilities

    def _all_patches(self, global_crops: Tensor) -> Tensor:
        """Return the positions of all patches of `global_crops` in the flattened (G, B, N)."""
        rows, columns = self.student_backbone.embeddings.patch_embeddings.grid_of(global_crops[0])
        return torch.arange(math.prod(global_crops.shape[:2]) * rows * columns, device=global_crops.device)

    def _teacher_outputs(self, global_crops: Tensor, mask_indices: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return teacher head outputs of the CLS tokens `(G * B, K)` and of the masked patches `(M, K')`.

        For PaKA, the tokens of all patches `(G * B * N, D)` are returned in addition.
        """
        # Inference mode launches kernels faster, but FSDP2 gathers parameters into buffers that outlive the mode.
        sharded = any(isinstance(parameter, DTensor) for parameter in self.teacher.parameters())
        mask_indices = self._all_patches(global_crops) if self.ibot_visible_patches else mask_indices
        with torch.no_grad() if sharded else torch.inference_mode():
            read = self._all_patches(global_crops) if self.paka_loss_weight else mask_indices
            cls, rows = self._tokens(self.teacher_backbone, global_crops.flatten(0, 1), read)
            logits = self._logits(self.teacher, cls, rows[mask_indices] if self.paka_loss_weight else rows)
        # The loss reads the tokens where gradients are recorded, which tensors of inference mode do not allow.
        return *logits, rows.clone() if self.paka_loss_weight else None

    def _targets(self, cls_logits: Tensor, masked_logits: Tensor, num_global: int) -> TeacherTargets:
        cls = self._probabilities(cls_logits, self.dino_center)
        cls = cls.reshape(num_global, -1, cls.shape[-1])
        return TeacherTargets(cls, self._probabilities(masked_logits, self.ibot_center))

    @torch.no_grad()
    def teacher_targets(self, global_crops: Tensor, mask_indices: Tensor) -> TeacherTargets:
        """Compute the teacher targets from the unmasked global crops.

        Args:
            global_crops: Pixels `(G, B, 3, S, S)`.
            mask_indices: Positions `(M,)` of the masked patches in the flattened masks (G, B, N).

        Returns:
            Probabilities of the CLS tokens, crop by crop, and of the patches that are masked for the student; with
            PaKA, also all patch tokens.
        """
        cls, masked, patches = self._teacher_outputs(global_crops, mask_indices)
        return self._targets(cls, masked, num_global=global_crops.shape[0])._replace(patches=patches)

    @torch.no_grad()
    def joint_targets(self, batches: Sequence[Mapping[str, Tensor]]) -> list[TeacherTargets]:
        """Compute the targets of all micro-batches of an optimizer step jointly.

        Sinkhorn-Knopp distributes its rows evenly over the prototypes, so the targets of a micro-batch computed alone
        differ from those computed with the whole batch. Softmax centering does not need this method, because its
        center depends only on previous steps. The logits of the whole step are in memory at once: 4 bytes *
        prototypes * (global crops + masked patches).

        Args:
            batches: Micro-batches with the `global_crops` and `mask_indices` of `forward`.

        Returns:
            The argument `targets` of `forward` for each micro-batch.
        """
        rows = [self._teacher_outputs(batch["global_crops"], batch["mask_indices"]) for batch in batches]
        cls_rows, masked_rows, patches = zip(*rows, strict=True)
        cls, masked, _ = self._targets(torch.cat(cls_rows), torch.cat(masked_rows), num_global=1)
        return [
            TeacherTargets(one.reshape(batch["global_crops"].shape[0], -1, one.shape[-1]), other, tokens)
            for batch, one, other, tokens in zip(
                batches,
                cls[0].split([len(logits) for logits in cls_rows]),
                masked.split([len(logits) for logits in masked_rows]),
                patches,
                strict=True,
            )
        ]

    @staticmethod
    def _tokens(
        backbone: RegViTModel, pixels: Tensor, patches: Tensor, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the tokens that the losses read, after the final norm.

        The last block computes only these tokens and uses the others as keys and values. If half of the crops are
        masked, this saves most of the computation in that block. It computes all tokens if it has register neurons,
        or if there is no CLS token: the mean of the patch tokens then takes its place.

        Args:
            backbone: Backbone of the student or the teacher.
            pixels: Pixels `(crops, 3, S, S)`.
            patches: Positions `(m,)` in the flattened (crops, N).
            masks: Boolean masks `(crops, N)`.

        Returns:
            CLS tokens, or means of the patches, `(crops, D)`, and patch tokens `(m, D)`.
        """
        hidden_states = backbone.embeddings(pixels, masks)  # (crops, T, D)
        rotary = backbone.embeddings.rotary_table(pixels)
        *blocks, last = backbone.layers
        for block in blocks:
            hidden_states, _ = block(hidden_states, rotary=rotary)
        num_crops, num_tokens, _ = hidden_states.shape
        prefix = backbone.config.num_prefix_tokens
        if backbone.config.register_neurons_of(len(blocks)) or not backbone.config.use_cls_token:
            tokens = backbone.layernorm(last(hidden_states, rotary=rotary)[0])  # (crops, T, D)
            rest = tokens[:, prefix:]
            image = tokens[:, 0] if backbone.config.use_cls_token else rest.mean(dim=1)
            return image, rest.flatten(0, 1).index_select(0, patches)
        first = torch.arange(num_crops, device=pixels.device) * num_tokens
        behind = patches + (patches // (num_tokens - prefix) + 1) * prefix
        rows = backbone.layernorm(last(hidden_states, tokens=torch.cat([first, behind]), rotary=rotary)[0])
        return rows[:num_crops], rows[num_crops:]

    def _student_tokens(
        self, global_crops: Tensor, local_crops: Tensor, masks: Tensor, patches: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return CLS tokens `(G * B + L * B, D)`, global crops first, and patch tokens `(m, D)` of the global crops.

        `patches` `(m,)` holds the positions of these patches in the flattened (G, B, N). The local crops are left out
        if `dino_loss_weight` is 0.
        """
        backbone = self.student_backbone
        cls, rows = self._tokens(backbone, global_crops.flatten(0, 1), patches, masks.flatten(0, 1))
        if self.dino_loss_weight and local_crops.shape[0]:
            # A separate forward: packing both resolutions into one sequence is slower on a CPU.
            local_cls, _ = self._tokens(backbone, local_crops.flatten(0, 1), patches[:0])
            cls = torch.cat([cls, local_cls])
        return cls, rows

    def _prototype_losses(
        self,
        cls: Tensor,
        masked: Tensor,
        targets: TeacherTargets,
        mask_weights: Tensor,
        batch: int,
        visible: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return the sum of the DINO and iBOT losses, its weighted terms, and the cross-entropy of each CLS row.

        `visible` `(M,)` is True for the rows of `masked` that the student sees; None if it sees none of them.
        A disabled loss gets no rows, but its head stays in the graph, because DDP waits for every gradient.
        """
        num_global = targets.cls.shape[0]
        num_local = cls.shape[0] // batch - num_global
        # The divisor of the official code, which counts one term too many if there are no local crops.
        divisor = max(num_global * num_local, 1) + num_global
        # Each global crop learns from the other one. Each local crop learns from all global crops, which equals
        # num_global times their mean, because a cross-entropy is linear in its target.
        rows = torch.arange(num_global * batch + batch, device=cls.device)
        rows = torch.cat([rows[: num_global * batch], rows[num_global * batch :].repeat(num_local)])
        precision = torch.promote_types(cls.dtype, torch.float32)
        weights = cls.new_full((len(rows),), self.dino_loss_weight / (divisor * batch), dtype=precision)
        weights[num_global * batch :] *= num_global
        if not self.dino_loss_weight:
            cls, rows, weights = cls[:0], rows[:0], weights[:0]
        if not self.ibot_loss_weight:
            masked, mask_weights = masked[:0], mask_weights[:0]
        dino = partial(
            prototype_cross_entropy,
            targets=torch.cat([targets.cls.flip(0).flatten(0, 1), targets.cls.mean(0)]),
            target_rows=rows,
            weights=weights,
            temperature=self.student_temperature,
        )
        ibot_weights = mask_weights * (self.ibot_loss_weight / (num_global * batch))
        ibot = partial(
            prototype_cross_entropy,
            targets=targets.masked,
            weights=ibot_weights,
            temperature=self.student_temperature,
        )
        if "ibot_head" in self.student:
            dino_loss, of_cls = self.student["dino_head"](cls, dino)
            ibot_loss, of_masked = self.student["ibot_head"](masked, ibot)
        else:
            count = len(cls)
            (dino_loss, of_cls), (ibot_loss, of_masked) = self.student["dino_head"](
                torch.cat([cls, masked]), lambda x, w: (dino(x[:count], w), ibot(x[count:], w))
            )
        terms = {}
        if self.dino_loss_weight:
            across, local = (of_cls * weights).split([num_global * batch, num_local * batch])
            if num_local:
                terms["dino_local_loss"] = local.sum()
            terms["dino_global_loss"] = across.sum()
        if self.ibot_loss_weight:
            of_masked = of_masked * ibot_weights
            if visible is not None:
                terms["ibot_visible_loss"] = (of_masked * visible).sum()
                of_masked = of_masked * ~visible
            terms["ibot_loss"] = of_masked.sum()
        return dino_loss + ibot_loss, terms, of_cls

    @torch.no_grad()
    def _gram_patches(self, crops: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return patch tokens `(crops, N, D)` of the Gram teacher, resampled to the student grid if they differ."""
        teacher = cast(RegViTModel, self.gram_teacher)
        patches = teacher(crops).patch_tokens
        own = teacher.embeddings.patch_embeddings.grid_of(crops)
        if own == grid:
            return patches
        maps = patches.float().mT.unflatten(2, own)  # (crops, D, rows, columns)
        return F.interpolate(maps, size=grid, mode="bicubic", align_corners=False).flatten(2).mT

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor,
        masks: Tensor,
        mask_indices: Tensor,
        mask_weights: Tensor,
        targets: TeacherTargets | None = None,
        gram_crops: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of one micro-batch.

        Args:
            global_crops: Normalized pixels `(2, B, 3, S, S)`, two global crops of B images.
            local_crops: Normalized pixels `(L, B, 3, s, s)`; L may be 0.
            masks: Boolean masks `(2, B, N)` over the N patches of a global crop.
            mask_indices: Positions `(M,)` (int64) of the True entries in the flattened masks, ascending; M may be 0.
            mask_weights: Weights `(M,)`: 1 / (number of masked patches in the same crop).
            targets: Targets of this micro-batch from `joint_targets`. Default: computed from this micro-batch alone.
            gram_crops: Global crops `(2, B, 3, S', S')` of another size for the Gram teacher. Default: `global_crops`.

        Returns:
            Dictionary of scalars. `loss` is to be differentiated. `dino_local_loss`, `dino_global_loss`, `ibot_loss`
            (masked patches), `ibot_visible_loss`, `koleo_loss`, `gram_loss` and `paka_loss` are its detached weighted
            terms, which add up to it; terms that were not computed are missing. If the DINO loss is used, there are
            also four statistics of its targets. `teacher_entropy` is the mean entropy of a target and
            `teacher_marginal_entropy` the entropy of the mean target, in nats. If both are near ln K, the targets are
            uniform (collapse); if both are near 0, all targets select the same prototype (also collapse).
            `teacher_student_kl` is KL(teacher || student) of the global crops in nats, and `used_prototypes` the
            number of prototypes that are the largest entry of at least one target.
        """
        targets = self.teacher_targets(global_crops, mask_indices) if targets is None else targets
        num_global, batch = global_crops.shape[:2]
        visible = None
        if self.ibot_visible_patches:
            visible, mask_indices = ~masks.flatten(), self._all_patches(global_crops)
            mask_weights = mask_weights.new_full(visible.shape, 1 / masks.shape[-1])
        reads_all = bool(self.gram_loss_weight or self.paka_loss_weight)
        patches = self._all_patches(global_crops) if reads_all else mask_indices
        cls, rows = self._student_tokens(global_crops, local_crops, masks, patches)
        masked = rows[mask_indices] if reads_all else rows
        loss, terms, of_cls = self._prototype_losses(cls, masked, targets, mask_weights, batch, visible)
        if self.koleo_loss_weight:
            spread = partial(koleo_loss, gathered=self.koleo_gathered, neighbors=self.koleo_neighbours)
            koleo = torch.stack([spread(crop) for crop in cls[: num_global * batch].split(batch)])
            terms["koleo_loss"] = self.koleo_loss_weight * koleo.sum()
            loss = loss + terms["koleo_loss"]
        if self.gram_loss_weight:
            grid = self.student_backbone.embeddings.patch_embeddings.grid_of(global_crops[0])
            anchor = self._gram_patches((global_crops if gram_crops is None else gram_crops).flatten(0, 1), grid)
            terms["gram_loss"] = self.gram_loss_weight * gram_loss(rows.unflatten(0, anchor.shape[:2]), anchor)
            loss = loss + terms["gram_loss"]
        if self.paka_loss_weight:
            tokens = (rows, cast(Tensor, targets.patches))
            aligned = paka_loss(*(one.unflatten(0, (num_global * batch, -1)) for one in tokens))
            terms["paka_loss"] = self.paka_loss_weight * aligned
            loss = loss + terms["paka_loss"]
        outputs = {"loss": loss, **{name: term.detach() for name, term in terms.items()}}
        if self.dino_loss_weight:
            probabilities = targets.cls.flatten(0, 1)
            outputs["teacher_entropy"] = torch.special.entr(probabilities).sum(-1).mean()
            outputs["teacher_marginal_entropy"] = torch.special.entr(probabilities.mean(0)).sum()
            # The cross-entropy of a target t and a student output s is H(t) + KL(t || s).
            outputs["teacher_student_kl"] = of_cls[: num_global * batch].mean() - outputs["teacher_entropy"]
            used = probabilities.new_zeros(probabilities.shape[-1])
            outputs["used_prototypes"] = used.index_fill(0, probabilities.argmax(-1), 1.0).sum()
        return outputs

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Set `teacher = momentum * teacher + (1 - momentum) * student`; call once after every optimizer step.

        With `average_heads_only`, the backbone is copied instead. Also reduces the centers over the processes, so that
        all processes hold the same state between steps.
        """
        super().update_teacher(momentum)
        if self.average_heads_only:
            _copy_parameters(self.student_backbone, self.teacher_backbone)
        for center in (self.dino_center, self.ibot_center):
            if center is not None:
                center.reduce()

    @torch.no_grad()
    def refresh_gram_teacher(self) -> None:
        """Copy the current teacher backbone to the Gram teacher."""
        _copy_parameters(self.teacher_backbone, cast(RegViTModel, self.gram_teacher))


def _copy_parameters(source: RegViTModel, target: RegViTModel) -> None:
    # `torch._foreach_copy_` does not support the sharded parameters of FSDP2.
    for own, other in zip(target.parameters(), source.parameters(), strict=True):
        own.copy_(other)
