"""Every option of a fine-tuning run, with the names of the example scripts of transformers."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

TASKS = ("image-classification", "semantic-segmentation", "depth-estimation")
MODES = ("full", "lora", "linear")
AUGMENTATIONS = ("none", "crop", "randaugment", "three_augment")
LOSSES = ("cross_entropy", "bce")

# What the best checkpoint is best at, and whether more is better; tasks report it without the "eval_".
METRICS = {
    "image-classification": ("accuracy", True),
    "semantic-segmentation": ("mean_iou", True),
    "depth-estimation": ("abs_rel", False),
}
# What else it may be best at. `iou_` and the name of a class count too.
OTHER_METRICS = {
    "image-classification": ("mean_class_accuracy", "f1", "top5_accuracy", "accuracy_low", "accuracy_high", "loss"),
    "semantic-segmentation": ("mean_accuracy", "overall_accuracy", "loss"),
    "depth-estimation": ("rmse", "delta1", "delta2", "delta3", "loss"),
}
# Of any task; transformers takes everything that does not end in "loss" for better the higher it is.
_LOWER_IS_BETTER = ("loss", "rmse", "abs_rel")

# Rates that worked for ViT-Tiny to ViT-B on a few thousand images; a recipe names its own.
_LEARNING_RATES = {"full": 1e-4, "lora": 1e-3, "linear": 1e-2}


def _field(default: Any, help_text: str, *aliases: str) -> Any:
    metadata: dict[str, Any] = {"help": help_text}
    if aliases:
        metadata["aliases"] = list(aliases)
    return field(default=default, metadata=metadata)


@dataclass
class FinetuningArguments(TrainingArguments):
    """Arguments of a fine-tuning run, on top of those of `transformers.TrainingArguments`.

    Shares lie in [0, 1]. `learning_rate` left out depends on the mode; `metric_for_best_model` on the task.
    """

    # Task, model
    task: str = _field("image-classification", f"What to learn: {', '.join(TASKS)}.")
    model_name_or_path: str | None = _field(
        None,
        "RegViT, run folder of `regvit pretrain` or its backbone/, or any ViT that `regvit convert` reads: folder, "
        "weights file or Hub id. Without it a model of size --preset starts from scratch.",
        "--model",
    )
    preset: str | None = _field(
        None, "Size of a model from scratch: tiny, small, base, large or giant. Not together with a model."
    )
    patch_size: int = _field(16, "Side of a patch in pixels, from scratch only.")
    layerscale_value: float = _field(1e-4, "Initial LayerScale gain, from scratch only. DeiT-III: 1e-4.")
    num_register_tokens: int | None = _field(
        None,
        "Registers to add to a model that has none; they are trained in every mode. Default: those of the model, from "
        "scratch 4.",
    )
    image_size: int | None = _field(
        None, "Side of the square images in pixels, a multiple of the patch. Default: as the model's processor does."
    )
    pooling: str | None = _field(
        None, "What the classifier reads: cls, mean_patch or cls_mean_patch. Default: the model's configuration."
    )

    # What is trained
    mode: str = _field("full", "What is trained: everything (full), low-rank updates (lora) or the head (linear).")
    lora_r: int = _field(8, "Rank of the low-rank updates.")
    lora_alpha: float = _field(16.0, "Scale of the updates times the rank.")
    lora_dropout: float = _field(0.0, "Share of the inputs of an update that is dropped.")
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["qkv", "o_proj"],
        metadata={"help": "Linear layers that get updates: qkv, o_proj, fc1, fc2, gate_up_proj, down_proj."},
    )
    layer_decay: float = _field(1.0, "Factor on the learning rate for every block further from the head. BEiT: 0.65.")
    head_learning_rate_multiplier: float = _field(1.0, "Factor on the learning rate of the head.")
    drop_path_rate: float = _field(0.0, "Share of dropped residual branches, per image, rising linearly with depth.")

    # Data
    data: str | None = _field(
        None,
        "Image folder, parquet file or folder, tar file, Hub data set, 'digits' or 'photos'; a validation part beside "
        "the training part is used, otherwise one is held out. Segmentation, depth: with a column of maps, or images/ "
        "beside masks/ or depth/.",
        "--dataset_name",
    )
    train_dir: str | None = _field(None, "Training images where the parts lie apart; a source like --data.")
    validation_dir: str | None = _field(None, "Validation images; a source like --data, all of it is used.")
    train_val_split: float = _field(0.15, "Share of every class held out where there is no validation part.")
    max_train_samples: int | None = _field(None, "Only so many training images, drawn with the seed.")
    max_eval_samples: int | None = _field(None, "Only so many validation images, drawn with the seed.")
    image_column: str | None = _field(
        None, "Column with the images; default: the only one, or 'image'.", "--image_column_name"
    )
    label_column: str | None = _field(
        None,
        "Column with the class numbers, masks or depth maps; default: 'label' where it holds some, else the only "
        "other column of pictures, 'mask' or 'depth'.",
        "--label_column_name",
    )
    class_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "Segmentation: names by stored value, in order from 0, or one JSON file with a list or a mapping. "
            "Default: classes.json or id2label.json in the folder, else the values themselves."
        },
    )
    ignore_values: list[int] | None = field(
        default=None,
        metadata={"help": "Segmentation: stored values of pixels that do not count. Default: 255."},
    )
    do_reduce_labels: bool = _field(
        False, "Segmentation: 0 does not count, and the first class is stored as 1 (ADE20k)."
    )
    depth_scale: float | None = _field(
        None, "Depth: metres of one stored unit. Default: 0.001 for whole numbers, 1 for fractions."
    )
    max_depth: float = _field(10.0, "Depth: largest depth in metres; what lies farther is not measured.")
    head_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Segmentation, depth: blocks that the head reads, from 0 or negative. Default: the last."},
    )
    ignore_extra_classes: bool = _field(False, "Leave out validation images of classes without training images.")
    max_bad_share: float = _field(
        0.01, "Stop when more than this share of the images seen cannot be used; they are in bad_images.jsonl."
    )

    # Augmentation and loss
    augmentation: str = _field(
        "crop",
        "Of training images: none (as in evaluation), crop (random resized crop, mirrored), randaugment, or "
        "three_augment (DeiT-III: grayscale, solarize or blur).",
    )
    crop_scale: list[float] = field(
        default_factory=lambda: [0.35, 1.0],
        metadata={"help": "Smallest and largest area share of a training crop. ImageNet recipes: 0.08 1.0."},
    )
    flip_probability: float = _field(0.5, "Share of training images that are mirrored; 0 where left and right matter.")
    color_jitter: float = _field(0.0, "Largest relative change of brightness, contrast and saturation. DeiT-III: 0.3.")
    randaugment_num_ops: int = _field(2, "Operations per image of RandAugment.")
    randaugment_magnitude: int = _field(9, "Strength of RandAugment, 0 to 30.")
    random_erasing: float = _field(0.0, "Share of images from which a rectangle is erased. DeiT: 0.25.")
    mixup_alpha: float = _field(0.0, "Mixup between images of a micro-batch; 0 for none. DeiT: 0.8.")
    cutmix_alpha: float = _field(0.0, "CutMix between images of a micro-batch; 0 for none. DeiT: 1.0.")
    mixup_probability: float = _field(1.0, "Share of micro-batches that mixup or CutMix, drawn evenly, changes.")
    repeated_augmentation: int = _field(
        1, "Times each image comes in a row, differently augmented; an epoch then has that much fewer images. DeiT: 3."
    )
    loss: str = _field("cross_entropy", "Of a classifier: cross_entropy, or bce, one yes-no question per class.")
    class_weights: list[str] | None = field(
        default=None,
        metadata={"help": "'balanced' (inverse to the number of images), or one weight per class, in their order."},
    )

    # Stopping, resuming
    early_stopping_patience: int = _field(0, "Evaluations without a better metric before the run stops; 0 for never.")
    early_stopping_threshold: float = _field(0.0, "What counts as better, in units of the metric.")
    allow_batch_change: bool = _field(
        False, "Resume although the images per step differ from the checkpoint's: other steps than the unbroken run's."
    )
    allow_data_change: bool = _field(False, "Resume although the list of images differs from the checkpoint's.")

    # Defaults of Trainer that fine-tuning needs otherwise
    learning_rate: float | None = _field(None, "Peak of the schedule. Default: full 1e-4, lora 1e-3, linear 1e-2.")  # type: ignore[assignment]
    weight_decay: float = _field(0.05, "Decay of matrices; biases, norms, gains, tokens and positions have none.")
    lr_scheduler_type: str = _field("cosine", "Schedule of the learning rate, as in transformers.")
    warmup_steps: float = _field(0.1, "Steps of linear warm-up; below 1 a share of the run.")
    max_grad_norm: float = _field(1.0, "Gradients are clipped to this norm.")
    per_device_train_batch_size: int = _field(32, "Images per process and micro-batch.")
    per_device_eval_batch_size: int = _field(64, "Images per process in evaluation.")
    num_train_epochs: float = _field(5.0, "Passes over the training images.")
    eval_strategy: str = _field("epoch", "When to evaluate: epoch, steps or no.")
    save_strategy: str = _field("epoch", "When to write checkpoints: epoch, steps, best or no.")
    save_total_limit: int | None = _field(2, "Checkpoints to keep, besides the best one.")
    load_best_model_at_end: bool = _field(True, "The result is the best checkpoint, not the last.")
    restore_callback_states_from_checkpoint: bool = _field(True, "A resumed run knows how long it has waited already.")
    logging_steps: float = _field(10, "Steps between log lines.")
    logging_nan_inf_filter: bool = _field(False, "Trainer hides NaN losses by default; a run stops at them.")
    remove_unused_columns: bool = _field(False, "The data sets make exactly what the model takes.")
    dataloader_pin_memory: bool = _field(False, "Pinning needs an accelerator.")
    dataloader_timeout: int = _field(
        600, "Seconds to wait for a batch from a worker before it counts as hung and is started again, once."
    )
    ddp_find_unused_parameters: bool | None = _field(False, "Every trained parameter gets a gradient in every step.")
    hub_strategy: str = _field("end", "When to push: end (the finished folder only), every_save, checkpoint, ...")

    def __post_init__(self) -> None:
        for name, value, known in (
            ("task", self.task, TASKS),
            ("mode", self.mode, MODES),
            ("augmentation", self.augmentation, AUGMENTATIONS),
            ("loss", self.loss, LOSSES),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}.")
        if self.learning_rate is None:
            self.learning_rate = _LEARNING_RATES[self.mode]
        if str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
            if self.early_stopping_patience:
                raise ValueError("early_stopping_patience needs evaluations; set --eval_strategy epoch or steps.")
            self.load_best_model_at_end = False  # without evaluations nothing is best
        evaluated, saved = (str(getattr(s, "value", s)) for s in (self.eval_strategy, self.save_strategy))
        if self.load_best_model_at_end and saved not in (evaluated, "best"):
            raise ValueError(
                f"eval_strategy is '{evaluated}' and save_strategy '{saved}': what is judged has to be saved. Give "
                f"--save_strategy {evaluated} as well, or --load_best_model_at_end false for the last model."
            )
        if self.metric_for_best_model is None:
            self.metric_for_best_model, self.greater_is_better = METRICS[self.task]
        elif self.greater_is_better is None:
            self.greater_is_better = self.metric_for_best_model.removeprefix("eval_") not in _LOWER_IS_BETTER
        super().__post_init__()
        self._check_ranges()
        self.label_names = ["labels"]
        self.batch_eval_metrics = True

    def _check_ranges(self) -> None:
        low, high = (*self.crop_scale, 0.0, 0.0)[:2]
        if len(self.crop_scale) != 2 or not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale is {self.crop_scale}; expected two shares in (0, 1], the smaller one first.")
        for name in ("flip_probability", "random_erasing", "mixup_probability", "label_smoothing_factor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share between 0 and 1.")
        if not 0 < self.train_val_split < 1:
            raise ValueError(f"train_val_split is {self.train_val_split}; expected a share between 0 and 1, as 0.15.")
        if self.repeated_augmentation < 1 or self.lora_r < 1:
            raise ValueError(
                f"repeated_augmentation is {self.repeated_augmentation} and lora_r {self.lora_r}; expected at least 1."
            )
        if self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}; expected a number above 0, 1e9 for no clipping.")
        if self.model_name_or_path is not None and self.preset is not None:
            raise ValueError(
                f"model_name_or_path is '{self.model_name_or_path}' and preset '{self.preset}'; a preset is for a "
                "model from scratch. Leave one of them out."
            )
        if self.data is not None and self.train_dir is not None:
            raise ValueError(f"data is '{self.data}' and train_dir '{self.train_dir}'; expected one of them.")

    @property
    def images_per_step(self) -> int:
        """Images per optimizer step over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    def resolved(self) -> dict[str, Any]:
        """Every fine-tuning argument, and those of Trainer that differ from its defaults, as plain values for YAML."""
        own = set(FinetuningArguments.__annotations__)
        recipe = {}
        for item in dataclasses.fields(self):
            if not item.init or item.name == "hub_token":
                continue
            value = getattr(self, item.name)
            default = item.default if item.default is not dataclasses.MISSING else None
            value, default = getattr(value, "value", value), getattr(default, "value", default)
            if item.name in own or (value != default and isinstance(value, bool | int | float | str | list)):
                recipe[item.name] = value
        return recipe
