"""Compare continued pretraining with its starting model and with training from scratch, in equal processor time.

    python benchmarks/compare_continuation.py --data FOLDER_WITH_PARQUET_FILES --minutes 6

The start of each seed is trained on the images of one half of the classes. All parameters, and low-rank updates, are
then continued on the images of the other half; a third run starts from random weights. All use the same recipe
(`examples/own_images_cpu.yaml` with small crops), one thread and the same processor time, data loading included: the
time of a step is measured first, and the number of steps follows from it. Continued runs have the defaults of
`--init_from`, except for what a few hundred steps need: the learning rate and the momentum of the teacher. k-NN and
linear accuracy are those of `regvit evaluate` on the other half, and the agreement of patches is that of the monitors.
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
ARMS = ("start", "full", "lora", "scratch")
CALIBRATION_STEPS = 12
# Options of the arms besides those of the recipe. None takes the default of a continued run.
CONTINUED = {"learning_rate_reference_batch": 0, "weight_decay_end": None, "layer_decay": 0.9}
OPTIONS = {
    "start": {}, "scratch": {}, "full": {**CONTINUED, "learning_rate": 1e-4},
    "lora": {**CONTINUED, "learning_rate": 1e-3, "mode": "lora"},
}  # fmt: skip


def main() -> None:
    args = parse_args()
    if args.run:
        return run(json.loads(args.run))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    halves = split_classes(args.data, args.output_dir)
    common = {"minutes": args.minutes, "size": args.global_crop_size, "max_images": args.max_images, "halves": halves}
    results = []
    for arms in (ARMS[:1], ARMS[1:]):  # the start of a seed has to be there before it is continued
        jobs = [
            common | {"arm": arm, "seed": seed, "folder": str(args.output_dir / f"{arm}-{seed}")}
            for seed in args.seeds for arm in arms
        ]  # fmt: skip
        with ThreadPoolExecutor(args.parallel) as pool:
            results += pool.map(run_alone, jobs)
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2))
    print_table(results)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.parquet and validation.parquet")
    parser.add_argument("--minutes", type=float, default=6.0, help="processor time of a run")
    parser.add_argument("--max_images", type=int, default=4000, help="images of the evaluation")
    parser.add_argument("--global_crop_size", type=int, default=32, help="local crops are half as large")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/continuation"))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    return parser.parse_args()


def split_classes(data: Path, folder: Path) -> list[str]:
    """Write the images of even and of odd class ids to two folders of parquet files, with new class ids."""
    from datasets import ClassLabel, load_dataset

    halves = [folder / f"half{rest}" for rest in (0, 1)]
    for split in ("train", "validation"):
        table = load_dataset("parquet", data_files=str(data / f"{split}.parquet"), split="train")
        names = table.features["label"].names
        for rest, half in enumerate(halves):
            kept = table.filter(lambda label, rest=rest: label % 2 == rest, input_columns="label")
            kept = kept.map(lambda row: {"label": row["label"] // 2}, features=kept.features.copy())
            kept = kept.cast_column("label", ClassLabel(names=names[rest::2]))
            half.mkdir(exist_ok=True)
            kept.to_parquet(half / f"{split}.parquet")
    return [str(half) for half in halves]


def run_alone(job: dict) -> dict:
    """Train and evaluate in a new process with one thread; a finished job is read from its folder."""
    result = Path(job["folder"]) / "result.json"
    if not result.is_file():
        result.parent.mkdir(parents=True, exist_ok=True)
        with (result.parent / "log.txt").open("w") as log:
            subprocess.run(
                [sys.executable, __file__, "--run", json.dumps(job)], check=True, stdout=log, stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
    return json.loads(result.read_text())


def run(job: dict) -> None:
    import torch

    from hf_regvit import evaluate_backbone, load_images, open_model
    from hf_regvit.pretraining.comparison import _tokens, mirror_agreement

    torch.set_num_threads(1)
    folder = Path(job["folder"])
    step = statistics.median(train(job, folder / "calibration", CALIBRATION_STEPS)[2:])
    steps = round(60 * job["minutes"] / step)
    spent = train(job, folder / "run", steps)
    model = str(folder / "run" / "backbone")
    report = evaluate_backbone(model, job["halves"][1], tasks=("knn", "linear"), max_images=job["max_images"])
    scores = {f"{score.name} {score.metric}": score.value for score in report.scores}
    reader, images = open_model(model, device="cpu"), load_images(job["halves"][1], split="validation")
    transform = reader.transform_for()
    pixels = torch.stack([transform(images[index].image) for index in range(0, len(images), len(images) // 64)])
    patches, mirrored = _tokens(reader, pixels)[1], _tokens(reader, pixels.flip(-1))[1]
    side = round(patches.shape[1] ** 0.5)
    scores["patch agreement"] = mirror_agreement(patches, mirrored, (side, side))
    result = job | {"scores": scores, "steps": steps, "step_seconds": sum(spent) / len(spent)}
    (folder / "result.json").write_text(json.dumps(result))


def train(job: dict, folder: Path, steps: int) -> list[float]:
    """Run a number of steps; return the processor time of each in seconds."""
    import yaml
    from transformers import TrainerCallback

    from hf_regvit import PretrainingArguments, pretrain

    class Times(TrainerCallback):
        def __init__(self):
            self.ends = []

        def on_step_end(self, args, state, control, **kwargs):
            self.ends.append(time.process_time())

    recipe = yaml.safe_load((ROOT / "examples" / "own_images_cpu.yaml").read_text()) | OPTIONS[job["arm"]]
    recipe |= {"global_crop_size": job["size"], "local_crop_size": job["size"] // 2}
    recipe |= {"data": job["halves"][job["arm"] != "start"], "seed": job["seed"], "output_dir": str(folder)}
    if job["arm"] in ("full", "lora"):
        recipe["init_from"] = str(Path(job["folder"]).parent / f"start-{job['seed']}" / "run")
    recipe |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "dataloader_num_workers": 0}
    recipe |= {"monitor_steps": 0, "panel_steps": 0, "knn_steps": 0, "use_cpu": True, "max_steps": steps}
    times = Times()
    pretrain(PretrainingArguments(**recipe), callbacks=[times])
    return [end - start for start, end in zip(times.ends, times.ends[1:])]


def print_table(results: list[dict]) -> None:
    names = list(results[0]["scores"])
    print(f"| arm | seed | steps | CPU seconds a step | {' | '.join(names)} |\n|{'---|' * (4 + len(names))}")
    for result in results:
        values = " | ".join(f"{100 * result['scores'][name]:.1f}" for name in names)
        print(f"| {result['arm']} | {result['seed']} | {result['steps']} | {result['step_seconds']:.2f} | {values} |")
    for name in names:
        mean = {arm: statistics.mean(r["scores"][name] for r in results if r["arm"] == arm) for arm in ARMS}
        print(f"{name}: {', '.join(f'{arm} {100 * value:.1f}' for arm, value in mean.items())}")


if __name__ == "__main__":
    main()
