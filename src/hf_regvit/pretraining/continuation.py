"""Parts of a backbone that continued pretraining trains, and the files of its low-rank updates."""

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..hub.facts import public_name
from ..models.modeling_regvit import RegViTModel
from ..models.saving import num_bytes, whole_folder
from ..training.lora import inject_lora, save_adapter
from .arguments import PretrainingArguments
from .network import StudentAndTeacher

ADAPTER = "adapter"  # folder in the folder of a run, beside BACKBONE
BLOCKS = "layers"
_REGISTERS, _MASK_TOKEN = "embeddings.register_tokens", "embeddings.mask_token"


def choose_trained(backbone: RegViTModel, args: PretrainingArguments, *, new_registers: bool) -> RegViTModel:
    """Freeze the parameters that `args.mode` does not train, insert low-rank updates, and return the backbone.

    Added registers are trained in every mode, because untrained registers would remain noise. The mask token is not
    trained with the last blocks, because its gradient would pass through all frozen blocks.

    Raises:
        ImportError: The mode is lora and peft is not installed.
        ValueError: An option names a linear layer or a number of blocks that the backbone does not have.
    """
    if args.mode == "full":
        return backbone
    backbone.requires_grad_(False)
    trained = {_REGISTERS} if new_registers else set()
    if args.mode == "lora":
        inject_lora(backbone, args, blocks=BLOCKS)
        trained.add(_MASK_TOKEN)
    else:
        if args.num_trained_blocks > (depth := len(backbone.layers)):
            raise ValueError(
                f"num_trained_blocks is {args.num_trained_blocks}, but the backbone has {depth} blocks. Set it to at "
                f"most {depth}, or train all parameters with --mode full."
            )
        for module in (*backbone.layers[-args.num_trained_blocks :], backbone.layernorm):
            module.requires_grad_(True)
    for name, parameter in backbone.named_parameters():
        if name in trained:
            parameter.requires_grad_(True)
    return backbone


def memory_of_step(network: StudentAndTeacher, args: PretrainingArguments) -> dict[str, int]:
    """Return the bytes of weights, of gradients and moments of Adam, and of the activations that a step keeps.

    The activations are an estimate: 18 numbers per channel, token and trained block (11 if its linear layers are
    frozen, 3 more with SwiGLU), of which autocast halves most. A test compares it with the tensors that are kept.
    """
    backbone, config = network.student_backbone, network.student_backbone.config
    sizes = [args.global_crop_size] * 2 + [args.local_crop_size] * args.num_local_crops
    tokens = sum(config.num_prefix_tokens + math.prod(size // side for side in config.patch_shape) for size in sizes)
    parts = [backbone.embeddings, *backbone.layers]
    first = next(i for i, part in enumerate(parts) if any(one.requires_grad for one in part.parameters()))
    blocks, kept = len(parts) - max(first, 1), (11 if args.mode == "lora" else 18) + 3 * config.use_swiglu_ffn
    kept = blocks + kept if backbone.is_gradient_checkpointing else blocks * kept
    numbers = args.per_device_train_batch_size * tokens * config.hidden_size * kept
    return {
        "weights": num_bytes([*network.state_dict().values(), *network.frozen_tensors()]),
        "gradients and optimizer": 3 * num_bytes(one for one in network.parameters() if one.requires_grad),
        "activations": int(numbers * 4 * (0.55 if args.bf16 or args.fp16 else 1)),
    }


def write_adapter(folder: Path, trained: Mapping[str, Tensor], args: PretrainingArguments) -> None:
    """Write the low-rank updates of a teacher backbone as an adapter of peft, with a model card.

    Args:
        folder: Folder to write to.
        trained: Trained tensors of the teacher backbone: low-rank updates, mask token and registers that were added.
            The mask token is only used in training, so it is left out.
        args: Options of the run.
    """
    kept = {name: tensor for name, tensor in trained.items() if name != _MASK_TOKEN}
    base = public_name(args.init_from or "the given model")
    added = kept[_REGISTERS].shape[1] if _REGISTERS in kept else 0
    registers = f"base.resize_register_tokens({added})\n" if added else ""
    with whole_folder(folder, needed=num_bytes(kept.values())) as staged:
        save_adapter(kept, staged, args, blocks=BLOCKS, base=base)
        (staged / "README.md").write_text(_CARD.format(base=base, registers=registers, rank=args.lora_r))


_CARD = """---
library_name: peft
base_model: {base}
tags: [regvit, registers, vision, lora]
---
# Low-rank updates of {base}

Updates of rank {rank}, trained without labels with the DINOv2 losses by `regvit pretrain --mode lora`. They are the
moving average of the updates of the student. To use them, open the model that they were trained from:
```python
import hf_regvit
from peft import PeftModel

base = hf_regvit.convert("{base}")  # if it is a RegViT: hf_regvit.RegViTModel.from_pretrained("{base}")
{registers}model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""
