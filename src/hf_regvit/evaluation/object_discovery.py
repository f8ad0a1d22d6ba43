"""Object discovery as an evaluation: the CorLoc of LOST and of its baselines.

Options such as the settings of LOST and the head of an attention map are chosen on one half of the images and tested
on the other. The result holds the choice, the number of settings compared, and their CorLoc on the first half.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..data.source import ImageSource
from ..models.results import Record, as_tuples
from ..models.tokens import TokenReader
from .boxes import Box, best_iou
from .dense_features import FeatureSettings
from .intervals import bootstrap_interval
from .lost import AttentionSettings, LostResult, LostSettings, Method, Proposals, propose

logger = logging.getLogger(__name__)

BoxFormat = Literal["xywh", "xyxy"]

_BOX_COLUMNS = ("objects", "bbox", "boxes")
_THRESHOLD = 0.5  # smallest IoU that counts for CorLoc
_CENTERS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # sides of the center box, as shares of the image's sides
_HALF_THE_AREA = 0.5**0.5


# --- Ground truth


def ground_truth_boxes(
    source: ImageSource, *, column: str | None = None, box_format: BoxFormat = "xywh"
) -> list[list[Box]]:
    """Return the boxes of every image, (x1, y1, x2, y2) in pixels, from a column next to the images.

    For every image, the column holds one box, a list of boxes, or a COCO record with `bbox` and optionally `iscrowd`.
    Crowds and boxes without area are left out.

    Args:
        source: Images from a parquet file or Hub data set.
        column: Name of the column. Default: the first of `objects`, `bbox` and `boxes` that exists.
        box_format: Meaning of the four numbers: corner, width and height (COCO), or two corners.

    Raises:
        ValueError: The column does not exist, or does not hold boxes.
    """
    names = [] if source.table is None else source.table.column_names
    found = [name for name in (_BOX_COLUMNS if column is None else (column,)) if name in names]
    if source.table is None or not found:
        raise ValueError(
            f"'{source.name}' has no column of boxes: looked for {column or ', '.join(_BOX_COLUMNS)}, found "
            f"{', '.join(names) or 'no columns (a folder of images has none; use parquet)'}. Set boxes."
        )
    if box_format not in ("xywh", "xyxy"):
        raise ValueError(f"Unknown box_format={box_format!r}. Use 'xywh' (COCO) or 'xyxy'.")
    return [_boxes(cell, f"{source.name}, {found[0]}, {source.ids[i]}", box_format) for i, cell in
            enumerate(source.table[found[0]])]  # fmt: skip


def _boxes(cell: Any, where: str, box_format: BoxFormat) -> list[Box]:
    if isinstance(cell, dict):
        if "bbox" not in cell:
            raise ValueError(f"{where}: the record has the fields {', '.join(cell)}, but not 'bbox'. Set boxes.")
        crowds = cell.get("iscrowd") or [False] * len(cell["bbox"])
        cell = [box for box, crowd in zip(cell["bbox"], crowds, strict=True) if not crowd]
    if not cell:
        return []
    try:
        boxes = np.asarray([cell] if np.shape(cell) == (4,) else cell, dtype=np.float64).reshape(-1, 4)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {str(cell)[:80]} is not a box of four numbers or a list of boxes.") from error
    if box_format == "xywh":
        boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    elif (boxes[:, 2:] < boxes[:, :2]).any():
        raise ValueError(f"{where}: {str(cell)[:80]} is not (x1, y1, x2, y2). Is it 'xywh'? Set box_format.")
    kept = boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in kept.tolist()]


# --- Results


@dataclass(frozen=True)
class CorLocScore:
    """CorLoc of one method on the test images.

    Args:
        method: Description of the method, with every setting.
        corloc: Share of images in [0, 1].
        interval: 95 % confidence interval, from 2,000 resamples of the images.
        ahead: Difference in CorLoc between the chosen settings and this method on the same images, and its interval.
        overlaps: IoU of the box with the best matching ground-truth box, for every image.
        num_degenerate: Number of images without a distinct seed for LOST; None for other methods.
    """

    method: str
    corloc: float
    interval: tuple[float, float]
    ahead: tuple[float, tuple[float, float]]
    overlaps: tuple[float, ...] = field(repr=False)
    num_degenerate: int | None = None


@dataclass(frozen=True)
class LostEvaluation:
    """Object discovery on one data set.

    Args:
        settings: Chosen settings of LOST.
        scores: Scores of `lost` (the chosen settings) and of the baselines: `vanilla` LOST, `attention` of CLS and
            `center_box` (both with options chosen on the same images as the settings) and `full_image`.
        choice: Selection of the settings (`Choice.to_dict`); None if only one was given.
        protocol: Description of how images were read and boxes compared.
        ids: Ids of the test images, in the order of `overlaps`.
        num_without_boxes: Number of images left out because they have no ground-truth box.
        num_skipped: Number of images that could not be read.
        seconds: Wall time in seconds.
    """

    settings: LostSettings
    scores: dict[str, CorLocScore]
    choice: Record | None
    protocol: Record
    ids: tuple[str, ...] = field(repr=False)
    num_without_boxes: int
    num_skipped: int
    seconds: float

    @property
    def corloc(self) -> float:
        """CorLoc of the chosen settings on the test images, in [0, 1]."""
        return self.scores["lost"].corloc

    @classmethod
    def from_dict(cls, content: Record) -> "LostEvaluation":
        """Create an evaluation from the result of `dataclasses.asdict`, also after a round trip through JSON."""
        scores = {
            name: CorLocScore(**{key: as_tuples(value) for key, value in score.items()})
            for name, score in content["scores"].items()
        }
        settings = LostSettings(**content["settings"])
        return cls(**content | {"settings": settings, "scores": scores, "ids": tuple(content["ids"])})

    def lines(self, seed: int) -> list[str]:
        """Return the scores as text, one line per method."""
        words = "settings as given"
        if self.choice is not None:
            compared, images = self.choice["num_settings"], self.choice["num_images"]
            words = f"settings: best of {compared} on {images} other images (seed {seed})"
        lines = [f"object discovery: CorLoc at IoU {_THRESHOLD}, {len(self.ids)} images, 95 % interval; {words}"]
        for name, score in self.scores.items():
            percent = [f"{100 * value:.1f}" for value in (score.corloc, *score.interval)]
            weak = f"; no distinct seed in {score.num_degenerate} images" if score.num_degenerate else ""
            lines.append(f"{name:11} {percent[0]:>5} % [{percent[1]}, {percent[2]}]  {score.method}{weak}")
        return lines


# --- Evaluation


def halves(count: int, *, seed: int) -> tuple[list[int], list[int]]:
    """Return the sorted indices of two random halves; the first one, for choosing, is never the larger."""
    order = np.random.default_rng(seed).permutation(count).tolist()
    return sorted(order[: count // 2]), sorted(order[count // 2 :])


def evaluate_lost(
    reader: TokenReader,
    images: ImageSource,
    truth: Sequence[Sequence[Box]],
    *,
    train: tuple[ImageSource, Sequence[Sequence[Box]]] | None = None,
    settings: Sequence[LostSettings] = (LostSettings(),),
    max_side: int = 640,
    dense: FeatureSettings | None = None,
    seed: int = 0,
) -> LostEvaluation:
    """Compute the CorLoc of LOST and of its baselines.

    Args:
        reader: Reader of the model.
        images: Test images.
        truth: Boxes of every image.
        train: Images to choose settings on, and their boxes. Default: half of `images`; the other half is the test
            images.
        settings: Settings of LOST to choose from; the first one wins a tie. With one, all of `images` are test images.
        max_side: Longer side in pixels to which larger images are reduced.
        dense: Views, shorter side and pooling instead of `max_side`.
        seed: Random seed for the halves and the confidence intervals.

    Raises:
        ValueError: There are fewer than two images with boxes.
    """
    started, description = time.perf_counter(), reader.description
    reading: Record = {"max_side": max_side, "dense": dense}
    heads: list[Method] = []
    if description.has_cls and reader.reads_attention:
        heads = [AttentionSettings("mean"), *(AttentionSettings(head) for head in range(description.num_heads))]
    images, truth, without = images_with_boxes(images, truth)
    choice = Choice((settings[0], *heads[:1], LostSettings()), _HALF_THE_AREA, ())
    if len(settings) > 1:
        if train is None:
            first, second = halves(len(images), seed=seed)
            train = images.subset(first), [truth[i] for i in first]
            images, truth = images.subset(second), [truth[i] for i in second]
        known, boxes, _ = images_with_boxes(*train)
        seen = measure_overlaps(reader, known, boxes, [*settings, *heads], label="choosing", **reading)
        choice = choose(seen)
    measured = measure_overlaps(reader, images, truth, choice.methods, label="testing", **reading)
    return LostEvaluation(
        settings=choice.settings,
        scores=score_methods(measured, center=choice.center, seed=seed),
        choice=choice.to_dict() if len(settings) > 1 else None,
        protocol={"iou_threshold": _THRESHOLD, "padding": "zeros, right and below", "max_side": max_side}
        | ({} if dense is None else {"dense": asdict(dense)}),
        ids=measured.ids,
        num_without_boxes=without,
        num_skipped=len(images) - len(measured.ids),
        seconds=round(time.perf_counter() - started, 1),
    )


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Overlaps of the boxes of several methods with the ground truth.

    Args:
        methods: Methods in the given order.
        ids: Ids of the n images that could be read.
        iou: IoU with the best matching ground-truth box, (n, methods).
        degenerate: (n, methods) bool, True if LOST had no distinct seed.
        sizes: (height, width) of every image in pixels.
        truth: Boxes of every image.
    """

    methods: tuple[Method, ...]
    ids: tuple[str, ...]
    iou: NDArray[np.float64]
    degenerate: NDArray[np.bool_]
    sizes: tuple[tuple[int, int], ...]
    truth: tuple[Sequence[Box], ...]

    def corloc(self) -> NDArray[np.float64]:
        """Return the CorLoc of every method, (methods,)."""
        return (self.iou >= _THRESHOLD).mean(0)

    def center_box(self, side: float) -> NDArray[np.float64]:
        """Return the IoU of a box at the image center with `side` times the image's sides; 1 is the full image."""
        boxes = [
            (width * (1 - side) / 2, height * (1 - side) / 2, width * (1 + side) / 2, height * (1 + side) / 2)
            for height, width in self.sizes
        ]
        return best_iou(boxes, self.truth).double().numpy()


def measure_overlaps(
    reader: TokenReader,
    source: ImageSource,
    truth: Sequence[Sequence[Box]],
    methods: Sequence[Method],
    *,
    max_side: int = 640,
    dense: FeatureSettings | None = None,
    label: str | None = None,
) -> Overlaps:
    """Run methods on images with boxes; the model sees each image once.

    Args:
        reader: Reader of the model.
        source: Images.
        truth: Boxes of every image, at least one each.
        methods: Methods to run.
        max_side: Longer side in pixels to which larger images are reduced.
        dense: Views, shorter side and pooling instead of `max_side`.
        label: Label of the progress bar.
    """
    from tqdm.auto import tqdm

    boxes_of = dict(zip(source.ids, truth))
    found: list[Proposals] = []
    rows, degenerate = [], []
    proposals = propose(reader, source, methods, max_side=max_side, dense=dense)
    for proposal in tqdm(proposals, total=len(source), desc=label, unit="image", disable=None):
        rows.append(best_iou(proposal.boxes, [boxes_of[proposal.id]] * len(methods)).double().numpy())
        degenerate.append([isinstance(result, LostResult) and result.degenerate for result in proposal.results])
        found.append(replace(proposal, results=()))
    beyond = [
        one.id
        for one in found
        for height, width in [one.image_size]
        if any(x2 > width + 2 or y2 > height + 2 for _, _, x2, y2 in boxes_of[one.id])
    ]
    if beyond:
        logger.warning(
            "In %d of %d images, such as '%s', a ground-truth box extends beyond the image. Check box_format.",
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
    """Best options on the images used for choosing.

    Args:
        methods: Methods to test: the chosen settings of LOST, attention of the chosen head if the model has a CLS
            token, vanilla LOST.
        center: Sides of the center box, as shares of the image's sides.
        ranking: All settings of LOST with their CorLoc, best first.
        num_images: Number of images used for choosing.
    """

    methods: tuple[Method, ...]
    center: float
    ranking: tuple[tuple[LostSettings, float], ...]
    num_images: int = 0

    @property
    def settings(self) -> LostSettings:
        """Chosen settings of LOST."""
        assert isinstance(self.methods[0], LostSettings)
        return self.methods[0]

    def to_dict(self) -> Record:
        """Return plain values for JSON, with the five best settings."""
        best = [{"settings": str(settings), "corloc": corloc} for settings, corloc in self.ranking[:5]]
        return {"num_images": self.num_images, "num_settings": len(self.ranking), "best": best}


def choose(seen: Overlaps) -> Choice:
    """Choose the settings of LOST, the head and the center box with the highest CorLoc; the first one wins a tie."""
    ranked = sorted(zip(seen.methods, seen.corloc().tolist()), key=lambda pair: -pair[1])  # stable
    lost = tuple((method, corloc) for method, corloc in ranked if isinstance(method, LostSettings))
    heads = [method for method, _ in ranked if isinstance(method, AttentionSettings)]
    center = max(_CENTERS, key=lambda side: float((seen.center_box(side) >= _THRESHOLD).mean()))
    return Choice((lost[0][0], *heads[:1], LostSettings()), center, lost, len(seen.ids))


def score_methods(measured: Overlaps, *, center: float, seed: int) -> dict[str, CorLocScore]:
    """Return the scores by name. The first method is the chosen LOST, the last vanilla LOST, one between attention."""
    columns = {"lost": 0, "vanilla": -1} | ({"attention": 1} if len(measured.methods) > 2 else {})
    overlaps = {name: measured.iou[:, column] for name, column in columns.items()}
    words = {name: str(measured.methods[column]) for name, column in columns.items()}
    overlaps |= {"center_box": measured.center_box(center), "full_image": measured.center_box(1.0)}
    words |= {"center_box": f"center box with {center:.2g} of each side", "full_image": "full image"}
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
            overlaps=tuple(overlaps[name].tolist()),  # not rounded, because 0.49996 is not a hit
            num_degenerate=degenerate.get(name),
        )
    return scores


def images_with_boxes(
    source: ImageSource, truth: Sequence[Sequence[Box]]
) -> tuple[ImageSource, list[Sequence[Box]], int]:
    """Return the images that have a box, their boxes, and the number of images without boxes."""
    kept = [i for i, boxes in enumerate(truth) if boxes]
    if len(kept) < 2:
        raise ValueError(
            f"'{source.name}' has boxes in {len(kept)} of {len(source)} images, but at least 2 such images are needed."
        )
    return source.subset(kept), [truth[i] for i in kept], len(source) - len(kept)
