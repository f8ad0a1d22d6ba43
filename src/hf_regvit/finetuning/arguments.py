"""Arguments of a fine-tuning run, named as in the example scripts of transformers."""

from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from ..evaluation.image_tasks import option
from ..training.arguments import LoraArguments, plain


class TaskEntry(NamedTuple):
    """Entry of a task in the table `TASKS`.

    Attributes:
        module: Module of this package with the class, imported on demand.
        class_name: Class with the base `tasks.Task`.
        kind: Kind of target that `open_parts` opens: classes, masks or depth.
        metrics: Metrics that may select the best checkpoint besides the loss; the first does so by default.
        lower_is_better: Metrics among these of which the lowest value is the best.
    """

    module: str
    class_name: str
    kind: Literal["classes", "masks", "depth"]
    metrics: tuple[str, ...]
    lower_is_better: tuple[str, ...] = ()


# A metric may also be `iou_` followed by a class name.
TASKS = {
    "image-classification": TaskEntry(
        "classification",
        "ImageClassification",
        "classes",
        ("accuracy", "mean_class_accuracy", "f1", "top5_accuracy", "accuracy_low", "accuracy_high"),
    ),
    "semantic-segmentation": TaskEntry(
        "dense", "SemanticSegmentation", "masks", ("mean_iou", "mean_accuracy", "overall_accuracy")
    ),
    "depth-estimation": TaskEntry(
        "dense",
        "DepthEstimation",
        "depth",
        ("abs_rel", "rmse", "delta1", "delta2", "delta3"),
        lower_is_better=("abs_rel", "rmse"),
    ),
}
MODES = ("full", "lora", "linear")
AUGMENTATIONS = ("none", "crop", "randaugment", "three_augment")
LOSSES = ("cross_entropy", "bce")

# Metrics of any task. transformers would assume that higher is better for every name that does not end in "loss".
_LOWER_IS_BETTER = {"loss", *(name for task in TASKS.values() for name in task.lower_is_better)}

# Learning rates that worked for ViT-Tiny to ViT-B on a few thousand images; recipes set their own.
_LEARNING_RATES = {"full": 1e-4, "lora": 1e-3, "linear": 1e-2}


@dataclass
class FinetuningArguments(LoraArguments):
    """Arguments of a fine-tuning run, in addition to those of `LoraArguments` and `transformers.TrainingArguments`.

    `model` is another name of `model_name_or_path`. Shares and probabilities lie in [0, 1]. The default of
    `learning_rate` depends on the mode, that of `metric_for_best_model` on the task.
    """

    # Task, model
    task: str = option("image-classification", f"Task to train for: {', '.join(TASKS)}.")
    model_name_or_path: str | None = option(
        None,
        "Model to start from: a RegViT, a run of `regvit pretrain`, or any ViT that `regvit convert` reads, as a "
        "folder, weights file or Hub id. Without it, --preset is trained from scratch.",
        "--model",
    )
    preset: str | None = option(
        None, "Size of a model from scratch, without --model: tiny, small, base, large, giant."
    )
    patch_size: int = option(16, "Side of a patch in pixels, only for a model from scratch.")
    layerscale_value: float = option(1e-4, "Initial LayerScale gain, only for a model from scratch. DeiT-III: 1e-4.")
    num_register_tokens: int | None = option(
        None,
        "Registers to add to a model without registers, trained in every mode. Default: its own, or 4 from scratch.",
    )
    image_size: int | None = option(
        None, "Side of the square images in pixels, a multiple of the patch size. Default: that of the processor."
    )
    pooling: str | None = option(None, "Classifier input: cls, mean_patch or cls_mean_patch. Default: as saved.")

    # Trained parameters
    mode: str = option("full", "Trained parameters: all (full), low-rank updates and head (lora), head only (linear).")
    layer_decay: float = option(1.0, "Learning rate factor for each block further from the head. BEiT: 0.65.")
    head_learning_rate_multiplier: float = option(1.0, "Learning rate factor of the head.")
    drop_path_rate: float = option(0.0, "Drop path rate of the last block, per image; it rises linearly with depth.")

    # Data
    data: str | None = option(
        None,
        "Labeled images: folder, parquet, tar, Hub data set, 'digits' or 'photos'; without a validation split, one "
        "is held out. Masks and depth: a column of maps, or images/ beside masks/ or depth/.",
        "--dataset_name",
    )
    train_dir: str | None = option(None, "Training images stored separately; same formats as --data, in place of it.")
    validation_dir: str | None = option(None, "Validation images; same formats as --data. All images are used.")
    train_val_split: float = option(0.15, "Share of every class to hold out if there is no validation split.")
    max_train_samples: int | None = option(None, "Maximum number of training images, sampled with the seed.")
    max_eval_samples: int | None = option(None, "Maximum number of validation images, sampled with the seed.")
    class_names: list[str] | None = option(
        None,
        "Segmentation: class names in the order of the stored values, or one JSON file with a list or mapping. "
        "Default: classes.json or id2label.json in the folder, else the values.",
    )
    ignore_values: list[int] | None = option(None, "Segmentation: stored mask values to ignore. Default: 255.")
    do_reduce_labels: bool = option(False, "Segmentation: whether 0 is ignored and the first class is 1 (ADE20k).")
    depth_scale: float | None = option(None, "Depth: meters per stored unit. Default: 0.001 for integers, else 1.")
    max_depth: float = option(10.0, "Depth: maximum depth in meters; pixels beyond it are ignored.")
    head_layers: list[int] | None = option(
        None, "Segmentation, depth: blocks that the head reads, counted from 0, or negative. Default: the last."
    )
    ignore_extra_classes: bool = option(False, "Whether to ignore validation images (or pixels) of untrained classes.")

    # Augmentation and loss
    augmentation: str = option(
        "crop",
        "Training images: none (as in evaluation), crop (random resized crop and flip), randaugment, or "
        "three_augment (DeiT-III: grayscale, solarize or blur).",
    )
    crop_scale: list[float] = option([0.35, 1.0], "Range of the area share of a training crop. ImageNet: 0.08 1.0.")
    flip_probability: float = option(0.5, "Probability of a horizontal flip; use 0 if left and right carry meaning.")
    color_jitter: float = option(0.0, "Maximum relative change of brightness, contrast and saturation. DeiT-III: 0.3.")
    randaugment_num_ops: int = option(2, "Number of RandAugment operations per image.")
    randaugment_magnitude: int = option(9, "Strength of RandAugment, 0 to 30.")
    random_erasing: float = option(0.0, "Probability of erasing a random rectangle of an image. DeiT: 0.25.")
    mixup_alpha: float = option(0.0, "Alpha of mixup within a micro-batch; 0 disables it. DeiT: 0.8.")
    cutmix_alpha: float = option(0.0, "Alpha of CutMix within a micro-batch; 0 disables it. DeiT: 1.0.")
    mixup_probability: float = option(1.0, "Probability of mixing a micro-batch; mixup and CutMix are equally likely.")
    repeated_augmentation: int = option(
        1, "Consecutive, differently augmented copies of each image, in epochs of the same length. DeiT: 3."
    )
    loss: str = option("cross_entropy", "Loss of a classifier: cross_entropy or bce (binary cross-entropy).")
    class_weights: list[str] | None = option(
        None, "'balanced' (inverse to the number of images or pixels), or one number per class, in class order."
    )

    # Stopping, resuming
    early_stopping_patience: int = option(0, "Evaluations without improvement before the run stops; 0 disables it.")
    early_stopping_threshold: float = option(0.0, "Minimum improvement that counts, in units of the metric.")

    # Arguments of Trainer with other defaults for fine-tuning
    learning_rate: float | None = option(None, "Peak learning rate. Default: full 1e-4, lora 1e-3, linear 1e-2.")  # type: ignore[assignment]
    weight_decay: float = option(0.05, "Weight decay of matrices; biases, norms, gains and tokens have none.")
    lr_scheduler_type: str = option("cosine", "Learning rate schedule, as in transformers.")
    warmup_steps: float = option(0.1, "Number of linear warm-up steps; a value below 1 is a share of the run.")
    max_grad_norm: float = option(1.0, "Maximum gradient norm for clipping.")
    per_device_train_batch_size: int = option(32, "Number of training images per process and micro-batch.")
    per_device_eval_batch_size: int = option(64, "Number of evaluation images per process and batch.")
    num_train_epochs: float = option(5.0, "Number of passes over the training images.")
    eval_strategy: str = option("epoch", "Times of evaluations: epoch, steps or no.")
    save_strategy: str = option("epoch", "Times of checkpoints: epoch, steps, best or no.")
    save_total_limit: int | None = option(2, "Maximum number of checkpoints to keep; the best one is always kept.")
    load_best_model_at_end: bool = option(True, "Keep the best checkpoint as the result instead of the last.")
    restore_callback_states_from_checkpoint: bool = option(True, "Continue the counts of early stopping.")
    hub_strategy: str = option("end", "Times of pushes: end (only the finished folder), every_save, checkpoint, ...")

    model: InitVar[str | Path | None] = None

    def __post_init__(self, model: str | Path | None) -> None:
        if model is not None:
            if self.model_name_or_path is not None:
                raise ValueError(
                    f"model is '{model}' and model_name_or_path is '{self.model_name_or_path}'. Give one."
                )
            self.model_name_or_path = str(model)
        for name in ("model_name_or_path", "data", "train_dir", "validation_dir"):
            if isinstance(path := getattr(self, name), Path):
                setattr(self, name, str(path))
        for name, known in (("task", TASKS), ("mode", MODES), ("augmentation", AUGMENTATIONS), ("loss", LOSSES)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} is {value!r}. Choose from {', '.join(known)}.")
        if self.learning_rate is None:
            self.learning_rate = _LEARNING_RATES[self.mode]
        evaluated, saved = plain(self.eval_strategy), plain(self.save_strategy)
        if evaluated == "no":
            if self.early_stopping_patience:
                raise ValueError("early_stopping_patience requires evaluations. Set --eval_strategy epoch or steps.")
            self.load_best_model_at_end = False  # without evaluations there is no best checkpoint
        if self.load_best_model_at_end and saved not in (evaluated, "best"):
            raise ValueError(
                f"eval_strategy is '{evaluated}' and save_strategy is '{saved}', but the best checkpoint can only be "
                f"loaded if every evaluated model is saved. Set --save_strategy {evaluated}, or "
                "--load_best_model_at_end false to keep the last model."
            )
        if self.metric_for_best_model is None:
            self.metric_for_best_model, self.greater_is_better = TASKS[self.task].metrics[0], None
        if self.greater_is_better is None:
            self.greater_is_better = self.metric_for_best_model.removeprefix("eval_") not in _LOWER_IS_BETTER
        super().__post_init__()
        self._check_ranges()
        self.label_names = ["labels"]
        self.batch_eval_metrics = True

    def _check_ranges(self) -> None:
        self._expect_range("crop_scale", "two shares in (0, 1], the smaller one first", above=0, at_most=1)
        for name in ("flip_probability", "random_erasing", "mixup_probability", "label_smoothing_factor"):
            self._expect(name, 0 <= getattr(self, name) <= 1, "a value between 0 and 1")
        self._expect("train_val_split", 0 < self.train_val_split < 1, "a share between 0 and 1, such as 0.15")
        for name in ("repeated_augmentation", "lora_r"):
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        self._expect("max_grad_norm", self.max_grad_norm > 0, "a number above 0; 1e9 disables clipping")
        if self.model_name_or_path is not None and self.preset is not None:
            raise ValueError(
                f"model_name_or_path is '{self.model_name_or_path}' and preset is '{self.preset}', but a preset is "
                "only for a model from scratch. Leave one of them out."
            )
        if self.data is not None and self.train_dir is not None:
            raise ValueError(f"data is '{self.data}' and train_dir is '{self.train_dir}'. Give only one of them.")
