"""Learning-rate and weight-decay rules for the parameters of a vision transformer."""

from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

from torch import nn


class ParameterRule(NamedTuple):
    """Multipliers of one parameter. Parameters with the same rule share an optimizer group."""

    lr_multiplier: float
    wd_multiplier: float
    is_last_layer: bool


def _backbone_depth(name: str, num_layers: int) -> int:
    """Return the depth of a parameter: 0 before the blocks, i + 1 in block i, L + 1 after the blocks."""
    first, *rest = name.split(".")
    if first == "embeddings":
        return 0
    if first == "layers":
        return int(rest[0]) + 1
    if first in ("layernorm", "pooler"):
        return num_layers + 1
    raise ValueError(
        f"There is no learning-rate rule for the backbone parameter {name!r}; expected embeddings.*, layers.N.*, "
        "layernorm.* or pooler.*. Use a RegViT backbone without further modules."
    )


def parameter_rules(
    names: Iterable[str],
    *,
    num_layers: int,
    layer_decay: float = 1.0,
    patch_embed_lr_multiplier: float = 1.0,
) -> dict[str, ParameterRule]:
    """Return the learning-rate and weight-decay multipliers of every student parameter, by rules on its name.

    The weight-decay multiplier is 0 for biases, norms and LayerScale gains, and 1 for everything else, including the
    CLS token, registers, mask token, positions and prototypes. The learning rate of the backbone decreases by
    `layer_decay` per block toward the input; the final norm and the heads keep 1; the patch embedding gets an extra
    factor.

    Args:
        names: Parameter names that start with the submodule: `backbone.*`, `dino_head.*`, `ibot_head.*`.
        num_layers: Number of blocks L of the backbone.
        layer_decay: Factor per block; 1 for no decay.
        patch_embed_lr_multiplier: Extra factor of the patch projection weight and bias.

    Returns:
        One rule per name, in the order of `names`.

    Raises:
        ValueError: If no rule covers a backbone parameter.

    Source: released DINOv2 training code (`get_params_groups_with_decay`).
    """
    rules = {}
    for name in names:
        lr_multiplier = 1.0
        if name.startswith("backbone."):
            inner = name.removeprefix("backbone.")
            lr_multiplier = layer_decay ** (num_layers + 1 - _backbone_depth(inner, num_layers))
            if inner.startswith("embeddings.patch_embeddings."):
                lr_multiplier *= patch_embed_lr_multiplier
        undecayed = name.endswith((".bias", ".lambda1")) or "norm" in name
        rules[name] = ParameterRule(lr_multiplier, 0.0 if undecayed else 1.0, ".last_layer." in name)
    return rules


def group_parameters(entries: Iterable[tuple[Hashable, nn.Parameter, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return optimizer groups from (key, parameter, settings): one per key, in the order of their first parameters."""
    groups: dict[Hashable, dict[str, Any]] = {}
    for key, parameter, settings in entries:
        groups.setdefault(key, {"params": [], **settings})["params"].append(parameter)
    return list(groups.values())
