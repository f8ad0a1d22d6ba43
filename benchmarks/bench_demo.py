"""Measure the response times of the demo: a new image, a click, another head or block, and the downloads.

    python benchmarks/bench_demo.py [--side 224] [--threads 2]

Uses a ViT-S/16 and a ViT-S/14 with four registers and random weights, which do not affect the time. Prints medians
over the example images. Processor time is independent of other load on the machine; wall time is not.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hf_regvit import RegViTConfig, RegViTModel
from hf_regvit.app.demo import EXAMPLES, write_features, write_figures
from hf_regvit.app.demo_page import MapRequest, read_views, results_page
from hf_regvit.app.exploration import Explorer, InputImage, View
from hf_regvit.data.builtin import builtin_images
from hf_regvit.models.processing import default_image_processor
from hf_regvit.models.tokens import TokenReader


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Return wall and processor seconds of a call."""
    wall, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - processor


def measure(explorer: Explorer, name: str, side: int, folder: Path) -> dict[str, list[tuple[float, float]]]:
    photos = builtin_images()
    times: dict[str, list[tuple[float, float]]] = {}
    depth = explorer.readers[name].description.num_layers
    for photo in EXAMPLES:
        request = MapRequest((name,), side=side, layer=depth)

        def show(image: InputImage, request: MapRequest) -> dict[str, View]:
            views = read_views(explorer, image, request)
            results_page(views, request)
            return views

        image = InputImage.of(photos[photo], photo)
        asked = {
            "new image": request,
            "click on a patch": MapRequest((name,), side=side, layer=depth, place=(0.2, 0.8)),
            "another head": MapRequest((name,), side=side, layer=depth, head=2),
            "another block": MapRequest((name,), side=side, layer=depth // 2),
        }
        for label, each in asked.items():
            times.setdefault(label, []).append(timed(lambda: show(image, each)))  # noqa: B023 (called at once)
    views = read_views(explorer, image, request)
    times["figures, ZIP of PNG"] = [timed(lambda: write_figures(views, image, request, folder)) for _ in range(3)]
    times["features, safetensors"] = [timed(lambda: write_features(views, image, folder)) for _ in range(3)]
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=224, help="shorter side of the images in pixels")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = {}
    for patch in (16, 14):
        torch.manual_seed(0)
        config = RegViTConfig.from_preset("small", patch_size=patch, num_register_tokens=4)
        models[f"ViT-S/{patch}"] = TokenReader(RegViTModel(config).eval(), default_image_processor(224))
    print(f"shorter side {arguments.side} pixels, {arguments.threads} threads; seconds, median (worst)\n")
    print("| model | action | wall | processor |\n|---|---|---:|---:|")
    explorer = Explorer(models)
    with tempfile.TemporaryDirectory() as folder:
        for name in models:
            for label, times in measure(explorer, name, arguments.side, Path(folder)).items():
                wall, processor = ([pair[i] for pair in times] for i in (0, 1))
                print(
                    f"| {name} | {label} | {statistics.median(wall):.2f} ({max(wall):.2f}) "
                    f"| {statistics.median(processor):.2f} ({max(processor):.2f}) |"
                )


if __name__ == "__main__":
    main()
