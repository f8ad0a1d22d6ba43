"""Choose block, views and image size of a model's patch features on half of the images; compare on the other half.

    python benchmarks/dense_features.py --model ../shared/data/vit_tiny_patch16_224 \
        --data ../shared/data/camvid --ignore 11 --image_sizes 224 448 --output_dir runs/dense_features

With `--register_neurons 7:417 6:189`, the same is done after the model got 4 test-time registers, and both choices are
compared with the default of the original. The intervals are paired over test images (2,000 resamples).
"""

import argparse
import json

import torch

from hf_regvit import add_test_time_registers, choose_features, convert
from hf_regvit.data.maps import load_depth, load_masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", choices=["segmentation", "depth"], default="segmentation")
    parser.add_argument("--ignore", type=int, nargs="*")
    parser.add_argument("--views", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--image_sizes", type=int, nargs="+")
    parser.add_argument("--max_train", type=int)
    parser.add_argument("--register_neurons", nargs="*", default=[], help="Block:neuron, blocks counted from 0.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args()
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
    for name, model in models.items():
        choice = choose_features(
            model.eval(), train, test,
            views=args.views, image_sizes=args.image_sizes, pool_to_grid=True, seed=args.seed,
        )  # fmt: skip
        folder = f"{args.output_dir}/{name.replace(' ', '_')}"
        choice.save(folder)
        print(f"{name} ({torch.get_num_threads()} threads)\n{choice.summary()}\n", flush=True)
        print(
            json.dumps([[c[k] for k in ("layer", "views", "image_size", "choice", "test")] for c in choice.candidates])
        )


if __name__ == "__main__":
    main()
