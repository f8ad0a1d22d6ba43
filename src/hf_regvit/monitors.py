"""What tells a healthy pretraining run from a collapsing one, measured on the teacher every so many steps.

The loss says little: it may rise while the features improve, because targets get sharper, and it falls to nothing in
one kind of collapse. What is read here are the tokens of a fixed set of images, so that the curves of a run compare
with themselves.

Shape letters: n images, D width.
"""

import copy
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .artifacts import artifact_snapshot
from .callbacks import Observer, OnlineKNN
from .distillation import SelfDistillation, full_tensor
from .image_guard import BadImageError
from .images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageRecord,
    MissingSplitError,
    default_image_processor,
    load_images,
    stratified_split,
)
from .modeling_regvit import RegViTModel
from .outliers import effective_rank

logger = logging.getLogger(__name__)

BATCH = 64  # images per forward
SNAPSHOT_IMAGES = 32  # for artifacts; their patches are many

# What `artifact_snapshot` says, under the names of the log.
_ARTIFACTS = {
    "outlier_share": "outlier_share",
    "layer": "outlier_layer",
    "separation": "outlier_separation",
    "norm_median": "patch_norm",
    "norm_max": "patch_norm_max",
    "register_norm": "register_norm",
    "register_cosine": "register_cosine",
    "attention_registers": "cls_to_register_attention",
    "attention_entropy": "cls_attention_entropy",
    "effective_rank": "patch_effective_rank",
}


@torch.no_grad()
def feature_statistics(backbone: RegViTModel, pixel_values: Tensor) -> dict[str, float]:
    """How far the CLS tokens of different images lie apart.

    Args:
        backbone: RegViT in eval mode.
        pixel_values: `(n, 3, H, W)` normalised, n at least 2.

    Returns:
        `feature_std`: standard deviation over the images of the L2-normalised CLS, mean over its D channels, times
        sqrt(D): 1 if the tokens point everywhere alike, 0 if all images have the same one. `effective_rank` of the
        same (n, D) matrix: 1 to min(n, D).

    Source: Chen and He 2021 (SimSiam) for the standard deviation; Garrido et al. 2023 (RankMe) for the rank of
    features as a measure.
    """
    cls = torch.cat([backbone(pixels).pooler_output for pixels in pixel_values.split(BATCH)])
    unit = F.normalize(cls.double(), dim=-1)  # (n, D)
    std = unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5
    return {"feature_std": std.item(), "effective_rank": effective_rank(unit[None]).item()}


def artifact_statistics(backbone: RegViTModel, pixel_values: Tensor) -> dict[str, float]:
    """`artifact_snapshot` under the names of the log: registers, attention of CLS, outliers among the patches.

    Args:
        backbone: RegViT.
        pixel_values: `(n, 3, H, W)` normalised.

    Returns:
        `outlier_share` of the patches, by the norm before the final norm, with `outlier_layer` and
        `outlier_separation` (Ashman's D) of the block where it is largest; `patch_norm` (median) and `patch_norm_max`
        there; `patch_effective_rank`; `cls_attention_entropy` relative to uniform attention; and with registers
        `register_norm`, `register_cosine` (two at least) and `cls_to_register_attention`, the share of the attention
        of CLS in the last block, mean over heads.
    """
    snapshot = artifact_snapshot(backbone, pixel_values[:SNAPSHOT_IMAGES])
    return {name: snapshot[key] for key, name in _ARTIFACTS.items() if key in snapshot}


@torch.no_grad()
def network_statistics(network: SelfDistillation) -> dict[str, float]:
    """Distance of the halves and size of the centers.

    Returns:
        `teacher_student_distance`: |teacher - student| / |student| over all backbone and head parameters.
        `center_norm`: L2 norm of the DINO center, with softmax centering.
    """
    student = dict(network.student.named_parameters())
    teacher = dict(network.teacher.named_parameters())
    # A sharded parameter is subtracted in parts; only the sums over all of it have to be known everywhere.
    distance = sum(full_tensor((teacher[name] - value).float().square().sum()) for name, value in student.items())
    size = sum(full_tensor(value.float().square().sum()) for value in student.values())
    values = {"teacher_student_distance": math.sqrt(float(distance) / max(float(size), 1e-30))}
    if network.dino_center is not None:
        values["center_norm"] = network.dino_center.center.norm().item()
    return values


class Monitor(Observer):
    """Statistics of features, artifacts and network, of the teacher on a fixed set of images, every so many steps.

    Every process measures, on the same images: a sharded teacher needs all of them.

    Args:
        pixel_values: `(n, 3, H, W)` normalised; 64 images cost about half a step of 32.
        every_steps: optimizer steps between two measurements, or a share of the run, from 20 to 100 steps.
    """

    def __init__(self, pixel_values: Tensor, *, every_steps: float = 0.025) -> None:
        super().__init__(every_steps, at_least=20, at_most=100)
        if len(pixel_values) < 2:
            raise ValueError(f"the monitor got {len(pixel_values)} images; it compares images, so give 2 at least.")
        self.pixel_values = pixel_values

    def measure(self, model: SelfDistillation, step: int) -> dict[str, float]:
        """The names are those of `feature_statistics`, `artifact_statistics` and `network_statistics`."""
        backbone = model.whole_teacher_backbone()
        pixels = self.pixel_values.to(next(backbone.parameters()).device)
        return {
            **feature_statistics(backbone, pixels),
            **artifact_statistics(backbone, pixels),
            **network_statistics(model),
        }


class Panels(Observer):
    """A PNG of the same images every so many steps: picture, PCA of the patch tokens, attention of CLS.

    Args:
        images: PIL pictures of one size.
        pixel_values: `(n, 3, H, W)`, the same pictures as the backbone gets them.
        folder: gets `step_000100.png` and so on.
        every_steps: optimizer steps between two panels, or a share of the run, at most 5000 steps.
    """

    def __init__(
        self, images: Sequence[Any], pixel_values: Tensor, *, folder: str | Path, every_steps: float = 0.25
    ) -> None:
        super().__init__(every_steps, at_most=5000)
        self.images, self.pixel_values, self.folder = images, pixel_values, Path(folder)

    def measure(self, model: SelfDistillation, step: int) -> dict[str, float]:
        """Nothing to log."""
        from .figures import progress_picture, read_token_maps

        backbone = model.whole_teacher_backbone()  # of all processes, if it is sharded
        if self.is_main_process:
            maps = read_token_maps(backbone, self.pixel_values)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                progress_picture(self.images, maps, title=f"step {step}").save(self.folder / f"step_{step:06d}.png")
            except OSError as error:  # a full disk is no reason to lose a run
                logger.error("ALARM: the panel of step %d cannot be written (%s). Training goes on.", step, error)
        return {}


def observers(
    args: Any, dataset: Any, *, image_processor: Any, folder: str | Path, image_size: int, panel_size: int
) -> list[Observer]:
    """What a run observes by its arguments: monitor, panels, k-NN accuracy.

    Monitor and panels read 64 and 8 images spread over the training data; k-NN the labelled validation part or
    a quarter of the labelled training part. Images are resized and cropped once; unreadable ones are left out.

    Args:
        args: `monitor_steps`, `panel_steps`, `knn_steps`, `knn_max_images`, `linear_probe` and `data` of the run.
        dataset: of training crops. Without a `source` of whole images, crops of the first epoch stand for them; of
            streams the first images of some shards are read, and there is no k-NN.
        image_processor: what the backbone is saved with; k-NN uses it.
        folder: of the run.
        image_size: side of the monitor's images in pixels.
        panel_size: side of the panels' images in pixels.
    """
    found: list[Observer] = []
    pictures = _training_pictures(dataset, 64)
    if len(pictures) < 2:
        logger.info("Monitor and panels need two training images to look at: there are none in this run.")
    else:
        if args.monitor_steps:
            _, pixels = _prepared(pictures, default_image_processor(image_size))
            found.append(Monitor(pixels, every_steps=args.monitor_steps))
        if args.panel_steps:
            chosen = [pictures[index] for index in _spread(len(pictures), 8)]
            shown, pixels = _prepared(chosen, default_image_processor(panel_size))
            found.append(Panels(shown, pixels, folder=Path(folder) / "panels", every_steps=args.panel_steps))
    if args.knn_steps and (knn := _knn(args, dataset, image_processor)) is not None:
        found.append(knn)
    return found


def _spread(count: int, wanted: int) -> list[int]:
    """Evenly spread indices: sorted data gives every class its share."""
    wanted = min(wanted, count)
    return [round(index * (count - 1) / max(wanted - 1, 1)) for index in range(wanted)]


def _training_pictures(dataset: Any, wanted: int) -> list[Image.Image]:
    source: Any = getattr(dataset, "source", None)
    if hasattr(source, "__getitem__"):
        return [record.image for record in _readable(source, _spread(len(source), wanted))]
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        crops = [dataset[(0, index)]["global_crops"][0] for index in _spread(len(dataset), wanted)]
        return [_picture(crop) for crop in crops]
    return dataset.first_images(wanted) if hasattr(dataset, "first_images") else []


def _readable(source: Any, indices: Sequence[int]) -> list[ImageRecord]:
    records = []
    for index in indices:
        try:
            records.append(source[index])
        except BadImageError as error:
            logger.info("Left out of the monitors: %s", error)
    return records


def _picture(crop: Tensor) -> Image.Image:
    """A crop (3, S, S), uint8 or normalised with ImageNet's statistics, as a picture."""
    if crop.is_floating_point():
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        crop = ((crop * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy())


def _prepared(pictures: Sequence[Image.Image], processor: Any) -> tuple[list[Image.Image], Tensor]:
    """Pictures resized and cropped by a processor, and the same as its normalised `(n, 3, H, W)`."""
    plain = processor(images=list(pictures), do_rescale=False, do_normalize=False, return_tensors="pt")
    shown = [_picture(pixels.byte()) for pixels in plain["pixel_values"]]
    return shown, processor(images=list(pictures), return_tensors="pt")["pixel_values"]


def _knn(args: Any, dataset: Any, image_processor: Any) -> OnlineKNN | None:
    """k-NN on the labelled validation part of the data or, where there is none, on a quarter of the training part."""
    train: Any = getattr(dataset, "source", None)
    is_held_out = True
    if not getattr(train, "labels", None):
        return None
    try:
        heldout = load_images(
            args.data, split="validation", image_column=args.image_column, label_column=args.label_column
        )
    except MissingSplitError:
        neighbours, judged = stratified_split(train.labels, held_out_share=0.25, seed=args.seed)
        if not judged:
            logger.info("No class has two images: no k-NN accuracy during the run.")
            return None
        # Enough to follow a run. As a result it would flatter: the network has seen these pictures.
        logger.info(
            "The data has no validation part: k-NN is judged on a quarter of the training images, which the run "
            "sees without their labels."
        )
        train, heldout, is_held_out = train.subset(neighbours), train.subset(judged), False
    if not heldout.labels or heldout.label_names != train.label_names:
        logger.info("The classes of the validation part are not those of the training part: no k-NN accuracy.")
        return None
    parts = [
        _readable(source, _spread(len(source), wanted))
        for source, wanted in ((train, args.knn_max_images * 3 // 4), (heldout, args.knn_max_images // 4))
    ]
    if not all(parts):
        logger.info(
            "Too few labelled images can be used (--knn_max_images %d): no k-NN accuracy.", args.knn_max_images
        )
        return None
    # Once resized and cropped they take little memory, and no evaluation decodes them again.
    images = [_prepared([record.image for record in part], image_processor)[0] for part in parts]
    labels = [[cast(int, record.label) for record in part] for part in parts]
    processor = copy.deepcopy(image_processor)
    processor.do_resize = processor.do_center_crop = False
    return OnlineKNN(
        images[0],
        labels[0],
        images[1],
        labels[1],
        image_processor=processor,
        every_steps=args.knn_steps,
        k=(min(10, len(images[0])),),
        linear_probe=args.linear_probe,
        is_held_out=is_held_out,
    )
