"""Measure seconds and peak memory of a whole diagnosis, each number of images in a fresh process.

    python benchmarks/bench_diagnosis.py --model ../shared/data/vit_tiny_patch16_224 \
        --images ../shared/data/imagenet_samples --num_images 100 1000 --threads 2

The diagnosis has all of its parts except linear probes. The seconds are those of `diagnose`, without imports and
opening the model. The memory is the largest resident memory of the process, and how much of it was there before the
diagnosis. Images are repeated if there are fewer than asked for.
"""

import argparse
import json
import subprocess
import sys

MEASURED = """
import json, resource, sys, torch
from hf_regvit import diagnose, open_model
from hf_regvit.data.loading import load_images
model, images, count, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
reader, source = open_model(model), load_images(images, split=None)
source = source.subset([i % len(source) for i in range(count)])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = diagnose(reader, source, max_images=count, progress=False)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"images": report.num_images, "before": before, "peak": after, "seconds": report.seconds}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--num_images", type=int, nargs="+", default=[100])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="Print one JSON object per diagnosis.")
    args = parser.parse_args()
    for _ in range(args.rounds):
        for count in args.num_images:
            command = [sys.executable, "-c", MEASURED, args.model, args.images, str(count), str(args.threads)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            if args.json:
                print(json.dumps(found), flush=True)
                continue
            parts = ", ".join(f"{name} {value:.1f}" for name, value in found["seconds"].items() if name != "total")
            print(
                f"{found['images']} images: {found['seconds']['total']:.1f} s ({parts}), peak "
                f"{found['peak'] / 1024:.0f} MiB, of which {found['before'] / 1024:.0f} MiB before the diagnosis",
                flush=True,
            )


if __name__ == "__main__":
    main()
