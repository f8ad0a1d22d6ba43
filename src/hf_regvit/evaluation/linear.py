"""Probes that classify whole images from frozen features: linear heads, logistic regression, few-shot sampling.

Shape letters: n training images, m test images, B blocks, D width, W inputs of a head, C classes, H learning rates.

Source: facebookresearch/dinov2 `eval/linear.py`, `eval/log_regression.py`, `eval/knn.py` for the protocols.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .knn import check_labels

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
LOGISTIC_CS = tuple((10.0 ** np.linspace(-6, 5, 45)).tolist())


# --- Linear heads ---


@dataclass(frozen=True)
class HeadSettings:
    """Settings of one head.

    Args:
        num_blocks: Number of last blocks whose vectors the head reads.
        mean_patch: True if the head also reads the mean patch of the last block.
        learning_rate: Learning rate for a batch of 256 images.
    """

    num_blocks: int
    mean_patch: bool
    learning_rate: float

    def __str__(self) -> str:
        patch = " + mean patch" if self.mean_patch else ""
        return f"{self.num_blocks} block{'s' * (self.num_blocks > 1)}{patch}, lr {self.learning_rate:g}"


@dataclass(frozen=True)
class LinearGrid:
    """Grid of heads of the official linear evaluation, all trained at once.

    Args:
        learning_rates: Learning rates for a batch of 256 images; they are scaled by batch / 256.
        num_blocks: Numbers of last blocks whose concatenated vectors a head reads. The evaluation limits them to the
            depth of the model.
        mean_patch: Values of `HeadSettings.mean_patch`.
        num_steps: Number of SGD steps. The official evaluation takes 12,500 on ImageNet.
        batch_size: Number of images per step, limited to the number of training images.
    """

    learning_rates: Sequence[float] = LEARNING_RATES
    num_blocks: Sequence[int] = (1, 4)
    mean_patch: Sequence[bool] = (False, True)
    num_steps: int = 2000
    batch_size: int = 128

    def __post_init__(self) -> None:
        if not self.learning_rates or not self.num_blocks or not self.mean_patch:
            raise ValueError(
                f"{self} defines no head to train. Give at least one value each for learning_rates, num_blocks and "
                "mean_patch."
            )
        if min(self.learning_rates) <= 0 or min(self.num_blocks) < 1 or min(self.num_steps, self.batch_size) < 1:
            raise ValueError(
                f"{self}: learning_rates must be above 0, and num_blocks, num_steps and batch_size at least 1."
            )

    def only(self, head: HeadSettings) -> "LinearGrid":
        """Return the grid that holds a single head."""
        return LinearGrid(
            (head.learning_rate,), (head.num_blocks,), (head.mean_patch,), self.num_steps, self.batch_size
        )


def head_inputs(vectors: Tensor, mean_patch: Tensor, num_blocks: int, with_mean_patch: bool) -> Tensor:
    """Return (n, W): the concatenated vectors of the last blocks, then the mean patch; W is B * D or (B + 1) * D."""
    parts = [vectors[:, -num_blocks:].flatten(1)]
    return torch.cat([*parts, mean_patch] if with_mean_patch else parts, dim=1)


@dataclass(eq=False)
class _Group:
    """Heads with the same inputs, stacked along the learning rates so that one matrix product serves them all."""

    num_blocks: int
    mean_patch: bool
    weight: Tensor  # (W, H * C)
    bias: Tensor  # (H * C,)


@dataclass(frozen=True, eq=False)
class LinearHeads:
    """Trained heads, with `settings` in the order of the grid: blocks, mean patch, learning rate."""

    settings: tuple[HeadSettings, ...]
    groups: tuple[_Group, ...]
    num_classes: int

    @torch.no_grad()
    def scores(self, vectors: Tensor, mean_patch: Tensor) -> Iterator[tuple[HeadSettings, Tensor]]:
        """Yield every head with its scores, (m, C)."""
        heads = iter(self.settings)
        for group in self.groups:
            inputs = head_inputs(vectors, mean_patch, group.num_blocks, group.mean_patch)
            logits = torch.addmm(group.bias, inputs, group.weight).unflatten(1, (-1, self.num_classes))  # (m, H, C)
            for rate in range(logits.shape[1]):
                yield next(heads), logits[:, rate]

    def best(self, vectors: Tensor, mean_patch: Tensor, labels: Tensor) -> tuple[HeadSettings, float]:
        """Return the head with the highest top-1 accuracy, and that accuracy; cross-entropy breaks ties."""
        merits = {head: merit(scores, labels) for head, scores in self.scores(vectors, mean_patch)}
        head = max(merits, key=lambda one: merits[one])
        return head, merits[head][0]


def merit(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the key that ranks candidates: top-1 accuracy in [0, 1], then minus the mean cross-entropy.

    A tenth of a small training set holds few images, so many candidates have the same accuracy. The first of them,
    with the smallest learning rate, would be the worst choice.
    """
    accuracy = (scores.argmax(dim=1) == labels).double().mean().item()
    return accuracy, -F.cross_entropy(scores, labels).item()


def train_linear_heads(
    vectors: Tensor,
    mean_patch: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    grid: LinearGrid | None = None,
    seed: int = 0,
) -> LinearHeads:
    """Train all heads of the grid in one pass over the features, as if each were trained alone.

    The loss is the sum of the heads' mean cross-entropies, minimized by SGD with momentum 0.9, no weight decay and a
    cosine schedule to 0. Weights start at N(0, 0.01), biases at 0. Heads of the same width start from the same weights
    and see the same batches, so a head of a large grid equals, up to rounding, the head of a grid of its own.

    Args:
        vectors: (n, B, D) vectors of the blocks.
        mean_patch: (n, D) mean patches of the last block.
        labels: (n,) class ids in [0, C).
        num_classes: Number of classes, C.
        grid: Heads to train; see `LinearGrid`.
        seed: Random seed for the weights and the batches.

    Raises:
        ValueError: Shapes do not match, a label is out of range, or the grid needs more blocks than there are.

    Source: dinov2 `eval/linear.py`; here on stored features, hence without augmentation. Slow twin (one torch SGD per
    head): tests/evaluation/test_linear_probes.py.
    """
    grid = grid or LinearGrid()
    check_labels(labels, len(vectors), num_classes)
    if mean_patch.shape != vectors[:, 0].shape or max(grid.num_blocks) > vectors.shape[1]:
        raise ValueError(
            f"vectors {tuple(vectors.shape)} and mean_patch {tuple(mean_patch.shape)} do not match heads of "
            f"{list(grid.num_blocks)} blocks. Pass (n, blocks, width) and (n, width) with at least as many blocks."
        )
    count, batch_size = len(vectors), min(grid.batch_size, len(vectors))
    scale = batch_size / 256
    rates = torch.tensor(grid.learning_rates, dtype=torch.float32, device=vectors.device) * scale
    rates = rates.repeat_interleave(num_classes)  # (H * C,)
    groups, inputs, settings = [], [], []
    for num_blocks, with_patch in product(grid.num_blocks, grid.mean_patch):
        inputs.append(head_inputs(vectors, mean_patch, num_blocks, with_patch).float())
        start = torch.empty(inputs[-1].shape[1], num_classes).normal_(
            0, 0.01, generator=torch.Generator().manual_seed(seed)
        )
        weight = start.to(vectors.device).repeat(1, len(grid.learning_rates))
        groups.append(_Group(num_blocks, with_patch, weight, torch.zeros_like(weight[0])))
        settings += [HeadSettings(num_blocks, with_patch, rate) for rate in grid.learning_rates]
    momenta = [(torch.zeros_like(group.weight), torch.zeros_like(group.bias)) for group in groups]
    batches = _batches(count, batch_size, grid.num_steps, seed)
    for step, batch in enumerate(batches):
        chosen = batch.to(vectors.device)
        step_rates = rates * 0.5 * (1 + np.cos(np.pi * step / grid.num_steps))
        for group, features, (weight_momentum, bias_momentum) in zip(groups, inputs, momenta):
            x = features[chosen]  # (b, W)
            logits = torch.addmm(group.bias, x, group.weight).unflatten(1, (-1, num_classes))  # (b, H, C)
            # Gradient of the mean cross-entropy with respect to the logits, computed without autograd.
            slope = logits.softmax(dim=2)
            slope[torch.arange(batch_size), :, labels[chosen]] -= 1
            slope = slope.flatten(1) / batch_size  # (b, H * C)
            weight_momentum.mul_(0.9).addmm_(x.T, slope)
            bias_momentum.mul_(0.9).add_(slope.sum(dim=0))
            group.weight.sub_(weight_momentum * step_rates)
            group.bias.sub_(bias_momentum * step_rates)
    return LinearHeads(tuple(settings), tuple(groups), num_classes)


def _batches(count: int, batch_size: int, num_steps: int, seed: int) -> Iterator[Tensor]:
    """Yield index batches of full size from consecutive permutations."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.long)
    for _ in range(num_steps):
        while len(left) < batch_size:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        batch, left = left[:batch_size], left[batch_size:]
        yield batch


# --- Fits of scikit-learn ---


@dataclass(frozen=True, eq=False)
class LinearModel:
    """Linear model `(x - mean) / std @ weight + bias`, (m, D) to (m, outputs), in float64 until the result.

    Args:
        weight: (D, outputs) weights.
        bias: (outputs,) bias; minus infinity for a class without training images.
        mean: (D,) mean that is subtracted from the features.
        std: (D,) standard deviation by which they are divided.
        c: C of a logistic regression, as in scikit-learn and cuML.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor | float = 0.0
    std: Tensor | float = 1.0
    c: float = math.nan

    def __call__(self, features: Tensor) -> Tensor:
        """Return class scores or predictions, float32."""
        return ((features.double().cpu() - self.mean) / self.std @ self.weight + self.bias).float()


def logistic_path(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    cs: Sequence[float] = LOGISTIC_CS,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
) -> Iterator[LinearModel]:
    """Fit multinomial logistic regression for ascending values of C, each started from the previous solution.

    Minimizes C * sum of cross-entropies + ||weight||² / 2, without a penalty on the bias, on unscaled features, by
    scikit-learn's L-BFGS in double precision. The result is deterministic. The objective is convex, so the start
    affects the speed and not the solution.

    Args:
        features: (n, D) feature vectors.
        labels: (n,) class ids in [0, num_classes).
        num_classes: Number of classes.
        cs: Values of C, ascending.
        max_iterations: Maximum number of L-BFGS iterations for each C.
        tolerance: Threshold on the largest gradient entry of the mean loss, below which to stop.

    Raises:
        ValueError: A label is out of range, or `cs` is not ascending.

    Source: dinov2 `eval/log_regression.py`: C = 10^linspace(-6, 5, 45), 1,000 iterations.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    check_labels(labels, len(features), num_classes)
    if list(cs) != sorted(cs) or min(cs) <= 0:
        raise ValueError(f"cs={list(cs)} must be above 0 and in ascending order.")
    x, y = features.double().cpu().numpy(), labels.cpu().numpy()
    present = np.unique(y)
    solver = LogisticRegression(tol=tolerance, max_iter=max_iterations, warm_start=True)
    for c in cs:
        weight, bias = np.zeros((x.shape[1], num_classes)), np.full(num_classes, -np.inf)
        if len(present) == 1:
            bias[present] = 0
        else:
            # For two classes scikit-learn fits their difference, whose penalty is twice that of two weight vectors.
            pair = len(present) == 2
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # the protocol stops after max_iterations
                solver.set_params(C=2 * c if pair else c).fit(x, y)
            coefficients = np.column_stack([solver.coef_, solver.intercept_])
            if pair:
                coefficients = np.concatenate([-coefficients, coefficients]) / 2
            weight[:, present], bias[present] = coefficients[:, :-1].T, coefficients[:, -1]
        yield LinearModel(torch.from_numpy(weight), torch.from_numpy(bias), c=c)


def softmax_regression(
    features: Tensor, labels: Tensor, *, num_classes: int, l2: float = 1e-3, max_iterations: int = 100
) -> LinearModel:
    """Fit multinomial logistic regression on standardized features; it is deterministic.

    It minimizes mean cross-entropy + l2 / 2 * ||weight||², without a penalty on the bias.

    Args:
        features: (n, D) features.
        labels: (n,) class ids in [0, num_classes).
        num_classes: Number C of classes.
        l2: L2 penalty, on standardized features.
        max_iterations: Maximum number of iterations of L-BFGS.

    Raises:
        ValueError: There are no features, or not one label per feature.
    """
    x, mean, std = _standardize(features, labels)
    cs = (1 / (l2 * len(x)),)
    fitted = next(logistic_path(x, labels, num_classes=num_classes, cs=cs, max_iterations=max_iterations))
    return replace(fitted, mean=mean, std=std)


def ridge_regression(features: Tensor, targets: Tensor, *, l2: float = 1e-3) -> LinearModel:
    """Fit least squares on standardized features with the penalty l2 * n * ||weight||², in closed form and float64.

    Args:
        features: (n, D) features.
        targets: (n, outputs) targets; their mean is the bias.
        l2: L2 penalty, on standardized features.

    Raises:
        ValueError: There are no features, or not one target per feature.
    """
    from sklearn.linear_model import Ridge

    x, mean, std = _standardize(features, targets)
    fitted = Ridge(alpha=l2 * len(x)).fit(x.numpy(), targets.double().cpu().numpy())
    return LinearModel(torch.from_numpy(fitted.coef_.T), torch.from_numpy(fitted.intercept_), mean, std)


def _standardize(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Standardize each channel in float64; return features, mean and deviation. Constant channels become 0."""
    from sklearn.preprocessing import StandardScaler

    if len(features) == 0 or len(features) != len(targets):
        raise ValueError(f"There are {len(targets)} targets for {len(features)} features, expected one each.")
    scaler = StandardScaler().fit(features.double().cpu().numpy())
    mean, std = torch.from_numpy(scaler.mean_), torch.from_numpy(scaler.scale_)
    return (features.double().cpu() - mean) / std, mean, std


def ridge_accuracy(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor) -> float:
    """Return the accuracy of a linear classifier on test images, in [0, 1].

    Solves least squares on one-hot classes with an L2 penalty in closed form, because a probe within a training run
    must be fast and free of hyperparameters. Features are standardized with the mean and standard deviation of the
    training images. Of five penalties, from 1e-3 to 10 times the number of images, the one with the smallest
    leave-one-out error on the training images is used. The accuracy is slightly below that of a tuned logistic
    regression.

    Args:
        train_features: Features `(n, D)`.
        train_labels: Class ids `(n,)`.
        test_features: Features `(m, D)`.
        test_labels: Class ids `(m,)`.

    Source: Hastie, Tibshirani and Friedman 2009, sections 3.4.1 and 7.10 (leave-one-out error of a linear smoother).
    """
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    penalties = len(train_features) * np.array([1e-3, 1e-2, 1e-1, 1.0, 10.0])
    x, y, test, truth = (
        values.cpu().numpy() for values in (train_features.double(), train_labels, test_features.double(), test_labels)
    )
    return float(make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=penalties)).fit(x, y).score(test, truth))
