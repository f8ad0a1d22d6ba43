"""Test-time registers: registers for a trained model, without training (arXiv 2506.08010).

In a model with artifacts, a few MLP neurons, the same ones in every image, write the huge norm into some patches.
`find_register_neurons` searches for these neurons, and `add_test_time_registers` makes them write into registers
instead. `retrofit` does both and measures the effect on held-out images. The result is an ordinary RegViT: its config
lists the neurons, its registers are zero, and it has no hooks.

Shapes: n images, B images of a batch, R registers, N patches, T = 1 + R + N tokens, D width, H neurons of an MLP, L
blocks. Layer i is the output of block i counted from 1, as in a diagnosis. The blocks of neurons are counted from 0,
as in `model.layers`.
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data.preparation import PreparedImages, prepare_images
from ..models.conversion import image_processor_of, whole_checkpoint
from ..models.families import describe_model, final_norm
from ..models.loading import _open
from ..models.processing import EvaluationTransform
from ..models.tokens import read_many
from .outliers import find_cutoff
from .register_neurons import (
    RegisterNeurons,
    RetrofitError,
    _check_no_registers,
    _find_outliers,
    _read_norms,
    _with_shared_weights,
    add_test_time_registers,
    score_neurons,
    silence_neurons,
)

MIN_IMAGES = 32  # 16 for the search, 8 for the choice, 8 for the test
CHOICE_IMAGES = 64  # at most, because they stay in memory and every candidate reads them

TOP_KS = (1, 2, 3, 5, 10, 20, 50)  # candidate numbers of neurons; published: 10 for OpenCLIP B/16, 50 for DINOv2 L/14
REGISTERS = (1, 2, 4, 8)
MAX_REMAINING_SHARE = 0.05  # largest share of the outliers that may remain if a candidate counts as removing them
EXAMPLES = 4  # test images that are returned, for figures
NEGLIGIBLE_COSINE_GAIN = 0.001  # gain in mean cosine that does not justify more neurons or registers
FAILURE_SHARE = 0.5  # if the best candidate leaves a larger share of the outliers, the retrofit fails


# --- Search, choice and test ---


@dataclass(frozen=True)
class RetrofitReport:
    """Neurons that `retrofit` found, candidates that it tried, and measurements on the test images.

    Attributes:
        model: Name and sizes of the model.
        neurons: `[block, neuron]` pairs, counted from 0, best first.
        scores: Scores of these neurons.
        num_register_tokens: Number of registers R.
        layer: Layer whose norms define the outliers.
        cutoff: Norm above which a patch is an outlier, measured on the images of the search.
        emergence: First layer with outliers.
        images: Number of images of the disjoint splits for the search, the choice and the test.
        tried: One record per candidate: number of neurons and registers, and measurements on the images of the choice.
        judged: Measurements on the test images: "before", "after" and the controls "registers alone", "neurons
            silenced, no register", "random neurons". Each has `outlier_share` and `max_norm` at the layer,
            `last_max_norm`, `median_norm`, `layers_with_outliers` (according to a diagnosis of the test images), the
            cosines of CLS and of normal patches with those before, and the share of the attention of CLS on former
            outliers and on registers.
        settings: Settings of the call.
        seconds: Wall time of each step.
    """

    model: dict[str, Any]
    neurons: list[list[int]]
    scores: list[float]
    num_register_tokens: int
    layer: int
    cutoff: float
    emergence: int
    images: dict[str, int]
    tried: list[dict[str, Any]]
    judged: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def save(self, folder: str | Path) -> Path:
        """Write `retrofit_report.json` into `folder`, which is created if needed, and return its path."""
        path = Path(folder) / "retrofit_report.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return path

    @property
    def verdict(self) -> str:
        """Conclusion in one sentence."""
        before, after = self.judged["before"], self.judged["after"]
        left = after["layers_with_outliers"]
        rest = (
            f"a diagnosis still finds outliers at blocks {left}"
            if left
            else "a diagnosis no longer finds any outliers"
        )
        return (
            f"Outliers fell from {before['outlier_share']:.2%} to {after['outlier_share']:.2%} of the patches, and "
            f"the largest norm fell from {before['max_norm']:.0f} to {after['max_norm']:.0f}; {rest}."
        )

    @property
    def card_text(self) -> str:
        """Paragraph for a model card."""
        names = ", ".join(f"{block}.{neuron}" for block, neuron in self.neurons[:10])
        more = f" and {len(self.neurons) - 10} more" if len(self.neurons) > 10 else ""
        after = self.judged["after"]
        return (
            f"The model has test-time registers (arXiv 2506.08010), which need no training. {len(self.neurons)} of "
            f"the {self.model['num_neurons']:,} MLP neurons ({names}{more}, as block.neuron counted from 0) write "
            f"into {self.num_register_tokens} zero register{'s' * (self.num_register_tokens > 1)} instead of into "
            f"patches. Result on {self.images['judged']} held-out images: {self.verdict} The mean cosine with the "
            f"base model is {after['cls_cosine']:.3f} for CLS and {after['patch_cosine']:.3f} for patches that were "
            "not outliers."
        )

    def summary(self) -> str:
        """Return a summary for a terminal."""
        shown = ", ".join(f"{b}.{n} ({s:.1f})" for (b, n), s in zip(self.neurons[:5], self.scores))
        more = f" and {len(self.neurons) - 5} more" if len(self.neurons) > 5 else ""
        judged_on = f"{self.images['judged']} held-out images"
        lines = [
            f"model      {self.model['name']}: {self.model['num_layers']} blocks, {self.model['num_neurons']:,} "
            "neurons",
            f"search     outliers: norm above {self.cutoff:.1f} at block {self.layer}, first at block "
            f"{self.emergence} (counted from 1); {self.images['search']} images, and "
            f"{self.images['choice']} others for the choice",
            f"neurons    {len(self.neurons)}, as block.neuron counted from 0 (mean activation at outliers): "
            f"{shown}{more}",
            f"registers  {self.num_register_tokens}",
            f"{judged_on:31}{'outliers':>9}{'largest norm':>14}{'cosine CLS':>12}{'patches':>9}"
            f"{'CLS on outliers':>17}{'registers':>11}",
        ]
        for name, row in self.judged.items():
            lines.append(
                f"  {name:29}{row['outlier_share']:9.2%}{row['max_norm']:14.1f}{row['cls_cosine']:12.3f}"
                f"{row['patch_cosine']:9.3f}{row['attention_on_outliers']:17.1%}{row['attention_on_registers']:11.1%}"
            )
        return "\n".join([*lines, f"verdict    {self.verdict}", f"took       {self.seconds['total']:.0f} s"])


@dataclass(frozen=True, eq=False)
class Retrofit:
    """Result of `retrofit`.

    Attributes:
        model: RegViT with test-time registers.
        source: RegViT that it was made from.
        report: Report with all measurements.
        examples: (4, 3, H, W) pixels of test images.
        transform: Transform that produced these pixels and can convert them back to images.
    """

    model: Any
    source: Any
    report: RetrofitReport
    examples: Tensor
    transform: EvaluationTransform


def retrofit(
    source: str | Path | nn.Module,
    images: Any,
    *,
    num_register_tokens: int | None = None,
    top_k: int | None = None,
    highest_block: int | None = None,
    cutoff: float | str = "auto",
    max_images: int = 500,
    processor: Any = None,
    batch_size: int = 32,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> Retrofit:
    """Add test-time registers to a trained model, with forward passes only.

    The images are split at random: at least half of them serve to search the neurons, up to a quarter (at most 64) to
    choose the numbers of neurons and registers, and a quarter to test the result. Among the candidates that remove
    95 % of the outliers, the choice is the smallest one that changes CLS and normal patches as little as the best one
    (mean cosine within 0.001): first the number of neurons, then the number of registers. If an image has several
    outliers, one register may not suffice, because a single token cannot receive the attention of several.

    Args:
        source: RegViT without registers, or anything that `convert` accepts.
        images: Images as for `diagnose`; at least 32, and 500 for reproducible numbers.
        num_register_tokens: Number of registers R; default chosen among 1, 2, 4 and 8.
        top_k: Number of neurons; default chosen among 1 to 50.
        highest_block: Last block to take neurons from, counted from 0; default the one whose output has the first
            outliers.
        cutoff: "auto", or the norm above which a patch counts as an outlier.
        max_images: Maximum number of images, drawn at random; the first ones of a stream.
        processor: Image processor; default the one saved with the source.
        batch_size: Number of images per forward pass.
        seed: Random seed for the draw, the splits and the random neurons.
        device: Device to compute on; default that of a module, otherwise the CPU.
        progress: Whether to show a progress bar.

    Raises:
        RetrofitError: No outliers to move, no neurons that carry at least half of them, too few images, a setting out
            of range, or a model that already has registers.
        ConversionError: `source` cannot be expressed as a RegViT.

    Source: arXiv 2506.08010.
    """
    started = time.perf_counter()
    model = _open(source)
    _check_no_registers(model)
    _check_ranges(model, num_register_tokens, top_k, highest_block)
    if device is not None:
        model = model.to(device)
    if processor is None and not isinstance(source, nn.Module):
        processor = image_processor_of(source, model.config)
    transform = EvaluationTransform.for_model(model, processor)
    prepared = prepare_images(images, transform, batch_size=batch_size, max_images=max_images, seed=seed)
    neurons, parts = _search_in_part(model, prepared, cutoff, seed, progress=progress)
    searched = time.perf_counter()

    settings = {
        "num_register_tokens": num_register_tokens,
        "top_k": top_k,
        "highest_block": highest_block,
        "cutoff": cutoff,
        "max_images": max_images,
        "batch_size": batch_size,
        "seed": seed,
        "preprocessing": transform.description,
    }
    tried = _try_candidates(model, list(_rows(prepared, parts["choice"])), neurons, settings)
    chosen = next(record for record in tried if record["chosen"])
    pairs, registers = neurons.best(chosen["top_k"], highest_block=highest_block), chosen["num_register_tokens"]
    made = add_test_time_registers(model, pairs, num_register_tokens=registers)
    chose = time.perf_counter()

    batches = _rows(prepared, parts["judged"])
    first = next(batches)
    judged = _measure_on_test_images(model, made, chain([first], batches), neurons, seed)
    description = describe_model(model)
    seconds = {"search": searched - started, "choice": chose - searched, "judgement": time.perf_counter() - chose}
    report = RetrofitReport(
        model={
            "name": description.name if isinstance(source, nn.Module) else Path(source).name,
            "num_layers": description.num_layers,
            "hidden_size": description.hidden_size,
            "num_neurons": neurons.scores.numel(),
        },
        neurons=pairs,
        scores=[float(neurons.scores[block, neuron]) for block, neuron in pairs],
        num_register_tokens=registers,
        layer=neurons.layer,
        cutoff=neurons.cutoff,
        emergence=neurons.emergence,
        images={name: int(rows.sum()) for name, rows in parts.items()},
        tried=tried,
        judged=judged,
        settings=settings,
        seconds={name: round(value, 2) for name, value in (seconds | {"total": sum(seconds.values())}).items()},
    )
    return Retrofit(made, model, report, first[:EXAMPLES], transform)


def _check_ranges(
    model: nn.Module, num_register_tokens: int | None, top_k: int | None, highest_block: int | None
) -> None:
    last = describe_model(model).num_layers - 1
    for name, value, low, high in (
        ("num_register_tokens", num_register_tokens, 1, 1024),
        ("top_k", top_k, 1, 10**6),
        ("highest_block", highest_block, 0, last),
    ):
        if value is not None and not low <= value <= high:
            raise RetrofitError(f"{name}={value} is out of range. Expected a value in [{low}, {high}].")


def _search_in_part(
    model: nn.Module, images: PreparedImages, cutoff: float | str, seed: int, *, progress: bool
) -> tuple[RegisterNeurons, dict[str, NDArray[np.bool_]]]:
    """Run `find_register_neurons` on the search split; return its result and the masks of all splits."""
    norms = _read_norms(model, images, progress=progress)
    parts = _divide(len(norms[0]), seed)
    search = parts["search"]
    found, layer, emergence = _find_outliers({i: values[search] for i, values in norms.items()}, cutoff)
    scores = score_neurons(model, images, (norms[layer] > found.cutoff) & search[:, None])
    return RegisterNeurons(scores, layer, found.cutoff, emergence, found.share, int(search.sum())), parts


def _divide(num_images: int, seed: int) -> dict[str, NDArray[np.bool_]]:
    """Split the images at random into three disjoint sets; return their masks (n,)."""
    if num_images < MIN_IMAGES:
        raise RetrofitError(
            f"{num_images} images can be used, but a retrofit needs at least {MIN_IMAGES}, because search, choice and "
            "test use different images. Use 500 or more for reproducible numbers."
        )
    order = np.random.default_rng(seed).permutation(num_images)
    quarter = num_images // 4
    parts = {"judged": order[:quarter], "choice": order[quarter : quarter + min(quarter, CHOICE_IMAGES)]}
    parts["search"] = order[quarter + len(parts["choice"]) :]
    return {name: np.isin(np.arange(num_images), parts[name]) for name in ("search", "choice", "judged")}


def _rows(images: PreparedImages, wanted: NDArray[np.bool_]) -> Iterator[Tensor]:
    """Yield batches of pixels of the wanted images only."""
    position = 0
    for ids, pixel_values in images:
        rows = torch.from_numpy(wanted[position : position + len(ids)])
        position += len(ids)
        if rows.any():
            yield pixel_values[rows]


@dataclass(frozen=True, eq=False)
class _SearchReadings:
    """Readings of a model on a batch."""

    norms: Tensor  # (L + 1, B, N) norms of the patches; layer 0 is the embedding
    cls: Tensor  # (B, D) after the final norm
    patches: Tensor  # (B, N, D) after the final norm
    attention: Tensor  # (B, T) attention of CLS in the last block, mean over heads


def _see(model: nn.Module, pixel_values: Tensor) -> _SearchReadings:
    last = describe_model(model).num_layers

    def norms_or_tokens(tokens: Tensor, layer: int) -> Tensor:
        return tokens if layer == last else tokens.float().norm(dim=-1)

    def cls_row(weights: Tensor, layer: int) -> Tensor:
        return weights[:, :, 0].float().mean(dim=1)  # (B, T)

    readings = read_many(
        model,
        pixel_values,
        {"residual": "all", "attention": (-1,)},
        reduce={"residual": norms_or_tokens, "attention": cls_row},
    )
    residual = readings["residual"]
    with torch.no_grad():
        tokens = final_norm(model)(residual.at()).float()  # (B, T, D)
    norms = [residual.patches(layer) for layer in residual.layers[:-1]]
    norms.append(residual.patches().float().norm(dim=-1))
    return _SearchReadings(
        torch.stack(norms).cpu(),
        tokens[:, 0].cpu(),
        tokens[:, residual.num_prefix_tokens :].cpu(),
        readings["attention"].at().cpu(),
    )


class _Tally:
    """Running comparison of a variant of a model with the model."""

    def __init__(self, layer: int, cutoff: float, num_register_tokens: int) -> None:
        self.layer, self.cutoff, self.registers = layer, cutoff, num_register_tokens
        self.norms: list[Tensor] = []
        self.values: dict[str, list[Tensor]] = {}

    def add(self, before: _SearchReadings, after: _SearchReadings) -> None:
        """Add the readings of the model and of the variant on the same batch."""
        outlier = before.norms[self.layer] > self.cutoff  # (B, N)
        attention = after.attention[:, 1 + self.registers :]
        found = {
            "cls_cosine": F.cosine_similarity(after.cls, before.cls, dim=-1),
            "patch_cosine": F.cosine_similarity(after.patches, before.patches, dim=-1)[~outlier],
            "attention_on_outliers": (attention * outlier).sum(dim=1),
            "attention_on_registers": after.attention[:, 1 : 1 + self.registers].sum(dim=1),
        }
        for name, values in found.items():
            self.values.setdefault(name, []).append(values)
        self.norms.append(after.norms)

    def row(self) -> dict[str, Any]:
        """Return means over images (over normal patches for `patch_cosine`), and statistics of the norms."""
        norms = torch.cat(self.norms, dim=1).numpy()  # (L + 1, n, N)
        here = norms[self.layer]
        distinct = [layer for layer in range(1, len(norms)) if find_cutoff(norms[layer]).bimodal]
        return {
            "outlier_share": float((here > self.cutoff).mean()),
            "max_norm": float(here.max()),
            "median_norm": float(np.median(here)),
            "last_max_norm": float(norms[-1].max()),
            "layers_with_outliers": distinct,
        } | {name: float(torch.cat(values).mean()) for name, values in self.values.items()}


def _try_candidates(
    model: Any, pixels: Sequence[Tensor], neurons: RegisterNeurons, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Try each number of neurons with one register, then each number of registers with the best number of neurons."""
    before = [_see(model, batch) for batch in pixels]
    share = float(torch.cat([seen.norms[neurons.layer] for seen in before]).gt(neurons.cutoff).float().mean())
    tried: list[dict[str, Any]] = []

    def attempt(top_k: int, registers: int) -> None:
        pairs = neurons.best(top_k, highest_block=settings["highest_block"])
        candidate = _with_shared_weights(model, pairs, registers)
        tally = _Tally(neurons.layer, neurons.cutoff, registers)
        for batch, seen in zip(pixels, before, strict=True):
            tally.add(seen, _see(candidate, batch))
        tried.append({"top_k": len(pairs), "num_register_tokens": registers} | tally.row())

    asked_k, asked_registers = settings["top_k"], settings["num_register_tokens"]
    for top_k in TOP_KS if asked_k is None else (asked_k,):
        if not tried or len(neurons.best(top_k, highest_block=settings["highest_block"])) > tried[-1]["top_k"]:
            attempt(top_k, asked_registers or REGISTERS[0])
    if asked_registers is None:
        best = _least_change(tried, share)
        for registers in REGISTERS[1:]:
            attempt(best["top_k"], registers)
    chosen = _least_change(tried, share)
    if chosen["outlier_share"] > FAILURE_SHARE * share:
        raise RetrofitError(
            f"The {chosen['top_k']} neurons found do not carry the outliers: {share:.2%} of the patches are outliers "
            f"before, and {chosen['outlier_share']:.2%} after. Try a higher highest_block or another cut-off."
        )
    for record in tried:
        record["chosen"] = record is chosen
    return tried


def _least_change(tried: Sequence[dict[str, Any]], share: float) -> dict[str, Any]:
    """Return the smallest candidate that removes the outliers and changes little, else the one that removes most."""
    removing = [record for record in tried if record["outlier_share"] <= MAX_REMAINING_SHARE * share]
    if removing:
        kept = [(record["cls_cosine"] + record["patch_cosine"]) / 2 for record in removing]
        # The order is that of the trials: fewer neurons and fewer registers first.
        return next(record for record, cosine in zip(removing, kept) if cosine >= max(kept) - NEGLIGIBLE_COSINE_GAIN)
    return min(tried, key=lambda record: record["outlier_share"])


def _measure_on_test_images(
    model: Any, made: Any, batches: Iterable[Tensor], neurons: RegisterNeurons, seed: int
) -> dict[str, dict[str, Any]]:
    """Compare the retrofitted model and its controls with the model on the test images."""
    registers, pairs = made.config.num_register_tokens, made.config.register_neurons
    random = _random_neurons(pairs, neurons.scores.shape[1], seed)
    variants = {
        "before": model,
        "after": made,
        "registers alone": _with_shared_weights(model, [], registers),
        "random neurons": _with_shared_weights(model, random, registers),
        "neurons silenced, no register": silence_neurons(model, pairs),
    }
    tallies = {
        name: _Tally(neurons.layer, neurons.cutoff, variant.config.num_register_tokens)
        for name, variant in variants.items()
    }
    for batch in batches:
        before = _see(model, batch)
        for name, variant in variants.items():
            tallies[name].add(before, before if variant is model else _see(variant, batch))
    return {name: tally.row() for name, tally in tallies.items()}


def _random_neurons(pairs: Sequence[Sequence[int]], width: int, seed: int) -> list[list[int]]:
    """Draw as many other neurons in the same blocks."""
    rng, taken = np.random.default_rng(seed), {tuple(pair) for pair in pairs}
    found: list[list[int]] = []
    for block, _ in pairs:
        neuron = next(n for n in rng.permutation(width).tolist() if (block, n) not in taken)
        taken.add((block, neuron))
        found.append([block, neuron])
    return found


def retrofit_to_folder(source: str | Path, images: Any, output_dir: str | Path, **settings: Any) -> Retrofit:
    """Run `retrofit` and save a checkpoint with code files, image processor and `retrofit_report.json`.

    Args:
        source: Folder, file or Hub id of the model, as for `retrofit`.
        images: Images as for `retrofit`.
        output_dir: Folder for the checkpoint; it must not contain one yet.
        settings: Keyword arguments of `retrofit`.

    Raises:
        FileExistsError: `output_dir` already contains a checkpoint.
    """
    output = Path(output_dir)
    if (output / "config.json").exists():
        raise FileExistsError(f"'{output}' already contains a checkpoint. Choose another output_dir or delete it.")
    result = retrofit(source, images, **settings)
    with whole_checkpoint(output) as staged:
        result.model.save_pretrained(staged)
        image_processor_of(source, result.model.config).save_pretrained(staged)
        result.report.save(staged)
    return result
