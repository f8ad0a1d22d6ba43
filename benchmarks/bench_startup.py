"""Measure how long importing the package and asking the command line for help take.

    python benchmarks/bench_startup.py --rounds 7
    python benchmarks/bench_startup.py --commands "trl --help" "yolo help" # programs to compare with, in the same run

Every line is measured in fresh processes, in turn, so that a busy machine slows all of them alike. The limits: `import
hf_regvit` takes at most 10 % longer than importing a model of transformers, and `regvit --help` and a mistyped command
take less than 0.5 s of processor time.
"""

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

# The entry point of the installed command; `python -m hf_regvit` imports the package, and with it torch, first.
CLI = "import sys; from hf_regvit_cli import main; sys.exit(main())"
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "transformers.Dinov2Model": ["-c", "from transformers import Dinov2Model"],
    "import hf_regvit": ["-c", "import hf_regvit"],
    "regvit --help": ["-c", CLI, "--help"],
    "regvit --version": ["-c", CLI, "--version"],
    "regvit pretrian": ["-c", CLI, "pretrian"],
}


def seconds(arguments: list[str]) -> tuple[float, float]:
    """Return processor time and wall time of a fresh process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(arguments, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="Number of processes per line.")
    parser.add_argument("--json", help="File for the results.")
    parser.add_argument("--commands", nargs="*", default=[], help="Commands of other programs, one string each.")
    args = parser.parse_args()
    commands = {name: [sys.executable, *command] for name, command in COMMANDS.items()}
    commands |= {Path(command).name: shlex.split(command) for command in args.commands}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for round_ in range(args.rounds + 1):
        for name, command in commands.items():
            measured = seconds(command)
            if round_:  # the first round fills the caches of the disk
                found[name].append(measured)
    median = {name: [statistics.median(values) for values in zip(*pairs)] for name, pairs in found.items()}
    for name, (processor, wall) in median.items():
        print(f"{name:26} {processor:6.2f} s of processor time, {wall:6.2f} s in all")
    ratio = median["import hf_regvit"][0] / median["transformers.Dinov2Model"][0]
    print(f"import hf_regvit / transformers.Dinov2Model: {ratio:.2f} (at most 1.10)")
    if args.json:
        result = {"median": median, "ratio": ratio, "rounds": args.rounds}
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
