"""Measure the cost of evaluation: reading features, the grid of linear heads, kNN and its memory, logistic regression.

    python benchmarks/bench_evaluation.py --threads 1 --output runs/bench_evaluation.json

Measurements are interleaved and in processor time; ratios are ratios of medians. Features are random, with the sizes
of a ViT-Tiny on 1,800 images of 100 classes. Reading uses random pixels.
"""

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from hf_regvit import RegViTConfig, RegViTModel
from hf_regvit.evaluation.cache import read_vectors
from hf_regvit.evaluation.knn import knn_classify
from hf_regvit.evaluation.linear import (
    LOGISTIC_CS,
    HeadSettings,
    LinearGrid,
    head_inputs,
    logistic_path,
    ridge_accuracy,
    train_linear_heads,
)
from hf_regvit.evaluation.run import TaskParts
from hf_regvit.models.loading import open_model

IMAGES, CLASSES, WIDTH, BLOCKS = 1800, 100, 192, 4


def interleaved(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the processor seconds of every function, called in turn; the order alternates between rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()  # the first call allocates
    for turn in range(rounds):
        names = list(ways) if turn % 2 == 0 else list(reversed(ways))
        for name in names:
            gc.collect()
            started = time.process_time()
            ways[name]()
            seconds[name].append(time.process_time() - started)
    return seconds


def show(title: str, seconds: dict[str, list[float]], reference: str) -> dict[str, Any]:
    """Print medians and their ratios to the reference, and return the medians."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"\n{title}, {len(next(iter(seconds.values())))} rounds")
    for name, median in medians.items():
        print(f"  {name:46} {1000 * median:9.1f} ms   {median / medians[reference]:6.3f} x {reference}")
    return {"seconds": medians, "reference": reference, "rounds": len(next(iter(seconds.values())))}


def reading(rounds: int, preset: str, image_size: int) -> dict[str, Any]:
    """Compare reading the vectors of four blocks and the mean patch with a forward pass of the model."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    own = RegViTModel(RegViTConfig.from_preset(preset, image_size=image_size)).eval()
    config = own.config
    other = ViTModel(
        ViTConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=4 * config.hidden_size,
            image_size=image_size,
            patch_size=config.patch_size,
        ),
        add_pooling_layer=False,
    ).eval()
    pixels = torch.randn(8, 3, image_size, image_size)
    results = {}
    for name, model in (("RegViT", own), ("transformers ViT", other)):
        reader = open_model(model)
        depth = reader.description.num_layers

        @torch.no_grad()
        def bare(model: nn.Module = model) -> Any:
            return model(pixel_values=pixels)

        def read(reader: Any = reader, depth: int = depth) -> Any:
            return read_vectors(reader, pixels, tuple(range(depth - 3, depth + 1)))

        # Time the forward pass twice: the difference is the noise of the machine.
        seconds = interleaved({"forward alone": bare, "reading": read, "forward alone, again": bare}, rounds)
        results[name] = show(f"Reading, {name} {preset}, 8 x {image_size} px", seconds, "forward alone")
    return results


def drawn_features() -> tuple[Tensor, Tensor, Tensor]:
    """Return random vectors (n, B, D), mean patches (n, D) and labels (n,) of overlapping classes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (IMAGES,), generator=generator)
    centers = torch.randn(CLASSES, WIDTH, generator=generator)
    vectors = 2 * torch.randn(IMAGES, BLOCKS, WIDTH, generator=generator) + centers[labels][:, None]
    return vectors, vectors.mean(dim=1), labels


def modules_of(grid: LinearGrid, data: tuple[Tensor, Tensor, Tensor]) -> list[tuple[HeadSettings, nn.Linear]]:
    torch.manual_seed(0)
    heads = [
        HeadSettings(blocks, patch, rate)
        for blocks in grid.num_blocks
        for patch in grid.mean_patch
        for rate in grid.learning_rates
    ]
    return [(head, nn.Linear((head.num_blocks + head.mean_patch) * WIDTH, CLASSES)) for head in heads]


def train_modules(heads: list[tuple[HeadSettings, nn.Linear]], grid: LinearGrid, data: tuple[Tensor, ...]) -> None:
    """Train linear modules with one SGD and a summed loss, as the official evaluation does."""
    vectors, mean_patch, labels = data
    optimizer = torch.optim.SGD(
        [{"params": module.parameters(), "lr": head.learning_rate / 2} for head, module in heads], momentum=0.9
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(grid.num_steps):
        batch = torch.randint(0, len(labels), (grid.batch_size,), generator=generator)
        optimizer.zero_grad()
        inputs = {
            key: head_inputs(vectors[batch], mean_patch[batch], *key)
            for key in {(head.num_blocks, head.mean_patch) for head, _ in heads}
        }
        loss = sum(
            F.cross_entropy(module(inputs[head.num_blocks, head.mean_patch]), labels[batch]) for head, module in heads
        )
        loss.backward()  # type: ignore[union-attr]  # there is a head
        optimizer.step()


def linear(rounds: int, steps: int) -> dict[str, Any]:
    """Compare training 52 heads in one pass, as modules in one pass, and one after the other."""
    data, grid = drawn_features(), LinearGrid(num_steps=steps)

    def one_pass() -> None:
        train_linear_heads(*data, num_classes=CLASSES, grid=grid)

    def together() -> None:
        train_modules(modules_of(grid, data), grid, data)

    def separately() -> None:
        for head in modules_of(grid, data):
            train_modules([head], grid.only(head[0]), data)

    ways = {"one pass, here": one_pass, "one pass, 52 modules": together, "one after the other": separately}
    return show(f"Linear grid, 52 heads, {steps} steps of 128", interleaved(ways, rounds), "one pass, here")


def knn(rounds: int) -> dict[str, Any]:
    """Compare votes of 10 and 20 neighbors with scikit-learn's vote of 20 neighbors."""
    from sklearn.neighbors import KNeighborsClassifier

    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(20_000, 384, generator=generator), torch.randn(1000, 384, generator=generator)
    labels = torch.randint(0, CLASSES, (len(train),), generator=generator)
    peer = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda far: np.exp((1 - far) / 0.07), n_jobs=1
    ).fit(train.numpy(), labels.numpy())

    def own() -> Tensor:
        return knn_classify(train, labels, test, k=(10, 20))[20].argmax(1)

    def other() -> Any:
        return peer.predict(test.numpy())

    agree = float((own().numpy() == other()).mean())
    result = show(
        "kNN, 1,000 against 20,000 of width 384", interleaved({"here": own, "scikit-learn": other}, rounds), "here"
    )
    print(f"  same class for {100 * agree:.1f} % of the images")
    return result | {"agreement": agree}


def _peak(count: int, bank_chunk_size: int, queue: Any) -> None:
    torch.set_num_threads(1)
    train, test = torch.randn(count, 64), torch.randn(2048, 64)
    labels = torch.randint(0, CLASSES, (count,))
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak on Linux
    knn_classify(train, labels, test, k=(10, 20), bank_chunk_size=bank_chunk_size)
    queue.put(_resident("VmHWM") - before)


def _resident(field: str) -> float:
    """Return the resident memory of this process in MiB: current (VmRSS) or peak (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def knn_memory() -> dict[str, float]:
    """Return the MiB that kNN adds to a new process, for a growing bank."""
    context = multiprocessing.get_context("spawn")
    print("\nkNN memory, 2,048 images of width 64, added to a new process")
    added = {}
    for count in (20_000, 200_000):
        for name, chunk in (("chunks of 16,384", 16384), ("the whole bank at once", count)):
            queue = context.Queue()
            process = context.Process(target=_peak, args=(count, chunk, queue))
            process.start()
            added[f"{count}, {name}"] = round(queue.get(), 1)
            process.join()
            print(f"  bank of {count:7,}, {name:24} {added[f'{count}, {name}']:8.0f} MiB")
    return added


def torch_path(x: Tensor, labels: Tensor, cs: Sequence[float]) -> list[Callable[[Tensor], Tensor]]:
    """Fit logistic regression by torch's L-BFGS in double precision, each C from the previous solution."""
    x, num_classes, models = x.double(), int(labels.max()) + 1, []
    weight = x.new_zeros(x.shape[1], num_classes, requires_grad=True)
    bias = x.new_zeros(num_classes, requires_grad=True)
    for c in cs:
        solver = torch.optim.LBFGS(
            [weight, bias], max_iter=1000, tolerance_grad=1e-12, tolerance_change=1e-12, history_size=10,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss(solver: torch.optim.LBFGS = solver, c: float = c) -> Tensor:
            solver.zero_grad()
            fit = F.cross_entropy(torch.addmm(bias, x, weight), labels)
            value = fit + weight.square().sum() / (2 * c * len(x))
            value.backward()
            return value

        solver.step(loss)
        w, b = weight.detach().clone(), bias.detach().clone()
        models.append(lambda features, w=w, b=b: torch.addmm(b, features.double(), w))
    return models


def torch_ridge(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> float:
    """Return the accuracy of ridge regression in closed form, with the penalty of least leave-one-out error."""
    mean, deviation = train.double().mean(0), train.double().std(0, correction=0).clamp(min=1e-6)
    train, test = ((features.double() - mean) / deviation for features in (train, test))
    targets = F.one_hot(labels, int(max(labels.max(), truth.max())) + 1).double()
    offset = targets.mean(0)
    eigenvalues, directions = torch.linalg.eigh(train.T @ train)
    scores, best = train @ directions, (float("inf"), torch.empty(0))
    for penalty in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
        shrunk = 1 / (eigenvalues.clamp(min=0) + penalty * len(train))
        weights = shrunk[:, None] * (scores.T @ (targets - offset))
        leverage = (scores.square() * shrunk).sum(1, keepdim=True) + 1 / len(train)
        error = ((targets - offset - scores @ weights) / (1 - leverage)).square().mean().item()
        best = min(best, (error, directions @ weights), key=lambda pair: pair[0])
    return ((test @ best[1] + offset).argmax(1) == truth).float().mean().item()


def labeled_vectors(model: str | None, data: str | None) -> list[tuple[Tensor, Tensor]]:
    """Return vectors and labels of training and test images: of a model on data, or random ones."""
    if model is None or data is None:
        vectors, _, labels = drawn_features()
        return [(vectors[::2, -1], labels[::2]), (vectors[1::2, -1], labels[1::2])]
    parts, reader = TaskParts(data, cache_dir="runs/features"), open_model(model)
    read = [parts.features(reader, part) for part in ("train", "test")]
    return [(part.features.last, part.labels) for part in read]


def solvers(model: str | None, data: str | None, cs: Sequence[float]) -> dict[str, Any]:
    """Compare the fits of scikit-learn with torch's L-BFGS and a closed form: accuracies and processor seconds."""
    (train, labels), (test, truth) = labeled_vectors(model, data)
    num_classes = int(max(labels.max(), truth.max())) + 1

    def accuracy(scores: Tensor) -> float:
        return (scores.argmax(1) == truth).float().mean().item()

    ways: dict[str, Callable[[], list[float]]] = {
        "logistic, scikit-learn": lambda: [
            accuracy(fit(test)) for fit in logistic_path(train, labels, num_classes=num_classes, cs=cs)
        ],
        "logistic, torch": lambda: [accuracy(fit(test)) for fit in torch_path(train, labels, cs)],
        "ridge, scikit-learn": lambda: [ridge_accuracy(train, labels, test, truth)],
        "ridge, closed form in torch": lambda: [torch_ridge(train, labels, test, truth)],
    }
    print(f"\n{data or 'random features'}: {len(train)} training, {len(test)} test vectors of width {train.shape[1]}")
    results = {}
    for name, way in ways.items():
        started = time.process_time()
        found = way()
        results[name] = {"accuracies": found, "seconds": time.process_time() - started}
        print(f"  {name:28} {results[name]['seconds']:8.2f} s   best accuracy {100 * max(found):.2f} %")
    pairs = zip(*(results[f"logistic, {solver}"]["accuracies"] for solver in ("scikit-learn", "torch")))
    largest = max(abs(one - other) for one, other in pairs)
    print(f"  largest difference between the accuracies at one of {len(cs)} values of C: {100 * largest:.2f} points")
    return results


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["reading", "linear", "knn", "knn_memory", "solvers"])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--linear_steps", type=int, default=10)
    parser.add_argument("--logistic_cs", type=float, nargs="+", default=list(LOGISTIC_CS))
    parser.add_argument("--model", help="Model whose vectors the solvers fit. Default: random vectors.")
    parser.add_argument("--data", help="Labeled images for these vectors.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    threadpool_limits(args.threads)  # the threads of NumPy's and scikit-learn's libraries
    few = max(1, args.rounds // 5)
    parts: dict[str, Callable[[], Any]] = {
        "reading": lambda: reading(args.rounds, args.preset, args.image_size),
        "linear": lambda: linear(few, args.linear_steps),
        "knn": lambda: knn(few),
        "knn_memory": knn_memory,
        "solvers": lambda: solvers(args.model, args.data, args.logistic_cs),
    }
    results: dict[str, Any] = {"threads": args.threads, "torch": torch.__version__}
    for part in args.parts:
        results[part] = parts[part]()
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
