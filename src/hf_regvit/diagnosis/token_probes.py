"""Probe frozen tokens with small models, to measure what a backbone has learned.

Contains weighted k-nearest-neighbor classification on image features, and linear probes on single tokens that predict
the position of a patch, its pixels, and the class of its image.

Shape letters: n training images, m test images, D width, C classes, K = max(k) neighbors, S seeds, t tokens, P pixel
values of a patch.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.loading import load_images
from ..data.preparation import prepare_images
from ..data.source import ImageSource
from ..evaluation.linear import ridge_regression, softmax_regression
from ..models.families import describe_model, final_norm
from ..models.processing import EvaluationTransform
from ..models.tokens import read_many

# --- Probes on single tokens ---


def position_scores(predicted: Tensor, true: Tensor, grid: tuple[int, int]) -> dict[str, float]:
    """Score the predicted positions of tokens.

    Args:
        predicted: (t,) predicted cell indices, row-major.
        true: (t,) true cell indices, row-major.
        grid: (rows, columns) of the patches.

    Returns:
        `top1`, the accuracy in [0, 1]; `distance`, the mean Euclidean distance in patches; `prior_top1`, the accuracy
        of always predicting the most frequent cell of this group, since tokens that occur in few cells are easy to
        locate.
    """
    columns = grid[1]
    rows_off = (predicted // columns - true // columns).float()
    columns_off = (predicted % columns - true % columns).float()
    return {
        "top1": (predicted == true).float().mean().item(),
        "distance": torch.hypot(rows_off, columns_off).mean().item(),
        "prior_top1": torch.bincount(true).max().item() / len(true),
    }


def pixel_scores(predicted: Tensor, true: Tensor) -> dict[str, float]:
    """Score the reconstruction of patch pixels; both arguments are (t, P), in [0, 1].

    Returns:
        `l2`: Euclidean norm of the error over all P values, averaged over patches; `r2`: explained share of the
        variance of this group (0 is as good as the group's mean patch, below 0 is worse); `spread`: mean Euclidean
        distance between a patch and the group's mean patch, as a reference for `l2`.
    """
    error = (predicted - true).float()
    around = true.float() - true.float().mean(dim=0)
    return {
        "l2": error.norm(dim=1).mean().item(),
        "r2": 1 - error.square().sum().item() / max(around.square().sum().item(), 1e-12),
        "spread": around.norm(dim=1).mean().item(),
    }


@dataclass(frozen=True)
class TokenProbeReport:
    """Results of linear probes on single tokens: `probe -> group of tokens -> metric -> {"mean", "std"}` over seeds.

    Groups are "normal" and "outlier" patches and, for the class probe, also "cls" and "register". Probes and groups
    that cannot be fitted are absent; `notes` gives the reason.
    """

    position: dict[str, Any]
    pixels: dict[str, Any]
    image_class: dict[str, Any]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Return all results as a Markdown table, with one row per group of tokens."""
        lines = ["| probe | tokens | result | test |", "|---|---|---|---|"]
        for probe, groups in (("position", self.position), ("pixels", self.pixels), ("class", self.image_class)):
            for name, metrics in groups.items():
                shown = [
                    f"{metric} {value['mean']:.3f} ± {value['std']:.3f}"
                    for metric, value in metrics.items()
                    if isinstance(value, dict)
                ]
                lines.append(f"| {probe} | {name} | {', '.join(shown)} | {metrics['num_test']} |")
        return "\n".join(lines)


@dataclass(eq=False)
class _Sample:
    """Tokens of one set of images; the first five fields, with one row per token, are for position and pixels."""

    tokens: Tensor  # (t, D)
    cells: Tensor  # (t,)
    pixels: Tensor  # (t, P) float16 in [0, 1]
    outlier: Tensor  # (t,) bool
    uniform: Tensor  # (t,) bool: drawn at random, not added only because it is an outlier
    single: dict[str, Tensor]  # group: (S, n, D), one token per image
    present: dict[str, Tensor]  # group: (n,) bool, whether the image has such a token
    labels: Tensor | None  # (n,)
    grid: tuple[int, int]

    def part(self, chosen: Tensor, image: Tensor) -> "_Sample":
        """Select the images where `chosen` (n,) is True; `image` (t,) is the image index of each token."""
        rows = chosen[image]
        return _Sample(
            tokens=self.tokens[rows],
            cells=self.cells[rows],
            pixels=self.pixels[rows],
            outlier=self.outlier[rows],
            uniform=self.uniform[rows],
            single={name: values[:, chosen] for name, values in self.single.items()},
            present={name: values[chosen] for name, values in self.present.items()},
            labels=None if self.labels is None else self.labels[chosen],
            grid=self.grid,
        )


def token_probes(
    model: nn.Module,
    images: Any,
    *,
    cutoff: float,
    cutoff_layer: int = -1,
    test_images: Any = None,
    layer: int = -1,
    max_images: int = 1000,
    num_seeds: int = 3,
    seed: int = 0,
    processor: Any = None,
    batch_size: int = 32,
    max_tokens: int = 16384,
) -> TokenProbeReport:
    """Fit linear probes on single tokens to compare normal patches, outliers, CLS and registers.

    The probes of position (softmax regression over grid cells) and pixels (ridge regression) are trained on randomly
    drawn patches and evaluated on normal and outlier patches of the test images. For the class probe (softmax
    regression), one random token of each kind represents an image; images without such a token are left out of that
    group. Tokens are read at `layer`, after the final norm.

    Args:
        model: Model of a family in `families.FAMILIES`.
        images: Images as for `diagnose`; the class probe needs an `ImageSource` or dataset with labels.
        cutoff: Norm above which a patch is an outlier, on the raw tokens of `cutoff_layer`.
        cutoff_layer: Block whose raw tokens are compared with `cutoff`.
        test_images: Test images; by default, three in ten of `images`, drawn per class.
        layer: Block at which the tokens are read.
        max_images: Maximum number of images of each set.
        num_seeds: Number of seeds. Each seed draws half of the training patches, and the patch that represents an
            image.
        seed: First random seed.
        processor: Image processor; see `EvaluationTransform.for_model`.
        batch_size: Number of images per forward pass.
        max_tokens: Maximum number of patches to train the probes of position and pixels.

    Raises:
        ValueError: The images have different grids of patches.

    Source: arXiv 2309.16588, section 2.1 and table 1; tables 4 and 5 of its appendix.
    """
    transform = EvaluationTransform.for_model(model, processor)

    def collect(source: Any) -> tuple[_Sample, Tensor]:
        reader = _SampleReader(model, transform, cutoff, (cutoff_layer, layer), num_seeds, seed)
        return reader.read(source, max_images=max_images, batch_size=batch_size, max_tokens=max_tokens)

    sample, image = collect(images)
    if test_images is None:
        is_test = _draw_test_images(sample.labels, len(sample.present["normal"]))
        train, test = sample.part(~is_test, image), sample.part(is_test, image)
    else:
        train, (test, _) = sample, collect(test_images)
        if train.grid != test.grid:
            raise ValueError(
                f"The grid of patches is {train.grid} for the training images but {test.grid} for the test images. "
                "Use images or a processor with the same size for both."
            )
    notes: list[str] = []
    if not test.outlier.any():
        notes.append(f"No patch of the test images is above the cutoff {cutoff:.4g}, so outliers were not probed.")
    position, pixels = _local_probes(train, test, num_seeds, seed)
    return TokenProbeReport(
        position=position,
        pixels=pixels,
        image_class=_class_probes(train, test, num_seeds, notes),
        settings={
            "layer": layer,
            "final_norm": True,
            "cutoff": cutoff,
            "cutoff_layer": cutoff_layer,
            "seeds": list(range(seed, seed + num_seeds)),
            "train_images": len(train.present["normal"]),
            "test_images": len(test.present["normal"]),
            "position": "softmax regression over grid cells, l2 1e-4, L-BFGS, 60 iterations, standardized tokens",
            "pixels": "ridge regression, l2 1e-3, standardized tokens; pixels in [0, 1], error over the whole patch",
            "image_class": "softmax regression, l2 1e-2, L-BFGS, standardized tokens, one token per image",
            "chance": {"position_top1": 1 / (train.grid[0] * train.grid[1])},
        },
        notes=notes,
    )


def labels_of(source: Any, ids: Sequence[str]) -> Tensor | None:
    """Return the class ids of these images, or None if the source has none."""
    if not isinstance(source, ImageSource) or source.labels is None:
        return None
    by_id = dict(zip(source.ids, source.labels))
    return torch.tensor([by_id[name] for name in ids])


def _draw_test_images(labels: Tensor | None, count: int) -> Tensor:
    """Select three of every ten images, counted per class if there are labels, as a mask (count,)."""
    seen: dict[int, int] = {}
    chosen = torch.zeros(count, dtype=torch.bool)
    for i, label in enumerate([0] * count if labels is None else labels.tolist()):
        chosen[i] = seen.get(label, 0) % 10 in (2, 5, 8)
        seen[label] = seen.get(label, 0) + 1
    return chosen


class _SampleReader:
    """Reader of a `_Sample` that keeps only the tokens the probes need."""

    def __init__(
        self,
        model: nn.Module,
        transform: EvaluationTransform,
        cutoff: float,
        layers: tuple[int, int],
        num_seeds: int,
        seed: int,
    ) -> None:
        self.model, self.transform, self.cutoff, self.num_seeds, self.seed = model, transform, cutoff, num_seeds, seed
        self.description = describe_model(model)
        count = self.description.num_layers + 1
        self.cutoff_layer, self.layer = (layer + count if layer < 0 else layer for layer in layers)
        self.norm = final_norm(model)
        self.generator = torch.Generator().manual_seed(seed)

    def read(self, source: Any, *, max_images: int, batch_size: int, max_tokens: int) -> tuple[_Sample, Tensor]:
        """Read the sample; also return the image index (t,) of each token."""
        source = load_images(source, split=None) if isinstance(source, str | Path) else source
        prepared = prepare_images(source, self.transform, batch_size=batch_size, max_images=max_images, seed=self.seed)
        per_image = max(8, max_tokens // min(prepared.total or max_images, max_images))
        ids: list[str] = []
        parts: list[dict[str, Tensor]] = []
        grids: set[tuple[int, int]] = set()
        for names, batch in prepared:
            parts.append(self._read_batch(batch, len(ids), per_image))
            grids.add(self._grid(batch))
            ids += names
        if len(grids) > 1:
            raise ValueError(
                f"The images have grids of {sorted(grids)} patches, but probes need one grid. Use a processor that "
                "resizes all images to one size."
            )
        joined = {
            name: torch.cat([part[name] for part in parts], dim=1 if name.startswith("single_") else 0)
            for name in parts[0]
        }
        labels = labels_of(source, ids)
        sample = _Sample(
            tokens=joined["tokens"],
            cells=joined["cells"],
            pixels=joined["pixels"],
            outlier=joined["outlier"],
            uniform=joined["uniform"],
            single={n.removeprefix("single_"): values for n, values in joined.items() if n.startswith("single_")},
            present={n.removeprefix("present_"): values for n, values in joined.items() if n.startswith("present_")},
            labels=labels,
            grid=grids.pop(),
        )
        return sample, joined["image"]

    def _read_batch(self, batch: Tensor, first: int, per_image: int) -> dict[str, Tensor]:
        reading = read_many(self.model, batch, {"residual": (self.cutoff_layer, self.layer)})["residual"]
        outlier = (
            reading.values[0][:, reading.num_prefix_tokens :].float().norm(dim=-1) > self.cutoff
        ).cpu()  # (B, N)
        with torch.no_grad():
            tokens = self.norm(reading.values[1]).float().cpu()  # (B, T, D)
        patches = tokens[:, reading.num_prefix_tokens :]  # (B, N, D)
        draw = torch.rand(outlier.shape, generator=self.generator)
        rank = draw.argsort(dim=1).argsort(dim=1)
        uniform = rank < per_image
        image, cell = (uniform | outlier).nonzero(as_tuple=True)  # (t,) each
        result = {
            "tokens": patches[image, cell],
            "cells": cell,
            "pixels": self._pixels(batch)[image, cell].half(),
            "outlier": outlier[image, cell],
            "uniform": uniform[image, cell],
            "image": image + first,
        }
        groups = {"normal": ~outlier, "outlier": outlier}
        for name, mask in groups.items():
            draws = torch.rand(self.num_seeds, *mask.shape, generator=self.generator) * mask  # (S, B, N)
            chosen = draws.argmax(dim=2)  # (S, B)
            result[f"single_{name}"] = patches[torch.arange(len(batch)), chosen]  # (S, B, D)
            result[f"present_{name}"] = mask.any(dim=1)
        if reading.has_cls:
            result["single_cls"] = tokens[None, :, 0].expand(self.num_seeds, -1, -1)
            result["present_cls"] = torch.ones(len(batch), dtype=torch.bool)
        if reading.num_register_tokens:
            registers = tokens[:, reading.num_prefix_tokens - reading.num_register_tokens : reading.num_prefix_tokens]
            which = torch.randint(registers.shape[1], (self.num_seeds, len(batch)), generator=self.generator)
            result["single_register"] = registers[torch.arange(len(batch)), which]
            result["present_register"] = torch.ones(len(batch), dtype=torch.bool)
        return result

    def _grid(self, batch: Tensor) -> tuple[int, int]:
        height, width = self.description.patch_size
        return batch.shape[-2] // height, batch.shape[-1] // width

    def _pixels(self, batch: Tensor) -> Tensor:
        """Convert normalized images (B, 3, H, W) to patches (B, N, P) in [0, 1]; P runs over channel, row, column."""
        mean, std = (torch.tensor(x)[:, None, None] for x in (self.transform.mean, self.transform.std))
        height, width = self.description.patch_size
        rows, columns = self._grid(batch)
        plain = (batch.float() * std + mean)[..., : rows * height, : columns * width]
        cells = plain.unflatten(3, (columns, width)).unflatten(2, (rows, height))  # (B, 3, rows, h, columns, w)
        return cells.permute(0, 2, 4, 1, 3, 5).reshape(len(batch), rows * columns, -1)


def _over_seeds(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Compute mean and sample standard deviation of each metric over seeds; the latter is 0 for a single seed."""
    return {
        name: {
            "mean": statistics.fmean(run[name] for run in runs),
            "std": statistics.stdev(run[name] for run in runs) if len(runs) > 1 else 0.0,
        }
        for name in runs[0]
    }


def _local_probes(train: _Sample, test: _Sample, num_seeds: int, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the probes of position and pixels for the existing groups of test patches."""
    groups = {
        name: rows
        for name, rows in (("normal", test.uniform & ~test.outlier), ("outlier", test.outlier))
        if rows.any()
    }
    uniform = train.uniform.nonzero()[:, 0]
    places: dict[str, list[dict[str, float]]] = {name: [] for name in groups}
    pixels: dict[str, list[dict[str, float]]] = {name: [] for name in groups}
    for run in range(num_seeds):
        order = torch.from_numpy(np.random.default_rng(seed + run).permutation(len(uniform)))
        rows = uniform[order[: (len(uniform) + 1) // 2]]
        where = softmax_regression(
            train.tokens[rows],
            train.cells[rows],
            num_classes=train.grid[0] * train.grid[1],
            l2=1e-4,
            max_iterations=60,
        )
        what = ridge_regression(train.tokens[rows], train.pixels[rows])
        for name, chosen in groups.items():
            tokens = test.tokens[chosen]
            places[name].append(position_scores(where(tokens).argmax(dim=1), test.cells[chosen], test.grid))
            pixels[name].append(pixel_scores(what(tokens), test.pixels[chosen].float()))
    counts = {name: {"num_test": int(rows.sum())} for name, rows in groups.items()}
    return (
        {name: _over_seeds(runs) | counts[name] for name, runs in places.items()},
        {name: _over_seeds(runs) | counts[name] for name, runs in pixels.items()},
    )


def _class_probes(train: _Sample, test: _Sample, num_seeds: int, notes: list[str]) -> dict[str, Any]:
    if train.labels is None or test.labels is None:
        notes.append("The images have no labels, so the class probe was skipped.")
        return {}
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    result: dict[str, Any] = {}
    for name in ("cls", "register", "normal", "outlier"):
        if name not in train.single:
            continue
        fit, judge = train.present[name], test.present[name]
        if int(fit.sum()) < 2 or not judge.any():
            notes.append(
                f"The class probe was skipped for tokens of kind '{name}': only {int(fit.sum())} training and "
                f"{int(judge.sum())} test images have them."
            )
            continue
        runs = []
        for run in range(num_seeds):
            model = softmax_regression(
                train.single[name][run, fit], train.labels[fit], num_classes=num_classes, l2=1e-2
            )
            right = model(test.single[name][run, judge]).argmax(dim=1) == test.labels[judge]
            runs.append({"top1": right.float().mean().item()})
        result[name] = _over_seeds(runs) | {"num_train": int(fit.sum()), "num_test": int(judge.sum())}
    return result
