"""Object discovery without labels: LOST, a box from attention to compare with, and CorLoc.

A patch that few others resemble is taken for a part of an object, a small one beside its background; patches like it
are gathered around it, and the box of what hangs together is the prediction (arXiv 2109.14279). Vanilla settings are
those of the paper; the others exist because high-norm tokens, and features that all point one way, break the vanilla
ones (arXiv 2309.16588, whose own bias was never published).

Shape letters: N patches of a grid of (rows, columns), D width, n and m boxes. A box is (x1, y1, x2, y2), the last two
exclusive, in pixels of the picture as it is stored unless said otherwise.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .families import ModelDescription, describe_model
from .features import EvaluationTransform, Site, TokenReading, prepare_images, read_many, resolve_layers

logger = logging.getLogger(__name__)

Feature = Literal["q", "k", "v", "out"]
Center = Literal["none", "image", "row"]
Box = tuple[float, float, float, float]

# From here on the smallest degree is shared by many patches and says little about objects.
DEGENERATE_SHARE = 0.95
IOU_EPSILON = 1e-7
_ROWS_AT_ONCE = 1024  # of the N x N affinity; a photograph of 12 megapixels has 47,000 patches


@dataclass(frozen=True)
class LostSettings:
    """Everything LOST can be told. The defaults are vanilla LOST.

    Args:
        feature: Queries, keys or values of the attention (heads concatenated), or `out`, the raw output of the block.
        layer: Block, 1 to L, or negative from the end.
        center: `image` subtracts the mean patch of the image from every feature. `row` subtracts from every row of the
            affinity its mean, diagonal included; the matrix is then no longer symmetric, and i's similarity to j is
            read in row i.
        l2norm: Cosines instead of dot products; after centring by image.
        bias: Added to every entry of the affinity, in its units. Negative where nearly all entries are positive.
        k: Patches of lowest degree among which the seed looks for others like it; N where the image has fewer.
    """

    feature: Feature = "k"
    layer: int = -1
    center: Center = "none"
    l2norm: bool = False
    bias: float = 0.0
    k: int = 100

    def __post_init__(self) -> None:
        for name, value, known in (
            ("feature", self.feature, ("q", "k", "v", "out")),
            ("center", self.center, ("none", "image", "row")),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown. Use one of {', '.join(known)}.")
        if self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1, the seed itself.")
        if not np.isfinite(self.bias):
            raise ValueError(f"bias={self.bias} must be a finite number.")

    def __str__(self) -> str:
        return (
            f"feature={self.feature} layer={self.layer} center={self.center} l2norm={self.l2norm} "
            f"bias={self.bias:g} k={self.k}"
        )


@dataclass(frozen=True, eq=False)
class LostResult:
    """One image's box and how it came about. Grids are (rows, columns).

    Args:
        seed: Patch of lowest degree, counted row by row; of several the first.
        degrees: int64 grid: to how many other patches a patch has a positive affinity.
        seed_similarity: float32 grid: the seed's row of the affinity.
        expansion: (s,) int64, ascending: patches of low degree with a positive similarity to the seed.
        scores: float32 grid: affinities of a patch to all of `expansion`, summed.
        foreground: bool grid: `scores` above 0.
        mask: bool grid: the part of `foreground` that holds the seed, connected by edges; the seed alone where its own
            score is not above 0.
        cells: Box around `mask` in patches, (x1, y1, x2, y2), the last two exclusive; not clipped.
        positive_share: Share of the entries beside the diagonal that are positive, in [0, 1].
        tied_seeds: Patches that have the seed's degree, the seed included.
    """

    seed: int
    degrees: Tensor
    seed_similarity: Tensor
    expansion: Tensor
    scores: Tensor
    foreground: Tensor
    mask: Tensor
    cells: tuple[int, int, int, int]
    positive_share: float
    tied_seeds: int

    @property
    def degenerate(self) -> bool:
        """The seed is arbitrary: over 95 % of the affinities are positive, or over half of the patches tie for it."""
        return self.positive_share > DEGENERATE_SHARE or 2 * self.tied_seeds > self.degrees.numel()

    @property
    def seed_cells(self) -> tuple[int, int, int, int]:
        """The box before expansion, in patches: the part around the seed that resembles the seed itself."""
        return _bounds(_component_of(self.seed_similarity > 0, self.seed))

    def box(self, patch_size: int | tuple[int, int], image_size: tuple[int, int]) -> Box:
        """The box in pixels of the padded image, clipped to what is picture.

        Args:
            patch_size: Pixels, one side or (height, width).
            image_size: (height, width) in pixels, without the padding.
        """
        return cells_to_pixels(self.cells, patch_size=patch_size, image_size=image_size)


@dataclass(frozen=True)
class AttentionSettings:
    """The baseline: a box around what CLS attends to.

    Args:
        head: Number of the head from 0, or `mean` of all.
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


def affinity(
    features: Tensor, *, center: Center = "none", l2norm: bool = False, bias: float = 0.0, rows: Tensor | None = None
) -> Tensor:
    """Similarity of every patch to every other.

    Args:
        features: (N, D).
        center: As in `LostSettings`.
        l2norm: As in `LostSettings`.
        bias: As in `LostSettings`.
        rows: (r,) indices; only these rows are computed.

    Returns:
        (N, N) or (r, N) float32.
    """
    settings = LostSettings(center=center, l2norm=l2norm, bias=bias)
    return _rows(_prepare(features, settings), rows, settings) + bias


def lost_box(
    features: Tensor,
    grid: tuple[int, int],
    *,
    k: int = 100,
    center: Center = "none",
    l2norm: bool = False,
    bias: float = 0.0,
) -> LostResult:
    """Find the one object of an image.

    Patches of equal degree are ranked by their position, row by row, so the result does not depend on the sort. The
    affinity is never held as a whole: memory is 1,024 of its rows.

    Args:
        features: (N, D) patch features without CLS and registers, row-major.
        grid: (rows, columns) with rows * columns = N.
        k: As in `LostSettings`, like the rest.
        center: See there.
        l2norm: See there.
        bias: See there.

    Raises:
        ValueError: Features that do not fill the grid or are not finite, or a setting that cannot be.

    Source: arXiv 2109.14279, algorithm 1; valeoai/LOST `object_discovery.py`. Slow twin: tests/unit/test_lost.py.
    """
    settings = LostSettings(k=k, center=center, l2norm=l2norm, bias=bias)
    return lost_boxes(features, grid, [settings])[0]


def lost_boxes(features: Tensor, grid: tuple[int, int], settings: Sequence[LostSettings]) -> list[LostResult]:
    """`lost_box` for many settings of the same features; those that differ only in bias or k share one affinity.

    `feature` and `layer` of the settings are not looked at.

    Args:
        features: (N, D) patch features, row-major.
        grid: (rows, columns).
        settings: What to try.

    Returns:
        One result for each of `settings`, in their order.

    Raises:
        ValueError: As `lost_box`.
    """
    if features.ndim != 2 or len(features) != grid[0] * grid[1] or min(grid) < 1:
        raise ValueError(
            f"features {tuple(features.shape)} must be (patches, width) with {grid[0]} x {grid[1]} patches."
        )
    if not torch.isfinite(features).all():
        raise ValueError("features hold NaN or infinity; their affinities mean nothing.")
    results: dict[int, LostResult] = {}
    order = sorted(range(len(settings)), key=lambda i: _product(settings[i]))
    for _, members in groupby(order, key=lambda i: _product(settings[i])):
        same = {i: settings[i] for i in members}
        prepared = _prepare(features, next(iter(same.values())))
        variants = {_variant(one): one for one in same.values()}
        degrees = dict(zip(variants, _degrees(prepared, list(variants.values()))))
        results |= {i: _discover(prepared, grid, degrees[_variant(one)], one) for i, one in same.items()}
    return [results[i] for i in range(len(settings))]


def _product(settings: LostSettings) -> tuple[bool, bool]:
    """Settings with the same answer need the same products of features."""
    return settings.center == "image", settings.l2norm


def _variant(settings: LostSettings) -> tuple[bool, float]:
    """Of the same products, settings with the same answer need the same degrees."""
    return settings.center == "row", settings.bias


def _prepare(features: Tensor, settings: LostSettings) -> Tensor:
    features = features.detach().float()
    if settings.center == "image":
        features = features - features.mean(0)
    return F.normalize(features, dim=1) if settings.l2norm else features


def _rows(prepared: Tensor, index: Tensor | None, settings: LostSettings) -> Tensor:
    """Rows of the affinity without bias, (r, N)."""
    rows = (prepared if index is None else prepared[index]) @ prepared.T
    return rows - rows.mean(1, keepdim=True) if settings.center == "row" else rows


def _degrees(prepared: Tensor, variants: Sequence[LostSettings]) -> Tensor:
    """For each variant how many others a patch is positive to, (variants, N) int64."""
    degrees = torch.empty(len(variants), len(prepared), dtype=torch.int64, device=prepared.device)
    for index in torch.arange(len(prepared), device=prepared.device).split(_ROWS_AT_ONCE):
        products = prepared[index] @ prepared.T
        means = products.mean(1, keepdim=True)
        for i, settings in enumerate(variants):
            rows = products - means if settings.center == "row" else products
            positive = rows > -settings.bias  # in floating point the same as rows + bias > 0, and no copy
            own = positive[torch.arange(len(index)), index]  # a patch does not count itself
            degrees[i, index] = positive.sum(1) - own.long()
    return degrees


def _discover(prepared: Tensor, grid: tuple[int, int], degrees: Tensor, settings: LostSettings) -> LostResult:
    num_patches = len(prepared)
    lowest = degrees.argsort(stable=True)[: settings.k]
    rows = _rows(prepared, lowest, settings) + settings.bias  # (k, N), the seed's first
    similar = rows[0, lowest] > 0
    scores = rows[similar].sum(0).view(grid).cpu()
    seed = int(lowest[0])
    foreground = scores > 0
    mask = _component_of(foreground, seed)
    return LostResult(
        seed=seed,
        degrees=degrees.view(grid).cpu(),
        seed_similarity=rows[0].view(grid).cpu(),
        expansion=lowest[similar].sort().values.cpu(),
        scores=scores,
        foreground=foreground,
        mask=mask,
        cells=_bounds(mask),
        positive_share=int(degrees.sum()) / max(num_patches * (num_patches - 1), 1),
        tied_seeds=int((degrees == degrees[seed]).sum()),
    )


def _components(mask: Tensor) -> tuple[int, np.ndarray]:
    """Number of parts and, for every cell, 0 for background or the number of its part; diagonals do not connect."""
    import cv2

    count, labels = cv2.connectedComponents(mask.numpy().astype(np.uint8), connectivity=4)
    return count - 1, labels


def _component_of(mask: Tensor, seed: int) -> Tensor:
    """The part of `mask` that holds cell number `seed`, or that cell alone."""
    row, column = divmod(seed, mask.shape[1])
    if not mask[row, column]:  # the reference implementation raises an error here
        alone = torch.zeros_like(mask)
        alone[row, column] = True
        return alone
    labels = _components(mask)[1]
    return torch.from_numpy(labels == labels[row, column])


def _bounds(mask: Tensor) -> tuple[int, int, int, int]:
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def cells_to_pixels(
    cells: tuple[int, int, int, int], *, patch_size: int | tuple[int, int], image_size: tuple[int, int]
) -> Box:
    """A box in patches as a box in pixels, its far sides clipped to an image of `image_size` (height, width)."""
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    x1, y1, x2, y2 = cells
    return (
        float(x1 * width),
        float(y1 * height),
        float(min(x2 * width, image_size[1])),
        float(min(y2 * height, image_size[0])),
    )


# --- The baseline


def attention_mask(attention: Tensor, grid: tuple[int, int], *, mass: float = 0.6) -> Tensor:
    """The biggest connected part of the patches that share most of the attention.

    The patches of highest attention are kept until the others together hold at most `1 - mass` of it. Of equal parts
    the first, row by row, counts. (The reference implementation never considers the last part.)

    Args:
        attention: (N,) attention of CLS to the patches, of one head or a mean of heads; any positive sum.
        grid: (rows, columns).
        mass: Share of the attention to keep, in (0, 1].

    Returns:
        (rows, columns) bool.

    Raises:
        ValueError: Attention that does not fill the grid, is negative, not finite or zero everywhere; a mass outside
            (0, 1].

    Source: valeoai/LOST `object_discovery.py`, DINO's segmentation from attention (arXiv 2104.14294).
    """
    if attention.shape != (grid[0] * grid[1],):
        raise ValueError(f"attention {tuple(attention.shape)} must be one number for each of {grid[0]} x {grid[1]}.")
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
    count, labels = _components(kept)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    # OpenCV numbers parts in an order of its own; raster order decides between equals.
    first = {part: int(np.argmax(labels.ravel() == part)) for part in range(1, count + 1)}
    biggest = min(first, key=lambda part: (-sizes[part - 1], first[part]))
    return torch.from_numpy(labels == biggest)


def attention_cells(attention: Tensor, grid: tuple[int, int], *, mass: float = 0.6) -> tuple[int, int, int, int]:
    """The box around `attention_mask`, in patches, (x1, y1, x2, y2)."""
    return _bounds(attention_mask(attention, grid, mass=mass))


# --- A model and its images


@dataclass(frozen=True, eq=False)
class Proposals:
    """What several methods propose for one image.

    Args:
        id: Of the image.
        image_size: (height, width) of the picture, pixels.
        boxes: One a method, in pixels of the picture.
        results: One a method: a `LostResult`, or the mask that `attention_mask` kept.
    """

    id: str
    image_size: tuple[int, int]
    boxes: tuple[Box, ...]
    results: tuple[LostResult | Tensor, ...]


@dataclass(frozen=True, eq=False)
class DiscoveredObject:
    """The object found in one image: its box in pixels of the picture, and all stages of LOST for figures."""

    id: str
    image_size: tuple[int, int]
    box: Box
    result: LostResult


def discover_objects(
    model: nn.Module,
    images: Any,
    *,
    feature: Feature = "k",
    layer: int = -1,
    center: Center = "none",
    l2norm: bool = False,
    bias: float = 0.0,
    k: int = 100,
    processor: Any = None,
    max_side: int = 640,
) -> list[DiscoveredObject]:
    """One box for every image; images that cannot be read are left out with a warning.

    Args:
        model: Any model that `features.read_tokens` reads.
        images: A folder, paths, Pillow images, an `ImageSource` or a `datasets` data set.
        feature: As in `LostSettings`, like the next five.
        layer: See there.
        center: See there.
        l2norm: See there.
        bias: See there.
        k: See there.
        processor: Image processor, of which the statistics are used; default the model's own.
        max_side: Larger images are read at this length of their longer side, pixels; boxes refer to the original.

    Raises:
        ValueError: A model or setting that cannot be, or no image of use.
    """
    settings = LostSettings(feature=feature, layer=layer, center=center, l2norm=l2norm, bias=bias, k=k)
    objects = []
    for proposal in propose(model, images, [settings], processor=processor, max_side=max_side):
        result = proposal.results[0]
        assert isinstance(result, LostResult)
        objects.append(DiscoveredObject(proposal.id, proposal.image_size, proposal.boxes[0], result))
    warn_if_degenerate([found.result for found in objects], settings)
    return objects


def warn_if_degenerate(results: Sequence[LostResult], settings: LostSettings) -> None:
    """Log how many images had no seed to speak of, and what helps."""
    count = sum(result.degenerate for result in results)
    if count:
        share = np.mean([result.positive_share for result in results])
        ties = np.median([result.tied_seeds for result in results])
        logger.warning(
            "%d of %d images have a degenerate affinity with %s: on average %.1f %% of its entries are positive, and "
            "%.0f patches (median) tie for the seed. Center the features, or use l2norm and a bias below 0.",
            count, len(results), settings, 100 * share, ties,
        )  # fmt: skip


def propose(
    model: nn.Module,
    images: Any,
    methods: Sequence[Method],
    *,
    processor: Any = None,
    max_side: int = 640,
) -> Iterator[Proposals]:
    """Boxes of many methods, image by image; the model runs once for each image, whatever the number of methods.

    Images keep their own size and are padded with zeros, right and below, to whole patches after normalisation, as in
    the reference implementation; padded patches take part.

    Args:
        model: As for `discover_objects`.
        images: See there.
        methods: What to try.
        processor: See there.
        max_side: See there.

    Raises:
        ValueError: As `discover_objects`; attention of a model without CLS, or of a head that it has not.
    """
    description = describe_model(model)
    methods = [_checked(method, description) for method in methods]
    sites: dict[Site, list[int]] = {}
    for method in methods:
        sites[_site(method)] = sorted({*sites.get(_site(method), []), method.layer})
    statistics = EvaluationTransform.for_model(model, processor)
    sizes: list[tuple[int, int, float]] = []  # of the pictures in the order they are read

    def pad(image: Image.Image) -> Tensor:
        pixels, scale = _padded(image, statistics, description.patch_size, max_side)
        sizes.append((image.height, image.width, scale))
        return pixels

    words = f"own size up to {max_side} pixels, zeros right and below, mean {statistics.mean}, std {statistics.std}"
    transform = EvaluationTransform(pad, statistics.mean, statistics.std, words)
    for i, (ids, pixel_values) in enumerate(prepare_images(images, transform, batch_size=1)):
        # Only the row of CLS is kept: the weights of a large picture would fill the memory.
        readings = read_many(model, pixel_values, sites, reduce={"attention": lambda values, layer: values[:, :, :1]})
        height, width, scale = sizes[i]
        boxes, results = _propose_for_one(methods, readings)
        pixels = [
            _scaled(
                cells_to_pixels(
                    cells,
                    patch_size=description.patch_size,
                    image_size=(round(height * scale), round(width * scale)),
                ),
                (height, width),
                scale,
            )
            for cells in boxes
        ]
        yield Proposals(ids[0], (height, width), tuple(pixels), tuple(results))


def _site(method: Method) -> Site:
    if isinstance(method, AttentionSettings):
        return "attention"
    return "residual" if method.feature == "out" else method.feature


def _checked(method: Method, description: ModelDescription) -> Method:
    """The method with its layer counted from 1, or an error."""
    if isinstance(method, AttentionSettings):
        if not description.has_cls:
            raise ValueError(f"{description.name} has no CLS token, so there is no attention of CLS to draw a box of.")
        if method.head != "mean" and not 0 <= method.head < description.num_heads:
            raise ValueError(f"head={method.head} does not exist; the heads are 0 to {description.num_heads - 1}.")
    return replace(method, layer=resolve_layers((method.layer,), description.num_layers, _site(method))[0])


def _propose_for_one(
    methods: Sequence[Method], readings: Mapping[Site, TokenReading]
) -> tuple[list[tuple[int, int, int, int]], list[LostResult | Tensor]]:
    results: dict[int, LostResult | Tensor] = {}
    grid = next(iter(readings.values())).grid
    by_tokens: dict[tuple[Site, int], list[int]] = {}
    for i, method in enumerate(methods):
        if isinstance(method, LostSettings):
            by_tokens.setdefault((_site(method), method.layer), []).append(i)
        else:
            reading = readings["attention"]
            heads = reading[method.layer][0, :, 0, reading.num_prefix_tokens :]  # (heads, N)
            attention = heads.mean(0) if method.head == "mean" else heads[method.head]
            results[i] = attention_mask(attention, grid, mass=method.mass)
    for (site, layer), members in by_tokens.items():
        settings = [method for method in (methods[i] for i in members) if isinstance(method, LostSettings)]
        results.update(zip(members, lost_boxes(readings[site].patches(layer)[0], grid, settings)))
    ordered = [results[i] for i in range(len(methods))]
    return [result.cells if isinstance(result, LostResult) else _bounds(result) for result in ordered], ordered


def _padded(
    image: Image.Image, statistics: EvaluationTransform, patch_size: tuple[int, int], max_side: int
) -> tuple[Tensor, float]:
    """Normalised pixels (3, H, W) padded to whole patches, and the scale at which the picture was read, at most 1."""
    scale = min(1.0, max_side / max(image.size))
    if scale < 1:
        size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
        image = image.resize(size, Image.Resampling.BICUBIC)
    values = np.asarray(image, dtype=np.float32) / 255
    values = (values - np.array(statistics.mean, np.float32)) / np.array(statistics.std, np.float32)
    below, right = -image.height % patch_size[0], -image.width % patch_size[1]
    return torch.from_numpy(np.pad(values, ((0, below), (0, right), (0, 0)))).permute(2, 0, 1), scale


def _scaled(box: Box, image_size: tuple[int, int], scale: float) -> Box:
    """A box on the picture as it was read, on the picture as it is stored."""
    if scale == 1:
        return box
    x1, y1, x2, y2 = (side / scale for side in box)
    return x1, y1, min(x2, float(image_size[1])), min(y2, float(image_size[0]))


# --- CorLoc


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of every pair.

    In float32 and with 1e-7 added to the union, as the reference does: two boxes that share exactly half their union
    come out at 0.5 and count.

    Args:
        boxes: (n, 4), (x1, y1, x2, y2).
        others: (m, 4).

    Returns:
        (n, m) float32 in [0, 1].

    Raises:
        ValueError: Not (n, 4), not finite, or a box whose far side comes before its near side.
    """
    for name, given in (("boxes", boxes), ("others", others)):
        if given.ndim != 2 or given.shape[1] != 4:
            raise ValueError(f"{name} {tuple(given.shape)} must be (number, 4) as (x1, y1, x2, y2).")
        if not torch.isfinite(given).all() or (given[:, 2:] < given[:, :2]).any():
            raise ValueError(f"{name} must be finite (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2; is it x, y, w, h?")
    boxes, others = boxes.float()[:, None], others.float()[None]
    sides = torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(boxes[..., :2], others[..., :2])
    shared = sides.clamp(min=0).prod(-1)
    areas = [(given[..., 2:] - given[..., :2]).prod(-1) for given in (boxes, others)]
    return shared / (areas[0] + areas[1] - shared + IOU_EPSILON)


def best_iou(predictions: Sequence[Any] | Tensor, references: Sequence[Any]) -> Tensor:
    """For every image the overlap of its predicted box with the ground-truth box that fits best, (n,) float32.

    Args:
        predictions: (n, 4), one box per image.
        references: n lists of boxes, each with at least one.

    Raises:
        ValueError: Different lengths, boxes that are none, or an image without a ground-truth box.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predicted boxes for {len(references)} images; expected one each.")
    overlaps = []
    for i, (predicted, truth) in enumerate(zip(predictions, references)):
        if len(truth) == 0:
            raise ValueError(
                f"Image {i} has no ground-truth box. CorLoc is defined on images with an object; leave it out."
            )
        boxes = torch.as_tensor(np.asarray(truth, dtype=np.float32))
        overlaps.append(box_iou(torch.as_tensor(np.asarray(predicted, dtype=np.float32))[None], boxes).max())
    return torch.stack(overlaps) if overlaps else torch.empty(0)


def corloc(predictions: Sequence[Any] | Tensor, references: Sequence[Any], *, threshold: float = 0.5) -> float:
    """Share of images whose predicted box overlaps some ground-truth box by at least `threshold`, in [0, 1].

    Args:
        predictions: (n, 4), one box per image.
        references: n lists of boxes.
        threshold: Smallest intersection over union that counts.

    Raises:
        ValueError: As `best_iou`, or no images.
    """
    overlaps = best_iou(predictions, references)
    if not len(overlaps):
        raise ValueError("There are no predicted boxes; CorLoc of nothing is undefined.")
    return (overlaps >= threshold).double().mean().item()
