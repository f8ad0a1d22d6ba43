"""Table of the supported families of vision transformers: where each keeps its blocks, projections and norms.

All differences between models are data in this table, one record per family. `read_tokens` in `tokens` uses it.

Token order is `[CLS | distillation | registers | patches]`; a model may lack some of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

IN_PLACE = "test_time_registers"  # attribute of repaired blocks, and of the tokens that they pass on
TIMM_CLASSES = {"VisionTransformer": "timm", "Eva": "timm_eva"}
# Attentions whose weights are the softmax of scaled products of queries and keys, after the norms and the rotation of
# the family. Others may have the same projections and another formula, such as the differential attention of timm.
_SOFTMAX_ATTENTIONS = {
    "timm": ("Attention", "AttentionRope", "EvaAttention"),
    "hf_regvit": ("RegViTAttention",),
    "transformers_modules": ("RegViTAttention",),  # the code that is saved beside the weights
}


def is_softmax_attention(attention: nn.Module) -> bool:
    """Return True if the weights of this attention can be computed from its queries and keys."""
    library, kind = type(attention).__module__.split(".")[0], type(attention).__name__
    return library == "transformers" or kind in _SOFTMAX_ATTENTIONS.get(library, ())


def _family_name(module: nn.Module) -> str | None:
    """Return the family key of this module itself, ignoring its submodules."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("timm.") and cls.__name__ in TIMM_CLASSES:
            return TIMM_CLASSES[cls.__name__]
    # Its own attribute only: wrappers such as those of torch.compile and PEFT pass on the attributes of their model.
    model_type = getattr(vars(module).get("config"), "model_type", None)
    return model_type if model_type in FAMILIES else None


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of `torch.compile`, data parallelism and weight averaging."""
    inner: str | None = ""
    while isinstance(model, nn.Module) and inner is not None:
        model = model.get_submodule(inner)
        wraps = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel)
        names = ("_orig_mod", "_fsdp_wrapped_module", *["module"] * wraps)
        inner = next((name for name in names if name in model._modules), None)
    return model


def has_part(module: nn.Module, path: str) -> bool:
    """Return True if the module has a submodule at `path`, in the form of `get_submodule`."""
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def find_tower(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the vision tower inside a classifier, a two-tower model or another wrapper, and its family name.

    Raises:
        TypeError: `model` is not a torch module.
        ValueError: No module of the model belongs to a family in the table.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, expected a torch module. To load a folder or Hub id, use open_model."
        )
    for module in model.modules():  # outermost first: parts of a tower share its config but lack some of its paths
        name = _family_name(module)
        if name and has_part(module, FAMILIES[name].blocks) and has_part(module, FAMILIES[name].patch_projection):
            return module, name
    raise unknown_family(getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__)


def unknown_family(kind: str) -> ValueError:
    """Create the error for a model whose kind is not in the family table."""
    reasons = {"radio": "C-RADIO can be read from timm's vit_*_radio_v3 and vit_*_radio_v4"}
    reasons |= dict.fromkeys(("beit", "Beit"), "BEiT adds a bias to its attention for every pair of positions")
    reason = reasons.get(kind, "models with windows, stages or convolutions have no global patch tokens to read")
    return ValueError(
        f"model_type '{kind}' is not in the family table ({', '.join(FAMILIES)}). Use a plain vision transformer of "
        f"one of these families; {reason}."
    )


@dataclass(frozen=True)
class ModelDescription:
    """Sizes and token layout of a model; `patch_size` and `image_size` are (height, width) in pixels."""

    name: str
    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    patch_size: tuple[int, int]
    image_size: tuple[int, int]
    has_cls: bool
    num_distillation_tokens: int
    num_register_tokens: int

    @property
    def is_timm(self) -> bool:
        """True for timm models, which have their own transforms and resizing options."""
        return self.family in TIMM_CLASSES.values()

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patches."""
        return int(self.has_cls) + self.num_distillation_tokens + self.num_register_tokens


def as_pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) for a size given as one number or as a pair."""
    if not isinstance(value, int) and len(value) != 2:
        raise ValueError(f"The size {value} must be one number or a (height, width) pair, e.g. 224.")
    height, width = (value, value) if isinstance(value, int) else value
    return int(height), int(width)


def describe_model(model: nn.Module) -> ModelDescription:
    """Return the sizes and the token layout of any model that `read_tokens` supports.

    Raises:
        ValueError: The model does not belong to a family in the table.
    """
    tower, name = find_tower(model)
    return describe_tower(tower, name)


def describe_tower(tower: Any, name: str) -> ModelDescription:
    """Return what `describe_model` returns, for a tower and its family name as returned by `find_tower`."""
    family = FAMILIES[name]
    blocks = tower.get_submodule(family.blocks)
    in_place = vars(unwrapped(blocks[0])).get(IN_PLACE, (0, 0))[1]
    if name not in TIMM_CLASSES.values():
        config = tower.config
        return ModelDescription(
            name=_name_of(config.name_or_path) or type(tower).__name__,
            family=name,
            num_layers=len(blocks),
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            patch_size=as_pair(config.patch_size),
            image_size=as_pair(config.image_size),
            has_cls=bool(family.has_cls) and getattr(config, "use_cls_token", True),
            num_distillation_tokens=family.num_distillation_tokens,
            num_register_tokens=getattr(config, "num_register_tokens", 0) + in_place,
        )
    image_size = as_pair(tower.patch_embed.img_size)
    registers = 0 if tower.reg_token is None else tower.reg_token.shape[1]
    has_cls = tower.cls_token is not None
    return ModelDescription(
        name=(getattr(tower, "pretrained_cfg", None) or {}).get("architecture") or type(tower).__name__,
        family=name,
        num_layers=len(blocks),
        hidden_size=tower.embed_dim,
        num_heads=getattr(getattr(blocks[0], family.attention, None), "num_heads", 0),
        # Do not use `patch_embed.patch_size`: after a CNN stem, its unit is cells of the feature map, not pixels.
        patch_size=as_pair([size // cells for size, cells in zip(image_size, tower.patch_embed.grid_size)]),
        image_size=image_size,
        has_cls=has_cls,
        num_distillation_tokens=tower.num_prefix_tokens - registers - int(has_cls),
        num_register_tokens=registers + in_place,
    )


def join_registers(tokens: Tensor, prefix: int) -> Tensor:
    """Insert registers that a repaired block passes on beside its tokens (B, T, D) behind the first `prefix` ones."""
    registers = getattr(tokens, IN_PLACE, None)
    return tokens if registers is None else torch.cat([tokens[:, :prefix], registers, tokens[:, prefix:]], dim=1)


def part_registers(tokens: Tensor, prefix: int, count: int) -> Tensor:
    """Undo `join_registers`."""
    rest = torch.cat([tokens[:, :prefix], tokens[:, prefix + count :]], dim=1)
    setattr(rest, IN_PLACE, tokens[:, prefix : prefix + count])
    return rest


def _name_of(source: str) -> str:
    """Return a Hub id unchanged and a folder without its parents, since names appear in published reports."""
    return Path(source).name if Path(source).is_dir() or Path(source).is_absolute() else source


def final_norm(model: nn.Module) -> nn.Module:
    """Return the norm that the model applies to the tokens of its last block.

    For a model that normalizes only a pooled vector, this is the identity. CLIP normalizes only CLS, but its norm is
    returned nevertheless, because dense features of CLIP usually pass through it.
    """
    tower, name = find_tower(model)
    if getattr(getattr(tower, "config", None), "final_norm", "tokens") in ("pooled", "none"):
        return nn.Identity()
    return tower.get_submodule(FAMILIES[name].final_norm)


@dataclass(frozen=True)
class Family:
    """Record of the modules that `read_tokens` reads in one family of models; paths are as in `get_submodule`.

    Args:
        blocks: Path from the tower to the list of its blocks.
        patch_projection: Path from the tower to the convolution that creates the patch tokens.
        final_norm: Path from the tower to the norm of the last block's tokens.
        attention: Path from a block to its attention.
        projections: Paths from the attention to the linear layers of query, key and value. There may be several
            candidates for each, because names changed between releases of transformers; the first that exists is used.
            If one fused layer computes all three, it is called `qkv`, and this field is not used.
        mlp_output: Paths from a block to the linear layer that reads the MLP activations; the first that exists is
            used.
        attention_output: Paths from the attention to its output projection; the first that exists is used.
        attention_scale: Paths from a block to the LayerScale of its attention, if any.
        has_cls: True if a CLS token comes first, or None if the tower itself provides this information (timm).
        num_distillation_tokens: Number of tokens between CLS and registers.
        rotary: Name of the argument that passes the rotary angles for queries and keys of patches to the attention,
            or None if the family has no rotary positions. A block that passes no angles has no rotation.
        qk_norms: Paths from the attention to the norms of queries and keys, which are applied per head.
        resize_switch: True if sizes other than the native one need `interpolate_pos_encoding=True`.
    """

    blocks: str
    patch_projection: str
    final_norm: str
    attention: str = "attention"
    projections: tuple[tuple[str, ...], ...] = (("q_proj",), ("k_proj",), ("v_proj",))
    mlp_output: tuple[str, ...] = ("mlp.fc2", "mlp.down_proj")
    attention_output: tuple[str, ...] = ("o_proj", "out_proj", "output.dense")
    attention_scale: tuple[str, ...] = ("layer_scale1.lambda1",)
    has_cls: bool | None = True
    num_distillation_tokens: int = 0
    rotary: Literal["rotary", "position_embeddings", "rope"] | None = None
    qk_norms: tuple[str, str] | None = None
    resize_switch: bool = False


_VIT = Family("layers", "embeddings.patch_embeddings.projection", "layernorm", resize_switch=True)
_DINOV2 = Family(
    "encoder.layer",
    "embeddings.patch_embeddings.projection",
    "layernorm",
    projections=(("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value")),
    mlp_output=("mlp.fc2", "mlp.down_proj", "mlp.weights_out"),
)
_CLIP = Family("encoder.layers", "embeddings.patch_embedding", "post_layernorm", "self_attn", resize_switch=True)
_TIMM = Family(
    "blocks",
    "patch_embed.proj",
    "norm",
    "attn",
    attention_output=("proj",),
    attention_scale=("ls1.gamma", "gamma_1"),
    has_cls=None,
    qk_norms=("q_norm", "k_norm"),
)

FAMILIES: dict[str, Family] = {
    "regvit": Family("layers", "embeddings.patch_embeddings.projection", "layernorm", rotary="rotary"),
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "dinov3_vit": Family("model.layer", "embeddings.patch_embeddings", "norm", rotary="position_embeddings"),
    "vit": _VIT,
    "vit_mae": _VIT,
    "vit_msn": _VIT,
    "deit": replace(_VIT, num_distillation_tokens=1),
    "ijepa": replace(_VIT, has_cls=False),
    "clip_vision_model": _CLIP,
    "metaclip_2_vision_model": _CLIP,
    "siglip_vision_model": replace(_CLIP, has_cls=False),
    "tipsv2_vision_model": _DINOV2,
    "aimv2_vision_model": Family(
        "encoder.layers", "embeddings.patch_embed", "rms_norm", mlp_output=("ffn.down_proj",), has_cls=False
    ),
    "timm": _TIMM,
    "timm_eva": replace(_TIMM, rotary="rope"),
}


def attention_output(block: nn.Module, family: Family) -> Tensor | None:
    """Return the weight (D, heads * head_dim) with which a block adds its heads to the tokens, LayerScale included.

    Returns:
        None if the output projection is not an ordinary linear layer.
    """
    attention = unwrapped(block.get_submodule(family.attention))
    path = next((path for path in family.attention_output if has_part(attention, path)), None)
    weight = None if path is None else getattr(attention.get_submodule(path), "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
        return None
    weight = weight.detach().float()
    for path in family.attention_scale:
        owner, _, name = path.rpartition(".")
        scale = getattr(block.get_submodule(owner), name, None) if has_part(block, owner) else None
        if scale is not None:
            weight = weight * scale.detach().float()[:, None]
    return weight
