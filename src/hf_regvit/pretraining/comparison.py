"""Comparison of the teacher with the model that a run continues, and the best teacher so far.

Shape letters: n images, N patches, D width.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_callback import TrainerControl, TrainerState

from ..evaluation.knn import knn_accuracy
from ..figures.curves import read_metrics
from ..models.modeling_regvit import RegViTModel
from ..models.tokens import TokenReader
from ..training.callbacks import MetricsFile, Observer
from ..training.distributed import from_first
from ..training.run_folder import write_model
from .network import StudentAndTeacher

logger = logging.getLogger(__name__)

BEST = "best"  # folder in the folder of a run, beside BACKBONE
_BATCH = 32  # images per forward pass
_IGNORED = 255  # class id of pixels without a class


MaskedPatches = tuple[Tensor, Tensor]  # pixels (n, 3, H, W) of images, and the class id of every patch, (n, N)


def patch_labels(mask: np.ndarray, patch: tuple[int, int]) -> Tensor:
    """Return the most frequent class id of every patch, (N,), of a mask (H, W) whose sides are whole patches."""
    rows, columns = mask.shape[0] // patch[0], mask.shape[1] // patch[1]
    cells = torch.from_numpy(mask.astype(np.int64)).view(rows, patch[0], columns, patch[1]).transpose(1, 2)
    return cells.reshape(rows * columns, -1).mode(dim=1).values


def mirror_agreement(patches: Tensor, mirrored: Tensor, grid: tuple[int, int]) -> float:
    """Return the share of patches whose most similar patch in the mirrored image shows the same place.

    It needs no labels. Artifact tokens and features that are alike everywhere lower it.

    Args:
        patches: Patch tokens (n, N, D) of the images.
        mirrored: Patch tokens (n, N, D) of the horizontally flipped images.
        grid: Rows and columns of patches.
    """
    back = mirrored.unflatten(1, grid).flip(2).flatten(1, 2)  # (n, N, D), in the order of the images
    nearest = (F.normalize(patches, dim=-1) @ F.normalize(back, dim=-1).mT).argmax(dim=-1)  # (n, N)
    return (nearest == torch.arange(nearest.shape[1], device=nearest.device)).float().mean().item()


def quality(values: Mapping[str, float]) -> dict[str, float]:
    """Return the measurements of a log line that must not fall below those of the starting model."""
    return {name: value for name, value in values.items() if name.startswith(("eval_knn", "eval_patch_"))}


def score(values: Mapping[str, float]) -> float | None:
    """Return the number by which the best teacher is chosen; None if a log line has no measurement.

    It is the mean of the k-NN accuracies of images and patches, or the agreement of patches if there are neither.
    """
    measured = quality(values)
    accuracies = [value for name, value in measured.items() if "knn" in name]
    return sum(accuracies) / len(accuracies) if accuracies else measured.get("eval_patch_agreement")


class StartComparison(Observer):
    """Compare the tokens of the teacher with those of the starting model on a fixed set of images.

    Args:
        start: Starting model, which is read once.
        pixel_values: Normalized pixels `(n, 3, H, W)`.
        every_steps: Number of optimizer steps between two measurements, as for `OnlineKNN`.
        masked: Images to compare with and images to classify, with the classes of their patches.
    """

    def __init__(
        self,
        start: RegViTModel,
        pixel_values: Tensor,
        *,
        every_steps: float,
        masked: tuple[MaskedPatches, MaskedPatches] | None = None,
    ) -> None:
        super().__init__(every_steps, at_least=200, at_most=5000)
        self.pixel_values, self.masked = pixel_values, masked
        self._start = _tokens(TokenReader(start), pixel_values)
        self._grid = start.embeddings.patch_embeddings.grid_of(pixel_values)

    def measure(self, model: StudentAndTeacher, step: int) -> dict[str, float]:
        """Return drifts and qualities.

        `image_drift` and `patch_drift` are 1 - cosine to the token of the starting model, mean over images and
        patches. `eval_patch_agreement` is that of `mirror_agreement`, `eval_patch_knn_5` the accuracy of a vote of the
        5 nearest patches of other images, if there are masks.
        """
        reader = TokenReader(model.whole_teacher_backbone())
        image, patches = _tokens(reader, self.pixel_values)
        _, mirrored = _tokens(reader, self.pixel_values.flip(-1))
        if not (torch.isfinite(image).all() and torch.isfinite(patches).all()):
            return {}  # FiniteGuard is about to stop the run
        measured = {
            "image_drift": 1 - F.cosine_similarity(image, self._start[0], dim=-1).mean().item(),
            "patch_drift": 1 - F.cosine_similarity(patches, self._start[1], dim=-1).mean().item(),
            "eval_patch_agreement": mirror_agreement(patches, mirrored, self._grid),
        }
        if self.masked is not None:
            parts: list[Tensor] = []
            for pixels, labels in self.masked:
                known = labels.flatten() != _IGNORED
                parts += [_tokens(reader, pixels)[1].flatten(0, 1)[known], labels.flatten()[known]]
            measured["eval_patch_knn_5"] = knn_accuracy(*parts, k=(5,))[5]
        return measured


def _tokens(reader: TokenReader, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Return CLS, or the mean patch without CLS, (n, D), and patch tokens (n, N, D) after the final norm."""
    readings = [reader.read_final(pixels) for pixels in pixel_values.split(_BATCH)]
    vectors, patches = ([getattr(each, name)().float().cpu() for each in readings] for name in ("summary", "patches"))
    return torch.cat(vectors), torch.cat(patches)


def masked_patches(
    images: Sequence[Image.Image], masks: Sequence[np.ndarray], processor: BaseImageProcessor, patch: tuple[int, int]
) -> MaskedPatches:
    """Return the pixels of images and the class ids of their patches, after the crop of an image processor."""
    nearest: Any = copy.deepcopy(processor)
    nearest.resample = Image.Resampling.NEAREST
    nearest.do_rescale = nearest.do_normalize = False
    labels = []
    for mask in masks:
        levels = nearest(images=[Image.fromarray(mask).convert("RGB")], return_tensors="np")["pixel_values"][0, 0]
        labels.append(patch_labels(levels, patch))
    pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
    return pixels, torch.stack(labels)


class BestTeacher(TrainerCallback):
    """Keep the teacher with the best `score` in the folder `best/`, if it is better than the starting model.

    Args:
        folder: Run folder.
        image_processor: Image processor that is saved with the teacher.
        metrics: Metrics file, from which a resumed run reads the scores so far.

    Attributes:
        best: Step and score of the best teacher; step 0 is the starting model. None without measurements.
        last: Latest score.
    """

    def __init__(self, folder: Path, image_processor: BaseImageProcessor, metrics: MetricsFile) -> None:
        self.folder, self.image_processor, self.metrics = folder / BEST, image_processor, metrics
        self.best: tuple[int, float] | None = None
        self.last: float | None = None

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Read the scores of the steps before a resumed run."""
        if state.global_step and self.metrics.path.exists():
            for line in read_metrics(self.metrics.path):
                self._is_better(line["step"], line)

    def _is_better(self, step: int, values: Mapping[str, float]) -> bool:
        if (found := score(values)) is None:
            return False
        self.last = found
        better = self.best is None or found > self.best[1]
        if better:
            self.best = (step, found)
        return better

    def on_log(
        self, args: object, state: TrainerState, control: TrainerControl, logs: Mapping[str, float] = {}, **kwargs: Any
    ) -> None:
        """Save the teacher if the log line has the best score so far."""
        step = state.global_step
        if not from_first(self._is_better(step, logs)) or step == 0:
            return
        teacher = kwargs["model"].whole_teacher_backbone()  # a collective if the teacher is sharded
        if state.is_world_process_zero:
            try:
                write_model(self.folder, teacher, self.image_processor)
            except OSError as error:  # a full disk must not stop the run
                logger.error("ALARM: The best teacher, of step %d, cannot be written (%s).", step, error)

    def on_train_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Log which teacher was the best, if it is not the last one."""
        if self.best is None or self.last is None or self.best[0] == state.global_step:
            return
        (step, best), last = self.best, self.last
        where = f"That teacher is in '{self.folder}'." if step else "No teacher was better than the start."
        logger.warning("The best score is %.4f, at step %d; the last one is %.4f. %s", best, step, last, where)
