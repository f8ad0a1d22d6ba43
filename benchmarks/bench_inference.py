"""Compare the speed of RegViT, transformers and timm with the same weights: DINOv2 with registers, or DINOv3.

    python benchmarks/bench_inference.py                   # all cases on the CPU (long), or the GPU with --device cuda
    python benchmarks/bench_inference.py --models small --sizes 224 --dtypes float32 --batches 1 8
    python benchmarks/bench_inference.py --family dinov3 --sizes 224 512    # rotary positions

Every case runs the three systems in turn, A B C A B C ..., so that drifting machine speed affects them equally. Prints
medians in milliseconds, medians of the ratios of each round (above 1: RegViT is faster), and the peak of the memory
that torch allocates during a forward pass, which does not depend on what the allocator of the system keeps. 518
pixels is the native size of the position embeddings of DINOv2; 224 pixels requires resampling.
"""

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

SYSTEMS = ("regvit", "transformers", "timm")


Rules = tuple[tuple[str, str], ...]
HF_DINOV2: Rules = ((r"^layers\.", "encoder.layer."),)
HF_DINOV3: Rules = (
    (r"^layers\.", "model.layer."), (r"\.mlp\.fc1\.", ".mlp.up_proj."), (r"\.mlp\.fc2\.", ".mlp.down_proj."),
    (r"\.projection\.", "."), (r"^layernorm\.", "norm."),
)  # fmt: skip
TIMM: Rules = (
    (r"^layers\.", "blocks."), (r"\.attention\.qkv", ".attn.qkv"), (r"\.attention\.o_proj", ".attn.proj"),
    (r"\.layer_scale(\d)\.lambda1", r".ls\1.gamma"), (r"^layernorm", "norm"),
    (r"^embeddings\.register_tokens", "reg_token"), (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
)  # fmt: skip


def build(
    system: str, size: str, dtype: torch.dtype, device: str, family: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a system with the same random weights as a function from pixels to normalized tokens."""
    from hf_regvit import RegViTConfig, RegViTModel

    fields: dict[str, Any] = {"patch_size": 14, "image_size": 518}
    if family == "dinov3":
        fields = {"patch_size": 16, "rope_theta": 100, "use_position_embeddings": False, "key_bias": False}
        fields["layer_norm_eps"] = 1e-5
    torch.manual_seed(0)
    reference = RegViTModel(RegViTConfig.from_preset(size, layerscale_value=1.0, **fields)).eval()
    if system == "regvit":
        model = reference.to(device, dtype)
        return lambda pixels: model(pixels).last_hidden_state
    peers = {"transformers": transformers_peer, "timm": timm_peer}
    peer = peers[system](reference, size, family).eval().to(device, dtype)
    if system == "timm":
        return peer.forward_features
    return lambda pixels: peer(pixels).last_hidden_state


def renamed(state: dict[str, torch.Tensor], rules: Rules) -> dict[str, torch.Tensor]:
    """Return the tensors under the names that the rules, applied in order, give them."""
    result = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        result[key] = value
    return result


def transformers_peer(reference: Any, size: str, family: str) -> Any:
    """Return the model of transformers with the weights of a RegViT."""
    import transformers

    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_register_tokens", "image_size")
    fields = {name: getattr(reference.config, name) for name in (*names, "patch_size")}
    if family == "dinov3":
        fields["intermediate_size"] = reference.config.ffn_hidden_size
        peer = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**fields))
    else:
        peer = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**fields))
    state = renamed(reference.state_dict(), HF_DINOV3 if family == "dinov3" else HF_DINOV2)
    for key in [key for key in state if ".qkv." in key]:
        for name, part in zip("qkv", state.pop(key).chunk(3)):
            if family != "dinov3" or (name, key[-4:]) != ("k", "bias"):
                state[key.replace(".qkv.", f".{name}_proj.")] = part
    state["embeddings.mask_token"] = torch.zeros_like(peer.embeddings.mask_token)
    peer.load_state_dict(state)
    return peer


def timm_peer(reference: Any, size: str, family: str) -> Any:
    """Return the model of timm with the weights of a RegViT."""
    import timm

    state = renamed(reference.state_dict(), TIMM)
    if family == "dinov3":
        state = renamed(state, ((r"\.ls(\d)\.gamma", r".gamma_\1"),))
        for key in [key for key in state if key.endswith(".qkv.bias")]:
            query, _, value = state.pop(key).chunk(3)
            state[key.replace("qkv.bias", "q_bias")], state[key.replace("qkv.bias", "v_bias")] = query, value
        model = timm.create_model(f"vit_{size}_patch16_dinov3_qkvb", num_classes=0)
    else:
        table = state["pos_embed"]
        state["cls_token"], state["pos_embed"] = state["cls_token"] + table[:, :1], table[:, 1:]
        model = timm.create_model(f"vit_{size}_patch14_reg4_dinov2", img_size=518, dynamic_img_size=True)
    model.load_state_dict(state)
    return model


def cpu_name() -> str:
    """Return the model name of the processor, or its architecture if the system does not provide it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.machine()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def time_case(
    args: argparse.Namespace, size: str, pixels: int, batch: int, dtype: torch.dtype
) -> dict[str, list[float]]:
    """Return the seconds of every round for each system."""
    models = {system: build(system, size, dtype, args.device, args.family) for system in SYSTEMS}
    images = torch.randn(batch, 3, pixels, pixels, device=args.device, dtype=dtype)
    outputs = {
        system: model(images).float() for system, model in models.items()
    }  # warm-up, and check of equal outputs
    limit = 1e-3 if dtype == torch.float32 else 0.3
    for system in SYSTEMS[1:]:
        difference = (outputs["regvit"] - outputs[system]).abs().max().item()
        if not difference < limit:
            raise SystemExit(f"The outputs of {system} differ from those of RegViT by up to {difference:.1e}.")
    times: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    clock = time.process_time if args.cpu_time else time.perf_counter
    end = time.perf_counter() + args.seconds
    order = list(SYSTEMS)
    while len(times["timm"]) < args.min_rounds or time.perf_counter() < end:
        order.append(order.pop(0))  # rotate, so that no system always runs first
        for system in order:
            synchronize(args.device)
            start = clock()
            models[system](images)
            synchronize(args.device)
            times[system].append(clock() - start)
    return times


def memory_child(system: str, size: str, pixels: int, batch: int, dtype_name: str, device: str, family: str) -> None:
    """Print the MiB that a forward pass adds to a process that holds the model."""
    dtype = getattr(torch, dtype_name)
    model = build(system, size, dtype, device, family)
    images = torch.randn(batch, 3, pixels, pixels, device=device, dtype=dtype)
    with torch.inference_mode():
        model(images[:1, :, :112, :112])  # load kernels first
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(images)
            added = torch.cuda.max_memory_allocated() - before
        else:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                model(images)
            events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
            added = max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    print(json.dumps(added / 2**20))


def memory_case(size: str, pixels: int, batch: int, dtype: str, device: str, family: str) -> dict[str, float]:
    """Return the MiB of each system, measured in a new process."""
    result = {}
    for system in SYSTEMS:
        command = [sys.executable, __file__, "--child", system, size, str(pixels), str(batch), dtype, device, family]
        child = subprocess.run(command, check=True, capture_output=True, text=True)
        result[system] = float(child.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="dinov2", choices=["dinov2", "dinov3"])
    parser.add_argument("--models", nargs="+", default=["small", "base"], choices=["small", "base", "large"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 518], help="sides of the images in pixels")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=20, help="time per case")
    parser.add_argument("--min_rounds", type=int, default=5)
    parser.add_argument("--cpu_time", action="store_true", help="count processor time, for a machine with other load")
    parser.add_argument("--no_memory", action="store_true")
    parser.add_argument("--child", nargs=7, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        system, size, pixels, batch, dtype, device, family = args.child
        memory_child(system, size, int(pixels), int(batch), dtype, device, family)
        return

    import timm
    import transformers

    name = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, timm {timm.__version__}"
    print(f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; {versions}")
    print("\nMilliseconds per forward pass (medians), and ratios other / RegViT (medians of paired rounds):\n")
    print("| model | pixels | batch | dtype | RegViT | transformers | timm | / transformers | / timm | rounds |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    cases = list(itertools.product(args.models, args.sizes, args.batches, args.dtypes))
    for size, pixels, batch, dtype in cases:
        times = time_case(args, size, pixels, batch, getattr(torch, dtype))
        medians = {system: statistics.median(values) * 1e3 for system, values in times.items()}
        ratios = {
            system: statistics.median(theirs / ours for theirs, ours in zip(times[system], times["regvit"]))
            for system in SYSTEMS[1:]
        }
        cells = [f"{medians[system]:.1f}" for system in SYSTEMS] + [f"{ratios[system]:.3f}" for system in SYSTEMS[1:]]
        print(f"| {size} | {pixels} | {batch} | {dtype} | {' | '.join(cells)} | {len(times['timm'])} |", flush=True)
    if args.no_memory:
        return
    print("\nPeak of what torch allocates during a forward pass, in MiB:\n")
    print("| model | pixels | batch | dtype | RegViT | transformers | timm |\n|---|---|---|---|---|---|---|")
    for size, pixels, batch, dtype in cases:
        memory = memory_case(size, pixels, batch, dtype, args.device, args.family)
        print(
            f"| {size} | {pixels} | {batch} | {dtype} | {' | '.join(f'{memory[s]:.0f}' for s in SYSTEMS)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
