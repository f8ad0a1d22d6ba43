"""Compare block, views and image size of patch features before and after a retrofit, on a half not used to choose.

    python benchmarks/dense_features.py --model ../shared/data/vit_tiny_patch16_224 --data ../shared/data/camvid \
        --ignore 11 --image_sizes 224 448 --register_neurons 7:417 6:189 --output_dir runs/dense_features

Ridge probes as in `regvit dense`, on the same halves. Each model chooses on one half of the test images; scores and
differences are those of the other half, with paired 95 % intervals over its images (2,000 resamples). `rows.npz` in
the output folder has the values of every image, and `results.json` the tables.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from hf_regvit import FeatureSettings, add_test_time_registers, convert, open_model
from hf_regvit.data.maps import load_depth, load_masks
from hf_regvit.evaluation.dense_features import probe_rows
from hf_regvit.evaluation.intervals import STATISTICS, bootstrap_interval, paired_difference
from hf_regvit.models.results import markdown_table
from hf_regvit.models.saving import write_json

Key = tuple[str, int, int, int]  # model, views, image size, block


def read_all(args: argparse.Namespace) -> dict[Key, np.ndarray]:
    """Return the rows of the probes of every model, number of views, image size and block."""
    load = load_masks if args.task == "segmentation" else load_depth
    options = {"ignore_values": args.ignore} if args.task == "segmentation" and args.ignore else {}
    train = load(args.data, split="train", **options)
    same = {"mask_format": train.format} if train.kind == "masks" else {}
    test = load(args.data, split="validation", **same)
    if args.max_train is not None:
        train = train.subset(range(args.max_train))
    models = {"original": convert(args.model)}
    if args.register_neurons:
        neurons = [[int(part) for part in one.split(":")] for one in args.register_neurons]
        models["4 test-time registers"] = add_test_time_registers(convert(args.model), neurons, num_register_tokens=4)
    print(f"{len(train)} training and {len(test)} test images", flush=True)
    rows: dict[Key, np.ndarray] = {}
    for size in args.image_sizes:
        for views in args.views:
            for name, model in models.items():
                reader = open_model(model.eval(), processor=open_model(args.model).processor)
                settings = FeatureSettings(-1, views, size, size > min(reader.description.image_size))
                blocks = range(1, reader.description.num_layers + 1)
                found, seconds = probe_rows(reader, train, test, blocks, settings, args.batch_size)
                rows |= {(name, views, size, block): found[block] for block in blocks}
                print(f"{name}, {views} views, {size} pixels: {seconds:.2f} s per test image", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", choices=["segmentation", "depth"], default="segmentation")
    parser.add_argument("--ignore", type=int, nargs="*")
    parser.add_argument("--views", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--image_sizes", type=int, nargs="+", default=[224])
    parser.add_argument("--max_train", type=int)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--register_neurons", nargs="*", default=[], help="Block:neuron, blocks counted from 0.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    rows = read_all(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.output_dir / "rows.npz", **{" | ".join(map(str, key)): row for key, row in rows.items()})

    order = np.random.default_rng(args.seed).permutation(len(next(iter(rows.values()))))
    choice, tested = order[: len(order) // 2], order[len(order) // 2 :]
    statistic = STATISTICS["mean_iou" if args.task == "segmentation" else "mean"]
    sign = 1 if args.task == "segmentation" else -1

    def best(keys: list[Key]) -> Key:
        return max(keys, key=lambda key: sign * statistic(rows[key][choice]))

    models, last = list(dict.fromkeys(key[0] for key in rows)), max(key[3] for key in rows)
    default = (models[0], args.views[0], args.image_sizes[0], last)
    shown = [(m, v, s, last) for m in models for s in args.image_sizes for v in args.views]
    shown += [best([k for k in rows if k[:3] == key[:3]]) for key in shown]
    chosen = {model: best([key for key in rows if key[0] == model]) for model in models}
    table: list[list[object]] = [
        ["model", "views", "size", "block", "choice half", "test half", "95 %", "minus default", "95 %", "chosen"]
    ]
    for key in sorted(set(shown), key=lambda k: (models.index(k[0]), k[2], k[1], k[3])):
        scores = statistic(rows[key][choice]), statistic(rows[key][tested])
        interval = bootstrap_interval(rows[key][tested], seed=args.seed, statistic=statistic)
        gain = paired_difference(rows[default][tested], rows[key][tested], seed=args.seed, statistic=statistic)
        cells = [*scores, interval, gain[0], gain[1]]
        table.append([*key, *(np.round(cell, 4).tolist() for cell in cells), key == chosen[key[0]]])
    print(f"{len(choice)} images for the choice, {len(tested)} test images\n{markdown_table(table)}")
    if len(models) > 1:
        for key in dict.fromkeys(
            k[1:] for k in [*shown, *chosen.values()] if k[0] == models[0] or k in chosen.values()
        ):
            pair = (rows[(model, *key)][tested] for model in models)
            difference, (low, high) = paired_difference(*pair, seed=args.seed, statistic=statistic)
            print(f"{models[1]} minus original, views, size, block {key}: {difference:+.4f} [{low:+.4f}, {high:+.4f}]")
    write_json(args.output_dir / "results.json", {"table": table, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
