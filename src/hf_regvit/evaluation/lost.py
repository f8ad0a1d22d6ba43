"""Object discovery without labels: LOST, an attention baseline, and CorLoc.

LOST assumes that the patch with the fewest similar patches belongs to an object that is small compared with its
background. It collects patches similar to this seed, and predicts the box of the connected component around the seed
(arXiv 2109.14279). Vanilla settings are those of the paper. The others exist because vanilla settings fail with
high-norm tokens and with features that all point in one direction (arXiv 2309.16588, whose bias was not published).

Shape letters: N patches of a grid of (rows, columns), D width, n and m boxes. A box is (x1, y1, x2, y2), the last two
exclusive, in pixels of the stored image unless stated otherwise.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ..data.preparation import prepare_images
from ..models.families import ModelDescription
from ..models.loading import open_model
from ..models.processing import EvaluationTransform
from ..models.results import Record
from ..models.tokens import Reduction, Site, TokenReader, TokenReading, resolve_layers
from .boxes import Box
from .dense_features import FeatureSettings, pooled_grid, read_sites_of_views, settings_for

logger = logging.getLogger(__name__)

Feature = Literal["q", "k", "v", "out"]
Center = Literal["none", "image", "row"]

# Above this share, many patches have the smallest degree, so it says little about objects.
DEGENERATE_SHARE = 0.95
_ROWS_AT_ONCE = 1024  # of the N x N affinity; an image of 12 megapixels has 47,000 patches


@dataclass(frozen=True)
class LostSettings:
    """Settings of LOST. The defaults are vanilla LOST.

    Args:
        feature: Queries, keys or values of the attention (heads concatenated), or `out`, the raw output of the block.
        layer: Block, 1 to L, or negative from the end.
        center: Centering. `image` subtracts the mean patch of the image from every feature. `row` subtracts from every
            row of the affinity its mean, diagonal included; the matrix is then no longer symmetric, and row i holds
            the similarities of i to the others.
        l2norm: Whether to use cosines instead of dot products, after centering by image.
        bias: Number added to every entry of the affinity, in its units. Use a negative one if nearly all entries are
            positive.
        k: Number of patches of lowest degree that can join the seed; N if the image has fewer.
    """

    feature: Feature = "k"
    layer: int = -1
    center: Center = "none"
    l2norm: bool = False
    bias: float = 0.0
    k: int = 100

    def __post_init__(self) -> None:
        for name, known in (("feature", get_args(Feature)), ("center", get_args(Center))):
            if getattr(self, name) not in known:
                raise ValueError(f"Unknown {name}={getattr(self, name)!r}. Use one of {', '.join(known)}.")
        if self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1, because it includes the seed.")
        if not np.isfinite(self.bias):
            raise ValueError(f"bias={self.bias} must be a finite number.")

    def __str__(self) -> str:
        return (
            f"feature={self.feature} layer={self.layer} center={self.center} l2norm={self.l2norm} "
            f"bias={self.bias:g} k={self.k}"
        )


@dataclass(frozen=True, eq=False)
class LostResult:
    """Result of LOST for one image, with all stages. Grids are (rows, columns).

    Args:
        seed: Index of the patch of lowest degree, row by row; the first one in a tie.
        degrees: int64 grid: number of other patches to which a patch has a positive affinity.
        seed_similarity: float32 grid: the seed's row of the affinity.
        expansion: (s,) int64, ascending: patches of low degree with a positive similarity to the seed.
        scores: float32 grid: sum of the affinities of a patch to all of `expansion`.
        mask: bool grid: the component of `scores` above 0 that contains the seed, connected by edges; only the seed if
            its own score is not above 0.
        cells: Box around `mask` in patches, (x1, y1, x2, y2), the last two exclusive; not clipped.
        positive_share: Share of positive off-diagonal entries, in [0, 1].
        tied_seeds: Number of patches that have the seed's degree, including the seed.
    """

    seed: int
    degrees: Tensor
    seed_similarity: Tensor
    expansion: Tensor
    scores: Tensor
    mask: Tensor
    cells: tuple[int, int, int, int]
    positive_share: float
    tied_seeds: int

    @property
    def degenerate(self) -> bool:
        """True for an arbitrary seed: over 95 % of the affinities are positive, or over half of the patches tie."""
        return self.positive_share > DEGENERATE_SHARE or 2 * self.tied_seeds > self.degrees.numel()

    @property
    def seed_cells(self) -> tuple[int, int, int, int]:
        """Box before expansion, in patches: the component around the seed that is similar to the seed itself."""
        return _bounds(_component_of(self.seed_similarity > 0, self.seed))

    def box(self, patch_size: tuple[int, int], image_size: tuple[int, int]) -> Box:
        """Return the box in pixels, clipped to the image without padding.

        Args:
            patch_size: (height, width) of a patch in pixels.
            image_size: (height, width) in pixels, without the padding.
        """
        return cells_to_pixels(self.cells, patch_size=patch_size, image_size=image_size)


@dataclass(frozen=True)
class AttentionSettings:
    """Settings of the baseline: a box around the patches to which CLS attends.

    Args:
        head: Index of the head from 0, or `mean` of all heads.
        layer: Block, 1 to L, or negative from the end.
        mass: Share of the attention to keep.
    """

    head: int | Literal["mean"] = "mean"
    layer: int = -1
    mass: float = 0.6

    def __str__(self) -> str:
        return f"CLS attention head={self.head} layer={self.layer} mass={self.mass:g}"


Method = LostSettings | AttentionSettings


# --- LOST on features


def lost_box(features: Tensor, grid: tuple[int, int], settings: LostSettings = LostSettings()) -> LostResult:
    """Find one object in an image; see `lost_boxes`."""
    return lost_boxes(features, grid, [settings])[0]


def lost_boxes(features: Tensor, grid: tuple[int, int], settings: Sequence[LostSettings]) -> list[LostResult]:
    """Find one object in an image with each of several settings; those that differ only in k share the degrees.

    Patches of equal degree are ranked by their position, row by row, so the result does not depend on the sorting
    algorithm. At most 1,024 rows of the affinity are in memory at once.

    Args:
        features: Patch features without CLS and registers, row-major, (N, D).
        grid: (rows, columns) with rows * columns = N.
        settings: Settings to run; their `feature` and `layer` are ignored.

    Returns:
        One result for each of `settings`, in their order.

    Raises:
        ValueError: The features do not match the grid or are not finite.

    Source: arXiv 2109.14279, algorithm 1; valeoai/LOST `object_discovery.py`. Twin: tests/evaluation/test_lost.py.
    """
    if features.ndim != 2 or len(features) != grid[0] * grid[1] or min(grid) < 1:
        raise ValueError(
            f"features have shape {tuple(features.shape)}, expected (patches, width) for a {grid[0]} x {grid[1]} grid."
        )
    if not torch.isfinite(features).all():
        raise ValueError("features contain NaN or infinity, but must be finite. Check the model and its precision.")
    # Settings with equal products of features share them; of those, the ones with an equal affinity share degrees.
    groups: dict[tuple[bool, bool], list[LostSettings]] = {}
    for one in settings:
        groups.setdefault((one.center == "image", one.l2norm), []).append(one)
    results: dict[LostSettings, LostResult] = {}
    for same in groups.values():
        prepared = _prepare(features, same[0])
        variants = {(one.center == "row", one.bias): one for one in same}
        degrees = dict(zip(variants, _degrees(prepared, list(variants.values()))))
        results |= {one: _discover(prepared, grid, degrees[one.center == "row", one.bias], one) for one in same}
    return [results[one] for one in settings]


def _prepare(features: Tensor, settings: LostSettings) -> Tensor:
    features = features.detach().float()
    if settings.center == "image":
        features = features - features.mean(0)
    return F.normalize(features, dim=1) if settings.l2norm else features


def _degrees(prepared: Tensor, variants: Sequence[LostSettings]) -> Tensor:
    """Count the other patches with positive affinity to each patch, for each variant, (variants, N) int64."""
    degrees = torch.empty(len(variants), len(prepared), dtype=torch.int64, device=prepared.device)
    for index in torch.arange(len(prepared), device=prepared.device).split(_ROWS_AT_ONCE):
        products = prepared[index] @ prepared.T
        means = products.mean(1, keepdim=True)
        for i, settings in enumerate(variants):
            rows = products - means if settings.center == "row" else products
            positive = rows > -settings.bias  # equal to rows + bias > 0 in floating point, without a copy
            own = positive[torch.arange(len(index)), index]  # a patch does not count itself
            degrees[i, index] = positive.sum(1) - own.long()
    return degrees


def _discover(prepared: Tensor, grid: tuple[int, int], degrees: Tensor, settings: LostSettings) -> LostResult:
    num_patches = len(prepared)
    lowest = degrees.argsort(stable=True)[: settings.k]
    rows = prepared[lowest] @ prepared.T  # (k, N), the seed's first
    if settings.center == "row":
        rows = rows - rows.mean(1, keepdim=True)
    rows = rows + settings.bias
    similar = rows[0, lowest] > 0
    scores = rows[similar].sum(0).view(grid).cpu()
    seed = int(lowest[0])
    mask = _component_of(scores > 0, seed)
    return LostResult(
        seed=seed,
        degrees=degrees.view(grid).cpu(),
        seed_similarity=rows[0].view(grid).cpu(),
        expansion=lowest[similar].sort().values.cpu(),
        scores=scores,
        mask=mask,
        cells=_bounds(mask),
        positive_share=int(degrees.sum()) / max(num_patches * (num_patches - 1), 1),
        tied_seeds=int((degrees == degrees[seed]).sum()),
    )


def _components(mask: Tensor) -> NDArray[np.int32]:
    """Return for every cell its component, from 1 row by row, or 0; diagonals do not connect."""
    from scipy import ndimage

    return ndimage.label(mask.numpy())[0]


def _component_of(mask: Tensor, seed: int) -> Tensor:
    """Return the component of `mask` that contains cell `seed`, or only that cell if it is not in `mask`."""
    row, column = divmod(seed, mask.shape[1])
    if not mask[row, column]:  # the reference implementation raises an error here
        alone = torch.zeros_like(mask)
        alone[row, column] = True
        return alone
    labels = _components(mask)
    return torch.from_numpy(labels == labels[row, column])


def _bounds(mask: Tensor) -> tuple[int, int, int, int]:
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def cells_to_pixels(
    cells: tuple[int, int, int, int], *, patch_size: tuple[float, float], image_size: tuple[int, int]
) -> Box:
    """Convert a box from patches to pixels, with x2 and y2 clipped to `image_size` (height, width)."""
    height, width = patch_size
    x1, y1, x2, y2 = cells
    return (
        float(x1 * width),
        float(y1 * height),
        float(min(x2 * width, image_size[1])),
        float(min(y2 * height, image_size[0])),
    )


# --- The baseline


def attention_mask(attention: Tensor, grid: tuple[int, int], *, mass: float = 0.6) -> Tensor:
    """Return the largest connected component of the patches that receive most of the attention.

    The patches of highest attention are kept until the others together hold at most `1 - mass` of it. The first of
    equally large components, row by row, is used. (The reference implementation never considers the last component.)

    Args:
        attention: Attention of CLS to the patches, of one head or a mean of heads, with any positive sum, (N,).
        grid: (rows, columns).
        mass: Share of the attention to keep, in (0, 1].

    Returns:
        (rows, columns) bool.

    Raises:
        ValueError: The attention does not match the grid, is negative, not finite or zero everywhere, or the mass is
            outside (0, 1].

    Source: valeoai/LOST `object_discovery.py`, DINO's segmentation from attention (arXiv 2104.14294).
    """
    if attention.shape != (grid[0] * grid[1],):
        raise ValueError(
            f"attention has shape {tuple(attention.shape)}, expected one number per patch of a {grid[0]} x {grid[1]} "
            "grid."
        )
    if not 0 < mass <= 1:
        raise ValueError(f"mass={mass} must be in (0, 1].")
    attention = attention.detach().double().cpu()
    total = attention.sum()
    if not torch.isfinite(total) or total <= 0 or (attention < 0).any():
        raise ValueError(f"attention must be finite, not negative and not all zero; its sum is {total.item()}.")
    values, order = attention.sort(stable=True)
    kept = torch.empty(len(values), dtype=torch.bool)
    kept[order] = (values / total).cumsum(0) > 1 - mass
    kept = kept.view(grid)
    labels = _components(kept)
    return torch.from_numpy(labels == 1 + np.bincount(labels.ravel())[1:].argmax())


# --- A model and its images


@dataclass(frozen=True, eq=False)
class Proposals:
    """Boxes that several methods propose for one image.

    Args:
        id: Id of the image.
        image_size: (height, width) of the stored image in pixels.
        boxes: One box per method, in pixels of the stored image.
        results: One result per method: a `LostResult`, or the mask from `attention_mask`.
    """

    id: str
    image_size: tuple[int, int]
    boxes: tuple[Box, ...]
    results: tuple[LostResult | Tensor, ...]


@dataclass(frozen=True, eq=False)
class DiscoveredObject:
    """Object found in one image: its box in pixels of the stored image, and all stages of LOST for figures."""

    id: str
    image_size: tuple[int, int]
    box: Box
    result: LostResult

    def __repr__(self) -> str:
        x1, y1, x2, y2 = self.box
        return f"DiscoveredObject({self.id}: {x1:.0f}, {y1:.0f} to {x2:.0f}, {y2:.0f} of {self.image_size[::-1]})"

    def to_dict(self) -> Record:
        """Return id, image size and box as plain values, without the stages of LOST."""
        return {"id": self.id, "image_size": list(self.image_size), "box": list(self.box)}


def discover_objects(
    model: TokenReader | nn.Module | str | Path,
    images: object,
    *,
    feature: Feature = "k",
    layer: int = -1,
    center: Center = "none",
    l2norm: bool = False,
    bias: float = 0.0,
    k: int = 100,
    max_side: int = 640,
    dense_settings: FeatureSettings | str | Path | None = None,
    device: str | torch.device = "auto",
) -> list[DiscoveredObject]:
    """Find one object in every image; images that cannot be read are left out with a warning.

    Args:
        model: Name, module or reader; see `open_model`.
        images: Folder, paths, Pillow images, `ImageSource` or `datasets` data set.
        feature: Feature, see `LostSettings`.
        layer: Block, see `LostSettings`.
        center: Centering, see `LostSettings`.
        l2norm: Whether to use cosines, see `LostSettings`.
        bias: Number added to the affinity, see `LostSettings`.
        k: Number of candidates, see `LostSettings`.
        max_side: Longer side in pixels to which larger images are reduced; boxes refer to the original size.
        dense_settings: `FeatureSettings`, or a file of `regvit dense`, with block, views, shorter side of the image,
            and pooling, instead of `layer` and `max_side`.
        device: Device to compute on; see `open_model`.

    Raises:
        ValueError: The model or a setting is not supported, or there are no usable images.
    """
    reader, dense, objects = open_model(model, device=device), None, []
    if dense_settings is not None:
        dense = settings_for(dense_settings, reader, layer=None if layer == -1 else layer)
        layer = dense.layer
    settings = LostSettings(feature=feature, layer=layer, center=center, l2norm=l2norm, bias=bias, k=k)
    for proposal in propose(reader, images, [settings], max_side=max_side, dense=dense):
        result = proposal.results[0]
        assert isinstance(result, LostResult)
        objects.append(DiscoveredObject(proposal.id, proposal.image_size, proposal.boxes[0], result))
    _warn_if_degenerate([found.result for found in objects], settings)
    return objects


def _warn_if_degenerate(results: Sequence[LostResult], settings: LostSettings) -> None:
    """Log a warning if images have no distinct seed, with advice."""
    count = sum(result.degenerate for result in results)
    if count:
        share = np.mean([result.positive_share for result in results])
        ties = np.median([result.tied_seeds for result in results])
        logger.warning(
            "%d of %d images have a degenerate affinity with %s: on average %.1f %% of its entries are positive, and "
            "%.0f patches (median) tie for the seed. Center the features, or use l2norm and a negative bias.",
            count, len(results), settings, 100 * share, ties,
        )  # fmt: skip


def propose(
    reader: TokenReader,
    images: object,
    methods: Sequence[Method],
    *,
    max_side: int = 640,
    dense: FeatureSettings | None = None,
) -> Iterator[Proposals]:
    """Yield the boxes of several methods image by image, running the model only once for each image.

    Images keep their size and are padded with zeros on the right and bottom to whole patches after normalization, as
    in the reference implementation; padded patches are included in the computation.

    Args:
        reader: Reader of the model; only the mean and standard deviation of its processor are used.
        images: Images, see `discover_objects`.
        methods: Methods to run.
        max_side: Longer side in pixels to which larger images are reduced.
        dense: Views, shorter side and pooling instead of `max_side`; attention is read from one view, not pooled.

    Raises:
        ValueError: As in `discover_objects`; or a method needs the attention of CLS and the model has no CLS token, or
            not this head.
    """
    description, statistics = reader.description, reader.transform
    methods = [_checked(method, description) for method in methods]
    sites: dict[Site, list[int]] = {}
    for method in methods:
        sites[_site(method)] = sorted({*sites.get(_site(method), []), method.layer})
    sizes: list[tuple[int, int, float]] = []  # height, width, scale of the images in reading order

    side = None if dense is None else dense.image_size or min(description.image_size)

    def pad(image: Image.Image) -> Tensor:
        scale = min(1.0, max_side / max(image.size)) if side is None else side / min(image.size)
        sizes.append((image.height, image.width, scale))
        return _padded(image, statistics, description.patch_size, scale)

    words = f"own size up to {max_side} pixels" if side is None else f"shorter side {side}"
    words = f"{words}, zero-padded, mean {statistics.mean}, std {statistics.std}"
    transform = EvaluationTransform(pad, statistics.mean, statistics.std, words)
    averaged: dict[Site, list[int]] = {}
    if dense is not None:
        averaged = {site: layers for site, layers in sites.items() if site != "attention"}
    rest = {site: layers for site, layers in sites.items() if site not in averaged}
    for i, (ids, pixels) in enumerate(prepare_images(images, transform, batch_size=1)):
        # Only the row of CLS is kept, because all attention weights of a large image may not fit in memory.
        row: dict[Site, Reduction] = {"attention": lambda values, _: values[:, :, :1]}
        readings = reader.read_many(pixels, rest, reduce=row) if rest else {}
        if dense is not None and averaged:
            grid = pooled_grid(reader, pixels, side, dense.pool_to_grid)
            readings |= read_sites_of_views(reader, pixels, averaged, views=dense.views, grid=grid)
        height, width, scale = sizes[i]
        results = _propose_for_one(methods, readings)
        boxes = []
        for result in results:
            mask = result.mask if isinstance(result, LostResult) else result
            box = cells_to_pixels(
                _bounds(mask),
                patch_size=(pixels.shape[2] / mask.shape[0], pixels.shape[3] / mask.shape[1]),
                image_size=(round(height * scale), round(width * scale)),
            )
            boxes.append(_scaled(box, (height, width), scale))
        yield Proposals(ids[0], (height, width), tuple(boxes), tuple(results))


def _site(method: Method) -> Site:
    if isinstance(method, AttentionSettings):
        return "attention"
    return "residual" if method.feature == "out" else method.feature


def _checked(method: Method, description: ModelDescription) -> Method:
    """Return the method with its layer counted from 1; raise an error if the model does not support it."""
    if isinstance(method, AttentionSettings):
        if not description.has_cls:
            raise ValueError(f"{description.name} has no CLS token, so the CLS attention baseline cannot be used.")
        if method.head != "mean" and not 0 <= method.head < description.num_heads:
            raise ValueError(f"head={method.head} does not exist. Use 0 to {description.num_heads - 1}, or 'mean'.")
    return replace(method, layer=resolve_layers((method.layer,), description.num_layers, _site(method))[0])


def _propose_for_one(methods: Sequence[Method], readings: Mapping[Site, TokenReading]) -> list[LostResult | Tensor]:
    results: dict[Method, LostResult | Tensor] = {}
    by_tokens: dict[tuple[Site, int], list[LostSettings]] = {}
    for method in methods:
        if isinstance(method, LostSettings):
            by_tokens.setdefault((_site(method), method.layer), []).append(method)
        else:
            reading = readings["attention"]
            heads = reading[method.layer][0, :, 0, reading.num_prefix_tokens :]  # (heads, N)
            attention = heads.mean(0) if method.head == "mean" else heads[method.head]
            results[method] = attention_mask(attention, reading.grid, mass=method.mass)
    for (site, layer), settings in by_tokens.items():
        results.update(zip(settings, lost_boxes(readings[site].patches(layer)[0], readings[site].grid, settings)))
    return [results[method] for method in methods]


def _padded(image: Image.Image, statistics: EvaluationTransform, patch_size: tuple[int, int], scale: float) -> Tensor:
    """Return normalized pixels (3, H, W) of the scaled image, padded to whole patches."""
    if scale != 1:
        size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
        image = image.resize(size, Image.Resampling.BICUBIC)
    values = np.asarray(image, dtype=np.float32) / 255
    values = (values - np.array(statistics.mean, np.float32)) / np.array(statistics.std, np.float32)
    below, right = -image.height % patch_size[0], -image.width % patch_size[1]
    return torch.from_numpy(np.pad(values, ((0, below), (0, right), (0, 0)))).permute(2, 0, 1)


def _scaled(box: Box, image_size: tuple[int, int], scale: float) -> Box:
    """Convert a box from pixels of the rescaled image to pixels of the stored image."""
    if scale == 1:
        return box
    x1, y1, x2, y2 = (side / scale for side in box)
    return x1, y1, min(x2, float(image_size[1])), min(y2, float(image_size[0]))
