"""Evaluate LOST on a real model, with settings selected on one half of a data set and tested on the other.

    python benchmarks/lost_evidence.py --model ../shared/data/vit_tiny_patch16_224 --data ../shared/data/coco_boxes \
        ../shared/data/oxford_pets3 --output runs/lost_evidence.json

Every setting runs once on every image, and both directions share the results. In the combined score, every image
counts once, with the settings selected on the other half. 288 settings take about one second per image of 480 x 360
pixels on one core. `--chosen_by OUTPUT` instead tests this model with the settings that an earlier run chose for
another one, each on the half that was not used to choose. `--image_size` and `--views` read the features as
`regvit evaluate --dense_settings` does.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from hf_regvit import FeatureSettings
from hf_regvit.data.loading import load_images
from hf_regvit.evaluation.intervals import bootstrap_interval, paired_difference
from hf_regvit.evaluation.lost import AttentionSettings, LostSettings, Method
from hf_regvit.evaluation.object_discovery import (
    Overlaps,
    choose,
    ground_truth_boxes,
    halves,
    images_with_boxes,
    measure_overlaps,
    score_methods,
)
from hf_regvit.evaluation.patch_tasks import Lost
from hf_regvit.models.loading import open_model


def percent(value: float, interval: Sequence[float]) -> str:
    return f"{100 * value:5.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def part_of(table: Overlaps, images: list[int], methods: Sequence[Method]) -> Overlaps:
    """Return the overlaps of some images and methods."""
    columns = [table.methods.index(method) for method in methods]
    return replace(
        table,
        methods=tuple(methods),
        ids=tuple(table.ids[i] for i in images),
        iou=table.iou[images][:, columns],
        degenerate=table.degenerate[images][:, columns],
        sizes=tuple(table.sizes[i] for i in images),
        truth=tuple(table.truth[i] for i in images),
    )


def judge(table: Overlaps, chosen_on: list[int], judged_on: list[int], seed: int) -> dict:
    """Select and test settings in one direction, as `evaluate_lost` does."""
    choice = choose(part_of(table, chosen_on, table.methods))
    scores = score_methods(part_of(table, judged_on, choice.methods), center=choice.center, seed=seed)
    return {"choice": choice.to_dict(), "images": judged_on, "scores": {k: asdict(v) for k, v in scores.items()}}


def both_directions(table: Overlaps, seed: int) -> dict:
    first, second = halves(len(table.ids), seed=seed)
    directions = [judge(table, first, second, seed), judge(table, second, first, seed)]
    together = {}
    lost = np.concatenate([d["scores"]["lost"]["overlaps"] for d in directions]) >= 0.5
    for name in directions[0]["scores"]:
        hits = np.concatenate([d["scores"][name]["overlaps"] for d in directions]) >= 0.5
        ahead = lost.astype(float) - hits
        together[name] = {
            "corloc": float(hits.mean()),
            "interval": bootstrap_interval(hits.astype(float), seed=seed),
            "ahead": float(ahead.mean()),
            "ahead_interval": bootstrap_interval(ahead, seed=seed),
        }
    return {"directions": directions, "together": together}


def show(name: str, table: Overlaps, result: dict) -> None:
    print(f"\n{name}: {len(table.ids)} images")
    for number, direction in enumerate(result["directions"], 1):
        print(
            f" direction {number}, {len(direction['images'])} test images; selected: {direction['choice']['best'][0]}"
        )
        for key, score in direction["scores"].items():
            weak = f"; no distinct seed in {score['num_degenerate']} images" if score["num_degenerate"] else ""
            print(f"  {key:11} {percent(score['corloc'], score['interval'])}  {score['method']}{weak}")
    print(" both directions combined, and the advantage of the selected settings")
    for key, score in result["together"].items():
        ahead = percent(score["ahead"], score["ahead_interval"])
        print(f"  {key:11} {percent(score['corloc'], score['interval'])}   {ahead}")


def parsed(text: str) -> LostSettings:
    """Return the settings that `str` has written."""
    values = dict(part.split("=") for part in text.split())
    kinds = {"layer": int, "k": int, "bias": float, "l2norm": lambda value: value == "True"}
    return LostSettings(**{name: kinds.get(name, str)(value) for name, value in values.items()})


def score_chosen(table: dict, measure: Callable[[list[int], LostSettings], Overlaps], seed: int) -> None:
    """Print the CorLoc with the settings chosen for another model, and the difference from that model."""
    before, after = [], []
    for direction in table["directions"]:
        found = measure(direction["images"], parsed(direction["choice"]["best"][0]["settings"]))
        before += [float(overlap >= 0.5) for overlap in direction["scores"]["lost"]["overlaps"]]
        after += (found.iou[:, 0] >= 0.5).astype(float).tolist()
    hits = np.array(after)[:, None]
    difference, interval = paired_difference(np.array(before)[:, None], hits, seed=seed)
    ahead = percent(difference, interval)
    print(f"{len(after)} images: {percent(hits.mean(), bootstrap_interval(hits, seed=seed))}, difference {ahead}")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--output", type=Path, help="JSON file; needed without --chosen_by")
    parser.add_argument("--max_images", type=int)
    parser.add_argument("--image_size", type=int, help="shorter side; default: the images' own size")
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--chosen_by", type=Path, help="output of a run for another model, whose settings are tested")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    reader = open_model(args.model)
    description = reader.description
    heads = [AttentionSettings("mean"), *(AttentionSettings(head) for head in range(description.num_heads))]
    methods = [*Lost.Settings().candidates(description.num_layers), *heads]
    dense = FeatureSettings(views=args.views, image_size=args.image_size) if args.image_size else None
    results = {"model": args.model, "seed": args.seed, "threads": torch.get_num_threads(), "data": {}}
    for name in args.data:
        source = load_images(name, split=None)
        if args.max_images and args.max_images < len(source):
            drawn = np.random.default_rng(args.seed).permutation(len(source))[: args.max_images]
            source = source.subset(sorted(drawn.tolist()))
        source, truth, _ = images_with_boxes(source, ground_truth_boxes(source))
        if args.chosen_by:
            known = json.loads(args.chosen_by.read_text(encoding="utf-8"))["data"][name]

            def measure(images: list[int], chosen: LostSettings) -> Overlaps:
                part = source.subset(images)  # noqa: B023
                return measure_overlaps(reader, part, [truth[i] for i in images], [chosen], dense=dense)  # noqa: B023

            score_chosen(known, measure, args.seed)
            continue
        started = time.perf_counter()
        table = measure_overlaps(reader, source, truth, methods, dense=dense, label=name)
        result = both_directions(table, args.seed)
        result["seconds"] = round(time.perf_counter() - started, 1)
        result["all_settings"] = {str(m): float(c) for m, c in zip(methods, table.corloc())}
        show(name, table, result)
        results["data"][name] = result
    if args.chosen_by:
        return 0
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
