"""Options of a pretraining run, and the schedules, backbone configuration and YAML recipe derived from them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..evaluation.image_tasks import option
from ..models.configuration_regvit import RegViTConfig
from ..models.loading import TRAINING
from ..training.arguments import LoraArguments, plain
from .schedules import Schedules

MODES = ("full", "lora", "last_blocks")
# Defaults from scratch (the published recipe) and with --init_from. Sources: docs/papers.md, "Continued pretraining".
_DEFAULTS = {
    "gram_loss_weight": (0.0, 2.0),
    "gram_refresh_steps": (10000, 0),
    "weight_decay_end": (0.4, 0.04),
    "teacher_momentum": (0.992, 0.998),
}
_LEARNING_RATES = {"full": 1e-4, "lora": 1e-3, "last_blocks": 1e-4}


@dataclass
class PretrainingArguments(LoraArguments):
    """Arguments of a pretraining run, in addition to those of `LoraArguments` and `transformers.TrainingArguments`.

    Some defaults are more careful with `init_from`, which starts from a trained model; help texts name both values.
    Durations named `*_steps` count optimizer steps; a value below 1 is a fraction of the run, so a recipe scales with
    the length of the run. Defaults are the published ViT-L/16 recipe ("short", ImageNet-1k) unless a help text says
    otherwise.
    """

    # Data and crops
    data: list[str] = option(
        ["photos"],
        "Sources: image folder, parquet or tar files (or their folder or pattern), Hub dataset, 'photos' or 'digits'.",
    )
    data_weights: list[float] | None = option(
        None, "Relative weight of each source in an epoch; default: every image once per epoch."
    )
    streaming: bool = option(False, "Read parquet, tar or Hub data in order, without a copy; requires max_steps.")
    global_crop_size: int = option(224, "Side of the global crops in pixels, a multiple of patch_size. Official: 224.")
    local_crop_size: int = option(96, "Side of the local crops in pixels. Official: 96 (98 for patch size 14).")
    num_local_crops: int = option(None, "Number of local crops per image. Default: 8 (official), or 0 with --teacher.")
    high_resolution_steps: float = option(0.0, "Final steps (or share) with larger crops; 0: none. DINOv2: 10,000.")
    high_resolution_size: int = option(518, "Side of the high-resolution global crops in pixels. DINOv2: 518.")
    high_resolution_local_size: int | None = option(
        None, "Side of the high-resolution local crops in pixels; default: local_crop_size."
    )
    global_crop_scale: list[float] = option(
        [0.32, 1.0], "Smallest and largest share of the image area in a global crop. Official: 0.32 1.0."
    )
    local_crop_scale: list[float] = option(
        [0.05, 0.32], "Smallest and largest share of the image area in a local crop. Official: 0.05 0.32."
    )
    jitter_probability: float = option(0.8, "Probability of color jitter per crop. Official: 0.8.")
    brightness: float = option(0.4, "Largest relative change of brightness. Official: 0.4.")
    contrast: float = option(0.4, "Largest relative change of contrast. Official: 0.4.")
    saturation: float = option(0.2, "Largest relative change of saturation. Official: 0.2.")
    hue: float = option(0.1, "Largest hue shift as a fraction of the color circle. Official: 0.1.")
    grayscale_probability: float = option(0.2, "Probability of conversion to grayscale per crop. Official: 0.2.")
    blur: str = option("as_trained", "Blur probabilities: 'as_trained' (0, 0.9, 0.5) or 'as_written' (1, 0.1, 0.5).")
    blur_kernel_size: int = option(9, "Side of the blur kernel in pixels, odd; about 1/20 of the crop. Official: 9.")
    blur_sigma: list[float] = option([0.1, 2.0], "Smallest and largest blur sigma in pixels. Official: 0.1 2.0.")
    solarize_probability: float = option(0.2, "Probability of solarization of the second global crop. Official: 0.2.")
    flip_probability: float = option(0.5, "Probability of a horizontal flip per crop. DINOv2: 0.5; DINOv3 7B: 0.")
    share_jitter: bool = option(False, "Apply one color jitter to all crops of an image. DINOv3 only; DINOv2: False.")
    locals_from_globals: bool = option(False, "Cut local crops out of the global ones. DINOv3 only; DINOv2: False.")
    mask_ratio: list[float] = option([0.1, 0.5], "Range of the masked share of a masked crop. Official: 0.1 0.5.")
    mask_probability: float = option(
        None, "Share of the global crops that are masked. Official: 0.5. Default: 0.5, or 0 with --teacher."
    )

    evaluation_size: int | None = option(
        None, "Side in pixels of the saved image processor; default: global_crop_size, resized with a margin of 1/7."
    )

    # Backbone
    preset: str = option("small", "Backbone size: tiny, small, base, large or giant. The options below override it.")
    num_register_tokens: int = option(4, "Number of registers. 'Vision Transformers Need Registers' recommends 4.")
    patch_size: int = option(16, "Side of a patch in pixels.")
    position: str | None = option(
        None,
        "Positions of the patches: 'learned' (DINOv2) or 'rotary' (DINOv3); default: learned, or as in init_from.",
    )
    pos_embed_rescale: float | None = option(
        None, "Largest factor by which rotary coordinates are scaled at random in training. DINOv3: 2."
    )
    hidden_size: int | None = option(None, "Width D of the tokens; default: set by the preset.")
    num_hidden_layers: int | None = option(None, "Number of blocks; default: set by the preset.")
    num_attention_heads: int | None = option(None, "Number of attention heads; default: set by the preset.")
    use_swiglu_ffn: bool | None = option(None, "SwiGLU instead of the MLP; default: by preset. Official full: True.")
    layerscale_value: float = option(1e-5, "Initial LayerScale gain; 1 for a few hundred steps. Official: 1e-5.")
    register_init_std: float = option(0.02, "Initial spread of the registers; about 1 for a few hundred steps.")
    drop_path_rate: float = option(0.0, "Share of residual branches to drop. Official: 0.3 (ViT-L short), 0.4 (full).")
    drop_path_mode: str = option("batch_subset", "'batch_subset' (official, fast) or 'sample' (for tiny batches).")

    # Heads
    head_num_prototypes: int = option(
        65536, "Prototypes K of the DINO head, below 64 times the batch. Official: 65536."
    )
    head_hidden_size: int = option(2048, "Hidden width of the heads. Official: 2048.")
    head_bottleneck_size: int = option(256, "Bottleneck width of the DINO head. Official: 256 (full recipe: 384).")
    head_num_layers: int = option(3, "Number of linear layers of each head before the prototypes. Official: 3.")
    separate_ibot_head: bool = option(False, "Separate head for masked patches. Official: False (short), True (full).")
    ibot_head_num_prototypes: int = option(65536, "Prototypes of a separate iBOT head. Official full recipe: 131072.")
    ibot_head_bottleneck_size: int = option(256, "Bottleneck width of a separate iBOT head. Official: 256.")

    # Frozen teachers, whose features replace the losses and targets below
    teacher: list[str] = option(
        [], "Frozen models of any family: the student learns their CLS token and patches instead of its own targets."
    )
    teacher_image_size: int | None = option(
        None, "Side of the global crops for the teachers, in pixels; default: as many patches as the student has."
    )
    teacher_cls_weight: float = option(1.0, "Weight of the teachers' CLS token.")
    teacher_patch_weight: float = option(1.0, "Weight of the teachers' patches.")

    # Losses and targets
    dino_loss_weight: float = option(1.0, "Weight of the DINO terms; 0 disables them. Official: 1.")
    ibot_loss_weight: float = option(1.0, "Weight of the iBOT term; 0 disables it. Official: 1.")
    ibot_visible_patches: bool = option(
        False, "Apply the iBOT term to the visible patches of the global crops, too. TIPSv2: True; DINOv2: False."
    )
    koleo_loss_weight: float = option(0.1, "Weight of KoLeo, per crop; 0 below 16 images per process. Official: 0.1.")
    koleo_gathered: bool = option(False, "Search the KoLeo neighbors in all processes. DINOv3 only; DINOv2: False.")
    koleo_neighbours: int = option(1, "Number of neighbors that KoLeo pushes each image away from. Official: 1.")
    gram_loss_weight: float = option(
        None,
        "Weight of Gram anchoring to the patch similarities of the starting model or an earlier teacher. Default: 0, "
        "or 2 with --init_from. DINOv3: 2; DINOv2: 0.",
    )
    gram_refresh_steps: int = option(
        None,
        "Steps after which Gram anchoring takes the new teacher; 0: never. Default: 10000, as in DINOv3, or 0 with "
        "--init_from.",
    )
    gram_crop_size: int | None = option(
        None,
        "Side in pixels of the global crops for Gram anchoring, whose teacher then sees more detail; default: as the "
        "student. DINOv3: twice the student's.",
    )
    paka_loss_weight: float = option(
        0.0, "Weight of patch kernel alignment (PaKA) with the teacher; 0 disables it. DINOv2: 0."
    )
    centering: str = option("softmax", "Teacher targets: 'softmax' (official short) or 'sinkhorn' (official full).")
    center_momentum: float = option(0.9, "Share of the previous center that is kept per step. Official: 0.9.")
    student_temperature: float = option(0.1, "Temperature of the student softmax. Official: 0.1.")
    warmup_teacher_temperature: float = option(0.04, "Teacher temperature at the start. Official: 0.04.")
    teacher_temperature: float = option(0.07, "Teacher temperature after the warm-up. Official: 0.07.")
    warmup_teacher_temperature_steps: float = option(
        0.3, "Steps (or fraction of the run) of the warm-up of the teacher temperature. Official: 0.3."
    )

    # Optimization
    learning_rate: float = option(
        None,
        "Rate, scaled by sqrt(batch / learning_rate_reference_batch). Default: 4e-3 (official), or with --init_from "
        "1e-4 (lora: 1e-3).",
    )
    learning_rate_reference_batch: int = option(
        1024, "Number of images per step that learning_rate refers to; 0 disables the scaling. Official: 1024."
    )
    schedule: str = option(
        "cosine",
        "'cosine' (DINOv2), or 'constant' (DINOv3): rate, weight decay and momentum stay after the warm-ups, *_end "
        "and min_* are ignored, and the run can be extended.",
    )
    min_learning_rate: float = option(1e-6, "Learning rate at the end. Official: 1e-6.")
    warmup_steps: float = option(0.1, "Steps (or fraction of the run) of the learning-rate warm-up. Official: 0.1.")
    freeze_last_layer_steps: float = option(0.01, "Steps (or share) with frozen prototypes at first. Official: 0.01.")
    freeze_backbone_steps: float = option(
        None,
        "Initial steps (or fraction of the run) with a frozen backbone, until the heads are trained. Default: 0, or "
        "0.1 with --init_from and new heads.",
    )
    weight_decay: float = option(0.04, "AdamW weight decay at the start. Official: 0.04.")
    weight_decay_end: float = option(
        None, "AdamW weight decay at the end. Default: 0.4 (official; full recipe: 0.2), or 0.04 with --init_from."
    )
    teacher_momentum: float = option(
        None,
        "EMA momentum at the start. Default: 0.992 (official), or 0.998 with --init_from; 0.9 to 0.99 for short runs.",
    )
    average_heads_only: bool = option(
        False,
        "Average the heads of the teacher only; its backbone is the student's. TIPSv2: True, with a contrastive loss "
        "that prevents collapse; DINOv2: False.",
    )
    teacher_momentum_end: float = option(1.0, "EMA momentum at the end. Official: 1.")
    layer_decay: float = option(0.9, "Learning-rate factor per block toward the input. Official: 0.9 (full: 1).")
    patch_embed_lr_multiplier: float = option(0.2, "Extra learning-rate factor of the patch embedding. Official: 0.2.")
    max_grad_norm: float = option(3.0, "Largest gradient norm of backbone and heads; 0: no clipping. Official: 3.")

    # Monitoring
    monitor_steps: float = option(
        0.025,
        "Steps between measurements of collapse, registers and outliers on 64 images; 0: none. A fraction of the "
        "run is limited to 20 to 100 steps.",
    )
    knn_steps: float = option(
        0.25,
        "Steps between k-NN evaluations on the labeled validation split, or else on a quarter of the training "
        "images; 0: none. A fraction of the run is limited to 200 to 5000 steps.",
    )
    knn_max_images: int = option(1000, "Largest number of images for k-NN; three quarters of them are neighbors.")
    linear_probe: bool = option(False, "Also fit a linear classifier to the features used by k-NN.")
    panel_steps: float = option(
        0.25, "Steps between panels of PCA and attention of 8 images; 0: none. A fraction is limited to 5000 steps."
    )
    panel_size: int | None = option(None, "Side of the images in the panels, in pixels; default: global_crop_size.")
    stop_on_collapse: bool = option(
        False,
        "Stop the run at a collapse alarm instead of only logging it; its thresholds are heuristic. A loss or "
        "gradient that is NaN always stops the run.",
    )

    # Starting and resuming
    init_from: str | None = option(
        None,
        "Start from a run folder (with its heads and centers), a RegViT, or any ViT that `regvit convert` reads; "
        "registers are added to a model without them.",
    )
    mode: str = option(
        "full",
        "Trained parts of the backbone: all (full), low-rank updates of all blocks (lora), or the last blocks and the "
        "final norm (last_blocks). Heads and added registers are always trained.",
    )
    num_trained_blocks: int = option(4, "Number of blocks that --mode last_blocks trains, counted from the end.")
    ddp_timeout: int = option(600, "Seconds after which a process stops waiting for another process.")

    # Defaults that differ from those of Trainer
    ddp_broadcast_buffers: bool | None = option(False, "Not needed: the centers are identical on all processes.")
    ignore_data_skip: bool = option(True, "The sampler starts at the position of the checkpoint by itself.")
    per_device_train_batch_size: int = option(64, "Number of images per process and micro-batch. Official: 64.")
    dataloader_drop_last: bool = option(True, "Drop the last incomplete batch, so that all batches have equal size.")
    lr_scheduler_type: str = option("constant", "Must stay 'constant': pretraining has its own --schedule.")

    def __post_init__(self) -> None:
        self._expect("mode", self.mode in MODES, f"one of {', '.join(MODES)}")
        self._set_defaults()
        super().__post_init__()
        self.data = [str(self.data)] if isinstance(self.data, str | Path) else [str(one) for one in self.data]
        for name in ("global_crop_scale", "local_crop_scale", "mask_ratio"):
            self._expect_range(name, "two numbers between 0 and 1, the smaller one first", at_most=1)
        self._expect_range("blur_sigma", "two numbers above 0, the smaller one first", above=0)
        probabilities = [f"{what}_probability" for what in ("mask", "jitter", "grayscale", "solarize", "flip")]
        for name in ("teacher_momentum", "teacher_momentum_end", "center_momentum", "drop_path_rate", *probabilities):
            self._expect(name, 0 <= getattr(self, name) <= 1, "a number from 0 to 1")
        for name in ("student_temperature", "warmup_teacher_temperature", "teacher_temperature"):
            self._expect(name, getattr(self, name) > 0, "a temperature above 0")
        for name in ("monitor_steps", "knn_steps", "panel_steps"):
            self._expect(
                name, getattr(self, name) >= 0, "a number of steps, a fraction of the run, or 0 to disable it"
            )
        self._expect("position", self.position in (None, "learned", "rotary"), "'learned' or 'rotary'")
        applies = self.pos_embed_rescale is None or self.position == "rotary" or self.init_from is not None
        self._expect("pos_embed_rescale", applies, "no value without --position rotary")
        self._expect("schedule", self.schedule in ("cosine", "constant"), "'cosine' or 'constant'")
        self._expect(
            "lr_scheduler_type",
            plain(self.lr_scheduler_type) == "constant",
            "'constant', because pretraining has its own schedules: choose --schedule cosine or --schedule constant",
        )
        if self.high_resolution_steps and self.streaming:
            raise ValueError(
                f"high_resolution_steps is {self.high_resolution_steps}, but it requires a dataset with a length and "
                "streaming has none. Set it to 0, then start a second run on larger crops with init_from."
            )
        self._expect("remove_unused_columns", not self.remove_unused_columns, "False: True would drop every crop")
        self._expect("optim", str(plain(self.optim)).startswith("adamw_torch"), "adamw_torch_fused or adamw_torch")
        loading = cast(Any, self.accelerator_config)
        if loading.split_batches or loading.dispatch_batches:
            raise ValueError(
                f"accelerator_config has split_batches={loading.split_batches} and dispatch_batches="
                f"{loading.dispatch_batches}; set both to False, because the rows of a batch of masks do not "
                "correspond to its images."
            )
        loading.dispatch_batches = False
        self._expect(
            "save_strategy",
            plain(self.save_strategy) != "best",
            "'steps': pretraining has no evaluation, so 'best' would never save a checkpoint",
        )
        self._expect("max_steps", self.max_steps != 0, "at least 1, or -1 to derive it from num_train_epochs")
        for name in ("gram_loss_weight", "paka_loss_weight"):
            self._expect(name, not (self.teacher and getattr(self, name)), "0 with --teacher")
        for name in ("ibot_visible_patches", "average_heads_only"):
            self._expect(name, not (self.teacher and getattr(self, name)), "False with --teacher")
        applies = bool(self.ibot_loss_weight) or not self.ibot_visible_patches
        self._expect("ibot_visible_patches", applies, "False with --ibot_loss_weight 0")
        self._expect(
            "teacher_image_size", bool(self.teacher) or not self.teacher_image_size, "no value without --teacher"
        )
        self._expect(
            "gram_crop_size",
            bool(self.gram_loss_weight) or not self.gram_crop_size,
            "no value without --gram_loss_weight",
        )
        self._expect("gram_refresh_steps", self.gram_refresh_steps >= 0, "at least 1, or 0 for never")
        for name in ("num_trained_blocks", "lora_r"):
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        if self.koleo_loss_weight and not self.teacher and self.per_device_train_batch_size < 2:
            raise ValueError(
                f"per_device_train_batch_size is {self.per_device_train_batch_size}, but KoLeo compares the images of "
                "a batch and needs at least 2. Raise it or set koleo_loss_weight=0."
            )

    def _set_defaults(self) -> None:
        """Set the options that were not given and whose default depends on the start of the run."""
        continued = self.init_from is not None
        defaults = {name: values[continued] for name, values in _DEFAULTS.items()}
        defaults["learning_rate"] = _LEARNING_RATES[self.mode] if continued else 4e-3
        has_heads = continued and Path(str(self.init_from), TRAINING, "student.safetensors").is_file()
        defaults["freeze_backbone_steps"] = 0.1 if continued and not has_heads else 0.0
        defaults |= {"num_local_crops": 8, "mask_probability": 0.5}
        if self.teacher:
            defaults |= {"num_local_crops": 0, "mask_probability": 0.0, "gram_loss_weight": 0.0}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def schedules(self, total_steps: int) -> Schedules:
        """Return the schedules of a run of `total_steps` optimizer steps."""

        def steps(value: float) -> int:
            return math.ceil(value * total_steps) if value < 1 else int(value)

        reference = self.learning_rate_reference_batch
        learning_rate = self.learning_rate * (math.sqrt(self.images_per_step / reference) if reference else 1.0)
        ends = (self.min_learning_rate, self.weight_decay_end, self.teacher_momentum_end)
        if self.schedule == "constant":  # expressed as a cosine whose end equals its start
            ends = (learning_rate, self.weight_decay, self.teacher_momentum)
        durations = ("warmup_steps", "freeze_last_layer_steps", "freeze_backbone_steps")
        return Schedules(
            total_steps=total_steps,
            learning_rate=learning_rate,
            min_learning_rate=ends[0],
            weight_decay_end=ends[1],
            teacher_momentum_end=ends[2],
            warmup_teacher_temperature_steps=steps(self.warmup_teacher_temperature_steps),
            **{name: steps(value) for name, value in self.subset(*durations).items()},
            **self.subset("weight_decay", "teacher_momentum", "warmup_teacher_temperature", "teacher_temperature"),
        )

    def first_high_resolution_step(self, total_steps: int) -> int:
        """Return the 0-based step at which the larger crops begin; `total_steps` if there are none."""
        value = self.high_resolution_steps
        return total_steps - (math.ceil(value * total_steps) if value < 1 else min(int(value), total_steps))

    def backbone_config(self) -> RegViTConfig:
        """Return the backbone configuration that the arguments describe."""
        sizes = self.subset("hidden_size", "num_hidden_layers", "num_attention_heads", "use_swiglu_ffn")
        # The fields of DINOv3: without a table, and without a key bias, which rotated keys would learn.
        rotary = {"use_position_embeddings": False, "rope_theta": 100.0, "key_bias": False}
        rotary |= self.subset("pos_embed_rescale")
        return RegViTConfig.from_preset(
            self.preset,
            image_size=self.global_crop_size,
            use_mask_token=True,
            **self.subset("num_register_tokens", "patch_size", "layerscale_value", "register_init_std"),
            **self.subset("drop_path_rate", "drop_path_mode"),
            **{name: value for name, value in sizes.items() if value is not None},
            **(rotary if self.position == "rotary" else {}),
        )
