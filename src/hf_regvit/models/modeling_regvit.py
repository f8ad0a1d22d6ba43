# Copyright 2026 The hf_regvit developers. Licensed under the Apache License, Version 2.0.
"""RegViT: a plain vision transformer with register tokens (arXiv 2309.16588).

Token order is `[CLS | registers | patches]`; CLS is absent with `use_cls_token=False`. Registers are added after the
position embeddings, have no position themselves, take part in every block, and are never read by a head or a pooled
output. Patches get positions from a learned table, from rotations of queries and keys, or from both. Shapes: B images,
R registers, N patches in a grid of (rows, columns), T = 1 + R + N tokens, D width, d width of a head, L blocks.

This file and the configuration file are copied to the Hub unchanged, so both depend only on torch, transformers and
safetensors. Hidden states and attentions are collected explicitly, because the helpers of transformers for this moved
several times within 5.x.
"""

import copy
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    DepthEstimatorOutput,
    ImageClassifierOutput,
    SemanticSegmenterOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, logging

from .configuration_regvit import CheckpointError, RegViTConfig, check_finite, check_weight_files, corrupt_weights

logger = logging.get_logger(__name__)


class ImageTooSmallError(ValueError):
    """Raised for an image with a side shorter than one patch."""


@dataclass
class RegViTModelOutput(ModelOutput):
    """Output of `RegViTModel`. T' is T, or T - R if `discard_registers` is set.

    Args:
        last_hidden_state: (B, T', D) tokens after the final norm, in the order `[CLS | registers | patches]`.
        pooler_output: (B, D) normalized CLS token, or the mean patch without CLS; `final_norm`, `pooler_act` and
            `attention_pooler` in the config select other outputs.
        register_tokens: (B, R, D) normalized registers; R may be 0.
        patch_tokens: (B, N, D) normalized patches, row-major over the grid.
        output_mask: (B, T') bool, True at CLS and patches, False at registers and padding.
        patch_mask: (B, T') bool, True at patches, False at CLS, registers and padding.
        hidden_states: L + 1 tensors (B, T, D), the raw residual stream: after the embedding, then after each block.
            The last one is **before** the final norm; artifact norms are measured on these tensors.
        attentions: L tensors (B, heads, T, T); only the "eager" attention implementation returns them.
        image_embeds: (B, `projection_dim`) projection of `pooler_output`, or None.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    register_tokens: torch.FloatTensor | None = None
    patch_tokens: torch.FloatTensor | None = None
    output_mask: torch.BoolTensor | None = None
    patch_mask: torch.BoolTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    image_embeds: torch.FloatTensor | None = None


# --- Embeddings ---


class RegViTPatchEmbeddings(nn.Module):
    """Patch embedding: a convolution whose stride equals its kernel size."""

    def __init__(self, config: RegViTConfig):
        super().__init__()
        self.patch_shape = config.patch_shape
        self.num_channels = config.num_channels
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=self.patch_shape, stride=self.patch_shape
        )

    def grid_of(self, pixel_values: Tensor) -> tuple[int, int]:
        """Return the patch grid (rows, columns) of a batch (B, C, H, W); raise if it cannot be split into patches."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected (batch, {self.num_channels}, height, "
                "width). Convert the images to that number of channels, or change num_channels in the config."
            )
        return self.grid_of_size(*pixel_values.shape[-2:])

    def grid_of_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the patch grid of an image of this size in pixels; raise unless it consists of whole patches."""
        rows, columns = self.patch_shape
        if height < rows or width < columns:
            raise ImageTooSmallError(
                f"The image size of {height} x {width} pixels is smaller than one patch of {rows} x {columns}. "
                f"Resize the image to at least {rows} x {columns}."
            )
        if height % rows or width % columns:
            nearest = [f"{max(1, round(s / p)) * p}" for s, p in ((height, rows), (width, columns))]
            raise ValueError(
                f"The image size of {height} x {width} pixels is not a multiple of the patch size of {rows} x "
                f"{columns}. Resize or crop the image to {' x '.join(nearest)}, or pad it and pass pixel_mask."
            )
        return height // rows, width // columns

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.projection(pixel_values.to(self.projection.weight.dtype))  # (B, D, rows, columns)
        return patches.flatten(2).transpose(1, 2)  # (B, N, D)


class RegViTEmbeddings(nn.Module):
    """Input sequence of CLS, registers and patches; only CLS and patches receive position embeddings."""

    MAX_CACHED_GRIDS = 8

    def __init__(self, config: RegViTConfig):
        super().__init__()
        self.config = config
        self.patch_embeddings = RegViTPatchEmbeddings(config)

        # None rather than an empty tensor, so that a checkpoint has no key for what the model does not have.
        def parameter(exists: int, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(*shape, config.hidden_size)) if exists else None

        num_positions = math.prod(config.grid) + config.num_position_prefix
        self.cls_token = parameter(config.use_cls_token, 1, 1)
        self.position_embeddings = parameter(config.use_position_embeddings, 1, num_positions)
        self.register_tokens = parameter(config.num_register_tokens, 1, config.num_register_tokens)
        self.mask_token = parameter(config.use_mask_token, 1)
        self.layernorm = optional_norm(config.embedding_norm, config.hidden_size, config)
        self._cached_table: Tensor | None = None
        self._cached_stamp: tuple[int, int] | None = None
        self._cached_positions: dict[tuple[int, int], Tensor] = {}
        self._cached_rotary: dict[tuple, Tensor] = {}

    def train(self, mode: bool = True) -> "RegViTEmbeddings":
        """Set the mode and clear the position cache, since the weights may change around a mode switch."""
        self._cached_table = None
        return super().train(mode)

    def resample_positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the patch positions (1, N, D) for a grid of (rows, columns), resampled in float32.

        With `interpolate_offset`, scale factors replace sizes, which shifts the sampling points.
        Source: dinov2 `models/vision_transformer.py`, `interpolate_pos_encoding`.
        """
        table = self.position_embeddings[:, self.config.num_position_prefix :]  # (1, N0, D)
        stored = self.config.grid
        if grid == stored:
            return table
        mode, offset, target = self.config.interpolate_mode, self.config.interpolate_offset, {"size": grid}
        if mode == "radio":
            mode, target = "bilinear", {"size": (max(grid), max(grid))}
        elif offset:
            target = {"scale_factor": tuple((new + offset) / old for new, old in zip(grid, stored))}
        maps = table.reshape(1, *stored, -1).permute(0, 3, 1, 2).float()  # (1, D, rows0, columns0)
        maps = nn.functional.interpolate(
            maps, mode=mode, align_corners=False, antialias=self.config.interpolate_antialias, **target
        )
        return maps[:, :, : grid[0], : grid[1]].to(table.dtype).flatten(2).transpose(1, 2)  # (1, N, D)

    def patch_positions(self, grid: tuple[int, int]) -> Tensor:
        """Return `resample_positions(grid)`, cached per grid except in training, under autograd and under `compile`.

        The cache is validated on every call, since a stale entry would silently give wrong positions: on the CPU by
        the values of the table, elsewhere, without a synchronization, by the address and version of the parameter.
        """
        table = self.position_embeddings
        trains = self.training or (torch.is_grad_enabled() and table.requires_grad)
        is_wrapped = type(table) is not nn.Parameter  # tensors wrapped by torch.func have no values to compare
        if grid == self.config.grid or torch.compiler.is_compiling() or trains or is_wrapped:
            return self.resample_positions(grid)
        if not self._cache_is_valid(table):
            # Assign a new dict instead of clearing it: nn.DataParallel replicas on other devices share the old one.
            self._cached_positions = {}
            self._cached_table = table.detach().clone() if table.device.type == "cpu" else table.detach()
            self._cached_stamp = None if table.is_inference() else (table.data_ptr(), table._version)
        return self._cached(self._cached_positions, grid, lambda: self.resample_positions(grid))

    def _cached(self, cache: dict, key: Hashable, make: Callable) -> Tensor:
        made = cache.get(key)
        if made is None:
            if len(cache) >= self.MAX_CACHED_GRIDS:
                cache.pop(next(iter(cache)), None)
            made = cache[key] = make()
        return made

    def _cache_is_valid(self, table: Tensor) -> bool:
        cached = self._cached_table
        if cached is None or cached.device != table.device or cached.dtype != table.dtype:
            return False
        if table.device.type == "cpu":
            return torch.equal(cached, table)
        return self._cached_stamp is not None and self._cached_stamp == (table.data_ptr(), table._version)

    def rotary_table(self, pixel_values: Tensor, grids: list[tuple[int, int]] | None = None) -> Tensor | None:
        """Return the table (B, T, d) for `rotate`, or None if nothing rotates; `grids` as in `forward`."""
        config, device = self.config, pixel_values.device
        if config.rope_theta is None:
            return None
        grid = self.patch_embeddings.grid_of(pixel_values)
        augmentation = draw_rotary_augmentation(config, device) if self.training else None
        fields = (config.rope_theta, config.rope_periods, config.rope_coordinates)
        fields += (config.rope_grid_offset, config.rope_reference_grid)

        def table_of(own: tuple[int, int]) -> Tensor:
            if augmentation is not None or torch.compiler.is_compiling() or type(pixel_values) is not Tensor:
                return rotary_table(config, own, device, augmentation)
            key = (own, device, str(fields))
            with torch.inference_mode(False):  # a table made in inference mode could not be used in training
                return self._cached(self._cached_rotary, key, lambda: rotary_table(config, own, device))

        unrotated = torch.tensor([1.0, 0.0], device=device).repeat_interleave(config.head_dim // 2)  # (d,)
        patches = table_of(grid)[None] if grids is None else tables_of_padded_images(grids, grid, table_of, unrotated)
        prefix = unrotated.expand(patches.shape[0], config.num_prefix_tokens, -1)
        return torch.cat([prefix, patches], dim=1).expand(pixel_values.shape[0], -1, -1)

    def forward(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, grids: list[tuple[int, int]] | None = None
    ) -> Tensor:
        """Return the tokens (B, T, D) that enter the first block; `grids` holds the grids of padded images."""
        grid = self.patch_embeddings.grid_of(pixel_values)
        patches = self.patch_embeddings(pixel_values)  # (B, N, D)
        batch_size = patches.shape[0]
        if bool_masked_pos is not None:
            patches = self._mask_patches(patches, bool_masked_pos)
        elif self.mask_token is not None and self.training:
            # Keep the mask token in the graph: otherwise DDP must search for unused parameters in unmasked steps.
            patches = patches + 0 * self.mask_token
        table = self.position_embeddings
        if table is not None and grids is None:
            patches = patches + self.patch_positions(grid)
        elif table is not None:
            padding = torch.zeros_like(table[0, 0])  # (D,)
            patches = patches + tables_of_padded_images(grids, grid, self.patch_positions, padding)
        tokens = [patches]
        registers = 0 if self.register_tokens is None else self.register_tokens.shape[1]
        # With a wrong count, later code would read patches as registers or registers as patches.
        if registers != self.config.num_register_tokens:
            raise ValueError(
                f"The model has {registers} registers, but its config says num_register_tokens="
                f"{self.config.num_register_tokens}. This happens when another model with the same config object was "
                "resized. Give each model its own config (copy.deepcopy(config)), and change the number of registers "
                "only with resize_register_tokens."
            )
        if self.register_tokens is not None:
            tokens.insert(0, self.register_tokens.expand(batch_size, -1, -1))
        if self.cls_token is not None:
            cls_token = self.cls_token + table[:, :1] if self.config.num_position_prefix else self.cls_token
            tokens.insert(0, cls_token.expand(batch_size, -1, -1))
        return self.layernorm(torch.cat(tokens, dim=1))  # (B, T, D)

    def _mask_patches(self, patches: Tensor, bool_masked_pos: Tensor) -> Tensor:
        if self.mask_token is None:
            raise ValueError("bool_masked_pos needs a mask token. Create or load the model with use_mask_token=True.")
        if bool_masked_pos.shape != patches.shape[:2]:
            raise ValueError(
                f"bool_masked_pos has shape {tuple(bool_masked_pos.shape)}, expected (batch, patches) = "
                f"{tuple(patches.shape[:2])}. Pass one entry per patch and none for CLS or registers."
            )
        return torch.where(bool_masked_pos.bool().unsqueeze(-1), self.mask_token.to(patches.dtype), patches)


def grids_of_padded_images(pixel_mask: Tensor, embeddings: RegViTPatchEmbeddings) -> list[tuple[int, int]]:
    """Return the grid of each image without its padding, at which `pixel_mask` (B, H, W) is 0."""
    mask = pixel_mask.bool()
    heights, widths = mask[:, :, 0].sum(1), mask[:, 0, :].sum(1)  # (B,)
    rows = torch.arange(mask.shape[1], device=mask.device)[None, :, None] < heights[:, None, None]
    columns = torch.arange(mask.shape[2], device=mask.device)[None, None, :] < widths[:, None, None]
    if not torch.equal(mask, rows & columns):
        raise ValueError(
            "pixel_mask is not one rectangle per image: it must be 1 on a rectangle in the top left corner and 0 "
            "elsewhere. Pad images only on the right and at the bottom."
        )
    return [embeddings.grid_of_size(*size) for size in zip(heights.tolist(), widths.tolist())]


def tables_of_padded_images(
    grids: list[tuple[int, int]], grid: tuple[int, int], table_of: Callable, padding: Tensor
) -> Tensor:
    """Return (B, N, W): for each image, `table_of(own grid)` in its top left corner and `padding` (W,) elsewhere."""
    tables = padding.repeat(len(grids), *grid, 1)  # (B, rows, columns, W)
    for own in set(grids):
        rows = [i for i, other in enumerate(grids) if other == own]
        tables[rows, : own[0], : own[1]] = table_of(own).reshape(1, *own, -1)
    return tables.flatten(1, 2)


# --- Rotary positions ---


def draw_rotary_augmentation(config: RegViTConfig, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Draw the shift and the factor, (2,) for rows and columns, of centered coordinates in training, if configured.

    Source: dinov3 `layers/rope_position_encoding.py`; the draws are those of `DINOv3ViTModel` in transformers.
    """
    shift, jitter, rescale = config.pos_embed_shift, config.pos_embed_jitter, config.pos_embed_rescale
    if shift is None and jitter is None and rescale is None:
        return None

    def uniform(limit: float | None, size: int) -> Tensor:
        drawn = torch.zeros(size, device=device, dtype=torch.float32)
        return drawn if limit is None else drawn.uniform_(-limit, limit)

    shifts = uniform(shift, 2)
    factors = uniform(jitter and math.log(jitter), 2) + uniform(rescale and math.log(rescale), 1)
    return shifts, factors.exp()


def rotary_table(
    config: RegViTConfig,
    grid: tuple[int, int],
    device: torch.device,
    augmentation: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return (N, d) in float32: the cosines, then the sines, of d / 2 angles per patch.

    An angle is a coordinate divided by a period: d / 4 angles of the row, then d / 4 of the column, with the periods
    `rope_theta ** (4 j / d)`. The coordinate of row (or column) i of n is 2 pi (2 (i + 0.5) / n - 1) if "centered" and
    (i + offset) * reference / n if "index", without the last factor if there is no reference grid.

    Source: arXiv 2508.10104 (DINOv3), arXiv 2303.11331 (EVA-02). Slow twin: tests/parity/test_families.py.
    """
    steps = torch.arange(config.head_dim // 4, device=device, dtype=torch.float32)
    periods = config.rope_theta ** (4 * steps / config.head_dim)
    if config.rope_periods is not None:
        periods = torch.tensor(config.rope_periods, device=device, dtype=torch.float32)
    angles = []
    for axis, size in enumerate(grid):
        coordinates = torch.arange(size, device=device, dtype=torch.float32)
        if config.rope_coordinates == "centered":
            coordinates = 2 * (coordinates + 0.5) / size - 1
            if augmentation is not None:
                coordinates = (coordinates + augmentation[0][axis]) * augmentation[1][axis]
            coordinates = 2 * math.pi * coordinates
        else:
            coordinates = coordinates + config.rope_grid_offset
            if config.rope_reference_grid is not None:
                coordinates = coordinates * config.rope_reference_grid[axis] / size
        angles.append(coordinates[:, None] / periods)  # (size, d / 4)
    rows, columns = angles[0][:, None].expand(-1, grid[1], -1), angles[1].expand(grid[0], -1, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (N, d / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotate(queries_and_keys: Tensor, rotary: Tensor) -> Tensor:
    """Rotate the channel pairs (c, c + d / 2) of (B, T, 2, heads, d), at least in float32.

    `rotary` (B, T, d) holds cosines and sines: 1 and 0, which change nothing, for CLS, registers and padding.
    Source: arXiv 2104.09864.
    """
    cos, sin = rotary[:, :, None, None].chunk(2, dim=-1)  # (B, T, 1, 1, d / 2)
    first, second = queries_and_keys.to(at_least_float32(queries_and_keys)).chunk(2, dim=-1)
    rotated = [torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)]
    return torch.cat(rotated, dim=-1).to(queries_and_keys.dtype)


# --- Blocks ---


def optional_norm(exists: bool, width: int, config: RegViTConfig) -> nn.Module:
    """Return a LayerNorm, or the identity for models that have no norm at this place."""
    return nn.LayerNorm(width, eps=config.layer_norm_eps) if exists else nn.Identity()


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Return the output (B, T, heads, d) and the weights (B, heads, T, T), which no other implementation returns."""
    scores = query @ key.transpose(2, 3) * scaling  # (B, heads, T, T)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1)
    return (weights @ value).transpose(1, 2), weights


class RegViTLinearWithoutKeyBias(nn.Linear):
    """Fused projection without a bias of the keys; a linear layer, so that adapters and quantization find it."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        query, key, value = self.bias.chunk(3)
        return nn.functional.linear(hidden_states, self.weight, torch.cat([query, torch.zeros_like(key), value]))


class RegViTAttention(nn.Module):
    """Self-attention over all tokens, including registers, with a fused projection for query, key and value."""

    def __init__(self, config: RegViTConfig):
        super().__init__()
        self.config = config
        self.num_attention_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        projection = RegViTLinearWithoutKeyBias if config.qkv_bias and not config.key_bias else nn.Linear
        self.qkv = projection(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.norm = optional_norm(config.attention_norm, config.hidden_size, config)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.proj_bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        tokens: Tensor | None = None,
        rotary: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output (B, T, D), or only that of `tokens` (n, D), and the attention weights or None."""
        batch_size, num_tokens, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch_size, num_tokens, 3, self.num_attention_heads, self.head_dim)
        query, key, value = qkv.unbind(2)  # (B, T, heads, head_dim)
        if rotary is not None:
            query, key = rotate(qkv[:, :, :2], rotary).unbind(2)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, heads, T, head_dim)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0
        )
        output = output.reshape(batch_size, num_tokens, width)
        if tokens is not None:
            output = output.flatten(0, 1).index_select(0, tokens)  # (n, D)
        return self.o_proj(self.norm(output)), weights


def move_to_registers(
    activations: Tensor, neurons: list[int], config: RegViTConfig, token_mask: Tensor | None
) -> Tensor:
    """Move the activations of a few MLP neurons from patches to registers (test-time registers, arXiv 2506.08010).

    `activations` (B, T, H) is the input of the MLP's last linear layer. For each of the S `neurons`, every test-time
    register gets the neuron's value of largest magnitude over the tokens of the image, padding excluded (`token_mask`
    (B, T) is False there), and every patch gets 0. Without neurons, the input is returned.
    """
    if not neurons:
        return activations
    index = torch.tensor(neurons, device=activations.device)
    chosen = activations.index_select(2, index)  # (B, T, S)
    seen = chosen if token_mask is None else chosen.masked_fill(~token_mask.unsqueeze(-1), 0)
    largest = seen.gather(1, seen.abs().argmax(dim=1, keepdim=True))  # (B, 1, S), sign kept
    count = config.num_test_time_registers or config.num_register_tokens
    kept, patches = chosen[:, : config.num_prefix_tokens - count], chosen[:, config.num_prefix_tokens :]
    moved = torch.cat([kept, largest.expand(-1, count, -1), torch.zeros_like(patches)], dim=1)  # (B, T, S)
    return activations.index_copy(2, index, moved)


class RegViTMLP(nn.Module):
    """Two linear layers with an activation in between."""

    def __init__(self, config: RegViTConfig, register_neurons: list[int]):
        super().__init__()
        self.config = config
        self.register_neurons = register_neurons
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=config.mlp_bias)
        self.activation = ACT2FN[config.hidden_act]
        self.norm = optional_norm(config.mlp_norm, config.ffn_hidden_size, config)
        self.fc2 = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> Tensor:
        activations = self.norm(self.activation(self.fc1(hidden_states)))  # (B, T, H)
        return self.fc2(move_to_registers(activations, self.register_neurons, self.config, token_mask))


class RegViTSwiGLU(nn.Module):
    """Gated MLP; the first half of `gate_up_proj` is the gate (same row order as `w12` in DINOv2)."""

    def __init__(self, config: RegViTConfig, register_neurons: list[int]):
        super().__init__()
        self.config = config
        self.register_neurons = register_neurons
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=config.mlp_bias)
        self.norm = optional_norm(config.mlp_norm, config.ffn_hidden_size, config)
        self.down_proj = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        activations = self.norm(nn.functional.silu(gate) * up)  # (B, T, H)
        return self.down_proj(move_to_registers(activations, self.register_neurons, self.config, token_mask))


class RegViTLayerScale(nn.Module):
    """Learnable per-channel scale of the output of a residual branch."""

    def __init__(self, config: RegViTConfig):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, branch: Tensor, residual: Tensor | None = None) -> Tensor:
        """Scale the branch; with `residual`, also add it in the same pass over memory."""
        return branch * self.lambda1 if residual is None else torch.addcmul(residual, branch, self.lambda1)


class RegViTLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block: an attention branch and an MLP branch, each added to the residual stream."""

    def __init__(self, config: RegViTConfig, drop_path_rate: float, block: int):
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.drop_path_mode = config.drop_path_mode
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = RegViTAttention(config)
        self.layer_scale1 = None if config.layerscale_value is None else RegViTLayerScale(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        mlp_class = RegViTSwiGLU if config.use_swiglu_ffn else RegViTMLP
        self.mlp = mlp_class(config, config.register_neurons_of(block))
        self.layer_scale2 = None if config.layerscale_value is None else RegViTLayerScale(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
        rotary: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the tokens (B, T, D) after the block, and the attention weights (B, heads, T, T) or None.

        Args:
            hidden_states: (B, T, D) residual stream.
            attention_mask: Mask in the form the attention implementation expects.
            tokens: (n,) indices into the flattened (B * T) tokens. Only these tokens (n, D) are computed and returned;
                all others serve only as keys and values. Pretraining uses this in the last block to save time.
            token_mask: (B, T) bool, False at padding. Only register neurons need it in addition to `attention_mask`.
            rotary: (B, T, d) from `RegViTEmbeddings.rotary_table`.
        """
        if tokens is not None:
            return self._forward_tokens(hidden_states, attention_mask, tokens, rotary)
        rows = self._draw_rows(hidden_states)
        attended, weights = self._attend(hidden_states, attention_mask, rotary, rows)
        hidden_states = self._add(hidden_states, attended, self.layer_scale1, rows)
        del attended  # memory use peaks in the MLP, so free this tensor before it runs
        rows = self._draw_rows(hidden_states)
        transformed = self.mlp(self.norm2(self._take(hidden_states, rows)), self._take(token_mask, rows))
        return self._add(hidden_states, transformed, self.layer_scale2, rows), weights

    def _forward_tokens(
        self, hidden_states: Tensor, attention_mask: Tensor | None, tokens: Tensor, rotary: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.mlp.register_neurons:
            raise NotImplementedError(
                "tokens was given, but a block with register neurons must compute all tokens. Set "
                "register_neurons=None for pretraining."
            )
        batch_size, num_tokens, _ = hidden_states.shape
        image = tokens // num_tokens  # (n,)
        rows = self._draw_rows(hidden_states)
        sources = tokens
        if rows is not None:
            # Row of each image among the drawn images. Images not drawn point to row 0, but their gain is 0.
            place = torch.zeros(batch_size, dtype=torch.long, device=tokens.device)
            place[rows] = torch.arange(len(rows), device=tokens.device)
            sources = place[image] * num_tokens + tokens % num_tokens

        def add(output: Tensor, branch: Tensor, layer_scale: RegViTLayerScale | None, gains: Tensor | None) -> Tensor:
            branch = branch if layer_scale is None else layer_scale(branch)
            return output + (branch if gains is None else branch * gains[image].to(branch.dtype).unsqueeze(1))

        attended, weights = self._attend(hidden_states, attention_mask, rotary, rows, sources)
        output = hidden_states.flatten(0, 1).index_select(0, tokens)  # (n, D)
        output = add(output, attended, self.layer_scale1, self._draw_gains(hidden_states, rows))
        gains = self._draw_gains(hidden_states, self._draw_rows(hidden_states))
        return add(output, self.mlp(self.norm2(output)), self.layer_scale2, gains), weights

    def _attend(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary: Tensor | None,
        rows: Tensor | None,
        tokens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the attention on the chosen rows of the batch, or on all of them if `rows` is None."""
        hidden_states, attention_mask, rotary = (self._take(x, rows) for x in (hidden_states, attention_mask, rotary))
        return self.attention(self.norm1(hidden_states), attention_mask, tokens, rotary=rotary)

    def _draw_rows(self, hidden_states: Tensor) -> Tensor | None:
        """Draw the samples whose branch is computed in mode "batch_subset"; None stands for all of them."""
        if not self.training or self.drop_path_rate == 0 or self.drop_path_mode != "batch_subset":
            return None
        batch_size = hidden_states.shape[0]
        keep = max(int(batch_size * (1 - self.drop_path_rate)), 1)
        return torch.randperm(batch_size, device=hidden_states.device)[:keep]

    @staticmethod
    def _take(tensor: Tensor | None, rows: Tensor | None) -> Tensor | None:
        if rows is None or tensor is None:
            return tensor
        if not isinstance(tensor, Tensor):
            raise NotImplementedError(
                "drop_path_mode='batch_subset' cannot select the rows of a flex-attention mask. "
                "For padded batches, use drop_path_mode='sample' or attn_implementation='sdpa'."
            )
        return tensor.index_select(0, rows)

    def _draw_gains(self, hidden_states: Tensor, rows: Tensor | None) -> Tensor | None:
        """Draw the factors (B,) of stochastic depth (arXiv 1603.09382) for the branch of each sample, or None."""
        if not self.training or self.drop_path_rate == 0:
            return None
        gains = hidden_states.new_zeros(hidden_states.shape[0])
        if rows is not None:
            # Scale by the share actually drawn, not by 1 / (1 - rate), as in dinov2 `layers/block.py`.
            return gains.index_fill(0, rows, len(gains) / len(rows))
        keep = 1 - self.drop_path_rate
        return gains.bernoulli_(keep) / keep

    def _add(
        self, hidden_states: Tensor, branch: Tensor, layer_scale: RegViTLayerScale | None, rows: Tensor | None
    ) -> Tensor:
        """Return hidden_states + scale * branch, with stochastic depth in training."""
        if not self.training or self.drop_path_rate == 0:
            return hidden_states + branch if layer_scale is None else layer_scale(branch, hidden_states)
        branch = branch if layer_scale is None else layer_scale(branch)
        if rows is not None:
            scale = hidden_states.shape[0] / len(rows)  # inverse of the share actually drawn, see `_draw_gains`
            return hidden_states.index_add(0, rows, branch.to(hidden_states.dtype), alpha=scale)
        gains = self._draw_gains(hidden_states, rows)
        return hidden_states + branch * gains.to(branch.dtype)[:, None, None]


# --- Models ---


class RegViTPreTrainedModel(PreTrainedModel):
    """Base class: weight initialization, and loading that never leaves part of the backbone randomly initialized."""

    config: RegViTConfig
    base_model_prefix = "regvit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # Otherwise, Trainer takes **kwargs in a `forward` as a sign that the model divides its loss by the number of
    # accumulation steps itself, and the loss would be too large by that factor.
    accepts_loss_kwargs = False
    _no_split_modules = ["RegViTEmbeddings", "RegViTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The whole embedding: FSDP2 shards this module after `_no_split_modules`, and fails if one is nested in the other.
    _input_embed_layer = "embeddings"
    _keys_to_ignore_on_load_unexpected = [r"mask_token", r"^(regvit\.)?(pooler|projection)\."]
    image_processor: Any = None  # set by `convert`: the processor of the source, which is saved with the model

    def __init__(self, config: RegViTConfig, *args, **kwargs):
        config.validate_architecture()  # again, since from_pretrained applies overrides after the config's own check
        needed = config.num_parameters() * torch.get_default_dtype().itemsize
        # Raise before the memory is allocated; on a CPU, the system would end the process without a message.
        if torch.get_default_device().type == "cpu" and hasattr(os, "sysconf"):
            available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            if needed > available:
                raise MemoryError(
                    f"hidden_size={config.hidden_size} with num_hidden_layers={config.num_hidden_layers} needs "
                    f"{needed / 2**30:,.0f} GiB for its weights, but this machine has {available / 2**30:,.0f} GiB. "
                    "Use a smaller model, or create it under torch.device('meta')."
                )
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize as DINOv2 does (dinov2 `models/vision_transformer.py`), with a larger spread for registers."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):  # same as the PyTorch default
            bound = 1 / math.sqrt(module.in_channels * math.prod(module.kernel_size))
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, RegViTLayerScale):
            init.constant_(module.lambda1, self.config.layerscale_value)
        elif isinstance(module, RegViTEmbeddings):
            if module.position_embeddings is not None:
                init.trunc_normal_(module.position_embeddings, std=std)
            if module.cls_token is not None:
                init.normal_(module.cls_token, std=1e-6)
            if module.register_tokens is not None:
                init.normal_(module.register_tokens, std=self.config.register_init_std)
            if module.mask_token is not None:
                init.zeros_(module.mask_token)
        elif isinstance(module, RegViTAttentionPooler):
            init.trunc_normal_(module.probe, std=std)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, ignore_mismatched_sizes=False, **kwargs):
        """Load like any transformers model, but raise if part of the backbone would stay randomly initialized.

        Raises:
            CheckpointError: A weights file cannot be read, or backbone tensors (including registers) are missing,
                unexpected or of another shape. `ignore_mismatched_sizes=True` applies to heads only.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)  # RegViT never saves pickles, so it did not write a pickle
        kwargs |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        try:
            check_weight_files(pretrained_model_name_or_path, kwargs)
            model, info = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            raise corrupt_weights(pretrained_model_name_or_path, error) from error
        if pretrained_model_name_or_path is not None:  # None: the caller passed a state dict and is responsible for it
            model._check_loaded(pretrained_model_name_or_path, info, ignore_mismatched_sizes)
            check_finite(model.state_dict(), pretrained_model_name_or_path)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save like any transformers model, with `image_processor` if there is one, so that a pipeline can load it."""
        if not hasattr(self.image_processor or self, "save_pretrained"):
            raise TypeError(f"{type(self.image_processor).__name__} is no image_processor of transformers; use one.")
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.image_processor is not None and kwargs.get("is_main_process", True):
            hub = {"push_to_hub", "repo_id", "token", "private", "revision", "create_pr", "commit_message"}
            self.image_processor.save_pretrained(save_directory, **{k: v for k, v in kwargs.items() if k in hub})

    def _move_missing_keys_from_meta_to_device(self, missing_keys: set[str], *args, **kwargs) -> None:
        """Leave missing backbone tensors on the meta device, since `_check_loaded` is about to reject them."""
        if self.config.name_or_path != "None":  # from_pretrained(None, state_dict=...) sets it to this string
            missing_keys = missing_keys - set(self._backbone_keys(missing_keys))
        super()._move_missing_keys_from_meta_to_device(missing_keys, *args, **kwargs)

    def _check_loaded(self, source, info: dict, ignore_mismatched_sizes: bool) -> None:
        config, problems = self.config, []

        def report(key: str, problem: str, held: object) -> None:
            if key.endswith("register_tokens"):
                problem += (
                    f": num_register_tokens={config.num_register_tokens}, but the checkpoint has {held}. Load it "
                    "without that override, then call model.resize_register_tokens(n)"
                )
            elif key.endswith("position_embeddings"):
                problem += (
                    f": use_position_embeddings={config.use_position_embeddings}, image_size={config.image_size}. "
                    "Load it without such an override: positions are resampled for other input sizes"
                )
            problems.append(f"{key} {problem}")

        for key in self._backbone_keys(info["missing_keys"]):
            report(key, "is missing", "no register tokens")
        for key in self._backbone_keys(info["unexpected_keys"]):
            report(key, "is in the checkpoint but not in the model", "register tokens")
        for key, found, expected in sorted(info["mismatched_keys"]):
            shapes = f"has shape {tuple(found)} in the checkpoint and {tuple(expected)} in the model"
            if self._backbone_keys([key]):
                report(key, shapes, found[1] if len(found) == 3 else found)
            elif not ignore_mismatched_sizes:
                report(key, f"{shapes}. Pass ignore_mismatched_sizes=True to initialize this head randomly", None)
        if problems:
            shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            raise CheckpointError(f"The checkpoint '{source}' does not fit {type(self).__name__}: {shown}.")

    def _backbone_keys(self, keys) -> list[str]:
        """Return the keys without which the backbone would be partly random, sorted; all others belong to heads."""
        parts = ("embeddings.", "layers.", "layernorm.", "projection.", *["pooler."] * self.config.attention_pooler)
        keys = (key for key in keys if not key.endswith("mask_token"))
        return sorted(key for key in keys if key.removeprefix("regvit.").startswith(parts))

    @torch.no_grad()
    def resize_register_tokens(self, num_register_tokens: int, *, seed: int = 0) -> "RegViTPreTrainedModel":
        """Change the number of registers in place, in the model and in its config, and return this model.

        The first registers are kept. Additional ones are drawn with `seed` from a normal distribution with mean 0 and
        standard deviation `register_init_std`; they are untrained, so train them before use.
        """
        wanted = copy.copy(self.config)  # validate a copy, so that a rejected number leaves the model unchanged
        wanted.num_register_tokens = num_register_tokens
        wanted.validate_architecture()
        self.config.num_register_tokens = num_register_tokens
        embeddings = self.base_model.embeddings
        old, like = embeddings.register_tokens, embeddings.patch_embeddings.projection.bias
        tokens = torch.randn(1, num_register_tokens, len(like), generator=torch.Generator().manual_seed(seed))
        tokens *= self.config.register_init_std
        if old is not None:
            kept = min(old.shape[1], num_register_tokens)
            tokens[:, :kept] = old[:, :kept].cpu()
        embeddings.register_tokens = nn.Parameter(tokens.to(like.device, like.dtype)) if num_register_tokens else None
        return self

    def _finish(self, output: ModelOutput, return_dict: bool | None, wanted: bool | None) -> ModelOutput | tuple:
        """Return the output in the requested form, without hidden states that only a dense head wanted."""
        wanted = self.config.output_hidden_states if wanted is None else wanted
        if output.hidden_states is not None and not wanted:
            output = replace(output, hidden_states=None)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class RegViTAttentionPooler(nn.Module):
    """Attention of one learned query, the probe, to CLS and patches, followed by an MLP (SigLIP, PE-Core)."""

    def __init__(self, config: RegViTConfig):
        super().__init__()
        width, hidden = config.hidden_size, config.pooler_intermediate_size or config.ffn_hidden_size
        self.num_heads = config.pooler_num_heads or config.num_attention_heads
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.q_proj = nn.Linear(width, width)
        self.kv_proj = nn.Linear(width, 2 * width)
        self.o_proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        layers = {"fc1": nn.Linear(width, hidden), "act": ACT2FN[config.hidden_act], "fc2": nn.Linear(hidden, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """Pool tokens (B, T', D), which hold no registers, to (B, D); `token_mask` (B, T') is False at padding."""
        query = self.q_proj(self.probe).expand(tokens.shape[0], -1, -1)  # (B, 1, D)
        parts = (query, *self.kv_proj(tokens).chunk(2, dim=-1))
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in parts)
        pooled = nn.functional.scaled_dot_product_attention(query, key, value, token_mask[:, None, None])
        pooled = self.o_proj(pooled.transpose(1, 2).flatten(2))  # (B, 1, D)
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]


class RegViTModel(RegViTPreTrainedModel):
    """Backbone that maps pixels to CLS, register and patch tokens."""

    def __init__(self, config: RegViTConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        rate, depth = config.drop_path_rate, config.num_hidden_layers
        rates = [rate if config.drop_path_uniform else rate * i / max(depth - 1, 1) for i in range(depth)]
        self.embeddings = RegViTEmbeddings(config)
        self.layers = nn.ModuleList([RegViTLayer(config, rates[i], i) for i in range(depth)])
        self.layernorm = optional_norm(config.final_norm != "none", config.hidden_size, config)
        self.pooler, self.projection = None, None
        if add_pooling_layer and config.attention_pooler:
            self.pooler = RegViTAttentionPooler(config)
        elif add_pooling_layer and config.pooler_act is not None:
            dense = nn.Linear(config.hidden_size, config.hidden_size)  # precedes the head in the original ViT
            self.pooler = nn.Sequential(OrderedDict(dense=dense, activation=ACT2FN[config.pooler_act]))
        if add_pooling_layer and config.projection_dim is not None:
            self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.post_init()

    def split_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split (B, T, D) into CLS (B, 1, D), registers (B, R, D) and patches (B, N, D); CLS may be (B, 0, D)."""
        cls_tokens, prefix = int(self.config.use_cls_token), self.config.num_prefix_tokens
        return tokens[:, :cls_tokens], tokens[:, cls_tokens:prefix], tokens[:, prefix:]

    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> RegViTModelOutput | tuple:
        """Run the backbone.

        Args:
            pixel_values: (B, C, H, W) normalized pixels; H and W are multiples of the patch size, in any aspect ratio.
            bool_masked_pos: (B, N) bool, True where a patch is replaced by the mask token.
            pixel_mask: (B, H, W), nonzero at real pixels, for images of different sizes padded on the right and at the
                bottom. Padding is excluded from attention and every image gets the positions of its own grid, so its
                tokens are the same as without padding.
            output_attentions: Whether to return attention weights (needs `attn_implementation="eager"`).
            output_hidden_states: Whether to return the residual stream.
            return_dict: Whether to return a `RegViTModelOutput` instead of a plain tuple.
            **kwargs: Ignored. Trainer and composite models pass keywords that only some models use.

        Raises:
            ValueError: The number of channels, the size of the images or the shape of a mask is wrong.
        """
        if pixel_values is None:
            raise ValueError("pixel_values is missing. Pass images of shape (batch, channels, height, width).")
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if output_attentions and config._attn_implementation != "eager":
            logger.warning_once(
                f"attn_implementation='{config._attn_implementation}' does not return attention weights, so "
                "`attentions` will be empty. Call model.set_attn_implementation('eager') to get them."
            )
        if config.register_sizes and not torch.compiler.is_compiling():
            config.warn_about_size(*pixel_values.shape[-2:])
        grids, token_mask = None, None
        if pixel_mask is not None:
            grids, token_mask = self._token_mask(pixel_values, pixel_mask)
        hidden_states = self.embeddings(pixel_values, bool_masked_pos, grids)  # (B, T, D)
        rotary = self.embeddings.rotary_table(pixel_values, grids)
        attention_mask = None if token_mask is None else create_bidirectional_mask(config, hidden_states, token_mask)

        all_hidden_states, all_attentions = [hidden_states] if output_hidden_states else [], []
        for layer in self.layers:
            hidden_states, weights = layer(hidden_states, attention_mask, token_mask=token_mask, rotary=rotary)
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            if output_attentions and weights is not None:
                all_attentions.append(weights)

        sequence = self.layernorm(hidden_states) if config.final_norm == "tokens" else hidden_states
        cls_token, register_tokens, patch_tokens = self.split_tokens(sequence)
        output_mask, patch_mask = self._output_masks(sequence, token_mask)
        if isinstance(self.pooler, RegViTAttentionPooler):
            real = patch_mask[:, -patch_tokens.shape[1] :]  # (B, N)
            real = torch.cat([real.new_ones(cls_token.shape[:2]), real], dim=1)
            pooled = self.pooler(torch.cat([cls_token, patch_tokens], dim=1), real)  # (B, D)
        elif config.final_norm == "pooled" or not config.use_cls_token:
            pooled = mean_of_patches(patch_tokens, patch_mask)
        else:
            pooled = cls_token[:, 0] if self.pooler is None else self.pooler(cls_token[:, 0])
        if config.final_norm in ("cls", "pooled"):
            pooled = self.layernorm(pooled)
        if config.discard_registers and config.num_register_tokens:
            sequence = torch.cat([cls_token, patch_tokens], dim=1)
        output = RegViTModelOutput(
            last_hidden_state=sequence,
            pooler_output=pooled,
            register_tokens=register_tokens,
            patch_tokens=patch_tokens,
            output_mask=output_mask,
            patch_mask=patch_mask,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
            image_embeds=None if self.projection is None else self.projection(pooled),
        )
        return self._finish(output, return_dict, output_hidden_states)

    def _token_mask(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[list[tuple[int, int]], Tensor]:
        """Return the grid of each image without its padding, and a mask (B, T) that is False at padding."""
        if pixel_mask.shape != (pixel_values.shape[0], *pixel_values.shape[-2:]):
            raise ValueError(
                f"pixel_mask has shape {tuple(pixel_mask.shape)}, expected (batch, height, width) = "
                f"{(pixel_values.shape[0], *pixel_values.shape[-2:])}."
            )
        compiles_flex = self.config._attn_implementation == "flex_attention" and pixel_values.device.type == "cpu"
        if compiles_flex and torch.backends.cpu.get_cpu_capability() in ("AVX2", "DEFAULT"):
            raise ValueError(
                "attn_implementation is 'flex_attention', which torch 2.14 computes wrongly for pixel_mask on CPUs "
                "without AVX-512. Call model.set_attn_implementation('sdpa')."
            )
        patch_embeddings = self.embeddings.patch_embeddings
        patch_embeddings.grid_of(pixel_values)
        grids = grids_of_padded_images(pixel_mask, patch_embeddings)
        rows, columns = patch_embeddings.patch_shape
        patches = pixel_mask[:, ::rows, ::columns].bool().flatten(1)  # (B, N)
        prefix = patches.new_ones(patches.shape[0], self.config.num_prefix_tokens)
        return grids, torch.cat([prefix, patches], dim=1)

    def _output_masks(self, sequence: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return `output_mask` and `patch_mask`, both of the same length as `last_hidden_state`."""
        batch_size, num_tokens, _ = sequence.shape
        index = torch.arange(num_tokens, device=sequence.device)
        is_cls, is_patch = index < int(self.config.use_cls_token), index >= self.config.num_prefix_tokens
        patch_mask = is_patch.expand(batch_size, -1)
        if token_mask is not None:
            patch_mask = patch_mask & token_mask
        output_mask = patch_mask | is_cls
        if self.config.discard_registers and self.config.num_register_tokens:
            parts = [self.split_tokens(mask) for mask in (output_mask, patch_mask)]
            output_mask, patch_mask = (torch.cat([cls_token, patches], dim=1) for cls_token, _, patches in parts)
        return output_mask, patch_mask


# --- Heads ---


def mean_of_patches(patch_tokens: Tensor, patch_mask: Tensor) -> Tensor:
    """Average the real patches: (B, N, D) tokens and the (B, T) `patch_mask` of the same output give (B, D)."""
    weights = patch_mask[:, -patch_tokens.shape[1] :, None].to(patch_tokens.dtype)
    wide = at_least_float32(patch_tokens)  # in float16, the sum over a thousand patches overflows
    return ((patch_tokens * weights).sum(1, dtype=wide) / weights.sum(1, dtype=wide)).to(patch_tokens.dtype)


def at_least_float32(tensor: Tensor) -> torch.dtype:
    """Return a dtype in which many values of the tensor can be summed without overflow."""
    return torch.promote_types(tensor.dtype, torch.float32)


def without_pooler(config: RegViTConfig, *, keep_attention: bool = False) -> RegViTConfig:
    """Return the configuration of a head that does not read `image_embeds`, nor, by default, an attention pooler."""
    config = copy.deepcopy(config) if config.projection_dim or config.attention_pooler else config
    config.projection_dim = None
    if config.attention_pooler and not keep_attention:
        vars(config).update(attention_pooler=False, pooler_num_heads=None, pooler_intermediate_size=None)
    return config


class RegViTForImageClassification(RegViTPreTrainedModel):
    """Linear classifier on CLS, the mean patch, or both (`config.pooling`); it never reads registers."""

    def __init__(self, config: RegViTConfig):
        config = without_pooler(config, keep_attention=config.pooling != "mean_patch")
        super().__init__(config)
        self.num_labels = config.num_labels
        has_pooled = config.attention_pooler or (config.use_cls_token and config.final_norm != "pooled")
        if config.pooling != "mean_patch" and not has_pooled:
            raise ValueError(
                f"pooling={config.pooling!r} reads CLS, but the model pools patches: use_cls_token="
                f"{config.use_cls_token} and final_norm={config.final_norm!r}. Use pooling='mean_patch'."
            )
        self.regvit = RegViTModel(config, add_pooling_layer=config.attention_pooler)
        width = config.hidden_size * (2 if config.pooling == "cls_mean_patch" else 1)
        self.classifier = nn.Linear(width, config.num_labels)
        self.post_init()

    def pool(self, output: RegViTModelOutput) -> Tensor:
        """Return the input of the classifier, (B, D) or (B, 2 * D)."""
        if self.config.pooling == "cls" or self.config.final_norm == "pooled":
            return output.pooler_output
        mean = mean_of_patches(output.patch_tokens, output.patch_mask)
        return mean if self.config.pooling == "mean_patch" else torch.cat([output.pooler_output, mean], dim=1)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutput | tuple:
        """Return logits (B, num_labels), and the loss if `labels` are given.

        `labels` has shape (B,) for class ids, or (B, num_labels) for multi-label classification or regression.
        """
        output = self.regvit(pixel_values, None, pixel_mask, output_attentions, output_hidden_states, return_dict=True)
        logits = self.classifier(self.pool(output))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        result = ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )
        return self._finish(result, return_dict, output_hidden_states)


class RegViTDensePreTrainedModel(RegViTPreTrainedModel):
    """Base class of the dense heads, which turn normalized tokens of chosen blocks into maps of the input's size."""

    def __init__(self, config: RegViTConfig):
        config = without_pooler(config)
        super().__init__(config)
        if config.final_norm == "pooled":
            raise ValueError("final_norm='pooled' has no norm of patches for dense heads. Use final_norm='tokens'.")
        self.regvit = RegViTModel(config, add_pooling_layer=False)

    def dense_features(self, output: RegViTModelOutput, *, with_cls: bool) -> Tensor:
        """Return patch features (B, N, F): the tokens of `config.head_layers`, concatenated, optionally with CLS."""
        features = []
        for block in self.config.head_layers:
            block %= self.config.num_hidden_layers
            tokens = self.regvit.layernorm(output.hidden_states[block + 1])
            cls_token, _, patch_tokens = self.regvit.split_tokens(tokens)
            features.append(patch_tokens)
            if with_cls and self.config.use_cls_token:
                features.append(cls_token.expand_as(patch_tokens))
        return torch.cat(features, dim=-1)

    def to_pixels(
        self, patch_values: Tensor, pixel_values: Tensor, pixel_mask: Tensor | None, decode: Callable
    ) -> Tensor:
        """Decode patch values (B, N, C) with `decode(maps (B, C, rows, columns), size in pixels)` to the input's size.

        Padded images are decoded one by one, without their padding.
        """
        patch_embeddings = self.regvit.embeddings.patch_embeddings
        rows, columns = patch_embeddings.grid_of(pixel_values)
        maps = patch_values.transpose(1, 2).unflatten(2, (rows, columns))  # (B, C, rows, columns)
        size = tuple(pixel_values.shape[-2:])
        if pixel_mask is None:
            return decode(maps, size)
        decoded = None
        for i, (own_rows, own_columns) in enumerate(grids_of_padded_images(pixel_mask, patch_embeddings)):
            own = (own_rows * patch_embeddings.patch_shape[0], own_columns * patch_embeddings.patch_shape[1])
            image = decode(maps[i : i + 1, :, :own_rows, :own_columns], own)
            if decoded is None:
                decoded = image.new_zeros(len(maps), image.shape[1], *size)
            decoded[i : i + 1, :, : own[0], : own[1]] = image
        return decoded


class RegViTForSemanticSegmentation(RegViTDensePreTrainedModel):
    """Linear segmentation head of DINOv2: batch norm and one linear layer per patch, with bilinear upsampling."""

    def __init__(self, config: RegViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        width = config.hidden_size * len(config.head_layers)
        self.head_norm = nn.BatchNorm1d(width)
        self.classifier = nn.Linear(width, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> SemanticSegmenterOutput | tuple:
        """Return logits (B, num_labels, H, W) at the input size, and the loss if `labels` (B, H, W) are given."""
        output = self.regvit(pixel_values, None, pixel_mask, output_attentions, True, return_dict=True)
        features = self.dense_features(output, with_cls=False)  # (B, N, F)
        valid = output.patch_mask[:, -features.shape[1] :]
        if pixel_mask is None:
            patch_logits = self.classifier(self.head_norm(features.flatten(0, 1))).unflatten(0, features.shape[:2])
        else:  # padding must not enter the statistics of the batch norm
            patch_logits = features.new_zeros(*features.shape[:2], self.num_labels)
            patch_logits[valid] = self.classifier(self.head_norm(features[valid])).to(patch_logits.dtype)
        upsample = partial(nn.functional.interpolate, mode="bilinear", align_corners=False)
        logits = self.to_pixels(patch_logits, pixel_values, pixel_mask, upsample)  # (B, C, H, W)
        loss = None
        if labels is not None:
            ignore = self.config.semantic_loss_ignore_index
            if pixel_mask is not None:
                labels = labels.masked_fill(~pixel_mask.bool(), ignore)
            # Mean over labeled pixels. The clamp makes a batch without labeled pixels give 0 instead of NaN.
            total = nn.functional.cross_entropy(logits.float(), labels, ignore_index=ignore, reduction="sum")
            loss = total / (labels != ignore).sum().clamp(min=1)
        result = SemanticSegmenterOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )
        return self._finish(result, return_dict, output_hidden_states)


class RegViTForDepthEstimation(RegViTDensePreTrainedModel):
    """Linear depth head of DINOv2: depth bins from each patch token and CLS, on a grid upsampled four times."""

    UPSAMPLE = 4

    def __init__(self, config: RegViTConfig):
        super().__init__(config)
        width = (1 + config.use_cls_token) * config.hidden_size * len(config.head_layers)
        self.classifier = nn.Linear(width, config.num_depth_bins)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> DepthEstimatorOutput | tuple:
        """Return depth (B, H, W) in meters at the input size, and the loss if `labels`, also in meters, are given.

        Labels that are <= 0, infinite or NaN are ignored.
        """
        output = self.regvit(pixel_values, None, pixel_mask, output_attentions, True, return_dict=True)
        # A linear layer and bilinear upsampling commute, so the layer runs on the small grid.
        bins = self.classifier(self.dense_features(output, with_cls=True))  # (B, N, bins)
        depth = self.to_pixels(bins, pixel_values, pixel_mask, self._bins_to_meters)[:, 0]  # (B, H, W)
        loss = None
        if labels is not None:
            valid = (labels > 0) & labels.isfinite()
            loss = scale_invariant_log_loss(
                depth.float(), labels.float(), valid & pixel_mask.bool() if pixel_mask is not None else valid
            )
        result = DepthEstimatorOutput(
            loss=loss, predicted_depth=depth, hidden_states=output.hidden_states, attentions=output.attentions
        )
        return self._finish(result, return_dict, output_hidden_states)

    def _bins_to_meters(self, bins: Tensor, size: tuple[int, int]) -> Tensor:
        """Decode (B, bins, rows, columns) to depth (B, 1, H, W), the weighted mean of the bin centers.

        The weights are relu(bins) + 0.1, divided by their sum ("linear norm" in DINOv2).
        """
        dtype = bins.dtype
        bins = bins.to(at_least_float32(bins))  # in float16, the sum over the bins overflows
        grid = tuple(self.UPSAMPLE * side for side in bins.shape[-2:])
        bins = nn.functional.interpolate(bins, size=grid, mode="bilinear", align_corners=False)
        weights = nn.functional.relu(bins) + 0.1
        first, last, count = self.config.min_depth, self.config.max_depth, self.config.num_depth_bins
        centers = torch.linspace(first, last, count, device=bins.device, dtype=bins.dtype)
        depth = (weights * centers[:, None, None]).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        return nn.functional.interpolate(depth, size=size, mode="bilinear", align_corners=False).to(dtype)


def scale_invariant_log_loss(depth: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Return `sqrt(Var(g) + 0.15 mean(g)^2)` for g = log(depth) - log(target) over at least two `valid` pixels, or 0.

    Source: "SigLog" in the linear depth protocol (arXiv 2304.07193, based on arXiv 1406.2283).
    """
    error = (torch.log(depth + 1e-3) - torch.log(target.clamp(min=0) + 1e-3))[valid]
    if error.numel() < 2:
        return depth.sum() * 0
    return torch.sqrt(error.var() + 0.15 * error.mean() ** 2)


class RegViTBackbone(BackboneMixin, RegViTPreTrainedModel):
    """Backbone that returns feature maps of chosen blocks for dense transformers models (DPT, UperNet, ...).

    `AutoBackbone.from_pretrained` queries the Hub before the disk and rejects local folders. For a local folder, use
    `RegViTBackbone.from_pretrained(folder)`, or import hf_regvit first.
    """

    def __init__(self, config: RegViTConfig):
        config = without_pooler(config)
        super().__init__(config)
        self.regvit = RegViTModel(config, add_pooling_layer=False)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        pixel_mask: Tensor | None = None,
        **kwargs,
    ) -> BackboneOutput | tuple:
        """Return feature maps (B, D, rows, columns), or token sequences if `reshape_hidden_states` is False."""
        output = self.regvit(pixel_values, None, pixel_mask, output_attentions, True, return_dict=True)
        grid = self.regvit.embeddings.patch_embeddings.grid_of(pixel_values)
        feature_maps = []
        for stage, tokens in zip(self.stage_names, output.hidden_states):
            if stage not in self.out_features:
                continue
            if self.config.apply_layernorm:
                tokens = self.regvit.layernorm(tokens)
            cls_token, _, patch_tokens = self.regvit.split_tokens(tokens)
            if self.config.reshape_hidden_states:
                tokens = patch_tokens.transpose(1, 2).unflatten(2, grid).contiguous()  # (B, D, rows, columns)
            elif not self.config.return_register_tokens:
                tokens = torch.cat([cls_token, patch_tokens], dim=1)  # (B, 1 + N, D)
            feature_maps.append(tokens)
        result = BackboneOutput(
            feature_maps=tuple(feature_maps), hidden_states=output.hidden_states, attentions=output.attentions
        )
        return self._finish(result, return_dict, output_hidden_states)


__all__ = [
    "RegViTBackbone", "RegViTForDepthEstimation", "RegViTForImageClassification", "RegViTForSemanticSegmentation",
    "RegViTModel", "RegViTModelOutput", "RegViTPreTrainedModel",
]  # fmt: skip
