"""A run on images with texts that takes a second: tinted noise, a metadata file, two tiny encoders, the whole job."""

import json
from pathlib import Path

import builders
from hf_regvit.image_text.arguments import ImageTextArguments
from hf_regvit.models.processing import default_image_processor

NAMES = ("red", "green", "blue")


def captioned_folder(root: Path, count: int = 8) -> Path:
    """Folder with `count` images of each color in a subfolder, and a metadata file with two texts of each."""
    lines = []
    for channel, name in enumerate(NAMES):
        for i in range(count):
            file = f"all/{name}{i}.png"
            builders.write(root / file, builders.tinted(channel, 100 * channel + i))
            lines.append(json.dumps({"file_name": file, "text": [f"a {name} picture", f"noise with much {name}"]}))
    builders.write(root / "metadata.jsonl", "\n".join(lines) + "\n")
    return root


def tower(folder: Path, **fields) -> Path:
    """Checkpoint of a RegViT of two blocks."""
    model = builders.tiny_model(**{"hidden_size": 16, "num_register_tokens": 2, "layerscale_value": 1.0} | fields)
    model.save_pretrained(folder)
    default_image_processor(model.config.image_size).save_pretrained(folder)
    return folder


def arguments(folder: Path, data: Path, **overrides) -> ImageTextArguments:
    """Arguments of a run of four steps; `tower` is written beside its folder if it does not exist."""
    start = folder.parent / "tower"
    fields = {
        "output_dir": str(folder), "data": str(data), "image_size": 16, "text_hidden_size": 64, "text_layers": 1,
        "vocab_size": 300, "projection_dim": 8, "per_device_train_batch_size": 8, "num_train_epochs": 4,
        "max_steps": 4, "learning_rate": 1e-3, "warmup_steps": 0, "logging_steps": 1, "diagnosis_images": 0,
        "disable_tqdm": True, "use_cpu": True, "report_to": "none", "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    if "init_from" not in overrides:
        fields["init_from"] = str(start if start.exists() else tower(start))
    return ImageTextArguments(**fields | overrides)
