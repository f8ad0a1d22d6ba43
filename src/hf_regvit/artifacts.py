"""Does a vision transformer have artifact tokens? The protocols of the registers paper, as one diagnosis.

An *outlier* is a patch token whose L2 norm, read on the raw residual stream before any final norm, lies above a
cut-off; an *attention map* is the attention that CLS pays to the patches in the last block. `diagnose` reads the norms
of all blocks in one pass over the images, decides whether the norms have two modes and where to cut between them, and
describes the outliers on a sample of the images.

Shape letters: n images, N patches in a grid of (rows, columns), R registers, T = prefix + N tokens, D width, L blocks.
Layer 0 is the embedding, layer i the output of block i.
"""

import base64
import json
import logging
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from .configuration_regvit import __version__
from .features import (
    FAMILIES,
    EvaluationTransform,
    Layers,
    ModelDescription,
    PreparedImages,
    Site,
    SkippedImage,
    TokenReading,
    describe_model,
    final_norm,
    find_tower,
    load_model,
    prepare_images,
    read_many,
)
from .images import ImageSource, load_images
from .probes import knn_accuracy, token_probes

logger = logging.getLogger(__name__)

# The gate of a "distinct outlier population".
MIN_SEPARATION = 2.0  # Ashman's D
MIN_SHARE, MAX_SHARE = 0.001, 0.15  # of the tokens in the upper mode
MIN_RATIO = 3.0  # of the two modes' centres
MAX_VALLEY = 0.5  # tokens around the cut-off, relative to the same window around the upper mode
MIN_OUTLIERS = 10  # fewer tokens are no population

MIN_IMAGES = 8  # below this nothing is said
ENOUGH_IMAGES = 500  # below this the report carries a warning: cut-offs of two samples may differ by more than 10 %

_BINS = 500  # of log norms; the mixture is fitted to their counts
_STARTS = (0.3, 0.1, 0.02, 0.005, 0.001)  # shares of the tokens that start as the upper mode
_ITERATIONS = 300
_MIN_STD = 0.01  # of a mode in log norm, so that equal tokens (flat images) do not make a mode of no width
_LOWEST = 1e-4  # norms below this times the median count as that, because zero has no logarithm
_RANK_IMAGES = 64  # enough for a mean; the eigenvalues of large grids take long
_PLATEAU = 0.95  # a layer whose modes are this close to the widest ratio counts as equal; the first is reported


# --- Two modes and a cut-off ---


@dataclass(frozen=True)
class TwoModes:
    """Two Gaussians on the log norm. `low_mean`, `high_mean` and the standard deviations are in nats of log norm."""

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
        """Upper over lower centre, as norms."""
        return math.exp(self.high_mean - self.low_mean)

    @property
    def boundary(self) -> float:
        """Norm at which both modes are equally likely, if both had the pooled variance (linear discriminant).

        With variances of their own the densities cross right above the lower mode whenever that is the narrower one,
        far from any gap; the pooled variance puts the boundary near the geometric middle of the two centres.
        """
        pooled = (1 - self.high_share) * self.low_std**2 + self.high_share * self.high_std**2
        odds = math.log((1 - self.high_share) / self.high_share)
        middle = (self.low_mean + self.high_mean) / 2
        shift = pooled * odds / max(self.high_mean - self.low_mean, 1e-12)
        return math.exp(middle + shift)


@dataclass(frozen=True)
class Cutoff:
    """Where norms become outliers in one layer, and whether they are a population of their own.

    Attributes:
        cutoff: Tokens with a larger norm are outliers.
        bimodal: Whether the norms pass the gate of two distinct modes.
        method: "mixture" (two modes), "fallback" (no distinct population) or "fixed" (given by the caller).
        share: Of the tokens above `cutoff`, in [0, 1].
        ratio: Median norm above over median norm below; None where one side is empty.
        separation: Ashman's D of the two fitted modes; 0 where nothing could be fitted.
        reason: Why the norms count as bimodal or not, in words.
        modes: The fit; None where all norms are equal.
    """

    cutoff: float
    bimodal: bool
    method: str
    share: float
    ratio: float | None
    separation: float
    reason: str
    modes: TwoModes | None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return asdict(self)


def log_norms(norms: NDArray[Any]) -> NDArray[np.float64]:
    """Natural logarithm of norms (any shape, flattened); what lies below 1e-4 of the median counts as that."""
    flat = np.asarray(norms, dtype=np.float64).ravel()
    return np.log(np.maximum(flat, _LOWEST * np.median(flat)))


def fit_two_modes(values: NDArray[Any], *, share: float | None = None, tolerance: float = 1e-6) -> list[TwoModes]:
    """Mixtures of two Gaussians by expectation-maximisation, one for each starting share of the upper mode.

    Works on counts in 500 bins, so the cost hardly depends on the number of values; nothing is random.

    Args:
        values: Log norms, 1-D.
        share: Start from this share of the largest values only; default five shares from 0.3 down to 0.001.
        tolerance: Stop when the mean log likelihood gains less, nats.

    Returns:
        The fits, most likely first; empty if all values are equal.

    Source: Dempster et al. 1977; slow twin in tests/unit/test_artifacts.py.
    """
    if values.max() - values.min() < _MIN_STD:
        return []
    counts, edges = np.histogram(values, bins=_BINS)
    centres, weight = ((edges[:-1] + edges[1:]) / 2)[counts > 0], counts[counts > 0] / counts.sum()
    tail = 1 - np.cumsum(weight) + weight  # share of the values in this bin or above
    upper = np.stack([tail <= max(start, weight[-1]) for start in (_STARTS if share is None else (share,))])
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
        if (likelihood - previous < tolerance).all():
            break
        previous = likelihood
    fits = []
    for start in np.argsort(-likelihood, kind="stable"):
        low, high = np.argsort(mean[start], kind="stable")
        m, s, w = mean[start].tolist(), std[start].tolist(), mass[start].tolist()
        fits.append(TwoModes(m[low], s[low], m[high], s[high], min(max(w[high], 1e-12), 1 - 1e-12)))
    return fits


def find_cutoff(norms: NDArray[Any], *, cutoff: float | str = "auto") -> Cutoff:
    """The cut-off of one layer, and whether the tokens above it are a distinct population.

    Two Gaussians are fitted to the log norms. They count as two modes if the upper one holds 0.1 % to 15 % of the
    tokens (and at least 10), lies at 3 times the norm of the lower or more, is separated by Ashman's D > 2, and if
    fewer tokens lie around the boundary than around the upper mode. Among several fits of the mixture the likeliest
    that passes is taken. The cut-off is then the boundary between the modes; otherwise it is
    median * exp(6 * 1.4826 * MAD of the log norms).

    Args:
        norms: Norms of patch tokens, any shape.
        cutoff: "auto", or a norm to use instead. Whether the norms are bimodal is measured either way.

    Raises:
        ValueError: No norms, NaN or infinity among them, or a cut-off that is no positive number.
    """
    norms = np.asarray(norms)
    if not norms.size or not np.isfinite(norms).all():
        raise ValueError(f"{norms.size} norms, of which {int((~np.isfinite(norms)).sum())} are not finite.")
    if cutoff != "auto" and (isinstance(cutoff, str) or not 0 < cutoff < math.inf):
        raise ValueError(f"cutoff={cutoff!r} is neither 'auto' nor a positive norm.")
    if np.median(norms) <= 0:
        modes, reason = None, "at least half of the tokens are zero"
        automatic, distinct = float(norms.max()), False
    else:
        values = log_norms(norms)
        fits = fit_two_modes(values)
        passing = [fit for fit in fits if not _objections(fit, values)]
        modes = next(iter(passing or fits), None)
        distinct = bool(passing)
        if modes is None:
            reason = "all tokens have the same norm"
        elif distinct:
            reason = f"two modes: separation D={modes.separation:.1f}, centres {modes.ratio:.1f} times apart"
        else:
            reason = "; ".join(_objections(modes, values))
        automatic = modes.boundary if modes is not None and distinct else _fallback(values)
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


def _objections(modes: TwoModes, values: NDArray[np.float64]) -> list[str]:
    """Why two fitted modes are no distinct outlier population; empty if they are one."""
    found = []
    if modes.separation <= MIN_SEPARATION:
        found.append(f"separation D={modes.separation:.1f}, needs > {MIN_SEPARATION:g}")
    if not MIN_SHARE <= modes.high_share <= MAX_SHARE:
        found.append(f"upper mode holds {modes.high_share:.2%}, needs {MIN_SHARE:.1%} to {MAX_SHARE:.0%}")
    if modes.ratio < MIN_RATIO:
        found.append(f"modes {modes.ratio:.1f} times apart, need {MIN_RATIO:g}")
    if found:
        return found
    boundary, window = math.log(modes.boundary), modes.high_std / 2
    if (outliers := int((values > boundary).sum())) < MIN_OUTLIERS:
        return [f"{outliers} tokens above the boundary, needs {MIN_OUTLIERS}"]
    valley = int((np.abs(values - boundary) < window).sum())
    mode = int((np.abs(values - modes.high_mean) < window).sum())
    if valley > MAX_VALLEY * mode:
        return [f"no gap between the modes ({valley} tokens around the boundary, {mode} around the upper mode)"]
    return []


def _fallback(values: NDArray[np.float64]) -> float:
    """Median times exp(6 robust standard deviations); plain ones where more than half of the values are equal."""
    middle = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(values - middle))) or float(values.std())
    return math.exp(middle + 6 * max(spread, _MIN_STD))


# --- What outliers are like ---


def neighbour_similarity(embeddings: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean cosine of every patch with the patches above, below, left and right of it; at borders with those it has.

    Args:
        embeddings: (B, N, D) patch embeddings, row-major on `grid`. A zero vector has cosine 0 with everything.
        grid: (rows, columns); a grid of one cell has no neighbours.

    Returns:
        (B, N) float32 in [-1, 1].

    Source: arXiv 2309.16588, section 2.1 and figure 5a.
    """
    rows, columns = grid
    if rows * columns != embeddings.shape[1] or rows * columns < 2:
        raise ValueError(f"{embeddings.shape[1]} patches on a grid of {rows} x {columns}; at least 2 are needed.")
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


def compare_values(values: NDArray[Any], is_outlier: NDArray[np.bool_]) -> dict[str, Any]:
    """Two groups of one number: medians, Kolmogorov-Smirnov distance, and AUROC of telling outliers by larger values.

    AUROC is the chance that an outlier's value exceeds a normal one's, ties counting half; 0.5 means no difference.
    The entries are None where one group is empty.
    """
    values, is_outlier = np.asarray(values, dtype=np.float64).ravel(), np.asarray(is_outlier).ravel()
    normal, outlier = np.sort(values[~is_outlier]), np.sort(values[is_outlier])
    result: dict[str, Any] = {"num_normal": len(normal), "num_outlier": len(outlier)}
    result |= {"median_normal": float(np.median(normal)) if len(normal) else None}
    result |= {"median_outlier": float(np.median(outlier)) if len(outlier) else None}
    if not len(normal) or not len(outlier):
        return result | {"ks": None, "auroc": None}
    both = np.concatenate([normal, outlier])
    below = [np.searchsorted(group, both, side="right") / len(group) for group in (normal, outlier)]
    wins = np.searchsorted(normal, outlier, side="left") + np.searchsorted(normal, outlier, side="right")
    return result | {
        "ks": float(np.abs(below[0] - below[1]).max()),
        "auroc": float(wins.mean() / 2 / len(normal)),
    }


def effective_rank(tokens: Tensor) -> Tensor:
    """Number of directions that the tokens of an image really use: exp(entropy of the Gram matrix's eigenvalues).

    Tokens are scaled to unit length and not centred. 1: all alike; min(N, D): spread evenly.

    Args:
        tokens: (B, N, D), N and D at least 1.

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
    """Mean cosine over the pairs of different registers of an image, (B, R, D) -> (B,); R at least 2."""
    unit = F.normalize(registers.float(), dim=-1)
    count = unit.shape[1]
    if count < 2:
        raise ValueError(f"{count} registers make no pair; at least 2 are needed.")
    return ((unit @ unit.mT).sum(dim=(1, 2)) - unit.square().sum(dim=(1, 2))) / (count * (count - 1))


def direction_spread(tokens: Tensor, image: Tensor, *, max_tokens: int = 2000, seed: int = 0) -> float | None:
    """Mean |cosine| over pairs of tokens from different images: 1 if they share one direction whatever the image.

    Args:
        tokens: (m, D).
        image: (m,) index of the image a token comes from.
        max_tokens: A random sample of that size stands for more.
        seed: Of the sample.

    Returns:
        In [0, 1]; None where no two images are represented.

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


def channel_outliers(tokens: Tensor, *, top: int = 5) -> dict[str, Any]:
    """Channels that are large for all tokens, a phenomenon apart from outlier tokens, and massive activations.

    Args:
        tokens: (m, D) raw tokens.
        top: Channels to name.

    Returns:
        `channels` and `magnitudes`: those with the largest mean |activation|, relative to the median channel;
        `massive_share`: share of activations above 100 and above 1,000 times the median |activation|.

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


def attention_statistics(
    attention: Tensor, *, num_prefix_tokens: int, num_register_tokens: int, outliers: Tensor | None = None
) -> dict[str, Tensor]:
    """Where one query's attention goes, per image, on the mean over heads.

    Args:
        attention: (B, heads, T) weights of the query, normally CLS, over all tokens.
        num_prefix_tokens: Tokens before the patches, registers included as the last of them.
        num_register_tokens: R.
        outliers: (B, N) bool, which patches are outliers.

    Returns:
        Each (B,): `mass_on_patches`, `mass_on_registers`, `mass_on_outliers` (with `outliers`); on the attention to
        patches scaled to sum 1: `entropy` in nats, `entropy_share` relative to uniform attention, `top_mass`, the
        share of the 2 % most attended patches, and `head_entropy`, the mean entropy of single heads.
    """
    mean = attention.float().mean(dim=1)  # (B, T)
    patches = mean[:, num_prefix_tokens:]  # (B, N)
    mass = patches.sum(dim=1)
    scaled = patches / mass.clamp(min=1e-30)[:, None]
    heads = attention.float()[..., num_prefix_tokens:]
    heads = heads / heads.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    entropy = torch.special.entr(scaled).sum(dim=1)
    count = patches.shape[1]
    result = {
        "mass_on_patches": mass,
        "mass_on_registers": mean[:, num_prefix_tokens - num_register_tokens : num_prefix_tokens].sum(dim=1),
        "entropy": entropy,
        "entropy_share": entropy / max(math.log(count), 1e-12),
        "head_entropy": torch.special.entr(heads).sum(dim=-1).mean(dim=1),
        "top_mass": scaled.topk(math.ceil(0.02 * count), dim=1).values.sum(dim=1),
    }
    if outliers is not None:
        result["mass_on_outliers"] = (patches * outliers).sum(dim=1)
    return result


# --- Reading the images once ---


@dataclass(eq=False)
class _Readings:
    """What one pass over n images leaves: only numbers per token, never tokens; pixels of a few images for details."""

    ids: list[str]
    grid: tuple[int, int]
    norms: dict[int, NDArray[np.float32]]  # layer: (n, N)
    cls_norms: dict[int, NDArray[np.float32]]  # layer: (n,)
    register_norms: dict[int, NDArray[np.float32]]  # layer: (n, R)
    neighbours: NDArray[np.float32]  # (n, N)
    attention: NDArray[np.float32] | None  # (n, N) CLS -> patches in the last block, mean over heads
    attention_statistics: dict[str, NDArray[np.float32]]  # each (n,)
    kept: list[int]  # which images have their pixels here
    pixels: Tensor  # (kept, 3, H, W)


def _cls_row(attention: Tensor, layer: int) -> Tensor:
    return attention[:, :, 0].float().cpu()  # (B, heads, T)


def _token_norms(tokens: Tensor, layer: int) -> Tensor:
    return tokens.float().norm(dim=-1).cpu()  # (B, T)


def _read(
    model: nn.Module, images: PreparedImages, layers: Layers, *, num_details: int, max_images: int, progress: bool
) -> tuple[_Readings, list[SkippedImage]]:
    """One forward pass over every image."""
    description = describe_model(model)
    sites: dict[Site, Layers] = {"residual": layers, "patch_embedding": (0,)}
    if description.has_cls:
        sites["attention"] = (-1,)
    expected = min(images.total or max_images, max_images)
    stride = max(1, expected // num_details)
    batches: list[dict[str, Any]] = []
    kept: list[int] = []
    pixels: list[Tensor] = []
    flat: list[SkippedImage] = []
    bar = tqdm(total=images.total, desc="images", unit="img", disable=not progress)
    with bar:
        for ids, batch in images:
            bar.update(len(ids))
            varied = (batch.amax(dim=(2, 3)) - batch.amin(dim=(2, 3))).amax(dim=1) > 1e-6  # (B,)
            flat += [SkippedImage(name, "single colour") for name, keep in zip(ids, varied.tolist()) if not keep]
            batch = batch[varied]
            if not len(batch):
                continue
            seen = sum(len(entry["ids"]) for entry in batches)
            used = [name for name, keep in zip(ids, varied.tolist()) if keep]
            batches.append(_reduce_batch(model, batch, used, sites, description))
            if batches[-1]["grid"] != batches[0]["grid"]:
                raise ValueError(
                    f"Image '{used[0]}' has {_by(batches[-1]['grid'])} patches, the ones before it "
                    f"{_by(batches[0]['grid'])}. A diagnosis needs one grid: use a processor that crops to one size."
                )
            for i in range(len(used)):
                if (seen + i) % stride == 0 and len(kept) < num_details:
                    kept.append(seen + i)
                    pixels.append(batch[i])
    skipped = [*images.skipped, *flat]
    num_images = sum(len(entry["ids"]) for entry in batches)
    if num_images < MIN_IMAGES:
        raise ValueError(
            f"{num_images} images can be used ({len(skipped)} were skipped{_first_reason(skipped)}); a diagnosis "
            f"needs at least {MIN_IMAGES}, and {ENOUGH_IMAGES} for numbers that repeat. Give more images."
        )

    def joined(key: str) -> dict[Any, NDArray[np.float32]]:
        return {name: np.concatenate([entry[key][name] for entry in batches]) for name in batches[0][key]}

    readings = _Readings(
        ids=[name for entry in batches for name in entry["ids"]],
        grid=batches[0]["grid"],
        norms=joined("norms"),
        cls_norms=joined("cls_norms"),
        register_norms=joined("register_norms"),
        neighbours=np.concatenate([entry["neighbours"] for entry in batches]),
        attention=joined("attention").get("patches"),
        attention_statistics=joined("statistics"),
        kept=kept,
        pixels=torch.stack(pixels),
    )
    return readings, skipped


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"


def _first_reason(skipped: Sequence[SkippedImage]) -> str:
    return f", e.g. '{skipped[0].id}': {skipped[0].reason}" if skipped else ""


def _reduce_batch(
    model: nn.Module,
    pixel_values: Tensor,
    ids: Sequence[str],
    sites: Mapping[Site, Layers],
    description: ModelDescription,
) -> dict[str, Any]:
    """Norms of all tokens, neighbour similarity, attention of CLS: for one batch, as arrays."""
    reading = read_many(model, pixel_values, sites, reduce={"residual": _token_norms, "attention": _cls_row})
    residual, embedding = reading["residual"], reading["patch_embedding"]
    for layer, norms in zip(residual.layers, residual.values):
        if not torch.isfinite(norms).all():
            worst = ids[int((~torch.isfinite(norms)).any(dim=1).nonzero()[0])]
            raise ValueError(f"Tokens of image '{worst}' are not finite at layer {layer}. Check weights and pixels.")
    result: dict[str, Any] = {
        "ids": list(ids),
        "grid": residual.grid,
        "norms": {layer: residual.patches(layer).numpy() for layer in residual.layers},
        "cls_norms": {},
        "register_norms": {},
        "neighbours": neighbour_similarity(embedding.values[0].cpu(), residual.grid).numpy(),
        "attention": {},
        "statistics": {},
    }
    if description.num_register_tokens:
        result["register_norms"] = {layer: residual.registers(layer).numpy() for layer in residual.layers}
    if description.has_cls:
        result["cls_norms"] = {layer: residual.at(layer)[:, 0].numpy() for layer in residual.layers}
        row = reading["attention"].values[0]  # (B, heads, T)
        result["attention"] = {"patches": row.mean(dim=1)[:, residual.num_prefix_tokens :].numpy()}
        statistics = attention_statistics(
            row, num_prefix_tokens=residual.num_prefix_tokens, num_register_tokens=residual.num_register_tokens
        )
        result["statistics"] = {name: value.numpy() for name, value in statistics.items()}
    return result


# --- The diagnosis ---


@dataclass(frozen=True)
class ArtifactReport:
    """What a diagnosis found. The first entries speak of the reported layer, where the modes are furthest apart.

    Attributes:
        cutoff: Norm above which a patch token is an outlier.
        bimodal: Whether the outliers are a population of their own.
        outlier_share: Of all patch tokens, in [0, 1].
        norm_ratio: Median norm of outliers over that of the others; None without outliers.
        layer: The reported layer, i = output of block i; the last block's where no layer has two modes.
        emergence_layer: First layer of the unbroken run of bimodal layers around the reported one; 1 = output of the
            first block, 0 = the embedding. None where there is none.
        num_images: Images used.
        separation: Ashman's D of the reported layer.
        method: How the cut-off was found: "mixture", "fallback" or "fixed".
        reason: Why the norms count as bimodal or not.
        model: Name, family, sizes, parameters and cost.
        layers: One record a layer: quantiles, histogram counts, cut-off and gate, norms of CLS and registers.
        histogram_edges: Edges of all histograms, in norm; logarithmic.
        outliers: Number per image, places (`position_map` is the share of images in which a cell is an outlier),
            direction, channels.
        neighbours: Similarity to neighbouring patches at the patch embedding: normal against outlier.
        attention: CLS to patches in the last block; None without CLS.
        registers: Norms, similarity and attention of registers; None without registers.
        patches: Effective rank of the patch tokens after the final norm.
        controls: Effect of replacing registers; None without registers.
        probes: Linear probes on single tokens; None if not asked for.
        examples: A few images with their norm and attention maps.
        skipped: Images left out, with the reason.
        warnings: What weakens the numbers.
        settings: Everything that can be set, and the preprocessing in words.
        versions: Of the libraries.
        seconds: Wall time of the parts.
    """

    cutoff: float
    bimodal: bool
    outlier_share: float
    norm_ratio: float | None
    layer: int
    emergence_layer: int | None
    num_images: int
    separation: float
    method: str
    reason: str
    model: dict[str, Any]
    layers: list[dict[str, Any]]
    histogram_edges: list[float]
    outliers: dict[str, Any]
    neighbours: dict[str, Any]
    attention: dict[str, Any] | None
    registers: dict[str, Any] | None
    patches: dict[str, Any]
    controls: dict[str, Any] | None
    probes: dict[str, Any] | None
    examples: list[dict[str, Any]]
    skipped: list[dict[str, str]]
    warnings: list[str]
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def save(self, folder: str | Path) -> Path:
        """Write `report.json` into `folder`, made if needed; returns its path."""
        path = Path(folder) / "report.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "ArtifactReport":
        """Read what `save` wrote; `path` is the file or its folder."""
        path = Path(path)
        return cls(**json.loads((path / "report.json" if path.is_dir() else path).read_text(encoding="utf-8")))

    @property
    def verdict(self) -> str:
        """One sentence in plain words."""
        where = f"layer {self.layer} of {self.model['num_layers']}"
        if self.bimodal:
            return (
                f"This model has artifact tokens: at {where}, {self.outlier_share:.2%} of the patch tokens form a "
                f"population of their own with {_number(self.norm_ratio)} times the norm of the others."
            )
        return f"No distinct outliers: no layer's patch norms have two modes ({self.reason} at {where})."

    def summary(self) -> str:
        """Ten lines for a terminal."""
        return "\n".join(_summary_lines(self))


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _summary_lines(report: ArtifactReport) -> list[str]:
    model, outliers, neighbours = report.model, report.outliers, report.neighbours
    record = next(entry for entry in report.layers if entry["layer"] == report.layer)
    born = {None: "nowhere", 0: "before the first block"}.get(
        report.emergence_layer, f"at the output of block {report.emergence_layer}"
    )
    cells = ", ".join(f"({c['row']}, {c['column']}) in {c['share']:.0%} of images" for c in outliers["top_cells"][:3])
    lines = [
        f"model       {model['name']}: {model['family']}, {model['num_layers']} blocks, width {model['hidden_size']}, "
        f"{model['num_register_tokens']} registers, {report.num_images} images on {_by(outliers['grid'])} patches",
        f"verdict     {report.verdict}",
        f"cut-off     {report.cutoff:.1f} at layer {report.layer} ({report.method}; median norm "
        f"{record['median']:.1f}, largest {record['max']:.1f}); {report.reason}",
        f"emergence   {born}",
        f"outliers    {outliers['per_image']:.2f} per image, in {outliers['images_with']:.0%} of the images; "
        f"on the border {_percent(outliers['border_share'])} of them (border: {outliers['border_cells']:.0%} of the "
        f"cells); most often {cells or 'nowhere'}",
        f"direction   mean |cos| between images {_number(outliers['direction']['outlier'], 2)} for outliers, "
        f"{_number(outliers['direction']['normal'], 2)} for others",
        f"neighbours  median cosine at the input {_number(neighbours['median_outlier'], 2)} for outliers, "
        f"{_number(neighbours['median_normal'], 2)} for others; AUROC {_number(neighbours['auroc'], 2)}",
    ]
    if report.attention is None:
        lines.append("attention   no CLS token, so there is no attention map of it")
    else:
        mean = {name: entry["mean"] for name, entry in report.attention["statistics"].items()}
        lines.append(
            f"attention   CLS puts {mean['mass_on_patches']:.1%} on patches ({mean['mass_on_outliers']:.1%} on "
            f"outliers), {mean['mass_on_registers']:.1%} on registers; entropy {mean['entropy_share']:.2f} of "
            f"uniform, top 2 % of patches hold {mean['top_mass']:.1%}"
        )
    if report.registers is None:
        lines.append("registers   none")
    else:
        r = report.registers
        lines.append(
            f"registers   {r['norm_ratio']:.1f} times the norm of a patch at layer {report.layer}; cosine between "
            f"registers {_number(r['cosine'], 2)}, of one between images {_number(r['cosine_across_images'], 2)}"
        )
    rank = report.patches["effective_rank"]
    lines.append(
        f"rank        effective rank of the patches {rank['mean']:.1f} ± {rank['std']:.1f}; "
        f"took {report.seconds['total']:.0f} s" + "".join(f"\nwarning     {text}" for text in report.warnings)
    )
    return lines


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.0%}"


def diagnose(
    model: nn.Module,
    images: Any,
    *,
    layers: Layers = "all",
    cutoff: float | str = "auto",
    max_images: int = 1000,
    seed: int = 0,
    processor: Any = None,
    batch_size: int = 32,
    detail_images: int = 128,
    probes: bool = False,
    progress: bool = True,
) -> ArtifactReport:
    """Measure whether, where and how a model has artifact tokens.

    One pass over the images keeps norms, neighbour similarities and attention of CLS; a second, over at most
    `detail_images` of them, reads tokens of two layers. Images of one colour are left out and listed as skipped.

    Args:
        model: A model of a family in `features.FAMILIES`; left as it was. Without CLS, `attention` is None.
        images: A folder, paths, Pillow images, an `ImageSource` or a `datasets` data set.
        layers: Which to read, 0 to L; "all" is 0 to L.
        cutoff: "auto", or a norm that every layer is cut at.
        max_images: A random draw of that many; streams: the first.
        seed: Of all random draws.
        processor: See `EvaluationTransform.for_model`; all images must come out at one size.
        batch_size: Images of one forward pass.
        detail_images: Images for direction, channels, rank and register controls; their pixels stay in memory.
        probes: Also fit linear probes on single tokens (another pass; minutes).
        progress: Show a bar.

    Raises:
        ValueError: Fewer than 8 usable images, images on different grids, tokens that are not finite, or a model that
            cannot be read.

    Source: arXiv 2309.16588; the protocols are described at the functions.
    """
    if detail_images < 2 or max_images < MIN_IMAGES:
        raise ValueError(
            f"detail_images={detail_images} must be at least 2 and max_images={max_images} at least {MIN_IMAGES}."
        )
    watch = _Watch()
    transform = EvaluationTransform.for_model(model, processor)
    source = load_images(images, split=None) if isinstance(images, str | Path) else images
    prepared = prepare_images(source, transform, batch_size=batch_size, max_images=max_images, seed=seed)
    readings, skipped = _read(
        model,
        prepared,
        tuple(range(describe_model(model).num_layers + 1)) if layers == "all" else layers,
        num_details=detail_images,
        max_images=max_images,
        progress=progress,
    )
    watch.lap("reading")
    cutoffs = {layer: find_cutoff(norms, cutoff=cutoff) for layer, norms in readings.norms.items()}
    layer = reported_layer(cutoffs)
    chosen = cutoffs[layer]
    is_outlier = readings.norms[layer] > chosen.cutoff  # (n, N)
    watch.lap("cut-offs")
    details = _details(model, readings, layer, is_outlier, transform=transform, batch_size=batch_size, seed=seed)
    watch.lap("details")
    controls = _controls(model, source, readings, batch_size=batch_size, seed=seed)
    watch.lap("controls")
    common: dict[str, Any] = {"max_images": max_images, "batch_size": batch_size, "seed": seed}
    tables = None
    if probes:
        tables = token_probes(
            model, source, cutoff=chosen.cutoff, cutoff_layer=layer, processor=transform, **common
        ).to_dict()
        watch.lap("probes")
    edges = _histogram_edges(readings.norms)
    return ArtifactReport(
        cutoff=chosen.cutoff,
        bimodal=chosen.bimodal,
        outlier_share=chosen.share,
        norm_ratio=chosen.ratio,
        layer=layer,
        emergence_layer=emergence_layer(cutoffs, layer),
        num_images=len(readings.ids),
        separation=chosen.separation,
        method=chosen.method,
        reason=chosen.reason,
        model=_model_record(model, readings.grid),
        layers=[_layer_record(readings, i, cutoffs[i], edges) for i in readings.norms],
        histogram_edges=edges.tolist(),
        outliers=_outlier_record(is_outlier, readings.grid) | details["outliers"],
        neighbours=_neighbour_record(readings.neighbours, is_outlier),
        attention=_attention_record(readings, is_outlier),
        registers=details["registers"],
        patches=details["patches"],
        controls=controls,
        probes=tables,
        examples=details["examples"],
        skipped=[asdict(image) for image in skipped],
        warnings=_warnings(len(readings.ids), skipped),
        settings=_settings(transform, cutoff, list(readings.norms)) | common | {"detail_images": len(readings.kept)},
        versions=_versions(),
        seconds=watch.laps | {"total": watch.total},
    )


def reported_layer(cutoffs: Mapping[int, Cutoff]) -> int:
    """The layer to speak of: among bimodal ones the first whose modes are as far apart (within 5 %) as anywhere.

    Distance is the ratio of the modes' centres. Ashman's D decides whether there are two modes, but it varies with
    the few tokens between them: on 16 to 60 images of ViT-Tiny it names another layer of a plateau now and then, the
    ratio never does. Where no layer is bimodal it is the last; the embedding counts only if nothing else was read.
    """
    after_blocks = {layer: found for layer, found in cutoffs.items() if layer > 0} or dict(cutoffs)
    ratios = {layer: found.modes.ratio for layer, found in after_blocks.items() if found.bimodal and found.modes}
    if not ratios:
        return max(after_blocks)
    return min(layer for layer, ratio in ratios.items() if ratio >= _PLATEAU * max(ratios.values()))


def emergence_layer(cutoffs: Mapping[int, Cutoff], layer: int) -> int | None:
    """First of the unbroken run of bimodal layers that ends at `layer`, or None if that is not bimodal."""
    if not cutoffs[layer].bimodal:
        return None
    first = layer
    for earlier in sorted((i for i in cutoffs if i < layer), reverse=True):
        if not cutoffs[earlier].bimodal:
            break
        first = earlier
    return first


class _Watch:
    """Wall time of parts that follow each other."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = round(now - self.last, 2), now

    @property
    def total(self) -> float:
        return round(time.perf_counter() - self.start, 2)


# --- Parts of the report ---


def _histogram_edges(norms: Mapping[int, NDArray[np.float32]], bins: int = 80) -> NDArray[np.float64]:
    """Logarithmic edges that span the norms of all layers, the same for each."""
    low = min(float(np.quantile(values, 0.0001)) for values in norms.values())
    high = max(float(values.max()) for values in norms.values())
    low = max(low, 1e-4 * high, 1e-12)
    return np.geomspace(low, max(high, 1.001 * low) * 1.001, bins + 1)


def _layer_record(readings: _Readings, layer: int, found: Cutoff, edges: NDArray[np.float64]) -> dict[str, Any]:
    norms = readings.norms[layer]
    quantiles = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
    record: dict[str, Any] = {
        "layer": layer,
        "median": float(np.median(norms)),
        "mean": float(norms.mean(dtype=np.float64)),
        "max": float(norms.max()),
        "quantiles": {str(q): float(np.quantile(norms, q)) for q in quantiles},
        "histogram": np.histogram(np.clip(norms, edges[0], edges[-1]), bins=edges)[0].tolist(),
    }
    record |= found.to_dict()
    if layer in readings.cls_norms:
        record["cls_norm"] = float(np.median(readings.cls_norms[layer]))
    if layer in readings.register_norms:
        record["register_norms"] = np.median(readings.register_norms[layer], axis=0).tolist()
    return record


def _outlier_record(is_outlier: NDArray[np.bool_], grid: tuple[int, int]) -> dict[str, Any]:
    share = is_outlier.mean(axis=0)  # (N,)
    border = np.ones(grid, dtype=bool)
    border[1:-1, 1:-1] = False
    total = int(is_outlier.sum())
    top = [int(cell) for cell in np.argsort(-share, kind="stable")[:5] if share[cell] > 0]
    return {
        "grid": list(grid),
        "total": total,
        "per_image": float(is_outlier.sum(axis=1).mean()),
        "images_with": float(is_outlier.any(axis=1).mean()),
        "most_in_one_image": int(is_outlier.sum(axis=1).max()),
        "position_map": np.round(share.reshape(grid), 5).tolist(),
        "top_cells": [{"row": cell // grid[1], "column": cell % grid[1], "share": float(share[cell])} for cell in top],
        "border_share": float(is_outlier[:, border.ravel()].sum() / total) if total else None,
        "border_cells": float(border.mean()),
    }


def _neighbour_record(similarity: NDArray[np.float32], is_outlier: NDArray[np.bool_]) -> dict[str, Any]:
    edges = np.linspace(-1, 1, 81)
    return compare_values(similarity, is_outlier) | {
        "site": "output of the patch embedding, before positions",
        "histogram_edges": np.round(edges, 4).tolist(),
        "histogram_normal": np.histogram(np.clip(similarity[~is_outlier], -1, 1), bins=edges)[0].tolist(),
        "histogram_outlier": np.histogram(np.clip(similarity[is_outlier], -1, 1), bins=edges)[0].tolist(),
    }


def _attention_record(readings: _Readings, is_outlier: NDArray[np.bool_]) -> dict[str, Any] | None:
    if readings.attention is None:
        return None
    on_outliers = (readings.attention * is_outlier).sum(axis=1)
    statistics = readings.attention_statistics | {"mass_on_outliers": on_outliers}
    return {
        "query": "CLS, last block, mean over heads",
        "statistics": {
            name: {"mean": float(value.mean()), "std": float(value.std())} for name, value in statistics.items()
        },
        "mean_map": np.round(readings.attention.mean(axis=0).reshape(readings.grid), 6).tolist(),
    }


def _details(
    model: nn.Module,
    readings: _Readings,
    layer: int,
    is_outlier: NDArray[np.bool_],
    *,
    transform: EvaluationTransform,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """What needs whole tokens, from images whose pixels we hold: direction, channels, rank, registers, examples."""
    norm = final_norm(model)
    num_layers = describe_model(model).num_layers
    tokens: list[Tensor] = []
    registers: list[Tensor] = []
    ranks: list[Tensor] = []
    for batch in readings.pixels.split(batch_size):
        reading = read_many(model, batch, {"residual": sorted({layer, num_layers})})["residual"]
        tokens.append(reading.patches(layer).float().cpu())
        with torch.no_grad():
            final = norm(reading.at(num_layers)).float().cpu()  # (B, T, D)
        registers.append(final[:, reading.num_prefix_tokens - reading.num_register_tokens : reading.num_prefix_tokens])
        if sum(map(len, ranks)) < _RANK_IMAGES:
            ranks.append(effective_rank(final[:, reading.num_prefix_tokens :]))
    rank, patches = torch.cat(ranks), torch.cat(tokens)  # (n,), (n, N, D)
    mask = torch.from_numpy(is_outlier[readings.kept])
    image = torch.arange(len(mask))[:, None].expand(mask.shape)
    groups: dict[str, Any] = {"direction": {}, "channels": {}}
    for name, chosen in (("outlier", mask), ("normal", ~mask)):
        groups["direction"][name] = direction_spread(patches[chosen], image[chosen], seed=seed)
        groups["channels"][name] = channel_outliers(patches[chosen]) if chosen.any() else None
    return {
        "outliers": groups,
        "patches": {
            "effective_rank": {
                "mean": float(rank.mean()),
                "std": float(rank.std(correction=0)),
                "num_images": len(rank),
            }
        },
        "registers": _register_record(readings, layer, torch.cat(registers)),
        "examples": _examples(model, readings, layer, is_outlier, transform),
    }


def _register_record(readings: _Readings, layer: int, registers: Tensor) -> dict[str, Any] | None:
    """Registers of the final norm (n, R, D), and the norms of raw ones."""
    if not readings.register_norms:
        return None
    norms = readings.register_norms[layer]
    unit = F.normalize(registers, dim=-1)  # (n, R, D)
    total = unit.sum(dim=0).square().sum(dim=-1)  # (R,)
    count = len(unit)
    return {
        "count": registers.shape[1],
        "norms": np.median(norms, axis=0).tolist(),
        "norm_ratio": float(np.median(norms) / max(float(np.median(readings.norms[layer])), 1e-12)),
        "cosine": float(register_cosine(registers).mean()) if registers.shape[1] > 1 else None,
        "cosine_across_images": float((total - count).mean() / (count * (count - 1))),
        "cosine_of": "registers after the final norm",
    }


def _examples(
    model: nn.Module,
    readings: _Readings,
    layer: int,
    is_outlier: NDArray[np.bool_],
    transform: EvaluationTransform,
    count: int = 6,
) -> list[dict[str, Any]]:
    """A few images: the picture as the model saw it (JPEG, base64), norm maps and attention maps on the grid."""
    last = describe_model(model).num_layers
    examples = []
    for place in np.unique(np.linspace(0, len(readings.kept) - 1, count).astype(int)).tolist():
        index = readings.kept[place]
        maps: dict[str, Any] = {
            "norms": readings.norms[layer][index],
            "norms_last": readings.norms[last][index] if last in readings.norms else None,
            "attention_cls": None if readings.attention is None else readings.attention[index],
        }
        registers = []
        if readings.register_norms:
            reading = read_many(model, readings.pixels[place : place + 1], {"attention": (-1,)})["attention"]
            rows = reading.registers()[0].float().mean(dim=0)[:, reading.num_prefix_tokens :]  # (R, N)
            registers = [_map(row, readings.grid) for row in rows.cpu().numpy()]
        picture = BytesIO()
        transform.picture(readings.pixels[place]).save(picture, format="JPEG", quality=85)
        examples.append(
            {
                "id": readings.ids[index],
                "grid": list(readings.grid),
                "picture": base64.b64encode(picture.getvalue()).decode("ascii"),
                "num_outliers": int(is_outlier[index].sum()),
                **{name: None if values is None else _map(values, readings.grid) for name, values in maps.items()},
                "attention_registers": registers,
            }
        )
    return examples


def _map(values: NDArray[Any], grid: tuple[int, int]) -> list[list[float]]:
    """(N,) to rows of four significant digits."""
    return [[float(f"{value:.4g}") for value in row] for row in values.reshape(grid).tolist()]


def _model_record(model: nn.Module, grid: tuple[int, int]) -> dict[str, Any]:
    description = describe_model(model)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(description).items()} | {
        "parameters": sum(parameter.numel() for parameter in find_tower(model)[0].parameters()),
        "gmacs": count_macs(model, grid[0] * grid[1]) / 1e9,
    }


def _settings(transform: EvaluationTransform, cutoff: float | str, layers: list[int]) -> dict[str, Any]:
    return {
        "cutoff": cutoff,
        "layers": layers,
        "preprocessing": transform.description,
        "gate": {
            "separation": MIN_SEPARATION,
            "share": [MIN_SHARE, MAX_SHARE],
            "ratio": MIN_RATIO,
            "valley": MAX_VALLEY,
        },
    }


def _warnings(num_images: int, skipped: Sequence[SkippedImage]) -> list[str]:
    found = []
    if num_images < ENOUGH_IMAGES:
        found.append(
            f"only {num_images} images: with fewer than {ENOUGH_IMAGES}, another sample may give other numbers"
        )
    if skipped:
        found.append(f"{len(skipped)} images were left out{_first_reason(skipped)}")
    for text in found:
        logger.warning("%s", text)
    return found


def _versions() -> dict[str, str]:
    import transformers

    return {
        "hf_regvit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _controls(
    model: nn.Module, source: Any, readings: _Readings, *, batch_size: int, seed: int
) -> dict[str, Any] | None:
    if not readings.register_norms:
        return None
    labels = _labels_of(source, [readings.ids[i] for i in readings.kept])
    return register_controls(model, readings.pixels, labels=labels, batch_size=batch_size, seed=seed)


def _labels_of(source: Any, ids: Sequence[str]) -> Tensor | None:
    """Class indices of these images where the source has them."""
    if not isinstance(source, ImageSource) or source.labels is None:
        return None
    by_id = dict(zip(source.ids, source.labels))
    return torch.tensor([by_id[name] for name in ids])


# --- Registers under control ---


REGISTER_CONTROLS = ("mean", "shuffle", "noise", "zero")


@contextmanager
def _registers_replaced(model: nn.Module, values: Mapping[int, Tensor]) -> Iterator[None]:
    """Overwrite the registers in the outputs of blocks for the time of the `with` block; layer: (B, R, D)."""
    tower, name = find_tower(model)
    description = describe_model(tower)
    start, count = description.num_prefix_tokens - description.num_register_tokens, description.num_register_tokens

    def replace(layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            tokens = output[0] if isinstance(output, tuple) else output  # (B, T, D)
            tokens = torch.cat((tokens[:, :start], values[layer].to(tokens), tokens[:, start + count :]), dim=1)
            return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

        return hook

    blocks: Any = tower.get_submodule(FAMILIES[name].blocks)
    with ExitStack() as stack:
        for layer in values:
            stack.callback(blocks[layer - 1].register_forward_hook(replace(layer)).remove)
        yield


def register_controls(
    model: nn.Module,
    pixel_values: Tensor,
    *,
    labels: Tensor | None = None,
    kinds: Sequence[str] = REGISTER_CONTROLS,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """What a model loses when its registers are replaced between blocks (outputs of blocks 1 to L - 1).

    "mean": by their average over these images; "shuffle": by those of another image; "noise": by Gaussian noise of
    the same mean and variance per channel; "zero". Zero alone overstates the role of registers, because it takes the
    model to inputs it never saw; mean and shuffle tell whether their image-specific content matters.

    Args:
        model: A model with registers; left as it was.
        pixel_values: (n, 3, H, W), at least two images; their order decides who is shuffled with whom.
        labels: (n,) classes; then the accuracy of 5 nearest neighbours on CLS, each half judged by the other, is
            measured too. Only where at least 20 images have a class that both halves hold.
        kinds: Which controls.
        batch_size: Images of one forward pass.
        seed: Of noise and shuffling.

    Returns:
        `num_images`; for `clean` and each kind `knn` (None without labels), and for each kind `cls_cosine` and
        `patch_cosine`, the mean cosine with the undisturbed tokens after the final norm.

    Source: arXiv 2604.14433.
    """
    description = describe_model(model)
    if not description.num_register_tokens:
        raise ValueError(f"'{description.name}' has no registers to replace.")
    if len(pixel_values) < 2:
        raise ValueError(f"Register controls need two images or more, got {len(pixel_values)}.")
    if unknown := sorted(set(kinds) - set(REGISTER_CONTROLS)):
        raise ValueError(f"kinds={unknown} are unknown, expected some of {REGISTER_CONTROLS}.")
    inner = range(1, description.num_layers)
    clean: dict[int, list[Tensor]] = {layer: [] for layer in inner}
    clean_tokens: list[Tensor] = []
    for batch in pixel_values.split(batch_size):
        reading = read_many(model, batch, {"residual": [*inner, description.num_layers]})["residual"]
        for layer in inner:
            clean[layer].append(reading.registers(layer).cpu())
        clean_tokens.append(_final_tokens(model, reading))
    recorded = {layer: torch.cat(values) for layer, values in clean.items()}  # (n, R, D)
    undisturbed = torch.cat(clean_tokens)  # (n, T - R, D)
    result: dict[str, Any] = {
        "num_images": len(pixel_values),
        "blocks": [1, description.num_layers - 1],
        "clean": {"knn": _knn(undisturbed, labels) if description.has_cls else None},
    }
    prefix = description.num_prefix_tokens - description.num_register_tokens
    for kind in kinds:
        replacement = {layer: _replacement(kind, values, layer, seed) for layer, values in recorded.items()}
        parts = []
        for start in range(0, len(pixel_values), batch_size):
            part = slice(start, start + batch_size)
            with _registers_replaced(model, {layer: values[part] for layer, values in replacement.items()}):
                reading = read_many(model, pixel_values[part], {"residual": (-1,)})["residual"]
            parts.append(_final_tokens(model, reading))
        cosine = F.cosine_similarity(torch.cat(parts), undisturbed, dim=-1)  # (n, T - R)
        result[kind] = {
            "cls_cosine": cosine[:, 0].mean().item() if description.has_cls else None,
            "patch_cosine": cosine[:, prefix:].mean().item(),
            "knn": _knn(torch.cat(parts), labels) if description.has_cls else None,
        }
    return result


def _final_tokens(model: nn.Module, reading: TokenReading) -> Tensor:
    """Tokens after the last block and the final norm without the registers, (B, T - R, D)."""
    with torch.no_grad():
        tokens = final_norm(model)(reading.at(-1)).float().cpu()
    first = reading.num_prefix_tokens - reading.num_register_tokens
    return torch.cat((tokens[:, :first], tokens[:, reading.num_prefix_tokens :]), dim=1)


def _replacement(kind: str, registers: Tensor, layer: int, seed: int) -> Tensor:
    """What to put in place of the registers (n, R, D) that one layer had."""
    if kind == "zero":
        return torch.zeros_like(registers)
    mean = registers.float().mean(dim=0, keepdim=True)
    if kind == "mean":
        return mean.to(registers.dtype).expand_as(registers)
    if kind == "shuffle":  # the same partner in every layer, never oneself
        order = torch.randperm(len(registers), generator=torch.Generator().manual_seed(seed))
        partner = torch.empty_like(order)
        partner[order] = order.roll(1)
        return registers[partner]
    generator = torch.Generator().manual_seed(seed * 1000 + layer)
    noise = torch.randn(registers.shape, generator=generator)
    return (mean + noise * registers.float().std(dim=0, keepdim=True, correction=0)).to(registers.dtype)


def _knn(tokens: Tensor, labels: Tensor | None, *, k: int = 5, fewest: int = 20) -> float | None:
    """Accuracy of k nearest neighbours on CLS (first token): even images judged by odd ones and the reverse."""
    if labels is None:
        return None
    shared = np.intersect1d(labels[0::2].numpy(), labels[1::2].numpy())
    if np.isin(labels.numpy(), shared).sum() < fewest:  # a class that one half lacks cannot be found by it
        return None
    halves = [(tokens[start::2, 0], labels[start::2]) for start in (0, 1)]
    accuracies = [
        knn_accuracy(*halves[bank], *halves[1 - bank], k=(k,))[k] * len(halves[1 - bank][1]) for bank in (0, 1)
    ]
    return sum(accuracies) / len(labels)


# --- During training ---


def artifact_snapshot(model: nn.Module, pixel_values: Tensor) -> dict[str, float]:
    """The diagnosis in numbers for a training log, from one forward pass over one batch.

    Args:
        model: As for `diagnose`; its training mode is restored.
        pixel_values: (B, 3, H, W); 32 images of 196 patches are enough to see a share of 0.2 %.

    Returns:
        `outlier_share`, `separation` and `bimodal` (0 or 1) of the reported layer, that `layer`, its `cutoff`,
        `norm_median` and `norm_max`; `norm_ratio` where there are outliers; `effective_rank` of the patches after the
        final norm; with registers `register_norm` (reported layer) and, with two or more, `register_cosine` (after
        the final norm); with CLS `attention_entropy` (relative to uniform) and, with registers, `attention_registers`.
    """
    description = describe_model(model)
    layers = list(range(1, description.num_layers + 1))
    last: dict[str, Tensor] = {}

    def keep_norms(tokens: Tensor, layer: int) -> Tensor:
        if layer == description.num_layers:
            last["tokens"] = tokens[:_RANK_IMAGES]
        return _token_norms(tokens, layer)

    sites: dict[Site, Layers] = {"residual": layers}
    if description.has_cls:
        sites["attention"] = (-1,)
    reading = read_many(model, pixel_values, sites, reduce={"residual": keep_norms, "attention": _cls_row})
    residual = reading["residual"]
    cutoffs = {layer: find_cutoff(residual.patches(layer).numpy()) for layer in layers}
    layer = reported_layer(cutoffs)
    found, norms = cutoffs[layer], residual.patches(layer)
    with torch.no_grad():
        final = final_norm(model)(last["tokens"]).float().cpu()
    values = {
        "outlier_share": found.share,
        "separation": found.separation,
        "bimodal": float(found.bimodal),
        "layer": float(layer),
        "cutoff": found.cutoff,
        "norm_median": float(np.median(norms)),
        "norm_max": norms.max().item(),
        "effective_rank": effective_rank(final[:, residual.num_prefix_tokens :]).mean().item(),
    }
    if found.ratio is not None:
        values["norm_ratio"] = found.ratio
    count, prefix = residual.num_register_tokens, residual.num_prefix_tokens
    if count:
        values["register_norm"] = residual.registers(layer).flatten().quantile(0.5).item()
    if count > 1:
        values["register_cosine"] = register_cosine(final[:, prefix - count : prefix]).mean().item()
    if description.has_cls:
        statistics = attention_statistics(
            reading["attention"].values[0], num_prefix_tokens=prefix, num_register_tokens=count
        )
        values["attention_entropy"] = statistics["entropy_share"].mean().item()
        if count:
            values["attention_registers"] = statistics["mass_on_registers"].mean().item()
    return values


# --- Several checkpoints ---


def count_macs(model: nn.Module, num_patches: int) -> int:
    """Multiply-adds of one image: linear layers of the blocks, the two products of attention, patch embedding.

    For an MLP of ratio 4 this is L (12 D² T + 2 D T²) + N D 3 p².
    """
    tower, name = find_tower(model)
    description = describe_model(tower)
    tokens = description.num_prefix_tokens + num_patches
    blocks: Any = tower.get_submodule(FAMILIES[name].blocks)
    weights = sum(module.weight.numel() for module in blocks.modules() if isinstance(module, nn.Linear))
    attention = 2 * description.num_layers * description.hidden_size * tokens**2
    pixels = 3 * description.patch_size[0] * description.patch_size[1]
    return weights * tokens + attention + num_patches * description.hidden_size * pixels


@dataclass(frozen=True)
class ComparisonReport:
    """Several checkpoints on the same images: one row each, and their full reports."""

    rows: list[dict[str, Any]]
    reports: dict[str, ArtifactReport]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Rows and settings; the reports are saved on their own."""
        return {"rows": self.rows, "settings": self.settings}

    def folders(self) -> dict[str, ArtifactReport]:
        """A folder name for each report: number and last part of the checkpoint's name."""
        return {f"{i}-{Path(name).name}": report for i, (name, report) in enumerate(self.reports.items())}

    def save(self, folder: str | Path) -> Path:
        """Write `comparison.json`, and each `report.json` into a folder of its own; returns the former's path."""
        for name, report in self.folders().items():
            report.save(Path(folder) / name)
        path = Path(folder) / "comparison.json"
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return path

    def summary(self) -> str:
        """The table, and each verdict."""
        return "\n".join([self.table(), *(f"{name}: {report.verdict}" for name, report in self.reports.items())])

    def table(self) -> str:
        """The rows as a Markdown table."""
        names = list(self.rows[0])
        lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
        for row in self.rows:
            lines.append(f"| {' | '.join(_cell(row[name]) for name in names)} |")
        return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def compare_checkpoints(
    names: Sequence[str | Path],
    images: Any,
    *,
    throughput_rounds: int = 5,
    device: str | torch.device | None = None,
    **settings: Any,
) -> ComparisonReport:
    """Diagnose several checkpoints, e.g. of 0, 1, 2, 4, 8 registers, and tabulate them with cost and speed.

    Args:
        names: What `load_model` takes. All of them are in memory at once, since speed is measured in turns.
        images: As for `diagnose`.
        throughput_rounds: Passes of 8 images per model, taken in turns after one to warm up; the median counts.
        device: Where to compute; default the CPU.
        settings: Arguments of `diagnose`.
    """
    if len({str(name) for name in names}) < len(names) or len(names) < 2:
        raise ValueError(f"names={[str(name) for name in names]}: give two or more different checkpoints.")
    loaded = {str(name): load_model(name, device=device) for name in names}
    reports = {
        name: diagnose(model, images, processor=processor, **settings) for name, (model, processor) in loaded.items()
    }
    speeds: dict[str, list[float]] = {name: [] for name in loaded}
    for _ in range(throughput_rounds + 1):
        for name, (model, _) in loaded.items():
            height, width = describe_model(model).image_size
            start = time.perf_counter()
            read_many(model, torch.zeros(8, 3, height, width), {"patch_embedding": (0,)})
            speeds[name].append(8 / (time.perf_counter() - start))
    baseline = reports[str(names[0])].model["gmacs"]
    rows = []
    for name, report in reports.items():
        attention = report.attention["statistics"] if report.attention else {}
        rows.append(
            {
                "model": name,
                "registers": report.model["num_register_tokens"],
                "bimodal": report.bimodal,
                "layer": report.layer,
                "outlier_share": report.outlier_share,
                "norm_ratio": report.norm_ratio,
                "separation": report.separation,
                "cls_to_registers": attention.get("mass_on_registers", {}).get("mean"),
                "attention_entropy": attention.get("entropy_share", {}).get("mean"),
                "register_cosine": report.registers["cosine"] if report.registers else None,
                "effective_rank": report.patches["effective_rank"]["mean"],
                "parameters": report.model["parameters"],
                "gmacs": report.model["gmacs"],
                "gmacs_delta": report.model["gmacs"] / baseline - 1,
                "images_per_second": float(np.median(speeds[name][1:])),
            }
        )
    threads = {"threads": torch.get_num_threads(), "throughput_batch": 8, "throughput_rounds": throughput_rounds}
    return ComparisonReport(rows=rows, reports=reports, settings=next(iter(reports.values())).settings | threads)
