r"""Compare all fine-tuning modes and the example script of transformers, with the same weights and budget.

    python benchmarks/finetune_evidence.py --model FOLDER --data FOLDER --output_dir runs/finetuning --seeds 0 1 2 \\
        --peer path/to/run_image_classification.py
    python benchmarks/finetune_evidence.py --model FOLDER --data ../shared/data/camvid --output_dir runs/camvid \\
        --task semantic-segmentation --modes full linear --steps 250 --batch_size 8 --ignore_values 11
    python benchmarks/finetune_evidence.py --model FOLDER --data ../shared/data/depth_7scenes_kitchen \\
        --output_dir runs/kitchen --task depth-estimation --modes full linear --steps 200 --batch_size 8

Each run is a separate process, and its folder is that of a normal fine-tuning run with card, curves and panels. Prints
a line for every run: the main metric on the validation split with its 95 % interval, and the wall and processor
seconds of the whole process, including imports and evaluations; for several seeds, also the mean and the range. The
peer, for classification only, uses the same batch size, steps, learning rate and seed, and its own defaults otherwise.
Results are saved to `results.json` after each run, and finished runs are not repeated. The last step is evaluated, not
the best one.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_regvit.finetuning.classification import wilson_interval

SCRIPTS = {
    "image-classification": "run_image_classification.py",
    "semantic-segmentation": "run_semantic_segmentation.py",
    "depth-estimation": "run_depth_estimation.py",
}
MAIN_METRIC = {"image-classification": "accuracy", "semantic-segmentation": "mean_iou", "depth-estimation": "rmse"}
MODES = {
    "full": ["--learning_rate", "3e-4", "--layer_decay", "0.8", "--head_learning_rate_multiplier", "5"],
    "lora": ["--learning_rate", "1e-3", "--head_learning_rate_multiplier", "3"],
    "linear": ["--learning_rate", "1e-2"],
}
PEER = ["--learning_rate", "3e-4", "--ignore_mismatched_sizes", "True", "--remove_unused_columns", "False"]


def timed(command: Sequence[str], log: Path, threads: int) -> dict[str, float]:
    """Run a command and return its wall and processor seconds, including child processes."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        subprocess.run(command, check=True, env=environment, stdout=file, stderr=subprocess.STDOUT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - started, "processor_seconds": processor}


def command_of(name: str, seed: int, args: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command line of a run."""
    common = [
        "--output_dir", str(folder), "--max_steps", str(args.steps), "--seed", str(seed), "--use_cpu", "True",
        "--per_device_train_batch_size", str(args.batch_size), "--per_device_eval_batch_size", "50",
        "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "True",
        "--model_name_or_path", args.model, "--dataset_name", args.data,
    ]  # fmt: skip
    if name == "peer":
        return [sys.executable, args.peer, *common, *PEER, "--eval_strategy", "no", "--do_train", "--do_eval"]
    every = str(args.eval_steps or args.steps)  # by default once at the end, as in the peer
    own = ["--eval_strategy", "steps", "--eval_steps", every, "--load_best_model_at_end", "False", "--mode", name]
    if args.ignore_values:
        own += ["--ignore_values", *map(str, args.ignore_values)]
    script = str(Path(__file__).with_name(SCRIPTS[args.task]))
    return [sys.executable, script, *common, *own, *MODES[name]]


def scores_of(name: str, folder: Path, task: str) -> dict[str, Any]:
    """Return the main metric with its interval, the number of validation images, and all other metrics."""
    if name == "peer":
        metrics = json.loads((folder / "eval_results.json").read_text())
        value = metrics["eval_accuracy"]
        images = round(metrics["eval_runtime"] * metrics["eval_samples_per_second"])
        return {"value": value, "images": images, "interval": wilson_interval(value, images)}
    report = json.loads((folder / "metrics.json").read_text())
    main = MAIN_METRIC[task]
    scores = {"value": report["eval"][main], "images": report["images"]["validation"], "eval": report["eval"]}
    return scores | {"interval": report["intervals"][main]}


def words(value: float, task: str) -> str:
    """Format a share in percent or a depth error in meters."""
    return f"{value:.3f} m" if task == "depth-estimation" else f"{value:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", required=True, help="folder with weights that both transformers and `convert` can read"
    )
    parser.add_argument("--data", required=True, help="folder with train and validation parquet, or a Hub data set")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--task", default="image-classification", choices=list(SCRIPTS))
    parser.add_argument("--peer", help="run_image_classification.py of the transformers examples")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--eval_steps", type=int, help="steps between evaluations; default: only after the last step")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--ignore_values", nargs="*", type=int, help="mask values to ignore")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    record = output / "results.json"
    results = json.loads(record.read_text()) if record.is_file() else {}
    names = [*args.modes, *(["peer"] if args.peer else [])]
    for seed in args.seeds:
        for name in names:
            run = f"{name}-seed{seed}"
            if run not in results:
                times = timed(command_of(name, seed, args, output / run), output / f"{run}.log", args.threads)
                results[run] = {**scores_of(name, output / run, args.task), **times}
                record.write_text(json.dumps(results, indent=2) + "\n")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "transformers", "peft"))
    print(f"{args.steps} steps of {args.batch_size} images, {args.threads} thread(s), {packages}")
    print(f"{platform.machine()}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}\n")
    print(f"| run | {MAIN_METRIC[args.task]} | 95 % | seconds | processor seconds |\n|---|---:|---|---:|---:|")
    for run, result in results.items():
        value, low, high = (words(number, args.task) for number in (result["value"], *result["interval"]))
        times = f"{result['seconds']:.0f} | {result['processor_seconds']:.0f}"
        print(f"| {run} | {value} | {low} to {high} | {times} |")
    for name in names if len(args.seeds) > 1 else []:
        values = [results[f"{name}-seed{seed}"]["value"] for seed in args.seeds]
        mean, low, high = (words(n, args.task) for n in (sum(values) / len(values), min(values), max(values)))
        print(f"{name}, {len(values)} seeds: mean {mean}, {low} to {high}")


if __name__ == "__main__":
    main()
