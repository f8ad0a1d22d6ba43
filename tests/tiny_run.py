"""A pretraining run that takes a tenth of a second: network, data, arguments and trainer."""

import atexit
import gc

import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import ViTImageProcessor

import builders
from hf_regvit import RegViTModel
from hf_regvit.pretraining.arguments import PretrainingArguments
from hf_regvit.pretraining.crops import DinoCollator, masked_positions
from hf_regvit.pretraining.distillation import HeadShape, SelfDistillation
from hf_regvit.pretraining.feature_distillation import FeatureDistillation, FrozenTeacher
from hf_regvit.pretraining.trainer import DinoTrainer

# Trainer collects garbage at the start of every run; without the imported modules that is a tenth of the work.
gc.freeze()
atexit.register(gc.unfreeze)  # or extensions report leaks at the end

CROPS = ("global_crops", "local_crops")
GRID, PATCH, LOCAL = 4, 4, 2  # global crops 16 px, local crops 8 px
SHAPE = HeadShape(num_prototypes=12, hidden_size=10, bottleneck_size=6, num_layers=3)


def tiny_config(**overrides):
    fields = {"hidden_size": 16, "image_size": GRID * PATCH, "patch_size": PATCH, "layerscale_value": 0.1}
    return builders.tiny_config(**fields | {"use_mask_token": True} | overrides)


def tiny_network(*, seed=0, config=None, **options):
    torch.manual_seed(seed)
    return SelfDistillation(RegViTModel(config or tiny_config()), **{"dino_head": SHAPE} | options)


def frozen_teacher(*, seed=5, **fields):
    """A teacher of another width, patch size and normalization than the student of `tiny_network`."""
    model = builders.randomized(builders.tiny_model(hidden_size=24, image_size=32, patch_size=8, **fields), seed=seed)
    model.image_processor = ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.25, 0.5, 0.75]
    )
    return FrozenTeacher(model)


def feature_network(*, seed=0, teachers=None, **options):
    torch.manual_seed(seed)
    return FeatureDistillation(RegViTModel(tiny_config()), teachers or [frozen_teacher()], **options)


def tiny_batch(*, seed=0, batch=3, num_local=LOCAL, masked=True):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(2, batch, GRID**2, dtype=torch.bool)
    if masked:
        masks[0, 0, [1, 4, 5]] = True
        masks[1, batch - 1, [0, 15]] = True
    weights = (1 / masks.sum(-1).clamp(min=1))[..., None].expand_as(masks)[masks]
    return {
        "global_crops": torch.randn(2, batch, 3, GRID * PATCH, GRID * PATCH, generator=generator),
        "local_crops": torch.randn(num_local, batch, 3, 8, 8, generator=generator),
        "masks": masks,
        "mask_indices": masks.flatten().nonzero().flatten(),
        "mask_weights": weights,
    }


class Crops(Dataset):
    """Random crops that depend on (epoch, index) only, as those of the real data set do."""

    def __init__(self, size=10, global_size=GRID * PATCH, local_size=8, before=None):
        self.size, self.global_size, self.local_size = size, global_size, local_size
        self.before = before  # called with the key of every image before it is made
        self.seen = []

    def __len__(self):
        return self.size

    def __getitem__(self, key):
        epoch, index = key
        self.seen.append(key)
        if self.before:
            self.before(key)
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        return {
            "global_crops": torch.randn(2, 3, self.global_size, self.global_size, generator=generator),
            "local_crops": torch.randn(LOCAL, 3, self.local_size, self.local_size, generator=generator),
            "sample_id": index,
            "epoch": epoch,
        }


def arguments(folder, **overrides):
    fields = {
        "output_dir": str(folder),
        "preset": "tiny",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "layerscale_value": 0.1,
        "patch_size": PATCH,
        "global_crop_size": GRID * PATCH,
        "local_crop_size": 8,
        "num_local_crops": LOCAL,
        "head_num_prototypes": 12,
        "head_hidden_size": 10,
        "head_bottleneck_size": 6,
        "learning_rate": 2e-3,
        "learning_rate_reference_batch": 0,
        "per_device_train_batch_size": 3,
        "max_steps": 6,
        "logging_steps": 2,
        "save_strategy": "no",
        "monitor_steps": 0,
        "panel_steps": 0,
        "knn_steps": 0,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
    }
    return PretrainingArguments(**fields | overrides)


def trained(
    folder, *, callbacks=(), config=None, dataset=None, collator=None, resume=None, options=None, high_resolution=None,
    network=None, **overrides,
):  # fmt: skip
    """A trainer after its run, by default with the network of `tiny_network`."""
    trainer = DinoTrainer(
        network or tiny_network(config=config, **(options or {})),
        arguments(folder, **overrides),
        train_dataset=dataset or Crops(),
        data_collator=collator or DinoCollator((GRID, GRID), mask_probability=1.0, seed=7),
        callbacks=callbacks,
        high_resolution=high_resolution,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same_state(first, second):
    """Whether two state dicts are equal bit for bit."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])] == []


def checkpoint_state(checkpoint):
    """All tensors of a checkpoint: student, teacher, heads, centers, and the moments of the optimizer."""
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    flat = {f"{index}.{name}": value for index, entry in moments.items() for name, value in entry.items()}
    return load_file(checkpoint / "model.safetensors") | flat


class MasksOfTheImage:
    """A collator whose masks depend on the image alone, so that they stay when a batch is split; 3 and 2 patches."""

    def __call__(self, samples):
        masks = torch.zeros(2, len(samples), GRID**2, dtype=torch.bool)
        for row, sample in enumerate(samples):
            order = torch.randperm(GRID**2, generator=torch.Generator().manual_seed(sample["sample_id"]))
            masks[0, row, order[:3]] = True
            masks[1, row, order[-2:]] = True
        indices, weights = masked_positions(masks)
        crops = {name: torch.stack([sample[name] for sample in samples], dim=1) for name in CROPS}
        names = {f"{name}s": torch.tensor([sample[name] for sample in samples]) for name in ("sample_id", "epoch")}
        return {**crops, "masks": masks, "mask_indices": indices, "mask_weights": weights, **names}
