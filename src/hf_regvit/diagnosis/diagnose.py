"""Diagnosis of artifact tokens in a vision transformer, after the protocols of the registers paper.

An *outlier* is a patch token whose L2 norm, read on the raw residual stream before any final norm, lies above a
cut-off; an *attention map* is the attention that CLS pays to the patches in the last block. `diagnose` reads the norms
of all blocks in one pass over the images, decides whether the norms have two modes and where to cut between them, and
describes the outliers on a sample of the images.

Shape letters: n images, N patches in a grid of (rows, columns), R registers, T = prefix + N tokens, D width, L blocks.
Layer 0 is the embedding, and layer i is the output of block i, counted from 1.
"""

import base64
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data.loading import load_images
from ..data.preparation import prepare_images
from ..models.loading import open_model, weights_fingerprint
from ..models.processing import ImageProcessor
from ..models.results import Record, Stopwatch, library_versions
from ..models.tokens import Layers, Site, TokenReader
from .controls import register_controls
from .outliers import (
    GATE,
    Cutoff,
    attention_statistics,
    channel_outliers,
    compare_values,
    direction_spread,
    effective_rank,
    emergence_layer,
    find_cutoff,
    register_cosine,
    reported_layer,
)
from .position import PositionMoments, position_record
from .readings import (
    ENOUGH_IMAGES,
    MIN_IMAGES,
    Array,
    Readings,
    Rows,
    first_reason,
    labels_of,
    normalized,
    read_images,
    read_norms,
)
from .report import ArtifactReport
from .sinks import SinkReader, image_numbers, sink_record
from .spurious import FixedPatterns, find_fixed_patterns, global_proxy_share, spurious_record
from .token_probes import token_probes

logger = logging.getLogger(__name__)

_RANK_IMAGES = 64  # enough for a mean; eigenvalues of large grids are slow


def diagnose(
    model: TokenReader | nn.Module | str | Path,
    images: object,
    *,
    layers: Layers = "all",
    cutoff: float | str = "auto",
    max_images: int = 1000,
    seed: int = 0,
    processor: ImageProcessor | None = None,
    device: str | torch.device = "auto",
    batch_size: int = 32,
    detail_images: int = 128,
    probes: bool = False,
    progress: bool = True,
) -> ArtifactReport:
    """Measure whether a model has artifact tokens, where they are, and what they are like.

    One pass over the images keeps norms, neighbor similarities and the attention of CLS. A second pass, over at most
    `detail_images` of them, reads the tokens of two layers. Images of a single color are skipped and listed as such.

    Args:
        model: Model, its name, or a reader; see `open_model`. It is not modified.
        images: Folder or other source that `load_images` can open, list of images, or data set of `datasets`.
        layers: Layers to read, each 0 to L; "all" reads all of them.
        cutoff: "auto", or a norm to use as the cut-off of every layer.
        max_images: Maximum number of images, drawn at random; the first ones of a stream.
        seed: Random seed for all draws.
        processor: Image processor, which must return images of one size; default the model's own.
        device: Device to compute on; see `open_model`.
        batch_size: Number of images per forward pass.
        detail_images: Number of images for direction, channels, rank and register controls; their pixels stay in
            memory.
        probes: Whether to fit linear probes on single tokens too, which takes another pass (minutes).
        progress: Whether to show a progress bar.

    Raises:
        UnknownProcessorError: No image processor is given, and the model has none.
        ValueError: Fewer than 8 usable images, images on different grids, tokens that are not finite, or an
            unsupported model.

    Source: arXiv 2309.16588; the individual functions describe the protocols.
    """
    reader = open_model(model, device=device, processor=processor)
    return measure(
        reader, images, layers=layers, cutoff=cutoff, max_images=max_images, seed=seed, batch_size=batch_size,
        detail_images=detail_images, probes=probes, progress=progress,
    )[0]  # fmt: skip


@dataclass(frozen=True, eq=False)
class ImageNumbers:
    """Numbers of the n detail images one by one, to compare models on the same images.

    Attributes:
        ids: Names of the images.
        pixels: (n, 3, H, W) normalized pixels.
        outliers: (n, N) mask of the outliers by norm; None if there is no distinct population.
        values: (n,) numbers by name: "tokens", the share that does not describe its place, and for each set of tokens
            "NAME.mass", its attention in the last quarter of the blocks, and "NAME.events", its number of sinks.
    """

    ids: list[str]
    pixels: Tensor
    outliers: NDArray[np.bool_] | None
    values: dict[str, NDArray[np.float64]]


def measure(
    reader: TokenReader,
    images: object,
    *,
    layers: Layers = "all",
    cutoff: float | str = "auto",
    max_images: int = 1000,
    seed: int = 0,
    batch_size: int = 32,
    detail_images: int = 128,
    probes: bool = False,
    progress: bool = True,
) -> tuple[ArtifactReport, ImageNumbers]:
    """Diagnose a model; return also the numbers of single images, which a report leaves out. See `diagnose`."""
    if detail_images < 2 or max_images < MIN_IMAGES:
        raise ValueError(
            f"detail_images={detail_images} must be at least 2, and max_images={max_images} at least {MIN_IMAGES}."
        )
    watch = Stopwatch()
    source = load_images(images, split=None) if isinstance(images, str | Path) else images
    drawn: Record = {"max_images": max_images, "batch_size": batch_size, "seed": seed}
    prepared = prepare_images(source, reader.transform, **drawn)
    limits = {"num_details": detail_images, "max_images": max_images}
    readings = read_images(reader, prepared, layers, **limits, progress=progress)
    watch.lap("reading")
    cutoffs = {layer: find_cutoff(norms, cutoff=cutoff) for layer, norms in readings.norms.items()}
    layer = reported_layer(cutoffs)
    is_outlier = readings.norms[layer] > cutoffs[layer].cutoff
    distinct = cutoffs[layer].bimodal or cutoff != "auto"
    case = _Case(reader, readings, layer, is_outlier, distinct, batch_size, seed)
    watch.lap("cut-offs")
    details = _details(case)
    watch.lap("details")
    details["controls"] = _controls(case, source)
    watch.lap("controls")
    details["probes"] = None
    if probes:
        found = token_probes(reader, source, cutoff=cutoffs[layer].cutoff, cutoff_layer=layer, **drawn)
        details["probes"] = found.to_dict()
        watch.lap("probes")
    numbers = details.pop("numbers")
    report = _report(case, cutoffs, details, {"cutoff": cutoff, "layers": list(readings.norms)}, drawn, watch)
    return report, numbers


def _report(
    case: "_Case",
    cutoffs: Mapping[int, Cutoff],
    details: Record,
    asked: Record,
    drawn: Record,
    watch: Stopwatch,
) -> ArtifactReport:
    reader, readings, chosen = case.reader, case.readings, cutoffs[case.layer].to_dict()
    edges = _histogram_edges(readings.norms)
    settings = asked | {"preprocessing": reader.transform.description, "gate": GATE} | drawn
    return ArtifactReport(
        **{name: chosen[name] for name in ("cutoff", "bimodal", "separation", "method", "reason")},
        outlier_share=chosen["share"],
        norm_ratio=chosen["ratio"],
        layer=case.layer,
        emergence_layer=emergence_layer(cutoffs, case.layer),
        num_images=len(readings.ids),
        model=_model_record(reader, readings.grid),
        layers=[_layer_record(readings, i, cutoffs[i], edges) for i in readings.norms],
        histogram_edges=edges.tolist(),
        outliers=_outlier_record(case.is_outlier, readings.grid) | details.pop("outliers"),
        neighbours=_neighbor_record(readings.neighbors, case.is_outlier),
        attention=_attention_record(case),
        **details,
        skipped=[asdict(image) for image in readings.skipped],
        warnings=_warnings(readings),
        settings=settings | {"detail_images": len(readings.kept)},
        versions=library_versions(),
        seconds=watch.seconds,
    )


@dataclass(frozen=True, eq=False)
class _Case:
    """Model and readings of a diagnosis, with the outliers of the reported layer."""

    reader: TokenReader
    readings: Readings
    layer: int
    is_outlier: NDArray[np.bool_]  # (n, N)
    distinct: bool  # the outliers are a population, or above a cut-off that the caller chose
    batch_size: int
    seed: int


# --- Parts of the report ---


def _histogram_edges(norms: Mapping[int, NDArray[np.float32]]) -> NDArray[np.float64]:
    """Return the edges of 80 logarithmic bins that span the norms of all layers."""
    low = min(float(np.quantile(values, 0.0001)) for values in norms.values())
    high = max(float(values.max()) for values in norms.values())
    low = max(low, 1e-4 * high, 1e-12)
    return np.geomspace(low, max(high, 1.001 * low) * 1.001, 81)


def _histogram(values: np.ndarray, edges: NDArray[np.float64]) -> list[int]:
    return np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)[0].tolist()


def _layer_record(readings: Readings, layer: int, found: Cutoff, edges: NDArray[np.float64]) -> Record:
    norms = readings.norms[layer]
    record: Record = {
        "layer": layer,
        "median": float(np.median(norms)),
        "mean": float(norms.mean(dtype=np.float64)),
        "max": float(norms.max()),
        "quantiles": {str(q): float(np.quantile(norms, q)) for q in (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)},
        "histogram": _histogram(norms, edges),
        **found.to_dict(),
    }
    if layer in readings.cls_norms:
        record["cls_norm"] = float(np.median(readings.cls_norms[layer]))
    if layer in readings.register_norms:
        record["register_norms"] = np.median(readings.register_norms[layer], axis=0).tolist()
    return record


def _outlier_record(is_outlier: NDArray[np.bool_], grid: tuple[int, int]) -> Record:
    share, counts = is_outlier.mean(axis=0), is_outlier.sum(axis=1)  # (N,), (n,)
    border = np.ones(grid, dtype=bool)
    border[1:-1, 1:-1] = False
    total = int(counts.sum())
    top = [int(cell) for cell in np.argsort(-share, kind="stable")[:5] if share[cell] > 0]
    return {
        "grid": list(grid),
        "total": total,
        "per_image": float(counts.mean()),
        "images_with": float((counts > 0).mean()),
        "most_in_one_image": int(counts.max()),
        "position_map": np.round(share.reshape(grid), 5).tolist(),
        "top_cells": [{"row": cell // grid[1], "column": cell % grid[1], "share": float(share[cell])} for cell in top],
        "border_share": float(is_outlier[:, border.ravel()].sum() / total) if total else None,
        "border_cells": float(border.mean()),
    }


def _neighbor_record(similarity: NDArray[np.float32], is_outlier: NDArray[np.bool_]) -> Record:
    edges = np.linspace(-1, 1, 81)
    return compare_values(similarity, is_outlier) | {
        "site": "output of the patch embedding, before positions",
        "histogram_edges": np.round(edges, 4).tolist(),
        "histogram_normal": _histogram(similarity[~is_outlier], edges),
        "histogram_outlier": _histogram(similarity[is_outlier], edges),
    }


def _attention_record(case: _Case) -> Record | None:
    readings = case.readings
    if readings.attention is None:
        return None
    on_outliers = (readings.attention * case.is_outlier).sum(axis=1)
    statistics = readings.attention_statistics | {"mass_on_outliers": on_outliers}
    return {
        "query": "CLS, last block, mean over heads",
        "statistics": {
            name: {"mean": float(value.mean()), "std": float(value.std())} for name, value in statistics.items()
        },
        "mean_map": np.round(readings.attention.mean(axis=0).reshape(readings.grid), 6).tolist(),
    }


def _details(case: _Case) -> Record:
    """Compute from the kept images what needs whole tokens or attention, in one pass over them."""
    reader, readings = case.reader, case.readings
    last, prefix, count = reader.description.num_layers, reader.description.num_prefix_tokens, len(readings.kept)
    outlier = case.is_outlier[readings.kept]  # (n, N)
    mask = outlier if case.distinct else None
    sinks = SinkReader(reader, [readings.ids[i] for i in readings.kept], outlier.shape[1], mask)
    position = PositionMoments(readings.grid, count, case.seed)
    parts, ranks = Rows[str](), Rows[str]()
    sites: dict[Site, Layers] = {"residual": "all", "patch_embedding": (0,)}
    sites |= {"v": "all", "attention": "all"} if reader.reads_attention else {}
    size = min(case.batch_size, sinks.max_batch)
    for start in range(0, count, size):

        def keep(tokens: Tensor, layer: int, start: int = start) -> Tensor:
            position.add(tokens[:, prefix:], layer, start)
            return tokens if layer in (case.layer, last) else tokens[:0]

        batch = readings.pixels[start : start + size]
        read = reader.read_many(batch, sites, reduce={"residual": keep, **sinks.reductions(start)})
        final = normalized(reader, read["residual"].at(last))  # (B, T, D)
        position.add(final[:, prefix:], "final", start)
        parts.add({
            "tokens": read["residual"].patches(case.layer).float().cpu(),
            "registers": final[:, prefix - reader.description.num_register_tokens : prefix],
            "final": _half(final[:, prefix:]),
            "embeddings": _half(read["patch_embedding"].at()),
        })  # fmt: skip
        if ranks.count < _RANK_IMAGES:
            ranks.add({"ranks": effective_rank(final[:, prefix:])})
    joined = parts.joined()
    patterns = find_fixed_patterns(joined["final"], joined["embeddings"], seed=case.seed)
    values = {"tokens": (patterns.flagged | (outlier & case.distinct)).mean(axis=1)} | image_numbers(sinks.numbers)
    return _token_records(case, joined["tokens"], ranks.joined()["ranks"]) | {
        "numbers": ImageNumbers(sinks.ids, readings.pixels, mask, values),
        "registers": _register_record(case, joined["registers"]),
        "examples": _examples(case, patterns.score, sinks.received.numpy() if sinks.numbers else None),
        "sinks": sink_record(sinks.numbers) if sinks.numbers else None,
        "spurious": _spurious_record(case, patterns, sinks),
        "position": position_record(position, joined["final"], readings.grid),
    }


def _half(tokens: Tensor) -> Tensor:
    """Return tokens in half precision, in which a few thousand more per image fit into memory."""
    return tokens.float().cpu().clamp(-6e4, 6e4).half()


def _token_records(case: _Case, tokens: Tensor, rank: Tensor) -> Record:
    """Describe direction and channels of tokens (n, N, D) of the reported layer, and the effective rank (n,)."""
    outlier = torch.from_numpy(case.is_outlier[case.readings.kept])
    image = torch.arange(len(outlier))[:, None].expand(outlier.shape)
    groups = {"outlier": outlier, "normal": ~outlier}
    return {
        "outliers": {
            "direction": {
                name: direction_spread(tokens[chosen], image[chosen], seed=case.seed)
                for name, chosen in groups.items()
            },
            "channels": {
                name: channel_outliers(tokens[chosen]) if chosen.any() else None for name, chosen in groups.items()
            },
        },
        "patches": {
            "effective_rank": {
                "mean": float(rank.mean()),
                "std": float(rank.std(correction=0)),
                "num_images": len(rank),
            }
        },
    }


def _spurious_record(case: _Case, found: FixedPatterns, sinks: SinkReader) -> Record:
    readings = case.readings
    outliers = case.is_outlier[readings.kept] & case.distinct
    norms = readings.norms[case.layer][readings.kept]
    record = spurious_record(found, outliers, norms, sinks.received if sinks.numbers else None)
    proxy = global_proxy_share(case.reader, readings.pixels, batch_size=case.batch_size)
    return record | {"experimental": {"global_proxy_share": proxy}}


def _register_record(case: _Case, registers: Tensor) -> Record | None:
    """Describe registers after the final norm (n, R, D), and the norms of the raw ones."""
    if not case.readings.register_norms:
        return None
    norms = case.readings.register_norms[case.layer]
    total = F.normalize(registers, dim=-1).sum(dim=0).square().sum(dim=-1)  # (R,)
    count = len(registers)
    return {
        "count": registers.shape[1],
        "norms": np.median(norms, axis=0).tolist(),
        "norm_ratio": float(np.median(norms) / max(float(np.median(case.readings.norms[case.layer])), 1e-12)),
        "cosine": float(register_cosine(registers).mean()) if registers.shape[1] > 1 else None,
        "cosine_across_images": float((total - count).mean() / (count * (count - 1))),
        "cosine_of": "registers after the final norm",
    }


def _examples(case: _Case, repetition: Array, received: Array | None) -> list[Record]:
    """Return six images as the model received them (JPEG, base64), with maps on the grid.

    `repetition` and `received` (n, N) are those of the kept images.
    """
    readings, last, grid = case.readings, case.reader.description.num_layers, case.readings.grid
    examples = []
    for place in np.unique(np.linspace(0, len(readings.kept) - 1, 6).astype(int)).tolist():
        index = readings.kept[place]
        registers: list[list[list[float]]] = []
        if readings.register_norms and case.reader.reads_attention:
            reading = case.reader.read(readings.pixels[place : place + 1], site="attention")
            rows = reading.registers()[0].float().mean(dim=0)[:, reading.num_prefix_tokens :]  # (R, N)
            registers = [_map(row, grid) for row in rows.cpu().numpy()]
        image = BytesIO()
        case.reader.transform.picture(readings.pixels[place]).save(image, format="JPEG", quality=85)
        examples.append(
            {
                "id": readings.ids[index],
                "grid": list(grid),
                "picture": base64.b64encode(image.getvalue()).decode("ascii"),
                "num_outliers": int(case.is_outlier[index].sum()),
                "norms": _map(readings.norms[case.layer][index], grid),
                "norms_last": _map(readings.norms[last][index], grid) if last in readings.norms else None,
                "attention_cls": None if readings.attention is None else _map(readings.attention[index], grid),
                "attention_registers": registers,
                "repetition": _map(repetition[place], grid),
                "received": None if received is None else _map(received[place], grid),
            }
        )
    return examples


def _map(values: np.ndarray, grid: tuple[int, int]) -> list[list[float]]:
    """Convert (N,) values to rows of the grid, rounded to four significant digits."""
    return [[float(f"{value:.4g}") for value in row] for row in values.reshape(grid).tolist()]


def _model_record(reader: TokenReader, grid: tuple[int, int]) -> Record:
    config = getattr(reader.tower, "config", None)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(reader.description).items()} | {
        "parameters": sum(parameter.numel() for parameter in reader.tower.parameters()),
        "gmacs": count_macs(reader, grid[0] * grid[1]) / 1e9,
        "weights": weights_fingerprint(reader.tower),
        "test_time_registers": bool(getattr(config, "register_neurons", None)),
        "register_sizes": getattr(config, "register_sizes", None),
    }


def count_macs(reader: TokenReader, num_patches: int) -> int:
    """Count the multiply-adds of one image: linear layers of the blocks, both attention products, patch embedding.

    For an MLP ratio of 4 and patches of p x p pixels this is L (12 D² T + 2 D T²) + N D 3 p².
    """
    description = reader.description
    tokens = description.num_prefix_tokens + num_patches
    blocks = reader.tower.get_submodule(reader.family.blocks)
    weights = sum(module.weight.numel() for module in blocks.modules() if isinstance(module, nn.Linear))
    attention = 2 * description.num_layers * description.hidden_size * tokens**2
    pixels = 3 * description.patch_size[0] * description.patch_size[1]
    return weights * tokens + attention + num_patches * description.hidden_size * pixels


def _warnings(readings: Readings) -> list[str]:
    found = []
    if len(readings.ids) < ENOUGH_IMAGES:
        found.append(
            f"The diagnosis used only {len(readings.ids)} images. With fewer than {ENOUGH_IMAGES}, another sample may "
            "give different numbers."
        )
    if readings.skipped:
        found.append(f"{len(readings.skipped)} images were skipped{first_reason(readings.skipped)}.")
    for text in found:
        logger.warning("%s", text)
    return found


def _controls(case: _Case, source: object) -> Record | None:
    readings = case.readings
    if not readings.register_norms:
        return None
    labels = labels_of(source, [readings.ids[i] for i in readings.kept])
    return register_controls(case.reader, readings.pixels, labels=labels, batch_size=case.batch_size, seed=case.seed)


# --- During training ---


def artifact_snapshot(model: TokenReader | nn.Module, pixel_values: Tensor) -> dict[str, float]:
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
    reader = open_model(model)
    blocks = range(1, reader.description.num_layers + 1)
    reading, final = read_norms(reader, pixel_values, blocks, num_last=_RANK_IMAGES)
    residual = reading["residual"]
    cutoffs = {layer: find_cutoff(residual.patches(layer).numpy()) for layer in residual.layers}
    layer = reported_layer(cutoffs)
    found, norms = cutoffs[layer], residual.patches(layer)
    count, prefix = residual.num_register_tokens, residual.num_prefix_tokens
    values = {
        "outlier_share": found.share,
        "separation": found.separation,
        "bimodal": float(found.bimodal),
        "layer": float(layer),
        "cutoff": found.cutoff,
        "norm_median": float(np.median(norms)),
        "norm_max": norms.max().item(),
        "effective_rank": effective_rank(final[:, prefix:]).mean().item(),
        "norm_ratio": found.ratio,
        "register_norm": residual.registers(layer).flatten().quantile(0.5).item() if count else None,
        "register_cosine": register_cosine(final[:, prefix - count : prefix]).mean().item() if count > 1 else None,
    }
    if "attention" in reading:
        row = reading["attention"].values[0]
        statistics = attention_statistics(row, num_prefix_tokens=prefix, num_register_tokens=count)
        values["attention_entropy"] = statistics["entropy_share"].mean().item()
        values["attention_registers"] = statistics["mass_on_registers"].mean().item() if count else None
    return {name: value for name, value in values.items() if value is not None}
