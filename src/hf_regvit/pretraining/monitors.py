"""Monitoring of pretraining: statistics of the teacher that distinguish a healthy run from a collapsing one.

The loss is not a reliable indicator: it may rise while the features improve, because targets get sharper, and it falls
to 0 in one kind of collapse. The statistics here are computed from the tokens of a fixed set of images, so that values
from different steps of a run are comparable.

Shape letters: n images, D width.
"""

import copy
import logging
import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers.image_processing_utils import BaseImageProcessor

from ..data.decoding import BadImageError
from ..data.files import stratified_split
from ..data.maps import DenseSource, has_masks
from ..data.parts import heldout_streams, open_parts
from ..data.source import ImageRecord, ImageSource
from ..diagnosis.diagnose import artifact_snapshot
from ..diagnosis.outliers import effective_rank
from ..evaluation.knn import knn_accuracy
from ..evaluation.linear import ridge_accuracy
from ..models.modeling_regvit import RegViTModel
from ..models.processing import IMAGENET_MEAN, IMAGENET_STD, default_image_processor, statistics_of
from ..models.tokens import TokenReader
from ..training.callbacks import Observer
from ..training.distributed import full_tensor
from .arguments import PretrainingArguments
from .comparison import MaskedPatches, StartComparison, masked_patches
from .crops import MultiCropStream
from .network import StudentAndTeacher

logger = logging.getLogger(__name__)

BATCH = 64  # images per forward pass
COMPARED = 32  # images for the comparison with the start, whose patch tokens are kept
SNAPSHOT_IMAGES = 32  # images for the artifact statistics, which use all of their patches

# Keys of `artifact_snapshot` and the corresponding names in the log.
_ARTIFACTS = {
    "outlier_share": "outlier_share", "layer": "outlier_layer", "separation": "outlier_separation",
    "norm_median": "patch_norm", "norm_max": "patch_norm_max", "register_norm": "register_norm",
    "register_cosine": "register_cosine", "attention_registers": "cls_to_register_attention",
    "attention_entropy": "cls_attention_entropy", "effective_rank": "patch_effective_rank",
}  # fmt: skip


def feature_statistics(cls: Tensor) -> dict[str, float]:
    """Measure the spread of the CLS tokens of different images.

    Args:
        cls: CLS tokens after the final norm `(n, D)`, n at least 2.

    Returns:
        `feature_std`: standard deviation over the images of the L2-normalized CLS token, mean over its D channels,
        times sqrt(D): 1 if the tokens are spread evenly over all directions, 0 if all images have the same token.
        `effective_rank` of the same (n, D) matrix: 1 to min(n, D).

    Source: Chen and He 2021 (SimSiam) for the standard deviation; Garrido et al. 2023 (RankMe) for the rank of
    features as a measure.
    """
    unit = F.normalize(cls.double(), dim=-1)  # (n, D)
    std = unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5
    return {"feature_std": std.item(), "effective_rank": effective_rank(unit[None]).item()}


def artifact_statistics(backbone: TokenReader | nn.Module, pixel_values: Tensor) -> dict[str, float]:
    """Return `artifact_snapshot` under the names of the log: registers, CLS attention and patch outliers.

    Args:
        backbone: RegViT or its reader.
        pixel_values: Normalized pixels `(n, 3, H, W)`.

    Returns:
        `outlier_share` of the patches, by the norm before the final norm, with `outlier_layer` and
        `outlier_separation` (Ashman's D) of the block where it is largest; `patch_norm` (median) and `patch_norm_max`
        of that block; `patch_effective_rank`; `cls_attention_entropy` relative to uniform attention; and with
        registers `register_norm`, `register_cosine` (at least two registers) and `cls_to_register_attention`, the
        share of the attention of CLS in the last block, mean over heads.
    """
    snapshot = artifact_snapshot(backbone, pixel_values[:SNAPSHOT_IMAGES])
    return {name: snapshot[key] for key, name in _ARTIFACTS.items() if key in snapshot}


@torch.no_grad()
def network_statistics(network: StudentAndTeacher) -> dict[str, float]:
    """Measure the distance between teacher and student and the norm of the DINO center.

    Returns:
        `teacher_student_distance`: |teacher - student| / |student| over all backbone and head parameters.
        `center_norm`: L2 norm of the DINO center, with softmax centering.
    """
    student = dict(network.student.named_parameters())
    teacher = dict(network.teacher.named_parameters())
    # Sharded parameters are subtracted shard by shard; only the sums are gathered.
    distance = sum(full_tensor((teacher[name] - value).float().square().sum()) for name, value in student.items())
    size = sum(full_tensor(value.float().square().sum()) for value in student.values())
    values = {"teacher_student_distance": math.sqrt(float(distance) / max(float(size), 1e-30))}
    if network.dino_center is not None:
        values["center_norm"] = network.dino_center.center.norm().item()
    return values


class Monitor(Observer):
    """Measure statistics of features, artifacts and network of the teacher on a fixed set of images.

    All processes measure the same images, because a sharded teacher needs all processes.

    Args:
        pixel_values: Normalized pixels `(n, 3, H, W)`; 64 images take about half the time of a step with 32.
        every_steps: Number of optimizer steps between two measurements, or a fraction of the run, limited to 20 to
            100 steps.
    """

    def __init__(self, pixel_values: Tensor, *, every_steps: float = 0.025) -> None:
        super().__init__(every_steps, at_least=20, at_most=100)
        self.pixel_values = pixel_values

    def measure(self, model: StudentAndTeacher, step: int) -> dict[str, float]:
        """Return the values of `feature_statistics`, `artifact_statistics` and `network_statistics`."""
        reader = TokenReader(model.whole_teacher_backbone())
        vectors = [reader.read_final(pixels).summary() for pixels in self.pixel_values.split(BATCH)]
        return {
            **feature_statistics(torch.cat(vectors)),
            **artifact_statistics(reader, self.pixel_values),
            **network_statistics(model),
        }


class Panels(Observer):
    """Save PNG panels of a fixed set of images: image, PCA of the patch tokens, attention of CLS.

    Args:
        images: PIL images of the same size.
        pixel_values: Pixels `(n, 3, H, W)` of the same images, as input of the backbone.
        folder: Output folder for `step_000100.png` and so on.
        every_steps: Number of optimizer steps between two panels, or a fraction of the run, limited to 5000 steps.
    """

    def __init__(
        self, images: Sequence[Image.Image], pixel_values: Tensor, *, folder: str | Path, every_steps: float = 0.25
    ) -> None:
        super().__init__(every_steps, at_most=5000)
        self.images, self.pixel_values, self.folder = images, pixel_values, Path(folder)

    def measure(self, model: StudentAndTeacher, step: int) -> dict[str, float]:
        """Save a panel; return no measurements."""
        from ..figures.maps import progress_figure, read_token_maps

        backbone = model.whole_teacher_backbone()  # a collective if the teacher is sharded, so on every process
        if self.is_main_process:
            maps, path = read_token_maps(backbone, self.pixel_values), self.folder / f"step_{step:06d}.png"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                progress_figure(self.images, maps, title=f"step {step}").save(path)
                self.figures["panel"] = path
            except OSError as error:  # a full disk must not stop the run
                logger.error("ALARM: The panel of step %d cannot be written (%s). Training continues.", step, error)
        return {}


def observers(
    args: PretrainingArguments,
    dataset: Dataset,
    *,
    image_processor: BaseImageProcessor,
    start: RegViTModel | None = None,
) -> list[Observer]:
    """Create the observers of a run from its arguments: monitor, panels, k-NN accuracy, comparison with the start.

    Monitor and panels read 64 and 8 images spread over the training data. k-NN reads the labeled validation split or,
    if there is none, a quarter of the labeled training images. Images are resized and cropped once; unreadable images
    are skipped.

    Args:
        args: Arguments of the run.
        dataset: Dataset of training crops. If it has no `source` of whole images, crops of the first epoch are used;
            for streams, the first images of some shards.
        image_processor: Image processor that the backbone is saved with, used for k-NN.
        start: Model that the run continues, if it does.
    """
    found: list[Observer] = []
    small = _processor_like(image_processor, args.global_crop_size)
    large = _processor_like(image_processor, args.panel_size or args.global_crop_size)
    # Only one image is decoded at a time: 64 images of 12 megapixels would take two gigabytes.
    looks = [(_cropped(one, small), _cropped(one, large)) for one in _training_images(dataset, 64)]
    if len(looks) < 2:
        logger.info("The monitor and the panels need at least two training images, so they are disabled in this run.")
    else:
        if args.monitor_steps:
            found.append(Monitor(_normalized([look for look, _ in looks], small), every_steps=args.monitor_steps))
        if args.panel_steps:
            shown = [looks[index][1] for index in _spread(len(looks), 8)]
            panels = args.folder / "panels"
            found.append(Panels(shown, _normalized(shown, large), folder=panels, every_steps=args.panel_steps))
        if args.knn_steps and start is not None:
            pixels = _normalized([look for look, _ in looks[:COMPARED]], small)
            masked = _masked_parts(args, small, start.config.patch_shape)
            found.append(StartComparison(start, pixels, every_steps=args.knn_steps, masked=masked))
    if args.knn_steps and (knn := _knn(args, dataset, image_processor)) is not None:
        found.append(knn)
    return found


def _processor_like(image_processor: BaseImageProcessor, size: int) -> BaseImageProcessor:
    """Return the default image processor for a size, with the statistics of another one."""
    processor = default_image_processor(size)
    processor.image_mean, processor.image_std = (list(values) for values in statistics_of(image_processor))
    return processor


def sample_pixels(dataset: Dataset, wanted: int, *, image_processor: BaseImageProcessor, size: int) -> Tensor:
    """Return normalized pixels `(n, 3, size, size)` of up to `wanted` training images; see `observers`."""
    processor = _processor_like(image_processor, size)
    return _normalized([_cropped(one, processor) for one in _training_images(dataset, wanted)], processor)


def _masked_parts(
    args: PretrainingArguments, processor: BaseImageProcessor, patch: tuple[int, int]
) -> tuple[MaskedPatches, MaskedPatches] | None:
    """Return 48 training and 16 held-out images with classes of patches, if the data is a folder with masks."""
    if args.streaming or len(args.data) > 1 or not has_masks(args.data[0]):
        return None
    try:
        parts = open_parts(
            args.data[0], kind="masks", heldout_share=0.25, seed=args.seed, max_train=48, max_heldout=16
        )
    except ValueError as error:
        logger.info("k-NN accuracy of patches is disabled: %s", error)
        return None
    read = [
        masked_patches([part[index].image for index in range(len(part))], part.targets, processor, patch)
        for part in (cast(DenseSource, parts.train), cast(DenseSource, parts.heldout))
    ]
    return read[0], read[1]


def _spread(count: int, wanted: int) -> list[int]:
    """Return evenly spaced indices, so that sorted data contributes images of all classes."""
    wanted = min(wanted, count)
    return [round(index * (count - 1) / max(wanted - 1, 1)) for index in range(wanted)]


def _training_images(dataset: Dataset, wanted: int) -> Iterator[Image.Image]:
    source: Any = getattr(dataset, "source", None)
    if hasattr(source, "__getitem__"):
        yield from (record.image for record in _readable(source, wanted))
    elif isinstance(dataset, Sized):
        yield from (_image_of(dataset[(0, index)]["global_crops"][0]) for index in _spread(len(dataset), wanted))
    elif isinstance(dataset, MultiCropStream):
        yield from (record.image for record in dataset.first_records(wanted))


def _readable(source: ImageSource, wanted: int) -> Iterator[ImageRecord]:
    for index in _spread(len(source), wanted):
        try:
            yield source[index]
        except BadImageError as error:
            logger.info("The monitors skip an image: %s", error)


def _image_of(crop: Tensor) -> Image.Image:
    """Convert a crop (3, S, S), uint8 or normalized with ImageNet statistics, to a PIL image."""
    if crop.is_floating_point():
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        crop = ((crop * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy())


def _cropped(image: Image.Image, processor: BaseImageProcessor) -> Image.Image:
    """Return an image after the resizing and cropping of a processor."""
    return _image_of(processor(images=[image], do_rescale=False, do_normalize=False)["pixel_values"][0].byte())


def _normalized(shown: Sequence[Image.Image], processor: BaseImageProcessor) -> Tensor:
    """Return normalized pixels `(n, 3, H, W)` of cropped images, as the processor makes from the whole images."""
    return processor(images=list(shown), do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]


_Labeled = tuple[Image.Image, int]
# Neighbors, images to classify, and True if the latter are excluded from training.
_Parts = tuple[list[_Labeled], list[_Labeled], bool]


def _labeled(records: Iterable[ImageRecord], processor: BaseImageProcessor) -> list[_Labeled]:
    """Return labeled images after the crop: they take little memory, and evaluations need not decode them again."""
    return [(_cropped(record.image, processor), r) for record in records if (r := record.label) is not None]


def _source_parts(args: PretrainingArguments, dataset: Dataset, processor: BaseImageProcessor) -> _Parts | None:
    source: Any = getattr(dataset, "source", None)
    if not getattr(source, "labels", None):
        return None
    columns = args.subset("image_column", "label_column")
    try:
        parts = open_parts(args.data, train=source, kind="images", heldout_share=0.25, seed=args.seed, options=columns)
    except ValueError as error:
        logger.info("k-NN accuracy is disabled: %s", error)
        return None
    heldout = cast(ImageSource, parts.heldout)
    if not heldout.labels or heldout.label_names != source.label_names:
        logger.info("k-NN accuracy is disabled: the validation and training splits have different classes.")
        return None
    return (
        _labeled(_readable(parts.train, args.knn_max_images * 3 // 4), processor),
        _labeled(_readable(heldout, args.knn_max_images // 4), processor),
        not parts.held_out_from_train,
    )


def _stream_parts(
    args: PretrainingArguments, dataset: MultiCropStream, processor: BaseImageProcessor
) -> _Parts | None:
    """Return the k-NN images from the beginnings of evenly spaced shards, where a stream can be read."""
    if all(record.label is None for record in dataset.first_records(4, shards=1)):
        return None
    heldout = heldout_streams(args.data, **args.subset("image_column", "label_column"))
    names = {stream.label_names for stream in (*dataset.streams, *heldout)}
    if len(names) > 1 or (None in names and len(dataset.streams) > 1):
        logger.info("k-NN accuracy is disabled: the streams have different class names, so class ids are ambiguous.")
        return None
    wanted, shards = args.knn_max_images, 32
    if heldout:
        test = MultiCropStream(heldout, dataset.multi_crop, seed=args.seed)
        counts = ((dataset, wanted * 3 // 4), (test, wanted // 4))
        train, held = (_labeled(one.first_records(count, shards=shards), processor) for one, count in counts)
        return train, held, True
    train = _labeled(dataset.first_records(wanted, shards=shards), processor)
    first, second = stratified_split([label for _, label in train], held_out_share=0.25, seed=args.seed)
    return [train[index] for index in first], [train[index] for index in second], False


def backbone_features(
    backbone: nn.Module, images: Sequence[Image.Image], *, image_processor: BaseImageProcessor, batch_size: int = 256
) -> Tensor:
    """Extract the CLS token and the mean patch token of every image, concatenated; registers are not used.

    Both parts are tokens after the final norm, as in the linear probe of DINOv2. For small backbones, the mean patch
    token contains color and texture that CLS lacks.

    Args:
        backbone: RegViT.
        images: Sequence of n PIL images.
        image_processor: Processor that makes `pixel_values` from a list of images.
        batch_size: Number of images per forward pass.

    Returns:
        Features `(n, 2 * D)`, float32 on the CPU.
    """
    reader, rows = TokenReader(backbone), []
    for start in range(0, len(images), batch_size):
        batch = list(images[start : start + batch_size])
        reading = reader.read_final(image_processor(images=batch, return_tensors="pt")["pixel_values"])
        rows.append(torch.cat([reading.summary(), reading.patches().mean(dim=1)], dim=1).float().cpu())
    return torch.cat(rows)


class OnlineKNN(Observer):
    """Measure the weighted k-NN accuracy of the teacher on held-out images, and optionally a linear probe.

    Args:
        neighbors: Images to compare with, and their class ids.
        heldout: Images to classify, and their class ids.
        image_processor: Image processor that the backbone will be saved with.
        every_steps: Number of optimizer steps between two evaluations, or a fraction of the run, limited to 200 to
            5000 steps; the first evaluation is before step 0, the last after the last step.
        k: Number of neighbors.
        linear_probe: True to also log `eval_linear`, the accuracy of `ridge_accuracy` on the same features.
        is_held_out: True if the images to classify are excluded from training; False if the run trains on them without
            their labels, which reports mention.

    Source: the k-NN protocol of DINOv2 (votes weighted by softmax of similarity / 0.07).
    """

    def __init__(
        self,
        neighbors: Sequence[_Labeled],
        heldout: Sequence[_Labeled],
        *,
        image_processor: BaseImageProcessor,
        every_steps: float,
        k: int = 10,
        linear_probe: bool = False,
        is_held_out: bool = True,
    ) -> None:
        super().__init__(every_steps, at_least=200, at_most=5000)
        self.neighbors, self.heldout, self.is_held_out = neighbors, heldout, is_held_out
        self.image_processor, self.k, self.linear_probe = image_processor, k, linear_probe

    def measure(self, model: StudentAndTeacher, step: int) -> dict[str, float]:
        """Return `eval_knn_K` for K neighbors, and `eval_linear` if enabled."""
        backbone, processor = model.whole_teacher_backbone(), self.image_processor
        parts: list[Tensor] = []
        for images, labels in (zip(*part, strict=True) for part in (self.neighbors, self.heldout)):
            parts += [backbone_features(backbone, images, image_processor=processor), torch.as_tensor(labels)]
        if not (torch.isfinite(parts[0]).all() and torch.isfinite(parts[2]).all()):
            return {}  # FiniteGuard is about to stop the run, with a better message than a probe could give
        measured = {f"eval_knn_{self.k}": knn_accuracy(*parts, k=(self.k,))[self.k]}
        if self.linear_probe:
            measured["eval_linear"] = ridge_accuracy(*parts)
        return measured


def _knn(args: PretrainingArguments, dataset: Dataset, image_processor: BaseImageProcessor) -> OnlineKNN | None:
    """Create k-NN on the labeled validation split or, if there is none, on a quarter of the training images."""
    if isinstance(dataset, MultiCropStream):
        parts = _stream_parts(args, dataset, image_processor)
    else:
        parts = _source_parts(args, dataset, image_processor)
    if parts is None:
        return None
    neighbors, heldout, is_held_out = parts
    if not (neighbors and heldout):
        logger.info(
            "k-NN accuracy is disabled: there are too few usable labeled images (--knn_max_images %d).",
            args.knn_max_images,
        )
        return None
    if not is_held_out:  # sufficient to follow a run, but too optimistic as a result
        logger.info(
            "The data has no validation split, so k-NN is evaluated on a quarter of the training images, which the "
            "run sees without their labels."
        )
    processor: Any = copy.deepcopy(image_processor)
    processor.do_resize = processor.do_center_crop = False
    return OnlineKNN(
        neighbors,
        heldout,
        image_processor=processor,
        every_steps=args.knn_steps,
        k=min(10, len(neighbors)),
        linear_probe=args.linear_probe,
        is_held_out=is_held_out,
    )
