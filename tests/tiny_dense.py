"""Pictures of a few dozen pixels with masks or depth, and fine-tuning runs on them that take half a second."""

import numpy as np
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from builders import encoded, tiny_model
from hf_regvit.finetuning.arguments import FinetuningArguments
from hf_regvit.finetuning.run import finetune

TINY = {"num_register_tokens": 2, "layerscale_value": 1.0}  # changes of `builders.TINY`
SIZES = [(64, 48), (48, 48), (80, 48)]


def scene(seed: int) -> tuple[Image.Image, np.ndarray]:
    """A picture of a size of its own with a bright shape on a dark ground; the mask: 1 and 2, 0 does not count."""
    width, height = SIZES[seed % len(SIZES)]
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    centre, radius = (rng.integers(14, height - 14), rng.integers(14, width - 14)), rng.integers(9, 14)
    shape = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2
    pixels = np.where(shape[..., None], (220, 180, 60), (40, 60, 120)) + rng.integers(-20, 20, (height, width, 3))
    mask = np.where(shape, 2, 1).astype(np.uint8)
    mask[0] = 0
    return Image.fromarray(pixels.astype(np.uint8)), mask


def write_parquet(folder, column: str) -> str:
    """Parquet files of scenes with their masks or, for the column `depth`, with depth in millimeters."""
    folder.mkdir(parents=True)
    features = Features({"image": ImageFeature(), column: ImageFeature()})
    for part, seeds in (("train", range(12)), ("validation", range(30, 35))):
        pairs = [scene(seed) for seed in seeds]
        depths = np.array([0, 3000, 1200], dtype=np.uint16)
        targets = [Image.fromarray(depths[mask] if column == "depth" else mask) for _, mask in pairs]
        images = {"image": [image for image, _ in pairs], column: targets}
        rows = {name: [{"bytes": encoded(image), "path": None} for image in all_] for name, all_ in images.items()}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{part}.parquet")
    return str(folder)


def dense_run(folder, data: str, task: str, *, callbacks=(), **overrides):
    """The whole job: three steps an epoch of four pictures, in training as one process or several."""
    model = tiny_model(**TINY)
    fields = {
        "output_dir": str(folder), "data": data, "task": task, "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4, "num_train_epochs": 2, "learning_rate": 3e-3, "warmup_steps": 0,
        "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, "report_to": "none", "seed": 5,
    }  # fmt: skip
    if task == "semantic-segmentation":
        fields["do_reduce_labels"] = True
    args = FinetuningArguments(**fields | overrides)
    return finetune(args, model=model, callbacks=callbacks)
