"""Convert the weights of other plain ViTs to RegViT, exactly, or raise an error that says why this is not possible.

Supported sources: official DINOv2 and DINO state dicts and training checkpoints; transformers ViT, DeiT (undistilled),
DINO, Dinov2 and Dinov2WithRegisters (folders, Hub ids, modules); timm vision transformers (modules, `timm/` Hub ids,
state dicts). Every tensor of the source is either used or named in an error; no weight stays randomly initialized.

If a library adds positions to its registers (timm with `no_embed_class=False`), they are added to the register tokens,
which gives the same sum. Source of names and numerics: dinov2 `models/vision_transformer.py`, `hub/backbones.py`; timm
`models/vision_transformer.py`; the ViT and DINOv2 families of transformers.
"""

import copy
import difflib
import logging
import math
import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .configuration_regvit import RegViTConfig
from .families import FAMILIES
from .foreign_weights import (
    NOT_IN_SHAPES,
    ConversionError,
    ForeignModel,
    as_pair,
    find_backbone,
    first_line,
    local_path,
    pooling_of,
    read_folder,
    read_module,
    read_weights,
    rename_tensors,
)
from .manifest import whole_checkpoint
from .modeling_regvit import RegViTBackbone, RegViTForImageClassification, RegViTModel
from .processing import default_image_processor
from .saving import num_bytes

logger = logging.getLogger(__name__)

# Relative to the standard deviation of the outputs: the real ViT-Tiny has tokens of norm 500 next to others of 19.
VERIFY_TOLERANCE = 1e-4


def convert(
    source: str | Path | nn.Module | dict[str, Any], *, verify: bool = True, **config_overrides: Any
) -> RegViTModel | RegViTForImageClassification:
    """Convert another plain ViT to a RegViT with the same outputs.

    Args:
        source: Folder written by `save_pretrained`, Hub id, weights file (`.safetensors`, `.pth`), state dict, or
            module of transformers or timm. Its image processor becomes `model.image_processor`, which
            `save_pretrained` writes beside the weights.
        verify: Whether to run source and result on the same random images, at the native size and at another one, and
            compare the outputs. If there is no source model to run (state dicts), a warning is logged. Names and
            shapes are always checked.
        config_overrides: Fields of `RegViTConfig`. A raw state dict needs `num_attention_heads`, `layer_norm_eps`,
            `interpolate_antialias` and `interpolate_offset`, and `image_size` if its position table is not square.

    Returns:
        Model in eval mode, with a classifier if the source has one.

    Raises:
        ConversionError: The source contains something RegViT cannot express (named in the error), or the outputs
            differ.
        CheckpointCorruptError: A weights file cannot be read.
        TypeError: An override is not a config field.
    """
    known = [name for name in RegViTConfig.__dataclass_fields__ if not name.startswith("_")] + [
        "out_features",
        "out_indices",
    ]
    for name in config_overrides:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise TypeError(f"convert() got '{name}', which is not a RegViTConfig field. Did you mean '{nearest}'?")
    origin = _open_source(source)
    origin.fields.update(config_overrides)
    tensors = rename_tensors(origin)
    config, tensors = _build_config(origin, tensors)
    model_class = RegViTForImageClassification if "classifier.weight" in tensors else RegViTModel
    with torch.device("meta"):
        model = model_class(config)
    _load(model, tensors, origin.name)
    model.eval()
    if verify:
        _verify(model, origin)
    cast(Any, model).image_processor = origin.image_processor(model.config)
    return model


def convert_to_folder(
    source: str | Path, output_dir: str | Path, *, verify: bool = True, **config_overrides: Any
) -> RegViTModel | RegViTForImageClassification:
    """Convert a model and save it as a checkpoint with its code files and an image processor.

    The image processor of the source is used if there is one. For a bare weights file, it is the one of DINOv2:
    ImageNet statistics and a center crop of the native size.

    Args:
        source: Folder, weights file or Hub id; see `convert`.
        output_dir: Output folder, new or without a checkpoint.
        verify: Whether to compare the outputs; see `convert`.
        config_overrides: Fields of `RegViTConfig`; see `convert`.

    Raises:
        FileExistsError: `output_dir` already contains a checkpoint.
        NotADirectoryError: `output_dir` is a file.
    """
    output = Path(output_dir)
    if (output / "config.json").exists():
        raise FileExistsError(f"'{output}' already contains a checkpoint. Choose another output_dir or remove it.")
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"'{output}' is a file, expected a folder. Choose another output_dir.")
    model = convert(source, verify=verify, **config_overrides)
    if model.image_processor is None:
        logger.warning("'%s' has no image processor. Using that of DINOv2: center crop, ImageNet statistics.", source)
        cast(Any, model).image_processor = default_image_processor(model.config.image_shape)
    with whole_checkpoint(output, needed=num_bytes(model.state_dict().values())) as staged:
        model.save_pretrained(staged)
    return model


# --- Reading ---


def _open_source(source: str | Path | nn.Module | dict[str, Any]) -> ForeignModel:
    if isinstance(source, nn.Module):
        return read_module(source)
    if isinstance(source, dict):
        return ForeignModel("state dict", find_backbone(source))
    path = local_path(source)
    return ForeignModel(str(path), find_backbone(read_weights(path))) if path.is_file() else read_folder(path)


def _build_config(origin: ForeignModel, tensors: dict[str, Tensor]) -> tuple[RegViTConfig, dict[str, Tensor]]:
    """Infer the config from tensors and known fields; also return the tensors, with register positions folded in."""
    needed = (
        "embeddings.cls_token",
        "embeddings.position_embeddings",
        "embeddings.patch_embeddings.projection.weight",
    )
    if missing := [name for name in needed if name not in tensors]:
        raise ConversionError(
            f"'{origin.name}' has no {' and no '.join(missing)} (RegViT names), so it is not a ViT with CLS and "
            f"learned positions. Its first tensors are {sorted(origin.tensors)[:5]}."
        )
    if distilled := sorted({"embeddings.distillation_token", "dist_token"} & tensors.keys()):
        raise ConversionError(
            f"'{origin.name}' is distilled: it has {distilled[0]}, a second output token that RegViT does not have. "
            "Use an undistilled DeiT checkpoint (model_type 'vit')."
        )
    fields = dict(origin.fields)
    projection = tensors["embeddings.patch_embeddings.projection.weight"]  # (D, C, rows, columns)
    if projection.ndim != 4:
        raise ConversionError(
            f"The patch embedding has shape {tuple(projection.shape)}, expected (width, channels, height, width)."
        )
    patch = (projection.shape[2], projection.shape[3])
    registers = tensors.get("embeddings.register_tokens")
    if registers is not None and registers.shape[1] == 0:
        del tensors["embeddings.register_tokens"]
        registers = None
    depth = 1 + max((int(m[1]) for m in (re.match(r"layers\.(\d+)\.", n) for n in tensors) if m), default=-1)
    if "reg_token" in origin.tensors:  # only timm uses this name, and timm resamples positions in only one way
        fields = {"interpolate_antialias": True, "interpolate_offset": 0.0, "layer_norm_eps": 1e-6, **fields}
    if unknown := [name for name in NOT_IN_SHAPES if name not in fields]:
        raise ConversionError(
            f"'{origin.name}' does not specify {', '.join(unknown)}. Pass them to convert() or as options "
            f"(--{unknown[0]} ...): " + "; ".join(f"{name}: {NOT_IN_SHAPES[name]}" for name in unknown) + "."
        )
    swiglu = "layers.0.mlp.gate_up_proj.weight" in tensors
    ffn = tensors.get("layers.0.mlp.down_proj.weight" if swiglu else "layers.0.mlp.fc2.weight")
    shaped: dict[str, Any] = {
        "hidden_size": projection.shape[0],
        "num_channels": projection.shape[1],
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "num_hidden_layers": depth,
        "num_register_tokens": 0 if registers is None else registers.shape[1],
        "use_swiglu_ffn": swiglu,
        "qkv_bias": "layers.0.attention.qkv.bias" in tensors,
        "proj_bias": "layers.0.attention.o_proj.bias" in tensors,
        "mlp_bias": f"layers.0.mlp.{'down_proj' if swiglu else 'fc2'}.bias" in tensors,
        "layerscale_value": fields.get("layerscale_value", 1e-5)
        if "layers.0.layer_scale1.lambda1" in tensors
        else None,
        "use_mask_token": "embeddings.mask_token" in tensors,
        "final_norm": "pooled" if "fc_norm.weight" in origin.tensors else "tokens",
    }
    if fields.get("num_register_tokens") and registers is None:
        raise ConversionError(
            f"num_register_tokens={fields['num_register_tokens']}, but '{origin.name}' has no registers (0 "
            "register_tokens), and convert adds none. Convert without it, then call "
            f"model.resize_register_tokens({fields['num_register_tokens']}) and train, or use retrofit to add "
            "registers without training."
        )
    for name, value in shaped.items():
        if (
            name in fields
            and as_pair(name, fields[name]) != as_pair(name, value)
            and name not in ("layerscale_value", "use_mask_token")
        ):
            raise ConversionError(
                f"{name}={fields[name]} does not match the tensors of '{origin.name}', which imply {value}. Correct "
                "or remove it."
            )
    fields = {**fields, **shaped}
    if "mask_token" in (tensors_name.rsplit(".", 1)[-1] for tensors_name in tensors):
        tensors["embeddings.mask_token"] = tensors["embeddings.mask_token"].reshape(1, -1)
    if ffn is not None:
        fields["intermediate_size"] = ffn.shape[1]
    if "classifier.weight" in tensors:
        fields.setdefault("pooling", pooling_of(tensors["classifier.weight"], projection.shape[0], origin))
        fields.setdefault("num_labels", tensors["classifier.weight"].shape[0])
    if fields["final_norm"] == "pooled":
        fields["pooling"] = "mean_patch"
    fields.pop("mlp_ratio", None)  # intermediate_size is exact
    if "id2label" in fields:
        fields.pop("num_labels", None)
    tensors = _fold_positions(origin, tensors, fields, patch)
    return RegViTConfig(**fields), tensors


def _fold_positions(
    origin: ForeignModel, tensors: dict[str, Tensor], fields: dict[str, Any], patch: tuple[int, int]
) -> dict[str, Tensor]:
    """Find the grid of the position table, and add the rows that belong to registers to the register tokens."""
    table = tensors["embeddings.position_embeddings"]  # (1, prefix + N, D)
    rows, registers = table.shape[1], fields["num_register_tokens"]
    candidates = {1: "a row for CLS", 0: "no row for CLS", 1 + registers: "a row for CLS and for every register"}
    if "image_size" in fields:
        height, width = as_pair("image_size", fields["image_size"])
        fits = [prefix for prefix in candidates if rows - prefix == (height // patch[0]) * (width // patch[1])]
    else:
        fits = [prefix for prefix in candidates if rows > prefix and math.isqrt(rows - prefix) ** 2 == rows - prefix]
        if fits:
            side = math.isqrt(rows - fits[0])
            fields["image_size"] = side * patch[0] if patch[0] == patch[1] else [side * patch[0], side * patch[1]]
    if not fits:
        raise ConversionError(
            f"The position table of '{origin.name}' has {rows} rows, which does not match patch_size={patch} and "
            f"image_size={fields.get('image_size', 'a square')}. Pass image_size=[height, width] in pixels."
        )
    prefix = fits[0]
    fields["no_embed_class"] = prefix == 0
    if prefix == 1 + registers and registers:
        tensors["embeddings.register_tokens"] = tensors["embeddings.register_tokens"] + table[:, 1:prefix]
        tensors["embeddings.position_embeddings"] = torch.cat([table[:, :1], table[:, prefix:]], dim=1)
    return tensors


def _load(model: nn.Module, tensors: dict[str, Tensor], name: str) -> None:
    """Load all tensors into the model; raise if a name or shape does not match."""
    prefix = "regvit." if isinstance(model, RegViTForImageClassification) else ""
    placed = {key if key.startswith("classifier.") else prefix + key: value for key, value in tensors.items()}
    if prefix:
        placed = {key: value for key, value in placed.items() if not key.startswith("regvit.pooler.")}
    wanted = model.state_dict()
    problems = [f"{key} is missing" for key in sorted(wanted.keys() - placed.keys())]
    problems += [f"{key} has no place in RegViT" for key in sorted(placed.keys() - wanted.keys())]
    problems += [
        f"{key} has shape {tuple(placed[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in sorted(wanted.keys() & placed.keys())
        if wanted[key].shape != placed[key].shape
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        has_pooler = any(key.startswith("pooler.") for key in placed.keys() - wanted.keys())
        hint = " A pooler also needs its activation: set pooler_act, 'tanh' in ViT." if has_pooler else ""
        raise ConversionError(f"'{name}' cannot be expressed as RegViT: {'; '.join(problems[:8])}{more}.{hint}")
    # Clone the tensors, so that the result does not share memory with the source model.
    model.load_state_dict({key: value.clone().contiguous() for key, value in placed.items()}, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


# --- Verification ---


@torch.no_grad()
def _verify(model: Any, origin: ForeignModel) -> None:
    """Compare the outputs with the source model on random images, at its native size and at another one."""
    if origin.load is None:
        logger.warning(
            "'%s' has only tensors and no model to run: names and shapes were checked, but outputs were not compared.",
            origin.name,
        )
        return
    source: Any = origin.load()
    given, was_training = source, source.training
    source.eval()
    # Compare in float32 regardless of the dtype of the weights: bfloat16 rounding would hide small errors.
    if {parameter.dtype for parameter in source.parameters()} != {torch.float32}:
        source = copy.deepcopy(source).float()
    if model.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    config = model.config
    height, width = config.image_shape
    sizes = [(height, width)]
    if _takes_any_size(source):
        sizes.append((height + config.patch_shape[0], width + 2 * config.patch_shape[1]))
    generator = torch.Generator().manual_seed(0)
    parameter = next(source.parameters())
    try:
        for size in sizes:
            pixels = torch.randn(2, config.num_channels, *size, generator=generator).to(
                parameter.device, parameter.dtype
            )
            try:
                kind, expected = _run_source(source, pixels)
            except (RuntimeError, AttributeError, TypeError, LookupError) as error:
                raise ConversionError(
                    f"'{origin.name}' does not run with its configuration: {first_line(error)}."
                ) from error
            actual, expected = _run_ours(model.to(parameter.device), pixels, kind).float(), expected.float()
            difference = ((actual - expected).abs().max() / expected.std().clamp(min=1e-6)).item()
            if not difference <= VERIFY_TOLERANCE:
                raise ConversionError(
                    f"The RegViT outputs differ from those of '{origin.name}' by {difference:.2e} of their standard "
                    f"deviation at {size[0]} x {size[1]} pixels, more than {VERIFY_TOLERANCE:.0e}. Check the config "
                    "overrides."
                )
            logger.info(
                "The outputs match those of '%s' at %d x %d pixels (difference %.1e).", origin.name, *size, difference
            )
    finally:
        given.train(was_training)


def _takes_any_size(source: Any) -> bool:
    return hasattr(source, "config") or getattr(source, "dynamic_img_size", False)


def _run_source(source: Any, pixels: Tensor) -> tuple[str, Tensor]:
    """Return the name and the value of the output to compare."""
    if not hasattr(source, "config"):
        return (
            ("logits", source(pixels))
            if source.num_classes
            else ("last_hidden_state", source.forward_features(pixels))
        )
    if getattr(source.config, "num_labels", None) == 0:  # the head is an identity, so compare the backbone
        source = getattr(source, source.base_model_prefix, source)
    extra = {"interpolate_pos_encoding": True} if FAMILIES[source.config.model_type].resize_switch else {}
    output = source(pixels, **extra)
    for name in ("logits", "last_hidden_state", "feature_maps"):
        if output.get(name) is not None:
            return name, output[name][-1] if name == "feature_maps" else output[name]
    raise ConversionError(
        f"{type(source).__name__} returns no output to compare with, only {list(output.keys())}. Pass verify=False."
    )


def _run_ours(model: Any, pixels: Tensor, kind: str) -> Tensor:
    if kind != "feature_maps":
        return model(pixels)[kind]
    with torch.device("meta"):
        backbone = RegViTBackbone(model.config)
    backbone.regvit = model
    return backbone.eval()(pixels).feature_maps[-1]
