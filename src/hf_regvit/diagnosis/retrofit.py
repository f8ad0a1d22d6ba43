"""Test-time registers: registers for a trained model, without training (arXiv 2506.08010).

In a model with artifacts, a few MLP neurons, the same ones in every image, write the huge norm into some patches.
`find_register_neurons` searches for these neurons, and `add_test_time_registers` makes them write into registers
instead. `retrofit` does both and measures the effect on held-out images. The result is an ordinary RegViT: its config
lists the neurons, its registers are zero, and it has no hooks.

Shapes: n images, B images of a batch, R registers, N patches, T = 1 + R + N tokens, D width, H neurons of an MLP, L
blocks. Layer i is the output of block i counted from 1, as in a diagnosis. The blocks of neurons are counted from 0,
as in `model.layers`.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.image_processing_utils import BaseImageProcessor

from ..data.preparation import PreparedImages, prepare_images
from ..models.loading import choose_device, open_model, open_regvit, short_names
from ..models.manifest import whole_checkpoint
from ..models.modeling_regvit import RegViTForImageClassification, RegViTPreTrainedModel
from ..models.processing import EvaluationTransform, ImageProcessor, known_processor
from ..models.results import Record, Result, Stopwatch, markdown_table
from ..models.saving import check_space, keeping, num_bytes
from ..models.tokens import TokenReader, evaluating
from .outliers import find_cutoff, reported_layer
from .readings import read_norms, token_norms
from .register_neurons import (
    RegisterNeurons,
    RetrofitError,
    add_test_time_registers,
    check_no_neurons,
    read_all_norms,
    search_neurons,
    silence_neurons,
    with_shared_weights,
)

logger = logging.getLogger(__name__)

MIN_IMAGES = 32  # 16 for the search, 8 for the choice, 8 for the test
CHOICE_IMAGES = 64  # at most, because they stay in memory and every candidate reads them

TOP_KS = (1, 2, 3, 5, 10, 20, 50)  # candidate numbers of neurons; published: 10 for OpenCLIP B/16, 50 for DINOv2 L/14
REGISTERS = (1, 2, 4, 8)
MAX_REMAINING_SHARE = 0.05  # largest share of the outliers that may remain if a candidate counts as removing them
EXAMPLES = 4  # test images that are returned, for figures
NEGLIGIBLE_COSINE_GAIN = 0.001  # gain in mean cosine that does not justify more neurons or registers
MAX_COSINE_LOSS = 0.02  # loss of cosine with the source in one more pass that makes the model worse
MAX_SUGGESTED_REGISTERS = 16
WORTHWHILE_COSINE_GAIN = 0.005  # gain in mean cosine at a larger image size for which more registers are suggested
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
            cosines of CLS and of normal patches with those before, the share of the attention of CLS on former
            outliers and on registers, and for a classifier the share of images with the same class as before. Without
            CLS, `cls_cosine` is that of the mean patch, and no attention is read.
        settings: Settings of the call.
        seconds: Wall time of each step.
        passes: One record per group of neurons, in the order of the search: layer, cut-off and emergence of its
            outliers, their share before and after, neurons, and cosines with the source.
        stopped: Reason why the search ended after the last pass.
        sizes: Measurements on the test images at other image sizes.
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
    passes: list[Record] | None = None
    stopped: str | None = None
    sizes: list[Record] | None = None

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
        same = f" The predicted class is the same for {after['same_class']:.1%}." if "same_class" in after else ""
        return (
            f"The model has test-time registers (arXiv 2506.08010), which need no training. {len(self.neurons)} of "
            f"the {self.model['num_neurons']:,} MLP neurons ({self._neuron_text(10)}, as block.neuron counted from 0) "
            f"write into {self.num_register_tokens} zero register{'s' * (self.num_register_tokens > 1)} instead of "
            f"into patches. Result on {self.images['judged']} held-out images: {self.verdict} The mean cosine with "
            f"the base model is {after['cls_cosine']:.3f} for {self._vector} and {after['patch_cosine']:.3f} for "
            f"patches that were not outliers.{same}"
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
            *self._pass_lines(),
            markdown_table(self.table_rows()),
        ]
        return "\n".join([*lines, f"verdict    {self.verdict}", f"took       {self.seconds['total']:.0f} s"])

    def _pass_lines(self) -> list[str]:
        """Return a line for each group of neurons if there are several, and one for each image size."""
        groups = [
            f"group {i}    {len(found['neurons'])} neurons; outliers of block {found['layer']} fell from "
            f"{found['share']:.2%} to {found['share_after']:.2%}"
            for i, found in enumerate(self.passes or (), start=1)
        ]
        sizes = [
            f"at {found['image_size']:<8}outliers fell from {found['share_before']:.2%} to {found['share_after']:.2%} "
            f"({found['outliers_per_image']:.1f} per image before); cosine of patches {found['patch_cosine']:.3f}; "
            f"suggested registers: {found['suggested_registers']}"
            for found in self.sizes or ()
        ]
        return groups * (len(groups) > 1) + sizes

    def table_rows(self) -> list[list[str]]:
        """Return the measurements on the test images as a table."""
        columns = {
            "outliers": ("outlier_share", ".2%"),
            "largest norm": ("max_norm", ".1f"),
            f"cosine {self._vector}": ("cls_cosine", ".3f"),
            "patches": ("patch_cosine", ".3f"),
            "CLS on outliers": ("attention_on_outliers", ".1%"),
            "registers": ("attention_on_registers", ".1%"),
            "same class": ("same_class", ".1%"),
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

    model: RegViTPreTrainedModel
    source: RegViTPreTrainedModel
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
            if isinstance(processor := known_processor(self.model), BaseImageProcessor):
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
    max_passes: int = 4,
    image_sizes: Sequence[int] = (),
    cutoff: float | str = "auto",
    max_images: int = 500,
    processor: ImageProcessor | None = None,
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
    (mean cosine within 0.001): first the number of neurons, then the number of registers. One register may not
    suffice for several outliers in an image.

    Args:
        model: Model, its name, or a reader; see `open_model`. A model of another family is converted to a RegViT.
            Registers that it has remain as they are, and the new ones follow them.
        images: Images as for `diagnose`; at least 32, and 500 for reproducible numbers.
        num_register_tokens: Number of registers R; default chosen among 1, 2, 4 and 8.
        top_k: Number of neurons; default chosen among 1 to 50.
        highest_block: Last block to take neurons from, counted from 0; default the one whose output has the first
            outliers.
        max_passes: Maximum number of groups of neurons, each searched in the model repaired so far, until no group is
            left, one does not help, or one changes the model too much.
        image_sizes: Other image sizes in pixels to test. Those without outliers are stored as `register_sizes`, and
            the model warns about images outside of their range.
        cutoff: "auto", or the norm above which a patch counts as an outlier in the first pass.
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
            of range, or a model that already has test-time registers.
        ConversionError: The model cannot be expressed as a RegViT.
        UnknownProcessorError: No image processor is given, and the model has none.

    Source: arXiv 2506.08010.
    """
    _check_new(output_dir)
    watch, reader = Stopwatch(), _open(model, device, processor)
    if output_dir is not None:  # before the minutes of the search
        check_space(output_dir, num_bytes(reader.model.state_dict().values()))
    description, transform = reader.description, reader.transform
    drawn: Record = {"max_images": max_images, "batch_size": batch_size, "seed": seed}
    settings = {
        "num_register_tokens": num_register_tokens, "top_k": top_k, "highest_block": highest_block,
        "max_passes": max_passes, "cutoff": cutoff, "image_sizes": list(image_sizes), **drawn,
        "preprocessing": transform.description,
    }  # fmt: skip
    _check_ranges(settings, description.num_layers)
    prepared = prepare_images(images, transform, **drawn)
    norms = read_all_norms(reader, prepared, progress=progress)
    search = _Search(reader, prepared, _divide(len(norms[0]), seed), settings)
    search.run(norms)
    watch.lap("search")
    tried, registers = search.choose_registers()
    made = add_test_time_registers(search.model, search.pairs, num_register_tokens=registers)
    if isinstance(reader.processor, BaseImageProcessor):
        made.image_processor = reader.processor
    watch.lap("choice")
    logger.info("Measuring the model and its controls on %d test images.", search.parts["judged"].sum())
    batches = _rows(prepared, search.parts["judged"])
    first = next(batches)
    judged = _measure_on_test_images(search, made, chain([first], batches))
    sizes = [
        _measure_size(search, made, prepare_images(images, reader.transform_for(image_size=size), **drawn))
        for size in image_sizes
    ]
    native = [round((first.shape[-2] * first.shape[-1]) ** 0.5)] * (not judged["after"]["layers_with_outliers"])
    made.config.register_sizes = sorted({*native, *(size["image_size"] for size in sizes if size["proved"])}) or None
    watch.lap("test")
    measured = {"tried": tried, "judged": judged, "sizes": sizes, "settings": settings, "seconds": watch.seconds}
    report = _report(model, search, made, measured)
    result = RetrofitResult(made, search.model, report, first[:EXAMPLES], transform)
    if output_dir is not None:
        result.save(output_dir)
    return result


def _report(model: object, search: "_Search", made: RegViTPreTrainedModel, measured: Record) -> RetrofitReport:
    description, neurons = search.reader.description, search.populations[0].neurons
    name = description.name
    if isinstance(model, str | Path):  # a whole Hub id, so that a card can link it
        name = Path(model).name if Path(model).is_file() else short_names([model])[0]
    return RetrofitReport(
        model={
            "name": name,
            **{name: getattr(description, name) for name in ("num_layers", "hidden_size")},
            "num_neurons": neurons.scores.numel(),
        },
        neurons=search.pairs,
        scores=search.scores,
        num_register_tokens=made.config.num_register_tokens - description.num_register_tokens,
        **{name: getattr(neurons, name) for name in ("layer", "cutoff", "emergence")},
        images={name: int(rows.sum()) for name, rows in search.parts.items()},
        passes=search.records,
        stopped=search.stopped,
        **measured,
    )


def _check_new(folder: str | Path | None) -> None:
    if folder is not None and Path(folder, "config.json").exists():
        raise FileExistsError(f"'{folder}' already contains a checkpoint. Choose another folder or delete it.")


def _open(
    model: TokenReader | nn.Module | str | Path, device: str | torch.device, processor: ImageProcessor | None
) -> TokenReader:
    """Open a model as a RegViT without test-time registers."""
    if isinstance(model, TokenReader):
        processor = model.processor if processor is None else processor
    elif not isinstance(model, nn.Module):  # a name: the RegViT is on the CPU until now
        device = choose_device(device)
    source = open_regvit(model)
    check_no_neurons(source)
    return open_model(source, device=device, processor=processor)


def _check_ranges(settings: Record, num_layers: int) -> None:
    limits = {"num_register_tokens": (1, 1024), "top_k": (1, 10**6), "highest_block": (0, num_layers - 1),
              "max_passes": (1, 100)}  # fmt: skip
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
    classes: Tensor | None = None  # (B,) classes that a classifier predicts


def _read(reader: TokenReader, pixel_values: Tensor) -> _SearchReadings:
    read, tokens = read_norms(reader, pixel_values, "all", num_last=len(pixel_values))
    residual, prefix = read["residual"], read["residual"].num_prefix_tokens
    norms = torch.stack([residual.patches(layer) for layer in residual.layers])
    patches, attention = tokens[:, prefix:], read.get("attention")
    cls = tokens[:, 0] if residual.has_cls else patches.mean(dim=1)
    return _SearchReadings(norms, cls, patches, None if attention is None else attention.at().mean(dim=1))


def _read_with_classes(reader: TokenReader, pixel_values: Tensor) -> _SearchReadings:
    """Read a batch, and predict its classes if the model is a classifier."""
    seen, model = _read(reader, pixel_values), reader.model
    if not isinstance(model, RegViTForImageClassification):
        return seen
    with evaluating(model):
        logits = model(pixel_values.to(model.device, model.dtype)).logits
    return replace(seen, classes=logits.argmax(dim=-1))


class _Tally:
    """Running comparison of a variant of a model with the model."""

    def __init__(self, layer: int, cutoff: float, num_register_tokens: int) -> None:
        self.layer, self.cutoff, self.registers = layer, cutoff, num_register_tokens
        self.norms: list[Tensor] = []
        self.values: dict[str, list[Tensor]] = {}

    def add(self, before: _SearchReadings, after: _SearchReadings, outlier: Tensor) -> None:
        """Add the readings of the model and of the variant on the same batch; `outlier` (B, N) are not normal."""
        found = {
            "cls_cosine": F.cosine_similarity(after.cls, before.cls, dim=-1),
            "patch_cosine": F.cosine_similarity(after.patches, before.patches, dim=-1)[~outlier],
        }
        if after.attention is not None:
            _, registers, patches = after.attention.split([1, self.registers, outlier.shape[1]], dim=1)
            found["attention_on_outliers"] = (patches * outlier).sum(dim=1)
            found["attention_on_registers"] = registers.sum(dim=1)
        if before.classes is not None and after.classes is not None:
            found["same_class"] = (before.classes == after.classes).float()
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


@dataclass(frozen=True, eq=False)
class _Population:
    """Outliers that one pass of the search found in a model, the source itself or a candidate of earlier passes."""

    reader: TokenReader
    neurons: RegisterNeurons

    def mask(self, pixel_values: Tensor) -> Tensor:
        """Return the mask (B, N) of the outliers."""
        layer, cutoff = self.neurons.layer, self.neurons.cutoff
        return self.reader.read(pixel_values, layers=(layer,), reduce=token_norms).patches() > cutoff


class _Search:
    """Search for groups of neurons: each pass searches in the source with the groups of earlier passes moved away.

    A second population of outliers may hide under the first one, at another layer and with another cut-off.

    Attributes:
        pairs: `[block, neuron]` pairs of all passes, best first within a pass.
        scores: Their scores.
        populations: One population per pass.
        records: One record per pass.
        stopped: Reason of the end.

    Source: two passes by hand in arXiv 2605.05206; the rules that end the search are our own.
    """

    def __init__(
        self, reader: TokenReader, images: PreparedImages, parts: dict[str, NDArray[np.bool_]], settings: Record
    ) -> None:
        self.reader, self.images, self.parts, self.settings = reader, images, parts, settings
        assert isinstance(reader.model, RegViTPreTrainedModel)
        self.model = reader.model
        self.pixels = list(_rows(images, parts["choice"]))
        self.before = [_read(reader, batch) for batch in self.pixels]
        self.masks = [torch.zeros_like(seen.norms[0], dtype=torch.bool) for seen in self.before]
        self.pairs: list[list[int]] = []
        self.scores: list[float] = []
        self.populations: list[_Population] = []
        self.records: list[Record] = []
        self.tried: list[Record] = []
        self.stopped = f"max_passes={settings['max_passes']} reached"

    def run(self, norms: dict[int, np.ndarray]) -> None:
        """Search until nothing more is found; `norms` are those of the source, `{layer: (n, N)}`.

        Raises:
            RetrofitError: The first pass finds nothing to move.
        """
        reader, cutoff = self.reader, self.settings["cutoff"]
        while len(self.records) < self.settings["max_passes"]:
            try:
                neurons = search_neurons(reader, self.images, norms, cutoff, self.parts["search"])
            except RetrofitError as error:
                if not self.records:
                    raise
                self.stopped = f"clean: {str(error).partition(', so ')[0]}"
                return
            if (reason := self._add_pass(_Population(reader, neurons))) is not None:
                self.stopped = reason
                return
            reader, cutoff = self._candidate(self.pairs, self._few_registers), "auto"
            norms = read_all_norms(reader, self.images)

    @property
    def _few_registers(self) -> int:
        return self.settings["num_register_tokens"] or REGISTERS[0]

    def _candidate(self, pairs: list[list[int]], registers: int) -> TokenReader:
        return TokenReader(with_shared_weights(self.model, pairs, registers))

    def _add_pass(self, population: _Population) -> str | None:
        """Choose the number of neurons of a pass and keep them; return a reason if the search ends without them."""
        neurons, highest = population.neurons, self.settings["highest_block"]
        populations = [*self.populations, population]
        here = [population.mask(batch) for batch in self.pixels]
        share = float(torch.cat(here).float().mean())
        masks = [old | new for old, new in zip(self.masks, here)]
        tried: list[Record] = []
        new: list[list[int]] = []  # more in each round, after those of the round before
        for top_k in TOP_KS if self.settings["top_k"] is None else (self.settings["top_k"],):
            new = [pair for pair in neurons.best(top_k, highest_block=highest) if pair not in self.pairs]
            if new and (not tried or len(new) > tried[-1]["top_k"]):
                record = self._attempt([*self.pairs, *new], self._few_registers, populations, masks)
                tried.append(record | {"top_k": len(new)})
        if not tried:
            return "no neurons: none that is quiet elsewhere is active at the outliers"
        chosen = _least_change(tried, share)
        if not self.records and chosen["outlier_share"] > FAILURE_SHARE * share:
            raise RetrofitError(
                f"The {chosen['top_k']} neurons found do not carry the outliers: {share:.2%} of the patches are "
                f"outliers before, and {chosen['outlier_share']:.2%} after. Try a higher highest_block or another "
                "cut-off."
            )
        new = new[: chosen["top_k"]]
        if self.records:
            back = any(now > MAX_REMAINING_SHARE * r["share"] for now, r in zip(chosen["earlier"], self.records))
            if back or chosen["outlier_share"] > MAX_REMAINING_SHARE * share:
                return f"no progress: the neurons {new} do not remove the next population of outliers"
            if any(chosen[k] < self.records[-1][k] - MAX_COSINE_LOSS for k in ("cls_cosine", "patch_cosine")):
                return f"worse: the neurons {new} change CLS or normal patches too much"
        self.tried, self.masks, self.populations = tried, masks, populations
        self.pairs += new
        self.scores += [float(neurons.scores[block, neuron]) for block, neuron in new]
        kept = ("layer", "cutoff", "emergence")
        self.records.append(
            {name: getattr(neurons, name) for name in kept}
            | {"share": share, "share_after": chosen["outlier_share"], "neurons": new}
            | {name: chosen[name] for name in ("cls_cosine", "patch_cosine")}
        )
        return None

    def _attempt(
        self, pairs: list[list[int]], registers: int, populations: Sequence[_Population], masks: Sequence[Tensor]
    ) -> Record:
        """Measure a candidate on the images of the choice, at the layer of the last of the populations."""
        logger.info("Trying %d neurons with %d registers.", len(pairs), registers)
        candidate, neurons = self._candidate(pairs, registers), populations[-1].neurons
        tally = _Tally(neurons.layer, neurons.cutoff, candidate.description.num_register_tokens)
        for batch, seen, mask in zip(self.pixels, self.before, masks, strict=True):
            tally.add(seen, _read(candidate, batch), mask)
        norms = torch.cat(tally.norms, dim=1)  # (L + 1, n, N)
        earlier = [float((norms[p.neurons.layer] > p.neurons.cutoff).float().mean()) for p in populations[:-1]]
        return {"top_k": len(pairs), "num_register_tokens": registers} | tally.row() | {"earlier": earlier}

    def choose_registers(self) -> tuple[list[Record], int]:
        """Return the candidates of the last pass and of the number of registers, and the chosen number."""
        share, tried = self.records[-1]["share"], list(self.tried)
        if self.settings["num_register_tokens"] is None:
            count = _least_change(tried, share)["top_k"]
            for registers in REGISTERS[1:]:
                record = self._attempt(self.pairs, registers, self.populations, self.masks)
                tried.append(record | {"top_k": count})
        chosen = _least_change(tried, share)
        for record in tried:
            record["chosen"] = record is chosen
        return tried, chosen["num_register_tokens"]

    def mask(self, pixel_values: Tensor) -> Tensor:
        """Return the mask (B, N) of the outliers of all populations."""
        return torch.stack([population.mask(pixel_values) for population in self.populations]).any(dim=0)


def _least_change(tried: Sequence[Record], share: float) -> Record:
    """Return the smallest candidate that removes the outliers and changes little, else the one that removes most."""
    removing = [record for record in tried if record["outlier_share"] <= MAX_REMAINING_SHARE * share]
    if removing:
        kept = [(record["cls_cosine"] + record["patch_cosine"]) / 2 for record in removing]
        # The order is that of the trials: fewer neurons and fewer registers first.
        return next(record for record, cosine in zip(removing, kept) if cosine >= max(kept) - NEGLIGIBLE_COSINE_GAIN)
    return min(tried, key=lambda record: record["outlier_share"])


def _measure_on_test_images(
    search: _Search, made: RegViTPreTrainedModel, batches: Iterable[Tensor]
) -> dict[str, Record]:
    """Compare the retrofitted model and its controls with the model on the test images."""
    reader, model, neurons = search.reader, search.model, search.populations[0].neurons
    registers = made.config.num_register_tokens - model.config.num_register_tokens
    random = _random_neurons(search.pairs, neurons.scores.shape[1], search.settings["seed"])
    variants = {
        "after": made,
        "registers alone": with_shared_weights(model, [], registers),
        "random neurons": with_shared_weights(model, random, registers),
        "neurons silenced, no register": silence_neurons(model, search.pairs),
    }
    readers = {"before": reader} | {name: TokenReader(variant) for name, variant in variants.items()}
    tallies = {
        name: _Tally(neurons.layer, neurons.cutoff, variant.description.num_register_tokens)
        for name, variant in readers.items()
    }
    for batch in batches:
        before, mask = _read_with_classes(reader, batch), search.mask(batch)
        for name, variant in readers.items():
            tallies[name].add(before, before if variant is reader else _read_with_classes(variant, batch), mask)
    return {name: tally.row() for name, tally in tallies.items()}


def _measure_size(search: _Search, made: RegViTPreTrainedModel, images: PreparedImages) -> Record:
    """Measure a retrofitted model on test images of another size, and whether more registers would change it less."""
    rows = search.parts["judged"] & (np.cumsum(search.parts["judged"]) <= CHOICE_IMAGES)
    pixels = list(_rows(images, rows))
    before = [_read(search.reader, batch) for batch in pixels]
    norms = torch.cat([seen.norms for seen in before], dim=1).numpy()  # (L + 1, n, N)
    cutoffs = {layer: find_cutoff(values) for layer, values in enumerate(norms)}
    layer = reported_layer(cutoffs)
    found, added = cutoffs[layer], made.config.num_register_tokens - search.reader.description.num_register_tokens

    def measured(reader: TokenReader) -> Record:
        tally = _Tally(layer, found.cutoff, reader.description.num_register_tokens)
        for batch, seen in zip(pixels, before, strict=True):
            tally.add(seen, _read(reader, batch), seen.norms[layer] > found.cutoff)
        row = tally.row()
        return row | {"cosine": (row["cls_cosine"] + row["patch_cosine"]) / 2}

    row, per_image = measured(TokenReader(made)), found.share * norms.shape[2] * found.bimodal
    wanted = min(MAX_SUGGESTED_REGISTERS, math.ceil(per_image))
    suggested = added
    if wanted > added:
        more = measured(TokenReader(with_shared_weights(search.model, search.pairs, wanted)))
        suggested = wanted if more["cosine"] >= row["cosine"] + WORTHWHILE_COSINE_GAIN else added
    return {
        "image_size": round((pixels[0].shape[-2] * pixels[0].shape[-1]) ** 0.5),
        "proved": not row["layers_with_outliers"] and row["outlier_share"] <= MAX_REMAINING_SHARE * found.share,
        "share_before": found.share * found.bimodal,
        "share_after": row["outlier_share"],
        "outliers_per_image": per_image,
        "suggested_registers": suggested,
        "num_images": int(rows.sum()),
    } | {name: row[name] for name in ("layers_with_outliers", "cls_cosine", "patch_cosine")}


def _random_neurons(pairs: Sequence[Sequence[int]], width: int, seed: int) -> list[list[int]]:
    """Draw as many other neurons in the same blocks."""
    rng, taken = np.random.default_rng(seed), {tuple(pair) for pair in pairs}
    found: list[list[int]] = []
    for block, _ in pairs:
        neuron = next(n for n in rng.permutation(width).tolist() if (block, n) not in taken)
        taken.add((block, neuron))
        found.append([block, neuron])
    return found
