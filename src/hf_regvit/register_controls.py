"""What a model loses when its registers are replaced: controls for the claim that a model uses them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .families import FAMILIES, describe_model, final_norm, find_tower
from .features import TokenReading, read_many
from .probes import knn_accuracy

REGISTER_CONTROLS = ("mean", "shuffle", "noise", "zero")


@contextmanager
def _registers_replaced(model: nn.Module, values: Mapping[int, Tensor]) -> Iterator[None]:
    """Overwrite the registers in the outputs of blocks for the time of the `with` block; layer: (B, R, D)."""
    tower, name = find_tower(model)
    description = describe_model(tower)
    start, count = description.num_prefix_tokens - description.num_register_tokens, description.num_register_tokens

    def replace(layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            tokens = output[0] if isinstance(output, tuple) else output  # (B, T, D)
            tokens = torch.cat((tokens[:, :start], values[layer].to(tokens), tokens[:, start + count :]), dim=1)
            return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

        return hook

    blocks: Any = tower.get_submodule(FAMILIES[name].blocks)
    with ExitStack() as stack:
        for layer in values:
            stack.callback(blocks[layer - 1].register_forward_hook(replace(layer)).remove)
        yield


def register_controls(
    model: nn.Module,
    pixel_values: Tensor,
    *,
    labels: Tensor | None = None,
    kinds: Sequence[str] = REGISTER_CONTROLS,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """What a model loses when its registers are replaced between blocks (outputs of blocks 1 to L - 1).

    "mean": by their average over these images; "shuffle": by those of another image; "noise": by Gaussian noise of
    the same mean and variance per channel; "zero". Zero alone overstates the role of registers, because it takes the
    model to inputs it never saw; mean and shuffle tell whether their image-specific content matters.

    Args:
        model: A model with registers; left as it was.
        pixel_values: (n, 3, H, W), at least two images; their order decides who is shuffled with whom.
        labels: (n,) classes; then the accuracy of 5 nearest neighbours on CLS, each half judged by the other, is
            measured too. Only where at least 20 images have a class that both halves hold.
        kinds: Which controls.
        batch_size: Images of one forward pass.
        seed: Of noise and shuffling.

    Returns:
        `num_images`; for `clean` and each kind `knn` (None without labels), and for each kind `cls_cosine` and
        `patch_cosine`, the mean cosine with the undisturbed tokens after the final norm.

    Source: arXiv 2604.14433.
    """
    description = describe_model(model)
    if not description.num_register_tokens:
        raise ValueError(f"'{description.name}' has no registers to replace.")
    if len(pixel_values) < 2:
        raise ValueError(f"Register controls need two images or more, got {len(pixel_values)}.")
    if unknown := sorted(set(kinds) - set(REGISTER_CONTROLS)):
        raise ValueError(f"kinds={unknown} are unknown, expected some of {REGISTER_CONTROLS}.")
    inner = range(1, description.num_layers)
    clean: dict[int, list[Tensor]] = {layer: [] for layer in inner}
    clean_tokens: list[Tensor] = []
    for batch in pixel_values.split(batch_size):
        reading = read_many(model, batch, {"residual": [*inner, description.num_layers]})["residual"]
        for layer in inner:
            clean[layer].append(reading.registers(layer).cpu())
        clean_tokens.append(_final_tokens(model, reading))
    recorded = {layer: torch.cat(values) for layer, values in clean.items()}  # (n, R, D)
    undisturbed = torch.cat(clean_tokens)  # (n, T - R, D)
    result: dict[str, Any] = {
        "num_images": len(pixel_values),
        "blocks": [1, description.num_layers - 1],
        "clean": {"knn": _knn(undisturbed, labels) if description.has_cls else None},
    }
    prefix = description.num_prefix_tokens - description.num_register_tokens
    for kind in kinds:
        replacement = {layer: _replacement(kind, values, layer, seed) for layer, values in recorded.items()}
        parts = []
        for start in range(0, len(pixel_values), batch_size):
            part = slice(start, start + batch_size)
            with _registers_replaced(model, {layer: values[part] for layer, values in replacement.items()}):
                reading = read_many(model, pixel_values[part], {"residual": (-1,)})["residual"]
            parts.append(_final_tokens(model, reading))
        cosine = F.cosine_similarity(torch.cat(parts), undisturbed, dim=-1)  # (n, T - R)
        result[kind] = {
            "cls_cosine": cosine[:, 0].mean().item() if description.has_cls else None,
            "patch_cosine": cosine[:, prefix:].mean().item(),
            "knn": _knn(torch.cat(parts), labels) if description.has_cls else None,
        }
    return result


def _final_tokens(model: nn.Module, reading: TokenReading) -> Tensor:
    """Tokens after the last block and the final norm without the registers, (B, T - R, D)."""
    with torch.no_grad():
        tokens = final_norm(model)(reading.at(-1)).float().cpu()
    first = reading.num_prefix_tokens - reading.num_register_tokens
    return torch.cat((tokens[:, :first], tokens[:, reading.num_prefix_tokens :]), dim=1)


def _replacement(kind: str, registers: Tensor, layer: int, seed: int) -> Tensor:
    """What to put in place of the registers (n, R, D) that one layer had."""
    if kind == "zero":
        return torch.zeros_like(registers)
    mean = registers.float().mean(dim=0, keepdim=True)
    if kind == "mean":
        return mean.to(registers.dtype).expand_as(registers)
    if kind == "shuffle":  # the same partner in every layer, never oneself
        order = torch.randperm(len(registers), generator=torch.Generator().manual_seed(seed))
        partner = torch.empty_like(order)
        partner[order] = order.roll(1)
        return registers[partner]
    generator = torch.Generator().manual_seed(seed * 1000 + layer)
    noise = torch.randn(registers.shape, generator=generator)
    return (mean + noise * registers.float().std(dim=0, keepdim=True, correction=0)).to(registers.dtype)


def _knn(tokens: Tensor, labels: Tensor | None, *, k: int = 5, fewest: int = 20) -> float | None:
    """Accuracy of k nearest neighbours on CLS (first token): even images judged by odd ones and the reverse."""
    if labels is None:
        return None
    shared = np.intersect1d(labels[0::2].numpy(), labels[1::2].numpy())
    if np.isin(labels.numpy(), shared).sum() < fewest:  # a class that one half lacks cannot be found by it
        return None
    halves = [(tokens[start::2, 0], labels[start::2]) for start in (0, 1)]
    accuracies = [
        knn_accuracy(*halves[bank], *halves[1 - bank], k=(k,))[k] * len(halves[1 - bank][1]) for bank in (0, 1)
    ]
    return sum(accuracies) / len(labels)
