"""Evaluate test-time registers on a real classifier, with neurons selected on one data set and tested on another.

    python benchmarks/retrofit_evidence.py --model ../shared/data/vit_tiny_patch16_224 \
        --search ../shared/data/caltech101 --samples ../shared/data/imagenet_samples --output_dir runs/registers

Converts the model, retrofits it on the training images of `--search`, and measures on all `--samples`: top-1 accuracy
before, after and for controls (95 % interval from 2,000 resamples, paired differences), outliers before and after in
an independent diagnosis, the time of a forward pass, and the effect of setting activations as in the published code.
The checkpoints `source` and `retrofitted` in `--output_dir` can be used by `regvit evaluate` and
`benchmarks/lost_evidence.py`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_regvit import RegViTConfig
from hf_regvit.data.loading import load_images
from hf_regvit.data.preparation import prepare_images
from hf_regvit.data.source import ImageSource
from hf_regvit.diagnosis.diagnose import diagnose
from hf_regvit.diagnosis.register_neurons import add_test_time_registers, find_register_neurons, silence_neurons
from hf_regvit.diagnosis.report import ArtifactReport
from hf_regvit.diagnosis.retrofit import retrofit
from hf_regvit.evaluation.intervals import bootstrap_interval, paired_difference
from hf_regvit.models import modeling_regvit
from hf_regvit.models.conversion import convert_to_folder
from hf_regvit.models.loading import open_model
from hf_regvit.models.processing import EvaluationTransform
from hf_regvit.models.saving import write_json


def right(model: Any, images: ImageSource, processor: Any) -> np.ndarray:
    """Return (n, 1), 1.0 for images whose predicted class is the label and 0.0 otherwise."""
    transform = EvaluationTransform.for_model(model, processor)
    found = []
    with torch.inference_mode():
        for _, pixels in prepare_images(images, transform):
            found.append(model(pixels).logits.argmax(dim=1))
    return (torch.cat(found).numpy() == np.asarray(images.labels))[:, None].astype(float)


def brief(report: ArtifactReport) -> dict[str, Any]:
    attention = report.attention["statistics"] if report.attention else {}
    return {
        "verdict": report.verdict,
        "outlier_share": report.outlier_share if report.bimodal else 0.0,
        "bimodal_layers": [entry["layer"] for entry in report.layers if entry["bimodal"]],
        "max_norm": {entry["layer"]: entry["max"] for entry in report.layers},
        "median_norm": {entry["layer"]: entry["median"] for entry in report.layers},
        "attention": {name: entry["mean"] for name, entry in attention.items()},
        "effective_rank": report.patches["effective_rank"]["mean"],
        "num_images": report.num_images,
    }


def seconds_of(models: dict[str, Any], rounds: int = 9) -> dict[str, float]:
    """Return the processor seconds of a forward pass of 8 images, as medians of interleaved rounds."""
    pixels = torch.randn(8, 3, *next(iter(models.values())).config.image_shape)
    taken: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for name, model in models.items():
                started = time.process_time()
                model(pixels)
                taken[name].append(time.process_time() - started)
    return {name: statistics.median(values[1:]) for name, values in taken.items()}


def variants(source: Any, made: Any, seed: int) -> dict[str, Any]:
    """Return the source model, the retrofitted model, and controls."""
    pairs, registers = made.config.register_neurons, made.config.num_register_tokens
    rng = np.random.default_rng(seed)
    random = [[block, int(rng.integers(source.config.ffn_hidden_size))] for block, _ in pairs]
    models = {"before": source, "after": made}
    if registers > 1:
        models["after, one register"] = add_test_time_registers(source, pairs)
    models["registers alone"] = add_test_time_registers(source, [], num_register_tokens=registers)
    models["random neurons"] = add_test_time_registers(source, random, num_register_tokens=registers)
    models["neurons silenced"] = silence_neurons(source, pairs)
    return models


def one_value_for_all(
    activations: torch.Tensor, neurons: list[int], config: RegViTConfig, token_mask: torch.Tensor | None
) -> torch.Tensor:
    """Set all selected neurons of a block to their largest activation, as in the published code."""
    if not neurons:
        return activations
    chosen = activations[..., neurons]  # (B, T, S)
    flat = chosen.flatten(1)
    largest = flat.gather(1, flat.abs().argmax(dim=1, keepdim=True))[..., None]  # (B, 1, 1)
    registers = largest.expand(-1, config.num_register_tokens, len(neurons))
    patches = torch.zeros_like(chosen[:, config.num_prefix_tokens :])
    moved = torch.cat([chosen[:, : int(config.use_cls_token)], registers, patches], dim=1)
    return activations.index_copy(2, torch.tensor(neurons), moved)


def compare_values(source: Any, samples: ImageSource, processor: Any, registers: int) -> dict[str, Any]:
    """Compare one value per neuron with one value for all: cosines of CLS and normal patches with the source."""
    found = find_register_neurons(source, samples.subset(range(0, len(samples), 5)), processor=processor)
    transform = EvaluationTransform.for_model(source, processor)
    batches = [pixels for _, pixels in prepare_images(samples.subset(range(1, len(samples), 5)), transform)]
    ours = modeling_regvit.move_to_registers

    def tokens(model: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            outputs = [model.regvit(pixels, output_hidden_states=True) for pixels in batches]
        prefix = model.config.num_prefix_tokens
        norms = [output.hidden_states[found.layer][:, prefix:].norm(dim=-1) for output in outputs]
        return (
            torch.cat([output.pooler_output for output in outputs]),
            torch.cat([output.patch_tokens for output in outputs]),
            torch.cat(norms),
        )

    before = tokens(source)
    normal = before[2] <= found.cutoff
    table = {}
    for count in (2, 5, 10, 20):
        model = add_test_time_registers(source, found.best(count), num_register_tokens=registers)
        for name, rule in (("per neuron", ours), ("one for all", one_value_for_all)):
            modeling_regvit.move_to_registers = rule
            after = tokens(model)
            cosines = [torch.cosine_similarity(x, y, dim=-1) for x, y in zip(after[:2], before[:2])]
            left = float((after[2] > found.cutoff).float().mean())
            table[f"{count} neurons, {name}"] = row = [
                float(cosines[0].mean()), float(cosines[1][normal].mean()), left
            ]  # fmt: skip
            print(
                f"{count:3} neurons, {name:12} cosine of CLS {row[0]:.3f}, patches {row[1]:.3f}, outliers {left:.2%}"
            )
    modeling_regvit.move_to_registers = ours
    return table


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="classifier that `regvit convert` accepts")
    parser.add_argument("--search", required=True, help="data set whose train split is used to select neurons")
    parser.add_argument("--samples", required=True, help="labeled images of the classifier's classes")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    folders = {name: args.output_dir / name for name in ("source", "retrofitted")}
    if not (folders["source"] / "config.json").exists():
        convert_to_folder(args.model, folders["source"])
    if not (folders["retrofitted"] / "config.json").exists():
        found = load_images(args.search, split="train")
        result = retrofit(
            folders["source"], found, output_dir=folders["retrofitted"], max_images=args.max_images, seed=args.seed
        )
        print(result.summary(), flush=True)
    readers = [open_model(folder) for folder in folders.values()]
    (source, made), processor = (reader.model for reader in readers), readers[0].processor
    samples = load_images(args.samples, split=None)
    evidence: dict[str, Any] = {"threads": torch.get_num_threads(), "seed": args.seed}
    evidence["neurons"], evidence["registers"] = made.config.register_neurons, made.config.num_register_tokens

    evidence["values"] = compare_values(source, samples, processor, made.config.num_register_tokens)
    rows: dict[str, np.ndarray] = {}
    for name, model in variants(source, made, args.seed).items():
        rows[name] = right(model, samples, processor)
        low, high = bootstrap_interval(rows[name], seed=args.seed)
        ahead, interval = paired_difference(rows["before"], rows[name], seed=args.seed)
        evidence[f"top-1 {name}"] = {"value": rows[name].mean(), "interval": [low, high], "ahead": [ahead, *interval]}
        print(
            f"top-1 {name:20} {rows[name].mean():6.1%} [{low:.1%}, {high:.1%}], change from before {100 * ahead:+.1f} "
            f"[{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]",
            flush=True,
        )
    for name, model in (("before", source), ("after", made)):
        report = diagnose(model, samples, processor=processor, detail_images=64, progress=False)
        evidence[name] = brief(report)
        print(f"{name}: {report.summary()}\n", flush=True)
    times = seconds_of({"before": source, "after": made})
    evidence["seconds"], evidence["time_ratio"] = times, times["after"] / times["before"]
    print(f"forward pass of 8 images, processor time, after / before: {evidence['time_ratio']:.3f}")
    write_json(args.output_dir / "evidence.json", evidence)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
