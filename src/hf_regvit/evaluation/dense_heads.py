"""Linear segmentation and linear depth on frozen features: the official heads, trained on stored features.

    train, test = (read_dense_features(model, part.images, flip=True) for part in (train_set, test_set))
    result = linear_segmentation(train, train_set.targets, test, test_set.targets, class_names=names)

The model runs once over every image (twice with `flip`, the second time mirrored); only one linear layer is trained
afterwards. Every model family that `read_tokens` supports is evaluated by the same code, and two models are compared
on the same images, steps and random numbers.

The differences from the official protocols follow from extracting the features once: whole images at one scale instead
of random crops and scales, no photometric distortion, whole-image instead of sliding-window testing, and fewer steps.
Heads, losses, optimizers, schedules and the testing of depth are the official ones.

Shape letters: n images, B of a batch, (rows, columns) grid of patches, D width, l blocks read, F = l D features of a
patch, C classes, (H, W) pixels of a target, K bins of depth.

Source: arXiv 2304.07193 section 7.4 and facebookresearch/dinov2 `eval/segmentation`, `eval/depth`.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..models.modeling_regvit import scale_invariant_log_loss
from ..models.results import Record
from ..models.schedules import cosine_with_warmup, poly_with_warmup
from .dense_features import DenseFeatures

Maps = Sequence[np.ndarray | Tensor]  # (H, W) arrays or tensors by index, of different sizes, possibly read on demand

IGNORE = 255
_FLIP_DRAWS, _ORDER_DRAWS, _HEAD_DRAWS = 0xF11, 0x0DD, 0x4EAD


# --- Settings


@dataclass(frozen=True)
class SegmentationSettings:
    """Training settings of the segmentation head.

    The defaults are for a few hundred images on a CPU; the published protocol takes 40,000 steps of 16 images.

    Args:
        num_steps: Number of optimizer steps.
        warmup_ratio: Share of the steps in which the learning rate rises from nearly 0.
        batch_size: Number of images per step.
        learning_rate: Peak learning rate of AdamW; it decreases linearly to 0.
        weight_decay: Weight decay of AdamW, on all parameters as in the original.
        flip_probability: Probability of using the flipped features of an image.
    """

    num_steps: int = 500
    warmup_ratio: float = 0.0375
    batch_size: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    flip_probability: float = 0.5

    def __post_init__(self) -> None:
        if min(self.num_steps, self.batch_size) < 1:
            raise ValueError(f"num_steps={self.num_steps} and batch_size={self.batch_size} must be at least 1.")
        if not (0 <= self.warmup_ratio <= 1 and 0 <= self.flip_probability <= 1):
            raise ValueError(
                f"warmup_ratio={self.warmup_ratio} and flip_probability={self.flip_probability} must lie in [0, 1]."
            )
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0.")


@dataclass(frozen=True)
class DepthSettings(SegmentationSettings):
    """Training and test settings of the depth head.

    The published protocol takes 38,400 steps of 16 images with a learning rate of 1e-4.

    Args:
        num_steps: Number of optimizer steps.
        warmup_ratio: Share of the steps in which the learning rate rises linearly from a thousandth of its peak.
        batch_size: Number of images per step.
        learning_rate: Peak learning rate of AdamW; it follows a cosine to 0.
        weight_decay: Weight decay of AdamW.
        flip_probability: Probability of using the flipped features of an image.
        mean_only_ratio: Share of the steps at the beginning in which the loss consists of its mean term only.
        max_grad_norm: Maximum gradient norm for clipping.
        num_bins: Number of depth bins, K.
        min_depth: Center of the first bin in meters; predictions are clamped to it.
        max_depth: Center of the last bin in meters. Pixels farther away are ignored in training and test.
        upsample: Factor by which the grid is upsampled before depth is computed.
        average_flip: Whether to test with the mean of the predictions for the image and for its mirror image.
    """

    num_steps: int = 300
    warmup_ratio: float = 1 / 3
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    mean_only_ratio: float = 100 / 38_400
    max_grad_norm: float = 35.0
    num_bins: int = 256
    min_depth: float = 0.001
    max_depth: float = 10.0
    upsample: int = 4
    average_flip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.min_depth < self.max_depth:
            raise ValueError(f"min_depth={self.min_depth} must be above 0 and below max_depth={self.max_depth}.")
        if self.num_bins < 2 or self.upsample < 1:
            raise ValueError(f"num_bins={self.num_bins} must be at least 2 and upsample={self.upsample} at least 1.")


# --- Results


@dataclass(frozen=True, eq=False)
class LinearResult:
    """Scores of one trained and tested head, and how it was trained.

    `RegViTForSemanticSegmentation` and `RegViTForDepthEstimation` predict the same with the weights of the head.

    Args:
        scores: Values by name, over all test images. Segmentation: `mean_iou`, `mean_accuracy` and
            `overall_accuracy`, and `iou_NAME` of each class that occurs or is predicted. Depth: `rmse` in meters,
            `abs_rel`, `delta1`, `delta2` and `delta3`, averaged over images.
        rows: One row of numbers per test image. Segmentation: (n, 3 * C) agreeing, predicted and true pixels of every
            class; `intervals.mean_iou` scores any resample of them. Depth: (n, 5), the five metrics.
        ids: Names of the n test images.
        num_train: Number of training images.
        layers: Blocks read.
        protocol: Description of the protocol in one line.
        settings: Training and test settings.
        seed: Random seed for the order, the flips and the head.
        train_loss: Mean loss over the last tenth of the steps.
        seconds: Wall time of training and test, without feature extraction.
        head: Weights of the head.
    """

    scores: dict[str, float]
    rows: NDArray[np.float64] = field(repr=False)
    ids: tuple[str, ...] = field(repr=False)
    num_train: int
    layers: tuple[int, ...]
    protocol: str = field(repr=False)
    settings: SegmentationSettings = field(repr=False)
    seed: int
    train_loss: float
    seconds: float
    head: dict[str, Tensor] = field(repr=False)

    def to_dict(self) -> Record:
        """Return a JSON-serializable dict without the weights."""
        kept = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "head"}
        return kept | {"rows": self.rows.tolist(), "settings": asdict(self.settings)}


# --- Segmentation


def linear_segmentation(
    train: DenseFeatures,
    train_masks: Maps,
    test: DenseFeatures,
    test_masks: Maps,
    *,
    class_names: Sequence[str],
    settings: SegmentationSettings | None = None,
    seed: int = 0,
) -> LinearResult:
    """Train batch norm and one linear layer on every patch with cross-entropy, and score them with mean IoU.

    Logits are upsampled bilinearly to the size at which the image was read; the training masks are resized to it by
    nearest neighbor. In the test the logits are resized once more to the mask's own size before the argmax.

    Args:
        train: Features of the training images; flipped features are used if they were read.
        train_masks: (H, W) class ids for every training image; 255 is ignored.
        test: Features of the test images.
        test_masks: (H, W) class ids for every test image; 255 is ignored.
        class_names: Names of the C classes.
        settings: Training settings.
        seed: Random seed for the order of the images, the flips and the weights of the head.

    Raises:
        ValueError: Features and masks do not match, or a mask contains a value that is not a class id.
    """
    from .metrics import MeanIoU

    started, num_classes = time.perf_counter(), len(class_names)
    settings = settings or SegmentationSettings()
    _check_parts(train, train_masks, test, test_masks)
    targets = [_mask_at_input(train, train_masks, i, num_classes) for i in range(len(train))]
    head = _segmentation_head(train.width, num_classes, seed)

    def loss(pairs: _Pairs, step: int) -> Tensor:
        summed = []
        for maps, truth in pairs:
            logits = _resize(maps, tuple(truth.shape[1:]))
            summed.append(F.cross_entropy(logits, truth.long(), ignore_index=IGNORE, reduction="sum"))
        return torch.stack(summed).sum() / max(1, sum(int((truth != IGNORE).sum()) for _, truth in pairs))

    train_loss = _fit(head, train, targets, loss, settings, poly_with_warmup, seed=seed)
    metric = MeanIoU(num_classes=num_classes, ignore_index=IGNORE)
    rows = []
    head.eval()
    with torch.no_grad():
        for i, features in enumerate(test.maps):
            truth = _checked_mask(test_masks[i], num_classes, test.ids[i])
            logits = _resize(_resize(_map_of(head, features), test.input_size(i)), tuple(truth.shape))
            rows.append(metric.reduce([logits[0].argmax(0)], [truth]))
    values = np.concatenate(rows)
    found = metric.result(values)
    scores = {name: found[name] for name in ("mean_iou", "mean_accuracy", "overall_accuracy")}
    classes = zip(class_names, found["per_category_iou"])
    return LinearResult(
        scores=scores | {f"iou_{name}": iou for name, iou in classes if not math.isnan(iou)},
        rows=values,
        protocol="linear segmentation: " + _protocol(train, settings) + "; mIoU at the size of the mask",
        head=dict(head.state_dict()),
        ids=test.ids,
        num_train=len(train),
        layers=train.layers,
        settings=settings,
        seed=seed,
        train_loss=train_loss,
        seconds=time.perf_counter() - started,
    )


def _segmentation_head(width: int, num_classes: int, seed: int) -> nn.Module:
    """Return batch norm over all patches of a batch, then a linear layer: (patches, F) to (patches, C)."""
    classifier = nn.Linear(width, num_classes)
    nn.init.normal_(classifier.weight, std=0.01, generator=torch.Generator().manual_seed(seed + _HEAD_DRAWS))
    nn.init.zeros_(classifier.bias)
    return nn.Sequential(OrderedDict(head_norm=nn.BatchNorm1d(width), classifier=classifier))


def _checked_mask(mask: np.ndarray | Tensor, num_classes: int, name: str) -> Tensor:
    """Return the mask as (H, W) int64 on the CPU, or raise an error that names the image and the value."""
    values = torch.as_tensor(mask).cpu()
    if values.ndim != 2 or values.is_floating_point():
        raise ValueError(
            f"The mask of '{name}' has shape {tuple(values.shape)} and type {values.dtype}. Give (H, W) integer class "
            "ids."
        )
    values = values.long()
    wrong = values[(values != IGNORE) & ((values < 0) | (values >= num_classes))]
    if len(wrong):
        raise ValueError(
            f"The mask of '{name}' contains {int(wrong[0])}; expected class ids 0 to {num_classes - 1}, or {IGNORE} "
            "for ignored pixels. Correct the mask or class_names."
        )
    return values


def _mask_at_input(features: DenseFeatures, masks: Maps, index: int, num_classes: int) -> Tensor:
    mask = _checked_mask(masks[index], num_classes, features.ids[index])
    size = features.input_size(index)
    # One byte per pixel while stored; class ids below 255 fit.
    dtype = torch.uint8 if num_classes <= IGNORE else torch.int64
    return F.interpolate(mask[None, None].float(), size=size, mode="nearest-exact")[0, 0].to(dtype)


# --- Depth


def linear_depth(
    train: DenseFeatures,
    train_depths: Maps,
    test: DenseFeatures,
    test_depths: Maps,
    *,
    settings: DepthSettings | None = None,
    seed: int = 0,
) -> LinearResult:
    """Train one linear layer from a patch with the CLS token to depth bins, with the scale-invariant log loss.

    Args:
        train: Features of the training images; flipped features are used if they were read.
        train_depths: (H, W) meters for every training image; 0, negative and non-finite values are not measured.
        test: Features of the test images; `average_flip` also needs the flipped features.
        test_depths: (H, W) meters for every test image.
        settings: Training and test settings.
        seed: Random seed for the order of the images, the flips and the weights of the head.

    Raises:
        ValueError: Features and depth maps do not match, or an image has no measured depth.
    """
    from .metrics import DepthErrors

    started = time.perf_counter()
    settings = settings or DepthSettings()
    _check_parts(train, train_depths, test, test_depths)
    if settings.average_flip and test.flipped is None:
        raise ValueError(
            "average_flip needs flipped test features. Read the features with flip=True, or set average_flip=False."
        )
    targets = [_depth_at_input(train, train_depths, i, settings) for i in range(len(train))]
    width = train.width * (1 if train.cls is None else 2)
    head = nn.Linear(width, settings.num_bins)
    generator = torch.Generator().manual_seed(seed + _HEAD_DRAWS)
    bound = 1 / math.sqrt(width)  # torch's initialization of a linear layer, but seeded
    for parameter in head.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    mean_only = round(settings.num_steps * settings.mean_only_ratio)

    def loss(pairs: _Pairs, step: int) -> Tensor:
        depths = [bins_to_meters(bins, tuple(truth.shape[1:]), settings).flatten() for bins, truth in pairs]
        predicted, true = torch.cat(depths), torch.cat([truth.flatten() for _, truth in pairs])
        if step < mean_only:
            error = (torch.log(predicted + 1e-3) - torch.log(true + 1e-3))[true > 0]
            return math.sqrt(0.15) * error.mean().abs()
        return scale_invariant_log_loss(predicted, true, true > 0)

    train_loss = _fit(
        head, train, targets, loss, settings, cosine_with_warmup, seed=seed, tokens_of=_beside_cls,
        max_grad_norm=settings.max_grad_norm,
    )  # fmt: skip
    metric = DepthErrors(min_depth=settings.min_depth, max_depth=settings.max_depth)
    rows = []
    with torch.no_grad():
        for i in range(len(test)):
            truth = _checked_depth(test_depths[i], settings, test.ids[i])
            depth = _predict_depth(head, test, i, tuple(truth.shape), settings)
            rows.append(metric.reduce([depth], [truth]))
    values = np.concatenate(rows)
    return LinearResult(
        scores=metric.result(values),
        rows=values,
        protocol="linear depth: " + _protocol(train, settings) + _depth_protocol(settings, train),
        head=dict(head.state_dict(prefix="classifier.")),
        ids=test.ids,
        num_train=len(train),
        layers=train.layers,
        settings=settings,
        seed=seed,
        train_loss=train_loss,
        seconds=time.perf_counter() - started,
    )


def bins_to_meters(bins: Tensor, size: tuple[int, ...], settings: DepthSettings) -> Tensor:
    """Convert bin scores (B, K, rows, columns) to depth (B, H, W) in meters at `size`.

    The linear layer commutes with bilinear upsampling of the features, so the scores are upsampled. The depth is the
    mean of evenly spaced bin centers, weighted by "linear norm" (relu + 0.1, divided by their sum).
    """
    grid = tuple(settings.upsample * side for side in bins.shape[-2:])
    weights = F.relu(_resize(bins, grid)) + 0.1
    centers = torch.linspace(settings.min_depth, settings.max_depth, settings.num_bins)
    depth = torch.einsum("bkij,k->bij", weights, centers) / weights.sum(1)
    return _resize(depth[:, None], size)[:, 0]


def _beside_cls(features: DenseFeatures, index: int) -> Tensor:
    """Return a map with each block's CLS beside its patches, in the order of `RegViTForDepthEstimation`."""
    if features.cls is None:
        return features.maps[index]
    blocks = len(features.layers)
    patches = features.maps[index].unflatten(-1, (blocks, -1))  # (rows, columns, l, D)
    cls_token = features.cls[index].view(blocks, -1).expand_as(patches)
    return torch.stack([patches, cls_token], dim=-2).flatten(-3)  # (rows, columns, 2 l D)


def _predict_depth(
    head: nn.Module, features: DenseFeatures, index: int, size: tuple[int, ...], settings: DepthSettings
) -> Tensor:
    """Return (H, W) meters, averaged with the mirror image if set, clamped to the range of the bins."""
    depth = bins_to_meters(_map_of(head, _beside_cls(features, index)), size, settings)[0]
    if settings.average_flip and features.flipped is not None:
        mirrored = bins_to_meters(_map_of(head, _beside_cls(features.flipped, index)), size, settings)[0]
        depth = (depth + mirrored.flip(-1)) / 2
    return depth.clamp(settings.min_depth, settings.max_depth)


def _checked_depth(depth: np.ndarray | Tensor, settings: DepthSettings, name: str) -> Tensor:
    """Return (H, W) float32 meters, 0 where nothing is measured."""
    values = torch.as_tensor(depth).cpu().float()
    if values.ndim != 2:
        raise ValueError(f"The depth of '{name}' has shape {tuple(values.shape)}. Give one (H, W) map in meters.")
    measured = values.isfinite() & (values >= settings.min_depth) & (values <= settings.max_depth)
    values = torch.where(measured, values, 0)
    if not values.any():
        raise ValueError(
            f"The depth of '{name}' has no pixel between {settings.min_depth} and {settings.max_depth} meters. Check "
            "that it is in meters and that max_depth is large enough, or remove the image from the data."
        )
    return values


def _depth_at_input(features: DenseFeatures, depths: Maps, index: int, settings: DepthSettings) -> Tensor:
    depth = _checked_depth(depths[index], settings, features.ids[index])
    return F.interpolate(depth[None, None], size=features.input_size(index), mode="nearest-exact")[0, 0]


# --- Shared by both

_Pairs = list[tuple[Tensor, Tensor]]  # outputs of a head (B, C, rows, columns) and targets (B, H, W), for every grid


def _fit(
    head: nn.Module,
    features: DenseFeatures,
    targets: Sequence[Tensor],
    loss: Callable[[_Pairs, int], Tensor],
    settings: SegmentationSettings,
    schedule: Callable[[int, int, float], float],
    *,
    seed: int,
    tokens_of: Callable[[DenseFeatures, int], Tensor] = lambda features, index: features.maps[index],
    max_grad_norm: float = math.inf,
) -> float:
    """Train a head, and return the mean loss over the last tenth of the steps.

    Epochs are permutations, and batches may span two epochs.
    """
    rng, flips = (np.random.default_rng([seed, draws]) for draws in (_ORDER_DRAWS, _FLIP_DRAWS))
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.999)
    )
    queue: list[int] = []
    losses = []
    batch_size = min(settings.batch_size, len(features))
    for step in range(settings.num_steps):
        while len(queue) < batch_size:
            queue.extend(rng.permutation(len(features)).tolist())
        chosen, queue = queue[:batch_size], queue[batch_size:]
        by_grid: dict[tuple[int, ...], _Pairs] = {}
        for index, draw in zip(chosen, flips.random(len(chosen))):
            seen, truth = features, targets[index]
            if features.flipped is not None and draw < settings.flip_probability:
                seen, truth = features.flipped, truth.flip(-1)
            tokens = tokens_of(seen, index)
            by_grid.setdefault(tuple(tokens.shape[:2]), []).append((tokens, truth))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(step, settings.num_steps, settings.warmup_ratio)
        with torch.enable_grad():
            value = loss(_outputs(head, by_grid), step)
            optimizer.zero_grad()
            value.backward()
        if not math.isfinite(value.item()):
            raise ValueError(
                f"The loss is {value.item()} at step {step}. Check the features for NaN or infinite values, or lower "
                "learning_rate."
            )
        if math.isfinite(max_grad_norm):
            nn.utils.clip_grad_norm_(head.parameters(), max_grad_norm)
        optimizer.step()
        losses.append(value.item())
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def _outputs(head: nn.Module, by_grid: dict[tuple[int, ...], _Pairs]) -> _Pairs:
    """Run the head once on all patches of a batch, and pair its outputs with the targets of every grid."""
    outputs = head(torch.cat([tokens.flatten(0, 1) for group in by_grid.values() for tokens, _ in group]))
    counts = [len(group) * rows * columns for (rows, columns), group in by_grid.items()]
    return [
        (part.view(len(group), *grid, -1).permute(0, 3, 1, 2), torch.stack([truth for _, truth in group]))
        for part, (grid, group) in zip(outputs.split(counts), by_grid.items())
    ]


def _map_of(head: nn.Module, tokens: Tensor) -> Tensor:
    """Return the outputs of a head for one map (rows, columns, F) as (1, C, rows, columns)."""
    return head(tokens.flatten(0, 1)).T.unflatten(1, tokens.shape[:2])[None]


def _resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize (B, C, h, w) to (B, C, *size), bilinear without aligned corners, as in the protocols."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _check_parts(train: DenseFeatures, train_targets: Maps, test: DenseFeatures, test_targets: Maps) -> None:
    for name, features, targets in (("training", train, train_targets), ("test", test, test_targets)):
        if not len(features) or len(features) != len(targets):
            raise ValueError(
                f"{len(features)} {name} images have {len(targets)} targets. Give one target per image, and at least "
                "one image."
            )
    if (train.layers, train.width) != (test.layers, test.width):
        raise ValueError(
            f"Training features are of blocks {list(train.layers)} with width {train.width}, but test features are of "
            f"blocks {list(test.layers)} with width {test.width}. Read both with the same model and options."
        )


def _protocol(train: DenseFeatures, settings: SegmentationSettings) -> str:
    height, width = train.input_size(0)
    flips = "with flips" if train.flipped is not None and settings.flip_probability else "without flips"
    return (
        f"frozen blocks {list(train.layers)}, final norm, whole images at one scale ({height} x {width} pixels for "
        f"the first), {settings.num_steps} steps of {settings.batch_size} images {flips}, AdamW "
        f"{settings.learning_rate:g}"
    )


def _depth_protocol(settings: DepthSettings, train: DenseFeatures) -> str:
    return (
        f"; {settings.num_bins} bins{'' if train.cls is None else ', CLS concatenated'}, x{settings.upsample}, "
        f"{'averaged with mirror image' if settings.average_flip else 'no mirror image'}, clamped to "
        f"[{settings.min_depth:g}, {settings.max_depth:g}] m"
    )
