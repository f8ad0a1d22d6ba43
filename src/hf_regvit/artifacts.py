"""Diagnosis of artifact tokens in a vision transformer, after the protocols of the registers paper.

An *outlier* is a patch token whose L2 norm, read on the raw residual stream before any final norm, lies above a
cut-off; an *attention map* is the attention that CLS pays to the patches in the last block. `diagnose` reads the norms
of all blocks in one pass over the images, decides whether the norms have two modes and where to cut between them, and
describes the outliers on a sample of the images.

Shape letters: n images, N patches in a grid of (rows, columns), R registers, T = prefix + N tokens, D width, L blocks.
Layer 0 is the embedding, and layer i is the output of block i, counted from 1.
"""

import base64
import json
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from .configuration_regvit import __version__
from .extraction import weights_fingerprint
from .families import FAMILIES, ModelDescription, describe_model, final_norm, find_tower
from .features import EvaluationTransform, Layers, PreparedImages, Site, SkippedImage, prepare_images, read_many
from .images import ImageSource, load_images
from .outliers import (
    MAX_SHARE,
    MAX_VALLEY,
    MIN_RATIO,
    MIN_SEPARATION,
    MIN_SHARE,
    Cutoff,
    attention_statistics,
    channel_outliers,
    compare_values,
    direction_spread,
    effective_rank,
    find_cutoff,
    neighbour_similarity,
    register_cosine,
)
from .probes import token_probes
from .register_controls import register_controls

logger = logging.getLogger(__name__)

MIN_IMAGES = 8  # with fewer, `diagnose` raises an error
ENOUGH_IMAGES = 500  # with fewer, the report has a warning: the cut-offs of two samples may differ by over 10 %

_RANK_IMAGES = 64  # enough for a mean; eigenvalues of large grids are slow
_PLATEAU = 0.95  # layers whose mode ratio reaches this share of the largest count as equal; the first is reported


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


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"


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
        "neighbours": neighbour_similarity(embedding.values[0].cpu(), residual.grid).numpy(),
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


# --- The diagnosis ---


@dataclass(frozen=True)
class ArtifactReport:
    """Result of a diagnosis. The first fields describe the reported layer, where the modes are furthest apart.

    Attributes:
        cutoff: Norm above which a patch token is an outlier.
        bimodal: Whether the outliers are a distinct population.
        outlier_share: Share of all patch tokens that are outliers, in [0, 1].
        norm_ratio: Median norm of outliers over that of the other patches; None without outliers.
        layer: Reported layer; i is the output of block i. The last one if no layer has two modes.
        emergence_layer: First layer of the unbroken run of bimodal layers that ends at the reported one; 1 is the
            output of the first block, 0 the embedding. None if the reported layer is not bimodal.
        num_images: Number of images used.
        separation: Ashman's D of the reported layer.
        method: Origin of the cut-off: "mixture", "fallback" or "fixed".
        reason: Explanation of why the norms count as bimodal or not.
        model: Name, family, sizes, number of parameters and cost of the model.
        layers: One record per layer: quantiles, histogram counts, cut-off and gate, norms of CLS and registers.
        histogram_edges: Bin edges of all histograms as norms, logarithmically spaced.
        outliers: Number per image, positions (`position_map` is the share of images in which a cell is an outlier),
            direction and channels.
        neighbours: Similarity to neighboring patches at the patch embedding, for normal and outlier patches.
        attention: Attention from CLS to patches in the last block; None without CLS.
        registers: Norms and similarity of registers; None without registers.
        patches: Effective rank of the patch tokens after the final norm.
        controls: Effect of replacing registers; None without registers.
        probes: Linear probes on single tokens; None if not requested.
        examples: A few images with their norm and attention maps.
        skipped: Skipped images, with the reason.
        warnings: Sentences on what limits the reliability of the numbers.
        settings: All settings, and a description of the preprocessing.
        versions: Versions of the libraries.
        seconds: Wall time of each step.
    """

    cutoff: float
    bimodal: bool
    outlier_share: float
    norm_ratio: float | None
    layer: int
    emergence_layer: int | None
    num_images: int
    separation: float
    method: str
    reason: str
    model: dict[str, Any]
    layers: list[dict[str, Any]]
    histogram_edges: list[float]
    outliers: dict[str, Any]
    neighbours: dict[str, Any]
    attention: dict[str, Any] | None
    registers: dict[str, Any] | None
    patches: dict[str, Any]
    controls: dict[str, Any] | None
    probes: dict[str, Any] | None
    examples: list[dict[str, Any]]
    skipped: list[dict[str, str]]
    warnings: list[str]
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def save(self, folder: str | Path) -> Path:
        """Write `report.json` into `folder`, which is created if needed, and return its path."""
        path = Path(folder) / "report.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "ArtifactReport":
        """Read a report written by `save`; `path` is the file or its folder."""
        path = Path(path)
        return cls(**json.loads((path / "report.json" if path.is_dir() else path).read_text(encoding="utf-8")))

    @property
    def verdict(self) -> str:
        """Conclusion in one sentence."""
        where = f"block {self.layer} of {self.model['num_layers']}"
        if self.bimodal:
            return (
                f"This model has artifact tokens: at {where}, {self.outlier_share:.2%} of the patch tokens form a "
                f"distinct group with {_number(self.norm_ratio)} times the median norm of the others."
            )
        return f"No distinct outliers: no block has patch norms with two distinct modes ({self.reason} at {where})."

    def summary(self) -> str:
        """Return a summary of ten lines for a terminal, plus one line per warning."""
        return "\n".join(_summary_lines(self))


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _summary_lines(report: ArtifactReport) -> list[str]:
    model, outliers, neighbours = report.model, report.outliers, report.neighbours
    record = next(entry for entry in report.layers if entry["layer"] == report.layer)
    born = {None: "none", 0: "in the embedding, before the first block"}.get(
        report.emergence_layer, f"at the output of block {report.emergence_layer}"
    )
    cells = ", ".join(f"({c['row']}, {c['column']}) in {c['share']:.0%} of images" for c in outliers["top_cells"][:3])
    lines = [
        f"model       {model['name']}: {model['family']}, {model['num_layers']} blocks, width {model['hidden_size']}, "
        f"{model['num_register_tokens']} registers, {report.num_images} images of {_by(outliers['grid'])} patches",
        f"verdict     {report.verdict}",
        f"cut-off     {report.cutoff:.1f} at block {report.layer} (method {report.method}; median norm "
        f"{record['median']:.1f}, largest norm {record['max']:.1f}); {report.reason}",
        f"emergence   {born}",
        f"outliers    {outliers['per_image']:.2f} per image, in {outliers['images_with']:.0%} of the images; "
        f"{_percent(outliers['border_share'])} of them on the border, which has {outliers['border_cells']:.0%} of the "
        f"cells; most frequent cells: {cells or 'none'}",
        f"direction   mean |cosine| between images: {_number(outliers['direction']['outlier'], 2)} for outliers, "
        f"{_number(outliers['direction']['normal'], 2)} for other patches",
        f"neighbors   median cosine at the input: {_number(neighbours['median_outlier'], 2)} for outliers, "
        f"{_number(neighbours['median_normal'], 2)} for other patches; AUROC {_number(neighbours['auroc'], 2)}",
    ]
    if report.attention is None:
        lines.append("attention   not measured, because the model has no CLS token")
    else:
        mean = {name: entry["mean"] for name, entry in report.attention["statistics"].items()}
        lines.append(
            f"attention   CLS puts {mean['mass_on_patches']:.1%} on patches ({mean['mass_on_outliers']:.1%} on "
            f"outliers) and {mean['mass_on_registers']:.1%} on registers; entropy is {mean['entropy_share']:.2f} of "
            f"uniform; the top 2 % of patches get {mean['top_mass']:.1%} of the patch attention"
        )
    if report.registers is None:
        lines.append("registers   none")
    else:
        r = report.registers
        lines.append(
            f"registers   {r['norm_ratio']:.1f} times the median patch norm at block {report.layer}; cosine between "
            f"registers {_number(r['cosine'], 2)}, of one register between images "
            f"{_number(r['cosine_across_images'], 2)}"
        )
    rank = report.patches["effective_rank"]
    lines.append(
        f"rank        effective rank of the patch tokens {rank['mean']:.1f} ± {rank['std']:.1f}; "
        f"took {report.seconds['total']:.0f} s" + "".join(f"\nwarning     {text}" for text in report.warnings)
    )
    return lines


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.0%}"


def diagnose(
    model: nn.Module,
    images: Any,
    *,
    layers: Layers = "all",
    cutoff: float | str = "auto",
    max_images: int = 1000,
    seed: int = 0,
    processor: Any = None,
    batch_size: int = 32,
    detail_images: int = 128,
    probes: bool = False,
    progress: bool = True,
) -> ArtifactReport:
    """Measure whether a model has artifact tokens, where they are, and what they are like.

    One pass over the images keeps norms, neighbor similarities and the attention of CLS. A second pass, over at most
    `detail_images` of them, reads the tokens of two layers. Images of a single color are skipped and listed as such.

    Args:
        model: Model of a family in `families.FAMILIES`; not modified. Without CLS, `attention` is None.
        images: Folder, paths, Pillow images, `ImageSource` or `datasets` data set.
        layers: Layers to read, each 0 to L; "all" reads all of them.
        cutoff: "auto", or a norm to use as the cut-off of every layer.
        max_images: Maximum number of images, drawn at random; the first ones of a stream.
        seed: Random seed for all draws.
        processor: Image processor, see `EvaluationTransform.for_model`; it must return images of one size.
        batch_size: Number of images per forward pass.
        detail_images: Number of images for direction, channels, rank and register controls; their pixels stay in
            memory.
        probes: Whether to fit linear probes on single tokens too, which takes another pass (minutes).
        progress: Whether to show a progress bar.

    Raises:
        ValueError: Fewer than 8 usable images, images on different grids, tokens that are not finite, or an
            unsupported model.

    Source: arXiv 2309.16588; the individual functions describe the protocols.
    """
    if detail_images < 2 or max_images < MIN_IMAGES:
        raise ValueError(
            f"detail_images={detail_images} must be at least 2, and max_images={max_images} at least {MIN_IMAGES}."
        )
    watch = _Watch()
    transform = EvaluationTransform.for_model(model, processor)
    source = load_images(images, split=None) if isinstance(images, str | Path) else images
    prepared = prepare_images(source, transform, batch_size=batch_size, max_images=max_images, seed=seed)
    readings, skipped = _read(
        model,
        prepared,
        tuple(range(describe_model(model).num_layers + 1)) if layers == "all" else layers,
        num_details=detail_images,
        max_images=max_images,
        progress=progress,
    )
    watch.lap("reading")
    cutoffs = {layer: find_cutoff(norms, cutoff=cutoff) for layer, norms in readings.norms.items()}
    layer = reported_layer(cutoffs)
    chosen = cutoffs[layer]
    is_outlier = readings.norms[layer] > chosen.cutoff  # (n, N)
    watch.lap("cut-offs")
    details = _details(model, readings, layer, is_outlier, transform=transform, batch_size=batch_size, seed=seed)
    watch.lap("details")
    controls = _controls(model, source, readings, batch_size=batch_size, seed=seed)
    watch.lap("controls")
    common: dict[str, Any] = {"max_images": max_images, "batch_size": batch_size, "seed": seed}
    tables = None
    if probes:
        tables = token_probes(
            model, source, cutoff=chosen.cutoff, cutoff_layer=layer, processor=transform, **common
        ).to_dict()
        watch.lap("probes")
    edges = _histogram_edges(readings.norms)
    return ArtifactReport(
        cutoff=chosen.cutoff,
        bimodal=chosen.bimodal,
        outlier_share=chosen.share,
        norm_ratio=chosen.ratio,
        layer=layer,
        emergence_layer=emergence_layer(cutoffs, layer),
        num_images=len(readings.ids),
        separation=chosen.separation,
        method=chosen.method,
        reason=chosen.reason,
        model=_model_record(model, readings.grid),
        layers=[_layer_record(readings, i, cutoffs[i], edges) for i in readings.norms],
        histogram_edges=edges.tolist(),
        outliers=_outlier_record(is_outlier, readings.grid) | details["outliers"],
        neighbours=_neighbour_record(readings.neighbours, is_outlier),
        attention=_attention_record(readings, is_outlier),
        registers=details["registers"],
        patches=details["patches"],
        controls=controls,
        probes=tables,
        examples=details["examples"],
        skipped=[asdict(image) for image in skipped],
        warnings=_warnings(len(readings.ids), skipped),
        settings=_settings(transform, cutoff, list(readings.norms)) | common | {"detail_images": len(readings.kept)},
        versions=_versions(),
        seconds=watch.laps | {"total": watch.total},
    )


def reported_layer(cutoffs: Mapping[int, Cutoff]) -> int:
    """Return the layer to report: the first bimodal one whose modes are as far apart (within 5 %) as anywhere.

    The distance is the ratio of the centers of the modes. Ashman's D decides whether there are two modes, but it
    varies with the few tokens between them: on 16 to 60 images of ViT-Tiny it sometimes selects another layer of a
    plateau, while the ratio never does. If no layer is bimodal, the last one is returned. The embedding counts only if
    no other layer was read.
    """
    after_blocks = {layer: found for layer, found in cutoffs.items() if layer > 0} or dict(cutoffs)
    ratios = {layer: found.modes.ratio for layer, found in after_blocks.items() if found.bimodal and found.modes}
    if not ratios:
        return max(after_blocks)
    return min(layer for layer, ratio in ratios.items() if ratio >= _PLATEAU * max(ratios.values()))


def emergence_layer(cutoffs: Mapping[int, Cutoff], layer: int) -> int | None:
    """Return the first of the unbroken run of bimodal layers that ends at `layer`, or None if it is not bimodal."""
    if not cutoffs[layer].bimodal:
        return None
    first = layer
    for earlier in sorted((i for i in cutoffs if i < layer), reverse=True):
        if not cutoffs[earlier].bimodal:
            break
        first = earlier
    return first


class _Watch:
    """Stopwatch for consecutive steps."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = round(now - self.last, 2), now

    @property
    def total(self) -> float:
        return round(time.perf_counter() - self.start, 2)


# --- Parts of the report ---


def _histogram_edges(norms: Mapping[int, NDArray[np.float32]], bins: int = 80) -> NDArray[np.float64]:
    """Return logarithmic bin edges that span the norms of all layers."""
    low = min(float(np.quantile(values, 0.0001)) for values in norms.values())
    high = max(float(values.max()) for values in norms.values())
    low = max(low, 1e-4 * high, 1e-12)
    return np.geomspace(low, max(high, 1.001 * low) * 1.001, bins + 1)


def _layer_record(readings: _Readings, layer: int, found: Cutoff, edges: NDArray[np.float64]) -> dict[str, Any]:
    norms = readings.norms[layer]
    quantiles = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
    record: dict[str, Any] = {
        "layer": layer,
        "median": float(np.median(norms)),
        "mean": float(norms.mean(dtype=np.float64)),
        "max": float(norms.max()),
        "quantiles": {str(q): float(np.quantile(norms, q)) for q in quantiles},
        "histogram": np.histogram(np.clip(norms, edges[0], edges[-1]), bins=edges)[0].tolist(),
    }
    record |= found.to_dict()
    if layer in readings.cls_norms:
        record["cls_norm"] = float(np.median(readings.cls_norms[layer]))
    if layer in readings.register_norms:
        record["register_norms"] = np.median(readings.register_norms[layer], axis=0).tolist()
    return record


def _outlier_record(is_outlier: NDArray[np.bool_], grid: tuple[int, int]) -> dict[str, Any]:
    share = is_outlier.mean(axis=0)  # (N,)
    border = np.ones(grid, dtype=bool)
    border[1:-1, 1:-1] = False
    total = int(is_outlier.sum())
    top = [int(cell) for cell in np.argsort(-share, kind="stable")[:5] if share[cell] > 0]
    return {
        "grid": list(grid),
        "total": total,
        "per_image": float(is_outlier.sum(axis=1).mean()),
        "images_with": float(is_outlier.any(axis=1).mean()),
        "most_in_one_image": int(is_outlier.sum(axis=1).max()),
        "position_map": np.round(share.reshape(grid), 5).tolist(),
        "top_cells": [{"row": cell // grid[1], "column": cell % grid[1], "share": float(share[cell])} for cell in top],
        "border_share": float(is_outlier[:, border.ravel()].sum() / total) if total else None,
        "border_cells": float(border.mean()),
    }


def _neighbour_record(similarity: NDArray[np.float32], is_outlier: NDArray[np.bool_]) -> dict[str, Any]:
    edges = np.linspace(-1, 1, 81)
    return compare_values(similarity, is_outlier) | {
        "site": "output of the patch embedding, before positions",
        "histogram_edges": np.round(edges, 4).tolist(),
        "histogram_normal": np.histogram(np.clip(similarity[~is_outlier], -1, 1), bins=edges)[0].tolist(),
        "histogram_outlier": np.histogram(np.clip(similarity[is_outlier], -1, 1), bins=edges)[0].tolist(),
    }


def _attention_record(readings: _Readings, is_outlier: NDArray[np.bool_]) -> dict[str, Any] | None:
    if readings.attention is None:
        return None
    on_outliers = (readings.attention * is_outlier).sum(axis=1)
    statistics = readings.attention_statistics | {"mass_on_outliers": on_outliers}
    return {
        "query": "CLS, last block, mean over heads",
        "statistics": {
            name: {"mean": float(value.mean()), "std": float(value.std())} for name, value in statistics.items()
        },
        "mean_map": np.round(readings.attention.mean(axis=0).reshape(readings.grid), 6).tolist(),
    }


def _details(
    model: nn.Module,
    readings: _Readings,
    layer: int,
    is_outlier: NDArray[np.bool_],
    *,
    transform: EvaluationTransform,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Compute from the kept images what needs whole tokens: direction, channels, rank, registers, examples."""
    norm = final_norm(model)
    num_layers = describe_model(model).num_layers
    tokens: list[Tensor] = []
    registers: list[Tensor] = []
    ranks: list[Tensor] = []
    for batch in readings.pixels.split(batch_size):
        reading = read_many(model, batch, {"residual": sorted({layer, num_layers})})["residual"]
        tokens.append(reading.patches(layer).float().cpu())
        with torch.no_grad():
            final = norm(reading.at(num_layers)).float().cpu()  # (B, T, D)
        registers.append(final[:, reading.num_prefix_tokens - reading.num_register_tokens : reading.num_prefix_tokens])
        if sum(map(len, ranks)) < _RANK_IMAGES:
            ranks.append(effective_rank(final[:, reading.num_prefix_tokens :]))
    rank, patches = torch.cat(ranks), torch.cat(tokens)  # (n,), (n, N, D)
    mask = torch.from_numpy(is_outlier[readings.kept])
    image = torch.arange(len(mask))[:, None].expand(mask.shape)
    groups: dict[str, Any] = {"direction": {}, "channels": {}}
    for name, chosen in (("outlier", mask), ("normal", ~mask)):
        groups["direction"][name] = direction_spread(patches[chosen], image[chosen], seed=seed)
        groups["channels"][name] = channel_outliers(patches[chosen]) if chosen.any() else None
    return {
        "outliers": groups,
        "patches": {
            "effective_rank": {
                "mean": float(rank.mean()),
                "std": float(rank.std(correction=0)),
                "num_images": len(rank),
            }
        },
        "registers": _register_record(readings, layer, torch.cat(registers)),
        "examples": _examples(model, readings, layer, is_outlier, transform),
    }


def _register_record(readings: _Readings, layer: int, registers: Tensor) -> dict[str, Any] | None:
    """Describe registers after the final norm (n, R, D), and the norms of the raw ones."""
    if not readings.register_norms:
        return None
    norms = readings.register_norms[layer]
    unit = F.normalize(registers, dim=-1)  # (n, R, D)
    total = unit.sum(dim=0).square().sum(dim=-1)  # (R,)
    count = len(unit)
    return {
        "count": registers.shape[1],
        "norms": np.median(norms, axis=0).tolist(),
        "norm_ratio": float(np.median(norms) / max(float(np.median(readings.norms[layer])), 1e-12)),
        "cosine": float(register_cosine(registers).mean()) if registers.shape[1] > 1 else None,
        "cosine_across_images": float((total - count).mean() / (count * (count - 1))),
        "cosine_of": "registers after the final norm",
    }


def _examples(
    model: nn.Module,
    readings: _Readings,
    layer: int,
    is_outlier: NDArray[np.bool_],
    transform: EvaluationTransform,
    count: int = 6,
) -> list[dict[str, Any]]:
    """Return a few images as the model received them (JPEG, base64), with norm and attention maps on the grid."""
    last = describe_model(model).num_layers
    examples = []
    for place in np.unique(np.linspace(0, len(readings.kept) - 1, count).astype(int)).tolist():
        index = readings.kept[place]
        maps: dict[str, Any] = {
            "norms": readings.norms[layer][index],
            "norms_last": readings.norms[last][index] if last in readings.norms else None,
            "attention_cls": None if readings.attention is None else readings.attention[index],
        }
        registers = []
        if readings.register_norms:
            reading = read_many(model, readings.pixels[place : place + 1], {"attention": (-1,)})["attention"]
            rows = reading.registers()[0].float().mean(dim=0)[:, reading.num_prefix_tokens :]  # (R, N)
            registers = [_map(row, readings.grid) for row in rows.cpu().numpy()]
        picture = BytesIO()
        transform.picture(readings.pixels[place]).save(picture, format="JPEG", quality=85)
        examples.append(
            {
                "id": readings.ids[index],
                "grid": list(readings.grid),
                "picture": base64.b64encode(picture.getvalue()).decode("ascii"),
                "num_outliers": int(is_outlier[index].sum()),
                **{name: None if values is None else _map(values, readings.grid) for name, values in maps.items()},
                "attention_registers": registers,
            }
        )
    return examples


def _map(values: NDArray[Any], grid: tuple[int, int]) -> list[list[float]]:
    """Convert (N,) values to rows of the grid, rounded to four significant digits."""
    return [[float(f"{value:.4g}") for value in row] for row in values.reshape(grid).tolist()]


def _model_record(model: nn.Module, grid: tuple[int, int]) -> dict[str, Any]:
    description = describe_model(model)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(description).items()} | {
        "parameters": sum(parameter.numel() for parameter in find_tower(model)[0].parameters()),
        "gmacs": count_macs(model, grid[0] * grid[1]) / 1e9,
        "weights": weights_fingerprint(model),
    }


def count_macs(model: nn.Module, num_patches: int) -> int:
    """Count the multiply-adds of one image: linear layers of the blocks, both attention products, patch embedding.

    For an MLP ratio of 4 and patches of p x p pixels this is L (12 D² T + 2 D T²) + N D 3 p².
    """
    tower, name = find_tower(model)
    description = describe_model(tower)
    tokens = description.num_prefix_tokens + num_patches
    blocks: Any = tower.get_submodule(FAMILIES[name].blocks)
    weights = sum(module.weight.numel() for module in blocks.modules() if isinstance(module, nn.Linear))
    attention = 2 * description.num_layers * description.hidden_size * tokens**2
    pixels = 3 * description.patch_size[0] * description.patch_size[1]
    return weights * tokens + attention + num_patches * description.hidden_size * pixels


def _settings(transform: EvaluationTransform, cutoff: float | str, layers: list[int]) -> dict[str, Any]:
    return {
        "cutoff": cutoff,
        "layers": layers,
        "preprocessing": transform.description,
        "gate": {
            "separation": MIN_SEPARATION,
            "share": [MIN_SHARE, MAX_SHARE],
            "ratio": MIN_RATIO,
            "valley": MAX_VALLEY,
        },
    }


def _warnings(num_images: int, skipped: Sequence[SkippedImage]) -> list[str]:
    found = []
    if num_images < ENOUGH_IMAGES:
        found.append(
            f"The diagnosis used only {num_images} images. With fewer than {ENOUGH_IMAGES}, another sample may give "
            "different numbers."
        )
    if skipped:
        found.append(f"{len(skipped)} images were skipped{_first_reason(skipped)}.")
    for text in found:
        logger.warning("%s", text)
    return found


def _versions() -> dict[str, str]:
    import transformers

    return {
        "hf_regvit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _controls(
    model: nn.Module, source: Any, readings: _Readings, *, batch_size: int, seed: int
) -> dict[str, Any] | None:
    if not readings.register_norms:
        return None
    labels = _labels_of(source, [readings.ids[i] for i in readings.kept])
    return register_controls(model, readings.pixels, labels=labels, batch_size=batch_size, seed=seed)


def _labels_of(source: Any, ids: Sequence[str]) -> Tensor | None:
    """Return the class ids of these images, or None if the source has none."""
    if not isinstance(source, ImageSource) or source.labels is None:
        return None
    by_id = dict(zip(source.ids, source.labels))
    return torch.tensor([by_id[name] for name in ids])


# --- During training ---


def artifact_snapshot(model: nn.Module, pixel_values: Tensor) -> dict[str, float]:
    """Return the main numbers of a diagnosis for a training log, from one forward pass over one batch.

    Args:
        model: Model as for `diagnose`; its training mode is restored.
        pixel_values: (B, 3, H, W) pixels; 32 images of 196 patches are enough to detect an outlier share of 0.2 %.

    Returns:
        Dictionary with `outlier_share`, `separation` and `bimodal` (0 or 1) of the reported layer, that `layer`, its
        `cutoff`, `norm_median` and `norm_max`; `norm_ratio` if there are outliers; `effective_rank` of the patches
        after the final norm; with registers, `register_norm` (reported layer) and, with two or more,
        `register_cosine` (after the final norm); with CLS, `attention_entropy` (relative to uniform) and, with
        registers, `attention_registers`.
    """
    description = describe_model(model)
    layers = list(range(1, description.num_layers + 1))
    last: dict[str, Tensor] = {}

    def keep_norms(tokens: Tensor, layer: int) -> Tensor:
        if layer == description.num_layers:
            last["tokens"] = tokens[:_RANK_IMAGES]
        return _token_norms(tokens, layer)

    sites: dict[Site, Layers] = {"residual": layers}
    if description.has_cls:
        sites["attention"] = (-1,)
    reading = read_many(model, pixel_values, sites, reduce={"residual": keep_norms, "attention": _cls_row})
    residual = reading["residual"]
    cutoffs = {layer: find_cutoff(residual.patches(layer).numpy()) for layer in layers}
    layer = reported_layer(cutoffs)
    found, norms = cutoffs[layer], residual.patches(layer)
    with torch.no_grad():
        final = final_norm(model)(last["tokens"]).float().cpu()
    values = {
        "outlier_share": found.share,
        "separation": found.separation,
        "bimodal": float(found.bimodal),
        "layer": float(layer),
        "cutoff": found.cutoff,
        "norm_median": float(np.median(norms)),
        "norm_max": norms.max().item(),
        "effective_rank": effective_rank(final[:, residual.num_prefix_tokens :]).mean().item(),
    }
    if found.ratio is not None:
        values["norm_ratio"] = found.ratio
    count, prefix = residual.num_register_tokens, residual.num_prefix_tokens
    if count:
        values["register_norm"] = residual.registers(layer).flatten().quantile(0.5).item()
    if count > 1:
        values["register_cosine"] = register_cosine(final[:, prefix - count : prefix]).mean().item()
    if description.has_cls:
        statistics = attention_statistics(
            reading["attention"].values[0], num_prefix_tokens=prefix, num_register_tokens=count
        )
        values["attention_entropy"] = statistics["entropy_share"].mean().item()
        if count:
            values["attention_registers"] = statistics["mass_on_registers"].mean().item()
    return values
