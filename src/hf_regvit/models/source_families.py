"""Table of the families that `convert` knows: how RegViT expresses each, and why it cannot express others.

Most fields of `RegViTConfig` follow from the names and shapes of the tensors. The records hold what does not.
Source of names and numerics: the model files of transformers and timm; dinov3 `layers/rope_position_encoding.py`.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class ConversionError(ValueError):
    """Raised for a source that RegViT cannot express, or whose outputs differ after the conversion."""


# Fields that the shapes of a raw state dict do not determine. For families whose code fixes a value, it is filled in.
NOT_IN_SHAPES = {
    "num_attention_heads": "hidden_size / 64 in every released DINOv2 and most CLIP models",
    "interpolate_antialias": "True for DINOv2 with registers and timm, False for DINOv2 without registers and DINO",
    "interpolate_offset": "0.0 for DINOv2 with registers and timm, 0.1 for DINOv2 without registers and DINO",
    "layer_norm_eps": "1e-6 for DINOv2, DINO and timm",
    "hidden_act": "quick_gelu for CLIP of OpenAI and MetaCLIP, gelu for most OpenCLIP models",
}


@dataclass(frozen=True)
class SourceFamily:
    """Rules by which RegViT expresses one family of transformers.

    Args:
        fields: Fields of `RegViTConfig` that the code of the family fixes.
        copied: Fields of the configuration of the source that have the same name and meaning in `RegViTConfig`, in
            addition to those that all families have.
        refused: Reasons why a configuration cannot be expressed, with the tests for them.
        has_pooler: True if `pooler.dense` is the pooler of ViT, which reads CLS.
    """

    fields: Mapping[str, Any]
    copied: tuple[str, ...] = ()
    refused: Mapping[str, Callable[[Mapping[str, Any]], bool]] = field(default_factory=dict)
    has_pooler: bool = False


_PLAIN = {"interpolate_antialias": False, "interpolate_offset": 0.0}
_VIT = SourceFamily({**_PLAIN, "pooling": "cls"}, has_pooler=True)
_DINOV2 = SourceFamily({**_PLAIN, "pooling": "cls_mean_patch"}, ("reshape_hidden_states", "apply_layernorm"))
_WITH_REGISTERS = SourceFamily(
    {**_DINOV2.fields, "interpolate_antialias": True}, (*_DINOV2.copied, "num_register_tokens")
)
_CLIP = SourceFamily({**_PLAIN, "final_norm": "cls", "pooling": "mean_patch"})

SOURCES: dict[str, SourceFamily] = {
    "vit": _VIT,
    "deit": _VIT,
    "vit_mae": _VIT,
    "vit_msn": _VIT,
    "ijepa": SourceFamily({**_PLAIN, "use_cls_token": False, "pooling": "mean_patch"}),
    "dinov2": _DINOV2,
    "dinov2_with_registers": _WITH_REGISTERS,
    "dinov3_vit": SourceFamily(
        {"use_position_embeddings": False, "pooling": "cls_mean_patch"},
        (
            "num_register_tokens", "rope_theta", "key_bias", "pos_embed_shift", "pos_embed_jitter",
            "pos_embed_rescale", "reshape_hidden_states", "apply_layernorm",
        ),
        {"a gate with another activation than silu": lambda c: c["use_gated_mlp"] and c["hidden_act"] != "silu"},
    ),
    "clip_vision_model": _CLIP,
    "metaclip_2_vision_model": _CLIP,
    "siglip_vision_model": SourceFamily({**_PLAIN, "use_cls_token": False, "pooling": "mean_patch"}),
    "tipsv2_vision_model": replace(
        _WITH_REGISTERS, fields={**_WITH_REGISTERS.fields, "interpolate_mode": "bilinear", "pooling": "cls"}
    ),
}  # fmt: skip

# Fields that every family of transformers has, under the same name and with the same meaning.
COMMON_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "mlp_ratio", "hidden_act",
    "layer_norm_eps", "initializer_range", "image_size", "patch_size", "num_channels", "use_swiglu_ffn",
    "drop_path_rate", "id2label", "label2id", "problem_type", "out_features", "out_indices",
)  # fmt: skip

_WINDOWS = "it has windows or stages of several resolutions"
_UNSUITABLE = {
    "aimv2_vision_model": "it normalizes with RMSNorm",
    "pixio": "its pooled output is the mean of several class tokens",
    "radio": "it normalizes its pixels in the model, and its summary is made of several class tokens",
    "siglip2_vision_model": "it takes packed patches (NaFlex); SigLIP 2 of a fixed resolution can be converted",
    "NaFlexVit": "it takes packed patches; the models of timm without `naflex` in their name can be converted",
    **dict.fromkeys(("beit", "data2vec-vision", "Beit"), "its attention adds a bias for relative positions"),
    **dict.fromkeys(("dinov3_convnext", "convnext", "convnextv2", "resnet"), "it is a convolutional network"),
    **dict.fromkeys(("hiera", "swin", "swinv2", "pvt", "sam_vision_model"), _WINDOWS),
}


def refusal(kind: str) -> ConversionError:
    """Create the error for a family of transformers that is not in the table."""
    reason = _UNSUITABLE.get(kind, "its family is not in the table of `convert`")
    return ConversionError(
        f"model_type '{kind}' cannot be converted: {reason}. RegViT expresses {', '.join(SOURCES)}, and plain ViTs of "
        "timm."
    )


def transformers_fields(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the config fields of a tower of transformers.

    Args:
        config: Configuration of the tower, as it is in its file.
        tensors: Tensors of the tower by their names without a prefix.
    """
    from transformers import CONFIG_MAPPING

    kind = config["model_type"]
    if kind not in SOURCES:
        raise refusal(kind)
    family = SOURCES[kind]
    # Fields missing from the file have the defaults of their family, not those of RegViT.
    try:
        full = CONFIG_MAPPING[kind].from_dict(dict(config)).to_dict()
    except (StrictDataclassError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise ConversionError(f"The configuration is not valid for model_type '{kind}': {error}") from error
    if refused := [reason for reason, applies in family.refused.items() if applies(full)]:
        raise ConversionError(f"The model of type '{kind}' has {' and '.join(refused)}, which RegViT cannot express.")
    names = COMMON_FIELDS + family.copied
    fields = {name: full[name] for name in names if full.get(name) not in (None, {})}  # without labels: our default
    fields = {**fields, **family.fields}
    if "reshape_hidden_states" in family.copied:
        fields["return_register_tokens"] = not full["reshape_hidden_states"]
    if family.has_pooler and "pooler.dense.weight" in tensors:
        fields["pooler_act"] = full["pooler_act"]
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout"):
        if full.get(name):
            logger.warning("%s=%s has no counterpart in RegViT; only further training differs.", name, full[name])
    return fields


# --- OpenCLIP ---


def open_clip_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config fields of a vision transformer of OpenCLIP; raise if RegViT lacks one of its features.

    Args:
        config: The `model_cfg` of `open_clip_config.json`. Missing entries have the defaults of OpenCLIP.

    Source of names and defaults: open_clip `model.py`, `CLIPVisionCfg`, and `transformer.py`, `VisionTransformer`.
    """
    vision = config["vision_cfg"]
    act, pool = vision.get("act_kwargs") or {}, vision.get("pool_type", "tok")
    norms = {("tok", False): "tokens", ("tok", True): "cls", ("avg", True): "pooled"}
    final_norm = norms.get((pool, bool(vision.get("final_ln_after_pool"))))
    refused = ["a convolutional network"] * isinstance(vision.get("layers"), list)
    refused += [f"act_kwargs={act}"] * (act not in ({}, {"approximate": "tanh"}))
    refused += [f"pool_type='{pool}' after the final norm"] * (final_norm is None)
    if refused:
        raise ConversionError(f"The OpenCLIP model has {' and '.join(refused)}, which RegViT cannot express.")
    gelu = "gelu_pytorch_tanh" if act else "gelu"
    return {
        "num_attention_heads": vision.get("width", 768) // vision.get("head_width", 64),
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else gelu,
        "layer_norm_eps": (vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        "image_size": vision.get("image_size", 224),
        "final_norm": final_norm,
    }


# --- timm ---

_GELU = {"GELU": "gelu", "SiLU": "silu", "ReLU": "relu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh"}


def _is(module: object, *names: str) -> bool:
    return type(module).__name__ in names


def _has(module: object) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _timm_refusals(model: Any) -> list[str]:
    """Return the features of a timm model that RegViT lacks."""
    block = model.blocks[0]
    if not _is(block, "Block", "EvaBlock"):
        return [f"blocks of type {type(block).__name__}"]
    attention, mlp, pool = block.attn, block.mlp, model.global_pool
    rope: Any = getattr(model, "rope", None)
    is_gated, is_vit = not _is(mlp, "Mlp"), _is(model, "VisionTransformer", "VisionTransformerDistilled")
    is_axial, is_centered = _is(rope, "RotaryEmbeddingCat"), _is(rope, "RotaryEmbeddingDinoV3")
    pooled, proj = _has(model.attn_pool), getattr(model.patch_embed, "proj", None)
    refusals = {
        f"attention {type(attention).__name__}": not _is(attention, "Attention", "AttentionRope", "EvaAttention"),
        "attention with a gate": _has(getattr(attention, "gate", None)),
        "attention with fewer heads of keys": getattr(attention, "num_kv_groups", 1) != 1,
        "attention of another width": attention.head_dim * attention.num_heads != model.embed_dim,
        "normalized queries and keys (qk_norm)": _has(attention.q_norm),
        f"MLP {type(mlp).__name__}": not _is(mlp, "Mlp", "GluMlp", "SwiGLU"),
        f"a gate with {type(mlp.act).__name__}": is_gated and not isinstance(mlp.act, nn.SiLU),
        "a gate in the second half": getattr(mlp, "gate_last", False),
        f"norms of type {type(block.norm1).__name__}": not isinstance(block.norm1, nn.LayerNorm),
        "LayerScale on one branch only": getattr(block, "gamma_1", None) is not None and block.gamma_2 is None,
        f"global_pool '{pool}'": pool not in ("token", "avg", "", "map"),
        "a classifier on every token": pool == "" and model.num_classes > 0,
        "pooling over prefix tokens": getattr(model, "pool_include_prefix", False),
        "two final norms": _has(model.norm) and _has(model.fc_norm),
        "attention pooling that skips CLS": pooled and is_vit and model.has_class_token,
        "attention pooling that reads registers": pooled and not is_vit and model.reg_token is not None,
        f"positions of type {type(rope).__name__}": rope is not None and not (is_axial or is_centered),
        "augmented rotary positions in another unit": is_axial and rope.aug_active,
        "rotary positions in pixels": is_axial and (rope.in_pixels or rope.grid_type != "index"),
        "rotary positions of another scale": is_centered
        and (rope.normalize_coords != "separate" or rope.grid_offset or rope.temperature is None),
        "a patch embedding that is not one convolution": not isinstance(proj, nn.Conv2d)
        or hasattr(model.patch_embed, "backbone"),
        "a norm in the patch embedding": _has(getattr(model.patch_embed, "norm", None)),
    }
    return [name for name, applies in refusals.items() if applies]


def timm_fields(model: Any) -> tuple[dict[str, Any], tuple[bool, bool]]:
    """Return the config fields of a plain ViT of timm and two flags; raise if RegViT lacks one of its features.

    The flags say whether the channels that rotate together are neighbors, and whether those of the columns come first.
    """
    if refused := _timm_refusals(model):
        raise ConversionError(f"The timm model has {' and '.join(refused)}, which RegViT cannot express.")
    block = model.blocks[0]
    rope: Any = getattr(model, "rope", None)
    act = type(block.mlp.act).__name__ if _is(block.mlp, "Mlp") else "GELU"  # a gate has its own
    (rows, columns), (height, width) = model.patch_embed.grid_size, model.patch_embed.patch_size
    if _has(model.fc_norm):
        final_norm = "pooled" if model.global_pool == "avg" else "cls"
    else:
        final_norm = "tokens" if _has(model.norm) else "none"
    fields = {
        "num_attention_heads": block.attn.num_heads,
        "layer_norm_eps": block.norm1.eps,
        "hidden_act": _GELU.get(act, act),
        "image_size": rows * height if rows * height == columns * width else [rows * height, columns * width],
        "no_embed_class": model.no_embed_class,
        "interpolate_antialias": True,
        "interpolate_offset": 0.0,
        "final_norm": final_norm,
        "pooling": "mean_patch" if model.global_pool == "avg" else "cls",
    }
    if _has(model.attn_pool):
        fields["pooler_num_heads"] = model.attn_pool.num_heads
    if _is(rope, "RotaryEmbeddingDinoV3"):
        fields |= {f"pos_embed_{name}": getattr(rope, f"{name}_coords") for name in ("shift", "jitter", "rescale")}
        fields["rope_theta"] = float(rope.temperature)
    elif rope is not None:
        reference = None if rope.ref_feat_shape is None else list(rope.ref_feat_shape)
        fields |= {"rope_theta": float(rope.temperature), "rope_coordinates": "index"}
        fields |= {"rope_grid_offset": float(rope.grid_offset), "rope_reference_grid": reference}
    return fields, (rope is not None and not block.attn.rotate_half, rope is not None and rope.grid_indexing == "xy")
