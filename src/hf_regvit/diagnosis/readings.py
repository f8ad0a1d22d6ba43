"""Read norms, attention and directions of tokens for a diagnosis, batch by batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.preparation import PreparedImages, SkippedImage
from ..data.source import ImageSource
from ..models.families import unwrapped
from ..models.tokens import Layers, Reduction, Site, TokenReader, TokenReading
from .outliers import attention_statistics, neighbor_similarity

MIN_IMAGES = 8  # with fewer, `diagnose` raises an error
ENOUGH_IMAGES = 500  # with fewer, the report has a warning: the cut-offs of two samples may differ by over 10 %

Array = NDArray[np.float32]
_Name = TypeVar("_Name")  # of rows


@dataclass(eq=False)
class Readings:
    """Result of one pass over n images: numbers per token, never whole tokens, and the pixels of a few images."""

    ids: list[str]
    grid: tuple[int, int]
    norms: dict[int, Array]  # layer: (n, N)
    cls_norms: dict[int, Array]  # layer: (n,); empty without CLS
    register_norms: dict[int, Array]  # layer: (n, R); empty without registers
    neighbors: Array  # (n, N)
    attention: Array | None  # (n, N) CLS -> patches in the last block, mean over heads
    attention_statistics: dict[str, Array]  # each (n,)
    kept: list[int]  # indices of the images in `pixels`
    pixels: Tensor  # (kept, 3, H, W)
    skipped: list[SkippedImage]


def blocks_of(reader: TokenReader) -> list[nn.Module]:
    """Return the blocks of a model, without wrappers."""
    return [unwrapped(block) for block in reader.tower.get_submodule(reader.family.blocks).children()]


def token_norms(tokens: Tensor, layer: int) -> Tensor:
    """Reduce tokens to their norms, (B, T)."""
    return tokens.float().norm(dim=-1).cpu()


def normalized(reader: TokenReader, tokens: Tensor) -> Tensor:
    """Return raw tokens of the last block (B, T, D) after the final norm, float32 on the CPU."""
    with torch.no_grad():
        return reader.final_norm(tokens).float().cpu()


def read_norms(
    reader: TokenReader, pixel_values: Tensor, layers: Layers, *, num_last: int = 0
) -> tuple[dict[Site, TokenReading], Tensor]:
    """Read token norms (B, T), patch embeddings and the attention (B, heads, T) of CLS, if any, in one forward pass.

    Returns:
        The readings, and the tokens of the last block after the final norm for the first `num_last` images, (b, T, D).
    """
    last: list[Tensor] = []

    def norms(tokens: Tensor, layer: int) -> Tensor:
        if num_last and layer == reader.description.num_layers:
            last.append(tokens[:num_last])
        return token_norms(tokens, layer)

    sites: dict[Site, Layers] = {"residual": layers, "patch_embedding": (0,)}
    sites |= {"attention": (-1,)} if reader.description.has_cls and reader.reads_attention else {}
    reduce: dict[Site, Reduction] = {"residual": norms, "attention": lambda rows, _: rows[:, :, 0].float().cpu()}
    read = reader.read_many(pixel_values, sites, reduce=reduce)
    return read, normalized(reader, last[0]) if last else torch.empty(0)


def read_images(
    reader: TokenReader, images: PreparedImages, layers: Layers, *, num_details: int, max_images: int, progress: bool
) -> Readings:
    """Run one forward pass over every image; images of a single color are skipped."""
    stride = max(1, min(images.total or max_images, max_images) // num_details)
    used: list[str] = []
    flat: list[SkippedImage] = []
    first: TokenReading | None = None
    norms, others, pixels = Rows[int](), Rows[str](), Rows[str]()
    kept: list[int] = []
    with tqdm(total=images.total, desc="images", unit="img", disable=not progress) as bar:
        for names, batch in images:
            bar.update(len(names))
            varied = (batch.amax(dim=(2, 3)) - batch.amin(dim=(2, 3))).amax(dim=1) > 1e-6  # (B,)
            flat += [SkippedImage(name, "single color") for name, keep in zip(names, varied) if not keep]
            ids, batch = [name for name, keep in zip(names, varied) if keep], batch[varied]
            if not ids:
                continue
            reading, values = _read_batch(reader, batch, ids, layers)
            first = first or replace(reading, values=())
            check_grid(ids[0], reading.grid, first.grid)
            norms.add(dict(zip(reading.layers, reading.values)))
            others.add(values)
            chosen = [i for i in range(len(ids)) if (len(used) + i) % stride == 0][: num_details - len(kept)]
            pixels.add({"pixels": batch[chosen]})
            kept += [len(used) + i for i in chosen]
            used += ids
    skipped = [*images.skipped, *flat]
    if first is None or len(used) < MIN_IMAGES:
        raise ValueError(
            f"{len(used)} images can be used ({len(skipped)} were skipped{first_reason(skipped)}). A diagnosis needs "
            f"at least {MIN_IMAGES} images, and {ENOUGH_IMAGES} for reproducible numbers. Add more images."
        )
    of_layer = {layer: rows.numpy() for layer, rows in norms.joined().items()}  # (n, T)
    prefix, registers = first.num_prefix_tokens, first.num_register_tokens
    values_of_all = {name: rows.numpy() for name, rows in others.joined().items()}
    return Readings(
        ids=used,
        grid=first.grid,
        norms={layer: rows[:, prefix:] for layer, rows in of_layer.items()},
        cls_norms={layer: rows[:, 0] for layer, rows in of_layer.items()} if first.has_cls else {},
        register_norms={k: rows[:, prefix - registers : prefix] for k, rows in of_layer.items()} if registers else {},
        neighbors=values_of_all.pop("neighbors"),
        attention=values_of_all.pop("attention", None),
        attention_statistics=values_of_all,
        kept=kept,
        pixels=pixels.joined()["pixels"],
        skipped=skipped,
    )


class Rows(Generic[_Name]):
    """Rows of many images by name, in buffers that double: small tensors kept apart would fragment the memory."""

    def __init__(self) -> None:
        self.count = 0
        self.buffers: dict[_Name, Tensor] = {}

    def add(self, values: Mapping[_Name, Tensor]) -> None:
        """Append tensors (B, ...) to the buffers."""
        start, self.count = self.count, self.count + len(next(iter(values.values())))
        for name, rows in values.items():
            buffer = self.buffers.setdefault(name, torch.empty(128, *rows.shape[1:], dtype=rows.dtype))
            if len(buffer) < self.count:
                buffer.resize_(max(2 * len(buffer), self.count), *buffer.shape[1:])  # keeps the rows
            buffer[start : self.count] = rows

    def joined(self) -> dict[_Name, Tensor]:
        """Return the rows (n, ...) by name."""
        return {name: buffer[: self.count] for name, buffer in self.buffers.items()}


def labels_of(source: object, ids: Sequence[str]) -> Tensor | None:
    """Return the class ids of these images, or None if the source has none."""
    if not isinstance(source, ImageSource) or source.labels is None:
        return None
    by_id = dict(zip(source.ids, source.labels))
    return torch.tensor([by_id[name] for name in ids])


def check_grid(name: str, grid: tuple[int, int], expected: tuple[int, int]) -> None:
    """Raise if an image has another grid of patches than the images before it."""
    if grid != expected:
        raise ValueError(
            f"Image '{name}' has {grid[0]} x {grid[1]} patches, but the images before it have {expected[0]} x "
            f"{expected[1]}. All images need the same grid. Use an image processor that crops to one size."
        )


def first_reason(skipped: Sequence[SkippedImage]) -> str:
    """Return the first skipped image and its reason as a part of a sentence."""
    return f", e.g. '{skipped[0].id}': {skipped[0].reason}" if skipped else ""


def _read_batch(
    reader: TokenReader, pixel_values: Tensor, ids: Sequence[str], layers: Layers
) -> tuple[TokenReading, dict[str, Tensor]]:
    """Return token norms, and per image: neighbor similarities, the attention of CLS to patches, its statistics."""
    reading, _ = read_norms(reader, pixel_values, layers)
    residual, embedding = reading["residual"], reading["patch_embedding"]
    for layer, norms in zip(residual.layers, residual.values):
        if not torch.isfinite(norms).all():
            worst = ids[int((~torch.isfinite(norms)).any(dim=1).nonzero()[0])]
            raise ValueError(
                f"Image '{worst}' has NaN or infinite tokens at block {layer}. Check the weights and the pixels."
            )
    values = {"neighbors": neighbor_similarity(embedding.values[0].cpu(), residual.grid)}
    if "attention" in reading:
        row, prefix = reading["attention"].values[0], residual.num_prefix_tokens  # (B, heads, T)
        values["attention"] = row.mean(dim=1)[:, prefix:]
        values |= attention_statistics(row, num_prefix_tokens=prefix, num_register_tokens=residual.num_register_tokens)
    return residual, values
