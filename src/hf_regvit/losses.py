"""The self-supervised losses of DINOv2: DINO, iBOT and KoLeo, and the two ways to make teacher targets.

Everything is computed in float32 whatever the dtype of the inputs: at a temperature of 0.04 the rounding of a bf16
logit alone moves a target by 0.1 nat, and the KoLeo epsilon underflows in fp16.

This is the one module that talks to `torch.distributed` directly. Without a process group, or with one process, every
collective is skipped.

Source: Oquab et al., "DINOv2" (2023); Caron et al., "DINO" (2021); Zhou et al., "iBOT" (2021); Sablayrolles et al.,
"Spreading vectors for similarity search" (2018). Divisors and orders of operations follow the released training code.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def _all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduces `tensor` in place over all processes; returns it untouched where there is only one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=op)
    return tensor


def _float32(tensor: Tensor) -> Tensor:
    # float64 stays: gradient checks and reference runs need it.
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check_temperature(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(
            f"{name} is {value}; a temperature must be above 0. "
            "The usual values are 0.1 for the student, 0.04 to 0.07 for the teacher."
        )


def _row_cross_entropy(student_logits: Tensor, target_sum: Tensor, num_targets: int, temperature: float) -> Tensor:
    """Sum over targets of the cross-entropy of each row.

    `-sum_k t_k log_softmax(s)_k = logsumexp(s) - sum_k t_k s_k` because every target sums to 1. In this form neither
    the log-softmax nor a product of target and logit is ever stored, and several targets of one row cost one pass:
    they only enter through their sum.

    Args:
        student_logits: `(..., K)`.
        target_sum: `(..., K)`, sum of `num_targets` probability vectors, broadcastable to the logits.
        num_targets: how many probability vectors were summed.
        temperature: student temperature.

    Returns:
        `(...)`, in nats.
    """
    scaled = _float32(student_logits) / temperature
    dot = torch.einsum("...k,...k->...", scaled, _float32(target_sum))
    return num_targets * torch.logsumexp(scaled, dim=-1) - dot


def dino_loss(student_logits: Tensor, teacher_probs: Tensor, *, student_temperature: float = 0.1) -> Tensor:
    """Cross-entropy between every student crop and every teacher crop, summed over the pairs.

    The division by the number of terms is the caller's: local and global crops share one divisor
    (`2 * num_local_crops + 2`, 18 in the official recipe).

    Args:
        student_logits: `(S, B, K)` head outputs of S student crops of B images.
        teacher_probs: `(T, B, K)` target probabilities of T teacher crops of the same images; each row sums to 1.
            They are constants: no gradient flows into them.
        student_temperature: divides the student logits.

    Returns:
        Scalar, in nats: the sum over all S * T pairs of the mean over the B images.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.
    """
    _check_temperature("student_temperature", student_temperature)
    if student_logits.ndim != 3 or teacher_probs.ndim != 3 or student_logits.shape[1:] != teacher_probs.shape[1:]:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher probabilities {tuple(teacher_probs.shape)} "
            "do not fit; expected (S, B, K) and (T, B, K) with the same images and prototypes."
        )
    target_sum = teacher_probs.detach().sum(dim=0)
    per_image = _row_cross_entropy(student_logits, target_sum, teacher_probs.shape[0], student_temperature)
    return per_image.mean(dim=1).sum()


def ibot_loss(
    student_logits: Tensor,
    teacher_probs: Tensor,
    mask_weights: Tensor,
    *,
    num_crops: int,
    student_temperature: float = 0.1,
) -> Tensor:
    """Cross-entropy at the masked patches between the student, which saw the mask token, and the teacher.

    Args:
        student_logits: `(M, K)` head outputs at the masked positions. M = 0 gives 0, still attached to the graph.
        teacher_probs: `(M, K)` target probabilities at the same crops and positions; constants.
        mask_weights: `(M,)`, 1 / (number of masked patches of that patch's crop).
        num_crops: all global crops of the batch, masked or not. The official denominator counts the unmasked ones
            too, so with half of the crops masked the term has about half of its nominal weight.
        student_temperature: divides the student logits.

    Returns:
        Scalar, in nats: `sum_j w_j H(t_j, s_j) / num_crops`.

    Raises:
        ValueError: shapes that do not fit, `num_crops` below 1, or a temperature that is not positive.
    """
    _check_temperature("student_temperature", student_temperature)
    if student_logits.shape != teacher_probs.shape or mask_weights.shape != student_logits.shape[:1]:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)}, teacher probabilities {tuple(teacher_probs.shape)} and "
            f"mask weights {tuple(mask_weights.shape)} do not fit; "
            "expected (M, K), (M, K) and (M,) for the same M masked patches."
        )
    if num_crops < 1:
        raise ValueError(f"num_crops is {num_crops}; expected the number of global crops in the batch, at least 1.")
    per_patch = _row_cross_entropy(student_logits, teacher_probs.detach(), 1, student_temperature)
    return (per_patch * mask_weights).sum() / num_crops


def koleo_loss(features: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Differential-entropy regulariser: pushes every feature away from its nearest neighbour in the batch.

    Rows are L2-normalised; the neighbour is the row with the largest dot product, itself excluded; its index is a
    constant but the gradient flows through both rows. One global crop is one batch, local to the process.

    Args:
        features: `(B, D)` un-normalised CLS features (after the final norm, before the head).
        eps: added to every coordinate of the difference and to the distance, and the floor of the norm.

    Returns:
        Scalar: `-mean_i log(|x_i - x_nn(i) + eps| + eps)`. Identical rows give about 16, not infinity.

    Raises:
        ValueError: fewer than 2 rows, for which there is no neighbour.
    """
    if features.ndim != 2 or features.shape[0] < 2:
        raise ValueError(
            f"KoLeo got features of shape {tuple(features.shape)}; it needs (B, D) with B of at least 2, because "
            "every image is compared with its nearest neighbour. Raise the batch size or set koleo_loss_weight=0."
        )
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(_float32(features), dim=-1, eps=eps)
        with torch.no_grad():
            similarity = unit @ unit.T
            similarity.fill_diagonal_(-1)
            neighbour = similarity.argmax(dim=1)
        distance = F.pairwise_distance(unit, unit[neighbour], p=2, eps=eps)
        return -torch.log(distance + eps).mean()


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, *, temperature: float, num_iterations: int = 3) -> Tensor:
    """Teacher targets in which all prototypes are used equally over the global batch.

    Alternately scales prototypes and samples of `exp(logits / temperature)` to equal mass. Samples may be spread
    over processes in different numbers, none included: only one vector of K per iteration is communicated, plus one
    for the maximum.

    The scalings are kept as two vectors, so the matrix is exponentiated and stored once. Before the exponential the
    largest logit of each prototype over all processes is subtracted, then the largest of what remains in each
    sample. Both cancel in the scalings, and every row and every column keeps an entry of exactly 1, so no sum can
    overflow or vanish for any finite logits. The released code subtracts nothing and overflows above 88 temperatures.

    Args:
        logits: `(n, K)` teacher head outputs of this process. Remove padding rows first.
        temperature: teacher temperature.
        num_iterations: pairs of scalings, 3 in the official recipe.

    Returns:
        `(n, K)` float32 probabilities; every row sums to 1.

    Raises:
        ValueError: logits that are not a matrix, a temperature that is not positive, or no iterations.
    """
    _check_temperature("temperature", temperature)
    if logits.ndim != 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; expected (n, K): one row per sample.")
    if num_iterations < 1:
        raise ValueError(f"num_iterations is {num_iterations}; expected at least 1, the official recipe uses 3.")
    scaled = _float32(logits) / temperature
    # An empty process takes part in every collective with the neutral element.
    floor = scaled.new_full((1, scaled.shape[1]), -torch.inf)
    scaled = scaled - _all_reduce(torch.cat([scaled, floor]).amax(dim=0), dist.ReduceOp.MAX)
    shift = scaled.amax(dim=1, keepdim=True)
    kernel = (scaled - shift).exp_()
    # Undoes the shift of each sample in the first prototype sums; afterwards the sample scalings absorb it.
    sample_scale = shift.squeeze(1).exp_()
    prototype_scale = kernel.new_ones(kernel.shape[1])
    for _ in range(num_iterations):
        masses = _all_reduce(sample_scale @ kernel)
        # Any common factor cancels in the next line; this one keeps both vectors from growing by n / K per iteration.
        prototype_scale = masses.mean() / masses
        sample_scale = 1 / (kernel @ prototype_scale)
    return kernel.mul_(prototype_scale).mul_(sample_scale[:, None])


class SoftmaxCenter(nn.Module):
    """Teacher targets by centring: `softmax((logits - center) / temperature)`, with a running mean as center.

    The update is lazy, as in the released code: what step k accumulates is folded in at the start of step k + 1, so
    step k uses the center made of the steps before it. Call `accumulate` once per micro-batch and `commit` once at
    the start of every optimizer step; with gradient accumulation the center thus still moves once per step.

    Over several processes the center moves towards the mean of the per-process means (the official rule: processes
    count equally, however many masked patches they have). Processes without any row do not count, so an empty batch
    of masks cannot turn the center into NaN.

    Args:
        num_prototypes: K.
        momentum: share of the old center that stays at each step.

    Raises:
        ValueError: a momentum outside [0, 1).
    """

    center: Tensor
    pending_sum: Tensor
    pending_count: Tensor

    def __init__(self, num_prototypes: int, *, momentum: float = 0.9) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(
                f"center momentum is {momentum}; expected a number from 0 to below 1, the official value is 0.9."
            )
        self.momentum = momentum
        # All three are persistent: without the pending sums a resumed run would skip one update.
        self.register_buffer("center", torch.zeros(num_prototypes))
        self.register_buffer("pending_sum", torch.zeros(num_prototypes))
        self.register_buffer("pending_count", torch.zeros(()))

    @torch.no_grad()
    def forward(self, logits: Tensor, *, temperature: float) -> Tensor:
        """Target probabilities with the present center.

        Args:
            logits: `(..., K)` teacher head outputs.
            temperature: teacher temperature.

        Returns:
            `(..., K)` float32 probabilities.

        Raises:
            ValueError: a temperature that is not positive.
        """
        _check_temperature("temperature", temperature)
        return torch.softmax((_float32(logits) - self.center) / temperature, dim=-1)

    @torch.no_grad()
    def accumulate(self, logits: Tensor) -> None:
        """Adds the rows of `logits` `(..., K)` to what the next `commit` folds in."""
        rows = _float32(logits).reshape(-1, logits.shape[-1])
        self.pending_sum += rows.sum(dim=0)
        self.pending_count += rows.shape[0]

    @torch.no_grad()
    def commit(self) -> None:
        """Moves the center towards the mean of the accumulated rows; a no-op where no process has any."""
        has_rows = (self.pending_count > 0).to(self.pending_sum.dtype)
        mean = self.pending_sum / self.pending_count.clamp(min=1)
        reduced = _all_reduce(torch.cat([mean, has_rows[None]]))
        mean, processes = reduced[:-1] / reduced[-1].clamp(min=1), reduced[-1]
        # Written without a branch on a tensor, which would make a GPU wait.
        self.center.lerp_(mean, (1 - self.momentum) * (processes > 0).to(mean.dtype))
        self.pending_sum.zero_()
        self.pending_count.zero_()

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"num_prototypes={self.center.numel()}, momentum={self.momentum}"
