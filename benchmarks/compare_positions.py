"""Compare pretraining of the same ViT with learned and with rotary positions: kNN accuracy and time of a step.

    python benchmarks/compare_positions.py --data FOLDER_OR_PARQUET      # ViT-S/16, 200 steps, one seed

Images, crops, heads, schedules and seed are the same; only `--position` differs. Every run uses one thread on one
core. The time of a step is processor time, data loading included, which does not depend on other load. kNN is
`regvit evaluate --tasks knn` on the teacher, before and after training.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

POSITIONS = ("learned", "rotary")


def main() -> None:
    args = parse_args()
    if args.run:
        return train(json.loads(args.run))
    jobs = [
        {
            "position": position, "seed": seed, "output": str(args.output_dir / f"{position}-s{seed}"),
            "data": args.data, "steps": steps, "batch": args.batch_size, "size": args.global_crop_size,
        }
        for seed in args.seeds for position in POSITIONS for steps in (0, args.steps)
    ]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run_alone, jobs))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2))
    print_table(results, args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="labeled images with a validation split: a folder or parquet files")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/positions"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--global_crop_size", type=int, default=64, help="local crops are half as large")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--run", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_alone(job: dict) -> dict:
    """Train and evaluate in a new process with one thread; a finished job is read from its folder."""
    folder = Path(job["output"]) / str(job["steps"])
    if not (folder / "result.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("w") as log:
            command = [sys.executable, __file__, "--run", json.dumps(job | {"output": str(folder)})]
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, stdout=log, stderr=log, env=env)
    return json.loads((folder / "result.json").read_text())


def train(job: dict) -> None:
    import torch
    from transformers import TrainerCallback

    from hf_regvit import PretrainingArguments, RegViTModel, evaluate_backbone, pretrain
    from hf_regvit.models.processing import default_image_processor

    class StepTimes(TrainerCallback):
        seconds: list[float] = []

        def on_step_begin(self, args, state, control, **kwargs):
            self.started = time.process_time()

        def on_step_end(self, args, state, control, **kwargs):
            self.seconds.append(time.process_time() - self.started)

    torch.set_num_threads(1)
    folder, size = Path(job["output"]), job["size"]
    arguments = PretrainingArguments(
        output_dir=str(folder / "run"), data=job["data"], seed=job["seed"], position=job["position"],
        max_steps=max(job["steps"], 1), per_device_train_batch_size=job["batch"], save_strategy="no",
        report_to="none", disable_tqdm=True, monitor_steps=0, panel_steps=0, dataloader_num_workers=0,
        preset="small", patch_size=16, num_register_tokens=4, layerscale_value=1.0, register_init_std=1.0,
        global_crop_size=size, local_crop_size=size // 2, num_local_crops=2,
        global_crop_scale=[0.4, 1.0], local_crop_scale=[0.15, 0.4], blur_sigma=[0.1, 1.0], blur_kernel_size=5,
        solarize_probability=0.0, head_num_prototypes=1024, head_hidden_size=512, head_bottleneck_size=64,
        warmup_teacher_temperature=0.04, teacher_temperature=0.04, teacher_momentum=0.98, learning_rate=5e-4,
        learning_rate_reference_batch=0, weight_decay=0.04, weight_decay_end=0.1, layer_decay=1.0,
        patch_embed_lr_multiplier=1.0,
    )  # fmt: skip
    times = StepTimes()
    if job["steps"]:
        pretrain(arguments, callbacks=[times])
        model = folder / "run" / "backbone"
    else:
        torch.manual_seed(job["seed"])
        model = RegViTModel(arguments.backbone_config()).eval()
        model.image_processor = default_image_processor(size, resize=size)
    report = evaluate_backbone(model, job["data"], tasks=("knn",), max_images=2000)
    scores = [[score.name, score.value, score.interval] for score in report.scores]
    step = statistics.median(times.seconds) if job["steps"] else None
    (folder / "result.json").write_text(json.dumps(job | {"scores": scores, "step_seconds": step}))


def print_table(results: list[dict], args: argparse.Namespace) -> None:
    import torch

    print(
        f"{platform.machine()}, one thread a run, torch {torch.__version__}, {args.steps} steps of {args.batch_size}"
    )
    print(
        "| position | seed | steps | CPU seconds a step | score | % | 95 % interval |\n|---|---|---|---|---|---|---|"
    )
    for run in results:
        step = f"{run['step_seconds']:.2f}" if run["steps"] else ""
        for name, value, interval in run["scores"]:
            low, high = (f"{100 * end:.1f}" for end in interval)
            row = f"| {run['position']} | {run['seed']} | {run['steps']} | {step} | {name}"
            print(f"{row} | {100 * value:.1f} | {low} to {high} |")


if __name__ == "__main__":
    main()
