"""Measure the time and memory of a step of continued pretraining: all parameters, low-rank updates, the last blocks.

The model has random weights, which change neither time nor memory. Each mode runs in a process of its own, because the
peak of a process never falls. Run it on an idle machine:

    python benchmarks/bench_continuation.py --config examples/continue_dinov3_cpu.yaml --output continuation.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from hf_regvit import PretrainingArguments, RegViTConfig, RegViTModel, pretrain
from hf_regvit.training.callbacks import Observer
from hf_regvit.training.finite import peak_memory_mib

MODES = ("full", "lora", "last_blocks")
ROTARY = {"use_position_embeddings": False, "rope_theta": 100.0, "key_bias": False}


class StepTimes(Observer):
    """Observer that keeps the time at the end of each step."""

    def __init__(self) -> None:
        super().__init__(1)
        self.ends: list[float] = []

    def measure(self, model: object, step: int) -> dict[str, float]:
        """Note the time."""
        self.ends.append(time.perf_counter())
        return {}


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Run a few steps of one mode and return the median seconds of a step and the peak memory."""
    recipe = yaml.safe_load(Path(options.config).read_text())
    rotary = ROTARY if recipe.get("pos_embed_rescale") else {}
    config = RegViTConfig.from_preset(
        options.preset, image_size=recipe["global_crop_size"], patch_size=recipe["patch_size"], **rotary
    )
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        RegViTModel(config).save_pretrained(Path(folder, "model"))
        before = peak_memory_mib()
        changes = {
            "init_from": str(Path(folder, "model")), "output_dir": str(Path(folder, "run")), "mode": options.mode,
            "max_steps": options.steps, "freeze_backbone_steps": 0, "save_strategy": "no", "monitor_steps": 0,
            "panel_steps": 0, "knn_steps": 0, "disable_tqdm": True, "report_to": "none",
            "learning_rate": None,
        }  # fmt: skip
        if not torch.cuda.is_available():
            changes |= {"use_cpu": True, "bf16": False, "dataloader_num_workers": 0}
        pretrain(PretrainingArguments(**{**recipe, **changes}), callbacks=[times])
    steps = torch.tensor([end - start for start, end in zip(times.ends[1:], times.ends[2:], strict=False)])
    return {
        "seconds_per_step": steps.median().item(),
        "fastest_step": steps.min().item(),
        "peak_mib": peak_memory_mib() or 0.0,
        "before_mib": before or 0.0,
        "gpu_mib": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="Recipe of a continued run.")
    parser.add_argument("--preset", default="small", help="Size of the backbone.")
    parser.add_argument("--steps", type=int, default=8, help="Steps per mode.")
    parser.add_argument("--mode", choices=MODES, help="Measure one mode in this process.")
    parser.add_argument("--output", type=Path, help="JSON file for the results.")
    options = parser.parse_args()
    if options.mode:
        print(json.dumps(measure(options)))
        return
    results = {}
    for mode in MODES:
        done = subprocess.run([sys.executable, *sys.argv, "--mode", mode], capture_output=True, text=True, check=True)
        results[mode] = json.loads(done.stdout.splitlines()[-1])
        print(mode, results[mode], flush=True)
    if options.output:
        options.output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
