"""Position in patch tokens: how much of it a linear map can read, and its removal in closed form.

Only moments of the tokens are kept, one matrix per layer and half of the images, so the memory does not grow with the
number of images. Images with even index are for the fit, those with odd index for the evaluation.

Shape letters: n images, B images of a batch, N patches in a grid of (rows, columns), D width.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.preparation import prepare_images
from ..models.loading import open_model
from ..models.processing import ImageProcessor
from ..models.results import Record
from ..models.tokens import TokenReader
from .readings import check_grid, normalized
from .sinks import rounded

RIDGE = 1e-3  # on standardized features
_FLOOR = 1e-6  # smallest variance of a direction relative to the mean variance


def cell_positions(grid: tuple[int, int]) -> Tensor:
    """Return (row, column) / (grid - 1) of each cell, (N, 2) float64."""
    rows, columns = (torch.linspace(0, 1, size, dtype=torch.float64) if size > 1 else torch.zeros(1) for size in grid)
    return torch.stack(torch.meshgrid(rows.double(), columns.double(), indexing="ij"), dim=-1).flatten(0, 1)


class PositionMoments:
    """Moments of patch tokens, their positions, and positions permuted within each image (the control).

    Attributes:
        moments: For each layer, A'A of the even and of the odd images, (2, D + 5, D + 5) float64, where A has one row
            (token, 1, position, permuted position) per token.

    Args:
        grid: (rows, columns) of the patches.
        num_images: Number of images n.
        seed: Random seed of the permutations.
    """

    def __init__(self, grid: tuple[int, int], num_images: int, seed: int = 0) -> None:
        position = cell_positions(grid)
        rng = np.random.default_rng(seed)
        order = torch.from_numpy(np.stack([rng.permutation(len(position)) for _ in range(num_images)]))  # (n, N)
        one = torch.ones(num_images, len(position), 1, dtype=torch.float64)
        self.targets = torch.cat([one, position.expand(num_images, -1, 2), position[order]], dim=2)  # (n, N, 5)
        self.moments: dict[int | str, Tensor] = {}

    def add(self, tokens: Tensor, layer: int | str, start: int) -> None:
        """Add tokens (B, N, D) of a layer, of the images from index `start` on."""
        rows = torch.cat([tokens.detach().cpu().double(), self.targets[start : start + len(tokens)]], dim=2)
        size = rows.shape[2]
        total = self.moments.setdefault(layer, torch.zeros(2, size, size, dtype=torch.float64))
        for half in (0, 1):
            part = rows[(half - start) % 2 :: 2].flatten(0, 1)
            total[half] += part.T @ part


def ridge_r2(moments: Tensor) -> Tensor:
    """Return the R2 of ridge regressions from tokens to each target, (4,): fitted on even, evaluated on odd images.

    Slow twin: tests/diagnosis/test_position.py.
    """
    fit, other = moments
    width = len(fit) - 5
    mean, covariance = _centered(fit)
    scale = covariance.diagonal()[:width].clamp(min=1e-24).sqrt()
    correlation = covariance[:width, :width] / scale[:, None] / scale
    ridge = correlation + RIDGE * torch.eye(width, dtype=fit.dtype)
    weight = torch.linalg.solve(ridge, covariance[:width, width + 1 :] / scale[:, None]) / scale[:, None]  # (D, 4)
    offset = mean[:width] @ weight - mean[width + 1 :]
    residual = torch.cat([-weight, offset[None], torch.eye(4, dtype=fit.dtype)])  # z - x W - b = A @ residual
    errors = (residual * (other @ residual)).sum(dim=0)
    targets = _centered(other)[1].diagonal()[width + 1 :] * other[width, width]
    return 1 - errors / targets.clamp(min=1e-24)


def _centered(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of the columns of A; the column of ones is the fifth from the end."""
    mean = moments[-5] / moments[-5, -5]
    return mean, moments / moments[-5, -5] - torch.outer(mean, mean)


@dataclass(frozen=True, eq=False)
class PositionRemoval:
    """Affine map that makes the position of a patch unreadable for a linear map; it changes two directions only.

    Attributes:
        mean: (D,) mean of the tokens.
        projection: (D, D) oblique projection E of rank 2; tokens x become x - E (x - mean).
        grid: (rows, columns) of the patches for which it was fitted.

    Source: least-squares concept erasure, arXiv 2306.03819.
    """

    mean: Tensor
    projection: Tensor
    grid: tuple[int, int]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return tokens (..., D) without position."""
        mean, projection = self.mean.to(tokens), self.projection.to(tokens)
        return tokens - (tokens - mean) @ projection.T


def remove_position(
    model: TokenReader | nn.Module | str | Path,
    images: object,
    *,
    max_images: int = 500,
    batch_size: int = 32,
    seed: int = 0,
    processor: ImageProcessor | None = None,
    device: str | torch.device = "auto",
) -> PositionRemoval:
    """Fit a map that removes what a linear map can read of the position from the patch tokens after the final norm.

    It suits matching and clustering, where the position is a nuisance. With scenes of a fixed layout it removes useful
    information, so compare before you use it. A diagnosis reports how much the position is and what its removal costs.

    Args:
        model: Model, its name, or a reader; see `open_model`.
        images: Images as for `diagnose`; all on one grid.
        max_images: Maximum number of images, drawn at random; the first ones of a stream.
        batch_size: Number of images per forward pass.
        seed: Random seed of the draw.
        processor: Image processor; default the model's own.
        device: Device to compute on; see `open_model`.

    Example:
    ```python
    >>> removal = remove_position("facebook/dinov2-small", "photos")
    >>> maps = removal(torch.from_numpy(patch_maps("facebook/dinov2-small", ["a.jpg"])))
    ```
    """
    reader = open_model(model, device=device, processor=processor)
    prepared = prepare_images(images, reader.transform, batch_size=batch_size, max_images=max_images, seed=seed)
    total, grid = torch.zeros(()), (0, 0)
    for ids, pixels in prepared:
        reading = reader.read(pixels)
        grid = grid if total.ndim else reading.grid
        check_grid(ids[0], reading.grid, grid)
        found = PositionMoments(grid, len(ids))
        found.add(normalized(reader, reading.at())[:, reading.num_prefix_tokens :], "final", 0)
        total = total + found.moments["final"].sum(dim=0)
    return fit_position_removal(total[None], grid)


def fit_position_removal(moments: Tensor, grid: tuple[int, int]) -> PositionRemoval:
    """Fit the removal to the first of the moments of one layer, those of the even images.

    On the images of the fit, the R2 of a linear map is exactly 0 afterwards, and no other map of this kind changes the
    tokens less in the metric of their covariance.
    """
    mean, covariance = _centered(moments[0])
    width = len(mean) - 5
    sigma, cross = covariance[:width, :width], covariance[:width, width + 1 : width + 3]
    values, vectors = torch.linalg.eigh(sigma)
    root = values.clamp(min=_FLOOR * float(values.mean())).sqrt()
    whiten, color = (vectors / root) @ vectors.T, (vectors * root) @ vectors.T
    left, strength, _ = torch.linalg.svd(whiten @ cross, full_matrices=False)  # (D, 2)
    left = left[:, strength > 1e-9]  # a grid of one row or column has one direction
    return PositionRemoval(mean[:width], color @ left @ left.T @ whiten, grid)


def without_position(moments: Tensor, removal: PositionRemoval) -> Tensor:
    """Return the moments (2, D + 5, D + 5) of the tokens after the removal."""
    width = len(removal.mean)
    change = torch.eye(moments.shape[1], dtype=moments.dtype)
    change[:width, :width] -= removal.projection.T
    change[width, :width] = removal.projection @ removal.mean
    return change.T @ moments @ change


def cell_accuracy(tokens: Tensor) -> float:
    """Return how often a ridge regression names the cell of a patch: fitted on even, evaluated on odd images.

    It also sees a code without order, such as random position embeddings, which has an R2 of 0.

    Args:
        tokens: (n, N, D) patch tokens of at least two images.
    """
    fit, other = (half.double() for half in (tokens[::2], tokens[1::2]))
    mean, cells = fit.mean(dim=(0, 1)), fit.shape[1]
    centered = (fit - mean).flatten(0, 1)
    scale = centered.square().mean(dim=0).clamp(min=1e-24).sqrt()
    ridge = (centered / scale).T @ (centered / scale) / len(centered)
    ridge += RIDGE * torch.eye(len(scale), dtype=torch.float64)
    weight = torch.linalg.solve(ridge, ((fit.mean(dim=0) - mean) / scale).T / cells)  # (D, N)
    chosen = (((other - mean) / scale) @ weight).argmax(dim=-1)  # (odd images, N)
    return float((chosen == torch.arange(cells)).double().mean())


def position_record(found: PositionMoments, tokens: Tensor, grid: tuple[int, int]) -> Record:
    """Describe the position in the tokens for a report; the price of its removal is that on the odd images.

    Args:
        found: Moments of layers 0 to L and of "final", the tokens after the final norm.
        tokens: (n, N, D) patch tokens after the final norm.
        grid: (rows, columns) of the patches.
    """
    r2 = {layer: ridge_r2(moments) for layer, moments in found.moments.items()}
    removal = fit_position_removal(found.moments["final"], grid)
    left = ridge_r2(without_position(found.moments["final"], removal))
    other = tokens[1::2].float()
    kept = removal(other)
    variance = [float((x - x.mean(dim=(0, 1))).square().mean()) for x in (kept, other)]
    layers = [layer for layer in r2 if layer != "final"]
    return {
        "layers": layers,
        "r2": [rounded(r2[layer][:2].mean()) for layer in layers],
        "r2_permuted": [rounded(r2[layer][2:].mean()) for layer in layers],
        "final": rounded(r2["final"][:2].mean()),
        "final_permuted": rounded(r2["final"][2:].mean()),
        "cell_accuracy": cell_accuracy(tokens),
        "chance": 1 / tokens.shape[1],
        "removed": {
            "r2": rounded(left[:2].mean()),
            "cell_accuracy": cell_accuracy(removal(tokens.float())),
            "cosine": float(F.cosine_similarity(kept, other, dim=-1).mean()),
            "variance": variance[0] / max(variance[1], 1e-24),
        },
        "num_images": len(tokens),
    }
