"""Controls for the claim that a model uses its registers: replace them and measure what changes."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..evaluation.knn import knn_accuracy
from ..models.families import IN_PLACE, join_registers, part_registers
from ..models.loading import open_model
from ..models.results import Record
from ..models.tokens import TokenReader, TokenReading
from .readings import normalized

REGISTER_CONTROLS = ("mean", "shuffle", "noise", "zero")


@contextmanager
def _registers_replaced(reader: TokenReader, values: Mapping[int, Tensor]) -> Iterator[None]:
    """Overwrite the registers in the outputs of blocks within a `with` statement; `values` is {layer: (B, R, D)}."""
    stop = reader.description.num_prefix_tokens
    start = stop - reader.description.num_register_tokens

    def replace(module: nn.Module, args: tuple, output: Tensor | tuple, *, layer: int) -> Tensor | tuple:
        tokens = output[0] if isinstance(output, tuple) else output
        own, in_place, _ = vars(module).get(IN_PLACE, (0, 0, False))
        tokens = join_registers(tokens, own)  # (B, T, D)
        tokens = torch.cat((tokens[:, :start], values[layer].to(tokens), tokens[:, stop:]), dim=1)
        tokens = part_registers(tokens, own, in_place) if in_place else tokens
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

    blocks = list(reader.tower.get_submodule(reader.family.blocks).children())
    with ExitStack() as stack:
        for layer in values:
            stack.callback(blocks[layer - 1].register_forward_hook(partial(replace, layer=layer)).remove)
        yield


def register_controls(
    model: TokenReader | nn.Module,
    pixel_values: Tensor,
    *,
    labels: Tensor | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Record:
    """Measure the effect of replacing the registers between blocks (at the outputs of blocks 1 to L - 1).

    Registers are replaced by their average over the images ("mean"), by those of another image ("shuffle"), by
    Gaussian noise with the same mean and variance per channel ("noise"), or by zeros ("zero"). Zeros alone overstate
    the role of registers, because the model never saw such inputs; "mean" and "shuffle" show whether the
    image-specific content of registers matters.

    Args:
        model: Model with registers, or its reader; not modified.
        pixel_values: (n, 3, H, W) pixels of at least two images; their order determines the pairs of "shuffle".
        labels: (n,) class ids. If given, the accuracy of 5 nearest neighbors on CLS is measured too, with each half of
            the images classified by the other half. This needs at least 20 images whose class is in both halves.
        batch_size: Number of images per forward pass.
        seed: Random seed for noise and shuffling.

    Returns:
        Dictionary with `num_images`, `blocks`, `clean` and one entry per kind. `clean` and each kind have `knn` (None
        without labels); each kind also has `cls_cosine` and `patch_cosine`, the mean cosine with the tokens of the
        unmodified model after the final norm.

    Raises:
        ValueError: A model without registers, or fewer than two images.

    Source: arXiv 2604.14433.
    """
    reader = open_model(model)
    description = reader.description
    if not description.num_register_tokens:
        raise ValueError(f"'{description.name}' has no registers to replace. Use a model with registers.")
    if len(pixel_values) < 2:
        raise ValueError(f"Register controls need at least two images, got {len(pixel_values)}.")
    inner, has_cls = range(1, description.num_layers), description.has_cls
    recorded: dict[int, Tensor] = {}  # {layer: (n, R, D)}
    parts = []
    for batch in pixel_values.split(batch_size):
        reading = reader.read(batch, layers=[*inner, description.num_layers])
        for layer in inner:
            found = reading.registers(layer).cpu()
            recorded[layer] = torch.cat([recorded[layer], found]) if layer in recorded else found
        parts.append(_final_tokens(reader, reading))
    undisturbed = torch.cat(parts)  # (n, T - R, D)
    result: Record = {
        "num_images": len(pixel_values),
        "blocks": [1, description.num_layers - 1],
        "clean": {"knn": _knn(undisturbed, labels) if has_cls else None},
    }
    for kind in REGISTER_CONTROLS:
        replacement = {layer: _replacement(kind, values, layer, seed) for layer, values in recorded.items()}
        parts = []
        for start in range(0, len(pixel_values), batch_size):
            part = slice(start, start + batch_size)
            with _registers_replaced(reader, {layer: values[part] for layer, values in replacement.items()}):
                parts.append(_final_tokens(reader, reader.read(pixel_values[part])))
        tokens = torch.cat(parts)
        cosine = F.cosine_similarity(tokens, undisturbed, dim=-1)  # (n, T - R)
        result[kind] = {
            "cls_cosine": cosine[:, 0].mean().item() if has_cls else None,
            "patch_cosine": cosine[:, description.num_prefix_tokens - description.num_register_tokens :].mean().item(),
            "knn": _knn(tokens, labels) if has_cls else None,
        }
    return result


def _final_tokens(reader: TokenReader, reading: TokenReading) -> Tensor:
    """Return the tokens after the last block and the final norm, without registers, (B, T - R, D)."""
    tokens, stop = normalized(reader, reading.at()), reading.num_prefix_tokens
    return torch.cat((tokens[:, : stop - reading.num_register_tokens], tokens[:, stop:]), dim=1)


def _replacement(kind: str, registers: Tensor, layer: int, seed: int) -> Tensor:
    """Return the replacement for the registers (n, R, D) of one layer."""
    if kind == "zero":
        return torch.zeros_like(registers)
    mean = registers.float().mean(dim=0, keepdim=True)
    if kind == "mean":
        return mean.to(registers.dtype).expand_as(registers)
    if kind == "shuffle":  # the same partner in every layer, never the image itself
        order = torch.randperm(len(registers), generator=torch.Generator().manual_seed(seed))
        partner = torch.empty_like(order)
        partner[order] = order.roll(1)
        return registers[partner]
    generator = torch.Generator().manual_seed(seed * 1000 + layer)
    noise = torch.randn(registers.shape, generator=generator)
    return (mean + noise * registers.float().std(dim=0, keepdim=True, correction=0)).to(registers.dtype)


def _knn(tokens: Tensor, labels: Tensor | None) -> float | None:
    """Return the 5-NN accuracy on CLS (first token); even images are classified by odd ones and vice versa."""
    if labels is None:
        return None
    shared = np.intersect1d(labels[0::2].numpy(), labels[1::2].numpy())
    if np.isin(labels.numpy(), shared).sum() < 20:  # a half cannot predict a class that it does not contain
        return None
    halves = [(tokens[start::2, 0], labels[start::2]) for start in (0, 1)]
    right = [knn_accuracy(*bank, *test, k=(5,))[5] * len(test[1]) for bank, test in (halves, halves[::-1])]
    return sum(right) / len(labels)
