"""DINOv2-style self-supervised pretraining of a vision transformer with registers.

`pretrain(args)` runs the complete job. `DinoTrainer` connects `transformers.Trainer` to the two modules that implement
the recipe: `distillation` (student, teacher, heads, losses) and `optimization` (schedules, parameter rules).

Source: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision" (2023), and the released training
code, whose divisors, order of operations and schedules are followed exactly; Darcet et al., "Vision Transformers Need
Registers" (2024) for the registers, which take part in attention in every block but do not enter any loss.
"""

import copy
import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback, set_seed
from transformers.image_processing_utils import BaseImageProcessor

from ..data.augmentation import MultiCrop
from ..data.bad_images import BadImages
from ..data.loading import load_images, stream_images
from ..data.maps import has_masks, without_masks
from ..figures.curves import draw_curves
from ..hub.card import write_card_file
from ..hub.facts import pretraining_facts, public_recipe
from ..models.configuration_regvit import RegViTConfig
from ..models.foreign_weights import BACKBONE
from ..models.loading import TRAINING
from ..models.manifest import whole_checkpoint
from ..models.modeling_regvit import RegViTModel
from ..models.processing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    default_image_processor,
    known_processor,
    statistics_of,
)
from ..models.saving import check_space, num_bytes, read_json, write_json
from ..training.callbacks import MetricsFile, Observer
from ..training.distributed import whole_state
from ..training.finite import NonFiniteError, peak_memory_mib
from ..training.run_folder import BAD_IMAGES, RunRecord, run_environment, run_lock, write_model
from ..training.samplers import EpochSampler
from ..training.trainer import Collator
from .arguments import PretrainingArguments
from .collapse import Alarm, CollapseAlarms, CollapseError
from .comparison import BestTeacher
from .continuation import ADAPTER, choose_trained, write_adapter
from .crops import DinoCollator, MultiCropDataset, MultiCropStream
from .distillation import HeadShape, SelfDistillation
from .feature_distillation import STANDARDIZED_ON, FeatureDistillation, FrozenTeacher
from .monitors import OnlineKNN, observers, sample_pixels
from .network import StudentAndTeacher, tensors_below
from .starting_point import StartingPoint, restore_training, starting_point
from .trainer import EXPORTED, DinoTrainer

logger = logging.getLogger(__name__)


# ---- The job -----------------------------------------------------------------------------------------------------


def pretrain(
    args: PretrainingArguments,
    *,
    model: RegViTConfig | RegViTModel | None = None,
    train_dataset: Dataset | None = None,
    data_collator: Collator | None = None,
    image_processor: BaseImageProcessor | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> RegViTModel:
    """Pretrain a backbone on unlabeled images and return the EMA teacher.

    Writes to `args.output_dir`: `backbone/` (the teacher as a RegViTModel with its image processor and a model card,
    for `AutoModel.from_pretrained`), `training/` (student, heads and centers as safetensors, for continued
    pretraining), `metrics.jsonl`, `panels/`, `curves.png`, `resolved_recipe.yaml` (all arguments, readable as a
    recipe), `environment.json`, `report.json` and the checkpoints of Trainer. A run that was stopped by an alarm
    writes everything except `backbone/` and `training/`.

    Args:
        args: Arguments of the run. `resume_from_checkpoint` is a checkpoint folder, or `"last"` for the newest valid
            checkpoint in `output_dir`, if there is one.
        model: Configuration of the backbone, or a backbone to continue from (copied, not modified); default: the
            backbone that `args` describe.
        train_dataset: Dataset indexed by `(epoch, index)` whose items hold `global_crops` (2, 3, S, S), `local_crops`
            (L, 3, s, s), `sample_id` and `epoch`; default: multi-crop views of `args.data`.
        data_collator: Function from a list of such items to the arguments of `SelfDistillation.forward`; default:
            stacks the items and draws block masks.
        image_processor: Image processor that is saved with the backbone; default: resize, center crop to
            `args.evaluation_size` or `args.global_crop_size`, ImageNet statistics.
        callbacks: Observers, such as `hf_regvit.callbacks.OnlineKNN`.

    Returns:
        The teacher backbone in eval mode.

    Raises:
        ValueError: If arguments contradict each other, or there are fewer images than one step needs.
        NonFiniteError: If a loss or gradient is NaN or infinite.
        CollapseError: If a collapse alarm is raised and `args.stop_on_collapse` is set.
        RunFolderInUseError: If another run uses `output_dir`.
        TrainingInterrupted: If SIGTERM, SIGUSR1 or Ctrl-C arrived; a checkpoint has been saved.
    """
    with run_lock(args):
        trainer, alarms = _build_trainer(args, model, train_dataset, data_collator, image_processor, callbacks)
        _train(trainer, alarms)
        with trainer.writing_result():
            return _write_folder(trainer)


def _build_trainer(
    args: PretrainingArguments,
    model: RegViTConfig | RegViTModel | None,
    train_dataset: Dataset | None,
    data_collator: Collator | None,
    image_processor: BaseImageProcessor | None,
    callbacks: Sequence[TrainerCallback],
) -> tuple[DinoTrainer, CollapseAlarms]:
    set_seed(args.seed)
    start = _starting_point(args, model)
    if image_processor is None:
        image_processor = _image_processor(args, start)
    network = _build_network(
        args,
        start.student if start else model,
        new_registers=bool(start and start.new_registers),
        processor=image_processor,
    )
    if start:
        restore_training(network, start)
    config = network.student_backbone.config
    if train_dataset is None:
        train_dataset = _build_dataset(args, config)
    if isinstance(train_dataset, MultiCropStream) and args.max_steps <= 0:
        raise ValueError(
            f"max_steps is {args.max_steps}, but a stream has no length, so epochs cannot end the run. Set "
            "--max_steps to at least 1."
        )
    if isinstance(network, FeatureDistillation):
        size = args.global_crop_size
        network.standardize(sample_pixels(train_dataset, STANDARDIZED_ON, image_processor=image_processor, size=size))
    if data_collator is None:
        data_collator = _build_collator(args, config, args.global_crop_size, image_processor)
    high_resolution = _enlarged(args, config, train_dataset, image_processor) if args.high_resolution_steps else None
    output = args.folder
    started_from = network.whole_teacher_backbone() if start else None
    watching = observers(args, train_dataset, image_processor=image_processor, start=started_from)
    metrics = MetricsFile(output / "metrics.jsonl")
    best = [BestTeacher(output, image_processor, metrics)] if start and args.knn_steps else []
    alarms = CollapseAlarms(args, config, metrics=metrics)
    trainer = DinoTrainer(
        network,
        args,
        train_dataset=train_dataset,
        data_collator=data_collator,
        high_resolution=high_resolution,
        callbacks=[RunRecord(output, args.resolved()), *callbacks, *watching, metrics, alarms, *best],
        image_processor=image_processor,
    )
    return trainer, alarms


def _image_processor(args: PretrainingArguments, start: StartingPoint | None) -> BaseImageProcessor:
    """Return the image processor that is saved with the backbone, with the statistics of the starting model."""
    size = args.evaluation_size
    last = args.high_resolution_size if args.high_resolution_steps else args.global_crop_size
    processor = default_image_processor(size or last, resize=size)
    if start is None:
        return processor
    if (source := known_processor(start.teacher)) is not None:
        processor.image_mean, processor.image_std = (list(values) for values in statistics_of(source))
    elif args.process_index == 0:
        logger.warning(
            "'%s' has no image processor, so the mean and standard deviation of ImageNet are used. If it was trained "
            "with others, save its image processor beside the weights.", args.init_from
        )  # fmt: skip
    return processor


def _write_folder(trainer: DinoTrainer) -> RegViTModel:
    """Write teacher, training state and card of a finished run, push the teacher and return it."""
    args, output = trainer.args, trainer.args.folder
    state = whole_state(trainer.model)
    backbone = trainer.hub_model(state)
    if args.mode == "lora" and trainer.is_world_process_zero():
        trained = [name for name, value in trainer.model.student_backbone.named_parameters() if value.requires_grad]
        write_adapter(output / ADAPTER, {name: state[f"{EXPORTED}{name}"] for name in trained}, args)
    state = trainer.model.plain(state)
    if trainer.is_world_process_zero():
        size, of_backbone = num_bytes(state.values()), num_bytes(backbone.state_dict().values())
        check_space(output, size)  # for both folders
        write_model(output / BACKBONE, backbone, trainer.image_processor, needed=of_backbone)
        with whole_checkpoint(output / TRAINING, needed=size - of_backbone) as folder:
            _save_training_state(state, folder)
        facts = pretraining_facts(
            public_recipe(args.resolved()), read_json(output / "report.json"), run_environment(args)
        )
        write_card_file(output / BACKBONE, parameters=backbone.num_parameters(), **trainer.hub_names(), **facts)
        trainer.trackers.finish(output / BACKBONE)
        trainer.push_result(output / BACKBONE)
    return backbone


def _starting_point(args: PretrainingArguments, model: RegViTConfig | RegViTModel | None) -> StartingPoint | None:
    if args.init_from is None:
        return None
    if model is not None:
        raise ValueError(f"Got both init_from='{args.init_from}' and a model; expected only one. Remove one of them.")
    start = starting_point(
        args.init_from,
        image_size=args.global_crop_size,
        **args.subset("num_register_tokens", "register_init_std", "drop_path_rate", "drop_path_mode", "seed"),
        **args.subset("position", "pos_embed_rescale", "mode"),
    )
    if args.process_index == 0:
        logger.info("Starting from '%s'. %s", args.init_from, " ".join(start.changes))
        if ignored := _ignored_fields(args, start.student.config):
            logger.warning("The backbone comes from '%s'. Ignored: %s.", args.init_from, ", ".join(ignored))
    return start


def _ignored_fields(args: PretrainingArguments, config: RegViTConfig) -> list[str]:
    """Return the backbone options that were given but differ from the backbone to start from."""
    names = ("patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "use_swiglu_ffn")
    return [
        f"--{name} {value} (it has {getattr(config, name)})"
        for name, value in args.subset(*names, "layerscale_value").items()
        if value not in (getattr(PretrainingArguments, name), getattr(config, name))
    ]


def _train(trainer: DinoTrainer, alarms: CollapseAlarms) -> None:
    """Train, and write the report and the curves even if an alarm stops the run.

    Raises:
        NonFiniteError: If a loss or gradient is NaN or infinite.
        CollapseError: If a collapse alarm is raised and alarms stop the run.
    """
    started = time.perf_counter()
    stopped: Exception | None = None
    try:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        if trainer.args.stop_on_collapse and alarms.raised:
            last = alarms.raised[-1]
            stopped = CollapseError(f"Stopped at step {last.step} by the alarm {last.name}: {last.message}")
    except NonFiniteError as error:
        alarms.record(Alarm("not_finite", trainer.state.global_step, str(error)), trainer.state)
        stopped = error
    output = trainer.args.folder
    if trainer.is_world_process_zero():
        report = _report(trainer, since_start=time.perf_counter() - started)
        report |= {"alarms": [dataclasses.asdict(alarm) for alarm in alarms.raised], "stopped": stopped is not None}
        with trainer.writing_result():
            write_json(output / "report.json", report)
            curves = draw_curves(output, num_prototypes=trainer.args.head_num_prototypes)
            trainer.trackers.result(output / "report.json", [curves] if curves else [])
    if stopped is not None:
        raise stopped


def _build_network(
    args: PretrainingArguments,
    model: RegViTConfig | RegViTModel | None,
    *,
    new_registers: bool = False,
    processor: BaseImageProcessor | None = None,
) -> StudentAndTeacher:
    """Build the losses around a student backbone: frozen teachers or self-distillation."""
    backbone = _build_backbone(args, model, new_registers=new_registers)
    lora_scale = args.lora_alpha / args.lora_r if args.mode == "lora" else None
    if args.teacher:
        options = {"image_size": args.teacher_image_size, "device": args.device, **_statistics(processor)}
        teachers = [FrozenTeacher(name, **options) for name in args.teacher]
        logger.info(
            "The student learns %s. The heads, losses and targets of DINOv2 are not used.",
            " and ".join(map(str, teachers)),
        )
        weights = {"cls_weight": args.teacher_cls_weight, "patch_weight": args.teacher_patch_weight}
        return FeatureDistillation(backbone, teachers, **weights, lora_scale=lora_scale)
    shape = HeadShape(args.head_num_prototypes, args.head_hidden_size, args.head_bottleneck_size, args.head_num_layers)
    ibot_shape = dataclasses.replace(
        shape, num_prototypes=args.ibot_head_num_prototypes, bottleneck_size=args.ibot_head_bottleneck_size
    )
    ratio = shape.num_prototypes / (2 * args.per_device_train_batch_size * args.world_size)
    if ratio > 32:
        logger.warning(
            "head_num_prototypes=%d is %.0f times the %d global crops of a micro-batch. Small runs need a ratio of at "
            "most 32; set, for example, head_num_prototypes=%d.",
            shape.num_prototypes, ratio, shape.num_prototypes // ratio, 16 * shape.num_prototypes // ratio,
        )  # fmt: skip
    return SelfDistillation(
        backbone,
        dino_head=shape,
        ibot_head=ibot_shape if args.separate_ibot_head else None,
        **args.subset("centering", "center_momentum", "student_temperature", "dino_loss_weight", "ibot_loss_weight"),
        **args.subset(
            "koleo_loss_weight", "koleo_gathered", "koleo_neighbours", "gram_loss_weight", "paka_loss_weight"
        ),
        **args.subset("ibot_visible_patches", "average_heads_only"),
        lora_scale=lora_scale,
    )


def _build_backbone(
    args: PretrainingArguments, model: RegViTConfig | RegViTModel | None, *, new_registers: bool
) -> RegViTModel:
    """Build the student backbone from a configuration, a backbone or the arguments."""
    if isinstance(model, RegViTModel):
        backbone = copy.deepcopy(model)
        if not model.config.use_mask_token:
            backbone = RegViTModel(_with_mask_token(model.config))
            missing, unexpected = backbone.load_state_dict(model.state_dict(), strict=False)
            if missing != ["embeddings.mask_token"] or unexpected:
                raise ValueError(
                    f"The backbone to continue from has missing tensors {missing} and unexpected tensors "
                    f"{unexpected}; expected a plain RegViTModel without an extra pooler."
                )
        # from_pretrained leaves a model in eval mode, and the caller may have frozen parts of it.
        return choose_trained(backbone.train().requires_grad_(True), args, new_registers=new_registers)
    if args.mode != "full":
        raise ValueError(
            f"mode is '{args.mode}', which trains only a part of a trained backbone, but none was given. Add "
            "--init_from, or set --mode full."
        )
    return RegViTModel(args.backbone_config() if model is None else _with_mask_token(model))


def _with_mask_token(config: RegViTConfig) -> RegViTConfig:
    config = copy.deepcopy(config)
    config.use_mask_token = True
    return config


def _build_dataset(args: PretrainingArguments, config: RegViTConfig) -> Dataset:
    """Build the dataset of multi-crop views of `args.data`."""
    multi_crop = _build_multi_crop(args, config, args.global_crop_size, args.local_crop_size)
    columns = args.subset("image_column", "label_column")
    record = args.folder / BAD_IMAGES
    if args.process_index == 0 and not args.resume_from_checkpoint:
        record.unlink(missing_ok=True)  # left by an earlier run, whose images may have been repaired since
    if args.streaming:
        streams = [stream_images(one, **columns) for one in args.data]
        bad_images = BadImages(record, max_bad_share=args.max_bad_share)
        return MultiCropStream(streams, multi_crop, seed=args.seed, weights=args.data_weights, bad_images=bad_images)
    source = load_images(args.data, split="train", **columns)
    if len(args.data) == 1 and has_masks(args.data[0]):
        source = without_masks(source)
    logger.info("Training: %s.", source.counted())
    bad_images = BadImages(record, max_bad_share=args.max_bad_share, num_images=len(source))
    return MultiCropDataset(source, multi_crop, seed=args.seed, bad_images=bad_images)


def _build_multi_crop(
    args: PretrainingArguments, config: RegViTConfig, global_size: int, local_size: int
) -> MultiCrop:
    return MultiCrop(
        global_size=global_size,
        local_size=local_size,
        global_scale=args.global_crop_scale,
        local_scale=args.local_crop_scale,
        patch_size=math.lcm(*config.patch_shape),
        gram_size=args.gram_crop_size,
        **args.subset("num_local_crops", "jitter_probability", "brightness", "contrast", "saturation", "hue"),
        **args.subset("grayscale_probability", "blur", "blur_kernel_size", "blur_sigma", "solarize_probability"),
        **args.subset("flip_probability", "share_jitter", "locals_from_globals"),
    )


def _build_collator(
    args: PretrainingArguments, config: RegViTConfig, global_size: int, processor: BaseImageProcessor
) -> DinoCollator:
    rows, columns = (global_size // side for side in config.patch_shape)
    return DinoCollator(
        (rows, columns),
        **_statistics(processor),
        **args.subset("mask_ratio", "mask_probability", "seed"),
    )


def _statistics(processor: BaseImageProcessor | None) -> dict[str, Any]:
    """Return the mean and standard deviation that crops are normalized with, as keyword arguments."""
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if processor is None else statistics_of(processor)
    return {"mean": mean, "std": std}


def _enlarged(
    args: PretrainingArguments, config: RegViTConfig, dataset: Dataset, processor: BaseImageProcessor
) -> tuple[Dataset, DinoCollator]:
    """Return a dataset of the same images, and its collator, with the crops of the high-resolution steps."""
    if not isinstance(dataset, MultiCropDataset):
        raise ValueError(
            f"high_resolution_steps requires a MultiCropDataset, not {type(dataset).__name__}. Use DinoTrainer and "
            "its high_resolution argument instead."
        )
    size, local_size = args.high_resolution_size, args.high_resolution_local_size or args.local_crop_size
    larger = copy.copy(dataset)  # shares the cache of decoded images
    larger.multi_crop = _build_multi_crop(args, config, size, local_size)
    return larger, _build_collator(args, config, size, processor)


def _save_training_state(state: dict[str, Tensor], folder: Path) -> None:
    """Save student, teacher heads and centers, one file each, for continued pretraining."""
    teacher = tensors_below("teacher.", state)
    parts = {
        "student": tensors_below("student.", state),
        "teacher_heads": {name: tensor for name, tensor in teacher.items() if "_head." in name},
        "centers": {name: state[name] for name in state if "_center." in name},
    }
    for name, tensors in parts.items():
        if tensors:
            save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})


def _report(trainer: DinoTrainer, *, since_start: float) -> dict[str, Any]:
    """Return the summary of a run."""
    watching = sum(item.seconds for item in trainer.callback_handler.callbacks if isinstance(item, Observer))
    history = trainer.state.log_history
    losses = [entry for entry in history if "loss" in entry]
    probes = [item for item in trainer.callback_handler.callbacks if isinstance(item, OnlineKNN)]
    best = [item.best for item in trainer.callback_handler.callbacks if isinstance(item, BestTeacher)]
    return {
        "steps": trainer.state.global_step,
        "images_seen": trainer.state.global_step * trainer.args.images_per_step,
        # A stream has no length; there, Trainer counts the fraction of the run instead.
        "epochs": trainer.state.epoch if isinstance(trainer.sampler, EpochSampler) else None,
        "seconds": trainer.seconds,
        "monitor_share": watching / max(since_start, 1e-9),
        "peak_memory_mib": peak_memory_mib(),
        "parameters": {
            name: sum(p.numel() for p in part.parameters()) for name, part in trainer.model.student.items()
        },
        "final": {key: value for key, value in losses[-1].items() if math.isfinite(value)} if losses else {},
        "knn": [
            {key: value for key, value in entry.items() if key.startswith(("eval_knn", "eval_linear", "step"))}
            for entry in history
            if any(key.startswith("eval_knn") for key in entry)
        ],
        "best": dict(zip(("step", "score"), best[0], strict=True)) if best and best[0] else None,
        "knn_images": [
            {"fitted_on": len(knn.neighbors), "judged": len(knn.heldout), "held_out": knn.is_held_out}
            for knn in probes
        ],
    }
