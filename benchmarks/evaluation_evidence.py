"""Evaluate a real ViT after conversion, and compare it with the transformers model under the same protocol.

    python benchmarks/evaluation_evidence.py --model ../shared/data/vit_tiny_patch16_224 \
        --data ../shared/data/caltech101 --output_dir runs/evaluation_evidence

Prints four rows for every task: RegViT (`convert`, features from `read_tokens`), the transformers model (its own
forward pass with `output_hidden_states`, preprocessing by torchvision, and nothing of this package before the heads),
and two controls, the converted network with random weights and raw pixels. For the transformers model, kNN is repeated
with scikit-learn. Differences are paired over the test images.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_regvit import RegViTModel, convert, load_images
from hf_regvit.data.source import ImageSource
from hf_regvit.evaluation.cache import FrozenFeatures
from hf_regvit.evaluation.report import EvaluationReport, EvaluationTable
from hf_regvit.evaluation.run import LabeledFeatures, evaluate_backbone, score_features
from hf_regvit.models.loading import open_model

TASKS = ("knn", "linear", "few_shot")


@torch.no_grad()
def transformers_features(model: torch.nn.Module, source: ImageSource, mean: Sequence[float], std: Sequence[float]):
    """Return CLS of the last four blocks and mean patch of the last block, from transformers' own forward pass."""
    from torchvision import transforms

    view = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    tower = getattr(model, "vit", model)
    started = time.perf_counter()
    vectors, means = [], []
    for start in range(0, len(source), 32):
        batch = torch.stack([view(source[i].image) for i in range(start, min(start + 32, len(source)))])
        states = tower(pixel_values=batch, output_hidden_states=True).hidden_states
        normed = [tower.layernorm(state) for state in states[-4:]]
        vectors.append(torch.stack([state[:, 0] for state in normed], dim=1))
        means.append(normed[-1][:, 1:].mean(dim=1))
    depth = len(states) - 1
    return _features(torch.cat(vectors), torch.cat(means), source, started, range(depth - 3, depth + 1))


def pixel_features(source: ImageSource, side: int = 16):
    """Return the raw pixels of the images, resized to 16 x 16."""
    started = time.perf_counter()
    rows = [np.asarray(source[i].image.resize((side, side)), dtype=np.float32).ravel() for i in range(len(source))]
    vectors = torch.from_numpy(np.stack(rows)) / 255 - 0.5
    return _features(vectors[:, None], vectors, source, started, [0], kind="pixel")


def _features(
    vectors: Tensor, mean_patch: Tensor, source: ImageSource, started: float, layers: Sequence[int], kind: str = "CLS"
) -> FrozenFeatures:
    seconds = time.perf_counter() - started
    return FrozenFeatures(vectors, mean_patch, tuple(layers), kind, tuple(source.ids), (), seconds)


def report_on(
    name: str,
    parts: tuple[FrozenFeatures, FrozenFeatures],
    sources: tuple[ImageSource, ...],
    tasks: Sequence[str],
    options: dict,
) -> EvaluationReport:
    """Run the tasks on given features."""
    num_classes = 1 + max(*sources[0].labels, *sources[1].labels)
    train, test = (
        LabeledFeatures(part, torch.tensor(source.labels), num_classes, source.name)
        for part, source in zip(parts, sources)
    )
    scores = tuple(score_features(train, test, tasks=tasks, **options))
    return EvaluationReport(
        name, Path(test.data).name, options["seed"], {}, scores, reading_seconds=sum(part.seconds for part in parts)
    )


def sklearn_knn(parts: tuple[FrozenFeatures, FrozenFeatures], sources: tuple[ImageSource, ...], k: int) -> float:
    """Return the top-1 accuracy of the same votes in scikit-learn, from cosine distances."""
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda far: np.exp((1 - far) / 0.07))
    model.fit(parts[0].last.numpy(), sources[0].labels)
    return float((model.predict(parts[1].last.numpy()) == np.array(sources[1].labels)).mean())


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=[*TASKS, "logistic"])
    parser.add_argument("--linear_steps", type=int, default=1000)
    parser.add_argument("--num_classes", type=int, help="number of classes to use, from the first one on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    sources = tuple(load_images(args.data, split=split) for split in ("train", "validation"))
    if args.num_classes:
        sources = tuple(
            source.subset([i for i, label in enumerate(source.labels) if label < args.num_classes])
            for source in sources
        )
    options = {"linear_steps": args.linear_steps, "seed": args.seed}

    reader = open_model(args.model, device="cpu")
    original, processor = reader.model, reader.processor
    regvit = convert(copy.deepcopy(original))
    regvit = getattr(regvit, "regvit", regvit)
    torch.manual_seed(args.seed)
    untrained = RegViTModel(regvit.config).eval()
    cache = {
        "cache_dir": args.output_dir / "features",
        "tasks": args.tasks,
        "train": sources[0],
    }
    reports = []

    def add(report: EvaluationReport) -> None:
        reports.append(report)
        EvaluationTable(tuple(reports)).save(args.output_dir)
        print(f"{report.model}: {report.reading_seconds:.0f} s for reading features", flush=True)

    add(
        evaluate_backbone(
            open_model(regvit, processor=processor), sources[1], name="RegViT, converted", **cache, **options
        )
    )
    mean, std = processor.image_mean, processor.image_std
    direct = tuple(transformers_features(original, source, mean, std) for source in sources)
    add(report_on("transformers", direct, sources, args.tasks, options))
    add(
        evaluate_backbone(
            open_model(untrained, processor=processor), sources[1], name="RegViT, untrained", **cache, **options
        )
    )
    pixels = tuple(pixel_features(source) for source in sources)
    add(report_on("16 x 16 pixels", pixels, sources, args.tasks, options))

    table = EvaluationTable(tuple(reports))
    print(table.markdown())
    own = next((score for score in reports[0].scores if score.variant == "k=10"), None)
    peer = sklearn_knn(direct, sources, 10) if own else None
    if own and peer:
        print(f"10-NN: {100 * own.value:.1f} %; scikit-learn on the transformers features: {100 * peer:.1f} %")
    apart = [
        f"{score.name}: {score.show(*score.ahead_of(reference), signed=True)}"
        for score, report, reference in table.rows()
        if report.model == "transformers" and reference is not None
        and not score.ahead_of(reference)[1][0] <= 0 <= score.ahead_of(reference)[1][1]
    ]  # fmt: skip
    print("Differences beyond the interval: " + ("; ".join(apart) or "none"))
    notes = {"threads": args.threads, "sklearn_10nn": peer, "beyond_the_interval": apart}
    (args.output_dir / "notes.json").write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
