"""Frozen patch features of a data set with a map per image, as segmentation and depth heads read them."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.preparation import prepare_images
from ..models.loading import open_model
from ..models.tokens import TokenReader, resolve_layers

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
    flip: bool = True,
    batch_size: int = 16,
) -> DenseFeatures:
    """Read the patch tokens of every image once, from whole images with their own aspect ratio, after the final norm.

    Args:
        model: Name, module or reader; see `open_model`. It is not modified.
        images: Images as for `prepare_images`: a folder, `ImageSource`, paths, Pillow images or `datasets` data set.
        layers: Blocks, from 1 to the depth, or negative from the end. `four_blocks` returns those of "lin-4".
        image_size: Shorter side in pixels; both sides are rounded to whole patches. Default: the model's own.
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
        reading = reader.read(
            pixel_values, layers=blocks, reduce=lambda tokens, layer: reader.final_norm(tokens).float().cpu()
        )
        maps = torch.cat([reading.patches(layer) for layer in blocks], dim=-1)  # (B, N, F)
        kept[side].extend(maps.unflatten(1, reading.grid).unbind(0))
        if reading.has_cls:
            kept_cls[side].append(torch.cat([reading.cls(layer) for layer in blocks], dim=-1))  # type: ignore[misc]

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

    def features(side: int, mirrored: DenseFeatures | None) -> DenseFeatures:
        return DenseFeatures(
            maps=tuple(kept[side]),
            cls=torch.cat(kept_cls[side]) if kept_cls[side] else None,
            flipped=mirrored,
            ids=tuple(ids),
            patch_size=reader.description.patch_size,
            layers=blocks,
            transform=transform.description,
            seconds=seconds,
        )

    return features(0, features(1, None) if flip else None)
