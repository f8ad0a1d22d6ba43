"""Compare pretraining of the same small ViT in hf_regvit and lightly-train, with and without registers.

Images, architecture, crops, batch size, number of steps, schedules and losses are the same; initialization and
implementation are those of each library. Every run uses one thread on one core, including data loading. The time is
processor time of training alone, which is independent of other load on the machine; `results.json` also contains wall
time. kNN and linear accuracy are measured afterwards with the same code on the teachers saved during training.

    python benchmarks/compare_pretraining.py --data FOLDER_OR_PARQUET --peer_python PEER_ENV/bin/python

Without `--peer_python` (an environment with lightly-train), only hf_regvit is run.
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
from queue import SimpleQueue

SETTINGS = {
    "global_size": 32, "local_size": 16, "locals": 2, "patch_size": 4, "width": 192, "depth": 4, "heads": 3,
    "global_scale": [0.4, 1.0], "local_scale": [0.15, 0.4], "blur_sigma": [0.1, 1.0], "blur": 3,
    "jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1},
    "prototypes": 1024, "head_width": 512, "bottleneck": 64, "momentum": 0.98,
    "learning_rate": 1e-3, "weight_decay": 0.04, "weight_decay_end": 0.1, "threads": 1,
}  # fmt: skip
POINTS = 4  # number of teachers saved during training, at equal intervals


def main() -> None:
    args = parse_args()
    if args.run:
        return run_ours(json.loads(args.run))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_pictures(args.data, args.output_dir / "pictures", args.max_images)
    save_at = [round(args.steps * (i + 1) / POINTS) for i in range(POINTS)]
    jobs = []
    for seed in args.seeds:
        for registers in args.registers:
            for side in ("hf_regvit", "lightly-train") if args.peer_python else ("hf_regvit",):
                folder = args.output_dir / f"{side}-r{registers}-s{seed}"
                settings = SETTINGS | {
                    "seed": seed, "registers": registers, "steps": args.steps, "save_at": save_at,
                    "batch_size": args.batch_size, "data": str(args.output_dir / "pictures"), "output": str(folder),
                }  # fmt: skip
                jobs.append((side, settings))
    cores = SimpleQueue()
    for core in args.cores:
        cores.put(core)
    with ThreadPoolExecutor(len(args.cores)) as pool:
        list(pool.map(lambda job: run_pinned(*job, args.peer_python, cores), jobs))
    untrained = evaluate_backbone(untrained_backbone(args.seeds[0]), args)
    results: list[dict] = []
    for side, settings in jobs:  # save after each run, because reading features takes long
        results.append(evaluate(side, settings, args))
        (args.output_dir / "results.json").write_text(json.dumps({"untrained": untrained, "runs": results}, indent=2))
    print_tables(untrained, results, args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="labeled images with a validation split: a folder or parquet files")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/compare"))
    parser.add_argument("--peer_python", help="python of an environment with lightly-train")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--registers", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--cores", type=int, nargs="+", default=sorted(os.sched_getaffinity(0)))
    parser.add_argument("--max_images", type=int, default=20000, help="maximum number of training images")
    parser.add_argument("--bank", type=int, default=5000, help="number of training images in the feature bank")
    parser.add_argument("--queries", type=int, default=2500, help="number of validation images")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_pictures(data: str, folder: Path, limit: int) -> None:
    """Write the PNG files that both libraries read."""
    from hf_regvit.data.loading import load_images

    if folder.is_dir():
        return
    folder.mkdir()
    source = load_images(data, split="train")
    for index in range(min(limit, len(source))):
        source[index].image.save(folder / f"{index:06d}.png")


def run_pinned(side: str, settings: dict, peer_python: str | None, cores: "SimpleQueue[int]") -> None:
    folder = Path(settings["output"])
    if (folder / "peer.json").is_file():
        return  # finished in an earlier call
    folder.mkdir(exist_ok=True)
    core = cores.get()
    if side == "hf_regvit":
        command = [sys.executable, __file__, "--run", json.dumps(settings)]
    else:
        command = [peer_python, str(Path(__file__).parent / "peers" / "lightly_dinov2.py"), json.dumps(settings)]
    print(f"{side} registers={settings['registers']} seed={settings['seed']} on core {core}", file=sys.stderr)
    try:
        with (folder / "log.txt").open("w") as log:
            subprocess.run(
                command,
                check=True,
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            )
    finally:
        cores.put(core)


def run_ours(settings: dict) -> None:
    import torch
    from transformers import TrainerCallback

    from hf_regvit import PretrainingArguments, __version__, pretrain

    torch.set_num_threads(settings["threads"])
    out = Path(settings["output"])

    class SaveTeacher(TrainerCallback):
        seconds, wall_seconds, saved = 0.0, 0.0, {}

        def on_train_begin(self, args, state, control, **kwargs):
            self.clocks = time.process_time(), time.perf_counter()

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step in settings["save_at"]:
                self.seconds += time.process_time() - self.clocks[0]
                self.wall_seconds += time.perf_counter() - self.clocks[1]
                name = f"teacher_{state.global_step:06d}"
                model.teacher_backbone.save_pretrained(out / name)
                self.saved[state.global_step] = {
                    "file": name, "seconds": self.seconds, "wall_seconds": self.wall_seconds
                }  # fmt: skip
                self.clocks = time.process_time(), time.perf_counter()

    save = SaveTeacher()
    pretrain(PretrainingArguments(output_dir=str(out / "run"), **our_arguments(settings)), callbacks=[save])
    (out / "peer.json").write_text(json.dumps({"saved": save.saved, "version": __version__}))


def our_arguments(settings: dict) -> dict:
    return dict(
        data=settings["data"], seed=settings["seed"], max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch_size"], save_strategy="no", report_to="none", disable_tqdm=True,
        monitor_steps=0, panel_steps=0,  # measured afterwards in the same way for both libraries
        preset="tiny", hidden_size=settings["width"], num_hidden_layers=settings["depth"],
        num_attention_heads=settings["heads"], patch_size=settings["patch_size"],
        num_register_tokens=settings["registers"], layerscale_value=1.0, register_init_std=1.0,
        global_crop_size=settings["global_size"], local_crop_size=settings["local_size"],
        num_local_crops=settings["locals"], global_crop_scale=settings["global_scale"],
        local_crop_scale=settings["local_scale"], **settings["jitter"], blur_kernel_size=settings["blur"],
        blur_sigma=settings["blur_sigma"], solarize_probability=0.0,
        head_num_prototypes=settings["prototypes"], head_hidden_size=settings["head_width"],
        head_bottleneck_size=settings["bottleneck"],
        warmup_teacher_temperature=0.04, teacher_temperature=0.04, teacher_momentum=settings["momentum"],
        learning_rate=settings["learning_rate"], learning_rate_reference_batch=0,
        weight_decay=settings["weight_decay"], weight_decay_end=settings["weight_decay_end"],
        layer_decay=1.0, patch_embed_lr_multiplier=1.0,
    )  # fmt: skip


def evaluate(side: str, settings: dict, args: argparse.Namespace) -> dict:
    from hf_regvit import RegViTModel, convert

    folder = Path(settings["output"])
    peer = json.loads((folder / "peer.json").read_text())
    curve = []
    for step, entry in sorted(peer["saved"].items(), key=lambda item: int(item[0])):
        if side == "hf_regvit":
            backbone = RegViTModel.from_pretrained(folder / entry["file"])
        else:
            backbone = convert(
                folder / entry["file"], num_attention_heads=settings["heads"], layer_norm_eps=1e-6,
                interpolate_antialias=True, interpolate_offset=0.0,
            )  # fmt: skip
        curve.append({"step": int(step), **entry, **evaluate_backbone(backbone, args)})
    return {"side": side, "registers": settings["registers"], "seed": settings["seed"], "curve": curve,
            "version": peer["version"]}  # fmt: skip


def untrained_backbone(seed: int):
    import torch

    from hf_regvit import PretrainingArguments, RegViTModel

    settings = SETTINGS | {"seed": seed, "registers": 4, "steps": 1, "batch_size": 2, "data": "photos"}
    torch.manual_seed(seed)
    return RegViTModel(PretrainingArguments(**our_arguments(settings)).backbone_config()).eval()


def evaluate_backbone(backbone, args: argparse.Namespace) -> dict[str, float]:
    """Return the accuracy of 20-NN (cosine) and of logistic regression on CLS and mean patch, concatenated."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    from hf_regvit.data.loading import load_images
    from hf_regvit.evaluation.knn import knn_accuracy
    from hf_regvit.models.processing import default_image_processor
    from hf_regvit.pretraining.monitors import backbone_features

    size = SETTINGS["global_size"]
    processor = default_image_processor(size, resize=size)
    features, labels = [], []
    for split, limit in (("train", args.bank), ("validation", args.queries)):
        source = load_images(args.data, split=split)
        source = source.subset(range(min(limit, len(source))))
        pictures = [source[i].image for i in range(len(source))]
        with torch.inference_mode():
            features.append(backbone_features(backbone.eval(), pictures, image_processor=processor))
        labels.append(torch.tensor(source.labels))
    knn = knn_accuracy(features[0], labels[0], features[1], labels[1], k=(20,))[20]
    scaler = StandardScaler().fit(features[0].numpy())
    bank, queries = (scaler.transform(part.numpy()) for part in features)
    probe = LogisticRegression(C=0.01, max_iter=200).fit(bank, labels[0].numpy())
    return {"knn": knn, "linear": float(probe.score(queries, labels[1].numpy()))}


def print_tables(untrained: dict, results: list[dict], args: argparse.Namespace) -> None:
    import torch

    print(
        f"{platform.machine()}, one core per run, torch {torch.__version__}, {args.steps} steps of {args.batch_size}"
    )
    print(f"untrained: 20-NN {untrained['knn']:.1%}, linear {untrained['linear']:.1%}\n")
    print("| library | registers | seed | step | CPU seconds | 20-NN | linear |\n|---|---|---|---|---|---|---|")
    for run in results:
        for point in run["curve"]:
            print(
                f"| {run['side']} {run['version']} | {run['registers']} | {run['seed']} | {point['step']} | "
                f"{point['seconds']:.0f} | {point['knn']:.1%} | {point['linear']:.1%} |"
            )
    print()
    for side in dict.fromkeys(run["side"] for run in results):
        for registers in args.registers:
            last = [run["curve"][-1] for run in results if (run["side"], run["registers"]) == (side, registers)]
            mean = {key: statistics.mean(point[key] for point in last) for key in ("seconds", "knn", "linear")}
            print(
                f"{side}, {registers} registers, {len(last)} seeds: {mean['seconds']:.0f} CPU s, "
                f"20-NN {mean['knn']:.1%}, linear {mean['linear']:.1%}"
            )


if __name__ == "__main__":
    main()
