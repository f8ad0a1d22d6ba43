"""Initial model and trained parameters of a fine-tuning run: weights, head, registers, low-rank updates."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed
from transformers.image_processing_utils import BaseImageProcessor

from ..models.configuration_regvit import RegViTConfig
from ..models.loading import fit_positions, open_regvit
from ..models.modeling_regvit import RegViTModel, RegViTPreTrainedModel
from ..models.processing import (
    default_image_processor,
    known_processor,
    require_rgb,
    resized_processor,
    unknown_processor,
)
from ..training.lora import inject_lora, merged_state
from .arguments import FinetuningArguments
from .tasks import Task


@dataclass(frozen=True)
class OpenedModel:
    """Initial model of a run.

    Attributes:
        network: Model with the head of the task, in training mode.
        processor: Image processor of the model.
        changes: Differences from the model that was named, as sentences.
        new_registers: True if registers were added.
    """

    network: RegViTPreTrainedModel
    processor: BaseImageProcessor
    changes: list[str]
    new_registers: bool


def open_for_task(args: FinetuningArguments, task: Task, model: RegViTConfig | nn.Module | None = None) -> OpenedModel:
    """Load or create the model of a run, with the head of its task.

    Args:
        args: Arguments of the run.
        task: Task to train for.
        model: RegViT of any class, or a configuration to start from scratch. Default: the model that `args` names.

    Raises:
        ValueError: No model is given, the model already has a different number of registers, or the image size is not
            a multiple of the patch size.
        OSError: The model cannot be read.
    """
    changes: list[str] = []
    new_registers = False
    source, processor = _open_source(args) if model is None else (model, None)
    if isinstance(source, nn.Module):
        require_rgb(source)
        processor = processor or known_processor(source)
    from_scratch = isinstance(source, RegViTConfig)
    backbone, head = _backbone_and_head(source, seed=args.seed)
    config = backbone.config
    if args.num_register_tokens is not None and args.num_register_tokens != config.num_register_tokens:
        if config.num_register_tokens:
            raise ValueError(
                f"num_register_tokens is {args.num_register_tokens}, but the model was trained with "
                f"{config.num_register_tokens} registers. Leave the option out, or call resize_register_tokens first."
            )
        backbone.resize_register_tokens(args.num_register_tokens, seed=args.seed)
        new_registers = True
        changes.append(
            f"The model had no registers; {args.num_register_tokens} trainable registers were added "
            "(--num_register_tokens). They start untrained, so accuracy may drop at first."
        )
    if args.image_size is not None:
        changes += fit_positions(backbone, args.image_size, option="image_size")
    processor = processor or default_image_processor(config.image_shape)
    if args.image_size is not None:
        processor = resized_processor(processor, args.image_size)
    fields = {"use_mask_token": False, "pooler_act": None, "discard_registers": False, "drop_path_mode": "sample"}
    if not (config.use_cls_token or config.attention_pooler):
        fields["pooling"] = "mean_patch"  # the only one without CLS, unless another is asked for, which is refused
    fields |= {"projection_dim": None, "drop_path_rate": args.drop_path_rate} | task.config_fields()
    whole = RegViTConfig.from_dict({**config.to_dict(), **fields, "architectures": None})
    set_seed(args.seed)
    network = task.model_class(whole)
    processor = task.image_processor(processor, whole)
    tower = network.get_submodule("regvit")
    own = tower.state_dict()
    tower.load_state_dict({name: value for name, value in backbone.state_dict().items() if name in own})
    if head and task.fits_head(head["config"]) and _same_shapes(network, head["state"]):
        network.load_state_dict(head["state"], strict=False)
        changes.append("Its head matches the task and is kept.")
    elif not from_scratch:
        changes.append("The head is newly initialized.")
    return OpenedModel(network.train(), processor, changes, new_registers)


def _open_source(args: FinetuningArguments) -> tuple[nn.Module | RegViTConfig, Any]:
    """Return the model or configuration that the arguments name, and its image processor."""
    source = args.model_name_or_path
    if source is None:
        if args.preset is None:
            raise ValueError(
                "There is no model to start from. Give --model, or --preset tiny, small, base, large or giant to "
                "train from scratch."
            )
        registers = 4 if args.num_register_tokens is None else args.num_register_tokens
        sizes = args.subset("patch_size", "layerscale_value") | {"image_size": args.image_size or 224}
        return RegViTConfig.from_preset(args.preset, num_register_tokens=registers, **sizes), None
    model = open_regvit(source)  # of the saved class, because its head may be for the same task
    if (processor := known_processor(model)) is None:
        raise unknown_processor(model)
    return model, processor


def _backbone_and_head(source: nn.Module | RegViTConfig, *, seed: int) -> tuple[RegViTModel, dict[str, Any]]:
    """Return a copy of the backbone, and the state and configuration of its head, if any."""
    if isinstance(source, RegViTConfig):
        set_seed(seed)
        return RegViTModel(copy.deepcopy(source), add_pooling_layer=False), {}
    if isinstance(source, RegViTModel):
        return copy.deepcopy(source), {}
    backbone = getattr(source, "regvit", None)
    if not isinstance(backbone, RegViTModel):
        raise TypeError(f"model is a {type(source).__name__}. Pass a RegViT of any class or a RegViTConfig.")
    state = {name: value.clone() for name, value in source.state_dict().items() if not name.startswith("regvit.")}
    return copy.deepcopy(backbone), {"state": state, "config": source.config}


def _same_shapes(network: nn.Module, state: Mapping[str, Tensor]) -> bool:
    own = {name: value.shape for name, value in network.state_dict().items() if not name.startswith("regvit.")}
    return own == {name: value.shape for name, value in state.items()}


def choose_trained(network: nn.Module, args: FinetuningArguments, *, new_registers: bool) -> None:
    """Freeze the parameters that the mode does not train, and insert low-rank updates, in place.

    Added registers are trained in every mode, because untrained registers would remain noise.

    Raises:
        ImportError: The mode is lora and peft is not installed.
        ValueError: `lora_target_modules` names an unknown linear layer.
    """
    if args.mode == "full":
        return
    network.requires_grad_(False)
    if args.mode == "lora":
        inject_lora(network, args, blocks="regvit.layers")
    for name, parameter in network.named_parameters():
        is_head = not name.startswith("regvit.")
        if is_head or (new_registers and name.endswith("register_tokens")):
            parameter.requires_grad_(True)


def whole_model(
    state: Mapping[str, Tensor], trained: RegViTPreTrainedModel, task: Task, args: FinetuningArguments
) -> PreTrainedModel:
    """Return a plain model with the tensors of a trained one, low-rank updates merged."""
    result = task.model_class(copy.deepcopy(trained.config))
    result.load_state_dict(merged_state(state, scale=args.lora_alpha / args.lora_r))
    return result.eval()
