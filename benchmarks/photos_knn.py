"""Measure the 10-NN accuracy of checkpoints on the built-in `photos` set, with tiles read at several sizes.

    python benchmarks/photos_knn.py runs/demo-photos/backbone --sizes 64 80 96

"inner" uses only training tiles (bank: the left 70 % of each image, queries: the rest), so it can select a size
without the held-out tiles. The features are CLS and mean patch token after the final norm, concatenated; the metric is
cosine.
"""

import argparse

import torch
from transformers import AutoImageProcessor

from hf_regvit import RegViTModel
from hf_regvit.data.loading import load_images
from hf_regvit.data.source import ImageSource
from hf_regvit.evaluation.knn import knn_accuracy
from hf_regvit.models.processing import default_image_processor


@torch.inference_mode()
def features(model: RegViTModel, checkpoint: str, source: ImageSource, size: int) -> torch.Tensor:
    """Return the (n, 2 D) features of all tiles, read at `size` pixels and normalized as the checkpoint requires."""
    processor, own = default_image_processor(size, resize=size), AutoImageProcessor.from_pretrained(checkpoint)
    processor.image_mean, processor.image_std = own.image_mean, own.image_std
    pixels = processor([source[i].image for i in range(len(source))], return_tensors="pt").pixel_values
    outputs = [model(batch) for batch in pixels.split(64)]
    return torch.cat([torch.cat([o.pooler_output, o.patch_tokens.mean(1)], dim=1) for o in outputs])


def inner_queries(source: ImageSource) -> torch.Tensor:
    """Return (n,) bool, True for the right 30 % of the training tiles of each image. Ids end in `row_column`."""
    columns = torch.tensor([float(name.rsplit("_", 1)[1]) for name in source.ids])
    labels = torch.tensor(source.labels)
    queries = torch.zeros(len(source), dtype=torch.bool)
    for label in labels.unique():
        of_photo = labels == label
        queries[of_photo] = columns[of_photo] > columns[of_photo].quantile(0.7)
    return queries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="checkpoint folders")
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 80, 96], help="sides of the tiles in pixels")
    args = parser.parse_args()
    train, held_out = load_images("photos", split="train"), load_images("photos", split="validation")
    labels, held_out_labels = torch.tensor(train.labels), torch.tensor(held_out.labels)
    queries = inner_queries(train)
    for checkpoint in args.checkpoints:
        model = RegViTModel.from_pretrained(checkpoint).eval()
        for size in args.sizes:
            bank, test = (features(model, checkpoint, part, size) for part in (train, held_out))
            inner = knn_accuracy(bank[~queries], labels[~queries], bank[queries], labels[queries], k=(10,))[10]
            outer = knn_accuracy(bank, labels, test, held_out_labels, k=(10,))[10]
            print(f"{checkpoint}  {size} px: held-out {outer:.1%}, inner {inner:.1%}", flush=True)


if __name__ == "__main__":
    main()
