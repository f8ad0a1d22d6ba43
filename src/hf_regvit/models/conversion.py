"""Convert the weights of other plain ViTs to RegViT, exactly, or raise an error that says why this is not possible.

Supported sources: modules, folders and Hub ids of transformers and timm, of the families in `source_families`; folders
of OpenCLIP; state dicts and training checkpoints of DINO, DINOv2, DINOv3, OpenCLIP and timm. Every tensor of the
source is either used or named in an error; no weight stays randomly initialized. `convert_back` goes the other way.

If a library adds positions to its registers (timm with `no_embed_class=False`), they are added to the register tokens,
which gives the same sum. Source of names and numerics: dinov2 `models/vision_transformer.py`, `hub/backbones.py`;
dinov3 `models/vision_transformer.py`; open_clip `transformer.py`; the model files of timm and transformers.
"""

import difflib
import logging
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_regvit import ConfigError, RegViTConfig
from .conversion_check import check_outputs
from .families import as_pair
from .foreign_weights import ForeignModel, open_source
from .manifest import whole_checkpoint
from .modeling_regvit import RegViTForImageClassification, RegViTModel
from .processing import UnknownProcessorError, saved_processor
from .saving import num_bytes
from .source_families import NOT_IN_SHAPES, ConversionError
from .weight_pieces import PROJECTION, Piece, find_pieces, put_together, take_apart, target_names

logger = logging.getLogger(__name__)

PROJECTION_BIAS = "embeddings.patch_embeddings.projection.bias"


def convert(
    source: str | Path | nn.Module | dict[str, Any],
    *,
    verify: bool = True,
    architecture: str | None = None,
    **config_overrides: Any,
) -> RegViTModel | RegViTForImageClassification:
    """Convert another plain ViT to a RegViT with the same outputs.

    Args:
        source: Folder of transformers, timm or OpenCLIP, Hub id, weights file (`.safetensors`, `.pth`), state dict, or
            module of transformers or timm. Its image processor becomes `model.image_processor`, which
            `save_pretrained` writes beside the weights.
        verify: Whether to run source and result on the same random images, at the native size and at two others, and
            compare the outputs. If there is no source model to run (state dicts), a warning is logged. Names and
            shapes are always checked.
        architecture: Name of the model in timm (`eva02_base_patch14_224`) from which a raw state dict was saved. All
            settings are then known.
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
    known = [name.lstrip("_") for name in RegViTConfig.__dataclass_fields__]
    for name in config_overrides:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise TypeError(f"convert() got '{name}', which is not a RegViTConfig field. Did you mean '{nearest}'?")
    origin = open_source(source, architecture)
    origin.fields.update(config_overrides)
    config, pieces = _plan(origin)
    tensors = put_together(pieces, origin.own, config.hidden_size)
    tensors.setdefault(PROJECTION_BIAS, torch.zeros_like(tensors[PROJECTION][:, 0, 0, 0]))
    model_class = RegViTForImageClassification if "classifier.weight" in tensors else RegViTModel
    with torch.device("meta"):
        model = model_class(config)
    _load(model, tensors, origin.name)
    model.eval()
    if verify:
        check_outputs(model, origin)
    model.image_processor = origin.image_processor(model.config)
    return model


def convert_to_folder(
    source: str | Path,
    output_dir: str | Path,
    *,
    verify: bool = True,
    processor: str | Path | None = None,
    **config_overrides: Any,
) -> RegViTModel | RegViTForImageClassification:
    """Convert a model and save it as a checkpoint with its code files and an image processor.

    Args:
        source: Folder, weights file or Hub id; see `convert`.
        output_dir: Output folder, new or without a checkpoint.
        verify: Whether to compare the outputs; see `convert`.
        processor: Folder or Hub id of the image processor. Default: that of the source.
        config_overrides: Fields of `RegViTConfig`, or `architecture`; see `convert`.

    Raises:
        UnknownProcessorError: No processor is given and none is known, as for most bare weights files.
        FileExistsError: `output_dir` already contains a checkpoint.
        NotADirectoryError: `output_dir` is a file.
    """
    output = Path(output_dir)
    if (output / "config.json").exists():
        raise FileExistsError(f"'{output}' already contains a checkpoint. Choose another output_dir or remove it.")
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"'{output}' is a file, expected a folder. Choose another output_dir.")
    model = convert(source, verify=verify, **config_overrides)
    if processor is not None:
        model.image_processor = saved_processor(processor)
    if model.image_processor is None:
        raise UnknownProcessorError(
            f"No image processor is known for '{processor or source}', so the right size, mean and standard deviation "
            "are not known. Give the folder or Hub id of a model with the same preprocessing with --processor."
        )
    with whole_checkpoint(output, needed=num_bytes(model.state_dict().values())) as staged:
        model.save_pretrained(staged)
    return model


def convert_back(
    model: nn.Module,
    *,
    like: str | Path | nn.Module | dict[str, Any],
    architecture: str | None = None,
    **config_overrides: Any,
) -> dict[str, Tensor]:
    """Return the tensors of a RegViT under the names of the model from which it was converted.

    Tensors that training has not changed are those of the source bit for bit, and parts that a RegViT does not have,
    such as a text tower, are those of the source. `source.load_state_dict(convert_back(model, like=source))` puts a
    fine-tuned tower back into a CLIP model, a LLaVA or a timm script.

    Args:
        model: RegViT of any class.
        like: Source of the conversion, as for `convert`.
        architecture: Name of the model in timm, if it was given to `convert`.
        config_overrides: Fields that were given to `convert`.

    Raises:
        ConversionError: The model has something that the source has no place for, such as added registers.
    """
    origin = open_source(like, architecture)
    origin.fields.update(config_overrides)
    config, pieces = _plan(origin)
    backbone = getattr(model, "regvit", model)
    if not isinstance(backbone, RegViTModel):
        raise TypeError(f"model is a {type(model).__name__}, expected a RegViT.")
    if backbone.config.register_neurons:
        raise ConversionError("Test-time registers (register_neurons) run in RegViT only. Keep the model as a RegViT.")
    ours = {**backbone.state_dict(), **{k: v for k, v in model.state_dict().items() if k.startswith("classifier.")}}
    expected = put_together(pieces, origin.own, config.hidden_size)
    registers = backbone.config.num_register_tokens
    if registers != config.num_register_tokens:
        raise ConversionError(
            f"The model has {registers} registers, but '{origin.name}' has {config.num_register_tokens}, so there is "
            "no place for them. Keep the model as a RegViT, or call "
            f"resize_register_tokens({config.num_register_tokens}) first."
        )
    if wrong := [name for name in expected if name in ours and ours[name].shape != expected[name].shape]:
        raise ConversionError(
            f"{wrong[0]} has shape {tuple(ours[wrong[0]].shape)}, but '{origin.name}' needs "
            f"{tuple(expected[wrong[0]].shape)}. Pass the source of the conversion, or only the backbone "
            "(model.regvit)."
        )
    if not backbone.config.key_bias:  # its part for the keys has no effect
        unused = torch.tensor([1, 0, 1]).repeat_interleave(config.hidden_size)
        ours |= {name: t * unused.to(t) for name, t in ours.items() if name.endswith("attention.qkv.bias")}
    bias = ours[PROJECTION_BIAS]
    if PROJECTION_BIAS not in expected and bias.any():
        if "embeddings.position_embeddings" not in ours:
            raise ConversionError(f"The patch embedding has a trained bias, for which '{origin.name}' has no place.")
        table = ours["embeddings.position_embeddings"].clone()
        table[:, config.num_position_prefix :] += bias  # every patch gets both
        ours["embeddings.position_embeddings"] = table
    restored = take_apart(pieces, origin.own, ours, config.hidden_size)
    return {**origin.tensors, **{origin.names[name]: tensor for name, tensor in restored.items()}}


# --- Reading ---


def _plan(origin: ForeignModel) -> tuple[RegViTConfig, list[Piece]]:
    """Return the config of the converted model, and where each tensor of the source goes."""
    own = origin.own
    projection = next((own[name] for name, target in target_names(own).items() if target == PROJECTION), None)
    if projection is None:
        raise ConversionError(
            f"'{origin.name}' has no patch embedding, so it is not a ViT. Its first tensors are "
            f"{sorted(origin.tensors)[:5]}."
        )
    if projection.ndim != 4:
        raise ConversionError(
            f"The patch embedding has shape {tuple(projection.shape)}, expected (width, channels, height, width)."
        )
    width, patch = projection.shape[0], (projection.shape[2], projection.shape[3])
    pieces = find_pieces(own, width, masked_key_bias=origin.fields.get("key_bias") is False)
    if origin.projects:
        pieces = [replace(p, target="projection.weight") if p.source == "head.weight" else p for p in pieces]
        pieces = [p for p in pieces if p.source != "head.bias"]
    tensors = put_together(pieces, own, width)
    if distilled := sorted({"embeddings.distillation_token", "dist_token"} & tensors.keys()):
        raise ConversionError(
            f"'{origin.name}' is distilled: it has {distilled[0]}, a second output token that RegViT does not have. "
            "Use an undistilled DeiT checkpoint (model_type 'vit')."
        )
    fields = _fields_of(origin, pieces, tensors, patch)
    if "embeddings.position_embeddings" in tensors:
        pieces = _placed_positions(origin, pieces, tensors["embeddings.position_embeddings"], fields, patch)
    elif "image_size" not in fields:
        fields["image_size"] = [16 * patch[0], 16 * patch[1]]  # only a default: nothing is stored for a size
    try:
        config = RegViTConfig(**fields)
    except ConfigError as error:
        raise ConversionError(f"'{origin.name}' cannot be expressed as RegViT: {error}") from error
    if origin.rotation != (False, False):
        pieces = _rotated(pieces, config, *origin.rotation)
    return config, pieces


def _fields_of(
    origin: ForeignModel, pieces: list[Piece], tensors: dict[str, Tensor], patch: tuple[int, int]
) -> dict[str, Any]:
    """Return the fields that are known or follow from names and shapes; raise if they contradict each other."""
    fields, projection = dict(origin.fields), tensors[PROJECTION]
    width, block = projection.shape[0], "layers.0."
    registers = tensors.get("embeddings.register_tokens", projection[:0, 0, :0, :0])
    depth = 1 + max((int(m[1]) for m in (re.match(r"layers\.(\d+)\.", n) for n in tensors) if m), default=-1)
    if "reg_token" in origin.names:  # only timm uses this name, and timm resamples positions in only one way
        fields = {"interpolate_antialias": True, "interpolate_offset": 0.0, "layer_norm_eps": 1e-6, **fields}
    if "embeddings.position_embeddings" not in tensors:  # nothing to resample
        fields = {"interpolate_antialias": True, "interpolate_offset": 0.0, **fields}
    is_clip_like = {"embeddings.layernorm.weight", "pooler.probe"} & tensors.keys()
    needed = [name for name in NOT_IN_SHAPES if name != "hidden_act" or is_clip_like]
    if unknown := [name for name in needed if name not in fields]:
        raise ConversionError(
            f"'{origin.name}' does not specify {', '.join(unknown)}. Pass them to convert() or as options "
            f"(--{unknown[0]} ...): " + "; ".join(f"{name}: {NOT_IN_SHAPES[name]}" for name in unknown) + "."
        )
    swiglu = f"{block}mlp.gate_up_proj.weight" in tensors
    ffn = tensors.get(f"{block}mlp.down_proj.weight" if swiglu else f"{block}mlp.fc2.weight")
    places = {piece.place for piece in pieces if piece.target == f"{block}attention.qkv.bias" and piece.count == 3}
    has_scale, has_norm = f"{block}layer_scale1.lambda1" in tensors, "layernorm.weight" in tensors
    shaped: dict[str, Any] = {
        "hidden_size": width,
        "num_channels": projection.shape[1],
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "num_hidden_layers": depth,
        "num_register_tokens": registers.shape[1],
        "use_swiglu_ffn": swiglu,
        "qkv_bias": f"{block}attention.qkv.bias" in tensors,
        "key_bias": not places or 1 in places,
        "proj_bias": f"{block}attention.o_proj.bias" in tensors,
        "mlp_bias": f"{block}mlp.{'down_proj' if swiglu else 'fc2'}.bias" in tensors,
        "attention_norm": f"{block}attention.norm.weight" in tensors,
        "mlp_norm": f"{block}mlp.norm.weight" in tensors,
        "embedding_norm": "embeddings.layernorm.weight" in tensors,
        "use_cls_token": "embeddings.cls_token" in tensors,
        "use_position_embeddings": "embeddings.position_embeddings" in tensors,
        "attention_pooler": "pooler.probe" in tensors,
        "layerscale_value": fields.get("layerscale_value", 1e-5) if has_scale else None,
        "use_mask_token": "embeddings.mask_token" in tensors,
        "final_norm": fields.get("final_norm", "pooled" if "fc_norm.weight" in origin.names else "tokens")
        if has_norm
        else "none",
    }
    if fields.get("num_register_tokens") and not shaped["num_register_tokens"]:
        raise ConversionError(
            f"num_register_tokens={fields['num_register_tokens']}, but '{origin.name}' has no registers (0 "
            "register_tokens), and convert adds none. Convert without it, then call "
            f"model.resize_register_tokens({fields['num_register_tokens']}) and train, or use retrofit to add "
            "registers without training."
        )
    for name, value in shaped.items():
        is_fixed = name not in ("layerscale_value", "use_mask_token", "key_bias")
        given = fields.get(name, value)
        if is_fixed and (as_pair(given) != as_pair(value) if name == "patch_size" else given != value):
            raise ConversionError(
                f"{name}={fields[name]} does not match the tensors of '{origin.name}', which imply {value}. Correct "
                "or remove it."
            )
    fields = {**fields, **shaped}
    if ffn is not None:
        fields["intermediate_size"] = ffn.shape[1]
    if "pooler.mlp.fc1.weight" in tensors:
        fields["pooler_intermediate_size"] = tensors["pooler.mlp.fc1.weight"].shape[0]
    if "projection.weight" in tensors:
        fields["projection_dim"] = tensors["projection.weight"].shape[0]
    if "classifier.weight" in tensors:
        fields.setdefault("pooling", _pooling_of(tensors["classifier.weight"], width, origin))
        fields.setdefault("num_labels", tensors["classifier.weight"].shape[0])
    if fields["final_norm"] == "pooled" or not (fields["use_cls_token"] or fields["attention_pooler"]):
        fields["pooling"] = "mean_patch"
    fields.pop("mlp_ratio", None)  # intermediate_size is exact
    if "id2label" in fields:
        fields.pop("num_labels", None)
    return fields


def _placed_positions(
    origin: ForeignModel, pieces: list[Piece], table: Tensor, fields: dict[str, Any], patch: tuple[int, int]
) -> list[Piece]:
    """Find the grid of the position table, and add its rows of registers to the register tokens."""
    # The table is (1, prefix + N, D).
    rows, registers, has_cls = table.shape[1], fields["num_register_tokens"], fields["use_cls_token"]
    prefixes = dict.fromkeys((int(has_cls), 0, has_cls + registers))
    if "image_size" in fields:
        height, width = as_pair(fields["image_size"])
        fits = [prefix for prefix in prefixes if rows - prefix == (height // patch[0]) * (width // patch[1])]
    else:
        fits = [prefix for prefix in prefixes if rows > prefix and math.isqrt(rows - prefix) ** 2 == rows - prefix]
        if fits:
            side = math.isqrt(rows - fits[0])
            fields["image_size"] = side * patch[0] if patch[0] == patch[1] else [side * patch[0], side * patch[1]]
    if not fits:
        raise ConversionError(
            f"The position table of '{origin.name}' has {rows} rows, which does not match patch_size={patch} and "
            f"image_size={fields.get('image_size', 'a square')}. Pass image_size=[height, width] in pixels."
        )
    prefix = fits[0]
    fields["no_embed_class"] = has_cls and prefix == 0
    if not registers or prefix != has_cls + registers:
        return pieces
    placed = []
    for piece in pieces:
        if piece.target == "embeddings.position_embeddings":
            if has_cls:
                placed.append(replace(piece, count=0, place=0, stop=1))
            placed.append(replace(piece, count=0, place=int(has_cls), start=prefix))
        elif piece.target == "embeddings.register_tokens":
            placed.append(replace(piece, added=table[0, int(has_cls) : prefix]))
        else:
            placed.append(piece)
    return placed


def _rotated(pieces: list[Piece], config: RegViTConfig, neighbors: bool, columns_first: bool) -> list[Piece]:
    """Reorder the channels of queries and keys so that channel c rotates with c + d / 2, rows before columns.

    The scores of the attention stay the same, since the same order is used for both.
    """
    half = config.head_dim // 2
    pairs = torch.arange(half).roll(half // 2 if columns_first else 0)
    first, second = (2 * pairs, 2 * pairs + 1) if neighbors else (pairs, pairs + half)
    head = torch.cat([first, second])  # (d,)
    order = (torch.arange(config.num_attention_heads)[:, None] * config.head_dim + head).flatten()  # (D,)
    whole = torch.cat([order, order + len(order), torch.arange(len(order)) + 2 * len(order)])
    placed = []
    for piece in pieces:
        if ".attention.qkv." in piece.target and (piece.count == 1 or piece.place < 2):
            piece = replace(piece, order=whole if piece.count == 1 else order)
        placed.append(piece)
    return placed


def _pooling_of(classifier: Tensor, width: int, origin: ForeignModel) -> str:
    """Return the `pooling` of a classifier from the number of its inputs."""
    pooling = {width: "cls", 2 * width: "cls_mean_patch"}.get(classifier.shape[1])
    if pooling is None:
        raise ConversionError(
            f"The classifier of '{origin.name}' reads {classifier.shape[1]} features, expected {width} (CLS) or "
            f"{2 * width} (CLS and mean patch). Heads on several blocks cannot be expressed; pass only the backbone."
        )
    if "fc_norm.weight" not in origin.names and pooling == "cls" and origin.load is None:
        logger.warning(
            "Assuming that the classifier of '%s' reads CLS. Pass pooling='mean_patch' if it does not.", origin.name
        )
    return pooling


def _load(model: nn.Module, tensors: dict[str, Tensor], name: str) -> None:
    """Load all tensors into the model; raise if a name or shape does not match."""
    prefix = "regvit." if isinstance(model, RegViTForImageClassification) else ""
    placed = {key if key.startswith("classifier.") else prefix + key: value for key, value in tensors.items()}
    wanted = model.state_dict()
    if prefix and not any(key.startswith("regvit.pooler.") for key in wanted):
        placed = {key: value for key, value in placed.items() if not key.startswith("regvit.pooler.")}
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
    model.requires_grad_(True)
