"""Compare a small student of a frozen teacher with the same student trained by self-distillation, in equal time.

    python benchmarks/compare_distillation.py --teacher MODEL --data FOLDER_OR_PARQUET --minutes 6

Both arms use `examples/own_images_cpu.yaml`: the same student, images, global crops, batch, schedules and seeds. The
student of the teacher has no local crops and no masks, as in `examples/distill_cpu.yaml`. Crops are smaller than in
the recipe, so that a few minutes are enough for hundreds of steps. Every run uses one thread and the same processor
time, data loading included, which does not depend on other load: the time of a step is measured first, and the number
of steps follows from it. The k-NN and linear accuracy of the exported backbone are those of `regvit evaluate`. Two
more rows give the untrained student and the teacher.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("teacher", "alone")
CALIBRATION_STEPS = 12


def main() -> None:
    args = parse_args()
    if args.run:
        return run(json.loads(args.run))
    names = ("data", "teacher", "minutes", "max_images", "patch_size", "global_crop_size", "teacher_image_size")
    common = {name: getattr(args, name) for name in names}
    jobs = [
        common | {"arm": arm, "seed": seed, "folder": str(args.output_dir / f"{arm}-{seed}")}
        for seed in args.seeds for arm in ARMS
    ]  # fmt: skip
    jobs += [
        common | {"arm": arm, "seed": 0, "folder": str(args.output_dir / arm)} for arm in ("untrained", "ceiling")
    ]
    with ThreadPoolExecutor(args.parallel) as pool:
        results = list(pool.map(run_alone, jobs))
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2))
    print_table(results)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="frozen model of any family, or its name")
    parser.add_argument("--data", help="labeled images with a validation split: a folder or parquet files")
    parser.add_argument("--minutes", type=float, default=6.0, help="processor time of a run")
    parser.add_argument("--max_images", type=int, default=4000, help="images of the evaluation")
    parser.add_argument("--patch_size", type=int, default=8)
    parser.add_argument("--global_crop_size", type=int, default=32, help="local crops are half as large")
    parser.add_argument("--teacher_image_size", type=int, default=96)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_alone(job: dict) -> dict:
    """Train and evaluate in a new process with one thread; a finished job is read from its folder."""
    result = Path(job["folder"]) / "result.json"
    if not result.is_file():
        result.parent.mkdir(parents=True, exist_ok=True)
        with (result.parent / "log.txt").open("w") as log:
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(
                [sys.executable, __file__, "--run", json.dumps(job)], check=True, stdout=log, stderr=log, env=env
            )
    return json.loads(result.read_text())


def run(job: dict) -> None:
    import torch

    from hf_regvit import RegViTModel, evaluate_backbone
    from hf_regvit.models.processing import default_image_processor

    torch.set_num_threads(1)
    folder = Path(job["folder"])
    steps, step = 0, 0.0
    if job["arm"] in ARMS:
        step = statistics.median(train(job, folder / "calibration", CALIBRATION_STEPS)[2:])
        steps = round(60 * job["minutes"] / step)
        spent = train(job, folder / "run", steps)
        step = sum(spent) / steps
        model = str(folder / "run" / "backbone")
    elif job["arm"] == "untrained":
        torch.manual_seed(job["seed"])
        model = RegViTModel(arguments(job, folder, 1).backbone_config()).eval()
        model.image_processor = default_image_processor(job["global_crop_size"], resize=job["global_crop_size"])
    else:
        model = job["teacher"]
    report = evaluate_backbone(model, job["data"], tasks=("knn", "linear"), max_images=job["max_images"])
    scores = {score.name: [score.value, *score.interval] for score in report.scores}
    (folder / "result.json").write_text(json.dumps(job | {"scores": scores, "steps": steps, "step_seconds": step}))


def train(job: dict, folder: Path, steps: int) -> list[float]:
    """Run a number of steps; return the processor time of each in seconds."""
    from transformers import TrainerCallback

    from hf_regvit import pretrain

    class Times(TrainerCallback):
        ends: list[float] = []

        def on_step_end(self, args, state, control, **kwargs):
            self.ends.append(time.process_time())

    times = Times()
    times.ends = []
    pretrain(arguments(job, folder, steps), callbacks=[times])
    return [end - start for start, end in zip(times.ends, times.ends[1:])]


def arguments(job: dict, folder: Path, steps: int):
    import yaml

    from hf_regvit import PretrainingArguments

    recipe = yaml.safe_load((ROOT / "examples" / "own_images_cpu.yaml").read_text())
    if job["arm"] == "teacher":
        recipe |= {"teacher": [job["teacher"]], "teacher_image_size": job["teacher_image_size"]}
        recipe |= {"num_local_crops": 0, "mask_probability": 0.0}
    size = job["global_crop_size"]
    recipe |= {"patch_size": job["patch_size"], "global_crop_size": size, "local_crop_size": size // 2}
    recipe["teacher_momentum"] = 0.97  # of both arms: the average of so few steps must be short
    recipe |= {"data": job["data"], "seed": job["seed"], "output_dir": str(folder), "max_steps": steps}
    recipe |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "dataloader_num_workers": 0}
    recipe |= {"monitor_steps": 0, "panel_steps": 0, "knn_steps": 0, "use_cpu": True}
    return PretrainingArguments(**recipe)


def print_table(results: list[dict]) -> None:
    print("| arm | seed | steps | CPU seconds a step | score | % | 95 % interval |\n|---|---|---|---|---|---|---|")
    for result in results:
        trained = (result["steps"], f"{result['step_seconds']:.2f}") if result["steps"] else ("", "")
        for name, (value, low, high) in result["scores"].items():
            row = f"| {result['arm']} | {result['seed']} | {trained[0]} | {trained[1]} | {name}"
            print(f"{row} | {100 * value:.1f} | {100 * low:.1f} to {100 * high:.1f} |")
    for name in results[0]["scores"]:
        mean = {arm: statistics.mean(r["scores"][name][0] for r in results if r["arm"] == arm) for arm in ARMS}
        gains = [
            next(r["scores"][name][0] for r in results if (r["arm"], r["seed"]) == ("teacher", seed))
            - next(r["scores"][name][0] for r in results if (r["arm"], r["seed"]) == ("alone", seed))
            for seed in sorted({r["seed"] for r in results if r["arm"] in ARMS})
        ]
        print(f"{name}: {100 * mean['teacher']:.1f} with the teacher, {100 * mean['alone']:.1f} alone;", end=" ")
        print(f"gain of each seed: {', '.join(f'{100 * gain:+.1f}' for gain in gains)}")


if __name__ == "__main__":
    main()
