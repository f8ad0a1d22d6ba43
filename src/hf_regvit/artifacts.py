"""Does a vision transformer have artifact tokens? The protocols of the registers paper, as one diagnosis.

An *outlier* is a patch token whose L2 norm, read on the raw residual stream before any final norm, lies above a
cut-off; an *attention map* is the attention that CLS pays to the patches in the last block. `diagnose` reads the norms
of all blocks in one pass over the images, decides whether the norms have two modes and where to cut between them, and
describes the outliers on a sample of the images.

Shape letters: n images, N patches in a grid of (rows, columns), R registers, T = prefix + N tokens, D width, L blocks.
Layer 0 is the embedding, layer i the output of block i.
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

MIN_IMAGES = 8  # below this nothing is said
ENOUGH_IMAGES = 500  # below this the report carries a warning: cut-offs of two samples may differ by more than 10 %

_RANK_IMAGES = 64  # enough for a mean; the eigenvalues of large grids take long
_PLATEAU = 0.95  # a layer whose modes are this close to the widest ratio counts as equal; the first is reported


# --- Reading the images once ---


@dataclass(eq=False)
class _Readings:
    """What one pass over n images leaves: only numbers per token, never tokens; pixels of a few images for details."""

    ids: list[str]
    grid: tuple[int, int]
    norms: dict[int, NDArray[np.float32]]  # layer: (n, N)
    cls_norms: dict[int, NDArray[np.float32]]  # layer: (n,)
    register_norms: dict[int, NDArray[np.float32]]  # layer: (n, R)
    neighbours: NDArray[np.float32]  # (n, N)
    attention: NDArray[np.float32] | None  # (n, N) CLS -> patches in the last block, mean over heads
    attention_statistics: dict[str, NDArray[np.float32]]  # each (n,)
    kept: list[int]  # which images have their pixels here
    pixels: Tensor  # (kept, 3, H, W)


def _cls_row(attention: Tensor, layer: int) -> Tensor:
    return attention[:, :, 0].float().cpu()  # (B, heads, T)


def _token_norms(tokens: Tensor, layer: int) -> Tensor:
    return tokens.float().norm(dim=-1).cpu()  # (B, T)


def _read(
    model: nn.Module, images: PreparedImages, layers: Layers, *, num_details: int, max_images: int, progress: bool
) -> tuple[_Readings, list[SkippedImage]]:
    """One forward pass over every image."""
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
            flat += [SkippedImage(name, "single colour") for name, keep in zip(ids, varied.tolist()) if not keep]
            batch = batch[varied]
            if not len(batch):
                continue
            seen = sum(len(entry["ids"]) for entry in batches)
            used = [name for name, keep in zip(ids, varied.tolist()) if keep]
            batches.append(_reduce_batch(model, batch, used, sites, description))
            if batches[-1]["grid"] != batches[0]["grid"]:
                raise ValueError(
                    f"Image '{used[0]}' has {_by(batches[-1]['grid'])} patches, the ones before it "
                    f"{_by(batches[0]['grid'])}. A diagnosis needs one grid: use a processor that crops to one size."
                )
            for i in range(len(used)):
                if (seen + i) % stride == 0 and len(kept) < num_details:
                    kept.append(seen + i)
                    pixels.append(batch[i])
    skipped = [*images.skipped, *flat]
    num_images = sum(len(entry["ids"]) for entry in batches)
    if num_images < MIN_IMAGES:
        raise ValueError(
            f"{num_images} images can be used ({len(skipped)} were skipped{_first_reason(skipped)}); a diagnosis "
            f"needs at least {MIN_IMAGES}, and {ENOUGH_IMAGES} for numbers that repeat. Give more images."
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
    """Norms of all tokens, neighbour similarity, attention of CLS: for one batch, as arrays."""
    reading = read_many(model, pixel_values, sites, reduce={"residual": _token_norms, "attention": _cls_row})
    residual, embedding = reading["residual"], reading["patch_embedding"]
    for layer, norms in zip(residual.layers, residual.values):
        if not torch.isfinite(norms).all():
            worst = ids[int((~torch.isfinite(norms)).any(dim=1).nonzero()[0])]
            raise ValueError(f"Tokens of image '{worst}' are not finite at layer {layer}. Check weights and pixels.")
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
    """What a diagnosis found. The first entries speak of the reported layer, where the modes are furthest apart.

    Attributes:
        cutoff: Norm above which a patch token is an outlier.
        bimodal: Whether the outliers are a population of their own.
        outlier_share: Of all patch tokens, in [0, 1].
        norm_ratio: Median norm of outliers over that of the others; None without outliers.
        layer: The reported layer, i = output of block i; the last block's where no layer has two modes.
        emergence_layer: First layer of the unbroken run of bimodal layers around the reported one; 1 = output of the
            first block, 0 = the embedding. None where there is none.
        num_images: Images used.
        separation: Ashman's D of the reported layer.
        method: How the cut-off was found: "mixture", "fallback" or "fixed".
        reason: Why the norms count as bimodal or not.
        model: Name, family, sizes, parameters and cost.
        layers: One record a layer: quantiles, histogram counts, cut-off and gate, norms of CLS and registers.
        histogram_edges: Edges of all histograms, in norm; logarithmic.
        outliers: Number per image, places (`position_map` is the share of images in which a cell is an outlier),
            direction, channels.
        neighbours: Similarity to neighbouring patches at the patch embedding: normal against outlier.
        attention: CLS to patches in the last block; None without CLS.
        registers: Norms, similarity and attention of registers; None without registers.
        patches: Effective rank of the patch tokens after the final norm.
        controls: Effect of replacing registers; None without registers.
        probes: Linear probes on single tokens; None if not asked for.
        examples: A few images with their norm and attention maps.
        skipped: Images left out, with the reason.
        warnings: What weakens the numbers.
        settings: Everything that can be set, and the preprocessing in words.
        versions: Of the libraries.
        seconds: Wall time of the parts.
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
        """Plain values for JSON."""
        return asdict(self)

    def save(self, folder: str | Path) -> Path:
        """Write `report.json` into `folder`, made if needed; returns its path."""
        path = Path(folder) / "report.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "ArtifactReport":
        """Read what `save` wrote; `path` is the file or its folder."""
        path = Path(path)
        return cls(**json.loads((path / "report.json" if path.is_dir() else path).read_text(encoding="utf-8")))

    @property
    def verdict(self) -> str:
        """One sentence in plain words."""
        where = f"layer {self.layer} of {self.model['num_layers']}"
        if self.bimodal:
            return (
                f"This model has artifact tokens: at {where}, {self.outlier_share:.2%} of the patch tokens form a "
                f"population of their own with {_number(self.norm_ratio)} times the norm of the others."
            )
        return f"No distinct outliers: no layer's patch norms have two modes ({self.reason} at {where})."

    def summary(self) -> str:
        """Ten lines for a terminal."""
        return "\n".join(_summary_lines(self))


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _summary_lines(report: ArtifactReport) -> list[str]:
    model, outliers, neighbours = report.model, report.outliers, report.neighbours
    record = next(entry for entry in report.layers if entry["layer"] == report.layer)
    born = {None: "nowhere", 0: "before the first block"}.get(
        report.emergence_layer, f"at the output of block {report.emergence_layer}"
    )
    cells = ", ".join(f"({c['row']}, {c['column']}) in {c['share']:.0%} of images" for c in outliers["top_cells"][:3])
    lines = [
        f"model       {model['name']}: {model['family']}, {model['num_layers']} blocks, width {model['hidden_size']}, "
        f"{model['num_register_tokens']} registers, {report.num_images} images on {_by(outliers['grid'])} patches",
        f"verdict     {report.verdict}",
        f"cut-off     {report.cutoff:.1f} at layer {report.layer} ({report.method}; median norm "
        f"{record['median']:.1f}, largest {record['max']:.1f}); {report.reason}",
        f"emergence   {born}",
        f"outliers    {outliers['per_image']:.2f} per image, in {outliers['images_with']:.0%} of the images; "
        f"on the border {_percent(outliers['border_share'])} of them (border: {outliers['border_cells']:.0%} of the "
        f"cells); most often {cells or 'nowhere'}",
        f"direction   mean |cos| between images {_number(outliers['direction']['outlier'], 2)} for outliers, "
        f"{_number(outliers['direction']['normal'], 2)} for others",
        f"neighbours  median cosine at the input {_number(neighbours['median_outlier'], 2)} for outliers, "
        f"{_number(neighbours['median_normal'], 2)} for others; AUROC {_number(neighbours['auroc'], 2)}",
    ]
    if report.attention is None:
        lines.append("attention   no CLS token, so there is no attention map of it")
    else:
        mean = {name: entry["mean"] for name, entry in report.attention["statistics"].items()}
        lines.append(
            f"attention   CLS puts {mean['mass_on_patches']:.1%} on patches ({mean['mass_on_outliers']:.1%} on "
            f"outliers), {mean['mass_on_registers']:.1%} on registers; entropy {mean['entropy_share']:.2f} of "
            f"uniform, top 2 % of patches hold {mean['top_mass']:.1%}"
        )
    if report.registers is None:
        lines.append("registers   none")
    else:
        r = report.registers
        lines.append(
            f"registers   {r['norm_ratio']:.1f} times the norm of a patch at layer {report.layer}; cosine between "
            f"registers {_number(r['cosine'], 2)}, of one between images {_number(r['cosine_across_images'], 2)}"
        )
    rank = report.patches["effective_rank"]
    lines.append(
        f"rank        effective rank of the patches {rank['mean']:.1f} ± {rank['std']:.1f}; "
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
    """Measure whether, where and how a model has artifact tokens.

    One pass over the images keeps norms, neighbour similarities and attention of CLS; a second, over at most
    `detail_images` of them, reads tokens of two layers. Images of one colour are left out and listed as skipped.

    Args:
        model: A model of a family in `families.FAMILIES`; left as it was. Without CLS, `attention` is None.
        images: A folder, paths, Pillow images, an `ImageSource` or a `datasets` data set.
        layers: Which to read, 0 to L; "all" is 0 to L.
        cutoff: "auto", or a norm that every layer is cut at.
        max_images: A random draw of that many; streams: the first.
        seed: Of all random draws.
        processor: See `EvaluationTransform.for_model`; all images must come out at one size.
        batch_size: Images of one forward pass.
        detail_images: Images for direction, channels, rank and register controls; their pixels stay in memory.
        probes: Also fit linear probes on single tokens (another pass; minutes).
        progress: Show a bar.

    Raises:
        ValueError: Fewer than 8 usable images, images on different grids, tokens that are not finite, or a model that
            cannot be read.

    Source: arXiv 2309.16588; the protocols are described at the functions.
    """
    if detail_images < 2 or max_images < MIN_IMAGES:
        raise ValueError(
            f"detail_images={detail_images} must be at least 2 and max_images={max_images} at least {MIN_IMAGES}."
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
    """The layer to speak of: among bimodal ones the first whose modes are as far apart (within 5 %) as anywhere.

    Distance is the ratio of the modes' centres. Ashman's D decides whether there are two modes, but it varies with
    the few tokens between them: on 16 to 60 images of ViT-Tiny it names another layer of a plateau now and then, the
    ratio never does. Where no layer is bimodal it is the last; the embedding counts only if nothing else was read.
    """
    after_blocks = {layer: found for layer, found in cutoffs.items() if layer > 0} or dict(cutoffs)
    ratios = {layer: found.modes.ratio for layer, found in after_blocks.items() if found.bimodal and found.modes}
    if not ratios:
        return max(after_blocks)
    return min(layer for layer, ratio in ratios.items() if ratio >= _PLATEAU * max(ratios.values()))


def emergence_layer(cutoffs: Mapping[int, Cutoff], layer: int) -> int | None:
    """First of the unbroken run of bimodal layers that ends at `layer`, or None if that is not bimodal."""
    if not cutoffs[layer].bimodal:
        return None
    first = layer
    for earlier in sorted((i for i in cutoffs if i < layer), reverse=True):
        if not cutoffs[earlier].bimodal:
            break
        first = earlier
    return first


class _Watch:
    """Wall time of parts that follow each other."""

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
    """Logarithmic edges that span the norms of all layers, the same for each."""
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
    """What needs whole tokens, from images whose pixels we hold: direction, channels, rank, registers, examples."""
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
    """Registers of the final norm (n, R, D), and the norms of raw ones."""
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
    """A few images: the picture as the model saw it (JPEG, base64), norm maps and attention maps on the grid."""
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
    """(N,) to rows of four significant digits."""
    return [[float(f"{value:.4g}") for value in row] for row in values.reshape(grid).tolist()]


def _model_record(model: nn.Module, grid: tuple[int, int]) -> dict[str, Any]:
    description = describe_model(model)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(description).items()} | {
        "parameters": sum(parameter.numel() for parameter in find_tower(model)[0].parameters()),
        "gmacs": count_macs(model, grid[0] * grid[1]) / 1e9,
        "weights": weights_fingerprint(model),
    }


def count_macs(model: nn.Module, num_patches: int) -> int:
    """Multiply-adds of one image: linear layers of the blocks, the two products of attention, patch embedding.

    For an MLP of ratio 4 this is L (12 D² T + 2 D T²) + N D 3 p².
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
            f"only {num_images} images: with fewer than {ENOUGH_IMAGES}, another sample may give other numbers"
        )
    if skipped:
        found.append(f"{len(skipped)} images were left out{_first_reason(skipped)}")
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
    """Class indices of these images where the source has them."""
    if not isinstance(source, ImageSource) or source.labels is None:
        return None
    by_id = dict(zip(source.ids, source.labels))
    return torch.tensor([by_id[name] for name in ids])


# --- During training ---


def artifact_snapshot(model: nn.Module, pixel_values: Tensor) -> dict[str, float]:
    """The diagnosis in numbers for a training log, from one forward pass over one batch.

    Args:
        model: As for `diagnose`; its training mode is restored.
        pixel_values: (B, 3, H, W); 32 images of 196 patches are enough to see a share of 0.2 %.

    Returns:
        `outlier_share`, `separation` and `bimodal` (0 or 1) of the reported layer, that `layer`, its `cutoff`,
        `norm_median` and `norm_max`; `norm_ratio` where there are outliers; `effective_rank` of the patches after the
        final norm; with registers `register_norm` (reported layer) and, with two or more, `register_cosine` (after
        the final norm); with CLS `attention_entropy` (relative to uniform) and, with registers, `attention_registers`.
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
