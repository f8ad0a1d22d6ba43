"""Compare the speed of a DINOv2 training step in hf_regvit and the official code, on the same batch and weights.

    python benchmarks/bench_pretraining.py                      # ViT-S/16, 8 images, 2 x 224 + 8 x 96, drop path 0.3
    python benchmarks/bench_pretraining.py --official_code DIR  # DIR: a checkout of the official repository
    python benchmarks/bench_pretraining.py --device cuda --presets small base large --patch_size 14 --local_size 98

A step is forward, backward, clipping per submodule, AdamW and the teacher's update. The systems are:

- `regvit`: this package. `regvit_masked` uses drop path by masks instead of batch subsets.
- `official`: the official step from plain torch modules in the official structure (one forward pass per resolution,
  because its packing needs xFormers; heads on buffers of fixed size; foreach AdamW). With `--official_code`, backbone
  and head are the official classes.
- `lightly`: lightly-train's DINOv2 method, if that package is installed.

Before the measurement, `regvit` and `official` must return the same loss with the same weights and drop path draws.
Every round runs all systems in turn, so that drifting machine speed affects them equally. Prints medians, and medians
of the ratios of each round (above 1: RegViT is faster). FLOPs count a multiply-add as two, and assume that a step
computes every token of every block that is not dropped.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import importlib.util
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, BOTTLENECK, TEMPERATURE, MOMENTUM, CLIP = 2048, 256, 0.05, 0.994, 3.0
OPTIMIZER = {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.04}


# ---- The official step -------------------------------------------------------------------------------------------


class OfficialBlock(nn.Module):
    """Block in the official structure: separate modules, drop path by subsets of the batch."""

    def __init__(self, width: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.heads, self.drop_path = heads, drop_path
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.full((width,), 0.1)}) for _ in range(2))

    def attention(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous().view(batch, tokens, width)
        return self.attn["proj"](x) * self.ls1["gamma"]

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))) * self.ls2["gamma"]

    def forward(self, x: Tensor) -> Tensor:
        for branch in (self.attention, self.feed_forward):
            if not self.training or self.drop_path == 0:
                x = x + branch(x)
                continue
            kept = max(int(len(x) * (1 - self.drop_path)), 1)
            rows = torch.randperm(len(x), device=x.device)[:kept]
            residual = branch(x[rows]).flatten(1)
            x = torch.index_add(x.flatten(1), 0, rows, residual.to(x.dtype), alpha=len(x) / kept).view_as(x)
        return x


class OfficialViT(nn.Module):
    """The official backbone: positions on CLS and patches, then registers, blocks, one norm over all tokens."""

    def __init__(
        self, *, img_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int, drop_path_rate: float
    ) -> None:
        super().__init__()
        self.patch_size, self.grid = patch_size, img_size // patch_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, embed_dim, patch_size, patch_size)})
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, embed_dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, 4, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        self.blocks = nn.ModuleList([OfficialBlock(embed_dim, num_heads, drop_path_rate) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def positions(self, grid: int) -> Tensor:
        if grid == self.grid:
            return self.pos_embed
        maps = self.pos_embed[:, 1:].reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        maps = F.interpolate(maps, size=(grid, grid), mode="bicubic", antialias=True)
        return torch.cat([self.pos_embed[:, :1], maps.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)

    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> dict[str, Tensor]:
        grid = x.shape[-1] // self.patch_size
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype).unsqueeze(0), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions(grid)
        x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return {"x_norm_clstoken": x[:, 0], "x_norm_patchtokens": x[:, 5:]}


class OfficialHead(nn.Module):
    """The official head, with the weight norm of torch."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, BOTTLENECK)
        )
        self.last_layer = nn.utils.weight_norm(nn.Linear(BOTTLENECK, out_dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


def official_network(args: argparse.Namespace, config: Any) -> nn.ModuleDict:
    """Return backbone and heads, from the official classes if their code is given."""
    vit: Callable[..., nn.Module] = OfficialViT
    head: Callable[..., nn.Module] = OfficialHead
    if args.official_code:
        os.environ["XFORMERS_DISABLED"] = "1"
        sys.path.insert(0, str(args.official_code))
        from dinov2.layers import DINOHead
        from dinov2.models.vision_transformer import DinoVisionTransformer

        vit = functools.partial(
            DinoVisionTransformer, init_values=0.1, block_chunks=0, num_register_tokens=4, drop_path_uniform=True,
            interpolate_antialias=True, interpolate_offset=0.0,
        )  # fmt: skip
        head = functools.partial(DINOHead, hidden_dim=HIDDEN, bottleneck_dim=BOTTLENECK)
    backbone = vit(
        img_size=args.global_size,
        patch_size=args.patch_size,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        drop_path_rate=args.drop_path,
    )
    heads = {name: head(config.hidden_size, args.prototypes) for name in head_names(args)}
    return nn.ModuleDict({"backbone": backbone, **heads})


class OfficialStep:
    """Training step as in `SSLMetaArch.forward_backward` and `do_train`."""

    def __init__(self, args: argparse.Namespace, batch: dict[str, Tensor], config: Any, weights: dict) -> None:
        self.args, self.batch = args, batch
        self.student, self.teacher = (official_network(args, config).to(args.device) for _ in range(2))
        for network in (self.student, self.teacher):
            network.load_state_dict({official_name(name): tensor for name, tensor in weights.items()})
        self.student.train()
        self.teacher.eval().requires_grad_(False)
        self.centers = [torch.zeros(1, args.prototypes, device=args.device) for _ in range(2)]
        self.pending: list[Tensor | None] = [None, None]
        self.optimizer = torch.optim.AdamW(self.student.parameters(), **OPTIMIZER, foreach=True)
        # Fixed size of the buffers of masked patches: the largest possible number of masked patches.
        patches, masked_crops = batch["masks"].shape[-1], args.images
        edges = [0.1 + 0.4 * i / masked_crops for i in range(masked_crops + 1)]
        self.upperbound = sum(int(patches * edge) for edge in edges[1:])

    def targets(self, which: int, logits: Tensor) -> Tensor:
        if self.args.centering == "sinkhorn":
            scores = torch.exp(logits.float() / TEMPERATURE).t()
            scores /= scores.sum()
            for _ in range(3):
                scores /= scores.sum(dim=1, keepdim=True)
                scores /= scores.shape[0]
                scores /= scores.sum(dim=0, keepdim=True)
                scores /= scores.shape[1]
            scores *= scores.shape[1]
            return scores.t()
        mean = self.pending[which]
        if mean is not None:
            self.centers[which] = self.centers[which] * 0.9 + mean * 0.1
        self.pending[which] = logits.mean(0, keepdim=True)
        return F.softmax((logits - self.centers[which]) / TEMPERATURE, dim=-1)

    def masked_rows(self, patches: Tensor) -> Tensor:
        rows = patches.new_zeros(self.upperbound, patches.shape[-1])
        indices = self.batch["mask_indices"]
        rows[: len(indices)].copy_(torch.index_select(patches.flatten(0, 1), 0, indices))
        return rows

    def heads(self, network: nn.ModuleDict, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        count, rows = len(self.batch["mask_indices"]), self.masked_rows(patches)
        if "ibot_head" in network:
            return network["dino_head"](cls), network["ibot_head"](rows)[:count]
        logits = network["dino_head"](torch.cat([cls, rows]))
        return logits[: len(cls)], logits[len(cls) :][:count]

    @torch.no_grad()
    def teacher_targets(self) -> tuple[Tensor, Tensor]:
        out = self.teacher["backbone"].forward_features(self.batch["global_crops"].flatten(0, 1))
        cls = torch.cat(out["x_norm_clstoken"].chunk(2)[::-1])
        cls_logits, patch_logits = self.heads(self.teacher, cls, out["x_norm_patchtokens"])
        return self.targets(0, cls_logits).view(2, -1, cls_logits.shape[-1]), self.targets(1, patch_logits)

    def loss(self) -> Tensor:
        batch = self.batch
        cls_targets, patch_targets = self.teacher_targets()
        crops, masks = batch["global_crops"].flatten(0, 1), batch["masks"].flatten(0, 1)
        out = self.student["backbone"].forward_features(crops, masks)
        local = self.student["backbone"].forward_features(batch["local_crops"].flatten(0, 1))["x_norm_clstoken"]
        cls = out["x_norm_clstoken"]
        cls_logits, patch_logits = self.heads(self.student, torch.cat([local, cls]), out["x_norm_patchtokens"])
        num_local = len(batch["local_crops"])
        terms = 2 * num_local + 2
        loss = cls.new_zeros(())
        for crop in cls_logits[: len(local)].chunk(num_local):
            log_probs = F.log_softmax(crop / 0.1, dim=-1)
            for target in cls_targets:
                loss = loss - torch.sum(target * log_probs, dim=-1).mean() / terms
        log_probs = F.log_softmax(cls_logits[len(local) :] / 0.1, dim=-1)
        loss = loss - torch.sum(cls_targets.flatten(0, 1) * log_probs, dim=-1).mean() * 2 / terms
        with torch.autocast(cls.device.type, enabled=False):
            for crop in cls.float().chunk(2):
                unit = F.normalize(crop, eps=1e-8, dim=-1)
                nearest = (unit @ unit.t()).fill_diagonal_(-1).max(dim=1).indices
                loss = loss - 0.1 * torch.log(F.pairwise_distance(unit, unit[nearest], eps=1e-8) + 1e-8).mean()
        rows = torch.sum(patch_targets * F.log_softmax(patch_logits / 0.1, dim=-1), dim=-1)
        return loss - (rows * batch["mask_weights"]).sum() / len(masks)

    def step(self) -> None:
        with autocast(self.args):
            loss = self.loss()
        loss.backward()
        for part in self.student.values():
            nn.utils.clip_grad_norm_(part.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            student, teacher = (list(half.parameters()) for half in (self.student, self.teacher))
            torch._foreach_mul_(teacher, MOMENTUM)
            torch._foreach_add_(teacher, student, alpha=1 - MOMENTUM)


# ---- RegViT and lightly-train ------------------------------------------------------------------------------------


def head_names(args: argparse.Namespace) -> list[str]:
    return ["dino_head"] if args.tied else ["dino_head", "ibot_head"]


def official_name(name: str) -> str:
    """Return the official name of a parameter of hf_regvit."""
    rules = (
        (r"^backbone\.embeddings\.patch_embeddings\.projection", "backbone.patch_embed.proj"),
        (r"^backbone\.embeddings\.position_embeddings", "backbone.pos_embed"),
        (r"^backbone\.embeddings\.", "backbone."), (r"^backbone\.layers\.", "backbone.blocks."),
        (r"\.attention\.o_proj", ".attn.proj"), (r"\.attention\.", ".attn."),
        (r"\.layer_scale(\d)\.lambda1", r".ls\1.gamma"), (r"^backbone\.layernorm", "backbone.norm"),
    )  # fmt: skip
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


class RegViTStep:
    """Training step of this package, with optional timing of its parts."""

    def __init__(self, args: argparse.Namespace, batch: dict[str, Tensor], *, masked: bool = False) -> None:
        from hf_regvit.pretraining.distillation import HeadShape, SelfDistillation

        self.args, self.batch, self.parts = args, batch, dict.fromkeys(PARTS, 0.0)
        torch.manual_seed(0)
        backbone = build_backbone(args, "sample" if masked else "batch_subset")
        shape = HeadShape(args.prototypes, HIDDEN, BOTTLENECK)
        self.network = SelfDistillation(
            backbone, dino_head=shape, ibot_head=None if args.tied else shape, centering=args.centering
        ).to(args.device)
        if args.checkpointing:
            self.network.gradient_checkpointing_enable()
        if args.compile:
            self.network.compile_blocks()
        for name, part in (("teacher_targets", "teacher"), ("_student_tokens", "student forward")):
            setattr(self.network, name, self.timed(getattr(self.network, name), part))
        self.optimizer = torch.optim.AdamW(self.network.student.parameters(), **OPTIMIZER, fused=True)

    @contextlib.contextmanager
    def clock(self, part: str) -> Iterator[None]:
        start = seconds(self.args)
        yield
        self.parts[part] += seconds(self.args) - start

    def timed(self, method: Callable, part: str) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.clock(part):
                return method(*args, **kwargs)

        return run if self.args.parts else method

    def loss(self) -> Tensor:
        self.network.begin_step(TEMPERATURE)
        return self.network(**self.batch)["loss"]

    def step(self) -> None:
        clock = self.clock if self.args.parts else lambda _: contextlib.nullcontext()
        with clock("heads and losses"), autocast(self.args):
            loss = self.loss()
        with clock("backward"):
            loss.backward()
        with clock("clipping"):
            self.network.clip_gradients(CLIP)
        with clock("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        with clock("teacher's update"):
            self.network.update_teacher(MOMENTUM)


PARTS = ("teacher", "student forward", "heads and losses", "backward", "clipping", "optimizer", "teacher's update")


def build_backbone(args: argparse.Namespace, drop_path_mode: str = "batch_subset") -> Any:
    from hf_regvit import RegViTConfig, RegViTModel

    config = RegViTConfig.from_preset(
        args.preset, patch_size=args.patch_size, image_size=args.global_size, use_mask_token=True,
        layerscale_value=0.1, drop_path_rate=args.drop_path, drop_path_mode=drop_path_mode, num_register_tokens=4,
    )  # fmt: skip
    return RegViTModel(config)


class LightlyStep:
    """Training step of lightly-train's DINOv2 method as Lightning runs it per batch, without loader and loops."""

    def __init__(self, args: argparse.Namespace, batch: dict[str, Tensor], config: Any) -> None:
        from lightly_train._methods.dinov2 import dinov2 as method
        from lightly_train._models.dinov2_vit.dinov2_vit import DINOv2ViTModelWrapper
        from lightly_train._models.dinov2_vit.dinov2_vit_src.models.vision_transformer import DinoVisionTransformer
        from lightly_train._models.embedding_model import EmbeddingModel

        vit = DinoVisionTransformer(
            img_size=args.global_size, patch_size=args.patch_size, embed_dim=config.hidden_size,
            depth=config.num_hidden_layers, num_heads=config.num_attention_heads, init_values=0.1, block_chunks=0,
            num_register_tokens=4, drop_path_rate=args.drop_path, drop_path_uniform=True,
            interpolate_antialias=True, interpolate_offset=0.0,
        )  # fmt: skip
        centering = {"softmax": "softmax", "sinkhorn": "sinkhorn_knopp"}[args.centering]
        options = method.DINOv2Args(
            ibot_separate_head=not args.tied, output_dim=args.prototypes, center_method=centering
        )
        optimizer = method.DINOv2AdamWViTArgs()
        self.args, self.views = args, [*batch["global_crops"], *batch["local_crops"]]
        self.method = method.DINOv2(options, optimizer, EmbeddingModel(DINOv2ViTModelWrapper(vit)), args.images, 3)
        self.method.to(args.device)
        self.method._trainer = SimpleNamespace(global_step=0)
        # The method draws masks inside the step. Use the same masks as the other systems, so that row counts agree.
        method.create_collated_masks = lambda **_: {
            "collated_masks": batch["masks"].flatten(0, 1),
            "mask_indices_list": batch["mask_indices"],
            "masks_weight": batch["mask_weights"],
        }
        self.update = method.update_momentum
        self.optimizer = method.get_optimizer_with_decay(
            optim_args=optimizer, trainable_modules=self.method.trainable_modules(), layerwise_decay=0.9,
            patch_embed_lr_multiplier=0.2,
        )  # fmt: skip
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.method.train()

    def step(self) -> None:
        with autocast(self.args):
            loss = self.method.training_step_impl({"views": self.views}, 0).loss
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        method = self.method
        self.update(method.student_embedding_model, method.teacher_embedding_model, m=MOMENTUM)
        self.update(method.student_head, method.teacher_head, m=MOMENTUM)


# ---- Measuring ---------------------------------------------------------------------------------------------------


def autocast(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def seconds(args: argparse.Namespace) -> float:
    """Return the time in seconds after all work of the device has finished."""
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if args.processor_time else time.perf_counter()


def make_batch(args: argparse.Namespace) -> dict[str, Tensor]:
    from hf_regvit.pretraining.crops import batch_masks, masked_positions

    generator = torch.Generator().manual_seed(0)
    grid = args.global_size // args.patch_size
    masks = torch.from_numpy(batch_masks((grid, grid), 2 * args.images, random.Random(0))).view(2, args.images, -1)
    indices, weights = masked_positions(masks)
    sizes = ((2, args.global_size), (args.num_local, args.local_size))
    crops = [torch.randn(count, args.images, 3, size, size, generator=generator) for count, size in sizes]
    batch = {"global_crops": crops[0], "local_crops": crops[1], "masks": masks}
    batch |= {"mask_indices": indices, "mask_weights": weights}
    return {name: tensor.to(args.device) for name, tensor in batch.items()}


def build(system: str, args: argparse.Namespace, batch: dict[str, Tensor]) -> Any:
    if system.startswith("regvit"):
        return RegViTStep(args, batch, masked=system == "regvit_masked")
    backbone = build_backbone(args)
    if system == "lightly":
        return LightlyStep(args, batch, backbone.config)
    torch.manual_seed(0)
    return OfficialStep(args, batch, backbone.config, RegViTStep(args, batch).network.student.state_dict())


def flops_per_image(args: argparse.Namespace, batch: dict[str, Tensor], config: Any) -> float:
    """Count FLOPs per image of a step: student forward and twice that for its backward, teacher forward, heads."""
    width, depth = config.hidden_size, config.num_hidden_layers

    def backbone(crops: int, size: int, rate: float) -> float:
        patches = (size // args.patch_size) ** 2
        tokens = patches + 5
        kept = max(int(crops * args.images * (1 - rate)), 1) / args.images
        block = 24 * width**2 * tokens + 4 * width * tokens**2
        return kept * depth * block + crops * patches * 6 * args.patch_size**2 * width

    row = 2 * (width * HIDDEN + HIDDEN**2 + HIDDEN * BOTTLENECK + BOTTLENECK * args.prototypes)
    masked = len(batch["mask_indices"]) / args.images
    student = backbone(2, args.global_size, args.drop_path) + backbone(args.num_local, args.local_size, args.drop_path)
    student += row * (2 + args.num_local + masked)
    return 3 * student + backbone(2, args.global_size, 0.0) + row * (2 + masked)


def matmul_peak(args: argparse.Namespace, dtype: torch.dtype) -> float:
    """Return the highest FLOP/s of several large matrix products."""
    side = 8192 if args.device == "cuda" else 1024
    a, b = (torch.randn(side, side, device=args.device, dtype=dtype) for _ in range(2))
    best, end = math.inf, time.perf_counter() + 2
    while best == math.inf or time.perf_counter() < end:
        start = seconds(args)
        a @ b
        best = min(best, seconds(args) - start)
    return 2 * side**3 / best


def check_equal_work(ours: RegViTStep, official: OfficialStep) -> None:
    """Check that both losses agree for the same weights, batch and drop path draws."""
    losses = []
    for system in (ours, official):
        torch.manual_seed(1)
        with torch.no_grad(), autocast(ours.args):
            losses.append(system.loss().item())
    limit = 1e-4 if ours.args.dtype == "float32" else 2e-2
    if not abs(losses[0] - losses[1]) < limit * abs(losses[1]):
        raise SystemExit(f"The two steps compute different losses: {losses[0]:.6f} and {losses[1]:.6f}.")
    print(f"loss of regvit: {losses[0]:.6f}, loss of official: {losses[1]:.6f}", flush=True)


def time_case(args: argparse.Namespace, systems: list[str]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the seconds of every round for each system, and those of the parts of a RegViT step."""
    batch = make_batch(args)
    built = {system: build(system, args, batch) for system in systems}
    if "official" in built and "regvit" in built:
        check_equal_work(built["regvit"], built["official"])
    for system in systems:
        for _ in range(3 if args.compile else 1):  # warm-up
            built[system].step()
    for ours in built.values():
        if isinstance(ours, RegViTStep):
            ours.parts = dict.fromkeys(PARTS, 0.0)
    times: dict[str, list[float]] = {system: [] for system in systems}
    order = list(systems)
    for _ in range(args.rounds):
        order.append(order.pop(0))  # rotate, so that no system always runs first
        for system in order:
            start = seconds(args)
            built[system].step()
            times[system].append(seconds(args) - start)
    parts = {part: value / args.rounds for part, value in built["regvit"].parts.items()}
    parts["heads and losses"] -= parts["teacher"] + parts["student forward"]
    return times, parts


def resident_kib(field: str) -> int:
    """Return the resident memory of this process, current (VmRSS) or peak (VmHWM); Linux only."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def memory_child(args: argparse.Namespace) -> None:
    """Print the MiB that a step adds to a process that holds model and optimizer."""
    system = build(args.child, args, make_batch(args))
    system.step()  # optimizer state, kernels
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        system.step()
        added = torch.cuda.max_memory_allocated() - before
    else:
        # Building the system raised the peak and left free pages that a step would reuse without being counted.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_kib("VmRSS")
        system.step()
        added = (resident_kib("VmHWM") - before) * 1024
    print(json.dumps(added / 2**20))


def peak_memory(args: argparse.Namespace, system: str) -> float:
    command = [sys.executable, __file__, "--child", system, "--dtype", args.dtype, "--presets", args.preset]
    for name in ("patch_size", "images", "global_size", "local_size", "num_local", "drop_path", "prototypes",
                 "centering", "device", "threads"):  # fmt: skip
        command += [f"--{name}", str(getattr(args, name))]
    command += [f"--{name}" for name in ("tied", "compile", "checkpointing") if getattr(args, name)]
    if args.official_code:
        command += ["--official_code", str(args.official_code)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def report(args: argparse.Namespace, systems: list[str]) -> None:
    """Print times, parts and memory of one preset in one dtype."""
    batch, config = make_batch(args), build_backbone(args).config
    flops, peak = flops_per_image(args, batch, config), matmul_peak(args, getattr(torch, args.dtype))
    print(f"\n## {args.preset}/{args.patch_size}, {args.dtype}: {args.images} images, 2 x {args.global_size} + "
          f"{args.num_local} x {args.local_size}, {len(batch['mask_indices'])} masked patches, drop path "
          f"{args.drop_path}, {'one head' if args.tied else 'two heads'} of {args.prototypes} prototypes")  # fmt: skip
    print(f"{flops / 1e9:.0f} GFLOP per image; matrix products peak at {peak / 1e9:.0f} GFLOP/s", flush=True)
    times, parts = time_case(args, systems)
    print("\n| system | ms/step | images/s | share of peak | other / regvit | MiB added by a step |")
    print("|---|---|---|---|---|---|")
    for system in systems:
        median = statistics.median(times[system])
        rate = args.images / median
        ratio = statistics.median(a / b for a, b in zip(times[system], times["regvit"], strict=True))
        memory = "" if args.no_memory else f"{peak_memory(args, system):.0f}"
        print(f"| {system} | {median * 1e3:.0f} | {rate:.2f} | {rate * flops / peak:.0%} | {ratio:.2f} | {memory} |",
              flush=True)  # fmt: skip
    if args.parts:
        whole = sum(parts.values())
        shares = ", ".join(f"{part} {value / whole:.0%}" for part, value in parts.items())
        print(f"\nshares of regvit's step: {shares}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["small"], choices=["tiny", "small", "base", "large"])
    parser.add_argument("--systems", nargs="+", choices=["regvit", "official", "regvit_masked", "lightly"])
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--images", type=int, default=8, help="number of images per step")
    parser.add_argument("--global_size", type=int, default=224)
    parser.add_argument("--local_size", type=int, default=96)
    parser.add_argument("--num_local", type=int, default=8)
    parser.add_argument("--drop_path", type=float, default=0.3)
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--tied", action="store_true", help="use one head for CLS and patches")
    parser.add_argument("--centering", default="softmax", choices=["softmax", "sinkhorn"])
    parser.add_argument(
        "--dtype", help="float32 or bfloat16 (autocast); default: both, if bfloat16 is faster on this device"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compile the blocks of RegViT")
    parser.add_argument(
        "--checkpointing", action="store_true", help="recompute the blocks of RegViT in the backward pass"
    )
    parser.add_argument(
        "--processor_time",
        action="store_true",
        help="measure processor time instead of wall time, for shared machines",
    )
    parser.add_argument("--official_code", type=Path, help="checkout of the official repository")
    parser.add_argument("--no_memory", action="store_true")
    parser.add_argument(
        "--no_parts", dest="parts", action="store_false", help="do not time the parts of the RegViT step"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = True
    if args.child:
        args.preset, args.parts = args.presets[0], False
        return memory_child(args)
    import transformers

    from hf_regvit import __version__

    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) or [platform.machine()]
    name = torch.cuda.get_device_name() if args.device == "cuda" else names[0]
    print(f"{name}, {os.cpu_count()} cores, {args.threads} threads; hf_regvit {__version__}, torch "
          f"{torch.__version__}, transformers {transformers.__version__}")  # fmt: skip
    systems = args.systems or ["regvit", "official", "regvit_masked"]
    if not args.systems and importlib.util.find_spec("lightly_train"):
        systems.append("lightly")
    dtypes = [args.dtype] if args.dtype else ["float32", "bfloat16"]
    if not args.dtype:
        peaks = [matmul_peak(args, getattr(torch, dtype)) for dtype in dtypes]
        if peaks[1] < peaks[0]:
            print(f"bfloat16 is skipped: {peaks[1] / 1e9:.0f} GFLOP/s here, but float32 {peaks[0] / 1e9:.0f}.")
            dtypes = dtypes[:1]
    for preset in args.presets:
        for dtype in dtypes:
            args.preset, args.dtype = preset, dtype
            report(args, systems)


if __name__ == "__main__":
    main()
