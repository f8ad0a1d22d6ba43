"""Interface of a fine-tuning task: its data, loss, metrics and figures, with the hooks that most tasks share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers.image_processing_utils import BaseImageProcessor

from ..data.source import ImageSource
from ..models.configuration_regvit import RegViTConfig
from ..models.modeling_regvit import RegViTPreTrainedModel
from .arguments import FinetuningArguments
from .data import EvaluationImages, EvaluationItem, Item, Make, TrainImages, bad_images, stack


class Task(Protocol):
    """Interface of a task for `finetune`. Batches hold `pixel_values` and `labels`; the task defines the labels.

    A class that names `Task` as its base inherits the hooks that have a default.

    Attributes:
        name: Task name, as in `--task`.
        model_class: Model class with the backbone as attribute `regvit`.
        shown: Metrics whose curves are plotted, without "eval_".
        args: Arguments of the run.
        names: Names of the classes, if there are any.
        train: Training images; their fingerprint is saved in checkpoints.
        validation: Validation images; None disables evaluation.
    """

    name: str
    model_class: type[RegViTPreTrainedModel]
    shown: Sequence[str]
    args: FinetuningArguments
    names: Sequence[str] = ()
    train: ImageSource
    validation: ImageSource | None

    # The model.

    def config_fields(self) -> dict[str, Any]:
        """Return fields of `RegViTConfig` for this task; by default the class names."""
        names = self.names
        return {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}

    def fits_head(self, config: RegViTConfig) -> bool:
        """Return True if a head with this configuration can be reused; by default if it has the same classes."""
        return config.id2label == dict(enumerate(self.names))

    def image_processor(self, processor: BaseImageProcessor, config: RegViTConfig) -> BaseImageProcessor:
        """Return the processor to train with and to save; by default that of the model."""
        return processor

    def for_several_processes(self, network: nn.Module) -> None:
        """Adapt the network to training with several processes, in place; by default it stays as it is."""

    # The data.

    def train_item(self, processor: BaseImageProcessor) -> Make:
        """Return the function that turns an image and its index into a training item; workers pickle it."""

    def evaluation_item(self, processor: BaseImageProcessor) -> EvaluationItem:
        """Return the function that turns an image and its index into an evaluation item, exactly as the processor."""

    def datasets(self, processor: BaseImageProcessor) -> tuple[Dataset, Dataset | None]:
        """Return training images, indexed by the keys of `EpochSampler`, and validation images in order."""
        guard = bad_images(self.args, self.train)
        train = TrainImages(self.train, self.train_item(processor), seed=self.args.seed, bad_images=guard)
        if self.validation is None:
            return train, None
        guard = bad_images(self.args, self.validation)
        return train, EvaluationImages(self.validation, self.evaluation_item(processor), bad_images=guard)

    def train_collator(self) -> Callable[[Sequence[Item]], dict[str, Tensor]]:
        """Return the function that collates training items; by default it stacks them."""
        return stack

    # Loss and metrics.

    def loss(self, model: nn.Module, batch: dict[str, Tensor], *, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the outputs of one batch; in evaluation `logits` may hold the prediction instead."""

    def reduce(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Reduce predictions to the smallest form that the metrics need, before they are gathered."""
        return logits

    def start_metrics(self) -> None:
        """Reset the metrics; called before every evaluation."""

    def update_metrics(self, predictions: Tensor, labels: Tensor) -> None:
        """Add one batch, gathered from all processes."""

    def compute_metrics(self) -> dict[str, float]:
        """Return the metrics after the last batch; Trainer prepends "eval_" to their names."""

    # The result.

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Return 95 % confidence intervals over the validation images for metrics of the last evaluation."""

    def write_panels(self, folder: Path, model: nn.Module, processor: BaseImageProcessor) -> dict[str, str]:
        """Write figures of the last evaluation to the result folder; return their titles by file name."""

    def describe(self) -> dict[str, str]:
        """Return descriptions of the data for the card; by default none."""
        return {}

    def protocol(self) -> tuple[str, str]:
        """Return descriptions of the evaluation protocol and of the intervals."""
