"""Run all checks that need a GPU: correctness, speed of inference and training, and real runs.

    python benchmarks/gpu_evidence.py --output_dir OUT --data ../shared/data/tiny_imagenet_100
    python benchmarks/gpu_evidence.py --output_dir OUT --stages correctness step      # short
    python benchmarks/gpu_evidence.py --output_dir OUT --device cpu --rehearsal       # smallest sizes, for a test

Every command runs in a new process with a time limit, so that a failure does not affect the others. The stages are:

- `correctness`: `pytest -m gpu`.
- `inference`: speed of RegViT, transformers and timm for sizes S, B and L, 224 and 518 pixels, batch sizes 1 and 8,
  float32 and bfloat16.
- `step`: the pretraining step of ViT-S, B and L at 2 x 224 + 8 x 98 compared with the official one: images/s, share of
  the measured peak of matrix products, memory; then again with compiled blocks.
- `runs`: the recipe `examples/small_data_one_gpu.yaml` at 64 pixels on `--data`, with 0 and 4 registers, and the kNN
  and linear accuracy of both compared with an untrained network.

Writes a log per command, and `summary.md` with commands, seconds, exit codes and tables. The package must be on the
path (`PYTHONPATH=src`); parquet data needs `datasets`, and accuracies need `evaluate`.
"""

import argparse
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("correctness", "inference", "step", "runs")
# Save an untrained backbone of the same architecture as the last run, with its processor.
UNTRAINED = """
import sys
import torch
from transformers import AutoImageProcessor
from hf_regvit import RegViTConfig, RegViTModel
torch.manual_seed(0)
RegViTModel(RegViTConfig.from_pretrained(sys.argv[1])).save_pretrained(sys.argv[2])
AutoImageProcessor.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""


@dataclass(frozen=True)
class Command:
    """Command to run: the name of its log, and its arguments after `python`."""

    name: str
    arguments: list[str]


def main() -> int:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    summary = [f"# GPU evidence\n\n{environment(args.device)}\n"]
    failed = 0
    for stage in args.stages:
        for command in commands(stage, args):
            code, seconds, log = run(command, args)
            failed += code != 0
            text = " ".join(shlex.quote(" ".join(word.split())) for word in command.arguments)
            summary.append(f"## {command.name}\n`python {text}`: exit code {code}, {seconds:.0f} s\n\n{tail(log)}\n")
            # Written after each command, because the machine may become unavailable at any time.
            (args.output_dir / "summary.md").write_text("\n".join(summary))
            print(f"{command.name}: exit code {code}, {seconds:.0f} s, {log}", flush=True)
    return 1 if failed else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--data", help="labeled images with train and validation splits, for `runs`")
    parser.add_argument("--steps", type=int, default=2000, help="steps of each run, with 256 images each")
    parser.add_argument("--registers", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of a command in minutes")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--rehearsal", action="store_true", help="use the smallest sizes, to check that every command runs"
    )
    args = parser.parse_args()
    args.output_dir = args.output_dir.resolve()  # commands run in the root of the repository
    if args.data and Path(args.data).exists():
        args.data = str(Path(args.data).resolve())
    if "runs" in args.stages and not args.data:
        parser.error("The stage 'runs' requires --data.")
    return args


def commands(stage: str, args: argparse.Namespace) -> list[Command]:
    """Return the commands of a stage in order."""
    tiny = args.rehearsal
    if stage == "correctness":
        return [Command("correctness", ["-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests" / "gpu")])]
    if stage == "inference":
        cases = ["--models", "small", "--sizes", "224", "--batches", "1", "--dtypes", "float32", "--seconds", "2"]
        if not tiny:
            cases = ["--models", "small", "base", "large", "--dtypes", "float32", "bfloat16", "--seconds", "8"]
        script = str(ROOT / "scripts" / "bench_inference.py")
        return [Command("inference", [script, "--device", args.device, *cases])]
    if stage == "step":
        script = str(ROOT / "scripts" / "bench_pretraining.py")
        sizes = ["--presets", "tiny", "--images", "2", "--prototypes", "512", "--rounds", "1", "--no_memory"]
        if not tiny:
            sizes = ["--presets", "small", "base", "large", "--patch_size", "14", "--local_size", "98"]
            sizes += ["--images", "64"]
        base = [script, "--device", args.device, "--dtype", "float32" if args.device == "cpu" else "bfloat16", *sizes]
        return [Command("step", base), Command("step_compiled", [*base, "--compile", "--systems", "regvit"])]
    return run_commands(args)


def run_commands(args: argparse.Namespace) -> list[Command]:
    """Return the commands that pretrain with each number of registers and evaluate all backbones."""
    size = ["--global_crop_size", "64", "--local_crop_size", "32", "--max_steps", str(args.steps)]
    if args.rehearsal:
        size = ["--global_crop_size", "32", "--local_crop_size", "16", "--max_steps", "2", "--bf16", "false"]
        size += ["--preset", "tiny", "--per_device_train_batch_size", "4", "--head_num_prototypes", "64"]
        size += ["--dataloader_num_workers", "0", "--use_cpu", "true"]
    recipe = str(ROOT / "examples" / "small_data_one_gpu.yaml")
    found, folders = [], []
    for count in args.registers:
        folder = args.output_dir / f"registers_{count}"
        folders.append(str(folder / "backbone"))
        options = ["--config", recipe, "--data", args.data, "--output_dir", str(folder)]
        options += ["--num_register_tokens", str(count), *size]
        found.append(Command(f"pretrain_{count}", ["-m", "hf_regvit", "pretrain", *options]))
    folders.append(str(args.output_dir / "untrained"))
    found.append(Command("untrained", ["-c", UNTRAINED, *folders[-2:]]))
    options = [word for folder in folders for word in ("--model", folder)]
    options += ["--data", args.data, "--tasks", "knn", "linear"]
    options += ["--device", args.device, "--output_dir", str(args.output_dir / "evaluation")]
    if args.rehearsal:
        options += ["--max_images", "600", "--linear_steps", "20"]
    return [*found, Command("evaluate", ["-m", "hf_regvit", "evaluate", *options])]


def run(command: Command, args: argparse.Namespace) -> tuple[int, float, Path]:
    """Run a command and return its exit code (124: timeout), seconds and log file."""
    log = args.output_dir / f"{command.name}.log"
    environment = os.environ | {"REGVIT_GPU_TEST_DEVICE": args.device}
    start = time.perf_counter()
    with log.open("w") as file:
        try:
            done = subprocess.run(
                [sys.executable, *command.arguments],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=60 * args.minutes,
                check=False,
            )
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = 124
    return code, time.perf_counter() - start, log


def tail(log: Path, lines: int = 60) -> str:
    """Return the end of a log without overwritten progress bars."""
    kept = [line.rsplit("\r", 1)[-1] for line in log.read_text(errors="replace").splitlines()]
    return "\n".join([line for line in kept if line.strip()][-lines:])


def environment(device: str) -> str:
    """Return hardware and versions as text."""
    import torch
    import transformers

    name = platform.processor() or platform.machine()
    if device == "cuda" and torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    return (
        f"{name}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


if __name__ == "__main__":
    sys.exit(main())
