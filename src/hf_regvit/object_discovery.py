"""Object discovery as an evaluation: the CorLoc of LOST beside what it has to beat.

Whatever has to be chosen (the settings of LOST, the head of an attention map) is chosen on one part of the images and
judged on the other; the result holds the choice, how many were compared and how well it did where it was chosen.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .families import describe_model
from .images import ImageSource
from .intervals import bootstrap_interval
from .lost import (
    AttentionSettings,
    Box,
    Center,
    Feature,
    LostResult,
    LostSettings,
    Method,
    Proposals,
    best_iou,
    propose,
)

logger = logging.getLogger(__name__)

BoxFormat = Literal["xywh", "xyxy"]

_BOX_COLUMNS = ("objects", "bbox", "boxes")
_THRESHOLD = 0.5  # of CorLoc
_CENTERS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # sides of the box in the middle, as shares of the image's
_HALF_THE_AREA = 0.5**0.5


# --- Ground truth


def ground_truth_boxes(
    source: ImageSource, *, column: str | None = None, box_format: BoxFormat = "xywh"
) -> list[list[Box]]:
    """Boxes of every image, (x1, y1, x2, y2) in pixels, from a column beside the images.

    The column holds for every image one box, a list of boxes, or COCO's record of `bbox` and, where there is one,
    `iscrowd`; crowds are left out, as are boxes without area.

    Args:
        source: From a parquet file or a data set of the Hub.
        column: Default: the one of `objects`, `bbox` and `boxes` that is there.
        box_format: How four numbers are meant: corner, width and height (COCO), or two corners.

    Raises:
        ValueError: No such column, or no boxes in it.
    """
    names = [] if source.table is None else source.table.column_names
    found = [name for name in (_BOX_COLUMNS if column is None else (column,)) if name in names]
    if source.table is None or not found:
        raise ValueError(
            f"'{source.name}' has no column of boxes: looked for {column or ', '.join(_BOX_COLUMNS)}, found "
            f"{', '.join(names) or 'no columns (a folder of images has none; use parquet)'}. Set boxes."
        )
    if box_format not in ("xywh", "xyxy"):
        raise ValueError(f"box_format={box_format!r} is unknown. Use 'xywh' (COCO) or 'xyxy'.")
    return [_boxes(cell, f"{source.name}, {found[0]}, {source.ids[i]}", box_format) for i, cell in
            enumerate(source.table[found[0]])]  # fmt: skip


def _boxes(cell: Any, where: str, box_format: BoxFormat) -> list[Box]:
    if isinstance(cell, dict):
        if "bbox" not in cell:
            raise ValueError(f"{where}: a record of {', '.join(cell)}, expected 'bbox' among them. Set boxes.")
        crowds = cell.get("iscrowd") or [False] * len(cell["bbox"])
        cell = [box for box, crowd in zip(cell["bbox"], crowds, strict=True) if not crowd]
    if not cell:
        return []
    try:
        boxes = (
            np.asarray(cell, dtype=np.float64).reshape(-1, 4) if np.shape(cell) != (4,) else np.array([cell], float)
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {str(cell)[:80]} is no box of four numbers and no list of such.") from error
    if box_format == "xywh":
        boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    elif (boxes[:, 2:] < boxes[:, :2]).any():
        raise ValueError(f"{where}: {str(cell)[:80]} is no pair of corners. Set box_format to 'xywh'?")
    kept = boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in kept.tolist()]


# --- Results


@dataclass(frozen=True)
class LostGrid:
    """Settings of LOST to choose from: all combinations.

    Args:
        features: As in `LostSettings`, like the rest.
        layers: Negative ones from the end; those that a shallow model has not are left out.
        centers: See there.
        l2norms: See there.
        biases: For cosines, which lie in [-1, 1] for every model.
        raw_biases: For dot products (`l2norm` False), whose scale differs from model to model.
        ks: See there.
    """

    features: Sequence[Feature] = ("k", "q", "v", "out")
    layers: Sequence[int] = (-1, -2, -3, -4)
    centers: Sequence[Center] = ("none", "image", "row")
    l2norms: Sequence[bool] = (False, True)
    biases: Sequence[float] = (0.0, -0.1, -0.2, -0.4, -0.6)
    raw_biases: Sequence[float] = (0.0,)
    ks: Sequence[int] = (100,)

    def settings(self, num_layers: int) -> list[LostSettings]:
        """The combinations for a model of that many blocks; of equally good ones the earlier is chosen."""
        layers = [layer for layer in self.layers if layer >= -num_layers]
        combinations = product(self.features, layers, self.centers, self.l2norms, self.ks)
        settings = [
            LostSettings(feature, layer, center, l2norm, bias, k)
            for feature, layer, center, l2norm, k in combinations
            for bias in (self.biases if l2norm else self.raw_biases)
        ]
        if not settings:
            raise ValueError(f"{self} leaves nothing to try on a model of {num_layers} blocks.")
        return settings


@dataclass(frozen=True)
class CorLocScore:
    """CorLoc of one method on the judged images.

    Args:
        method: In words, with every setting.
        corloc: Share of images in [0, 1].
        interval: 95 %, from 2,000 resamples of the images.
        ahead: By how much the chosen settings are ahead of this method on the same images, and the interval of that.
        overlaps: For every image the overlap of the box with the ground-truth box that fits best.
        num_degenerate: Images in which LOST had no seed to speak of; None for other methods.
    """

    method: str
    corloc: float
    interval: tuple[float, float]
    ahead: tuple[float, tuple[float, float]]
    overlaps: tuple[float, ...]
    num_degenerate: int | None = None


@dataclass(frozen=True)
class LostEvaluation:
    """Object discovery on one data set.

    Args:
        settings: The chosen settings of LOST.
        scores: `lost` (the chosen settings), and what to compare it with: `vanilla` LOST, `attention` of CLS,
            `center_box` (both as good as they were on the images of choice) and `full_image`.
        choice: How the settings came about (`Choice.to_dict`); None where there was one to begin with.
        protocol: How images were read and boxes compared.
        ids: The judged images, as in `overlaps`.
        num_without_boxes: Images left out because they have no ground-truth box.
        num_skipped: Images that could not be read.
        seconds: Wall time.
    """

    settings: LostSettings
    scores: dict[str, CorLocScore]
    choice: dict[str, Any] | None
    protocol: dict[str, Any]
    ids: tuple[str, ...]
    num_without_boxes: int
    num_skipped: int
    seconds: float

    @property
    def corloc(self) -> float:
        """Of the chosen settings on the judged images, in [0, 1]."""
        return self.scores["lost"].corloc

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "LostEvaluation":
        """From what `dataclasses.asdict` made of one, also by way of JSON."""
        scores = {}
        for name, score in content["scores"].items():
            ahead, (low, high) = score["ahead"]
            scores[name] = CorLocScore(
                **score
                | {
                    "interval": tuple(score["interval"]),
                    "ahead": (ahead, (low, high)),
                    "overlaps": tuple(score["overlaps"]),
                }
            )
        settings = LostSettings(**content["settings"])
        return cls(**content | {"settings": settings, "scores": scores, "ids": tuple(content["ids"])})

    def lines(self, seed: int) -> list[str]:
        """For a reader, one line a method."""
        words = "settings as given"
        if self.choice is not None:
            compared, images = self.choice["num_settings"], self.choice["num_images"]
            words = f"settings: best of {compared} on {images} other images (seed {seed})"
        lines = [f"object discovery: CorLoc at IoU {_THRESHOLD}, {len(self.ids)} images, 95 % interval; {words}"]
        for name, score in self.scores.items():
            percent = [f"{100 * value:.1f}" for value in (score.corloc, *score.interval)]
            weak = f"; no clear seed in {score.num_degenerate} images" if score.num_degenerate else ""
            lines.append(f"{name:11} {percent[0]:>5} % [{percent[1]}, {percent[2]}]  {score.method}{weak}")
        return lines


# --- Evaluation


def halves(count: int, *, seed: int) -> tuple[list[int], list[int]]:
    """Indices of two halves drawn by `seed`, ascending; the first is for choosing and never the larger."""
    order = np.random.default_rng(seed).permutation(count).tolist()
    return sorted(order[: count // 2]), sorted(order[count // 2 :])


def evaluate_lost(
    model: nn.Module,
    judged: ImageSource,
    truth: Sequence[Sequence[Box]],
    *,
    train: tuple[ImageSource, Sequence[Sequence[Box]]] | None = None,
    grid: LostGrid | None = None,
    processor: Any = None,
    max_side: int = 640,
    seed: int = 0,
) -> LostEvaluation:
    """CorLoc of LOST beside its baselines.

    Args:
        model: Any model that `features.read_tokens` reads.
        judged: Images.
        truth: Boxes of every image.
        train: Images to choose settings on, and their boxes. Default: half of `judged`; the other half is judged.
        grid: Settings to choose from. With a single one there is no choice, and all of `judged` is judged.
        processor: Image processor; default the model's own.
        max_side: Larger images are read at this length of their longer side, pixels.
        seed: Of the halves and of the resamples behind intervals.

    Raises:
        ValueError: Fewer than two images with boxes.
    """
    started = time.perf_counter()
    description = describe_model(model)
    settings = (grid or LostGrid()).settings(description.num_layers)
    heads: list[Method] = []
    if description.has_cls:
        heads = [AttentionSettings("mean"), *(AttentionSettings(head) for head in range(description.num_heads))]
    options = {"processor": processor, "max_side": max_side}
    judged, truth, without = images_with_boxes(judged, truth)
    choice = Choice((settings[0], *heads[:1], LostSettings()), _HALF_THE_AREA, ())
    if len(settings) > 1:
        if train is None:
            first, second = halves(len(judged), seed=seed)
            train = judged.subset(first), [truth[i] for i in first]
            judged, truth = judged.subset(second), [truth[i] for i in second]
        images, boxes, _ = images_with_boxes(*train)
        choice = choose(measure_overlaps(model, images, boxes, [*settings, *heads], label="choosing", **options))
    measured = measure_overlaps(model, judged, truth, choice.methods, label="judging", **options)
    return LostEvaluation(
        settings=choice.settings,
        scores=score_methods(measured, center=choice.center, seed=seed),
        choice=choice.to_dict() if len(settings) > 1 else None,
        protocol={"iou_threshold": _THRESHOLD, "max_side": max_side, "padding": "zeros, right and below"},
        ids=measured.ids,
        num_without_boxes=without,
        num_skipped=len(judged) - len(measured.ids),
        seconds=round(time.perf_counter() - started, 1),
    )


@dataclass(frozen=True, eq=False)
class Overlaps:
    """How well the boxes of several methods fit.

    Args:
        methods: As given.
        ids: Of the n images that could be read.
        iou: (n, methods) overlap with the ground-truth box that fits best.
        degenerate: (n, methods) bool, True where LOST had no seed to speak of.
        sizes: (height, width) of every image.
        truth: Boxes of every image.
    """

    methods: tuple[Method, ...]
    ids: tuple[str, ...]
    iou: NDArray[np.float64]
    degenerate: NDArray[np.bool_]
    sizes: tuple[tuple[int, int], ...]
    truth: tuple[Sequence[Box], ...]

    def corloc(self) -> NDArray[np.float64]:
        """Of every method, (methods,)."""
        return (self.iou >= _THRESHOLD).mean(0)

    def subset(self, indices: Sequence[int]) -> "Overlaps":
        """Some of the images."""
        rows = list(indices)
        return replace(
            self,
            ids=tuple(self.ids[i] for i in rows),
            iou=self.iou[rows],
            degenerate=self.degenerate[rows],
            sizes=tuple(self.sizes[i] for i in rows),
            truth=tuple(self.truth[i] for i in rows),
        )

    def only(self, methods: Sequence[Method]) -> "Overlaps":
        """Some of the methods."""
        columns = [self.methods.index(method) for method in methods]
        return replace(self, methods=tuple(methods), iou=self.iou[:, columns], degenerate=self.degenerate[:, columns])

    def center_box(self, side: float) -> NDArray[np.float64]:
        """Overlaps of a box in the middle of the image, `side` times as high and wide; 1: the whole image."""
        boxes = [
            (width * (1 - side) / 2, height * (1 - side) / 2, width * (1 + side) / 2, height * (1 + side) / 2)
            for height, width in self.sizes
        ]
        return best_iou(boxes, self.truth).double().numpy()


def measure_overlaps(
    model: nn.Module,
    source: ImageSource,
    truth: Sequence[Sequence[Box]],
    methods: Sequence[Method],
    *,
    processor: Any = None,
    max_side: int = 640,
    label: str | None = None,
) -> Overlaps:
    """Run methods on images with boxes; the model sees each image once.

    Args:
        model: As in `evaluate_lost`.
        source: Images.
        truth: Boxes of every image, at least one each.
        methods: What to try.
        processor: See there.
        max_side: See there.
        label: Of the progress bar.
    """
    from tqdm.auto import tqdm

    boxes_of = dict(zip(source.ids, truth))
    found: list[Proposals] = []
    rows, degenerate = [], []
    proposals = propose(model, source, methods, processor=processor, max_side=max_side)
    for proposal in tqdm(proposals, total=len(source), desc=label, unit="image", disable=None):
        boxes = boxes_of[proposal.id]
        rows.append(best_iou(proposal.boxes, [boxes] * len(methods)).double().numpy())
        degenerate.append([isinstance(result, LostResult) and result.degenerate for result in proposal.results])
        found.append(Proposals(proposal.id, proposal.image_size, proposal.boxes, ()))
    beyond = [
        proposal.id
        for proposal in found
        if any(
            x2 > proposal.image_size[1] + 2 or y2 > proposal.image_size[0] + 2
            for _, _, x2, y2 in boxes_of[proposal.id]
        )
    ]
    if beyond:
        logger.warning(
            "In %d of %d images, such as '%s', a ground-truth box reaches beyond the picture. Is box_format right?",
            len(beyond), len(found), beyond[0],
        )  # fmt: skip
    return Overlaps(
        methods=tuple(methods),
        ids=tuple(proposal.id for proposal in found),
        iou=np.stack(rows),
        degenerate=np.array(degenerate),
        sizes=tuple(proposal.image_size for proposal in found),
        truth=tuple(boxes_of[proposal.id] for proposal in found),
    )


@dataclass(frozen=True)
class Choice:
    """What did best on some images.

    Args:
        methods: To be judged: the chosen settings of LOST, attention of the chosen head if there is CLS, vanilla LOST.
        center: Side of the box in the middle, as a share of the image's.
        ranking: All settings of LOST with their CorLoc, best first.
        num_images: It was made on.
    """

    methods: tuple[Method, ...]
    center: float
    ranking: tuple[tuple[LostSettings, float], ...]
    num_images: int = 0

    @property
    def settings(self) -> LostSettings:
        """Of LOST."""
        assert isinstance(self.methods[0], LostSettings)
        return self.methods[0]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the five best settings."""
        best = [{"settings": str(settings), "corloc": corloc} for settings, corloc in self.ranking[:5]]
        return {"num_images": self.num_images, "num_settings": len(self.ranking), "best": best}


def choose(seen: Overlaps) -> Choice:
    """The settings of LOST, the head and the size of the middle box of highest CorLoc; of equals the first."""
    ranked = sorted(zip(seen.methods, seen.corloc().tolist()), key=lambda pair: -pair[1])  # stable
    lost = tuple((method, corloc) for method, corloc in ranked if isinstance(method, LostSettings))
    heads = [method for method, _ in ranked if isinstance(method, AttentionSettings)]
    center = max(_CENTERS, key=lambda side: float((seen.center_box(side) >= _THRESHOLD).mean()))
    return Choice((lost[0][0], *heads[:1], LostSettings()), center, lost, len(seen.ids))


def score_methods(measured: Overlaps, *, center: float, seed: int) -> dict[str, CorLocScore]:
    """Scores by name; the first method is LOST as chosen, the last vanilla LOST, one between them attention."""
    overlaps = {"lost": measured.iou[:, 0], "vanilla": measured.iou[:, -1]}
    words = {"lost": str(measured.methods[0]), "vanilla": str(measured.methods[-1])}
    if len(measured.methods) > 2:
        overlaps["attention"], words["attention"] = measured.iou[:, 1], str(measured.methods[1])
    overlaps["center_box"], words["center_box"] = measured.center_box(center), f"the middle {center:.2g} of each side"
    overlaps["full_image"], words["full_image"] = measured.center_box(1.0), "the whole image"
    degenerate = {"lost": int(measured.degenerate[:, 0].sum()), "vanilla": int(measured.degenerate[:, -1].sum())}
    hits = {name: (values >= _THRESHOLD).astype(np.float64) for name, values in overlaps.items()}
    scores = {}
    for name, values in hits.items():
        gain = hits["lost"] - values
        scores[name] = CorLocScore(
            method=words[name],
            corloc=float(values.mean()),
            interval=bootstrap_interval(values, seed=seed),
            ahead=(float(gain.mean()), bootstrap_interval(gain, seed=seed)),
            overlaps=tuple(overlaps[name].tolist()),  # not rounded: 0.49996 is no hit, wherever it is counted again
            num_degenerate=degenerate.get(name),
        )
    return scores


def images_with_boxes(
    source: ImageSource, truth: Sequence[Sequence[Box]]
) -> tuple[ImageSource, list[Sequence[Box]], int]:
    """The images that have a box, their boxes, and how many have none."""
    kept = [i for i, boxes in enumerate(truth) if boxes]
    if len(kept) < 2:
        raise ValueError(f"'{source.name}' has {len(kept)} of {len(source)} images with boxes; at least 2 are needed.")
    return source.subset(kept), [truth[i] for i in kept], len(source) - len(kept)
