# Copyright 2026 The hf_regvit developers. Licensed under the Apache License, Version 2.0.
"""Configuration of RegViT, a plain vision transformer with register tokens (arXiv 2309.16588).

This file and the modeling file are copied unchanged into every checkpoint on the Hub, so this file is self-contained
and depends only on transformers, huggingface_hub and safetensors.
"""

import difflib
import json
import math
import os
from pathlib import Path

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

logger = logging.get_logger(__name__)

__version__ = "0.1.0"

# Every auto class with its RegViT class. By itself, transformers would write only the class that was saved. AutoModel,
# AutoBackbone and the feature-extraction pipeline could then not load the repository of a classifier on machines
# without this package.
AUTO_MAP = {
    "AutoConfig": "configuration_regvit.RegViTConfig",
    "AutoModel": "modeling_regvit.RegViTModel",
    "AutoBackbone": "modeling_regvit.RegViTBackbone",
    "AutoModelForImageClassification": "modeling_regvit.RegViTForImageClassification",
    "AutoModelForSemanticSegmentation": "modeling_regvit.RegViTForSemanticSegmentation",
    "AutoModelForDepthEstimation": "modeling_regvit.RegViTForDepthEstimation",
}

# Widths, depths and heads: tiny from DeiT (arXiv 2012.12877), the others from DINOv2 (arXiv 2304.07193, table 17).
PRESETS: dict[str, dict] = {
    "tiny": {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3},
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "giant": {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True},
}

# Far above the largest published model (22 B parameters), but low enough to catch typing errors.
MAX_PARAMETERS = 100e9

# About ten times the size of a config with all 21,841 class names of ImageNet-21k.
MAX_CONFIG_BYTES = 16 * 2**20

# Keywords that are not fields of RegViTConfig but are passed by config files and by transformers itself.
_FOREIGN_KEYWORDS = {
    "model_type", "auto_map", "stage_names", "out_features", "out_indices", "num_labels", "torch_dtype",
    "name_or_path",
    "output_attentions", "attn_implementation", "experts_implementation", "per_layer_config", "use_cache",
    "custom_pipelines", "quantization_config", "hf_regvit_version", "transformers_version", "transformers_weights",
    "tie_word_embeddings", "finetuning_task", "task_specific_params", "tokenizer_class", "pad_token_id",
    "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "add_cross_attention", "is_decoder",
    "cross_attention_hidden_size", "is_encoder_decoder", "chunk_size_feed_forward", "output_hidden_states",
    "return_dict",
}  # fmt: skip


class ConfigError(StrictDataclassError, ValueError):
    """Raised for an invalid config value; the message names the field, the value and a valid alternative."""


class CheckpointError(ValueError, RuntimeError):
    """Raised for missing, unexpected or mismatched tensors; transformers raises a RuntimeError for wrong shapes."""


class CheckpointCorruptError(CheckpointError):
    """Raised for a weights file that cannot be read."""


def _pair(value: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) for a size given as one number or as a pair."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _foreign_entries(auto_map: dict | None) -> dict:
    """Return the entries of an `auto_map` that do not name a RegViT class, with or without a repository prefix."""
    return {
        auto_class: name
        for auto_class, name in (auto_map or {}).items()
        if not (isinstance(name, str) and name.split("--")[-1] == AUTO_MAP.get(auto_class))
    }


@strict
class RegViTConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a RegViT model. The defaults give a ViT-B/16 with 4 registers and the training settings of DINOv2.
    The fields also express ViT, DeiT, DINO, DINOv2, DINOv3, CLIP, SigLIP, EVA-02, PE, MAE and I-JEPA models exactly
    (see `hf_regvit.convert`).

    Args:
        num_register_tokens (`int`, *optional*, defaults to 4):
            Number R of learnable tokens between CLS and patches. 0 gives a plain ViT; the paper uses 4.
        image_size (`int` or pair, *optional*, defaults to 224):
            Height and width in pixels of the images for which the position table is stored. For other input sizes,
            the table is resampled.
        patch_size (`int` or pair, *optional*, defaults to 16):
            Height and width of a patch in pixels.
        num_channels (`int`, *optional*, defaults to 3):
            Number of channels of `pixel_values`.
        hidden_size (`int`, *optional*, defaults to 768):
            Width D of a token.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Number L of blocks.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Number of attention heads per block. It must divide `hidden_size`.
        mlp_ratio (`float`, *optional*, defaults to 4):
            Ratio of the MLP's hidden width to `hidden_size`. A SwiGLU uses two thirds of that width, rounded up to a
            multiple of 8.
        intermediate_size (`int`, *optional*):
            Hidden width of the MLP (or of one half of the SwiGLU) if `mlp_ratio` cannot express it.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the MLP. `"gelu"` is the exact GELU.
        use_swiglu_ffn (`bool`, *optional*, defaults to `False`):
            Whether to use a SwiGLU instead of the two-layer MLP.
        qkv_bias, proj_bias, mlp_bias (`bool`, *optional*, default to `True`):
            Whether to add biases to the fused query-key-value projection, the output projection and the MLP.
        key_bias (`bool`, *optional*, defaults to `True`):
            Whether to add the bias of the fused projection to the keys, too; DINOv3 and EVA do not.
        attention_norm, mlp_norm (`bool`, *optional*, default to `False`):
            Whether to normalize the input of the last linear layer of the attention and of the MLP (EVA-02).
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of every LayerNorm.
        layerscale_value (`float`, *optional*, defaults to 1e-5):
            Initial value of LayerScale. The default is the training value of DINOv2; `None` disables LayerScale.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation for initializing linear weights and the position table.
        register_init_std (`float`, *optional*, defaults to 0.02):
            Standard deviation for initializing the registers. It must not be 0: identical registers always get
            identical gradients.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Share of residual branches that are dropped in training.
        drop_path_mode (`str`, *optional*, defaults to `"sample"`):
            `"sample"` draws per sample and branch; `"batch_subset"` computes each branch for a random
            `max(int(B * (1 - rate)), 1)` of the B samples, as DINOv2 does, which also saves computation.
        drop_path_uniform (`bool`, *optional*, defaults to `True`):
            Whether to use the same rate in every block; otherwise the rate rises linearly from 0.
        use_cls_token (`bool`, *optional*, defaults to `True`):
            Whether to create a CLS token. Without it (SigLIP, I-JEPA), `pooler_output` is the mean of the patches.
        use_mask_token (`bool`, *optional*, defaults to `False`):
            Whether to create a learnable token for `bool_masked_pos`. Only pretraining needs it.
        use_position_embeddings (`bool`, *optional*, defaults to `True`):
            Whether to add a learned position table to the patches. DINOv3 has only rotary positions.
        no_embed_class (`bool`, *optional*, defaults to `False`):
            Whether to leave CLS out of the position table (`no_embed_class` in timm).
        interpolate_mode (`str`, *optional*, defaults to `"bicubic"`):
            Interpolation of the position table: `"bicubic"`, `"bilinear"`, or `"radio"`, which resamples bilinearly
            to a square that covers the grid and crops it.
        interpolate_antialias (`bool`, *optional*, defaults to `True`):
            Whether to antialias when the position table is resampled. The official DINOv2 models use True with
            registers and False without.
        interpolate_offset (`float`, *optional*, defaults to 0.0):
            Number of cells added to the target grid to compute scale factors. The official DINOv2 models without
            registers use 0.1.
        rope_theta (`float`, *optional*):
            Base of the periods of rotary positions, which rotate queries and keys of the patches. `None` disables
            them; DINOv3 uses 100.
        rope_periods (`list[float]`, *optional*):
            The head width / 4 periods, if the formula `rope_theta ** (4 * j / head width)` does not give them.
        rope_coordinates (`str`, *optional*, defaults to `"centered"`):
            `"centered"` scales the patch centers of every grid to [-1, 1], times 2 pi (DINOv3); `"index"` counts rows
            and columns (EVA-02, PE).
        rope_grid_offset (`float`, *optional*, defaults to 0.0):
            Number added to index coordinates.
        rope_reference_grid (`list[int]`, *optional*):
            Grid (rows, columns) to which index coordinates of other grids are scaled. `None` does not scale them.
        pos_embed_shift, pos_embed_jitter, pos_embed_rescale (`float`, *optional*):
            Random augmentation of centered coordinates in training, drawn once per forward: a shift of each axis in
            [-shift, shift], a factor of each axis in [1 / jitter, jitter], and a factor of both in
            [1 / rescale, rescale]. DINOv3 is trained with a rescale of 2.
        embedding_norm (`bool`, *optional*, defaults to `False`):
            Whether to normalize all tokens before the first block (CLIP, PE).
        final_norm (`str`, *optional*, defaults to `"tokens"`):
            `"tokens"` normalizes the whole sequence; `"cls"` normalizes only the `pooler_output`, which is CLS (CLIP);
            `"pooled"` normalizes only the mean of the patch tokens, which is then the `pooler_output` (`fc_norm` in
            timm); `"none"` normalizes nothing (PE-Spatial).
        pooler_act (`str`, *optional*):
            Activation of an additional dense layer on CLS (`"tanh"` in the original ViT). `None` adds no such layer.
        attention_pooler (`bool`, *optional*, defaults to `False`):
            Whether to compute `pooler_output` as attention of a learned query to CLS and patches (SigLIP, PE-Core).
        pooler_num_heads, pooler_intermediate_size (`int`, *optional*):
            Number of heads and hidden MLP width of the attention pooler; `None` uses those of the blocks.
        projection_dim (`int`, *optional*):
            Width of `image_embeds`, a linear projection of `pooler_output` (CLIP). `None` adds no projection.
        discard_registers (`bool`, *optional*, defaults to `False`):
            Whether to leave the registers out of `last_hidden_state`, as the paper does.
        register_neurons (`list[list[int]]`, *optional*):
            Test-time registers (arXiv 2506.08010): `[block, neuron]` pairs, counted from 0, of MLP neurons whose
            artifacts are moved from the patches to the registers. `hf_regvit.retrofit` finds them.
        num_test_time_registers (`int`, *optional*):
            Number of registers, the last ones, that these neurons write into; `None` means all of them.
        register_sizes (`list[int]`, *optional*):
            Image sizes in pixels at which these neurons were shown to remove the outliers. Images that are larger or
            smaller cause a warning.
        pooling (`str`, *optional*, defaults to `"cls_mean_patch"`):
            Input of the image classifier: `"cls"` (the `pooler_output`: CLS or the attention pooler),
            `"cls_mean_patch"` (this and the mean patch, concatenated) or `"mean_patch"`. Registers are never included.
        head_layers (`list[int]`, *optional*, defaults to `[-1]`):
            Blocks whose normalized tokens the segmentation and depth heads read, e.g. `[-4, -3, -2, -1]`.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255):
            Class id that the segmentation loss ignores.
        num_depth_bins (`int`, *optional*, defaults to 256), min_depth, max_depth (`float`, default to 0.001 and 10):
            Number of depth bins, and the first and last bin center in meters.
        apply_layernorm, reshape_hidden_states (`bool`, *optional*, default to `True`):
            For the backbone: whether to normalize the feature maps, and whether to return them as
            (B, D, rows, columns) rather than (B, 1+N, D).
        return_register_tokens (`bool`, *optional*, defaults to `False`):
            For the backbone with `reshape_hidden_states=False`: whether to keep the registers between CLS and patches.
            They are dropped by default, because DPT and other models expect exactly one token before the patches.

    Raises:
        ConfigError: A value is out of range, `num_attention_heads` does not divide `hidden_size`, or `image_size` is
            not a multiple of `patch_size`.

    Example:

    ```python
    >>> from hf_regvit import RegViTConfig, RegViTModel

    >>> model = RegViTModel(RegViTConfig.from_preset("small", patch_size=14, image_size=518))
    ```"""

    model_type = "regvit"

    num_register_tokens: int = 4
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: float | int = 4
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    use_swiglu_ffn: bool = False
    qkv_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    key_bias: bool = True
    attention_norm: bool = False
    mlp_norm: bool = False
    layer_norm_eps: float | int = 1e-6
    layerscale_value: float | int | None = 1e-5
    initializer_range: float | int = 0.02
    register_init_std: float | int = 0.02
    drop_path_rate: float | int = 0.0
    drop_path_mode: str = "sample"
    drop_path_uniform: bool = True
    use_cls_token: bool = True
    use_mask_token: bool = False
    use_position_embeddings: bool = True
    no_embed_class: bool = False
    interpolate_mode: str = "bicubic"
    interpolate_antialias: bool = True
    interpolate_offset: float | int = 0.0
    rope_theta: float | int | None = None
    rope_periods: list[float | int] | tuple[float | int, ...] | None = None
    rope_coordinates: str = "centered"
    rope_grid_offset: float | int = 0.0
    rope_reference_grid: list[int] | tuple[int, int] | None = None
    pos_embed_shift: float | int | None = None
    pos_embed_jitter: float | int | None = None
    pos_embed_rescale: float | int | None = None
    embedding_norm: bool = False
    final_norm: str = "tokens"
    pooler_act: str | None = None
    attention_pooler: bool = False
    pooler_num_heads: int | None = None
    pooler_intermediate_size: int | None = None
    projection_dim: int | None = None
    discard_registers: bool = False
    register_neurons: list[list[int]] | None = None
    num_test_time_registers: int | None = None
    register_sizes: list[int] | None = None
    pooling: str = "cls_mean_patch"
    head_layers: list[int] | tuple[int, ...] = (-1,)
    semantic_loss_ignore_index: int = 255
    num_depth_bins: int = 256
    min_depth: float | int = 0.001
    max_depth: float | int = 10.0
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    return_register_tokens: bool = False
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self._warn_about_unknown(kwargs)
        self._warn_about_newer(kwargs.pop("hf_regvit_version", None))
        if (num_labels := kwargs.get("num_labels")) is not None and num_labels < 1:
            raise ConfigError(f"num_labels={num_labels} is out of range: a head must have at least 1 label, e.g. 2.")
        kwargs.pop("stage_names", None)  # computed by the property of this name
        kwargs.pop("use_cache", None)  # Trainer writes it into every config, but a ViT has no cache
        self.validate_architecture()
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        given_map = kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)
        if sorted(self.id2label) != list(range(max(len(self.id2label), 1))):
            raise ConfigError(
                f"id2label has the keys {sorted(self.id2label)[:10]}, expected one name for each output of the head, "
                "numbered from 0, e.g. {0: 'cat', 1: 'dog'}."
            )
        # Always point to the files of this package and not to the repository that was loaded, because save_pretrained
        # copies them next to the weights. Entries for other classes, such as user subclasses, are kept.
        self.auto_map = {**AUTO_MAP, **_foreign_entries(given_map)}

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "RegViTConfig":
        """Return the configuration of size `tiny`, `small`, `base`, `large` or `giant`; keywords override fields."""
        if name not in PRESETS:
            raise ConfigError(f"Unknown preset {name!r}. Use one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def image_shape(self) -> tuple[int, int]:
        """Image size (height, width) in pixels for which the position table is stored."""
        return _pair(self.image_size)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """Patch size (height, width) in pixels."""
        return _pair(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Grid (rows, columns) of the stored position table."""
        return self.image_shape[0] // self.patch_shape[0], self.image_shape[1] // self.patch_shape[1]

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patches: CLS, if there is one, and the registers."""
        return self.use_cls_token + self.num_register_tokens

    @property
    def num_position_prefix(self) -> int:
        """Number of rows of the position table before those of the patches."""
        return int(self.use_position_embeddings and self.use_cls_token and not self.no_embed_class)

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    def warn_about_size(self, height: int, width: int) -> None:
        """Warn once if the test-time registers were not tested on images of this size in pixels."""
        sizes, area = self.register_sizes or [], height * width
        if sizes and not min(sizes) ** 2 <= area <= max(sizes) ** 2:
            logger.warning_once(
                f"The test-time registers were tested on images of {sizes} pixels, not on {(height, width)}. Outliers "
                f"may return. Test this size with: regvit retrofit --image_sizes {round(area**0.5)}"
            )

    def register_neurons_of(self, block: int) -> list[int]:
        """Return the neurons of a block (counted from 0) whose activations are moved to the registers."""
        return [neuron for where, neuron in self.register_neurons or () if where == block]

    @property
    def ffn_hidden_size(self) -> int:
        """Hidden width of the MLP, or of one half of the SwiGLU (DINOv2's rounding to a multiple of 8)."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        width = int(self.hidden_size * self.mlp_ratio)
        return (int(width * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else width

    @property
    def stage_names(self) -> list[str]:
        """Names of the backbone's feature maps, computed on access because `from_pretrained` overrides fields late."""
        return ["stem", *(f"stage{i}" for i in range(1, self.num_hidden_layers + 1))]

    def validate_architecture(self) -> None:
        """Validate every field; called at construction and again in `save_pretrained`."""
        for name, low, high in (
            ("hidden_size", 1, 65536), ("num_hidden_layers", 1, 1024), ("num_attention_heads", 1, 1024),
            ("num_register_tokens", 0, 1024), ("num_channels", 1, 4096), ("intermediate_size", 1, 1048576),
            ("num_depth_bins", 2, 65536), ("mlp_ratio", 1e-3, 1024), ("layer_norm_eps", 0, 1),
            ("layerscale_value", 1e-12, 1e3), ("initializer_range", 0, 10), ("register_init_std", 1e-12, 10),
            ("drop_path_rate", 0, 0.99), ("interpolate_offset", 0, 0.99), ("min_depth", 0, 1e6), ("max_depth", 0, 1e6),
            ("rope_theta", 1e-6, 1e12), ("rope_grid_offset", -65536, 65536), ("pos_embed_shift", 0, 1e3),
            ("pos_embed_jitter", 1, 1e3), ("pos_embed_rescale", 1, 1e3), ("pooler_num_heads", 1, 1024),
            ("pooler_intermediate_size", 1, 1048576), ("projection_dim", 1, 1048576),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                default = type(self).__dataclass_fields__[name].default
                raise ConfigError(f"{name}={value} is out of range: it must be in [{low}, {high}], e.g. {default}.")
        for name, allowed in (
            ("drop_path_mode", ("sample", "batch_subset")), ("pooling", ("cls", "cls_mean_patch", "mean_patch")),
            ("final_norm", ("tokens", "cls", "pooled", "none")), ("pooler_act", (None, "tanh", "gelu", "relu")),
            ("hidden_act", ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")),
            ("interpolate_mode", ("bicubic", "bilinear", "radio")), ("rope_coordinates", ("centered", "index")),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, allowed))}.")
        if "/" in str(getattr(self, "_attn_implementation", "")):
            raise ConfigError(
                f"attn_implementation={self._attn_implementation!r} would load code from the Hub. Use 'sdpa'."
            )
        self._validate_sizes()
        self._validate_register_neurons()
        self._validate_positions()
        self._validate_pooling()
        if missing := [name for name in self._out_features or () if name not in self.stage_names]:
            raise ConfigError(
                f"out_features={self._out_features} names {', '.join(missing)}, but num_hidden_layers="
                f"{self.num_hidden_layers} has the stages {self.stage_names[0]} to {self.stage_names[-1]}. Choose "
                "from these."
            )
        if self.min_depth >= self.max_depth:
            raise ConfigError(f"min_depth={self.min_depth} must be below max_depth={self.max_depth}, e.g. 0.001.")
        if not self.head_layers or any(
            not -self.num_hidden_layers <= i < self.num_hidden_layers for i in self.head_layers
        ):
            raise ConfigError(
                f"head_layers={list(self.head_layers)} must name blocks in "
                f"[{-self.num_hidden_layers}, {self.num_hidden_layers - 1}], e.g. [-1]."
            )
        if (count := self.num_parameters()) > MAX_PARAMETERS:
            raise ConfigError(
                f"hidden_size={self.hidden_size} with num_hidden_layers={self.num_hidden_layers} gives "
                f"{count / 1e9:,.0f} B parameters ({count * 4 / 2**30:,.0f} GiB in float32), more than the "
                f"limit of {MAX_PARAMETERS / 1e9:.0f} B. Use a smaller model; the preset 'giant' has hidden_size=1536 "
                "and num_hidden_layers=40."
            )

    def _validate_sizes(self) -> None:
        """Check sizes and their divisibility; the error names the nearest valid size."""
        if self.hidden_size % self.num_attention_heads:
            divisors = [n for n in range(1, self.hidden_size + 1) if self.hidden_size % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - self.num_attention_heads))
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}. "
                f"Use num_attention_heads={nearest}."
            )
        if self.ffn_hidden_size < 1:
            raise ConfigError(
                f"mlp_ratio={self.mlp_ratio} with hidden_size={self.hidden_size} gives an MLP of width 0. "
                "Use mlp_ratio=4."
            )
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) and len(value) != 2:
                raise ConfigError(f"{name}={value} must be one number or a (height, width) pair, e.g. 224.")
            if any(not 1 <= side <= 65536 for side in _pair(value)):
                default = type(self).__dataclass_fields__[name].default
                raise ConfigError(f"{name}={value} is out of range: sides must be 1 to 65536 pixels, e.g. {default}.")
        for side, patch in zip(self.image_shape, self.patch_shape):
            if side % patch:
                low = side // patch * patch
                raise ConfigError(
                    f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}. "
                    f"Use {f'{low} or ' if low else ''}{low + patch}."
                )

    def _validate_register_neurons(self) -> None:
        """Check that every pair names a neuron of the model and occurs once, and that there is a register."""
        if not self.register_neurons:
            return
        last, width = self.num_hidden_layers - 1, self.ffn_hidden_size
        for pair in self.register_neurons:
            if len(pair) != 2 or not (0 <= pair[0] <= last and 0 <= pair[1] < width):
                raise ConfigError(
                    f"register_neurons holds {pair}, expected [block, neuron] with a block in [0, {last}] and a "
                    f"neuron in [0, {width - 1}], e.g. [0, 0]."
                )
            if self.register_neurons.count(pair) > 1:
                raise ConfigError(f"register_neurons holds {pair} more than once. List every neuron once.")
        if not self.num_register_tokens:
            raise ConfigError(
                "register_neurons needs a register to write into, but num_register_tokens=0. Use "
                "num_register_tokens=1 or register_neurons=None."
            )
        if not 1 <= (self.num_test_time_registers or self.num_register_tokens) <= self.num_register_tokens:
            raise ConfigError(
                f"num_test_time_registers={self.num_test_time_registers} must be between 1 and num_register_tokens="
                f"{self.num_register_tokens}, or None for all of them."
            )

    def _contradiction(self, name: str, other: str, reason: str, remedy: str) -> ConfigError:
        """Create the error for two fields that contradict each other."""
        values = f"{name}={getattr(self, name)!r} cannot be combined with {other}={getattr(self, other)!r}"
        return ConfigError(f"{values}: {reason}. Use {remedy}.")

    def _changed(self, *names: str) -> str | None:
        """Return the first of the fields that differs from its default."""
        return next((n for n in names if getattr(self, n) != type(self).__dataclass_fields__[n].default), None)

    def _validate_positions(self) -> None:
        """Check the fields of position tables and rotary positions against each other."""
        head_dim, has_table, rotates = self.head_dim, self.use_position_embeddings, self.rope_theta is not None
        augmentation = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
        index_only = ("rope_grid_offset", "rope_reference_grid")
        of_rotation = self._changed("rope_periods", "rope_coordinates", *index_only, *augmentation)
        of_table = self._changed("no_embed_class", "interpolate_mode", "interpolate_offset")
        if not has_table and not rotates:
            raise self._contradiction("use_position_embeddings", "rope_theta", "no positions", "rope_theta=100")
        if of_table and not has_table:
            remedy = f"{of_table}={type(self).__dataclass_fields__[of_table].default!r}"
            raise self._contradiction(of_table, "use_position_embeddings", "there is no position table", remedy)
        if self.interpolate_mode == "radio" and self.interpolate_offset:
            reason = "it resamples to a size in patches"
            raise self._contradiction("interpolate_offset", "interpolate_mode", reason, "interpolate_offset=0.0")
        if of_rotation and not rotates:
            raise self._contradiction(of_rotation, "rope_theta", "nothing rotates", "rope_theta=100")
        if not rotates:
            return
        if head_dim % 4:
            raise ConfigError(
                f"rope_theta={self.rope_theta} needs a head width that is a multiple of 4, but hidden_size="
                f"{self.hidden_size} with num_attention_heads={self.num_attention_heads} gives {head_dim}. Change one "
                "of them, or use rope_theta=None and use_position_embeddings=True."
            )
        unused = index_only if self.rope_coordinates == "centered" else augmentation
        if name := self._changed(*unused):
            other = "index" if self.rope_coordinates == "centered" else "centered"
            reason = f"it applies to {other} coordinates only"
            raise self._contradiction(name, "rope_coordinates", reason, f"rope_coordinates={other!r}")
        if (grid := self.rope_reference_grid) is not None and (len(grid) != 2 or min(grid) < 1):
            raise ConfigError(f"rope_reference_grid={list(grid)} must be [rows, columns], e.g. {list(self.grid)}.")
        if (periods := self.rope_periods) is not None and not (
            len(periods) == head_dim // 4 and all(math.isfinite(period) and period > 0 for period in periods)
        ):
            raise ConfigError(
                f"rope_periods={list(periods)} must hold {head_dim // 4} positive numbers, one per 4 channels of a "
                "head. Use rope_periods=None for the periods of rope_theta."
            )

    def _validate_pooling(self) -> None:
        """Check the fields of `pooler_output` against each other."""
        norm, attends, unused = self.final_norm, self.attention_pooler, "there is no such pooler"
        no_cls, one = not self.use_cls_token, "there is one pooled output"
        act, heads = self.pooler_act is not None, self.pooler_num_heads or self.num_attention_heads
        for wrong, name, other, reason, remedy in (
            (no_cls and act, "pooler_act", "use_cls_token", "it reads CLS", "pooler_act=None"),
            (no_cls and norm == "cls", "final_norm", "use_cls_token", "it reads CLS", "final_norm='tokens'"),
            (act and norm == "pooled", "pooler_act", "final_norm", one, "pooler_act=None"),
            (act and attends, "pooler_act", "attention_pooler", one, "pooler_act=None"),
            (attends and norm in ("cls", "pooled"), "final_norm", "attention_pooler", one, "final_norm='tokens'"),
            (attends and self.hidden_size % heads, "pooler_num_heads", "hidden_size", "it must divide the width",
             f"pooler_num_heads={self.num_attention_heads}"),
            (not attends and self.pooler_num_heads, "pooler_num_heads", "attention_pooler", unused,
             "attention_pooler=True"),
            (not attends and self.pooler_intermediate_size, "pooler_intermediate_size", "attention_pooler", unused,
             "attention_pooler=True"),
        ):  # fmt: skip
            if wrong:
                raise self._contradiction(name, other, reason, remedy)

    def num_parameters(self) -> int:
        """Count the parameters of the backbone without creating it."""
        d, h = self.hidden_size, self.ffn_hidden_size
        attention = 4 * d * d + self.qkv_bias * 3 * d + self.proj_bias * d + self.attention_norm * 2 * d
        ffn = (3 if self.use_swiglu_ffn else 2) * d * h + self.mlp_bias * ((2 if self.use_swiglu_ffn else 1) * h + d)
        norms = 2 * (self.embedding_norm + (self.final_norm != "none") + 2 * self.num_hidden_layers) * d
        block = attention + ffn + self.mlp_norm * 2 * h + (0 if self.layerscale_value is None else 2 * d)
        patches = (math.prod(self.patch_shape) * self.num_channels + 1) * d
        positions = self.use_position_embeddings * (math.prod(self.grid) + self.num_position_prefix) * d
        tokens = (self.num_prefix_tokens + self.use_mask_token) * d
        pooler = 0 if self.pooler_act is None else d * (d + 1)
        if self.attention_pooler:
            width = self.pooler_intermediate_size or h
            pooler = 4 * d * (d + 1) + 3 * d + 2 * d * width + width + d
        projection = d * (self.projection_dim or 0)
        return self.num_hidden_layers * block + patches + positions + tokens + norms + pooler + projection

    def to_dict(self) -> dict:
        """Return the fields as written to config.json, with the package version and without Trainer's `use_cache`."""
        output = super().to_dict()
        output.pop("use_cache", None)
        output["hf_regvit_version"] = __version__
        return output

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        """Return the fields of a config.json; raise a ConfigError if they describe another kind of model."""
        config, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        kind = config.get("model_type") or ("timm" if "architecture" in config else "regvit")
        parts = [part.get("model_type") for part in config.values() if isinstance(part, dict)]  # composite models
        if "regvit" not in (kind, *parts):
            raise ConfigError(
                f"'{pretrained_model_name_or_path}' is not a RegViT: this is a `{kind}`; use convert, e.g. "
                f"hf_regvit.convert('{pretrained_model_name_or_path}')."
            )
        return config, unused

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        """Read config.json; errors name the file and, for invalid JSON, the line."""
        size = Path(json_file).stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise ConfigError(
                f"'{json_file}' has {size:,} bytes, more than the limit of {MAX_CONFIG_BYTES:,}. Check that it is a "
                "config.json."
            )
        try:
            config = super()._dict_from_json_file(json_file)
        except UnicodeDecodeError as error:
            raise ConfigError(f"'{json_file}' is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
        except json.JSONDecodeError as error:
            where = f"'{json_file}', line {error.lineno}"
            raise ConfigError(f"{where}: not valid JSON ({error.msg}). Correct that line.") from error
        if not isinstance(config, dict):
            raise ConfigError(
                f"'{json_file}' holds a {type(config).__name__}, expected an object such as "
                '{"model_type": "regvit"}.'
            )
        return config

    def _warn_about_unknown(self, kwargs: dict) -> None:
        """Warn about unknown fields instead of raising, so that configs of newer versions still load."""
        fields = [name for name in type(self).__dataclass_fields__ if not name.startswith("_")]
        for name in kwargs:
            if name in _FOREIGN_KEYWORDS or name.startswith("_"):
                continue
            nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)
            logger.warning(f"RegViTConfig has no field '{name}'; it is ignored. Did you mean '{nearest[0]}'?")

    @staticmethod
    def _warn_about_newer(saved_by: str | None) -> None:
        def key(version: str) -> list[int]:
            return [int("".join(c for c in part if c.isdigit()) or 0) for part in version.split(".")]

        if isinstance(saved_by, str) and key(saved_by) > key(__version__):
            logger.warning(
                f"This configuration was saved by hf_regvit {saved_by}, but the installed version is {__version__}, "
                "which ignores fields it does not know. Upgrade with `pip install -U hf_regvit`."
            )


_set_checked_by_type = RegViTConfig.__setattr__


def _set_field(self: RegViTConfig, name: str, value: object) -> None:
    """Set a field and report a wrong type like any other wrong value, naming the field, the value and a valid one.

    If `out_features` names only the last block (the default), it follows a change of `num_hidden_layers`.
    """
    follows = name == "num_hidden_layers" and self._out_features == [f"stage{self.num_hidden_layers}"]
    try:
        _set_checked_by_type(self, name, value)
    except StrictDataclassFieldValidationError as error:
        field = type(self).__dataclass_fields__[name]
        wanted = getattr(field.type, "__name__", field.type)
        raise ConfigError(
            f"{name}={value!r} has the wrong type: expected {wanted}, e.g. {field.default!r}."
        ) from error
    if follows:
        _set_checked_by_type(self, "_out_features", [f"stage{value}"])
        _set_checked_by_type(self, "_out_indices", [value])


RegViTConfig.__setattr__ = _set_field  # set after @strict, which installs its own `__setattr__`

# --- Files of a checkpoint ---


def shard_of(folder: Path, name, suffix: str = ".safetensors") -> Path:
    """Return the weights file that an index names; raise for anything but a plain name in the folder of the index."""
    is_plain = isinstance(name, str) and name.endswith(suffix) and not set(name) & set("/\\\0")
    home = folder.resolve()
    # The cache of the Hub holds links to the folder `blobs` two levels up.
    if not is_plain or (folder / name).resolve().parent not in (home, home.parent.parent / "blobs"):
        raise CheckpointCorruptError(
            f"An index in '{folder}' names {str(name)[:200]!r}. Expected the plain name of a {suffix} file in that "
            "folder, not a link. Download the model again from a source that you trust."
        )
    return folder / name


def check_weight_files(source, options: dict | None = None) -> None:
    """Check the weights of a folder before they are loaded: names in an index, and types of numbers.

    A changed type in the header of a file would be read as other numbers: 0.98 becomes 1065017672.0.

    Args:
        source: Folder, file, or Hub id, whose weights are downloaded.
        options: Keyword arguments of `from_pretrained`, if a RegViT is about to be loaded; see `_check_kind`.

    Raises:
        CheckpointCorruptError: An index is damaged or names another file than one beside it, or weights are integers.
        CheckpointError: The weights are those of another kind of RegViT.
    """
    folder = Path(source or "")
    if source and options is not None and not options.get("variant") and not folder.exists():
        known = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
        hub = {name: options[name] for name in known if name in options}
        names = ("config.json", SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
        found = (cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub) for name in names)
        folder = Path(saved).parent if (saved := next(found)) and any(found) else folder  # no index beside one file
    if not source or not folder.exists():
        return
    files, keys = [folder] if folder.is_file() else [*folder.glob("model*.safetensors")], set()
    for index in folder.glob("*.index*.json"):
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names, keys = set(weight_map.values()), keys | set(weight_map)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointCorruptError(
                f"'{index}' is not an index of weights ({type(error).__name__}: {error}). Download it again."
            ) from error
        suffix = ".bin" if index.name.startswith("pytorch_model.") else ".safetensors"
        files += [shard_of(folder, name, suffix) for name in names]
    config = folder / "config.json"
    if config.is_file() and b'"quantization_config"' in config.read_bytes():
        return
    for path in sorted({path for path in files if path.suffix == ".safetensors" and path.is_file()}):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                kind = file.get_slice(key).get_dtype()
                if kind.startswith(("I", "U", "BOOL")) and key.endswith(_PARAMETERS):
                    raise CheckpointCorruptError(
                        f"'{path}' holds '{key}' as {kind}, expected floating-point numbers. Download the file again."
                    )
                keys.add(key)
    keys = {key.removeprefix("regvit.") for key in keys}
    # Without the weights of the patches, it is no RegViT, and much more is missing.
    if "embeddings.patch_embeddings.projection.weight" in keys and options is not None and config.is_file():
        _check_kind(folder, keys, options)


def _check_kind(folder: Path, keys: set[str], options: dict) -> None:
    """Check that a checkpoint has the CLS token and the kind of positions of its configuration.

    Until here, only the headers of the weights are read, so a wrong checkpoint needs no memory. `options` hold a
    config, or fields that override those of config.json.
    """
    saved, config = RegViTConfig._dict_from_json_file(folder / "config.json"), options.get("config")
    fields = vars(config) if isinstance(config, RegViTConfig) else saved | options
    if saved.get("model_type") != "regvit":  # part of a larger model
        return
    for field, tensor in (("use_position_embeddings", "position_embeddings"), ("use_cls_token", "cls_token")):
        found = f"embeddings.{tensor}" in keys
        if fields.get(field, True) != found:
            also = "" if found or tensor == "cls_token" else " and rope_theta, e.g. 100"
            raise CheckpointError(
                f"embeddings.{tensor} {'is' if found else 'is missing'} in the weights of '{folder}', but "
                f"{field}={not found}. Load it without such an override, or correct its config.json: "
                f"{field}={found}{also}."
            )


_PARAMETERS = (".weight", ".bias", "_token", "_tokens", "_embed", "_embeddings", ".lambda1", ".probe")


def check_finite(tensors: dict, source) -> None:
    """Raise a `CheckpointCorruptError` if a weight is NaN or infinite. Quantized weights are not looked at."""
    for name, tensor in tensors.items():
        is_plain = type(tensor).__name__ in ("Tensor", "Parameter") and tensor.is_floating_point()
        if is_plain and tensor.itemsize > 1 and not tensor.is_meta and not tensor.isfinite().all():
            raise CheckpointCorruptError(
                f"'{name}' in the weights of '{source}' holds NaN or infinity, so every output would be wrong. Use "
                "another checkpoint."
            )


def corrupt_weights(source, error: Exception) -> CheckpointCorruptError:
    """Create the error for weights that cannot be read, naming the first damaged safetensors file of a folder."""
    named = f"The weights of '{source}'"
    for path in sorted(Path(source).glob("*.safetensors"), reverse=True) if Path(source).is_dir() else []:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            named = f"'{path}'"
    return CheckpointCorruptError(f"{named} cannot be read as safetensors ({error}). Download or save the file again.")


__all__ = ["RegViTConfig"]
