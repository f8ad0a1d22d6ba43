"""Every option of a pretraining run, and what follows from them: schedules, backbone, the recipe as YAML."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from transformers import TrainingArguments

from .configuration_regvit import RegViTConfig
from .optimization import Schedules


def _field(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass
class PretrainingArguments(TrainingArguments):
    """Arguments of a pretraining run, on top of those of `transformers.TrainingArguments`.

    Durations called `*_steps` count optimizer steps; a value below 1 is a share of the run, so a recipe keeps its
    shape when the run gets shorter. Defaults are the published ViT-L/16 recipe ("short", ImageNet-1k) unless a help
    text says otherwise.
    """

    # Data and crops
    data: list[str] = field(
        default_factory=lambda: ["photos"],
        metadata={
            "help": "One or more sources: image folder, parquet or tar files (or a folder or pattern of them), Hub "
            "data set, or the embedded sets 'photos' and 'digits'."
        },
    )
    data_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Share of each source in an epoch, in any unit; default: every image once per epoch."},
    )
    streaming: bool = _field(
        False, "Read parquet, tar or Hub data in order instead of copying it to a cache first; needs max_steps."
    )
    image_column: str | None = _field(None, "Column with the images; default: the only one, or 'image'.")
    label_column: str | None = _field(None, "Column with the class numbers; default: 'label' where it holds some.")
    max_bad_share: float = _field(
        0.01, "Stop when more than this share of the images seen cannot be used; they are in bad_images.jsonl."
    )
    global_crop_size: int = _field(
        224, "Side of the two global crops in pixels; a multiple of the patch. Official: 224."
    )
    local_crop_size: int = _field(
        96, "Side of the local crops in pixels; a multiple of the patch. Official: 96 (98 for patch 14)."
    )
    num_local_crops: int = _field(8, "Local crops per image. Official: 8.")
    high_resolution_steps: float = _field(
        0.0, "Last steps, or share of the run, on larger crops; 0 for none. DINOv2: 10,000 steps of 518 pixels."
    )
    high_resolution_size: int = _field(518, "Side of the global crops in these steps, pixels. DINOv2: 518.")
    high_resolution_local_size: int | None = _field(
        None, "Side of the local crops in these steps, pixels; default: as before."
    )
    global_crop_scale: list[float] = field(
        default_factory=lambda: [0.32, 1.0],
        metadata={"help": "Smallest and largest area share of a global crop. Official: 0.32 1.0."},
    )
    local_crop_scale: list[float] = field(
        default_factory=lambda: [0.05, 0.32],
        metadata={"help": "Smallest and largest area share of a local crop. Official: 0.05 0.32."},
    )
    jitter_probability: float = _field(0.8, "Share of crops with colour jitter. Official: 0.8.")
    brightness: float = _field(0.4, "Largest relative change of brightness. Official: 0.4.")
    contrast: float = _field(0.4, "Largest relative change of contrast. Official: 0.4.")
    saturation: float = _field(0.2, "Largest relative change of saturation. Official: 0.2.")
    hue: float = _field(0.1, "Largest hue shift in turns of the colour circle. Official: 0.1.")
    grayscale_probability: float = _field(0.2, "Share of crops turned gray. Official: 0.2.")
    blur: str = _field("as_trained", "Blur probabilities: 'as_trained' (0, 0.9, 0.5) or 'as_written' (1, 0.1, 0.5).")
    blur_kernel_size: int = _field(9, "Taps of the blur, odd; 3 for crops of 32 pixels, 5 for 96. Official: 9.")
    blur_sigma: list[float] = field(
        default_factory=lambda: [0.1, 2.0],
        metadata={"help": "Smallest and largest blur sigma in pixels. Official: 0.1 2.0."},
    )
    solarize_probability: float = _field(0.2, "Share of second global crops that are solarized. Official: 0.2.")
    flip_probability: float = _field(0.5, "Share of crops that are mirrored. DINOv2: 0.5; DINOv3 7B: 0.")
    share_jitter: bool = _field(False, "One colour jitter for all crops of an image. DINOv3's option; DINOv2: no.")
    locals_from_globals: bool = _field(False, "Cut the local crops from the global ones. DINOv3's option; DINOv2: no.")
    mask_ratio: list[float] = field(
        default_factory=lambda: [0.1, 0.5],
        metadata={"help": "Smallest and largest share of masked patches in a masked crop. Official: 0.1 0.5."},
    )
    mask_probability: float = _field(0.5, "Share of the global crops that get a mask. Official: 0.5.")

    evaluation_size: int | None = _field(
        None,
        "Side that the saved image processor resizes and crops to; default: global_crop_size with a margin of 1/7.",
    )

    # Backbone
    preset: str = _field("small", "Backbone size: tiny, small, base, large or giant. Fields below override it.")
    num_register_tokens: int = _field(4, "Register tokens. Source: 'Vision Transformers Need Registers', 4.")
    patch_size: int = _field(16, "Side of a patch in pixels.")
    hidden_size: int | None = _field(None, "Width D; default: the preset's.")
    num_hidden_layers: int | None = _field(None, "Blocks; default: the preset's.")
    num_attention_heads: int | None = _field(None, "Attention heads; default: the preset's.")
    use_swiglu_ffn: bool | None = _field(None, "SwiGLU instead of the MLP; default: the preset's. Official full: yes.")
    layerscale_value: float = _field(
        1e-5, "Initial LayerScale gain. Official: 1e-5; a run of a few hundred steps learnt most from 1."
    )
    register_init_std: float = _field(
        0.02, "Spread of the registers at the start. About 1 keeps them apart in runs of a few hundred steps."
    )
    drop_path_rate: float = _field(0.0, "Share of dropped residual branches. Official: 0.3 (ViT-L short), 0.4 (full).")
    drop_path_mode: str = _field(
        "batch_subset", "'batch_subset' (official, saves the work) or 'sample' (for tiny batches)."
    )

    # Heads
    head_num_prototypes: int = _field(
        65536, "Prototypes K of the DINO head. Official: 65536. Keep K / (2 * batch) below about 32."
    )
    head_hidden_size: int = _field(2048, "Hidden width of the heads. Official: 2048.")
    head_bottleneck_size: int = _field(
        256, "Bottleneck width of the DINO head. Official: 256 (384 in the full recipe)."
    )
    head_num_layers: int = _field(3, "Linear layers of each head before the prototypes. Official: 3.")
    separate_ibot_head: bool = _field(False, "A head of its own for masked patches. Official: no (short), yes (full).")
    ibot_head_num_prototypes: int = _field(65536, "Prototypes of a separate iBOT head. Official full recipe: 131072.")
    ibot_head_bottleneck_size: int = _field(256, "Bottleneck width of a separate iBOT head. Official: 256.")

    # Losses and targets
    dino_loss_weight: float = _field(1.0, "Weight of the DINO terms; 0 switches them off. Official: 1.")
    ibot_loss_weight: float = _field(1.0, "Weight of the masked-patch term; 0 switches it off. Official: 1.")
    koleo_loss_weight: float = _field(
        0.1, "Weight of KoLeo per global crop; set 0 below 16 images per process. Official: 0.1."
    )
    koleo_gathered: bool = _field(False, "KoLeo looks for neighbours in all processes. DINOv3's option; DINOv2: no.")
    koleo_neighbours: int = _field(1, "Nearest neighbours that KoLeo pushes each image away from. Official: 1.")
    gram_loss_weight: float = _field(
        0.0,
        "Weight of Gram anchoring: similarities of patches stay near those of an earlier teacher. For the late part "
        "of a long run, with --init_from. DINOv3: 2; DINOv2: 0.",
    )
    gram_refresh_steps: int = _field(
        10000, "Steps after which the present teacher becomes the one that Gram anchoring holds on to. DINOv3: 10000."
    )
    centering: str = _field("softmax", "Teacher targets: 'softmax' (official short) or 'sinkhorn' (official full).")
    center_momentum: float = _field(0.9, "Share of the old center kept per step. Official: 0.9.")
    student_temperature: float = _field(0.1, "Temperature of the student softmax. Official: 0.1.")
    warmup_teacher_temperature: float = _field(0.04, "Teacher temperature at the start. Official: 0.04.")
    teacher_temperature: float = _field(0.07, "Teacher temperature after its warm-up. Official: 0.07.")
    warmup_teacher_temperature_steps: float = _field(
        0.3, "Steps, or share of the run, of the linear temperature warm-up. Official: 0.3."
    )

    # Optimisation
    learning_rate: float = _field(
        4e-3, "Base learning rate, scaled by sqrt(batch / learning_rate_reference_batch). Official: 4e-3."
    )
    learning_rate_reference_batch: int = _field(
        1024, "Images per step for which learning_rate holds; 0 takes learning_rate as it is. Official: 1024."
    )
    schedule: str = _field(
        "cosine",
        "'cosine' (DINOv2), or 'constant' after the warm-ups (DINOv3): learning rate, weight_decay and "
        "teacher_momentum stay, their *_end and min_* count for nothing, and the run may be made longer later.",
    )
    min_learning_rate: float = _field(1e-6, "Learning rate at the end. Official: 1e-6.")
    warmup_steps: float = _field(
        0.1, "Steps, or share of the run, of the linear learning-rate warm-up. Official: 0.1."
    )
    freeze_last_layer_steps: float = _field(
        0.01, "Steps, or share of the run, with the prototypes' learning rate at 0. Official: 0.01."
    )
    freeze_backbone_steps: float = _field(
        0.0, "Steps, or share of the run, with the backbone's learning rate at 0, for new heads on an old backbone."
    )
    weight_decay: float = _field(0.04, "AdamW weight decay at the start. Official: 0.04.")
    weight_decay_end: float = _field(0.4, "AdamW weight decay at the end. Official: 0.4 (0.2 in the full recipe).")
    teacher_momentum: float = _field(0.992, "EMA momentum at the start. Official: 0.992; 0.9 to 0.99 for short runs.")
    teacher_momentum_end: float = _field(1.0, "EMA momentum at the end. Official: 1.")
    layer_decay: float = _field(
        0.9, "Learning-rate factor per block towards the input. Official: 0.9 (1 in the full recipe)."
    )
    patch_embed_lr_multiplier: float = _field(0.2, "Extra learning-rate factor of the patch embedding. Official: 0.2.")
    max_grad_norm: float = _field(
        3.0, "Largest gradient norm, for backbone and each head separately; 0 for none. Official: 3."
    )

    # Seeing that it works
    monitor_steps: float = _field(
        0.025,
        "Steps between measurements of collapse, registers and outliers on 64 images; below 1 a share of the run, 20 "
        "to 100 steps; 0 for never.",
    )
    knn_steps: float = _field(
        0.25,
        "Steps between k-NN accuracies on the labelled 'validation' part of the data or, where there is none, on a "
        "quarter of the labelled training images; below 1 a share of the run, 200 to 5000 steps; 0 for never.",
    )
    knn_max_images: int = _field(1000, "Images for k-NN, three quarters of them as neighbours.")
    linear_probe: bool = _field(False, "Also a linear classifier on the features that k-NN reads.")
    panel_steps: float = _field(
        0.25,
        "Steps between pictures of PCA and attention on the same 8 images; below 1 a share of the run, at most 5000 "
        "steps; 0 for never.",
    )
    panel_size: int | None = _field(None, "Side of these images in pixels; default: global_crop_size.")
    stop_on_collapse: bool = _field(
        False,
        "Stop where an alarm of collapse goes off. By default it warns: its thresholds are a judgement, and a false "
        "one must not cost a night. NaN always stops.",
    )

    # Stops and starts
    init_from: str | None = _field(
        None,
        "Start from a run folder (with its heads and centers), a RegViT, or any ViT that `regvit convert` reads; adds "
        "registers to a model without.",
    )
    allow_batch_change: bool = _field(
        False, "Resume although the images per step differ from the checkpoint's: other steps than the unbroken run's."
    )
    allow_data_change: bool = _field(False, "Resume although the list of images differs from the checkpoint's.")
    dataloader_timeout: int = _field(
        600, "Seconds to wait for a batch from a worker before it counts as hung and is started again, once."
    )
    ddp_timeout: int = _field(600, "Seconds before a process that waits for another one gives up.")

    # Defaults of Trainer that pretraining needs otherwise
    ddp_find_unused_parameters: bool | None = _field(False, "Every student parameter gets a gradient in every step.")
    ddp_broadcast_buffers: bool | None = _field(False, "The centers are the same on all processes already.")
    ignore_data_skip: bool = _field(True, "The sampler starts where the checkpoint stopped; nothing is skipped.")
    per_device_train_batch_size: int = _field(64, "Images per process and micro-batch. Official: 64.")
    logging_steps: float = _field(10, "Steps between log lines.")
    logging_nan_inf_filter: bool = _field(False, "Trainer hides NaN losses by default; pretraining stops at them.")
    remove_unused_columns: bool = _field(False, "Multi-crop batches have no columns to remove.")
    dataloader_drop_last: bool = _field(True, "Every batch has the same number of images.")
    dataloader_pin_memory: bool = _field(False, "Pinning needs an accelerator.")
    lr_scheduler_type: str = _field("constant", "The schedules are this package's own, functions of the step.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data = [str(self.data)] if isinstance(self.data, str | Path) else [str(one) for one in self.data]
        for name in ("global_crop_scale", "local_crop_scale", "mask_ratio"):
            value = getattr(self, name)
            if len(value) != 2 or not 0 <= value[0] <= value[1] <= 1:
                raise ValueError(f"{name} is {value}; expected two shares between 0 and 1, the smaller one first.")
        if len(self.blur_sigma) != 2 or not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur_sigma is {self.blur_sigma}; expected two numbers above 0, the smaller one first.")
        for name in ("teacher_momentum", "teacher_momentum_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 to 1, usually 0.99 and more.")
        for name in ("student_temperature", "warmup_teacher_temperature", "teacher_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; a temperature must be above 0.")
        for name in ("monitor_steps", "knn_steps", "panel_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected steps, a share of the run, or 0: never.")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule is {self.schedule!r}; expected 'cosine' or 'constant'.")
        if (scheduler := getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)) != "constant":
            raise ValueError(
                f"lr_scheduler_type is {scheduler}, which pretraining would not use: its schedules are its own. "
                "Choose one with --schedule (cosine or constant)."
            )
        if self.high_resolution_steps and self.streaming:
            raise ValueError(
                "high_resolution_steps needs data with a length, and streaming has none. Start a second run on larger "
                "crops with init_from."
            )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns is True; it would drop every crop. Leave it at False.")
        if not str(getattr(self.optim, "value", self.optim)).startswith("adamw_torch"):
            raise ValueError(f"optim is {self.optim}; expected adamw_torch_fused or adamw_torch, as in the recipe.")
        loading = cast(Any, self.accelerator_config)
        if loading.split_batches or loading.dispatch_batches:
            raise ValueError(
                f"accelerator_config has split_batches={loading.split_batches} and dispatch_batches="
                f"{loading.dispatch_batches}; expected neither: the rows of a batch of masks are not its images."
            )
        loading.dispatch_batches = False
        if getattr(self.save_strategy, "value", self.save_strategy) == "best":
            raise ValueError(
                "save_strategy is best, which pretraining, without an evaluation, would never save. Say steps."
            )
        if self.max_steps == 0:
            raise ValueError("max_steps is 0; expected at least 1, or -1 for as many as num_train_epochs gives.")
        if self.gram_refresh_steps < 1:
            raise ValueError(f"gram_refresh_steps is {self.gram_refresh_steps}; expected at least 1 step.")
        if self.koleo_loss_weight and self.per_device_train_batch_size < 2:
            raise ValueError("KoLeo compares images of one batch; with a batch of 1 set koleo_loss_weight=0.")

    @property
    def images_per_step(self) -> int:
        """Images per optimizer step over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    def schedules(self, total_steps: int) -> Schedules:
        """The schedules of a run of `total_steps` optimizer steps."""

        def steps(value: float) -> int:
            return math.ceil(value * total_steps) if value < 1 else int(value)

        reference = self.learning_rate_reference_batch
        learning_rate = self.learning_rate * (math.sqrt(self.images_per_step / reference) if reference else 1.0)
        ends = (self.min_learning_rate, self.weight_decay_end, self.teacher_momentum_end)
        if self.schedule == "constant":  # a cosine that ends where it starts
            ends = (learning_rate, self.weight_decay, self.teacher_momentum)
        return Schedules(
            total_steps=total_steps,
            learning_rate=learning_rate,
            min_learning_rate=ends[0],
            warmup_steps=steps(self.warmup_steps),
            freeze_last_layer_steps=steps(self.freeze_last_layer_steps),
            weight_decay=self.weight_decay,
            weight_decay_end=ends[1],
            teacher_momentum=self.teacher_momentum,
            teacher_momentum_end=ends[2],
            warmup_teacher_temperature=self.warmup_teacher_temperature,
            teacher_temperature=self.teacher_temperature,
            warmup_teacher_temperature_steps=steps(self.warmup_teacher_temperature_steps),
            freeze_backbone_steps=steps(self.freeze_backbone_steps),
        )

    def first_high_resolution_step(self, total_steps: int) -> int:
        """0-based step from which the crops are larger; `total_steps` where they never are."""
        value = self.high_resolution_steps
        return total_steps - (math.ceil(value * total_steps) if value < 1 else min(int(value), total_steps))

    def backbone_config(self) -> RegViTConfig:
        """Configuration of the backbone that the fields above describe."""
        overrides = {
            name: getattr(self, name)
            for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "use_swiglu_ffn")
            if getattr(self, name) is not None
        }
        return RegViTConfig.from_preset(
            self.preset,
            num_register_tokens=self.num_register_tokens,
            image_size=self.global_crop_size,
            patch_size=self.patch_size,
            layerscale_value=self.layerscale_value,
            register_init_std=self.register_init_std,
            drop_path_rate=self.drop_path_rate,
            drop_path_mode=self.drop_path_mode,
            use_mask_token=True,
            **overrides,
        )

    def resolved(self) -> dict[str, Any]:
        """Every pretraining argument, and those of Trainer that differ from its defaults, as plain values for YAML."""
        own = set(PretrainingArguments.__annotations__)
        recipe = {}
        for item in dataclasses.fields(self):
            if not item.init or item.name == "hub_token":  # the recipe is written to files
                continue
            value = getattr(self, item.name)
            default = item.default if item.default is not dataclasses.MISSING else None
            value, default = getattr(value, "value", value), getattr(default, "value", default)
            if item.name in own or (value != default and isinstance(value, bool | int | float | str | list)):
                recipe[item.name] = value
        return recipe
