"""Low-rank updates (LoRA) of linear layers, through peft."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors.torch import save_file
from torch import Tensor, nn

from .arguments import LoraArguments

if TYPE_CHECKING:
    from peft import LoraConfig


def inject_lora(network: nn.Module, args: LoraArguments, *, blocks: str) -> None:
    """Insert low-rank updates into the selected linear layers, in place; the class of the network does not change.

    Only the updates are trainable afterwards. Before the first step they are zero.

    Args:
        network: Network with a RegViT.
        args: Options of the run, of which those that start with `lora_` are used.
        blocks: Name of the list of blocks in the network, such as `regvit.layers`.

    Raises:
        ImportError: peft is not installed.
        ValueError: `lora_target_modules` names an unknown linear layer.
    """
    try:
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise ImportError("--mode lora needs peft. Run: pip install 'hf_regvit[peft]'") from error
    linear = {
        name.rpartition(".")[2]
        for name, module in network.named_modules()
        if name.startswith(f"{blocks}.") and isinstance(module, nn.Linear)
    }
    if unknown := sorted(set(args.lora_target_modules) - linear):
        raise ValueError(
            f"lora_target_modules names {unknown}, which the blocks do not have. Choose from {sorted(linear)}."
        )
    inject_adapter_in_model(_configuration(args, blocks), network)


def _configuration(args: LoraArguments, blocks: str, **fields: Any) -> "LoraConfig":
    from peft import LoraConfig

    return LoraConfig(
        r=args.lora_r,
        lora_alpha=cast(int, args.lora_alpha),
        lora_dropout=args.lora_dropout,
        target_modules=rf"{re.escape(blocks)}\..*\.({'|'.join(args.lora_target_modules)})",
        **fields,
    )


def merged_state(state: Mapping[str, Tensor], *, scale: float) -> dict[str, Tensor]:
    """Return the tensors of a plain network: each weight W with updates A and B becomes W + scale * B A.

    Args:
        state: Tensors of a network with low-rank updates, or of one without, which are returned as they are.
        scale: `lora_alpha / lora_r`.

    Source: arXiv 2106.09685.
    """
    merged = {}
    for name, tensor in state.items():
        stem, is_base, part = name.rpartition(".base_layer.")
        if is_base and part == "weight":
            down, up = (state[f"{stem}.lora_{half}.default.weight"] for half in "AB")  # (r, in), (out, r)
            tensor = tensor + (up @ down) * scale
        if ".lora_" not in name:
            merged[f"{stem}.{part}" if is_base else name] = tensor
    return merged


def save_adapter(state: Mapping[str, Tensor], folder: Path, args: LoraArguments, *, blocks: str, base: str) -> None:
    """Save low-rank updates in the format of peft, for `PeftModel.from_pretrained(base_model, folder)`.

    Args:
        state: Tensors to save, with the names of a network after `inject_lora`. Besides the updates, it may hold
            parameters that were trained as a whole, such as registers.
        folder: Existing folder for `adapter_config.json` and `adapter_model.safetensors`.
        args: Options of the run, of which those that start with `lora_` are used.
        blocks: Name of the list of blocks, as for `inject_lora`.
        base: Name of the model to which the updates belong.
    """
    _configuration(args, blocks, base_model_name_or_path=base, inference_mode=True).save_pretrained(str(folder))
    named = {f"base_model.model.{name.replace('.default.', '.')}": tensor for name, tensor in state.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
