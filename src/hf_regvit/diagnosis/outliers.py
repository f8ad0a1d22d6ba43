"""Outliers among token norms: cut-off, test for two distinct populations, and properties of the upper one.

Pure functions of norms, tokens and attention, without a model. An *outlier* is a patch token whose L2 norm, measured
on the raw residual stream before any final norm, lies above a cut-off.

Shape letters: N patches in a grid of (rows, columns), R registers, T = prefix + N tokens, D width.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import takewhile

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..models.results import Record

# Conditions for a "distinct outlier population".
MIN_SEPARATION = 2.0  # Ashman's D
MIN_SHARE, MAX_SHARE = 0.001, 0.15  # share of the tokens in the upper mode
MIN_RATIO = 3.0  # between the centers of the two modes
MAX_VALLEY = 0.5  # number of tokens around the boundary, relative to that in an equal window around the upper mode
MIN_OUTLIERS = 10  # fewer tokens do not count as a population
GATE = {"separation": MIN_SEPARATION, "share": [MIN_SHARE, MAX_SHARE], "ratio": MIN_RATIO, "valley": MAX_VALLEY}

_BINS = 500  # bins of log norms; the mixture is fitted to their counts
_STARTS = (0.3, 0.1, 0.02, 0.005, 0.001)  # initial shares of the tokens in the upper mode
_ITERATIONS = 300
_TOLERANCE = 1e-6  # gain of the mean log likelihood below which the fit stops, in nats
_MIN_STD = 0.01  # smallest standard deviation of a mode, in log norm; equal tokens (flat images) would have 0
_LOWEST = 1e-4  # smallest norm relative to the median; smaller ones are raised to it, because zero has no logarithm


# --- Two modes and a cut-off ---


@dataclass(frozen=True)
class TwoModes:
    """Mixture of two Gaussians over the log norm. Means and standard deviations are natural logarithms of norms."""

    low_mean: float
    low_std: float
    high_mean: float
    high_std: float
    high_share: float

    @property
    def separation(self) -> float:
        """Ashman's D = sqrt(2) |difference of the means| / sqrt(sum of the variances)."""
        return math.sqrt(2 / (self.low_std**2 + self.high_std**2)) * (self.high_mean - self.low_mean)

    @property
    def ratio(self) -> float:
        """Ratio of the upper to the lower center, as norms."""
        return math.exp(self.high_mean - self.low_mean)

    @property
    def boundary(self) -> float:
        """Norm at which both modes would be equally likely if both had the pooled variance (linear discriminant).

        With separate variances, the densities cross right above the lower mode if that mode is the narrower one, so
        the boundary would not lie in the gap. The pooled variance puts it near the geometric mean of the two centers.
        """
        pooled = (1 - self.high_share) * self.low_std**2 + self.high_share * self.high_std**2
        odds = math.log((1 - self.high_share) / self.high_share)
        middle = (self.low_mean + self.high_mean) / 2
        shift = pooled * odds / max(self.high_mean - self.low_mean, 1e-12)
        return math.exp(middle + shift)


@dataclass(frozen=True)
class Cutoff:
    """Cut-off of one layer, and whether the norms above it are a distinct population.

    Attributes:
        cutoff: Norm above which a token is an outlier.
        bimodal: True if the norms meet the conditions for two distinct modes.
        method: "mixture" (two modes), "fallback" (no distinct population) or "fixed" (given by the caller).
        share: Share of the tokens above `cutoff`, in [0, 1].
        ratio: Median norm above the cut-off over the median norm below; None if one side is empty.
        separation: Ashman's D of the two fitted modes; 0 if nothing could be fitted.
        reason: Explanation of why the norms count as bimodal or not.
        modes: Fitted mixture; None if all norms are equal.
    """

    cutoff: float
    bimodal: bool
    method: str
    share: float
    ratio: float | None
    separation: float
    reason: str
    modes: TwoModes | None

    def to_dict(self) -> Record:
        """Return plain values for JSON."""
        return asdict(self)


def log_norms(norms: np.ndarray) -> NDArray[np.float64]:
    """Return the natural logarithms of norms (any shape, flattened), raised to at least 1e-4 of their median."""
    flat = np.asarray(norms, dtype=np.float64).ravel()
    return np.log(np.maximum(flat, _LOWEST * np.median(flat)))


def fit_two_modes(values: np.ndarray) -> list[TwoModes]:
    """Fit mixtures of two Gaussians by expectation-maximization, one for each initial share of the upper mode.

    The fit uses counts in 500 bins, so its cost hardly depends on the number of values. It is deterministic.

    Args:
        values: Log norms, 1-D.

    Returns:
        The fits, most likely first; empty if all values are equal.

    Source: Dempster et al. 1977. Slow reference implementation: tests/diagnosis/test_artifacts.py.
    """
    if values.max() - values.min() < _MIN_STD:
        return []
    counts, edges = np.histogram(values, bins=_BINS)
    centres, weight = ((edges[:-1] + edges[1:]) / 2)[counts > 0], counts[counts > 0] / counts.sum()
    tail = 1 - np.cumsum(weight) + weight  # share of the values in this bin or above
    upper = np.stack([tail <= max(start, weight[-1]) for start in _STARTS])
    posterior = np.stack((~upper, upper), axis=1).astype(float)  # (starts, 2, bins)
    previous = np.full(len(posterior), -np.inf)
    for _ in range(_ITERATIONS):
        mass = (posterior * weight).sum(axis=2) + 1e-12  # (starts, 2)
        mean = (posterior * weight * centres).sum(axis=2) / mass
        spread = (posterior * weight * (centres - mean[..., None]) ** 2).sum(axis=2) / mass
        std = np.sqrt(np.maximum(spread, _MIN_STD**2))
        density = -0.5 * ((centres - mean[..., None]) / std[..., None]) ** 2 + np.log(mass / std)[..., None]
        top = density.max(axis=1, keepdims=True)
        both = top + np.log(np.exp(density - top).sum(axis=1, keepdims=True))  # (starts, 1, bins)
        posterior = np.exp(density - both)
        likelihood = (both[:, 0] * weight).sum(axis=1)
        if (likelihood - previous < _TOLERANCE).all():
            break
        previous = likelihood
    fits = []
    for start in np.argsort(-likelihood, kind="stable"):
        low, high = np.argsort(mean[start], kind="stable")
        m, s, w = mean[start].tolist(), std[start].tolist(), mass[start].tolist()
        fits.append(TwoModes(m[low], s[low], m[high], s[high], min(max(w[high], 1e-12), 1 - 1e-12)))
    return fits


def find_cutoff(norms: np.ndarray, *, cutoff: float | str = "auto") -> Cutoff:
    """Find the cut-off of one layer, and test whether the tokens above it are a distinct population.

    Two Gaussians are fitted to the log norms. They count as two modes if all of these hold: the upper mode has 0.1 %
    to 15 % of the tokens, and at least 10; its center is at least 3 times that of the lower mode; Ashman's D is above
    2; and around the boundary there are at most half as many tokens as around the center of the upper mode. If several
    fits meet these conditions, the most likely one is used, and the cut-off is the boundary between its modes. If none
    does, the cut-off is median * exp(6 * 1.4826 * MAD of the log norms).

    Args:
        norms: Norms of patch tokens, any shape.
        cutoff: "auto", or a norm to use instead. The test for two modes runs in both cases.

    Raises:
        ValueError: There are no norms, some are NaN or infinite, or `cutoff` is neither "auto" nor a positive number.
    """
    norms = np.asarray(norms)
    if not norms.size or not np.isfinite(norms).all():
        raise ValueError(
            f"Got {norms.size} norms, of which {int((~np.isfinite(norms)).sum())} are not finite. Pass finite norms, "
            "at least one."
        )
    if cutoff != "auto" and (isinstance(cutoff, str) or not 0 < cutoff < math.inf):
        raise ValueError(f"cutoff={cutoff!r} is neither 'auto' nor a positive norm.")
    modes, distinct, automatic = None, False, float(norms.max())
    if np.median(norms) <= 0:
        reason = "at least half of the tokens are zero"
    else:
        values = log_norms(norms)
        fits = fit_two_modes(values)
        failed = {fit: _failed_conditions(fit, values) for fit in fits}
        modes = next((fit for fit in fits if not failed[fit]), fits[0] if fits else None)
        distinct = modes is not None and not failed[modes]
        automatic = modes.boundary if modes is not None and distinct else _fallback(values)
        if modes is None:
            reason = "all tokens have the same norm"
        else:
            found = f"two modes: separation D={modes.separation:.1f}, centers {modes.ratio:.1f} times apart"
            reason = "; ".join(failed[modes]) or found
    used = automatic if cutoff == "auto" else float(cutoff)
    above, below = norms[norms > used], norms[norms <= used]
    middle = float(np.median(below)) if below.size else 0.0
    return Cutoff(
        cutoff=used,
        bimodal=distinct,
        method="fixed" if cutoff != "auto" else "mixture" if distinct else "fallback",
        share=above.size / norms.size,
        ratio=float(np.median(above)) / middle if above.size and middle > 0 else None,
        separation=0.0 if modes is None else modes.separation,
        reason=reason,
        modes=modes,
    )


def _failed_conditions(modes: TwoModes, values: NDArray[np.float64]) -> list[str]:
    """Return the reasons why the upper mode is not a distinct outlier population; empty if it is one."""
    found = []
    if modes.separation <= MIN_SEPARATION:
        found.append(f"separation D={modes.separation:.1f}, needs > {MIN_SEPARATION:g}")
    if not MIN_SHARE <= modes.high_share <= MAX_SHARE:
        found.append(
            f"upper mode holds {modes.high_share:.2%} of the tokens, needs {MIN_SHARE:.1%} to {MAX_SHARE:.0%}"
        )
    if modes.ratio < MIN_RATIO:
        found.append(f"centers {modes.ratio:.1f} times apart, need at least {MIN_RATIO:g}")
    if found:
        return found
    boundary, window = math.log(modes.boundary), modes.high_std / 2
    if (outliers := int((values > boundary).sum())) < MIN_OUTLIERS:
        return [f"{outliers} tokens above the boundary, needs at least {MIN_OUTLIERS}"]
    valley = int((np.abs(values - boundary) < window).sum())
    mode = int((np.abs(values - modes.high_mean) < window).sum())
    if valley > MAX_VALLEY * mode:
        return [f"no gap between the modes ({valley} tokens around the boundary, {mode} around the upper mode)"]
    return []


def _fallback(values: NDArray[np.float64]) -> float:
    """Return the norm 6 robust standard deviations above the median, both of the log norms.

    If more than half of the values are equal, the robust standard deviation is 0, and the usual one is used.
    """
    middle = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(values - middle))) or float(values.std())
    return math.exp(middle + 6 * max(spread, _MIN_STD))


# --- Properties of outliers ---


def neighbor_similarity(embeddings: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the mean cosine of every patch with its neighbors: the existing patches above, below, left and right.

    Args:
        embeddings: (B, N, D) patch embeddings, row-major on `grid`. A zero vector has cosine 0 with everything.
        grid: (rows, columns) of at least two cells.

    Returns:
        (B, N) float32 in [-1, 1].

    Raises:
        ValueError: N does not match the grid, or the grid has a single cell, which has no neighbors.

    Source: arXiv 2309.16588, section 2.1 and figure 5a.
    """
    rows, columns = grid
    if rows * columns != embeddings.shape[1] or rows * columns < 2:
        raise ValueError(
            f"Got {embeddings.shape[1]} patches on a grid of {rows} x {columns}. Expected one per cell, at least 2."
        )
    unit = F.normalize(embeddings.float(), dim=-1).unflatten(1, grid)  # (B, rows, columns, D)
    total = unit.new_zeros(unit.shape[:3])
    count = unit.new_zeros(grid)
    for axis, size in ((1, rows), (2, columns)):
        first, second = unit.narrow(axis, 0, size - 1), unit.narrow(axis, 1, size - 1)
        cosine = (first * second).sum(dim=-1)
        for start in (0, 1):
            total.narrow(axis, start, size - 1).add_(cosine)
            count.narrow(axis - 1, start, size - 1).add_(1)
    return (total / count).flatten(1)


def compare_values(values: np.ndarray, is_outlier: NDArray[np.bool_]) -> Record:
    """Compare a value between outliers and normal patches: medians, Kolmogorov-Smirnov distance, and AUROC.

    AUROC is the probability that the value of an outlier exceeds that of a normal patch, with ties counting half; 0.5
    means no difference.

    Returns:
        Dictionary with `num_normal`, `num_outlier`, `median_normal`, `median_outlier`, `ks` and `auroc`. Values that
        cannot be computed because a group is empty are None.
    """
    from scipy.stats import ks_2samp, mannwhitneyu

    values, is_outlier = np.asarray(values, dtype=np.float64).ravel(), np.asarray(is_outlier).ravel()
    normal, outlier = values[~is_outlier], values[is_outlier]
    result: Record = {"num_normal": len(normal), "num_outlier": len(outlier)}
    for name, group in (("median_normal", normal), ("median_outlier", outlier)):
        result[name] = float(np.median(group)) if len(group) else None
    if not len(normal) or not len(outlier):
        return result | {"ks": None, "auroc": None}
    wins = mannwhitneyu(outlier, normal, method="asymptotic").statistic
    return result | {
        "ks": float(ks_2samp(normal, outlier, method="asymp").statistic),
        "auroc": float(wins / len(outlier) / len(normal)),
    }


def direction_spread(tokens: Tensor, image: Tensor, *, max_tokens: int = 2000, seed: int = 0) -> float | None:
    """Return the mean |cosine| over pairs of tokens from different images: 1 if all share one direction.

    Args:
        tokens: (m, D) tokens.
        image: (m,) index of the image of each token.
        max_tokens: Maximum number of tokens. If there are more, a random sample of this size is used.
        seed: Random seed of the sample.

    Returns:
        Mean in [0, 1]; None if the tokens come from fewer than two images.

    Source: arXiv 2407.16826 (SINDER), section 3, where such tokens lie within about 5.5 degrees.
    """
    if len(tokens) > max_tokens:
        chosen = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:max_tokens]
        tokens, image = tokens[chosen], image[chosen]
    unit = F.normalize(tokens.float(), dim=1)
    different = image[:, None] != image[None, :]
    if not different.any():
        return None
    return (unit @ unit.T).abs()[different].mean().item()


def channel_outliers(tokens: Tensor, *, top: int = 5) -> Record:
    """Find channels that are large in all tokens (unlike outlier tokens), and the share of massive activations.

    Args:
        tokens: (m, D) raw tokens.
        top: Number of channels to return.

    Returns:
        Dictionary with `channels`, those with the largest mean |activation|; `magnitudes`, these means relative to the
        median over channels; and `massive_share`, the share of activations whose absolute value is above both 100 and
        1,000 times the median |activation|.

    Source: DINOv3 report, appendix A, for channels; arXiv 2402.17762 for massive activations.
    """
    magnitude = tokens.float().abs()
    per_channel = magnitude.mean(dim=0)
    values, channels = (per_channel / per_channel.median().clamp(min=1e-12)).topk(min(top, tokens.shape[1]))
    massive = (magnitude > 100) & (magnitude > 1000 * magnitude.median())
    return {
        "channels": channels.tolist(),
        "magnitudes": [round(value, 3) for value in values.tolist()],
        "massive_share": massive.float().mean().item(),
    }


def attention_statistics(attention: Tensor, *, num_prefix_tokens: int, num_register_tokens: int) -> dict[str, Tensor]:
    """Describe the attention of one query per image, averaged over heads.

    Args:
        attention: (B, heads, T) attention weights of the query, normally CLS, over all tokens.
        num_prefix_tokens: Number of tokens before the patches, with the registers as the last of them.
        num_register_tokens: Number of registers R.

    Returns:
        Dictionary of (B,) tensors. `mass_on_patches` and `mass_on_registers` are sums of attention weights. The others
        describe the attention to patches, scaled to a sum of 1: `entropy` in nats; `entropy_share`, relative to the
        entropy of uniform attention; `top_mass`, the sum over the 2 % most attended patches; and `head_entropy`, the
        mean over heads of the entropy of a single head.
    """
    mean = attention.float().mean(dim=1)  # (B, T)
    patches = mean[:, num_prefix_tokens:]  # (B, N)
    mass = patches.sum(dim=1)
    scaled = patches / mass.clamp(min=1e-30)[:, None]
    heads = attention.float()[..., num_prefix_tokens:]
    heads = heads / heads.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    entropy = torch.special.entr(scaled).sum(dim=1)
    count = patches.shape[1]
    return {
        "mass_on_patches": mass,
        "mass_on_registers": mean[:, num_prefix_tokens - num_register_tokens : num_prefix_tokens].sum(dim=1),
        "entropy": entropy,
        "entropy_share": entropy / max(math.log(count), 1e-12),
        "head_entropy": torch.special.entr(heads).sum(dim=-1).mean(dim=1),
        "top_mass": scaled.topk(math.ceil(0.02 * count), dim=1).values.sum(dim=1),
    }


def effective_rank(tokens: Tensor) -> Tensor:
    """Return the effective number of directions of the tokens of an image: exp(entropy of the Gram eigenvalues).

    Tokens are scaled to unit length and not centered. The result is 1 if all tokens are alike, and min(N, D) if they
    are spread evenly.

    Args:
        tokens: (B, N, D) tokens, N and D at least 1.

    Returns:
        (B,) float64.

    Source: Roy and Vetterli 2007 for the effective rank; arXiv 2604.14433 for patches.
    """
    unit = F.normalize(tokens.double(), dim=-1)
    small = unit if unit.shape[1] <= unit.shape[2] else unit.mT  # the smaller Gram matrix has the same eigenvalues
    eigenvalues = torch.linalg.eigvalsh(small @ small.mT).clamp(min=0)  # (B, min(N, D))
    weight = eigenvalues / eigenvalues.sum(dim=1, keepdim=True).clamp(min=1e-300)
    return torch.special.entr(weight).sum(dim=1).exp()


def register_cosine(registers: Tensor) -> Tensor:
    """Return the mean cosine over all pairs of different registers of an image, (B, R, D) -> (B,); R at least 2."""
    unit = F.normalize(registers.float(), dim=-1)
    count = unit.shape[1]
    if count < 2:
        raise ValueError(f"Got {count} registers, but at least 2 are needed for a pair.")
    return ((unit @ unit.mT).sum(dim=(1, 2)) - unit.square().sum(dim=(1, 2))) / (count * (count - 1))


_PLATEAU = 0.95  # layers whose mode ratio is at least this share of the largest count as equal to it


def reported_layer(cutoffs: Mapping[int, Cutoff]) -> int:
    """Return the layer to report: the first bimodal one whose mode ratio is within 5 % of the largest.

    The mode ratio is that of the centers of the two modes. Ashman's D is used to decide whether there are two modes,
    but not to select the layer, because it depends on the few tokens between the modes: with ViT-Tiny, the layer
    selected by D sometimes differed between samples of 16 to 60 images, while the layer selected by the ratio never
    did. If no layer is bimodal, the last one is returned. The embedding (layer 0) is considered only if no other layer
    was read.
    """
    after_blocks = {layer: found for layer, found in cutoffs.items() if layer > 0} or dict(cutoffs)
    ratios = {layer: found.modes.ratio for layer, found in after_blocks.items() if found.bimodal and found.modes}
    if not ratios:
        return max(after_blocks)
    return min(layer for layer, ratio in ratios.items() if ratio >= _PLATEAU * max(ratios.values()))


def emergence_layer(cutoffs: Mapping[int, Cutoff], layer: int) -> int | None:
    """Return the first layer of the unbroken run of bimodal layers that ends at `layer`; None if there is no run."""
    run = takewhile(lambda i: cutoffs[i].bimodal, sorted((i for i in cutoffs if i <= layer), reverse=True))
    return min(run, default=None)
