"""Read norms, attention and directions of tokens for a diagnosis, batch by batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.preparation import PreparedImages, SkippedImage
from ..models.families import ModelDescription, describe_model
from ..models.tokens import Layers, Site, read_many
from .outliers import attention_statistics, neighbor_similarity
from .report import _by

MIN_IMAGES = 8  # with fewer, `diagnose` raises an error
ENOUGH_IMAGES = 500  # with fewer, the report has a warning: the cut-offs of two samples may differ by over 10 %

_RANK_IMAGES = 64  # enough for a mean; eigenvalues of large grids are slow


# --- Reading the images once ---


@dataclass(eq=False)
class _Readings:
    """Result of one pass over n images: numbers per token, never whole tokens, and the pixels of a few images."""

    ids: list[str]
    grid: tuple[int, int]
    norms: dict[int, NDArray[np.float32]]  # layer: (n, N)
    cls_norms: dict[int, NDArray[np.float32]]  # layer: (n,)
    register_norms: dict[int, NDArray[np.float32]]  # layer: (n, R)
    neighbours: NDArray[np.float32]  # (n, N)
    attention: NDArray[np.float32] | None  # (n, N) CLS -> patches in the last block, mean over heads
    attention_statistics: dict[str, NDArray[np.float32]]  # each (n,)
    kept: list[int]  # indices of the images in `pixels`
    pixels: Tensor  # (kept, 3, H, W)


def _cls_row(attention: Tensor, layer: int) -> Tensor:
    return attention[:, :, 0].float().cpu()  # (B, heads, T)


def _token_norms(tokens: Tensor, layer: int) -> Tensor:
    return tokens.float().norm(dim=-1).cpu()  # (B, T)


def _read(
    model: nn.Module, images: PreparedImages, layers: Layers, *, num_details: int, max_images: int, progress: bool
) -> tuple[_Readings, list[SkippedImage]]:
    """Run one forward pass over every image; return the readings and the skipped images."""
    description = describe_model(model)
    sites: dict[Site, Layers] = {"residual": layers, "patch_embedding": (0,)}
    if description.has_cls:
        sites["attention"] = (-1,)
    expected = min(images.total or max_images, max_images)
    stride = max(1, expected // num_details)
    batches: list[dict[str, Any]] = []
    kept: list[int] = []
    pixels: list[Tensor] = []
    flat: list[SkippedImage] = []
    bar = tqdm(total=images.total, desc="images", unit="img", disable=not progress)
    with bar:
        for ids, batch in images:
            bar.update(len(ids))
            varied = (batch.amax(dim=(2, 3)) - batch.amin(dim=(2, 3))).amax(dim=1) > 1e-6  # (B,)
            flat += [SkippedImage(name, "single color") for name, keep in zip(ids, varied.tolist()) if not keep]
            batch = batch[varied]
            if not len(batch):
                continue
            seen = sum(len(entry["ids"]) for entry in batches)
            used = [name for name, keep in zip(ids, varied.tolist()) if keep]
            batches.append(_reduce_batch(model, batch, used, sites, description))
            if batches[-1]["grid"] != batches[0]["grid"]:
                raise ValueError(
                    f"Image '{used[0]}' has {_by(batches[-1]['grid'])} patches, but the images before it have "
                    f"{_by(batches[0]['grid'])}. A diagnosis needs a single grid. Use an image processor that crops "
                    "to one size."
                )
            for i in range(len(used)):
                if (seen + i) % stride == 0 and len(kept) < num_details:
                    kept.append(seen + i)
                    pixels.append(batch[i])
    skipped = [*images.skipped, *flat]
    num_images = sum(len(entry["ids"]) for entry in batches)
    if num_images < MIN_IMAGES:
        raise ValueError(
            f"{num_images} images can be used ({len(skipped)} were skipped{_first_reason(skipped)}). A diagnosis "
            f"needs at least {MIN_IMAGES} images, and {ENOUGH_IMAGES} for reproducible numbers. Add more images."
        )

    def joined(key: str) -> dict[Any, NDArray[np.float32]]:
        return {name: np.concatenate([entry[key][name] for entry in batches]) for name in batches[0][key]}

    readings = _Readings(
        ids=[name for entry in batches for name in entry["ids"]],
        grid=batches[0]["grid"],
        norms=joined("norms"),
        cls_norms=joined("cls_norms"),
        register_norms=joined("register_norms"),
        neighbours=np.concatenate([entry["neighbours"] for entry in batches]),
        attention=joined("attention").get("patches"),
        attention_statistics=joined("statistics"),
        kept=kept,
        pixels=torch.stack(pixels),
    )
    return readings, skipped


def _first_reason(skipped: Sequence[SkippedImage]) -> str:
    return f", e.g. '{skipped[0].id}': {skipped[0].reason}" if skipped else ""


def _reduce_batch(
    model: nn.Module,
    pixel_values: Tensor,
    ids: Sequence[str],
    sites: Mapping[Site, Layers],
    description: ModelDescription,
) -> dict[str, Any]:
    """Return token norms, neighbor similarities and the attention of CLS for one batch, as arrays."""
    reading = read_many(model, pixel_values, sites, reduce={"residual": _token_norms, "attention": _cls_row})
    residual, embedding = reading["residual"], reading["patch_embedding"]
    for layer, norms in zip(residual.layers, residual.values):
        if not torch.isfinite(norms).all():
            worst = ids[int((~torch.isfinite(norms)).any(dim=1).nonzero()[0])]
            raise ValueError(
                f"Image '{worst}' has NaN or infinite tokens at block {layer}. Check the weights and the pixels."
            )
    result: dict[str, Any] = {
        "ids": list(ids),
        "grid": residual.grid,
        "norms": {layer: residual.patches(layer).numpy() for layer in residual.layers},
        "cls_norms": {},
        "register_norms": {},
        "neighbours": neighbor_similarity(embedding.values[0].cpu(), residual.grid).numpy(),
        "attention": {},
        "statistics": {},
    }
    if description.num_register_tokens:
        result["register_norms"] = {layer: residual.registers(layer).numpy() for layer in residual.layers}
    if description.has_cls:
        result["cls_norms"] = {layer: residual.at(layer)[:, 0].numpy() for layer in residual.layers}
        row = reading["attention"].values[0]  # (B, heads, T)
        result["attention"] = {"patches": row.mean(dim=1)[:, residual.num_prefix_tokens :].numpy()}
        statistics = attention_statistics(
            row, num_prefix_tokens=residual.num_prefix_tokens, num_register_tokens=residual.num_register_tokens
        )
        result["statistics"] = {name: value.numpy() for name, value in statistics.items()}
    return result
