r"""Fine-tune the same weights in every mode, and with the example script of transformers, on the same budget.

    python scripts/finetune_evidence.py --model FOLDER --data FOLDER --output_dir runs/finetuning \\
        --peer path/to/run_image_classification.py

Each run is a process of its own. Prints one table: top-1 on the validation part with its 95 % interval (Wilson), wall
seconds and processor seconds of the whole process, imports and evaluation included. The peer gets the same images per
step, steps, learning rate and seed; everything else is its own default. Results are written run by run to
`results.json`; a run that is there already is not repeated.
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

from hf_regvit.classification import wilson_interval

MODES = {
    "full": ["--learning_rate", "3e-4", "--layer_decay", "0.8", "--head_learning_rate_multiplier", "5"],
    "lora": ["--learning_rate", "1e-3", "--head_learning_rate_multiplier", "3"],
    "linear": ["--learning_rate", "1e-2"],
}
PEER = ["--learning_rate", "3e-4", "--ignore_mismatched_sizes", "True", "--remove_unused_columns", "False"]


def timed(command: Sequence[str], log: Path, threads: int) -> dict[str, float]:
    """Runs a command; seconds of the wall and of the processor, its children included."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        subprocess.run(command, check=True, env=environment, stdout=file, stderr=subprocess.STDOUT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - started, "processor_seconds": processor}


def command_of(name: str, args: argparse.Namespace, folder: Path) -> list[str]:
    """The command line of one run."""
    common = [
        "--output_dir", str(folder), "--max_steps", str(args.steps), "--seed", str(args.seed), "--use_cpu", "True",
        "--per_device_train_batch_size", str(args.batch_size), "--per_device_eval_batch_size", "50",
        "--eval_strategy", "no", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "True",
        "--model_name_or_path", args.model, "--dataset_name", args.data,
    ]  # fmt: skip
    if name == "peer":
        return [sys.executable, args.peer, *common, *PEER, "--do_train", "--do_eval"]
    ours = str(Path(__file__).with_name("run_image_classification.py"))
    # Evaluated once, at the end, as the peer.
    at_the_end = ["--eval_strategy", "steps", "--eval_steps", str(args.steps), "--load_best_model_at_end", "False"]
    return [sys.executable, ours, *common, *at_the_end, "--mode", name, *MODES[name]]


def accuracy_of(name: str, folder: Path) -> tuple[float, int]:
    """Top-1 and the number of validation images."""
    if name == "peer":
        metrics = json.loads((folder / "eval_results.json").read_text())
        return metrics["eval_accuracy"], round(metrics["eval_runtime"] * metrics["eval_samples_per_second"])
    metrics = json.loads((folder / "metrics.json").read_text())
    return metrics["eval"]["accuracy"], metrics["images"]["validation"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of weights that transformers and `convert` both read")
    parser.add_argument("--data", required=True, help="folder with train and validation parquet, or a Hub data set")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--peer", help="run_image_classification.py of the transformers examples")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    record = output / "results.json"
    results = json.loads(record.read_text()) if record.is_file() else {}
    for name in [*args.modes, *(["peer"] if args.peer else [])]:
        if name not in results:
            folder = output / name
            times = timed(command_of(name, args, folder), output / f"{name}.log", args.threads)
            accuracy, n = accuracy_of(name, folder)
            results[name] = {"accuracy": accuracy, "images": n, **times}
            record.write_text(json.dumps(results, indent=2) + "\n")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "transformers", "peft"))
    print(f"{args.steps} steps of {args.batch_size} images, seed {args.seed}, {args.threads} thread(s), {packages}")
    print(f"{platform.machine()}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}\n")
    print("| run | top-1 | 95 % | seconds | processor seconds |\n|---|---:|---|---:|---:|")
    for name, result in results.items():
        low, high = wilson_interval(result["accuracy"], result["images"])
        print(
            f"| {name} | {result['accuracy']:.1%} | {low:.1%} to {high:.1%} | {result['seconds']:.0f} | "
            f"{result['processor_seconds']:.0f} |"
        )


if __name__ == "__main__":
    main()
