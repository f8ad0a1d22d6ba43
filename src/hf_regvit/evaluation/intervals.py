"""Bootstrap confidence intervals of metrics, and of the difference between two models.

Images are resampled with replacement (percentile bootstrap). Two models tested on the same images are resampled
together, so the difficulty of an image that affects both cancels out of their difference.

Source: Efron, Annals of Statistics 7 (1979), for the bootstrap; Wilson, "Probable inference" (1927), for counts.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
Rows = NDArray[np.float64]
Statistic = Callable[[Rows], float]


def mean(rows: Rows) -> float:
    """Return the mean of all numbers."""
    return float(rows.mean())


def mean_iou(rows: Rows) -> float:
    """Return the mean intersection over union of `metrics.MeanIoU` rows: (n, 3 * C) agreeing, predicted, true."""
    both, predicted, true = rows.sum(axis=0).reshape(3, -1)
    union = predicted + true - both
    return float((both[union > 0] / union[union > 0]).mean())


# Functions from the rows of all images to one number. The rmse needs no entry: it is computed per image and averaged.
STATISTICS: dict[str, Statistic] = {"mean": mean, "mean_iou": mean_iou}


def wilson_interval(share: float, n: float) -> tuple[float, float]:
    """Return the Wilson 95 % confidence interval of a share of n images."""
    z = 1.959964  # two-sided 95 % of the normal distribution
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Rounding could leave [0, 1] at its ends.
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def bootstrap_interval(
    values: Rows, *, seed: int, confidence: float = 0.95, statistic: Statistic = mean
) -> tuple[float, float]:
    """Return the percentile interval of a statistic from 2,000 resamples of the images with replacement.

    Args:
        values: (n,) or (n, numbers), one row per image.
        seed: Random seed of the resamples; the same seed resamples the same images.
        confidence: Share of the resampled statistics inside the interval.
        statistic: Statistic of the resampled rows.
    """
    rng = np.random.default_rng(seed)
    drawn = np.array([statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(RESAMPLES)])
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]).tolist()
    return low, high


def paired_difference(
    first: Rows, second: Rows, *, seed: int, statistic: Statistic = mean
) -> tuple[float, tuple[float, float]]:
    """Return the second statistic minus the first on the same images, with its 95 % confidence interval.

    Args:
        first: (n, numbers), one row per image.
        second: (n, numbers), one row for each of the same images in the same order.
        seed: Random seed of the resamples.
        statistic: Statistic of the rows of one model.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"Rows of shape {first.shape} and {second.shape} are not of the same images and cannot be paired. Pass "
            "one row per image for both, in the same order."
        )
    both = np.stack([first, second], axis=1)  # (n, 2, numbers)

    def difference(rows: Rows) -> float:
        return statistic(rows[:, 1]) - statistic(rows[:, 0])

    return difference(both), bootstrap_interval(both, seed=seed, statistic=difference)
