"""Frozen patch features: how to read them (`FeatureSettings`), and maps of images for segmentation and depth heads."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.maps import DenseSource
from ..data.preparation import prepare_images
from ..models.loading import open_model
from ..models.results import Record, markdown_table
from ..models.saving import read_object, write_json
from ..models.tokens import Layers, Site, TokenReader, TokenReading, finite_values, resolve_layers
from .intervals import STATISTICS, paired_difference
from .metrics import DepthErrors, MeanIoU

# Views as (flipped, number of patches by which the image is rolled down and right). The views of the flipped image are
# the same ones, so the average of the flipped image is exactly the flipped average.
_VIEWS = ((False, 0), (True, 0), (False, 1), (True, 1))


# --- Settings


@dataclass(frozen=True)
class FeatureSettings:
    """Settings of the patch features to read from a model; `regvit dense` chooses them and writes them to a file.

    Args:
        layer: Block to read: 1 to the depth, 0 for the embedding, negative numbers to count from the end.
        views: Number of views to average, 1 or 4: the image, its mirror image, and both rolled by one patch.
        image_size: Side of the image in pixels (the shorter one for whole images). Default: the model's own.
        pool_to_grid: Whether to average patches of a larger image down to the grid of the model's own size.
        model: Sizes of the model for which the settings were chosen, or None to accept any model.
    """

    layer: int = -1
    views: int = 1
    image_size: int | None = None
    pool_to_grid: bool = False
    model: Record | None = None

    def __post_init__(self) -> None:
        if type(self.layer) is not int:
            raise ValueError(f"layer={self.layer!r} is not a whole number. Use a block number, such as 9 or -1.")
        if self.views not in (1, len(_VIEWS)):
            raise ValueError(f"views={self.views!r} must be 1 or {len(_VIEWS)}.")
        if self.image_size is not None and (type(self.image_size) is not int or self.image_size < 1):
            raise ValueError(f"image_size={self.image_size!r} must be a positive number of pixels, or None.")
        if type(self.pool_to_grid) is not bool:
            raise ValueError(f"pool_to_grid={self.pool_to_grid!r} must be true or false.")

    def save(self, path: str | Path) -> None:
        """Write the settings to a JSON file."""
        write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "FeatureSettings":
        """Read settings that `save` has written.

        Raises:
            ValueError: The file has other keys or invalid values.
        """
        values = read_object(Path(path))
        if unknown := set(values) - {one.name for one in fields(cls)}:
            raise ValueError(f"'{path}' is not a file of feature settings: unknown {', '.join(sorted(unknown))}.")
        return cls(**values)

    def for_reader(self, reader: TokenReader) -> "FeatureSettings":
        """Return the settings with a resolved block, checked against a model.

        Raises:
            ValueError: The model has no such block, does not take this image size, or has other sizes than the model
                for which the settings were chosen.
        """
        sizes, d = model_sizes(reader), reader.description
        if self.model is not None and self.model != sizes:
            raise ValueError(
                f"The settings were chosen for a model with {self.model}, but this one has {sizes}. Run regvit dense "
                "for this model, or use settings without `model`."
            )
        if self.image_size is not None and (rest := [step for step in d.patch_size if self.image_size % step]):
            nearest = max(1, round(self.image_size / rest[0])) * rest[0]
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of the patch size {rest[0]}. Use {nearest}."
            )
        if self.image_size not in (None, min(d.image_size)) and not reader.takes_other_sizes:
            raise ValueError(f"{d.name} reads only {d.image_size} pixels, not image_size={self.image_size}.")
        return replace(self, layer=resolve_layers((self.layer,), d.num_layers)[0])


def model_sizes(reader: TokenReader) -> Record:
    """Return the sizes of a model that settings depend on."""
    d = reader.description
    sizes = {"num_layers": d.num_layers, "hidden_size": d.hidden_size}
    return sizes | {"patch_size": list(d.patch_size), "image_size": list(d.image_size), "family": reader.family_name}


def settings_for(settings: FeatureSettings | str | Path | None, reader: TokenReader, **given: Any) -> FeatureSettings:
    """Return checked settings from an object, a file or single values; values of None and False are not given.

    Raises:
        ValueError: Both settings and single values are given, or they do not fit the model.
    """
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    if settings is None:
        return FeatureSettings(**given).for_reader(reader)
    if given:
        raise ValueError(f"settings and {', '.join(given)} are given, but settings contain them. Leave out one.")
    found = settings if isinstance(settings, FeatureSettings) else FeatureSettings.load(settings)
    return found.for_reader(reader)


# --- Reading


def read_views(
    reader: TokenReader,
    pixel_values: Tensor,
    layers: Sequence[int],
    *,
    views: int = 1,
    grid: tuple[int, int] | None = None,
    final_norm: bool = True,
) -> TokenReading:
    """Read blocks of several views, with the final norm unless it is switched off; see `read_sites_of_views`."""
    norm = reader.final_norm if final_norm else None
    sites: dict[Site, Sequence[int]] = {"residual": layers}
    return read_sites_of_views(reader, pixel_values, sites, views=views, grid=grid, norm=norm)["residual"]


def read_sites_of_views(
    reader: TokenReader,
    pixel_values: Tensor,
    sites: Mapping[Site, Sequence[int]],
    *,
    views: int = 1,
    grid: tuple[int, int] | None = None,
    norm: nn.Module | None = None,
) -> dict[Site, TokenReading]:
    """Read several views one after another, map their patches back, and average them, on the CPU in float32.

    Args:
        reader: Reader of the model.
        pixel_values: (B, 3, H, W) normalized pixels.
        sites: Blocks to read of each site, other than attention, in one forward pass per view.
        views: Number of views, 1 or 4. The time is proportional to it; the memory is that of the sum and one view.
        grid: (rows, columns) to which the patches are averaged. Default: no pooling.
        norm: Module to apply to the tokens before averaging, such as the final norm. Default: none.

    Raises:
        ValueError: The sides are not multiples of the patch size, so that views cannot be mapped back exactly.
    """
    patch, prefix = reader.description.patch_size, reader.description.num_prefix_tokens
    if views > 1 and any(side % step for side, step in zip(pixel_values.shape[-2:], patch)):
        raise ValueError(
            f"views={views} needs image sides that are multiples of the patch size {patch}, not "
            f"{tuple(pixel_values.shape[-2:])}. Set image_size to a multiple, or use views=1."
        )
    norm = norm or nn.Identity()
    total: dict[Site, list[Tensor]] = {site: [] for site in sites}
    readings: dict[Site, TokenReading] = {}
    for flipped, shift in _VIEWS[:views]:
        view = pixel_values.flip(-1) if flipped else pixel_values
        view = view.roll((shift * patch[0], shift * patch[1]), dims=(-2, -1))
        readings = reader.read_many(view, sites, reduce=dict.fromkeys(sites, lambda x, _: norm(x).float().cpu()))
        for site, index, tokens in ((s, i, x) for s, one in readings.items() for i, x in enumerate(one.values)):
            maps = tokens[:, prefix:].unflatten(1, readings[site].grid).roll((-shift, -shift), dims=(1, 2))
            maps = maps.flip(2) if flipped else maps  # (B, rows, columns, D)
            if grid is not None:
                maps = F.adaptive_avg_pool2d(maps.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)
            restored = torch.cat([tokens[:, :prefix], maps.flatten(1, 2)], dim=1) / views
            sums = total[site]
            sums[index : index + 1] = [sums[index] + restored if len(sums) > index else restored]
    return {site: replace(one, values=tuple(total[site]), grid=grid or one.grid) for site, one in readings.items()}


def pooled_grid(reader: TokenReader, pixels: Tensor, image_size: int | None, pool: bool) -> tuple[int, int] | None:
    """Return the grid of the image at the model's own size, or None if nothing is pooled."""
    d = reader.description
    if not pool or image_size is None or image_size <= min(d.image_size):
        return None
    scale = min(d.image_size) / image_size
    sides = zip(pixels.shape[-2:], d.patch_size)
    rows, columns = (max(1, round(side // step * scale)) for side, step in sides)
    return rows, columns


def patch_maps(
    model: TokenReader | nn.Module | str | Path,
    images: object,
    *,
    layer: int | None = None,
    views: int | None = None,
    image_size: int | None = None,
    pool_to_grid: bool = False,
    settings: FeatureSettings | str | Path | None = None,
    batch_size: int = 32,
) -> np.ndarray:
    """Return the patches of one block after the final norm, (n, rows, columns, D) float32.

    The cost is one forward pass per view. Twice the image size takes four times as many patches, and more than four
    times as long because of attention. Views are read one after another, so they need no additional memory.

    Args:
        model: Name, module or reader; see `open_model`.
        images: One image or a sequence of images that have one size after the transform; see `open_images`.
        layer: Block to read: 1 to L, 0 for the embedding, negative numbers to count from the end. Default: the last.
        views: Number of flipped and shifted views to average, 1 or 4. Default: 1.
        image_size: Side of a center crop in pixels. Default: the model's own transform.
        pool_to_grid: Whether to average the patches of a larger image down to the grid of the model's own size.
        settings: `FeatureSettings`, or a file that `regvit dense` has written, instead of the four values.
        batch_size: Number of images per forward pass.

    Raises:
        UnknownProcessorError: The image processor of the model is not known.
        ValueError: A setting is invalid or does not fit the model, or the images have several sizes.
        BadImageError: An image cannot be used.
    """
    reader = open_model(model)
    chosen = settings_for(settings, reader, layer=layer, views=views, image_size=image_size, pool_to_grid=pool_to_grid)
    maps = []
    for pixels in reader.batches(images, batch_size, one_size=True, image_size=chosen.image_size):
        grid = pooled_grid(reader, pixels, chosen.image_size, chosen.pool_to_grid)
        reading = read_views(reader, pixels, (chosen.layer,), views=chosen.views, grid=grid)
        finite_values(reading)
        maps.append(reading.patches().unflatten(1, reading.grid))
    return torch.cat(maps).numpy()


_FOUR_BLOCKS = {12: (3, 6, 9, 12), 24: (5, 12, 18, 24), 40: (10, 20, 30, 40)}


# --- Features


@dataclass(frozen=True, eq=False)
class DenseFeatures:
    """Patch token maps and CLS tokens of many images, from one or several blocks, on the CPU.

    Args:
        maps: n tensors (rows, columns, F), blocks concatenated; grids may differ.
        cls: (n, F) CLS tokens, or None for a model without CLS.
        flipped: Features of the horizontally flipped images, or None.
        ids: Names of the n images.
        patch_size: (height, width) in pixels; an image was read at rows x height by columns x width pixels.
        layers: Blocks, from 1 to the depth of the model.
        transform: Description of the preprocessing.
        seconds: Wall time of the extraction.
    """

    maps: tuple[Tensor, ...]
    cls: Tensor | None
    flipped: "DenseFeatures | None"
    ids: tuple[str, ...]
    patch_size: tuple[int, int]
    layers: tuple[int, ...]
    transform: str
    seconds: float

    def __len__(self) -> int:
        return len(self.maps)

    @property
    def width(self) -> int:
        """Return F, the number of features per patch."""
        return self.maps[0].shape[-1]

    def input_size(self, index: int) -> tuple[int, int]:
        """Return the (height, width) in pixels at which an image was read."""
        rows, columns = self.maps[index].shape[:2]
        return rows * self.patch_size[0], columns * self.patch_size[1]


def four_blocks(num_layers: int) -> tuple[int, ...]:
    """Return the four blocks of the "lin-4" protocol, counted from 1.

    Models of 12, 24 and 40 blocks use the published blocks; other models use the ends of their quarters.
    """
    if num_layers < 4:
        raise ValueError(f"The model has {num_layers} blocks, but at least 4 are needed. Use layers=(-1,) instead.")
    return _FOUR_BLOCKS.get(num_layers) or tuple(math.ceil(num_layers * part / 4) for part in range(1, 5))


def read_dense_features(
    model: TokenReader | nn.Module | str,
    images: object,
    *,
    layers: Sequence[int] = (-1,),
    image_size: int | None = None,
    views: int = 1,
    pool_to_grid: bool = False,
    flip: bool = True,
    batch_size: int = 16,
) -> DenseFeatures:
    """Read the patch tokens of every image once, from whole images with their own aspect ratio, after the final norm.

    Args:
        model: Name, module or reader; see `open_model`. It is not modified.
        images: Images as for `prepare_images`: a folder, `ImageSource`, paths, Pillow images or `datasets` data set.
        layers: Blocks, from 1 to the depth, or negative from the end. `four_blocks` returns those of "lin-4".
        image_size: Shorter side in pixels; both sides are rounded to whole patches. Default: the model's own.
        views: Number of views to average, 1 or 4; see `read_views`.
        pool_to_grid: Whether to average the patches of a larger image down to the grid of the model's own size.
        flip: Whether to also read the flipped images, for training with flips and for the averaged test of depth.
        batch_size: Number of images per forward pass, if their sizes agree.

    Raises:
        ValueError: The family or block is unknown, or an image cannot be used, which would leave its target unpaired.
    """
    started, reader = time.perf_counter(), open_model(model)
    transform = reader.transform_for(image_size=image_size, keep_aspect=True)
    blocks = resolve_layers(tuple(layers), reader.description.num_layers)
    prepared = prepare_images(images, transform, batch_size=batch_size)
    ids: list[str] = []
    kept: tuple[list[Tensor], list[Tensor]] = ([], [])
    kept_cls: tuple[list[Tensor], list[Tensor]] = ([], [])

    def read(pixel_values: Tensor, side: int) -> None:
        grid = pooled_grid(reader, pixel_values, image_size, pool_to_grid)
        reading = read_views(reader, pixel_values, blocks, views=views, grid=grid)
        maps = torch.cat([reading.patches(layer) for layer in blocks], dim=-1)  # (B, N, F)
        kept[side].extend(maps.unflatten(1, reading.grid).unbind(0))
        if reading.has_cls:
            kept_cls[side].append(torch.cat([reading.at(layer)[:, 0] for layer in blocks], dim=-1))

    for names, pixel_values in prepared:
        ids.extend(names)
        read(pixel_values, 0)
        if flip:
            read(pixel_values.flip(-1), 1)
    if prepared.skipped:
        first = prepared.skipped[0]
        raise ValueError(
            f"{len(prepared.skipped)} of {len(ids) + len(prepared.skipped)} images cannot be used, first "
            f"'{first.id}': {first.reason}. Their targets would have no images; remove these images from the data."
        )
    seconds = time.perf_counter() - started
    suffix = f", {views} views averaged" if views > 1 else ""
    suffix += ", pooled to the grid of the model's image size" if pool_to_grid else ""

    def features(side: int, mirrored: DenseFeatures | None) -> DenseFeatures:
        return DenseFeatures(
            maps=tuple(kept[side]),
            cls=torch.cat(kept_cls[side]) if kept_cls[side] else None,
            flipped=mirrored,
            ids=tuple(ids),
            patch_size=reader.description.patch_size,
            layers=blocks,
            transform=transform.description + suffix,
            seconds=seconds,
        )

    return features(0, features(1, None) if flip else None)


# --- Choice of the settings

_RIDGE = 1e-3  # relative to the mean variance of the features


@dataclass(frozen=True, eq=False)
class FeatureChoice:
    """Settings chosen on one half of the test images and compared with the defaults on the other half.

    Args:
        task: "segmentation" or "depth".
        metric: "mean_iou" (higher is better) or "rmse" in meters (lower is better).
        settings: Chosen settings.
        candidates: Settings, score on either half and seconds per image of each candidate; the first is the default.
        chosen: Index of the chosen candidate.
        difference: Chosen minus default score on the test half.
        interval: 95 % interval of the difference, from a paired bootstrap over images.
        counts: Numbers of training, choice and test images.
        seed: Random seed of the halves and of the interval.
    """

    task: str
    metric: str
    settings: FeatureSettings
    candidates: tuple[Record, ...]
    chosen: int
    difference: float
    interval: tuple[float, float]
    counts: tuple[int, int, int]
    seed: int

    def summary(self) -> str:
        """Return a table of the default, the best block of each way of reading, and the choice."""
        best: dict[tuple, int] = {}
        sign = 1 if self.metric == "mean_iou" else -1
        for index, one in enumerate(self.candidates):
            key = (one["views"], one["image_size"])
            if key not in best or sign * (one["choice"] - self.candidates[best[key]]["choice"]) > 0:
                best[key] = index
        shown = list(dict.fromkeys([0, *best.values(), self.chosen]))
        names = ["layer", "views", "image_size", "pool_to_grid", "choice", "test", "seconds"]
        rows: list[list[object]] = [["", *names]]
        for index in shown:
            label = " and ".join(["default"] * (index == 0) + ["chosen"] * (index == self.chosen))
            one = self.candidates[index]
            rows.append([label, *(f"{one[n]:.4f}" if isinstance(one[n], float) else one[n] for n in names)])
        low, high = self.interval
        return (
            f"{markdown_table(rows)}\n\n{self.metric} of a ridge probe: {self.difference:+.4f} ({low:+.4f} to "
            f"{high:+.4f}) over the default on {self.counts[2]} test images. The settings were chosen on "
            f"{self.counts[1]} other images and the probes fitted on {self.counts[0]} training images."
        )

    def save(self, folder: str | Path) -> Path:
        """Write dense_settings.json and the whole result, dense_features.json, and return the path of the former."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder, "dense_features.json"), asdict(self))
        self.settings.save(Path(folder, "dense_settings.json"))
        return Path(folder, "dense_settings.json")


def choose_features(
    model: TokenReader | nn.Module | str | Path,
    train: DenseSource,
    test: DenseSource,
    *,
    layers: Layers = "all",
    views: Sequence[int] = (1, 4),
    image_sizes: Sequence[int] | None = None,
    pool_to_grid: bool = False,
    batch_size: int = 8,
    seed: int = 0,
) -> FeatureChoice:
    """Choose the block, views and image size whose patches a linear probe reads best.

    Every combination of views and image size is read once, all blocks in the same forward pass. A ridge regression per
    block predicts the shares of the classes, or the mean depth, of each patch; its predictions are upsampled to the
    maps. The memory is that of one batch and of one D x D matrix per block.

    Args:
        model: Name, module or reader; see `open_model`.
        train: Training images with masks or depth maps.
        test: Test images. The settings are chosen on a random half of them and compared on the other half.
        layers: Blocks to compare, or "all".
        views: Numbers of views to compare, among 1 and 4.
        image_sizes: Shorter image sides to compare, in pixels. Default: the model's own.
        pool_to_grid: Whether to average the patches of larger images down to the grid of the model's own size.
        batch_size: Number of images per forward pass.
        seed: Random seed of the halves and of the interval.

    Raises:
        ValueError: A value does not fit the model, an image cannot be used, or there are fewer than 4 test images.
    """
    reader = open_model(model)
    own, depth = min(reader.description.image_size), reader.description.num_layers
    blocks, sizes = resolve_layers(layers, depth), list(image_sizes or (own,))
    pairs = [(1, own), *((v, s) for s in sizes for v in views if (v, s) != (1, own))]  # the default comes first
    options = [FeatureSettings(-1, v, s, pool_to_grid and s > own).for_reader(reader) for v, s in pairs]
    blocks = (depth, *(block for block in blocks if block != depth))
    candidates: list[Record] = []
    rows: list[np.ndarray] = []
    for one in options:
        scored, seconds = probe_rows(reader, train, test, blocks, one, batch_size)
        for block in blocks:
            candidates.append(asdict(replace(one, layer=block)) | {"seconds": round(seconds, 4)})
            rows.append(scored[block])
    count = len(rows[0])
    if count < 4:
        raise ValueError(f"{count} test images with a map are too few to choose and to compare. Use at least 4.")
    order = np.random.default_rng(seed).permutation(count)
    choice, judged = order[: count // 2], order[count // 2 :]
    if test.kind == "masks":
        task, metric, sign, statistic = "segmentation", "mean_iou", 1, STATISTICS["mean_iou"]
    else:
        task, metric, sign, statistic = "depth", "rmse", -1, STATISTICS["mean"]
    for candidate, found in zip(candidates, rows):
        candidate |= {"choice": statistic(found[choice]), "test": statistic(found[judged])}
    chosen = max(range(len(rows)), key=lambda index: sign * candidates[index]["choice"])
    difference, interval = paired_difference(rows[0][judged], rows[chosen][judged], seed=seed, statistic=statistic)
    values = {one.name: candidates[chosen][one.name] for one in fields(FeatureSettings)}
    settings = FeatureSettings(**values | {"model": model_sizes(reader)})
    counts = len(train), len(choice), len(judged)
    return FeatureChoice(task, metric, settings, tuple(candidates), chosen, difference, interval, counts, seed)


def probe_rows(
    reader: TokenReader,
    train: DenseSource,
    test: DenseSource,
    blocks: Sequence[int],
    settings: FeatureSettings,
    batch_size: int,
) -> tuple[dict[int, np.ndarray], float]:
    """Fit a ridge probe per block on the training images; return its rows on the test images and seconds per image."""
    width, num_classes = reader.description.hidden_size, len(train.class_names) if train.kind == "masks" else 1
    metric = MeanIoU(num_classes=num_classes) if train.kind == "masks" else DepthErrors()
    sums = {block: torch.zeros(width + 1, width + 1 + num_classes, dtype=torch.float64) for block in blocks}
    for reading, target, index in _readings(reader, train, blocks, settings, batch_size):
        cells, weights = _cell_targets(target, num_classes, reading.grid, is_mask=train.kind == "masks")
        for block in blocks:
            tokens = reading.patches(block)[index].double()
            inputs = torch.cat([tokens, torch.ones(len(tokens), 1, dtype=torch.float64)], dim=1)
            sums[block] += (inputs * weights[:, None]).T @ torch.cat([inputs, cells], dim=1)
    probes = {block: _ridge(total) for block, total in sums.items()}
    found: dict[int, list[np.ndarray]] = {block: [] for block in blocks}
    started, probing = time.perf_counter(), 0.0
    for reading, target, index in _readings(reader, test, blocks, settings, batch_size):
        before = time.perf_counter()
        for block, (weight, bias) in probes.items():
            scores = (reading.patches(block)[index].double() @ weight + bias).T.unflatten(1, reading.grid)[None]
            scores = F.interpolate(scores.float(), size=target.shape, mode="bilinear", align_corners=False)[0]
            row = metric.reduce([scores.argmax(0) if train.kind == "masks" else scores[0]], [target])
            found[block].append(row if train.kind == "masks" else row[:, :1])  # of the errors of depth, only the rmse
        probing += time.perf_counter() - before
    seconds = (time.perf_counter() - started - probing) / len(test)
    return {block: np.concatenate(one) for block, one in found.items()}, seconds


def _readings(
    reader: TokenReader, source: DenseSource, blocks: Sequence[int], settings: FeatureSettings, batch_size: int
) -> Iterator[tuple[TokenReading, np.ndarray, int]]:
    """Yield the reading of a batch, a map, and the row of its image in the batch, in the order of the images."""
    transform = reader.transform_for(image_size=settings.image_size, keep_aspect=True)
    prepared, position = prepare_images(source, transform, batch_size=batch_size), 0
    for names, pixels in prepared:
        if prepared.skipped:
            raise ValueError(f"Image '{prepared.skipped[0].id}' cannot be used: {prepared.skipped[0].reason}.")
        grid = pooled_grid(reader, pixels, settings.image_size, settings.pool_to_grid)
        reading = read_views(reader, pixels, blocks, views=settings.views, grid=grid)
        for index in range(len(names)):
            yield reading, source.targets[position], index
            position += 1


def _cell_targets(
    target: np.ndarray, num_classes: int, grid: tuple[int, int], *, is_mask: bool
) -> tuple[Tensor, Tensor]:
    """Return the class shares or the mean depth of every cell, (N, K), and its share of valid pixels, (N,)."""
    values = torch.from_numpy(np.ascontiguousarray(target))
    if is_mask:
        planes = torch.stack([values == class_id for class_id in range(num_classes)]).double()
        valid = planes.sum(0, keepdim=True)
    else:
        valid = (values.isfinite() & (values > 0)).double()[None]
        planes = torch.nan_to_num(values, posinf=0.0, neginf=0.0).double()[None] * valid
    shares, weights = (F.adaptive_avg_pool2d(one, grid).flatten(1) for one in (planes, valid))
    return (shares / weights.clamp_min(1e-12)).T, weights[0]


def _ridge(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight (D, K) and bias (K,) from the weighted sums of [x, 1]' [x, 1, y]; the bias is not penalized."""
    width = len(sums) - 1
    total = sums[width, width]
    if total <= 0:
        raise ValueError("The training maps have no valid pixel. Check ignored values and the depth scale.")
    mean_x, mean_y = sums[width, :width] / total, sums[width, width + 1 :] / total
    covariance = sums[:width, :width] / total - torch.outer(mean_x, mean_x)
    cross = sums[:width, width + 1 :] / total - torch.outer(mean_x, mean_y)
    penalty = _RIDGE * covariance.diagonal().mean().clamp_min(1e-12) * torch.eye(width, dtype=torch.float64)
    weight = torch.linalg.solve(covariance + penalty, cross)
    return weight, mean_y - mean_x @ weight
