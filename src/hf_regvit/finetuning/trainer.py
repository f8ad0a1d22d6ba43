"""The Trainer of fine-tuning: optimizer groups, the step of a task, the best model."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback
from transformers.image_processing_utils import BaseImageProcessor

from ..hub.facts import finetuning_facts, public_recipe
from ..models.manifest import STATE, WEIGHTS, verify_checkpoint
from ..models.modeling_regvit import RegViTPreTrainedModel
from ..training.callbacks import TrainingProgress
from ..training.distributed import from_first
from ..training.finite import without_ids
from ..training.parameter_groups import group_parameters, parameter_rules
from ..training.samplers import EpochSampler
from ..training.trainer import RunTrainer
from .arguments import FinetuningArguments
from .data import fingerprint, stack
from .model import whole_model
from .tasks import Task

logger = logging.getLogger(__name__)

_TOKENS = ("position_embeddings", "cls_token", "register_tokens", "mask_token")


class FinetuningTrainer(RunTrainer):
    """`RunTrainer` for a `Task`, with its loss and metrics.

    Args:
        model: Model to train; frozen parameters have `requires_grad=False`.
        args: Arguments of the run.
        task: Task with its data, loss and metrics.
        processor: Image processor that is saved with the result.
        callbacks: Additional trainer callbacks.
    """

    model: RegViTPreTrainedModel
    args: FinetuningArguments
    image_processor: BaseImageProcessor
    fixed_options = ("task", "mode", "lora_r", "lora_target_modules")

    def __init__(
        self,
        model: RegViTPreTrainedModel,
        args: FinetuningArguments,
        task: Task,
        *,
        processor: BaseImageProcessor,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.task, self.evaluations = task, 0
        train, validation = task.datasets(processor)
        stopping = EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold)
        super().__init__(
            model,
            args,
            train_dataset=train,
            train_collator=task.train_collator(),
            sampler=EpochSampler(
                len(task.train), repeats=args.repeated_augmentation, **args.subset("seed", "images_per_step")
            ),
            names=task.train.ids,
            callbacks=[*([stopping] if args.early_stopping_patience else []), *callbacks],
            progress=TrainingProgress(metric=str(args.metric_for_best_model)),
            image_processor=processor,
            eval_dataset=validation,
            data_collator=stack,
            compute_metrics=self._measure,
            preprocess_logits_for_metrics=task.reduce,
        )

    def _measure(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        self.task.update_metrics(prediction.predictions, prediction.label_ids)
        return self.task.compute_metrics() if compute_result else {}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as Trainer does, with the metrics of the task."""
        self.task.start_metrics()
        self.evaluations += 1
        return super().evaluate(*args, **kwargs)

    # The step.

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return one group per pair of multipliers; the schedule scales each rate."""
        return optimizer_groups(self.model, self.args)

    def _get_learning_rate(self) -> float:
        # Trainer would log the first group, which has the smallest rate under layer-wise decay.
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the task's loss; `FiniteGuard` checks once per step over all processes that it is finite."""
        loss, outputs = self.task.loss(model, without_ids(inputs), training=self.model.training)
        if self.model.training:
            self.guard.see_batch(inputs.get("sample_ids"), inputs.get("epochs"), {"loss": loss})
        return (loss, outputs) if return_outputs else loss

    # Pushes publish the merged model, as at the end of the run.

    def hub_model(self, state: Mapping[str, Tensor]) -> PreTrainedModel:
        """Return the model of a checkpoint with low-rank updates merged, so that it loads without peft."""
        return whole_model(state, self.model, self.task, self.args)

    def hub_facts(self) -> dict[str, Any]:
        """Return the recipe for the model card."""
        return finetuning_facts(public_recipe(self.args.resolved()))

    # Best model and resuming.

    def _load_best_model(self) -> None:
        """Load the best checkpoint as a resumed run would: verified, with every tensor, on every process.

        Trainer's own implementation only logs missing tensors, and only process 0 knows the folder.
        """
        best, problem = from_first((self.state.best_model_checkpoint, self.save_problem))
        folder = Path(str(best))
        if not folder.is_dir():
            raise FileNotFoundError(
                f"The best checkpoint, of step {self.state.best_global_step}, could not be written to {folder} "
                f"({problem or 'it was removed'}). Resume from the last checkpoint in the run folder, or free disk "
                "space and run again."
            )
        logger.info(
            "The result is %s with %s %.4g.", folder.name, self.args.metric_for_best_model, self.state.best_metric
        )
        verify_checkpoint(folder, required=(WEIGHTS, STATE))  # save_only_model leaves no optimizer state
        self._load_from_checkpoint(str(folder), self.model)

    def data_facts(self) -> dict[str, Any]:
        """Return the fingerprints of both splits."""
        parts = {"train": self.task.train, "validation": self.task.validation}
        return {name: fingerprint(part) for name, part in parts.items() if part is not None}


def optimizer_groups(model: RegViTPreTrainedModel, args: FinetuningArguments) -> list[dict[str, Any]]:
    """Group the trained parameters by learning rate and weight decay; only matrices decay.

    Source: layer-wise decay as in BEiT (arXiv 2106.08254); choice of decayed parameters as in timm and DeiT.
    """
    trained = {n.replace("regvit.", "backbone.", 1): p for n, p in model.named_parameters() if p.requires_grad}
    num_layers = model.config.num_hidden_layers
    entries = []
    for name, rule in parameter_rules(trained, num_layers=num_layers, layer_decay=args.layer_decay).items():
        if name.endswith(_TOKENS):
            rule = rule._replace(wd_multiplier=0.0)
        if not name.startswith("backbone."):
            rule = rule._replace(lr_multiplier=rule.lr_multiplier * args.head_learning_rate_multiplier)
        settings = {
            "lr": cast(float, args.learning_rate) * rule.lr_multiplier,
            "weight_decay": args.weight_decay * rule.wd_multiplier,
        }
        entries.append((rule, trained[name], settings))
    return group_parameters(entries)
