"""Linear probes on single tokens: the position of a patch, its pixels, and the class of its image.

Shape letters: n images, B images of a batch, D width, S seeds, N patches, t tokens, P pixel values of a patch.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..data.loading import load_images
from ..data.preparation import prepare_images
from ..evaluation.linear import ridge_regression, softmax_regression
from ..models.loading import open_model
from ..models.processing import ImageProcessor
from ..models.results import Record
from ..models.tokens import TokenReader
from .readings import check_grid, labels_of, normalized

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

    position: Record
    pixels: Record
    image_class: Record
    settings: Record
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> Record:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(eq=False)
class _Sample:
    """Tokens of one set of n images.

    Attributes:
        rows: Values of t tokens for position and pixels: `tokens` (t, D), `cells` (t,), `pixels` (t, P) float16 in
            [0, 1], `outlier` (t,) bool, `uniform` (t,) bool (drawn at random, not only added as an outlier), and
            `image` (t,), the index of the image in the set that was read.
        single: One token per image for the class, (S, n, D) for each group of tokens.
        present: Mask (n,) of the images that have such a token, for each group.
        labels: Class ids (n,), or None.
        grid: (rows, columns) of the patches.
    """

    rows: dict[str, Tensor]
    single: dict[str, Tensor]
    present: dict[str, Tensor]
    labels: Tensor | None
    grid: tuple[int, int]

    def part(self, chosen: Tensor) -> "_Sample":
        """Select the images where `chosen` (n,) is True."""
        return _Sample(
            rows={name: values[chosen[self.rows["image"]]] for name, values in self.rows.items()},
            single={name: values[:, chosen] for name, values in self.single.items()},
            present={name: values[chosen] for name, values in self.present.items()},
            labels=None if self.labels is None else self.labels[chosen],
            grid=self.grid,
        )


def token_probes(
    model: TokenReader | nn.Module | str | Path,
    images: object,
    *,
    cutoff: float,
    cutoff_layer: int = -1,
    test_images: object = None,
    layer: int = -1,
    max_images: int = 1000,
    num_seeds: int = 3,
    seed: int = 0,
    processor: ImageProcessor | None = None,
    batch_size: int = 32,
    max_tokens: int = 16384,
) -> TokenProbeReport:
    """Fit linear probes on single tokens to compare normal patches, outliers, CLS and registers.

    The probes of position (softmax regression over grid cells) and pixels (ridge regression) are trained on randomly
    drawn patches and evaluated on normal and outlier patches of the test images. For the class probe (softmax
    regression), one random token of each kind represents an image; images without such a token are left out of that
    group. Tokens are read at `layer`, after the final norm.

    Args:
        model: Model, its name, or a reader; see `open_model`.
        images: Images as for `diagnose`; the class probe needs an `ImageSource` or dataset with labels.
        cutoff: Norm above which a patch is an outlier, on the raw tokens of `cutoff_layer`.
        cutoff_layer: Block whose raw tokens are compared with `cutoff`.
        test_images: Test images; by default, three in ten of `images`, drawn per class.
        layer: Block at which the tokens are read.
        max_images: Maximum number of images of each set.
        num_seeds: Number of seeds. Each seed draws half of the training patches, and the patch that represents an
            image.
        seed: First random seed.
        processor: Image processor; default the model's own.
        batch_size: Number of images per forward pass.
        max_tokens: Maximum number of patches to train the probes of position and pixels.

    Raises:
        ValueError: The images have different grids of patches.

    Source: arXiv 2309.16588, section 2.1 and table 1; tables 4 and 5 of its appendix.
    """
    sampler = _Sampler(open_model(model, processor=processor), cutoff, (cutoff_layer, layer), num_seeds, seed)
    limits = {"max_images": max_images, "batch_size": batch_size, "max_tokens": max_tokens}
    train = sampler.read(images, **limits)
    if test_images is None:
        is_test = _draw_test_images(train.labels, len(train.present["normal"]))
        train, test = train.part(~is_test), train.part(is_test)
    else:
        test = sampler.read(test_images, **limits)
        if train.grid != test.grid:
            raise ValueError(
                f"The grid of patches is {train.grid} for the training images but {test.grid} for the test images. "
                "Use images or a processor with the same size for both."
            )
    notes: list[str] = []
    if not test.rows["outlier"].any():
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


def _draw_test_images(labels: Tensor | None, count: int) -> Tensor:
    """Select three of every ten images as a mask (count,), counted per class if a class has three labeled images."""
    seen: dict[int, int] = {}
    chosen = torch.zeros(count, dtype=torch.bool)
    for i, label in enumerate([0] * count if labels is None else labels.tolist()):
        chosen[i] = seen.get(label, 0) % 10 in (2, 5, 8)
        seen[label] = seen.get(label, 0) + 1
    return chosen if labels is None or chosen.any() else _draw_test_images(None, count)


class _Sampler:
    """Reader of a `_Sample` that keeps only the tokens the probes need."""

    def __init__(self, reader: TokenReader, cutoff: float, layers: tuple[int, int], num_seeds: int, seed: int) -> None:
        self.reader, self.cutoff, self.layers, self.num_seeds, self.seed = reader, cutoff, layers, num_seeds, seed
        self.generator = torch.Generator()

    def read(self, source: object, *, max_images: int, batch_size: int, max_tokens: int) -> _Sample:
        """Read the tokens of at most `max_images` images."""
        self.generator.manual_seed(self.seed)
        source = load_images(source, split=None) if isinstance(source, str | Path) else source
        prepared = prepare_images(
            source, self.reader.transform, batch_size=batch_size, max_images=max_images, seed=self.seed
        )
        per_image = max(8, max_tokens // min(prepared.total or max_images, max_images))
        ids: list[str] = []
        parts: list[_Sample] = []
        for names, batch in prepared:
            parts.append(self.read_batch(batch, len(ids), per_image))
            check_grid(names[0], parts[-1].grid, parts[0].grid)
            ids += names
        return _Sample(
            rows={name: torch.cat([part.rows[name] for part in parts]) for name in parts[0].rows},
            single={name: torch.cat([part.single[name] for part in parts], dim=1) for name in parts[0].single},
            present={name: torch.cat([part.present[name] for part in parts]) for name in parts[0].present},
            labels=labels_of(source, ids),
            grid=parts[0].grid,
        )

    def read_batch(self, batch: Tensor, first: int, per_image: int) -> _Sample:
        """Read the tokens of one batch, whose images are counted from `first`."""
        reading = self.reader.read(batch, layers=self.layers)
        prefix, registers = reading.num_prefix_tokens, reading.num_register_tokens
        outlier = (reading.values[0][:, prefix:].float().norm(dim=-1) > self.cutoff).cpu()  # (B, N)
        tokens = normalized(self.reader, reading.values[1])  # (B, T, D)
        patches = tokens[:, prefix:]  # (B, N, D)
        rank = torch.rand(outlier.shape, generator=self.generator).argsort(dim=1).argsort(dim=1)
        uniform = rank < per_image
        image, cell = (uniform | outlier).nonzero(as_tuple=True)  # (t,) each
        single: dict[str, Tensor] = {}
        present = {"normal": (~outlier).any(dim=1), "outlier": outlier.any(dim=1)}
        each = torch.arange(len(batch))
        for name, mask in (("normal", ~outlier), ("outlier", outlier)):
            draws = torch.rand(self.num_seeds, *mask.shape, generator=self.generator) * mask  # (S, B, N)
            single[name] = patches[each, draws.argmax(dim=2)]  # (S, B, D)
        if reading.has_cls:
            single["cls"] = tokens[None, :, 0].expand(self.num_seeds, -1, -1)
        if registers:
            which = torch.randint(registers, (self.num_seeds, len(batch)), generator=self.generator)
            single["register"] = tokens[:, prefix - registers : prefix][each, which]
        return _Sample(
            rows={
                "tokens": patches[image, cell],
                "cells": cell,
                "pixels": self.pixels(batch, reading.grid)[image, cell].half(),
                "outlier": outlier[image, cell],
                "uniform": uniform[image, cell],
                "image": image + first,
            },
            single=single,
            present=dict.fromkeys(single, torch.ones(len(batch), dtype=torch.bool)) | present,
            labels=None,
            grid=reading.grid,
        )

    def pixels(self, batch: Tensor, grid: tuple[int, int]) -> Tensor:
        """Convert normalized images (B, 3, H, W) to patches (B, N, P) in [0, 1]; P runs over channel, row, column."""
        mean, std = (torch.tensor(x)[:, None, None] for x in (self.reader.transform.mean, self.reader.transform.std))
        (rows, columns), (height, width) = grid, self.reader.description.patch_size
        plain = (batch.float() * std + mean)[..., : rows * height, : columns * width]
        cells = plain.unflatten(3, (columns, width)).unflatten(2, (rows, height))  # (B, 3, rows, h, columns, w)
        return cells.permute(0, 2, 4, 1, 3, 5).reshape(len(batch), rows * columns, -1)


def _over_seeds(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Compute mean and sample standard deviation of each metric over seeds; the latter is 0 for a single seed."""
    values = {name: [run[name] for run in runs] for name in runs[0]}
    return {
        name: {"mean": statistics.fmean(all_), "std": statistics.stdev(all_) if len(runs) > 1 else 0.0}
        for name, all_ in values.items()
    }


def _local_probes(train: _Sample, test: _Sample, num_seeds: int, seed: int) -> tuple[Record, Record]:
    """Run the probes of position and pixels for the existing groups of test patches."""
    masks = {"normal": test.rows["uniform"] & ~test.rows["outlier"], "outlier": test.rows["outlier"]}
    groups = {
        name: {key: values[mask] for key, values in test.rows.items()} for name, mask in masks.items() if mask.any()
    }
    uniform = train.rows["uniform"].nonzero()[:, 0]
    places: dict[str, list[dict[str, float]]] = {name: [] for name in groups}
    pixels: dict[str, list[dict[str, float]]] = {name: [] for name in groups}
    for run in range(num_seeds):
        order = torch.from_numpy(np.random.default_rng(seed + run).permutation(len(uniform)))
        fit = {key: values[uniform[order[: (len(uniform) + 1) // 2]]] for key, values in train.rows.items()}
        num_cells = train.grid[0] * train.grid[1]
        where = softmax_regression(fit["tokens"], fit["cells"], num_classes=num_cells, l2=1e-4, max_iterations=60)
        what = ridge_regression(fit["tokens"], fit["pixels"])
        for name, rows in groups.items():
            places[name].append(position_scores(where(rows["tokens"]).argmax(dim=1), rows["cells"], test.grid))
            pixels[name].append(pixel_scores(what(rows["tokens"]), rows["pixels"].float()))
    counts = {name: {"num_test": len(rows["cells"])} for name, rows in groups.items()}
    return (
        {name: _over_seeds(runs) | counts[name] for name, runs in places.items()},
        {name: _over_seeds(runs) | counts[name] for name, runs in pixels.items()},
    )


def _class_probes(train: _Sample, test: _Sample, num_seeds: int, notes: list[str]) -> Record:
    if train.labels is None or test.labels is None:
        notes.append("The images have no labels, so the class probe was skipped.")
        return {}
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    result: Record = {}
    for name in ("cls", "register", "normal", "outlier"):
        if name not in train.single:
            continue
        fit, held_out = train.present[name], test.present[name]
        if int(fit.sum()) < 2 or not held_out.any():
            notes.append(
                f"The class probe was skipped for tokens of kind '{name}': only {int(fit.sum())} training and "
                f"{int(held_out.sum())} test images have them."
            )
            continue
        runs = []
        for run in range(num_seeds):
            model = softmax_regression(
                train.single[name][run, fit], train.labels[fit], num_classes=num_classes, l2=1e-2
            )
            right = model(test.single[name][run, held_out]).argmax(dim=1) == test.labels[held_out]
            runs.append({"top1": right.float().mean().item()})
        result[name] = _over_seeds(runs) | {"num_train": int(fit.sum()), "num_test": int(held_out.sum())}
    return result
