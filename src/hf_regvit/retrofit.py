"""Registers for a trained model without training: test-time registers (arXiv 2506.08010).

In a model with artifacts a few neurons of the MLPs, the same in every picture, write the huge norm into some patches.
They are looked for (`find_register_neurons`) and told to write into registers instead (`add_test_time_registers`).
`retrofit` does both and measures what came of it on pictures that neither step has seen. The result is an ordinary
RegViT: its config names the neurons, its registers are zero, and no hook stays behind.

Shapes: n images, B images of a batch, R registers, N patches, T = 1 + R + N tokens, D width, H neurons of an MLP, L
blocks. Layer i is the output of block i counted from 1, as in a diagnosis; the blocks of neurons count from 0, as
`model.layers` does.
"""

import copy
import json
import logging
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
from tqdm.auto import tqdm

from .artifacts import emergence_layer, reported_layer
from .conversion import convert, image_processor_of, whole_checkpoint
from .families import describe_model, final_norm
from .features import EvaluationTransform, PreparedImages, load_model, prepare_images, read_many, read_tokens
from .modeling_regvit import RegViTPreTrainedModel
from .outliers import Cutoff, find_cutoff

logger = logging.getLogger(__name__)

MIN_IMAGES = 32  # 16 to search on, 8 to choose on, 8 to judge on
CHOICE_IMAGES = 64  # at most: they stay in memory, and every candidate reads them

TOP_KS = (1, 2, 3, 5, 10, 20, 50)  # numbers of neurons to try; published: 10 for OpenCLIP B/16, 50 for DINOv2 L/14
REGISTERS = (1, 2, 4, 8)
GONE = 0.05  # of the outliers may stay in a candidate that counts as having removed them
EXAMPLES = 4  # judged images that are handed back, to be drawn
NEGLIGIBLE = 0.001  # difference of mean cosines that does not justify another neuron or register
WORTHLESS = 0.5  # of the outliers left by the best candidate: then nothing is returned


class RetrofitError(ValueError):
    """A model or images for which test-time registers can do nothing; the message says why."""


# --- Which neurons write the outliers ---


@dataclass(frozen=True, eq=False)
class RegisterNeurons:
    """How strongly each neuron fires where the outliers are.

    Attributes:
        scores: (L, H) mean magnitude of the activation at outliers; 0 for neurons that fire in most places.
        layer: Layer whose norms say what an outlier is, 1 to L.
        cutoff: Norm above which a patch is one.
        emergence: First layer with outliers.
        outlier_share: Of all patches, in [0, 1].
        num_images: Images that were read.
    """

    scores: Tensor
    layer: int
    cutoff: float
    emergence: int
    outlier_share: float
    num_images: int

    def best(self, top_k: int, *, highest_block: int | None = None) -> list[list[int]]:
        """The `[block, neuron]` pairs of highest score, best first, as `RegViTConfig.register_neurons` takes them.

        Args:
            top_k: How many; fewer where fewer have a score.
            highest_block: Last block to take neurons from, from 0. Default the one whose output has the first
                outliers: later neurons only answer to them.
        """
        last = self.emergence - 1 if highest_block is None else highest_block
        flat, width = self.scores[: last + 1].flatten(), self.scores.shape[1]
        order = flat.argsort(descending=True, stable=True)[:top_k].tolist()
        return [[i // width, i % width] for i in order if flat[i] > 0]


def find_register_neurons(
    model: nn.Module,
    images: Any,
    *,
    cutoff: float | str = "auto",
    max_images: int = 500,
    processor: Any = None,
    batch_size: int = 32,
    seed: int = 0,
) -> RegisterNeurons:
    """Search a model for the neurons that write its artifacts; two passes over the images.

    Args:
        model: A model of a family in `families.FAMILIES`; left as it was.
        images: As for `diagnose`; published searches used 100 to 500.
        cutoff: "auto": layer and cut-off of the diagnosis. A norm: that one, at the layer where the diagnosis sees
            most, or at the last.
        max_images: A random draw of that many; streams: the first.
        processor: See `EvaluationTransform.for_model`; all images must come out at one size.
        batch_size: Images of one forward pass.
        seed: Of the draw.

    Raises:
        RetrofitError: No distinct outlier population, or one that is there before the first block.
        ValueError: Images on different grids, or none of use.

    Source: arXiv 2506.08010, section 3.
    """
    transform = EvaluationTransform.for_model(model, processor)
    prepared = prepare_images(images, transform, batch_size=batch_size, max_images=max_images, seed=seed)
    norms = _read_norms(model, prepared)
    found, layer, emergence = _find_outliers(norms, cutoff)
    is_outlier = norms[layer] > found.cutoff
    scores = score_neurons(model, prepared, is_outlier)
    return RegisterNeurons(scores, layer, found.cutoff, emergence, found.share, len(is_outlier))


def score_neurons(
    model: nn.Module,
    images: PreparedImages,
    is_outlier: NDArray[np.bool_],
    *,
    quiet_share: float = 0.5,
    quiet_below: float = 0.5,
) -> Tensor:
    """Mean |activation| of every neuron at the outliers of an image, averaged over the images that have any.

    Args:
        model: A model of a family in `families.FAMILIES`.
        images: The n images.
        is_outlier: (n, N); images without outliers are not run.
        quiet_share: A neuron counts in an image if its (signed) activation stays below `quiet_below` at this share of
            all tokens at least, and scores 0 there otherwise: what fires everywhere marks no place.
        quiet_below: See there. Both defaults are the published code's.

    Returns:
        (L, H) float64.

    Raises:
        RetrofitError: No image has an outlier.

    Source: arXiv 2506.08010, section 3, and its code; slow twin in tests/unit/test_retrofit.py.
    """
    total: Tensor | float = 0.0
    num_counted = position = 0
    for ids, pixel_values in images:
        mask = torch.from_numpy(is_outlier[position : position + len(ids)])
        position += len(ids)
        pixel_values, mask = pixel_values[mask.any(dim=1)], mask[mask.any(dim=1)]
        if not len(mask):
            continue

        def score(activations: Tensor, layer: int, mask: Tensor = mask) -> Tensor:
            where = mask.to(activations.device, torch.float32)
            patches = activations[:, -where.shape[1] :].float()
            mean = torch.einsum("bnh,bn->bh", patches.abs(), where) / where.sum(dim=1, keepdim=True)
            quiet = (activations < quiet_below).float().mean(dim=1) >= quiet_share  # (B, H)
            return (mean * quiet).double().sum(dim=0).cpu()  # (H,)

        total = total + torch.stack(read_tokens(model, pixel_values, layers="all", site="mlp", reduce=score).values)
        num_counted += len(mask)
    if isinstance(total, float):
        raise RetrofitError(
            "No image has an outlier, so no neuron can be scored. Give more images or a lower cut-off."
        )
    return total / num_counted


def _read_norms(model: nn.Module, images: PreparedImages, *, progress: bool = False) -> dict[int, NDArray[np.float32]]:
    """Norms of the patches at every layer, 0 the embedding: `{layer: (n, N)}`."""
    batches: list[dict[int, Tensor]] = []
    with tqdm(total=images.total, desc="norms", unit="img", disable=not progress) as bar:
        for ids, pixels in images:
            reading = read_tokens(model, pixels, layers="all", reduce=lambda tokens, _: tokens.float().norm(dim=-1))
            batches.append({layer: reading.patches(layer).cpu() for layer in reading.layers})
            if batches[-1][0].shape[1] != batches[0][0].shape[1]:
                raise ValueError(
                    f"Image '{ids[0]}' has {batches[-1][0].shape[1]} patches, the ones before it "
                    f"{batches[0][0].shape[1]}. Use a processor that crops to one size."
                )
            bar.update(len(ids))
    return {layer: torch.cat([batch[layer] for batch in batches]).numpy() for layer in batches[0]}


def _find_outliers(norms: dict[int, NDArray[np.float32]], cutoff: float | str) -> tuple[Cutoff, int, int]:
    """The cut-off, the layer it belongs to, and the first layer with outliers."""
    cutoffs = {layer: find_cutoff(values, cutoff=cutoff) for layer, values in norms.items()}
    layer = reported_layer(cutoffs)
    found, emergence = cutoffs[layer], emergence_layer(cutoffs, layer)
    if emergence is None:
        if cutoff == "auto":
            raise RetrofitError(
                f"No distinct outlier population ({found.reason} at layer {layer}), so test-time registers have "
                "nothing to move. `regvit diagnose` shows the norms; --cutoff takes one of your own."
            )
        if not found.share:
            raise RetrofitError(f"No patch has a norm above cutoff={cutoff} at layer {layer}; give a lower one.")
        emergence = next(i for i in norms if all(cutoffs[j].share for j in range(i, layer + 1)))
    if emergence == 0:
        raise RetrofitError(
            "The outliers are there before the first block, in patches or positions, so no neuron writes them and "
            "test-time registers cannot move them."
        )
    return found, layer, emergence


# --- The model that obeys ---


def add_test_time_registers(
    model: RegViTPreTrainedModel, neurons: Sequence[Sequence[int]], *, num_register_tokens: int = 1
) -> Any:
    """A copy of a RegViT with zero registers, into which these neurons write instead of into patches.

    Args:
        model: Any RegViT without registers, with or without a head; left as it was.
        neurons: `[block, neuron]` pairs, from 0. Without any, the registers are there and nothing is moved.
        num_register_tokens: R, at least 1.

    Returns:
        A model of the same class, in eval mode.

    Raises:
        RetrofitError: The model has registers already.
        ConfigError: A neuron that the model does not have.
        TypeError: `model` is no RegViT.
    """
    if not isinstance(model, RegViTPreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}, expected a RegViT. Turn it into one with convert().")
    _refuse_registers(model)
    return copy.deepcopy(_on_the_same_weights(model, neurons, num_register_tokens))


def silence_neurons(model: RegViTPreTrainedModel, neurons: Sequence[Sequence[int]]) -> Any:
    """A model in which these neurons say nothing at all: the control that shows why they need a register.

    All other weights are those of `model`, not copies.
    """
    made = _on_the_same_weights(model, [], 0)
    with torch.no_grad():
        for block, neuron in neurons:
            mlp = getattr(made, "regvit", made).layers[block].mlp
            linear = mlp.down_proj if hasattr(mlp, "down_proj") else mlp.fc2
            linear.weight = nn.Parameter(linear.weight.clone())
            linear.weight[:, neuron] = 0
    return made


def _refuse_registers(model: Any) -> None:
    if model.config.num_register_tokens:
        raise RetrofitError(
            f"The model has {model.config.num_register_tokens} registers already; test-time registers are for models "
            "trained without."
        )


def _on_the_same_weights(model: Any, neurons: Sequence[Sequence[int]], num_register_tokens: int) -> Any:
    """`add_test_time_registers` without the copy, for candidates and controls that live for a few batches."""
    config = copy.deepcopy(model.config)
    config.num_register_tokens = num_register_tokens
    config.register_neurons = [list(pair) for pair in neurons] or None
    with torch.device("meta"):
        made = type(model)(config)
    state = model.state_dict()
    if num_register_tokens:
        cls_name = next(name for name in state if name.endswith("embeddings.cls_token"))
        zeros = state[cls_name].new_zeros(1, num_register_tokens, config.hidden_size)
        state = state | {cls_name.replace("cls_token", "register_tokens"): zeros}
    made.load_state_dict(state, assign=True)
    return made.eval()


# --- Both, and what came of it ---


@dataclass(frozen=True)
class RetrofitReport:
    """What `retrofit` found, tried, chose and measured.

    Attributes:
        model: Name and sizes of the model.
        neurons: `[block, neuron]`, best first.
        scores: Of these neurons.
        num_register_tokens: R.
        layer: Layer whose norms say what an outlier is.
        cutoff: Norm above which a patch is one, from the images of the search.
        emergence: First layer with outliers.
        images: How many the search, the choice and the judgement had; no image is in two of them.
        tried: One record a candidate: neurons, registers, and what they did to the images of the choice.
        judged: On the third part of the images: "before", "after" and the controls "registers alone", "neurons
            silenced, no register", "random neurons". Each has `outlier_share` and `max_norm` at the layer,
            `last_max_norm`, `median_norm`, `layers_with_outliers` (what a diagnosis of that part says), cosines of CLS
            and of normal patches with those before, and the share of CLS's attention on former outliers and registers.
        settings: What was asked for.
        seconds: Wall time of the parts.
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
        """Plain values for JSON."""
        return asdict(self)

    def save(self, folder: str | Path) -> Path:
        """Write `retrofit_report.json` into `folder`, made if needed; returns its path."""
        path = Path(folder) / "retrofit_report.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return path

    @property
    def verdict(self) -> str:
        """One sentence in plain words."""
        before, after = self.judged["before"], self.judged["after"]
        left = after["layers_with_outliers"]
        rest = f"a diagnosis still sees some at layers {left}" if left else "a diagnosis finds none any more"
        return (
            f"Outliers fell from {before['outlier_share']:.2%} to {after['outlier_share']:.2%} of the patches, the "
            f"largest norm from {before['max_norm']:.0f} to {after['max_norm']:.0f}; {rest}."
        )

    @property
    def card_text(self) -> str:
        """A paragraph for a model card."""
        names = ", ".join(f"{block}.{neuron}" for block, neuron in self.neurons[:10])
        more = f" and {len(self.neurons) - 10} more" if len(self.neurons) > 10 else ""
        after = self.judged["after"]
        return (
            f"Test-time registers (arXiv 2506.08010); nothing was trained. {len(self.neurons)} of the "
            f"{self.model['num_neurons']:,} neurons of the MLPs ({names}{more}, as block.neuron from 0) write into "
            f"{self.num_register_tokens} zero register{'s' * (self.num_register_tokens > 1)} instead of into patches. "
            f"On {self.images['judged']} images that had no part in the search: {self.verdict} CLS keeps a cosine of "
            f"{after['cls_cosine']:.3f} with that of the base model, the other patches {after['patch_cosine']:.3f}."
        )

    def summary(self) -> str:
        """Ten lines for a terminal."""
        shown = ", ".join(f"{b}.{n} ({s:.1f})" for (b, n), s in zip(self.neurons[:5], self.scores))
        more = f" and {len(self.neurons) - 5} more" if len(self.neurons) > 5 else ""
        judged_on = f"judged on {self.images['judged']} images"
        lines = [
            f"model      {self.model['name']}: {self.model['num_layers']} blocks, {self.model['num_neurons']:,} "
            "neurons",
            f"search     norms above {self.cutoff:.1f} at layer {self.layer}, the first at layer {self.emergence}; "
            f"{self.images['search']} images, {self.images['choice']} others to choose on",
            f"neurons    {len(self.neurons)}, block.neuron (mean activation at outliers): {shown}{more}",
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
    """What `retrofit` returns.

    Attributes:
        model: With test-time registers.
        source: The RegViT it was made from.
        report: What was measured.
        examples: (4, 3, H, W) pixels of images that were judged.
        transform: That made them, and turns them into pictures.
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
    """Give a trained model test-time registers; forward passes only.

    The images are divided at random: on half the neurons are searched, on up to a quarter (and 64) the numbers of
    neurons and registers are chosen, on a quarter the result is judged. Chosen is, among the candidates that remove
    95 % of the outliers, the smallest that changes CLS and normal patches as little as any does (mean cosine within
    0.001): first the number of neurons, then that of registers. Where a picture has several outliers one register may
    not do, because attention that went to several tokens does not fit one.

    Args:
        source: A RegViT without registers, or anything `convert` accepts.
        images: As for `diagnose`; 500 for numbers that repeat, 32 at least.
        num_register_tokens: R; default chosen among 1, 2, 4 and 8.
        top_k: Number of neurons; default chosen among 1 to 50.
        highest_block: Last block to take neurons from, from 0; default the one whose output has the first outliers.
        cutoff: "auto", or the norm above which a patch counts as outlier.
        max_images: A random draw of that many; streams: the first.
        processor: Default the one saved with the source.
        batch_size: Images of one forward pass.
        seed: Of the draw, the parts and the random neurons.
        device: Where to compute; default where a module is, for others the CPU.
        progress: Show a bar.

    Raises:
        RetrofitError: Nothing to move, or no neurons that carry at least half of it; too few images; registers there.
        ConversionError: `source` cannot be expressed as a RegViT.

    Source: arXiv 2506.08010.
    """
    started = time.perf_counter()
    model = _open(source)
    _refuse_registers(model)
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
    judged = _judge(model, made, chain([first], batches), neurons, seed)
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


def _open(source: str | Path | nn.Module) -> Any:
    """The source as a RegViT."""
    if isinstance(source, nn.Module):
        return source if isinstance(source, RegViTPreTrainedModel) else convert(source)
    config = Path(source, "config.json")
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") == "regvit":
        return load_model(source)[0]
    return convert(source)


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
            raise RetrofitError(f"{name}={value} is out of range: it must lie in [{low}, {high}].")


def _search_in_part(
    model: nn.Module, images: PreparedImages, cutoff: float | str, seed: int, *, progress: bool
) -> tuple[RegisterNeurons, dict[str, NDArray[np.bool_]]]:
    """`find_register_neurons` on a part of the images, and the parts."""
    norms = _read_norms(model, images, progress=progress)
    parts = _divide(len(norms[0]), seed)
    search = parts["search"]
    found, layer, emergence = _find_outliers({i: values[search] for i, values in norms.items()}, cutoff)
    scores = score_neurons(model, images, (norms[layer] > found.cutoff) & search[:, None])
    return RegisterNeurons(scores, layer, found.cutoff, emergence, found.share, int(search.sum())), parts


def _divide(num_images: int, seed: int) -> dict[str, NDArray[np.bool_]]:
    """Three disjoint parts of the images, as masks (n,)."""
    if num_images < MIN_IMAGES:
        raise RetrofitError(
            f"{num_images} images can be used; searching, choosing and judging on different ones takes {MIN_IMAGES} "
            "at least, and 500 for numbers that repeat. Give more images."
        )
    order = np.random.default_rng(seed).permutation(num_images)
    quarter = num_images // 4
    parts = {"judged": order[:quarter], "choice": order[quarter : quarter + min(quarter, CHOICE_IMAGES)]}
    parts["search"] = order[quarter + len(parts["choice"]) :]
    return {name: np.isin(np.arange(num_images), parts[name]) for name in ("search", "choice", "judged")}


def _rows(images: PreparedImages, wanted: NDArray[np.bool_]) -> Iterator[Tensor]:
    """Batches of pixels of the wanted images only."""
    position = 0
    for ids, pixel_values in images:
        rows = torch.from_numpy(wanted[position : position + len(ids)])
        position += len(ids)
        if rows.any():
            yield pixel_values[rows]


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a model makes of a batch."""

    norms: Tensor  # (L + 1, B, N) of the patches, layer 0 the embedding
    cls: Tensor  # (B, D) after the final norm
    patches: Tensor  # (B, N, D) after the final norm
    attention: Tensor  # (B, T) of CLS in the last block, mean over heads


def _see(model: nn.Module, pixel_values: Tensor) -> _Seen:
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
    return _Seen(
        torch.stack(norms).cpu(),
        tokens[:, 0].cpu(),
        tokens[:, residual.num_prefix_tokens :].cpu(),
        readings["attention"].at().cpu(),
    )


class _Tally:
    """One variant of a model beside the model, batch after batch."""

    def __init__(self, layer: int, cutoff: float, num_register_tokens: int) -> None:
        self.layer, self.cutoff, self.registers = layer, cutoff, num_register_tokens
        self.norms: list[Tensor] = []
        self.values: dict[str, list[Tensor]] = {}

    def add(self, before: _Seen, after: _Seen) -> None:
        """A batch of the model, and the same batch of the variant."""
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
        """Means over images (over normal patches for their cosine), and what the norms say."""
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
    """What each number of neurons does with one register, then each number of registers with the best of those."""
    before = [_see(model, batch) for batch in pixels]
    share = float(torch.cat([seen.norms[neurons.layer] for seen in before]).gt(neurons.cutoff).float().mean())
    tried: list[dict[str, Any]] = []

    def attempt(top_k: int, registers: int) -> None:
        pairs = neurons.best(top_k, highest_block=settings["highest_block"])
        candidate = _on_the_same_weights(model, pairs, registers)
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
    if chosen["outlier_share"] > WORTHLESS * share:
        raise RetrofitError(
            f"The {chosen['top_k']} neurons found do not carry the outliers: {share:.2%} of the patches before, "
            f"{chosen['outlier_share']:.2%} after. A higher highest_block or another cut-off may find others."
        )
    for record in tried:
        record["chosen"] = record is chosen
    return tried


def _least_change(tried: Sequence[dict[str, Any]], share: float) -> dict[str, Any]:
    """Of those that remove the outliers the smallest that changes little; failing such, the one that removes most."""
    removing = [record for record in tried if record["outlier_share"] <= GONE * share]
    if removing:
        kept = [(record["cls_cosine"] + record["patch_cosine"]) / 2 for record in removing]
        # In the order they were tried: fewer neurons and fewer registers first.
        return next(record for record, cosine in zip(removing, kept) if cosine >= max(kept) - NEGLIGIBLE)
    return min(tried, key=lambda record: record["outlier_share"])


def _judge(
    model: Any, made: Any, batches: Iterable[Tensor], neurons: RegisterNeurons, seed: int
) -> dict[str, dict[str, Any]]:
    """The retrofitted model and its controls beside the model, on images that had no part in making it."""
    registers, pairs = made.config.num_register_tokens, made.config.register_neurons
    random = _random_neurons(pairs, neurons.scores.shape[1], seed)
    variants = {
        "before": model,
        "after": made,
        "registers alone": _on_the_same_weights(model, [], registers),
        "random neurons": _on_the_same_weights(model, random, registers),
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
    """As many other neurons, in the same blocks."""
    rng, taken = np.random.default_rng(seed), {tuple(pair) for pair in pairs}
    found: list[list[int]] = []
    for block, _ in pairs:
        neuron = next(n for n in rng.permutation(width).tolist() if (block, n) not in taken)
        taken.add((block, neuron))
        found.append([block, neuron])
    return found


def retrofit_to_folder(source: str | Path, images: Any, output_dir: str | Path, **settings: Any) -> Retrofit:
    """`retrofit`, saved as a checkpoint with its code files, image processor and `retrofit_report.json`.

    Args:
        source: As for `retrofit`, but a folder, a file or a Hub id.
        images: As for `retrofit`.
        output_dir: A new or empty folder, or one without a checkpoint.
        settings: Keyword arguments of `retrofit`.

    Raises:
        FileExistsError: `output_dir` holds a checkpoint already.
    """
    output = Path(output_dir)
    if (output / "config.json").exists():
        raise FileExistsError(f"'{output}' holds a checkpoint already. Choose another output_dir or remove it.")
    result = retrofit(source, images, **settings)
    with whole_checkpoint(output) as staged:
        result.model.save_pretrained(staged)
        image_processor_of(source, result.model.config).save_pretrained(staged)
        result.report.save(staged)
    return result
