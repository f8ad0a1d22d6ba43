"""Check on real weights that `diagnose` and the token probes find artifacts, and that the results are reproducible.

    python benchmarks/artifact_evidence.py --model vit_tiny --samples imagenet_samples --labelled caltech101

Diagnoses all samples, two disjoint halves of them, and newly initialized copies of the model. Fits the token probes on
the `train` split of the labeled images and tests them on `validation`: after the last block, and for the same tokens
one block before the outliers appear, so that differences between positions cannot explain the result. Prints each
property reported in the paper with its numbers, and writes evidence.json.
"""

import argparse
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_regvit.data.loading import load_images
from hf_regvit.diagnosis.diagnose import diagnose
from hf_regvit.diagnosis.report import ArtifactReport
from hf_regvit.diagnosis.token_probes import TokenProbeReport, token_probes
from hf_regvit.models.loading import open_model
from hf_regvit.models.saving import write_json

SHOWN = ("bimodal", "cutoff", "outlier_share", "norm_ratio", "layer", "emergence_layer", "separation", "num_images")


def fresh(model: nn.Module, seed: int) -> nn.Module:
    """Return a randomly initialized copy of the model."""
    torch.manual_seed(seed)
    return type(model)(model.config).eval()


def brief(report: ArtifactReport) -> dict[str, Any]:
    record = {name: getattr(report, name) for name in SHOWN}
    record |= {
        "bimodal_layers": [entry["layer"] for entry in report.layers if entry["bimodal"]],
        "auroc": report.neighbours["auroc"],
        "neighbours": [report.neighbours["median_normal"], report.neighbours["median_outlier"]],
        "direction": report.outliers["direction"],
        "top_cells": report.outliers["top_cells"],
        "seconds": report.seconds,
    }
    return record


def mean(groups: dict[str, Any], group: str, metric: str) -> float:
    return groups[group][metric]["mean"]


def signs(whole: ArtifactReport, after: TokenProbeReport, before: TokenProbeReport) -> list[tuple[str, bool, str]]:
    """Return each property reported in the paper as (name, whether it holds, numbers)."""
    position, pixels, classes = after.position, after.pixels, after.image_class
    found = [
        (
            "more similar to their neighbors at the input",
            whole.neighbours["auroc"] > 0.5,
            f"AUROC {whole.neighbours['auroc']:.3f}, medians {whole.neighbours['median_outlier']:.3f} and "
            f"{whole.neighbours['median_normal']:.3f}",
        )
    ]
    for name, groups, metric, worse in (
        ("worse at position, top-1", position, "top1", -1),
        ("worse at position, distance", position, "distance", 1),
        ("worse at pixels, L2", pixels, "l2", 1),
        ("worse at pixels, R2", pixels, "r2", -1),
        ("better at the image class", classes, "top1", 1),
    ):
        outlier, normal = mean(groups, "outlier", metric), mean(groups, "normal", metric)
        stds = [groups[group][metric]["std"] for group in ("outlier", "normal")]
        found.append(
            (
                name,
                worse * (outlier - normal) > 0,
                f"outlier {outlier:.3f} ± {stds[0]:.3f}, normal {normal:.3f} ± {stds[1]:.3f}",
            )
        )
    for name, probe, metric, worse in (
        ("same tokens lose position (top-1)", "position", "top1", -1),
        ("same tokens lose position (distance)", "position", "distance", 1),
        ("same tokens lose pixels (R2)", "pixels", "r2", -1),
        ("same tokens gain the class", "image_class", "top1", 1),
    ):
        values = [mean(getattr(report, probe), "outlier", metric) for report in (before, after)]
        found.append((name, worse * (values[1] - values[0]) > 0, f"before {values[0]:.3f}, after {values[1]:.3f}"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Model with outliers: a folder or a Hub id.")
    parser.add_argument("--samples", required=True, help="Images for the diagnosis; use at least 500.")
    parser.add_argument(
        "--labelled", required=True, help="Images with class labels and the splits train and validation."
    )
    parser.add_argument("--output_dir", default="evidence")
    parser.add_argument("--max_train", type=int, default=1800, help="Number of training images of the probes.")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    reader = open_model(args.model)
    samples = load_images(args.samples, split=None)

    whole = diagnose(reader, samples)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(whole.summary(), flush=True)
    result: dict[str, Any] = {"threads": args.threads, "peak_gib": peak, "whole": brief(whole)}
    for name, start in (("first half", 0), ("second half", 1)):
        half = samples.subset(range(start, len(samples), 2))
        result[name] = brief(diagnose(reader, half, detail_images=32))
        print(name, {key: result[name][key] for key in SHOWN}, flush=True)
    for seed in range(2):
        report = diagnose(
            fresh(reader.model, seed), samples, processor=reader.processor, max_images=200, detail_images=32
        )
        result[f"fresh weights {seed}"] = brief(report)
        print(f"fresh weights {seed}: {report.verdict}", flush=True)

    train, test = (load_images(args.labelled, split=split) for split in ("train", "validation"))
    common = {"cutoff": whole.cutoff, "cutoff_layer": whole.layer, "test_images": test}
    last = reader.description.num_layers
    tables = {}
    for name, layer in (("after the last block", last), ("before the outliers", (whole.emergence_layer or last) - 1)):
        tables[name] = token_probes(reader, train, layer=layer, max_images=args.max_train, **common)
        result[f"probes {name}"] = tables[name].to_dict()
        print(f"\n{name} (layer {layer})\n{json.dumps(result[f'probes {name}'], indent=1)}", flush=True)
    result["signs"] = signs(whole, *tables.values())
    for name, present, numbers in result["signs"]:
        print(f"{'yes' if present else 'NO '}  {name}: {numbers}")
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    write_json(Path(args.output_dir) / "evidence.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
