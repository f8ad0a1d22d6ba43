"""Training batches from images: the multi-crop data set, its sampler, block masks, and the collator.

Shape letters: B images, G global crops (2), L local crops, S and s side of a global and a local crop in pixels,
N patches of a global crop, M masked patches of the batch. Flattened crops are crop-major: crop 0 of all images first.

Every random draw is a pure function of (seed, epoch, sample id, view), so neither the number of workers nor a stop in
the middle of an epoch changes any pixel.
"""

import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..data.augmentation import MultiCrop, normalize_pixels, require_opencv
from ..data.bad_images import BadImages, TooManyBadImagesError
from ..data.decoding import BadImageError, ImageLimits, open_image
from ..data.source import ImageRecord, ImageSource
from ..data.tables import ImageStream, StreamRecord
from ..models.processing import IMAGENET_MEAN, IMAGENET_STD
from ..training.samplers import REPLACEMENTS, StreamSampler, first_usable, stream_sample_id

logger = logging.getLogger(__name__)

_MIN_PATCHES, _MIN_ASPECT = 4, 0.3  # smallest rectangle of a block mask: area in patches, height / width


Item = dict[str, Any]  # crops, sample id and epoch of an image


class _SingleThreadedDataset:
    """Base class of data sets for loader workers: disable OpenCV's thread pool, because a worker uses one core.

    The pool is disabled when the data set is created, before workers are forked from that process. In a forked worker
    it would be too late: shutting down a pool whose threads exist only in the parent never returns.
    """

    def __init__(self) -> None:
        require_opencv()
        import cv2

        cv2.setNumThreads(0)

    def __setstate__(self, state: dict[str, Any]) -> None:  # for a worker that is spawned, not forked
        _SingleThreadedDataset.__init__(self)
        self.__dict__.update(state)


class MultiCropDataset(_SingleThreadedDataset, Dataset[Item]):
    """Crops of the images of a source, indexed by `(epoch, index)` as `EpochSampler` yields them.

    Each item: `global_crops` (2, 3, S, S) and `local_crops` (L, 3, s, s) uint8, `sample_id` and `epoch` int.

    Args:
        source: Images.
        multi_crop: Augmentation.
        seed: Random seed of the run.
        bad_images: Record of images that cannot be used. Each is replaced by another one, drawn from (seed, epoch,
            index), with the crop parameters of the original. Default: the first bad image raises an error.

    Attributes:
        cache_bytes: Memory for decoded images, in bytes per process. Images that do not fit are decoded again.
    """

    def __init__(
        self, source: ImageSource, multi_crop: MultiCrop, *, seed: int, bad_images: BadImages | None = None
    ) -> None:
        super().__init__()
        self.source, self.multi_crop, self.seed, self.bad_images = source, multi_crop, seed, bad_images
        if bad_images is not None:
            for problem in source.problems:
                bad_images.note(problem)
        self._cache: dict[int, Image.Image] = {}
        self.cache_bytes, self._cached_bytes = 256 * 2**20, 0

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        if self.bad_images is None:
            image = self._image(index)
        else:
            _, image = first_usable(self._image, key, seed=self.seed, count=len(self), bad_images=self.bad_images)
        crops = self.multi_crop(image, seed=self.seed, epoch=epoch, sample_id=index)
        return {**crops, "sample_id": index, "epoch": epoch}

    def _image(self, index: int) -> Image.Image:
        image = self._cache.get(index)
        if image is None:
            image = self.source[index].image
            size = 4 * image.width * image.height  # Pillow stores RGB in four bytes
            if self._cached_bytes + size <= self.cache_bytes:
                self._cache[index] = image
                self._cached_bytes += size
        return image


class MultiCropStream(_SingleThreadedDataset, Dataset[Item]):
    """Crops of the images of streams, indexed by the keys of a `StreamSampler`; items as in `MultiCropDataset`.

    An image that cannot be used is replaced by another one of the same batch, drawn from (seed, pass, id), with the
    crop parameters of the original, so the batch size stays the same.

    Args:
        streams: Images.
        multi_crop: Augmentation.
        seed: Random seed of the run.
        weights: Probability of each stream. Default: the streams are read one after another.
        bad_images: Record of images that cannot be used. Default: the first bad image raises an error.
    """

    def __init__(
        self,
        streams: Sequence[ImageStream],
        multi_crop: MultiCrop,
        *,
        seed: int,
        weights: Sequence[float] | None = None,
        bad_images: BadImages | None = None,
    ) -> None:
        super().__init__()
        self.streams, self.multi_crop, self.seed, self.weights = list(streams), multi_crop, seed, weights
        self.bad_images = bad_images

    def sampler(self, *, rank: int = 0, world_size: int = 1) -> StreamSampler:
        """Create the sampler that reads the streams for one process, and log how a run can be resumed."""
        if rank == 0:
            logger.info(
                "Streaming %d shards of %s. A resumed run reads them again from the beginning to the position where "
                "it stopped, without decoding, and then has exactly the images of the uninterrupted run, for any "
                "number of workers. This does not hold for another number of processes or if shards have changed.",
                sum(stream.num_shards for stream in self.streams), ", ".join(stream.name for stream in self.streams),
            )  # fmt: skip
        return StreamSampler(
            self.streams, rank=rank, world_size=world_size, seed=self.seed, weights=self.weights,
            bad_images=self.bad_images,
        )  # fmt: skip

    def first_records(self, wanted: int, *, shards: int = 8) -> Iterator[ImageRecord]:
        """Yield the images to show during a run: the first good ones of evenly spaced shards, always the same.

        Args:
            wanted: Largest number of images; there are fewer if many of the first records cannot be used.
            shards: Largest number of shards to open.
        """
        reader = StreamSampler(self.streams, seed=self.seed)
        joined = reader.streams[0]
        opened = min(shards, joined.num_shards, wanted)
        found = 0
        for number in range(opened):
            share = -(-(wanted - found) // (opened - number))
            rows = islice(reader._rows(joined, number * joined.num_shards // opened), 4 * share)
            read = ((self._image(row), row) for row in rows)
            good = (ImageRecord(image, row.label, row.id) for image, row in read if isinstance(image, Image.Image))
            for record in islice(good, share):
                found += 1
                yield record

    def __getitem__(self, key: tuple[int, StreamRecord]) -> Item:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, StreamRecord]]) -> list[Item]:
        """Return the items of one batch; `DataLoader` calls this."""
        images = [self._open(*key) for key in keys]
        good = [image for image in images if image is not None]
        items = []
        for (epoch, record), image in zip(keys, images, strict=True):
            sample_id = stream_sample_id(record.id)
            if image is None:
                if not good:
                    raise TooManyBadImagesError(
                        f"None of the {len(keys)} images of a batch can be used; one of them is '{record.id}'. "
                        "Inspect the data with `regvit data-check`."
                    )
                rng = np.random.default_rng([self.seed, epoch, sample_id, REPLACEMENTS])
                image = good[int(rng.integers(len(good)))]
            crops = self.multi_crop(image, seed=self.seed, epoch=epoch, sample_id=sample_id)
            items.append({**crops, "sample_id": sample_id, "epoch": epoch})
        return items

    def _open(self, epoch: int, record: StreamRecord) -> Image.Image | None:
        image = self._image(record)
        if isinstance(image, BadImageError):
            if self.bad_images is None:
                raise image
            self.bad_images.bad(image, epoch=epoch)
            return None
        if self.bad_images is not None and epoch == 0:
            self.bad_images.good()
        return image

    def _image(self, record: StreamRecord) -> Image.Image | BadImageError:
        if record.data is None:
            return BadImageError(record.id, "the cell is empty", "empty")
        try:
            return open_image(record.data, name=record.id, limits=ImageLimits())
        except BadImageError as error:
            return error


def block_mask(
    grid: tuple[int, int], num_masked: int, rng: random.Random, *, max_patches: int | None = None
) -> np.ndarray:
    """Mask a patch grid with random rectangles until `num_masked` patches are hidden, or slightly fewer.

    Args:
        grid: (rows, columns) of patches.
        num_masked: Number of patches to hide. The result never has more, and usually 0 to 2 fewer, because the search
            ends after ten failed tries.
        rng: Random number generator.
        max_patches: Largest number of patches that one rectangle may add. Default: half of the grid as dinov2
            computes it.

    Returns:
        (rows, columns) bool, True = hidden from the student.

    Source: arXiv 2106.08254 (BEiT); dinov2 `data/masking.py` for the order of the draws.
    """
    rows, columns = grid
    max_patches = (rows // 2) * columns if max_patches is None else max_patches
    log_aspect = (math.log(_MIN_ASPECT), math.log(1 / _MIN_ASPECT))
    mask = np.zeros(grid, dtype=bool)
    count = 0
    while count < num_masked:
        cap = min(num_masked - count, max_patches)
        for _ in range(10):
            area = rng.uniform(_MIN_PATCHES, cap)
            aspect = math.exp(rng.uniform(*log_aspect))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
            block = mask[top : top + height, left : left + width]
            added = height * width - int(np.count_nonzero(block))
            if 0 < added <= cap:
                block[:] = True
                count += added
                break
        else:
            break
    return mask


def batch_masks(
    grid: tuple[int, int],
    num_crops: int,
    rng: random.Random,
    *,
    mask_ratio: Sequence[float] = (0.1, 0.5),
    mask_probability: float = 0.5,
) -> np.ndarray:
    """Draw the masks for all global crops of a batch, (num_crops, rows, columns) bool.

    `int(num_crops * mask_probability)` crops get a mask. The range of ratios is divided into as many equal intervals,
    one per masked crop, so the total over the batch hardly varies; then all masks are shuffled over the crops.

    Source: arXiv 2304.07193; dinov2 `data/collate.py` for the order of the draws.
    """
    num_masked_crops = int(num_crops * mask_probability)
    edges = np.linspace(mask_ratio[0], mask_ratio[1], num_masked_crops + 1).tolist()
    num_patches = grid[0] * grid[1]
    masks = [block_mask(grid, int(num_patches * rng.uniform(*strip)), rng) for strip in pairwise(edges)]
    masks += [np.zeros(grid, dtype=bool)] * (num_crops - num_masked_crops)
    rng.shuffle(masks)
    return np.stack(masks)


def masked_positions(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions and the loss weights of the masked patches.

    Args:
        masks: (..., N) bool, one row per crop.

    Returns:
        `mask_indices` (M,) int64 into the flattened masks, and `mask_weights` (M,) float32: one divided by the number
        of masked patches of the same crop, so that every masked crop has the same weight.
    """
    rows = masks.flatten(0, -2)  # (crops, N)
    weights = (1.0 / rows.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(rows)
    return rows.flatten().nonzero().flatten(), weights[rows]


@dataclass(frozen=True)
class DinoCollator:
    """Stack the items of `MultiCropDataset` crop-major and draw the masks of the global crops.

    Call it with a list of B items. The batch has `global_crops` (2, B, 3, S, S), `local_crops` (L, B, 3, s, s),
    `masks` (2, B, N) bool, `mask_indices` (M,) int64 into the flattened masks, `mask_weights` (M,) float32, and
    `sample_ids` and `epochs` (B,) int64, which the trainer removes before the forward pass; also `gram_crops`
    (2, B, 3, S', S') if the items have them. The masks depend only on the seed, the epoch and the ids of the items.

    Args:
        grid: (rows, columns) of patches of a global crop.
        mask_ratio: Smallest and largest share of patches hidden in a masked crop.
        mask_probability: Share of global crops that are masked.
        seed: Random seed of the run.
        mean: Mean of each channel, which is subtracted from 8-bit crops.
        std: Standard deviation of each channel.
    """

    grid: tuple[int, int]
    mask_ratio: Sequence[float] = (0.1, 0.5)
    mask_probability: float = 0.5
    seed: int = 0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, samples: Sequence[Item]) -> dict[str, Tensor]:
        """Collate B items into one batch."""
        names: list[str] = [name for name in ("global_crops", "local_crops", "gram_crops") if name in samples[0]]
        crops = {name: _stack_crops(samples, name, self.mean, self.std) for name in names}
        num_crops, batch_size = crops["global_crops"].shape[:2]
        entropy = [self.seed, samples[0]["epoch"], *(sample["sample_id"] for sample in samples)]
        rng = random.Random(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
        drawn = batch_masks(
            self.grid, num_crops * batch_size, rng, mask_ratio=self.mask_ratio, mask_probability=self.mask_probability
        )
        masks = torch.from_numpy(drawn).view(num_crops, batch_size, -1)  # (2, B, N)
        mask_indices, mask_weights = masked_positions(masks)
        return {
            **crops,
            "masks": masks,
            "mask_indices": mask_indices,
            "mask_weights": mask_weights,
            # These two are not for the model; they identify the images if a step fails.
            "sample_ids": torch.tensor([sample["sample_id"] for sample in samples]),
            "epochs": torch.tensor([sample["epoch"] for sample in samples]),
        }


def _stack_crops(samples: Sequence[Item], name: str, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Stack crop-major to (n, B, 3, H, W) float32; 8-bit crops are normalized here, once for the batch."""
    crops = torch.stack([sample[name] for sample in samples], dim=1)
    return normalize_pixels(crops, mean, std) if crops.dtype == torch.uint8 else crops
