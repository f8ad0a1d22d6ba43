"""Compute the memory of a pretraining step for models, precisions and batches, without a GPU and without weights.

    python benchmarks/memory_table.py
    python benchmarks/memory_table.py --presets small --batches 64 --gradient_checkpointing

The numbers are those that `regvit pretrain` logs before its first step: weights of student, teacher and heads,
gradients and moments of Adam, and an estimate of the activations. Workspace of the libraries and fragmentation come on
top: leave a fifth free. The crops are those of the recipe (2 of 224 and 8 of 96 or 98 pixels). Nothing is measured.
"""

import argparse
import tempfile

import torch

from hf_regvit import PretrainingArguments
from hf_regvit.pretraining.continuation import memory_of_step
from hf_regvit.pretraining.run import _build_network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["small", "base", "large"])
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--head_num_prototypes", type=int, default=65536)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    args = parser.parse_args()
    print(f"| preset | precision | batch | weights | gradients, Adam | activations | sum, GiB |\n{'|---' * 7}|")
    for preset in args.presets:
        for bf16 in (False, True):
            for batch in args.batches:
                parts = memory(preset, bf16=bf16, batch=batch, options=args)
                shown = " | ".join(f"{size / 2**30:.1f}" for size in [*parts.values(), sum(parts.values())])
                print(f"| {preset} | {'bf16' if bf16 else 'float32'} | {batch} | {shown} |")


def memory(preset: str, *, bf16: bool, batch: int, options: argparse.Namespace) -> dict[str, int]:
    """Build the networks of a run without values and return the bytes that its step needs."""
    local = 98 if options.patch_size == 14 else 96
    with tempfile.TemporaryDirectory() as folder:
        args = PretrainingArguments(
            output_dir=folder, data="builtin:photos", preset=preset, patch_size=options.patch_size, bf16=bf16,
            per_device_train_batch_size=batch, global_crop_size=224, local_crop_size=local, num_local_crops=8,
            head_num_prototypes=options.head_num_prototypes, gradient_checkpointing=options.gradient_checkpointing,
            use_cpu=True,
        )  # fmt: skip
        with torch.device("meta"):
            network = _build_network(args, None)
        if options.gradient_checkpointing:
            network.student_backbone.gradient_checkpointing_enable()
        return memory_of_step(network, args)


if __name__ == "__main__":
    main()
