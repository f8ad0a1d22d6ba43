"""Confidence intervals of numbers measured on images, and of the difference between two of them.

Images are resampled with replacement (the percentile bootstrap). Two models judged on the same images are resampled
together, so what makes an image hard for both cancels out of their difference.

Source: Efron, Annals of Statistics 7 (1979), for the bootstrap.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
Rows = NDArray[np.float64]
Statistic = Callable[[Rows], float]


def mean_iou(rows: Rows) -> float:
    """Mean intersection over union of the rows that `metrics.MeanIoU` makes: (n, 3 * C) agreeing, predicted, true."""
    both, predicted, true = rows.sum(axis=0).reshape(3, -1)
    union = predicted + true - both
    return float((both[union > 0] / union[union > 0]).mean())


# Of the rows of all images to one number. The root mean square error of an image is a number of that image already.
STATISTICS: dict[str, Statistic] = {"mean": lambda rows: float(rows.mean()), "mean_iou": mean_iou}


def bootstrap_interval(
    values: Rows, *, seed: int, confidence: float = 0.95, statistic: Statistic | None = None
) -> tuple[float, float]:
    """Percentile interval of a statistic, from 2,000 resamples of the images with replacement.

    Args:
        values: (n,) or (n, numbers), one row an image.
        seed: Of the resamples; the same for two methods resamples the same images.
        confidence: Share of resampled statistics inside.
        statistic: Of resampled rows; default their mean.
    """
    rng = np.random.default_rng(seed)
    statistic = statistic or STATISTICS["mean"]
    drawn = np.array([statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(RESAMPLES)])
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]).tolist()
    return low, high


def paired_difference(
    first: Rows, second: Rows, *, seed: int, statistic: Statistic | None = None
) -> tuple[float, tuple[float, float]]:
    """How far the second is ahead of the first on the same images, and the 95 % interval of that.

    Args:
        first: (n, numbers), one row an image.
        second: Likewise, of the same images in the same order.
        seed: Of the resamples.
        statistic: Of the rows of one; default their mean.
    """
    if first.shape != second.shape:
        raise ValueError(f"Rows {first.shape} and {second.shape} are not of the same images; nothing to pair.")
    of = statistic or STATISTICS["mean"]
    both = np.stack([first, second], axis=1)  # (n, 2, numbers)

    def difference(rows: Rows) -> float:
        return of(rows[:, 1]) - of(rows[:, 0])

    return difference(both), bootstrap_interval(both, seed=seed, statistic=difference)
