"""Test-time registers: registers for a trained model, without training (arXiv 2506.08010).

In a model with artifacts, a few MLP neurons, the same ones in every image, write the huge norm into some patches.
`find_register_neurons` searches for these neurons, and `add_test_time_registers` makes them write into registers
instead. `retrofit` does both and measures the effect on held-out images. The result is an ordinary RegViT: its config
lists the neurons, its registers are zero, and it has no hooks.

Shapes: n images, B images of a batch, R registers, N patches, T = 1 + R + N tokens, D width, H neurons of an MLP, L
blocks. Layer i is the output of block i counted from 1, as in a diagnosis. The blocks of neurons are counted from 0,
as in `model.layers`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data.preparation import PreparedImages, prepare_images
from ..models.loading import choose_device, open_model, open_regvit
from ..models.manifest import whole_checkpoint
from ..models.processing import EvaluationTransform, known_processor
from ..models.results import Record, Result, Stopwatch, markdown_table
from ..models.saving import check_space, keeping, num_bytes
from ..models.tokens import TokenReader
from .outliers import find_cutoff
from .readings import read_norms
from .register_neurons import (
    RegisterNeurons,
    RetrofitError,
    add_test_time_registers,
    check_no_registers,
    read_all_norms,
    search_neurons,
    silence_neurons,
    with_shared_weights,
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


@dataclass(frozen=True, repr=False)
class RetrofitReport(Result):
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
            outliers and on registers. Without CLS, `cls_cosine` is that of the mean patch, and no attention is read.
        settings: Settings of the call.
        seconds: Wall time of each step.
    """

    model: Record
    neurons: list[list[int]]
    scores: list[float]
    num_register_tokens: int
    layer: int
    cutoff: float
    emergence: int
    images: dict[str, int]
    tried: list[Record]
    judged: dict[str, Record]
    settings: Record
    seconds: dict[str, float]

    file_name: ClassVar = "retrofit_report.json"

    @property
    def verdict(self) -> str:
        """Conclusion in one sentence."""
        before, after = self.judged["before"], self.judged["after"]
        left = after["layers_with_outliers"]
        rest = f"still finds outliers at blocks {left}" if left else "no longer finds any outliers"
        return (
            f"Outliers fell from {before['outlier_share']:.2%} to {after['outlier_share']:.2%} of the patches, and "
            f"the largest norm fell from {before['max_norm']:.0f} to {after['max_norm']:.0f}; a diagnosis {rest}."
        )

    def _neuron_text(self, shown: int, *, scores: bool = False) -> str:
        names = [f"{b}.{n}" + f" ({s:.1f})" * scores for (b, n), s in zip(self.neurons[:shown], self.scores)]
        return ", ".join(names) + f" and {len(self.neurons) - shown} more" * (len(self.neurons) > shown)

    @property
    def _vector(self) -> str:
        return "CLS" if "attention_on_outliers" in self.judged["before"] else "mean patch"

    @property
    def card_text(self) -> str:
        """Paragraph for a model card."""
        after = self.judged["after"]
        return (
            f"The model has test-time registers (arXiv 2506.08010), which need no training. {len(self.neurons)} of "
            f"the {self.model['num_neurons']:,} MLP neurons ({self._neuron_text(10)}, as block.neuron counted from 0) "
            f"write into {self.num_register_tokens} zero register{'s' * (self.num_register_tokens > 1)} instead of "
            f"into patches. Result on {self.images['judged']} held-out images: {self.verdict} The mean cosine with "
            f"the base model is {after['cls_cosine']:.3f} for {self._vector} and {after['patch_cosine']:.3f} for "
            "patches that were not outliers."
        )

    def summary(self) -> str:
        """Return a summary for a terminal."""
        lines = [
            f"model      {self.model['name']}: {self.model['num_layers']} blocks, {self.model['num_neurons']:,} "
            "neurons",
            f"search     outliers: norm above {self.cutoff:.1f} at block {self.layer}, first at block "
            f"{self.emergence} (counted from 1); {self.images['search']} images, and "
            f"{self.images['choice']} others for the choice",
            f"neurons    {len(self.neurons)}, as block.neuron counted from 0 (mean activation at outliers): "
            f"{self._neuron_text(5, scores=True)}",
            f"registers  {self.num_register_tokens}",
            markdown_table(self._rows()),
        ]
        return "\n".join([*lines, f"verdict    {self.verdict}", f"took       {self.seconds['total']:.0f} s"])

    def _rows(self) -> list[list[str]]:
        """Return the measurements on the test images as a table."""
        columns = {
            "outliers": ("outlier_share", ".2%"),
            "largest norm": ("max_norm", ".1f"),
            f"cosine {self._vector}": ("cls_cosine", ".3f"),
            "patches": ("patch_cosine", ".3f"),
            "CLS on outliers": ("attention_on_outliers", ".1%"),
            "registers": ("attention_on_registers", ".1%"),
        }
        columns = {title: column for title, column in columns.items() if column[0] in self.judged["before"]}
        rows = [[name, *(f"{row[key]:{form}}" for key, form in columns.values())] for name, row in self.judged.items()]
        return [[f"{self.images['judged']} held-out images", *columns], *rows]


@dataclass(frozen=True, eq=False, repr=False)
class RetrofitResult:
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

    def __repr__(self) -> str:
        return f"<RetrofitResult: {self.report.verdict}>"

    def _repr_html_(self) -> str:
        return self.report._repr_html_()

    def summary(self) -> str:
        """Return a summary for a terminal."""
        return self.report.summary()

    def to_dict(self) -> Record:
        """Return the report as plain values for JSON."""
        return self.report.to_dict()

    def save(self, folder: str | Path) -> Path:
        """Write a checkpoint with code files, image processor and `retrofit_report.json`; return the folder.

        Raises:
            NoSpaceError: The checkpoint does not fit on the disk.
            FileExistsError: The folder already contains a checkpoint.
        """
        _check_new(folder)
        needed = num_bytes(self.model.state_dict().values())
        with keeping(self.summary), whole_checkpoint(folder, needed=needed) as staged:
            self.model.save_pretrained(staged)
            if (processor := known_processor(self.model)) is not None:
                processor.save_pretrained(staged)
            self.report.save(staged)
        return Path(folder)


def retrofit(
    model: TokenReader | nn.Module | str | Path,
    images: object,
    *,
    num_register_tokens: int | None = None,
    top_k: int | None = None,
    highest_block: int | None = None,
    cutoff: float | str = "auto",
    max_images: int = 500,
    processor: object = None,
    batch_size: int = 32,
    seed: int = 0,
    device: str | torch.device = "auto",
    progress: bool = True,
    output_dir: str | Path | None = None,
) -> RetrofitResult:
    """Add test-time registers to a trained model, with forward passes only.

    The images are split at random: at least half of them serve to search the neurons, up to a quarter (at most 64) to
    choose the numbers of neurons and registers, and a quarter to test the result. Among the candidates that remove
    95 % of the outliers, the choice is the smallest one that changes CLS and normal patches as little as the best one
    (mean cosine within 0.001): first the number of neurons, then the number of registers. If an image has several
    outliers, one register may not suffice, because a single token cannot receive the attention of several.

    Args:
        model: Model without registers, its name, or a reader; see `open_model`. A model of another family is converted
            to a RegViT.
        images: Images as for `diagnose`; at least 32, and 500 for reproducible numbers.
        num_register_tokens: Number of registers R; default chosen among 1, 2, 4 and 8.
        top_k: Number of neurons; default chosen among 1 to 50.
        highest_block: Last block to take neurons from, counted from 0; default the one whose output has the first
            outliers.
        cutoff: "auto", or the norm above which a patch counts as an outlier.
        max_images: Maximum number of images, drawn at random; the first ones of a stream.
        processor: Image processor; default the model's own.
        batch_size: Number of images per forward pass.
        seed: Random seed for the draw, the splits and the random neurons.
        device: Device to compute on; see `open_model`.
        progress: Whether to show a progress bar.
        output_dir: Folder in which to save the result, see `RetrofitResult.save`; by default, it is not saved.

    Raises:
        FileExistsError: `output_dir` already contains a checkpoint.
        RetrofitError: No outliers to move, no neurons that carry at least half of them, too few images, a setting out
            of range, or a model that already has registers.
        ConversionError: The model cannot be expressed as a RegViT.
        UnknownProcessorError: No image processor is given, and the model has none.

    Source: arXiv 2506.08010.
    """
    _check_new(output_dir)
    watch = Stopwatch()
    reader = _open(model, device, processor)
    if output_dir is not None:  # before the minutes of the search
        check_space(output_dir, num_bytes(reader.model.state_dict().values()))
    description, transform = reader.description, reader.transform
    limits = {"num_register_tokens": num_register_tokens, "top_k": top_k, "highest_block": highest_block}
    drawn: Record = {"max_images": max_images, "batch_size": batch_size, "seed": seed}
    settings = limits | {"cutoff": cutoff} | drawn | {"preprocessing": transform.description}
    _check_ranges(settings, description.num_layers)
    prepared = prepare_images(images, transform, **drawn)
    norms = read_all_norms(reader, prepared, progress=progress)
    parts = _divide(len(norms[0]), seed)
    neurons = search_neurons(reader, prepared, norms, cutoff, parts["search"])
    watch.lap("search")

    tried = _try_candidates(reader, list(_rows(prepared, parts["choice"])), neurons, settings)
    chosen = next(record for record in tried if record["chosen"])
    pairs, registers = neurons.best(chosen["top_k"], highest_block=highest_block), chosen["num_register_tokens"]
    source: Any = reader.model
    made = add_test_time_registers(source, pairs, num_register_tokens=registers)
    if hasattr(reader.processor, "save_pretrained"):
        made.image_processor = reader.processor
    watch.lap("choice")

    batches = _rows(prepared, parts["judged"])
    first = next(batches)
    judged = _measure_on_test_images(reader, made, chain([first], batches), neurons, seed)
    watch.lap("test")
    report = RetrofitReport(
        model={
            "name": Path(model).name if isinstance(model, str | Path) else description.name,
            **{name: getattr(description, name) for name in ("num_layers", "hidden_size")},
            "num_neurons": neurons.scores.numel(),
        },
        neurons=pairs,
        scores=[float(neurons.scores[block, neuron]) for block, neuron in pairs],
        num_register_tokens=registers,
        **{name: getattr(neurons, name) for name in ("layer", "cutoff", "emergence")},
        images={name: int(rows.sum()) for name, rows in parts.items()},
        tried=tried,
        judged=judged,
        settings=settings,
        seconds=watch.seconds,
    )
    result = RetrofitResult(made, source, report, first[:EXAMPLES], transform)
    if output_dir is not None:
        result.save(output_dir)
    return result


def _check_new(folder: str | Path | None) -> None:
    if folder is not None and Path(folder, "config.json").exists():
        raise FileExistsError(f"'{folder}' already contains a checkpoint. Choose another folder or delete it.")


def _open(model: TokenReader | nn.Module | str | Path, device: str | torch.device, processor: object) -> TokenReader:
    """Open a model as a RegViT without registers."""
    if isinstance(model, TokenReader):
        processor = model.processor if processor is None else processor
    elif not isinstance(model, nn.Module):  # a name: the RegViT is on the CPU until now
        device = choose_device(device)
    source = open_regvit(model)
    check_no_registers(source)
    return open_model(source, device=device, processor=processor)


def _check_ranges(settings: Record, num_layers: int) -> None:
    limits = {"num_register_tokens": (1, 1024), "top_k": (1, 10**6), "highest_block": (0, num_layers - 1)}
    for name, (low, high) in limits.items():
        if settings[name] is not None and not low <= settings[name] <= high:
            raise RetrofitError(f"{name}={settings[name]} is out of range. Expected a value in [{low}, {high}].")


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
    cls: Tensor  # (B, D) after the final norm; the mean patch without CLS
    patches: Tensor  # (B, N, D) after the final norm
    attention: Tensor | None  # (B, T) attention of CLS, if any, in the last block, mean over heads


def _read(reader: TokenReader, pixel_values: Tensor) -> _SearchReadings:
    read, tokens = read_norms(reader, pixel_values, "all", num_last=len(pixel_values))
    residual, prefix = read["residual"], read["residual"].num_prefix_tokens
    norms = torch.stack([residual.patches(layer) for layer in residual.layers])
    patches, attention = tokens[:, prefix:], read.get("attention")
    cls = tokens[:, 0] if residual.has_cls else patches.mean(dim=1)
    return _SearchReadings(norms, cls, patches, None if attention is None else attention.at().mean(dim=1))


class _Tally:
    """Running comparison of a variant of a model with the model."""

    def __init__(self, layer: int, cutoff: float, num_register_tokens: int) -> None:
        self.layer, self.cutoff, self.registers = layer, cutoff, num_register_tokens
        self.norms: list[Tensor] = []
        self.values: dict[str, list[Tensor]] = {}

    def add(self, before: _SearchReadings, after: _SearchReadings) -> None:
        """Add the readings of the model and of the variant on the same batch."""
        outlier = before.norms[self.layer] > self.cutoff  # (B, N)
        found = {
            "cls_cosine": F.cosine_similarity(after.cls, before.cls, dim=-1),
            "patch_cosine": F.cosine_similarity(after.patches, before.patches, dim=-1)[~outlier],
        }
        if after.attention is not None:
            _, registers, patches = after.attention.split([1, self.registers, outlier.shape[1]], dim=1)
            found["attention_on_outliers"] = (patches * outlier).sum(dim=1)
            found["attention_on_registers"] = registers.sum(dim=1)
        for name, values in found.items():
            self.values.setdefault(name, []).append(values)
        self.norms.append(after.norms)

    def row(self) -> Record:
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
    reader: TokenReader, pixels: Sequence[Tensor], neurons: RegisterNeurons, settings: Record
) -> list[Record]:
    """Try each number of neurons with one register, then each number of registers with the best number of neurons."""
    before = [_read(reader, batch) for batch in pixels]
    share = float(torch.cat([seen.norms[neurons.layer] for seen in before]).gt(neurons.cutoff).float().mean())
    tried: list[Record] = []

    def attempt(top_k: int, registers: int) -> None:
        pairs = neurons.best(top_k, highest_block=settings["highest_block"])
        candidate = TokenReader(with_shared_weights(reader.model, pairs, registers))
        tally = _Tally(neurons.layer, neurons.cutoff, registers)
        for batch, seen in zip(pixels, before, strict=True):
            tally.add(seen, _read(candidate, batch))
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


def _least_change(tried: Sequence[Record], share: float) -> Record:
    """Return the smallest candidate that removes the outliers and changes little, else the one that removes most."""
    removing = [record for record in tried if record["outlier_share"] <= MAX_REMAINING_SHARE * share]
    if removing:
        kept = [(record["cls_cosine"] + record["patch_cosine"]) / 2 for record in removing]
        # The order is that of the trials: fewer neurons and fewer registers first.
        return next(record for record, cosine in zip(removing, kept) if cosine >= max(kept) - NEGLIGIBLE_COSINE_GAIN)
    return min(tried, key=lambda record: record["outlier_share"])


def _measure_on_test_images(
    reader: TokenReader, made: Any, batches: Iterable[Tensor], neurons: RegisterNeurons, seed: int
) -> dict[str, Record]:
    """Compare the retrofitted model and its controls with the model on the test images."""
    model: Any = reader.model
    registers, pairs = made.config.num_register_tokens, made.config.register_neurons
    random = _random_neurons(pairs, neurons.scores.shape[1], seed)
    variants = {
        "after": made,
        "registers alone": with_shared_weights(model, [], registers),
        "random neurons": with_shared_weights(model, random, registers),
        "neurons silenced, no register": silence_neurons(model, pairs),
    }
    readers = {"before": reader} | {name: TokenReader(variant) for name, variant in variants.items()}
    tallies = {
        name: _Tally(neurons.layer, neurons.cutoff, variant.description.num_register_tokens)
        for name, variant in readers.items()
    }
    for batch in batches:
        before = _read(reader, batch)
        for name, variant in readers.items():
            tallies[name].add(before, before if variant is reader else _read(variant, batch))
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
