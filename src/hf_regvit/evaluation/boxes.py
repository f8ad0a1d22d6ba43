"""Boxes and their intersection over union."""

from collections.abc import Sequence

import torch
from torch import Tensor

Box = tuple[float, float, float, float]
IOU_EPSILON = 1e-7


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Compute the intersection over union of every pair of boxes.

    As in the reference, it is computed in float32 with 1e-7 added to the union; two boxes whose intersection is
    exactly half their union get 0.5 and count.

    Args:
        boxes: (n, 4) as (x1, y1, x2, y2).
        others: (m, 4) as (x1, y1, x2, y2).

    Returns:
        (n, m) float32 in [0, 1].

    Raises:
        ValueError: The boxes are not (n, 4), not finite, or x1 > x2 or y1 > y2.
    """
    for name, given in (("boxes", boxes), ("others", others)):
        if given.ndim != 2 or given.shape[1] != 4:
            raise ValueError(f"{name} has shape {tuple(given.shape)}, expected (number, 4) as (x1, y1, x2, y2).")
        if not torch.isfinite(given).all() or (given[:, 2:] < given[:, :2]).any():
            raise ValueError(
                f"{name} must be finite (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2. Convert (x, y, w, h) boxes first."
            )
    boxes, others = boxes.float()[:, None], others.float()[None]
    sides = torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(boxes[..., :2], others[..., :2])
    shared = sides.clamp(min=0).prod(-1)
    areas = [(given[..., 2:] - given[..., :2]).prod(-1) for given in (boxes, others)]
    return shared / (areas[0] + areas[1] - shared + IOU_EPSILON)


def best_iou(predictions: Sequence[Box], references: Sequence[Sequence[Box]]) -> Tensor:
    """Return the IoU of every predicted box with the best matching ground-truth box of its image, (n,) float32.

    Args:
        predictions: One box per image, (n, 4).
        references: n lists of boxes, each with at least one.

    Raises:
        ValueError: The lengths differ, a box is invalid, or an image has no ground-truth box.
    """
    if len(predictions) != len(references):
        raise ValueError(f"Got {len(predictions)} predicted boxes for {len(references)} images, expected one each.")
    overlaps = []
    for i, (predicted, truth) in enumerate(zip(predictions, references)):
        if len(truth) == 0:
            raise ValueError(f"Image {i} has no ground-truth box, but CorLoc needs one in every image. Leave it out.")
        overlaps.append(box_iou(torch.tensor([predicted]), torch.tensor(truth)).max())
    return torch.stack(overlaps) if overlaps else torch.empty(0)
