"""Compare the optional objectives of pretraining with the control on the data of `make demo`, in equal steps.

    nice -n 10 python benchmarks/compare_objectives.py --steps 80 --batch 16

Every arm is the recipe of the demo (`examples/photos_cpu.yaml`) with one option changed, and with fewer steps and
images per step. Data, crops, masks and first weights depend on the seed alone, so arms differ only in their objective.
Every run uses one thread; its processor time, data loading included, is measured beside the steps, because the options
cost different amounts. Scores of the exported backbone on the held-out tiles:

- 10-NN and linear: the image a tile was cut from, by CLS and mean patch as in the demo; the linear classifier is a
  logistic regression (C = 0.01) on standardized features;
- patch 10-NN: the same of single patches, with a bank of patches of training tiles;
- mirror: the share of patches whose most similar patch in the flipped tile shows the same place.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARMS = {
    "control": {},
    "visible patches": {"ibot_visible_patches": True},
    "heads only": {"average_heads_only": True},
    "PaKA": {"paka_loss_weight": 1.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=16, help="images per step; 32 in the demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/objectives"))
    args = parser.parse_args()
    jobs = [(arm, seed, args.steps, args.batch, args.output_dir) for seed in args.seeds for arm in ARMS]
    with ProcessPoolExecutor(args.parallel, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(run, *zip(*jobs)))
    print_tables(results)


def run(arm: str, seed: int, steps: int, batch: int, output_dir: Path) -> dict:
    """Train and measure one arm with one seed; a finished run is read from its folder."""
    import torch
    import yaml

    from hf_regvit import PretrainingArguments, pretrain

    folder = output_dir / f"{arm.replace(' ', '_')}-{seed}"
    if (folder / "result.json").is_file():
        return json.loads((folder / "result.json").read_text())
    torch.set_num_threads(1)
    recipe = yaml.safe_load((ROOT / "examples" / "photos_cpu.yaml").read_text()) | ARMS[arm]
    recipe |= {"seed": seed, "max_steps": steps, "per_device_train_batch_size": batch, "output_dir": str(folder)}
    recipe |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    recipe |= {"monitor_steps": 0, "panel_steps": 0, "knn_steps": 0, "dataloader_num_workers": 0}
    start = time.process_time()
    pretrain(PretrainingArguments(**recipe))
    seconds = (time.process_time() - start) / steps
    result = {"arm": arm, "seed": seed, "seconds": seconds, "scores": scores_of(folder / "backbone")}
    (folder / "result.json").write_text(json.dumps(result, indent=2))
    return result


def scores_of(backbone: Path) -> dict[str, float]:
    """Return the scores of a backbone on the held-out tiles."""
    import torch
    from PIL import ImageOps
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from transformers import AutoImageProcessor

    from hf_regvit import RegViTModel, load_images
    from hf_regvit.evaluation.knn import knn_accuracy
    from hf_regvit.pretraining.comparison import mirror_agreement

    model, processor = RegViTModel.from_pretrained(backbone).eval(), AutoImageProcessor.from_pretrained(backbone)

    @torch.inference_mode()
    def read(images: list) -> tuple:
        pixels = processor(images, return_tensors="pt").pixel_values
        outputs = [model(some) for some in pixels.split(64)]
        return torch.cat([o.pooler_output for o in outputs]), torch.cat([o.patch_tokens for o in outputs])

    parts = [load_images("photos", split=name) for name in ("train", "validation")]
    images = [[part[i].image for i in range(len(part))] for part in parts]
    labels = [torch.tensor(part.labels) for part in parts]
    (cls, patches), (test_cls, test_patches) = (read(of_part) for of_part in images)
    bank, test = (
        torch.cat([one, of_patches.mean(1)], 1) for one, of_patches in ((cls, patches), (test_cls, test_patches))
    )
    scale = StandardScaler().fit(bank)
    linear = LogisticRegression(C=0.01, max_iter=1000).fit(scale.transform(bank), labels[0])
    few, few_labels = [], []
    for of_patches, of_tiles, count in ((patches, labels[0], 4), (test_patches, labels[1], 2)):  # at random places
        draw = torch.rand(of_patches.shape[:2], generator=torch.Generator().manual_seed(0)).argsort(1)[:, :count]
        few.append(of_patches.gather(1, draw[..., None].expand(-1, -1, of_patches.shape[2])).flatten(0, 1))
        few_labels.append(of_tiles.repeat_interleave(count))
    mirrored = read([ImageOps.mirror(image) for image in images[1][::2]])[1]
    grid = (round(mirrored.shape[1] ** 0.5),) * 2
    return {
        "10-NN": knn_accuracy(bank, labels[0], test, labels[1], k=(10,))[10],
        "linear": float(linear.score(scale.transform(test), labels[1])),
        "patch 10-NN": knn_accuracy(few[0], few_labels[0], few[1], few_labels[1], k=(10,))[10],
        "mirror": mirror_agreement(test_patches[::2], mirrored, grid),
    }


def print_tables(results: list[dict]) -> None:
    """Print the scores of every run, then the mean of each arm and its gain over the control, seed by seed."""
    names = list(results[0]["scores"])
    print(f"| arm | seed | CPU seconds a step | {' | '.join(names)} |\n|---|---|---:{'|---:' * len(names)}|")
    for one in results:
        shown = " | ".join(f"{100 * one['scores'][name]:.1f} %" for name in names)
        print(f"| {one['arm']} | {one['seed']} | {one['seconds']:.2f} | {shown} |")
    control = {one["seed"]: one["scores"] for one in results if one["arm"] == "control"}
    for arm in ARMS:
        runs = [one for one in results if one["arm"] == arm]
        for name in names:
            values = [100 * one["scores"][name] for one in runs]
            gains = ", ".join(f"{100 * (one['scores'][name] - control[one['seed']][name]):+.1f}" for one in runs)
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"{arm}, {name}: {statistics.mean(values):.1f} (standard deviation {spread:.1f}); gains {gains}")


if __name__ == "__main__":
    main()
