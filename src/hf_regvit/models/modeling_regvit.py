# Copyright 2026 The hf_regvit developers. Licensed under the Apache License, Version 2.0.
"""RegViT: a plain vision transformer with register tokens (arXiv 2309.16588).

Token order is `[CLS | registers | patches]`. Registers are added after the position embeddings, have no position
themselves, take part in every block, and are never read by a head or a pooled output. Shapes: B images, R registers,
N patches in a grid of (rows, columns), T = 1 + R + N tokens, D width, L blocks.

This file and the configuration file are copied to the Hub unchanged, so both are self-contained and depend only on
torch, transformers and safetensors. Hidden states and attentions are collected explicitly, because the transformers
helpers for this moved several times within 5.x and a Hub repository must run with whatever version its user has.
"""

import copy
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
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

from .configuration_regvit import RegViTConfig

logger = logging.get_logger(__name__)


class ImageTooSmallError(ValueError):
    """Raised for an image with a side shorter than one patch."""


class CheckpointError(ValueError, RuntimeError):
    """Raised for weights that do not fit the model: missing, unexpected or mismatched tensors.

    It is also a RuntimeError, because transformers raises a RuntimeError for mismatched shapes.
    """


class CheckpointCorruptError(CheckpointError):
    """Raised for a weights file that cannot be read."""


@dataclass
class RegViTModelOutput(ModelOutput):
    """Output of `RegViTModel`. T' is T, or T - R if `discard_registers` is set.

    Args:
        last_hidden_state: (B, T', D) tokens after the final norm, in the order `[CLS | registers | patches]`.
        pooler_output: (B, D) normalized CLS token; `final_norm` and `pooler_act` in the config select other outputs.
        register_tokens: (B, R, D) normalized registers; R may be 0.
        patch_tokens: (B, N, D) normalized patches, row-major over the grid.
        output_mask: (B, T') bool, True at CLS and patches, False at registers and padding.
        patch_mask: (B, T') bool, True at patches, False at CLS, registers and padding.
        hidden_states: L + 1 tensors (B, T, D), the raw residual stream: after the embedding, then after each block.
            The last one is **before** the final norm; artifact norms are measured on these tensors.
        attentions: L tensors (B, heads, T, T); only the "eager" attention implementation returns them.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    register_tokens: torch.FloatTensor | None = None
    patch_tokens: torch.FloatTensor | None = None
    output_mask: torch.BoolTensor | None = None
    patch_mask: torch.BoolTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


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

    def grid_of(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Return the patch grid (rows, columns) of a batch (B, C, H, W); raise if it cannot be split into patches."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected (batch, {self.num_channels}, height, "
                "width). Convert the images to that number of channels, or change num_channels in the config."
            )
        height, width = pixel_values.shape[-2:]
        self.check_size(height, width)
        return height // self.patch_shape[0], width // self.patch_shape[1]

    def check_size(self, height: int, width: int) -> None:
        """Raise unless an image of this size (in pixels) consists of whole patches."""
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

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.projection(pixel_values.to(self.projection.weight.dtype))  # (B, D, rows, columns)
        return patches.flatten(2).transpose(1, 2)  # (B, N, D)


class RegViTEmbeddings(nn.Module):
    """Input sequence of CLS, registers and patches; only CLS and patches receive position embeddings."""

    MAX_CACHED_GRIDS = 8

    def __init__(self, config: RegViTConfig):
        super().__init__()
        self.config = config
        self.patch_embeddings = RegViTPatchEmbeddings(config)
        self.num_position_prefix = 0 if config.no_embed_class else 1
        num_positions = math.prod(config.grid) + self.num_position_prefix
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.empty(1, num_positions, config.hidden_size))
        # None rather than an empty tensor, so that the checkpoint of a plain ViT has no extra key.
        self.register_tokens = (
            nn.Parameter(torch.empty(1, config.num_register_tokens, config.hidden_size))
            if config.num_register_tokens
            else None
        )
        self.mask_token = nn.Parameter(torch.empty(1, config.hidden_size)) if config.use_mask_token else None
        self._cached_table: torch.Tensor | None = None
        self._cached_stamp: tuple[int, int] | None = None
        self._cached_positions: dict[tuple[int, int], torch.Tensor] = {}

    def train(self, mode: bool = True) -> "RegViTEmbeddings":
        """Set the mode and clear the position cache, since the weights may change around a mode switch."""
        self._cached_table = None
        return super().train(mode)

    def resample_positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """Return the patch positions (1, N, D) for a grid of (rows, columns).

        The interpolation is bicubic, in float32. With `interpolate_offset`, it uses scale factors instead of sizes,
        which shifts the sampling points; released checkpoints exist for both forms.

        Source: dinov2 `models/vision_transformer.py`, `interpolate_pos_encoding`.
        """
        table = self.position_embeddings[:, self.num_position_prefix :]  # (1, N0, D)
        stored = self.config.grid
        if grid == stored:
            return table
        offset = self.config.interpolate_offset
        target = (
            {"scale_factor": tuple((new + offset) / old for new, old in zip(grid, stored))}
            if offset
            else {"size": grid}
        )
        maps = table.reshape(1, *stored, -1).permute(0, 3, 1, 2).float()  # (1, D, rows0, columns0)
        maps = nn.functional.interpolate(
            maps, mode="bicubic", align_corners=False, antialias=self.config.interpolate_antialias, **target
        )
        return maps.to(table.dtype).flatten(2).transpose(1, 2)  # (1, N, D)

    def patch_positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """Return `resample_positions(grid)`, cached per grid except in training, under autograd and under `compile`.

        A stale entry would silently give wrong positions, so the cache is validated on every call. On the CPU, the
        values of the table are compared, which also detects writes through `.data`. On other devices this would force
        a synchronization, so only the address and version counter of the parameter are compared.
        """
        table = self.position_embeddings
        if grid == self.config.grid:
            return table[:, self.num_position_prefix :]
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and table.requires_grad) or self.training:
            return self.resample_positions(grid)
        if type(table) is not nn.Parameter:  # tensors wrapped by torch.func have no values to compare
            return self.resample_positions(grid)
        if not self._cache_is_valid(table):
            # Assign a new dict instead of clearing it: nn.DataParallel replicas on other devices share the old one.
            self._cached_positions = {}
            self._cached_table = table.detach().clone() if table.device.type == "cpu" else table.detach()
            self._cached_stamp = None if table.is_inference() else (table.data_ptr(), table._version)
        cached = self._cached_positions
        positions = cached.get(grid)
        if positions is None:
            if len(cached) >= self.MAX_CACHED_GRIDS:
                cached.pop(next(iter(cached)), None)
            positions = cached[grid] = self.resample_positions(grid)
        return positions

    def _cache_is_valid(self, table: torch.Tensor) -> bool:
        cached = self._cached_table
        if cached is None or cached.device != table.device or cached.dtype != table.dtype:
            return False
        if table.device.type == "cpu":
            return torch.equal(cached, table)
        return self._cached_stamp is not None and self._cached_stamp == (table.data_ptr(), table._version)

    def padded_positions(self, grids: list[tuple[int, int]], grid: tuple[int, int]) -> torch.Tensor:
        """Return positions (B, N, D) of padded images: each image gets those of its own grid, padding gets 0.

        Args:
            grids: Grid (rows, columns) of each image without its padding, which is on the right and at the bottom.
            grid: Grid of the padded images.
        """
        width = self.config.hidden_size
        positions = self.position_embeddings.new_zeros(len(grids), *grid, width)
        for own in set(grids):
            rows = [i for i, g in enumerate(grids) if g == own]
            positions[rows, : own[0], : own[1]] = self.patch_positions(own).reshape(1, *own, width)
        return positions.flatten(1, 2)

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        grids: list[tuple[int, int]] | None = None,
    ) -> torch.Tensor:
        """Return the tokens (B, T, D) that enter the first block.

        `grids` holds the grid of each image without its padding, or is None if no image is padded.
        """
        grid = self.patch_embeddings.grid_of(pixel_values)
        patches = self.patch_embeddings(pixel_values)  # (B, N, D)
        batch_size = patches.shape[0]
        if bool_masked_pos is not None:
            patches = self._mask_patches(patches, bool_masked_pos)
        elif self.mask_token is not None and self.training:
            # Keep the mask token in the graph: otherwise DDP must search for unused parameters in unmasked steps.
            patches = patches + 0 * self.mask_token
        patches = patches + (self.patch_positions(grid) if grids is None else self.padded_positions(grids, grid))
        cls_token = self.cls_token
        if self.num_position_prefix:
            cls_token = cls_token + self.position_embeddings[:, :1]
        tokens = [cls_token.expand(batch_size, -1, -1), patches]
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
            tokens.insert(1, self.register_tokens.expand(batch_size, -1, -1))
        return torch.cat(tokens, dim=1)  # (B, T, D)

    def _mask_patches(self, patches: torch.Tensor, bool_masked_pos: torch.Tensor) -> torch.Tensor:
        if self.mask_token is None:
            raise ValueError(
                "bool_masked_pos was given, but the model has no mask token. "
                "Create or load the model with use_mask_token=True."
            )
        if bool_masked_pos.shape != patches.shape[:2]:
            raise ValueError(
                f"bool_masked_pos has shape {tuple(bool_masked_pos.shape)}, expected (batch, patches) = "
                f"{tuple(patches.shape[:2])}. Pass one entry per patch and none for CLS or registers."
            )
        return torch.where(bool_masked_pos.bool().unsqueeze(-1), self.mask_token.to(patches.dtype), patches)


def grids_of_padded_images(pixel_mask: torch.Tensor, embeddings: RegViTPatchEmbeddings) -> list[tuple[int, int]]:
    """Return the grid (rows, columns) of each image without its padding.

    `pixel_mask` (B, H, W) is nonzero at the pixels of the image and 0 at padding.
    """
    mask = pixel_mask.bool()
    heights, widths = mask[:, :, 0].sum(1), mask[:, 0, :].sum(1)  # (B,)
    rows = torch.arange(mask.shape[1], device=mask.device)[None, :, None] < heights[:, None, None]
    columns = torch.arange(mask.shape[2], device=mask.device)[None, None, :] < widths[:, None, None]
    if not torch.equal(mask, rows & columns):
        raise ValueError(
            "pixel_mask is not one rectangle per image: it must be 1 on a rectangle in the top left corner and 0 "
            "elsewhere. Pad images only on the right and at the bottom."
        )
    sizes = list(zip(heights.tolist(), widths.tolist()))
    for height, width in sizes:
        embeddings.check_size(height, width)
    return [(height // embeddings.patch_shape[0], width // embeddings.patch_shape[1]) for height, width in sizes]


# --- Blocks ---


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute softmax attention of query, key and value, each (B, heads, T, head_dim).

    Returns:
        Output (B, T, heads, head_dim), and the attention weights (B, heads, T, T), which no other implementation
        returns.
    """
    scores = query @ key.transpose(2, 3) * scaling  # (B, heads, T, T)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1)
    return (weights @ value).transpose(1, 2), weights


class RegViTAttention(nn.Module):
    """Self-attention over all tokens, including registers, with a fused projection for query, key and value."""

    def __init__(self, config: RegViTConfig):
        super().__init__()
        self.config = config
        self.num_attention_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.proj_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output (B, T, D), and the attention weights or None.

        With `tokens` (n,), indices into the flattened (B * T) tokens, the output holds only these tokens: (n, D).
        """
        batch_size, num_tokens, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch_size, num_tokens, 3, self.num_attention_heads, self.head_dim)
        query, key, value = (x.transpose(1, 2) for x in qkv.unbind(2))  # (B, heads, T, head_dim)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0
        )
        output = output.reshape(batch_size, num_tokens, width)
        if tokens is not None:
            output = output.flatten(0, 1).index_select(0, tokens)  # (n, D)
        return self.o_proj(output), weights


def move_to_registers(
    activations: torch.Tensor, neurons: list[int], num_register_tokens: int, token_mask: torch.Tensor | None
) -> torch.Tensor:
    """Move the activations of a few MLP neurons from patches to registers (test-time registers, arXiv 2506.08010).

    `activations` (B, T, H) is the input of the MLP's last linear layer. For each of the S `neurons`, every register
    gets the neuron's value of largest magnitude over all tokens of the image, every patch gets 0, and CLS keeps its
    value. The maximum excludes padding, where `token_mask` (B, T) is False. Without neurons, the input is returned.
    """
    if not neurons:
        return activations
    index = torch.tensor(neurons, device=activations.device)
    chosen = activations.index_select(2, index)  # (B, T, S)
    seen = chosen if token_mask is None else chosen.masked_fill(~token_mask.unsqueeze(-1), 0)
    largest = seen.gather(1, seen.abs().argmax(dim=1, keepdim=True))  # (B, 1, S), sign kept
    patches = torch.zeros_like(chosen[:, 1 + num_register_tokens :])
    moved = torch.cat([chosen[:, :1], largest.expand(-1, num_register_tokens, -1), patches], dim=1)  # (B, T, S)
    return activations.index_copy(2, index, moved)


class RegViTMLP(nn.Module):
    """Two linear layers with an activation in between."""

    def __init__(self, config: RegViTConfig, register_neurons: list[int]):
        super().__init__()
        self.config = config
        self.register_neurons = register_neurons
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=config.mlp_bias)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
        activations = self.activation(self.fc1(hidden_states))  # (B, T, H)
        registers = self.config.num_register_tokens
        return self.fc2(move_to_registers(activations, self.register_neurons, registers, token_mask))


class RegViTSwiGLU(nn.Module):
    """Gated MLP; the first half of `gate_up_proj` is the gate (same row order as `w12` in DINOv2)."""

    def __init__(self, config: RegViTConfig, register_neurons: list[int]):
        super().__init__()
        self.config = config
        self.register_neurons = register_neurons
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        activations = nn.functional.silu(gate) * up  # (B, T, H)
        registers = self.config.num_register_tokens
        return self.down_proj(move_to_registers(activations, self.register_neurons, registers, token_mask))


class RegViTLayerScale(nn.Module):
    """Learnable per-channel scale of the output of a residual branch."""

    def __init__(self, config: RegViTConfig):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, branch: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Scale the branch; with `residual`, also add it in the same pass over memory."""
        if residual is None:
            return branch * self.lambda1
        return torch.addcmul(residual, branch, self.lambda1)


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
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Apply the block.

        Args:
            hidden_states: (B, T, D) residual stream.
            attention_mask: Mask in the form the attention implementation expects.
            tokens: (n,) indices into the flattened (B * T) tokens. Only these tokens are computed; all others serve
                only as keys and values. Pretraining uses this in the last block to save time.
            token_mask: (B, T) bool, False at padding. Only register neurons need it in addition to `attention_mask`.

        Returns:
            The tokens (B, T, D), or (n, D) with `tokens`, and the attention weights (B, heads, T, T) or None.
        """
        if tokens is not None:
            if self.mlp.register_neurons:
                raise NotImplementedError(
                    "tokens was given, but a block with register neurons must compute all tokens. Set "
                    "register_neurons=None for pretraining."
                )
            return self._forward_tokens(hidden_states, attention_mask, tokens)
        rows = self._draw_rows(hidden_states)
        attended, weights = self.attention(
            self.norm1(self._take(hidden_states, rows)), self._take(attention_mask, rows)
        )
        hidden_states = self._add(hidden_states, attended, self.layer_scale1, rows)
        del attended  # memory use peaks in the MLP, so free this tensor before it runs
        rows = self._draw_rows(hidden_states)
        transformed = self.mlp(self.norm2(self._take(hidden_states, rows)), self._take(token_mask, rows))
        return self._add(hidden_states, transformed, self.layer_scale2, rows), weights

    def _forward_tokens(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch_size, num_tokens, _ = hidden_states.shape
        image = tokens // num_tokens  # (n,)
        rows = self._draw_rows(hidden_states)
        sources = tokens
        if rows is not None:
            # Row of each image among the drawn images. Images not drawn point to row 0, but their gain is 0.
            place = torch.zeros(batch_size, dtype=torch.long, device=tokens.device)
            place[rows] = torch.arange(len(rows), device=tokens.device)
            sources = place[image] * num_tokens + tokens % num_tokens
        attended, weights = self.attention(
            self.norm1(self._take(hidden_states, rows)), self._take(attention_mask, rows), sources
        )
        output = hidden_states.flatten(0, 1).index_select(0, tokens)  # (n, D)
        output = self._add_to_tokens(output, attended, self.layer_scale1, self._draw_gains(hidden_states, rows), image)
        gains = self._draw_gains(hidden_states, self._draw_rows(hidden_states))
        return self._add_to_tokens(output, self.mlp(self.norm2(output)), self.layer_scale2, gains, image), weights

    def _draw_rows(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Draw the samples whose branch is computed in mode "batch_subset": a share of 1 - rate, at least one.

        Returns:
            Indices of the samples, or None if the branch is computed for all of them.
        """
        if not self.training or self.drop_path_rate == 0 or self.drop_path_mode != "batch_subset":
            return None
        batch_size = hidden_states.shape[0]
        keep = max(int(batch_size * (1 - self.drop_path_rate)), 1)
        return torch.randperm(batch_size, device=hidden_states.device)[:keep]

    @staticmethod
    def _take(tensor: torch.Tensor | None, rows: torch.Tensor | None) -> torch.Tensor | None:
        if rows is None or tensor is None:
            return tensor
        if not isinstance(tensor, torch.Tensor):
            raise NotImplementedError(
                "drop_path_mode='batch_subset' cannot select the rows of a flex-attention mask. "
                "For padded batches, use drop_path_mode='sample' or attn_implementation='sdpa'."
            )
        return tensor.index_select(0, rows)

    def _draw_gains(self, hidden_states: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor | None:
        """Draw the factors (B,) by which stochastic depth (arXiv 1603.09382) scales the branch of each sample.

        `rows` are the samples from `_draw_rows`. The result is None if no branch is dropped.
        """
        if not self.training or self.drop_path_rate == 0:
            return None
        gains = hidden_states.new_zeros(hidden_states.shape[0])
        if rows is not None:
            # Scale by the share actually drawn, not by 1 / (1 - rate), as in dinov2 `layers/block.py`.
            return gains.index_fill(0, rows, len(gains) / len(rows))
        keep = 1 - self.drop_path_rate
        return gains.bernoulli_(keep) / keep

    @staticmethod
    def _add_to_tokens(
        tokens: torch.Tensor,
        branch: torch.Tensor,
        layer_scale: RegViTLayerScale | None,
        gains: torch.Tensor | None,
        image: torch.Tensor,
    ) -> torch.Tensor:
        """Return tokens + gain * scale * branch, (n, D); `image` (n,) holds the index of each token's image."""
        if layer_scale is not None:
            branch = layer_scale(branch)
        if gains is not None:
            branch = branch * gains[image].to(branch.dtype).unsqueeze(1)
        return tokens + branch

    def _add(
        self,
        hidden_states: torch.Tensor,
        branch: torch.Tensor,
        layer_scale: RegViTLayerScale | None,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return hidden_states + scale * branch, with stochastic depth in training."""
        if not self.training or self.drop_path_rate == 0:
            if layer_scale is None:
                return hidden_states + branch
            return layer_scale(branch, hidden_states)
        if layer_scale is not None:
            branch = layer_scale(branch)
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
    # Must be the whole embedding, not only its patch embedding: FSDP2 shards this module after `_no_split_modules`
    # and fails if one is nested in the other.
    _input_embed_layer = "embeddings"
    _keys_to_ignore_on_load_unexpected = [r"mask_token", r"(^|\.)pooler\."]
    image_processor = None  # set by `convert`: the processor of the source, which is saved with the model

    def __init__(self, config: RegViTConfig, *args, **kwargs):
        config.validate_architecture()  # again, since from_pretrained applies overrides after the config's own check
        self._check_memory(config)
        super().__init__(config, *args, **kwargs)

    @staticmethod
    def _check_memory(config: RegViTConfig) -> None:
        """Raise if the weights exceed the memory of the machine, before they are allocated (CPU only)."""
        needed = config.num_parameters() * torch.get_default_dtype().itemsize
        if torch.get_default_device().type != "cpu" or not hasattr(os, "sysconf"):
            return
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > available:
            raise MemoryError(
                f"hidden_size={config.hidden_size} with num_hidden_layers={config.num_hidden_layers} needs "
                f"{needed / 2**30:,.0f} GiB for its weights, but this machine has {available / 2**30:,.0f} GiB. "
                "Use a smaller model, or create it under torch.device('meta')."
            )

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
            init.trunc_normal_(module.position_embeddings, std=std)
            init.normal_(module.cls_token, std=1e-6)
            if module.register_tokens is not None:
                init.normal_(module.register_tokens, std=self.config.register_init_std)
            if module.mask_token is not None:
                init.zeros_(module.mask_token)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, ignore_mismatched_sizes=False, **kwargs):
        """Load like any transformers model, but raise if part of the backbone would stay randomly initialized.

        Raises:
            CheckpointCorruptError: The weights file cannot be read.
            CheckpointError: Backbone tensors (including registers) are missing, unexpected or of another shape.
                `ignore_mismatched_sizes=True` applies to heads only.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)  # RegViT never saves pickles, so it did not write a pickle
        try:
            check_weight_files(pretrained_model_name_or_path)
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **kwargs,
            )
        except SafetensorError as error:
            raise corrupt_weights(pretrained_model_name_or_path, error) from error
        if pretrained_model_name_or_path is not None:  # None: the caller passed a state dict and is responsible for it
            model._check_loaded(pretrained_model_name_or_path, info, ignore_mismatched_sizes)
            check_finite(model.state_dict(), pretrained_model_name_or_path)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save like any transformers model, with `image_processor` if there is one, so that a pipeline can load it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.image_processor is not None and kwargs.get("is_main_process", True):
            hub = {"push_to_hub", "repo_id", "token", "private", "revision", "create_pr", "commit_message"}
            self.image_processor.save_pretrained(save_directory, **{k: v for k, v in kwargs.items() if k in hub})

    def _move_missing_keys_from_meta_to_device(self, missing_keys: set[str], *args, **kwargs) -> None:
        """Leave missing backbone tensors on the meta device, since `_check_loaded` is about to reject them."""
        if self.config.name_or_path != "None":  # from_pretrained(None, state_dict=...) sets it to this string
            missing_keys = missing_keys - {
                key for key in _backbone_keys(missing_keys) if not key.endswith("mask_token")
            }
        super()._move_missing_keys_from_meta_to_device(missing_keys, *args, **kwargs)

    def _check_loaded(self, source, info: dict, ignore_mismatched_sizes: bool) -> None:
        wanted = self.config.num_register_tokens
        resize = "Load it without that override, then call model.resize_register_tokens(n)"
        problems = []
        for key in _backbone_keys(info["missing_keys"]):
            if key.endswith("register_tokens"):
                problems.append(f"num_register_tokens={wanted}, but the checkpoint has no register tokens. {resize}")
            elif not key.endswith("mask_token"):
                problems.append(f"{key} is missing")
        for key in _backbone_keys(info["unexpected_keys"]):
            if key.endswith("register_tokens"):
                problems.append(f"num_register_tokens=0, but the checkpoint has register tokens. {resize}")
            else:
                problems.append(f"{key} is in the checkpoint but not in the model")
        for key, found, expected in sorted(info["mismatched_keys"]):
            if key.endswith("register_tokens"):
                hint = f": num_register_tokens={wanted}, but the checkpoint has {found[1]}. {resize}"
            elif key.endswith("position_embeddings"):
                hint = ". Load it without an image_size override: positions are resampled for other input sizes"
            elif _backbone_keys([key]):
                hint = ""
            elif ignore_mismatched_sizes:
                continue
            else:
                hint = ". Pass ignore_mismatched_sizes=True to initialize this head randomly"
            shapes = f"{tuple(found)} in the checkpoint and {tuple(expected)} in the model"
            problems.append(f"{key} has shape {shapes}{hint}")
        if problems:
            shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            raise CheckpointError(f"The checkpoint '{source}' does not fit {type(self).__name__}: {shown}.")

    def _run_backbone(
        self,
        pixel_values: torch.Tensor | None,
        pixel_mask: torch.Tensor | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
    ) -> RegViTModelOutput:
        """Run the backbone of a model with a head."""
        return self.regvit(
            pixel_values,
            pixel_mask=pixel_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )

    def resize_register_tokens(self, num_register_tokens: int, *, seed: int = 0) -> "RegViTPreTrainedModel":
        """Change the number of registers of the backbone in place and return this model.

        See `RegViTModel.resize_register_tokens`.
        """
        self.base_model.resize_register_tokens(num_register_tokens, seed=seed)
        return self

    def _finish(self, output: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple:
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _requested_hidden_states(self, output: RegViTModelOutput, output_hidden_states: bool | None) -> tuple | None:
        """Return the hidden states if the caller asked for them (dense heads always compute them)."""
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return output.hidden_states if wanted else None


def _backbone_keys(keys) -> list[str]:
    """Return the keys that belong to the backbone, sorted; all others belong to heads and poolers."""
    return sorted(
        key for key in keys if key.removeprefix("regvit.").startswith(("embeddings.", "layers.", "layernorm."))
    )


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


def check_weight_files(source) -> None:
    """Check the weights of a folder before they are loaded: names in an index, and types of numbers.

    A changed type in the header of a file would be read as other numbers: 0.98 becomes 1065017672.0.

    Raises:
        CheckpointCorruptError: An index is damaged or names another file than one beside it, or weights are integers.
    """
    folder = Path(source or "")
    if not source or not folder.exists():
        return
    for index in sorted(folder.glob("*.index*.json")):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointCorruptError(
                f"'{index}' is not an index of weights ({type(error).__name__}: {error}). Download it again."
            ) from error
        for name in names:
            shard_of(folder, name, ".bin" if index.name.startswith("pytorch_model.") else ".safetensors")
    config = folder / "config.json"
    if config.is_file() and b'"quantization_config"' in config.read_bytes():
        return
    for path in [folder] if folder.is_file() else sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                kind = file.get_slice(key).get_dtype()
                if kind.startswith(("I", "U", "BOOL")) and not key.endswith(_INTEGERS):
                    raise CheckpointCorruptError(
                        f"'{path}' holds '{key}' as {kind}, expected floating-point numbers. Download the file again."
                    )


_INTEGERS = ("position_ids", "num_batches_tracked", "relative_position_index")  # buffers of other families


def check_finite(tensors: dict[str, torch.Tensor], source) -> None:
    """Raise a `CheckpointCorruptError` if a weight is NaN or infinite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.is_meta and not tensor.isfinite().all():
            raise CheckpointCorruptError(
                f"'{name}' in the weights of '{source}' holds NaN or infinity, so every output would be wrong. Use "
                "another checkpoint."
            )


def corrupt_weights(source, error: SafetensorError) -> CheckpointCorruptError:
    """Create the error for weights that cannot be read, naming the first damaged safetensors file of a folder."""
    named = f"The weights of '{source}'"
    for path in sorted(Path(source).glob("*.safetensors"), reverse=True) if Path(source).is_dir() else []:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            named = f"'{path}'"
    return CheckpointCorruptError(f"{named} cannot be read as safetensors ({error}). Download or save the file again.")


class RegViTPooler(nn.Module):
    """Dense layer with an activation on CLS, which precedes the head in the original ViT."""

    def __init__(self, config: RegViTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.pooler_act]

    def forward(self, cls_token: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(cls_token))


class RegViTModel(RegViTPreTrainedModel):
    """Backbone that maps pixels to CLS, register and patch tokens.

    Example:
    ```python
    >>> output = model(pixel_values)
    >>> output.pooler_output, output.patch_tokens, output.register_tokens
    >>> output.last_hidden_state[output.output_mask]  # all tokens except registers and padding
    ```
    """

    def __init__(self, config: RegViTConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        rate, depth = config.drop_path_rate, config.num_hidden_layers
        rates = [rate if config.drop_path_uniform else rate * i / max(depth - 1, 1) for i in range(depth)]
        self.embeddings = RegViTEmbeddings(config)
        self.layers = nn.ModuleList([RegViTLayer(config, rates[i], i) for i in range(depth)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = RegViTPooler(config) if add_pooling_layer and config.pooler_act is not None else None
        self.post_init()

    def split_tokens(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split (B, T, D) into CLS (B, 1, D), registers (B, R, D) and patches (B, N, D)."""
        prefix = self.config.num_prefix_tokens
        return tokens[:, :1], tokens[:, 1:prefix], tokens[:, prefix:]

    @torch.no_grad()
    def resize_register_tokens(self, num_register_tokens: int, *, seed: int = 0) -> "RegViTModel":
        """Change the number of registers in place, in the model and in its config.

        The first registers are kept. Additional ones are drawn from a normal distribution with mean 0 and standard
        deviation `register_init_std`; they are untrained, so train them before use.

        Args:
            num_register_tokens: New number of registers; 0 removes them.
            seed: Random seed for the new registers.

        Returns:
            This model.
        """
        wanted = copy.copy(self.config)  # validate a copy, so that a rejected number leaves the model unchanged
        wanted.num_register_tokens = num_register_tokens
        wanted.validate_architecture()
        self.config.num_register_tokens = num_register_tokens
        old = self.embeddings.register_tokens
        like, kept = self.embeddings.cls_token, 0 if old is None else min(old.shape[1], num_register_tokens)
        if num_register_tokens == 0:
            self.embeddings.register_tokens = None
            return self
        generator = torch.Generator().manual_seed(seed)
        tokens = (
            torch.randn(1, num_register_tokens, like.shape[-1], generator=generator) * self.config.register_init_std
        )
        if kept:
            tokens[:, :kept] = old[:, :kept].cpu()
        self.embeddings.register_tokens = nn.Parameter(tokens.to(like.device, like.dtype))
        return self

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
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

        Returns:
            `RegViTModelOutput`, or the tuple of those of its fields that are not None.

        Raises:
            ImageTooSmallError: A side of the images is shorter than a patch.
            ValueError: The number of channels is wrong, the image size is not a multiple of the patch size, or a mask
                has the wrong shape.
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

        grids, token_mask = None, None
        if pixel_mask is not None:
            grids, token_mask = self._token_mask(pixel_values, pixel_mask)
        hidden_states = self.embeddings(pixel_values, bool_masked_pos, grids)  # (B, T, D)
        attention_mask = None if token_mask is None else create_bidirectional_mask(config, hidden_states, token_mask)

        all_hidden_states, all_attentions = [hidden_states] if output_hidden_states else [], []
        for layer in self.layers:
            hidden_states, weights = layer(hidden_states, attention_mask, token_mask=token_mask)
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            if output_attentions and weights is not None:
                all_attentions.append(weights)

        sequence = self.layernorm(hidden_states) if config.final_norm == "tokens" else hidden_states
        cls_token, register_tokens, patch_tokens = self.split_tokens(sequence)
        output_mask, patch_mask = self._output_masks(sequence, token_mask)
        if config.final_norm == "pooled":
            pooled = self.layernorm(mean_of_patches(patch_tokens, patch_mask))
        else:
            pooled = cls_token[:, 0] if self.pooler is None else self.pooler(cls_token[:, 0])  # (B, D)
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
        )
        return self._finish(output, return_dict)

    def _token_mask(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor
    ) -> tuple[list[tuple[int, int]], torch.Tensor]:
        """Return the grid of each image without its padding, and a mask (B, T) that is False at padding."""
        if pixel_mask.shape != (pixel_values.shape[0], *pixel_values.shape[-2:]):
            raise ValueError(
                f"pixel_mask has shape {tuple(pixel_mask.shape)}, expected (batch, height, width) = "
                f"{(pixel_values.shape[0], *pixel_values.shape[-2:])}."
            )
        patch_embeddings = self.embeddings.patch_embeddings
        patch_embeddings.grid_of(pixel_values)
        grids = grids_of_padded_images(pixel_mask, patch_embeddings)
        rows, columns = patch_embeddings.patch_shape
        patches = pixel_mask[:, ::rows, ::columns].bool().flatten(1)  # (B, N)
        prefix = patches.new_ones(patches.shape[0], self.config.num_prefix_tokens)
        return grids, torch.cat([prefix, patches], dim=1)

    def _output_masks(
        self, sequence: torch.Tensor, token_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `output_mask` and `patch_mask`, both of the same length as `last_hidden_state`."""
        batch_size, num_tokens, _ = sequence.shape
        index = torch.arange(num_tokens, device=sequence.device)
        patch_mask = (index >= self.config.num_prefix_tokens).expand(batch_size, -1)
        if token_mask is not None:
            patch_mask = patch_mask & token_mask
        output_mask = patch_mask | (index == 0)
        if self.config.discard_registers and self.config.num_register_tokens:
            keep = (index == 0) | (index >= self.config.num_prefix_tokens)
            return output_mask[:, keep], patch_mask[:, keep]
        return output_mask, patch_mask


# --- Heads ---


def mean_of_patches(patch_tokens: torch.Tensor, patch_mask: torch.Tensor) -> torch.Tensor:
    """Average the real patches: (B, N, D) tokens and the (B, T) `patch_mask` of the same output give (B, D)."""
    weights = patch_mask[:, -patch_tokens.shape[1] :, None].to(patch_tokens.dtype)
    wide = at_least_float32(patch_tokens)  # in float16, the sum over a thousand patches overflows
    return ((patch_tokens * weights).sum(1, dtype=wide) / weights.sum(1, dtype=wide)).to(patch_tokens.dtype)


def at_least_float32(tensor: torch.Tensor) -> torch.dtype:
    """Return a dtype in which many values of the tensor can be summed without overflow."""
    return torch.promote_types(tensor.dtype, torch.float32)


class RegViTForImageClassification(RegViTPreTrainedModel):
    """Linear classifier on CLS, the mean patch, or both (`config.pooling`); it never reads registers."""

    def __init__(self, config: RegViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        if config.final_norm == "pooled" and config.pooling != "mean_patch":
            raise ValueError(
                f"pooling={config.pooling!r} cannot be combined with final_norm='pooled', which pools the mean patch. "
                "Use pooling='mean_patch'."
            )
        self.regvit = RegViTModel(config, add_pooling_layer=False)
        width = config.hidden_size * (2 if config.pooling == "cls_mean_patch" else 1)
        self.classifier = nn.Linear(width, config.num_labels)
        self.post_init()

    def pool(self, output: RegViTModelOutput) -> torch.Tensor:
        """Return the input of the classifier, (B, D) or (B, 2 * D)."""
        if self.config.pooling == "cls" or self.config.final_norm == "pooled":
            return output.pooler_output
        mean = mean_of_patches(output.patch_tokens, output.patch_mask)
        return mean if self.config.pooling == "mean_patch" else torch.cat([output.pooler_output, mean], dim=1)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple:
        """Return logits (B, num_labels), and the loss if `labels` are given.

        `labels` has shape (B,) for class ids, or (B, num_labels) for multi-label classification or regression.
        """
        output = self._run_backbone(pixel_values, pixel_mask, output_attentions, output_hidden_states)
        logits = self.classifier(self.pool(output))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        result = ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )
        return self._finish(result, return_dict)


class RegViTDensePreTrainedModel(RegViTPreTrainedModel):
    """Base class of the dense heads, which turn normalized tokens of chosen blocks into maps of the input's size."""

    def __init__(self, config: RegViTConfig):
        super().__init__(config)
        if config.final_norm != "tokens":
            raise ValueError(
                "final_norm='pooled' leaves patch tokens unnormalized, but dense heads read normalized ones. Use "
                "final_norm='tokens'."
            )
        self.regvit = RegViTModel(config, add_pooling_layer=False)

    def dense_features(self, output: RegViTModelOutput, *, with_cls: bool) -> torch.Tensor:
        """Return patch features (B, N, F): the tokens of `config.head_layers`, concatenated, optionally with CLS."""
        features = []
        for block in self.config.head_layers:
            block %= self.config.num_hidden_layers
            tokens = self.regvit.layernorm(output.hidden_states[block + 1])
            cls_token, _, patch_tokens = self.regvit.split_tokens(tokens)
            features.append(patch_tokens)
            if with_cls:
                features.append(cls_token.expand_as(patch_tokens))
        return torch.cat(features, dim=-1)

    def to_pixels(
        self, patch_values: torch.Tensor, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None, decode: Callable
    ) -> torch.Tensor:
        """Decode patch values (B, N, C) to maps of the input's size.

        `decode` is called with maps (B, C, rows, columns) and a size (H, W) in pixels, and returns maps of that size.
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
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SemanticSegmenterOutput | tuple:
        """Return logits (B, num_labels, H, W) at the input size, and the loss if `labels` are given.

        `labels` has shape (B, H, W) and holds class ids; `config.semantic_loss_ignore_index` (255) is ignored.
        """
        output = self._run_backbone(pixel_values, pixel_mask, output_attentions, True)
        features = self.dense_features(output, with_cls=False)  # (B, N, F)
        valid = output.patch_mask[:, -features.shape[1] :]
        if pixel_mask is None:
            patch_logits = self.classifier(self.head_norm(features.flatten(0, 1))).unflatten(0, features.shape[:2])
        else:  # padding must not enter the statistics of the batch norm
            patch_logits = features.new_zeros(*features.shape[:2], self.num_labels)
            patch_logits[valid] = self.classifier(self.head_norm(features[valid])).to(patch_logits.dtype)

        def upsample(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
            return nn.functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)

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
            loss=loss,
            logits=logits,
            hidden_states=self._requested_hidden_states(output, output_hidden_states),
            attentions=output.attentions,
        )
        return self._finish(result, return_dict)


class RegViTForDepthEstimation(RegViTDensePreTrainedModel):
    """Linear depth head of DINOv2: depth bins from each patch token and CLS, on a grid upsampled four times."""

    UPSAMPLE = 4

    def __init__(self, config: RegViTConfig):
        super().__init__(config)
        self.classifier = nn.Linear(2 * config.hidden_size * len(config.head_layers), config.num_depth_bins)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> DepthEstimatorOutput | tuple:
        """Return depth (B, H, W) in meters at the input size, and the loss if `labels` are given.

        `labels` has shape (B, H, W), in meters; pixels that are <= 0, infinite or NaN are ignored.
        """
        output = self._run_backbone(pixel_values, pixel_mask, output_attentions, True)
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
            loss=loss,
            predicted_depth=depth,
            hidden_states=self._requested_hidden_states(output, output_hidden_states),
            attentions=output.attentions,
        )
        return self._finish(result, return_dict)

    def _bins_to_meters(self, bins: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Decode (B, bins, rows, columns) to depth (B, 1, H, W), the weighted mean of the bin centers.

        The weights are relu(bins) + 0.1, divided by their sum ("linear norm" in DINOv2).
        """
        dtype = bins.dtype
        bins = bins.to(at_least_float32(bins))  # in float16, the sum over the bins overflows
        grid = tuple(self.UPSAMPLE * side for side in bins.shape[-2:])
        bins = nn.functional.interpolate(bins, size=grid, mode="bilinear", align_corners=False)
        weights = nn.functional.relu(bins) + 0.1
        centers = torch.linspace(
            self.config.min_depth,
            self.config.max_depth,
            self.config.num_depth_bins,
            device=bins.device,
            dtype=bins.dtype,
        )
        depth = (weights * centers[:, None, None]).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        return nn.functional.interpolate(depth, size=size, mode="bilinear", align_corners=False).to(dtype)


def scale_invariant_log_loss(depth: torch.Tensor, target: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return `sqrt(Var(g) + 0.15 mean(g)^2)` for g = log(depth) - log(target) over the `valid` pixels.

    With fewer than two valid pixels, the loss is 0.

    Source: "SigLog" in the linear depth protocol (arXiv 2304.07193, based on arXiv 1406.2283).
    """
    error = (torch.log(depth + 1e-3) - torch.log(target.clamp(min=0) + 1e-3))[valid]
    if error.numel() < 2:
        return depth.sum() * 0
    return torch.sqrt(error.var() + 0.15 * error.mean() ** 2)


class RegViTBackbone(BackboneMixin, RegViTPreTrainedModel):
    """Backbone that returns feature maps of chosen blocks for dense transformers models (DPT, UperNet, ...).

    `AutoBackbone.from_pretrained` queries the Hub before the disk and rejects local folders. For a local folder, use
    `RegViTBackbone.from_pretrained(folder)`.
    """

    def __init__(self, config: RegViTConfig):
        super().__init__(config)
        self.regvit = RegViTModel(config, add_pooling_layer=False)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        pixel_mask: torch.Tensor | None = None,
    ) -> BackboneOutput | tuple:
        """Return feature maps (B, D, rows, columns), or token sequences if `reshape_hidden_states` is False."""
        output = self._run_backbone(pixel_values, pixel_mask, output_attentions, True)
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
            feature_maps=tuple(feature_maps),
            hidden_states=self._requested_hidden_states(output, output_hidden_states),
            attentions=output.attentions,
        )
        return self._finish(result, return_dict)


__all__ = [
    "RegViTBackbone",
    "RegViTForDepthEstimation",
    "RegViTForImageClassification",
    "RegViTForSemanticSegmentation",
    "RegViTModel",
    "RegViTModelOutput",
    "RegViTPreTrainedModel",
]
