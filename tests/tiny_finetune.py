"""A fine-tuning run that takes a tenth of a second: coloured squares, a model of two blocks, and the whole job."""

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

import builders
from hf_regvit.data.decoding import BadImageError
from hf_regvit.data.source import ImageSource
from hf_regvit.finetuning.arguments import FinetuningArguments
from hf_regvit.finetuning.classification import ImageClassification
from hf_regvit.finetuning.run import finetune

NAMES = ("blue", "green", "red")
SIDE = 16


def picture(index, label):
    """A noisy square whose hue is its class."""
    rng = np.random.default_rng([index, label])
    color = np.array(colorsys.hsv_to_rgb((2 - label) / 3, 0.7, 0.8)) * 255
    return Image.fromarray((color + rng.normal(0, 25, (20, 20, 3))).clip(0, 255).astype(np.uint8))


@dataclass
class Pictures:
    """Reads picture i; those in `broken` cannot be used, and `before` is called with the index of each."""

    labels: list[int]
    start: int = 0
    broken: Sequence[int] = ()
    before: Callable[[int], None] | None = None

    def __call__(self, index):
        if self.before:
            self.before(index)
        if index in self.broken:
            raise BadImageError(f"picture/{self.start + index}", "made to fail", "corrupt")
        return picture(self.start + index, self.labels[index])


def source(count, *, start=0, names=NAMES, broken=(), labels=None, before=None):
    labels = [(start + i) % len(names) for i in range(count)] if labels is None else labels
    ids = [f"picture/{start + i}" for i in range(count)]
    pictures = Pictures(labels, start, broken, before)
    return ImageSource("pictures", ids, pictures, labels=labels, label_names=tuple(names))


def backbone(seed=0, **overrides):
    fields = {"hidden_size": 16, "image_size": SIDE, "num_register_tokens": 2, "layerscale_value": 1.0}
    return builders.tiny_model(seed=seed, **fields | overrides)


def arguments(folder, **overrides):
    fields = {
        "output_dir": str(folder), "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8,
        "num_train_epochs": 2, "learning_rate": 3e-3, "warmup_steps": 0, "logging_steps": 1, "disable_tqdm": True,
        "use_cpu": True, "report_to": "none", "seed": 5,
    }  # fmt: skip
    return FinetuningArguments(**fields | overrides)


def run(folder, *, train=None, validation=None, model=None, callbacks=(), **overrides):
    """The whole job on 24 training and 9 validation pictures; returns the result and its arguments."""
    args = arguments(folder, **overrides)
    task = ImageClassification(args, train or source(24), validation or source(9, start=100))
    return finetune(args, model=model or backbone(), task=task, callbacks=callbacks), args
