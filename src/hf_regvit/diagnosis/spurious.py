"""Tokens that do not describe their place, found without norms: fixed patterns that return in every image.

Some models have artifact tokens of ordinary norm. Such a token is nearly the same vector in unrelated images. It is
found by its cosine to the tokens of other images, with the gate that `find_cutoff` applies to norms. A control at the
input keeps identical sky or black borders from counting as artifacts.

Shape letters: n images, N patches, T tokens, D width.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..models.results import Record
from ..models.tokens import TokenReader
from .outliers import MAX_SHARE, MIN_RATIO, MIN_SEPARATION, Cutoff, find_cutoff
from .readings import normalized
from .sinks import HIJACKER_FACTOR

NUM_OTHERS = 8  # other images that each token is compared with
SAME_INPUT = 0.95  # score at the input from which a patch repeats in the images themselves
PROXY_IMAGES, PROXY_COSINE = 32, 0.95


@dataclass(frozen=True, eq=False)
class FixedPatterns:
    """Tokens that repeat in other images.

    Attributes:
        flagged: (n, N) mask of the tokens that repeat although their patches do not.
        repeated_input: (n, N) mask of the tokens that the control at the input removed.
        score: (n, N) median over other images of the largest cosine to their tokens.
        input_score: (n, N) the same for the patch embeddings.
        cutoff: Result of the gate on 1 / (1 - score).
        judged: False if more than 15 % of the tokens would be flagged; then none is.
    """

    flagged: NDArray[np.bool_]
    repeated_input: NDArray[np.bool_]
    score: NDArray[np.float32]
    input_score: NDArray[np.float32]
    cutoff: Cutoff
    judged: bool


def find_fixed_patterns(tokens: Tensor, embeddings: Tensor, *, seed: int = 0) -> FixedPatterns:
    """Find tokens that are nearly the same in unrelated images.

    Args:
        tokens: (n, N, D) patch tokens after the final norm.
        embeddings: (n, N, D) patch embeddings of the same images, before positions are added.
        seed: Random seed of the choice of the other images.

    Source: our own; it replaces the thresholds of arXiv 2605.19622, mean + 0.5 standard deviations, which flag 5 to
    38 % of the tokens of every model, random ones most. Slow twin: tests/diagnosis/test_spurious.py.
    """
    score, input_score = pattern_scores(tokens, seed=seed), pattern_scores(embeddings, seed=seed)
    found, at_input = find_cutoff(_closeness(score)), find_cutoff(_closeness(input_score))
    modes = found.modes
    judged = modes is None or not (
        modes.separation > MIN_SEPARATION and modes.ratio >= MIN_RATIO and modes.high_share > MAX_SHARE
    )
    high = (_closeness(score) > found.cutoff) & found.bimodal
    same = (input_score >= SAME_INPUT) | ((_closeness(input_score) > at_input.cutoff) & at_input.bimodal)
    return FixedPatterns(high & ~same, high & same, score, input_score, found, judged)


def pattern_scores(tokens: Tensor, *, seed: int = 0) -> NDArray[np.float32]:
    """Return for each token (n, N, D) the median over 8 other images of its largest cosine to their tokens, (n, N).

    Tokens are centered by the mean over all of them.
    """
    mean = tokens.mean(dim=(0, 1), dtype=torch.float32)
    unit = torch.stack([F.normalize(image.float() - mean, dim=-1).to(tokens.dtype) for image in tokens])
    rng, count = np.random.default_rng(seed), min(NUM_OTHERS, len(tokens) - 1)
    scores = []
    for i, image in enumerate(unit):
        drawn = rng.choice(len(unit) - 1, count, replace=False)
        cosines = unit[drawn + (drawn >= i)].float() @ image.float().T  # (8, N of the other, N)
        scores.append(cosines.amax(dim=1).quantile(0.5, dim=0))
    return torch.stack(scores).numpy()


def _closeness(score: NDArray[np.float32]) -> NDArray[np.float64]:
    """Convert cosines to positive numbers that grow without limit as a cosine approaches 1, as norms do."""
    return 1 / (1 - np.minimum(score.astype(np.float64), 1 - 1e-6))


def spurious_record(
    found: FixedPatterns, outliers: NDArray[np.bool_], norms: NDArray[np.float32], received: Tensor | None
) -> Record:
    """Describe the fixed patterns for a report.

    Args:
        found: Result of `find_fixed_patterns`.
        outliers: (n, N) mask of the outliers by norm; all False without a distinct population.
        norms: (n, N) norms at the reported layer.
        received: (n, N) attention received in the last blocks, relative to uniform; None if it was not read.
    """
    flagged, judged = found.flagged, found.judged
    record: Record = {
        "share": float(flagged.mean()),
        "judged": judged,
        "reason": found.cutoff.reason
        if judged
        else "more than 15 % of the tokens repeat in other images, so no decision is possible",
        "separation": found.cutoff.separation,
        "cosine_cutoff": 1 - 1 / found.cutoff.cutoff if found.cutoff.bimodal else None,
        "flagged": int(flagged.sum()),
        "repeated_input": int(found.repeated_input.sum()),
        "outliers": int(outliers.sum()),
        "both": int((flagged & outliers).sum()),
        "per_image": float((flagged | outliers).sum(axis=1).mean()),
        "norm_ratio": float(np.median(norms[flagged]) / np.median(norms[~flagged])) if flagged.any() else None,
        "score": _medians(found.score, flagged),
        "input_score": _medians(found.input_score, flagged),
        "num_images": len(flagged),
    }
    if received is not None:
        hijackers = received.numpy() >= HIJACKER_FACTOR
        record["hijackers"] = {
            "factor": HIJACKER_FACTOR,
            "share": float(hijackers.mean()),
            "largest": float(received.max()),
            "outliers": int((hijackers & outliers).sum()),
        }
    return record


def _medians(values: NDArray[np.float32], flagged: NDArray[np.bool_]) -> Record:
    parts = {"flagged": values[flagged], "others": values[~flagged]}
    return {name: float(np.median(part)) if part.size else None for name, part in parts.items()}


def global_proxy_share(reader: TokenReader, pixels: Tensor, *, batch_size: int) -> float | None:
    """Return the share of tokens that reappear in the other half of an image made of two halves (experimental).

    Each image is the left half of one image and the right half of the next. A token whose cosine to a token of the
    other half is at least 0.95 may describe the whole image. Random models have such tokens too, so the number gives
    no verdict.

    Args:
        reader: Reader of the model.
        pixels: (n, 3, H, W); at most 32 images are used.
        batch_size: Number of images per forward pass.

    Returns:
        Share in [0, 1]; None if the grid has a single column.

    Source: after the composites of arXiv 2605.19622.
    """
    pixels, tokens, columns = pixels[:PROXY_IMAGES], [], 0
    middle = pixels.shape[3] // reader.description.patch_size[1] // 2 * reader.description.patch_size[1]
    if not middle:
        return None
    mixed = torch.cat([pixels[..., :middle], pixels.roll(-1, dims=0)[..., middle:]], dim=3)
    for batch in mixed.split(batch_size):
        reading = reader.read(batch)
        columns = reading.grid[1]
        tokens.append(normalized(reader, reading.at())[:, reading.num_prefix_tokens :])
    joined = torch.cat(tokens)
    unit = F.normalize(joined - joined.mean(dim=(0, 1)), dim=-1).unflatten(1, (-1, columns))  # (n, rows, columns, D)
    left, right = (half.flatten(1, 2) for half in unit.split((columns // 2, columns - columns // 2), dim=2))
    cosines = left @ right.mT  # (n, left, right)
    found = torch.cat([cosines.amax(dim=2), cosines.amax(dim=1)], dim=1) >= PROXY_COSINE
    return float(found.float().mean())
