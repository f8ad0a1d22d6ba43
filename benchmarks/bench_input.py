"""Compare the speed of input pipelines: decode one JPEG, cut and augment 2 global and 8 local crops, on one core.

    python benchmarks/bench_input.py                              # built-in images of scikit-image and scikit-learn
    python benchmarks/bench_input.py --data path/to/photos.parquet --images 48 --rounds 12
    python benchmarks/bench_input.py --quality 96 --subsampling 444

Every image is cropped to the aspect ratio of `--size`, resized and saved as a JPEG, so that all systems read the same
files. The official pipeline is reproduced here with torchvision on Pillow images, as in dinov2. The systems take turns
on every image, so that drifting machine speed affects them equally. The time is processor time of the whole process,
which includes threads that a system starts but no other load on the machine. Prints medians over the rounds of the
mean milliseconds per image, and medians of the ratios of each round to the official pipeline.

All pipelines return normalized float32 (3, S, S). `hf_regvit, uint8` is the output of a loader worker before
normalization. lightly-train, which has its own transform, is skipped with a message if it is not installed.
"""

import argparse
import io
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and torch start their pools

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import io as tv_io
from torchvision import transforms
from torchvision.transforms import v2

from hf_regvit.data.augmentation import MultiCrop, normalize_pixels
from hf_regvit.data.builtin import builtin_images
from hf_regvit.data.decoding import open_image
from hf_regvit.data.loading import load_images
from hf_regvit.models.processing import IMAGENET_MEAN, IMAGENET_STD

Pipeline = Callable[[bytes, int], Any]
SCALES = {"global": (0.32, 1.0), "local": (0.05, 0.32)}
BLUR_AS_TRAINED = (0.0, 0.9, 0.5)  # global crop 0, global crop 1, local crops


def official(args: argparse.Namespace) -> Pipeline:
    """Return the Pillow transforms of dinov2 `data/augmentations.py`, with the blur probabilities used in training."""

    def branch(kind: str, size: int, blur: float, *extra: Any) -> transforms.Compose:
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    size, scale=SCALES[kind], interpolation=transforms.InterpolationMode.BICUBIC
                ),
                transforms.RandomHorizontalFlip(p=0.5),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.RandomApply([transforms.GaussianBlur(9, sigma=(0.1, 2.0))], p=blur),
                *extra,
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    solarize = transforms.RandomSolarize(threshold=128, p=0.2)
    first = branch("global", args.global_size, BLUR_AS_TRAINED[0])
    second = branch("global", args.global_size, BLUR_AS_TRAINED[1], solarize)
    local = branch("local", args.local_size, BLUR_AS_TRAINED[2])

    def run(data: bytes, index: int) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return [first(image), second(image), *(local(image) for _ in range(args.num_local_crops))]

    return run


def torchvision_v2(args: argparse.Namespace) -> Pipeline:
    """Return the same transforms from torchvision's v2, on uint8 tensors decoded by torchvision."""

    def branch(kind: str, size: int, blur: float, *extra: Any) -> v2.Compose:
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=SCALES[kind], interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(p=0.5),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([v2.GaussianBlur(9, sigma=(0.1, 2.0))], p=blur),
                *extra,
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    first = branch("global", args.global_size, BLUR_AS_TRAINED[0])
    second = branch("global", args.global_size, BLUR_AS_TRAINED[1], v2.RandomSolarize(threshold=128, p=0.2))
    local = branch("local", args.local_size, BLUR_AS_TRAINED[2])

    def run(data: bytes, index: int) -> list[torch.Tensor]:
        image = tv_io.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=tv_io.ImageReadMode.RGB)
        return [first(image), second(image), *(local(image) for _ in range(args.num_local_crops))]

    return run


def lightly_train(args: argparse.Namespace) -> Pipeline:
    """Return lightly-train's default DINOv2 transform (albumentations on OpenCV), decoded as by its data set."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise it queries a server for its newest version
    from lightly_train._methods.dinov2.dinov2_transform import DINOv2ViTTransform, DINOv2ViTTransformArgs

    transform_args = DINOv2ViTTransformArgs(image_size=(args.global_size, args.global_size), num_channels=3)
    transform_args.local_view.view_size = (args.local_size, args.local_size)
    transform_args.local_view.num_views = args.num_local_crops
    transform = DINOv2ViTTransform(transform_args)

    def run(data: bytes, index: int) -> Any:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        image = tv_io.decode_image(buffer, mode=tv_io.ImageReadMode.RGB).permute(1, 2, 0).numpy()
        return transform({"image": image})

    return run


def ours(args: argparse.Namespace, *, normalize: bool) -> Pipeline:
    multi_crop = MultiCrop(
        global_size=args.global_size, local_size=args.local_size, num_local_crops=args.num_local_crops
    )

    def run(data: bytes, index: int) -> dict[str, torch.Tensor]:
        crops = multi_crop(open_image(data), seed=args.seed, epoch=0, sample_id=index)
        return {name: normalize_pixels(pixels) for name, pixels in crops.items()} if normalize else crops

    return run


def build_systems(args: argparse.Namespace) -> dict[str, Pipeline]:
    systems = {
        "official (Pillow + torchvision)": official(args),
        "torchvision v2, uint8 tensors": torchvision_v2(args),
    }
    if find_spec("lightly_train"):
        systems["lightly-train (albumentations)"] = lightly_train(args)
    else:
        print("lightly-train is not installed and is skipped.")
    systems["hf_regvit"] = ours(args, normalize=True)
    systems["hf_regvit, uint8"] = ours(args, normalize=False)
    systems["decode alone: hf_regvit's guard"] = lambda data, index: open_image(data)
    systems["decode alone: Pillow"] = lambda data, index: Image.open(io.BytesIO(data)).convert("RGB")
    systems["decode alone: OpenCV"] = lambda data, index: cv2.imdecode(
        np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB
    )
    systems["decode alone: torchvision"] = lambda data, index: tv_io.decode_jpeg(
        torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=tv_io.ImageReadMode.RGB
    )
    return systems


def as_jpeg(image: Image.Image, args: argparse.Namespace) -> bytes:
    """Return the largest center crop with the aspect ratio of `args.size`, resized to it, as a JPEG."""
    width, height = args.size
    scale = min(image.width / width, image.height / height)
    box = [(image.width - scale * width) / 2, (image.height - scale * height) / 2]
    box += [box[0] + scale * width, box[1] + scale * height]
    buffer = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC, box=tuple(box)).save(
        buffer, "JPEG", quality=args.quality, subsampling={"420": 2, "444": 0}[args.subsampling]
    )
    return buffer.getvalue()


def read_photographs(args: argparse.Namespace) -> list[bytes]:
    if args.data is None:
        images = list(builtin_images().values())
    else:
        source = load_images(args.data, split=None)
        images = [source[i].image for i in np.linspace(0, len(source) - 1, min(args.images, len(source)), dtype=int)]
    return [as_jpeg(image, args) for image in images[: args.images]]


def measure(systems: dict[str, Pipeline], files: list[bytes], rounds: int) -> dict[str, list[float]]:
    """Return the mean milliseconds per image for every system and round."""
    for run in systems.values():
        run(files[0], 0)
    order, milliseconds = list(systems), {name: [] for name in systems}
    for round_number in range(rounds):
        total = dict.fromkeys(systems, 0.0)
        for i, data in enumerate(files):
            order.append(order.pop(0))  # rotate, so that no system always runs after the same one
            for name in order:
                start = time.process_time()
                systems[name](data, round_number * len(files) + i)
                total[name] += time.process_time() - start
        for name in systems:
            milliseconds[name].append(1e3 * total[name] / len(files))
    return milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder, parquet file or name; default: the built-in `photos` set, uncropped")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument("--subsampling", choices=("420", "444"), default="420")
    parser.add_argument("--global_size", type=int, default=224)
    parser.add_argument("--local_size", type=int, default=96)
    parser.add_argument("--num_local_crops", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_file", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    random.seed(args.seed)
    np.random.seed(args.seed)  # noqa: NPY002 - albumentations and torchvision draw from the global generators
    torch.manual_seed(args.seed)

    files = read_photographs(args)
    systems = build_systems(args)
    milliseconds = measure(systems, files, args.rounds)
    reference = milliseconds[next(iter(systems))]
    size = "{} x {}".format(*args.size)
    print(f"{len(files)} JPEGs of {size}, q{args.quality} {args.subsampling}, {args.rounds} rounds")
    print(f"{'':34}{'ms/image':>12}{'images/s':>10}{'official = 1':>14}")
    report = {}
    for name, values in milliseconds.items():
        median = statistics.median(values)
        speed = statistics.median(r / v for r, v in zip(reference, values))
        report[name] = {"ms": median, "images_per_second": 1e3 / median, "speed": speed}
        print(f"{name:34}{median:12.2f}{1e3 / median:10.0f}{speed:14.2f}")
    if args.output_file:
        args.output_file.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
