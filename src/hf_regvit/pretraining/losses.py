"""Losses of pretraining: DINO, iBOT, KoLeo, Gram anchoring and PaKA, two kinds of targets, and feature distillation.

All computations run in float32, whatever the dtype of the inputs: at a temperature of 0.04, the rounding of a bf16
logit alone changes a target by 0.1 nat, and the KoLeo epsilon underflows in fp16.

The communication of the losses between processes is also in this module. It is skipped if there is no process group
or only one process.

Source: Oquab et al., "DINOv2" (2023); Caron et al., "DINO" (2021); Zhou et al., "iBOT" (2021); Sablayrolles et al.,
"Spreading vectors for similarity search" (2018); Siméoni et al., "DINOv3" (2025) for Gram anchoring and the gathered
KoLeo. Divisors and the order of operations follow the released training code.
"""

from typing import Any

import torch.distributed as dist
import torch.distributed.nn.functional
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from ..training.distributed import num_processes


def _all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce `tensor` in place over all processes; return it unchanged if there is only one."""
    if num_processes() > 1:
        dist.all_reduce(tensor, op=op)
    return tensor


def _float32(tensor: Tensor) -> Tensor:
    # Keep float64, which gradient checks and reference runs need.
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _PrototypeCrossEntropy(torch.autograd.Function):
    """Loss and gradients of `prototype_cross_entropy` in one pass over chunks of rows.

    The gradient of a cross-entropy follows from its softmax, so both matrix products of the backward pass run while
    the logits of a chunk are still in the cache. No tensor of size (n, K) is stored.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        features: Tensor,
        prototypes: Tensor,
        targets: Tensor,
        target_rows: Tensor | None,
        weights: Tensor,
        temperature: float,
        chunk_rows: int,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        num_rows = features.shape[0]
        scaled = features / temperature
        per_row = features.new_empty(num_rows)
        if with_gradients:
            feature_gradient, prototype_gradient = torch.empty_like(features), torch.zeros_like(prototypes)
        buffer = features.new_empty(min(chunk_rows, num_rows), prototypes.shape[0])
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, start + chunk_rows)
            target = targets[rows] if target_rows is None else targets.index_select(0, target_rows[rows])
            target = target.to(features.dtype)
            logits = torch.mm(scaled[rows], prototypes.T, out=buffer[: len(target)])
            dot = torch.einsum("nk,nk->n", logits, target)
            top = logits.amax(dim=1, keepdim=True)
            masses = logits.sub_(top).exp_().sum(dim=1)
            per_row[rows] = masses.log() + top.squeeze(1) - dot
            if with_gradients:
                weight = weights[rows, None]
                gradient = logits.mul_(weight / masses[:, None]).addcmul_(target, -weight)
                torch.mm(gradient, prototypes, out=feature_gradient[rows])
                prototype_gradient.addmm_(gradient.T, scaled[rows])
        if with_gradients:
            ctx.save_for_backward(feature_gradient.div_(temperature), prototype_gradient)
        ctx.mark_non_differentiable(per_row)
        return (per_row * weights).sum(), per_row

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        feature_gradient, prototype_gradient = ctx.saved_tensors
        return feature_gradient * gradient, prototype_gradient * gradient, *(None,) * 6


# Largest number of logits that `prototype_cross_entropy` holds at a time: on a CPU the capacity of a cache, elsewhere
# enough rows to make the cost of kernel launches negligible.
_CHUNK_LOGITS = {"cpu": 2**23, "other": 2**26}


def prototype_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    *,
    weights: Tensor,
    temperature: float = 0.1,
    target_rows: Tensor | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute a weighted sum of cross-entropies without storing all logits `features @ prototypes.T` at once.

    This is the DINO and the iBOT loss, in float32: for 65,536 prototypes, the logits and their gradients would be the
    largest tensors of a training step.

    Args:
        features: Bottleneck outputs `(n, d)` of a head, unit length. n may be 0.
        prototypes: Weight `(K, d)` of the last layer of the head.
        targets: Target probabilities `(m, K)`, each row summing to 1, without a gradient.
        weights: Weight `(n,)` of each row in the sum, without a gradient.
        temperature: Student temperature.
        target_rows: Index `(n,)` (int64) of the row of `targets` for each row of `features`. None if row i of
            `features` has row i of `targets`.
        chunk_rows: Number of rows processed at a time; None for a default that depends on the device.

    Returns:
        The scalar `sum_i w_i H(t_i, s_i)`, and the cross-entropy `(n,)` of each row in nats, without a gradient.
    """
    if chunk_rows is None:
        kind = "cpu" if features.device.type == "cpu" else "other"
        chunk_rows = max(_CHUNK_LOGITS[kind] // prototypes.shape[0], 1)
    with torch.autocast(features.device.type, enabled=False):
        features, prototypes = _float32(features), _float32(prototypes)
        return _PrototypeCrossEntropy.apply(
            features,
            prototypes,
            targets.detach(),
            target_rows,
            weights.detach().to(features.dtype),
            temperature,
            chunk_rows,
            torch.is_grad_enabled() and (features.requires_grad or prototypes.requires_grad),
        )


def koleo_loss(features: Tensor, *, eps: float = 1e-8, gathered: bool = False, neighbors: int = 1) -> Tensor:
    """Compute the KoLeo regularizer, which pushes every feature away from its nearest neighbors in the batch.

    Rows are L2-normalized. The neighbors of a row are the other rows with the largest dot products. Their selection is
    not differentiated, but the gradient of a distance flows into both rows. A batch must hold only one global crop of
    each image, so that the nearest neighbor is not another crop of the same image.

    Args:
        features: Unnormalized CLS features `(B, D)` (after the final norm, before the head).
        eps: Constant that is added to every coordinate of a difference and to the distance, and the smallest norm by
            which a row is divided.
        gathered: Whether to search neighbors among the rows of all processes, which then need equal B. Otherwise, the
            batch is local to the process, as in DINOv2.
        neighbors: Number of neighbors, all weighted equally; 1 in DINOv2.

    Returns:
        Scalar: `-mean log(|x_i - x_nn(i) + eps| + eps)`, over the rows of this process and their neighbors. Identical
        rows give about 16, not infinity.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(_float32(features), dim=-1, eps=eps)
        others, offset = unit, 0
        if gathered and num_processes() > 1:
            others = torch.cat(torch.distributed.nn.functional.all_gather(unit))
            offset = dist.get_rank() * unit.shape[0]
        with torch.no_grad():
            similarity = unit @ others.T
            similarity.diagonal(offset).fill_(-1)
            nearest = similarity.topk(neighbors, dim=1).indices  # (B, neighbors)
        distance = F.pairwise_distance(unit[:, None], others[nearest], p=2, eps=eps)
        return -torch.log(distance + eps).mean()


def gram_loss(student_patches: Tensor, teacher_patches: Tensor) -> Tensor:
    """Compute the Gram anchoring loss, which keeps patch similarities close to those of an earlier teacher.

    The features may change as long as the similarities between the patches of an image stay the same. Both sides are
    L2-normalized, so the compared P x P matrices hold cosines.

    Args:
        student_patches: Patch features `(crops, P, D)` after the final norm.
        teacher_patches: Patch features `(crops, P, D')` of the Gram teacher on the same grid, without a gradient.

    Returns:
        Scalar: the mean squared difference over all entries of all matrices.

    Source: Siméoni et al., "DINOv3" (2025), section 4, where this loss has weight 2.
    """
    with torch.autocast(student_patches.device.type, enabled=False):
        student = F.normalize(_float32(student_patches), dim=-1)
        teacher = F.normalize(_float32(teacher_patches.detach()), dim=-1)
        return F.mse_loss(student @ student.mT, teacher @ teacher.mT)


def paka_loss(student_patches: Tensor, teacher_patches: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Compute the loss of patch kernel alignment (PaKA), by which the patches of a crop form the same groups.

    K = X X^T holds the dot products of the P patches of a crop, and H = I - 1/P subtracts the mean patch. Compared are
    only the directions of both matrices, so the loss sees neither a common offset nor the scale of the features, which
    Gram anchoring does in part: it compares cosines by value.

    Args:
        student_patches: Patch features `(crops, P, D)` after the final norm.
        teacher_patches: Patch features `(crops, P, D')` of the teacher on the same grid, without a gradient.
        eps: Smallest norm of a centered matrix by which its product is divided.

    Returns:
        Scalar: one minus the centered kernel alignment (CKA), `1 - <H K_s H, H K_t H> / (|H K_s H| |H K_t H|)` with
        Frobenius product and norms, averaged over the crops; from 0 to 1.

    Source: Yeo et al., "Patch-Level Kernel Alignment for Dense Self-Supervised Learning" (arXiv 2509.05606).
    """
    with torch.autocast(student_patches.device.type, enabled=False):
        features = _float32(student_patches), _float32(teacher_patches.detach())
        student, teacher = (one - one.mean(dim=1, keepdim=True) for one in features)
        kernels = (student @ student.mT).flatten(1), (teacher @ teacher.mT).flatten(1)  # (crops, P * P)
        return 1 - F.cosine_similarity(*kernels, dim=1, eps=eps).mean()


# Share of the cosine in `feature_loss`, as in AM-RADIO; the rest is smooth L1.
_COSINE_SHARE = 0.9


def feature_loss(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute how far predicted features are from those of a teacher, by direction and by value.

    Args:
        predictions: Predictions `(..., E)` of a student.
        targets: Features `(..., E)` of the teacher, scaled so that no token counts more because its norm is large;
            without a gradient.

    Returns:
        Scalars: `mean(0.9 * (1 - cosine) + 0.1 * smooth L1)`, where smooth L1 is the mean over the channels, and the
        mean cosine without a gradient.

    Source: Ranzinger et al., "AM-RADIO" (arXiv 2312.06709).
    """
    with torch.autocast(predictions.device.type, enabled=False):
        predictions, targets = _float32(predictions), _float32(targets.detach())
        cosine = F.cosine_similarity(predictions, targets, dim=-1).mean()
        distance = F.smooth_l1_loss(predictions, targets)
        return _COSINE_SHARE * (1 - cosine) + (1 - _COSINE_SHARE) * distance, cosine.detach()


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, *, temperature: float, num_iterations: int = 3) -> Tensor:
    """Compute teacher targets that use all prototypes equally over the batches of all processes together.

    The columns (prototypes) and the rows (samples) of `exp(logits / temperature)` are alternately scaled to equal
    sums. Processes may hold different numbers of samples, including none. One vector of size K is communicated per
    iteration, plus one for the maximum.

    The scalings are kept as two vectors, so the matrix is exponentiated and stored once. Before the exponential, the
    largest logit of each prototype over all processes is subtracted, then the largest remaining value of each sample.
    Both cancel in the scalings, and every row and every column keeps an entry of exactly 1, so no sum can overflow or
    vanish for finite logits. The released code subtracts nothing and overflows above 88 times the temperature.

    Args:
        logits: Teacher head outputs `(n, K)` of this process. Remove padding rows first.
        temperature: Teacher temperature.
        num_iterations: Number of iterations, each of which scales columns and rows once; 3 in the official recipe.

    Returns:
        Float32 probabilities `(n, K)`; every row sums to 1.
    """
    # This is the only new tensor of size (n, K); all further operations modify it in place.
    kernel = _float32(logits) / temperature
    # A process without rows must still take part in the communication; -inf does not change the maximum.
    top = kernel.amax(dim=0) if len(kernel) else kernel.new_full((kernel.shape[1],), -torch.inf)
    kernel.sub_(_all_reduce(top, dist.ReduceOp.MAX))
    shift = kernel.amax(dim=1, keepdim=True)
    kernel.sub_(shift).exp_()
    # Undo the shift of each sample in the first prototype sums; afterward, the sample scalings absorb it.
    sample_scale = shift.squeeze(1).exp_()
    prototype_scale = kernel.new_ones(kernel.shape[1])
    for _ in range(num_iterations):
        masses = _all_reduce(sample_scale @ kernel)
        # The factor `masses.mean()` cancels in the next line. Without it, values would grow by n / K per iteration.
        prototype_scale = masses.mean() / masses
        sample_scale = 1 / (kernel @ prototype_scale)
    return kernel.mul_(prototype_scale).mul_(sample_scale[:, None])


class SoftmaxCenter(nn.Module):
    """Teacher targets by centering: `softmax((logits - center) / temperature)`, with a running mean as center.

    The update is delayed, as in the released code: the rows accumulated in step k enter the center at the start of
    step k + 1, so step k uses the center of the previous steps. Call `accumulate` once per micro-batch, `reduce` once
    at the end of every optimizer step and `commit` once at the start of the next; with gradient accumulation, the
    center thus still moves once per step. Between steps, all processes hold the same state, so any of them can write
    the checkpoint.

    With several processes, the center moves toward the mean of the per-process means (the official rule: processes
    have equal weight, whatever their number of masked patches). Processes without rows are ignored, so an empty batch
    of masks cannot turn the center into NaN.

    Args:
        num_prototypes: Number of prototypes K.
        momentum: Share of the previous center that is kept per step.
    """

    center: Tensor
    pending_sum: Tensor
    pending_count: Tensor

    def __init__(self, num_prototypes: int, *, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        # All three are saved in checkpoints: without the pending sums, a resumed run would skip one update.
        self.register_buffer("center", torch.zeros(num_prototypes))
        self.register_buffer("pending_sum", torch.zeros(num_prototypes))
        self.register_buffer("pending_count", torch.zeros(()))

    @torch.no_grad()
    def forward(self, logits: Tensor, *, temperature: float) -> Tensor:
        """Compute target probabilities with the current center.

        Args:
            logits: Teacher head outputs `(..., K)`.
            temperature: Teacher temperature.

        Returns:
            Float32 probabilities `(..., K)`.
        """
        return torch.softmax((_float32(logits) - self.center).div_(temperature), dim=-1)

    @torch.no_grad()
    def accumulate(self, logits: Tensor) -> None:
        """Add the rows of `logits` `(..., K)` to the pending sum that the next `commit` uses."""
        rows = _float32(logits).reshape(-1, logits.shape[-1])
        self.pending_sum += rows.sum(dim=0)
        self.pending_count += rows.shape[0]

    @torch.no_grad()
    def reduce(self) -> None:
        """Replace the accumulated rows by the mean over all processes, every one of which must call this."""
        has_rows = (self.pending_count > 0).to(self.pending_sum.dtype)
        mean = self.pending_sum / self.pending_count.clamp(min=1)
        reduced = _all_reduce(torch.cat([mean, has_rows[None]]))
        self.pending_sum.copy_(reduced[:-1] / reduced[-1].clamp(min=1))
        self.pending_count.copy_(reduced[-1].clamp(max=1))

    @torch.no_grad()
    def commit(self) -> None:
        """Move the center toward the mean of the accumulated rows; do nothing if there are none."""
        mean = self.pending_sum / self.pending_count.clamp(min=1)
        # A branch on the value of a tensor would force a GPU synchronization.
        self.center.lerp_(mean, (1 - self.momentum) * (self.pending_count > 0).to(mean.dtype))
        self.pending_sum.zero_()
        self.pending_count.zero_()
