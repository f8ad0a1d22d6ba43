"""Compare linear segmentation and linear depth of a converted model and its source model on the same images.

    python benchmarks/dense_evidence.py --model ../shared/data/vit_tiny_patch16_224 --output runs/dense_evidence.json \
        --segmentation ../shared/data/camvid:11 ../shared/data/oxford_pets3:3 \
        --depth ../shared/data/depth_7scenes_kitchen

The mask values after a colon are ignored. Both models use the same protocol, steps and draws, so that only their
features differ. A constant prediction is the baseline. The intervals are over test images (2,000 resamples); the
interval of the difference is paired.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_regvit import convert
from hf_regvit.data.maps import DenseSource, check_targets, load_depth, load_masks
from hf_regvit.evaluation.dense_features import four_blocks, read_dense_features
from hf_regvit.evaluation.dense_heads import DepthSettings, SegmentationSettings, linear_depth, linear_segmentation
from hf_regvit.evaluation.intervals import STATISTICS, bootstrap_interval, paired_difference
from hf_regvit.evaluation.metrics import DepthErrors, MeanIoU
from hf_regvit.models.loading import open_model


def constant_segmentation(train: DenseSource, test: DenseSource) -> float:
    """Return the mean IoU of predicting the most frequent training class everywhere."""
    num_classes = len(train.class_names)
    counts = sum(np.bincount(mask[mask < num_classes], minlength=num_classes) for mask in train.targets)
    metric = MeanIoU(num_classes=num_classes)
    for mask in test.targets:
        metric.add(prediction=np.full(mask.shape, np.argmax(counts)), reference=mask.astype(np.int64))
    return metric.compute()["mean_iou"]


def constant_depth(train: DenseSource, test: DenseSource) -> dict[str, float]:
    """Return the errors of predicting the median training depth everywhere."""
    middle = float(np.median(np.concatenate([depth[depth > 0][::7] for depth in train.targets])))
    metric = DepthErrors(max_depth=train.format.max_depth)
    for depth in test.targets:
        metric.add(prediction=np.full(depth.shape, middle), reference=depth)
    return metric.compute()


def splits_of(load: Any, data: str, **options: Any) -> tuple[DenseSource, DenseSource]:
    train = load(data, split="train", **options)
    same = {"mask_format": train.format} if train.kind == "masks" else {}
    test = load(data, split="validation", **same)
    for part in (train, test):
        print(f"{data}: {check_targets(part).summary()}")
    return train, test


def segmentation(models: dict[str, Any], data: str, ignore: list[int], args: argparse.Namespace) -> dict[str, Any]:
    train, test = splits_of(load_masks, data, ignore_values=ignore or None)
    settings = SegmentationSettings(num_steps=args.segmentation_steps)
    results, rows = {}, {}
    for name, reader in models.items():
        parts = [read_dense_features(reader, part, image_size=args.image_size) for part in (train, test)]
        result = linear_segmentation(
            parts[0],
            train.targets,
            parts[1],
            test.targets,
            class_names=train.class_names,
            settings=settings,
            seed=args.seed,
        )
        rows[name] = result.rows
        interval = bootstrap_interval(rows[name], seed=args.seed, statistic=STATISTICS["mean_iou"])
        results[name] = result.to_dict() | {"interval": interval, "reading_seconds": [p.seconds for p in parts]}
        read = sum(part.seconds for part in parts)
        low, high = interval
        print(
            f"  {name:14} mIoU {100 * result.scores['mean_iou']:.2f} % [{100 * low:.1f}, {100 * high:.1f}], "
            f"pixels {100 * result.scores['overall_accuracy']:.2f} %, {result.seconds:.0f} s + {read:.0f} s reading"
        )
        print(f"  {result.protocol}")
    difference, interval = paired_difference(*rows.values(), seed=args.seed, statistic=STATISTICS["mean_iou"])
    constant = constant_segmentation(train, test)
    low, high = interval
    print(
        f"  difference {100 * difference:+.3f} [{100 * low:+.3f}, {100 * high:+.3f}]; constant {100 * constant:.1f} %"
    )
    return {"results": results, "difference": difference, "difference_interval": interval, "constant": constant}


def depth(models: dict[str, Any], data: str, args: argparse.Namespace) -> dict[str, Any]:
    train, test = splits_of(load_depth, data)
    settings = DepthSettings(num_steps=args.depth_steps)
    results, rows = {}, {}
    for name, reader in models.items():
        layers = four_blocks(reader.description.num_layers) if args.four_blocks else (-1,)
        options = {"layers": layers, "image_size": args.image_size}
        parts = [read_dense_features(reader, part, **options) for part in (train, test)]
        result = linear_depth(parts[0], train.targets, parts[1], test.targets, settings=settings, seed=args.seed)
        rows[name] = result.rows[:, 0]
        interval = bootstrap_interval(rows[name], seed=args.seed)
        results[name] = result.to_dict() | {"interval": interval, "reading_seconds": [p.seconds for p in parts]}
        read = sum(part.seconds for part in parts)
        print(
            f"  {name:14} RMSE {result.scores['rmse']:.4f} m [{interval[0]:.3f}, {interval[1]:.3f}], abs-rel "
            f"{result.scores['abs_rel']:.4f}, delta1 {result.scores['delta1']:.4f}, "
            f"{result.seconds:.0f} s + {read:.0f} s reading"
        )
        print(f"  {result.protocol}")
    difference, interval = paired_difference(*rows.values(), seed=args.seed)
    constant = constant_depth(train, test)
    print(
        f"  difference {difference:+.5f} m [{interval[0]:+.5f}, {interval[1]:+.5f}]; constant "
        f"{', '.join(f'{key} {value:.3f}' for key, value in constant.items())}"
    )
    return {"results": results, "difference": difference, "difference_interval": interval, "constant": constant}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--segmentation", nargs="*", default=[])
    parser.add_argument("--depth", nargs="*", default=[])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--segmentation_steps", type=int, default=SegmentationSettings().num_steps)
    parser.add_argument("--depth_steps", type=int, default=DepthSettings().num_steps)
    parser.add_argument("--four_blocks", action="store_true", help="Predict depth from four blocks (lin-4).")
    parser.add_argument(
        "--image_size", type=int, help="Shorter image side in pixels. Default: the model's image size."
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    source = open_model(args.model, device="cpu")
    converted = open_model(convert(args.model).eval(), processor=source.processor, device="cpu")
    models = {"source model": source, "RegViT": converted}
    report: dict[str, Any] = {"model": args.model, "seed": args.seed, "threads": torch.get_num_threads()}
    started = time.perf_counter(), time.process_time()
    for item in args.depth:
        report[f"depth {item}"] = depth(models, item, args)
    for item in args.segmentation:
        data, _, values = item.partition(":")
        ignore = [int(value) for value in values.split(",") if value]
        report[f"segmentation {item}"] = segmentation(models, data, ignore, args)
    report["seconds"], report["processor_seconds"] = time.perf_counter() - started[0], time.process_time() - started[1]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
