"""From images to training batches: the multi-crop data set, its sampler, block masks, and the collator.

Shape letters: B images, G global crops (2), L local crops, S and s side of a global and a local crop in pixels,
N patches of a global crop, M masked patches of the batch. Flattened crops are crop-major: crop 0 of all images first.

Every random draw is a pure function of (seed, epoch, sample id, view), so neither the number of workers nor a stop in
the middle of an epoch changes a single pixel.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .augmentation import MultiCrop, normalize_pixels
from .images import ImageSource


class MultiCropDataset(Dataset[dict[str, Any]]):
    """Crops of the images of a source, indexed by `(epoch, index)` as `EpochSampler` yields them.

    Each item: `global_crops` (2, 3, S, S) and `local_crops` (L, 3, s, s) uint8, `sample_id` and `epoch` int.

    Args:
        source: The images.
        multi_crop: The augmentation.
        seed: Of the run.
        cache_bytes: Decoded pictures kept in memory, per process. Small sources fit, large ones decode again.
    """

    def __init__(
        self, source: ImageSource, multi_crop: MultiCrop, *, seed: int, cache_bytes: int = 256 * 2**20
    ) -> None:
        self.source, self.multi_crop, self.seed, self.cache_bytes = source, multi_crop, seed, cache_bytes
        self._cache: dict[int, Image.Image] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        if not isinstance(key, tuple):
            raise TypeError(f"MultiCropDataset[{key!r}]: expected (epoch, index). Use EpochSampler as the sampler.")
        import cv2

        if torch.utils.data.get_worker_info() is not None and cv2.getNumThreads() > 1:
            cv2.setNumThreads(1)  # one worker is one core; OpenCV's pool would fight with the other workers
        epoch, index = key
        crops = self.multi_crop(self._image(index), seed=self.seed, epoch=epoch, sample_id=index)
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


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields `(epoch, index)` in an order that depends on the seed and the epoch alone.

    The order is that of the whole run; processes take their shares of it. So the images of a step are the same on any
    number of processes, and a position in the order is all that a stopped run has to remember.

    Args:
        num_samples: Images in the data set.
        seed: Of the run.
        images_per_step: Images of an optimizer step over all processes; an epoch is cut to a multiple of it.
    """

    def __init__(self, num_samples: int, *, seed: int, images_per_step: int = 1) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples}: there is nothing to sample from.")
        if not 1 <= images_per_step <= num_samples:
            raise ValueError(f"images_per_step={images_per_step}; expected 1 to the {num_samples} images there are.")
        self.num_samples, self.seed, self.epoch = num_samples, seed, 0
        self.images_per_step = images_per_step
        self.start = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; Trainer and accelerate call it."""
        self.epoch = epoch

    def start_at(self, epoch: int, offset: int) -> None:
        """Leaves out the first `offset` images when `epoch` is iterated; other epochs are whole."""
        self.start = (epoch, offset)

    def position(self, steps: int) -> tuple[int, int]:
        """Epoch and offset in it, in images, after `steps` optimizer steps from where `start_at` was told to start."""
        epoch, offset = self.start
        left = (self.num_samples - offset) // self.images_per_step
        if steps < left:
            return epoch, offset + steps * self.images_per_step
        per_epoch = self.num_samples // self.images_per_step
        epochs, rest = divmod(steps - left, per_epoch)
        return epoch + 1 + epochs, rest * self.images_per_step

    def __len__(self) -> int:
        return self.num_samples // self.images_per_step * self.images_per_step

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        offset = self.start[1] if epoch == self.start[0] else 0
        stop = offset + (self.num_samples - offset) // self.images_per_step * self.images_per_step
        for index in np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)[offset:stop]:
            yield epoch, int(index)


def block_mask(
    grid: tuple[int, int],
    num_masked: int,
    rng: random.Random,
    *,
    min_patches: int = 4,
    max_patches: int | None = None,
    min_aspect: float = 0.3,
) -> np.ndarray:
    """Mask a patch grid with random rectangles until `num_masked` patches are hidden, or a few less.

    Args:
        grid: (rows, columns) of patches.
        num_masked: Patches to hide. The result never has more, and usually 0 to 2 less: ten failed tries end it.
        rng: Source of the draws.
        min_patches: Smallest area a rectangle is drawn for, patches.
        max_patches: Most patches that one rectangle may add; default half of the grid as dinov2 computes it.
        min_aspect: Smallest height / width of a rectangle; the largest is its inverse.

    Returns:
        (rows, columns) bool, True = hidden from the student.

    Source: arXiv 2106.08254 (BEiT); dinov2 `data/masking.py` for the order of the draws.
    """
    rows, columns = grid
    max_patches = (rows // 2) * columns if max_patches is None else max_patches
    log_aspect = (math.log(min_aspect), math.log(1 / min_aspect))
    mask = np.zeros(grid, dtype=bool)
    count = 0
    while count < num_masked:
        cap = min(num_masked - count, max_patches)
        for _ in range(10):
            area = rng.uniform(min_patches, cap)
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
    """Masks for all global crops of a batch, (num_crops, rows, columns) bool.

    `int(num_crops * mask_probability)` crops get a mask. The range of ratios is cut into as many equal strips, one per
    masked crop, so the total over the batch hardly varies; then all masks are shuffled over the crops.

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
    """Where the masked patches are, and how much each counts.

    Args:
        masks: (..., N) bool, one row per crop.

    Returns:
        `mask_indices` (M,) int64 into the flattened masks, and `mask_weights` (M,) float32: one divided by the number
        of masked patches of the same crop, so that every masked crop counts alike.
    """
    rows = masks.flatten(0, -2)  # (crops, N)
    weights = (1.0 / rows.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(rows)
    return rows.flatten().nonzero().flatten(), weights[rows]


@dataclass(frozen=True)
class DinoCollator:
    """Stacks the items of `MultiCropDataset` crop-major and draws the masks of the global crops.

    Call it with a list of B items. The batch has `global_crops` (2, B, 3, S, S), `local_crops` (L, B, 3, s, s),
    `masks` (2, B, N) bool, `mask_indices` (M,) int64 into the flattened masks, `mask_weights` (M,) float32. The masks
    depend on the seed, the epoch and the ids of the items only.

    Args:
        grid: (rows, columns) of patches of a global crop.
        mask_ratio: Smallest and largest share of patches hidden in a masked crop.
        mask_probability: Share of global crops that are masked.
        seed: Of the run.
    """

    grid: tuple[int, int]
    mask_ratio: Sequence[float] = (0.1, 0.5)
    mask_probability: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.mask_ratio
        if not 0 <= low <= high <= 1 or not 0 <= self.mask_probability <= 1:
            raise ValueError(
                f"mask_ratio=({low}, {high}) must be in order within [0, 1], and mask_probability="
                f"{self.mask_probability} within [0, 1]."
            )

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate B items into one batch."""
        global_crops = _stack_crops(samples, "global_crops")  # (2, B, 3, S, S)
        local_crops = _stack_crops(samples, "local_crops")  # (L, B, 3, s, s)
        num_crops, batch_size = global_crops.shape[:2]
        entropy = [self.seed, samples[0]["epoch"], *(sample["sample_id"] for sample in samples)]
        rng = random.Random(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
        drawn = batch_masks(
            self.grid,
            num_crops * batch_size,
            rng,
            mask_ratio=self.mask_ratio,
            mask_probability=self.mask_probability,
        )
        masks = torch.from_numpy(drawn).view(num_crops, batch_size, -1)  # (2, B, N)
        mask_indices, mask_weights = masked_positions(masks)
        return {
            "global_crops": global_crops,
            "local_crops": local_crops,
            "masks": masks,
            "mask_indices": mask_indices,
            "mask_weights": mask_weights,
        }


def _stack_crops(samples: Sequence[dict[str, Any]], name: str) -> Tensor:
    """Crop-major, (n, B, 3, H, W) float32; 8-bit crops are normalised here, once for the batch."""
    crops = torch.stack([sample[name] for sample in samples], dim=1)
    return normalize_pixels(crops) if crops.dtype == torch.uint8 else crops
