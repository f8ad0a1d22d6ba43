"""Defects planted into random models: neurons that write artifacts, and heads whose attention sinks into them.

The images are noise with a few changed cells. A neuron is made to recognize the changed cells by a linear discriminant
of what its MLP receives, and to write a fixed direction there. So models without trained weights have artifact tokens
whose origin is known exactly.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BitImageProcessor

from builders import tiny_model, tiny_source, tiny_timm
from hf_regvit.models.families import has_part
from hf_regvit.models.tokens import TokenReader

SIZES = {
    "image_size": 96, "patch_size": 8, "hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 3,
    "intermediate_size": 192,
}  # fmt: skip
GRID = 12
PROCESSOR = BitImageProcessor(do_resize=False, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.25] * 3)
QUIET: dict[str, Any] = {"processor": PROCESSOR, "progress": False}

_REGVIT = {**SIZES, "num_register_tokens": 0}
del _REGVIT["intermediate_size"]

# A fresh RegViT with LayerScale 1e-5 is nearly the identity, so its sinks and repairs are tested with 1.
MODELS: dict[str, Callable[[], Any]] = {
    "regvit": lambda: tiny_model(**_REGVIT, layerscale_value=1.0),
    "dinov2": lambda: tiny_source("Dinov2Model", **SIZES),
    "gated": lambda: tiny_source("Dinov2Model", **SIZES, use_swiglu_ffn=True),
    "vit": lambda: tiny_source("ViTModel", **SIZES),
    "ijepa": lambda: tiny_source("IJepaModel", **SIZES),
    "clip": lambda: tiny_source("CLIPVisionModel", **SIZES),
    "siglip": lambda: tiny_source("SiglipVisionModel", **SIZES),
    "dinov3": lambda: tiny_source("DINOv3ViTModel", **SIZES),
    "timm": lambda: tiny_timm(img_size=96, patch_size=8, embed_dim=96, depth=6, num_heads=3, init_values=0.5),
}


@dataclass(frozen=True, eq=False)
class Sample:
    """Images, their pixels (n, 3, 96, 96), and a mask (n, N) of the changed cells for each kind."""

    images: list[Image.Image]
    pixels: torch.Tensor
    cells: list[np.ndarray]


@functools.cache
def sample(count: int, *, seed: int, kinds: int = 1, pattern: float = 0.0) -> Sample:
    """Make images of noise with 2 to 4 changed cells of each kind: flat at +1 or -1, or noise plus a fixed pattern.

    Args:
        count: Number of images.
        seed: Random seed of everything but the pattern.
        kinds: Number of kinds of changed cells.
        pattern: Norm of the fixed pattern; 0 for flat cells.
    """
    rng = np.random.default_rng(seed)
    shape = np.random.default_rng(99).normal(size=(8, 8, 3))
    shape *= pattern / np.linalg.norm(shape)
    values = rng.normal(0, 0.6, (count, 96, 96, 3))
    cells = [np.zeros((count, GRID * GRID), dtype=bool) for _ in range(kinds)]
    for image in range(count):
        free = rng.permutation(GRID * GRID).tolist()
        for kind in range(kinds):
            for cell in [free.pop() for _ in range(rng.integers(2, 5))]:
                row, column = divmod(cell, GRID)
                place = (image, slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
                values[place] = values[place] + shape if pattern else (1.0, -1.0)[kind]
                cells[kind][image, cell] = True
    stored = np.clip(np.round((values * 0.25 + 0.5) * 255), 0, 255).astype(np.uint8)
    images = [Image.fromarray(each) for each in stored]
    return Sample(images, PROCESSOR(images, return_tensors="pt").pixel_values, cells)


def _block(model: Any, block: int) -> Any:
    reader = TokenReader(model)
    return list(reader.tower.get_submodule(reader.family.blocks).children())[block]


def _first_and_last_linear(mlp: Any) -> tuple[Any, Any]:
    first = next(
        getattr(mlp, name)
        for name in ("fc1", "gate_proj", "gate_up_proj", "weights_in", "up_proj")
        if hasattr(mlp, name)
    )
    last = next(getattr(mlp, name) for name in ("fc2", "down_proj", "weights_out") if hasattr(mlp, name))
    return first, last


def _scale_of(block: Any, names: tuple[str, ...]) -> torch.Tensor | float:
    """LayerScale of a branch, or 1."""
    for name in names:
        owner, _, parameter = name.rpartition(".")
        value = getattr(getattr(block, owner, None), parameter, None)
        if value is not None:
            return value.detach()
    return 1.0


def direction_of(seed: int, width: int = 96) -> torch.Tensor:
    """Random unit vector without mean."""
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return (vector - vector.mean()) / (vector - vector.mean()).norm()


@torch.no_grad()
def plant_neuron(
    model: Any, seen: Sample, *, kind: int = 0, block: int = 2, neuron: int = 37, ratio: float = 10.0
) -> torch.Tensor:
    """Make a neuron write a vector of `ratio` times the median norm into the changed cells of a kind, and return it.

    Args:
        model: Model, changed in place.
        seen: Images to fit the neuron on.
        kind: Kind of the cells.
        block: Block of the neuron, counted from 0.
        neuron: Index of the neuron.
        ratio: Norm of the vector relative to the median norm of the patches after the block.
    """
    reader, target = TokenReader(model), _block(model, block)
    first, last = _first_and_last_linear(target.mlp)
    inputs: list[torch.Tensor] = []
    hook = first.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    norms = reader.read(seen.pixels, layers=(block + 1,), reduce=lambda tokens, _: tokens.norm(dim=-1)).patches()
    hook.remove()
    tokens = torch.cat(inputs).double()  # (n, T, D)
    chosen = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    chosen[:, -seen.cells[kind].shape[1] :] = torch.from_numpy(seen.cells[kind])
    planted, rest = tokens[chosen], tokens[~chosen]
    covariance = torch.cov(rest.T)
    covariance += 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    weight = torch.linalg.solve(covariance, planted.mean(dim=0) - rest.mean(dim=0))
    high, low = (planted @ weight).median(), (rest @ weight).median()
    middle = (high + low) / 2
    hidden = last.weight.shape[1]
    fused, gated = first.weight.shape[0] == 2 * hidden, hasattr(target.mlp, "gate_proj")
    # SiLU is not zero below its threshold, so a gate is twice as steep, and what it lets pass is halved.
    gain = (12.0 if fused or gated else 6.0) / (high - middle)
    first.weight[neuron] = (gain * weight).float()
    first.bias[neuron] = (-gain * middle).float()
    if fused:  # a gated MLP in one layer: the gates come first
        first.weight[hidden + neuron], first.bias[hidden + neuron] = 0.0, 0.5
    elif gated:
        target.mlp.up_proj.weight[neuron], target.mlp.up_proj.bias[neuron] = 0.0, 0.5
    written = direction_of(1000 + 7 * block + kind) * ratio * norms.median() / 6.0
    last.weight[:, neuron] = written / _scale_of(target, ("layer_scale2.lambda1", "ls2.gamma"))
    return written / written.norm()


@torch.no_grad()
def plant_sink(model: Any, direction: torch.Tensor, *, blocks: tuple[int, ...], head: int, parks: bool) -> None:
    """Make a head attend to the tokens that point in a direction, with hardly any value (a NOP sink) or with theirs.

    Args:
        model: Model with query biases and without rotation, changed in place.
        direction: (D,) unit vector.
        blocks: Blocks of the heads, counted from 0.
        head: Index of the head.
        parks: True to remove most of the values in this direction.
    """
    reader = TokenReader(model)
    rows = slice(32 * head, 32 * head + 32)
    for block in blocks:
        attention = _block(model, block).get_submodule(reader.family.attention)
        if hasattr(attention, "qkv"):
            query, key, value = (
                (attention.qkv.weight[96 * i : 96 * i + 96], attention.qkv.bias[96 * i : 96 * i + 96])
                for i in range(3)
            )
        else:
            layers = (
                attention.get_submodule(next(path for path in paths if has_part(attention, path)))
                for paths in reader.family.projections  # other names in other versions of transformers
            )
            query, key, value = ((layer.weight, layer.bias) for layer in layers)
        seen = key[0][rows] @ (96**0.5 * direction)
        query[1][rows] += 8.0 * 32**0.5 * seen / seen.square().sum()
        if parks:
            value[0][rows] -= 0.98 * torch.outer(value[0][rows] @ direction, direction)
